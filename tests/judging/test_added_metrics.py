"""Metrics and figures that a program adds to the vocabulary, and results files that another program reads."""

import json

import pytest

from trainer.judging.correctness import ANSWER_METRICS, TEXT_METRICS, add_metric
from trainer.judging.figures import FIGURES, Figure, add_figure, added_figures, figure, in_order
from trainer.judging.results import FORMAT, read_results
from trainer.judging.scoring import score
from trainer.judging.tasks import Task

BREVITY = Figure("brevity", "brevity", "1 / length of the output", needs=("gold",))
QUESTION = {"id": "1", "dataset": "nq", "input": "?", "answers": ["ab"], "provenance": [["p"]], "meta": {}}
PREDICTION = {"id": "1", "output": "abcd", "output_with_citations": "abcd", "retrievals": []}


@pytest.fixture(autouse=True)
def unchanged():
    """Undo what a test adds to the tables of this process."""
    tables = [(table, dict(table)) for table in (FIGURES, ANSWER_METRICS, TEXT_METRICS)]
    yield
    for table, before in tables:
        table.clear()
        table.update(before)


def brevity(prediction, answers):
    return 1 / len(prediction)


def test_an_added_metric_is_scored_like_any_other():
    add_metric(BREVITY, brevity)
    scores = score([PREDICTION], [QUESTION], mode="off")
    assert scores["brevity"] == [0.25]
    assert figure("brevity").label == "brevity"
    assert in_order(["brevity", "em"]) == ["em", "brevity"]
    assert score([PREDICTION], [QUESTION], mode="off", metric="brevity")["cor"] == [0.25]
    assert Task("mine", "questions.jsonl", metric="brevity").metric == "brevity"


def test_a_metric_that_was_not_added_is_no_metric_of_a_task():
    with pytest.raises(ValueError, match="metric is 'brevity', expected one of accuracy, "):
        Task("mine", "questions.jsonl", metric="brevity")


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (Figure("em", "EM", "mine"), "'em' is already the name of a figure: exact match"),
        (Figure("x@k", "x", "x"), "@"),
    ],
)
def test_names_that_cannot_be_added(entry, message):
    before = dict(FIGURES)
    with pytest.raises(ValueError, match=message):
        add_metric(entry, brevity)
    assert FIGURES == before
    assert ANSWER_METRICS["em"] is not brevity and "x@k" not in TEXT_METRICS


def test_results_say_what_an_added_figure_means(tmp_path):
    assert added_figures() == []
    add_figure(BREVITY)
    add_figure(BREVITY)  # the same again is no error: a notebook runs a cell twice
    path = tmp_path / "metrics.json"
    path.write_text(json.dumps({"format": FORMAT, "figures": added_figures()}))
    del FIGURES["brevity"]  # another process
    read_results(path)
    assert FIGURES["brevity"] == BREVITY
    FIGURES["brevity"] = Figure("brevity", "brevity", "something else")
    with pytest.raises(ValueError, match="'brevity' is already the name of a figure: something else"):
        read_results(path)
