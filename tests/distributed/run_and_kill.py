"""
Trainings that can be killed at a step or while saving, and resumed. Launched by test_kill_and_resume.py.

Every rank writes what each of its steps saw.
"""

import gc
import json
import os
import signal
import sys
from pathlib import Path

import torch.distributed as dist
from transformers import TrainerCallback

sys.path.insert(0, str(Path(__file__).parents[1]))

from support.models import PASSAGES, make_model
from trainer import CoSupTrainer, CoSupTrainingArguments


def die():
    os.kill(os.getpid(), signal.SIGKILL)


class Recorded(CoSupTrainer):
    """Writes step, instances and loss of each training step to `record`, and dies while saving a given step."""

    def __init__(self, *args, record, die_while_saving, **kwargs):
        self.record = record
        self.die_while_saving = die_while_saving
        super().__init__(*args, **kwargs)

    def training_step(self, model, inputs, num_items_in_batch=None):
        loss = super().training_step(model, inputs, num_items_in_batch)
        instance_ids = sorted(sum(inputs["facts"].instance_ids, []))
        entry = [self.state.global_step, instance_ids, repr(float(loss))]
        self.record.write(json.dumps(entry) + "\n")
        self.record.flush()
        return loss

    def _save_rng_state(self, output_dir):
        if self.die_while_saving == self.state.global_step:  # weights and optimiser are written, the rest is not
            Path(output_dir, "trainer_state.json").write_text("{")
            die()
        super()._save_rng_state(output_dir)


class Die(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            die()


def train(output, options, name, folder, die_at=-1, die_while_saving=-1, resume=False):
    """
    Train ten steps.

    Args:
        output (`str`): folder of everything that is written.
        options (`dict`): training arguments.
        name (`str`), folder (`str`): of the records, and of the checkpoints.
        die_at, die_while_saving (`int`): the step at which the process kills itself; -1 for none.
        resume (`bool`): start from the last complete checkpoint in `folder`.
    """
    rank = int(os.environ.get("RANK", 0))
    instances = []
    for i in range(24):
        segment = {"text": "free", "passage": None}
        if i % 4:
            segment = {"text": f"a {i}", "passage": PASSAGES[i % 6]}
        instances.append({"id": f"i{i}", "input": f"question {i}", "segments": [segment]})
    args = CoSupTrainingArguments(
        str(Path(output, folder)),
        use_cpu=True,
        max_steps=10,
        save_strategy="steps",
        save_steps=2,
        save_total_limit=2,
        learning_rate=1e-3,
        report_to="none",
        disable_tqdm=True,
        **options,
    )
    record = open(Path(output, f"{name}-{rank}.jsonl"), "w")
    model = make_model(gen_kwargs={"attention_dropout": 0.2, "seed": 3 if resume else 0})
    trainer = Recorded(
        model, args, train_dataset=instances, callbacks=[Die(die_at)], record=record, die_while_saving=die_while_saving
    )
    trainer.train(resume_from_checkpoint=True if resume else None)
    record.close()


if __name__ == "__main__":
    output, runs, options = sys.argv[1:]
    for run in json.loads(runs):
        train(output, json.loads(options), **run)
    gc.collect()
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
