"""
What the test Hub keeps: repositories of commits, refs and blobs, in a folder that outlives the server.

Every file is written under another name and then renamed. The blobs of a commit are written before the commit, and the
commit before the ref that names it. So whenever the server is killed, a reader finds a commit complete or not at all.
"""

import hashlib
import json
import os
import re
import shutil
import tempfile
import threading
from collections.abc import Iterable, Iterator, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

LFS_SUFFIXES = (".safetensors", ".arrow", ".faiss", ".png", ".bin", ".parquet")
LFS_ABOVE = 10 * 2**20  # bytes; a larger file goes through LFS whatever its name
# The first file of every repository
GIT_ATTRIBUTES = "".join(f"*{suffix} filter=lfs diff=lfs merge=lfs -text\n" for suffix in LFS_SUFFIXES).encode()
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n"
NAME = re.compile(r"[A-Za-z0-9_](?!.*\.\.)[A-Za-z0-9_.-]{0,95}")

Entry = dict[str, Any]  # see file_entry
Operation = tuple[str, str, Entry | None]  # see Repository.commit


class HubError(Exception):
    """
    The refusal of a request.

    Args:
        status (`int`): HTTP status.
        message (`str`): text of the refusal.
        code (`str`, *optional*): the `X-Error-Code` by which the client knows it.
    """

    def __init__(self, status: int, message: str, code: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.code = code


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file so that readers see either all of `data` or the old content."""
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=".tmp-")
    with os.fdopen(descriptor, "wb") as file:
        file.write(data)
    os.replace(name, path)


def checked_path(path: str) -> str:
    """Return the path of a file or folder in a repository; raise a `HubError` for one that leads elsewhere."""
    has_bad_part = any(part in ("", ".", "..", ".git") for part in path.split("/"))
    if has_bad_part or re.search(r"[\\\x00-\x1f]", path):
        raise HubError(400, f"Invalid path in repo: {path!r} is not a relative path without '.', '..' and '.git'")
    return path


def git_hash(data: bytes) -> str:
    """Return the hash under which git stores a file."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def file_entry(sha256: str, size: int, oid: str | None = None) -> Entry:
    """Return what a commit records of a file. Without `oid` it is an LFS file, for which git stores a pointer."""
    pointer = POINTER.format(sha256=sha256, size=size).encode()
    return {
        "sha256": sha256,
        "size": size,
        "lfs": oid is None,
        "oid": oid or git_hash(pointer),
        "pointer_size": len(pointer),
    }


class HubStore:
    """All repositories below `root`, each in a folder `<type>s/<namespace>/<name>`."""

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root)
        self.root.mkdir(parents=True, exist_ok=True)
        self.lock = threading.RLock()  # one commit, branch or tag at a time

    def folder(self, kind: str, repo_id: str) -> Path:
        """Return the folder of a repository, which may not exist."""
        if repo_id.count("/") != 1 or not all(NAME.fullmatch(name) for name in repo_id.split("/")):
            raise HubError(
                400, f"Invalid repository id {repo_id!r}: expected namespace/name of letters, digits, '-', '_' and '.'"
            )
        return self.root / f"{kind}s" / repo_id

    def create(self, kind: str, repo_id: str, private: bool) -> bool:
        """Create a repository with a first commit of `.gitattributes`. Return `False` if there is one of this id."""
        folder = self.folder(kind, repo_id)
        folder.parent.mkdir(parents=True, exist_ok=True)
        repo = Repository(Path(tempfile.mkdtemp(dir=self.root, prefix=".tmp-")), kind, repo_id, self.lock)
        for name in ("blobs", "uploads", "commits", "heads", "tags"):
            (repo.folder / name).mkdir()
        settings = {"private": private, "created": now()}
        write_atomically(repo.folder / "repo.json", json.dumps(settings).encode())
        first_file = repo.add_regular(GIT_ATTRIBUTES)
        repo.commit("main", {"summary": "initial commit"}, [("add", ".gitattributes", first_file)], first=True)
        try:
            os.rename(repo.folder, folder)
        except OSError:
            shutil.rmtree(repo.folder)
            return False
        return True

    def get(self, kind: str, repo_id: str) -> "Repository":
        """Return a repository that exists."""
        folder = self.folder(kind, repo_id)
        if not folder.is_dir():
            raise HubError(404, "Repository not found", "RepoNotFound")
        return Repository(folder, kind, repo_id, self.lock)

    def delete(self, kind: str, repo_id: str) -> None:
        """Delete a repository; readers see it happen in one step."""
        trash = Path(tempfile.mkdtemp(dir=self.root, prefix=".tmp-"))
        os.rename(self.get(kind, repo_id).folder, trash / "repo")
        shutil.rmtree(trash)


class Repository:
    """
    One repository's folder: `blobs/<sha256>`, `commits/<id>.json`, and the refs `heads/<name>` and `tags/<name>`.

    A ref holds the id of a commit.
    """

    def __init__(self, folder: Path, kind: str, repo_id: str, lock: threading.RLock) -> None:
        self.folder = folder
        self.kind = kind
        self.id = repo_id
        self.lock = lock

    @property
    def settings(self) -> dict[str, Any]:
        return json.loads((self.folder / "repo.json").read_bytes())

    # blobs

    def blob(self, sha256: str) -> Path:
        """Return the path of a blob, which may not exist."""
        return self.folder / "blobs" / sha256

    def add_blob(self, chunks: Iterable[bytes], sha256: str | None = None, size: int | None = None) -> tuple[str, int]:
        """
        Keep a blob.

        Args:
            chunks (iterable of `bytes`): its content.
            sha256 (`str`, *optional*), size (`int`, *optional*): as they were announced.

        Returns:
            `(str, int)`: SHA-256 and size.

        Raises:
            `HubError`: 400 when the content is not the announced one.
        """
        descriptor, name = tempfile.mkstemp(dir=self.folder / "uploads")
        digest = hashlib.sha256()
        written = 0
        try:
            with os.fdopen(descriptor, "wb", buffering=0) as file:
                for chunk in chunks:
                    digest.update(chunk)
                    written += file.write(chunk)
            if sha256 is not None and (digest.hexdigest(), written) != (sha256, size):
                raise HubError(
                    400, f"Object {sha256} of {size} bytes: received {written} bytes of SHA-256 {digest.hexdigest()}"
                )
            os.replace(name, self.blob(digest.hexdigest()))
        except BaseException:
            os.unlink(name)
            raise
        return digest.hexdigest(), written

    def add_regular(self, data: bytes) -> Entry:
        """Keep the bytes of a file that does not go through LFS."""
        sha256, size = self.add_blob([data])
        return file_entry(sha256, size, oid=git_hash(data))

    def lfs_entry(self, sha256: str) -> Entry:
        """Return the entry of an LFS file that was uploaded before."""
        if not re.fullmatch("[0-9a-f]{64}", sha256) or not self.blob(sha256).exists():
            raise HubError(400, f"LFS object {sha256!r} was not uploaded to this repository")
        return file_entry(sha256, self.blob(sha256).stat().st_size)

    def part(self, oid: str, number: str | int) -> Path:
        """Return the path of one part of an object that is uploaded in parts."""
        return self.folder / "uploads" / f"{oid}.{int(number)}"

    def add_part(self, chunks: Iterable[bytes], oid: str, number: str | int) -> str:
        """Keep one part of an object next to the blobs and return its SHA-256."""
        data = b"".join(chunks)
        write_atomically(self.part(oid, number), data)
        return hashlib.sha256(data).hexdigest()

    def join_parts(self, oid: str, size: int, parts: Sequence[tuple[int, str]]) -> None:
        """
        Make an object of its parts.

        Args:
            oid (`str`), size (`int`): SHA-256 and size of the object.
            parts (list of `(int, str)`): number and SHA-256 of each part.

        Raises:
            `HubError`: 400 when a part is missing or is not the announced one.
        """
        numbers = [number for number, _ in parts]
        if numbers != list(range(1, len(parts) + 1)):
            raise HubError(400, f"Object {oid}: expected all parts in order, got {numbers}")
        for number, etag in parts:
            path = self.part(oid, number)
            if not path.exists() or hashlib.sha256(path.read_bytes()).hexdigest() != etag:
                raise HubError(400, f"Object {oid}: part {number} is not the uploaded one")
        self.add_blob((self.part(oid, number).read_bytes() for number in numbers), oid, size)
        for number in numbers:
            self.part(oid, number).unlink()

    # refs and commits

    def refs(self, kind: str) -> dict[str, str]:
        """Return `{name: commit id}` of the branches (`heads`) or `tags`."""
        paths = [path for path in sorted((self.folder / kind).iterdir()) if not path.name.startswith(".")]
        return {unquote(path.name): path.read_text() for path in paths}

    def ref(self, kind: str, name: str) -> Path:
        """Return the path of a ref. It never begins with a dot, as files that are being written do."""
        return self.folder / kind / quote(name, safe="").replace(".", "%2E")

    def set_ref(self, kind: str, name: str, commit: str, new: bool = False) -> None:
        """Point a branch or tag at a commit; a `new` one must not exist."""
        with self.lock:
            if new and name in self.refs(kind):
                raise HubError(409, f"Reference already exists: {name}")
            write_atomically(self.ref(kind, name), commit.encode())

    def delete_ref(self, kind: str, name: str) -> None:
        """Delete a branch or tag, except the main branch."""
        if (kind, name) == ("heads", "main"):
            raise HubError(403, "The branch main cannot be deleted")
        if name not in self.refs(kind):
            raise HubError(404, f"Invalid rev id: {name}", "RevisionNotFound")
        self.ref(kind, name).unlink()

    def resolve(self, revision: str) -> dict[str, Any]:
        """Return the commit that a branch, a tag or a full commit id names."""
        commit = self.refs("heads").get(revision) or self.refs("tags").get(revision) or revision
        path = self.folder / "commits" / f"{commit}.json"
        if not re.fullmatch("[0-9a-f]{40}", commit) or not path.exists():
            raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return {"id": commit, **json.loads(path.read_bytes())}

    def history(self, revision: str) -> Iterator[dict[str, Any]]:
        """Yield a commit and its ancestors, newest first."""
        commit = self.resolve(revision)
        yield commit
        while commit["parent"]:
            commit = self.resolve(commit["parent"])
            yield commit

    def commit(self, branch: str, header: dict[str, str], operations: Iterable[Operation], first: bool = False) -> str:
        """
        Put one commit on a branch and return its id.

        Args:
            branch (`str`): must exist, except for the `first` commit.
            header (`dict`): `summary`, and optionally `description` and `parentCommit`.
            operations: `("add", path, entry)`, `("delete", path, None)` or `("delete_folder", path, None)`.

        Raises:
            `HubError`: 404 for a branch or a deleted path that does not exist, 412 when `parentCommit` is not the
                branch's head.
        """
        with self.lock:
            head = self.refs("heads").get(branch)
            if head is None and not first:
                raise HubError(404, f"Invalid rev id: {branch} is not a branch", "RevisionNotFound")
            if header.get("parentCommit", head) != head:
                raise HubError(412, "A commit has happened since. Please refresh and try again.")
            files = dict(self.resolve(head)["files"]) if head else {}
            for action, path, entry in operations:
                apply(files, action, path, entry)
            commit = {
                "parent": head,
                "title": header["summary"],
                "message": header.get("description", ""),
                "date": now(),
                "files": files,
            }
            data = json.dumps(commit).encode()
            commit_id = hashlib.sha1(data).hexdigest()
            write_atomically(self.folder / "commits" / f"{commit_id}.json", data)
            self.set_ref("heads", branch, commit_id)
        return commit_id


def apply(files: dict[str, Entry], action: str, path: str, entry: Entry | None) -> None:
    """Carry out one operation on the `{path: entry}` of a commit."""
    if action == "add":
        files[checked_path(path)] = entry
        return
    if action == "delete":
        deleted = [path]
    else:
        deleted = [name for name in files if name.startswith(path.rstrip("/") + "/")]
    if not deleted or deleted[0] not in files:
        raise HubError(404, f"A file with this name doesn't exist: {path}", "EntryNotFound")
    for name in deleted:
        del files[name]


def now() -> str:
    """Return the time as the Hub writes it."""
    return datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%S.%f")[:-3] + "Z"
