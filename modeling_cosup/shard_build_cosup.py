"""
Building a folder shard by shard: in the memory of one shard, by several processes, resumed after a crash.

A build has its own folder next to the final one, `.<name>.unfinished`. `build.json` holds the settings, and a shard is
complete once its marker `shard-00000.json` has been renamed into place. A killed build resumes after its complete
shards.
"""

import contextlib
import errno
import glob
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Protocol, TypeAlias

from tqdm.auto import tqdm
from transformers.utils import logging

from .configuration_cosup import EARLIER_EMBEDDING_SETTINGS
from .files_cosup import digest, digest_all, digest_file, is_locked, locked, read_json, write_json
from .folders_cosup import FileFacts, seal

logger = logging.get_logger(__name__)

BUILD_FILE = "build.json"
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # disk full, quota exceeded, file too large

Items: TypeAlias = list[Any]  # what a shard is made of, as JSON values: passages or texts
Settings: TypeAlias = dict[str, Any]  # content of build.json: fingerprint, dtype, shard_size, …


class Builder(Protocol):
    """Makes the files of a shard; [`index_build_cosup.ShardBuilder`] or [`datastore_build_cosup.KeyBuilder`]."""

    num_cut: int  # items so far that were too long and were cut

    def files_of(self, number: int) -> tuple[str, ...]:
        """Return the names of the files of a shard."""

    def make(self, items: Items, bar: tqdm, paths: tuple[Path, ...]) -> object:
        """Make a shard of items in files; advance the bar by `len(items)` in all."""

    def room_for(self, num_items: int) -> str:
        """Say how much room the shards of `num_items` items take at least."""


def unfinished_folder(save_directory: Path) -> Path:
    """Return the folder of a build: next to the final one, so that a second call finds it."""
    return save_directory.with_name(f".{save_directory.name}.unfinished")


@contextlib.contextmanager
def build_of(
    save_directory: Path, settings: Settings, num_processes: int = 1, process_index: int = 0
) -> Iterator[Path]:
    """
    Begin or resume a build, and keep out processes that would write the same files: of the same index, or of a build
    by another number of processes.

    Yields:
        `Path`: the folder of the build.

    Raises:
        `ValueError`: if another process works on it, or as [`begin`].
    """
    folder = unfinished_folder(save_directory)
    name = f".{save_directory.name}.lock-{process_index}-of-{num_processes}"
    busy = f"{save_directory} is being built by another process: wait for it, or name another folder."
    with locked(save_directory.with_name(name), busy):
        for lock in save_directory.parent.glob(f".{glob.escape(save_directory.name)}.lock-*"):
            if not lock.name.endswith(f"-of-{num_processes}") and is_locked(lock):
                raise ValueError(busy)
        begin(folder, settings)
        yield folder


def begin(folder: Path, settings: Settings) -> None:
    """
    Begin a build, or resume one.

    Raises:
        `ValueError`: if the folder holds shards made by another model or with other settings; names every difference.
    """
    folder.mkdir(exist_ok=True)
    path = folder / BUILD_FILE
    if path.exists() and any(folder.glob("shard-*.json")):
        build = read_json(path)
        before = {**EARLIER_EMBEDDING_SETTINGS, **build, **build["fingerprint"]}
        now = {**EARLIER_EMBEDDING_SETTINGS, **settings, **settings["fingerprint"]}
        lines = []
        for name, value in now.items():
            if name != "fingerprint" and before.get(name) != value:
                lines.append(f"  {name}: then {before.get(name)!r}, now {value!r}")
        if lines:
            message = "holds an unfinished build with other settings; finish it with those, or delete the folder."
            raise ValueError(f"{folder} {message}\n" + "\n".join(lines))
    write_json(path, settings)


def marker_path(folder: Path, number: int) -> Path:
    """Return the path of the file that marks a shard as complete."""
    return folder / f"shard-{number:05d}.json"


def is_complete(folder: Path, number: int, items_digest: str) -> bool:
    """Return whether a shard was written completely from the same items; its files are read whole and compared."""
    path = marker_path(folder, number)
    if not path.exists():
        return False
    marker = read_json(path)
    if marker["digest"] != items_digest:
        logger.warning(f"Shard {number} was built from other texts: it is built again.")
        return False
    for name, facts in marker["files"].items():
        if not _has_size(folder / name, facts) or digest_file(folder / name) != facts["sha256"]:
            return False
    return True


def _has_size(path: Path, facts: FileFacts) -> bool:
    """Return whether a file exists and has the recorded size."""
    return path.exists() and path.stat().st_size == facts["size"]


def write_shards(
    folder: Path, shards: Iterable[Items], builder: Builder, bar: tqdm, num_processes: int = 1, process_index: int = 0
) -> int:
    """
    Write the incomplete shards of this process, each with its marker; return the number of shards of the corpus.

    At the end `done-00000.json` records which corpus the process read, and the digests of its shards.

    Raises:
        `OSError`: if the disk is full; says how much to free.
    """
    done_file = folder / f"done-{process_index:05d}.json"
    done_file.unlink(missing_ok=True)
    corpus_digests, process_digests = [], {}  # of all shards; of this process's shards, by the name of their marker
    num_done = 0  # items of this process
    for number, items in enumerate(shards):
        items_digest = digest_all(items)
        corpus_digests.append(items_digest)
        if number % num_processes != process_index:
            continue
        marker_file = marker_path(folder, number)
        process_digests[marker_file.name] = items_digest
        if is_complete(folder, number, items_digest):
            if not bar.disable:
                bar.initial += len(items)  # so that they count as done, but not in the speed
            bar.update(len(items))
        else:
            num_cut_before = builder.num_cut
            try:
                files = write_new_shard(folder, number, items, builder, bar)
            except OSError as error:
                if error.errno not in NO_ROOM:
                    raise
                num_left = max(len(items), (bar.total or 0) - num_done)
                raise OSError(error.errno, _no_room(folder, builder, num_left)) from error
            marker = {"digest": items_digest, "num_cut": builder.num_cut - num_cut_before, "files": files}
            write_json(marker_file, marker)
        num_done += len(items)
    corpus_digest = digest(corpus_digests)
    write_json(done_file, {"num_processes": num_processes, "corpus": corpus_digest, "digests": process_digests})
    return len(corpus_digests)


def write_new_shard(folder: Path, number: int, items: Items, builder: Builder, bar: tqdm) -> dict[str, FileFacts]:
    """Make the files of a shard; return their sizes and checksums. On failure, remove them."""
    paths = tuple(folder / name for name in builder.files_of(number))
    marker_path(folder, number).unlink(missing_ok=True)
    try:
        builder.make(items, bar, paths)
        return {path.name: seal(path) for path in paths}
    except BaseException:
        for path in paths:
            path.unlink(missing_ok=True)
        raise


def _no_room(folder: Path, builder: Builder, num_left: int) -> str:
    """Return the message for a full disk, with `num_left` items still to do."""
    return (
        f"no room for the next shard in {folder.parent}: free at least {builder.room_for(num_left)}. Complete shards"
        " stay: the same call then resumes after them"
    )


def finish(folder: Path, num_shards: int, settings: Settings, num_processes: int = 1) -> None:
    """Record the numbers of shards and processes; further shards, left by a longer corpus, then do not count."""
    write_json(folder / BUILD_FILE, {**settings, "num_shards": num_shards, "num_processes": num_processes})


def build_digest(settings: Settings, digests: Iterable[str]) -> str:
    """Return the SHA-256 (hex) of what a build is made from: its settings, and the digests of its shards' items."""
    decisive = {name: value for name, value in settings.items() if name not in ("num_shards", "num_processes")}
    return digest([decisive, list(digests)])


def collect(folder: Path) -> tuple[Settings, list[dict[str, Any]], dict[str, FileFacts]]:
    """
    Check the shards of a build that all processes have finished.

    Returns:
        `(settings, markers, files)`: the content of `build.json` and of the shards' markers, and the files' sizes and
            checksums.

    Raises:
        `FileNotFoundError`: if there is no build, or a shard is missing.
        `ValueError`: if the processes read different corpora, or a shard has changed since it was written.
    """
    if not (folder / BUILD_FILE).exists():
        raise FileNotFoundError(f"{folder} holds no build: call build first.")
    settings = read_json(folder / BUILD_FILE)
    num_shards = settings.get("num_shards", 0)
    paths = [marker_path(folder, number) for number in range(num_shards)]
    missing = [path.name for path in paths if not path.exists()]
    if missing or not num_shards:
        reason = ", ".join(missing[:5]) or "no process is done"
        raise FileNotFoundError(f"{folder} is not complete ({reason}): let every process finish its build first.")
    markers = {path.name: read_json(path) for path in paths}
    _check_done(folder, markers, settings["num_processes"])
    files: dict[str, FileFacts] = {}
    for marker in markers.values():
        files.update(marker["files"])
    damaged = [name for name, facts in files.items() if not _has_size(folder / name, facts)]
    if damaged:
        raise ValueError(
            f"{folder}: {', '.join(damaged[:5])} missing or damaged: let every process build again, which makes only"
            " these again."
        )
    return settings, list(markers.values()), files


def _check_done(folder: Path, markers: dict[str, dict[str, Any]], num_processes: int) -> None:
    """Raise unless all processes have finished, read the same corpus, and their shards are unchanged."""
    paths = [folder / f"done-{rank:05d}.json" for rank in range(num_processes)]
    missing = [path.name for path in paths if not path.exists()]
    if missing:
        raise FileNotFoundError(
            f"{folder} is not complete ({', '.join(missing[:5])}): let every process finish its build first."
        )
    processes = [read_json(path) for path in paths]
    digests: dict[str, str] = {}
    for process in processes:
        digests.update(process["digests"])
    same_corpus = len({process["corpus"] for process in processes}) == 1
    same_number = all(process["num_processes"] == num_processes for process in processes)
    same_shards = digests == {name: marker["digest"] for name, marker in markers.items()}
    if not (same_corpus and same_number and same_shards):
        raise ValueError(
            f"{folder}: the processes read different corpora, or their number changed: let all"
            f" {num_processes} build again."
        )
