"""
A sharded model (FSDP2) with ranks that retrieve at different steps, or are done early: no rank waits for ever, and
every answer is the same as on one process.
"""

import json
from pathlib import Path

from support.forks import run_forked

SCRIPT = Path(__file__).with_name("run_generation.py")


def test_ranks_keep_step(tmp_path):
    done = run_forked(SCRIPT, tmp_path, world_size=2)
    assert done.returncode == 0, done.stderr[-4000:]
    retrievals = []  # of each rank
    for rank in range(2):
        expected, answers = json.loads((tmp_path / f"rank-{rank}.json").read_text())
        assert answers == expected
        retrievals.append(sum(len(row) for _, trace in expected.values() for row in trace))
    assert retrievals[0] > retrievals[1] > 0  # they do retrieve different amounts
