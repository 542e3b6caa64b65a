"""Which passages of a batch over all ranks are the same or right for a query, and an order without duplicates."""

from dataclasses import dataclass

import numpy as np
import torch

from .batching import BatchFacts


@dataclass
class GlobalBatch:
    """
    What one rank must know of the batch that all ranks make up.

    Args:
        facts (`list[BatchFacts]`): of each rank, in rank order.
        rank (`int`): this one.
        passage_groups (`numpy.ndarray` of shape `(M,)`): equal for identical passages.
        repeated (`numpy.ndarray` of shape `(M,)`): whether an earlier row holds an identical passage.
        no_negatives (`numpy.ndarray` of shape `(2, P)`): pairs of one of this rank's queries and the row of another
            passage that is right for it.
    """

    facts: list[BatchFacts]
    rank: int
    passage_groups: np.ndarray
    repeated: np.ndarray
    no_negatives: np.ndarray

    @property
    def passage_counts(self) -> list[int]:
        """Passages of each rank."""
        return [len(rank_facts.passage_keys) for rank_facts in self.facts]

    @property
    def first_row(self) -> int:
        """Where the passages of this rank begin."""
        return sum(self.passage_counts[: self.rank])


def global_batch(facts, rank, mask_duplicates=True):
    """
    The batch that all ranks make up.

    Args:
        facts (`list[BatchFacts]`): of each rank.
        rank (`int`): whose view it is.
        mask_duplicates (`bool`): passages that share a key are the same, and what is right for a query is right for
            an equal one.

    Returns:
        [`GlobalBatch`].
    """
    starts = np.cumsum([0] + [len(rank_facts.passage_keys) for rank_facts in facts]).tolist()
    keys = [row_keys for rank_facts in facts for row_keys in rank_facts.passage_keys]
    groups = _groups(keys) if mask_duplicates else np.arange(len(keys))
    repeated = np.ones(len(keys), dtype=bool)
    repeated[np.unique(groups, return_index=True)[1]] = False
    rows_of_key, rows_of_group, right = {}, {}, {}
    for row, row_keys in enumerate(keys):
        rows_of_group.setdefault(int(groups[row]), []).append(row)
        for key in row_keys:
            rows_of_key.setdefault(key, []).append(row)
    if mask_duplicates:
        for rank_facts, start in zip(facts, starts[:-1], strict=True):
            for key, label in zip(rank_facts.query_keys, rank_facts.passage_labels, strict=True):
                right.setdefault(key, set()).add(int(groups[start + label]))
    pairs, mine = [], facts[rank]
    for query, label in enumerate(mine.passage_labels):
        others = set(right.get(mine.query_keys[query], ()))
        others |= {int(groups[row]) for key in mine.positive_keys[query] for row in rows_of_key.get(key, ())}
        others.discard(int(groups[starts[rank] + label]))
        pairs += [(query, row) for group in sorted(others) for row in rows_of_group[group]]
    return GlobalBatch(facts, rank, groups, repeated, np.array(pairs, dtype=np.int64).reshape(-1, 2).T)


def _groups(keys):
    """`(M,)`: a number for each row, equal for rows that share a key, directly or through others (union-find)."""
    parent, owner = list(range(len(keys))), {}

    def find(row):
        while parent[row] != row:
            parent[row] = parent[parent[row]]
            row = parent[row]
        return row

    for row, row_keys in enumerate(keys):
        for key in row_keys:
            first, second = sorted((find(owner.setdefault(key, row)), find(row)))
            parent[second] = first
    return np.array([find(row) for row in range(len(keys))], dtype=np.int64)


# ---------------------------------------------------------------------- batches without duplicates


class NoDuplicatesSampler(torch.utils.data.Sampler):
    """
    A random order of the instances in which no batch names a passage twice.

    An instance that names a passage of the batch waits for the next one. When only such instances are left, they come
    as they are.

    Args:
        passages (`list[list]`): for each instance, what tells its passages apart.
        batch_size (`int`): instances of the batch that all ranks make up.
        seed (`int`): of the order; every epoch has another.
    """

    def __init__(self, passages, batch_size, seed=0):
        self.passages, self.batch_size, self.seed, self.epoch = passages, batch_size, seed, 0

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __len__(self):
        return len(self.passages)

    def __iter__(self):
        waiting = np.random.default_rng([self.seed, self.epoch]).permutation(len(self.passages)).tolist()
        while waiting:
            batch, taken, rest = [], set(), []
            for position, i in enumerate(waiting):
                if taken.isdisjoint(self.passages[i]):
                    batch.append(i)
                    taken.update(self.passages[i])
                else:
                    rest.append(i)
                if len(batch) == self.batch_size:
                    rest += waiting[position + 1 :]
                    break
            yield from batch if len(batch) == self.batch_size else batch + rest
            waiting = rest if len(batch) == self.batch_size else []
