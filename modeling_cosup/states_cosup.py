"""Inputs of submodules of Gen, on request: the states that a token memory computes with."""

import contextlib
import difflib
from collections.abc import Iterator
from contextvars import ContextVar
from functools import partial

import torch
from torch import nn

# Where the hooks write during a forward that returns states: a context variable, so that threads do not interfere.
# torch.compile cannot trace one, so a traced forward writes to the last entry of a list.
_states: ContextVar[dict | None] = ContextVar("cosup_states", default=None)
_traced_states: list[dict] = []


def watch(gen: nn.Module, names: tuple[str, ...]) -> None:
    """
    Register the hooks that record what enters submodules of Gen, unless they are registered already.

    `forward(output_states=...)` does this itself. Call it before you compile a forward that returns states: hooks
    cannot be registered while torch.compile traces.

    Args:
        gen (`nn.Module`): Gen.
        names (`tuple[str, ...]`): of its submodules, such as `"model.layers.1.mlp"`.

    Raises:
        `ValueError`: for a name without a submodule.
    """
    if isinstance(names, str):
        raise ValueError(f"Names of submodules are expected as a tuple, found the string {names!r}.")
    for name in names:
        module = _submodule(gen, name)
        hooks = module._forward_pre_hooks.values()
        if not any(isinstance(hook, partial) and hook.func is _record for hook in hooks):
            module.register_forward_pre_hook(partial(_record, name=name), with_kwargs=True)


def _submodule(gen: nn.Module, name: str) -> nn.Module:
    """Return a submodule of Gen, not Gen itself; an error suggests names that are close."""
    try:
        if name:
            return gen.get_submodule(name)
    except AttributeError:
        pass
    known = [module_name for module_name, _ in gen.named_modules()]
    close = difflib.get_close_matches(name, known, n=3)
    hint = f" Did you mean {' or '.join(map(repr, close))}?" if close else ""
    raise ValueError(f"{type(gen).__name__} has no submodule {name!r}.{hint}")


@contextlib.contextmanager
def recording(gen: nn.Module, names: tuple[str, ...]) -> Iterator[dict[str, torch.Tensor]]:
    """Yield a `dict` that a forward of Gen fills within this context: by name, what enters each submodule."""
    states: dict[str, torch.Tensor] = {}
    if torch.compiler.is_compiling():
        _traced_states.append(states)
        try:
            yield states
        finally:
            _traced_states.pop()
    else:
        watch(gen, names)
        token = _states.set(states)
        try:
            yield states
        finally:
            _states.reset(token)


def _record(module: nn.Module, args: tuple, kwargs: dict, name: str) -> None:
    """Record the first argument of a submodule; a forward-pre-hook."""
    if torch.compiler.is_compiling():
        states = _traced_states[-1] if _traced_states else None
    else:
        states = _states.get()
    if states is not None:
        states[name] = next(iter([*args, *kwargs.values()]), None)


def states_at(
    states: dict[str, torch.Tensor], names: tuple[str, ...], hidden: torch.Tensor, positions: torch.Tensor | None
) -> dict[str, torch.Tensor]:
    """
    Return the recorded states at some positions.

    Args:
        states (`dict[str, torch.Tensor]`): as [`recording`] filled it.
        names (`tuple[str, ...]`): of the submodules.
        hidden (`torch.Tensor` of shape `(B, T, h)`): Gen's last hidden states; only their shape is used.
        positions (`torch.LongTensor` of shape `(R,)`, *optional*): in the flattened `(B · T)`; by default the last
            column of each row.

    Returns:
        `dict[str, torch.Tensor]`: by name, `(R, h)`; R is B by default.

    Raises:
        `ValueError`: for a submodule that did not run, or reads something other than one state for each position.
    """
    rows, columns = hidden.shape[:2]
    chosen = {}
    for name in names:
        if name not in states:
            reason = "it is not part of Gen's base model, or the model was compiled before watch() was called"
            raise ValueError(f"Nothing entered {name!r} while Gen's base model ran: {reason}.")
        state = states[name]
        if not isinstance(state, torch.Tensor) or state.ndim < 2 or state[..., 0].numel() != rows * columns:
            shape = tuple(state.shape) if isinstance(state, torch.Tensor) else type(state).__name__
            expected = f"one state for each of {rows} x {columns} positions"
            raise ValueError(f"What enters {name!r} is {shape}, not {expected}.")
        width = state.shape[-1]  # (B, T, h), or (B · T, h) in OPT
        if positions is None:
            chosen[name] = state.reshape(rows, columns, width)[:, -1]
        else:
            chosen[name] = state.reshape(rows * columns, width)[positions.to(state.device)]
    return chosen
