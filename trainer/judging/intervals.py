"""
Figures with their uncertainty: shares and means with 95 % intervals, averages over tasks, the comparison of two runs.

Wilson's interval and the bootstrap: scipy computes both; this module decides what is resampled. Questions without a
value are left out and counted, every task weighs the same in an average and is resampled by itself, and two runs are
compared question by question.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import scipy  # scipy.stats loads on first use

from .figures import Measured

Values: TypeAlias = Sequence[float] | np.ndarray

RESAMPLES = 1000
CHUNK = 1 << 22  # resampled values that are held at a time: 32 MB, and as much again for their places
NAN = float("nan")


@dataclass
class Rate:
    """
    A share of `n` questions with its 95 % Wilson interval. NaN where there is no question.

    Args:
        hits (`int`), n (`int`): successes and trials.
    """

    hits: int
    n: int

    @property
    def value(self) -> float:
        return self.hits / self.n if self.n else NAN

    @property
    def interval(self) -> tuple[float, float]:
        """`(low, high)` of the 95 % Wilson score interval."""
        if not self.n:
            return NAN, NAN
        low, high = scipy.stats.binomtest(self.hits, self.n).proportion_ci(0.95, method="wilson")
        return float(low), float(high)

    def to_dict(self) -> Measured:
        return {"value": self.value, "interval": list(self.interval), "n": self.n}


@dataclass
class Mean:
    """
    A mean over instances with its 95 % bootstrap interval. NaN where there is no instance.

    Args:
        sums (`list[float]`): of each instance its value, or e.g. its summed loss.
        weights (`list[float]`, *optional*): of each instance e.g. its number of tokens; 1 by default.
    """

    sums: Values
    weights: Values | None = None

    @classmethod
    def of(cls, values: Iterable[float | None]) -> "Mean":
        """The mean over the instances that have a value: `None`, where the figure does not apply, is left out."""
        return cls([float(value) for value in values if value is not None])

    @property
    def n(self) -> int:
        """Number of instances."""
        return len(self.sums)

    @property
    def value(self) -> float:
        total = self.n if self.weights is None else np.sum(self.weights)
        return float(np.sum(self.sums) / total) if total else NAN

    @property
    def interval(self) -> tuple[float, float]:
        """`(low, high)` of the 95 % percentile bootstrap."""
        if not np.isfinite(self.value):
            return NAN, NAN
        return bootstrap_interval(self.sums, self.weights)

    def to_dict(self) -> Measured:
        return {"value": self.value, "interval": list(self.interval), "n": self.n}


# ---------------------------------------------------------------------- the bootstrap


def bootstrap_interval(
    values: Values, weights: Values | None = None, resamples: int = RESAMPLES, seed: int = 0
) -> tuple[float, float]:
    """
    95 % percentile bootstrap interval of a mean, `(low, high)`; see [`resampled_means`] for the arguments. NaN where
    there is no value.
    """
    if not len(values):
        return NAN, NAN
    return _percentiles(resampled_means(values, weights, resamples, seed))


def resampled_means(
    values: Values, weights: Values | None = None, resamples: int = RESAMPLES, seed: int = 0
) -> np.ndarray:
    """
    (Weighted) means of draws of as many values as there are, with replacement.

    Args:
        values (of shape `(n,)`): with `weights` they are sums, already multiplied by their weight.
        weights (of shape `(n,)`, *optional*): what the drawn sums are divided by.
        resamples (`int`), seed (`int`): the same seed gives the same means.

    Returns:
        `numpy.ndarray` of shape `(resamples,)`, float64.

    Raises:
        `ValueError`: when a value is not a finite number.
    """
    values = _finite(values, "values")
    if weights is None:
        if (values == values[0]).all():  # also a single value, which scipy refuses
            return np.full(resamples, values[0])
        columns: tuple[np.ndarray, ...] = (values,)
        statistic: Callable = np.mean
    else:
        weights = _finite(weights, "weights")
        if len(values) == 1:
            return np.full(resamples, values[0] / weights[0])
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
    The plain mean over tasks of the mean over each task's questions.

    Args:
        columns: the scores of each task's questions; `None` where the figure does not apply.

    Returns:
        `{"value", "interval", "n", "tasks"}`: the 95 % interval is by resampling the questions within each task; `n`
        counts questions; `tasks` counts the tasks in which the figure applies. `None` when there is none.
    """
    applied = [np.array([value for value in column if value is not None], float) for column in columns]
    applied = [column for column in applied if len(column)]
    if not applied:
        return None
    interval = _percentiles(_resampled_average(applied, RESAMPLES, seed=0))
    n = sum(len(column) for column in applied)
    return {"value": _average_value(applied), "interval": list(interval), "n": n, "tasks": len(applied)}


# ---------------------------------------------------------------------- two runs


@dataclass
class Comparison:
    """
    Two runs, second minus first.

    Args:
        difference (`float`), interval (`tuple[float, float]`): of the means, with its 95 % interval.
        p_value (`float`): two-sided: how often a difference as large shows up between runs that do not differ.
        n (`int`): instances that both runs have a value for.
        left_out (`int`): instances for which one of them has none.
    """

    difference: float
    interval: tuple[float, float]
    p_value: float
    n: int
    left_out: int = 0

    def to_dict(self) -> dict:
        return {
            "difference": self.difference,
            "interval": list(self.interval),
            "p_value": self.p_value,
            "n": self.n,
            "left_out": self.left_out,
        }


def paired_bootstrap(
    first: dict[str, float | None], second: dict[str, float | None], resamples: int = 10_000, seed: int = 0
) -> Comparison:
    """
    Whether the second run is better than the first: the bootstrap of their differences, instance by instance.

    Args:
        first, second (`dict[str, float | None]`): id of an instance -> its value; `None` where the figure does not
            apply.
        resamples (`int`), seed (`int`): the same seed gives the same answer.

    Returns:
        [`Comparison`] of `second - first`.

    Raises:
        `ValueError`: with counts, when the two do not hold the same ids, or no instance has a value in both.
    """
    only_first, only_second = first.keys() - second.keys(), second.keys() - first.keys()
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
    compared = compare_differences([differences], resamples, seed)
    compared.left_out = len(pairs) - len(differences)
    return compared


def compare_differences(columns: Sequence[Values], resamples: int = 10_000, seed: int = 0) -> Comparison:
    """
    The plain mean over tasks of paired differences, against 0.

    The p-value counts the resampled means that are as far from the measured one as that is from 0, plus one in both
    counts, so it is never 0.

    Args:
        columns: the differences of each task's instances; no column is empty.
        resamples (`int`), seed (`int`): the same seed gives the same answer.
    """
    arrays = [_finite(column, "differences") for column in columns]
    measured = _average_value(arrays)
    means = _resampled_average(arrays, resamples, seed)
    rounding = 1e-12
    as_far = int((np.abs(means - measured) >= abs(measured) - rounding).sum())
    n = sum(len(column) for column in arrays)
    return Comparison(measured, _percentiles(means), (1 + as_far) / (1 + resamples), n)


def mean_and_deviation(values: Values) -> tuple[float, float]:
    """`(mean, sample standard deviation)` over seeds; the deviation, with n - 1, of a single seed is NaN."""
    array = _finite(values, "values")
    if not len(array):
        raise ValueError("There is no seed to average over.")
    return float(array.mean()), float(array.std(ddof=1)) if len(array) > 1 else NAN


# ---------------------------------------------------------------------- helpers


def _weighted_mean(sums: np.ndarray, weights: np.ndarray, axis: int) -> np.ndarray:
    return sums.sum(axis) / weights.sum(axis)


def _average_value(columns: list[np.ndarray]) -> float:
    return float(np.mean([column.mean() for column in columns]))


def _resampled_average(columns: list[np.ndarray], resamples: int, seed: int) -> np.ndarray:
    """Averages over tasks, each task resampled by itself: shape `(resamples,)`."""
    means = [resampled_means(column, None, resamples, seed + number) for number, column in enumerate(columns)]
    return np.mean(means, 0)


def _percentiles(means: np.ndarray) -> tuple[float, float]:
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)


def _finite(values: Values, what: str) -> np.ndarray:
    array = np.asarray(values, dtype=np.float64)
    if bad := int((~np.isfinite(array)).sum()):
        raise ValueError(f"{bad} of {len(array)} {what} are NaN or infinite.")
    return array
