"""Passages: checked as they come, one by one, and their ids, which no corpus may hold twice."""

import hashlib
import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np

_NO_ID = re.compile(r"\x00|(^|[/\\])\.\.($|[/\\])")


def read_corpus(source):
    """
    The passages of a corpus as they stand in it, unchecked, one at a time.

    Args:
        source (`str`, `Path`, list of these, or iterable of `dict`): files, see [`corpus_cosup`]; or anything that
            yields passages, such as a list or a (streamed) `datasets` data set.

    Yields:
        `(str, object)`: the place, for errors, and the value there.

    Raises:
        `ImportError`: for a file in a process that has only a checkpoint.
    """
    if isinstance(source, str | Path):
        source = [source]
    if isinstance(source, list | tuple) and source and all(isinstance(path, str | Path) for path in source):
        yield from _read_files(source)
        return
    for row, value in enumerate(source):
        yield f"Corpus row {row}", value


def _read_files(paths):
    try:
        from modeling_cosup.corpus_cosup import read_files
    except ImportError:
        raise ImportError(
            "To read a corpus from files, install the package: pip install cosup. A list of passages needs only the checkpoint."
        ) from None
    return read_files(paths)


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
    return {
        "title": check_text("" if title is None else title, f"{field}title", where, may_be_empty=True),
        "text": text,
    }


def checked_passages(pairs):
    """
    Passages of a corpus, each checked; [`find_duplicate`] checks for duplicate ids.

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
    Raise when an id occurs twice in a corpus, at 8 bytes a passage: ids are looked at only where hashes are equal.

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
                raise ValueError(
                    f"{where}: id {passage['id']!r} already stands at {places[passage['id']]}; ids must be unique."
                )
            places[passage["id"]] = where
