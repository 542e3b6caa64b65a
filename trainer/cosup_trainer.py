"""CoSupTrainer: the Trainer whose loss is L = L_NTP + λ·L_NSP over the global batch."""

import contextlib
import dataclasses
import functools
import time
from collections import defaultdict
from pathlib import Path

import datasets
import numpy as np
import torch
from accelerate.utils import DistributedType, DynamoBackend, gather_object
from accelerate.utils.memory import clear_device_cache
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader
from transformers import Trainer
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, EvalPrediction
from transformers.utils import logging

from modeling_cosup import CoSupForCausalLM, info_nce
from modeling_cosup.modeling_cosup import CoSupOutput
from modeling_cosup.tokenization_cosup import end_of_turn_token_id

from .batching import CoSupDataCollator
from .data import check_instance, tokenize_instance
from .distributed import gather_objects, gather_rows, host_group, world_size
from .duplicates import NoDuplicatesSampler, global_batch
from .grad_cache import first_pass, like_pieces, second_pass
from .held_out import retrieval_metrics
from .hub import HubMixin
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

logger = logging.get_logger(__name__)

COLUMNS = ["input_ids", "labels", "passage_input_ids"]
OPTIONAL_COLUMNS = ["id", "passage_ids", "positive_ids", "negative_input_ids", "negative_ids", "query_input_ids"]


class CoSupTrainer(HubMixin, Trainer):  # type: ignore[misc]  # its card takes other arguments
    """
    Trains a [`CoSupForCausalLM`] by next token and next sequence prediction in the same step.

    NTP is summed over tokens and divided by the global count of trained tokens, NSP is summed over queries and divided by the global count of
    queries, over all ranks and accumulated batches; the negatives of a query are all passages of its batch, on all ranks. How a batch is cut into
    micro-batches (by length, against padding; with `nsp_batch_size`, against memory) changes neither. Weights that are trained are held in float32
    (adapters as PEFT holds them); `bf16=True` computes in bfloat16.

    Logs beside `loss`: `ntp_loss`, `nsp_loss`, `nsp_accuracy` (in-batch retrieval accuracy), `num_negatives` (mean per query), `tokens_per_second`
    (tokens of Gen and Emb_seq, without padding) and `padding` (its share of all tokens). `evaluate()` returns `eval_ntp_loss`; `eval_nsp_loss`,
    `eval_recall@1` and `eval_recall@5` over all distinct passages of the evaluation set, whatever the batches; and `eval_loss`, the weighted sum.

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
        if isinstance(eval_dataset, dict):
            eval_dataset = {name: self._prepare_dataset(dataset, args, f"evaluation set {name!r}") for name, dataset in eval_dataset.items()}
        else:
            eval_dataset = self._prepare_dataset(eval_dataset, args, "evaluation set")
        super().__init__(
            model=model,
            args=args,
            data_collator=data_collator,
            train_dataset=self._prepare_dataset(train_dataset, args, "training set"),
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
        self._num_queries = None  # of the accumulated batch, over all ranks
        self._finite = FiniteLosses()
        self._sums, self._logged_at = defaultdict(float), time.time()
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

    def _prepare_dataset(self, dataset, args, name):
        """Instances to token ids; instances longer than `max_length` are dropped, with their number in a warning."""
        if dataset is None:
            return None
        checked = False
        if isinstance(dataset, torch.utils.data.IterableDataset) and not isinstance(dataset, datasets.IterableDataset):
            dataset = datasets.IterableDataset.from_generator(dataset.__iter__)
        elif isinstance(dataset, torch.utils.data.Dataset) and not isinstance(dataset, torch.utils.data.IterableDataset):
            dataset = list(dataset)
        if isinstance(dataset, list):
            if not dataset:
                raise ValueError(f"The {name} is empty.")
            if not set(COLUMNS) <= set(dataset[0]):  # before Arrow sees it: its errors name no row
                dataset = [check_instance(instance, f"{name}, row {row}") for row, instance in enumerate(dataset)]
                checked = True
            dataset = datasets.Dataset.from_list(dataset)
        columns = dataset.column_names or list(next(iter(dataset)))
        if set(COLUMNS) <= set(columns):
            return dataset
        tokenizer, emb_seq_tokenizer = self.tokenizers
        config, end_of_turn_id = self.cosup_config, end_of_turn_token_id(self.tokenizers[0])

        def tokenize(instance, row):
            instance = instance if checked else check_instance(instance, f"{name}, row {row}")
            tokenized = tokenize_instance(instance, tokenizer, emb_seq_tokenizer, config, args.train_on_passages, end_of_turn_id)
            return {"dataset": instance["dataset"], **tokenized}  # counted for the model card

        options = {"with_indices": True, "remove_columns": columns}
        if isinstance(dataset, datasets.IterableDataset):
            return dataset.map(tokenize, **options).filter(_ShorterThan(args.max_length, name))
        with args.main_process_first(desc=f"Tokenizing the {name}"):
            tokenized = dataset.map(tokenize, num_proc=args.dataset_num_proc, desc=f"Tokenizing the {name}", **options)
        short = [row for row, ids in enumerate(tokenized["input_ids"]) if len(ids) <= args.max_length]
        if not short:
            raise ValueError(f"All {len(tokenized)} instances of the {name} are longer than max_length={args.max_length} tokens.")
        if len(short) < len(tokenized):
            logger.warning(f"Dropped {len(tokenized) - len(short)} of {len(tokenized)} instances of the {name}: longer than max_length={args.max_length}.")
            tokenized = tokenized.select(short)
        return tokenized

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval"):
        """`Trainer.evaluate`; `eval_dataset` may hold instances or tokenized ones, as in the constructor."""
        if eval_dataset is not None and not isinstance(eval_dataset, str | dict):
            eval_dataset = self._prepare_dataset(eval_dataset, self.args, "evaluation set")
        return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)

    def _set_signature_columns_if_needed(self):
        self._signature_columns = COLUMNS + OPTIONAL_COLUMNS

    def _get_train_sampler(self, train_dataset=None):
        """With `batch_sampler="no_duplicates"`, batches over all ranks that name no passage twice."""
        dataset = self.train_dataset if train_dataset is None else train_dataset
        if self.args.batch_sampler != "no_duplicates":
            return super()._get_train_sampler(train_dataset)
        if not isinstance(dataset, datasets.Dataset):
            raise ValueError("batch_sampler='no_duplicates' chooses from the whole dataset; a streamed one cannot be chosen from.")
        columns = [name for name in ("passage_ids", "negative_ids", "passage_input_ids", "negative_input_ids") if name in dataset.column_names]
        passages = [{hash(id if isinstance(id, str) else tuple(id)) for name in columns for id in row[name]} for row in dataset.select_columns(columns)]
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        self._sampler = NoDuplicatesSampler(passages, self.args.train_batch_size * world_size(), seed)
        return self._sampler

    def get_train_dataloader(self):
        """`Trainer`'s; the sampler hears of the epoch also where a resumed run skips batches."""
        loader = super().get_train_dataloader()
        if self.args.batch_sampler == "no_duplicates":
            loader.set_sampler(self._sampler)
        return loader

    def train(self, resume_from_checkpoint=None, *args, **kwargs):
        """`Trainer.train`; `resume_from_checkpoint=True` takes the last checkpoint that was written to its end."""
        self._sums, self._logged_at = defaultdict(float), time.time()
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
        num_items_in_batch, self._num_queries = self._share_facts(batches)
        self._step_instance_ids = [id for batch in batches for ids in batch["facts"].instance_ids for id in ids]
        self._sums["steps"] += 1
        return batches, num_items_in_batch

    def _share_facts(self, batches):
        """
        Tell each other, from the host, what the batches hold; then all ranks have equally many micro-batches, each with every part of the model.

        Returns:
            `(int, int)`: trained tokens and queries over all ranks.
        """
        facts = gather_objects([batch["facts"] for batch in batches], self._host_group)
        rank, args = self.args.process_index, self.args
        for i, batch in enumerate(batches):
            ranks = [rank_facts[i] for rank_facts in facts]
            seen, own = ([ranks[rank]], 0) if args.gather == "local" else (ranks, rank)
            batch["global"] = global_batch(seen, own, args.mask_duplicates)
            if len(ranks) > 1:
                missing = max(len(each.instance_ids) for each in ranks) - len(batch["micro_batches"])
                batch["micro_batches"] += [{} for _ in range(missing)]
                batch["micro_batches"] = [self.data_collator.complete(micro_batch, batch["passage_labels"].device) for micro_batch in batch["micro_batches"]]
        everything = [each for rank_facts in facts for each in rank_facts]
        return max(1, sum(each.num_labels for each in everything)), sum(len(each.passage_labels) for each in everything)

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
        L = L_NTP + λ·L_NSP (Eq. 5) of this rank's batch, scaled so that the mean over ranks and sum over batches is the global loss.

        Args:
            model: the (wrapped) model.
            inputs (`dict`): a batch of [`CoSupDataCollator`].
            return_outputs (`bool`): also return the embeddings and losses, as a [`CoSupOutput`].
            num_items_in_batch (`int`, *optional*): trained tokens of the accumulated batch, over all ranks; without it, of this batch.

        Returns:
            `torch.FloatTensor` scalar, or `(loss, CoSupOutput)`.
        """
        num_queries = self._num_queries
        if num_items_in_batch is None or "global" not in inputs:
            num_items_in_batch, num_queries = self._share_facts([inputs])
        pieces = [self._forward(model, micro_batch, num_items_in_batch) for micro_batch in inputs["micro_batches"]]
        ntp_losses = torch.stack([piece.ntp_loss for piece in pieces if piece.ntp_loss is not None] or [torch.zeros((), device=self.args.device)])
        output = CoSupOutput(ntp_loss=ntp_losses.sum(), query_embeds=_cat(pieces, "query_embeds"), passage_embeds=_cat(pieces, "passage_embeds"))
        if model.training:
            self._finite.add(self.state.global_step, "NTP loss", ntp_losses.detach().isfinite(), inputs["facts"].instance_ids)
        output.nsp_loss = self._nsp_loss(output.query_embeds, output.passage_embeds, inputs, num_queries, model.training)
        output.loss = output.ntp_loss + self.cosup_config.nsp_loss_weight * output.nsp_loss
        if model.training:
            self._count(inputs["facts"], ntp_loss=output.ntp_loss, nsp_loss=output.nsp_loss)
        loss = output.loss * self._loss_scale
        return (loss, output) if return_outputs else loss

    def _cached_training_step(self, model, inputs, num_items_in_batch):
        """GradCache: the gradients of [`~CoSupTrainer.compute_loss`] in the memory of one micro-batch."""
        model.train()
        if callable(getattr(self.optimizer, "train", None)):  # schedule-free ones
            self.optimizer.train()
        inputs = self._prepare_inputs(inputs)
        micro_batches, scale = inputs["micro_batches"], self._loss_scale
        nsp_loss, gradients, states, ntp_losses = torch.zeros((), device=self.args.device), [[None] * len(micro_batches)] * 2, None, []
        if self.args.supervision != "ntp":
            with self.compute_loss_context_manager():
                *pieces, states = first_pass(model, micro_batches)
                embeds = [torch.cat([piece for piece in part if piece is not None]).requires_grad_() for part in pieces]
                nsp_loss = self._nsp_loss(*embeds, inputs, self._num_queries, True)
                gradients = torch.autograd.grad(self.cosup_config.nsp_loss_weight * nsp_loss, embeds)
                gradients = [like_pieces(gradient, part) for gradient, part in zip(gradients, pieces, strict=True)]
        forward = functools.partial(self._forward, model, num_items_in_batch=num_items_in_batch)
        passes = second_pass(forward, micro_batches, *gradients, states, self.args.device)
        for i in range(len(micro_batches)):
            last = i == len(micro_batches) - 1
            with contextlib.nullcontext() if last else self._without_gradient_exchange(model):
                with self.compute_loss_context_manager():
                    ntp_loss, loss = next(passes)
                ntp_losses.append(ntp_loss)
                self._finite.add(self.state.global_step, "NTP loss", ntp_loss[None].isfinite(), inputs["facts"].instance_ids[i : i + 1])
                if loss.requires_grad:
                    self.accelerator.backward(loss * scale)
        next(passes, None)  # restores the random state
        ntp_loss, nsp_loss = torch.stack(ntp_losses).sum(), nsp_loss.detach()
        self._count(inputs["facts"], ntp_loss=ntp_loss, nsp_loss=nsp_loss)
        return (ntp_loss + self.cosup_config.nsp_loss_weight * nsp_loss) * scale

    @property
    def _loss_scale(self):
        return self.accelerator.num_processes  # losses are divided by global counts, and data parallelism averages gradients over ranks

    def _without_gradient_exchange(self, model):
        """DDP exchanges gradients once, after the last micro-batch; FSDP after each, or every rank would hold the gradients of the whole model."""
        sharded = self.accelerator.distributed_type == DistributedType.FSDP
        return contextlib.nullcontext() if sharded else self.accelerator.no_sync(model)

    def _forward(self, model, micro_batch, num_items_in_batch):
        inputs = {name: tensor for name, tensor in micro_batch.items() if name != "first_pass"}
        inputs |= {"num_items_in_batch": num_items_in_batch, "output_query_embeds": self.args.supervision in ("co", "nsp")}
        return model(**inputs, use_cache=False, compute_nsp_loss=False, return_logits=False)

    def _nsp_loss(self, query_embeds, passage_embeds, inputs, num_queries, training):
        """This rank's share of L_NSP (Eq. 4) over the passages of all ranks; counts what the next log shows."""
        if query_embeds is None:
            return torch.zeros((), device=self.args.device)
        facts, batch, device = inputs["facts"], inputs["global"], query_embeds.device
        passage_embeds = gather_rows(passage_embeds, batch.passage_counts, self.args.gather)  # (M, h), this rank's from first_row on
        labels = inputs["passage_labels"] + batch.first_row  # (N,)
        same_passage = None
        if batch.repeated.any() or batch.no_negatives.size:
            arrays = [torch.from_numpy(array) for array in (batch.passage_groups, batch.repeated, batch.no_negatives)]
            pinned = arrays if device.type == "cpu" else [array.pin_memory() for array in arrays]
            groups, repeated, pairs = (array.to(device, non_blocking=True) for array in pinned)
            same_passage = (groups[labels][:, None] == groups) | repeated  # (N, M): of identical passages one is a negative, not each
            same_passage[pairs[0], pairs[1]] = True
        losses, scores = info_nce(query_embeds, passage_embeds, labels, same_passage, self.cosup_config.temperature, return_scores=True)
        if training:
            own = torch.stack([query_embeds.detach().isfinite().all(1), passage_embeds.detach()[labels].isfinite().all(1)]).all(0)
            finite = torch.where(own.all(), losses.detach().isfinite(), own)  # one NaN embedding is in every loss: name those it comes from
            self._finite.add(self.state.global_step, "NSP loss", finite, [[id] for id in facts.query_instance_ids])
        if training and scores.numel():
            scores = scores.detach()
            negatives = scores.scatter(1, labels[:, None], float("-inf"))
            self._sums["correct"] += (scores.gather(1, labels[:, None])[:, 0] > negatives.amax(1)).sum()  # a tie is a miss
            self._sums["negatives"] += (negatives > float("-inf")).sum()
        self._sums["queries"] += len(labels) * training
        return losses.sum() / max(1, num_queries)  # 0 without queries, but every parameter keeps a gradient

    def _count(self, facts, **losses):
        """Add a batch to what the next log shows; nothing waits for the device."""
        for name, loss in losses.items():
            self._sums[name] += loss.detach().float()
        self._sums["tokens"] += facts.num_tokens
        self._sums["padded_tokens"] += facts.num_padded_tokens

    def log(self, logs, start_time=None):
        """Add the components of the loss to what `Trainer` logs."""
        if "loss" in logs and self._sums:
            self._finite.check()
            keys = ("ntp_loss", "nsp_loss", "tokens", "padded_tokens", "correct", "negatives", "queries")
            totals = torch.stack([torch.as_tensor(self._sums[key], dtype=torch.float64, device=self.args.device) for key in keys])
            total = dict(zip(keys, self._global_sum(totals).tolist(), strict=True))
            steps = max(1, self._sums["steps"])
            logs["ntp_loss"] = total["ntp_loss"] / steps
            logs["nsp_loss"] = total["nsp_loss"] / steps
            logs["nsp_accuracy"] = total["correct"] / max(1, total["queries"])
            logs["num_negatives"] = total["negatives"] / max(1, total["queries"])
            logs["tokens_per_second"] = total["tokens"] / max(1e-9, time.time() - self._logged_at)
            logs["padding"] = 1 - total["tokens"] / max(1, total["padded_tokens"])
            self._sums, self._logged_at = defaultdict(float), time.time()
        super().log(logs, start_time)

    def _global_sum(self, tensor):
        return self.accelerator.reduce(tensor, "sum") if world_size() > 1 else tensor

    # ------------------------------------------------------------------ evaluation

    def get_eval_dataloader(self, eval_dataset=None):
        """`Trainer`'s; on several ranks each instance stands on one of them, once, and a rank that has none left gets an empty batch."""
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        dataset = self.eval_dataset[dataset] if isinstance(dataset, str) else dataset
        if world_size() == 1 or not isinstance(dataset, datasets.Dataset) or not isinstance(self.data_collator, CoSupDataCollator):
            return super().get_eval_dataloader(eval_dataset)
        rank, size = self.args.process_index, self.args.eval_batch_size
        longest = -(-len(dataset) // world_size())
        rows = list(range(rank, len(dataset), world_size()))
        batches = [rows[start : start + size] for start in range(0, longest, size)]
        return DataLoader(
            dataset, batch_sampler=batches, collate_fn=self.data_collator, num_workers=self.args.dataloader_num_workers, pin_memory=not self.args.use_cpu
        )

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """Embeddings and NTP loss of a batch wait for the end of the set; the loop gets nothing."""
        inputs = self._prepare_inputs(inputs)
        facts, nothing = inputs["facts"], torch.zeros(0, self.cosup_config.embedding_size)
        if world_size() > 1:
            self._share_facts([inputs])  # shards need the same calls on all ranks
        with explained_memory_errors(self.args), torch.no_grad(), self.compute_loss_context_manager():
            pieces = [self._forward(model, micro_batch, 1) for micro_batch in inputs["micro_batches"]]
        ntp_sum = sum(float(piece.ntp_loss) for piece in pieces if piece.ntp_loss is not None)
        embeds = [_cat(pieces, name) for name in ("query_embeds", "passage_embeds")]
        embeds = [(nothing if tensor is None else tensor).float().cpu().numpy() for tensor in embeds]
        self._eval_batches.append((facts, ntp_sum, *embeds))
        return None, None, None

    def evaluation_loop(self, dataloader, description, prediction_loss_only=None, ignore_keys=None, metric_key_prefix="eval"):
        """`Trainer`'s loop, then the losses and recall over the whole set, whatever its batches."""
        self._eval_batches, start = [], time.time()
        output = super().evaluation_loop(dataloader, description, True, ignore_keys, metric_key_prefix)
        facts, ntp_sums, queries, passages = zip(*gather_object(self._eval_batches), strict=True)
        self._eval_batches = []
        self._logged_at += time.time() - start  # no training time
        query_embeds, passage_embeds = np.concatenate(queries), np.concatenate(passages)
        metrics, rows, labels = retrieval_metrics(query_embeds, passage_embeds, facts, self.cosup_config.temperature)
        metrics["ntp_loss"] = sum(ntp_sums) / max(1, sum(each.num_labels for each in facts))
        metrics["loss"] = metrics["ntp_loss"] + self.cosup_config.nsp_loss_weight * metrics["nsp_loss"]
        if self.compute_metrics is not None:
            metrics.update(self.compute_metrics(EvalPrediction(predictions=(query_embeds, passage_embeds[rows]), label_ids=labels)))
        output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in metrics.items()})
        return output

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


class _ShorterThan:
    """Filter of a streamed dataset that says how many instances it has dropped, at the first and at every power of two."""

    def __init__(self, max_length, name):
        self.max_length, self.name, self.dropped = max_length, name, 0

    def __call__(self, instance):
        if len(instance["input_ids"]) <= self.max_length:
            return True
        self.dropped += 1
        if self.dropped & (self.dropped - 1) == 0:
            logger.warning(f"Dropped {self.dropped} instance(s) of the {self.name} so far: longer than max_length={self.max_length}.")
        return False


def _cat(pieces, name):
    """The embeddings of all micro-batches, `None` where none has any."""
    found = [getattr(piece, name) for piece in pieces if getattr(piece, name) is not None]
    return torch.cat(found) if found else None
