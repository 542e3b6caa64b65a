"""Candidate pools by real retrievers: gold inside and in its place, scores as computed by hand, corpora encoded once, and bad input."""

import json
import shutil
import sys
from argparse import Namespace

import build_candidates
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from modeling_cosup import CoSupForCausalLM
from modeling_cosup.tokenization_cosup import render_passage
from support.models import PASSAGES, make_model
from trainer import load_evaluation_set
from trainer.judging.answers import embed_queries

from shared import retrievers

TEXTS = ["Who painted?", "Where is Warsaw?", "An otter swims in 1642.", "Radium."]
CORPUS = PASSAGES + [{"id": f"c{i}", "title": "", "text": text} for i, text in enumerate(TEXTS)]
QUESTIONS = [
    {
        "id": "q0",
        "input": "who painted the Night Watch?",
        "answers": ["Rembrandt"],
        "provenance": [["p0"], ["p3"]],
        "meta": {"claims": ["c"]},
        "extra": 1,
    },
    {
        "id": "q1",
        "input": "Marie Curie [SEP] born in",
        "answers": ["Warsaw"],
        "provenance": [["p1", "p4"], ["p4", "c1"]],
        "candidates": ["p0"],
    },
    {"id": "q2", "input": "hello?", "answers": [], "provenance": []},
]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A CoSup checkpoint, its Emb_seq for sentence-transformers, one that compares by the dot product, corpus and questions."""
    pytest.importorskip("sentence_transformers", reason="the pools are built by a sentence-transformers model")
    folder = tmp_path_factory.mktemp("candidates")
    model = make_model(similarity="cosine")
    model.save_pretrained(folder / "cosup")
    model.save_emb_seq(folder / "cosine")
    make_model(similarity="dot", emb_seq_kwargs={"seed": 5}, passage_prompt="passage: ").save_emb_seq(folder / "dot")
    write(folder / "corpus.jsonl", CORPUS)
    write(folder / "eval.jsonl", QUESTIONS)
    return folder


def options(folder, tmp_path, **changes):
    given = {"model": str(folder / "cosine"), "eval_file": folder / "eval.jsonl", "split": "test"}
    given |= {"corpus_file": folder / "corpus.jsonl", "index": None, "index_uri": None}
    given |= {
        "output_file": tmp_path / "out.jsonl",
        "num_candidates": 4,
        "gold_first": False,
        "index_dir": None,
        "batch_size": 3,
    }
    return Namespace(**{**given, "passage_template": "{title}. {text}", "device": "cpu", "dtype": "auto", **changes})


def built(folder, tmp_path, **changes):
    """The table and the candidates of each question; that the file is a valid evaluation set is checked on the way."""
    arguments = options(folder, tmp_path, **changes)
    lines = dict(build_candidates.build(arguments))
    found = load_evaluation_set(arguments.output_file, corpus=CORPUS, answers_required=False)
    return lines, [instance["candidates"] for instance in found]


def scores_by_hand(folder, name):
    """`(questions, passages)` scores of a sentence-transformers model, each text encoded alone."""
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(folder / name), device="cpu")
    texts = [question["input"].replace(" [SEP]", "") for question in QUESTIONS]
    queries = torch.stack([model.encode_query(text, convert_to_tensor=True) for text in texts])
    passages = torch.stack(
        [model.encode_document(render_passage(p, "{title}. {text}"), convert_to_tensor=True) for p in CORPUS]
    )
    if name == "cosine":
        queries, passages = (torch.nn.functional.normalize(x, dim=-1) for x in (queries, passages))
    return (queries @ passages.T).numpy()


def ranking(scores):
    return [[CORPUS[i]["id"] for i in np.argsort(-row)] for row in scores]


def expected_pools(rankings, size, gold_first=False):
    """Written another way than the recipe: leave out the worst that is not gold until the size is right."""
    pools = []
    for question, ids in zip(QUESTIONS, rankings, strict=True):
        gold = {id for evidence in question["provenance"] for id in evidence}
        pool = list(ids)
        while len(pool) > size:
            pool.remove([id for id in pool if id not in gold][-1])
        pools.append(sorted(pool, key=lambda id: id not in gold) if gold_first else pool)
    return pools


@pytest.mark.parametrize("name", ["cosine", "dot"])
@pytest.mark.parametrize("size", [3, 6, 10])
@pytest.mark.parametrize("gold_first", [False, True])
def test_pools_are_gold_and_the_nearest_by_score(folder, tmp_path, name, size, gold_first):
    lines, pools = built(folder, tmp_path, model=str(folder / name), num_candidates=size, gold_first=gold_first)
    rankings = ranking(scores_by_hand(folder, name))
    assert pools == expected_pools(rankings, size, gold_first)
    places = [
        [min(ids.index(id) for id in evidence) for evidence in q["provenance"]]
        for q, ids in zip(QUESTIONS, rankings, strict=True)
    ]
    whole = [
        [max(ids.index(id) for id in evidence) for evidence in q["provenance"]]
        for q, ids in zip(QUESTIONS, rankings, strict=True)
    ]
    for k in (1, 5):
        for title, found in ((f"R@{k}", places), (f"a whole evidence set in the first {k}", whole)):
            hits = sum(min(ranks) < k for ranks in found[:2])
            assert lines[title].split()[0] == f"{50 * hits:.1f}"
    assert "R@20" not in lines  # there are ten passages
    assert lines["questions without gold"] == "1"


def test_all_else_in_the_file_stays(folder, tmp_path):
    built(folder, tmp_path, output_file=tmp_path / "out.jsonl")
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [{key: value for key, value in row.items() if key != "candidates"} for row in rows] == [
        {key: value for key, value in row.items() if key != "candidates"} for row in QUESTIONS
    ]


def test_more_gold_than_the_pool_holds_keeps_the_best_of_it(folder, tmp_path):
    lines, pools = built(folder, tmp_path, num_candidates=2)
    rankings = ranking(scores_by_hand(folder, "cosine"))
    assert pools[1] == [id for id in rankings[1] if id in ("p1", "p4", "c1")][:2]
    assert lines["questions with more gold than 2: the best of it was kept"] == "1"


def test_a_pool_larger_than_the_corpus_is_all_of_it(folder, tmp_path):
    lines, pools = built(folder, tmp_path, num_candidates=50)
    assert pools == ranking(scores_by_hand(folder, "cosine"))
    assert lines["pools smaller than 50"] == "3"


def test_a_corpus_is_encoded_once_and_goes_on_where_it_was_cut_off(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(retrievers, "SHARD_SIZE", 4)
    cache = {"index_dir": str(tmp_path / "cache")}
    expected = built(folder, tmp_path)
    assert built(folder, tmp_path, **cache) == expected
    shards = sorted((tmp_path / "cache").glob("*/*.safetensors"))
    times = {path: path.stat().st_mtime_ns for path in shards}
    assert len(shards) == 3
    shards[0].unlink()
    shutil.copy(folder / "corpus.jsonl", tmp_path / "copy.jsonl")  # the content counts, not the name
    assert built(folder, tmp_path, corpus_file=tmp_path / "copy.jsonl", **cache) == expected
    assert [path.stat().st_mtime_ns == times[path] for path in shards] == [False, True, True]

    built(folder, tmp_path, model=str(folder / "dot"), **cache)
    built(folder, tmp_path, passage_template="{text}", **cache)
    assert len(list((tmp_path / "cache").iterdir())) == 3  # another model or template: other embeddings

    save_file({"embeddings": -load_file(shards[1])["embeddings"]}, shards[1])
    assert built(folder, tmp_path, **cache) != expected  # so what is kept is really read
    shards[1].write_bytes(shards[1].read_bytes()[:-8])
    with pytest.raises(ValueError, match="safetensors is damaged"):
        built(folder, tmp_path, **cache)


def test_a_cosup_model_searches_with_its_own_query(folder, tmp_path):
    cosup = {"model": str(folder / "cosup"), "index_dir": str(tmp_path / "cache")}
    lines, pools = built(folder, tmp_path, **cosup)
    model = CoSupForCausalLM.from_pretrained(folder / "cosup")
    index = model.build_index(CORPUS, show_progress_bar=False)
    queries = embed_queries(model, load_evaluation_set(folder / "eval.jsonl", answers_required=False))
    rankings = ranking(queries.numpy() @ index.embeddings.numpy().T)
    assert pools == expected_pools(rankings, 4)

    (kept,) = (tmp_path / "cache").iterdir()
    time = (kept / "embeddings-00000.safetensors").stat().st_mtime_ns
    assert built(folder, tmp_path, **cosup) == (lines, pools)
    assert (kept / "embeddings-00000.safetensors").stat().st_mtime_ns == time
    assert built(folder, tmp_path, model=cosup["model"], corpus_file=None, index=str(kept)) == (lines, pools)
    assert built(folder, tmp_path, model=cosup["model"]) == (lines, pools)


@pytest.mark.parametrize("model", ["cosine", "cosup"])
def test_gold_that_the_corpus_lacks_is_counted(folder, tmp_path, model):
    corpus = write(tmp_path / "corpus.jsonl", [passage for passage in CORPUS if passage["id"] not in ("p3", "p4")])
    with pytest.raises(ValueError, match="corpus.jsonl lacks 2 of 5 gold passages, of 2 of 3 questions, e.g. 'p3'"):
        build_candidates.build(options(folder, tmp_path, model=str(folder / model), corpus_file=corpus))
    assert [path.name for path in tmp_path.iterdir()] == ["corpus.jsonl"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_candidates": 0}, "--num_candidates is 0"),
        ({"index": "index", "corpus_file": None}, "cosine is no CoSup checkpoint; give a --corpus_file"),
        ({"corpus_file": [*CORPUS, CORPUS[0]]}, "line 11: id 'p0' is in the corpus twice"),
        ({"corpus_file": []}, "the corpus holds no passage"),
        ({"corpus_file": [{"id": "p0", "text": ""}]}, "line 1: text is ''"),
        ({"eval_file": [{"id": "1", "input": "q?"}]}, "line 1: answers is None, expected a list of strings"),
    ],
)
def test_bad_input(folder, tmp_path, changes, message):
    changes = {
        name: write(tmp_path / f"{name}.jsonl", value) if isinstance(value, list) else value
        for name, value in changes.items()
    }
    with pytest.raises(ValueError, match=message):
        build_candidates.build(options(folder, tmp_path, **changes))
    assert not (tmp_path / "out.jsonl").exists()


def test_another_similarity_is_refused(folder, tmp_path):
    shutil.copytree(folder / "cosine", tmp_path / "model")
    path = tmp_path / "model" / "config_sentence_transformers.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "similarity_fn_name": "euclidean"}))
    with pytest.raises(ValueError, match="compares by euclidean, expected cosine or dot"):
        build_candidates.build(options(folder, tmp_path, model=str(tmp_path / "model")))


def test_command_line(folder, tmp_path, monkeypatch, capsys):
    arguments = [
        "--model",
        folder / "cosine",
        "--eval_file",
        folder / "eval.jsonl",
        "--corpus_file",
        folder / "corpus.jsonl",
    ]
    arguments += ["--output_file", tmp_path / "out.jsonl.gz", "--num_candidates", 4, "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", ["build_candidates.py", *map(str, arguments)])
    build_candidates.main()
    assert "a whole evidence set in the first 5" in capsys.readouterr().out
    assert [
        len(instance["candidates"])
        for instance in load_evaluation_set(tmp_path / "out.jsonl.gz", answers_required=False)
    ] == [4, 4, 4]
    monkeypatch.setattr(
        sys, "argv", ["build_candidates.py", *map(str, arguments), "--model", str(tmp_path / "nothing")]
    )
    with pytest.raises(SystemExit, match="error: .*nothing"):
        build_candidates.main()
