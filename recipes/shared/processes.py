"""Start and end of the processes of a launch that embeds or judges."""

import contextlib
import os
from collections.abc import Iterator

import torch
from accelerate import PartialState

from modeling_cosup.numbers_cosup import COUNT, check_number
from trainer.distributed import LONGEST_WAIT, failing_together, world_size


def processes() -> PartialState:
    """
    Return the state of the processes of this launch.

    A process may wait for days for a slower one. If another process dies, it notices immediately.

    Raises:
        `ValueError`: if accelerate does not see as many processes as were launched.
    """
    state = PartialState(cpu=not torch.accelerator.is_available(), timeout=LONGEST_WAIT)
    launched = int(os.environ.get("WORLD_SIZE", 1))
    if state.num_processes != launched:
        raise ValueError(
            f"{launched} processes were launched, accelerate sees {state.num_processes}: "
            "each would do all of the work."
        )
    return state


def set_cpu_threads(num_threads: int | None, use_cpu: bool = False) -> None:
    """
    Set the threads of torch: as many as were asked for or, in a single process on a CPU, one for each core.

    `accelerate launch` leaves a process one thread, unless OMP_NUM_THREADS says another number. Several processes
    share the cores, so each keeps its threads. For one thread, give `--num_threads 1`.

    Args:
        num_threads (`int`, *optional*): of `--num_threads`.
        use_cpu (`bool`): the process does not use the GPU that is there.

    Raises:
        `ValueError`: if it is not 1 or more.
    """
    if num_threads is not None:
        check_number("--num_threads", num_threads, COUNT)
        torch.set_num_threads(num_threads)
        return
    on_cpu = use_cpu or not torch.accelerator.is_available()
    was_launched = "ACCELERATE_USE_CPU" in os.environ  # which `accelerate launch` sets
    if on_cpu and was_launched and os.environ.get("WORLD_SIZE", "1") == "1" and torch.get_num_threads() == 1:
        torch.set_num_threads(num_cores())


def num_cores() -> int:
    """Return how many cores this process may use."""
    if hasattr(os, "sched_getaffinity"):  # not on macOS and Windows
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


@contextlib.contextmanager
def waiting_for_the_slowest() -> Iterator[None]:
    """
    Wait for all processes at the end of the block, for days if need be, and raise on all if it has failed on one.

    In a collective of training they would wait no longer than `ddp_timeout`, which is half an hour.
    """
    if world_size() == 1:
        yield
        return
    group = torch.distributed.new_group(backend="gloo", timeout=LONGEST_WAIT)
    try:
        with failing_together(group):
            yield
    finally:
        torch.distributed.destroy_process_group(group)


def end_processes() -> None:
    """Wait for the other processes, then leave the process group, if there is one."""
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
