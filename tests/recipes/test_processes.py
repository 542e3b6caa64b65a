"""A process of the recipes: its threads, its progress bars, and how long it waits for others."""

import io

import datasets
import pytest
import torch
from tqdm.auto import tqdm

from support.forks import ROOT, run_forked

from shared import processes
from shared.processes import num_cores, set_cpu_threads
from shared.progress_bars import progress_bars

LAUNCHED = {"ACCELERATE_USE_CPU": "False"}  # what `accelerate launch` sets


@pytest.mark.parametrize(
    ("environment", "has_gpu", "arguments", "expected"),
    [
        (LAUNCHED, False, (None,), [7]),
        (LAUNCHED, False, (3,), [3]),
        ({}, False, (None,), []),  # OMP_NUM_THREADS of the user
        ({**LAUNCHED, "WORLD_SIZE": "2"}, False, (None,), []),
        ({**LAUNCHED, "WORLD_SIZE": "2"}, False, (3,), [3]),
        (LAUNCHED, True, (None,), []),
        (LAUNCHED, True, (None, True), [7]),
    ],
)
def test_a_single_process_on_a_cpu_takes_all_cores(monkeypatch, environment, has_gpu, arguments, expected):
    for name in ("ACCELERATE_USE_CPU", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    threads = []
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: has_gpu)
    monkeypatch.setattr(processes, "num_cores", lambda: 7)
    set_cpu_threads(*arguments)
    assert threads == expected


def test_a_number_of_threads_of_the_user_stays(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "True")
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    monkeypatch.setattr(torch, "set_num_threads", None)
    set_cpu_threads(None)


def test_the_number_of_threads_is_checked():
    assert num_cores() >= 1
    with pytest.raises(ValueError, match="--num_threads is 0, expected an integer of 1 or more"):
        set_cpu_threads(0)


WAITING = """
import sys, time
from datetime import timedelta
import torch.distributed as dist

sys.path.insert(0, sys.argv[1])
from shared.processes import waiting_for_the_slowest

dist.init_process_group("gloo", timeout=timedelta(seconds=2))
with waiting_for_the_slowest():
    if dist.get_rank() == 0:
        time.sleep(5)
dist.barrier()
try:
    with waiting_for_the_slowest():
        if dist.get_rank() == 0:
            raise ValueError("no room")
except (ValueError, RuntimeError) as error:
    print(f"rank {dist.get_rank()}: {error}", flush=True)
"""


def test_processes_wait_longer_than_their_group_would_and_fail_together():
    done = run_forked("-c", WAITING, ROOT / "recipes", world_size=2)
    assert done.returncode == 0, done.stderr[-2000:]
    lines = sorted(done.stdout.splitlines())
    assert lines == ["rank 0: no room", "rank 1: Rank 0 has failed: ValueError: no room"]


@pytest.mark.parametrize("bar", [tqdm, datasets.utils.tqdm])
def test_bars_of_all_libraries_are_hidden_and_shown_again(bar):
    datasets.enable_progress_bars()  # another test may have turned them off
    hidden, shown = io.StringIO(), io.StringIO()
    with progress_bars(hidden=True):
        assert list(bar([1, 2], disable=False, file=hidden)) == [1, 2]
    with progress_bars(hidden=False):
        assert list(bar([1, 2], file=shown)) == [1, 2]
    assert hidden.getvalue() == ""
    assert "2/2" in shown.getvalue()
