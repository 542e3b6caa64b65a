"""
Part 2: speed and memory, each next to what it is compared with.

All arms of a comparison take turns in rotated rounds; a ratio is the median of the rounds' ratios, with the smallest
and the largest. The goals are for a large GPU and full shapes: a missed one is reported, and is no failure.
"""

from dataclasses import replace
from functools import partial
from typing import Any

from gpu_parts.runner import Check, Context
from gpu_parts.speed_goals import goal_text
from measuring import matmul_peak

EAGER = ("plain", "CoSup, never retrieves", "CoSup, retrieves")
NEVER_RETRIEVES = ("plain", "CoSup, never retrieves", "CoSup, captured, never retrieves")


def with_goals(result: dict[str, Any]) -> dict[str, Any]:
    """Return a result whose summary says what became of its goals."""
    if not result["goals"]:
        return result
    return {**result, "summary": f"{result['summary']}; {goal_text(result['goals'])}"}


# Each check imports what it needs when it runs: what one of them lacks must not keep the others from running.


def peak(context: Context) -> dict[str, Any]:
    """Measure the fastest matrix product in float32 and bfloat16."""
    sizes = (64,) if context.tiny else None
    peaks = {}
    for dtype in context.dtypes:
        peaks[str(dtype).removeprefix("torch.")] = matmul_peak(context.device, dtype, sizes)
    summary = ", ".join(f"{dtype} {flops / 1e12:.3g} TFLOP/s" for dtype, flops in peaks.items())
    return {"flops": peaks, "summary": summary}


def training(context: Context, batch_size: int) -> dict[str, Any]:
    from gpu_parts.speed_training import training_table

    return with_goals(training_table(context, 8 if context.tiny else batch_size))


def nsp_batches(context: Context) -> dict[str, Any]:
    from gpu_parts.speed_training import nsp_batches

    return with_goals(nsp_batches(context))


def generation(context: Context, shape: str, batch_size: int, names: tuple[str, ...]) -> dict[str, Any]:
    from gpu_parts.speed_generation import against_plain

    return with_goals(against_plain(context, shape, 2 if context.tiny else batch_size, names))


def original(context: Context) -> dict[str, Any]:
    from gpu_parts.speed_generation import against_original

    return with_goals(against_original(context))


def search(context: Context) -> dict[str, Any]:
    from gpu_parts.speed_search import search_speed

    return search_speed(context)


def encoding(context: Context) -> dict[str, Any]:
    from gpu_parts.speed_search import encoding_speed

    return encoding_speed(context)


def memories(context: Context) -> dict[str, Any]:
    from gpu_parts.speed_generation import with_memories

    return with_memories(context)


def generation_check(shape: str, batch_size: int, names: tuple[str, ...], minutes: float) -> Check:
    """Return the check of generate() at one shape and batch size."""
    run = partial(generation, shape=shape, batch_size=batch_size, names=names)
    return Check(f"generate_{shape}_batch_{batch_size}", run, minutes, packages=["pyarrow"])


def training_check(batch_size: int, minutes: float) -> Check:
    """Return the check of a training step at one batch size."""
    run = partial(training, batch_size=batch_size)
    return Check(f"training_batch_{batch_size}", run, minutes, packages=["datasets"])


# minutes are estimates: nothing here has run on a GPU
CHECKS: list[Check] = [
    Check("matmul_peak", peak, 0.3),
    training_check(64, 1.5),
    generation_check("135m", 32, (*EAGER, "CoSup, captured, retrieves"), 1.0),
    Check("nsp_batches", nsp_batches, 1.0, packages=["datasets"]),
    Check("search", search, 0.8, packages=["pyarrow"]),
    Check("original_algorithm", original, 0.6, packages=["pyarrow"]),
    generation_check("7b", 32, NEVER_RETRIEVES, 2.5),
    training_check(256, 1.0),
    Check("encoding", encoding, 0.5, packages=["sentence_transformers", "pyarrow"]),
    Check("memories", memories, 0.6, packages=["pyarrow"]),
    generation_check("7b", 1, NEVER_RETRIEVES, 2.0),
]
CHECKS = [replace(check, limit=max(3.0, 3 * check.minutes)) for check in CHECKS]  # a compiler may hang
