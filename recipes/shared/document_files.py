"""The documents that the inputs of `prepare_documents.py` name: folders, patterns, files and datasets."""

import glob
import os
import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

from shared.cli import check_place

KINDS = {
    ".txt": "text",
    ".md": "markdown",
    ".markdown": "markdown",
    ".html": "html",
    ".htm": "html",
    ".pdf": "pdf",
    ".docx": "docx",
    ".jsonl": "rows",
    ".jsonl.gz": "rows",
    ".parquet": "rows",
}


NO_CHARACTER = re.compile("[\x00\ud800-\udfff]")  # of names that are not UTF-8, and of PDF files with damaged fonts


class DocumentError(ValueError):
    """A document that cannot be read; the message is the reason."""


@dataclass(frozen=True)
class DocumentFile:
    """
    A document, or a file of documents.

    Args:
        source (`str`): path relative to its input, with `/` between names, and U+FFFD for bytes that are no UTF-8; or
            the name of a dataset.
        kind (`str`): one of the values of `KINDS`, or `"dataset"`.
        path (`Path`, *optional*): the file.
    """

    source: str
    kind: str
    path: Path | None = None


def kind_of(path: str | Path) -> str | None:
    """Return what a file holds by the end of its name, one of the values of `KINDS`; `None` for other files."""
    suffixes = [suffix.lower() for suffix in Path(path).suffixes]
    return KINDS.get("".join(suffixes[-2:])) or KINDS.get("".join(suffixes[-1:]))


def find_documents(inputs: Sequence[str], excluded: Collection[Path]) -> tuple[list[DocumentFile], Counter[str]]:
    """
    Return the documents of all inputs, and how many other files were ignored, by the end of their names.

    Folders are searched recursively and sorted by name. Hidden files and folders, and links to folders, count as
    ignored. Links to files are followed, also out of the folder: the Hub's cache is made of them.

    Args:
        inputs (`list[str]`): folders, files, patterns such as `"docs/**/*.md"`, and names of datasets.
        excluded (collection of `Path`): files to leave out, such as the output, which may lie among the documents.

    Raises:
        `FileNotFoundError`: for an input that does not exist, or a pattern without a file.
        `PermissionError`: for a folder that cannot be read.
        `ValueError`: for a file of an unknown format, two files with the same relative path, or an input that is one
            of `excluded`.
    """
    documents: dict[str, DocumentFile] = {}
    ignored: Counter[str] = Counter()
    left_out = {path.resolve() for path in excluded}
    for name in inputs:
        for document in _documents_of(name, left_out, ignored):
            same = documents.setdefault(document.source, document)
            if same != document and _are_different(same, document):
                raise ValueError(
                    f"{same.path} and {document.path} have the same relative path {document.source!r}, from which ids"
                    " are made: name a folder that holds both."
                )
    return list(documents.values()), ignored


def _are_different(first: DocumentFile, second: DocumentFile) -> bool:
    if first.path is None or second.path is None:
        return True
    return not os.path.samefile(first.path, second.path)


def _documents_of(name: str, left_out: set[Path], ignored: Counter[str]) -> Iterator[DocumentFile]:
    path = Path(name)
    if path.is_dir():
        yield from _documents_among(_in_folder(path, ignored), path, left_out, ignored)
    elif path.is_file():
        kind = kind_of(path)
        if kind is None:
            raise ValueError(f"{name}: the format is not known, expected a file that ends in {', '.join(KINDS)}.")
        if path.resolve() in left_out:
            raise ValueError(f"{name} is an input, and would be overwritten: name another output_file.")
        yield DocumentFile(NO_CHARACTER.sub("\ufffd", path.name), kind, path)
    elif glob.has_magic(name):
        folder, paths = _of_pattern(name, ignored)
        yield from _documents_among(paths, folder, left_out, ignored)
    else:
        check_place(name, name)
        yield DocumentFile(name, "dataset")


def _in_folder(folder: Path, ignored: Counter[str]) -> Iterator[Path]:
    """Yield the files of a folder that are not hidden, sorted."""

    def refuse(error: OSError) -> None:
        raise error

    for parent, folders, files in os.walk(folder, onerror=refuse):
        hidden = [name for name in (*folders, *files) if name.startswith(".")]
        if hidden:
            ignored["hidden"] += len(hidden)
        folders[:] = sorted(set(folders).difference(hidden))
        linked = [name for name in folders if Path(parent, name).is_symlink()]  # os.walk does not follow them
        if linked:
            ignored["links to folders"] += len(linked)
        yield from (Path(parent, name) for name in sorted(files) if not name.startswith("."))


def _of_pattern(pattern: str, ignored: Counter[str]) -> tuple[Path, list[Path]]:
    """Return the folder before the first wildcard, and the files below it that match."""
    parts = Path(pattern).parts
    num_plain = next(number for number, part in enumerate(parts) if glob.has_magic(part))
    folder = Path(*parts[:num_plain])
    skipped: dict[Path, str] = {}
    paths = set(_matches(folder, parts[num_plain:], skipped)) if folder.is_dir() else set()
    if not paths:
        raise FileNotFoundError(f"{pattern}: no file has such a name.")
    ignored.update(skipped.values())
    return folder, sorted(paths)


def _matches(folder: Path, parts: Sequence[str], skipped: dict[Path, str]) -> Iterator[Path]:
    """Yield the files below a folder that match; unlike `glob`, follow no link to a folder, which may lead back."""
    part, *rest = parts
    at_any_depth = part == "**"
    if at_any_depth:
        yield from _matches(folder, rest or ["*"], skipped)
    try:
        paths = list(folder.iterdir())
    except PermissionError:
        skipped[folder] = "folders that may not be read"
        return
    for path in paths:
        is_folder = path.is_dir()
        if not (at_any_depth or fnmatch(path.name, part)) or is_folder != (at_any_depth or bool(rest)):
            continue
        if path.name.startswith(".") and not part.startswith("."):
            skipped[path] = "hidden"
        elif is_folder and path.is_symlink():
            skipped[path] = "links to folders"
        elif is_folder:
            yield from _matches(path, parts if at_any_depth else rest, skipped)
        elif path.is_file():
            yield path


def _documents_among(
    paths: Iterable[Path], folder: Path, left_out: set[Path], ignored: Counter[str]
) -> Iterator[DocumentFile]:
    for path in paths:
        if path.resolve() in left_out:
            continue
        kind = kind_of(path)
        if path.exists() and not path.is_file():
            ignored["pipes and devices"] += 1  # to read one may take for ever
        elif kind is None:
            ignored[path.suffix.lower() or "no suffix"] += 1
        else:
            source = NO_CHARACTER.sub("\ufffd", path.relative_to(folder).as_posix())
            yield DocumentFile(source, kind, path)
