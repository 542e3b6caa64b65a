"""The `queries` section of the benchmark of a training step: queries of an instance that share a row, or do not."""

import statistics
import sys
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

from modeling_cosup import CoSupForCausalLM
from trainer import batch_rows

from measuring import GB, Meter, print_table
from train_arms import Ours, batches_of, gradient_error, gradients_of
from train_step import ratios, time_arms

OWN = "a row for each query"
SHARED = "one row for all queries of an instance"


def section_queries(model: CoSupForCausalLM, instances: list[dict], script: Any, folder: str) -> dict[str, Any]:
    """
    Measure separate supervision, where Emb_seq reads the text up to each `[NSP]`, on instances of several passages.

    Args:
        model (`CoSupForCausalLM`): with `query_from="emb_seq"`, in training mode.
        instances (`list[dict]`): those of at most one passage are left out.
        script (`Any`): the options of the benchmark.
        folder (`str`): output folder of the trainer.

    Returns:
        `dict`: for each arm the seconds, the tokens of queries and the peak memory of a batch; how much faster one row
            is than rows of their own.
    """
    several = [instance for instance in instances if sum(bool(s["passage"]) for s in instance["segments"]) > 1]
    if len(several) < script.batch_size:
        sys.exit(
            f"error: the queries section needs {script.batch_size} instances of several passages (--batch_size);"
            f" --train_file has {len(several)}."
        )
    options: dict[str, Any] = {"supervision": "separate", "padding_free": True}
    ours = Ours(model, folder, several, script, **options)
    arms: dict[str, Callable[[list[dict]], float]] = {OWN: with_own_rows(ours.step), SHARED: ours.step}
    warm_up, *batches = batches_of(ours.trainer, script.batch_size, script.repeats + 1, script.seed)
    in_float32 = Ours(model, folder, ours.trainer.train_dataset, script, bf16=False, **options)
    model.zero_grad()
    with_own_rows(in_float32.step)(warm_up[:2])
    expected = gradients_of(model)
    model.zero_grad()
    in_float32.step(warm_up[:2])
    error = gradient_error(gradients_of(model), expected)
    for arm in arms.values():
        arm(warm_up)
    seconds, memory = time_arms(model, arms, batches, Meter(model.device))
    speeds = ratios(seconds[OWN], seconds[SHARED])
    count = {OWN: with_own_rows(ours.collate), SHARED: ours.collate}
    result: dict[str, Any] = {
        "arms": {},
        "speed": statistics.median(speeds),
        "speed_min_max": [min(speeds), max(speeds)],
    }
    result["gradient_error_in_float32"] = error
    for name in arms:
        num_tokens = [num_query_tokens(count[name](batch)) for batch in batches]
        result["arms"][name] = {
            "seconds": statistics.median(seconds[name]),
            "query_tokens": statistics.mean(num_tokens),
            "peak_memory_gb": max(memory[name]) / GB,
        }
    print_queries(result)
    return result


def with_own_rows(call: Callable[[list[dict]], Any]) -> Callable[[list[dict]], Any]:
    """Return a call on a batch whose queries share no rows."""

    def wrapped(batch: list[dict]) -> Any:
        with patch.object(batch_rows, "_query_rows", lambda queries, share: [[query] for query in queries]):
            return call(batch)

    return wrapped


def num_query_tokens(batch: dict[str, Any]) -> int:
    """Return how many tokens the encoder of queries reads in a batch."""
    return sum(micro_batch["query_input_ids"].numel() for micro_batch in batch["micro_batches"])


def print_queries(result: dict[str, Any]) -> None:
    """Print a table of both arms."""
    rows = []
    for name, figures in result["arms"].items():
        speed = f"{result['speed']:.2f} ({result['speed_min_max'][0]:.2f} to {result['speed_min_max'][1]:.2f})"
        counts = [f"{figures['query_tokens']:.0f}", f"{figures['seconds']:.2f}"]
        rows.append([name, *counts, speed if name == SHARED else "1.00", f"{figures['peak_memory_gb']:.2f}"])
    print_table(["separate supervision", "tokens of queries", "s / batch", "speed", "peak memory GB"], rows)
    print(f"Gradients in float32 differ by {result['gradient_error_in_float32']:.0e}.")
