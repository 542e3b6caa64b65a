"""The file of results: its format, and how it is read. Needs no torch."""

from pathlib import Path

from modeling_cosup.files_cosup import read_json

FORMAT = 2  # of metrics.json and results.json; 1 had other names of figures, and no number


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
    results = read_json(path)
    if (found := results.get("format", 1)) != FORMAT:
        raise ValueError(
            f"{path} is of format {found}, expected format {FORMAT}: another version of this package wrote it, with "
            "other names of figures. Run its command again into a new folder, or read it with that version."
        )
    return results
