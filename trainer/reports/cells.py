"""Figures, averages and differences as cells of a table, and what a difference amounts to."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, TypeAlias

from ..judging.figures import Measured, figure, shown
from .document import Cell

Verdict: TypeAlias = Literal["ahead", "behind", "more", "fewer", "within noise"]

MISSING = "—"


def verdict(name: str, interval: Sequence[float], differences: Iterable[float] = ()) -> Verdict:
    """
    What a difference of a figure amounts to.

    Args:
        name (`str`): of the figure.
        interval: `(low, high)` of the difference.
        differences: of each seed, where there are several runs.

    Returns:
        `"ahead"` or `"behind"` (of a count: `"more"` or `"fewer"`) where the interval leaves out 0 and every seed is
        on the same side, else `"within noise"`.
    """
    is_count = figure(name).scale == "count"
    low, high = interval
    changes = list(differences)
    if low > 0 and all(change > 0 for change in changes):
        return "more" if is_count else "ahead"
    if high < 0 and all(change < 0 for change in changes):
        return "fewer" if is_count else "behind"
    return "within noise"


def interval_text(interval: Sequence[float], name: str, signed: bool = False) -> str:
    """`[low, high]` as tables show it."""
    low, high = (shown(bound, name, signed) for bound in interval)
    return f"[{low}, {high}]"


def figure_cell(measured: Measured | None, name: str, with_n: bool = False) -> Cell:
    """A value with its interval, and the number of questions where that differs from cell to cell."""
    if measured is None:
        return MISSING
    small = interval_text(measured["interval"], name)
    if with_n:
        small += f" n = {measured['n']}"
    return shown(measured["value"], name), small


def average_cell(average: Mapping[str, Any] | None, name: str, of_tasks: int) -> Cell:
    """An average over tasks with its interval, and in how many tasks it exists where that is not in all of them."""
    if average is None:
        return MISSING
    small = interval_text(average["interval"], name) + _in_tasks(average["tasks"], of_tasks)
    return shown(average["value"], name), small


def seeds_cell(average: Mapping[str, Any] | None, name: str) -> Cell:
    """What `Results.figure` of an experiment found: mean ± deviation over seeds, interval and n over questions."""
    if average is None:
        return MISSING
    value = shown(average["value"], name)
    if average["deviation"] is not None:
        value += f" ± {shown(average['deviation'], name)}"
    interval = interval_text(average["interval"], name)
    return value, f"{interval} n = {average['n']:,}{_in_tasks(average['tasks'], average['of_tasks'])}"


def seeds_difference_cell(difference: Mapping[str, Any] | None, name: str) -> Cell:
    """
    What `Results.compare` of an experiment found: the difference, in brackets in percent of the baseline; interval, n,
    how many seeds are above, equal to and below the baseline, and the verdict.
    """
    if difference is None:
        return MISSING
    value = shown(difference["difference"], name, signed=True)
    if difference["rate"] is not None:
        value += f" ({percent(difference['rate'])})"
    seeds = difference["seeds"].values()
    above = sum(change > 0 for change in seeds)
    below = sum(change < 0 for change in seeds)
    small = f"{interval_text(difference['interval'], name, signed=True)} n = {difference['n']:,}"
    small += _in_tasks(difference["tasks"], difference["of_tasks"])
    return value, f"{small}, {above} / {len(seeds) - above - below} / {below}, {difference['verdict']}"


def percent(rate: float | None) -> str:
    """A rate of improvement, in percent of what is improved."""
    return MISSING if rate is None else f"{rate:+.1f} %"


def _in_tasks(tasks: int, of_tasks: int) -> str:
    return "" if tasks == of_tasks else f", {tasks} of {of_tasks} tasks"
