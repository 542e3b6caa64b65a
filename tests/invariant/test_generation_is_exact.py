"""A batched generate() == each row alone == full recompute without cache, token by token, whatever the rows retrieve and when."""

import pytest
import torch
from transformers import LogitsProcessorList

from modeling_cosup.tokenization_cosup import encode_prompt
from support.generation import Steer, left_pad, real_tokens, reference_generate
from support.models import PASSAGES, make_emb_seq, make_model, make_tokenizer

QUESTIONS = ["who?", "who painted the Night Watch?", "Curie", "when was it finished; in Amsterdam", "not this one!"]
PAIRS = {  # Gen, Emb_seq, more
    "llama": ("llama", "llama", {}),
    "gpt2-llama-wider": ("gpt2", "llama", {"emb_seq_kwargs": {"hidden_size": 48}}),
    "mistral-bert-narrower": ("mistral", "bert", {"emb_seq_kwargs": {"hidden_size": 16}, "emb_seq_pooling": "mean"}),
    "qwen3-gpt2-dot": ("qwen3", "gpt2", {"similarity": "dot"}),
    "phi3-llama": ("phi3", "llama", {}),  # a sliding window on every layer
    "gptj-bert": ("gptj", "bert", {"emb_seq_pooling": "mean"}),  # makes its attention masks itself
}
MAX_NEW_TOKENS = 20


def setup(name="llama", pad="<pad>", **more):
    gen, emb_seq, config = PAIRS[name]
    tokenizer = make_tokenizer(pad=pad)
    model = make_model(gen, emb_seq, tokenizer=tokenizer, **config, **more)
    index = model.build_index(PASSAGES, show_progress_bar=False)
    prompts = [encode_prompt(tokenizer, question) for question in QUESTIONS]
    prompts[1] += [
        model.config.nsp_token_id,
        *prompts[0],
        model.config.nsp_token_id,
    ]  # retrieves at once, for its last [NSP] only
    return model, tokenizer, index, prompts, Steer(model, retrieve_every=9, quiet_id=tokenizer("!")["input_ids"][0])


def generate(model, index, prompts, steer, **kwargs):
    kwargs = {"max_new_tokens": MAX_NEW_TOKENS, **kwargs}
    inputs = left_pad(prompts, model.generation_config.pad_token_id)
    output = model.generate(
        **inputs,
        retriever=index,
        logits_processor=LogitsProcessorList([steer]),
        return_dict_in_generate=True,
        **kwargs,
    )
    return output, real_tokens(output, inputs["attention_mask"], model.generation_config.pad_token_id)


def unpadded_trace(output, prompts):
    """Like the reference's: columns counted without the padding of the prompt."""
    shifts = [output.prompt_length - len(prompt) for prompt in prompts]
    return [
        [(r.position - shift, r.passage_id) for r in trace]
        for trace, shift in zip(output.retrievals, shifts, strict=True)
    ]


@torch.no_grad()
def check(model, index, prompts, steer, encode_query=None, max_new_tokens=MAX_NEW_TOKENS, max_retrievals=None):
    output, rows = generate(model, index, prompts, steer, max_new_tokens=max_new_tokens, max_retrievals=max_retrievals)
    trace = unpadded_trace(output, prompts)
    for row, prompt in enumerate(prompts):
        ids, passages = reference_generate(model, index, prompt, steer, max_new_tokens, max_retrievals, encode_query)
        assert rows[row] == ids and trace[row] == passages, f"row {row} differs from a recompute of the whole prefix"
        single, (alone,) = generate(
            model, index, [prompt], steer, max_new_tokens=max_new_tokens, max_retrievals=max_retrievals
        )
        assert alone == ids and unpadded_trace(single, [prompt]) == [passages], (
            f"row {row} alone differs from a recompute of the whole prefix"
        )
        assert [r.score for r in single.retrievals[0]] == pytest.approx(
            [r.score for r in output.retrievals[row]], rel=1e-4, abs=1e-4
        )
    return output, trace


@pytest.mark.parametrize("name", PAIRS)
def test_batch_row_and_recompute_agree(name):
    model, tokenizer, index, prompts, steer = setup(name)
    output, trace = check(model, index, prompts, steer)
    # the case is worth its name: different first steps, several retrievals, none, and more than one passage
    first_steps = {row[0][0] - len(prompt) for row, prompt in zip(trace, prompts, strict=True) if row}
    assert trace[-1] == [] and max(map(len, trace)) >= 2 and len(first_steps) >= 3
    assert len({passage for row in trace for _, passage in row}) >= 2
    assert output.num_generated_tokens.tolist() == [MAX_NEW_TOKENS] * len(prompts)


def test_padding_with_the_end_of_sequence_token():
    model, tokenizer, index, prompts, steer = setup(pad=None)
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    _, trace = check(model, index, prompts, steer)
    assert max(map(len, trace)) >= 2


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
    _, trace = check(model, index, prompts, steer, max_retrievals=max_retrievals)
    assert max(map(len, trace)) == max_retrievals


@pytest.mark.parametrize("name", ["llama", "gpt2-llama-wider"])
def test_processors_that_read_the_history_see_the_row_alone(name):
    model, tokenizer, index, prompts, steer = setup(name)
    options = {"repetition_penalty": 1.5, "no_repeat_ngram_size": 3}
    _, rows = generate(model, index, prompts, steer, **options)
    assert rows == [generate(model, index, [prompt], steer, **options)[1][0] for prompt in prompts]
    assert rows != generate(model, index, prompts, steer)[1]


def test_right_padded_prompts():
    model, tokenizer, index, prompts, steer = setup()
    left, rows = generate(model, index, prompts, steer)
    width = max(map(len, prompts))
    input_ids = torch.tensor([ids + [tokenizer.pad_token_id] * (width - len(ids)) for ids in prompts])
    attention_mask = torch.tensor([[1] * len(ids) + [0] * (width - len(ids)) for ids in prompts])
    options = {"max_new_tokens": MAX_NEW_TOKENS, "logits_processor": LogitsProcessorList([steer])}
    right = model.generate(
        input_ids, attention_mask=attention_mask, retriever=index, return_dict_in_generate=True, **options
    )
    assert torch.equal(right.sequences, left.sequences) and max(map(len, rows)) > width
    assert [[r.position for r in trace] for trace in right.retrievals] == [
        [r.position for r in trace] for trace in left.retrievals
    ]


@pytest.mark.parametrize("pooling", ["eos", "mean"])
def test_queries_from_emb_seq(pooling):
    model, tokenizer, index, prompts, steer = setup(query_from="emb_seq", emb_seq_pooling=pooling)

    def encode_query(ids):
        hidden = model.emb_seq(torch.tensor([ids])).last_hidden_state[0]
        return hidden[-1] if pooling == "eos" else hidden.mean(0)

    _, trace = check(model, index, prompts, steer, encode_query)
    assert max(map(len, trace)) >= 2


@pytest.mark.parametrize("query_from", ["emb_seq", "query_encoder"])
def test_queries_from_an_encoder_with_its_own_tokenizer(query_from):
    own = make_tokenizer(
        vocab_size=300, bos="<cls>", eos="<sep>", pad="<nothing>", texts=["Curie painted radium in Warsaw"]
    )
    encoder = make_emb_seq("llama", seed=5) if query_from == "query_encoder" else None
    model, tokenizer, index, prompts, steer = setup(
        query_from=query_from, emb_seq_tokenizer=own, query_encoder=encoder
    )

    def encode_query(ids):
        text = tokenizer.decode(ids, skip_special_tokens=True)
        ids = [
            own.bos_token_id,
            *own(text, add_special_tokens=False, split_special_tokens=True)["input_ids"],
            own.eos_token_id,
        ]
        return (encoder or model.emb_seq)(torch.tensor([ids])).last_hidden_state[0, -1]

    assert model.emb_seq_tokenizer is own
    _, trace = check(model, index, prompts, steer, encode_query)
    assert max(map(len, trace)) >= 2


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "mistral"])
def test_without_nsp_token_id_it_is_plain_gen(architecture):
    """The same tokens as Gen's own generate(), [NSP] and [Cs] treated as any token; the same logits in forward."""
    tokenizer = make_tokenizer()
    model = make_model(architecture, tokenizer=tokenizer)
    index = model.build_index(PASSAGES, show_progress_bar=False)
    inputs = left_pad(
        [encode_prompt(tokenizer, question) + [model.config.nsp_token_id] for question in QUESTIONS],
        tokenizer.pad_token_id,
    )

    class PreferControlTokens(Steer):
        def __call__(self, input_ids, scores):
            scores = super().__call__(input_ids, scores)
            scores[:, model.config.cs_token_id] += 500 * (input_ids[:, -1] == self.nsp)
            return scores

    options = {"max_new_tokens": 16, "logits_processor": LogitsProcessorList([PreferControlTokens(model, 5)])}
    ends = {"eos_token_id": model.generation_config.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    expected = model.gen.generate(**inputs, **ends, do_sample=False, **options)
    assert {model.config.nsp_token_id, model.config.cs_token_id} <= set(
        expected[:, inputs["input_ids"].shape[1] :].flatten().tolist()
    )
    assert torch.equal(model.generate(**inputs, nsp_token_id=None, **options), expected)
    assert torch.equal(model.generate(**inputs, nsp_token_id=None, retriever=index, **options), expected)
    with torch.no_grad():
        output = model(**inputs, nsp_token_id=None)
        torch.testing.assert_close(output.logits, model.gen(**inputs).logits, rtol=0, atol=1e-6)
    assert output.query_embeds is None
