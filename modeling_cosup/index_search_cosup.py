"""
Searching an index by inner product: exactly over mapped files (FAISS) or on a device (torch), or approximately through any FAISS index.

Each searcher has `search(queries, k) -> (scores, rows)`, both `numpy.ndarray` `(N, k)`, best first; rows that were deleted are still in there, and -1
stands where fewer than k were found.
"""

import numpy as np
import torch

from .index_files_cosup import DTYPES

try:
    import faiss
except ImportError:
    faiss = None  # type: ignore[assignment]

HALF_ROWS = 16384  # rows of float16 or bfloat16 embeddings that are widened to float32 at once
PRODUCT_QUERIES = range(
    2, 65
)  # of so many queries torch's product and top-k is up to three times as fast as FAISS; of one, or of very many, FAISS is
PRODUCT_ROWS = 4096  # whose scores stay in a core's cache
DEVICE_SCORES = 2**26  # scores that are held at once on a device: 256 MB
GATHER = 0.1  # of the rows: gathering so many costs as much as reading all of them in order
GATHER_QUERY = 0.03  # of the rows: gathering so many costs as much as scoring one more query against all of them
MASK_BYTES = 2**28  # of the masks of pools that are held at once


class ExactSearch:
    """
    Exact search over shards where they lie, in memory or mapped: nothing is copied.

    Args:
        shards (`list[Shard]`): of the whole index.
    """

    def __init__(self, shards):
        self.shards = shards
        self.starts = np.cumsum([0, *map(len, shards)])
        self._is_finite = False  # until all embeddings were looked at, in the first search

    def search(self, queries, k, allowed=None):
        """
        The k nearest of all rows.

        Args:
            queries (`torch.FloatTensor` of shape `(N, h)`), k (`int`).
            allowed (`torch.BoolTensor` of shape `(N, num_rows)`, *optional*): rows that a query may find.

        Returns:
            `(scores, rows)`.

        Raises:
            `ValueError`: for embeddings that are not finite. FAISS passes over a NaN, a top-k in torch puts it first.
        """
        queries = queries.cpu()
        best = nothing(len(queries), 0)
        for start, block in self.blocks():
            embeddings = torch.from_numpy(block)
            if not self._is_finite:
                check_finite(torch.stack(embeddings.aminmax()).numpy())
            if allowed is not None or len(queries) in PRODUCT_QUERIES:
                allows = None if allowed is None else allowed[:, start : start + len(block)]
                found = top_of_product(
                    lambda rows, embeddings=embeddings: queries @ embeddings[rows].T,
                    len(block),
                    PRODUCT_ROWS,
                    k,
                    allows,
                )
                scores, rows = (part.numpy() for part in found)
            else:
                scores, rows = faiss.knn(queries.numpy(), block, min(k, len(block)), faiss.METRIC_INNER_PRODUCT)
                scores = np.where(rows < 0, -np.inf, scores).astype(np.float32)
            best = merge(best, (scores, np.where(rows < 0, -1, rows + start)), k)
        self._is_finite = True
        return best

    @staticmethod
    def scores(queries, embeddings):
        """Float32 scores `(N, M)` of queries and embeddings that were gathered."""
        return queries.cpu() @ embeddings.T

    def blocks(self):
        """`(first row, float32 array)` of all embeddings: whole shards, or blocks of them that are widened."""
        for start, shard in zip(self.starts, self.shards, strict=False):
            step = len(shard) if shard.embeddings.dtype == torch.float32 else HALF_ROWS
            for offset in range(0, len(shard), step):
                yield start + offset, shard.embeddings[offset : offset + step].float().numpy()

    def gather(self, rows):
        """Embeddings of some rows, float32 `(len(rows), h)`."""
        owners = np.searchsorted(self.starts, rows, side="right") - 1
        if len(self.shards) == 1:
            return self.shards[0].embeddings[torch.from_numpy(rows)].float()
        embeddings = torch.empty(len(rows), self.shards[0].embeddings.shape[1])
        for owner in np.unique(owners):
            own = np.flatnonzero(owners == owner)
            embeddings[torch.from_numpy(own)] = (
                self.shards[owner].embeddings[torch.from_numpy(rows[own] - self.starts[owner])].float()
            )
        return embeddings


class DeviceSearch:
    """
    Exact search by matrix product and top-k on a device that holds all embeddings.

    Args:
        shards (`list[Shard]`): of the whole index.
        device (`str` or `torch.device`): e.g. `"cuda"`.
        dtype (`str`, *optional*): in which the device holds them: `"float32"`, `"float16"` or `"bfloat16"`; defaults to that of the files. Scores are float32.
    """

    def __init__(self, shards, device, dtype=None):
        dtype = shards[0].embeddings.dtype if dtype is None else DTYPES[dtype]
        self.embeddings = torch.empty(sum(map(len, shards)), shards[0].embeddings.shape[1], device=device, dtype=dtype)
        start = 0
        for shard in shards:
            self.embeddings[start : start + len(shard)] = shard.embeddings.to(self.embeddings.device)
            start += len(shard)

    def search(self, queries, k, allowed=None):
        """`(scores, rows)` of the k nearest of all rows, or of those `allowed`; see [`ExactSearch.search`]."""
        queries = queries.to(self.embeddings.device)
        step = max(1, DEVICE_SCORES // len(queries))
        found = top_of_product(
            lambda rows: self.scores(queries, self.embeddings[rows]), len(self.embeddings), step, k, allowed
        )
        scores, rows = (part.cpu().numpy() for part in found)
        check_finite(scores[rows >= 0])
        return scores, rows

    def scores(self, queries, block):
        """
        Float32 scores `(N, rows of block)`, of all rows as of a pool: a passage has one score. Half-precision embeddings stay as they are on a GPU, whose
        product takes them and sums in float32.
        """
        queries = queries.to(block.device)
        if block.dtype == torch.float32:
            return queries @ block.T
        if block.is_cuda:
            return torch.mm(queries.to(block.dtype), block.T, out_dtype=torch.float32)
        return torch.cat(
            [queries @ block[start : start + HALF_ROWS].float().T for start in range(0, len(block), HALF_ROWS)], 1
        )

    def gather(self, rows):
        """Embeddings of some rows, `(len(rows), h)`, on the device and in its dtype."""
        return self.embeddings[torch.from_numpy(rows).to(self.embeddings.device)]


class ApproximateSearch:
    """
    Search through a FAISS index whose ids are our rows.

    Args:
        index (`faiss.Index`): by inner product, of all rows.
    """

    def __init__(self, index):
        self.index = index

    def search(self, queries, k):
        """`(scores, rows)` of about the k nearest; scores are those of the FAISS index, which compression may have changed."""
        scores, rows = self.index.search(queries.cpu().numpy(), k)
        return np.where(rows < 0, -np.inf, scores).astype(np.float32), rows

    def on_gpu(self, number):
        """
        An [`ApproximateSearch`] of a copy on a GPU; this one stays as it is.

        Raises:
            `ValueError`: when FAISS was built without GPUs, or has no GPU form of this kind of index.
        """
        try:
            resources = faiss.StandardGpuResources()
            found = ApproximateSearch(faiss.index_cpu_to_gpu(resources, number, self.index))
        except (AttributeError, RuntimeError) as error:
            kind = type(self.index).__name__
            raise ValueError(
                f"FAISS cannot search this {kind} on a GPU; load with search='exact' to search exactly there: {error}"
            ) from None
        found.resources = resources  # for as long as the index
        return found


def check_finite(scores):
    """`ValueError` unless all scores (or embeddings) are finite."""
    if not np.isfinite(scores).all():
        raise ValueError(
            "The index holds NaN or infinite embeddings (or their scores overflow): no search of it can be right; build it again."
        )


def top_of_product(scores_of, count, step, k, allowed=None):
    """
    The k best of `count` scores of each query, computed `step` at a time.

    Args:
        scores_of (callable): of a `slice` of rows, their scores `(N, rows)`.
        allowed (`torch.BoolTensor` of shape `(N, count)`, *optional*): all others are -1 with a score of -inf.

    Returns:
        `(scores, rows)`: tensors `(N, min(k, count))`, best first.
    """
    scores, rows = [], []
    for start in range(0, count, step):
        part = slice(start, start + step)
        values = scores_of(part)
        if allowed is not None:
            values = values.masked_fill(~allowed[:, part].to(values.device), -torch.inf)
        found = values.topk(min(k, count - start, step))
        scores.append(found.values)
        rows.append(
            found.indices + start
            if allowed is None
            else (found.indices + start).masked_fill(found.values == -torch.inf, -1)
        )
    scores, order = torch.cat(scores, 1).sort(dim=1, descending=True, stable=True)
    return scores[:, :k], torch.cat(rows, 1).gather(1, order[:, :k])


def nothing(n, k):
    """`(scores, rows)` `(n, k)` where nothing was found."""
    return np.full((n, k), -np.inf, np.float32), np.full((n, k), -1, np.int64)


def merge(first, second, k):
    """The k best of two `(scores, rows)`; among equal scores those of `first` come first."""
    scores, rows = (np.concatenate(parts, axis=1) for parts in zip(first, second, strict=True))
    order = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(scores, order, 1), np.take_along_axis(rows, order, 1)


def search_without(deleted, searcher, queries, k, num_rows):
    """
    The k nearest that were not deleted: more are fetched than asked for, and more again for the queries whose k are not full.

    Args:
        deleted (`numpy.ndarray` of int64): rows, sorted.
        searcher: one of the above.
        queries (`torch.FloatTensor` of shape `(N, h)`), k (`int`): as there.
        num_rows (`int`): of the searcher, deleted ones included.
    """
    if not len(deleted):
        return searcher.search(queries, k)
    best = nothing(len(queries), k)
    fetch, open_rows = min(num_rows, k + 8 + 2 * k * len(deleted) // num_rows), np.arange(len(queries))
    while len(open_rows):
        scores, rows = searcher.search(queries[torch.from_numpy(open_rows)], fetch)
        exhausted = (rows[:, -1] < 0) | (fetch == num_rows)
        alive = (rows >= 0) & ~contains(deleted, rows)
        order = np.argsort(~alive, axis=1, kind="stable")[:, :k]  # the living first, in their order
        found = np.take_along_axis(alive, order, 1)
        best[0][open_rows] = np.where(found, np.take_along_axis(scores, order, 1), -np.inf)
        best[1][open_rows] = np.where(found, np.take_along_axis(rows, order, 1), -1)
        open_rows = open_rows[~(found.all(1) | exhausted)]
        fetch = min(num_rows, 4 * fetch)
    return best


def search_pools(searcher, queries, pools, k, deleted, num_rows):
    """
    The k best of each query's own rows. Queries with the same pool share its embeddings; large pools are found while all rows are scored.

    Args:
        searcher ([`ExactSearch`] or [`DeviceSearch`]): of the embeddings.
        queries (`torch.FloatTensor` of shape `(N, h)`): one for each pool.
        pools (`list` of `numpy.ndarray` of int64): rows of the index, in any order; deleted ones are left out, repeated ones count once.
        k (`int`), deleted (`numpy.ndarray` of int64), num_rows (`int`): as in [`search_without`].

    Returns:
        `(scores, rows)`, `(N, k)`, with -inf and -1 at the end where a pool holds fewer than k.
    """
    best, groups = nothing(len(queries), k), group_pools(pools)
    large = [group for group in groups if len(group[0]) > min(GATHER, GATHER_QUERY * len(group[1])) * num_rows]
    if sum(len(pool) for pool, _ in large) <= GATHER * num_rows:
        large = []
    owners = [(pool, query) for pool, members in large for query in members]
    step = max(1, MASK_BYTES // num_rows)
    for part in (owners[start : start + step] for start in range(0, len(owners), step)):
        allowed, members = torch.zeros(len(part), num_rows, dtype=torch.bool), [query for _, query in part]
        for mask, (pool, _) in zip(allowed, part, strict=True):
            mask[torch.from_numpy(pool)] = True
        allowed[:, torch.from_numpy(deleted)] = False
        best[0][members], best[1][members] = searcher.search(queries[members], k, allowed)
    scanned = {query for _, query in owners}
    for pool, members in groups:
        if members[0] not in scanned:
            found = search_pool(searcher, queries[members], pool, k, deleted)
            best[0][members, : found[0].shape[1]], best[1][members, : found[0].shape[1]] = found
    return best


def group_pools(pools):
    """Equal pools together: a list of `(pool, list of those that have it)`."""
    same = {}
    for i, pool in enumerate(pools):
        same.setdefault(id(pool), (pool, []))[1].append(i)
    equal = {}
    for pool, members in same.values():
        equal.setdefault(pool.tobytes(), (pool, []))[1].extend(members)
    return list(equal.values())


def search_pool(searcher, queries, pool, k, deleted):
    """`(scores, rows)`, at most `(N, k)`, of one pool that all `queries` have, by one gathering and one product."""
    pool = np.unique(pool)
    if len(deleted):
        pool = pool[~contains(deleted, pool)]
    if not len(pool):
        return nothing(len(queries), 0)
    scores, order = searcher.scores(queries, searcher.gather(pool)).topk(min(k, len(pool)))
    scores = scores.cpu().numpy()
    check_finite(scores)
    return scores, pool[order.cpu().numpy()]


def contains(values, rows):
    """Whether each of `rows` (any shape) is among the sorted `values`, of which there is at least one."""
    return values[np.minimum(values.searchsorted(rows), len(values) - 1)] == rows


# ---------------------------------------------------------------------- approximate indexes


def make_approximate(factory, exact, train_rows):
    """
    A FAISS index of all embeddings, trained on a sample of them and filled shard by shard.

    Args:
        factory (`str`): of `faiss.index_factory`, e.g. `"HNSW32"`, `"IVF1024,Flat"`, `"OPQ16_64,IVF256,PQ16"`.
        exact ([`ExactSearch`]): of the shards.
        train_rows (`numpy.ndarray` of int64): the sample.

    Raises:
        `ValueError`: when FAISS does not know the factory string, or the sample is too small for it.
    """
    index = empty_approximate(factory, exact.shards[0].embeddings.shape[1], len(train_rows))
    try:
        if not index.is_trained:
            index.train(exact.gather(train_rows).numpy())
    except RuntimeError as error:
        raise _refused(factory, index.d, len(train_rows), error) from None
    add_to_approximate(index, exact, 0)
    return index


def empty_approximate(factory, size, train_size, **search_options):
    """
    A FAISS index of nothing: tells of a wrong setting before hours of embedding.

    Args:
        factory (`str`): of `faiss.index_factory`.
        size (`int`): dimensions of an embedding.
        train_size (`int`): embeddings of the training sample.
        **search_options: see [`set_search_options`].

    Raises:
        `ValueError`: when FAISS does not know the factory string or an option, or the sample is too small for the lists of an IVF index.
    """
    if train_size < 1:
        raise ValueError(f"train_size is {train_size}, expected at least 1.")
    try:
        index = faiss.index_factory(size, factory, faiss.METRIC_INNER_PRODUCT)
    except RuntimeError as error:
        raise _refused(factory, size, train_size, error) from None
    ivf = faiss.try_extract_index_ivf(index)
    if ivf is not None and ivf.nlist > train_size:
        raise _refused(factory, size, train_size, f"{ivf.nlist} lists need at least as many training embeddings")
    set_search_options(index, search_options)
    return index


def _refused(factory, size, train_size, error):
    message = str(error).partition("Error: ")[2] or str(error)
    return ValueError(
        f"index_factory {factory!r} of {size} dimensions and {train_size:,} training embeddings: FAISS says {message}"
    )


def add_to_approximate(index, exact, first_row):
    """Add the rows from `first_row` on, deleted ones too: the FAISS index counts them as we do."""
    for start, block in exact.blocks():
        if start + len(block) > first_row:
            index.add(block[max(0, first_row - start) :])


def write_approximate(index, path):
    """Write a FAISS index; `OSError` when that fails, as on a full disk."""
    try:
        faiss.write_index(index, str(path))
    except RuntimeError as error:
        path.unlink(missing_ok=True)
        raise OSError(f"{path} could not be written; is the disk full? FAISS says {error}") from None


def read_approximate(path, num_rows, size):
    """A FAISS index, mapped; `ValueError` when it cannot be read or is not of `num_rows` embeddings of `size` dimensions."""
    try:
        index = faiss.read_index(str(path), faiss.IO_FLAG_MMAP_IFC)
    except RuntimeError as error:
        raise ValueError(f"{path} is damaged: {error}") from None
    if (index.ntotal, index.d) != (num_rows, size):
        raise ValueError(
            f"{path} holds {index.ntotal:,} embeddings of {index.d} dimensions, expected {num_rows:,} of {size}."
        )
    return index


def set_search_options(index, options):
    """
    Set options of `faiss.ParameterSpace` on an index, e.g. `nprobe`, `efSearch`.

    Raises:
        `ValueError`: names an option that this kind of index does not have.
    """
    for name, value in options.items():
        try:
            faiss.ParameterSpace().set_index_parameter(index, name, value)
        except RuntimeError:
            raise ValueError(
                f"{type(index).__name__} has no search option {name!r} (or not {value!r}); IVF has nprobe, HNSW efSearch."
            ) from None


def recall(found, expected):
    """Mean share of `expected` rows `(N, k)` that stand in the same row of `found`; -1 counts as nothing."""
    hits = [len(np.intersect1d(a[a >= 0], b)) for a, b in zip(found, expected, strict=True)]
    return float(sum(hits) / max(1, expected.size))
