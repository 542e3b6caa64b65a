"""
One SGD step of CoSupTrainer, alone or under `accelerate launch`; writes the gradients and the loss.

Launched by the check `accelerate_fsdp2`, twice. Its argument is a JSON object: `folder` and `file` (where to write),
`tiny`, `device`, and `sharded` (whether all weights must be shards).
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # recipes/benchmarks/

import torch
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor

from trainer import CoSupTrainer, CoSupTrainingArguments

from gpu_parts.runner import Context
from gpu_parts.small_world import SmallWorld


def train(job: dict[str, Any]) -> None:
    """
    Take the step. At a learning rate of 1, it subtracts the gradients from the weights.

    Raises:
        `RuntimeError`: if the weights are not sharded as the job expects.
    """
    context = Context(torch.device(job["device"]), Path(job["folder"]), time.time() + 600, job["tiny"])
    world = SmallWorld(context)
    before = {name: weight.detach().cpu().clone() for name, weight in world.model.named_parameters()}
    instances = world.instances(6 if context.tiny else 32)
    args = CoSupTrainingArguments(
        f"{job['folder']}/training",
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
    if num_shards != (len(gradients) if job["sharded"] else 0):
        kind = trainer.accelerator.distributed_type
        raise RuntimeError(f"{num_shards} of {len(gradients)} weights are shards; distributed_type is {kind}.")
    (entry,) = [entry for entry in trainer.state.log_history if "loss" in entry]
    save_file(gradients, job["file"], metadata={"loss": repr(float(entry["loss"]))})


if __name__ == "__main__":
    train(json.loads(sys.argv[1]))
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
