"""The speed part of `recipes/benchmarks/gpu.py` on tiny shapes: every check runs on a CPU and measures something."""

import gc
import importlib
import json
import math
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

BENCHMARKS = Path(__file__).parents[2] / "recipes" / "benchmarks"
NAMES = [
    "matmul_peak",
    "training_batch_64",
    "generate_135m_batch_32",
    "nsp_batches",
    "search",
    "original_algorithm",
    "generate_7b_batch_32",
    "training_batch_256",
    "encoding",
    "memories",
    "generate_7b_batch_1",
]


@pytest.fixture
def speed(monkeypatch):
    """Import the part as gpu.py does."""
    monkeypatch.setattr(sys, "path", [str(BENCHMARKS), *sys.path])
    from gpu_parts import speed

    gc.freeze()  # before each timed call garbage is collected, which takes long with all that other tests have left
    yield speed
    gc.unfreeze()


@pytest.fixture
def context(speed, tmp_path):
    from gpu_parts.runner import Context

    return Context(torch.device("cpu"), tmp_path, time.time() + 3600, tiny=True)


def numbers(value):
    """Yield all numbers in a result."""
    if isinstance(value, dict):
        for part in value.values():
            yield from numbers(part)
    elif isinstance(value, list):
        for part in value:
            yield from numbers(part)
    elif isinstance(value, float | int) and not isinstance(value, bool):
        yield value


def spreads(value):
    """Yield all `{"median", "min", "max"}` in a result."""
    if isinstance(value, dict) and set(value) == {"median", "min", "max"}:
        yield value
    elif isinstance(value, dict | list):
        for part in value.values() if isinstance(value, dict) else value:
            yield from spreads(part)


def run(speed, context, name):
    """Run a check, and return its result after what holds for the result of every check."""
    (check,) = [check for check in speed.CHECKS if check.name == name]
    result = json.loads(json.dumps(check.run(context)))
    assert len(json.dumps(result)) < 20_000
    assert result["summary"]
    assert all(map(math.isfinite, numbers(result)))
    for ratio in spreads(result):
        assert 0 < ratio["min"] <= ratio["median"] <= ratio["max"]
    for table in result.get("tables", []):
        assert all(len(row) == len(table["header"]) for row in table["rows"])
    assert result.get("errors", {}) == {}
    assert all(entry["met"] is None for entry in result.get("goals", []))  # goals are for a GPU
    return result


def by_arm(result):
    return {arm["arm"]: arm for arm in result["arms"]}


def test_the_part_has_these_checks(speed):
    assert [check.name for check in speed.CHECKS] == NAMES
    assert all(check.minutes <= 2.5 for check in speed.CHECKS)


def test_the_peak(speed, context):
    result = run(speed, context, "matmul_peak")
    assert set(result["flops"]) == {"float32", "bfloat16"}


@pytest.mark.parametrize("seconds_left, num_steps", [(1000, 5), (1, 2)])
def test_an_arm_takes_two_untimed_steps_and_more_if_there_is_time(speed, seconds_left, num_steps):
    warm_up = importlib.import_module("gpu_parts.speed_training").warm_up
    steps = []
    warm_up(steps.append, torch.nn.Linear(1, 1), list(range(5)), SimpleNamespace(seconds_left=lambda: seconds_left))
    assert steps == list(range(num_steps))


def test_the_training_table(speed, context):
    with torch.compiler.set_stance("force_eager"):  # tests/training compile layers; here it would take seconds
        result = run(speed, context, "training_batch_64")
    arms = by_arm(result)
    assert list(arms)[0] == "padded, eager"
    assert arms["padded, eager"]["speed_to_baseline"] == {"median": 1, "min": 1, "max": 1}
    assert sum("compiled" in name for name in arms) == 2
    assert any("packed" in name for name in arms)
    assert 0 < result["padding"] < 1
    for arm in arms.values():
        assert arm["mfu"] is None  # of a CPU no data sheet's peak is known
        assert arm["share_of_matmul_peak"] > 0


def test_a_gguf_file_is_converted_before_it_is_trained(speed, context, monkeypatch):
    from dataclasses import replace

    from gpu_parts import speed_training

    class Model:
        @classmethod
        def from_gen_and_emb_seq(cls, gen, **options):
            assert gen == str(context.folder / "converted")
            return torch.nn.Linear(1, 1)

    monkeypatch.setattr(speed_training, "given_gen", lambda gen, folder: str(folder / "converted"))
    monkeypatch.setattr(speed_training, "CoSupForCausalLM", Model)
    call = replace(context, gen="weights/smollm2.gguf")
    assert speed_training.training_model(call).training
    assert speed_training.describe(call)["weights"] == "smollm2"


def test_an_nsp_batch_that_does_not_fit_leaves_the_smaller_ones(speed, context, monkeypatch):
    from gpu_parts import speed_training

    measure = speed_training.measure_nsp_batch

    def with_little_memory(model, rows, script, folder, size):
        if size > 4:
            raise torch.OutOfMemoryError("too little memory\nand more")
        return measure(model, rows, script, folder, size)

    monkeypatch.setattr(speed_training, "measure_nsp_batch", with_little_memory)
    result = speed_training.nsp_batches(context)
    assert [batch["nsp_batch_size"] for batch in result["batches"]] == [4]
    assert result["errors"] == {"NSP batch 8": "OutOfMemoryError: too little memory and more"}
    assert result["summary"].endswith("NSP batch 8: OutOfMemoryError: too little memory and more")
    assert result["tables"][0]["rows"][-1][:2] == ["NSP batch 8", "OutOfMemoryError: too little memory and more"]


def test_an_arm_that_begins_too_late_is_left_out(speed):
    from gpu_parts.speed_failures import first_calls

    called = []
    calls = {name: partial(called.append, name) for name in ("baseline", "slow to compile")}
    assert first_calls(calls, seconds_left=-1) == {"slow to compile": "no time is left"}
    assert called == ["baseline"]


def test_generation_writes_what_plain_generation_writes(speed, context):
    result = run(speed, context, "generate_135m_batch_32")  # tiny, 7B's shape is the same
    assert all(arm["rows_equal"] == result["batch_size"] for arm in result["arms"])
    (captured,) = [arm for name, arm in by_arm(result).items() if "captured" in name]
    assert captured["captures"]["graphs"] == 1
    assert captured["captures"]["graph_breaks"] == 0


def test_a_step_that_cannot_be_captured_ends_only_its_arm(speed, context, monkeypatch):
    from gpu_parts import speed_generation
    from measuring import Meter

    def fail():
        raise RuntimeError("no such kernel\nand more")

    def write():
        return [[1, 2], [3, 4]]

    world = SimpleNamespace(index=lambda count: None, meter=Meter(context.device), description="")
    calls = {"plain": write, "CoSup, never retrieves": write, "CoSup, captured, never retrieves": fail}
    monkeypatch.setattr(speed_generation, "make_world", lambda *args: world)
    monkeypatch.setattr(speed_generation, "calls_of_part_2", lambda *args: calls)
    result = speed_generation.against_plain(context, "135m", 2, tuple(calls))
    assert list(by_arm(result)) == ["plain", "CoSup, never retrieves"]
    assert result["errors"] == {"CoSup, captured, never retrieves": "RuntimeError: no such kernel and more"}
    assert "does not run" in result["tables"][0]["rows"][-1][-1]


def test_the_original_algorithm(speed, context):
    result = run(speed, context, "original_algorithm")
    assert result["rows_equal"] == result["rows_compared"] == 2
    assert result["candidate_search"]


@pytest.mark.parametrize("package", ["faiss", "no faiss"])
def test_searches_find_the_same(speed, context, monkeypatch, package):
    from gpu_parts import speed_search

    if package == "no faiss":
        monkeypatch.setattr(speed_search, "faiss", None)
    result = run(speed, context, "search")
    arms = {entry["arm"] for entry in result["results"]}
    assert ("faiss, float32" in arms) == (package == "faiss")
    assert result["notes"] == ([] if package == "faiss" else ["faiss: not installed"])
    assert {entry["batch"] for entry in result["results"]} == {1, 8, 32}
    for entry in result["results"]:
        # scores that torch rounds to half precision tie; ours are float32
        assert entry["recall"] == 1 if entry["arm"].startswith("PassageIndex") else entry["recall"] > 0.9


def test_encoding(speed, context):
    pytest.importorskip("sentence_transformers")
    arms = by_arm(run(speed, context, "encoding"))
    assert list(arms) == ["sentence-transformers", "sentence-transformers, batches of 8", "PassageIndex.build"]
    assert all(arm["largest_difference"] < 1e-5 for arm in arms.values())


def test_memories(speed, context):
    result = run(speed, context, "memories")
    assert list(by_arm(result)) == ["no memory", "MLPMemory", "KNNMemory of 200"]


def test_the_peak_of_a_check_counts_what_its_meters_reset(speed):
    from gpu_parts.runner import free_memory, peak_memory
    from measuring import Meter

    device = torch.device("cpu")
    free_memory(device)
    before = peak_memory(device)
    _, _, peak = Meter(device)(lambda: torch.ones(25_000_000).sum())
    Meter(device)(lambda: None)
    assert peak > 80e6
    assert peak_memory(device) > before + 60e6
    free_memory(device)
    assert peak_memory(device) < before + 60e6


def test_a_missing_package_is_named(speed, context, monkeypatch):
    from gpu_parts import runner

    for missing, names in {
        "datasets": ["training_batch_64", "nsp_batches", "training_batch_256"],
        "sentence_transformers": ["encoding"],
    }.items():
        monkeypatch.setattr(runner, "is_installed", lambda package, missing=missing: package != missing)
        lacking = {check.name: check.lacks(context) for check in speed.CHECKS}
        assert {name for name, reason in lacking.items() if reason} == set(names)
        assert {lacking[name] for name in names} == {f"{missing} is not installed"}


def test_goals_are_judged_on_a_gpu_alone(speed, context):
    from dataclasses import replace

    from gpu_parts.speed_goals import goal, goal_text

    on_gpu = replace(context, device=torch.device("cuda"), tiny=False)
    reached = goal(on_gpu, "x plain", 3.2, at_least=3)
    missed = goal(on_gpu, "GB", 41.5, at_most=40)
    assert (reached["met"], missed["met"], goal(context, "x plain", 3.2, at_least=3)["met"]) == (True, False, None)
    assert goal_text([reached, missed]) == (
        "goal x plain at least 3: reached (3.2); goal GB at most 40: MISSED (41.5)"
    )
    lost = goal(on_gpu, "GB", None, at_most=40)  # e.g. out of memory
    assert goal_text([lost]) == "goal GB at most 40: MISSED (not measured)"


def test_a_batch_that_is_too_large_misses_its_goal(speed, context, monkeypatch):
    from dataclasses import replace

    from gpu_parts import speed_goals, speed_training

    measure = speed_training.measure_nsp_batch

    def with_little_memory(model, rows, script, folder, size):
        if size == 8:
            raise torch.OutOfMemoryError("too little memory")
        return measure(model, rows, script, folder, size)

    def as_on_a_gpu(context, *args, **options):
        return speed_goals.goal(replace(context, device=torch.device("cuda"), tiny=False), *args, **options)

    monkeypatch.setattr(speed_training, "LARGEST", 8)
    monkeypatch.setattr(speed_training, "measure_nsp_batch", with_little_memory)
    monkeypatch.setattr(speed_training, "goal", as_on_a_gpu)
    (entry,) = speed_training.nsp_batches(context)["goals"]
    assert (entry["measured"], entry["met"]) == (None, False)


def test_kernels_are_chosen_in_each_process(speed):
    code = "from gpu_parts.kernels import choose_kernels; choose_kernels(); import torch;"
    precision = "getattr(torch.backends.cuda.matmul, 'fp32_precision', 'ieee')"  # since torch 2.9
    code += f"print(torch.backends.cuda.cudnn_sdp_enabled(), {precision})"
    done = subprocess.run([sys.executable, "-c", code], cwd=BENCHMARKS, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "ieee"]
