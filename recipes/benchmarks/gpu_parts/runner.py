"""
Run the checks of a part, one after another, and write the record of each.

A part is a module with a list `CHECKS` of [`Check`]. A check is a function of a [`Context`] that returns a dictionary
for JSON, of a few kB. These keys of the dictionary have a meaning, all others are just kept:

    summary     one line for the report
    missed      list of bounds that were not met; a check that missed one counts as failed
    tables      list of {"title": str, "header": [str], "rows": [[str]]}, which the report shows
"""

import contextlib
import gc
import importlib.util
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers

from gpu_parts.errors import cause_and_place
from gpu_parts.exit_codes import TOO_LONG
from gpu_parts.records import WAITING, Record, read_record, write_record
from gpu_parts.report import write_report
from measuring import GB, Meter, cpu_name


class Skip(Exception):
    """Raised by a check that cannot run here; its message is the reason, one line."""


class Later(Exception):
    """Raised by a check that kept what it has done, and goes on in the next call; its message says what remains."""


@dataclass
class Context:
    """
    What a check may use.

    Args:
        device (`torch.device`): where to compute.
        folder (`Path`): folder of the part, for files of the check; not everything in it leaves the machine.
        deadline (`float`): end of the part's time, as `time.time()` counts.
        tiny (`bool`): use shapes that a CPU can do in seconds.
        gen (`str`, *optional*): name or path of Gen.
        train_file (`str`, *optional*): training instances.
        data (`str`, *optional*): folder of training instances, questions and corpora.
        dtypes (`tuple[torch.dtype]`): dtypes that are compared.
    """

    device: torch.device
    folder: Path
    deadline: float
    tiny: bool = False
    gen: str | None = None
    train_file: str | None = None
    data: str | None = None
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16)

    def seconds_left(self) -> float:
        """Return the seconds that are left of the part's time."""
        return self.deadline - time.time()


@dataclass
class Check:
    """
    A check and what it needs.

    Args:
        name (`str`): name of the check and of its file.
        run (`Callable`): takes a [`Context`], returns a dictionary for JSON.
        minutes (`float`): rough time on a large GPU. A check that takes longer than what is left does not begin.
        limit (`float`, *optional*): minutes after which it counts as hanging, and its process is ended.
        gpu (`bool`): whether it needs a GPU.
        packages (`Sequence[str]`): packages that it imports and that may be missing, by the names of their modules.
        options (`Sequence[str]`): options that must be given: `gen`, `train_file`, `data`.
    """

    name: str
    run: Callable[[Context], dict[str, Any]]
    minutes: float
    limit: float | None = None
    gpu: bool = False
    packages: Sequence[str] = field(default_factory=tuple)
    options: Sequence[str] = field(default_factory=tuple)

    def lacks(self, context: Context) -> str:
        """Return what the check needs and this machine or call does not have, in one line, or nothing."""
        if self.gpu and context.device.type != "cuda":
            return "needs a GPU"
        for package in self.packages:
            if not is_installed(package):
                return f"{package} is not installed"
        for option in self.options:
            if getattr(context, option) is None:
                return f"needs --{option}"
        return ""


def is_installed(package: str) -> bool:
    """Return whether a package can be found, without importing it."""
    try:
        return importlib.util.find_spec(package) is not None
    except (ImportError, ValueError):  # its parent is missing, or something stands in for it
        return False


def run_checks(part: str, checks: Sequence[Check], context: Context, command: str, names: Sequence[str] = ()) -> bool:
    """
    Run the checks of a part that have no result yet.

    Args:
        part (`str`): name of the part.
        checks (`Sequence[Check]`): its checks.
        context (`Context`): what they may use; the records go next to its folder.
        command (`str`): the command line, for the records.
        names (`Sequence[str]`): the checks to run; by default all.

    Returns:
        `bool`: whether a failed check left the GPU unusable in this process, so that the rest needs another one.
    """
    output_dir = context.folder.parent
    for order, check in enumerate(checks):
        if read_record(output_dir, part, check.name) is None:
            write_record(output_dir, new_record(part, check, order, context))
    for check in checks:
        if names and check.name not in names:
            continue
        record = read_record(output_dir, part, check.name)
        assert record is not None
        if record["status"] not in WAITING:
            say(part, check, f"{record['status']} before")
            continue
        record |= {"command": command, **machine(context.device)}
        record |= run_check(part, check, context, record)
        write_record(output_dir, record)
        write_report(output_dir)
        say(part, check, ending(record))
        if record["status"] == "failed" and not is_usable(context.device):
            return True
    return False


def new_record(part: str, check: Check, order: int, context: Context) -> Record:
    """Return the record of a check that has not run."""
    return {
        "part": part,
        "check": check.name,
        "order": order,
        "minutes": check.minutes,
        "tiny": context.tiny,
        "status": "not run",
        "reason": "",
    }


def run_check(part: str, check: Check, context: Context, record: Record) -> Record:
    """Run one check, unless it lacks something or time; return what changes in its record."""
    if lacks := check.lacks(context):
        return {"status": "skipped", "reason": lacks}
    minutes_left = context.seconds_left() / 60
    if check.minutes > minutes_left:
        reason = f"for the next call: needs about {check.minutes:g} minutes, {max(0, minutes_left):.1f} remain"
        return {"status": "left", "reason": reason}
    write_record(context.folder.parent, record | {"status": "begun", "reason": ""})
    write_report(context.folder.parent)
    say(part, check, f"begins (about {check.minutes:g} min)")
    torch.manual_seed(0)
    free_memory(context.device)
    start = time.perf_counter()
    with ended_after(check.limit):
        change = outcome(check, context)
    change["seconds"] = time.perf_counter() - start
    change["peak_memory_gb"] = peak_memory(context.device) / GB
    return change


@contextlib.contextmanager
def ended_after(minutes: float | None) -> Iterator[None]:
    """End this process if the `with` block takes longer; a kernel or a collective that hangs cannot be interrupted."""
    timer = None
    if minutes is not None:
        timer = threading.Timer(60 * minutes, os._exit, [TOO_LONG])
        timer.daemon = True
        timer.start()
    try:
        yield
    finally:
        if timer is not None:
            timer.cancel()


def outcome(check: Check, context: Context) -> Record:
    """Call a check, and return its status, reason and result."""
    try:
        result = check.run(context)
        if context.device.type == "cuda":
            torch.cuda.synchronize()  # an error of a kernel may only show here
    except Skip as reason:
        return {"status": "skipped", "reason": str(reason)}
    except Later as rest:
        return {"status": "left", "reason": str(rest)}
    except (Exception, SystemExit) as error:  # recipes end with SystemExit
        return {"status": "failed", "reason": cause_and_place(error)}
    missed = result.get("missed", [])
    return {"status": "failed" if missed else "done", "reason": "; ".join(missed), "result": result}


def ending(record: Record) -> str:
    """Return the end of the line about a check that has just been dealt with."""
    text = record["status"]
    if record["reason"]:
        text += f": {record['reason'].splitlines()[0]}"
    if record["status"] in ("done", "failed"):
        text += f" ({record['seconds']:.1f} s)"
    return text


def say(part: str, check: Check, text: str) -> None:
    """Print a line about a check, at once."""
    print(f"[{part}] {check.name}: {text}", flush=True)


# ---------------------------------------------------------------------- the machine


def machine(device: torch.device) -> dict[str, Any]:
    """Return the hardware and the versions, for a record."""
    if device.type == "cuda":
        hardware = torch.cuda.get_device_name(device)
    else:
        hardware = f"{cpu_name()}, {torch.get_num_threads()} threads"
    return {
        "hardware": hardware,
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "cuda": torch.version.cuda,
    }


def free_memory(device: torch.device) -> None:
    """Free what earlier checks left: garbage, compiled graphs, the allocator's cache; start a new peak."""
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()
    gc.collect()
    Meter.highest = 0.0
    if device.type == "cuda" and is_usable(device):
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    elif Path("/proc/self/clear_refs").exists():
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")


def peak_memory(device: torch.device) -> float:
    """Return the peak since [`free_memory`] in bytes: allocated on a GPU, resident memory of the process on a CPU."""
    if device.type != "cuda" and not Path("/proc/self/status").exists():
        return float("nan")
    return max(Meter.highest, Meter(device).peak())  # a check's own meters reset the peak


def is_usable(device: torch.device) -> bool:
    """Return whether the device still answers; an illegal memory access ends a GPU for the whole process."""
    if device.type != "cuda":
        return True
    try:
        torch.cuda.synchronize()
        torch.ones(1, device=device).add_(1)
        torch.cuda.synchronize()
    except RuntimeError:
        return False
    return True
