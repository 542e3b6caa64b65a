"""The figures of an experiment, against numbers computed by hand."""

import json
from pathlib import Path

import pytest

from support.experiment_results import MEANING, make, write_report, write_scores
from trainer.judging.results import FORMAT
from trainer.reports.document import escape_markdown
from trainer.reports.experiment import write_experiment_report
from trainer.reports.experiment_figures import Results
from trainer.reports.experiment_plots import _over_corpus_sizes, _over_option, _without_option

CORPORA_OF_10 = {name: {**about, "size": 10} for name, about in MEANING.items()}

SCORES = {
    "old": {0: {"a": {"1": 1, "2": 0}, "b": {"1": 0, "2": 0}}, 1: {"a": {"1": 1, "2": 1}, "b": {"1": 1, "2": 0}}},
    "new": {0: {"a": {"1": 1, "2": 1}, "b": {"1": 1, "2": 1}}, 1: {"a": {"1": 1, "2": 1}, "b": {"1": 1, "2": 1}}},
}


def test_mean_and_deviation_over_seeds_and_plain_mean_over_tasks(tmp_path):
    results = make(tmp_path, SCORES)
    old = results.figure("old", ["a"], "ret")
    assert (old["value"], old["seeds"]) == (0.75, {0: 0.5, 1: 1.0})
    assert old["n"] == 2  # both seeds were asked the same two questions
    assert old["deviation"] == pytest.approx(0.5**0.5 / 2)
    assert results.figure("old", ["a", "b"], "ret")["value"] == pytest.approx((0.75 + 0.25) / 2)
    assert results.figure("old", ["a"], "cor") is None
    difference = results.compare("new", ["a", "b"], "ret")
    assert difference["difference"] == pytest.approx(0.5)
    assert difference["rate"] == pytest.approx(100.0)  # from 0.5 to 1.0
    assert difference["seeds"] == {0: 0.75, 1: 0.25}
    assert difference["n"] == 4
    assert difference["left_out"] == 0


def test_an_average_says_in_how_many_tasks_it_exists(tmp_path):
    scores = {"old": {0: {"a": {"1": 1}, "b": {"1": 0}}}, "new": {0: {"a": {"1": 1}, "b": {"1": None}}}}
    results = make(tmp_path, scores)
    old = results.figure("old", ["a", "b"], "ret")
    assert (old["value"], old["tasks"], old["of_tasks"]) == (0.5, 2, 2)
    new = results.figure("new", ["a", "b"], "ret")
    assert (new["value"], new["tasks"], new["of_tasks"]) == (1.0, 1, 2)
    difference = results.compare("new", ["a", "b"], "ret")
    assert (difference["difference"], difference["tasks"], difference["of_tasks"]) == (0.0, 1, 2)
    text = write_report(results, tmp_path / "out")
    assert "| 100.0 — n = 1, 1 of 2 tasks, 1 of 2 seeds |" in text.replace("**", "")
    assert "+0.0 (+0.0 %) — n = 1 (1 left out), 1 of 2 tasks, 1 of 2 seeds, 0 / 1 / 0, within noise" in text
    assert "2 of 2 tasks" not in text


def test_a_seed_that_lacks_a_task_does_not_count_in_an_average(tmp_path):
    """Otherwise the mean of seed 1 would be that of the easy task alone: better because something is missing."""
    easy, hard = {str(i): 1 for i in range(4)}, {str(i): 0 for i in range(4)}
    whole, partial = {"a": easy, "b": hard}, {"a": easy, "b": dict.fromkeys(hard)}
    results = make(tmp_path, {"old": {0: {"a": hard, "b": hard}, 1: whole}, "new": {0: whole, 1: partial}})
    new = results.figure("new", ["a", "b"], "ret")
    assert (new["value"], new["seeds"], new["n"]) == (0.5, {0: 0.5}, 8)
    assert (new["tasks"], new["of_seeds"], new["deviation"]) == (2, 2, None)
    assert results.figure("new", ["a"], "ret")["seeds"] == {0: 1.0, 1: 1.0}
    difference = results.compare("new", ["a", "b"], "ret")
    assert (difference["difference"], difference["seeds"], difference["rate"]) == (0.5, {0: 0.5}, None)
    assert (difference["n"], difference["left_out"], difference["of_seeds"]) == (8, 0, 2)
    text = write_report(results, tmp_path / "out")
    assert "n = 8, 1 of 2 seeds" in text
    assert "n = 8, 1 of 2 seeds, 1 / 0 / 0, " in text


def test_an_average_that_no_seed_has_in_all_tasks_has_no_value(tmp_path):
    scores = {0: {"a": {"1": 1}, "b": {"1": None}}, 1: {"a": {"1": None}, "b": {"1": 1}}}
    results = make(tmp_path, {"old": scores, "new": scores})
    assert results.figure("old", ["a", "b"], "ret") is None
    assert results.compare("new", ["a", "b"], "ret") is None
    assert results.figure("old", ["a"], "ret")["seeds"] == {0: 1.0}


def test_the_caution_counts_the_seeds_that_were_evaluated(tmp_path):
    """Not those of the file, of which some may have failed."""
    complete = write_report(make(tmp_path / "a", SCORES), tmp_path / "a" / "out")
    assert "There is one seed" not in complete
    partly = make(tmp_path / "b", {**SCORES, "new": {0: SCORES["new"][0], 1: None}})
    assert "There is one seed of new." in write_report(partly, tmp_path / "b" / "out")
    alone = make(tmp_path / "c", {arm: {0: seeds[0], 1: None} for arm, seeds in SCORES.items()})
    assert "There is one seed. What another" in write_report(alone, tmp_path / "c" / "out")


def test_a_difference_on_one_question_is_within_noise(tmp_path):
    results = make(tmp_path, {"old": {0: {"a": {"1": 0}}}, "new": {0: {"a": {"1": 1}}}})
    difference = results.compare("new", ["a"], "ret")
    assert (difference["difference"], difference["interval"], difference["verdict"]) == (1.0, None, "within noise")


def test_the_report_says_what_cor_is(tmp_path):
    results = make(tmp_path, SCORES, cor={"a": ["fever_label"], "b": ["em", "f1"]})
    assert "Cor is a: FEVER, label; b: EM, F1." in write_report(results, tmp_path / "out")


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
    difference = results.compare("new", ["a"], "ret")
    assert (difference["difference"], difference["n"], difference["left_out"]) == (1.0, 1, 1)
    assert list(difference["seeds"]) == [0]
    assert difference["rate"] is None  # the baseline is 0
    assert results.compare("new", ["b"], "ret") is None


def test_retrieval_holds_the_rankings_of_what_it_searches(tmp_path):
    """The ranking is over the pool if there is one, and otherwise over the corpus. Mode query shows it alone."""
    results = make(tmp_path, SCORES)
    mrr = {"corpus": 0.25, "pool": 0.5}
    for task, scopes in {"a": ("corpus",), "b": ("corpus", "pool")}.items():
        rows = [{"id": "1", "scope": scope, "mrr": mrr[scope]} for scope in scopes]
        write_scores(tmp_path / "old-0" / "results" / task / "query", rows)
    for mode in ("retrieval", "query"):
        experiment = {**results.experiment, "evaluation": {"modes": [mode]}}
        mode_results = Results(experiment, results.runs, MEANING)
        assert mode_results.figure("old", ["a"], "mrr")["value"] == 0.25
        assert mode_results.figure("old", ["b"], "mrr")["value"] == 0.5
        has_ret = mode_results.figure("old", ["a"], "ret") is not None
        assert has_ret == (mode == "retrieval")


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
    scores = {}
    for arm, num_right in (("old", 4), ("new", 8), ("same", 4)):
        values = {str(i): float(i % 10 < num_right) for i in range(100)}
        scores[arm] = {0: {"a": values, "b": values}}
    scores["absent"] = {0: None}
    results = make(tmp_path, scores, seeds=[0], title="<script>alert(1)</script>")
    text = write_report(results, tmp_path / "report")
    page = (tmp_path / "report" / "report.html").read_text()
    cells = ["new: full corpus, in-domain average", "Ret (+40.0)", "—", "—"]
    assert f"| {' | '.join(map(escape_markdown, cells))} |" in text
    cells = ["same: full corpus, out-of-domain average", "—", "—", "Ret (+0.0)"]
    assert f"| {' | '.join(map(escape_markdown, cells))} |" in text
    assert "absent, seed 0: not run" in page
    assert "+40.0 (+100.0 %)" in page
    assert "<script>" not in page
    assert "<script>" not in text
    comparisons = json.loads((tmp_path / "report" / "experiment.json").read_text())["comparisons"]
    assert comparisons["full corpus"]["new"]["all"]["ret"]["verdict"] == "ahead"


def test_arms_are_compared_in_the_same_mode(tmp_path):
    """Gold passages help every arm: that is no difference between arms."""
    scores = {"old": SCORES["old"], "new": SCORES["old"]}
    results = make(tmp_path, scores, modes=("retrieval", "gold"))
    for run in results.runs:  # all answers with gold passages are right
        rows = [{"id": "1", "ret": 1.0}]
        for task in ("a", "b"):
            write_scores(Path(run["evaluation"]) / "results" / task / "gold", rows)
    results = Results(results.experiment, results.runs, MEANING)
    assert [results.baseline_of(line) for line in results.lines] == [None, None, "old, retrieval", "old, gold"]
    assert results.compared_lines == ["new, retrieval", "new, gold"]
    assert results.compare("new, gold", ["a"], "ret")["difference"] == 0
    assert results.compare("old, gold", ["a"], "ret") is None
    text = write_report(results, tmp_path / "report")
    assert "## Against old, in the same mode" in text
    assert "ahead in" in text and "Ret (+" not in text.replace("Ret (+0.0)", "")


def test_modes_of_one_arm_are_compared_with_each_other(tmp_path):
    results = make(tmp_path, {"co": SCORES["old"]}, modes=("retrieval", "gold"), baseline="retrieval")
    assert results.lines == ["retrieval", "gold"]
    assert results.baseline == "retrieval"
    assert results.compare("gold", ["a"], "ret")["difference"] == 0
    assert [results.label(line) for line in results.lines] == ["own retrieval", "gold passages given"]
    assert "gold passages given: full corpus, in-domain average" in write_report(results, tmp_path / "report")


def test_every_measured_figure_is_in_the_report(tmp_path):
    """The last table shows, in order, the figures that no table before it shows."""
    results = make(tmp_path, SCORES)
    for run in results.runs:
        row = {
            "id": "1",
            "ret": 1,
            "em_not_needed": 1,
            "f1": 0.5,
            "kilt_recall@1": 1,
            "short_answer": 1,
            "cor_failure": 0,
        }
        write_scores(Path(run["evaluation"], "results", "a", "retrieval"), [row])
        ranking = {"id": "1", "scope": "corpus", "hit_rate@5": 1}
        write_scores(Path(run["evaluation"], "results", "a", "query"), [ranking])
    text = write_report(Results(results.experiment, results.runs, MEANING), tmp_path / "report")
    headers = [line for line in text.splitlines() if line.startswith("|  |")]
    assert "|  | Ret | Gr | HR@5 |" in headers  # the main table
    assert "|  | KILT recall@1 | Cor, Ret = 0 | short answer | F1 |" in headers
    assert any("EM, not needed" in header for header in headers)


@pytest.mark.parametrize("options", [{"axis": "temperature"}, {"corpus_sizes": [10]}], ids=["axis", "corpus_sizes"])
def test_curves_are_drawn(tmp_path, options):
    pytest.importorskip("matplotlib", reason="draws plots")
    results = make(tmp_path, SCORES, arms={"old": {"temperature": 0.1}, "new": {}}, **options)
    if "corpus_sizes" in options:
        results.meaning = CORPORA_OF_10
    write_experiment_report(results, tmp_path / "report")
    assert (tmp_path / "report" / "plots" / "curves.png").stat().st_size > 5000


def test_every_mode_has_its_curve(tmp_path):
    arms = {"old": {"temperature": 0.1}, "new": {"temperature": "1e-2"}}
    results = make(tmp_path, SCORES, ("retrieval", "forced"), arms=arms, axis="temperature")
    curves = _over_option(results, "ret")
    assert {label: sorted(points) for label, points in curves.items()} == {
        "full corpus, in-domain, own retrieval": [0.01, 0.1],
        "full corpus, in-domain, [NSP] forced first": [0.01, 0.1],
        "full corpus, out-of-domain, own retrieval": [0.01, 0.1],
        "full corpus, out-of-domain, [NSP] forced first": [0.01, 0.1],
    }
    assert _without_option(results, "ret") == {}


def test_an_arm_without_the_option_is_a_level_line(tmp_path):
    results = make(tmp_path, SCORES, arms={"old": {"temperature": 0.1}, "new": {}}, axis="temperature")
    assert [list(curve) for curve in _over_option(results, "ret").values()] == [[0.1], [0.1]]
    assert _without_option(results, "ret") == {
        "new, full corpus, in-domain": results.figure("new", ["a"], "ret"),
        "new, full corpus, out-of-domain": results.figure("new", ["b"], "ret"),
    }


def test_corpora_are_points_of_a_curve(tmp_path):
    results = make(tmp_path, SCORES)
    results.meaning = CORPORA_OF_10
    curves = _over_corpus_sizes(results, "ret")
    assert len(curves) == 4
    assert curves["old, in-domain"] == {10: results.figure("old", ["a"], "ret")}
