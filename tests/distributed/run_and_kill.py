"""A training run that can be killed at a step or while it saves, and resumed; rank 0 writes what every step saw. Launched by test_kill_and_resume.py."""

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
    """Notes the instances of each step, and dies where it is told to."""

    def __init__(self, *args, record, die_while_saving, **kwargs):
        self.record, self.die_while_saving = record, die_while_saving
        super().__init__(*args, **kwargs)

    def training_step(self, model, inputs, num_items_in_batch=None):
        loss = super().training_step(model, inputs, num_items_in_batch)
        self.record.write(
            json.dumps([self.state.global_step, sorted(sum(inputs["facts"].instance_ids, [])), repr(float(loss))])
            + "\n"
        )
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


def main(output, name, die_at, die_while_saving, resume, options):
    rank = int(os.environ.get("RANK", 0))
    segments = [
        [{"text": f"a {i}", "passage": PASSAGES[i % 6]}] if i % 4 else [{"text": "free", "passage": None}]
        for i in range(24)
    ]
    instances = [{"id": f"i{i}", "input": f"question {i}", "segments": segments[i]} for i in range(24)]
    args = CoSupTrainingArguments(
        str(Path(output, "run")),
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


if __name__ == "__main__":
    main(
        sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), sys.argv[5] == "resume", json.loads(sys.argv[6])
    )
    gc.collect()
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
