"""
A separate learning rate for the rows of the control tokens (`control_token_lr`).

A parameter group holds whole parameters, and these rows are parts of matrices. So the optimiser takes its step, and
then the change of each row is scaled: row = before + control_token_lr / learning_rate · (after - before). This is the
step at `control_token_lr` if the optimiser's step is proportional to the learning rate and its state does not depend
on it, as in AdamW, SGD, Adafactor or Lion.
"""

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from modeling_cosup import CoSupForCausalLM

from .model_setup import control_token_ids, control_token_matrices
from .training_args import CoSupTrainingArguments

# of torch.optim: their step is not proportional to the learning rate
NOT_PROPORTIONAL = ("ASGD", "LBFGS", "Rprop")


@dataclass
class _Row:
    """A row that this process holds, before a step; `number` is its number in [`_local`] of the parameter."""

    parameter: torch.Tensor
    number: int
    before: torch.Tensor
    ratio: float


def trained_rows(model: CoSupForCausalLM) -> list[tuple[torch.Tensor, list[int]]]:
    """
    Return each trained parameter that has rows of control tokens, with the numbers of these rows.

    With PEFT, such rows are a parameter of their own, next to rows of other tokens (`trainable_token_indices`), or
    part of a copy of the matrix (`modules_to_save`).

    `model` is the one inside the `PeftModel`, if there is one.

    Raises:
        `ValueError`: when an adapter changes such a matrix: it has no weights for single rows.
    """
    ids = control_token_ids(model.config)
    candidates: list[tuple[torch.Tensor, list[int]]] = []
    for matrix in control_token_matrices(model):
        token_adapter: Any = getattr(matrix, "token_adapter", None)
        copies: Any = getattr(matrix, "modules_to_save", None)
        if token_adapter is not None:
            for name, rows_of_tokens in token_adapter.trainable_tokens_delta.items():
                tokens = token_adapter.token_indices[name]
                candidates.append((rows_of_tokens, [row for row, token in enumerate(tokens) if token in ids]))
        elif copies is not None:
            candidates += [(copy.weight, ids) for copy in copies.values()]
        elif hasattr(matrix, "base_layer"):
            raise ValueError(
                "control_token_lr needs rows that are trained as they are: leave embeddings and LM head out of"
                " target_modules (the rows of the control tokens are trained anyway)."
            )
        else:
            candidates.append((cast(torch.Tensor, matrix.weight), ids))
    return [(parameter, rows) for parameter, rows in candidates if parameter.requires_grad and rows]


def check_control_token_lr(model: CoSupForCausalLM) -> None:
    """Raise if no row of a control token is trained; see [`trained_rows`] for the model."""
    if not trained_rows(model):
        raise ValueError("control_token_lr: no row of a control token is trained, so nothing would use it.")


def check_rows_are_told_apart(model: CoSupForCausalLM, args: CoSupTrainingArguments) -> None:
    """
    Check that frozen weights do not leave control tokens with equal rows, as they were made.

    Raises:
        `ValueError`: for a Gen that is trained, such as by adapters, with new rows for `[Cs]` and `[CE]` that are not.
    """
    reads_with_gen = args.trains_ntp or model.config.query_from == "gen"
    is_trained = any(parameter.requires_grad for parameter in model.gen.parameters())
    if args.freeze_gen or not reads_with_gen or not is_trained:
        return
    matrices = {"embeddings": model.get_input_embeddings()}
    if args.trains_ntp:
        matrices["LM head"] = model.get_output_embeddings()
    for name, matrix in matrices.items():
        if any(parameter.requires_grad for parameter in matrix.parameters()):
            continue
        weight = cast(torch.Tensor, matrix.weight)
        if torch.equal(weight[model.config.cs_token_id], weight[model.config.ce_token_id]):
            raise ValueError(
                f"The rows of [Cs] and [CE] in Gen's {name} are as new, and they are not trained: Gen could never tell"
                " the two apart. For adapters, give CoSupTrainer the model without them and"
                " peft_config=LoraConfig(...), which trains these rows too; or name embeddings and LM head in the"
                " modules_to_save of your config. Without adapters, do not freeze embeddings and LM head."
            )


def set_control_token_lr(optimizer: Optimizer, model: CoSupForCausalLM, learning_rate: float) -> list[RemovableHandle]:
    """
    Let the steps of an optimiser move the rows of the control tokens at another learning rate.

    It follows the schedule of the parameter group that holds the rows: the ratio of the two is constant. The handles
    that are returned undo this.

    Args:
        optimizer (`torch.optim.Optimizer`): not one that wraps another.
        model ([`CoSupForCausalLM`]): see [`trained_rows`]. Its parameters may be replaced later, as FSDP2 does.
        learning_rate (`float`): of the rows, when the group has its initial one.

    Raises:
        `ValueError`: when the step of the optimiser is not proportional to its learning rate, or it holds no row.
    """
    name = type(optimizer).__name__
    is_schedule_free = callable(getattr(optimizer, "train", None))  # it keeps averages of the weights
    if is_schedule_free or name in NOT_PROPORTIONAL:
        raise ValueError(
            f"control_token_lr scales the optimizer's step, and a step of {name} is not proportional to its learning"
            " rate: choose another optimizer, such as AdamW."
        )
    held = _held_rows(optimizer, model)
    if not held:
        raise ValueError("control_token_lr: the optimizer holds no row of a control token, so nothing would use it.")
    if min(initial_rate for _, _, initial_rate in held) <= 0:
        raise ValueError("control_token_lr follows the schedule of learning_rate, which must be above 0.")
    rows: list[_Row] = []

    @torch.no_grad()
    def remember(*_: Any) -> None:
        rows.clear()
        for parameter, numbers, initial_rate in _held_rows(optimizer, model):
            for number in _local_numbers(parameter, numbers):
                before = _local(parameter)[number].clone()
                rows.append(_Row(parameter, number, before, learning_rate / initial_rate))

    @torch.no_grad()
    def scale(*_: Any) -> None:
        for row in rows:
            after = _local(row.parameter)[row.number]
            after.copy_(row.before.lerp(after, row.ratio))

    return [optimizer.register_step_pre_hook(remember), optimizer.register_step_post_hook(scale)]


def _held_rows(optimizer: Optimizer, model: CoSupForCausalLM) -> list[tuple[torch.Tensor, list[int], float]]:
    """Return the parameters of [`trained_rows`] that an optimiser holds, each with its initial learning rate."""
    group_of = {id(parameter): group for group in optimizer.param_groups for parameter in group["params"]}
    held = []
    for parameter, numbers in trained_rows(model):
        group = group_of.get(id(parameter))
        if group is not None:
            group.setdefault("initial_lr", group["lr"])  # most schedules have set it; ReduceLROnPlateau does not
            held.append((parameter, numbers, float(group["initial_lr"])))
    return held


def _local(parameter: torch.Tensor) -> torch.Tensor:
    """Return the part of a parameter that this process holds."""
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter


def _local_numbers(parameter: torch.Tensor, numbers: list[int]) -> list[int]:
    """Return which of these rows this process holds, as numbers within its part of the parameter."""
    if not isinstance(parameter, DTensor):
        return numbers
    start = 0
    for dim, placement in enumerate(parameter.placements):
        if placement.is_shard(0):  # rows are divided as torch.chunk divides them
            mesh = parameter.device_mesh
            start += mesh.get_local_rank(dim) * -(-len(parameter) // mesh.size(dim))
    stop = start + len(_local(parameter))
    return [number - start for number in numbers if start <= number < stop]
