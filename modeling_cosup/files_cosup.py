"""
Files: JSON that is whole or not there, digests, and locks.

We call `flock` directly: `filelock` unlocks explicitly on release, which would also drop a lock inherited by a child.
"""

import contextlib
import gzip
import hashlib
import json
import os
import tempfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

try:
    import fcntl
except ImportError:  # Windows has none: a folder is for one writer at a time
    fcntl = None  # type: ignore[assignment]

BLOCK = 2**20  # bytes


# ---------------------------------------------------------------------- JSON


def byte_lines(path: str | Path) -> Iterator[bytes]:
    """
    The lines of a file, `.gz` or plain.

    Raises:
        `FileNotFoundError`, `ValueError`: for a damaged `.gz`; names the file.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not a file.")
    with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as file:
        try:
            yield from file
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:  # cut off, no gzip at all, or altered
            raise ValueError(f"{path} is damaged: {error}") from None


def read_json(path: str | Path) -> Any:
    """
    What a JSON file holds, `.gz` or plain.

    Raises:
        `FileNotFoundError`, `ValueError`: names the file.
    """
    text = b"".join(byte_lines(path))
    try:
        return json.loads(text.decode("utf-8"))
    except ValueError as error:  # malformed JSON or no UTF-8
        raise ValueError(f"{path}: malformed JSON ({error}).") from None


def write_json(path: str | Path, value: Any) -> None:
    """Write JSON: `path` holds either what it held before or all of `value`, also after a crash or a power cut."""
    path = Path(path)
    handle, unfinished = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with open(handle, "w", encoding="utf-8") as file:
            file.write(json.dumps(value, indent=2, ensure_ascii=False) + "\n")
            file.flush()
            os.fsync(file.fileno())
        os.chmod(unfinished, 0o644)  # mkstemp's file is private
        os.replace(unfinished, path)
    except BaseException:
        Path(unfinished).unlink(missing_ok=True)
        raise


# ---------------------------------------------------------------------- digests


def digest(value: Any) -> str:
    """SHA-256 (hex) of anything that JSON can hold, whatever the order of keys; other objects count as their `str`."""
    return hashlib.sha256(_canonical(value)).hexdigest()


def digest_all(values: Iterable[Any]) -> str:
    """SHA-256 (hex) of values one after another, for more of them than memory holds."""
    total = hashlib.sha256()
    for value in values:
        total.update(_canonical(value) + b"\n")
    return total.hexdigest()


def digest_file(path: str | Path) -> str:
    """SHA-256 (hex) of the bytes of a file."""
    total = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(BLOCK):
            total.update(block)
    return total.hexdigest()


def _canonical(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, default=str).encode()


# ---------------------------------------------------------------------- locks


@contextlib.contextmanager
def locked(path: Path, busy: str, on_wait: Callable[[str], object] | None = None) -> Iterator[int | None]:
    """
    Hold a lock file: no other process, and nothing else in this one, holds it while the block runs.

    A process that dies lets go of it.

    Args:
        path (`Path`): of the lock file, which stays; its holder may remove it.
        busy (`str`): what to say when it is held by another.
        on_wait (`Callable`, *optional*): gets `busy` before this waits for the other; without it `busy` is raised.

    Yields:
        `int`: the open file. A program that inherits it holds the lock until it ends, even when this process is gone.
            `None` where there are no locks.

    Raises:
        `ValueError`: `busy`.
    """
    if fcntl is None:
        yield None
        return
    while True:
        with open(path, "a") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if on_wait is None:
                    raise ValueError(busy) from None
                on_wait(busy)
                fcntl.flock(file, fcntl.LOCK_EX)
            if _is_at(path, file.fileno()):
                yield file.fileno()
                return
        # the previous holder removed the file while we waited, so this lock guards nothing: try again


def _is_at(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False
