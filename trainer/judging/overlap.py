"""Held-out text that a token datastore holds already: such text makes a memory look better than it is."""

import itertools
from collections.abc import Iterable, Iterator
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray

from modeling_cosup import KNNMemory

NGRAM = 16  # tokens; the figure `ngram_overlap` says this number
BLOCK = 1 << 20  # stored tokens that are compared at a time
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)

Hashes: TypeAlias = NDArray[np.uint64]


class NgramHashes:
    """
    Hashes of the n-grams of documents, collected while the documents are read.

    An n-gram counts as often as it occurs. A document of fewer than n predicted tokens counts once, as a whole: the
    store holds it if one of its documents is the same. Hashes have 64 bits: among a million n-grams of the text and a
    billion stored ones, a false match has a chance of one in 20,000.

    Args:
        documents (iterable of `list[int]`): token ids; the first token of a document is left out, as a memory does not
            store it.
        size (`int`): n.
    """

    def __init__(self, documents: Iterable[list[int]], size: int = NGRAM) -> None:
        self.documents = documents
        self.size = size
        self._hashes: list[Hashes] = []

    def __iter__(self) -> Iterator[list[int]]:
        """Yield the documents, and collect their hashes."""
        for ids in self.documents:
            predicted = np.array(ids[1:], np.uint64)
            if len(predicted):
                self._hashes.append(ngram_hashes(predicted, min(self.size, len(predicted))))
            yield ids

    def overlap(self, memory: KNNMemory) -> float | None:
        """
        Return the share of the n-grams that a datastore holds within one document, and of the shorter documents.

        `None` if no document has a predicted token.
        """
        if not self._hashes:
            return None
        hashes = np.concatenate(self._hashes)
        distinct, counts = np.unique(hashes, return_counts=True)
        is_stored = np.zeros(len(distinct), bool)
        for stored in itertools.chain(_stored_ngrams(memory, self.size), _stored_short_documents(memory, self.size)):
            is_stored |= np.isin(distinct, stored)
        return float(counts[is_stored].sum() / len(hashes))


def ngram_hashes(values: np.ndarray, size: int) -> Hashes:
    """
    Return the hashes of all n-grams of tokens; they depend on n too.

    Args:
        values (`numpy.ndarray` of uint64 and shape `(..., m)`): tokens of a text, or of several of the same length.
        size (`int`): n.

    Returns:
        `numpy.ndarray` of uint64 and shape `(..., m - n + 1)`: empty if there are fewer than n tokens.
    """
    count = max(0, values.shape[-1] - size + 1)
    mixed = values * _MULTIPLIER
    mixed ^= mixed >> np.uint64(29)
    hashes = np.full((*values.shape[:-1], count), size, np.uint64)
    for place in range(size if count else 0):
        hashes = hashes * _MULTIPLIER + mixed[..., place : place + count]
        hashes ^= hashes >> np.uint64(31)
    return hashes


def _stored_ngrams(memory: KNNMemory, size: int) -> Iterator[Hashes]:
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


def _stored_short_documents(memory: KNNMemory, size: int) -> Iterator[Hashes]:
    """Yield the hashes of all documents of a datastore that are too short for an n-gram."""
    starts = memory.document_starts.numpy()  # (D,)
    lengths = np.diff(starts, append=len(memory))
    for length in range(1, size):
        starts_of_length = starts[lengths == length]
        at_once = max(1, BLOCK // length)
        for first in range(0, len(starts_of_length), at_once):
            rows = starts_of_length[first : first + at_once, None] + np.arange(length)  # (S, length)
            values = memory.get_values(torch.from_numpy(rows)).numpy().astype(np.uint64)
            yield ngram_hashes(values, length)[:, 0]
