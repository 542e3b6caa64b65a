"""Intervals and comparisons: by hand if a formula gives the answer, otherwise by coverage."""

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
    assert math.isnan(Rate(0, 0).value)
    assert all(map(math.isnan, Rate(0, 0).interval))


def test_wilson_interval_against_its_formula():
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


def test_mean_leaves_out_instances_without_a_value():
    mean = Mean.of([1.0, None, 0.0, True])
    assert (mean.n, mean.value) == (3, pytest.approx(2 / 3))
    assert mean.to_dict()["n"] == 3


def test_a_mean_of_nothing_is_nan():
    empty = Mean.of([None])
    assert empty.n == 0
    assert empty.to_dict()["n"] == 0
    assert math.isnan(empty.value)
    assert all(map(math.isnan, empty.interval))
    assert all(map(math.isnan, Mean([math.nan, 1.0]).interval))


def test_bootstrap_is_the_percentile_bootstrap(monkeypatch):
    """It agrees with resampling one mean at a time, also if the resamples do not fit into one array."""
    values = np.random.default_rng(1).exponential(size=50)
    generator = np.random.default_rng(3)
    means = [values[generator.integers(50, size=50)].mean() for _ in range(4000)]
    low, high = bootstrap_interval(values, resamples=4000, seed=5)
    assert (low, high) == pytest.approx(np.percentile(means, [2.5, 97.5]), rel=0.03)
    in_one_array = bootstrap_interval(values, resamples=1000)
    monkeypatch.setattr(intervals, "CHUNK", 50 * 7)
    assert bootstrap_interval(values, resamples=1000) == pytest.approx(in_one_array, rel=0.05)


def test_the_seed_decides_the_bootstrap():
    values = np.random.default_rng(1).exponential(size=50)
    assert bootstrap_interval(values, seed=5) == bootstrap_interval(values, seed=5)
    assert bootstrap_interval(values, seed=5) != bootstrap_interval(values, seed=6)


def test_the_bootstrap_refuses_what_is_not_finite():
    with pytest.raises(ValueError, match="1 of 3 values are NaN"):
        bootstrap_interval([1.0, math.nan, 2.0])


def test_the_resamples_are_those_of_numpys_generator():
    """Indices are drawn row by row, so that figures of earlier versions can be reproduced."""
    values, weights = np.random.default_rng(1).exponential(size=(2, 50))
    picks = np.random.default_rng(5).integers(50, size=(300, 50))
    assert resampled_means(values, resamples=300, seed=5) == pytest.approx(values[picks].mean(1), abs=1e-12)
    weighted = values[picks].sum(1) / weights[picks].sum(1)
    assert resampled_means(values, weights, resamples=300, seed=5) == pytest.approx(weighted, abs=1e-12)


def test_a_sample_that_does_not_vary_has_an_interval_of_no_width():
    assert bootstrap_interval([0.1] * 3) == (0.1, 0.1)


@pytest.mark.parametrize(("values", "weights"), [([], None), ([0.1], None), ([0.5], [2.0])])
def test_fewer_than_two_values_have_no_interval(values, weights):
    """A single value does not show how much it would vary: an interval of no width would look certain."""
    assert all(map(math.isnan, bootstrap_interval(values, weights)))
    assert Mean(values, weights).to_dict()["interval"] is None


def test_a_task_of_one_question_leaves_an_average_or_a_comparison_without_an_interval():
    figure = average([[1.0], [0.0, 1.0, None, 0.0, 1.0]])
    assert (figure["value"], figure["n"], figure["interval"]) == (0.75, 5, None)
    for columns in ([[0.5]], [[0.5], [0.5, 0.5]]):
        compared = compare_differences(columns).to_dict()
        assert (compared["difference"], compared["interval"], compared["p_value"]) == (0.5, None, None)
    alone = paired_bootstrap({"a": 0.0, "b": None}, {"a": 1.0, "b": 1.0}).to_dict()
    assert (alone["n"], alone["left_out"], alone["interval"], alone["p_value"]) == (1, 1, None, None)


def test_averages_over_tasks_resample_each_task_by_itself():
    """A small task weighs as much as a large one. Tasks that the figure does not apply to are left out."""
    figure = average([[1.0, 1.0], [0.0, 1.0, None, 0.0, 1.0], [None]])
    assert (figure["value"], figure["n"], figure["tasks"]) == (0.75, 6, 2)
    assert figure["interval"] == pytest.approx([0.5, 1.0])  # the first task is always 1
    assert average([[None], []]) is None


def test_comparisons_over_tasks_resample_each_task_by_itself():
    differences = [[0.5, 0.5], [0.0, 1.0, 0.0, 1.0]]
    comparison = compare_differences(differences, resamples=500, seed=3)
    assert (comparison.difference, comparison.n) == (0.5, 6)
    means = (0.5 + resampled_means(differences[1], resamples=500, seed=4)) / 2
    assert comparison.interval == pytest.approx(np.percentile(means, [2.5, 97.5]))


def test_bootstrap_interval_covers_the_mean_19_times_of_20():
    generator = np.random.default_rng(0)
    intervals = [bootstrap_interval(generator.normal(2.0, 1.0, size=80), resamples=400, seed=i) for i in range(300)]
    covered = sum(low <= 2.0 <= high for low, high in intervals)
    assert 0.90 <= covered / 300 <= 0.985


def test_paired_bootstrap_sees_what_pairing_shows():
    """A small gain on every instance is certain, although the instances differ widely. Without pairs it is not."""
    generator = np.random.default_rng(0)
    first = {f"q{i}": float(value) for i, value in enumerate(generator.normal(0, 10, size=100))}
    # The order of the instances does not matter.
    second = {id: value + 0.5 + generator.normal(0, 0.1) for id, value in reversed(first.items())}
    better = paired_bootstrap(first, second)
    assert better.difference == pytest.approx(0.5, abs=0.05)
    assert better.interval[0] > 0.4
    assert better.p_value == pytest.approx(1 / 10_001)
    assert paired_bootstrap(second, first).difference == pytest.approx(-better.difference)
    shuffled = dict(zip(second, generator.permutation(list(second.values())).tolist(), strict=True))
    assert paired_bootstrap(first, shuffled).p_value > 0.05


def test_paired_bootstrap_p_value_is_right_about_chance():
    """If two runs do not differ, about a tenth of the comparisons have p < 0.1."""
    generator = np.random.default_rng(2)

    def random_run():
        return {str(i): value for i, value in enumerate(generator.normal(size=60).tolist())}

    p_values = [paired_bootstrap(random_run(), random_run(), resamples=300).p_value for _ in range(300)]
    below = sum(p_value < 0.1 for p_value in p_values)
    assert 0.05 <= below / 300 <= 0.16


def test_paired_bootstrap_of_equal_runs():
    run = {str(i): value for i, value in enumerate(np.random.default_rng(2).normal(size=60).tolist())}
    equal = paired_bootstrap(run, dict(run), resamples=100)
    assert (equal.difference, equal.interval, equal.p_value) == (0.0, (0.0, 0.0), 1.0)


def test_paired_bootstrap_by_two_instances():
    """
    The differences are 1 and 0, so a resample's mean is 0, 1/2 or 1, with probabilities 1/4, 1/2 and 1/4. Both 0 and 1
    are as far from the measured 1/2 as that is from 0.
    """
    comparison = paired_bootstrap({"a": 0.0, "b": 0.0}, {"a": 1.0, "b": 0.0}, resamples=20_000)
    assert comparison.difference == 0.5
    assert comparison.interval == (0.0, 1.0)
    assert comparison.p_value == pytest.approx(0.5, abs=0.02)


def test_paired_bootstrap_refuses_other_instances_and_counts_those_without_a_value():
    with pytest.raises(ValueError, match="1 ids are only in the first, 2 only in the second, 1 in both"):
        paired_bootstrap({"a": 1.0, "b": 1.0}, {"b": 1.0, "c": 0.0, "d": 0.0})
    partly = paired_bootstrap({"a": 1.0, "b": None, "c": 0.0}, {"a": 0.0, "b": 1.0, "c": 0.0})
    assert (partly.n, partly.left_out, partly.difference) == (2, 1, -0.5)
    with pytest.raises(ValueError, match="None of the 1 instances has a value in both"):
        paired_bootstrap({"a": None}, {"a": 1.0})


def test_mean_and_deviation_over_seeds():
    assert mean_and_deviation([1.0, 2.0, 3.0]) == (2.0, 1.0)
    mean, deviation = mean_and_deviation([4.0])
    assert mean == 4.0
    assert math.isnan(deviation)
    with pytest.raises(ValueError, match="no seed"):
        mean_and_deviation([])
