"""Training data of a retriever alone: which questions stay, what a keyword query is, and bad input."""

import json
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
        "segments": [{"text": "it", "passage": each} for each in passages],
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
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(each) + "\n" for each in instances))
    files = {"train_file": str(tmp_path / "train.jsonl"), "output_file": tmp_path / "out.jsonl"}
    return Namespace(**{**files, "num_questions": None, "keyword_share": 0.25, "seed": 0, **changes})


def test_questions_with_one_passage_and_keyword_queries(tmp_path):
    counts = prepare(options(tmp_path, keyword_share=0.5))
    written = load_instances(tmp_path / "out.jsonl")
    questions = [each for each in written if each["dataset"] != "keywords"]
    assert {each["id"] for each in questions} == {f"one{i}" for i in range(6)} | {
        "again",
        "untitled",
        "free text first",
    }
    assert list(counts.values()) == [11, 2, 0, 9, 7] and len(written) == 16
    asked = set()
    for each in (each for each in written if each["dataset"] == "keywords"):
        (segment,) = each["segments"]
        found = segment["passage"]
        words = each["input"].removeprefix(f"{found['title']} ").split()
        plain = found["text"].replace("(", "").replace(")", "").replace(",", "").replace(".", "").split()
        assert 1 <= len(words) <= 4 and any(plain[i : i + len(words)] == words for i in range(len(plain)))
        asked.add(found["id"])
    assert asked == {"p0", "p1", "p2", "p3", "p4", "p5", "p8"}  # each passage with a title once


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
