"""
A report as a list of blocks, and how it reads in Markdown and as one HTML page: `templates/` holds both forms.

Any text may hold anything. Jinja2 escapes every value that a template prints, for the form it prints; a template marks
what it has made itself as safe.
"""

import base64
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeAlias

import jinja2
from markupsafe import Markup

TEMPLATES = Path(__file__).with_name("templates")

Cell: TypeAlias = "str | tuple[str, str]"  # a text, or a text and a small one below it


@dataclass
class Heading:
    """A heading of level 1, 2 or 3."""

    text: str
    level: int = 2


@dataclass
class Text:
    """A paragraph; a `note` is set smaller."""

    text: str
    note: bool = False


@dataclass
class Bullets:
    """A list of texts."""

    items: list[str]


@dataclass
class Code:
    """Text as it is."""

    text: str


@dataclass
class Table:
    """
    A table.

    Args:
        header (`list[str]`), rows (`list[list[Cell]]`): a row of one cell is the head of a group.
        strong (set of `int`): numbers of the rows that are set in bold.
        folded (`str`, *optional*): the page shows the table only when asked, under this name.
        text_columns (set of `int`): numbers of the columns that hold sentences.
    """

    header: list[str]
    rows: list[list[Cell]]
    strong: set[int] = field(default_factory=set)
    folded: str | None = None
    text_columns: frozenset[int] = frozenset()


@dataclass
class Plot:
    """A PNG file, `path` relative to the report's folder, and what it shows."""

    path: str
    caption: str


@dataclass
class Example:
    """A question with its answer: `(number, title, text)` of its passages, and marks such as "Ret 1"."""

    question: str
    answer: str
    expected: str
    passages: list[tuple[int, str, str]]
    marks: list[str]


Block: TypeAlias = Heading | Text | Bullets | Code | Table | Plot | Example


def write_document(blocks: Sequence[Block], folder: str | Path, name: str, title: str) -> None:
    """Write `name.md` and `name.html`, each whole or not at all; the plots in `folder` are embedded in the page."""
    folder = Path(folder)
    for suffix, text in ((".md", to_markdown(blocks)), (".html", to_html(blocks, folder, title))):
        unfinished = folder / f".{name}{suffix}.unfinished"
        unfinished.write_text(text, encoding="utf-8")
        unfinished.replace(folder / f"{name}{suffix}")


def to_markdown(blocks: Sequence[Block]) -> str:
    """The blocks as GitHub shows them."""
    return _MARKDOWN.get_template("report.md.jinja").render(blocks=_with_kinds(blocks))


def to_html(blocks: Sequence[Block], folder: Path, title: str) -> str:
    """The blocks as one page that loads nothing from elsewhere."""
    pictures = {block.path: _data_uri(folder / block.path) for block in blocks if isinstance(block, Plot)}
    template = _HTML.get_template("report.html.jinja")
    return template.render(blocks=_with_kinds(blocks), title=title, pictures=pictures)


def escape_markdown(text: object) -> Markup:
    """A text on one line that Markdown shows as it is: no markup, links, pictures or HTML."""
    if isinstance(text, Markup):  # what a template has made
        return text
    one_line = " ".join(str(text).split()).replace("&", "&amp;").replace("<", "&lt;")
    return Markup(re.sub(r"([\\`*_\[\]#!|~$>]|:(?=//))", r"\\\1", one_line))


def _escape_line_start(text: str) -> Markup:
    """As [`escape_markdown`], where the text would also begin a list."""
    escaped = re.sub(r"^([-+])(?=\s|$)", r"\\\1", escape_markdown(text))
    return Markup(re.sub(r"^(\d+)([.)])(?=\s|$)", r"\1\\\2", escaped))


def _fenced(text: str) -> Markup:
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return Markup(f"{fence}\n{text}\n{fence}")


def _data_uri(path: Path) -> str:
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()


def _with_kinds(blocks: Sequence[Block]) -> list[tuple[str, Block]]:
    return [(type(block).__name__, block) for block in blocks]


def _environment(**options) -> jinja2.Environment:
    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        **options,
    )


_HTML = _environment()
_MARKDOWN = _environment(finalize=escape_markdown)
_MARKDOWN.filters |= {"line_start": _escape_line_start, "fenced": _fenced}
