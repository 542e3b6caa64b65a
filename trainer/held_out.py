"""Evaluate while training: token losses, and each query against all distinct passages of the set."""

import contextlib
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader
from transformers.trainer_utils import EvalLoopOutput, EvalPrediction, PredictionOutput, denumpify_detensorize
from transformers.utils import logging

from modeling_cosup import CoSupOutput

from .batching import BatchFacts, UnresolvedBatch, needs_candidates
from .candidate_watch import LEFT_OUT
from .cpu_attention import cpu_attention
from .distillation_step import Resolution, add_scores
from .distributed import gather_objects, world_size
from .grad_cache import RandomState, concatenated
from .held_out_figures import DistilledQuery, distillation_metrics, order_of_queries, padded, retrieval_metrics
from .held_out_sets import HeldOutSetsMixin
from .losses import EmbeddingBatch, distilled_batch, student_scores, total_loss
from .micro_batches import encoder_rows, query_rows
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
        query_ids, passage_ids (`list[list[int]]`): the tokens that each embedding was made from; empty unless
            `include_for_metrics` asks for them.
        values (`dict[str, list[float]]`): of instances that got candidates, by the name of the figure.
        distilled (`list[DistilledQuery]`): the queries whose candidates the reader has scored.
        num_left_out (`int`): instances that were too long with their candidates.
    """

    facts: BatchFacts
    token_losses: dict[str, float]
    query_embeds: np.ndarray
    passage_embeds: np.ndarray
    num_nsp: int = 0
    num_predicted: int = 0
    query_ids: list[list[int]] = field(default_factory=list)
    passage_ids: list[list[int]] = field(default_factory=list)
    values: dict[str, list[float]] = field(default_factory=dict)
    distilled: list[DistilledQuery] = field(default_factory=list)
    num_left_out: int = 0

    def add_distilled(self, batch: "EvaluatedBatch") -> None:
        """Add what was measured on instances that got candidates, except their passages: they are not of the set."""
        self.facts.num_labels += batch.facts.num_labels
        self.num_nsp += batch.num_nsp
        self.num_predicted += batch.num_predicted
        for name, loss in batch.token_losses.items():
            self.token_losses[name] = self.token_losses.get(name, 0.0) + loss
        self.distilled += batch.distilled


class HeldOutMixin(HeldOutSetsMixin):
    """The part of [`CoSupTrainer`] that evaluates."""

    _evaluated_batches: list[EvaluatedBatch]
    _warned_of_lone_held_out_queries: bool
    _keeps_inputs: bool = False

    def evaluate(
        self,
        eval_dataset: Any = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """
        Run `Trainer.evaluate`; `eval_dataset` may also hold instances that are not tokenized.

        Raises:
            `TypeError`: for a name that is none of the sets that the trainer was given.
        """
        dataset: Any = eval_dataset
        sets = self.eval_dataset if isinstance(self.eval_dataset, dict) else {}
        is_name = isinstance(dataset, str) and dataset in sets
        if sets and isinstance(dataset, str) and not is_name:
            raise TypeError(
                f"The evaluation set is the name {dataset!r}, expected one of this trainer's sets"
                f" ({', '.join(map(repr, sets))}), or instances: read them with load_instances({dataset!r})."
            )
        if dataset is not None and not is_name and not isinstance(dataset, dict):
            dataset = self._prepared_evaluation_set(dataset)  # raises for the name of a file
        with self._fresh_candidates():
            return super().evaluate(dataset, ignore_keys, metric_key_prefix)

    def predict(
        self, test_dataset: Any, ignore_keys: list[str] | None = None, metric_key_prefix: str = "test"
    ) -> PredictionOutput:
        """
        Embed the queries and passages of instances, and measure retrieval among them.

        Args:
            test_dataset (`Dataset`, `IterableDataset` or `list[dict]`): instances, or already tokenized ones. A stream
                is read to its end first.
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
            `ValueError`: if an instance is longer than `max_length`, because dropping it would shift the rows of the
                embeddings; if one has no passage and `candidates_from` would retrieve for it; with
                `supervision="ntp"`, which embeds nothing.
        """
        if not self.args.trains_embeddings:
            raise ValueError(
                "predict() returns embeddings, and supervision='ntp' makes none: evaluate() has its loss."
            )
        dataset = self._prepared_test_set(test_dataset)
        return super().predict(dataset, ignore_keys, metric_key_prefix)

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[None, None, None]:
        """Keep the embeddings and token losses of a batch until the end of the set; return nothing to the loop."""
        if isinstance(inputs, UnresolvedBatch):
            resolution = self._resolve([feature for feature in inputs.features if needs_candidates(feature)])
            if self.args.distills:
                add_scores(resolution)
            known = [feature for feature in inputs.features if not needs_candidates(feature)]
            self._evaluated_batches.append(self._evaluate_resolved(model, known, resolution))
        else:
            self._evaluated_batches.append(self._evaluate_batch(model, inputs))
        return None, None, None

    def _evaluate_batch(self, model: nn.Module, inputs: dict[str, Any]) -> EvaluatedBatch:
        """Return the embeddings and token losses of a batch."""
        inputs = self._prepare_inputs(inputs)
        if world_size() > 1 and self.args.candidates_from is None:
            self._share_facts([inputs])  # a sharded model needs the same calls on all ranks
        with (
            torch.no_grad(),
            cpu_attention(self.args),
            self.compute_loss_context_manager(),
        ):
            outputs = []
            for micro_batch in inputs["micro_batches"]:
                outputs.append(self._forward(model, micro_batch, **self._options_for_nsp_logits(micro_batch)))
            # sums, not means: the number of tokens of the set is known only at its end
            token_losses = self.compute_losses(inputs, outputs)
            distilled = self._distilled_queries(inputs, outputs)
        width = self.cosup_config.embedding_size
        batch = EvaluatedBatch(
            facts=inputs["facts"],
            token_losses={name: float(loss) for name, loss in token_losses.items()},
            query_embeds=_as_array([output.query_embeds for output in outputs], width),
            passage_embeds=_as_array([output.passage_embeds for output in outputs], width),
            distilled=distilled,
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
        return batch

    def _evaluate_resolved(
        self, model: nn.Module, known: Sequence[Mapping[str, Any]], resolution: Resolution
    ) -> EvaluatedBatch:
        """
        Return the results of a batch in which some instances got candidates.

        These instances are evaluated as a separate batch: recall is measured over the passages of the set, and
        candidates are not among them.
        """
        evaluated = self._evaluate_batch(model, self.data_collator.collate(known))
        evaluated.values = resolution.values
        evaluated.num_left_out = resolution.num_left_out
        evaluated.add_distilled(self._evaluate_batch(model, self.data_collator.collate(resolution.features)))
        return evaluated

    def _distilled_queries(self, inputs: dict[str, Any], outputs: Sequence[CoSupOutput]) -> list[DistilledQuery]:
        """Return the distilled queries of a batch, whose scores are compared at the end of the set."""
        if not inputs["facts"].distilled_instance_ids:
            return []
        query_embeds = concatenated([output.query_embeds for output in outputs])
        passage_embeds = concatenated([output.passage_embeds for output in outputs])
        assert query_embeds is not None and passage_embeds is not None  # there is a query, and it has candidates
        batch = distilled_batch(inputs, query_embeds, passage_embeds)
        counts = (batch.candidate_rows >= 0).sum(1).tolist()
        scores = zip(student_scores(batch, self.cosup_config).tolist(), batch.candidate_scores.tolist(), strict=True)
        queries = []
        for id, count, (of_student, of_reader) in zip(
            inputs["facts"].distilled_instance_ids, counts, scores, strict=True
        ):
            order = self._random_order(id, count) if self._corrects_places else list(range(count))
            queries.append(DistilledQuery(of_student[:count], of_reader[:count], order))
        return queries

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

        With `bf16_full_eval` or `fp16_full_eval`, `Trainer` converts the weights; afterwards they are restored. So is
        the random state: a loader draws a number, and the dropout of later training steps would depend on it.
        """
        self._evaluated_batches = []
        start = time.time()
        random_state = RandomState(self.args.device)
        with explained_memory_errors(self.args, evaluates=True), self._kept_weights(), self._without_inputs():
            output = super().evaluation_loop(dataloader, description, True, ignore_keys, metric_key_prefix)
        random_state.restore()
        batches: list[EvaluatedBatch] = []
        for batches_of_ranks in zip(*gather_objects(self._evaluated_batches, self._host_group), strict=True):
            batches += batches_of_ranks  # ranks take batches in turn, so this is the order of the set
        self._evaluated_batches = []
        metrics, prediction = self._measure(batches)
        self._running.leave_out(time.time() - start)
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
            losses, scores = self.embedding_losses(batch)
            assert batch.same_passage is not None
            are_negatives = ~batch.same_passage  # (C, D)
            are_negatives[torch.arange(len(scores)), batch.passage_labels] = False
            lone = ~are_negatives.any(1)  # (C,); without a negative there is no loss
            query_losses.append(losses["nsp_loss"].masked_fill(lone, float("nan")))
            return losses, scores

        retrieval, rows, labels = retrieval_metrics(
            query_embeds, passage_embeds, facts, losses_of, symmetric=self.args.symmetric_nsp
        )
        self._warn_of_lone_held_out_queries(len(labels), retrieval)
        metrics: dict[str, Any] = {}
        num_labels = sum(batch_facts.num_labels for batch_facts in facts)
        if num_labels:
            for batch in batches:
                for name, loss in batch.token_losses.items():
                    metrics[name] = metrics.get(name, 0.0) + loss / num_labels
        metrics |= retrieval
        for name, mean in _means([batch.values for batch in batches]).items():
            metrics.setdefault(name, mean)  # recall is that of queries with a passage, if there are any
        distilled = [query for batch in batches for query in batch.distilled]
        metrics |= distillation_metrics(distilled, self.args, self._corrects_places)
        if self.args.candidates_from is not None:
            metrics[LEFT_OUT] = self._num_dropped + sum(batch.num_left_out for batch in batches)
        elif self._num_dropped:
            metrics[LEFT_OUT] = self._num_dropped
        num_nsp = sum(batch.num_nsp for batch in batches)
        if num_nsp:
            metrics["nsp_predicted"] = sum(batch.num_predicted for batch in batches) / num_nsp
        losses: dict[str, float] = {name: metrics[name] for name in self.loss_weights if name in metrics}
        if losses:  # a sum of no losses is not 0
            metrics["loss"] = total_loss(losses, self.loss_weights)

        order = order_of_queries(facts)
        asked: dict[str, Any] = {}
        if "inputs" in self.args.include_for_metrics:
            query_ids = [ids for batch in batches for ids in batch.query_ids]
            passage_ids = [ids for batch in batches for ids in batch.passage_ids]
            asked["inputs"] = (padded([query_ids[i] for i in order]), padded([passage_ids[row] for row in rows]))
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


def _means(values: Sequence[dict[str, list[float]]]) -> dict[str, float]:
    """Return the mean of each figure over all batches; a figure of which nothing was measured is left out."""
    numbers: dict[str, list[float]] = {}
    for values_of_batch in values:
        for name, numbers_of_batch in values_of_batch.items():
            numbers.setdefault(name, []).extend(numbers_of_batch)
    return {name: sum(measured) / len(measured) for name, measured in numbers.items() if measured}
