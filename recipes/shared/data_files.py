"""Input of the recipes that prepare data: tab-separated values, passages in other formats, and instructions."""

import collections
import contextlib
import csv
import gzip
import io
import itertools
import sys
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from modeling_cosup.corpus_cosup import OPTIONAL_COLUMNS, read_files
from modeling_cosup.files_cosup import byte_lines, read_json
from modeling_cosup.metadata_cosup import check_metadata
from modeling_cosup.passages_cosup import check_id, check_title_and_text
from trainer.data import read_rows

INSTRUCTIONS = Path(__file__).with_name("instructions.json")
TSV_ENDINGS = (".tsv", ".tsv.gz")
WIKIPEDIA_FIELDS = ("wikipedia_id", "start_paragraph_id", "end_paragraph_id")
T = TypeVar("T")


def read_tsv(path: str | Path, columns: list[str]) -> Iterator[tuple[str, dict[str, str]]]:
    """
    Read the rows of a file of tab-separated values with a header, `.gz` or plain; values may be quoted as in CSV.

    Args:
        path (`str` or `Path`): the file.
        columns (`list[str]`): the expected header.

    Yields:
        `(str, dict)`: `"file, line n"` and the row.

    Raises:
        `FileNotFoundError`, `ValueError`: names file and line, what was found and what was expected.
    """
    header = None
    for where, row in _cells(path, "\t"):
        if header is None:
            header = row
            if row != columns:
                raise ValueError(f"{where}: the header is {row!r}, expected {columns!r}.")
        else:
            yield where, _row(row, columns, where)


def read_table(path: str | Path, columns: list[str] | None = None) -> Iterator[tuple[str, dict[str, str]]]:
    """
    Read the rows of a CSV or TSV file with any header, `.gz` or plain.

    Values end at tabs if the file is named `.tsv` or its first line holds one. Otherwise they end at commas, or at
    semicolons if the first line holds more of them.

    Args:
        path (`str` or `Path`): the file.
        columns (`list[str]`, *optional*): names of the columns of a file without a header.

    Yields:
        `(str, dict)`: `"file, line n"` and the row.

    Raises:
        `FileNotFoundError`, `ValueError`: names file and line, what was found and what was expected.
    """
    first_line = next(byte_lines(path), b"")
    delimiter = ";" if first_line.count(b";") > first_line.count(b",") else ","
    if is_tsv(path) or _has_tabs(first_line, columns):
        delimiter = "\t"
    for where, row in _cells(path, delimiter):
        if columns is None:
            columns = row
            if len(set(row)) < len(row):
                raise ValueError(f"{where}: the header is {row!r}, which names a column twice.")
        else:
            yield where, _row(row, columns, where)


def _has_tabs(first_line: bytes, columns: list[str] | None) -> bool:
    """Return whether tabs separate the values of a file that is named `.csv`, such as DPR's nq-test.csv."""
    num_tabs = first_line.count(b"\t")
    if columns is not None:
        return num_tabs > 0 and num_tabs + 1 == len(columns)
    return num_tabs > max(first_line.count(b","), first_line.count(b";"))


def is_tsv(path: str | Path) -> bool:
    """Return whether a file is named as one of tab-separated values, in capitals or not."""
    return str(path).lower().endswith(TSV_ENDINGS)


def _encloses_with_quotes(path: Path) -> bool:
    """Return whether quotes enclose values, as in DPR's files; in others, such as MS MARCO's, they are text."""
    with _opened(path) as text:
        try:
            collections.deque(itertools.islice(csv.reader(text, delimiter="\t", strict=True), 10_000), maxlen=0)
        except csv.Error:
            return False
    return True


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[io.TextIOWrapper]:
    """Open a text file, compressed or not."""
    open_file = gzip.open if path.suffix.lower() == ".gz" else open
    with open_file(path, "rb") as binary:
        yield io.TextIOWrapper(binary, encoding="utf-8-sig", newline="")


def _cells(path: str | Path, delimiter: str) -> Iterator[tuple[str, list[str]]]:
    """Yield the place and the values of each line that is not empty."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not a file.")
    csv.field_size_limit(sys.maxsize)
    last_line = 0  # of the row before
    with _opened(path) as text:
        # strict: else a lone quote swallows all lines after it
        rows = csv.reader(text, delimiter=delimiter, strict=True)
        try:
            if delimiter == "\t" and not _encloses_with_quotes(path):
                rows = csv.reader(text, delimiter=delimiter, quoting=csv.QUOTE_NONE)
            for row in rows:
                last_line = rows.line_num
                if row:
                    yield f"{path}, line {last_line}", row
        except csv.Error as error:
            raise ValueError(
                f"{path}, line {last_line + 1}: {error}. A value that begins with a quote must end with one, and"
                ' quotes within it must be doubled: "he said ""yes""".'
            ) from None
        except (EOFError, gzip.BadGzipFile, zlib.error, UnicodeDecodeError) as error:
            raise ValueError(f"{path} is damaged after line {rows.line_num}: {error}") from None


def _row(values: list[str], columns: list[str], where: str) -> dict[str, str]:
    """Return the values of a line by column."""
    if len(values) != len(columns):
        names = ", ".join(columns)
        raise ValueError(f"{where}: found {len(values)} columns, expected {len(columns)}: {names}.")
    return dict(zip(columns, values, strict=True))


def read_passages(source: str | Path | Iterable[tuple[str, dict[str, Any]]]) -> Iterator[tuple[str, dict[str, Any]]]:
    """
    Read the passages of a corpus, one at a time.

    A file is our JSON Lines or Parquet, BEIR's `corpus.jsonl` (with `_id`), or DPR's `psgs_w100.tsv` (`id`, `text`,
    `title`).

    Args:
        source (`str`, `Path` or iterable of `(str, dict)`): a file, or its lines with their places.

    Yields:
        `(str, dict)`: the place and `{"id", "title", "text"}`, plus `metadata`, `wikipedia_id`, `start_paragraph_id`
            and `end_paragraph_id` if the line has them.

    Raises:
        `ValueError`: names file and line, the field, what was found and what was expected.
    """
    if isinstance(source, str | Path):
        if is_tsv(source):
            source = read_tsv(source, ["id", "text", "title"])
        else:
            source = read_files([source], optional=(*OPTIONAL_COLUMNS, *WIKIPEDIA_FIELDS))
    for where, line in source:
        passage = {"id": check_id(line.get("id", line.get("_id")), where), **check_title_and_text(line, where)}
        metadata = check_metadata(line.get("metadata"), where)
        if metadata is not None:
            passage["metadata"] = metadata
        yield where, passage | wikipedia_fields(line, where)


def wikipedia_fields(line: dict[str, Any], where: str) -> dict[str, Any]:
    """
    Return `wikipedia_id`, `start_paragraph_id` and `end_paragraph_id` of a passage, as far as it has them.

    Raises:
        `ValueError`: for a paragraph number that is no integer, or one without the other.
    """
    fields = {name: line[name] for name in WIKIPEDIA_FIELDS if line.get(name) is not None}
    paragraphs = [fields.get(name) for name in WIKIPEDIA_FIELDS[1:]]
    if paragraphs != [None, None] and not all(type(number) is int for number in paragraphs):
        raise ValueError(
            f"{where}: start_paragraph_id and end_paragraph_id are {paragraphs[0]!r} and {paragraphs[1]!r}, expected"
            " two integers, or neither."
        )
    return fields


def instruction_of(dataset: str, override: str | None) -> str:
    """
    Return the instruction of a dataset: `override` (from `--instruction`) if there is one, otherwise the paper's.

    Raises:
        `ValueError`: if there is neither.
    """
    if override is not None:
        return override
    known = read_json(INSTRUCTIONS)["instructions"]
    if dataset not in known:
        raise ValueError(
            f"{INSTRUCTIONS.name} has no instruction for {dataset!r}, only for {', '.join(known)}: "
            "give one as --instruction; it may be empty."
        )
    return known[dataset]


def refuse_for_file(source: str, **options: Any) -> None:
    """Raise a `ValueError` for the first option that is not `None`: it selects a part of a dataset, not of a file."""
    for name, value in options.items():
        if value is not None:
            raise ValueError(f"--{name} is for the name of a dataset, and {source} is a file.")


def read_dataset_or_file(source: str, split: str | None, default_split: str) -> Iterator[tuple[str, Any]]:
    """
    Yield the rows of a JSON Lines file, or of a split of a named dataset; see [`~trainer.data.read_rows`].

    Raises:
        `ValueError`: if a split is given for a file.
    """
    if Path(source).is_file():
        refuse_for_file(source, split=split)
    yield from read_rows(source, split or default_split)


def refuse_same_file(output_file: str, output_corpus: str | None) -> None:
    """Raise a `ValueError` if the instances and the corpus would be written to one file."""
    if output_corpus is not None and Path(output_file).resolve() == Path(output_corpus).resolve():
        raise ValueError(f"--output_file and --output_corpus are both {output_corpus}, expected two files.")


def distinct(values: Iterable[T]) -> list[T]:
    """Return the values without repetitions, in the order of their first occurrence."""
    return list(dict.fromkeys(values))
