"""
The index of `--index` and `--index_uri`: a folder, a dataset repository on the Hub, or a collection in Milvus; and
what the recipes that build an index or a memory have in common.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from shared.cli import check_place

if TYPE_CHECKING:  # a recipe that only prints its options does not wait for torch
    from modeling_cosup import CoSupForCausalLM, Retriever

INDEX_HELP = "name or path of an index; with --index_uri the name of a Milvus collection"
INDEX_URI_HELP = (
    "Milvus server (http://host:19530) or local file (.db) that holds the index, with its token in the variable "
    "MILVUS_TOKEN"
)

THREADS_HELP = "CPU threads of a process. Default: all cores for a single process."

FAISS_HELP = "let FAISS read the file of an approximate index or memory; do so only if you trust its maker"

FILE_SUFFIXES = (".jsonl", ".jsonl.gz", ".json", ".json.gz", ".parquet")


def check_index_options(index: str | None, index_uri: str | None) -> None:
    """
    Check that the two options fit together, and that the folder of the index exists, before anything is loaded.

    Raises:
        `ValueError`: for a server without a collection.
        `FileNotFoundError`: for a path that does not exist.
    """
    if index_uri is not None and not index:
        raise ValueError(f"--index_uri {index_uri} without --index: name the collection that holds the index.")
    if index and index_uri is None:
        check_place(f"--index {index}", index)


def check_faiss_option(args: Any, memory: str | None) -> None:
    """
    Check that `--allow_faiss_files` has files to allow: of an index in a folder, or of a memory.

    Raises:
        `ValueError`: if there is neither.
    """
    has_folder = args.index is not None and args.index_uri is None
    if args.allow_faiss_files and not has_folder and memory is None:
        raise ValueError(
            "--allow_faiss_files is for an index in a folder and for a memory: give --index, without --index_uri, or"
            " --memory."
        )


def faiss_options(args: Any) -> dict[str, Any]:
    """Return the option of `load_index` and `load_memory` that `--allow_faiss_files` gives, or nothing."""
    return {"allow_faiss_files": True} if args.allow_faiss_files else {}


def open_index(
    model: CoSupForCausalLM, index: str | None, index_uri: str | None = None, **options: Any
) -> Retriever | None:
    """
    Load the index of a recipe, checked against the model.

    Args:
        model ([`CoSupForCausalLM`]): the model that built the index.
        index (`str`, *optional*): name or path; with `index_uri`, name of the collection.
        index_uri (`str`, *optional*): Milvus server or local file.
        **options: passed to `load_index`, e.g. `search="exact"`.

    Returns:
        [`Retriever`], or `None` without `index`.

    Raises:
        `ValueError`: for an index of another model, a missing collection, or an option that this kind of index does
            not have.
        `OSError`: for a missing folder, or a server that does not answer.
    """
    check_index_options(index, index_uri)
    if not index:
        return None
    return model.load_index(index, index_uri, **options)


def close_index(index: Retriever) -> None:
    """Release a Milvus server or file before a training that may take days; an index in a folder needs no release."""
    if hasattr(index, "close"):
        index.close()


def file_or_dataset(name: str, streaming: bool) -> Any:
    """Return the path of a file, or the split `train` of the dataset of that name."""
    if Path(name).is_file() or name.endswith(FILE_SUFFIXES):
        return name
    from datasets import load_dataset

    return load_dataset(name, split="train", streaming=streaming)


def search_options(args: Any) -> dict[str, int]:
    """Return the options of the approximate index that were given to a recipe, under FAISS's names."""
    options = {"nprobe": args.nprobe, "efSearch": args.ef_search}
    return {name: value for name, value in options.items() if value is not None}
