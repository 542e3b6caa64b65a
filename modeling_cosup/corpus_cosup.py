"""Corpora: passages read one by one from JSON Lines, Parquet, a data set or any iterable, and checked as they come."""

import hashlib
import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from .files_cosup import lines_with_places

try:
    import pyarrow.parquet as parquet
except ImportError:
    parquet = None

_NO_ID = re.compile(r"\x00|(^|[/\\])\.\.($|[/\\])")


def read_parquet(path):
    """`(where, dict)` pairs of a Parquet file with columns `id`, `text` and perhaps `title`; `ValueError` when it is none."""
    if parquet is None:
        raise ImportError("A Parquet file needs pyarrow: pip install pyarrow.")
    try:
        file = parquet.ParquetFile(path)
    except ValueError as error:  # ArrowInvalid is one
        raise ValueError(f"{path} is no Parquet file: {error}") from None
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} is not a file.") from None
    except OSError as error:
        raise ValueError(f"{path} is damaged: {error}") from None
    columns = [name for name in ("id", "title", "text") if name in file.schema_arrow.names]
    row = 0
    with file:
        for batch in _read_batches(file, columns, path):
            for value in batch.to_pylist():
                yield f"{path}, row {row}", value
                row += 1


def _read_batches(file, columns, path):
    try:
        yield from file.iter_batches(batch_size=1024, columns=columns)
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} is damaged: {error}") from None


def read_corpus(source):
    """
    The passages of a corpus as they stand in it, unchecked, one at a time.

    Args:
        source (`str`, `Path`, list of these, or iterable of `dict`): files, Parquet where the name ends in `.parquet`, else JSON Lines (`.gz` or plain);
            or anything that yields passages, such as a list or a (streamed) `datasets` data set.

    Yields:
        `(str, object)`: the place, for errors, and what stands there.
    """
    if isinstance(source, str | Path):
        yield from read_parquet(source) if Path(source).suffix == ".parquet" else lines_with_places(source)
        return
    if isinstance(source, list | tuple) and source and all(isinstance(path, str | Path) for path in source):
        for path in source:
            yield from read_corpus(path)
        return
    for row, value in enumerate(source):
        yield f"Corpus row {row}", value


def can_be_read_twice(source):
    """Whether `read_corpus(source)` starts anew each time: not for a generator or another iterator, which is its own `iter()`."""
    return isinstance(source, str | Path) or iter(source) is not source


def check_text(value, field, where, may_be_empty=False):
    """`value` if it is a string that can be encoded and, unless `may_be_empty`, holds more than white space; `ValueError` otherwise."""
    expected = "a string" if may_be_empty else "a string that is not empty"
    if not isinstance(value, str) or not (may_be_empty or value.strip()):
        raise ValueError(f"{where}: {field} is {value!r}, expected {expected}.")
    try:
        value.encode()
    except UnicodeEncodeError as error:  # half a surrogate pair: valid JSON, no text
        raise ValueError(f"{where}: {field} holds {value[error.start]!r}, which is no character.") from None
    return value


def check_id(value, where):
    """
    `value` if it can be the id of a passage. Ids are names, never paths; one that would lead out of a folder is refused all the same, for the sake of what
    reads them elsewhere.
    """
    check_text(value, "id", where)
    if _NO_ID.search(value):
        raise ValueError(f"{where}: id is {value!r}, expected no NUL and no '..' between slashes.")
    return value


def check_title_and_text(passage, where, field=""):
    """`{"title", "text"}` of a passage, checked; a missing title becomes empty."""
    text = check_text(passage.get("text"), f"{field}text", where)
    title = passage.get("title")
    return {"title": check_text("" if title is None else title, f"{field}title", where, may_be_empty=True), "text": text}


def checked_passages(pairs):
    """
    Passages of a corpus, each checked; that no id stands there twice is for [`find_duplicate`] to find.

    Args:
        pairs (iterable of `(str, object)`): of [`read_corpus`].

    Yields:
        `(str, dict)`: the place and `{"id", "title", "text"}`.

    Raises:
        `ValueError`: names the place, the field, what was found and what was expected.
    """
    for where, value in pairs:
        if not isinstance(value, Mapping):
            raise ValueError(f"{where} is {value!r}, expected a passage: id, title and text.")
        yield where, {"id": check_id(value.get("id"), where), **check_title_and_text(value, where)}


def hash_id(id):
    """64 bits of a passage id, `int`: 8 bytes stand for an id of any length. Where two ids have the same hash, the ids themselves are compared."""
    return int.from_bytes(hashlib.blake2b(id.encode(), digest_size=8).digest(), "little", signed=True)


def hash_ids(ids):
    """[`hash_id`] of many: `numpy.ndarray` of int64."""
    return np.fromiter(map(hash_id, ids), np.int64)


def find_duplicate(hashes, read):
    """
    Raise when an id stands in a corpus twice, at 8 bytes a passage: ids are looked at only where hashes are equal.

    Args:
        hashes (`numpy.ndarray` of int64): of all ids; sorted in place.
        read (callable): gives `(where, passage)` pairs of the same corpus.

    Raises:
        `ValueError`: names both places.
    """
    hashes.sort()
    twice = set(hashes[1:][hashes[1:] == hashes[:-1]].tolist())
    if not twice:
        return
    places = {}
    for where, passage in read():
        if hash_id(passage["id"]) in twice:
            if passage["id"] in places:
                raise ValueError(f"{where}: id {passage['id']!r} already stands at {places[passage['id']]}; ids must be unique.")
            places[passage["id"]] = where
