"""Arguments, architectures and settings that generate() refuses."""

import pytest
import torch
from transformers import DynamicCache, GenerationConfig

from modeling_cosup import RetrievalConfig
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


@pytest.mark.parametrize(
    ("gen", "message"),
    [("mamba", "recurrent state"), ("gpt_neo", "layers of the types global, local"), ("bloom", "from one cache")],
)
def test_architectures_that_are_refused(gen, message):
    model = make_model(gen)
    index = model.build_index(PASSAGES, show_progress_bar=False)
    with pytest.raises(ValueError, match=message):
        model.generate(torch.tensor([[5, 6]]), retriever=index, max_new_tokens=2)


# ------------------------------------------------------------------ settings


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"top_k": 0}, "top_k is 0"),
        ({"max_retrievals": -1}, "max_retrievals is -1"),
        ({"force_nsp_first": True, "forbid_nsp": True}, "exclude each other"),
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
    with pytest.raises(ValueError, match="candidates need a retriever"):
        generate(model, inputs, None, retrieval_config=RetrievalConfig(candidates=[["p0"]] * 5, forbid_nsp=True))
    with pytest.raises(ValueError, match="'p0' is given by its id"):
        generate(model, inputs, None, retrieval_config=RetrievalConfig(passages=[["p0"]] * 5))
