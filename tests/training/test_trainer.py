"""CoSupTrainer on tiny models: learning, scaling of the loss, logging, resuming, and the Trainer's own habits."""

import copy
import time

import datasets
import pytest
import torch
from transformers import TrainerCallback

from modeling_cosup import CoSupForCausalLM
from support.models import make_emb_seq, make_model, make_tokenizer, plain_batch
from support.training import NAMES, SYLLABLES, arguments, world
from trainer import CoSupTrainer
from trainer.judging.figures import figure


def trained(trainer):
    trainer.train()
    return [entry for entry in trainer.state.log_history if "loss" in entry]


def test_losses_fall_and_retrieval_of_unseen_names_beats_chance(tmp_path):
    small = {"initializer_range": 0.02, "hidden_size": 64}
    tokenizer = make_tokenizer(vocab_size=300, texts=[f"{syllable} lives in" for syllable in SYLLABLES] * 9)
    model = make_model(gen_kwargs=small, emb_seq_kwargs=small, tokenizer=tokenizer)
    schedule = {"max_steps": 100, "learning_rate": 3e-3, "lr_scheduler_type": "cosine", "warmup_steps": 10}
    args = arguments(tmp_path, per_device_train_batch_size=32, **schedule)
    trainer = CoSupTrainer(model, args, train_dataset=world(NAMES[:400]), eval_dataset=world(NAMES[400:450]))
    before = trainer.evaluate()
    logs = trained(trainer)
    after = trainer.evaluate()
    assert logs[-1]["ntp_loss"] < 0.5 * logs[0]["ntp_loss"]
    assert logs[-1]["nsp_loss"] < 0.3 * logs[0]["nsp_loss"]
    assert logs[-1]["nsp_accuracy"] > 0.9
    assert after["eval_num_passages"] == 40
    assert after["eval_query_recall@1"] >= 0.5  # chance: 1/40
    assert after["eval_ntp_loss"] < before["eval_ntp_loss"]


def test_logs_name_the_components(tmp_path):
    model = make_model()
    trainer = CoSupTrainer(model, arguments(tmp_path, max_steps=2), train_dataset=world(NAMES[:16]))
    for entry in trained(trainer):
        assert {"ntp_loss", "nsp_loss", "nsp_accuracy", "num_negatives", "tokens_per_second"} <= set(entry)
        ours = set(entry) - {"grad_norm", "learning_rate", "epoch", "step"}  # without what any Trainer logs
        assert {figure(name).name for name in ours} == ours  # in the vocabulary
        weighted_sum = entry["ntp_loss"] + model.config.nsp_loss_weight * entry["nsp_loss"]
        assert entry["loss"] == pytest.approx(weighted_sum, rel=1e-4)
        assert 0 < entry["num_negatives"] < 8


@pytest.mark.parametrize("similarity", ["cosine", "dot"])
def test_gradient_accumulation_equals_the_reference(tmp_path, similarity):
    """Two micro-batches of 4: NTP over all tokens, NSP over all queries, negatives within a micro-batch."""
    model = make_model(similarity=similarity)
    reference = copy.deepcopy(model).train()
    sgd = {"optim": "sgd", "learning_rate": 0.1, "lr_scheduler_type": "constant", "max_grad_norm": 0.0}
    batch_size = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    args = arguments(tmp_path, max_steps=1, train_sampling_strategy="sequential", **batch_size, **sgd)
    trainer = CoSupTrainer(model, args, train_dataset=world(NAMES[:8]))
    micro_batches = [[trainer.train_dataset[i] for i in rows] for rows in (range(4), range(4, 8))]
    batches = [plain_batch(rows) for rows in micro_batches]
    tokens = sum((batch["labels"][:, 1:] != -100).sum() for batch in batches)
    queries = sum(len(batch["passage_labels"]) for batch in batches)
    total = 0.0
    for batch in batches:
        outputs = reference(**batch)
        share_of_tokens = (batch["labels"][:, 1:] != -100).sum() / tokens
        share_of_queries = len(batch["passage_labels"]) / queries
        weight = reference.config.nsp_loss_weight
        loss = outputs.ntp_loss * share_of_tokens + weight * outputs.nsp_loss * share_of_queries
        loss.backward()
        total += loss.item()
    (entry,) = trained(trainer)
    assert entry["loss"] == pytest.approx(total, rel=1e-5)
    for (name, parameter), expected in zip(model.named_parameters(), reference.parameters(), strict=True):
        if expected.grad is not None:
            expected = expected - 0.1 * expected.grad
        torch.testing.assert_close(parameter, expected, rtol=1e-5, atol=1e-6, msg=name)


def test_a_batch_without_passages_trains(tmp_path):
    instances = [instance for instance in world(NAMES) if instance["segments"][0]["passage"] is None]
    logs = trained(CoSupTrainer(make_model(), arguments(tmp_path, max_steps=2), train_dataset=instances))
    assert not {"nsp_loss", "nsp_accuracy", "num_negatives"} & set(logs[-1])
    assert logs[-1]["loss"] == pytest.approx(logs[-1]["ntp_loss"], rel=1e-4)


def test_resumed_run_equals_uninterrupted_run(tmp_path):
    model = make_model(gen_kwargs={"attention_dropout": 0.1})
    options = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3}
    args = arguments(tmp_path / "a", **options)
    whole = trained(CoSupTrainer(copy.deepcopy(model), args, train_dataset=world(NAMES[:32])))

    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == 3

    args = arguments(tmp_path / "b", **options)
    trained(CoSupTrainer(copy.deepcopy(model), args, train_dataset=world(NAMES[:32]), callbacks=[Stop()]))
    other = make_model(gen_kwargs={"attention_dropout": 0.1, "seed": 5})
    resumed = CoSupTrainer(other, arguments(tmp_path / "b", **options), train_dataset=world(NAMES[:32]))
    resumed.train(resume_from_checkpoint=str(tmp_path / "b" / "checkpoint-3"))
    losses = {entry["step"]: entry["loss"] for entry in resumed.state.log_history if "loss" in entry}
    assert [losses[entry["step"]] for entry in whole] == pytest.approx([entry["loss"] for entry in whole], rel=1e-6)


def test_best_model_by_recall_is_loaded_and_fingerprinted_anew(tmp_path):
    options = {"max_steps": 4, "eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2}
    args = arguments(tmp_path, load_best_model_at_end=True, metric_for_best_model="eval_query_recall@1", **options)
    trainer = CoSupTrainer(make_model(), args, train_dataset=world(NAMES[:16]), eval_dataset=world(NAMES[16:32]))
    trainer.train()
    best = CoSupForCausalLM.from_pretrained(trainer.state.best_model_checkpoint)
    assert trainer.model.fingerprint() == best.fingerprint()


@pytest.mark.parametrize("tie_emb_seq", [False, True])
def test_operations_count_the_parameters_that_read_a_token(tmp_path, tie_emb_seq):
    model = make_model(emb_seq_kwargs={"intermediate_size": 128}, tie_emb_seq=tie_emb_seq)
    trainer = CoSupTrainer(model, arguments(tmp_path), train_dataset=world(NAMES[:8]))
    rows = list(trainer.train_dataset)
    gen_tokens = sum(len(row["input_ids"]) for row in rows)
    passage_tokens = sum(len(ids) for row in rows for ids in row["passage_input_ids"])
    sizes = []
    for part in (model.gen.model, model.emb_seq):
        sizes.append(part.num_parameters() - part.embed_tokens.weight.numel())
    assert (sizes[0] == sizes[1]) == tie_emb_seq
    operations = 6 * (gen_tokens * sizes[0] + passage_tokens * sizes[1])
    assert trainer.floating_point_ops(trainer.data_collator(rows)) == operations


@pytest.mark.parametrize("supervision", ["co", "ntp"])
def test_training_a_tied_gen_changes_the_fingerprint(tmp_path, supervision):
    """Also without passages, in a checkpoint of the middle, and where only the stored hash could be used."""
    model = make_model(tie_emb_seq=True)
    start = model.fingerprint()["emb_seq"]
    with torch.no_grad():
        model(torch.tensor([[5, 6]]))
    assert model.config.fingerprint["emb_seq"] == start
    options = {"supervision": supervision, "max_steps": 2, "save_strategy": "steps", "save_steps": 1}
    args = arguments(tmp_path, lr_scheduler_type="constant", **options)
    trainer = CoSupTrainer(model, args, train_dataset=world(NAMES[:8]))
    hashes = set()
    forgotten = []
    model.gen.model.register_forward_hook(lambda *args: forgotten.append(model.config.fingerprint["emb_seq"] is None))
    trainer.train()
    assert forgotten and all(forgotten)
    for step in (1, 2):
        saved = CoSupForCausalLM.from_pretrained(tmp_path / f"checkpoint-{step}")
        hashes.add(saved.config.fingerprint["emb_seq"])
        assert saved.config.fingerprint["emb_seq"] == saved.fingerprint()["emb_seq"]
    assert len(hashes | {start}) == 3


class Stream(torch.utils.data.IterableDataset):
    def __iter__(self):
        yield from world(NAMES[:24])


@pytest.mark.parametrize("kind", ["datasets", "torch"])
def test_streamed_datasets_train_and_drop_long_instances(tmp_path, kind):
    instances = world(NAMES[:24])
    instances[3]["input"] = "long " * 300
    stream = datasets.Dataset.from_list(instances).to_iterable_dataset() if kind == "datasets" else Stream()
    trainer = CoSupTrainer(make_model(), arguments(tmp_path, max_steps=2), train_dataset=stream)
    assert len(list(trainer.train_dataset)) == (23 if kind == "datasets" else 24)
    assert len(trained(trainer)) == 2


def test_long_instances_are_counted_in_a_warning(tmp_path, monkeypatch):
    from trainer import dataset_setup

    warnings = []
    monkeypatch.setattr(dataset_setup.logger, "warning", warnings.append)
    instances = world(NAMES[:8])
    instances[3]["input"] = instances[5]["input"] = "long " * 300
    CoSupTrainer(make_model(), arguments(tmp_path), train_dataset=instances)
    assert warnings == ["Dropped 2 of 8 instances of the training set: longer than max_length=256."]
    with pytest.raises(ValueError, match="All 1 instances of the training set are longer than max_length=256 tokens"):
        CoSupTrainer(make_model(), arguments(tmp_path), train_dataset=[instances[3]])


@pytest.mark.parametrize("gen", ["gpt2", "llama"])
def test_instances_longer_than_gen_reads_are_refused(tmp_path, gen):
    model = make_model(gen=gen, gen_kwargs={"max_position_embeddings": 128})
    instances = world(NAMES[:8])
    instances[3]["input"] = "long " * 40
    message = (
        r"^1 of 8 instances of the {} are longer than the 128 tokens that Gen reads; the longest has \d+\."
        r" Set max_length=128, which drops longer instances; it is 256\.$"
    )
    for name, option in (("training set", "train_dataset"), ("evaluation set", "eval_dataset")):
        with pytest.raises(ValueError, match=message.format(name)):
            CoSupTrainer(model, arguments(tmp_path), **{option: instances})
    trainer = CoSupTrainer(model, arguments(tmp_path), train_dataset=instances[:3])  # max_length alone is no reason
    with pytest.raises(ValueError, match=message.format("evaluation set")):
        trainer.evaluate(instances)
    trained(CoSupTrainer(model, arguments(tmp_path, max_length=128, max_steps=1), train_dataset=instances))


def test_a_stream_of_instances_longer_than_gen_reads_is_refused(tmp_path):
    model = make_model(gen_kwargs={"max_position_embeddings": 128})
    instances = world(NAMES[:8])
    instances[3]["input"] = "long " * 40
    with pytest.raises(
        ValueError, match="Gen reads at most 128 tokens, and the training set is a stream. Set max_leng"
    ):
        CoSupTrainer(model, arguments(tmp_path, max_steps=1), train_dataset=Stream())
    rows = list(CoSupTrainer(make_model(), arguments(tmp_path), train_dataset=instances).train_dataset)
    args = arguments(tmp_path, max_length=128, max_steps=1)
    with pytest.raises(ValueError, match="longer than the 128 tokens that Gen reads.* They were tokenized before"):
        CoSupTrainer(model, args, train_dataset=rows)
    stream = datasets.Dataset.from_list(rows).to_iterable_dataset()
    with pytest.raises(
        ValueError, match=f"Instance '{NAMES[3]}' of the training set has .* Gen reads at most 128: leave"
    ):
        CoSupTrainer(model, args, train_dataset=stream).train()


def test_bad_rows_name_the_dataset_and_row(tmp_path):
    instances = world(NAMES[:4])
    instances[2]["segments"] = []
    with pytest.raises(ValueError, match="evaluation set, row 2: segments"):
        CoSupTrainer(make_model(), arguments(tmp_path), train_dataset=world(NAMES[:4]), eval_dataset=instances)


def test_compute_metrics_gets_embeddings_and_positives(tmp_path):
    seen = {}

    def compute_metrics(prediction):
        queries, passages = prediction.predictions
        seen["shapes"] = queries.shape, passages.shape
        nearest = (queries @ passages.T).argmax(1)
        return {"own_recall": float((nearest == prediction.label_ids).mean())}

    args = arguments(tmp_path, per_device_eval_batch_size=4)
    trainer = CoSupTrainer(
        make_model(),
        args,
        eval_dataset={"one": world(NAMES[:10])},
        train_dataset=world(NAMES[:10]),
        compute_metrics=compute_metrics,
    )
    metrics = trainer.evaluate()
    assert metrics["eval_one_own_recall"] == pytest.approx(metrics["eval_one_query_recall@1"])
    assert seen["shapes"] == ((8, 32), (8, 32))


def test_separate_tokenizers_are_saved_and_loaded(tmp_path):
    emb_seq_tokenizer = make_tokenizer(vocab_size=300)
    model = make_model(gen_kwargs={"hidden_size": 48}, emb_seq_tokenizer=emb_seq_tokenizer)
    trainer = CoSupTrainer(
        model,
        arguments(tmp_path, max_steps=1),
        train_dataset=world(NAMES[:8]),
        emb_seq_processing_class=emb_seq_tokenizer,
    )
    trainer.train()
    trainer.save_model(str(tmp_path / "out"))
    loaded = CoSupForCausalLM.from_pretrained(tmp_path / "out")
    assert loaded.emb_seq_tokenizer.get_vocab() == emb_seq_tokenizer.get_vocab() != loaded.tokenizer.get_vocab()


def test_lora_trains_adapters_and_control_token_rows_only(tmp_path):
    peft = pytest.importorskip("peft")
    model = make_model()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    trainer = CoSupTrainer(
        model, arguments(tmp_path, max_steps=2), train_dataset=world(NAMES[:16]), peft_config=config
    )
    trained(trainer)
    adapters = {name: p for name, p in trainer.model.named_parameters() if p.requires_grad}
    assert any("gen" in name and "lora_B" in name and p.abs().sum() > 0 for name, p in adapters.items())
    assert any("emb_seq" in name and "lora_B" in name and p.abs().sum() > 0 for name, p in adapters.items())
    merged = trainer.model.merge_and_unload()
    rows = merged.get_input_embeddings().weight
    changed = (rows != before["gen.model.embed_tokens.weight"]).any(1).nonzero()[:, 0].tolist()
    assert set(changed) <= {model.config.nsp_token_id, model.config.cs_token_id, model.config.ce_token_id}
    assert model.config.nsp_token_id in changed
    merged.save_pretrained(tmp_path / "merged")
    CoSupForCausalLM.from_pretrained(tmp_path / "merged")


def test_the_papers_optimiser(tmp_path):
    """Learning rate x 0.85 after every epoch, clipping on Gen alone."""
    model = make_model(similarity="dot", nsp_loss_weight=10.0)
    optimiser = {"optim": "sgd", "learning_rate": 0.01, "max_grad_norm": 1e-3}
    args = arguments(tmp_path, num_train_epochs=3, lr_decay_per_epoch=0.85, clip_gen_only=True, **optimiser)
    norms = {}

    class Norms(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
            for part in ("gen", "emb_seq"):
                gradients = [parameter.grad for parameter in getattr(model, part).parameters()]
                part_norms = [gradient.norm() for gradient in gradients if gradient is not None]
                norms[part] = torch.stack(part_norms).norm().item()

    logs = trained(CoSupTrainer(model, args, train_dataset=world(NAMES[:16]), callbacks=[Norms()]))
    rates = [entry["learning_rate"] for entry in logs]
    assert rates == pytest.approx([0.01, 0.01, 0.0085, 0.0085, 0.007225, 0.007225], rel=0.2)
    assert {round(rate, 8) for rate in rates} >= {0.01, 0.0085, 0.007225}
    assert norms["gen"] == pytest.approx(1e-3, rel=1e-2)
    assert norms["emb_seq"] > 1e-2


@pytest.mark.parametrize("query_from", ["emb_seq", "query_encoder"])
def test_separate_supervision_is_two_trainings(tmp_path, query_from):
    """Gen becomes what NTP alone makes of it, and the encoders what NSP alone makes of them."""
    query_encoder = make_emb_seq(seed=4) if query_from == "query_encoder" else None
    start = make_model(query_from=query_from, query_encoder=query_encoder)
    models = {}
    norms = {}
    for supervision in ("separate", "ntp", "nsp"):
        models[supervision] = copy.deepcopy(start)
        options = {"optim": "sgd", "learning_rate": 0.5, "max_grad_norm": 0.1, "max_steps": 3}
        args = arguments(tmp_path, supervision=supervision, **options)
        logs = trained(CoSupTrainer(models[supervision], args, train_dataset=world(NAMES[:24])))
        norms[supervision] = torch.tensor([entry["grad_norm"] for entry in logs])
    assert norms["ntp"].min() > 0.1 and norms["nsp"].min() > 0.1  # all steps are clipped
    torch.testing.assert_close(norms["separate"], torch.hypot(norms["ntp"], norms["nsp"]), rtol=1e-3, atol=0)
    for name, parameter in models["separate"].named_parameters():
        alone = models["ntp" if name.startswith("gen.") else "nsp"].get_parameter(name)
        torch.testing.assert_close(parameter, alone, rtol=1e-4, atol=1e-6)


def test_model_without_emb_seq_cannot_be_trained(tmp_path):
    make_model().save_pretrained(tmp_path / "m")
    with pytest.raises(ValueError, match="load_emb_seq=False"):
        CoSupTrainer(CoSupForCausalLM.from_pretrained(tmp_path / "m", load_emb_seq=False), arguments(tmp_path))


def test_lora_on_an_untied_gen_trains_the_rows_of_its_head(tmp_path):
    peft = pytest.importorskip("peft")
    model = make_model(gen_kwargs={"tie_word_embeddings": False}, emb_seq_kwargs={"hidden_size": 48})
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM")
    trainer = CoSupTrainer(
        model, arguments(tmp_path, max_steps=2), train_dataset=world(NAMES[:16]), peft_config=config
    )
    assert config.trainable_token_indices is None  # the caller's config is the caller's
    trained(trainer)
    assert any("emb_head" in name and parameter.requires_grad for name, parameter in trainer.model.named_parameters())
    head = trainer.model.merge_and_unload().get_output_embeddings().weight
    # both began as the mean of all rows
    assert not torch.equal(head[model.config.nsp_token_id], head[model.config.ce_token_id])


def test_an_index_is_refused_after_training_in_eval_mode_and_after_a_merge(tmp_path, passages):
    peft = pytest.importorskip("peft")
    model = make_model()
    index = model.build_index(passages, show_progress_bar=False)
    index.check_model(model)
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    merged = peft.get_peft_model(copy.deepcopy(model), config).merge_and_unload()
    with pytest.raises(ValueError, match="emb_seq"):
        index.check_model(merged)
    model.eval()
    optimizer = torch.optim.SGD(model.emb_seq.parameters(), lr=1.0)
    model.encode_passages(torch.tensor([[5, 6, 7]])).sum().backward()
    optimizer.step()
    with pytest.raises(ValueError, match="emb_seq"):
        index.check_model(model)


def test_evaluate_takes_raw_instances_and_a_tie_is_a_miss(tmp_path):
    trainer = CoSupTrainer(make_model(), arguments(tmp_path), train_dataset=world(NAMES[:8]))
    assert trainer.evaluate(world(NAMES[8:18]))["eval_num_passages"] == 8
    assert trainer.evaluate(list(trainer.train_dataset))["eval_num_passages"] == 6  # a list of tokenized instances
    collapsed = make_model()
    with torch.no_grad():
        collapsed.emb_seq.norm.weight.zero_()
    trainer = CoSupTrainer(collapsed, arguments(tmp_path), train_dataset=world(NAMES[:8]))
    assert trainer.evaluate(world(NAMES[8:18]))["eval_query_recall@5"] == 0


def test_a_tokenizer_without_the_control_tokens_is_refused(tmp_path):
    options = {"train_dataset": world(NAMES[:8]), "processing_class": make_tokenizer()}
    with pytest.raises(ValueError, match="processing_class has"):
        CoSupTrainer(make_model(), arguments(tmp_path), **options)


def test_generating_in_training_mode_with_checkpointing_is_refused(model, passages):
    index = model.build_index(passages, show_progress_bar=False)
    model.gradient_checkpointing_enable()
    with pytest.raises(ValueError, match="call model.eval"):
        model.train().generate(torch.tensor([[5, 6]]), retriever=index, max_new_tokens=2)


@pytest.mark.slow
@pytest.mark.parametrize(("tie_emb_seq", "num_layers"), [(False, 4), (True, 2)])
def test_compiled_layers_train_alike(tmp_path, tie_emb_seq, num_layers):
    model = make_model(tie_emb_seq=tie_emb_seq)
    args = arguments(tmp_path, max_steps=3)
    eager = trained(CoSupTrainer(copy.deepcopy(model), args, train_dataset=world(NAMES[:24])))
    args = arguments(tmp_path, max_steps=3, torch_compile=True)
    trainer = CoSupTrainer(copy.deepcopy(model), args, train_dataset=world(NAMES[:24]))
    compiled = trained(trainer)
    assert [entry["loss"] for entry in compiled] == pytest.approx([entry["loss"] for entry in eager], rel=1e-4)
    assert sum(module._compiled_call_impl is not None for module in trainer.model.modules()) == num_layers
    assert type(trainer.model_wrapped).__name__ == "CoSupForCausalLM"
    trainer.save_model(str(tmp_path / "saved"))
    CoSupForCausalLM.from_pretrained(tmp_path / "saved")


def test_lora_resumes_and_merges_over_frozen_parts(tmp_path):
    """
    Adapters of every linear layer of both models.

    A resumed run equals an uninterrupted one, and the merged model answers as the adapted one.
    """
    peft = pytest.importorskip("peft")

    def run(folder, steps, resume=None, **options):
        model = make_model(emb_seq_kwargs={"hidden_size": 48})
        config = peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", lora_dropout=0.1)
        args = arguments(tmp_path / folder, max_steps=steps, save_strategy="steps", save_steps=2, **options)
        trainer = CoSupTrainer(model, args, train_dataset=world(NAMES[:16]), peft_config=config)
        trainer.train(resume_from_checkpoint=resume)
        return trainer, {entry["step"]: entry["loss"] for entry in trainer.state.log_history if "loss" in entry}

    _, whole = run("whole", 4)
    trainer, resumed = run("whole", 4, resume=str(tmp_path / "whole" / "checkpoint-2"))
    assert resumed == pytest.approx(whole, rel=1e-6)
    assert not any("lora" in name and "emb_head" in name for name, _ in trainer.model.named_parameters())
    model = trainer.model.eval()
    batch = plain_batch([trainer.train_dataset[i] for i in range(4)])
    with torch.no_grad():
        adapted = model(**batch).loss
        merged = model.merge_and_unload()
        torch.testing.assert_close(merged(**batch).loss, adapted, rtol=1e-4, atol=1e-5)
    merged.save_pretrained(tmp_path / "merged")
    loaded = CoSupForCausalLM.from_pretrained(tmp_path / "merged")
    with torch.no_grad():
        torch.testing.assert_close(loaded(**batch).loss, adapted, rtol=1e-4, atol=1e-5)

    frozen, _ = run("frozen", 2, freeze_emb_seq=True)
    trained_names = [name for name, parameter in frozen.model.named_parameters() if parameter.requires_grad]
    assert trained_names and not any("emb_seq" in name or "emb_head" in name for name in trained_names)


@pytest.mark.parametrize("accumulation", [1, 2, 3])
def test_the_end_of_a_stream_leaves_no_gradient_behind(tmp_path, accumulation):
    """24 instances give 3 batches of 8. A step that the stream cannot fill is not taken and leaves no gradient."""
    stream = datasets.Dataset.from_list(world(NAMES[:24])).to_iterable_dataset()
    args = arguments(tmp_path, max_steps=4, gradient_accumulation_steps=accumulation, learning_rate=1e-6)
    seen = []

    class Norms(TrainerCallback):
        def on_step_begin(self, args, state, control, model, **kwargs):
            seen.append(all(parameter.grad is None or not parameter.grad.any() for parameter in model.parameters()))

    logs = trained(CoSupTrainer(make_model(), args, train_dataset=stream, callbacks=[Norms()]))
    assert len(logs) == 4
    assert all(seen)


@pytest.mark.parametrize("emb_seq", ["llama", "gpt2", "bert", "modernbert"])
def test_causal_encoders_are_distinguished_from_others(emb_seq):
    kwargs = {"modernbert": {"intermediate_size": 64, "global_attn_every_n_layers": 1}}.get(emb_seq, {})
    model = make_model(emb_seq=emb_seq, emb_seq_kwargs=kwargs)
    assert model.find_causal_encoders() == (emb_seq in ("llama", "gpt2"))


def test_the_clock_of_a_training_leaves_out_evaluations_and_goes_on_when_a_run_resumes(tmp_path, monkeypatch):
    """An evaluation that seems to take 10^6 seconds is not training time, but a step of 1,000 seconds is."""
    offset = 0.0
    now = time.time
    monkeypatch.setattr(time, "time", lambda: now() + offset)

    class Slow(CoSupTrainer):
        def training_step(self, *args, **kwargs):
            nonlocal offset
            offset += 1000
            return super().training_step(*args, **kwargs)

        def prediction_step(self, *args, **kwargs):
            nonlocal offset
            offset += 1e6
            return super().prediction_step(*args, **kwargs)

    options = {"logging_steps": 1, "eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps"}
    args = arguments(tmp_path, max_steps=4, save_steps=2, **options)
    instances = world(NAMES[:16])
    trainer = Slow(make_model(), args, train_dataset=instances, eval_dataset=instances[:4])
    assert "epoch" in trainer.train().metrics
    logs = {}
    for entry in trainer.state.log_history:
        if "training_seconds" in entry:
            logs.setdefault(entry["step"], []).append(round(entry["training_seconds"], -3))
    assert logs == {1: [1000], 2: [2000] * 2, 3: [3000], 4: [4000] * 3}
    assert trainer.state.log_history[-1]["peak_memory"] > 0.1  # torch alone takes more
    metrics = trainer.evaluate()
    assert "training_seconds" not in metrics
    assert "epoch" in metrics  # which Trainer.log adds
    resumed = Slow(make_model(), args, train_dataset=instances, eval_dataset=instances[:4])
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    seconds = [entry["training_seconds"] for entry in resumed.state.log_history if "training_seconds" in entry]
    assert [round(value, -3) for value in seconds[-4:]] == [3000, 4000, 4000, 4000]
