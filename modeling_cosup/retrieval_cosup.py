"""The passage index: a corpus of any size in Emb_seq's space, built in flat memory, searched exactly or through FAISS."""

import numpy as np
import torch
from tqdm.auto import tqdm
from transformers.utils import logging

from .index_build_cosup import (ShardBuilder, begin, collect, evaluating, finish, read_shards, unfinished_folder, write_new_shard, write_shards)
from .index_files_cosup import (CONFIG_FILE, check_file, check_save_directory, map_shard, put_in_place, sweep, write_json)
from .index_search_cosup import (
    ApproximateSearch,
    DeviceSearch,
    ExactSearch,
    add_to_approximate,
    make_approximate,
    nothing,
    read_approximate,
    recall,
    search_pools,
    search_without,
    set_search_options,
    write_approximate,
)
from .index_store_cosup import (PassageStore, find_folder, map_id_table, new_config)

try:
    import faiss
except ImportError:
    faiss = None  # type: ignore[assignment]
try:
    import pyarrow as pa
except ImportError:
    pa = None

logger = logging.get_logger(__name__)

SHARD_SIZE = 32768  # passages: half a gigabyte at 4,096 dimensions, minutes of work


class PassageIndex(PassageStore):
    """
    A corpus in Emb_seq's space: what `generate(retriever=...)` searches.

    Made by [`PassageIndex.build`] or [`PassageIndex.from_pretrained`]. An index that lives in a folder keeps there what `add`, `delete` and
    `train_approximate` do; one in memory keeps it until it is saved. A passage's row is its place in the corpus, and stays.

    Raises:
        `ImportError`: when faiss or pyarrow is missing.
    """

    def __init__(self, shards, config, folder=None):
        _require_packages()
        self._approximate = self._device = None
        super().__init__(shards, config, folder)

    def _set_shards(self, shards):
        super()._set_shards(shards)
        if self._device is not None:
            self.to(*self._device_options)

    # ------------------------------------------------------------------ building

    @classmethod
    def build(
        cls,
        passages,
        model,
        tokenizer=None,
        save_directory=None,
        batch_size=256,
        max_tokens_per_batch=16384,
        shard_size=SHARD_SIZE,
        dtype="float32",
        num_processes=1,
        process_index=0,
        show_progress_bar=True,
    ):
        """
        Embed a corpus.

        With `save_directory` the index is made there, shard by shard, in the memory of one shard and 8 bytes a passage; after a crash the same call goes
        on at the first shard that is not complete. The folder gets its name when it is whole; an index that stood there stays until then.

        Args:
            passages: `{"id", "title", "text"}` each; `title` may be empty or missing. A list or another iterable, a `datasets` data set, streamed or not, or
                the path of a file: JSON Lines (`.gz`) or Parquet. What can be read twice is checked before anything is embedded, the rest as it streams.
            model ([`CoSupForCausalLM`]): with Emb_seq in memory; it runs where it is, in its dtype.
            tokenizer (`PreTrainedTokenizerBase`, *optional*): Gen's; defaults to the model's own.
            save_directory (`str` or `Path`, *optional*): folder of the index; without it the index is in memory.
            batch_size (`int`): most passages of a forward.
            max_tokens_per_batch (`int`): most tokens of a forward, padding included; the passages of a shard are sorted by length.
            shard_size (`int`): passages of a shard.
            dtype (`str`): of the stored embeddings: `"float32"`, or `"float16"` or `"bfloat16"` in half the space, searched in float32.
            num_processes, process_index (`int`): this process makes the shards `process_index`, `process_index + num_processes`, …, in a `save_directory` that
                all see; then, once all are done, one of them calls [`PassageIndex.merge`].
            show_progress_bar (`bool`): a tqdm bar, of the passages of this process.

        Returns:
            [`PassageIndex`], or `None` with several processes.

        Raises:
            `ValueError`: names the place of a passage with a missing field, an empty text or an id that was there before; a passage whose embedding is not
                finite; or what differs when another model, or other settings, began the unfinished build.
            `OSError`: when the folder cannot be written, or the disk is full.
        """
        _require_packages()
        if save_directory is None and num_processes > 1:
            raise ValueError("Several processes build an index in files: give save_directory.")
        if not 0 <= process_index < num_processes:
            raise ValueError(f"process_index is {process_index}, expected one of 0 to {num_processes - 1}.")
        if tokenizer is not None:
            model.tokenizer = tokenizer
        builder = ShardBuilder(model, dtype, batch_size, max_tokens_per_batch)
        size = model.config.embedding_size
        settings = {"fingerprint": model.fingerprint(), "embedding_size": size, "dtype": dtype, "shard_size": shard_size}
        if save_directory is not None:
            save_directory = check_save_directory(save_directory)
            begin(unfinished_folder(save_directory), settings)
        total, shards = read_shards(passages, shard_size, show_progress_bar and process_index == 0)
        own = None if total is None else sum(min(shard_size, total - start) for start in range(process_index * shard_size, total, num_processes * shard_size))
        bar = tqdm(total=own, desc="Embedding passages", unit=" passages", smoothing=0, disable=not show_progress_bar)
        with bar, evaluating(model):
            if save_directory is None:
                made = [builder.make(shard, bar) for shard in shards]
                return cls(made, new_config(settings, made))
            num_shards = write_shards(unfinished_folder(save_directory), shards, builder, bar, shard_size, num_processes, process_index)
        finish(unfinished_folder(save_directory), num_shards, settings)
        return cls.merge(save_directory) if num_processes == 1 else None

    @classmethod
    def merge(cls, save_directory):
        """
        Make an index of the shards that all processes of a build have finished, and give it its name.

        Returns:
            [`PassageIndex`].

        Raises:
            `FileNotFoundError`: when a process is not done.
            `ValueError`: when an id stands in two shards.
        """
        save_directory = check_save_directory(save_directory)
        folder = unfinished_folder(save_directory)
        settings, shards, files = collect(folder)
        config = new_config(settings, shards, files)
        index = cls(shards, config, folder)
        index._write_id_table(folder, config, shards)
        index._check_ids(map_id_table(folder, config))
        write_json(folder / CONFIG_FILE, config)
        put_in_place(folder, save_directory)
        sweep(save_directory, config)
        return cls.from_pretrained(save_directory, verify=False)

    # ------------------------------------------------------------------ searching

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

    def check_model(self, model):
        """
        Raise unless `model` searches the space that this index holds.

        Raises:
            `ValueError`: names every setting that differs, with both values.
        """
        expected = model.fingerprint()
        different = [name for name in expected if self.fingerprint.get(name) != expected[name]]
        if different:
            lines = [f"  {name}: the index has {_short(self.fingerprint.get(name))}, the model {_short(expected[name])}" for name in different]
            raise ValueError("This index was built by another model; build it again with this one.\n" + "\n".join(lines))

    # ------------------------------------------------------------------ changing

    def add(self, passages, model, batch_size=256, max_tokens_per_batch=16384, shard_size=SHARD_SIZE, show_progress_bar=True):
        """
        Add passages behind the last row; an approximate index is extended, not trained again.

        In a folder this is kept when all are embedded; a process that dies before leaves the index as it was.

        Args: those of [`PassageIndex.build`].

        Raises:
            `ValueError`: as in `build`, for an id that is already in the index, and for a model that did not make it. Then nothing is added.
        """
        self.check_model(model)
        if self.config["approximate"] is not None and self._approximate is None:
            raise ValueError("The approximate index of this folder was not loaded and could not be extended: load it with allow_faiss_files=True.")
        builder = ShardBuilder(model, self.config["dtype"], batch_size, max_tokens_per_batch)
        total, cut = read_shards(passages, shard_size, show_progress_bar, lambda ids: [ids[i] for i in np.flatnonzero(self._find(ids) >= 0)])
        shards, config = list(self._shards), self._next_config()
        try:
            with tqdm(total=total, desc="Embedding passages", unit=" passages", smoothing=0, disable=not show_progress_bar) as bar, evaluating(model):
                for new in cut:
                    if self.folder is None:
                        shards.append(builder.make(new, bar))
                    else:
                        config["files"].update(write_new_shard(self.folder, len(shards), new, builder, bar))
                        shards.append(map_shard(self.folder, len(shards)))
            config["shards"] = [len(shard) for shard in shards]
            approximate = self._extend_approximate(shards, config)
            if self.folder is not None:
                self._write_id_table(self.folder, config, shards)
                self._keep(config)
        except BaseException:
            if self.folder is not None:
                sweep(self.folder, self.config)
            raise
        self.config, self._approximate = config, approximate
        self._id_table = None if self.folder is None else map_id_table(self.folder, config)
        self._set_shards(shards)

    # ------------------------------------------------------------------ files

    def _write_files(self, folder):
        config = super()._write_files(folder)
        if self.folder is None and self._approximate is not None:
            file = self._write_file(folder, config, "index.faiss", lambda path: write_approximate(self._approximate.index, path))
            config["approximate"] = {**config["approximate"], "file": file}
        return config

    @classmethod
    def from_pretrained(cls, name_or_path, revision=None, allow_faiss_files=False, search=None, verify=None, **kwargs):
        """
        Load a saved index: everything is mapped, so that it takes no time and hardly any memory. Nothing is unpickled.

        Args:
            name_or_path (`str` or `Path`): a folder, or a dataset repository on the Hub.
            revision (`str`, *optional*): of the repository.
            allow_faiss_files (`bool`): read the file of an approximate index, by FAISS's own parser: only of a source that you trust.
            search (`str`, *optional*): `"exact"` leaves an approximate index alone.
            verify (`bool`, *optional*): compare the SHA-256 of all files (`True`), of none (`False`), or of those below 16 MB (default). Sizes always are.
            **kwargs: for `huggingface_hub.snapshot_download`.

        Raises:
            `FileNotFoundError`: when the folder is not a complete index.
            `ValueError`: for a format version that this release does not read, a truncated or altered file, or an approximate index that may not be read.
        """
        _require_packages()
        if search not in (None, "exact"):
            raise ValueError(f"search is {search!r}, expected None or 'exact'.")
        folder = find_folder(name_or_path, allow_faiss_files and search is None, revision, **kwargs)
        index = cls._load(folder, verify)
        approximate = index.config["approximate"]
        if approximate is None or search == "exact":
            return index
        if not allow_faiss_files:
            raise ValueError(f"{name_or_path} is searched through a FAISS file: pass allow_faiss_files=True if you trust it, or search='exact'.")
        check_file(folder / approximate["file"], index.config["files"][approximate["file"]], verify)
        index._approximate = ApproximateSearch(read_approximate(folder / approximate["file"], index.num_rows, index.config["embedding_size"]))
        index._search_options = {}
        return index


def _require_packages():
    missing = [pip for module, pip in ((faiss, "faiss-cpu"), (pa, "pyarrow")) if module is None]
    if missing:
        raise ImportError(f"A passage index needs {' and '.join(missing)}: pip install {' '.join(missing)} (on a GPU machine faiss-gpu).")


def _short(value):
    return f"{value[:12]}…" if isinstance(value, str) and len(value) == 64 else repr(value)
