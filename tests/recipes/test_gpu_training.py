"""Part 3 of recipes/benchmarks/gpu.py, on a CPU: tiny arms are trained, judged and compared, and calls resume."""

import importlib
import json
import sys
import time

import numpy as np
import pytest
import torch

import support.benchmarks  # noqa: F401  (makes gpu_parts importable)

from gpu_parts import runner, training, training_arm, weights
from gpu_parts.records import read_record, write_record
from gpu_parts.runner import Context, Later, Skip, run_checks
from gpu_parts.training_comparison import compare_arms
from gpu_parts.training_inputs import read_inputs
from gpu_parts.training_outcomes import digits, scores_of
from gpu_parts.training_tasks import evenly, given_tasks, gold_places

SEED_0 = [f"{arm}_seed_0" for arm in training.ARMS]


def context(folder, **options):
    """Return the context of a call that has an hour left, on a CPU."""
    options = {"tiny": True, "deadline": time.time() + 3600, **options}
    return Context(torch.device("cpu"), folder / "training", **options)


def result(folder, name):
    """Return the result of a check that is done."""
    record = read_record(folder, "training", name)
    assert record["status"] == "done", record["reason"]
    return record["result"]


# ------------------------------------------------------------------ from the beginning to the comparison


def test_a_call_that_runs_out_of_time_is_continued_by_the_next(tmp_path, monkeypatch):
    monkeypatch.setattr(training_arm, "SECONDS_TO_JUDGE", 10_000)
    monkeypatch.setattr(training_arm, "peak_flops", lambda device: 1e9)
    run_checks("training", training.CHECKS[:1], context(tmp_path), "first")
    record = read_record(tmp_path, "training", "co_seed_0")
    assert (record["status"], record["reason"]) == ("left", "trained; for the next call: 2 of 2 tasks to judge")
    folder = tmp_path / "training" / "co_seed_0"
    assert (folder / "model" / "model.safetensors").exists()
    trained = json.loads((folder / "training.json").read_text())
    # 6 operations per token and parameter; Gen's body and Emb_seq have equally many, without embeddings
    body = weights.AutoModelForCausalLM.from_pretrained(tmp_path / "training" / "gen_random").model.layers
    operations = 6 * sum(parameter.numel() for parameter in body.parameters())
    assert trained["mfu"] * 1e9 / trained["tokens_per_second"] == pytest.approx(operations, rel=0.01)
    monkeypatch.undo()

    run_checks("training", training.CHECKS, context(tmp_path), "second")
    assert result(tmp_path, "co_seed_0")["training"] == trained  # the same seconds: it was not trained again
    for name in SEED_0:
        check_result(result(tmp_path, name), name.partition("_")[0])
        assert not (tmp_path / "training" / name / "model").exists()
        assert (tmp_path / "training" / f"{name}.json").stat().st_size < 20_000
    for seed in (1, 2):
        for arm in training.ARMS:
            assert read_record(tmp_path, "training", f"{arm}_seed_{seed}")["reason"] == "tiny shapes: seed 0 alone"
    check_comparison(tmp_path)
    assert read_record(tmp_path, "training", "compare_seeds")["reason"] == "co_seed_1 is not done"
    report = (tmp_path / "report.md").read_text()
    assert "### separate_seed_0: percent, with 95 % intervals" in report
    assert "co − separate: R@1 " in report


def check_result(found, arm):
    assert (found["arm"], found["seed"], found["weights"]) == (arm, 0, "random weights, a tiny shape")
    assert (found["training"]["steps"], found["training"]["attention"]) == (2, "sdpa")
    assert found["training"]["tokens"] > 500
    assert found["summary"].startswith("random weights, a tiny shape: 2 steps in ")
    assert found["missing_tasks"] == ["fever", "slot_trex", "slot_zsre", "hotpotqa"]
    assert list(found["tasks"]) == ["nq", "squad"]
    for task in found["tasks"].values():
        assert [len(task[name]) for name in ("gold_places", "ret", "cor")] == [5, 5, 5]
        assert task["passages"] == 12
        places = list(task["gold_places"])
        assert task["figures"]["query_recall@1"]["value"] == places.count("1") / 5
        assert task["figures"]["query_recall@5"]["value"] == (5 - places.count("0")) / 5
        assert task["figures"]["ret"]["value"] == task["ret"].count("1") / 5
    mean = sum(task["figures"]["query_recall@5"]["value"] for task in found["tasks"].values()) / 2
    assert found["averages"]["all"]["query_recall@5"]["value"] == pytest.approx(mean)


def check_comparison(tmp_path):
    comparisons = result(tmp_path, "compare_seed_0")["comparisons"]
    assert list(comparisons) == ["co", "co-tied"]
    for arm in comparisons:
        for task in ("nq", "squad"):
            places = [result(tmp_path, f"{name}_seed_0")["tasks"][task]["gold_places"] for name in ("separate", arm)]
            old, new = ([0 < int(place) for place in of_arm] for of_arm in places)
            found = comparisons[arm]["query_recall@5"][task]
            assert found["difference"] == pytest.approx(np.mean(new) - np.mean(old))
            assert found["n"] == 5


def test_judged_tasks_and_checkpoints_are_kept_and_those_of_other_inputs_are_not(tmp_path, monkeypatch):
    trained, judged = [], []

    def train(context, arm, seed, inputs, model_folder):
        trained.append(inputs.weights)
        model_folder.mkdir(parents=True)
        return {"steps": 2, "seconds": 1.0}

    def judge(model, task, tiny):
        judged.append(task.name)
        if judged == ["nq", "squad"]:
            raise RuntimeError("the second task fails once")
        places = {"gold_places": "105", "ret": "011", "cor": "1-0"}
        return {"split": task.split, "questions": "", "figures": {}, **places}

    monkeypatch.setattr(training_arm, "train", train)
    monkeypatch.setattr("gpu_parts.training_tasks.judge_task", judge)
    monkeypatch.setattr(
        "gpu_parts.training_tasks.CoSupForCausalLM.from_pretrained", lambda *_, **__: torch.nn.Module()
    )
    folder = tmp_path / "training" / "co"
    call = (context(tmp_path), "co", 0, folder)
    with pytest.raises(RuntimeError, match="the second task fails once"):
        training_arm.train_and_judge(*call)
    training_arm.train_and_judge(*call)
    assert (len(trained), judged) == (1, ["nq", "squad", "squad"])
    training_arm.train_and_judge(*call)  # everything is there
    assert (len(trained), judged) == (1, ["nq", "squad", "squad"])
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text("{}")
    training_arm.train_and_judge(context(tmp_path, gen=str(tmp_path / "other")), *call[1:])
    assert trained == ["random weights, a tiny shape", "other"]
    assert judged[3:] == ["nq", "squad"]


def test_a_check_that_goes_on_later_is_tried_again(tmp_path):
    calls = []

    def run(context):
        calls.append(context)
        if len(calls) == 1:
            raise Later("half of it remains")
        return {}

    checks = [runner.Check("slow", run, minutes=1)]
    run_checks("training", checks, context(tmp_path), "first")
    record = read_record(tmp_path, "training", "slow")
    assert (record["status"], record["reason"]) == ("left", "half of it remains")
    run_checks("training", checks, context(tmp_path), "second")
    assert read_record(tmp_path, "training", "slow")["status"] == "done"


# ------------------------------------------------------------------ how a model is run in training


def test_a_way_that_fails_gives_way_to_the_next_and_is_not_tried_again(tmp_path, monkeypatch):
    speeds = [training_arm.Speed("flex_attention", True), training_arm.Speed("sdpa", True)]
    tried = []

    def train_once(context, arm, seed, inputs, speed, model_folder):
        tried.append(str(speed))
        if speed.attention == "flex_attention":
            raise NotImplementedError("no such kernel")
        return {"attention": speed.attention}

    monkeypatch.setattr(training_arm, "train_once", train_once)
    here = context(tmp_path)
    here.folder.mkdir()
    real_speeds = training_arm.speeds
    cuda = torch.device("cuda")
    monkeypatch.setattr(training_arm, "speeds", lambda device, file: real_speeds(cuda, file)[:2])
    assert real_speeds(cuda, here.folder / "speed.json")[:2] == speeds
    training = training_arm.train(here, "co", 0, None, tmp_path / "model")
    failure = "flex_attention, compiled layers: NotImplementedError: no such kernel"
    assert training == {"attention": "sdpa", "failed_before": [failure]}
    assert training_arm.train(here, "separate", 0, None, tmp_path / "model")["failed_before"] == []
    assert tried == ["flex_attention, compiled layers", "sdpa, compiled layers", "sdpa, compiled layers"]


def test_a_way_that_ends_the_process_is_not_the_first_of_the_next_arm(tmp_path, monkeypatch):
    tried = []

    def train_once(context, arm, seed, inputs, speed, model_folder):
        tried.append(str(speed))
        if speed.attention == "flex_attention":
            raise KeyboardInterrupt  # as far as files go, like a process that is killed
        return {}

    monkeypatch.setattr(training_arm, "train_once", train_once)
    here = context(tmp_path)
    here.folder.mkdir()
    here.device = torch.device("cuda")
    with pytest.raises(KeyboardInterrupt):
        training_arm.train(here, "co", 0, None, tmp_path / "model")
    training_arm.train(here, "separate", 0, None, tmp_path / "model")
    assert tried == ["flex_attention, compiled layers", "sdpa, compiled layers"]


def test_a_training_that_would_not_end_in_time_says_how_long_it_takes(tmp_path):
    shown = []
    stopwatch = training_arm.Stopwatch(context(tmp_path, deadline=time.time() + 60), lambda: shown.append("it works"))
    args, state = type("Args", (), {"torch_compile": True})(), training_arm.TrainerState(max_steps=1020)
    now = time.perf_counter()
    stopwatch.start = now - 500
    stopwatch.marks = [{"time": now, "steps": 10, "tokens": 0, "operations": 0}]
    with pytest.raises(RuntimeError, match="The first 10 steps took 500 s"):
        state.global_step = 10
        stopwatch.check_time(args, state)
    assert shown == []
    stopwatch.start = now - 100
    stopwatch.check_time(args, state)
    assert shown == ["it works"]
    stopwatch.marks.append({"time": now + 5, "steps": 20, "tokens": 4000, "operations": 0})
    assert stopwatch.figures()["tokens_per_second"] == pytest.approx(800)
    assert stopwatch.figures()["step_seconds"] == pytest.approx(0.5)
    state.global_step = 20
    with pytest.raises(Skip, match="the training takes 8.3 more minutes, and 1.0 are left"):
        stopwatch.check_time(args, state)


# ------------------------------------------------------------------ outcomes and their comparison


def test_outcomes_are_one_digit_a_question():
    assert digits([1.0, 0.0, None]) == "10-"
    with pytest.raises(ValueError, match="An outcome is 0.5, expected 0 or 1"):
        digits([0.5])
    scores = scores_of({"gold_places": "0125-", "ret": "10-", "cor": "01-"})
    assert scores == {
        "query_recall@1": [0.0, 1.0, 0.0, 0.0, None],
        "query_recall@5": [0.0, 1.0, 1.0, 1.0, None],
        "ret": [1.0, 0.0, None],
        "cor": [0.0, 1.0, None],
    }


def test_the_place_of_a_gold_passage_is_that_of_the_nearest(monkeypatch):
    rankings = np.array([[3, 1, 0], [0, 2, 1], [0, 1, 2]])

    class Index:
        def search(self, queries, k):
            return None, rankings

        def get_passages(self, rows):
            return [{"id": f"p{row}"} for row in rows]

    monkeypatch.setattr("gpu_parts.training_tasks.embed_queries", lambda model, questions, batch_size: None)
    provenances = [[["p0"], ["p1", "p9"]], [["p3"]], []]
    questions = [{"provenance": provenance} for provenance in provenances]
    assert gold_places(None, Index(), questions, 2) == "20-"


def test_questions_are_taken_evenly():
    assert evenly(list("abcdefg"), 3) == ["a", "c", "e"]
    assert evenly(list("abc"), 3) == ["a", "b", "c"]
    assert len(set(evenly(list(range(1177)), 300))) == 300


def record_of(folder, name, order=0, status="done", weights="w", **tasks):
    """Write the record of an arm, with the same outcomes in `ret` and `cor` as its recall at 1."""
    results = {}
    for task, places in tasks.items():
        hits = places.replace("5", "0")
        split = "in-domain" if task == "nq" else "out-of-domain"
        results[task] = {"split": split, "questions": task, "gold_places": places, "ret": hits, "cor": hits}
    record = {"part": "training", "check": name, "order": order, "status": status, "reason": ""}
    write_record(folder, {**record, "result": {"weights": weights, "tasks": results}})


def test_arms_are_paired_question_by_question_over_seeds(tmp_path):
    record_of(tmp_path, "separate_0", nq="0000", squad="10")
    record_of(tmp_path, "separate_1", nq="1000", squad="10")
    record_of(tmp_path, "co_0", nq="1150", squad="10")
    record_of(tmp_path, "co_1", nq="1000", squad="00")
    record_of(tmp_path, "tied_0", nq="0000", squad="10")
    record_of(tmp_path, "tied_1", status="failed")
    checks = {arm: [f"{arm}_0", f"{arm}_1"] for arm in ("co", "tied", "separate")}
    found = compare_arms(tmp_path / "training", checks)
    co = found["comparisons"]["co"]
    assert co["seeds"] == 2
    # nq: +1 +1 0 0 with seed 0, and nothing with seed 1; squad: nothing, and -1 0
    assert co["query_recall@1"]["nq"]["difference"] == pytest.approx(0.25)
    assert co["query_recall@5"]["nq"]["difference"] == pytest.approx(0.375)
    assert co["query_recall@1"]["squad"]["difference"] == pytest.approx(-0.25)
    assert co["query_recall@1"]["in-domain"]["difference"] == pytest.approx(0.25)
    assert co["query_recall@1"]["all"]["difference"] == pytest.approx(0.0)
    # means over tasks: +0.25 with seed 0, -0.25 with seed 1
    assert co["query_recall@1"]["all"]["seed_means"] == [0.25, -0.25]
    assert co["query_recall@1"]["all"]["p_value"] == 1
    low, high = co["query_recall@1"]["nq"]["interval"]
    assert low == 0 and 0.5 < high <= 1  # both seeds can be seed 0, and all questions those that it gained
    assert found["comparisons"]["tied"]["seeds"] == 1
    assert found["comparisons"]["tied"]["cor"]["all"]["difference"] == 0
    assert found["comparisons"]["tied"]["cor"]["all"]["interval"] is None  # one seed shows nothing about seeds
    assert found["summary"].startswith("co − separate: R@1 +0.0 [")
    assert found["tables"][0]["rows"][0][:2] == ["co", "nq"]
    assert found["tables"][0]["rows"][0][2].startswith("+25.0 [+0.0, +")


def test_p_values_are_corrected_for_arms_and_figures(tmp_path):
    record_of(tmp_path, "separate_0", nq="0" * 20)
    record_of(tmp_path, "co_0", nq="1" * 12 + "0" * 8)
    record_of(tmp_path, "tied_0", nq="0" * 19 + "1")
    checks = {arm: [f"{arm}_0"] for arm in ("co", "tied", "separate")}
    found = compare_arms(tmp_path / "training", checks)
    averages = [arm["query_recall@1"]["all"] for arm in found["comparisons"].values()]
    assert averages[0]["p_value"] < 0.005
    assert averages[0]["holm_p"] == pytest.approx(8 * averages[0]["p_value"])  # two arms, four figures
    assert averages[1]["holm_p"] > 0.3
    assert "holm_p" not in found["comparisons"]["co"]["query_recall@1"]["nq"]
    assert ", p 0.004, Cor" in found["summary"]


def test_a_comparison_waits_and_refuses_what_does_not_match(tmp_path):
    checks = {"co": ["co_0"], "separate": ["separate_0"]}
    record_of(tmp_path, "co_0", nq="10")
    with pytest.raises(Skip, match="separate_0 is not done"):
        compare_arms(tmp_path / "training", checks)
    record_of(tmp_path, "separate_0", status="failed")
    with pytest.raises(Skip, match="no arm can be compared"):
        compare_arms(tmp_path / "training", checks)
    record_of(tmp_path, "separate_0", nq="10", weights="others")
    with pytest.raises(ValueError, match="One arm began with the weights 'others', another with 'w'"):
        compare_arms(tmp_path / "training", checks)
    record_of(tmp_path, "separate_0", nq="10")
    record = read_record(tmp_path, "training", "separate_0")
    record["result"]["tasks"]["nq"]["questions"] = "of another file"
    write_record(tmp_path, record)
    with pytest.raises(ValueError, match="different questions of nq"):
        compare_arms(tmp_path / "training", checks)


# ------------------------------------------------------------------ what may be missing


def test_without_files_and_packages_the_checks_are_skipped(tmp_path, monkeypatch):
    call = context(tmp_path, tiny=False)
    with pytest.raises(Skip, match="needs --train_file and --data"):
        read_inputs(call)
    with pytest.raises(Skip, match=r"has no eval/TASK.jsonl.gz with corpus/TASK.jsonl.gz of nq, fever"):
        given_tasks(str(tmp_path), tiny=False)
    monkeypatch.setattr(runner, "is_installed", lambda package: package != "datasets")
    run_checks("training", training.CHECKS[:1], call, "command")
    record = read_record(tmp_path, "training", "co_seed_0")
    assert (record["status"], record["reason"]) == ("skipped", "datasets is not installed")


def test_the_part_begins_and_compares_without_datasets_and_faiss(monkeypatch):
    packages = ("gpu_parts", "trainer", "datasets")
    before = {name: module for name, module in sys.modules.items() if name.partition(".")[0] in packages}
    for name in before:
        monkeypatch.delitem(sys.modules, name)
    for name in ("datasets", "faiss"):
        monkeypatch.setitem(sys.modules, name, None)  # importing it fails
    try:
        assert len(importlib.import_module("gpu_parts.training").CHECKS) == 13
        importlib.import_module("gpu_parts.training_comparison")
        with pytest.raises(ImportError):
            importlib.import_module("gpu_parts.training_arm")
    finally:
        for name in list(sys.modules):
            if name.partition(".")[0] in packages and name not in before:
                del sys.modules[name]
