"""W ranks x b equal one process x W·b: loss and every parameter after a step, in real gloo process groups (DDP)."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import make_model
from safetensors import safe_open

SCRIPT = Path(__file__).with_name("run_training.py")
EMB_SEQ = {"hidden_size": 48, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}


def run(tmp_path, pattern, world_size, accumulation):
    output = tmp_path / f"{world_size}.safetensors"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(world_size)] if world_size > 1 else [sys.executable]
    command += [str(SCRIPT), str(output), pattern, str(world_size), str(accumulation)]
    with open(tmp_path / "log", "w+") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env={**os.environ, "OMP_NUM_THREADS": "1"}, start_new_session=True)
        try:
            assert process.wait(timeout=180) == 0, (tmp_path / "log").read_text()[-3000:]
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)  # the ranks too
    with safe_open(output, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, {key: float(value) for key, value in file.metadata().items() if key != "format"}


@pytest.mark.parametrize(("pattern", "accumulation"), [("ragged", 1), ("zero", 1), ("none", 1), ("ragged", 2)])
def test_two_ranks_equal_one_process(tmp_path, pattern, accumulation):
    one, log_one = run(tmp_path, pattern, 1, accumulation)
    two, log_two = run(tmp_path, pattern, 2, accumulation)
    assert log_two == pytest.approx(log_one, rel=1e-5, abs=1e-6)
    start = dict(make_model(emb_seq="gpt2", emb_seq_kwargs=EMB_SEQ).named_parameters())
    for name, parameter in one.items():
        gradient, other = start[name] - parameter, start[name] - two[name]
        assert (gradient - other).norm() <= 1e-5 * gradient.norm() + 1e-6, name
    if pattern != "none":
        assert any(not torch.equal(start[name], parameter) for name, parameter in one.items() if name.startswith("emb_seq"))
