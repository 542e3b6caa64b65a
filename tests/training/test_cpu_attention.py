"""Attention on a CPU: packed rows are computed as if alone, short rows by plain products, and nothing else changes."""

import contextlib
from types import SimpleNamespace

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import DogeConfig, DogeModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import create_causal_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from support.models import make_model
from support.training import arguments, world
from trainer import CoSupTrainer
from trainer import cpu_attention as attention_module
from trainer.cpu_attention import cpu_attention, keeps_packed_rows_apart_on_cpu
from trainer.packed_attention import check_packed_rows, keeps_packed_rows_apart

IN_BF16 = SimpleNamespace(bf16=True, device=torch.device("cpu"))
IN_FLOAT32 = SimpleNamespace(bf16=False, device=torch.device("cpu"))
IN_BF16_ON_GPU = SimpleNamespace(bf16=True, device=torch.device("cuda"))


def outputs_and_gradients(model, passages):
    """Return embeddings, the NTP loss and all gradients for two rows and these passages."""
    generator = torch.Generator().manual_seed(0)
    input_ids = torch.randint(4, 300, (2, 12), generator=generator)
    input_ids[:, 5] = model.config.nsp_token_id
    model.zero_grad()
    outputs = model(input_ids=input_ids, labels=input_ids, compute_nsp_loss=False, **passages)
    (outputs.ntp_loss + outputs.query_embeds.sum() + outputs.passage_embeds.square().sum()).backward()
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    return [outputs.query_embeds, outputs.passage_embeds, outputs.ntp_loss, *gradients]


@pytest.fixture
def calls(monkeypatch):
    """Return a list that each call of attention by plain products is added to."""
    calls = []

    def counted(function):
        def counted_function(*args):
            calls.append(function)
            return function(*args)

        return counted_function

    for name in ("sdpa_kernel", "plain_products"):
        monkeypatch.setattr(attention_module, name, counted(getattr(attention_module, name)))
    return calls


@pytest.mark.parametrize("longest", [512, 11, 0])
@pytest.mark.parametrize(("gen", "emb_seq"), [("mistral", "bert"), ("gpt2", "qwen3")])
def test_plain_products_equal_fused_attention(monkeypatch, calls, gen, emb_seq, longest):
    monkeypatch.setattr(attention_module, "LONGEST_PLAIN", longest)
    options = {"attn_implementation": "sdpa"}
    model = make_model(gen, emb_seq, gen_kwargs=options, emb_seq_kwargs=options)
    mask = torch.ones(2, 10, dtype=torch.long)
    mask[1, 6:] = 0
    passages = {"passage_input_ids": torch.arange(20).view(2, 10) + 5, "passage_attention_mask": mask}
    expected = outputs_and_gradients(model, passages)
    assert not calls
    with cpu_attention(IN_BF16):
        actual = outputs_and_gradients(model, passages)
    layers = model.gen.config.num_hidden_layers + model.emb_seq.config.num_hidden_layers
    assert len(calls) == {512: layers, 11: layers // 2, 0: 0}[longest]  # Gen's rows have 12 tokens, passages 10
    for value, expected_value in zip(actual, expected, strict=True):
        torch.testing.assert_close(value, expected_value, rtol=1e-4, atol=1e-5)


# ---------------------------------------------------------------------- packed rows


@pytest.fixture
def masks(monkeypatch):
    """Return a list that each mask is added to."""
    masks = []
    make_mask = attention_module._mask

    def recorded(**kwargs):
        masks.append(make_mask(**kwargs))
        return masks[-1]

    monkeypatch.setattr(attention_module, "_mask", recorded)
    return masks


@pytest.mark.parametrize("args", [IN_BF16, IN_FLOAT32], ids=["bf16", "float32"])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen3", "mixtral"])
def test_packed_rows_are_computed_as_if_alone(monkeypatch, masks, calls, kind, args):
    monkeypatch.setattr(attention_module, "LONGEST_PLAIN", 40)
    body = make_model(kind, gen_kwargs={"attn_implementation": "sdpa"}).gen.base_model.eval()
    generator = torch.Generator().manual_seed(0)
    lengths = [9, 1, 60, 12, 2, 10]  # two groups: the row of 60 tokens, and the others
    rows = [torch.randint(4, 300, (1, length), generator=generator) for length in lengths]
    weights = torch.randn(1, sum(lengths), body.config.hidden_size, generator=generator)
    positions = torch.cat([torch.arange(length) for length in lengths])[None]

    alone = torch.cat([body(input_ids=row, use_cache=False).last_hidden_state for row in rows], 1)
    expected = torch.autograd.grad((alone * weights).sum(), list(body.parameters()), allow_unused=True)
    with cpu_attention(args):
        packed = body(input_ids=torch.cat(rows, 1), position_ids=positions, use_cache=False).last_hidden_state
    gradients = torch.autograd.grad((packed * weights).sum(), list(body.parameters()), allow_unused=True)
    assert [mask.tolist() for mask in masks] == [[0, 9, 10, 70, 82, 84]]  # the starts, in place of a dense mask
    torch.testing.assert_close(packed, alone, rtol=1e-4, atol=1e-5)
    for gradient, expected_gradient in zip(gradients, expected, strict=True):
        torch.testing.assert_close(gradient, expected_gradient, rtol=1e-3, atol=1e-4)
    assert bool(calls) == args.bf16


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("llama", True),
        ("gpt2", True),
        ("mistral", False),  # a sliding window needs a dense mask
        ("gemma3", False),  # some layers have a sliding window
        ("mamba", False),  # its state passes from row to row
        ("lfm2", False),  # so do its convolutions
        ("bert", False),  # sees later tokens
    ],
)
def test_only_parts_that_keep_packed_rows_apart_are_packed(kind, expected):
    options = {} if kind == "mamba" else {"attn_implementation": "sdpa"}
    part = make_model(emb_seq=kind, emb_seq_kwargs=options).emb_seq
    assert keeps_packed_rows_apart_on_cpu(part, IN_FLOAT32) == expected
    assert not keeps_packed_rows_apart_on_cpu(part, IN_BF16_ON_GPU)


@pytest.mark.parametrize(
    ("kind", "refused"),
    [("llama", None), ("gemma3", None), ("mamba", "MambaForCausalLM"), ("lfm2", "Lfm2ForCausalLM")],
)
def test_padding_free_by_hand_is_refused_where_rows_would_change_each_other(tmp_path, kind, refused):
    options = {} if kind == "mamba" else {"attn_implementation": "eager"}
    model = make_model(gen=kind, gen_kwargs=options)
    expectation = contextlib.nullcontext()
    if refused is not None:
        expectation = pytest.raises(ValueError, match=f"{refused} that are packed into one change each other")
    with expectation:
        CoSupTrainer(model, arguments(tmp_path, padding_free=True), train_dataset=world(["Ann", "Bob"]))
    for device_args in (IN_FLOAT32, IN_BF16_ON_GPU):  # a GPU tries no rows: there the layers alone decide
        with expectation:
            check_packed_rows(model.gen, device_args)


@pytest.mark.parametrize(("kind", "is_packed"), [("llama", True), ("mistral", True), ("lfm2", False)])
def test_flex_attention_packs_rows_only_if_no_layer_runs_on_into_the_next(kind, is_packed):
    gen = make_model(gen=kind, gen_kwargs={"attn_implementation": "flex_attention"}).gen
    assert keeps_packed_rows_apart(gen, IN_BF16_ON_GPU) == keeps_packed_rows_apart(gen, IN_FLOAT32) == is_packed


def test_a_part_that_looks_into_its_mask_is_refused():
    config = DogeConfig(
        vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, head_dim=8
    )
    part = DogeModel._from_config(config, attn_implementation="sdpa")
    assert not keeps_packed_rows_apart_on_cpu(part, IN_FLOAT32)
    with pytest.raises(ValueError, match="DogeModel cannot read packed rows: leave out padding_free=True. It said"):
        check_packed_rows(part, IN_FLOAT32)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_the_trainer_packs_rows_on_a_cpu_by_default(tmp_path, attention):
    options = {"attn_implementation": attention}
    model = make_model(gen_kwargs=options, emb_seq="llama", emb_seq_kwargs=options)
    for padding_free in (None, False):
        args = arguments(tmp_path, padding_free=padding_free)
        collator = CoSupTrainer(model, args, train_dataset=world(["Ann", "Bob"])).data_collator
        is_packed = attention == "sdpa" and padding_free is None
        assert (collator.padding_free, collator.padding_free_passages) == (is_packed, is_packed)


def test_a_single_row_has_the_mask_of_transformers():
    """Some architectures always ask for a mask."""
    body = make_model("llama", gen_kwargs={"attn_implementation": "sdpa"}).gen.base_model
    states = torch.zeros(1, 6, body.config.hidden_size)
    positions = torch.arange(6)[None]
    with cpu_attention(IN_FLOAT32):
        mask = create_causal_mask(body.config, states, None, None, positions, allow_is_causal_skip=False)
    assert torch.equal(mask, torch.ones(1, 1, 6, 6, dtype=torch.bool).tril())


def test_plain_products_take_values_of_another_width():
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(2, n, 7, width, generator=generator) for n, width in ((6, 8), (3, 8), (3, 4)))
    expected = scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
    torch.testing.assert_close(attention_module.plain_products(query, key, value), expected.transpose(1, 2))


def test_isolated_queries_are_packed_too_inside_and_outside_of_a_step(tmp_path):
    args = arguments(tmp_path, isolate_queries=True)
    trainer = CoSupTrainer(make_model(), args, train_dataset=world(["Ann", "Bob", "Cid"]))
    assert trainer.data_collator.padding_free
    batch = trainer.data_collator([dict(row) for row in trainer.train_dataset])
    losses = []
    for context in (cpu_attention(args), contextlib.nullcontext(), cpu_attention(args)):
        with context:
            losses.append(float(trainer.compute_loss(trainer.model.train(), dict(batch))))
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-5)


# ---------------------------------------------------------------------- what is left alone


def test_other_devices_are_left_alone():
    with cpu_attention(IN_BF16_ON_GPU):
        assert ALL_ATTENTION_FUNCTIONS["sdpa"] is sdpa_attention_forward
        assert not torch.backends.cuda.fp16_bf16_reduction_math_sdp_allowed()


def test_a_function_that_replaces_sdpa_is_left_alone(monkeypatch):
    def users_own():
        """Stand for an attention function."""

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._local_mapping, "sdpa", users_own)
    with cpu_attention(IN_BF16):
        assert ALL_ATTENTION_FUNCTIONS["sdpa"] is users_own
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is users_own


def test_everything_is_restored_after_nested_use_and_an_error():
    with pytest.raises(KeyError, match="inside"), cpu_attention(IN_BF16):
        with cpu_attention(IN_BF16):
            assert ALL_ATTENTION_FUNCTIONS["sdpa"] is not sdpa_attention_forward
        assert ALL_ATTENTION_FUNCTIONS["sdpa"] is not sdpa_attention_forward
        assert torch.backends.cuda.fp16_bf16_reduction_math_sdp_allowed()
        raise KeyError("inside")
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is sdpa_attention_forward
    assert not torch.backends.cuda.fp16_bf16_reduction_math_sdp_allowed()


@pytest.mark.parametrize("bf16", [True, False])
@pytest.mark.parametrize("options", [{}, {"nsp_batch_size": 4}, {"isolate_queries": True}])
def test_training_in_bfloat16_takes_plain_products(tmp_path, calls, options, bf16):
    args = arguments(tmp_path, max_steps=1, per_device_train_batch_size=2, bf16=bf16, **options)
    trainer = CoSupTrainer(make_model(), args, train_dataset=world(["Ann", "Bob", "Cid", "Dan"]))
    trainer.train()
    assert bool(calls) == bf16
