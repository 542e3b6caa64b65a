"""The planned comparisons of an experiment's report, against values computed by hand."""

import json

import numpy as np
import pytest
import scipy.stats

from support.experiment_results import MEANING, make, write_report
from trainer.reports.planned import planned_comparisons

PLAN = {
    "arm": "new",
    "against": "old",
    "figure": "ret",
    "name": "new against old",
    "mode": "retrieval",
    "group": "all",
    "setting": "full corpus",
}


def scores(num_right, seeds=3, questions=100):
    """Return scores of an arm: with seed s, `num_right + s` of the questions of both tasks are right."""
    by_seed = {}
    for seed in range(seeds):
        values = {str(i): float(i < num_right + seed) for i in range(questions)}
        by_seed[seed] = {"a": values, "b": values}
    return by_seed


def compared(tmp_path, arms, *plans, **options):
    plans = [{**PLAN, **plan} for plan in plans or ({},)]
    return planned_comparisons(make(tmp_path, arms, comparisons=plans, seeds=[0, 1, 2], **options))


def test_values_difference_and_p_are_those_of_both_tests(tmp_path):
    new = scores(60)
    new[2]["b"] = {id: 1.0 for id in new[2]["b"]}  # 62 -> 100
    (comparison,) = compared(tmp_path, {"old": scores(40), "new": new})
    seed_means = [0.2, 0.2, (0.2 + 0.58) / 2]
    assert comparison["seed_means"] == pytest.approx(seed_means)
    assert comparison["values"] == pytest.approx([np.mean([0.6, 0.61, 0.81]), 0.41])
    assert comparison["difference"] == pytest.approx(np.mean(seed_means))
    assert comparison["t_p"] == pytest.approx(scipy.stats.ttest_1samp(seed_means, 0).pvalue)
    assert comparison["bootstrap_p"] < 0.001 < comparison["t_p"]
    assert comparison["p_value"] == comparison["adjusted_p"] == comparison["t_p"]
    assert (comparison["n"], comparison["left_out"], comparison["seeds"]) == (200, 0, [3, 0, 0])
    assert comparison["verdict"] == "not shown"  # p is 0.053: the seeds differ too much


def test_all_planned_comparisons_are_corrected_together(tmp_path):
    arms = {"old": scores(40), "new": scores(60), "same": scores(40)}
    against_same = {"arm": "same", "group": "in-domain"}
    forward, backward, same = compared(
        tmp_path, arms, {}, {"arm": "old", "against": "new", "group": "b"}, against_same
    )
    assert forward["adjusted_p"] == pytest.approx(3 * forward["p_value"])
    assert backward["adjusted_p"] == pytest.approx(3 * forward["p_value"])  # 2 x p, but not below the one before it
    assert forward["adjusted_bootstrap_p"] == pytest.approx(3 * forward["bootstrap_p"])
    assert [forward["verdict"], backward["verdict"], same["verdict"]] == ["ahead", "behind", "not shown"]
    assert (same["p_value"], same["seeds"], same["n"]) == (1.0, [0, 3, 0], 100)


def test_a_missing_run_is_named_and_counts_in_the_correction(tmp_path):
    arms = {"old": scores(40), "new": scores(60), "other": {**scores(90), 1: None}}
    made, lacking = compared(tmp_path, arms, {}, {"arm": "other"})
    assert lacking["missing"] == ["other, seed 1: not run"]
    assert (lacking["values"], lacking["difference"], lacking["verdict"]) == (None, None, "not measured")
    assert made["adjusted_p"] == pytest.approx(2 * made["p_value"])


def test_a_seed_without_a_value_is_named(tmp_path):
    new = scores(60)
    new[1]["b"] = dict.fromkeys(new[1]["b"])
    (comparison,) = compared(tmp_path, {"old": scores(40), "new": new})
    assert comparison["missing"] == ["b, seed 1: no question has a value of Ret in both arms"]
    assert (comparison["p_value"], comparison["verdict"]) == (None, "not measured")


def test_a_question_that_one_arm_lacks_is_left_out(tmp_path):
    new = scores(60)
    new[0]["a"]["99"] = None  # wrong in both
    (comparison,) = compared(tmp_path, {"old": scores(40), "new": new}, {"group": "a"})
    assert (comparison["left_out"], comparison["n"]) == (1, 100)
    assert comparison["seed_means"] == pytest.approx([20 / 99, 0.2, 0.2])


def test_one_seed_gives_no_verdict(tmp_path):
    arms = {"old": scores(40, seeds=1), "new": scores(60, seeds=1)}
    results = make(tmp_path, arms, comparisons=[PLAN], seeds=[0])
    (comparison,) = planned_comparisons(results)
    assert (comparison["difference"], comparison["p_value"]) == (pytest.approx(0.2), None)
    assert comparison["verdict"] == "none: one seed"
    assert "none: one seed" in write_report(results, tmp_path / "report")


@pytest.mark.parametrize(
    ("planned", "expected"),
    [
        ([0, 1, 2], None),
        ([0, 1, 2, 3, 4], "without the planned seeds 3, 4"),
        ([0, 1], "with the unplanned seeds 2"),
        ([1, 2, 3], "without the planned seeds 3 and with the unplanned seeds 0"),
    ],
)
def test_other_seeds_than_planned_are_named_next_to_the_verdict(tmp_path, planned, expected):
    """Otherwise one could add seeds until a difference is shown, and the report would look as planned."""
    arms = {"old": scores(40), "new": scores(60)}
    results = make(tmp_path, arms, comparisons=[PLAN], seeds=[0, 1, 2], planned_seeds=planned)
    text = write_report(results, tmp_path / "report")
    (row,) = [line for line in text.splitlines() if "new against old" in line and line.startswith("|")]
    assert "ahead" in row
    if expected is None:
        assert "planned seeds" not in text
    else:
        assert expected in row
        assert f"not those of the plan: {expected}." in text


def test_each_mode_is_compared_in_itself(tmp_path):
    arms = {"old": scores(40), "new": scores(60)}
    (comparison,) = compared(tmp_path, arms, {"mode": "forced"}, modes=("retrieval", "forced"))
    assert comparison["difference"] == pytest.approx(0.2)


def test_seeds_with_worlds_of_their_own_have_questions_of_their_own(tmp_path):
    (comparison,) = compared(tmp_path, {"old": scores(40), "new": scores(60)}, same_questions=False)
    assert (comparison["n"], comparison["difference"]) == (600, pytest.approx(0.2))


def test_the_section_is_in_the_report_and_in_the_json(tmp_path):
    plans = [{**PLAN, "name": "first"}, {**PLAN, "arm": "absent", "name": "absent against old"}]
    arms = {"old": scores(40), "new": scores(60), "absent": {0: None, 1: None, 2: None}}
    results = make(tmp_path, arms, comparisons=plans, seeds=[0, 1, 2])
    text = write_report(results, tmp_path / "report")
    assert "## Planned comparisons" in text
    (row,) = [line for line in text.splitlines() if "first" in line and line.startswith("|")]
    for part in ("new against old: Ret, own retrieval, average of all tasks", "61.0", "41.0", "+20.0", "3 / 0 / 0"):
        assert part in row
    assert "absent, seed 0: not run; absent, seed 1: not run" in text
    content = json.loads((tmp_path / "report" / "experiment.json").read_text())
    assert [entry["verdict"] for entry in content["planned_comparisons"]] == ["ahead", "not measured"]


def test_an_experiment_without_plans_is_as_before(tmp_path):
    results = make(tmp_path, {"old": scores(40), "new": scores(60)}, seeds=[0, 1, 2])
    assert "Planned" not in write_report(results, tmp_path / "report")
    assert "planned_comparisons" not in json.loads((tmp_path / "report" / "experiment.json").read_text())
    assert set(MEANING) == {"a", "b"}
