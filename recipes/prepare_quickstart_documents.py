"""
Write a folder of documents about the quickstart's world, to try the way from documents to a served answer.

    python recipes/prepare_quickstart_documents.py --corpus_file cosup-quickstart/world/corpus.jsonl \
        --output_dir my_documents

The first 150 passages of the corpus, which no training question asks about, become 20 Markdown files of three passages
and 10 PDF files of three pages with three passages each. Their headings are the titles of the passages. Needs fpdf2,
which the extra `test` installs.
"""

from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from shared.cli import clear_errors, parse

from modeling_cosup.lines_cosup import lines_with_places

NUM_MARKDOWN_FILES = 20
NUM_PDF_FILES = 10
PAGES = 3  # of a PDF
TOGETHER = 3  # passages of a Markdown file, or of a page
NUM_PASSAGES = TOGETHER * (NUM_MARKDOWN_FILES + NUM_PDF_FILES * PAGES)


@dataclass
class SampleArguments:
    """The passages to read and the folder to write."""

    corpus_file: str = field(metadata={"help": "corpus of the quickstart"})
    output_dir: str = field(metadata={"help": "folder for the documents"})


def main() -> None:
    """Read the options and write the documents."""
    (args,) = parse([SampleArguments], __doc__)
    with clear_errors():
        write_documents(args)
    print(f"{NUM_MARKDOWN_FILES} Markdown files and {NUM_PDF_FILES} PDF files in {args.output_dir}")


def write_documents(args: SampleArguments) -> None:
    """
    Write the documents.

    Raises:
        `ImportError`: without fpdf2.
        `ValueError`: for a corpus with too few passages.
    """
    try:
        from fpdf import FPDF
    except ImportError as error:
        raise ImportError("PDF files are written by fpdf2: pip install fpdf2") from error
    passages = [passage for _, passage in islice(lines_with_places(args.corpus_file), NUM_PASSAGES)]
    if len(passages) < NUM_PASSAGES:
        raise ValueError(f"{args.corpus_file} has {len(passages)} passages, expected {NUM_PASSAGES} or more.")
    groups = [passages[start : start + TOGETHER] for start in range(0, NUM_PASSAGES, TOGETHER)]
    folder = Path(args.output_dir)
    (folder / "notes").mkdir(parents=True, exist_ok=True)
    for number, group in enumerate(groups[:NUM_MARKDOWN_FILES], 1):
        write_markdown(folder / "notes" / f"notes-{number:02}.md", f"Notes {number}", group)
    pages = groups[NUM_MARKDOWN_FILES:]
    for number in range(1, NUM_PDF_FILES + 1):
        pdf = FPDF()
        pdf.set_title(f"Register {number}")
        pdf.set_font("helvetica", size=12)
        for group in pages[(number - 1) * PAGES : number * PAGES]:
            add_page(pdf, group)
        pdf.output(str(folder / f"register-{number:02}.pdf"))


def write_markdown(path: Path, title: str, passages: list[dict[str, Any]]) -> None:
    """Write passages as sections of a Markdown file."""
    sections = [f"## {passage['title']}\n\n{passage['text']}\n" for passage in passages]
    path.write_text("\n".join([f"# {title}\n", *sections]), encoding="utf-8")


def add_page(pdf: Any, passages: list[dict[str, Any]]) -> None:
    """Add a page of passages to a PDF, with a bookmark for each."""
    pdf.add_page()
    for passage in passages:
        pdf.start_section(passage["title"])
        for text in (passage["title"], passage["text"]):
            pdf.multi_cell(0, 8, text, new_x="LMARGIN", new_y="NEXT")


if __name__ == "__main__":
    main()
