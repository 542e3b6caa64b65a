"""A model with two towers and random weights, and random training instances for it: nothing is downloaded."""

import random
from collections.abc import Sequence
from typing import Any

import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from modeling_cosup import CoSupForCausalLM

from random_world import SHAPES, make_tokenizer, random_words

# as in instances of NQ, FEVER and their kin: tokens of a passage, and how many passages an instance has
PASSAGE_LENGTHS = {"median": 45, "min": 20, "max": 200}
SIGMA = 0.5  # of the logarithm of a passage's length
NUM_PASSAGES = {0: 0.1, 1: 0.65, 2: 0.2, 3: 0.05}
INPUT_LENGTHS = (8, 24)
TEXT_LENGTHS = (5, 30)


def random_two_towers(shape: str, seed: int, device: torch.device) -> CoSupForCausalLM:
    """Return a model in float32 whose Gen and Emb_seq are two random Llamas of one shape of [`SHAPES`]."""
    torch.manual_seed(seed)
    config = AutoConfig.for_model("llama", max_position_embeddings=4096, tie_word_embeddings=True, **SHAPES[shape])
    tokenizer = make_tokenizer(random_words(seed))
    gen = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    emb_seq = AutoModel.from_config(config, dtype=torch.float32)
    return CoSupForCausalLM.from_gen_and_emb_seq(gen, emb_seq, tokenizer, emb_seq_tokenizer=tokenizer).to(device)


def random_instances(tokenizer: Any, count: int, seed: int) -> list[dict[str, Any]]:
    """
    Return instances of random words. Their lengths vary as in real data.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): says how many words make a given number of tokens.
        count (`int`), seed (`int`): of the instances.
    """
    words = random_words(seed)
    rng = random.Random(seed + 1)
    tokens_per_word = len(tokenizer(" ".join(words))["input_ids"]) / len(words)
    instances = []
    for number in range(count):
        (num_passages,) = rng.choices(list(NUM_PASSAGES), list(NUM_PASSAGES.values()))
        segments: list[dict[str, Any]] = []
        for segment in range(num_passages):
            length = PASSAGE_LENGTHS["median"] * rng.lognormvariate(0, SIGMA)
            length = min(max(length, PASSAGE_LENGTHS["min"]), PASSAGE_LENGTHS["max"])
            passage_id = f"p{number}-{segment}"
            text = " ".join(rng.choices(words, k=round(length / tokens_per_word)))
            passage = {"id": passage_id, "title": rng.choice(words), "text": text}
            segments.append({"text": text_of(words, TEXT_LENGTHS, tokens_per_word, rng), "passage": passage})
        if not segments:
            segments.append({"text": text_of(words, TEXT_LENGTHS, tokens_per_word, rng), "passage": None})
        question = text_of(words, INPUT_LENGTHS, tokens_per_word, rng)
        instances.append({"id": f"i{number}", "dataset": "random", "input": question, "segments": segments})
    return instances


def text_of(words: Sequence[str], lengths: tuple[int, int], tokens_per_word: float, rng: random.Random) -> str:
    """Return random words that have about as many tokens as a length between the two `lengths`."""
    num_words = max(1, round(rng.randint(*lengths) / tokens_per_word))
    return " ".join(rng.choices(words, k=num_words))
