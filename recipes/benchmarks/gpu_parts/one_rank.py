"""
One SGD step of CoSupTrainer, alone or under `accelerate launch`; writes its gradients and its loss.

The check `accelerate_fsdp2` of recipes/benchmarks/gpu.py launches it, once alone and once sharded.
"""

import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(1, str(Path(__file__).parents[1]))  # recipes/benchmarks/, for `gpu_parts`
sys.path.insert(2, str(Path(__file__).parents[2]))  # recipes/, for `shared`

from shared.cli import parse

import torch
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor

from trainer import CoSupTrainer, CoSupTrainingArguments

from gpu_parts.kernels import choose_kernels
from gpu_parts.runner import Context
from gpu_parts.small_world import SmallWorld


@dataclass
class StepArguments:
    """What to do, and where to write."""

    file: str = field(metadata={"help": "safetensors file for the gradients; the trainer's folder is next to it."})
    device: str = field(default="cpu", metadata={"help": "Where to compute: cpu or cuda."})
    tiny: bool = field(default=False, metadata={"help": "Tiny shapes."})
    sharded: bool = field(default=False, metadata={"help": "Whether all weights must be shards."})


def train(script: StepArguments) -> None:
    """
    Take the step. At a learning rate of 1, it subtracts the gradients from the weights.

    Raises:
        `RuntimeError`: if the weights are not sharded as the options expect.
    """
    folder = Path(script.file).parent
    context = Context(torch.device(script.device), folder, time.time() + 600, script.tiny)
    world = SmallWorld(context)
    before = {name: weight.detach().cpu().clone() for name, weight in world.model.named_parameters()}
    instances = world.instances(6 if context.tiny else 32)
    args = CoSupTrainingArguments(
        str(folder / "training"),
        max_steps=1,
        per_device_train_batch_size=len(instances),
        optim="sgd",
        learning_rate=1.0,
        max_grad_norm=0.0,
        lr_scheduler_type="constant",
        logging_steps=1,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        tf32=False,
    )
    trainer = CoSupTrainer(world.model, args, train_dataset=instances)
    trainer.train()
    gradients = {}
    num_shards = 0
    for name, weight in trainer.accelerator.unwrap_model(trainer.model_wrapped).named_parameters():
        after = weight.detach()
        if isinstance(after, DTensor):
            after = after.full_tensor()
            num_shards += 1
        gradients[name] = before[name] - after.float().cpu()
    if num_shards != (len(gradients) if script.sharded else 0):
        kind = trainer.accelerator.distributed_type
        raise RuntimeError(f"{num_shards} of {len(gradients)} weights are shards; distributed_type is {kind}.")
    (entry,) = [entry for entry in trainer.state.log_history if "loss" in entry]
    save_file(gradients, script.file, metadata={"loss": repr(float(entry["loss"]))})


def main() -> None:
    """Take the step, and leave the process group, if there is one."""
    (script,) = parse([StepArguments], __doc__)
    choose_kernels()
    train(script)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
