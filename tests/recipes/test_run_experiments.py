"""Experiments from file to report: what is trained, found again, resumed, failed, and whether the report says what was measured."""

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

from shared.cli import parse

import pytest
import run_experiments
import torch
import yaml
from safetensors.torch import load_file

from support.models import PASSAGES, make_emb_seq, make_gen, make_tokenizer
from support.nli_models import make_classifier
from support.recipes import write
from trainer import CoSupTrainingArguments, load_corpus, load_evaluation_set
from trainer.judging.tasks import read_tasks

from experiments import definition, launching, task_files
from experiments.definition import load_experiment
from experiments.task_files import cut_corpora, expand_tasks
from shared.arguments import ScriptArguments

ROOT = Path(__file__).parents[2]
FILE = """
title: A tiny experiment
about: Two arms.
base: {max_steps: 2, per_device_train_batch_size: 4, max_length: 256, max_passage_length: 64, report_to: none, save_strategy: "no", num_threads: 1}
arms:
  co: {supervision: co}
  separate: {supervision: separate}
baseline: separate
seeds: [0, 1]
pools: [2, 4]
evaluation: {max_new_tokens: 6, modes: [retrieval]}
tasks:
  - {name: known, eval_file: "{data}/eval.jsonl", corpus_file: "{data}/corpus.jsonl", split: in-domain}
  - {name: other, eval_file: "{data}/eval.jsonl", corpus_file: "{data}/corpus.jsonl", split: out-of-domain, max_eval_samples: 4}
"""


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """Tiny models, a small data set with pools, and an experiment on them."""
    folder = tmp_path_factory.mktemp("inputs")
    make_gen("llama").save_pretrained(folder / "gen")
    make_emb_seq("llama").save_pretrained(folder / "emb_seq")
    for name in ("gen", "emb_seq"):
        make_tokenizer().save_pretrained(folder / name)
    ids = [p["id"] for p in PASSAGES]
    instances = [
        {"id": f"i{i}", "input": f"question {i}?", "segments": [{"text": p["title"] or "none", "passage": p}]}
        for i, p in enumerate(PASSAGES)
    ]
    questions = [
        {
            "id": f"q{i}",
            "input": f"question {i}?",
            "answers": [p["title"] or "none"],
            "provenance": [[p["id"]]],
            "candidates": ids,
        }
        for i, p in enumerate(PASSAGES)
    ]
    write(folder / "train.jsonl", instances * 4)
    write(folder / "corpus.jsonl", PASSAGES)
    write(folder / "eval.jsonl", questions)
    (folder / "experiment.yaml").write_text(FILE)
    return folder


def arguments(inputs, output, *overrides, more=()):
    given = [
        f"data={inputs}",
        f"gen={inputs / 'gen'}",
        f"emb_seq={inputs / 'emb_seq'}",
        f"train_file={inputs / 'train.jsonl'}",
        *overrides,
    ]
    return [
        "--experiment",
        str(inputs / "experiment.yaml"),
        "--output_dir",
        str(output),
        "--override",
        *given,
        *map(str, more),
    ]


@pytest.fixture
def here(monkeypatch):
    """Run the runner in this process, and its recipes too, which spares their imports. Returns its exit code and the recipes that it launched."""
    launched = []

    def launch(recipe, given, run, log, args, lock=None):
        launched.append((recipe, run.name))
        with open(log, "a") as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
            with monkeypatch.context() as patch:
                patch.setattr(sys, "argv", [recipe, *given])
                try:
                    __import__(recipe.removesuffix(".py")).main()
                except SystemExit as end:
                    file.write(f"{end.code}\n")
                    code = end.code
                else:
                    code = 0
        if code:
            raise run_experiments.Failed(f"{recipe}: {launching.reason(log)}")
        return " ".join([recipe, *given]), 1.0

    monkeypatch.setattr(run_experiments, "launch", launch)

    def start(argv):
        launched.clear()
        monkeypatch.setattr(sys, "argv", ["run_experiments.py", *argv])
        with pytest.raises(SystemExit) as end:
            run_experiments.main()
        return end.value.code, list(launched)

    return start


@pytest.mark.slow
def test_two_arms_two_seeds_from_file_to_report(inputs, tmp_path, here, capsys):
    code, launched = here(arguments(inputs, tmp_path / "out", more=("--cache_dir", tmp_path / "cache")))
    assert code == 0
    assert [recipe for recipe, _ in launched] == ["train.py", "run_evaluation.py"] * 4
    found = json.loads((tmp_path / "out" / "experiment.json").read_text())
    assert list(found["figures"]) == ["Top-2", "Top-4"]

    for arm in ("co", "separate"):  # the report's numbers are those that run_evaluation.py measured
        runs = [run for run in found["runs"] if run["arm"] == arm]
        measured = [json.loads(Path(run["evaluation"], "results", "metrics.json").read_text()) for run in runs]
        for task in ("known", "other"):
            for metric in ("ret", "cor", "cor_minus"):
                values = [
                    each["tasks"][f"{task}-2"]["modes"]["retrieval"]["metrics"][metric]["value"] for each in measured
                ]
                figure = found["figures"]["Top-2"][arm][task][metric]
                assert figure["value"] == pytest.approx(sum(values) / 2, abs=1e-12)
                assert list(figure["seeds"].values()) == pytest.approx(values, abs=1e-12)
                assert figure["n"] == (6 if task == "known" else 4)  # the seeds were asked the same questions
        average = [each["averages"]["all"]["retrieval"]["ret"]["value"] for each in measured]  # over both pools
        ours = [found["figures"][setting][arm]["all"]["ret"]["value"] for setting in ("Top-2", "Top-4")]
        assert sum(ours) / 2 == pytest.approx(sum(average) / 2, abs=1e-12)

    difference = found["comparisons"]["Top-2"]["co"]["known"]["ret"]
    ours, theirs = (found["figures"]["Top-2"][arm]["known"]["ret"]["value"] for arm in ("co", "separate"))
    assert difference["difference"] == pytest.approx(ours - theirs, abs=1e-12)
    page, text = (tmp_path / "out" / "report.html").read_text(), (tmp_path / "out" / "report.md").read_text()
    low, high = (100 * bound for bound in found["figures"]["Top-2"]["co"]["known"]["ret"]["interval"])
    assert f"<small>[{low:.1f}, {high:.1f}] n = 6</small>" in page
    assert "no evidence for or against the paper" in text
    assert "Gr needs an NLI model" in text
    assert set(re.findall(r'(?:src|href)="(.{10})', page)) == {"data:image"}  # nothing is loaded from elsewhere

    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*ed.json")}
    assert len(before) == 8
    code, launched = here(arguments(inputs, tmp_path / "again", more=("--cache_dir", tmp_path / "cache")))
    assert (code, launched) == (0, [])  # another experiment with the same arms
    assert json.loads((tmp_path / "again" / "experiment.json").read_text())["figures"] == found["figures"]
    assert before == {path: path.stat().st_mtime_ns for path in before}
    _, launched = here(
        arguments(
            inputs,
            tmp_path / "out",
            "arms.co.temperature=0.1",
            more=("--cache_dir", tmp_path / "cache", "--seeds", "1"),
        )
    )
    assert launched == [("train.py", "co, seed 1"), ("run_evaluation.py", "co, seed 1")]
    capsys.readouterr()
    run_experiments.show_plan(
        load_experiment(inputs / "experiment.yaml", arguments(inputs, "")[5:] + ["seeds=[1, 2]"]), tmp_path / "cache"
    )
    plan = capsys.readouterr().out.partition("trainings:\n")[2].splitlines()
    assert [line.partition(", /")[0].strip() for line in plan] == [
        "co, seed 1: done",
        "separate, seed 1: done",
        "co, seed 2: to do",
        "separate, seed 2: to do",
    ]

    for part in make_classifier():  # an NLI model that comes later judges the answers that are there
        part.save_pretrained(tmp_path / "nli")
    answers = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("predictions.jsonl")}
    judged = arguments(
        inputs,
        tmp_path / "judged",
        f"evaluation.nli_model={tmp_path / 'nli'}",
        more=("--cache_dir", tmp_path / "cache", "--seeds", "0"),
    )
    code, launched = here(judged)
    assert (code, launched) == (0, [("run_evaluation.py", "co, seed 0"), ("run_evaluation.py", "separate, seed 0")])
    assert answers == {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("predictions.jsonl")}
    assert "Gr needs an NLI model" not in (tmp_path / "judged" / "report.md").read_text()
    assert here(judged)[1] == []
    launched = here([*judged, "--override", "evaluation.gr_hypothesis={question} {sentence}", "--only", "co"])[1]
    assert launched == [("run_evaluation.py", "co, seed 0")]
    found = json.loads((tmp_path / "judged" / "experiment.json").read_text())
    assert list(found["figures"]["Top-2"]) == ["co"] and any(
        "judged in another way" in note for note in found["notes"]
    )  # two judges in no table
    broken = [*judged, "--override", "evaluation.gr_hypothesis={answer} {sentence}"]
    assert here(broken)[0] == 1
    assert len(here(judged)[1]) == 2  # a judging that failed has left scores of which nobody knows whose they are
    assert here([*judged, "--override", "evaluation.metric=f1"])[1] == [
        ("run_evaluation.py", f"{arm}, seed 0") for arm in ("co", "separate")
    ]
    assert answers == {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("predictions.jsonl")}


def test_a_failed_arm_stands_in_the_report_and_the_others_are_there(inputs, tmp_path, here):
    broken = [
        "arms.broken.model_name_or_path=missing-model",
        "arms.broken.gen=null",
        "arms.broken.emb_seq=null",
        "seeds=[0]",
        "pools=[4]",
    ]
    code, launched = here(arguments(inputs, tmp_path / "out", *broken))
    assert code == 1
    assert [recipe for recipe, name in launched if name == "broken, seed 0"] == ["train.py"]
    found = json.loads((tmp_path / "out" / "experiment.json").read_text())
    (failed,) = [run for run in found["runs"] if run["failure"]]
    assert failed["arm"] == "broken"
    assert "missing-model" in failed["failure"]
    assert set(found["figures"]["Top-4"]) == {"co", "separate"}
    assert "broken, seed 0: FAILED" in (tmp_path / "out" / "report.md").read_text().replace("\\", "")
    assert "There is one seed" in (tmp_path / "out" / "report.md").read_text()


@pytest.mark.slow
def test_a_killed_training_goes_on_where_it_was(inputs, tmp_path, here):
    """The runner and its training are killed; the second call resumes, and ends with the weights of a training that was never killed."""
    given = [
        "arms={co: {supervision: co}}",
        "baseline=retrieval",
        "seeds=[0]",
        "pools=[4]",
        "max_steps=60",
        "save_strategy=steps",
        "save_steps=5",
    ]
    given += ["save_total_limit=2", "evaluation.max_eval_samples=2"]
    command = [sys.executable, str(ROOT / "recipes/run_experiments.py"), *arguments(inputs, tmp_path / "out", *given)]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    runner = subprocess.Popen(command, env={**os.environ, "HF_HUB_OFFLINE": "1"}, start_new_session=True, **quiet)
    deadline = time.monotonic() + 240
    while not list((tmp_path / "out" / "models").glob("*/model/checkpoint-*/trainer_state.json")):
        assert runner.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.killpg(runner.pid, signal.SIGKILL)
    runner.wait()
    (folder,) = (tmp_path / "out" / "models").glob("[!.]*")
    assert not (folder / "trained.json").exists()
    log = (folder / "train.log").read_bytes()

    assert here(arguments(inputs, tmp_path / "out", *given)) == (
        0,
        [("train.py", "co, seed 0"), ("run_evaluation.py", "co, seed 0")],
    )
    trained = json.loads((folder / "trained.json").read_text())
    assert trained["resumed"]
    assert trained["steps"] == 60
    assert "--resume_from_checkpoint true" in trained["command"]
    assert (folder / "train.log").read_bytes().startswith(log)  # the first log is kept
    assert not list(folder.glob("model/checkpoint-*"))
    assert "its last part" in (tmp_path / "out" / "report.md").read_text()

    assert here(arguments(inputs, tmp_path / "whole", *given))[0] == 0
    (other,) = (tmp_path / "whole" / "models").glob("[!.]*")
    assert other.name == folder.name
    ours, theirs = (load_file(each / "model" / "model.safetensors") for each in (folder, other))
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=0, atol=1e-6)


def test_a_recipe_is_launched_and_its_error_is_found_in_its_log(tmp_path, monkeypatch):
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "recipe.py").write_text(
        "import sys\nprint(sys.argv[1])\nsys.exit('error: it is broken.' if sys.argv[1] == 'bad' else 0)\n"
    )
    monkeypatch.setattr(launching, "ROOT", tmp_path)
    args = run_experiments.RunnerArguments("", "")
    run, log = run_experiments.Run("co", 0, {}), tmp_path / "log"
    with launching.locked_folder(tmp_path / "folder") as lock:
        command, seconds = launching.launch("recipe.py", ["good"], run, log, args, lock)
    assert command.startswith("accelerate launch --config_file ")
    assert seconds > 0
    with pytest.raises(run_experiments.Failed, match=r"recipe.py: error: it is broken. \(exit code 1; log: "):
        launching.launch("recipe.py", ["bad"], run, log, args)
    assert log.read_text().split("\n")[:2] == ["good", "bad"]


def test_the_folder_of_a_training_that_still_runs_is_left_alone(tmp_path, capsys):
    """A program that inherited the lock of a runner that died holds it."""
    with launching.locked_folder(tmp_path / "folder") as lock:
        left = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, pass_fds=[lock])
    entered = Event()

    def second():
        with launching.locked_folder(tmp_path / "folder"):
            entered.set()

    thread = Thread(target=second)
    thread.start()
    assert not entered.wait(0.5)
    assert capsys.readouterr().out == f"{tmp_path / 'folder'}: another process works on it; waiting\n"
    left.communicate(b"\n")
    assert entered.wait(60)
    thread.join()


# ---------------------------------------------------------------------- files


@pytest.mark.parametrize("path", sorted((ROOT / "recipes" / "experiments").glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_experiments_are_valid(path, tmp_path):
    experiment = load_experiment(path)  # checks every option of train.py and run_evaluation.py
    assert experiment.baseline in (experiment.arms if len(experiment.arms) > 1 else experiment.modes)
    if experiment.axis:
        assert sum(experiment.axis in options for options in experiment.arms.values()) >= 2
    places = {"world": "W", "models": "M"}
    world = {
        "gen": "W/gen",
        "emb_seq": "W/emb_seq",
        "train_file": "W/train.jsonl",
        "validation_file": "W/validation.jsonl",
    }
    options = [
        run_experiments.complete(run_experiments.fill(experiment.options(arm), places), 0, world)
        for arm in experiment.arms
    ]
    assert len({definition.key_of(each) for each in options}) == len(options)  # no two arms are the same training
    for each in options:
        (tmp_path / "options.yaml").write_text(yaml.safe_dump(each))
        script, args = parse(
            [ScriptArguments, CoSupTrainingArguments],
            "",
            ["--config", str(tmp_path / "options.yaml"), "--output_dir", str(tmp_path)],
        )
        assert script.gen == "W/gen"
        assert args.seed == 0
        assert args.gradient_accumulation_steps * args.train_batch_size in (64, 128)


def test_shipped_experiments_share_what_they_have_in_common(tmp_path):
    """What one has trained the next one finds."""
    arms = {
        "main_table": "co",
        "corpus_size": "co",
        "controls": "co",
        "general_retriever": "co",
        "emb_seq": "same",
        "nsp_loss_weight": "ours",
    }
    arms |= {"passages_trained": "masked", "similarity": "cosine-0.05"}
    options = [
        load_experiment(ROOT / "recipes" / "experiments" / f"{name}.yaml").options(arm) for name, arm in arms.items()
    ]
    assert (
        len(
            {definition.key_of(run_experiments.complete(each, 0, {"gen": "G", "train_file": "T"})) for each in options}
        )
        == 1
    )


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["learning_rat=1"], "train.py has no option 'learning_rat'"),
        (["evaluation.pools=1"], "run_evaluation.py has no option 'pools'"),
        (["tasks=null"], "there are no tasks"),
        (["baseline=other"], "baseline is 'other', expected one of co, separate"),
        (["axis=colour"], "axis is 'colour'"),
        (
            ["axis=similarity", "arms.co.similarity=dot"],
            "axis is similarity, whose values in the arms are ['dot'], expected numbers",
        ),
        (
            ["axis=max_steps", "arms.co.max_steps=2", "arms.separate.max_steps=2.0"],
            "whose values in the arms are [2, 2.0], expected numbers, each in one arm",
        ),
        (["seeds=3"], "seeds is 3, expected a list"),
        (["tasks=[{name: a, eval_fil: b}]"], "unknown field 'eval_fil'"),
        (["max_steps"], "expected key=value"),
        (["title.a.b=1"], "title holds no options"),
        (["seeds=[1"], "--override seeds=[1: malformed YAML"),
    ],
)
def test_what_an_experiment_file_cannot_say(inputs, overrides, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        load_experiment(inputs / "experiment.yaml", overrides)


def test_overrides_of_several_kinds(inputs):
    argv = [
        "--override",
        "max_steps=7",
        "seeds=[4]",
        "--only",
        "co",
        "--override",
        "arms.co.gen=small",
        "--override=evaluation.top_k=2",
    ]
    required = ["--experiment", str(inputs / "experiment.yaml"), "--output_dir", "out"]
    (args,) = parse([run_experiments.RunnerArguments], "", [*required, *argv])
    assert args.only == ["co"]
    assert args.override == ["max_steps=7", "seeds=[4]", "arms.co.gen=small", "evaluation.top_k=2"]
    experiment = load_experiment(args.experiment, args.override)
    assert (experiment.seeds, experiment.evaluation["top_k"]) == ([4], 2)
    assert [experiment.options(arm).get("gen") for arm in experiment.arms] == ["small", None]
    assert {experiment.options(arm)["max_steps"] for arm in experiment.arms} == {7}


def test_what_names_a_training(tmp_path):
    (tmp_path / "train.jsonl").write_text("a")
    (tmp_path / "copy.jsonl").write_text("a")
    options = {"train_file": str(tmp_path / "train.jsonl"), "learning_rate": 0.1, "seed": 0}
    key = definition.key_of(options)
    assert key == definition.key_of(
        {**options, "train_file": str(tmp_path / "copy.jsonl"), "num_threads": 3, "logging_steps": 1}
    )
    assert key != definition.key_of({**options, "seed": 1})
    (tmp_path / "train.jsonl").write_text("b")
    assert key != definition.key_of(options)


def test_answers_of_another_format_are_made_anew(monkeypatch):
    """What another version has evaluated is in another folder, so it does not block the report."""
    before = definition.evaluation_key("model", [], {"modes": ["off"]})
    assert before == definition.evaluation_key("model", [], {"modes": ["off"], "num_threads": 3})
    monkeypatch.setattr(definition, "FORMAT", definition.FORMAT + 1)
    assert before != definition.evaluation_key("model", [], {"modes": ["off"]})


def test_results_that_cannot_be_reported_end_with_their_message(inputs, tmp_path, here, monkeypatch):
    def report(*args):
        raise ValueError("metrics.json is of format 1")

    monkeypatch.setattr(run_experiments, "plan_seed", lambda *args: [])
    monkeypatch.setattr(run_experiments, "report", report)
    assert here(arguments(inputs, tmp_path / "out"))[0] == "error: metrics.json is of format 1"


def test_a_plan_names_the_trainings_of_a_world_that_is_not_made(inputs, tmp_path):
    """What --dry_run looks for is what a run will train, also with models that come with the world."""
    small = {
        "num_train_entities": 60,
        "num_unseen_entities": 10,
        "num_train_instances": 40,
        "num_validation": 10,
        "num_eval_no_passage": 5,
    }
    task = {"name": "known", "eval_file": str(inputs / "eval.jsonl"), "corpus_file": str(inputs / "corpus.jsonl")}
    overrides = [f"world_options={json.dumps({**small, 'drill_max_steps': 0})}", "model_options={retriever_steps: 1}"]
    overrides += [f"tasks={json.dumps([task])}", "pools=[4]"]
    experiment = load_experiment(ROOT / "recipes/experiments/emb_seq.yaml", overrides)
    before = {arm: run_experiments.planned_options(experiment, arm, 3, tmp_path) for arm in experiment.arms}
    assert not list(tmp_path.iterdir())
    runs = run_experiments.plan_seed(experiment, 3, tmp_path, [])
    assert {run.arm: run.options for run in runs} == before
    assert [run.folder.name for run in runs] == [definition.key_of(options) for options in before.values()]


def test_missing_folders_are_asked_for(inputs):
    experiment = load_experiment(inputs / "experiment.yaml", ["arms.co.emb_seq={models}/retriever"])
    with pytest.raises(ValueError, match="data=FOLDER"):
        run_experiments.plan_seed(experiment, 0, Path("unused"), [])
    experiment = load_experiment(inputs / "experiment.yaml", ["arms.co.emb_seq={models}/retriever", f"data={inputs}"])
    with pytest.raises(ValueError, match="needs world: quickstart"):
        run_experiments.plan_seed(experiment, 0, Path("unused"), [])


def test_corpora_of_growing_size(inputs, tmp_path):
    extra = [{"id": f"extra{i}", "title": "", "text": f"passage {i}"} for i in range(20)]
    write(tmp_path / "corpus.jsonl", [*extra, *PASSAGES])
    experiment = load_experiment(inputs / "experiment.yaml", ["corpus_sizes=[8, 12, full, 100]", f"data={inputs}"])
    tasks = [{"name": "t", "eval_file": str(inputs / "eval.jsonl"), "corpus_file": str(tmp_path / "corpus.jsonl")}]
    entries, meaning = expand_tasks(experiment, tasks)
    assert [own["setting"] for own in meaning.values()] == [
        "corpus of 8",
        "corpus of 12",
        "full corpus",
        "corpus of 100",
    ]
    entries, notes = cut_corpora(entries, meaning, tmp_path / "cut")
    assert notes == [f"t-100: {tmp_path / 'corpus.jsonl'} has only 26 passages"]
    ids = [{passage["id"] for passage in load_corpus(entry["corpus_file"])} for entry in entries]
    assert [len(each) for each in ids] == [8, 12, 26]
    assert ids[0] < ids[1] < ids[2]
    assert {passage["id"] for passage in PASSAGES} <= ids[0]
    for entry in entries:
        load_evaluation_set(entry["eval_file"], corpus=load_corpus(entry["corpus_file"]))  # no candidate that it lacks
    entries, meaning = expand_tasks(load_experiment(inputs / "experiment.yaml", ["corpus_sizes=[3]"]), tasks)
    with pytest.raises(ValueError, match="corpus_sizes holds 3, but 6 gold passages"):
        cut_corpora(entries, meaning, tmp_path / "cut")


def test_corpora_cut_to_what_pools_hold(inputs, tmp_path):
    extra = [{"id": f"extra{i}", "title": "", "text": f"passage {i}"} for i in range(20)]
    write(tmp_path / "corpus.jsonl", [*extra, *PASSAGES])
    experiment = load_experiment(inputs / "experiment.yaml", ["pools=[1, 2]", "pools_only=true"])
    questions = [
        {**x, "candidates": ["extra3", x["provenance"][0][0], "extra4"]}
        for x in load_evaluation_set(inputs / "eval.jsonl")
    ]
    tasks = [
        {
            "name": "t",
            "eval_file": str(write(tmp_path / "eval.jsonl", questions)),
            "corpus_file": str(tmp_path / "corpus.jsonl"),
        }
    ]
    entries = task_files.cut_to_pools(expand_tasks(experiment, tasks)[0], tmp_path / "cut", {"max_eval_samples": 2})
    (corpus_file,) = {entry["corpus_file"] for entry in entries}  # embedded once for both pools
    gold = [x["provenance"][0][0] for x in questions[:2]]
    assert [passage["id"] for passage in load_corpus(corpus_file)] == ["extra3", *gold]
    entries = task_files.cut_to_pools(
        expand_tasks(experiment, tasks)[0], tmp_path / "cut", {"max_eval_samples": 2, "gold_in_pool": False}
    )
    for task in read_tasks(entries, max_eval_samples=2, gold_in_pool=False):  # all that will be asked for is there
        assert {id for x in task.read_questions() for id in (*x["candidates"], *x["provenance"][0])} <= {
            p["id"] for p in load_corpus(task.corpus_file)
        }
    for cut in (task_files.cut_to_pools, lambda entries, folder: cut_corpora(entries, {}, folder)):
        with pytest.raises(ValueError, match="1 of 1 tasks have no corpus_file that .* could cut, e.g. t"):
            cut([{"name": "t", "eval_file": tasks[0]["eval_file"], "index": "x"}], tmp_path / "cut")
    with pytest.raises(ValueError, match="pools_only leaves out"):
        load_experiment(inputs / "experiment.yaml", ["pools=[full]", "pools_only=true"])
