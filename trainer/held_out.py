"""Evaluate while training: token losses, and each query against all distinct passages of the set."""

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import datasets
import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase
from transformers.trainer_utils import EvalLoopOutput, EvalPrediction, PredictionOutput, denumpify_detensorize
from transformers.utils import logging

from modeling_cosup.packing_cosup import pad_rows

from .batching import BatchFacts, CoSupDataCollator, encoder_rows, query_rows
from .dataset_setup import tokenize_dataset
from .distributed import gather_objects, world_size
from .duplicates import global_batch
from .grad_cache import RandomState, concatenated
from .losses import EmbeddingBatch, embedding_losses, total_loss
from .positions import check_positions
from .training_step import TrainingStepMixin
from .watch import explained_memory_errors

logger = logging.get_logger(__name__)


@dataclass
class EvaluatedBatch:
    """
    The results of a batch, kept until its set has been evaluated.

    Args:
        facts ([`BatchFacts`]): of the batch.
        token_losses (`dict[str, float]`): sums over tokens, by name.
        query_embeds (`numpy.ndarray` of shape `(N, h)`), passage_embeds (`numpy.ndarray` of shape `(M, h)`): in
            float32.
        num_nsp, num_predicted (`int`): how many `[NSP]` are trained, and where Gen's most likely token is `[NSP]`.
        query_ids, passage_ids (`list[list[int]]`): the tokens that each was made from; empty unless
            `include_for_metrics` asks for them.
    """

    facts: BatchFacts
    token_losses: dict[str, float]
    query_embeds: np.ndarray
    passage_embeds: np.ndarray
    num_nsp: int = 0
    num_predicted: int = 0
    query_ids: list[list[int]] = field(default_factory=list)
    passage_ids: list[list[int]] = field(default_factory=list)


class HeldOutMixin(TrainingStepMixin):
    """The part of [`CoSupTrainer`] that evaluates."""

    tokenizers: tuple[PreTrainedTokenizerBase, PreTrainedTokenizerBase]
    eval_dataset: Any
    _evaluated_batches: list[EvaluatedBatch]
    _warned_of_lone_held_out_queries: bool
    _keeps_inputs: bool = False

    def evaluate(
        self,
        eval_dataset: Any = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """Run `Trainer.evaluate`; `eval_dataset` may also hold instances that are not tokenized."""
        dataset: Any = eval_dataset
        if dataset is not None and not isinstance(dataset, str | dict):
            dataset = tokenize_dataset(dataset, self.tokenizers, self.cosup_config, self.args, "evaluation set")
            dataset = check_positions(dataset, self.cosup_config, self.args, "evaluation set")
        with self._fresh_candidates():
            return super().evaluate(dataset, ignore_keys, metric_key_prefix)

    def predict(
        self, test_dataset: Any, ignore_keys: list[str] | None = None, metric_key_prefix: str = "test"
    ) -> PredictionOutput:
        """
        Embed the queries and passages of instances, and measure retrieval among them.

        Args:
            test_dataset (`Dataset`, `IterableDataset` or `list[dict]`): instances, or already tokenized ones.
            ignore_keys: has no meaning here.
            metric_key_prefix (`str`, *optional*, defaults to `"test"`): of the names of metrics.

        Returns:
            `PredictionOutput`:

            - `predictions`: `(query_embeds, passage_embeds)`, float32 of shapes `(N, h)` and `(D, h)`. A query for
              each `[NSP]`, in the order of the instances, and a row for each distinct passage of the set, hard
              negatives included.
            - `label_ids`: int64 of shape `(N,)`, for each query the row of its passage.
            - `metrics`: what `evaluate()` returns, and what `compute_metrics` adds.

            With `prediction_loss_only=True` only the metrics.

        Raises:
            `ValueError`: if an instance is longer than `max_length`: without it, rows would not be the caller's; with
                `supervision="ntp"`, which embeds nothing.
        """
        if self.args.supervision == "ntp":
            raise ValueError(
                "predict() returns embeddings, and supervision='ntp' makes none: evaluate() has its loss."
            )
        dataset: Any = tokenize_dataset(test_dataset, self.tokenizers, self.cosup_config, self.args, "test set")
        if isinstance(dataset, datasets.Dataset) and len(dataset) < len(test_dataset):
            raise ValueError(
                f"{len(test_dataset) - len(dataset)} of {len(test_dataset)} instances of the test set are longer than"
                f" max_length={self.args.max_length}. Leave them out, or raise max_length: a row of the embeddings"
                " belongs to each of their queries."
            )
        dataset = check_positions(dataset, self.cosup_config, self.args, "test set")
        with self._fresh_candidates():
            return super().predict(dataset, ignore_keys, metric_key_prefix)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        """
        Return the loader of an evaluation set.

        Unlike `Trainer`'s, it gives each instance to exactly one rank, in order, and drops none. Batches go to the
        ranks in turn. A rank that runs out of instances gets empty batches.
        """
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        if isinstance(dataset, str):
            dataset = self.eval_dataset[dataset]
        has_default_collator = isinstance(self.data_collator, CoSupDataCollator)
        if not isinstance(dataset, datasets.Dataset) or not has_default_collator:
            return super().get_eval_dataloader(eval_dataset)
        count, rank, args = len(dataset), self.args.process_index, self.args
        size = max(1, min(args.eval_batch_size, -(-count // world_size())))
        rounds = -(-count // (size * world_size()))  # batches of each rank
        batches = []
        for number in range(rounds):
            start = (number * world_size() + rank) * size
            batches.append(list(range(start, min(start + size, count))))
        return DataLoader(
            dataset,
            batch_sampler=batches,
            collate_fn=self.data_collator,
            num_workers=args.dataloader_num_workers,
            prefetch_factor=args.dataloader_prefetch_factor,
            multiprocessing_context=args.dataloader_multiprocessing_context,
            pin_memory=args.dataloader_pin_memory and not args.use_cpu,
        )

    def get_test_dataloader(self, test_dataset: Any) -> DataLoader:
        """Return the loader of an evaluation set."""
        return self.get_eval_dataloader(test_dataset)

    def _get_eval_sampler(self, eval_dataset: Any) -> None:
        """Return no sampler: an evaluation reads instances in order, however training groups them."""

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[None, None, None]:
        """Keep the embeddings and token losses of a batch until the end of the set; return nothing to the loop."""
        inputs = self._prepare_inputs(inputs)
        if world_size() > 1:
            self._share_facts([inputs])  # a sharded model needs the same calls on all ranks
        with explained_memory_errors(self.args), torch.no_grad(), self.compute_loss_context_manager():
            outputs = []
            for micro_batch in inputs["micro_batches"]:
                outputs.append(self._forward(model, micro_batch, **self._options_for_nsp_logits(micro_batch)))
            # sums, not means: the number of tokens of the set is known only at its end
            token_losses = self.compute_losses(inputs, outputs)
        width = self.cosup_config.embedding_size
        batch = EvaluatedBatch(
            facts=inputs["facts"],
            token_losses={name: float(loss) for name, loss in token_losses.items()},
            query_embeds=_as_array([output.query_embeds for output in outputs], width),
            passage_embeds=_as_array([output.passage_embeds for output in outputs], width),
        )
        nsp_token_id = torch.tensor(self.cosup_config.nsp_token_id)
        for output in outputs:
            if output.logits is not None:  # (K, V), one row for each [NSP] that is trained
                batch.num_nsp += len(output.logits)
                is_predicted = output.logits.argmax(-1).cpu() == nsp_token_id  # (K,)
                batch.num_predicted += int(is_predicted.sum())
        if self._keeps_inputs:
            for micro_batch in inputs["micro_batches"]:
                batch.query_ids += query_rows(micro_batch)
                batch.passage_ids += encoder_rows(micro_batch, "passage")
        self._evaluated_batches.append(batch)
        return None, None, None

    def _options_for_nsp_logits(self, micro_batch: dict[str, Any]) -> dict[str, Any]:
        """Return the options of a forward that also returns the logits from which each `[NSP]` is predicted."""
        labels = micro_batch.get("labels")  # (B, T)
        if labels is None:
            return {}
        positions = (labels == self.cosup_config.nsp_token_id).flatten().nonzero()[:, 0]  # (K,)
        return {"return_logits": True, "logit_positions": positions - 1}

    def evaluation_loop(
        self,
        dataloader: DataLoader,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """
        Run `Trainer`'s loop, then compute losses and recall over the whole set, not batch by batch.

        With `bf16_full_eval` or `fp16_full_eval`, `Trainer` converts the weights; afterwards they are what they were.
        So are the random numbers that training draws next: a loader draws one, and dropout would depend on it.
        """
        self._evaluated_batches = []
        start = time.time()
        random_state = RandomState(self.args.device)
        with self._kept_weights(), self._without_inputs():
            output = super().evaluation_loop(dataloader, description, True, ignore_keys, metric_key_prefix)
        random_state.restore()
        batches: list[EvaluatedBatch] = []
        for batches_of_ranks in zip(*gather_objects(self._evaluated_batches, self._host_group), strict=True):
            batches += batches_of_ranks  # ranks take batches in turn, so this is the order of the set
        self._evaluated_batches = []
        self._running.leave_out(time.time() - start)
        metrics, prediction = self._measure(batches)
        assert output.metrics is not None
        output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in metrics.items()})
        if prediction_loss_only is None:
            prediction_loss_only = self.args.prediction_loss_only
        if prediction_loss_only:
            return output
        if self.compute_metrics is not None:
            for name, value in denumpify_detensorize(self.compute_metrics(prediction)).items():
                output.metrics[f"{metric_key_prefix}_{name.removeprefix(f'{metric_key_prefix}_')}"] = value
        return output._replace(predictions=prediction.predictions, label_ids=prediction.label_ids)

    @contextlib.contextmanager
    def _kept_weights(self) -> Iterator[None]:
        """Keep the weights that `Trainer` converts for an evaluation, and put them back at the end, bit by bit."""
        if not self.args.bf16_full_eval and not self.args.fp16_full_eval:
            yield
            return
        parameters = [(parameter, parameter.data) for parameter in self.model.parameters()]
        buffers = []
        for module in self.model.modules():
            buffers += [(module, name, buffer) for name, buffer in module.named_buffers(recurse=False)]
        try:
            yield
        finally:
            for parameter, data in parameters:
                parameter.data = data
            for module, name, buffer in buffers:
                setattr(module, name, buffer)
            self._move_model_to_device(self.model, self.args.device)

    @contextlib.contextmanager
    def _without_inputs(self) -> Iterator[None]:
        """Keep `Trainer`'s loop from gathering `inputs`, which it expects in one tensor: `prediction_step` does it."""
        asked = self.args.include_for_metrics
        self._keeps_inputs = "inputs" in asked
        self.args.include_for_metrics = []
        try:
            yield
        finally:
            self.args.include_for_metrics = asked

    def _measure(self, batches: Sequence[EvaluatedBatch]) -> tuple[dict[str, Any], EvalPrediction]:
        """Return losses and recall over all batches of a set, and what `compute_metrics` gets."""
        facts = [batch.facts for batch in batches]
        query_embeds = np.concatenate([batch.query_embeds for batch in batches])
        passage_embeds = np.concatenate([batch.passage_embeds for batch in batches])
        query_losses: list[torch.Tensor] = []

        def losses_of(batch: EmbeddingBatch) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
            losses, scores = embedding_losses(batch, self.cosup_config, self.args)
            assert batch.same_passage is not None
            are_negatives = ~batch.same_passage  # (C, D)
            are_negatives[torch.arange(len(scores)), batch.passage_labels] = False
            lone = ~are_negatives.any(1)  # (C,); without a negative there is no loss
            query_losses.append(losses["nsp_loss"].masked_fill(lone, float("nan")))
            return losses, scores

        retrieval, rows, labels = retrieval_metrics(query_embeds, passage_embeds, facts, losses_of)
        self._warn_of_lone_held_out_queries(len(labels), retrieval)
        metrics: dict[str, Any] = {}
        num_labels = sum(batch_facts.num_labels for batch_facts in facts)
        if num_labels:
            for batch in batches:
                for name, loss in batch.token_losses.items():
                    metrics[name] = metrics.get(name, 0.0) + loss / num_labels
        metrics |= retrieval
        num_nsp = sum(batch.num_nsp for batch in batches)
        if num_nsp:
            metrics["nsp_predicted"] = sum(batch.num_predicted for batch in batches) / num_nsp
        losses: dict[str, float] = {name: metrics[name] for name in self.loss_weights if name in metrics}
        if losses:  # a sum of no losses is not 0
            metrics["loss"] = total_loss(losses, self.loss_weights)

        order = _order_of_queries(facts)
        asked: dict[str, Any] = {}
        if "inputs" in self.args.include_for_metrics:
            query_ids = [ids for batch in batches for ids in batch.query_ids]
            passage_ids = [ids for batch in batches for ids in batch.passage_ids]
            asked["inputs"] = (_padded([query_ids[i] for i in order]), _padded([passage_ids[row] for row in rows]))
        if "loss" in self.args.include_for_metrics:
            asked["losses"] = torch.cat(query_losses).numpy()[order]
        predictions: Any = (query_embeds[order], passage_embeds[rows])
        return metrics, EvalPrediction(predictions=predictions, label_ids=labels[order], **asked)

    def _warn_of_lone_held_out_queries(self, num_queries: int, retrieval: dict[str, float]) -> None:
        """Warn, once, of an evaluation set in which queries have no negative."""
        num_lone = num_queries - int(retrieval["num_queries"])
        if not num_lone or self._warned_of_lone_held_out_queries or not self.is_world_process_zero():
            return
        self._warned_of_lone_held_out_queries = True
        logger.warning(
            f"{num_lone} of {num_queries} queries of the evaluation set have no negative: all of its"
            f" {int(retrieval['num_passages'])} distinct passages are right for them. Its figures leave them out."
        )


def _as_array(pieces: Sequence[torch.Tensor | None], width: int) -> np.ndarray:
    """Return the embeddings of all micro-batches, `(N, width)` in float32; N is 0 if no micro-batch has any."""
    embeds = concatenated(pieces)
    if embeds is None:
        embeds = torch.zeros(0, width)
    return embeds.float().cpu().numpy()


def _order_of_queries(facts: Sequence[BatchFacts]) -> np.ndarray:
    """Return `(N,)`: the row of each query of a set, in the order of the instances."""
    numbers: list[int] = []
    for batch_facts in facts:
        first = len(numbers)
        numbers += [first + number for number in batch_facts.query_numbers]
    return np.argsort(np.array(numbers, dtype=np.int64))


def _padded(rows: Sequence[Sequence[int]]) -> np.ndarray:
    """Return token ids as one array, padded with -100 on the right."""
    ids, _ = pad_rows(rows, -100)
    return ids.numpy()


def retrieval_metrics(
    query_embeds: np.ndarray,
    passage_embeds: np.ndarray,
    facts: Sequence[BatchFacts],
    embedding_losses: Callable[[EmbeddingBatch], tuple[dict[str, torch.Tensor], torch.Tensor]],
    ks: Sequence[int] = (1, 5),
    chunk_size: int = 1024,
) -> tuple[dict[str, float], np.ndarray, np.ndarray]:
    """
    Return embedding losses and recall of queries over all distinct passages of a set.

    Another passage that is right for a query is neither a negative nor a miss. A tie is a miss. A query without a
    negative cannot miss, so no figure counts it; nor is there a `query_recall@k` for as many places as passages.

    Args:
        query_embeds (`numpy.ndarray` of shape `(N, h)`), passage_embeds (`numpy.ndarray` of shape `(M, h)`): of all
            batches.
        facts (`Sequence[BatchFacts]`): of the same batches, in the same order.
        embedding_losses (`Callable`): see [`~trainer.losses.embedding_losses`].
        ks (`Sequence[int]`, *optional*, defaults to `(1, 5)`): of `query_recall@k`.
        chunk_size (`int`, *optional*, defaults to 1024): queries that are scored in one call.

    Returns:
        `(dict, numpy.ndarray, numpy.ndarray)`: `num_passages`, `num_queries` (those that have a negative) and, if
        there are such queries, the mean of each loss and `query_recall@k`; the rows of the D distinct passages,
        `(D,)`; for each query, the number of its passage among these, `(N,)`.
    """
    merged = _merge(facts)
    batch = global_batch([merged], 0)
    rows = np.flatnonzero(~batch.repeated)  # (D,)
    number_of_group = {int(batch.passage_groups[row]): number for number, row in enumerate(rows)}
    number_of_row = [number_of_group[int(group)] for group in batch.passage_groups]  # among distinct passages
    labels = np.array([number_of_row[label] for label in merged.passage_labels], dtype=np.int64)  # (N,)
    right_queries, right_rows = batch.further_positives  # (P,), (P,)
    right_passages = np.array([number_of_row[row] for row in right_rows], dtype=np.int64)  # (P,)

    passages = torch.from_numpy(passage_embeds[rows])  # (D, h)
    losses: dict[str, list[torch.Tensor]] = {}
    ranks = []
    for start in range(0, max(1, len(labels)), chunk_size):
        queries = torch.from_numpy(query_embeds[start : start + chunk_size])  # (C, h)
        positives = torch.from_numpy(labels[start : start + chunk_size])  # (C,)
        also_right = torch.zeros(len(queries), len(rows), dtype=torch.bool)  # (C, D)
        in_chunk = (right_queries >= start) & (right_queries < start + chunk_size)
        also_right[right_queries[in_chunk] - start, right_passages[in_chunk]] = True
        chunk_losses, scores = embedding_losses(EmbeddingBatch(queries, passages, positives, also_right))
        for name, loss in chunk_losses.items():
            losses.setdefault(name, []).append(loss)
        ranks.append(_ranks(scores, positives))

    compared = torch.from_numpy(batch.has_negatives)  # (N,)
    metrics: dict[str, float] = {"num_passages": len(rows), "num_queries": int(compared.sum())}
    if compared.any():
        for name, chunks in losses.items():
            metrics[name] = float(torch.cat(chunks)[compared].mean())
        for k in ks:
            if k < len(rows):
                metrics[f"query_recall@{k}"] = float((torch.cat(ranks)[compared] < k).double().mean())
    return metrics, rows, labels


def _merge(facts: Sequence[BatchFacts]) -> BatchFacts:
    """Return the passages and queries of all batches as one batch."""
    merged = BatchFacts()
    for batch_facts in facts:
        first_row = len(merged.passage_keys)
        merged.passage_keys += batch_facts.passage_keys
        merged.positive_keys += batch_facts.positive_keys
        merged.query_keys += batch_facts.query_keys
        merged.query_instance_ids += batch_facts.query_instance_ids
        merged.passage_labels += [first_row + label for label in batch_facts.passage_labels]
    return merged


def _ranks(scores: torch.Tensor, positives: torch.Tensor) -> torch.Tensor:
    """
    Return `(C,)`: how many other passages score at least as high as each query's positive.

    Args:
        scores (`torch.FloatTensor` of shape `(C, D)`): `-inf` for other passages that are right too, so that they do
            not count.
        positives (`torch.LongTensor` of shape `(C,)`): the column of each query's positive.
    """
    positive_scores = scores.gather(1, positives[:, None])  # (C, 1)
    ranks = (scores >= positive_scores).sum(1) - 1
    return torch.where(positive_scores[:, 0].isfinite(), ranks, scores.shape[1])  # NaN is a miss at every k
