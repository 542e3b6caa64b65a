"""The test Hub against the genuine huggingface_hub client: what is pushed comes back, and nothing half done is ever seen."""

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
    return {str(p.relative_to(folder)): p.read_bytes().hex() for p in Path(folder).rglob("*") if p.is_file() and ".cache" not in p.parts}
"""


def write(folder, **files):
    """A folder of files; `__` in a name is a slash."""
    for name, data in files.items():
        path = folder / name.replace("__", "/").replace("_dot_", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return folder


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes().hex() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def checkpoint(tmp_path):
    """Regular files, LFS files, an empty one, nested ones."""
    files = {
        "config_dot_json": b"{}",
        "README_dot_md": b"---\nlicense: mit\n---\n# A card",
        "empty_dot_txt": b"",
        "model_dot_safetensors": os.urandom(300_000),
    }
    return write(
        tmp_path / "checkpoint",
        **files,
        tokenizer__a__tokenizer_dot_json=b"[1]" * 1000,
        tokenizer__curve_dot_png=os.urandom(100),
    )


def request(hub, method, path, body=None, token=True, headers=None):
    """One request as it stands, which the client would not send. Status, headers and body."""
    connection = http.client.HTTPConnection(urlsplit(hub.endpoint).netloc, timeout=30)
    connection.request(
        method, path, body, {**({"Authorization": f"Bearer {hub.token}"} if token else {}), **(headers or {})}
    )
    response = connection.getresponse()
    return response.status, dict(response.headers), response.read()


def commit_lines(*operations):
    return "\n".join(
        json.dumps({"key": key, "value": value}) for key, value in [("header", {"summary": "test"}), *operations]
    )


def as_file(path, data):
    return "file", {"path": path, "content": base64.b64encode(data).decode(), "encoding": "base64"}


def test_repositories_are_made_once_and_deleted(hub):
    code = """
found = {"name": api.whoami()["name"], "url": api.create_repo("one").url, "again": attempt(api.create_repo, "one")}
found["exist_ok"] = api.create_repo("one", exist_ok=True).repo_id
for kind in ("dataset", "space"):
    found[kind] = api.create_repo("group/one", repo_type=kind, space_sdk="gradio" if kind == "space" else None).repo_id
found["exists"] = [api.repo_exists("tester/one"), api.repo_exists("group/one"), api.repo_exists("group/one", repo_type="dataset")]
api.delete_repo("tester/one")
found["deleted"] = [api.repo_exists("tester/one"), attempt(api.delete_repo, "tester/one")[0], attempt(api.delete_repo, "tester/one", missing_ok=True)]
print(json.dumps(found))
"""
    found = hub.run(CLIENT + code)
    assert (
        found["name"] == "tester"
        and found["url"] == f"{hub.endpoint}/tester/one"
        and found["exist_ok"] == "tester/one"
    )
    assert (
        found["again"][0] == "HfHubHTTPError"
        and "409" in found["again"][1]
        and "already created this model repo" in found["again"][1]
    )
    assert (found["dataset"], found["space"], found["exists"]) == ("group/one", "group/one", [True, False, True])
    assert found["deleted"] == [False, "RepositoryNotFoundError", None]


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
second = api.create_commit(**where, commit_message="second", operations=[CommitOperationAdd("config.json", b"second")]).oid
found = {"main": contents(snapshot_download(**where)), "v1.0": contents(snapshot_download(**where, revision="v1.0"))}
found["first"] = contents(snapshot_download(**where, revision=first))
found["some"] = sorted(contents(snapshot_download(**where, allow_patterns=["*.png", "config.json"], local_dir="some")))
found["single"] = Path(hf_hub_download(**where, filename="config.json", revision="other/branch")).read_text()
found["commits"] = [[commit.title, commit.commit_id] for commit in api.list_repo_commits(**where)]
info = api.repo_info(**where)
found["info"] = [info.sha, info.private, info.card_data.license, sorted(file.rfilename for file in info.siblings)]
refs = api.list_repo_refs(**where)
found["refs"] = [[ref.name, ref.target_commit] for ref in refs.branches + refs.tags]
print(json.dumps({**found, "ids": [first, second]}))
"""
    found = hub.run(CLIENT + code, kind, checkpoint)
    first, second = found["ids"]
    expected = contents(checkpoint)
    for revision, config in (("first", b"{}"), ("v1.0", b"{}"), ("main", b"second")):
        downloaded = found[revision]
        assert downloaded.pop(".gitattributes")
        assert downloaded == {**expected, "config.json": config.hex()}, revision
    assert found["some"] == ["config.json", "tokenizer/curve.png"] and found["single"] == "other"
    assert (
        found["commits"][:2] == [["second", second], ["Upload folder using huggingface_hub", first]]
        and len(found["commits"]) == 3
    )
    assert found["info"] == [second, False, "mit", sorted([*expected, ".gitattributes"])]
    assert (
        dict(found["refs"])["main"] == second
        and dict(found["refs"])["v1.0"] == first
        and dict(found["refs"])["other/branch"] not in (first, second)
    )
    uploaded = {request["path"].split("/")[-2] for request in hub.requests("PUT")}  # small text goes with the commit
    assert uploaded == {
        hashlib.sha256((checkpoint / name).read_bytes()).hexdigest()
        for name in ("model.safetensors", "tokenizer/curve.png")
    }


def test_what_is_there_is_not_sent_again(hub, checkpoint):
    code = """
api.create_repo("me/one", exist_ok=True)
ids = [api.upload_folder(repo_id="me/one", folder_path=sys.argv[1], path_in_repo=path).oid for path in sys.argv[2:]]
print(json.dumps(ids))
"""
    (first,) = hub.run(CLIENT + code, checkpoint, ".")
    sent = len(hub.requests("PUT"))
    (again,) = hub.run(CLIENT + code, checkpoint, ".")
    assert sent == 2 and len(hub.requests("PUT")) == sent and again == first  # no commit without a change
    hub.run(CLIENT + code, checkpoint, "elsewhere")  # the same objects under other names
    assert len(hub.requests("PUT")) == sent
    (checkpoint / "model.safetensors").write_bytes(b"changed")
    hub.run(CLIENT + code, checkpoint, ".")
    assert [request["received"] for request in hub.requests("PUT")[sent:]] == [7]


def test_a_commit_deletes_files_and_folders(hub, checkpoint):
    code = """
api.create_repo("me/one")
first = api.upload_folder(repo_id="me/one", folder_path=sys.argv[1]).oid
delete = [CommitOperationDelete("model.safetensors"), CommitOperationDelete("tokenizer/"), CommitOperationAdd("new.txt", b"new")]
api.create_commit("me/one", delete, commit_message="delete")
missing = attempt(api.create_commit, "me/one", [CommitOperationDelete("none.txt")], commit_message="delete")
print(json.dumps([api.list_repo_files("me/one"), api.list_repo_files("me/one", revision=first), missing]))
"""
    now, before, missing = hub.run(CLIENT + code, checkpoint)
    assert sorted(now) == [".gitattributes", "README.md", "config.json", "empty.txt", "new.txt"]
    assert sorted(before) == sorted([*contents(checkpoint), ".gitattributes"])
    assert missing[0] == "RemoteEntryNotFoundError" and "none.txt" in missing[1]


def test_a_commit_is_whole_or_not_at_all(hub):
    """One line of a commit that cannot be done: none is, and nobody sees a part."""
    assert request(hub, "POST", "/api/repos/create", '{"name": "one", "organization": "me"}')[0] == 200
    head = json.loads(request(hub, "GET", "/api/models/me/one")[2])["sha"]
    good = as_file("good.txt", b"good")
    for bad, status in (
        (("lfsFile", {"path": "a.safetensors", "algo": "sha256", "oid": "0" * 64, "size": 1}), 400),  # never uploaded
        (("deletedFile", {"path": "none.txt"}), 404),
        (as_file("../x", b""), 400),
        (("file", {"path": "x", "content": "no base64!", "encoding": "base64"}), 400),
        (("header", {"parentCommit": "0" * 40}), 400),
    ):
        assert request(hub, "POST", "/api/models/me/one/commit/main", commit_lines(good, bad))[0] == status, bad
    stale = commit_lines(good).replace('"summary": "test"', f'"summary": "test", "parentCommit": "{"0" * 40}"')
    status, headers, _ = request(hub, "POST", "/api/models/me/one/commit/main", stale)
    assert status == 412 and "A commit has happened since" in headers["X-Error-Message"]
    status, headers, _ = request(hub, "POST", "/api/models/me/one/commit/main?create_pr=1", commit_lines(good))
    assert status == 403 and "no pull requests" in headers["X-Error-Message"]
    info = json.loads(request(hub, "GET", "/api/models/me/one")[2])
    assert info["sha"] == head and [file["rfilename"] for file in info["siblings"]] == [".gitattributes"]


def test_commits_at_the_same_time_all_count(hub):
    code = """
from concurrent.futures import ThreadPoolExecutor
api.create_repo("me/one")
with ThreadPoolExecutor(8) as threads:
    list(threads.map(lambda i: api.upload_file(repo_id="me/one", path_or_fileobj=str(i).encode(), path_in_repo=f"{i}.txt"), range(16)))
print(json.dumps([contents(snapshot_download("me/one")), len(api.list_repo_commits("me/one"))]))
"""
    found, commits = hub.run(CLIENT + code)
    del found[".gitattributes"]
    assert found == {f"{i}.txt": str(i).encode().hex() for i in range(16)} and commits == 17


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
    """Wrong bytes, too few, an address signed for another object, no signature."""
    data = b"the object"
    oid, wrong = hashlib.sha256(data).hexdigest(), "0" * 64
    request(hub, "POST", "/api/repos/create", '{"name": "one", "organization": "me"}')
    objects = [{"oid": oid, "size": len(data)}, {"oid": wrong, "size": len(data)}]
    batch = json.loads(
        request(
            hub, "POST", "/me/one.git/info/lfs/objects/batch", json.dumps({"operation": "upload", "objects": objects})
        )[2]
    )
    hrefs = [thing["actions"]["upload"]["href"].removeprefix(hub.endpoint) for thing in batch["objects"]]
    assert request(hub, "PUT", hrefs[1], data, token=False)[0] == 400
    assert request(hub, "PUT", hrefs[0], data[:-1], token=False)[0] == 400
    assert request(hub, "PUT", hrefs[0].replace(oid, wrong), data, token=False)[0] == 403
    assert request(hub, "PUT", hrefs[0].split("?")[0], data)[0] == 403
    verify = json.dumps({"oid": oid, "size": len(data)})
    assert request(hub, "POST", "/me/one.git/info/lfs/objects/verify", verify)[0] == 404  # none of them is kept
    assert request(hub, "PUT", hrefs[0], data, token=False)[0] == 200
    assert request(hub, "POST", "/me/one.git/info/lfs/objects/verify", verify)[0] == 200


PUSH = """
api.create_repo("me/one", exist_ok=True)
print(json.dumps(api.upload_folder(repo_id="me/one", folder_path=sys.argv[1]).oid))
"""
LOOK = """
found = {"files": contents(snapshot_download("me/one")), "commits": len(api.list_repo_commits("me/one"))}
print(json.dumps(found))
"""


@pytest.mark.parametrize("multipart_above", [None, 100_000])
def test_a_server_killed_in_mid_upload(tmp_path, checkpoint, multipart_above):
    """Pushed again, everything is there and right; before, nothing is seen of it. The object that had come whole is not sent again."""
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
        partial = [path for path in (tmp_path / "hub").rglob("uploads/*") if path.stat().st_size]
        assert partial  # it was in the middle
        hub.start(stall_after_bytes=None)
        assert hub.run(CLIENT + LOOK) == before  # the old bytes under the old commit
        oid = hashlib.sha256(second).hexdigest()
        assert (
            request(hub, "POST", "/me/one.git/info/lfs/objects/verify", json.dumps({"oid": oid, "size": len(second)}))[
                0
            ]
            == 404
        )
        hub.run(CLIENT + PUSH, checkpoint)
        after = hub.run(CLIENT + LOOK)
    assert after["files"].pop(".gitattributes") and after["files"] == contents(checkpoint)
    assert after["commits"] == before["commits"] + 1


def test_a_client_that_outlives_the_server(tmp_path, checkpoint):
    """The client tries a broken upload again by itself: with the server back on its port, the push completes."""
    with hub_server(tmp_path / "hub", stall_after_bytes=100_000) as hub:
        client = hub.popen(CLIENT + PUSH, checkpoint)
        hub.wait_for_stall()
        hub.kill()
        hub.start(stall_after_bytes=None)
        _, err = client.communicate(timeout=120)
        assert client.returncode == 0, err
        found = hub.run(CLIENT + LOOK)
    assert found["files"].pop(".gitattributes") and found["files"] == contents(checkpoint)


def test_only_the_right_token_writes(hub):
    """And a token that is wrong reads nothing either, as on the Hub; without one, what is public can be read."""
    hub.run(CLIENT + 'api.create_repo("me/one"); print(0)')
    code = """
add = [CommitOperationAdd("a.txt", b"a")]
writes = [attempt(api.create_repo, "me/two"), attempt(api.create_repo, "me/two", exist_ok=True), attempt(api.delete_repo, "me/one")]
writes += [attempt(api.create_commit, "me/one", add, commit_message="m"), attempt(api.create_tag, "me/one", tag="t")]
writes += [attempt(api.upload_file, repo_id="me/one", path_or_fileobj=b"a", path_in_repo="a.safetensors")]
print(json.dumps({"writes": writes, "read": attempt(snapshot_download, "me/one"), "whoami": attempt(api.whoami)}))
"""
    for token in ("hf_wrong", None):
        found = hub.run(CLIENT + code, token=token)
        assert all(error is not None and "401" in error[1] for error in found["writes"]), found["writes"]
        said = "Invalid credentials in Authorization header" if token else "Invalid username or password."
        assert all(said in error[1] for error in found["writes"])
        assert (found["read"] is None) is (token is None) and found["whoami"] is not None
    left = hub.run(CLIENT + 'print(json.dumps([api.list_repo_files("me/one"), api.repo_exists("me/two")]))')
    assert left == [[".gitattributes"], False]


def test_a_private_repository_is_read_with_the_token(hub):
    make = """
api.create_repo("me/hidden", private=True)
api.upload_file(repo_id="me/hidden", path_or_fileobj=b"hidden", path_in_repo="a.txt")
print(json.dumps(api.model_info("me/hidden").private))
"""
    read = 'print(json.dumps([attempt(hf_hub_download, "me/hidden", "a.txt"), attempt(api.model_info, "me/hidden"), attempt(snapshot_download, "me/hidden")]))'
    assert hub.run(CLIENT + make) is True
    assert hub.run(CLIENT + read) == [None] * 3
    assert [error[0] for error in hub.run(CLIENT + read, token=None)] == ["RepositoryNotFoundError"] * 3
    path = "/me/hidden/resolve/main/a.txt"
    assert request(hub, "GET", path)[::2] == (200, b"hidden") and request(hub, "GET", path, token=False)[0] == 401


def test_what_is_missing_is_named(hub):
    code = """
api.create_repo("me/one")
errors = [attempt(hf_hub_download, "me/one", "none.txt"), attempt(hf_hub_download, "me/one", ".gitattributes", revision="none")]
errors += [attempt(hf_hub_download, "me/none", "none.txt"), attempt(snapshot_download, "me/one", revision="0" * 40)]
errors += [attempt(lambda: list(api.list_repo_tree("me/one", "none"))), attempt(api.create_tag, "me/one", tag="t", revision="none")]
known = [api.file_exists("me/one", "none.txt"), api.file_exists("me/one", ".gitattributes"), api.revision_exists("me/one", "none")]
print(json.dumps([[error[0] for error in errors], known]))
"""
    entry, revision = "RemoteEntryNotFoundError", "RevisionNotFoundError"
    assert hub.run(CLIENT + code) == [
        [entry, revision, "RepositoryNotFoundError", revision, entry, revision],
        [False, True, False],
    ]


def test_branches_and_tags(hub):
    code = """
api.create_repo("me/one")
api.create_branch("me/one", branch="b.1/x")
api.create_tag("me/one", tag="v1")
again = [attempt(api.create_branch, "me/one", branch="b.1/x")[1][:3], attempt(api.create_branch, "me/one", branch="b.1/x", exist_ok=True)]
again += [attempt(api.create_tag, "me/one", tag="v1") is None, attempt(api.create_tag, "me/one", tag="v1", exist_ok=True)]
made = [api.revision_exists("me/one", name) for name in ("b.1/x", "v1")]
tagged = attempt(api.upload_file, repo_id="me/one", path_or_fileobj=b"a", path_in_repo="a", revision="v1")[0]
api.delete_branch("me/one", branch="b.1/x")
api.delete_tag("me/one", tag="v1")
gone = [api.revision_exists("me/one", name) for name in ("b.1/x", "v1", "main")]
print(json.dumps([again[1:], made, gone, tagged, attempt(api.delete_branch, "me/one", branch="main")[0]]))
"""
    assert hub.run(CLIENT + code) == [
        [None, False, None],
        [True] * 2,
        [False, False, True],
        "RevisionNotFoundError",
        "HfHubHTTPError",
    ]


def test_trees_in_pages(tmp_path):
    folder = write(
        tmp_path / "checkpoint",
        **{f"a__b{i}__c_dot_txt": b"x" * i for i in range(5)},
        ab_dot_txt=b"",
        top_dot_safetensors=b"top",
    )
    code = """
api.create_repo("me/one")
api.upload_folder(repo_id="me/one", folder_path=sys.argv[1])
def tree(**kwargs):
    return [[entry.path, getattr(entry, "size", None)] for entry in api.list_repo_tree("me/one", **kwargs)]
some = [[entry.path, entry.lfs.sha256 if entry.lfs else None] for entry in api.get_paths_info("me/one", ["top.safetensors", "ab.txt", "none"])]
found = {"top": tree(), "all": tree(recursive=True), "a": tree(path_in_repo="a"), "below": tree(path_in_repo="a/b1", recursive=True), "some": some}
print(json.dumps({**found, "snapshot": len(contents(snapshot_download("me/one")))}))
"""
    with hub_server(tmp_path / "hub", page_size=2) as hub:
        found = hub.run(CLIENT + code, folder)
        pages = sum(request["path"] == "/api/models/me/one/tree/main" for request in hub.requests("GET"))
    files = [[f"a/b{i}/c.txt", i] for i in range(5)]
    assert [path for path, _ in found["top"]] == [".gitattributes", "a", "ab.txt", "top.safetensors"]
    assert [entry for entry in found["all"] if entry[1] is not None and entry[0].startswith("a/")] == files
    assert found["a"] == [[f"a/b{i}", None] for i in range(5)] and found["below"] == [["a/b1/c.txt", 1]]
    assert found["some"] == [["ab.txt", None], ["top.safetensors", hashlib.sha256(b"top").hexdigest()]]
    assert found["snapshot"] == 8 and pages >= 2 + 7


def test_ranges_of_a_file(hub):
    request(hub, "POST", "/api/repos/create", '{"name": "one", "organization": "me"}')
    assert (
        request(hub, "POST", "/api/models/me/one/commit/main", commit_lines(as_file("a.txt", b"0123456789")))[0] == 200
    )
    for asked, status, body, said in (
        (None, 200, b"0123456789", None),
        ("bytes=4-", 206, b"456789", "bytes 4-9/10"),
        ("bytes=4-5", 206, b"45", "bytes 4-5/10"),
        ("bytes=4-99", 206, b"456789", "bytes 4-9/10"),
        ("bytes=10-", 416, b"", "bytes */10"),
    ):
        got, headers, data = request(
            hub, "GET", "/me/one/resolve/main/a.txt", headers={"Range": asked} if asked else {}
        )
        assert (got, data, headers.get("Content-Range")) == (status, body, said), asked


def test_paths_that_lead_elsewhere_are_refused(hub, tmp_path):
    request(hub, "POST", "/api/repos/create", '{"name": "one", "organization": "me"}')
    (tmp_path / "outside.txt").write_text("outside")
    before = sorted(path.name for path in tmp_path.iterdir())
    for path in ("../x", "a/../../x", "/x", "a//x", "./x", ".git/config", "a\\..\\x", "", "a/"):
        assert request(hub, "POST", "/api/models/me/one/commit/main", commit_lines(as_file(path, b"x")))[0] == 400, (
            path
        )
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
        assert request(hub, "POST", "/api/repos/create", json.dumps({"name": name, "organization": "me"}))[0] == 400, (
            name
        )
        assert (
            request(hub, "DELETE", "/api/repos/delete", json.dumps({"name": name, "organization": "me"}))[0] == 400
        ), name
    assert request(hub, "GET", "/api/models/..%2f..%2fx/one")[0] == 400
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_the_token_is_written_nowhere(hub, checkpoint):
    hub.run(CLIENT + PUSH, checkpoint)
    hub.run(CLIENT + "print(json.dumps(attempt(api.create_repo, 'me/two')))", token="hf_another")
    for path in hub.root.rglob("*"):
        assert path.is_dir() or not any(
            token in path.read_bytes() for token in (hub.token.encode(), b"hf_another", b"signature=")
        ), path


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
BAD = [  # the kind of card, what is changed to what, where the error is
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
    """As `push_to_hub` of a card and `create_commit` of a README.md do: both read what the endpoint says."""
    cards = [(kind, f"---{text}---\n# A card") for kind, text in GOOD.items()]
    for kind, old, new, _ in BAD:
        assert GOOD[kind].count(old) == 1
        cards.append((kind, f"---{GOOD[kind].replace(old, new)}---\n# A card"))
    code = """
import inspect, warnings
from huggingface_hub import RepoCard
asks_this_hub = "ENDPOINT" in inspect.getsource(RepoCard.validate)  # old clients ask huggingface.co, whatever their endpoint
found = []
for kind, content in json.loads(Path(sys.argv[1]).read_text()):
    api.create_repo("me/one", repo_type=kind, exist_ok=True)
    pushed = attempt(api.upload_file, repo_id="me/one", repo_type=kind, path_or_fileobj=content.encode(), path_in_repo="README.md")
    class Card(RepoCard):
        repo_type = kind
        __str__ = lambda self: content  # as it stands: the client would not read some of them
    found.append([attempt(Card.validate, object.__new__(Card)) if asks_this_hub else pushed, pushed])
with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    api.upload_file(repo_id="me/one", path_or_fileobj=b"# No metadata", path_in_repo="README.md")
print(json.dumps([found, [str(warning.message) for warning in said]]))
"""
    (hub.root.parent / "cards.json").write_text(json.dumps(cards))
    found, warned = hub.run(CLIENT + code, hub.root.parent / "cards.json")
    assert found[: len(GOOD)] == [[None, None]] * len(GOOD)
    for (_, _, new, where), results in zip(BAD, found[len(GOOD) :], strict=True):
        for error in results:
            assert error is not None and error[0] == "ValueError" and where in error[1], (new, error)
    assert len(warned) == 1 and "empty or missing yaml metadata" in warned[0]


def test_code_runs_with_this_checkout_or_without_it(hub):
    code = """
import importlib, json, os, sys
def where(name):
    try:
        return importlib.import_module(name).__file__
    except ModuleNotFoundError:
        return None
print(json.dumps([os.listdir(), where("modeling_cosup"), where("trainer"), where("support")]))
"""
    root = Path(__file__).parents[2]
    assert hub.run(code) == [
        [],
        f"{root}/modeling_cosup/__init__.py",
        f"{root}/trainer/__init__.py",
        f"{root}/tests/support/__init__.py",
    ]
    assert hub.run(code, package=False) == [[], None, None, None]


def test_a_hub_that_cannot_start_says_so(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RuntimeError, match="did not start"):
        Hub(tmp_path / "file").start()
