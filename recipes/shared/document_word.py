"""Conversion of Word files (python-docx) to sections."""

import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from shared.document_files import NO_CHARACTER, DocumentError
from shared.document_sections import Block, Document, sections_of

MAX_DOCX_BYTES = 512 * 2**20  # unpacked, images included
MAX_DOCX_TEXT_BYTES = 64 * 2**20  # of its XML
W = "{http://schemas.openxmlformats.org/wordprocessingml/2006/main}"
# elements around text or blocks: runs, links, insertions, content controls, text that runs the other way, ruby
WRAPPERS = "r hyperlink fldSimple ins moveTo sdt sdtContent smartTag customXml dir bdo ruby rubyBase".split()
MARKS = {"tab": "\t", "ptab": "\t", "cr": "\n", "noBreakHyphen": "-"}


def docx_document(path: Path, id: str) -> Document:
    """
    Read the paragraphs, lists and tables of a Word file; headings are its heading styles.

    Inserted text counts, deleted text does not. Tables of contents, text boxes, notes, headers and footers are left
    out.
    """
    import docx

    if not zipfile.is_zipfile(path):
        raise DocumentError("it is no .docx file: it is encrypted, damaged, or of an old format")
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
    size = sum(entry.file_size for entry in entries)
    text_size = sum(entry.file_size for entry in entries if entry.filename.lower().endswith((".xml", ".rels")))
    if size > MAX_DOCX_BYTES or text_size > MAX_DOCX_TEXT_BYTES:
        raise DocumentError(
            f"it unpacks to {size:,} bytes, {text_size:,} of them XML; expected at most {MAX_DOCX_BYTES:,} and"
            f" {MAX_DOCX_TEXT_BYTES:,}"
        )
    file = docx.Document(str(path))
    blocks = list(_docx_blocks(file))
    titles = [block.title for block in blocks if block.level and block.title]
    title = (file.core_properties.title or "").strip() or (titles[0] if titles else Path(id).stem)
    return Document(id, title, sections_of(blocks), is_markdown=True)


def _docx_blocks(file: Any) -> Iterator[Block]:
    from docx.text.paragraph import Paragraph

    for element in _docx_children(file.element.body):
        if element.tag == f"{W}tbl":
            yield from _table_blocks(element)
        elif element.tag == f"{W}p":
            style = Paragraph(element, file).style
            yield _paragraph_block(_docx_text(element), (style is not None and style.name) or "")


def _paragraph_block(text: str, style: str) -> Block:
    heading = re.fullmatch(r"Heading ([1-9])|Title", style)
    if heading and text.strip():
        level = min(6, int(heading[1] or 1))
        return Block(f"{'#' * level} {text}\n\n", level, " ".join(text.split()))
    if style.startswith("List"):
        return Block(f"- {text}\n", may_end=True)
    return Block(f"{text}\n\n", may_end=True)


def _table_blocks(table: Any) -> Iterator[Block]:
    """Yield the rows of a table, of which each cell is written once, in the first of the columns that it spans."""
    yield Block("\n")
    is_first = True
    for row in _docx_children(table):
        if row.tag != f"{W}tr":
            continue
        cells: list[str] = []
        for cell in _docx_children(row):
            if cell.tag == f"{W}tc":
                cells += [" ".join(_docx_text(cell).split())] + [""] * (cell.grid_span - 1)
        yield Block(f"| {' | '.join(cells)} |\n")
        if is_first:
            yield Block(f"|{'---|' * len(cells)}\n")
            is_first = False
    yield Block("\n", may_end=True)


def _docx_text(element: Any) -> str:
    """Return the text of a paragraph or a cell, with the tables in it."""
    texts = []
    for child in _docx_children(element):
        name = str(child.tag).removeprefix(W)
        if name == "t":
            texts.append(child.text or "")
        elif name == "br" and child.get(f"{W}type", "textWrapping") == "textWrapping":  # not of a page or column
            texts.append("\n")
        elif name in MARKS:
            texts.append(MARKS[name])
        elif name in ("p", "tbl", "tr", "tc"):
            texts.append(f"{_docx_text(child)}\n")
    return NO_CHARACTER.sub("\ufffd", "".join(texts))


def _docx_children(element: Any) -> Iterator[Any]:
    """Yield the elements in a Word element, and in place of a wrapper what it holds."""
    for child in element:
        name = str(child.tag).removeprefix(W)
        if name == "sdt" and _holds_no_text(child):
            continue
        if name in WRAPPERS:
            yield from _docx_children(child)
        else:
            yield child


def _holds_no_text(control: Any) -> bool:
    """Return whether a content control is a table of contents, or shows the hint of one that was not filled in."""
    gallery = control.find(f"{W}sdtPr/{W}docPartObj/{W}docPartGallery")
    if gallery is not None and gallery.get(f"{W}val") == "Table of Contents":
        return True
    return control.find(f"{W}sdtPr/{W}showingPlcHdr") is not None
