"""The options of recipes that generate with a token memory."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # a recipe that only prints its options does not wait for torch
    from modeling_cosup import CoSupForCausalLM, MemoryConfig

FIELDS = {  # option -> field of MemoryConfig
    "memory_weight": "weight",
    "grounded_memory_weight": "grounded_weight",
    "memory_k": "k",
    "memory_temperature": "temperature",
}


@dataclass(kw_only=True)
class MemoryOptions:
    """The token memory, and how it joins Gen's distribution; what is left out is as the memory's own config says."""

    memory: str | None = field(
        default=None,
        metadata={"local_or_hub": True, "help": "name or path of a token memory of the model: KNNMemory or MLPMemory"},
    )
    memory_weight: float | None = field(default=None, metadata={"help": "weight of the memory, from 0 to 1"})
    grounded_memory_weight: float | None = field(
        default=None, metadata={"help": "its weight in grounded text, between [Cs] and [CE]"}
    )
    memory_k: int | None = field(default=None, metadata={"help": "neighbours of a KNNMemory"})
    memory_temperature: float | None = field(
        default=None, metadata={"help": "divides the squared distances of a KNNMemory, the logits of an MLPMemory"}
    )

    def __post_init__(self) -> None:
        given = [name for name in FIELDS if getattr(self, name) is not None]
        if given and self.memory is None:
            raise ValueError(f"--{given[0]} without --memory: name the memory.")


def open_memory(model: CoSupForCausalLM, options: MemoryOptions, **load_options: Any) -> dict[str, Any]:
    """
    Load the memory of a recipe; `load_options` are of `load_memory`.

    Returns:
        `dict`: `memory` and `memory_config` for generate(); empty without a memory.

    Raises:
        `ValueError`: for a memory of another model, a value that is out of range, and `memory_k` for a memory without
            neighbours.
        `OSError`: for a missing folder or repository.
    """
    if options.memory is None:
        return {}
    memory = model.load_memory(options.memory, **load_options)
    if options.memory_k is not None and not hasattr(memory, "nearest"):
        kind = type(memory).__name__
        raise ValueError(f"--memory_k {options.memory_k}: {options.memory} is an {kind}, which has no neighbours.")
    return {"memory": memory, "memory_config": call_config(memory, options)}


def call_config(memory: Any, options: Any) -> MemoryConfig:
    """Return a memory's config; the options of a recipe that were given (see `FIELDS`) replace its values."""
    values = {name: getattr(options, option, None) for option, name in FIELDS.items()}
    given = {name: value for name, value in values.items() if value is not None}
    return replace(memory.memory_config, **given)
