"""The Hub's protocol over HTTP, as huggingface_hub speaks it with Xet off: the part of it that pushing and loading repositories needs."""

import base64
import binascii
import hashlib
import hmac
import json
import math
import re
from urllib.parse import parse_qs, quote, urlsplit

import yaml

from support.hub_connection import HubConnection
from support.hub_metadata import card_metadata, check_card
from support.hub_store import LFS_ABOVE, LFS_SUFFIXES, HubError, checked_path

USER = "tester"


class HubHandler(HubConnection):
    """The endpoints; `handle_any` calls them with the repository, if the path names one, and the rest of the path."""

    # account, repositories, refs

    def whoami(self):
        token = {"displayName": "test", "role": "write"}
        self.answer(
            {
                "type": "user",
                "id": USER,
                "name": USER,
                "fullname": USER,
                "orgs": [],
                "auth": {"type": "access_token", "accessToken": token},
            }
        )

    def create_repo(self):
        asked = self.json()
        kind, repo_id = asked.get("type") or "model", f"{asked.get('organization') or USER}/{asked['name']}"
        private = asked.get("visibility") == "private" or asked.get("private") is True
        if kind not in ("model", "dataset", "space"):
            raise HubError(400, f"Unknown type of repository {kind!r}: expected model, dataset or space")
        made = self.server.store.create(kind, repo_id, private)
        about = {"url": self.url(self.server.store.get(kind, repo_id)), "name": repo_id, "id": repo_id}
        self.answer(
            about if made else {**about, "error": f"You already created this {kind} repo: {repo_id}"},
            200 if made else 409,
        )

    def delete_repo(self):
        asked = self.json()
        self.server.store.delete(asked.get("type") or "model", f"{asked.get('organization') or USER}/{asked['name']}")
        self.answer("OK")

    def validate_yaml(self):
        asked = self.json()
        errors, warnings = check_card(asked["content"], asked["repoType"])
        found = {
            "errors": [{"message": text} for text in errors],
            "warnings": [{"message": text} for text in warnings],
        }
        self.answer(found, 400 if errors else 200)

    def info(self, repo, revision="main"):
        commit, settings = repo.resolve(revision), repo.settings
        card = card_of(repo, commit)
        siblings = [
            {"rfilename": path} | (blob_info(entry) if "blobs" in self.query else {})
            for path, entry in sorted(commit["files"].items())
        ]
        about = {
            "id": repo.id,
            "author": repo.id.split("/")[0],
            "sha": commit["id"],
            "lastModified": commit["date"],
            "createdAt": settings["created"],
        }
        about |= {
            "private": settings["private"],
            "gated": False,
            "disabled": False,
            "downloads": 0,
            "likes": 0,
            "siblings": siblings,
        }
        about |= {name: card[name] for name in ("pipeline_tag", "library_name", "model-index") if name in card}
        self.answer({**about, "tags": card.get("tags") or [], "cardData": card or None})

    def refs(self, repo):
        listed = {"branches": ("heads", repo.refs("heads")), "tags": ("tags", repo.refs("tags"))}
        answer = {
            name: [{"name": r, "ref": f"refs/{kind}/{r}", "targetCommit": c} for r, c in refs.items()]
            for name, (kind, refs) in listed.items()
        }
        self.answer({**answer, "converts": [], "pullRequests": []})

    def create_branch(self, repo, name):
        repo.set_ref("heads", name, repo.resolve(self.json().get("startingPoint") or "main")["id"], new=True)
        self.answer("OK")

    def create_tag(self, repo, revision):
        repo.set_ref("tags", self.json()["tag"], repo.resolve(revision)["id"], new=True)
        self.answer("OK")

    def delete_branch(self, repo, name):
        repo.delete_ref("heads", name)
        self.answer("OK")

    def delete_tag(self, repo, name):
        repo.delete_ref("tags", name)
        self.answer("OK")

    # files: listing and reading

    def commits(self, repo, revision):
        about = [
            {
                "id": c["id"],
                "title": c["title"],
                "message": c["message"],
                "date": c["date"],
                "authors": [{"user": USER}],
            }
            for c in repo.history(revision)
        ]
        self.answer(about)

    def tree(self, repo, revision, path=""):
        """Page by page where there are more than `page_size` entries: `Link` names the next one."""
        listed = list_tree(
            repo.resolve(revision)["files"],
            checked_path(path) if path else "",
            self.query.get("recursive", "").lower() == "true",
        )
        if path and not listed:
            raise HubError(404, f"{path} does not exist on {revision}", "EntryNotFound")
        start, size = (
            int(self.query.get("cursor", 0)),
            min(int(self.query.get("limit", self.server.page_size)), self.server.page_size),
        )
        following = "&".join(
            f"{name}={quote(value)}" for name, value in {**self.query, "cursor": str(start + size)}.items()
        )
        link = (
            {"Link": f'<{self.server.url}{urlsplit(self.path).path}?{following}>; rel="next"'}
            if start + size < len(listed)
            else {}
        )
        self.answer(listed[start : start + size], headers=link)

    def paths_info(self, repo, revision):
        wanted = parse_qs(b"".join(self.chunks()).decode()).get("paths", [])
        self.answer(
            [
                entry
                for entry in list_tree(repo.resolve(revision)["files"], "", recursive=True)
                if entry["path"] in wanted
            ]
        )

    def resolve(self, repo, revision, path):
        """A file's bytes, or a range of them; `HEAD` says what it is."""
        commit = repo.resolve(revision)
        entry = commit["files"].get(checked_path(path))
        if entry is None:
            headers = {
                "X-Repo-Commit": commit["id"],
                "X-Error-Code": "EntryNotFound",
                "X-Error-Message": "Entry not found",
            }
            self.answer({"error": "Entry not found"}, 404, headers)
            return
        etag = f'"{entry["sha256"] if entry["lfs"] else entry["oid"]}"'
        headers = {
            "X-Repo-Commit": commit["id"],
            "ETag": etag,
            "Accept-Ranges": "bytes",
            "Content-Type": "application/octet-stream",
        }
        headers |= {"X-Linked-Etag": etag, "X-Linked-Size": str(entry["size"])} if entry["lfs"] else {}
        self.send_range(repo.blob(entry["sha256"]), entry["size"], headers)

    # files: writing

    def preupload(self, repo, revision):
        """Which way each file goes, and what the repository holds under its name (the client leaves out what is unchanged)."""
        held, modes = repo.resolve(revision)["files"], []
        for file in self.json()["files"]:
            path, lfs = checked_path(file["path"]), file["size"] > LFS_ABOVE or file["path"].endswith(LFS_SUFFIXES)
            oid = held[path]["sha256" if held[path]["lfs"] else "oid"] if path in held else None
            modes.append({"path": path, "uploadMode": "lfs" if lfs else "regular", "shouldIgnore": False, "oid": oid})
        self.answer({"files": modes})

    def commit(self, repo, revision):
        if "create_pr" in self.query:
            raise HubError(403, "The test Hub has no pull requests")
        try:
            lines = [json.loads(line) for line in b"".join(self.chunks()).splitlines() if line]
            operations = [operation(repo, line["key"], line["value"]) for line in lines[1:]]
        except (ValueError, KeyError, IndexError, binascii.Error) as error:
            raise HubError(400, f"Malformed commit: {error!r}") from None
        commit = repo.commit(revision, lines[0]["value"], operations)
        self.answer(
            {"success": True, "commitOid": commit, "commitUrl": self.url(repo, f"/commit/{commit}"), "hookOutput": ""}
        )

    def lfs_batch(self, repo):
        """Where each object is to be sent; nowhere if it is there."""
        self.answer(
            {
                "transfer": "basic",
                "objects": [self.lfs_action(repo, thing["oid"], thing["size"]) for thing in self.json()["objects"]],
            }
        )

    def lfs_action(self, repo, oid, size):
        if not re.fullmatch("[0-9a-f]{64}", oid):
            return {"oid": oid, "size": size, "error": {"code": 422, "message": f"{oid!r} is no SHA-256"}}
        if repo.blob(oid).exists():
            return {"oid": oid, "size": size}
        upload = {"href": self.signed(repo, oid, size)}
        if size > self.server.multipart_above:
            parts = range(1, math.ceil(size / self.server.multipart_above) + 1)
            header = {
                "chunk_size": str(self.server.multipart_above),
                **{str(part): self.signed(repo, oid, size, str(part)) for part in parts},
            }
            upload = {"href": self.signed(repo, oid, size, "complete"), "header": header}
        return {
            "oid": oid,
            "size": size,
            "actions": {"upload": upload, "verify": {"href": self.url(repo, ".git/info/lfs/objects/verify")}},
        }

    def signature(self, repo, oid, size, part):
        return hmac.new(
            self.server.secret, f"{repo.kind}/{repo.id}/{oid}/{size}/{part}".encode(), "sha256"
        ).hexdigest()

    def signed(self, repo, oid, size, part="whole"):
        """An address that may be used without the token, and outlives the server."""
        return self.url(
            repo, f".git/info/lfs/objects/{oid}/{part}?size={size}&signature={self.signature(repo, oid, size, part)}"
        )

    def put_object(self, repo, oid, part):
        size = int(self.query.get("size", -1))
        if not hmac.compare_digest(
            self.query.get("signature", "").encode(), self.signature(repo, oid, size, part).encode()
        ):
            raise HubError(403, "The signature of this address is not valid")
        if part == "whole":
            repo.add_blob(self.object_chunks(), oid, size)
        elif part == "complete":
            repo.join_parts(
                oid, size, [(int(part["partNumber"]), part["etag"].strip('"')) for part in self.json()["parts"]]
            )
        else:
            etag = repo.add_part(self.object_chunks(), oid, part)
            self.answer(headers={"ETag": f'"{etag}"'})
            return
        self.answer("OK")

    def lfs_verify(self, repo):
        asked = self.json()
        path = repo.blob(asked["oid"]) if re.fullmatch("[0-9a-f]{64}", asked["oid"]) else None
        if path is None or not path.exists() or path.stat().st_size != asked["size"]:
            raise HubError(404, f"No object {asked['oid']} of {asked['size']} bytes")
        self.answer("OK")


def operation(repo, key, value):
    """A line of a commit as `Repository.commit` takes it; a regular file's bytes are kept now, an LFS object must have come before."""
    path = checked_path(value["path"].rstrip("/") if key == "deletedFolder" else value["path"])
    if key == "file":
        return "add", path, repo.add_regular(base64.b64decode(value["content"], validate=True))
    if key == "lfsFile":
        return "add", path, repo.lfs_entry(value["oid"])
    if key in ("deletedFile", "deletedFolder"):
        return "delete" if key == "deletedFile" else "delete_folder", path, None
    raise HubError(400, f"Unknown operation {key!r} in a commit")


def blob_info(entry):
    lfs = (
        {"lfs": {"sha256": entry["sha256"], "size": entry["size"], "pointerSize": entry["pointer_size"]}}
        if entry["lfs"]
        else {}
    )
    return {"size": entry["size"], "blobId": entry["oid"], **lfs}


def list_tree(files, folder, recursive):
    """The files and folders in `folder` ("" is the root), those further below if `recursive`, by path."""
    prefix, entries = f"{folder}/" if folder else "", {}
    for path, entry in files.items():
        below = path.removeprefix(prefix).split("/") if path.startswith(prefix) else []
        for depth in range(1, len(below) if recursive else min(len(below), 2)):
            name = prefix + "/".join(below[:depth])
            entries[name] = {
                "type": "directory",
                "path": name,
                "size": 0,
                "oid": hashlib.sha1(name.encode()).hexdigest(),
            }
        if below and (recursive or len(below) == 1):
            lfs = (
                {"lfs": {"oid": entry["sha256"], "size": entry["size"], "pointerSize": entry["pointer_size"]}}
                if entry["lfs"]
                else {}
            )
            entries[path] = {"type": "file", "path": path, "size": entry["size"], "oid": entry["oid"], **lfs}
    return [entries[path] for path in sorted(entries)]


def card_of(repo, commit):
    """The metadata of README.md; `{}` without one, or where it is no YAML."""
    entry = commit["files"].get("README.md")
    try:
        return card_metadata(repo.blob(entry["sha256"]).read_text(encoding="utf-8")) or {} if entry else {}
    except (yaml.YAMLError, ValueError):
        return {}


API = r"/api/(?P<kind>model|dataset|space)s/(?P<repo>[^/]+/[^/]+)"
GIT = r"/(?:(?P<kind>dataset|space)s/)?(?P<repo>[^/]+/[^/]+?)"
REV = r"/(?P<revision>[^/]+)"
NAME = r"/(?P<name>[^/]+)"
OBJECTS = r"\.git/info/lfs/objects"
OID = r"/(?P<oid>[0-9a-f]{64})"
H = HubHandler
HubHandler.routes = [  # patterns of the path as it was sent: a revision or a folder may hold a quoted slash
    (("GET",), "/api/whoami-v2", H.whoami, "write"),
    (("POST",), "/api/repos/create", H.create_repo, "write"),
    (("DELETE",), "/api/repos/delete", H.delete_repo, "write"),
    (("POST",), "/api/validate-yaml", H.validate_yaml, "read"),
    (("GET",), API + f"(?:/revision{REV})?", H.info, "read"),
    (("GET",), API + "/refs", H.refs, "read"),
    (("GET",), API + "/commits" + REV, H.commits, "read"),
    (("GET",), API + "/tree" + REV + "(?:/(?P<path>.+))?", H.tree, "read"),
    (("POST",), API + "/paths-info" + REV, H.paths_info, "read"),
    (("POST",), API + "/branch" + NAME, H.create_branch, "write"),
    (("DELETE",), API + "/branch" + NAME, H.delete_branch, "write"),
    (("POST",), API + "/tag" + REV, H.create_tag, "write"),
    (("DELETE",), API + "/tag" + NAME, H.delete_tag, "write"),
    (("POST",), API + "/preupload" + REV, H.preupload, "write"),
    (("POST",), API + "/commit" + REV, H.commit, "write"),
    (("POST",), GIT + OBJECTS + "/batch", H.lfs_batch, "write"),
    (("POST",), GIT + OBJECTS + "/verify", H.lfs_verify, "write"),
    (("PUT",), GIT + OBJECTS + OID + r"/(?P<part>whole|\d+)", H.put_object, "signed"),
    (("POST",), GIT + OBJECTS + OID + "/(?P<part>complete)", H.put_object, "signed"),
    (("GET", "HEAD"), GIT + "/resolve" + REV + "/(?P<path>.+)", H.resolve, "read"),
]
