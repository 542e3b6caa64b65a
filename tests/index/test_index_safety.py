"""What an index refuses: names that lead out of its folder, altered configs, other writers, stale or foreign files."""

import fcntl
import json
import shutil

import numpy as np
import pyarrow as pa
import pytest

from modeling_cosup import PassageIndex, folders_cosup, index_files_cosup, index_store_cosup
from modeling_cosup.files_cosup import is_locked, locked
from modeling_cosup.shard_build_cosup import build_of
from support.models import PASSAGES

MANY = [{"id": f"m{i}", "title": "", "text": f"radium {i}"} for i in range(12)]
NAME = "index_config.json"


def build(model, folder, passages=PASSAGES, **kwargs):
    return PassageIndex.build(passages, model, save_directory=folder, show_progress_bar=False, **kwargs)


def edit(folder, change, sign=True):
    """Change the config and sign it again, as an attacker would, or with `sign=False` leave the old signature."""
    config = json.loads((folder / NAME).read_text())
    change(config)
    if sign:
        config["sha256"] = folders_cosup.digest_of_config(config)
    (folder / NAME).write_text(json.dumps(config))


@pytest.mark.parametrize(
    "change",
    [
        lambda config: config["files"].update({"../precious": {"size": 1, "sha256": "x"}}),
        lambda config: config["files"].update({"/precious": {"size": 1, "sha256": "x"}}),
        lambda config: config.update(ids="../ids-00000.safetensors"),
        lambda config: config.update(deleted="../precious"),
        lambda config: config.update(deleted=config["ids"]),
        lambda config: config.update(approximate={"file": "../precious"}),
        lambda config: config.update(approximate={}),
        lambda config: config.update(files={}),
        lambda config: config["files"].pop("passages-00000.arrow"),
        lambda config: config["files"].update({"passages-00000.arrow": 5}),
        lambda config: config.update(shards=["6"]),
        lambda config: [config.pop(name) for name in list(config) if name != "format_version"],
    ],
)
def test_a_config_that_no_index_wrote_is_refused(model, tmp_path, change):
    build(model, tmp_path / "index")
    (tmp_path / "precious").write_text("p")
    edit(tmp_path / "index", change)
    with pytest.raises(ValueError, match="index_config.json is damaged"):
        PassageIndex.from_pretrained(tmp_path / "index", search="exact")


def test_an_altered_config_and_bad_deletions_are_found(model, tmp_path):
    build(model, tmp_path / "index").delete(["p1", "p3"])
    shutil.copytree(tmp_path / "index", tmp_path / "altered")
    edit(tmp_path / "altered", lambda config: config.update(deleted=None), sign=False)
    with pytest.raises(ValueError, match="it does not match its own SHA-256"):
        PassageIndex.from_pretrained(tmp_path / "altered")
    index = PassageIndex.from_pretrained(tmp_path / "index")
    for rows in ([3, 1], [1, 1], [-1, 2], [2, 6]):
        index._deleted, index.folder = np.array(rows), None
        index.save_pretrained(tmp_path / "bad")
        with pytest.raises(ValueError, match="expected rows from 0 to 5, in order, each once"):
            PassageIndex.from_pretrained(tmp_path / "bad")


def check_no_change_is_possible(index, model, message):
    """Check that every method that changes an index raises a `ValueError`."""
    with pytest.raises(ValueError, match=message):
        index.delete(["p1"])
    with pytest.raises(ValueError, match=message):
        index.add(MANY, model, show_progress_bar=False)
    with pytest.raises(ValueError, match=message):
        index.train_approximate("Flat")


def test_one_writer_at_a_time(model, tmp_path):
    first = build(model, tmp_path / "index")
    second = PassageIndex.from_pretrained(tmp_path / "index")

    def passages():
        yield {"id": "new", "text": "word"}
        check_no_change_is_possible(second, model, "is being changed by another process")
        yield {"id": "newer", "text": "word"}

    first.add(passages(), model, shard_size=1, show_progress_bar=False)
    check_no_change_is_possible(second, model, "was changed by another process")
    assert len(PassageIndex.from_pretrained(tmp_path / "index", verify=True)) == len(PASSAGES) + 2
    with locked(tmp_path / "index" / ".lock", "held"), pytest.raises(ValueError, match="is being changed"):
        first.delete(["p1"])
    first.delete(["p1"])
    assert not (tmp_path / "index" / ".lock").exists()


def test_an_index_that_was_replaced_is_not_changed_through_the_old_one(model, tmp_path):
    first = build(model, tmp_path / "index")
    build(model, tmp_path / "index", MANY)  # generation 0 again
    with pytest.raises(ValueError, match="was changed by another process"):
        first.delete(["p1"])


def test_a_change_during_a_load_or_a_copy_is_noticed(model, tmp_path, monkeypatch):
    writer = build(model, tmp_path / "index")
    steps = [lambda: writer.delete(["p1"]), lambda: writer.add(MANY, model, show_progress_bar=False)]

    def change_then(function):
        def run(*args, **kwargs):
            if steps:
                steps.pop(0)()
            return function(*args, **kwargs)

        return run

    monkeypatch.setattr(index_store_cosup, "read_config", change_then(index_store_cosup.read_config))
    monkeypatch.setattr(index_store_cosup, "map_id_table", change_then(index_store_cosup.map_id_table))
    loaded = PassageIndex.from_pretrained(tmp_path / "index")  # the ids of the first state are gone
    assert not steps
    assert len(loaded) == len(PASSAGES) - 1 + len(MANY)
    with pytest.raises(ValueError, match="p1"):
        loaded.rows_of(["p1"])

    monkeypatch.undo()
    reader = PassageIndex.from_pretrained(tmp_path / "index")
    steps.append(lambda: writer.delete(["p3"]))
    monkeypatch.setattr(shutil, "copyfile", change_then(shutil.copyfile))
    with pytest.raises(ValueError, match="was changed by another process: load it again"):
        reader.save_pretrained(tmp_path / "copy")
    assert not (tmp_path / "copy").exists()


@pytest.mark.parametrize("replace", ["save", "build"])
def test_an_index_is_not_replaced_while_it_is_being_changed(model, tmp_path, replace):
    """The replacement is the same index, so that the change would not notice it."""
    folder = tmp_path / "index"
    index = build(model, folder)

    def passages():
        yield {"id": "new", "text": "word"}
        with pytest.raises(ValueError, match="index is being changed by another process"):
            if replace == "save":
                PassageIndex.from_pretrained(folder).save_pretrained(folder)
            else:
                build(model, folder)
        yield {"id": "newer", "text": "word"}

    index.add(passages(), model, shard_size=1, show_progress_bar=False)
    assert len(PassageIndex.from_pretrained(folder, verify=True)) == len(PASSAGES) + 2
    assert len(build(model, folder)) == len(PASSAGES)  # afterwards it may be replaced
    assert not (folder / ".lock").exists()


def test_a_change_whose_files_are_gone_is_not_committed(model, tmp_path):
    index = build(model, tmp_path / "index")

    def passages():
        yield {"id": "new", "text": "word"}
        (tmp_path / "index" / "embeddings-00001.safetensors").unlink()
        yield {"id": "newer", "text": "word"}

    with pytest.raises(FileNotFoundError, match="embeddings-00001.safetensors is missing"):
        index.add(passages(), model, shard_size=1, show_progress_bar=False)
    assert len(PassageIndex.from_pretrained(tmp_path / "index", verify=True)) == len(PASSAGES)


def test_merge_refuses_shards_of_another_corpus(model, tmp_path):
    other = [{**passage, "text": f"{passage['text']} anew"} for passage in MANY]
    for rank in range(2):
        build(model, tmp_path / "index", MANY, shard_size=4, num_processes=2, process_index=rank)
    build(model, tmp_path / "index", other, shard_size=4, num_processes=2, process_index=0)
    with pytest.raises(ValueError, match="the processes read different corpora"):
        PassageIndex.merge(tmp_path / "index")
    build(model, tmp_path / "index", other, shard_size=4, num_processes=2, process_index=1)
    work = tmp_path / ".index.unfinished"
    done = (work / "done-00001.json").read_text()
    (work / "done-00001.json").unlink()
    with pytest.raises(FileNotFoundError, match="done-00001.json"):
        PassageIndex.merge(tmp_path / "index")
    (work / "done-00001.json").write_text(done)
    texts = [passage["text"] for passage in PassageIndex.merge(tmp_path / "index")]
    assert texts == [passage["text"] for passage in other]


def test_a_damaged_shard_is_made_again(model, tmp_path):
    build(model, tmp_path / "index", MANY, shard_size=4, num_processes=2, process_index=1)
    build(model, tmp_path / "index", MANY, shard_size=4, num_processes=2, process_index=0)
    path = tmp_path / ".index.unfinished" / "embeddings-00001.safetensors"
    right = path.read_bytes()
    path.write_bytes(right[:-1])
    with pytest.raises(ValueError, match="embeddings-00001.safetensors missing or damaged"):
        PassageIndex.merge(tmp_path / "index")
    path.write_bytes(right[:-1] + bytes([right[-1] ^ 1]))
    build(model, tmp_path / "index", MANY, shard_size=4, num_processes=2, process_index=1)
    assert path.read_bytes() == right
    assert len(PassageIndex.merge(tmp_path / "index")) == 12


def test_a_snapshot_in_the_cache_of_the_hub_is_read_only(model, tmp_path):
    folder = tmp_path / "datasets--me--index" / "snapshots" / "abc"
    index = build(model, folder)
    check_no_change_is_possible(index, model, "save_pretrained it to a folder first")
    index.save_pretrained(tmp_path / "own")
    PassageIndex.from_pretrained(tmp_path / "own").delete(["p1"])


def test_a_change_removes_what_is_left_over_and_no_foreign_file(model, tmp_path):
    folder = tmp_path / "index"
    index = build(model, folder)
    left_over = ["shard-00003.json", "done-00000.json", "passages-00007.arrow", f".{NAME}.0a1b2c3d.unfinished"]
    foreign = ["shard-notes.json", "passages-old.arrow", "embeddings-1.safetensors", f".{NAME}.old", "README.md"]
    for name in [*left_over, *foreign]:
        (folder / name).write_text("mine")
    index.delete(["p1"])
    names = {path.name for path in folder.iterdir()}
    assert names == {NAME, *index.config["files"], *foreign}


@pytest.mark.parametrize("foreign", ["README.md", ".git/config", "model.safetensors", "shard-notes.json"])
def test_foreign_files_are_not_replaced(model, tmp_path, foreign):
    index = build(model, tmp_path / "index")
    path = tmp_path / "index" / foreign
    path.parent.mkdir(exist_ok=True)
    path.write_text("precious")
    for save in (lambda: index.save_pretrained(tmp_path / "index"), lambda: build(model, tmp_path / "index")):
        with pytest.raises(FileExistsError, match=f"also holds {foreign.split('/')[0]}"):
            save()
    assert path.read_text() == "precious"


def write_arrow(folder, batch):
    path = folder / "passages-00000.arrow"
    index_files_cosup.write_passages(path, batch)
    edit(folder, lambda config: config["files"].update({path.name: folders_cosup.seal(path)}))


def test_bad_arrow_files_are_refused(model, tmp_path):
    index = build(model, tmp_path / "index")
    content = (tmp_path / "index" / "passages-00000.arrow").read_bytes()
    batch = pa.ipc.open_file(pa.BufferReader(content)).get_batch(0)
    ids = pa.array([passage["id"] for passage in index])  # string, not large_string
    write_arrow(tmp_path / "index", batch.set_column(0, "id", ids))
    with pytest.raises(ValueError, match="passages-00000.arrow is damaged: found the columns"):
        PassageIndex.from_pretrained(tmp_path / "index")
    offsets = pa.py_buffer(np.array([0, 10**12, 3, 4, 5, 6, 7], np.int64))
    text = pa.Array.from_buffers(pa.large_string(), 6, [None, offsets, pa.py_buffer(b"abcdefg")])
    write_arrow(tmp_path / "index", batch.set_column(2, "text", text))
    with pytest.raises(ValueError, match="passages-00000.arrow is damaged"):
        PassageIndex.from_pretrained(tmp_path / "index", verify=True)


@pytest.mark.parametrize("faiss_files", [False, True])
def test_only_what_the_config_names_is_downloaded(model, tmp_path, monkeypatch, faiss_files):
    folder = tmp_path / "datasets--me--index" / "snapshots" / "abc"
    build(model, tmp_path / "index").train_approximate("Flat")
    shutil.copytree(tmp_path / "index", folder)
    calls = []

    def download(name, repo_type, revision, allow_patterns):
        calls.append((revision, allow_patterns))
        return str(folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    search = None if faiss_files else "exact"
    index = PassageIndex.from_pretrained("me/index", allow_faiss_files=faiss_files, search=search)
    names = list(json.loads((folder / NAME).read_text())["files"])
    if not faiss_files:
        names = [name for name in names if not name.endswith(".faiss")]
    assert calls == [(None, [NAME]), ("abc", [NAME, *names])]
    assert len(index) == len(PASSAGES)
    edit(folder, lambda config: config["files"].update({"*": {"size": 1, "sha256": "x"}}))
    calls.clear()
    with pytest.raises(ValueError, match="is not a file of a passage index"):
        PassageIndex.from_pretrained("me/index")
    assert len(calls) == 1


@pytest.mark.parametrize("name", ["index", "me/index"])
def test_an_option_that_is_mistyped_is_named(model, tmp_path, monkeypatch, name):
    build(model, tmp_path / "index")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(TypeError, match="Loading has no option 'verfy'"):
        PassageIndex.from_pretrained(name, verfy=True)
    assert len(PassageIndex.from_pretrained("index", local_files_only=True)) == len(PASSAGES)


def test_a_stale_index_is_not_saved_over_its_own_folder(model, tmp_path):
    first = model.build_index(PASSAGES, save_directory=tmp_path / "index", show_progress_bar=False)
    PassageIndex.from_pretrained(tmp_path / "index").delete(["p1"])
    for folder in ("index", "copy"):
        with pytest.raises(ValueError, match="was changed by another process: load it again"):
            first.save_pretrained(tmp_path / folder)
    again = PassageIndex.from_pretrained(tmp_path / "index")
    with pytest.raises(ValueError, match="p1"):
        again.rows_of(["p1"])


def test_two_builds_of_one_folder_exclude_each_other(model, tmp_path):
    options = {"save_directory": tmp_path / "index", "show_progress_bar": False}
    with locked(tmp_path / ".index.lock-0-of-2", "held"):
        for others in ({}, {"num_processes": 2, "process_index": 0}, {"num_processes": 3, "process_index": 1}):
            with pytest.raises(ValueError, match="index is being built by another process"):
                model.build_index(PASSAGES, **options, **others)
        model.build_index(PASSAGES, **options, num_processes=2, process_index=1)  # another part of the work
    with locked(tmp_path / ".index.lock-1-of-2", "held"), pytest.raises(ValueError, match="by another process"):
        model.build_index(PASSAGES, **options)  # process 0 of 2 is done
    assert len(model.build_index(PASSAGES, **options)) == len(PASSAGES)
    assert [path.name for path in tmp_path.iterdir()] == ["index"]


def test_processes_that_look_at_a_stale_lock_at_once_do_not_refuse_each_other(tmp_path):
    stale = tmp_path / ".index.lock-0-of-1"
    stale.touch()  # by a build that was killed
    assert not is_locked(stale)
    with stale.open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_SH)  # another process looks at it
        with build_of(tmp_path / "index", {"fingerprint": {}}, num_processes=2):
            pass
    assert not is_locked(tmp_path / "missing")
    with locked(stale, "held"):
        assert is_locked(stale)


def test_an_index_is_built_where_a_link_points(model, tmp_path):
    (tmp_path / "large disk").mkdir()
    (tmp_path / "index").symlink_to(tmp_path / "large disk" / "index")  # which does not exist yet
    for passages in (PASSAGES[:3], PASSAGES[:4], PASSAGES):
        model.build_index(passages, save_directory=tmp_path / "index", show_progress_bar=False)
        assert len(model.load_index(tmp_path / "index")) == len(passages)
    assert (tmp_path / "index").is_symlink()
    assert sorted(path.name for path in tmp_path.rglob("*") if path.is_dir()) == ["index", "index", "large disk"]
