"""The KV cache of the retrieval loop: every row keeps its own columns, so that rows may grow, shrink, leave and arrive apart from each other."""

import torch
from transformers.cache_utils import Cache

EMPTY = torch.iinfo(
    torch.int64
).max  # position of a column that holds no token: later than any query, so nothing attends to it
_BLOCK = 64  # columns are allocated in multiples of this


class RowCache(Cache):
    """
    Pre-allocated keys and values in which the tokens of a row lie without gaps from column 0 on, each next to the position it was rotated for.

    A chunk is written where its row ends, whatever the other rows do; attention sees a column iff its position is not after the query's. So nothing
    is ever re-packed: a row that retrieved is longer, and that is all. Sliding windows are kept by the mask, no column is evicted.

    Args:
        rows (`int`): slots, the most rows at once.
        columns (`int`): to start with; it grows.
        device (`torch.device`): of `tokens` and `positions`; keys and values are allocated where the layers write them.
        limit (`int`): columns that a row can fill, Gen's context length.
        static (`bool`): keys and values keep their addresses, for a captured decoding step (torch.compile, CUDA graphs).
        dtype (`torch.dtype`, *optional*): of the model, noted by whoever keeps the cache for another call.

    Attributes:
        tokens, positions (`torch.LongTensor` of shape `(rows, columns)`): what each column holds.
        keys, values (`list[torch.Tensor]` of shape `(rows, heads, columns, head_dim)`): a layer each.
    """

    def __init__(self, rows, columns, device, limit=EMPTY, static=False, dtype=None):
        super().__init__(layers=[])
        self.static, self.limit, self.dtype = static, limit, dtype
        columns = _rounded(columns)
        self.tokens = torch.zeros(rows, columns, dtype=torch.long, device=device)
        self.positions = torch.full((rows, columns), EMPTY, device=device)
        self.keys, self.values = [], []
        self._slots = self._columns = None  # of the forward under way
        self._width = 0

    @property
    def columns(self):
        """Columns that are allocated."""
        return self.positions.shape[1]

    # ------------------------------------------------------------------ one forward

    def begin(self, slots, columns, tokens, positions, width):
        """
        Say where the tokens of the next forward belong.

        Args:
            slots (`torch.LongTensor` of shape `(R,)` or `int`): the slots of its rows; an `int` n for the first n.
            columns, tokens, positions (`torch.LongTensor` of shape `(R, W)`): for each token its column, its id, and its position; `EMPTY` for padding, which
                is written after the end of its row and never seen.
            width (`int`): columns that attention reads, including this forward's.
        """
        self._slots, self._columns, self._width = slots, columns, width
        for states, new in ((self.tokens, tokens), (self.positions, positions)):
            if isinstance(slots, torch.Tensor):
                states[slots[:, None], columns] = new
            else:
                states[:slots].scatter_(1, columns, new)

    def update(self, key_states, value_states, layer_idx, *args, **kwargs):
        """Write keys and values `(R, heads, W, head_dim)` of a layer and return all that its rows hold, `(R, heads, width, head_dim)`."""
        if layer_idx == len(self.keys):
            for stored, states in ((self.keys, key_states), (self.values, value_states)):
                stored.append(states.new_zeros(len(self.positions), states.shape[1], self.columns, states.shape[3]))
                if self.static and not torch.compiler.is_compiling():
                    torch._dynamo.mark_static_address(stored[-1])  # else CUDA graphs refuse to write to it
        return self._write(self.keys[layer_idx], key_states), self._write(self.values[layer_idx], value_states)

    def _write(self, stored, states):
        columns, slots = self._columns.to(stored.device), self._slots
        every = isinstance(slots, int)
        index = torch.arange(slots, device=stored.device) if every else slots.to(stored.device)
        stored[index[:, None], :, columns] = states.transpose(
            1, 2
        )  # not scatter_, for which a compiled step would copy the cache twice
        return stored[:slots, :, : self._width] if every else stored[index, :, : self._width]

    def visible(self, positions, window=None):
        """
        Which columns each query of this forward attends to.

        Args:
            positions (`torch.LongTensor` of shape `(R, W)`): of the queries.
            window (`int`, *optional*): of a sliding-window layer.

        Returns:
            `torch.BoolTensor` of shape `(R, 1, W, width)`.
        """
        rows = self.positions[self._slots] if isinstance(self._slots, torch.Tensor) else self.positions[: self._slots]
        keys, queries = rows[:, None, None, : self._width], positions[:, None, :, None]
        visible = keys <= queries
        return visible if window is None else visible & (keys > queries - window)

    # what transformers asks when no mask is given: every row is at the same column

    def get_seq_length(self, layer_idx=0):
        return self._width - (0 if self._columns is None else self._columns.shape[1])

    def get_mask_sizes(self, *args, **kwargs):
        return self._width, 0

    def get_max_length(self, layer_idx=None):
        return -1

    get_max_cache_shape = get_max_length  # its name in older releases

    @property
    def is_compileable(self):
        return self.static

    # ------------------------------------------------------------------ between forwards

    @torch.no_grad()
    def grow(self, columns):
        """Make room for `columns` columns; twice as many as before, so that a long text is copied a few times only, but no more than a context needs."""
        if columns <= self.columns:
            return
        added = _rounded(max(columns, min(2 * self.columns, self.limit))) - self.columns
        self.tokens = torch.nn.functional.pad(self.tokens, (0, added))
        self.positions = torch.cat(
            [self.positions, self.positions.new_full((len(self.positions), added), EMPTY)], 1
        )  # pad() goes through a double
        for stored in (self.keys, self.values):
            for layer, states in enumerate(stored):
                stored[layer] = torch.nn.functional.pad(states, (0, 0, 0, added))
                if self.static:
                    torch._dynamo.mark_static_address(stored[layer])

    def move(self, source, target, length):
        """Slot `target` becomes what slot `source` holds in its first `length` columns."""
        for states in (*self.keys, *self.values):
            states[target, :, :length] = states[source, :, :length]
        self.tokens[target] = self.tokens[source]
        self.positions[target] = self.positions[source]

    def cut(self, slot, start, end, length):
        """Take the tokens of columns `[start, end)` out of a slot of `length` tokens; what follows them moves up and keeps its positions."""
        kept = start + length - end
        for states in (*self.keys, *self.values):
            states[slot, :, start:kept] = states[slot, :, end:length].clone()
        for states in (self.tokens, self.positions):
            states[slot, start:kept] = states[slot, end:length].clone()
        self.positions[slot, kept:] = EMPTY


def attention_mask(cache, config, positions, implementation, dtype):
    """
    What Gen's layers take as `attention_mask` for the forward that `cache.begin` announced.

    Args:
        cache ([`RowCache`]), config (`PreTrainedConfig`): Gen's text config.
        positions (`torch.LongTensor` of shape `(R, W)`): of the queries.
        implementation (`str`): of the attention; `"sdpa"` takes `bool`, every other one adds the mask to the scores.
        dtype (`torch.dtype`): of the latter.

    Returns:
        A tensor `(R, 1, W, width)`, or a `dict` of these by layer type, where Gen mixes sliding windows and full attention.
    """
    kinds = layer_kinds(config)
    window = getattr(config, "sliding_window", None)
    masks = {kind: cache.visible(positions, window if kind == "sliding_attention" else None) for kind in kinds}
    if implementation != "sdpa":
        lowest = torch.finfo(dtype).min
        masks = {
            kind: torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, lowest)
            for kind, mask in masks.items()
        }
    return masks if len(masks) > 1 else masks[kinds[0]]


def layer_kinds(config):
    """The sorted set of Gen's layer types: `"full_attention"`, `"sliding_attention"` and those of other architectures."""
    if types := getattr(config, "layer_types", None) or getattr(
        config, "attention_layers", None
    ):  # the latter: GPT-Neo
        return sorted(set(types))
    sliding = getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True)
    return ["sliding_attention" if sliding else "full_attention"]


def context_length(config):
    """Positions that Gen can read, from its text config; `EMPTY`, which no row reaches, where it sets no limit."""
    return getattr(config, "max_position_embeddings", None) or EMPTY


def _rounded(columns):
    return -(-max(columns, 1) // _BLOCK) * _BLOCK
