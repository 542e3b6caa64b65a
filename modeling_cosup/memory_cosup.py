"""A token memory in the decoding loop: which states of Gen it reads, and how it changes Gen's logits."""

from typing import Protocol, runtime_checkable

import torch


@runtime_checkable
class Memory(Protocol):
    """
    Interface of the memory that `generate()` and `generate_many()` take: any object with these three members.

    The loop calls `adjust` once for every decision, before logits processors and warpers: for the one token that a row
    forwarded, or for the last token of a prompt, a passage or a text that it read. A row that takes its `[NSP]` back
    decides again from the same logits; they are not adjusted twice.

    Attributes:
        states (`tuple[str, ...]`): names of submodules of Gen, such as `"model.layers.1.mlp"`; `adjust` gets what
            enters them.
        fingerprint (`str`): tells this memory from any other; generate_many() stores it in `output_file`.
    """

    states: tuple[str, ...]
    fingerprint: str

    def adjust(self, logits: torch.Tensor, states: dict[str, torch.Tensor]) -> torch.Tensor:
        """
        Adjust the logits of R decisions.

        The result of a row must not depend on the other rows: some of them belong to no sequence and are not used.

        Args:
            logits (`torch.FloatTensor` of shape `(R, V)`): Gen's, in float32; must not be changed in place.
            states (`dict[str, torch.Tensor]`): by name, what entered each submodule of `states` at these positions,
                `(R, h)`, in Gen's dtype.

        Returns:
            `torch.FloatTensor` of shape `(R, V)`: logits, or log-probabilities, in float32.
        """
        ...


def check_memory(memory: object) -> None:
    """
    Check that `memory` has the members of [`Memory`].

    Raises:
        `TypeError`: when one is missing or has another type.
    """
    if not isinstance(memory, Memory):
        missing = [name for name in ("states", "fingerprint", "adjust") if not hasattr(memory, name)]
        kind = type(memory).__name__
        raise TypeError(f"memory is a {kind}, which has no {', no '.join(missing)}: see Memory in memory_cosup.py.")
    if not isinstance(memory.states, tuple) or not all(isinstance(name, str) for name in memory.states):
        raise TypeError(f"memory.states is {memory.states!r}, expected a tuple of names of submodules of Gen.")
    if not isinstance(memory.fingerprint, str):
        raise TypeError(f"memory.fingerprint is {memory.fingerprint!r}, expected a string.")


def adjusted(memory: Memory, logits: torch.Tensor, states: dict[str, torch.Tensor] | None) -> torch.Tensor:
    """
    Return the logits `(R, V)` as `memory` adjusts them; the loop calls `adjust` only here.

    Raises:
        `ValueError`: when it returns something of another shape or dtype.
    """
    result = memory.adjust(logits.float(), states or {})
    if result.shape != logits.shape or result.dtype != torch.float32:
        raise ValueError(
            f"{type(memory).__name__}.adjust returned {tuple(result.shape)} in {result.dtype},"
            f" expected {tuple(logits.shape)} in torch.float32."
        )
    return result
