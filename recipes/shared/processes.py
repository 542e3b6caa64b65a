"""The processes of a launch that embeds or judges: where they begin and where they end."""

import os
from datetime import timedelta

import torch
from accelerate import PartialState


def processes() -> PartialState:
    """
    The processes of this launch; one may wait long for a slower one, and notices at once when one dies.

    Raises:
        `ValueError`: when accelerate sees another number of them than was launched.
    """
    state = PartialState(cpu=not torch.accelerator.is_available(), timeout=timedelta(days=7))
    launched = int(os.environ.get("WORLD_SIZE", 1))
    if state.num_processes != launched:
        message = f"{launched} processes were launched, accelerate sees {state.num_processes}"
        raise ValueError(f"{message}: each would do all of the work.")
    return state


def end_processes() -> None:
    """Wait for the others, then leave the process group, if there is one."""
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
