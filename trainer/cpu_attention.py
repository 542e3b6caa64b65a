"""
Attention on a CPU: of rows that are packed into one, and of short rows in bfloat16.

Packed rows need no padding in any layer. But scaled dot product attention (SDPA) has no kernel for them, and
transformers gives it a dense mask `(L, L)`. Here the starts of the rows take the place of that mask, and attention
runs on groups of rows that are nearly as long as each other.

In bfloat16, the backward pass of PyTorch's fused attention takes several times as long on a CPU as the plain products
that it replaces (recipes/benchmarks/training.md). The plain products keep all scores, which only short rows can
afford. So rows of up to `LONGEST_PLAIN` tokens take the plain products, and longer ones the fused kernel.
"""

import contextlib
import functools
import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import PreTrainedModel, TrainingArguments
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import logging

from modeling_cosup.cache_cosup import layer_kinds
from modeling_cosup.encoding_cosup import evaluating

from .recording import without_compilation

logger = logging.get_logger(__name__)

LONGEST_PLAIN = 512
PROBED_LENGTHS = (3, 5)  # of two rows that are packed on trial
# a row shares a group with rows that are longer by up to a third, or by up to 32 tokens
NEARLY_AS_LONG = 0.75
FEW_TOKENS = 32


@contextlib.contextmanager
def cpu_attention(args: TrainingArguments) -> Iterator[None]:
    """
    Let SDPA keep packed rows apart without a dense mask, and compute short rows by plain products in bf16, on a CPU.

    Only masks and kernels change: models and configs stay as they are. An attention function that somebody registered
    in place of transformers' own is left alone.
    """
    if args.device.type != "cpu" or not _is_transformers_own():
        yield
        return
    keeps_bfloat16 = torch.backends.cuda.fp16_bf16_reduction_math_sdp_allowed()
    torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(True)  # for any device: otherwise products are in float32
    ALL_MASK_ATTENTION_FUNCTIONS["sdpa"] = _mask
    ALL_ATTENTION_FUNCTIONS["sdpa"] = functools.partial(_attention, longest_plain=LONGEST_PLAIN if args.bf16 else 0)
    try:
        yield
    finally:
        # uncovers the functions that are registered under this name
        del ALL_ATTENTION_FUNCTIONS["sdpa"], ALL_MASK_ATTENTION_FUNCTIONS["sdpa"]
        torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(keeps_bfloat16)


def _is_transformers_own() -> bool:
    """Return whether SDPA is transformers' own, and not a user's, or already ours."""
    has_own_mask = ALL_MASK_ATTENTION_FUNCTIONS["sdpa"] is sdpa_mask
    return has_own_mask and ALL_ATTENTION_FUNCTIONS["sdpa"] is sdpa_attention_forward


def keeps_packed_rows_apart_on_cpu(part: PreTrainedModel, args: TrainingArguments) -> bool:
    """Return whether rows of this part, packed, have the same states as alone, without a dense mask."""
    if args.device.type != "cpu" or part.config._attn_implementation != "sdpa" or not _is_transformers_own():
        return False
    packed_masks = []

    def recorded_mask(**kwargs: Any) -> torch.Tensor | None:
        mask = _mask(**kwargs)
        if kwargs["q_length"] == sum(PROBED_LENGTHS):
            packed_masks.append(mask)
        return mask

    with cpu_attention(args):
        ALL_MASK_ATTENTION_FUNCTIONS["sdpa"] = recorded_mask
        try:
            is_equal = reads_packed_rows(part)
        except Exception as error:  # some architectures look into their mask, or take no use_cache
            logger.info(f"{type(part).__name__} does not read packed rows on a CPU: {error}")
            return False
    is_dense = [mask is None or mask.ndim > 1 for mask in packed_masks]
    return is_equal and bool(packed_masks) and not any(is_dense)


def reads_packed_rows(part: PreTrainedModel) -> bool:
    """Return whether two rows that are packed into one have the states that they have alone, on the part's device."""
    if not can_be_packed(part):
        return False
    vocab_size = cast(nn.Embedding, part.get_input_embeddings()).weight.shape[0]
    length = sum(PROBED_LENGTHS)
    tokens = torch.arange(1, length + 1, device=part.device)[None] * (vocab_size // (length + 1))  # (1, 8)
    positions = torch.cat([torch.arange(count, device=part.device) for count in PROBED_LENGTHS])[None]  # (1, 8)
    second = slice(PROBED_LENGTHS[0], None)
    with evaluating(part), torch.no_grad(), without_compilation():
        packed = part(input_ids=tokens, position_ids=positions, use_cache=False)[0][:, second]
        alone = part(input_ids=tokens[:, second], position_ids=positions[:, second], use_cache=False)[0]
    bound = 1e-4 if alone.dtype == torch.float32 else 2e-2  # of rounding; another row would change the states by more
    error_norm = (packed.float() - alone.float()).norm() / alone.float().norm()
    return bool(error_norm < bound)


def can_be_packed(part: PreTrainedModel) -> bool:
    """
    Return whether a part takes position ids, which say where packed rows begin, and all its layers heed them.

    Recurrent layers and convolutions do not: their states pass from row to row. Nor do chunks of attention.
    """
    takes_positions = "position_ids" in inspect.signature(part.forward).parameters
    kinds = set(layer_kinds(part.config.get_text_config()))
    return takes_positions and not part._is_stateful and kinds <= {"full_attention", "sliding_attention"}


# ---------------------------------------------------------------------- masks


def _mask(**kwargs: Any) -> torch.Tensor | None:
    """
    Return transformers' mask, or of packed rows their starts: `torch.LongTensor` of shape `(R,)`.

    It takes the arguments of [`~transformers.masking_utils.sdpa_mask`]. A mask that does more than separate causal
    rows, such as a sliding window, stays dense.
    """
    is_packed = not kwargs.get("allow_is_causal_skip", True) and kwargs["batch_size"] == 1
    has_window = kwargs.get("local_size") is not None
    has_cache = kwargs["q_length"] != kwargs["kv_length"]
    has_padding = kwargs.get("attention_mask") is not None
    if not is_packed or has_window or has_cache or has_padding or kwargs.get("use_vmap"):
        return sdpa_mask(**kwargs)
    tokens = torch.arange(kwargs["q_length"], device=kwargs["device"])
    first = tokens[:1]  # of the batch and of the heads
    sees = functools.partial(kwargs["mask_function"], first, first)
    if sees(tokens[:-1], tokens[1:]).any():  # the next token
        return sdpa_mask(**kwargs)
    is_start = ~sees(tokens[1:], tokens[:-1])  # (L - 1,): does not see the token before
    if not is_start.any():
        return sdpa_mask(**kwargs)  # a single row
    return torch.cat([first, tokens[1:][is_start]])


# ---------------------------------------------------------------------- attention


def _attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    longest_plain: int,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Return what transformers' SDPA returns, `(B, T, H, d)`; queries are `(B, H, T, d)`."""
    if attention_mask is not None and attention_mask.ndim == 1:
        return _packed_attention(module, query, key, value, attention_mask, longest_plain, **kwargs), None
    if query.shape[2] > longest_plain:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    with sdpa_kernel(SDPBackend.MATH):
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)


@torch.compiler.disable  # the number of groups differs from batch to batch
def _packed_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    starts: torch.Tensor,
    longest_plain: int,
    **kwargs: Any,
) -> torch.Tensor:
    """
    Return the attention of packed rows, `(1, L, H, d)`.

    Rows of a group are padded to its longest, on the right, where causal attention does not look.

    Args:
        query, key, value (`torch.Tensor` of shape `(1, heads, L, d)`): of all rows.
        starts (`torch.LongTensor` of shape `(R,)`): where rows begin.
    """
    layout = _layout(tuple(starts.tolist()), query.shape[2])
    # under autocast, rotary positions leave queries and keys in float32
    by_token = [tensor[0].transpose(0, 1).to(value.dtype) for tensor in (query, key, value)]  # (L, heads, d)
    if kwargs.get("position_bias") is not None:
        raise ValueError("A position bias over the whole row cannot be cut into packed rows: set padding_free=False.")
    are_plain = not kwargs.get("dropout") and kwargs.get("softcap") is None
    outputs = []
    for columns in layout.groups:
        queries, keys, values = (tensor[columns].transpose(1, 2) for tensor in by_token)  # (rows, heads, T, d)
        if columns.shape[1] <= longest_plain and are_plain:
            output = plain_products(queries, keys, values, kwargs.get("scaling"))
        else:
            output, _ = sdpa_attention_forward(module, queries, keys, values, None, **kwargs)
        outputs.append(output.flatten(0, 1))
    return torch.cat(outputs)[layout.places][None]


def plain_products(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float | None = None
) -> torch.Tensor:
    """
    Return causal attention, softmax(Q Kᵀ · scaling) V, `(B, T, H, d)`.

    Args:
        query (`torch.Tensor` of shape `(B, H, T, d)`): several heads may share one of `key` and `value`, which have
            the shape `(B, heads, T, d)`.
        scaling (`float`, *optional*, defaults to 1 / √d): of the scores.
    """
    batch_size, num_heads, length, width = query.shape
    num_shared = num_heads // key.shape[1]
    queries = query.reshape(-1, num_shared * length, width)  # heads that share a key follow each other
    keys, values = key.flatten(0, 1), value.flatten(0, 1)  # (B · heads, T, d)
    scaling = width**-0.5 if scaling is None else scaling
    bias = _causal_bias(length, num_shared, query.dtype)
    scores = torch.baddbmm(bias, queries, keys.transpose(1, 2), alpha=scaling)  # (B · heads, shared · T, T)
    output = scores.softmax(-1).bmm(values)
    return output.view(batch_size, num_heads, length, -1).transpose(1, 2)


@functools.lru_cache(maxsize=16)
def _causal_bias(length: int, num_shared: int, dtype: torch.dtype) -> torch.Tensor:
    """Return what is added to scores: 0, and for later tokens -∞. Shape `(num_shared · length, length)`."""
    bias = torch.full((length, length), float("-inf"), dtype=dtype).triu(1)
    return bias.repeat(num_shared, 1)


@dataclass(frozen=True)
class _Layout:
    """
    Where attention finds the tokens of packed rows.

    Args:
        groups (`list[torch.LongTensor]`): of each group of rows, the columns of their tokens, `(rows, T)`.
        places (`torch.LongTensor` of shape `(L,)`): for each column, its place among the tokens of all groups.
    """

    groups: list[torch.Tensor]
    places: torch.Tensor


@functools.lru_cache(maxsize=4)  # all layers ask for the same
def _layout(starts: tuple[int, ...], length: int) -> _Layout:
    """Group the rows that begin at `starts` in a row of `length` tokens."""
    ends = [*starts[1:], length]
    longest_first = sorted(zip(starts, ends, strict=True), key=lambda row: row[0] - row[1])
    groups: list[torch.Tensor] = []
    places = torch.empty(length, dtype=torch.long)
    num_places = 0
    while longest_first:
        width = longest_first[0][1] - longest_first[0][0]
        shortest = min(NEARLY_AS_LONG * width, width - FEW_TOKENS)
        members = [(start, end) for start, end in longest_first if end - start >= shortest]
        longest_first = longest_first[len(members) :]
        columns = torch.zeros(len(members), width, dtype=torch.long)
        for i, (start, end) in enumerate(members):
            columns[i, : end - start] = torch.arange(start, end)
            columns[i, end - start :] = end - 1  # any token will do
            places[start:end] = num_places + i * width + torch.arange(end - start)
        groups.append(columns)
        num_places += columns.numel()
    return _Layout(groups, places)
