"""The work of making passages from documents: in pieces of bounded size, by several processes, into the cache."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import zlib
from array import array
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import BrokenExecutor, Executor, Future, ProcessPoolExecutor
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from multiprocessing import get_all_start_methods, get_context
from typing import Any, TypeVar

from tqdm import tqdm

from modeling_cosup.files_cosup import digest, digest_file

from shared.document_cache import HASH_BYTES, DocumentCache, PassageBatch
from shared.document_conversion import convert
from shared.document_files import NO_CHARACTER, DocumentError, DocumentFile
from shared.document_rows import RowReader
from shared.document_sections import Document, text_file_document
from shared.passage_splitting import PassageSplitter

FORMAT = 3  # of the passages; another one splits every document again
LIBRARIES = ("pypdf", "python-docx", "semantic-text-splitter", "trafilatura")
WORK_CHARACTERS = 2**18  # of rows or sections that a worker gets at a time
WORK_ROWS = 1000
T = TypeVar("T")


@dataclass(frozen=True)
class Work:
    """What a worker splits at a time: a file that it converts as a whole, or rows or sections of a file."""

    file: DocumentFile | None = None
    documents: tuple[Document, ...] = ()


def work_of(file: DocumentFile, text_column: str, cache: DocumentCache) -> Iterator[Work]:
    """Yield the work of a document, in order, so that a large text or many rows are never in memory as a whole."""
    if file.kind in ("rows", "dataset"):
        rows = RowReader(file, text_column, cache).documents()
        for documents in _batched(rows, lambda row: sum(len(section.text) for section in row.sections)):
            yield Work(documents=tuple(documents))
    elif file.kind in ("text", "markdown"):
        assert file.path is not None
        document = text_file_document(file.path, file.source, file.kind == "markdown")
        for sections in _batched(document.sections, lambda section: len(section.text)):
            yield Work(documents=(dataclasses.replace(document, sections=sections),))
    else:
        yield Work(file)


def _batched(items: Iterable[T], size_of: Callable[[T], int]) -> Iterator[list[T]]:
    batch: list[T] = []
    size = 0
    for item in items:
        batch.append(item)
        size += size_of(item)
        if size >= WORK_CHARACTERS or len(batch) >= WORK_ROWS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def split_work(work: Work, splitter: PassageSplitter) -> PassageBatch:
    """
    Convert and split, in a worker.

    Raises:
        [`DocumentError`]: the reason why a document cannot be read.
    """
    documents = work.documents
    if work.file is not None:
        assert work.file.path is not None
        document = convert(work.file.kind, work.file.path, work.file.source)
        documents = (document,)
    lines, ids, hashes, lengths = [], [], [], array("I")
    for document in documents:
        try:
            for passage, length in splitter.passages(document):
                lines.append(json.dumps(passage, ensure_ascii=False).encode())
                ids.append(bytes.fromhex(passage["id"]))
                content = f"{passage['title']}\0{passage['text']}".encode()
                hashes.append(hashlib.blake2b(content, digest_size=HASH_BYTES).digest())
                lengths.append(length)
        except ValueError as error:
            raise DocumentError(str(error)) from None
    note = documents[0].note if documents else ""
    compressed = zlib.compress(b"\n".join(lines), 1)
    return PassageBatch(compressed, b"".join(ids), b"".join(hashes), lengths.tobytes(), note)


_splitter: PassageSplitter  # of a worker process


def _start_worker(splitter: PassageSplitter) -> None:
    global _splitter
    _splitter = splitter


def _split_in_worker(work: Work) -> PassageBatch:
    return split_work(work, _splitter)


@contextlib.contextmanager
def workers(splitter: PassageSplitter, num_workers: int) -> Iterator[Callable[[Work], Future[PassageBatch]]]:
    """Yield a function that splits in one of the worker processes; with one worker, in this process."""
    if num_workers == 1:

        def split_here(work: Work) -> Future[PassageBatch]:
            future: Future[PassageBatch] = Future()
            try:
                future.set_result(split_work(work, splitter))
            except Exception as error:
                future.set_exception(error)
            return future

        yield split_here
        return
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes take all cores
    method = "fork" if "fork" in get_all_start_methods() else None
    pool: Executor = ProcessPoolExecutor(num_workers, get_context(method), _start_worker, (splitter,))
    try:
        yield lambda work: pool.submit(_split_in_worker, work)
    finally:
        pool.shutdown(cancel_futures=True)


class CacheFiller:
    """
    Splits documents that the cache does not hold.

    Args:
        cache ([`DocumentCache`]): gets the passages.
        splitter ([`PassageSplitter`]): makes them.
        settings (`dict`): what the passages depend on apart from the file, as JSON values; with `text_column`.
        num_workers (`int`): number of processes; 1 is this one.

    Attributes:
        num_unchanged (`int`): documents that the cache held.
        unreadable (`dict[str, str]`): reasons why documents cannot be read, by source.
    """

    def __init__(
        self, cache: DocumentCache, splitter: PassageSplitter, settings: dict[str, Any], num_workers: int
    ) -> None:
        self.cache, self.splitter, self.num_workers = cache, splitter, num_workers
        self.text_column = settings["text_column"]
        self.key_parts = [FORMAT, settings, {name: _library_version(name) for name in LIBRARIES}]
        self.num_unchanged = 0
        self.unreadable: dict[str, str] = {}
        # work in progress, in order; the end of a document has its key in place of a future
        self._pending: deque[tuple[str, int, Future[PassageBatch] | str]] = deque()
        self._num_passages = 0  # of the document whose work is taken
        self._note = ""

    def fill(self, documents: list[DocumentFile]) -> None:
        """
        Split all documents.

        Raises:
            `OSError`: if a worker dies.
        """
        try:
            with workers(self.splitter, self.num_workers) as split:
                for document in tqdm(documents, desc="Documents", unit=" documents"):
                    self._begin(document, split)
                while self._pending:
                    self._take()
        except BrokenExecutor as error:
            sources = ", ".join(dict.fromkeys(source for source, *_ in self._pending))
            raise OSError(
                f"a worker process died, perhaps for lack of memory, on one of {sources}. Documents before these are"
                " kept: the same command resumes there."
            ) from error

    def _begin(self, document: DocumentFile, split: Callable[[Work], Future[PassageBatch]]) -> None:
        """Begin the work of a document, unless the cache holds it; finish older work, so that little is in memory."""
        source, key = document.source, ""
        try:
            if document.path is not None:
                key = digest([*self.key_parts, digest_file(document.path)])
                if self.cache.holds(source, key):
                    self.num_unchanged += 1
                    return
            self.cache.discard(source)
            for number, work in enumerate(work_of(document, self.text_column, self.cache)):
                self._pending.append((source, number, split(work)))
                while len(self._pending) > 4 * self.num_workers:
                    self._take()
                if source in self.unreadable:
                    break
        except (ValueError, OSError) as error:
            self._refuse(source, str(error))
        self._pending.append((source, 0, key))

    def _take(self) -> None:
        """Take the oldest result into the cache, or end its document."""
        source, number, result = self._pending[0]
        if isinstance(result, str):
            self._end(source, result)
        else:
            try:
                batch = result.result()
                self.cache.add(source, number, batch)
                self._num_passages += len(batch.lengths)
                self._note = batch.note
            except (DocumentError, OSError) as error:
                self._refuse(source, str(error))
        self._pending.popleft()

    def _refuse(self, source: str, reason: str) -> None:
        self.unreadable.setdefault(source, NO_CHARACTER.sub("\ufffd", reason))

    def _end(self, source: str, key: str) -> None:
        if not self._num_passages:
            self._refuse(source, "it holds no text")
        if source in self.unreadable:
            self.cache.discard(source)
        else:
            self.cache.complete(source, key, self._note)
        self._num_passages, self._note = 0, ""


def _library_version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
