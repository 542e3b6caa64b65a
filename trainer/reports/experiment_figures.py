"""
The figures of an experiment: its arms on each task and seed, averaged and compared with the baseline.

A line is what a table shows in one row: an arm or, if the experiment has several modes, an arm in a mode. A question
counts once: its scores are averaged over the seeds that asked it. An average over tasks uses only seeds with a value
in every task in which any seed has one. Intervals come from resampling the questions within each task. They do not
cover the variation over seeds, so the standard deviation over seeds is shown next to them.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypedDict

from ..judging.figures import MAIN, MODES, SPLITS, Measured, cor_label, in_order
from ..judging.intervals import average, mean_and_deviation
from ..judging.results import FORMAT, read_results
from .cells import Verdict, verdict
from .experiment_scores import (
    ScoresById,
    TaskScores,
    mean_over_tasks,
    plain_mean,
    question_means,
    read_task_scores,
    results_folder,
    scores_of,
    seeds_with_all_tasks,
)

COLUMNS = (*MAIN, "query_recall@1", "hit_rate@5")
ALL = "all"
GROUP_TITLES = {
    "in-domain": "in-domain average",
    "out-of-domain": "out-of-domain average",
    ALL: "average of all tasks",
}


@dataclass(frozen=True)
class Place:
    """The tasks that a figure is measured on: a single task, or a group that is averaged."""

    name: str
    tasks: tuple[str, ...]
    split: str | None = None  # the split of a single task
    is_group: bool = False


class MeasuredOverSeeds(Measured):
    """A figure over one or more tasks: `value` is the mean over seeds, `interval` and `n` are over questions."""

    tasks: int  # number of tasks to which the figure applies
    of_tasks: int  # number of all tasks
    deviation: float | None  # over seeds; None for a single seed
    seeds: dict[int, float]  # seeds that lack a task are left out
    of_seeds: int  # number of seeds of the experiment


class DifferenceOverSeeds(TypedDict):
    """A line minus the baseline: the mean over seeds, with `interval` and `n` over questions."""

    difference: float
    interval: list[float] | None  # None if a task has a single question
    n: int
    left_out: int  # number of questions for which only one of the two has a value, with these seeds
    seeds: dict[int, float]  # seeds that lack a task are left out
    of_seeds: int  # number of seeds of the experiment
    tasks: int  # number of tasks in which both have a value
    of_tasks: int  # number of all tasks
    rate: float | None  # the difference in percent of the baseline; None if the baseline is 0
    verdict: Verdict


@dataclass
class _PairedScores:
    """The scores of a line and of the baseline with one seed, on the questions for which both have a value."""

    differences: list[ScoresById] = field(default_factory=list)  # line minus baseline, of each task
    baseline_values: list[list[float]] = field(default_factory=list)  # of each task
    left_out: int = 0


class Results:
    """
    The results of an experiment.

    Args:
        experiment (`dict`): the fields of its file: `title`, `about`, `arms`, `baseline`, `seeds`, `evaluation`,
            `axis`, `corpus_sizes`, ...; and `planned_seeds`, those of the file, if `seeds` may be others.
        runs (`list[dict]`): one per arm and seed: `arm`, `seed`, `options`, `failure`, `trained` and `evaluated`
            (`None` until done), `evaluation` (the folder in which recipes/run_evaluation.py wrote `results/`), and
            `questions` (task -> a string that identifies its set of questions).
        meaning (`dict`): name of a task in the results -> `{"task", "setting", "size", "split"}`.
        notes (`list[str]`): notes on what was left out.
        command (`str`): the command that ran the experiment.

    Attributes:
        lines (`list[str]`): the lines that were evaluated, in order.
        settings (`list[str]`): what the tasks search, e.g. `"Top-20"`.
        names (`list[str]`): names of the figures that were measured, in the order of the vocabulary.
        cor (`dict[str, str]`): task -> labels of the metrics by which Cor is measured.

    Raises:
        `FileNotFoundError`: if a results folder is not complete.
        `ValueError`: if results have another format.
    """

    def __init__(
        self,
        experiment: dict,
        runs: list[dict],
        meaning: dict[str, dict],
        notes: Sequence[str] = (),
        command: str = "",
    ) -> None:
        self.experiment = experiment
        self.runs = runs
        self.meaning = meaning
        self.notes = list(notes)
        self.command = command
        self.modes: list[str] = experiment["evaluation"]["modes"]
        self.evaluated = [run for run in runs if run["evaluated"] is not None]
        self.arm_and_mode = {self.line(arm, mode): (arm, mode) for arm in experiment["arms"] for mode in self.modes}
        # This checks the format, so it comes before anything else is read.
        all_results = [read_results(results_folder(run)) for run in self.evaluated]
        self.scores = self._read_scores()
        self.lines = [line for line in self.arm_and_mode if line in self.scores]
        self.settings = list(dict.fromkeys(task["setting"] for task in meaning.values()))
        self.names = self._measured_names()
        self.cor = self._read_cor(all_results)
        # Cached, because tables, plots and JSON need the same figures.
        self._figures: dict[tuple, MeasuredOverSeeds | None] = {}
        self._comparisons: dict[tuple, DifferenceOverSeeds | None] = {}

    def line(self, arm: str, mode: str) -> str:
        """Return the name of a line: its arm, its mode or both, whichever tells the lines of this experiment apart."""
        if len(self.modes) == 1:
            return arm
        if len(self.experiment["arms"]) == 1:
            return mode
        return f"{arm}, {mode}"

    def _read_scores(self) -> dict[str, dict[int, TaskScores]]:
        """Return line -> seed -> task -> figure -> question -> value."""
        scores: dict[str, dict[int, TaskScores]] = {}
        for run in self.evaluated:
            for mode in self.modes:
                by_task = {task: read_task_scores(run, task, mode) for task in self.meaning}
                by_seed = scores.setdefault(self.line(run["arm"], mode), {})
                by_seed[run["seed"]] = {task: figures for task, figures in by_task.items() if figures}
        return scores

    def _measured_names(self) -> list[str]:
        names: set[str] = set()
        for by_seed in self.scores.values():
            for by_task in by_seed.values():
                for figures in by_task.values():
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
        """The line with which the others are compared, or `None` if it was not evaluated."""
        name = self.experiment["baseline"]
        for line in self.lines:
            if name in (line, self.arm(line)):
                return line
        return None

    def baseline_of(self, line: str) -> str | None:
        """
        Return the line that a line is compared with: of several arms, that of the baseline arm in the same mode;
        `None` for that line itself, and if it was not evaluated.
        """
        baseline = self.baseline
        if baseline is not None and len(self.experiment["arms"]) > 1:
            baseline = self.line(self.arm(baseline), self.arm_and_mode[line][1])
        return baseline if baseline in self.lines and baseline != line else None

    @property
    def compared_lines(self) -> list[str]:
        """The lines that have another line to be compared with, in order."""
        return [line for line in self.lines if self.baseline_of(line) is not None]

    def arm(self, line: str) -> str:
        """Return the arm of a line."""
        return self.arm_and_mode[line][0]

    def label(self, line: str) -> str:
        """Return the name of a line for readers, with its mode in words."""
        return self.line(self.arm(line), self.mode_label(line))

    def mode_label(self, line: str) -> str:
        """Return the mode of a line, in words."""
        return MODES[self.arm_and_mode[line][1]]

    def tasks(self, setting: str, group: str = ALL) -> tuple[str, ...]:
        """Return the names of the tasks of a group in a setting, in order."""
        names = []
        for name, about in self.meaning.items():
            if about["setting"] == setting and group in (ALL, about["split"]):
                names.append(name)
        return tuple(names)

    def task_places(self, setting: str) -> list[Place]:
        """Return the tasks of a setting."""
        places = []
        for name in self.tasks(setting):
            about = self.meaning[name]
            places.append(Place(about["task"], (name,), about["split"]))
        return places

    def group_places(self, setting: str) -> list[Place]:
        """Return the groups of tasks of a setting: each split if it has tasks of both, and all tasks."""
        splits = [split for split in SPLITS if self.tasks(setting, split)]
        groups = [*splits, ALL] if len(splits) == 2 else [ALL]
        return [Place(group, self.tasks(setting, group), is_group=True) for group in groups]

    # ------------------------------------------------------------------ one figure

    def figure(self, line: str, tasks: Sequence[str], name: str) -> MeasuredOverSeeds | None:
        """
        Return a figure of a line over one or more tasks.

        Args:
            line (`str`): the line.
            tasks (`Sequence[str]`): names of tasks. The value of several tasks is the plain mean of their means.
            name (`str`): name of the figure.

        Returns:
            [`MeasuredOverSeeds`], or `None` if the figure does not apply, or if no seed has it in all of the tasks in
            which it applies.
        """
        key = (line, tuple(tasks), name)
        if key not in self._figures:
            self._figures[key] = self._figure(*key)
        return self._figures[key]

    def _figure(self, line: str, tasks: tuple[str, ...], name: str) -> MeasuredOverSeeds | None:
        by_seed = {}
        for seed, by_task in self.scores.get(line, {}).items():
            by_seed[seed] = [scores_of(by_task, task, name) for task in tasks]
        by_seed = seeds_with_all_tasks(by_seed)
        measured = average(question_means(by_seed))
        if measured is None:
            return None
        seeds = {seed: mean_over_tasks(scores_of_tasks) for seed, scores_of_tasks in by_seed.items()}
        value, deviation = mean_and_deviation(list(seeds.values()))
        return {
            "value": value,
            "interval": measured["interval"],
            "n": measured["n"],
            "tasks": measured["tasks"],
            "of_tasks": len(tasks),
            "deviation": deviation if len(seeds) > 1 else None,
            "seeds": seeds,
            "of_seeds": len(self.experiment["seeds"]),
        }

    # ------------------------------------------------------------------ one comparison

    def compare(self, line: str, tasks: Sequence[str], name: str) -> DifferenceOverSeeds | None:
        """
        Compare a line with [its baseline][`Results.baseline_of`], question by question, over the seeds and questions
        that both have.

        Returns:
            [`DifferenceOverSeeds`], or `None` if there is nothing to compare.
        """
        key = (line, tuple(tasks), name)
        if key not in self._comparisons:
            self._comparisons[key] = self._compare(*key)
        return self._comparisons[key]

    def _compare(self, line: str, tasks: tuple[str, ...], name: str) -> DifferenceOverSeeds | None:
        pairs = {seed: self._paired_scores(line, tasks, name, seed) for seed in self._shared_seeds(line)}
        by_seed = seeds_with_all_tasks({seed: paired.differences for seed, paired in pairs.items()})
        measured = average(question_means(by_seed))
        if measured is None:
            return None
        difference = measured["value"]
        baseline_values: list[list[float]] = [[] for _ in tasks]
        for seed in by_seed:
            for values, values_of_seed in zip(baseline_values, pairs[seed].baseline_values, strict=True):
                values += values_of_seed
        baseline = plain_mean(plain_mean(values) for values in baseline_values if values)
        seeds = {seed: mean_over_tasks(differences) for seed, differences in by_seed.items()}
        return {
            "difference": difference,
            "interval": measured["interval"],
            "n": measured["n"],
            "left_out": sum(pairs[seed].left_out for seed in by_seed),
            "seeds": seeds,
            "of_seeds": len(self.experiment["seeds"]),
            "tasks": measured["tasks"],
            "of_tasks": len(tasks),
            "rate": 100 * difference / baseline if baseline else None,
            "verdict": verdict(name, measured["interval"], seeds.values()),
        }

    def _paired_scores(self, line: str, tasks: Sequence[str], name: str, seed: int) -> _PairedScores:
        pairs = _PairedScores()
        for task in tasks:
            new = scores_of(self.scores[line][seed], task, name)
            old = scores_of(self._baseline_scores(line)[seed], task, name)
            shared = [question for question in old if question in new]
            pairs.differences.append({question: new[question] - old[question] for question in shared})
            pairs.baseline_values.append([old[question] for question in shared])
            pairs.left_out += len(old.keys() ^ new.keys())
        return pairs

    def _shared_seeds(self, line: str) -> list[int]:
        baseline_by_seed = self._baseline_scores(line)
        return [seed for seed in self.scores.get(line, {}) if seed in baseline_by_seed]

    def _baseline_scores(self, line: str) -> dict[int, TaskScores]:
        baseline = self.baseline_of(line)
        return {} if baseline is None else self.scores[baseline]

    # ------------------------------------------------------------------ everything as JSON

    def to_dict(self) -> dict[str, Any]:
        """
        Return the content of `experiment.json`: what was run, `figures` (setting -> line -> task or group -> figure),
        and `comparisons` with the baseline.
        """
        figures: dict[str, dict] = {}
        comparisons: dict[str, dict] = {}
        for setting in self.settings:
            places = [*self.task_places(setting), *self.group_places(setting)]
            for line in self.lines:
                figures.setdefault(setting, {})[line] = self._by_place(self.figure, line, places)
                if self.baseline_of(line) is not None:
                    comparisons.setdefault(setting, {})[line] = self._by_place(self.compare, line, places)
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

    def _by_place(self, measure: Callable[..., Mapping | None], line: str, places: list[Place]) -> dict[str, dict]:
        """Return place -> name of a figure -> what `measure` ([`figure`] or [`compare`]) returns for it."""
        by_place: dict[str, dict] = {}
        for place in places:
            measured = {name: measure(line, place.tasks, name) for name in self.names}
            by_place[place.name] = {name: figure for name, figure in measured.items() if figure is not None}
        return by_place
