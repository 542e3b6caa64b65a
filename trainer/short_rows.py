"""
Attention of short rows on a CPU.

In bfloat16, the backward pass of PyTorch's fused attention takes several times as long on a CPU as the plain products
that it replaces (recipes/benchmarks/README.md). The plain products keep all scores, so only short rows can afford
them: those of up to `LONGEST` tokens. Longer rows, where the gain is small, other precisions and other devices keep
the fused kernel.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, TrainingArguments
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import eager_mask, sdpa_mask

from .recording import eager_attention

LONGEST = 256
NAME = "short_rows"


@contextlib.contextmanager
def plain_short_rows(model: nn.Module, args: TrainingArguments) -> Iterator[None]:
    """
    Let the parts of a model that use fused attention (SDPA) compute that of short rows by plain products.

    It does nothing unless `args` train in bfloat16 on a CPU.
    """
    configs: dict[int, Any] = {}
    if args.bf16 and args.device.type == "cpu":
        for module in model.modules():
            if getattr(module, "_supports_attention_backend", False) and _is_fused(module.config):
                configs[id(module.config)] = module.config
    for config in configs.values():
        config._attn_implementation = NAME
    try:
        yield
    finally:
        for config in configs.values():
            config._attn_implementation = "sdpa"


def _is_fused(config: Any) -> bool:
    """Return whether this config, which must not be one of several models, sets fused attention."""
    return config._attn_implementation == "sdpa" and config.get_text_config() is config


def _attention(module: nn.Module, query: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
    """Return the eager attention of the module's architecture, or SDPA's for long rows; queries are `(B, H, T, d)`."""
    if query.shape[2] <= LONGEST:
        return eager_attention(module)(module, query, *args, **kwargs)
    return sdpa_attention_forward(module, query, *args, **kwargs)


def _mask(batch_size: int, q_length: int, *args: Any, **kwargs: Any) -> torch.Tensor | None:
    """Return the mask that [`_attention`] needs; SDPA needs none for causal rows."""
    mask = eager_mask if q_length <= LONGEST else sdpa_mask
    return mask(batch_size, q_length, *args, **kwargs)


AttentionInterface.register(NAME, _attention)
AttentionMaskInterface.register(NAME, _mask)
