"""The token datastore: a kNN memory of every token of a corpus, by the state of Gen that predicted it."""

from typing import Any

import torch

from .datastore_search_cosup import KeyShard, Neighbors, exact_search, gather_keys, gather_values, half_norms_of
from .folders_cosup import DTYPES
from .memory_cosup import MemoryConfig
from .sharing_cosup import check_memory_fingerprint


class KNNMemory:
    """
    A token memory of entries: keys, which are states of Gen, and values, the tokens that came next.

    p_mem(v) is proportional to the sum of exp(-d²/T) over the k entries nearest to the state, of value v, where d is
    the L2 distance and T the temperature (arXiv 2311.09615, section 2).

    Made by [`KNNMemory.from_tensors`]. An entry's row is its place in the texts.
    """

    def __init__(self, shards: list[KeyShard], config: dict[str, Any], document_starts: torch.Tensor | None) -> None:
        self.config = config
        self.document_starts = document_starts
        self._shards = shards
        self._searched = shards  # on the device of the search

    @classmethod
    def from_tensors(
        cls,
        keys: torch.Tensor,
        values: torch.Tensor,
        *,
        fingerprint: dict[str, str],
        vocab_size: int,
        document_starts: torch.Tensor | None = None,
        dtype: str = "float16",
        memory_config: MemoryConfig | None = None,
    ) -> "KNNMemory":
        """
        Make a memory in memory.

        Args:
            keys (`torch.Tensor` of shape `(N, d)`): any float dtype and device; copied to the CPU.
            values (`torch.Tensor` of shape `(N,)`): token ids.
            fingerprint (`dict`): of the model that made the keys, see [`memory_fingerprint`].
            vocab_size (`int`): V, the width of Gen's logits.
            document_starts (`torch.LongTensor` of shape `(D,)`, *optional*): row of the first entry of each document.
            dtype (`str`, *optional*, defaults to `"float16"`): of the stored keys: `"float32"`, `"float16"` or
                `"bfloat16"`.
            memory_config ([`MemoryConfig`], *optional*): how the memory is used unless a call says otherwise.

        Raises:
            `ValueError`: for no entries, keys that are not finite or not in `dtype`, values outside the vocabulary,
                or document_starts that are not ascending rows.
        """
        if dtype not in DTYPES:
            raise ValueError(f"dtype is {dtype!r}, expected one of {', '.join(DTYPES)}.")
        if keys.ndim != 2 or values.shape != keys.shape[:1]:
            raise ValueError(
                f"keys are {tuple(keys.shape)} and values {tuple(values.shape)}, expected (N, d) and (N,)."
            )
        if not len(keys):
            raise ValueError("There are no keys: a memory needs at least one entry.")
        keys, values = keys.detach().cpu(), values.detach().cpu()
        check_values(values, vocab_size)
        if document_starts is not None:
            document_starts = document_starts.long().cpu()
            ascending = bool((document_starts.diff() >= 0).all())
            if not len(document_starts) or document_starts[0] != 0 or not ascending or document_starts[-1] > len(keys):
                first = document_starts[:5].tolist()
                raise ValueError(f"document_starts are {first}…, expected ascending rows from 0 to {len(keys)}.")
        stored = stored_keys(keys, DTYPES[dtype])
        config = {
            "key_size": keys.shape[1],
            "vocab_size": vocab_size,
            "dtype": dtype,
            "fingerprint": fingerprint,
            "memory_config": (memory_config or MemoryConfig()).to_dict(),
        }
        return cls([KeyShard(stored, half_norms_of(stored), values.int())], config, document_starts)

    # ------------------------------------------------------------------ what it holds

    def __len__(self) -> int:
        """Return the number of entries."""
        return sum(map(len, self._shards))

    @property
    def key_size(self) -> int:
        """Width d of a key."""
        return self.config["key_size"]

    @property
    def vocab_size(self) -> int:
        """Number V of token ids."""
        return self.config["vocab_size"]

    @property
    def states(self) -> tuple[str, ...]:
        """Name of the submodule of Gen whose input is the key."""
        return (self.config["fingerprint"]["key"],)

    @property
    def fingerprint(self) -> str:
        return ""

    @property
    def memory_config(self) -> MemoryConfig:
        """How the memory is used unless a call says otherwise."""
        return MemoryConfig.from_dict(self.config["memory_config"])

    def get_keys(self, rows: torch.Tensor) -> torch.Tensor:
        """Return the keys of rows `(m,)` as they are stored, float32 `(m, d)`."""
        return gather_keys(self._shards, rows)

    def get_values(self, rows: torch.Tensor) -> torch.Tensor:
        """Return the token ids of rows, int64 of the shape of `rows`."""
        return gather_values(self._shards, rows)

    def check_model(self, model: Any) -> None:
        """Raise a `ValueError` that names what differs unless the keys are states of this model's Gen."""
        check_memory_fingerprint(self.config["fingerprint"], model)

    # ------------------------------------------------------------------ searching

    def search(self, keys: torch.Tensor, k: int, exclude_rows: torch.Tensor | None = None) -> Neighbors:
        """
        Find the nearest entries by L2 distance.

        Args:
            keys (`torch.Tensor` of shape `(n, d)`): states of Gen, any float dtype and device.
            k (`int`): entries per query; all if there are fewer.
            exclude_rows (`torch.LongTensor` of shape `(n,)`, *optional*): an entry that each query may not find, such
                as its own; -1 for none.

        Returns:
            [`Neighbors`]: `(n, min(k, N))`, or `(n, min(k, N - 1))` with `exclude_rows`; in ascending order of
                distance, then of row, on the device of `keys`.

        Raises:
            `ValueError`: for keys of another width or that are not finite, or a k below 1.
        """
        device = self._searched[0].keys.device
        queries = check_keys(keys, self.key_size).to(device)
        if k < 1:
            raise ValueError(f"k is {k}, expected at least 1.")
        if exclude_rows is not None:
            exclude_rows = exclude_rows.to(device)
        k = min(k, len(self) - (exclude_rows is not None))
        # autocast would compute even float32 products in half precision
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            distances, rows = exact_search(self._searched, queries, k, exclude_rows)
        values = gather_values(self._searched, rows)
        return Neighbors(distances.to(keys.device), rows.to(keys.device), values.to(keys.device))

    def log_probs(self, states: dict[str, torch.Tensor], config: MemoryConfig) -> torch.Tensor:
        """
        Return log p_mem, `(R, V)` in float32, of what entered the submodule of `states`; -inf where it has nothing.

        Args:
            states (`dict[str, torch.Tensor]`): by name, `(R, d)`.
            config ([`MemoryConfig`]): its `k` and `temperature` are used.
        """
        neighbors = self.search(states[self.states[0]], config.k)
        weights = neighbors.log_weights(config.temperature)
        shape = len(weights), self.vocab_size
        # relative to the largest weight of each token, so that a small one does not become 0
        largest = weights.new_full(shape, -torch.inf).scatter_reduce(1, neighbors.values, weights, "amax")
        shares = (weights - largest.gather(1, neighbors.values)).exp()
        return weights.new_zeros(shape).scatter_add(1, neighbors.values, shares).log_() + largest

    def target_log_probs(
        self, keys: torch.Tensor, targets: torch.Tensor, config: MemoryConfig, kept_ids: torch.Tensor | None = None
    ) -> Any:
        """
        Return log p_mem of one token for each key, without a buffer of V columns.

        Args:
            keys (`torch.Tensor` of shape `(n, d)`): states of Gen.
            targets (`torch.LongTensor` of shape `(n,)`): token ids.
            config ([`MemoryConfig`]): its `k` and `temperature` are used.
            kept_ids (`torch.LongTensor` of shape `(C,)`, *optional*): ids of which the mass is wanted too.

        Returns:
            `torch.FloatTensor` of shape `(n,)`; -inf where no neighbour has this value. With `kept_ids` a tuple: also
            log P_mem of these ids together, `(n,)`.
        """
        neighbors = self.search(keys, config.k)
        values, log_weights = neighbors.values, neighbors.log_weights(config.temperature)
        others = values != targets.to(values.device)[:, None]
        target_scores = log_weights.masked_fill(others, -torch.inf).logsumexp(1)
        if kept_ids is None:
            return target_scores
        others = ~torch.isin(values, kept_ids.to(values.device))
        return target_scores, log_weights.masked_fill(others, -torch.inf).logsumexp(1)


def check_keys(keys: torch.Tensor, size: int) -> torch.Tensor:
    """Return keys `(n, d)` in float32; `ValueError` for another width, or values that are not finite."""
    if keys.ndim != 2 or keys.shape[1] != size:
        raise ValueError(f"keys are {tuple(keys.shape)}, the memory has keys of {size}; expected (n, {size}).")
    keys = keys.detach().float()
    finite = keys.isfinite().all(1)
    if not finite.all():
        raise ValueError(f"The keys of rows {(~finite).nonzero()[:5, 0].tolist()} are not finite.")
    return keys.contiguous()


def stored_keys(keys: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """
    Return keys in the dtype in which they are stored.

    Raises:
        `ValueError`: for keys that are not finite, or overflow the dtype.
    """
    stored = keys.to(dtype)
    if stored.isfinite().all():
        return stored
    if keys.isfinite().all():
        largest = keys.abs().amax().item()
        raise ValueError(f"Keys overflow {dtype}: the largest entry is {largest:.4g}. Store them as dtype='bfloat16'.")
    raise ValueError("Keys are NaN or infinite: check Gen's weights and dtype.")


def check_values(values: torch.Tensor, vocab_size: int) -> None:
    """Raise `ValueError` for token ids outside 0 to `vocab_size - 1`."""
    if values.is_floating_point():
        raise ValueError(f"values are of {values.dtype}, expected integers: token ids.")
    wrong = values[(values < 0) | (values >= vocab_size)]
    if len(wrong):
        raise ValueError(f"values hold {wrong[:5].tolist()}, which are no token ids: the vocabulary has {vocab_size}.")
