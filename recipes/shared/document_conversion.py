"""Conversion of HTML (trafilatura), PDF (pypdf) and Word files to sections."""

import logging
import re
import statistics
from collections.abc import Collection
from importlib import import_module
from io import StringIO
from pathlib import Path
from typing import Any

from shared.document_files import NO_CHARACTER, DocumentError
from shared.document_sections import Document, Section, markdown_document
from shared.document_word import docx_document

MAX_HTML_BYTES = 32 * 2**20
MAX_PAGES = 20_000
MAX_PAGE_CHARACTERS = 1_000_000
EXTRA = 'pip install "cosup[documents]"'
LIBRARIES = {  # kind -> how its library is imported
    "html": lambda: import_module("trafilatura"),
    "docx": lambda: import_module("docx"),
    "pdf": lambda: import_module("pypdf"),
}
NO_TITLE = re.compile(r"(untitled.*|microsoft word - .*|.*\.(docx?|pdf|tex|dvi|indd))?", re.IGNORECASE | re.DOTALL)


def check_libraries(kinds: Collection[str]) -> None:
    """Import the libraries that these kinds of documents need; `ImportError` says what to install."""
    try:
        import_module("semantic_text_splitter")
        for kind, load in LIBRARIES.items():
            if kind in kinds:
                load()
    except ImportError as error:
        raise ImportError(f"These documents need further packages: {EXTRA} ({error})") from error


def convert(kind: str, path: Path, id: str) -> Document:
    """
    Convert a file that is read as a whole.

    Args:
        kind (`str`): `"html"`, `"docx"` or `"pdf"`.
        path (`Path`): the file.
        id (`str`): of the document.

    Raises:
        [`DocumentError`]: the reason why it cannot be read.
    """
    if path.stat().st_size == 0:
        raise DocumentError("it is empty")
    converters = {"html": html_document, "docx": docx_document, "pdf": pdf_document}
    try:
        document = converters[kind](path, id)
    except (DocumentError, OSError):
        raise
    except Exception as error:  # a damaged file may raise anything
        raise DocumentError(f"it is damaged: {type(error).__name__}: {error}") from error
    document.metadata["source"] = id
    return document


# ---------------------------------------------------------------------- HTML


def html_document(path: Path, id: str) -> Document:
    """Extract the main text of a web page as Markdown; the URL is its canonical link."""
    from trafilatura import extract, extract_metadata, load_html
    from trafilatura.settings import use_config

    logging.getLogger("trafilatura").setLevel(logging.CRITICAL)  # the reasons are in the report
    size = path.stat().st_size
    if size > MAX_HTML_BYTES:
        raise DocumentError(f"it has {size:,} bytes, expected at most {MAX_HTML_BYTES:,}")
    data = path.read_bytes()
    tree = load_html(data)
    if tree is None:
        raise DocumentError("it is no HTML")
    config = use_config()
    # by default, trafilatura distrusts a main text of less than 250 characters and takes the navigation too
    config.set("DEFAULT", "MIN_EXTRACTED_SIZE", "1")
    text = extract(data, output_format="markdown", include_comments=False, config=config)
    if not text:
        raise DocumentError("it holds no main text")
    facts = extract_metadata(tree, extensive=False)  # dates take half of the time otherwise, and are not used
    file = StringIO(NO_CHARACTER.sub("\ufffd", text), newline=None)
    document = markdown_document(file, id, Path(id).stem)
    if facts.title:
        document.title = facts.title
    if facts.url and facts.url.startswith(("http://", "https://")):
        document.metadata["url"] = facts.url
    return document


# ---------------------------------------------------------------------- PDF


def pdf_document(path: Path, id: str) -> Document:
    """Read the text of a PDF, page by page; headings are those of its outline. A section never crosses pages."""
    from pypdf import PdfReader
    from pypdf.errors import DependencyError, PyPdfError

    logging.getLogger("pypdf").setLevel(logging.CRITICAL)  # the reasons are in the report
    try:
        reader = PdfReader(path)
        if reader.is_encrypted and not reader.decrypt(""):
            raise DocumentError("it is encrypted: it needs a password")
        num_pages = len(reader.pages)
    except DependencyError:
        raise DocumentError(f"it is encrypted with AES, which needs cryptography: {EXTRA}") from None
    except PyPdfError as error:
        raise DocumentError(f"it is no PDF that can be read: {error}") from None
    if num_pages > MAX_PAGES:
        raise DocumentError(f"it has {num_pages:,} pages, expected at most {MAX_PAGES:,}")
    outline = _outline(reader)
    sections, unread = [], []
    start, headings = 0, []
    for number, page in enumerate(reader.pages, 1):
        entries = [entry for entry in outline if entry[0] == number]
        text = _page_text(page, [title for *_, title in entries])
        if not text.strip():
            unread.append(str(number))
        sections += _page_sections(text, start, number, entries, headings)
        start += len(text) + 1  # the form feed between two pages
    if len(unread) == num_pages:
        raise DocumentError(f"no page of {num_pages} holds text; scanned pages need OCR")
    title = " ".join(str((reader.metadata and reader.metadata.title) or "").split())
    if NO_TITLE.fullmatch(title):
        title = outline[0][2] if outline else Path(id).stem
    shown = ", ".join(unread[:20]) + (", …" if len(unread) > 20 else "")
    note = f"no text on {len(unread)} of {num_pages} pages: {shown}" if unread else ""
    return Document(id, NO_CHARACTER.sub("\ufffd", title), sections, note=note)


def _page_text(page: Any, titles: list[str]) -> str:
    """Return the text of a page, of which the lines of a paragraph are joined; empty if it cannot be read."""
    try:
        text = page.extract_text()
    except Exception:  # a damaged page may raise anything
        return ""
    if len(text) > MAX_PAGE_CHARACTERS:
        raise DocumentError(f"a page holds {len(text):,} characters, expected at most {MAX_PAGE_CHARACTERS:,}")
    return join_lines(NO_CHARACTER.sub("\ufffd", text).replace("\f", "\n"), titles)


def join_lines(text: str, titles: Collection[str] = ()) -> str:
    """
    Join the lines of each paragraph of a page.

    A line goes on in the next one if it is nearly as long as the page is wide and does not end a sentence there, or if
    the next one begins with a small letter. A hyphen between two small letters is taken out. A line that is one of the
    titles, of bookmarks, stays alone.
    """
    lines = [line.strip() for line in text.splitlines()]
    alone: set[str] = set()
    if titles:
        alone = set(filter(_heading(titles).fullmatch, lines))
    widths = [len(line) for line in lines if line]
    if not widths:
        return ""
    full = 0.75 * statistics.quantiles([*widths, *widths], n=10)[-1]
    joined = lines[0]
    for line, after in zip(lines, lines[1:], strict=False):
        goes_on = line and after and (after[0].islower() or len(line) >= full and line[-1] not in ".!?:;")
        goes_on = goes_on and not alone.intersection((line, after))
        if goes_on and re.search(r"[a-zà-ÿ][-\u00ad]$", line) and after[0].islower():
            joined = joined[:-1] + after
        elif goes_on:
            joined += f" {after}"
        else:
            joined += f"\n{after}"
    return joined


def _heading(titles: Collection[str]) -> re.Pattern[str]:
    """Return what matches a whole line that shows one of these titles, perhaps with a number before it."""
    words = "|".join(r"\s+".join(map(re.escape, title.split())) for title in titles)
    return re.compile(rf"^(?:[a-z]?[\d.]+\s+)?(?:{words})$", re.IGNORECASE | re.MULTILINE)


def _outline(reader: Any) -> list[tuple[int, int, str]]:
    """Return `(page, level, title)` of the bookmarks of a PDF, in order; none if they are damaged."""
    entries: list[tuple[int, int, str]] = []

    def visit(items: list[Any], level: int) -> None:
        for item in items:
            if isinstance(item, list):
                visit(item, level + 1)
                continue
            page = reader.get_destination_page_number(item)
            title = " ".join(NO_CHARACTER.sub("\ufffd", str(item.title or "")).split())
            if page is not None and page >= 0 and title:
                entries.append((page + 1, level, title))

    try:
        visit(reader.outline, 1)
    except Exception:  # a damaged outline may raise anything; the pages may be whole
        return []
    return entries


def _page_sections(
    text: str, start: int, page: int, entries: list[tuple[int, int, str]], headings: list[tuple[int, str]]
) -> list[Section]:
    """
    Cut a page where its headings stand in the text, each on lines of its own, perhaps with a number before it.

    A heading that is not found begins with the next one that is, or on the next page.

    Args:
        entries (list of `(page, level, title)`): of the outline, on this page.
        headings (list of `(level, title)`): above the page; changed to those at its end.
    """
    sections: list[Section] = []
    position = 0
    begun: list[tuple[int, str]] = []  # headings that the text does not show, since the last one that it does

    def add(end: int) -> None:
        if text[position:end].strip():
            titles = tuple(title for _, title in headings)
            sections.append(Section(text[position:end], start + position, titles, page))

    def begin() -> None:
        for level, title in begun:
            headings[:] = [heading for heading in headings if heading[0] < level] + [(level, title)]
        begun.clear()

    for _, level, title in entries:
        match = _heading([title]).search(text, position)
        begun.append((level, title))
        if match:
            add(match.start())
            position = match.end()
            begin()
    add(len(text))
    begin()
    return sections
