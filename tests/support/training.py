"""A small world of names and towns to train on, and the arguments of a short training."""

from pathlib import Path
from typing import Any

import numpy as np
import torch

from trainer import CoSupTrainingArguments

SYLLABLES = "ba dan ki fel lo gor mu hin ne jas po ker ru lim si tos".split()
NAMES = list(dict.fromkeys("".join(np.random.default_rng(i).choice(SYLLABLES, 3, replace=False)) for i in range(600)))


def world(names: list[str], seed: int = 0) -> list[dict]:
    """Return an instance for each name. Only its passage says where it lives; every fifth needs no passage."""
    rng = np.random.default_rng(seed)
    instances = []
    for i, name in enumerate(names):
        town = "".join(rng.choice(["va", "ze", "xi"], 2))
        if i % 5:
            question = f"where is {name}?"
            passage = {"id": name, "title": name, "text": f"{name} lives in {town}."}
            segment = {"text": town, "passage": passage}
        else:
            question = "say hello"
            segment = {"text": "hello", "passage": None}
        instances.append({"id": name, "dataset": "d", "instruction": "", "input": question, "segments": [segment]})
    return instances


def questions(names: list[str], seed: int = 0) -> tuple[list[dict], list[dict]]:
    """Return the questions of a world without their passages, but with answers and provenance; and all passages."""
    asked = []
    corpus = []
    for instance in world(names, seed):
        (segment,) = instance.pop("segments")
        if segment["passage"] is not None:
            corpus.append(segment["passage"])
            evidence = [[segment["passage"]["id"]]]
            asked.append({**instance, "answers": [segment["text"]], "provenance": evidence})
    return asked, corpus


def arguments(output_dir: str | Path, **kwargs: Any) -> CoSupTrainingArguments:
    """Return the arguments of a short training on the CPU, which logs every step."""
    defaults = {
        "per_device_train_batch_size": 8,
        "learning_rate": 3e-3,
        "max_length": 256,
        "logging_steps": 1,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "use_cpu": True,
    }
    return CoSupTrainingArguments(str(output_dir), **{**defaults, **kwargs})


class Endless(torch.utils.data.Dataset):
    """A map-style dataset that never raises IndexError: only its length says where it ends."""

    def __init__(self, rows):
        self.rows = rows

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, row):
        return self.rows[row % len(self.rows)]
