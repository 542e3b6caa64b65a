"""The test Hub and the genuine huggingface_hub client: what is pushed comes back, and nobody ever sees half of it."""

import base64
import hashlib
import http.client
import json
import os
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from support.hub_server import Hub, hub_server

CLIENT = """
import json, os, sys
from pathlib import Path
import huggingface_hub.errors as errors
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, hf_hub_download, snapshot_download
from huggingface_hub.utils import disable_progress_bars

disable_progress_bars()
api = HfApi()

def attempt(function, *args, **kwargs):
    try:
        function(*args, **kwargs)
    except Exception as error:
        return [type(error).__name__, str(error)]
    return None

def contents(folder):
    files = [path for path in Path(folder).rglob("*") if path.is_file() and ".cache" not in path.parts]
    return {str(path.relative_to(folder)): path.read_bytes().hex() for path in files}
"""


def write(folder, **files):
    """Write files to a folder and return it; `__` in a name is a slash, `_dot_` a dot."""
    for name, data in files.items():
        path = folder / name.replace("__", "/").replace("_dot_", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return folder


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes().hex() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def checkpoint(tmp_path):
    """A folder with regular files, LFS files, an empty file and nested files."""
    return write(
        tmp_path / "checkpoint",
        config_dot_json=b"{}",
        README_dot_md=b"---\nlicense: mit\n---\n# A card",
        empty_dot_txt=b"",
        model_dot_safetensors=os.urandom(300_000),
        tokenizer__a__tokenizer_dot_json=b"[1]" * 1000,
        tokenizer__curve_dot_png=os.urandom(100),
    )


def request(hub, method, path, body=None, token=True, headers=None):
    """Send one raw request, which the client would not send; return status, headers and body of the response."""
    all_headers = {"Authorization": f"Bearer {hub.token}"} if token else {}
    all_headers |= headers or {}
    connection = http.client.HTTPConnection(urlsplit(hub.endpoint).netloc, timeout=30)
    connection.request(method, path, body, all_headers)
    response = connection.getresponse()
    return response.status, dict(response.headers), response.read()


def create_repo(hub, name="one"):
    """Create the repository `me/<name>`; return the status of the response."""
    return request(hub, "POST", "/api/repos/create", json.dumps({"name": name, "organization": "me"}))[0]


def commit(hub, *operations, query="", header=()):
    """Commit raw operations to the main branch of `me/one`; return status and headers of the response."""
    lines = [("header", {"summary": "test", **dict(header)}), *operations]
    body = "\n".join(json.dumps({"key": key, "value": value}) for key, value in lines)
    return request(hub, "POST", f"/api/models/me/one/commit/main{query}", body)[:2]


def as_file(path, data):
    """Return the operation that adds a file to a commit."""
    return "file", {"path": path, "content": base64.b64encode(data).decode(), "encoding": "base64"}


def verify_object(hub, oid, size):
    """Return the status of the request that verifies an LFS object: 200 if the Hub keeps it, otherwise 404."""
    body = json.dumps({"oid": oid, "size": size})
    return request(hub, "POST", "/me/one.git/info/lfs/objects/verify", body)[0]


def test_repositories_are_made_once_and_deleted(hub):
    code = """
results = {"name": api.whoami()["name"], "url": api.create_repo("one").url, "again": attempt(api.create_repo, "one")}
results["exist_ok"] = api.create_repo("one", exist_ok=True).repo_id
results["dataset"] = api.create_repo("group/one", repo_type="dataset").repo_id
results["space"] = api.create_repo("group/one", repo_type="space", space_sdk="gradio").repo_id
results["exists"] = [api.repo_exists("tester/one"), api.repo_exists("group/one")]
results["dataset_exists"] = api.repo_exists("group/one", repo_type="dataset")
api.delete_repo("tester/one")
results["exists_after"] = api.repo_exists("tester/one")
results["deleted_again"] = attempt(api.delete_repo, "tester/one")[0]
results["missing_ok"] = attempt(api.delete_repo, "tester/one", missing_ok=True)
print(json.dumps(results))
"""
    results = hub.run(CLIENT + code)
    assert results["name"] == "tester"
    assert results["url"] == f"{hub.endpoint}/tester/one"
    assert results["exist_ok"] == "tester/one"
    error, message = results["again"]
    assert error == "HfHubHTTPError"
    assert "409" in message
    assert "already created this model repo" in message
    assert results["dataset"] == "group/one"
    assert results["space"] == "group/one"
    assert results["exists"] == [True, False]
    assert results["dataset_exists"] is True
    assert results["exists_after"] is False
    assert results["deleted_again"] == "RepositoryNotFoundError"
    assert results["missing_ok"] is None


@pytest.mark.parametrize("kind", ["model", "dataset", "space"])
def test_files_come_back_as_they_went(hub, checkpoint, kind):
    code = """
kind, folder = sys.argv[1:]
where = {"repo_id": "me/one", "repo_type": kind}
api.create_repo(**where, space_sdk="gradio" if kind == "space" else None)
first = api.upload_folder(**where, folder_path=folder).oid
api.create_tag(**where, tag="v1.0")
api.create_branch(**where, branch="other/branch", revision=first)
api.upload_file(**where, path_or_fileobj=b"other", path_in_repo="config.json", revision="other/branch")
operations = [CommitOperationAdd("config.json", b"second")]
second = api.create_commit(**where, commit_message="second", operations=operations).oid
results = {"ids": [first, second], "main": contents(snapshot_download(**where))}
results["v1.0"] = contents(snapshot_download(**where, revision="v1.0"))
results["first"] = contents(snapshot_download(**where, revision=first))
some = snapshot_download(**where, allow_patterns=["*.png", "config.json"], local_dir="some")
results["some"] = sorted(contents(some))
results["single"] = Path(hf_hub_download(**where, filename="config.json", revision="other/branch")).read_text()
results["commits"] = [[commit.title, commit.commit_id] for commit in api.list_repo_commits(**where)]
info = api.repo_info(**where)
results["info"] = [info.sha, info.private, info.card_data.license, sorted(file.rfilename for file in info.siblings)]
refs = api.list_repo_refs(**where)
results["refs"] = {ref.name: ref.target_commit for ref in refs.branches + refs.tags}
print(json.dumps(results))
"""
    results = hub.run(CLIENT + code, kind, checkpoint)
    first, second = results["ids"]
    expected = contents(checkpoint)
    for revision, config in (("first", b"{}"), ("v1.0", b"{}"), ("main", b"second")):
        downloaded = results[revision]
        assert downloaded.pop(".gitattributes")
        assert downloaded == {**expected, "config.json": config.hex()}, revision
    assert results["some"] == ["config.json", "tokenizer/curve.png"]
    assert results["single"] == "other"
    assert results["commits"][:2] == [["second", second], ["Upload folder using huggingface_hub", first]]
    assert len(results["commits"]) == 3
    assert results["info"] == [second, False, "mit", sorted([*expected, ".gitattributes"])]
    assert results["refs"]["main"] == second
    assert results["refs"]["v1.0"] == first
    assert results["refs"]["other/branch"] not in (first, second)
    # small texts are uploaded within the commit, not as objects
    uploaded = {request["path"].split("/")[-2] for request in hub.requests("PUT")}
    large_files = [checkpoint / "model.safetensors", checkpoint / "tokenizer" / "curve.png"]
    assert uploaded == {hashlib.sha256(path.read_bytes()).hexdigest() for path in large_files}


def test_what_is_there_is_not_sent_again(hub, checkpoint):
    code = """
api.create_repo("me/one", exist_ok=True)
ids = [api.upload_folder(repo_id="me/one", folder_path=sys.argv[1], path_in_repo=path).oid for path in sys.argv[2:]]
print(json.dumps(ids))
"""
    (first,) = hub.run(CLIENT + code, checkpoint, ".")
    assert len(hub.requests("PUT")) == 2
    (again,) = hub.run(CLIENT + code, checkpoint, ".")
    assert again == first  # no commit without a change
    assert len(hub.requests("PUT")) == 2
    hub.run(CLIENT + code, checkpoint, "elsewhere")  # the same objects under other names
    assert len(hub.requests("PUT")) == 2
    (checkpoint / "model.safetensors").write_bytes(b"changed")
    hub.run(CLIENT + code, checkpoint, ".")
    assert [request["received"] for request in hub.requests("PUT")[2:]] == [len(b"changed")]


def test_a_commit_deletes_files_and_folders(hub, checkpoint):
    code = """
api.create_repo("me/one")
first = api.upload_folder(repo_id="me/one", folder_path=sys.argv[1]).oid
operations = [CommitOperationDelete("model.safetensors"), CommitOperationDelete("tokenizer/")]
operations.append(CommitOperationAdd("new.txt", b"new"))
api.create_commit("me/one", operations, commit_message="delete")
missing = attempt(api.create_commit, "me/one", [CommitOperationDelete("none.txt")], commit_message="delete")
print(json.dumps([api.list_repo_files("me/one"), api.list_repo_files("me/one", revision=first), missing]))
"""
    now, before, missing = hub.run(CLIENT + code, checkpoint)
    assert sorted(now) == [".gitattributes", "README.md", "config.json", "empty.txt", "new.txt"]
    assert sorted(before) == sorted([*contents(checkpoint), ".gitattributes"])
    error, message = missing
    assert error == "RemoteEntryNotFoundError"
    assert "none.txt" in message


def test_a_commit_is_made_completely_or_not_at_all(hub):
    """If one operation of a commit is impossible, none is carried out, and nobody sees a part of it."""
    assert create_repo(hub) == 200
    head = json.loads(request(hub, "GET", "/api/models/me/one")[2])["sha"]
    good = as_file("good.txt", b"good")
    for bad, expected in (
        (("lfsFile", {"path": "a.safetensors", "algo": "sha256", "oid": "0" * 64, "size": 1}), 400),  # never uploaded
        (("deletedFile", {"path": "none.txt"}), 404),
        (as_file("../x", b""), 400),
        (("file", {"path": "x", "content": "no base64!", "encoding": "base64"}), 400),
        (("header", {"parentCommit": "0" * 40}), 400),
    ):
        status, _ = commit(hub, good, bad)
        assert status == expected, bad
    status, headers = commit(hub, good, header={"parentCommit": "0" * 40})
    assert status == 412
    assert "A commit has happened since" in headers["X-Error-Message"]
    status, headers = commit(hub, good, query="?create_pr=1")
    assert status == 403
    assert "no pull requests" in headers["X-Error-Message"]
    info = json.loads(request(hub, "GET", "/api/models/me/one")[2])
    assert info["sha"] == head
    assert [file["rfilename"] for file in info["siblings"]] == [".gitattributes"]


def test_commits_at_the_same_time_all_count(hub):
    code = """
from concurrent.futures import ThreadPoolExecutor
api.create_repo("me/one")
def upload(i):
    api.upload_file(repo_id="me/one", path_or_fileobj=str(i).encode(), path_in_repo=f"{i}.txt")
with ThreadPoolExecutor(8) as threads:
    list(threads.map(upload, range(16)))
print(json.dumps([contents(snapshot_download("me/one")), len(api.list_repo_commits("me/one"))]))
"""
    files, num_commits = hub.run(CLIENT + code)
    del files[".gitattributes"]
    assert files == {f"{i}.txt": str(i).encode().hex() for i in range(16)}
    assert num_commits == 17  # the first commit creates the repository


def test_large_objects_come_in_parts(tmp_path):
    data = os.urandom(250_001)
    folder = write(tmp_path / "checkpoint", model_dot_safetensors=data)
    code = """
api.create_repo("me/one")
api.upload_folder(repo_id="me/one", folder_path=sys.argv[1])
print(json.dumps(contents(snapshot_download("me/one", allow_patterns="*.safetensors"))))
"""
    with hub_server(tmp_path / "hub", multipart_above=100_000) as hub:
        assert hub.run(CLIENT + code, folder) == {"model.safetensors": data.hex()}
        assert [request["received"] for request in hub.requests("PUT")] == [100_000, 100_000, 50_001]


def test_an_object_that_is_not_the_announced_one_is_refused(hub):
    """Wrong bytes, too few bytes, an address that was signed for another object, and no signature are refused."""
    data = b"the object"
    oid, wrong_oid = hashlib.sha256(data).hexdigest(), "0" * 64
    create_repo(hub)
    objects = [{"oid": oid, "size": len(data)}, {"oid": wrong_oid, "size": len(data)}]
    body = json.dumps({"operation": "upload", "objects": objects})
    batch = json.loads(request(hub, "POST", "/me/one.git/info/lfs/objects/batch", body)[2])
    href, href_of_wrong = [
        answer["actions"]["upload"]["href"].removeprefix(hub.endpoint) for answer in batch["objects"]
    ]
    assert request(hub, "PUT", href_of_wrong, data, token=False)[0] == 400
    assert request(hub, "PUT", href, data[:-1], token=False)[0] == 400
    assert request(hub, "PUT", href.replace(oid, wrong_oid), data, token=False)[0] == 403
    assert request(hub, "PUT", href.split("?")[0], data)[0] == 403
    assert verify_object(hub, oid, len(data)) == 404  # none of them is kept
    assert request(hub, "PUT", href, data, token=False)[0] == 200
    assert verify_object(hub, oid, len(data)) == 200


PUSH = """
api.create_repo("me/one", exist_ok=True)
print(json.dumps(api.upload_folder(repo_id="me/one", folder_path=sys.argv[1]).oid))
"""
LOOK = """
files, commits = contents(snapshot_download("me/one")), api.list_repo_commits("me/one")
print(json.dumps({"files": files, "commits": len(commits)}))
"""


@pytest.mark.parametrize("multipart_above", [None, 100_000])
def test_a_server_killed_in_mid_upload(tmp_path, checkpoint, multipart_above):
    """Nobody sees a part of a broken push. After it is repeated, everything is there."""
    first, second = os.urandom(50_000), os.urandom(400_000)
    write(checkpoint, model_dot_safetensors=first)
    with hub_server(tmp_path / "hub", multipart_above=multipart_above) as hub:
        hub.run(CLIENT + PUSH, checkpoint)
        before = hub.run(CLIENT + LOOK)
        hub.kill()
        write(checkpoint, config_dot_json=b"changed", model_dot_safetensors=second)
        hub.start(stall_after_bytes=250_000)
        client = hub.popen(CLIENT + PUSH, checkpoint)
        hub.wait_for_stall()
        hub.kill()
        client.kill()
        client.communicate()
        assert any(path.stat().st_size for path in (tmp_path / "hub").rglob("uploads/*"))  # it was in mid-upload
        hub.start(stall_after_bytes=None)
        assert hub.run(CLIENT + LOOK) == before  # the old bytes in the old commit
        assert verify_object(hub, hashlib.sha256(second).hexdigest(), len(second)) == 404
        hub.run(CLIENT + PUSH, checkpoint)
        after = hub.run(CLIENT + LOOK)
    assert after["files"].pop(".gitattributes")
    assert after["files"] == contents(checkpoint)
    assert after["commits"] == before["commits"] + 1


def test_a_client_that_outlives_the_server(tmp_path, checkpoint):
    """The client tries a broken upload again by itself: with the server back on its port, the push completes."""
    with hub_server(tmp_path / "hub", stall_after_bytes=100_000) as hub:
        client = hub.popen(CLIENT + PUSH, checkpoint)
        hub.wait_for_stall()
        hub.kill()
        hub.start(stall_after_bytes=None)
        _, err = client.communicate(timeout=600)
        assert client.returncode == 0, err
        files = hub.run(CLIENT + LOOK)["files"]
    assert files.pop(".gitattributes")
    assert files == contents(checkpoint)


def test_only_the_right_token_writes(hub):
    """As on the Hub, a wrong token reads nothing either, but without a token public repositories can be read."""
    hub.run(CLIENT + 'api.create_repo("me/one"); print(0)')
    code = """
operations = [CommitOperationAdd("a.txt", b"a")]
writes = [
    attempt(api.create_repo, "me/two"),
    attempt(api.create_repo, "me/two", exist_ok=True),
    attempt(api.delete_repo, "me/one"),
    attempt(api.create_commit, "me/one", operations, commit_message="m"),
    attempt(api.create_tag, "me/one", tag="t"),
    attempt(api.upload_file, repo_id="me/one", path_or_fileobj=b"a", path_in_repo="a.safetensors"),
]
print(json.dumps([writes, attempt(snapshot_download, "me/one"), attempt(api.whoami)]))
"""
    for token, message in (
        ("hf_wrong", "Invalid credentials in Authorization header"),
        (None, "Invalid username or password."),
    ):
        writes, read, whoami = hub.run(CLIENT + code, token=token)
        for error in writes:
            assert error is not None
            assert "401" in error[1]
            assert message in error[1]
        can_read = read is None
        assert can_read is (token is None)
        assert whoami is not None
    after = hub.run(CLIENT + 'print(json.dumps([api.list_repo_files("me/one"), api.repo_exists("me/two")]))')
    assert after == [[".gitattributes"], False]


def test_a_private_repository_is_read_with_the_token(hub):
    make = """
api.create_repo("me/hidden", private=True)
api.upload_file(repo_id="me/hidden", path_or_fileobj=b"hidden", path_in_repo="a.txt")
print(json.dumps(api.model_info("me/hidden").private))
"""
    read = """
errors = [attempt(hf_hub_download, "me/hidden", "a.txt"), attempt(api.model_info, "me/hidden")]
errors.append(attempt(snapshot_download, "me/hidden"))
print(json.dumps(errors))
"""
    assert hub.run(CLIENT + make) is True
    assert hub.run(CLIENT + read) == [None] * 3
    assert [error[0] for error in hub.run(CLIENT + read, token=None)] == ["RepositoryNotFoundError"] * 3
    path = "/me/hidden/resolve/main/a.txt"
    assert request(hub, "GET", path)[::2] == (200, b"hidden")
    assert request(hub, "GET", path, token=False)[0] == 401


def test_what_is_missing_is_named(hub):
    code = """
api.create_repo("me/one")
errors = {
    "file": attempt(hf_hub_download, "me/one", "none.txt"),
    "revision": attempt(hf_hub_download, "me/one", ".gitattributes", revision="none"),
    "repository": attempt(hf_hub_download, "me/none", "none.txt"),
    "commit": attempt(snapshot_download, "me/one", revision="0" * 40),
    "folder": attempt(lambda: list(api.list_repo_tree("me/one", "none"))),
    "revision of a tag": attempt(api.create_tag, "me/one", tag="t", revision="none"),
}
exists = [api.file_exists("me/one", "none.txt"), api.file_exists("me/one", ".gitattributes")]
exists.append(api.revision_exists("me/one", "none"))
print(json.dumps([{name: error[0] for name, error in errors.items()}, exists]))
"""
    errors, exists = hub.run(CLIENT + code)
    assert errors == {
        "file": "RemoteEntryNotFoundError",
        "revision": "RevisionNotFoundError",
        "repository": "RepositoryNotFoundError",
        "commit": "RevisionNotFoundError",
        "folder": "RemoteEntryNotFoundError",
        "revision of a tag": "RevisionNotFoundError",
    }
    assert exists == [False, True, False]


def test_branches_and_tags(hub):
    code = """
api.create_repo("me/one")
api.create_branch("me/one", branch="b.1/x")
api.create_tag("me/one", tag="v1")
results = {
    "branch again": attempt(api.create_branch, "me/one", branch="b.1/x"),
    "branch, exist_ok": attempt(api.create_branch, "me/one", branch="b.1/x", exist_ok=True),
    "tag again": attempt(api.create_tag, "me/one", tag="v1"),
    "tag, exist_ok": attempt(api.create_tag, "me/one", tag="v1", exist_ok=True),
}
results["before"] = [api.revision_exists("me/one", name) for name in ("b.1/x", "v1", "main")]
to_a_tag = attempt(api.upload_file, repo_id="me/one", path_or_fileobj=b"a", path_in_repo="a", revision="v1")
results["commit to a tag"] = to_a_tag[0]
api.delete_branch("me/one", branch="b.1/x")
api.delete_tag("me/one", tag="v1")
results["after"] = [api.revision_exists("me/one", name) for name in ("b.1/x", "v1", "main")]
results["delete main"] = attempt(api.delete_branch, "me/one", branch="main")[0]
print(json.dumps(results))
"""
    results = hub.run(CLIENT + code)
    assert results["branch again"] is not None
    assert results["branch, exist_ok"] is None
    assert results["tag again"] is not None
    assert results["tag, exist_ok"] is None
    assert results["before"] == [True, True, True]
    assert results["commit to a tag"] == "RevisionNotFoundError"
    assert results["after"] == [False, False, True]
    assert results["delete main"] == "HfHubHTTPError"


def test_trees_in_pages(tmp_path):
    nested = {f"a__b{i}__c_dot_txt": b"x" * i for i in range(5)}
    folder = write(tmp_path / "checkpoint", **nested, ab_dot_txt=b"", top_dot_safetensors=b"top")
    code = """
api.create_repo("me/one")
api.upload_folder(repo_id="me/one", folder_path=sys.argv[1])
def tree(**kwargs):
    return [[entry.path, getattr(entry, "size", None)] for entry in api.list_repo_tree("me/one", **kwargs)]
some = api.get_paths_info("me/one", ["top.safetensors", "ab.txt", "none"])
results = {"top": tree(), "all": tree(recursive=True), "a": tree(path_in_repo="a")}
results["below"] = tree(path_in_repo="a/b1", recursive=True)
results["some"] = [[entry.path, entry.lfs.sha256 if entry.lfs else None] for entry in some]
results["snapshot"] = len(contents(snapshot_download("me/one")))
print(json.dumps(results))
"""
    with hub_server(tmp_path / "hub", page_size=2) as hub:
        results = hub.run(CLIENT + code, folder)
        pages = [request for request in hub.requests("GET") if request["path"] == "/api/models/me/one/tree/main"]
    assert [path for path, _ in results["top"]] == [".gitattributes", "a", "ab.txt", "top.safetensors"]
    files_in_a = [entry for entry in results["all"] if entry[0].startswith("a/") and entry[1] is not None]
    assert files_in_a == [[f"a/b{i}/c.txt", i] for i in range(5)]
    assert results["a"] == [[f"a/b{i}", None] for i in range(5)]
    assert results["below"] == [["a/b1/c.txt", 1]]
    assert results["some"] == [["ab.txt", None], ["top.safetensors", hashlib.sha256(b"top").hexdigest()]]
    assert results["snapshot"] == 8
    assert len(pages) >= 2 + 7  # of the top folder, and of the whole tree


def test_ranges_of_a_file(hub):
    create_repo(hub)
    assert commit(hub, as_file("a.txt", b"0123456789"))[0] == 200
    for request_headers, expected in (
        ({}, (200, b"0123456789", None)),
        ({"Range": "bytes=4-"}, (206, b"456789", "bytes 4-9/10")),
        ({"Range": "bytes=4-5"}, (206, b"45", "bytes 4-5/10")),
        ({"Range": "bytes=4-99"}, (206, b"456789", "bytes 4-9/10")),
        ({"Range": "bytes=10-"}, (416, b"", "bytes */10")),
    ):
        status, headers, data = request(hub, "GET", "/me/one/resolve/main/a.txt", headers=request_headers)
        assert (status, data, headers.get("Content-Range")) == expected, request_headers


def test_paths_that_lead_elsewhere_are_refused(hub, tmp_path):
    create_repo(hub)
    (tmp_path / "outside.txt").write_text("outside")
    before = sorted(path.name for path in tmp_path.iterdir())
    for path in ("../x", "a/../../x", "/x", "a//x", "./x", ".git/config", "a\\..\\x", "", "a/"):
        assert commit(hub, as_file(path, b"x"))[0] == 400, path
        body = json.dumps({"files": [{"path": path, "size": 1, "sample": ""}]})
        assert request(hub, "POST", "/api/models/me/one/preupload/main", body)[0] == 400, path
    for path in (
        "../../../../outside.txt",
        "..%2f..%2f..%2f..%2foutside.txt",
        "%2e%2e/%2e%2e/secret",
        "..%2f..%2frepo.json",
    ):
        assert request(hub, "GET", f"/me/one/resolve/main/{path}")[0] == 400, path
        assert request(hub, "GET", f"/api/models/me/one/tree/main/{path}")[0] == 400, path
    for revision in ("..%2f..%2frepo", "%2e%2e", "..%2frepo.json"):
        assert request(hub, "GET", f"/me/one/resolve/{revision}/a")[0] == 404, revision
    for name in ("../x", "..", ".", "a/b", "a..b", "", "x" * 200):
        assert create_repo(hub, name) == 400, name
        body = json.dumps({"name": name, "organization": "me"})
        assert request(hub, "DELETE", "/api/repos/delete", body)[0] == 400, name
    assert request(hub, "GET", "/api/models/..%2f..%2fx/one")[0] == 400
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_the_token_is_written_nowhere(hub, checkpoint):
    hub.run(CLIENT + PUSH, checkpoint)
    hub.run(CLIENT + "print(json.dumps(attempt(api.create_repo, 'me/two')))", token="hf_another")
    files = [path for path in hub.root.rglob("*") if path.is_file()]
    for path in files:
        data = path.read_bytes()
        for secret in (hub.token.encode(), b"hf_another", b"signature="):
            assert secret not in data, path


GOOD = {
    "model": """
license: apache-2.0
library_name: transformers
base_model: [meta-llama/Llama-2-7b-hf, gpt2]
base_model_relation: finetune
datasets: [kilt_tasks]
pipeline_tag: text-generation
language: en
tags: [cosup, custom_code]
model-index:
- name: one
  results:
  - task: {type: text-generation, name: Generation}
    dataset: {type: nq, name: Natural Questions, split: test}
    metrics:
    - {type: exact_match, value: 0.25, name: Cor}
""",
    "dataset": """
license: [cc-by-sa-4.0, mit]
pretty_name: Passages
language: [en, multilingual]
task_categories: [text-retrieval]
size_categories: 1K<n<10K
configs:
- config_name: default
  data_files:
  - {split: train, path: [a.arrow, b.arrow]}
""",
}
# The kind of card, a text in the good card, what replaces it, and where the error is
BAD = [
    ("model", "pipeline_tag: text-generation", "pipeline_tag: writing-text", "pipeline_tag"),
    ("model", "license: apache-2.0", "license: 2.0", "license"),
    ("model", "license: apache-2.0", "license: Apache 2", "license"),
    ("model", "base_model: [meta-llama/Llama-2-7b-hf, gpt2]", "base_model: /home/me/checkpoint", "base_model"),
    ("model", "base_model_relation: finetune", "base_model_relation: child", "base_model_relation"),
    ("model", "language: en", "language: no", "language"),  # YAML's false
    ("model", "language: en", "language: English", "language"),
    ("model", "tags: [cosup, custom_code]", "tags: cosup", "tags"),
    ("model", "    metrics:\n    - {type: exact_match, value: 0.25, name: Cor}\n", "", "model-index"),
    ("model", "    metrics:\n    - {type: exact_match, value: 0.25, name: Cor}\n", "    metrics: []\n", "model-index"),
    ("model", "value: 0.25", "value:", "model-index"),
    ("model", "{type: exact_match, value: 0.25, name: Cor}", "{value: 0.25}", "model-index"),
    ("model", "{type: nq, name: Natural Questions, split: test}", "{type: nq}", "model-index"),
    ("model", "license: apache-2.0", "license: 'apache", "invalid YAML"),
    ("dataset", "size_categories: 1K<n<10K", "size_categories: 5000", "size_categories"),
    ("dataset", "[text-retrieval]", "[retrieval]", "task_categories"),
    ("dataset", "[cc-by-sa-4.0, mit]", "[cc-by-sa-4.0, none]", "license"),
    ("dataset", "config_name: default", "name: default", "configs"),
    ("dataset", "path: [a.arrow, b.arrow]", "paths: a.arrow", "configs"),
]


def test_cards_are_validated(hub):
    """Both `push_to_hub` of a card and `create_commit` of a README.md ask the endpoint that validates cards."""
    cards = [(kind, f"---{text}---\n# A card") for kind, text in GOOD.items()]
    for kind, old, new, _ in BAD:
        assert GOOD[kind].count(old) == 1
        cards.append((kind, f"---{GOOD[kind].replace(old, new)}---\n# A card"))
    code = """
import inspect, warnings
from huggingface_hub import RepoCard
validates_here = "ENDPOINT" in inspect.getsource(RepoCard.validate)  # old clients always ask huggingface.co
results = []
for kind, content in json.loads(Path(sys.argv[1]).read_text()):
    api.create_repo("me/one", repo_type=kind, exist_ok=True)
    card = {"path_or_fileobj": content.encode(), "path_in_repo": "README.md"}
    pushed = validated = attempt(api.upload_file, repo_id="me/one", repo_type=kind, **card)
    class Card(RepoCard):
        repo_type = kind
        __str__ = lambda self: content  # unparsed, because the client could not parse some of the cards
    if validates_here:
        validated = attempt(Card.validate, object.__new__(Card))
    results.append([validated, pushed])
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    api.upload_file(repo_id="me/one", path_or_fileobj=b"# No metadata", path_in_repo="README.md")
print(json.dumps([results, [str(warning.message) for warning in caught]]))
"""
    (hub.root.parent / "cards.json").write_text(json.dumps(cards))
    results, messages = hub.run(CLIENT + code, hub.root.parent / "cards.json")
    assert results[: len(GOOD)] == [[None, None]] * len(GOOD)
    for (_, _, new, where), errors in zip(BAD, results[len(GOOD) :], strict=True):
        for error in errors:
            assert error is not None, new
            assert error[0] == "ValueError", (new, error)
            assert where in error[1], (new, error)
    assert len(messages) == 1
    assert "empty or missing yaml metadata" in messages[0]


def test_code_runs_with_this_checkout_or_without_it(hub):
    code = """
import importlib, json, os, sys
def file_of(name):
    try:
        return importlib.import_module(name).__file__
    except ModuleNotFoundError:
        return None
print(json.dumps([os.listdir(), file_of("modeling_cosup"), file_of("trainer"), file_of("support")]))
"""
    root = Path(__file__).parents[2]
    folders = (root / "modeling_cosup", root / "trainer", root / "tests" / "support")
    assert hub.run(code) == [[], *(f"{folder}/__init__.py" for folder in folders)]
    assert hub.run(code, package=False) == [[], None, None, None]


def test_a_hub_that_cannot_start_says_so(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RuntimeError, match="did not start"):
        Hub(tmp_path / "file").start()
