"""The report of the indicators of readers, made only from its `indicators.json`: `report.md` and `report.html`."""

from collections.abc import Iterator
from pathlib import Path

from ..judging.figures import MISSING
from ..judging.results import read_results
from .document import Block, Bullets, Cell, Code, Heading, Table, Text, write_document

TITLES = {"answer": "answer", "nouns": "question nouns"}  # target -> what the columns of its indicator say
REASONS = {  # why instances are left out -> the note on them; the last one is of Indicator 2 alone
    "no_passage": "have no passage",
    "no_answer": "have no answer",
    "too_long": "are longer than the reader can read",
    "no_noun": "have no noun (Indicator 2)",
}


def write_indicator_report(output_dir: str | Path) -> None:
    """
    Write the report of a folder that recipes/run_indicators.py wrote.

    Raises:
        `FileNotFoundError`: without `indicators.json`.
        `ValueError`: if the results have another format.
    """
    results = read_results(Path(output_dir) / "indicators.json")
    settings = results["settings"]
    title = f"Indicators of {len(results['models'])} readers on {settings['eval_file']}"
    versions = ", ".join(f"{name} {version}" for name, version in settings["versions"].items())
    summary = f"{settings['time']}; {settings['hardware']}; {settings['dtype']}; {versions}; {results['seconds']:,} s."
    blocks: list[Block] = [Heading(title, 1), Text(summary, note=True), *indicator_blocks(results)]
    blocks += [Heading("How this was made"), Code(settings["command"])]
    write_document(blocks, output_dir, "report", title)


def indicator_blocks(results: dict) -> list[Block]:
    """Return the table of a results file, with its notes, as a section of a report."""
    blocks: list[Block] = [Heading("Where readers look"), _table(results["models"]), Text(_note(results), note=True)]
    blocks += [Heading("What they would teach"), _taught(results["models"]), Text(_note_on_taught(results), note=True)]
    left_out = list(_left_out(results["models"]))
    return [*blocks, Bullets(left_out)] if left_out else blocks


def columns(readers: dict) -> list[tuple[str, str]]:
    """Return the columns that all readers have: `(target, percentile)`, in order."""
    first = next(iter(readers.values()))
    return [
        (target, percentile) for target, by_percentile in first["indicators"].items() for percentile in by_percentile
    ]


def column_title(target: str, percentile: str) -> str:
    """Return a column's name, e.g. `"answer, nearest 5 %"`."""
    return f"{TITLES[target]}, nearest {100 - int(percentile)} %"


def shown_attention(spread: dict) -> str:
    """Format a mean attention with its deviation over instances, in percent."""
    return _shown(spread, 100, "")


def shown_rho(spread: dict) -> str:
    """Format a mean correlation with its deviation over instances."""
    return _shown(spread, 1, "+")


def shown_best(reader: dict) -> dict[str, str]:
    """Format how often the passage that each target prefers is gold, by `distillation_target`."""
    shown = {}
    for name, spread in sorted(reader["best_is_gold"].items()):
        shown[name] = MISSING if spread["mean"] is None else f"{100 * spread['mean']:.1f} % (n = {spread['n']})"
    return shown


def shown_places(reader: dict) -> str:
    """Format the mean share of attention of each place, in percent."""
    return ", ".join(f"{100 * share:.1f}" for share in reader["places"])


def _taught(readers: dict) -> Table:
    """Return how often the preferred passage is gold, a row for each reader."""
    targets = sorted(next(iter(readers.values()))["best_is_gold"])
    table = Table(["", *(f"best is gold, by {target}" for target in targets), "attention by place, %"], [])
    for name, reader in readers.items():
        shown = shown_best(reader)
        table.rows.append([name, *(shown[target] for target in targets), shown_places(reader)])
    return table


def _note_on_taught(results: dict) -> str:
    order = "in a random order" if results["settings"]["shuffle"] else "the nearest first"
    return (
        "How often the passage that a distillation_target prefers is gold, of the questions with a gold passage among "
        f"theirs; 1 / {results['settings']['num_candidates']} by chance where one of them is gold. Passages are read "
        f"{order}: where the nearest is first, a place and what it deserves cannot be told apart, so attention "
        "relative to its place says little."
    )


def _table(readers: dict) -> Table:
    """Return the paper's Table 2: a row for each reader."""
    header = ["", "all alike"]
    for target, percentile in columns(readers):
        title = column_title(target, percentile)
        header += [f"{title}: attention", f"{title}: ρ"]
    table = Table(header, [])
    for name, reader in readers.items():
        row: list[Cell] = [name, shown_attention(reader["uniform"])]
        for target, percentile in columns(readers):
            indicator = reader["indicators"][target][percentile]
            row.append((shown_attention(indicator["attention"]), f"n = {indicator['attention']['n']}"))
            counts = f"n = {indicator['rho']['n']}"
            if indicator["num_undefined"]:
                counts += f", {indicator['num_undefined']} undefined"
            row.append((shown_rho(indicator["rho"]), counts))
        table.rows.append(row)
    return table


def _shown(spread: dict, factor: float, sign: str) -> str:
    if spread["mean"] is None:
        return MISSING
    mean = f"{factor * spread['mean']:{sign}.2f}"
    return mean if spread["deviation"] is None else f"{mean} ± {factor * spread['deviation']:.2f}"


def _note(results: dict) -> str:
    settings = results["settings"]
    candidates = settings["candidates"].replace("_", " ")
    return (
        "Indicators 1 (answer) and 2 (question nouns) of arXiv 2402.11794, mean ± standard deviation over instances. "
        "Attention: share of a reader's attention to its passages that goes to one of the passage tokens nearest to "
        "the answer or to the nouns, in percent; 'all alike' is that of a reader that attends to all passage tokens "
        "alike. ρ: Spearman's correlation of attention and similarity over the nearest tokens; undefined with fewer "
        "than three of them, or if all have the same similarity or attention. Similarity is the cosine of Gen's "
        f"input embeddings, {settings['pooling']} over the target tokens. Each question is read with "
        f"{settings['num_candidates']} passages ({candidates}, by {settings['retriever']})."
    )


def _left_out(readers: dict) -> Iterator[str]:
    """Yield notes on instances that do not count, with counts."""
    for name, reader in readers.items():
        for reason, note in REASONS.items():
            count = reader["left_out"][reason]
            if count:
                yield f"{name}: {count} of {reader['num_instances']} instances {note}"
