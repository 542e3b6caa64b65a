"""Experiments from file to report: trainings run once, resume or fail, and the report says what was measured."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from threading import Event, Thread

import pytest
import run_experiments
import torch
from safetensors.torch import load_file

from support.experiments import write_experiment
from support.models import PASSAGES, make_emb_seq, make_gen, make_tokenizer
from support.nli_models import make_classifier
from support.recipes import write
from trainer.reports.experiment import _training_row

from experiments import launching
from experiments.definition import load_experiment

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """A folder with tiny models, a small data set with pools, and an experiment on them."""
    folder = tmp_path_factory.mktemp("inputs")
    make_gen("llama").save_pretrained(folder / "gen")
    make_emb_seq("llama").save_pretrained(folder / "emb_seq")
    for name in ("gen", "emb_seq"):
        make_tokenizer().save_pretrained(folder / name)
    instances = []
    for i, passage in enumerate(PASSAGES):
        segment = {"text": passage["title"] or "none", "passage": passage}
        instances.append({"id": f"i{i}", "input": f"question {i}?", "segments": [segment]})
    write(folder / "train.jsonl", instances * 4)
    write_experiment(folder)
    return folder


def overrides_of(inputs, *overrides):
    """Return overrides that name the files of `inputs`, followed by `overrides`."""
    files = [f"data={inputs}", f"gen={inputs / 'gen'}", f"emb_seq={inputs / 'emb_seq'}"]
    return [*files, f"train_file={inputs / 'train.jsonl'}", *overrides]


def arguments(inputs, output, *overrides, more=()):
    """Return the command line of an experiment on `inputs`."""
    required = ["--experiment", str(inputs / "experiment.yaml"), "--output_dir", str(output)]
    return [*required, "--override", *overrides_of(inputs, *overrides), *map(str, more)]


@pytest.fixture
def run_here(monkeypatch):
    """
    A function that runs the runner and its recipes in this process, which saves their imports. It returns the runner's
    exit code, and the recipe and run of each launch.
    """
    launched = []

    def launch(recipe, recipe_arguments, run, log, accelerate_config, lock=None):
        launched.append((recipe, run.name))
        with open(log, "a") as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
            with monkeypatch.context() as patch:
                patch.setattr(sys, "argv", [recipe, *recipe_arguments])
                try:
                    __import__(recipe.removesuffix(".py")).main()
                except SystemExit as end:
                    file.write(f"{end.code}\n")
                    code = end.code
                else:
                    code = 0
        if code:
            raise run_experiments.Failed(f"{recipe}: {launching.reason(log)}")
        return " ".join([recipe, *recipe_arguments]), 1.0

    monkeypatch.setattr(run_experiments, "launch", launch)

    def start(argv):
        launched.clear()
        monkeypatch.setattr(sys, "argv", ["run_experiments.py", *argv])
        with pytest.raises(SystemExit) as end:
            run_experiments.main()
        return end.value.code, list(launched)

    return start


def modification_times(folder, pattern):
    return {path: path.stat().st_mtime_ns for path in folder.rglob(pattern)}


@pytest.mark.slow
def test_two_arms_two_seeds_from_file_to_report(inputs, tmp_path, run_here, capsys):
    cache = tmp_path / "cache"
    with_cache = ("--cache_dir", cache)
    code, launched = run_here(arguments(inputs, tmp_path / "out", more=with_cache))
    assert code == 0
    assert [recipe for recipe, _ in launched] == ["train.py", "run_evaluation.py"] * 4
    first_results = json.loads((tmp_path / "out" / "experiment.json").read_text())
    assert list(first_results["figures"]) == ["Top-2", "Top-4"]
    check_figures_against_evaluations(first_results)
    check_report(first_results, tmp_path / "out")

    # Another experiment with the same arms trains and evaluates nothing, whatever it compares.
    before = modification_times(cache, "*ed.json")
    assert len(before) == 8
    plan = "comparisons=[{arm: co, against: separate, figure: query_recall@1, group: known, setting: Top-4}]"
    code, launched = run_here(arguments(inputs, tmp_path / "again", plan, more=with_cache))
    assert (code, launched) == (0, [])
    results = json.loads((tmp_path / "again" / "experiment.json").read_text())
    assert results["figures"] == first_results["figures"]
    (planned,) = results["planned_comparisons"]
    figures = [results["figures"]["Top-4"][arm]["known"]["query_recall@1"]["value"] for arm in ("co", "separate")]
    assert planned["values"] == pytest.approx(figures)
    assert "## Planned comparisons" in (tmp_path / "again" / "report.md").read_text()
    assert modification_times(cache, "*ed.json") == before

    # An arm with another option is trained, the other one is not.
    options = ["temperature=0.1", f"validation_file={inputs / 'train.jsonl'}", "eval_strategy=steps", "eval_steps=1"]
    overrides = [f"arms.co.{option}" for option in options]
    _, launched = run_here(arguments(inputs, tmp_path / "out", *overrides, more=(*with_cache, "--seeds", "1")))
    assert launched == [("train.py", "co, seed 1"), ("run_evaluation.py", "co, seed 1")]
    co = json.loads((tmp_path / "out" / "experiment.json").read_text())["learning_curves"]["co"]
    first, second = co["curves"]["eval_ntp_loss"]
    assert (first["step"], second["step"], co["steps"]) == (1, 2, 2)
    assert 0 < first["seconds"] < second["seconds"] <= co["seconds"] and not co["seconds_are_estimates"]
    assert co["peak_memory"] > 0.1
    capsys.readouterr()
    experiment = load_experiment(inputs / "experiment.yaml", overrides_of(inputs, "seeds=[1, 2]"))
    run_experiments.show_plan(experiment, cache)
    plan = capsys.readouterr().out.partition("trainings:\n")[2].splitlines()
    assert [line.partition(", /")[0].strip() for line in plan] == [
        "co, seed 1: done",
        "separate, seed 1: done",
        "co, seed 2: to do",
        "separate, seed 2: to do",
    ]

    # An NLI model that comes later judges the answers that exist.
    for part in make_classifier():
        part.save_pretrained(tmp_path / "nli")
    answers = modification_times(cache, "predictions.jsonl")
    with_judge = arguments(
        inputs,
        tmp_path / "judged",
        f"evaluation.nli_model={tmp_path / 'nli'}",
        more=(*with_cache, "--seeds", "0"),
    )
    evaluations = [("run_evaluation.py", "co, seed 0"), ("run_evaluation.py", "separate, seed 0")]
    assert run_here(with_judge) == (0, evaluations)
    assert modification_times(cache, "predictions.jsonl") == answers
    assert "Gr needs an NLI model" not in (tmp_path / "judged" / "report.md").read_text()
    assert run_here(with_judge)[1] == []

    # A table never mixes the scores of two judges.
    other_hypothesis = [*with_judge, "--override", "evaluation.gr_hypothesis={question} {sentence}", "--only", "co"]
    assert run_here(other_hypothesis)[1] == [("run_evaluation.py", "co, seed 0")]
    judged_results = json.loads((tmp_path / "judged" / "experiment.json").read_text())
    assert list(judged_results["figures"]["Top-2"]) == ["co"]
    assert any("judged in another way" in note for note in judged_results["notes"])

    # An evaluation that fails leaves scores of an unknown judge, so both arms are judged again.
    broken = [*with_judge, "--override", "evaluation.gr_hypothesis={answer} {sentence}"]
    assert run_here(broken)[0] == 1
    assert len(run_here(with_judge)[1]) == 2
    assert run_here([*with_judge, "--override", "evaluation.metric=f1"])[1] == evaluations
    assert modification_times(cache, "predictions.jsonl") == answers


def check_figures_against_evaluations(results):
    """Check that the numbers of the report are those that run_evaluation.py measured."""
    for arm in ("co", "separate"):
        figures = {setting: results["figures"][setting][arm] for setting in ("Top-2", "Top-4")}
        evaluations = []
        for run in results["runs"]:
            if run["arm"] == arm:
                evaluations.append(json.loads(Path(run["evaluation"], "results", "metrics.json").read_text()))
        for task, num_questions in (("known", 6), ("other", 4)):
            modes = [evaluation["tasks"][f"{task}-2"]["modes"] for evaluation in evaluations]
            for metric in ("ret", "cor", "cor_minus"):
                values = [mode_results["retrieval"]["metrics"][metric]["value"] for mode_results in modes]
                figure = figures["Top-2"][task][metric]
                assert figure["value"] == pytest.approx(sum(values) / 2, abs=1e-12)
                assert list(figure["seeds"].values()) == pytest.approx(values, abs=1e-12)
                assert figure["n"] == num_questions  # both seeds were asked the same questions
        # The averages of run_evaluation.py are over both pools.
        averages = [evaluation["averages"]["all"]["retrieval"]["ret"]["value"] for evaluation in evaluations]
        pool_averages = [figures[setting]["all"]["ret"]["value"] for setting in ("Top-2", "Top-4")]
        assert sum(pool_averages) / 2 == pytest.approx(sum(averages) / 2, abs=1e-12)


def check_report(results, output):
    figures = results["figures"]["Top-2"]
    difference = results["comparisons"]["Top-2"]["co"]["known"]["ret"]["difference"]
    co, separate = (figures[arm]["known"]["ret"]["value"] for arm in ("co", "separate"))
    assert difference == pytest.approx(co - separate, abs=1e-12)
    page = (output / "report.html").read_text()
    text = (output / "report.md").read_text()
    low, high = (100 * bound for bound in figures["co"]["known"]["ret"]["interval"])
    assert f"<small>[{low:.1f}, {high:.1f}] n = 6</small>" in page
    assert "no evidence for or against the paper" in text
    assert "Gr needs an NLI model" in text
    assert set(re.findall(r'(?:src|href)="(.{10})', page)) == {"data:image"}  # nothing is loaded from elsewhere


def test_a_failed_arm_is_in_the_report_and_the_others_run(inputs, tmp_path, run_here):
    broken = [
        "arms.broken.model_name_or_path=missing-model",
        "arms.broken.gen=null",
        "arms.broken.emb_seq=null",
        "seeds=[0]",
        "pools=[4]",
    ]
    code, launched = run_here(arguments(inputs, tmp_path / "out", *broken))
    assert code == 1
    assert [recipe for recipe, name in launched if name == "broken, seed 0"] == ["train.py"]
    results = json.loads((tmp_path / "out" / "experiment.json").read_text())
    (failed,) = [run for run in results["runs"] if run["failure"]]
    assert failed["arm"] == "broken"
    assert "missing-model" in failed["failure"]
    assert set(results["figures"]["Top-4"]) == {"co", "separate"}
    text = (tmp_path / "out" / "report.md").read_text()
    assert "broken, seed 0: FAILED" in text.replace("\\", "")
    assert "There is one seed" in text


def test_an_arm_starts_from_the_model_of_another(inputs, tmp_path, run_here):
    """The other arm is trained first, but not evaluated unless it is asked for; `max_steps: 0` leaves its weights."""
    start = ["seeds=[0]", "pools=[4]", "evaluation.max_eval_samples=2", "baseline=co"]
    start += ["arms.co={model_name_or_path: '{arm:separate}', supervision: separate, max_steps: 0}"]
    start += ["gen=null", "emb_seq=null", "disable_tqdm=true"]
    start += [f"arms.separate.gen={inputs / 'gen'}", f"arms.separate.emb_seq={inputs / 'emb_seq'}"]
    code, launched = run_here(arguments(inputs, tmp_path / "out", *start, more=("--only", "co")))
    assert (code, launched[:2]) == (0, [("train.py", "separate, seed 0"), ("train.py", "co, seed 0")])
    assert launched[2:] == [("run_evaluation.py", "co, seed 0")]
    trained = {}
    for path in (tmp_path / "out" / "models").glob("*/trained.json"):
        trained[json.loads(path.read_text())["steps"]] = load_file(path.parent / "model" / "model.safetensors")
    assert set(trained) == {0, 2}
    for name, weight in trained[2].items():
        torch.testing.assert_close(trained[0][name], weight, rtol=0, atol=0)
    for log in (tmp_path / "out").rglob("*.log"):
        assert "%|" not in log.read_text(), f"{log} has a progress bar"

    # What was evaluated needs its weights no longer.
    for path in (tmp_path / "out" / "models").rglob("*.safetensors"):
        path.unlink()
    assert run_here(arguments(inputs, tmp_path / "out", *start, more=("--only", "co"))) == (0, [])


def test_an_arm_whose_start_fails_fails_once_and_says_why(inputs, tmp_path, run_here):
    broken = ["seeds=[0]", "pools=[4]", "gen=null", "emb_seq=null", "arms.separate.gen=missing-model"]
    broken += ["arms.co.model_name_or_path={arm:separate}", "arms.separate.emb_seq=missing-model"]
    code, launched = run_here(arguments(inputs, tmp_path / "out", *broken))
    assert (code, launched) == (1, [("train.py", "separate, seed 0")])
    runs = json.loads((tmp_path / "out" / "experiment.json").read_text())["runs"]
    failures = {run["arm"]: run["failure"] for run in runs}
    assert failures["co"] == f"co starts from separate, which failed: {failures['separate']}"
    assert failures["separate"].startswith("train.py: error: ")


@pytest.mark.slow
def test_a_training_whose_last_loss_is_nan_is_done(tmp_path, monkeypatch):
    """JSON has no NaN. Other arms still run, and the report says that the loss is missing."""
    run = launching.Run("co", 0, {}, tmp_path / "model", tmp_path / "evaluation")
    monkeypatch.setattr(run_experiments, "check_key", lambda folder, key: None)
    monkeypatch.setattr(run_experiments, "launch", lambda *args: ("train.py", 1.0))
    facts = {"steps": 3, "parameters": {"gen": 10**6}, "losses": {"loss": 2.0, "ntp_loss": float("nan")}}
    monkeypatch.setattr(run_experiments, "training_facts", lambda model: facts)
    run_experiments.train(run, str(ROOT / "recipes/accelerate_configs/single.yaml"))
    trained = json.loads((run.folder / "trained.json").read_text())
    assert trained["losses"] == {"loss": 2.0, "ntp_loss": None}
    assert trained["not_finite"] == {"losses.ntp_loss": "nan"}
    row = _training_row({"arm": "co", "seed": 0, "trained": trained, "evaluated": None})
    assert row[5] == "ntp —"


def test_a_killed_training_resumes(inputs, tmp_path, run_here):
    """After the runner and its training are killed, a second call gives the weights of a training without a kill."""
    overrides = [
        "arms={co: {supervision: co}}",
        "baseline=retrieval",
        "seeds=[0]",
        "pools=[4]",
        "max_steps=60",
        "save_strategy=steps",
        "save_steps=5",
        "save_total_limit=2",
        "evaluation.max_eval_samples=2",
    ]
    argv = arguments(inputs, tmp_path / "out", *overrides)
    command = [sys.executable, str(ROOT / "recipes/run_experiments.py"), *argv]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    runner = subprocess.Popen(command, env={**os.environ, "HF_HUB_OFFLINE": "1"}, start_new_session=True, **quiet)
    deadline = time.monotonic() + 600
    while not list((tmp_path / "out" / "models").glob("*/model/checkpoint-*/trainer_state.json")):
        assert runner.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.killpg(runner.pid, signal.SIGKILL)
    runner.wait()
    (folder,) = (tmp_path / "out" / "models").glob("[!.]*")
    assert not (folder / "trained.json").exists()
    first_log = (folder / "train.log").read_bytes()

    launched = [("train.py", "co, seed 0"), ("run_evaluation.py", "co, seed 0")]
    assert run_here(argv) == (0, launched)
    trained = json.loads((folder / "trained.json").read_text())
    assert trained["resumed"]
    assert trained["steps"] == 60
    assert "--resume_from_checkpoint true" in trained["command"]
    assert (folder / "train.log").read_bytes().startswith(first_log)
    assert not list(folder.glob("model/checkpoint-*"))
    assert "its last part" in (tmp_path / "out" / "report.md").read_text()

    assert run_here(arguments(inputs, tmp_path / "whole", *overrides))[0] == 0
    (whole_folder,) = (tmp_path / "whole" / "models").glob("[!.]*")
    assert whole_folder.name == folder.name
    resumed_weights = load_file(folder / "model" / "model.safetensors")
    whole_weights = load_file(whole_folder / "model" / "model.safetensors")
    for name, weight in resumed_weights.items():
        torch.testing.assert_close(weight, whole_weights[name], rtol=0, atol=1e-6)


def test_a_recipe_is_launched_and_its_error_is_found_in_its_log(tmp_path, monkeypatch):
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "recipe.py").write_text(
        "import sys\nprint(sys.argv[1])\nsys.exit('error: it is broken.' if sys.argv[1] == 'bad' else 0)\n"
    )
    monkeypatch.setattr(launching, "ROOT", tmp_path)
    config = run_experiments.RunnerArguments("", "").accelerate_config
    run = launching.Run("co", 0, {}, tmp_path, tmp_path)
    log = tmp_path / "log"
    with launching.locked_folder(tmp_path / "folder") as lock:
        command, seconds = launching.launch("recipe.py", ["good"], run, log, config, lock)
    assert command.startswith("accelerate launch --config_file ")
    assert seconds > 0
    with pytest.raises(run_experiments.Failed, match=r"recipe.py: error: it is broken. \(exit code 1; log: "):
        launching.launch("recipe.py", ["bad"], run, log, config)
    assert log.read_text().split("\n")[:2] == ["good", "bad"]


def test_a_training_that_outlives_its_runner_keeps_its_folder(tmp_path, capsys):
    """A program that inherits the lock of a runner holds it after the runner has died."""
    with launching.locked_folder(tmp_path / "folder") as lock:
        training = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, pass_fds=[lock])
    entered = Event()

    def wait_for_folder():
        with launching.locked_folder(tmp_path / "folder"):
            entered.set()

    thread = Thread(target=wait_for_folder)
    thread.start()
    assert not entered.wait(0.5)
    assert capsys.readouterr().out == f"{tmp_path / 'folder'}: another process is working on it; waiting\n"
    training.communicate(b"\n")
    assert entered.wait(60)
    thread.join()


def test_results_that_cannot_be_reported_end_with_their_message(inputs, tmp_path, run_here, monkeypatch):
    def report(*args):
        raise ValueError("metrics.json is of format 1")

    monkeypatch.setattr(run_experiments, "plan_seed", lambda *args: [])
    monkeypatch.setattr(run_experiments, "report", report)
    assert run_here(arguments(inputs, tmp_path / "out"))[0] == "error: metrics.json is of format 1"


def test_data_that_change_while_an_experiment_runs_are_an_error(inputs, tmp_path, run_here, monkeypatch):
    train_file = write(tmp_path / "train.jsonl", [json.loads(line) for line in (inputs / "train.jsonl").open()])
    launch = run_experiments.launch

    def changing_launch(*args, **kwargs):
        with open(train_file, "a") as file:
            file.write(train_file.read_text().splitlines()[0] + "\n")
        return launch(*args, **kwargs)

    monkeypatch.setattr(run_experiments, "launch", changing_launch)
    overrides = ("seeds=[0]", "base.max_steps=1", f"train_file={train_file}")
    code, _ = run_here(arguments(inputs, tmp_path / "out", *overrides, more=("--only", "co")))
    assert code == 1
    (run,) = [run for run in json.loads((tmp_path / "out" / "experiment.json").read_text())["runs"] if run["failure"]]
    assert "changed while the experiment ran: start it again" in run["failure"]
    assert run["trained"] is None
