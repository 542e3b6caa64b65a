"""Retrieval that is learnt from the reader: losses and gradients, what is measured, and what is refused."""

import copy

import pytest
import torch

from support.models import make_emb_seq, make_model
from support.training import NAMES, arguments, questions, world
from trainer import CoSupTrainer
from trainer.data import check_instance
from trainer.reader_scores import answer_log_likelihoods, attention_shares
from trainer.reading import reader_row
from trainer.tokenizing import tokenize_instance

ATTENTION = {"supervision": "attention_distillation"}
PERPLEXITY = {"supervision": "perplexity_distillation"}
RETRIEVED = {"supervision": "ntp", "candidates_from": "index"}
K = 3
ASKED, CORPUS = questions(NAMES[:20])
ASKED = ASKED[:6]
STEP = {
    "max_steps": 1,
    "optim": "sgd",
    "learning_rate": 0.1,
    "lr_scheduler_type": "constant",
    "max_grad_norm": 0.0,
    "train_sampling_strategy": "sequential",
    "num_candidates": K,
}


@pytest.fixture(scope="module")
def models():
    """A model for each place that queries come from."""
    return {
        "gen": make_model(),
        "emb_seq": make_model(query_from="emb_seq"),
        "query_encoder": make_model(query_from="query_encoder", query_encoder=make_emb_seq(seed=2)),
        "tied": make_model(tie_emb_seq=True, emb_head_size=24),
    }


def make_trainer(model, folder, instances=ASKED, corpus=CORPUS, **options):
    args = arguments(folder, **{**STEP, **options})
    return CoSupTrainer(copy.deepcopy(model), args, train_dataset=instances, corpus=corpus)


def train(model, folder, *args, **options):
    """Train, and return the trainer and the entries of its log."""
    trainer = make_trainer(model, folder, *args, **options)
    trainer.train()
    return trainer, [entry for entry in trainer.state.log_history if "learning_rate" in entry]


def update(trainer, model):
    """What a step has added to each parameter."""
    before = dict(model.named_parameters())
    return {name: value.detach() - before[name] for name, value in trainer.model.named_parameters()}


def assert_same(first, second, tolerance=1e-5):
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert (second[name] - value).norm() <= tolerance * value.norm() + 1e-6, name


# ---------------------------------------------------------------------- losses


def plain_losses(model, options):
    """NTP loss, distillation loss, targets and candidates of `ASKED`, one instance and one passage at a time."""
    model = copy.deepcopy(model).train()
    tokenizer, config = model.tokenizer, model.config
    index = model.build_index(CORPUS, show_progress_bar=False)
    passage_ids = {passage["id"]: passage["input_ids"] for passage in index.get_passages(index.live_rows())}
    losses, targets, students, hits = [], [], [], []
    ntp_sum = num_labels = 0
    for instance in ASKED:
        checked = check_instance(instance, "here")
        ids = tokenize_instance(checked, tokenizer, tokenizer, config, candidates_from="index")["input_ids"]
        nsp = ids.index(config.nsp_token_id)
        query = model(input_ids=torch.tensor([ids[: nsp + 1]])).query_embeds[0]
        scores, found = index.search(query[None].detach(), K)
        candidates = index.get_passages(found[0])
        assert scores[0, 0] > scores[0, -1]
        hits.append(any(instance["answers"][0] in passage["text"].rstrip(".").split() for passage in candidates))
        texts = [passage_ids[passage["id"]] for passage in candidates]
        newline = tokenizer.encode("\n", add_special_tokens=False)
        row = reader_row(ids[:nsp], texts, ids[nsp + 2 : -2], config, newline, ids[-1])
        joined = [token for i, text in enumerate(texts) for token in (newline if i else []) + text]
        assert row.input_ids == [*ids[: nsp + 1], *joined, *ids[nsp + 1 :]]
        output = model(input_ids=torch.tensor([row.input_ids]), labels=torch.tensor([row.labels]))
        trained = sum(label != -100 for label in row.labels[1:])
        ntp_sum, num_labels = ntp_sum + output.ntp_loss * trained, num_labels + trained

        embeds = []
        for passage in candidates:
            emb_seq_ids = [tokenizer.bos_token_id, *passage_ids[passage["id"]], tokenizer.eos_token_id]
            embeds.append(model.encode_passages(torch.tensor([emb_seq_ids]))[0])
        student = (torch.stack(embeds) @ query / config.temperature).log_softmax(0)
        target = plain_target(model, row, student.detach(), options)
        losses.append((target * (target.log() - student)).sum())
        targets.append(target)
        students.append(student.detach())
    ntp_loss, kl = ntp_sum / num_labels, torch.stack(losses).mean()
    total = ntp_loss + config.nsp_loss_weight * kl
    total.backward()
    entropies = [-(target * target.log()).sum() for target in targets]
    student_entropies = [-(student.exp() * student).sum() for student in students]
    figures = {
        "loss": total,
        "ntp_loss": ntp_loss,
        "distillation_loss": kl,
        "target_entropy": torch.stack(entropies).mean(),
        "student_entropy": torch.stack(student_entropies).mean(),
        "target_max": torch.stack(targets).amax(1).mean(),
        f"hit_rate@{K}": sum(hits) / len(hits),
    }
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    return {name: float(value) for name, value in figures.items()}, gradients


def plain_target(model, row, student, options):
    """The target of one instance."""
    kind = options.get("distillation_target")
    temperature = options.get("target_temperature")
    if options["supervision"] == "attention_distillation":
        shares = attention_shares(model, [row], 0)[0]
        return shares if kind == "attention_shares" else (shares / (temperature or 0.02)).softmax(0)
    reduction = "sum" if kind == "emdr" else "mean"
    leave_one_out = kind == "leave_one_out"
    scores = answer_log_likelihoods(model, [row], 0, leave_one_out=leave_one_out, reduction=reduction)[0]
    if kind == "emdr":
        return (scores + student).softmax(0)
    return ((-scores if leave_one_out else scores) / (temperature or 0.1)).softmax(0)


CASES = {
    "attention": ("gen", ATTENTION),
    "shares": ("emb_seq", ATTENTION | {"distillation_target": "attention_shares"}),
    "perplexity": ("tied", PERPLEXITY | {"target_temperature": 0.5}),
    "leave one out": ("emb_seq", PERPLEXITY | {"distillation_target": "leave_one_out"}),
    "emdr": ("gen", PERPLEXITY | {"distillation_target": "emdr"}),
}


@pytest.mark.parametrize("name", CASES)
def test_losses_gradients_and_figures_equal_a_plain_computation(models, tmp_path, name):
    query_from, options = CASES[name]
    model = models[query_from]
    expected, gradients = plain_losses(model, options)
    trainer, (entry,) = train(model, tmp_path, **options)
    for figure, value in expected.items():
        assert entry[figure] == pytest.approx(value, rel=1e-4, abs=1e-5), figure
    assert entry["num_left_out"] == 0
    assert "nsp_loss" not in entry  # no instance has a passage
    for parameter, change in update(trainer, model).items():
        gradient = gradients[parameter]
        if gradient is None:
            gradient = torch.zeros_like(change)
        assert (change + 0.1 * gradient).norm() <= 1e-4 * gradient.norm() + 1e-5, parameter


def test_provenance_is_for_figures_only(models, tmp_path):
    elsewhere = [{**instance, "provenance": [[CORPUS[-1]["id"]]]} for instance in ASKED]
    unknown = [{name: value for name, value in instance.items() if name != "provenance"} for instance in ASKED]
    trainers, entries = [], []
    for i, instances in enumerate((ASKED, elsewhere, unknown)):
        trainer, (entry,) = train(models["emb_seq"], tmp_path / str(i), instances, **ATTENTION)
        trainers.append(trainer)
        entries.append(entry)
    recalls = [entry.pop(f"query_recall@{K}", None) for entry in entries]
    assert recalls[0] != recalls[1] and recalls[2] is None
    for entry, trainer in zip(entries, trainers, strict=True):
        assert {**entry, "tokens_per_second": 0} == {**entries[0], "tokens_per_second": 0}
        for name, parameter in trainer.model.named_parameters():
            assert torch.equal(parameter, dict(trainers[0].model.named_parameters())[name])


# ---------------------------------------------------------------------- what is trained


def test_no_gradient_reaches_the_reader_through_the_target(models, tmp_path):
    """A frozen reader stays as it is; a trained one moves as in NTP alone, if it does not make the queries."""
    model = models["emb_seq"]
    alone, _ = train(model, tmp_path / "ntp", **RETRIEVED)
    trained, entry = train(model, tmp_path / "trained", **ATTENTION)
    frozen, (frozen_entry,) = train(model, tmp_path / "frozen", **ATTENTION, freeze_gen=True)
    updates = {}
    for name, trainer in (("alone", alone), ("trained", trained), ("frozen", frozen)):
        changes = update(trainer, model)
        updates[name] = {part: {} for part in ("gen", "emb_seq")}
        for parameter, change in changes.items():
            updates[name][parameter.split(".")[0]][parameter] = change
    assert_same(updates["trained"]["gen"], updates["alone"]["gen"], 1e-6)
    assert not any(change.any() for change in updates["alone"]["emb_seq"].values())
    assert not any(change.any() for change in updates["frozen"]["gen"].values())
    assert_same(updates["frozen"]["emb_seq"], updates["trained"]["emb_seq"], 1e-6)
    assert any(change.any() for change in updates["frozen"]["emb_seq"].values())
    assert frozen_entry["distillation_loss"] == pytest.approx(entry[0]["distillation_loss"], rel=1e-6)
    assert "ntp_loss" not in frozen_entry


def test_a_frozen_reader_that_makes_queries_is_trained_on_up_to_them(models, tmp_path):
    trainer, (entry,) = train(models["gen"], tmp_path, **ATTENTION, freeze_gen=True)
    changes = update(trainer, models["gen"])
    assert not any(change.any() for name, change in changes.items() if name.startswith("gen."))
    assert any(change.any() for name, change in changes.items() if name.startswith("emb_seq."))
    expected, _ = plain_losses(models["gen"], ATTENTION)
    assert entry["loss"] == pytest.approx(expected["distillation_loss"], rel=1e-4)


def gold_and_asked():
    """Instances with a passage and instances without, in turn."""
    gold = [instance for instance in world(NAMES[20:24]) if instance["segments"][0]["passage"]]
    return [*ASKED[:2], gold[0], ASKED[2], *gold[1:], *ASKED[3:]]


MIXED = {
    "plain": {},
    "cached": {"nsp_batch_size": 9, "per_device_train_batch_size": 2},
    "packed": {"padding_free": True},
    "cached, accumulated": {"nsp_batch_size": 3, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 3},
    "accumulated": {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 3},
}


def test_gold_and_distilled_instances_train_together_however_a_batch_is_cut(models, tmp_path):
    """Candidates are negatives of queries with a passage, so NSP depends on the batch, but the cut changes nothing."""
    instances = gold_and_asked()
    updates, entries = {}, {}
    for name, options in MIXED.items():
        options = {"per_device_train_batch_size": 9, **ATTENTION, **options}
        trainer, (entries[name],) = train(models["gen"], tmp_path / name, instances, **options)
        updates[name] = update(trainer, models["gen"])
    for name, reference in (("cached", "plain"), ("packed", "plain"), ("cached, accumulated", "accumulated")):
        assert_same(updates[name], updates[reference])
        for figure in ("loss", "ntp_loss", "nsp_loss", "distillation_loss", "num_negatives", "target_entropy"):
            assert entries[name][figure] == pytest.approx(entries[reference][figure], rel=1e-5), (name, figure)
    plain, accumulated = entries["plain"], entries["accumulated"]
    for figure in ("ntp_loss", "distillation_loss"):  # means over all batches of the step
        assert accumulated[figure] == pytest.approx(plain[figure], rel=1e-5)
    assert plain["num_negatives"] > 5 > 2  # of 3 passages, each has 2 others
    total = plain["ntp_loss"] + plain["nsp_loss"] + plain["distillation_loss"]
    assert plain["loss"] == pytest.approx(total, rel=1e-4)


def scores_of_answers(model, rows, names, args, pad_token_id, attention=None):
    """A reader that knows: all attention is with passages that hold the answer's tokens."""
    scores = torch.zeros(len(rows), K)
    for row, row_scores in zip(rows, scores, strict=True):
        answer = row.input_ids[slice(*row.answer_span)]
        for i, (start, end) in enumerate(row.passage_spans):
            places = range(start, end - len(answer) + 1)
            row_scores[i] = float(any(row.input_ids[j : j + len(answer)] == answer for j in places))
    return scores / scores.sum(1, keepdim=True).clamp(min=1)
