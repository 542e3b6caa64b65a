"""What a token datastore holds, and its search, exact or approximate: nearest entries and p_mem."""

import math
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

from .datastore_files_cosup import MEMORY_FORMAT, content_digest
from .datastore_search_cosup import (
    KeyShard,
    Neighbors,
    exact_search,
    gather_keys,
    gather_values,
    recompute,
    sort_by_distance,
)
from .files_cosup import digest
from .fingerprints_cosup import check_memory_fingerprint
from .folder_store_cosup import FolderStore
from .folders_cosup import DTYPES, Config, check_file, dtype_name
from .index_approximate_cosup import (
    L2,
    empty_approximate,
    make_approximate,
    read_approximate,
    recall,
    require_faiss,
    set_search_options,
    write_approximate,
)
from .index_files_cosup import Shard
from .index_search_cosup import ExactSearch
from .memory_cosup import MemoryConfig, TokenNeighbors, target_log_probs

logger = logging.get_logger(__name__)

Store = TypeVar("Store", bound="SearchableKeys")


class SearchableKeys(FolderStore):
    """
    Entries that can be searched; [`KNNMemory`] adds how they are built and loaded.

    Args:
        shards (`list[KeyShard]`): the entries, in memory or mapped from files.
        config (`dict`): the content of `memory_config.json`.
        folder (`Path`, *optional*): of the files.
    """

    form = MEMORY_FORMAT

    def __init__(self, shards: list[KeyShard], config: Config, folder: Path | None = None) -> None:
        super().__init__(config, folder)
        self._shards = shards
        self._searched = shards  # where exact search reads them: in files, or on a device
        self._document_starts: torch.Tensor | None = None
        self._approximate: Any = None  # faiss.Index

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
        """Hash of values and norms, the model and the approximate search: it tells this memory from any other."""
        if self.config["content"] is None:
            self.config = {**self.config, "content": content_digest(self._shards)}
        used = self.config["approximate"] if self._approximate is not None else None
        return digest(
            {"content": self.config["content"], "fingerprint": self.config["fingerprint"], "approximate": used}
        )

    @property
    def memory_config(self) -> MemoryConfig:
        """How the memory is used unless a call says otherwise."""
        return MemoryConfig.from_dict(self.config["memory_config"])

    @memory_config.setter
    def memory_config(self, memory_config: MemoryConfig) -> None:
        self.config = {**self.config, "memory_config": memory_config.to_dict()}

    @property
    def fit(self) -> dict[str, Any] | None:
        """The text that `memory_config` was fitted on: `sha256`, `tokens` and `ngram_overlap`; `None` if on none."""
        return self.config.get("fit")

    @fit.setter
    def fit(self, fit: dict[str, Any] | None) -> None:
        self.config = {**self.config, "fit": fit}

    @property
    def document_starts(self) -> torch.Tensor:
        """Row with which each document begins, int64 `(D,)`; a document without entries begins with the next one."""
        if self._document_starts is None:
            starts, first_row = [], 0
            for shard in self._shards:
                starts.append(shard.document_starts + first_row)
                first_row += len(shard)
            self._document_starts = torch.cat(starts)
        return self._document_starts

    def documents_of(self, rows: torch.Tensor) -> torch.Tensor:
        """Return the numbers of the documents that rows are from, int64 of the shape of `rows`."""
        # the last document that starts at or before the row: empty ones start there too
        return torch.searchsorted(self.document_starts, rows.cpu().contiguous(), right=True) - 1

    def get_keys(self, rows: torch.Tensor) -> torch.Tensor:
        """Return the keys of rows `(m,)` as they are stored, float32 `(m, d)`."""
        return gather_keys(self._shards, rows)

    def get_values(self, rows: torch.Tensor) -> torch.Tensor:
        """Return the token ids of rows, int64 of the shape of `rows`."""
        return gather_values(self._shards, rows)

    def check_model(self, model: Any, tokenizer: PreTrainedTokenizerBase | None = None) -> None:
        """
        Raise a `ValueError` that names what differs unless the keys are states of this model's Gen.

        A plain language model does not hold its `tokenizer`; it is compared only if it is given.
        """
        check_memory_fingerprint(self.config["fingerprint"], model, tokenizer)

    # ------------------------------------------------------------------ searching

    def to(self: Store, device: str | torch.device | None, dtype: str | torch.dtype | None = None) -> Store:
        """
        Search exactly on a device from now on; what is saved never depends on it. FAISS searches on the CPU.

        Args:
            device (`str`, `torch.device` or `None`): of a copy of all entries, e.g. `"cuda"`, or `"cpu"` for one in
                memory; `None` searches from the files again.
            dtype (`str` or `torch.dtype`, *optional*): of copied keys; defaults to the files'. Distances are float32.

        Raises:
            `ValueError`: for an unknown dtype, or keys that overflow it.
        """
        copy_dtype = None if dtype is None else DTYPES[dtype_name(dtype)]
        searched = self._shards
        if device is not None:
            searched = [shard.to(device, copy_dtype) for shard in self._shards]
        self._searched = searched
        return self

    def search(self, keys: torch.Tensor, k: int, exclude_rows: torch.Tensor | None = None) -> Neighbors:
        """
        Find the nearest entries by L2 distance: exactly, or approximately after [`~KNNMemory.train_approximate`].

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
        return self._search(keys, k, exclude_rows, self._approximate is not None)

    def _search(self, keys: torch.Tensor, k: int, exclude_rows: torch.Tensor | None, approximate: bool) -> Neighbors:
        shards = self._shards if approximate else self._searched
        device = shards[0].keys.device
        queries = check_keys(keys, self.key_size).to(device)
        if k < 1:
            raise ValueError(f"k is {k}, expected at least 1.")
        if exclude_rows is not None:
            exclude_rows = exclude_rows.to(device)
        k = min(k, len(self) - (exclude_rows is not None))
        # autocast would compute even float32 products in half precision
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            if approximate:
                distances, rows = self._search_approximate(queries, k, exclude_rows)
            else:
                distances, rows = exact_search(shards, queries, k, exclude_rows)
        values = gather_values(shards, rows)
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
        shares = (weights - largest.gather(1, neighbors.values)).exp().nan_to_num()  # NaN: nothing was found
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
            kept_ids (`torch.LongTensor` of shape `(C,)`, *optional*): ids whose total probability is wanted too.

        Returns:
            `torch.FloatTensor` of shape `(n,)`; -inf where no neighbour has this value. With `kept_ids` a tuple: also
            log P_mem of these ids together, `(n,)`.
        """
        neighbors = self.search(keys, config.k)
        target_scores = neighbors.target_log_probs(targets, config.temperature)
        if kept_ids is None:
            return target_scores
        others = ~torch.isin(neighbors.values, kept_ids.to(keys.device))
        return target_scores, neighbors.log_weights(config.temperature).masked_fill(others, -torch.inf).logsumexp(1)

    def nearest(self, states: dict[str, torch.Tensor], n: int, config: MemoryConfig) -> list[TokenNeighbors]:
        """
        Return the n entries nearest to each of R states, for the trace of generate().

        Args:
            states (`dict[str, torch.Tensor]`), config ([`MemoryConfig`]): as in `log_probs`; the weights of entries
                are shares among the `k` nearest.
            n (`int`): entries for each state, at most `k`; fewer if an approximate search found fewer.
        """
        neighbors = self.search(states[self.states[0]], config.k)
        weights = neighbors.log_weights(config.temperature).exp()
        documents = self.documents_of(neighbors.rows)
        fields = (neighbors.rows, neighbors.values, neighbors.distances, weights, documents)
        counts = (neighbors.rows[:, :n] >= 0).sum(1).tolist()
        lists = [tensor[:, :n].tolist() for tensor in fields]
        rows = zip(*lists, strict=True)
        return [TokenNeighbors(*(column[:count] for column in row)) for row, count in zip(rows, counts, strict=True)]

    # ------------------------------------------------------------------ approximate search

    def train_approximate(
        self,
        index_factory: str,
        train_size: int = 65536,
        seed: int = 0,
        *,
        keys: torch.Tensor | None = None,
        targets: torch.Tensor | None = None,
        lm_log_probs: torch.Tensor | None = None,
        recompute_distances: bool = True,
        **search_options: Any,
    ) -> dict[str, float]:
        """
        Search through a FAISS index from now on: trained on a sample of the keys, filled with all, and saved in the
        folder.

        Args:
            index_factory (`str`): for `faiss.index_factory`, such as `"IVF1024,PQ64"`; see
                [`PassageIndex.train_approximate`].
            train_size (`int`, *optional*, defaults to 65536), seed (`int`, *optional*, defaults to 0): keys of the
                sample, held in memory in float32, and its seed.
            keys (`torch.Tensor` of shape `(n, d)`), targets (`torch.LongTensor` of shape `(n,)`), *optional*: states
                of Gen on held-out text, and the tokens after them, on which both searches are compared. By default 200
                random entries, each of which may not find itself.
            lm_log_probs (`torch.FloatTensor` of shape `(n,)`, *optional*): Gen's log-probabilities of the targets. The
                default is a uniform distribution.
            recompute_distances (`bool`, *optional*, defaults to `True`): compute the distances of the rows found from
                the stored keys. A compressed index gives inexact distances, and so an inexact p_mem.
            **search_options: `nprobe` (lists that IVF searches), `efSearch` (for HNSW), …

        Returns:
            `dict[str, float]`: `ann_recall@1` and `ann_recall@k`, the mean share of the exact nearest entries that
                were found, and `perplexity_exact` and `perplexity_approximate` of the targets, with the memory's k,
                temperature and weight. Also logged, and saved in the config if finite: with weight 1, a target
                without a neighbour makes a perplexity infinite.

        Raises:
            `ValueError`: if FAISS refuses the factory string, the size of the sample or an option, or the searches
                cannot be compared on these `keys`, `targets` and `lm_log_probs`. Then nothing is trained.
            `ImportError`: without FAISS.
        """
        require_faiss()
        self._check_comparison(keys, targets, lm_log_probs)
        with self._changing():
            train_size = min(train_size, len(self))
            empty_approximate(index_factory, self.key_size, train_size, L2, **search_options)
            sample = np.random.default_rng(seed).choice(len(self), train_size, replace=False, shuffle=False)
            keys_of_files = ExactSearch([Shard(None, shard.keys) for shard in self._shards])
            index = make_approximate(index_factory, keys_of_files, np.sort(sample), L2)
            set_search_options(index, search_options)
            facts = {"index_factory": index_factory, "train_size": train_size, "seed": seed}
            facts |= {"search_options": search_options, "recompute_distances": recompute_distances}
            before = self._approximate, self.config
            self._approximate, self.config = index, {**self._next_config(), "approximate": facts}
            try:
                figures = self.compare_approximate(keys, targets, lm_log_probs)
                facts |= {name: figure for name, figure in figures.items() if math.isfinite(figure)}
                config = {**self.config, "approximate": facts}
                self.config = before[1]
                if self.folder is not None:
                    config["content"] = self.config["content"]
                    name = self._write_file(
                        self.folder, config, "index.faiss", lambda path: write_approximate(index, path)
                    )
                    config["approximate"]["file"] = name
                    self._commit(self.folder, config)
                self.config = config
            except BaseException:
                self._approximate, self.config = before
                raise
        # a warning, because transformers does not show lower levels by default
        logger.warning(f"{index_factory} against exact search: {figures}")
        return figures

    def compare_approximate(
        self,
        keys: torch.Tensor | None = None,
        targets: torch.Tensor | None = None,
        lm_log_probs: torch.Tensor | None = None,
    ) -> dict[str, float]:
        """Compare approximate with exact search; for arguments and figures see [`~KNNMemory.train_approximate`]."""
        if self._approximate is None:
            raise ValueError("This memory is searched exactly: call train_approximate first.")
        self._check_comparison(keys, targets, lm_log_probs)
        excluded = None
        if keys is None or targets is None:
            rows = np.random.default_rng(0).choice(len(self), min(200, len(self)), replace=False, shuffle=False)
            excluded = torch.from_numpy(np.sort(rows))
            keys, targets = self.get_keys(excluded), self.get_values(excluded)
        config = self.memory_config
        if lm_log_probs is None:
            lm_log_probs = torch.full((len(keys),), -math.log(self.vocab_size))
        exact, approximate = (
            self._search(keys, config.k, excluded, is_approximate) for is_approximate in (False, True)
        )
        figures = {}
        for n in sorted({1, exact.rows.shape[1]}):
            figures[f"ann_recall@{n}"] = recall(approximate.rows[:, :n].cpu().numpy(), exact.rows[:, :n].cpu().numpy())
        for name, neighbors in (("perplexity_exact", exact), ("perplexity_approximate", approximate)):
            memory = neighbors.target_log_probs(targets, config.temperature)
            log_probs = target_log_probs(lm_log_probs.to(memory.device), memory, config.weight)
            figures[name] = torch.tensor(-log_probs.mean().item(), dtype=torch.float64).exp().item()
        return figures

    def _check_comparison(
        self, keys: torch.Tensor | None, targets: torch.Tensor | None, lm_log_probs: torch.Tensor | None
    ) -> None:
        """Raise `ValueError` unless exact and approximate search can be compared on these held-out states."""
        if (keys is None) != (targets is None):
            raise ValueError("keys and targets go together: pass both or neither.")
        if keys is None or targets is None:
            if lm_log_probs is not None:
                raise ValueError("lm_log_probs belong to keys and targets: pass all three.")
            if len(self) < 2:
                raise ValueError("This memory has one entry: to compare, pass keys and targets of held-out text.")
            return
        check_keys(keys, self.key_size)
        if not len(keys):
            raise ValueError("keys are empty: give at least one.")
        for name, tensor in (("targets", targets), ("lm_log_probs", lm_log_probs)):
            if tensor is not None and tensor.shape != (len(keys),):
                raise ValueError(f"{name} are {tuple(tensor.shape)}, expected ({len(keys)},): one for each key.")

    def _search_approximate(
        self, queries: torch.Tensor, k: int, excluded: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return distances and rows `(n, k)` through FAISS; inf and -1 where it found fewer."""
        if not k or not len(queries):
            return exact_search(self._shards, queries, k)
        found = self._approximate.search(queries.numpy(), k + (excluded is not None))
        distances, rows = map(torch.from_numpy, found)
        if excluded is not None:
            rows = rows.masked_fill(rows == excluded[:, None], -1)
        if self.config["approximate"]["recompute_distances"]:
            recompute(self._shards, queries, distances, rows, rows >= 0)
        distances = distances.masked_fill(rows < 0, torch.inf)
        distances, rows = sort_by_distance(distances, rows)
        return distances[:, :k], rows[:, :k]

    def _load_approximate(self, allow_faiss_files: bool, search: str | None, verify: bool | None) -> None:
        """Map the FAISS index of the folder, if there is one and it is not ignored."""
        facts = self.config["approximate"]
        if facts is None or self.folder is None:
            return
        path = self.folder / facts["file"]
        if search == "exact":
            files = {name: file for name, file in self.config["files"].items() if name != path.name or path.exists()}
            self.config = {**self.config, "approximate": facts if path.exists() else None, "files": files}
            return
        if not allow_faiss_files:
            raise ValueError(
                f"{self.folder} is searched through a FAISS file: pass allow_faiss_files=True if you trust it, or"
                " search='exact'."
            )
        check_file(path, self.config["files"][path.name], self.form, verify)
        self._approximate = read_approximate(path, len(self), self.key_size)
        set_search_options(self._approximate, facts["search_options"])

    def _write_approximate_from_memory(self, folder: Path, config: Config) -> Config:
        """Write the FAISS index of a memory that has no folder, if there is one; return the config."""
        if self._approximate is not None:
            name = self._write_file(
                folder, config, "index.faiss", lambda path: write_approximate(self._approximate, path)
            )
            config["approximate"] = {**config["approximate"], "file": name}
        return config


def check_keys(keys: torch.Tensor, size: int) -> torch.Tensor:
    """Return keys `(n, d)` in float32; `ValueError` for another width, or values that are not finite."""
    if keys.ndim != 2 or keys.shape[1] != size:
        raise ValueError(f"keys are {tuple(keys.shape)}, the memory has keys of {size}; expected (n, {size}).")
    keys = keys.detach().float()
    finite = keys.isfinite().all(1)
    if not finite.all():
        raise ValueError(f"The keys of rows {(~finite).nonzero()[:5, 0].tolist()} are not finite.")
    return keys.contiguous()
