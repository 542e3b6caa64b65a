"""Tokenizer and models of the quickstart: tiny Llamas, a copy drill for Gen, and further encoders."""

import random
import re
import string
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from tqdm import tqdm
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from modeling_cosup import info_nce

from shared.quickstart_world import CYCLES, GOODS, INSTRUMENTS, JOBS, NO_PASSAGE, PERSON, PLACE, SYLLABLES, World

ENCODERS = ("emb_seq_small", "emb_seq_bert", "retriever")


def build_tokenizer() -> PreTrainedTokenizerFast:
    """
    Return a lossless WordPiece tokenizer of about 400 pieces, the same for every seed; "▁" is a space.

    A word of the templates is one piece ("▁born"). A name is split into syllables ("▁Ta" "the" "kro"), a year into
    digits, anything else into characters. `<s>`, `</s>` and `<pad>` are added tokens only, so that no text encodes to
    their ids under `split_special_tokens=True`.
    """
    templates: list[str] = []
    for _, wordings, questions, answer in PERSON + PLACE:
        templates += [*wordings, *questions, answer]
    for question, answer in NO_PASSAGE.values():
        templates += [question, answer]
    words = re.findall("[A-Za-z]+", re.sub("{.}", "", " ".join(templates)))
    words += [*JOBS, *INSTRUMENTS, *GOODS, *CYCLES, *CYCLES["day"], *CYCLES["month"]]
    words += ["He", "She", "It", *string.digits]
    pieces = ["<unk>", *string.printable[:95], "\n", "▁", *SYLLABLES]
    pieces += ["▁" + word for word in words + [syllable.capitalize() for syllable in SYLLABLES]]
    pieces += ["▁::", "▁##", "##", "▁Input", "▁Output", ":\n\n"]  # of prompts
    pieces += [word for word in words if word[0].isupper()]  # a question begins after "\n\n"
    vocab = {piece: i for i, piece in enumerate(dict.fromkeys(pieces))}
    tokenizer = Tokenizer(models.WordPiece(vocab, unk_token="<unk>", continuing_subword_prefix=""))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    special_tokens = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, model_max_length=256, clean_up_tokenization_spaces=False, **special_tokens
    )


def special_token_ids(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """Return the special token ids, as a model config names them."""
    return {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}


def write_models(folder: Path, seed: int, drill_max_steps: int) -> None:
    """
    Write gen/ and emb_seq/, which start from the same weights.

    Only Gen runs the copy drill, because drilled weights make a poor Emb_seq.
    """
    tokenizer = build_tokenizer()
    shape: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 512,  # a prompt with five passages has about 250 tokens
        **special_token_ids(tokenizer),
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(LlamaConfig(tie_word_embeddings=True, **shape))  # 0.4M parameters
        model.save_pretrained(folder / "emb_seq")
        if drill_max_steps:
            copy_drill(model, tokenizer, random.Random(seed), drill_max_steps)
        model.save_pretrained(folder / "gen")
    for name in ("emb_seq", "gen"):
        tokenizer.save_pretrained(folder / name)


def copy_drill(
    gen: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    rng: random.Random,
    max_steps: int,
    batch_size: int = 32,
    learning_rate: float = 2e-3,
    target: float = 0.1,
) -> None:
    """
    Train Gen, in place, to copy: `<s> words </s> gap </s> words` on random tokens, with the loss on the second words.

    The lengths of words and gap change at every step. Gen must therefore look for what followed the same token before;
    looking back a fixed distance does not help. The drill ends when the mean loss of 20 steps is below `target` nats,
    typically after about 500 steps.
    """
    optimizer = torch.optim.AdamW(gen.parameters(), lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 50))
    bos = torch.full((batch_size, 1), tokenizer.bos_token_id)
    eos = torch.full((batch_size, 1), tokenizer.eos_token_id)
    losses = []
    progress = tqdm(range(max_steps), desc="Copy drill, ends early")
    for _ in progress:
        length = rng.randint(8, 24)
        gap_length = rng.randint(0, 20)
        tokens = torch.randint(1, tokenizer.vocab_size, (batch_size, length + gap_length))  # without 0, which is <unk>
        words, gap = tokens.split([length, gap_length], dim=1)
        input_ids = torch.cat([bos, words, eos, gap, eos, words], dim=1)  # (B, T)
        hidden = gen.model(input_ids, use_cache=False).last_hidden_state  # (B, T, h)
        logits = gen.lm_head(hidden[:, -length - 1 : -1])  # (B, length, V)
        loss = F.cross_entropy(logits.flatten(0, 1), words.flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(gen.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        last_losses = losses[-20:]
        mean_loss = sum(last_losses) / len(last_losses)
        progress.set_postfix(loss=f"{mean_loss:.2f}", refresh=False)
        if len(losses) >= 20 and mean_loss < target:
            return
    warnings.warn(
        f"The copy drill ended after {max_steps} steps above its target loss of {target}: "
        "Gen will copy answers less well.",
        stacklevel=2,
    )


# ---------------------------------------------------------------------- further encoders


def write_encoders(world: Path, folder: Path, seed: int, retriever_steps: int) -> None:
    """
    Write the three encoders, each with the tokenizer of the world.

    Args:
        world (`Path`): the folder of a world, in which [`write_models`] has written the tokenizer.
        folder (`Path`): an existing folder.
        seed (`int`): seed of all weights, and of the world that the retriever trains on.
        retriever_steps (`int`): training steps of the retriever.
    """
    tokenizer = AutoTokenizer.from_pretrained(world / "gen")
    shape: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "num_attention_heads": 4,
        "max_position_embeddings": 256,
        **special_token_ids(tokenizer),
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        small = LlamaModel(LlamaConfig(hidden_size=64, intermediate_size=128, num_hidden_layers=1, **shape))
        config = BertConfig(hidden_size=128, intermediate_size=256, num_hidden_layers=2, **shape)
        bert = BertModel(config, add_pooling_layer=False)
        retriever = BertModel(config, add_pooling_layer=False)
        train_retriever(retriever, tokenizer, random.Random(seed), retriever_steps)
    for name, model in zip(ENCODERS, (small, bert, retriever), strict=True):
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)


def train_retriever(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rng: random.Random,
    steps: int,
    batch_size: int = 64,
    learning_rate: float = 1e-3,
    temperature: float = 0.05,
) -> None:
    """
    Train an encoder, in place, to recognise which two pieces were cut out of the same passage.

    The negatives of a piece are the pieces of the other passages of the batch.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 50))
    world = World(f"retriever {rng.random()}")
    model.train()
    progress = tqdm(range(steps), desc="General retriever")
    for _ in progress:
        passages = [world.entity("train")[0] for _ in range(batch_size)]
        texts = [f"{passage['title']} :: {passage['text']}" for passage in passages]
        rows = tokenizer(texts, add_special_tokens=False)["input_ids"]
        first_pieces = embed(model, tokenizer, [cut(ids, rng) for ids in rows])  # (B, h)
        second_pieces = embed(model, tokenizer, [cut(ids, rng) for ids in rows])  # (B, h)
        loss = info_nce(first_pieces, second_pieces, torch.arange(batch_size), temperature=temperature).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        progress.set_postfix(loss=f"{loss.item():.2f}", refresh=False)
    model.eval()


def cut(ids: list[int], rng: random.Random) -> list[int]:
    """Draw a run of consecutive token ids: a quarter of them, all of them, or any number in between."""
    length = rng.randint(max(1, len(ids) // 4), len(ids))
    start = rng.randint(0, len(ids) - length)
    return ids[start : start + length]


def embed(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: list[list[int]]) -> torch.Tensor:
    """Return the mean last hidden states of BOS + ids + EOS, of unit length: `torch.FloatTensor`, `(len(rows), h)`."""
    rows = [[tokenizer.bos_token_id, *ids, tokenizer.eos_token_id] for ids in rows]
    batch = tokenizer.pad({"input_ids": rows}, return_tensors="pt")
    hidden = model(**batch).last_hidden_state  # (B, T, h)
    mask = batch["attention_mask"][..., None]  # (B, T, 1)
    return F.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)
