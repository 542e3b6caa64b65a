"""Evaluation while training: token losses of each instance, and each query against all distinct passages."""

import functools
import time
from collections.abc import Callable, Sequence

import datasets
import numpy as np
import torch
from accelerate.utils import gather_object
from torch.utils.data import DataLoader
from transformers.trainer_utils import EvalPrediction

from .batching import BatchFacts, CoSupDataCollator
from .dataset_setup import tokenize_dataset
from .distributed import world_size
from .duplicates import global_batch
from .grad_cache import concatenated
from .losses import EmbeddingBatch, embedding_losses, total_loss
from .watch import explained_memory_errors


class HeldOutMixin:
    """The part of [`CoSupTrainer`] that evaluates."""

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval"):
        """`Trainer.evaluate`; `eval_dataset` may hold instances or tokenized ones, as in the constructor."""
        if eval_dataset is not None and not isinstance(eval_dataset, str | dict):
            eval_dataset = tokenize_dataset(
                eval_dataset, self.tokenizers, self.cosup_config, self.args, "evaluation set"
            )
        return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)

    def get_eval_dataloader(self, eval_dataset=None):
        """As `Trainer`'s, but each instance goes to exactly one rank, and a rank that runs out gets an empty batch."""
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        dataset = self.eval_dataset[dataset] if isinstance(dataset, str) else dataset
        own_collator = isinstance(self.data_collator, CoSupDataCollator)
        if world_size() == 1 or not isinstance(dataset, datasets.Dataset) or not own_collator:
            return super().get_eval_dataloader(eval_dataset)
        rank, size = self.args.process_index, self.args.eval_batch_size
        longest = -(-len(dataset) // world_size())
        rows = list(range(rank, len(dataset), world_size()))
        batches = [rows[start : start + size] for start in range(0, longest, size)]
        return DataLoader(
            dataset,
            batch_sampler=batches,
            collate_fn=self.data_collator,
            num_workers=self.args.dataloader_num_workers,
            pin_memory=not self.args.use_cpu,
        )

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """Keep a batch's embeddings and token losses until the end of the set; return nothing to the loop."""
        inputs = self._prepare_inputs(inputs)
        facts, nothing = inputs["facts"], torch.zeros(0, self.cosup_config.embedding_size)
        if world_size() > 1:
            self._share_facts([inputs])  # shards need the same calls on all ranks
        with explained_memory_errors(self.args), torch.no_grad(), self.compute_loss_context_manager():
            outputs = [self._forward(model, micro_batch) for micro_batch in inputs["micro_batches"]]
            sums = self.compute_losses(inputs, outputs)  # the set's number of tokens is known at its end
        embeds = [
            concatenated([getattr(output, name) for output in outputs]) for name in ("query_embeds", "passage_embeds")
        ]
        arrays = [(nothing if part is None else part).float().cpu().numpy() for part in embeds]
        self._eval_batches.append((facts, {name: float(total) for name, total in sums.items()}, *arrays))
        return None, None, None

    def evaluation_loop(
        self, dataloader, description, prediction_loss_only=None, ignore_keys=None, metric_key_prefix="eval"
    ):
        """`Trainer`'s loop, then the losses and recall over the whole set, whatever its batches."""
        self._eval_batches, start = [], time.time()
        output = super().evaluation_loop(dataloader, description, True, ignore_keys, metric_key_prefix)
        facts, token_losses, queries, passages = zip(*gather_object(self._eval_batches), strict=True)
        self._eval_batches = []
        self._running.leave_out(time.time() - start)
        query_embeds, passage_embeds = np.concatenate(queries), np.concatenate(passages)
        losses_of = functools.partial(embedding_losses, config=self.cosup_config, args=self.args)
        metrics, rows, labels = retrieval_metrics(query_embeds, passage_embeds, facts, losses_of)
        metrics = dict.fromkeys(self.loss_weights, 0.0) | metrics
        num_labels = max(1, sum(batch_facts.num_labels for batch_facts in facts))
        for batch_losses in token_losses:
            for name, loss in batch_losses.items():
                metrics[name] += loss / num_labels
        losses = {name: metrics[name] for name in self.loss_weights}
        metrics["loss"] = total_loss(losses, self.loss_weights)
        if self.compute_metrics is not None:
            prediction = EvalPrediction(predictions=(query_embeds, passage_embeds[rows]), label_ids=labels)
            metrics.update(self.compute_metrics(prediction))
        output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in metrics.items()})
        return output


def retrieval_metrics(
    query_embeds: np.ndarray,
    passage_embeds: np.ndarray,
    facts: Sequence[BatchFacts],
    embedding_losses: Callable[[EmbeddingBatch], tuple[dict[str, torch.Tensor], torch.Tensor]],
    ks: Sequence[int] = (1, 5),
    chunk_size: int = 1024,
) -> tuple[dict[str, float], np.ndarray, np.ndarray]:
    """
    Embedding losses and recall of queries over all distinct passages of a set.

    Args:
        query_embeds (`numpy.ndarray` of shape `(N, h)`), passage_embeds (`numpy.ndarray` of shape `(M, h)`): of all
            batches.
        facts (`Sequence[BatchFacts]`): of the same batches, in the same order.
        embedding_losses (`Callable`): see [`~trainer.losses.embedding_losses`].
        ks (`Sequence[int]`): of `query_recall@k`.
        chunk_size (`int`): queries that are scored at once.

    Returns:
        `(dict, numpy.ndarray, numpy.ndarray)`: the mean of each loss, `num_passages`, `num_queries` and, with queries,
        `query_recall@k`; the rows of distinct passages; for each query which of these is its own. Another passage that
        is right for a query is neither a negative nor a miss, a tie is a miss.
    """
    starts = np.cumsum([0] + [len(batch_facts.passage_keys) for batch_facts in facts])
    merged = BatchFacts()
    for batch_facts, start in zip(facts, starts, strict=False):
        merged.passage_keys += batch_facts.passage_keys
        merged.positive_keys += batch_facts.positive_keys
        merged.query_keys += batch_facts.query_keys
        merged.passage_labels += [int(start) + label for label in batch_facts.passage_labels]
    batch = global_batch([merged], 0)
    rows, pairs = np.flatnonzero(~batch.repeated), batch.no_negatives
    row_of_group = {int(batch.passage_groups[row]): i for i, row in enumerate(rows)}
    groups = [int(batch.passage_groups[label]) for label in merged.passage_labels]
    labels = np.array([row_of_group[group] for group in groups], dtype=np.int64)
    passages = torch.from_numpy(passage_embeds[rows])
    losses: dict[str, list[torch.Tensor]] = {}
    ranks = []
    for start in range(0, max(1, len(labels)), chunk_size):
        chunk = slice(start, start + chunk_size)
        queries, positives = torch.from_numpy(query_embeds[chunk]), torch.from_numpy(labels[chunk])
        right = torch.zeros(len(queries), len(rows), dtype=torch.bool)
        for query, row in pairs[:, (pairs[0] >= start) & (pairs[0] < start + chunk_size)].T.tolist():
            right[query - start, row_of_group[int(batch.passage_groups[row])]] = True
        chunk_losses, scores = embedding_losses(EmbeddingBatch(queries, passages, positives, right))
        for name, loss in chunk_losses.items():
            losses.setdefault(name, []).append(loss)
        positive_scores = scores.gather(1, positives[:, None])
        rank = (scores >= positive_scores).sum(1) - 1  # -inf where another passage is right too
        ranks.append(torch.where(positive_scores[:, 0].isfinite(), rank, len(rows)))  # NaN finds nothing
    metrics = {name: float(torch.cat(chunks).mean()) if len(labels) else 0.0 for name, chunks in losses.items()}
    metrics |= {"num_passages": len(rows), "num_queries": len(labels)}
    if len(labels):
        metrics |= {f"query_recall@{k}": float((torch.cat(ranks) < k).double().mean()) for k in ks}
    return metrics, rows, labels
