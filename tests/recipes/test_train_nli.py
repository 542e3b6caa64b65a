"""An NLI model trained by the recipe: its pairs, its accuracy on unseen instances, and Gr judged by it."""

import json
import random
from pathlib import Path

import pytest
from train_nli import LABELS, labels_of, make_pairs
from transformers import BertConfig, BertModel

from support.forks import run_forked
from support.nli_models import COLOURS, FILLERS, UNSEEN, make_classifier
from support.recipes import flags, write
from trainer.data import load_instances
from trainer.judging.grounding import grounding
from trainer.judging.nli import NLIJudge

RECIPE = Path(__file__).parents[2] / "recipes/train_nli.py"


def qa(question, *segments):
    """Return an instance of the dataset `qa`."""
    return {"dataset": "qa", "input": question, "segments": list(segments)}


def make_passage(id, text, title=""):
    return {"id": id, "title": title, "text": text}


def colour_instance(i, generator, fillers=FILLERS):
    """Return an instance whose answer is the colour that its passage names."""
    colour = generator.choice(COLOURS)
    words = generator.choices(fillers, k=4)
    words.insert(generator.randint(0, 4), colour)
    passage = make_passage(f"p{i}", " ".join(words))
    other = generator.choice([name for name in COLOURS if name != colour])
    negative = make_passage(f"n{i}", passage["text"].replace(colour, other))
    segment = {"text": colour, "passage": passage, "negatives": [negative]}
    return {"id": str(i), "dataset": "colours", "input": "w1", "segments": [segment]}


def pairs_of_seeds(instances, hypothesis, num_seeds):
    """Return all distinct pairs that any of the seeds draws."""
    pairs = set()
    for seed in range(num_seeds):
        pairs.update(make_pairs(instances, hypothesis, seed))
    return pairs


VERDICTS = ["supports", "refutes"] * 4


@pytest.fixture
def two_datasets(tmp_path):
    """Two questions and eight claims."""
    rhine = make_passage("a", "It flows through Basel to New York.", title="Rhine")
    bern = make_passage("b", "Bern lies at the Aare.")
    rows = [
        qa("where?", {"text": "to Basel", "passage": rhine, "negatives": [bern]}),
        qa("what?", {"text": "free", "passage": None}, {"text": "Bern", "passage": bern}),
    ]
    for i, verdict in enumerate(VERDICTS):
        segment = {"text": verdict, "passage": make_passage(f"c{i}", f"Fact Number {i}")}
        rows.append({"dataset": "claims", "input": f"claim {i}.", "segments": [segment]})
    return load_instances(write(tmp_path / "train.jsonl", rows))


def test_each_segment_gives_an_entailed_pair_and_another(two_datasets):
    pairs = make_pairs(two_datasets, "{question} {sentence}")
    assert make_pairs(two_datasets, "{question} {sentence}") == pairs
    assert make_pairs(two_datasets, "{question} {sentence}", seed=1) != pairs
    assert [kind == "entailed" for _, _, kind in pairs] == [True, False] * 10
    assert {hypothesis for _, hypothesis, _ in make_pairs(two_datasets, "{sentence}")} >= {"to Basel", "supports"}
    assert len(make_pairs(two_datasets, "{sentence}", max_segments=2)) == 4


def test_pairs_of_a_short_answer(two_datasets):
    pairs = pairs_of_seeds(two_datasets, "{question} {sentence}", 60)
    river, city = "Title: Rhine\nIt flows through Basel to New York.", "Title: \nBern lies at the Aare."
    assert {pair for pair in pairs if pair[1].startswith("where?")} == {
        (river, "where? to Basel", "entailed"),
        (city, "where? to Basel", "other passage"),
        (river, "where? Bern", "wrong text"),
        (river, "where? It", "wrong word"),
        (river, "where? New York", "wrong word"),  # not Basel, which is right
    }


def test_a_wrong_verdict_is_the_other_verdict(two_datasets):
    """It is never a name of the passage."""
    pairs = pairs_of_seeds(two_datasets, "{question} {sentence}", 60)
    for i, verdict in enumerate(VERDICTS):
        fact = f"Title: \nFact Number {i}"
        wrong_verdict = "refutes" if verdict == "supports" else "supports"
        of_claim = {pair for pair in pairs if pair[1].startswith(f"claim {i}.")}
        of_other_passages = {pair for pair in of_claim if pair[2] == "other passage"}
        assert of_claim - of_other_passages == {
            (fact, f"claim {i}. {verdict}", "entailed"),
            (fact, f"claim {i}. {wrong_verdict}", "wrong text"),
        }
        assert of_other_passages
        for other_fact, _, _ in of_other_passages:
            assert other_fact != fact
            assert "Fact Number" in other_fact


def test_a_longer_name_is_not_a_wrong_answer(tmp_path):
    rows = [
        qa("who?", {"text": "Obama", "passage": make_passage("a", "Barack Obama met Angela Merkel.")}),
        qa("where?", {"text": "there", "passage": make_passage("b", "nowhere")}),
    ]
    instances = load_instances(write(tmp_path / "a.jsonl", rows))
    hypotheses = {hypothesis for _, hypothesis, _ in pairs_of_seeds(instances, "{question} {sentence}", 40)}
    assert hypotheses == {"who? Obama", "who? Angela Merkel", "who? there", "where? there", "where? Obama"}


def test_a_sentence_is_made_wrong_by_one_word(tmp_path):
    """The rarest word that the passage holds and the question does not becomes another word of the passage."""
    rows = []
    for i, job in enumerate(["carver", "weaver", "dancer"]):
        answer = f"Person {i} works as a {job}."
        passage = make_passage(f"p{i}", f"{answer} She was born in 18{i}0.", title=f"Person {i}")
        rows.append(qa(f"what is Person {i}?", {"text": answer, "passage": passage}))
    instances = load_instances(write(tmp_path / "a.jsonl", rows))
    changed = set()
    for passage, hypothesis, kind in pairs_of_seeds(instances, "{sentence}", 300):
        if kind == "wrong word" and passage.startswith("Title: Person 0"):
            changed.add(hypothesis)
    assert changed == {f"Person 0 works as a {word}." for word in ("She", "was", "born", "in", "1800")}


def test_an_nli_model_with_two_labels_keeps_them():
    two_labels = {0: "entailment", 1: "not_entailment"}
    three_labels = {0: "contradiction", 1: "neutral", 2: "entailment"}
    assert labels_of(BertConfig(id2label=two_labels)) == two_labels
    assert labels_of(BertConfig(id2label=three_labels)) == LABELS
    assert labels_of(BertConfig()) == LABELS


def test_instances_without_pairs_are_refused(tmp_path):
    free = load_instances(write(tmp_path / "a.jsonl", [qa("?", {"text": "x", "passage": None})]))
    with pytest.raises(ValueError, match="None of 1 instances has a passage"):
        make_pairs(free, "{sentence}")
    same = [qa("?", {"text": "x", "passage": make_passage("a", "only one")})] * 2
    with pytest.raises(ValueError, match="2 segments give no pair that is not entailed"):
        make_pairs(load_instances(write(tmp_path / "b.jsonl", same)), "{sentence}")


@pytest.mark.slow
def test_from_instances_to_gr(tmp_path):
    """Train as a user does, on a known relation, and judge words that were not in the training data."""
    generator = random.Random(0)
    train = [colour_instance(i, generator) for i in range(1500)]
    held_out = [colour_instance(i, random.Random(i + 1), UNSEEN) for i in range(60)]
    model, tokenizer = make_classifier(steps=0)
    encoder_config = BertConfig(**{**model.config.to_dict(), "architectures": None})
    BertModel(encoder_config).save_pretrained(tmp_path / "encoder")
    tokenizer.save_pretrained(tmp_path / "encoder")
    settings = flags(
        use_cpu="true",
        train_file=write(tmp_path / "train.jsonl", train),
        validation_file=write(tmp_path / "heldout.jsonl", held_out),
        model_name_or_path=tmp_path / "encoder",
        output_dir=tmp_path / "nli",
        learning_rate=2e-3,
        per_device_train_batch_size=64,
        num_train_epochs=6,
        save_strategy="no",
        report_to="none",
        num_threads=1,
        disable_tqdm="true",
    )
    command = [RECIPE, *settings]
    result = run_forked(*command, cwd=tmp_path)
    assert result.returncode == 0, result.stderr[-2000:]
    assert "accuracy, wrong text" in result.stdout
    assert "%|" not in result.stderr  # no progress bar
    results = json.loads((tmp_path / "nli" / "eval_results.json").read_text())
    for kind in ("all", "entailed", "other_passage", "wrong_text"):
        assert results[f"eval_accuracy_{kind}"] >= 0.85, results

    judge = NLIJudge.from_pretrained(tmp_path / "nli", device="cpu")
    assert judge.model.config.id2label == LABELS
    predictions = []
    for text in ("red", "blue"):
        retrieval = {"passages": [{"title": "", "text": "v1 red v2"}], "grounded_text": text}
        predictions.append({"input": "w1", "retrievals": [retrieval]})
    assert grounding(predictions, judge, hypothesis="{question} {sentence}") == [1.0, 0.0]

    for option, value, max_length, message in (
        ("train_file", tmp_path / "missing.jsonl", 320, "missing.jsonl"),
        ("num_train_epochs", 1, 5, "leave no room"),
    ):
        result = run_forked(*command, *flags(**{option: value}, max_length=max_length), cwd=tmp_path)
        assert result.returncode == 1
        assert result.stderr.strip().splitlines()[-1].startswith("error: ")
        assert message in result.stderr
