"""
The files of a token datastore, a folder as in [`folders_cosup`]:

    memory_config.json        memory_type, format_version, fingerprint, dtype, build, shards, memory_config, files, …
    keys-00000.safetensors    document_starts (D,), half_norms (n,), values (n,) and keys (n, d) of shard 0
    index-00001.faiss         an approximate index, read only if the user allows it
"""

import hashlib
from pathlib import Path

import torch

from .datastore_search_cosup import KeyShard
from .folders_cosup import Config, FileFacts, FolderFormat, create_tensors, map_tensors, read_or_name, seal

MEMORY_TYPE = "knn"
_BLOCK = 2**20  # entries that are hashed or written at a time


def keys_file(number: int) -> str:
    """Return the name of the file of a shard."""
    return f"keys-{number:05d}.safetensors"


def create_shard(path: Path | None, num_documents: int, count: int, key_size: int, dtype: torch.dtype) -> KeyShard:
    """Return a shard of zeros, to be filled: mapped from a new file, or in memory without a `path`."""
    specs = {  # the widest numbers first, so that all are aligned
        "document_starts": ((num_documents,), torch.int64),
        "half_norms": ((count,), torch.float32),
        "values": ((count,), torch.int32),
        "keys": ((count, key_size), dtype),
    }
    if path is None:
        return KeyShard(**{name: torch.zeros(shape, dtype=dtype) for name, (shape, dtype) in specs.items()})
    return KeyShard(**create_tensors(path, specs))


def write_shard(folder: Path, number: int, shard: KeyShard) -> dict[str, FileFacts]:
    """Write a shard that is in memory; return the size and checksum of its file by name."""
    path = folder / keys_file(number)
    num_keys, key_size = shard.keys.shape
    file = create_shard(path, len(shard.document_starts), num_keys, key_size, shard.keys.dtype)
    for name in ("document_starts", "half_norms", "values", "keys"):
        target, source = getattr(file, name), getattr(shard, name)
        for start in range(0, len(source), _BLOCK):
            target[start : start + _BLOCK] = source[start : start + _BLOCK]
    return {path.name: seal(path)}


def map_shard(folder: Path, number: int) -> KeyShard:
    """Map a shard from its file; `ValueError` names a damaged one."""
    return read_or_name(folder / keys_file(number), _map_shard)


def _map_shard(path: Path) -> KeyShard:
    tensors = map_tensors(path)
    shard = KeyShard(**tensors)
    count = len(shard)
    shapes_fit = shard.keys.ndim == 2 and shard.half_norms.shape == shard.values.shape == (count,)
    dtypes = (shard.half_norms.dtype, shard.values.dtype, shard.document_starts.dtype)
    if not shapes_fit or dtypes != (torch.float32, torch.int32, torch.int64):
        raise ValueError(
            f"its tensors are {[(name, *tensor.shape, tensor.dtype) for name, tensor in tensors.items()]}"
        )
    return shard


def content_digest(shards: list[KeyShard]) -> str:
    """Return the SHA-256 (hex) of all values and norms, however they are split into shards."""
    total = hashlib.sha256()
    for name in ("values", "half_norms"):
        for shard in shards:
            for block in getattr(shard, name).split(_BLOCK):
                total.update(block.numpy().tobytes())
    return total.hexdigest()


def _needed_files(config: Config) -> list[tuple[str, str]]:
    """Return the kind and name of every file that a config needs, whether or not its list of files has it."""
    needed = [("keys", keys_file(number)) for number in range(len(config["shards"]))]
    if config["approximate"] is not None:
        needed.append(("index", config["approximate"].get("file")))
    return needed


MEMORY_FORMAT = FolderFormat(
    name="kNN memory",
    remedy="build the memory again, with recipes/build_memory.py",
    config_file="memory_config.json",
    version=1,
    config_types={
        "memory_type": str,
        "generation": int,
        "key_size": int,
        "vocab_size": int,
        "dtype": str,
        "fingerprint": dict,
        "shards": list,
        "content": str,
        "memory_config": dict,
        "files": dict,
        "approximate": (dict, type(None)),
    },
    patterns=("keys-*.safetensors", "index-*.faiss", "memory_fit.json"),  # the last: what train_memory.py tried
    needed_files=_needed_files,
    repo_type="dataset",
)
