"""Arguments, architectures and settings that generate() refuses."""

import math

import pytest
import torch
from transformers import BatchEncoding, DynamicCache, GenerationConfig

from modeling_cosup import PassageIndex, RetrievalConfig
from support.generation import generate
from support.models import PASSAGES, make_gen, make_model

# ------------------------------------------------------------------ arguments and architectures


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_beams": 2}, "not in beam_search"),
        ({"use_cache": False}, "keeps its own KV cache"),
        ({"cache_implementation": "offloaded"}, "keeps its own KV cache"),
        ({"past_key_values": DynamicCache()}, "keeps its own KV cache"),
        ({"output_scores": True}, "output_scores=True is not available"),
        ({"output_logits": True}, "output_logits=True is not available"),
        ({"output_attentions": True}, "output_attentions=True is not available"),
        ({"output_hidden_states": True}, "output_hidden_states=True is not available"),
        ({"inputs_embeds": torch.zeros(5, 3, 32)}, "inputs_embeds and guidance_scale are not available"),
        ({"guidance_scale": 2.0}, "inputs_embeds and guidance_scale are not available"),
        ({"encoder_no_repeat_ngram_size": 2}, "encoder_no_repeat_ngram_size is for encoder-decoder models"),
        ({"encoder_repetition_penalty": 1.1}, "encoder_repetition_penalty is for encoder-decoder models"),
        ({"prefill_chunk_size": 4}, "prefill_chunk_size and cache_config are not available"),
        ({"assistant_model": make_gen()}, "not in assisted_generation"),
        ({"prompt_lookup_num_tokens": 2}, "not in assisted_generation"),
        ({"generation_config": GenerationConfig(num_beams=2)}, "not in beam_search"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_cannot_be_combined_with_retrieval_raises(model, inputs, index, options, message):
    with pytest.raises(ValueError) as error:
        generate(model, inputs, index, **options)
    assert message in str(error.value)


def test_arguments_that_retrieval_would_ignore_raise(model, inputs, index):
    with pytest.raises(ValueError, match="passage_input_ids, position_ids: not available with a retriever"):
        generate(model, inputs, index, position_ids=inputs["attention_mask"], passage_input_ids=inputs["input_ids"])
    with pytest.raises(TypeError):  # the third argument of transformers' generate() is not the retriever
        model.generate(inputs["input_ids"], None, index)
    holes = inputs["attention_mask"].clone()
    holes[2, -2] = 0
    with pytest.raises(ValueError, match="Row 2 of input_ids has padding between its tokens"):
        generate(model, {**inputs, "attention_mask": holes}, index)
    with pytest.raises(ValueError, match="Row 0 of input_ids holds no token"):
        generate(model, {**inputs, "attention_mask": holes * 0}, index)


def test_a_misspelt_argument_raises(model, inputs, index):
    with pytest.raises(ValueError, match="max_retreivals"):
        generate(model, inputs, index, max_retreivals=3)


# ------------------------------------------------------------------ prompts and arguments of another kind

IDS = torch.tensor([[5, 6, 7]])


@pytest.mark.parametrize(
    ("prompts", "kind", "message"),
    [
        ("who?", TypeError, "The prompts are a str, expected token ids"),
        (["who?"], TypeError, "The prompts are a list, expected token ids"),
        ([[5, 6, 7]], TypeError, r"The prompts are a list, .*tokenizer\(texts, return_tensors='pt'\)"),
        (BatchEncoding({"input_ids": [[5, 6, 7]]}), TypeError, "The prompts are a list"),
        (IDS.numpy(), TypeError, "The prompts are a ndarray"),
        (IDS.float(), TypeError, "The prompts are torch.float32"),
        (IDS > 5, TypeError, "The prompts are torch.bool"),
        (IDS[0], ValueError, r"The prompts have the shape \(3,\)"),
        (IDS[None], ValueError, r"The prompts have the shape \(1, 1, 3\)"),
        (IDS[:0], ValueError, r"The prompts have the shape \(0, 3\): there is no token"),
        (IDS[:, :0], ValueError, r"The prompts have the shape \(1, 0\): there is no token"),
        (IDS * 100, ValueError, "Prompt 0 holds the token ids 500 to 700, but Gen knows 0 to 399"),
        (IDS - 6, ValueError, "Prompt 0 holds the token ids -1 to 1, but"),
    ],
    ids=str,
)
def test_prompts_that_are_not_token_ids_raise(model, index, prompts, kind, message):
    for retriever in (index, None):
        if retriever is None and kind is ValueError:
            continue  # transformers' own errors
        with pytest.raises(kind, match=message):
            model.generate(prompts, retriever=retriever, max_new_tokens=2)


@pytest.mark.parametrize("mask", [torch.ones(1, 2), torch.ones(2, 3), torch.ones(3), [[1, 1, 1]]], ids=str)
def test_a_mask_of_another_shape_raises(model, index, mask):
    with pytest.raises(ValueError, match=r"attention_mask is .*, expected a tensor of the prompts' shape, \(1, 3\)"):
        model.generate(IDS, attention_mask=mask, retriever=index, max_new_tokens=2)


def test_the_output_of_a_tokenizer_is_taken_whole(model, index):
    tokenizer = model.tokenizer
    encoding = tokenizer(["who painted it?", "where?"], return_tensors="pt", padding=True, padding_side="left")
    for retriever in (index, None):
        options = {"retriever": retriever, "max_new_tokens": 4, "do_sample": False}
        expected = model.generate(encoding.input_ids, attention_mask=encoding.attention_mask, **options)
        assert torch.equal(model.generate(encoding, **options), expected)
        assert torch.equal(model.generate(dict(encoding), **options), expected)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"retriever": "out/index"}, r"the name 'out/index', expected an index: .* model.load_index\('out/index'\)"),
        ({"retriever": PASSAGES}, "retriever is a list, which has no fingerprint, no search"),
        ({"retriever": PassageIndex}, "retriever is the class PassageIndex"),
        ({"retrieval_config": {"top_k": 2}}, "retrieval_config is a dict, expected a RetrievalConfig"),
        ({"generation_config": RetrievalConfig()}, "generation_config is a RetrievalConfig, expected a Generation"),
        ({"generation_config": {"max_new_tokens": 2}}, "generation_config is a dict"),
    ],
    ids=str,
)
def test_arguments_of_another_kind_raise(model, arguments, message):
    with pytest.raises(TypeError, match=message):
        model.generate(IDS, **arguments)
    with pytest.raises(TypeError, match=message):
        model.generate_many([[5, 6]], **arguments)


@pytest.mark.parametrize(
    ("gen", "message"),
    [("mamba", "recurrent state"), ("gpt_neo", "layers of the types global, local"), ("bloom", "from one cache")],
)
def test_architectures_that_are_refused(gen, message):
    model = make_model(gen)
    index = model.build_index(PASSAGES, show_progress_bar=False)
    with pytest.raises(ValueError, match=message):
        model.generate(torch.tensor([[5, 6]]), retriever=index, max_new_tokens=2)


def test_an_older_architecture_generates_in_training_mode_too():
    model = make_model("gptj", gen_kwargs={"attn_pdrop": 0.5, "resid_pdrop": 0.5}).train()
    index = model.build_index(PASSAGES, show_progress_bar=False)
    assert model.generate(IDS, retriever=index, max_new_tokens=2).shape == (1, 5)
    assert all(module.training for module in model.gen.modules())


# ------------------------------------------------------------------ settings


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"top_k": 0}, "top_k is 0"),
        ({"top_k": 1.5}, "top_k is 1.5, expected an integer"),
        ({"top_k": "2"}, "top_k is '2', expected an integer"),
        ({"max_retrievals": -1}, "max_retrievals is -1"),
        ({"max_retrievals": "3"}, "max_retrievals is '3', expected an integer"),
        ({"min_score": "0.5"}, "min_score is '0.5', expected a number"),
        ({"min_score": math.nan}, "min_score is nan, expected a number"),
        ({"passages": ["p0"]}, r"passages is \['p0'\], expected a list for each prompt"),
        ({"passages": [{"text": "x"}]}, "expected a list for each prompt"),
        ({"candidates": "p0"}, "candidates is 'p0', expected a list for each prompt"),
        ({"force_nsp_first": True, "forbid_nsp": True}, "exclude each other"),
        ({"force_nsp_first": True, "max_retrievals": 0}, "force_nsp_first and max_retrievals=0 exclude each other"),
        ({"candidates": [], "passages": []}, "set one of them"),
        ({"forget_passages": "yes"}, "'recompute' or 'mask'"),
    ],
)
def test_invalid_settings_raise(settings, message):
    with pytest.raises(ValueError, match=message):
        RetrievalConfig(**settings)


def test_candidates_and_passages_must_fit(model, inputs, index):
    for name, entries in (("candidates", 3), ("passages", 3), ("candidates", 1)):
        config = RetrievalConfig(**{name: [["p0"]] * entries})
        for options in ({}, {"do_sample": True, "num_return_sequences": 3}):
            message = f"{name} has {entries} entries, expected one for each of the 5 prompts"
            with pytest.raises(ValueError, match=message):
                generate(model, inputs, index, retrieval_config=config, **options)
    for settings in ({"candidates": [["p0", "p77"]] * 5}, {"passages": [["p77"]] * 5}):
        with pytest.raises((ValueError, KeyError), match="p77"):
            generate(model, inputs, index, retrieval_config=RetrievalConfig(**settings))
    with pytest.raises(ValueError, match="retrieval_config needs a retriever"):
        generate(model, inputs, None, retrieval_config=RetrievalConfig(top_k=2))
    with pytest.raises(ValueError, match="max_retrievals needs a retriever"):
        generate(model, inputs, None, max_retrievals=2)
    with pytest.raises(TypeError, match=r"pass retrieval_config=RetrievalConfig\(min_score=...\)"):
        generate(model, inputs, index, min_score=0.5)
    with pytest.raises(TypeError, match="forbid_nsp is a field of RetrievalConfig"):
        model.generate_many([[5]], retriever=index, forbid_nsp=True)
    with pytest.raises(ValueError, match="candidates need a retriever"):
        generate(model, inputs, None, retrieval_config=RetrievalConfig(candidates=[["p0"]] * 5, forbid_nsp=True))
    for passage, message in (
        (3, "holds 3, expected a passage or its id"),
        ({"title": "x"}, "text is None"),
        ({"id": ["x"], "text": "y"}, r"passage 0 of a prompt: id is \['x'\], expected a string"),
    ):
        with pytest.raises(ValueError, match=message):
            generate(model, inputs, index, retrieval_config=RetrievalConfig(passages=[[passage]] * 5))
    with pytest.raises(ValueError, match="'p0' is given by its id"):
        generate(model, inputs, None, retrieval_config=RetrievalConfig(passages=[["p0"]] * 5))
