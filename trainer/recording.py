"""
Record how a reader's answer attends to its context, during an ordinary forward (arXiv 2402.11794, Eq. 1).

Fast attention never computes its weights, and keeping all of them would need a T x T tensor for each head. So the
attention function is wrapped: Gen computes what it always does, and the weights of the answer's rows alone are
computed once more from the same queries, keys and mask.
"""

import contextlib
import sys
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import eager_mask, sdpa_mask

from modeling_cosup.token_keys_cosup import gen_of

CHUNK_SIZE = 2**24  # attention weights that are in memory at a time
_WRAPPERS = {"sdpa": "recording_sdpa", "eager": "recording_eager"}  # implementation -> the one that records
_UNREADABLE = {"s_aux": "attention sinks", "position_bias": "a position bias"}  # arguments that change the weights


class RecordedAttention:
    """
    The attention of the last forward of Gen, as the rows of the answer see it.

    Args:
        answer_rows (`torch.LongTensor` of shape `(B, R)`): for each row of the batch, the positions that predict
            answer tokens; -1 for none.
        config (`PreTrainedConfig`): of the attention layers that are recorded.
    """

    def __init__(self, answer_rows: torch.Tensor, config: PreTrainedConfig) -> None:
        self.config = config
        self.rows = answer_rows.clamp(min=0)  # (B, R)
        self.last_row = int(self.rows.max()) if self.rows.numel() else 0
        is_row = (answer_rows >= 0).float()
        self.row_weights = is_row / is_row.sum(1, keepdim=True).clamp(min=1)  # (B, R), for the mean over rows
        self.layers: dict[int, torch.Tensor] = {}  # (B, T) of each attention layer

    def token_attention(self) -> torch.Tensor:
        """
        Return α_t·‖v_t‖ of each token, the mean over layers, heads and answer rows.

        Returns:
            `torch.FloatTensor` of shape `(B, T)`: 0 in a row without answer rows.

        Raises:
            `ValueError`: if no attention layer ran.
        """
        if not self.layers:
            raise ValueError("No attention was recorded: Gen has no attention layer, or ran outside of the context.")
        device = self.rows.device
        return torch.stack([layer.to(device) for layer in self.layers.values()]).mean(0)

    def add_weights(self, module: nn.Module, weights: torch.Tensor, value: torch.Tensor) -> None:
        """
        Add a layer.

        Args:
            module (`nn.Module`): the layer.
            weights (`torch.Tensor` of shape `(B, H, T)`): α_t of each head, the mean over answer rows.
            value (`torch.Tensor` of shape `(B, H', T, d)`): values, not repeated: head h reads `h // (H // H')`.
        """
        norms = torch.linalg.vector_norm(value, dim=-1, dtype=torch.float32)  # (B, H', T)
        grouped = weights.unflatten(1, (value.shape[1], -1)).mean(2)  # (B, H', T)
        self.layers[id(module)] = (grouped * norms).mean(1)


_recorded: ContextVar[tuple[RecordedAttention, ...]] = ContextVar("cosup_recorded_attention", default=())


@contextlib.contextmanager
def recording_attention(gen: Any, answer_rows: torch.Tensor) -> Iterator[RecordedAttention]:
    """
    Record the attention of answer rows in forwards of Gen within this context.

    Gen computes what it would without the recording. If its attention is Flash or Flex, it reads with SDPA, or with
    eager attention if it caps its scores. Compiled layers run eagerly. Contexts may be nested; the innermost one of a
    model records. Nothing that is recorded has a gradient.

    Args:
        gen (`PreTrainedModel`): a causal language model, or a [`CoSupForCausalLM`], whose Gen is recorded.
        answer_rows (`torch.LongTensor` of shape `(B, R)`): for each row of the batch, the positions that predict
            answer tokens; -1 for none.

    Yields:
        [`RecordedAttention`]: its `token_attention()` is that of the last forward.

    Raises:
        `ValueError`: for an architecture that does not take its attention function from transformers'
            `AttentionInterface`, or whose attention cannot be computed from queries and keys; for `answer_rows` that
            do not fit the batch; for packed rows, and for a forward with a KV cache.
    """
    wrapper = recording_implementation(gen)
    gen = gen_of(gen)
    if answer_rows.ndim != 2 or answer_rows.dtype != torch.long:
        given = f"{answer_rows.dtype} of shape {tuple(answer_rows.shape)}"
        raise ValueError(f"answer_rows is {given}, expected torch.int64 of shape (B, R).")
    config = gen.config.get_text_config()
    implementation = config._attn_implementation
    recorded = RecordedAttention(answer_rows, config)
    token = _recorded.set((*_recorded.get(), recorded))
    hook = gen.base_model.register_forward_pre_hook(_refuse_packed_rows, with_kwargs=True)
    config._attn_implementation = wrapper
    try:
        with without_compilation():
            yield recorded
    finally:
        hook.remove()
        _recorded.reset(token)
        config._attn_implementation = implementation


def recording_implementation(gen: Any) -> str:
    """
    Return the name of the attention implementation that records what a model's own one computes.

    Args:
        gen (`PreTrainedModel`): a causal language model, or a [`CoSupForCausalLM`].

    Raises:
        `ValueError`: if there is none, with what to do.
    """
    gen = gen_of(gen)
    if not gen._supports_attention_backend:
        raise ValueError(
            f"{type(gen).__name__} computes attention itself (it lacks _supports_attention_backend), so its attention"
            " cannot be recorded. Distil with supervision='perplexity_distillation', or use another architecture."
        )
    config = gen.config.get_text_config()
    implementation = config._attn_implementation
    if implementation in _WRAPPERS.values():  # a nested recording
        return implementation
    if implementation in _WRAPPERS:
        return _WRAPPERS[implementation]
    if "flash" not in implementation and "flex" not in implementation:
        raise ValueError(
            f"The attention implementation {implementation!r} cannot be recorded; load Gen with"
            " attn_implementation='sdpa' or 'eager'."
        )
    caps_scores = getattr(config, "attn_logit_softcapping", None) is not None
    return _WRAPPERS["eager" if caps_scores else "sdpa"]


def without_compilation() -> contextlib.AbstractContextManager:
    """Return a context in which compiled layers run eagerly: they could not record, and would compile every shape."""
    if "torch._dynamo" not in sys.modules:  # nothing is compiled, and the import takes a second
        return contextlib.nullcontext()
    return torch.compiler.set_stance("force_eager")


def _refuse_packed_rows(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
    """Raise for several instances in one row: the mean over its answer rows would mix them. A forward-pre-hook."""
    position_ids = kwargs.get("position_ids")
    if position_ids is None or kwargs.get("attention_mask") is not None:  # positions of padding may restart
        return
    if bool((position_ids.diff(dim=-1) < 0).any()):
        raise ValueError(
            "position_ids restart within a row: it packs several instances, whose attention cannot be recorded. Give"
            " each instance a row, padded on the right."
        )


# ---------------------------------------------------------------------- the attention functions


def _recording_sdpa(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Compute SDPA, and record the attention of answer rows."""
    recorded = _record_of(module, query, key)
    if recorded is not None:
        for name, meaning in _UNREADABLE.items():
            if kwargs.get(name) is not None:
                raise ValueError(
                    f"{type(module).__name__} has {meaning} ({name}), which SDPA does not give to a recording; load"
                    " Gen with attn_implementation='eager'."
                )
        weights = _weights_of_rows(query, key, attention_mask, kwargs.get("scaling"), recorded)
        recorded.add_weights(module, weights, value.detach())
    return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)


def _recording_eager(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Compute the architecture's eager attention, and record its weights of answer rows, with caps and sinks."""
    output, weights = eager_attention(module)(module, query, key, value, attention_mask, **kwargs)
    recorded = _record_of(module, query, key)
    if recorded is not None:
        rows = recorded.rows.to(query.device)[:, None, :, None]  # (B, 1, R, 1)
        of_rows = weights.detach().gather(2, rows.expand(-1, weights.shape[1], -1, weights.shape[3]))  # (B, H, R, T)
        mean = torch.einsum("bhrt,br->bht", of_rows.float(), recorded.row_weights.to(query.device))
        recorded.add_weights(module, mean, value.detach())
    return output, weights


AttentionInterface.register("recording_sdpa", _recording_sdpa)
AttentionInterface.register("recording_eager", _recording_eager)
# without a mask function, transformers would pass no mask: sliding windows and padding would vanish silently
AttentionMaskInterface.register("recording_sdpa", sdpa_mask)
AttentionMaskInterface.register("recording_eager", eager_mask)


def eager_attention(module: nn.Module) -> Callable:
    """Return the eager attention function of an attention layer's architecture."""
    for base in type(module).__mro__:
        function = getattr(sys.modules[base.__module__], "eager_attention_forward", None)
        if function is not None:
            return function
    raise ValueError(f"{type(module).__name__} has no eager_attention_forward, so its attention cannot be recorded.")


def _record_of(module: nn.Module, query: torch.Tensor, key: torch.Tensor) -> RecordedAttention | None:
    """Return the record of a layer's model, checked against the forward; `None` if another thread records."""
    for recorded in reversed(_recorded.get()):
        if recorded.config is module.config:
            break
    else:
        return None
    rows, columns = query.shape[0], query.shape[2]
    if key.shape[2] != columns:
        raise ValueError(f"{columns} tokens attend to {key.shape[2]}: attention is recorded without a KV cache.")
    if len(recorded.rows) != rows:
        raise ValueError(f"answer_rows has {len(recorded.rows)} rows, expected one for each of {rows} of the batch.")
    if recorded.last_row >= columns:
        raise ValueError(f"answer_rows holds position {recorded.last_row}, and the forward has {columns} tokens.")
    return recorded


@torch.no_grad()
def _weights_of_rows(
    query: torch.Tensor,
    key: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None,
    recorded: RecordedAttention,
) -> torch.Tensor:
    """
    Return the attention weights of answer rows, the mean over rows.

    Args:
        query (`torch.Tensor` of shape `(B, H, T, d)`), key (`torch.Tensor` of shape `(B, H', T, d)`): H is a multiple
            of H'.
        attention_mask (`torch.Tensor` of shape `(B, 1, T, T)`, *optional*): `True` for what is seen, or what is added
            to the scores; by default, a row sees what is not after it.
        scaling (`float`, *optional*): of the scores.

    Returns:
        `torch.FloatTensor` of shape `(B, H, T)`.
    """
    batch_size, heads, length, width = query.shape
    rows = recorded.rows.to(query.device)  # (B, R)
    row_weights = recorded.row_weights.to(query.device)
    queries = query.gather(2, rows[:, None, :, None].expand(-1, heads, -1, width)).float()  # (B, H, R, d)
    queries = queries.unflatten(1, (key.shape[1], -1))  # (B, H', H / H', R, d)
    keys = key.float().transpose(2, 3)  # (B, H', d, T)
    scaling = width**-0.5 if scaling is None else scaling
    mean = torch.zeros(batch_size, heads, length, device=query.device)
    chunk = max(1, CHUNK_SIZE // (batch_size * heads * length))
    with torch.autocast(query.device.type, enabled=False):
        for start in range(0, rows.shape[1], chunk):
            part = slice(start, start + chunk)
            of_rows = queries[:, :, :, part]  # (B, H', H / H', r, d)
            scores = of_rows.flatten(2, 3) @ keys * scaling
            scores = scores.unflatten(2, of_rows.shape[2:4]).flatten(1, 2)  # (B, H, r, T)
            scores = _masked(scores, attention_mask, rows[:, part])
            mean += torch.einsum("bhrt,br->bht", scores.softmax(-1), row_weights[:, part])
    return mean


def _masked(scores: torch.Tensor, attention_mask: torch.Tensor | None, rows: torch.Tensor) -> torch.Tensor:
    """Return the scores `(B, H, r, T)` of `rows` `(B, r)` with what they do not see at the lowest value."""
    lowest = torch.finfo(scores.dtype).min  # not -inf: a row of padding may see nothing
    if attention_mask is None:
        columns = torch.arange(scores.shape[-1], device=scores.device)
        return scores.masked_fill(columns > rows[:, None, :, None], lowest)
    mask = attention_mask.expand(len(scores), -1, -1, -1)
    of_rows = mask.gather(2, rows[:, None, :, None].expand(-1, mask.shape[1], -1, mask.shape[3]))  # (B, 1 or H, r, T)
    if of_rows.dtype == torch.bool:
        return scores.masked_fill(~of_rows, lowest)
    return scores + of_rows
