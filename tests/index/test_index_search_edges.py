"""Searching an index at its edges: embeddings that are not finite, shared and large pools, copies on a GPU, settings and files that are wrong."""

import gzip
import json
import logging
import sys
from pathlib import Path

import faiss
import numpy as np
import pytest
import torch

from modeling_cosup import index_search_cosup
from modeling_cosup.index_search_cosup import ApproximateSearch, ExactSearch, empty_approximate
from modeling_cosup.milvus_upload_cosup import _digest
from modeling_cosup.passages_cosup import read_corpus
from support.indexes import all_scores, check, in_folder, queries, random_index

# ------------------------------------------------------------------ embeddings that are not finite


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("n", [1, 5, 70])
@pytest.mark.parametrize("where", ["files", "device"])
def test_embeddings_that_are_not_finite_are_an_error(value, n, where):
    index = random_index(count=10, shard_size=5)
    index._shards[1].embeddings[2, 3] = value
    index.to("cpu" if where == "device" else None)
    for k in (1, 10):
        with pytest.raises(ValueError, match="The index holds NaN"):
            index.search(queries(n).abs(), k)
    with pytest.raises(ValueError, match="The index holds NaN"):
        index.search(queries(1).abs(), 3, candidates=[[1, 7]])


def test_what_faiss_does_not_find_is_no_row(monkeypatch):
    index = random_index(count=10, shard_size=5)
    lowest = np.finfo(np.float32).min
    monkeypatch.setattr(
        faiss, "knn", lambda q, block, k, metric: (np.full((len(q), k), lowest), np.full((len(q), k), -1, np.int64))
    )
    scores, rows = index._exact.search(queries(1), 4)
    assert (rows == -1).all() and (scores == -np.inf).all() and scores.dtype == np.float32


# ------------------------------------------------------------------ pools


@pytest.mark.parametrize("where", ["memory", "device", "deleted"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_shared_equal_large_and_repeating_pools(where, dtype, monkeypatch):
    monkeypatch.setattr(index_search_cosup, "MASK_BYTES", 900)  # masks of three queries
    monkeypatch.setattr(index_search_cosup, "PRODUCT_ROWS", 30)
    index = random_index(dtype=dtype)
    alive = torch.ones(300, dtype=torch.bool)
    if where == "device":
        index.to("cpu")
    if where == "deleted":
        alive[::3] = False
        index.delete([f"m{row}" for row in range(0, 300, 3)])
    few, all_rows = np.array([7, 80, 7, 200, 6]), np.arange(300)
    half = np.random.default_rng(0).choice(300, 150)  # some of them several times
    pools = [
        few,
        all_rows,
        few,
        few.copy(),
        None,
        half,
        all_rows.copy(),
        half[::-1],
        [0, 3],
        all_rows,
        np.array([4], np.int32),
        half,
    ]
    for k in (1, 4, 200):
        scores, rows = index.search(queries(len(pools)), k, candidates=pools)
        for i, pool in enumerate(pools):
            allowed = (
                alive.clone()
                if pool is None
                else torch.zeros(300, dtype=torch.bool).index_fill(0, torch.tensor(list(map(int, pool))), True) & alive
            )
            count = min(k, int(allowed.sum()))
            if count:
                check(
                    (scores[i : i + 1, :count], rows[i : i + 1, :count]),
                    all_scores(index, queries(len(pools))[i : i + 1], allowed),
                )
            assert (rows[i, count:] == -1).all() and (scores[i, count:] == -np.inf).all()


def test_equal_pools_are_gathered_once_and_large_ones_never(monkeypatch):
    gathered, gather = [], ExactSearch.gather
    monkeypatch.setattr(ExactSearch, "gather", lambda self, rows: gathered.append(len(rows)) or gather(self, rows))
    index, pool = random_index(), np.arange(20)
    index.search(queries(4), candidates=[pool, pool, pool.copy(), [1, 2]])
    assert sorted(gathered) == [2, 20]
    index.search(queries(4), candidates=[np.arange(31 + i) for i in range(4)])
    assert len(gathered) == 2


def test_rows_of_one_array_are_pools_of_their_own():
    pools = np.arange(40).reshape(20, 2)
    assert (index_rows := random_index().search(queries(20), candidates=pools)[1][:, 0] // 2).tolist() == list(
        range(20)
    ), index_rows


@pytest.mark.parametrize(("pool", "dtype"), [(np.ones(300, bool), "bool"), ([1.0, 2.0], "float64"), (["m1"], "<U2")])
def test_candidates_are_integers(pool, dtype):
    with pytest.raises(ValueError, match=rf"candidates\[1\] is of {dtype}, expected integers"):
        random_index().search(queries(2), candidates=[None, pool])


# ------------------------------------------------------------------ approximate indexes


def test_an_approximate_index_on_a_gpu_is_a_copy(tmp_path, monkeypatch):
    """The GPU is played by a clone on the CPU."""
    index = random_index()
    index.train_approximate("IVF4,Flat", nprobe=4)
    own = index._approximate
    monkeypatch.setattr(faiss, "StandardGpuResources", object, raising=False)
    monkeypatch.setattr(
        faiss, "index_cpu_to_gpu", lambda resources, number, cpu: faiss.clone_index(cpu), raising=False
    )
    assert index.to("cuda") is index
    assert index._gpu is not None and index._approximate is own and index._device is None  # no copy of the embeddings
    check(index.search(queries(5), 4), all_scores(index, queries(5)))
    index.set_search_options(nprobe=1)
    assert index._gpu.index.nprobe == own.index.nprobe == 1
    index.save_pretrained(tmp_path / "index")
    assert index.to(None)._gpu is None and index._approximate is own

    def refuse(*args):
        raise RuntimeError("This index type is not implemented on GPU.")

    monkeypatch.setattr(faiss, "index_cpu_to_gpu", refuse)
    with pytest.raises(ValueError, match="on a GPU; load with search='exact'.*not implemented on GPU"):
        index.to("cuda")
    assert index._gpu is None and isinstance(index._approximate, ApproximateSearch)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("IVF4Flat", 100, {}), "index_factory 'IVF4Flat' of 16 dimensions .* FAISS says"),
        (("IVF400,Flat", 100, {}), "400 lists need at least as many training embeddings"),
        (("HNSW8", 0, {}), "train_size is 0"),
        (("HNSW8", 100, {"nprobe": 3}), "has no search option 'nprobe'"),
    ],
)
def test_a_wrong_setting_is_told_on_an_empty_index(arguments, message):
    factory, train_size, options = arguments
    with pytest.raises(ValueError, match=message):
        empty_approximate(factory, 16, train_size, **options)
    assert empty_approximate("IVF4,Flat", 16, 100, nprobe=2).nprobe == 2


def test_the_recipe_checks_before_it_embeds(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "recipes"))
    recipe = pytest.importorskip("build_index")
    given = {"model": "m", "corpus_file": "c", "output_dir": "o"}
    for options, message in [
        ({"index_factory": "HNSW8", "nprobe": 3}, "no search option 'nprobe'"),
        ({"index_factory": "Graph"}, "index_factory 'Graph'"),
        ({"ef_search": 3}, "need an index_factory"),
        ({"batch_size": 0}, "batch_size is 0, expected at least 1"),
    ]:
        with pytest.raises(ValueError, match=message):
            recipe.check(recipe.IndexArguments(**given, **options), 16)
    recipe.check(recipe.IndexArguments(**given, index_factory="HNSW8", ef_search=3), 16)
    sys.modules.pop("build_index")


def test_the_recall_is_shown_and_needs_passages(monkeypatch):
    index, shown = random_index(), []
    monkeypatch.setattr(logging.getLogger("modeling_cosup.index_searchable_cosup"), "warning", shown.append)
    index.train_approximate("HNSW8")
    assert len(shown) == 1 and "ann_recall@10" in shown[0]
    index.delete([f"m{row}" for row in range(300)])
    for call in (index.measure_recall, lambda: index.train_approximate("HNSW8")):
        with pytest.raises(ValueError, match="All passages of this index were deleted"):
            call()


# ------------------------------------------------------------------ an upload, and files of a corpus


@pytest.mark.parametrize("folder", [False, True])
def test_the_digest_of_an_upload_tells_every_passage(tmp_path, folder):
    indexes = [random_index(), random_index(), random_index(), random_index()]
    indexes[1]._shards[0].embeddings[1, 0] += 1
    indexes[2].delete(["m1"])
    if folder:
        indexes = [in_folder(index, tmp_path / str(i)) for i, index in enumerate(indexes)]
    digests = [_digest(index, "FLAT", {}) for index in indexes]
    assert digests[0] == digests[3] and len(set(digests)) == 3


def test_damaged_corpus_files_are_named(tmp_path):
    lines = "".join(json.dumps({"id": f"{i}", "text": f"{i * i}"}) + "\n" for i in range(500))
    whole = gzip.compress(lines.encode())
    for name, data in [
        ("cut", whole[:-40]),
        ("plain", lines.encode()),
        ("altered", whole[:200] + b"\xff" * 200 + whole[400:]),
    ]:
        path = tmp_path / f"{name}.jsonl.gz"
        path.write_bytes(data)
        with pytest.raises(ValueError, match=f"{name}.jsonl.gz(, line| is damaged: )"):
            list(read_corpus(path))
    pa = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "a.parquet"
    parquet.write_table(
        pa.table({"id": [f"{i}" for i in range(5000)], "text": [f"{i * i}" for i in range(5000)]}), path
    )
    data = bytearray(path.read_bytes())
    data[4:4000] = b"\xff" * 3996
    path.write_bytes(bytes(data))
    with pytest.raises(ValueError, match="a.parquet is damaged: "):
        list(read_corpus(path))


def test_a_corpus_of_several_files(tmp_path):
    paths = [tmp_path / "a.jsonl", str(tmp_path / "b.jsonl.gz")]
    paths[0].write_text('{"id": "a", "text": "x"}\n')
    Path(paths[1]).write_bytes(gzip.compress(b'{"id": "b", "text": "y"}\n'))
    assert [(where, passage["id"]) for where, passage in read_corpus(paths)] == [
        (f"{paths[0]}, line 1", "a"),
        (f"{paths[1]}, line 1", "b"),
    ]
