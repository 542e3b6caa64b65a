"""Comparing two results folders: by hand, with the same and other questions, and as a user does it."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from trainer.judging.figures import figure
from trainer.judging.results import FORMAT
from trainer.reports.cells import verdict
from trainer.reports.comparison import compare_results, comparison_blocks, section_label, write_comparison
from trainer.reports.document import to_markdown

ROOT = Path(__file__).parents[2]


def write_results(folder, tasks, model="m"):
    """A results folder of hand-made scores: `tasks` is `{name: (split, {section: [scores of a question]})}`."""
    found = {}
    for name, (split, modes) in tasks.items():
        found[name] = {"split": split, "pool": "full", "modes": {}, "query": {}}
        for section, rows in modes.items():
            mode, _, scope = section.partition(" ")
            extra = {"scope": scope} if scope else {}
            found[name]["query" if scope else "modes"][scope or mode] = {}
            (folder / name / mode).mkdir(parents=True, exist_ok=True)
            with open(folder / name / mode / "scores.jsonl", "a") as file:
                file.writelines(json.dumps({"id": f"q{i}", **extra, **row}) + "\n" for i, row in enumerate(rows))
    folder.mkdir(exist_ok=True)
    (folder / "metrics.json").write_text(json.dumps({"format": FORMAT, "settings": {"model": model}, "tasks": found}))
    return folder


def rows(cor, **others):
    return [{"cor": value, **{name: values[i] for name, values in others.items()}} for i, value in enumerate(cor)]


FIRST = {
    "a": ("in-domain", {"retrieval": rows([0, 0, 1, 1, None], gr=[None, 1, 0, 0, 0]), "off": rows([0, 0])}),
    "b": (
        "out-of-domain",
        {
            "retrieval": rows([0] * 30 + [1] * 10, num_retrievals=[1] * 40),
            "query corpus": [{"mrr": 0.5}, {"mrr": 0.25}],
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
            "query corpus": [{"mrr": 1.0}, {"mrr": 1.0}],
            "query pool": [{"mrr": 1.0}, {"mrr": 1.0}],
        },
    ),
    "c": (None, {"retrieval": rows([1])}),
}


@pytest.fixture
def folders(tmp_path):
    return write_results(tmp_path / "first", FIRST, "one"), write_results(tmp_path / "second", SECOND, "two")


def test_differences_by_hand(folders):
    found = compare_results(*folders)
    cor = found["tasks"]["a"]["retrieval"]["cor"]
    assert (cor["first"], cor["second"], cor["difference"], cor["n"], cor["left_out"]) == (
        0.5,
        0.75,
        0.25,
        4,
        0,
    )  # of four: one has no value in either
    gr = found["tasks"]["a"]["retrieval"]["gr"]
    assert (gr["first"], gr["second"], gr["n"], gr["left_out"]) == (0.25, 0.25, 4, 1)
    assert gr["p_value"] == 1.0
    sure = found["tasks"]["b"]["retrieval"]["cor"]
    assert sure["difference"] == 0.75 and sure["interval"][0] > 0.5 and sure["p_value"] < 0.001
    assert found["tasks"]["b"]["query corpus"]["mrr"]["difference"] == 0.625
    assert found["tasks"]["b"]["query pool"]["mrr"]["difference"] == 0.25
    average = found["averages"]["all"]["retrieval"]["cor"]
    assert average["first"] == pytest.approx((0.5 + 0.25) / 2) and average["second"] == pytest.approx((0.75 + 1) / 2)
    assert (
        average["difference"] == pytest.approx(0.5)
        and average["rate"] == pytest.approx(100 * 0.5 / 0.375)
        and average["tasks"] == 2
    )
    assert average["interval"][0] < 0.5 < average["interval"][1]
    assert set(found["averages"]) == {"in-domain", "out-of-domain", "all"}
    assert found["averages"]["out-of-domain"]["query corpus"]["mrr"]["n"] == 2
    assert set(found["tasks"]["a"]) == {"retrieval"}  # the mode that both have
    assert found["notes"] == ["1 tasks are only in the second folder: c"]
    assert compare_results(*folders) == found


def test_the_other_way_round(folders):
    there, back = compare_results(*folders), compare_results(*folders[::-1])
    ours, theirs = (run["tasks"]["b"]["retrieval"]["cor"] for run in (there, back))
    assert ours["difference"] == -theirs["difference"] and ours["p_value"] == theirs["p_value"]
    assert ours["interval"] == [-bound for bound in theirs["interval"][::-1]]


def test_other_questions_are_refused_with_counts(folders, tmp_path):
    other = write_results(tmp_path / "other", {"b": ("out-of-domain", {"retrieval": rows([0] * 43)})})
    with pytest.raises(
        ValueError, match=r"Task b, mode retrieval: .* of 43 ids 0 are only in .*first, 3 only in .*other, 40 in both"
    ):
        compare_results(folders[0], other)
    with pytest.raises(ValueError, match="share no task and mode"):
        compare_results(folders[0], write_results(tmp_path / "none", {"z": (None, {"off": rows([1])})}))
    with pytest.raises(FileNotFoundError, match="is no complete results folder"):
        compare_results(folders[0], tmp_path)


def test_settings_that_differ_are_noted(folders):
    path = folders[1] / "metrics.json"
    results = json.loads(path.read_text())
    results["tasks"]["a"]["pool"] = 20
    path.write_text(json.dumps(results))
    results["settings"] |= {"nli": True, "nli_model": "judge"}
    path.write_text(json.dumps(results))
    notes = compare_results(*folders)["notes"]
    assert "a: the settings differ in pool: 'full' and 20" in notes
    assert any(
        note.startswith("the answers were judged in different ways") and note.endswith("nli_model: None and 'judge'")
        for note in notes
    )


def test_resamples_and_seed_are_those_of_averages_too(folders):
    found = [
        compare_results(*folders, resamples=50, seed=seed)["averages"]["all"]["retrieval"]["cor"] for seed in (7, 8)
    ]
    assert found[0]["interval"] != found[1]["interval"] and min(each["p_value"] for each in found) >= 1 / 51
    assert compare_results(*folders)["averages"]["all"]["retrieval"]["cor"]["p_value"] < 1 / 51


@pytest.mark.parametrize(
    ("name", "interval", "differences", "expected"),
    [
        ("cor", (0.1, 0.3), [], "ahead"),
        ("cor", (-0.3, -0.1), [], "behind"),
        ("cor", (-0.1, 0.5), [], "within noise"),
        ("cor", (0.0, 0.5), [], "within noise"),
        ("num_retrievals", (0.1, 0.3), [], "more"),
        ("num_retrievals", (-0.3, -0.1), [], "fewer"),
        ("cor", (0.1, 0.3), [0.2, 0.2], "ahead"),
        ("cor", (0.1, 0.3), [0.5, -0.1], "within noise"),
        ("cor", (-0.3, -0.1), [-0.2], "behind"),
        ("cor", (-0.3, -0.1), [-0.2, 0.0], "within noise"),
        ("cor", (-0.1, 0.3), [0.1, 0.1], "within noise"),
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
    found = compare_results(*folders)
    write_comparison(found, tmp_path / "out", ("first", "second"))
    assert json.loads((tmp_path / "out" / "comparison.json").read_text()) == found
    text = (tmp_path / "out" / "comparison.md").read_text()
    assert text == to_markdown(comparison_blocks(found, ("first", "second")))
    plain = text.replace("**", "")
    assert (
        re.search(r"\| Cor \| 25.0 \| 100.0 \| \+75.0 \\\[\+\d\d.\d, \+8\d.\d\\] \| &lt; 0.001 \| 40 \|", plain)
        and "| **Cor** | **25.0**" in text
    )
    assert f"| {section_label('query corpus')} |" in plain and f"| {figure('mrr').label} | 37.5 | 100.0 |" in plain
    assert "| retrievals | 1.00 | 2.00 | +1.00 \\[+1.00, +1.00\\] |" in plain  # a count, not percent
    assert "only in the second folder: c" in text
    page = (tmp_path / "out" / "comparison.html").read_text()
    assert "improvement" in page and "+133.3 %" in page


def test_the_recipe(folders, tmp_path):
    command = [sys.executable, "recipes/compare.py", *map(str, folders)]
    result = subprocess.run(
        [*command, "--output_dir", str(tmp_path / "out")], cwd=ROOT, capture_output=True, text=True, timeout=200
    )
    assert result.returncode == 0, result.stderr[-2000:]
    assert re.search(
        r"b, own retrieval\n\n  Cor +25.0 +100.0 +\+75.0 \[\+\d\d.\d, \+8\d.\d\] +p < 0.001 +n = 40 +ahead\n",
        result.stdout,
    )
    assert (
        "note: 1 tasks are only in the second folder: c" in result.stdout
        and (tmp_path / "out" / "comparison.html").exists()
    )
    result = subprocess.run([*command[:-1], str(tmp_path)], cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert (
        result.returncode == 1
        and result.stderr.strip().splitlines()[-1].startswith("error: ")
        and "no complete results folder" in result.stderr
    )
