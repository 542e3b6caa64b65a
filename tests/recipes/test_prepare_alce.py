"""ALCE: every instance, passage and count of a small file in its format, and bad input."""

import gzip
import json
import sys
from argparse import Namespace
from pathlib import Path

import pytest
from prepare_alce import main, prepare

from trainer import load_corpus, load_evaluation_set
from trainer.data import content_id

FILE = Path(__file__).parent / "data_formats" / "alce.json"
ITEMS = json.loads(FILE.read_text(encoding="utf-8"))


def options(tmp_path, **changes):
    defaults = {
        "input_file": FILE,
        "output_file": tmp_path / "eval.jsonl",
        "output_corpus": tmp_path / "corpus.jsonl",
        "dataset": "asqa",
        "num_candidates": 100,
        "provenance": "none",
        "instruction": None,
        "split": None,
    }
    return Namespace(**defaults | changes)


def prepared(tmp_path, **changes):
    counts = prepare(options(tmp_path, **changes))
    corpus = load_corpus(tmp_path / "corpus.jsonl")
    return counts, corpus, load_evaluation_set(tmp_path / "eval.jsonl", corpus=corpus)


def write_items(tmp_path, *items):
    path = tmp_path / "items.json"
    path.write_text(json.dumps(items))
    return path


def test_candidates_answers_and_what_the_metrics_need(tmp_path):
    counts, corpus, (first, second) = prepared(tmp_path)
    taken = content_id("Tower", "Another text under an id that is taken.")
    unnamed = content_id("Tower", "The tower measures 80 m.")
    assert [passage["id"] for passage in corpus] == ["7", "8", "9", taken, unnamed]
    assert (first["id"], first["dataset"], first["input"]) == ("a1", "asqa", "When were the two bridges built?")
    assert first["instruction"].startswith("Answer the following question. The question may be ambiguous")
    assert first["answers"] == [annotation["long_answer"] for annotation in ITEMS[0]["annotations"]]
    assert first["candidates"] == ["7", "8", "9"]
    assert second["candidates"] == [taken, unnamed, "7"]  # a doc without text is left out
    assert second["answers"] == ["It is 80 m high."]
    assert first["meta"] == {
        **{name: ITEMS[0][name] for name in ("qa_pairs", "annotations", "wikipages")},
        "provenance_unknown": True,
    }
    assert second["meta"] == {"qa_pairs": None, "claims": ["The tower is 80 m high."], "provenance_unknown": True}
    assert first["provenance"] == second["provenance"] == []
    assert dict(counts) == {
        "items read": 3,
        "items written": 2,
        "items left out: no answer": 1,
        "items with fewer than 100 candidates": 2,
        "items without provenance": 2,
        "docs left out: no text": 1,
        "docs with the id of another text: their content's hash became the id": 1,
        "passages in the corpus": 5,
    }


def test_a_smaller_pool_and_provenance_by_short_answers(tmp_path):
    counts, corpus, (first, second) = prepared(tmp_path, num_candidates=2, provenance="short_answers")
    assert first["candidates"] == ["7", "8"]
    assert first["provenance"] == [["7"], ["8"]]  # "the 1990s" is found as "1990s"
    assert "provenance_unknown" not in first["meta"]
    assert (second["provenance"], second["meta"]["provenance_unknown"]) == ([], True)  # ELI5 has no short answers
    assert counts["items with fewer than 2 candidates"] == 0
    assert [passage["id"] for passage in corpus][:3] == ["7", "8", second["candidates"][0]]


def test_qampari_and_results_under_data(tmp_path):
    item = {
        "id": "l1",
        "question": "Which rivers?",
        "answers": [["Rhine", "the Rhine"], ["Elbe", "Rhine"]],
        "docs": [{"text": "The Elbe flows north."}],
    }
    path = tmp_path / "items.json.gz"
    path.write_bytes(gzip.compress(json.dumps({"data": [item], "args": {}}).encode()))
    _, corpus, (question,) = prepared(
        tmp_path, dataset="qampari", input_file=path, instruction="List them.", provenance="short_answers"
    )
    assert question["id"] == "l1"
    assert question["answers"] == ["Rhine", "the Rhine", "Elbe"]
    assert question["instruction"] == "List them."
    assert question["meta"] == {"answers": item["answers"]}
    assert corpus[0]["id"] == content_id("", "The Elbe flows north.")
    assert question["provenance"] == [[corpus[0]["id"]]]


ITEM = {"sample_id": "x", "question": "q?", "answer": "a", "docs": [{"id": "1", "title": "", "text": "t"}]}


@pytest.mark.parametrize(
    ("items", "changes", "message"),
    [
        ([{**ITEM, "docs": "none"}], {}, "items.json, item 0: docs is 'none', expected a list of objects"),
        ([ITEM, {**ITEM, "docs": [{"id": "1"}]}], {}, r"items.json, item 1, docs\[0\]: text is None"),
        ([{**ITEM, "question": None}], {}, "item 0: question is None"),
        ([{**ITEM, "answer": 3}], {}, "item 0: answer is 3"),
        (
            [{**ITEM, "qa_pairs": [{"question": "q?"}]}],
            {},
            "item 0: qa_pairs is .* expected a list of objects with short_answers",
        ),
        (
            [{**ITEM, "answers": ["a"]}],
            {"dataset": "qampari", "instruction": ""},
            "item 0: answers is .* expected a list of lists of aliases",
        ),
        (["q?"], {}, "found list, expected ALCE's list of items"),
        ([{**ITEM, "answer": ""}], {}, "(?s)No item or no passage is left.*no answer +1"),
        ([ITEM], {"split": "train"}, "--split is for the name of a dataset, and .*items.json is a file"),
        ([ITEM], {"num_candidates": 0}, "--num_candidates is 0"),
        ([ITEM], {"dataset": "qampari"}, "no instruction for 'qampari'"),
    ],
)
def test_bad_files(tmp_path, items, changes, message):
    with pytest.raises(ValueError, match=message):
        prepare(options(tmp_path, input_file=write_items(tmp_path, *items), **changes))
    assert [path.name for path in tmp_path.iterdir()] == ["items.json"]


def test_one_file_for_instances_and_corpus(tmp_path):
    with pytest.raises(ValueError, match="--output_file and --output_corpus are both .*eval.jsonl"):
        prepare(options(tmp_path, output_corpus=tmp_path / "eval.jsonl"))
    assert not list(tmp_path.iterdir())


def test_a_dataset_by_its_name(tmp_path):
    """A folder is read like a name; fields that a dataset fills with None count as missing."""
    expected_counts, expected_corpus, expected_questions = prepared(tmp_path)
    rows = []
    for number, item in enumerate(ITEMS):
        row = {"sample_id": str(item.get("sample_id", item.get("id", number)))}
        row |= {name: item[name] for name in ("question", "docs", "qa_pairs", "answer") if name in item}
        rows.append(json.dumps(row) + "\n")
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "validation.jsonl").write_text("".join(rows))
    counts, corpus, questions = prepared(tmp_path, input_file=str(tmp_path / "set"))
    assert counts["items read"] == expected_counts["items read"]
    assert corpus == expected_corpus
    for question, expected in zip(questions, expected_questions, strict=True):
        assert question["input"] == expected["input"]
        assert question["candidates"] == expected["candidates"]


def test_command_line(tmp_path, monkeypatch, capsys):
    arguments = ["--dataset", "asqa", "--input_file", str(FILE)]
    arguments += ["--output_file", str(tmp_path / "e.jsonl"), "--output_corpus", str(tmp_path / "c.jsonl")]
    monkeypatch.setattr(sys, "argv", ["prepare_alce.py", *arguments])
    main()
    assert "items written" in capsys.readouterr().out
    (tmp_path / "cut.json").write_text(FILE.read_text(encoding="utf-8")[:-10])
    monkeypatch.setattr(sys, "argv", ["prepare_alce.py", *arguments, "--input_file", str(tmp_path / "cut.json")])
    with pytest.raises(SystemExit, match="cut.json: malformed JSON"):
        main()
