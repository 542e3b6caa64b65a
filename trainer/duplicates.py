"""Find passages of a global batch that are the same or right for a query; sample batches without duplicates."""

import collections
import itertools
from collections import defaultdict
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from .batching import BatchFacts


@dataclass
class GlobalBatch:
    """
    The batch that all ranks make up, as one rank sees it.

    Args:
        facts (`list[BatchFacts]`): of each rank, in rank order.
        rank (`int`): this rank.
        passage_groups (`numpy.ndarray` of shape `(M,)`): equal for identical passages.
        repeated (`numpy.ndarray` of shape `(M,)`): whether an earlier row holds an identical passage.
        further_positives (`numpy.ndarray` of shape `(2, P)`): pairs of a query of this rank and the row of another
            passage that is right for it.
        has_negatives (`numpy.ndarray` of shape `(N,)`): whether a query of this rank has a negative: a passage of the
            batch that is not right for it.
        num_compared (`int`): queries of all ranks that have a negative. The others teach nothing and cannot be wrong,
            so no figure counts them.
        right_groups (`list[list[set[int]]]`): by rank, for each query, the groups of passages that are right for it.
    """

    facts: list[BatchFacts]
    rank: int
    passage_groups: np.ndarray
    repeated: np.ndarray
    further_positives: np.ndarray
    has_negatives: np.ndarray
    num_compared: int
    right_groups: list[list[set[int]]]

    @property
    def passage_counts(self) -> list[int]:
        """The number of passages of each rank."""
        return [len(rank_facts.passage_keys) for rank_facts in self.facts]

    @property
    def first_row(self) -> int:
        """The row of this rank's first passage."""
        return sum(self.passage_counts[: self.rank])

    @property
    def query_counts(self) -> list[int]:
        """The number of queries of each rank."""
        return [len(rank_facts.passage_labels) for rank_facts in self.facts]

    @property
    def first_query(self) -> int:
        """The number of this rank's first query among those of all ranks."""
        return sum(self.query_counts[: self.rank])

    # ------------------------------------------------------------------ passages that look for their query

    @cached_property
    def queries_of_positives(self) -> np.ndarray:
        """
        `(2, P)`: pairs of a query of this rank and the number of any query for which its positive is right.

        Numbers count the queries of all ranks. Each query is paired with itself too.
        """
        pairs = []
        for query, group in enumerate(self._positive_groups[self.rank]):
            pairs += [(query, number) for number in self._queries_of_group[group]]
        return np.array(pairs, dtype=np.int64).reshape(-1, 2).T

    @cached_property
    def have_wrong_queries(self) -> list[np.ndarray]:
        """By rank, `(N,)`: whether there is a query for which the positive of a query is wrong."""
        num_queries = sum(self.query_counts)
        have_wrong_queries = []
        for groups in self._positive_groups:
            wrong = [len(self._queries_of_group[group]) < num_queries for group in groups]
            have_wrong_queries.append(np.array(wrong, dtype=bool))
        return have_wrong_queries

    @property
    def num_reverse_compared(self) -> int:
        """Queries of all ranks whose positive is wrong for another query."""
        return sum(int(wrong.sum()) for wrong in self.have_wrong_queries)

    @cached_property
    def _positive_groups(self) -> list[list[int]]:
        """By rank, for each query, the group of its positive."""
        groups_of_ranks = []
        first_row = 0
        for rank_facts in self.facts:
            groups_of_ranks.append(
                [int(self.passage_groups[first_row + label]) for label in rank_facts.passage_labels]
            )
            first_row += len(rank_facts.passage_keys)
        return groups_of_ranks

    @cached_property
    def _queries_of_group(self) -> dict[int, list[int]]:
        """For each group of passages, the numbers of the queries for which it is right."""
        queries_of_group = defaultdict(list)
        for number, groups in enumerate(itertools.chain(*self.right_groups)):
            for group in groups:
                queries_of_group[group].append(number)
        return queries_of_group


def global_batch(facts: list[BatchFacts], rank: int, mask_duplicates: bool = True) -> GlobalBatch:
    """
    Return the batch that all ranks make up, as one of them sees it.

    Args:
        facts (`list[BatchFacts]`): of each rank.
        rank (`int`): the rank that sees it.
        mask_duplicates (`bool`, *optional*, defaults to `True`): treat passages of equal content as the same, and what
            is right for a query as right for an equal query.

    Raises:
        `ValueError`: if one passage id has two contents, on the same rank or on two; names instances that have them.
    """
    first_rows = np.cumsum([0] + [len(rank_facts.passage_keys) for rank_facts in facts]).tolist()
    keys = [row_keys for rank_facts in facts for row_keys in rank_facts.passage_keys]  # of all M rows
    _check_contents(keys, facts)
    groups = _groups(keys) if mask_duplicates else np.arange(len(keys))
    repeated = np.ones(len(keys), dtype=bool)
    repeated[np.unique(groups, return_index=True)[1]] = False

    groups_of_key = defaultdict(set)
    rows_of_group = defaultdict(list)
    for row, row_keys in enumerate(keys):
        group = int(groups[row])
        rows_of_group[group].append(row)
        for key in row_keys:
            groups_of_key[key].add(group)
    positives_of_query = defaultdict(set)  # groups, by query key
    if mask_duplicates:
        for rank_facts, first_row in zip(facts, first_rows[:-1], strict=True):
            for query_key, label in zip(rank_facts.query_keys, rank_facts.passage_labels, strict=True):
                positives_of_query[query_key].add(int(groups[first_row + label]))

    right_groups = []  # by rank: for each query, the groups of passages that are right for it
    for rank_facts, first_row in zip(facts, first_rows[:-1], strict=True):
        groups_of_queries = []
        for query, label in enumerate(rank_facts.passage_labels):
            query_groups = {int(groups[first_row + label])} | positives_of_query[rank_facts.query_keys[query]]
            for key in rank_facts.positive_keys[query]:
                query_groups |= groups_of_key[key]
            groups_of_queries.append(query_groups)
        right_groups.append(groups_of_queries)

    pairs = []
    for query, label in enumerate(facts[rank].passage_labels):
        for group in sorted(right_groups[rank][query] - {int(groups[first_rows[rank] + label])}):
            pairs += [(query, row) for row in rows_of_group[group]]
    num_groups = len(rows_of_group)
    num_compared = sum(len(query_groups) < num_groups for query_groups in itertools.chain(*right_groups))
    return GlobalBatch(
        facts,
        rank,
        passage_groups=groups,
        repeated=repeated,
        further_positives=np.array(pairs, dtype=np.int64).reshape(-1, 2).T,  # (2, P)
        has_negatives=np.array([len(query_groups) < num_groups for query_groups in right_groups[rank]], dtype=bool),
        num_compared=num_compared,
        right_groups=right_groups,
    )


def _groups(keys: Sequence[Sequence[int]]) -> np.ndarray:
    """Return `(M,)`: for each row, the first row with the same content."""
    first_row: dict[int, int] = {}  # of each content
    return np.array([first_row.setdefault(content, row) for row, (content, *_) in enumerate(keys)], dtype=np.int64)


def _check_contents(keys: Sequence[Sequence[int]], facts: Sequence[BatchFacts]) -> None:
    """Raise if two rows share an id but not their content."""
    first_row: dict[int, int] = {}  # of each id
    for row, (content, *ids) in enumerate(keys):
        for id in ids:
            earlier_row = first_row.setdefault(id, row)
            if keys[earlier_row][0] != content:
                first, second = (_instance_of(passage_row, facts) for passage_row in (earlier_row, row))
                raise ValueError(
                    f"A passage of {first} and a passage of {second} have the same id, but another title or text."
                    " Passages with one id count as the same: give each its own, or leave ids out."
                )


def _instance_of(row: int, facts: Sequence[BatchFacts]) -> str:
    """Return the name of an instance whose query has the passage in `row`, for an error."""
    for rank_facts in facts:
        if row < len(rank_facts.passage_keys):
            for instance_id, label in zip(rank_facts.query_instance_ids, rank_facts.passage_labels, strict=False):
                if label == row:
                    return f"instance {instance_id!r}"
            return "an instance, as a hard negative,"
        row -= len(rank_facts.passage_keys)
    raise IndexError(row)


# ---------------------------------------------------------------------- batches without duplicates


class NoDuplicatesSampler(torch.utils.data.Sampler[int]):
    """
    A sampler that draws instances in a random order, such that no batch names a passage twice.

    An instance that names a passage of the current batch waits for the next batch. When no full batch without
    duplicates is left, the waiting instances follow in their random order.

    Args:
        passages (`Sequence[Collection]`): for each instance, keys of the passages that it names.
        batch_size (`int`): instances of a batch, over all ranks.
        seed (`int`, *optional*, defaults to 0): of the order; every epoch has another.
    """

    def __init__(self, passages: Sequence[Collection[int]], batch_size: int, seed: int = 0) -> None:
        self.passages = passages
        self.batch_size = batch_size
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.passages)

    def __iter__(self) -> Iterator[int]:
        generator = np.random.default_rng([self.seed, self.epoch])
        waiting = collections.deque(generator.permutation(len(self.passages)).tolist())
        while waiting:
            batch = self._take_batch(waiting)
            yield from batch
            if len(batch) < self.batch_size:  # no full batch without duplicates is left
                yield from waiting
                return

    def _take_batch(self, waiting: collections.deque[int]) -> list[int]:
        """Take the first instances of `waiting` that share no passage, up to a batch; the others keep their order."""
        batch: list[int] = []
        passed_over: list[int] = []
        named: set[int] = set()
        while waiting and len(batch) < self.batch_size:
            instance = waiting.popleft()
            if named.isdisjoint(self.passages[instance]):
                batch.append(instance)
                named.update(self.passages[instance])
            else:
                passed_over.append(instance)
        waiting.extendleft(reversed(passed_over))
        return batch
