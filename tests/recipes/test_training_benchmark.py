"""The benchmark of a training step, small: its arms compute the same, and its counts are right."""

import importlib.util
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from support.models import PASSAGES
from support.recipes import write, write_inputs

BENCHMARKS = Path(__file__).parents[2] / "recipes" / "benchmarks"


@pytest.fixture
def benchmark(monkeypatch):
    """Import `recipes/benchmarks/train.py` under another name, because `recipes/` has a train.py too."""
    monkeypatch.setattr(sys, "path", [str(BENCHMARKS), *sys.path])
    spec = importlib.util.spec_from_file_location("benchmark_of_training", BENCHMARKS / "train.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    import measuring

    monkeypatch.setattr(measuring, "CPU_MATMUL_SIZES", (16,))
    return module


def run(benchmark, monkeypatch, tmp_path, *argv):
    """Run the benchmark on two tiny models, with these further command-line arguments; return its results."""
    inputs = write_inputs(tmp_path)
    options = ["--gen", inputs / "gen", "--train_file", inputs / "train.jsonl", "--output_file", tmp_path / "out.json"]
    options += ["--batch_size", 2, "--repeats", 1, "--num_threads", 1]
    monkeypatch.setattr(sys, "argv", ["train.py", *map(str, [*options, *argv])])
    benchmark.main()
    return json.loads((tmp_path / "out.json").read_text())


def test_the_arms_of_a_step_compute_the_same(benchmark, monkeypatch, tmp_path, capsys):
    step = run(benchmark, monkeypatch, tmp_path, "--sections", "step")["step"]
    arms = step["arms"]
    assert list(arms)[0] == "padded baseline"
    exact = [figures["float32_loss_and_gradient_error"] for figures in arms.values()]
    assert sum(errors is not None for errors in exact) == 3
    assert all(max(errors) < 1e-4 for errors in exact if errors is not None)
    assert all(figures["gradient_error"] < 0.2 for figures in arms.values())
    flops = [figures["share_of_matmul_peak"] * step["matmul_peak"] * figures["seconds"] for figures in arms.values()]
    assert flops == pytest.approx([flops[0]] * len(flops))  # all arms took the same batch
    assert "of the matrix-product peak" in capsys.readouterr().out


def test_model_flops_are_those_of_the_products(benchmark):
    import random_instances
    from train_step import model_flops

    model = random_instances.random_two_towers("tiny", 0, torch.device("cpu"))
    passage = list(range(3, 8))
    row = {"input_ids": list(range(3, 13)), "labels": [-100] * 8 + [4, 5], "passage_input_ids": [passage, passage]}
    # Llama of 2 layers, width 64: queries and outputs, keys and values of half the heads, three products of 128
    layer = 2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 128
    norms = 5 * 64
    attention = 2 * 2 * 64 / 2  # a layer: scores and values, 2 a product, half of it causal; times length squared
    vocabulary = model.get_output_embeddings().weight.shape[0]
    expected = 0
    for length in (10, 5):  # the passage, named twice, is encoded once
        expected += 3 * (2 * (2 * layer + norms) * length + 2 * attention * length**2)
    expected += 3 * 2 * 2 * vocabulary * 64  # two labels
    assert model_flops(model, [row]) == expected


def test_the_profile_of_a_step_is_whole(benchmark, monkeypatch, tmp_path, capsys):
    results = run(benchmark, monkeypatch, tmp_path, "--sections", "profile", "--profile_steps", 1)["profile"]
    shares = results["eager"]["shares"]
    assert sum(shares.values()) == pytest.approx(1)
    for kind in ("matrix products", "attention", "loss", "embeddings", "optimiser and clipping"):
        assert shares[kind] > 0
    assert results["eager"]["matmul_flops"] > 0
    assert "| matrix products |" in capsys.readouterr().out


def test_kinds_of_work_are_counted(benchmark):
    """Of an event that the host and a kernel of the device both name, the device's time is counted once."""
    import train_profile

    def event(key, microseconds, flops=0, device_type=train_profile.DeviceType.CPU):
        times = {"self_cpu_time_total": microseconds, "self_device_time_total": 10 * microseconds}
        return SimpleNamespace(key=key, flops=flops, device_type=device_type, **times)

    kernel = event("gemm", 1e6, device_type=train_profile.DeviceType.CUDA)
    events = [event("aten::mm", 1e6, flops=6), event("aten::bmm", 2e6, flops=8), event("aten::copy_", 4e6), kernel]
    result = train_profile.shares_of_kinds(events, seconds=8, cuda=False)
    assert result["matmul_flops"] == 6
    shares = {kind: share for kind, share in result["shares"].items() if share}
    assert shares == {
        "casts, copies and zeros": 4 / 8,
        "attention": 2 / 8,
        "matrix products": 1 / 8,
        train_profile.OUTSIDE: 1 / 8,
    }
    assert train_profile.shares_of_kinds(events, seconds=70, cuda=True)["shares"]["attention"] == 20 / 70


def test_queries_that_share_a_row_read_fewer_tokens(benchmark, monkeypatch, tmp_path, capsys):
    segments = [{"text": f"answer {i}", "passage": PASSAGES[i]} for i in range(3)]
    several = tmp_path / "several.jsonl"
    write(several, [{"id": f"i{i}", "input": f"question {i}?", "segments": segments} for i in range(4)])
    result = run(benchmark, monkeypatch, tmp_path, "--sections", "queries", "--train_file", several)["queries"]
    own, shared = result["arms"].values()
    assert 0 < shared["query_tokens"] < own["query_tokens"]
    assert result["gradient_error_in_float32"] < 1e-4
    assert "| one row for all queries of an instance |" in capsys.readouterr().out


def test_both_ways_of_attention_compute_the_same(benchmark, monkeypatch, tmp_path, capsys):
    import train_attention

    monkeypatch.setattr(train_attention, "SHAPES", ((2, 5),))
    (result,) = run(benchmark, monkeypatch, tmp_path, "--sections", "attention")["attention"]
    assert result["fused"] > 0 and result["plain"] > 0
    assert "| 2 x 5 |" in capsys.readouterr().out
    query, key, value = torch.randn(3, 2, 9, 5, 64)
    expected = train_attention.fused(query, key, value)
    torch.testing.assert_close(train_attention.plain(query, key, value), expected)
