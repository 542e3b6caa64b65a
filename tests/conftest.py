"""Tiny random models of real architectures and a tiny real tokenizer, shared by all tests."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing here needs a hub

import pytest
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, LogitsProcessor, PreTrainedTokenizerFast

from modeling_cosup import CoSupForCausalLM
from modeling_cosup.tokenization_cosup import pad_rows

torch.set_num_threads(1)  # the models are tiny: threads would only wait for each other

TEXTS = [
    "Rembrandt painted the Night Watch in 1642 in Amsterdam.",
    "Marie Curie was a physicist and chemist who was born in Warsaw.",
    "The Night Watch is a painting; who painted it? When was it finished?",
    "## Input:\n\nwho discovered radium?## Output:\n\nMarie Curie discovered radium in 1898.",
]
PASSAGES = [
    {"id": f"p{i}", "title": title, "text": text}
    for i, (title, text) in enumerate(
        [
            ("Night Watch", "The Night Watch was painted by Rembrandt in 1642."),
            ("Marie Curie", "Marie Curie discovered radium and polonium."),
            ("", "A passage without a title, about nothing at all."),
            ("Amsterdam", "Amsterdam is a city."),
            ("Warsaw", "Warsaw is the city where Marie Curie was born in 1867, and a long passage about it needs a few more words than this."),
            ("Control [NSP] tokens </s>", "A text may hold [NSP] and [CE] and </s> and [Cs] as characters."),
        ]
    )
]
ARCHITECTURES = {
    "llama": {"num_key_value_heads": 2, "intermediate_size": 64, "tie_word_embeddings": True},
    "gpt2": {"n_inner": 64},
    "mistral": {"num_key_value_heads": 2, "intermediate_size": 64, "sliding_window": 8, "head_dim": 8},
    "qwen3": {"num_key_value_heads": 2, "intermediate_size": 64, "head_dim": 8},
    "gemma2": {"num_key_value_heads": 2, "intermediate_size": 64, "head_dim": 8, "sliding_window": 8},
    "gptj": {"rotary_dim": 4, "n_inner": 64},
    "phi3": {"num_key_value_heads": 2, "intermediate_size": 64, "sliding_window": 8},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": 8, "num_layers": 2, "num_heads": 4},
    "bloom": {},
    "mamba": {"state_size": 4},
    "bert": {"intermediate_size": 64},
    "modernbert": {"intermediate_size": 64},
}


def make_tokenizer(vocab_size=384, bos="<s>", eos="</s>", pad="<pad>", texts=TEXTS):
    """A byte-level BPE tokenizer, trained on the spot; BOS, EOS and pad are special tokens outside its ordinary vocabulary."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False)
    backend.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=bos, eos_token=eos, pad_token=pad)


def make_config(architecture="llama", vocab_size=400, hidden_size=32, layers=2, **kwargs):
    options = {"vocab_size": vocab_size, "hidden_size": hidden_size, "num_hidden_layers": layers, "num_attention_heads": 4}
    options |= {"max_position_embeddings": 512, "initializer_range": 0.2, "pad_token_id": None, "bos_token_id": None, "eos_token_id": None}
    return AutoConfig.for_model(architecture, **{**options, **ARCHITECTURES[architecture], **kwargs})


def make_gen(architecture="llama", seed=0, **kwargs):
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(make_config(architecture, **kwargs)).eval()


def make_emb_seq(architecture="llama", seed=1, **kwargs):
    torch.manual_seed(seed)
    return AutoModel.from_config(make_config(architecture, **kwargs)).eval()


def make_model(gen="llama", emb_seq="llama", tokenizer=None, gen_kwargs=None, emb_seq_kwargs=None, **config):
    """A CoSup model of random weights whose Gen and Emb_seq have the architectures named."""
    tokenizer = tokenizer or make_tokenizer()
    gen = make_gen(gen, **(gen_kwargs or {}))
    return CoSupForCausalLM.from_gen_and_emb_seq(gen, make_emb_seq(emb_seq, **(emb_seq_kwargs or {})), tokenizer=tokenizer, **config)


@pytest.fixture
def tokenizer():
    return make_tokenizer()


@pytest.fixture
def model(tokenizer):
    return make_model(tokenizer=tokenizer)


@pytest.fixture
def passages():
    return [dict(passage) for passage in PASSAGES]


def plain_batch(rows):
    """A padded batch made the plain way, one passage row for each `[NSP]`."""
    input_ids, attention_mask = pad_rows([row["input_ids"] for row in rows])
    passage_input_ids, passage_attention_mask = pad_rows([ids for row in rows for ids in row["passage_input_ids"]])
    return {
        "input_ids": input_ids,
        "attention_mask": attention_mask,
        "labels": pad_rows([row["labels"] for row in rows], -100)[0],
        "passage_input_ids": passage_input_ids,
        "passage_attention_mask": passage_attention_mask,
        "passage_labels": torch.arange(len(passage_input_ids)),
    }


class Steer(LogitsProcessor):
    """
    Makes a random model retrieve at different steps, in some rows several times, in others never.

    The rule reads nothing but the row's own tokens (its last one, how many there are, and whether it holds `quiet_id`), so it means the
    same for a row alone, a row of a padded batch and a recompute of the whole prefix.
    """

    def __init__(self, model, retrieve_every=7, end_every=None, quiet_id=-1):
        self.nsp, self.pad = model.config.nsp_token_id, model.generation_config.pad_token_id
        self.ends = model.generation_config.eos_token_id
        self.retrieve_every, self.end_every, self.quiet_id = retrieve_every, end_every, quiet_id

    def __call__(self, input_ids, scores):
        scores = scores.clone()
        scores[:, self.pad] = float("-inf")  # else real pad tokens could not be told from padding
        for row, ids in enumerate(input_ids):
            clock = 31 * int(ids[-1]) + int((ids != self.pad).sum())
            if clock % self.retrieve_every == 0 and not (ids == self.quiet_id).any():
                scores[row, self.nsp] += 1000
            if self.end_every and clock % self.end_every == 1:
                scores[row, self.ends] += 2000
        return scores


def reference_generate(model, index, input_ids, steer, max_new_tokens, max_retrievals=None, encode_query=None):
    """Greedy generation of one row the slow way: the whole prefix through Gen for every token, no cache. Its ids, and (column, passage id) pairs."""
    config, ids, trace, generated = model.config, list(input_ids), [], 0
    while True:
        hidden = model.gen.base_model(torch.tensor([ids]), use_cache=False).last_hidden_state[0, -1]
        exhausted = max_retrievals is not None and len(trace) >= max_retrievals
        if ids[-1] == config.nsp_token_id and not exhausted:
            query = hidden if encode_query is None else encode_query(ids)
            query = F.normalize(query, dim=-1) if config.similarity == "cosine" else query
            passage = index[int((index.embeddings @ query).argmax())]
            trace.append((len(ids) - 1, passage["id"]))
            ids += passage["input_ids"] + [config.cs_token_id]
            continue
        scores = steer(torch.tensor([ids]), model.gen.get_output_embeddings()(hidden)[None])[0]
        scores[[config.cs_token_id] + [config.nsp_token_id] * exhausted] = float("-inf")
        ids.append(int(scores.argmax()))
        generated += 1
        if generated == max_new_tokens or ids[-1] in model.generation_config.eos_token_id:
            return ids, trace


def left_pad(prompts, pad):
    """`input_ids` and `attention_mask` of prompts of different lengths, padded on the left."""
    width = max(map(len, prompts))
    input_ids = torch.tensor([[pad] * (width - len(ids)) + list(ids) for ids in prompts])
    attention_mask = torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in prompts])
    return {"input_ids": input_ids, "attention_mask": attention_mask}


def real_tokens(output, attention_mask, pad):
    """Each row of `sequences` as a list without padding (the prompt's by its mask, on the right by the pad id)."""
    rows = []
    for sequence, mask in zip(output.sequences, attention_mask, strict=True):
        prompt, continuation = sequence[: output.prompt_length][mask.bool()], sequence[output.prompt_length :]
        rows.append(prompt.tolist() + continuation[continuation != pad].tolist())
    return rows


def assert_same_retrievals(found, expected):
    """Two traces of a batch: the same passages at the same places; scores may differ by a rounding (weights lie elsewhere in memory)."""
    for ours, theirs in zip(found, expected, strict=True):
        for first, second in zip(ours, theirs, strict=True):
            assert (first.row, first.position, first.passages, first.grounded_span) == (second.row, second.position, second.passages, second.grounded_span)
            assert first.scores == pytest.approx(second.scores, abs=1e-5)
