"""Indexes of random embeddings, and the product that their search must equal."""

import numpy as np
import torch

from modeling_cosup import PassageIndex
from modeling_cosup.index_build_cosup import record_batch
from modeling_cosup.index_files_cosup import Shard
from modeling_cosup.index_store_cosup import new_config


def random_index(count=300, size=16, shard_size=70, dtype=torch.float32, seed=0, normalize=True):
    """An index of random embeddings and empty passages: searching asks for no model."""
    embeddings = torch.randn(count, size, generator=torch.Generator().manual_seed(seed))
    embeddings = (torch.nn.functional.normalize(embeddings, dim=1) if normalize else embeddings).to(dtype)
    passages = [{"id": f"m{i}", "title": "", "text": "x"} for i in range(count)]
    shards = []
    for start in range(0, count, shard_size):
        rows = passages[start : start + shard_size]
        shards.append(
            Shard(
                record_batch(rows, [np.array([5, 6], np.int32)] * len(rows)),
                embeddings[start : start + shard_size].clone(),
            )
        )
    settings = {"embedding_size": size, "dtype": str(dtype).removeprefix("torch."), "fingerprint": {}}
    return PassageIndex(shards, new_config(settings, shards))


def in_folder(index, folder, **options):
    index.save_pretrained(folder)
    return PassageIndex.from_pretrained(folder, **options)


def queries(n, size=16, seed=1):
    return torch.randn(n, size, generator=torch.Generator().manual_seed(seed))


def all_scores(index, query_embeds, alive=None):
    """Scores `(N, num_rows)` by one product; -inf for rows that are not `alive`."""
    scores = query_embeds @ index.embeddings.T
    return scores if alive is None else scores.masked_fill(~alive, float("-inf"))


def check(found, scores):
    """The k best of `scores`, best first; which of two rows with the same score comes first is open."""
    assert found[0].dtype == np.float32 and found[1].dtype == np.int64
    best = scores.topk(found[1].shape[1]).values
    torch.testing.assert_close(torch.from_numpy(found[0]), best, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(scores.gather(1, torch.from_numpy(found[1])), best, rtol=1e-5, atol=1e-5)
    assert all(len(set(row)) == len(row) for row in found[1].tolist())
