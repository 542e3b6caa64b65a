"""CoSupTrainer: the Trainer whose loss is L = L_NTP + λ·L_NSP over the global batch."""

import contextlib
import dataclasses
import functools
from collections import defaultdict
from pathlib import Path

import datasets
import torch
from accelerate.utils import DistributedType, DynamoBackend
from accelerate.utils.memory import clear_device_cache
from torch.distributed.tensor import DTensor
from transformers import Trainer
from transformers.modeling_outputs import ModelOutput
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from modeling_cosup import CoSupForCausalLM

from .batching import forward_arguments
from .dataset_setup import COLUMNS, OPTIONAL_COLUMNS, no_duplicates_sampler, tokenize_dataset
from .distributed import gather_objects, host_group, world_size
from .duplicates import global_batch
from .grad_cache import concatenated, first_pass, like_pieces, second_pass
from .held_out import HeldOutMixin
from .hub import HubMixin
from .losses import (
    RunningFigures,
    embedding_batch,
    embedding_losses,
    finite_queries,
    loss_weights,
    token_losses,
    total_loss,
)
from .model_setup import (
    check_control_tokens,
    check_supervision,
    default_collator,
    freeze,
    keep_master_weights,
    speed_up,
    without_peft,
    wrap_in_peft,
)
from .training_args import CoSupTrainingArguments
from .watch import FiniteLosses, explained_memory_errors, last_complete_checkpoint


class CoSupTrainer(HubMixin, HeldOutMixin, Trainer):  # type: ignore[misc]  # its card takes other arguments
    """
    Trains a [`CoSupForCausalLM`] by next token and next sequence prediction in the same step.

    NTP is summed over tokens and divided by the global count of trained tokens, NSP is summed over queries and divided by the global count of
    queries, over all ranks and accumulated batches; the negatives of a query are all passages of its batch, on all ranks. How a batch is cut into
    micro-batches (by length, against padding; with `nsp_batch_size`, against memory) changes neither. Weights that are trained are held in float32
    (adapters as PEFT holds them); `bf16=True` computes in bfloat16.

    Logs beside `loss`: `ntp_loss`, `nsp_loss`, `nsp_accuracy` (in-batch retrieval accuracy), `num_negatives` (mean per query), `tokens_per_second`
    (tokens of Gen and Emb_seq, without padding) and `padding` (its share of all tokens). `evaluate()` returns `eval_ntp_loss`; `eval_nsp_loss`,
    `eval_query_recall@1` and `eval_query_recall@5` over all distinct passages of the evaluation set, whatever the batches; and `eval_loss`, the weighted sum.

    Args:
        model (`CoSupForCausalLM` or `str`): a model or the name or path of one.
        args ([`CoSupTrainingArguments`], *optional*): defaults to an output folder `cosup`.
        data_collator (`Callable`, *optional*): defaults to [`CoSupDataCollator`].
        train_dataset, eval_dataset (`Dataset`, `IterableDataset`, `list[dict]`, *optional*): instances, or already tokenized ones (columns
            `input_ids`, `labels`, `passage_input_ids`). `eval_dataset` may be a dict of them.
        processing_class, emb_seq_processing_class (`PreTrainedTokenizerBase`, *optional*): default to the model's own.
        compute_metrics (`Callable`, *optional*): gets an `EvalPrediction` with `predictions=(query_embeds, passage_embeds)`, the distinct passages of the
            set, and `label_ids`, for each query the row of its passage.
        callbacks, optimizers: as in `Trainer`.
        peft_config (`PeftConfig`, *optional*): wraps the model; control-token rows of Gen's embeddings are trained too.

    Raises:
        `ValueError`: an invalid instance, naming its row, before training starts; arguments that do not fit the model.
        `FloatingPointError`: while training, a loss that is NaN or infinite, naming the step, the loss and the instances.
        `torch.OutOfMemoryError`: while training, naming the arguments that would lower it.
    """

    loss_is_scaled_for_ga = True  # over tokens and queries of the whole accumulated batch, not per micro-batch

    def __init__(
        self,
        model,
        args=None,
        data_collator=None,
        train_dataset=None,
        eval_dataset=None,
        processing_class=None,
        emb_seq_processing_class=None,
        compute_metrics=None,
        callbacks=None,
        optimizers=(None, None),
        peft_config=None,
        **kwargs,
    ):
        args = args if args is not None else CoSupTrainingArguments("cosup")
        model = CoSupForCausalLM.from_pretrained(model) if isinstance(model, str) else model
        base = without_peft(model)
        if base.config.model_type != "cosup" or base.emb_seq is None:
            raise ValueError("CoSupTrainer needs a CoSupForCausalLM with Emb_seq; this one is another model or was loaded with load_emb_seq=False.")
        if world_size() > 1 and not args.average_tokens_across_devices:
            raise ValueError("Losses are divided by global counts: leave average_tokens_across_devices=True.")
        if processing_class is not None:
            check_control_tokens(processing_class, base.config)
            base.tokenizer = processing_class
        if emb_seq_processing_class is not None:
            base.emb_seq_tokenizer = emb_seq_processing_class
        check_supervision(args, base.config)
        if peft_config is not None:
            model = wrap_in_peft(model, peft_config)
        freeze(base, args)
        if model is base:
            keep_master_weights(base, args)
        speed_up(base, args)
        self._check_hub_arguments(args, model)
        self.cosup_config = base.config
        self.tokenizers = base.tokenizer, base.emb_seq_tokenizer
        if data_collator is None:
            data_collator = default_collator(base, args, self.tokenizers)
        prepare = functools.partial(tokenize_dataset, tokenizers=self.tokenizers, config=base.config, args=args)
        if isinstance(eval_dataset, dict):
            eval_dataset = {name: prepare(dataset, name=f"evaluation set {name!r}") for name, dataset in eval_dataset.items()}
        else:
            eval_dataset = prepare(eval_dataset, name="evaluation set")
        super().__init__(
            model=model,
            args=args,
            data_collator=data_collator,
            train_dataset=prepare(train_dataset, name="training set"),
            eval_dataset=eval_dataset,
            processing_class=self.tokenizers[0],
            compute_metrics=compute_metrics,
            callbacks=callbacks,
            optimizers=optimizers,
            **kwargs,
        )
        for name in ("nsp_batch_size", "clip_gen_only"):
            if getattr(args, name) and self._shards_in_its_own_way():
                raise ValueError(f"{name} works under DDP and FSDP2, not under {self.accelerator.distributed_type.value} as it is configured.")
        if args.torch_compile:  # the layers are compiled already; the rest depends on the data
            self.accelerator.state.dynamo_plugin.backend = DynamoBackend.NO
        plugin = self._fsdp2_plugin()
        if plugin is not None and plugin.mixed_precision_policy is not None:  # losses, embeddings and gradients of ranks in float32
            policy = plugin.mixed_precision_policy
            plugin.mixed_precision_policy = dataclasses.replace(policy, reduce_dtype=torch.float32, output_dtype=None)
        self._host_group = host_group(args.ddp_timeout_delta)
        self._finite = FiniteLosses()
        self._running = RunningFigures(self.loss_weights)
        self._eval_batches, self._step_instance_ids = [], []
        self._num_parameters = None

    def _shards_in_its_own_way(self):
        """DeepSpeed takes one backward a step and clips by itself; FSDP1 has norms of shards."""
        kind = self.accelerator.distributed_type
        return kind == DistributedType.DEEPSPEED or (kind == DistributedType.FSDP and self._fsdp2_plugin() is None)

    def _fsdp2_plugin(self):
        plugin = getattr(self.accelerator.state, "fsdp_plugin", None)
        return plugin if getattr(plugin, "fsdp_version", 1) == 2 else None

    # ------------------------------------------------------------------ data

    def _set_signature_columns_if_needed(self):
        self._signature_columns = COLUMNS + OPTIONAL_COLUMNS

    def _get_train_sampler(self, train_dataset=None):
        """With `batch_sampler="no_duplicates"`, batches over all ranks that name no passage twice."""
        dataset = self.train_dataset if train_dataset is None else train_dataset
        if self.args.batch_sampler != "no_duplicates":
            return super()._get_train_sampler(train_dataset)
        self._sampler = no_duplicates_sampler(dataset, self.args, self.args.train_batch_size * world_size())
        return self._sampler

    def get_train_dataloader(self):
        """`Trainer`'s; the sampler hears of the epoch also where a resumed run skips batches."""
        loader = super().get_train_dataloader()
        if self.args.batch_sampler == "no_duplicates":
            loader.set_sampler(self._sampler)
        return loader

    def train(self, resume_from_checkpoint=None, *args, **kwargs):
        """`Trainer.train`; `resume_from_checkpoint=True` takes the last checkpoint that was written to its end."""
        self._running.restart()
        if resume_from_checkpoint is True:
            resume_from_checkpoint = last_complete_checkpoint(self.args.output_dir)
        vars(self.model).pop("_is_accelerate_prepared", None)  # an evaluation before has prepared it, but not for data parallelism
        with explained_memory_errors(self.args):
            output = super().train(resume_from_checkpoint, *args, **kwargs)
        self._finite.check()
        return output

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """The batches of an optimiser step, with what all ranks know of them, and the number of tokens that they train."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        if not isinstance(self.train_dataset, datasets.Dataset):  # a stream's end: not known before, and not the same on all ranks
            batches = batches[: min(gather_objects(len(batches), self._host_group))]
            batches = batches if len(batches) == num_batches else []  # Trainer takes no step with fewer
        if not batches:
            return batches, None
        num_items_in_batch = self._share_facts(batches)
        self._step_instance_ids = [id for batch in batches for ids in batch["facts"].instance_ids for id in ids]
        self._running.add_step()
        return batches, num_items_in_batch

    def _share_facts(self, batches):
        """
        Tell each other, from the host, what the batches hold; then all ranks have equally many micro-batches, each with every part of the model.

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
        """Fill a batch up to `count` micro-batches, each with every part of the model: ranks must make the same calls."""
        micro_batches, device = batch["micro_batches"], batch["passage_labels"].device
        micro_batches += [{} for _ in range(count - len(micro_batches))]
        for micro_batch in micro_batches:
            self.data_collator.complete(micro_batch, device)

    def floating_point_ops(self, inputs):
        """6 operations a token and parameter that reads it, embeddings apart."""
        facts, base = inputs["facts"], without_peft(self.model)
        if self._num_parameters is None:
            parts = [base.gen, base.emb_seq if self.args.supervision != "ntp" else None]
            self._num_parameters = [0 if part is None else part.num_parameters(exclude_embeddings=True) for part in parts]
        gen, emb_seq = self._num_parameters
        return 6 * (facts.num_gen_tokens * gen + (facts.num_tokens - facts.num_gen_tokens) * emb_seq)

    # ------------------------------------------------------------------ loss

    def training_step(self, model, inputs, num_items_in_batch=None):
        """`Trainer.training_step`; with `nsp_batch_size`, in two passes (see `grad_cache`)."""
        if self.args.nsp_batch_size is None:
            return super().training_step(model, inputs, num_items_in_batch)
        loss = self._cached_training_step(model, inputs, num_items_in_batch)
        if self.args.torch_empty_cache_steps is not None and self.state.global_step % self.args.torch_empty_cache_steps == 0:
            clear_device_cache()
        return loss

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """
        The weighted sum of the losses (Eq. 5) of this rank's batch, scaled so that the mean over ranks and sum over batches is the global loss.

        Args:
            model: the (wrapped) model.
            inputs (`dict`): a batch of [`CoSupDataCollator`].
            return_outputs (`bool`): also return the loss before scaling, its components by name, `query_embeds` and `passage_embeds`.
            num_items_in_batch (`int`, *optional*): trained tokens of the accumulated batch, over all ranks; without it, of this batch.

        Returns:
            `torch.FloatTensor` scalar, or `(loss, ModelOutput)`.
        """
        if num_items_in_batch is None or "global" not in inputs:
            num_items_in_batch = self._share_facts([inputs])
        outputs = [self._forward(model, micro_batch, num_items_in_batch) for micro_batch in inputs["micro_batches"]]
        embeds = [concatenated([getattr(output, name) for output in outputs]) for name in ("query_embeds", "passage_embeds")]
        losses = self.compute_losses(inputs, outputs, *embeds)
        loss = total_loss(losses, self.loss_weights)
        if model.training:
            self._running.add_batch(inputs["facts"])
            self._running.add_losses(losses)
        if not return_outputs:
            return loss * self._loss_scale
        output = ModelOutput(loss=loss, **losses, query_embeds=embeds[0], passage_embeds=embeds[1])
        return loss * self._loss_scale, output

    def compute_losses(self, inputs, outputs=(), query_embeds=None, passage_embeds=None, first=0):
        """
        This rank's share of each loss of a batch, by name: of the whole batch, or, as GradCache goes, of its embeddings or of one micro-batch.

        Args:
            inputs (`dict`): the batch.
            outputs (`list[CoSupOutput]`): of micro-batches, for the token losses.
            query_embeds (`torch.FloatTensor` of shape `(N, h)`, *optional*), passage_embeds (`torch.FloatTensor` of shape `(M, h)`, *optional*): of
                all micro-batches, for the embedding losses.
            first (`int`): the number of the micro-batch that `outputs` begin with.

        Returns:
            `dict[str, torch.FloatTensor]`: scalars. Their sum over batches and ranks is the loss that is logged.

        Raises:
            `FloatingPointError`: while training, where one is NaN or infinite.
        """
        losses = self._token_losses(inputs["facts"], outputs, first)
        if query_embeds is not None:
            losses |= self._embedding_losses(inputs, query_embeds, passage_embeds)
        return losses

    def _token_losses(self, facts, outputs, first):
        """The sum of each token loss over micro-batches."""
        values, ids = defaultdict(list), defaultdict(list)
        for i, output in enumerate(outputs, first):
            for name, loss in token_losses(output, self.cosup_config, self.args).items():
                values[name].append(loss)
                ids[name].append(facts.instance_ids[i] if i < len(facts.instance_ids) else [])  # else filled up for other ranks
        losses = {}
        for name, of_micro_batches in values.items():
            stacked = torch.stack(of_micro_batches)
            losses[name] = stacked.sum()
            if self.model.training:
                self._finite.add(self.state.global_step, name, stacked.detach().isfinite(), ids[name])
        return losses

    def _embedding_losses(self, inputs, query_embeds, passage_embeds):
        """The sum of each embedding loss over this rank's queries, against the passages of all ranks, divided by the queries of all ranks."""
        labels, gather = inputs["passage_labels"], self.args.gather
        batch = embedding_batch(query_embeds, passage_embeds, labels, inputs["global"], gather)
        values, scores = embedding_losses(batch, self.cosup_config, self.args)
        losses = {}
        for name, of_queries in values.items():
            losses[name] = of_queries.sum() / max(1, inputs["num_queries"])  # 0 without queries, but parameters keep a gradient
            if self.model.training:
                ids = [[id] for id in inputs["facts"].query_instance_ids]
                self._finite.add(self.state.global_step, name, finite_queries(of_queries, batch), ids)
        if self.model.training:
            self._running.add_scores(scores, batch.passage_labels)
        return losses

    def _forward(self, model, micro_batch, num_items_in_batch):
        """Gen's token loss and the embeddings of a micro-batch, `CoSupOutput`; losses over embeddings need those of the whole batch."""
        return model(
            **forward_arguments(micro_batch),
            num_items_in_batch=num_items_in_batch,
            output_query_embeds=self.args.supervision in ("co", "nsp"),
            use_cache=False,
            compute_nsp_loss=False,
            return_logits=False,
        )

    @property
    def loss_weights(self):
        """The weight of each loss that is trained, by name."""
        return loss_weights(self.cosup_config, self.args)

    @property
    def _loss_scale(self):
        return self.accelerator.num_processes  # losses are divided by global counts, and data parallelism averages gradients over ranks

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
        forward = functools.partial(self._forward, model, num_items_in_batch=num_items_in_batch)
        passes = second_pass(forward, micro_batches, query_gradients, passage_gradients, states, self.args.device)
        for i in range(len(micro_batches)):
            last = i == len(micro_batches) - 1
            with contextlib.nullcontext() if last else self._without_gradient_exchange(model):
                with self.compute_loss_context_manager():
                    output, inner_product = next(passes)
                    shares = self.compute_losses(inputs, [output], first=i)
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
        """The embedding losses of a batch, their gradients for the embeddings of each micro-batch, and the random states of the first pass."""
        with self.compute_loss_context_manager():
            *pieces, states = first_pass(model, inputs["micro_batches"])
            embeds = [concatenated(part).requires_grad_() for part in pieces]
            losses = self.compute_losses(inputs, (), *embeds)
            gradients = torch.autograd.grad(total_loss(losses, self.loss_weights), embeds)
        query_gradients, passage_gradients = map(like_pieces, gradients, pieces)
        return {name: loss.detach() for name, loss in losses.items()}, query_gradients, passage_gradients, states

    def _without_gradient_exchange(self, model):
        """DDP exchanges gradients once, after the last micro-batch; FSDP after each, or every rank would hold the gradients of the whole model."""
        sharded = self.accelerator.distributed_type == DistributedType.FSDP
        return contextlib.nullcontext() if sharded else self.accelerator.no_sync(model)

    # ------------------------------------------------------------------ the log

    def log(self, logs, start_time=None):
        """Add the losses by name, and what else the steps since the last log say, to what `Trainer` logs."""
        if "loss" in logs and self._running.steps:
            self._finite.check()
            logs |= self._running.averages(self.args.device, self._sum_over_ranks)
            self._running.restart()
        super().log(logs, start_time)

    def _sum_over_ranks(self, tensor):
        return self.accelerator.reduce(tensor, "sum") if world_size() > 1 else tensor

    # ------------------------------------------------------------------ the paper's optimiser

    def create_scheduler(self, num_training_steps, optimizer=None):
        """With `lr_decay_per_epoch`: a constant learning rate, multiplied by it after every epoch (section 4: 0.85)."""
        decay = self.args.lr_decay_per_epoch
        if decay is None or self.lr_scheduler is not None:
            return super().create_scheduler(num_training_steps, optimizer)
        steps_per_epoch = max(1, round(num_training_steps / self.args.num_train_epochs))
        if self.args.max_steps > 0:
            if isinstance(self.train_dataset, torch.utils.data.IterableDataset):
                raise ValueError("lr_decay_per_epoch needs to know how long an epoch is; a streamed dataset does not say.")
            batches = len(self.get_train_dataloader())
            steps_per_epoch = max(1, -(-batches // self.args.gradient_accumulation_steps))
        optimizer = self.optimizer if optimizer is None else optimizer
        self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: decay ** (step // steps_per_epoch))
        self._created_lr_scheduler = True
        return self.lr_scheduler

    def _clip_grad_norm(self, model):
        if not self.args.clip_gen_only:
            return super()._clip_grad_norm(model)
        gen = without_peft(self.accelerator.unwrap_model(model)).gen
        return self.accelerator.clip_grad_norm_(gen.parameters(), self.args.max_grad_norm)

    def _get_grad_norm(self, model, grad_norm=None):
        grad_norm = super()._get_grad_norm(model, grad_norm)
        if isinstance(grad_norm, torch.Tensor) and not self.args.fp16:  # the norm over all ranks; float16 skips such steps by itself
            norm = grad_norm.full_tensor() if isinstance(grad_norm, DTensor) else grad_norm
            self._finite.add(self.state.global_step, "gradient", norm.detach().isfinite()[None], [self._step_instance_ids])
        return grad_norm

    # ------------------------------------------------------------------ checkpoints

    def _save_checkpoint(self, model, trial):
        self._finite.check()  # a ruined model is not saved
        if self.args.should_save:  # an older run's checkpoint of the same step is complete no longer
            folder = Path(self._get_output_dir(trial=trial), f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}")
            (folder / TRAINER_STATE_NAME).unlink(missing_ok=True)
        super()._save_checkpoint(model, trial)

    def _save_rng_state(self, output_dir):
        super()._save_rng_state(output_dir)
        self.accelerator.wait_for_everyone()  # the state file, written next and last, says that all ranks are done

    def _issue_warnings_after_load(self, load_result):
        """Tied weights are stored once: a head that the checkpoint lacks because it is the embedding is not missing."""
        tied = set(getattr(self.model, "all_tied_weights_keys", {}))
        if load_result.missing_keys and set(load_result.missing_keys) <= tied:
            self.model.tie_weights()
            load_result.missing_keys.clear()
        super()._issue_warnings_after_load(load_result)
