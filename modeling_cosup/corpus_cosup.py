"""Corpora in files, JSON Lines or Parquet, read passage by passage. Does not travel with a checkpoint."""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from .lines_cosup import BadRow, lines_with_places
from .metadata_cosup import read_metadata
from .names_cosup import refuse_misspelt

try:
    import pyarrow.parquet as parquet
except ImportError:
    parquet = None

COLUMNS = ("id", "title", "text")
OPTIONAL_COLUMNS = ("id", "title", "url", "metadata")

if TYPE_CHECKING:
    from pyarrow import RecordBatch


def read_files(
    paths: Iterable[str | Path],
    columns: Sequence[str] = COLUMNS,
    on_bad_row: BadRow | None = None,
    optional: Sequence[str] = OPTIONAL_COLUMNS,
) -> Iterator[tuple[str, dict]]:
    """
    Read the rows of files, one after another, unchecked: Parquet if a name ends in `.parquet`, otherwise JSON Lines.

    Args:
        paths (iterable of `str` or `Path`): the files.
        columns (sequence of `str`, *optional*): what is read of a Parquet file. A misspelt one is an error.
        on_bad_row (`Callable`, *optional*): gets the place and the error of a row that cannot be read. Reading goes on
            with the next row. By default the error is raised.
        optional (sequence of `str`, *optional*): what else is read of a Parquet file that has it.

    Yields:
        `(str, dict)`: the place, for error messages, and the row.

    Raises:
        `FileNotFoundError`, `ValueError`: for a damaged file; names the file, and the line of JSON Lines.
    """
    for path in paths:
        if Path(path).suffix.lower() == ".parquet":
            yield from read_parquet(path, columns, on_bad_row, optional)
        else:
            yield from lines_with_places(path, on_bad_row)


def read_parquet(
    path: str | Path,
    columns: Sequence[str] = COLUMNS,
    on_bad_row: BadRow | None = None,
    optional: Sequence[str] = OPTIONAL_COLUMNS,
) -> Iterator[tuple[str, dict]]:
    """
    Read `(where, row)` pairs of a Parquet file: `columns`, and the `optional` ones that it has.

    `metadata` is a column of structs, maps or JSON text. `on_bad_row` as in [`read_files`].
    """
    if parquet is None:
        raise ImportError("A Parquet file needs pyarrow: pip install pyarrow.")
    try:
        file = parquet.ParquetFile(path)
    except ValueError as error:  # ArrowInvalid is one
        raise ValueError(f"{path} is not a Parquet file: {error}") from None
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} is not a file.") from None
    except OSError as error:
        raise ValueError(f"{path} is damaged: {error}") from None
    refuse_misspelt(dict.fromkeys(file.schema_arrow.names, True), tuple(columns), str(path))
    present = [name for name in dict.fromkeys((*columns, *optional)) if name in file.schema_arrow.names]
    row = -1
    with file:
        for batch in _read_batches(file, present, path):
            for value in _rows(batch):
                row += 1
                where = f"{path}, row {row}"
                try:
                    if isinstance(value, Exception):
                        raise ValueError(f"{where}: a value cannot be read: {value}") from value
                    if "metadata" in value:
                        value["metadata"] = _metadata(value["metadata"], where)
                except ValueError as error:
                    if on_bad_row is None:
                        raise
                    on_bad_row(where, error)
                    continue
                yield where, value


def _rows(batch: "RecordBatch") -> list[dict | Exception]:
    """Return the rows of a batch. In place of a row that Python cannot hold, such as text not in UTF-8: its error."""
    try:
        return batch.to_pylist()
    except (ValueError, OverflowError):  # of one of the rows
        rows: list[dict | Exception] = []
    for number in range(batch.num_rows):
        try:
            rows += batch.slice(number, 1).to_pylist()
        except (ValueError, OverflowError) as error:
            rows.append(error)
    return rows


def _metadata(value: object, where: str) -> object:
    """Return the metadata of a row: Arrow gives a struct as a `dict` and a map as a list of pairs."""
    if isinstance(value, str):
        return read_metadata(value, where) if value else None
    if isinstance(value, list) and all(isinstance(pair, tuple) for pair in value):
        return dict(value)
    return value


def _read_batches(file: "parquet.ParquetFile", columns: list[str], path: str | Path) -> "Iterator[RecordBatch]":
    try:
        yield from file.iter_batches(batch_size=1024, columns=columns)
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} is damaged: {error}") from None
