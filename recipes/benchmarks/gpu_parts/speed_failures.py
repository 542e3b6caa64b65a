"""Arms of a comparison that do not run on a machine: the others are measured, and the error is reported."""

import gc
from collections.abc import Callable
from typing import Any

import torch

MAX_LENGTH = 300  # characters of an error


def first_calls(calls: dict[str, Callable[[], Any]]) -> dict[str, str]:
    """
    Call every arm once, which warms it up.

    Whatever kernels, compilers and their versions raise ends only that arm.

    Returns:
        `dict[str, str]`: of the arms that failed, the first line of their error.
    """
    errors = {}
    for name, call in calls.items():
        try:
            call()
        except Exception as error:
            errors[name] = f"{type(error).__name__}: {error}".splitlines()[0][:MAX_LENGTH]
            print(f"  {name} does not run: {errors[name]}", flush=True)
        if name in errors:
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
    return errors


def require(name: str, errors: dict[str, str]) -> None:
    """Raise a `RuntimeError` if the arm with which all others are compared does not run."""
    if name in errors:
        raise RuntimeError(f"{name!r}, which the other arms are compared with, does not run: {errors[name]}")
