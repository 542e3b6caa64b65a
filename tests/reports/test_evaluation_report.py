"""The report of an evaluation: its contents, untrusted text, a report without plots, and the page in a browser."""

import json
import re
import shutil
from pathlib import Path

import pytest

from support.evaluation_world import EVIL, MARKUP, QUESTIONS, write_world
from support.models import make_model
from trainer.judging.figures import figure_line
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
TAGS = set(  # of the template
    "html head meta title style body h1 h2 h3 p div table thead tbody tr th td small figure img figcaption details "
    "summary pre ul li span b i".split()
)
BROWSERS = ("chromium", "chromium-browser", "google-chrome")


@pytest.fixture(scope="module")
def judged(tmp_path_factory):
    """A results folder with markup in questions, answers and passages."""
    folder = tmp_path_factory.mktemp("world")
    questions = []
    for question in QUESTIONS:
        untrusted = {"input": f"{MARKUP} {question['id']}", "answers": [MARKUP], "candidates": ["evil"]}
        questions.append({**question, **untrusted})
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
    pytest.importorskip("matplotlib", reason="draws plots")
    write_report(output, num_examples=2)
    page = (output / "report.html").read_text()
    text = (output / "report.md").read_text()
    headings = [
        "Results",
        "What retrieval is worth",
        "Query embedding",
        "Plots",
        "Examples",
        "All figures",
        "What is left out",
        "How this was made",
    ]
    for heading in headings:
        assert f"<h2>{heading}</h2>" in page
        assert f"\n## {heading}\n" in text

    task = json.loads((output / "metrics.json").read_text())["tasks"]["d"]
    value, interval = figure_cell(task["modes"]["retrieval"]["metrics"]["cor"], "cor")
    row = next(line for line in text.splitlines() if line.startswith("| d | 1 | 7 | short answer | "))
    assert f"{value} \\{interval[:-1]}\\]" in row
    assert "| — |" in row  # Gr without an NLI model
    emission = text.partition("## When ")[2].splitlines()
    header = next(line for line in emission if line.startswith("|"))
    assert header.count(", not needed") == 3
    assert "| EM, not needed |" in header
    for words in ("In-domain", "Other tasks", "average of all 2", "no NLI model was given"):
        assert words in text

    assert "| figure | what it is | — if |" in text
    assert re.search(r"\| Cor⁻ \| [^|]+ counts as wrong \| no question has gold passages; the model ", text)

    assert page.count('class="example"') == 4
    assert re.search(r"Ret (100|0)\.0 %", page)  # an example shows percent too
    names = {path.name for path in (output / "plots").iterdir()}
    assert names == {"main.png", "modes.png", "recall.png", "emission.png", "scores.png"}
    assert all((output / "plots" / name).read_bytes().startswith(PNG) for name in names)
    assert page.count("data:image/png;base64,") == len(names)
    assert text.count("](plots/") == len(names)
    assert not list(output.glob(".report*"))


def test_untrusted_text_stays_text_in_the_page(output):
    write_report(output, num_examples=7)
    page = (output / "report.html").read_text()
    assert "<script" not in page
    assert "&lt;script&gt;" in page
    assert set(re.findall(r"<(\w+)", page)) <= TAGS
    assert not re.search(r"\b(src|href|srcset|action)=\"(?!data:image/png;base64,)", page)
    assert not re.search(r"\son\w+=", re.sub("&lt;.*?&gt;", "", page))


def test_untrusted_text_stays_text_in_markdown(output):
    write_report(output, num_examples=7)
    text = (output / "report.md").read_text()
    body = re.sub(r"(?s)```.*?```", "", text)
    assert "<script" not in body
    assert not re.search(r"(?<!\\)!\[(?!.*\]\(plots/)|(?<!\\)\]\((?!plots/)", body)  # links and pictures
    rows = [line for line in body.splitlines() if line.startswith("|")]
    assert all(len(re.findall(r"(?<!\\)\|", line)) >= 3 for line in rows)


def test_a_report_without_matplotlib_has_all_tables(output, monkeypatch):
    monkeypatch.setattr(plots, "Figure", None)
    write_report(output)
    page = (output / "report.html").read_text()
    assert "pip install matplotlib" in page
    assert "<img" not in page
    assert "<h2>Query embedding</h2>" in page


def test_an_incomplete_folder_has_no_report(output):
    (output / "metrics.json").unlink()
    with pytest.raises(FileNotFoundError, match="is no complete results folder"):
        write_report(output)
    assert not (output / "report.html").exists()


def test_the_page_in_a_browser(output):
    """The browser requests only the page and runs no script. All plots show, and the page fits its window."""
    playwright = pytest.importorskip("playwright.sync_api", reason="drives a real browser")
    installed = [path for path in map(shutil.which, BROWSERS) if path]
    if not installed:
        pytest.skip("no Chromium is installed")
    pytest.importorskip("matplotlib", reason="draws plots")
    write_report(output, num_examples=7)
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=installed[0], args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 700, "height": 900})
        requests = []
        page.on("request", lambda request: requests.append(request.url))
        url = (output / "report.html").as_uri()
        page.goto(url)
        assert page.title().startswith("Evaluation of")
        assert [request for request in requests if not request.startswith("data:image/png")] == [url]
        assert page.evaluate("[...document.images].every(image => image.naturalWidth > 300)")
        assert page.evaluate("document.images.length") >= 4
        assert page.evaluate("document.documentElement.scrollWidth") <= 700
        assert MARKUP in page.inner_text("body")
        assert EVIL["title"] in page.inner_text("body")
        browser.close()


def test_cells_of_figures():
    figure = {"value": 0.256, "interval": [0.1, 0.4], "n": 4}
    assert figure_cell(figure, "cor") == ("25.6", "[10.0, 40.0]")
    assert figure_cell(figure, "cor", with_n=True) == ("25.6", "[10.0, 40.0] n = 4")
    assert figure_cell({**figure, "value": 1.5}, "num_retrievals") == ("1.50", "[0.10, 0.40]")
    average = {**figure, "tasks": 2, "of_tasks": 3, "deviation": None, "seeds": {0: 0.256}, "of_seeds": 1}
    assert average_cell(average, "cor", 2) == ("25.6", "[10.0, 40.0]")
    assert average_cell(average, "cor", 3) == ("25.6", "[10.0, 40.0], 2 of 3 tasks")
    assert seeds_cell(average, "cor") == ("25.6", "[10.0, 40.0] n = 4, 2 of 3 tasks")
    assert seeds_cell({**average, "tasks": 3, "deviation": 0.02}, "cor") == ("25.6 ± 2.0", "[10.0, 40.0] n = 4")
    assert seeds_cell({**average, "tasks": 3, "of_seeds": 2}, "cor")[1] == "[10.0, 40.0] n = 4, 1 of 2 seeds"
    seeds = {0: 0.3, 1: 0.1, 2: 0.0}
    difference = {
        **average,
        "tasks": 3,
        "left_out": 0,
        "difference": 0.2,
        "rate": 25.0,
        "seeds": seeds,
        "of_seeds": 3,
        "verdict": "ahead",
    }
    assert seeds_difference_cell(difference, "cor") == ("+20.0 (+25.0 %)", "[+10.0, +40.0] n = 4, 2 / 1 / 0, ahead")
    assert seeds_difference_cell({**difference, "rate": None}, "num_retrievals")[0] == "+0.20"
    assert seeds_difference_cell({**difference, "of_seeds": 4}, "cor")[1].endswith(
        "n = 4, 3 of 4 seeds, 2 / 1 / 0, ahead"
    )
    assert "n = 4 (96 left out)," in seeds_difference_cell({**difference, "left_out": 96}, "cor")[1]
    assert figure_cell({**figure, "interval": None, "n": 1}, "gr", with_n=True) == ("25.6", "— n = 1")
    assert figure_line({**figure, "interval": None, "n": 1}, "gr") == "  25.6 %  —  n = 1"


def test_a_missing_figure_is_a_dash():
    assert figure_cell(None, "gr") == "—"
    assert average_cell(None, "gr", 2) == "—"
    assert seeds_cell(None, "gr") == "—"
    assert seeds_difference_cell(None, "gr") == "—"


BLOCKS = [
    Heading("a*b", 3),
    Text("- 1\n# 2"),
    Bullets(["x|y", "1. z"]),
    Code("``` <b>"),
    Table(["", "n"], [["group"], ["a|b", ("1.0", "[0, 2]")]], strong={1}),
    Table(["a_b"], [["c"], ["d"]], folded="more"),
    Example("q?", "", "y", [(1, "", "t"), (2, "T", "u")], ["Ret 0", "Gr 1"]),
]


def test_blocks_in_markdown():
    assert to_markdown(BLOCKS).split("\n\n") == [
        "### a\\*b",
        "\\- 1 \\# 2",
        "- x\\|y\n- 1\\. z",
        "````\n``` <b>\n````",
        "|  | n |\n|---|---|\n| **group** |  |\n| **a\\|b** | **1.0 \\[0, 2\\]** |",
        "### more",
        "| a\\_b |\n|---|\n| **c** |\n| **d** |",
        "> **Q** q?\\\n> **A** \\\n> *Ret 0, Gr 1; expected: y*\\\n> \\[1\\] t\\\n> \\[2\\] T: u\n",
    ]


def test_markdown_is_escaped():
    escaped = escape_markdown("1. [a](b) <i>&amp; `c` ~d~ http://e")
    assert escaped == "1. \\[a\\](b) &lt;i\\>&amp;amp; \\`c\\` \\~d\\~ http\\://e"


def test_blocks_in_html():
    page = to_html(BLOCKS, Path("."), "<t>")
    assert "<title>&lt;t&gt;</title>" in page
    assert '<tr class="strong"><td>a|b</td><td>1.0<small>[0, 2]</small></td></tr>' in page
    assert '<td colspan="2">group</td>' in page
    assert "<i>(empty)</i>" in page
    assert "<details><summary>more</summary>" in page
    assert (document.TEMPLATES / "report.css").read_text() in page
