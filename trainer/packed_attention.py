"""Attention of packed rows: which parts and implementations keep them apart, and flex attention under autocast."""

from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, PreTrainedModel, TrainingArguments
from transformers.integrations.flex_attention import flex_attention_forward

from .cpu_attention import can_be_packed, cpu_attention, keeps_packed_rows_apart_on_cpu, reads_packed_rows


def keeps_packed_rows_apart(part: PreTrainedModel, args: TrainingArguments) -> bool:
    """Return whether the attention of a part handles packed rows without a dense mask."""
    if (part.config._attn_implementation or "").startswith(("flash", "flex")):
        return can_be_packed(part)
    return keeps_packed_rows_apart_on_cpu(part, args)


def check_packed_rows(part: PreTrainedModel, args: TrainingArguments) -> None:
    """
    Check that a part reads packed rows as if they were alone, with any attention. Two rows are tried on a CPU only;
    elsewhere the types of its layers decide.

    Raises:
        `ValueError`: if rows would change each other's states, or if the part fails.
    """
    name = type(part).__name__
    error = None
    is_apart = can_be_packed(part)
    if is_apart and args.device.type == "cpu":
        try:
            with cpu_attention(args):
                is_apart = reads_packed_rows(part)
        except Exception as failure:
            error = failure
    if error is not None:
        raise ValueError(f"{name} cannot read packed rows: leave out padding_free=True. It said: {error}") from error
    if not is_apart:
        raise ValueError(f"Rows of {name} that are packed into one change each other: leave out padding_free=True.")


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
