"""A batched generate() == each row alone == full recompute without cache, token by token, whenever rows retrieve."""

import pytest
import torch
from transformers import LogitsProcessorList

from modeling_cosup.packing_cosup import pad_rows
from modeling_cosup.tokenization_cosup import encode_prompt
from support.generation import QUESTIONS, Steer, left_pad, real_tokens, reference_generate
from support.models import PASSAGES, make_emb_seq, make_model, make_tokenizer

PAIRS = {  # Gen, Emb_seq, settings of the model
    "llama": ("llama", "llama", {}),
    "gpt2-llama-wider": ("gpt2", "llama", {"emb_seq_kwargs": {"hidden_size": 48}}),
    "mistral-bert-narrower": ("mistral", "bert", {"emb_seq_kwargs": {"hidden_size": 16}, "emb_seq_pooling": "mean"}),
    "qwen3-gpt2-dot": ("qwen3", "gpt2", {"similarity": "dot"}),
    "phi3-llama": ("phi3", "llama", {}),  # a sliding window on every layer
    "tied": ("llama", None, {"tie_emb_seq": True}),
    "tied-mistral-head": ("mistral", None, {"tie_emb_seq": True, "emb_head_size": 24, "truncate_dim": 16}),
    "gptj-bert": ("gptj", "bert", {"emb_seq_pooling": "mean"}),  # makes its attention masks itself
}
MAX_NEW_TOKENS = 20


def setup(name="llama", pad="<pad>", **more):
    gen, emb_seq, config = PAIRS[name]
    tokenizer = make_tokenizer(pad=pad)
    model = make_model(gen, emb_seq, tokenizer=tokenizer, **config, **more)
    index = model.build_index(PASSAGES, show_progress_bar=False)
    nsp = model.config.nsp_token_id
    prompts = [encode_prompt(tokenizer, question) for question in QUESTIONS]
    prompts[1] += [nsp, *prompts[0], nsp]  # retrieves before it writes, for its last [NSP] only
    steer = Steer(model, retrieve_every=9, quiet_id=tokenizer("!")["input_ids"][0])
    return model, tokenizer, index, prompts, steer


def generate(model, index, prompts, steer, **kwargs):
    """Return the output, and its rows without padding."""
    options = {"max_new_tokens": MAX_NEW_TOKENS, "return_dict_in_generate": True, **kwargs}
    inputs = left_pad(prompts, model.generation_config.pad_token_id)
    output = model.generate(**inputs, retriever=index, logits_processor=LogitsProcessorList([steer]), **options)
    return output, real_tokens(output, inputs["attention_mask"], model.generation_config.pad_token_id)


def unpadded_traces(output, prompts):
    """Return `[(column, passage id)]` of each row; columns do not count the prompt's padding, as in the reference."""
    traces = []
    for prompt, trace in zip(prompts, output.retrievals, strict=True):
        padding = output.prompt_length - len(prompt)
        traces.append([(retrieval.position - padding, retrieval.passage_id) for retrieval in trace])
    return traces


@torch.no_grad()
def check(model, index, prompts, steer, encode_query=None, max_new_tokens=MAX_NEW_TOKENS, max_retrievals=None):
    options = {"max_new_tokens": max_new_tokens, "max_retrievals": max_retrievals}
    output, rows = generate(model, index, prompts, steer, **options)
    traces = unpadded_traces(output, prompts)
    for row, prompt in enumerate(prompts):
        ids, trace = reference_generate(model, index, prompt, steer, max_new_tokens, max_retrievals, encode_query)
        assert rows[row] == ids, f"row {row} differs from a recompute of the whole prefix"
        assert traces[row] == trace, f"the trace of row {row} differs from a recompute of the whole prefix"
        output_alone, (ids_alone,) = generate(model, index, [prompt], steer, **options)
        (trace_alone,) = unpadded_traces(output_alone, [prompt])
        assert ids_alone == ids, f"row {row} alone differs from a recompute of the whole prefix"
        assert trace_alone == trace, f"the trace of row {row} alone differs from a recompute of the whole prefix"
        scores = [retrieval.score for retrieval in output.retrievals[row]]
        scores_alone = [retrieval.score for retrieval in output_alone.retrievals[0]]
        assert scores_alone == pytest.approx(scores, rel=1e-4, abs=1e-4)
    return output, traces


@pytest.mark.parametrize("name", PAIRS)
def test_batch_row_and_recompute_agree(name):
    model, tokenizer, index, prompts, steer = setup(name)
    output, traces = check(model, index, prompts, steer)
    # rows retrieve first at different steps, several times or never, and not always the same passage
    first_steps = set()
    passage_ids = set()
    for prompt, trace in zip(prompts, traces, strict=True):
        passage_ids.update(passage_id for _, passage_id in trace)
        if trace:
            column, _ = trace[0]
            first_steps.add(column - len(prompt))
    assert len(first_steps) >= 3
    assert len(passage_ids) >= 2
    assert max(map(len, traces)) >= 2
    assert traces[-1] == []
    assert output.num_generated_tokens.tolist() == [MAX_NEW_TOKENS] * len(prompts)


def test_padding_with_the_end_of_sequence_token():
    model, tokenizer, index, prompts, steer = setup(pad=None)
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    _, traces = check(model, index, prompts, steer)
    assert max(map(len, traces)) >= 2


@pytest.mark.parametrize("name", ["llama", "mistral-bert-narrower"])
def test_rows_that_end_early_change_no_other_row(name):
    model, tokenizer, index, prompts, steer = setup(name)
    steer.end_every = 6
    output, _ = check(model, index, prompts, steer)
    assert len(set(output.num_generated_tokens.tolist())) >= 3  # they end at different steps


@pytest.mark.parametrize("max_retrievals", [0, 1])
def test_max_retrievals_counts_per_row(max_retrievals):
    model, tokenizer, index, prompts, steer = setup()
    steer.retrieve_every = 5
    _, traces = check(model, index, prompts, steer, max_retrievals=max_retrievals)
    assert max(map(len, traces)) == max_retrievals


@pytest.mark.parametrize("name", ["llama", "gpt2-llama-wider"])
def test_processors_that_read_the_history_see_the_row_alone(name):
    model, tokenizer, index, prompts, steer = setup(name)
    options = {"repetition_penalty": 1.5, "no_repeat_ngram_size": 3}
    _, rows = generate(model, index, prompts, steer, **options)
    for prompt, ids in zip(prompts, rows, strict=True):
        _, (ids_alone,) = generate(model, index, [prompt], steer, **options)
        assert ids == ids_alone
    _, rows_without_options = generate(model, index, prompts, steer)
    assert rows != rows_without_options


def test_right_padded_prompts():
    model, tokenizer, index, prompts, steer = setup()
    left, rows = generate(model, index, prompts, steer)
    input_ids, attention_mask = pad_rows(prompts, tokenizer.pad_token_id, side="right")
    right = model.generate(
        input_ids,
        attention_mask=attention_mask,
        retriever=index,
        max_new_tokens=MAX_NEW_TOKENS,
        logits_processor=LogitsProcessorList([steer]),
        return_dict_in_generate=True,
    )
    assert torch.equal(right.sequences, left.sequences)
    assert max(map(len, rows)) > input_ids.shape[1]
    for right_trace, left_trace in zip(right.retrievals, left.retrievals, strict=True):
        assert [retrieval.position for retrieval in right_trace] == [retrieval.position for retrieval in left_trace]


def test_columns_that_are_padding_in_every_row_are_kept():
    model, tokenizer, index, prompts, steer = setup()
    prompt = prompts[1]
    padding = [tokenizer.pad_token_id] * 3
    left_mask = [0] * 3 + [1] * len(prompt)

    def generate_padded(ids, mask):
        inputs = {"input_ids": torch.tensor([ids]), "attention_mask": torch.tensor([mask])}
        options = {"max_new_tokens": MAX_NEW_TOKENS, "return_dict_in_generate": True}
        return model.generate(**inputs, retriever=index, **options)

    left = generate_padded([*padding, *prompt], left_mask)
    right = generate_padded([*prompt, *padding], left_mask[::-1])
    assert right.prompt_length == len(prompt) + 3
    assert right.retrievals[0]
    assert torch.equal(right.sequences, left.sequences)
    assert right.retrievals == left.retrievals


@pytest.mark.parametrize("pooling", ["eos", "mean"])
def test_queries_from_emb_seq(pooling):
    model, tokenizer, index, prompts, steer = setup(query_from="emb_seq", emb_seq_pooling=pooling)

    def encode_query(ids):
        hidden = model.emb_seq(torch.tensor([ids])).last_hidden_state[0]
        return hidden[-1] if pooling == "eos" else hidden.mean(0)

    _, traces = check(model, index, prompts, steer, encode_query)
    assert max(map(len, traces)) >= 2


@pytest.mark.parametrize("query_from", ["emb_seq", "query_encoder"])
def test_queries_from_an_encoder_with_its_own_tokenizer(query_from):
    texts = ["Curie painted radium in Warsaw"]
    emb_seq_tokenizer = make_tokenizer(vocab_size=300, bos="<cls>", eos="<sep>", pad="<nothing>", texts=texts)
    query_encoder = make_emb_seq("llama", seed=5) if query_from == "query_encoder" else None
    model, tokenizer, index, prompts, steer = setup(
        query_from=query_from, emb_seq_tokenizer=emb_seq_tokenizer, query_encoder=query_encoder
    )
    encoder = query_encoder or model.emb_seq

    def encode_query(ids):
        text = tokenizer.decode(ids, skip_special_tokens=True)
        encoded = emb_seq_tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        ids = [emb_seq_tokenizer.bos_token_id, *encoded, emb_seq_tokenizer.eos_token_id]
        return encoder(torch.tensor([ids])).last_hidden_state[0, -1]

    assert model.emb_seq_tokenizer is emb_seq_tokenizer
    _, traces = check(model, index, prompts, steer, encode_query)
    assert max(map(len, traces)) >= 2


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "mistral"])
def test_without_nsp_token_id_it_is_plain_gen(architecture):
    """Check for Gen's own tokens and logits: [NSP] and [Cs] are tokens like any other."""
    tokenizer = make_tokenizer()
    model = make_model(architecture, tokenizer=tokenizer)
    index = model.build_index(PASSAGES, show_progress_bar=False)
    nsp, cs = model.config.nsp_token_id, model.config.cs_token_id
    prompts = [[*encode_prompt(tokenizer, question), nsp] for question in QUESTIONS]
    inputs = left_pad(prompts, tokenizer.pad_token_id)

    class PreferControlTokens(Steer):
        def __call__(self, input_ids, scores):
            scores = super().__call__(input_ids, scores)
            scores[input_ids[:, -1] == nsp, cs] += 500
            return scores

    options = {"max_new_tokens": 16, "logits_processor": LogitsProcessorList([PreferControlTokens(model, 5)])}
    ends = {"eos_token_id": model.generation_config.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    expected = model.gen.generate(**inputs, **ends, do_sample=False, **options)
    continuations = expected[:, inputs["input_ids"].shape[1] :]
    assert nsp in continuations
    assert cs in continuations
    assert torch.equal(model.generate(**inputs, nsp_token_id=None, **options), expected)
    assert torch.equal(model.generate(**inputs, nsp_token_id=None, retriever=index, **options), expected)
    with torch.no_grad():
        output = model(**inputs, nsp_token_id=None)
        torch.testing.assert_close(output.logits, model.gen(**inputs).logits, rtol=0, atol=1e-6)
    assert output.query_embeds is None
