"""
A token memory beside the LM head: what it is asked, how it is weighted, and how its distribution joins Gen's.

The mixture (Khandelwal et al., 2020) leaves out some ids C: the control tokens and the ids that end a row. Their
probabilities stay Gen's, so that no memory silences retrieval:

    p(v) = p_LM(v)                                                      for v in C
    p(v) = (1 - w) p_LM(v) + w (1 - P_LM(C)) p_mem(v | v not in C)      elsewhere

w is the weight of the memory; it is 0 where the memory has nothing outside C.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from numbers import Integral, Real
from os import PathLike
from typing import Any, Protocol, runtime_checkable

import torch

_MEMBERS = ("states", "fingerprint", "memory_config", "log_probs", "check_model")


@dataclass(frozen=True)
class MemoryConfig:
    """
    How a memory joins Gen's distribution.

    Args:
        weight (`float`): of the memory, from 0 (Gen alone) to 1. At 0 the memory is not asked.
        k (`int`): neighbours of a [`KNNMemory`]; all of its entries if it has fewer. An [`MLPMemory`] has none.
        temperature (`float`): divides the squared distances of a [`KNNMemory`], or the logits of an [`MLPMemory`].
        grounded_weight (`float`, *optional*): the weight between `[Cs]` and `[CE]`, where the text rests on a passage.
            Defaults to `weight`.
        output_neighbors (`int`): entries to return for each decoded token, the nearest first. The memory is asked once
            more for them.

    Raises:
        `ValueError`: names a value that is out of range or of another type.
    """

    weight: float = 0.25
    k: int = 1024
    temperature: float = 1.0
    grounded_weight: float | None = None
    output_neighbors: int = 0

    def __post_init__(self) -> None:
        _check_weight("weight", self.weight)
        if self.grounded_weight is not None:
            _check_weight("grounded_weight", self.grounded_weight)
        temperature = self.temperature
        if not isinstance(temperature, Real) or not 0 < temperature < float("inf"):
            raise ValueError(f"MemoryConfig.temperature is {temperature!r}, expected a number above 0.")
        for name, least in (("k", 1), ("output_neighbors", 0)):
            count = getattr(self, name)
            if not isinstance(count, Integral) or isinstance(count, bool) or count < least:
                raise ValueError(f"MemoryConfig.{name} is {count!r}, expected an integer, {least} or more.")

    @property
    def weights(self) -> tuple[float, float]:
        """The weights outside and inside grounded text."""
        if self.grounded_weight is None:
            return self.weight, self.weight
        return self.weight, self.grounded_weight

    def to_dict(self) -> dict[str, Any]:
        """Return all fields as JSON values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "MemoryConfig":
        """Return the config that [`to_dict`] gave; `ValueError` names an unknown field."""
        unknown = sorted(set(values) - {field.name for field in fields(cls)})
        if unknown:
            raise ValueError(f"MemoryConfig has no {', '.join(unknown)}.")
        return cls(**values)


def _check_weight(name: str, weight: Any) -> None:
    if not isinstance(weight, Real) or isinstance(weight, bool) or not 0 <= float(weight) <= 1:
        raise ValueError(f"MemoryConfig.{name} is {weight!r}, expected a number from 0 to 1.")


@runtime_checkable
class Memory(Protocol):
    """
    Interface of the memory that `generate()` and `generate_many()` take: any object with these members.

    The loop asks `log_probs` once for every decision: for the one token that a row forwarded, or for the last token of
    a prompt, a passage or a text that it read. The result is mixed into Gen's distribution before logits processors
    and warpers. A row that takes its `[NSP]` back decides again from the same mixture.

    A memory with entries also has a method `nearest(states, n, config)`, for `MemoryConfig(output_neighbors=n)`: it
    takes what `log_probs` takes and returns a list of R [`TokenNeighbors`].

    Attributes:
        states (`tuple[str, ...]`): names of submodules of Gen, such as `"model.layers.1.mlp"`; `log_probs` gets what
            enters them.
        fingerprint (`str`): tells this memory from any other; generate_many() stores it in `output_file`.
        memory_config ([`MemoryConfig`]): how it is used unless a call says otherwise.
    """

    states: tuple[str, ...]
    fingerprint: str
    memory_config: Any  # MemoryConfig, of the installed package or of the copy that travels with a checkpoint

    def log_probs(self, states: dict[str, torch.Tensor], config: Any) -> torch.Tensor:
        """
        Return log p_mem for R decisions.

        The result of a row must not depend on the other rows: some of them belong to no sequence and are not used.

        Args:
            states (`dict[str, torch.Tensor]`): by name, what entered each submodule of `states` at these positions,
                `(R, h)`, in Gen's dtype and on its device.
            config ([`MemoryConfig`]): of the call.

        Returns:
            `torch.FloatTensor` of shape `(R, V)`: in float32; -inf for tokens of which the memory holds nothing.
        """
        ...

    def check_model(self, model: Any) -> None:
        """Raise a `ValueError` that names what differs, unless the memory was made for this model's Gen."""
        ...


@dataclass
class TokenNeighbors:
    """
    The entries of a memory nearest to the state from which a token was decided, the nearest first.

    Args:
        rows (`list[int]`): numbers of the entries in the memory.
        values (`list[int]`): their tokens.
        distances (`list[float]`): squared L2, to Gen's state.
        weights (`list[float]`): their shares of p_mem.
        documents (`list[int]`): numbers of the documents that they come from; empty if the memory does not know.
        position (`int`): index of the decided token in the row's token ids; in `sequences` its column. The loop sets
            it.
    """

    rows: list[int]
    values: list[int]
    distances: list[float]
    weights: list[float]
    documents: list[int]
    position: int = -1


def checked_memory_config(memory: Any, config: MemoryConfig | None) -> MemoryConfig:
    """
    Check that `memory` has the members of [`Memory`], and return the config of a call: `config`, or the memory's.

    Raises:
        `TypeError`: for an object that is not a memory.
        `ValueError`: when the config wants neighbours and the memory has no entries.
    """
    _check_memory(memory)
    if config is None:
        config = memory.memory_config
    if config.output_neighbors and not hasattr(memory, "nearest"):
        kind = type(memory).__name__
        raise ValueError(f"MemoryConfig.output_neighbors is {config.output_neighbors}, but a {kind} has no entries.")
    return config


def _check_memory(memory: Any) -> None:
    if isinstance(memory, str | PathLike):
        name = str(memory)
        raise TypeError(f"memory is the name {name!r}, expected a memory: load it with model.load_memory({name!r}).")
    if isinstance(memory, type):
        raise TypeError(f"memory is the class {memory.__name__}, expected a memory: an instance of it.")
    missing = [name for name in _MEMBERS if not hasattr(memory, name)]
    if missing:
        kind = type(memory).__name__
        raise TypeError(f"memory is a {kind}, which has no {', no '.join(missing)}: see Memory in memory_cosup.py.")
    states, config = memory.states, memory.memory_config
    if not isinstance(states, tuple) or not all(isinstance(name, str) for name in states):
        raise TypeError(f"memory.states is {states!r}, expected a tuple of names of submodules of Gen.")
    if not isinstance(memory.fingerprint, str):
        raise TypeError(f"memory.fingerprint is {memory.fingerprint!r}, expected a string.")
    if MemoryConfig.__name__ not in [base.__name__ for base in type(config).__mro__]:
        raise TypeError(f"memory.memory_config is {config!r}, expected a MemoryConfig.")


# ---------------------------------------------------------------------- the mixture


def mix(
    lm_log_probs: torch.Tensor, memory_log_probs: torch.Tensor, weight: float | torch.Tensor, kept_ids: torch.Tensor
) -> torch.Tensor:
    """
    Return the mixture of Gen's distribution and the memory's; see the head of this file.

    Args:
        lm_log_probs (`torch.FloatTensor` of shape `(R, V)`): log p_LM.
        memory_log_probs (`torch.FloatTensor` of shape `(R, V)`): log p_mem; -inf where it has nothing.
        weight (`float` or `torch.FloatTensor` of shape `(R, 1)`): of the memory, from 0 to 1.
        kept_ids (`torch.LongTensor` of shape `(C,)`): ids whose probabilities stay Gen's; C may be 0.

    Returns:
        `torch.FloatTensor` of shape `(R, V)`: log-probabilities.
    """
    lm = lm_log_probs.float()
    memory = memory_log_probs.float().index_fill(1, kept_ids, float("-inf"))
    memory_mass = memory.logsumexp(1, keepdim=True)  # (R, 1)
    has_entries = memory_mass > float("-inf")
    memory_mass = memory_mass.masked_fill(~has_entries, 0.0)
    # summed, since 1 - P(C) would round to 0 where [NSP] is certain; if it is banned there, the rest decides
    rest = lm.index_fill(1, kept_ids, float("-inf")).logsumexp(1, keepdim=True)  # log(1 - P_LM(C))
    weight = torch.as_tensor(weight, dtype=torch.float32, device=lm.device) * has_entries  # (R, 1)
    mixture = torch.logaddexp(torch.log1p(-weight) + lm, weight.log() + rest + memory - memory_mass)
    return mixture.index_copy(1, kept_ids, lm.index_select(1, kept_ids))


def target_log_probs(
    lm: torch.Tensor,
    memory: torch.Tensor,
    weight: float | torch.Tensor,
    lm_kept: torch.Tensor | None = None,
    memory_kept: torch.Tensor | None = None,
    is_kept: torch.Tensor | None = None,
) -> torch.Tensor:
    """
    Return what [`mix`] gives for one target of each row, without a buffer of V columns. It computes 1 - P(C), which
    loses digits where the kept ids C are nearly certain.

    Without `lm_kept` and `memory_kept` no id is kept: log((1 - w) p_LM(y) + w p_mem(y)), the formula of kNN-LM.

    Args:
        lm, memory (`torch.FloatTensor` of shape `(n,)`): log p_LM and log p_mem of the targets.
        weight (`float` or `torch.FloatTensor` of shape `(n,)`): of the memory, from 0 to 1.
        lm_kept, memory_kept (`torch.FloatTensor` of shape `(n,)`, *optional*): log P_LM(C) and log P_mem(C) of the
            kept ids C; pass both or neither.
        is_kept (`torch.BoolTensor` of shape `(n,)`, *optional*): targets that are kept ids; none by default.

    Returns:
        `torch.FloatTensor` of shape `(n,)`: log-probabilities.
    """
    lm, memory = lm.float(), memory.float()
    weight = torch.as_tensor(weight, dtype=torch.float32, device=lm.device)
    if lm_kept is not None and memory_kept is not None:
        memory_rest = _log_of_rest(memory_kept)
        has_entries = memory_rest > float("-inf")
        weight = weight * has_entries
        memory = memory - memory_rest.masked_fill(~has_entries, 0.0) + _log_of_rest(lm_kept)
    mixture = torch.logaddexp(torch.log1p(-weight) + lm, weight.log() + memory)
    if is_kept is not None:
        mixture = torch.where(is_kept, lm, mixture)
    return mixture


def _log_of_rest(log_mass: torch.Tensor) -> torch.Tensor:
    """Return log(1 - P) for log P, which rounding may have lifted above 0."""
    return torch.log(-torch.expm1(log_mass.float().clamp(max=0.0)))


def mixed_logits(
    logits: torch.Tensor, memory_log_probs: torch.Tensor, weight: float | torch.Tensor, kept_ids: torch.Tensor
) -> torch.Tensor:
    """
    Return logits of the mixture, on the scale of Gen's: the logits of kept ids stay, and so do rows of weight 0.

    So a processor that looks at the sign of a logit, such as the repetition penalty, acts as it does without a memory.

    Args: `logits` `(R, V)` of Gen, in float32; the others as in [`mix`].

    Raises:
        `ValueError`: when the memory returned something of another shape or dtype.
    """
    if memory_log_probs.shape != logits.shape or memory_log_probs.dtype != torch.float32:
        raise ValueError(
            f"memory.log_probs returned {tuple(memory_log_probs.shape)} in {memory_log_probs.dtype},"
            f" expected {tuple(logits.shape)} in torch.float32."
        )
    scale = logits.logsumexp(1, keepdim=True)  # (R, 1)
    device = logits.device
    mixture = mix(logits - scale, memory_log_probs.to(device), weight, kept_ids.to(device)) + scale
    weight = torch.as_tensor(weight, dtype=torch.float32, device=device)
    return torch.where(weight > 0, mixture, logits)  # at weight 0 exactly Gen's, without rounding
