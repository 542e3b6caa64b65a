"""Passages of a corpus: read and checked one at a time. Their ids must be unique."""

import hashlib
import os
import re
import reprlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from numbers import Integral
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .metadata_cosup import check_metadata
from .names_cosup import refuse_misspelt

_FORBIDDEN_IN_ID = re.compile(r"\x00|(^|[/\\])\.\.($|[/\\])")
_SHORT = reprlib.Repr()
_SHORT.maxstring = 80


def read_corpus(source: str | Path | Iterable[Any], **options: Any) -> Iterator[tuple[str, object]]:
    """
    Read the passages of a corpus one at a time, unchecked.

    Args:
        source (`str`, `Path`, list of these, or iterable of `dict`): files, see [`corpus_cosup`]; or anything that
            yields passages, such as a list or a (streamed) `datasets` data set; or a map-style dataset.
        **options: of [`~corpus_cosup.read_files`], for files.

    Yields:
        `(str, object)`: the place, for error messages, and the value there.

    Raises:
        `ImportError`: for a file in a process that has only a checkpoint.
    """
    if isinstance(source, str | Path):
        source = [source]
    if isinstance(source, list | tuple) and source and all(isinstance(path, str | Path) for path in source):
        yield from _read_files(source, **options)
        return
    for row, value in enumerate(dataset_rows(source)):
        yield f"Corpus row {row}", value


def _read_files(paths: Sequence[str | Path], **options: Any) -> Iterator[tuple[str, object]]:
    try:
        from modeling_cosup.corpus_cosup import read_files
    except ImportError:
        raise ImportError(
            "To read a corpus from files, install the package: pip install cosup. A list of passages needs only the"
            " checkpoint."
        ) from None
    for path in paths:
        if not os.path.isfile(path):  # also for a text that is too long to be a file name
            raise FileNotFoundError(
                f"{_SHORT.repr(str(path))[1:-1]} is not a file. A passage is an object with id, title and text."
            )
    return read_files(paths, **options)


def dataset_rows(source: Any) -> Iterator[Any]:
    """
    Return an iterator over the rows of a dataset.

    A map-style dataset without `__iter__` is read up to its length, because its `__getitem__` may never raise
    IndexError.
    """
    if hasattr(source, "__iter__"):
        return iter(source)
    return (source[row] for row in range(len(source)))


def can_be_read_twice(source: str | Path | Iterable[Any]) -> bool:
    """Return whether `read_corpus(source)` starts again each time; for a generator or another iterator it does not."""
    return isinstance(source, str | Path) or iter(source) is not source


def shown(value: object) -> str:
    """Return `repr(value)` for an error message, shortened if it is long or deeply nested."""
    return _SHORT.repr(value)


def blank(text: str) -> str:
    """Return in words what a text without any visible character is."""
    return "only white space" if text else "empty"


def check_text(value: object, field: str, where: str, may_be_empty: bool = False) -> str:
    """
    Return `value` if it is a string that can be encoded and, unless `may_be_empty`, holds more than white space.

    Raises:
        `ValueError`: otherwise.
    """
    if not isinstance(value, str):
        expected = "a string" if may_be_empty else "a string that is not empty"
        raise ValueError(f"{where}: {field} is {shown(value)}, expected {expected}.")
    if not may_be_empty and not value.strip():
        raise ValueError(f"{where}: {field} is {blank(value)}, expected a text.")
    try:
        value.encode()
    except UnicodeEncodeError as error:  # half a surrogate pair: valid JSON, no text
        raise ValueError(f"{where}: {field} holds {value[error.start]!r}, which is not a character.") from None
    return value


def check_id(value: object, where: str, field: str = "id") -> str:
    """
    Return an id as a string. An integer becomes its digits, so 1 and "1" are the same id.

    CoSup never uses ids as paths, but other programs might: an id that would lead out of a folder is refused.
    """
    if not isinstance(value, str):
        if isinstance(value, Integral) and not isinstance(value, bool):
            return str(value)
        raise ValueError(f"{where}: {field} is {shown(value)}, expected a string that is not empty, or an integer.")
    if not value.strip():
        raise ValueError(f"{where}: {field} is {blank(value)}, expected a text or an integer.")
    check_text(value, field, where)
    if _FORBIDDEN_IN_ID.search(value):
        raise ValueError(f"{where}: {field} is {value!r}, expected no NUL and no '..' between slashes.")
    return value


def check_title_and_text(passage: Mapping[str, Any], where: str, field: str = "") -> dict[str, str]:
    """Return `{"title", "text"}` of a passage, checked; a missing title becomes empty, other keys are dropped."""
    refuse_misspelt(passage, ("title", "text"), where, field)
    text = check_text(passage.get("text"), f"{field}text", where)
    title = passage.get("title")
    if title is None:
        title = ""
    return {"title": check_text(title, f"{field}title", where, may_be_empty=True), "text": text}


def checked_passages(
    pairs: Iterable[tuple[str, object]], check: Callable[[dict[str, Any]], None] | None = None
) -> Iterator[tuple[str, dict[str, Any]]]:
    """
    Check the passages of a corpus one at a time; [`find_duplicate`] checks for duplicate ids.

    Args:
        pairs (iterable of `(str, object)`): from [`read_corpus`].
        check (`Callable`, *optional*): a further check of a passage, which raises a `ValueError`.

    Yields:
        `(str, dict)`: the place and `{"id", "title", "text"}`, with `"metadata"` if the passage has some.

    Raises:
        `ValueError`: names the place, the field, what was found and what was expected.
    """
    for where, value in pairs:
        if not isinstance(value, Mapping):
            raise ValueError(f"{where} is {shown(value)}, expected a passage: id, title and text.")
        refuse_misspelt(value, ("id",), where)
        passage: dict[str, Any] = {"id": check_id(value.get("id"), where), **check_title_and_text(value, where)}
        metadata = check_metadata(value.get("metadata"), where)
        if metadata is not None:
            passage["metadata"] = metadata
        if check is not None:
            try:
                check(passage)
            except ValueError as error:
                raise ValueError(f"{where}: {error}") from error
        yield where, passage


def hash_id(id: str) -> int:
    """Hash a passage id to 64 bits, to save memory. If two hashes are equal, the ids must be compared."""
    return int.from_bytes(hashlib.blake2b(id.encode(), digest_size=8).digest(), "little", signed=True)


def hash_ids(ids: Iterable[str]) -> NDArray[np.int64]:
    """Hash many passage ids; see [`hash_id`]."""
    return np.fromiter(map(hash_id, ids), np.int64)


def find_duplicate(hashes: NDArray[np.int64], read: Callable[[], Iterable[tuple[str, Mapping[str, Any]]]]) -> None:
    """
    Raise if an id occurs twice in a corpus; takes 8 bytes per passage, since only ids with equal hashes are compared.

    Args:
        hashes (`numpy.ndarray` of int64): of all ids; sorted in place.
        read (callable): returns the `(where, passage)` pairs of the same corpus.

    Raises:
        `ValueError`: names both places.
    """
    hashes.sort()
    repeated = set(hashes[1:][hashes[1:] == hashes[:-1]].tolist())
    if not repeated:
        return
    places: dict[str, str] = {}
    for where, passage in read():
        id = passage["id"]
        if hash_id(id) not in repeated:
            continue
        if id in places:
            raise ValueError(f"{where}: id {id!r} is already in {places[id]}; ids must be unique.")
        places[id] = where
