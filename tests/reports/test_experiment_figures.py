"""The figures of an experiment, against numbers computed by hand."""

import json

import pytest

from trainer.reports.document import _plain
from trainer.reports.experiment import _over_option, write_experiment_report
from trainer.reports.experiment_figures import Results, verdict

MEANING = {
    "a": {"task": "a", "setting": "full corpus", "size": None, "split": "in-domain"},
    "b": {"task": "b", "setting": "full corpus", "size": None, "split": "out-of-domain"},
}


def make(tmp_path, scores, modes=("retrieval",), same_questions=True, **experiment):
    """Results of `{arm: {seed: {task: {id: ret}}}}`, written as recipes/run_evaluation.py writes them."""
    runs = []
    for arm, seeds in scores.items():
        for seed, tasks in seeds.items():
            folder = tmp_path / f"{arm}-{seed}"
            for task, values in (tasks or {}).items():
                for mode in modes:
                    path = folder / "results" / task / mode / "scores.jsonl"
                    path.parent.mkdir(parents=True)
                    path.write_text("".join(json.dumps({"id": id, "ret": value, "cor": None}) + "\n" for id, value in values.items()))
            questions = {task: task if same_questions else f"{task} of {seed}" for task in MEANING}
            done = {"command": "c", "seconds": 1.0} if tasks is not None else None
            trained = done and {**done, "resumed": False, "hardware": "h", "steps": 1, "parameters": {"gen": 10**6}, "losses": {"loss": 1.0}}
            run = {"arm": arm, "seed": seed, "options": {}, "failure": None, "trained": trained, "evaluated": done}
            runs.append({**run, "evaluation": str(folder), "questions": questions})
    told = {"title": "T", "about": "", "arms": {arm: {} for arm in scores}, "baseline": list(scores)[0], "seeds": [0, 1], "evaluation": {"modes": list(modes)}}
    told |= {"axis": None, "corpus_sizes": None, "world": None, "tasks": None}
    return Results({**told, **experiment}, runs, MEANING)


SCORES = {
    "old": {0: {"a": {"1": 1, "2": 0}, "b": {"1": 0, "2": 0}}, 1: {"a": {"1": 1, "2": 1}, "b": {"1": 1, "2": 0}}},
    "new": {0: {"a": {"1": 1, "2": 1}, "b": {"1": 1, "2": 1}}, 1: {"a": {"1": 1, "2": 1}, "b": {"1": 1, "2": 1}}},
}


def test_mean_and_deviation_over_seeds_and_plain_mean_over_tasks(tmp_path):
    results = make(tmp_path, SCORES)
    old = results.figure("old", ["a"], "ret")
    assert (old["value"], old["n"], old["seeds"]) == (0.75, 2, {0: 0.5, 1: 1.0})  # asked the same two questions: n is 2
    assert old["deviation"] == pytest.approx(0.5**0.5 / 2)
    assert results.figure("old", ["a", "b"], "ret")["value"] == pytest.approx((0.75 + 0.25) / 2)
    assert results.figure("old", ["a"], "cor") is None
    found = results.compare("new", ["a", "b"], "ret")
    assert found["difference"] == pytest.approx(0.5)
    assert found["rate"] == pytest.approx(100.0)  # from 0.5 to 1.0
    assert found["seeds"] == {0: 0.75, 1: 0.25}
    assert found["n"] == 4
    assert found["left_out"] == 0


def test_an_average_says_in_how_many_tasks_it_exists(tmp_path):
    scores = {"old": {0: {"a": {"1": 1}, "b": {"1": 0}}}, "new": {0: {"a": {"1": 1}, "b": {"1": None}}}}
    results = make(tmp_path, scores)
    old, new = (results.figure(line, ["a", "b"], "ret") for line in ("old", "new"))
    assert (old["value"], old["tasks"], old["of_tasks"]) == (0.5, 2, 2) and (new["value"], new["tasks"], new["of_tasks"]) == (1.0, 1, 2)
    found = results.compare("new", ["a", "b"], "ret")
    assert (found["difference"], found["tasks"], found["of_tasks"]) == (0.0, 1, 2)
    write_experiment_report(results, tmp_path / "out")
    text = (tmp_path / "out" / "report.md").read_text()
    assert text.count("n = 1, 1 of 2 tasks") == 2 and "2 of 2 tasks" not in text  # the average, and its difference


def test_the_report_says_what_cor_is(tmp_path):
    results = make(tmp_path, SCORES)
    for arm in SCORES:
        told = {"a": {"cor": ["fever_label"]}, "b": {"cor": ["em", "f1"]}}
        (tmp_path / f"{arm}-0" / "results" / "metrics.json").write_text(json.dumps({"tasks": told}))
    results = Results(results.experiment, results.runs, MEANING)
    write_experiment_report(results, tmp_path / "out")
    assert "Cor is a: FEVER, label; b: EM, F1." in (tmp_path / "out" / "report.md").read_text()


def test_questions_of_other_worlds_are_other_questions(tmp_path):
    results = make(tmp_path, SCORES, same_questions=False)
    assert results.figure("old", ["a"], "ret")["n"] == 4
    assert results.figure("old", ["a"], "ret")["value"] == 0.75
    assert results.compare("new", ["a"], "ret")["n"] == 4


def test_only_what_both_have_is_compared(tmp_path):
    scores = {"old": {0: {"a": {"1": 0, "2": None}}, 1: {"a": {"1": 0, "2": 0}}}, "new": {0: {"a": {"1": 1, "2": 1}}, 1: None}}
    results = make(tmp_path, scores)
    found = results.compare("new", ["a"], "ret")
    assert (found["difference"], found["n"], found["left_out"], list(found["seeds"])) == (1.0, 1, 1, [0])
    assert found["rate"] is None  # of 0
    assert results.compare("new", ["b"], "ret") is None


@pytest.mark.parametrize(
    ("interval", "differences", "said"),
    [
        ((0.1, 0.3), [0.2, 0.2], "ahead"),
        ((0.1, 0.3), [0.5, -0.1], "within noise"),
        ((-0.3, -0.1), [-0.2], "behind"),
        ((-0.1, 0.3), [0.1, 0.1], "within noise"),
    ],
)
def test_verdict(interval, differences, said):
    assert verdict(interval, differences) == said


def test_report_says_who_is_ahead_and_what_is_missing(tmp_path):
    many = {arm: {0: {task: {str(i): float(i % 10 < right) for i in range(100)} for task in "ab"}} for arm, right in (("old", 4), ("new", 8), ("same", 4))}
    results = make(tmp_path, {**many, "absent": {0: None}}, seeds=[0], title="<script>alert(1)</script>")
    write_experiment_report(results, tmp_path / "report")
    text, page = ((tmp_path / "report" / f"report.{kind}").read_text() for kind in ("md", "html"))
    cells = ["new: full corpus, in-domain average", "Ret (+40.0)", "—", "—"]
    assert f"| {' | '.join(map(_plain, cells))} |" in text
    cells = ["same: full corpus, out-of-domain average", "—", "—", "Ret (+0.0)"]
    assert f"| {' | '.join(map(_plain, cells))} |" in text
    assert "absent, seed 0: not run" in page
    assert "+40.0 (+100.0 %)" in page
    assert "<script>" not in page and "<script>" not in text
    assert json.loads((tmp_path / "report" / "experiment.json").read_text())["comparisons"]["full corpus"]["new"]["all"]["ret"]["verdict"] == "ahead"


def test_modes_of_one_arm_are_compared_with_each_other(tmp_path):
    results = make(tmp_path, {"co": SCORES["old"]}, modes=("retrieval", "gold"), baseline="retrieval")
    assert results.lines == ["retrieval", "gold"]
    assert results.baseline == "retrieval"
    assert results.compare("gold", ["a"], "ret")["difference"] == 0
    write_experiment_report(results, tmp_path / "report")
    assert "oracle passage" in (tmp_path / "report" / "report.md").read_text()


@pytest.mark.parametrize("option", ["axis", "corpus_sizes"])
def test_curves_are_drawn(tmp_path, option):
    pytest.importorskip("matplotlib", reason="draws")
    arms = {"old": {"temperature": 0.1}, "new": {}}
    results = make(tmp_path, SCORES, arms=arms, **{option: "temperature" if option == "axis" else [10]})
    if option == "corpus_sizes":
        results.meaning = {name: {**own, "size": 10} for name, own in MEANING.items()}
    write_experiment_report(results, tmp_path / "report")
    assert (tmp_path / "report" / "plots" / "curves.png").stat().st_size > 5000


def test_every_mode_has_its_curve(tmp_path):
    arms = {"old": {"temperature": 0.1}, "new": {"temperature": "1e-2"}}
    panels = _over_option(make(tmp_path, SCORES, ("retrieval", "forced"), arms=arms, axis="temperature"), ["ret"])[1]
    where = [f"full corpus, {split}, {mode}" for split in ("in-domain", "out-of-domain") for mode in ("own decision", "forced [NSP]")]
    assert {label: sorted(points) for label, points in panels["Ret"].items()} == {label: [0.01, 0.1] for label in where}
