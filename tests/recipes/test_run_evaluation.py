"""The recipe that judges: processes share the work, a killed run goes on, and figures reach the card."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from modeling_cosup import CoSupForCausalLM
from modeling_cosup.facts_cosup import facts_of
from modeling_cosup.lines_cosup import read_lines
from support.evaluation_world import CORPUS, question, without_times, write_checkpoint, write_world
from support.nli_models import make_classifier
from trainer.card import write_card
from trainer.judging.figures import MAIN

ROOT = Path(__file__).parents[2]


def predictions(output, mode, task="full"):
    return read_lines(output / task / mode / "predictions.jsonl")


def command(*words):
    return [sys.executable, *map(str, words)]


def run(words):
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.run(words, cwd=ROOT, capture_output=True, text=True, env=environment, timeout=300)


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """A checkpoint and a set that takes some seconds, with the options to judge it."""
    folder = tmp_path_factory.mktemp("many")
    questions = [question(i, CORPUS[i % 7], input=f"question {'again ' * (i % 5)}{i}?") for i in range(31)]
    paths = write_world(folder, questions)
    checkpoint = write_checkpoint(folder / "model")
    options = ["--model", checkpoint, *(word for name, path in paths.items() for word in (f"--{name}", path))]
    return [
        *options,
        "--modes",
        "forced",
        "off",
        "--max_new_tokens",
        40,
        "--batch_size",
        2,
        "--index_cache",
        folder / "indexes",
    ]


@pytest.fixture(scope="module")
def alone(many, tmp_path_factory):
    """What one process finds."""
    output = tmp_path_factory.mktemp("alone") / "out"
    result = run(command("recipes/run_evaluation.py", *many, "--output_dir", output))
    assert result.returncode == 0, result.stderr[-3000:]
    assert "Ret=" in result.stderr and "EM=" in result.stderr  # the running scores
    assert (
        "eval, [NSP] forced first: 31 questions" in result.stdout
        and (output / "report.html").exists()
        and (output / "report.md").exists()
    )
    settings = json.loads((output / "metrics.json").read_text())["settings"]
    assert settings["command"].startswith("run_evaluation.py --model") and settings["processes"] == 1
    return output


def same_answers(first, second):
    for mode in ("forced", "off"):
        assert without_times(predictions(first, mode, "eval")) == without_times(predictions(second, mode, "eval"))
    assert read_lines(first / "eval" / "query" / "ranking.jsonl") == read_lines(
        second / "eval" / "query" / "ranking.jsonl"
    )
    found = [json.loads((folder / "metrics.json").read_text())["tasks"]["eval"]["modes"] for folder in (first, second)]
    assert [found[0][mode]["metrics"] for mode in ("forced", "off")] == [
        found[1][mode]["metrics"] for mode in ("forced", "off")
    ]


def test_two_processes_share_the_questions_and_the_corpus(many, alone, tmp_path):
    launcher = [
        "-m",
        "accelerate.commands.accelerate_cli",
        "launch",
        "--config_file",
        "recipes/accelerate_configs/multi_cpu.yaml",
    ]
    words = [*many, "--output_dir", tmp_path / "out", "--index_cache", tmp_path / "indexes"]
    result = run(command(*launcher, "recipes/run_evaluation.py", *words))
    assert result.returncode == 0, result.stderr[-3000:]
    same_answers(tmp_path / "out", alone)
    assert json.loads((tmp_path / "out" / "metrics.json").read_text())["settings"]["processes"] == 2
    assert result.stdout.count("eval, [NSP] forced first: 31 questions") == 1

    for part in make_classifier():  # and they share what the NLI model is asked
        part.save_pretrained(tmp_path / "nli")
    judged = run(command(*launcher, "recipes/run_evaluation.py", *words, "--nli_model", tmp_path / "nli"))
    assert judged.returncode == 0, judged.stderr[-3000:]
    shutil.copytree(alone, tmp_path / "alone")
    assert (
        run(
            command(
                "recipes/run_evaluation.py", *many, "--output_dir", tmp_path / "alone", "--nli_model", tmp_path / "nli"
            )
        ).returncode
        == 0
    )
    found = [
        json.loads((tmp_path / name / "metrics.json").read_text())["tasks"]["eval"]["modes"]["forced"]["metrics"]
        for name in ("out", "alone")
    ]
    assert found[0] == found[1] and found[0]["gr"]["n"] > 10
    keys = [
        [json.loads(line)["key"] for line in (tmp_path / name / "nli.jsonl").read_text().splitlines() if line]
        for name in ("out", "alone")
    ]
    assert sorted(keys[0]) == sorted(set(keys[1]))  # no pair was judged twice


def test_a_killed_run_goes_on(many, alone, tmp_path):
    words = command("recipes/run_evaluation.py", *many, "--output_dir", tmp_path)
    answers = tmp_path / "eval" / "forced" / "parts" / "answers-0-of-1.jsonl"
    with open(tmp_path / "log", "w") as log:
        process = subprocess.Popen(
            words, cwd=ROOT, stdout=log, stderr=log, env={**os.environ, "OMP_NUM_THREADS": "1"}, start_new_session=True
        )
        try:
            while process.poll() is None and not (answers.exists() and answers.read_bytes().count(b"\n") >= 3):
                time.sleep(0.01)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL, (tmp_path / "log").read_text()[-3000:]
    assert (
        not (tmp_path / "metrics.json").exists() and not (tmp_path / "eval" / "forced" / "predictions.jsonl").exists()
    )
    kept = [line["index"] for line in map(json.loads, answers.read_text().splitlines(keepends=True)[:3])]
    result = run(words)
    assert result.returncode == 0, result.stderr[-3000:]
    same_answers(tmp_path, alone)
    found = predictions(tmp_path, "forced", "eval")
    assert (
        all(found[i]["seconds"] is None for i in kept) and found[-1]["seconds"] is not None
    )  # the former were not answered again


def test_a_config_lists_tasks_and_errors_are_clear(many, tmp_path, monkeypatch, capsys):
    from run_evaluation import main

    checkpoint, eval_file, corpus_file = many[1], many[3], many[5]
    entries = [{"name": "a", "split": "in-domain"}, {"name": "b", "pool": 4, "max_eval_samples": 3}]
    config = {
        "tasks": [{**entry, "eval_file": eval_file, "corpus_file": corpus_file} for entry in entries],
        "modes": ["off"],
        "max_new_tokens": 4,
    }
    (tmp_path / "tasks.yaml").write_text(
        json.dumps(config).replace('"off"', "off")
    )  # JSON is YAML, in which off is false

    def call(*words):
        monkeypatch.setattr(
            sys, "argv", ["run_evaluation.py", *map(str, words), "--output_dir", str(tmp_path / "out")]
        )
        main()

    call("--config", tmp_path / "tasks.yaml", "--model", checkpoint, "--max_eval_samples", 5)
    results = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert [results["tasks"][name]["n"] for name in "ab"] == [5, 3] and results["tasks"]["b"]["pool"] == 4
    assert len(list((tmp_path / "out" / "indexes").iterdir())) == 1  # one corpus, embedded once
    assert "b, retrieval off: 3 questions" in capsys.readouterr().out
    for part in make_classifier():
        part.save_pretrained(tmp_path / "nli")
    call(
        "--config",
        tmp_path / "tasks.yaml",
        "--model",
        checkpoint,
        "--max_eval_samples",
        5,
        "--modes",
        "forced",
        "--nli_model",
        tmp_path / "nli",
    )
    results = json.loads((tmp_path / "out" / "metrics.json").read_text())
    grounded = [r["grounded_text"] for p in predictions(tmp_path / "out", "forced", "a") for r in p["retrievals"]]
    assert any(grounded) and results["tasks"]["a"]["modes"]["forced"]["metrics"]["gr"]["n"] > 0
    assert (tmp_path / "out" / "nli.jsonl").exists() and results["settings"]["nli_model"] == str(tmp_path / "nli")
    for words, message in [
        (["--model", checkpoint], "error: give either --eval_file"),
        (["--model", checkpoint, "--eval_file", eval_file, "--pool", "x"], "error: Task eval: pool is 'x'"),
        (["--model", checkpoint, "--eval_file", eval_file, "--corpus_file", "none.jsonl"], "none.jsonl"),
    ]:
        with pytest.raises(SystemExit) as ending:
            call(*words)
        assert message in str(ending.value.code)


def test_figures_reach_the_card(many, tmp_path, monkeypatch, capsys):
    """Beside what training recorded, in place of older figures of the same set; not into a card of the owner's making; not of other weights."""
    from run_evaluation import main

    folder = tmp_path / "checkpoint"
    shutil.copytree(many[1], folder)
    model = CoSupForCausalLM.from_pretrained(folder)
    metrics = [{"type": "ret", "name": "Ret", "value": 1.25, "n": 9}]
    older = [{"dataset": {"name": name, "type": "custom"}, "index_size": 2, "metrics": metrics} for name in "ax"]
    write_card(model, folder, "me/model", {"results": older, "training": {"instances": {"nq": 7}}})
    for part in make_classifier():
        part.save_pretrained(tmp_path / "nli")
    entries = [
        {"name": name, "eval_file": many[3], "corpus_file": many[5], **more}
        for name, more in (("a", {}), ("b", {"pool": 4}))
    ]
    (tmp_path / "tasks.yaml").write_text(
        json.dumps({"tasks": entries, "modes": ["forced"], "max_new_tokens": 6, "nli_model": str(tmp_path / "nli")})
    )

    def call(output, *words):
        monkeypatch.setattr(
            sys,
            "argv",
            ["run_evaluation.py", "--config", str(tmp_path / "tasks.yaml"), "--update_card", "true", *words],
        )
        monkeypatch.setattr(sys, "argv", [*sys.argv, "--output_dir", str(tmp_path / output)])
        main()

    call("out", "--model", str(folder))
    results, facts = (
        json.loads((tmp_path / "out" / "metrics.json").read_text()),
        json.loads((folder / "training_facts.json").read_text()),
    )
    assert [group["dataset"]["name"] for group in facts["results"]] == ["x", "a", "b (pools of 4)"] and facts[
        "training"
    ] == {"instances": {"nq": 7}}
    for group, name in zip(facts["results"][1:], "ab", strict=True):
        own = results["tasks"][name]
        shown = {metric["type"]: metric for metric in group["metrics"]}
        assert {"ret", "cor", "k_precision", "query_recall@1"} <= set(shown) <= {*MAIN, "query_recall@1"}
        for metric in ("ret", "k_precision", "cor"):
            figure = own["modes"]["forced"]["metrics"][metric]
            assert (shown[metric]["value"], shown[metric]["n"]) == (round(100 * figure["value"], 4), figure["n"])
        assert shown["query_recall@1"]["value"] == round(
            100 * own["query"]["pool" if name == "b" else "corpus"]["query_recall@1"]["value"], 4
        )
    card = (folder / "README.md").read_text()
    assert f"Gr (by {tmp_path / 'nli'})" in card and "1.25" in card and "7 of nq" in card
    assert facts_of(CoSupForCausalLM.from_pretrained(folder))["results"] == facts["results"]

    (folder / "README.md").write_text("my own card")
    call("again", "--model", str(folder), "--max_eval_samples", "2")
    assert (folder / "README.md").read_text() == "my own card" and "stays as it is" in capsys.readouterr().out
    facts = json.loads((folder / "training_facts.json").read_text())
    assert [
        metric["n"] for group in facts["results"][1:] for metric in group["metrics"] if metric["type"] == "cor"
    ] == [2, 2]
    with torch.no_grad():
        next(model.gen.parameters()).add_(1.0)
    model.save_pretrained(folder)
    (folder / "training_facts.json").write_text(json.dumps(facts))
    call("other", "--model", str(folder), "--max_eval_samples", "2")
    assert [
        group["dataset"]["name"] for group in json.loads((folder / "training_facts.json").read_text())["results"]
    ] == ["a", "b (pools of 4)"]
    with pytest.raises(SystemExit) as ending:
        call("hub", "--model", "me/model")
    assert "error: --update_card writes into the folder" in str(ending.value.code)
