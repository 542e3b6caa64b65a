"""Arguments of CoSupTrainer that `TrainingArguments` does not have. λ, similarity and temperature belong to the model: see `CoSupConfig`."""

from dataclasses import dataclass, field

import torch
from transformers import TrainingArguments
from transformers.utils import logging

logger = logging.get_logger(__name__)


@dataclass
class CoSupTrainingArguments(TrainingArguments):
    """
    [`~transformers.TrainingArguments`] and:

    Args:
        max_length (`int`): tokens of an instance, passages included. A longer instance is dropped, counted and reported, never cut.
        train_on_passages (`bool`): also train the tokens of retrieved passages (an ablation of the paper; its main result masks them).
        mask_duplicates (`bool`): encode identical passages of a batch once and never count one as a negative of the other. The paper counted
            them.
        lr_decay_per_epoch (`float`, *optional*): multiply the learning rate by this after every epoch, in place of `lr_scheduler_type`; the
            paper's is 0.85.
        clip_gen_only (`bool`): clip the gradients of Gen alone to `max_grad_norm`, as the paper did.
        dataset_num_proc (`int`, *optional*): processes that tokenize the dataset.
    """

    max_length: int = field(default=1024, metadata={"help": "Tokens of an instance, passages included; a longer one is dropped and counted."})
    train_on_passages: bool = field(default=False, metadata={"help": "Also train the tokens of retrieved passages (ablation)."})
    mask_duplicates: bool = field(default=True, metadata={"help": "Identical passages are encoded once and are no negatives of each other."})
    lr_decay_per_epoch: float | None = field(default=None, metadata={"help": "Multiply the learning rate by this after every epoch (paper: 0.85)."})
    clip_gen_only: bool = field(default=False, metadata={"help": "Clip the gradients of Gen alone (paper)."})
    dataset_num_proc: int | None = field(default=None, metadata={"help": "Processes that tokenize the dataset."})

    def __post_init__(self):
        if not torch.accelerator.is_available():
            self.use_cpu = True  # TrainingArguments refuses bf16 on a CPU unless told that it is meant
        super().__post_init__()
        if self.n_gpu > 1:  # DataParallel cannot slice a batch whose passages are shared by its rows
            logger.warning(f"{self.n_gpu} GPUs are visible to one process: it uses the first. For all of them: accelerate launch --multi_gpu.")
            self._n_gpu = 1
        if self.accelerator_config.dispatch_batches is None:
            self.accelerator_config.dispatch_batches = False  # a batch has as many passages as it has, so no batch can be sliced for the ranks
