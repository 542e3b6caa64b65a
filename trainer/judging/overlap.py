"""Held-out text that a token datastore holds already: such text makes a memory look better than it is."""

from collections.abc import Iterable, Iterator

import numpy as np
import torch

from modeling_cosup import KNNMemory

NGRAM = 16  # tokens; the figure `ngram_overlap` says this number
BLOCK = 1 << 20  # stored tokens that are compared at a time
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)


class NgramHashes:
    """
    Hashes of the n-grams of documents, collected while the documents are read.

    An n-gram counts as often as it occurs. A document of fewer than n predicted tokens has none. Hashes have 64 bits:
    among a million n-grams of the text and a billion stored ones, a false match has a chance of one in 20,000.

    Args:
        documents (iterable of `list[int]`): token ids; the first token of a document is left out, as a memory does not
            store it.
        size (`int`): n.
    """

    def __init__(self, documents: Iterable[list[int]], size: int = NGRAM) -> None:
        self.documents = documents
        self.size = size
        self._hashes: list[np.ndarray] = []

    def __iter__(self) -> Iterator[list[int]]:
        """Yield the documents, and collect their hashes."""
        for ids in self.documents:
            self._hashes.append(ngram_hashes(np.array(ids[1:], np.uint64), self.size))
            yield ids

    def overlap(self, memory: KNNMemory) -> float | None:
        """Return the share of the n-grams that a datastore holds within one document; `None` if there are none."""
        hashes = np.concatenate([np.empty(0, np.uint64), *self._hashes])
        if not len(hashes):
            return None
        distinct, counts = np.unique(hashes, return_counts=True)
        is_stored = np.zeros(len(distinct), bool)
        for stored in _stored_hashes(memory, self.size):
            is_stored |= np.isin(distinct, stored)
        return float(counts[is_stored].sum() / len(hashes))


def ngram_hashes(values: np.ndarray, size: int) -> np.ndarray:
    """Return the hashes `(n - size + 1,)` of all n-grams of tokens `(n,)`, both uint64; empty if there are fewer."""
    count = len(values) - size + 1
    if count < 1:
        return np.empty(0, np.uint64)
    mixed = values * _MULTIPLIER
    mixed ^= mixed >> np.uint64(29)
    hashes = np.zeros(count, np.uint64)
    for place in range(size):
        hashes = hashes * _MULTIPLIER + mixed[place : place + count]
        hashes ^= hashes >> np.uint64(31)
    return hashes


def _stored_hashes(memory: KNNMemory, size: int) -> Iterator[np.ndarray]:
    """Yield the hashes of all n-grams of a datastore that lie within one document."""
    starts = memory.document_starts.numpy()  # (D,)
    for start in range(0, len(memory), BLOCK):
        end = min(start + BLOCK + size - 1, len(memory))  # and the rest of the n-grams that begin in this block
        values = memory.get_values(torch.arange(start, end)).numpy().astype(np.uint64)
        hashes = ngram_hashes(values, size)
        is_whole = np.ones(len(hashes), bool)
        for document_start in starts[(starts > start) & (starts < end)] - start:
            is_whole[max(0, document_start - size + 1) : document_start] = False
        yield hashes[is_whole]
