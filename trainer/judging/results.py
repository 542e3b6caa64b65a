"""The format of results files, and a function that reads them. This module does not need torch."""

from pathlib import Path

from modeling_cosup.files_cosup import read_json

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
