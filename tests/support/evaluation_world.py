"""A small evaluation set over the passages of `models`, on disk, for the tests of judging, reports and comparisons."""

import gzip
import json

from support.models import PASSAGES, make_model

MARKUP = (
    "<script>document.title='hacked'</script> ![x](http://example.invalid/a.png) $x$ [1](http://example.invalid) `a`"
)
EVIL = {"id": "evil", "title": "| <b>pipe</b>", "text": MARKUP}
CORPUS = [*PASSAGES, EVIL]
IDS = [passage["id"] for passage in CORPUS]


def question(number, passage, **fields):
    """A question about a passage; its candidates are all passages, that one last."""
    others = [id for id in IDS if id != passage["id"]]
    found = {
        "id": f"q{number}",
        "dataset": "nq",
        "instruction": "",
        "input": f"question {number}?",
        "answers": [passage["title"] or "none"],
    }
    return {**found, "provenance": [[passage["id"]]], "candidates": [*others, passage["id"]], **fields}


QUESTIONS = [question(i, passage) for i, passage in enumerate(CORPUS)]
QUESTIONS[1]["provenance"] = [["p1", "p3"], ["p0"]]  # two passages together, or another one
FREE = {**question(90, PASSAGES[0]), "input": "hello?", "answers": ["hello"], "provenance": []}
UNKNOWN = {
    **question(91, PASSAGES[0]),
    "provenance": [],
    "meta": {"provenance_unknown": True, "qa_pairs": [{"short_answers": ["Night"]}]},
}
UNKNOWN["dataset"] = "asqa"


def write_world(folder, questions=(*QUESTIONS, FREE, UNKNOWN)):
    """`eval.jsonl` and `corpus.jsonl.gz` in a folder; returns their paths, as fields of a task."""
    paths = {"eval_file": folder / "eval.jsonl", "corpus_file": folder / "corpus.jsonl.gz"}
    paths["eval_file"].write_text("".join(json.dumps(x) + "\n" for x in questions))
    paths["corpus_file"].write_bytes(
        gzip.compress("".join(json.dumps(passage) + "\n" for passage in CORPUS).encode(), mtime=0)
    )
    return {name: str(path) for name, path in paths.items()}


def write_checkpoint(folder):
    """A checkpoint of random weights."""
    make_model().save_pretrained(folder)
    return folder


def without_times(predictions):
    """Predictions as any number of processes makes them: without seconds, scores to five digits (weights lie elsewhere in memory)."""
    kept = []
    for prediction in predictions:
        retrievals = [
            {**r, "scores": [None if score is None else round(score, 5) for score in r["scores"]]}
            for r in prediction["retrievals"]
        ]
        kept.append(
            {**{name: value for name, value in prediction.items() if name != "seconds"}, "retrievals": retrievals}
        )
    return kept
