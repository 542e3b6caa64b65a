"""An object that lives in memory or in a folder: it is saved, changed, loaded and shared as a whole."""

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from .files_cosup import locked, read_json
from .folders_cosup import (
    LOCK_FILE,
    Config,
    FolderFormat,
    check_file,
    check_save_directory,
    flush,
    put_in_place,
    read_names,
    seal,
    signed,
    sweep,
    write_config,
)
from .hub_cosup import CARD_FILE, check_download_options, push_files

if TYPE_CHECKING:
    from huggingface_hub import CommitInfo

T = TypeVar("T")


class FolderStore:
    """
    The part of a [`PassageIndex`] or a [`KNNMemory`] that keeps its folder.

    Args:
        config (`dict`): the content of the config file.
        folder (`Path`, *optional*): in which changes are saved.
    """

    form: ClassVar[FolderFormat]

    def __init__(self, config: Config, folder: Path | None = None) -> None:
        self.config, self.folder = config, folder

    # ------------------------------------------------------------------ changing

    @contextlib.contextmanager
    def _changing(self) -> Iterator[None]:
        """
        Hold the folder's lock during a change, from the first new file to the config; remove new files on failure.

        Raises:
            `ValueError`: if another process is changing the folder, or has done so since this one loaded it, or the
                folder is in the Hub cache.
        """
        if self.folder is None:
            yield
            return
        if is_in_hub_cache(self.folder):
            raise ValueError(
                f"{self.folder} is in the Hub cache, which is shared: save_pretrained it to a folder first,"
                " and load that."
            )
        lock = self.folder / LOCK_FILE
        busy = f"{self.folder} is being changed by another process: wait for it, then load it again."
        with locked(lock, busy):
            self._check_unchanged(self.folder)
            with _sweeping_on_failure(self.folder, self.form):
                yield

    def _check_unchanged(self, folder: Path) -> None:
        """Raise `ValueError` if another process has changed the folder since it was loaded."""
        stored = read_json(folder / self.form.config_file)
        same_files = all(stored["files"].get(name) == facts for name, facts in self.config["files"].items())
        if stored["generation"] != self.config["generation"] or not same_files:
            raise ValueError(f"{folder} was changed by another process: load it again.")

    def _next_config(self) -> Config:
        """Return a copy of the config for the next generation, whose number is in the names of new files."""
        return {**self.config, "generation": self.config["generation"] + 1, "files": dict(self.config["files"])}

    def _write_file(self, folder: Path, config: Config, name: str, write: Callable[[Path], object]) -> str:
        """
        Write a new generation of a file, e.g. `"ids.safetensors"`; return its name, e.g. `"ids-00003.safetensors"`.

        The config lists it in place of the earlier file of its kind.
        """
        kind, suffix = name.split(".")
        new_name = f"{kind}-{config['generation']:05d}.{suffix}"
        files = {old_name: facts for old_name, facts in config["files"].items() if not old_name.startswith(f"{kind}-")}
        write(folder / new_name)
        config["files"] = {**files, new_name: seal(folder / new_name)}
        return new_name

    def _commit(self, folder: Path, config: Config) -> None:
        """Write a config, which makes it the state of the folder, and remove files that it does not list."""
        self._check_unchanged(folder)
        for name, facts in config["files"].items():
            check_file(folder / name, facts, self.form, verify=False)
        write_config(folder, config, self.form)
        self.config = config
        sweep(folder, config, self.form)

    # ------------------------------------------------------------------ files

    @classmethod
    def check_save_directory(cls, save_directory: str | os.PathLike[str]) -> Path:
        """Return the absolute path of a folder to save to; `OSError` unless it can be written without a loss."""
        return check_save_directory(save_directory, cls.form)

    def save_pretrained(self, save_directory: str | os.PathLike[str]) -> None:
        """
        Write everything to a folder. This object keeps its own folder, if it has one.

        The folder gets its name only when it is complete. An earlier one of that name is replaced.

        Args:
            save_directory (`str` or `Path`): created with its parents.

        Raises:
            `OSError`: if the folder cannot be written, or `save_directory` exists and holds something else.
            `ValueError`: if another process has changed this object's own folder since it was loaded, or is changing
                the folder that would be replaced.
        """
        save_directory = self.check_save_directory(save_directory)
        prefix = f".{save_directory.name}."
        unfinished = Path(tempfile.mkdtemp(prefix=prefix, suffix=".unfinished", dir=save_directory.parent))
        try:
            write_config(unfinished, self._write_files(unfinished), self.form)
            unfinished.chmod(0o755)  # mkdtemp's folder is private
            put_in_place(unfinished, save_directory)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)

    def _write_files(self, folder: Path) -> Config:
        """Write all files but the config, and return the config."""
        if self.folder is None:
            return self._write_from_memory(folder)
        self._check_unchanged(self.folder)
        try:
            for name in self.config["files"]:
                shutil.copyfile(self.folder / name, folder / name)
                flush(folder / name)
        finally:
            self._check_unchanged(self.folder)  # a change may have removed a file before it was copied
        return self.config

    def _write_from_memory(self, folder: Path) -> Config:
        """Write all files but the config of an object that has no folder, and return the config."""
        raise NotImplementedError

    def _push(self, repo_id: str, card: str, **commit_options: Any) -> "CommitInfo":
        """Upload the files and a card in one commit; the files of an earlier push are deleted."""
        with tempfile.TemporaryDirectory() as temporary:
            config, folder = self.config, self.folder
            if folder is None:
                folder = Path(temporary) / "folder"
                self.save_pretrained(folder)
                config = read_json(folder / self.form.config_file)
            else:
                self._check_unchanged(folder)
            files: dict[str, Path | str | bytes] = {name: folder / name for name in config["files"]}
            files[self.form.config_file] = (json.dumps(signed(config), indent=2) + "\n").encode()
            files[CARD_FILE] = card.encode()
            patterns = [self.form.config_file, *self.form.patterns]
            return push_files(files, repo_id, patterns, repo_type=self.form.repo_type, **commit_options)


@contextlib.contextmanager
def _sweeping_on_failure(folder: Path, form: FolderFormat) -> Iterator[None]:
    """
    Remove the new files of a change that fails.

    Files that the config does not list belong to this change or to one that died: the lock keeps other writers out.
    """
    try:
        yield
    except BaseException:
        sweep(folder, read_json(folder / form.config_file), form)
        raise


def load_unchanged(folder: Path, form: FolderFormat, load: Callable[[], T]) -> T:
    """
    Return `load()`, called again if another process has changed the folder in the meantime.

    Files that the earlier config listed may be gone then.
    """
    config_file = folder / form.config_file

    def content() -> bytes | None:
        return config_file.read_bytes() if config_file.exists() else None

    while True:
        before = content()
        try:
            loaded = load()
        except (OSError, ValueError):
            if content() == before:
                raise
            continue
        if content() == before:
            return loaded


def is_in_hub_cache(folder: Path) -> bool:
    """Return whether a folder is a snapshot in the Hub cache, whose files are shared."""
    return folder.parent.name == "snapshots" and folder.parent.parent.name.startswith(("datasets--", "models--"))


def find_folder(
    name_or_path: str | os.PathLike[str],
    form: FolderFormat,
    allow_faiss_files: bool,
    revision: str | None = None,
    **kwargs: Any,
) -> Path:
    """
    Return a local folder, or the download of a repository on the Hub: its config and the files that this lists.

    Raises:
        `FileNotFoundError`: if it is neither.
        `TypeError`: for an option that `snapshot_download` does not have.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    check_download_options(kwargs)
    if Path(name_or_path).is_dir():
        return Path(name_or_path).absolute()

    def download(revision: str | None, names: list[str]) -> Path:
        options: dict[str, Any] = {"repo_type": form.repo_type, "revision": revision, "allow_patterns": names}
        return Path(snapshot_download(str(name_or_path), **options, **kwargs))

    try:
        folder = download(revision, [form.config_file])
        if is_in_hub_cache(folder):
            revision = folder.name  # the commit, so that both downloads are of the same one
        return download(revision, [form.config_file, *read_names(folder, form, allow_faiss_files)])
    except (HFValidationError, OSError) as error:
        raise FileNotFoundError(
            f"{name_or_path} is not a folder, and no {form.repo_type} repository of this name could be loaded: {error}"
        ) from error
