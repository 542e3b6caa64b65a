"""
Keep the gradient of later tokens from the states at `[NSP]`.

A query embedding is Gen's last state at `[NSP]`. Later tokens read the states below it through attention, as keys and
values, so their NTP loss shapes the query too. Here these keys and values are constants: the forward is the same, but
no gradient passes through them, neither from the NTP loss nor from a later query.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from modeling_cosup import CoSupForCausalLM, CoSupOutput
from modeling_cosup.token_keys_cosup import gen_of

from .recording import eager_attention

PREFIX = "isolating_"
MASK = "isolated_positions"  # an argument of Gen's forward that its layers pass on to their attention function


def isolated_forward(model: nn.Module, base: CoSupForCausalLM, arguments: dict[str, Any]) -> CoSupOutput:
    """
    Run a forward in which no gradient of another token reaches the states at `[NSP]`.

    Args:
        model (`nn.Module`): the (wrapped) model.
        base ([`CoSupForCausalLM`]): the model itself.
        arguments (`dict`): of its forward; `nsp_positions` `(N,)` count in the flattened `input_ids` `(B, T)`.
    """
    input_ids = arguments["input_ids"]
    mask = torch.zeros(input_ids.numel(), dtype=torch.bool, device=input_ids.device)
    mask[arguments["nsp_positions"]] = True
    with _isolating_queries(base):
        return model(**arguments, **{MASK: mask.view(input_ids.shape)})


@contextlib.contextmanager
def _isolating_queries(gen: Any) -> Iterator[None]:
    """Let Gen's layers pass [`MASK`], a `torch.BoolTensor` `(B, T)`, to an attention function that knows it."""
    config = gen_of(gen).config.get_text_config()
    implementation = config._attn_implementation
    config._attn_implementation = _isolating(implementation)
    try:
        yield
    finally:
        config._attn_implementation = implementation


def check_isolation(gen: Any) -> None:
    """
    Raise if no gradient can be kept from Gen's states at `[NSP]`.

    Raises:
        `ValueError`: for an architecture that does not take its attention function from transformers'
            `AttentionInterface`, and for a Gen whose gradient checkpointing was turned on.
    """
    gen = gen_of(gen)
    if any(getattr(module, "gradient_checkpointing", False) for module in gen.modules()):
        raise ValueError(
            "isolate_queries changes the attention of a forward, which gradient checkpointing would compute again"
            " without it: call model.gradient_checkpointing_disable() first."
        )
    if not gen._supports_attention_backend:
        raise ValueError(
            f"isolate_queries: {type(gen).__name__} computes attention itself (it lacks _supports_attention_backend),"
            " so its keys and values cannot be made constants. Use another architecture."
        )


def _isolating(implementation: str) -> str:
    """Return the name of the attention implementation that isolates queries and otherwise does the same."""
    name = PREFIX + implementation
    if name not in ALL_ATTENTION_FUNCTIONS.valid_keys():

        def attention(
            module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *args: Any, **kwargs: Any
        ) -> Any:
            mask = kwargs.pop(MASK, None)  # None where a tied body reads passages
            if mask is not None:
                is_constant = mask[:, None, :, None]  # (B, 1, T, 1)
                key = torch.where(is_constant, key.detach(), key)  # (B, H', T, d)
                value = torch.where(is_constant, value.detach(), value)
            is_eager = implementation == "eager"  # an architecture's own function
            function = eager_attention(module) if is_eager else ALL_ATTENTION_FUNCTIONS[implementation]
            return function(module, query, key, value, *args, **kwargs)

        def mask(*args: Any, **kwargs: Any) -> Any:
            return ALL_MASK_ATTENTION_FUNCTIONS[implementation](*args, **kwargs)  # what it is at this moment

        AttentionInterface.register(name, attention)
        # without a mask function, transformers would pass no mask: sliding windows and padding would vanish silently
        AttentionMaskInterface.register(name, mask)
    return name
