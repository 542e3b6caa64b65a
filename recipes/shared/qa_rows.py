"""
Rows of question–answer sets: JSON, JSON Lines, CSV, TSV, Parquet, or a dataset of the Hub, one at a time.

Lists of JSON objects, as of DPR, and SQuAD's nested articles are read with ijson, which holds one item in memory.
"""

import codecs
import contextlib
import gzip
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from modeling_cosup.lines_cosup import lines_with_places

from shared.data_files import read_table, refuse_for_file

Row = tuple[str, dict[str, Any]]  # where it is, for errors and counts, and its columns
JSON_LINES = (".jsonl", ".ndjson")
TABLES = (".csv", ".tsv")
ENDINGS = (".json", *JSON_LINES, *TABLES, ".parquet")


def read_qa_rows(
    source: str, config_name: str | None = None, split: str | None = None, column_names: list[str] | None = None
) -> Iterator[Row]:
    """
    Read the rows of a file or of a dataset, which is streamed.

    Args:
        source (`str`): a file, `.gz` or plain, or the name of a dataset (on the Hub, or a folder).
        config_name, split (`str`, *optional*): of a dataset, whose split defaults to `"train"`. An error for a file.
        column_names (`list[str]`, *optional*): of a CSV or TSV file without a header.

    Yields:
        `(str, dict)`: `"file, line n"` (or item, row, question) and the row.

    Raises:
        `FileNotFoundError`, `ValueError`: for a file of another kind or a damaged one, naming it and the place.
    """
    path = Path(source)
    ending = Path(source.lower().removesuffix(".gz")).suffix
    if column_names and ending not in TABLES:
        raise ValueError(f"--column_names is for a CSV or TSV file without a header, and {source} is none.")
    if not path.is_file() and ending not in ENDINGS:
        yield from read_dataset(source, config_name, split or "train")
        return
    refuse_for_file(source, config_name=config_name, split=None if split == "train" else split)
    if not path.is_file():
        raise FileNotFoundError(f"{source} is not a file.")
    if ending in TABLES:
        yield from read_table(path, column_names)
    elif ending == ".parquet":
        yield from read_parquet_rows(path)
    elif ending == ".json":
        yield from read_json_rows(path)
    elif ending in JSON_LINES:
        yield from lines_with_places(path)
    else:
        expected = ", ".join(ENDINGS)
        raise ValueError(f"{source}: unknown kind of file, expected one of {expected} (all but Parquet also .gz).")


def read_dataset(name: str, config_name: str | None, split: str) -> Iterator[Row]:
    """Stream the rows of a dataset."""
    from datasets import load_dataset

    for number, row in enumerate(load_dataset(name, config_name, split=split, streaming=True)):
        yield f"{name} ({split}), row {number}", row


def read_parquet_rows(path: Path) -> Iterator[Row]:
    """Read the rows of a Parquet file, one batch at a time."""
    from pyarrow import parquet

    number = 0
    try:
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1024):
                for row in batch.to_pylist():
                    yield f"{path}, row {number}", row
                    number += 1
    except (OSError, ValueError) as error:  # ArrowInvalid is a ValueError
        raise ValueError(f"{path} is no Parquet file, or damaged after row {number}: {error}") from None


# ---------------------------------------------------------------------- JSON


def read_json_rows(path: Path) -> Iterator[Row]:
    """Read a JSON file: a list of objects, SQuAD's `{"data": [...]}`, or JSON Lines under this name."""
    try:
        import ijson
    except ImportError:
        raise ImportError(f"{path}: to read JSON that is not JSON Lines, pip install ijson.") from None
    prefix = items_prefix(path)
    if prefix is None:
        yield from lines_with_places(path)
        return
    number = 0
    try:
        with open_bytes(path) as file:
            for number, item in enumerate(ijson.items(file, prefix, use_float=True)):
                place = f"{path}, item {number}"
                if not isinstance(item, dict):
                    raise ValueError(f"{place}: found {type(item).__name__}, expected an object.")
                if "paragraphs" in item:
                    yield from read_squad_article(item, place)
                else:
                    yield place, item
    except (ijson.JSONError, EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{path} is damaged after item {number}: {error}") from None


@contextlib.contextmanager
def open_bytes(path: Path) -> Iterator[IO[bytes]]:
    """Open a file, `.gz` or plain, to read the bytes after its byte order mark, if it has one."""
    with gzip.open(path, "rb") if path.suffix.lower() == ".gz" else path.open("rb") as file:
        if file.read(3) != codecs.BOM_UTF8:
            file.seek(0)
        yield file


def items_prefix(path: Path) -> str | None:
    """Return where the rows of a JSON file are, as ijson names it; `None` if the file is JSON Lines."""
    import ijson

    try:
        with open_bytes(path) as file:
            for prefix, event, _ in ijson.parse(file):
                if (prefix, event) == ("", "start_array"):
                    return "item"
                if (prefix, event) == ("data", "start_array"):
                    return "data.item"
                if (prefix, event) == ("", "end_map"):
                    return None
    except (ijson.JSONError, EOFError, gzip.BadGzipFile, zlib.error):
        pass  # the reader of JSON Lines says what is wrong, and where
    return None


def read_squad_article(article: dict[str, Any], where: str) -> Iterator[Row]:
    """
    Yield the questions of one of SQuAD's articles in the flat form of the Hub.

    Raises:
        `ValueError`: for an article that is not of SQuAD's form.
    """
    try:
        for i, paragraph in enumerate(article["paragraphs"]):
            for j, question in enumerate(paragraph["qas"]):
                row = {
                    "id": question["id"],
                    "title": article.get("title", ""),
                    "context": paragraph["context"],
                    "question": question["question"],
                    "answers": {"text": [answer["text"] for answer in question["answers"]], "answer_start": []},
                }
                yield f"{where}, paragraph {i}, question {j}", row
    except (KeyError, TypeError) as error:
        raise ValueError(
            f"{where} is none of SQuAD's articles, {{title, paragraphs: [{{context, qas: [{{id, question,"
            f" answers}}]}}]}} ({error!r})."
        ) from None
