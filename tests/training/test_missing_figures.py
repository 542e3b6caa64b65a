"""A figure is never better because something is missing: no query, no negative, no label gives no figure."""

import copy
import functools
import math

import pytest
import torch

from support.models import PASSAGES, make_model, plain_batch
from support.training import NAMES, arguments, world
from trainer import CoSupTrainer, held_out, training_step
from trainer.running import RunningFigures

ALONE = {"per_device_train_batch_size": 1}
STEP = {"max_steps": 1, "train_sampling_strategy": "sequential"}


def retrieving(passages):
    """One instance for each passage, which is its positive."""
    instances = []
    for i, passage in enumerate(passages):
        instances.append({"id": str(i), "input": f"question {i}", "segments": [{"text": "a", "passage": passage}]})
    return instances


@functools.cache
def untrained():
    return make_model()


def train(folder, instances, model=None, **options):
    """Train one step; return the trainer and the log of the step."""
    model = model or copy.deepcopy(untrained())
    trainer = CoSupTrainer(model, arguments(folder, **STEP | options), train_dataset=instances)
    trainer.train()
    return trainer, trainer.state.log_history[0]


@pytest.fixture
def warnings(monkeypatch):
    """What training and evaluation warn of."""
    messages = []
    for module in (training_step, held_out):
        monkeypatch.setattr(module.logger, "warning", messages.append)
    return messages


@pytest.mark.parametrize(
    ("passages", "options", "num_queries"),
    [
        (PASSAGES[:2], ALONE, 1),
        (PASSAGES[:2], ALONE | {"gradient_accumulation_steps": 2}, 2),
        (PASSAGES[:2], {"nsp_batch_size": 1}, 1),
        (PASSAGES[:1] * 4, {}, 4),
        (PASSAGES[:1] * 4, {"nsp_batch_size": 4, "per_device_train_batch_size": 2}, 4),
    ],
)
def test_queries_without_negatives_are_left_out(tmp_path, warnings, passages, options, num_queries):
    model = copy.deepcopy(untrained())
    before = copy.deepcopy(model.emb_seq.state_dict())
    trainer, entry = train(tmp_path, retrieving(passages), model, max_steps=2, **options)
    assert not {"nsp_loss", "nsp_accuracy"} & set(entry)
    assert entry["num_negatives"] == 0
    assert entry["loss"] == pytest.approx(entry["ntp_loss"], rel=1e-5)
    assert all(torch.equal(before[name], weight) for name, weight in model.emb_seq.state_dict().items())
    (warning,) = warnings  # of two steps
    assert warning.startswith(f"Step 1: {num_queries} of {num_queries} queries have no negative")
    assert "nsp_batch_size" in warning


def test_the_card_has_a_dash_where_nothing_was_measured(tmp_path):
    """The first batch has one passage, the second has two."""
    trainer, _ = train(
        tmp_path, retrieving(PASSAGES[i] for i in (0, 0, 1, 2)), max_steps=2, per_device_train_batch_size=2
    )
    first, second = trainer.state.log_history[:2]
    trainer.save_model()
    trainer.create_model_card()
    card = (tmp_path / "README.md").read_text()
    assert "| step | loss | ntp_loss | nsp_loss | nsp_accuracy |" in card
    assert f"| 1 | {first['loss']:.4g} | {first['ntp_loss']:.4g} | — | — |" in card
    assert f"| {second['nsp_loss']:.4g} | {second['nsp_accuracy']:.4g} |" in card


def test_the_nsp_loss_is_the_mean_of_the_queries_that_have_negatives(tmp_path, warnings):
    """Of two accumulated batches, one has a single passage: the other alone makes the NSP loss and its gradient."""
    model = copy.deepcopy(untrained())
    reference = copy.deepcopy(model).train()
    instances = retrieving([*PASSAGES[:1] * 3, *PASSAGES[1:4]])
    options = {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 2, "max_grad_norm": 0.0}
    options |= {"optim": "sgd", "learning_rate": 0.1, "lr_scheduler_type": "constant"}
    trainer, entry = train(tmp_path, instances, model, **options)
    outputs = reference(**plain_batch([trainer.train_dataset[i] for i in range(3, 6)]))
    assert entry["nsp_loss"] == pytest.approx(outputs.nsp_loss.item(), rel=1e-5)
    assert entry["loss"] == pytest.approx(entry["ntp_loss"] + entry["nsp_loss"], rel=1e-5)
    assert entry["num_negatives"] == 1.0  # of six queries, three have two
    scores = outputs.query_embeds @ outputs.passage_embeds.T
    right = scores.argmax(1) == torch.arange(3)
    assert entry["nsp_accuracy"] == pytest.approx(float(right.float().mean()))
    outputs.nsp_loss.backward()  # Emb_seq learns from nothing else
    pairs = zip(model.emb_seq.parameters(), reference.emb_seq.parameters(), strict=True)
    for parameter, expected in pairs:
        torch.testing.assert_close(parameter, expected - 0.1 * expected.grad, rtol=1e-5, atol=1e-6)
    assert len(warnings) == 1
    assert "3 of 6 queries have no negative" in warnings[0]


@pytest.mark.parametrize(
    ("supervision", "options", "losses"),
    [
        ("ntp", {}, ["ntp_loss"]),
        ("nsp", {}, ["nsp_loss"]),
        ("nsp", ALONE, []),
    ],
)
def test_a_loss_that_was_not_measured_is_not_0(tmp_path, supervision, options, losses):
    trainer, entry = train(tmp_path, world(NAMES[1:9]), supervision=supervision, **options)
    assert [name for name in entry if name.endswith("_loss")] == losses
    assert ("loss" in entry) == bool(losses)
    assert ("nsp_accuracy" in entry) == (losses == ["nsp_loss"])
    final = trainer.state.log_history[-1]
    assert ("train_loss" in final) == bool(losses)
    metrics = trainer.evaluate(world(NAMES[9:18]))
    assert [name for name in metrics if name.endswith("loss")] == [f"eval_{supervision}_loss", "eval_loss"]
    assert metrics["eval_loss"] == pytest.approx(metrics[f"eval_{supervision}_loss"])
    assert ("eval_query_recall@1" in metrics) == (supervision == "nsp")


def test_the_result_of_a_training_without_losses_is_not_0(tmp_path):
    args = arguments(tmp_path, supervision="nsp", **STEP | ALONE)
    output = CoSupTrainer(copy.deepcopy(untrained()), args, train_dataset=world(NAMES[1:3])).train()
    assert math.isnan(output.training_loss)
    assert "train_loss" not in output.metrics


def test_steps_without_a_loss_do_not_lower_its_mean():
    running = RunningFigures(["ntp_loss", "nsp_loss"])
    for losses in ({"ntp_loss": 2.0, "nsp_loss": 6.0}, {"ntp_loss": 4.0}):
        running.add_step()
        running.add_losses({name: torch.tensor(loss) for name, loss in losses.items()})
    running.add_scores(torch.tensor([[1.0, float("-inf")], [2.0, 1.0]]), torch.tensor([0, 1]))
    figures = running.averages(torch.device("cpu"), lambda sums: sums)
    assert figures["ntp_loss"] == 3.0
    assert figures["nsp_loss"] == 6.0
    assert figures["nsp_accuracy"] == 0.0  # the first query has no negative, the second is wrong
    assert figures["num_negatives"] == 0.5
    running.restart()
    assert set(running.averages(torch.device("cpu"), lambda sums: sums)) == {"tokens_per_second"}


@pytest.mark.parametrize(
    ("passages", "num_queries", "recalls"),
    [
        (PASSAGES[:1] * 3, 0, []),
        (PASSAGES[:3], 3, ["eval_query_recall@1"]),  # of three passages, all are among the first five
        (PASSAGES, 6, ["eval_query_recall@1", "eval_query_recall@5"]),
        ([None, None], 0, []),
    ],
)
def test_recall_needs_passages_that_are_wrong(tmp_path, warnings, passages, num_queries, recalls):
    trainer = CoSupTrainer(copy.deepcopy(untrained()), arguments(tmp_path), eval_dataset=retrieving(passages))
    for _ in range(2):
        metrics = trainer.evaluate()
    assert metrics["eval_num_queries"] == num_queries
    assert [name for name in metrics if "recall" in name] == recalls
    assert ("eval_nsp_loss" in metrics) == bool(num_queries)
    assert metrics["eval_loss"] == pytest.approx(metrics["eval_ntp_loss"] + metrics.get("eval_nsp_loss", 0))
    expected = "3 of 3 queries of the evaluation set have no negative: all of its 1 distinct passages are right for"
    assert [warning.startswith(expected) for warning in warnings] == ([True] if passages == PASSAGES[:1] * 3 else [])


def test_a_query_for_which_all_passages_are_right_does_not_count(tmp_path):
    """A set of three queries; for one of them, both passages are right."""
    instances = retrieving([*PASSAGES[:2], PASSAGES[0]])
    instances[2]["segments"][0]["positives"] = [PASSAGES[1]["id"]]
    trainer = CoSupTrainer(copy.deepcopy(untrained()), arguments(tmp_path), eval_dataset=instances)
    metrics = trainer.evaluate()
    fewer = CoSupTrainer(trainer.model, arguments(tmp_path), eval_dataset=instances[:2]).evaluate()
    assert metrics["eval_num_queries"] == 2
    for name in ("eval_nsp_loss", "eval_query_recall@1"):
        assert metrics[name] == pytest.approx(fewer[name], rel=1e-5)
