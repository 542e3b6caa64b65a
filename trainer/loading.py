"""How instances are loaded for training: their order, the size of batches, and where a resumed run goes on."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import datasets
import torch
from accelerate.data_loader import DataLoaderShard
from torch.utils.data import DataLoader, Sampler
from transformers import Trainer, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_pt_utils import LengthGroupedSampler

from modeling_cosup.files_cosup import read_json

from .dataset_setup import COLUMNS, OPTIONAL_COLUMNS, no_duplicates_sampler
from .distributed import world_size
from .duplicates import NoDuplicatesSampler
from .running import RunningFigures
from .training_args import CoSupTrainingArguments


class EpochLengthSampler(LengthGroupedSampler):
    """transformers' sampler of rows of similar length, whose order depends on a seed and the epoch alone."""

    def __init__(self, batch_size: int, lengths: list[int], seed: int) -> None:
        super().__init__(batch_size, lengths=lengths)
        self.seed, self.epoch = seed, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        self.generator = torch.Generator().manual_seed(self.seed + self.epoch)
        return super().__iter__()


class LoadingMixin(Trainer):
    """The part of [`CoSupTrainer`] that loads instances."""

    args: CoSupTrainingArguments
    data_collator: Any
    _running: RunningFigures
    _restart_candidates: Any
    _sampler: NoDuplicatesSampler | EpochLengthSampler | None = None  # one that must be told each epoch
    _first_step: int | None = None  # where the last attempt of auto_find_batch_size began, in this training

    def _init_training_state(
        self, max_steps: int, steps_per_epoch: int, num_epochs: int, checkpoint: Any, trial: Any
    ) -> tuple[int, int]:
        """
        Return the epochs and the batches of the next one that a checkpoint has behind it.

        `Trainer` takes a stream for one epoch, as it does not know when it ends. The state's `epoch` says more: its
        whole part counts passes, and the rest the batches of the current one, as a share of those of all steps. A
        share of 1 is the end of a run that stayed within its first pass: the next pass has not begun.
        """
        epochs, batches = super()._init_training_state(max_steps, steps_per_epoch, num_epochs, checkpoint, trial)
        self._first_step = self.state.global_step
        path = Path(checkpoint or "", TRAINER_STATE_NAME)
        is_stream = not isinstance(self.train_dataset, datasets.Dataset)
        if checkpoint is None or not is_stream or self.args.ignore_data_skip or not path.exists():
            return epochs, batches
        state = read_json(path)
        epochs = max(0, math.ceil(state["epoch"]) - 1)
        num_batches = state["max_steps"] * self.args.gradient_accumulation_steps
        return epochs, round((state["epoch"] - epochs) * num_batches)

    def _set_signature_columns_if_needed(self) -> None:
        self._signature_columns = COLUMNS + OPTIONAL_COLUMNS  # type: ignore[assignment]  # Trainer begins with None

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler | None:
        """
        Return the sampler. With `batch_sampler="no_duplicates"`, no batch over all ranks names a passage twice.

        The order of an epoch depends on the seed and its number, also after a resume and on all ranks.
        """
        dataset = self.train_dataset if train_dataset is None else train_dataset
        if self.args.batch_sampler == "no_duplicates":
            batch_size = self._loaded_batch_size * world_size()
            self._sampler = no_duplicates_sampler(dataset, self.args, batch_size)
            return self._sampler
        sampler = super()._get_train_sampler(train_dataset)
        if isinstance(sampler, LengthGroupedSampler):
            seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
            sampler = self._sampler = EpochLengthSampler(sampler.batch_size, sampler.lengths, seed)
        return sampler

    def get_train_dataloader(self) -> DataLoader:
        """Return `Trainer`'s loader, with NSP batches. It also tells our own samplers each epoch."""
        self._sampler = None
        micro_batch_size = self._train_batch_size
        self._train_batch_size = self._loaded_batch_size
        loader = super().get_train_dataloader()
        self._train_batch_size = micro_batch_size
        if self._sampler is not None:
            # otherwise the sampler would not get the epoch when a resumed run skips batches
            cast(DataLoaderShard, loader).set_sampler(self._sampler)
        return loader

    def get_total_train_batch_size(self, args: TrainingArguments) -> int:
        """Return the instances of an optimiser step, over all ranks."""
        return super().get_total_train_batch_size(args) // self._train_batch_size * self._loaded_batch_size

    @property
    def _loaded_batch_size(self) -> int:
        """Instances that a rank loads at a time. With `nsp_batch_size`, `_train_batch_size` counts a micro-batch's."""
        return self._train_batch_size if self.args.nsp_batch_size is None else self.args.train_batch_size

    def _update_auto_batch_size(self, batch_size: int) -> None:
        """
        Begin an attempt of `auto_find_batch_size`: the first one, or the next one after running out of memory.

        With `nsp_batch_size`, the micro-batch shrinks. The NSP batch stays the same, and so does the loss.
        """
        if self._first_step is not None and self.state.global_step > self._first_step:
            raise ValueError(
                f"auto_find_batch_size: memory ran out after step {self.state.global_step}, and another attempt would"
                f" begin at step {self._first_step} with weights that are trained already. Set"
                f" per_device_train_batch_size={batch_size} or less, and leave out auto_find_batch_size."
            )
        if self.args.nsp_batch_size is not None:
            batch_size = min(batch_size, self.args.per_device_train_batch_size)
            self.data_collator.max_instances = batch_size
        super()._update_auto_batch_size(batch_size)
        self._running.restart()  # the figures of an attempt that failed do not count
        self._restart_candidates()
