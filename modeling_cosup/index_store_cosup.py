"""What an index holds, apart from searching it: shards of passages and embeddings, rows, ids, deletions, and the folder that they live in."""

import contextlib
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers.utils import logging

from .files_cosup import locked, read_json, write_json
from .index_files_cosup import (
    CONFIG_FILE,
    FORMAT_VERSION,
    LOCK_FILE,
    check_save_directory,
    flush,
    make_id_table,
    map_shard,
    map_tensors,
    put_in_place,
    read,
    read_config,
    read_names,
    seal,
    sweep,
    write_config,
    write_shard,
    write_tensors,
)
from .index_search_cosup import ExactSearch, contains
from .passages_cosup import hash_ids
from .retriever_cosup import Rows

logger = logging.get_logger(__name__)

COLUMNS = ("id", "title", "text", "input_ids")


class PassageStore:
    """
    Passages by row and by id. A row is a passage's place in the corpus, and stays: one that was deleted is given to no other passage.

    Args:
        shards (`list[Shard]`): the passages and their embeddings.
        config (`dict`): what `index_config.json` holds.
        folder (`Path`, *optional*): where the index lives; changes are kept there.
    """

    def __init__(self, shards, config, folder=None):
        self.config, self.folder = config, folder
        self._deleted = np.empty(0, np.int64)
        self._id_table = None
        self._set_shards(shards)

    def _set_shards(self, shards):
        self._shards = shards
        self._exact = ExactSearch(shards)

    def __len__(self) -> int:
        """Passages that can be found; rows of deleted ones do not count."""
        return self.num_rows - len(self._deleted)

    @property
    def num_rows(self) -> int:
        """Rows that were ever given, including the rows of deleted passages."""
        return int(self._exact.starts[-1])

    @property
    def fingerprint(self) -> dict[str, Any]:
        """Of the model that made the embeddings, see [`CoSupForCausalLM.fingerprint`]."""
        return self.config["fingerprint"]

    @property
    def embeddings(self):
        """All embeddings, float32 `(num_rows, h)`: mapped or in memory as they lie where there is one float32 shard, else a copy in memory."""
        parts = [shard.embeddings.float() for shard in self._shards]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def __getitem__(self, row: int) -> dict[str, Any]:
        """The passage of a row: `{"id", "title", "text", "input_ids"}`."""
        return self.get_passages([row])[0]

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """All passages that were not deleted, by row."""
        for row in range(self.num_rows):
            if not len(self._deleted) or not contains(self._deleted, row):
                yield self[row]

    def get_passages(self, rows: Rows) -> list[dict[str, Any]]:
        """
        Passages of rows.

        Args:
            rows (sequence of `int`): in any order.

        Returns:
            `list[dict]`: `{"id", "title", "text", "input_ids"}`; `input_ids` is a `list[int]` as Gen reads the passage, without BOS and EOS.

        Raises:
            `IndexError`: names rows that the index does not have, or whose passages were deleted.
        """
        places = self._places(self._checked_rows(rows), COLUMNS)
        return [{name: column[row].as_py() for name, column in columns.items()} for columns, row in places]

    def _checked_rows(self, rows):
        """Rows as an int64 array; `IndexError` names those that hold no passage."""
        rows = np.asarray(rows, np.int64).reshape(-1)
        if (wrong := rows[(rows < 0) | (rows >= self.num_rows)]).size:
            raise IndexError(f"The index has no rows {wrong[:5].tolist()}; it has 0 to {self.num_rows - 1}.")
        if len(self._deleted) and (wrong := rows[contains(self._deleted, rows)]).size:
            raise IndexError(f"The passages of rows {wrong[:5].tolist()} were deleted.")
        return rows

    def _places(self, rows, columns):
        """For each row the columns of its shard, and the row in that shard."""
        owners = np.searchsorted(self._exact.starts, rows, side="right") - 1
        shards = {
            owner: {name: self._shards[owner].passages[name] for name in columns} for owner in set(owners.tolist())
        }
        return [
            (shards[owner], row)
            for owner, row in zip(owners.tolist(), (rows - self._exact.starts[owners]).tolist(), strict=True)
        ]

    def rows_of(self, ids: Iterable[str]) -> NDArray[np.int64]:
        """
        Rows of passage ids.

        Args:
            ids (sequence of `str`): of passages in the index.

        Returns:
            `numpy.ndarray` of int64.

        Raises:
            `ValueError`: names (up to 5 of) the ids that the index does not hold.
        """
        ids = list(ids)
        rows = self.find(ids)
        if (rows < 0).any():
            missing = [ids[i] for i in np.flatnonzero(rows < 0)]
            raise ValueError(f"The index does not hold {len(missing)} of {len(ids)} ids: {missing[:5]}.")
        return rows

    def live_rows(self) -> NDArray[np.int64]:
        """Rows that hold a passage, those that were not deleted: `numpy.ndarray` of int64, in order."""
        return np.setdiff1d(np.arange(self.num_rows), self._deleted, assume_unique=True)

    def get_embeddings(self, rows: Rows) -> NDArray[np.float32]:
        """
        Passage embeddings of rows, `numpy.ndarray` of float32 `(len(rows), h)`.

        Raises:
            `IndexError`: names rows that hold no passage.
        """
        return self._exact.gather(self._checked_rows(rows)).numpy()

    def row_of(self, passage_id: str) -> int:
        """Row of a passage id; `KeyError` when the index lacks it."""
        (row,) = self.find([passage_id]).tolist()
        if row < 0:
            raise KeyError(passage_id)
        return row

    def find(self, ids: Iterable[str]) -> NDArray[np.int64]:
        """Rows of passage ids, `numpy.ndarray` of int64, -1 where the index lacks one; `ValueError` for what is no string."""
        ids = list(ids)
        if wrong := [id for id in ids if not isinstance(id, str)]:
            raise ValueError(f"{wrong[0]!r} is no passage id, expected a string.")
        if self._id_table is None:
            self._id_table = make_id_table(self._shards)
        table_hashes, table_rows = self._id_table
        hashes, rows = hash_ids(ids), np.full(len(ids), -1, np.int64)
        places, waiting = table_hashes.searchsorted(hashes), np.arange(len(ids))
        # the rows of a hash, one after the other, until the id itself is the same and not deleted
        while len(waiting):
            waiting = waiting[places[waiting] < len(table_hashes)]
            waiting = waiting[table_hashes[places[waiting]] == hashes[waiting]]
            found = table_rows[places[waiting]]
            same = [
                column["id"][row].as_py() == ids[i]
                for i, (column, row) in zip(waiting, self._places(found, ("id",)), strict=True)
            ]
            right = np.array(same, bool)
            if len(self._deleted):
                right &= ~contains(self._deleted, found)
            rows[waiting[right]] = found[right]
            waiting = waiting[~right]
            places[waiting] += 1
        return rows

    # ------------------------------------------------------------------ changing

    def delete(self, ids: Iterable[str]) -> None:
        """
        Delete passages: no search and no id finds them any more. Their rows and their bytes stay until the index is built anew.

        In a folder this is kept at once; a process that dies here leaves the index as it was before or after.

        Args:
            ids (sequence of `str`): of passages in the index.

        Raises:
            `ValueError`: names ids that the index does not hold; then none is deleted.
        """
        deleted = np.union1d(self._deleted, self.rows_of(ids))
        with self._changing():
            if self.folder is not None:
                config = self._next_config()
                self._write_deleted(self.folder, config, deleted)
                self._keep(config)
            self._deleted = deleted

    def _check_ids(self, id_table):
        """Raise when an id stands in two rows: equal hashes are neighbours in the table."""
        hashes, rows = id_table
        for i in np.flatnonzero(hashes[1:] == hashes[:-1]):
            first, second = (columns["id"][row].as_py() for columns, row in self._places(rows[i : i + 2], ("id",)))
            if first == second:
                raise ValueError(
                    f"Row {rows[i + 1]}: id {second!r} already stands in row {rows[i]}; ids must be unique."
                )

    @contextlib.contextmanager
    def _changing(self):
        """
        From its first new file to its config a change has the folder for itself; one that fails takes its files along.

        Raises:
            `ValueError`: when another process changes the folder now, or did so since this one loaded it, or the folder is in the cache of the Hub.
        """
        if self.folder is None:
            yield
            return
        if is_in_hub_cache(self.folder):
            raise ValueError(
                f"{self.folder} is in the cache of the Hub, which others share: save_pretrained it to a folder first, and load that."
            )
        lock = self.folder / LOCK_FILE
        with locked(
            lock, f"{self.folder} is being changed by another process: wait for it, then load the index again."
        ):
            try:
                self._check_unchanged()
                with self._sweeping_on_failure():
                    yield
            finally:
                lock.unlink(missing_ok=True)

    @contextlib.contextmanager
    def _sweeping_on_failure(self):
        """
        Remove the files of a change that fails.

        Files that no config names belong to this change or to one that died: the lock keeps other writers out.
        """
        try:
            yield
        except BaseException:
            sweep(self.folder, read_json(self.folder / CONFIG_FILE))
            raise

    def _check_unchanged(self):
        stored = read_json(self.folder / CONFIG_FILE)
        same = all(stored["files"].get(name) == facts for name, facts in self.config["files"].items())
        if stored["generation"] != self.config["generation"] or not same:
            raise ValueError(f"{self.folder} was changed by another process: load the index again.")

    def _next_config(self):
        """A copy of the config to change; new files are named after its generation."""
        return {**self.config, "generation": self.config["generation"] + 1, "files": dict(self.config["files"])}

    def _write_file(self, folder, config, name, write):
        """Write a file of this generation in place of the one of that kind before, and note it in the config; returns its name."""
        kind, suffix = name.split(".")
        new = f"{kind}-{config['generation']:05d}.{suffix}"
        config["files"] = {old: facts for old, facts in config["files"].items() if not old.startswith(f"{kind}-")}
        write(folder / new)
        config["files"][new] = seal(folder / new)
        return new

    def _write_deleted(self, folder, config, deleted):
        config["deleted"] = self._write_file(
            folder,
            config,
            "deleted.safetensors",
            lambda path: write_tensors(path, {"rows": torch.from_numpy(deleted)}),
        )

    def _write_id_table(self, folder, config, shards):
        config["ids"] = self._write_file(folder, config, "ids.safetensors", lambda path: make_id_table(shards, path))

    def _keep(self, config):
        """From now on the folder is what this config says."""
        self._check_unchanged()
        write_config(self.folder, config, write_json)
        self.config = config
        sweep(self.folder, config)

    # ------------------------------------------------------------------ files

    check_save_directory = staticmethod(check_save_directory)

    def save_pretrained(self, save_directory):
        """
        Write the index, whole, as a folder; see [`index_files_cosup`] for what is in it. This index goes on living where it did.

        The folder appears under its name only when it is complete; an index that stood there before is replaced.

        Args:
            save_directory (`str` or `Path`): created with its parents.

        Raises:
            `OSError`: when the folder cannot be written, or `save_directory` exists and is not an index.
        """
        save_directory = check_save_directory(save_directory)
        unfinished = Path(
            tempfile.mkdtemp(prefix=f".{save_directory.name}.", suffix=".unfinished", dir=save_directory.parent)
        )
        try:
            write_config(unfinished, self._write_files(unfinished))
            unfinished.chmod(0o755)  # mkdtemp's folder is private
            put_in_place(unfinished, save_directory)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)

    def _write_files(self, folder):
        """All files but the config, which is returned."""
        if self.folder is not None:
            for name in self.config["files"]:
                shutil.copyfile(self.folder / name, folder / name)
                flush(folder / name)
            return self.config
        config = {**self.config, "files": {}}
        for number, shard in enumerate(self._shards):
            config["files"].update(write_shard(folder, number, shard))
        self._write_id_table(folder, config, self._shards)
        if len(self._deleted):
            self._write_deleted(folder, config, self._deleted)
        return config

    @classmethod
    def _load(cls, folder, verify=None):
        """The index of a folder, mapped."""
        config = read_config(folder, verify)
        full = bool(verify) or is_in_hub_cache(folder)
        index = cls([map_shard(folder, number, full) for number in range(len(config["shards"]))], config, folder)
        for count, shard in zip(config["shards"], index._shards, strict=True):
            if not count == len(shard) == len(shard.passages) or shard.embeddings.shape[1] != config["embedding_size"]:
                shapes = f"{len(shard.passages)} passages, embeddings of shape {tuple(shard.embeddings.shape)}"
                raise ValueError(
                    f"{folder}: a shard has {shapes}, expected {count} of both and {config['embedding_size']} dimensions."
                )
        index._id_table = map_id_table(folder, config)
        if config["deleted"] is not None:
            index._deleted = read(folder / config["deleted"], map_tensors)["rows"].numpy()
            rows = index._deleted
            if (
                rows.ndim != 1
                or rows.dtype != np.int64
                or (np.diff(rows) <= 0).any()
                or (rows < 0).any()
                or (rows >= index.num_rows).any()
            ):
                raise ValueError(
                    f"{folder / config['deleted']} is damaged: expected rows from 0 to {index.num_rows - 1}, in order, each once."
                )
        return index


def is_in_hub_cache(folder):
    """Whether a folder is a snapshot in the cache of the Hub, whose files others share."""
    return folder.parent.name == "snapshots" and folder.parent.parent.name.startswith("datasets--")


def map_id_table(folder, config):
    """The table that finds ids, mapped; see [`make_id_table`]."""
    table = read(folder / config["ids"], map_tensors)
    return table["hashes"].numpy(), table["rows"].numpy()


def find_folder(name_or_path, allow_faiss_files, revision=None, **kwargs):
    """
    The folder of an index: a local one, or that of a dataset repository on the Hub, which is downloaded.

    Raises:
        `FileNotFoundError`: when it is neither.
    """
    if Path(name_or_path).is_dir():
        return Path(name_or_path).absolute()
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    try:
        folder = Path(
            snapshot_download(
                str(name_or_path), repo_type="dataset", revision=revision, allow_patterns=[CONFIG_FILE], **kwargs
            )
        )
        if is_in_hub_cache(folder):
            revision = folder.name  # the commit: both downloads are of the same one
        names = read_names(folder, allow_faiss_files)
        return Path(
            snapshot_download(
                str(name_or_path),
                repo_type="dataset",
                revision=revision,
                allow_patterns=[CONFIG_FILE, *names],
                **kwargs,
            )
        )
    except (HFValidationError, OSError) as error:
        raise FileNotFoundError(
            f"{name_or_path} is not a folder, and no dataset repository of this name could be loaded: {error}"
        ) from error


def new_config(settings, shards, files=None):
    """The config of an index that was just built."""
    config = {
        "format_version": FORMAT_VERSION,
        "generation": 0,
        **{name: settings[name] for name in ("embedding_size", "dtype", "fingerprint")},
    }
    return {
        **config,
        "shards": [len(shard) for shard in shards],
        "ids": None,
        "deleted": None,
        "approximate": None,
        "files": files or {},
    }
