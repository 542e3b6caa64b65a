"""Cut rows of tokens into groups of similar length, to save padding and to stay within limits."""

from collections.abc import Sequence

import numpy as np


def cut_by_tokens(lengths: Sequence[int], max_tokens: float, packed: bool = False) -> list[list[int]]:
    """
    Group rows, longest first, so that no group has more than `max_tokens` tokens.

    Padding to the longest row of a group counts, unless the rows are `packed`. A row that is longer than the limit
    gets a group to itself.
    """
    groups: list[list[int]] = []
    tokens = 0.0
    for row in _longest_first(lengths):
        if packed or not groups:
            tokens += lengths[row]
        else:
            tokens += lengths[groups[-1][0]]  # padded to the longest row of its group
        if not groups or tokens > max_tokens:
            groups.append([])
            tokens = lengths[row]
        groups[-1].append(row)
    return groups


def cut_by_number(lengths: Sequence[int], count: int) -> list[list[int]]:
    """Group rows, longest first, in at most `count` groups of equal size."""
    order = _longest_first(lengths)
    size = max(1, -(-len(order) // count))
    return [order[start : start + size] for start in range(0, len(order), size)]


def cut_by_padding(lengths: Sequence[int], call_overhead: int | None) -> list[list[int]]:
    """
    Group rows, longest first, so that padded tokens plus `call_overhead` tokens per group are fewest.

    With `None` there is one group. The result is exact, by dynamic programming: the cheapest cut of the first i rows
    ends in some group j..i, and row j is the longest row of that group.
    """
    order = _longest_first(lengths)
    if not order:
        return []
    if call_overhead is None or len(order) == 1:
        return [order]
    longest = np.array([lengths[row] for row in order], dtype=np.float64)
    best = np.zeros(len(order) + 1)  # cost of the cheapest cut of the first i rows
    starts = np.zeros(len(order) + 1, dtype=np.int64)  # where the last group of that cut begins
    for i in range(1, len(order) + 1):
        costs = best[:i] + (i - np.arange(i)) * longest[:i] + call_overhead
        starts[i] = costs.argmin()
        best[i] = costs[starts[i]]
    groups: list[list[int]] = []
    end = len(order)
    while end > 0:
        start = int(starts[end])
        groups.insert(0, order[start:end])
        end = start
    return groups


def _longest_first(lengths: Sequence[int]) -> list[int]:
    return sorted(range(len(lengths)), key=lambda row: -lengths[row])
