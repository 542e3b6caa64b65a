"""recipes/run_indicators.py, in this process, as a user runs it."""

import importlib
import json
import sys

import pytest

from support.evaluation_world import CORPUS, FREE, QUESTIONS, UNKNOWN
from support.models import make_model
from support.recipes import fails_here, flags, write
from trainer.judging.indicators import candidate_passages, indicators


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Two readers, the index of the first one, and an evaluation set."""
    folder = tmp_path_factory.mktemp("indicators")
    readers = {"first": make_model(), "second": make_model(gen_kwargs={"seed": 5})}
    for name, model in readers.items():
        model.save_pretrained(folder / name)
    readers["first"].build_index(CORPUS, show_progress_bar=False).save_pretrained(folder / "index")
    write(folder / "eval.jsonl", [*QUESTIONS, FREE, UNKNOWN])
    return folder, readers


def test_two_readers_side_by_side(world, monkeypatch, capsys):
    folder, readers = world
    output = folder / "out"
    options = flags(index=folder / "index", eval_file=folder / "eval.jsonl", output_dir=output, num_candidates=3)
    models = [str(folder / name) for name in readers]
    monkeypatch.setattr(sys, "argv", ["run_indicators.py", "--model", *models, *options])
    importlib.import_module("run_indicators").main()

    results = json.loads((output / "indicators.json").read_text())
    asked = [*QUESTIONS, UNKNOWN]  # not the question that needs no passage
    index = readers["first"].load_index(folder / "index")
    passages = candidate_passages(readers["first"], index, asked, 3)
    for path, model in zip(models, readers.values(), strict=True):
        expected = json.loads(json.dumps(indicators(model, asked, passages).to_dict()))
        measured = {name: results["models"][path][name] for name in expected}
        assert measured["indicators"]["answer"]["95"]["attention"]["mean"] == pytest.approx(
            expected["indicators"]["answer"]["95"]["attention"]["mean"]
        )
        assert measured["left_out"] == expected["left_out"]
        assert measured["num_instances"] == len(asked)
    assert results["settings"]["retriever"] == models[0]

    means = {path: results["models"][path]["indicators"]["answer"]["95"]["attention"]["mean"] for path in models}
    assert means[models[0]] != means[models[1]]
    printed = capsys.readouterr().out
    report = (output / "report.md").read_text()
    for mean in means.values():
        assert f"{100 * mean:.2f} ± " in printed
        assert f"{100 * mean:.2f} ± " in report
    for title in ("answer, nearest 10 %: attention", "question nouns, nearest 5 %: ρ"):
        assert title in report
    assert "Each question is read with 3 passages (retrieved, by " in report
    assert "What they would teach" in report and "best passage is gold, by attention_shares" in printed
    assert (output / "report.html").exists()


def test_gold_passages_are_included_where_they_are_known(world, monkeypatch):
    folder, _ = world
    options = flags(
        model=folder / "first",
        index=folder / "index",
        eval_file=folder / "eval.jsonl",
        output_dir=folder / "gold",
        candidates="gold_included",
        num_candidates=2,
        max_eval_samples=4,
    )
    monkeypatch.setattr(sys, "argv", ["run_indicators.py", *options])
    importlib.import_module("run_indicators").main()
    results = json.loads((folder / "gold" / "indicators.json").read_text())
    assert results["settings"]["candidates"] == "gold_included"
    assert results["models"][str(folder / "first")]["num_instances"] == 4


@pytest.mark.parametrize(
    ("models", "changed", "message"),
    [
        (["first"], {"num_candidates": 0}, "--num_candidates is 0, expected at least 1"),
        (["first"], {"num_candidates": 8}, "num_candidates is 8, and the index holds 7 passages"),
        (["first", "first"], {}, "/first twice"),
        (["first", "nowhere/at/all"], {}, "nowhere/at/all"),
        (["first"], {"eval_file": "free.jsonl"}, "no question has provenance (or an unknown one)"),
    ],
)
def test_bad_input_is_named(world, monkeypatch, models, changed, message):
    folder, _ = world
    write(folder / "free.jsonl", [FREE])
    options = {"index": "index", "eval_file": "eval.jsonl", "output_dir": "no", **changed}
    paths = {name: folder / options[name] for name in ("index", "eval_file", "output_dir")}
    argv = [*flags(**{**options, **paths}), "--model", *(folder / model for model in models)]
    assert message in fails_here(monkeypatch, "run_indicators", *argv)
    assert not (folder / "no").exists()
