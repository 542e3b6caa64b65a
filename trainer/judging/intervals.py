"""
Compute figures with their uncertainty: shares and means with 95 % intervals, averages over tasks, comparisons of runs.

scipy computes Wilson's interval and the bootstrap; this module decides what is resampled. Questions without a value
are left out and counted. Every task weighs the same in an average and is resampled by itself. Two runs are compared
question by question. One question does not show how much a figure varies: the bootstrap's interval is then NaN, or
`None` in results files.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import scipy  # loads scipy.stats only when it is used

from .figures import Measured

Values: TypeAlias = Sequence[float] | np.ndarray

RESAMPLES = 1000
CHUNK = 1 << 22  # number of resampled values in memory at a time: 32 MB, and as much again for their indices
NAN = float("nan")


@dataclass
class Rate:
    """
    A share of `n` questions with its 95 % Wilson interval. Both are NaN if there is no question.

    Args:
        hits (`int`): number of successes.
        n (`int`): number of trials.
    """

    hits: int
    n: int

    @property
    def value(self) -> float:
        """The share, between 0 and 1."""
        return self.hits / self.n if self.n else NAN

    @property
    def interval(self) -> tuple[float, float]:
        """`(low, high)` of the 95 % Wilson score interval."""
        if not self.n:
            return NAN, NAN
        low, high = scipy.stats.binomtest(self.hits, self.n).proportion_ci(0.95, method="wilson")
        return float(low), float(high)

    def to_dict(self) -> Measured:
        """Return the figure as results files hold it."""
        return {"value": self.value, "interval": _known(self.interval), "n": self.n}


@dataclass
class Mean:
    """
    A mean over instances with its 95 % bootstrap interval. Both are NaN if there is no instance; the interval is also
    NaN if there is only one.

    Args:
        sums (sequence of `float`): one per instance: its value, or a sum such as the loss over its tokens.
        weights (sequence of `float`, *optional*): one per instance, such as its number of tokens; 1 by default.
    """

    sums: Values
    weights: Values | None = None

    @classmethod
    def of(cls, values: Iterable[float | None]) -> "Mean":
        """Return the mean over the instances that have a value. `None`, a figure that does not apply, is left out."""
        return cls([float(value) for value in values if value is not None])

    @property
    def n(self) -> int:
        """Number of instances."""
        return len(self.sums)

    @property
    def value(self) -> float:
        """The (weighted) mean."""
        total = self.n if self.weights is None else np.sum(self.weights)
        return float(np.sum(self.sums) / total) if total else NAN

    @property
    def interval(self) -> tuple[float, float]:
        """`(low, high)` of the 95 % percentile bootstrap."""
        if not np.isfinite(self.value):
            return NAN, NAN
        return bootstrap_interval(self.sums, self.weights)

    def to_dict(self) -> Measured:
        """Return the figure as results files hold it."""
        return {"value": self.value, "interval": _known(self.interval), "n": self.n}


# ---------------------------------------------------------------------- the bootstrap


def bootstrap_interval(
    values: Values, weights: Values | None = None, resamples: int = RESAMPLES, seed: int = 0
) -> tuple[float, float]:
    """
    Return the 95 % percentile bootstrap interval `(low, high)` of a mean, NaN if there are fewer than two values. For
    the arguments see [`resampled_means`].
    """
    if not len(values):
        return NAN, NAN
    return _percentiles(resampled_means(values, weights, resamples, seed))


def resampled_means(
    values: Values, weights: Values | None = None, resamples: int = RESAMPLES, seed: int = 0
) -> np.ndarray:
    """
    Return the (weighted) mean of each resample: `n` draws from the `n` values, with replacement.

    Args:
        values (of shape `(n,)`): the values, or with `weights` sums that are already multiplied by their weights.
        weights (of shape `(n,)`, *optional*): the sum of the drawn values is divided by the sum of their weights.
        resamples (`int`): number of resamples.
        seed (`int`): the same seed gives the same means.

    Returns:
        `numpy.ndarray` of shape `(resamples,)`, float64; NaN if there is a single value, as nothing shows how much it
        would vary.

    Raises:
        `ValueError`: if a value is not a finite number.
    """
    values = _finite(values, "values")
    if len(values) == 1:
        return np.full(resamples, NAN)
    if weights is None:
        if (values == values[0]).all():
            return np.full(resamples, values[0])
        columns: tuple[np.ndarray, ...] = (values,)
        statistic: Callable = np.mean
    else:
        weights = _finite(weights, "weights")
        columns = (values, weights)
        statistic = _weighted_mean
    drawn = scipy.stats.bootstrap(
        columns,
        statistic,
        paired=weights is not None,
        vectorized=True,
        n_resamples=resamples,
        batch=max(1, CHUNK // len(values)),
        method="percentile",
        rng=seed,
    )
    return drawn.bootstrap_distribution


def average(columns: Iterable[Iterable[float | None]]) -> dict | None:
    """
    Return the plain mean over tasks of the mean over each task's questions.

    Args:
        columns: the scores of each task's questions; `None` for a question to which the figure does not apply.

    Returns:
        `{"value", "interval", "n", "tasks"}`: the 95 % interval comes from resampling the questions within each task
        (`None` if a task has a single value), `n` counts questions, and `tasks` counts the tasks to which the figure
        applies. `None` if there is no such task.
    """
    task_values = []
    for column in columns:
        values = [value for value in column if value is not None]
        if values:
            task_values.append(np.array(values, float))
    if not task_values:
        return None
    interval = _percentiles(_resampled_average(task_values, RESAMPLES, seed=0))
    n = sum(len(values) for values in task_values)
    return {"value": _average_value(task_values), "interval": _known(interval), "n": n, "tasks": len(task_values)}


# ---------------------------------------------------------------------- two runs


@dataclass
class Comparison:
    """
    The difference between two runs, second minus first.

    Args:
        difference (`float`): difference of the means.
        interval (`tuple[float, float]`): its 95 % interval; NaN if a task has a single instance.
        p_value (`float`): two-sided: how often runs that do not differ show a difference at least as large; NaN if the
            interval is.
        n (`int`): number of instances that have a value in both runs.
        left_out (`int`): number of instances that do not.
    """

    difference: float
    interval: tuple[float, float]
    p_value: float
    n: int
    left_out: int = 0

    def to_dict(self) -> dict:
        """Return the comparison as results files hold it."""
        return {
            "difference": self.difference,
            "interval": _known(self.interval),
            "p_value": self.p_value if np.isfinite(self.p_value) else None,
            "n": self.n,
            "left_out": self.left_out,
        }


def paired_bootstrap(
    first: dict[str, float | None], second: dict[str, float | None], resamples: int = 10_000, seed: int = 0
) -> Comparison:
    """
    Compare two runs instance by instance, with the bootstrap of their differences.

    Args:
        first, second (`dict[str, float | None]`): id of each instance -> its value, `None` if the figure does not
            apply.
        resamples (`int`): number of resamples.
        seed (`int`): the same seed gives the same comparison.

    Returns:
        [`Comparison`] of `second - first`.

    Raises:
        `ValueError`: if the runs do not hold the same ids, with counts, or if no instance has a value in both.
    """
    only_first = first.keys() - second.keys()
    only_second = second.keys() - first.keys()
    if only_first or only_second:
        examples = sorted(map(str, only_first | only_second))[:3]
        raise ValueError(
            f"The runs hold different instances: {len(only_first)} ids are only in the first, {len(only_second)} only "
            f"in the second, {len(first.keys() & second.keys())} in both; e.g. {examples}."
        )
    pairs = [(first[id], second[id]) for id in first]
    differences = [new - old for old, new in pairs if old is not None and new is not None]
    if not differences:
        raise ValueError(f"None of the {len(first)} instances has a value in both runs: there is nothing to compare.")
    comparison = compare_differences([differences], resamples, seed)
    comparison.left_out = len(pairs) - len(differences)
    return comparison


def compare_differences(columns: Sequence[Values], resamples: int = 10_000, seed: int = 0) -> Comparison:
    """
    Compare the plain mean over tasks of paired differences with 0.

    The p-value is the share of resampled means that are at least as far from the measured mean as that is from 0. One
    is added to both counts, so it is never 0.

    Args:
        columns: the differences of each task's instances, at least one per task.
        resamples (`int`): number of resamples.
        seed (`int`): the same seed gives the same comparison.
    """
    arrays = [_finite(column, "differences") for column in columns]
    measured = _average_value(arrays)
    means = _resampled_average(arrays, resamples, seed)
    rounding = 1e-12
    num_as_far = int((np.abs(means - measured) >= abs(measured) - rounding).sum())
    p_value = (1 + num_as_far) / (1 + resamples) if np.isfinite(means).all() else NAN
    n = sum(len(column) for column in arrays)
    return Comparison(measured, _percentiles(means), p_value, n)


def mean_and_deviation(values: Values) -> tuple[float, float]:
    """Return `(mean, sample standard deviation)` over seeds; the deviation of a single seed is NaN."""
    array = _finite(values, "values")
    if not len(array):
        raise ValueError("There is no seed to average over.")
    deviation = float(array.std(ddof=1)) if len(array) > 1 else NAN
    return float(array.mean()), deviation


# ---------------------------------------------------------------------- helpers


def _weighted_mean(sums: np.ndarray, weights: np.ndarray, axis: int) -> np.ndarray:
    return sums.sum(axis) / weights.sum(axis)


def _average_value(columns: list[np.ndarray]) -> float:
    return float(np.mean([column.mean() for column in columns]))


def _resampled_average(columns: list[np.ndarray], resamples: int, seed: int) -> np.ndarray:
    """Return averages over tasks, of shape `(resamples,)`; each task is resampled by itself."""
    means = [resampled_means(column, None, resamples, seed + number) for number, column in enumerate(columns)]
    return np.mean(means, 0)


def _percentiles(means: np.ndarray) -> tuple[float, float]:
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)


def _known(interval: tuple[float, float]) -> list[float] | None:
    """Return an interval as results files hold it."""
    return list(interval) if np.isfinite(interval).all() else None


def _finite(values: Values, name: str) -> np.ndarray:
    array = np.asarray(values, dtype=np.float64)
    num_bad = int((~np.isfinite(array)).sum())
    if num_bad:
        raise ValueError(f"{num_bad} of {len(array)} {name} are NaN or infinite.")
    return array
