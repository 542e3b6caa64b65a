"""
Folders of tensors that only change as a whole: how their files are written, mapped into memory and checked.

A folder is complete if it holds its config, which is written last and lists every other file with its size and
SHA-256. A file never changes once the config lists it: a change writes new files, then replaces the config. So a
process that dies leaves either the old state or the new one.
"""

import json
import math
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias, TypedDict, TypeVar

import numpy as np
import torch
from safetensors import safe_open

from .files_cosup import BLOCK, digest, digest_file, locked, read_json, write_json

LOCK_FILE = ".lock"  # held by the process that changes the folder
UNFINISHED_PATTERNS = ["shard-*.json", "done-*.json", "build.json"]
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}  # of stored tensors
ALWAYS_VERIFIED = 16 * 2**20  # bytes; the SHA-256 of smaller files is checked at every load: a hundredth of a second
_ROWS_PER_WRITE = 8192
_SAFETENSORS_NAMES = {
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
}

Config: TypeAlias = dict[str, Any]  # content of the config of a folder
T = TypeVar("T")


def dtype_name(dtype: str | torch.dtype) -> str:
    """Return the name of a dtype in `DTYPES`; `ValueError` for any other."""
    name = str(dtype).removeprefix("torch.")
    if name not in DTYPES:
        raise ValueError(f"dtype is {dtype!r}, expected one of {', '.join(DTYPES)}.")
    return name


@dataclass(frozen=True)
class FolderFormat:
    """
    What a kind of folder holds.

    Args:
        name (`str`): for error messages, such as `"passage index"`.
        remedy (`str`): how to make such a folder again.
        config_file (`str`): name of the config.
        version (`int`): its `format_version`.
        config_types (`dict`): the type of each field of the config. `dtype`, `shards` and `files` are among them.
        patterns (`tuple[str, ...]`): of the names of all other files.
        needed_files (`Callable`): given a config, returns the kind and name of every file that it needs.
        repo_type (`str`): of its repository on the Hub.
    """

    name: str
    remedy: str
    config_file: str
    version: int
    config_types: Mapping[str, type | tuple[type, ...]]
    patterns: tuple[str, ...]
    needed_files: Callable[[Config], list[tuple[str, str]]]
    repo_type: str

    def is_file(self, name: str) -> bool:
        """Return whether a name is one that a file of the folder can have; none leads out of it."""
        return _is_one_of(self.patterns, name)

    def is_left_over(self, name: str) -> bool:
        """Return whether a name is one of a build's own files, or of a temporary file of `write_json`."""
        temporary = re.fullmatch(r"\.(.+)\.[0-9a-f]{8}\.unfinished", name)
        if temporary is None:
            return _is_one_of(UNFINISHED_PATTERNS, name)
        return temporary[1] == self.config_file or _is_one_of(UNFINISHED_PATTERNS, temporary[1])


def _is_one_of(patterns: Iterable[str], name: str) -> bool:
    """Return whether a name matches a pattern, in which `*` is a number: `shard-*.json` is not `shard-notes.json`."""
    return any(re.fullmatch(pattern.replace(".", r"\.").replace("*", "[0-9]{5,}"), name) for pattern in patterns)


class FileFacts(TypedDict):
    """What the config records about a file."""

    size: int  # bytes
    sha256: str


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
            there is no room would kill the process with a signal.
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


def seal(path: Path) -> FileFacts:
    """Wait until a complete file is on the disk, then return its size and SHA-256."""
    flush(path)
    return {"size": path.stat().st_size, "sha256": digest_file(path)}


def flush(path: Path) -> None:
    """Wait until a file is on the disk."""
    with open(path, "rb+") as file:
        os.fsync(file.fileno())


def digest_of_config(config: Config) -> str:
    """
    Return the SHA-256 of a config without its `files`, which are compared with the files themselves, and without the
    `memory_config`, which a user may edit.
    """
    return digest({name: value for name, value in config.items() if name not in ("files", "memory_config", "sha256")})


def signed(config: Config) -> Config:
    """Return a config with its own SHA-256, as it is written."""
    return {**config, "sha256": digest_of_config(config)}


def write_config(folder: Path, config: Config, form: FolderFormat) -> None:
    """Write the config, which completes a folder."""
    write_json(folder / form.config_file, signed(config))


# ---------------------------------------------------------------------- reading


def read_or_name(path: Path, reader: Callable[[Path], T]) -> T:
    """Return `reader(path)`; any error becomes a `ValueError` that names the file."""
    try:
        return reader(path)
    except Exception as error:  # json, pyarrow and safetensors each raise their own
        raise ValueError(f"{path} is damaged: {error}") from error


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """Map the tensors of a safetensors file; `ValueError` names a damaged file. A page is read when it is accessed."""
    return read_or_name(path, map_tensors)


def map_tensors(path: Path) -> dict[str, torch.Tensor]:
    with safe_open(path, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}


def read_config(folder: Path, form: FolderFormat, verify: bool | None = None) -> Config:
    """
    Read the config of a folder, and check all files that it lists, except an approximate index.

    Args:
        folder (`Path`), form ([`FolderFormat`]): the folder and what it should hold.
        verify (`bool`, *optional*): compare the SHA-256 of every file (`True`), of none (`False`), or of files up to
            16 MB (default). Sizes are always compared.

    Raises:
        `FileNotFoundError`: if the folder is not complete; names the missing file.
        `ValueError`: names a damaged file, an error in the config, or a format version that this release cannot read.
    """
    config = _read_checked(folder, form)
    config.pop("sha256", None)  # of the file, not of the config that changes in memory
    approximate_file = config["approximate"]["file"] if config["approximate"] is not None else None
    for name, facts in config["files"].items():
        if name != approximate_file:
            check_file(folder / name, facts, form, verify)
    return config


def read_names(folder: Path, form: FolderFormat, allow_faiss_files: bool) -> list[str]:
    """Return the names of the files that a config lists; a FAISS file only with `allow_faiss_files`."""
    return [name for name in _read_checked(folder, form)["files"] if allow_faiss_files or not name.endswith(".faiss")]


def _read_checked(folder: Path, form: FolderFormat) -> Config:
    """Read the config of a folder and check it, whether or not the files that it lists exist."""
    path = folder / form.config_file
    if not path.exists():
        raise FileNotFoundError(f"{folder} is not a complete {form.name}: {form.config_file} is missing.")
    config = read_or_name(path, read_json)
    version = config.get("format_version") if isinstance(config, dict) else None
    if version != form.version:
        raise ValueError(f"{path} has format_version {version!r}, this release reads {form.version}: {form.remedy}.")
    check_config(path, config, form)
    return config


def check_config(path: Path, config: Config, form: FolderFormat) -> None:
    """
    Raise `ValueError` unless a config is one of this format.

    File names are checked too: they are joined to the folder, and none may lead out of it.

    Args:
        path (`Path`): path of the config, for error messages.
        config (`dict`), form ([`FolderFormat`]): a config, and what it should hold.
    """
    wrong = []
    for name, expected_type in form.config_types.items():
        if name not in config or not isinstance(config[name], expected_type):
            wrong.append(name)
    if wrong:
        raise ValueError(f"{path} is damaged: {', '.join(wrong)} missing or of the wrong type.")
    if config.get("sha256", digest_of_config(config)) != digest_of_config(config):
        raise ValueError(f"{path} is damaged: it does not match its own SHA-256. Copy or build it again.")
    valid_counts = all(type(count) is int and count >= 0 for count in config["shards"])
    if config["dtype"] not in DTYPES or not valid_counts or not any(config["shards"]):
        raise ValueError(f"{path} is damaged: dtype is {config['dtype']!r}, shards are {config['shards'][:5]}.")
    for name, facts in config["files"].items():
        valid = isinstance(facts, dict) and isinstance(facts.get("size"), int) and isinstance(facts.get("sha256"), str)
        if not form.is_file(name) or not valid:
            raise ValueError(
                f"{path} is damaged: {name!r} is not a file of a {form.name}, or lacks its size or SHA-256."
            )
    for kind, name in form.needed_files(config):
        if name not in config["files"] or not name.startswith(f"{kind}-"):
            raise ValueError(f"{path} is damaged: it does not list {name!r} among its files.")


def check_file(path: Path, facts: FileFacts, form: FolderFormat, verify: bool | None = None) -> None:
    """Raise `FileNotFoundError` or `ValueError` unless a file is as recorded; for `verify` see [`read_config`]."""
    if not path.exists():
        raise FileNotFoundError(f"{path.parent} is not a complete {form.name}: {path.name} is missing.")
    size = path.stat().st_size
    if size != facts["size"]:
        raise ValueError(
            f"{path} is damaged: it has {size:,} bytes, expected {facts['size']:,}. Copy or build it again."
        )
    if verify is None:
        verify = size <= ALWAYS_VERIFIED
    if verify and digest_file(path) != facts["sha256"]:
        raise ValueError(f"{path} is damaged: its SHA-256 differs from the config's. Copy or build it again.")


# ---------------------------------------------------------------------- folders


def check_save_directory(save_directory: str | os.PathLike[str], form: FolderFormat) -> Path:
    """
    Return the absolute path of a folder to save to, and create its parents; fail now, not after an hour of work.

    Raises:
        `OSError`: if the folder cannot be written, is neither empty nor of this format, or also holds other files,
            which would be lost.
    """
    folder = Path(save_directory).resolve()  # "." has no name to put a folder next to, and a link would be replaced
    if folder.exists():
        entries = list(folder.iterdir())
        if entries and not (folder / form.config_file).exists():
            raise FileExistsError(f"{folder} exists, is not empty and is not a {form.name}; choose another folder.")
        foreign = sorted(path.name for path in entries if not _is_ours(path, form))
        if foreign:
            raise FileExistsError(
                f"{folder} also holds {', '.join(foreign[:5])}, which a new {form.name} would delete;"
                " choose another folder."
            )
    folder.parent.mkdir(parents=True, exist_ok=True)
    tempfile.TemporaryFile(dir=folder.parent).close()
    return folder


def _is_ours(path: Path, form: FolderFormat) -> bool:
    """Return whether a path is a file of this format, or of its build."""
    if path.is_dir():
        return False
    return path.name in (form.config_file, LOCK_FILE) or form.is_file(path.name) or form.is_left_over(path.name)


def put_in_place(unfinished: Path, save_directory: Path) -> None:
    """
    Rename a complete folder to its final name. An earlier folder is replaced, or stays if this fails.

    Raises:
        `ValueError`: if another process is changing the earlier folder: its change would end in the new one.
    """
    replaced = unfinished.with_suffix(".replaced")
    shutil.rmtree(replaced, ignore_errors=True)
    if not save_directory.exists():
        os.replace(unfinished, save_directory)
        return
    lock = save_directory / LOCK_FILE
    busy = f"{save_directory} is being changed by another process: wait for it, then call this again."
    with locked(lock, busy, keep=True):  # a lock file that is at this path afterwards is of the new folder
        try:
            os.replace(save_directory, replaced)
            os.replace(unfinished, save_directory)
        except OSError:
            if replaced.exists():
                os.replace(replaced, save_directory)
            lock.unlink(missing_ok=True)
            raise
    shutil.rmtree(replaced, ignore_errors=True)


def sweep(folder: Path, config: Config, form: FolderFormat) -> None:
    """Remove files that the config does not list: left from the build, an earlier state or a failed change."""
    for path in folder.iterdir():
        is_ours = form.is_file(path.name) or form.is_left_over(path.name)
        if is_ours and path.name not in config["files"]:
            path.unlink(missing_ok=True)
