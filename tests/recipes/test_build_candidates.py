"""Candidate pools by real retrievers: gold in place, scores as computed by hand, corpora encoded once, bad input."""

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
    """A CoSup checkpoint, its Emb_seq for sentence-transformers, another with dot products, corpus and questions."""
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
    defaults = {
        "model": str(folder / "cosine"),
        "eval_file": folder / "eval.jsonl",
        "split": "test",
        "corpus_file": folder / "corpus.jsonl",
        "index": None,
        "index_uri": None,
        "output_file": tmp_path / "out.jsonl",
        "num_candidates": 4,
        "gold_first": False,
        "index_dir": None,
        "batch_size": 3,
        "passage_template": "{title}. {text}",
        "device": "cpu",
        "dtype": "auto",
    }
    return Namespace(**{**defaults, **changes})


def build(folder, tmp_path, **changes):
    """Return the printed table and the candidates of each question; check that the file is a valid evaluation set."""
    arguments = options(folder, tmp_path, **changes)
    lines = dict(build_candidates.build(arguments))
    instances = load_evaluation_set(arguments.output_file, corpus=CORPUS, answers_required=False)
    return lines, [instance["candidates"] for instance in instances]


def scores_by_hand(folder, name):
    """Return scores `(questions, passages)` of a sentence-transformers model, with each text encoded alone."""
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(folder / name), device="cpu")
    texts = [question["input"].replace(" [SEP]", "") for question in QUESTIONS]
    queries = torch.stack([model.encode_query(text, convert_to_tensor=True) for text in texts])
    texts = [render_passage(passage, "{title}. {text}") for passage in CORPUS]
    passages = torch.stack([model.encode_document(text, convert_to_tensor=True) for text in texts])
    if name == "cosine":
        queries = torch.nn.functional.normalize(queries, dim=-1)
        passages = torch.nn.functional.normalize(passages, dim=-1)
    return (queries @ passages.T).numpy()


def ranking(scores):
    """Return the passage ids of each question, best first."""
    return [[CORPUS[i]["id"] for i in np.argsort(-row)] for row in scores]


def expected_pools(rankings, size, gold_first=False):
    """Return the pools, computed in another way: drop the worst passage that is not gold until the size is right."""
    pools = []
    for question, ids in zip(QUESTIONS, rankings, strict=True):
        gold = {id for evidence in question["provenance"] for id in evidence}
        pool = list(ids)
        while len(pool) > size:
            pool.remove([id for id in pool if id not in gold][-1])
        if gold_first:
            pool.sort(key=lambda id: id not in gold)
        pools.append(pool)
    return pools


@pytest.mark.parametrize("name", ["cosine", "dot"])
@pytest.mark.parametrize("size", [3, 6, 10])
@pytest.mark.parametrize("gold_first", [False, True])
def test_pools_are_gold_and_the_nearest_by_score(folder, tmp_path, name, size, gold_first):
    lines, pools = build(folder, tmp_path, model=str(folder / name), num_candidates=size, gold_first=gold_first)
    rankings = ranking(scores_by_hand(folder, name))
    assert pools == expected_pools(rankings, size, gold_first)
    gold_places, set_places = [], []
    for question, ids in zip(QUESTIONS[:2], rankings[:2], strict=True):  # the third has no gold
        evidence_sets = [[ids.index(id) for id in evidence] for evidence in question["provenance"]]
        gold_places.append(min(map(min, evidence_sets)))
        set_places.append(min(map(max, evidence_sets)))
    for k in (1, 5):
        for title, places in ((f"R@{k}", gold_places), (f"a whole evidence set in the first {k}", set_places)):
            num_hits = sum(place < k for place in places)
            assert lines[title].split()[0] == f"{50 * num_hits:.1f}"
    assert "R@20" not in lines  # there are ten passages
    assert lines["questions without gold"] == "1"


def test_recall_among_as_many_places_as_passages_is_not_shown(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(build_candidates, "KS", (1, 9, 10))
    lines, _ = build(folder, tmp_path)
    assert "R@9" in lines
    assert "R@10" not in lines


def test_everything_else_in_the_file_stays(folder, tmp_path):
    build(folder, tmp_path, output_file=tmp_path / "out.jsonl")
    lines = (tmp_path / "out.jsonl").read_text().splitlines()
    for line, question in zip(lines, QUESTIONS, strict=True):
        written = json.loads(line)
        assert {**written, "candidates": None} == {**question, "candidates": None}


def test_more_gold_than_the_pool_holds_keeps_the_best_of_it(folder, tmp_path):
    lines, pools = build(folder, tmp_path, num_candidates=2)
    rankings = ranking(scores_by_hand(folder, "cosine"))
    assert pools[1] == [id for id in rankings[1] if id in ("p1", "p4", "c1")][:2]
    assert lines["questions with more than 2 gold passages, of which the best were kept"] == "1"


def test_a_pool_larger_than_the_corpus_is_all_of_it(folder, tmp_path):
    lines, pools = build(folder, tmp_path, num_candidates=50)
    assert pools == ranking(scores_by_hand(folder, "cosine"))
    assert lines["pools smaller than 50"] == "3"


def test_a_corpus_is_encoded_once_and_an_interrupted_run_is_resumed(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(retrievers, "SHARD_SIZE", 4)
    cache = {"index_dir": str(tmp_path / "cache")}
    expected = build(folder, tmp_path)
    assert build(folder, tmp_path, **cache) == expected
    shards = sorted((tmp_path / "cache").glob("*/*.safetensors"))
    times = {path: path.stat().st_mtime_ns for path in shards}
    assert len(shards) == 3
    shards[0].unlink()
    shutil.copy(folder / "corpus.jsonl", tmp_path / "copy.jsonl")  # the content counts, not the name
    assert build(folder, tmp_path, corpus_file=tmp_path / "copy.jsonl", **cache) == expected
    assert [path.stat().st_mtime_ns == times[path] for path in shards] == [False, True, True]

    build(folder, tmp_path, model=str(folder / "dot"), **cache)
    build(folder, tmp_path, passage_template="{text}", **cache)
    assert len(list((tmp_path / "cache").iterdir())) == 3  # another model or template: other embeddings

    save_file({"embeddings": -load_file(shards[1])["embeddings"]}, shards[1])
    assert build(folder, tmp_path, **cache) != expected  # so the cache is really read
    shards[1].write_bytes(shards[1].read_bytes()[:-8])
    with pytest.raises(ValueError, match="safetensors is damaged"):
        build(folder, tmp_path, **cache)


def test_a_cosup_model_searches_with_its_own_query(folder, tmp_path):
    cosup = {"model": str(folder / "cosup"), "index_dir": str(tmp_path / "cache")}
    lines, pools = build(folder, tmp_path, **cosup)
    model = CoSupForCausalLM.from_pretrained(folder / "cosup")
    index = model.build_index(CORPUS, show_progress_bar=False)
    queries = embed_queries(model, load_evaluation_set(folder / "eval.jsonl", answers_required=False))
    rankings = ranking(queries.numpy() @ index.embeddings.numpy().T)
    assert pools == expected_pools(rankings, 4)

    (index_folder,) = (tmp_path / "cache").iterdir()
    time = (index_folder / "embeddings-00000.safetensors").stat().st_mtime_ns
    assert build(folder, tmp_path, **cosup) == (lines, pools)
    assert (index_folder / "embeddings-00000.safetensors").stat().st_mtime_ns == time
    over_index = {"model": cosup["model"], "corpus_file": None, "index": str(index_folder)}
    assert build(folder, tmp_path, **over_index) == (lines, pools)
    assert build(folder, tmp_path, model=cosup["model"]) == (lines, pools)


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
        ({"index": "index", "corpus_file": None}, "cosine is not a CoSup checkpoint; give a --corpus_file"),
        ({"index": "index", "corpus_file": None, "index_dir": "cache"}, "--index_dir cache keeps a corpus"),
        (
            {"model": "cosup", "passage_template": "{text}"},
            "--passage_template '{text}' is for a sentence-transformers",
        ),
        ({"corpus_file": [*CORPUS, CORPUS[0]]}, "line 11: id 'p0' is already in the corpus"),
        ({"corpus_file": []}, "the corpus holds no passage"),
        ({"corpus_file": [{"id": "p0", "text": ""}]}, "line 1: text is empty"),
        ({"eval_file": [{"id": "1", "input": "q?"}]}, "line 1: answers is None, expected a list of strings"),
    ],
)
def test_bad_input(folder, tmp_path, changes, message):
    changes = dict(changes)
    for name in ("corpus_file", "eval_file"):
        if isinstance(changes.get(name), list):
            changes[name] = write(tmp_path / f"{name}.jsonl", changes[name])
    changes["model"] = str(folder / changes.get("model", "cosine"))
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
    arguments = ["--model", folder / "cosine", "--eval_file", folder / "eval.jsonl"]
    arguments += ["--corpus_file", folder / "corpus.jsonl", "--output_file", tmp_path / "out.jsonl.gz"]
    arguments += ["--num_candidates", 4, "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", ["build_candidates.py", *map(str, arguments)])
    build_candidates.main()
    assert "a whole evidence set in the first 5" in capsys.readouterr().out
    instances = load_evaluation_set(tmp_path / "out.jsonl.gz", answers_required=False)
    assert [len(instance["candidates"]) for instance in instances] == [4, 4, 4]
    arguments += ["--model", tmp_path / "nothing"]
    monkeypatch.setattr(sys, "argv", ["build_candidates.py", *map(str, arguments)])
    with pytest.raises(SystemExit, match="error: .*nothing"):
        build_candidates.main()
