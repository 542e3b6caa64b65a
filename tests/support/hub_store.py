"""
What the test Hub keeps: repositories of commits, refs and blobs, in a folder that outlives the server.

Every file is written under another name and then renamed, and a commit's blobs come before the commit, the commit before the ref that
names it: whoever kills the server, and whenever, a reader finds a commit whole or not at all.
"""

import hashlib
import json
import os
import re
import shutil
import tempfile
import threading
from datetime import datetime, timezone
from pathlib import Path
from urllib.parse import quote, unquote

LFS_SUFFIXES = (".safetensors", ".arrow", ".faiss", ".png", ".bin", ".parquet")
LFS_ABOVE = 10 * 2**20  # bytes: a larger file goes through LFS whatever its name
GIT_ATTRIBUTES = "".join(
    f"*{suffix} filter=lfs diff=lfs merge=lfs -text\n" for suffix in LFS_SUFFIXES
).encode()  # every repository's first file
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n"
NAME = re.compile(r"[A-Za-z0-9_](?!.*\.\.)[A-Za-z0-9_.-]{0,95}")


class HubError(Exception):
    """A refusal: HTTP status, the `X-Error-Code` the client knows it by, and what it says."""

    def __init__(self, status, message, code=None):
        super().__init__(message)
        self.status, self.code = status, code


def write_whole(path, data):
    """A reader of `path` sees all of `data` or what was there before."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=".tmp-")
    with os.fdopen(handle, "wb") as file:
        file.write(data)
    os.replace(name, path)


def checked_path(path):
    """`path` of a file or folder in a repository; a `HubError` for one that leads elsewhere."""
    if any(part in ("", ".", "..", ".git") for part in path.split("/")) or re.search(r"[\\\x00-\x1f]", path):
        raise HubError(400, f"Invalid path in repo: {path!r} is not a relative path without '.', '..' and '.git'")
    return path


def git_hash(data):
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def file_entry(sha256, size, oid=None):
    """What a commit says of a file; the git `oid` of an LFS file (`oid=None`) is its pointer's."""
    pointer = POINTER.format(sha256=sha256, size=size).encode()
    return {
        "sha256": sha256,
        "size": size,
        "lfs": oid is None,
        "oid": oid or git_hash(pointer),
        "pointer_size": len(pointer),
    }


class HubStore:
    """All repositories under `root`, each a folder `<type>s/<namespace>/<name>`."""

    def __init__(self, root):
        self.root = Path(root)
        self.root.mkdir(parents=True, exist_ok=True)
        self.lock = threading.RLock()  # one commit, branch or tag at a time

    def folder(self, kind, repo_id):
        if not all(NAME.fullmatch(name) for name in repo_id.split("/")) or repo_id.count("/") != 1:
            raise HubError(
                400, f"Invalid repository id {repo_id!r}: expected namespace/name of letters, digits, '-', '_' and '.'"
            )
        return self.root / f"{kind}s" / repo_id

    def create(self, kind, repo_id, private):
        """A repository whose first commit holds `.gitattributes`. False, and nothing is done, where there is one of this id."""
        folder = self.folder(kind, repo_id)
        folder.parent.mkdir(parents=True, exist_ok=True)
        made = Repository(Path(tempfile.mkdtemp(dir=self.root, prefix=".tmp-")), kind, repo_id, self.lock)
        for name in ("blobs", "uploads", "commits", "heads", "tags"):
            (made.folder / name).mkdir()
        write_whole(made.folder / "repo.json", json.dumps({"private": private, "created": now()}).encode())
        made.commit(
            "main",
            {"summary": "initial commit"},
            [("add", ".gitattributes", made.add_regular(GIT_ATTRIBUTES))],
            first=True,
        )
        try:
            os.rename(made.folder, folder)
        except OSError:
            shutil.rmtree(made.folder)
            return False
        return True

    def get(self, kind, repo_id):
        folder = self.folder(kind, repo_id)
        if not folder.is_dir():
            raise HubError(404, "Repository not found", "RepoNotFound")
        return Repository(folder, kind, repo_id, self.lock)

    def delete(self, kind, repo_id):
        trash = Path(tempfile.mkdtemp(dir=self.root, prefix=".tmp-"))
        os.rename(self.get(kind, repo_id).folder, trash / "repo")
        shutil.rmtree(trash)


class Repository:
    """One repository's folder: `blobs/<sha256>`, `commits/<id>.json`, and refs `heads/<name>`, `tags/<name>` that hold a commit's id."""

    def __init__(self, folder, kind, repo_id, lock):
        self.folder, self.kind, self.id, self.lock = folder, kind, repo_id, lock

    @property
    def settings(self):
        return json.loads((self.folder / "repo.json").read_bytes())

    def blob(self, sha256):
        return self.folder / "blobs" / sha256

    def add_blob(self, chunks, sha256=None, size=None):
        """Keeps the bytes that `chunks` yields; a `HubError` 400 where their SHA-256 or number is not the one announced. Returns both."""
        handle, name = tempfile.mkstemp(dir=self.folder / "uploads")
        digest, written = hashlib.sha256(), 0
        try:
            with os.fdopen(handle, "wb", buffering=0) as file:
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

    def add_regular(self, data):
        return file_entry(*self.add_blob([data]), oid=git_hash(data))

    def lfs_entry(self, sha256):
        if not re.fullmatch("[0-9a-f]{64}", sha256) or not self.blob(sha256).exists():
            raise HubError(400, f"LFS object {sha256!r} was not uploaded to this repository")
        return file_entry(sha256, self.blob(sha256).stat().st_size)

    def part(self, oid, number):
        return self.folder / "uploads" / f"{oid}.{int(number)}"

    def add_part(self, chunks, oid, number):
        """Keeps one part of the object `oid` beside the blobs; returns its SHA-256."""
        data = b"".join(chunks)
        write_whole(self.part(oid, number), data)
        return hashlib.sha256(data).hexdigest()

    def join_parts(self, oid, size, parts):
        """Makes the object `oid` of its `(number, SHA-256)` parts; a `HubError` 400 where one is missing or not the announced one."""
        if [number for number, _ in parts] != list(range(1, len(parts) + 1)):
            raise HubError(400, f"Object {oid}: expected all parts in order, got {[number for number, _ in parts]}")
        for number, etag in parts:
            if (
                not self.part(oid, number).exists()
                or hashlib.sha256(self.part(oid, number).read_bytes()).hexdigest() != etag
            ):
                raise HubError(400, f"Object {oid}: part {number} is not the uploaded one")
        self.add_blob((self.part(oid, number).read_bytes() for number, _ in parts), oid, size)
        for number, _ in parts:
            self.part(oid, number).unlink()

    def refs(self, kind):
        """`{name: commit id}` of the branches (`heads`) or `tags`."""
        return {
            unquote(path.name): path.read_text()
            for path in sorted((self.folder / kind).iterdir())
            if not path.name.startswith(".")
        }

    def set_ref(self, kind, name, commit, new=False):
        with self.lock:
            if new and name in self.refs(kind):
                raise HubError(409, f"Reference already exists: {name}")
            write_whole(
                self.folder / kind / quote(name, safe="").replace(".", "%2E"), commit.encode()
            )  # no name begins with a dot

    def delete_ref(self, kind, name):
        if (kind, name) == ("heads", "main"):
            raise HubError(403, "The branch main cannot be deleted")
        if name not in self.refs(kind):
            raise HubError(404, f"Invalid rev id: {name}", "RevisionNotFound")
        (self.folder / kind / quote(name, safe="").replace(".", "%2E")).unlink()

    def resolve(self, revision):
        """The commit that a branch, a tag or a full commit id names."""
        commit = self.refs("heads").get(revision) or self.refs("tags").get(revision) or revision
        path = self.folder / "commits" / f"{commit}.json"
        if not re.fullmatch("[0-9a-f]{40}", commit) or not path.exists():
            raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return {"id": commit, **json.loads(path.read_bytes())}

    def history(self, revision):
        commit = self.resolve(revision)
        yield commit
        while commit["parent"]:
            commit = self.resolve(commit["parent"])
            yield commit

    def commit(self, branch, header, operations, first=False):
        """
        Puts one commit of `operations` on `branch`: `("add", path, entry)`, `("delete", path, None)` or `("delete_folder", path, None)`.

        Errors: `HubError` 404 for a branch or a deleted path that is not there, 412 where `header["parentCommit"]` is not the branch's head.
        """
        with self.lock:
            head = self.refs("heads").get(branch)
            if head is None and not first:
                raise HubError(404, f"Invalid rev id: {branch} is no branch", "RevisionNotFound")
            if header.get("parentCommit", head) != head:
                raise HubError(412, "A commit has happened since. Please refresh and try again.")
            files = dict(self.resolve(head)["files"]) if head else {}
            for operation in operations:
                apply(files, *operation)
            commit = {
                "parent": head,
                "title": header["summary"],
                "message": header.get("description", ""),
                "date": now(),
                "files": files,
            }
            data = json.dumps(commit).encode()
            commit_id = hashlib.sha1(data).hexdigest()
            write_whole(self.folder / "commits" / f"{commit_id}.json", data)
            self.set_ref("heads", branch, commit_id)
        return commit_id


def apply(files, action, path, entry):
    """One operation on a commit's `{path: entry}`."""
    if action == "add":
        files[checked_path(path)] = entry
        return
    gone = [path] if action == "delete" else [name for name in files if name.startswith(path.rstrip("/") + "/")]
    if not gone or gone[0] not in files:
        raise HubError(404, f"A file with this name doesn't exist: {path}", "EntryNotFound")
    for name in gone:
        del files[name]


def now():
    return datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%S.%f")[:-3] + "Z"
