"""GradCache chunks == one big step: loss and every gradient, for any cut, with dropout, with every supervision."""

import copy
from dataclasses import dataclass

import pytest
import torch

from modeling_cosup import CoSupForCausalLM
from support.models import PASSAGES, make_emb_seq, make_gen, make_model, make_tokenizer, plain_batch
from trainer import CoSupTrainer, CoSupTrainingArguments

EMB_SEQ = {"hidden_size": 48, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
ONE_MICRO_BATCH = {"call_overhead": None}  # of the collator
TIED = {"tie_emb_seq": True, "emb_head_size": 24}


def make_instances():
    instances = []
    for i, numbers in enumerate([[0], [1, 2], [], [3], [0, 4], [5], [], [2]]):
        segments = [{"text": f"answer {i}", "passage": PASSAGES[number]} for number in numbers]
        if not segments:
            segments = [{"text": "free text", "passage": None}]
        instances.append({"id": f"i{i}", "input": f"question {i} " * (1 + i % 3), "segments": segments})
    hard_negative = {"id": "hard", "title": "Night Watch", "text": "The Night Watch is large."}
    instances[4]["segments"][0]["negatives"] = [PASSAGES[1], hard_negative]
    return instances


INSTANCES = make_instances()


@dataclass
class Step:
    """The results of a training step; `drawn` is the next random number."""

    loss: float
    gradients: dict
    drawn: torch.Tensor
    num_micro_batches: int

    def trained_parts(self):
        """Return the parts of the model with a gradient that is not zero."""
        return {name.split(".")[0] for name, gradient in self.gradients.items() if gradient.any()}


def make_trainer(folder, model, instances=INSTANCES, **options):
    options = {"report_to": "none", "use_cpu": True, "per_device_train_batch_size": len(instances), **options}
    trainer = CoSupTrainer(model, CoSupTrainingArguments(str(folder), **options), train_dataset=instances)
    trainer.create_optimizer_and_scheduler(1)
    return trainer


def prepared_batch(trainer):
    """Return one batch of all instances, as `CoSupTrainer.training_step` gets it, and its number of trained tokens."""
    batch = trainer.data_collator(list(trainer.train_dataset))
    (batch,), count = trainer.get_batch_samples(iter([batch]), 1, trainer.args.device)
    return batch, count


def step(folder, model, collator=None, **options):
    """Take a training step on one batch of all instances; `collator` sets attributes of the collator."""
    model = copy.deepcopy(model)
    trainer = make_trainer(folder, model, **options)
    for name, value in (collator or {}).items():
        setattr(trainer.data_collator, name, value)
    if options.get("gradient_checkpointing"):
        model.gradient_checkpointing_enable()
    batch, count = prepared_batch(trainer)
    torch.manual_seed(7)
    loss = trainer.training_step(model, batch, count)
    drawn = torch.rand(1)
    gradients = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}
    return Step(float(loss), gradients, drawn, len(batch["micro_batches"]))


def assert_same(actual, expected, tolerance=1e-5):
    assert actual.loss == pytest.approx(expected.loss, rel=tolerance)
    assert actual.gradients.keys() == expected.gradients.keys()
    total = torch.stack([gradient.norm() for gradient in expected.gradients.values()]).norm()
    for name, gradient in expected.gradients.items():
        error = (actual.gradients[name] - gradient).norm()
        # some gradients, such as that of a key's bias, are 0 except for rounding
        assert error <= tolerance * gradient.norm() + 1e-7 * total, (name, float(error / gradient.norm()))


def models():
    no_dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return {
        "shared width": make_model(),
        "emb_head": make_model(emb_seq="gpt2", emb_seq_kwargs=EMB_SEQ),
        "dot": make_model(similarity="dot", gen_kwargs={"tie_word_embeddings": False}),
        "mean pooling": make_model(emb_seq="bert", emb_seq_pooling="mean", emb_seq_kwargs=no_dropout),
        "tied": make_model(**TIED),
    }


CHUNKS = [{"per_device_train_batch_size": n} for n in (1, 3, 8)]
CHUNKS += [{"max_tokens_per_micro_batch": n} for n in (1, 90, 400)]


@pytest.mark.parametrize("chunk", CHUNKS, ids=str)
@pytest.mark.parametrize(
    ("name", "model"), list(models().items()), ids=lambda value: value if isinstance(value, str) else ""
)
def test_chunks_equal_one_step(tmp_path, name, model, chunk):
    whole = step(tmp_path, model, ONE_MICRO_BATCH)
    assert whole.num_micro_batches == 1
    cached = step(tmp_path, model, nsp_batch_size=len(INSTANCES), **chunk)
    if "per_device_train_batch_size" in chunk:
        assert cached.num_micro_batches == {1: 8, 3: 3, 8: 1}[chunk["per_device_train_batch_size"]]
    assert_same(cached, whole)
    if name in ("shared width", "dot"):
        first_of_emb_seq = "emb_seq.embed_tokens.weight"
    elif name == "tied":
        first_of_emb_seq = "emb_head.weight"
    else:
        first_of_emb_seq = next(name for name in whole.gradients if "emb_seq" in name)
    assert whole.gradients[first_of_emb_seq].any()


def test_a_tied_gradient_is_the_sum_of_those_of_two_towers(tmp_path):
    """Gen and Emb_seq have the same weights here; a tied model holds them once."""
    gen = make_gen()
    tied, towers = (
        CoSupForCausalLM.from_gen_and_emb_seq(copy.deepcopy(gen), tokenizer=make_tokenizer(), tie_emb_seq=tie_emb_seq)
        for tie_emb_seq in (True, False)
    )
    expected = step(tmp_path, towers, ONE_MICRO_BATCH)
    for name in list(expected.gradients):
        if name.startswith("emb_seq."):
            gradient = expected.gradients.pop(name)
            assert gradient.any()
            expected.gradients[name.replace("emb_seq.", "gen.model.")] += gradient
    assert_same(step(tmp_path, tied, ONE_MICRO_BATCH), expected)


def test_a_tied_gen_reads_each_passage_once(tmp_path):
    model = make_model(tie_emb_seq=True)
    trainer = make_trainer(tmp_path, model, padding_free=True)
    counts = count_gen_tokens(model)
    batch, count = prepared_batch(trainer)
    trainer.training_step(model, batch, count)
    rows = list(trainer.train_dataset)
    passages = [tuple(ids) for row in rows for ids in row["passage_input_ids"] + row["negative_input_ids"]]
    assert len(set(passages)) < len(passages)
    assert counts == [sum(map(len, set(passages))), sum(len(row["input_ids"]) for row in rows)]


def test_the_step_equals_the_models_own_loss(tmp_path):
    """The reference is one padded batch through the model's forward, without duplicates and hard negatives."""
    model = make_model(similarity="dot")
    instances = []
    for instance in INSTANCES[:4]:
        segments = [{"text": segment["text"], "passage": segment["passage"]} for segment in instance["segments"]]
        instances.append(dict(instance, segments=segments))
    reference = copy.deepcopy(model).train()
    trainer = make_trainer(tmp_path, model, instances, per_device_train_batch_size=1, nsp_batch_size=4)
    expected = reference(**plain_batch(list(trainer.train_dataset))).loss
    expected.backward()
    batch, count = prepared_batch(trainer)
    loss = trainer.training_step(model, batch, count)
    assert float(loss) == pytest.approx(float(expected.detach()), rel=1e-5)
    for parameter, other in zip(model.parameters(), reference.parameters(), strict=True):
        assert (parameter.grad - other.grad).norm() <= 1e-5 * other.grad.norm().clamp(min=1e-6)


@pytest.mark.parametrize(
    ("gradient_checkpointing", "tie_emb_seq"), [(False, False), (True, False), (False, True), (True, True)]
)
def test_dropout_is_replayed(tmp_path, gradient_checkpointing, tie_emb_seq):
    """
    A step without GradCache, on the same micro-batches, draws the same random numbers.

    So the two steps must agree, although every gradient depends on these numbers.
    """
    dropout = {"hidden_size": 48, "resid_pdrop": 0.3, "embd_pdrop": 0.3, "attn_pdrop": 0.3}
    if tie_emb_seq:
        model = make_model(gen="gpt2", gen_kwargs=dropout, tie_emb_seq=True)
    else:
        model = make_model(gen_kwargs={"attention_dropout": 0.3}, emb_seq="gpt2", emb_seq_kwargs=dropout)
    options = {
        "gradient_checkpointing": gradient_checkpointing,
        "gradient_checkpointing_kwargs": {"use_reentrant": False},
    }
    direct = step(tmp_path, model, {"max_instances": 2}, **options)
    cached = step(tmp_path, model, nsp_batch_size=len(INSTANCES), per_device_train_batch_size=2, **options)
    assert direct.num_micro_batches == cached.num_micro_batches == 4
    assert_same(cached, direct)
    assert torch.equal(cached.drawn, direct.drawn)  # what is drawn next is the same too
    other = step(tmp_path, model, {"max_instances": 3}, **options)
    assert other.loss != pytest.approx(direct.loss, rel=1e-5)  # dropout was on


def test_noisy_embeddings_turn_the_short_first_pass_off(tmp_path):
    """NEFTune draws noise by shape, so a shorter first pass would see other noise."""
    options = {"report_to": "none", "nsp_batch_size": 8, "per_device_train_batch_size": 2}
    args = CoSupTrainingArguments(str(tmp_path), neftune_noise_alpha=5.0, **options)
    assert not CoSupTrainer(make_model(), args, train_dataset=INSTANCES).data_collator.shorten_first_pass
    args.neftune_noise_alpha = None
    assert CoSupTrainer(make_model(), args, train_dataset=INSTANCES).data_collator.shorten_first_pass


def count_gen_tokens(model):
    """Return a list to which every forward of Gen adds the number of tokens that it reads."""
    counts = []

    def count(module, args, kwargs):
        counts.append(kwargs["input_ids"].numel())

    model.gen.model.register_forward_pre_hook(count, with_kwargs=True)
    return counts


@pytest.mark.parametrize(("query_from", "supervision"), [("gen", "co"), ("emb_seq", "separate")])
def test_the_first_pass_reads_gen_only_where_it_makes_queries(tmp_path, query_from, supervision):
    """Gen reads all rows once; if it makes the queries, the first pass reads rows up to their last `[NSP]`."""
    model = make_model(query_from=query_from)
    options = {"nsp_batch_size": 8, "per_device_train_batch_size": 1, "supervision": supervision}
    trainer = make_trainer(tmp_path, model, **options)
    counts = count_gen_tokens(model)
    batch, count = prepared_batch(trainer)
    trainer.training_step(model, batch, count)
    nsp = model.config.nsp_token_id
    whole = 0
    prefixes = 0
    for row in trainer.train_dataset:
        whole += len(row["input_ids"])
        if nsp in row["input_ids"]:
            prefixes += len(row["input_ids"]) - row["input_ids"][::-1].index(nsp)
    if supervision == "co":
        assert sum(counts) in (whole + prefixes, whole + prefixes + 1)  # 1: a micro-batch without queries
    else:
        assert sum(counts) == whole


@pytest.mark.parametrize(
    ("supervision", "settings", "trained_parts"),
    [
        ("ntp", {}, {"gen"}),
        ("nsp", {}, {"gen", "emb_seq"}),
        ("separate", {"query_from": "emb_seq"}, {"gen", "emb_seq"}),
        ("ntp", TIED, {"gen"}),
        ("nsp", TIED, {"gen", "emb_head"}),
    ],
)
def test_other_supervisions(tmp_path, supervision, settings, trained_parts):
    model = make_model(gen_kwargs={"tie_word_embeddings": False}, **settings)
    whole = step(tmp_path, model, ONE_MICRO_BATCH, supervision=supervision)
    cached = step(tmp_path, model, supervision=supervision, nsp_batch_size=8, per_device_train_batch_size=2)
    cut = step(tmp_path, model, {"call_overhead": 1}, supervision=supervision, padding_free=False)
    assert_same(cached, whole)
    assert_same(cut, whole)
    assert cut.num_micro_batches > 1
    assert whole.trained_parts() == trained_parts
    assert ("gen.lm_head.weight" in whole.gradients) == (supervision != "nsp")
    if "tie_emb_seq" in settings:
        assert all(gradient.any() for gradient in whole.gradients.values())  # nothing of Gen is frozen with Emb_seq


@pytest.mark.parametrize("query_from", ["emb_seq", "query_encoder"])
def test_a_retriever_alone(tmp_path, query_from):
    """
    With NSP alone and queries of an encoder, the encoders get the gradients of separate supervision.

    Gen is neither trained nor run.
    """
    torch.manual_seed(3)
    query_encoder = make_emb_seq(seed=4) if query_from == "query_encoder" else None
    model = make_model(query_from=query_from, query_encoder=query_encoder)
    whole = step(tmp_path, model, ONE_MICRO_BATCH, supervision="nsp")
    cached = step(tmp_path, model, supervision="nsp", nsp_batch_size=8, per_device_train_batch_size=3)
    assert_same(cached, whole)
    assert {name.split(".")[0] for name in whole.gradients} == {"emb_seq", query_from}
    separate = step(tmp_path, model, ONE_MICRO_BATCH, supervision="separate")
    for name, gradient in whole.gradients.items():
        torch.testing.assert_close(gradient, separate.gradients[name], rtol=1e-4, atol=1e-6)
    counts = count_gen_tokens(model)
    step(tmp_path, model, ONE_MICRO_BATCH, supervision="nsp", padding_free=False)
    assert counts == [1]


def test_two_encoders(tmp_path):
    torch.manual_seed(3)
    model = make_model(query_from="query_encoder", query_encoder=make_emb_seq(seed=4))
    whole = step(tmp_path, model, ONE_MICRO_BATCH, supervision="separate")
    cached = step(tmp_path, model, supervision="separate", nsp_batch_size=8, per_device_train_batch_size=3)
    assert_same(cached, whole)
    assert whole.trained_parts() == {"gen", "emb_seq", "query_encoder"}


@pytest.mark.parametrize("frozen", ["gen", "emb_seq"])
def test_frozen_parts(tmp_path, frozen):
    model = make_model(emb_seq="gpt2", emb_seq_kwargs=EMB_SEQ)
    options = {f"freeze_{frozen}": True}
    whole = step(tmp_path, model, ONE_MICRO_BATCH, **options)
    cached = step(tmp_path, model, nsp_batch_size=8, per_device_train_batch_size=3, **options)
    assert_same(cached, whole)
    assert whole.gradients
    assert not any(name.startswith(frozen) for name in whole.gradients)
    full = step(tmp_path, model, ONE_MICRO_BATCH)
    assert whole.loss == pytest.approx(full.loss, rel=1e-6)
    for name, gradient in whole.gradients.items():
        torch.testing.assert_close(gradient, full.gradients[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("attention", "cached", "settings"),
    [
        ("sdpa", False, {}),
        ("sdpa", True, {}),
        ("eager", False, {}),
        ("eager", True, {}),
        ("sdpa", False, TIED),
        ("sdpa", True, TIED),
    ],
)
def test_packed_rows_equal_padded_rows(tmp_path, attention, cached, settings):
    implementation = {"attn_implementation": attention}
    model = make_model(gen="mistral", gen_kwargs=implementation, emb_seq_kwargs=implementation, **settings)
    whole = step(tmp_path, model, ONE_MICRO_BATCH)
    options = {"nsp_batch_size": 8, "max_tokens_per_micro_batch": 150} if cached else {}
    packed = step(tmp_path, model, padding_free=True, **options)
    assert_same(packed, whole)
    assert (packed.num_micro_batches > 1) == cached


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("supervision", ["separate", "nsp"])
def test_queries_that_share_a_row_equal_queries_with_rows_of_their_own(tmp_path, supervision, cached):
    """Packed, an encoder reads the text up to the last `[NSP]` of an instance once, and makes all queries of it."""
    implementation = {"attn_implementation": "sdpa"}
    model = make_model(query_from="emb_seq", gen_kwargs=implementation, emb_seq_kwargs=implementation)
    options = {"supervision": supervision, "learning_rate": 1e-3}
    padded = step(tmp_path, model, ONE_MICRO_BATCH, padding_free=False, **options)
    assert padded.gradients["emb_seq.embed_tokens.weight"].any()
    if cached:
        options |= {"nsp_batch_size": 8, "max_tokens_per_micro_batch": 150}
    shared = step(tmp_path, model, padding_free=True, **options)
    assert_same(shared, padded)
    assert (shared.num_micro_batches > 1) == cached

    trainer = make_trainer(tmp_path, copy.deepcopy(model), padding_free=True, supervision=supervision)
    (micro_batch,) = prepared_batch(trainer)[0]["micro_batches"]
    rows = [row["query_input_ids"] for row in trainer.train_dataset]
    assert micro_batch["query_input_ids"].numel() == sum(len(queries[-1]) for queries in rows if queries)
    assert len(micro_batch["query_ends"]) == sum(map(len, rows)) == 8
