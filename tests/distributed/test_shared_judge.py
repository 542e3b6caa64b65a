"""An NLI judge shared by a real process group: one process judges each pair, and the error of any process ends all."""

import json
from pathlib import Path

from support.forks import run_forked

SCRIPT = Path(__file__).with_name("run_shared_judge.py")


def launch(argument):
    result = run_forked(SCRIPT, argument, world_size=3)
    assert result.returncode == 0, result.stderr[-3000:]
    return json.loads(result.stdout.strip().splitlines()[-1])


def test_each_process_judges_its_share():
    first, second, third = launch("answers")
    assert first["answers"] == [[True, False, True, False, True, True], [False, True], []]
    assert first["asked"] == [[["a", "a"], ["c", "a"]], [], []]
    # a pair of a later call goes to the process that knows its answer
    assert second["asked"] == [[["a", "b"], ["d", "d"]], [["a", "b"]], []]
    assert third["asked"] == [[["b", "b"]], [["b", "b"]], []]


def test_the_error_of_one_process_ends_all():
    reports = launch("fails")
    assert [report["error"] for report in reports] == ["process 1: 1 of 2 pairs got no answer"] * 3
