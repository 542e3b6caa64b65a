"""docs/evaluation.md, docs/experiments.md and docs/results/ against the code and the files that they describe."""

import re
from dataclasses import fields

import pytest

from support.markdown_pages import ROOT, blocks_of, links_of
from trainer.judging.correctness import DATASET_METRICS, cor_metric
from trainer.judging.figures import MAIN, MODES, figure
from trainer.judging.tasks import Task

from experiments.definition import load_experiment

EVALUATION = (ROOT / "docs" / "evaluation.md").read_text(encoding="utf-8")
EXPERIMENTS = ROOT / "docs" / "experiments.md"
RESULTS = ROOT / "docs" / "results"


def section(title):
    """Return the text under a heading of docs/evaluation.md."""
    return EVALUATION.split(f"\n## {title}\n")[1].split("\n## ")[0]


def first_cells(text):
    return re.findall(r"^\| `?([^|`]+?)`? \|", text, re.MULTILINE)[1:]  # without the header


def test_the_modes_are_all_modes():
    assert set(first_cells(section("Which modes are there?"))) == set(MODES)


def test_the_main_figures_are_those_of_the_main_table():
    assert first_cells(section("What does Gr mean?")) == [figure(name).label for name in MAIN]


def test_every_field_of_a_task_is_explained():
    listed = section("Evaluate several sets with one config").split("A task has")[1]
    named = set(re.findall(r"`(\w+)`", listed))
    assert {field.name for field in fields(Task)} <= named


def test_every_metric_of_cor_is_named():
    named = set(re.findall(r"`(\w+)`", section("What counts as a right answer?")))
    metrics = {*DATASET_METRICS.values(), cor_metric("nq"), cor_metric("fever", nli=False), cor_metric("asqa")}
    assert metrics <= named


# ---------------------------------------------------------------------- experiments


def test_every_experiment_is_listed_with_its_question():
    table = EXPERIMENTS.read_text(encoding="utf-8").split("## Which experiments are there?")[1].split("\n## ")[0]
    questions = dict(re.findall(r"^\| `(\S+\.yaml)` \| (.+?) \|$", table, re.MULTILINE))
    assert set(questions) == {path.name for path in (ROOT / "recipes" / "experiments").glob("*.yaml")}
    assert all("?" in question or "The same" in question for question in questions.values())


def test_the_experiment_to_write_oneself_is_complete(tmp_path):
    (block,) = [block for block in blocks_of(EXPERIMENTS) if block.code.startswith("# my_experiment.yaml")]
    path = tmp_path / "my_experiment.yaml"
    path.write_text(block.code)
    experiment = load_experiment(path)  # checks every field and option
    assert list(experiment.arms) == ["default", "higher"] and len(experiment.seeds) == 3
    assert experiment.options("higher")["control_token_lr"] == 5e-3
    path.write_text(block.code.replace("max_steps", "max_step"))
    with pytest.raises(ValueError, match="train.py has no option 'max_step'"):
        load_experiment(path)


# ---------------------------------------------------------------------- results


def test_every_folder_of_results_is_reachable():
    """The list of docs/results/ names every folder; a folder has a page, or its report is explained in another one."""
    page = RESULTS / "README.md"
    targets = {(RESULTS / link.target).resolve() for link in links_of(page.read_text(encoding="utf-8"))}
    for folder in RESULTS.iterdir():
        if folder.is_dir():
            assert targets & {folder / "README.md", folder / "report.md"}, folder.name
    assert len(page.read_text(encoding="utf-8").splitlines()) <= 40
    assert {folder for folder in RESULTS.iterdir() if (folder / "README.md").exists()} <= {
        target.parent for target in targets
    }
