"""The contents of an index: shards, rows, ids, deletions, and the folder that holds them."""

import hashlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from transformers.utils import logging

from .folder_store_cosup import FolderStore, is_in_hub_cache
from .folders_cosup import Config, FileFacts, read_config, read_tensors, write_tensors
from .index_files_cosup import INDEX_FORMAT, METADATA_COLUMN, IdTable, Shard, make_id_table, map_shard, write_shard
from .index_search_cosup import ExactSearch, contains
from .metadata_cosup import read_metadata
from .passages_cosup import hash_ids
from .retriever_cosup import Rows, array_of_rows, list_of_ids

logger = logging.get_logger(__name__)

COLUMNS = ("id", "title", "text", "input_ids", METADATA_COLUMN)
Store = TypeVar("Store", bound="PassageStore")


class PassageStore(FolderStore):
    """
    Passages by row and by id. A row is a passage's place in the corpus; a deleted passage's row is not reused.

    Args:
        shards (`list[Shard]`): the passages and their embeddings.
        config (`dict`): the content of `index_config.json`.
        folder (`Path`, *optional*): folder of the index, in which changes are saved.
    """

    form = INDEX_FORMAT

    def __init__(self, shards: list[Shard], config: Config, folder: Path | None = None) -> None:
        super().__init__(config, folder)
        self._deleted = np.empty(0, np.int64)
        self._id_table: IdTable | None = None
        self._set_shards(shards)

    def _set_shards(self, shards: list[Shard]) -> None:
        self._shards = shards
        self._exact = ExactSearch(shards)

    def __len__(self) -> int:
        """Return the number of passages, without deleted ones."""
        return self.num_rows - len(self._deleted)

    @property
    def num_rows(self) -> int:
        """Number of rows, including rows of deleted passages."""
        return int(self._exact.starts[-1])

    @property
    def fingerprint(self) -> dict[str, Any]:
        """Settings of the model that made the embeddings, see [`CoSupForCausalLM.fingerprint`]."""
        return self.config["fingerprint"]

    @property
    def embeddings(self) -> torch.Tensor:
        """All embeddings, float32 `(num_rows, h)`: a copy in memory, unless there is only one float32 shard."""
        embeddings = [shard.embeddings.float() for shard in self._shards]
        if len(embeddings) == 1:
            return embeddings[0]
        return torch.cat(embeddings)

    def __getitem__(self, row: int) -> dict[str, Any]:
        """Return the passage of a row: `{"id", "title", "text", "input_ids"}`."""
        return self.get_passages([row])[0]

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Yield all passages that were not deleted, by row."""
        return self.read(COLUMNS)

    def read(self, names: tuple[str, ...]) -> Iterator[dict[str, Any]]:
        """Yield all passages as iterating does, but only their columns `names`; without token ids it is faster."""
        deleted = set(self._deleted.tolist())
        for start, shard in zip(self._exact.starts.tolist(), self._shards, strict=False):
            columns = {name: shard.passages[name] for name in names if name in shard.passages.schema.names}
            for row in range(len(shard)):
                if start + row not in deleted:
                    yield _passage(columns, row)

    def get_passages(self, rows: Rows) -> list[dict[str, Any]]:
        """
        Return the passages of rows.

        Args:
            rows (sequence of `int`): in any order.

        Returns:
            `list[dict]`: `{"id", "title", "text", "input_ids"}`; `input_ids` is a `list[int]` as Gen reads the
            passage, without BOS and EOS. A passage with metadata also has `"metadata"`, a `dict` of JSON values.

        Raises:
            `IndexError`: names rows that the index does not have, or that hold a deleted passage.
            `ValueError`: for anything but integers, such as ids or a mask.
        """
        places = self._places(self._checked_rows(rows), COLUMNS)
        return [_passage(columns, row) for columns, row in places]

    def _digest_of_shards(self) -> str:
        """Return the SHA-256 (hex) of all passages, the dtypes of their embeddings and the rows of deleted ones."""
        total = hashlib.sha256(self._deleted.tobytes())
        for shard in self._shards:
            total.update(shard.passages.serialize())
            total.update(str(shard.embeddings.dtype).encode())
        return total.hexdigest()

    def _checked_rows(self, rows: Rows) -> NDArray[np.int64]:
        """Return rows as an int64 array; `IndexError` names rows that hold no passage."""
        rows = array_of_rows(rows)
        unknown = rows[(rows < 0) | (rows >= self.num_rows)]
        if len(unknown):
            raise IndexError(f"The index has no rows {unknown[:5].tolist()}; it has 0 to {self.num_rows - 1}.")
        if len(self._deleted):
            deleted = rows[contains(self._deleted, rows)]
            if len(deleted):
                raise IndexError(f"The passages of rows {deleted[:5].tolist()} were deleted.")
        return rows

    def _places(self, rows: NDArray[np.int64], names: tuple[str, ...]) -> list[tuple[dict[str, Any], int]]:
        """Return for each row the named columns of its shard, as far as it has them, and its row within that shard."""
        owners = np.searchsorted(self._exact.starts, rows, side="right") - 1
        columns = {}
        for owner in set(owners.tolist()):
            passages = self._shards[owner].passages
            columns[owner] = {name: passages[name] for name in names if name in passages.schema.names}
        shard_rows = rows - self._exact.starts[owners]
        return [(columns[owner], row) for owner, row in zip(owners.tolist(), shard_rows.tolist(), strict=True)]

    def rows_of(self, ids: Iterable[str]) -> NDArray[np.int64]:
        """
        Return the rows of passage ids, in the given order, `(len(ids),)`.

        Raises:
            `ValueError`: names (up to five) ids that the index does not hold, or for a single string.
        """
        ids = list_of_ids(ids)
        rows = self.find(ids)
        if (rows < 0).any():
            missing = [ids[i] for i in np.flatnonzero(rows < 0)]
            raise ValueError(f"The index does not hold {len(missing)} of {len(ids)} ids: {missing[:5]}.")
        return rows

    def live_rows(self) -> NDArray[np.int64]:
        """Return all rows that hold a passage, `numpy.ndarray` of int64, in ascending order."""
        return np.setdiff1d(np.arange(self.num_rows), self._deleted, assume_unique=True)

    def get_embeddings(self, rows: Rows) -> NDArray[np.float32]:
        """
        Return the passage embeddings of rows, `numpy.ndarray` of float32 `(len(rows), h)`.

        Raises:
            `IndexError`: names rows that hold no passage.
            `ValueError`: for anything but integers, such as ids or a mask.
        """
        return self._exact.gather(self._checked_rows(rows)).numpy()

    def row_of(self, passage_id: str) -> int:
        """Return the row of a passage id; `KeyError` if the index does not hold it."""
        (row,) = self.find([passage_id]).tolist()
        if row < 0:
            raise KeyError(passage_id)
        return row

    def find(self, ids: Iterable[str]) -> NDArray[np.int64]:
        """Return the rows of passage ids, -1 for unknown ids; `ValueError` for anything but a list of strings."""
        ids = list_of_ids(ids)
        if self._id_table is None:
            self._id_table = make_id_table(self._shards)
        table_hashes, table_rows = self._id_table
        hashes = hash_ids(ids)
        rows = np.full(len(ids), -1, np.int64)
        places = table_hashes.searchsorted(hashes)  # where in the table to look next
        waiting = np.arange(len(ids))  # ids whose row has not been found yet
        # try all rows with the same hash, until one holds the id itself and was not deleted
        while len(waiting):
            waiting = waiting[places[waiting] < len(table_hashes)]
            waiting = waiting[table_hashes[places[waiting]] == hashes[waiting]]
            next_rows = table_rows[places[waiting]]
            same = np.zeros(len(waiting), bool)
            for i, (columns, shard_row) in enumerate(self._places(next_rows, ("id",))):
                same[i] = columns["id"][shard_row].as_py() == ids[waiting[i]]
            if len(self._deleted):
                same &= ~contains(self._deleted, next_rows)
            rows[waiting[same]] = next_rows[same]
            waiting = waiting[~same]
            places[waiting] += 1
        return rows

    # ------------------------------------------------------------------ changing

    def delete(self, ids: Iterable[str]) -> None:
        """
        Delete passages: no search or id finds them any more. Their rows and bytes stay until the index is built again.

        The folder is updated too. If the process dies, it holds either the old state or the new one.

        Args:
            ids (sequence of `str`): ids of passages in the index.

        Raises:
            `ValueError`: names ids that the index does not hold, or for a single string; then none is deleted.
        """
        deleted = np.union1d(self._deleted, self.rows_of(ids))
        with self._changing():
            if self.folder is not None:
                config = self._next_config()
                self._write_deleted(self.folder, config, deleted)
                self._commit(self.folder, config)
            self._deleted = deleted

    def _check_ids(self, id_table: IdTable) -> None:
        """Raise `ValueError` if two rows have the same id; equal hashes are neighbours in the table."""
        hashes, rows = id_table
        for i in np.flatnonzero(hashes[1:] == hashes[:-1]):
            first_id, second_id = (
                columns["id"][row].as_py() for columns, row in self._places(rows[i : i + 2], ("id",))
            )
            if first_id == second_id:
                raise ValueError(
                    f"Row {rows[i + 1]}: id {second_id!r} is already in row {rows[i]}; ids must be unique."
                )

    def _write_deleted(self, folder: Path, config: Config, deleted: NDArray[np.int64]) -> None:
        tensors = {"rows": torch.from_numpy(deleted)}
        name = self._write_file(folder, config, "deleted.safetensors", lambda path: write_tensors(path, tensors))
        config["deleted"] = name

    def _write_id_table(self, folder: Path, config: Config, shards: list[Shard]) -> None:
        config["ids"] = self._write_file(folder, config, "ids.safetensors", lambda path: make_id_table(shards, path))

    # ------------------------------------------------------------------ files

    def _write_from_memory(self, folder: Path) -> Config:
        config: Config = {**self.config, "files": {}}
        for number, shard in enumerate(self._shards):
            config["files"].update(write_shard(folder, number, shard))
        self._write_id_table(folder, config, self._shards)
        if len(self._deleted):
            self._write_deleted(folder, config, self._deleted)
        return config

    @classmethod
    def _load(cls: type[Store], folder: Path, verify: bool | None = None) -> Store:
        """Load the index of a folder, with its files mapped."""
        config = read_config(folder, cls.form, verify)
        full = bool(verify) or is_in_hub_cache(folder)
        shards = [map_shard(folder, number, full) for number in range(len(config["shards"]))]
        for count, shard in zip(config["shards"], shards, strict=True):
            same_count = count == len(shard) == len(shard.passages)
            if not same_count or shard.embeddings.shape[1] != config["embedding_size"]:
                raise ValueError(
                    f"{folder}: a shard has {len(shard.passages)} passages, embeddings of shape"
                    f" {tuple(shard.embeddings.shape)}, expected {count} of both and {config['embedding_size']}"
                    " dimensions."
                )
        index = cls(shards, config, folder)
        index._id_table = map_id_table(folder, config)
        if config["deleted"] is not None:
            index._deleted = _read_deleted(folder / config["deleted"], index.num_rows)
        return index


def _passage(columns: dict[str, Any], row: int) -> dict[str, Any]:
    """Return the passage in a row of a shard's columns."""
    passage = {name: column[row].as_py() for name, column in columns.items()}
    text = passage.pop(METADATA_COLUMN, None)
    if text is not None:
        passage["metadata"] = read_metadata(text, f"Passage {passage['id']!r} of the index")
    return passage


def _read_deleted(path: Path, num_rows: int) -> NDArray[np.int64]:
    """Read the deleted rows; `ValueError` unless they are strictly ascending rows of the index."""
    rows = read_tensors(path)["rows"].numpy()
    is_row_array = rows.ndim == 1 and rows.dtype == np.int64
    if not is_row_array or (np.diff(rows) <= 0).any() or (rows < 0).any() or (rows >= num_rows).any():
        raise ValueError(f"{path} is damaged: expected rows from 0 to {num_rows - 1}, in order, each once.")
    return rows


def map_id_table(folder: Path, config: Config) -> IdTable:
    """Map the table that finds ids; see [`make_id_table`]."""
    table = read_tensors(folder / config["ids"])
    return table["hashes"].numpy(), table["rows"].numpy()


def new_config(settings: dict[str, Any], shards: list[Shard], files: dict[str, FileFacts] | None = None) -> Config:
    """Return the config of an index that was just built."""
    return {
        "format_version": INDEX_FORMAT.version,
        "generation": 0,
        "embedding_size": settings["embedding_size"],
        "dtype": settings["dtype"],
        "fingerprint": settings["fingerprint"],
        "shards": [len(shard) for shard in shards],
        "ids": None,
        "deleted": None,
        "approximate": None,
        "files": files or {},
    }
