"""A GPU's hour: the checks of part 1 on a CPU with tiny shapes, and calls that are killed, fail and resume."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from importlib.metadata import PackageNotFoundError, packages_distributions, requires
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
BENCHMARKS = ROOT / "recipes" / "benchmarks"
ON_BARE_MACHINE = ("torch", "transformers", "accelerate", "peft", "sentence-transformers", "pyarrow")
ON_BARE_MACHINE_TOO = ("packed_sdpa", "served_rows", "saved_model")  # checks of training, generation and a checkpoint
IN_THIS_PROCESS = (
    "passages_alone",
    "grad_cache",
    "isolated_queries",
    "compiled_step",
    "ddp_one_rank",
    "fsdp2_one_rank",
    "lora_step",
    "trainer_arms",
    "generate_rows",
    "captured_step",
    "memories",
    "quantized_model",
    "index_search",
)
# puts a finder in the place of Python's own, in this process and in all that it starts
WITHOUT_PACKAGES = """
import sys
from importlib.machinery import PathFinder

BLOCKED = {blocked}

class Finder(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] in BLOCKED else super().find_spec(name, path, target)

sys.meta_path[sys.meta_path.index(PathFinder)] = Finder
"""
# checks of a part that stands in for part 1 where only the program around them is tested
FAKE_PART = """
import os
import time
from gpu_parts.runner import Check

def quick(context):
    with open(context.folder / "calls.txt", "a") as file:
        file.write("quick ")
    return {"summary": "it ran", "value": 1}

def slow(context):
    time.sleep(600)

def kills_its_process(context):
    os.kill(os.getpid(), 9)

def last(context):
    return {"summary": "still ran"}

RUNS = {"quick": quick, "slow": slow, "kills_its_process": kills_its_process, "last": last}
CHECKS = [Check(name, run, 0.01) for name, run in RUNS.items()]
"""


@pytest.fixture
def parts(monkeypatch):
    """Make the modules of the program importable."""
    monkeypatch.syspath_prepend(BENCHMARKS)


def run_gpu(script, folder, *options, path=()):
    """Run the program to its end; the packages of this project are found by the program itself."""
    variables = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, path)), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, script, "--output_dir", folder, "--parts", "correctness", "--tiny", "true", *options]
    return subprocess.run(command, capture_output=True, text=True, env=variables, cwd=folder.parent, timeout=900)


def record(folder, check):
    return json.loads((folder / "correctness" / f"{check}.json").read_text(encoding="utf-8"))


# ---------------------------------------------------------------------- part 1


def with_requirements(packages):
    """Return the names of installed packages and of all that they need."""
    waiting = list(packages)
    names = set()
    while waiting:
        name = canonicalize_name(waiting.pop())
        if name in names:
            continue
        names.add(name)
        try:
            requirements = [Requirement(line) for line in requires(name) or []]
        except PackageNotFoundError:  # of another platform
            continue
        for requirement in requirements:
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                waiting.append(requirement.name)
    return names


def modules_of_others():
    """Return the top-level modules of installed packages that a bare machine lacks."""
    names = with_requirements(ON_BARE_MACHINE)
    others = set()
    for module, distributions in packages_distributions().items():
        if not names & {canonicalize_name(name) for name in distributions} and not (ROOT / module).exists():
            others.add(module)
    return others


def test_the_wheels_in_the_page_are_those_that_a_bare_machine_lacks():
    page = (BENCHMARKS / "gpu.md").read_text(encoding="utf-8")
    command = next(line for line in page.splitlines() if line.startswith("pip install --no-deps"))
    wheels = command.partition("--find-links wheels ")[2].split()
    lacking = with_requirements(["datasets", "bitsandbytes"]) - with_requirements(ON_BARE_MACHINE)
    assert set(wheels) == lacking - {"pytz", "six"}  # these only older versions of pandas and dateutil need


@pytest.mark.slow
def test_checks_run_with_the_packages_of_a_bare_machine(tmp_path):
    blocked = modules_of_others()
    assert {"datasets", "faiss", "bitsandbytes", "evaluate", "fastapi", "pytest"} <= blocked
    site = tmp_path / "site"
    site.mkdir()
    (site / "sitecustomize.py").write_text(WITHOUT_PACKAGES.format(blocked=sorted(blocked)), encoding="utf-8")
    names = [*ON_BARE_MACHINE_TOO, "packed_flex", "trainer_arms", "mistyped"]
    done = run_gpu(BENCHMARKS / "gpu.py", tmp_path / "out", "--minutes", "9", "--checks", *names, path=[site])
    assert done.stderr.endswith("failed: no check is named mistyped\n"), done.stdout + done.stderr
    results = json.loads((tmp_path / "out" / "results.json").read_text(encoding="utf-8"))
    entries = {entry["check"]: entry for entry in results["correctness"]}
    for name in ON_BARE_MACHINE_TOO:
        entry = entries[name]
        assert entry["status"] == "done", entry
        assert entry["seconds"] > 0 and entry["peak_memory_gb"] > 0
        assert entry["torch"] == torch.__version__ and "gpu.py" in entry["command"]
        assert len(json.dumps(entry)) < 10_000
    assert entries["grad_cache"]["status"] == "not run"
    report = (tmp_path / "out" / "report.md").read_text(encoding="utf-8")
    assert "| packed_sdpa | done | 4 of 4 bounds hold |" in report
    assert "| packed_flex | skipped | needs a GPU |" in report
    assert "| trainer_arms | skipped | datasets is not installed |" in report
    assert "## Speed\n\nnot run" in report


@pytest.mark.parametrize("name", IN_THIS_PROCESS)
def test_check_on_tiny_shapes(parts, tmp_path, name):
    from gpu_parts.correctness import CHECKS
    from gpu_parts.runner import Context

    (check,) = [check for check in CHECKS if check.name == name]
    context = Context(torch.device("cpu"), tmp_path, time.time() + 3600, tiny=True)
    assert not check.lacks(context)
    result = check.run(context)
    assert result["missed"] == [] and len(result["comparisons"]) >= 2


def test_every_check_of_part_1_is_tested_or_needs_a_gpu(parts):
    from gpu_parts.correctness import CHECKS

    tested = {check.name for check in CHECKS if not check.gpu}
    assert tested == {*ON_BARE_MACHINE_TOO, *IN_THIS_PROCESS}


def test_a_check_that_hangs_ends_its_process(parts, monkeypatch):
    from gpu_parts.exit_codes import TOO_LONG
    from gpu_parts.runner import ended_after

    exits = []
    monkeypatch.setattr(os, "_exit", exits.append)
    with ended_after(60.0), ended_after(None):
        pass
    assert exits == []
    with ended_after(1e-4):
        time.sleep(0.5)
    assert exits == [TOO_LONG]


def test_the_launched_step_has_the_gradients_of_a_step(parts, tmp_path):
    """What `accelerate_fsdp2` launches on a GPU, here alone in this process."""
    from gpu_parts.comparing import relative_error
    from gpu_parts.one_rank import StepArguments, train
    from gpu_parts.runner import Context
    from gpu_parts.small_world import SmallWorld
    from gpu_parts.trainer_checks import SUBTRACTED, read_step
    from gpu_parts.training_step import make_batch, plain_step

    file = str(tmp_path / "step.safetensors")
    train(StepArguments(file, tiny=True))
    step = read_step(file)
    world = SmallWorld(Context(torch.device("cpu"), tmp_path, time.time() + 3600, tiny=True))
    expected = plain_step(world.model, make_batch(world), torch.float32)
    assert step.loss == pytest.approx(expected.loss, rel=1e-5)
    assert relative_error(step.gradients, expected.gradients) < SUBTRACTED
    with pytest.raises(RuntimeError, match="0 of .* weights are shards; distributed_type is"):
        train(StepArguments(file, tiny=True, sharded=True))


def test_rows_that_see_each_other_miss_their_bounds(parts, tmp_path):
    from gpu_parts.comparing import Comparisons
    from gpu_parts.runner import Context
    from gpu_parts.small_world import SmallWorld
    from gpu_parts.training_checks import PACKED
    from gpu_parts.training_step import make_batch, plain_step, references

    world = SmallWorld(Context(torch.device("cpu"), tmp_path, time.time() + 3600, tiny=True))
    batch = make_batch(world, **PACKED)
    (micro_batch,) = batch.micro_batches
    micro_batch["position_ids"] = torch.arange(micro_batch["input_ids"].shape[1])[None]
    comparisons = Comparisons()
    expected = references(world)
    assert 1e-8 < expected.rounding < 1e-5  # of float32 against float64
    for dtype in (torch.float32, torch.bfloat16):
        expected.compare(comparisons, "one long row", dtype, plain_step(world.model, batch, dtype))
    assert len(comparisons.result()["missed"]) >= 3
    nan = Comparisons()
    nan.add("nothing", torch.float32, float("nan"), None)
    assert len(nan.result()["missed"]) == 1


# ---------------------------------------------------------------------- the program around the checks


def test_a_killed_call_resumes_and_a_killed_check_ends_only_itself(tmp_path):
    recipes = tmp_path / "recipes"
    shutil.copytree(BENCHMARKS / "gpu_parts", recipes / "benchmarks" / "gpu_parts")
    (recipes / "shared").symlink_to(ROOT / "recipes" / "shared")
    for name in ("gpu.py", "measuring.py"):
        shutil.copy(BENCHMARKS / name, recipes / "benchmarks")
    (recipes / "benchmarks" / "gpu_parts" / "correctness.py").write_text(FAKE_PART, encoding="utf-8")
    script, out = recipes / "benchmarks" / "gpu.py", tmp_path / "out"

    command = [sys.executable, script, "--output_dir", out, "--parts", "correctness", "--tiny", "true"]
    variables = {**os.environ, "PYTHONPATH": str(ROOT)}
    first = subprocess.Popen(command, env=variables, stdout=subprocess.PIPE, text=True)
    lines = [first.stdout.readline()]
    while "slow: begins" not in lines[-1]:
        lines.append(first.stdout.readline())
        assert lines[-1], lines
    first.send_signal(signal.SIGKILL)
    first.communicate(timeout=60)  # until its process of the part, which writes to the same pipe, has ended too
    assert record(out, "quick")["status"] == "done" and record(out, "slow")["status"] == "begun"
    assert record(out, "last")["status"] == "not run"

    second = run_gpu(script, out, path=[ROOT])
    assert second.returncode == 1
    assert "failed: correctness/slow, correctness/kills_its_process" in second.stderr
    assert "quick: done before" in second.stdout and "slow: begun before" in second.stdout
    assert (out / "correctness" / "calls.txt").read_text() == "quick "
    assert record(out, "kills_its_process")["reason"] == "Its process was killed by signal 9."
    assert record(out, "last")["result"] == {"summary": "still ran"}
    report = (out / "report.md").read_text(encoding="utf-8")
    assert "| quick | done | it ran |" in report
    assert "| slow | **begun** | begun and not ended. An earlier call began it, and was itself ended. |" in report
    assert "| kills_its_process | **begun** | begun and not ended. Its process was killed by signal 9. |" in report


def boom(context):
    raise ValueError("it broke\nin two lines")


def checks_of_all_kinds():
    from gpu_parts.runner import Check, Skip

    def skips(context):
        raise Skip("no such kernel")

    table = {"title": "a table", "header": ["a", "b"], "rows": [["x | y", 1]]}
    return [
        Check("fine", lambda context: {"summary": "good", "tables": [table]}, 0.1),
        Check("boom", boom, 0.1),
        Check("exits", lambda context: sys.exit("no data"), 0.1),
        Check("missed", lambda context: {"summary": "bad", "missed": ["loss: 2 > 1"]}, 0.1),
        Check("skips", skips, 0.1),
        Check("gpu", boom, 0.1, gpu=True),
        Check("package", boom, 0.1, packages=["torch", "no_such_package.part"]),
        Check("option", boom, 0.1, options=["gen"]),
        Check("long", lambda context: {"summary": "at last"}, 5.0),
    ]


def statuses(folder):
    from gpu_parts.records import read_part

    return {entry["check"]: entry["status"] for entry in read_part(folder, "speed")}


def test_statuses_resumption_and_report(parts, tmp_path, capsys):
    from gpu_parts.records import check_size, read_record, restore_records, try_again
    from gpu_parts.runner import Context, run_checks

    def run(minutes):
        context = Context(torch.device("cpu"), tmp_path / "speed", time.time() + 60 * minutes, tiny=True)
        assert not run_checks("speed", checks_of_all_kinds(), context, "python gpu.py")
        return capsys.readouterr().out

    printed = run(minutes=2)
    expected = {"fine": "done", "boom": "failed", "exits": "failed", "missed": "failed", "skips": "skipped"}
    expected |= {"gpu": "skipped", "package": "skipped", "option": "skipped", "long": "left"}
    assert statuses(tmp_path) == expected
    assert "[speed] fine: begins (about 0.1 min)\n[speed] fine: done (" in printed
    assert "[speed] long: left: for the next call: needs about 5 minutes, " in printed
    report = (tmp_path / "report.md").read_text(encoding="utf-8")
    for line in (
        "| fine | done | good |",
        "| boom | **failed** | ValueError: it broke in two lines |",
        "| exits | **failed** | SystemExit: no data |",
        "| missed | **failed** | loss: 2 > 1 |",
        "| skips | skipped | no such kernel |",
        "| gpu | skipped | needs a GPU |",
        "| package | skipped | no_such_package.part is not installed |",
        "| option | skipped | needs --gen |",
        "| long | left | for the next call: needs about 5 minutes, ",
        "### fine: a table",
        "| x \\| y | 1 |",
        "`python gpu.py`",
        "## Training\n\nnot run",
    ):
        assert line in report, line
    reason = read_record(tmp_path, "speed", "boom")["reason"]
    assert reason.startswith("ValueError: it broke in two lines\n")
    assert 'raise ValueError("it broke' in reason  # where

    printed = run(minutes=8)  # what was left runs now; what is done or failed stays
    assert statuses(tmp_path) == {**expected, "long": "done"}
    assert "fine: done before" in printed and "boom: failed before" in printed and "skips: begins" in printed
    try_again(tmp_path, "speed")
    assert statuses(tmp_path)["boom"] == "not run"
    printed = run(minutes=8)
    assert "boom: begins" in printed and "fine: done before" in printed
    assert statuses(tmp_path)["boom"] == "failed"
    assert read_record(tmp_path, "speed", "boom")["earlier"]["status"] == "failed"
    results = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    assert [entry["check"] for entry in results["speed"]] == list(expected)
    before = read_record(tmp_path, "speed", "fine")
    shutil.rmtree(tmp_path / "speed")
    restore_records(tmp_path)  # of results.json
    assert statuses(tmp_path) == {**expected, "long": "done"} and read_record(tmp_path, "speed", "fine") == before
    with pytest.raises(ValueError, match="was written with --tiny True, and this call has --tiny False"):
        check_size(tmp_path, ("speed",), tiny=False)


def test_an_error_that_is_nan_is_null_in_the_record_and_the_report(parts, tmp_path):
    from gpu_parts.comparing import Comparisons
    from gpu_parts.records import read_record, write_record
    from gpu_parts.report import write_report

    rows = Comparisons()
    rows.add("loss", torch.float32, float("nan"), 1.0)
    record = {"part": "correctness", "check": "loss", "order": 0, "status": "failed", "reason": "nan > 1.0"}
    write_record(tmp_path, {**record, "result": rows.result(), "seconds": 1.0, "peak_memory_gb": float("nan")})
    read = read_record(tmp_path, "correctness", "loss")
    assert (read["result"]["comparisons"][0]["error"], read["peak_memory_gb"]) == (None, None)
    assert read["not_finite"] == {"result.comparisons.0.error": "nan", "peak_memory_gb": "nan"}
    write_report(tmp_path)
    assert "nan" in (tmp_path / "report.md").read_text()


def test_a_large_result_is_left_out_of_the_file_with_all_results(parts):
    from gpu_parts.report import small

    entry = {"part": "speed", "check": "wide", "result": {"values": list(range(20_000))}}
    assert small(entry)["result"] == {"left_out": "128,902 bytes, too many for this file: see speed/wide.json"}
    assert small({**entry, "result": {"values": [1]}})["result"] == {"values": [1]}


def test_an_error_is_named_by_its_cause(parts):
    from gpu_parts.errors import FailedProcess, one_line

    compiler = RuntimeError("backend='inductor' raised:\n  CalledProcessError: no Python.h\n" + "x" * 1000)
    assert one_line(compiler).startswith(
        "RuntimeError: backend='inductor' raised: CalledProcessError: no Python.h xxx"
    )
    assert len(one_line(compiler)) < 650

    launched = (
        "some warning\nTraceback (most recent call last):\n  File ...\nRuntimeError: CUDA error: out of memory\n"
        "Traceback (most recent call last):\n  File ...\n"
        "torch.distributed.elastic.multiprocessing.errors.ChildFailedError: \n=====\nRoot Cause: exitcode 1\n====="
    )
    error = FailedProcess("The step", launched)
    assert str(error) == "The step failed: RuntimeError: CUDA error: out of memory"
    assert cause_and_place_of(error).splitlines()[0] == f"FailedProcess: {error}"
    assert cause_and_place_of(error).endswith("\n  File ...\nRuntimeError: CUDA error: out of memory")
    assert str(FailedProcess("The step", "")) == "The step failed: it printed nothing"
    assert str(FailedProcess("The step", "Killed")) == "The step failed: Killed"


def cause_and_place_of(error):
    from gpu_parts.errors import cause_and_place

    try:
        raise error
    except RuntimeError as raised:
        return cause_and_place(raised)
