"""The report: what it shows, that untrusted text stays text, and how it looks without plots and in a real browser."""

import json
import re
import shutil
from pathlib import Path

import pytest

from support.evaluation_world import EVIL, MARKUP, QUESTIONS, write_world
from support.models import make_model
from trainer.judging.judge import evaluate_tasks
from trainer.judging.tasks import Task
from trainer.reports import document, plots
from trainer.reports.cells import average_cell, figure_cell, seeds_cell, seeds_difference_cell
from trainer.reports.document import (
    Bullets,
    Code,
    Example,
    Heading,
    Table,
    Text,
    escape_markdown,
    to_html,
    to_markdown,
)
from trainer.reports.evaluation import write_report

PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture(scope="module")
def judged(tmp_path_factory):
    """A results folder whose questions, answers and passages hold markup."""
    folder = tmp_path_factory.mktemp("world")
    questions = [{**x, "input": f"{MARKUP} {x['id']}", "answers": [MARKUP], "candidates": ["evil"]} for x in QUESTIONS]
    paths = write_world(folder, questions)
    common = {**paths, "max_new_tokens": 9, "max_retrievals": 2}
    tasks = [Task("a$b_c", **common, split="in-domain"), Task("d", **common, pool=1, gold_in_pool=False)]
    model = make_model()
    model.generation_config.sequence_bias = [[[model.config.nsp_token_id], 1000.0]]  # it retrieves as often as it may
    facts = {"command": f"run_evaluation.py {MARKUP}", "nli_model": None}
    evaluate_tasks(model, tasks, folder / "out", ["forced", "off", "retrieval", "gold"], facts=facts)
    return folder / "out"


@pytest.fixture
def output(judged, tmp_path):
    shutil.copytree(judged, tmp_path / "out")
    return tmp_path / "out"


def test_report_holds_tables_examples_and_what_was_left_out(output):
    pytest.importorskip("matplotlib", reason="the report has plots where it is installed")
    write_report(output, num_examples=2)
    page, text = (output / "report.html").read_text(), (output / "report.md").read_text()
    figures = json.loads((output / "metrics.json").read_text())["tasks"]["d"]["modes"]["retrieval"]["metrics"]
    for heading in (
        "Results",
        "What retrieval is worth",
        "Query embedding",
        "Plots",
        "Examples",
        "All figures",
        "What is left out",
        "How this was made",
    ):
        assert f"<h2>{heading}</h2>" in page and f"\n## {heading}\n" in text
    value, interval = figure_cell(figures["cor"], "cor")
    row = next(line for line in text.splitlines() if line.startswith("| d | 1 | 7 | short answer | "))
    assert f"{value} \\{interval[:-1]}\\]" in row and "| — |" in row  # Gr without an NLI model
    emission = next(line for line in text.partition("## When ")[2].splitlines() if line.startswith("|"))
    assert emission.count(", not needed") == 3 and "| EM, not needed |" in emission
    assert "In-domain" in text and "Other tasks" in text and "average of all 2" in text
    assert "no NLI model was given" in text and page.count('class="example"') == 4
    assert re.search(r"Ret (100|0)\.0 %", page)  # the marks of an example are in percent, as everything
    names = {path.name for path in (output / "plots").iterdir()}
    assert names == {"main.png", "modes.png", "recall.png", "emission.png", "scores.png"}
    assert all((output / "plots" / name).read_bytes().startswith(PNG) for name in names)
    assert page.count("data:image/png;base64,") == len(names) == text.count("](plots/")
    assert not list(output.glob(".report*"))


def test_untrusted_text_stays_text(output):
    write_report(output, num_examples=7)
    page, text = (output / "report.html").read_text(), (output / "report.md").read_text()
    assert "<script" not in page and "&lt;script&gt;" in page
    assert set(re.findall(r"<(\w+)", page)) <= set(
        "html head meta title style body h1 h2 h3 p div table thead tbody tr th td small figure img figcaption details summary pre ul li span b i".split()
    )
    assert not re.search(r"\b(src|href|srcset|action)=\"(?!data:image/png;base64,)", page) and not re.search(
        r"\son\w+=", re.sub("&lt;.*?&gt;", "", page)
    )
    body = re.sub(r"(?s)```.*?```", "", text)
    assert "<script" not in body and not re.search(r"(?<!\\)!\[(?!.*\]\(plots/)|(?<!\\)\]\((?!plots/)", body)
    rows = [line for line in body.splitlines() if line.startswith("|")]
    assert all(len(re.findall(r"(?<!\\)\|", line)) >= 3 for line in rows)


def test_without_matplotlib_the_tables_are_all(output, monkeypatch):
    monkeypatch.setattr(plots, "Figure", None)
    write_report(output)
    page = (output / "report.html").read_text()
    assert "pip install matplotlib" in page and "<img" not in page and "<h2>Query embedding</h2>" in page


def test_an_incomplete_folder_has_no_report(output):
    (output / "metrics.json").unlink()
    with pytest.raises(FileNotFoundError, match="is no complete results folder"):
        write_report(output)
    assert not (output / "report.html").exists()


def test_the_page_in_a_browser(output):
    """Nothing is requested but the page itself, no script runs, every picture shows, and the page is not wider than its window."""
    playwright = pytest.importorskip("playwright.sync_api", reason="a real browser is driven by playwright")
    chromium = next(
        (path for path in map(shutil.which, ("chromium", "chromium-browser", "google-chrome")) if path), None
    )
    if chromium is None:
        pytest.skip("no Chromium is installed")
    pytest.importorskip("matplotlib", reason="for pictures")
    write_report(output, num_examples=7)
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page, requested = browser.new_page(viewport={"width": 700, "height": 900}), []
        page.on("request", lambda request: requested.append(request.url))
        page.goto((output / "report.html").as_uri())
        assert page.title().startswith("Evaluation of")
        assert [url for url in requested if not url.startswith("data:image/png")] == [
            (output / "report.html").as_uri()
        ]
        assert (
            page.evaluate("[...document.images].every(image => image.naturalWidth > 300) && document.images.length")
            >= 4
        )
        assert page.evaluate("document.documentElement.scrollWidth") <= 700
        assert MARKUP in page.inner_text("body")
        assert EVIL["title"] in page.inner_text("body")
        browser.close()


def test_cells_of_figures():
    figure = {"value": 0.256, "interval": [0.1, 0.4], "n": 4}
    assert figure_cell(figure, "cor") == ("25.6", "[10.0, 40.0]")
    assert figure_cell(figure, "cor", with_n=True) == ("25.6", "[10.0, 40.0] n = 4")
    assert figure_cell({**figure, "value": 1.5}, "num_retrievals") == ("1.50", "[0.10, 0.40]")
    average = {**figure, "tasks": 2, "of_tasks": 3, "deviation": None, "seeds": {0: 0.256}}
    assert average_cell(average, "cor", 2) == ("25.6", "[10.0, 40.0]")
    assert average_cell(average, "cor", 3) == ("25.6", "[10.0, 40.0], 2 of 3 tasks")
    assert seeds_cell(average, "cor") == ("25.6", "[10.0, 40.0] n = 4, 2 of 3 tasks")
    assert seeds_cell({**average, "tasks": 3, "deviation": 0.02}, "cor") == ("25.6 ± 2.0", "[10.0, 40.0] n = 4")
    difference = {
        **average,
        "tasks": 3,
        "difference": 0.2,
        "rate": 25.0,
        "seeds": {0: 0.3, 1: 0.1, 2: 0.0},
        "verdict": "ahead",
    }
    assert seeds_difference_cell(difference, "cor") == ("+20.0 (+25.0 %)", "[+10.0, +40.0] n = 4, 2 / 1 / 0, ahead")
    assert seeds_difference_cell({**difference, "rate": None}, "num_retrievals")[0] == "+0.20"
    assert (
        figure_cell(None, "gr")
        == average_cell(None, "gr", 2)
        == seeds_cell(None, "gr")
        == seeds_difference_cell(None, "gr")
        == "—"
    )


def test_blocks_in_markdown():
    table = Table(["", "n"], [["group"], ["a|b", ("1.0", "[0, 2]")]], strong={1})
    blocks = [Heading("a*b", 3), Text("- 1\n# 2"), Bullets(["x|y", "1. z"]), Code("``` <b>"), table]
    blocks += [
        Table(["a_b"], [["c"], ["d"]], folded="more"),
        Example("q?", "", "y", [(1, "", "t"), (2, "T", "u")], ["Ret 0", "Gr 1"]),
    ]
    assert to_markdown(blocks).split("\n\n") == [
        "### a\\*b",
        "\\- 1 \\# 2",
        "- x\\|y\n- 1\\. z",
        "````\n``` <b>\n````",
        "|  | n |\n|---|---|\n| **group** |  |\n| **a\\|b** | **1.0 \\[0, 2\\]** |",
        "### more",
        "| a\\_b |\n|---|\n| **c** |\n| **d** |",
        "> **Q** q?\\\n> **A** \\\n> *Ret 0, Gr 1; expected: y*\\\n> \\[1\\] t\\\n> \\[2\\] T: u\n",
    ]
    assert (
        escape_markdown("1. [a](b) <i>&amp; `c` ~d~ http://e")
        == "1. \\[a\\](b) &lt;i\\>&amp;amp; \\`c\\` \\~d\\~ http\\://e"
    )
    page = to_html(blocks, Path("."), "<t>")
    assert (
        "<title>&lt;t&gt;</title>" in page
        and '<tr class="strong"><td>a|b</td><td>1.0<small>[0, 2]</small></td></tr>' in page
    )
    assert '<td colspan="2">group</td>' in page and "<i>(empty)</i>" in page
    assert (document.TEMPLATES / "report.css").read_text() in page and "<details><summary>more</summary>" in page
