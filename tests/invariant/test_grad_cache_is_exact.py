"""GradCache chunks == one big step: loss and every gradient, any cut, dropout on, every supervision; and packed rows == padded rows."""

import copy

import pytest
import torch

from support.models import PASSAGES, make_emb_seq, make_model, plain_batch
from trainer import CoSupTrainer, CoSupTrainingArguments

NUMBERS = [[0], [1, 2], [], [3], [0, 4], [5], [], [2]]
INSTANCES = [
    {
        "id": f"i{i}",
        "input": f"question {i} " * (1 + i % 3),
        "segments": [{"text": f"answer {i}", "passage": PASSAGES[number]} for number in numbers]
        or [{"text": "free text", "passage": None}],
    }
    for i, numbers in enumerate(NUMBERS)
]
INSTANCES[4]["segments"][0]["negatives"] = [
    PASSAGES[1],
    {"id": "hard", "title": "Night Watch", "text": "The Night Watch is large."},
]
EMB_SEQ = {"hidden_size": 48, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}


def step(tmp_path, model, collator=None, **kwargs):
    """Loss and gradients of one batch of all instances through CoSupTrainer.training_step."""
    options = {"report_to": "none", "use_cpu": True, "per_device_train_batch_size": len(INSTANCES), **kwargs}
    model = copy.deepcopy(model)
    trainer = CoSupTrainer(model, CoSupTrainingArguments(str(tmp_path), **options), train_dataset=INSTANCES)
    for name, value in (collator or {}).items():
        setattr(trainer.data_collator, name, value)
    trainer.create_optimizer_and_scheduler(1)
    if options.get("gradient_checkpointing"):
        model.gradient_checkpointing_enable()
    batches, count = trainer.get_batch_samples(
        iter([trainer.data_collator(list(trainer.train_dataset))]), 1, model.device
    )
    torch.manual_seed(7)
    loss = trainer.training_step(model, batches[0], count)
    drawn = torch.rand(1)
    gradients = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}
    return float(loss), gradients, drawn, len(batches[0]["micro_batches"])


def assert_same(found, expected, tolerance=1e-5):
    assert found[0] == pytest.approx(expected[0], rel=tolerance)
    assert found[1].keys() == expected[1].keys()
    total = torch.stack([gradient.norm() for gradient in expected[1].values()]).norm()
    for name, gradient in expected[1].items():  # some, a key's bias say, have a gradient of 0 but for rounding
        error = (found[1][name] - gradient).norm()
        assert error <= tolerance * gradient.norm() + 1e-7 * total, (name, float(error / gradient.norm()))


def models():
    yield "shared width", make_model()
    yield "emb_head", make_model(emb_seq="gpt2", emb_seq_kwargs=EMB_SEQ)
    yield "dot", make_model(similarity="dot", gen_kwargs={"tie_word_embeddings": False})
    yield (
        "mean pooling",
        make_model(
            emb_seq="bert",
            emb_seq_pooling="mean",
            emb_seq_kwargs={"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
        ),
    )


CHUNKS = [{"per_device_train_batch_size": n} for n in (1, 3, 8)] + [
    {"max_tokens_per_micro_batch": n} for n in (1, 90, 400)
]


@pytest.mark.parametrize("chunk", CHUNKS, ids=str)
@pytest.mark.parametrize(("name", "model"), list(models()), ids=lambda value: value if isinstance(value, str) else "")
def test_chunks_equal_one_step(tmp_path, name, model, chunk):
    whole = step(tmp_path, model, {"call_overhead": None})
    assert whole[3] == 1
    cached = step(tmp_path, model, nsp_batch_size=len(INSTANCES), **chunk)
    assert cached[3] == {1: 8, 3: 3, 8: 1}.get(chunk.get("per_device_train_batch_size"), cached[3])
    assert_same(cached, whole)
    assert whole[1][
        "emb_seq.embed_tokens.weight"
        if name in ("shared width", "dot")
        else next(n for n in whole[1] if "emb_seq" in n)
    ].any()


def test_the_step_equals_the_models_own_loss(tmp_path):
    """Against one padded batch through the model's forward, written the plain way: without duplicates and hard negatives."""
    model = make_model(similarity="dot")
    instances = [
        dict(x, segments=[{k: v for k, v in s.items() if k != "negatives"} for s in x["segments"]])
        for x in INSTANCES[:4]
    ]
    args = CoSupTrainingArguments(str(tmp_path), report_to="none", per_device_train_batch_size=1, nsp_batch_size=4)
    reference = copy.deepcopy(model).train()
    trainer = CoSupTrainer(model, args, train_dataset=instances)
    trainer.create_optimizer_and_scheduler(1)
    rows = list(trainer.train_dataset)
    expected = reference(**plain_batch(rows)).loss
    expected.backward()
    batches, count = trainer.get_batch_samples(iter([trainer.data_collator(rows)]), 1, model.device)
    loss = trainer.training_step(model, batches[0], count)
    assert float(loss) == pytest.approx(float(expected.detach()), rel=1e-5)
    for parameter, other in zip(model.parameters(), reference.parameters(), strict=True):
        assert (parameter.grad - other.grad).norm() <= 1e-5 * other.grad.norm().clamp(min=1e-6)


@pytest.mark.parametrize("gradient_checkpointing", [False, True])
def test_dropout_is_replayed(tmp_path, gradient_checkpointing):
    """The same micro-batches in one graph draw the same random numbers, so the two must agree although every gradient depends on them."""
    dropout = {"hidden_size": 48, "resid_pdrop": 0.3, "embd_pdrop": 0.3, "attn_pdrop": 0.3}
    model = make_model(gen_kwargs={"attention_dropout": 0.3}, emb_seq="gpt2", emb_seq_kwargs=dropout)
    options = {
        "gradient_checkpointing": gradient_checkpointing,
        "gradient_checkpointing_kwargs": {"use_reentrant": False},
    }
    direct = step(tmp_path, model, {"max_instances": 2}, **options)
    cached = step(tmp_path, model, nsp_batch_size=len(INSTANCES), **options | {"per_device_train_batch_size": 2})
    assert direct[3] == cached[3] == 4
    assert_same(cached, direct)
    assert torch.equal(cached[2], direct[2])  # and what is drawn next is the same
    other = step(tmp_path, model, {"max_instances": 3}, **options)
    assert other[0] != pytest.approx(direct[0], rel=1e-5)  # dropout was on


def test_noisy_embeddings_turn_the_short_first_pass_off(tmp_path):
    """NEFTune draws noise by shape, so a shorter first pass would see other noise."""
    args = CoSupTrainingArguments(
        str(tmp_path), report_to="none", nsp_batch_size=8, per_device_train_batch_size=2, neftune_noise_alpha=5.0
    )
    assert not CoSupTrainer(make_model(), args, train_dataset=INSTANCES).data_collator.shorten_first_pass
    args.neftune_noise_alpha = None
    assert CoSupTrainer(make_model(), args, train_dataset=INSTANCES).data_collator.shorten_first_pass


def test_the_first_pass_reads_gen_only_where_it_makes_queries(tmp_path):
    """Tokens that Gen forwards in a step: all rows once, and in the first pass rows up to their last [NSP], or, with queries of Emb_seq, nothing."""
    for config, supervision in (({}, "co"), ({"query_from": "emb_seq"}, "separate")):
        model, read = make_model(**config), []
        model.gen.model.register_forward_pre_hook(
            lambda module, args, kwargs, read=read: read.append(kwargs["input_ids"].numel()), with_kwargs=True
        )
        args = CoSupTrainingArguments(
            str(tmp_path), report_to="none", nsp_batch_size=8, per_device_train_batch_size=1, supervision=supervision
        )
        trainer = CoSupTrainer(model, args, train_dataset=INSTANCES)
        trainer.create_optimizer_and_scheduler(1)
        rows, nsp = list(trainer.train_dataset), model.config.nsp_token_id
        batches, count = trainer.get_batch_samples(iter([trainer.data_collator(rows)]), 1, model.device)
        trainer.training_step(model, batches[0], count)
        whole = sum(len(row["input_ids"]) for row in rows)
        prefixes = sum(
            len(row["input_ids"]) - row["input_ids"][::-1].index(nsp) for row in rows if nsp in row["input_ids"]
        )
        free = sum(nsp not in row["input_ids"] for row in rows)
        assert sum(read) in ((whole + prefixes, whole + prefixes + 1) if supervision == "co" else (whole,)), (
            supervision,
            free,
        )


@pytest.mark.parametrize("supervision", ["ntp", "nsp", "separate"])
def test_other_supervisions(tmp_path, supervision):
    query_encoder = {"query_from": "emb_seq"} if supervision == "separate" else {}
    model = make_model(gen_kwargs={"tie_word_embeddings": False}, **query_encoder)
    whole = step(tmp_path, model, {"call_overhead": None}, supervision=supervision)
    cached = step(tmp_path, model, nsp_batch_size=8, supervision=supervision, **{"per_device_train_batch_size": 2})
    cut = step(tmp_path, model, {"call_overhead": 1}, supervision=supervision)
    assert_same(cached, whole)
    assert_same(cut, whole)
    assert cut[3] > 1
    trained = {name.split(".")[0] for name, gradient in whole[1].items() if gradient.any()}
    assert trained == {"ntp": {"gen"}, "nsp": {"gen", "emb_seq"}, "separate": {"gen", "emb_seq"}}[supervision]
    if supervision == "nsp":
        assert "gen.lm_head.weight" not in whole[1]


@pytest.mark.parametrize("query_from", ["emb_seq", "query_encoder"])
def test_a_retriever_alone(tmp_path, query_from):
    """Next passages alone with an encoder's queries: the gradients that separate supervision gives the encoders, and Gen is neither trained nor run."""
    torch.manual_seed(3)
    model = make_model(
        query_from=query_from, query_encoder=make_emb_seq(seed=4) if query_from == "query_encoder" else None
    )
    whole = step(tmp_path, model, {"call_overhead": None}, supervision="nsp")
    assert_same(
        step(tmp_path, model, nsp_batch_size=8, supervision="nsp", **{"per_device_train_batch_size": 3}), whole
    )
    assert {name.split(".")[0] for name in whole[1]} == {"emb_seq", query_from}
    separate = step(tmp_path, model, {"call_overhead": None}, supervision="separate")
    for name, gradient in whole[1].items():
        torch.testing.assert_close(gradient, separate[1][name], rtol=1e-4, atol=1e-6)
    read = []
    model.gen.model.register_forward_pre_hook(
        lambda module, args, kwargs: read.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    step(tmp_path, model, {"call_overhead": None}, supervision="nsp")
    assert read == [1]


def test_two_encoders(tmp_path):
    torch.manual_seed(3)
    model = make_model(query_from="query_encoder", query_encoder=make_emb_seq(seed=4))
    whole = step(tmp_path, model, {"call_overhead": None}, supervision="separate")
    cached = step(tmp_path, model, nsp_batch_size=8, supervision="separate", **{"per_device_train_batch_size": 3})
    assert_same(cached, whole)
    assert {name.split(".")[0] for name, gradient in whole[1].items() if gradient.any()} == {
        "gen",
        "emb_seq",
        "query_encoder",
    }


@pytest.mark.parametrize("frozen", ["gen", "emb_seq"])
def test_frozen_parts(tmp_path, frozen):
    model = make_model(emb_seq="gpt2", emb_seq_kwargs=EMB_SEQ)
    options = {f"freeze_{frozen}": True}
    whole = step(tmp_path, model, {"call_overhead": None}, **options)
    assert_same(step(tmp_path, model, nsp_batch_size=8, **options | {"per_device_train_batch_size": 3}), whole)
    assert whole[1] and not any(name.startswith(frozen) for name in whole[1])
    full = step(tmp_path, model, {"call_overhead": None})
    assert whole[0] == pytest.approx(full[0], rel=1e-6)
    for name, gradient in whole[1].items():
        torch.testing.assert_close(gradient, full[1][name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("cached", [False, True])
def test_packed_rows_equal_padded_rows(tmp_path, attention, cached):
    model = make_model(
        gen="mistral", gen_kwargs={"attn_implementation": attention}, emb_seq_kwargs={"attn_implementation": attention}
    )
    whole = step(tmp_path, model, {"call_overhead": None})
    options = {"nsp_batch_size": 8, "max_tokens_per_micro_batch": 150} if cached else {}
    packed = step(tmp_path, model, padding_free=True, **options)
    assert_same(packed, whole)
    assert packed[3] > 1 if cached else packed[3] == 1
