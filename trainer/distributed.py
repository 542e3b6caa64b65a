"""Rows of all ranks with gradients, ragged counts and ranks without rows included. One process: nothing happens."""

import torch
import torch.distributed as dist


def world_size():
    """Number of ranks, 1 without a process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank():
    """This process' number, 0 without a process group."""
    return dist.get_rank() if world_size() > 1 else 0


def barrier():
    """Wait for all ranks."""
    if world_size() > 1:
        dist.barrier()


def host_group(timeout=None):
    """A process group for what ranks tell each other from the host, so that no GPU is waited for; all ranks must ask for it together."""
    return (
        None if world_size() == 1 or dist.get_backend() == "gloo" else dist.new_group(backend="gloo", timeout=timeout)
    )


def gather_objects(value, group=None):
    """`value` of every rank, in rank order: `list`."""
    values = [None] * world_size()
    if world_size() == 1:
        return [value]
    dist.all_gather_object(values, value, group=group)
    return values


def broadcast_object(value, group=None):
    """Rank 0's `value`, on every rank."""
    values = [value]
    if world_size() > 1:
        dist.broadcast_object_list(values, src=0, group=group)
    return values[0]


def gather_rows(rows, counts, gather="global"):
    """
    The rows of all ranks, in rank order.

    Args:
        rows (`torch.Tensor` of shape `(M_r, ...)`): M_r may differ between ranks and be 0.
        counts (`list[int]`): M_r of each rank.
        gather (`str`): `"global"`: with gradients to every rank's own rows, as if one process held them all. `"detached"`: the other ranks' rows are
            constants (what the paper's code did; its gradient is another one). `"local"`: this rank's rows alone.

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


def _all_gather(rows, counts):
    """The rows of each rank, `tuple[torch.Tensor]`; ragged counts are padded on the way."""
    padded = rows.new_zeros(max(counts), *rows.shape[1:])
    padded[: len(rows)] = rows
    buffers = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(buffers, padded)
    return tuple(buffer[:count] for buffer, count in zip(buffers, counts, strict=True))


class _GatherRows(torch.autograd.Function):
    """all_gather forward; backward sums every rank's gradient and keeps this rank's slice: the gradient of the sum of all ranks' losses."""

    @staticmethod
    def forward(ctx, rows, counts):
        rank = dist.get_rank()
        ctx.start, ctx.count = sum(counts[:rank]), counts[rank]
        return torch.cat(_all_gather(rows, counts))

    @staticmethod
    def backward(ctx, gradient):
        gradient = gradient.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(gradient)
        return gradient[ctx.start : ctx.start + ctx.count], None
