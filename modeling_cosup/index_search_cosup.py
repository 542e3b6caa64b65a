"""
Searching an index by inner product: exactly over mapped files (FAISS; torch where that is missing) or on a device
(torch), or approximately through any FAISS index.

Every searcher has `search(queries, k) -> (scores, rows)`, both `numpy.ndarray` `(N, k)`, best first, or narrower if
the index has fewer than k rows. Equal scores are in the order of their rows. Deleted rows are among the results.
Places without a result hold -inf and -1.
"""

from collections.abc import Callable, Iterator
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray

from .folders_cosup import DTYPES, dtype_name
from .index_files_cosup import Shard
from .retriever_cosup import SearchResults

try:
    import faiss
except ImportError:
    faiss = None  # type: ignore[assignment]

HALF_ROWS = 16384  # rows of float16 or bfloat16 embeddings that are converted to float32 at a time
PRODUCT_QUERIES = range(2, 65)  # numbers of queries for which torch's product is up to 3 times as fast as FAISS
PRODUCT_ROWS = 4096  # rows per product, so that the scores stay in a core's cache
DEVICE_SCORES = 2**26  # scores that a device holds at a time: 256 MB; half precision on a GPU takes twice as much
GATHER = 0.1  # share of all rows: gathering so many costs as much as reading all of them in order
GATHER_QUERY = 0.03  # share of all rows: gathering so many costs as much as scoring all rows for one more query
MASK_BYTES = 2**28  # for masks of pools at a time
SPARE = 8  # rows that are proposed besides the k best, to see whether others share the score of the last
MORE = 16  # factor by which the proposal grows while others may share the k-th score
ERRORS = 8  # assumed bound on the error of any product, in multiples of the largest among the proposed rows
NUMBERS = 2**22  # numbers of embeddings, or further rows of all queries, that are scored again at a time

RowArray: TypeAlias = NDArray[np.int64]  # rows of the index
Score: TypeAlias = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # queries, embeddings -> scores (N, M)
Propose: TypeAlias = Callable[[torch.Tensor, int, torch.Tensor | None], SearchResults]  # queries, count, allowed
Gather: TypeAlias = Callable[[RowArray], torch.Tensor]  # rows -> embeddings


class ExactSearch:
    """
    Exact search over shards in memory or mapped from files, without a copy.

    Args:
        shards (`list[Shard]`): all shards of the index.
    """

    def __init__(self, shards: list[Shard]) -> None:
        self.shards = shards
        self.starts = np.cumsum([0, *map(len, shards)])
        self.num_rows = int(self.starts[-1])
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
        return nearest(self.propose, self.gather, self.num_rows, queries, k, allowed)

    def propose(self, queries: torch.Tensor, count: int, allowed: torch.Tensor | None) -> SearchResults:
        """Return the `count` rows with the largest products, by FAISS or by torch, whichever is faster."""
        queries = queries.cpu()
        best = nothing(len(queries), 0)
        for start, block in self.blocks():
            embeddings = torch.from_numpy(block)
            if not self._is_finite:
                check_finite(torch.stack(embeddings.aminmax()).numpy())
            if faiss is not None and allowed is None and len(queries) not in PRODUCT_QUERIES:
                scores, rows = faiss.knn(queries.numpy(), block, min(count, len(block)), faiss.METRIC_INNER_PRODUCT)
                scores = np.where(rows < 0, -np.inf, scores).astype(np.float32)
            else:
                block_allowed = None if allowed is None else allowed[:, start : start + len(block)]
                scores, rows = top_of_product(self.scores, queries, embeddings, PRODUCT_ROWS, count, block_allowed)
            best = merge(best, (scores, np.where(rows < 0, -1, rows + start)), count)
        self._is_finite = True
        return best

    @staticmethod
    def scores(queries: torch.Tensor, embeddings: torch.Tensor) -> torch.Tensor:
        """Return float32 products `(N, M)` of queries and embeddings in memory."""
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
        dtype (`str` or `torch.dtype`, *optional*): of the copy: `"float32"`, `"float16"` or `"bfloat16"`;
            defaults to the files' dtype. Scores are float32.

    Raises:
        `ValueError`: for an unknown dtype, and for embeddings that are not finite or overflow it. An infinite
            score would hide or promote its passage without an error.
    """

    def __init__(self, shards: list[Shard], device: str | torch.device, dtype: str | torch.dtype | None = None):
        stored = shards[0].embeddings
        self.num_rows = sum(map(len, shards))
        copy_dtype = stored.dtype if dtype is None else DTYPES[dtype_name(dtype)]
        self.embeddings = torch.empty(self.num_rows, stored.shape[1], device=device, dtype=copy_dtype)
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
        return nearest(self.propose, self.gather, self.num_rows, queries, k, allowed)

    def propose(self, queries: torch.Tensor, count: int, allowed: torch.Tensor | None) -> SearchResults:
        """Return the `count` rows with the largest products."""
        step = max(1, DEVICE_SCORES // len(queries))
        queries = queries.to(self.embeddings.device)
        return top_of_product(self.scores, queries, self.embeddings, step, count, allowed)

    def scores(self, queries: torch.Tensor, embeddings: torch.Tensor) -> torch.Tensor:
        """
        Return float32 products `(N, M)`.

        On a GPU, half-precision embeddings are not converted: its product takes them, and sums in float32. A query is
        then two rows of half precision, of which the second holds what the first has rounded off.
        """
        queries = queries.to(embeddings.device)
        if embeddings.dtype == torch.float32:
            return queries @ embeddings.T
        if embeddings.is_cuda:
            rounded = queries.to(embeddings.dtype)
            parts = torch.cat([rounded, (queries - rounded).to(embeddings.dtype)])
            first, second = torch.mm(parts, embeddings.T, out_dtype=torch.float32).split(len(queries))
            return first.add_(second)
        return torch.cat([queries @ part.float().T for part in embeddings.split(HALF_ROWS)], 1)

    def gather(self, rows: RowArray) -> torch.Tensor:
        """Return the embeddings of some rows, `(len(rows), h)`, on the device and in its dtype."""
        return self.embeddings[torch.from_numpy(rows).to(self.embeddings.device)]


class ApproximateSearch:
    """
    Search through a FAISS index by inner product, whose ids are our rows.

    An index on a GPU needs its `resources` (`faiss.StandardGpuResources`) while it exists.
    """

    def __init__(self, index: Any, resources: Any = None) -> None:
        self.index = index
        self.resources = resources

    def search(self, queries: torch.Tensor, k: int) -> SearchResults:
        """Find roughly the k nearest rows; scores are the FAISS index's, and inexact if it compresses embeddings."""
        scores, rows = self.index.search(queries.cpu().numpy(), k)
        return in_order(np.where(rows < 0, -np.inf, scores).astype(np.float32), rows, k)

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


def nearest(
    propose: Propose,
    gather: Gather,
    num_rows: int,
    queries: torch.Tensor,
    k: int,
    allowed: torch.Tensor | None = None,
    spare: int = SPARE,
) -> SearchResults:
    """
    Find the k nearest rows, those of equal scores in the order of their rows.

    The last digits of a product depend on the place of an embedding and on the other queries. So products only propose
    rows, whose scores are then computed again one by one. While a row that was not proposed could have the score of
    the k-th, more rows are proposed.

    Args:
        propose, gather, num_rows: of [`ExactSearch`] or [`DeviceSearch`]; queries, k, allowed: of its `search`.
        spare (`int`, *optional*): number of rows to propose besides k.
    """
    k = min(k, num_rows)
    count = min(num_rows, k + max(spare, k // 8))
    products, rows = propose(queries, count, allowed)
    scores = score_again(gather, queries, rows)
    check_finite(scores[rows >= 0])
    check_finite(products[rows >= 0])  # of a half-precision copy, they can overflow although the scores do not
    best_scores, best_rows = in_order(scores, rows, k)
    if count == num_rows:
        return best_scores, best_rows
    unsettled = np.flatnonzero(rows[:, -1] >= 0)
    scores, products = scores[unsettled], products[unsettled]
    error = np.abs(products - scores).max(1) + np.finfo(np.float32).eps * np.abs(scores).max(1)
    unsettled = unsettled[products[:, -1] + ERRORS * error >= best_scores[unsettled, -1]]
    step = max(1, NUMBERS // (MORE * count))
    for start in range(0, len(unsettled), step):
        some = torch.from_numpy(unsettled[start : start + step])
        some_allowed = None if allowed is None else allowed[some]
        results = nearest(propose, gather, num_rows, queries[some], k, some_allowed, MORE * count)
        best_scores[some], best_rows[some] = results
    return best_scores, best_rows


def score_again(gather: Gather, queries: torch.Tensor, rows: RowArray) -> NDArray[np.float32]:
    """
    Return the scores of rows `(N, count)`, each from its own sum in float64; -inf for row -1.

    So equal embeddings have equal scores, which depend on no device and no other query.
    """
    scores = np.full(rows.shape, -np.inf, np.float32)
    query, column = (rows >= 0).nonzero()
    step = max(1, NUMBERS // queries.shape[1])
    for start in range(0, len(query), step):
        some, columns = query[start : start + step], column[start : start + step]
        embeddings = gather(rows[some, columns]).float()
        if embeddings.device.type == "mps":  # has no float64
            embeddings = embeddings.cpu()
        embeddings *= queries[torch.from_numpy(some)].to(embeddings.device)
        scores[some, columns] = embeddings.sum(1, dtype=torch.float64).float().cpu().numpy()
    return scores


def in_order(scores: NDArray[np.float32], rows: RowArray, k: int) -> SearchResults:
    """Return the k largest scores `(N, k)` and their rows, equal scores in the order of their rows."""
    order = np.lexsort((rows, -scores), axis=1)[:, :k]
    return np.take_along_axis(scores, order, 1), np.take_along_axis(rows, order, 1)


def top_of_product(
    score: Score, queries: torch.Tensor, embeddings: torch.Tensor, step: int, k: int, allowed: torch.Tensor | None
) -> SearchResults:
    """
    Find the k largest products of each query, computing those of `step` rows at a time: `(N, min(k, M))`.

    Rows that are not `allowed`, a `torch.BoolTensor` of shape `(N, M)`, become -1 with a score of -inf.
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
    best_scores, order = torch.cat(block_scores, 1).sort(dim=1, descending=True)
    best_rows = torch.cat(block_rows, 1).gather(1, order[:, :k])
    return best_scores[:, :k].cpu().numpy(), best_rows.cpu().numpy()


def nothing(n: int, k: int) -> SearchResults:
    """Return the `(scores, rows)` `(n, k)` of a search that found nothing."""
    return np.full((n, k), -np.inf, np.float32), np.full((n, k), -1, np.int64)


def merge(first: SearchResults, second: SearchResults, k: int) -> SearchResults:
    """Return the k best of two search results."""
    return in_order(np.concatenate([first[0], second[0]], 1), np.concatenate([first[1], second[1]], 1), k)


def search_without(
    deleted: RowArray, searcher: Searcher, queries: torch.Tensor, k: int, num_rows: int
) -> SearchResults:
    """
    Find the k nearest rows that are not among the `deleted` ones, which are sorted: fetch more than k of all
    `num_rows`, and again more for queries left with fewer.
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

    A pool holds rows in any order; duplicate and deleted ones are ignored. Queries with the same pool share its
    gathered embeddings. Large pools are searched by scoring all rows.
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

    masked = [(query, pool) for pool, members in large for query in members]  # all rows are scored for these queries
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
    embeddings = searcher.gather(pool)

    def propose(queries: torch.Tensor, count: int, _: torch.Tensor | None) -> SearchResults:
        return top_of_product(searcher.scores, queries, embeddings, len(pool), count, None)

    scores, places = nearest(propose, lambda places: embeddings[torch.from_numpy(places)], len(pool), queries, k)
    return scores, pool[places]


def contains(values: RowArray, rows: Any) -> Any:
    """Return whether each of `rows` (an `int` or an array) is in `values`, which must be sorted and not empty."""
    return values[np.minimum(values.searchsorted(rows), len(values) - 1)] == rows
