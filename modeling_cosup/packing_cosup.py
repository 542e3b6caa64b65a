"""Rows of token ids as tensors: padded, or packed one after another."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch


def pad_rows(
    rows: Sequence[Sequence[int]], value: int = 0, side: str = "right", device: torch.device | str | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Return lists of token ids as one tensor.

    Args:
        rows (`list[list[int]]`): may be empty, and so may each row.
        value (`int`): id of the padding.
        side (`str`): `"right"` or `"left"`, where the padding goes.

    Returns:
        `(ids, mask)`: `torch.LongTensor` of shape `(len(rows), longest)`, at least one column wide; the mask is 0 on
            padding.
    """
    width = max(map(len, rows), default=0) or 1
    ids = torch.full((len(rows), width), value, dtype=torch.long)
    mask = torch.zeros(len(rows), width, dtype=torch.long)
    for i, row in enumerate(rows):
        columns = slice(len(row)) if side == "right" else slice(width - len(row), width)
        ids[i, columns] = torch.tensor(row, dtype=torch.long)
        mask[i, columns] = 1
    return ids.to(device), mask.to(device)


@dataclass
class Packing:
    """
    Rows of different lengths, one after another in a single row `(1, L)` without padding.

    Args:
        position_ids (`torch.LongTensor` of shape `(1, L)`): start at 0 in each row.
        ends (`torch.LongTensor` of shape `(M,)`): columns of the last tokens of the rows, and of shorter rows that
            begin them.
    """

    position_ids: torch.Tensor
    ends: torch.Tensor
