"""The recipe that judges: processes share the work, a killed run resumes, and figures reach the card."""

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
from support.forks import run_forked
from support.nli_models import make_classifier
from support.recipes import ROOT
from trainer.card import write_card
from trainer.judging.figures import MAIN

RECIPE = "recipes/run_evaluation.py"


def predictions(output, mode, task="full"):
    return read_lines(output / task / mode / "predictions.jsonl")


def results_of(output):
    return json.loads((output / "metrics.json").read_text())


def well(result):
    """Return the result of a program if it succeeded."""
    assert result.returncode == 0, result.stderr[-3000:]
    return result


@pytest.fixture(scope="module")
def nli(tmp_path_factory):
    """The folder of a trained NLI model."""
    folder = tmp_path_factory.mktemp("nli")
    for part in make_classifier():
        part.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """The options that judge a checkpoint on a set that takes some seconds."""
    folder = tmp_path_factory.mktemp("many")
    questions = [question(i, CORPUS[i % 7], input=f"question {'again ' * (i % 5)}{i}?") for i in range(31)]
    paths = write_world(folder, questions)
    options = ["--model", write_checkpoint(folder / "model")]
    options += ["--eval_file", paths["eval_file"], "--corpus_file", paths["corpus_file"]]
    options += ["--modes", "forced", "off", "--max_new_tokens", 40, "--batch_size", 2]
    return [*options, "--index_cache", folder / "indexes"]


@pytest.fixture(scope="module")
def alone(many, tmp_path_factory):
    """The results folder of a single process."""
    output = tmp_path_factory.mktemp("alone") / "out"
    result = well(run_forked(RECIPE, *many, "--output_dir", output))
    assert "Ret=" in result.stderr  # the scores so far
    assert "EM=" in result.stderr
    assert "eval, [NSP] forced first: 31 questions" in result.stdout
    assert (output / "report.html").exists()
    assert (output / "report.md").exists()
    settings = results_of(output)["settings"]
    assert settings["command"].startswith("run_evaluation.py --model")
    assert settings["processes"] == 1
    return output


def check_same_answers(first, second):
    first_modes = results_of(first)["tasks"]["eval"]["modes"]
    second_modes = results_of(second)["tasks"]["eval"]["modes"]
    for mode in ("forced", "off"):
        assert without_times(predictions(first, mode, "eval")) == without_times(predictions(second, mode, "eval"))
        assert first_modes[mode]["metrics"] == second_modes[mode]["metrics"]
    ranking_file = Path("eval", "query", "ranking.jsonl")
    assert read_lines(first / ranking_file) == read_lines(second / ranking_file)


def test_two_processes_share_the_questions_and_the_corpus(many, alone, nli, tmp_path):
    options = [*many, "--output_dir", tmp_path / "out", "--index_cache", tmp_path / "indexes"]
    two_ranks = {"world_size": 2, "env": {"ACCELERATE_USE_CPU": "true"}}
    result = well(run_forked(RECIPE, *options, **two_ranks))
    check_same_answers(tmp_path / "out", alone)
    assert results_of(tmp_path / "out")["settings"]["processes"] == 2
    assert result.stdout.count("eval, [NSP] forced first: 31 questions") == 1

    # They share the pairs of the NLI model too.
    judge = ["--nli_model", nli]
    well(run_forked(RECIPE, *options, *judge, **two_ranks))
    shutil.copytree(alone, tmp_path / "alone")
    well(run_forked(RECIPE, *many, "--output_dir", tmp_path / "alone", *judge))
    figures, judged_keys = {}, {}
    for name in ("out", "alone"):
        figures[name] = results_of(tmp_path / name)["tasks"]["eval"]["modes"]["forced"]["metrics"]
        lines = (tmp_path / name / "nli.jsonl").read_text().splitlines()
        judged_keys[name] = [json.loads(line)["key"] for line in lines if line]
    assert figures["out"] == figures["alone"]
    assert figures["out"]["gr"]["n"] > 10
    assert sorted(judged_keys["out"]) == sorted(set(judged_keys["alone"]))  # no pair was judged twice


def test_a_killed_run_resumes(many, alone, tmp_path):
    words = [RECIPE, *many, "--output_dir", tmp_path]
    answers = tmp_path / "eval" / "forced" / "parts" / "answers-0-of-1.jsonl"

    def num_answers():
        return answers.read_bytes().count(b"\n") if answers.exists() else 0

    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with open(tmp_path / "log", "w") as log:
        command = [sys.executable, *map(str, words)]
        process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log, env=environment, start_new_session=True)
        try:
            while process.poll() is None and num_answers() < 3:
                time.sleep(0.01)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL, (tmp_path / "log").read_text()[-3000:]
    assert not (tmp_path / "metrics.json").exists()
    assert not (tmp_path / "eval" / "forced" / "predictions.jsonl").exists()
    first_lines = answers.read_text().splitlines(keepends=True)[:3]
    answered = [json.loads(line)["index"] for line in first_lines]

    well(run_forked(*words))
    check_same_answers(tmp_path, alone)
    resumed = predictions(tmp_path, "forced", "eval")
    assert all(resumed[i]["seconds"] is None for i in answered)  # not answered again
    assert resumed[-1]["seconds"] is not None


@pytest.fixture
def call(monkeypatch):
    """Call the recipe with options, in this process."""
    from run_evaluation import main

    def call(*options):
        monkeypatch.setattr(sys, "argv", ["run_evaluation.py", *map(str, options)])
        main()

    return call


def test_a_config_lists_tasks(many, call, nli, tmp_path, capsys):
    checkpoint, eval_file, corpus_file = many[1], many[3], many[5]
    files = {"eval_file": eval_file, "corpus_file": corpus_file}
    config = {
        "tasks": [
            {"name": "a", "split": "in-domain", **files},
            {"name": "b", "pool": 4, "max_eval_samples": 3, **files},
        ],
        "modes": ["off"],
        "max_new_tokens": 4,
    }
    # JSON is YAML, in which a bare off is false.
    (tmp_path / "tasks.yaml").write_text(json.dumps(config).replace('"off"', "off"))
    output = tmp_path / "out"
    options = ["--config", tmp_path / "tasks.yaml", "--model", checkpoint, "--output_dir", output]

    call(*options, "--max_eval_samples", 5)
    tasks = results_of(output)["tasks"]
    assert (tasks["a"]["n"], tasks["b"]["n"]) == (5, 3)
    assert tasks["b"]["pool"] == 4
    assert len(list((output / "indexes").iterdir())) == 1  # one corpus, embedded once
    assert "b, retrieval off: 3 questions" in capsys.readouterr().out

    call(*options, "--max_eval_samples", 5, "--modes", "forced", "--nli_model", nli)
    results = results_of(output)
    retrievals = [retrieval for row in predictions(output, "forced", "a") for retrieval in row["retrievals"]]
    assert any(retrieval["grounded_text"] for retrieval in retrievals)
    assert results["tasks"]["a"]["modes"]["forced"]["metrics"]["gr"]["n"] > 0
    assert results["settings"]["nli_model"] == str(nli)
    assert (output / "nli.jsonl").exists()


def test_errors_are_clear(many, call, tmp_path):
    model = ["--model", many[1], "--output_dir", tmp_path / "out"]
    eval_file = ["--eval_file", many[3]]
    for options, message in [
        (model, "error: give either --eval_file"),
        ([*model, *eval_file, "--pool", "x"], "error: Task eval: pool is 'x'"),
        ([*model, *eval_file, "--corpus_file", "none.jsonl"], "none.jsonl"),
    ]:
        with pytest.raises(SystemExit) as ending:
            call(*options)
        assert message in str(ending.value.code)


def test_figures_reach_the_card(many, call, nli, tmp_path, capsys):
    """
    They join what training recorded, and replace older figures of the same set. The owner's own card is not touched,
    and figures of other weights are dropped.
    """
    folder = tmp_path / "checkpoint"
    shutil.copytree(many[1], folder)
    model = CoSupForCausalLM.from_pretrained(folder)
    old_metrics = [{"type": "ret", "name": "Ret", "value": 1.25, "n": 9}]
    old_groups = []
    forced = ", [NSP] forced first"
    for name in (f"a{forced}", "x"):
        dataset = {"name": name, "type": "custom"}
        old_groups.append({"dataset": dataset, "index_size": 2, "metrics": old_metrics})
    write_card(model, folder, "me/model", {"results": old_groups, "training": {"instances": {"nq": 7}}})

    files = {"eval_file": many[3], "corpus_file": many[5]}
    config = {
        "tasks": [{"name": "a", **files}, {"name": "b", "pool": 4, **files}],
        "modes": ["forced"],
        "max_new_tokens": 6,
        "nli_model": str(nli),
    }
    (tmp_path / "tasks.yaml").write_text(json.dumps(config))

    def update(output, *options):
        config_options = ["--config", tmp_path / "tasks.yaml", "--update_card", "true"]
        call(*config_options, "--model", folder, *options, "--output_dir", tmp_path / output)

    def recorded_facts():
        return json.loads((folder / "training_facts.json").read_text())

    def names(facts):
        return [group["dataset"]["name"] for group in facts["results"]]

    update("out")
    tasks = results_of(tmp_path / "out")["tasks"]
    facts = recorded_facts()
    assert names(facts) == ["x", f"a{forced}", f"b (pools of 4){forced}"]
    assert facts["training"] == {"instances": {"nq": 7}}
    for group, name, scope in zip(facts["results"][1:], "ab", ("corpus", "pool"), strict=True):
        on_card = {metric["type"]: metric for metric in group["metrics"]}
        rankings = {"query_recall@1", "hit_rate@5"} & set(tasks[name]["query"][scope])  # no HR@5 of a pool of 4
        assert {"ret", "cor", "k_precision", *rankings} <= set(on_card) <= {*MAIN, *rankings}
        assert len(rankings) == (2 if scope == "corpus" else 1)
        figures = tasks[name]["modes"]["forced"]["metrics"]
        for metric in ("ret", "k_precision", "cor"):
            assert on_card[metric]["value"] == round(100 * figures[metric]["value"], 4)
            assert on_card[metric]["n"] == figures[metric]["n"]
        recall = tasks[name]["query"][scope]["query_recall@1"]["value"]
        assert on_card["query_recall@1"]["value"] == round(100 * recall, 4)
    card = (folder / "README.md").read_text()
    assert f"Gr (by {nli})" in card
    assert "1.25" in card
    assert "7 of nq" in card
    assert facts_of(CoSupForCausalLM.from_pretrained(folder))["results"] == facts["results"]

    (folder / "README.md").write_text("my own card")
    update("again", "--max_eval_samples", 2)
    assert (folder / "README.md").read_text() == "my own card"
    assert "remains unchanged" in capsys.readouterr().out
    facts = recorded_facts()
    new_metrics = [metric for group in facts["results"][1:] for metric in group["metrics"]]
    assert [metric["n"] for metric in new_metrics if metric["type"] == "cor"] == [2, 2]

    with torch.no_grad():
        next(model.gen.parameters()).add_(1.0)
    model.save_pretrained(folder)
    (folder / "training_facts.json").write_text(json.dumps(facts))
    update("other", "--max_eval_samples", 2)
    assert names(recorded_facts()) == [f"a{forced}", f"b (pools of 4){forced}"]


def test_only_a_local_checkpoint_has_a_card_to_update(many, call, tmp_path):
    options = ["--eval_file", many[3], "--update_card", "true", "--output_dir", tmp_path / "hub"]
    with pytest.raises(SystemExit) as ending:
        call("--model", "me/model", *options)
    assert "error: --update_card writes into the folder" in str(ending.value.code)
