"""KILT and BEIR: every question, passage and count of small files in their formats, the corners of provenance, and bad input."""

import gzip
import json
import sys
from argparse import Namespace
from collections import Counter
from pathlib import Path

import prepare_beir
import prepare_kilt
import pytest

from modeling_cosup.lines_cosup import writing_lines
from trainer import load_corpus, load_evaluation_set

FORMATS = Path(__file__).parent / "data_formats"
NQ = "Answer the following question with corresponding evidence."


def kilt(tmp_path, **changes):
    """Options of the recipe: the small questions over the small pages, passages of six words."""
    options = {
        "task": "nq",
        "input_file": FORMATS / "kilt_questions.jsonl",
        "knowledge_file": FORMATS / "kilt_pages.jsonl",
        "corpus_file": None,
    }
    options |= {
        "output_file": tmp_path / "eval.jsonl",
        "output_corpus": tmp_path / "corpus.jsonl",
        "words": 6,
        "config_name": None,
        "split": "validation",
    }
    options |= {"match": "title", "max_other_pages": None, "triviaqa_file": None, "instruction": None, **changes}
    return Namespace(**options)


def beir(tmp_path, **changes):
    options = {
        "input_dir": tmp_path / "beir",
        "qrels_file": FORMATS / "beir_qrels.tsv",
        "dataset": "nq",
        "instruction": None,
    }
    return Namespace(
        **{**options, "output_file": tmp_path / "eval.jsonl", "output_corpus": tmp_path / "corpus.jsonl", **changes}
    )


def write(path, *lines):
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


def read(path):
    return [json.loads(line) for line in (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8")]


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
    assert [
        (p["wikipedia_id"], p["start_paragraph_id"], p["end_paragraph_id"])
        for p in read(tmp_path / "corpus.jsonl")[1:4]
    ] == [
        ("10", 1, 2),
        ("10", 4, 4),
        ("10", 4, 5),
    ]
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
    assert [p["id"] for p in load_corpus(tmp_path / "corpus.jsonl")] == [
        "10-0",
        "10-1",
        "10-2",
        "10-3",
        "11-0",
        "13-0",
    ]


def test_passages_that_do_not_name_their_page_are_found_by_title_or_id(tmp_path):
    dpr = kilt(tmp_path, knowledge_file=None, corpus_file=FORMATS / "dpr_passages.tsv")
    assert prepare_kilt.prepare(dpr)["provenance: found by title alone"] == 6
    assert {q["id"]: q["provenance"] for q in read(tmp_path / "eval.jsonl")}["q2"] == [
        ["1", "10"],
        ["2", "10"],
    ]  # "10" is no page here, though page 10 exists
    assert load_corpus(tmp_path / "corpus.jsonl")[0] == {
        "id": "1",
        "title": "Otter",
        "text": 'Otters are "mammals" that swim.\tThey float.',
    }

    prepare_kilt.prepare(kilt(tmp_path, knowledge_file=None, corpus_file=FORMATS / "dpr_passages.tsv", match="id"))
    assert {q["id"]: q["provenance"] for q in read(tmp_path / "eval.jsonl")} == {"q1": [["10"]], "q3": [["10"]]}


def test_tasks_of_their_own_kind(tmp_path):
    reference = {"wikipedia_id": "10", "title": "Otter", "start_paragraph_id": 1, "end_paragraph_id": -1}
    question = {"id": "t1", "input": "", "output": [{"answer": "SUPPORTS", "provenance": [reference]}]}
    file = write(tmp_path / "questions.jsonl", question)
    trivia = tmp_path / "wikipedia-dev.json"
    trivia.write_text(json.dumps({"Data": [{"QuestionId": "t1", "Question": "what swims?"}]}))

    prepare_kilt.prepare(kilt(tmp_path, task="triviaqa", input_file=file, triviaqa_file=trivia))
    (found,) = read(tmp_path / "eval.jsonl")
    assert (found["input"], found["answers"], found["instruction"]) == ("what swims?", ["SUPPORTS"], NQ)
    assert found["provenance"] == [["10-0"], ["10-1"]]  # -1 is no paragraph: the range is its first one

    write(file, {**question, "input": "Otters swim."})
    prepare_kilt.prepare(kilt(tmp_path, task="fever", input_file=file, instruction=""))
    (found,) = read(tmp_path / "eval.jsonl")
    assert (found["answers"], found["instruction"]) == (["supports"], "")


def test_a_data_set_folder_is_read_like_a_file(tmp_path):
    (tmp_path / "set").mkdir()
    lines = [
        {"id": q["id"], "input": q["input"], "output": q.get("output", [])}
        for q in read(FORMATS / "kilt_questions.jsonl")
    ]
    write(tmp_path / "set" / "validation.jsonl", *lines)  # data sets fill what a row lacks with None
    prepare_kilt.prepare(kilt(tmp_path))
    expected = read(tmp_path / "eval.jsonl")
    for config_name in (None, "default"):
        prepare_kilt.prepare(kilt(tmp_path, input_file=str(tmp_path / "set"), config_name=config_name))
        assert read(tmp_path / "eval.jsonl") == expected


def test_too_many_combinations_are_cut_and_counted(tmp_path, monkeypatch):
    monkeypatch.setattr(prepare_kilt, "MAX_SETS", 2)
    counts = prepare_kilt.prepare(kilt(tmp_path))
    assert counts["evidence sets of more than 2 combinations, of which each passage is in one"] == 1
    whole = {q["id"]: q["provenance"] for q in read(tmp_path / "eval.jsonl")}["q3"]
    monkeypatch.undo()
    prepare_kilt.prepare(kilt(tmp_path))
    assert {id for ids in whole for id in ids} == {
        id for q in read(tmp_path / "eval.jsonl") if q["id"] == "q3" for ids in q["provenance"] for id in ids
    }


def test_every_passage_of_a_large_page_stays_right():
    pages, places = [[f"a{i}" for i in range(60)], [f"b{i}" for i in range(50)], ["c"]], Counter()
    sets = prepare_kilt.combine(pages, places)
    assert (
        len(sets) == 60
        and {id for ids in sets for id in ids} == {id for page in pages for id in page}
        and sum(places.values()) == 1
    )
    assert all(ids[0][0] + ids[1][0] + ids[2] == "abc" for ids in sets)
    assert (
        prepare_kilt.combine([["a", "b"], ["c"]], places) == [("a", "c"), ("b", "c")]
        and prepare_kilt.combine([["a"], []], places) == []
    )


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
        (GOOD, {**PAGE, "wikipedia_id": ""}, "pages.jsonl, line 1: wikipedia_id is ''"),
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
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "pages.jsonl",
        "questions.jsonl",
    ]  # nothing unfinished, nothing half


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"output_corpus": None}, "say where they go with --output_corpus"),
        ({"words": 0}, "--words is 0"),
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
    write(files / "header.tsv", "id\ttitle\ttext", "1\tOtter\tfish")
    write(files / "columns.tsv", "id\ttext\ttitle", "1\tfish")
    write(files / "elsewhere.tsv", "id\ttext\ttitle", "1\tfish\tAnother title")
    (files / "damaged.tsv.gz").write_bytes(gzip.compress(b"id\ttext\ttitle\n" + b"1\tfish\tOtter\n" * 1000)[:-20])
    changes = {
        name: files / value if value in {path.name for path in files.iterdir()} else value
        for name, value in changes.items()
    }
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
    options = [
        "--task",
        "zsre",
        "--input_file",
        FORMATS / "kilt_questions.jsonl",
        "--knowledge_file",
        FORMATS / "kilt_pages.jsonl",
    ]
    options += ["--output_file", tmp_path / "eval.jsonl", "--output_corpus", tmp_path / "corpus.jsonl"]
    monkeypatch.setattr(sys, "argv", ["prepare_kilt.py", *map(str, options)])
    prepare_kilt.main()
    rows = dict(line.strip().rsplit("  ", 1) for line in capsys.readouterr().out.splitlines())
    assert {name.strip(): int(count) for name, count in rows.items()}["questions written"] == 4
    assert load_evaluation_set(tmp_path / "eval.jsonl")[0]["instruction"].startswith("Find the correct entity")

    monkeypatch.setattr(
        sys, "argv", ["prepare_kilt.py", *map(str, [*options[:3], tmp_path / "missing.jsonl", *options[4:]])]
    )
    with pytest.raises(SystemExit, match="error: .*missing.jsonl is not a file"):
        prepare_kilt.main()


# ---------------------------------------------------------------------- BEIR


@pytest.fixture
def beir_folder(tmp_path):
    folder = tmp_path / "beir"
    folder.mkdir()
    (folder / "corpus.jsonl.gz").write_bytes(gzip.compress((FORMATS / "beir_corpus.jsonl").read_bytes()))
    (folder / "queries.jsonl").write_bytes((FORMATS / "beir_queries.jsonl").read_bytes())
    return folder


def test_beir(tmp_path, beir_folder):
    counts = prepare_beir.prepare(beir(tmp_path))
    assert dict(counts) == {
        "passages left out: no text": 1,
        "passages in the corpus": 3,
        "queries written, with answers": 1,
        "queries written, without answers": 1,
        "queries left out: of another split": 1,
        "queries left out: the corpus lacks their passages": 1,
        "gold passages": 3,
        "gold passages that the corpus lacks": 1,
    }
    corpus = load_corpus(tmp_path / "corpus.jsonl")
    assert corpus[1] == {"id": "d2", "title": "", "text": "Coffee with milk."}
    found = load_evaluation_set(tmp_path / "eval.jsonl", corpus=corpus, answers_required=False)
    assert [(q["id"], q["input"], q["answers"], q["provenance"]) for q in found] == [
        ("1", "what do otters eat?", ["fish"], [["d1"]]),  # d2 has relevance 0
        ("2", "what is with milk?", [], [["d2"], ["d4"]]),
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
        ("queries.jsonl", [{"_id": "1", "text": ""}], "queries.jsonl, line 1: text is ''"),
        ("queries.jsonl", [{"_id": "1", "text": "q?", "metadata": {"answer": 3}}], "line 1: metadata has answers 3"),
        ("corpus.jsonl", [{"title": "t", "text": "x"}], "corpus.jsonl, line 1: id is None"),
        (
            "corpus.jsonl",
            [{"_id": "d1", "text": "x"}, {"_id": "d1", "text": "y"}],
            "line 2: the id 'd1' occurs twice",
        ),
    ],
)
def test_bad_beir_files(tmp_path, beir_folder, name, lines, message):
    write(beir_folder / name, *lines)
    changes = {"qrels_file": beir_folder / name} if name == "qrels.tsv" else {}
    with pytest.raises(ValueError, match=message):
        prepare_beir.prepare(beir(tmp_path, **changes))
    assert [path.name for path in tmp_path.iterdir()] == ["beir"]


def test_beir_folder_and_instruction_must_be_there(tmp_path, beir_folder):
    with pytest.raises(FileNotFoundError, match="holds no corpus.jsonl, nor corpus.jsonl.gz"):
        prepare_beir.prepare(beir(tmp_path, input_dir=tmp_path))
    with pytest.raises(ValueError, match="instructions.json has no instruction for 'scifact', only for nq, triviaqa"):
        prepare_beir.prepare(beir(tmp_path, dataset="scifact"))
