"""Exchange objects and rows between ranks, with gradients, even if counts differ. Nothing happens in one process."""

import contextlib
from collections.abc import Iterator, Sequence
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

LONGEST_WAIT = timedelta(days=7)  # of a process for a slower one

T = TypeVar("T")


def world_size() -> int:
    """Return the number of ranks, 1 without a process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Return the number of this process, 0 without a process group."""
    return dist.get_rank() if world_size() > 1 else 0


def barrier() -> None:
    """Wait for all ranks."""
    if world_size() > 1:
        dist.barrier()


def host_group(timeout: timedelta | None = None) -> dist.ProcessGroup | None:
    """
    Return a process group for messages from host to host, which do not wait for a GPU.

    Returns `None`, for the default group, if that is already one. All ranks must call this together.
    """
    if world_size() == 1 or dist.get_backend() == "gloo":
        return None
    return dist.new_group(backend="gloo", timeout=timeout)


def gather_objects(value: T, group: dist.ProcessGroup | None = None) -> list[T]:
    """Return the `value` of every rank, in rank order."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value, group=group)
    return values


def broadcast_object(value: T, group: dist.ProcessGroup | None = None) -> T:
    """Return rank 0's `value` on every rank."""
    values = [value]
    if world_size() > 1:
        dist.broadcast_object_list(values, src=0, group=group)
    return values[0]


@contextlib.contextmanager
def failing_together(group: dist.ProcessGroup | None = None) -> Iterator[None]:
    """
    Wait for all ranks at the end of the block, and raise on all of them if the block has failed on one.

    Without it, ranks that go on would wait for the failed one until the process group times out. The block may not
    exchange anything itself.

    Raises:
        `RuntimeError`: names the error of another rank.
    """
    error = None
    try:
        yield
    except Exception as caught:
        error = caught
    messages = gather_objects(None if error is None else f"{type(error).__name__}: {error}", group)
    if error is not None:
        raise error
    for number, message in enumerate(messages):
        if message is not None:
            raise RuntimeError(f"Rank {number} has failed: {message}")


def gather_rows(rows: torch.Tensor, counts: Sequence[int], gather: str = "global") -> torch.Tensor:
    """
    Return the rows of all ranks, in rank order.

    Args:
        rows (`torch.Tensor` of shape `(M_r, ...)`): M_r may differ between ranks and be 0.
        counts (`list[int]`): M_r of each rank.
        gather (`str`, *optional*, defaults to `"global"`): `"global"`: gradients reach the rows of every rank, as if
            one process held them all. `"detached"`: the rows of other ranks are constants, as in the paper's code,
            which gives another gradient. `"local"`: this rank's rows alone.

    Returns:
        `torch.Tensor` of shape `(M, ...)`.
    """
    if len(counts) == 1 or gather == "local":
        return rows
    if gather == "global":
        return _GatherRows.apply(rows, counts)
    pieces = list(_all_gather(rows.detach(), counts))
    pieces[dist.get_rank()] = rows
    return torch.cat(pieces)


def _all_gather(rows: torch.Tensor, counts: Sequence[int]) -> tuple[torch.Tensor, ...]:
    """Return the rows of each rank. They are padded to the largest count for the exchange."""
    padded = rows.new_zeros(max(counts), *rows.shape[1:])
    padded[: len(rows)] = rows
    buffers = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(buffers, padded)
    return tuple(buffer[:count] for buffer, count in zip(buffers, counts, strict=True))


class _GatherRows(torch.autograd.Function):
    """
    all_gather; its backward sums the gradients of all ranks and keeps this rank's slice.

    That slice is the gradient of the sum of all ranks' losses.
    """

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, counts: Sequence[int]) -> torch.Tensor:
        rank = dist.get_rank()
        ctx.start = sum(counts[:rank])
        ctx.count = counts[rank]
        return torch.cat(_all_gather(rows, counts))

    # forward returns one tensor, so there is one gradient
    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:  # type: ignore[override]
        gradient = gradient.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(gradient)
        return gradient[ctx.start : ctx.start + ctx.count], None
