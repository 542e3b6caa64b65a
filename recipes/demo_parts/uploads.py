"""Corpora that users upload: JSON Lines, CSV, or paragraphs of a text, `.gz` or plain."""

import csv
import difflib
import gzip
import io
import json
import zlib
from pathlib import Path

MAX_BYTES = 5 * 2**20  # of an uploaded corpus, unpacked
MAX_PASSAGES = 2000
MAX_TEXT = 10_000  # characters of a passage
FORMATS = [".jsonl", ".gz", ".txt", ".csv"]


def read_upload(path: str) -> list[dict[str, str]]:
    """
    Read the passages of an uploaded corpus.

    Args:
        path (`str`): a `.jsonl` file (one object per line, with `text` and optionally `id` and `title`), a `.csv` file
            (with the same names as columns) or a `.txt` file (one passage per paragraph); or one of them as `.gz`.

    Returns:
        `list[dict]`: `{"id", "title", "text"}`; a passage without an id gets its line number.

    Raises:
        `ValueError`: names the line, what was found and what was expected; never the path.
    """
    suffixes = [suffix.lower() for suffix in Path(path).suffixes]
    ending = "".join(suffixes[-2:])
    is_packed = suffixes[-1:] == [".gz"]
    if is_packed:
        suffixes.pop()
    readers = {".jsonl": _read_jsonl, ".csv": _read_csv, ".txt": _read_paragraphs}
    if not suffixes or suffixes[-1] not in readers:
        raise ValueError(f"The file's name ends in {ending or 'nothing'!r}, expected .jsonl, .jsonl.gz, .txt or .csv.")
    read = readers[suffixes[-1]]
    passages = []
    lines = {}  # passage id -> line
    for line, value in read(_decode(path, is_packed)):
        if len(passages) == MAX_PASSAGES:
            raise ValueError(
                f"Line {line}: the corpus holds more than {MAX_PASSAGES:,} passages, the most for this demo."
            )
        _check_keys(value, line)
        id = value.get("id")
        if id is None or id == "":
            id = f"line {line}"
        elif type(id) is int:  # a bool is no id
            id = str(id)
        passage = {"id": id, "title": value.get("title") or "", "text": value.get("text")}
        _check_passage(passage, line)
        if isinstance(value.get("metadata"), dict):  # the index checks it
            passage["metadata"] = value["metadata"]
        if id in lines:
            raise ValueError(f"Line {line}: id {shorten(id)} is already in line {lines[id]}; ids must be unique.")
        lines[id] = line
        passages.append(passage)
    if not passages:
        raise ValueError("The file holds no passage.")
    return passages


def _check_keys(value, line):
    """Refuse a key that is nearly the name of a missing field, such as "titel"; further keys are ignored."""
    missing = [name for name in ("id", "title", "text") if value.get(name) is None]
    for key in value:
        nearest = difflib.get_close_matches(key.lower(), missing, n=1, cutoff=0.8)
        if nearest and value[key] is not None:
            raise ValueError(f"Line {line}: unknown key {shorten(key)}; did you mean {nearest[0]!r}?")


def _check_passage(passage, line):
    for name, value in passage.items():
        if not isinstance(value, str):
            expected = "a string that is not empty" if name == "text" else "a string"
            raise ValueError(f"Line {line}: {name} is {shorten(value)}, expected {expected}.")
        if name == "text" and not value.strip():
            raise ValueError(f"Line {line}: text is {'only white space' if value else 'empty'}, expected a text.")
        if len(value) > MAX_TEXT:
            raise ValueError(f"Line {line}: {name} has {len(value):,} characters, expected {MAX_TEXT:,} at most.")
        if any("\ud800" <= character <= "\udfff" for character in value):
            raise ValueError(f"Line {line}: {name} holds half a surrogate pair, which is not a character.")


def _decode(path, is_packed):
    open_file = gzip.open if is_packed else open
    try:
        with open_file(path, "rb") as file:
            data = file.read(MAX_BYTES + 1)
    except (EOFError, gzip.BadGzipFile, zlib.error):
        raise ValueError("The file is not a complete .gz file.") from None
    if len(data) > MAX_BYTES:
        unpacked = " when it is unpacked" if is_packed else ""
        raise ValueError(f"The file holds more than {MAX_BYTES // 2**20} MB{unpacked}, the most for this demo.")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        byte = data[error.start]
        raise ValueError(f"Line {line}: the byte 0x{byte:02x} is not UTF-8; save the file in this encoding.") from None


def _read_jsonl(text):
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"Line {number}: malformed JSON ({error.msg}, column {error.colno}).") from None
        except (ValueError, RecursionError):  # a number with too many digits, too many brackets
            raise ValueError(f"Line {number}: this JSON cannot be read.") from None
        if not isinstance(value, dict):
            raise ValueError(f"Line {number}: found {shorten(value)}, expected a JSON object with a text.")
        yield number, value


def _read_csv(text):
    rows = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    try:
        columns = rows.fieldnames or []
        if "text" not in columns:
            raise ValueError(f"Line 1: found the columns {shorten(', '.join(columns))}, expected one named text.")
        for row in rows:
            if None in row or None in row.values():
                amount = "more" if None in row else "fewer"
                raise ValueError(f"Line {rows.line_num}: found {amount} cells than the {len(columns)} columns.")
            yield rows.line_num, row
    except csv.Error as error:
        raise ValueError(f"Line {rows.line_num}: malformed CSV ({error}).") from None


def _read_paragraphs(text):
    paragraph, start = [], 1
    for number, line in enumerate([*text.split("\n"), ""], 1):  # the empty line ends the last paragraph
        if line.strip():
            if not paragraph:
                start = number
            paragraph.append(line.strip())
        elif paragraph:
            yield start, {"text": "\n".join(paragraph)}
            paragraph = []


def shorten(value: object) -> str:
    """Return `repr(value)`, shortened for a message."""
    shown = repr(value)
    return shown if len(shown) <= 60 else f"{shown[:60]}…"
