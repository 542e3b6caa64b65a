"""
Nearest keys of a token datastore by squared L2 distance: a product and a running top-k over blocks of keys.

‖q - k‖² = ‖q‖² - 2 (q·k - ‖k‖²/2): the nearest keys have the largest q·k - ‖k‖²/2, of which ‖k‖²/2 is stored. Where a
distance is small against the norms, this difference of large numbers has few digits left: it is computed again from
q - k. Equal distances are in the order of their rows.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

BLOCK_ROWS = 8192  # keys per product on a CPU: their scores are sorted out while they are in its cache
QUERIES = 512  # queries that are searched together
DEVICE_SCORES = 2**26  # scores, and numbers of keys in float32, that another device holds at a time: 256 MB each
NEAR = 1 / 16  # of ‖q‖² + ‖k‖²: below this distance a product has lost digits
PAIRS = 2**24  # numbers of q - k that are in memory at a time


@dataclass
class KeyShard:
    """
    Consecutive entries of a datastore, in memory, mapped from a file or on a device.

    Args:
        keys (`torch.Tensor` of shape `(n, d)`): float32, float16 or bfloat16.
        half_norms (`torch.FloatTensor` of shape `(n,)`): ‖k‖²/2 of the keys as they are stored.
        values (`torch.IntTensor` of shape `(n,)`): token ids, int32.
        document_starts (`torch.LongTensor` of shape `(D,)`): the shard's entry with which each document begins. A
            document without entries begins with the next document.
    """

    keys: torch.Tensor
    half_norms: torch.Tensor
    values: torch.Tensor
    document_starts: torch.Tensor

    def __len__(self) -> int:
        return len(self.keys)

    def to(self, device: str | torch.device, dtype: torch.dtype | None = None) -> "KeyShard":
        """Return a copy on a device, with keys in `dtype`; `ValueError` for keys that overflow it."""
        keys = self.keys.to(device, copy=True)
        half_norms = self.half_norms.to(device, copy=True)
        if dtype not in (None, keys.dtype):
            keys = stored_keys(keys, dtype)
            half_norms = half_norms_of(keys)
        return KeyShard(keys, half_norms, self.values.to(device, copy=True), self.document_starts)


@dataclass
class Neighbors:
    """
    The nearest entries of n queries, the nearest first.

    Args:
        distances (`torch.FloatTensor` of shape `(n, k)`): squared L2; inf where nothing was found.
        rows (`torch.LongTensor` of shape `(n, k)`): numbers of the entries; -1 where nothing was found.
        values (`torch.LongTensor` of shape `(n, k)`): token ids of the entries; 0 where nothing was found.
    """

    distances: torch.Tensor
    rows: torch.Tensor
    values: torch.Tensor

    def log_weights(self, temperature: float) -> torch.Tensor:
        """Return log softmax(-d²/T) `(n, k)`: the shares of the entries in p_mem."""
        log_weights = (-self.distances / temperature).log_softmax(1)
        return log_weights.masked_fill(self.distances.isinf(), -torch.inf)  # also where nothing at all was found

    def target_log_probs(self, targets: torch.Tensor, temperature: float) -> torch.Tensor:
        """Return log p_mem of one token for each query, `(n,)`; -inf where no entry has this value."""
        others = self.values != targets.to(self.values.device)[:, None]
        return self.log_weights(temperature).masked_fill(others, -torch.inf).logsumexp(1)


def half_norms_of(keys: torch.Tensor) -> torch.Tensor:
    """Return ‖k‖²/2 in float32, `(n,)`, of keys `(n, d)` of any float dtype."""
    return keys.float().square().sum(1) / 2


def stored_keys(keys: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """
    Return keys in the dtype in which they are stored.

    Raises:
        `ValueError`: for keys that are not finite, or overflow the dtype.
    """
    stored = keys.to(dtype)
    if stored.isfinite().all():
        return stored
    if keys.isfinite().all():
        largest = keys.abs().amax().item()
        raise ValueError(f"Keys overflow {dtype}: the largest entry is {largest:.4g}. Store them as dtype='bfloat16'.")
    raise ValueError("Keys are NaN or infinite: check Gen's weights and dtype.")


def exact_search(
    shards: list[KeyShard], queries: torch.Tensor, k: int, exclude_rows: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Find the k nearest entries.

    Args:
        shards (`list[KeyShard]`): all entries.
        queries (`torch.FloatTensor` of shape `(n, d)`): on the device of the shards.
        k (`int`): entries per query, at most as many as there are besides an excluded one.
        exclude_rows (`torch.LongTensor` of shape `(n,)`, *optional*): an entry that each query may not find.

    Returns:
        `(distances, rows)`: `(n, k)`, float32 and int64, in ascending order of distance, then of row.
    """
    results = []
    for start in range(0, max(1, len(queries)), QUERIES):
        excluded = None if exclude_rows is None else exclude_rows[start : start + QUERIES]
        results.append(_search(shards, queries[start : start + QUERIES], k, excluded))
    distances, rows = map(torch.cat, zip(*results, strict=True))
    return distances, rows


def _search(
    shards: list[KeyShard], queries: torch.Tensor, k: int, excluded: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    if not k or not len(queries):
        return queries.new_empty(len(queries), k), queries.new_empty(len(queries), k, dtype=torch.long)
    keep = k + 1  # one more, to see whether rows tie for the last place
    scores = queries.new_empty(len(queries), 0)
    rows = queries.new_empty(len(queries), 0, dtype=torch.long)
    for first_row, block in _scored_blocks(shards, queries, excluded, keep):
        least = scores.amin(1, keepdim=True) if scores.shape[1] == keep else None
        block_scores, columns = _candidates(block, least, keep)
        scores = torch.cat([scores, block_scores], 1)
        rows = torch.cat([rows, columns + first_row], 1)
        if scores.shape[1] > keep:
            best = _largest(scores, keep)
            scores, rows = scores.gather(1, best), rows.gather(1, best)
    tied = torch.zeros(len(queries), dtype=torch.bool, device=queries.device)
    if scores.shape[1] == keep:
        last = scores == scores.amin(1, keepdim=True)
        tied = last.sum(1) > 1
        if tied.all():
            _take_first_of_tied(shards, queries, excluded, scores, rows, last)
    distances = (queries.square().sum(1, keepdim=True) - 2 * scores).clamp_(min=0)
    near = 2 * NEAR * queries.square().sum(1, keepdim=True)  # a near key has nearly the norm of the query
    recompute(shards, queries, distances, rows, distances <= near)
    distances, rows = sort_by_distance(distances, rows)
    distances, rows = distances[:, :k], rows[:, :k]
    if tied.any() and not tied.all():
        # a search of their own, so that all keys are read again for these alone
        excluded_of_tied = None if excluded is None else excluded[tied]
        distances[tied], rows[tied] = _search(shards, queries[tied], k, excluded_of_tied)
    return distances, rows


def _scored_blocks(
    shards: list[KeyShard], queries: torch.Tensor, excluded: torch.Tensor | None, keep: int
) -> Iterator[tuple[int, torch.Tensor]]:
    """Yield q·k - ‖k‖²/2 of blocks of keys, `(n, c)`, with the row of the first; -inf for excluded rows."""
    on_cpu = queries.device.type == "cpu"
    step = BLOCK_ROWS if on_cpu else max(BLOCK_ROWS, DEVICE_SCORES // max(queries.shape))
    first_row = 0
    for shard in shards:
        start = 0
        while start < len(shard):
            # a small first block soon gives a bound for the others, of which few scores are then above it
            count = 2 * keep if on_cpu and first_row + start == 0 else step
            keys, half_norms = shard.keys[start : start + count], shard.half_norms[start : start + count]
            scores = torch.addmm(-half_norms, queries, keys.float().T)
            if excluded is not None:
                columns = excluded - (first_row + start)
                inside = ((columns >= 0) & (columns < len(keys))).nonzero()[:, 0]
                scores[inside, columns[inside]] = -torch.inf
            yield first_row + start, scores
            start += len(keys)
        first_row += len(shard)


def _candidates(scores: torch.Tensor, least: torch.Tensor | None, keep: int) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Return the scores of a block that may be among the `keep` best, and their columns, `(n, m)`, padded with -inf.

    They must beat `least` `(n, 1)`, the worst score so far.
    """
    if least is None or scores.device.type != "cpu":
        columns = _largest(scores, min(keep, scores.shape[1]))
        return scores.gather(1, columns), columns
    # numpy finds the few that are above `least` several times as fast as torch's top-k
    flat = np.flatnonzero(scores.numpy() > least.numpy())
    query, column = np.divmod(flat, scores.shape[1])
    counts = np.bincount(query, minlength=len(scores))
    place = np.arange(len(flat)) - np.repeat(counts.cumsum() - counts, counts)
    best_scores = np.full((len(scores), counts.max()), -np.inf, np.float32)
    best_columns = np.zeros(best_scores.shape, np.int64)
    best_scores[query, place] = scores.numpy().reshape(-1)[flat]
    best_columns[query, place] = column
    return torch.from_numpy(best_scores), torch.from_numpy(best_columns)


def _largest(scores: torch.Tensor, count: int) -> torch.Tensor:
    """Return the columns `(n, count)` of the largest scores `(n, c)`, in any order."""
    if scores.device.type != "cpu":
        return scores.topk(count, sorted=False).indices
    rest = scores.shape[1] - count
    if rest == 0:
        return torch.arange(count).expand(len(scores), -1)
    return torch.from_numpy(np.argpartition(scores.numpy(), rest, axis=1)[:, rest:])  # vectorised, unlike torch's


def _take_first_of_tied(
    shards: list[KeyShard],
    queries: torch.Tensor,
    excluded: torch.Tensor | None,
    scores: torch.Tensor,
    rows: torch.Tensor,
    last: torch.Tensor,
) -> None:
    """
    Replace rows that tie for the last places by the first rows of the same score, in place. All queries have ties.

    The best `scores` and `rows`, and `last`, which of them tie, are of shape `(n, k + 1)`.
    """
    least = scores.amin(1, keepdim=True)
    rows_of_query: dict[int, list[int]] = {}
    # the same queries again, so that every score comes out as before
    for first_row, block in _scored_blocks(shards, queries, excluded, scores.shape[1]):
        for query, column in (block == least).nonzero().tolist():
            rows_of_query.setdefault(query, []).append(first_row + column)
    for query, equal_rows in rows_of_query.items():
        places = last[query].nonzero()[:, 0]
        rows[query, places] = torch.tensor(equal_rows[: len(places)], device=rows.device)


def recompute(
    shards: list[KeyShard], queries: torch.Tensor, distances: torch.Tensor, rows: torch.Tensor, which: torch.Tensor
) -> None:
    """Compute the distances `(n, k)` again from q - k, in place, where `which` `(n, k)` says so; not of row -1."""
    query, column = (which & (rows >= 0)).nonzero().T
    step = max(1, PAIRS // queries.shape[1])
    for start in range(0, len(query), step):
        some, columns = query[start : start + step], column[start : start + step]
        difference = gather_keys(shards, rows[some, columns]).sub_(queries[some])
        distances[some, columns] = difference.square_().sum(1)


def gather_keys(shards: list[KeyShard], rows: torch.Tensor) -> torch.Tensor:
    """Return the keys of some rows `(m,)`, float32 `(m, d)`."""
    keys = torch.empty(len(rows), shards[0].keys.shape[1], device=rows.device)
    for shard, inside, shard_rows in _by_shard(shards, rows):
        keys[inside] = shard.keys[shard_rows].float()
    return keys


def gather_values(shards: list[KeyShard], rows: torch.Tensor) -> torch.Tensor:
    """Return the token ids of some rows, int64 of the shape of `rows`; 0 for row -1."""
    values = torch.zeros_like(rows)
    for shard, inside, shard_rows in _by_shard(shards, rows):
        values[inside] = shard.values[shard_rows].long()
    return values


def _by_shard(shards: list[KeyShard], rows: torch.Tensor) -> Iterator[tuple[KeyShard, torch.Tensor, torch.Tensor]]:
    """Yield each shard with a mask of the rows that it holds, and their places in it."""
    first_row = 0
    for shard in shards:
        inside = (rows >= first_row) & (rows < first_row + len(shard))
        yield shard, inside, rows[inside] - first_row
        first_row += len(shard)


def sort_by_distance(distances: torch.Tensor, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return distances and rows `(n, k)` in ascending order of distance, then of row."""
    if rows.device.type == "cpu":  # numpy sorts several times as fast as torch
        order = torch.from_numpy(rows.numpy().argsort(1))
        distances, rows = distances.gather(1, order), rows.gather(1, order)
        order = torch.from_numpy(distances.numpy().argsort(1, kind="stable"))
        return distances.gather(1, order), rows.gather(1, order)
    rows, order = rows.sort(1)
    distances, order = distances.gather(1, order).sort(dim=1, stable=True)
    return distances, rows.gather(1, order)
