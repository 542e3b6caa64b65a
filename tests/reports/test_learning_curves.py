"""Learning curves of an experiment, against logs written by hand."""

import json

import pytest

from support.experiment_results import make, write_report
from trainer.judging.figures import MISSING
from trainer.reports.learning_curves import _last_cell, _table, learning_curves
from trainer.reports.training_logs import read_training_log

SCORES = {"a": {"1": 1.0, "2": 0.0}, "b": {"1": 0.0, "2": 1.0}}


def entries(seconds_of_a_step, losses, steps=(2, 4)):
    """Return a log with `training_seconds`, in which each evaluation took 50 seconds."""
    history = []
    for step, loss in zip(steps, losses, strict=True):
        at = {"step": step, "training_seconds": seconds_of_a_step * step}
        history.append({"loss": 9.0, "ntp_loss": 9.0, **at})
        history.append({"eval_ntp_loss": loss, "eval_num_passages": 7, "eval_runtime": 50.0, "eval_x_loss": 1.0, **at})
    history.append({"train_runtime": 200.0, "peak_memory": 2.0 + seconds_of_a_step, **at})
    return history


def with_logs(tmp_path, logs, resumed=False, **options):
    """Return results whose runs have logs: arm -> seed -> log history."""
    arms = {arm: {seed: SCORES for seed in by_seed} for arm, by_seed in logs.items()}
    results = make(tmp_path, arms, **options)
    for run in results.runs:
        history = logs[run["arm"]][run["seed"]]
        folder = tmp_path / f"{run['arm']}-{run['seed']}"
        (folder / "model").mkdir()
        state = {"global_step": history[-1]["step"], "log_history": history}
        (folder / "model" / "trainer_state.json").write_text(json.dumps(state))
        run["folder"] = str(folder)
        run["trained"]["resumed"] = resumed
    return results


LOGS = {
    "fast": {0: entries(1.0, [4.0, 3.0]), 1: entries(2.0, [5.0, 2.0])},
    "slow": {0: entries(3.0, [3.0, 1.0, 0.5], (1, 2, 4)), 1: entries(3.0, [3.0, 1.0, 0.7], (1, 2, 4))},
}


def test_a_curve_is_the_mean_and_range_over_seeds(tmp_path):
    fast = learning_curves(with_logs(tmp_path, LOGS))["fast"]
    assert fast["curves"] == {
        "eval_ntp_loss": [
            {"step": 2, "seconds": 3.0, "value": 4.5, "low": 4.0, "high": 5.0},
            {"step": 4, "seconds": 6.0, "value": 2.5, "low": 2.0, "high": 3.0},
        ]
    }
    assert (fast["seeds"], fast["steps"], fast["seconds"], fast["seconds_per_step"]) == (2, 4, 6.0, 1.5)
    assert fast["peak_memory"] == 4.0  # the largest
    assert not fast["seconds_are_estimates"]


def test_a_point_needs_every_seed(tmp_path):
    logs = {"fast": {0: entries(1.0, [4.0, 3.0]), 1: entries(1.0, [5.0], (4,))}, "slow": LOGS["slow"]}
    curve = learning_curves(with_logs(tmp_path, logs))["fast"]["curves"]["eval_ntp_loss"]
    assert [point["step"] for point in curve] == [4]


def test_arms_are_compared_at_equal_steps_and_at_equal_seconds(tmp_path):
    """fast ends after 6 seconds, when slow has taken 2 of its 4 steps."""
    pytest.importorskip("matplotlib", reason="draws plots")
    results = with_logs(tmp_path, LOGS)
    text = write_report(results, tmp_path / "report").replace("\\", "").replace("**", "")
    assert "|  | NTP loss at step 4 | NTP loss within 6 s |" in text
    assert "| fast | 2.500 [2.000, 3.000] step 4 | 2.500 [2.000, 3.000] step 4 |" in text
    assert "| slow | 0.600 [0.500, 0.700] step 4 | 1.000 [1.000, 1.000] step 2 |" in text
    assert "| fast | 2 | 4 | 6 s | 1.50 s | 4.00 GB |" in text
    assert "Seconds of" not in text
    assert (tmp_path / "report" / "plots" / "learning_curves.png").stat().st_size > 5000
    content = json.loads((tmp_path / "report" / "experiment.json").read_text())
    assert content["learning_curves"]["slow"]["curves"]["eval_ntp_loss"][1]["seconds"] == 6.0


def test_without_training_seconds_every_step_counts_the_same_and_evaluations_do_not(tmp_path):
    """200 seconds less 2 evaluations of 50 are 100 seconds of 4 steps."""
    logs = {arm: {0: [dict(entry) for entry in by_seed[0]]} for arm, by_seed in LOGS.items()}
    for by_seed in logs.values():
        for entry in by_seed[0]:
            entry.pop("training_seconds")
            entry.pop("peak_memory", None)
    results = with_logs(tmp_path, logs, seeds=[0])
    fast = learning_curves(results)["fast"]
    assert [point["seconds"] for point in fast["curves"]["eval_ntp_loss"]] == [50.0, 100.0]
    assert (fast["seconds_per_step"], fast["peak_memory"], fast["seconds_are_estimates"]) == (25.0, None, True)
    text = write_report(results, tmp_path / "report")
    assert "| fast | 1 | 4 | ≈ 100 s | ≈ 25.00 s | — |" in text
    assert "Seconds of fast, slow are estimates" in text
    for run in results.runs:  # the runtime of a resumed training is that of its last part
        run["trained"]["resumed"] = True
    log = read_training_log(results.runs[0])
    assert (log.seconds, log.points[0].seconds) == (None, None)
    assert "NTP loss within" not in write_report(results, tmp_path / "report")


def test_a_run_without_a_log_has_no_curve(tmp_path):
    results = make(tmp_path, {"old": {0: SCORES}, "new": {0: SCORES}}, seeds=[0])
    assert learning_curves(results) == {}
    assert "While training" not in write_report(results, tmp_path / "report")


def test_a_point_whose_seconds_are_not_known_is_within_no_seconds():
    """A run that an older version began, and that was resumed, has such points."""
    point = {"step": 1, "seconds": None, "value": 2.0, "low": 2.0, "high": 2.0}
    curve = [point, {**point, "step": 2, "seconds": 30.0, "value": 1.0}]
    arms = {"old": {"curves": {"eval_ntp_loss": curve}}}
    assert _table(arms, ["eval_ntp_loss"]).rows[0][2] == _last_cell(curve, "seconds", 30.0, "eval_ntp_loss") != MISSING
    assert _last_cell(curve, "seconds", 20.0, "eval_ntp_loss") == MISSING
