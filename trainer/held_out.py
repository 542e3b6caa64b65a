"""Retrieval on an evaluation set while training: every query of the set against all of its distinct passages."""

import numpy as np
import torch

from modeling_cosup import info_nce

from .batching import BatchFacts
from .duplicates import global_batch


def retrieval_metrics(query_embeds, passage_embeds, facts, temperature=1.0, ks=(1, 5), chunk_size=1024):
    """
    NSP loss and query_recall@k of queries over all distinct passages of a set.

    Args:
        query_embeds (`numpy.ndarray` of shape `(N, h)`), passage_embeds (`numpy.ndarray` of shape `(M, h)`): of all batches.
        facts (`list[BatchFacts]`): of the same batches, in the same order.
        temperature (`float`): of the NSP loss.

    Returns:
        `(dict, numpy.ndarray, numpy.ndarray)`: `nsp_loss`, `num_passages`, `num_queries` and, with queries, `query_recall@k`; the rows of distinct
        passages; for each query which of these is its own. Another passage that is right for a query is neither a negative nor a miss, a tie is a miss.
    """
    starts = np.cumsum([0] + [len(each.passage_keys) for each in facts])
    merged = BatchFacts(
        passage_keys=[key for each in facts for key in each.passage_keys],
        positive_keys=[key for each in facts for key in each.positive_keys],
        query_keys=[key for each in facts for key in each.query_keys],
        passage_labels=[int(start) + label for each, start in zip(facts, starts, strict=False) for label in each.passage_labels],
    )
    batch = global_batch([merged], 0)
    rows, pairs = np.flatnonzero(~batch.repeated), batch.no_negatives
    row_of_group = {int(batch.passage_groups[row]): i for i, row in enumerate(rows)}
    labels = np.array([row_of_group[int(batch.passage_groups[label])] for label in merged.passage_labels], dtype=np.int64)
    passages, losses, ranks = torch.from_numpy(passage_embeds[rows]), [], []
    for start in range(0, len(labels), chunk_size):
        queries, positives = torch.from_numpy(query_embeds[start : start + chunk_size]), torch.from_numpy(labels[start : start + chunk_size])
        right = torch.zeros(len(queries), len(rows), dtype=torch.bool)
        for query, row in pairs[:, (pairs[0] >= start) & (pairs[0] < start + chunk_size)].T.tolist():
            right[query - start, row_of_group[int(batch.passage_groups[row])]] = True
        loss, scores = info_nce(queries, passages, positives, right, temperature, return_scores=True)
        losses.append(loss)
        own = scores.gather(1, positives[:, None])
        ranks.append(torch.where(own[:, 0].isfinite(), (scores >= own).sum(1) - 1, len(rows)))  # -inf where it is right too; NaN finds nothing
    metrics = {"nsp_loss": float(torch.cat(losses).mean()) if len(labels) else 0.0, "num_passages": len(rows), "num_queries": len(labels)}
    if len(labels):
        metrics |= {f"query_recall@{k}": float((torch.cat(ranks) < k).double().mean()) for k in ks}
    return metrics, rows, labels
