"""Searching an index: shards, candidates, deletions, devices, approximate indexes; adding and deleting."""

import json
import os
import shutil
import signal
from pathlib import Path

import faiss
import numpy as np
import pytest
import torch

from modeling_cosup import (
    PassageIndex,
    index_approximate_cosup,
    index_search_cosup,
    index_searchable_cosup,
    retrieval_cosup,
)
from modeling_cosup.folders_cosup import seal
from modeling_cosup.index_approximate_cosup import usual_search_options
from support.forks import run_forked
from support.indexes import all_scores, check_nearest, in_folder, queries, random_index
from support.models import PASSAGES, make_model
from trainer.judging.figures import figure

MANY = [{"id": f"m{i}", "title": "", "text": f"{i} radium"} for i in range(300)]


# ------------------------------------------------------------------ exact


@pytest.mark.parametrize("where", ["memory", "files", "device"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("n", [1, 33, 70])
def test_exact_search_equals_one_product(tmp_path, monkeypatch, where, dtype, n):
    monkeypatch.setattr(index_search_cosup, "HALF_ROWS", 32)
    monkeypatch.setattr(index_search_cosup, "PRODUCT_ROWS", 30)
    monkeypatch.setattr(index_search_cosup, "DEVICE_SCORES", n * 50)  # blocks smaller than a shard, and across shards
    index = random_index(dtype=dtype, normalize=False)
    if where == "files":
        index = in_folder(index, tmp_path / "index")
    if where == "device":
        assert index.to("cpu") is index
    for k in (1, 7, 300):
        scores, rows = index.search(queries(n), k)
        assert rows.shape == (n, k)
        check_nearest((scores, rows), all_scores(index, queries(n)))
    assert index.search(queries(n), 1000)[1].shape == (n, 300)
    assert [part.shape for part in index.search(queries(0), 3)] == [(0, 3), (0, 3)]


def test_a_device_may_hold_half_precision():
    index = random_index()
    index.to("cpu", dtype="bfloat16")
    scores, rows = index.search(queries(9), 5)
    right = (queries(9) @ index.embeddings.bfloat16().float().T).topk(5)
    assert rows.tolist() == right.indices.tolist()
    assert scores.dtype == np.float32
    index.to(None)
    check_nearest(index.search(queries(9), 5), all_scores(index, queries(9)))


def test_added_passages_are_found_if_their_copy_on_the_device_fails(monkeypatch, tmp_path):
    model = make_model()
    index = model.build_index(PASSAGES, save_directory=tmp_path / "index", show_progress_bar=False).to("cpu")

    def fail(*args):
        raise torch.OutOfMemoryError("too little memory")

    monkeypatch.setattr(index_searchable_cosup, "DeviceSearch", fail)
    index.add(MANY[:2], model, show_progress_bar=False)
    num_passages = len(PASSAGES) + 2
    assert len(index) == num_passages
    _, rows = index.search(index.get_embeddings([0]), num_passages)
    assert sorted(rows[0]) == list(range(num_passages))


def test_embeddings_that_overflow_on_a_device_are_refused():
    """Infinite in float16, row 0 would be the last result for this query: in float32 it is the first."""
    index = random_index(4, size=4, shard_size=2)
    index._shards[0].embeddings[0] = torch.tensor([1e5, 0, 0, 1])
    with pytest.raises(ValueError, match="Embeddings overflow float16: copy them with dtype='bfloat16'"):
        index.to("cpu", dtype="float16")
    query = torch.tensor([[-1e-6, 0, 0, 10]])
    for dtype in (None, "bfloat16", torch.bfloat16):
        assert index.to("cpu", dtype=dtype).search(query)[1].tolist() == [[0]]
    with pytest.raises(ValueError, match="dtype is 'int8', expected one of float32, float16, bfloat16"):
        index.to("cpu", dtype="int8")
    index.train_approximate("Flat")
    with pytest.raises(ValueError, match="dtype 'float16' is for a copy of the embeddings"):
        index.to("cpu", dtype="float16")


def test_searching_copies_no_embeddings(tmp_path):
    index = in_folder(random_index(shard_size=300), tmp_path / "index")
    assert index.embeddings.data_ptr() == index._shards[0].embeddings.data_ptr()
    blocks = list(index._exact.blocks())
    assert [block.ctypes.data for _, block in blocks] == [shard.embeddings.data_ptr() for shard in index._shards]


@pytest.mark.parametrize("where", ["memory", "files", "device"])
def test_bad_queries(tmp_path, where):
    index = random_index()
    if where == "files":
        index = in_folder(index, tmp_path / "index")
    if where == "device":
        index.to("cpu")
    with pytest.raises(ValueError, match="Queries have 8 dimensions, the index has 16"):
        index.search(queries(2, 8))
    with pytest.raises(ValueError, match="expected a tensor"):
        index.search(queries(1)[0])
    bad = queries(4)
    bad[1, 3], bad[3, 0] = float("nan"), float("inf")
    with pytest.raises(ValueError, match=r"NaN or infinite in rows \[1, 3\]"):
        index.search(bad)
    with pytest.raises(ValueError, match="k is 0, expected at least 1"):
        index.search(queries(2), 0)


# ------------------------------------------------------------------ candidates


@pytest.mark.parametrize("where", ["memory", "files", "device", "approximate"])
def test_candidates(tmp_path, where):
    index = random_index()
    if where == "files":
        index = in_folder(index, tmp_path / "index")
    elif where == "device":
        index.to("cpu")
    elif where == "approximate":
        index.train_approximate("HNSW16", efSearch=300)
    pools = [None, np.array([3, 290, 71, 3, 140]), np.array([], np.int64), np.arange(300)[::-1], [5], None]
    scores, rows = index.search(queries(6), 4, candidates=pools)
    right = all_scores(index, queries(6))
    for i, pool in enumerate(pools):
        allowed = np.arange(300) if pool is None else np.unique(np.asarray(pool, np.int64))
        best = allowed[np.argsort(-right[i, allowed].numpy(), kind="stable")][:4]
        assert rows[i].tolist() == [*best.tolist(), *[-1] * (4 - len(best))]
        np.testing.assert_allclose(scores[i, : len(best)], right[i, best], rtol=1e-4, atol=1e-5)
        assert (scores[i, len(best) :] == -np.inf).all()


def test_bad_candidates():
    index = random_index()
    for pool, message in [
        ([3, 300], r"candidates\[1\] holds \[300\], which are not rows of this index \(0 to 299\)"),
        ([-1], r"candidates\[1\] holds \[-1\]"),
    ]:
        with pytest.raises(ValueError, match=message):
            index.search(queries(2), candidates=[None, pool])
    with pytest.raises(ValueError, match="1 lists of candidates for 2 queries"):
        index.search(queries(2), candidates=[[1]])
    with pytest.raises(ValueError, match="does not hold 6 of 7 ids: \\['x0', 'x1', 'x2', 'x3', 'x4'\\]"):
        index.rows_of(["m1", *(f"x{i}" for i in range(6))])
    with pytest.raises(ValueError, match="5 is not a passage id, expected a string"):
        index.rows_of([5])
    assert index.rows_of([]).dtype == np.int64


def test_reading_passages(tmp_path):
    index = in_folder(random_index(), tmp_path / "index")
    assert [passage["id"] for passage in index.get_passages([299, 0, 70])] == ["m299", "m0", "m70"]
    expected = {"id": "m69", "title": "", "text": "x", "input_ids": [5, 6]}
    assert index.get_passages(np.array([69])) == [expected]
    assert index[69] == expected
    assert index.get_passages([]) == []
    assert list(index) == index.get_passages(range(300))
    index.delete(["m69", "m70"])
    assert list(index.read(("id", "text"))) == [{"id": f"m{i}", "text": "x"} for i in range(300) if i not in (69, 70)]
    for row in (300, -1):
        with pytest.raises(IndexError, match=rf"no rows \[{row}\]; it has 0 to 299"):
            index.get_passages([0, row])


# ------------------------------------------------------------------ deleting


@pytest.mark.parametrize("where", ["memory", "files", "device", "HNSW16", "IVF8,Flat", "OPQ4_8,IVF4,PQ4x4"])
def test_deleted_passages_are_never_found(tmp_path, where):
    index = random_index()
    if where == "files":
        index = in_folder(index, tmp_path / "index")
    elif where == "device":
        index.to("cpu")
    elif where == "HNSW16":
        index.train_approximate(where, efSearch=300)
    elif where != "memory":
        index.train_approximate(where, nprobe=8)
    nearest = all_scores(index, queries(5)).topk(40).indices.flatten().tolist()
    gone = sorted({*nearest, *range(70, 140)})  # all near rows, and a whole shard
    index.delete([f"m{row}" for row in gone])
    alive = torch.ones(300, dtype=torch.bool)
    alive[gone] = False
    assert len(index) == int(alive.sum())
    assert index.num_rows == 300
    for k in (1, 5, 300):
        scores, rows = index.search(queries(5), k)
        assert rows.shape == (5, min(k, len(index)))
        assert not set(rows.flatten()) & set(gone)
        if "PQ" not in where:
            check_nearest((scores, rows), all_scores(index, queries(5), alive))
    live_rows = alive.nonzero()[:, 0].tolist()
    _, rows = index.search(queries(1), 3, candidates=[[*gone[:3], live_rows[0]]])
    assert rows.tolist() == [[live_rows[0], -1, -1]]
    with pytest.raises(ValueError, match=f"does not hold 1 of 1 ids: ..m{gone[0]}"):
        index.rows_of([f"m{gone[0]}"])
    with pytest.raises(ValueError, match=f"does not hold 1 of 2 ids: ..m{gone[0]}"):
        index.delete([f"m{live_rows[0]}", f"m{gone[0]}"])
    assert len(index) == int(alive.sum())  # nothing more was deleted
    with pytest.raises(KeyError):
        index.row_of(f"m{gone[0]}")
    with pytest.raises(IndexError, match="were deleted"):
        index.get_passages([gone[0]])
    assert [passage["id"] for passage in index] == [f"m{row}" for row in live_rows]


@pytest.mark.parametrize("where", ["memory", "files"])
def test_everything_deleted(tmp_path, where):
    index = random_index(20, shard_size=7)
    if where == "files":
        index = in_folder(index, tmp_path / "index")
    index.delete([f"m{i}" for i in range(20)])
    if where == "files":
        index = PassageIndex.from_pretrained(tmp_path / "index")
    assert len(index) == 0
    assert list(index) == []
    assert [part.shape for part in index.search(queries(3), 5)] == [(3, 0), (3, 0)]
    assert index.search(queries(1), 5, candidates=[[1, 2]])[1].shape == (1, 0)


# ------------------------------------------------------------------ approximate


@pytest.mark.parametrize(
    ("factory", "weak", "strong"),
    [
        ("HNSW16", {"efSearch": 1}, {"efSearch": 400}),
        ("IVF16,Flat", {"nprobe": 1}, {"nprobe": 16}),
        ("IVF8,PQ16x4", {"nprobe": 1}, {"nprobe": 8}),
    ],
)
def test_approximate_search(tmp_path, factory, weak, strong, monkeypatch):
    index = in_folder(random_index(3000, shard_size=900), tmp_path / "index")
    low = index.train_approximate(factory, queries=queries(50), **weak)
    stored = json.loads((tmp_path / "index" / "index_config.json").read_text())["approximate"]
    assert set(low) == {"ann_recall@1", "ann_recall@10"} == {figure(name).name for name in low}
    assert stored["ann_recall@10"] == low["ann_recall@10"]
    assert stored["index_factory"] == factory
    index.set_search_options(**strong)
    high = index.measure_recall(queries(50))
    assert high["ann_recall@10"] > low["ann_recall@10"]
    assert high["ann_recall@10"] > (0.4 if "PQ" in factory else 0.99)

    exact_rows = all_scores(index, queries(50)).topk(10).indices.tolist()
    _, found_rows = index.search(queries(50), 10)
    shares = [len(set(a) & set(b)) / 10 for a, b in zip(found_rows.tolist(), exact_rows, strict=True)]
    assert high["ann_recall@10"] == pytest.approx(np.mean(shares))

    _, rows = index.search(queries(9), 10)
    with pytest.raises(ValueError, match="no search option 'nope'"):
        index.set_search_options(nope=3)

    monkeypatch.setattr(retrieval_cosup, "find_folder", lambda *_: tmp_path / "index")  # downloads it
    trust = (
        "^me/index is searched through a FAISS file: pass allow_faiss_files=True if you trust it, or search='exact'"
    )
    with pytest.raises(ValueError, match=trust):
        PassageIndex.from_pretrained("me/index")
    monkeypatch.undo()
    exact = PassageIndex.from_pretrained(tmp_path / "index", search="exact")
    check_nearest(exact.search(queries(9), 10), all_scores(index, queries(9)))
    loaded = PassageIndex.from_pretrained(tmp_path / "index", allow_faiss_files=True)
    loaded.set_search_options(**strong)
    assert (loaded.search(queries(9), 10)[1] == rows).all()
    loaded.save_pretrained(tmp_path / "copy")
    copy = PassageIndex.from_pretrained(tmp_path / "copy", allow_faiss_files=True, verify=True)
    copy.set_search_options(**strong)
    assert (copy.search(queries(9), 10)[1] == rows).all()


def test_an_approximate_index_in_memory_is_saved_with_it(tmp_path):
    index = random_index()
    index.train_approximate("HNSW16", efSearch=300)
    loaded = in_folder(index, tmp_path / "index", allow_faiss_files=True)
    assert (loaded.search(queries(9), 5)[1] == index.search(queries(9), 5)[1]).all()
    assert len(list((tmp_path / "index").glob("index-*.faiss"))) == 1


def test_the_training_sample_is_of_all_shards_and_of_the_seed(monkeypatch):
    samples = []
    make = index_approximate_cosup.make_approximate

    def note_and_make(factory, exact, rows):
        samples.append(rows)
        return make(factory, exact, rows)

    monkeypatch.setattr(index_searchable_cosup, "make_approximate", note_and_make)
    index = random_index()
    for seed in (0, 0, 1):
        index.train_approximate("IVF2,Flat", train_size=100, seed=seed)
    assert len(set(samples[0])) == 100 and set(samples[0] // 70) == {0, 1, 2, 3, 4}
    assert (samples[0] == samples[1]).all() and (samples[0] != samples[2]).any()


@pytest.mark.parametrize(
    ("factory", "options", "message"),
    [
        ("Graph", {}, "index_factory 'Graph' of 16 dimensions and 300 training embeddings: FAISS says"),
        ("IVF1024,Flat", {}, "index_factory 'IVF1024,Flat' of 16 dimensions .*: FAISS says .*1024"),
        ("IVF4,PQ5", {}, "index_factory 'IVF4,PQ5'"),
        ("IVF4,Flat", {"efSearch": 3}, "IndexIVFFlat has no search option 'efSearch'"),
        ("IVF4,Flat", {"train_size": 0}, "train_size is 0"),
    ],
)
def test_bad_factories_leave_the_index_as_it_was(tmp_path, factory, options, message):
    index = in_folder(random_index(), tmp_path / "index")
    files = sorted(os.listdir(tmp_path / "index"))
    with pytest.raises(ValueError, match=message):
        index.train_approximate(factory, **options)
    check_nearest(index.search(queries(3), 4), all_scores(index, queries(3)))
    assert sorted(os.listdir(tmp_path / "index")) == files
    with pytest.raises(ValueError, match="call train_approximate first"):
        index.set_search_options(nprobe=3)


@pytest.mark.parametrize("damage", ["truncated", "altered", "missing", "another"])
def test_a_damaged_faiss_file(tmp_path, damage):
    index = in_folder(random_index(), tmp_path / "index")
    index.train_approximate("IVF4,Flat")
    (path,) = (tmp_path / "index").glob("*.faiss")
    content = bytearray(path.read_bytes())
    if damage == "truncated":
        path.write_bytes(content[:-9])
    elif damage == "altered":
        content[-9] ^= 1
        path.write_bytes(content)
    elif damage == "missing":
        path.unlink()
    else:
        faiss.write_index(faiss.IndexFlatIP(16), str(path))
        config = json.loads((tmp_path / "index" / "index_config.json").read_text())
        config["files"][path.name] = seal(path)
        (tmp_path / "index" / "index_config.json").write_text(json.dumps(config))
    messages = {
        "truncated": "is damaged",
        "altered": "is damaged",
        "missing": f"{path.name} is missing",
        "another": "holds 0 embeddings of 16 dimensions, expected 300 of 16",
    }
    with pytest.raises((ValueError, FileNotFoundError), match=messages[damage]):
        PassageIndex.from_pretrained(tmp_path / "index", allow_faiss_files=True)
    exact = PassageIndex.from_pretrained(tmp_path / "index", search="exact")
    exact.save_pretrained(tmp_path / "copy")
    if damage == "missing":
        check_nearest(
            PassageIndex.from_pretrained(tmp_path / "copy").search(queries(3)), all_scores(index, queries(3))
        )


# ------------------------------------------------------------------ adding


@pytest.mark.parametrize("where", ["memory", "files"])
@pytest.mark.parametrize(
    ("factory", "options", "name"),
    [
        ("RR16,IVF8,Flat", {"nprobe": 8}, "nprobe"),
        ("IVF8,Flat", {}, "nprobe"),
        ("HNSW16", {}, "efSearch"),
        ("IVF8,Flat,RFlat", {"nprobe": 8}, "nprobe"),
        ("HNSW8,Refine(SQfp16)", {}, "k_factor_rf"),
        ("IVF8_HNSW8,Flat", {"quantizer_efSearch": 5}, "quantizer_efSearch"),
    ],
)
def test_a_saved_index_has_the_search_options_of_its_training(model, tmp_path, where, factory, options, name):
    passages = [{"id": f"p{i}", "title": "", "text": f"{i} radium"} for i in range(20)]
    folder = tmp_path / "index" if where == "files" else None
    index = PassageIndex.build(passages, model, save_directory=folder, show_progress_bar=False)
    index.train_approximate(factory, **options)
    usual = {"nprobe": 1, "efSearch": 16, "k_factor_rf": 1} | options  # FAISS's defaults
    index.set_search_options(**{name: 3})
    for change in ("none", "add"):
        if change == "add":
            index.add([{"id": "z", "title": "", "text": "zzz"}], model, show_progress_bar=False)
            assert not [name for name in index.config["approximate"] if name.startswith("ann_recall")]
        index.save_pretrained(tmp_path / "copy")
        loaded = PassageIndex.from_pretrained(tmp_path / "copy", allow_faiss_files=True)
        assert usual_search_options(loaded._approximate.index)[name] == usual[name]
        assert loaded.config["approximate"]["search_options"][name] == usual[name]
        assert usual_search_options(index._approximate.index)[name] == 3


@pytest.mark.parametrize("where", ["memory", "files"])
@pytest.mark.parametrize("approximate", [None, "HNSW16", "IVF4,Flat"])
def test_after_adding_and_deleting_it_is_a_fresh_index(model, tmp_path, where, approximate):
    folder = tmp_path / "index" if where == "files" else None
    index = PassageIndex.build(MANY[:200], model, save_directory=folder, show_progress_bar=False, shard_size=90)
    if approximate == "HNSW16":
        index.train_approximate(approximate, efSearch=400)
    elif approximate is not None:
        index.train_approximate(approximate, nprobe=4)
    index.delete([f"m{i}" for i in range(0, 200, 3)])
    index.add((passage for passage in MANY[200:]), model, show_progress_bar=False, shard_size=60)
    index.add([MANY[3], MANY[0]], model, show_progress_bar=False)  # deleted before: new rows
    assert index.rows_of(["m3", "m0", "m1"]).tolist() == [300, 301, 1]
    assert len(index) == 300 - 67 + 2

    indexes = [index]
    if folder is not None:
        indexes.append(PassageIndex.from_pretrained(folder, allow_faiss_files=True))
    fresh = PassageIndex.build(list(index), model, show_progress_bar=False)
    expected_scores, fresh_rows = fresh.search(queries(20, 32), 10)
    expected_ids = [passage["id"] for passage in fresh.get_passages(fresh_rows.flatten())]
    for changed in indexes:
        assert list(changed) == list(fresh)
        scores, rows = changed.search(queries(20, 32), 10)
        assert [passage["id"] for passage in changed.get_passages(rows.flatten())] == expected_ids
        np.testing.assert_allclose(scores, expected_scores, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("where", ["memory", "files"])
def test_what_cannot_be_added_changes_nothing(model, tmp_path, where):
    folder = tmp_path / "index" if where == "files" else None
    index = PassageIndex.build(PASSAGES, model, save_directory=folder, show_progress_bar=False)
    files = None if folder is None else sorted(os.listdir(folder))
    new = {"id": "new", "text": "word"}
    for passages, message in [
        ([new, PASSAGES[2]], "Corpus row 1: id 'p2' is already in the index"),
        (iter([new, {"id": "newer", "text": "word"}, PASSAGES[2]]), "Corpus row 2: id 'p2' is already in the index"),
        ([new, {"id": "x", "text": ""}], "Corpus row 1: text is empty"),
        ([new, new], "Corpus row 1: id 'new' is already in Corpus row 0"),
        ([], "holds no passage"),
    ]:
        with pytest.raises(ValueError, match=message):
            index.add(passages, model, show_progress_bar=False, shard_size=1)
    with pytest.raises(ValueError, match="built by another model"):
        index.add([new], make_model(emb_seq_kwargs={"seed": 9}))
    with pytest.raises(ValueError, match=r"does not hold 1 of 2 ids: \['nope'\]"):
        index.delete(["p0", "nope"])
    assert len(index) == 6
    if folder is not None:
        assert sorted(os.listdir(folder)) == files
        index.train_approximate("HNSW8")
        with pytest.raises(ValueError, match="was not loaded and cannot be extended"):
            PassageIndex.from_pretrained(folder, search="exact").add([new], model)


def test_two_writers_do_not_undo_each_other(tmp_path):
    first = in_folder(random_index(), tmp_path / "index")
    second = PassageIndex.from_pretrained(tmp_path / "index")
    first.delete(["m1"])
    with pytest.raises(ValueError, match="was changed by another process: load it again"):
        second.delete(["m2"])
    assert len(second) == 300
    assert len(PassageIndex.from_pretrained(tmp_path / "index")) == 299


ADD_AND_DELETE_UNTIL_KILLED = """
import os, signal, sys
sys.path.insert(0, sys.argv[2])
from support.models import make_model
from modeling_cosup import PassageIndex, folder_store_cosup

def kill_at(step, module, name, calls):
    real = getattr(module, name)
    def wrapped(*args, **kwargs):
        calls.append(name)
        if len(calls) == step:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*args, **kwargs)
    setattr(module, name, wrapped)

model = make_model()  # once: a child that made it would import it all again
for step in range(1, 20):
    child = os.fork()
    if child == 0:
        index = PassageIndex.from_pretrained(sys.argv[1] + f"/{step}", allow_faiss_files=True)
        calls = []
        for name in ("seal", "write_config", "sweep"):
            kill_at(step, folder_store_cosup, name, calls)
        kill_at(step, os, "replace", calls)
        index.add([{"id": "new", "text": "word"}], model, show_progress_bar=False)
        index.delete(["p0"])
        os._exit(0)
    _, status = os.waitpid(child, 0)
    print(os.waitstatus_to_exitcode(status), flush=True)
"""


def test_a_kill_at_any_step_leaves_the_old_state_or_the_new(model, tmp_path):
    """Kill an add and a delete before a file is sealed, a config is written or renamed, or old files are removed."""
    index = PassageIndex.build(PASSAGES, model, save_directory=tmp_path / "index", show_progress_bar=False)
    index.train_approximate("HNSW8")
    for step in range(1, 20):
        shutil.copytree(tmp_path / "index", tmp_path / str(step))
    command = ["-c", ADD_AND_DELETE_UNTIL_KILLED, tmp_path, Path(__file__).parents[1]]
    result = run_forked(*command, env={"TOKENIZERS_PARALLELISM": "false"})
    codes = [int(line) for line in result.stdout.split()]
    assert len(codes) == 19, result.stderr[-2000:]
    assert set(codes) == {-signal.SIGKILL, 0}, result.stderr[-2000:]
    assert codes == sorted(codes)  # killed at every step, until there are no more steps
    states = []
    for step in range(1, 20):
        index = PassageIndex.from_pretrained(tmp_path / str(step), allow_faiss_files=True, verify=True)
        ids = {passage["id"] for passage in index}
        _, rows = index.search(queries(1, 32), 10)
        assert {passage["id"] for passage in index.get_passages(rows[0])} == ids
        states.append(("new" in ids, "p0" in ids))
        if "new" not in ids:  # the add that was interrupted can be done again
            index.add([{"id": "new", "text": "word"}], model, show_progress_bar=False)
            assert len(PassageIndex.from_pretrained(tmp_path / str(step), allow_faiss_files=True)) == 7
    assert list(dict.fromkeys(states)) == [(False, True), (True, True), (True, False)]
