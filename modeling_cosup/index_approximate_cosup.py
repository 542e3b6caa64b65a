"""Approximate indexes by FAISS: made from a factory string, filled, written, and compared with exact search."""

from pathlib import Path
from typing import Any

import numpy as np

from .index_search_cosup import ExactSearch, RowArray

try:
    import faiss
except ImportError:
    faiss = None  # type: ignore[assignment]

INNER_PRODUCT, L2 = 0, 1  # faiss.METRIC_INNER_PRODUCT and faiss.METRIC_L2


def make_approximate(
    factory: str, exact: ExactSearch, train_rows: RowArray, metric: int = INNER_PRODUCT
) -> "faiss.Index":
    """
    Make a FAISS index of all embeddings, trained on a sample of them and filled shard by shard.

    Args:
        factory (`str`): string for `faiss.index_factory`, e.g. `"HNSW32"`, `"IVF1024,Flat"`, `"OPQ16_64,IVF256,PQ16"`.
        exact ([`ExactSearch`]): search over all shards.
        train_rows (`numpy.ndarray` of int64): rows of the sample.
        metric (`int`, *optional*, defaults to `INNER_PRODUCT`): FAISS's number of the metric.

    Raises:
        `ValueError`: if FAISS does not know the factory string, or the sample is too small for it.
    """
    index = empty_approximate(factory, exact.shards[0].embeddings.shape[1], len(train_rows), metric)
    try:
        if not index.is_trained:
            index.train(exact.gather(train_rows).numpy())
    except RuntimeError as error:
        raise _refused(factory, index.d, len(train_rows), error) from None
    add_to_approximate(index, exact, 0)
    return index


def empty_approximate(
    factory: str, size: int, train_size: int, metric: int = INNER_PRODUCT, **search_options: Any
) -> "faiss.Index":
    """
    Make an empty FAISS index, so that a wrong setting is found before hours of embedding.

    Args:
        factory (`str`): string for `faiss.index_factory`.
        size (`int`): dimensions of an embedding.
        train_size (`int`): number of embeddings in the training sample.
        metric (`int`, *optional*, defaults to `INNER_PRODUCT`): FAISS's number of the metric.
        **search_options: see [`set_search_options`].

    Raises:
        `ValueError`: if FAISS does not know the factory string or an option, or the sample is too small for the lists
            of an IVF index.
        `ImportError`: without FAISS.
    """
    require_faiss()
    if train_size < 1:
        raise ValueError(f"train_size is {train_size}, expected at least 1.")
    try:
        index = faiss.index_factory(size, factory, metric)
    except RuntimeError as error:
        raise _refused(factory, size, train_size, error) from None
    ivf = faiss.try_extract_index_ivf(index)
    if ivf is not None and ivf.nlist > train_size:
        raise _refused(factory, size, train_size, f"{ivf.nlist} lists need at least as many training embeddings")
    set_search_options(index, search_options)
    return index


def require_faiss() -> None:
    """Raise an `ImportError` without FAISS: only exact search works then."""
    if faiss is None:
        raise ImportError("Approximate search needs faiss: pip install faiss-cpu (on a GPU machine faiss-gpu).")


def _refused(factory: str, size: int, train_size: int, error: Exception | str) -> ValueError:
    message = str(error).partition("Error: ")[2] or str(error)
    return ValueError(
        f"index_factory {factory!r} of {size} dimensions and {train_size:,} training embeddings: FAISS says {message}"
    )


def add_to_approximate(index: "faiss.Index", exact: ExactSearch, first_row: int) -> None:
    """Add the rows from `first_row` on, including deleted ones, to a FAISS index, so that its ids stay our rows."""
    for start, block in exact.blocks():
        if start + len(block) > first_row:
            index.add(block[max(0, first_row - start) :])


def write_approximate(index: "faiss.Index", path: Path) -> None:
    """Write a FAISS index; `OSError` if that fails, e.g. because the disk is full."""
    try:
        faiss.write_index(index, str(path))
    except RuntimeError as error:
        path.unlink(missing_ok=True)
        raise OSError(f"{path} could not be written; is the disk full? FAISS says {error}") from None


def read_approximate(path: Path, num_rows: int, size: int) -> "faiss.Index":
    """Map a FAISS index; `ValueError` if it is damaged or does not hold `num_rows` embeddings of `size` dimensions."""
    require_faiss()
    try:
        index = faiss.read_index(str(path), faiss.IO_FLAG_MMAP_IFC)
    except RuntimeError as error:
        raise ValueError(f"{path} is damaged: {error}") from None
    if (index.ntotal, index.d) != (num_rows, size):
        raise ValueError(
            f"{path} holds {index.ntotal:,} embeddings of {index.d} dimensions, expected {num_rows:,} of {size}."
        )
    return index


def set_search_options(index: "faiss.Index", options: dict[str, Any]) -> None:
    """Set options such as `nprobe` or `efSearch`; `ValueError` names an option that this kind of index lacks."""
    for name, value in options.items():
        try:
            faiss.ParameterSpace().set_index_parameter(index, name, value)
        except RuntimeError:
            kind = type(index).__name__
            raise ValueError(
                f"{kind} has no search option {name!r} (or not {value!r}); IVF has nprobe, HNSW efSearch."
            ) from None


def usual_search_options(index: "faiss.Index") -> dict[str, float]:
    """Return `nprobe`, `efSearch`, `quantizer_efSearch` and `k_factor_rf`, as far as an index has them, as set now."""
    if isinstance(index, faiss.IndexPreTransform):
        return usual_search_options(faiss.downcast_index(index.index))
    if isinstance(index, faiss.IndexRefine):
        return {"k_factor_rf": index.k_factor} | usual_search_options(faiss.downcast_index(index.base_index))
    if isinstance(index, faiss.IndexIVF):
        quantizer_options = usual_search_options(faiss.downcast_index(index.quantizer))
        return {"nprobe": index.nprobe} | {f"quantizer_{name}": value for name, value in quantizer_options.items()}
    if isinstance(index, faiss.IndexHNSW):
        return {"efSearch": index.hnsw.efSearch}
    return {}


def recall(found: RowArray, expected: RowArray) -> float:
    """
    Return the mean share of `expected` rows `(N, k)` that are among the `found` rows `(N, k)`; -1 never counts.

    Raises:
        `ValueError`: if N or k is 0: nothing was compared.
    """
    if not expected.size:
        raise ValueError("There is nothing to compare with exact search: give at least one query.")
    num_hits = 0
    for found_rows, expected_rows in zip(found, expected, strict=True):
        num_hits += len(np.intersect1d(found_rows[found_rows >= 0], expected_rows))
    return num_hits / expected.size
