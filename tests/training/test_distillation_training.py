"""Retrieval that is learnt from the reader: losses and gradients, and what is measured."""

import copy
import random

import datasets
import pytest
import torch

from modeling_cosup.card_cosup import model_card
from support.models import make_emb_seq, make_model
from support.training import NAMES, arguments, questions, world
from trainer import CoSupTrainer, candidate_watch, distillation_step
from trainer.card import training_record
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


@pytest.fixture
def warnings(monkeypatch):
    """What training warns of, as to candidates."""
    messages = []
    monkeypatch.setattr(candidate_watch.logger, "warning", messages.append)
    return messages


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
    rows, read, orders, students, hits = [], [], [], [], []
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
        students.append((torch.stack(embeds) @ query / config.temperature).log_softmax(0))
        rows.append(row)
        orders.append(random.Random(f"42 0 {instance['id']}").sample(range(K), K))  # seed, step and instance
        read.append(reader_row(ids[:nsp], [texts[i] for i in orders[-1]], ids[nsp + 2 : -2], config, newline, ids[-1]))
    if options["supervision"] == "attention_distillation" and "distillation_target" not in options:
        targets = plain_attention_targets(model, read, orders)
    else:
        targets = [
            plain_target(model, row, student.detach(), options) for row, student in zip(rows, students, strict=True)
        ]
    losses = []
    for target, student in zip(targets, students, strict=True):
        losses.append((target * (target.log() - student)).sum())
    students = [student.detach() for student in students]
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


def plain_attention_targets(model, rows, orders):
    """The targets of all instances: each read in an order of its own, and relative to what the place gets anyway."""
    shares = torch.stack([attention_shares(model, [row], 0)[0] for row in rows])  # (N, K), by place
    relative = shares / shares.mean(0)
    targets = []
    for row_relative, order in zip(relative / relative.sum(1, keepdim=True), orders, strict=True):
        of_candidate = torch.zeros(K)
        of_candidate[order] = row_relative
        targets.append((of_candidate / 0.02).softmax(0))
    return targets


def plain_target(model, row, student, options):
    """The target of one instance."""
    kind = options.get("distillation_target")
    temperature = options.get("target_temperature")
    if options["supervision"] == "attention_distillation":
        shares = attention_shares(model, [row], 0)[0]
        return (shares / temperature).softmax(0) if temperature else shares
    reduction = "sum" if kind == "emdr" else "mean"
    leave_one_out = kind == "leave_one_out"
    scores = answer_log_likelihoods(model, [row], 0, leave_one_out=leave_one_out, reduction=reduction)[0]
    if kind == "emdr":
        return (scores + student).softmax(0)
    return ((-scores if leave_one_out else scores) / (temperature or 0.1)).softmax(0)


CASES = {
    "attention": ("gen", ATTENTION),
    "shares": ("emb_seq", ATTENTION | {"distillation_target": "attention_shares"}),
    "sharp shares": ("emb_seq", ATTENTION | {"distillation_target": "attention_shares", "target_temperature": 0.05}),
    "perplexity": ("tied", PERPLEXITY | {"target_temperature": 0.5}),
    "leave one out": ("emb_seq", PERPLEXITY | {"distillation_target": "leave_one_out"}),
    "emdr": ("gen", PERPLEXITY | {"distillation_target": "emdr"}),
}


@pytest.mark.parametrize("name", CASES)
def test_losses_gradients_and_figures_equal_a_plain_computation(models, tmp_path, warnings, name):
    query_from, options = CASES[name]
    model = models[query_from]
    expected, gradients = plain_losses(model, options)
    trainer, (entry,) = train(model, tmp_path, **options)
    for figure, value in expected.items():
        assert entry[figure] == pytest.approx(value, rel=1e-4, abs=1e-5), figure
    assert entry["num_left_out"] == 0
    assert "nsp_loss" not in entry  # no instance has a passage
    if name in ("attention", "shares"):
        is_flat = any("target of the distillation is nearly flat" in message for message in warnings)
        assert is_flat == (name == "shares")
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
    clocks = {"tokens_per_second": 0, "training_seconds": 0}
    for entry, trainer in zip(entries, trainers, strict=True):
        assert {**entry, **clocks} == {**entries[0], **clocks}
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

    record = training_record(trainer.args, trainer.model, trainer.train_dataset, trainer.state)  # for the card
    assert record["arguments"]["target of the distillation"] == "attention, temperature 0.02"
    assert record["arguments"]["candidates"] == "3 of the corpus, embedded every 100 steps"
    assert record["log"][0][f"hit_rate@{K}"] == entry[f"hit_rate@{K}"]
    card = model_card(trainer.model, "me/reader", {"training": record})
    assert f"retrieval_config = model.retrieval_config_class(top_k={K})" in card


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


def test_a_retriever_learns_from_a_reader_that_knows(tmp_path, monkeypatch):
    monkeypatch.setattr(distillation_step, "reader_scores", scores_of_answers)
    asked, corpus = questions(NAMES[:40])
    options = {"optim": "adamw_torch", "learning_rate": 3e-3, "max_grad_norm": 1.0, "max_steps": 30}
    options |= {"train_sampling_strategy": "random", "per_device_train_batch_size": 16, "logging_steps": 5}
    options |= {"refresh_index_steps": 5, "freeze_gen": True}
    options |= {"distillation_target": "attention_shares", "target_temperature": 0.02}
    model = make_model(query_from="emb_seq", emb_seq_pooling="mean")
    _, entries = train(model, tmp_path, asked, corpus, **ATTENTION, **options)
    hit_rates = [entry[f"hit_rate@{K}"] for entry in entries]
    assert hit_rates[0] < 0.6 and hit_rates[-1] > 0.8
    assert entries[-1][f"query_recall@{K}"] > 2 * entries[0][f"query_recall@{K}"]


# ---------------------------------------------------------------------- what is measured


def test_figures_of_which_nothing_was_measured_are_left_out(models, tmp_path):
    """Free text in place of answers: it is trained, but no passage is searched for it; and no provenance."""
    instances = []
    for instance in ASKED:
        segments = [{"text": "in ", "passage": None}, {"text": instance["answers"][0], "passage": None}]
        instances.append({"id": instance["id"], "input": instance["input"], "segments": segments})
    trainer, (entry,) = train(models["emb_seq"], tmp_path, instances, **ATTENTION, log_indicators=True)
    assert entry["distillation_loss"] > 0 and 0 < entry["indicator_1"] < 1
    assert not any("@" in name for name in entry)
    row = trainer.train_dataset[0]
    assert row["needs_candidates"] and row["answers"] == []
    answer = row["input_ids"][row["input_ids"].index(trainer.cosup_config.cs_token_id) + 1 : -2]
    assert trainer.processing_class.decode(answer) == f"in {ASKED[0]['answers'][0]}"


def test_a_step_without_distilled_instances_has_no_distillation_loss(models, tmp_path):
    gold = [instance for instance in world(NAMES[20:30]) if instance["segments"][0]["passage"]]
    instances = [*gold[:4], *ASKED[:4]]
    options = {"per_device_train_batch_size": 4, "max_steps": 2}
    _, (first, second) = train(models["emb_seq"], tmp_path, instances, **ATTENTION, **options)
    assert "nsp_loss" in first and not {"distillation_loss", "target_entropy", f"hit_rate@{K}"} & first.keys()
    assert "distillation_loss" in second and "nsp_loss" not in second
    total = first["ntp_loss"] + first["nsp_loss"]
    assert first["loss"] == pytest.approx(total, rel=1e-4)


def test_rows_that_are_too_long_are_left_out_and_counted(models, tmp_path, warnings):
    trainer = make_trainer(models["gen"], tmp_path / "all", **ATTENTION)
    trainer._refresh_candidates()
    lengths = [len(feature["input_ids"]) for feature in trainer._resolve(list(trainer.train_dataset)).features]
    max_length = sorted(lengths)[2]
    _, (entry,) = train(models["gen"], tmp_path / "some", **ATTENTION, max_length=max_length)
    num_left_out = sum(length > max_length for length in lengths)
    assert entry["num_left_out"] == num_left_out > 0
    assert any(f"Left {num_left_out} instance(s) out" in text and f"={max_length} tokens" in text for text in warnings)
    shortest = max(len(feature["input_ids"]) for feature in trainer.train_dataset)
    trainer, entries = train(models["gen"], tmp_path / "none", **ATTENTION, max_length=shortest)
    assert entries[0]["num_left_out"] == len(ASKED)
    assert not {"loss", "ntp_loss", "distillation_loss"} & entries[0].keys()
    assert entries[0][f"hit_rate@{K}"] >= 0  # it was retrieved, before it was left out


def test_an_evaluation_measures_what_a_step_does(models, tmp_path):
    """With a fresh index, and without changing recall among the passages of instances that have one."""
    gold = [instance for instance in gold_and_asked() if "segments" in instance]
    model = models["gen"]
    # the target of a training depends on its step, that of an evaluation on the whole set
    sizes = {"per_device_train_batch_size": 9, "per_device_eval_batch_size": 2}
    trainer = make_trainer(model, tmp_path, gold_and_asked(), **ATTENTION, **sizes)
    before = trainer.evaluate(gold_and_asked())
    gold_metrics = trainer.evaluate(gold)
    asked_metrics = trainer.evaluate(ASKED)
    trainer.train()
    entry = trainer.state.log_history[0]
    names = ["distillation_loss", "target_entropy", "student_entropy", "target_max", f"hit_rate@{K}"]
    for name in [*names, "num_left_out", f"query_recall@{K}"]:
        assert asked_metrics[f"eval_{name}"] == pytest.approx(
            entry[name] if name != "ntp_loss" else asked_metrics["eval_ntp_loss"], rel=1e-5
        )
    for name in names:
        assert before[f"eval_{name}"] == pytest.approx(entry[name], rel=1e-5), name
    for name in ("nsp_loss", "query_recall@1", "num_passages", "num_queries"):
        assert before[f"eval_{name}"] == pytest.approx(gold_metrics[f"eval_{name}"], rel=1e-6), name
    parts = ("ntp_loss", "nsp_loss", "distillation_loss")
    assert before["eval_loss"] == pytest.approx(sum(before[f"eval_{name}"] for name in parts), rel=1e-6)
    assert trainer.evaluate(ASKED)["eval_distillation_loss"] != asked_metrics["eval_distillation_loss"]
    with pytest.raises(ValueError, match=f"Instance {ASKED[0]['id']!r} of the test set has no passage"):
        trainer.predict(gold_and_asked())
    assert len(trainer.predict(gold).label_ids) == len(gold)


def test_candidates_stand_in_an_order_of_seed_step_and_instance(models, tmp_path):
    trainer = make_trainer(models["gen"], tmp_path, **ATTENTION, shuffle_candidates=True)
    trainer._refresh_candidates()
    features = list(trainer.train_dataset)

    def orders(shuffle=True, step=0, rows=features):
        trainer.state.global_step = step
        return {row["id"]: row["candidate_ids"] for row in trainer._resolve(rows, shuffle).features}

    ranked = orders(shuffle=False)
    shuffled = orders()
    assert shuffled != ranked and all(set(ids) == set(ranked[id]) for id, ids in shuffled.items())
    assert orders() == shuffled == orders(rows=features[::-1])
    assert orders(step=1) != shuffled
    resolution = trainer._resolve(features, True)
    assert trainer._add_scores([resolution]) == 0
    for place, reading in resolution.readings.items():  # the reader reads the order that is trained, not another
        assert reading.row.input_ids == resolution.features[place]["input_ids"]
        assert reading.order == list(range(K))
    for row in resolution.features:
        passages = [passage for id in row["candidate_ids"] for passage in CORPUS if passage["id"] == id]
        texts = [trainer.processing_class.decode(ids[1:-1]) for ids in row["candidate_input_ids"]]
        read = trainer.processing_class.decode(row["input_ids"])
        assert [text.partition(" :: ")[2] for text in texts] == [passage["text"] for passage in passages]
        assert "\n".join(texts) in read and len(row["candidate_scores"]) == K


def test_a_stream_of_questions_trains_as_a_list_does(models, tmp_path):
    instances = gold_and_asked()[:8]
    _, (expected,) = train(models["emb_seq"], tmp_path / "list", instances, **ATTENTION)
    stream = datasets.IterableDataset.from_generator(lambda: iter(instances))
    _, (entry,) = train(models["emb_seq"], tmp_path / "stream", stream, **ATTENTION)
    for name in ("loss", "ntp_loss", "nsp_loss", "distillation_loss", f"hit_rate@{K}"):
        assert entry[name] == pytest.approx(expected[name], rel=1e-6)
