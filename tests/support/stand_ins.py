"""
What the pages of docs/ name, as tiny stand-ins: a folder, and repositories on a local server in place of the Hub.

The folder, in which the code of a page runs:

    cosup-quickstart/, out/         checkpoints with index/: two towers, and a tied model; they retrieve once
    cosup-quickstart/world/         train.jsonl, validation.jsonl, eval.jsonl, corpus.jsonl of the quickstart
    train.jsonl, eval.jsonl, corpus.jsonl, text.jsonl
    recipes/                        those of this checkout

Names on the Hub: see [`put_on_hub`]. The code of a page downloads them, and can push.
"""

import json
import os
import shutil
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from modeling_cosup import CoSupForCausalLM
from support.hub_server import Hub
from support.hub_store import LFS_SUFFIXES, HubStore
from support.models import PASSAGES, make_emb_seq, make_gen, make_tokenizer

ROOT = Path(__file__).parents[2]
TRAINED = ("cosup-quickstart", "out")
CONTEXT = 2048  # tokens
STRENGTH = 10  # of what is set by hand in random weights


@torch.no_grad()
def answer_with_a_passage(model: CoSupForCausalLM) -> None:
    """
    Make a random model, whose Gen is a Llama with its own LM head, answer `[NSP]` passage `[Cs]` words `[CE]`, end.

    Each of these tokens sets one dimension of its state, all others dimension 0; the row of the next token in the LM
    head reads it.
    """
    tokenizer, config = model.tokenizer, model.config
    words = tokenizer(" Rembrandt painted", add_special_tokens=False)["input_ids"]
    chain = [config.cs_token_id, *words, config.ce_token_id, tokenizer.eos_token_id]
    embeddings = model.gen.get_input_embeddings().weight  # (V, H)
    head = model.gen.lm_head.weight  # (V, H)
    embeddings[:, : len(chain)] = 0
    head[:, : len(chain)] = 0
    embeddings[:, 0] = STRENGTH
    head[config.nsp_token_id, 0] = STRENGTH
    for dimension, (token, following) in enumerate(pairwise(chain), 1):
        embeddings[token, 0] = 0
        embeddings[token, dimension] = STRENGTH
        head[following, dimension] = STRENGTH


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write a JSON Lines file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def write_data(folder: Path) -> None:
    """Write the files of data of the folder, and those of the quickstart's world."""
    instances, questions, texts = [], [], []
    for i, passage in enumerate(PASSAGES):
        question = {"id": f"q{i}", "dataset": "nq", "instruction": "Answer the question.", "input": f"question {i}?"}
        answer = passage["title"] or "none"
        instances.append({**question, "segments": [{"text": answer, "passage": passage}]})
        questions.append({**question, "answers": [answer], "provenance": [[passage["id"]]]})
        texts.append({"text": passage["text"]})
    instances.append({"id": "free", "input": "hello?", "segments": [{"text": "hello", "passage": None}]})
    questions.append({"id": "free", "input": "hello?", "answers": ["hello"], "provenance": []})
    for place in (folder, folder / "cosup-quickstart" / "world"):
        write_rows(place / "train.jsonl", instances)
        write_rows(place / "eval.jsonl", questions)
        write_rows(place / "corpus.jsonl", PASSAGES)
    write_rows(folder / "cosup-quickstart" / "world" / "validation.jsonl", instances)
    write_rows(folder / "text.jsonl", texts)


def write_stand_ins(folder: Path) -> None:
    """Write the folder, without `recipes`; [`copy_stand_ins`] adds it."""
    write_data(folder)
    tokenizer = make_tokenizer()
    options: dict[str, Any] = {"tie_word_embeddings": False, "max_position_embeddings": CONTEXT}
    for name in TRAINED:
        emb_seq = make_emb_seq() if name == "cosup-quickstart" else None
        gen = make_gen(**options)
        model = CoSupForCausalLM.from_gen_and_emb_seq(gen, emb_seq, tokenizer=tokenizer, tie_emb_seq=emb_seq is None)
        answer_with_a_passage(model)
        model.save_pretrained(folder / name)
        model.build_index(PASSAGES, show_progress_bar=False).save_pretrained(folder / name / "index")


def copy_stand_ins(stand_ins: Path, folder: Path) -> None:
    """Copy the folder, so that a page finds nothing that another one has left."""
    shutil.copytree(stand_ins, folder, dirs_exist_ok=True)
    (folder / "recipes").symlink_to(ROOT / "recipes")


def put_on_hub(store: HubStore, stand_ins: Path, work: Path) -> None:
    """
    Put stand-ins for names on the Hub into the store of a server that is not running yet.

    Args:
        store ([`HubStore`]): of the server.
        stand_ins (`Path`): what [`write_stand_ins`] wrote.
        work (`Path`): an empty folder.
    """
    options = {"max_position_embeddings": CONTEXT}
    gen, tokenizer = make_gen(**options), make_tokenizer()
    gen.save_pretrained(work / "gen")
    tokenizer.save_pretrained(work / "gen")
    encoder = make_emb_seq("bert", **options)
    settings = {"emb_seq_pooling": "mean", "query_from": "emb_seq", "max_passage_length": 256}
    pair = CoSupForCausalLM.from_gen_and_emb_seq(gen, encoder, tokenizer=tokenizer, **settings)
    pair.save_emb_seq(work / "encoder")
    repositories = {
        ("model", "HuggingFaceTB/SmolLM2-135M"): work / "gen",
        ("model", "HuggingFaceTB/SmolLM2-135M-Instruct"): work / "gen",
        ("model", "sentence-transformers/all-MiniLM-L6-v2"): work / "encoder",
        ("model", "me/cosup-smollm2"): stand_ins / "out",
        ("dataset", "me/cosup-smollm2-wiki"): stand_ins / "out" / "index",
    }
    for (kind, name), folder in repositories.items():
        put_repository(store, kind, name, folder)


def put_repository(store: HubStore, kind: str, name: str, folder: Path) -> None:
    """Put the files of a folder, without those in `index`, into a new repository, in one commit."""
    store.create(kind, name, private=False)
    repository = store.get(kind, name)
    operations = []
    for path in sorted(folder.rglob("*")):
        place = path.relative_to(folder).as_posix()
        if path.is_file() and not place.startswith("index/"):
            entry = repository.add_regular(path.read_bytes())
            if place.endswith(LFS_SUFFIXES):
                entry = repository.lfs_entry(entry["sha256"])
            operations.append(("add", place, entry))
    repository.commit("main", {"summary": "Add stand-in"}, operations)


def variables(hub: Hub, home: Path) -> dict[str, str]:
    """
    Return environment variables of a program that uses a server in place of the Hub.

    Args:
        hub ([`Hub`]): the server.
        home (`Path`): its `HF_HOME`.
    """
    changed = hub.environment(home)
    return {name: value for name, value in changed.items() if os.environ.get(name) != value}
