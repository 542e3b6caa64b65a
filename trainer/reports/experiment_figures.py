"""
The figures of an experiment: arms x seeds x tasks, averaged, compared, and judged.

A line of a table is an arm, or, where the answers of a model were made in several modes, an arm and a mode. A question counts once: its scores are averaged
over the seeds that were asked the same one, and intervals come from resampling questions, within each task. What seeds alone change is shown beside it, as
the standard deviation over seeds; a difference counts as one only if its interval leaves out 0 and all seeds agree on its sign.
"""

import json
from pathlib import Path

import numpy as np

from ..judging import figures as vocabulary
from ..judging.intervals import average, mean_and_deviation
from ..judging.results import read_lines

COLUMNS = (*vocabulary.MAIN, "query_recall@1")
GROUPS = ("in-domain", "out-of-domain", "all")


class Results:
    """
    What an experiment found.

    Args:
        experiment (`dict`): the fields of its file: `title`, `about`, `arms`, `baseline`, `seeds`, `evaluation`, `axis`, `corpus_sizes`, ...
        runs (`list[dict]`): of each arm and seed: `arm`, `seed`, `options`, `failure`, `trained` and `evaluated` (`None` until done), `evaluation` (the folder
            whose `results/` recipes/run_evaluation.py wrote), `questions` (for each task what tells its questions from others).
        meaning (`dict`): name of a task in the results -> `{"task", "setting", "size", "split"}`.
        notes (`list[str]`): what was left out.
        command (`str`): that made all this.
    """

    def __init__(self, experiment, runs, meaning, notes=(), command=""):
        self.experiment, self.runs, self.meaning, self.notes, self.command = experiment, runs, meaning, list(notes), command
        self.modes = experiment["evaluation"]["modes"]
        self.found = {}  # figures that were asked for
        self.scores = {}  # line -> seed -> task -> metric -> {question: value}
        for run in runs:
            if run["evaluated"] is not None:
                for mode in self.modes:
                    own = {name: _read_scores(run, name, mode) for name in meaning}
                    self.scores.setdefault(self.line(run["arm"], mode), {})[run["seed"]] = {name: found for name, found in own.items() if found}
        self.lines = [line for arm in experiment["arms"] for mode in self.modes if (line := self.line(arm, mode)) in self.scores]
        self.settings = list(dict.fromkeys(own["setting"] for own in meaning.values()))
        found = {metric for seeds in self.scores.values() for tasks in seeds.values() for own in tasks.values() for metric in own}
        self.metrics = vocabulary.in_order(found)
        self.cor = {}  # task -> what Cor is there
        for path in [Path(run["evaluation"], "results", "metrics.json") for run in runs if run["evaluated"] is not None]:
            told = json.loads(path.read_text())["tasks"] if path.exists() else {}
            named = {own["task"]: told[name]["cor"] for name, own in meaning.items() if name in told}
            self.cor |= {task: ", ".join(vocabulary.cor_label(each) for each in names) for task, names in named.items()}

    def line(self, arm, mode):
        """How tables name the answers of an arm in a mode: by what differs."""
        if len(self.modes) == 1:
            return arm
        return mode if len(self.experiment["arms"]) == 1 else f"{arm}, {mode}"

    @property
    def baseline(self):
        """The line that others are compared with, `None` where it failed."""
        wanted = self.experiment["baseline"]
        return next((line for line in self.lines if line == wanted or line.startswith(f"{wanted}, ")), None)

    def arm(self, line):
        """The arm of a line."""
        return next((arm for arm in self.experiment["arms"] for mode in self.modes if self.line(arm, mode) == line), None)

    def tasks(self, setting, group="all"):
        """Names of the tasks of a setting and a group, in order."""
        return [name for name, own in self.meaning.items() if own["setting"] == setting and group in ("all", own["split"])]

    def groups(self, setting):
        """The groups that say something of their own: in-domain and out-of-domain where there are both, and all."""
        present = [group for group in GROUPS[:2] if self.tasks(setting, group)]
        return [*present, "all"] if len(present) == 2 else ["all"]

    # ------------------------------------------------------------------ one figure

    def figure(self, line, names, metric):
        """
        A metric of a line over one or more tasks.

        Args:
            line (`str`), metric (`str`).
            names (`list[str]`): tasks; over several it is the plain mean of the tasks' means.

        Returns:
            `dict`: `value`, the mean over seeds; `interval`; `n` (questions); `tasks` in which it applies, `of_tasks` (all); `deviation` over seeds (`None` for
            one) and `seeds` (`{seed: value}`). `None` where the metric does not apply.
        """
        key = (line, tuple(names), metric)
        if key not in self.found:
            self.found[key] = self._figure(*key)
        return self.found[key]

    def _figure(self, line, names, metric):
        seeds = self.scores.get(line, {})
        columns = [_over_seeds([tasks.get(name, {}).get(metric, {}) for tasks in seeds.values()]) for name in names]
        found = average([list(column.values()) for column in columns])
        if found is None:
            return None
        values = {seed: value for seed, tasks in seeds.items() if (value := _plain_mean(tasks, names, metric)) is not None}
        mean, deviation = mean_and_deviation(list(values.values()))
        figure = {"value": mean, "interval": found["interval"], "n": found["n"], "tasks": found["tasks"], "of_tasks": len(names)}
        return {**figure, "deviation": deviation if len(values) > 1 else None, "seeds": values}

    def compare(self, line, names, metric, baseline=None):
        """
        A line against the baseline, question by question, over the seeds and questions that both have.

        Returns:
            `dict`: `difference` of the means, its `interval`, `n`, `left_out` (questions for which one of them has no value), `tasks` in which both have one,
            `of_tasks` (all), `rate` (the difference in percent of the baseline; `None` where that is 0), `seeds` (`{seed: difference}`) and `verdict`:
            `"ahead"`, `"behind"` or `"within noise"`. `None` where there is nothing to compare.
        """
        baseline = self.baseline if baseline is None else baseline
        ours, theirs = self.scores.get(line, {}), self.scores.get(baseline, {})
        seeds = [seed for seed in ours if seed in theirs]
        columns, old, per_seed, left_out = [], [], {seed: [] for seed in seeds}, 0
        for name in names:
            pairs, values = [], []
            for seed in seeds:
                first, second = (theirs[seed].get(name, {}).get(metric, {}), ours[seed].get(name, {}).get(metric, {}))
                shared = [key for key in first if key in second]
                left_out += len(set(first) ^ set(second))
                pairs.append({key: second[key] - first[key] for key in shared})
                values += [first[key] for key in shared]
                if shared:
                    per_seed[seed].append(float(np.mean(list(pairs[-1].values()))))
            if values:
                columns.append(list(_over_seeds(pairs).values()))
                old.append(float(np.mean(values)))
        found = average(columns)
        if found is None:
            return None
        differences = {seed: float(np.mean(own)) for seed, own in per_seed.items() if own}
        result = {"difference": found["value"], "interval": found["interval"], "n": found["n"], "left_out": left_out, "seeds": differences}
        result |= {"tasks": found["tasks"], "of_tasks": len(names)}
        return result | {"rate": 100 * found["value"] / np.mean(old) if np.mean(old) else None, "verdict": verdict(found["interval"], differences.values())}

    # ------------------------------------------------------------------ all of them

    def to_dict(self):
        """Everything as JSON holds it: what was run, `figures` (setting -> line -> task or group -> metric) and `comparisons` with the baseline."""
        figures, comparisons = {}, {}
        for setting in self.settings:
            places = {**{self.meaning[name]["task"]: [name] for name in self.tasks(setting)}, **{g: self.tasks(setting, g) for g in self.groups(setting)}}
            for line in self.lines:
                own = {place: {m: self.figure(line, names, m) for m in self.metrics} for place, names in places.items()}
                figures.setdefault(setting, {})[line] = {place: _present(found) for place, found in own.items()}
                if self.baseline is not None and line != self.baseline:
                    own = {place: {m: self.compare(line, names, m) for m in self.metrics} for place, names in places.items()}
                    comparisons.setdefault(setting, {})[line] = {place: _present(found) for place, found in own.items()}
        told = {"experiment": self.experiment, "command": self.command, "runs": self.runs, "notes": self.notes, "baseline": self.baseline}
        return {**told, "figures": figures, "comparisons": comparisons}


def verdict(interval, differences):
    """`"ahead"` or `"behind"` where the interval leaves out 0 and every seed is on the same side, else `"within noise"`."""
    low, high = interval
    if low > 0 and all(each > 0 for each in differences):
        return "ahead"
    if high < 0 and all(each < 0 for each in differences):
        return "behind"
    return "within noise"


def _read_scores(run, name, mode):
    """`{metric: {question: value}}` of a task in a mode; where the model searches itself, with the ranking of the query embedding over what is searched."""
    folder = Path(run["evaluation"], "results", name)
    columns = {}
    for row in _rows(folder / mode / "scores.jsonl") if mode != vocabulary.QUERY else []:
        _add(columns, run["questions"][name], row, {metric: value for metric, value in row.items() if metric != "id"})
    if mode in ("retrieval", vocabulary.QUERY):
        rows = _rows(folder / "query" / "scores.jsonl")
        scope = "pool" if any(row["scope"] == "pool" for row in rows) else "corpus"
        for row in rows:
            if row["scope"] == scope:
                _add(columns, run["questions"][name], row, {key: value for key, value in row.items() if key not in ("id", "scope")})
    return columns


def _rows(path):
    return read_lines(path) if path.exists() else []


def _add(columns, questions, row, values):
    for metric, value in values.items():
        if value is not None:
            columns.setdefault(metric, {})[f"{questions[:16]} {row['id']}"] = float(value)


def _over_seeds(columns):
    """`{question: mean}` over the seeds that asked it."""
    gathered = {}
    for column in columns:
        for key, value in column.items():
            gathered.setdefault(key, []).append(value)
    return {key: sum(values) / len(values) for key, values in gathered.items()}


def _plain_mean(tasks, names, metric):
    """Mean over tasks of a seed's means, `None` where there is none."""
    means = [float(np.mean(list(column.values()))) for name in names if (column := tasks.get(name, {}).get(metric))]
    return float(np.mean(means)) if means else None


def _present(figures):
    return {metric: figure for metric, figure in figures.items() if figure is not None}
