"""
Make a corpus from documents: convert them to text, split it into passages, and say where each passage comes from.

    python recipes/prepare_documents.py docs --output_file corpus.jsonl --model out
    python recipes/prepare_documents.py "manuals/**/*.pdf" notes.md faq.jsonl --output_file corpus.jsonl.gz --model out
    python recipes/prepare_documents.py wikimedia/wikipedia --output_file corpus.jsonl --model out
    python recipes/build_index.py --model out --corpus_file corpus.jsonl --output_dir out/index

INPUT is a folder, which is searched recursively, a file, a pattern, or the name of a dataset (its split `train`,
streamed). Documents are .txt, .md, .html, .pdf and .docx files, and the rows of .jsonl, .jsonl.gz and .parquet files
and of datasets, with a text and perhaps a title, a url and metadata. Other files are ignored, and counted.

A passage has at most `passage_length` tokens, with its title, `document title › heading`. It never crosses a heading
or a page, and begins within a word only if the word alone is longer. Its metadata are `source` (the path relative to
INPUT), `page` (of a PDF, from 1), `start` and `end` (characters in the converted text) and `url` (a web page's
canonical link). Its id depends on source, row, start and end alone. A text that occurs twice is written once, where it
occurs first.

Documents that have not changed are not converted again: their passages are kept in `<output_file>.cache`, which may be
deleted. An interrupted run resumes there. What could not be read stands in `<output_file without .jsonl>.report.json`.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import zlib
from array import array
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import BrokenExecutor, Executor, Future, ProcessPoolExecutor
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from multiprocessing import get_all_start_methods, get_context
from pathlib import Path
from typing import Any, Literal

from shared.cli import clear_errors, parse, table

from tqdm import tqdm

from modeling_cosup.corpus_cosup import read_files
from modeling_cosup.files_cosup import digest, digest_file, write_json
from modeling_cosup.lines_cosup import writing_bytes
from modeling_cosup.metadata_cosup import check_metadata
from modeling_cosup.passages_cosup import check_text

from shared.document_cache import HASH_BYTES, DocumentCache, PassageBatch
from shared.document_conversion import check_libraries, convert
from shared.document_files import DocumentError, DocumentFile, find_documents
from shared.document_sections import Document, row_sections, text_file_document
from shared.passage_splitting import PassageSplitter

FORMAT = 1  # of the passages; another one splits every document again
LIBRARIES = ("pypdf", "python-docx", "semantic-text-splitter", "trafilatura")
WORK_CHARACTERS = 2**18  # of rows or sections that a worker gets at a time
WORK_ROWS = 1000
LARGEST = 10**15  # more characters than any text has
MAX_SHOWN = 20  # unreadable documents that are printed


@dataclass(kw_only=True)
class DocumentArguments:
    """The documents to read, and how they are split."""

    inputs: list[str] = field(metadata={"help": "folders, files, patterns and names of datasets", "positional": True})
    output_file: str = field(metadata={"help": "passages, JSON Lines (compressed if the name ends in .gz)"})
    model: str = field(
        metadata={"local_or_hub": True, "help": "CoSup checkpoint whose Emb_seq will read the passages"}
    )
    passage_length: int | None = field(
        default=None, metadata={"help": "most tokens of a passage; defaults to the model's max_passage_length"}
    )
    overlap: int = field(default=0, metadata={"help": "tokens that neighbouring passages share"})
    text_column: str = field(default="text", metadata={"help": "field of rows that holds the text"})
    on_error: Literal["skip", "fail"] = field(
        default="skip",
        metadata={"help": "what unreadable documents cause: a warning, or an error before a corpus is written"},
    )
    num_workers: int = field(default=1, metadata={"help": "processes that convert and split"})


def main() -> None:
    """Read the options, prepare the corpus, and print what it holds."""
    (args,) = parse([DocumentArguments], __doc__)
    with clear_errors():
        report = prepare(args)
        print(summary(report, args))


def prepare(args: DocumentArguments) -> dict[str, Any]:
    """
    Write the corpus and its report.

    Returns:
        `dict`: the report: `documents`, `unchanged`, `passages`, `tokens` (`mean`, `longest`), `duplicates`,
            `unreadable` and `notes` (`source`, `reason`), `ignored` (files by the end of their names), and `settings`.

    Raises:
        `ValueError`, `OSError`: for wrong options, if no passage is left, or with `on_error="fail"` for unreadable
            documents; then no corpus is written.
        `ImportError`: if a library is not installed.
    """
    check(args)
    output = Path(args.output_file)
    report_file, cache_file = report_path(output), output.with_name(f"{output.name}.cache")
    excluded = [output, report_file] + [Path(f"{cache_file}{ending}") for ending in ("", "-wal", "-shm", "-journal")]
    documents, ignored = find_documents(args.inputs, excluded)
    if not documents:
        raise ValueError(f"{', '.join(args.inputs)}: no document, but {ignored.total():,} other files.")
    check_libraries({document.kind for document in documents})
    splitter = PassageSplitter.from_pretrained(args.model, args.passage_length, args.overlap)
    settings = {**splitter.settings(), "text_column": args.text_column}
    output.parent.mkdir(parents=True, exist_ok=True)
    with DocumentCache(cache_file) as cache:
        unchanged, unreadable = fill(cache, documents, splitter, settings, args.num_workers)
        readable = [document for document in documents if document.source not in unreadable]
        report: dict[str, Any] = {
            "documents": len(readable),
            "unchanged": unchanged,
            "passages": 0,
            "tokens": {"mean": 0.0, "longest": 0},
            "duplicates": 0,
            "unreadable": [{"source": source, "reason": reason} for source, reason in unreadable.items()],
            "notes": notes_of(cache, readable),
            "ignored": dict(sorted(ignored.items())),
            "settings": settings,
        }
        may_write = readable and not (unreadable and args.on_error == "fail")
        if may_write:
            report |= write_corpus(cache, readable, output)
            cache.forget_others(document.source for document in documents)
    write_json(report_file, report)
    if not may_write:
        what = f"{len(unreadable):,} of {len(documents):,} documents cannot be read; no corpus was written"
        raise ValueError(f"{what}. All are listed in {report_file}.\n{listed(report['unreadable'])}")
    return report


def check(args: DocumentArguments) -> None:
    """Raise `ValueError` for a wrong option, before anything is read."""
    if not args.output_file.endswith((".jsonl", ".jsonl.gz")):
        raise ValueError(f"output_file is {args.output_file!r}, expected a name that ends in .jsonl or .jsonl.gz.")
    if Path(args.output_file).is_dir():
        raise ValueError(f"output_file is {args.output_file!r}, which is a folder.")
    if args.num_workers < 1:
        raise ValueError(f"num_workers is {args.num_workers}, expected at least 1.")


def library_version(name: str) -> str | None:
    """Return the version of an installed package, or `None`."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def report_path(output: Path) -> Path:
    """Return the path of the report: `corpus.report.json` for `corpus.jsonl` and `corpus.jsonl.gz`."""
    return output.with_name(f"{output.name.removesuffix('.gz').removesuffix('.jsonl')}.report.json")


# ---------------------------------------------------------------------- work


@dataclass(frozen=True)
class Work:
    """What a worker splits at a time: a file that it converts as a whole, or rows or sections of a file."""

    file: DocumentFile | None = None
    documents: tuple[Document, ...] = ()


def work_of(file: DocumentFile, text_column: str) -> Iterator[Work]:
    """Yield the work of a document, in order, so that a large text or many rows are never in memory as a whole."""
    if file.kind in ("rows", "dataset"):
        for documents in _batched(_row_documents(file, text_column)):
            yield Work(documents=tuple(documents))
    elif file.kind in ("text", "markdown"):
        assert file.path is not None
        document = text_file_document(file.path, file.source, file.kind == "markdown")
        parts = (dataclasses.replace(document, sections=[section]) for section in document.sections)
        for documents in _batched(parts):
            yield Work(documents=tuple(documents))
    else:
        yield Work(file)


def _batched(documents: Iterable[Document]) -> Iterator[list[Document]]:
    batch: list[Document] = []
    size = 0
    for document in documents:
        batch.append(document)
        size += sum(len(section.text) for section in document.sections)
        if size >= WORK_CHARACTERS or len(batch) >= WORK_ROWS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _row_documents(file: DocumentFile, text_column: str) -> Iterator[Document]:
    for number, (where, row) in enumerate(_rows(file)):
        text = check_text(row.get(text_column), text_column, where, may_be_empty=True)
        title = check_text(row.get("title") or "", "title", where, may_be_empty=True)
        metadata = {**(check_metadata(row.get("metadata"), where) or {}), "source": file.source}
        id = row.get("id")
        metadata["row"] = id if isinstance(id, str) and id else number
        if isinstance(row.get("url"), str) and row["url"]:
            metadata["url"] = row["url"]
        check_metadata({**metadata, "start": LARGEST, "end": LARGEST}, where)
        yield Document(f"{file.source}#{metadata['row']}", title, list(row_sections(text)), metadata)


def _rows(file: DocumentFile) -> Iterator[tuple[str, dict[str, Any]]]:
    if file.path is not None:
        yield from read_files([file.path])
        return
    from datasets import load_dataset

    for number, row in enumerate(load_dataset(file.source, split="train", streaming=True)):
        yield f"{file.source}, row {number}", row


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
                hashes.append(hashlib.blake2b(passage["text"].encode(), digest_size=HASH_BYTES).digest())
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
def workers(splitter: PassageSplitter, num_workers: int) -> Iterator[Callable[[Work], "Future[PassageBatch]"]]:
    """Yield a function that splits in one of the worker processes; with one worker, in this process."""
    if num_workers == 1:

        def split_here(work: Work) -> "Future[PassageBatch]":
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


def fill(
    cache: DocumentCache,
    documents: list[DocumentFile],
    splitter: PassageSplitter,
    settings: dict[str, Any],
    num_workers: int,
) -> tuple[int, dict[str, str]]:
    """
    Split all documents that the cache does not hold.

    Returns:
        `(unchanged, unreadable)`: the number of documents that the cache held, and why others cannot be read, by
            source.
    """
    versions = {name: library_version(name) for name in LIBRARIES}
    base_key = [FORMAT, settings, versions]
    unreadable: dict[str, str] = {}
    unchanged = 0
    # the work in progress, in order; without a future: the end of a document, and its key
    pending: deque[tuple[DocumentFile, int, Future[PassageBatch] | None, str]] = deque()
    notes: dict[str, str] = {}
    num_passages: Counter[str] = Counter()

    def take() -> None:
        document, number, future, key = pending.popleft()
        source = document.source
        if future is not None:
            try:
                batch = future.result()
            except (DocumentError, OSError) as error:
                unreadable.setdefault(source, str(error))
                return
            except BrokenExecutor as error:
                sources = list(dict.fromkeys([source, *(entry[0].source for entry in pending)]))
                raise OSError(
                    f"a worker process died, perhaps for lack of memory, on one of {', '.join(sources)}. Documents"
                    " before these are kept: the same command resumes there."
                ) from error
            cache.add(source, number, batch)
            num_passages[source] += len(batch.lengths)
            notes[source] = batch.note
            return
        if not num_passages.pop(source, 0):
            unreadable.setdefault(source, "it holds no text")
        if source in unreadable:
            cache.discard(source)
        else:
            cache.complete(source, key, notes.pop(source, ""))

    with workers(splitter, num_workers) as split, tqdm(documents, desc="Documents", unit=" documents") as bar:
        for document in bar:
            try:
                key = digest([*base_key, document.path and digest_file(document.path)])
                if document.path is not None and cache.holds(document.source, key):
                    unchanged += 1
                    continue
                cache.discard(document.source)
                for number, work in enumerate(work_of(document, settings["text_column"])):
                    pending.append((document, number, split(work), ""))
                    while len(pending) > 4 * num_workers:
                        take()
                    if document.source in unreadable:
                        break
            except (ValueError, OSError) as error:
                unreadable.setdefault(document.source, str(error))
            pending.append((document, 0, None, key))
        while pending:
            take()
    return unchanged, unreadable


def notes_of(cache: DocumentCache, documents: Iterable[DocumentFile]) -> list[dict[str, str]]:
    """Return what could not be read of documents that are in the corpus, such as pages without text."""
    notes = [{"source": document.source, "reason": cache.note(document.source)} for document in documents]
    return [note for note in notes if note["reason"]]


def write_corpus(cache: DocumentCache, documents: list[DocumentFile], output: Path) -> dict[str, Any]:
    """Write the passages of documents, each text once; return the figures of the report."""
    num_passages = num_duplicates = num_tokens = longest = 0
    with writing_bytes(output) as file:
        for document in documents:
            for batch in cache.batches(document.source):
                for line, id, hash, length in batch.rows():
                    if not cache.is_new(hash):
                        num_duplicates += 1
                        continue
                    if not cache.is_new(id):
                        row = json.loads(line)["metadata"].get("row")
                        raise ValueError(f"{document.source}: two rows have the id {row!r}; ids must be unique.")
                    file.write(line + b"\n")
                    num_passages += 1
                    num_tokens += length
                    longest = max(longest, length)
    tokens = {"mean": round(num_tokens / num_passages, 1), "longest": longest}
    return {"passages": num_passages, "tokens": tokens, "duplicates": num_duplicates}


# ---------------------------------------------------------------------- what is printed


def listed(reasons: list[dict[str, str]]) -> str:
    """Return documents and reasons, one per line."""
    lines = [f"  {entry['source']}: {entry['reason']}" for entry in reasons[:MAX_SHOWN]]
    if len(reasons) > MAX_SHOWN:
        lines.append(f"  … and {len(reasons) - MAX_SHOWN:,} more")
    return "\n".join(lines)


def summary(report: dict[str, Any], args: DocumentArguments) -> str:
    """Return what was made, what could not be read, and the next command."""
    ignored = ", ".join(f"{count:,} {ending}" for ending, count in report["ignored"].items() if count)
    rows = [
        ("documents", f"{report['documents']:,}, {report['unchanged']:,} of them unchanged"),
        ("passages", f"{report['passages']:,}"),
        ("tokens of a passage", f"{report['tokens']['mean']} on average, {report['tokens']['longest']:,} at most"),
        ("duplicate texts left out", f"{report['duplicates']:,}"),
        ("unreadable documents", f"{len(report['unreadable']):,}"),
        ("other files ignored", ignored or "0"),
    ]
    parts = [table(rows)]
    if report["notes"]:
        parts.append(f"Not all of these could be read:\n{listed(report['notes'])}")
    if report["unreadable"]:
        parts.append(f"NOT IN THE CORPUS, as they cannot be read:\n{listed(report['unreadable'])}")
    parts.append(f"All of this is in {report_path(Path(args.output_file))}. The next command:")
    parts.append(
        f"  python recipes/build_index.py --model {args.model} --corpus_file {args.output_file} --output_dir"
        f" {args.model}/index"
    )
    return "\n".join(parts)


if __name__ == "__main__":
    main()
