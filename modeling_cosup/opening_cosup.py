"""Opening an index by a URI, and a token memory of either kind: its files say which."""

import inspect
import os
from pathlib import Path
from typing import Any

from .datastore_cosup import KNNMemory
from .files_cosup import read_json
from .mlp_memory_cosup import CONFIG_FILE, MEMORY_TYPE, MLPMemory
from .retriever_cosup import Retriever

_DATASTORE_OPTIONS = {"search", "verify"}  # which MLPMemory.from_pretrained does not have


def open_by_uri(uri: str, name: str, options: dict[str, Any]) -> Retriever:
    """
    Open an index held by a Milvus server or in a local Milvus file.

    The Milvus code is in the installed package only: nobody should have to review a database client before trusting a
    checkpoint. transformers copies relatively imported files to a checkpoint, so the import below is absolute.

    Args:
        uri (`str`): URI of a Milvus server, or path of a `.db` file.
        name (`str`): name of the collection.
        options (`dict`): arguments of [`MilvusPassageIndex`].

    Raises:
        `ImportError`: if the package is not installed.
        `ValueError`: for an option that this kind of index does not have.
    """
    try:
        from modeling_cosup.milvus_cosup import MilvusPassageIndex
    except ImportError as error:
        raise ImportError(
            "An index in Milvus needs the package cosup, which does not come with a checkpoint:"
            ' pip install "cosup[milvus]".'
        ) from error
    _, _, *option_names = inspect.signature(MilvusPassageIndex).parameters  # all but uri and collection
    unknown = sorted(set(options) - set(option_names))
    if unknown:
        raise ValueError(f"An index in Milvus has no option {unknown[0]!r}, only {', '.join(option_names)}.")
    return MilvusPassageIndex(uri, name, **options)


def load_memory(name_or_path: str | os.PathLike[str], **kwargs: Any) -> KNNMemory | MLPMemory:
    """
    Load a token memory of either kind.

    Args:
        name_or_path (`str` or `Path`): a folder; or on the Hub a model repository, of an [`MLPMemory`], or a dataset
            repository, of a [`KNNMemory`].
        **kwargs: for `from_pretrained` of its kind.

    Raises:
        `FileNotFoundError`: when the folder or repository holds no memory.
        `ValueError`: for damaged files.
    """
    # a permission, which an MLP does not need
    of_mlp = {name: value for name, value in kwargs.items() if name != "allow_faiss_files"}
    path = Path(name_or_path) / CONFIG_FILE
    if path.exists():
        config = read_json(path)
        is_mlp = isinstance(config, dict) and config.get("memory_type") == MEMORY_TYPE
        if is_mlp:
            return MLPMemory.from_pretrained(name_or_path, **of_mlp)
        return KNNMemory.from_pretrained(name_or_path, **kwargs)
    if Path(name_or_path).is_dir():
        raise FileNotFoundError(f"{name_or_path} is not a token memory: {CONFIG_FILE} is missing.")
    if _DATASTORE_OPTIONS & kwargs.keys():
        return KNNMemory.from_pretrained(name_or_path, **kwargs)
    try:
        return MLPMemory.from_pretrained(name_or_path, **of_mlp)
    except FileNotFoundError:
        return KNNMemory.from_pretrained(name_or_path, **kwargs)
