"""The benchmark of token memories, small: it runs, and its arms agree."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "recipes" / "benchmarks"


@pytest.fixture
def benchmark(monkeypatch):
    """Import `recipes/benchmarks/memory.py`; its name is that of no other script, but `memory` is too general."""
    monkeypatch.setattr(sys, "path", [str(BENCHMARKS), *sys.path])
    spec = importlib.util.spec_from_file_location("benchmark_of_memory", BENCHMARKS / "memory.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    return module


def test_its_arms_agree(benchmark, monkeypatch, tmp_path, capsys):
    words = ["--quick", "true", "--sections", "search", "perplexity", "build", "decode"]
    monkeypatch.setattr(sys, "argv", ["memory.py", *words, "--output_file", str(tmp_path / "out.json")])
    benchmark.main()
    results = json.loads((tmp_path / "out.json").read_text())
    for section in ("search", "perplexity"):
        (result,) = results[section]
        assert all(error < 1e-5 for error in result["errors"].values()), section
        assert set(result["seconds"]) == set(result["errors"]) == set(result["peak"])
    assert results["build"]["tokens"] == 4 * 23
    assert results["build"]["largest_difference"] < 1e-5  # both round the same keys to half precision
    arms = ["no memory", "MLPMemory", "KNNMemory of 100", "KNNMemory of 300"]
    assert [result["arm"] for result in results["decode"]] == arms
    assert results["decode"][0]["cost"]["median"] == 1.0
    assert "times no memory" in capsys.readouterr().out


def test_a_wrong_section_is_reported(benchmark, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["memory.py", "--sections", "speed"])
    with pytest.raises(SystemExit, match="--sections holds 'speed', expected some of search, perplexity"):
        benchmark.main()
