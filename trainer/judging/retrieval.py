"""
What was retrieved, as pure functions of passage ids: the scores of one question, and what depends on them.

`provenance` is a list of evidence sets, any one of which is enough. MRR and nDCG are a few lines, so ir-measures is not
needed: the tests compare them with torchmetrics.
"""

import math
from collections.abc import Iterable, Sequence

from .intervals import Mean
from .matching import evidence_sets

Provenance = Sequence[Sequence[str]]
Scores = list[float | None]  # of each question; None where the figure does not apply

# ---------------------------------------------------------------------- retrieval of one question


def ret(retrieved: Sequence[str], provenance: Provenance) -> float:
    """Ret: 1.0 if a gold passage is among the retrieved, else 0.0."""
    return float(not _gold(provenance).isdisjoint(retrieved))


def ret_precision(retrieved: Sequence[str], provenance: Provenance) -> float:
    """
    Ret-P: share of the distinct retrieved passages that are gold; 0.0 where nothing was retrieved, as in the paper's
    script.
    """
    distinct = set(retrieved)
    return len(distinct & _gold(provenance)) / len(distinct) if distinct else 0.0


def r_precision(retrieved: Sequence[str], provenance: Provenance) -> float:
    """
    KILT's R-precision: share of an evidence set of R passages that is among the first R distinct retrieved; the best
    set counts.
    """
    distinct = _distinct(retrieved)
    shares = []
    for evidence in evidence_sets(provenance):
        shares.append(len(evidence.intersection(distinct[: len(evidence)])) / len(evidence))
    return max(shares)


def kilt_recall_at_k(retrieved: Sequence[str], provenance: Provenance, k: int) -> float:
    """
    KILT's recall@k: share of the evidence sets that are complete among the first `k` places.

    A set takes one place, where its last-found passage is; each passage of no set takes one. A passage of several sets
    takes a place for each.

    Args:
        retrieved (`list[str]`): ids, best first; repeats are dropped.
        provenance (`list[list[str]]`): evidence sets.
        k (`int`): number of places.
    """
    missing = evidence_sets(provenance)
    places: list[int | None] = []
    for id in _distinct(retrieved):
        holding = [i for i, evidence in enumerate(missing) if id in evidence]
        if not holding:
            places.append(None)
        for i in holding:
            if i in places:
                places.remove(i)  # the set moves to where its last passage was found
            missing[i].discard(id)
            places.append(i)
    return sum(i is not None and not missing[i] for i in places[:k]) / len(missing)


def retrieval_scores(retrieved: Sequence[str], provenance: Provenance, ks: Iterable[int] = (1, 5)) -> dict[str, float]:
    """
    Everything that the passages retrieved while generating say about one question.

    Args:
        retrieved (`list[str]`): as from [`retrieved_ids`].
        provenance (`list[list[str]]`): evidence sets, not empty.
        ks (`tuple[int]`): for KILT's recall@k.

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
    1.0 if a gold passage is among the first `k` distinct passages, else 0.0: what retriever tables call recall@k.
    """
    return ret(_distinct(ranking)[:k], provenance)


def reciprocal_rank(ranking: Sequence[str], provenance: Provenance) -> float:
    """1 / rank of the first gold passage in a ranking, 0.0 where there is none; its mean is the MRR."""
    gold = _gold(provenance)
    return next((1 / rank for rank, id in enumerate(_distinct(ranking), 1) if id in gold), 0.0)


def ndcg(ranking: Sequence[str], provenance: Provenance, k: int = 10) -> float:
    """nDCG@k with gain 1 for each gold passage, of any set, and discount log2(1 + rank)."""
    gold = _gold(provenance)
    gain = sum(1 / math.log2(1 + rank) for rank, id in enumerate(_distinct(ranking)[:k], 1) if id in gold)
    return gain / sum(1 / math.log2(1 + rank) for rank in range(1, min(k, len(gold)) + 1))


def ranking_scores(
    ranking: Sequence[str], provenance: Provenance, ks: Iterable[int] = (1, 5, 20), ndcg_at: int = 10
) -> dict[str, float]:
    """
    Everything that a ranking of passages by the query embedding says about one question.

    Returns:
        `dict[str, float]`: `mrr`, `ndcg@…`, `query_recall@k`.
    """
    scores = {"mrr": reciprocal_rank(ranking, provenance), f"ndcg@{ndcg_at}": ndcg(ranking, provenance, ndcg_at)}
    return scores | {f"query_recall@{k}": query_recall_at_k(ranking, provenance, k) for k in ks}


# ---------------------------------------------------------------------- many questions


def mean_scores(rows: Sequence[dict[str, float]], names: Iterable[str] | None = None) -> dict[str, float]:
    """
    Means over questions.

    Args:
        rows (`list[dict[str, float]]`): of each question, all with the same names.
        names (`tuple[str]`, *optional*): which to average; all by default.

    Returns:
        `dict[str, float]`; NaN where there is no question and `names` says what is missing.
    """
    if names is None:
        names = rows[0] if rows else ()
    return {name: Mean.of(row[name] for row in rows).value for name in names}


def cor_minus(correct: Scores, hits: Scores) -> Scores:
    """
    Cor⁻: correctness with wrong retrieval counted as wrong.

    Args:
        correct (`list[float | None]`): correctness of each question.
        hits (`list[float | None]`): Ret of each; `None`, as for questions that need no passage, leaves the question
            out.
    """
    gated: Scores = []
    for right, hit in zip(correct, hits, strict=True):
        gated.append(None if right is None or hit is None else right * (hit > 0))
    return gated


def by_retrieval(name: str, values: Scores, hits: Scores) -> dict[str, Scores]:
    """
    A figure where retrieval succeeded and where it failed (appendix C.2 of the paper).

    Args:
        name (`str`): of the figure.
        values (`list[float | None]`), hits (`list[float | None]`): of each question, as for [`cor_minus`].

    Returns:
        `dict[str, list[float | None]]`: `…_success` and `…_failure`.
    """
    success, failure = [hit is not None and hit > 0 for hit in hits], [hit is not None and not hit > 0 for hit in hits]
    return {f"{name}_success": only_where(values, success), f"{name}_failure": only_where(values, failure)}


def emission(predictions: Sequence[dict], needed: Sequence[bool], not_needed: Sequence[bool]) -> dict[str, Scores]:
    """
    Whether `[NSP]` was emitted, in questions that need a passage and in questions that need none.

    Args:
        predictions (`list[dict]`): with `retrievals`.
        needed, not_needed (`list[bool]`): of each question; both are false where nobody knows.

    Returns:
        `dict[str, list[float | None]]`: `nsp_needed`, `nsp_not_needed`.
    """
    emitted: Scores = [float(bool(prediction["retrievals"])) for prediction in predictions]
    return {"nsp_needed": only_where(emitted, needed), "nsp_not_needed": only_where(emitted, not_needed)}


def only_where(values: Scores, conditions: Sequence[bool]) -> Scores:
    """The values whose condition holds; `None` in place of the others."""
    return [value if condition else None for value, condition in zip(values, conditions, strict=True)]


# ---------------------------------------------------------------------- helpers


def _gold(provenance: Provenance) -> set[str]:
    return set().union(*evidence_sets(provenance))


def _distinct(ids: Sequence[str]) -> list[str]:
    return list(dict.fromkeys(ids))
