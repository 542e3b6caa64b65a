"""Comparisons of two results folders: against numbers computed by hand, with other questions, and by the recipe."""

import json
import re

import pytest

from support.forks import run_forked
from trainer.judging.figures import figure
from trainer.judging.results import FORMAT
from trainer.reports.cells import verdict
from trainer.reports.comparison import compare_results, comparison_blocks, section_label, task_count, write_comparison
from trainer.reports.document import to_markdown


def write_results(folder, tasks, model="m"):
    """Write a results folder of hand-made scores: `tasks` is `{name: (split, {section: [scores of a question]})}`."""
    task_results = {}
    for name, (split, sections) in tasks.items():
        task = {"split": split, "pool": "full", "modes": {}, "query": {}}
        for section, scores in sections.items():
            mode, _, scope = section.partition(" ")
            if scope:
                task["query"][scope] = {}
                scores = [{"scope": scope, **row} for row in scores]
            else:
                task["modes"][mode] = {}
            (folder / name / mode).mkdir(parents=True, exist_ok=True)
            with open(folder / name / mode / "scores.jsonl", "a") as file:
                file.writelines(json.dumps({"id": f"q{i}", **row}) + "\n" for i, row in enumerate(scores))
        task_results[name] = task
    folder.mkdir(exist_ok=True)
    metrics = {"format": FORMAT, "settings": {"model": model}, "tasks": task_results}
    (folder / "metrics.json").write_text(json.dumps(metrics))
    return folder


def rows(cor, **others):
    """Return the scores of questions, given the values of Cor and of other figures."""
    return [{"cor": value, **{name: values[i] for name, values in others.items()}} for i, value in enumerate(cor)]


FIRST = {
    "a": ("in-domain", {"retrieval": rows([0, 0, 1, 1, None], gr=[None, 1, 0, 0, 0]), "off": rows([0, 0])}),
    "b": (
        "out-of-domain",
        {
            "retrieval": rows([0] * 30 + [1] * 10, num_retrievals=[1] * 40),
            "query corpus": [{"mrr": 0.5, "hit_rate@5": 0}, {"mrr": 0.25, "hit_rate@5": None}],
            "query pool": [{"mrr": 1.0}, {"mrr": 0.5}],
        },
    ),
}
SECOND = {
    "a": ("in-domain", {"retrieval": rows([1, 0, 1, 1, None], gr=[1, 0, 0, 1, 0]), "gold": rows([1, 1])}),
    "b": (
        "out-of-domain",
        {
            "retrieval": rows([1] * 30 + [1] * 10, num_retrievals=[2] * 40),
            "query corpus": [{"mrr": 1.0, "hit_rate@5": 1}, {"mrr": 1.0, "hit_rate@5": None}],
            "query pool": [{"mrr": 1.0}, {"mrr": 1.0}],
        },
    ),
    "c": (None, {"retrieval": rows([1])}),
}


@pytest.fixture
def folders(tmp_path):
    return write_results(tmp_path / "first", FIRST, "one"), write_results(tmp_path / "second", SECOND, "two")


def test_differences_by_hand(folders):
    comparison = compare_results(*folders)
    assert set(comparison["tasks"]["a"]) == {"retrieval"}  # the only mode in both folders
    assert comparison["notes"] == [
        "1 tasks are only in the second folder: c",
        "a: only the first folder has retrieval off",
        "a: only the second folder has gold passages given",
    ]

    cor = comparison["tasks"]["a"]["retrieval"]["cor"]
    assert (cor["first"], cor["second"], cor["difference"]) == (0.5, 0.75, 0.25)
    assert (cor["n"], cor["left_out"]) == (4, 0)  # the fifth question has no value in either run
    gr = comparison["tasks"]["a"]["retrieval"]["gr"]
    assert (gr["first"], gr["second"]) == (0.25, 0.25)
    assert (gr["n"], gr["left_out"]) == (4, 1)
    assert gr["p_value"] == 1.0

    clear = comparison["tasks"]["b"]["retrieval"]["cor"]
    assert clear["difference"] == 0.75
    assert clear["interval"][0] > 0.5
    assert clear["p_value"] < 0.001
    assert comparison["tasks"]["b"]["query corpus"]["mrr"]["difference"] == 0.625
    assert comparison["tasks"]["b"]["query pool"]["mrr"]["difference"] == 0.25
    hit_rate = comparison["tasks"]["b"]["query corpus"]["hit_rate@5"]
    assert (hit_rate["difference"], hit_rate["n"], hit_rate["left_out"]) == (1.0, 1, 0)


def test_averages_by_hand(folders):
    averages = compare_results(*folders)["averages"]
    assert set(averages) == {"in-domain", "out-of-domain", "all"}
    average = averages["all"]["retrieval"]["cor"]
    assert average["first"] == pytest.approx((0.5 + 0.25) / 2)
    assert average["second"] == pytest.approx((0.75 + 1) / 2)
    assert average["difference"] == pytest.approx(0.5)
    assert average["rate"] == pytest.approx(100 * 0.5 / 0.375)
    assert (average["tasks"], average["of_tasks"], task_count(average)) == (2, 2, "2")
    assert task_count(averages["all"]["retrieval"]["gr"]) == "1 of 2"
    assert average["interval"][0] < 0.5 < average["interval"][1]
    assert averages["out-of-domain"]["query corpus"]["mrr"]["n"] == 2


def test_a_comparison_is_deterministic(folders):
    assert compare_results(*folders) == compare_results(*folders)


def test_the_reverse_comparison_is_the_mirror_image(folders):
    forward = compare_results(*folders)["tasks"]["b"]["retrieval"]["cor"]
    backward = compare_results(*folders[::-1])["tasks"]["b"]["retrieval"]["cor"]
    assert forward["difference"] == -backward["difference"]
    assert forward["p_value"] == backward["p_value"]
    assert forward["interval"] == [-bound for bound in backward["interval"][::-1]]


def test_other_questions_are_refused_with_counts(folders, tmp_path):
    other = write_results(tmp_path / "other", {"b": ("out-of-domain", {"retrieval": rows([0] * 43)})})
    counts = r"Task b, mode retrieval: .* of 43 ids 0 are only in .*first, 3 only in .*other, 40 in both"
    with pytest.raises(ValueError, match=counts):
        compare_results(folders[0], other)
    nothing_shared = write_results(tmp_path / "none", {"z": (None, {"off": rows([1])})})
    with pytest.raises(ValueError, match="share no task and mode"):
        compare_results(folders[0], nothing_shared)
    with pytest.raises(FileNotFoundError, match="is no complete results folder"):
        compare_results(folders[0], tmp_path)


def test_settings_that_differ_are_noted(folders):
    path = folders[1] / "metrics.json"
    results = json.loads(path.read_text())
    results["tasks"]["a"]["pool"] = 20
    results["settings"] |= {"nli": True, "nli_model": "judge"}
    path.write_text(json.dumps(results))
    notes = compare_results(*folders)["notes"]
    assert "a: the settings differ in pool: 'full' and 20" in notes
    (judges,) = [note for note in notes if note.startswith("the answers were judged in different ways")]
    assert judges.endswith("nli_model: None and 'judge'")


def test_figures_that_cannot_be_compared_are_noted_and_one_question_has_no_interval(tmp_path):
    """Without a judge there is no Gr to compare, and K-precision of other questions is not comparable."""
    one = rows([0, 1], gr=[1, 0], k_precision=[1, None], ret=[0, None])
    two = rows([1, 1], gr=[None, None], k_precision=[None, 1], ret=[1, 0])
    folders = [
        write_results(tmp_path / "one", {"t": (None, {"retrieval": one})}),
        write_results(tmp_path / "two", {"t": (None, {"retrieval": two})}),
    ]
    comparison = compare_results(*folders)
    assert comparison["notes"] == [
        "t, own retrieval: only the first folder has Gr",
        "t, own retrieval: no question has in both folders K-precision",
    ]
    compared = comparison["tasks"]["t"]["retrieval"]
    assert set(compared) == {"ret", "cor"}
    ret = compared["ret"]
    assert (ret["difference"], ret["n"], ret["left_out"]) == (1.0, 1, 1)
    assert (ret["interval"], ret["p_value"]) == (None, None)
    text = to_markdown(comparison_blocks(comparison, ("one", "two")))
    assert "| Ret | 0.0 | 100.0 | +100.0 — | — | 1 (1 left out) |" in text


def test_questions_with_the_same_ids_but_other_content_are_noted(folders):
    """E.g. other answers: ids alone would let two different sets be compared in silence."""
    for folder, questions in zip(folders, ("one set", "another"), strict=True):
        for task in ("a", "b"):
            digest = questions if task == "b" else "the same"
            (folder / task / "retrieval" / "run.json").write_text(json.dumps({"questions": digest}))
    notes = [note for note in compare_results(*folders)["notes"] if "the same ids" in note]
    assert len(notes) == 1
    assert notes[0].startswith("b, own retrieval: the questions have the same ids in both folders, but not the same")


def test_averages_use_resamples_and_seed(folders):
    def average(**options):
        return compare_results(*folders, **options)["averages"]["all"]["retrieval"]["cor"]

    first = average(resamples=50, seed=7)
    second = average(resamples=50, seed=8)
    assert first["interval"] != second["interval"]
    assert min(first["p_value"], second["p_value"]) >= 1 / 51  # the smallest with 50 resamples
    assert average()["p_value"] < 1 / 51


@pytest.mark.parametrize(
    ("name", "interval", "differences", "expected"),
    [
        ("cor", (0.1, 0.3), [], "ahead"),
        ("cor", (-0.3, -0.1), [], "behind"),
        ("cor", (-0.1, 0.5), [], "within noise"),
        ("cor", (0.0, 0.5), [], "within noise"),
        ("num_retrievals", (0.1, 0.3), [], "more"),
        ("num_retrievals", (-0.3, -0.1), [], "fewer"),
        ("nsp_not_needed", (0.1, 0.3), [], "more"),
        ("nsp_not_needed", (-0.3, -0.1), [], "fewer"),
        ("nsp_needed", (0.1, 0.3), [], "ahead"),
        ("nll", (0.1, 0.3), [], "more"),
        ("cor", (0.1, 0.3), [0.2, 0.2], "ahead"),
        ("cor", (0.1, 0.3), [0.5, -0.1], "within noise"),
        ("cor", (-0.3, -0.1), [-0.2], "behind"),
        ("cor", (-0.3, -0.1), [-0.2, 0.0], "within noise"),
        ("cor", (-0.1, 0.3), [0.1, 0.1], "within noise"),
        ("cor", None, [0.1, 0.1], "within noise"),
    ],
)
def test_verdicts(name, interval, differences, expected):
    assert verdict(name, interval, differences) == expected


def test_results_of_another_format_are_refused(folders):
    path = folders[1] / "metrics.json"
    results = json.loads(path.read_text())
    path.write_text(json.dumps({**results, "format": FORMAT + 1}))
    with pytest.raises(ValueError, match=f"is of format {FORMAT + 1}, expected format {FORMAT}"):
        compare_results(*folders)
    del results["format"]
    path.write_text(json.dumps(results))
    with pytest.raises(ValueError, match="is of format 1"):
        compare_results(*folders)


def test_the_report(folders, tmp_path):
    comparison = compare_results(*folders)
    output = tmp_path / "out"
    write_comparison(comparison, output, ("first", "second"))
    assert json.loads((output / "comparison.json").read_text()) == comparison
    text = (output / "comparison.md").read_text()
    assert text == to_markdown(comparison_blocks(comparison, ("first", "second")))
    assert "| **Cor** | **25.0**" in text
    assert "only in the second folder: c" in text
    plain = text.replace("**", "")
    assert re.search(r"\| Cor \| 25.0 \| 100.0 \| \+75.0 \\\[\+\d\d.\d, \+8\d.\d\\] \| &lt; 0.001 \| 40 \|", plain)
    assert f"| {section_label('query corpus')} |" in plain
    assert f"| {figure('mrr').label} | 37.5 | 100.0 |" in plain
    assert "| retrievals | 1.00 | 2.00 | +1.00 \\[+1.00, +1.00\\] |" in plain  # a count is not in percent
    page = (output / "comparison.html").read_text()
    assert "improvement" in page
    assert "+133.3 %" in page


def run_recipe(*arguments):
    return run_forked("recipes/compare.py", *arguments)


def test_the_recipe(folders, tmp_path):
    output = tmp_path / "out"
    result = run_recipe(*folders, "--output_dir", output)
    assert result.returncode == 0, result.stderr[-2000:]
    cor = r"  Cor +25.0 +100.0 +\+75.0 \[\+\d\d.\d, \+8\d.\d\] +p < 0.001 +n = 40 +ahead\n"
    assert re.search(rf"b, own retrieval\n\n{cor}", result.stdout)
    assert re.search(r"  HR@5 +0.0 +100.0 +\+100.0 ", result.stdout)
    assert re.search(r"average, all, own retrieval\n\n(?s:.*)  Gr .*, 1 of 2 tasks\n", result.stdout)
    assert "note: 1 tasks are only in the second folder: c" in result.stdout
    assert (output / "comparison.html").exists()


def test_the_recipe_ends_with_one_line_for_an_error(folders, tmp_path):
    result = run_recipe(folders[0], tmp_path)
    assert result.returncode == 1
    assert result.stderr.strip().splitlines()[-1].startswith("error: ")
    assert "no complete results folder" in result.stderr
