"""Tiny random models of real architectures, a tiny real tokenizer, and passages, shared by all tests."""

from collections.abc import Sequence
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from modeling_cosup import CoSupForCausalLM
from modeling_cosup.architectures_cosup import encoder_from_config
from modeling_cosup.packing_cosup import pad_rows

TEXTS = [
    "Rembrandt painted the Night Watch in 1642 in Amsterdam.",
    "Marie Curie was a physicist and chemist who was born in Warsaw.",
    "The Night Watch is a painting; who painted it? When was it finished?",
    "## Input:\n\nwho discovered radium?## Output:\n\nMarie Curie discovered radium in 1898.",
]
TITLES_AND_TEXTS = [
    ("Night Watch", "The Night Watch was painted by Rembrandt in 1642."),
    ("Marie Curie", "Marie Curie discovered radium and polonium."),
    ("", "A passage without a title, about nothing at all."),
    ("Amsterdam", "Amsterdam is a city."),
    (
        "Warsaw",
        "Warsaw is the city where Marie Curie was born in 1867, and a long passage about it needs a few more words"
        " than this.",
    ),
    ("Control [NSP] tokens </s>", "A text may hold [NSP] and [CE] and </s> and [Cs] as characters."),
]
PASSAGES = [{"id": f"p{i}", "title": title, "text": text} for i, (title, text) in enumerate(TITLES_AND_TEXTS)]
ARCHITECTURES = {
    "llama": {"num_key_value_heads": 2, "intermediate_size": 64, "tie_word_embeddings": True},
    "gpt2": {"n_inner": 64},
    "mistral": {"num_key_value_heads": 2, "intermediate_size": 64, "sliding_window": 8, "head_dim": 8},
    "mixtral": {"num_key_value_heads": 2, "intermediate_size": 64, "num_local_experts": 4},
    "qwen2": {"num_key_value_heads": 2, "intermediate_size": 64},
    "qwen3": {"num_key_value_heads": 2, "intermediate_size": 64, "head_dim": 8},
    "gemma2": {"num_key_value_heads": 2, "intermediate_size": 64, "head_dim": 8, "sliding_window": 8},
    "gptj": {"rotary_dim": 4, "n_inner": 64},
    "phi3": {"num_key_value_heads": 2, "intermediate_size": 64, "sliding_window": 8},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": 8, "num_layers": 2, "num_heads": 4},
    "bloom": {},
    "mamba": {"state_size": 4},
    "lfm2": {"num_key_value_heads": 2, "intermediate_size": 64, "layer_types": ["conv", "full_attention"]},
    "bert": {"intermediate_size": 64},
    "longformer": {"intermediate_size": 64, "attention_window": 8, "max_position_embeddings": 514, "pad_token_id": 1},
    "gemma3": {"num_key_value_heads": 2, "intermediate_size": 64, "head_dim": 8, "sliding_window": 8},
    "roberta": {"intermediate_size": 64},
    "modernbert": {"intermediate_size": 64},
    "recurrent_gemma": {"block_types": ["recurrent", "attention"], "lru_width": 32, "intermediate_size": 64},
    "t5": {"d_ff": 64, "d_kv": 8},
}
# what models that also read images need; their other options are those of the text model
WITH_IMAGES = {
    "gemma3": {
        "vision_config": {
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "image_size": 28,
            "patch_size": 14,
        },
        "mm_tokens_per_image": 1,
        "image_token_index": 399,
    }
}


def make_tokenizer(
    vocab_size: int = 384,
    bos: str | None = "<s>",
    eos: str | None = "</s>",
    pad: str | None = "<pad>",
    texts: Sequence[str] = TEXTS,
) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer on the spot, with BOS, EOS and pad outside its ordinary vocabulary."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=bos, eos_token=eos, pad_token=pad)


def make_config(
    architecture: str = "llama", vocab_size: int = 400, hidden_size: int = 32, layers: int = 2, **kwargs: Any
) -> PreTrainedConfig:
    """Return the config of a tiny model; `kwargs` are options of the architecture."""
    options = {
        "vocab_size": vocab_size,
        "hidden_size": hidden_size,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "max_position_embeddings": 512,
        "initializer_range": 0.2,
        "pad_token_id": None,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    options |= ARCHITECTURES[architecture] | kwargs
    if architecture in WITH_IMAGES:
        return AutoConfig.for_model(architecture, text_config=options, **WITH_IMAGES[architecture])
    return AutoConfig.for_model(architecture, **options)


def make_gen(architecture: str = "llama", seed: int = 0, **kwargs: Any) -> PreTrainedModel:
    """Return a causal language model with random weights."""
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(make_config(architecture, **kwargs)).eval()


def make_emb_seq(architecture: str = "llama", seed: int = 1, **kwargs: Any) -> PreTrainedModel:
    """Return a model with random weights and without an LM head."""
    torch.manual_seed(seed)
    return encoder_from_config(make_config(architecture, **kwargs)).eval()


def make_model(
    gen: str = "llama",
    emb_seq: str = "llama",
    tokenizer: PreTrainedTokenizerFast | None = None,
    gen_kwargs: dict[str, Any] | None = None,
    emb_seq_kwargs: dict[str, Any] | None = None,
    **config: Any,
) -> CoSupForCausalLM:
    """Return a CoSup model with random weights; Gen and Emb_seq have the named architectures, unless they are tied."""
    tokenizer = tokenizer or make_tokenizer()
    gen_model = make_gen(gen, **(gen_kwargs or {}))
    emb_seq_model = None
    if not config.get("tie_emb_seq"):
        emb_seq_model = make_emb_seq(emb_seq, **(emb_seq_kwargs or {}))
    return CoSupForCausalLM.from_gen_and_emb_seq(gen_model, emb_seq_model, tokenizer=tokenizer, **config)


def plain_batch(rows: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Return a padded batch with one passage row for each `[NSP]`."""
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
