"""A report as a list of blocks, and how it reads in Markdown and as one HTML page. Every text may be anything: it is escaped here, and nowhere else."""

import base64
import html
import re
from dataclasses import dataclass
from pathlib import Path

CSS = """
:root { color-scheme: light dark; --line: #d8dbe0; --soft: #f4f5f7; --text: #1c2025; --dim: #66707b; --accent: #1f5fa8; --page: #fff; }
@media (prefers-color-scheme: dark) { :root { --line: #363c44; --soft: #20252b; --text: #e4e7eb; --dim: #99a3ae; --accent: #79b0f0; --page: #15181c; } }
body { margin: 0 auto; max-width: 1120px; padding: 2rem 1.5rem 4rem; background: var(--page); color: var(--text); font: 15px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.7rem; margin: 0 0 .3rem; } h2 { font-size: 1.25rem; margin: 2.4rem 0 .6rem; } h3 { font-size: 1rem; margin: 1.4rem 0 .4rem; }
p, li { max-width: 82ch; } p.note { color: var(--dim); font-size: .9rem; margin: .4rem 0; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; margin: .5rem 0; font-variant-numeric: tabular-nums; font-size: .9rem; }
th, td { padding: .28rem .7rem; border-bottom: 1px solid var(--line); text-align: right; vertical-align: baseline; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; } td.text { text-align: left; white-space: normal; min-width: 16rem; }
thead th { border-bottom: 2px solid var(--line); color: var(--dim); font-weight: 600; } tr.group td { font-weight: 600; background: var(--soft); }
tr.strong td { font-weight: 600; } td small { color: var(--dim); font-size: .8em; display: block; }
figure { margin: 1rem 0; } figure img { max-width: 100%; height: auto; background: #fff; border-radius: 6px; }
figcaption { color: var(--dim); font-size: .85rem; }
details { margin: .5rem 0; } summary { cursor: pointer; color: var(--accent); }
.example { border: 1px solid var(--line); border-radius: 8px; padding: .7rem 1rem; margin: .7rem 0; } .example p { margin: .25rem 0; overflow-wrap: anywhere; }
.example .passage { color: var(--dim); font-size: .88rem; border-left: 3px solid var(--line); padding-left: .7rem; }
.badge { font-size: .78rem; padding: .05rem .5rem; border-radius: 9px; background: var(--soft); color: var(--dim); margin-left: .5rem; }
pre { background: var(--soft); padding: .7rem 1rem; overflow-x: auto; border-radius: 6px; font-size: .85rem; white-space: pre-wrap; overflow-wrap: anywhere; }
"""


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

    items: list


@dataclass
class Code:
    """Text as it is."""

    text: str


@dataclass
class Table:
    """
    A table.

    Args:
        header (`list[str]`), rows (`list[list]`): cells are texts, or `(text, small text)`. A row of one cell is the head of a group.
        strong (`set[int]`): numbers of the rows that stand out.
        folded (`str`, *optional*): the page shows it only when asked, under this name.
        text_columns (`set[int]`): numbers of the columns that hold sentences.
    """

    header: list
    rows: list
    strong: frozenset = frozenset()
    folded: str | None = None
    text_columns: frozenset = frozenset()


@dataclass
class Plot:
    """A PNG file, `path` relative to the report's folder, and what it shows."""

    path: str
    caption: str


@dataclass
class Example:
    """A question with its answer: `(number, title, text)` of its passages, and marks such as "right"."""

    question: str
    answer: str
    expected: str
    passages: list
    marks: list


def write_document(blocks, folder, name, title):
    """Write `name.md` and `name.html`, each whole or not at all; plots are embedded in the page."""
    folder = Path(folder)
    for suffix, text in ((".md", to_markdown(blocks)), (".html", to_html(blocks, folder, title))):
        unfinished = folder / f".{name}{suffix}.unfinished"
        unfinished.write_text(text, encoding="utf-8")
        unfinished.replace(folder / f"{name}{suffix}")


# ---------------------------------------------------------------------- Markdown


def to_markdown(blocks):
    """The blocks as GitHub shows them."""
    return "\n\n".join(_MARKDOWN[type(block)](block) for block in blocks) + "\n"


def escape_markdown(text):
    """A text on one line that Markdown shows as it is: no markup, links, pictures or HTML."""
    text = re.sub(r"([\\`*_\[\]#!|~$>]|:(?=//))", r"\\\1", " ".join(str(text).split()).replace("&", "&amp;").replace("<", "&lt;"))
    return re.sub(r"^([-+]|\d+\.)(?=\s|$)", r"\\\1", text)


def _markdown_cell(cell):
    text, small = cell if isinstance(cell, tuple) else (cell, "")
    return " ".join(filter(None, [_plain(text), _plain(small)]))


def _plain(text):
    """Escaped as far as needed: most cells are numbers and names."""
    return str(text) if re.fullmatch(r"[\w .,%+\-–—⁻±/]*", str(text)) and "_" not in str(text) else escape_markdown(text)


def _markdown_table(block):
    width = len(block.header)
    lines = ["| " + " | ".join(map(_markdown_cell, block.header)) + " |", "|" + "---|" * width]
    for number, row in enumerate(block.rows):
        cells = [*map(_markdown_cell, row), *[""] * (width - len(row))]
        if number in block.strong or len(row) == 1:
            cells = [f"**{cell}**" if cell else "" for cell in cells]
        lines.append("| " + " | ".join(cells) + " |")
    return ("### " + escape_markdown(block.folded) + "\n\n" if block.folded else "") + "\n".join(lines)


def _markdown_code(block):
    fence = "`" * max([2, *map(len, re.findall("`+", block.text))]) + "`"
    return f"{fence}\n{block.text}\n{fence}"


def _markdown_example(block):
    lines = [f"**Q** {escape_markdown(block.question)}", f"**A** {escape_markdown(block.answer)}"]
    lines.append(f"*{escape_markdown(', '.join(block.marks))}; expected: {escape_markdown(block.expected)}*")
    lines += [f"\\[{number}\\] {escape_markdown(f'{title}: {text}' if title else text)}" for number, title, text in block.passages]
    return "> " + "  \n> ".join(lines)


_MARKDOWN = {
    Heading: lambda block: "#" * block.level + " " + escape_markdown(block.text),
    Text: lambda block: escape_markdown(block.text),
    Bullets: lambda block: "\n".join(f"- {escape_markdown(item)}" for item in block.items),
    Code: _markdown_code,
    Table: _markdown_table,
    Plot: lambda block: f"![{escape_markdown(block.caption)}]({block.path})",
    Example: _markdown_example,
}


# ---------------------------------------------------------------------- HTML


def to_html(blocks, folder, title):
    """The blocks as one page that loads nothing from elsewhere."""
    body = "\n".join(_html_plot(block, folder) if isinstance(block, Plot) else _HTML[type(block)](block) for block in blocks)
    policy = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
    head = f'<meta charset="utf-8">\n<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
    head += f'<meta name="viewport" content="width=device-width, initial-scale=1">\n<title>{html.escape(title)}</title>\n<style>{CSS}</style>'
    return f'<!doctype html>\n<html lang="en">\n<head>\n{head}\n</head>\n<body>\n{body}\n</body>\n</html>\n'


def _html_cell(cell, tag="td", kind=""):
    text, small = cell if isinstance(cell, tuple) else (cell, "")
    small = f"<small>{html.escape(small)}</small>" if small else ""
    return f"<{tag}{kind}>{html.escape(str(text))}{small}</{tag}>"


def _html_table(block):
    width, rows = len(block.header), []
    for number, row in enumerate(block.rows):
        if len(row) == 1:
            rows.append(f'<tr class="group"><td colspan="{width}">{html.escape(str(row[0]))}</td></tr>')
            continue
        cells = "".join(_html_cell(cell, kind=' class="text"' if column in block.text_columns else "") for column, cell in enumerate(row))
        kind = ' class="strong"' if number in block.strong else ""
        rows.append(f"<tr{kind}>{cells}</tr>")
    head = "".join(_html_cell(cell, "th") for cell in block.header)
    table = f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>\n{chr(10).join(rows)}\n</tbody></table></div>'
    return f"<details><summary>{html.escape(block.folded)}</summary>{table}</details>" if block.folded else table


def _html_plot(block, folder):
    data = base64.b64encode((folder / block.path).read_bytes()).decode()
    caption = html.escape(block.caption)
    return f'<figure><img alt="{caption}" src="data:image/png;base64,{data}"><figcaption>{caption}</figcaption></figure>'


def _html_example(block):
    marks = "".join(f'<span class="badge">{html.escape(mark)}</span>' for mark in block.marks)
    passages = "".join(_html_passage(*passage) for passage in block.passages)
    answer = html.escape(block.answer) or "<i>(empty)</i>"
    question = f"<p><b>Q</b> {html.escape(block.question)}{marks}</p><p><b>A</b> {answer}</p>"
    return f'<div class="example">{question}<p class="note">expected: {html.escape(block.expected)}</p>{passages}</div>'


def _html_passage(number, title, text):
    title = f"<b>{html.escape(title)}</b>: " if title else ""
    return f'<p class="passage">[{number}] {title}{html.escape(text)}</p>'


_HTML = {
    Heading: lambda block: f"<h{block.level}>{html.escape(block.text)}</h{block.level}>",
    Text: lambda block: f'<p class="note">{html.escape(block.text)}</p>' if block.note else f"<p>{html.escape(block.text)}</p>",
    Bullets: lambda block: "<ul>" + "".join(f"<li>{html.escape(item)}</li>" for item in block.items) + "</ul>",
    Code: lambda block: f"<pre>{html.escape(block.text)}</pre>",
    Table: _html_table,
    Example: _html_example,
}
