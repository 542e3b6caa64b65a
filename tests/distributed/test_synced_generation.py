"""A sharded model (FSDP2) whose ranks retrieve at different steps, or are done early: no rank waits for ever, and every answer is as on one process."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).with_name("run_generation.py")


def test_ranks_keep_step(tmp_path):
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        "2",
        str(SCRIPT),
        str(tmp_path),
    ]
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "start_new_session": True}
    process = subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, **options)
    try:
        printed, _ = process.communicate(timeout=300)
        assert process.returncode == 0, printed[-4000:]
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    counts = []
    for rank in range(2):
        expected, found = json.loads((tmp_path / f"rank-{rank}.json").read_text())
        assert found == expected
        counts.append([len(row) for _, trace in expected.values() for row in trace])
    assert sum(counts[0]) > sum(counts[1]) > 0  # they do retrieve different amounts
