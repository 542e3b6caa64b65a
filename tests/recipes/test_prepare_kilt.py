"""KILT: every question, passage and count of small files in its format, corner cases of provenance, and bad input."""

import gzip
import itertools
import json
import sys
from argparse import Namespace
from collections import Counter
from pathlib import Path

import prepare_kilt
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from modeling_cosup.lines_cosup import writing_lines
from trainer import load_corpus, load_evaluation_set

from shared.data_files import read_passages

FORMATS = Path(__file__).parent / "data_formats"
NQ = "Answer the following question with corresponding evidence."


def kilt(tmp_path, **changes):
    """Return options of the recipe, for the small questions over the small pages, with passages of six words."""
    defaults = {
        "task": "nq",
        "input_file": FORMATS / "kilt_questions.jsonl",
        "knowledge_file": FORMATS / "kilt_pages.jsonl",
        "corpus_file": None,
        "output_file": tmp_path / "eval.jsonl",
        "output_corpus": tmp_path / "corpus.jsonl",
        "words": 6,
        "config_name": None,
        "split": None,
        "match": "title",
        "max_other_pages": None,
        "triviaqa_file": None,
        "instruction": None,
    }
    if changes.get("corpus_file"):
        defaults["words"] = 100  # the default: passages are not cut
    return Namespace(**defaults | changes)


def write(path, *lines):
    texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    path.write_text("".join(text + "\n" for text in texts))
    return path


def read(path):
    open_file = gzip.open if path.suffix == ".gz" else open
    with open_file(path, "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def read_provenance(path):
    """Return the evidence sets of each question, by its id."""
    return {question["id"]: question["provenance"] for question in read(path)}


def test_pages_are_cut_and_provenance_finds_the_paragraph(tmp_path):
    counts = prepare_kilt.prepare(kilt(tmp_path))
    passages = load_corpus(tmp_path / "corpus.jsonl")
    assert [(p["id"], p["title"], p["text"]) for p in passages] == [
        ("10-0", "Otter", "Otters are mammals that swim in"),
        ("10-1", "Otter", "rivers and lakes. They eat fish."),
        ("10-2", "Otter", "Pups learn to swim at two"),  # a heading ends a passage
        ("10-3", "Otter", "months. - Mothers carry them."),
        ("11-0", "Café au lait", "Coffee with hot milk."),
        ("13-0", "Other page", "Nobody asks about this one."),
        ("14-0", "Another page", "Nobody asks about this one either."),
    ]
    places = []
    for passage in read(tmp_path / "corpus.jsonl")[1:4]:
        places.append((passage["wikipedia_id"], passage["start_paragraph_id"], passage["end_paragraph_id"]))
    assert places == [("10", 1, 2), ("10", 4, 4), ("10", 4, 5)]
    questions = load_evaluation_set(tmp_path / "eval.jsonl", corpus=passages)
    assert {question["id"]: (question["answers"], question["provenance"]) for question in questions} == {
        "q1": (["fish", "Fish"], [["10-1"]]),  # the same evidence twice is one set
        "q2": (["none"], [["10-0", "11-0"], ["10-1", "11-0"]]),  # one range, two passages; one page without a range
        "q3": (["pups"], [["10-0"], ["10-1"], ["10-2"], ["10-3"]]),  # the range is a heading: any passage of the page
        "q8": (["milk"], [["11-0"]]),
    }
    assert questions[0]["input"] == "what do otters eat?"
    assert {(question["dataset"], question["instruction"]) for question in questions} == {("nq", NQ)}
    assert dict(counts) == {
        "questions read": 8,
        "questions left out: no answer": 1,
        "questions left out: no provenance": 1,
        "pages": 5,
        "passages in the corpus": 7,
        "questions written": 4,
        "questions left out: the corpus lacks their pages": 2,
        "provenance: found by page and paragraph": 4,
        "provenance: found by page alone": 1,
        "provenance: no passage of its paragraphs, found by page alone": 1,
        "provenance: page not in the corpus": 3,
        "gold passages": 5,
    }


def test_a_corpus_that_was_cut_serves_the_next_task(tmp_path):
    prepare_kilt.prepare(kilt(tmp_path, output_corpus=tmp_path / "corpus.jsonl.gz"))
    first = read(tmp_path / "eval.jsonl")
    again = kilt(
        tmp_path,
        knowledge_file=None,
        corpus_file=tmp_path / "corpus.jsonl.gz",
        output_corpus=None,
        output_file=tmp_path / "again.jsonl.gz",
    )
    prepare_kilt.prepare(again)
    assert read(tmp_path / "again.jsonl.gz") == first
    assert sorted(path.name for path in tmp_path.iterdir()) == ["again.jsonl.gz", "corpus.jsonl.gz", "eval.jsonl"]


def test_a_small_corpus_keeps_all_gold_pages(tmp_path):
    prepare_kilt.prepare(kilt(tmp_path, max_other_pages=1))
    ids = [passage["id"] for passage in load_corpus(tmp_path / "corpus.jsonl")]
    assert ids == ["10-0", "10-1", "10-2", "10-3", "11-0", "13-0"]


def test_passages_that_do_not_name_their_page_are_found_by_title_or_id(tmp_path):
    dpr = kilt(tmp_path, knowledge_file=None, corpus_file=FORMATS / "dpr_passages.tsv")
    assert prepare_kilt.prepare(dpr)["provenance: found by title alone"] == 6
    # The passage "10" is found by its title. That there is a page 10 does not matter.
    assert read_provenance(tmp_path / "eval.jsonl")["q2"] == [["1", "10"], ["2", "10"]]
    assert load_corpus(tmp_path / "corpus.jsonl")[0] == {
        "id": "1",
        "title": "Otter",
        "text": 'Otters are "mammals" that swim.\tThey float.',
    }

    prepare_kilt.prepare(kilt(tmp_path, knowledge_file=None, corpus_file=FORMATS / "dpr_passages.tsv", match="id"))
    assert read_provenance(tmp_path / "eval.jsonl") == {"q1": [["10"]], "q3": [["10"]]}


def test_triviaqa_and_fever(tmp_path):
    reference = {"wikipedia_id": "10", "title": "Otter", "start_paragraph_id": 1, "end_paragraph_id": -1}
    question = {"id": "t1", "input": "", "output": [{"answer": "SUPPORTS", "provenance": [reference]}]}
    file = write(tmp_path / "questions.jsonl", question)
    trivia = tmp_path / "wikipedia-dev.json"
    trivia.write_text(json.dumps({"Data": [{"QuestionId": "t1", "Question": "what swims?"}]}))

    prepare_kilt.prepare(kilt(tmp_path, task="triviaqa", input_file=file, triviaqa_file=trivia))
    (instance,) = read(tmp_path / "eval.jsonl")
    assert (instance["input"], instance["answers"], instance["instruction"]) == ("what swims?", ["SUPPORTS"], NQ)
    assert instance["provenance"] == [["10-0"], ["10-1"]]  # -1 is no paragraph: the range is the first one

    write(file, {**question, "input": "Otters swim."})
    prepare_kilt.prepare(kilt(tmp_path, task="fever", input_file=file, instruction=""))
    (instance,) = read(tmp_path / "eval.jsonl")
    assert (instance["answers"], instance["instruction"]) == (["supports"], "")


def test_a_dataset_folder_is_read_like_a_file(tmp_path):
    rows = []
    for question in read(FORMATS / "kilt_questions.jsonl"):
        # All rows of a dataset have the same fields.
        rows.append({"id": question["id"], "input": question["input"], "output": question.get("output", [])})
    (tmp_path / "set").mkdir()
    write(tmp_path / "set" / "validation.jsonl", *rows)
    prepare_kilt.prepare(kilt(tmp_path))
    expected = read(tmp_path / "eval.jsonl")
    for config_name in (None, "default"):
        prepare_kilt.prepare(kilt(tmp_path, input_file=str(tmp_path / "set"), config_name=config_name))
        assert read(tmp_path / "eval.jsonl") == expected


def test_too_many_combinations_are_cut_and_counted(tmp_path, monkeypatch):
    monkeypatch.setattr(prepare_kilt, "MAX_SETS", 2)
    counts = prepare_kilt.prepare(kilt(tmp_path))
    assert counts["evidence sets of more than 2 combinations, of which each passage is in one"] == 1
    cut = read_provenance(tmp_path / "eval.jsonl")["q3"]
    monkeypatch.undo()
    prepare_kilt.prepare(kilt(tmp_path))
    whole = read_provenance(tmp_path / "eval.jsonl")["q3"]
    assert set(itertools.chain(*cut)) == set(itertools.chain(*whole))


def test_every_passage_of_a_large_page_stays_right():
    pages = [[f"a{i}" for i in range(60)], [f"b{i}" for i in range(50)], ["c"]]
    matches = Counter()
    sets = prepare_kilt.combine(pages, matches)
    assert len(sets) == 60
    assert set(itertools.chain(*sets)) == set(itertools.chain(*pages))
    assert sum(matches.values()) == 1
    for first, second, third in sets:
        assert first.startswith("a") and second.startswith("b") and third == "c"


def test_combinations_of_small_pages():
    assert prepare_kilt.combine([["a", "b"], ["c"]], Counter()) == [("a", "c"), ("b", "c")]
    assert prepare_kilt.combine([["a"], []], Counter()) == []


GOOD = {"id": "q", "input": "q?", "output": [{"answer": "a", "provenance": [{"wikipedia_id": "10"}]}]}
PAGE = {"wikipedia_id": "10", "wikipedia_title": "Otter", "text": ["They eat fish."]}


@pytest.mark.parametrize(
    ("question", "page", "message"),
    [
        ({**GOOD, "output": "a"}, PAGE, "questions.jsonl, line 2: output is 'a', expected a list"),
        ({**GOOD, "output": ["a"]}, PAGE, r"line 2: output\[0\] is 'a', expected an object"),
        ({**GOOD, "output": [{"answer": 3}]}, PAGE, r"line 2: output\[0\].answer is 3, expected a string"),
        (
            {**GOOD, "output": [{"provenance": [{"title": "Otter"}]}]},
            PAGE,
            r"line 2: output\[0\].provenance is .* a list of objects with wikipedia_id",
        ),
        ({**GOOD, "input": None}, PAGE, "line 2: input is None"),
        ("{", PAGE, "line 2: malformed JSON"),
        (
            GOOD,
            {**PAGE, "text": "They eat fish."},
            "pages.jsonl, line 1: text is 'They eat fish.', expected a list of paragraphs",
        ),
        (GOOD, {**PAGE, "wikipedia_title": None}, "pages.jsonl, line 1: wikipedia_title is None"),
        (GOOD, {**PAGE, "wikipedia_id": ""}, "pages.jsonl, line 1: wikipedia_id is empty"),
    ],
)
def test_bad_kilt_files(tmp_path, question, page, message):
    options = kilt(
        tmp_path,
        input_file=write(tmp_path / "questions.jsonl", GOOD, question),
        knowledge_file=write(tmp_path / "pages.jsonl", page),
    )
    with pytest.raises(ValueError, match=message):
        prepare_kilt.prepare(options)
    # no unfinished file is left
    assert sorted(path.name for path in tmp_path.iterdir()) == ["pages.jsonl", "questions.jsonl"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"output_corpus": None}, "say where they go with --output_corpus"),
        ({"words": 0}, "--words is 0"),
        ({"output_corpus": "good.json", "output_file": "good.json"}, "are both .*good.json, expected two files"),
        ({"split": "train"}, "--split is for the name of a dataset, and .*kilt_questions.jsonl is a file"),
        ({"config_name": "nq"}, "--config_name is for the name of a dataset, and .*kilt_questions.jsonl is a file"),
        (
            {"knowledge_file": None, "corpus_file": "start.jsonl"},
            "start.jsonl, line 1: start_paragraph_id and end_paragraph_id are 1 and None, expected two integers",
        ),
        (
            {"knowledge_file": None, "corpus_file": "text.jsonl"},
            "text.jsonl, line 1: start_paragraph_id and end_paragraph_id are '1' and '2', expected two integers",
        ),
        ({"task": "triviaqa", "input_file": "empty"}, "TriviaQA's files hold none, name its own as --triviaqa_file"),
        (
            {"task": "triviaqa", "input_file": "empty", "triviaqa_file": "good.json"},
            "line 1: no question .*good.json lacks q",
        ),
        ({"task": "triviaqa", "triviaqa_file": "bad.json"}, "expected TriviaQA's JSON"),
        (
            {"knowledge_file": None, "corpus_file": "header.tsv"},
            r"header.tsv, line 1: the header is .* expected \['id', 'text', 'title'\]",
        ),
        ({"knowledge_file": None, "corpus_file": "columns.tsv"}, "columns.tsv, line 2: found 2 columns, expected 3"),
        ({"knowledge_file": None, "corpus_file": "damaged.tsv.gz"}, "damaged.tsv.gz is damaged"),
        (
            {"knowledge_file": None, "corpus_file": "elsewhere.tsv"},
            "(?s)No question is left.*the corpus lacks their pages +6",
        ),
    ],
)
def test_bad_options_and_corpora(tmp_path, changes, message):
    files = tmp_path / "files"
    files.mkdir()
    write(files / "empty", {**GOOD, "input": ""})
    write(files / "good.json", '{"Data": [{"QuestionId": "other", "Question": "q?"}]}')
    write(files / "bad.json", "[]")
    passage = {"id": "1", "title": "Otter", "text": "fish", "wikipedia_id": "10"}
    write(files / "start.jsonl", {**passage, "start_paragraph_id": 1})
    write(files / "text.jsonl", {**passage, "start_paragraph_id": "1", "end_paragraph_id": "2"})
    write(files / "header.tsv", "id\ttitle\ttext", "1\tOtter\tfish")
    write(files / "columns.tsv", "id\ttext\ttitle", "1\tfish")
    write(files / "elsewhere.tsv", "id\ttext\ttitle", "1\tfish\tAnother title")
    (files / "damaged.tsv.gz").write_bytes(gzip.compress(b"id\ttext\ttitle\n" + b"1\tfish\tOtter\n" * 1000)[:-20])
    for name, value in changes.items():
        if isinstance(value, str) and (files / value).is_file():
            changes = {**changes, name: files / value}
    with pytest.raises(ValueError, match=message):
        prepare_kilt.prepare(kilt(tmp_path, **changes))
    assert [path.name for path in tmp_path.iterdir()] == ["files"]


def test_the_same_lines_are_the_same_bytes_and_a_failure_leaves_the_old_file(tmp_path):
    for name in ("a.jsonl.gz", "b.jsonl.gz"):
        with writing_lines(tmp_path / name) as line:
            line({"text": "é"})
    assert (tmp_path / "a.jsonl.gz").read_bytes() == (tmp_path / "b.jsonl.gz").read_bytes()
    with pytest.raises(RuntimeError), writing_lines(tmp_path / "a.jsonl.gz") as line:
        line({"text": "new"})
        raise RuntimeError
    assert read(tmp_path / "a.jsonl.gz") == [{"text": "é"}]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl.gz", "b.jsonl.gz"]


def test_command_line_prints_the_counts(tmp_path, monkeypatch, capsys):
    questions, pages = FORMATS / "kilt_questions.jsonl", FORMATS / "kilt_pages.jsonl"
    options = ["--task", "zsre", "--knowledge_file", str(pages)]
    options += ["--output_file", str(tmp_path / "eval.jsonl"), "--output_corpus", str(tmp_path / "corpus.jsonl")]
    monkeypatch.setattr(sys, "argv", ["prepare_kilt.py", *options, "--input_file", str(questions)])
    prepare_kilt.main()
    counts = {}
    for line in capsys.readouterr().out.splitlines():
        name, count = line.strip().rsplit("  ", 1)
        counts[name.strip()] = int(count)
    assert counts["questions written"] == 4
    assert load_evaluation_set(tmp_path / "eval.jsonl")[0]["instruction"].startswith("Find the correct entity")

    missing = tmp_path / "missing.jsonl"
    monkeypatch.setattr(sys, "argv", ["prepare_kilt.py", *options, "--input_file", str(missing)])
    with pytest.raises(SystemExit, match="error: .*missing.jsonl: no such file or folder"):
        prepare_kilt.main()


def test_a_corpus_in_parquet_keeps_paragraphs_and_metadata(tmp_path):
    row = {"id": "1", "title": "t", "text": "x", "wikipedia_id": "12", "start_paragraph_id": 3, "end_paragraph_id": 4}
    rows = [{**row, "metadata": {"source": "a.pdf"}}, {**row, "id": "2", "metadata": None}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "corpus.parquet")
    write(tmp_path / "corpus.jsonl", *rows)
    for name in ("corpus.parquet", "corpus.jsonl"):
        passages = [passage for _, passage in read_passages(tmp_path / name)]
        assert passages == [rows[0], {**row, "id": "2"}]
