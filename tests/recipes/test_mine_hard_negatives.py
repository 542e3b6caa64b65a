"""Hard negatives by a real (tiny) sentence-transformers model: what is near, what is left out, and bad input."""

import json
from argparse import Namespace

import pytest
from mine_hard_negatives import holds, list_queries, mine

from modeling_cosup.tokenization_cosup import render_passage
from support.models import make_model
from trainer.data import load_instances

TEMPLATE = "{title}. {text}"


def passage(name, text, title=""):
    return {"id": name, "title": title, "text": text}


def segment(text, passage, **more):
    return {"text": text, "passage": passage, **more}


RIVERS = [
    passage(f"r{i}", f"{name} flows through {place}.", name)
    for i, (name, place) in enumerate([("Rhine", "Basel"), ("Aare", "Bern"), ("Po", "Turin")])
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
    (folder / "corpus.jsonl").write_text("".join(json.dumps(each) + "\n" for each in CORPUS))
    return folder


def options(folder, tmp_path, instances=INSTANCES, **changes):
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(each) + "\n" for each in instances))
    given = {
        "train_file": str(tmp_path / "train.jsonl"),
        "model": str(folder / "model"),
        "output_file": tmp_path / "out.jsonl",
    }
    given |= {
        "corpus_file": str(folder / "corpus.jsonl"),
        "num_negatives": 2,
        "range_min": 0,
        "range_max": 50,
        "relative_margin": None,
    }
    return Namespace(
        **{**given, "passage_template": TEMPLATE, "batch_size": 4, "device": "cpu", "dtype": "auto", **changes}
    )


def mined(folder, tmp_path, **changes):
    counts = mine(options(folder, tmp_path, **changes))
    return counts, load_instances(tmp_path / "out.jsonl")


def test_negatives_are_the_nearest_of_those_that_may_be_wrong(folder, tmp_path):
    """The order is the model's own, and what may be right is not there."""
    from sentence_transformers import SentenceTransformer

    counts, instances = mined(folder, tmp_path)
    assert counts == {"queries": 4, "with all negatives": 4, "with fewer": 0, "with none": 0}
    model = SentenceTransformer(str(folder / "model"), device="cpu")
    for query, segment, right in list_queries(load_instances(tmp_path / "train.jsonl"), TEMPLATE):
        own = next(s for x in instances for s in x["segments"] if s["text"] == segment["text"])
        allowed = [
            p for p in RIVERS + CORPUS[:2] if p["id"] not in right.ids and not holds(p, segment["text"].lower())
        ]
        scores = model.similarity(
            model.encode_query([query]), model.encode_document([render_passage(p, TEMPLATE) for p in allowed])
        )[0].tolist()
        nearest = [p["id"] for _, p in sorted(zip(scores, allowed, strict=True), key=lambda pair: -pair[0])]
        assert [n["id"] for n in own["negatives"]] == nearest[:2]
    first, second, two = ([n["id"] for s in x["segments"] for n in s["negatives"]] for x in instances[:3])
    assert not {"r0", "c0", "c2"} & set(
        first
    )  # its own passage, one that holds the answer, the same content by another id
    assert not {"r1", "r2"} & set(second)  # its own, and one that would be right as well
    assert not {"r0", "r2"} & set(two)  # those of the same instance


def test_queries_hold_what_was_written_before(tmp_path, folder):
    queries = [query for query, *_ in list_queries(load_instances(options(folder, tmp_path).train_file), TEMPLATE)]
    assert queries == ["what flows through Basel?", "Aare flows through", "which two?", "which two? first it is free"]


def test_a_margin_and_negatives_that_are_there(folder, tmp_path):
    known = {**INSTANCES[0], "segments": [segment("Rhine", RIVERS[0], negatives=[CORPUS[1]])]}
    counts, (first, *_) = mined(folder, tmp_path, instances=[known, *INSTANCES[1:]], num_negatives=1)
    assert [n["id"] for n in first["segments"][0]["negatives"]][0] == "c1" and len(
        first["segments"][0]["negatives"]
    ) == 2
    assert {n["id"] for n in first["segments"][0]["negatives"]} == {"c1", "r1"} or {
        n["id"] for n in first["segments"][0]["negatives"]
    } == {"c1", "r2"}
    counts, instances = mined(folder, tmp_path, relative_margin=2.5)  # no similarity is so much smaller
    assert counts["with none"] == 4 and all(not s["negatives"] for x in instances for s in x["segments"])


def test_bad_input_leaves_no_file(folder, tmp_path):
    for changes, message in (
        ({"num_negatives": 0}, "--num_negatives is 0"),
        ({"range_min": 50}, "--range_min 50 and --range_max 50"),
        ({"range_min": 10}, "There are 5 passages: too few for negatives behind rank 10"),
        ({"instances": INSTANCES[3:]}, "none of 1 instances has a passage"),
        ({"instances": [{"input": "?", "segments": []}]}, "line 1: segments is"),
    ):
        with pytest.raises(ValueError, match=message):
            mine(options(folder, tmp_path, **changes))
        assert [path.name for path in tmp_path.iterdir()] == ["train.jsonl"]
