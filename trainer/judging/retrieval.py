"""
Score retrieval, question by question, with pure functions of passage ids, and split other figures by whether it
succeeded.

`provenance` is a list of evidence sets, and any one of them is enough. MRR and nDCG take a few lines each, so
ir-measures is not a dependency; the tests compare them with torchmetrics.
"""

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from ..questions import evidence_sets
from .intervals import Mean

KILT_KS = (1, 5)  # the k of kilt_recall@k
NDCG_K = 10  # the k of ndcg@k
Provenance = Sequence[Sequence[str]]
Scores = list[float | None]  # one per question; None if the figure does not apply


class Ranking(NamedTuple):
    """
    The passages that are nearest to a query embedding.

    Args:
        ids (`Sequence[str]`): ids of the passages, best first.
        answer_place (`int`, *optional*): see [`~trainer.questions.answer_place`]; `None` if the question has no
            answer to search for.
    """

    ids: Sequence[str]
    answer_place: int | None = None

    @classmethod
    def of(cls, row: dict, scope: str = "corpus") -> "Ranking":
        """Return a ranking of one question, given what [`~trainer.judging.answers.rank_passages`] returned for it."""
        return cls(row[scope], row.get("answer_places", {}).get(scope))


# ---------------------------------------------------------------------- retrieval of one question


def ret(retrieved: Sequence[str], provenance: Provenance) -> float:
    """Return Ret: 1.0 if a gold passage was retrieved, 0.0 otherwise."""
    return float(not _gold(provenance).isdisjoint(retrieved))


def ret_precision(retrieved: Sequence[str], provenance: Provenance) -> float:
    """
    Return Ret-P: the share of the distinct retrieved passages that are gold. As in the paper's script, it is 0.0 if
    nothing was retrieved.
    """
    gold = _gold(provenance)
    distinct = set(retrieved)
    if not distinct:
        return 0.0
    return len(distinct & gold) / len(distinct)


def r_precision(retrieved: Sequence[str], provenance: Provenance) -> float:
    """
    Return KILT's R-precision: the share of an evidence set of R passages that is among the first R distinct retrieved
    passages. The best set counts.
    """
    distinct = _distinct(retrieved)
    shares = []
    for evidence in evidence_sets(provenance):
        hits = evidence.intersection(distinct[: len(evidence)])
        shares.append(len(hits) / len(evidence))
    return max(shares)


def kilt_recall_at_k(retrieved: Sequence[str], provenance: Provenance, k: int) -> float:
    """
    Return KILT's recall@k: the share of the evidence sets that are complete within the first `k` places.

    A set takes one place: where its last passage is found. A passage that belongs to no set takes a place, and a
    passage that belongs to several sets takes one for each of them.

    Args:
        retrieved (`list[str]`): ids, best first; repeats are dropped.
        provenance (`list[list[str]]`): evidence sets.
        k (`int`): number of places.

    Raises:
        `ValueError`: if `provenance` is empty or `k` is not positive.
    """
    _check_k(k)
    missing = evidence_sets(provenance)  # for each set, the ids that are still to be found
    places: list[int | None] = []  # index of the set at each place, None for a passage that belongs to no set
    for id in _distinct(retrieved):
        holding = [number for number, evidence in enumerate(missing) if id in evidence]
        if not holding:
            places.append(None)
        for number in holding:
            if number in places:
                places.remove(number)  # the set moves to where its last passage was found
            missing[number].discard(id)
            places.append(number)
    complete = [number for number in places[:k] if number is not None and not missing[number]]
    return len(complete) / len(missing)


def retrieval_scores(
    retrieved: Sequence[str], provenance: Provenance, ks: Iterable[int] = KILT_KS
) -> dict[str, float]:
    """
    Return all scores of the passages that were retrieved for one question during generation.

    Args:
        retrieved (`list[str]`): ids, see [`~trainer.judging.matching.retrieved_ids`].
        provenance (`list[list[str]]`): evidence sets, not empty.
        ks (`tuple[int]`): the k of KILT's recall@k.

    Returns:
        `dict[str, float]`: `ret`, `ret_precision`, `r_precision`, `kilt_recall@k`.
    """
    scores = {
        "ret": ret(retrieved, provenance),
        "ret_precision": ret_precision(retrieved, provenance),
        "r_precision": r_precision(retrieved, provenance),
    }
    return scores | {f"kilt_recall@{k}": kilt_recall_at_k(retrieved, provenance, k) for k in ks}


# ---------------------------------------------------------------------- the ranking of one query embedding


def query_recall_at_k(ranking: Sequence[str], provenance: Provenance, k: int) -> float:
    """
    Return 1.0 if a gold passage is among the first `k` distinct passages, 0.0 otherwise. Papers on retrievers call
    this recall@k.
    """
    _check_k(k)
    return ret(_distinct(ranking)[:k], provenance)


def reciprocal_rank(ranking: Sequence[str], provenance: Provenance) -> float:
    """Return 1 / rank of the first gold passage, or 0.0 if there is none. The mean over questions is the MRR."""
    gold = _gold(provenance)
    for rank, id in enumerate(_distinct(ranking), 1):
        if id in gold:
            return 1 / rank
    return 0.0


def ndcg(ranking: Sequence[str], provenance: Provenance, k: int = 10) -> float:
    """Return nDCG@k, with gain 1 for each gold passage of any evidence set and discount log2(1 + rank)."""
    _check_k(k)
    gold = _gold(provenance)
    gain = sum(1 / math.log2(1 + rank) for rank, id in enumerate(_distinct(ranking)[:k], 1) if id in gold)
    best_gain = sum(1 / math.log2(1 + rank) for rank in range(1, min(k, len(gold)) + 1))
    return gain / best_gain


def hit_rate_at_k(answer_place: int, k: int) -> float:
    """
    Return 1.0 if one of the first `k` passages holds an answer string, 0.0 otherwise. No gold passage is needed.
    Papers on open-domain questions call this HR@k, top-k accuracy or recall@k.

    Args:
        answer_place (`int`): see [`~trainer.questions.answer_place`].
        k (`int`): number of passages.
    """
    _check_k(k)
    return float(0 < answer_place <= k)


def ranking_scores(
    ranking: Sequence[str], provenance: Provenance, ks: Iterable[int] = (1, 5, 20), ndcg_at: int = NDCG_K
) -> dict[str, float]:
    """
    Return all scores of one question's ranking of passages by the query embedding.

    Args:
        ranking (`list[str]`): ids, best first; repeats are dropped.
        provenance (`list[list[str]]`): evidence sets, not empty.
        ks (`tuple[int]`): the k of `query_recall@k`.
        ndcg_at (`int`): the k of nDCG.

    Returns:
        `dict[str, float]`: `mrr`, `ndcg@{ndcg_at}`, `query_recall@k`.
    """
    scores = {"mrr": reciprocal_rank(ranking, provenance), f"ndcg@{ndcg_at}": ndcg(ranking, provenance, ndcg_at)}
    return scores | {f"query_recall@{k}": query_recall_at_k(ranking, provenance, k) for k in ks}


# ---------------------------------------------------------------------- many questions


def mean_scores(rows: Sequence[dict[str, float]], names: Iterable[str] | None = None) -> dict[str, float]:
    """
    Average scores over questions.

    Args:
        rows (`list[dict[str, float]]`): the scores of each question, all with the same names.
        names (`tuple[str]`, *optional*): the scores to average; all by default.

    Returns:
        `dict[str, float]`: the mean of each score. If there is no question, the mean of each of `names` is NaN.
    """
    if names is None:
        names = rows[0] if rows else ()
    return {name: Mean.of(row[name] for row in rows).value for name in names}


def cor_minus(correct: Scores, hits: Scores) -> Scores:
    """
    Return Cor⁻ of each question: its correctness, or 0.0 if no gold passage was retrieved.

    Args:
        correct (`list[float | None]`): correctness of each question.
        hits (`list[float | None]`): Ret of each question. A question whose Ret is `None`, e.g. because it needs no
            passage, is left out.
    """
    gated: Scores = []
    for correctness, hit in zip(correct, hits, strict=True):
        if correctness is None or hit is None:
            gated.append(None)
        elif hit > 0:
            gated.append(correctness)
        else:
            gated.append(0.0)
    return gated


def by_retrieval(name: str, values: Scores, hits: Scores) -> dict[str, Scores]:
    """
    Split a figure into questions with successful and with failed retrieval (appendix C.2 of the paper).

    Args:
        name (`str`): name of the figure.
        values (`list[float | None]`): the figure of each question.
        hits (`list[float | None]`): Ret of each question, as for [`cor_minus`].

    Returns:
        `dict[str, list[float | None]]`: `{name}_success` and `{name}_failure`.
    """
    success = [hit is not None and hit > 0 for hit in hits]
    failure = [hit is not None and hit <= 0 for hit in hits]
    return {f"{name}_success": only_where(values, success), f"{name}_failure": only_where(values, failure)}


def emission(predictions: Sequence[dict], needed: Sequence[bool], not_needed: Sequence[bool]) -> dict[str, Scores]:
    """
    Return whether `[NSP]` was emitted, separately for questions that need a passage and questions that need none.

    Args:
        predictions (`list[dict]`): with `retrievals`.
        needed, not_needed (`list[bool]`): whether each question needs a passage and whether it needs none. Both are
            false if this is unknown.

    Returns:
        `dict[str, list[float | None]]`: `nsp_needed`, `nsp_not_needed`.
    """
    emitted: Scores = [float(bool(prediction["retrievals"])) for prediction in predictions]
    return {"nsp_needed": only_where(emitted, needed), "nsp_not_needed": only_where(emitted, not_needed)}


def only_where(values: Scores, conditions: Sequence[bool]) -> Scores:
    """Replace the values whose condition is false with `None`."""
    return [value if condition else None for value, condition in zip(values, conditions, strict=True)]


# ---------------------------------------------------------------------- helpers


def _gold(provenance: Provenance) -> set[str]:
    return set().union(*evidence_sets(provenance))


def _check_k(k: int) -> None:
    if k < 1:
        raise ValueError(f"k is {k!r}, expected 1 or more: nothing can be found in the first {k!r} places.")


def _distinct(ids: Sequence[str]) -> list[str]:
    return list(dict.fromkeys(ids))
