"""Rows of all ranks with gradients, ragged counts and ranks without rows included. One process: nothing happens."""

import torch
import torch.distributed as dist


def world_size():
    """Number of ranks, 1 without a process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def gather_rows(rows):
    """
    The rows of all ranks, in rank order, with gradients to every rank's own rows.

    Args:
        rows (`torch.Tensor` of shape `(M_r, ...)`): M_r may differ between ranks and be 0.

    Returns:
        `(torch.Tensor of shape (M, ...), int)`: all rows, and where this rank's begin.
    """
    if world_size() == 1:
        return rows, 0
    count = torch.tensor([len(rows)], device=rows.device)
    counts = [torch.empty_like(count) for _ in range(world_size())]
    dist.all_gather(counts, count)
    counts = [int(count) for count in counts]
    return _GatherRows.apply(rows, counts), sum(counts[: dist.get_rank()])


class _GatherRows(torch.autograd.Function):
    """all_gather forward; backward sums every rank's gradient and keeps this rank's slice: the gradient of the sum of all ranks' losses."""

    @staticmethod
    def forward(ctx, rows, counts):
        rank = dist.get_rank()
        ctx.start, ctx.count = sum(counts[:rank]), counts[rank]
        padded = rows.new_zeros(max(counts), *rows.shape[1:])
        padded[: len(rows)] = rows
        buffers = [torch.empty_like(padded) for _ in counts]
        dist.all_gather(buffers, padded)
        return torch.cat([buffer[:count] for buffer, count in zip(buffers, counts, strict=True)])

    @staticmethod
    def backward(ctx, gradient):
        gradient = gradient.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(gradient)
        return gradient[ctx.start : ctx.start + ctx.count], None
