"""Recipes, run as a user runs them, on a small dataset and two tiny models."""

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from support.models import PASSAGES, make_emb_seq, make_gen, make_tokenizer

ROOT = Path(__file__).parents[2]


def run(*command: Any, cwd: Path = ROOT, stdin: str | None = None) -> subprocess.CompletedProcess[str]:
    """Run a command without the network."""
    return subprocess.run(
        [str(word) for word in command],
        cwd=cwd,
        capture_output=True,
        text=True,
        input=stdin,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        timeout=600,
    )


def flags(**options: Any) -> list[str]:
    """Return options as the words of a command line: `--name value`."""
    words = []
    for name, value in options.items():
        words += [f"--{name}", str(value)]
    return words


def write(path: Path, rows: Iterable[dict]) -> Path:
    """Write a JSON Lines file and return its path."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_inputs(folder: Path) -> Path:
    """Write two tiny models of different architecture and width, and a small dataset."""
    make_gen("llama").save_pretrained(folder / "gen")
    make_emb_seq("gpt2", hidden_size=48).save_pretrained(folder / "emb_seq")
    for name in ("gen", "emb_seq"):
        make_tokenizer().save_pretrained(folder / name)
    instances, questions = [], []
    for i, passage in enumerate(PASSAGES):
        input, answer = f"question {i}?", passage["title"] or "none"
        instances.append({"id": f"i{i}", "input": input, "segments": [{"text": answer, "passage": passage}]})
        questions.append({"id": f"q{i}", "input": input, "answers": [answer], "provenance": [[passage["id"]]]})
    instances.append({"id": "free", "input": "hello?", "segments": [{"text": "hello", "passage": None}]})
    questions.append({"id": "free", "input": "hello?", "answers": ["hello"], "provenance": []})
    write(folder / "train.jsonl", instances)
    write(folder / "corpus.jsonl", PASSAGES)
    write(folder / "eval.jsonl", questions)
    return folder


def options(inputs: Path, output: Path, *extra: Any) -> list[str]:
    """
    Return options of `recipes/train.py` for two steps on the dataset of [`write_inputs`], followed by `extra`.

    With `--tie_emb_seq`, Emb_seq is left out.
    """
    emb_seq = {} if "--tie_emb_seq" in extra else {"emb_seq": inputs / "emb_seq"}
    paths = flags(
        gen=inputs / "gen",
        **emb_seq,
        train_file=inputs / "train.jsonl",
        corpus_file=inputs / "corpus.jsonl",
        eval_file=inputs / "eval.jsonl",
        output_dir=output,
    )
    settings = flags(max_steps=2, max_new_tokens=8, report_to="none")
    return [*paths, *settings, *map(str, extra)]


def fails_here(monkeypatch: pytest.MonkeyPatch, recipe: str, *argv: Any) -> str:
    """Run a recipe in this process, without the time of new imports, and return the error that ends it."""
    monkeypatch.setattr(sys, "argv", [f"{recipe}.py", *map(str, argv)])
    with pytest.raises(SystemExit) as ending:
        importlib.import_module(recipe).main()
    return str(ending.value.code)


def train_here(monkeypatch: pytest.MonkeyPatch, *argv: Any) -> str:
    """Run `recipes/train.py` in this process, and return the error that ends it."""
    return fails_here(monkeypatch, "train", *argv)
