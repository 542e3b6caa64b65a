"""A small world of names and towns to train on, and the arguments of a short training."""

import numpy as np

from trainer import CoSupTrainingArguments

SYLLABLES = "ba dan ki fel lo gor mu hin ne jas po ker ru lim si tos".split()
NAMES = list(dict.fromkeys("".join(np.random.default_rng(i).choice(SYLLABLES, 3, replace=False)) for i in range(600)))


def world(names, seed=0):
    """One instance a name: its town stands in its passage only; every fifth needs no passage."""
    rng = np.random.default_rng(seed)
    instances = []
    for i, name in enumerate(names):
        town = "".join(rng.choice(["va", "ze", "xi"], 2))
        passage = {"id": name, "title": name, "text": f"{name} lives in {town}."}
        segment = {"text": town, "passage": passage} if i % 5 else {"text": "hello", "passage": None}
        instances.append(
            {
                "id": name,
                "dataset": "d",
                "instruction": "",
                "input": f"where is {name}?" if i % 5 else "say hello",
                "segments": [segment],
            }
        )
    return instances


def arguments(tmp_path, **kwargs):
    defaults = {
        "per_device_train_batch_size": 8,
        "learning_rate": 3e-3,
        "logging_steps": 1,
        "report_to": "none",
        "save_strategy": "no",
    }
    defaults |= {"disable_tqdm": True, "use_cpu": True, "max_length": 256}
    return CoSupTrainingArguments(str(tmp_path), **{**defaults, **kwargs})
