"""
The comparison of two results folders, question by question: is the second run better, and how certain is that?

A comparison has sections. A section is a mode in which both models answered, or a ranking by the query embedding, e.g.
`"query corpus"`.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from modeling_cosup.files_cosup import read_json, write_json
from modeling_cosup.lines_cosup import read_lines

from ..judging.figures import MAIN, MODES, QUERY, SCOPES, SPLITS, figure, in_order, shown, shown_interval
from ..judging.intervals import compare_differences, paired_bootstrap
from ..judging.results import FORMAT, read_results
from .cells import percent, shown_p, verdict
from .document import Block, Bullets, Cell, Heading, Table, Text, write_document

RESAMPLES = 10_000
JUDGE_SETTINGS = ("nli", "nli_model", "gr_hypothesis")
TASK_SETTINGS = (  # fields of a task that should be the same in both folders
    "pool",
    "gold_in_pool",
    "top_k",
    "max_retrievals",
    "max_new_tokens",
    "cor",
    "count_empty_answers",
    "passages",
    "eval_file",
    "corpus_file",
)
POOL_SETTINGS = ("pool", "gold_in_pool")

QuestionScores: TypeAlias = dict[str, dict[str, float | None]]  # question -> figure -> value, of one run
PairedValues: TypeAlias = dict[str, np.ndarray]  # figure -> values of both runs, (2, n)


def compare_results(
    first: str | Path, second: str | Path, resamples: int = RESAMPLES, seed: int = 0
) -> dict[str, Any]:
    """
    Compare two results folders by the paired bootstrap of `second - first`, question by question.

    Args:
        first (`str` or `Path`): a folder that `evaluate_tasks` wrote, the baseline.
        second (`str` or `Path`): the folder to compare with it.
        resamples (`int`): number of resamples.
        seed (`int`): seed of the resampling. The same seed gives the same result.

    Returns:
        `dict`: `"tasks"`: task -> section -> figure -> `{"first", "second", "difference", "interval", "p_value", "n",
        "left_out"}`; `"averages"`: split -> section -> figure -> the same over tasks, with `"tasks"`, the number that
        have the figure, `"of_tasks"`, the number of all, and `"rate"`, the improvement in percent of the first;
        `"notes"`: what is not compared, and settings that differ.

    Raises:
        `FileNotFoundError`: if a folder is not complete.
        `ValueError`: if a folder has another format, if the folders share no task and mode, or, with counts, if the
            questions of a task differ.
    """
    folders = (Path(first), Path(second))
    runs = (read_results(first), read_results(second))
    notes = [*_notes_on_tasks(runs), *_notes_on_judges(runs)]
    tasks: dict[str, dict] = {}
    values: dict[str, dict[str, PairedValues]] = {}
    for name in runs[0]["tasks"]:
        if name not in runs[1]["tasks"]:
            continue
        notes += _notes_on_settings(name, runs)
        notes += _notes_on_sections(name, runs)
        tasks[name] = {}
        values[name] = {}
        for section in _shared_sections(name, runs):
            scores = [_read_scores(folder, name, section) for folder in folders]
            _check_same_questions(scores, f"{name}, mode {section}", folders)
            notes += _notes_on_questions(name, section, runs, folders)
            values[name][section] = _paired_values(scores[0], scores[1])
            notes += _notes_on_figures(f"{name}, {section_label(section)}", scores, values[name][section])
            tasks[name][section] = _compare(scores[0], scores[1], values[name][section], resamples, seed)
    if not any(tasks.values()):
        raise ValueError(f"{first} and {second} share no task and mode: there is nothing to compare.")
    splits = {name: runs[0]["tasks"][name]["split"] for name in tasks}
    return {
        "format": FORMAT,
        "first": runs[0]["settings"]["model"],
        "second": runs[1]["settings"]["model"],
        "tasks": tasks,
        "averages": _averages(splits, values, resamples, seed),
        "notes": notes,
    }


def section_label(section: str) -> str:
    """Return a section in words, e.g. `"query embedding over the pool"`."""
    mode, scope = _mode_and_scope(section)
    return f"{MODES[mode]} {SCOPES[scope]}" if scope else MODES[mode]


def _mode_and_scope(section: str) -> tuple[str, str]:
    """Return the parts of a section's name: `("query", "pool")`, or `("gold", "")` for a mode that generates."""
    mode, _, scope = section.partition(" ")
    return mode, scope


# ---------------------------------------------------------------------- what can be compared


def _notes_on_tasks(runs: Sequence[dict]) -> Iterator[str]:
    for run, other, folder in ((runs[0], runs[1], "first"), (runs[1], runs[0], "second")):
        only_here = [name for name in run["tasks"] if name not in other["tasks"]]
        if only_here:
            yield f"{len(only_here)} tasks are only in the {folder} folder: {', '.join(only_here)}"


def _notes_on_judges(runs: Sequence[dict]) -> Iterator[str]:
    different = _differences(runs[0]["settings"], runs[1]["settings"], JUDGE_SETTINGS)
    if different:
        yield (
            "the answers were judged in different ways, so Gr and other figures of an NLI model do not compare: "
            f"{different}"
        )


def _notes_on_settings(task: str, runs: Sequence[dict]) -> Iterator[str]:
    different = _differences(runs[0]["tasks"][task], runs[1]["tasks"][task], TASK_SETTINGS)
    if different:
        yield f"{task}: the settings differ in {different}"


def _notes_on_sections(task: str, runs: Sequence[dict]) -> Iterator[str]:
    first, second = (_sections(task, run) for run in runs)
    for sections, others, folder in ((first, second, "first"), (second, first, "second")):
        only_here = [section_label(section) for section in sections if section not in others]
        if only_here:
            yield f"{task}: only the {folder} folder has {', '.join(only_here)}"


def _notes_on_questions(task: str, section: str, runs: Sequence[dict], folders: Sequence[Path]) -> Iterator[str]:
    """Yield a note if questions with the same ids differ in something that is no setting, such as their answers."""
    mode, _ = _mode_and_scope(section)
    files = [folder / task / mode / "run.json" for folder in folders]
    results = [run["tasks"][task] for run in runs]
    if _differences(results[0], results[1], POOL_SETTINGS) or not all(file.exists() for file in files):
        return  # the settings of a pool decide the candidates, which are part of a question
    first, second = (read_json(file)["questions"] for file in files)
    if first != second:
        yield (
            f"{task}, {section_label(section)}: the questions have the same ids in both folders, but not the same "
            "content (answers, provenance, candidates or meta)"
        )


def _notes_on_figures(where: str, scores: Sequence[QuestionScores], compared: PairedValues) -> Iterator[str]:
    """Yield notes on figures that no question has in both runs."""
    first, second = (_measured(run_scores) for run_scores in scores)
    groups = {
        "only the first folder has": [name for name in first if name not in second],
        "only the second folder has": [name for name in second if name not in first],
        "no question has in both folders": [name for name in first if name in second and name not in compared],
    }
    for who, names in groups.items():
        if names:
            yield f"{where}: {who} {', '.join(figure(name).label for name in names)}"


def _measured(scores: QuestionScores) -> list[str]:
    """Return the names of the figures that at least one question has."""
    return in_order(name for row in scores.values() for name, value in row.items() if value is not None)


def _differences(first: dict, second: dict, keys: Sequence[str]) -> str:
    different = [key for key in keys if first.get(key) != second.get(key)]
    return "; ".join(f"{key}: {first.get(key)!r} and {second.get(key)!r}" for key in different)


def _shared_sections(task: str, runs: Sequence[dict]) -> list[str]:
    first, second = (_sections(task, run) for run in runs)
    return [section for section in first if section in second]


def _sections(task: str, run: dict) -> list[str]:
    results = run["tasks"][task]
    return [*results["modes"], *(f"{QUERY} {scope}" for scope in results["query"])]


def _read_scores(folder: Path, task: str, section: str) -> QuestionScores:
    mode, scope = _mode_and_scope(section)
    scores = {}
    for row in read_lines(folder / task / mode / "scores.jsonl"):
        if row.pop("scope", "") == scope:
            scores[row.pop("id")] = row
    return scores


def _check_same_questions(scores: Sequence[QuestionScores], where: str, folders: Sequence[Path]) -> None:
    first, second = (set(run_scores) for run_scores in scores)
    if first != second:
        raise ValueError(
            f"Task {where}: the folders do not hold the same questions: of {len(first | second)} ids "
            f"{len(first - second)} are only in {folders[0]}, {len(second - first)} only in {folders[1]}, "
            f"{len(first & second)} in both."
        )


# ---------------------------------------------------------------------- the differences


def _paired_values(first: QuestionScores, second: QuestionScores) -> PairedValues:
    """Return, by figure, the values of the questions that have one in both runs. Figures without any are left out."""
    values = {}
    for name in _shared_figures(first, second):
        pairs = [(first[id][name], second[id][name]) for id in first]
        complete = [pair for pair in pairs if None not in pair]
        if complete:
            values[name] = np.array(complete, float).T  # (2, n)
    return values


def _shared_figures(first: QuestionScores, second: QuestionScores) -> list[str]:
    first_row: dict = next(iter(first.values()), {})
    second_row: dict = next(iter(second.values()), {})
    return [name for name in first_row if name in second_row]


def _compare(
    first: QuestionScores, second: QuestionScores, values: PairedValues, resamples: int, seed: int
) -> dict[str, dict]:
    comparisons = {}
    for name, (first_values, second_values) in values.items():
        old = {id: row[name] for id, row in first.items()}
        new = {id: row[name] for id, row in second.items()}
        compared = paired_bootstrap(old, new, resamples, seed).to_dict()
        # If neither run has a value for a question, it does not count as left out: the figure does not apply to it.
        compared["left_out"] -= sum(old[id] is None and new[id] is None for id in old)
        means = {"first": float(first_values.mean()), "second": float(second_values.mean())}
        comparisons[name] = {**means, **compared}
    return comparisons


def _averages(
    splits: dict[str, str | None], values: dict[str, dict[str, PairedValues]], resamples: int, seed: int
) -> dict[str, dict[str, dict]]:
    """Return the plain means over tasks. Questions are resampled within each task, in pairs."""
    averages: dict[str, dict[str, dict]] = {}
    for group in (*SPLITS, "all"):
        tasks = [values[task] for task, split in splits.items() if group in (split, "all")]
        for section, arrays_by_name in _arrays_by_section(tasks).items():
            comparisons = {name: _average(arrays, resamples, seed) for name, arrays in arrays_by_name.items()}
            with_counts = {name: {**compared, "of_tasks": len(tasks)} for name, compared in comparisons.items()}
            averages.setdefault(group, {})[section] = with_counts
    return averages


def _arrays_by_section(tasks: list[dict[str, PairedValues]]) -> dict[str, dict[str, list[np.ndarray]]]:
    """Return section -> figure -> one array `(2, n)` for each task that has the figure."""
    arrays: dict[str, dict[str, list[np.ndarray]]] = {}
    for sections in tasks:
        for section, figures in sections.items():
            for name, pairs in figures.items():
                arrays.setdefault(section, {}).setdefault(name, []).append(pairs)
    return arrays


def _average(arrays: list[np.ndarray], resamples: int, seed: int) -> dict[str, Any]:
    """Compare two runs by the plain means over tasks, given one array `(2, n)` per task."""
    first = float(np.mean([pairs[0].mean() for pairs in arrays]))
    second = float(np.mean([pairs[1].mean() for pairs in arrays]))
    compared = compare_differences([pairs[1] - pairs[0] for pairs in arrays], resamples, seed).to_dict()
    del compared["left_out"]
    rate = 100 * compared["difference"] / first if first else None
    return {"first": first, "second": second, **compared, "tasks": len(arrays), "rate": rate}


# ---------------------------------------------------------------------- the report


def comparison_row(name: str, comparison: dict[str, Any]) -> list[Cell]:
    """
    Return a comparison as cells: figure, both values, the difference with its interval, p, and n with the number of
    questions that have a value in only one run.
    """
    difference = shown(comparison["difference"], name, signed=True)
    left_out = f"({comparison['left_out']} left out)" if comparison.get("left_out") else ""
    return [
        figure(name).label,
        shown(comparison["first"], name),
        shown(comparison["second"], name),
        (difference, shown_interval(comparison["interval"], name, signed=True)),
        shown_p(comparison["p_value"]),
        (str(comparison["n"]), left_out),
    ]


def task_count(average: dict[str, Any]) -> str:
    """Return over how many tasks an average is, and of how many if some lack the figure."""
    tasks, of_tasks = average["tasks"], average["of_tasks"]
    return str(tasks) if tasks == of_tasks else f"{tasks} of {of_tasks}"


def write_comparison(comparison: dict[str, Any], output_dir: str | Path, names: Sequence[str] = ("A", "B")) -> None:
    """Write `comparison.json`, `comparison.md` and `comparison.html`. `names` are the names of the two folders."""
    output_dir = Path(output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    write_json(output_dir / "comparison.json", comparison)
    write_document(comparison_blocks(comparison, names), output_dir, "comparison", "Comparison of two evaluations")


def comparison_blocks(comparison: dict[str, Any], names: Sequence[str]) -> list[Block]:
    """Return the report of a comparison as blocks of a document."""
    about = (
        f"A is {names[0]} ({comparison['first']}), B is {names[1]} ({comparison['second']}). Differences are B − A, "
        "question by question, in percentage points (counts as they are), with 95 % intervals and two-sided p-values "
        "of the paired bootstrap; with fewer than about 30 questions its intervals are too narrow, and with one there "
        "is none. A question that has a value in only one run is left out. Nothing is corrected for the number of "
        "comparisons."
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
    blocks.append(Text("Bold: the interval of the difference excludes 0.", note=True))
    if comparison["notes"]:
        blocks += [Heading("What to know"), Bullets(comparison["notes"])]
    return blocks


def _averages_table(averages: dict[str, dict[str, dict]]) -> Table:
    """Return the averages over tasks of the main figures, with the rate of improvement."""
    table = Table(["", "A", "B", "B − A", "p", "n", "improvement", "tasks"], [])
    for split, sections in averages.items():
        for section, comparisons in sections.items():
            names = [name for name in MAIN if name in comparisons]
            if names:
                table.rows.append([f"{split}, {section_label(section)}"])
            for name in names:
                compared = comparisons[name]
                _add_row(table, name, compared, [percent(compared["rate"]), task_count(compared)])
    return table


def _add_row(table: Table, name: str, compared: dict[str, Any], further: Sequence[Cell] = ()) -> None:
    if verdict(name, compared["interval"]) != "within noise":
        table.strong.add(len(table.rows))
    table.rows.append([*comparison_row(name, compared), *further])
