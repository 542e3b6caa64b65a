"""
A sharded model (FSDP2) with ranks that retrieve at different steps, or are done early: no rank waits for ever, and
every answer is the same as on one process.
"""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).with_name("run_generation.py")


def test_ranks_keep_step(tmp_path):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    process = subprocess.Popen(
        [*launcher, str(SCRIPT), str(tmp_path)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        printed, _ = process.communicate(timeout=300)
        assert process.returncode == 0, printed[-4000:]
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    retrievals = []  # of each rank
    for rank in range(2):
        expected, answers = json.loads((tmp_path / f"rank-{rank}.json").read_text())
        assert answers == expected
        retrievals.append(sum(len(row) for _, trace in expected.values() for row in trace))
    assert retrievals[0] > retrievals[1] > 0  # they do retrieve different amounts
