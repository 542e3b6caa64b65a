"""Self-RAG's training data: marks become segments, the filters and their counts, the question template, bad input."""

import gzip
import json
import sys
from argparse import Namespace
from pathlib import Path

import pytest
from prepare_selfrag import FILTERS, MIN_SUPPORT, left_out, main, prepare, read_pieces, report

from trainer import load_corpus, load_instances
from trainer.data import content_id

FILE = Path(__file__).parent / "data_formats" / "selfrag.jsonl"
OTTER, MILK = (
    {"id": content_id(title, text), "title": title, "text": text}
    for title, text in [("Otter", "Otters eat fish."), ("Café", "Coffee with milk.")]
)
PASSAGE = "[Retrieval]<paragraph>Otter\nOtters eat fish.</paragraph>"
CONTINUED = "[Continue to Use Evidence]They fly."


def options(tmp_path, **changes):
    defaults = {
        "input_file": FILE,
        "split": None,
        "output_file": tmp_path / "train.jsonl",
        "output_corpus": tmp_path / "corpus.jsonl",
        "filters": list(FILTERS),
        "min_support": "partial",
        "question_template": "",
    }
    return Namespace(**defaults | changes)


def segments(instance):
    return [(segment["text"], segment["passage"]) for segment in instance["segments"]]


def ids(tmp_path, **changes):
    prepare(options(tmp_path, **changes))
    return [instance["id"] for instance in load_instances(tmp_path / "train.jsonl")]


def write(tmp_path, *rows):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_marks_become_segments(tmp_path):
    counts, damaged = prepare(options(tmp_path))
    instances = {instance["id"]: instance for instance in load_instances(tmp_path / "train.jsonl")}
    assert list(instances) == ["s1", "s2", "s10"]
    assert segments(instances["s1"]) == [("Fish.", OTTER)]
    assert segments(instances["s2"]) == [
        ("Well. Let us see.", None),
        ("They eat fish. They eat it raw.", OTTER),  # a continued text keeps the passage
        ("They drink no coffee.", MILK),
        ("That is all. Indeed.", None),  # after free text there is nothing to continue
    ]
    assert segments(instances["s10"]) == [
        ("Fish.", {"id": content_id("", "Otters eat fish."), "title": "", "text": "Otters eat fish."})
    ]
    assert instances["s1"]["dataset"] == "nq"
    assert instances["s1"]["instruction"] == ""
    assert instances["s1"]["input"] == "what do otters eat?"
    assert instances["s2"]["instruction"] == "Answer at length. "
    assert instances["s2"]["input"] == "what do otters eat and drink?"
    assert [passage["title"] for passage in load_corpus(tmp_path / "corpus.jsonl")] == ["Otter", "Café", ""]
    assert dict(counts) == {
        "read": 10,
        "damaged": 4,
        "without_passage": 1,
        "irrelevant": 1,
        "unsupported": 1,
        "written": 3,
        "  with 1 passage": 2,
        "  with 2 passages": 1,
        "continued texts without a passage, now free text": 1,
        "passages": 3,
    }
    places = [line.partition(": ")[0] for line in damaged]
    assert places == [f"{FILE}, line {number}" for number in (6, 7, 8, 9)]
    lines = report(counts).splitlines()
    assert lines[0].split() == ["instances", "read", "10"]
    assert lines[5].split() == ["instances", "written", "3", "the", "paper's:", "42,932"]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"filters": []}, ["s1", "s2", "s3", "s4", "s5", "s10"]),
        ({"filters": ["irrelevant", "unsupported"]}, ["s1", "s2", "s3", "s10"]),
        ({"filters": ["without_passage", "unsupported"]}, ["s1", "s2", "s4", "s10"]),
        ({"filters": ["without_passage", "irrelevant"]}, ["s1", "s2", "s5", "s10"]),
        ({"min_support": "full"}, ["s1", "s10"]),
        ({"min_support": "none"}, ["s1", "s2", "s5", "s10"]),
    ],
)
def test_each_filter_can_be_switched_off(tmp_path, changes, expected):
    assert ids(tmp_path, **changes) == expected


@pytest.mark.parametrize(
    ("output", "min_support", "expected"),
    [
        (CONTINUED + "[No support / Contradictory]", "partial", "unsupported"),
        (CONTINUED + CONTINUED + "[Partially supported]", "full", "unsupported"),
        (CONTINUED + "[No support / Contradictory]", "none", None),
        (CONTINUED + "[Utility:5]", "full", None),  # it need not be rated
        ("[No Retrieval]So." + CONTINUED + "[No support / Contradictory]", "full", None),  # it becomes free text
    ],
)
def test_the_rating_of_a_continued_text_counts(output, min_support, expected):
    pieces = read_pieces(PASSAGE + "[Relevant]Fish.[Fully supported]" + output)
    assert left_out(pieces, list(FILTERS), MIN_SUPPORT[min_support]) == expected


def test_without_filters_every_text_is_kept(tmp_path):
    prepare(options(tmp_path, filters=[]))
    instances = {instance["id"]: instance for instance in load_instances(tmp_path / "train.jsonl")}
    assert segments(instances["s3"]) == [("4", None)]
    assert (instances["s3"]["instruction"], instances["s3"]["input"]) == ("Add.", "2 + 2")
    assert segments(instances["s4"]) == [("false", MILK)]
    assert (instances["s4"]["instruction"], instances["s4"]["input"]) == ("True or false?", "Otters eat coffee.")


def test_question_before_each_passage(tmp_path):
    prepare(options(tmp_path, question_template="Question: {input}"))
    instances = {instance["id"]: segments(instance) for instance in load_instances(tmp_path / "train.jsonl")}
    assert instances["s1"] == [("Question: what do otters eat?", None), ("Fish.", OTTER)]
    assert [text for text, _ in instances["s2"]] == [
        "Well. Let us see. Question: what do otters eat and drink?",
        "They eat fish. They eat it raw.",
        "Question: what do otters eat and drink?",
        "They drink no coffee.",
        "That is all. Indeed.",
    ]


@pytest.mark.parametrize(
    ("output", "message"),
    [
        ("Fish.[Fully supported]", "Fully supported.* at character 5 rates no text on a passage"),
        ("[Relevant]Fish.", "at character 0 rates no passage"),
        (PASSAGE + "Fish.[Relevant]", "rates no passage"),
        (PASSAGE + "Fish.", "has no rating"),
        ("[Retrieval]Fish.", "at character 0 is not in a"),
        ("Fish.</paragraph>", "at character 5 is not in a"),
        ("[Retrieval]<paragraph>\n</paragraph>[Relevant]Fish.", "is empty"),
        ("", "the output holds no text"),
    ],
)
def test_damaged_marks(output, message):
    with pytest.raises(ValueError, match=message):
        read_pieces(output)


def test_a_dataset_folder_and_gzip_are_read_like_a_file(tmp_path):
    expected = ids(tmp_path)
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "train.jsonl").write_bytes(FILE.read_bytes())
    (tmp_path / "rows.jsonl.gz").write_bytes(gzip.compress(FILE.read_bytes()))
    assert ids(tmp_path, input_file=tmp_path / "set") == expected
    assert ids(tmp_path, input_file=tmp_path / "rows.jsonl.gz") == expected


@pytest.mark.parametrize(
    ("row", "changes", "message"),
    [
        ({}, {"split": "test"}, "--split is for the name of a dataset, and .*rows.jsonl is a file"),
        ({"output": None}, {}, "rows.jsonl, line 1: output is None, expected a string"),
        ({"instruction": ""}, {}, "line 1: instruction is empty"),
        ({"instruction": "Say.## Input:\n\n"}, {}, "line 1: input is empty"),
        ({"input": 5}, {}, "line 1: input is 5, expected a string"),
        ({"output": "[No Retrieval]4"}, {}, "(?s)No instance is left.*without_passage +1"),
        (
            {"output": "[Relevant]4"},
            {},
            "(?s)No instance is left.*damaged marks +1.*rows.jsonl, line 1: .Relevant. at character 0",
        ),
        ({}, {"question_template": "Question:"}, "--question_template is 'Question:', expected a text with {input}"),
    ],
)
def test_bad_input(tmp_path, row, changes, message):
    path = write(
        tmp_path,
        {"id": "1", "instruction": "q?", "input": "", "output": PASSAGE + "[Relevant]Fish.[Fully supported]", **row},
    )
    with pytest.raises(ValueError, match=message):
        prepare(options(tmp_path, input_file=path, **changes))
    assert [path.name for path in tmp_path.iterdir()] == ["rows.jsonl"]


def test_command_line(tmp_path, monkeypatch, capsys):
    arguments = ["--input_file", str(FILE), "--output_file", str(tmp_path / "train.jsonl.gz"), "--filters"]
    monkeypatch.setattr(sys, "argv", ["prepare_selfrag.py", *arguments])
    main()
    printed = capsys.readouterr().out
    assert "the paper's: 42,932" in printed
    assert "selfrag.jsonl, line 9: the output holds no text." in printed
    assert len(load_instances(tmp_path / "train.jsonl.gz")) == 6
    assert [path.name for path in tmp_path.iterdir()] == ["train.jsonl.gz"]
