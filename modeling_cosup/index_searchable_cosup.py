"""Searching what an index holds: everything or candidates, exactly or approximately, from files or on a device."""

import numpy as np
import torch
from transformers.utils import logging

from .index_search_cosup import (
    ApproximateSearch,
    DeviceSearch,
    ExactSearch,
    add_to_approximate,
    make_approximate,
    nothing,
    recall,
    search_pools,
    search_without,
    set_search_options,
    write_approximate,
)
from .index_store_cosup import (PassageStore)

try:
    import faiss
except ImportError:
    faiss = None  # type: ignore[assignment]

logger = logging.get_logger(__name__)


class SearchableStore(PassageStore):
    """Passages that can be searched: what [`PassageIndex`] is, apart from how it is built and loaded."""

    def __init__(self, shards, config, folder=None):
        self._approximate = self._device = None
        super().__init__(shards, config, folder)

    def _set_shards(self, shards):
        super()._set_shards(shards)
        if self._device is not None:
            self.to(*self._device_options)

    # ------------------------------------------------------------------ searching

    @torch.autocast("cpu", enabled=False)  # in float32 wherever it is called from: under autocast a product of float32 would be half precision
    @torch.autocast("cuda", enabled=False)
    def search(self, query_embeds, k=1, candidates=None):
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
        queries = self._check_queries(query_embeds)
        if k < 1:
            raise ValueError(f"k is {k}, expected at least 1.")
        k = min(k, len(self))
        if len(queries) == 0 or k == 0:
            return nothing(len(queries), k)
        if candidates is None:
            return self._search_all(queries, k)
        pools = self._check_candidates(candidates, len(queries))
        best = nothing(len(queries), k)
        for rows, search in (
            ([i for i, pool in enumerate(pools) if pool is None], lambda part, rows: self._search_all(part, k)),
            ([i for i, pool in enumerate(pools) if pool is not None], lambda part, rows: self._search_pools(part, [pools[i] for i in rows], k)),
        ):
            if rows:
                best[0][rows], best[1][rows] = search(queries[rows], rows)
        return best

    def _search_all(self, queries, k):
        return search_without(self._deleted, self._approximate or self._device or self._exact, queries, k, self.num_rows)

    def _search_pools(self, queries, pools, k):
        return search_pools(self._device or self._exact, queries, pools, k, self._deleted)

    def _check_queries(self, query_embeds):
        queries = torch.as_tensor(query_embeds).detach().float()
        size = self.config["embedding_size"]
        if queries.ndim != 2 or queries.shape[1] != size:
            raise ValueError(f"Queries have {queries.shape[-1]} dimensions, the index has {size}; expected a tensor (N, {size}), found {tuple(queries.shape)}.")
        finite = queries.isfinite().all(1)
        if not finite.all():
            raise ValueError(f"Query embeddings are NaN or infinite in rows {(~finite).nonzero()[:, 0].tolist()[:5]}.")
        return queries.contiguous()

    def _check_candidates(self, candidates, count):
        if len(candidates) != count:
            raise ValueError(f"There are {len(candidates)} lists of candidates for {count} queries.")
        pools = [None if pool is None else np.asarray(pool, np.int64).reshape(-1) for pool in candidates]
        for i, pool in enumerate(pools):
            if pool is not None and len(pool) and (pool.min() < 0 or pool.max() >= self.num_rows):
                wrong = pool[(pool < 0) | (pool >= self.num_rows)]
                raise ValueError(f"candidates[{i}] holds {wrong[:5].tolist()}, which are no rows of this index (0 to {self.num_rows - 1}).")
        return pools

    def to(self, device, dtype=None):
        """
        Search exactly on a device, which gets a copy of all embeddings; `None` searches the files again. An approximate index goes along where FAISS has GPUs.

        Args:
            device (`str`, `torch.device` or `None`): e.g. `"cuda"`.
            dtype (`str`, *optional*): of the copy; defaults to that of the files. Scores are float32.

        Returns:
            [`PassageIndex`]: this one.
        """
        self._device_options = device, dtype
        self._device = None if device is None else DeviceSearch(self._shards, device, dtype)
        if self._approximate is not None and device is not None and torch.device(device).type == "cuda" and faiss.get_num_gpus():
            resources = faiss.StandardGpuResources()
            self._approximate = ApproximateSearch(faiss.index_cpu_to_gpu(resources, torch.device(device).index or 0, self._approximate.index))
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
            `dict[str, float]`: recall against exact search; also logged, and kept in the config.

        Raises:
            `ValueError`: when FAISS refuses the factory string, the size of the sample, or an option.
        """
        if train_size < 1:
            raise ValueError(f"train_size is {train_size}, expected at least 1.")
        rows = np.random.default_rng(seed).choice(self.num_rows, min(train_size, self.num_rows), replace=False, shuffle=False)
        index = make_approximate(index_factory, self._exact, np.sort(rows))
        set_search_options(index, search_options)
        before, self._approximate, self._search_options = self._approximate, ApproximateSearch(index), dict(search_options)
        try:
            config = self._next_config()
            measured = self.measure_recall(queries)
            config["approximate"] = {"index_factory": index_factory, "train_size": len(rows), "seed": seed, "search_options": search_options, **measured}
            if self.folder is not None:
                config["approximate"]["file"] = self._write_file(self.folder, config, "index.faiss", lambda path: write_approximate(index, path))
                self._keep(config)
        except BaseException:
            self._approximate = before
            raise
        self.config = config
        logger.info(f"{index_factory} against exact search: {measured}")
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

    def measure_recall(self, queries=None, k=10, num_queries=200, seed=0):
        """
        How much of what exact search finds, approximate search finds.

        Args:
            queries (`torch.Tensor` of shape `(N, h)`, *optional*): real ones tell most; by default the embeddings of `num_queries` random passages, which are
                easier than real queries.

        Returns:
            `dict[str, float]`: `recall@1` and `recall@k`: mean share of the k exact nearest among the k found.
        """
        if queries is None:
            rows = np.sort(np.random.default_rng(seed).choice(self.num_rows, min(num_queries, self.num_rows), replace=False, shuffle=False))
            queries = self._exact.gather(rows)
        queries, k = self._check_queries(queries), min(k, len(self))
        expected = search_without(self._deleted, self._exact, queries, k, self.num_rows)[1]
        found = self._search_all(queries, k)[1]
        return {f"recall@{n}": recall(found[:, :n], expected[:, :n]) for n in sorted({1, k})}

    def _extend_approximate(self, shards, config):
        """The approximate index with the rows of new shards; read anew, because FAISS cannot add to what is mapped."""
        if self._approximate is None:
            return None
        stored = config["approximate"]
        index = faiss.clone_index(self._approximate.index) if self.folder is None else faiss.read_index(str(self.folder / stored["file"]))
        add_to_approximate(index, ExactSearch(shards), self.num_rows)
        set_search_options(index, self._search_options)
        if self.folder is not None:
            file = self._write_file(self.folder, config, "index.faiss", lambda path: write_approximate(index, path))
            config["approximate"] = {**stored, "file": file}
        return ApproximateSearch(index)

    def _write_files(self, folder):
        config = super()._write_files(folder)
        if self.folder is None and self._approximate is not None:
            file = self._write_file(folder, config, "index.faiss", lambda path: write_approximate(self._approximate.index, path))
            config["approximate"] = {**config["approximate"], "file": file}
        return config
