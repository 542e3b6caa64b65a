"""Hard negatives found by a real (tiny) sentence-transformers model: nearest passages, exclusions, and bad input."""

import datetime
import json
from argparse import Namespace

import pytest
from datasets import Dataset
from mine_hard_negatives import choose_negatives, list_queries, mine

from modeling_cosup.lines_cosup import read_lines
from modeling_cosup.tokenization_cosup import render_passage
from support.models import make_model
from trainer.data import load_instances

from shared.held_answers import holds_answer

TEMPLATE = "{title}. {text}"


def passage(name, text, title=""):
    return {"id": name, "title": title, "text": text}


def segment(text, passage, **more):
    return {"text": text, "passage": passage, **more}


RIVERS = [
    passage("r0", "Rhine flows through Basel.", "Rhine"),
    passage("r1", "Aare flows through Bern.", "Aare"),
    passage("r2", "Po flows through Turin.", "Po"),
]
INSTANCES = [
    {"id": "rhine", "input": "what flows through Basel?", "segments": [segment("Rhine", RIVERS[0])]},
    {"id": "aare", "input": "Aare [SEP] flows through", "segments": [segment("Bern", RIVERS[1], positives=["r2"])]},
    {
        "id": "two",
        "input": "which two?",
        "segments": [segment("first", RIVERS[0]), segment("it is free", None), segment("then", RIVERS[2])],
    },
    {"id": "free", "input": "1 + 1?", "segments": [segment("2", None)]},
]
CORPUS = [
    passage("c0", "The Rhine is long."),
    passage("c1", "Lugano lies at a lake."),
    passage("c2", "Rhine flows through Basel.", "Rhine"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """An Emb_seq for sentence-transformers, and a corpus."""
    pytest.importorskip("sentence_transformers", reason="the miner is sentence-transformers'")
    folder = tmp_path_factory.mktemp("mining")
    make_model(similarity="cosine").save_emb_seq(folder / "model")
    write_lines(folder / "corpus.jsonl", CORPUS)
    return folder


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def options(folder, tmp_path, instances=INSTANCES, **changes):
    write_lines(tmp_path / "train.jsonl", instances)
    defaults = {
        "train_file": str(tmp_path / "train.jsonl"),
        "model": str(folder / "model"),
        "output_file": tmp_path / "out.jsonl",
        "corpus_file": str(folder / "corpus.jsonl"),
        "num_negatives": 2,
        "range_min": 0,
        "range_max": 50,
        "relative_margin": None,
        "passage_template": TEMPLATE,
        "batch_size": 4,
        "device": "cpu",
        "dtype": "auto",
    }
    return Namespace(**defaults | changes)


def mined(folder, tmp_path, **changes):
    counts = mine(options(folder, tmp_path, **changes))
    return counts, load_instances(tmp_path / "out.jsonl")


def negatives_of(instance):
    """Return the ids of all negatives of an instance."""
    return [negative["id"] for segment in instance["segments"] for negative in segment["negatives"]]


def test_negatives_are_the_nearest_passages_that_are_surely_wrong(folder, tmp_path):
    """They have the order of the model, and passages that may be right are missing."""
    from sentence_transformers import SentenceTransformer

    counts, instances = mined(folder, tmp_path)
    assert counts == {"queries": 4, "with all negatives": 4, "with fewer": 0, "with none": 0}
    model = SentenceTransformer(str(folder / "model"), device="cpu")
    segments = {segment["text"]: segment for instance in instances for segment in instance["segments"]}
    for query in list_queries(load_instances(tmp_path / "train.jsonl"), TEMPLATE):
        answer = query.segment["text"]
        allowed = []
        for candidate in RIVERS + CORPUS[:2]:
            text = f"{candidate['title']} {candidate['text']}"
            if candidate["id"] not in query.known_ids and not holds_answer(text, [answer]):
                allowed.append(candidate)
        texts = [render_passage(candidate, TEMPLATE) for candidate in allowed]
        scores = model.similarity(model.encode_query([query.text]), model.encode_document(texts))[0]
        nearest = [allowed[row]["id"] for row in scores.argsort(descending=True)]
        assert [negative["id"] for negative in segments[answer]["negatives"]] == nearest[:2]

    first, second, two = map(negatives_of, instances[:3])
    # its own passage, one that holds the answer, and the same content with another id
    assert not {"r0", "c0", "c2"} & set(first)
    assert not {"r1", "r2"} & set(second)  # its own passage, and one that would be right too
    assert not {"r0", "r2"} & set(two)  # passages of the same instance


@pytest.mark.parametrize(
    ("text", "answer", "expected"),
    [
        ("The war (1939–1945) was long.", "1939", True),
        ("The war (1939-1945) was long.", "1939-1945", True),
        ("They sang “Heroes”.", "Heroes", True),
        ("Łódź—the city", "łódź", True),
        ("The Rhine's source", "the Rhine", True),
        ("The US army", "U.S.", True),  # as one word, and as two
        ("The U. S. army", "U.S.", True),
        ("北京市是中华人民共和国的首都，", "北京", True),
        ("サッカーは東京、で", "東京", True),
        ("서울은 수도이다.", "서울", True),
        ("The party", "art", False),
        ("any text", "The", False),
        ("any text", "“”", False),
    ],
)
def test_a_text_holds_an_answer_next_to_any_punctuation(text, answer, expected):
    assert holds_answer(text, ["nothing", answer]) is expected


def test_answers_of_an_instance_are_in_no_negative(folder, tmp_path):
    """The text is a whole sentence, which no other passage repeats."""
    sentence = {**INSTANCES[0], "answers": ["Lugano"], "segments": [segment("It flows there.", RIVERS[0])]}
    _, instances = mined(folder, tmp_path, instances=[sentence, *INSTANCES[1:]], num_negatives=4)
    assert set(negatives_of(instances[0])) == {"r1", "r2", "c0"}
    _, instances = mined(folder, tmp_path, instances=[{**sentence, "answers": ["x"]}, *INSTANCES[1:]], num_negatives=4)
    assert set(negatives_of(instances[0])) == {"r1", "r2", "c0", "c1"}


def test_a_title_may_hold_the_answer(folder, tmp_path):
    (query, *_) = list_queries(load_instances(options(folder, tmp_path).train_file), TEMPLATE)
    of_title, other = passage("t", "It is long.", title="The Rhine"), passage("o", "It is short.", title="Ems")
    assert choose_negatives(query, [of_title, other]) == [other]


def test_provenance_is_no_negative(folder, tmp_path):
    """r2 would be as right as the passage of the segment, though it does not hold the text."""
    rhine = {**INSTANCES[0], "provenance": [["r0"], ["r2", "c1"]]}
    _, instances = mined(folder, tmp_path, instances=[rhine, *INSTANCES[1:]], num_negatives=4)
    assert negatives_of(instances[0]) == ["r1"]


def test_queries_hold_what_was_written_before(tmp_path, folder):
    instances = load_instances(options(folder, tmp_path).train_file)
    queries = [query.text for query in list_queries(instances, TEMPLATE)]
    assert queries == ["what flows through Basel?", "Aare flows through", "which two?", "which two? first it is free"]


def test_new_negatives_follow_existing_ones(folder, tmp_path):
    with_negative = {**INSTANCES[0], "segments": [segment("Rhine", RIVERS[0], negatives=[CORPUS[1]])]}
    _, instances = mined(folder, tmp_path, instances=[with_negative, *INSTANCES[1:]], num_negatives=1)
    assert negatives_of(instances[0]) in (["c1", "r1"], ["c1", "r2"])


def test_everything_else_in_the_training_file_is_unchanged(folder, tmp_path):
    metadata = {"source": "rivers.pdf", "page": 7}
    given = segment("Rhine", {**RIVERS[0], "metadata": metadata}, negatives=[{**CORPUS[1], "metadata": metadata}])
    rows = [
        {"input": "what flows through Basel?", "segments": [given, segment("free", None)], "meta": {"split": 3}},
        {"id": "answers", "input": "where?", "answers": ["Bern"], "own field": 1},
        *INSTANCES[1:],
    ]
    mined(folder, tmp_path, instances=rows, num_negatives=1)
    written = read_lines(tmp_path / "out.jsonl")
    new = written[0]["segments"][0]["negatives"].pop()
    assert new["id"] in ("r1", "r2")
    assert written[:2] == rows[:2]


def test_a_field_that_json_lacks_is_named_before_the_search(folder, tmp_path, monkeypatch):
    rows = [{**INSTANCES[0], "written": datetime.date(2024, 5, 1)}]
    Dataset.from_list(rows).to_parquet(tmp_path / "data" / "train.parquet")
    monkeypatch.setattr("mine_hard_negatives.search", lambda *args: pytest.fail("searched"))
    given = options(folder, tmp_path)
    given.train_file = str(tmp_path / "data")
    with pytest.raises(ValueError, match=r"\(train\), row 0: written cannot be written as JSON .*date"):
        mine(given)


def test_a_margin_that_no_similarity_meets(folder, tmp_path):
    counts, instances = mined(folder, tmp_path, relative_margin=2.5)
    assert counts["with none"] == 4
    assert not any(map(negatives_of, instances))


def test_bad_input_leaves_no_file(folder, tmp_path):
    for changes, message in (
        ({"num_negatives": 0}, "--num_negatives is 0"),
        ({"range_min": 50}, "--range_min 50 and --range_max 50"),
        ({"range_min": 10}, "There are 5 passages: too few for negatives after rank 10"),
        ({"instances": INSTANCES[3:]}, "none of 1 instances has a passage"),
        ({"instances": [{"input": "?", "segments": []}]}, "line 1: segments is"),
        (
            {"instances": [{"input": "?", "segments": [segment("a", passage("c1", "Another text."))]}]},
            "corpus.jsonl, line 2: the passage id 'c1' has another title or text than in .*train.jsonl, line 1",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            mine(options(folder, tmp_path, **changes))
        assert [path.name for path in tmp_path.iterdir()] == ["train.jsonl"]
