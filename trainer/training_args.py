"""
The arguments of CoSupTrainer that `TrainingArguments` does not have.

λ, similarity and temperature belong to the model: see `CoSupConfig`. This module can be imported without torch, so
that a program lists its options at once.
"""

from dataclasses import dataclass, field

from transformers.trainer_utils import SchedulerType
from transformers.training_args import OptimizerNames, TrainingArguments
from transformers.utils import logging

logger = logging.get_logger(__name__)

CHOICES = {
    "supervision": ("co", "ntp", "nsp", "separate"),
    "gather": ("global", "local", "detached"),
    "batch_sampler": ("batch_sampler", "no_duplicates"),
}


@dataclass
class CoSupTrainingArguments(TrainingArguments):
    """
    [`~transformers.TrainingArguments`] and:

    Args:
        lr_scheduler_type (`str`), warmup_steps (`int` or `float`): as in `TrainingArguments`, but the default is a
            warm-up of a tenth of all steps, then a cosine schedule; `recipes/benchmarks` says why.
        max_length (`int`): tokens of an instance, passages included. A longer instance is dropped, counted and
            reported, never cut.
        train_on_passages (`bool`): also train the tokens of retrieved passages (an ablation of the paper; its main
            result masks them).
        supervision (`str`):
            `"co"`: both losses in one step (the method).
            `"ntp"`: next tokens alone; Emb_seq is frozen.
            `"nsp"`: next passages alone. If an encoder makes the queries, Gen is not run: this trains a retriever.
            `"separate"`: Gen learns next tokens, and Emb_seq learns next passages from queries that it encodes itself
            (the paper's baseline, section 5). The model's `query_from` says whether one encoder reads queries and
            passages, or two (appendix C.1).
        nsp_batch_size (`int`, *optional*): instances, over all ranks, whose passages are each other's negatives. Turns
            on GradCache: the NSP loss sees all of them in the memory of a micro-batch of
            `per_device_train_batch_size`, with the same gradients. One optimiser step is `gradient_accumulation_steps`
            such batches. Without it the NSP batch is `per_device_train_batch_size` times the number of ranks.
        max_tokens_per_micro_batch (`int`, *optional*): with `nsp_batch_size`, cut micro-batches by tokens (padding and
            passages included) in place of instances.
        gather (`str`):
            `"global"`: negatives are the passages of all ranks, and gradients reach all of them: W ranks equal one
            process.
            `"detached"`: passages of other ranks are constants, as in the paper's code.
            `"local"`: negatives are this rank's passages alone.
        mask_duplicates (`bool`): encode identical passages of a batch once and never count one as a negative of
            another. The paper counted them.
        batch_sampler (`str`): `"no_duplicates"` draws batches, over all ranks, in which no passage (hard negatives
            included, by id and by content) is named twice, as long as such batches are left. `"batch_sampler"` does
            not look at passages.
        padding_free (`bool`, *optional*): a micro-batch is one row without padding. Defaults to `True` if the
            attention implementation keeps the parts of a row apart without a dense mask (flash and flex attention).
            With others, rows of similar length share a micro-batch.
        freeze_gen, freeze_emb_seq (`bool`): train only the other model. With a frozen Emb_seq (and `emb_head`) an
            index stays valid.
        lr_decay_per_epoch (`float`, *optional*): multiply the learning rate by this after every epoch, in place of
            `lr_scheduler_type` and warm-up; the paper's is 0.85.
        clip_gen_only (`bool`): clip the gradients of Gen alone to `max_grad_norm`, as the paper did.
        dataset_num_proc (`int`, *optional*): processes that tokenize the dataset.

    Raises:
        `ValueError`: for an unknown choice, an NSP batch that the ranks cannot share evenly, or a token budget without
            `nsp_batch_size`.
    """

    lr_scheduler_type: SchedulerType | str = field(
        default="cosine", metadata={"help": "Schedule of the learning rate."}
    )
    warmup_steps: float = field(
        default=0.1, metadata={"help": "Steps of linear warm-up, or, below 1, their share of all steps."}
    )
    # the default of TrainingArguments where torch is imported, which `--help` does not do
    optim: OptimizerNames | str = field(default="adamw_torch_fused", metadata={"help": "Optimiser."})
    max_length: int = field(
        default=1024,
        metadata={"help": "Tokens of an instance, passages included; a longer one is dropped and counted."},
    )
    train_on_passages: bool = field(
        default=False, metadata={"help": "Also train the tokens of retrieved passages (ablation)."}
    )
    supervision: str = field(default="co", metadata={"help": "co, ntp, nsp or separate (the paper's baseline)."})
    nsp_batch_size: int | None = field(
        default=None,
        metadata={"help": "Instances, over all ranks, whose passages are each other's negatives (GradCache)."},
    )
    max_tokens_per_micro_batch: int | None = field(
        default=None, metadata={"help": "With nsp_batch_size: cut micro-batches by tokens, not instances."}
    )
    gather: str = field(default="global", metadata={"help": "global, detached (the paper's code) or local."})
    mask_duplicates: bool = field(
        default=True, metadata={"help": "Identical passages are encoded once and are not each other's negatives."}
    )
    batch_sampler: str = field(
        default="batch_sampler", metadata={"help": "no_duplicates draws batches in which no passage is named twice."}
    )
    padding_free: bool | None = field(
        default=None, metadata={"help": "A micro-batch is one row without padding; defaults to what attention allows."}
    )
    freeze_gen: bool = field(default=False, metadata={"help": "Train Emb_seq alone."})
    freeze_emb_seq: bool = field(default=False, metadata={"help": "Train Gen alone; an index stays valid."})
    lr_decay_per_epoch: float | None = field(
        default=None, metadata={"help": "Multiply the learning rate by this after every epoch (paper: 0.85)."}
    )
    clip_gen_only: bool = field(default=False, metadata={"help": "Clip the gradients of Gen alone (paper)."})
    dataset_num_proc: int | None = field(default=None, metadata={"help": "Processes that tokenize the dataset."})

    def __post_init__(self) -> None:
        import torch
        from transformers.trainer_pt_utils import AcceleratorConfig

        if not torch.accelerator.is_available():
            self.use_cpu = True  # otherwise TrainingArguments refuses bf16 on a CPU
        # CoSupTrainer stops at a loss that is not finite; a check at every step would wait for the GPU
        self.logging_nan_inf_filter = False
        if self.ddp_find_unused_parameters is None:
            self.ddp_find_unused_parameters = False  # every part of the model takes part in every step
        if self.ddp_broadcast_buffers is None:
            self.ddp_broadcast_buffers = False  # rotary frequencies: constants
        super().__post_init__()
        self._check_choices()
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

    def _check_choices(self) -> None:
        for name, choices in CHOICES.items():
            value = getattr(self, name)
            if value not in choices:
                raise ValueError(f"{name} is {value!r}, expected one of {', '.join(map(repr, choices))}.")
        if self.nsp_batch_size is not None and (self.nsp_batch_size < 1 or self.nsp_batch_size % self.world_size):
            raise ValueError(
                f"nsp_batch_size={self.nsp_batch_size} must be a positive multiple of the number of ranks,"
                f" {self.world_size}."
            )
        if self.max_tokens_per_micro_batch is not None and self.nsp_batch_size is None:
            raise ValueError("max_tokens_per_micro_batch cuts the NSP batch of GradCache: give nsp_batch_size too.")

    @property
    def train_batch_size(self) -> int:
        """Instances that a rank loads at a time: its share of the NSP batch, or a micro-batch."""
        if self.nsp_batch_size is None:
            return super().train_batch_size
        return self.nsp_batch_size // self.world_size
