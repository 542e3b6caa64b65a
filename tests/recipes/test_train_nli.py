"""An NLI model trained by the recipe: its pairs, what it learns on instances it never saw, and Gr with it."""

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest
from train_nli import LABELS, labels_of, make_pairs
from transformers import BertConfig, BertModel

from support.nli_models import COLOURS, FILLERS, UNSEEN, make_classifier
from trainer.data import load_instances
from trainer.judging.grounding import grounding
from trainer.judging.nli import NLIJudge

RECIPE = Path(__file__).parents[2] / "recipes/train_nli.py"


def instance(i, generator, fillers=FILLERS):
    """A question about the colour that a passage holds."""
    colour = generator.choice(COLOURS)
    words = generator.choices(fillers, k=4)
    words.insert(generator.randint(0, 4), colour)
    passage = {"id": f"p{i}", "title": "", "text": " ".join(words)}
    other = generator.choice([each for each in COLOURS if each != colour])
    segment = {
        "text": colour,
        "passage": passage,
        "negatives": [{"id": f"n{i}", "title": "", "text": passage["text"].replace(colour, other)}],
    }
    return {"id": str(i), "dataset": "colours", "input": "w1", "segments": [segment]}


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_pairs_by_hand(tmp_path):
    passages = [{"id": "a", "title": "Rhine", "text": "It flows through Basel to New York."}]
    passages.append({"id": "b", "title": "", "text": "Bern lies at the Aare."})
    rows = [
        {
            "dataset": "qa",
            "input": "where?",
            "segments": [{"text": "to Basel", "passage": passages[0], "negatives": [passages[1]]}],
        },
        {
            "dataset": "qa",
            "input": "what?",
            "segments": [{"text": "free", "passage": None}, {"text": "Bern", "passage": passages[1]}],
        },
    ]
    for i, text in enumerate(["supports", "refutes"] * 4):
        fact = {"id": f"c{i}", "title": "", "text": f"Fact Number {i}"}
        rows.append({"dataset": "claims", "input": f"claim {i}.", "segments": [{"text": text, "passage": fact}]})
    instances = load_instances(write(tmp_path / "train.jsonl", rows))
    pairs = make_pairs(instances, "{question} {sentence}")
    assert (
        pairs
        == make_pairs(instances, "{question} {sentence}")
        != make_pairs(instances, "{question} {sentence}", seed=1)
    )
    assert len(pairs) == 20 and [kind == "entailed" for *_, kind in pairs] == [True, False] * 10
    found = {pair for seed in range(60) for pair in make_pairs(instances, "{question} {sentence}", seed)}
    river, city = "Title: Rhine\nIt flows through Basel to New York.", "Title: \nBern lies at the Aare."
    wrong = {(river, "where? Bern", "wrong text")} | {
        (river, f"where? {text}", "wrong word") for text in ("It", "New York")
    }  # not Basel, which is right
    assert {pair for pair in found if pair[1].startswith("where?")} == {
        (river, "where? to Basel", "entailed"), (city, "where? to Basel", "other passage"), *wrong
    }  # fmt: skip
    for i, text in enumerate(
        ["supports", "refutes"] * 4
    ):  # the wrong verdict is the other one, never a name of the passage
        own, fact = {pair for pair in found if pair[1].startswith(f"claim {i}.")}, f"Title: \nFact Number {i}"
        others = {pair for pair in own if pair[2] == "other passage"}
        assert own - others == {
            (fact, f"claim {i}. {text}", "entailed"), (fact, f"claim {i}. {'refutes' if text == 'supports' else 'supports'}", "wrong text")
        }  # fmt: skip
        assert others and all(text != fact and "Fact Number" in text for text, *_ in others)
    assert {hypothesis for _, hypothesis, _ in make_pairs(instances, "{sentence}")} >= {"to Basel", "supports"}
    assert len(make_pairs(instances, "{sentence}", max_segments=2)) == 4


def test_a_longer_name_is_no_wrong_answer(tmp_path):
    passage = {"id": "a", "title": "", "text": "Barack Obama met Angela Merkel."}
    rows = [{"dataset": "qa", "input": "who?", "segments": [{"text": "Obama", "passage": passage}]}]
    rows.append(
        {
            "dataset": "qa",
            "input": "where?",
            "segments": [{"text": "there", "passage": {**passage, "text": "nowhere"}}],
        }
    )
    instances = load_instances(write(tmp_path / "a.jsonl", rows))
    found = {pair[1] for seed in range(40) for pair in make_pairs(instances, "{question} {sentence}", seed)}
    assert found == {"who? Obama", "who? Angela Merkel", "who? there", "where? there", "where? Obama"}


def test_a_sentence_is_made_wrong_by_one_word(tmp_path):
    """The rarest word that the passage holds and the question does not; what stands in its place is another word of the passage."""
    rows = []
    for i, job in enumerate(["carver", "weaver", "dancer"]):
        passage = {
            "id": f"p{i}",
            "title": f"Person {i}",
            "text": f"Person {i} works as a {job}. She was born in 18{i}0.",
        }
        rows.append(
            {
                "dataset": "qa",
                "input": f"what is Person {i}?",
                "segments": [{"text": f"Person {i} works as a {job}.", "passage": passage}],
            }
        )
    instances = load_instances(write(tmp_path / "a.jsonl", rows))
    found = {pair for seed in range(300) for pair in make_pairs(instances, "{sentence}", seed)}
    changed = {
        hypothesis for text, hypothesis, kind in found if kind == "wrong word" and text.startswith("Title: Person 0")
    }
    assert changed == {f"Person 0 works as a {word}." for word in ("She", "was", "born", "in", "1800")}


def test_labels_of_a_model_that_goes_on():
    other = {0: "entailment", 1: "not_entailment"}
    assert labels_of(BertConfig(id2label=other)) == other
    assert (
        labels_of(BertConfig(id2label={0: "contradiction", 1: "neutral", 2: "entailment"}))
        == LABELS
        == labels_of(BertConfig())
    )


def test_instances_that_give_no_pairs(tmp_path):
    with pytest.raises(ValueError, match="None of 1 instances has a passage"):
        make_pairs(
            load_instances(
                write(tmp_path / "a.jsonl", [{"input": "?", "segments": [{"text": "x", "passage": None}]}])
            ),
            "{sentence}",
        )
    same = [{"input": "?", "segments": [{"text": "x", "passage": {"id": "a", "title": "", "text": "only one"}}]}] * 2
    with pytest.raises(ValueError, match="2 segments give no pair that is not entailed"):
        make_pairs(load_instances(write(tmp_path / "b.jsonl", same)), "{sentence}")


@pytest.mark.slow
def test_from_instances_to_gr(tmp_path):
    """Trained as a user does it, on a relation that is known; judged on words that it never saw."""
    generator = random.Random(0)
    train = write(tmp_path / "train.jsonl", [instance(i, generator) for i in range(1500)])
    held_out = write(tmp_path / "heldout.jsonl", [instance(i, random.Random(i + 1), UNSEEN) for i in range(60)])
    model, tokenizer = make_classifier(steps=0)
    BertModel(BertConfig(**{**model.config.to_dict(), "architectures": None})).save_pretrained(tmp_path / "encoder")
    tokenizer.save_pretrained(tmp_path / "encoder")
    options = {
        "train_file": train,
        "validation_file": held_out,
        "model_name_or_path": tmp_path / "encoder",
        "output_dir": tmp_path / "nli",
    }
    options |= {
        "learning_rate": 2e-3,
        "per_device_train_batch_size": 64,
        "num_train_epochs": 6,
        "save_strategy": "no",
        "report_to": "none",
        "num_threads": 1,
    }
    command = [
        sys.executable,
        RECIPE,
        "--use_cpu",
        "true",
        *(word for name, value in options.items() for word in (f"--{name}", value)),
    ]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, cwd=tmp_path, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "accuracy, wrong text" in done.stdout
    found = json.loads((tmp_path / "nli" / "eval_results.json").read_text())
    assert (
        min(found[f"eval_accuracy_{kind}"] for kind in ("all", "entailed", "other_passage", "wrong_text")) >= 0.85
    ), found

    judge = NLIJudge.from_pretrained(tmp_path / "nli", device="cpu")
    assert judge.model.config.id2label == LABELS
    spans = [{"passages": [{"title": "", "text": "v1 red v2"}], "grounded_text": text} for text in ("red", "blue")]
    predictions = [{"input": "w1", "retrievals": spans[:1]}, {"input": "w1", "retrievals": spans[1:]}]
    assert grounding(predictions, judge, hypothesis="{question} {sentence}") == [1.0, 0.0]

    for option, value, message in (
        ("--train_file", tmp_path / "missing.jsonl", "missing.jsonl"),
        ("--num_train_epochs", "1", "leave no room"),
    ):
        bad = [*command, option, value, "--max_length", "5" if option != "--train_file" else "320"]
        done = subprocess.run(list(map(str, bad)), capture_output=True, text=True, cwd=tmp_path, timeout=300)
        assert (
            done.returncode == 1
            and done.stderr.strip().splitlines()[-1].startswith("error: ")
            and message in done.stderr
        )
