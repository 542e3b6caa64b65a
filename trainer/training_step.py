"""
One training step, from top to bottom.

`Trainer` asks for the batches of an optimiser step. The ranks tell each other what their batches hold
(`get_batch_samples`), so that each knows the global counts by which losses are divided, and which passages are the
same. Then, for each batch, forward and backward (`training_step`): either at once (`compute_loss`), or, with
`nsp_batch_size`, in the two passes of GradCache. Both get their losses, by name, from `compute_losses`.
"""

import contextlib
import functools
from collections import defaultdict

import datasets
import torch
from accelerate.utils import DistributedType
from accelerate.utils.memory import clear_device_cache
from transformers.modeling_outputs import ModelOutput

from .batching import forward_arguments
from .distributed import gather_objects
from .duplicates import global_batch
from .grad_cache import concatenated, first_pass, like_pieces, second_pass
from .losses import (
    embedding_batch,
    embedding_losses,
    finite_queries,
    forward_options,
    loss_weights,
    token_losses,
    total_loss,
)


class TrainingStepMixin:
    """The part of [`CoSupTrainer`] that takes a step."""

    # ------------------------------------------------------------------ what all ranks know of a step

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """The batches of an optimiser step, with what all ranks know of them, and how many tokens they train."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        if not isinstance(self.train_dataset, datasets.Dataset):
            # a stream's end is not known before, and not the same on all ranks
            count = min(gather_objects(len(batches), self._host_group))
            batches = batches if count == num_batches else []  # Trainer takes no step with fewer
        if not batches:
            return batches, None
        num_items_in_batch = self._share_facts(batches)
        self._step_instance_ids = [id for batch in batches for ids in batch["facts"].instance_ids for id in ids]
        self._running.add_step()
        return batches, num_items_in_batch

    def _share_facts(self, batches):
        """
        Tell each other, from the host, what the batches hold; then all ranks have equally many micro-batches, each
        with every part of the model.

        Adds to each batch `global`, the [`GlobalBatch`], and `num_queries`, of all batches and ranks.

        Returns:
            `int`: trained tokens of all batches and ranks, at least 1.
        """
        facts = gather_objects([batch["facts"] for batch in batches], self._host_group)  # of each rank, of each batch
        everything = [batch_facts for rank_facts in facts for batch_facts in rank_facts]
        num_queries = sum(len(batch_facts.passage_labels) for batch_facts in everything)
        for i, batch in enumerate(batches):
            ranks, rank = [rank_facts[i] for rank_facts in facts], self.args.process_index
            if self.args.gather == "local":
                batch["global"] = global_batch([ranks[rank]], 0, self.args.mask_duplicates)
            else:
                batch["global"] = global_batch(ranks, rank, self.args.mask_duplicates)
            batch["num_queries"] = num_queries
            if len(ranks) > 1:
                self._complete(batch, max(len(batch_facts.instance_ids) for batch_facts in ranks))
        return max(1, sum(batch_facts.num_labels for batch_facts in everything))

    def _complete(self, batch, count):
        """
        Pad the batch to `count` micro-batches that touch every part of the model, so that all ranks make the same
        calls.
        """
        micro_batches, device = batch["micro_batches"], batch["passage_labels"].device
        micro_batches += [{} for _ in range(count - len(micro_batches))]
        for micro_batch in micro_batches:
            self.data_collator.complete(micro_batch, device)

    # ------------------------------------------------------------------ loss

    def training_step(self, model, inputs, num_items_in_batch=None):
        """`Trainer.training_step`; with `nsp_batch_size`, in two passes (see `grad_cache`)."""
        if self.args.nsp_batch_size is None:
            return super().training_step(model, inputs, num_items_in_batch)
        loss = self._cached_training_step(model, inputs, num_items_in_batch)
        empty_cache_steps = self.args.torch_empty_cache_steps
        if empty_cache_steps is not None and self.state.global_step % empty_cache_steps == 0:
            clear_device_cache()
        return loss

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """
        The weighted sum of the losses (Eq. 5) of this rank's batch, scaled so that the mean over ranks and sum over
        batches is the global loss.

        Args:
            model: the (wrapped) model.
            inputs (`dict`): a batch of [`CoSupDataCollator`].
            return_outputs (`bool`): also return the loss before scaling, its components by name, `query_embeds` and
                `passage_embeds`.
            num_items_in_batch (`int`, *optional*): trained tokens of the accumulated batch, over all ranks; without
                it, of this batch.

        Returns:
            `torch.FloatTensor` scalar, or `(loss, ModelOutput)`.
        """
        if num_items_in_batch is None or "global" not in inputs:
            num_items_in_batch = self._share_facts([inputs])
        outputs = [self._forward(model, micro_batch) for micro_batch in inputs["micro_batches"]]
        query_embeds = concatenated([output.query_embeds for output in outputs])
        passage_embeds = concatenated([output.passage_embeds for output in outputs])
        losses = self.compute_losses(inputs, outputs, num_items_in_batch, query_embeds, passage_embeds)
        loss = total_loss(losses, self.loss_weights)
        if self.model.training:
            self._running.add_batch(inputs["facts"])
            self._running.add_losses(losses)
        if not return_outputs:
            return loss * self._loss_scale
        output = ModelOutput(loss=loss, **losses, query_embeds=query_embeds, passage_embeds=passage_embeds)
        return loss * self._loss_scale, output

    def compute_losses(
        self, inputs, outputs=(), num_items_in_batch=1, query_embeds=None, passage_embeds=None, first=0
    ):
        """
        This rank's share of each loss of a batch, by name: of the whole batch, or, as GradCache goes, of its
        embeddings or of one micro-batch.

        Args:
            inputs (`dict`): the batch.
            outputs (`list[CoSupOutput]`): of micro-batches, for the token losses.
            num_items_in_batch (`int`): trained tokens of all ranks, by which token losses are divided.
            query_embeds (`torch.FloatTensor` of shape `(N, h)`, *optional*), passage_embeds (`torch.FloatTensor` of
                shape `(M, h)`, *optional*): of all micro-batches, for the embedding losses.
            first (`int`): the number of the micro-batch that `outputs` begin with.

        Returns:
            `dict[str, torch.FloatTensor]`: scalars. Their sum over batches and ranks is the loss that is logged.

        Raises:
            `FloatingPointError`: while training, where one is NaN or infinite.
        """
        losses = self._token_losses(inputs["facts"], outputs, num_items_in_batch, first)
        if query_embeds is not None:
            losses |= self._embedding_losses(inputs, query_embeds, passage_embeds)
        return losses

    def _token_losses(self, facts, outputs, num_items_in_batch, first):
        """The sum of each token loss over micro-batches, divided by the number of trained tokens of all ranks."""
        values, ids = defaultdict(list), defaultdict(list)
        # an empty micro-batch, added to match other ranks, has none
        instance_ids = dict(enumerate(facts.instance_ids))
        for i, output in enumerate(outputs, first):
            for name, loss in token_losses(output, self.cosup_config, self.args).items():
                values[name].append(loss)
                ids[name].append(instance_ids.get(i, []))
        losses = {}
        for name, of_micro_batches in values.items():
            stacked = torch.stack(of_micro_batches)
            losses[name] = stacked.sum() / num_items_in_batch
            if self.model.training:
                self._finite.add(self.state.global_step, name, stacked.detach().isfinite(), ids[name])
        return losses

    def _embedding_losses(self, inputs, query_embeds, passage_embeds):
        """The sum of each embedding loss over this rank's queries, divided by the number of queries of all ranks."""
        labels, gather = inputs["passage_labels"], self.args.gather
        batch = embedding_batch(query_embeds, passage_embeds, labels, inputs["global"], gather)
        values, scores = embedding_losses(batch, self.cosup_config, self.args)
        losses = {}
        for name, of_queries in values.items():
            losses[name] = of_queries.sum() / max(1, inputs["num_queries"])  # 0 without queries, but with a graph
            if self.model.training:
                ids = [[id] for id in inputs["facts"].query_instance_ids]
                self._finite.add(self.state.global_step, name, finite_queries(of_queries, batch), ids)
        if self.model.training:
            self._running.add_scores(scores, batch.passage_labels)
        return losses

    def _forward(self, model, micro_batch):
        """The `CoSupOutput` of a micro-batch: NTP loss, a sum, and embeddings."""
        arguments = forward_arguments(micro_batch) | forward_options(micro_batch, self.args)
        return model(**arguments, num_items_in_batch=1, use_cache=False)

    @property
    def loss_weights(self):
        """The weight of each loss that is trained, by name."""
        return loss_weights(self.cosup_config, self.args)

    @property
    def _loss_scale(self):
        """Losses are divided by global counts, and data parallelism averages gradients over ranks."""
        return self.accelerator.num_processes

    # ------------------------------------------------------------------ GradCache

    def _cached_training_step(self, model, inputs, num_items_in_batch):
        """The gradients of [`~CoSupTrainer.compute_loss`] in the memory of one micro-batch; see `grad_cache`."""
        model.train()
        if callable(getattr(self.optimizer, "train", None)):  # schedule-free ones
            self.optimizer.train()
        inputs = self._prepare_inputs(inputs)
        micro_batches = inputs["micro_batches"]
        losses, states = {}, None
        query_gradients = passage_gradients = [None] * len(micro_batches)
        if self.args.supervision != "ntp":
            losses, query_gradients, passage_gradients, states = self._embedding_gradients(model, inputs)
        forward = functools.partial(self._forward, model)
        passes = second_pass(forward, micro_batches, query_gradients, passage_gradients, states, self.args.device)
        for i in range(len(micro_batches)):
            last = i == len(micro_batches) - 1
            with contextlib.nullcontext() if last else self._without_gradient_exchange(model):
                with self.compute_loss_context_manager():
                    output, inner_product = next(passes)
                    shares = self.compute_losses(inputs, [output], num_items_in_batch, first=i)
                loss = total_loss(shares, self.loss_weights) + inner_product
                if loss.requires_grad:
                    self.accelerator.backward(loss * self._loss_scale)
            for name, share in shares.items():
                losses[name] = losses.get(name, 0.0) + share.detach()
        next(passes, None)  # restores the random state
        self._running.add_batch(inputs["facts"])
        self._running.add_losses(losses)
        return total_loss(losses, self.loss_weights) * self._loss_scale

    def _embedding_gradients(self, model, inputs):
        """The embedding losses, their gradients for queries and passages of each micro-batch, and random states."""
        with self.compute_loss_context_manager():
            *pieces, states = first_pass(model, inputs["micro_batches"])
            embeds = [concatenated(part).requires_grad_() for part in pieces]
            losses = self.compute_losses(inputs, query_embeds=embeds[0], passage_embeds=embeds[1])
            gradients = torch.autograd.grad(total_loss(losses, self.loss_weights), embeds)
        query_gradients, passage_gradients = map(like_pieces, gradients, pieces)
        return {name: loss.detach() for name, loss in losses.items()}, query_gradients, passage_gradients, states

    def _without_gradient_exchange(self, model):
        """
        DDP exchanges gradients once, after the last micro-batch; FSDP after each, or every rank would hold the
        gradients of the whole model.
        """
        sharded = self.accelerator.distributed_type == DistributedType.FSDP
        return contextlib.nullcontext() if sharded else self.accelerator.no_sync(model)
