"""
The arguments of CoSupTrainer that `TrainingArguments` does not have.

λ, similarity and temperature belong to the model: see `CoSupConfig`. This module can be imported without torch, so
that a program lists its options at once.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from numbers import Integral, Real
from typing import Any

from transformers.trainer_utils import SchedulerType
from transformers.training_args import OptimizerNames, TrainingArguments
from transformers.utils import logging

from modeling_cosup.names_cosup import nearest_name
from modeling_cosup.numbers_cosup import COUNT, POSITIVE, Range, check_number, check_numbers

from .ablation_args import GRADIENTS, AblationArguments, check_ablations
from .distillation_args import DISTILLATIONS, SOURCES, DistillationArguments, check_candidates

logger = logging.get_logger(__name__)

CHOICES = {
    "supervision": ("co", "ntp", "nsp", "separate", *DISTILLATIONS),
    "candidates_from": SOURCES,
    "gather": ("global", "local", "detached"),
    "nsp_gradient": GRADIENTS,
    "batch_sampler": ("batch_sampler", "no_duplicates"),
    "include_num_input_tokens_seen": (False, True, "no", "all", "non_padding"),
}
NUMBERS = {
    **dict.fromkeys(("max_length", "num_candidates", "refresh_index_steps"), COUNT),
    "label_smoothing_factor": Range("a number of 0 or more, and less than 1", Real, lambda value: 0 <= value < 1),
}
OPTIONAL_NUMBERS = {
    **dict.fromkeys(("nsp_batch_size", "max_tokens_per_micro_batch"), COUNT),
    "dataset_num_proc": Range("an integer of 0 or more", Integral, lambda value: value >= 0),
    **dict.fromkeys(("rerank_candidates", "gradient_cosine_steps"), COUNT),
    **dict.fromkeys(("control_token_lr", "target_temperature"), POSITIVE),
    "lr_decay_per_epoch": Range("a number above 0, and at most 1", Real, lambda value: 0 < value <= 1),
}
METRIC_EXTRAS = ("inputs", "loss")  # of include_for_metrics
# arguments of TrainingArguments that keep their default, and why
FIXED = {
    "batch_eval_metrics": (False, "recall is over all passages of a set, and a batch has only some of them"),
    "eval_do_concat_batches": (True, "compute_metrics gets one array of queries and one of the set's passages"),
    "label_names": (None, "labels are in the column `labels`, and passages in `passage_input_ids`"),
}
# optimisers that change weights while backward runs; GradCache runs backward once for each micro-batch
STEP_IN_BACKWARD = ("lomo", "adalomo")
LAYERWISE = "_layerwise"
SCHEDULE_FREE = "schedule_free_"


@dataclass
class CoSupTrainingArguments(DistillationArguments, AblationArguments, TrainingArguments):
    """
    The arguments of [`~transformers.TrainingArguments`], [`AblationArguments`], [`DistillationArguments`], and these:

    Args:
        lr_scheduler_type (`str`), warmup_steps (`int` or `float`): as in `TrainingArguments`, but the default is a
            warm-up of a tenth of all steps, then a cosine schedule; `recipes/benchmarks` says why.
        max_length (`int`): the most tokens of an instance, passages included. A longer instance is dropped, counted
            and reported, never cut. There is always a limit, and it is an error if an instance remains that is longer
            than Gen can read.
        train_on_passages (`bool`): also train the tokens of retrieved passages (an ablation of the paper; its main
            result masks them).
        supervision (`str`):
            `"co"`: both losses in one step (the method).
            `"ntp"`: next tokens alone; Emb_seq is frozen, unless it is Gen (`tie_emb_seq`).
            `"nsp"`: next passages alone. If an encoder makes the queries, Gen is not run: this trains a retriever.
            `"separate"`: Gen learns next tokens, and Emb_seq learns next passages from queries that it encodes itself
            (the paper's baseline, section 5). The model's `query_from` says whether one encoder reads queries and
            passages, or two (appendix C.1). Gradients of Gen and of the encoders are clipped apart, so this is two
            trainings in one; under FSDP1 and DeepSpeed one norm clips all.
            `"attention_distillation"`, `"perplexity_distillation"`: instances whose passage is unknown teach
            retrieval too. Gen reads `num_candidates` passages with the answer. The target for the retriever's scores
            is Gen's attention to each passage (arXiv 2402.11794), or how likely each passage makes the answer (Atlas,
            arXiv 2208.03299). Adds λ times `distillation_loss`. Instances with a passage are trained as with `"co"` or
            `"separate"`. The model's `query_from` says what makes the queries. With `freeze_gen` Gen only reads. An
            instance with a single candidate teaches nothing: there is nothing to compare it with.
        nsp_batch_size (`int`, *optional*): instances, over all ranks, whose passages are each other's negatives. Turns
            on GradCache: the NSP loss sees all of them in the memory of a micro-batch of
            `per_device_train_batch_size`, with the same gradients. One optimiser step is `gradient_accumulation_steps`
            such batches. Without it the NSP batch is `per_device_train_batch_size` times the number of ranks.
            `auto_find_batch_size` lowers the micro-batch and leaves this.
        max_tokens_per_micro_batch (`int`, *optional*): with `nsp_batch_size`, cut micro-batches by tokens (padding and
            passages included) in place of instances.
        matryoshka_dims (`list[int]`, *optional*): widths to which embeddings will be cut (`CoSupConfig.truncate_dim`).
            Adds λ times `matryoshka_loss`, the NSP loss of the cut embeddings, mean over these widths.
        gather (`str`):
            `"global"`: negatives are the passages of all ranks, and gradients reach all of them, so W ranks compute
            what one process would.
            `"detached"`: passages of other ranks are constants, as in the paper's code.
            `"local"`: negatives are this rank's passages alone.
        mask_duplicates (`bool`): encode identical passages of a batch once and never count one as a negative of
            another. The paper counted them.
        batch_sampler (`str`): `"no_duplicates"` draws batches, over all ranks, in which no passage (hard negatives
            included, by id and by content) is named twice, as long as such batches are left. `"batch_sampler"` does
            not look at passages.
        padding_free (`bool`, *optional*): a micro-batch is one row without padding. Defaults to `True` if the
            attention implementation keeps the parts of a row apart without a dense mask: flash and flex attention, and
            SDPA on a CPU if the model has no sliding window. With others, rows of similar length share a micro-batch.
            So they do in models with recurrent layers or convolutions, where rows would change each other and `True`
            is refused.
        freeze_gen, freeze_emb_seq (`bool`): train only the other model; a tied model is one. With a frozen Emb_seq
            (and `emb_head`) an index stays valid. A later training of the same model may train what this one froze.
        lr_decay_per_epoch (`float`, *optional*): multiply the learning rate by this after every epoch, in place of
            `lr_scheduler_type` and warm-up; the paper's is 0.85.
        control_token_lr (`float`, *optional*): learning rate of the rows of `[NSP]`, `[Cs]` and `[CE]` in Gen's
            embeddings and LM head, and in the embeddings of an encoder that reads queries with Gen's tokenizer. It
            follows the schedule of `learning_rate`, which is its default. It needs an optimiser whose step is
            proportional to the learning rate (AdamW, SGD, Adafactor and most others), and one process, DDP or FSDP2.
        clip_gen_only (`bool`): clip the gradients of Gen alone to `max_grad_norm`, as the paper did. It is refused if
            Gen is not trained.
        dataset_num_proc (`int`, *optional*): processes that tokenize the dataset.

    Some arguments of `TrainingArguments` mean a little more or less here:

    - `label_smoothing_factor` smooths the labels of the NTP loss while training, as in `Trainer`. NSP is not smoothed,
      and neither is an evaluation, so that `eval_ntp_loss` can be compared between runs.
    - `include_num_input_tokens_seen` counts tokens of Gen and Emb_seq, on all ranks: `"all"` (or `True`) with padding,
      `"non_padding"` without.
    - `include_for_metrics`: see `compute_metrics` of [`CoSupTrainer`].
    - `logging_nan_inf_filter` is always `False`: training stops at a loss that is not finite, and never leaves it out
      of the log.
    - `prediction_loss_only`: `compute_metrics` is not called, and `predict()` returns metrics alone.
    - `dataloader_drop_last` is for training: an evaluation reads every instance.
    - `batch_eval_metrics`, `eval_do_concat_batches=False`, `label_names`, and model parallelism in
      `parallelism_config` have no meaning here and are refused.

    Raises:
        `ValueError`: for an unknown choice, a number that is out of range, an argument that has no meaning here, an
            NSP batch that the ranks cannot share evenly, a token budget without `nsp_batch_size`, or an optimiser that
            `control_token_lr` cannot use.
    """

    lr_scheduler_type: SchedulerType | str = field(
        default="cosine", metadata={"help": "Schedule of the learning rate."}
    )
    warmup_steps: float = field(
        default=0.1, metadata={"help": "Steps of linear warm-up. Below 1: their share of all steps."}
    )
    # what TrainingArguments defaults to if torch is imported, which `--help` does not do
    optim: OptimizerNames | str = field(default="adamw_torch_fused", metadata={"help": "Optimiser."})
    max_length: int = field(
        default=1024,
        metadata={"help": "Longest instance in tokens, passages included. Longer ones are dropped and counted."},
    )
    train_on_passages: bool = field(
        default=False, metadata={"help": "Also train the tokens of the passages (an ablation of the paper)."}
    )
    supervision: str = field(
        default="co",
        metadata={"help": "co, ntp, nsp, separate, attention_distillation or perplexity_distillation."},
    )
    nsp_batch_size: int | None = field(
        default=None,
        metadata={"help": "GradCache: instances, over all ranks, whose passages are each other's negatives."},
    )
    max_tokens_per_micro_batch: int | None = field(
        default=None, metadata={"help": "With nsp_batch_size: cut micro-batches by tokens, not instances."}
    )
    matryoshka_dims: list[int] | None = field(
        default=None, metadata={"help": "Also train embeddings that are cut to these widths, see truncate_dim."}
    )
    gather: str = field(
        default="global",
        metadata={"help": "Negatives: global (all ranks), detached (the paper's code) or local (this rank)."},
    )
    mask_duplicates: bool = field(
        default=True, metadata={"help": "Encode identical passages once, and never use one as a negative of another."}
    )
    batch_sampler: str = field(
        default="batch_sampler", metadata={"help": "no_duplicates draws batches in which no passage occurs twice."}
    )
    padding_free: bool | None = field(
        default=None,
        metadata={
            "help": "Pack rows into one, without padding. Default: if attention can keep them apart without a mask."
        },
    )
    freeze_gen: bool = field(default=False, metadata={"help": "Do not train Gen."})
    freeze_emb_seq: bool = field(default=False, metadata={"help": "Do not train Emb_seq. An index stays valid."})
    lr_decay_per_epoch: float | None = field(
        default=None, metadata={"help": "Factor after each epoch, in place of schedule and warm-up (the paper: 0.85)."}
    )
    control_token_lr: float | None = field(
        default=None,
        metadata={"help": "Learning rate of the rows of [NSP], [Cs] and [CE]. Default: learning_rate."},
    )
    clip_gen_only: bool = field(default=False, metadata={"help": "Clip the gradients of Gen alone (the paper)."})
    dataset_num_proc: int | None = field(default=None, metadata={"help": "Processes that tokenize the dataset."})

    def __post_init__(self) -> None:
        import torch
        from transformers.trainer_pt_utils import AcceleratorConfig

        if self.candidates_from is None and self.supervision in DISTILLATIONS:
            self.candidates_from = "index"
        self._check_choices()
        if not torch.accelerator.is_available():
            self.use_cpu = True  # otherwise TrainingArguments refuses bf16 on a CPU
        compiles = self.torch_compile or self.torch_compile_backend or self.torch_compile_mode
        if self.tf32 is None and compiles:
            self.tf32 = False  # TrainingArguments would turn it on, for the losses too
        # CoSupTrainer stops at a loss that is not finite; a check at every step would wait for the GPU
        self.logging_nan_inf_filter = False
        if self.ddp_find_unused_parameters is None:
            self.ddp_find_unused_parameters = False  # every part of the model takes part in every step
        if self.ddp_broadcast_buffers is None:
            self.ddp_broadcast_buffers = False  # they are rotary frequencies, which never change
        super().__post_init__()
        self.check()
        if self.n_gpu > 1:  # DataParallel cannot slice a batch, because its rows share passages
            logger.warning(
                f"{self.n_gpu} GPUs are visible to one process, which uses the first."
                " For all of them: accelerate launch --multi_gpu."
            )
            self._n_gpu = 1
        assert isinstance(self.accelerator_config, AcceleratorConfig)  # super().__post_init__ has parsed it
        if self.accelerator_config.dispatch_batches is None:
            # each rank loads its batches: one batch cannot be sliced for all ranks, because its rows share passages
            self.accelerator_config.dispatch_batches = False
        if self.dataloader_pin_memory and not self.use_cpu:
            self.accelerator_config.non_blocking = True  # the next batch travels to the GPU while this one is computed

    def check(self) -> None:
        """
        Raise if an argument has no meaning, or does not fit another one or the number of ranks.

        Raises:
            `ValueError`: naming the argument.
        """
        self._check_choices()
        self._check_batches()
        self._check_instances_of_step()
        self._check_control_token_lr()
        if self.fp16 and self.device.type == "cpu":
            raise ValueError("fp16 needs a GPU; on a CPU accelerate would train in float32 without a word. Give bf16.")
        if self.world_size > 1:
            self._check_ranks()

    def _check_choices(self) -> None:
        """Check what can be checked before `TrainingArguments` looks for devices and other ranks."""
        for name, choices in CHOICES.items():
            value = getattr(self, name)
            if value not in choices:
                raise ValueError(f"{name} is {value!r}, expected one of {', '.join(map(repr, choices))}.")
        for name, (default, reason) in FIXED.items():
            value = getattr(self, name)
            if value != default:
                raise ValueError(f"{name}={value!r} has no meaning here: {reason}. Leave it out.")
        for name in self.include_for_metrics:
            if name not in METRIC_EXTRAS:
                raise ValueError(f"include_for_metrics holds {name!r}{nearest(name, METRIC_EXTRAS)}")
        check_numbers(self, NUMBERS | OPTIONAL_NUMBERS, optional=OPTIONAL_NUMBERS)
        for name, does in (("label_smoothing_factor", "smooths"), ("train_on_passages", "adds tokens to")):
            if getattr(self, name) and not self.trains_ntp:
                frozen = " with freeze_gen" if self.distills else ""
                raise ValueError(
                    f"{name} {does} next token prediction, which supervision={self.supervision!r}{frozen} does not"
                    " train."
                )
        if not isinstance(self.matryoshka_dims, list | tuple | None):
            raise ValueError(f"matryoshka_dims is {self.matryoshka_dims!r}, expected a list of widths.")
        for dim in self.matryoshka_dims or ():
            check_number("A width of matryoshka_dims", dim, COUNT)
        if self.matryoshka_dims and not self.trains_embeddings:
            raise ValueError("matryoshka_dims cuts embeddings, which supervision='ntp' does not train.")
        if self.matryoshka_dims and self.distills:
            raise ValueError("matryoshka_dims cuts embeddings for the NSP loss, not for a distillation: leave it out.")
        check_candidates(self)
        check_ablations(self)
        if self.train_sampling_strategy == "batch_rebalance":
            raise ValueError(
                "train_sampling_strategy='batch_rebalance' does not keep its order after a resume: use group_by_length"
                " or max_tokens_per_micro_batch."
            )
        if self.batch_sampler == "no_duplicates" and self.train_sampling_strategy != "random":
            raise ValueError(
                f"train_sampling_strategy={self.train_sampling_strategy!r} and batch_sampler='no_duplicates' both say"
                " which instances share a batch: give one of them."
            )
        if getattr(self.parallelism_config, "non_data_parallel_size", 1) > 1:
            raise ValueError(
                "parallelism_config: only data parallelism works here. Tensor, context and sequence parallelism would"
                " give some ranks the same batch, or parts of one, where each must have passages of its own."
            )

    def _check_batches(self) -> None:
        """Check what GradCache needs."""
        if self.max_tokens_per_micro_batch is not None and self.nsp_batch_size is None:
            raise ValueError("max_tokens_per_micro_batch cuts the NSP batch of GradCache: give nsp_batch_size too.")
        if self.nsp_batch_size is None:
            return
        if self.nsp_batch_size % self.world_size:
            raise ValueError(
                f"nsp_batch_size={self.nsp_batch_size} must be a multiple of the number of ranks, {self.world_size}."
            )
        if self.max_tokens_per_micro_batch is not None and self.auto_find_batch_size:
            raise ValueError(
                "auto_find_batch_size lowers per_device_train_batch_size, which max_tokens_per_micro_batch replaces:"
                " leave one of them out."
            )
        if self._steps_in_backward:
            raise ValueError(
                f"optim={self._optimizer_name!r} changes weights during backward, and nsp_batch_size needs all"
                " micro-batches to see the same weights: choose another optimizer."
            )

    def _check_instances_of_step(self) -> None:
        """Check that a step has several instances, over which the mean attention to a place is taken."""
        if not self.distills or self.target[0] != "attention":
            return
        if self.train_batch_size * self.gradient_accumulation_steps * self.world_size == 1:
            raise ValueError(
                "distillation_target='attention' compares the instances of a step, and a step has one: raise"
                " per_device_train_batch_size or gradient_accumulation_steps, or choose 'attention_shares'."
            )

    def _check_control_token_lr(self) -> None:
        """Check a learning rate that scales the optimiser's step, before a model is loaded."""
        if self.control_token_lr is None:
            return
        if self._steps_in_backward or self._optimizer_name.startswith(SCHEDULE_FREE):
            raise ValueError(
                f"control_token_lr scales the optimizer's step, and optim={self._optimizer_name!r} changes weights"
                " during backward or keeps averages of them: choose another optimizer, such as adamw_torch_fused."
            )

    # ------------------------------------------------------------------ what is trained

    @property
    def distills(self) -> bool:
        """Whether the reader teaches retrieval."""
        return self.supervision in DISTILLATIONS

    @property
    def trains_ntp(self) -> bool:
        """Whether Gen learns next tokens."""
        return not (self.supervision == "nsp" or (self.distills and self.freeze_gen))

    @property
    def trains_embeddings(self) -> bool:
        """Whether queries and passages learn to find each other."""
        return self.supervision != "ntp"

    @property
    def target(self) -> tuple[str, float | None]:
        """The target of a distillation, and its temperature; `None` for a target without one."""
        temperatures = DISTILLATIONS[self.supervision]
        name = self.distillation_target or next(iter(temperatures))
        if self.target_temperature is None:
            return name, temperatures[name]
        return name, self.target_temperature

    @property
    def _optimizer_name(self) -> str:
        return str(getattr(self.optim, "value", self.optim))

    @property
    def _steps_in_backward(self) -> bool:
        return self._optimizer_name in STEP_IN_BACKWARD or self._optimizer_name.endswith(LAYERWISE)

    def _check_ranks(self) -> None:
        """Check what more than one rank needs."""
        from transformers.trainer_pt_utils import AcceleratorConfig

        if not self.average_tokens_across_devices:
            raise ValueError("Losses are divided by global counts: leave average_tokens_across_devices=True.")
        if self.ddp_static_graph and (self.nsp_batch_size is not None or self.gradient_accumulation_steps > 1):
            raise ValueError(
                "ddp_static_graph lets DDP expect an exchange of gradients after every backward; nsp_batch_size and"
                " gradient_accumulation_steps take several before one. Leave it out."
            )
        checkpointing: Any = self.gradient_checkpointing_kwargs  # super().__post_init__ has parsed it
        if self.gradient_checkpointing and checkpointing and checkpointing.get("use_reentrant"):
            raise ValueError(
                "gradient_checkpointing_kwargs: with use_reentrant=True, DDP would take the gradient of a layer for"
                " complete after its first use, and a step uses layers several times: for each micro-batch, and in a"
                " tied model for passages too. Leave it out."
            )
        config = self.accelerator_config
        assert isinstance(config, AcceleratorConfig)  # super().__post_init__ has parsed it
        if config.dispatch_batches:
            raise ValueError(
                "accelerator_config: dispatch_batches=True would slice a batch for all ranks, and the rows of a batch"
                " share passages. Leave it out: each rank loads its batches."
            )
        if config.split_batches:
            raise ValueError(
                "accelerator_config: split_batches=True would divide batches among ranks; here"
                " per_device_train_batch_size is always that of one rank, and nsp_batch_size that of all."
            )
        if not config.even_batches:
            raise ValueError(
                "accelerator_config: even_batches=False would give some ranks fewer batches, and the others would wait"
                " for them forever. Leave it out."
            )

    @property
    def train_batch_size(self) -> int:
        """Instances that a rank loads at a time: its share of the NSP batch, or a micro-batch."""
        if self.nsp_batch_size is None:
            return super().train_batch_size
        return self.nsp_batch_size // self.world_size


def nearest(name: str, names: Iterable[str]) -> str:
    """Return the end of a message about an unknown name: the nearest of `names`, or all of them."""
    names = tuple(names)
    near = nearest_name(name, names)
    if near is not None:
        return f": did you mean {near!r}?"
    return f", expected one of {', '.join(map(repr, names))}."
