"""
Attention of short rows on a CPU.

In bfloat16, the backward pass of PyTorch's fused attention takes several times as long on a CPU as the plain products
that it replaces (recipes/benchmarks/training.md). The plain products keep all scores, which only short rows can
afford. So rows of up to `LONGEST` tokens take the plain products. Longer rows, where the gain is small, other
precisions and other devices keep the fused kernel.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import TrainingArguments
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

LONGEST = 256


@contextlib.contextmanager
def plain_short_rows(args: TrainingArguments) -> Iterator[None]:
    """
    Let scaled dot product attention (SDPA) compute short rows by plain products, if `args` train in bf16 on a CPU.

    Only the kernel changes: models, masks and configs stay as they are.
    """
    is_transformers_own = ALL_ATTENTION_FUNCTIONS["sdpa"] is sdpa_attention_forward  # not a user's, or ours
    if not args.bf16 or args.device.type != "cpu" or not is_transformers_own:
        yield
        return
    keeps_bfloat16 = torch.backends.cuda.fp16_bf16_reduction_math_sdp_allowed()
    torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(True)  # for any device: otherwise products are in float32
    ALL_ATTENTION_FUNCTIONS["sdpa"] = _attention
    try:
        yield
    finally:
        del ALL_ATTENTION_FUNCTIONS["sdpa"]  # uncovers the function that is registered under this name
        torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(keeps_bfloat16)


def _attention(module: nn.Module, query: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
    """Return what transformers' SDPA returns; queries are `(B, H, T, d)`."""
    if query.shape[2] > LONGEST:
        return sdpa_attention_forward(module, query, *args, **kwargs)
    with sdpa_kernel(SDPBackend.MATH):
        return sdpa_attention_forward(module, query, *args, **kwargs)
