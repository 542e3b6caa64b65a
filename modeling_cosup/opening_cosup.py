"""Indexes that are opened by a URI."""

import inspect
from typing import Any

from .retriever_cosup import Retriever


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
