"""
A report as a list of blocks, and its two renderings: Markdown and a single HTML page. `templates/` holds a template
for each.

No text in a block is trusted: Jinja2 escapes every value that a template prints. Only markup that a template makes
itself is marked as safe.
"""

import base64
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import jinja2
from markupsafe import Markup

from modeling_cosup.files_cosup import replacing_file

TEMPLATES = Path(__file__).with_name("templates")

Cell: TypeAlias = "str | tuple[str, str]"  # a text, or a text and a small text below it


@dataclass
class Heading:
    """A heading of level 1, 2 or 3."""

    text: str
    level: int = 2


@dataclass
class Text:
    """A paragraph. A `note` is set in smaller type."""

    text: str
    note: bool = False


@dataclass
class Bullets:
    """A list of texts."""

    items: list[str]


@dataclass
class Code:
    """Text that is shown verbatim."""

    text: str


@dataclass
class Table:
    """
    A table.

    Args:
        header (`list[str]`): names of the columns.
        rows (`list[list[Cell]]`): the rows. A row of one cell is the heading of a group of rows.
        strong (`set[int]`): indices of the rows in bold.
        folded (`str`, *optional*): title under which the HTML page folds the table; by default it is not folded.
        text_columns (`frozenset[int]`): indices of the columns that hold sentences.
    """

    header: list[str]
    rows: list[list[Cell]]
    strong: set[int] = field(default_factory=set)
    folded: str | None = None
    text_columns: frozenset[int] = frozenset()


@dataclass
class Plot:
    """A PNG file with its caption. `path` is relative to the report's folder."""

    path: str
    caption: str


@dataclass
class Example:
    """A question with its answer, its passages as `(number, title, text)`, and marks such as `"Ret 100.0 %"`."""

    question: str
    answer: str
    expected: str
    passages: list[tuple[int, str, str]]
    marks: list[str]


Block: TypeAlias = Heading | Text | Bullets | Code | Table | Plot | Example


def write_document(blocks: Sequence[Block], folder: str | Path, name: str, title: str) -> None:
    """Write `name.md` and `name.html` into a folder, each atomically. The page embeds the plots of the folder."""
    folder = Path(folder)
    texts = {".md": to_markdown(blocks), ".html": to_html(blocks, folder, title)}
    for suffix, text in texts.items():
        with replacing_file(folder / f"{name}{suffix}") as unfinished:
            unfinished.write_text(text, encoding="utf-8")


def to_markdown(blocks: Sequence[Block]) -> str:
    """Return the blocks as GitHub-flavoured Markdown."""
    return _MARKDOWN.get_template("report.md.jinja").render(blocks=_with_kinds(blocks))


def to_html(blocks: Sequence[Block], folder: Path, title: str) -> str:
    """Return the blocks as one HTML page that loads no other files."""
    pictures = {block.path: _data_uri(folder / block.path) for block in blocks if isinstance(block, Plot)}
    template = _HTML.get_template("report.html.jinja")
    return template.render(blocks=_with_kinds(blocks), title=title, pictures=pictures)


def escape_markdown(text: object) -> Markup:
    """Return a text on one line, escaped so that Markdown shows it verbatim: no markup, links, pictures or HTML."""
    if isinstance(text, Markup):  # made by a template
        return text
    one_line = " ".join(str(text).split()).replace("&", "&amp;").replace("<", "&lt;")
    return Markup(re.sub(r"([\\`*_\[\]#!|~$>]|:(?=//))", r"\\\1", one_line))


def _escape_line_start(text: str) -> Markup:
    """Escape a text for the start of a line, where Markdown could also read it as an item of a list."""
    escaped = re.sub(r"^([-+])(?=\s|$)", r"\\\1", escape_markdown(text))
    return Markup(re.sub(r"^(\d+)([.)])(?=\s|$)", r"\1\\\2", escaped))


def _fenced(text: str) -> Markup:
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return Markup(f"{fence}\n{text}\n{fence}")


def _data_uri(path: Path) -> str:
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()


def _with_kinds(blocks: Sequence[Block]) -> list[tuple[str, Block]]:
    """Return each block with the name of its class, by which a template chooses how to show it."""
    return [(type(block).__name__, block) for block in blocks]


def _environment(**options: Any) -> jinja2.Environment:
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
