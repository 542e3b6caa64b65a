"""What the prepare recipes share: sources that are read one by one, passages of other formats, the paper's instructions."""

import csv
import gzip
import io
import sys
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from modeling_cosup.files_cosup import read_json
from modeling_cosup.passages_cosup import check_text, check_title_and_text, read_corpus

INSTRUCTIONS = Path(__file__).with_name("instructions.json")
TSV_ENDINGS = (".tsv", ".tsv.gz")
T = TypeVar("T")


def read_tsv(path: str | Path, columns: list[str]) -> Iterator[tuple[str, dict[str, str]]]:
    """
    Rows of a file of tab-separated values with a header, `.gz` or plain; values may be quoted as in CSV.

    Args:
        path (`str` or `Path`), columns (`list[str]`): the header that is expected.

    Yields:
        `(str, dict)`: `"file, line n"` and the row.

    Raises:
        `FileNotFoundError`, `ValueError`: names file and line, what was found and what was expected.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not a file.")
    csv.field_size_limit(sys.maxsize)
    with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as binary:
        rows = csv.reader(io.TextIOWrapper(binary, encoding="utf-8", newline=""), delimiter="\t")
        try:
            for number, row in enumerate(rows):
                where = f"{path}, line {rows.line_num}"
                if number == 0 and row != columns:
                    raise ValueError(f"{where}: the header is {row!r}, expected {columns!r}.")
                if row and len(row) != len(columns):
                    raise ValueError(
                        f"{where}: found {len(row)} columns, expected {len(columns)}: {', '.join(columns)}."
                    )
                if number and row:
                    yield where, dict(zip(columns, row, strict=True))
        except (EOFError, gzip.BadGzipFile, zlib.error, UnicodeDecodeError, csv.Error) as error:
            raise ValueError(f"{path} is damaged behind line {rows.line_num}: {error}") from None


def read_passages(source: str | Path | Iterable[tuple[str, dict[str, Any]]]) -> Iterator[tuple[str, dict[str, Any]]]:
    """
    Passages of a corpus, one at a time: our JSON Lines or Parquet, BEIR's `corpus.jsonl` (`_id`), or DPR's `psgs_w100.tsv` (`id`, `text`, `title`).

    Args:
        source (`str`, `Path` or iterable of `(str, dict)`): a file, or its lines with their places.

    Yields:
        `(str, dict)`: the place and `{"id", "title", "text"}`; with `wikipedia_id`, `start_paragraph_id` and `end_paragraph_id` where the line has them.

    Raises:
        `ValueError`: names file and line, the field, what was found and what was expected.
    """
    if isinstance(source, str | Path):
        source = (
            read_tsv(source, ["id", "text", "title"])
            if str(source).endswith(TSV_ENDINGS)
            else read_corpus(str(source))
        )
    for where, value in source:
        id = value.get("id", value.get("_id"))
        passage = {
            "id": check_text(str(id) if isinstance(id, int) else id, "id", where),
            **check_title_and_text(value, where),
        }
        yield (
            where,
            passage
            | {
                name: value[name]
                for name in ("wikipedia_id", "start_paragraph_id", "end_paragraph_id")
                if name in value
            },
        )


def instruction_of(dataset: str, given: str | None) -> str:
    """
    The instruction of a dataset: what was given as `--instruction`, else the paper's.

    Raises:
        `ValueError`: when there is neither.
    """
    if given is not None:
        return given
    known = read_json(INSTRUCTIONS)["instructions"]
    if dataset not in known:
        raise ValueError(
            f"{INSTRUCTIONS.name} has no instruction for {dataset!r}, only for {', '.join(known)}: give one as --instruction; it may be empty."
        )
    return known[dataset]


def distinct(values: Iterable[T]) -> list[T]:
    """Values in order, each once."""
    return list(dict.fromkeys(values))
