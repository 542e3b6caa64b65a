"""The format of results files, and functions that read and write them. This module does not need torch."""

import math
from pathlib import Path
from typing import Any

from modeling_cosup.files_cosup import not_finite, read_json, write_json

from .figures import add_figures_of

# The format of metrics.json and results.json. Format 1 named figures differently and did not record its number.
FORMAT = 2


def read_results(path: str | Path) -> dict:
    """
    Read the `results.json` of a training or the `metrics.json` of an evaluation; add the figures that it describes.

    Args:
        path (`str` or `Path`): the file, or the results folder of an evaluation.

    Raises:
        `FileNotFoundError`: if the file does not exist, because the run is not complete.
        `ValueError`: if the file has another format, or describes a figure whose name another one has.
    """
    path = Path(path)
    if path.suffix != ".json":
        path = path / "metrics.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: there is no complete results folder at {path.parent}.")
    results = read_json(path)
    file_format = results.get("format", 1)
    if file_format != FORMAT:
        raise ValueError(
            f"{path} is of format {file_format}, expected format {FORMAT}: another version of this package wrote it "
            "and named figures differently. Run its command again into a new folder, or read it with that version."
        )
    add_figures_of(results)
    return results


def write_results(path: str | Path, results: dict[str, Any]) -> None:
    """
    Write results that may hold a number that is NaN or infinite, such as the loss of a model that diverged.

    JSON has no such number: it becomes `null`, and the entry `not_finite` says what it was, e.g.
    `{"validation.eval_loss": "nan"}`.
    """
    numbers = {entry: str(number) for entry, number in not_finite(results)}
    if numbers:
        results = {**_with_nulls(results), "not_finite": numbers}
    write_json(path, results)


def _with_nulls(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: _with_nulls(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_with_nulls(part) for part in value]
    return value
