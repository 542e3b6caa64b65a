"""
What generate() and judging ask of an index, and no more: the seam where another back end enters.

A back end is a class with the members of [`Retriever`], in a file of its own, and a branch of [`~opening_cosup.open_by_uri`].
It inherits nothing: a model whose code came with a checkpoint and an index of the installed package work together.
"""

from collections.abc import Iterable, Sequence
from typing import Any, Protocol, TypeAlias, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray

from .configuration_cosup import EARLIER_EMBEDDING_SETTINGS

Rows: TypeAlias = Sequence[int] | NDArray[np.int64]
SearchResults: TypeAlias = tuple[NDArray[np.float32], NDArray[np.int64]]


@runtime_checkable
class Retriever(Protocol):
    """
    Passages that are found by their embedding, by row and by id.

    A row is the place of a passage in the index, an `int` from 0 on. It never changes, and the row of a deleted passage is given to no other.
    In search results a row of -1, with a score of -inf, says that fewer passages were found than asked for; it never goes into `get_passages`.
    """

    @property
    def fingerprint(self) -> dict[str, Any]:
        """What made the embeddings, as `CoSupForCausalLM.fingerprint` gives it: names and values that JSON can hold."""
        ...

    def __len__(self) -> int:
        """Number of passages that can be found; deleted ones do not count."""
        ...

    def search(
        self, query_embeds: torch.Tensor, k: int = 1, candidates: Sequence[Rows | None] | None = None
    ) -> SearchResults:
        """
        The nearest passages by inner product.

        Args:
            query_embeds (`torch.Tensor` of shape `(N, h)`): any float dtype and device. N may be 0.
            k (`int`): passages per query.
            candidates (`list`, *optional*): for each query `None`, to search everything, or rows, to search these alone, always exactly.

        Returns:
            `(scores, rows)`: `numpy.ndarray` of float32 and int64, both `(N, min(k, len(self)))`, best first; -inf and -1 where fewer were found.

        Raises:
            `ValueError`: for queries of another width, or that are NaN or infinite; for candidates that are no rows; for a k below 1.
        """
        ...

    def get_passages(self, rows: Rows) -> list[dict[str, Any]]:
        """
        The passages of rows, in their order; a row may come twice.

        Returns:
            `list[dict]`: `{"id", "title", "text", "input_ids"}`; `input_ids` is a `list[int]` as Gen reads the passage, without BOS and EOS.

        Raises:
            `IndexError`: names rows that hold no passage.
        """
        ...

    def rows_of(self, ids: Iterable[str]) -> NDArray[np.int64]:
        """
        Rows of passage ids, `(len(ids),)`, in their order.

        Raises:
            `ValueError`: names (up to five of) the ids that the index does not hold.
        """
        ...

    def live_rows(self) -> NDArray[np.int64]:
        """Rows that hold a passage, `(len(self),)`, in order."""
        ...

    def check_model(self, model: Any) -> None:
        """
        Raise unless `model` makes its queries in the space of this index; [`check_fingerprint`] does it.

        Raises:
            `ValueError`: names every setting that differs, with both values.
        """
        ...


def check_fingerprint(fingerprint: dict[str, Any], model: Any) -> None:
    """
    Raise unless a model has the fingerprint of an index.

    Args:
        fingerprint (`dict`): of the index; settings that it lacks had one value only when it was made.
        model ([`CoSupForCausalLM`]): of this class or, with `trust_remote_code`, of the one that came with a checkpoint.

    Raises:
        `ValueError`: names every setting that differs, with both values.
    """
    of_model = model.fingerprint()
    of_index = {**EARLIER_EMBEDDING_SETTINGS, **fingerprint}
    different = [name for name in of_model if of_index.get(name) != of_model[name]]
    if different:
        lines = [
            f"  {name}: the index has {_short(of_index.get(name))}, the model {_short(of_model[name])}"
            for name in different
        ]
        raise ValueError("This index was built by another model; build it again with this one.\n" + "\n".join(lines))


def _short(value: Any) -> str:
    """A value as an error shows it: the beginning of a SHA-256, anything else whole."""
    if isinstance(value, str) and len(value) == 64:
        return f"{value[:12]}…"
    return repr(value)
