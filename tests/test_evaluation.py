"""The figures of an evaluation, by hand and on a model whose answers are known."""

import pytest
import torch
from conftest import PASSAGES, make_model, plain_batch

from trainer.data import tokenize_instance
from trainer.evaluation import Mean, Rate, answer, evaluate_model, exact_match, normalize_answer, ntp_loss, recall, reference_instances

QUESTIONS = [
    {"id": f"q{i}", "dataset": "d", "instruction": "", "input": f"question {i}?", "answers": [p["title"] or "none"]} | {"provenance": [[p["id"]]]}
    for i, p in enumerate(PASSAGES)
]


def test_normalize_answer_and_exact_match():
    assert normalize_answer("  The Night-Watch, by a  man! ") == "nightwatch by man"
    assert exact_match("the Night Watch.", ["x", "night watch"])
    assert not exact_match("night", ["night watch"])
    assert exact_match("...", [""])


def test_wilson_interval():
    assert Rate(0, 10).interval == pytest.approx((0.0, 0.2775), abs=1e-4)  # Wilson's score interval, computed by hand
    assert Rate(5, 10).interval == pytest.approx((0.2366, 0.7634), abs=1e-4)
    assert Rate(10, 10).interval[1] == pytest.approx(1.0)


def test_mean_is_weighted_and_its_interval_holds_it():
    mean = Mean([2.0, 12.0], [1, 3])
    assert mean.value == 3.5
    assert mean.interval[0] <= 3.5 <= mean.interval[1]
    assert Mean([4.0, 8.0], [2, 4]).interval == (2.0, 2.0)


def test_ntp_loss_of_references_equals_the_model(model):
    instances = reference_instances(QUESTIONS[:2], PASSAGES)
    batch = plain_batch([tokenize_instance(x, model.tokenizer, model.tokenizer, model.config) for x in instances])
    with torch.no_grad():
        assert ntp_loss(model, instances).value == pytest.approx(float(model(**batch).ntp_loss), rel=1e-5)


def test_recall_against_the_model_itself(model):
    index = model.build_index(PASSAGES, show_progress_bar=False)
    rates = recall(model, index, QUESTIONS, ks=(1, 6), batch_size=4)
    assert rates[6].hits == 6  # the index holds six
    one_by_one = [recall(model, index, [question], ks=(1,))[1].hits for question in QUESTIONS]
    assert rates[1].hits == sum(one_by_one)


@pytest.mark.parametrize("batch_size", [1, 4])
def test_modes_of_answering(batch_size):
    """An untrained model never retrieves with mode 'off', reads the gold passage with 'gold', and what it wrote excludes passages."""
    model = make_model()
    index = model.build_index(PASSAGES, show_progress_bar=False)
    off = answer(model, QUESTIONS, None, "off", batch_size=batch_size, max_new_tokens=6)
    gold = answer(model, QUESTIONS, index, "gold", batch_size=batch_size, max_new_tokens=6)
    assert all(found.retrieved == [] for found in off + gold)
    assert [a.text for a in off] != [a.text for a in gold]
    metrics, answers = evaluate_model(model, index, QUESTIONS + [{**QUESTIONS[0], "provenance": []}], batch_size, 6)
    assert metrics["exact_match"].n == metrics["retrieval_accuracy"].n == 6
    assert metrics["needless_retrieval"].n == metrics["exact_match_no_passage"].n == 1
    assert len(answers) == 7
    assert model.training is False
