"""
The figures of an experiment: arms x seeds x tasks, averaged and compared.

A line of a table is an arm, or, where the answers of a model were made in several modes, an arm and a mode. A question
counts once: its scores are averaged over the seeds that were asked the same one, and intervals come from resampling
questions, within each task. What seeds alone change is shown next to it, as the standard deviation over seeds.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..judging.figures import MAIN, MODES, SPLITS, Measured, cor_label, in_order
from ..judging.intervals import average, mean_and_deviation
from ..judging.results import FORMAT, read_results
from .cells import verdict
from .experiment_scores import (
    ScoresById,
    TaskScores,
    over_seeds,
    plain_mean,
    read_task_scores,
    results_folder,
    scores_of,
)

COLUMNS = (*MAIN, "query_recall@1")
ALL = "all"


@dataclass(frozen=True)
class Place:
    """Where figures are shown: one task, or a group of tasks with their average."""

    name: str
    tasks: tuple[str, ...]
    split: str | None = None  # of a task
    is_group: bool = False


class MeasuredOverSeeds(Measured):
    """A figure over one or more tasks: `value` is the mean over seeds, `interval` and `n` are of questions."""

    tasks: int  # in which it applies
    of_tasks: int
    deviation: float | None  # over seeds; None for one
    seeds: dict[int, float]


@dataclass
class _Pairs:
    """The questions of a task for which a line and the baseline have a value."""

    differences: dict[int, ScoresById] = field(default_factory=dict)  # by seed, line minus baseline
    baseline_values: list[float] = field(default_factory=list)
    left_out: int = 0


class Results:
    """
    What an experiment found.

    Args:
        experiment (`dict`): the fields of its file: `title`, `about`, `arms`, `baseline`, `seeds`, `evaluation`,
            `axis`, `corpus_sizes`, ...
        runs (`list[dict]`): of each arm and seed: `arm`, `seed`, `options`, `failure`, `trained` and `evaluated`
            (`None` until done), `evaluation` (the folder whose `results/` recipes/run_evaluation.py wrote),
            `questions` (for each task what tells its questions from others).
        meaning (`dict`): name of a task in the results -> `{"task", "setting", "size", "split"}`.
        notes (`list[str]`): what was left out.
        command (`str`): that made all this.

    Attributes:
        lines (`list[str]`): those with answers, in order.
        settings (`list[str]`): e.g. `"Top-20"`.
        names (`list[str]`): the figures that were measured, in the order of the vocabulary.
        cor (`dict[str, str]`): what Cor is, by task.

    Raises:
        `FileNotFoundError`, `ValueError`: for results that are not complete, or of another format.
    """

    def __init__(
        self,
        experiment: dict,
        runs: list[dict],
        meaning: dict[str, dict],
        notes: Sequence[str] = (),
        command: str = "",
    ):
        self.experiment = experiment
        self.runs = runs
        self.meaning = meaning
        self.notes = list(notes)
        self.command = command
        self.modes: list[str] = experiment["evaluation"]["modes"]
        self.evaluated = [run for run in runs if run["evaluated"] is not None]
        self.arm_and_mode = {self._line(arm, mode): (arm, mode) for arm in experiment["arms"] for mode in self.modes}
        # First of all, as the format is checked here.
        all_results = [read_results(results_folder(run)) for run in self.evaluated]
        self.scores = self._read_scores()
        self.lines = [line for line in self.arm_and_mode if line in self.scores]
        self.settings = list(dict.fromkeys(task["setting"] for task in meaning.values()))
        self.names = self._measured_names()
        self.cor = self._read_cor(all_results)
        self._figures: dict[tuple, MeasuredOverSeeds | None] = {}  # asked for several times
        self._comparisons: dict[tuple, dict | None] = {}

    def _line(self, arm: str, mode: str) -> str:
        """How tables name the answers of an arm in a mode: by what differs."""
        if len(self.modes) == 1:
            return arm
        if len(self.experiment["arms"]) == 1:
            return mode
        return f"{arm}, {mode}"

    def _read_scores(self) -> dict[str, dict[int, TaskScores]]:
        """Line -> seed -> task -> figure -> question -> value."""
        scores: dict[str, dict[int, TaskScores]] = {}
        for run in self.evaluated:
            for mode in self.modes:
                by_task = {task: read_task_scores(run, task, mode) for task in self.meaning}
                line = scores.setdefault(self._line(run["arm"], mode), {})
                line[run["seed"]] = {task: figures for task, figures in by_task.items() if figures}
        return scores

    def _measured_names(self) -> list[str]:
        names: set[str] = set()
        for seeds in self.scores.values():
            for tasks in seeds.values():
                for figures in tasks.values():
                    names |= figures.keys()
        return in_order(names)

    def _read_cor(self, all_results: list[dict]) -> dict[str, str]:
        labels = {}
        for results in all_results:
            tasks = results["tasks"]
            for name, about in self.meaning.items():
                if name in tasks:
                    labels[about["task"]] = ", ".join(cor_label(cor) for cor in tasks[name]["cor"])
        return labels

    # ------------------------------------------------------------------ lines and places

    @property
    def baseline(self) -> str | None:
        """The line that others are compared with, `None` where it failed."""
        wanted = self.experiment["baseline"]
        for line in self.lines:
            if wanted in (line, self.arm(line)):
                return line
        return None

    def arm(self, line: str) -> str:
        """The arm of a line."""
        return self.arm_and_mode[line][0]

    def label(self, line: str) -> str:
        """A line as readers know it: modes by what they mean."""
        return self._line(self.arm(line), self.mode_label(line))

    def mode_label(self, line: str) -> str:
        """The mode of a line, in words."""
        return MODES[self.arm_and_mode[line][1]]

    def tasks(self, setting: str, group: str = ALL) -> tuple[str, ...]:
        """Names of the tasks of a setting and a group, in order."""
        names = []
        for name, about in self.meaning.items():
            if about["setting"] == setting and group in (ALL, about["split"]):
                names.append(name)
        return tuple(names)

    def task_places(self, setting: str) -> list[Place]:
        """The tasks of a setting."""
        return [
            Place(self.meaning[name]["task"], (name,), self.meaning[name]["split"]) for name in self.tasks(setting)
        ]

    def group_places(self, setting: str) -> list[Place]:
        """The groups that say something of their own: each split where there are both, and all tasks."""
        splits = [split for split in SPLITS if self.tasks(setting, split)]
        groups = [*splits, ALL] if len(splits) == 2 else [ALL]
        return [Place(group, self.tasks(setting, group), is_group=True) for group in groups]

    # ------------------------------------------------------------------ one figure

    def figure(self, line: str, tasks: Sequence[str], name: str) -> MeasuredOverSeeds | None:
        """
        A figure of a line over one or more tasks.

        Args:
            line (`str`), name (`str`): of the figure.
            tasks (sequence of `str`): over several it is the plain mean of the tasks' means.

        Returns:
            [`MeasuredOverSeeds`], `None` where the figure does not apply.
        """
        key = (line, tuple(tasks), name)
        if key not in self._figures:
            self._figures[key] = self._figure(*key)
        return self._figures[key]

    def _figure(self, line: str, tasks: tuple[str, ...], name: str) -> MeasuredOverSeeds | None:
        by_seed = self.scores.get(line, {})
        columns = []
        for task in tasks:
            question_means = over_seeds([scores_of(by_task, task, name) for by_task in by_seed.values()])
            columns.append(list(question_means.values()))
        measured = average(columns)
        if measured is None:
            return None
        seeds = {}
        for seed, by_task in by_seed.items():
            task_means = [plain_mean(scores.values()) for task in tasks if (scores := scores_of(by_task, task, name))]
            if task_means:
                seeds[seed] = plain_mean(task_means)
        value, deviation = mean_and_deviation(list(seeds.values()))
        return {
            "value": value,
            "interval": measured["interval"],
            "n": measured["n"],
            "tasks": measured["tasks"],
            "of_tasks": len(tasks),
            "deviation": deviation if len(seeds) > 1 else None,
            "seeds": seeds,
        }

    # ------------------------------------------------------------------ one comparison

    def compare(self, line: str, tasks: Sequence[str], name: str) -> dict[str, Any] | None:
        """
        A line against the baseline, question by question, over the seeds and questions that both have.

        Returns:
            `dict`: `difference` of the means, its `interval`, `n`, `left_out` (questions for which one of them has no
            value), `tasks` in which both have one, `of_tasks` (all), `rate` (the difference in percent of the
            baseline; `None` where that is 0), `seeds` (`{seed: difference}`) and `verdict`, see
            [`~trainer.reports.cells.verdict`]. `None` where there is nothing to compare.
        """
        key = (line, tuple(tasks), name)
        if key not in self._comparisons:
            self._comparisons[key] = self._compare(*key)
        return self._comparisons[key]

    def _compare(self, line: str, tasks: tuple[str, ...], name: str) -> dict[str, Any] | None:
        all_pairs = [self._pairs(line, task, name) for task in tasks]
        pairs_by_task = [pairs for pairs in all_pairs if pairs.baseline_values]
        measured = average([list(over_seeds(pairs.differences.values()).values()) for pairs in pairs_by_task])
        if measured is None:
            return None
        difference = measured["value"]
        baseline = plain_mean(plain_mean(pairs.baseline_values) for pairs in pairs_by_task)
        seeds = {}
        for seed in self._shared_seeds(line):
            task_means = [
                plain_mean(pairs.differences[seed].values()) for pairs in pairs_by_task if pairs.differences[seed]
            ]
            if task_means:
                seeds[seed] = plain_mean(task_means)
        return {
            "difference": difference,
            "interval": measured["interval"],
            "n": measured["n"],
            "left_out": sum(pairs.left_out for pairs in all_pairs),
            "seeds": seeds,
            "tasks": measured["tasks"],
            "of_tasks": len(tasks),
            "rate": 100 * difference / baseline if baseline else None,
            "verdict": verdict(name, measured["interval"], seeds.values()),
        }

    def _pairs(self, line: str, task: str, name: str) -> _Pairs:
        pairs = _Pairs()
        for seed in self._shared_seeds(line):
            new = scores_of(self.scores[line][seed], task, name)
            old = scores_of(self.scores[self.baseline or ""][seed], task, name)
            shared = [question for question in old if question in new]
            pairs.differences[seed] = {question: new[question] - old[question] for question in shared}
            pairs.baseline_values += [old[question] for question in shared]
            pairs.left_out += len(old.keys() ^ new.keys())
        return pairs

    def _shared_seeds(self, line: str) -> list[int]:
        theirs = self.scores.get(self.baseline or "", {})
        return [seed for seed in self.scores.get(line, {}) if seed in theirs]

    # ------------------------------------------------------------------ all of them

    def to_dict(self) -> dict[str, Any]:
        """
        Everything as JSON holds it: what was run, `figures` (setting -> line -> task or group -> figure) and
        `comparisons` with the baseline.
        """
        figures: dict[str, dict] = {}
        comparisons: dict[str, dict] = {}
        for setting in self.settings:
            places = [*self.task_places(setting), *self.group_places(setting)]
            for line in self.lines:
                figures.setdefault(setting, {})[line] = self._of_places(self.figure, line, places)
                if self.baseline is not None and line != self.baseline:
                    comparisons.setdefault(setting, {})[line] = self._of_places(self.compare, line, places)
        return {
            "format": FORMAT,
            "experiment": self.experiment,
            "command": self.command,
            "runs": self.runs,
            "notes": self.notes,
            "baseline": self.baseline,
            "figures": figures,
            "comparisons": comparisons,
        }

    def _of_places(self, measure: Callable[..., Mapping | None], line: str, places: list[Place]) -> dict[str, dict]:
        by_place: dict[str, dict] = {}
        for place in places:
            measured = {name: measure(line, place.tasks, name) for name in self.names}
            by_place[place.name] = {name: figure for name, figure in measured.items() if figure is not None}
        return by_place
