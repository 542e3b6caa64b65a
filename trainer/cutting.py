"""Cutting rows of tokens into groups of like length, against padding and within limits."""

import numpy as np


def _longest_first(lengths):
    return sorted(range(len(lengths)), key=lambda i: -lengths[i])


def cut_by_tokens(lengths, max_tokens, packed=False):
    """
    Rows, longest first, in groups of at most `max_tokens` tokens, padding to the longest included unless `packed`; a
    longer row is a group of its own.
    """
    groups, tokens = [], 0.0
    for i in _longest_first(lengths):
        tokens += lengths[i] if packed or not groups else lengths[groups[-1][0]]
        if not groups or tokens > max_tokens:
            groups.append([])
            tokens = lengths[i]
        groups[-1].append(i)
    return groups


def cut_by_number(lengths, count):
    """Rows, longest first, in at most `count` groups of equal size."""
    order, size = _longest_first(lengths), max(1, -(-len(lengths) // count))
    return [order[start : start + size] for start in range(0, len(order), size)]


def cut_by_padding(lengths, call_overhead):
    """
    Rows, longest first, in the groups for which padded tokens plus `call_overhead` a group are fewest; one group if it
    is `None`.

    Exact, by dynamic programming: the cheapest cut of the first i rows ends in some group j..i, and row j is the
    longest of it.
    """
    order = _longest_first(lengths)
    if call_overhead is None or len(order) < 2:
        return [order] if order else []
    longest = np.array([lengths[i] for i in order], dtype=np.float64)
    best, previous = np.zeros(len(order) + 1), np.zeros(len(order) + 1, dtype=np.int64)
    for i in range(1, len(order) + 1):
        costs = best[:i] + (i - np.arange(i)) * longest[:i] + call_overhead
        previous[i] = costs.argmin()
        best[i] = costs[previous[i]]
    groups, end = [], len(order)
    while end > 0:
        groups.insert(0, order[previous[end] : end])
        end = int(previous[end])
    return groups
