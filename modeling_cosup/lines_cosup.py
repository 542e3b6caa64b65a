"""
JSON Lines: read with the place of each object, written completely or not at all. Does not travel with a checkpoint.

Unlike `datasets`, `jsonlines` and `orjson`, this reader names file and line in its errors, streams large files and
reads `.gz`.
"""

import contextlib
import gzip
import json
from collections.abc import Callable, Iterable, Iterator
from io import BufferedIOBase
from pathlib import Path
from typing import Any, TypeAlias

from .files_cosup import byte_lines, parse_json, replacing_file

BadRow: TypeAlias = Callable[[str, ValueError], object]  # gets the place of a row, and why it cannot be read


def lines_with_places(path: str | Path, on_bad_row: BadRow | None = None) -> Iterator[tuple[str, dict]]:
    """
    Yield the objects of a JSON Lines file, `.gz` or plain, one at a time.

    Args:
        path (`str` or `Path`): the file.
        on_bad_row (`Callable`, *optional*): gets the place and the error of a line that cannot be read. Reading goes
            on with the next line. By default the error is raised.

    Yields:
        `(str, dict)`: `"file, line n"` and the object. Blank lines are skipped.

    Raises:
        `FileNotFoundError`: when `path` is not a file.
        `ValueError`: for a damaged `.gz`, malformed JSON or a line that is not an object, naming file and line.
    """
    for number, line in enumerate(byte_lines(path), 1):
        if not line.strip():
            continue
        place = f"{path}, line {number}"
        try:
            value = parse_json(line, place)  # a byte order mark begins the file, or each of several that were joined
            if not isinstance(value, dict):
                raise ValueError(f"{place}: found {type(value).__name__}, expected a JSON object.")
        except ValueError as error:
            if on_bad_row is None:
                raise
            on_bad_row(place, error)
            continue
        yield place, value


def read_lines(path: str | Path) -> list[dict]:
    """Return all objects of a JSON Lines file; see [`lines_with_places`]."""
    return [value for _, value in lines_with_places(path)]


@contextlib.contextmanager
def writing_lines(path: str | Path | None) -> Iterator[Callable[[Any], object]]:
    """
    Yield a function that writes one object per line. The file appears when the block ends without an error.

    Args:
        path (`str`, `Path` or `None`): the file, compressed if it ends in `.gz`. Missing folders are created. With
            `None` nothing is written.
    """
    if path is None:
        yield lambda value: None
        return
    with writing_bytes(path) as file:

        def write(value: Any) -> None:
            line = json.dumps(value, ensure_ascii=False) + "\n"
            file.write(line.encode())

        yield write


@contextlib.contextmanager
def writing_bytes(path: str | Path) -> Iterator[BufferedIOBase]:
    """Yield a file for bytes, compressed if `path` ends in `.gz`; it appears when the block ends without an error."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing_file(path) as unfinished, contextlib.ExitStack() as stack:
        file: BufferedIOBase = stack.enter_context(unfinished.open("wb"))
        if path.suffix.lower() == ".gz":
            # without a file name and a time in the header, the same lines always give the same bytes
            file = stack.enter_context(gzip.GzipFile("", "wb", 6, file, mtime=0))
        yield file


def write_lines(path: str | Path, values: Iterable[Any]) -> None:
    """Write JSON Lines; see [`writing_lines`]."""
    with writing_lines(path) as write:
        for value in values:
            write(value)
