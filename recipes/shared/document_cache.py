"""
The passages of documents that were split before, in an SQLite file next to the corpus.

A document's passages count once it is complete, so an interrupted run resumes after it. The file can be deleted at any
time: the documents are then split again.
"""

import sqlite3
import zlib
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers.utils import logging

logger = logging.get_logger(__name__)

ID_BYTES = 10
HASH_BYTES = 16
TABLES = """
    CREATE TABLE IF NOT EXISTS documents (source TEXT PRIMARY KEY, key TEXT NOT NULL, note TEXT NOT NULL);
    CREATE TABLE IF NOT EXISTS batches (
        source TEXT NOT NULL, number INTEGER NOT NULL,
        lines BLOB NOT NULL, ids BLOB NOT NULL, hashes BLOB NOT NULL, lengths BLOB NOT NULL,
        PRIMARY KEY (source, number)
    );
    CREATE TABLE IF NOT EXISTS bad_rows (
        source TEXT NOT NULL, place TEXT NOT NULL, reason TEXT NOT NULL, number INTEGER NOT NULL
    );
    CREATE INDEX IF NOT EXISTS bad_rows_of ON bad_rows (source);
"""


@dataclass(frozen=True)
class PassageBatch:
    """
    Passages as they are stored.

    Args:
        lines (`bytes`): lines of the corpus, compressed by zlib.
        ids (`bytes`): their ids, `ID_BYTES` each.
        hashes (`bytes`): of their titles and texts, `HASH_BYTES` each.
        lengths (`bytes`): their numbers of tokens, an `array("I")`.
        note (`str`): what could not be read of the document.
    """

    lines: bytes
    ids: bytes
    hashes: bytes
    lengths: bytes
    note: str = ""

    def rows(self) -> Iterator[tuple[bytes, bytes, bytes, int]]:
        """Yield `(line, id, hash, number of tokens)` of each passage."""
        lengths = array("I")
        lengths.frombytes(self.lengths)
        lines = zlib.decompress(self.lines).split(b"\n")
        for number, length in enumerate(lengths):
            id = self.ids[number * ID_BYTES : (number + 1) * ID_BYTES]
            hash = self.hashes[number * HASH_BYTES : (number + 1) * HASH_BYTES]
            yield lines[number], id, hash, length


@dataclass(frozen=True)
class BadRow:
    """
    A row that cannot be used.

    Args:
        source (`str`), place (`str`): its document, and where it stands there, such as `"row 3"`.
        reason (`str`): why it cannot be used.
        number (`int`): more than 1 if it stands for several rows.
    """

    source: str
    place: str
    reason: str
    number: int = 1


class DocumentCache:
    """
    Passages by document. One process at a time may use it.

    Args:
        path (`Path`): the file; a damaged one is replaced.

    Raises:
        `ValueError`: if another process uses it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._connection = self._open()
        except sqlite3.OperationalError as error:
            raise ValueError(f"{path} is in use by another process, or cannot be written: {error}") from None
        except sqlite3.DatabaseError as error:
            logger.warning(f"{path} is damaged ({error}): all documents are split again.")
            path.unlink()
            self._connection = self._open()

    def _open(self) -> sqlite3.Connection:
        connection = sqlite3.connect(self.path, timeout=0)
        try:
            connection.execute("PRAGMA locking_mode = EXCLUSIVE")
            connection.execute("PRAGMA journal_mode = WAL")
            connection.execute("PRAGMA synchronous = NORMAL")  # a power cut may cost the last documents, no others
            connection.executescript(TABLES)
            connection.execute("CREATE TEMP TABLE seen (value BLOB PRIMARY KEY) WITHOUT ROWID")
            connection.commit()
        except sqlite3.Error:
            connection.close()
            raise
        return connection

    def __enter__(self) -> "DocumentCache":
        return self

    def __exit__(self, *error: Any) -> None:
        self._connection.rollback()
        self._connection.close()

    def holds(self, source: str, key: str) -> bool:
        """Return whether a document is complete under this key."""
        rows = self._connection.execute("SELECT key FROM documents WHERE source = ?", (source,)).fetchall()
        return rows == [(key,)]

    def discard(self, source: str) -> None:
        """Remove a document, complete or not."""
        for table in ("documents", "batches", "bad_rows"):
            self._connection.execute(f"DELETE FROM {table} WHERE source = ?", (source,))

    def add(self, source: str, number: int, batch: PassageBatch) -> None:
        """Add passages of a document that is not complete yet."""
        row = (source, number, batch.lines, batch.ids, batch.hashes, batch.lengths)
        self._connection.execute("INSERT INTO batches VALUES (?, ?, ?, ?, ?, ?)", row)

    def add_bad_row(self, bad_row: BadRow) -> None:
        """Add a row that cannot be used, of a document that is not complete yet."""
        row = (bad_row.source, bad_row.place, bad_row.reason, bad_row.number)
        self._connection.execute("INSERT INTO bad_rows VALUES (?, ?, ?, ?)", row)

    def bad_rows(self, source: str) -> list[BadRow]:
        """Return the rows of a document that cannot be used, in order."""
        query = "SELECT * FROM bad_rows WHERE source = ? ORDER BY rowid"
        return [BadRow(*row) for row in self._connection.execute(query, (source,))]

    def complete(self, source: str, key: str, note: str) -> None:
        """Mark a document as complete, and make that last."""
        self._connection.execute("INSERT INTO documents VALUES (?, ?, ?)", (source, key, note))
        self._connection.commit()

    def note(self, source: str) -> str:
        """Return the note of a complete document."""
        return self._connection.execute("SELECT note FROM documents WHERE source = ?", (source,)).fetchone()[0]

    def batches(self, source: str) -> Iterator[PassageBatch]:
        """Yield the passages of a document, in order."""
        query = "SELECT lines, ids, hashes, lengths FROM batches WHERE source = ? ORDER BY number"
        for row in self._connection.execute(query, (source,)):
            yield PassageBatch(*row)

    def is_new(self, value: bytes) -> bool:
        """Return whether an id, or the hash of a passage, is new in this run, and remember it, on disk if need be."""
        return self._connection.execute("INSERT OR IGNORE INTO temp.seen VALUES (?)", (value,)).rowcount == 1

    def forget_others(self, sources: Iterable[str]) -> None:
        """Remove all documents but these."""
        kept = set(sources)
        stored = [row[0] for row in self._connection.execute("SELECT DISTINCT source FROM batches")]
        for source in stored:
            if source not in kept:
                self.discard(source)
        self._connection.commit()
