"""The scores of an experiment's questions, read from the results folders of its runs."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TypeAlias

import numpy as np

from modeling_cosup.lines_cosup import read_lines

from ..judging.figures import QUERY

ScoresById: TypeAlias = dict[str, float]  # question -> value
TaskScores: TypeAlias = dict[str, dict[str, ScoresById]]  # task -> figure -> scores


def results_folder(run: dict) -> Path:
    """Return the results folder that recipes/run_evaluation.py wrote for a run."""
    return Path(run["evaluation"], "results")


def read_task_scores(run: dict, task: str, mode: str) -> dict[str, ScoresById]:
    """
    Return the scores of a task in a mode.

    In mode `"retrieval"`, these include the scores of the query embedding. Its ranking is over the pool if there is
    one and otherwise over the corpus, because that is what the model searches.

    Args:
        run (`dict`): holds `evaluation` and `questions`, see [`~trainer.reports.experiment_figures.Results`].
        task (`str`): name of the task in the results.
        mode (`str`): see `trainer.judging.figures.MODES`.

    Returns:
        `dict[str, dict[str, float]]`: figure -> question -> value. A question is identified by its set and its id, so
        seeds that ask the same questions share them.
    """
    if task not in run["questions"]:  # left out for this seed: its corpus is too small
        return {}
    folder = results_folder(run) / task
    rows = []
    if mode != QUERY:
        rows += _read_rows(folder / mode / "scores.jsonl")
    if mode in ("retrieval", QUERY):
        rankings = _read_rows(folder / QUERY / "scores.jsonl")
        scope = "pool" if any(row["scope"] == "pool" for row in rankings) else "corpus"
        rows += [row for row in rankings if row["scope"] == scope]
    question_set = run["questions"][task][:16]
    scores: dict[str, ScoresById] = {}
    for row in rows:
        question = f"{question_set} {row.pop('id')}"
        row.pop("scope", None)
        for name, value in row.items():
            if value is not None:
                scores.setdefault(name, {})[question] = float(value)
    return scores


def scores_of(by_task: TaskScores, task: str, name: str) -> ScoresById:
    """Return the scores of one figure in one task, or an empty dictionary."""
    return by_task.get(task, {}).get(name, {})


def seeds_with_all_tasks(by_seed: Mapping[int, list[ScoresById]]) -> dict[int, list[ScoresById]]:
    """
    Leave out the seeds that have no scores in a task in which another seed has some.

    Args:
        by_seed (`dict[int, list[dict]]`): seed -> the scores of each task, in the same order for each seed.
    """
    measured = [any(scores_of_seeds) for scores_of_seeds in zip(*by_seed.values(), strict=True)]
    complete = {}
    for seed, scores_of_tasks in by_seed.items():
        if [bool(scores) for scores in scores_of_tasks] == measured:
            complete[seed] = scores_of_tasks
    return complete


def question_means(by_seed: Mapping[int, list[ScoresById]]) -> list[list[float]]:
    """Return, for each task, the mean score of each question over the seeds that have one."""
    means = []
    for scores_of_seeds in zip(*by_seed.values(), strict=True):
        values_by_question: dict[str, list[float]] = {}
        for scores in scores_of_seeds:
            for question, value in scores.items():
                values_by_question.setdefault(question, []).append(value)
        means.append([sum(values) / len(values) for values in values_by_question.values()])
    return means


def plain_mean(values: Iterable[float]) -> float:
    """Return the mean of one or more values."""
    return float(np.mean(list(values)))


def mean_over_tasks(scores_of_tasks: Iterable[ScoresById]) -> float:
    """Return the plain mean of the means of the tasks with scores, of which there is at least one."""
    return plain_mean(plain_mean(scores.values()) for scores in scores_of_tasks if scores)


def _read_rows(path: Path) -> list[dict]:
    return read_lines(path) if path.exists() else []
