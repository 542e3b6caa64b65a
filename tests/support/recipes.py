"""Recipes as a user runs them: real processes, and a small data set with two tiny models on disk."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from support.models import PASSAGES, make_emb_seq, make_gen, make_tokenizer

ROOT = Path(__file__).parents[2]


def run(*command, cwd=ROOT, stdin=None):
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    return subprocess.run(
        [str(word) for word in command],
        cwd=cwd,
        capture_output=True,
        text=True,
        input=stdin,
        env=environment,
        timeout=300,
    )


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_inputs(folder):
    """Two tiny models of different architecture and width on disk, and a small data set."""
    make_gen("llama").save_pretrained(folder / "gen")
    make_emb_seq("gpt2", hidden_size=48).save_pretrained(folder / "emb_seq")
    for name in ("gen", "emb_seq"):
        make_tokenizer().save_pretrained(folder / name)
    instances = [
        {"id": f"i{i}", "input": f"question {i}?", "segments": [{"text": p["title"] or "none", "passage": p}]}
        for i, p in enumerate(PASSAGES)
    ]
    instances.append({"id": "free", "input": "hello?", "segments": [{"text": "hello", "passage": None}]})
    questions = [
        {"id": f"q{i}", "input": f"question {i}?", "answers": [p["title"] or "none"], "provenance": [[p["id"]]]}
        for i, p in enumerate(PASSAGES)
    ]
    questions.append({"id": "free", "input": "hello?", "answers": ["hello"], "provenance": []})
    write(folder / "train.jsonl", instances)
    write(folder / "corpus.jsonl", PASSAGES)
    write(folder / "eval.jsonl", questions)
    return folder


def options(inputs, output, *extra):
    paths = [
        "--gen",
        inputs / "gen",
        "--emb_seq",
        inputs / "emb_seq",
        "--train_file",
        inputs / "train.jsonl",
        "--corpus_file",
        inputs / "corpus.jsonl",
    ]
    paths += [
        "--eval_file",
        inputs / "eval.jsonl",
        "--output_dir",
        output,
        "--max_steps",
        2,
        "--max_new_tokens",
        8,
        "--report_to",
        "none",
    ]
    return [str(word) for word in [*paths, *extra]]


def fails_here(monkeypatch, recipe, *argv):
    """A recipe in this process, which spares the imports; returns what it says as it ends with an error."""
    monkeypatch.setattr(sys, "argv", [f"{recipe}.py", *map(str, argv)])
    with pytest.raises(SystemExit) as ending:
        importlib.import_module(recipe).main()
    return str(ending.value.code)


def train_here(monkeypatch, *argv):
    """`recipes/train.py` in this process; returns what it says as it ends with an error."""
    return fails_here(monkeypatch, "train", *argv)
