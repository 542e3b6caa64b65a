"""
The files of a passage index, a folder as in [`folders_cosup`]:

    index_config.json             format_version, fingerprint, dtype, shards, ids, deleted, approximate, files
    embeddings-00000.safetensors  embeddings (n, h) of shard 0
    passages-00000.arrow          one record batch of the same n rows: id, title, text, input_ids (for Gen), id_hash,
                                  and metadata (JSON text or null) if a passage of the shard has some
    ids-00000.safetensors         hashes of all ids, sorted, and their rows
    deleted-00001.safetensors     deleted rows, sorted
    index-00002.faiss             an approximate index, read only if the user allows it
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray

from .folders_cosup import (
    Config,
    FileFacts,
    FolderFormat,
    create_tensors,
    map_tensors,
    read_or_name,
    seal,
    write_tensors,
)

try:
    import pyarrow as pa
except ImportError:
    pa = None

METADATA_COLUMN = "metadata"
PARTITION = 2**22  # ids of the id table that are sorted together

IdTable: TypeAlias = tuple[NDArray[np.int64], NDArray[np.int64]]  # hashes and rows, see make_id_table


@dataclass
class Shard:
    """
    Consecutive passages of an index, in memory or mapped from files.

    Args:
        passages (`pyarrow.RecordBatch`): columns `id`, `title`, `text`, `input_ids`, `id_hash` and perhaps
            `metadata`.
        embeddings (`torch.Tensor` of shape `(n, h)`): of the same rows, float32, float16 or bfloat16.
    """

    passages: "pa.RecordBatch"
    embeddings: torch.Tensor

    def __len__(self) -> int:
        return len(self.embeddings)


def shard_files(number: int) -> tuple[str, str]:
    """Return the names of a shard's two files: embeddings and passages."""
    return f"embeddings-{number:05d}.safetensors", f"passages-{number:05d}.arrow"


# ---------------------------------------------------------------------- writing


def write_passages(path: Path, passages: "pa.RecordBatch") -> None:
    """Write a record batch as an Arrow file."""
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, passages.schema) as writer:
        writer.write_batch(passages)


def write_shard(folder: Path, number: int, shard: Shard) -> dict[str, FileFacts]:
    """Write the files of a shard that is in memory; return their sizes and checksums by name."""
    embeddings, passages = shard_files(number)
    write_tensors(folder / embeddings, {"embeddings": shard.embeddings})
    write_passages(folder / passages, shard.passages)
    return {name: seal(folder / name) for name in (embeddings, passages)}


def make_id_table(shards: list[Shard], path: Path | None = None) -> IdTable:
    """
    Make the table that finds ids: their hashes, sorted, and their rows.

    The range of hashes is split into partitions, which are sorted one by one to limit the memory that it takes.

    Args:
        shards (`list[Shard]`): all shards of the index.
        path (`Path`, *optional*): file for the table; without it the table is in memory.

    Returns:
        `(hashes, rows)`: `numpy.ndarray` of int64, both `(M,)`. Equal hashes are in the order of their rows.
    """
    count = sum(map(len, shards))
    if path is None:
        table = {name: torch.empty(count, dtype=torch.int64) for name in ("hashes", "rows")}
    else:
        table = create_tensors(path, {name: ((count,), torch.int64) for name in ("hashes", "rows")})
    hashes, rows = table["hashes"].numpy(), table["rows"].numpy()
    bits = max(0, math.ceil(math.log2(max(count, 1) / PARTITION)))
    start = 0
    for partition in range(2**bits):
        partition_hashes, partition_rows = _hashes_of_partition(shards, partition, bits)
        order = partition_hashes.argsort(kind="stable")
        end = start + len(order)
        hashes[start:end] = partition_hashes[order]
        rows[start:end] = partition_rows[order]
        start = end
    return hashes, rows


def _hashes_of_partition(shards: list[Shard], partition: int, bits: int) -> IdTable:
    """Return the hashes in one of `2**bits` equal ranges of int64, and their rows, ordered by row."""
    hashes, rows, first_row = [], [], 0
    for shard in shards:
        column = shard.passages["id_hash"].to_numpy()
        if bits:
            inside = np.flatnonzero((column >> (64 - bits)) + 2 ** (bits - 1) == partition)
        else:
            inside = np.arange(len(column))
        hashes.append(column[inside])
        rows.append(inside + first_row)
        first_row += len(shard)
    return np.concatenate(hashes), np.concatenate(rows)


# ---------------------------------------------------------------------- reading


def passage_schema() -> "pa.Schema":
    """Return the columns of every Arrow file; one with metadata has a further column, `METADATA_COLUMN`."""
    columns = [(name, pa.large_string()) for name in ("id", "title", "text")]
    return pa.schema([*columns, ("input_ids", pa.large_list(pa.int32())), ("id_hash", pa.int64())])


def map_passages(path: Path, full: bool = False) -> "pa.RecordBatch":
    """
    Map the record batch of an Arrow file.

    With `full` every offset is checked, because a wrong one would kill the process with a signal. Otherwise only
    lengths and the last offsets are checked, which takes no time.
    """
    reader = pa.ipc.open_file(pa.memory_map(str(path)))
    if reader.num_record_batches != 1:
        raise ValueError(f"found {reader.num_record_batches} record batches, expected one")
    expected = passage_schema()
    if METADATA_COLUMN in reader.schema.names:
        expected = expected.append(pa.field(METADATA_COLUMN, pa.large_string()))
    if not reader.schema.equals(expected):
        raise ValueError(f"found the columns {reader.schema.to_string()!r}, expected {expected.to_string()!r}")
    passages = reader.get_batch(0)
    passages.validate(full=full)
    return passages


def map_shard(folder: Path, number: int, full: bool = False) -> Shard:
    """Map a [`Shard`] from its files; for `full` see [`map_passages`]."""
    embeddings_file, passages_file = shard_files(number)
    passages = read_or_name(folder / passages_file, lambda path: map_passages(path, full))
    embeddings = read_or_name(folder / embeddings_file, lambda path: map_tensors(path)["embeddings"])
    return Shard(passages, embeddings)


def _needed_files(config: Config) -> list[tuple[str, str]]:
    """Return the kind and name of every file that a config needs, whether or not its list of files has it."""
    needed = []
    for number in range(len(config["shards"])):
        embeddings, passages = shard_files(number)
        needed += [("embeddings", embeddings), ("passages", passages)]
    needed.append(("ids", config["ids"]))
    if config["deleted"] is not None:
        needed.append(("deleted", config["deleted"]))
    if config["approximate"] is not None:
        needed.append(("index", config["approximate"].get("file")))
    return needed


INDEX_FORMAT = FolderFormat(
    name="passage index",
    remedy="build the index again, with recipes/build_index.py",
    config_file="index_config.json",
    version=2,
    config_types={
        "generation": int,
        "embedding_size": int,
        "dtype": str,
        "fingerprint": dict,
        "shards": list,
        "ids": str,
        "files": dict,
        "deleted": (str, type(None)),
        "approximate": (dict, type(None)),
    },
    patterns=(
        *("embeddings-*.safetensors", "passages-*.arrow", "ids-*.safetensors", "deleted-*.safetensors"),
        "index-*.faiss",
    ),
    needed_files=_needed_files,
    repo_type="dataset",
)
