"""The files of a results folder: how they are written and read. Needs no torch."""

import json
from collections.abc import Iterable
from pathlib import Path

from modeling_cosup.corpus_cosup import read_jsonl

FORMAT = 2  # of metrics.json and results.json; 1 had other names of figures, and no number


def read_lines(path: str | Path) -> list[dict]:
    """The rows of a JSON Lines file; `ValueError` names a line that is damaged."""
    return [row for _, row in read_jsonl(path)]


def write_lines(path: Path, rows: Iterable[dict]) -> None:
    """Write JSON Lines so that `path` holds all of them or is not there."""
    unfinished = path.with_name(f".{path.name}.unfinished")
    with open(unfinished, "w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    unfinished.replace(path)


def read_results(path: str | Path) -> dict:
    """
    `results.json` of a training, or `metrics.json` of an evaluation.

    Args:
        path (`str` or `Path`): the file, or the results folder of an evaluation.

    Raises:
        `FileNotFoundError`: when it is not there: the run is not complete.
        `ValueError`: when it is of another format.
    """
    path = Path(path)
    if path.suffix != ".json":
        path = path / "metrics.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not there: {path.parent} is no complete results folder.")
    results = json.loads(path.read_text(encoding="utf-8"))
    if (found := results.get("format", 1)) != FORMAT:
        raise ValueError(
            f"{path} is of format {found}, expected format {FORMAT}: another version of this package wrote it, with "
            "other names of figures. Run its command again into a new folder, or read it with that version."
        )
    return results
