"""docs/figures.md names every figure of the vocabulary, with its meaning, its scale and when it is missing."""

from pathlib import Path

from trainer.judging.figures import FIGURES, Figure
from trainer.judging.missing_figures import missing_if

PAGE = Path(__file__).parents[2] / "docs" / "figures.md"
UNITS = {"share": "%", "count": "a number", "nats": "nats"}
HEADER = ["| figure | what it is | — if |", "|---|---|---|"]


def row_of(entry: Figure) -> str:
    """Return the row of a figure in the tables of the page."""
    label = entry.label.replace("[", "\\[").replace("]", "\\]")
    meaning = entry.meaning.replace("[", "\\[").replace("]", "\\]")
    conditions = "; ".join(missing_if(entry)).replace("[", "\\[").replace("]", "\\]")
    return f"| {label} `{entry.name}`, {UNITS[entry.scale]} | {meaning} | {conditions} |"


def test_the_page_has_every_figure_once():
    """A missing row, a surplus one and an older meaning all fail. If one is wrong, paste what is expected."""
    lines = PAGE.read_text(encoding="utf-8").splitlines()
    rows = [line for line in lines if line.startswith("|") and line not in HEADER]
    assert rows == [row_of(entry) for entry in FIGURES.values()]
