"""
Make a corpus from documents: convert them to text, split it into passages, and say where each passage comes from.

    python recipes/prepare_documents.py my_documents --output_file corpus.jsonl --model out
    python recipes/prepare_documents.py "manuals/**/*.pdf" notes.md faq.jsonl --output_file corpus.jsonl.gz --model out
    python recipes/prepare_documents.py wikimedia/wikipedia --output_file corpus.jsonl --model out
    python recipes/build_index.py --model out --corpus_file corpus.jsonl --output_dir out/index

INPUT is a folder, which is searched recursively, a file, a pattern, or the name of a dataset (its split `train`,
streamed). Documents are .txt, .md, .html, .pdf and .docx files, and the rows of .jsonl, .jsonl.gz and .parquet files
and of datasets, with a text and perhaps a title, a url and metadata. Other files are ignored, and counted.

A passage has at most `passage_length` tokens, with its title, `document title › heading`. It never crosses a heading
or a page, and begins within a word only if the word alone is longer. Its metadata are `source` (the path relative to
INPUT), `page` (of a PDF, from 1), `start` and `end` (characters in the converted text) and `url` (a web page's
canonical link). Its id depends on source, row, start and end alone. A passage whose title and text occurred before is
not written again.

Documents that have not changed are not converted again: their passages are kept in `<output_file>.cache`, which may be
deleted. An interrupted run resumes there. What could not be read, documents and single rows, is printed, and stands in
the report next to the corpus, `corpus.report.json`; with `--on_error fail` it also ends the program with status 1, and
no corpus is written.
"""

import shlex
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from shared.cli import clear_errors, parse, table

from modeling_cosup.files_cosup import write_json
from modeling_cosup.lines_cosup import writing_bytes

from shared.document_cache import DocumentCache
from shared.document_conversion import check_libraries
from shared.document_files import DocumentFile, find_documents
from shared.document_work import CacheFiller
from shared.passage_splitting import PassageSplitter

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
    titles: Literal["both", "document", "heading"] = field(
        default="both",
        metadata={
            "help": "titles of passages: `document title › heading`, or one of them, if that is what the model was "
            "trained with"
        },
    )
    overlap: int = field(default=0, metadata={"help": "tokens that neighbouring passages share"})
    text_column: str = field(default="text", metadata={"help": "field of rows that holds the text"})
    on_error: Literal["skip", "fail"] = field(
        default="skip",
        metadata={"help": "what unreadable documents and rows cause: a warning, or an error and no corpus"},
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
            `unreadable` (documents, and rows of other documents) and `notes` (`source`, `reason`),
            `unreadable_documents` and `unreadable_rows` (how many), `ignored` (files by the end of their names), and
            `settings`.

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
    splitter = PassageSplitter.from_pretrained(args.model, args.passage_length, args.overlap, args.titles)
    settings = {**splitter.settings(), "text_column": args.text_column}
    output.parent.mkdir(parents=True, exist_ok=True)
    with DocumentCache(cache_file) as cache:
        filler = CacheFiller(cache, splitter, settings, args.num_workers)
        filler.fill(documents)
        unreadable = filler.unreadable
        readable = [document for document in documents if document.source not in unreadable]
        bad_rows = [bad_row for document in readable for bad_row in cache.bad_rows(document.source)]
        report: dict[str, Any] = {
            "documents": len(readable),
            "unchanged": filler.num_unchanged,
            "passages": 0,
            "tokens": {"mean": 0.0, "longest": 0},
            "duplicates": 0,
            "unreadable": [{"source": source, "reason": reason} for source, reason in unreadable.items()],
            "unreadable_documents": len(unreadable),
            "unreadable_rows": sum(bad_row.number for bad_row in bad_rows),
            "notes": notes_of(cache, readable),
            "ignored": dict(sorted(ignored.items())),
            "settings": settings,
        }
        for bad_row in bad_rows:
            report["unreadable"].append({"source": f"{bad_row.source}, {bad_row.place}", "reason": bad_row.reason})
        may_write = readable and not (report["unreadable"] and args.on_error == "fail")
        if may_write:
            report |= write_corpus(cache, readable, output)
            cache.forget_others(document.source for document in documents)
    write_json(report_file, report)
    if not may_write:
        counts = []
        if unreadable:
            counts.append(f"{len(unreadable):,} of {len(documents):,} documents")
        if bad_rows:
            counts.append(f"{report['unreadable_rows']:,} rows")
        what = f"{' and '.join(counts)} cannot be read; no corpus was written"
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


def report_path(output: Path) -> Path:
    """Return the path of the report: `corpus.report.json` for `corpus.jsonl` and `corpus.jsonl.gz`."""
    return output.with_name(f"{output.name.removesuffix('.gz').removesuffix('.jsonl')}.report.json")


def notes_of(cache: DocumentCache, documents: Iterable[DocumentFile]) -> list[dict[str, str]]:
    """Return what could not be read of documents that are in the corpus, such as pages without text."""
    notes = [{"source": document.source, "reason": cache.note(document.source)} for document in documents]
    return [note for note in notes if note["reason"]]


def write_corpus(cache: DocumentCache, documents: list[DocumentFile], output: Path) -> dict[str, Any]:
    """Write the passages of documents, each title and text once; return the figures of the report."""
    num_passages = num_duplicates = num_tokens = longest = 0
    with writing_bytes(output) as file:
        for document in documents:
            for batch in cache.batches(document.source):
                for line, id, hash, length in batch.rows():
                    if not cache.is_new(hash):
                        num_duplicates += 1
                        continue
                    if not cache.is_new(id):
                        raise ValueError(
                            f"{document.source}: two passages have the id {id.hex()}; ids must be unique."
                        )
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
        ("duplicates left out", f"{report['duplicates']:,}"),
        ("unreadable documents", f"{report['unreadable_documents']:,}"),
        ("unreadable rows of others", f"{report['unreadable_rows']:,}"),
        ("other files ignored", ignored or "0"),
    ]
    parts = [table(rows)]
    if report["notes"]:
        parts.append(f"Not all of these could be read:\n{listed(report['notes'])}")
    if report["unreadable"]:
        parts.append(f"NOT IN THE CORPUS, as they cannot be read:\n{listed(report['unreadable'])}")
    parts.append(f"All of this is in {report_path(Path(args.output_file))}. The next command:")
    output_dir = f"{args.model}/index" if Path(args.model).is_dir() else "index"  # never a folder named like a model
    files = ["--corpus_file", args.output_file, "--output_dir", output_dir]
    parts.append(f"  {shlex.join(['python', 'recipes/build_index.py', '--model', args.model, *files])}")
    return "\n".join(parts)


if __name__ == "__main__":
    main()
