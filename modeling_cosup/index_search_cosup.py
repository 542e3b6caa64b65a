"""
Searching an index by inner product: exactly over mapped files (FAISS; torch where that is missing) or on a device
(torch), or approximately through any FAISS index.

Every searcher has `search(queries, k) -> (scores, rows)`, both `numpy.ndarray` `(N, k)`, best first, or narrower if
the index has fewer than k rows. Deleted rows are among the results. Places without a result hold -inf and -1.
"""

from collections.abc import Callable, Iterator
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray

from .folders_cosup import DTYPES
from .index_files_cosup import Shard
from .retriever_cosup import SearchResults

try:
    import faiss
except ImportError:
    faiss = None  # type: ignore[assignment]

HALF_ROWS = 16384  # rows of float16 or bfloat16 embeddings that are converted to float32 at a time
PRODUCT_QUERIES = range(2, 65)  # numbers of queries for which torch's product is up to 3 times as fast as FAISS
PRODUCT_ROWS = 4096  # rows per product, so that the scores stay in a core's cache
DEVICE_SCORES = 2**26  # scores that a device holds at a time: 256 MB
GATHER = 0.1  # share of all rows: gathering so many costs as much as reading all of them in order
GATHER_QUERY = 0.03  # share of all rows: gathering so many costs as much as scoring all rows for one more query
MASK_BYTES = 2**28  # for masks of pools at a time

RowArray: TypeAlias = NDArray[np.int64]  # rows of the index
Score: TypeAlias = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # queries, embeddings -> scores (N, M)


class ExactSearch:
    """
    Exact search over shards in memory or mapped from files, without a copy.

    Args:
        shards (`list[Shard]`): all shards of the index.
    """

    def __init__(self, shards: list[Shard]) -> None:
        self.shards = shards
        self.starts = np.cumsum([0, *map(len, shards)])
        self._is_finite = False  # set by the first search, which checks all embeddings

    def search(self, queries: torch.Tensor, k: int, allowed: torch.Tensor | None = None) -> SearchResults:
        """
        Find the k nearest rows.

        Args:
            queries (`torch.FloatTensor` of shape `(N, h)`), k (`int`).
            allowed (`torch.BoolTensor` of shape `(N, num_rows)`, *optional*): rows that each query may find.

        Raises:
            `ValueError`: for embeddings that are not finite. FAISS would skip a NaN, and torch's top-k puts it first.
        """
        queries = queries.cpu()
        best = nothing(len(queries), 0)
        for start, block in self.blocks():
            embeddings = torch.from_numpy(block)
            if not self._is_finite:
                check_finite(torch.stack(embeddings.aminmax()).numpy())
            if faiss is not None and allowed is None and len(queries) not in PRODUCT_QUERIES:
                scores, rows = faiss.knn(queries.numpy(), block, min(k, len(block)), faiss.METRIC_INNER_PRODUCT)
                scores = np.where(rows < 0, -np.inf, scores).astype(np.float32)
            else:
                block_allowed = None if allowed is None else allowed[:, start : start + len(block)]
                top_scores, top_rows = top_of_product(self.scores, queries, embeddings, PRODUCT_ROWS, k, block_allowed)
                scores, rows = top_scores.numpy(), top_rows.numpy()
            best = merge(best, (scores, np.where(rows < 0, -1, rows + start)), k)
        self._is_finite = True
        return best

    @staticmethod
    def scores(queries: torch.Tensor, embeddings: torch.Tensor) -> torch.Tensor:
        """Return float32 scores `(N, M)` of queries and embeddings in memory."""
        return queries.cpu() @ embeddings.T

    def blocks(self) -> Iterator[tuple[int, NDArray[np.float32]]]:
        """Yield all embeddings as `(first row, float32 array)`: whole shards, or blocks of half-precision shards."""
        for start, shard in zip(self.starts, self.shards, strict=False):
            step = HALF_ROWS
            if shard.embeddings.dtype == torch.float32:
                step = max(1, len(shard))  # a shard of a memory may have no entry
            for offset in range(0, len(shard), step):
                yield start + offset, shard.embeddings[offset : offset + step].float().numpy()

    def gather(self, rows: RowArray) -> torch.Tensor:
        """Return the embeddings of some rows, float32 `(len(rows), h)`."""
        if len(self.shards) == 1:
            return self.shards[0].embeddings[torch.from_numpy(rows)].float()
        owners = np.searchsorted(self.starts, rows, side="right") - 1
        embeddings = torch.empty(len(rows), self.shards[0].embeddings.shape[1])
        for owner in np.unique(owners):
            places = np.flatnonzero(owners == owner)
            shard_rows = torch.from_numpy(rows[places] - self.starts[owner])
            embeddings[torch.from_numpy(places)] = self.shards[owner].embeddings[shard_rows].float()
        return embeddings


class DeviceSearch:
    """
    Exact search by matrix product and top-k on a device that holds all embeddings.

    Args:
        shards (`list[Shard]`): all shards of the index.
        device (`str` or `torch.device`): e.g. `"cuda"`.
        dtype (`str`, *optional*): dtype of the copy on the device: `"float32"`, `"float16"` or `"bfloat16"`; defaults
            to the files' dtype. Scores are float32.

    Raises:
        `ValueError`: for an unknown dtype, and for embeddings that are not finite or overflow it. An infinite
            score would hide or promote its passage without an error.
    """

    def __init__(self, shards: list[Shard], device: str | torch.device, dtype: str | None = None) -> None:
        if dtype is not None and dtype not in DTYPES:
            raise ValueError(f"dtype is {dtype!r}, expected one of {', '.join(DTYPES)}.")
        stored = shards[0].embeddings
        num_rows = sum(map(len, shards))
        copy_dtype = stored.dtype if dtype is None else DTYPES[dtype]
        self.embeddings = torch.empty(num_rows, stored.shape[1], device=device, dtype=copy_dtype)
        start = 0
        for shard in shards:
            copied = self.embeddings[start : start + len(shard)]
            copied[:] = shard.embeddings.to(copied.device)
            for block, stored_block in zip(copied.split(HALF_ROWS), shard.embeddings.split(HALF_ROWS), strict=True):
                if not block.isfinite().all():
                    check_finite(stored_block.float().numpy())
                    raise ValueError(f"Embeddings overflow {dtype}: copy them with dtype='bfloat16'.")
            start += len(shard)

    def search(self, queries: torch.Tensor, k: int, allowed: torch.Tensor | None = None) -> SearchResults:
        """Find the k nearest rows, or the k nearest `allowed` rows; see [`ExactSearch.search`]."""
        queries = queries.to(self.embeddings.device)
        step = max(1, DEVICE_SCORES // len(queries))
        top_scores, top_rows = top_of_product(self.scores, queries, self.embeddings, step, k, allowed)
        scores, rows = top_scores.cpu().numpy(), top_rows.cpu().numpy()
        check_finite(scores[rows >= 0])
        return scores, rows

    def scores(self, queries: torch.Tensor, block: torch.Tensor) -> torch.Tensor:
        """
        Return float32 scores `(N, rows of block)`; a passage has the same score in a pool as in the whole index.

        On a GPU, half-precision embeddings are not converted: its product takes them, and sums in float32.
        """
        queries = queries.to(block.device)
        if block.dtype == torch.float32:
            return queries @ block.T
        if block.is_cuda:
            return torch.mm(queries.to(block.dtype), block.T, out_dtype=torch.float32)
        return torch.cat([queries @ part.float().T for part in block.split(HALF_ROWS)], 1)

    def gather(self, rows: RowArray) -> torch.Tensor:
        """Return the embeddings of some rows, `(len(rows), h)`, on the device and in its dtype."""
        return self.embeddings[torch.from_numpy(rows).to(self.embeddings.device)]


class ApproximateSearch:
    """
    Search through a FAISS index whose ids are our rows.

    Args:
        index (`faiss.Index`): inner product index of all rows.
        resources (`faiss.StandardGpuResources`, *optional*): for an index on a GPU, which needs them while it exists.
    """

    def __init__(self, index: Any, resources: Any = None) -> None:
        self.index = index
        self.resources = resources

    def search(self, queries: torch.Tensor, k: int) -> SearchResults:
        """Find roughly the k nearest rows; scores are the FAISS index's, and inexact if it compresses embeddings."""
        scores, rows = self.index.search(queries.cpu().numpy(), k)
        return np.where(rows < 0, -np.inf, scores).astype(np.float32), rows

    def on_gpu(self, number: int) -> "ApproximateSearch":
        """
        Return an [`ApproximateSearch`] through a copy on a GPU; this one does not change.

        Raises:
            `ValueError`: if FAISS was built without GPU support, or has no GPU version of this kind of index.
        """
        try:
            resources = faiss.StandardGpuResources()
            return ApproximateSearch(faiss.index_cpu_to_gpu(resources, number, self.index), resources)
        except (AttributeError, RuntimeError) as error:
            kind = type(self.index).__name__
            raise ValueError(
                f"FAISS cannot search this {kind} on a GPU; load with search='exact' to search exactly there: {error}"
            ) from None


ExactSearcher: TypeAlias = ExactSearch | DeviceSearch
Searcher: TypeAlias = ExactSearcher | ApproximateSearch


def check_finite(scores: NDArray[np.float32]) -> None:
    """Raise `ValueError` unless all scores (or embeddings) are finite."""
    if not np.isfinite(scores).all():
        raise ValueError(
            "The index holds NaN or infinite embeddings (or scores overflow): no search can be right; build it again."
        )


def top_of_product(
    score: Score, queries: torch.Tensor, embeddings: torch.Tensor, step: int, k: int, allowed: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Find the k best rows of each query, computing the scores of `step` rows at a time.

    Args:
        score (`Callable`): takes queries and a block of embeddings, e.g. [`DeviceSearch.scores`].
        queries (`torch.FloatTensor` of shape `(N, h)`), embeddings (`torch.Tensor` of shape `(M, h)`).
        allowed (`torch.BoolTensor` of shape `(N, M)`, *optional*): other rows become -1 with a score of -inf.

    Returns:
        `(scores, rows)`: tensors `(N, min(k, M))`, best first.
    """
    block_scores, block_rows = [], []
    for start in range(0, len(embeddings), step):
        scores = score(queries, embeddings[start : start + step])  # (N, step)
        if allowed is not None:
            scores = scores.masked_fill(~allowed[:, start : start + step].to(scores.device), -torch.inf)
        top = scores.topk(min(k, scores.shape[1]))
        rows = top.indices + start
        if allowed is not None:
            rows = rows.masked_fill(top.values == -torch.inf, -1)
        block_scores.append(top.values)
        block_rows.append(rows)
    best_scores, order = torch.cat(block_scores, 1).sort(dim=1, descending=True, stable=True)
    return best_scores[:, :k], torch.cat(block_rows, 1).gather(1, order[:, :k])


def nothing(n: int, k: int) -> SearchResults:
    """Return the `(scores, rows)` `(n, k)` of a search that found nothing."""
    return np.full((n, k), -np.inf, np.float32), np.full((n, k), -1, np.int64)


def merge(first: SearchResults, second: SearchResults, k: int) -> SearchResults:
    """Return the k best of two search results; for equal scores, `first` comes first."""
    scores = np.concatenate([first[0], second[0]], axis=1)
    rows = np.concatenate([first[1], second[1]], axis=1)
    order = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(scores, order, 1), np.take_along_axis(rows, order, 1)


def search_without(
    deleted: RowArray, searcher: Searcher, queries: torch.Tensor, k: int, num_rows: int
) -> SearchResults:
    """
    Find the k nearest rows that were not deleted: fetch more than k, and again more for queries left with fewer.

    Args:
        deleted (`numpy.ndarray` of int64): deleted rows, sorted.
        queries (`torch.FloatTensor` of shape `(N, h)`), k (`int`): see [`ExactSearch.search`].
        num_rows (`int`): number of rows of the searcher, including deleted ones.
    """
    if not len(deleted):
        return searcher.search(queries, k)
    best_scores, best_rows = nothing(len(queries), k)
    fetch = min(num_rows, k + 8 + 2 * k * len(deleted) // num_rows)
    unfilled = np.arange(len(queries))  # queries that have fewer than k rows
    while len(unfilled):
        scores, rows = searcher.search(queries[torch.from_numpy(unfilled)], fetch)
        exhausted = (rows[:, -1] < 0) | (fetch == num_rows)
        live = (rows >= 0) & ~contains(deleted, rows)
        order = np.argsort(~live, axis=1, kind="stable")[:, :k]  # live rows first, in their order
        live = np.take_along_axis(live, order, 1)
        best_scores[unfilled] = np.where(live, np.take_along_axis(scores, order, 1), -np.inf)
        best_rows[unfilled] = np.where(live, np.take_along_axis(rows, order, 1), -1)
        unfilled = unfilled[~(live.all(1) | exhausted)]
        fetch = min(num_rows, 4 * fetch)
    return best_scores, best_rows


def search_pools(
    searcher: ExactSearcher, queries: torch.Tensor, pools: list[RowArray], k: int, deleted: RowArray, num_rows: int
) -> SearchResults:
    """
    Find the k best rows in the pool of each query.

    Queries with the same pool share its gathered embeddings. Large pools are searched by scoring all rows.

    Args:
        queries (`torch.FloatTensor` of shape `(N, h)`): one for each pool.
        pools (`list` of `numpy.ndarray` of int64): rows, in any order; duplicate and deleted ones are ignored.
        k (`int`), deleted (`numpy.ndarray` of int64), num_rows (`int`): see [`search_without`].
    """
    best_scores, best_rows = nothing(len(queries), k)
    small, large = [], []
    for pool, members in group_pools(pools):
        share = min(GATHER, GATHER_QUERY * len(members))
        if len(pool) > share * num_rows:
            large.append((pool, members))
        else:
            small.append((pool, members))
    if sum(len(pool) for pool, _ in large) <= GATHER * num_rows:  # gathering them all is still cheaper
        small, large = small + large, []

    masked = []  # queries for which all rows are scored, and their pools
    for pool, members in large:
        masked += [(query, pool) for query in members]
    step = max(1, MASK_BYTES // num_rows)
    for start in range(0, len(masked), step):
        part = masked[start : start + step]
        allowed = torch.zeros(len(part), num_rows, dtype=torch.bool)
        for mask, (_, pool) in zip(allowed, part, strict=True):
            mask[torch.from_numpy(pool)] = True
        allowed[:, torch.from_numpy(deleted)] = False
        selected = [query for query, _ in part]
        best_scores[selected], best_rows[selected] = searcher.search(queries[selected], k, allowed)

    for pool, members in small:
        scores, rows = search_pool(searcher, queries[members], pool, k, deleted)
        best_scores[members, : scores.shape[1]] = scores
        best_rows[members, : rows.shape[1]] = rows
    return best_scores, best_rows


def group_pools(pools: list[RowArray]) -> list[tuple[RowArray, list[int]]]:
    """Return the distinct pools, each with the numbers of the queries that have it."""
    by_object: dict[int, tuple[RowArray, list[int]]] = {}  # so that a shared array is converted to bytes only once
    for query, pool in enumerate(pools):
        by_object.setdefault(id(pool), (pool, []))[1].append(query)
    by_content: dict[bytes, tuple[RowArray, list[int]]] = {}
    for pool, members in by_object.values():
        by_content.setdefault(pool.tobytes(), (pool, []))[1].extend(members)
    return list(by_content.values())


def search_pool(
    searcher: ExactSearcher, queries: torch.Tensor, pool: RowArray, k: int, deleted: RowArray
) -> SearchResults:
    """Find at most k rows of a pool for all `queries`, by gathering it once and computing one product."""
    pool = np.unique(pool)
    if len(deleted):
        pool = pool[~contains(deleted, pool)]
    if not len(pool):
        return nothing(len(queries), 0)
    top = searcher.scores(queries, searcher.gather(pool)).topk(min(k, len(pool)))
    scores = top.values.cpu().numpy()
    check_finite(scores)
    return scores, pool[top.indices.cpu().numpy()]


def contains(values: RowArray, rows: Any) -> Any:
    """Return whether each of `rows` (an `int` or an array) is in `values`, which must be sorted and not empty."""
    return values[np.minimum(values.searchsorted(rows), len(values) - 1)] == rows
