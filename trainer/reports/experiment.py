"""The report of an experiment: verdicts, plots and tables, its cost, and how to repeat it."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from modeling_cosup.files_cosup import write_json

from ..judging.figures import figure, shown
from ..judging.grounding import HYPOTHESIS
from .cells import MISSING, seeds_cell, seeds_difference_cell
from .document import Block, Bullets, Cell, Code, Heading, Table, Text, write_document
from .experiment_figures import COLUMNS, GROUP_TITLES, Place, Results
from .experiment_plots import experiment_plots
from .learning_curves import cost_table, learning_blocks, learning_curves
from .planned import planned_blocks, planned_comparisons

EMISSION = ("nsp_needed", "nsp_not_needed", "num_retrievals", "cor_not_needed", "em_not_needed")
# If Gen has fewer parameters, the results say nothing about models of the paper's size.
SMALL = 1_000_000_000


def write_experiment_report(results: Results, output_dir: str | Path) -> None:
    """
    Write `experiment.json`, `report.md`, `report.html` and `plots/`.

    Args:
        results ([`~trainer.reports.experiment_figures.Results`]): the results. The report also lists the runs that
            failed or are still missing.
        output_dir (`str` or `Path`): the folder, which is created if it does not exist.
    """
    output_dir = Path(output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    content = results.to_dict()
    planned = planned_comparisons(results)
    if planned:
        content["planned_comparisons"] = planned
    arms = learning_curves(results)
    if arms:
        content["learning_curves"] = arms
    write_json(output_dir / "experiment.json", content)
    title = results.experiment["title"]
    blocks: list[Block] = [Heading(title, 1)]
    if results.experiment["about"]:
        blocks.append(Text(results.experiment["about"]))
    blocks += _failures(results)
    blocks += _caution(results)
    blocks += planned_blocks(results, planned)
    if results.lines:
        blocks += _verdicts(results)
        blocks += experiment_plots(results, output_dir)
        blocks += _tables(results)
        blocks += _comparisons(results)
    blocks += learning_blocks(arms, output_dir)
    blocks += _trainings(results, cost_table(arms))
    blocks += _commands(results)
    write_document(blocks, output_dir, "report", title)


# ---------------------------------------------------------------------- findings


def _failures(results: Results) -> list[Block]:
    failed: list[str] = []
    not_run: list[str] = []
    for run in results.runs:
        if run["failure"]:
            failed.append(f"{_run_name(run)}: FAILED. {run['failure']}")
        elif run["evaluated"] is None:
            not_run.append(f"{_run_name(run)}: not run")
    missing = failed + not_run
    return [Heading("What is missing"), Bullets(missing)] if missing else []


def _caution(results: Results) -> list[Block]:
    experiment = results.experiment
    blocks: list[Block] = []
    sizes = [run["trained"]["parameters"].get("gen", 0) for run in results.runs if run["trained"]]
    if sizes and max(sizes) < SMALL:
        world = ""
        if experiment["world"] and not experiment["tasks"]:
            world = ", and the world is fictional, in a language of a few dozen templates"
        text = (
            f"The paper's models have 7,000 million parameters each; Gen has {max(sizes) / 1e6:,.1f} million "
            f"here{world}. What follows shows the mechanism at this scale. It is no evidence for or against the "
            "paper's claim."
        )
        blocks.append(Text(text))
    evaluated_seeds = _evaluated_seeds(results)
    arms_of_one_seed = [arm for arm, seeds in evaluated_seeds.items() if len(seeds) == 1]
    if arms_of_one_seed:
        count = "There is one seed."
        if len(arms_of_one_seed) < len(evaluated_seeds):
            count = f"There is one seed of {', '.join(arms_of_one_seed)}."
        text = f"{count} What another seed would change is not known, and no interval below covers it."
        blocks.append(Text(text))
    return blocks


def _evaluated_seeds(results: Results) -> dict[str, set[int]]:
    """Return the seeds with which each arm was evaluated."""
    seeds: dict[str, set[int]] = {}
    for run in results.evaluated:
        seeds.setdefault(run["arm"], set()).add(run["seed"])
    return seeds


def _verdicts(results: Results) -> list[Block]:
    """Return a table of the figures in which each line is ahead of the baseline, behind it, or within noise of it."""
    if results.baseline is None or not results.compared_lines:
        return []
    rows: list[list[Cell]] = []
    num_comparisons = 0
    for setting in results.settings:
        groups = results.group_places(setting)
        for place in groups:
            where = GROUP_TITLES[place.name] if len(groups) > 1 else "all tasks"
            for line in results.compared_lines:
                by_verdict = _figures_by_verdict(results, line, place)
                num_comparisons += sum(len(changes) for changes in by_verdict.values())
                cells = [", ".join(changes) or MISSING for changes in by_verdict.values()]
                rows.append([f"{results.label(line)}: {setting}, {where}", *cells])
    by_chance = max(1, round(num_comparisons / 20))  # at a level of 5 %
    note = (
        "Differences in percentage points. Ahead or behind: the 95 % interval of the paired difference leaves out 0, "
        f"and every seed is on that side. Of {num_comparisons} comparisons about {by_chance} would look like "
        "this by chance."
    )
    table = Table(["", "ahead in", "behind in", "within noise"], rows, text_columns=frozenset([1, 2, 3]))
    return [Heading(f"Against {_baseline_title(results)}"), table, Text(note, note=True)]


def _figures_by_verdict(results: Results, line: str, place: Place) -> dict[str, list[str]]:
    """Return verdict -> figures with that verdict, each with its difference from the baseline."""
    by_verdict: dict[str, list[str]] = {"ahead": [], "behind": [], "within noise": []}
    for name in COLUMNS:
        difference = results.compare(line, place.tasks, name)
        if difference is not None:
            change = shown(difference["difference"], name, signed=True)
            by_verdict[difference["verdict"]].append(f"{figure(name).label} ({change})")
    return by_verdict


def _tables(results: Results) -> list[Block]:
    """Return tables of the main figures in each setting, then folded tables of [NSP] and of all other figures."""
    blocks: list[Block] = [Heading("Results")]
    names = [name for name in COLUMNS if name in results.names or name == "gr"]
    for setting in results.settings:
        blocks += [Heading(setting, 3), _table(results, setting, names)]
    blocks.append(Text(_what_columns_mean(results), note=True))
    emission = [name for name in EMISSION if name in results.names]
    further = [name for name in results.names if name not in (*COLUMNS, *EMISSION)]
    for title, folded_names in (("When [NSP] is emitted", emission), ("Further figures", further)):
        if not folded_names:
            continue
        for setting in results.settings:
            blocks.append(_table(results, setting, folded_names, folded=f"{title}: {setting}"))
    return blocks


def _what_columns_mean(results: Results) -> str:
    sentences = [
        "Percent; mean ± standard deviation over seeds, 95 % bootstrap interval over questions, n = questions.",
        "Yes/no figures have bootstrap intervals too, as an average over seeds is not yes or no.",
        "Averages are plain means over tasks.",
        "An interval of zero width only means that all questions here scored the same.",
    ]
    for name in ("query_recall@1", "hit_rate@5"):
        if name in results.names:
            entry = figure(name)
            sentences.append(f"{entry.label}: {entry.meaning}, which is read at an [NSP] right after the question.")
    if results.cor:
        metrics = "; ".join(f"{task}: {label}" for task, label in results.cor.items())
        sentences.append(f"Cor is {metrics}.")
    evaluation = results.experiment["evaluation"]
    judge = evaluation.get("nli_model")
    if not judge:
        sentences.append("Gr needs an NLI model (evaluation.nli_model) and is not shown without one.")
    elif "gr" in results.names:
        hypothesis = evaluation.get("gr_hypothesis", HYPOTHESIS)
        sentences.append(f"Gr is judged by {judge}, which read each sentence as {hypothesis}.")
    else:
        sentences.append("Gr is not shown: no arm wrote text between [Cs] and [CE] after a passage.")
    return " ".join(sentences)


def _table(results: Results, setting: str, names: list[str], folded: str | None = None) -> Table:
    """Return a table with a group for each task and average, and a row for each line."""
    table = Table(["", *(figure(name).label for name in names)], [], folded=folded)
    places = results.task_places(setting)
    if len(places) > 1:
        places += results.group_places(setting)
    for place in places:
        rows = _rows(results, place, results.lines, names, results.figure, seeds_cell)
        if _is_empty(rows):
            continue
        table.rows.append([_title(results, place)])
        if place.is_group:
            table.strong.update(range(len(table.rows), len(table.rows) + len(rows)))
        table.rows += rows
    return table


def _is_empty(rows: list[list[Cell]]) -> bool:
    return all(cell == MISSING for _, *cells in rows for cell in cells)


def _comparisons(results: Results) -> list[Block]:
    """Return tables of the differences from the baseline, with intervals and the paper's improvement rates."""
    if results.baseline is None or not results.compared_lines:
        return []
    names = [name for name in COLUMNS if name in results.names]
    lines = results.compared_lines
    blocks: list[Block] = [Heading(f"Differences with {_baseline_title(results)}")]
    for setting in results.settings:
        table = Table(["", *(figure(name).label for name in names)], [])
        for place in [*results.group_places(setting), *results.task_places(setting)]:
            table.rows.append([GROUP_TITLES[place.name] if place.is_group else place.name])
            table.rows += _rows(results, place, lines, names, results.compare, seeds_difference_cell)
        blocks += [Heading(setting, 3), table]
    note = (
        "Percentage points, in brackets percent of the baseline (the paper's improvement rate); then the 95 % "
        "interval of the paired bootstrap over questions, n, how many questions are left out because only one of the "
        "two has a value, and how many seeds are above, equal to and below the baseline."
    )
    return [*blocks, Text(note, note=True)]


def _rows(
    results: Results,
    place: Place,
    lines: Sequence[str],
    names: Sequence[str],
    measure: Callable[..., Mapping[str, Any] | None],
    cell: Callable[[Mapping[str, Any] | None, str], Cell],
) -> list[list[Cell]]:
    """Return a row for each line: its label, and what `measure` returns for each figure of a place, as cells."""
    rows: list[list[Cell]] = []
    for line in lines:
        cells = [cell(measure(line, place.tasks, name), name) for name in names]
        rows.append([results.label(line), *cells])
    return rows


def _title(results: Results, place: Place) -> str:
    if place.is_group:
        return GROUP_TITLES[place.name]
    return f"{place.name} ({place.split})" if place.split else place.name


def _baseline_title(results: Results) -> str:
    """Return what lines are compared with: an arm, in the mode of each line, or a mode of the only arm."""
    assert results.baseline is not None
    if len(results.experiment["arms"]) > 1 and len(results.modes) > 1:
        return f"{results.arm(results.baseline)}, in the same mode"
    return results.label(results.baseline)


# ---------------------------------------------------------------------- cost, and how to repeat it


def _trainings(results: Results, costs: list[Block]) -> list[Block]:
    rows: list[list[Cell]] = []
    for run in results.runs:
        if run["trained"]:
            rows.append(_training_row(run))
        else:
            state = "failed" if run["failure"] else "not run"
            rows.append([_run_name(run), state, *[MISSING] * 5])
    header = ["", "steps", "training", "evaluation", "parameters", "last losses", "hardware"]
    note = "Times are for the whole command, imports included."
    return [Heading("What it took"), *costs, Table(header, rows), Text(note, note=True)]


def _training_row(run: dict) -> list[Cell]:
    trained = run["trained"]
    steps = f"{trained['steps']:,}"
    seconds = f"{trained['seconds']:,.0f} s"
    if trained["resumed"]:
        seconds += ", its last part"
    evaluation = f"{run['evaluated']['seconds']:,.0f} s" if run["evaluated"] else MISSING
    sizes = " + ".join(f"{count / 1e6:,.1f}M" for count in trained["parameters"].values())
    losses = []
    for name, loss in trained["losses"].items():
        if name != "loss":
            losses.append(f"{name.removesuffix('_loss')} {MISSING if loss is None else f'{loss:.3f}'}")
    return [_run_name(run), steps, seconds, evaluation, sizes, ", ".join(losses), trained["hardware"]]


def _commands(results: Results) -> list[Block]:
    arms: list[list[Cell]] = [[arm, _json(options)] for arm, options in results.experiment["arms"].items()]
    blocks: list[Block] = [Heading("How this was made"), Code(results.command)]
    blocks.append(Table(["arm", "differs in"], arms, text_columns=frozenset([1])))
    if results.notes:
        blocks += [Heading("Left out", 3), Bullets(results.notes)]
    commands: list[list[Cell]] = []
    for run in results.runs:
        for step in ("trained", "evaluated"):
            if run[step]:
                commands.append([_run_name(run), run[step]["command"]])
    blocks.append(Table(["", "command"], commands, folded="every command", text_columns=frozenset([1])))
    options: list[list[Cell]] = [[name, _json(value)] for name, value in sorted(_shared_options(results).items())]
    folded = "options of train.py that all arms share"
    return [*blocks, Table(["option", "value"], options, folded=folded, text_columns=frozenset([1]))]


def _shared_options(results: Results) -> dict[str, Any]:
    shared = {}
    for name, value in results.runs[0]["options"].items():
        if all(run["options"].get(name) == value for run in results.runs):
            shared[name] = value
    return shared


def _run_name(run: dict) -> str:
    return f"{run['arm']}, seed {run['seed']}"


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
