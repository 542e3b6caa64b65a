"""Clear errors for what goes wrong in a run: losses that are not finite, too little memory or disk, broken saves."""

import contextlib
import errno
import os
import shutil
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from modeling_cosup.files_cosup import read_json

if TYPE_CHECKING:
    from .training_args import CoSupTrainingArguments


@dataclass
class _Pending:
    """A check whose answers are on their way to the host; `arrived` is an event of the device, `None` on a CPU."""

    arrived: torch.Event | None
    step: int
    name: str
    finite: torch.Tensor
    instance_ids: Sequence[Sequence[str]]


class FiniteLosses:
    """
    A check that stops a run at the first loss that is NaN or infinite, naming step, loss and instances.

    On a CPU this happens immediately, before the backward pass. On a GPU the answer travels to the host while the GPU
    computes, and is read at the next step, log or checkpoint: no step waits for it, and no checkpoint is written after
    such a loss.
    """

    def __init__(self) -> None:
        self._pending: list[_Pending] = []

    def add(self, step: int, name: str, finite: torch.Tensor, instance_ids: Sequence[Sequence[str]]) -> None:
        """
        Check whether losses are finite.

        Args:
            step (`int`): optimiser steps taken.
            name (`str`): what is checked, e.g. `"ntp_loss"`.
            finite (`torch.BoolTensor` of shape `(n,)`): whether each loss is finite.
            instance_ids (`list[list[str]]`): for each loss, the ids of its instances.

        Raises:
            `FloatingPointError`: on a CPU for these losses, on a GPU for those of earlier steps.
        """
        arrived = None
        device = finite.device
        if device.type != "cpu":
            finite = torch.empty(finite.shape, dtype=torch.bool, pin_memory=True).copy_(finite, non_blocking=True)
            arrived = torch.get_device_module(device).Event()
            arrived.record()
        if self._pending and self._pending[0].step < step:
            self.check()
        self._pending.append(_Pending(arrived, step, name, finite, instance_ids))
        if arrived is None:
            self.check()

    def check(self) -> None:
        """Read all answers that have not been read yet; raise `FloatingPointError` if a loss was not finite."""
        pending = self._pending
        self._pending = []
        for answer in pending:
            if answer.arrived is not None:
                answer.arrived.synchronize()
            if bool(answer.finite.all()):
                continue
            raise FloatingPointError(
                f"Step {answer.step + 1}: the {answer.name} is NaN or infinite, in or among the instances"
                f" {_shown_ids(answer)}. No later checkpoint was written. Lower learning_rate or max_grad_norm, or use"
                " bf16 in place of fp16; then resume from the last checkpoint."
            )


def _shown_ids(answer: _Pending, limit: int = 16) -> str:
    """Return, as text, the ids of the instances whose losses are not finite."""
    ids: dict[str, None] = {}  # in order, each once
    for finite, instance_ids in zip(answer.finite.tolist(), answer.instance_ids, strict=False):
        if not finite:
            ids |= dict.fromkeys(instance_ids)
    if not ids:
        return "of another rank"
    shown = ", ".join(repr(id) for id in list(ids)[:limit])
    return f"{shown} and {len(ids) - limit} more" if len(ids) > limit else shown


@contextlib.contextmanager
def explained_memory_errors(args: "CoSupTrainingArguments", evaluates: bool = False) -> Iterator[None]:
    """
    Add to an out-of-memory error which arguments lower the memory of a training step, or of an evaluation.

    An error of an evaluation in a training is explained once.

    Raises:
        `torch.OutOfMemoryError`: also if the allocator of a CPU raised another type of error.
    """
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        is_memory_error = isinstance(error, torch.OutOfMemoryError | MemoryError)
        # what a CPU's allocator and auto_find_batch_size say
        if not is_memory_error and not any(text in str(error) for text in ("allocate memory", "No executable batch")):
            raise
        if "\nOut of memory in " in str(error):  # explained already
            raise
        place = "an evaluation" if evaluates else "a training step"
        savers = "; ".join(_memory_savers(args, evaluates))
        raise torch.OutOfMemoryError(f"{error}\nOut of memory in {place}. What lowers it: {savers}.") from error


def _memory_savers(args: "CoSupTrainingArguments", evaluates: bool) -> list[str]:
    """Return the changes to arguments that lower the memory of a step or an evaluation, the most useful first."""
    smaller_batch = f"a per_device_train_batch_size below {args.per_device_train_batch_size}"
    if args.nsp_batch_size is None and evaluates:
        savers = [f"a per_device_eval_batch_size below {args.per_device_eval_batch_size}"]
    elif args.nsp_batch_size is None:
        nsp_batch_size = args.train_batch_size * args.world_size
        savers = [
            f"nsp_batch_size={nsp_batch_size} with {smaller_batch} (GradCache: the same gradients in less memory)"
        ]
    elif args.max_tokens_per_micro_batch is None:
        savers = [f"{smaller_batch}, or max_tokens_per_micro_batch"]
    else:
        savers = [f"a max_tokens_per_micro_batch below {args.max_tokens_per_micro_batch}"]
    if not args.gradient_checkpointing and not evaluates:
        savers.append("gradient_checkpointing")
    if not args.bf16 and not args.fp16:
        savers.append("bf16")
    savers.append(f"a max_length below {args.max_length}")
    if args.candidates_from is not None:
        savers.append(f"a num_candidates below {args.num_candidates}: each is read, and encoded where it is distilled")
    if not evaluates:
        savers.append("LoRA (peft_config) or, with two towers, freeze_emb_seq, for optimiser states")
    return savers


class FullDiskError(OSError):
    """The disk is full: a save was undone, and the message says what is left."""


@contextlib.contextmanager
def explained_full_disk(folder: Path, output_dir: str | Path, undo: Callable[[], None]) -> Iterator[None]:
    """
    Undo a save that fails because the disk is full.

    Args:
        folder (`Path`): what is being saved.
        output_dir (`str` or `Path`): of the run, with its checkpoints.
        undo (`Callable`): removes what the save has written.

    Raises:
        `FullDiskError`: in place of the error of the library that was writing.
    """
    try:
        yield
    except Exception as error:
        if not is_full_disk(error):
            raise
        undo()
        if isinstance(error, FullDiskError):  # of a save that is part of this one
            raise
        free = shutil.disk_usage(output_dir).free
        try:
            kept = f"the last complete checkpoint is {last_complete_checkpoint(output_dir)}"
        except ValueError:
            kept = f"{output_dir} has no complete checkpoint"
        raise FullDiskError(
            f"{folder} was not saved: the disk is full or cannot be written ({free / 1e6:,.1f} MB are free)."
            f" What had been written was removed; {kept}. Free space (save_total_limit and save_only_model need less),"
            " then resume."
        ) from error


def is_full_disk(error: BaseException) -> bool:
    """Return whether a write failed because the disk, or the user's share of it, is full."""
    if isinstance(error, OSError):
        return isinstance(error, FullDiskError) or error.errno in (errno.ENOSPC, errno.EDQUOT)
    text = str(error)
    # safetensors has the system's error as text; torch.save says only that its file is short, or does not close
    return any(part in text for part in ("No space left on device", "unexpected pos", "iostream error"))


def last_complete_checkpoint(output_dir: str | Path) -> str:
    """
    Return the last complete `checkpoint-<step>` of a run.

    A process that is killed while it saves leaves an incomplete one.

    Args:
        output_dir (`str` or `Path`): of the run.

    Raises:
        `ValueError`: if there is none.
    """
    folder_of_step = {}
    for folder in Path(output_dir).glob("checkpoint-*"):
        number = folder.name.removeprefix("checkpoint-")
        if number.isdigit():
            folder_of_step[int(number)] = folder
    for step in sorted(folder_of_step, reverse=True):
        if _is_complete(folder_of_step[step]):
            return str(folder_of_step[step])
    raise ValueError(f"{output_dir} holds no complete checkpoint to resume from.")


def _is_complete(folder: Path) -> bool:
    """Return whether the state file, which is written last, exists, and the files of torch are readable archives."""
    try:
        read_json(folder / "trainer_state.json")
    except (OSError, ValueError):
        return False
    has_schedule = any(folder.glob("scheduler.pt"))
    has_deepspeed_state = any(folder.glob("global_step*"))
    if not has_schedule and not has_deepspeed_state:  # weights alone
        return False
    for path in (*folder.glob("*.pt"), *folder.glob("*.pth")):
        if not os.path.getsize(path) or not zipfile.is_zipfile(path):
            return False
    return True


def lone_queries(step: int, num_lone: int, num_queries: int, is_local: bool) -> str:
    """
    Return the warning of a step in which queries have no negative.

    Args:
        step (`int`): its number, from 1.
        num_lone (`int`): queries without a negative.
        num_queries (`int`): all queries.
        is_local (`bool`): whether the passages of other ranks are no negatives.
    """
    remedies = "a larger per_device_train_batch_size, or nsp_batch_size (GradCache: the same memory)"
    if is_local:
        remedies += ", or gather='global'"
    return (
        f"Step {step}: {num_lone} of {num_queries} queries have no negative, because their batch holds no passage that"
        " is wrong for them. Such queries teach nothing; here and later, nsp_loss and nsp_accuracy leave them out."
        f" What gives them negatives: {remedies}."
    )
