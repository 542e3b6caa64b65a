"""A passage index in Milvus: what `generate(retriever=...)` searches when the corpus outgrows one machine."""

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from transformers.utils import logging

from .index_search_cosup import merge, nothing
from .index_searchable_cosup import check_candidates, check_queries
from .milvus_client_cosup import MAX_REQUEST_BYTES, MAX_REQUEST_ROWS, MilvusConnection
from .milvus_upload_cosup import (
    check_can_be_searched,
    check_sizes,
    count_passages,
    finish_upload,
    passage_of,
    prepare_upload,
    read_properties,
    set_properties,
    upload,
)
from .retrieval_cosup import PassageIndex
from .retriever_cosup import CoSupModel, Rows, SearchResults, array_of_rows, check_fingerprint, list_of_ids

logger = logging.get_logger(__name__)

MAX_RESULTS = 16_384  # passages per query, the limit of a Milvus server
LARGE_POOL = 512  # candidates: with more, a filtered search was faster than fetching them, at 100,000 passages
MAX_FILTER_ROWS = 65_536

Pools: TypeAlias = dict[int, NDArray[np.int64]]  # candidates by the number of the query that has them


class MilvusPassageIndex:
    """
    A passage index in a Milvus collection: a [`Retriever`] that, like [`PassageIndex`], also returns embeddings, and
    adds and deletes passages.

    The collection holds passages, token ids, embeddings and the fingerprint of the model that made them. Up to 512
    candidates of a query are fetched and scored here: Milvus takes one filter per request, and each filter costs a
    scan.

    This process sees its own writes immediately, and everything that was written before it opened the index. It sees
    later writes of other processes within seconds. Only one process may write at a time.

    Args:
        uri (`str`): `"http://host:19530"` (or `https://`; with `/database` at the end for another database than
            the default), or for a small index a local file that ends in `.db`, which one process at a time may open.
        collection (`str`): name or alias of the collection.
        token (`str`, *optional*): `"user:password"` or an API key; defaults to the environment variable
            `MILVUS_TOKEN`.
        timeout (`float`, *optional*, defaults to 60): seconds that one request may take.
        max_retries (`int`, *optional*, defaults to 5): how many times a request is sent again if the server does not
            answer, or not yet, after 0.5, 1, 2, ... seconds, and 10 or more if it has had too many requests. By
            default, this takes at least 15 seconds.
        search_params (`dict`, *optional*): parameters of the collection's index type, e.g. `{"ef": 128}` for HNSW.
        search (`str`, *optional*): `"exact"` refuses a collection with an approximate index type.

    Raises:
        `ImportError`: if pymilvus is missing.
        `FileNotFoundError`: if there is no such file.
        `ValueError`: if there is no such collection (names the existing ones), or it is not a complete passage index,
            or with `search="exact"` not an exact one.
        `ConnectionError`: here and in every method, if the server does not answer.
    """

    fingerprint: dict[str, Any]  # settings of the model that made the embeddings

    def __init__(
        self,
        uri: str | os.PathLike[str],
        collection: str,
        token: str | None = None,
        timeout: float = 60.0,
        max_retries: int = 5,
        search_params: dict[str, Any] | None = None,
        search: str | None = None,
    ) -> None:
        if search not in (None, "exact"):
            raise ValueError(f"search is {search!r}, expected None or 'exact'.")
        self._milvus = MilvusConnection(uri, collection, token, timeout, max_retries)
        self.search_params = dict(search_params or {})
        if self._milvus.is_file and not Path(self._milvus.uri).exists():
            raise FileNotFoundError(
                f"There is no Milvus file {self._milvus.uri}; MilvusPassageIndex.from_index makes one."
            )
        try:
            self._open(exact=search == "exact")
        except BaseException:
            self.close()
            raise

    def _open(self, exact: bool) -> None:
        """Read the properties of the collection, and load it into the server's memory."""
        if not self._milvus.call("has_collection", "looking for the collection"):
            names = self._milvus.call("list_collections", "listing the collections", name_collection=False)
            raise ValueError(f"{self._milvus}: there is no such collection, only {sorted(names)}.")
        self._read_properties()
        check_can_be_searched(self._milvus, self._properties, exact)
        self.fingerprint = json.loads(self._properties["cosup.fingerprint"])
        self._milvus.call("load_collection", "loading the collection")
        self._size = count_passages(self._milvus)
        if self._properties["cosup.adding"]:
            state = "passages are being added, or an add() was interrupted; the next add() removes what it left."
            logger.warning(f"{self._milvus}: {state}")

    def _read_properties(self) -> None:
        self._properties, self.embedding_size, self._fields = read_properties(self._milvus)

    def close(self) -> None:
        """Close the connection; another process can then open a local file."""
        self._milvus.close()

    # ------------------------------------------------------------------ upload

    @classmethod
    def from_index(
        cls,
        index: PassageIndex,
        uri: str | os.PathLike[str],
        collection: str,
        index_type: str = "FLAT",
        index_params: dict[str, Any] | None = None,
        batch_size: int = 1000,
        overwrite: bool = False,
        show_progress_bar: bool = True,
        token: str | None = None,
        timeout: float = 60.0,
        max_retries: int = 5,
        search_params: dict[str, Any] | None = None,
    ) -> "MilvusPassageIndex":
        """
        Upload an index to a new collection, which is searched by inner product, and open it.

        The upload is done in batches. If it is interrupted, the same call resumes it; until it is complete, the
        collection cannot be opened.

        Args:
            index ([`PassageIndex`]): the index to upload; rows keep their numbers.
            uri, collection, token, timeout, max_retries, search_params: see [`MilvusPassageIndex`]. A missing local
                file is created.
            index_type (`str`, *optional*, defaults to `"FLAT"`): exact, or an approximate type that the server has,
                e.g. `"HNSW"`.
            index_params (`dict`, *optional*): parameters of the index type, e.g. `{"M": 32, "efConstruction": 200}`.
            batch_size (`int`, *optional*, defaults to 1000): passages per request, at most 4,096; fewer if their
                embeddings would exceed 16 MiB.
            overwrite (`bool`, *optional*, defaults to `False`): first drop any collection of that name. To replace one
                that is in use, upload under another name and move an alias.
            show_progress_bar (`bool`, *optional*, defaults to `True`): show a tqdm bar.

        Returns:
            [`MilvusPassageIndex`].

        Raises:
            `FileExistsError`: if the collection exists and is not an unfinished upload of this index.
            `ValueError`: names a passage that Milvus cannot hold: a title, text or id above 65,535 bytes, or more than
                4,096 token ids.
        """
        connection = MilvusConnection(uri, collection, token, timeout, max_retries)
        check_sizes(index)
        if connection.is_file:
            Path(connection.uri).parent.mkdir(parents=True, exist_ok=True)
        try:
            skip = prepare_upload(connection, index, index_type, index_params or {}, overwrite)
            upload(connection, index, skip, batch_size=batch_size, show_progress_bar=show_progress_bar)
            finish_upload(connection, index)
            return cls(uri, collection, token, timeout, max_retries, search_params)
        finally:
            connection.close()

    # ------------------------------------------------------------------ search

    def search(
        self, query_embeds: torch.Tensor, k: int = 1, candidates: Sequence[Rows | None] | None = None
    ) -> SearchResults:
        """
        Find the nearest passages by inner product: exactly with the index type `"FLAT"` and among candidates.

        For arguments and results see [`Retriever.search`]. k is at most 16,384 if a query has no candidates.

        Raises:
            `ValueError`: if queries have the wrong width or are not finite, candidates are not rows, or k is too small
                or too large.
        """
        queries = check_queries(query_embeds, self.embedding_size, k).cpu().numpy()
        if candidates is None:
            candidates = [None] * len(queries)
        pools = check_candidates(candidates, len(queries), self._count_rows)
        if k > self._size:  # another process may have added passages
            self._size = count_passages(self._milvus)
        k = min(k, self._size)
        scores, rows = nothing(len(queries), k)
        if k == 0:
            return scores, rows
        without_pool = [i for i, pool in enumerate(pools) if pool is None]
        if without_pool:
            scores[without_pool], rows[without_pool] = self._search_all(queries[without_pool], k)
        pools_by_query = {i: np.unique(pool) for i, pool in enumerate(pools) if pool is not None}
        self._search_pools(queries, pools_by_query, (scores, rows))
        return scores, rows

    def _count_rows(self, row: int) -> int:
        """Return the number of rows, read again if `row` is unknown: another process may have added passages."""
        if row >= self.num_rows:
            self._read_properties()
        return self.num_rows

    def _search_all(self, queries: NDArray[np.float32], k: int) -> SearchResults:
        """Search the whole index, in requests that a server accepts."""
        if k > MAX_RESULTS:
            limit = f"a Milvus server returns at most {MAX_RESULTS} passages a query"
            raise ValueError(f"k is {k}, but {limit}; use candidates or a PassageIndex.")
        per_request = max(1, min(MAX_REQUEST_ROWS, MAX_REQUEST_BYTES // (4 * queries.shape[1]), 2**20 // k))
        scores, rows = nothing(len(queries), k)
        for start in range(0, len(queries), per_request):
            part = slice(start, start + per_request)
            scores[part], rows[part] = self._milvus.search(queries[part], k, self.search_params)
        return scores, rows

    def _search_pools(self, queries: NDArray[np.float32], pools: Pools, results: SearchResults) -> None:
        """Search the pool of each query, and write scores and rows to `results`, both `(N, k)`."""
        scores, rows = results
        k = scores.shape[1]
        # with a filter, an approximate index would miss candidates
        can_filter = self._properties["cosup.index_type"] == "FLAT" and k <= MAX_RESULTS
        small_pools = {}
        for i, pool in pools.items():
            if can_filter and len(pool) > LARGE_POOL:
                scores[i], rows[i] = self._search_large_pool(queries[i : i + 1], pool, k)
            elif len(pool):
                small_pools[i] = pool
        if small_pools:
            self._search_small_pools(queries, small_pools, results)

    def _search_large_pool(self, query: NDArray[np.float32], pool: NDArray[np.int64], k: int) -> SearchResults:
        """Return `(scores, rows)` of one query, both `(k,)`, by requests with filters; each costs a scan."""
        best = nothing(1, 0)
        for start in range(0, len(pool), MAX_FILTER_ROWS):
            part = pool[start : start + MAX_FILTER_ROWS].tolist()
            best = merge(best, self._milvus.search(query, k, self.search_params, f"row in {part}"), k)
        scores, rows = best
        return scores[0], rows[0]

    def _search_small_pools(self, queries: NDArray[np.float32], pools: Pools, results: SearchResults) -> None:
        """Fetch the embeddings of all pools, each once, and score them in this process."""
        scores, rows = results
        wanted = np.unique(np.concatenate(list(pools.values())))
        live_rows, embeddings = self._milvus.fetch_embeddings(wanted, self.embedding_size)
        for i, pool in pools.items():
            pool = pool[np.isin(pool, live_rows)]
            pool_scores = embeddings[np.searchsorted(live_rows, pool)] @ queries[i]
            best = np.argsort(-pool_scores, kind="stable")[: scores.shape[1]]
            scores[i, : len(best)] = pool_scores[best]
            rows[i, : len(best)] = pool[best]

    # ------------------------------------------------------------------ passages

    def get_passages(self, rows: Rows) -> list[dict[str, Any]]:
        """
        Return the passages of rows, `list` of `{"id", "title", "text", "input_ids"}`, in the given order; a passage
        with metadata also has `"metadata"`.

        One request reads up to 4,096 passages.

        Raises:
            `IndexError`: names rows that hold no passage.
        """
        rows = array_of_rows(rows).tolist()
        passages = {}
        for hit in self._milvus.query_rows(sorted(set(rows)), ["row", *self._fields], MAX_REQUEST_ROWS):
            passages[hit["row"]] = passage_of(hit)
        missing = sorted(set(rows) - set(passages))
        if missing:
            raise IndexError(f"The index holds no passage in {_some(missing, 'row')}.")
        return [dict(passages[row]) for row in rows]

    def get_embeddings(self, rows: Rows) -> NDArray[np.float32]:
        """
        Return the passage embeddings of rows, `numpy.ndarray` of float32 `(len(rows), h)`.

        Raises:
            `IndexError`: names rows that hold no passage.
        """
        rows = array_of_rows(rows)
        live_rows, embeddings = self._milvus.fetch_embeddings(np.unique(rows), self.embedding_size)
        missing = np.setdiff1d(rows, live_rows).tolist()
        if missing:
            raise IndexError(f"The index holds no passage in {_some(missing, 'row')}.")
        return embeddings[np.searchsorted(live_rows, rows)]

    def __len__(self) -> int:
        """Number of passages, as last counted: when the index was opened or changed here, or by a search for more."""
        return self._size

    @property
    def num_rows(self) -> int:
        """Number of rows, including rows of deleted passages."""
        return int(self._properties["cosup.next_row"])

    def live_rows(self) -> NDArray[np.int64]:
        """
        Return all rows that hold a passage, `numpy.ndarray` of int64, in ascending order.

        If passages were deleted, this takes a request for every 4,096 rows.
        """
        self._read_properties()
        self._size = count_passages(self._milvus)
        if self._size == self.num_rows:
            return np.arange(self.num_rows)
        rows: list[int] = []
        for start in range(0, self.num_rows, MAX_REQUEST_ROWS):
            hits = self._milvus.query(f"row >= {start} and row < {start + MAX_REQUEST_ROWS}", ["row"])
            rows += [hit["row"] for hit in hits]
        return np.sort(np.array(rows, np.int64))

    def __getitem__(self, row: int) -> dict[str, Any]:
        """Return the passage of a row: `{"id", "title", "text", "input_ids"}`."""
        return self.get_passages([row])[0]

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Yield all passages that were not deleted, by row."""
        rows = self.live_rows()
        for start in range(0, len(rows), MAX_REQUEST_ROWS):
            yield from self.get_passages(rows[start : start + MAX_REQUEST_ROWS])

    def rows_of(self, ids: Iterable[str]) -> NDArray[np.int64]:
        """
        Return the rows of passage ids, `numpy.ndarray` of int64, in the given order.

        Raises:
            `ValueError`: names (up to five) ids that the index does not hold, or for a single string.
        """
        return self._rows_of(ids, "Session")

    def _rows_of(self, ids: Iterable[str], consistency_level: str) -> NDArray[np.int64]:
        ids = list_of_ids(ids)
        rows = self._find(ids, consistency_level)
        missing = dict.fromkeys(ids[i] for i in np.flatnonzero(rows < 0))  # each once
        if missing:
            raise ValueError(f"The index holds no passage with {_some(list(missing), 'id')}.")
        return rows

    def row_of(self, passage_id: str) -> int:
        """Return the row of a passage id; `KeyError` if the index does not hold it."""
        (row,) = self.find([passage_id]).tolist()
        if row < 0:
            raise KeyError(passage_id)
        return row

    def find(self, ids: Iterable[str]) -> NDArray[np.int64]:
        """Return the rows of passage ids, -1 for unknown ids; `ValueError` for anything but a list of strings."""
        return self._find(ids, "Session")

    def _find(self, ids: Iterable[str], consistency_level: str) -> NDArray[np.int64]:
        ids = list_of_ids(ids)
        rows = self._milvus.rows_of_ids(ids, consistency_level)
        return np.array([rows.get(id, -1) for id in ids], np.int64)

    def check_model(self, model: CoSupModel) -> None:
        """
        Raise unless `model` makes queries in the embedding space of this index.

        Raises:
            `ValueError`: names every setting that differs, with both values.
        """
        check_fingerprint(self.fingerprint, model)

    # ------------------------------------------------------------------ changing

    def add(
        self,
        passages: Any,
        model: CoSupModel,
        batch_size: int = 256,
        max_tokens_per_batch: int | None = None,
        show_progress_bar: bool = True,
    ) -> None:
        """
        Embed passages and add them in new rows. If this is interrupted, the next call removes what was added.

        Args:
            passages: as for [`PassageIndex.build`]. Their embeddings are in memory until they are sent, so add a large
                corpus in pieces.
            model ([`CoSupForCausalLM`]): the one that built the index.
            batch_size, max_tokens_per_batch, show_progress_bar: as for [`PassageIndex.build`].

        Raises:
            `ValueError`: for another model, a passage that is not valid or that Milvus cannot hold, or ids that are
                already in the index.
        """
        self.check_model(model)
        self._remove_leftovers()
        limits: dict[str, Any] = {"batch_size": batch_size, "max_tokens_per_batch": max_tokens_per_batch}
        new = PassageIndex.build(passages, model, show_progress_bar=show_progress_bar, **limits)
        check_sizes(new, self._fields)
        ids = [passage["id"] for passage in new]
        known = [ids[i] for i in np.flatnonzero(self._find(ids, "Strong") >= 0)]
        if known:
            raise ValueError(f"The index already holds passages with {_some(known, 'id')}; delete them first.")
        first = self.num_rows
        stop = first + len(new)
        # before the passages are sent, so that no row is used twice
        set_properties(self._milvus, next_row=str(stop), adding=f"{first}:{stop}")
        upload(self._milvus, new, first_row=first, show_progress_bar=show_progress_bar)
        self._end_add()

    def _remove_leftovers(self) -> None:
        """Delete the passages of an interrupted add()."""
        self._read_properties()
        if self._properties["cosup.adding"]:
            first, stop = map(int, self._properties["cosup.adding"].split(":"))
            self._delete_rows(np.arange(first, stop))
            self._end_add()

    def _end_add(self) -> None:
        set_properties(self._milvus, adding="")
        self._read_properties()
        self._size = count_passages(self._milvus)

    def delete(self, ids: Iterable[str]) -> None:
        """
        Delete passages. Their rows are not reused.

        Raises:
            `ValueError`: names ids that the index does not hold, or for a single string; then none is deleted.
        """
        self._delete_rows(np.unique(self._rows_of(ids, "Strong")))
        self._size = count_passages(self._milvus)

    def _delete_rows(self, rows: NDArray[np.int64]) -> None:
        for start in range(0, len(rows), MAX_REQUEST_ROWS):
            part = rows[start : start + MAX_REQUEST_ROWS].tolist()
            self._milvus.call("delete", "deleting passages", filter=f"row in {part}")


def _some(items: list[Any], name: str) -> str:
    """Return e.g. `ids ['a', 'b'] and 3 more`, with at most five items."""
    if len(items) == 1:
        return f"{name} {items[0]!r}"
    more = f" and {len(items) - 5} more" if len(items) > 5 else ""
    return f"{name}s {items[:5]}{more}"
