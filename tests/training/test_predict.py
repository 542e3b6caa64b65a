"""What an evaluation returns besides figures: embeddings, the tokens that they were made from, and their losses."""

import copy

import datasets
import numpy as np
import pytest
import torch

from support.models import make_model
from support.training import NAMES, arguments, world
from trainer import CoSupTrainer


@pytest.fixture
def instances():
    """Eleven instances, of which one has two queries, and one a hard negative."""
    instances = world(NAMES[:11])
    passage = {"id": "far", "title": "Far", "text": "It is far away from here."}
    instances[3]["segments"].append({"text": "far", "passage": passage})
    instances[7]["segments"][0]["negatives"] = [{"id": "negative", "title": "No", "text": "Nobody lives here."}]
    return instances


def tokens_of_queries(row, nsp_token_id):
    """Everything up to each [NSP] of a tokenized instance."""
    ids = row["input_ids"]
    return [ids[: column + 1] for column, token in enumerate(ids) if token == nsp_token_id]


@pytest.mark.parametrize(
    "options",
    [
        {"per_device_eval_batch_size": 11},
        {"per_device_eval_batch_size": 1},
        {"per_device_eval_batch_size": 4, "padding_free": True},
        {"per_device_eval_batch_size": 4, "train_sampling_strategy": "group_by_length", "dataloader_drop_last": True},
        {"per_device_eval_batch_size": 4, "supervision": "separate"},
    ],
    ids=["whole", "single", "packed", "grouped", "separate"],
)
def test_predict_returns_embeddings_in_the_order_of_the_instances(tmp_path, instances, options):
    """However the set is cut, each row is what the model gives for this query or passage alone."""
    seen = []

    def compute_metrics(prediction):
        seen.append(prediction)
        return {"mean": np.float32(0.5), "test_known": 1}

    model = make_model(query_from="emb_seq" if "supervision" in options else "gen").eval()
    args = arguments(tmp_path, include_for_metrics=["inputs", "loss"], **options)
    trainer = CoSupTrainer(model, args, train_dataset=instances, compute_metrics=compute_metrics)
    query_embeds, passage_embeds = trainer.predict(instances).predictions

    expected_queries, expected_positives, expected_tokens = [], [], []
    for row in trainer.train_dataset:
        if not row["passage_input_ids"]:
            continue
        queries = row.get("query_input_ids") or tokens_of_queries(row, model.config.nsp_token_id)
        for query, passage in zip(queries, row["passage_input_ids"], strict=True):
            expected_tokens.append((query, passage))
            with torch.no_grad():
                if "supervision" in options:
                    output = model(query_input_ids=torch.tensor([query]))
                else:
                    output = model(input_ids=torch.tensor([query]))
                expected_queries.append(output.query_embeds[-1].numpy())
                expected_positives.append(model.encode_passages(torch.tensor([passage]))[0].numpy())
    (prediction,) = seen
    labels = prediction.label_ids
    assert labels.shape == (9,) and labels.dtype == np.int64
    assert query_embeds.dtype == passage_embeds.dtype == np.float32
    assert passage_embeds.shape == (10, 32)  # with the hard negative
    np.testing.assert_allclose(query_embeds, np.stack(expected_queries), atol=1e-5)
    np.testing.assert_allclose(passage_embeds[labels], np.stack(expected_positives), atol=1e-5)

    query_ids, passage_ids = prediction.inputs
    for i, (query, passage) in enumerate(expected_tokens):
        assert query_ids[i, : len(query)].tolist() == query and (query_ids[i, len(query) :] == -100).all()
        ids = passage_ids[labels[i]]
        assert ids[: len(passage)].tolist() == passage and (ids[len(passage) :] == -100).all()
    scores = torch.from_numpy(query_embeds @ passage_embeds.T / model.config.temperature)
    losses = torch.nn.functional.cross_entropy(scores, torch.from_numpy(labels), reduction="none")
    np.testing.assert_allclose(prediction.losses, losses.numpy(), rtol=1e-4)


def test_predict_measures_what_evaluate_does(tmp_path, instances):
    args = arguments(tmp_path, per_device_eval_batch_size=4)
    trainer = CoSupTrainer(
        make_model(), args, eval_dataset=instances, compute_metrics=lambda prediction: {"mean": np.float32(0.5)}
    )
    evaluated = trainer.evaluate()
    output = trainer.predict(instances, metric_key_prefix="held")
    for name in ("loss", "ntp_loss", "nsp_loss", "query_recall@1", "query_recall@5", "mean"):
        assert output.metrics[f"held_{name}"] == pytest.approx(evaluated[f"eval_{name}"], rel=1e-6)
    assert type(output.metrics["held_mean"]) is float  # trainer_state.json is written with it
    nearest = (output.predictions[0] @ output.predictions[1].T).argmax(1)
    assert (nearest == output.label_ids).mean() == pytest.approx(output.metrics["held_query_recall@1"])


def test_prediction_loss_only_returns_no_embeddings(tmp_path, instances):
    def compute_metrics(prediction):
        raise AssertionError("was called")

    args = arguments(tmp_path, prediction_loss_only=True)
    trainer = CoSupTrainer(make_model(), args, eval_dataset=instances, compute_metrics=compute_metrics)
    output = trainer.predict(instances)
    assert output.predictions is None and output.label_ids is None
    assert output.metrics["test_nsp_loss"] == pytest.approx(trainer.evaluate()["eval_nsp_loss"])


def test_predict_refuses_what_would_leave_rows_out(tmp_path, instances):
    trainer = CoSupTrainer(make_model(), arguments(tmp_path))
    longer = copy.deepcopy(instances)
    longer[2]["input"] = "long " * 300
    with pytest.raises(ValueError, match="1 of 11 instances of the test set are longer than max_length=256"):
        trainer.predict(longer)
    stream = datasets.IterableDataset.from_generator(lambda: iter(longer))
    with pytest.raises(ValueError, match="test set, row 2 is longer than max_length=256"):
        trainer.predict(stream)
    trainer = CoSupTrainer(make_model(), arguments(tmp_path, supervision="ntp"))
    with pytest.raises(ValueError, match="supervision='ntp' makes none"):
        trainer.predict(instances)


@pytest.mark.parametrize("is_stream", [False, True])
def test_an_evaluation_counts_the_instances_that_were_too_long(tmp_path, instances, is_stream):
    longer = copy.deepcopy(instances)
    longer[2]["input"] = longer[3]["input"] = "long " * 300
    held_out = datasets.IterableDataset.from_generator(lambda: iter(longer)) if is_stream else longer
    sets = {"long": held_out, "short": instances}
    trainer = CoSupTrainer(make_model(), arguments(tmp_path), eval_dataset=sets)
    for _ in range(2):  # a stream is read again
        metrics = trainer.evaluate()
        assert metrics["eval_long_num_left_out"] == 2
        assert "eval_short_num_left_out" not in metrics
    assert trainer.evaluate(held_out)["eval_num_left_out"] == 2
    assert trainer.evaluate("long")["eval_num_left_out"] == 2
    message = (
        r"set is the name 'lnog', expected one of this trainer's sets \('long', 'short'\), .*load_instances\('lnog'"
    )
    with pytest.raises(TypeError, match=message):
        trainer.evaluate("lnog")
    alone = CoSupTrainer(make_model(), arguments(tmp_path), eval_dataset=instances)
    with pytest.raises(TypeError, match=r"evaluation set is the name 'eval.jsonl'.*load_instances\('eval.jsonl'\)"):
        alone.evaluate("eval.jsonl")


@pytest.mark.parametrize("options", [{}, {"padding_free": True}, {"supervision": "separate"}, {"supervision": "ntp"}])
def test_evaluate_counts_where_gen_would_write_nsp(tmp_path, instances, options):
    """The LM head is turned so that [NSP] wins at some of its places, which the logits of each row alone confirm."""
    query_from = "emb_seq" if options.get("supervision") == "separate" else "gen"
    model = make_model(gen_kwargs={"tie_word_embeddings": False}, query_from=query_from).eval()
    args = arguments(tmp_path, per_device_eval_batch_size=4, **options)
    trainer = CoSupTrainer(model, args, train_dataset=instances)
    hidden = []
    for row in trainer.train_dataset:
        states = model.gen.base_model(input_ids=torch.tensor([row["input_ids"]])).last_hidden_state[0]
        hidden += [states[i - 1] for i, label in enumerate(row["labels"]) if label == model.config.nsp_token_id]
    hidden = torch.stack(hidden).detach()  # (9, h)
    head = model.get_output_embeddings().weight
    with torch.no_grad():
        head[model.config.nsp_token_id] = 50 * (hidden[1] - hidden.mean(0))
    predicted = (hidden @ head.T).argmax(1) == model.config.nsp_token_id
    assert 0 < predicted.sum() < len(hidden) == 9
    assert trainer.evaluate(instances)["eval_nsp_predicted"] == pytest.approx(predicted.float().mean().item())
    if query_from == "gen":
        assert "eval_nsp_predicted" not in trainer.evaluate(instances[:1] + instances[5:6])  # neither has an [NSP]
