"""Question–answer sets of every form: what a row becomes, the split, refused rows, and bad input."""

import csv
import gzip
import json
import sys
from argparse import Namespace
from unittest.mock import Mock

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from prepare_qa import main, prepare
from prepare_retriever_data import prepare as prepare_retriever

from modeling_cosup.lines_cosup import read_lines
from support.models import make_model
from support.training import arguments
from trainer import CoSupTrainer, load_corpus, load_evaluation_set, load_instances
from trainer.data import content_id

from shared.data_files import read_table
from shared.qa_records import Columns, Refused, read_record

ADA = {"title": "Ada", "text": "Ada was born in London. She wrote notes."}
BOB = {"title": "Bob", "text": "Bob lived in Rome."}
EVE = {"title": "Eve", "text": "Eve was never there."}


def with_id(passage):
    return {"id": content_id(**passage), **passage}


def options(tmp_path, name, **changes):
    defaults = {
        "input_file": str(tmp_path / name),
        "output_dir": str(tmp_path / "out"),
        "config_name": None,
        "split": None,
        "column_names": None,
        "validation_fraction": 0.0,
        "answer_style": "short",
        "num_negatives": 1,
        "dataset": None,
        "instruction": "",
        "on_error": "skip",
    }
    defaults |= {f"{role}_column": None for role in ("question", "answer", "passage", "title", "negative", "id")}
    return Namespace(**defaults | changes)


def run(tmp_path, name, rows, **changes):
    """Write rows as the name says, prepare them, and return the counts and the lines of all files."""
    write(tmp_path / name, rows)
    counts = prepare(options(tmp_path, name, **changes))
    return counts, {path.stem: read_lines(path) for path in (tmp_path / "out").iterdir()}


def write(path, rows):
    path.parent.mkdir(exist_ok=True)
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif path.suffix in (".csv", ".tsv"):
        with path.open("w", newline="") as file:
            table = csv.DictWriter(file, rows[0], delimiter="\t" if path.suffix == ".tsv" else ",")
            table.writeheader()
            table.writerows(rows)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        data = json.dumps(rows, indent=1).encode()
        path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)


# ---------------------------------------------------------------------- formats


def test_dpr(tmp_path):
    rows = [
        {
            "question": "where was Ada born?",
            "answers": ["London", "london", "London"],
            "positive_ctxs": [{**ADA, "passage_id": "7", "score": 1.5}, {**BOB, "passage_id": "8"}],
            "negative_ctxs": [EVE, ADA],
            "hard_negative_ctxs": [{"title": "Zoe", "text": "Zoe is near."}],
        },
        {
            "question": "who?",
            "answers": ["Bob"],
            "positive_ctxs": [],
            "negative_ctxs": [],
            "hard_negative_ctxs": [EVE],
        },
    ]
    zoe = with_id({"title": "Zoe", "text": "Zoe is near."})
    counts, files = run(tmp_path, "nq.json.gz", rows)
    assert dict(counts) == {
        "rows read": 2,
        "train.jsonl: questions with a passage and an answer": 1,
        "corpus.jsonl: passages": 4,
        "train.jsonl: questions with answers alone": 1,
    }
    first, second = load_instances(tmp_path / "out/train.jsonl")
    assert first["segments"] == [
        {"text": "London", "passage": with_id(ADA), "negatives": [zoe], "positives": [content_id(**BOB)]}
    ]
    assert (first["dataset"], second["answers"], second["segments"]) == ("nq", ["Bob"], [])
    assert second["candidates"] == [content_id(**EVE)]
    assert files["corpus"] == [with_id(ADA), with_id(BOB), zoe, with_id(EVE)]

    for number, expected in ((0, []), (5, [zoe, with_id(EVE)])):  # a right passage is no wrong one
        run(tmp_path, "nq.json.gz", rows, num_negatives=number)
        assert load_instances(tmp_path / "out/train.jsonl")[0]["segments"][0]["negatives"] == expected

    run(tmp_path, "nq.json.gz", rows, validation_fraction=1, output_dir=str(tmp_path / "eval"))
    corpus = load_corpus(tmp_path / "eval/corpus.jsonl")
    first, second = load_evaluation_set(tmp_path / "eval/eval.jsonl", corpus=corpus)
    assert first["answers"] == ["London", "london"]
    assert first["provenance"] == [[content_id(**ADA)], [content_id(**BOB)]]
    assert first["candidates"] == [passage["id"] for passage in (with_id(ADA), with_id(BOB), zoe, with_id(EVE))]
    assert second["meta"] == {"provenance_unknown": True}


SQUAD = {
    "version": "v2.0",
    "data": [
        {
            "title": "Ada_Lovelace",
            "paragraphs": [
                {
                    "context": ADA["text"],
                    "qas": [
                        {"id": "a", "question": "where?", "answers": [{"text": "London", "answer_start": 16}] * 3},
                        {"id": "b", "question": "when?", "answers": [], "is_impossible": True},
                    ],
                }
            ],
        },
        {"paragraphs": [{"context": "Bob.", "qas": [{"id": 3, "question": "who?", "answers": [{"text": "Bob"}]}]}]},
    ],
}
FLAT = [
    {
        "id": "a",
        "title": "Ada_Lovelace",
        "context": ADA["text"],
        "question": "where?",
        "answers": {"text": ["London"] * 3, "answer_start": [16] * 3},
    },
    {
        "id": "b",
        "title": "Ada_Lovelace",
        "context": ADA["text"],
        "question": "when?",
        "answers": {"text": [], "answer_start": []},
    },
    {"id": "3", "title": "", "context": "Bob.", "question": "who?", "answers": {"text": ["Bob"], "answer_start": [0]}},
]


@pytest.mark.parametrize(("name", "rows"), [("squad.json", SQUAD), ("squad.jsonl", FLAT), ("squad.parquet", FLAT)])
def test_squad_nested_and_flat(tmp_path, name, rows):
    counts, files = run(tmp_path, name, rows)
    passage = with_id({"title": "Ada Lovelace", "text": ADA["text"]})
    segments = [instance["segments"] for instance in files["train"]]
    assert segments[0] == [{"text": "London", "passage": passage}]
    assert [instance["id"] for instance in files["train"]] == ["a", "3"]
    assert counts["rows refused: no answer"] == 1  # of SQuAD 2.0: the passage has none
    (refused,) = files["refused"]
    assert refused["where"].endswith(
        ("item 0, paragraph 0, question 1", "squad.jsonl, line 2", "squad.parquet, row 1")
    )


def test_a_byte_order_mark_before_json(tmp_path):
    for rows, name in ((SQUAD, "a.json"), (SQUAD["data"], "a.json"), (FLAT, "b.json.gz")):
        marked = json.dumps(rows).encode("utf-8-sig")
        (tmp_path / name).write_bytes(gzip.compress(marked) if name.endswith(".gz") else marked)
        prepare(options(tmp_path, name))
        assert [instance["id"] for instance in read_lines(tmp_path / "out/train.jsonl")] == ["a", "3"]


TABLE = [
    {"Frage": 'where "was" Ada born?', "Antwort": "London", "Text": ADA["text"], "Kopf": "Ada"},
    {"Frage": "who;\nthen?", "Antwort": '["Bob", "he"]', "Text": "", "Kopf": ""},
    {"Frage": "who else?", "Antwort": "['Bob Ray', \"O'Neil\"]", "Text": BOB["text"], "Kopf": "Bob"},
]
NAMED = {"question_column": "Frage", "answer_column": "Antwort", "passage_column": "Text", "title_column": "Kopf"}


@pytest.mark.parametrize("name", ["faq.csv", "faq.tsv", "faq.jsonl", "faq.parquet", "set/data.jsonl"])
def test_named_columns_in_every_kind_of_file(tmp_path, name, capsys, monkeypatch):
    is_dataset = name.startswith("set/")  # a folder, which is read like a dataset of the Hub
    changes = {"input_file": str(tmp_path / "set"), "dataset": "faq"} if is_dataset else {}
    load = Mock(wraps=datasets.load_dataset)
    monkeypatch.setattr(datasets, "load_dataset", load)
    _, files = run(tmp_path, name, TABLE, **NAMED, **changes)
    assert [call.kwargs["streaming"] for call in load.mock_calls if call.kwargs] == [True, True] * is_dataset
    ada, bob = with_id(ADA), with_id(BOB)
    assert [{name: row[name] for name in row if name != "id"} for row in files["train"]] == [
        {
            "dataset": "faq",
            "instruction": "",
            "input": 'where "was" Ada born?',
            "segments": [{"text": "London", "passage": ada}],
        },
        {"dataset": "faq", "instruction": "", "input": "who;\nthen?", "answers": ["Bob", "he"]},
        {
            "dataset": "faq",
            "instruction": "",
            "input": "who else?",
            "segments": [{"text": "Bob Ray", "passage": bob}],
            "answers": ["Bob Ray", "O'Neil"],
        },
    ]
    assert files["corpus"] == [ada, bob]
    assert "question: Frage; answer: Antwort; passage: Text; title: Kopf" in capsys.readouterr().out


def test_quotes_that_enclose_nothing_are_text_between_tabs(tmp_path):
    (tmp_path / "a.tsv").write_text('question\tanswer\n"Heroes" is by whom?\tDavid "Bowie\n"when?\t1977\n')
    rows = [row for _, row in read_table(tmp_path / "a.tsv")]
    assert [row["question"] for row in rows] == ['"Heroes" is by whom?', '"when?']
    assert [row["answer"] for row in rows] == ['David "Bowie', "1977"]


def test_tables_with_semicolons_and_without_a_header(tmp_path):
    (tmp_path / "a.csv").write_text("Question;ANSWER\nwho, then?;Bob\n", encoding="utf-8-sig")
    prepare(options(tmp_path, "a.csv"))
    assert load_instances(tmp_path / "out/train.jsonl")[0]["input"] == "who, then?"
    (tmp_path / "nq.tsv").write_text("who got it\t['Ada', 'Bob']\n")  # questions and answers of DPR
    (tmp_path / "nq-test.csv").write_text("who got it\t['Ada', 'Bob']\n")  # DPR's own names
    (tmp_path / "NQ.TSV").write_text('who got it\t"[\'Ada\', ""Bob""]"\n')
    for name in ("nq.tsv", "nq-test.csv", "NQ.TSV"):
        prepare(options(tmp_path, name, column_names=["question", "answers"]))
        assert load_instances(tmp_path / "out/train.jsonl")[0]["answers"] == ["Ada", "Bob"]


def test_pairs_and_triplets_are_for_a_retriever(tmp_path):
    rows = [
        {"anchor": "who wrote?", "positive": ADA["text"], "negative_2": BOB["text"], "negative_10": EVE["text"]},
        {"anchor": "who lived?", "positive": BOB["text"], "negative_2": ADA["text"], "negative_10": EVE["text"]},
    ]
    counts, files = run(tmp_path, "triplets.parquet", rows, num_negatives=2)
    assert counts["train.jsonl: questions with a passage alone"] == 2
    (segment,) = files["train"][0]["segments"]
    assert segment["text"] == "Ada was born in London."  # for training that writes; a retriever does not read it
    assert [negative["text"] for negative in segment["negatives"]] == [BOB["text"], EVE["text"]]
    retriever = {"train_file": str(tmp_path / "out/train.jsonl"), "output_file": tmp_path / "retriever.jsonl"}
    made = prepare_retriever(Namespace(**retriever, num_questions=None, keyword_share=0.0, seed=0))
    assert made["questions written"] == 2

    run(tmp_path, "triplets.parquet", rows, validation_fraction=1, output_dir=str(tmp_path / "eval"))
    questions = load_evaluation_set(tmp_path / "eval/eval.jsonl", answers_required=False)
    assert [len(question["candidates"]) for question in questions] == [3, 3]
    assert [question["answers"] for question in questions] == [[], []]


def test_a_column_that_an_option_names_is_nothing_else(tmp_path):
    """The pairs of sentence-transformers/natural-questions: an `answer` is a whole passage."""
    rows = [{"query": "where was Ada born?", "answer": ADA["text"]}]
    counts, files = run(tmp_path, "pairs.jsonl", rows, passage_column="answer")
    assert counts["train.jsonl: questions with a passage alone"] == 1
    assert files["corpus"] == [passage(ADA["text"])]
    assert files["train"][0]["segments"] == [{"text": "Ada was born in London.", "passage": passage(ADA["text"])}]


def test_a_title_may_also_be_the_id_or_the_question(tmp_path):
    rows = [{"title": "Ada", "question": "where?", "answer": "London", "context": ADA["text"]}]
    _, files = run(tmp_path, "a.jsonl", rows, id_column="title")
    assert (files["train"][0]["id"], files["corpus"][0]["title"]) == ("Ada", "Ada")
    _, files = run(tmp_path, "a.jsonl", rows, title_column="question")
    assert (files["train"][0]["input"], files["corpus"][0]["title"]) == ("where?", "where?")


def test_whole_sentences(tmp_path):
    rows = [
        {"question": "where?", "answer": "london", "passage": ADA["text"]},
        {"question": "what?", "answer": "note", "passage": ADA["text"]},  # no whole word of it
        {"question": "who?", "answer": "the", "passage": ADA["text"]},
        {"question": "どこ?", "answer": "東京", "passage": "彼は画家だ。「東京で生まれた。」と言う。彼は歩く。"},
        {"question": "首都は?", "answer": "東京", "passage": "国は日本。首都は東京。"},
        {"question": "首都?", "answer": "北京", "passage": "国是中国。首都是北京，人口多。"},
        {"question": "où?", "answer": "Paris", "passage": "One word is said. She said “Paris” twice."},
    ]
    counts, files = run(tmp_path, "a.jsonl", rows, answer_style="sentence")
    texts = [row["segments"][0]["text"] for row in files["train"]]
    assert texts == [
        *("Ada was born in London.", "note", "the", "「東京で生まれた。」と言う。"),
        *("首都は東京。", "首都是北京，人口多。", "She said “Paris” twice."),
    ]
    assert [row.get("answers") for row in files["train"][:4]] == [["london"], None, None, ["東京"]]
    assert counts["answers left short: no sentence of the passage holds them"] == 2


def test_found_passages_are_candidates(tmp_path):
    rows = [{"question": "where?", "answers": ["London"], "ctxs": [{"id": "1", **ADA}, {"id": "2", **BOB}]}]
    _, files = run(tmp_path, "fid.json", rows)
    assert files["train"][0]["candidates"] == [content_id(**ADA), content_id(**BOB)]
    assert files["corpus"] == [with_id(ADA), with_id(BOB)]


def test_candidates_of_evaluation_keep_the_order_in_which_they_were_found(tmp_path):
    """A pool without gold is possible: right passages stand where they were found, or last."""
    row = {"question": "where?", "answers": ["London"], "hard_negative_ctxs": [EVE]}
    zoe = {"title": "Zoe", "text": "Zoe is near."}
    for found, expected in (([BOB, ADA], [BOB, ADA, EVE, zoe]), ([BOB], [BOB, EVE, ADA, zoe]), ([], [ADA, zoe, EVE])):
        rows = [{**row, "positive_ctxs": [ADA, zoe], "ctxs": found}]
        _, files = run(tmp_path, "fid.json", rows, validation_fraction=1)
        assert files["eval"][0]["candidates"] == [content_id(**passage) for passage in expected]


def test_the_files_are_trained_on(tmp_path):
    rows = [{"question": f"who is {i}?", "answer": f"man {i}", "passage": f"Here man {i} is."} for i in range(4)]
    rows.append({"question": "who else?", "answer": "man 1", "passage": ""})
    run(tmp_path, "a.jsonl", rows)
    instances = load_instances(tmp_path / "out/train.jsonl")
    options = {"per_device_train_batch_size": 5, "supervision": "perplexity_distillation", "num_candidates": 2}
    args = arguments(tmp_path / "model", max_steps=1, **options)
    corpus = load_corpus(tmp_path / "out/corpus.jsonl")
    trainer = CoSupTrainer(make_model(), args, train_dataset=instances, corpus=corpus)
    trainer.train()
    log = trainer.state.log_history[0]
    assert log["nsp_loss"] > 0 and log["distillation_loss"] > 0  # of those with a passage, and of the last


# ---------------------------------------------------------------------- several rows of a question


def passage(text):
    return with_id({"title": "", "text": text})


TRIPLETS = [  # one wrong passage a row, as in many sets of the Hub
    {"query": "who?", "positive": "Right.", "negative": "Wrong 1."},
    {"query": "where?", "positive": "There.", "negative": "Wrong 1."},
    {"query": "who?", "positive": "Right.", "negative": "Wrong 2."},
    {"query": "who?", "positive": "Right.", "negative": "Wrong 3."},
]


def test_negatives_and_candidates_of_all_rows(tmp_path):
    counts, files = run(tmp_path, "a.jsonl", TRIPLETS, num_negatives=2)
    assert counts["rows merged into an earlier one: the same question"] == 2
    assert counts["train.jsonl: questions with a passage alone"] == 2
    segments = {row["input"]: row["segments"][0] for row in files["train"]}
    assert segments["who?"]["negatives"] == [passage("Wrong 1."), passage("Wrong 2.")]
    assert "positives" not in segments["who?"]
    texts = ["Right.", "Wrong 1.", "There.", "Wrong 2.", "Wrong 3."]
    assert files["corpus"] == [passage(text) for text in texts]

    run(tmp_path, "a.jsonl", TRIPLETS, validation_fraction=1, output_dir=str(tmp_path / "eval"))
    who = next(row for row in read_lines(tmp_path / "eval/eval.jsonl") if row["input"] == "who?")
    assert who["candidates"] == [passage(text)["id"] for text in ("Right.", "Wrong 1.", "Wrong 2.", "Wrong 3.")]


PAIRS = [
    {"query": "who?", "positive": "Right.", "negative": "Also right."},
    {"query": "Who? ", "positive": "Also right.", "negative": "Wrong."},
    {"query": "who?", "positive": "Right too.", "negative": "Wrong."},
]


def test_right_passages_of_other_rows_are_no_negatives(tmp_path):
    _, files = run(tmp_path, "a.jsonl", PAIRS)
    right = [passage(text)["id"] for text in ("Right.", "Also right.", "Right too.")]
    segments = [row["segments"][0] for row in files["train"]]
    assert [segment["passage"]["id"] for segment in segments] == right
    for segment in segments:
        assert sorted([segment["passage"]["id"], *segment["positives"]]) == sorted(right)
    assert "negatives" not in segments[0]
    assert segments[1]["negatives"] == segments[2]["negatives"] == [passage("Wrong.")]


def test_an_evaluated_question_has_the_right_passages_of_all_rows(tmp_path):
    counts, files = run(tmp_path, "a.jsonl", PAIRS, validation_fraction=1)
    right = {passage(text)["id"] for text in ("Right.", "Also right.", "Right too.")}
    assert counts["rows merged into an earlier one: the same question"] == 1
    assert [row["input"] for row in files["eval"]] == ["Who?", "who?"]  # "who?" waits for its last row
    for row in files["eval"]:
        assert {id for ids in row["provenance"] for id in ids} == right
        assert all(len(ids) == 1 for ids in row["provenance"])
        assert right < set(row["candidates"])
    load_evaluation_set(
        tmp_path / "out/eval.jsonl", corpus=load_corpus(tmp_path / "out/corpus.jsonl"), answers_required=False
    )


# ---------------------------------------------------------------------- the split


def test_questions_that_share_a_passage_stay_on_one_side(tmp_path):
    rows = []
    for i in range(400):
        rows.append({"question": f"What is {i}?", "answer": "it", "passage": f"Passage {i // 4}."})
    for i in range(0, 100, 10):  # the same question of two passages, in other letters
        rows.append({"question": f"WHAT  is {i}?", "answer": "it", "passage": f"Passage {i // 4 + 2}."})
    for i in range(200):
        rows.append({"question": f"Who is {i}?", "answer": "me", "passage": ""})
    counts, files = run(tmp_path, "a.jsonl", rows, validation_fraction=0.2)
    asked = {" ".join(row["input"].lower().split()) for row in files["eval"]}
    trained = {" ".join(row["input"].lower().split()) for row in files["train"]}
    assert not asked & trained
    assert len(asked | trained) == 600
    gold = {id for row in files["eval"] for ids in row.get("provenance", []) for id in ids}
    assert not gold & {row["segments"][0]["passage"]["id"] for row in files["train"] if "segments" in row}
    assert len(files["corpus"]) == 100
    assert 0.12 < len(files["eval"]) / 610 < 0.28

    rows.reverse()
    _, again = run(tmp_path, "a.jsonl", rows, validation_fraction=0.2)
    assert {row["input"] for row in again["eval"]} == {row["input"] for row in files["eval"]}


# ---------------------------------------------------------------------- refused rows and bad input


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"question": " ", "answer": "a"}, "no question"),
        ({"question": 3, "answer": "a"}, "no question"),
        ({"question": "q", "answer": []}, "no answer"),
        ({"question": "q", "answer": None, "passage": "p"}, "no answer"),
        ({"question": "q", "answer": float("nan")}, "no answer"),
        ({"question": "q", "answer": "{'text': ['a']; 'b'}"}, "the answer looks like an object"),
        ({"question": "q", "answer": "{'a', 'b'}"}, "the answer looks like an object"),  # a set has no first
        ({"question": "q", "answer": b"a"}, "the answer is neither text nor a list of texts"),
        (
            {"question": "q", "answer": "a", "passage": 3},
            "a passage is neither text nor an object with title and text",
        ),
        ({"question": "q", "answer": "a", "passage": {"body": "p"}}, "a passage is neither text nor"),
        ({"question": "q", "answer": "a", "passage": "p", "title": 3}, "the title is no text"),
        ({"question": "q", "answer": "a", "id": "../a"}, "an id that is no text, or has NUL or '..' in it"),
        ({"question": "q", "answer": "\ud800"}, "half a character"),
        ({"question": "q", "answer": "a", "passage": "\ud800"}, "half a character"),
    ],
)
def test_rows_that_are_refused(row, reason):
    columns = Columns(question="question", answer="answer", passage="passage", title="title", id="id")
    with pytest.raises(Refused, match=reason):
        read_record(row, columns)
    with pytest.raises(Refused, match="^no passage$"):
        read_record({"query": "q", "positive": [""]}, Columns(question="query", passage="positive"))


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ({"value": "A", "aliases": ["B", "A"]}, ["A", "B"]),  # TriviaQA
        (True, ["yes"]),  # BoolQ
        (42, ["42"]),
        ("[1] is a note", ["[1] is a note"]),
        ("[sic]", ["[sic]"]),
        (["a ", "a"], ["a"]),
        (["{x}"], ["{x}"]),
        ([float("nan"), None, "a"], ["a"]),
        # as a cell of a table
        ("{'text': ['A', 'B'], 'answer_start': [0, 1]}", ["A", "B"]),
        ('{"text": ["A"], "answer_start": [0]}', ["A"]),
        ("{'text': array(['A', \"B's\"], dtype=object), 'answer_start': array([0, 1], dtype=int32)}", ["A", "B's"]),
        ("{'value': 'A', 'aliases': ['B', 'A']}", ["A", "B"]),
        ("array", ["array"]),
        ("['A' 'B'\n 'C']", ["A", "B", "C"]),  # str() of a numpy array
        ("[np.str_('A'), nan]", ["A"]),
        ('[["A", "B"], ["C"]]', ["A", "B", "C"]),
        ('[null, "A", NaN]', ["A"]),
        ("[None, 'A', True, 3]", ["A", "yes", "3"]),
    ],
)
def test_forms_of_answers(answer, expected):
    record = read_record({"question": "q", "answer": answer}, Columns(question="question", answer="answer"))
    assert record.answers == expected


def test_cells_that_hold_passages():
    """As pandas writes lists and objects to a CSV file; a text in brackets stays one."""
    row = {
        "question": "q",
        "title": "Ada_L",
        "answers": "{'text': ['London'], 'answer_start': [0]}",
        "positive_ctxs": str([ADA, BOB]),
        "negative": json.dumps(EVE),
        "ctxs": "[1]",
        "note": float("nan"),
    }
    columns = Columns("question", "answers", "positive_ctxs", "title", "note", "ctxs", ["negative"])
    record = read_record(row, columns)
    assert (record.id, record.passages, record.negatives) == ("", [with_id(ADA), with_id(BOB)], [with_id(EVE)])
    assert [passage["text"] for passage in record.candidates] == ["[1]"]
    (passage,) = read_record({**row, "positive_ctxs": '{"port": 80}'}, columns).passages
    assert (passage["title"], passage["text"]) == ("Ada L", '{"port": 80}')


ROWS = [{"id": "1", "question": "a?", "answer": "a"}, {"id": "1", "question": "b?", "answer": "b"}]


def test_rows_are_counted_with_reason_and_place(tmp_path):
    rows = [*ROWS, ROWS[0], {"note": "of another kind"}, {"question": "", "answer": "c"}]
    counts, files = run(tmp_path, "a.jsonl", rows, validation_fraction=1)
    assert dict(counts) == {
        "rows read": 5,
        "eval.jsonl: questions with answers alone": 1,
        "rows refused: an id that another question of eval.jsonl has": 1,
        "rows merged into an earlier one: the same question": 1,
        "rows refused: no column of questions, or none of answers or passages": 1,
        "rows refused: no question": 1,
    }
    assert [row["where"].rpartition(" ")[2] for row in files["refused"]] == ["2", "4", "5"]
    write(tmp_path / "a.jsonl", ROWS[:1])
    prepare(options(tmp_path, "a.jsonl", validation_fraction=1))
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["eval.jsonl"]


def test_the_command_line(tmp_path, monkeypatch, capsys):
    write(tmp_path / "a.csv", [{"Q": "a?", "answer": "a"}])
    words = ["--input_file", tmp_path / "a.csv", "--output_dir", tmp_path / "out", "--question_column", "Q"]
    monkeypatch.setattr(sys, "argv", ["prepare_qa.py", *map(str, words), "--validation_fraction", "1"])
    main()
    assert "eval.jsonl: questions with answers alone           1\n" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--answer_column", "Q2"])
    with pytest.raises(
        SystemExit, match="^error: .*a.csv, line 2: --answer_column Q2 is none of the columns, Q, answer"
    ):
        main()


def test_on_error_fail(tmp_path):
    write(tmp_path / "a.jsonl", [*ROWS, {"id": "3", "question": "c?", "answer": ""}])
    with pytest.raises(ValueError, match="a.jsonl, line 3: no answer"):
        prepare(options(tmp_path, "a.jsonl", on_error="fail"))
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize(
    ("name", "content", "changes", "message"),
    [
        (
            "a.jsonl",
            '{"frage": "q", "answer": "a"}',
            {},
            "line 1: none of the columns, frage, answer, .*--question_col",
        ),
        ("a.jsonl", '{"question": "q", "text": "a"}', {}, "none of the columns, question, text, .*--answer_column"),
        ("a.csv", "Frage,answer\nq,a\n", {"question_column": "frage"}, "--question_column frage .*mean 'Frage'"),
        ("a.csv", "question,answer\nq\n", {}, "line 2: found 1 columns, expected 2: question, answer"),
        ("a.csv", "question,question\nq,a\n", {}, "names a column twice"),
        (
            "a.csv",
            'question,answer\nq,a\n"who, a\nwho else?,b\n',
            {},
            "a.csv, line 3: unexpected end of data. .*quotes within it must be doubled",
        ),
        ("a.jsonl", '{"question": "q"', {}, "a.jsonl, line 1"),
        ("a.json", '{"question": "q"', {}, "a.json, line 1"),
        ("a.json", '[{"question": "q", "answer": "a"}, {', {}, "a.json is damaged after item 0"),
        ("a.json", "[3]", {}, "item 0: found int, expected an object"),
        ("a.json", '{"data": [{"paragraphs": [{}]}]}', {}, "item 0 is none of SQuAD's articles"),
        ("a.json.gz", "no gzip", {}, "a.json.gz is damaged"),
        ("a.json.gz", b"\x1f\x8b\x08\0\0\0\0\0\0\0\x07", {}, "a.json.gz is damaged"),
        ("a.parquet", "no parquet", {}, "a.parquet is no Parquet file"),
        ("a.xlsx", "", {}, "a.xlsx: unknown kind of file, expected one of .json, "),
        ("a.jsonl", "", {"split": "test"}, "--split is for the name of a dataset, and .*a.jsonl is a file"),
        ("a.jsonl", "", {"config_name": "c"}, "--config_name is for the name of a dataset"),
        ("a.jsonl", "", {"column_names": ["a"]}, "--column_names is for a CSV or TSV file"),
        ("a.jsonl", "", {}, "no question is left for train.jsonl"),
        ("a.jsonl", '{"question": "q", "answer": "a"}', {"validation_fraction": 0.5}, "no question is left for"),
        ("a.jsonl", "", {"validation_fraction": 1.5}, "--validation_fraction is 1.5, expected 0 to 1"),
        ("a.jsonl", "", {"num_negatives": -1}, "--num_negatives is -1"),
        ("a.jsonl", "", {"input_file": "missing.jsonl"}, "missing.jsonl is not a file"),
    ],
)
def test_bad_input_leaves_no_file(tmp_path, name, content, changes, message):
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises((ValueError, OSError), match=message):
        prepare(options(tmp_path, name, **changes))
    assert not list(tmp_path.glob("out/*"))


def test_a_file_of_another_run_that_would_stay(tmp_path):
    write(tmp_path / "out/eval.jsonl", ROWS)
    write(tmp_path / "a.jsonl", ROWS)
    with pytest.raises(ValueError, match="holds the eval.jsonl of another run"):
        prepare(options(tmp_path, "a.jsonl"))
    write(tmp_path / "answers/corpus.jsonl", [with_id(ADA)])
    with pytest.raises(
        ValueError, match="holds the corpus.jsonl of another run, and these questions have no passages"
    ):
        prepare(options(tmp_path, "a.jsonl", output_dir=str(tmp_path / "answers")))
    assert [path.name for path in (tmp_path / "answers").iterdir()] == ["corpus.jsonl"]
