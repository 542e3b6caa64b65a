"""CoSupTrainer: the Trainer whose loss is L = L_NTP + λ·L_NSP over the global batch; `training_step` has its step."""

import dataclasses
import functools
from pathlib import Path

import torch
from accelerate.utils import DistributedType, DynamoBackend
from torch.distributed.tensor import DTensor
from transformers import Trainer
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from modeling_cosup import CoSupForCausalLM

from .dataset_setup import COLUMNS, OPTIONAL_COLUMNS, no_duplicates_sampler, tokenize_dataset
from .distributed import host_group, world_size
from .held_out import HeldOutMixin
from .hub import HubMixin
from .losses import RunningFigures
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
from .training_step import TrainingStepMixin
from .watch import FiniteLosses, explained_memory_errors, last_complete_checkpoint


class CoSupTrainer(HubMixin, HeldOutMixin, TrainingStepMixin, Trainer):  # type: ignore[misc]  # its card takes other arguments
    """
    Trains a [`CoSupForCausalLM`] by next token and next sequence prediction in the same step.

    NTP is summed over tokens and divided by the global count of trained tokens, NSP is summed over queries and divided
    by the global count of queries, over all ranks and accumulated batches; the negatives of a query are all passages
    of its batch, on all ranks. How a batch is cut into micro-batches (by length, against padding; with
    `nsp_batch_size`, against memory) changes neither. Weights that are trained are held in float32 (adapters as PEFT
    holds them); `bf16=True` computes in bfloat16.

    Logs next to `loss` each loss by name (`ntp_loss`, `nsp_loss`: see `losses.py`), `nsp_accuracy` (in-batch retrieval
    accuracy), `num_negatives` (mean per query), `tokens_per_second` (tokens of Gen and Emb_seq, without padding) and
    `padding` (its share of all tokens). `evaluate()` returns `eval_loss`, each loss by name (`eval_ntp_loss`,
    `eval_nsp_loss`), `eval_query_recall@1` and `eval_query_recall@5`, over all distinct passages of the evaluation
    set, whatever the batches.

    Args:
        model (`CoSupForCausalLM` or `str`): a model or the name or path of one.
        args ([`CoSupTrainingArguments`], *optional*): defaults to an output folder `cosup`.
        data_collator (`Callable`, *optional*): defaults to [`CoSupDataCollator`].
        train_dataset, eval_dataset (`Dataset`, `IterableDataset`, `list[dict]`, *optional*): instances, or already
            tokenized ones (columns `input_ids`, `labels`, `passage_input_ids`). `eval_dataset` may be a dict of them.
        processing_class, emb_seq_processing_class (`PreTrainedTokenizerBase`, *optional*): default to the model's own.
        compute_metrics (`Callable`, *optional*): gets an `EvalPrediction` with `predictions=(query_embeds,
            passage_embeds)`, the distinct passages of the set, and `label_ids`, for each query the row of its passage.
        callbacks, optimizers: as in `Trainer`.
        peft_config (`PeftConfig`, *optional*): wraps the model; rows of control tokens are trained too.

    Raises:
        `ValueError`: an invalid instance, naming its row, before training starts; arguments that do not fit the model.
        `FloatingPointError`: while training, a loss that is NaN or infinite, naming the step, the loss and the
            instances.
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
            raise ValueError(
                "CoSupTrainer needs a CoSupForCausalLM with Emb_seq;"
                " this one is another model or was loaded with load_emb_seq=False."
            )
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
            sets = eval_dataset.items()
            eval_dataset = {name: prepare(dataset, name=f"evaluation set {name!r}") for name, dataset in sets}
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
                kind = self.accelerator.distributed_type.value
                raise ValueError(f"{name} works under DDP and FSDP2, not under {kind} as it is configured.")
        if args.torch_compile:  # the layers are compiled already; the rest depends on the data
            self.accelerator.state.dynamo_plugin.backend = DynamoBackend.NO
        plugin = self._fsdp2_plugin()
        policy = None if plugin is None else plugin.mixed_precision_policy
        if policy is not None:  # losses, embeddings and gradients of ranks in float32
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
        # an evaluation before has prepared the model, but not for data parallelism
        vars(self.model).pop("_is_accelerate_prepared", None)
        with explained_memory_errors(self.args):
            output = super().train(resume_from_checkpoint, *args, **kwargs)
        self._finite.check()
        return output

    def floating_point_ops(self, inputs):
        """6 operations per token and parameter that reads it, embeddings not counted."""
        facts, base = inputs["facts"], without_peft(self.model)
        if self._num_parameters is None:
            parts = [base.gen, base.emb_seq if self.args.supervision != "ntp" else None]
            self._num_parameters = [
                0 if part is None else part.num_parameters(exclude_embeddings=True) for part in parts
            ]
        gen, emb_seq = self._num_parameters
        return 6 * (facts.num_gen_tokens * gen + (facts.num_tokens - facts.num_gen_tokens) * emb_seq)

    # ------------------------------------------------------------------ the log

    def log(self, logs, start_time=None):
        """Add each loss by name, and the other running figures, to what `Trainer` logs."""
        if "loss" in logs and self._running.steps:
            self._finite.check()
            logs |= self._running.averages(self.args.device, self._sum_over_ranks)
            self._running.restart()
        super().log(logs, start_time)

    def _sum_over_ranks(self, tensor):
        return self.accelerator.reduce(tensor, "sum") if world_size() > 1 else tensor

    # ------------------------------------------------------------------ the paper's optimiser

    def create_scheduler(self, num_training_steps, optimizer=None):
        """With `lr_decay_per_epoch`: a constant rate, multiplied by it after every epoch (section 4: 0.85)."""
        decay = self.args.lr_decay_per_epoch
        if decay is None or self.lr_scheduler is not None:
            return super().create_scheduler(num_training_steps, optimizer)
        steps_per_epoch = max(1, round(num_training_steps / self.args.num_train_epochs))
        if self.args.max_steps > 0:
            if isinstance(self.train_dataset, torch.utils.data.IterableDataset):
                raise ValueError(
                    "lr_decay_per_epoch needs to know how long an epoch is; a streamed dataset does not say."
                )
            batches = len(self.get_train_dataloader())
            steps_per_epoch = max(1, -(-batches // self.args.gradient_accumulation_steps))
        optimizer = self.optimizer if optimizer is None else optimizer
        self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: decay ** (step // steps_per_epoch)
        )
        self._created_lr_scheduler = True
        return self.lr_scheduler

    def _clip_grad_norm(self, model):
        if not self.args.clip_gen_only:
            return super()._clip_grad_norm(model)
        gen = without_peft(self.accelerator.unwrap_model(model)).gen
        return self.accelerator.clip_grad_norm_(gen.parameters(), self.args.max_grad_norm)

    def _get_grad_norm(self, model, grad_norm=None):
        grad_norm = super()._get_grad_norm(model, grad_norm)
        if isinstance(grad_norm, torch.Tensor) and not self.args.fp16:  # float16 skips such steps by itself
            norm = grad_norm.full_tensor() if isinstance(grad_norm, DTensor) else grad_norm  # over all ranks
            finite = norm.detach().isfinite()[None]
            self._finite.add(self.state.global_step, "gradient", finite, [self._step_instance_ids])
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
        """Tied weights are stored once: a head that a checkpoint lacks as it is the embedding is not missing."""
        tied = set(getattr(self.model, "all_tied_weights_keys", {}))
        if load_result.missing_keys and set(load_result.missing_keys) <= tied:
            self.model.tie_weights()
            load_result.missing_keys.clear()
        super()._issue_warnings_after_load(load_result)
