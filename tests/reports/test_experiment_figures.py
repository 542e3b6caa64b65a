"""The figures of an experiment, against numbers computed by hand."""

import json

import pytest

from trainer.judging.results import FORMAT
from trainer.reports.document import escape_markdown
from trainer.reports.experiment import write_experiment_report
from trainer.reports.experiment_figures import Results
from trainer.reports.experiment_plots import _over_corpus_sizes, _over_option, _without_option

MEANING = {
    "a": {"task": "a", "setting": "full corpus", "size": None, "split": "in-domain"},
    "b": {"task": "b", "setting": "full corpus", "size": None, "split": "out-of-domain"},
}


def make(tmp_path, scores, modes=("retrieval",), same_questions=True, cor=None, **experiment):
    """Results of `{arm: {seed: {task: {id: ret}}}}`, written as recipes/run_evaluation.py writes them."""
    runs = []
    for arm, seeds in scores.items():
        for seed, tasks in seeds.items():
            folder = tmp_path / f"{arm}-{seed}"
            for task, values in (tasks or {}).items():
                for mode in modes:
                    path = folder / "results" / task / mode / "scores.jsonl"
                    path.parent.mkdir(parents=True)
                    path.write_text(
                        "".join(
                            json.dumps({"id": id, "ret": value, "cor": None}) + "\n" for id, value in values.items()
                        )
                    )
            if tasks is not None:
                told = {task: {"cor": (cor or {}).get(task, [])} for task in tasks}
                (folder / "results").mkdir(parents=True, exist_ok=True)
                (folder / "results" / "metrics.json").write_text(json.dumps({"format": FORMAT, "tasks": told}))
            questions = {task: task if same_questions else f"{task} of {seed}" for task in MEANING}
            done = {"command": "c", "seconds": 1.0} if tasks is not None else None
            trained = done and {
                **done,
                "resumed": False,
                "hardware": "h",
                "steps": 1,
                "parameters": {"gen": 10**6},
                "losses": {"loss": 1.0},
            }
            run = {"arm": arm, "seed": seed, "options": {}, "failure": None, "trained": trained, "evaluated": done}
            runs.append({**run, "evaluation": str(folder), "questions": questions})
    told = {
        "title": "T",
        "about": "",
        "arms": {arm: {} for arm in scores},
        "baseline": list(scores)[0],
        "seeds": [0, 1],
        "evaluation": {"modes": list(modes)},
    }
    told |= {"axis": None, "corpus_sizes": None, "world": None, "tasks": None}
    return Results({**told, **experiment}, runs, MEANING)


SCORES = {
    "old": {0: {"a": {"1": 1, "2": 0}, "b": {"1": 0, "2": 0}}, 1: {"a": {"1": 1, "2": 1}, "b": {"1": 1, "2": 0}}},
    "new": {0: {"a": {"1": 1, "2": 1}, "b": {"1": 1, "2": 1}}, 1: {"a": {"1": 1, "2": 1}, "b": {"1": 1, "2": 1}}},
}


def test_mean_and_deviation_over_seeds_and_plain_mean_over_tasks(tmp_path):
    results = make(tmp_path, SCORES)
    old = results.figure("old", ["a"], "ret")
    assert (old["value"], old["n"], old["seeds"]) == (
        0.75,
        2,
        {0: 0.5, 1: 1.0},
    )  # asked the same two questions: n is 2
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
    assert (old["value"], old["tasks"], old["of_tasks"]) == (0.5, 2, 2) and (
        new["value"],
        new["tasks"],
        new["of_tasks"],
    ) == (1.0, 1, 2)
    found = results.compare("new", ["a", "b"], "ret")
    assert (found["difference"], found["tasks"], found["of_tasks"]) == (0.0, 1, 2)
    write_experiment_report(results, tmp_path / "out")
    text = (tmp_path / "out" / "report.md").read_text()
    assert text.count("n = 1, 1 of 2 tasks") == 2 and "2 of 2 tasks" not in text  # the average, and its difference


def test_the_report_says_what_cor_is(tmp_path):
    results = make(tmp_path, SCORES, cor={"a": ["fever_label"], "b": ["em", "f1"]})
    write_experiment_report(results, tmp_path / "out")
    assert "Cor is a: FEVER, label; b: EM, F1." in (tmp_path / "out" / "report.md").read_text()


def test_questions_of_other_worlds_are_other_questions(tmp_path):
    results = make(tmp_path, SCORES, same_questions=False)
    assert results.figure("old", ["a"], "ret")["n"] == 4
    assert results.figure("old", ["a"], "ret")["value"] == 0.75
    assert results.compare("new", ["a"], "ret")["n"] == 4


def test_only_what_both_have_is_compared(tmp_path):
    scores = {
        "old": {0: {"a": {"1": 0, "2": None}}, 1: {"a": {"1": 0, "2": 0}}},
        "new": {0: {"a": {"1": 1, "2": 1}}, 1: None},
    }
    results = make(tmp_path, scores)
    found = results.compare("new", ["a"], "ret")
    assert (found["difference"], found["n"], found["left_out"], list(found["seeds"])) == (1.0, 1, 1, [0])
    assert found["rate"] is None  # of 0
    assert results.compare("new", ["b"], "ret") is None


def test_rankings_of_what_is_searched_stand_with_the_own_decision(tmp_path):
    """Of a pool where there is one, else of the corpus; mode query shows them alone."""
    results = make(tmp_path, SCORES)
    for task, scopes in {"a": ("corpus",), "b": ("corpus", "pool")}.items():
        path = tmp_path / "old-0" / "results" / task / "query" / "scores.jsonl"
        path.parent.mkdir()
        rows = [{"id": "1", "scope": scope, "mrr": {"corpus": 0.25, "pool": 0.5}[scope]} for scope in scopes]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for modes in (["retrieval"], ["query"]):
        experiment = {**results.experiment, "evaluation": {"modes": modes}}
        again = Results(experiment, results.runs, MEANING)
        assert [again.figure("old", [task], "mrr")["value"] for task in "ab"] == [0.25, 0.5]
        assert (again.figure("old", ["a"], "ret") is None) == (modes == ["query"])


def test_results_that_are_not_complete_or_of_another_format_are_refused(tmp_path):
    results = make(tmp_path, SCORES)
    path = tmp_path / "new-1" / "results" / "metrics.json"
    path.write_text(json.dumps({"tasks": {}}))
    (path.parent / "a" / "retrieval" / "scores.jsonl").write_text(json.dumps({"id": "1", "recall@1": 1.0}) + "\n")
    with pytest.raises(ValueError, match=f"is of format 1, expected format {FORMAT}"):
        Results(results.experiment, results.runs, MEANING)
    path.unlink()
    with pytest.raises(FileNotFoundError, match="no complete results folder"):
        Results(results.experiment, results.runs, MEANING)


def test_report_says_who_is_ahead_and_what_is_missing(tmp_path):
    many = {
        arm: {0: {task: {str(i): float(i % 10 < right) for i in range(100)} for task in "ab"}}
        for arm, right in (("old", 4), ("new", 8), ("same", 4))
    }
    results = make(tmp_path, {**many, "absent": {0: None}}, seeds=[0], title="<script>alert(1)</script>")
    write_experiment_report(results, tmp_path / "report")
    text, page = ((tmp_path / "report" / f"report.{kind}").read_text() for kind in ("md", "html"))
    cells = ["new: full corpus, in-domain average", "Ret (+40.0)", "—", "—"]
    assert f"| {' | '.join(map(escape_markdown, cells))} |" in text
    cells = ["same: full corpus, out-of-domain average", "—", "—", "Ret (+0.0)"]
    assert f"| {' | '.join(map(escape_markdown, cells))} |" in text
    assert "absent, seed 0: not run" in page
    assert "+40.0 (+100.0 %)" in page
    assert "<script>" not in page and "<script>" not in text
    assert (
        json.loads((tmp_path / "report" / "experiment.json").read_text())["comparisons"]["full corpus"]["new"]["all"][
            "ret"
        ]["verdict"]
        == "ahead"
    )


def test_modes_of_one_arm_are_compared_with_each_other(tmp_path):
    results = make(tmp_path, {"co": SCORES["old"]}, modes=("retrieval", "gold"), baseline="retrieval")
    assert results.lines == ["retrieval", "gold"]
    assert results.baseline == "retrieval"
    assert results.compare("gold", ["a"], "ret")["difference"] == 0
    write_experiment_report(results, tmp_path / "report")
    assert [results.label(line) for line in results.lines] == ["own retrieval", "gold passages given"]
    assert "gold passages given: full corpus, in-domain average" in (tmp_path / "report" / "report.md").read_text()


def test_whatever_was_measured_is_in_the_report(tmp_path):
    """A figure needs no place in the report: what the tables before do not show stands in the last one, in order."""
    results = make(tmp_path, SCORES)
    for run in results.runs:
        path = tmp_path / f"{run['arm']}-{run['seed']}" / "results" / "a" / "retrieval" / "scores.jsonl"
        row = {
            "id": "1",
            "ret": 1,
            "em_not_needed": 1,
            "f1": 0.5,
            "kilt_recall@1": 1,
            "short_answer": 1,
            "cor_failure": 0,
        }
        path.write_text(json.dumps(row) + "\n")
    write_experiment_report(Results(results.experiment, results.runs, MEANING), tmp_path / "report")
    heads = [line for line in (tmp_path / "report" / "report.md").read_text().splitlines() if line.startswith("|  |")]
    assert "|  | KILT recall@1 | Cor, Ret = 0 | short answer | F1 |" in heads
    assert any("EM, not needed" in head for head in heads)


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
    results = make(tmp_path, SCORES, ("retrieval", "forced"), arms=arms, axis="temperature")
    curves = _over_option(results, "ret")
    where = [
        f"full corpus, {split}, {mode}"
        for split in ("in-domain", "out-of-domain")
        for mode in ("own retrieval", "[NSP] forced first")
    ]
    assert {label: sorted(points) for label, points in curves.items()} == {label: [0.01, 0.1] for label in where}
    assert _without_option(results, "ret") == {}


def test_an_arm_without_the_option_is_a_level_and_corpora_are_places_of_a_curve(tmp_path):
    results = make(tmp_path, SCORES, arms={"old": {"temperature": 0.1}, "new": {}}, axis="temperature")
    assert [list(curve) for curve in _over_option(results, "ret").values()] == [[0.1], [0.1]]
    assert _without_option(results, "ret") == {
        "new, full corpus, in-domain": results.figure("new", ["a"], "ret"),
        "new, full corpus, out-of-domain": results.figure("new", ["b"], "ret"),
    }
    results.meaning = {name: {**about, "size": 10} for name, about in MEANING.items()}
    curves = _over_corpus_sizes(results, "ret")
    assert curves["old, in-domain"] == {10: results.figure("old", ["a"], "ret")} and len(curves) == 4
