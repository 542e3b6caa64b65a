"""What goes wrong in a run, said clearly: losses that are no numbers, memory that is too small, checkpoints that were not written to their end."""

import contextlib
import os
import zipfile
from pathlib import Path

import torch

from modeling_cosup.files_cosup import read_json


class FiniteLosses:
    """
    Stops a run at the first loss that is NaN or infinite, naming step, loss and instances.

    On a CPU at once, before the backward pass. On a GPU the answer travels to the host during the
    computation and is read at the next step, log or checkpoint: no step waits for it, and no checkpoint holds what came of it.
    """

    def __init__(self):
        self._pending = []

    def add(self, step, name, finite, instance_ids):
        """
        Look at whether losses are finite.

        Args:
            step (`int`): optimiser steps taken.
            name (`str`): what is looked at, e.g. `"ntp_loss"`.
            finite (`torch.BoolTensor` of shape `(n,)`): whether they are.
            instance_ids (`list[list[str]]`): of the instances that each of them comes from.

        Raises:
            `FloatingPointError`.
        """
        arrived, device = None, finite.device
        if device.type != "cpu":
            finite = torch.empty(finite.shape, dtype=torch.bool, pin_memory=True).copy_(finite, non_blocking=True)
            arrived = torch.get_device_module(device).Event()
            arrived.record()
        if self._pending and self._pending[0][1] < step:
            self.check()
        self._pending.append((arrived, step, name, finite, instance_ids))
        if arrived is None:
            self.check()

    def check(self):
        """Read what has not been read yet; see [`~FiniteLosses.add`]."""
        pending, self._pending = self._pending, []
        for arrived, step, name, finite, instance_ids in pending:
            if arrived is not None:
                arrived.synchronize()
            if bool(finite.all()):
                continue
            ids = dict.fromkeys(
                id for ok, each in zip(finite.tolist(), instance_ids, strict=False) if not ok for id in each
            )
            shown = ", ".join(map(repr, list(ids)[:16])) + (f" and {len(ids) - 16} more" if len(ids) > 16 else "")
            raise FloatingPointError(
                f"Step {step + 1}: the {name} is NaN or infinite, in or among the instances {shown or 'of another rank'}. No later checkpoint was"
                " written. Lower learning_rate or max_grad_norm, or use bf16 in place of fp16; then resume from the last checkpoint."
            )


@contextlib.contextmanager
def explained_memory_errors(args):
    """
    Say which arguments lower the memory of a step when it runs out.

    Raises:
        `torch.OutOfMemoryError`: also for what a CPU's allocator raises.
    """
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        if not isinstance(error, torch.OutOfMemoryError | MemoryError) and "allocate memory" not in str(error):
            raise
        if args.nsp_batch_size is None:
            knobs = [
                f"nsp_batch_size={args.train_batch_size * args.world_size} with a per_device_train_batch_size below {args.per_device_train_batch_size}"
            ]
            knobs[0] += " (GradCache: the same gradients in less memory)"
        elif args.max_tokens_per_micro_batch is None:
            knobs = [
                f"a per_device_train_batch_size below {args.per_device_train_batch_size}, or max_tokens_per_micro_batch"
            ]
        else:
            knobs = [f"a max_tokens_per_micro_batch below {args.max_tokens_per_micro_batch}"]
        knobs += ["gradient_checkpointing"] * (not args.gradient_checkpointing) + ["bf16"] * (
            not (args.bf16 or args.fp16)
        )
        knobs += [f"a max_length below {args.max_length}", "LoRA (peft_config) or freeze_emb_seq for optimiser states"]
        raise torch.OutOfMemoryError(
            f"{error}\nOut of memory in a training step. What lowers it: {'; '.join(knobs)}."
        ) from error


def last_complete_checkpoint(output_dir):
    """
    The last `checkpoint-<step>` of a run that was written to its end: a process that is killed while it saves leaves half
    of one.

    Args:
        output_dir (`str`): of the run.

    Returns:
        `str`.

    Raises:
        `ValueError`: when there is none.
    """
    folders = [
        path for path in Path(output_dir).glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdigit()
    ]
    for folder in sorted(folders, key=lambda path: -int(path.name.removeprefix("checkpoint-"))):
        if _is_complete(folder):
            return str(folder)
    raise ValueError(f"{output_dir} holds no complete checkpoint to resume from.")


def _is_complete(folder):
    """The state file is written last; what torch wrote before it is a readable archive, optimiser and schedule among it."""
    try:
        read_json(folder / "trainer_state.json")
    except (OSError, ValueError):
        return False
    if not any(folder.glob("scheduler.pt")) and not any(
        folder.glob("global_step*")
    ):  # weights alone; DeepSpeed has a folder of its own
        return False
    return all(
        os.path.getsize(path) and zipfile.is_zipfile(path)
        for pattern in ("*.pt", "*.pth")
        for path in folder.glob(pattern)
    )
