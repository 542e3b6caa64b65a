"""Ablations of the losses: which gradient reaches which part, symmetric NSP, and how far two gradients agree."""

import copy
import re
from types import SimpleNamespace

import datasets
import pytest
import torch
import torch.nn.functional as F
from accelerate.utils import DistributedType

from support.models import PASSAGES, make_model
from support.training import NAMES, arguments, world
from trainer import CoSupTrainer, gradient_cosine
from trainer.arguments import check_sharding

SGD = {"optim": "sgd", "max_grad_norm": 0.0, "lr_scheduler_type": "constant", "learning_rate": 1.0}
SEVERAL = [  # two instances with two queries each, of three passages
    {
        "id": str(i),
        "dataset": "d",
        "instruction": "",
        "input": f"question {i}",
        "segments": [{"text": f"answer {i} {number}", "passage": PASSAGES[number]} for number in numbers],
    }
    for i, numbers in enumerate([(0, 1), (0, 2), (4,)])
]


def step(model, folder, instances=None, **options):
    """Take one step of plain SGD; return the gradients, by name, the log, and the trainer."""
    options = {"max_steps": 1, "train_sampling_strategy": "sequential", **SGD, **options}
    trained = copy.deepcopy(model)
    trainer = CoSupTrainer(trained, arguments(folder, **options), train_dataset=instances or world(NAMES[:8]))
    trainer.train()
    (entry,) = [entry for entry in trainer.state.log_history if "loss" in entry]
    before = dict(model.named_parameters())
    gradients = {name: before[name].detach() - weight.detach() for name, weight in trained.named_parameters()}
    return gradients, entry, trainer


def part(gradients, prefix):
    return torch.cat([gradient.flatten() for name, gradient in gradients.items() if name.startswith(prefix)])


# ---------------------------------------------------------------------- where the gradient of NSP goes


@pytest.mark.parametrize("options", [{}, {"nsp_batch_size": 8, "per_device_train_batch_size": 3}])
def test_the_nsp_gradient_reaches_the_part_that_is_named(tmp_path, options):
    model = make_model()
    both, entry, _ = step(model, tmp_path / "both", **options)
    gen_alone, gen_entry, _ = step(model, tmp_path / "gen", nsp_gradient="gen", **options)
    emb_seq_alone, emb_seq_entry, _ = step(model, tmp_path / "emb_seq", nsp_gradient="emb_seq", **options)
    ntp, _, _ = step(model, tmp_path / "ntp", supervision="ntp")
    torch.testing.assert_close(part(gen_alone, "gen."), part(both, "gen."))
    torch.testing.assert_close(part(emb_seq_alone, "emb_seq."), part(both, "emb_seq."))
    assert not part(gen_alone, "emb_seq.").any() and part(both, "emb_seq.").norm() > 0.01
    torch.testing.assert_close(part(emb_seq_alone, "gen."), part(ntp, "gen."), atol=1e-5, rtol=1e-4)
    assert (part(both, "gen.") - part(ntp, "gen.")).norm() > 0.01
    for name in ("loss", "ntp_loss", "nsp_loss"):
        assert entry[name] == pytest.approx(gen_entry[name], rel=1e-5) == pytest.approx(emb_seq_entry[name], rel=1e-5)


# ---------------------------------------------------------------------- queries that the NTP loss does not shape


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3"])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_isolated_queries_get_no_gradient_of_the_ntp_loss(tmp_path, name, implementation):
    # the row of [NSP] in an untied embedding gets its gradient through the state at [NSP] alone
    model = make_model(name, gen_kwargs={"tie_word_embeddings": False, "attn_implementation": implementation})
    row = model.config.nsp_token_id
    embedding = next(
        name for name, weight in model.named_parameters() if weight is model.gen.get_input_embeddings().weight
    )
    model.config.nsp_loss_weight = 0.0
    plain, plain_entry, _ = step(model, tmp_path / "plain")
    isolated, entry, _ = step(model, tmp_path / "isolated", isolate_queries=True)
    assert entry["loss"] == pytest.approx(plain_entry["loss"], rel=1e-6)
    assert plain[embedding][row].norm() > 1e-5
    assert not isolated[embedding][row].any()
    assert part(isolated, "gen.").norm() > 0.5 * part(plain, "gen.").norm()  # the rest is trained
    model.config.nsp_loss_weight = 1.0
    trained, _, trainer = step(model, tmp_path / "co", isolate_queries=True)
    assert trained[embedding][row].norm() > 1e-5  # by the NSP loss
    assert trainer.model.gen.config._attn_implementation == implementation


# ---------------------------------------------------------------------- symmetric NSP


def test_the_reverse_loss_is_that_of_passages_over_queries(tmp_path):
    model = make_model(nsp_loss_weight=0.5)
    _, entry, trainer = step(model, tmp_path, instances=SEVERAL, symmetric_nsp=True)
    fresh = CoSupTrainer(copy.deepcopy(model), arguments(tmp_path, symmetric_nsp=True), train_dataset=SEVERAL)
    (queries, passages), labels, metrics = fresh.predict(SEVERAL)
    assert labels[0] == labels[2] and len(set(labels)) == 4
    scores = torch.from_numpy(queries @ passages.T) / model.config.temperature  # (5, 4)
    scores_of_positives = scores.T[labels]  # (5, 5): each query's positive with every query
    scores_of_positives[0, 2] = scores_of_positives[2, 0] = -torch.inf  # both queries have this passage
    expected = F.cross_entropy(scores_of_positives, torch.arange(5))
    assert entry["reverse_nsp_loss"] == pytest.approx(float(expected), rel=1e-5)
    assert metrics["test_reverse_nsp_loss"] == pytest.approx(float(expected), rel=1e-5)
    total = entry["ntp_loss"] + 0.25 * entry["nsp_loss"] + 0.25 * entry["reverse_nsp_loss"]
    assert entry["loss"] == pytest.approx(total, rel=1e-5)
    assert metrics["test_loss"] == pytest.approx(total, rel=1e-4)


def test_a_passage_that_is_right_for_every_query_has_no_reverse_loss(tmp_path):
    instances = [copy.deepcopy(SEVERAL[0])]
    del instances[0]["segments"][1]
    instances[0]["segments"][0]["negatives"] = [PASSAGES[3]]
    _, entry, trainer = step(make_model(), tmp_path, instances=instances, symmetric_nsp=True)
    assert entry["nsp_loss"] > 0 and "reverse_nsp_loss" not in entry
    assert "eval_reverse_nsp_loss" not in trainer.evaluate(instances)


# ---------------------------------------------------------------------- how far the gradients agree


@pytest.mark.parametrize("options", [{}, {"nsp_batch_size": 8, "per_device_train_batch_size": 3}])
def test_the_cosine_is_that_of_the_two_gradients_of_gen(tmp_path, options):
    model = make_model(nsp_loss_weight=0.5)
    plain, plain_entry, _ = step(model, tmp_path / "plain", **options)
    measured, entry, _ = step(model, tmp_path / "measured", gradient_cosine_steps=1, **options)
    for name, gradient in plain.items():
        assert torch.equal(gradient, measured[name]), name  # measuring changes nothing
    assert entry["loss"] == plain_entry["loss"]
    ntp, _, _ = step(model, tmp_path / "ntp", supervision="ntp")
    of_ntp = part(ntp, "gen.").double()
    of_nsp = part(plain, "gen.").double() - of_ntp
    assert entry["gradient_cosine"] == pytest.approx(float(F.cosine_similarity(of_ntp, of_nsp, dim=0)), abs=1e-4)
    assert entry["gradient_ratio"] == pytest.approx(float(of_nsp.norm() / of_ntp.norm()), rel=1e-3)


def test_the_cosine_is_measured_every_so_many_steps_and_only_if_there_are_two_gradients(tmp_path):
    trainer = CoSupTrainer(
        make_model(),
        arguments(tmp_path, max_steps=4, gradient_cosine_steps=3, per_device_train_batch_size=4),
        train_dataset=world(NAMES[:16]),
    )
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert ["gradient_cosine" in entry for entry in logs] == [True, False, False, True]
    _, entry, _ = step(make_model(), tmp_path / "lone", instances=SEVERAL[2:], gradient_cosine_steps=1, max_steps=1)
    assert "gradient_cosine" not in entry and "nsp_loss" not in entry


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_a_gradient_that_overflows_is_not_compared(tmp_path, monkeypatch, value):
    overflown = {"weight": torch.tensor([1.0, value])}
    monkeypatch.setattr(gradient_cosine, "_taken_gradients", lambda gen: overflown)
    _, entry, _ = step(make_model(), tmp_path, gradient_cosine_steps=1)
    assert "nsp_loss" in entry and "gradient_cosine" not in entry


# ---------------------------------------------------------------------- queries after the first


def test_recall_tells_first_queries_from_later_ones(tmp_path):
    trainer = CoSupTrainer(make_model(), arguments(tmp_path), train_dataset=SEVERAL)
    (queries, passages), labels, metrics = trainer.predict(SEVERAL)
    hits = (queries @ passages.T).argmax(1) == labels
    assert hits[[0, 2, 4]].mean() != hits[[1, 3]].mean()  # otherwise the two figures could be mixed up
    assert metrics["test_first_query_recall@1"] == pytest.approx(hits[[0, 2, 4]].mean())
    assert metrics["test_later_query_recall@1"] == pytest.approx(hits[[1, 3]].mean())
    rows = [{name: value for name, value in row.items() if name != "id"} for row in trainer.train_dataset]
    _, _, of_rows_without_ids = trainer.predict(datasets.Dataset.from_list(rows))
    assert of_rows_without_ids["test_later_query_recall@1"] == metrics["test_later_query_recall@1"]
    (_, _, of_single) = trainer.predict(world(NAMES[1:5]))
    assert "test_query_recall@1" in of_single and "test_later_query_recall@1" not in of_single


# ---------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    "options, message",
    [
        ({"nsp_gradient": "passages"}, "nsp_gradient is 'passages', expected one of"),
        ({"nsp_gradient": "gen", "supervision": "nsp"}, "nsp_gradient compares or changes the two losses"),
        ({"isolate_queries": True, "supervision": "ntp"}, "isolate_queries compares or changes the two losses"),
        ({"isolate_queries": True, "gradient_checkpointing": True}, "isolate_queries changes the attention"),
        ({"isolate_queries": True, "train_on_passages": True}, "predicts the first token of a passage"),
        ({"symmetric_nsp": True, "supervision": "ntp"}, "symmetric_nsp compares or changes the two losses"),
        ({"symmetric_nsp": True, "gather": "detached"}, "symmetric_nsp compares passages with the queries"),
        ({"gradient_cosine_steps": 0}, "gradient_cosine_steps is 0, expected an integer of 1 or more"),
        ({"gradient_cosine_steps": 1, "gradient_accumulation_steps": 2}, "give nsp_batch_size instead"),
        ({"gradient_cosine_steps": 1, "freeze_gen": True}, "freeze_gen leaves it without any"),
    ],
)
def test_ablations_that_have_no_meaning_are_refused(tmp_path, options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        arguments(tmp_path, **options)


def test_a_model_that_checkpoints_already_cannot_isolate_queries(tmp_path):
    model = make_model()
    model.gradient_checkpointing_enable()
    with pytest.raises(ValueError, match="isolate_queries changes the attention .*gradient_checkpointing_disable"):
        CoSupTrainer(model, arguments(tmp_path, isolate_queries=True), train_dataset=world(NAMES[:8]))


@pytest.mark.parametrize("version", [1, 2])
def test_checkpoints_of_fsdp_cannot_isolate_queries(tmp_path, version):
    args = arguments(tmp_path, isolate_queries=True)
    plugin = SimpleNamespace(fsdp_version=version, activation_checkpointing=False)
    check_sharding(args, DistributedType.FSDP, plugin)
    plugin.activation_checkpointing = True
    with pytest.raises(ValueError, match="isolate_queries changes the attention .*activation_checkpointing of FSDP"):
        check_sharding(args, DistributedType.FSDP, plugin)
    check_sharding(arguments(tmp_path), DistributedType.FSDP, plugin)


def test_an_architecture_that_computes_attention_itself_cannot_isolate_queries(tmp_path):
    with pytest.raises(ValueError, match="isolate_queries: .* computes attention itself"):
        CoSupTrainer(make_model("gptj"), arguments(tmp_path, isolate_queries=True), train_dataset=world(NAMES[:8]))
