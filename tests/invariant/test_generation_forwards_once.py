"""No token is forwarded twice; Emb_seq is never called while generating and need not be in memory."""

from collections import Counter
from dataclasses import replace

import pytest
import torch
from transformers import LogitsProcessorList

from modeling_cosup import CoSupForCausalLM, RetrievalConfig
from modeling_cosup.cache_cosup import EMPTY
from modeling_cosup.tokenization_cosup import encode_prompt
from support.generation import Steer, assert_same_retrievals, left_pad, real_tokens
from support.models import PASSAGES, make_model, make_tokenizer

QUESTIONS = ["who?", "who painted the Night Watch?", "not this one!"]


def setup(gen="llama", **config):
    tokenizer = make_tokenizer()
    model = make_model(gen, tokenizer=tokenizer, **config)
    index = model.build_index(PASSAGES, show_progress_bar=False)
    prompts = [encode_prompt(tokenizer, question) for question in QUESTIONS]
    prompts[1].append(model.config.nsp_token_id)
    return model, index, prompts


def generate(model, index, prompts):
    """Return the output, and its rows without padding."""
    inputs = left_pad(prompts, model.generation_config.pad_token_id)
    steer = Steer(model, retrieve_every=7, end_every=11, quiet_id=model.tokenizer("!")["input_ids"][0])
    output = model.generate(
        **inputs,
        retriever=index,
        max_new_tokens=24,
        logits_processor=LogitsProcessorList([steer]),
        return_dict_in_generate=True,
    )
    return output, real_tokens(output, inputs["attention_mask"], model.generation_config.pad_token_id)


@pytest.mark.parametrize(
    ("gen", "config"),
    [
        ("llama", {}),
        ("gpt2", {}),
        ("mistral", {}),
        ("llama", {"tie_emb_seq": True}),
        ("gpt2", {"tie_emb_seq": True, "emb_head_size": 16}),
    ],
)
def test_every_token_is_forwarded_once_at_its_position(gen, config):
    model, index, prompts = setup(gen, **config)
    forwarded = Counter()  # (position, token), as they reach Gen

    def record(module, args, kwargs):
        cache = kwargs["past_key_values"]
        slots = cache._slots
        if isinstance(slots, int):
            slots = slice(slots)
        positions = cache.positions[slots].gather(1, cache._columns)
        real = positions != EMPTY
        assert torch.equal(positions[real], kwargs["position_ids"][real])
        forwarded.update(zip(positions[real].tolist(), kwargs["input_ids"][real].tolist(), strict=True))

    model.gen.base_model.register_forward_pre_hook(record, with_kwargs=True)
    output, rows = generate(model, index, prompts)
    assert sum(map(len, output.retrievals)) >= 2
    assert len(set(output.num_generated_tokens.tolist())) > 1
    expected = Counter()
    for ids in rows:
        expected.update(enumerate(ids[:-1]))  # the last token of a row is not forwarded: the row has left
    assert forwarded == expected
    assert output.num_forwarded_tokens == forwarded.total()


def test_a_row_alone_forwards_its_sequence_and_nothing_else():
    model, index, prompts = setup()
    forwarded = []
    model.gen.get_input_embeddings().register_forward_pre_hook(lambda module, args: forwarded.append(args[0].clone()))
    for prompt in prompts:
        forwarded.clear()
        output, (ids,) = generate(model, index, [prompt])
        assert torch.cat(forwarded, dim=1)[0].tolist() == ids[:-1]
        assert output.num_forwarded_tokens == len(ids) - 1


def test_emb_seq_is_never_called():
    model, index, prompts = setup()

    def refuse(*args):
        raise AssertionError("Emb_seq was called while generating")

    model.emb_seq.register_forward_pre_hook(refuse)
    output, _ = generate(model, index, prompts)
    assert sum(map(len, output.retrievals)) >= 2
    with pytest.raises(AssertionError, match="Emb_seq was called"):  # the hook works
        model.encode_passages(torch.ones(1, 3, dtype=torch.long))


@pytest.mark.parametrize("emb_seq_kwargs", [{}, {"hidden_size": 48}])
def test_emb_seq_need_not_be_in_memory(tmp_path, recwarn, emb_seq_kwargs):
    model, index, prompts = setup(emb_seq_kwargs=emb_seq_kwargs)
    model.save_pretrained(tmp_path / "model")
    index.save_pretrained(tmp_path / "index")
    expected, _ = generate(model, index, prompts)

    light = CoSupForCausalLM.from_pretrained(tmp_path / "model", load_emb_seq=False)
    assert light.emb_seq is None and light.emb_head is None
    assert not any(name.startswith("emb_") for name, _ in light.named_parameters())
    output, _ = generate(light, light.load_index(tmp_path / "index"), prompts)
    assert torch.equal(output.sequences, expected.sequences)
    assert_same_retrievals(output.retrievals, expected.retrievals)

    with pytest.raises(ValueError, match="load_emb_seq=False"):
        light.save_pretrained(tmp_path / "half")
    assert not (tmp_path / "half").exists()
    with pytest.raises(ValueError, match="Emb_seq is not in memory"):
        light.encode_passages(torch.ones(1, 3, dtype=torch.long))
    with pytest.raises(ValueError, match="Emb_seq is not in memory"):
        light.build_index(PASSAGES, show_progress_bar=False)


def test_queries_from_emb_seq_need_it_in_memory(tmp_path):
    model, index, prompts = setup(query_from="emb_seq")
    model.save_pretrained(tmp_path)
    light = CoSupForCausalLM.from_pretrained(tmp_path, load_emb_seq=False)
    some_given = RetrievalConfig(passages=[["p0"]] * (len(prompts) - 1) + [None])
    all_given = RetrievalConfig(passages=[["p0"]] * len(prompts))
    for settings in (None, some_given, replace(all_given, output_query_embeds=True)):
        with pytest.raises(ValueError, match="query_from='emb_seq'"):
            light.generate_many(prompts, retriever=index, retrieval_config=settings, max_new_tokens=2)
    assert len(light.generate_many(prompts, retriever=index, retrieval_config=all_given, max_new_tokens=2)) == 3


def test_a_query_encoder_stays_without_emb_seq(tmp_path):
    query_encoder = make_model(emb_seq_kwargs={"seed": 5}).emb_seq
    model, index, prompts = setup(query_from="query_encoder", query_encoder=query_encoder)
    model.save_pretrained(tmp_path)
    light = CoSupForCausalLM.from_pretrained(tmp_path, load_emb_seq=False)
    expected, _ = generate(model, index, prompts)
    output, _ = generate(light, index, prompts)
    assert sum(map(len, output.retrievals)) >= 2
    assert torch.equal(output.sequences, expected.sequences)
    assert_same_retrievals(output.retrievals, expected.retrievals)
