"""
What was retrieved, as pure functions of passage ids: scores of one question, and means over many.

`provenance` is a list of evidence sets, any one of which is enough.
"""

import math

from .intervals import Mean
from .matching import evidence_sets

IN_DOMAIN = ("nq", "fever", "wow", "asqa")  # the evaluation sets whose training part is in the paper's training data (Self-RAG's)

# ---------------------------------------------------------------------- retrieval of one question


def ret(retrieved, provenance):
    """Ret: 1.0 if a gold passage is among the retrieved, else 0.0."""
    return float(not _gold(provenance).isdisjoint(retrieved))


def ret_precision(retrieved, provenance):
    """Ret-P: share of the distinct retrieved passages that are gold; 0.0 where nothing was retrieved, as in the paper's script."""
    distinct = set(retrieved)
    return len(distinct & _gold(provenance)) / len(distinct) if distinct else 0.0


def r_precision(retrieved, provenance):
    """KILT's R-precision: share of an evidence set of R passages that is among the first R distinct retrieved; the best over the sets."""
    distinct = _distinct(retrieved)
    return max(len(evidence.intersection(distinct[: len(evidence)])) / len(evidence) for evidence in evidence_sets(provenance))


def recall_at_k(retrieved, provenance, k):
    """
    KILT's recall@k: share of the evidence sets that are complete among the first `k` places.

    A set takes one place, that of its last-found passage; each passage of no set takes one. A passage that stands in several sets takes a place for each.

    Args:
        retrieved (`list[str]`): ids, best first; repeats are dropped.
        provenance (`list[list[str]]`): evidence sets.
        k (`int`): number of places.

    Returns:
        `float`.
    """
    missing, places = evidence_sets(provenance), []
    for id in _distinct(retrieved):
        holding = [i for i, evidence in enumerate(missing) if id in evidence]
        places.extend([None] * (not holding))
        for i in holding:
            if i in places:
                places.remove(i)  # the set moves to where its last passage was found
            missing[i].discard(id)
            places.append(i)
    return sum(i is not None and not missing[i] for i in places[:k]) / len(missing)


def success_at_k(retrieved, provenance, k):
    """1.0 if a gold passage is among the first `k` distinct retrieved, else 0.0: what retriever tables call recall@k."""
    return ret(_distinct(retrieved)[:k], provenance)


def reciprocal_rank(ranking, provenance):
    """1 / rank of the first gold passage in a ranking, 0.0 where there is none; its mean is the MRR."""
    gold = _gold(provenance)
    return next((1 / rank for rank, id in enumerate(_distinct(ranking), 1) if id in gold), 0.0)


def ndcg(ranking, provenance, k=10):
    """nDCG@k with gain 1 for each gold passage, of any set, and discount log2(1 + rank)."""
    gold = _gold(provenance)
    gain = sum(1 / math.log2(1 + rank) for rank, id in enumerate(_distinct(ranking)[:k], 1) if id in gold)
    return gain / sum(1 / math.log2(1 + rank) for rank in range(1, min(k, len(gold)) + 1))


def retrieval_scores(retrieved, provenance, ks=(1, 5)):
    """
    Everything that the passages retrieved while generating say about one question.

    Args:
        retrieved (`list[str]`): as from [`retrieved_ids`].
        provenance (`list[list[str]]`): evidence sets, not empty.
        ks (`tuple[int]`): for KILT's recall@k.

    Returns:
        `dict[str, float]`: `ret`, `ret_precision`, `r_precision`, `recall@k`.
    """
    scores = {"ret": ret(retrieved, provenance), "ret_precision": ret_precision(retrieved, provenance), "r_precision": r_precision(retrieved, provenance)}
    return scores | {f"recall@{k}": recall_at_k(retrieved, provenance, k) for k in ks}


def ranking_scores(ranking, provenance, ks=(1, 5, 20), ndcg_at=10):
    """
    Everything that a ranking of passages by the query embedding says about one question.

    Returns:
        `dict[str, float]`: `mrr`, `ndcg@…`, `success@k`.
    """
    scores = {"mrr": reciprocal_rank(ranking, provenance), f"ndcg@{ndcg_at}": ndcg(ranking, provenance, ndcg_at)}
    return scores | {f"success@{k}": success_at_k(ranking, provenance, k) for k in ks}


# ---------------------------------------------------------------------- many questions


def emission_rates(pairs):
    """
    How often `[NSP]` is emitted, when the question needs a passage and when not.

    Args:
        pairs (`list[tuple[dict, dict]]`): of [`match_by_id`].

    Returns:
        `dict[str, Mean]`: `needed`, `not_needed`, over the questions of that kind; `n` is 0 where there is none.
    """
    emitted = [(bool(prediction["retrievals"]), any(instance["provenance"])) for prediction, instance in pairs]
    return {"needed": Mean.of(nsp for nsp, needed in emitted if needed), "not_needed": Mean.of(nsp for nsp, needed in emitted if not needed)}


def mean_scores(rows, names=None):
    """
    Means over questions.

    Args:
        rows (`list[dict[str, float]]`): of each question, all with the same names.
        names (`tuple[str]`, *optional*): which to average; all by default.

    Returns:
        `dict[str, float]`; NaN where there is no question and `names` says what is missing.
    """
    return {name: Mean.of(row[name] for row in rows).value for name in names or (rows[0] if rows else ())}


def cor_minus(correct, hits):
    """
    Cor⁻: correctness with wrong retrieval counted as wrong.

    Args:
        correct (`list[float | None]`): correctness of each question.
        hits (`list[float | None]`): Ret of each; `None`, as for questions that need no passage, leaves the question out.

    Returns:
        `list[float | None]`.
    """
    return [None if right is None or hit is None else right * (hit > 0) for right, hit in zip(correct, hits, strict=True)]


def by_retrieval(values, hits):
    """
    A metric where retrieval succeeded and where it failed (appendix C.2).

    Args:
        values (`list[float | None]`), hits (`list[float | None]`): of each question, as for [`cor_minus`].

    Returns:
        `dict[str, Mean]`: `success`, `failure`.
    """
    parts = {"success": lambda hit: hit > 0, "failure": lambda hit: not hit > 0}
    return {name: Mean.of(v for v, hit in zip(values, hits, strict=True) if hit is not None and part(hit)) for name, part in parts.items()}


def domain_averages(values, in_domain=IN_DOMAIN):
    """
    Plain means over data sets.

    Args:
        values (`dict[str, float]`): by dataset.
        in_domain (`tuple[str]`): the datasets whose training part was trained on.

    Returns:
        `dict[str, float | None]`: `in-domain`, `out-of-domain`, `all`; `None` where there is no such dataset.
    """
    groups = {"in-domain": [v for name, v in values.items() if name in in_domain], "out-of-domain": [v for name, v in values.items() if name not in in_domain]}
    return {name: sum(group) / len(group) if group else None for name, group in (groups | {"all": list(values.values())}).items()}


def improvement_rates(values, baseline, in_domain=IN_DOMAIN):
    """
    By how many percent of the baseline a run is better, by dataset and on the averages.

    Args:
        values (`dict[str, float]`), baseline (`dict[str, float]`): by dataset.

    Returns:
        `dict[str, float | None]`: by dataset, and `in-domain`, `out-of-domain`, `all`: the rates of the averages, not averages of the rates. `None` where the
        baseline is 0 or there is no such dataset.

    Raises:
        `ValueError`: when the two hold different datasets: their averages could not be compared.
    """
    if set(values) != set(baseline):
        raise ValueError(f"The runs hold different datasets: {sorted(set(values) ^ set(baseline))} are in only one of them.")
    new, old = values | domain_averages(values, in_domain), baseline | domain_averages(baseline, in_domain)
    return {name: 100 * (new[name] - old[name]) / old[name] if old[name] else None for name in new}


# ---------------------------------------------------------------------- helpers


def _gold(provenance):
    return set().union(*evidence_sets(provenance))


def _distinct(ids):
    return list(dict.fromkeys(ids))
