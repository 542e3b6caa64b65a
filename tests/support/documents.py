"""Documents that tests write."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fpdf import FPDF


def write_pdf(path: Path, pages: Sequence[Sequence[Any]], title: str | None = None, **encryption: str) -> None:
    """
    Write a PDF.

    Each page is a list of texts. A tuple is a bookmark and the lines below it, `(bookmark, *lines)`; a bookmark alone
    is its own line. `> ` before a bookmark puts it below the last one.
    """
    pdf = FPDF()
    pdf.set_font("helvetica", size=12)
    if title:
        pdf.set_title(title)
    for page in pages:
        pdf.add_page()
        for item in page:
            lines = [item]
            if isinstance(item, tuple):
                pdf.start_section(item[0].removeprefix("> "), level=int(item[0].startswith("> ")))
                lines = list(item[1:] or item)
            for line in lines:
                pdf.multi_cell(0, 8, line, new_x="LMARGIN", new_y="NEXT")
    if encryption:
        pdf.set_encryption(**encryption)
    pdf.output(str(path))
