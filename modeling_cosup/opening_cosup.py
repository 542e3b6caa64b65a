"""An index that is named by a URI: which back end opens it."""

import inspect
from typing import Any

from .retriever_cosup import Retriever


def open_by_uri(uri: str, name: str, options: dict[str, Any]) -> Retriever:
    """
    Open an index held by a Milvus server or in a local Milvus file.

    Needs the installed package: this code does not travel with checkpoints, so trusting one takes no reading of a
    database client. transformers copies what relative imports name; this import is absolute.

    Args:
        uri (`str`): of a Milvus server, or the path of a `.db` file.
        name (`str`): of the collection.
        options (`dict`): for [`MilvusPassageIndex`].

    Raises:
        `ImportError`: when the package is not installed.
        `ValueError`: for an option that this kind of index does not have.
    """
    try:
        from modeling_cosup.milvus_cosup import MilvusPassageIndex
    except ImportError as error:
        message = 'An index in Milvus needs the package cosup, which does not come with a checkpoint: pip install "cosup[milvus]".'
        raise ImportError(message) from error
    names = list(inspect.signature(MilvusPassageIndex).parameters)[2:]
    if unknown := sorted(set(options) - set(names)):
        raise ValueError(f"An index in Milvus has no option {unknown[0]!r}, only {', '.join(names)}.")
    return MilvusPassageIndex(uri, name, **options)
