"""The rows of files and datasets as documents; a row that cannot be used is left out and listed."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any

from modeling_cosup.corpus_cosup import read_files
from modeling_cosup.metadata_cosup import check_metadata
from modeling_cosup.passages_cosup import check_id, check_text

from shared.document_cache import BadRow, DocumentCache
from shared.document_files import NO_CHARACTER, DocumentError, DocumentFile
from shared.document_sections import WORD, Document, row_sections

MAX_BAD_ROWS = 1000  # of a document, that are listed one by one
ROW_HASH_BYTES = 12  # unlike the ids and hashes of passages
LARGEST = 10**15  # more characters than any text has


class RowReader:
    """
    Reads the rows of a file or a dataset, and counts those that cannot be used.

    Args:
        file ([`DocumentFile`]): the file or dataset.
        text_column (`str`): field of rows that holds the text.
        cache ([`DocumentCache`]): gets the rows that cannot be used, and knows the ids that there were.
    """

    def __init__(self, file: DocumentFile, text_column: str, cache: DocumentCache) -> None:
        self.file, self.text_column, self.cache = file, text_column, cache
        self.num_rows = 0
        self.num_bad_rows = 0
        self.first_error = ""

    def documents(self) -> Iterator[Document]:
        """Yield a document for each row that can be used."""
        for where, row in self._rows():
            try:
                document = self._document(where, row)
            except ValueError as error:
                self._refuse(where, error)
                continue
            self.num_rows += 1
            yield document
        more = self.num_bad_rows - MAX_BAD_ROWS
        if more > 0:
            self.cache.add_bad_row(BadRow(self.file.source, "further rows", f"{more:,} that are not listed", more))
        if self.num_bad_rows == self.num_rows > 0:
            raise DocumentError(f"none of its {self.num_rows:,} rows can be used: {self.first_error}")

    def _rows(self) -> Iterator[tuple[str, dict[str, Any]]]:
        file = self.file
        if file.path is not None:
            yield from read_files([file.path], (self.text_column,), self._refuse)
            return
        from datasets import load_dataset

        for number, row in enumerate(load_dataset(file.source, split="train", streaming=True)):
            yield f"{file.source}, row {number}", row

    def _document(self, where: str, row: dict[str, Any]) -> Document:
        source = self.file.source
        text = check_text(row.get(self.text_column), self.text_column, where, may_be_empty=True)
        if not WORD.search(text):
            raise ValueError(f"{where}: it holds no text.")
        title = check_text(row.get("title") or "", "title", where, may_be_empty=True)
        metadata = {**(check_metadata(row.get("metadata"), where) or {}), "source": source}
        metadata["row"] = self.num_rows if row.get("id") in (None, "") else check_id(row["id"], where)
        if isinstance(row.get("url"), str) and row["url"]:
            metadata["url"] = row["url"]
        check_metadata({**metadata, "start": LARGEST, "end": LARGEST}, where)
        id = f"{source}#{metadata['row']}"
        if not self.cache.is_new(hashlib.blake2b(id.encode(), digest_size=ROW_HASH_BYTES).digest()):
            raise ValueError(f"{where}: an earlier row has the id {metadata['row']!r} too; ids must be unique.")
        return Document(id, title, list(row_sections(text)), metadata)

    def _refuse(self, where: str, error: ValueError) -> None:
        """Leave out a row, but count it: the numbers of other rows, from which ids are made, do not change."""
        place = where.rpartition(", ")[2]
        reason = NO_CHARACTER.sub("\ufffd", str(error).removeprefix(f"{where}: "))
        self.num_rows += 1
        self.num_bad_rows += 1
        if self.num_bad_rows == 1:
            self.first_error = f"{place}: {reason}"
        if self.num_bad_rows <= MAX_BAD_ROWS:
            self.cache.add_bad_row(BadRow(self.file.source, place, reason))
