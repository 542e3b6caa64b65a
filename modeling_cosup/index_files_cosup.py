"""
The files of a passage index: what they are called, how they are written, mapped into memory and checked.

A folder is an index when it holds `index_config.json`, which is written last and names every other file with its size and SHA-256:

    index_config.json             format_version, fingerprint, dtype, shards, ids, deleted, approximate, files
    embeddings-00000.safetensors  embeddings (n, h) of shard 0
    passages-00000.arrow          one record batch of the same n rows: id, title, text, input_ids (as Gen reads them), id_hash
    ids-00000.safetensors         hashes of all ids, sorted, and their rows
    deleted-00001.safetensors     rows that were deleted, sorted
    index-00002.faiss             an approximate index, read only on request

Files are never changed once the config names them: a change writes new ones, then replaces the config. So a process that dies leaves the old state or the new.
"""

import json
import math
import os
import re
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open

from .files_cosup import BLOCK, digest, digest_file, read_json, write_json

try:
    import pyarrow as pa
except ImportError:
    pa = None

FORMAT_VERSION = 2
CONFIG_FILE = "index_config.json"
FILE_PATTERNS = [
    CONFIG_FILE,
    "embeddings-*.safetensors",
    "passages-*.arrow",
    "ids-*.safetensors",
    "deleted-*.safetensors",
]
FAISS_PATTERN = "index-*.faiss"
LOCK_FILE = ".lock"  # held by the process that changes the folder
FILE_NAME = re.compile(
    r"(embeddings|ids|deleted)-[0-9]{5,}\.safetensors|passages-[0-9]{5,}\.arrow|index-[0-9]{5,}\.faiss"
)
UNFINISHED_PATTERNS = [
    "shard-*.json",
    "done-*.json",
    "build.json",
    f".{CONFIG_FILE}.*",
    ".shard-*.json.*",
    ".done-*.json.*",
    ".build.json.*",
]
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
ALWAYS_VERIFIED = (
    16 * 2**20
)  # bytes: the SHA-256 of a smaller file is checked at every load, which takes a hundredth of a second
PARTITION = 2**22  # ids of the id table that are sorted at once
_SAFETENSORS_NAMES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64"}


@dataclass
class Shard:
    """
    Consecutive passages of an index, in memory or mapped from files.

    Args:
        passages (`pyarrow.RecordBatch`): columns `id`, `title`, `text`, `input_ids` and `id_hash`.
        embeddings (`torch.Tensor` of shape `(n, h)`): of the same rows, float32, float16 or bfloat16.
    """

    passages: Any
    embeddings: torch.Tensor

    def __len__(self):
        return len(self.embeddings)


def shard_files(number):
    """Names of the two files of a shard."""
    return f"embeddings-{number:05d}.safetensors", f"passages-{number:05d}.arrow"


# ---------------------------------------------------------------------- writing


def create_tensors(path, tensors):
    """
    A safetensors file, mapped into memory, to be filled in place: what is written to the tensors is in the file.

    Args:
        path (`Path`): overwritten.
        tensors (`dict`): name to `(shape, torch.dtype)`.

    Returns:
        `dict[str, torch.Tensor]`: zeros.

    Raises:
        `OSError`: when the disk has no room. All of it is taken now: a mapped page without room behind it would end the process by a signal.
    """
    header, size = {}, 0
    for name, (shape, dtype) in tensors.items():
        end = size + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": _SAFETENSORS_NAMES[dtype], "shape": list(shape), "data_offsets": [size, end]}
        size = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the format asks for aligned data
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for start in range(0, size, BLOCK):
            file.write(bytes(min(BLOCK, size - start)))
    if not size:
        return {name: torch.zeros(shape, dtype=dtype) for name, (shape, dtype) in tensors.items()}
    data = torch.from_numpy(np.memmap(path, np.uint8, "r+", offset=8 + len(text), shape=(size,)))
    return {
        name: data[slice(*header[name]["data_offsets"])].view(dtype).view(shape)
        for name, (shape, dtype) in tensors.items()
    }


def write_tensors(path, tensors):
    """Write `dict[str, torch.Tensor]` as safetensors, a block of rows at a time: mapped tensors are not read into memory whole."""
    for name, target in create_tensors(
        path, {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
    ).items():
        for start in range(0, len(target), 8192):
            target[start : start + 8192] = tensors[name][start : start + 8192]


def write_passages(path, passages):
    """Write a `pyarrow.RecordBatch` as an Arrow file."""
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, passages.schema) as writer:
        writer.write_batch(passages)


def seal(path):
    """`{"size", "sha256"}` of a file that is complete, once it has reached the disk."""
    flush(path)
    return {"size": path.stat().st_size, "sha256": digest_file(path)}


def flush(path):
    """Wait until a file has reached the disk."""
    with open(path, "rb+") as file:
        os.fsync(file.fileno())


def digest_of_config(config):
    """SHA-256 of a config without `files`, whose entries are compared with the files themselves."""
    return digest({name: value for name, value in config.items() if name not in ("files", "sha256")})


def signed(config):
    """A config with its own SHA-256, as `index_config.json` holds it."""
    return {**config, "sha256": digest_of_config(config)}


def write_config(folder, config, write=write_json):
    """Write `index_config.json`."""
    write(folder / CONFIG_FILE, signed(config))


def write_shard(folder, number, shard):
    """Write a shard that is in memory; `dict` of its files' sizes and checksums."""
    embeddings, passages = shard_files(number)
    write_tensors(folder / embeddings, {"embeddings": shard.embeddings})
    write_passages(folder / passages, shard.passages)
    return {name: seal(folder / name) for name in (embeddings, passages)}


def make_id_table(shards, path=None):
    """
    The table that finds ids: their hashes, sorted, and their rows, in partitions of the range of hashes, so that memory stays flat.

    Args:
        shards (`list[Shard]`): of the whole index.
        path (`Path`, *optional*): of a file to write; else the table is made in memory.

    Returns:
        `(hashes, rows)`: `numpy.ndarray` of int64, both `(M,)`. Equal hashes stand in the order of their rows.
    """
    count = sum(map(len, shards))
    specs = {"hashes": ((count,), torch.int64), "rows": ((count,), torch.int64)}
    table = (
        {name: torch.empty(*spec[0], dtype=spec[1]) for name, spec in specs.items()}
        if path is None
        else create_tensors(path, specs)
    )
    hashes, rows = table["hashes"].numpy(), table["rows"].numpy()
    starts = np.cumsum([0, *map(len, shards)])
    bits = max(0, math.ceil(math.log2(max(count, 1) / PARTITION)))
    done = 0
    for partition in range(2**bits):
        found = []
        for start, shard in zip(starts, shards, strict=False):
            column = shard.passages["id_hash"].to_numpy()
            inside = (
                np.flatnonzero((column >> (64 - bits)) + 2 ** (bits - 1) == partition)
                if bits
                else np.arange(len(column))
            )
            found.append((column[inside], inside + start))
        part_hashes, part_rows = (np.concatenate(parts) for parts in zip(*found, strict=True))
        order = part_hashes.argsort(kind="stable")
        hashes[done : done + len(order)], rows[done : done + len(order)] = part_hashes[order], part_rows[order]
        done += len(order)
    return hashes, rows


# ---------------------------------------------------------------------- reading


def read(path, reader):
    """`reader(path)`, its errors as a `ValueError` that names the file."""
    try:
        return reader(path)
    except Exception as error:  # json, pyarrow and safetensors each raise their own
        raise ValueError(f"{path} is damaged: {error}") from error


def map_tensors(path):
    """`dict[str, torch.Tensor]` of a safetensors file, mapped: a page is read when it is looked at."""
    with safe_open(path, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}


def passage_schema():
    """The columns of every Arrow file."""
    columns = [(name, pa.large_string()) for name in ("id", "title", "text")]
    return pa.schema([*columns, ("input_ids", pa.large_list(pa.int32())), ("id_hash", pa.int64())])


def map_passages(path, full=False):
    """The `pyarrow.RecordBatch` of an Arrow file, mapped; `full` looks at every offset, of which a bad one would end the process by a signal."""
    reader = pa.ipc.open_file(pa.memory_map(str(path)))
    if reader.num_record_batches != 1:
        raise ValueError(f"found {reader.num_record_batches} record batches, expected one")
    if not reader.schema.equals(passage_schema()):
        raise ValueError(f"found the columns {reader.schema.to_string()!r}, expected {passage_schema().to_string()!r}")
    passages = reader.get_batch(0)
    passages.validate(full=full)  # else lengths and the last offsets: what costs no time
    return passages


def map_shard(folder, number, full=False):
    """A [`Shard`] mapped from its files; for `full` see [`map_passages`]."""
    embeddings, passages = shard_files(number)
    return Shard(
        read(folder / passages, lambda path: map_passages(path, full)),
        read(folder / embeddings, lambda path: map_tensors(path)["embeddings"]),
    )


def read_config(folder, verify=None):
    """
    The config of an index folder, once the files that it names are there and whole.

    Args:
        folder (`Path`): of the index.
        verify (`bool`, *optional*): compare SHA-256 of every file (`True`) or of none (`False`); by default of those below 16 MB. Sizes always are.

    Raises:
        `FileNotFoundError`: when the folder is no complete index; names the missing file.
        `ValueError`: names a damaged file, what is wrong with the config, or a format version that this release does not read.
    """
    config = _read_checked(folder)
    config.pop("sha256", None)  # of the file, not of the config that changes in memory
    for name, facts in config["files"].items():
        if (
            config["approximate"] is None or name != config["approximate"]["file"]
        ):  # that one is checked when it is asked for
            check_file(folder / name, facts, verify)
    return config


def read_names(folder, allow_faiss_files):
    """Names of the files that a config, once it was checked, lists; that of an approximate index only on request."""
    return [name for name in _read_checked(folder)["files"] if allow_faiss_files or not name.endswith(".faiss")]


def _read_checked(folder):
    """The config of a folder, checked by itself, whether or not its files are there."""
    path = folder / CONFIG_FILE
    if not path.exists():
        raise FileNotFoundError(f"{folder} is not a complete passage index: {CONFIG_FILE} is missing.")
    config = read(path, read_json)
    version = config.get("format_version") if isinstance(config, dict) else None
    if version != FORMAT_VERSION:
        raise ValueError(
            f"{path} has format_version {version!r}, this release reads {FORMAT_VERSION}: build the index again, with recipes/build_index.py."
        )
    check_config(path, config)
    return config


def check_config(path, config):
    """
    Raise `ValueError` unless a config is one that an index wrote. Its names are joined to the folder: none may lead out of it.

    Args:
        path (`Path`): of the config, for messages.
        config (`dict`): of this format version.
    """
    types = {
        "generation": int,
        "embedding_size": int,
        "dtype": str,
        "fingerprint": dict,
        "shards": list,
        "ids": str,
        "files": dict,
    }
    types = {**types, "deleted": (str, type(None)), "approximate": (dict, type(None))}
    if wrong := [name for name, kind in types.items() if name not in config or not isinstance(config[name], kind)]:
        raise ValueError(f"{path} is damaged: {', '.join(wrong)} missing or of a wrong type.")
    if config.get("sha256", digest_of_config(config)) != digest_of_config(config):
        raise ValueError(
            f"{path} is damaged: its SHA-256 is not the one that it holds. Copy or build the index again."
        )
    if (
        config["dtype"] not in DTYPES
        or not config["shards"]
        or not all(type(count) is int and count > 0 for count in config["shards"])
    ):
        raise ValueError(f"{path} is damaged: dtype is {config['dtype']!r}, shards are {config['shards'][:5]}.")
    for name, facts in config["files"].items():
        right = isinstance(facts, dict) and isinstance(facts.get("size"), int) and isinstance(facts.get("sha256"), str)
        if not FILE_NAME.fullmatch(name) or not right:
            raise ValueError(
                f"{path} is damaged: {name!r} is no file of an index, or its size and SHA-256 are missing."
            )
    needed = [
        ("embeddings" if i == 0 else "passages", name)
        for number in range(len(config["shards"]))
        for i, name in enumerate(shard_files(number))
    ]
    needed += [(kind, config[kind]) for kind in ("ids", "deleted") if config[kind] is not None]
    if config["approximate"] is not None:
        needed.append(("index", config["approximate"].get("file")))
    for kind, name in needed:
        if name not in config["files"] or not name.startswith(f"{kind}-"):
            raise ValueError(f"{path} is damaged: it does not list {name!r} among its files.")


def check_file(path, facts, verify=None):
    """Raise `FileNotFoundError` or `ValueError` unless a file is what the config says; see [`read_config`]."""
    if not path.exists():
        raise FileNotFoundError(f"{path.parent} is not a complete passage index: {path.name} is missing.")
    size = path.stat().st_size
    if size != facts["size"]:
        raise ValueError(
            f"{path} is damaged: it has {size:,} bytes, expected {facts['size']:,}. Copy or build the index again."
        )
    if (verify or (verify is None and size <= ALWAYS_VERIFIED)) and digest_file(path) != facts["sha256"]:
        raise ValueError(
            f"{path} is damaged: its SHA-256 is not that of {CONFIG_FILE}. Copy or build the index again."
        )


# ---------------------------------------------------------------------- folders


def check_save_directory(save_directory):
    """
    Raise now what saving would raise after an hour of embedding; its parents are created.

    Raises:
        `OSError`: when the folder cannot be written, or exists and is neither empty nor an index, or holds other files too: they would be gone.
    """
    save_directory = Path(os.path.abspath(save_directory))  # "." has no name to put a folder beside
    if save_directory.exists() and any(save_directory.iterdir()) and not (save_directory / CONFIG_FILE).exists():
        raise FileExistsError(
            f"{save_directory} exists, is not empty and is not a passage index; choose another folder."
        )
    if save_directory.exists() and (
        foreign := sorted(path.name for path in save_directory.iterdir() if not _is_ours(path))
    ):
        raise FileExistsError(
            f"{save_directory} also holds {', '.join(foreign[:5])}, which replacing the index would delete; choose another folder."
        )
    save_directory.parent.mkdir(parents=True, exist_ok=True)
    tempfile.TemporaryFile(dir=save_directory.parent).close()
    return save_directory


def _is_ours(path):
    """Whether a file is one that an index or its build writes."""
    if path.is_dir():
        return False
    return (
        path.name in (CONFIG_FILE, LOCK_FILE)
        or bool(FILE_NAME.fullmatch(path.name))
        or any(path.match(pattern) for pattern in UNFINISHED_PATTERNS)
    )


def put_in_place(unfinished, save_directory):
    """Give a complete folder its name; an index that stood there before goes, or stays if this fails."""
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


def sweep(folder, config):
    """Remove files that the config does not name: those of the build, of the state before, and of a change that died half-way."""
    for pattern in (*FILE_PATTERNS[1:], FAISS_PATTERN, *UNFINISHED_PATTERNS):
        for path in folder.glob(pattern):
            if path.name not in config["files"]:
                path.unlink(missing_ok=True)
