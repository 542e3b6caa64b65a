"""
The notebooks of docs/: executed with other parameters for the tests, and as they stand for the outputs in them.

    PYTHONPATH=tests python -m support.notebooks docs/notebooks/train_on_your_questions.ipynb

executes a notebook in the current folder, where it leaves its files, and writes its outputs into it.
"""

import os
import re
import sys
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient
from nbformat import NotebookNode

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "docs" / "notebooks"
ADDRESS = re.compile(r" at 0x[0-9a-f]+")


def read(path: Path) -> NotebookNode:
    """Return a notebook."""
    return nbformat.read(path, as_version=4)


def cell_with(notebook: NotebookNode, tag: str) -> NotebookNode:
    """Return the cell that has a tag."""
    (cell,) = [cell for cell in notebook.cells if tag in cell.metadata.get("tags", [])]
    return cell


def set_parameters(notebook: NotebookNode, values: dict[str, Any]) -> None:
    """
    Replace values in the cell that is tagged `parameters`.

    Raises:
        `ValueError`: for a name that the cell does not set.
    """
    cell = cell_with(notebook, "parameters")
    for name, value in values.items():
        cell.source, count = re.subn(
            rf"^{name} = .*$", lambda _, new=f"{name} = {value!r}": new, cell.source, flags=re.M
        )
        if count != 1:
            raise ValueError(f"The cell of parameters sets {name} {count} times, expected once.")


def execute(notebook: NotebookNode, folder: Path, timeout: float = 120) -> None:
    """
    Execute a notebook in place, in a new process.

    Args:
        notebook (`NotebookNode`): its outputs are replaced.
        folder (`Path`): where it runs.
        timeout (`float`): seconds for a cell.

    Raises:
        `CellExecutionError`: with the cell and its traceback.
    """
    resources = {"metadata": {"path": str(folder)}}
    client = NotebookClient(notebook, timeout=timeout, kernel_name="python3", resources=resources)
    client.execute(env={**os.environ, "IPYTHONDIR": str(folder / ".ipython")})


def text_of(cell: NotebookNode) -> str:
    """Return what a cell printed."""
    outputs = [output for output in cell.get("outputs", []) if output.get("name") == "stdout"]
    return "".join(output.text for output in outputs)


def printed(notebook: NotebookNode) -> str:
    """Return what all cells printed."""
    return "".join(text_of(cell) for cell in notebook.cells)


def clean(notebook: NotebookNode) -> None:
    """Leave only what cells printed: no progress bars and warnings, no times of execution, no addresses."""
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
        if cell.cell_type == "code":
            text = ADDRESS.sub("", text_of(cell))
            cell.outputs = [nbformat.v4.new_output("stream", name="stdout", text=text)] if text else []


def main() -> None:
    """Execute the notebooks that are named, and write their outputs into them."""
    for name in sys.argv[1:]:
        path = Path(name)
        notebook = read(path)
        execute(notebook, Path.cwd(), timeout=7200)
        clean(notebook)
        nbformat.write(notebook, path)


if __name__ == "__main__":
    main()
