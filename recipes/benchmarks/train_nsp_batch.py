"""The `nsp_batch` section of the benchmark of a training step: what GradCache needs as its batch grows."""

from functools import partial
from typing import Any

import torch

from modeling_cosup import CoSupForCausalLM

from measuring import GB, Meter, print_table
from train_arms import Ours, batches_of, useful_tokens


def section_nsp_batch(model: CoSupForCausalLM, instances: Any, script: Any, folder: str) -> list[dict[str, Any]]:
    """Measure peak memory and time of one GradCache step for each NSP batch, with one token budget per micro-batch."""
    results = []
    for size in map(int, script.nsp_batch_sizes.split(",")):
        result = measure_nsp_batch(model, instances, script, folder, size)
        results.append(result)
        print(f"  NSP batch {size}: {result}", flush=True)
    rows = []
    for result in results:
        rows.append(
            [
                str(result["nsp_batch_size"]),
                f"{result['seconds']:.1f}",
                f"{result['peak_memory_gb']:.2f}",
                f"{result['useful_tokens_per_second']:.0f}",
            ]
        )
    print_table(["NSP batch", "s / step", "peak memory above weights and gradients, GB", "useful tokens/s"], rows)
    return results


def measure_nsp_batch(model: CoSupForCausalLM, instances: Any, script: Any, folder: str, size: int) -> dict[str, Any]:
    """
    Measure one GradCache step, forward and backward.

    Args:
        model (`CoSupForCausalLM`): in training mode.
        instances (`list[dict]` or `Dataset`): at least `size` of them, tokenized or not.
        script (`Any`): with `micro_batch_tokens`, `batch_size`, `bf16` and `seed`.
        folder (`str`): output folder of the trainer.
        size (`int`): instances of the batch.

    Returns:
        `dict`: seconds, the peak memory above weights and gradients, and on a GPU `total_memory_gb`, the peak of all
            that was allocated. The state of an optimiser is in neither.
    """
    options = {"nsp_batch_size": size, "max_tokens_per_micro_batch": script.micro_batch_tokens}
    ours = Ours(model, folder, instances, script, **options)
    (batch,) = batches_of(ours.trainer, size, 1, script.seed)
    model.zero_grad()
    ours.step(batch[:2])  # gradients exist before the measurement
    _, seconds, peak = Meter(model.device)(partial(ours.step, batch))
    result = {
        "nsp_batch_size": size,
        "seconds": seconds,
        "peak_memory_gb": peak / GB,
        "useful_tokens_per_second": useful_tokens(batch) / seconds,
    }
    if model.device.type == "cuda":
        result["total_memory_gb"] = torch.cuda.max_memory_allocated() / GB
    model.zero_grad()
    return result
