"""
Files that are written completely or not at all, JSON, digests, and locks.

Locks call `flock` directly: `filelock` unlocks explicitly on release, which would also drop a lock that a child
process inherited.
"""

import contextlib
import errno
import gzip
import hashlib
import json
import math
import os
import secrets
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

try:
    import fcntl
except ImportError:  # Windows has no flock; there, only one process may write to a folder
    fcntl = None  # type: ignore[assignment]  # checked before use

WITHOUT_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK)  # errors of file systems that have no locks

BLOCK = 2**20  # bytes


# ---------------------------------------------------------------------- JSON


def byte_lines(path: str | Path) -> Iterator[bytes]:
    """
    Yield the lines of a file, `.gz` or plain.

    Raises:
        `FileNotFoundError`: when `path` is not a file.
        `ValueError`: for a damaged `.gz`, naming the file.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not a file.")
    file = gzip.open(path) if path.suffix.lower() == ".gz" else path.open("rb")
    with file:
        try:
            yield from file
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:  # truncated, not gzip at all, or altered
            raise ValueError(f"{path} is damaged: {error}") from None


def parse_json(data: bytes, place: str) -> Any:
    """Return the JSON value in UTF-8 bytes, with or without a byte order mark; `ValueError` names `place`."""
    try:
        return json.loads(data.decode("utf-8-sig"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        reason = str(error)
    except RecursionError:
        reason = "it is nested too deeply"
    except ValueError:
        reason = "an integer has too many digits"
    raise ValueError(f"{place}: malformed JSON ({reason}).")


def read_json(path: str | Path) -> Any:
    """
    Return the value in a JSON file, `.gz` or plain.

    Raises:
        `FileNotFoundError`: when `path` is not a file.
        `ValueError`: for malformed JSON or a damaged `.gz`, naming the file.
    """
    return parse_json(b"".join(byte_lines(path)), str(path))


def write_json(path: str | Path, value: Any) -> None:
    """
    Write JSON. Even after a crash or a power cut, `path` holds either its old content or all of `value`.

    Raises:
        `ValueError`: for a number that is NaN or infinite, which JSON does not have, naming the file and the entry.
    """
    for entry, number in not_finite(value):
        raise ValueError(f"{path}: {entry} is {number}, which JSON does not have.")
    text = json.dumps(value, indent=2, ensure_ascii=False)
    with replacing_file(path) as unfinished, unfinished.open("w", encoding="utf-8") as file:
        file.write(text + "\n")
        file.flush()
        os.fsync(file.fileno())


def not_finite(value: Any, entry: str = "") -> Iterator[tuple[str, float]]:
    """Yield the numbers in a JSON value that are NaN or infinite, each after its place, such as `"runs.0.loss"`."""
    if isinstance(value, float) and not math.isfinite(value):
        yield entry, value
    elif isinstance(value, Mapping):
        for key, part in value.items():
            yield from not_finite(part, f"{entry}.{key}" if entry else str(key))
    elif isinstance(value, list | tuple):
        for number, part in enumerate(value):
            yield from not_finite(part, f"{entry}.{number}" if entry else str(number))


@contextlib.contextmanager
def replacing_file(path: str | Path) -> Iterator[Path]:
    """
    Yield an empty file next to `path`, which takes its place when the block ends without an error.

    Processes that write the same file at once do not disturb each other: the last one to end replaces it.
    """
    path = Path(path)
    unfinished = path.with_name(f".{path.name}.{secrets.token_hex(4)}.unfinished")
    unfinished.touch(exist_ok=False)  # tempfile would make it private
    try:
        yield unfinished
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


# ---------------------------------------------------------------------- digests


def digest(value: Any) -> str:
    """
    Return the SHA-256 (hex) of a JSON value, whatever the order of its keys.

    Other objects count as their `str`, and so do keys that JSON does not know.
    """
    return hashlib.sha256(_canonical(value)).hexdigest()


def digest_all(values: Iterable[Any]) -> str:
    """Return the SHA-256 (hex) of a sequence of JSON values, which need not fit in memory."""
    total = hashlib.sha256()
    for value in values:
        total.update(_canonical(value) + b"\n")
    return total.hexdigest()


def digest_file(path: str | Path) -> str:
    """Return the SHA-256 (hex) of the bytes of a file."""
    total = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(BLOCK):
            total.update(block)
    return total.hexdigest()


def _canonical(value: Any) -> bytes:
    try:
        return json.dumps(value, sort_keys=True, default=str).encode()
    except TypeError:  # keys that JSON does not know, or that cannot be sorted
        return json.dumps(_with_text_keys(value), sort_keys=True, default=str).encode()


def _with_text_keys(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _with_text_keys(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_with_text_keys(entry) for entry in value]
    return value


# ---------------------------------------------------------------------- locks


@contextlib.contextmanager
def locked(
    path: Path, busy: str, on_wait: Callable[[str], object] | None = None, keep: bool = False
) -> Iterator[int | None]:
    """
    Hold a lock file while the block runs, unless this process dies. Nothing else can hold it, in any process.

    Args:
        path (`Path`): the lock file.
        busy (`str`): the message when someone else holds the lock.
        on_wait (`Callable`, *optional*): called with `busy` before waiting for the other holder. Without it, `busy` is
            raised.
        keep (`bool`): leave the lock file in place afterwards. A child process that inherits it needs it there.

    Yields:
        `int`: the descriptor of the open file. A child process that inherits it holds the lock until it ends, even
            after this process is gone. `None` on systems and file systems without locks.

    Raises:
        `ValueError`: `busy`, without `on_wait`.
    """
    if fcntl is None:
        yield None
        return
    while True:
        with open(path, "ab") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if on_wait is None:
                    raise ValueError(busy) from None
                on_wait(busy)
                fcntl.flock(file, fcntl.LOCK_EX)
            except OSError as error:
                if error.errno not in WITHOUT_LOCKS:
                    raise
                yield None
                return
            if _is_at(path, file.fileno()):
                try:
                    yield file.fileno()
                finally:
                    if not keep:
                        path.unlink(missing_ok=True)
                return
        # The previous holder removed the file while we waited, so this lock guards nothing: try again.


def is_locked(path: Path) -> bool:
    """Return whether someone holds a lock file. Any number of processes may ask at the same time."""
    if fcntl is None:
        return False
    try:
        with open(path, "rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError as error:  # others say that the file is gone, or that its file system has no locks
        return isinstance(error, BlockingIOError)
    return False


def _is_at(path: Path, descriptor: int) -> bool:
    """Return whether the open file is still the one at `path`."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False
