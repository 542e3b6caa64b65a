"""BEIR: every query, passage and count of small files in its format, and bad input."""

import gzip
import json
from argparse import Namespace
from pathlib import Path

import pytest
from prepare_beir import prepare

from trainer import load_corpus, load_evaluation_set

FORMATS = Path(__file__).parent / "data_formats"


def options(tmp_path, **changes):
    defaults = {
        "input_dir": tmp_path / "beir",
        "qrels_file": FORMATS / "beir_qrels.tsv",
        "dataset": "nq",
        "instruction": None,
        "output_file": tmp_path / "eval.jsonl",
        "output_corpus": tmp_path / "corpus.jsonl",
    }
    return Namespace(**defaults | changes)


@pytest.fixture
def beir_folder(tmp_path):
    folder = tmp_path / "beir"
    folder.mkdir()
    (folder / "corpus.jsonl.gz").write_bytes(gzip.compress((FORMATS / "beir_corpus.jsonl").read_bytes()))
    (folder / "queries.jsonl").write_bytes((FORMATS / "beir_queries.jsonl").read_bytes())
    return folder


def test_queries_passages_and_counts(tmp_path, beir_folder):
    counts = prepare(options(tmp_path))
    assert dict(counts) == {
        "passages left out: no text": 1,
        "passages whose title became their text": 1,
        "passages in the corpus": 4,
        "queries written, with answers": 1,
        "queries written, without answers": 1,
        "queries left out: of another split": 1,
        "queries left out: the corpus lacks their passages": 1,
        "queries left out: no passage is relevant": 1,
        "queries of the qrels that queries.jsonl lacks": 1,
        "gold passages": 4,
        "gold passages that the corpus lacks": 1,
    }
    corpus = load_corpus(tmp_path / "corpus.jsonl")
    assert corpus[1] == {"id": "d2", "title": "", "text": "Coffee with milk."}
    assert corpus[3] == {"id": "d5", "title": "", "text": "Only a title"}
    queries = load_evaluation_set(tmp_path / "eval.jsonl", corpus=corpus, answers_required=False)
    assert [(query["id"], query["input"], query["answers"], query["provenance"]) for query in queries] == [
        ("1", "what do otters eat?", ["fish"], [["d1"]]),  # d2 has relevance 0, as all have for query 5
        ("2", "what is with milk?", [], [["d2"], ["d4"], ["d5"]]),
    ]
    with pytest.raises(ValueError, match="line 2: answers is .*, expected a list of at least one string"):
        load_evaluation_set(tmp_path / "eval.jsonl", corpus=corpus)


@pytest.mark.parametrize(
    ("name", "lines", "message"),
    [
        (
            "qrels.tsv",
            ["query-id\tcorpus-id\tscore", "1\td1\thigh"],
            "qrels.tsv, line 2: score is 'high', expected an integer",
        ),
        ("qrels.tsv", ["query-id\tcorpus-id\tscore", "1\tnowhere\t1"], "(?s)No query is left.*the corpus lacks +1"),
        ("queries.jsonl", [{"_id": 1.0, "text": "q?"}], "queries.jsonl, line 1: _id is 1.0, expected a string"),
        ("queries.jsonl", [{"_id": "1", "text": ""}], "queries.jsonl, line 1: text is empty"),
        ("queries.jsonl", [{"_id": "1", "text": "q?", "metadata": {"answer": 3}}], "line 1: metadata has answers 3"),
        ("corpus.jsonl", [{"title": "t", "text": "x"}], "corpus.jsonl, line 1: id is None"),
        (
            "corpus.jsonl",
            [{"_id": "d1", "text": "x"}, {"_id": "d1", "text": "y"}],
            "line 2: the id 'd1' is already in the corpus",
        ),
    ],
)
def test_bad_files(tmp_path, beir_folder, name, lines, message):
    texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    (beir_folder / name).write_text("".join(text + "\n" for text in texts))
    changes = {"qrels_file": beir_folder / name} if name == "qrels.tsv" else {}
    with pytest.raises(ValueError, match=message):
        prepare(options(tmp_path, **changes))
    assert [path.name for path in tmp_path.iterdir()] == ["beir"]


def test_queries_that_are_passages_are_counted(tmp_path, beir_folder):
    (beir_folder / "corpus.jsonl").write_text(
        '{"_id": "1", "text": "what do otters eat?"}\n{"_id": "d1", "text": "x"}\n'
    )
    counts = prepare(options(tmp_path))
    assert counts["queries with the id of a passage, which BEIR ignores"] == 1


def test_byte_order_marks_are_read(tmp_path, beir_folder):
    expected = prepare(options(tmp_path))
    for name in ("beir_qrels.tsv", "beir_queries.jsonl"):
        marked = (FORMATS / name).read_text().encode("utf-8-sig")
        (beir_folder / name.removeprefix("beir_")).write_bytes(marked)
    assert prepare(options(tmp_path, qrels_file=beir_folder / "qrels.tsv")) == expected


def test_a_missing_corpus_and_a_dataset_without_instruction(tmp_path, beir_folder):
    with pytest.raises(FileNotFoundError, match="holds no corpus.jsonl, nor corpus.jsonl.gz"):
        prepare(options(tmp_path, input_dir=tmp_path))
    with pytest.raises(ValueError, match="instructions.json has no instruction for 'scifact', only for nq, triviaqa"):
        prepare(options(tmp_path, dataset="scifact"))
