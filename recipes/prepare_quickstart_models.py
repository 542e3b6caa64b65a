"""
Further encoders for a world of prepare_quickstart.py, with its tokenizer.

    python recipes/prepare_quickstart_models.py --world data/quickstart --output_dir data/quickstart-models

Written under `output_dir`:
    emb_seq_small/   as the world's Emb_seq, but one layer of half the width, untrained
    emb_seq_bert/    another architecture, which reads in both directions, untrained
    retriever/       the same, trained as a general retriever: of two pieces cut out of one passage, each must find the other. Its passages are those of
                     another world, so it knows how names and sentences look, not who is who here. Pooling: mean.
    models.json      the settings
"""

import argparse
import inspect
import json
import os
import random
import shutil
import tempfile
from pathlib import Path

import torch
from prepare_quickstart import World
from tqdm import tqdm
from transformers import AutoTokenizer, BertConfig, BertModel, LlamaConfig, LlamaModel

from modeling_cosup import info_nce
from modeling_cosup.files_cosup import digest_file, read_json, write_json

NAMES = ("emb_seq_small", "emb_seq_bert", "retriever")


def prepare_models(world: str, output_dir: str, seed: int = 0, retriever_steps: int = 400) -> dict[str, str]:
    """
    Write the encoders under `output_dir`, or reuse those that this file made of the same world with the same settings.

    Args:
        world (`str`): a folder of prepare_quickstart.py.
        output_dir (`str`): other encoders of this script there are replaced; a folder that holds anything else is refused.
        seed (`int`): of all weights and of the retriever's own world.
        retriever_steps (`int`): training steps of the retriever, each of 64 passages.

    Returns:
        `dict[str, str]`: the path of each.

    Raises:
        `FileExistsError`: for such a folder.
    """
    settings = {"seed": seed, "retriever_steps": retriever_steps, "world": read_json(Path(world, "world.json"))}
    settings["code"] = digest_file(__file__)
    output, names = Path(output_dir), {*NAMES, "models.json"}
    found = set(os.listdir(output)) if output.exists() else set()
    if found not in (set(), names):
        raise FileExistsError(f"{output} holds other things than encoders of this script: choose another folder, or remove it.")
    if not found or read_json(output / "models.json") != settings:
        output.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f"{output.name}.", dir=output.parent) as temporary, torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            made = Path(temporary, output.name)
            write_models(AutoTokenizer.from_pretrained(Path(world, "gen")), made, seed, retriever_steps)
            write_json(made / "models.json", settings)
            shutil.rmtree(output, ignore_errors=True)
            made.rename(output)  # complete, or not there at all
    return {name: str(output / name) for name in NAMES}


def write_models(tokenizer, folder, seed, retriever_steps):
    """Write the three encoders, each with the tokenizer."""
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    shape = {"vocab_size": len(tokenizer), "num_attention_heads": 4, "max_position_embeddings": 256, **ids}
    small = LlamaModel(LlamaConfig(hidden_size=64, intermediate_size=128, num_hidden_layers=1, **shape))
    bert, retriever = (BertModel(BertConfig(hidden_size=128, intermediate_size=256, num_hidden_layers=2, **shape), add_pooling_layer=False) for _ in range(2))
    train_retriever(retriever, tokenizer, random.Random(seed), retriever_steps)
    for name, model in zip(NAMES, (small, bert, retriever), strict=True):
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)


def train_retriever(model, tokenizer, rng, steps, batch_size=64, learning_rate=1e-3, temperature=0.05):
    """Train an encoder, in place, to tell which two pieces were cut out of one passage: its own negatives are the other pieces of the batch."""
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


def cut(ids, rng):
    """A run of between a quarter of the token ids and all of them."""
    length = rng.randint(max(1, len(ids) // 4), len(ids))
    start = rng.randint(0, len(ids) - length)
    return ids[start : start + length]


def embed(model, tokenizer, rows):
    """Unit means of the last hidden states of BOS + ids + EOS: `torch.FloatTensor` of shape `(len(rows), h)`."""
    batch = tokenizer.pad({"input_ids": [[tokenizer.bos_token_id, *ids, tokenizer.eos_token_id] for ids in rows]}, return_tensors="pt")
    hidden, mask = model(**batch).last_hidden_state, batch["attention_mask"][..., None]  # (B, T, h), (B, T, 1)
    return torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, parameter in inspect.signature(prepare_models).parameters.items():
        required = parameter.default is inspect.Parameter.empty
        parser.add_argument(f"--{name}", type=parameter.annotation, required=required, default=None if required else parameter.default)
    print(json.dumps(prepare_models(**vars(parser.parse_args())), indent=2))
