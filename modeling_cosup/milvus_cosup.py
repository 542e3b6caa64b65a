"""A passage index in Milvus: what `generate(retriever=...)` searches when the corpus outgrows one machine."""

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers.utils import logging

from .index_search_cosup import nothing
from .index_searchable_cosup import check_candidates, check_queries
from .milvus_client_cosup import MAX_REQUEST_BYTES, MAX_REQUEST_ROWS, MilvusConnection, split
from .milvus_upload_cosup import (
    FORMAT_VERSION,
    TEXT_FIELDS,
    check_sizes,
    count_passages,
    finish_upload,
    prepare_upload,
    set_properties,
    upload,
)
from .retrieval_cosup import PassageIndex
from .retriever_cosup import Rows, SearchResults, check_fingerprint

logger = logging.get_logger(__name__)

MAX_RESULTS = 16_384  # passages a query, the limit of a Milvus server
LARGE_POOL = (
    512  # candidates; from about here on, a search with a filter was faster than fetching them, at 100,000 passages
)
MAX_FILTER_ROWS = 65_536


class MilvusPassageIndex:
    """
    A passage index that lives in a Milvus collection: a [`Retriever`] that, like [`PassageIndex`], also gives embeddings, adds and deletes.

    Passages, token ids, embeddings and the fingerprint of the model that made them all stand in the collection. Up to 512 candidates of a
    query are fetched and scored here, since Milvus takes one filter a request, and a filter costs it a scan.

    This process sees its own writes at once, and all that was written before it opened the index; what others write later it sees within
    seconds. Only one process may write at a time.

    Args:
        uri (`str`): `"http://host:19530"` (or `https://`, with `/database` behind it for another one than the default), or for a small index a
            local file that ends in `.db`, which one process at a time may open.
        collection (`str`): its name, or an alias of it.
        token (`str`, *optional*): `"user:password"` or an API key; defaults to the environment variable `MILVUS_TOKEN`.
        timeout (`float`): seconds that one request may take.
        max_retries (`int`): how often a request that a server does not answer is sent again, after 0.5, 1, 2, ... seconds. The default goes on
            for at least 15 seconds.
        search_params (`dict`, *optional*): of the collection's index type, e.g. `{"ef": 128}` for HNSW.
        search (`str`, *optional*): `"exact"` refuses a collection whose index type is approximate.

    Raises:
        `ImportError`: when pymilvus is missing.
        `FileNotFoundError`: when there is no such file.
        `ValueError`: when there is no such collection (names those there are), or it is no complete passage index, or not an exact one.
        `ConnectionError`: here and in every method, when the server does not answer any more.
    """

    fingerprint: dict[str, Any]

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

    def _open(self, exact):
        """Read what is stored with the collection, and bring it into the server's memory."""
        if not self._milvus.call("has_collection", "looking for the collection"):
            names = self._milvus.call("list_collections", "listing the collections", name_collection=False)
            raise ValueError(f"{self._milvus}: there is no such collection, only {sorted(names)}.")
        self._read_properties()
        if self._properties["cosup.complete"] != "true":
            raise ValueError(
                f"{self._milvus}: the upload has not ended; call MilvusPassageIndex.from_index with the same index to go on where it stopped."
            )
        if exact and self._properties["cosup.index_type"] != "FLAT":
            raise ValueError(
                f"{self._milvus}: is searched through {self._properties['cosup.index_type']}, and search='exact' needs FLAT."
            )
        self.fingerprint = json.loads(self._properties["cosup.fingerprint"])
        self._milvus.call("load_collection", "loading the collection")
        self._size = count_passages(self._milvus)
        if self._properties["cosup.adding"]:
            logger.warning(
                f"{self._milvus}: passages are being added, or an add() was cut off; the next add() removes what it left."
            )

    def _read_properties(self):
        description = self._milvus.call("describe_collection", "reading the collection's properties")
        self._properties = description["properties"]
        version = self._properties.get("cosup.format_version")
        if version != FORMAT_VERSION:
            raise ValueError(
                f"{self._milvus}: has format_version {version}, this release reads {FORMAT_VERSION}; None: it is no passage index."
            )
        (self.embedding_size,) = [
            field["params"]["dim"] for field in description["fields"] if field["name"] == "embedding"
        ]

    def close(self):
        """Close the connection; a local file can then be opened by another process."""
        self._milvus.close()

    # ------------------------------------------------------------------ upload

    @classmethod
    def from_index(
        cls,
        index,
        uri,
        collection,
        index_type="FLAT",
        index_params=None,
        batch_size=1000,
        overwrite=False,
        show_progress_bar=True,
        token=None,
        timeout=60.0,
        max_retries=5,
        search_params=None,
    ):
        """
        Upload an index to a new collection, by inner product, and open it.

        The upload goes in batches. When it is cut off, the same call goes on where it stopped; until then nothing opens the collection.

        Args:
            index ([`PassageIndex`]): rows keep their numbers.
            uri, collection, token, timeout, max_retries, search_params: see [`MilvusPassageIndex`]. A local file is created where it is missing.
            index_type (`str`): `"FLAT"` (exact), or an approximate one that the server has, e.g. `"HNSW"`.
            index_params (`dict`, *optional*): of the index type, e.g. `{"M": 32, "efConstruction": 200}`.
            batch_size (`int`): passages a request, at most 4,096; fewer where their embeddings would exceed 16 MiB.
            overwrite (`bool`): drop a collection of that name first, whatever it holds. To replace one that is in use, upload under
                another name and move an alias.
            show_progress_bar (`bool`): a tqdm bar.

        Returns:
            [`MilvusPassageIndex`].

        Raises:
            `FileExistsError`: when the collection exists and is not an unfinished upload of this index.
            `ValueError`: names a passage that Milvus cannot hold: a title, text or id above 65,535 bytes, or more than 4,096 token ids.
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

    # ------------------------------------------------------------------ the retriever

    def search(
        self, query_embeds: torch.Tensor, k: int = 1, candidates: Sequence[Rows | None] | None = None
    ) -> SearchResults:
        """
        The nearest passages by inner product, exact with the index type `"FLAT"` and among candidates.

        Args:
            query_embeds (`torch.Tensor` of shape `(N, h)`): of the model that built the index; any float dtype and device. N may be 0.
            k (`int`): passages per query, at most as many as the index holds, and at most 16,384 where a query names no candidates.
            candidates (`list`, *optional*): for each query None, or an array of rows: search only among these.

        Returns:
            `(scores, rows)`: `numpy.ndarray` of float32 and int64, both `(N, min(k, len(self)))`, best first. Where fewer are found the
            row is -1 and the score -inf.

        Raises:
            `ValueError`: for another width, queries that are not finite, candidates out of range, or a k that is too small or too large.
        """
        queries = check_queries(query_embeds, self.embedding_size, k).cpu().numpy()
        pools = (
            [None] * len(queries)
            if candidates is None
            else check_candidates(candidates, len(queries), self._count_rows)
        )
        pools = [None if pool is None else np.unique(pool) for pool in pools]
        k = min(k, self._size)
        scores, rows = nothing(len(queries), k)
        if k:
            self._search_all(queries, [i for i, pool in enumerate(pools) if pool is None], scores, rows)
            self._search_pools(queries, pools, scores, rows)
        return scores, rows

    def _search_all(self, queries, selected, scores, rows):
        """Search the whole index for the `selected` queries, in requests that a server accepts."""
        k = scores.shape[1]
        if selected and k > MAX_RESULTS:
            raise ValueError(
                f"k is {k}, but a Milvus server returns at most {MAX_RESULTS} passages a query; use candidates or a PassageIndex."
            )
        per_request = max(1, min(MAX_REQUEST_ROWS, MAX_REQUEST_BYTES // (4 * queries.shape[1]), 2**20 // k))
        for start in range(0, len(selected), per_request):
            part = selected[start : start + per_request]
            scores[part], rows[part] = self._send_search(queries[part], k)

    def _send_search(self, queries, k, expression=""):
        """One request: `(scores, rows)`, `(N, k)`, with -inf and -1 where fewer are found."""
        options = {
            "limit": k,
            "filter": expression,
            "anns_field": "embedding",
            "output_fields": ["row"],
            "consistency_level": "Session",
        }
        options["search_params"] = {"metric_type": "IP", "params": self.search_params}
        scores, rows = nothing(len(queries), k)
        for i, hits in enumerate(self._milvus.call("search", "searching", data=list(queries), **options)):
            scores[i, : len(hits)] = [hit["distance"] for hit in hits]
            rows[i, : len(hits)] = [hit["row"] for hit in hits]
        return scores, rows

    def _search_pools(self, queries, pools, scores, rows):
        """Search the candidates of each query that names some."""
        filters = (
            self._properties["cosup.index_type"] == "FLAT" and scores.shape[1] <= MAX_RESULTS
        )  # an approximate index would miss candidates
        named = {i: pool for i, pool in enumerate(pools) if pool is not None and len(pool)}
        large = {i: pool for i, pool in named.items() if filters and len(pool) > LARGE_POOL}
        for i, pool in large.items():
            scores[i], rows[i] = self._search_large_pool(queries[i : i + 1], pool, scores.shape[1])
        self._search_small_pools(queries, {i: pool for i, pool in named.items() if i not in large}, scores, rows)

    def _search_large_pool(self, query, pool, k):
        """`(scores, rows)`, `(k,)`, of one query by requests with a filter, each of which costs the server a scan."""
        parts = [pool[start : start + MAX_FILTER_ROWS] for start in range(0, len(pool), MAX_FILTER_ROWS)]
        found = [self._send_search(query, k, f"row in {part.tolist()}") for part in parts]
        scores, rows = (np.concatenate(arrays, axis=1)[0] for arrays in zip(*found, strict=True))
        best = np.argsort(-scores, kind="stable")[:k]
        return scores[best], rows[best]

    def _search_small_pools(self, queries, pools, scores, rows):
        """Fetch the candidates' embeddings, each once, and score them here."""
        if not pools:
            return
        found, embeddings = self._fetch_embeddings(np.unique(np.concatenate([*pools.values()])))
        for i, pool in pools.items():
            pool = pool[np.isin(pool, found)]  # the others were deleted
            pool_scores = embeddings[np.searchsorted(found, pool)] @ queries[i]
            best = np.argsort(-pool_scores, kind="stable")[: scores.shape[1]]
            scores[i, : len(best)], rows[i, : len(best)] = pool_scores[best], pool[best]

    def _fetch_embeddings(self, rows):
        """Of `rows` (sorted) those that are there, and their embeddings `(M, h)` in float32."""
        step = max(1, min(MAX_REQUEST_ROWS, MAX_REQUEST_BYTES // (4 * self.embedding_size)))
        hits = []
        for start in range(0, len(rows), step):
            hits += self._query(f"row in {rows[start : start + step].tolist()}", ["row", "embedding"])
        found = np.array([hit["row"] for hit in hits], np.int64)
        embeddings = np.array([hit["embedding"] for hit in hits], np.float32).reshape(len(hits), self.embedding_size)
        order = np.argsort(found)
        return found[order], embeddings[order]

    def get_passages(self, rows: Rows) -> list[dict[str, Any]]:
        """
        The passages of rows, `list` of `{"id", "title", "text", "input_ids"}`, in their order; up to 4,096 passages cost one request.

        Raises:
            `IndexError`: names rows that the index does not hold (any more).
        """
        rows = [int(row) for row in rows]
        wanted, passages = sorted(set(rows)), {}
        for start in range(0, len(wanted), MAX_REQUEST_ROWS):
            for hit in self._query(
                f"row in {wanted[start : start + MAX_REQUEST_ROWS]}", ["row", *TEXT_FIELDS, "input_ids"]
            ):
                passages[hit["row"]] = {
                    **{name: hit[name] for name in TEXT_FIELDS},
                    "input_ids": list(hit["input_ids"]),
                }
        if missing := [row for row in wanted if row not in passages]:
            raise IndexError(f"The index holds no passage in {_some(missing, 'row')}.")
        return [dict(passages[row]) for row in rows]

    def get_embeddings(self, rows: Rows) -> NDArray[np.float32]:
        """
        Passage embeddings of rows, `numpy.ndarray` of float32 `(len(rows), h)`.

        Raises:
            `IndexError`: names rows that hold no passage.
        """
        rows = np.asarray(rows, np.int64).reshape(-1)
        there, embeddings = self._fetch_embeddings(np.unique(rows))
        if missing := np.setdiff1d(rows, there).tolist():
            raise IndexError(f"The index holds no passage in {_some(missing, 'row')}.")
        return embeddings[np.searchsorted(there, rows)]

    def __len__(self) -> int:
        return self._size

    @property
    def num_rows(self) -> int:
        """Rows that were ever given, including the rows of deleted passages."""
        return int(self._properties["cosup.next_row"])

    def live_rows(self) -> NDArray[np.int64]:
        """Rows that hold a passage, in order: `numpy.ndarray` of int64. Where passages were deleted, 4,096 rows cost one request."""
        self._read_properties()
        self._size = count_passages(self._milvus)
        if self._size == self.num_rows:
            return np.arange(self.num_rows)
        rows = []
        for start in range(0, self.num_rows, MAX_REQUEST_ROWS):
            rows += [
                hit["row"] for hit in self._query(f"row >= {start} and row < {start + MAX_REQUEST_ROWS}", ["row"])
            ]
        return np.sort(np.array(rows, np.int64))

    def __getitem__(self, row: int) -> dict[str, Any]:
        """The passage of a row: `{"id", "title", "text", "input_ids"}`."""
        return self.get_passages([row])[0]

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """All passages that were not deleted, by row."""
        rows = self.live_rows()
        for start in range(0, len(rows), MAX_REQUEST_ROWS):
            yield from self.get_passages(rows[start : start + MAX_REQUEST_ROWS])

    def rows_of(self, ids: Iterable[str]) -> NDArray[np.int64]:
        """
        Rows of passage ids, `numpy.ndarray` of int64, in their order.

        Raises:
            `ValueError`: names (up to five of) the ids that the index does not hold.
        """
        ids = list(ids)
        rows = self.find(ids)
        if missing := list(dict.fromkeys(id for id, row in zip(ids, rows, strict=True) if row < 0)):
            raise ValueError(f"The index holds no passage with {_some(missing, 'id')}.")
        return rows

    def row_of(self, passage_id: str) -> int:
        """Row of a passage id; `KeyError` when the index lacks it."""
        (row,) = self.find([passage_id]).tolist()
        if row < 0:
            raise KeyError(passage_id)
        return row

    def find(self, ids: Iterable[str]) -> NDArray[np.int64]:
        """Rows of passage ids, `numpy.ndarray` of int64, -1 where the index lacks one; `ValueError` for what is no string."""
        ids = list(ids)
        if wrong := [id for id in ids if not isinstance(id, str)]:
            raise ValueError(f"{wrong[0]!r} is no passage id, expected a string.")
        rows: dict[str, int] = {}
        quoted = [_quote(id) for id in dict.fromkeys(ids)]
        for part in split(quoted, len, MAX_REQUEST_BYTES // 4):  # of characters, up to four bytes each
            rows.update({hit["id"]: hit["row"] for hit in self._query(f"id in [{', '.join(part)}]", ["row", "id"])})
        return np.array([rows.get(id, -1) for id in ids], np.int64)

    def check_model(self, model: Any) -> None:
        """
        Raise unless `model` searches the space that this index holds.

        Raises:
            `ValueError`: names every setting that differs, with both values.
        """
        check_fingerprint(self.fingerprint, model)

    # ------------------------------------------------------------------ maintenance

    def add(self, passages, model, batch_size=256, max_tokens_per_batch=None, show_progress_bar=True):
        """
        Embed passages and add them, under new rows. An add that is cut off leaves some of them behind, which the next one removes.

        Args:
            passages: as for [`PassageIndex.build`]. Their embeddings are in memory until they are sent: add a large corpus piece by piece.
            model ([`CoSupForCausalLM`]): the one that built the index.
            batch_size, max_tokens_per_batch, show_progress_bar: as for [`PassageIndex.build`].

        Raises:
            `ValueError`: for another model, a passage that is not valid or that Milvus cannot hold, or ids that the index holds already.
        """
        self.check_model(model)
        self._remove_leftovers()
        options = {
            "batch_size": batch_size,
            "max_tokens_per_batch": max_tokens_per_batch,
            "show_progress_bar": show_progress_bar,
        }
        new = PassageIndex.build(passages, model, **options)
        check_sizes(new)
        ids = [passage["id"] for passage in new]
        if known := [id for id, row in zip(ids, self.find(ids), strict=True) if row >= 0]:
            raise ValueError(f"The index already holds passages with {_some(known, 'id')}; delete them first.")
        first = int(self._properties["cosup.next_row"])
        stop = first + len(new)
        set_properties(
            self._milvus, next_row=str(stop), adding=f"{first}:{stop}"
        )  # before the passages: a row is never given away twice
        upload(self._milvus, new, first_row=first, show_progress_bar=show_progress_bar)
        self._end_add()

    def _remove_leftovers(self):
        """Delete what an add() that was cut off left behind."""
        self._read_properties()
        if self._properties["cosup.adding"]:
            self._delete_rows(np.arange(*map(int, self._properties["cosup.adding"].split(":"))))
            self._end_add()

    def _end_add(self):
        set_properties(self._milvus, adding="")
        self._read_properties()
        self._size = count_passages(self._milvus)

    def delete(self, ids: Iterable[str]) -> None:
        """
        Delete passages. Their rows stay empty.

        Raises:
            `ValueError`: names ids that the index does not hold; none is deleted then.
        """
        self._delete_rows(np.unique(self.rows_of(ids)))
        self._size = count_passages(self._milvus)

    def _delete_rows(self, rows):
        for start in range(0, len(rows), MAX_REQUEST_ROWS):
            self._milvus.call(
                "delete", "deleting passages", filter=f"row in {rows[start : start + MAX_REQUEST_ROWS].tolist()}"
            )

    # ------------------------------------------------------------------ requests

    def _count_rows(self, row):
        """How many rows were ever given; asks again where `row` is unknown, since others may have added passages."""
        if row >= self.num_rows:
            self._read_properties()
        return self.num_rows

    def _query(self, expression, fields):
        return self._milvus.call(
            "query", "reading passages", filter=expression, output_fields=fields, consistency_level="Session"
        )


def _quote(text):
    """A string literal of Milvus' filter language, which knows fewer escapes than JSON."""
    for character, escape in (("\\", "\\\\"), ('"', '\\"'), ("\n", "\\n"), ("\r", "\\r"), ("\t", "\\t")):
        text = text.replace(character, escape)
    return f'"{text}"'


def _some(items, name):
    """`ids ['a', 'b'] and 3 more`: up to five of some items."""
    more = f" and {len(items) - 5} more" if len(items) > 5 else ""
    return f"{name}s {items[:5]}{more}" if len(items) > 1 else f"{name} {items[0]!r}"
