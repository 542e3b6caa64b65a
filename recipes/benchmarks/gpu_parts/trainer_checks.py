"""Checks of a step of `CoSupTrainer`, which needs datasets: every arm of the benchmark of a step, and a launch."""

import os
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors import safe_open

from gpu_parts.comparing import Comparisons, relative_error
from gpu_parts.errors import FailedProcess
from gpu_parts.runner import Context
from gpu_parts.small_world import SmallWorld
from gpu_parts.training_step import EXACT, References, Step, references

ROOT = Path(__file__).parents[3]
CONFIG = ROOT / "recipes" / "accelerate_configs" / "fsdp2.yaml"
SUBTRACTED = 1e-4  # of gradients that were subtracted from weights in float32, relative


def trainer_arms(context: Context) -> dict[str, Any]:
    """Steps of `CoSupTrainer`, in every arm of the benchmark of a step, equal the padded baseline."""
    import datasets

    from train_arms import CompiledOurs, Ours, gradients_of, padded_baseline

    datasets.disable_progress_bars()
    world = SmallWorld(context)
    instances = world.instances(6 if context.tiny else 32)
    size = len(instances)
    rounding = references(world).rounding
    comparisons = Comparisons()
    steps: dict[torch.dtype, Step] = {}
    with tempfile.TemporaryDirectory() as folder:
        for dtype in context.dtypes[:1] if context.tiny else context.dtypes:
            half = dtype == torch.bfloat16
            script = SimpleNamespace(batch_size=size, seed=0, bf16=half)
            make = partial(Ours, world.model, folder, instances, script)
            arms = {
                "CoSupTrainer": make(),
                "… GradCache": make(nsp_batch_size=size, per_device_train_batch_size=2),
                "… padding-free": make(padding_free=True),
            }
            if context.device.type == "cuda":
                arms["… torch_compile"] = CompiledOurs(world.model, folder, instances, script)
            rows = list(arms["CoSupTrainer"].trainer.train_dataset)
            world.model.zero_grad()
            autocast = partial(torch.autocast, context.device.type, torch.bfloat16, enabled=half)
            loss = padded_baseline(world.model, rows, autocast)
            steps[dtype] = Step(loss, gradients_of(world.model))
            for name, arm in arms.items():
                world.model.zero_grad()
                step = Step(arm.step(rows), gradients_of(world.model))
                expected = References(steps[torch.float32], steps[dtype], rounding)
                expected.compare(comparisons, f"{name}, padded baseline", dtype, step)
    return comparisons.result()


def accelerate_fsdp2(context: Context) -> dict[str, Any]:
    """A step under `accelerate launch` with `fsdp2.yaml`, on one GPU, has the loss and gradients of a step without."""
    steps = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in ("alone", "sharded"):
            file = f"{folder}/{name}.safetensors"
            launch(context, file, sharded=name == "sharded")
            steps[name] = read_step(file)
    comparisons = Comparisons()
    alone, sharded = steps["alone"], steps["sharded"]
    what = "accelerate's FSDP2 of one rank, no FSDP2"
    comparisons.add(f"{what}: loss", torch.float32, abs(sharded.loss - alone.loss) / alone.loss, EXACT)
    error = relative_error(sharded.gradients, alone.gradients)
    comparisons.add(f"{what}: gradients", torch.float32, error, SUBTRACTED)
    return comparisons.result()


def launch(context: Context, file: str, sharded: bool) -> None:
    """
    Run one_rank.py in a process of its own, under `accelerate launch` if its weights are to be shards.

    Raises:
        [`FailedProcess`]: if it ends with an error.
    """
    command = [sys.executable]
    if sharded:
        options = ["--config_file", str(CONFIG), "--num_processes", "1", "--mixed_precision", "no"]
        command += ["-m", "accelerate.commands.launch", *options]
    command += [str(Path(__file__).with_name("one_rank.py")), "--file", file, "--device", context.device.type]
    command += ["--tiny", str(context.tiny), "--sharded", str(sharded)]
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]  # packages may have been installed elsewhere
    variables = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    done = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=150)
    if done.returncode != 0:
        raise FailedProcess(f"one_rank.py ({'sharded' if sharded else 'alone'})", done.stderr)


def read_step(file: str) -> Step:
    """Return the step that one_rank.py wrote."""
    with safe_open(file, "pt") as tensors:
        gradients = {name: tensors.get_tensor(name) for name in tensors.keys()}
        return Step(float(tensors.metadata()["loss"]), gradients)
