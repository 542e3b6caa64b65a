"""A small evaluation set over the passages of `models`, on disk, for the tests of judging, reports and comparisons."""

import gzip
import json
from collections.abc import Sequence
from pathlib import Path

from support.models import PASSAGES, make_model

MARKUP = (
    "<script>document.title='hacked'</script> ![x](http://example.invalid/a.png) $x$ [1](http://example.invalid) `a`"
)
EVIL = {"id": "evil", "title": "| <b>pipe</b>", "text": MARKUP}
CORPUS = [*PASSAGES, EVIL]
IDS = [passage["id"] for passage in CORPUS]


def question(number: int, passage: dict, **fields) -> dict:
    """Return a question about a passage. Its candidates are all passages, with that one last."""
    others = [id for id in IDS if id != passage["id"]]
    return {
        "id": f"q{number}",
        "dataset": "nq",
        "instruction": "",
        "input": f"question {number}?",
        "answers": [passage["title"] or "none"],
        "provenance": [[passage["id"]]],
        "candidates": [*others, passage["id"]],
        **fields,
    }


QUESTIONS = [question(i, passage) for i, passage in enumerate(CORPUS)]
QUESTIONS[1]["provenance"] = [["p1", "p3"], ["p0"]]  # two passages together, or another one
FREE = question(90, PASSAGES[0], input="hello?", answers=["hello"], provenance=[])
UNKNOWN = question(
    91,
    PASSAGES[0],
    dataset="asqa",
    provenance=[],
    meta={"provenance_unknown": True, "qa_pairs": [{"short_answers": ["Night"]}]},
)


def write_world(folder: Path, questions: Sequence[dict] = (*QUESTIONS, FREE, UNKNOWN)) -> dict[str, str]:
    """Write `eval.jsonl` and `corpus.jsonl.gz` into a folder, and return their paths as fields of a task."""
    eval_file = folder / "eval.jsonl"
    eval_file.write_text("".join(json.dumps(row) + "\n" for row in questions))
    corpus_file = folder / "corpus.jsonl.gz"
    corpus = "".join(json.dumps(passage) + "\n" for passage in CORPUS)
    corpus_file.write_bytes(gzip.compress(corpus.encode(), mtime=0))
    return {"eval_file": str(eval_file), "corpus_file": str(corpus_file)}


def write_checkpoint(folder: Path) -> Path:
    """Save a model with random weights, and return its folder."""
    make_model().save_pretrained(folder)
    return folder


def without_times(predictions: Sequence[dict]) -> list[dict]:
    """
    Return predictions in a form that does not depend on the number of processes: without seconds, and with scores
    rounded to five digits, because the last digits depend on where the weights are in memory.
    """
    comparable = []
    for prediction in predictions:
        fields = {name: value for name, value in prediction.items() if name != "seconds"}
        fields["retrievals"] = []
        for retrieval in prediction["retrievals"]:
            scores = [None if score is None else round(score, 5) for score in retrieval["scores"]]
            fields["retrievals"].append({**retrieval, "scores": scores})
        comparable.append(fields)
    return comparable
