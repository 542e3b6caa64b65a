"""The KV cache of the decoding loop, in which rows grow, shrink, enter and leave independently."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache

from .architectures_cosup import num_positions
from .settings_cosup import DecodingSettings

# position of a column that holds no token: later than any query, so nothing attends to it
EMPTY = torch.iinfo(torch.int64).max
_BLOCK = 64  # columns are allocated in multiples of this
_ATTENTION_LOCK = threading.Lock()
_REPLACED_ATTENTION: dict[int, tuple[int, str]] = {}  # calls, and Gen's own attention, by the id of Gen's config


class RowCache(Cache):
    """
    Pre-allocated keys and values. The tokens of a row fill its columns from 0 on without gaps. Each column also stores
    the position with which its keys were rotated.

    A chunk is written where its row ends, independently of other rows. A query attends to a column iff the column's
    position is not after its own. So nothing is ever repacked: a row that retrieves just gets longer. Sliding windows
    exist only in the mask: no column is evicted.

    Args:
        rows (`int`), columns (`int`): how many of them to start with; the cache grows.
        device (`torch.device`): of `tokens` and `positions`; keys and values are allocated on their layer's device.
        limit (`int`): the most columns that a row can fill, Gen's context length.
        max_rows (`int`, *optional*): the most rows; by default `rows`.
        max_tokens (`int`, *optional*): grow beyond what is needed only while rows times columns stay within this.
        static (`bool`): keep the addresses of keys and values, for a captured step (torch.compile, CUDA graphs).
        dtype (`torch.dtype`, *optional*): of the model; [`cache_for`] checks it before it reuses a cache.

    Attributes:
        tokens, positions (`torch.LongTensor` of shape `(rows, columns)`): token id and position in each column.
        keys, values (`list[torch.Tensor]` of shape `(rows, heads, columns, head_dim)`): one entry per layer.
    """

    def __init__(
        self,
        rows: int,
        columns: int,
        device: torch.device,
        limit: int = EMPTY,
        max_rows: int | None = None,
        max_tokens: int | None = None,
        static: bool = False,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(layers=[])
        self.static = static
        self.limit = limit
        self.max_rows = rows if max_rows is None else max_rows
        self.max_tokens = max_tokens
        self.dtype = dtype
        columns = rounded(columns)
        self.tokens = torch.zeros(rows, columns, dtype=torch.long, device=device)
        self.positions = torch.full((rows, columns), EMPTY, device=device)
        self.keys: list[torch.Tensor] = []
        self.values: list[torch.Tensor] = []
        # the forward under way: its slots, its columns (R, W), and how many columns attention reads
        self._slots: torch.Tensor | int = 0
        self._columns = torch.zeros(0, 0, dtype=torch.long, device=device)
        self._width = 0

    @property
    def rows(self) -> int:
        """Number of allocated rows."""
        return self.positions.shape[0]

    @property
    def columns(self) -> int:
        """Number of allocated columns."""
        return self.positions.shape[1]

    # ------------------------------------------------------------------ one forward

    def begin(
        self,
        slots: torch.Tensor | int,
        columns: torch.Tensor,
        tokens: torch.Tensor,
        positions: torch.Tensor,
        width: int,
    ) -> None:
        """
        Store the tokens of the next forward, and where its keys and values belong.

        Args:
            slots (`torch.LongTensor` of shape `(R,)` or `int`): the slots of its rows; an `int` n for the first n.
            columns, tokens, positions (`torch.LongTensor` of shape `(R, W)`): column, id and position of each token.
                Padding has the position `EMPTY`: it is written after the end of its row and never attended to.
            width (`int`): number of columns that attention reads, including this forward's.
        """
        self._slots = slots
        self._columns = columns
        self._width = width
        for states, new in ((self.tokens, tokens), (self.positions, positions)):
            if isinstance(slots, torch.Tensor):
                states[slots[:, None], columns] = new
            else:
                states[:slots].scatter_(1, columns, new)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Write the keys and values of a layer, and return all keys and values of the forward's rows in this layer.

        Args:
            key_states, value_states (`torch.Tensor` of shape `(R, heads, W, head_dim)`): of the forward's tokens.
            layer_idx (`int`): number of the layer.

        Returns:
            Keys and values, both of shape `(R, heads, width, head_dim)`.
        """
        if layer_idx == len(self.keys):
            for stored, states in ((self.keys, key_states), (self.values, value_states)):
                stored.append(states.new_zeros(self.rows, states.shape[1], self.columns, states.shape[3]))
                if self.static and not torch.compiler.is_compiling():
                    torch._dynamo.mark_static_address(stored[-1])  # otherwise CUDA graphs refuse to write to it
        return self._write(self.keys[layer_idx], key_states), self._write(self.values[layer_idx], value_states)

    def _write(self, stored: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
        slots = self._slots
        columns = self._columns.to(stored.device)  # (R, W)
        states = states.transpose(1, 2)  # (R, W, heads, head_dim)
        # indexing, not scatter_, for which a compiled step would copy the cache twice
        if isinstance(slots, int):
            stored[torch.arange(slots, device=stored.device)[:, None], :, columns] = states
            return stored[:slots, :, : self._width]
        slots = slots.to(stored.device)
        stored[slots[:, None], :, columns] = states
        return stored[slots, :, : self._width]

    def visible(self, positions: torch.Tensor, window: int | None = None) -> torch.Tensor:
        """
        Return which columns each query of this forward attends to.

        Args:
            positions (`torch.LongTensor` of shape `(R, W)`): of the queries.
            window (`int`, *optional*): of a sliding-window layer.

        Returns:
            `torch.BoolTensor` of shape `(R, 1, W, width)`.
        """
        if isinstance(self._slots, torch.Tensor):
            stored = self.positions[self._slots]
        else:
            stored = self.positions[: self._slots]
        keys = stored[:, None, None, : self._width]  # (R, 1, 1, width)
        queries = positions[:, None, :, None]  # (R, 1, W, 1)
        visible = keys <= queries
        if window is None:
            return visible
        return visible & (keys > queries - window)

    # transformers builds the mask from these if it gets none; all rows are at the same column then

    def get_seq_length(self, layer_idx: int | None = None) -> int:
        return self._width - self._columns.shape[1]

    def get_mask_sizes(self, *args: Any, **kwargs: Any) -> tuple[int, int]:
        return self._width, 0

    def get_max_length(self, layer_idx: int | None = None) -> int:
        return -1

    get_max_cache_shape = get_max_length  # its name in older releases

    @property
    def is_compileable(self) -> bool:
        return self.static

    # ------------------------------------------------------------------ between forwards

    def grow(self, rows: int, columns: int) -> None:
        """
        Make room for the first `rows` rows with `columns` columns, no fewer than are filled.

        Both grow by doubling, up to `max_rows` and the context length, so that a long text is copied only a few times.
        """
        if rows <= self.rows and columns <= self.columns:
            return
        most_rows, most_columns = self.rows, self.columns
        if rows > self.rows:
            most_rows = max(rows, min(2 * self.rows, self.max_rows))
        if columns > self.columns:
            most_columns = rounded(max(columns, min(2 * self.columns, self.limit)))
        if self.max_tokens is not None and most_rows * most_columns > self.max_tokens:
            most_rows, most_columns = rows, rounded(columns)
        self._resize(most_rows, most_columns)

    def shrink(self, rows: int, columns: int) -> None:
        """Give memory back if the cache is more than four times as large as `rows` rows of `columns` columns."""
        rows = max(rows, 1)
        if self.rows * self.columns > 4 * rows * rounded(columns):
            self._resize(min(self.rows, 2 * rows), min(self.columns, rounded(2 * columns)))

    @torch.no_grad()
    def _resize(self, rows: int, columns: int) -> None:
        """Allocate new tensors and copy what has room in them, layer by layer."""
        self.tokens = _resized(self.tokens[:, None, :, None], rows, columns, 0)[:, 0, :, 0]
        self.positions = _resized(self.positions[:, None, :, None], rows, columns, EMPTY)[:, 0, :, 0]
        for stored in (self.keys, self.values):
            for layer, states in enumerate(stored):
                stored[layer] = _resized(states, rows, columns, 0)
                if self.static:
                    torch._dynamo.mark_static_address(stored[layer])

    def move(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` columns of slot `source` to slot `target`."""
        for states in (*self.keys, *self.values):
            states[target, :, :length] = states[source, :, :length]
        self.tokens[target] = self.tokens[source]
        self.positions[target] = self.positions[source]

    def cut(self, slot: int, start: int, end: int, length: int) -> None:
        """
        Remove the columns `[start, end)` of a slot that holds `length` tokens.

        Later tokens move to the columns from `start` on, and keep their positions.
        """
        remaining = length - (end - start)
        for states in (*self.keys, *self.values):
            states[slot, :, start:remaining] = states[slot, :, end:length].clone()
        for states in (self.tokens, self.positions):
            states[slot, start:remaining] = states[slot, end:length].clone()
        self.positions[slot, remaining:] = EMPTY


def _resized(states: torch.Tensor, rows: int, columns: int, fill: int) -> torch.Tensor:
    """Return a tensor `(rows, heads, columns, head_dim)`: as much of `states` as fits, and `fill` elsewhere."""
    resized = states.new_full((rows, states.shape[1], columns, states.shape[3]), fill)
    kept = states[:rows, :, :columns]
    resized[: kept.shape[0], :, : kept.shape[2]] = kept
    return resized


def cache_for(model: Any, settings: DecodingSettings) -> RowCache:
    """
    Return an empty cache for a decoding loop.

    A static cache has all rows from the start. It is taken from the model, where the last call left it, and given back
    when this call ends: a captured step is bound to its cache, and another cache would mean capturing it again.
    """
    rows, columns, device, limit = settings.num_slots, settings.num_columns, settings.device, settings.context_length
    if not settings.static:
        return RowCache(1, columns, device, limit, max_rows=rows, max_tokens=settings.max_batch_tokens)
    cache: RowCache | None = getattr(model, "_static_row_cache", None)
    model._static_row_cache = None  # a call in another thread must not write into it
    dtype = model.gen.dtype
    if torch.is_autocast_enabled(device.type):
        dtype = torch.get_autocast_dtype(device.type)
    if cache is None or not _fits(cache, rows, columns, device, dtype):
        cache = RowCache(rows, columns, device, limit, static=True, dtype=dtype)
    cache.positions.fill_(EMPTY)
    return cache


def _fits(cache: RowCache, rows: int, columns: int, device: torch.device, dtype: torch.dtype) -> bool:
    """Return whether a static cache can serve another call."""
    if cache.rows != rows or cache.positions.device != device or cache.dtype != dtype:
        return False
    if cache.positions.is_inference() != torch.is_inference_mode_enabled():
        return False  # outside of inference mode, its tensors could not be written
    # attention reads all columns of a static cache: one that is far too large would be slow in every call
    return columns <= cache.columns <= 4 * columns + 64


# ---------------------------------------------------------------------- attention


def attention_mask(
    cache: RowCache, config: PreTrainedConfig, positions: torch.Tensor, implementation: str, dtype: torch.dtype
) -> torch.Tensor | dict[str, torch.Tensor]:
    """
    Return the `attention_mask` of Gen's layers for the forward that `cache.begin` has set up.

    Args:
        cache ([`RowCache`]), config (`PreTrainedConfig`): the cache, and Gen's text config.
        positions (`torch.LongTensor` of shape `(R, W)`): of the queries.
        implementation (`str`): of attention. `"sdpa"` gets a mask of `bool`, any other a mask to add to the scores.
        dtype (`torch.dtype`): of a mask to add.

    Returns:
        A tensor `(R, 1, W, width)`; a `dict` of these by layer type if Gen mixes sliding windows and full attention.
    """
    masks = {}
    for kind in layer_kinds(config):
        window = getattr(config, "sliding_window", None) if kind == "sliding_attention" else None
        mask = cache.visible(positions, window)
        if implementation != "sdpa":
            zeros = torch.zeros(mask.shape, dtype=dtype, device=mask.device)
            mask = zeros.masked_fill_(~mask, torch.finfo(dtype).min)
        masks[kind] = mask
    if len(masks) > 1:
        return masks
    return next(iter(masks.values()))


@contextmanager
def maskable_attention(gen: PreTrainedModel) -> Iterator[None]:
    """
    Let Gen use SDPA or eager attention within this context: flash kernels take no mask, which ragged rows need.

    Calls in several threads may be in it at once: the last one to leave restores what the first one found.
    """
    config = gen.config.get_text_config()
    with _ATTENTION_LOCK:
        num_calls, implementation = _REPLACED_ATTENTION.get(id(config), (0, config._attn_implementation))
        _REPLACED_ATTENTION[id(config)] = (num_calls + 1, implementation)
        if implementation not in ("sdpa", "eager"):
            can_use_sdpa = gen._supports_sdpa and not getattr(config, "attn_logit_softcapping", None)
            config._attn_implementation = "sdpa" if can_use_sdpa else "eager"
    try:
        yield
    finally:
        with _ATTENTION_LOCK:
            num_calls, implementation = _REPLACED_ATTENTION.pop(id(config))
            if num_calls > 1:
                _REPLACED_ATTENTION[id(config)] = (num_calls - 1, implementation)
            else:
                config._attn_implementation = implementation


def layer_kinds(config: PreTrainedConfig) -> list[str]:
    """Return the sorted set of Gen's layer types: `"full_attention"`, `"sliding_attention"`, or others."""
    types = getattr(config, "layer_types", None) or getattr(config, "attention_layers", None)  # the latter: GPT-Neo
    if types:
        return sorted(set(types))
    if getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True):
        return ["sliding_attention"]
    return ["full_attention"]


def context_length(config: PreTrainedConfig) -> int:
    """Return the length of Gen's context by its text config; `EMPTY`, which no row reaches, if there is no limit."""
    limit = num_positions(config)
    return EMPTY if limit is None else limit


def rounded(columns: int) -> int:
    """Return `columns` rounded up to whole blocks, at least one."""
    blocks = -(-max(columns, 1) // _BLOCK)
    return blocks * _BLOCK
