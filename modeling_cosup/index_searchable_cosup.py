"""Searching an index: all passages or candidates, exactly or approximately, from files or on a device."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from transformers.utils import logging

from .folders_cosup import Config
from .index_approximate_cosup import (
    add_to_approximate,
    empty_approximate,
    make_approximate,
    recall,
    set_search_options,
    usual_search_options,
    write_approximate,
)
from .index_files_cosup import Shard
from .index_search_cosup import ApproximateSearch, DeviceSearch, ExactSearch, nothing, search_pools, search_without
from .index_store_cosup import PassageStore
from .retriever_cosup import Rows, SearchResults, array_of_rows

try:
    import faiss
except ImportError:
    faiss = None  # type: ignore[assignment]

logger = logging.get_logger(__name__)

Store = TypeVar("Store", bound="SearchableStore")


class SearchableStore(PassageStore):
    """Passages that can be searched; [`PassageIndex`] adds how they are built and loaded."""

    def __init__(self, shards: list[Shard], config: Config, folder: Path | None = None) -> None:
        self._approximate: ApproximateSearch | None = None  # on the CPU
        self._search_options: dict[str, Any] = {}  # of the approximate index
        self._gpu: ApproximateSearch | None = None  # its copy on a GPU
        self._device: DeviceSearch | None = None
        self._device_options: tuple[Any, Any] = None, None  # last arguments of `to`
        super().__init__(shards, config, folder)

    def _set_shards(self, shards: list[Shard]) -> None:
        super()._set_shards(shards)
        if self._device_options[0] is not None:
            self.to(*self._device_options)

    # ------------------------------------------------------------------ searching

    def search(
        self, query_embeds: torch.Tensor, k: int = 1, candidates: Sequence[Rows | None] | None = None
    ) -> SearchResults:
        """
        Find the nearest passages by inner product: exactly, or approximately after
        [`~PassageIndex.train_approximate`].

        Args:
            query_embeds (`torch.Tensor` of shape `(N, h)`): by the model that built the index; any float dtype and
                device. N may be 0.
            k (`int`, *optional*, defaults to 1): passages per query, at most as many as the index holds.
            candidates (`list`, *optional*): one entry per query. `None` searches the whole index. An int64 array of
                rows searches only these rows, always exactly.

        Returns:
            `(scores, rows)`: `numpy.ndarray` of float32 and int64, both `(N, min(k, len(self)))`, best first, and
            equal scores by row; `index[row]` is a passage. If a query has fewer candidates, the rest is -inf and -1.

        Raises:
            `ValueError`: if queries have the wrong width or are NaN or infinite, candidates are not rows, or k < 1.
        """
        queries = check_queries(query_embeds, self.config["embedding_size"], k)
        # autocast would compute even float32 products in half precision
        with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
            return self._search(queries, min(k, len(self)), candidates)

    def _search(self, queries: torch.Tensor, k: int, candidates: Sequence[Rows | None] | None) -> SearchResults:
        if len(queries) == 0 or k == 0:
            return nothing(len(queries), k)
        if candidates is None:
            return self._search_all(queries, k)
        pools = check_candidates(candidates, len(queries), lambda _: self.num_rows)
        scores, rows = nothing(len(queries), k)
        without_pool = [i for i, pool in enumerate(pools) if pool is None]
        if without_pool:
            scores[without_pool], rows[without_pool] = self._search_all(queries[without_pool], k)
        pools_by_query = {i: pool for i, pool in enumerate(pools) if pool is not None}
        if pools_by_query:
            with_pool = list(pools_by_query)
            scores[with_pool], rows[with_pool] = search_pools(
                self._device or self._exact,
                queries[with_pool],
                list(pools_by_query.values()),
                k,
                self._deleted,
                self.num_rows,
            )
        return scores, rows

    def _search_all(self, queries: torch.Tensor, k: int) -> SearchResults:
        searcher = self._gpu or self._approximate or self._device or self._exact
        return search_without(self._deleted, searcher, queries, k, self.num_rows)

    def to(self: Store, device: str | torch.device | None, dtype: str | torch.dtype | None = None) -> Store:
        """
        Search on a device from now on. What is saved never depends on the device.

        An exact index is copied to the device. An approximate one is copied to a GPU; its candidates, which are always
        searched exactly, are then read from the files.

        Args:
            device (`str`, `torch.device` or `None`): e.g. `"cuda"`; `None` searches from the files again.
            dtype (`str` or `torch.dtype`, *optional*): of the copy; defaults to the files'. Scores are float32.

        Returns:
            [`PassageIndex`]: this one.

        Raises:
            `ValueError`: if FAISS has no GPU support, or no GPU version of the approximate index (e.g. of HNSW); for
                an unknown dtype, embeddings that are not finite or overflow it, or a dtype for an approximate index.
                Then nothing changes.
        """
        if dtype is not None and self._approximate is not None:
            raise ValueError(
                f"dtype {dtype!r} is for a copy of the embeddings, and an approximate index makes none; load with"
                " search='exact' to search exactly on a device."
            )
        copy = gpu = None
        if device is not None:
            if self._approximate is None:
                copy = DeviceSearch(self._shards, device, dtype)
            elif torch.device(device).type == "cuda":
                gpu = self._approximate.on_gpu(torch.device(device).index or 0)
        self._device, self._gpu, self._device_options = copy, gpu, (device, dtype)
        return self

    # ------------------------------------------------------------------ approximate search

    def train_approximate(
        self,
        index_factory: str,
        train_size: int = 65536,
        seed: int = 0,
        queries: torch.Tensor | None = None,
        **search_options: Any,
    ) -> dict[str, float]:
        """
        Search through a FAISS index from now on: trained on a sample of all shards, filled shard by shard, and saved
        in the folder.

        Args:
            index_factory (`str`): for `faiss.index_factory`. `"HNSW32"` holds a copy of all embeddings in memory;
                `"IVF1024,Flat"` does too, until it is loaded again and mapped; `"OPQ16_64,IVF1024,PQ16"` is small.
            train_size (`int`, *optional*, defaults to 65536): number of embeddings in the sample, which is held in
                memory in float32. IVF needs at least 39 for each list.
            seed (`int`, *optional*, defaults to 0): seed of the sample.
            queries (`torch.Tensor` of shape `(N, h)`, *optional*): for the recall, see
                [`~PassageIndex.measure_recall`].
            **search_options: see [`~PassageIndex.set_search_options`].

        Returns:
            `dict[str, float]`: the result of `measure_recall`, which is also logged, and saved in the config. Call
            `to` again to search on a device.

        Raises:
            `ValueError`: if FAISS refuses the factory string, the size of the sample or an option, all passages were
                deleted, or `queries` cannot be compared. Then nothing is trained.
        """
        if queries is not None:
            queries = self._check_recall_queries(queries)
        with self._changing():
            self._check_not_empty()
            train_size = min(train_size, self.num_rows)
            empty_approximate(index_factory, self.config["embedding_size"], train_size, **search_options)
            rows = np.random.default_rng(seed).choice(self.num_rows, train_size, replace=False, shuffle=False)
            index = make_approximate(index_factory, self._exact, np.sort(rows))
            set_search_options(index, search_options)
            search_options = {**usual_search_options(index), **search_options}  # FAISS's defaults too, to go back to
            facts = {"index_factory": index_factory, "train_size": len(rows), "seed": seed}
            return self._use_approximate(index, {**facts, "search_options": search_options}, queries)

    def _use_approximate(
        self, index: "faiss.Index", facts: dict[str, Any], queries: torch.Tensor | None
    ) -> dict[str, float]:
        """Search through a FAISS index, measure its recall and save it; if that fails, search as before."""
        before = self._approximate, self._search_options, self._device, self._gpu
        self._approximate, self._device, self._gpu = ApproximateSearch(index), None, None
        self._search_options = dict(facts["search_options"])
        try:
            config = self._next_config()
            recalls = self.measure_recall(queries)
            config["approximate"] = {**facts, **recalls}
            if self.folder is not None:
                config["approximate"]["file"] = self._write_approximate(self.folder, config, index)
                self._commit(self.folder, config)
        except BaseException:
            self._approximate, self._search_options, self._device, self._gpu = before
            raise
        self.config, self._device_options = config, (None, None)
        # a warning, because transformers does not show lower levels by default
        logger.warning(f"{facts['index_factory']} against exact search: {recalls}")
        return recalls

    def _write_approximate(self, folder: Path, config: Config, index: "faiss.Index") -> str:
        """Write a FAISS index with the options of its training, list its file in the config, and return its name."""
        set_search_options(index, config["approximate"]["search_options"])
        try:
            return self._write_file(folder, config, "index.faiss", lambda path: write_approximate(index, path))
        finally:
            set_search_options(index, self._search_options)

    def set_search_options(self, **options: Any) -> None:
        """
        Trade speed for recall, until the index is loaded again: a saved index keeps the options of its training.

        Args:
            **options: `nprobe` (lists that IVF searches), `efSearch` (for HNSW), `quantizer_efSearch`, …

        Raises:
            `ValueError`: if no approximate index was trained, or for an option that its kind does not have.
        """
        index = self._require_approximate().index
        made = self.config["approximate"]
        # a wrong option must not leave the ones before it set
        empty_approximate(made["index_factory"], self.config["embedding_size"], made["train_size"], **options)
        set_search_options(index, options)
        self._search_options.update(options)
        if self._gpu is not None:
            self.to(*self._device_options)

    def measure_recall(
        self, queries: torch.Tensor | None = None, k: int = 10, num_queries: int = 200, seed: int = 0
    ) -> dict[str, float]:
        """
        Compare approximate with exact search.

        Args:
            queries (`torch.Tensor` of shape `(N, h)`, *optional*): preferably real ones. By default the embeddings of
                `num_queries` random passages, which are easier than real queries.
            k (`int`, *optional*, defaults to 10): passages per query.
            num_queries (`int`, *optional*, defaults to 200): number of random passages.
            seed (`int`, *optional*, defaults to 0): seed of the random passages.

        Returns:
            `dict[str, float]`: `ann_recall@1` and `ann_recall@k`: mean share of the exact k nearest that were found.

        Raises:
            `ValueError`: if no approximate index was trained, all passages were deleted, or there is no query.
        """
        self._require_approximate()
        self._check_not_empty()
        if queries is None:
            num_queries = min(num_queries, self.num_rows)
            rows = np.random.default_rng(seed).choice(self.num_rows, num_queries, replace=False, shuffle=False)
            queries = self._exact.gather(np.sort(rows))
        queries = self._check_recall_queries(queries, k)
        k = min(k, len(self))
        _, expected = search_without(self._deleted, self._exact, queries, k, self.num_rows)
        _, found = self._search_all(queries, k)
        return {f"ann_recall@{n}": recall(found[:, :n], expected[:, :n]) for n in sorted({1, k})}

    def _check_recall_queries(self, queries: torch.Tensor, k: int = 1) -> torch.Tensor:
        """Return queries as [`check_queries`]; `ValueError` also if there are none."""
        queries = check_queries(queries, self.config["embedding_size"], k)
        if not len(queries):
            raise ValueError("There is no query to measure the recall with: give at least one.")
        return queries

    def _require_approximate(self) -> ApproximateSearch:
        """Return the approximate index; `ValueError` if none was trained."""
        if self._approximate is None:
            raise ValueError("This index is searched exactly: call train_approximate first.")
        return self._approximate

    def _check_not_empty(self) -> None:
        if not len(self):
            raise ValueError("All passages of this index were deleted: there is nothing to search approximately.")

    def _extend_approximate(self, shards: list[Shard], config: Config) -> ApproximateSearch | None:
        """Return a copy of the approximate index that includes new shards; the config loses the recall."""
        if self._approximate is None:
            return None
        stored = config["approximate"]
        if self.folder is None:
            index = faiss.clone_index(self._approximate.index)
        else:
            index = faiss.read_index(str(self.folder / stored["file"]))  # not mapped, so that FAISS can add to it
        add_to_approximate(index, ExactSearch(shards), self.num_rows)
        config["approximate"] = {name: value for name, value in stored.items() if not name.startswith("ann_recall@")}
        if self.folder is not None:
            config["approximate"]["file"] = self._write_approximate(self.folder, config, index)
        return ApproximateSearch(index)

    def _write_from_memory(self, folder: Path) -> Config:
        config = super()._write_from_memory(folder)
        if self._approximate is not None:
            file = self._write_approximate(folder, config, self._approximate.index)
            config["approximate"] = {**config["approximate"], "file": file}
        return config


def check_queries(query_embeds: torch.Tensor, size: int, k: int) -> torch.Tensor:
    """
    Return queries as a contiguous float32 tensor `(N, h)`.

    Args:
        query_embeds (`torch.Tensor` of shape `(N, h)`): any float dtype and device.
        size (`int`): h of the index.
        k (`int`): passages per query.

    Raises:
        `TypeError`: for texts.
        `ValueError`: for the wrong shape, values that are NaN or infinite, or a k below 1.
    """
    if isinstance(query_embeds, str) or (isinstance(query_embeds, list) and str in map(type, query_embeds)):
        raise TypeError("A search takes query embeddings, not texts: index.search(model.embed_questions(texts), k=5).")
    queries = torch.as_tensor(query_embeds).detach().float()
    if queries.ndim != 2 or queries.shape[1] != size:
        raise ValueError(
            f"Queries have {queries.shape[-1]} dimensions, the index has {size}; expected a tensor (N, {size}), found"
            f" {tuple(queries.shape)}."
        )
    if k < 1:
        raise ValueError(f"k is {k}, expected at least 1.")
    finite = queries.isfinite().all(1)
    if not finite.all():
        raise ValueError(f"Query embeddings are NaN or infinite in rows {(~finite).nonzero()[:, 0].tolist()[:5]}.")
    return queries.contiguous()


def check_candidates(
    candidates: Sequence[Rows | None], count: int, count_rows: Callable[[int], int]
) -> list[NDArray[np.int64] | None]:
    """
    Return candidates as int64 arrays; queries whose candidates are the same object get the same array.

    Args:
        candidates (`list`): for each query, rows of the index or `None`.
        count (`int`): number of queries.
        count_rows (`Callable`): given the largest row of a pool, returns how many rows the index has.

    Returns:
        `list` of `numpy.ndarray` of int64 or `None`.

    Raises:
        `ValueError`: if there are not `count` pools, or for a pool that holds anything but integers (such as a mask),
            or rows that the index does not have.
    """
    if len(candidates) != count:
        raise ValueError(f"There are {len(candidates)} lists of candidates for {count} queries.")
    candidates = list(candidates)  # keeps the rows of a 2-D array alive, so that no two have the same id()
    arrays: dict[int, NDArray[np.int64]] = {}
    pools: list[NDArray[np.int64] | None] = []
    for i, pool in enumerate(candidates):
        if pool is None:
            pools.append(None)
            continue
        if id(pool) not in arrays:
            arrays[id(pool)] = _check_pool(pool, f"candidates[{i}]", count_rows)
        pools.append(arrays[id(pool)])
    return pools


def _check_pool(pool: Rows, name: str, count_rows: Callable[[int], int]) -> NDArray[np.int64]:
    pool = array_of_rows(pool, name)
    if not len(pool):
        return pool
    num_rows = count_rows(int(pool.max()))
    if pool.min() < 0 or pool.max() >= num_rows:
        wrong = pool[(pool < 0) | (pool >= num_rows)]
        raise ValueError(f"{name} holds {wrong[:5].tolist()}, which are not rows of this index (0 to {num_rows - 1}).")
    return pool
