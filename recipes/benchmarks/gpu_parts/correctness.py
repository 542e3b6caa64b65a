"""
Part 1: what must always hold, in float32 and bfloat16; each error stands next to its bound.

In float32 the bounds are the ones that the tests use, or twice the rounding of float32 where that is more. In bfloat16
a result is compared with the same result in float32. It may be twice as far from it as the plain computation in
bfloat16. Where one rounding error may change everything after it, as in generation, the share of other tokens is
reported without a bound.
"""

from dataclasses import replace
from functools import partial

from gpu_parts import generation_checks, model_checks, trainer_checks, training_checks
from gpu_parts.runner import Check

PASSAGES = ("pyarrow",)  # what an index needs
LIMIT = 3.0  # minutes of a check, so that one that hangs leaves time for the others

packed_rows = training_checks.packed_rows

CHECKS = [
    # first what only a GPU can show
    Check("packed_flex", partial(packed_rows, implementation="flex_attention"), 1.0, gpu=True),
    Check("compiled_step", training_checks.compiled_step, 0.8),
    Check("captured_step", generation_checks.captured_step, 1.0, packages=PASSAGES),
    Check("trainer_arms", trainer_checks.trainer_arms, 0.8, packages=("datasets",)),
    Check("accelerate_fsdp2", trainer_checks.accelerate_fsdp2, 0.8, gpu=True, packages=("datasets",)),
    Check("passages_alone", model_checks.passages_alone, 0.2),
    Check("packed_sdpa", partial(packed_rows, implementation="sdpa"), 0.2),
    Check("packed_flash", training_checks.packed_flash, 0.3, gpu=True),
    Check("grad_cache", training_checks.grad_cache, 0.2),
    Check("isolated_queries", training_checks.isolated_queries, 0.2),
    Check("ddp_one_rank", training_checks.ddp_one_rank, 0.2, limit=1.0),
    Check("fsdp2_one_rank", training_checks.fsdp2_one_rank, 0.2, limit=1.0),
    Check("lora_step", training_checks.lora_step, 0.2, packages=("peft",)),
    Check("generate_rows", generation_checks.generate_rows, 0.5, packages=PASSAGES),
    Check("served_rows", generation_checks.served_rows, 0.2, packages=PASSAGES),
    Check("memories", generation_checks.memories, 0.3),
    Check("saved_model", model_checks.saved_model, 0.5, packages=PASSAGES),
    Check("quantized_model", model_checks.quantized_model, 0.3, packages=(*PASSAGES, "bitsandbytes")),
    Check("index_search", model_checks.index_search, 0.2, packages=PASSAGES),
    Check("faiss_gpu", model_checks.faiss_gpu, 0.2, gpu=True, packages=(*PASSAGES, "faiss")),
]
CHECKS = [replace(check, limit=check.limit or LIMIT) for check in CHECKS]
