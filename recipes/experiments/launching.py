"""The processes of an experiment: recipes launched with a log, folders locked by one process, facts of a training."""

import contextlib
import functools
import math
import os
import platform
import re
import shlex
import subprocess
import sys
import time

import torch
from safetensors import safe_open

from modeling_cosup.files_cosup import locked, read_json

from experiments.definition import ROOT


class Failed(Exception):
    """An arm did not come to its end; the message says why."""


def launch(recipe, arguments, run, log, args, lock=None):
    """
    Run a recipe through accelerate, its output in a log.

    Returns:
        `(str, float)`: the command, and the seconds that it took.

    Raises:
        `Failed`: with the last error of the log.
    """
    launcher = [
        sys.executable,
        "-m",
        "accelerate.commands.accelerate_cli",
        "launch",
        "--config_file",
        args.accelerate_config,
    ]
    command, start = [*launcher, str(ROOT / "recipes" / recipe), *arguments], time.monotonic()
    say(run, f"{recipe}, log: {log}")
    with open(log, "ab") as file:
        begin = file.tell()
        code = subprocess.run(
            command, stdout=file, stderr=subprocess.STDOUT, pass_fds=() if lock is None else (lock,)
        ).returncode
    if code:
        raise Failed(f"{recipe}: {reason(log, begin)} (exit code {code}; log: {log})")
    return shlex.join(["accelerate", *command[3:]]).replace(f"{ROOT}/", ""), round(time.monotonic() - start, 1)


def reason(log, begin=0):
    """The last error that a log tells of."""
    with open(log, "rb") as file:
        file.seek(begin)
        lines = [
            line.strip()
            for line in file.read().decode(errors="replace").replace("\r", "\n").splitlines()
            if line.strip()
        ]
    errors = [
        line
        for line in lines
        if re.match(r"error: |[\w.]*(Error|Exception|Interrupt|Killed)\b", line) and "CalledProcessError" not in line
    ]
    return (errors or lines or ["it said nothing"])[-1]


def locked_folder(folder):
    """
    A folder for this process alone; another runner of the same cache waits.

    A program that inherits the open file that this yields holds the lock too: a training whose runner was killed is not
    begun a second time next to it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = folder.with_name(f".{folder.name}.lock")
    return locked(
        lock, f"{folder}: another process works on it; waiting", on_wait=functools.partial(print, flush=True)
    )


def hardware(options):
    """What a training ran on, in words."""
    if torch.cuda.is_available():
        return f"{torch.cuda.get_device_name()} x {torch.cuda.device_count()}"
    return f"{cpu_name()}, {options.get('num_threads') or os.cpu_count()} threads"


def cpu_name():
    """Name of the processor."""
    with contextlib.suppress(OSError, StopIteration):
        with open("/proc/cpuinfo") as file:
            return next(line.partition(":")[2].strip() for line in file if line.startswith("model name"))
    return platform.processor() or platform.machine()


def training_facts(model):
    """Numbers of a finished training: `steps`, `parameters`, and the losses that it logged last."""
    state = read_json(model / "trainer_state.json")
    last = next((entry for entry in reversed(state["log_history"]) if "loss" in entry), {})
    sizes = {part: count for part, count in parameters(model).items() if count}
    losses = {name: value for name, value in last.items() if name.endswith("loss")}
    return {"steps": state["global_step"], "parameters": sizes, "losses": losses}


def parameters(model):
    """Number of parameters of Gen and Emb_seq, by the headers of their weights."""
    counts = {"gen": 0, "emb_seq": 0}
    folder = model / "merged" if (model / "merged").exists() else model
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            for name in file.keys():
                part = name.partition(".")[0]
                if part in counts:
                    counts[part] += math.prod(file.get_slice(name).get_shape())
    return counts


def say(run, text):
    print(f"[{run.name}] {text}", flush=True)
