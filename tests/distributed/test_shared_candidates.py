"""Two ranks share one index of candidates: each passage is embedded once, and both retrieve the same."""

import json
import os
from pathlib import Path

from support.forks import run_forked


def test_ranks_share_the_work_and_the_index(tmp_path):
    done = run_forked(Path(__file__).with_name("run_shared_candidates.py"), tmp_path, world_size=2, timeout=120)
    assert done.returncode == 0, done.stderr[-4000:]
    results = json.loads((tmp_path / "results.json").read_text())
    for embedded in results["embedded"]:  # by rank, of the first build and of a refresh
        assert sorted(embedded[0] + embedded[1]) == sorted(results["passages"])
        assert min(map(len, embedded)) >= len(results["passages"]) // 3
    for first_rank, second_rank in results["found"]:
        assert first_rank == second_rank
        assert [len(of_query) for of_query in first_rank] == [3] * 4
    assert results["found"][0] != results["found"][1]  # other weights
    assert results["resumed"] == results["found"][1]
    assert results["failed"][0].startswith("RuntimeError: Rank 1 has failed: TypeError")
    assert results["failed"][1].startswith("TypeError")
    assert results["after the failure"] == [1, 1]
    assert sorted(os.listdir(tmp_path)) == ["checkpoint-1", "results.json"]
