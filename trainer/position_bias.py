"""
The bias of a reader for places: it attends most to the last passage, and then to the first one, whatever they hold.

In a deep reader this outweighs what a passage says about the answer. So a share of attention is compared with the mean
share of its place, over the instances of a step on all ranks, or over an evaluation set.
"""

from collections.abc import Iterable, Mapping, Sequence

Sums = dict[int, tuple[int, list[float]]]  # for each K: instances with K passages, and the sum of shares at each place


def place_sums(shares: Iterable[Sequence[float]]) -> Sums:
    """
    Return how many instances have how many passages, and the sum of their shares at each place.

    Args:
        shares (`list[list[float]]`): for each instance the shares of its passages, as the reader read them.
    """
    sums: Sums = {}
    for row in shares:
        count, totals = sums.get(len(row), (0, [0.0] * len(row)))
        sums[len(row)] = count + 1, [total + share for total, share in zip(totals, row, strict=True)]
    return sums


def added(parts: Iterable[Sums]) -> Sums:
    """Return the sums of several ranks, added."""
    sums: Sums = {}
    for part in parts:
        for k, (part_count, part_totals) in part.items():
            count, totals = sums.get(k, (0, [0.0] * k))
            sums[k] = count + part_count, [total + other for total, other in zip(totals, part_totals, strict=True)]
    return sums


def without_bias(shares: Sequence[float], sums: Mapping[int, tuple[int, Sequence[float]]]) -> list[float] | None:
    """
    Return shares relative to the mean share of their place, scaled to sum to 1.

    Args:
        shares (`list[float]`): of the K passages of an instance.
        sums (`dict`): of all instances of the step, this one included, as [`place_sums`] returns them.

    Returns:
        `list[float]`, or `None` for the only instance with K passages: its place and content cannot be told apart.
    """
    count, totals = sums[len(shares)]
    if count == 1:
        return None
    ratios = [share / total if total else 0.0 for share, total in zip(shares, totals, strict=True)]
    return [ratio / sum(ratios) for ratio in ratios]


def by_candidate(scores: Sequence[float], order: Sequence[int]) -> list[float]:
    """
    Return scores in the order of the candidates.

    Args:
        scores (`list[float]`): in the order in which the reader read.
        order (`list[int]`): for each place in the reader's row, the number of the candidate that stood there.
    """
    score_of_candidate = dict(zip(order, scores, strict=True))
    return [score_of_candidate[number] for number in range(len(scores))]
