"""Comparisons over seeds and questions: error rates under the null, against scipy, and Holm's correction by hand."""

import numpy as np
import pytest
import scipy.stats

from trainer.judging.hierarchical import compare_over_seeds, holm, paired_t, resampled_differences

NUM_EXPERIMENTS = 400
RESAMPLES = 200


def simulate(num_seeds, seed_deviation, question_deviation, noise=0.0, effect=0.0, num_questions=40):
    """Return differences of many experiments: effect + one number a seed + one a question + noise."""
    generator = np.random.default_rng(0)
    for _ in range(NUM_EXPERIMENTS):
        seeds = seed_deviation * generator.normal(size=(num_seeds, 1))
        questions = question_deviation * generator.normal(size=(1, num_questions))
        yield effect + seeds + questions + noise * generator.normal(size=(num_seeds, num_questions))


def rejected(experiments, tasks=1):
    """Return how often the bootstrap, the t-test and the decision reject at 5 %."""
    p_values = []
    for differences in experiments:
        compared = compare_over_seeds(np.split(differences, tasks, 1), RESAMPLES)
        p_values.append((compared.bootstrap_p, compared.t_p, compared.p_value))
    return (np.array(p_values) <= 0.05).mean(0)


@pytest.mark.parametrize(
    ("num_seeds", "seed_deviation", "question_deviation", "noise"),
    [(3, 1, 0, 0.1), (5, 1, 0, 0.1), (3, 0, 1, 0.01), (3, 0.274, 1, 0.5), (3, 0.548, 1, 0)],
    ids=["three seeds", "five seeds", "questions", "both alike", "more over seeds"],
)
def test_the_decision_keeps_its_error_where_each_test_alone_does_not(
    num_seeds, seed_deviation, question_deviation, noise
):
    """No effect: 5 % may be found. Of 400 experiments, 3 standard deviations are 3.3 %."""
    experiments = simulate(num_seeds, seed_deviation, question_deviation, noise)
    bootstrap, over_seeds, decision = rejected(experiments)
    assert decision < 0.083
    if not question_deviation:  # the seeds alone vary
        assert bootstrap > 0.1
        assert 0.017 < over_seeds < 0.083 and decision > 0.017
    if not seed_deviation:  # the questions alone vary
        assert over_seeds > 0.5
        assert 0.017 < bootstrap < 0.083 and decision > 0.017


def test_an_average_over_tasks_keeps_its_error_and_finds_an_effect():
    deviations = {"num_seeds": 3, "seed_deviation": 0.1, "question_deviation": 1.0, "num_questions": 80}
    assert rejected(simulate(**deviations), tasks=4)[2] < 0.083
    assert rejected(simulate(**deviations, effect=1.0), tasks=4)[2] > 0.9


def test_the_interval_covers_the_effect_if_the_questions_vary():
    covered = 0
    for differences in simulate(8, 0.05, 1.0, effect=0.3):
        low, high = compare_over_seeds([differences], RESAMPLES).interval
        covered += low <= 0.3 <= high
    assert 0.9 < covered / NUM_EXPERIMENTS < 0.98


def test_values_are_averaged_over_questions_then_tasks_then_seeds():
    tasks = [np.array([[1.0, 0.0], [1.0, 1.0]]), np.array([[0.0, np.nan, -1.0], [0.5, 0.5, np.nan]])]
    compared = compare_over_seeds(tasks)
    assert compared.seed_means == [0.0, 0.75]
    assert compared.difference == 0.375
    assert compared.n == 5
    assert compared.signs == (1, 1, 0)
    assert compare_over_seeds(tasks) == compared  # the same resamples


def test_a_resample_draws_the_same_questions_for_all_seeds_and_the_same_seeds_for_all_tasks():
    questions = np.random.default_rng(0).normal(size=50)
    same = np.stack([questions, questions])  # both seeds alike: whichever are drawn, their mean is the same
    drawn = resampled_differences([same], 2000, 0)
    assert drawn.std() == pytest.approx(questions.std() / 50**0.5, rel=0.06)
    seeds = np.array([[1.0], [-1.0]]) * np.ones((2, 50))  # seeds alone vary: -1, 0 or 1 in 1/4, 1/2, 1/4
    drawn = resampled_differences([seeds, seeds], 2000, 0)
    assert [(drawn == value).mean() for value in (-1, 0, 1)] == pytest.approx([0.25, 0.5, 0.25], abs=0.04)


def test_seeds_with_questions_of_their_own_are_averaged_over_those():
    """As in an experiment with another world for each seed."""
    own = np.full((2, 60), np.nan)
    own[0, :30] = np.arange(30) / 30
    own[1, 30:] = np.arange(30) / 30
    compared = compare_over_seeds([own])
    assert compared.seed_means == pytest.approx([29 / 60, 29 / 60])
    deviation = (np.arange(30) / 30).std() / 30**0.5
    drawn = resampled_differences([own], 4000, 0)
    # half of the resamples draw one seed twice, and the others average over both
    assert drawn.std() == pytest.approx(deviation * 0.75**0.5, rel=0.1)


def test_the_t_test_is_scipys():
    seed_means = np.array([0.02, 0.05, -0.01, 0.04])
    interval, p_value = paired_t(seed_means)
    expected = scipy.stats.ttest_1samp(seed_means, 0)
    assert p_value == pytest.approx(expected.pvalue)
    assert interval == pytest.approx(tuple(expected.confidence_interval(0.95)))
    differences = seed_means[:, None] + np.zeros((4, 10))
    assert compare_over_seeds([differences]).t_p == pytest.approx(expected.pvalue)
    assert paired_t(np.array([0.5, 0.5])) == ((0.5, 0.5), 0.0)
    assert paired_t(np.array([0.0, 0.0])) == ((0.0, 0.0), 1.0)


def test_the_larger_p_value_decides():
    differences = next(simulate(3, 1, 1, 0.1))
    compared = compare_over_seeds([differences])
    assert compared.p_value == max(compared.bootstrap_p, compared.t_p) > min(compared.bootstrap_p, compared.t_p)


def test_one_seed_or_one_question_gives_no_p_value():
    one_seed = compare_over_seeds([np.ones((1, 30))])
    assert (one_seed.difference, one_seed.p_value, one_seed.interval, one_seed.t_interval) == (1.0, None, None, None)
    one_question = compare_over_seeds([np.ones((3, 1))])
    assert (one_question.difference, one_question.p_value, one_question.interval) == (1.0, None, None)


@pytest.mark.parametrize(
    ("tasks", "message"),
    [
        ([], "no task"),
        ([np.ones((2, 3)), np.ones((3, 3))], "with the same seeds"),
        ([np.array([[1.0, np.inf]])], "1 differences are infinite"),
        ([np.array([[1.0, 1.0], [np.nan, np.nan]])], r"seeds \[1\] have no question"),
    ],
)
def test_what_cannot_be_compared_is_an_error(tasks, message):
    with pytest.raises(ValueError, match=message):
        compare_over_seeds(tasks)


def test_holm_by_hand():
    """4 x 0.01 = 0.04, 3 x 0.03 = 0.09, then 2 x 0.04 = 0.08 and 1 x 0.05, both raised to the 0.09 before them."""
    assert holm([0.04, 0.01, 0.05, 0.03]) == pytest.approx([0.09, 0.04, 0.09, 0.09])
    assert holm([0.6, 0.7]) == [1.0, 1.0]
    assert holm([0.02]) == [0.02]
    assert holm([]) == []
    # one that could not be made still counts
    assert holm([0.02, None]) == [0.04, None]
