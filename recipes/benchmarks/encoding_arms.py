"""Encode passages with the same weights by `PassageIndex.build` and by sentence-transformers; make such passages."""

import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from modeling_cosup import CoSupForCausalLM
from modeling_cosup.tokenization_cosup import encode_passages_for_emb_seq

SENTENCE_TRANSFORMERS = importlib.util.find_spec("sentence_transformers") is not None


def encoding_arms(
    model: CoSupForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    passages: list[dict[str, str]],
    folder: Path,
    batch_sizes: Sequence[int] = (32,),
) -> dict[str, Callable[[], torch.Tensor]]:
    """
    Return functions that embed all passages, by the name of the arm.

    They read the same token ids with the same weights, dtype and device. They return embeddings `(M, h)` of unit
    length, float32 on the CPU.

    Args:
        model (`CoSupForCausalLM`): with a causal Emb_seq that is read at EOS, and cosine similarity.
        tokenizer (`PreTrainedTokenizerBase`): Emb_seq's, as it was before the control tokens.
        passages (`list[dict]`): `{"id", "title", "text"}`.
        folder (`Path`): where Emb_seq is saved for sentence-transformers, which loads it from there.
        batch_sizes (`Sequence[int]`): passages of a forward of sentence-transformers; the first makes the arm
            "sentence-transformers" (32 is its default), each other an arm of its own. Ours cuts batches by tokens.
    """
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer

    model.emb_seq.save_pretrained(folder / "emb_seq")
    tokenizer.chat_template = None  # sentence-transformers would wrap every text in it
    tokenizer.save_pretrained(folder / "emb_seq")
    dtype = {"dtype": model.emb_seq.dtype}
    transformer = Transformer(str(folder / "emb_seq"), max_seq_length=2048, model_kwargs=dtype)
    pooling = Pooling(model.config.embedding_size, "lasttoken")
    reference = SentenceTransformer(modules=[transformer, pooling], device=str(model.device))
    # with BOS and EOS as text, which sentence-transformers' tokenizer turns into these tokens
    texts = model.emb_seq_tokenizer.batch_decode(
        encode_passages_for_emb_seq(model.emb_seq_tokenizer, passages, model.config)
    )

    def encode(batch_size: int) -> torch.Tensor:
        options = {"convert_to_tensor": True, "normalize_embeddings": True, "show_progress_bar": False}
        return reference.encode(texts, batch_size=batch_size, **options).float().cpu()

    arms: dict[str, Callable[[], torch.Tensor]] = {}
    for batch_size in batch_sizes:
        name = f"sentence-transformers, batches of {batch_size}" if arms else "sentence-transformers"
        arms[name] = lambda batch_size=batch_size: encode(batch_size)
    arms["PassageIndex.build"] = lambda: model.build_index(passages, show_progress_bar=False).embeddings
    return arms


def synthetic_passages(count: int) -> list[dict[str, str]]:
    """Return passages of 10 to 200 English-looking words, most of them about 80."""
    random = np.random.default_rng(0)
    words = "the city painted river was in born discovered of and Amsterdam physicist 1898 long who a".split()
    lengths = random.lognormal(4.4, 0.5, count).clip(10, 200).astype(int)
    return [
        {"id": str(i), "title": f"Title {i}", "text": " ".join(random.choice(words, length))}
        for i, length in enumerate(lengths)
    ]


def tiny_model(folder: Path) -> str:
    """Save a random causal language model of two layers with a word-level tokenizer; return its path."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

    tokens = ["<unk>", "<s>", "</s>", *map(str, range(1000)), "the", "city", "was", "in", "of", "and", "a"]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    special_tokens = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>"}
    PreTrainedTokenizerFast(tokenizer_object=backend, **special_tokens).save_pretrained(folder)
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
    config = AutoConfig.for_model("llama", max_position_embeddings=512, vocab_size=len(vocabulary), **sizes)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return str(folder)
