"""The endpoints of the test Hub: what pushing and loading repositories needs of the Hub's protocol, with Xet off."""

import base64
import binascii
import hashlib
import hmac
import json
import math
import re
from typing import Any
from urllib.parse import parse_qs, quote, urlsplit

import yaml

from support.hub_connection import HubConnection
from support.hub_metadata import card_metadata, check_card
from support.hub_store import LFS_ABOVE, LFS_SUFFIXES, Entry, HubError, Operation, Repository, checked_path

USER = "tester"


class HubHandler(HubConnection):
    """The endpoints. `handle_any` calls them with the repository, if the path names one, and the rest of the path."""

    # account, repositories, refs

    def whoami(self) -> None:
        token = {"displayName": "test", "role": "write"}
        auth = {"type": "access_token", "accessToken": token}
        self.answer({"type": "user", "id": USER, "name": USER, "fullname": USER, "orgs": [], "auth": auth})

    def create_repo(self) -> None:
        body = self.json()
        kind, repo_id = body.get("type") or "model", full_repo_id(body)
        private = body.get("visibility") == "private" or body.get("private") is True
        if kind not in ("model", "dataset", "space"):
            raise HubError(400, f"Unknown type of repository {kind!r}: expected model, dataset or space")
        created = self.server.store.create(kind, repo_id, private)
        info = {"url": self.url(self.server.store.get(kind, repo_id)), "name": repo_id, "id": repo_id}
        if created:
            self.answer(info)
        else:
            self.answer({**info, "error": f"You already created this {kind} repo: {repo_id}"}, 409)

    def delete_repo(self) -> None:
        body = self.json()
        self.server.store.delete(body.get("type") or "model", full_repo_id(body))
        self.answer("OK")

    def validate_yaml(self) -> None:
        body = self.json()
        errors, warnings = check_card(body["content"], body["repoType"])
        messages = {
            "errors": [{"message": text} for text in errors],
            "warnings": [{"message": text} for text in warnings],
        }
        self.answer(messages, 400 if errors else 200)

    def info(self, repo: Repository, revision: str = "main") -> None:
        commit, settings = repo.resolve(revision), repo.settings
        card = card_of(repo, commit)
        siblings = []
        for path, entry in sorted(commit["files"].items()):
            blob = blob_info(entry) if "blobs" in self.query else {}
            siblings.append({"rfilename": path, **blob})
        info = {
            "id": repo.id,
            "author": repo.id.split("/")[0],
            "sha": commit["id"],
            "lastModified": commit["date"],
            "createdAt": settings["created"],
            "private": settings["private"],
            "gated": False,
            "disabled": False,
            "downloads": 0,
            "likes": 0,
            "siblings": siblings,
            "tags": card.get("tags") or [],
            "cardData": card or None,
        }
        shown = {name: card[name] for name in ("pipeline_tag", "library_name", "model-index") if name in card}
        self.answer({**info, **shown})

    def refs(self, repo: Repository) -> None:
        refs = {}
        for name, kind in (("branches", "heads"), ("tags", "tags")):
            refs[name] = [
                {"name": ref, "ref": f"refs/{kind}/{ref}", "targetCommit": commit}
                for ref, commit in repo.refs(kind).items()
            ]
        self.answer({**refs, "converts": [], "pullRequests": []})

    def create_branch(self, repo: Repository, name: str) -> None:
        start = self.json().get("startingPoint") or "main"
        repo.set_ref("heads", name, repo.resolve(start)["id"], new=True)
        self.answer("OK")

    def create_tag(self, repo: Repository, revision: str) -> None:
        repo.set_ref("tags", self.json()["tag"], repo.resolve(revision)["id"], new=True)
        self.answer("OK")

    def delete_branch(self, repo: Repository, name: str) -> None:
        repo.delete_ref("heads", name)
        self.answer("OK")

    def delete_tag(self, repo: Repository, name: str) -> None:
        repo.delete_ref("tags", name)
        self.answer("OK")

    # files: listing and reading

    def commits(self, repo: Repository, revision: str) -> None:
        commits = []
        for commit in repo.history(revision):
            shown = {name: commit[name] for name in ("id", "title", "message", "date")}
            commits.append({**shown, "authors": [{"user": USER}]})
        self.answer(commits)

    def tree(self, repo: Repository, revision: str, path: str = "") -> None:
        """List a folder. If it has more than `page_size` entries, the header `Link` names the next page."""
        files = repo.resolve(revision)["files"]
        recursive = self.query.get("recursive", "").lower() == "true"
        entries = list_tree(files, checked_path(path) if path else "", recursive)
        if path and not entries:
            raise HubError(404, f"{path} does not exist on {revision}", "EntryNotFound")
        start = int(self.query.get("cursor", 0))
        end = start + min(int(self.query.get("limit", self.server.page_size)), self.server.page_size)
        headers = {}
        if end < len(entries):
            query = {**self.query, "cursor": str(end)}
            next_query = "&".join(f"{name}={quote(value)}" for name, value in query.items())
            headers["Link"] = f'<{self.server.url}{urlsplit(self.path).path}?{next_query}>; rel="next"'
        self.answer(entries[start:end], headers=headers)

    def paths_info(self, repo: Repository, revision: str) -> None:
        paths = parse_qs(b"".join(self.chunks()).decode()).get("paths", [])
        entries = list_tree(repo.resolve(revision)["files"], "", recursive=True)
        self.answer([entry for entry in entries if entry["path"] in paths])

    def resolve(self, repo: Repository, revision: str, path: str) -> None:
        """Send a file, or a range of it; `HEAD` sends only its headers."""
        commit = repo.resolve(revision)
        headers = {"X-Repo-Commit": commit["id"]}
        entry = commit["files"].get(checked_path(path))
        if entry is None:
            headers |= {"X-Error-Code": "EntryNotFound", "X-Error-Message": "Entry not found"}
            self.answer({"error": "Entry not found"}, 404, headers)
            return
        etag = f'"{entry["sha256"] if entry["lfs"] else entry["oid"]}"'
        headers |= {"ETag": etag, "Accept-Ranges": "bytes", "Content-Type": "application/octet-stream"}
        if entry["lfs"]:
            headers |= {"X-Linked-Etag": etag, "X-Linked-Size": str(entry["size"])}
        self.send_range(repo.blob(entry["sha256"]), entry["size"], headers)

    # files: writing

    def preupload(self, repo: Repository, revision: str) -> None:
        """Say how to upload each file, and which object has its name now, so that the client skips unchanged files."""
        entries, modes = repo.resolve(revision)["files"], []
        for file in self.json()["files"]:
            path = checked_path(file["path"])
            lfs = file["size"] > LFS_ABOVE or path.endswith(LFS_SUFFIXES)
            oid = None
            if path in entries:
                oid = entries[path]["sha256" if entries[path]["lfs"] else "oid"]
            modes.append({"path": path, "uploadMode": "lfs" if lfs else "regular", "shouldIgnore": False, "oid": oid})
        self.answer({"files": modes})

    def commit(self, repo: Repository, revision: str) -> None:
        if "create_pr" in self.query:
            raise HubError(403, "The test Hub has no pull requests")
        try:
            lines = [json.loads(line) for line in b"".join(self.chunks()).splitlines() if line]
            operations = [operation(repo, line["key"], line["value"]) for line in lines[1:]]
        except (ValueError, KeyError, IndexError, binascii.Error) as error:
            raise HubError(400, f"Malformed commit: {error!r}") from None
        commit = repo.commit(revision, lines[0]["value"], operations)
        url = self.url(repo, f"/commit/{commit}")
        self.answer({"success": True, "commitOid": commit, "commitUrl": url, "hookOutput": ""})

    def lfs_batch(self, repo: Repository) -> None:
        """Say where to send each object; objects that the repository has need not be sent."""
        actions = [self.lfs_action(repo, lfs["oid"], lfs["size"]) for lfs in self.json()["objects"]]
        self.answer({"transfer": "basic", "objects": actions})

    def lfs_action(self, repo: Repository, oid: str, size: int) -> dict[str, Any]:
        """Return one object of the response to `lfs_batch`."""
        if not re.fullmatch("[0-9a-f]{64}", oid):
            return {"oid": oid, "size": size, "error": {"code": 422, "message": f"{oid!r} is not a SHA-256"}}
        if repo.blob(oid).exists():
            return {"oid": oid, "size": size}
        upload: dict[str, Any] = {"href": self.signed_url(repo, oid, size)}
        part_size = self.server.multipart_above
        if size > part_size:
            num_parts = math.ceil(size / part_size)
            header = {str(part): self.signed_url(repo, oid, size, str(part)) for part in range(1, num_parts + 1)}
            header["chunk_size"] = str(part_size)
            upload = {"href": self.signed_url(repo, oid, size, "complete"), "header": header}
        verify = {"href": self.url(repo, ".git/info/lfs/objects/verify")}
        return {"oid": oid, "size": size, "actions": {"upload": upload, "verify": verify}}

    def signature(self, repo: Repository, oid: str, size: int, part: str) -> str:
        text = f"{repo.kind}/{repo.id}/{oid}/{size}/{part}"
        return hmac.new(self.server.secret, text.encode(), "sha256").hexdigest()

    def signed_url(self, repo: Repository, oid: str, size: int, part: str = "whole") -> str:
        """Return an address that may be used without the token, also after the server was started again."""
        query = f"size={size}&signature={self.signature(repo, oid, size, part)}"
        return self.url(repo, f".git/info/lfs/objects/{oid}/{part}?{query}")

    def put_object(self, repo: Repository, oid: str, part: str) -> None:
        """Receive an object, one of its parts, or the message that all parts were sent."""
        size = int(self.query.get("size", -1))
        signature = self.query.get("signature", "")
        if not hmac.compare_digest(signature.encode(), self.signature(repo, oid, size, part).encode()):
            raise HubError(403, "The signature of this address is not valid")
        if part == "whole":
            repo.add_blob(self.object_chunks(), oid, size)
        elif part == "complete":
            parts = [(int(sent["partNumber"]), sent["etag"].strip('"')) for sent in self.json()["parts"]]
            repo.join_parts(oid, size, parts)
        else:
            etag = repo.add_part(self.object_chunks(), oid, part)
            self.answer(headers={"ETag": f'"{etag}"'})
            return
        self.answer("OK")

    def lfs_verify(self, repo: Repository) -> None:
        body = self.json()
        oid, size = body["oid"], body["size"]
        is_valid = re.fullmatch("[0-9a-f]{64}", oid) is not None
        if not is_valid or not repo.blob(oid).exists() or repo.blob(oid).stat().st_size != size:
            raise HubError(404, f"No object {oid} of {size} bytes")
        self.answer("OK")


def full_repo_id(body: dict[str, Any]) -> str:
    """Return the id of the repository that a request names; its namespace defaults to the user's."""
    return f"{body.get('organization') or USER}/{body['name']}"


def operation(repo: Repository, key: str, value: dict[str, Any]) -> Operation:
    """
    Return one line of a commit as `Repository.commit` takes it.

    This keeps the bytes of a regular file; an LFS object must have been uploaded before.
    """
    path = checked_path(value["path"].rstrip("/") if key == "deletedFolder" else value["path"])
    if key == "file":
        return "add", path, repo.add_regular(base64.b64decode(value["content"], validate=True))
    if key == "lfsFile":
        return "add", path, repo.lfs_entry(value["oid"])
    if key == "deletedFile":
        return "delete", path, None
    if key == "deletedFolder":
        return "delete_folder", path, None
    raise HubError(400, f"Unknown operation {key!r} in a commit")


def blob_info(entry: Entry) -> dict[str, Any]:
    """Return size and ids of a file for the info of a repository."""
    info = {"size": entry["size"], "blobId": entry["oid"]}
    if entry["lfs"]:
        info["lfs"] = {"sha256": entry["sha256"], "size": entry["size"], "pointerSize": entry["pointer_size"]}
    return info


def list_tree(files: dict[str, Entry], folder: str, recursive: bool) -> list[dict[str, Any]]:
    """Return the files and folders in `folder` ("" is the root), by path; those below its folders if `recursive`."""
    prefix = f"{folder}/" if folder else ""
    entries: dict[str, dict[str, Any]] = {}
    for path, entry in files.items():
        if not path.startswith(prefix):
            continue
        names = path.removeprefix(prefix).split("/")
        num_folders = len(names) - 1 if recursive else min(len(names) - 1, 1)
        for depth in range(1, num_folders + 1):
            name = prefix + "/".join(names[:depth])
            oid = hashlib.sha1(name.encode()).hexdigest()
            entries[name] = {"type": "directory", "path": name, "size": 0, "oid": oid}
        if recursive or len(names) == 1:
            entries[path] = {"type": "file", "path": path, "size": entry["size"], "oid": entry["oid"]}
            if entry["lfs"]:
                lfs = {"oid": entry["sha256"], "size": entry["size"], "pointerSize": entry["pointer_size"]}
                entries[path]["lfs"] = lfs
    return [entries[path] for path in sorted(entries)]


def card_of(repo: Repository, commit: dict[str, Any]) -> dict[str, Any]:
    """Return the metadata of README.md; empty if there is none, or it is invalid."""
    entry = commit["files"].get("README.md")
    if entry is None:
        return {}
    try:
        return card_metadata(repo.blob(entry["sha256"]).read_text(encoding="utf-8")) or {}
    except (yaml.YAMLError, ValueError):
        return {}


API = r"/api/(?P<kind>model|dataset|space)s/(?P<repo>[^/]+/[^/]+)"
GIT = r"/(?:(?P<kind>dataset|space)s/)?(?P<repo>[^/]+/[^/]+?)"
REV = r"/(?P<revision>[^/]+)"
NAME = r"/(?P<name>[^/]+)"
OBJECTS = r"\.git/info/lfs/objects"
OID = r"/(?P<oid>[0-9a-f]{64})"
HubHandler.routes = [  # the patterns match quoted paths: a revision or a folder may hold a quoted slash
    (("GET",), "/api/whoami-v2", HubHandler.whoami, "write"),
    (("POST",), "/api/repos/create", HubHandler.create_repo, "write"),
    (("DELETE",), "/api/repos/delete", HubHandler.delete_repo, "write"),
    (("POST",), "/api/validate-yaml", HubHandler.validate_yaml, "read"),
    (("GET",), API + f"(?:/revision{REV})?", HubHandler.info, "read"),
    (("GET",), API + "/refs", HubHandler.refs, "read"),
    (("GET",), API + "/commits" + REV, HubHandler.commits, "read"),
    (("GET",), API + "/tree" + REV + "(?:/(?P<path>.+))?", HubHandler.tree, "read"),
    (("POST",), API + "/paths-info" + REV, HubHandler.paths_info, "read"),
    (("POST",), API + "/branch" + NAME, HubHandler.create_branch, "write"),
    (("DELETE",), API + "/branch" + NAME, HubHandler.delete_branch, "write"),
    (("POST",), API + "/tag" + REV, HubHandler.create_tag, "write"),
    (("DELETE",), API + "/tag" + NAME, HubHandler.delete_tag, "write"),
    (("POST",), API + "/preupload" + REV, HubHandler.preupload, "write"),
    (("POST",), API + "/commit" + REV, HubHandler.commit, "write"),
    (("POST",), GIT + OBJECTS + "/batch", HubHandler.lfs_batch, "write"),
    (("POST",), GIT + OBJECTS + "/verify", HubHandler.lfs_verify, "write"),
    (("PUT",), GIT + OBJECTS + OID + r"/(?P<part>whole|\d+)", HubHandler.put_object, "signed"),
    (("POST",), GIT + OBJECTS + OID + "/(?P<part>complete)", HubHandler.put_object, "signed"),
    (("GET", "HEAD"), GIT + "/resolve" + REV + "/(?P<path>.+)", HubHandler.resolve, "read"),
]
