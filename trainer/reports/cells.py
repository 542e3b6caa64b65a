"""Table cells for figures, averages and differences, and the verdict on a difference."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, TypeAlias

from ..judging.figures import MISSING, NEUTRAL, Measured, figure, shown, shown_interval
from .document import Cell

Verdict: TypeAlias = Literal["ahead", "behind", "more", "fewer", "within noise"]


def verdict(name: str, interval: Sequence[float] | None, differences: Iterable[float] = ()) -> Verdict:
    """
    Return the verdict on a difference between two runs, or between the runs of several seeds.

    Args:
        name (`str`): name of the figure.
        interval (`Sequence[float]`, *optional*): `(low, high)`, the interval of the difference; `None` if it is not
            known, because there are too few questions.
        differences (`Iterable[float]`, *optional*): the difference on each seed, if there are several seeds.

    Returns:
        `str`: `"ahead"` or `"behind"` (`"more"` or `"fewer"`, see [`direction`]) if the interval excludes 0 and all
        seeds agree on the sign. Otherwise `"within noise"`.
    """
    if interval is None:
        return "within noise"
    low, high = interval
    changes = list(differences)
    if low > 0 and all(change > 0 for change in changes):
        return direction(name, low)
    if high < 0 and all(change < 0 for change in changes):
        return direction(name, high)
    return "within noise"


def direction(name: str, difference: float) -> Verdict:
    """
    Return `"ahead"` or `"behind"` for a difference of a figure of which more is better. For any other, such as a
    count, a loss or the share of needless retrievals, return `"more"` or `"fewer"`.
    """
    if figure(name).scale != "share" or name in NEUTRAL:
        return "more" if difference > 0 else "fewer"
    return "ahead" if difference > 0 else "behind"


def figure_cell(measured: Measured | None, name: str, with_n: bool = False) -> Cell:
    """Return a value with its interval and, if `with_n`, the number of questions."""
    if measured is None:
        return MISSING
    small = shown_interval(measured["interval"], name)
    if with_n:
        small += f" n = {measured['n']}"
    return shown(measured["value"], name), small


def average_cell(average: Mapping[str, Any] | None, name: str, of_tasks: int) -> Cell:
    """Return an average over tasks with its interval, and its number of tasks if that is not `of_tasks`."""
    if average is None:
        return MISSING
    small = shown_interval(average["interval"], name) + _task_count(average["tasks"], of_tasks)
    return shown(average["value"], name), small


def seeds_cell(average: Mapping[str, Any] | None, name: str) -> Cell:
    """
    Return a figure over seeds, computed by [`~trainer.reports.experiment_figures.Results.figure`]: mean and standard
    deviation over seeds, the interval and n over questions, and the numbers of tasks and seeds if some are missing.
    """
    if average is None:
        return MISSING
    value = shown(average["value"], name)
    if average["deviation"] is not None:
        value += f" ± {shown(average['deviation'], name)}"
    interval = shown_interval(average["interval"], name)
    return value, f"{interval} n = {average['n']:,}{_task_and_seed_counts(average)}"


def seeds_difference_cell(difference: Mapping[str, Any] | None, name: str) -> Cell:
    """
    Return a difference, computed by [`~trainer.reports.experiment_figures.Results.compare`]: the difference (in
    brackets, in percent of the baseline), then the interval, n, the number of questions that have a value in only one
    of the two, the numbers of tasks and seeds if some are missing, the numbers of seeds above, equal to and below the
    baseline, and the verdict.
    """
    if difference is None:
        return MISSING
    value = shown(difference["difference"], name, signed=True)
    if difference["rate"] is not None:
        value += f" ({percent(difference['rate'])})"
    changes = difference["seeds"].values()
    above = sum(change > 0 for change in changes)
    below = sum(change < 0 for change in changes)
    equal = len(changes) - above - below
    small = f"{shown_interval(difference['interval'], name, signed=True)} n = {difference['n']:,}"
    if difference["left_out"]:
        small += f" ({difference['left_out']:,} left out)"
    small += _task_and_seed_counts(difference)
    return value, f"{small}, {above} / {equal} / {below}, {difference['verdict']}"


def percent(rate: float | None) -> str:
    """Return a rate of improvement, in percent of the baseline."""
    return MISSING if rate is None else f"{rate:+.1f} %"


def shown_p(p_value: float | None) -> str:
    """Format a p-value for tables, or a dash if it is not known."""
    if p_value is None:
        return MISSING
    return "< 0.001" if p_value < 0.001 else f"{p_value:.3f}"


def _task_and_seed_counts(measured: Mapping[str, Any]) -> str:
    """Return the numbers of tasks and seeds of a figure or a difference over seeds, each if some are missing."""
    counts = _task_count(measured["tasks"], measured["of_tasks"])
    if len(measured["seeds"]) != measured["of_seeds"]:
        counts += f", {len(measured['seeds'])} of {measured['of_seeds']} seeds"
    return counts


def _task_count(tasks: int, of_tasks: int) -> str:
    return "" if tasks == of_tasks else f", {tasks} of {of_tasks} tasks"
