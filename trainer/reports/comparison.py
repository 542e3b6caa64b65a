"""
Two results folders next to each other: is the second better, and how sure is that?

A comparison has sections: the modes in which both models answered, and what the query embedding ranks, e.g. `"query
corpus"`.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from modeling_cosup.files_cosup import write_json
from modeling_cosup.lines_cosup import read_lines

from ..judging.figures import MAIN, MODES, QUERY, SCOPES, SPLITS, figure, shown
from ..judging.intervals import compare_differences, paired_bootstrap
from ..judging.results import FORMAT, read_results
from .cells import interval_text, percent, verdict
from .document import Block, Bullets, Cell, Heading, Table, Text, write_document

RESAMPLES = 10_000
JUDGED = ("nli", "nli_model", "gr_hypothesis")  # settings that say how answers were judged
COMPARED = (  # fields of a task that should be the same
    *("pool", "gold_in_pool", "top_k", "max_retrievals", "max_new_tokens", "cor", "passages"),
    *("eval_file", "corpus_file"),
)

Rows: TypeAlias = dict[str, dict[str, float | None]]  # question -> figure -> value
Columns: TypeAlias = dict[str, np.ndarray]  # figure -> values of both runs, (2, n)


def compare_results(
    first: str | Path, second: str | Path, resamples: int = RESAMPLES, seed: int = 0
) -> dict[str, Any]:
    """
    The paired bootstrap of two results folders, `second - first`, question by question.

    Args:
        first, second (`str` or `Path`): what `evaluate_tasks` wrote.
        resamples (`int`), seed (`int`): the same seed gives the same answer.

    Returns:
        `dict`: `"tasks"`: task -> section -> figure -> `{"first", "second", "difference", "interval", "p_value", "n",
        "left_out"}`; `"averages"`: split -> section -> figure -> the same over tasks, with `"tasks"`, their number,
        and `"rate"`, by how many percent of the first the second is better; `"notes"`: what is not compared, and
        settings that differ.

    Raises:
        `FileNotFoundError`: for a folder that is not complete.
        `ValueError`: for a folder of another format; when the folders share no task and mode, or, with counts, when a
            task's questions are not the same.
    """
    folders = (Path(first), Path(second))
    runs = (read_results(first), read_results(second))
    notes = [*_only_in_one(runs), *_judged_differently(runs)]
    tasks: dict[str, dict] = {}
    columns: dict[str, dict[str, Columns]] = {}
    for name in runs[0]["tasks"]:
        if name not in runs[1]["tasks"]:
            continue
        notes += _set_differently(name, runs)
        tasks[name], columns[name] = {}, {}
        for section in _shared_sections(name, runs):
            rows = [_read_rows(folder, name, section) for folder in folders]
            _check_same_questions(rows, f"{name}, mode {section}", folders)
            columns[name][section] = _columns(rows[0], rows[1])
            tasks[name][section] = _compare(rows[0], rows[1], columns[name][section], resamples, seed)
    if not any(tasks.values()):
        raise ValueError(f"{first} and {second} share no task and mode: there is nothing to compare.")
    splits = {name: runs[0]["tasks"][name]["split"] for name in tasks}
    return {
        "format": FORMAT,
        "first": runs[0]["settings"]["model"],
        "second": runs[1]["settings"]["model"],
        "tasks": tasks,
        "averages": _averages(splits, columns, resamples, seed),
        "notes": notes,
    }


def section_label(section: str) -> str:
    """A section in words: `"query embedding over the pool"`."""
    mode, _, scope = section.partition(" ")
    return f"{MODES[mode]} {SCOPES[scope]}" if scope else MODES[mode]


# ---------------------------------------------------------------------- what can be compared


def _only_in_one(runs: Sequence[dict]) -> Iterator[str]:
    for run, other, which in ((runs[0], runs[1], "first"), (runs[1], runs[0], "second")):
        alone = [name for name in run["tasks"] if name not in other["tasks"]]
        if alone:
            yield f"{len(alone)} tasks are only in the {which} folder: {', '.join(alone)}"


def _judged_differently(runs: Sequence[dict]) -> Iterator[str]:
    different = _differences(runs[0]["settings"], runs[1]["settings"], JUDGED)
    if different:
        yield (
            "the answers were judged in different ways, so Gr and other figures of an NLI model do not compare: "
            f"{different}"
        )


def _set_differently(task: str, runs: Sequence[dict]) -> Iterator[str]:
    different = _differences(runs[0]["tasks"][task], runs[1]["tasks"][task], COMPARED)
    if different:
        yield f"{task}: the settings differ in {different}"


def _differences(first: dict, second: dict, keys: Sequence[str]) -> str:
    different = [key for key in keys if first.get(key) != second.get(key)]
    return "; ".join(f"{key}: {first.get(key)!r} and {second.get(key)!r}" for key in different)


def _shared_sections(task: str, runs: Sequence[dict]) -> list[str]:
    first, second = (run["tasks"][task] for run in runs)
    modes = [mode for mode in first["modes"] if mode in second["modes"]]
    return modes + [f"{QUERY} {scope}" for scope in first["query"] if scope in second["query"]]


def _read_rows(folder: Path, task: str, section: str) -> Rows:
    mode, _, scope = section.partition(" ")
    rows = {}
    for row in read_lines(folder / task / mode / "scores.jsonl"):
        if row.pop("scope", "") == scope:
            rows[row.pop("id")] = row
    return rows


def _check_same_questions(rows: Sequence[Rows], where: str, folders: Sequence[Path]) -> None:
    first, second = (set(run) for run in rows)
    if first != second:
        raise ValueError(
            f"Task {where}: the folders do not hold the same questions: of {len(first | second)} ids "
            f"{len(first - second)} are only in {folders[0]}, {len(second - first)} only in {folders[1]}, "
            f"{len(first & second)} in both."
        )


# ---------------------------------------------------------------------- comparing it


def _columns(first: Rows, second: Rows) -> Columns:
    """The values of the questions that have one in both runs, by figure; without any a figure is left out."""
    columns = {}
    for name in _shared_figures(first, second):
        pairs = [(first[id][name], second[id][name]) for id in first]
        both = [pair for pair in pairs if None not in pair]
        if both:
            columns[name] = np.array(both, float).T
    return columns


def _shared_figures(first: Rows, second: Rows) -> list[str]:
    names: list[dict] = [next(iter(run.values()), {}) for run in (first, second)]
    return [name for name in names[0] if name in names[1]]


def _compare(first: Rows, second: Rows, columns: Columns, resamples: int, seed: int) -> dict[str, dict]:
    comparisons = {}
    for name, both in columns.items():
        values = [{id: row[name] for id, row in run.items()} for run in (first, second)]
        compared = paired_bootstrap(values[0], values[1], resamples, seed).to_dict()
        compared["left_out"] -= sum(
            values[0][id] is None and values[1][id] is None for id in first
        )  # applies in neither
        comparisons[name] = {"first": float(both[0].mean()), "second": float(both[1].mean()), **compared}
    return comparisons


def _averages(
    splits: dict[str, str | None], columns: dict[str, dict[str, Columns]], resamples: int, seed: int
) -> dict[str, dict[str, dict]]:
    """The plain means over tasks; questions are resampled within each task, in pairs."""
    averages: dict[str, dict[str, dict]] = {}
    for group in (*SPLITS, "all"):
        tasks = [columns[task] for task, split in splits.items() if group in (split, "all")]
        gathered: dict[str, dict[str, list[np.ndarray]]] = {}  # section -> figure -> of each task, (2, n)
        for sections in tasks:
            for section, figures in sections.items():
                for name, both in figures.items():
                    gathered.setdefault(section, {}).setdefault(name, []).append(both)
        for section, by_name in gathered.items():
            comparisons = {name: _average(of_tasks, resamples, seed) for name, of_tasks in by_name.items()}
            averages.setdefault(group, {})[section] = comparisons
    return averages


def _average(of_tasks: list[np.ndarray], resamples: int, seed: int) -> dict[str, Any]:
    first, second = (float(np.mean([both[run].mean() for both in of_tasks])) for run in (0, 1))
    compared = compare_differences([both[1] - both[0] for both in of_tasks], resamples, seed).to_dict()
    del compared["left_out"]
    rate = 100 * compared["difference"] / first if first else None
    return {"first": first, "second": second, **compared, "tasks": len(of_tasks), "rate": rate}


# ---------------------------------------------------------------------- showing it


def comparison_row(name: str, comparison: dict[str, Any]) -> list[Cell]:
    """Cells of a comparison: figure, both values, the difference with its interval, p and n."""
    difference = shown(comparison["difference"], name, signed=True)
    p_value = comparison["p_value"]
    return [
        figure(name).label,
        shown(comparison["first"], name),
        shown(comparison["second"], name),
        (difference, interval_text(comparison["interval"], name, signed=True)),
        "< 0.001" if p_value < 0.001 else f"{p_value:.3f}",
        str(comparison["n"]),
    ]


def write_comparison(comparison: dict[str, Any], output_dir: str | Path, names: Sequence[str] = ("A", "B")) -> None:
    """Write `comparison.json`, `comparison.md` and `comparison.html`; `names` are the names of the folders."""
    output_dir = Path(output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    write_json(output_dir / "comparison.json", comparison)
    write_document(comparison_blocks(comparison, names), output_dir, "comparison", "Comparison of two evaluations")


def comparison_blocks(comparison: dict[str, Any], names: Sequence[str]) -> list[Block]:
    """The comparison as blocks of a document."""
    about = (
        f"A is {names[0]} ({comparison['first']}), B is {names[1]} ({comparison['second']}). Differences are B − A, "
        "question by question, in percentage points, with 95 % intervals and two-sided p-values of the paired "
        "bootstrap; with fewer than about 30 questions its intervals are too narrow. Nothing is corrected for the "
        "number of comparisons."
    )
    blocks: list[Block] = [Heading("Comparison of two evaluations", 1), Text(about)]
    if len(comparison["tasks"]) > 1:
        blocks += [Heading("Averages"), _averages_table(comparison["averages"])]
    for task, sections in comparison["tasks"].items():
        table = Table(["", "A", "B", "B − A", "p", "n"], [])
        for section, comparisons in sections.items():
            table.rows.append([section_label(section)])
            for name, compared in comparisons.items():
                _add_row(table, name, compared)
        blocks += [Heading(task), table]
    blocks.append(Text("Bold: the interval of the difference does not hold 0.", note=True))
    if comparison["notes"]:
        blocks += [Heading("What to know"), Bullets(comparison["notes"])]
    return blocks


def _averages_table(averages: dict[str, dict[str, dict]]) -> Table:
    """The main figures over tasks, with the rate of improvement."""
    table = Table(["", "A", "B", "B − A", "p", "n", "improvement", "tasks"], [])
    for split, sections in averages.items():
        for section, comparisons in sections.items():
            names = [name for name in MAIN if name in comparisons]
            if names:
                table.rows.append([f"{split}, {section_label(section)}"])
            for name in names:
                compared = comparisons[name]
                _add_row(table, name, compared, [percent(compared["rate"]), str(compared["tasks"])])
    return table


def _add_row(table: Table, name: str, compared: dict[str, Any], further: Sequence[Cell] = ()) -> None:
    if verdict(name, compared["interval"]) != "within noise":
        table.strong.add(len(table.rows))
    table.rows.append([*comparison_row(name, compared), *further])
