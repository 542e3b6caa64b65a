"""
The sections of documents: text below one heading, or of one page, of bounded size, with its place in the document.

A passage's `start` and `end` count characters of the converted text of its document:
    .txt, .md       the decoded file, with `\\n` as line ends
    .html, .docx    Markdown; of HTML the main text, without navigation
    .pdf            the texts of the pages, with a form feed between; lines of a paragraph are joined
    rows            the field `text`
"""

import codecs
import io
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any, BinaryIO, TextIO

import yaml

from shared.document_files import DocumentError

SECTION_CHARACTERS = 2**16  # a longer text is cut at the next blank line; one twice as long at the next line
MAX_LINE = 2**20  # characters of a line of Markdown
MAX_HEADING = 1000  # characters; a longer line is text
NUM_TITLE_LINES = 400  # of a Markdown file are searched for its first heading
SAMPLE_BYTES = 2**16  # to recognise an encoding
MAX_CHARACTER_BYTES = 4  # of GB 18030; other encodings but UTF-8 have fewer
MIN_GOOD = 4  # characters of UTF-8 for each bad place; in other encodings, few bytes happen to be UTF-8

WORD = re.compile(r"\w")  # text without any is no passage
HEADING = re.compile(r" {0,3}(#{1,6})(?:[ \t]+(.*?))?(?:[ \t]+#+)?[ \t]*$")
UNDERLINE = re.compile(r" {0,3}(=+|-+)[ \t]*$")
FENCE = re.compile(r" {0,3}(`{3,}|~{3,})")
FRONT_MATTER = re.compile(r"[\w-]+[ \t]*:|[ \t]+\S|- ")
NO_PARAGRAPH = re.compile(r"\s*([-*+>|]|\d+[.)])")  # lists, quotes and tables, which an underline makes no heading


@dataclass(frozen=True)
class Section:
    """
    Consecutive text of a document.

    Args:
        text (`str`): as in the converted text, from `start` on.
        start (`int`): index of its first character.
        headings (`tuple[str, ...]`): above the text, outermost first.
        page (`int`, *optional*): of a PDF, from 1.
    """

    text: str
    start: int
    headings: tuple[str, ...] = ()
    page: int | None = None


@dataclass
class Document:
    """
    A document, or a part of a long one.

    Args:
        id (`str`): what the ids of its passages are made from.
        title (`str`): from its metadata, its first heading, or the name of the file.
        sections (iterable of [`Section`]): in order.
        metadata (`dict`): of every passage: `source`, perhaps `url`, and what a row brings.
        is_markdown (`bool`): whether the text is Markdown.
        note (`str`): what could not be read, for the report.
    """

    id: str
    title: str
    sections: Iterable[Section]
    metadata: dict[str, Any] = field(default_factory=dict)
    is_markdown: bool = False
    note: str = ""


@dataclass(frozen=True)
class Block:
    """A line or paragraph; `level` is 1 to 6 for a heading, and a long section best ends before `may_end`."""

    text: str
    level: int = 0
    title: str = ""
    may_end: bool = False


def sections_of(blocks: Iterable[Block], start: int = 0) -> Iterator[Section]:
    """Group blocks into sections: a heading begins one, and so does a long text; headings are not in the text."""
    path: list[tuple[int, str]] = []
    lines: list[str] = []
    size = 0
    for block in blocks:
        limit = SECTION_CHARACTERS if block.may_end else 2 * SECTION_CHARACTERS
        if block.level or size >= limit:
            if lines:
                yield Section("".join(lines), start, tuple(title for _, title in path))
            start, lines, size = start + size, [], 0
        if block.level:
            path = [(level, title) for level, title in path if level < block.level]
            if block.title:
                path.append((block.level, block.title))
            start += len(block.text)
        else:
            lines.append(block.text)
            size += len(block.text)
    if lines:
        yield Section("".join(lines), start, tuple(title for _, title in path))


# ---------------------------------------------------------------------- text


def open_text(path: Path) -> tuple[TextIO, str]:
    """
    Open a text file: UTF-8, UTF-16 with a byte order mark, or another encoding that `charset_normalizer` recognises.

    UTF-8 with a few bad bytes is still UTF-8.

    Returns:
        `(file, note)`: the note names an encoding that was guessed, or counts the bad places of UTF-8.

    Raises:
        [`DocumentError`]: for a file that is empty or no text.
    """
    with path.open("rb") as file:
        sample = file.read(SAMPLE_BYTES)
        if not sample:
            raise DocumentError("it is empty")
        if sample.startswith((codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)):  # they begin like UTF-16
            return path.open(encoding="utf-32"), ""
        if sample.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
            return path.open(encoding="utf-16"), ""
        if b"\0" in sample:
            raise DocumentError("it is no text: it holds NUL bytes")
        file.seek(0)
        num_bad, num_good = _count_utf8(file)
    if not num_bad:
        return path.open(encoding="utf-8-sig"), ""
    if num_bad * MIN_GOOD <= num_good:
        note = f"places that are not UTF-8, read as U+FFFD: {num_bad:,}"
        return path.open(encoding="utf-8-sig", errors="replace"), note
    encoding = _guessed_encoding(path)
    return path.open(encoding=encoding), f"read as {encoding}, as it is not UTF-8"


def _count_utf8(file: BinaryIO) -> tuple[int, int]:
    """Return how many places of a file are not UTF-8, and how many characters are, ASCII not counted."""
    make_decoder = codecs.getincrementaldecoder("utf-8")
    replacing, ignoring = make_decoder("replace"), make_decoder("ignore")
    num_bad = num_good = 0
    is_last = False
    while not is_last:
        piece = file.read(SAMPLE_BYTES)
        is_last = not piece
        good = ignoring.decode(piece, is_last)
        num_bad += len(replacing.decode(piece, is_last)) - len(good)
        if not good.isascii():
            num_good += len(good) - len(good.encode("ascii", "ignore"))
    return num_bad, num_good


def _guessed_encoding(path: Path) -> str:
    from charset_normalizer import from_bytes

    for sample in _samples(path):
        # Windows-1252 first: it is what most files of Western languages are, and short texts fit many encodings
        best = from_bytes(sample, cp_isolation=["cp1252"]).best() or from_bytes(sample).best()
        if best is not None:
            return best.encoding
    raise DocumentError("its encoding is neither UTF-8 nor any that could be recognised")


def _samples(path: Path) -> list[bytes]:
    """
    Return samples of a file to guess its encoding from, the best first.

    They begin with the first line that is not ASCII, because ASCII fits any encoding, and end with a line. A sample of
    one long line is tried with 0 to 3 bytes less, because its last character may be cut.
    """
    with path.open("rb") as file:
        line = next(line for line in iter(partial(file.readline, SAMPLE_BYTES), b"") if not line.isascii())
        sample = (line + file.read(SAMPLE_BYTES))[:SAMPLE_BYTES]
    if len(sample) < SAMPLE_BYTES:
        return [sample]
    num_whole = sample.rfind(b"\n") + 1
    if num_whole:
        return [sample[:num_whole]]
    return [sample[: len(sample) - cut] for cut in range(MAX_CHARACTER_BYTES)]


def text_sections(file: TextIO) -> Iterator[Section]:
    """Cut text into sections of at most `SECTION_CHARACTERS`: at blank lines, else at line ends, else at spaces."""
    text, start = "", 0
    while piece := file.read(SECTION_CHARACTERS - len(text)):
        text += piece
        if len(text) == SECTION_CHARACTERS:
            end = _last_boundary(text)
            yield Section(text[:end], start)
            text, start = text[end:], start + end
    if text:
        yield Section(text, start)


def _last_boundary(text: str) -> int:
    half = len(text) // 2
    for separator in ("\n\n", "\n", " "):
        end = text.rfind(separator, half)
        if end > 0:
            return end + len(separator)
    return len(text)


# ---------------------------------------------------------------------- Markdown


def markdown_document(file: TextIO, id: str, title: str) -> Document:
    """Read Markdown; the title is that of its front matter, its first heading, or else `title`."""
    lines = iter(partial(file.readline, MAX_LINE), "")
    first_lines = list(islice(lines, NUM_TITLE_LINES))
    num_front, front_title = _front_matter(first_lines)
    start = sum(map(len, first_lines[:num_front]))
    first_lines = first_lines[num_front:]
    if not front_title:
        headings = [block.title for block in markdown_blocks(first_lines) if block.level and block.title]
        front_title = headings[0] if headings else title
    sections = sections_of(markdown_blocks(chain(first_lines, lines)), start)
    return Document(id, front_title, sections, is_markdown=True)


def _front_matter(lines: list[str]) -> tuple[int, str]:
    """
    Return the number of lines of YAML front matter, and its title.

    Text between two rules is none: front matter is a mapping, or looks like one if it is no valid YAML.
    """
    if not lines or lines[0].rstrip() != "---":
        return 0, ""
    ends = [number for number, line in enumerate(lines) if number and line.rstrip() in ("---", "...")]
    if not ends:
        return 0, ""
    matter = lines[1 : ends[0]]
    try:
        values = yaml.load("".join(matter), yaml.BaseLoader)  # every value is a text
    except (yaml.YAMLError, RecursionError):  # the latter for thousands of brackets
        values = {} if all(map(FRONT_MATTER.match, matter)) else None
    if not isinstance(values, dict):
        return 0, ""
    title = values.get("title")
    return ends[0] + 1, title if isinstance(title, str) else ""


def markdown_blocks(lines: Iterable[str]) -> Iterator[Block]:
    """Yield the lines of Markdown with its headings, as in CommonMark; lines in a code fence are none."""
    fence = ""  # the characters that opened the code fence
    held = ""  # a line that the next one may make a heading, by underlining it
    after_blank = True
    for line in lines:
        if fence:
            yield Block(line)
            mark = line.strip()
            if mark.startswith(fence) and not mark.strip(fence[0]):
                fence, after_blank = "", False
            continue
        if held:
            underline = UNDERLINE.match(line)
            if underline:
                yield Block(held + line, 1 if underline[1][0] == "=" else 2, plain_title(held))
                held, after_blank = "", True
                continue
            yield Block(held)
            held, after_blank = "", False
        is_short = len(line) <= MAX_HEADING
        heading = HEADING.match(line) if is_short else None
        opening = _fence(line)
        if heading:
            yield Block(line, len(heading[1]), plain_title(heading[2] or ""))
        elif opening:
            fence = opening
            yield Block(line)
        elif is_short and after_blank and line.strip() and not NO_PARAGRAPH.match(line):
            held = line
            continue
        else:
            yield Block(line, may_end=not line.strip())
        after_blank = bool(heading) or not line.strip()
    if held:
        yield Block(held)


def _fence(line: str) -> str:
    """Return the characters with which a line opens a code fence, or an empty string."""
    opening = FENCE.match(line)
    if not opening or (opening[1][0] == "`" and "`" in line[opening.end() :]):  # "```x```" is code within a line
        return ""
    return opening[1]


def plain_title(markdown: str) -> str:
    """Return the text of a heading without links, emphasis, code marks and anchors."""
    text = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", markdown)
    text = re.sub(r"\s*\{[#.:][^}]*\}\s*$", "", text)
    text = re.sub(r"\\([!-/:-@\[-`{-~])|[*`]+|(?<!\w)_+|_+(?!\w)", r"\1", text)
    return " ".join(text.split())


def text_file_document(path: Path, id: str, is_markdown: bool) -> Document:
    """Open a text or Markdown file; it is read, and closed, as its sections are."""
    file, note = open_text(path)
    title = Path(id).stem  # not that of `path`, which may be no UTF-8
    if is_markdown:
        document = markdown_document(file, id, title)
    else:
        document = Document(id, title, text_sections(file))
    document.sections = _closing(document.sections, file)
    document.note = note
    document.metadata["source"] = id
    return document


def _closing(sections: Iterable[Section], file: TextIO) -> Iterator[Section]:
    with file:
        try:
            yield from sections
        except UnicodeError as error:
            raise DocumentError(f"it is not {file.encoding}: {error}") from None


def row_sections(text: str) -> Iterable[Section]:
    """Return the sections of a row's text."""
    if len(text) <= SECTION_CHARACTERS:
        return [Section(text, 0)]
    return text_sections(io.StringIO(text, newline=""))  # spans count the line ends of the field
