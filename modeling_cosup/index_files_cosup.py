"""
The files of a passage index: their names, and how they are written, mapped into memory and checked.

A folder is an index if it holds `index_config.json`, which is written last and lists every other file with its size
and SHA-256:

    index_config.json             format_version, fingerprint, dtype, shards, ids, deleted, approximate, files
    embeddings-00000.safetensors  embeddings (n, h) of shard 0
    passages-00000.arrow          one record batch of the same n rows: id, title, text, input_ids (for Gen), id_hash
    ids-00000.safetensors         hashes of all ids, sorted, and their rows
    deleted-00001.safetensors     deleted rows, sorted
    index-00002.faiss             an approximate index, read only if the user allows it

A file never changes once the config lists it: a change writes new files, then replaces the config. So a process that
dies leaves either the old state or the new one.
"""

import json
import math
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias, TypedDict, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import safe_open

from .files_cosup import BLOCK, digest, digest_file, read_json, write_json

try:
    import pyarrow as pa
except ImportError:
    pa = None

FORMAT_VERSION = 2
CONFIG_FILE = "index_config.json"
FILE_PATTERNS = [CONFIG_FILE, "embeddings-*.safetensors", "passages-*.arrow"]
FILE_PATTERNS += ["ids-*.safetensors", "deleted-*.safetensors"]
FAISS_PATTERN = "index-*.faiss"
LOCK_FILE = ".lock"  # held by the process that changes the folder
FILE_NAME = re.compile(
    r"(embeddings|ids|deleted)-[0-9]{5,}\.safetensors|passages-[0-9]{5,}\.arrow|index-[0-9]{5,}\.faiss"
)
UNFINISHED_PATTERNS = ["shard-*.json", "done-*.json", "build.json"]
UNFINISHED_PATTERNS += [f".{name}.*" for name in (CONFIG_FILE, *UNFINISHED_PATTERNS)]  # temporary files of write_json
CONFIG_TYPES: dict[str, type | tuple[type, ...]] = {
    "generation": int,
    "embedding_size": int,
    "dtype": str,
    "fingerprint": dict,
    "shards": list,
    "ids": str,
    "files": dict,
    "deleted": (str, type(None)),
    "approximate": (dict, type(None)),
}
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
ALWAYS_VERIFIED = 16 * 2**20  # bytes; the SHA-256 of smaller files is checked at every load: a hundredth of a second
PARTITION = 2**22  # ids of the id table that are sorted together
_ROWS_PER_WRITE = 8192
_SAFETENSORS_NAMES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64"}

IndexConfig: TypeAlias = dict[str, Any]  # content of index_config.json, see check_config
IdTable: TypeAlias = tuple[NDArray[np.int64], NDArray[np.int64]]  # hashes and rows, see make_id_table
T = TypeVar("T")


class FileFacts(TypedDict):
    """What the config records about a file."""

    size: int  # bytes
    sha256: str


@dataclass
class Shard:
    """
    Consecutive passages of an index, in memory or mapped from files.

    Args:
        passages (`pyarrow.RecordBatch`): columns `id`, `title`, `text`, `input_ids` and `id_hash`.
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


def create_tensors(path: Path, tensors: Mapping[str, tuple[tuple[int, ...], torch.dtype]]) -> dict[str, torch.Tensor]:
    """
    Create a safetensors file to be filled in place: what is written to the returned tensors is in the file.

    Args:
        path (`Path`): overwritten.
        tensors (`dict`): name to `(shape, torch.dtype)`.

    Returns:
        `dict[str, torch.Tensor]`: zeros, mapped from the file.

    Raises:
        `OSError`: if the disk is full. The whole file is allocated now, because writing to a mapped page for which
            there is no room would end the process by a signal.
    """
    header: dict[str, dict[str, Any]] = {}
    size = 0
    for name, (shape, dtype) in tensors.items():
        end = size + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": _SAFETENSORS_NAMES[dtype], "shape": list(shape), "data_offsets": [size, end]}
        size = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the format requires aligned data
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for start in range(0, size, BLOCK):
            file.write(bytes(min(BLOCK, size - start)))
    if not size:
        return {name: torch.zeros(shape, dtype=dtype) for name, (shape, dtype) in tensors.items()}
    data = torch.from_numpy(np.memmap(path, np.uint8, "r+", offset=8 + len(text), shape=(size,)))
    mapped = {}
    for name, (shape, dtype) in tensors.items():
        start, end = header[name]["data_offsets"]
        mapped[name] = data[start:end].view(dtype).view(shape)
    return mapped


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Write tensors as safetensors, a block of rows at a time, so that mapped ones are never wholly in memory."""
    specs = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
    for name, target in create_tensors(path, specs).items():
        for start in range(0, len(target), _ROWS_PER_WRITE):
            target[start : start + _ROWS_PER_WRITE] = tensors[name][start : start + _ROWS_PER_WRITE]


def write_passages(path: Path, passages: "pa.RecordBatch") -> None:
    """Write a record batch as an Arrow file."""
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, passages.schema) as writer:
        writer.write_batch(passages)


def seal(path: Path) -> FileFacts:
    """Wait until a complete file is on the disk, then return its size and SHA-256."""
    flush(path)
    return {"size": path.stat().st_size, "sha256": digest_file(path)}


def flush(path: Path) -> None:
    """Wait until a file is on the disk."""
    with open(path, "rb+") as file:
        os.fsync(file.fileno())


def digest_of_config(config: IndexConfig) -> str:
    """Return the SHA-256 of a config without its `files`, which are compared with the files themselves."""
    return digest({name: value for name, value in config.items() if name not in ("files", "sha256")})


def signed(config: IndexConfig) -> IndexConfig:
    """Return a config with its own SHA-256, as written to `index_config.json`."""
    return {**config, "sha256": digest_of_config(config)}


def write_config(folder: Path, config: IndexConfig) -> None:
    """Write `index_config.json`."""
    write_json(folder / CONFIG_FILE, signed(config))


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


def _read(path: Path, reader: Callable[[Path], T]) -> T:
    """Return `reader(path)`; any error becomes a `ValueError` that names the file."""
    try:
        return reader(path)
    except Exception as error:  # json, pyarrow and safetensors each raise their own
        raise ValueError(f"{path} is damaged: {error}") from error


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """Map the tensors of a safetensors file; `ValueError` names a damaged file. A page is read when it is accessed."""
    return _read(path, _map_tensors)


def _map_tensors(path: Path) -> dict[str, torch.Tensor]:
    with safe_open(path, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}


def passage_schema() -> "pa.Schema":
    """Return the columns of every Arrow file."""
    columns = [(name, pa.large_string()) for name in ("id", "title", "text")]
    return pa.schema([*columns, ("input_ids", pa.large_list(pa.int32())), ("id_hash", pa.int64())])


def map_passages(path: Path, full: bool = False) -> "pa.RecordBatch":
    """
    Map the record batch of an Arrow file.

    With `full` every offset is checked, because a wrong one would end the process by a signal. Otherwise only lengths
    and the last offsets are checked, which takes no time.
    """
    reader = pa.ipc.open_file(pa.memory_map(str(path)))
    if reader.num_record_batches != 1:
        raise ValueError(f"found {reader.num_record_batches} record batches, expected one")
    if not reader.schema.equals(passage_schema()):
        raise ValueError(f"found the columns {reader.schema.to_string()!r}, expected {passage_schema().to_string()!r}")
    passages = reader.get_batch(0)
    passages.validate(full=full)
    return passages


def map_shard(folder: Path, number: int, full: bool = False) -> Shard:
    """Map a [`Shard`] from its files; for `full` see [`map_passages`]."""
    embeddings_file, passages_file = shard_files(number)
    passages = _read(folder / passages_file, lambda path: map_passages(path, full))
    embeddings = _read(folder / embeddings_file, lambda path: _map_tensors(path)["embeddings"])
    return Shard(passages, embeddings)


def read_config(folder: Path, verify: bool | None = None) -> IndexConfig:
    """
    Read the config of an index folder, and check all files that it lists, except an approximate index.

    Args:
        folder (`Path`): of the index.
        verify (`bool`, *optional*): compare the SHA-256 of every file (`True`), of none (`False`), or of files up to
            16 MB (default). Sizes are always compared.

    Raises:
        `FileNotFoundError`: if the folder is not a complete index; names the missing file.
        `ValueError`: names a damaged file, an error in the config, or a format version that this release cannot read.
    """
    config = _read_checked(folder)
    config.pop("sha256", None)  # of the file, not of the config that changes in memory
    approximate_file = config["approximate"]["file"] if config["approximate"] is not None else None
    for name, facts in config["files"].items():
        if name != approximate_file:
            check_file(folder / name, facts, verify)
    return config


def read_names(folder: Path, allow_faiss_files: bool) -> list[str]:
    """Return the names of the files that a config lists; a FAISS file only with `allow_faiss_files`."""
    return [name for name in _read_checked(folder)["files"] if allow_faiss_files or not name.endswith(".faiss")]


def _read_checked(folder: Path) -> IndexConfig:
    """Read the config of a folder and check it, whether or not the files that it lists exist."""
    path = folder / CONFIG_FILE
    if not path.exists():
        raise FileNotFoundError(f"{folder} is not a complete passage index: {CONFIG_FILE} is missing.")
    config = _read(path, read_json)
    version = config.get("format_version") if isinstance(config, dict) else None
    if version != FORMAT_VERSION:
        raise ValueError(
            f"{path} has format_version {version!r}, this release reads {FORMAT_VERSION}: build the index again, with"
            " recipes/build_index.py."
        )
    check_config(path, config)
    return config


def check_config(path: Path, config: IndexConfig) -> None:
    """
    Raise `ValueError` unless a config is one that an index wrote.

    File names are checked too: they are joined to the folder, and none may lead out of it.

    Args:
        path (`Path`): path of the config, for error messages.
        config (`dict`): a config of this format version.
    """
    wrong = []
    for name, expected_type in CONFIG_TYPES.items():
        if name not in config or not isinstance(config[name], expected_type):
            wrong.append(name)
    if wrong:
        raise ValueError(f"{path} is damaged: {', '.join(wrong)} missing or of the wrong type.")
    if config.get("sha256", digest_of_config(config)) != digest_of_config(config):
        raise ValueError(f"{path} is damaged: it does not match its own SHA-256. Copy or build the index again.")
    valid_counts = all(type(count) is int and count > 0 for count in config["shards"])
    if config["dtype"] not in DTYPES or not config["shards"] or not valid_counts:
        raise ValueError(f"{path} is damaged: dtype is {config['dtype']!r}, shards are {config['shards'][:5]}.")
    for name, facts in config["files"].items():
        valid = isinstance(facts, dict) and isinstance(facts.get("size"), int) and isinstance(facts.get("sha256"), str)
        if not FILE_NAME.fullmatch(name) or not valid:
            raise ValueError(f"{path} is damaged: {name!r} is not a file of an index, or lacks its size or SHA-256.")
    for kind, name in _needed_files(config):
        if name not in config["files"] or not name.startswith(f"{kind}-"):
            raise ValueError(f"{path} is damaged: it does not list {name!r} among its files.")


def _needed_files(config: IndexConfig) -> list[tuple[str, str]]:
    """Return the kind and name of every file that a config needs, apart from its list of files."""
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


def check_file(path: Path, facts: FileFacts, verify: bool | None = None) -> None:
    """Raise `FileNotFoundError` or `ValueError` unless a file is as recorded; for `verify` see [`read_config`]."""
    if not path.exists():
        raise FileNotFoundError(f"{path.parent} is not a complete passage index: {path.name} is missing.")
    size = path.stat().st_size
    if size != facts["size"]:
        raise ValueError(
            f"{path} is damaged: it has {size:,} bytes, expected {facts['size']:,}. Copy or build the index again."
        )
    if verify is None:
        verify = size <= ALWAYS_VERIFIED
    if verify and digest_file(path) != facts["sha256"]:
        raise ValueError(f"{path} is damaged: its SHA-256 differs from the config's. Copy or build the index again.")


# ---------------------------------------------------------------------- folders


def check_save_directory(save_directory: str | os.PathLike[str]) -> Path:
    """
    Return the absolute path of an index to save, and create its parents; fail now, not after an hour of embedding.

    Raises:
        `OSError`: if the folder cannot be written, is neither empty nor an index, or also holds other files, which
            would be lost.
    """
    folder = Path(os.path.abspath(save_directory))  # "." has no name to put a folder next to
    if folder.exists():
        entries = list(folder.iterdir())
        if entries and not (folder / CONFIG_FILE).exists():
            raise FileExistsError(f"{folder} exists, is not empty and is not a passage index; choose another folder.")
        foreign = sorted(path.name for path in entries if not _is_ours(path))
        if foreign:
            raise FileExistsError(
                f"{folder} also holds {', '.join(foreign[:5])}, which a new index would delete; choose another folder."
            )
    folder.parent.mkdir(parents=True, exist_ok=True)
    tempfile.TemporaryFile(dir=folder.parent).close()
    return folder


def _is_ours(path: Path) -> bool:
    """Return whether a path is a file that an index or its build writes."""
    if path.is_dir():
        return False
    if path.name in (CONFIG_FILE, LOCK_FILE) or FILE_NAME.fullmatch(path.name):
        return True
    return any(path.match(pattern) for pattern in UNFINISHED_PATTERNS)


def put_in_place(unfinished: Path, save_directory: Path) -> None:
    """Rename a complete folder to its final name; an index of that name is replaced, or stays if this fails."""
    replaced = unfinished.with_suffix(".replaced")
    shutil.rmtree(replaced, ignore_errors=True)
    if save_directory.exists():
        os.replace(save_directory, replaced)
    try:
        os.replace(unfinished, save_directory)
    except OSError:
        if replaced.exists():
            os.replace(replaced, save_directory)
        raise
    shutil.rmtree(replaced, ignore_errors=True)


def sweep(folder: Path, config: IndexConfig) -> None:
    """Remove files that the config does not list: left from the build, an earlier state or a failed change."""
    for pattern in (*FILE_PATTERNS[1:], FAISS_PATTERN, *UNFINISHED_PATTERNS):
        for path in folder.glob(pattern):
            if path.name not in config["files"]:
                path.unlink(missing_ok=True)
