"""What generate() and its users can rely on with every back end: in memory, on disk, approximate, in Milvus."""

import inspect
import itertools
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import LogitsProcessorList

from modeling_cosup import PassageIndex, Retriever, milvus_cosup
from modeling_cosup.milvus_cosup import MilvusPassageIndex
from modeling_cosup.retriever_cosup import check_fingerprint, content_digest
from modeling_cosup.tokenization_cosup import encode_passages_for_gen, encode_prompt
from support.generation import Steer, left_pad
from support.models import PASSAGES, make_model
from trainer.judging.judge import evaluate_tasks
from trainer.judging.tasks import Task

EXACT = ["memory", "disk", "torch-cpu", "milvus-file", "milvus-server"]
TOLERANCES = {"float16": 5e-3}  # of scores; others: 1e-5
APPROXIMATE = ["faiss-hnsw", "milvus-hnsw"]
ALL = [*EXACT, *TOLERANCES, *APPROXIMATE]

ODD = [
    "\"quoted\" and 'quoted'",
    "back\\slash \\n \\",
    "new\nline\r\n\ttab",
    "emoji 😀 ünï 東京",
    "{a} % $meta",
    "bell \x07 end",
    "NULL",
    " spaces ",
]
CORPUS = [
    {"id": f"{i}", "title": f"Title {i % 7}" if i % 3 else "", "text": f"{i} {'radium ' * (i % 5)}in {i * i}"}
    for i in range(40)
]
CORPUS += [{"id": text, "title": text, "text": f"{text} {i}"} for i, text in enumerate(ODD)]
for number, passage in enumerate(CORPUS[::3]):
    passage["metadata"] = {
        "source": "a.pdf",
        "page": number,
        "score": 0.1,
        "largest": 2**63 - 1,
        "deep": [{"a": None}],
    }
for passage in CORPUS[-4:]:
    passage["metadata"] = {passage["id"]: passage["title"]}
collection_names = (f"index{i}" for i in itertools.count())


def make(name, model, passages, folder, request):
    """Return a retriever over `passages`, and a function that opens it again, or `None` for one in memory."""
    if name.startswith("milvus"):
        collection = next(collection_names)
        if name == "milvus-file":
            uri = str(folder / "passages.db")
        else:
            uri = request.getfixturevalue("milvus_server").uri
        options = {}
        if name == "milvus-hnsw":
            options = {"index_type": "HNSW", "index_params": {"M": 8, "efConstruction": 32}}
        index = model.build_index(passages, show_progress_bar=False)
        retriever = MilvusPassageIndex.from_index(index, uri, collection, show_progress_bar=False, **options)
        return retriever, lambda: MilvusPassageIndex(uri, collection)
    if name in ("disk", "faiss-hnsw"):
        index = model.build_index(passages, save_directory=folder / "index", shard_size=4, show_progress_bar=False)
        if name == "faiss-hnsw":
            index.train_approximate("HNSW16")
        return index, lambda: PassageIndex.from_pretrained(folder / "index", allow_faiss_files=True)
    dtype = "float16" if name == "float16" else "float32"
    index = model.build_index(passages, show_progress_bar=False, dtype=dtype)
    if name == "torch-cpu":
        index.to("cpu")
    return index, None


@pytest.fixture(scope="module")
def the_model():
    return make_model()


@pytest.fixture(scope="module")
def embeddings(the_model):
    """Embeddings of `CORPUS` without any index, `(M, h)`."""
    return the_model.build_index(CORPUS, show_progress_bar=False).embeddings.clone()


@pytest.fixture(scope="module", params=ALL)
def name(request):
    return request.param


@pytest.fixture(scope="module")
def retriever(name, request, the_model, tmp_path_factory):
    """A retriever over `CORPUS`, row by row, for reading only."""
    retriever, _ = make(name, the_model, CORPUS, tmp_path_factory.mktemp("retriever"), request)
    return retriever


@pytest.fixture
def changeable(name, request, the_model, tmp_path):
    """A retriever over the six `PASSAGES`, and a function that opens it again."""
    return make(name, the_model, PASSAGES, tmp_path, request)


def queries(n=9, seed=0):
    return torch.randn(n, 32, generator=torch.Generator().manual_seed(seed))


def check_results(scores, rows, query_embeds, embeddings, k, name, pools=None):
    """Compare results with the plain product; rows of equal scores may be in any order."""
    assert scores.shape == rows.shape == (len(query_embeds), k)
    assert scores.dtype == np.float32 and rows.dtype == np.int64
    products = (query_embeds.float() @ embeddings.T).numpy()
    if pools is None:
        pools = [None] * len(query_embeds)
    for query_products, query_scores, query_rows, pool in zip(products, scores, rows, pools, strict=True):
        check_result(query_products, query_scores, query_rows, k, name, pool)


def check_result(products, scores, rows, k, name, pool):
    """Compare the result of one query with its products with all passages."""
    tolerance = {"rtol": TOLERANCES.get(name, 1e-5), "atol": TOLERANCES.get(name, 1e-5)}
    allowed = list(range(len(products))) if pool is None else sorted(set(pool.tolist()))
    num_found = min(k, len(allowed))
    if name in APPROXIMATE and pool is None:
        num_found = np.count_nonzero(rows >= 0)
        assert num_found >= min(k, 10)  # at least some
    assert (rows[num_found:] == -1).all()
    assert (scores[num_found:] == -np.inf).all()
    scores, rows = scores[:num_found], rows[:num_found]
    assert set(rows.tolist()) <= set(allowed)
    assert len(set(rows.tolist())) == num_found
    assert (scores[:-1] >= scores[1:]).all()
    np.testing.assert_allclose(scores, products[rows], **tolerance)
    if name not in APPROXIMATE:
        expected = np.sort(products[allowed])[::-1][:k]
        np.testing.assert_allclose(scores, expected, **tolerance)


# ------------------------------------------------------------------ one interface

MEMBERS = {name for name in vars(Retriever) if name == "__len__" or not name.startswith("_")}
# Further members of all back ends in this package
ALSO_SHARED = {"__getitem__", "__iter__", "add", "delete", "find", "get_embeddings", "num_rows", "row_of"}


def parameters(kind, name):
    """Return names and defaults of a method's parameters, in order; `None` for anything but a method of the class."""
    member = getattr(kind, name, None)
    if not callable(member):
        return None
    defaults = {name: parameter.default for name, parameter in inspect.signature(member).parameters.items()}
    defaults.pop("shard_size", None)  # a collection has no shards
    return list(defaults.items())


def test_every_back_end_is_a_retriever(retriever):
    assert isinstance(retriever, Retriever)
    for name in MEMBERS | ALSO_SHARED:
        assert hasattr(retriever, name)
        assert parameters(type(retriever), name) == parameters(PassageIndex, name)
        if name in MEMBERS:
            assert parameters(type(retriever), name) == parameters(Retriever, name)


def test_an_object_that_lacks_a_member_is_no_retriever():
    assert MEMBERS == {"__len__", "check_model", "fingerprint", "get_passages", "live_rows", "rows_of", "search"}
    for name in MEMBERS:
        lacking = type("Lacking", (), dict.fromkeys(MEMBERS - {name}))()
        assert not isinstance(lacking, Retriever)


class ProductRetriever:
    """The smallest back end: a [`Retriever`] over arrays in memory, by one product. Records which members are used."""

    def __init__(self, index):
        self.passages = list(index)
        self.embeddings = index.embeddings.numpy()
        self.model_fingerprint = index.fingerprint
        self.used = set()

    @property
    def fingerprint(self):
        self.used.add("fingerprint")
        return self.model_fingerprint

    def __len__(self):
        self.used.add("__len__")
        return len(self.passages)

    def search(self, query_embeds, k=1, candidates=None):
        self.used.add("search")
        k = min(k, len(self.passages))
        products = query_embeds.float().cpu().numpy() @ self.embeddings.T
        for i, pool in enumerate(candidates or []):
            if pool is not None:
                products[i, np.setdiff1d(np.arange(len(self.passages)), pool)] = -np.inf
        rows = np.argsort(-products, axis=1, kind="stable")[:, :k]
        scores = np.take_along_axis(products, rows, 1)
        return scores, np.where(scores == -np.inf, -1, rows)

    def get_passages(self, rows):
        self.used.add("get_passages")
        return [dict(self.passages[row]) for row in rows]

    def rows_of(self, ids):
        self.used.add("rows_of")
        rows = {passage["id"]: row for row, passage in enumerate(self.passages)}
        return np.array([rows[id] for id in ids], np.int64)

    def live_rows(self):
        self.used.add("live_rows")
        return np.arange(len(self.passages))

    def check_model(self, model):
        self.used.add("check_model")
        check_fingerprint(self.model_fingerprint, model)


def test_generation_and_judging_use_exactly_these_members(the_model, monkeypatch, tmp_path):
    index = the_model.build_index(PASSAGES, show_progress_bar=False)
    smallest = ProductRetriever(index)
    assert isinstance(smallest, Retriever)
    eval_file = tmp_path / "eval.jsonl"
    ids = [passage["id"] for passage in PASSAGES]
    questions = [
        {"id": f"q{i}", "input": f"question {i}?", "answers": ["x"], "provenance": [[id]], "candidates": ids}
        for i, id in enumerate(ids)
    ]
    eval_file.write_text("".join(json.dumps(question) + "\n" for question in questions))
    tasks = [
        Task("full", str(eval_file), index="full", max_new_tokens=6),
        Task("pool", str(eval_file), index="pool", pool=4, max_new_tokens=6),
    ]
    metrics = {"files": {}, "product": {}}
    for name, retriever in (("files", index), ("product", smallest)):
        monkeypatch.setattr(the_model, "load_index", lambda *args, retriever=retriever, **kwargs: retriever)
        results = evaluate_tasks(the_model, tasks, tmp_path / name, ["retrieval", "forced", "gold", "wrong"])
        for task in ("full", "pool"):
            for mode, mode_results in results["tasks"][task]["modes"].items():
                metrics[name][task, mode] = mode_results["metrics"]
    assert metrics["files"]
    assert metrics["files"] == metrics["product"]
    assert smallest.used == MEMBERS
    with pytest.raises(ValueError, match="  emb_seq: "):
        run(make_model(emb_seq_kwargs={"seed": 9}), smallest)


# ------------------------------------------------------------------ search


@pytest.mark.parametrize("k", [1, 5, len(CORPUS)])
def test_search_equals_topk_of_the_product(name, retriever, embeddings, k):
    check_results(*retriever.search(queries(), k=k), queries(), embeddings, k, name)


def test_a_k_above_the_number_of_passages(name, retriever, embeddings):
    assert len(retriever) == len(CORPUS)
    check_results(*retriever.search(queries(3), k=10_000), queries(3), embeddings, len(CORPUS), name)


def test_one_passage_is_the_default(retriever):
    assert [part.shape for part in retriever.search(queries())] == [(9, 1), (9, 1)]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_any_float_dtype(name, retriever, embeddings, dtype):
    query_embeds = queries().to(dtype).requires_grad_()
    check_results(*retriever.search(query_embeds, k=3), query_embeds.detach().float(), embeddings, 3, name)


@pytest.mark.parametrize("candidates", [None, []])
def test_no_query(retriever, candidates):
    scores, rows = retriever.search(torch.zeros(0, 32), k=3, candidates=candidates)
    assert scores.shape == rows.shape == (0, 3) and scores.dtype == np.float32 and rows.dtype == np.int64


def test_many_queries_in_one_call(name, retriever, embeddings):
    check_results(*retriever.search(queries(300), k=2), queries(300), embeddings, 2, name)


POOLS = [
    np.array([3, 1, 40], np.int64),
    None,
    np.arange(48),
    np.array([7], np.int64),
    np.array([], np.int64),
    np.array([5, 5, 9], np.int64),
]


@pytest.mark.parametrize("k", [1, 2, 5])
def test_candidates_of_each_query(name, retriever, embeddings, k):
    check_results(*retriever.search(queries(6), k=k, candidates=POOLS), queries(6), embeddings, k, name, POOLS)


def test_large_and_small_pools_find_the_same(name, retriever, embeddings, monkeypatch):
    monkeypatch.setattr(milvus_cosup, "LARGE_POOL", 2)
    monkeypatch.setattr(milvus_cosup, "MAX_FILTER_ROWS", 20)
    for k in (1, 5, 30):
        check_results(*retriever.search(queries(6), k=k, candidates=POOLS), queries(6), embeddings, k, name, POOLS)


def test_no_candidates_and_none_for_each_query_are_the_same(retriever):
    scores, rows = retriever.search(queries(4), k=3)
    same_scores, same_rows = retriever.search(queries(4), k=3, candidates=[None] * 4)
    np.testing.assert_array_equal(scores, same_scores)
    np.testing.assert_array_equal(rows, same_rows)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"query_embeds": torch.randn(2, 16)}, "16.* 32"),
        ({"query_embeds": torch.randn(2, 64), "candidates": [[1], None]}, "64.* 32"),
        ({"k": 0}, "k is 0|k=0|at least 1"),
        ({"k": -1}, "k is -1|k=-1|at least 1"),
        ({"candidates": [[0]]}, "1.*2"),
        ({"candidates": [[0, 48], None]}, "48"),
        ({"candidates": [None, [-1]]}, "-1"),
    ],
)
def test_bad_arguments(retriever, arguments, message):
    with pytest.raises(ValueError, match=message):
        retriever.search(**{"query_embeds": queries(2), **arguments})


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_queries_that_are_not_finite_are_named(retriever, value):
    query_embeds = queries(5)
    query_embeds[[1, 3], 7] = value
    for candidates in (None, [[0]] * 5):
        with pytest.raises(ValueError, match="1, 3"):
            retriever.search(query_embeds, candidates=candidates)


# ------------------------------------------------------------------ passages


def test_passages_are_as_gen_reads_them(retriever, the_model):
    ids = encode_passages_for_gen(the_model.tokenizer, CORPUS, the_model.config)
    expected = [{**passage, "input_ids": row} for passage, row in zip(CORPUS, ids, strict=True)]
    assert retriever.get_passages(range(len(CORPUS))) == expected
    rows = np.array([47, 3, 41, 3, 0], np.int64)
    assert retriever.get_passages(rows) == [expected[row] for row in rows]
    assert [retriever[row] for row in rows] == [expected[row] for row in rows]
    assert retriever.get_passages([]) == []
    input_ids = retriever[3]["input_ids"]
    assert type(input_ids) is list
    assert {type(id) for id in input_ids} == {int}


@pytest.mark.parametrize("rows", [[48], [0, 1_000_000], [-1]])
def test_rows_that_do_not_exist(retriever, rows):
    with pytest.raises(IndexError, match=str(rows[-1])):
        retriever.get_passages(rows)


def test_rows_of_ids(retriever):
    ids = [passage["id"] for passage in CORPUS]
    rows = retriever.rows_of(ids)
    assert isinstance(rows, np.ndarray) and rows.dtype == np.int64
    assert rows.tolist() == list(range(len(CORPUS)))
    assert retriever.rows_of([ids[44], ids[2], ids[44]]).tolist() == [44, 2, 44]
    nothing = retriever.rows_of([])
    assert nothing.shape == (0,) and nothing.dtype == np.int64


def test_one_id_and_ids_that_may_be_missing(retriever):
    assert retriever.row_of(CORPUS[44]["id"]) == 44
    with pytest.raises(KeyError, match="x1"):
        retriever.row_of("x1")
    rows = retriever.find([CORPUS[5]["id"], "x1", CORPUS[41]["id"], "x1"])
    assert rows.dtype == np.int64
    assert rows.tolist() == [5, -1, 41, -1]
    assert retriever.find([]).shape == (0,)
    for method in (retriever.find, retriever.rows_of):
        with pytest.raises(ValueError, match="3 is not a passage id, expected a string"):
            method(["0", 3])


def test_a_single_string_is_not_read_as_its_characters(retriever):
    """Its characters "1" and "2" are ids too."""
    for method in (retriever.find, retriever.rows_of, retriever.delete):
        with pytest.raises(ValueError, match=r"ids is the string '12', expected a list of passage ids: \['12'\]"):
            method("12")
    assert retriever.find(["1", "2", "12"]).tolist() == [1, 2, 12]


@pytest.mark.parametrize(
    ("rows", "dtype"), [(["7"], "<U1"), ([1.9], "float64"), (np.array([False, True]), "bool"), ([None], "object")]
)
def test_rows_are_integers(retriever, rows, dtype):
    for method in (retriever.get_passages, retriever.get_embeddings):
        with pytest.raises(ValueError, match=f"rows: found {dtype}, expected integers"):
            method(rows)
    with pytest.raises(ValueError, match=f"rows: found {dtype}, expected integers"):
        retriever[rows[0]]


def test_embeddings_of_rows(name, retriever, embeddings):
    tolerance = {"rtol": TOLERANCES.get(name, 1e-5), "atol": TOLERANCES.get(name, 1e-5)}
    rows = [7, 3, 47, 3]
    found = retriever.get_embeddings(rows)
    assert found.dtype == np.float32 and found.shape == (4, 32)
    np.testing.assert_allclose(found, embeddings[rows].numpy(), **tolerance)
    assert retriever.get_embeddings(np.array([], np.int64)).shape == (0, 32)
    for wrong in ([48], [0, -1]):
        with pytest.raises(IndexError, match=str(wrong[-1])):
            retriever.get_embeddings(wrong)


def test_all_rows_and_all_passages(retriever):
    rows = retriever.live_rows()
    assert isinstance(rows, np.ndarray) and rows.dtype == np.int64
    assert rows.tolist() == list(range(len(CORPUS)))
    assert retriever.num_rows == len(CORPUS)
    assert list(retriever) == retriever.get_passages(rows)


def test_unknown_ids_are_named(retriever):
    with pytest.raises(ValueError) as error:
        retriever.rows_of(["0", "x1", 'x"2', "1", *[f"y{i}" for i in range(10)]])
    message = str(error.value)
    assert all(id in message for id in ("x1", 'x"2', "y2"))
    assert "y3" not in message


def test_the_model_is_checked(retriever, the_model):
    retriever.check_model(the_model)
    for change, field in (({"emb_seq_kwargs": {"seed": 9}}, "emb_seq"), ({"similarity": "dot"}, "similarity")):
        with pytest.raises(ValueError, match=f"  {field}: ") as error:
            retriever.check_model(make_model(**change))
        assert str(error.value).count("the index has") == 1


# ------------------------------------------------------------------ maintenance

NEW = [
    {"id": "new1", "title": "", "text": "radium again", "metadata": {"source": "new.md", "start": 0, "end": 12}},
    {"id": 'new "2"', "title": "Two", "text": "the city"},
    {"id": "new3", "text": "chemist"},
]


def scores_by_id(retriever):
    """Search, and return for each query `{passage id: score}`."""
    all_scores, all_rows = retriever.search(queries(), k=100)
    found_rows = sorted(set(all_rows.ravel().tolist()) - {-1})
    ids = {row: passage["id"] for row, passage in zip(found_rows, retriever.get_passages(found_rows), strict=True)}
    results = []
    for scores, rows in zip(all_scores.tolist(), all_rows.tolist(), strict=True):
        results.append({ids[row]: score for score, row in zip(scores, rows, strict=True) if row >= 0})
    return results


def check_equals_a_fresh_index(retriever, model, passages, name):
    fresh = model.build_index(passages, show_progress_bar=False)
    assert len(retriever) == len(fresh)
    tolerance = TOLERANCES.get(name, 1e-5)
    for results, expected in zip(scores_by_id(retriever), scores_by_id(fresh), strict=True):
        assert results == pytest.approx(expected, rel=tolerance, abs=tolerance)
    ids = [passage["id"] for passage in passages]
    assert retriever.get_passages(retriever.rows_of(ids)) == fresh.get_passages(fresh.rows_of(ids))


def test_after_add_and_delete_it_equals_a_fresh_index(name, changeable, the_model):
    retriever, reopen = changeable
    rows = retriever.rows_of([passage["id"] for passage in PASSAGES])
    retriever.add(NEW, the_model)
    check_equals_a_fresh_index(retriever, the_model, PASSAGES + NEW, name)
    new_rows = retriever.rows_of([passage["id"] for passage in NEW])
    retriever.delete(["p1", NEW[2]["id"], "p4"])
    remaining = [PASSAGES[0], PASSAGES[2], PASSAGES[3], PASSAGES[5], *NEW[:2]]
    check_equals_a_fresh_index(retriever, the_model, remaining, name)
    retriever.add([PASSAGES[4]], the_model)  # back again, in a new row
    check_equals_a_fresh_index(retriever, the_model, remaining + [PASSAGES[4]], name)

    remaining_rows = retriever.rows_of([passage["id"] for passage in remaining]).tolist()
    assert remaining_rows == [*rows[[0, 2, 3, 5]], *new_rows[:2]], "rows are stable"
    (row_of_p4,) = retriever.rows_of(["p4"])
    assert row_of_p4 not in {*rows.tolist(), *new_rows.tolist()}, "a deleted row is never reused"
    if reopen is not None:
        check_equals_a_fresh_index(reopen(), the_model, remaining + [PASSAGES[4]], name)
        assert reopen().rows_of(["p4"]).tolist() == [row_of_p4]


def test_a_deleted_row_is_gone(changeable, the_model):
    retriever, _ = changeable
    rows = retriever.rows_of(["p0", "p1", "p2"])
    retriever.delete(["p1"])
    with pytest.raises(IndexError, match=str(rows[1])):
        retriever.get_passages(rows)
    with pytest.raises(ValueError, match="p1"):
        retriever.rows_of(["p0", "p1"])
    with pytest.raises(IndexError, match=str(rows[1])):
        retriever.get_embeddings(rows)
    assert retriever.find(["p0", "p1"]).tolist() == [rows[0], -1]
    assert retriever.num_rows == len(PASSAGES)
    assert retriever.live_rows().tolist() == [row for row in range(len(PASSAGES)) if row != rows[1]]
    assert [passage["id"] for passage in retriever] == ["p0", "p2", "p3", "p4", "p5"]
    scores, found_rows = retriever.search(queries(2), k=3, candidates=[rows, rows[1:2]])
    assert set(found_rows[0].tolist()) == {rows[0], rows[2], -1}
    assert found_rows[1].tolist() == [-1, -1, -1]
    assert scores[0, 2] == -np.inf
    assert (scores[1] == -np.inf).all()


def test_the_last_row_is_not_reused_when_it_is_deleted(changeable, the_model):
    retriever, reopen = changeable
    (last,) = retriever.rows_of(["p5"])
    retriever.delete(["p5"])
    if reopen is not None:
        retriever = reopen()
    retriever.add([PASSAGES[5]], the_model)
    assert retriever.rows_of(["p5"])[0] > last


def test_everything_deleted(name, changeable, the_model):
    retriever, _ = changeable
    retriever.delete([passage["id"] for passage in PASSAGES])
    assert len(retriever) == 0
    assert [part.shape for part in retriever.search(queries(2), k=3)] == [(2, 0), (2, 0)]
    assert [part.shape for part in retriever.search(queries(2), k=3, candidates=[[0, 1], None])] == [(2, 0), (2, 0)]
    retriever.add(NEW, the_model)
    check_equals_a_fresh_index(retriever, the_model, NEW, name)


@pytest.mark.parametrize(
    ("passages", "message"),
    [
        ([NEW[0], PASSAGES[3]], "p3"),
        ([NEW[0], NEW[1], NEW[0]], "new1"),
        ([NEW[0], {"id": "x", "title": "T", "text": " "}], "text is only white space"),
        ([], "no passage"),
    ],
)
def test_a_bad_add_changes_nothing(changeable, the_model, passages, message):
    retriever, reopen = changeable
    before = scores_by_id(retriever)
    with pytest.raises(ValueError, match=message):
        retriever.add(passages, the_model)
    assert len(retriever) == len(PASSAGES)
    assert scores_by_id(retriever) == before
    if reopen is not None:
        assert scores_by_id(reopen()) == before


def test_adding_with_another_model_is_refused(changeable):
    retriever, _ = changeable
    with pytest.raises(ValueError, match="  emb_seq: "):
        retriever.add(NEW, make_model(emb_seq_kwargs={"seed": 9}))
    assert len(retriever) == len(PASSAGES)


def test_deleting_an_unknown_id_deletes_nothing(changeable):
    retriever, _ = changeable
    before = scores_by_id(retriever)
    with pytest.raises(ValueError, match="p99"):
        retriever.delete(["p0", "p99"])
    assert len(retriever) == len(PASSAGES)
    assert scores_by_id(retriever) == before


# ------------------------------------------------------------------ generation


def run(model, retriever):
    questions = ["who?", "who painted the Night Watch?", "Curie", "not this one!"]
    prompts = [encode_prompt(model.tokenizer, question) for question in questions]
    prompts[1].append(model.config.nsp_token_id)
    steer = Steer(model, retrieve_every=7, quiet_id=model.tokenizer("!")["input_ids"][0])
    return model.generate(
        **left_pad(prompts, model.tokenizer.pad_token_id),
        retriever=retriever,
        max_new_tokens=16,
        logits_processor=LogitsProcessorList([steer]),
        return_dict_in_generate=True,
    )


def test_generation_is_the_same_with_every_back_end(name, changeable, the_model):
    if name in APPROXIMATE:
        pytest.skip("an approximate search may find another passage")
    retriever, _ = changeable
    expected = run(the_model, the_model.build_index(PASSAGES, show_progress_bar=False))
    output = run(the_model, retriever)
    assert sum(map(len, expected.retrievals)) > 5
    assert torch.equal(output.sequences, expected.sequences)
    tolerance = TOLERANCES.get(name, 1e-5)
    for trace, expected_trace in zip(output.retrievals, expected.retrievals, strict=True):
        for retrieval, expected_retrieval in zip(trace, expected_trace, strict=True):
            assert retrieval.score == pytest.approx(expected_retrieval.score, rel=tolerance, abs=tolerance)
            assert replace(retrieval, scores=[]) == replace(expected_retrieval, scores=[])


def test_generation_refuses_an_index_of_another_model(changeable):
    retriever, _ = changeable
    with pytest.raises(ValueError, match="  emb_seq: "):
        run(make_model(emb_seq_kwargs={"seed": 9}), retriever)


class WithConfig:
    """A retriever of a user, whose config is no dictionary."""

    fingerprint = {"a": 1}
    config = object()


def test_contents_of_indexes_are_told_apart(tmp_path):
    model = make_model()
    index = model.build_index(PASSAGES, save_directory=tmp_path / "index", show_progress_bar=False)
    digests = [content_digest(index), content_digest(WithConfig())]
    index.train_approximate("IVF1,Flat", nprobe=1)
    digests.append(content_digest(index))
    exact = model.load_index(tmp_path / "index", search="exact")
    assert content_digest(exact) == digests[0]
    index.delete(["p1"])
    digests.append(content_digest(index))
    other_text = {**PASSAGES[2], "text": "Another text."}
    for passages in (PASSAGES, [*PASSAGES[1:], PASSAGES[0]], [*PASSAGES[:2], other_text, *PASSAGES[3:]]):
        in_memory, same = [model.build_index(passages, show_progress_bar=False) for _ in range(2)]
        digests.append(content_digest(in_memory))
        assert content_digest(same) == digests[-1]
    in_memory.delete(["p1"])
    digests.append(content_digest(in_memory))
    in_memory._shards[0].embeddings.mul_(1 + 2**-23)  # as another number of threads rounds
    assert content_digest(in_memory) == digests[-1]
    digests.append(content_digest(model.build_index(PASSAGES, show_progress_bar=False, dtype="bfloat16")))
    assert len(set(digests)) == 9
