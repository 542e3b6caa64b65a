"""Arms of a comparison that do not run on a machine: the others are measured, and the error is reported."""

import gc
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from gpu_parts.errors import one_line

NO_TIME = "no time is left"


def first_calls(calls: dict[str, Callable[[], Any]], seconds_left: float) -> dict[str, str]:
    """
    Call every arm once, which warms it up.

    Whatever kernels, compilers and their versions raise ends only that arm.

    Args:
        calls (`dict[str, Callable]`): name of each arm -> function without arguments.
        seconds_left (`float`): no arm but the first begins later than this after the call, so that one that compiles
            for a minute does not end with the process.

    Returns:
        `dict[str, str]`: of the arms that failed or did not begin, the error on one line.
    """
    end = time.perf_counter() + seconds_left
    errors = {}
    for number, (name, call) in enumerate(calls.items()):
        if number > 0 and time.perf_counter() > end:
            errors[name] = NO_TIME
            continue
        try:
            call()
        except Exception as error:
            errors[name] = one_line(error)
        if name in errors:  # here the traceback, which holds tensors, is gone
            print(f"  {name} does not run: {errors[name]}", flush=True)
            clean_up()
    return errors


def clean_up(model: nn.Module | None = None) -> None:
    """Free what an arm that failed has left: gradients of the model, garbage, and the allocator's cache."""
    if model is not None:
        model.zero_grad()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def require(name: str, errors: dict[str, str]) -> None:
    """Raise a `RuntimeError` if the arm with which all others are compared does not run."""
    if name in errors:
        raise RuntimeError(f"{name!r}, which the other arms are compared with, does not run: {errors[name]}")
