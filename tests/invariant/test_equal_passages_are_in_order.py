"""Which of several passages with equal embeddings is found does not depend on other queries, a device or a pool."""

import numpy as np
import pytest
import torch

from modeling_cosup import index_search_cosup
from support.indexes import queries, random_index

GROUPS = [
    [3, 10, 15, 129, 130, 299],
    list(range(40, 290, 4)),
]  # rows with equal embeddings; 63 are more than are spare


def duplicated_index(dtype):
    index = random_index(dtype=dtype, size=48, shard_size=130)
    for rows in GROUPS:
        for row in rows:
            index._shards[row // 130].embeddings[row % 130] = index._shards[0].embeddings[rows[0]]
    return index


def near_duplicates(index, n=70):
    """Return queries `(n, h)`, each nearest to a group of duplicates, or to all rows alike."""
    query_embeds = queries(n, 48)
    query_embeds[::3] = 0.3 * query_embeds[::3] + 5 * index.embeddings[GROUPS[0][0]]
    query_embeds[1::3] = 0.3 * query_embeds[1::3] + 5 * index.embeddings[GROUPS[1][0]]
    return query_embeds


def nearest_rows(index, query_embeds, k, rows):
    """Return the k nearest of some rows: the largest scores first, and the first of equal ones."""
    embeddings = index.embeddings[torch.from_numpy(rows)].double()
    scores = torch.stack([(embeddings * query).sum(1) for query in query_embeds.double()]).float().numpy()
    return rows[np.lexsort((np.broadcast_to(rows, scores.shape), -scores), axis=1)[:, :k]].tolist()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("k", [1, 2, 5, 12, 70])
@pytest.mark.parametrize("deleted", [False, True])
def test_equal_passages_are_in_the_order_of_their_rows(dtype, k, deleted, monkeypatch):
    monkeypatch.setattr(index_search_cosup, "PRODUCT_ROWS", 64)
    monkeypatch.setattr(index_search_cosup, "NUMBERS", 48 * 7)
    index = duplicated_index(dtype)
    query_embeds = near_duplicates(index)
    if deleted:
        index.delete(["m3", "m44", "m48"])
    live = index.live_rows()
    expected = nearest_rows(index, query_embeds, k, live)
    # through a small pool, which is gathered, and a large one, which is a mask over all rows
    pools = [np.array([299, 15, 10, 3, 129, *GROUPS[1][::-1][:20]]), np.delete(live, 20)[::-1]]
    expected_of_pools = [nearest_rows(index, query_embeds, k, np.intersect1d(pool, live)) for pool in pools]
    for device in (None, "cpu"):
        index.to(device)
        batched, rows = index.search(query_embeds, k)
        assert rows.tolist() == expected
        for count in (1, 2):
            for start in range(0, 12, count):
                scores, rows = index.search(query_embeds[start : start + count], k)
                assert rows.tolist() == expected[start : start + count]
                assert (scores == batched[start : start + count]).all()
        for pool, expected_of_pool in zip(pools, expected_of_pools, strict=True):
            _, rows = index.search(query_embeds[:6], k, candidates=[pool] * 6)
            assert rows[:, : len(expected_of_pool[0])].tolist() == expected_of_pool[:6]


def test_an_approximate_search_orders_the_equal_passages_that_it_finds():
    index = duplicated_index(torch.float32)
    query_embeds = near_duplicates(index)
    index.train_approximate("IVF4,Flat", nprobe=4)
    scores, rows = index.search(query_embeds, 6)
    equal = scores[:, 1:] == scores[:, :-1]
    assert equal.sum() > 100
    assert (rows[:, 1:] > rows[:, :-1])[equal].all()
