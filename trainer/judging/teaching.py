"""
Measure what a reader would teach a retriever: how often its best passage is gold, and how much each place gets anyway.

The targets have the names of `distillation_target`, see [`~trainer.CoSupTrainingArguments`].
"""

from collections.abc import Sequence

from ..position_bias import place_sums, without_bias


def shares_by_place(shares: Sequence[Sequence[float]]) -> list[float]:
    """
    Return the mean share of attention of each place in the row.

    Args:
        shares (sequence of sequences of `float`): for each instance the shares of its passages, as they were read.

    Returns:
        `list[float]`: of the instances with the most passages; empty without instances.
    """
    if not shares:
        return []
    count, totals = place_sums(shares)[max(map(len, shares))]
    return [total / count for total in totals]


def best_is_gold(scores: Sequence[Sequence[float] | None], gold: Sequence[set[int]]) -> list[float]:
    """
    Return, for each instance with a gold passage, whether its best passage is gold: 1.0 or 0.0. If several passages
    are equally good, it is the share of them that is gold.

    Args:
        scores (sequence): for each instance the scores of its passages; `None` where there are none.
        gold (sequence of sets of `int`): for each instance the numbers of its gold passages.
    """
    hits = []
    for row, gold_numbers in zip(scores, gold, strict=True):
        if row is not None and gold_numbers:
            best = {number for number, score in enumerate(row) if score == max(row)}
            hits.append(len(best & gold_numbers) / len(best))
    return hits


def relative_to_place(shares: Sequence[Sequence[float]]) -> list[list[float] | None]:
    """Return shares relative to the mean share of their place, as `distillation_target="attention"` has them."""
    sums = place_sums(shares)
    return [without_bias(row, sums) for row in shares]
