"""Searching what an index holds: everything or candidates, exactly or approximately, from files or on a device."""

from collections.abc import Sequence

import numpy as np
import torch
from transformers.utils import logging

from .index_search_cosup import (
    ApproximateSearch,
    DeviceSearch,
    ExactSearch,
    add_to_approximate,
    empty_approximate,
    make_approximate,
    nothing,
    recall,
    search_pools,
    search_without,
    set_search_options,
    write_approximate,
)
from .index_store_cosup import PassageStore
from .retriever_cosup import Rows, SearchResults

try:
    import faiss
except ImportError:
    faiss = None  # type: ignore[assignment]

logger = logging.get_logger(__name__)


class SearchableStore(PassageStore):
    """Passages that can be searched: what [`PassageIndex`] is, apart from how it is built and loaded."""

    def __init__(self, shards, config, folder=None):
        self._approximate = self._device = self._gpu = (
            None  # the approximate index stays on the CPU; `_gpu` is a copy of it
        )
        self._device_options = None, None
        super().__init__(shards, config, folder)

    def _set_shards(self, shards):
        super()._set_shards(shards)
        if self._device_options[0] is not None:
            self.to(*self._device_options)

    # ------------------------------------------------------------------ searching

    def search(
        self, query_embeds: torch.Tensor, k: int = 1, candidates: Sequence[Rows | None] | None = None
    ) -> SearchResults:
        """
        The nearest passages by inner product: exactly, or approximately after [`~PassageIndex.train_approximate`].

        Args:
            query_embeds (`torch.Tensor` of shape `(N, h)`): of the model that built the index; any float dtype and device. N may be 0.
            k (`int`): passages per query, at most as many as the index holds.
            candidates (`list`, *optional*): for each query `None`, to search everything, or an int64 array of rows, to search these, always exactly.

        Returns:
            `(scores, rows)`: `numpy.ndarray` of float32 and int64, both `(N, min(k, len(self)))`, best first; `index[row]` is a passage. Where fewer
            candidates were found, -inf and -1 at the end.

        Raises:
            `ValueError`: for queries of another width, or that are NaN or infinite; for candidates that are no rows; for a k below 1.
        """
        # in float32 wherever it is called from: under autocast a product of float32 would be half precision
        with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
            return self._search(
                check_queries(query_embeds, self.config["embedding_size"], k), min(k, len(self)), candidates
            )

    def _search(self, queries, k, candidates):
        if len(queries) == 0 or k == 0:
            return nothing(len(queries), k)
        if candidates is None:
            return self._search_all(queries, k)
        pools = check_candidates(candidates, len(queries), lambda _: self.num_rows)
        best = nothing(len(queries), k)
        for rows, search in (
            ([i for i, pool in enumerate(pools) if pool is None], lambda part, rows: self._search_all(part, k)),
            (
                [i for i, pool in enumerate(pools) if pool is not None],
                lambda part, rows: self._search_pools(part, [pools[i] for i in rows], k),
            ),
        ):
            if rows:
                best[0][rows], best[1][rows] = search(queries[rows], rows)
        return best

    def _search_all(self, queries, k):
        return search_without(
            self._deleted, self._gpu or self._approximate or self._device or self._exact, queries, k, self.num_rows
        )

    def _search_pools(self, queries, pools, k):
        return search_pools(self._device or self._exact, queries, pools, k, self._deleted, self.num_rows)

    def to(self, device, dtype=None):
        """
        Search on a device: exactly, in a copy of all embeddings, or where an approximate index was trained, in a copy of that, on a GPU. Candidates are then
        searched from the files, as always exactly. `None` searches everything from the files again; what is saved never depends on the device.

        Args:
            device (`str`, `torch.device` or `None`): e.g. `"cuda"`.
            dtype (`str`, *optional*): of a copy of the embeddings; defaults to that of the files. Scores are float32.

        Returns:
            [`PassageIndex`]: this one.

        Raises:
            `ValueError`: when the approximate index has no GPU form (HNSW has none), or FAISS has no GPUs. Then nothing changes.
        """
        copy = gpu = None
        if device is not None and self._approximate is None:
            copy = DeviceSearch(self._shards, device, dtype)
        elif device is not None and torch.device(device).type == "cuda":
            gpu = self._approximate.on_gpu(torch.device(device).index or 0)
        self._device, self._gpu, self._device_options = copy, gpu, (device, dtype)
        return self

    # ------------------------------------------------------------------ approximate search

    def train_approximate(self, index_factory, train_size=65536, seed=0, queries=None, **search_options):
        """
        Search approximately from now on, through a FAISS index: trained on a sample of all shards, filled shard by shard, kept in the folder.

        Args:
            index_factory (`str`): of `faiss.index_factory`. `"HNSW32"` keeps a copy of all embeddings in memory, as `"IVF1024,Flat"` does until it is loaded
                again, mapped; `"OPQ16_64,IVF1024,PQ16"` is small.
            train_size (`int`): embeddings of the sample, in float32 in memory. IVF wants at least 39 for each list.
            seed (`int`): of the sample.
            queries (`torch.Tensor` of shape `(N, h)`, *optional*): for the recall, see [`~PassageIndex.measure_recall`].
            **search_options: see [`~PassageIndex.set_search_options`].

        Returns:
            `dict[str, float]`: what `measure_recall` returns; also logged, and kept in the config. A device that was searched on is left: call `to` again.

        Raises:
            `ValueError`: when FAISS refuses the factory string, the size of the sample, or an option, and when all passages were deleted.
        """
        self._require_passages()
        train_size = min(train_size, self.num_rows)
        empty_approximate(index_factory, self.config["embedding_size"], train_size, **search_options)
        rows = np.random.default_rng(seed).choice(self.num_rows, train_size, replace=False, shuffle=False)
        index = make_approximate(index_factory, self._exact, np.sort(rows))
        set_search_options(index, search_options)
        before, self._approximate, self._search_options = (
            self._approximate,
            ApproximateSearch(index),
            dict(search_options),
        )
        device, gpu, self._device, self._gpu = self._device, self._gpu, None, None
        try:
            config = self._next_config()
            measured = self.measure_recall(queries)
            config["approximate"] = {
                "index_factory": index_factory,
                "train_size": len(rows),
                "seed": seed,
                "search_options": search_options,
                **measured,
            }
            if self.folder is not None:
                config["approximate"]["file"] = self._write_file(
                    self.folder, config, "index.faiss", lambda path: write_approximate(index, path)
                )
                self._keep(config)
        except BaseException:
            self._approximate, self._device, self._gpu = before, device, gpu
            raise
        self.config, self._device_options = config, (None, None)
        logger.warning(  # transformers shows no less
            f"{index_factory} against exact search: {measured}"
        )
        return measured

    def set_search_options(self, **options):
        """
        Trade speed for recall, until the index is loaded again: `nprobe` (lists that IVF looks into), `efSearch` (HNSW), `quantizer_efSearch`, …

        Raises:
            `ValueError`: when nothing was trained, or for an option that this kind of index does not have.
        """
        if self._approximate is None:
            raise ValueError("This index is searched exactly: call train_approximate first.")
        set_search_options(self._approximate.index, options)
        self._search_options.update(options)
        if self._gpu is not None:
            self.to(*self._device_options)

    def measure_recall(self, queries=None, k=10, num_queries=200, seed=0):
        """
        How much of what exact search finds, approximate search finds.

        Args:
            queries (`torch.Tensor` of shape `(N, h)`, *optional*): real ones tell most; by default the embeddings of `num_queries` random passages, which are
                easier than real queries.

        Returns:
            `dict[str, float]`: `ann_recall@1` and `ann_recall@k`: mean share of the k exact nearest among the k found.

        Raises:
            `ValueError`: when all passages were deleted.
        """
        self._require_passages()
        if queries is None:
            rows = np.sort(
                np.random.default_rng(seed).choice(
                    self.num_rows, min(num_queries, self.num_rows), replace=False, shuffle=False
                )
            )
            queries = self._exact.gather(rows)
        queries, k = check_queries(queries, self.config["embedding_size"], k), min(k, len(self))
        expected = search_without(self._deleted, self._exact, queries, k, self.num_rows)[1]
        found = self._search_all(queries, k)[1]
        return {f"ann_recall@{n}": recall(found[:, :n], expected[:, :n]) for n in sorted({1, k})}

    def _require_passages(self):
        if not len(self):
            raise ValueError("All passages of this index were deleted: there is nothing to search approximately.")

    def _extend_approximate(self, shards, config):
        """The approximate index with the rows of new shards; read anew, because FAISS cannot add to what is mapped."""
        if self._approximate is None:
            return None
        stored = config["approximate"]
        index = (
            faiss.clone_index(self._approximate.index)
            if self.folder is None
            else faiss.read_index(str(self.folder / stored["file"]))
        )
        add_to_approximate(index, ExactSearch(shards), self.num_rows)
        set_search_options(index, self._search_options)
        if self.folder is not None:
            file = self._write_file(self.folder, config, "index.faiss", lambda path: write_approximate(index, path))
            config["approximate"] = {**stored, "file": file}
        return ApproximateSearch(index)

    def _write_files(self, folder):
        config = super()._write_files(folder)
        if self.folder is None and self._approximate is not None:
            file = self._write_file(
                folder, config, "index.faiss", lambda path: write_approximate(self._approximate.index, path)
            )
            config["approximate"] = {**config["approximate"], "file": file}
        return config


def check_queries(query_embeds, size, k):
    """
    Queries as a contiguous float32 tensor `(N, h)`.

    Args:
        query_embeds (`torch.Tensor` of shape `(N, h)`): any float dtype and device.
        size (`int`): h of the index.
        k (`int`): passages per query.

    Raises:
        `ValueError`: for another shape, values that are NaN or infinite, or a k below 1.
    """
    queries = torch.as_tensor(query_embeds).detach().float()
    if queries.ndim != 2 or queries.shape[1] != size:
        raise ValueError(
            f"Queries have {queries.shape[-1]} dimensions, the index has {size}; expected a tensor (N, {size}), found {tuple(queries.shape)}."
        )
    if k < 1:
        raise ValueError(f"k is {k}, expected at least 1.")
    finite = queries.isfinite().all(1)
    if not finite.all():
        raise ValueError(f"Query embeddings are NaN or infinite in rows {(~finite).nonzero()[:, 0].tolist()[:5]}.")
    return queries.contiguous()


def check_candidates(candidates, count, count_rows):
    """
    Candidates as int64 arrays: one array for all queries that name the same object.

    Args:
        candidates (`list`): for each query rows of the index or `None`.
        count (`int`): of queries.
        count_rows (callable): given the largest row of a pool, how many rows the index has.

    Returns:
        `list` of `numpy.ndarray` of int64 or `None`.

    Raises:
        `ValueError`: for another number of pools, a pool that is not of integers, as a mask is not, or rows that the index does not have.
    """
    if len(candidates) != count:
        raise ValueError(f"There are {len(candidates)} lists of candidates for {count} queries.")
    pools, candidates = {}, list(candidates)  # which holds the rows of a 2-D array, so that no two have the same id()
    for i, pool in enumerate(candidates):
        if pool is not None and id(pool) not in pools:
            pools[id(pool)] = _check_pool(np.asarray(pool), f"candidates[{i}]", count_rows)
    return [None if pool is None else pools[id(pool)] for pool in candidates]


def _check_pool(pool, name, count_rows):
    if not pool.size:
        return np.empty(0, np.int64)
    if pool.dtype.kind not in "iu":
        raise ValueError(
            f"{name} is of {pool.dtype}, expected integers: rows of the index (np.flatnonzero(mask) of a mask)."
        )
    pool = pool.reshape(-1)
    num_rows = count_rows(int(pool.max()))
    if pool.min() < 0 or pool.max() >= num_rows:
        wrong = pool[(pool < 0) | (pool >= num_rows)]
        raise ValueError(f"{name} holds {wrong[:5].tolist()}, which are no rows of this index (0 to {num_rows - 1}).")
    return np.ascontiguousarray(pool, np.int64)
