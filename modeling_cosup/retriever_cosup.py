"""
The interface of an index: the members that generate() and judging use, and no more.

To add a back end, write a class with the members of [`Retriever`] in a new file, and open it in
[`~opening_cosup.open_by_uri`]. The class inherits nothing, so that a model loaded with its checkpoint's code also
works with an index of the installed package.
"""

from collections.abc import Iterable, Mapping, Sequence
from os import PathLike
from typing import Any, Protocol, TypeAlias, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray

from .configuration_cosup import EARLIER_EMBEDDING_SETTINGS
from .files_cosup import digest

GENERATE_USES = ("fingerprint", "search", "get_passages", "rows_of", "check_model")  # members of Retriever

Rows: TypeAlias = Sequence[int] | NDArray[np.int64]
SearchResults: TypeAlias = tuple[NDArray[np.float32], NDArray[np.int64]]  # scores and rows, both (N, k)
CoSupModel: TypeAlias = Any  # CoSupForCausalLM: the installed class, or its copy that was loaded with a checkpoint


@runtime_checkable
class Retriever(Protocol):
    """
    Passages that can be found by embedding, by row and by id.

    A row is the place of a passage in the index, an `int` from 0 on. It never changes, and the row of a deleted
    passage is not reused. If a search finds fewer than k passages, the remaining rows are -1 and their scores -inf.
    `get_passages` does not accept -1.
    """

    @property
    def fingerprint(self) -> dict[str, Any]:
        """Settings of the model that made the embeddings, as JSON values; see `CoSupForCausalLM.fingerprint`."""
        ...

    def __len__(self) -> int:
        """Return the number of passages, without deleted ones."""
        ...

    def search(
        self, query_embeds: torch.Tensor, k: int = 1, candidates: Sequence[Rows | None] | None = None
    ) -> SearchResults:
        """
        Find the nearest passages by inner product.

        Args:
            query_embeds (`torch.Tensor` of shape `(N, h)`): any float dtype and device. N may be 0.
            k (`int`, *optional*, defaults to 1): passages per query.
            candidates (`list`, *optional*): one entry per query. `None` searches the whole index. An entry with rows
                searches only these rows, always exactly.

        Returns:
            `(scores, rows)`: `numpy.ndarray` of float32 and int64, both `(N, min(k, len(self)))`, best first;
            missing results are -inf and -1.

        Raises:
            `ValueError`: if queries have the wrong width or are NaN or infinite, candidates are not rows, or k is
                below 1.
        """
        ...

    def get_passages(self, rows: Rows) -> list[dict[str, Any]]:
        """
        Return the passages of rows, in the given order; a row may occur twice.

        Returns:
            `list[dict]`: `{"id", "title", "text", "input_ids"}`; `input_ids` is a `list[int]` as Gen reads the
            passage, without BOS and EOS. A passage with metadata also has `"metadata"`, a `dict` of JSON values.

        Raises:
            `IndexError`: names rows that hold no passage.
            `ValueError`: for anything but integers, such as ids or a mask.
        """
        ...

    def rows_of(self, ids: Iterable[str]) -> NDArray[np.int64]:
        """
        Return the rows of passage ids, `(len(ids),)`, in the given order.

        Raises:
            `ValueError`: names (up to five) ids that the index does not hold, or for a single string.
        """
        ...

    def live_rows(self) -> NDArray[np.int64]:
        """Return all rows that hold a passage, in ascending order, `(len(self),)`."""
        ...

    def check_model(self, model: CoSupModel) -> None:
        """
        Raise unless `model` makes queries in the embedding space of this index; call [`check_fingerprint`].

        Raises:
            `ValueError`: names every setting that differs, with both values.
        """
        ...


def check_retriever(retriever: object) -> None:
    """Raise a `TypeError` unless an object has the members of [`Retriever`] that generate() uses."""
    if isinstance(retriever, str | PathLike):
        place = str(retriever)
        raise TypeError(
            f"retriever is the name {place!r}, expected an index: load it with model.load_index({place!r})."
        )
    if isinstance(retriever, type):
        raise TypeError(f"retriever is the class {retriever.__name__}, expected an index: an instance of it.")
    missing = [name for name in GENERATE_USES if not hasattr(retriever, name)]
    if missing:
        kind = type(retriever).__name__
        raise TypeError(f"retriever is a {kind}, which has no {', no '.join(missing)}: see Retriever in {__name__}.")


def list_of_ids(ids: Iterable[str]) -> list[str]:
    """Return passage ids as a list; `ValueError` for a single string, or an id that is not a string."""
    if isinstance(ids, str):
        raise ValueError(f"ids is the string {ids!r}, expected a list of passage ids: [{ids!r}].")
    ids = list(ids)
    wrong = [id for id in ids if not isinstance(id, str)]
    if wrong:
        raise ValueError(f"{wrong[0]!r} is not a passage id, expected a string.")
    return ids


def array_of_rows(rows: Rows, name: str = "rows") -> NDArray[np.int64]:
    """
    Return rows as an int64 array `(n,)`, whether or not an index has them.

    Args:
        rows (sequence of `int`): in any shape.
        name (`str`): of the argument, for the error.

    Raises:
        `ValueError`: for anything but integers, such as ids or a mask.
    """
    array = np.asarray(rows)
    if not array.size:
        return np.empty(0, np.int64)
    if array.dtype.kind not in "iu":
        raise ValueError(
            f"{name}: found {array.dtype}, expected integers: rows of the index (index.rows_of(ids) of ids,"
            " np.flatnonzero(mask) of a mask)."
        )
    return np.ascontiguousarray(array.reshape(-1), np.int64)


def content_digest(index: Retriever) -> str:
    """
    Return a hash that differs for indexes of another model, of other passages or with another search.

    Of an index in a folder, the checksums of its files, the deleted rows and the approximate search count; of an index
    in memory, its passages by shard, but not their embeddings, whose last bits depend on the number of threads; of a
    Milvus collection, its properties and how it is searched. Of any other, only fingerprint and length are known.
    """
    content: dict[str, Any] = {}
    config = getattr(index, "config", None)
    if isinstance(config, Mapping):
        files = config.get("files") or {}
        content["files"] = {name: facts for name, facts in files.items() if not name.endswith(".faiss")}
        content["deleted"] = config.get("deleted")
        if getattr(index, "_approximate", None) is not None:
            content["approximate"] = config.get("approximate")
        if not files and hasattr(index, "_digest_of_shards"):
            content["shards"] = index._digest_of_shards()
    for name in ("_properties", "search_params"):  # of Milvus
        content[name] = getattr(index, name, None)
    try:
        length = len(index)
    except TypeError:  # generate() does not need it
        length = None
    return digest([index.fingerprint, length, content])


def check_fingerprint(fingerprint: dict[str, Any], model: CoSupModel) -> None:
    """
    Raise unless a model has the fingerprint of an index.

    Args:
        fingerprint (`dict`): of the index. A missing setting has the value that all models had when the index was
            made.
        model ([`CoSupForCausalLM`]): the model that makes the queries.

    Raises:
        `ValueError`: names every setting that differs, with both values.
    """
    model_settings = model.fingerprint()
    index_settings = {**EARLIER_EMBEDDING_SETTINGS, **fingerprint}
    lines = []
    for name, model_value in model_settings.items():
        index_value = index_settings.get(name)
        if index_value != model_value:
            lines.append(f"  {name}: the index has {_short(index_value)}, the model {_short(model_value)}")
    if not lines:
        return
    problem = "This index was built by another model; build it again with this one."
    if model.config.tie_emb_seq and index_settings.get("emb_seq") != model_settings["emb_seq"]:
        problem += " In a tied model (tie_emb_seq), training Gen changes the embeddings of passages too."
    raise ValueError("\n".join([problem, *lines]))


def _short(value: Any) -> str:
    """Format a value for an error message; a SHA-256 is cut to its first 12 characters."""
    if isinstance(value, str) and len(value) == 64:
        return f"{value[:12]}…"
    return repr(value)
