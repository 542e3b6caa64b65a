"""Edge cases of search: embeddings that are not finite, shared and large pools, a GPU, wrong settings and files."""

import gzip
import json
import logging
import sys
from pathlib import Path

import faiss
import numpy as np
import pytest
import torch

from modeling_cosup import index_approximate_cosup, index_search_cosup, index_searchable_cosup
from modeling_cosup.index_approximate_cosup import empty_approximate
from modeling_cosup.index_files_cosup import Shard
from modeling_cosup.index_search_cosup import ApproximateSearch, ExactSearch, nearest
from modeling_cosup.milvus_upload_cosup import _digest
from modeling_cosup.passages_cosup import read_corpus
from support.indexes import all_scores, check_nearest, in_folder, queries, random_index

# ------------------------------------------------------------------ embeddings that are not finite


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("n", [1, 5, 70])
def test_embeddings_that_are_not_finite_are_an_error(value, n):
    index = random_index(count=10, shard_size=5)
    index._shards[1].embeddings[2, 3] = value
    with pytest.raises(ValueError, match="The index holds NaN"):
        index.to("cpu")
    for k in (1, 10):
        with pytest.raises(ValueError, match="The index holds NaN"):
            index.search(queries(n).abs(), k)
    with pytest.raises(ValueError, match="The index holds NaN"):
        index.search(queries(1).abs(), 3, candidates=[[1, 7]])


def test_products_that_overflow_are_an_error_although_the_scores_do_not():
    embeddings = torch.randn(50, 4)

    def propose(query_embeds, count, allowed):  # as a half-precision copy of large queries
        return np.full((1, count), np.nan, np.float32), np.arange(count)[None]

    with pytest.raises(ValueError, match="or scores overflow"):
        nearest(propose, lambda rows: embeddings[torch.from_numpy(rows)], 50, torch.randn(1, 4), 3)


def test_queries_with_many_equal_scores_are_searched_a_few_at_a_time(monkeypatch):
    monkeypatch.setattr(index_search_cosup, "NUMBERS", 1000)
    search = ExactSearch([Shard(None, torch.ones(300, 4))])
    asked = []

    def propose(query_embeds, count, allowed):
        asked.append((len(query_embeds), count))
        return search.propose(query_embeds, count, allowed)

    allowed = torch.ones(20, 300, dtype=torch.bool)
    allowed[:, 1] = False
    for mask, expected in ((None, [0, 1, 2]), (allowed, [0, 2, 3])):
        scores, rows = nearest(propose, search.gather, 300, torch.ones(20, 4), 3, mask)
        assert (rows == expected).all()
        assert (scores == 4).all()
    further = [(n, count) for n, count in asked if count > 11]
    assert len(further) >= 8
    assert all(n * count <= 1100 for n, count in further)


def test_results_that_faiss_leaves_empty_are_no_rows(monkeypatch):
    index = random_index(count=10, shard_size=5)

    def find_nothing(query_embeds, block, k, metric):
        shape = (len(query_embeds), k)
        return np.full(shape, np.finfo(np.float32).min), np.full(shape, -1, np.int64)

    monkeypatch.setattr(faiss, "knn", find_nothing)
    scores, rows = index._exact.search(queries(1), 4)
    assert scores.dtype == np.float32
    assert (rows == -1).all()
    assert (scores == -np.inf).all()


def test_exact_search_works_without_faiss(monkeypatch):
    index = random_index(300)
    for count in (1, 5, 70):
        expected = index.search(queries(count), k=7)
        monkeypatch.setattr(index_search_cosup, "faiss", None)
        monkeypatch.setattr(index_approximate_cosup, "faiss", None)
        scores, rows = random_index(300).search(queries(count), k=7)
        monkeypatch.undo()
        assert (rows == expected[1]).all()
        np.testing.assert_allclose(scores, expected[0], rtol=1e-5, atol=1e-6)
    monkeypatch.setattr(index_approximate_cosup, "faiss", None)
    with pytest.raises(ImportError, match="Approximate search needs faiss: pip install faiss-cpu"):
        index.train_approximate("HNSW8")


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
    half = np.random.default_rng(0).choice(300, 150)  # some rows several times
    pools = [few, all_rows, few, few.copy(), None, half]
    pools += [all_rows.copy(), half[::-1], [0, 3], all_rows, np.array([4], np.int32), half]
    query_embeds = queries(len(pools))
    for k in (1, 4, 200):
        scores, rows = index.search(query_embeds, k, candidates=pools)
        for i, pool in enumerate(pools):
            allowed = alive
            if pool is not None:
                in_pool = torch.zeros(300, dtype=torch.bool)
                in_pool[[int(row) for row in pool]] = True
                allowed = alive & in_pool
            count = min(k, int(allowed.sum()))
            if count:
                found = scores[i : i + 1, :count], rows[i : i + 1, :count]
                check_nearest(found, all_scores(index, query_embeds[i : i + 1], allowed))
            assert (rows[i, count:] == -1).all()
            assert (scores[i, count:] == -np.inf).all()


def test_equal_pools_are_gathered_once_and_large_ones_never(monkeypatch):
    gathered = []
    gather = ExactSearch.gather

    def note_and_gather(self, rows):
        gathered.append(len(rows))
        return gather(self, rows)

    monkeypatch.setattr(ExactSearch, "gather", note_and_gather)
    index = random_index()
    pool = np.arange(20)
    index.search(queries(4), candidates=[pool, pool, pool.copy(), [1, 2]])
    assert sorted(gathered) == [2, 20]
    index.search(queries(4), candidates=[np.arange(31 + i) for i in range(4)])
    assert gathered[2:] == [4 * (1 + index_search_cosup.SPARE)]  # only rows that all products have proposed


def test_rows_of_one_array_are_separate_pools():
    pools = np.arange(40).reshape(20, 2)
    _, rows = random_index().search(queries(20), candidates=pools)
    assert (rows[:, 0] // 2).tolist() == list(range(20))


@pytest.mark.parametrize(("pool", "dtype"), [(np.ones(300, bool), "bool"), ([1.0, 2.0], "float64"), (["m1"], "<U2")])
def test_candidates_are_integers(pool, dtype):
    with pytest.raises(ValueError, match=rf"candidates\[1\]: found {dtype}, expected integers"):
        random_index().search(queries(2), candidates=[None, pool])


# ------------------------------------------------------------------ approximate indexes


def test_an_approximate_index_on_a_gpu_is_a_copy(tmp_path, monkeypatch):
    """A clone on the CPU stands in for the one on a GPU."""
    index = random_index()
    index.train_approximate("IVF4,Flat", nprobe=4)
    on_cpu = index._approximate
    monkeypatch.setattr(faiss, "StandardGpuResources", object, raising=False)
    monkeypatch.setattr(
        faiss, "index_cpu_to_gpu", lambda resources, number, cpu: faiss.clone_index(cpu), raising=False
    )
    assert index.to("cuda") is index
    assert index._gpu is not None
    assert index._approximate is on_cpu
    assert index._device is None  # no copy of the embeddings
    check_nearest(index.search(queries(5), 4), all_scores(index, queries(5)))
    index.set_search_options(nprobe=1)
    assert index._gpu.index.nprobe == on_cpu.index.nprobe == 1
    index.save_pretrained(tmp_path / "index")
    assert index.to(None)._gpu is None
    assert index._approximate is on_cpu

    def refuse(*args):
        raise RuntimeError("This index type is not implemented on GPU.")

    monkeypatch.setattr(faiss, "index_cpu_to_gpu", refuse)
    with pytest.raises(ValueError, match="on a GPU; load with search='exact'.*not implemented on GPU"):
        index.to("cuda")
    assert index._gpu is None
    assert isinstance(index._approximate, ApproximateSearch)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("IVF4Flat", 100, {}), "index_factory 'IVF4Flat' of 16 dimensions .* FAISS says"),
        (("IVF400,Flat", 100, {}), "400 lists need at least as many training embeddings"),
        (("HNSW8", 0, {}), "train_size is 0"),
        (("HNSW8", 100, {"nprobe": 3}), "has no search option 'nprobe'"),
    ],
)
def test_an_empty_index_reveals_a_wrong_setting(arguments, message):
    factory, train_size, options = arguments
    with pytest.raises(ValueError, match=message):
        empty_approximate(factory, 16, train_size, **options)
    assert empty_approximate("IVF4,Flat", 16, 100, nprobe=2).nprobe == 2


def test_the_recipe_checks_before_it_embeds(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "recipes"))
    recipe = pytest.importorskip("build_index")
    required = {"model": "m", "corpus_file": "c", "output_dir": "o"}
    for options, message in [
        ({"index_factory": "HNSW8", "nprobe": 3}, "no search option 'nprobe'"),
        ({"index_factory": "Graph"}, "index_factory 'Graph'"),
        ({"ef_search": 3}, "--ef_search 3 is for an approximate index: give --index_factory"),
        ({"train_size": 9}, "--train_size 9 is for an approximate index: give --index_factory"),
        ({"seed": 1}, "--seed 1 is for an approximate index: give --index_factory"),
        ({"milvus_index_type": "HNSW"}, "--milvus_index_type HNSW is for an upload to Milvus: give --index_uri"),
        ({"milvus_index_params": {"M": 9}}, "--milvus_index_params .* is for an upload to Milvus"),
        ({"encoder_url": "http://h", "max_tokens_per_batch": 9}, "limits a forward of this process"),
        ({"batch_size": 0}, "batch_size is 0, expected at least 1"),
    ]:
        with pytest.raises(ValueError, match=message):
            recipe.check(recipe.IndexArguments(**required, **options), 16)
    recipe.check(recipe.IndexArguments(**required, index_factory="HNSW8", ef_search=3), 16)
    for params in (None, {}, "{ }"):  # a config may say that there are none
        recipe.check(recipe.IndexArguments(**required, milvus_index_params=params), 16)
    sys.modules.pop("build_index")


def test_the_recall_is_shown_and_needs_passages(monkeypatch):
    index = random_index()
    warnings = []
    monkeypatch.setattr(logging.getLogger("modeling_cosup.index_searchable_cosup"), "warning", warnings.append)
    index.train_approximate("HNSW8")
    (warning,) = warnings
    assert "ann_recall@10" in warning
    index.delete([f"m{row}" for row in range(300)])
    with pytest.raises(ValueError, match="All passages of this index were deleted"):
        index.measure_recall()
    with pytest.raises(ValueError, match="All passages of this index were deleted"):
        index.train_approximate("HNSW8")


def test_a_recall_is_of_an_approximate_index_and_at_least_one_query(monkeypatch):
    index = random_index()
    with pytest.raises(ValueError, match="This index is searched exactly: call train_approximate first"):
        index.measure_recall()
    monkeypatch.setattr(index_searchable_cosup, "make_approximate", None)  # refused before anything is trained
    for wrong, message in [
        (torch.empty(0, 16), "There is no query"),
        (torch.zeros(3, 99), "Queries have 99 dimensions"),
        (torch.full((2, 16), torch.nan), "NaN or infinite in rows"),
    ]:
        with pytest.raises(ValueError, match=message):
            index.train_approximate("HNSW8", queries=wrong)
    monkeypatch.undo()
    index.train_approximate("HNSW8")
    with pytest.raises(ValueError, match="There is no query"):
        index.measure_recall(torch.empty(0, 16))
    with pytest.raises(ValueError, match="There is nothing to compare with exact search"):
        index_approximate_cosup.recall(np.empty((0, 3), int), np.empty((0, 3), int))


def test_a_failure_keeps_the_search_options_of_before(tmp_path):
    index = in_folder(random_index(), tmp_path / "index")
    index.train_approximate("IVF4,Flat", nprobe=4)
    with pytest.raises(ValueError, match="Queries have 99 dimensions"):
        index.train_approximate("HNSW8", queries=torch.zeros(3, 99), efSearch=300)
    with pytest.raises(ValueError, match="no search option 'efSearch'"):
        index.set_search_options(nprobe=2, efSearch=300)
    assert index._approximate.index.nprobe == 4
    assert index._search_options == {"nprobe": 4}  # what `add` sets on the extended index


# ------------------------------------------------------------------ an upload, and files of a corpus


@pytest.mark.parametrize("folder", [False, True])
def test_the_digest_of_an_upload_depends_on_every_passage(tmp_path, folder):
    indexes = [random_index() for _ in range(4)]
    indexes[1]._shards[0].embeddings[1, 0] += 1
    indexes[2].delete(["m1"])
    if folder:
        indexes = [in_folder(index, tmp_path / str(i)) for i, index in enumerate(indexes)]
    digests = [_digest(index, "FLAT", {}) for index in indexes]
    assert digests[0] == digests[3]
    assert len(set(digests)) == 3


def test_damaged_corpus_files_are_named(tmp_path):
    lines = "".join(json.dumps({"id": f"{i}", "text": f"{i * i}"}) + "\n" for i in range(500))
    whole = gzip.compress(lines.encode())
    contents = {
        "cut": whole[:-40],
        "plain": lines.encode(),
        "altered": whole[:200] + b"\xff" * 200 + whole[400:],
    }
    for name, data in contents.items():
        path = tmp_path / f"{name}.jsonl.gz"
        path.write_bytes(data)
        with pytest.raises(ValueError, match=f"{name}.jsonl.gz(, line| is damaged: )"):
            list(read_corpus(path))
    pa = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "a.parquet"
    columns = {"id": [f"{i}" for i in range(5000)], "text": [f"{i * i}" for i in range(5000)]}
    parquet.write_table(pa.table(columns), path)
    data = bytearray(path.read_bytes())
    data[4:4000] = b"\xff" * 3996
    path.write_bytes(bytes(data))
    with pytest.raises(ValueError, match="a.parquet is damaged: "):
        list(read_corpus(path))


def test_a_corpus_of_several_files(tmp_path):
    plain, zipped = tmp_path / "a.jsonl", tmp_path / "b.jsonl.gz"
    plain.write_text('{"id": "a", "text": "x"}\n')
    zipped.write_bytes(gzip.compress(b'{"id": "b", "text": "y"}\n'))
    passages = [(where, passage["id"]) for where, passage in read_corpus([plain, str(zipped)])]
    assert passages == [(f"{plain}, line 1", "a"), (f"{zipped}, line 1", "b")]
