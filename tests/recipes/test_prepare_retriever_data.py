"""Training data of a retriever alone: the questions that are kept, keyword queries, and bad input."""

import json
import re
from argparse import Namespace

import pytest
from prepare_retriever_data import prepare

from trainer.data import load_instances


def passage(name, title):
    return {"id": name, "title": title, "text": f"{name} was first, and (second) third fourth fifth."}


def instance(name, *passages):
    return {
        "id": name,
        "input": f"who was {name}?",
        "segments": [{"text": "it", "passage": passage} for passage in passages],
    }


INSTANCES = [
    instance("none", None),
    *(instance(f"one{i}", passage(f"p{i}", f"Title {i}")) for i in range(6)),
    instance("again", passage("p0", "Title 0")),
    instance("untitled", passage("p7", "")),
    instance("free text first", None, passage("p8", "Title 8")),
    instance("two", passage("p9", "Title 9"), passage("p10", "Title 10")),
]


def options(tmp_path, instances=INSTANCES, **changes):
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(instance) + "\n" for instance in instances))
    files = {"train_file": str(tmp_path / "train.jsonl"), "output_file": tmp_path / "out.jsonl"}
    return Namespace(**{**files, "num_questions": None, "keyword_share": 0.25, "seed": 0, **changes})


def test_questions_with_one_passage_and_keyword_queries(tmp_path):
    counts = prepare(options(tmp_path, keyword_share=0.5))
    written = load_instances(tmp_path / "out.jsonl")
    questions = [instance["id"] for instance in written if instance["dataset"] != "keywords"]
    assert set(questions) == {*(f"one{i}" for i in range(6)), "again", "untitled", "free text first"}
    assert list(counts.values()) == [11, 2, 0, 9, 7]
    assert len(written) == 16

    passage_ids = set()
    for instance in written:
        if instance["dataset"] != "keywords":
            continue
        (segment,) = instance["segments"]
        passage = segment["passage"]
        keywords = instance["input"].removeprefix(f"{passage['title']} ")
        assert 1 <= len(keywords.split()) <= 4
        assert f" {keywords} " in f" {re.sub('[(),.]', '', passage['text'])} "
        passage_ids.add(passage["id"])
    assert passage_ids == {"p0", "p1", "p2", "p3", "p4", "p5", "p8"}  # each passage with a title once


def test_share_number_and_seed(tmp_path):
    assert list(prepare(options(tmp_path, num_questions=6)).values()) == [11, 2, 3, 6, 2]
    first = (tmp_path / "out.jsonl").read_bytes()
    prepare(options(tmp_path, num_questions=6))
    assert (tmp_path / "out.jsonl").read_bytes() == first
    prepare(options(tmp_path, num_questions=6, seed=1))
    assert (tmp_path / "out.jsonl").read_bytes() != first
    assert prepare(options(tmp_path, keyword_share=0.0))["keyword queries written"] == 0


def test_bad_input_leaves_no_file(tmp_path):
    for changes, message in (
        ({"keyword_share": 1.0}, "--keyword_share is 1.0"),
        ({"num_questions": 0}, "--num_questions is 0"),
        ({"instances": INSTANCES[:1]}, "none of 1 instances has exactly one passage"),
        ({"instances": [{"input": "?", "segments": []}]}, "line 1: segments is"),
    ):
        with pytest.raises(ValueError, match=message):
            prepare(options(tmp_path, **changes))
        assert [path.name for path in tmp_path.iterdir()] == ["train.jsonl"]
