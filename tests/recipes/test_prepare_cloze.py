"""Queries from the passages themselves: each kind, what has none, repetitions, the sample, and bad input."""

import json
from argparse import Namespace

import pytest
from prepare_cloze import prepare

from modeling_cosup.lines_cosup import read_lines
from support.models import make_model
from support.training import arguments
from trainer import CoSupTrainer, load_instances
from trainer.data import content_id

from shared.cloze import GAP, Source, instances_of, sentence_spans

SENTENCES = [
    "The river rises in the hills of Oldby.",
    "Its mouth lies near Port Ezra since 1874.",
    "Nobody has ever sailed all of it in one day.",
]
RIVER = {"id": "river", "title": "Guide › The river", "text": " ".join(SENTENCES)}
ALL = ["title", "sentence", "span"]


def options(tmp_path, passages, **changes):
    (tmp_path / "corpus.jsonl").write_text("".join(json.dumps(passage) + "\n" for passage in passages))
    files = {"corpus_file": str(tmp_path / "corpus.jsonl"), "output_file": str(tmp_path / "out.jsonl")}
    defaults = {"queries": ALL, "num_instances": None, "instruction": "", "seed": 0}
    return Namespace(**{**files, **defaults, **changes})


def run(tmp_path, passages, **changes):
    """Return the counts, and the instances by kind."""
    counts = prepare(options(tmp_path, passages, **changes))
    by_kind = {}
    for instance in load_instances(tmp_path / "out.jsonl"):
        by_kind.setdefault(instance["dataset"].removeprefix("cloze_"), []).append(instance)
    return counts, by_kind


def made(passage, kind, seed=0, shared_title=False):
    """Return the instance of a kind, or the reason why there is none."""
    source = Source(passage, shared_title, set(), seed)
    return dict(instances_of(source, ALL, "")).get(kind)


def test_a_title_asks_for_the_first_sentence():
    instance = made(RIVER, "title")
    assert instance["input"] == "Guide The river"
    (segment,) = instance["segments"]
    assert (segment["text"], segment["passage"]) == (SENTENCES[0], RIVER)
    with_heading = {**RIVER, "text": f"# The river\nIntro.\n## Its source ##\n{RIVER['text']}"}
    assert made(with_heading, "title")["input"] == "Guide The river"
    other_heading = {**RIVER, "text": f"## Its source ##\n{RIVER['text']}"}
    assert made(other_heading, "title")["input"] == "Guide The river Its source"
    assert made(other_heading, "title")["segments"][0]["text"] == SENTENCES[0]  # a heading is no sentence
    shared = made(RIVER, "title", shared_title=True)["input"]
    words = shared.removeprefix("Guide The river ")
    assert len(words.split()) == 4
    assert words in RIVER["text"].replace(".", "")


def test_a_sentence_is_taken_out_of_its_passage_and_the_next_is_written():
    numbers, kept = set(), 0
    for seed in range(200):
        instance = made(RIVER, "sentence", seed)
        number = SENTENCES.index(instance["input"])
        (segment,) = instance["segments"]
        assert segment["text"] == SENTENCES[1 if number == 2 else number + 1]
        numbers.add(number)
        if segment["passage"] == RIVER:
            kept += 1
            assert "positives" not in segment
            continue
        others = [sentence for sentence in SENTENCES if sentence != instance["input"]]
        assert segment["passage"]["text"] == " ".join(others)
        assert segment["passage"]["id"] == content_id(RIVER["title"], " ".join(others))
        assert segment["positives"] == ["river"]
        assert made(RIVER, "title", seed)["segments"][0]["positives"] == [segment["passage"]["id"]]
    assert numbers == {0, 1, 2}
    assert 8 <= kept <= 36  # of 200, with a share of 0.1
    lines = {**RIVER, "text": "\n\n".join(SENTENCES)}
    left = {made(lines, "sentence", seed)["segments"][0]["passage"]["text"] for seed in range(60)}
    assert f"{SENTENCES[0]}\n{SENTENCES[2]}" in left


def test_a_gap_hides_a_name_or_a_number():
    asked = set()
    for seed in range(200):
        instance = made(RIVER, "span", seed)
        (segment,) = instance["segments"]
        assert segment["passage"] == RIVER
        before, after = instance["input"].split(GAP)
        sentence = segment["text"]
        assert sentence in SENTENCES
        assert sentence.startswith(before) and sentence.endswith(after)
        asked.add(sentence[len(before) : len(sentence) - len(after)])
    assert {"Oldby", "Port Ezra", "1874"} <= asked
    others = {gap for gap in asked if gap in SENTENCES[2]}  # which has no name
    assert {len(gap.split()) for gap in others} == {1, 2, 3, 4}
    assert asked == others | {"Oldby", "Port Ezra", "1874"}


def test_sentences_have_the_place_where_they_stand():
    text = (
        "# Head\nToo short. The same words\nagain and again.  The same words again and again.\n"
        "- First item of the list\n2) Second item of it, Mr. Smith said.\n\nLast line of it all"
    )
    spans = sentence_spans(text)
    assert [text[start:end] for start, end in spans] == [
        "The same words\nagain and again.",
        "The same words again and again.",
        "First item of the list",
        "Second item of it, Mr. Smith said.",
        # the last line has fewer than 20 characters
    ]
    assert spans[0][1] < spans[1][0]


@pytest.mark.parametrize(
    ("passage", "reasons"),
    [
        ({"title": "Ada", "text": "Ada wrote many notes there."}, [None, "fewer than two sentences"]),
        (
            {"title": "Ada wrote many notes there.", "text": "Ada wrote many notes there."},
            ["the whole passage", "fewer"],
        ),
        ({"title": "", "text": RIVER["text"]}, ["no title", None]),
        ({"title": "Ada", "text": "Ada. Bob. Eve."}, ["no sentence to write", "fewer than two sentences"]),
        ({"title": "河", "text": "这条河发源于北方的群山之中，流经三个省份，最后流入东海。" * 2}, [None, "fewer"]),
    ],
)
def test_short_passages_have_fewer_queries(passage, reasons):
    for kind, reason in zip(("title", "sentence", "span"), [*reasons, reasons[-1]], strict=True):
        instance = made({"id": "p", **passage}, kind)
        if reason is None:
            assert isinstance(instance, dict), kind
        else:
            assert reason in instance, kind


def test_repetitions_are_no_queries(tmp_path):
    notice = "All rights in this work are reserved."
    corpus = [
        RIVER,
        {**RIVER, "id": "copy"},
        {"id": "1", "title": "Work", "text": f"Alpha of the first work is here. {notice}"},
        {"id": "2", "title": "Work", "text": f"Beta of the second work is here. {notice}"},
        {"id": "3", "title": "Third", "text": f"{notice} {SENTENCES[0]}"},
    ]
    counts, made_of_kind = run(tmp_path, corpus)
    assert dict(counts) == {
        "passages read": 5,
        "passages left out: repeated": 1,
        "title queries": 4,
        "sentence queries": 3,
        "span queries": 3,
        "instances written": 10,
        "no sentence query: all sentences stand in other passages too": 1,
        "no span query: no sentence of its own that is long enough for a gap": 1,
    }
    assert [len(instance["input"].split()) for instance in made_of_kind["title"]] == [3, 5, 5, 1]
    asked = {instance["input"] for instance in made_of_kind["sentence"]}
    assert notice not in asked
    assert SENTENCES[0] not in asked


def corpus_of(size):
    for i in range(size):
        yield {
            "id": f"p{i}",
            "title": f"Title {i}",
            "text": f"The first sentence says {i}. The second sentence says {-i}.",
        }


def test_seed_and_sample(tmp_path):
    run(tmp_path, corpus_of(30))
    first = read_lines(tmp_path / "out.jsonl")
    assert len(first) == 90
    run(tmp_path, reversed(list(corpus_of(20))))
    by_id = {instance["id"]: instance for instance in first}
    assert all(by_id[instance["id"]] == instance for instance in read_lines(tmp_path / "out.jsonl"))
    run(tmp_path, corpus_of(30), seed=1)
    assert read_lines(tmp_path / "out.jsonl") != first

    counts, of_kind = run(tmp_path, corpus_of(30), num_instances=12, queries=["title", "span"])
    sample = read_lines(tmp_path / "out.jsonl")
    assert (counts["instances written"], set(of_kind)) == (12, {"title", "span"})
    assert len({instance["id"] for instance in sample}) == 12
    run(tmp_path, corpus_of(30), num_instances=12, queries=["title", "span"])
    assert read_lines(tmp_path / "out.jsonl") == sample
    assert run(tmp_path, corpus_of(3), num_instances=12)[0]["instances written"] == 9


def test_a_retriever_and_gen_are_trained_on_the_file(tmp_path):
    run(tmp_path, corpus_of(4))
    instances = load_instances(tmp_path / "out.jsonl")
    args = arguments(tmp_path / "model", max_steps=1, per_device_train_batch_size=12)
    trainer = CoSupTrainer(make_model(), args, train_dataset=instances)
    trainer.train()
    assert trainer.state.log_history[0]["ntp_loss"] > 0
    assert trainer.state.log_history[0]["nsp_loss"] > 0


@pytest.mark.parametrize(
    ("passages", "changes", "message"),
    [
        ([RIVER], {"queries": ["titel"]}, "--queries is 'titel', expected some of title, sentence, span"),
        ([RIVER], {"queries": []}, "--queries is ''"),
        ([RIVER], {"num_instances": 0}, "--num_instances is 0"),
        ([RIVER, {**RIVER, "text": "other"}], {}, "line 2: id 'river' is already in .*line 1"),
        ([{"id": "a", "text": ""}], {}, "line 1: text is empty"),
        ([{"id": "a", "text": "short"}], {}, "no passage gives an instance"),
        ([], {}, "no passage gives an instance"),
    ],
)
def test_bad_input_leaves_no_file(tmp_path, passages, changes, message):
    with pytest.raises(ValueError, match=message):
        prepare(options(tmp_path, passages, **changes))
    assert [path.name for path in tmp_path.iterdir()] == ["corpus.jsonl"]
