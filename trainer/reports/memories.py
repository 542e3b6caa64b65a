"""The report of an experiment with token memories: children by their number, projections, hurdle, and what it took."""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from modeling_cosup.files_cosup import write_json

from ..judging.figures import MISSING, figure, shown, shown_interval
from ..judging.intervals import Mean, mean_and_deviation
from .document import Block, Bullets, Cell, Code, Heading, Plot, Table, Text, write_document
from .plots import can_draw, draw_lines

FORMAT = 1
FIGURE = "child_log_likelihood"  # what most tables hold
OPTIMUM = "optimum"
ALL = "all"
SMALL = 100_000_000  # parameters; the paper's smallest Gen has more

Run: TypeAlias = dict[str, Any]
Points: TypeAlias = dict[float, tuple[float, float]]  # number -> mean and deviation over seeds


def write_memory_report(
    experiment: dict[str, Any], runs: Sequence[Run], command: str, hardware: str, output_dir: str | Path
) -> None:
    """
    Write `results.json`, `report.md`, `report.html` and `plots/`.

    Args:
        experiment (`dict`): the fields of the experiment file.
        runs (list of `dict`): for each arm and seed `arm`, `seed`, `failure` (`None` if it did not fail) and, if they
            were run, `facts`, `children`, `projections` and `hurdle`.
        command (`str`), hardware (`str`): how and where the experiment was run.
        output_dir (`str` or `Path`): the folder, which is created if it does not exist.
    """
    output_dir = Path(output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    title = experiment["title"]
    blocks: list[Block] = [Heading(title, 1)]
    if experiment["about"]:
        blocks.append(Text(experiment["about"]))
    blocks += _caution(runs)
    figures: dict[str, Any] = {}
    if any("children" in run for run in runs):
        figures["children"] = children_figures(runs)
        blocks += _children(figures["children"], runs, output_dir)
    if any("projections" in run for run in runs):
        figures["projections"] = projection_figures(runs)
        blocks += _projections(figures["projections"], runs)
    if any("hurdle" in run for run in runs):
        figures["hurdle"] = hurdle_figures(runs)
        blocks += _hurdle(figures["hurdle"], output_dir)
    blocks += [*_what_it_took(runs, hardware), *_how_it_was_made(experiment, command)]
    results = {"format": FORMAT, "experiment": experiment, "command": command, "hardware": hardware}
    write_json(output_dir / "results.json", {**results, "figures": figures, "runs": [_short(run) for run in runs]})
    write_document(blocks, output_dir, "report", title)


def _short(run: Run) -> Run:
    """Return a run without the lists of every sentence, from which the figures were computed."""
    if "children" not in run:
        return run
    lists = ("log_probs", "num_children", "villagers")
    return {**run, "children": {name: value for name, value in run["children"].items() if name not in lists}}


def _caution(runs: Sequence[Run]) -> list[Block]:
    blocks: list[Block] = []
    failed = [f"{_name(run)}: FAILED. {run['failure']}" for run in runs if run["failure"]]
    if failed:
        blocks += [Heading("What is missing"), Bullets(failed)]
    sizes = [run["facts"]["gen"]["parameters"] for run in runs if "facts" in run]
    if sizes and max(sizes) < SMALL:
        text = (
            f"The paper's models have 117 million parameters and more; Gen has {max(sizes) / 1e6:,.1f} million here."
            " What follows shows the mechanism at this scale. It is no evidence for or against the paper's claims."
        )
        blocks.append(Text(text))
    if len({run["seed"] for run in runs}) == 1:
        blocks.append(Text("There is one seed. What another seed would change is not known."))
    return blocks


# ---------------------------------------------------------------------- children


def children_figures(runs: Sequence[Run]) -> dict[str, Any]:
    """
    Return the mean log-likelihood of the children: arm -> line -> number of children, or `"all"`, -> figure.

    A figure holds `value` and `deviation` (mean and standard deviation over seeds) and `seeds`. Those of `"all"` also
    hold the `difference` from the LM: a [`~trainer.judging.figures.Measured`], whose interval is the bootstrap's over
    the villagers of all seeds, with `seeds`, the difference on each seed.
    """
    by_arm: dict[str, Any] = {}
    for arm, arm_runs in _by_arm(runs, "children").items():
        scores = [run["children"] for run in arm_runs]
        lines: dict[str, Any] = {}
        for line in (*scores[0]["log_probs"], OPTIMUM):
            lines[line] = {}
            for count in (*sorted(set(scores[0]["num_children"])), ALL):
                means = [_mean(_chosen(score, line, count)) for score in scores]
                lines[line][str(count)] = _over_seeds(means)
            if line not in ("LM", OPTIMUM):
                lines[line][ALL]["difference"] = _difference(scores, line)
        by_arm[arm] = lines
    return by_arm


def _chosen(score: Mapping[str, Any], line: str, count: int | str) -> list[float]:
    """Return the log-likelihoods of the children of villagers with `count` children, or of all."""
    values = [-math.log(number) for number in score["num_children"]]
    if line != OPTIMUM:
        values = score["log_probs"][line]
    pairs = zip(values, score["num_children"], strict=True)
    return [value for value, number in pairs if count in (ALL, number)]


def _difference(scores: Sequence[Mapping[str, Any]], line: str) -> dict[str, Any]:
    """Return the mean difference between a line and the LM, with its interval over villagers."""
    sums: dict[tuple[int, str], float] = {}
    sizes: dict[tuple[int, str], int] = {}
    for number, score in enumerate(scores):
        log_probs = score["log_probs"]
        for villager, with_memory, without in zip(score["villagers"], log_probs[line], log_probs["LM"], strict=True):
            key = (number, villager)
            sums[key] = sums.get(key, 0.0) + with_memory - without
            sizes[key] = sizes.get(key, 0) + 1
    seeds = [_mean(score["log_probs"][line]) - _mean(score["log_probs"]["LM"]) for score in scores]
    return {**Mean(list(sums.values()), list(sizes.values())).to_dict(), "seeds": seeds}


def _children(figures: dict[str, Any], runs: Sequence[Run], output_dir: Path) -> list[Block]:
    blocks: list[Block] = [Heading("Log-likelihood of the children")]
    counts = [count for count in next(iter(next(iter(figures.values())).values())) if count != ALL]
    panels = {}
    for arm, lines in figures.items():
        panels[arm] = {line: _points(by_count, counts) for line, by_count in lines.items()}
    path = "plots/children.png"
    blocks += _plot(panels, output_dir, path, "children of the villager", figure(FIGURE).label)
    rows: list[list[Cell]] = []
    for arm, lines in figures.items():
        rows.append([arm])
        for line, by_count in lines.items():
            cells = [_seeds_cell(by_count[count]) for count in (*counts, ALL)]
            perplexity = f"{math.exp(-by_count[ALL]['value']):,.2f}"
            rows.append([line, *cells, perplexity, _difference_cell(by_count[ALL])])
    header = ["", *(f"n = {count}" for count in counts), ALL, "perplexity", "all, minus LM"]
    note = (
        "Mean log-likelihood (nats) of the children of villagers with n children, in test sentences without a"
        " description; mean ± standard deviation over seeds. Perplexity is exp of minus the mean. The difference from"
        " the LM has a 95 % bootstrap interval over n villagers, and the numbers of seeds above / below the LM."
        " LM + kNN and LM + MLP have a weight of 0.25 on the memory, k 1,024 and temperature 1. The fitted lines have"
        " the values with the best perplexity on validation sentences. Optimum: log 1/n."
    )
    return [*blocks, Table(header, rows), Text(note, note=True), *_fitted(runs)]


def _fitted(runs: Sequence[Run]) -> list[Block]:
    rows: list[list[Cell]] = []
    for run in runs:
        if "children" not in run:
            continue
        cells: list[Cell] = [_name(run), f"{run['children']['lm_train']:.3f}"]
        for line, config in run["children"]["configs"].items():
            if line not in run["children"]["fits"]:
                continue
            text = f"weight {config['weight']:.3f}, temperature {config['temperature']:.3g}"
            if "kNN" in line:
                text += f", k {config['k']:,}"
            cells.append(text)
        rows.append(cells)
    header = ["", "LM, training sentences", "kNN, fitted", "MLP, fitted"]
    note = "Log-likelihood of the children in the training sentences; and what was fitted on the validation sentences."
    return [Table(header, rows), Text(note, note=True)]


# ---------------------------------------------------------------------- projections and hurdle


def projection_figures(runs: Sequence[Run]) -> dict[str, Any]:
    """Return arm -> target -> line -> `kl_before`, `kl_after`, `log_likelihood`, `steps`, each over seeds."""
    by_arm: dict[str, Any] = {}
    for arm, arm_runs in _by_arm(runs, "projections").items():
        results = [run["projections"]["targets"] for run in arm_runs]
        targets: dict[str, Any] = {}
        for target, first in results[0].items():
            lines = {
                "LM": {
                    "kl_after": _over_seeds([result[target]["kl"] for result in results]),
                    "log_likelihood": _over_seeds([result[target]["lm"] for result in results]),
                },
                "target": {"log_likelihood": _over_seeds([result[target]["target"] for result in results])},
            }
            for line, values in first["projections"].items():
                of_seeds = [result[target]["projections"][line] for result in results]
                lines[line] = {name: _over_seeds([values[name] for values in of_seeds]) for name in values}
            targets[target] = lines
        by_arm[arm] = targets
    return by_arm


def _projections(figures: dict[str, Any], runs: Sequence[Run]) -> list[Block]:
    rows: list[list[Cell]] = []
    for arm, targets in figures.items():
        for target, lines in targets.items():
            rows.append([f"{arm}, target: {target}"])
            for line, values in lines.items():
                perplexity = math.exp(-values["log_likelihood"]["value"])
                cells = [_seeds_cell(values.get(name), 4) for name in ("kl_before", "kl_after")]
                steps = f"{values['steps']['value']:,.0f}" if "steps" in values else MISSING
                rows.append([line, *cells, _seeds_cell(values["log_likelihood"]), f"{perplexity:,.2f}", steps])
    header = ["", "KL before", "KL after", "log-likelihood", "perplexity", "steps"]
    counts = sorted({run["projections"]["n"] for run in runs if "projections" in run})
    note = (
        f"Eq. 2 at {' or '.join(map(str, counts))} children of the test sentences: KL[f(z) ‖ target] in nats, before"
        " and after z was moved by Adam; mean ± standard deviation over seeds. f is the LM head, f∘g the last FFN with"
        " its norms, and the LM head. A row of LM holds the KL of the LM itself. A KL near 0 means that the layers can"
        " express the target, so that the bottleneck of the softmax is not what keeps the LM from it."
    )
    notes = {run["projections"]["note"] for run in runs if "projections" in run} - {""}
    blocks: list[Block] = [Heading("The softmax bottleneck"), Table(header, rows), Text(note, note=True)]
    return [*blocks, *(Text(text, note=True) for text in sorted(notes))]


def hurdle_figures(runs: Sequence[Run]) -> dict[str, Any]:
    """Return arm -> `"with"` or `"without"` -> training step -> mean log-likelihood of the children, over seeds."""
    by_arm: dict[str, Any] = {}
    for arm, arm_runs in _by_arm(runs, "hurdle").items():
        by_arm[arm] = {}
        for name in ("with", "without"):
            values: dict[str, list[float]] = {}
            for run in arm_runs:
                for step, value in run["hurdle"][name]:
                    values.setdefault(str(step), []).append(value)
            by_arm[arm][name] = {step: _over_seeds(of_seeds) for step, of_seeds in values.items()}
    return by_arm


def _hurdle(figures: dict[str, Any], output_dir: Path) -> list[Block]:
    blocks: list[Block] = [Heading("The MLP hurdle")]
    panels = {}
    rows: list[list[Cell]] = []
    steps = list(next(iter(figures.values()))["with"])
    for arm, curves in figures.items():
        panels[arm] = {f"{name} the last FFN": _points(curve, steps) for name, curve in curves.items()}
        for name, curve in curves.items():
            rows.append([f"{arm}, {name} the last FFN", *(_seeds_cell(curve[step]) for step in steps)])
    blocks += _plot(panels, output_dir, "plots/hurdle.png", "training step", figure(FIGURE).label)
    note = (
        "Models that memorise test sentences from scratch: mean log-likelihood (nats) of the children in these"
        " sentences after so many steps; mean ± standard deviation over seeds. The two differ only in the last FFN."
    )
    return [*blocks, Table(["step", *steps], rows), Text(note, note=True)]


# ---------------------------------------------------------------------- cost, and how to repeat it


def _what_it_took(runs: Sequence[Run], hardware: str) -> list[Block]:
    rows: list[list[Cell]] = []
    for run in runs:
        if "facts" not in run:
            continue
        gen, knn, mlp = (run["facts"][name] for name in ("gen", "knn", "mlp"))
        stores = [f"{memory['bytes'] / 1e6:,.2f} MB" for memory in (knn, mlp)]
        seconds = ", ".join(f"{memory['seconds']:,.0f}" for memory in (gen, knn, mlp))
        size = f"{gen['parameters'] / 1e6:,.2f}M"
        rows.append([_name(run), size, f"{gen['loss']:.3f}", f"{knn['keys']:,}", *stores, seconds])
    header = ["", "Gen", "its mean loss", "keys", "kNN memory", "MLP memory", "seconds: Gen, kNN, MLP"]
    note = f"{hardware}. Other programs may have run at the same time: the seconds are no measure of speed."
    return [Heading("What it took"), Table(header, rows), Text(note, note=True)]


def _how_it_was_made(experiment: dict[str, Any], command: str) -> list[Block]:
    options: list[list[Cell]] = []
    for name, value in experiment.items():
        if name not in ("title", "about"):
            options.append([name, json.dumps(value, ensure_ascii=False)])
    settings = Table(["field", "value"], options, folded="the experiment file", text_columns=frozenset([1]))
    return [Heading("How this was made"), Code(command), settings]


# ---------------------------------------------------------------------- helpers


def _name(run: Run) -> str:
    return f"{run['arm']}, seed {run['seed']}"


def _by_arm(runs: Iterable[Run], part: str) -> dict[str, list[Run]]:
    """Return the runs of each arm that hold a part."""
    by_arm: dict[str, list[Run]] = {}
    for run in runs:
        if part in run:
            by_arm.setdefault(run["arm"], []).append(run)
    return by_arm


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _over_seeds(values: list[float]) -> dict[str, Any]:
    """Return a figure over seeds: mean, standard deviation (`None` for one seed) and the values."""
    value, deviation = mean_and_deviation(values)
    return {"value": value, "deviation": deviation if len(values) > 1 else None, "seeds": values}


def _points(figures: Mapping[str, Any], numbers: Sequence[str]) -> Points:
    return {float(number): (figures[number]["value"], figures[number]["deviation"] or 0.0) for number in numbers}


def _seeds_cell(measured: Mapping[str, Any] | None, digits: int = 3) -> Cell:
    """Return the mean over seeds, with the standard deviation below it."""
    if measured is None:
        return MISSING
    value = f"{measured['value']:.{digits}f}"
    if measured["deviation"] is None:
        return value
    return f"{value} ± {measured['deviation']:.{digits}f}"


def _difference_cell(measured: Mapping[str, Any]) -> Cell:
    """Return the difference from the LM; below it the interval, n, and the numbers of seeds above and below the LM."""
    difference = measured.get("difference")
    if difference is None:
        return MISSING
    above = sum(change > 0 for change in difference["seeds"])
    below = sum(change < 0 for change in difference["seeds"])
    small = f"{shown_interval(difference['interval'], FIGURE, signed=True)} n = {difference['n']:,}, {above} / {below}"
    return shown(difference["value"], FIGURE, signed=True), small


def _plot(panels: dict[str, dict[str, Points]], output_dir: Path, path: str, xlabel: str, ylabel: str) -> list[Block]:
    if not can_draw():
        return [Text("Without matplotlib there are no plots: pip install matplotlib", note=True)]
    draw_lines(panels, output_dir / path, xlabel, ylabel)
    return [Plot(path, f"{ylabel.capitalize()} by {xlabel}; bars are standard deviations over seeds")]
