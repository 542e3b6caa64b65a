"""Attention of packed rows: which implementations keep them apart, and flex attention under autocast."""

from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, PreTrainedModel, TrainingArguments
from transformers.integrations.flex_attention import flex_attention_forward

from .cpu_attention import keeps_packed_rows_apart_on_cpu


def keeps_packed_rows_apart(part: PreTrainedModel, args: TrainingArguments) -> bool:
    """Return whether the attention of a part handles packed rows without a dense mask."""
    if (part.config._attn_implementation or "").startswith(("flash", "flex")):
        return True
    return keeps_packed_rows_apart_on_cpu(part, args)


def _flex_attention(
    module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *args: Any, **kwargs: Any
) -> Any:
    """
    Compute flex attention in the dtype of the values.

    Under autocast, rotary positions leave queries and keys in float32 and values in bfloat16. transformers casts them
    for flash attention, and torch for SDPA. For flex attention only newer releases of torch (2.13) do; older ones
    refuse the inputs, or fail to compile.
    """
    return flex_attention_forward(module, query.to(value.dtype), key.to(value.dtype), value, *args, **kwargs)


AttentionInterface.register("flex_attention", _flex_attention)  # nothing changes where the dtypes are equal
