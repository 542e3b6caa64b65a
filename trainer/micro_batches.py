"""The tensors of a micro-batch: how rows are laid out in them, and how they are read again."""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from modeling_cosup.packing_cosup import Packing, pad_rows


def lay_out(
    rows: Sequence[Sequence[int]], pad_token_id: int, packed: bool
) -> tuple[dict[str, torch.Tensor], list[int]]:
    """Return rows as one padded tensor, or packed into a single row, and where each begins in the flattened tensor."""
    if not packed:
        input_ids, _ = pad_rows([list(row) for row in rows], pad_token_id)  # (B, T)
        return {"input_ids": input_ids}, [i * input_ids.shape[1] for i in range(len(rows))]
    lengths = [len(row) for row in rows]
    tokens = list(itertools.chain.from_iterable(rows))
    input_ids = torch.tensor([tokens], dtype=torch.long)  # (1, T)
    position_ids = torch.cat([torch.arange(length) for length in lengths])[None]  # (1, T)
    offsets = [0, *itertools.accumulate(lengths[:-1])]
    return {"input_ids": input_ids, "position_ids": position_ids}, offsets


def flat_positions(offsets: Sequence[int], columns: Sequence[Sequence[int]]) -> torch.Tensor:
    """Return `(K,)`: the positions, in the flattened tensor, of the given columns of each row."""
    positions = []
    for offset, row_columns in zip(offsets, columns, strict=True):
        positions += [offset + column for column in row_columns]
    return torch.tensor(positions, dtype=torch.long)


def forward_arguments(micro_batch: Mapping[str, Any]) -> dict[str, Any]:
    """
    Return the arguments of `CoSupForCausalLM.forward` for a micro-batch.

    A micro-batch is a flat `dict` of tensors, which every library can pin, move and copy. Tensors that belong together
    become one argument here.

    Args:
        micro_batch (`dict[str, torch.Tensor]`): as [`CoSupDataCollator`] returns it.

    Returns:
        `dict`: the same tensors without `first_pass`; for packed passages or queries, `passage_packing` or
            `query_packing` in place of their position ids and ends.
    """
    arguments = {name: tensor for name, tensor in micro_batch.items() if name != "first_pass"}
    for encoder_input in ("passage", "query"):
        if f"{encoder_input}_ends" in arguments:
            position_ids = arguments.pop(f"{encoder_input}_position_ids")
            ends = arguments.pop(f"{encoder_input}_ends")
            arguments[f"{encoder_input}_packing"] = Packing(position_ids, ends)
    return arguments


def query_rows(micro_batch: Mapping[str, Any]) -> list[list[int]]:
    """Return the tokens that each query embedding of a micro-batch is made from, the last of them `[NSP]`."""
    if "query_input_ids" in micro_batch:
        return encoder_rows(micro_batch, "query")
    if "nsp_positions" not in micro_batch:
        return []
    return _rows_up_to(micro_batch["nsp_positions"], micro_batch["input_ids"], micro_batch.get("position_ids"))


def encoder_rows(micro_batch: Mapping[str, Any], prefix: str) -> list[list[int]]:
    """Return the rows that an encoder reads in a micro-batch, `prefix` being `"passage"` or `"query"`."""
    if f"{prefix}_input_ids" not in micro_batch:
        return []
    input_ids = micro_batch[f"{prefix}_input_ids"]
    if f"{prefix}_ends" in micro_batch:
        return _rows_up_to(micro_batch[f"{prefix}_ends"], input_ids, micro_batch[f"{prefix}_position_ids"])
    if not len(input_ids):
        return []
    ends = torch.arange(len(input_ids), device=input_ids.device) * input_ids.shape[1] - 1
    ends += micro_batch[f"{prefix}_attention_mask"].sum(1)  # padding is on the right
    return _rows_up_to(ends, input_ids, None)


def _rows_up_to(ends: torch.Tensor, input_ids: torch.Tensor, position_ids: torch.Tensor | None) -> list[list[int]]:
    """
    Return the tokens of a row up to each of some positions.

    Args:
        ends (`torch.LongTensor` of shape `(N,)`): positions in the flattened `input_ids`.
        input_ids (`torch.LongTensor` of shape `(B, T)`): rows, or several rows packed into one.
        position_ids (`torch.LongTensor` of shape `(1, T)`, *optional*): of packed rows; they restart at 0 in each.
    """
    columns = ends % input_ids.shape[1] if position_ids is None else position_ids.flatten()[ends]
    tokens = input_ids.flatten().tolist()
    rows = []
    for end, column in zip(ends.tolist(), columns.tolist(), strict=True):
        rows.append(tokens[end - column : end + 1])
    return rows
