"""Indexes of random embeddings, and the product that their search must equal."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from modeling_cosup import PassageIndex
from modeling_cosup.index_build_cosup import record_batch
from modeling_cosup.index_files_cosup import Shard
from modeling_cosup.index_store_cosup import new_config


def random_index(
    count: int = 300,
    size: int = 16,
    shard_size: int = 70,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    normalize: bool = True,
) -> PassageIndex:
    """Return an index of random embeddings and empty passages: its search needs no model."""
    embeddings = torch.randn(count, size, generator=torch.Generator().manual_seed(seed))
    if normalize:
        embeddings = torch.nn.functional.normalize(embeddings, dim=1)
    embeddings = embeddings.to(dtype)
    passages = [{"id": f"m{i}", "title": "", "text": "x"} for i in range(count)]
    shards = []
    for start in range(0, count, shard_size):
        part = slice(start, start + shard_size)
        token_ids = [np.array([5, 6], np.int32)] * len(passages[part])
        shards.append(Shard(record_batch(passages[part], token_ids), embeddings[part].clone()))
    settings = {"embedding_size": size, "dtype": str(dtype).removeprefix("torch."), "fingerprint": {}}
    return PassageIndex(shards, new_config(settings, shards))


def in_folder(index: PassageIndex, folder: Path, **options: Any) -> PassageIndex:
    """Save an index and load it again."""
    index.save_pretrained(folder)
    return PassageIndex.from_pretrained(folder, **options)


def queries(n: int, size: int = 16, seed: int = 1) -> torch.Tensor:
    return torch.randn(n, size, generator=torch.Generator().manual_seed(seed))


def all_scores(index: PassageIndex, query_embeds: torch.Tensor, alive: torch.Tensor | None = None) -> torch.Tensor:
    """Return scores `(N, num_rows)` by one product, with -inf for rows that are not `alive`."""
    scores = query_embeds @ index.embeddings.T
    if alive is None:
        return scores
    return scores.masked_fill(~alive, float("-inf"))


def check_nearest(results: Sequence[np.ndarray], scores: torch.Tensor) -> None:
    """Check that results are the k best of `scores`, best first; rows with equal scores may be in any order."""
    found_scores, found_rows = results
    assert found_scores.dtype == np.float32 and found_rows.dtype == np.int64
    best = scores.topk(found_rows.shape[1]).values
    torch.testing.assert_close(torch.from_numpy(found_scores), best, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(scores.gather(1, torch.from_numpy(found_rows)), best, rtol=1e-5, atol=1e-5)
    assert all(len(set(rows)) == len(rows) for rows in found_rows.tolist())
