"""
A part in a process of its own, so that a check that crashes, hangs or breaks the GPU ends only itself.

After such an end the rest of the part goes on in another process, as long as the part's time lasts.
"""

import contextlib
import logging
import multiprocessing
import multiprocessing.connection
import os
import signal
import sys
import threading
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from pkgutil import resolve_name

from gpu_parts.exit_codes import FRESH_PROCESS, TOO_LONG
from gpu_parts.records import name_the_end
from gpu_parts.report import write_report


@dataclass
class Call:
    """What a process needs to know about the call: the options of gpu.py, and its command line."""

    output_dir: str
    minutes: float
    checks: list[str]
    tiny: bool
    device: str
    gen: str | None
    train_file: str | None
    data: str | None
    command: str


def run_part(part: str, call: Call) -> bool:
    """
    Run a part in as many processes as it takes.

    Returns:
        `bool`: whether the checks of the part could be read and begun.
    """
    deadline = time.time() + 60 * call.minutes
    name_the_end(call.output_dir, part, "An earlier call began it, and was itself ended.")
    while True:
        exit_code = run_process(part, call, deadline)
        if exit_code == 0:
            return True
        if exit_code == FRESH_PROCESS:
            continue
        out_of_time = time.time() >= deadline
        reason = end_of(exit_code, out_of_time, call.minutes)
        unfinished = name_the_end(call.output_dir, part, reason)
        write_report(call.output_dir)
        for name in unfinished:
            print(f"[{part}] {name}: begun and not ended. {reason}", flush=True)
        if out_of_time:
            return True
        if not unfinished:  # it ended before a check began, and would do so again
            print(f"[{part}] did not begin. {reason}", flush=True)
            return False


def end_of(exit_code: int, out_of_time: bool, minutes: float) -> str:
    """Return why a process ended, in a sentence."""
    if out_of_time:
        return f"Stopped at the end of the part's {minutes:g} minutes."
    if exit_code == TOO_LONG:
        return "It took longer than its limit."
    if exit_code < 0:
        return f"Its process was killed by signal {-exit_code}."
    return f"Its process ended with exit code {exit_code}."


def run_process(part: str, call: Call, deadline: float) -> int:
    """Run a part in one process until it ends or the time is over; return its exit code, below 0 for a signal."""
    process = multiprocessing.get_context("spawn").Process(target=work, args=(part, call, deadline))
    process.start()
    assert process.pid is not None
    try:
        process.join(max(0.0, deadline - time.time()))
    finally:  # also if this process is interrupted
        process.kill()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # what a check launched and did not wait for
        process.join()
    return process.exitcode or 0


def work(part: str, call: Call, deadline: float) -> None:
    """Run the checks of a part in this process, the first of its process group, and end it."""
    os.setpgrp()
    threading.Thread(target=end_with_parent, daemon=True).start()
    import torch._dynamo
    from transformers.utils import logging as transformers_logging

    # a log of a machine that is far away may be cut to its last lines
    transformers_logging.disable_progress_bar()
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning)

    from gpu_parts.kernels import choose_kernels
    from gpu_parts.runner import Context, run_checks

    choose_kernels()
    checks = resolve_name(f"gpu_parts.{part}:CHECKS")
    if part == "correctness":
        # otherwise a layer that was compiled too often would run eagerly, and its comparison would show nothing
        torch._dynamo.config.fail_on_recompile_limit_hit = True
    device = call.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    context = Context(
        device=torch.device(device),
        folder=Path(call.output_dir, part),
        deadline=deadline,
        tiny=call.tiny,
        gen=call.gen,
        train_file=call.train_file,
        data=call.data,
    )
    if run_checks(part, checks, context, call.command, call.checks):
        sys.stdout.flush()
        os._exit(FRESH_PROCESS)  # an orderly exit might wait for the broken GPU


def end_with_parent() -> None:
    """Wait until the process that started this one is gone, then end this one and all that it launched."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    multiprocessing.connection.wait([parent.sentinel])
    os.killpg(0, signal.SIGKILL)
