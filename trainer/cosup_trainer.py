"""CoSupTrainer, which minimises L = L_NTP + λ·L_NSP over the global batch; its step is in `training_step`."""

import contextlib
import dataclasses
import functools
import inspect
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast
from weakref import WeakKeyDictionary

import datasets
import torch
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.utils import DistributedType, DynamoBackend
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grad_norm_, get_total_norm
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from torch.utils.hooks import RemovableHandle
from transformers import (
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
    enable_full_determinism,
    set_seed,
)
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, EvalPrediction, TrainOutput

from modeling_cosup import CoSupForCausalLM
from modeling_cosup.files_cosup import write_json

from .arguments import check_optimizer, check_sharding, check_trainer_arguments, read_by_tokenizing
from .batching import CoSupDataCollator
from .candidate_refresh import check_given_index
from .candidate_watch import FLATNESS, UNTAUGHT
from .control_tokens import set_control_token_lr
from .dataset_setup import PATIENCE, AnyDataset, LongInstances, report_no_query
from .distillation_step import running_figures
from .distributed import gather_objects, host_group, world_size
from .gradient_cosine import GradientCosineMixin
from .held_out import HeldOutMixin
from .hub import HubMixin
from .loading import LoadingMixin
from .model_init import ModelInitMixin
from .model_setup import check_something_is_trained, freeze, without_peft
from .running import CLOCK_FILE, peak_memory
from .training_args import CoSupTrainingArguments
from .watch import FiniteLosses, explained_full_disk, explained_memory_errors, last_complete_checkpoint

if TYPE_CHECKING:
    from peft import PeftConfig


# create_model_card of HubMixin takes other arguments than Trainer's
class CoSupTrainer(HubMixin, HeldOutMixin, GradientCosineMixin, LoadingMixin, ModelInitMixin, Trainer):  # type: ignore[misc]
    """
    A Trainer for [`CoSupForCausalLM`]: next token and next sequence prediction in the same step.

    NTP is summed over tokens and divided by the global count of trained tokens. NSP is summed over queries and divided
    by the global count of queries that have a negative. Both counts are over all ranks and accumulated batches. The
    negatives of a query are all other passages of its batch, on all ranks. A batch is cut into micro-batches: by
    length, to save padding, or, with `nsp_batch_size`, to save memory. The cut does not change the losses. Trained
    weights are kept in float32, but those of PEFT's `modules_to_save` as they are, with a warning; `bf16=True`
    computes in bfloat16. Parts that text never reaches, such as a vision tower, are frozen.

    Next to `loss`, the log has each loss by name (`ntp_loss`, `nsp_loss`: see `losses.py`), `nsp_accuracy` (in-batch
    retrieval accuracy), `num_negatives` (mean per query), `tokens_per_second` (tokens of Gen and Emb_seq, without
    padding), `padding` (its share of all tokens) and `training_seconds` (without evaluations and index builds;
    evaluation logs have it too). The last log has `peak_memory`. A figure for which nothing was measured is left out.

    With `candidates_from`, the log also has `hit_rate@K` (over questions with answers), `query_recall@K` (over
    questions with provenance) and `num_left_out` (instances that were too long). With a distillation it has
    `target_entropy`, `student_entropy` and `target_max`. `evaluate()` returns these too, from a fresh index.

    `evaluate()` returns `eval_loss`, each loss by name (`eval_ntp_loss`, `eval_nsp_loss`), `eval_query_recall@1`,
    `eval_query_recall@5`, and `eval_nsp_predicted`: how often Gen would write the `[NSP]` of the reference. The NSP
    loss and recall are over all distinct passages of the evaluation set, not over a batch. `eval_num_left_out` counts
    its instances that are longer than `max_length`, if there are any: no figure is over them. `predict()` returns the
    embeddings as well. `bf16_full_eval` and `fp16_full_eval` leave the weights as they were.

    Args:
        model (`CoSupForCausalLM` or `str`, *optional*): a model, or its name or path. Give this or `model_init`.
        args ([`CoSupTrainingArguments`], *optional*): defaults to one whose output folder is `cosup`.
        data_collator ([`CoSupDataCollator`], *optional*): or a subclass. By default it is made as the model and `args`
            need it.
        train_dataset, eval_dataset (`Dataset`, `IterableDataset`, `list[dict]`, *optional*): instances, or already
            tokenized ones (columns `input_ids`, `labels`, `passage_input_ids`). `eval_dataset` may be a dict of them.
        processing_class, emb_seq_processing_class (`PreTrainedTokenizerBase`, *optional*): default to the model's own.
        compute_metrics (`Callable`, *optional*): takes an `EvalPrediction` whose `predictions` are `(query_embeds,
            passage_embeds)`, with one row for each query and for each distinct passage of the set. Its `label_ids`
            hold, for each query, the row of its passage. With `include_for_metrics=["inputs"]` its `inputs` are
            `(query_ids, passage_ids)`: the tokens that each embedding was made from, int64, padded with -100 on the
            right. With `"loss"` its `losses` are the NSP losses of the queries. Queries are in the order of the
            instances and, within an instance, in the order of its `[NSP]` tokens.
        callbacks, optimizers, optimizer_cls_and_kwargs: as in `Trainer`.
        peft_config (`PeftConfig`, *optional*): wraps the model. With a `LoraConfig`, rows of control tokens are
            trained too. Other adapters need a model whose control tokens are trained, or `modules_to_save`.
        model_init (`Callable`, *optional*): returns a new model, given nothing or the trial. It is called here, and
            again by each `train()`, so by each trial of `hyperparameter_search()`. A trial may change any argument
            except those that the tokenized instances depend on.
        corpus (`list[dict]`, `Dataset`, `str` or [`PassageIndex`], *optional*): what `candidates_from` searches:
            passages `{"id", "title", "text"}`, the path of a file of them, or an index of this model. A given index is
            searched until the first refresh. If Emb_seq is frozen, it is searched throughout, and may be any
            [`Retriever`]. The index of the last refresh is in `output_dir` while training, and in each checkpoint; it
            is never pushed.

    Raises:
        `ValueError`: for an invalid instance, naming its row, before training starts, and for arguments that do not
            fit the model.
        `FloatingPointError`: while training, for a loss that is NaN or infinite, naming the step, the loss and the
            instances.
        `torch.OutOfMemoryError`: while training or evaluating, naming the arguments that would lower the memory.
        `FullDiskError`: while saving; what was written of that checkpoint is removed.
    """

    _unclipped_norm: torch.Tensor | None = None  # of the gradients that clip_gen_only leaves as they are
    loss_is_scaled_for_ga = True  # over tokens and queries of the whole accumulated batch, not per micro-batch

    def __init__(
        self,
        model: CoSupForCausalLM | str | None = None,
        args: CoSupTrainingArguments | None = None,
        data_collator: CoSupDataCollator | None = None,
        train_dataset: AnyDataset | None = None,
        eval_dataset: AnyDataset | dict[str, AnyDataset] | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        emb_seq_processing_class: PreTrainedTokenizerBase | None = None,
        compute_metrics: Callable[[EvalPrediction], dict] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Optimizer | None, LambdaLR | None] = (None, None),
        peft_config: "PeftConfig | None" = None,
        model_init: Callable[..., Any] | None = None,
        optimizer_cls_and_kwargs: tuple[type[Optimizer], dict[str, Any]] | None = None,
        corpus: Any = None,
        **refused: Any,
    ) -> None:
        check_trainer_arguments(refused, list(inspect.signature(CoSupTrainer).parameters)[:-1])
        if (model is None) == (model_init is None):
            raise ValueError("CoSupTrainer needs either a model, or model_init: a function that returns one.")
        if model_init is not None and optimizers != (None, None):
            raise ValueError("optimizers holds weights of one model, and model_init makes new ones: give one of them.")
        if args is None:
            args = CoSupTrainingArguments("cosup")
        if not isinstance(args, CoSupTrainingArguments):
            raise ValueError(f"args is a {type(args).__name__}: CoSupTrainer needs CoSupTrainingArguments.")
        self.args = args
        self.model_init: Any = model_init
        self._trial: Any = None
        if model_init is not None:
            # as Trainer does: what model_init draws depends on the seed alone
            enable_full_determinism(args.seed) if args.full_determinism else set_seed(args.seed)
            model = cast(CoSupForCausalLM, Trainer.call_model_init(self))  # it is prepared below
        elif isinstance(model, str):
            model = CoSupForCausalLM.from_pretrained(model)
        base = without_peft(model)
        if base.config.model_type != "cosup" or base.emb_seq is None:
            raise ValueError(
                "CoSupTrainer needs a CoSupForCausalLM with Emb_seq;"
                " this one is another model or was loaded with load_emb_seq=False."
            )
        self._given_tokenizers = processing_class, emb_seq_processing_class
        self._take_given_tokenizers(base)
        check_given_index(corpus, base, args, model_init is not None)
        self.tokenizers = base.tokenizer, base.emb_seq_tokenizer
        self._read_by_tokenizing = read_by_tokenizing(base, args) if model_init is not None else {}

        self._peft_config = peft_config
        self._has_default_collator = data_collator is None
        self._has_checked_collator = False
        self.data_collator = data_collator
        trained_model = self._prepared(model)
        check_optimizer(optimizers[0], trained_model)
        self._check_hub_arguments(args, trained_model)

        self._long_instances = WeakKeyDictionary()
        prepared_eval_dataset: Any
        if isinstance(eval_dataset, dict):
            prepared_eval_dataset = {}
            for name, dataset in eval_dataset.items():
                prepared_eval_dataset[name] = self._prepared_evaluation_set(dataset, f"evaluation set {name!r}")
        else:
            prepared_eval_dataset = self._prepared_evaluation_set(eval_dataset)

        super().__init__(
            model=trained_model,
            args=args,
            data_collator=self.data_collator,
            train_dataset=self._tokenized(train_dataset, "training set", LongInstances()),
            eval_dataset=prepared_eval_dataset,
            processing_class=self.tokenizers[0],
            compute_metrics=compute_metrics,
            callbacks=callbacks,
            optimizers=optimizers,
            optimizer_cls_and_kwargs=optimizer_cls_and_kwargs,
        )
        self.model_init = model_init  # Trainer takes only one of model and model_init
        self._host_group = host_group(args.ddp_timeout_delta)
        self._finite = FiniteLosses()
        self._running = running_figures(self.loss_weights, self.args)
        self._evaluated_batches = []
        self._step_instance_ids = []
        self._control_token_hooks: list[RemovableHandle] = []
        self._num_trained_instances = self._num_trained_queries = 0
        self._warned_of_lone_queries = self._warned_of_lone_held_out_queries = False
        self._set_up_candidates(corpus, train_dataset, eval_dataset)

    def create_accelerator_and_postprocess(self) -> None:
        """Make the accelerator, also anew for a trial, and check that it can do what the arguments ask."""
        super().create_accelerator_and_postprocess()
        plugin = getattr(self.accelerator.state, "fsdp_plugin", None)
        check_sharding(self.args, self.accelerator.distributed_type, plugin)
        self._set_up_accelerator()

    def _set_up_accelerator(self) -> None:
        """Keep accelerate from compiling the whole model, and FSDP2 from rounding what the ranks exchange."""
        if self.args.torch_compile:  # the layers are compiled already; the rest depends on the data
            self.accelerator.state.dynamo_plugin.backend = DynamoBackend.NO
        plugin = self._fsdp2_plugin()
        if plugin is not None and plugin.mixed_precision_policy is not None:
            # ranks exchange losses, embeddings and gradients in float32
            plugin.mixed_precision_policy = dataclasses.replace(
                plugin.mixed_precision_policy, reduce_dtype=torch.float32, output_dtype=None
            )

    def _fsdp2_plugin(self) -> Any:
        """Return accelerate's FSDP plugin if it is set to FSDP2, else `None`."""
        plugin = getattr(self.accelerator.state, "fsdp_plugin", None)
        return plugin if getattr(plugin, "fsdp_version", 1) == 2 else None

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> TrainOutput:
        """Run `Trainer.train`; `resume_from_checkpoint=True` resumes from the last checkpoint that is complete."""
        self._num_trained_instances = self._num_trained_queries = 0
        self._first_step = None
        if self.args.nsp_batch_size is not None:
            self._train_batch_size = self.args.per_device_train_batch_size  # where auto_find_batch_size begins
        if resume_from_checkpoint is True:
            resume_from_checkpoint = last_complete_checkpoint(cast(str, self.args.output_dir))
        if self.model is not None:  # else the last trial of a search has freed it
            # an earlier evaluation has prepared the model, but not for data parallelism
            vars(self.model).pop("_is_accelerate_prepared", None)
            freeze(self.model, self.args)  # another trainer of this model may have changed what is frozen
            check_something_is_trained(self.model)
        with explained_memory_errors(self.args), self._candidates_of_training(), self._without_noise_afterwards():
            output = super().train(resume_from_checkpoint, *args, **kwargs)
        self._finite.check()
        # a whole dataset was checked before, and a resumed run may see only the end of a stream
        is_whole_stream = not isinstance(self.train_dataset, datasets.Dataset) and not resume_from_checkpoint
        if is_whole_stream and not self._num_trained_queries and 0 < self._num_trained_instances < PATIENCE:
            report_no_query(self._num_trained_instances, self.args.supervision, "instances of the training set")
        if not self._running.has_losses:
            output = output._replace(training_loss=float("nan"))
        return output

    @contextlib.contextmanager
    def _without_noise_afterwards(self) -> Iterator[None]:
        """Remove NEFTune's hook even after an error. Otherwise a second training would add noise twice."""
        self.neftune_hook_handle = None
        try:
            yield
        except BaseException:
            if self.neftune_hook_handle is not None:
                self.neftune_hook_handle.remove()
            raise

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Return the operations of a batch: 6 per token and parameter that reads it, embeddings not counted."""
        if self._num_parameters is None:
            base = without_peft(self.model)
            emb_seq_parameters = 0
            if self.args.trains_embeddings and base.emb_seq is not None:
                emb_seq_parameters = base.emb_seq.num_parameters(exclude_embeddings=True)
            self._num_parameters = base.gen.num_parameters(exclude_embeddings=True), emb_seq_parameters
        gen_parameters, emb_seq_parameters = self._num_parameters
        facts = inputs["facts"]
        emb_seq_tokens = facts.num_tokens - facts.num_gen_tokens
        return 6 * (facts.num_gen_tokens * gen_parameters + emb_seq_tokens * emb_seq_parameters)

    def _track_num_input_tokens(self, inputs: dict[str, Any]) -> None:
        """Count the tokens of a batch that Gen and Emb_seq read, on all ranks."""
        counted = self.args.include_num_input_tokens_seen
        if counted == "no":
            return
        facts = inputs["facts"]
        num_tokens = facts.num_tokens if counted == "non_padding" else facts.num_padded_tokens
        self.state.num_input_tokens_seen += sum(gather_objects(num_tokens, self._host_group))

    # ------------------------------------------------------------------ the log

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """
        Add each loss by name, and the other running figures, to what `Trainer` logs.

        `loss` and `train_loss` are left out if no loss was measured: a sum of no losses is not 0.
        """
        if "loss" in logs and self._running.steps:
            self._finite.check()
            figures = self._running.averages(self.args.device, self._sum_over_ranks)
            if figures.keys().isdisjoint(self.loss_weights):
                del logs["loss"]
            if self.args.candidates_from is not None and self.is_world_process_zero():
                self._candidate_watch.check(figures, self._running.counts)
            for name in (FLATNESS, UNTAUGHT):
                figures.pop(name, None)
            logs |= figures
            self._running.restart()
        if not self._running.has_losses:
            logs.pop("train_loss", None)
        further = {}
        if self.is_in_train or "train_runtime" in logs:
            further["training_seconds"] = self._running.training_seconds
        if "train_runtime" in logs:
            peaks = gather_objects(peak_memory(self.args.device), self._host_group)
            known = [peak for peak in peaks if peak is not None]
            if len(known) == len(peaks):
                further["peak_memory"] = max(known)
        logs |= further
        super().log(logs, start_time)  # adds the epoch
        for name in further:
            del logs[name]  # evaluate() and train() return their logs

    def _sum_over_ranks(self, tensor: torch.Tensor) -> torch.Tensor:
        return self.accelerator.reduce(tensor, "sum") if world_size() > 1 else tensor

    # ------------------------------------------------------------------ the optimiser

    def create_optimizer(self, model: nn.Module | None = None) -> Optimizer:
        """Return the optimiser; with `control_token_lr` it scales its step for the rows of the control tokens."""
        prepared_optimizer = super().create_optimizer(model)
        if self.args.control_token_lr is None:
            return prepared_optimizer
        optimizer = prepared_optimizer
        while isinstance(optimizer, AcceleratedOptimizer):  # left by an earlier training; the wrapper calls no hooks
            optimizer = optimizer.optimizer
        for hook in self._control_token_hooks:
            hook.remove()
        base = without_peft(self.model if model is None else model)
        self._control_token_hooks = set_control_token_lr(optimizer, base, self.args.control_token_lr)
        return prepared_optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Optimizer | None = None) -> LRScheduler:
        """Return the schedule; `lr_decay_per_epoch` multiplies a constant rate after every epoch (section 4: 0.85)."""
        decay = self.args.lr_decay_per_epoch
        if decay is None or self.lr_scheduler is not None:
            return super().create_scheduler(num_training_steps, optimizer)
        if self.args.max_steps > 0:
            if isinstance(self.train_dataset, torch.utils.data.IterableDataset):
                raise ValueError(
                    "lr_decay_per_epoch needs to know how long an epoch is; a streamed dataset does not say."
                )
            num_batches = len(self.get_train_dataloader())
            steps_per_epoch = max(1, -(-num_batches // self.args.gradient_accumulation_steps))
        else:
            steps_per_epoch = max(1, round(num_training_steps / self.args.num_train_epochs))
        if optimizer is None:
            optimizer = cast(Optimizer, self.optimizer)
        self.lr_scheduler = LambdaLR(optimizer, lambda step: decay ** (step // steps_per_epoch))
        self._created_lr_scheduler = True
        return self.lr_scheduler

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        gen = without_peft(self.accelerator.unwrap_model(model)).gen
        if self.args.clip_gen_only:
            members = set(gen.parameters())
            others = [p.grad for p in model.parameters() if p.grad is not None and p not in members]
            self._unclipped_norm = get_total_norm(others) if others and not self.args.fp16 else None
            return self.accelerator.clip_grad_norm_(gen.parameters(), self.args.max_grad_norm)
        distributed_type = self.accelerator.distributed_type
        is_fsdp1 = distributed_type == DistributedType.FSDP and not self.accelerator.is_fsdp2
        if self.args.supervision != "separate" or is_fsdp1 or distributed_type == DistributedType.DEEPSPEED:
            return super()._clip_grad_norm(model)
        self.accelerator.unscale_gradients()
        of_gen = list(gen.parameters())  # in the same order on all ranks, so that all compute the same norm
        members = set(of_gen)
        of_retriever = [parameter for parameter in model.parameters() if parameter not in members]
        # two trainings: a large gradient of one model does not shrink the step of the other
        norms = [clip_grad_norm_(parameters, self.args.max_grad_norm) for parameters in (of_gen, of_retriever)]
        whole_norms = [norm.full_tensor() if isinstance(norm, DTensor) else norm for norm in norms]
        # the norm of no gradients is on the CPU
        return torch.linalg.vector_norm(torch.stack([norm.to(self.args.device) for norm in whole_norms]))

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        grad_norm = super()._get_grad_norm(model, grad_norm)
        if isinstance(grad_norm, torch.Tensor) and not self.args.fp16:  # float16 skips such steps by itself
            norm = grad_norm.full_tensor() if isinstance(grad_norm, DTensor) else grad_norm  # over all ranks
            finite = norm.detach().isfinite()[None]
            if self._unclipped_norm is not None:
                others = self._unclipped_norm
                others = others.full_tensor() if isinstance(others, DTensor) else others
                # the norm of no gradients is on the CPU
                finite = finite.to(self.args.device) & others.isfinite().to(self.args.device)
                self._unclipped_norm = None
            self._finite.add(self.state.global_step, "gradient", finite, [self._step_instance_ids])
        return grad_norm

    def _finalize_training(self, *args: Any, **kwargs: Any) -> Any:
        """Average the loss since the last log over all ranks, for `train_loss`; then finish as `Trainer` does."""
        if world_size() > 1:
            self._tr_loss = self._sum_over_ranks(self._tr_loss.double()[None])[0] / world_size()
        return super()._finalize_training(*args, **kwargs)

    # ------------------------------------------------------------------ checkpoints

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        self._finite.check()  # a model that a bad loss has ruined is not saved
        run_dir = self._get_output_dir(trial=trial)
        folder = Path(run_dir, f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}")
        if self.args.should_save:
            # an earlier run's checkpoint of this step is about to be overwritten, so it is no longer complete
            (folder / TRAINER_STATE_NAME).unlink(missing_ok=True)
        with explained_full_disk(folder, run_dir, functools.partial(shutil.rmtree, folder, ignore_errors=True)):
            super()._save_checkpoint(model, trial)

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        self._save_candidates(output_dir)
        if self.args.should_save:
            write_json(Path(output_dir, CLOCK_FILE), {"training_seconds": self._running.training_seconds})
        self.accelerator.wait_for_everyone()  # the state file, written next and last, says that all ranks are done

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        """Do not report a head that is tied to the embedding as missing: tied weights are stored once."""
        tied = set(getattr(self.model, "all_tied_weights_keys", {}))
        if load_result.missing_keys and set(load_result.missing_keys) <= tied:
            self.model.tie_weights()
            load_result.missing_keys.clear()
        super()._issue_warnings_after_load(load_result)
