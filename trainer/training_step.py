"""
One training step, from top to bottom.

`Trainer` fetches the batches of an optimiser step (`get_batch_samples`). There instances whose passage is unknown get
candidates (see `distillation_step`). Then the ranks exchange what their batches hold, so that each knows the global
counts by which losses are divided, and which passages are the same. Then each batch runs forward and backward
(`training_step`): in one pass (`compute_loss`), or, with `nsp_batch_size`, in the two passes of GradCache. Both get
their losses, by name, from `compute_losses`.
"""

import contextlib
import functools
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any

import datasets
import torch
import torch.distributed as dist
from accelerate.utils import DistributedType
from accelerate.utils.memory import clear_device_cache
from torch import nn
from transformers.modeling_outputs import ModelOutput
from transformers.utils import logging

from modeling_cosup import CoSupConfig, CoSupForCausalLM, CoSupOutput

from .batching import BatchFacts
from .candidate_watch import CandidateWatch
from .cpu_attention import cpu_attention
from .distillation_step import DistillationStepMixin, running_figures
from .distributed import gather_objects
from .duplicates import GlobalBatch, global_batch
from .grad_cache import OptionalTensors, RandomState, concatenated, first_pass, like_pieces, second_pass
from .isolation import isolated_forward
from .losses import (
    EmbeddingBatch,
    distillation_losses,
    distilled_batch,
    embedding_batch,
    embedding_losses,
    finite_queries,
    forward_options,
    loss_weights,
    token_losses,
    total_loss,
)
from .micro_batches import forward_arguments
from .model_setup import trains_retriever, without_peft
from .running import RunningFigures, seconds_of_checkpoint
from .training_args import CoSupTrainingArguments
from .watch import FiniteLosses, lone_queries

logger = logging.get_logger(__name__)


class TrainingStepMixin(DistillationStepMixin):
    """The part of [`CoSupTrainer`] that takes a step. Batches are what [`CoSupDataCollator`] returns."""

    args: CoSupTrainingArguments
    model: CoSupForCausalLM  # or the PeftModel that wraps it
    data_collator: Any
    cosup_config: CoSupConfig
    _host_group: dist.ProcessGroup | None
    _finite: FiniteLosses
    _running: RunningFigures
    _candidate_watch: CandidateWatch
    _step_instance_ids: list[str]
    _warned_of_lone_queries: bool
    _num_trained_instances: int
    _num_trained_queries: int
    _measured_weights: dict[str, float] | None = None  # while the gradient of one loss is measured

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: Any) -> Any:
        """Run `Trainer`'s method, then start the log: by now, a trial of a search has set its arguments."""
        self._candidate_watch = CandidateWatch(self.args, trains_retriever(without_peft(self.model)))
        prepared = super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)
        self._running = running_figures(self.loss_weights, self.args)  # its clock starts
        self._running.seconds_before = seconds_of_checkpoint(resume_from_checkpoint, self.state.log_history)
        return prepared

    # ------------------------------------------------------------------ what all ranks know of a step

    def get_batch_samples(
        self, epoch_iterator: Iterator, num_batches: int, device: torch.device
    ) -> tuple[list, torch.Tensor | int | None]:
        """
        Return the batches of an optimiser step, and their number of trained tokens over all ranks.

        Each batch has what [`~CoSupTrainer._share_facts`] adds.
        """
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        if not isinstance(self.train_dataset, datasets.Dataset):
            # the end of a stream is not known in advance, and not the same on all ranks
            count = min(gather_objects(len(batches), self._host_group))
            if count < num_batches:
                batches = []  # Trainer must not step with fewer batches
        if not batches:
            return batches, None
        batches = self._resolved_batches(batches)
        num_items_in_batch = self._share_facts(batches)
        self._warn_of_lone_queries(batches[0]["num_queries"], batches[0]["num_compared"])
        self._step_instance_ids = []
        for batch in batches:
            for instance_ids in batch["facts"].instance_ids:
                self._step_instance_ids += instance_ids
        self._num_trained_instances += len(self._step_instance_ids)
        self._num_trained_queries += batches[0]["num_queries"] + batches[0]["num_distilled"]
        self._running.add_step()
        return batches, num_items_in_batch

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> None:
        """Count nothing: a batch may not be collated yet, and [`~CoSupTrainer._share_facts`] counts for all ranks."""

    def _share_facts(self, batches: list[dict[str, Any]]) -> int:
        """
        Exchange what the batches hold between the hosts of all ranks.

        Adds to each batch `global`, the [`GlobalBatch`], and counts over all batches and ranks: `num_labels`,
        `num_queries` (queries with a passage), `num_compared` (queries with a passage and a negative),
        `num_reverse_compared` (with `symmetric_nsp`, queries whose passage is wrong for another query) and
        `num_distilled`. Afterwards all ranks have equally many micro-batches, each with an input for every part of the
        model.

        Returns:
            `int`: trained tokens of all batches and ranks, at least 1.
        """
        facts = gather_objects([batch["facts"] for batch in batches], self._host_group)  # by rank, then by batch
        all_facts = [batch_facts for rank_facts in facts for batch_facts in rank_facts]
        counts = {
            "num_labels": sum(batch_facts.num_labels for batch_facts in all_facts),
            "num_queries": sum(len(batch_facts.passage_labels) for batch_facts in all_facts),
            "num_distilled": sum(len(batch_facts.distilled_instance_ids) for batch_facts in all_facts),
            "num_compared": 0,
            "num_reverse_compared": 0,
        }
        rank = self.args.process_index
        for i, batch in enumerate(batches):
            facts_of_ranks = [rank_facts[i] for rank_facts in facts]
            if self.args.gather == "local":
                global_batches = [global_batch([facts], 0, self.args.mask_duplicates) for facts in facts_of_ranks]
                batch["global"] = global_batches[rank]
            else:
                batch["global"] = global_batch(facts_of_ranks, rank, self.args.mask_duplicates)
                global_batches = [batch["global"]]
            counts["num_compared"] += sum(facts.num_compared for facts in global_batches)
            if self.args.symmetric_nsp:
                counts["num_reverse_compared"] += sum(facts.num_reverse_compared for facts in global_batches)
            if len(facts_of_ranks) > 1:
                count = max(len(batch_facts.instance_ids) for batch_facts in facts_of_ranks)
                self._fill_up(batch, count)
        for batch in batches:
            batch |= counts
        return max(1, counts["num_labels"])

    def _warn_of_lone_queries(self, num_queries: int, num_compared: int) -> None:
        """Warn, once, of a step in which queries have no negative."""
        if num_compared == num_queries or self._warned_of_lone_queries or not self.is_world_process_zero():
            return
        self._warned_of_lone_queries = True
        is_local = self.args.gather == "local" and self.args.world_size > 1
        logger.warning(lone_queries(self.state.global_step + 1, num_queries - num_compared, num_queries, is_local))

    def _fill_up(self, batch: dict[str, Any], count: int) -> None:
        """
        Add micro-batches up to `count`, and let each of them reach every part of the model.

        All ranks must make the same calls.
        """
        micro_batches = batch["micro_batches"]
        device = batch["passage_labels"].device
        micro_batches += [{} for _ in range(count - len(micro_batches))]
        for micro_batch in micro_batches:
            self.data_collator.complete(micro_batch, device)

    # ------------------------------------------------------------------ loss

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: torch.Tensor | int | None = None
    ) -> torch.Tensor:
        """Run `Trainer.training_step` or, with `nsp_batch_size`, the two passes of GradCache (see `grad_cache`)."""
        with cpu_attention(self.args):
            if self.args.nsp_batch_size is None:
                return super().training_step(model, inputs, num_items_in_batch)
            assert num_items_in_batch is not None  # get_batch_samples counts them
            loss = self._cached_training_step(model, inputs, num_items_in_batch)
        empty_cache_steps = self.args.torch_empty_cache_steps
        if empty_cache_steps is not None and self.state.global_step % empty_cache_steps == 0:
            clear_device_cache()
        return loss

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, ModelOutput]:
        """
        Return the weighted sum of the losses (Eq. 5) of this rank's batch.

        It is scaled so that its mean over ranks, summed over batches, is the global loss.

        Args:
            model (`nn.Module`): the (wrapped) model.
            inputs (`dict`): a batch.
            return_outputs (`bool`, *optional*, defaults to `False`): also return the loss before scaling, its
                components by name, `query_embeds` and `passage_embeds`.
            num_items_in_batch (`int`, *optional*): trained tokens of the accumulated batch, over all ranks; by
                default, of this batch.

        Returns:
            `torch.FloatTensor` scalar, or `(loss, ModelOutput)`.
        """
        if num_items_in_batch is None or "global" not in inputs:
            num_items_in_batch = self._share_facts([inputs])
        outputs = [self._forward(model, micro_batch) for micro_batch in inputs["micro_batches"]]
        query_embeds = concatenated([output.query_embeds for output in outputs])  # (N, h)
        passage_embeds = concatenated([output.passage_embeds for output in outputs])  # (M_r, h)
        losses = self.compute_losses(inputs, outputs, num_items_in_batch, query_embeds, passage_embeds)
        loss = self._total_loss(losses)
        if self.model.training:
            self._running.add_batch(inputs["facts"])
        scaled_loss = loss * self._loss_scale
        if not return_outputs:
            return scaled_loss
        return scaled_loss, ModelOutput(loss=loss, **losses, query_embeds=query_embeds, passage_embeds=passage_embeds)

    def compute_losses(
        self,
        inputs: dict[str, Any],
        outputs: Sequence[CoSupOutput] = (),
        num_items_in_batch: torch.Tensor | int = 1,
        query_embeds: torch.Tensor | None = None,
        passage_embeds: torch.Tensor | None = None,
        first: int = 0,
    ) -> dict[str, torch.Tensor]:
        """
        Return this rank's share of each loss of a batch, by name.

        GradCache computes the losses of the embeddings and of each micro-batch in separate calls. Without it, one call
        computes all losses.

        Args:
            inputs (`dict`): the batch.
            outputs (`list[CoSupOutput]`, *optional*): of micro-batches, for the token losses.
            num_items_in_batch (`int`, *optional*, defaults to 1): trained tokens of all ranks, by which token losses
                are divided.
            query_embeds, passage_embeds (`torch.FloatTensor` of shapes `(N, h)` and `(M_r, h)`, *optional*): of all
                micro-batches, for the embedding losses.
            first (`int`, *optional*, defaults to 0): number of the first micro-batch of `outputs`.

        Returns:
            `dict[str, torch.FloatTensor]`: scalars. Their sum over batches and ranks is the loss that is logged.

        Raises:
            `FloatingPointError`: while training, if a loss is NaN or infinite.
        """
        losses = self._token_losses(inputs, outputs, num_items_in_batch, first)
        if query_embeds is not None:
            assert passage_embeds is not None  # the last micro-batch has them, if only with 0 rows
            losses |= self._embedding_losses(inputs, query_embeds[inputs["nsp_query_rows"]], passage_embeds)
            if self.args.distills:
                losses |= self._distillation_losses(inputs, query_embeds, passage_embeds)
        return losses

    def _token_losses(
        self,
        inputs: dict[str, Any],
        outputs: Sequence[CoSupOutput],
        num_items_in_batch: torch.Tensor | int,
        first: int,
    ) -> dict[str, torch.Tensor]:
        """Return each token loss, summed over micro-batches and divided by the trained tokens of all ranks."""
        facts: BatchFacts = inputs["facts"]
        micro_batch_losses = defaultdict(list)
        micro_batch_ids = defaultdict(list)
        for i, output in enumerate(outputs, first):
            # a micro-batch that was added to match other ranks has no instances
            instance_ids = facts.instance_ids[i] if i < len(facts.instance_ids) else []
            for name, loss in self.token_losses(output).items():
                micro_batch_losses[name].append(loss)
                micro_batch_ids[name].append(instance_ids)
        losses = {}
        for name, values in micro_batch_losses.items():
            stacked = torch.stack(values)
            losses[name] = stacked.sum() / num_items_in_batch
            if self.model.training:
                finite = stacked.detach().isfinite()
                self._finite.add(self.state.global_step, name, finite, micro_batch_ids[name])
        if self.model.training and inputs["num_labels"]:
            self._running.add_losses(losses)
        return losses

    def _embedding_losses(
        self, inputs: dict[str, Any], query_embeds: torch.Tensor, passage_embeds: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """
        Return each embedding loss, summed over this rank's queries and divided by the queries of all ranks.

        Queries without a negative are left out of both the sum and the count.
        """
        labels = inputs["passage_labels"]
        global_facts: GlobalBatch = inputs["global"]
        batch = embedding_batch(query_embeds, passage_embeds, labels, global_facts, self.args)
        query_losses, scores = self.embedding_losses(batch)
        losses = {}
        num_compared_of = {}  # by loss: the queries of all ranks that have a negative
        for name, values in query_losses.items():
            has_negatives = global_facts.has_negatives
            num_compared_of[name] = inputs["num_compared"]
            if name == "reverse_nsp_loss":
                has_negatives = global_facts.have_wrong_queries[global_facts.rank]
                num_compared_of[name] = inputs["num_reverse_compared"]
            compared_values = values
            if not has_negatives.all():
                compared_values = values.where(torch.from_numpy(has_negatives).to(values.device), 0.0)
            # without queries this is 0, but it still has a graph
            losses[name] = compared_values.sum() / max(1, num_compared_of[name])
            if self.model.training:
                instance_ids = [[id] for id in inputs["facts"].query_instance_ids]
                self._finite.add(self.state.global_step, name, finite_queries(values, batch), instance_ids)
        if self.model.training:
            self._running.add_scores(scores, batch.passage_labels)
            measured = {name: loss for name, loss in losses.items() if num_compared_of[name]}
            self._running.add_losses(measured)
        return losses

    def _distillation_losses(
        self, inputs: dict[str, Any], query_embeds: torch.Tensor, passage_embeds: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """Return the distillation loss, summed over this rank's queries and divided by the queries of all ranks."""
        batch = distilled_batch(inputs, query_embeds, passage_embeds)
        values, distributions = distillation_losses(batch, self.cosup_config, self.args)
        losses = {"distillation_loss": values.sum() / max(1, inputs["num_distilled"])}
        if self.model.training:
            instance_ids = [[id] for id in inputs["facts"].distilled_instance_ids]
            self._finite.add(self.state.global_step, "distillation_loss", values.detach().isfinite(), instance_ids)
            self._running.add_values(distributions.figures())
            if inputs["num_distilled"]:
                self._running.add_losses(losses)
        return losses

    def _forward(self, model: nn.Module, micro_batch: dict[str, Any], **options: Any) -> CoSupOutput:
        """Run the model on a micro-batch; return its NTP loss, summed over tokens, and its embeddings."""
        arguments = forward_arguments(micro_batch) | forward_options(micro_batch, self.args, model.training) | options
        arguments |= {"num_items_in_batch": 1, "use_cache": False}
        if self.args.isolate_queries and model.training and "nsp_positions" in arguments:
            return isolated_forward(model, without_peft(self.model), arguments)
        return model(**arguments)

    # ------------------------------------------------------------------ what is trained: a subclass may add to it

    @property
    def loss_weights(self) -> dict[str, float]:
        """The weight of each loss that is trained, by name; see [`~trainer.losses.loss_weights`]."""
        return loss_weights(self.cosup_config, self.args)

    def token_losses(self, output: CoSupOutput) -> dict[str, torch.Tensor]:
        """Return the sum of each token loss over a micro-batch; see [`~trainer.losses.token_losses`]."""
        return token_losses(output, self.cosup_config, self.args)

    def embedding_losses(self, batch: EmbeddingBatch) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        """Return each embedding loss `(N,)`, and scores `(N, M)`; see [`~trainer.losses.embedding_losses`]."""
        return embedding_losses(batch, self.cosup_config, self.args)

    def _total_loss(self, losses: dict[str, torch.Tensor]) -> torch.Tensor:
        """Return the weighted sum of losses that is minimised, or whose gradient is measured."""
        return total_loss(losses, self._measured_weights or self.loss_weights)

    @property
    def _loss_scale(self) -> int:
        """The number of ranks: losses are divided by global counts, but gradients are averaged over ranks."""
        return self.accelerator.num_processes

    # ------------------------------------------------------------------ GradCache

    def _cached_training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: torch.Tensor | int
    ) -> torch.Tensor:
        """Compute the loss and gradients of [`~CoSupTrainer.compute_loss`] in two passes; see `grad_cache`."""
        model.train()
        enter_training_mode = getattr(self.optimizer, "train", None)  # schedule-free optimisers have it
        if callable(enter_training_mode):
            enter_training_mode()
        inputs = self._prepare_inputs(inputs)
        micro_batches = inputs["micro_batches"]
        losses: dict[str, torch.Tensor] = {}
        query_gradients: OptionalTensors = [None] * len(micro_batches)
        passage_gradients: OptionalTensors = [None] * len(micro_batches)
        states = None
        if self.args.trains_embeddings:
            losses, query_gradients, passage_gradients, states = self._embedding_gradients(model, inputs)

        forward = functools.partial(self._forward, model)
        passes = second_pass(forward, micro_batches, query_gradients, passage_gradients, states, self.args.device)
        for i in range(len(micro_batches)):
            exchange_context: AbstractContextManager = contextlib.nullcontext()
            if i < len(micro_batches) - 1:
                exchange_context = self._without_gradient_exchange(model)
            with exchange_context:
                with self.compute_loss_context_manager():
                    output, inner_product = next(passes)  # runs the forward, under autocast
                    shares = self.compute_losses(inputs, [output], num_items_in_batch, first=i)
                loss = self._total_loss(shares) + inner_product
                if loss.requires_grad:
                    self.accelerator.backward(loss * self._loss_scale)
            for name, share in shares.items():
                losses[name] = losses.get(name, 0.0) + share.detach()
        next(passes, None)  # restores the random state

        self._running.add_batch(inputs["facts"])
        return self._total_loss(losses) * self._loss_scale

    def _embedding_gradients(
        self, model: nn.Module, inputs: dict[str, Any]
    ) -> tuple[dict[str, torch.Tensor], OptionalTensors, OptionalTensors, list[RandomState]]:
        """
        Run the first pass, and compute the gradient of every embedding.

        Returns:
            The embedding losses, their gradients for the queries and for the passages of each micro-batch, and the
            random states that [`first_pass`] returned.
        """
        with self.compute_loss_context_manager():
            query_pieces, passage_pieces, states = first_pass(model, inputs["micro_batches"])
            query_embeds = concatenated(query_pieces)
            passage_embeds = concatenated(passage_pieces)
            # the last micro-batch has both, if only with 0 rows
            assert query_embeds is not None and passage_embeds is not None
            embeds = [query_embeds.requires_grad_(), passage_embeds.requires_grad_()]
            losses = self.compute_losses(inputs, query_embeds=query_embeds, passage_embeds=passage_embeds)
            total = self._total_loss(losses)
            query_gradient, passage_gradient = torch.autograd.grad(total, embeds)
        query_gradients = like_pieces(query_gradient, query_pieces)
        passage_gradients = like_pieces(passage_gradient, passage_pieces)
        detached_losses = {name: loss.detach() for name, loss in losses.items()}
        return detached_losses, query_gradients, passage_gradients, states

    def _without_gradient_exchange(self, model: nn.Module) -> AbstractContextManager:
        """
        Return the context of every micro-batch but the last.

        Under DDP, ranks exchange gradients once, after the last micro-batch. Under FSDP, they exchange them after each
        micro-batch: otherwise every rank would hold the gradients of the whole model.
        """
        if self.accelerator.distributed_type == DistributedType.FSDP:
            return contextlib.nullcontext()
        return self.accelerator.no_sync(model)
