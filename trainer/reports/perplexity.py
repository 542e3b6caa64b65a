"""The report of a perplexity folder, made only from its `perplexity.json`: `report.md` and `report.html`."""

from pathlib import Path

from ..judging.figures import MISSING, Measured, figure, shown, shown_interval
from ..judging.results import read_results
from .cells import figure_cell
from .document import Block, Bullets, Cell, Code, Heading, Table, Text, write_document


def write_perplexity_report(output_dir: str | Path) -> None:
    """
    Write the report of a folder that recipes/run_perplexity.py wrote.

    Raises:
        `FileNotFoundError`: without `perplexity.json`.
        `ValueError`: if the results have another format.
    """
    results = read_results(Path(output_dir) / "perplexity.json")
    settings = results["settings"]
    title = f"Perplexity of {settings['text_file']}"
    versions = ", ".join(f"{name} {version}" for name, version in settings["versions"].items())
    summary = (
        f"{settings['model']}; {text_read(results['text'])}; windows of {settings['max_length']:,} tokens, "
        f"stride {settings['stride']:,}; {settings['time']}; {settings['hardware']}; {settings['dtype']}; {versions}"
    )
    if "peak_memory" in results:
        summary += f"; peak memory {results['peak_memory']:.2f} GB"
    blocks: list[Block] = [
        Heading(title, 1),
        Text(f"{summary}.", note=True),
        _table(results["arms"]),
        Text(_note(), note=True),
    ]
    if results["warnings"]:
        blocks += [Heading("Warnings"), Bullets(results["warnings"])]
    blocks += [Heading("How this was made"), Code(settings["command"])]
    write_document(blocks, output_dir, "report", title)


def text_read(text: dict[str, int]) -> str:
    """Return in words how much text was read: `tokens`, `documents`, and those `left_out`, which have one token."""
    words = f"{text['tokens']:,} tokens of {text['documents']:,} documents"
    if text["left_out"]:
        words += f", and {text['left_out']:,} without a token to predict, which are left out"
    return words


def shown_overlap(share: float | None) -> str:
    """Return in percent how much of a text is in a memory; a share above 0 is never shown as 0."""
    if share is None:
        return MISSING
    percent = shown(share, "ngram_overlap")
    return "< 0.1 %" if share and float(percent) == 0 else f"{percent} %"


def _table(arms: dict) -> Table:
    header = ["", "weight", "k", "T", "entries", figure("perplexity").label, figure("nll").label]
    table = Table([*header, "NLL to Gen alone", figure("ngram_overlap").label, "s", "s per 1,000 tokens"], [])
    for name, arm in arms.items():
        config = arm["memory_config"] or {}
        entries = MISSING if arm["entries"] is None else f"{arm['entries']:,}"
        is_datastore = arm["entries"] is not None
        cells: list[Cell] = [
            "Gen alone" if not config else name,
            f"{config['weight']:g}" if config else MISSING,
            f"{config['k']:,}" if is_datastore else MISSING,
            f"{config['temperature']:g}" if config else MISSING,
            entries,
            figure_cell(arm["perplexity"], "perplexity"),
            figure_cell(arm["nll"], "nll"),
            _difference_cell(arm["difference"]),
            shown_overlap(arm["ngram_overlap"]),
            f"{arm['seconds']:,.2f}",
            f"{arm['seconds_per_1000_tokens']:,.3f}",
        ]
        table.rows.append(cells)
    return table


def _difference_cell(difference: Measured | None) -> Cell:
    if difference is None:
        return MISSING
    interval = shown_interval(difference["interval"], "nll", signed=True)
    return shown(difference["value"], "nll", signed=True), interval


def _note() -> str:
    meanings = [f"{figure(name).label}: {figure(name).meaning}" for name in ("perplexity", "nll", "ngram_overlap")]
    return (
        "In brackets 95 % intervals from a bootstrap over documents; differences are paired document by document, and "
        "below 0 where the memory helps. The seconds of a memory are what it adds to those of Gen alone. "
        f"{'; '.join(meanings)}."
    )
