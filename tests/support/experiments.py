"""A tiny experiment on disk, for the tests of recipes/run_experiments.py."""

from pathlib import Path

from support.models import PASSAGES
from support.recipes import write

FILE = """
title: A tiny experiment
about: Two arms.
base:
  max_steps: 2
  per_device_train_batch_size: 4
  max_length: 256
  max_passage_length: 64
  report_to: none
  save_strategy: "no"
  num_threads: 1
arms:
  co: {supervision: co}
  separate: {supervision: separate}
baseline: separate
seeds: [0, 1]
pools: [2, 4]
evaluation: {max_new_tokens: 6, modes: [retrieval]}
tasks:
  - name: known
    eval_file: "{data}/eval.jsonl"
    corpus_file: "{data}/corpus.jsonl"
    split: in-domain
  - name: other
    eval_file: "{data}/eval.jsonl"
    corpus_file: "{data}/corpus.jsonl"
    split: out-of-domain
    max_eval_samples: 4
"""


def write_experiment(folder: Path) -> None:
    """Write `experiment.yaml`, and its evaluation set with pools and corpus, into a folder."""
    ids = [passage["id"] for passage in PASSAGES]
    questions = []
    for i, passage in enumerate(PASSAGES):
        questions.append(
            {
                "id": f"q{i}",
                "input": f"question {i}?",
                "answers": [passage["title"] or "none"],
                "provenance": [[passage["id"]]],
                "candidates": ids,
            }
        )
    write(folder / "corpus.jsonl", PASSAGES)
    write(folder / "eval.jsonl", questions)
    (folder / "experiment.yaml").write_text(FILE)
