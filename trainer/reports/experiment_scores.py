"""The scores of an experiment, question by question, as the results folders of its runs hold them."""

from collections.abc import Iterable
from pathlib import Path
from typing import TypeAlias

import numpy as np

from modeling_cosup.lines_cosup import read_lines

from ..judging.figures import QUERY

ScoresById: TypeAlias = dict[str, float]  # question -> value
TaskScores: TypeAlias = dict[str, dict[str, ScoresById]]  # task -> figure -> scores


def results_folder(run: dict) -> Path:
    """What recipes/run_evaluation.py wrote for an arm and seed."""
    return Path(run["evaluation"], "results")


def read_task_scores(run: dict, task: str, mode: str) -> dict[str, ScoresById]:
    """
    The scores of a task in a mode; where the model searches by its own decision, with the ranking by the query
    embedding over what is searched.

    Args:
        run (`dict`): `evaluation` and `questions`, see [`~trainer.reports.experiment_figures.Results`].

    Returns:
        `{figure: {question: value}}`: a question is known by its set and id, so seeds that were asked the same one
        share it.
    """
    folder = results_folder(run) / task
    rows = []
    if mode != QUERY:
        rows += _rows(folder / mode / "scores.jsonl")
    if mode in ("retrieval", QUERY):
        ranked = _rows(folder / QUERY / "scores.jsonl")
        searched = "pool" if any(row["scope"] == "pool" for row in ranked) else "corpus"
        rows += [row for row in ranked if row["scope"] == searched]
    question_set = run["questions"][task][:16]
    scores: dict[str, ScoresById] = {}
    for row in rows:
        question = f"{question_set} {row['id']}"
        for name, value in row.items():
            if name not in ("id", "scope") and value is not None:
                scores.setdefault(name, {})[question] = float(value)
    return scores


def scores_of(by_task: TaskScores, task: str, name: str) -> ScoresById:
    """The scores of one figure, empty where there are none."""
    return by_task.get(task, {}).get(name, {})


def over_seeds(scores_of_seeds: Iterable[ScoresById]) -> ScoresById:
    """The mean of each question over the seeds that asked it."""
    gathered: dict[str, list[float]] = {}
    for scores in scores_of_seeds:
        for question, value in scores.items():
            gathered.setdefault(question, []).append(value)
    return {question: sum(values) / len(values) for question, values in gathered.items()}


def plain_mean(values: Iterable[float]) -> float:
    """The mean of at least one value."""
    return float(np.mean(list(values)))


def _rows(path: Path) -> list[dict]:
    return read_lines(path) if path.exists() else []
