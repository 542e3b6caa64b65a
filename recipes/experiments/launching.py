"""The processes of an experiment: functions that launch recipes, lock folders, and read the facts of a training."""

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
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from modeling_cosup.files_cosup import locked, read_json

from experiments.definition import ROOT
from experiments.task_files import Entry, Meaning


class Failed(Exception):
    """The failure of a recipe. The message says why it failed."""


@dataclass
class Run:
    """
    A run of an experiment: one arm with one seed.

    Args:
        arm (`str`): name of the arm.
        seed (`int`): seed of the data order, the weights and the world.
        options (`dict`): options of recipes/train.py.
        folder (`Path`): folder of the training.
        evaluation (`Path`): folder of the evaluation.
        entries (`list[dict]`): the tasks in each of their settings.
        meaning (`dict`): name of an entry -> its task, setting, size and split.
        start (`Run`, *optional*): the run of the same seed whose model the training starts from.
        failure (`str`, *optional*): why the training or the evaluation failed.
    """

    arm: str
    seed: int
    options: dict[str, Any]
    folder: Path
    evaluation: Path
    entries: list[Entry] = field(default_factory=list)
    meaning: Meaning = field(default_factory=dict)
    start: "Run | None" = None
    failure: str | None = None

    @property
    def model(self) -> Path:
        """The folder of the trained model; with adapters, of the whole model."""
        model = self.folder / "model"
        merged = model / "merged"
        return merged if merged.exists() else model

    @property
    def name(self) -> str:
        """The arm and the seed, for messages."""
        return f"{self.arm}, seed {self.seed}"


def launch(
    recipe: str, arguments: Sequence[str], run: Run, log: Path, accelerate_config: str, lock: int | None = None
) -> tuple[str, float]:
    """
    Run a recipe through accelerate and append its output to a log.

    Args:
        recipe (`str`): file name of the recipe.
        arguments (`Sequence[str]`): command-line arguments of the recipe.
        run (`Run`): the run, for messages.
        log (`Path`): the log file, to which the output is appended.
        accelerate_config (`str`): config file of `accelerate launch`.
        lock (`int`, *optional*): an open lock file that the recipe inherits, see [`locked_folder`].

    Returns:
        `tuple[str, float]`: the command, and its duration in seconds.

    Raises:
        `Failed`: if the recipe fails, with the last error in its log.
    """
    launcher = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch"]
    launcher += ["--config_file", accelerate_config]
    command = [*launcher, str(ROOT / "recipes" / recipe), *arguments]
    inherited = () if lock is None else (lock,)
    start = time.monotonic()
    say(run, f"{recipe}, log: {log}")
    with open(log, "ab") as file:
        begin = file.tell()
        process = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, pass_fds=inherited)
    if process.returncode:
        raise Failed(f"{recipe}: {reason(log, begin)} (exit code {process.returncode}; log: {log})")
    seconds = round(time.monotonic() - start, 1)
    shown = shlex.join(["accelerate", *command[3:]]).replace(f"{ROOT}/", "")
    return shown, seconds


def reason(log: Path, begin: int = 0) -> str:
    """Return the last error in a log from byte `begin` on, or the last line if there is no error."""
    with open(log, "rb") as file:
        file.seek(begin)
        text = file.read().decode(errors="replace").replace("\r", "\n")
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if _is_error(line)]
    return (errors or lines or ["it wrote nothing"])[-1]


def _is_error(line: str) -> bool:
    if "CalledProcessError" in line:  # accelerate only says that the recipe failed
        return False
    return re.match(r"error: |[\w.]*(Error|Exception|Interrupt|Killed)\b", line) is not None


def locked_folder(folder: Path) -> AbstractContextManager[int | None]:
    """
    Create a folder and lock it for this process. Another runner with the same cache waits for it.

    The context is an open lock file. A program that inherits the file holds the lock too: if a runner is killed while
    its training still runs, the training is not started a second time.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = folder.with_name(f".{folder.name}.lock")
    busy = f"{folder}: another process is working on it; waiting"
    return locked(lock, busy, on_wait=functools.partial(print, flush=True), keep=True)


def hardware(options: dict[str, Any]) -> str:
    """Return a description of the hardware of a training."""
    if torch.cuda.is_available():
        return f"{torch.cuda.get_device_name()} x {torch.cuda.device_count()}"
    return f"{cpu_name()}, {options.get('num_threads') or os.cpu_count()} threads"


def cpu_name() -> str:
    """Return the name of the processor."""
    with contextlib.suppress(OSError):
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            for line in file:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def training_facts(model: Path) -> dict[str, Any]:
    """Return the numbers of a finished training: `steps`, `parameters`, and its last logged `losses`."""
    state = read_json(model / "trainer_state.json")
    logs = [entry for entry in state["log_history"] if "loss" in entry]
    last = logs[-1] if logs else {}
    sizes = {part: count for part, count in parameters(model).items() if count}
    losses = {name: value for name, value in last.items() if name.endswith("loss")}
    return {"steps": state["global_step"], "parameters": sizes, "losses": losses}


def parameters(model: Path) -> dict[str, int]:
    """Return the number of parameters of Gen and Emb_seq, from the headers of the weight files."""
    counts = {"gen": 0, "emb_seq": 0}
    folder = model / "merged" if (model / "merged").exists() else model
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            for name in file.keys():
                part = name.partition(".")[0]
                if part in counts:
                    counts[part] += math.prod(file.get_slice(name).get_shape())
    return counts


def say(run: Run, text: str) -> None:
    """Print a line about a run."""
    print(f"[{run.name}] {text}", flush=True)
