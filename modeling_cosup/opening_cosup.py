"""Opens an index that is named by a URI."""

import inspect
from typing import Any

from .retriever_cosup import Retriever


def open_by_uri(uri: str, name: str, options: dict[str, Any]) -> Retriever:
    """
    Open an index held by a Milvus server or in a local Milvus file.

    Needs the installed package: the Milvus code is not saved with checkpoints, so nobody has to review a database
    client before trusting one. transformers copies the files of relative imports; this import is absolute.

    Args:
        uri (`str`): of a Milvus server, or the path of a `.db` file.
        name (`str`): of the collection.
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
    option_names = list(inspect.signature(MilvusPassageIndex).parameters)[2:]
    unknown = sorted(set(options) - set(option_names))
    if unknown:
        raise ValueError(f"An index in Milvus has no option {unknown[0]!r}, only {', '.join(option_names)}.")
    return MilvusPassageIndex(uri, name, **options)
