"""The tokenizer and the models of the quickstart: tiny Llamas, Gen with a copy drill, and further encoders."""

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
    A lossless WordPiece tokenizer of about 400 pieces, the same for every seed; "▁" stands for a space.

    A word of the templates is one piece ("▁born"), a name its syllables ("▁Ta" "the" "kro"), a year its digits,
    anything else its characters. `<s>`, `</s>` and `<pad>` are added tokens only, so that no text encodes to
    their ids under `split_special_tokens=True`.
    """
    templates = [
        part for *_, wordings, questions, answer in PERSON + PLACE for part in (*wordings, *questions, answer)
    ]
    templates += [part for pair in NO_PASSAGE.values() for part in pair]
    words = re.findall("[A-Za-z]+", re.sub("{.}", "", " ".join(templates)))
    words += [*JOBS, *INSTRUMENTS, *GOODS, *CYCLES, *CYCLES["day"], *CYCLES["month"]]
    words += ["He", "She", "It", *string.digits]
    pieces = ["<unk>", *string.printable[:95], "\n", "▁", *SYLLABLES]
    pieces += ["▁" + word for word in words + [syllable.capitalize() for syllable in SYLLABLES]]
    pieces += ["▁::", "▁##", "##", "▁Input", "▁Output", ":\n\n"]  # of prompts
    pieces += [word for word in words if word[0].isupper()]  # a question begins after "\n\n"
    vocab = {piece: i for i, piece in enumerate(dict.fromkeys(pieces))}
    tokenizer = Tokenizer(models.WordPiece(vocab, unk_token="<unk>", continuing_subword_prefix=""))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    names = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, model_max_length=256, clean_up_tokenization_spaces=False, **names
    )


def write_models(folder: Path, seed: int, drill_max_steps: int) -> None:
    """
    Write gen/ and emb_seq/: the same untrained weights, and for Gen the copy drill.

    Drilled weights make a poor Emb_seq.
    """
    tokenizer = build_tokenizer()
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    shape: dict[str, Any] = {
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 256,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = LlamaConfig(vocab_size=len(tokenizer), tie_word_embeddings=True, **shape, **ids)
        model = LlamaForCausalLM(config)  # 0.4M parameters
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
    Train Gen, in place, to copy: `<s> x </s> gap </s> x` on random tokens, with the loss on the second x.

    The lengths of x and gap change at every step: looking for what followed the last time solves it, looking at a
    fixed distance does not.
    Ends once the mean loss of 20 steps is below `target` nats, typically after about 500 steps.
    """
    optimizer = torch.optim.AdamW(gen.parameters(), lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 50))
    bos, eos = (torch.full((batch_size, 1), token_id) for token_id in (tokenizer.bos_token_id, tokenizer.eos_token_id))
    losses = []
    for _ in (progress := tqdm(range(max_steps), desc="Copy drill, ends early")):
        n, gap = rng.randint(8, 24), rng.randint(0, 20)
        x, noise = torch.randint(1, tokenizer.vocab_size, (batch_size, n + gap)).split([n, gap], dim=1)  # 0 is <unk>
        input_ids = torch.cat([bos, x, eos, noise, eos, x], dim=1)  # (B, 2n + gap + 3)
        hidden = gen.model(input_ids, use_cache=False).last_hidden_state  # (B, 2n + gap + 3, h)
        loss = F.cross_entropy(gen.lm_head(hidden[:, -n - 1 : -1]).flatten(0, 1), x.flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(gen.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        mean = sum(losses[-20:]) / len(losses[-20:])
        progress.set_postfix(loss=f"{mean:.2f}", refresh=False)
        if len(losses) >= 20 and mean < target:
            return
    warnings.warn(
        f"The copy drill ended after {max_steps} steps above its target loss of {target}: "
        "answers will be copied less well.",
        stacklevel=2,
    )


# ---------------------------------------------------------------------- further encoders


def write_encoders(world: Path, folder: Path, seed: int, retriever_steps: int) -> None:
    """
    Write the three encoders, each with the tokenizer of the world.

    Args:
        world (`Path`): a folder of [`write_models`].
        folder (`Path`): it exists.
        seed (`int`): of all weights and of the retriever's own world.
        retriever_steps (`int`): training steps of the retriever.
    """
    tokenizer = AutoTokenizer.from_pretrained(world / "gen")
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    shape: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "num_attention_heads": 4,
        "max_position_embeddings": 256,
        **ids,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        small = LlamaModel(LlamaConfig(hidden_size=64, intermediate_size=128, num_hidden_layers=1, **shape))
        config = BertConfig(hidden_size=128, intermediate_size=256, num_hidden_layers=2, **shape)
        bert, retriever = (BertModel(config, add_pooling_layer=False) for _ in range(2))
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
    Train an encoder, in place, to tell which two pieces were cut out of one passage.

    The negatives of a piece are the other pieces of the batch.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 50))
    world = World(f"retriever {rng.random()}")
    model.train()
    for _ in (progress := tqdm(range(steps), desc="General retriever")):
        passages = [world.entity("train")[0] for _ in range(batch_size)]
        texts = tokenizer([f"{x['title']} :: {x['text']}" for x in passages], add_special_tokens=False)["input_ids"]
        pieces = [embed(model, tokenizer, [cut(ids, rng) for ids in texts]) for _ in range(2)]
        loss = info_nce(*pieces, torch.arange(batch_size), temperature=temperature).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        progress.set_postfix(loss=f"{loss.item():.2f}", refresh=False)
    model.eval()


def cut(ids: list[int], rng: random.Random) -> list[int]:
    """A run of between a quarter of the token ids and all of them."""
    length = rng.randint(max(1, len(ids) // 4), len(ids))
    start = rng.randint(0, len(ids) - length)
    return ids[start : start + length]


def embed(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: list[list[int]]) -> torch.Tensor:
    """Unit means of the last hidden states of BOS + ids + EOS: `torch.FloatTensor` of shape `(len(rows), h)`."""
    rows = [[tokenizer.bos_token_id, *ids, tokenizer.eos_token_id] for ids in rows]
    batch = tokenizer.pad({"input_ids": rows}, return_tensors="pt")
    hidden, mask = model(**batch).last_hidden_state, batch["attention_mask"][..., None]  # (B, T, h), (B, T, 1)
    return torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)
