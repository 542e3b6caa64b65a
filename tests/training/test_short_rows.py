"""Short rows on a CPU: plain products compute what fused attention does, and nothing else is changed."""

from types import SimpleNamespace

import pytest
import torch
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from support.models import make_model
from support.training import arguments, world
from trainer import CoSupTrainer, short_rows
from trainer.short_rows import plain_short_rows

IN_BF16 = SimpleNamespace(bf16=True, device=torch.device("cpu"))


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
    kernel = short_rows.sdpa_kernel

    def counting(backend):
        calls.append(backend)
        return kernel(backend)

    monkeypatch.setattr(short_rows, "sdpa_kernel", counting)
    return calls


@pytest.mark.parametrize("longest", [512, 11, 0])
@pytest.mark.parametrize(("gen", "emb_seq"), [("mistral", "bert"), ("gpt2", "qwen3")])
def test_plain_products_equal_fused_attention(monkeypatch, calls, gen, emb_seq, longest):
    monkeypatch.setattr(short_rows, "LONGEST", longest)
    options = {"attn_implementation": "sdpa"}
    model = make_model(gen, emb_seq, gen_kwargs=options, emb_seq_kwargs=options)
    mask = torch.ones(2, 10, dtype=torch.long)
    mask[1, 6:] = 0
    passages = {"passage_input_ids": torch.arange(20).view(2, 10) + 5, "passage_attention_mask": mask}
    expected = outputs_and_gradients(model, passages)
    assert not calls
    with plain_short_rows(IN_BF16):
        actual = outputs_and_gradients(model, passages)
    layers = model.gen.config.num_hidden_layers + model.emb_seq.config.num_hidden_layers
    assert len(calls) == {512: layers, 11: layers // 2, 0: 0}[longest]  # Gen's rows have 12 tokens, passages 10
    for value, expected_value in zip(actual, expected, strict=True):
        torch.testing.assert_close(value, expected_value, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "args",
    [
        SimpleNamespace(bf16=False, device=torch.device("cpu")),
        SimpleNamespace(bf16=True, device=torch.device("cuda")),
    ],
)
def test_other_settings_are_left_alone(args):
    with plain_short_rows(args):
        assert ALL_ATTENTION_FUNCTIONS["sdpa"] is sdpa_attention_forward
        assert not torch.backends.cuda.fp16_bf16_reduction_math_sdp_allowed()


def test_a_function_that_replaces_sdpa_is_left_alone(monkeypatch):
    def users_own():
        """Stand for an attention function."""

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._local_mapping, "sdpa", users_own)
    with plain_short_rows(IN_BF16):
        assert ALL_ATTENTION_FUNCTIONS["sdpa"] is users_own
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is users_own


def test_everything_is_restored_after_nested_use_and_an_error():
    with pytest.raises(KeyError, match="inside"), plain_short_rows(IN_BF16):
        with plain_short_rows(IN_BF16):
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
