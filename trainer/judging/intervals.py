"""Figures with their uncertainty: shares and means with 95 % intervals, the paired comparison of two runs, mean and deviation over seeds."""

import math
from dataclasses import dataclass

import numpy as np

CHUNK = 1 << 24  # resampled values that are held at a time: 128 MB


@dataclass
class Rate:
    """
    A share of `n` questions with its 95 % Wilson interval.

    Args:
        hits (`int`), n (`int`): successes and trials.
    """

    hits: int
    n: int

    @property
    def value(self):
        return self.hits / self.n if self.n else float("nan")

    @property
    def interval(self):
        """`(low, high)` of the 95 % Wilson score interval."""
        if not self.n:
            return float("nan"), float("nan")
        z, p = 1.959964, self.value
        centre, spread = p + z * z / (2 * self.n), z * math.sqrt(p * (1 - p) / self.n + z * z / (4 * self.n * self.n))
        return (centre - spread) / (1 + z * z / self.n), (centre + spread) / (1 + z * z / self.n)

    def __str__(self):
        low, high = self.interval
        return f"{100 * self.value:5.1f} %  [{100 * low:.1f}, {100 * high:.1f}]  n = {self.n}"

    def to_dict(self):
        return {"value": self.value, "interval": list(self.interval), "n": self.n}


@dataclass
class Mean:
    """
    A mean over instances with its 95 % bootstrap interval (1,000 resamples of the instances, seed 0). NaN where there is no instance.

    Args:
        sums (`list[float]`): per instance, its value, or e.g. its summed loss.
        weights (`list[float]`, *optional*): per instance, e.g. the number of tokens; 1 each by default.
    """

    sums: list
    weights: list | None = None

    @classmethod
    def of(cls, values):
        """The mean over the instances that have a value: those with `None`, where the metric does not apply, are left out, and `n` says how many remain."""
        return cls([float(value) for value in values if value is not None])

    @property
    def n(self):
        """Number of instances."""
        return len(self.sums)

    @property
    def value(self):
        total = self.n if self.weights is None else np.sum(self.weights)
        return float(np.sum(self.sums) / total) if total else float("nan")

    @property
    def interval(self):
        """`(low, high)` of the 95 % percentile bootstrap."""
        if not math.isfinite(self.value):
            return float("nan"), float("nan")
        return bootstrap_interval(self.sums, self.weights)

    def __str__(self):
        low, high = self.interval
        return f"{self.value:7.3f}  [{low:.3f}, {high:.3f}]  n = {self.n}"

    def to_dict(self):
        return {"value": self.value, "interval": list(self.interval), "n": self.n}


def bootstrap_interval(values, weights=None, resamples=1000, seed=0):
    """
    95 % percentile bootstrap interval of a (weighted) mean.

    Args:
        values (`list[float]` or `numpy.ndarray` of shape `(n,)`): one per instance; with `weights` they are sums, already multiplied by their weight.
        weights (of shape `(n,)`, *optional*): what the resampled sums are divided by.
        resamples (`int`), seed (`int`): the same seed gives the same interval.

    Returns:
        `(low, high)`, two `float`s; NaN where there is no value.

    Raises:
        `ValueError`: when a value is not a finite number.
    """
    values = _finite(values, "values")
    if not len(values):
        return float("nan"), float("nan")
    weights = None if weights is None else _finite(weights, "weights")
    picked = _resamples(len(values), resamples, seed)
    means = np.concatenate([values[picks].sum(1) / (picks.shape[1] if weights is None else weights[picks].sum(1)) for picks in picked])
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)


@dataclass
class Comparison:
    """
    What [`paired_bootstrap`] found about two runs, second minus first.

    Args:
        difference (`float`), interval (`tuple[float, float]`): of the means, with its 95 % interval.
        p_value (`float`): two-sided: how often a difference as large shows up between runs that do not differ.
        n (`int`): instances that both runs have a value for.
        left_out (`int`): instances for which one of them has none.
    """

    difference: float
    interval: tuple
    p_value: float
    n: int
    left_out: int = 0

    def __str__(self):
        low, high = self.interval
        return f"{self.difference:+7.3f}  [{low:+.3f}, {high:+.3f}]  p = {self.p_value:.4f}  n = {self.n}"

    def to_dict(self):
        return {"difference": self.difference, "interval": list(self.interval), "p_value": self.p_value, "n": self.n, "left_out": self.left_out}


def paired_bootstrap(first, second, resamples=10_000, seed=0):
    """
    Whether the second run is better than the first: the bootstrap of their differences, instance by instance.

    The p-value counts the resampled differences that are as far from the measured one as that is from 0 (plus one in both counts, so it is never 0).

    Args:
        first, second (`dict[str, float | None]`): id of an instance -> its value; `None` where the metric does not apply.
        resamples (`int`), seed (`int`): the same seed gives the same answer.

    Returns:
        [`Comparison`] of `second - first`.

    Raises:
        `ValueError`: with counts, when the two do not hold the same ids, or no instance has a value in both.
    """
    if missing := set(first) ^ set(second):
        only_first, only_second = len(set(first) - set(second)), len(set(second) - set(first))
        raise ValueError(
            f"The runs hold different instances: {only_first} ids are only in the first, {only_second} only in the second, "
            f"{len(set(first) & set(second))} in both; e.g. {sorted(map(str, missing))[:3]}."
        )
    shared = [id for id in first if first[id] is not None and second[id] is not None]
    if not shared:
        raise ValueError(f"None of the {len(first)} instances has a value in both runs: there is nothing to compare.")
    differences = _finite([second[id] - first[id] for id in shared], "differences")
    means = np.concatenate([differences[picks].mean(1) for picks in _resamples(len(differences), resamples, seed)])
    measured = float(differences.mean())
    as_far = int((np.abs(means - measured) >= abs(measured) - 1e-12).sum())
    low, high = np.percentile(means, [2.5, 97.5])
    return Comparison(measured, (float(low), float(high)), (1 + as_far) / (1 + resamples), len(shared), len(first) - len(shared))


def mean_and_deviation(values):
    """
    Mean and sample standard deviation (n - 1) over seeds.

    Args:
        values (`list[float]`): one per seed.

    Returns:
        `(mean, deviation)`, two `float`s; the deviation of a single seed is NaN.
    """
    values = _finite(values, "values")
    if not len(values):
        raise ValueError("There is no seed to average over.")
    return float(values.mean()), float(values.std(ddof=1)) if len(values) > 1 else float("nan")


def _resamples(n, resamples, seed):
    """Rows of `n` picks with replacement, `resamples` in all: arrays of shape `(rows, n)`."""
    generator, rows = np.random.default_rng(seed), max(1, CHUNK // n)
    for start in range(0, resamples, rows):
        yield generator.integers(n, size=(min(rows, resamples - start), n))


def _finite(values, what):
    values = np.asarray(values, dtype=np.float64)
    if bad := int((~np.isfinite(values)).sum()):
        raise ValueError(f"{bad} of {len(values)} {what} are NaN or infinite.")
    return values
