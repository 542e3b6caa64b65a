"""The GPU program on an imitated GPU (tests/support/imitated_gpu): it shows that all tensors are on one device."""

import json
import subprocess
import sys

import pytest

from support import imitated_gpu
from support.recipes import ROOT

pytestmark = pytest.mark.skipif(bool(imitated_gpu.missing()), reason=imitated_gpu.missing())
NOT_IMITATED = {"packed_flash", "quantized_model", "faiss_gpu"}  # these packages bring kernels of their own
SEEDS_OF_REAL_RUNS = ("_seed_1", "_seed_2", "compare_seeds")
MISTAKES = """
import torch

# Without a thread of the device: it frees the graph after backward() returns, and Python that ends meanwhile aborts.
torch.autograd.set_multithreading_enabled(False)
on_gpu = torch.ones(2, 2, device="cuda", requires_grad=True)
(on_gpu @ on_gpu).sum().backward()
assert on_gpu.grad.device.type == "cuda" and on_gpu.grad.tolist() == [[4, 4], [4, 4]]
for mistake in (
    lambda: on_gpu @ torch.ones(2, 2),
    lambda: torch.cat([on_gpu, torch.ones(2, 2)]),
    lambda: torch.ones(2)[torch.tensor([0], device="cuda")],
    lambda: torch.nn.functional.scaled_dot_product_attention(on_gpu, on_gpu, torch.ones(2, 2)),
    lambda: on_gpu.detach().numpy(),
):
    try:
        mistake()
    except (RuntimeError, TypeError) as error:
        print(error)
"""
PROMPTS_ON_ANY_DEVICE = """
import torch

from support.generation import generate, question_inputs, question_steer
from support.models import PASSAGES, make_model, make_tokenizer

for query_from in ("gen", "emb_seq"):
    model = make_model(tokenizer=make_tokenizer(), query_from=query_from).eval()
    index = model.build_index(PASSAGES, show_progress_bar=False)
    inputs, steer = question_inputs(model), question_steer(model)
    expected = generate(model, inputs, index, steer, repetition_penalty=1.5)
    assert sum(map(len, expected.retrievals)) > 3
    model.to("cuda")
    for ids_device, mask_device in (("cpu", "cpu"), ("cuda", "cuda"), ("cpu", "cuda"), ("cuda", "cpu")):
        prompts = {
            "input_ids": inputs["input_ids"].to(ids_device),
            "attention_mask": inputs["attention_mask"].to(mask_device),
        }
        out = generate(model, prompts, index, steer, repetition_penalty=1.5)
        for found in (out.sequences, out.num_generated_tokens):
            assert found.device.type == ids_device, found.device
        assert torch.equal(out.sequences.cpu(), expected.sequences)
        assert out.num_generated_tokens.tolist() == expected.num_generated_tokens.tolist()
"""


@pytest.fixture(scope="module")
def variables(tmp_path_factory):
    """Return the environment variables of a process that sees the imitated GPU."""
    library = imitated_gpu.build(tmp_path_factory.mktemp("library"))
    return imitated_gpu.variables(library) | {"OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR"}


def test_mixing_devices_is_an_error_as_on_a_gpu(variables):
    done = subprocess.run([sys.executable, "-c", MISTAKES], env=variables, capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    assert len(lines) == 5
    assert sum("same device" in line for line in lines) == 4
    assert "Tensor.cpu()" in lines[-1]


def test_prompts_may_be_on_another_device_than_the_model(variables):
    """As in transformers' generate(): the output is on the device of the prompts."""
    command = [sys.executable, "-c", PROMPTS_ON_ANY_DEVICE]
    done = subprocess.run(command, env=variables, capture_output=True, text=True, cwd=ROOT / "tests", timeout=300)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("part", ["correctness", "speed", "training"])
def test_the_gpu_program(part, variables, tmp_path):
    out = tmp_path / "out"
    script = ROOT / "recipes" / "benchmarks" / "gpu.py"
    command = [
        sys.executable,
        script,
        "--output_dir",
        out,
        "--parts",
        part,
        "--tiny",
        "true",
        "--device",
        "cuda",
        "--minutes",
        "14",
    ]
    done = subprocess.run(command, env=variables, capture_output=True, text=True, cwd=tmp_path, timeout=900)
    records = [json.loads(file.read_text(encoding="utf-8")) for file in (out / part).glob("*.json")]
    checks = {record["check"]: record for record in records if "check" in record}
    assert checks, done.stderr
    for name, record in checks.items():
        if name not in NOT_IMITATED and not any(seed in name for seed in SEEDS_OF_REAL_RUNS):
            assert record["status"] == "done", record["reason"]
            assert record["hardware"] == "imitated GPU"
