"""
Pages of documentation as GitHub reads them: their blocks of code, headings and links.

markdown-it-py, which follows CommonMark, finds them; the few rules that are GitHub's own are here.
"""

import html
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from markdown_it import MarkdownIt
from markdown_it.token import Token

ROOT = Path(__file__).parents[2]
FRONT_MATTER = re.compile(r"\A---\n.*?^---\n", re.DOTALL | re.MULTILINE)
NOT_RUN = re.compile(r"\s*<!--\s*not run\b:?(?P<reason>.*?)-->\s*", re.DOTALL)
HTML_LINK = re.compile(r"""<(?:a|img)\b[^>]*?\s(?:href|src)\s*=\s*["']([^"']*)["']""", re.IGNORECASE)
HTML_ANCHOR = re.compile(r"""<\w+\b[^>]*?\s(?:id|name)\s*=\s*["']([^"']+)["']""", re.IGNORECASE)


@dataclass(frozen=True)
class Block:
    """
    A fenced block of code.

    Args:
        page (`Path`): the file.
        line (`int`): number of the line of its first line of code, from 1.
        language (`str`): the first word after the fence; may be empty.
        code (`str`): the code.
        not_run (`str`, *optional*): the reason in the comment `<!-- not run: reason -->` before the fence; `None`
            without a comment, and empty if the comment gives no reason.
    """

    page: Path
    line: int
    language: str
    code: str
    not_run: str | None

    @property
    def place(self) -> str:
        """Page and line, for messages."""
        return f"{name_of(self.page)}:{self.line}"


@dataclass(frozen=True)
class Link:
    """A link or image: its target as it is written, and the line of the paragraph that it stands in."""

    target: str
    line: int


def name_of(path: Path) -> str:
    """Return the path of a page from the root of the repository."""
    return path.relative_to(ROOT).as_posix() if path.is_relative_to(ROOT) else str(path)


def pages(*patterns: str) -> list[Path]:
    """Return the files that patterns such as `docs/*.md` name, each once, in order."""
    found: dict[Path, None] = {}
    for pattern in patterns:
        found.update(dict.fromkeys(sorted(ROOT.glob(pattern))))
    return list(found)


def tokens_of(text: str) -> list[Token]:
    """Return the tokens of a page, with tables; metadata at its head is left out, and lines are those of the file."""
    front = FRONT_MATTER.match(text)
    if front:  # GitHub shows it as a table
        text = "\n" * front[0].count("\n") + text[front.end() :]
    return MarkdownIt("commonmark").enable(["table", "strikethrough"]).parse(text)


def blocks_of(page: Path, text: str | None = None) -> list[Block]:
    """Return the fenced blocks of a page, those in lists and quotes too."""
    blocks = []
    comment = None
    for token in tokens_of(page.read_text(encoding="utf-8") if text is None else text):
        if token.type == "fence":
            assert token.map is not None
            words = token.info.split()
            reason = None if comment is None else comment["reason"].strip()
            blocks.append(Block(page, token.map[0] + 2, words[0] if words else "", token.content, reason))
        comment = NOT_RUN.fullmatch(token.content) if token.type == "html_block" else None
    return blocks


def links_of(text: str) -> list[Link]:
    """Return the links and images of a page, in Markdown and HTML."""
    links = []
    for token in tokens_of(text):
        line = token.map[0] + 1 if token.map else 0
        if token.type == "html_block":
            links += [Link(html.unescape(target), line) for target in HTML_LINK.findall(token.content)]
        for child in token.children or []:
            links += [Link(target, line) for target in _targets(child)]
    return links


def _targets(token: Token) -> Iterator[str]:
    """Yield the targets of a token of a paragraph: a link, an image, or HTML."""
    if token.type == "link_open":
        yield str(token.attrs["href"])
    elif token.type == "image":
        yield str(token.attrs["src"])
    elif token.type == "html_inline":
        yield from map(html.unescape, HTML_LINK.findall(token.content))


def anchors_of(text: str) -> set[str]:
    """Return what `#...` may name in a page: slugs of headings, and ids and names in HTML."""
    tokens = tokens_of(text)
    titles = []
    anchors = set()
    for i, token in enumerate(tokens):
        if token.type == "heading_open":
            titles.append("".join(_shown(tokens[i + 1].children or [])))
        for part in [token, *(token.children or [])]:
            if part.type in ("html_block", "html_inline"):
                anchors.update(HTML_ANCHOR.findall(part.content))
    return anchors | set(slugs(titles))


@cache
def anchors_in(page: Path) -> set[str]:
    """Return the anchors of a file, see [`anchors_of`]."""
    return anchors_of(page.read_text(encoding="utf-8"))


def _shown(tokens: Iterable[Token]) -> Iterator[str]:
    """Yield the text of a heading without its markup; GitHub leaves out images."""
    for token in tokens:
        if token.type in ("text", "code_inline"):
            yield token.content
        elif token.type in ("softbreak", "hardbreak"):
            yield " "


def slugs(titles: Iterable[str]) -> list[str]:
    """Return the anchors that GitHub gives to the headings of a page, in order: a repeated one gets `-1`, `-2`, …"""
    seen: Counter[str] = Counter()
    anchors = []
    for title in titles:
        slug = "".join(filter(_stays, title.strip().lower())).replace(" ", "-")
        anchors.append(f"{slug}-{seen[slug]}" if seen[slug] else slug)
        seen[slug] += 1
    return anchors


def _stays(character: str) -> bool:
    r"""Return whether a character of a heading is in its anchor: Ruby's `\p{Word}`, a hyphen or a space."""
    category = unicodedata.category(character)
    return character in "- " or category[0] in "LM" or category in ("Nd", "Nl", "Pc")
