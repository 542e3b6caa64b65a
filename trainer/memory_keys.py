"""Keys of a token datastore as training data: batches by row, in a random order that reads files block by block."""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch.utils.data import Dataset, Sampler

from modeling_cosup import KNNMemory

BLOCK_SIZE = 4096  # consecutive rows that are read together
BLOCKS_AT_ONCE = 16  # blocks whose rows are shuffled together


class StoredKeys(Dataset):
    """Batches of keys of a datastore, by their rows: `{"rows" (n,), "keys" (n, d), "labels" (n,)}`."""

    def __init__(self, datastore: KNNMemory) -> None:
        self.datastore = datastore

    def __len__(self) -> int:
        return len(self.datastore)

    def __getitems__(self, rows: Sequence[int] | np.ndarray) -> dict[str, torch.Tensor]:
        chosen = torch.as_tensor(rows)
        return {
            "rows": chosen,
            "keys": self.datastore.get_keys(chosen),
            "labels": self.datastore.get_values(chosen),
        }


class ShuffledBlocks(Sampler[int]):
    """
    A random order of the rows of a datastore in which its files are read block by block.

    The order depends on the arguments and the epoch alone, so a run that is resumed with the same ones continues with
    the rows that it has not seen.

    Args:
        num_rows (`int`): of the datastore.
        held_out (`numpy.ndarray` of shape `(m,)`): sorted rows to leave out.
        seed (`int`): of the order.
        block_size (`int`): consecutive rows that are read together.
        blocks_at_once (`int`): blocks whose rows are shuffled together.
    """

    def __init__(
        self,
        num_rows: int,
        held_out: np.ndarray,
        seed: int,
        block_size: int = BLOCK_SIZE,
        blocks_at_once: int = BLOCKS_AT_ONCE,
    ) -> None:
        self.num_rows = num_rows
        self.held_out = held_out
        self.seed = seed
        self.block_size = block_size
        self.blocks_at_once = blocks_at_once
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of an epoch; the data loader calls this."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.num_rows - len(self.held_out)

    def __iter__(self) -> Iterator[int]:
        generator = np.random.default_rng([self.seed, self.epoch])
        starts = generator.permutation(np.arange(0, self.num_rows, self.block_size))
        for first in range(0, len(starts), self.blocks_at_once):
            blocks = []
            for start in starts[first : first + self.blocks_at_once]:
                blocks.append(np.arange(start, min(start + self.block_size, self.num_rows)))
            rows = np.setdiff1d(np.concatenate(blocks), self.held_out, assume_unique=True)
            yield from generator.permutation(rows).tolist()


def held_out_rows(datastore: KNNMemory, share: float, seed: int) -> np.ndarray:
    """
    Return the sorted rows `(m,)` of random documents that together hold at least `share` of a datastore.

    Raises:
        `ValueError`: if no row would be left to train on.
    """
    if not share:
        return np.empty(0, np.int64)
    starts = datastore.document_starts.numpy()  # (D,)
    ends = np.append(starts[1:], len(datastore))
    order = np.random.default_rng(seed).permutation(len(starts))
    num_documents = 1 + int(np.searchsorted(np.cumsum((ends - starts)[order]), share * len(datastore)))
    rows = np.concatenate([np.arange(starts[i], ends[i]) for i in np.sort(order[:num_documents])])
    if len(rows) == len(datastore):
        raise ValueError(f"validation_split is {share}, but the datastore has only {len(starts)} documents.")
    return rows
