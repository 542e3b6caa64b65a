"""Figures of an evaluation set: losses and recall over all its distinct passages, and distillation."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

from modeling_cosup.packing_cosup import pad_rows

from .batching import BatchFacts
from .candidate_watch import FLATNESS
from .duplicates import GlobalBatch, global_batch
from .losses import EmbeddingBatch, ReverseBatch, losses_of_scores
from .position_bias import by_candidate, place_sums, without_bias
from .training_args import CoSupTrainingArguments


@dataclass
class DistilledQuery:
    """
    The scores of the K candidates of a query, the best first.

    Args:
        student_scores (`list[float]`): of the retriever, divided by its temperature.
        reader_scores (`list[float]`): of the reader; shares of attention are not corrected for places yet.
        order (`list[int]`): for each place in the reader's row, the number of the candidate that stood there.
    """

    student_scores: list[float]
    reader_scores: list[float]
    order: list[int]


def order_of_queries(facts: Sequence[BatchFacts]) -> np.ndarray:
    """Return `(N,)`: the row of each query of a set, in the order of the instances."""
    numbers: list[int] = []
    for batch_facts in facts:
        first = len(numbers)
        numbers += [first + number for number in batch_facts.query_numbers]
    return np.argsort(np.array(numbers, dtype=np.int64))


def padded(rows: Sequence[Sequence[int]]) -> np.ndarray:
    """Return token ids as one array, padded with -100 on the right."""
    ids, _ = pad_rows(rows, -100)
    return ids.numpy()


def retrieval_metrics(
    query_embeds: np.ndarray,
    passage_embeds: np.ndarray,
    facts: Sequence[BatchFacts],
    embedding_losses: Callable[[EmbeddingBatch], tuple[dict[str, torch.Tensor], torch.Tensor]],
    ks: Sequence[int] = (1, 5),
    chunk_size: int = 1024,
    symmetric: bool = False,
) -> tuple[dict[str, float], np.ndarray, np.ndarray]:
    """
    Return embedding losses and recall of queries over all distinct passages of a set.

    Another passage that is right for a query is neither a negative nor a miss. A tie is a miss. A query without a
    negative cannot miss, so no figure counts it. If there are no more than k passages, there is no `query_recall@k`.

    Args:
        query_embeds (`numpy.ndarray` of shape `(N, h)`), passage_embeds (`numpy.ndarray` of shape `(M, h)`): of all
            batches.
        facts (`Sequence[BatchFacts]`): of the same batches, in the same order.
        embedding_losses (`Callable`): see [`~trainer.losses.embedding_losses`].
        ks (`Sequence[int]`, *optional*, defaults to `(1, 5)`): of `query_recall@k`.
        chunk_size (`int`, *optional*, defaults to 1024): queries that are scored in one call.
        symmetric (`bool`, *optional*, defaults to `False`): each positive also looks for its query among all queries
            of the set, for `reverse_nsp_loss`.

    Returns:
        `(dict, numpy.ndarray, numpy.ndarray)`: `num_passages`, `num_queries` (those that have a negative) and, if
        there are such queries, the mean of each loss and `query_recall@k`, which `first_query_recall@k` and
        `later_query_recall@k` tell apart if an instance has several queries; the rows of the D distinct passages,
        `(D,)`; for each query, the number of its passage among these, `(N,)`.
    """
    merged = _merge(facts)
    batch = global_batch([merged], 0)
    rows = np.flatnonzero(~batch.repeated)  # (D,)
    number_of_group = {int(batch.passage_groups[row]): number for number, row in enumerate(rows)}
    number_of_row = [number_of_group[int(group)] for group in batch.passage_groups]  # among distinct passages
    labels = np.array([number_of_row[label] for label in merged.passage_labels], dtype=np.int64)  # (N,)
    right_queries, right_rows = batch.further_positives  # (P,), (P,)
    right_passages = np.array([number_of_row[row] for row in right_rows], dtype=np.int64)  # (P,)

    passages = torch.from_numpy(passage_embeds[rows])  # (D, h)
    losses: dict[str, list[torch.Tensor]] = {}
    ranks = []
    for start in range(0, max(1, len(labels)), chunk_size):
        queries = torch.from_numpy(query_embeds[start : start + chunk_size])  # (C, h)
        positives = torch.from_numpy(labels[start : start + chunk_size])  # (C,)
        also_right = torch.zeros(len(queries), len(rows), dtype=torch.bool)  # (C, D)
        in_chunk = (right_queries >= start) & (right_queries < start + chunk_size)
        also_right[right_queries[in_chunk] - start, right_passages[in_chunk]] = True
        reverse = _reverse_batch(query_embeds, batch, start, len(queries)) if symmetric else None
        chunk_losses, scores = embedding_losses(EmbeddingBatch(queries, passages, positives, also_right, reverse))
        for name, loss in chunk_losses.items():
            losses.setdefault(name, []).append(loss)
        ranks.append(_ranks(scores, positives))

    compared = torch.from_numpy(batch.has_negatives)  # (N,)
    are_first = torch.tensor([flag for batch_facts in facts for flag in batch_facts.are_first])  # (N,)
    metrics: dict[str, float] = {"num_passages": len(rows), "num_queries": int(compared.sum())}
    if compared.any():
        for name, chunks in losses.items():
            measured = compared
            if name == "reverse_nsp_loss":
                measured = torch.from_numpy(batch.have_wrong_queries[0])
            if measured.any():
                metrics[name] = float(torch.cat(chunks)[measured].mean())
        for k in ks:
            if k >= len(rows):
                continue
            are_hits = torch.cat(ranks) < k  # (N,)
            metrics[f"query_recall@{k}"] = float(are_hits[compared].double().mean())
            for name, queries_of_place in (("first", compared & are_first), ("later", compared & ~are_first)):
                if queries_of_place.any() and not are_first.all():
                    metrics[f"{name}_query_recall@{k}"] = float(are_hits[queries_of_place].double().mean())
    return metrics, rows, labels


def _reverse_batch(query_embeds: np.ndarray, batch: GlobalBatch, start: int, count: int) -> ReverseBatch:
    """Return all queries `(N, h)` of a set, as the positives of `count` of them see them, from number `start`."""
    own, others = batch.queries_of_positives  # (P,), (P,)
    in_chunk = (own >= start) & (own < start + count)
    same_query = torch.zeros(count, len(query_embeds), dtype=torch.bool)  # (C, N)
    same_query[own[in_chunk] - start, others[in_chunk]] = True
    return ReverseBatch(torch.from_numpy(query_embeds), torch.arange(start, start + count), same_query)


def distillation_metrics(
    queries: Sequence[DistilledQuery], args: CoSupTrainingArguments, corrects_places: bool
) -> dict[str, float]:
    """
    Return the mean of the distillation loss and of its figures, by name; nothing without queries.

    Args:
        queries (`list[DistilledQuery]`): of all batches.
        args ([`CoSupTrainingArguments`]): the target.
        corrects_places (`bool`): shares are relative to the mean share of their place over all these queries, so that
            the figures do not depend on how a set is cut into batches. A query is left out if no other has its K.
    """
    students, readers = [], []
    sums = place_sums([query.reader_scores[number] for number in query.order] for query in queries)
    for query in queries:
        scores = query.reader_scores
        if corrects_places:
            relative = without_bias([scores[number] for number in query.order], sums)
            if relative is None:
                continue
            scores = by_candidate(relative, query.order)
        students.append(torch.tensor(query.student_scores))
        readers.append(torch.tensor(scores))
    if not students:
        return {}
    student = pad_sequence(students, batch_first=True)  # (N, K)
    reader = pad_sequence(readers, batch_first=True)  # (N, K)
    mask = pad_sequence([torch.ones(len(row), dtype=torch.bool) for row in students], batch_first=True)  # (N, K)
    losses, distributions = losses_of_scores(student, reader, mask, args)
    values = {"distillation_loss": losses, **distributions.figures()}
    return {name: float(numbers.mean()) for name, numbers in values.items() if name != FLATNESS}


def _merge(facts: Sequence[BatchFacts]) -> BatchFacts:
    """Return the passages and queries of all batches as one batch."""
    merged = BatchFacts()
    for batch_facts in facts:
        first_row = len(merged.passage_keys)
        merged.passage_keys += batch_facts.passage_keys
        merged.positive_keys += batch_facts.positive_keys
        merged.query_keys += batch_facts.query_keys
        merged.query_instance_ids += batch_facts.query_instance_ids
        merged.passage_labels += [first_row + label for label in batch_facts.passage_labels]
    return merged


def _ranks(scores: torch.Tensor, positives: torch.Tensor) -> torch.Tensor:
    """
    Return `(C,)`: how many other passages score at least as high as each query's positive.

    Args:
        scores (`torch.FloatTensor` of shape `(C, D)`): `-inf` for other passages that are right too, so that they do
            not count.
        positives (`torch.LongTensor` of shape `(C,)`): the column of each query's positive.
    """
    positive_scores = scores.gather(1, positives[:, None])  # (C, 1)
    ranks = (~(scores < positive_scores)).sum(1) - 1  # a NaN counts as higher
    return torch.where(positive_scores[:, 0].isfinite(), ranks, scores.shape[1])  # NaN is a miss at every k
