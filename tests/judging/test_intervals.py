"""Intervals and comparisons: by hand where a formula gives the answer, by coverage where it does not."""

import math

import numpy as np
import pytest

from trainer.judging import intervals
from trainer.judging.intervals import (
    Mean,
    Rate,
    average,
    bootstrap_interval,
    compare_differences,
    mean_and_deviation,
    paired_bootstrap,
    resampled_means,
)


def test_wilson_interval():
    assert Rate(0, 10).interval == pytest.approx((0.0, 0.2775), abs=1e-4)  # Wilson's score interval, computed by hand
    assert Rate(5, 10).interval == pytest.approx((0.2366, 0.7634), abs=1e-4)
    assert Rate(10, 10).interval[1] == pytest.approx(1.0)
    assert math.isnan(Rate(0, 0).value) and all(map(math.isnan, Rate(0, 0).interval))
    z = 1.959964
    for hits, n in ((1, 3), (77, 1500), (99_999, 100_000)):
        p = hits / n
        centre = p + z * z / (2 * n)
        spread = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
        by_formula = [(centre + sign * spread) / (1 + z * z / n) for sign in (-1, 1)]
        assert Rate(hits, n).interval == pytest.approx(by_formula, abs=1e-7)


def test_mean_is_weighted_and_its_interval_holds_it():
    mean = Mean([2.0, 12.0], [1, 3])
    assert mean.value == 3.5
    assert mean.interval[0] <= 3.5 <= mean.interval[1]
    assert Mean([4.0, 8.0], [2, 4]).interval == (2.0, 2.0)


def test_mean_leaves_out_what_has_no_value():
    mean = Mean.of([1.0, None, 0.0, True])
    assert (mean.n, mean.value) == (3, pytest.approx(2 / 3))
    assert mean.to_dict()["n"] == 3
    empty = Mean.of([None])
    assert empty.n == 0 and math.isnan(empty.value) and all(map(math.isnan, empty.interval))
    assert empty.to_dict()["n"] == 0
    assert all(map(math.isnan, Mean([math.nan, 1.0]).interval))


def test_bootstrap_is_the_percentile_bootstrap(monkeypatch):
    """Against resampling one mean at a time, also where the resamples do not fit into one array."""
    values = np.random.default_rng(1).exponential(size=50)
    generator = np.random.default_rng(3)
    means = [values[generator.integers(50, size=50)].mean() for _ in range(4000)]
    low, high = bootstrap_interval(values, resamples=4000, seed=5)
    assert (low, high) == pytest.approx(np.percentile(means, [2.5, 97.5]), rel=0.03)
    assert (
        bootstrap_interval(values, seed=5) == bootstrap_interval(values, seed=5) != bootstrap_interval(values, seed=6)
    )
    whole = bootstrap_interval(values, resamples=1000)
    monkeypatch.setattr(intervals, "CHUNK", 50 * 7)
    assert bootstrap_interval(values, resamples=1000) == pytest.approx(whole, rel=0.05)
    with pytest.raises(ValueError, match="1 of 3 values are NaN"):
        bootstrap_interval([1.0, math.nan, 2.0])


def test_the_resamples_are_those_of_numpys_generator():
    """One row of places after another: figures that earlier versions wrote come out again."""
    values, weights = np.random.default_rng(1).exponential(size=(2, 50))
    picks = np.random.default_rng(5).integers(50, size=(300, 50))
    assert resampled_means(values, resamples=300, seed=5) == pytest.approx(values[picks].mean(1), abs=1e-12)
    weighted = values[picks].sum(1) / weights[picks].sum(1)
    assert resampled_means(values, weights, resamples=300, seed=5) == pytest.approx(weighted, abs=1e-12)


def test_a_sample_that_does_not_vary_has_an_interval_of_no_width():
    for values in ([0.1], [0.1] * 3):
        assert bootstrap_interval(values) == (0.1, 0.1)
    assert bootstrap_interval([0.5], [2.0]) == (0.25, 0.25)
    assert all(map(math.isnan, bootstrap_interval([])))


def test_averages_over_tasks_resample_each_task_by_itself():
    """A task of one question and a large one weigh the same, and what does not apply counts for nothing."""
    figure = average([[1.0], [0.0, 1.0, None, 0.0, 1.0], [None]])
    assert (figure["value"], figure["n"], figure["tasks"]) == (0.75, 5, 2)
    assert figure["interval"] == pytest.approx([0.5, 1.0])  # the first task is always 1
    assert average([[None], []]) is None
    differences = [[0.5], [0.0, 1.0, 0.0, 1.0]]
    compared = compare_differences(differences, resamples=500, seed=3)
    assert (compared.difference, compared.n) == (0.5, 5)
    means = (0.5 + resampled_means(differences[1], resamples=500, seed=4)) / 2
    assert compared.interval == pytest.approx(np.percentile(means, [2.5, 97.5]))


def test_bootstrap_interval_covers_the_mean_19_times_of_20():
    generator = np.random.default_rng(0)
    intervals = [bootstrap_interval(generator.normal(2.0, 1.0, size=80), resamples=400, seed=i) for i in range(300)]
    covered = sum(low <= 2.0 <= high for low, high in intervals)
    assert 0.90 <= covered / 300 <= 0.985


def test_paired_bootstrap_sees_what_pairing_shows():
    """A small gain on every instance is certain although the instances differ widely; the same gain between unrelated runs is not."""
    generator = np.random.default_rng(0)
    first = {f"q{i}": float(value) for i, value in enumerate(generator.normal(0, 10, size=100))}
    second = {
        id: value + 0.5 + generator.normal(0, 0.1) for id, value in reversed(first.items())
    }  # order does not matter
    better = paired_bootstrap(first, second)
    assert better.difference == pytest.approx(0.5, abs=0.05) and better.interval[0] > 0.4
    assert better.p_value == pytest.approx(1 / 10_001)
    assert paired_bootstrap(second, first).difference == pytest.approx(-better.difference)
    shuffled = dict(zip(second, generator.permutation(list(second.values())).tolist(), strict=True))
    assert paired_bootstrap(first, shuffled).p_value > 0.05


def test_paired_bootstrap_p_value_is_right_about_chance():
    """Where two runs do not differ, p < 0.1 comes up in about a tenth of the comparisons."""
    generator = np.random.default_rng(2)
    ids = [str(i) for i in range(60)]
    runs = [[dict(zip(ids, generator.normal(size=60).tolist(), strict=True)) for _ in range(2)] for _ in range(300)]
    below = sum(paired_bootstrap(a, b, resamples=300).p_value < 0.1 for a, b in runs)
    assert 0.05 <= below / 300 <= 0.16
    equal = paired_bootstrap(runs[0][0], dict(runs[0][0]), resamples=100)
    assert (equal.difference, equal.interval, equal.p_value) == (0.0, (0.0, 0.0), 1.0)


def test_paired_bootstrap_by_two_instances():
    """Two instances, differences 1 and 0: a resample's mean is 0, 1/2 or 1, with 1/4, 1/2, 1/4; 0 and 1 are 1/2 away from the measured 1/2."""
    found = paired_bootstrap({"a": 0.0, "b": 0.0}, {"a": 1.0, "b": 0.0}, resamples=20_000)
    assert found.difference == 0.5 and found.interval == (0.0, 1.0)
    assert found.p_value == pytest.approx(0.5, abs=0.02)


def test_paired_bootstrap_refuses_other_instances_and_counts_what_has_no_value():
    with pytest.raises(ValueError, match="1 ids are only in the first, 2 only in the second, 1 in both"):
        paired_bootstrap({"a": 1.0, "b": 1.0}, {"b": 1.0, "c": 0.0, "d": 0.0})
    partly = paired_bootstrap({"a": 1.0, "b": None, "c": 0.0}, {"a": 0.0, "b": 1.0, "c": 0.0})
    assert (partly.n, partly.left_out, partly.difference) == (2, 1, -0.5)
    with pytest.raises(ValueError, match="None of the 1 instances has a value in both"):
        paired_bootstrap({"a": None}, {"a": 1.0})


def test_mean_and_deviation_over_seeds():
    assert mean_and_deviation([1.0, 2.0, 3.0]) == (2.0, 1.0)
    mean, deviation = mean_and_deviation([4.0])
    assert mean == 4.0 and math.isnan(deviation)
    with pytest.raises(ValueError, match="no seed"):
        mean_and_deviation([])
