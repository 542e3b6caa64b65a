"""Start and end of the processes of a launch that embeds or judges."""

import os
from datetime import timedelta

import torch
from accelerate import PartialState


def processes() -> PartialState:
    """
    Return the state of the processes of this launch.

    A process may wait for days for a slower one. If another process dies, it notices immediately.

    Raises:
        `ValueError`: if accelerate does not see as many processes as were launched.
    """
    state = PartialState(cpu=not torch.accelerator.is_available(), timeout=timedelta(days=7))
    launched = int(os.environ.get("WORLD_SIZE", 1))
    if state.num_processes != launched:
        raise ValueError(
            f"{launched} processes were launched, accelerate sees {state.num_processes}: "
            "each would do all of the work."
        )
    return state


def end_processes() -> None:
    """Wait for the other processes, then leave the process group, if there is one."""
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
