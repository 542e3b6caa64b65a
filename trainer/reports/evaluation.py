"""The report of a results folder, made only from the files in it: `report.md`, `report.html` and `plots/`."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from modeling_cosup.lines_cosup import read_lines

from ..judging.figures import (
    FIGURES,
    MAIN,
    MISSING,
    MODES,
    QUERY,
    SCOPES,
    SEARCHING,
    SPLITS,
    cor_label,
    figure,
    in_order,
    shown,
)
from ..judging.grounding import cited_passages
from ..judging.missing_figures import missing_if
from ..judging.results import read_results
from .cells import average_cell, figure_cell
from .document import Block, Bullets, Cell, Code, Example, Heading, Table, Text, write_document
from .evaluation_plots import evaluation_plots

BY_GOLD = ("mrr", "ndcg@10", "query_recall@1", "query_recall@5", "query_recall@20", "query_recall@100")
BY_ANSWER = ("hit_rate@1", "hit_rate@5", "hit_rate@20", "hit_rate@100")
EMISSION = ("nsp_needed", "nsp_not_needed", "num_retrievals", "cor_not_needed", "em_not_needed")
PASSAGE_SHOWN = 600  # the most characters of a passage in an example
ANSWERS_SHOWN = 4  # the most reference answers in an example


def write_report(output_dir: str | Path, num_examples: int = 3) -> None:
    """
    Write the report of a results folder.

    Args:
        output_dir (`str` or `Path`): a folder that `evaluate_tasks` wrote.
        num_examples (`int`): number of answers to show from each task.

    Raises:
        `FileNotFoundError`: if the folder is not complete, so that it has no `metrics.json`.
        `ValueError`: if the results have another format.
    """
    output_dir = Path(output_dir)
    results = read_results(output_dir)
    title = f"Evaluation of {results['settings']['model'] or 'a model'}"
    blocks: list[Block] = [Heading(title, 1), Text(_summary(results), note=True)]
    blocks += _main_table(results)
    blocks += _modes(results)
    blocks += _rankings(results)
    blocks += _emission(results)
    blocks += evaluation_plots(results, output_dir)
    blocks += _examples(results, output_dir, num_examples)
    blocks += _all_figures(results)
    blocks += _left_out(results)
    blocks += _settings(results)
    write_document(blocks, output_dir, "report", title)


def _summary(results: dict) -> str:
    settings = results["settings"]
    versions = ", ".join(f"{name} {version}" for name, version in settings["versions"].items())
    hardware = settings["hardware"]
    together = ""
    if settings["processes"] > 1:
        hardware = f"{settings['processes']} processes on {hardware}"
        together = " in all processes together"
    seconds = 0.0
    for task in results["tasks"].values():
        seconds += sum(answers["seconds"] for answers in task["modes"].values())
    times = f"answering took {seconds:,.0f} s{together}, this run {results['seconds']:,.0f} s"
    memory = ""
    if settings.get("memory_config"):
        weight = settings["memory_config"]["weight"]
        memory = f"token memory {settings.get('memory') or ''} with weight {weight}; "
    return f"{memory}{settings['time']}; {hardware}; {settings['dtype']}; {versions}; {times}."


# ---------------------------------------------------------------------- tables


def _main_table(results: dict) -> list[Block]:
    """Return the paper's main table: one row per task, grouped by split, with averages."""
    mode = _main_mode(results)
    if mode is None:
        return []
    table = Table(["", "pool", "n", "Cor is", *(figure(name).label for name in MAIN)], [])
    for split in (*SPLITS, None):
        _add_split(table, results, split, mode)
    num_tasks = len(results["tasks"])
    if num_tasks > 1 and mode in results["averages"].get("all", {}):
        _add_average(table, f"average of all {num_tasks}", results["averages"]["all"][mode], num_tasks)
    meanings = "; ".join(f"{figure(name).label}: {figure(name).meaning}" for name in MAIN)
    note = (
        f"Percent, {MODES[mode]}, with 95 % intervals: Wilson intervals for yes/no figures, bootstrap intervals "
        f"otherwise; the latter have zero width if all questions score the same. {meanings}."
    )
    return [Heading("Results"), table, Text(note, note=True)]


def _main_mode(results: dict) -> str | None:
    """Return the mode of the main table and the examples: if possible, one in which the model searches."""
    modes = results["settings"]["modes"]
    for mode in (*SEARCHING, *modes):
        if mode in modes:
            return mode
    return None


def _add_split(table: Table, results: dict, split: str | None, mode: str) -> None:
    """Add the tasks of a split, with their average if there are several. `None` is for tasks without a split."""
    tasks = {}
    for name, task in results["tasks"].items():
        if task["split"] == split and mode in task["modes"]:
            tasks[name] = task
    if tasks:
        table.rows.append([split.capitalize() if split else "Other tasks"])
    for name, task in tasks.items():
        table.rows.append(_task_row(name, task, mode))
    if split in results["averages"] and len(tasks) > 1:
        _add_average(table, f"average of {len(tasks)}", results["averages"][split][mode], len(tasks))


def _task_row(name: str, task: dict, mode: str) -> list[Cell]:
    answers = task["modes"][mode]
    figures = answers["metrics"]
    n = figures["cor"]["n"] if "cor" in figures else answers["n"]
    pool = str(task["pool"])
    if task["pool"] == "full" and task["passages"] is not None:
        pool = f"{task['passages']:,}"
    cor = " / ".join(cor_label(metric) for metric in task["cor"])
    cells = [figure_cell(figures.get(column), column) for column in MAIN]
    return [name, pool, str(n), cor, *cells]


def _add_average(table: Table, title: str, averages: dict, of_tasks: int) -> None:
    n = str(averages["cor"]["n"]) if "cor" in averages else ""
    cells = [average_cell(averages.get(name), name, of_tasks) for name in MAIN]
    table.strong.add(len(table.rows))
    table.rows.append([title, "", n, "", *cells])


def _modes(results: dict) -> list[Block]:
    """Return Cor of each task in each mode."""
    tasks = results["tasks"]
    modes = [mode for mode in results["settings"]["modes"] if any(mode in task["modes"] for task in tasks.values())]
    if len(modes) < 2:
        return []
    table = Table(["", *(MODES[mode] for mode in modes)], [])
    for name, task in tasks.items():
        cells = [figure_cell(_figures(task, mode).get("cor"), "cor") for mode in modes]
        table.rows.append([name, *cells])
    if len(tasks) > 1:
        averages = results["averages"]["all"]
        table.strong.add(len(tasks))
        cells = [average_cell(averages.get(mode, {}).get("cor"), "cor", len(tasks)) for mode in modes]
        table.rows.append(["average", *cells])
    note = "Cor in percent. If passages are given, only questions that need one are asked, and [NSP] is forced first."
    return [Heading("What retrieval is worth"), table, Text(note, note=True)]


def _figures(task: dict, mode: str) -> dict:
    """Return the figures of a task in a mode; empty if the task was not answered in it."""
    return task["modes"][mode]["metrics"] if mode in task["modes"] else {}


def _rankings(results: dict) -> list[Block]:
    """Return the retrieval scores of the query embedding."""
    tables = [table for table in (_ranking_table(results, BY_GOLD), _ranking_table(results, BY_ANSWER)) if table.rows]
    if not tables:
        return []
    note = (
        "The query embedding at an [NSP] right after the question, in percent, by gold passages and by answer "
        "strings; the corpus is ranked down to place 100."
    )
    return [Heading("Query embedding"), *tables, Text(note, note=True)]


def _ranking_table(results: dict, names: Sequence[str]) -> Table:
    """Return the rankings as a table of some figures, with a row for each ranking that has one of them."""
    table = Table(["", "ranked", "n", *(figure(name).label for name in names)], [])
    for task_name, task in results["tasks"].items():
        for scope, figures in task["query"].items():
            measured = [figures[name] for name in names if name in figures]
            if not measured:
                continue
            ranked = f"corpus of {task['passages']:,}" if scope == "corpus" else f"pool of {task['pool']}"
            cells = [figure_cell(figures.get(name), name) for name in names]
            table.rows.append([task_name, ranked, str(measured[0]["n"]), *cells])
    return table


def _emission(results: dict) -> list[Block]:
    table = Table(["", *(figure(name).label for name in EMISSION)], [])
    for task_name, task in results["tasks"].items():
        figures = _figures(task, "retrieval")
        if figures:
            cells = [figure_cell(figures.get(name), name) for name in EMISSION]
            table.rows.append([task_name, *cells])
    if not table.rows:
        return []
    note = "How often the model decides to retrieve: share of the questions in percent, and retrievals per question."
    return [Heading("When [NSP] is emitted"), table, Text(note, note=True)]


def _all_figures(results: dict) -> list[Block]:
    """Return everything that was measured, in folded tables."""
    blocks: list[Block] = [Heading("All figures")]
    for task_name, task in results["tasks"].items():
        sections = {MODES[mode]: answers["metrics"] for mode, answers in task["modes"].items()}
        for scope, figures in task["query"].items():
            sections[f"{MODES[QUERY]} {SCOPES[scope]}"] = figures
        table = Table(["", *sections], [], folded=task_name)
        names = set().union(*sections.values())
        for name in in_order(names):
            cells = [figure_cell(figures.get(name), name, with_n=True) for figures in sections.values()]
            table.rows.append([figure(name).label, *cells])
        blocks.append(table)
    rows: list[list[Cell]] = [[entry.label, entry.meaning, "; ".join(missing_if(entry))] for entry in FIGURES.values()]
    header = ["figure", "what it is", f"{MISSING} if"]
    glossary = Table(header, rows, folded="what the figures are", text_columns=frozenset([1, 2]))
    return [*blocks, glossary]


# ---------------------------------------------------------------------- examples, notes and settings


def _examples(results: dict, output_dir: Path, num_examples: int) -> list[Block]:
    mode = _main_mode(results)
    if mode is None or not num_examples:
        return []
    blocks: list[Block] = [Heading("Examples")]
    blocks.append(Text(f"The first answers of each task, {MODES[mode]}.", note=True))
    for name, task in results["tasks"].items():
        if mode not in task["modes"]:
            continue
        folder = output_dir / name / mode
        scores = {row["id"]: row for row in read_lines(folder / "scores.jsonl")}
        blocks.append(Heading(name, 3))
        for prediction in read_lines(folder / "predictions.jsonl")[:num_examples]:
            blocks.append(_example(prediction, scores[prediction["id"]]))
    return blocks


def _example(prediction: dict, scores: dict) -> Example:
    passages = []
    for number, passage in enumerate(cited_passages(prediction), 1):
        passages.append((number, passage["title"], _shortened(passage["text"])))
    marks = list(_marks(scores))
    if not passages:
        marks.append("nothing retrieved")
    answers = prediction["answers"]
    expected = " / ".join(answers[:ANSWERS_SHOWN])
    if len(answers) > ANSWERS_SHOWN:
        expected += " / …"
    return Example(prediction["input"], prediction["output_with_citations"], expected, passages, marks)


def _marks(scores: dict) -> Iterator[str]:
    """Yield the scores that an example shows, in percent."""
    labels = {
        "ret": figure("ret").label,
        "cor": figure("cor").label,
        "cor_not_needed": figure("cor").label,  # Cor of a question that needs no passage
        "gr": figure("gr").label,
    }
    for name, label in labels.items():
        value = scores.get(name)
        if value is not None:
            yield f"{label} {shown(value, name)} %"


def _shortened(text: str) -> str:
    return text if len(text) <= PASSAGE_SHOWN else f"{text[:PASSAGE_SHOWN].rstrip()} …"


def _left_out(results: dict) -> list[Block]:
    blocks: list[Block] = []
    for name, task in results["tasks"].items():
        if task["left_out"]:
            blocks += [Heading(name, 3), Bullets(task["left_out"])]
    return [Heading("What is left out"), *blocks] if blocks else []


def _settings(results: dict) -> list[Block]:
    blocks: list[Block] = [Heading("How this was made")]
    rows: list[list[Cell]] = []
    for name, value in results["settings"].items():
        if name == "command":
            blocks.append(Code(value))
        elif isinstance(value, str):
            rows.append([name, value])
        else:
            rows.append([name, json.dumps(value, ensure_ascii=False)])
    return [*blocks, Table(["setting", "value"], rows, folded="settings", text_columns=frozenset([1]))]
