"""
Room in the KV cache when its columns are limited (`max_batch_tokens`).

A row without `max_retrievals` is admitted with room for one retrieval, since most rows retrieve no more. If rows then
retrieve more often and there is no room for all of them, the latest ones are set aside: their keys and values wait on
the CPU, and they go on with exactly these once there is room. No token is forwarded twice, and none changes.
"""

from typing import Any

from .cache_cosup import RowCache, rounded
from .configuration_cosup import CoSupConfig
from .settings_cosup import DecodingSettings
from .slots_cosup import Slots
from .trace_cosup import Row, SetAside

_TASKS = ("retrieving", "recomputing", "masking")  # lists of the loop in which a row may be between two passes


def has_room(
    config: CoSupConfig, settings: DecodingSettings, slots: Slots, retrieving: list[Row], recomputing: list[Row]
) -> bool:
    """
    Return whether the cache has room for what its rows forward in the next pass; one row alone always has.

    Args:
        config ([`CoSupConfig`]), settings ([`DecodingSettings`]), slots ([`Slots`]): of the loop.
        retrieving (`list[Row]`), recomputing (`list[Row]`): rows that forward more than one token.
    """
    num_rows = len(slots)
    if settings.max_batch_tokens is None or num_rows < 2:
        return True
    longest = int(slots.columns[:num_rows].max()) + 1
    for row in recomputing:
        longest = max(longest, int(slots.columns[row.slot]) + len(row.recompute_ids))
    for row in retrieving:
        passages = row.settings.retrieval.top_k * (config.max_passage_length + 1)
        longest = max(longest, int(slots.columns[row.slot]) + 1 + passages)
    # one more for the padding of a chunk
    longest = min(longest, settings.context_length) + 1
    return num_rows * rounded(longest) <= settings.max_batch_tokens


def set_latest_aside(decoder: Any) -> None:
    """Set aside the row of a [`Decoder`] that came last. It goes on later, ahead of all rows that have not run yet."""
    row = max((row for row in decoder.slots.rows if row is not None), key=lambda row: row.arrival)
    tasks = []
    for task in _TASKS:
        rows = getattr(decoder, task)
        if row in rows:
            rows.remove(row)
            tasks.append(task)
    row.set_aside = _state_of(row, decoder.slots, decoder.cache, tasks)
    decoder.vacate(row)
    decoder.admission.waiting.appendleft(row)


def _state_of(row: Row, slots: Slots, cache: RowCache, tasks: list[str]) -> SetAside:
    slot = row.slot
    length = int(slots.columns[slot])
    return SetAside(
        keys=[states[slot, :, :length].to("cpu", copy=True) for states in cache.keys],
        values=[states[slot, :, :length].to("cpu", copy=True) for states in cache.values],
        devices=[states.device for states in cache.keys],
        tokens=cache.tokens[slot, :length].clone(),
        positions=cache.positions[slot, :length].clone(),
        next_position=int(slots.positions[slot]),
        last_token=int(slots.tokens[slot]),
        num_generated=int(slots.generated[slot]),
        banned=bool(slots.banned[slot]),
        grounded=bool(slots.grounded[slot]),
        tasks=tasks,
    )


def put_back(row: Row, decoder: Any) -> None:
    """Let a row go on in its new slot, with the state with which it was set aside."""
    slots, cache = decoder.slots, decoder.cache
    state, slot = row.set_aside, row.slot
    assert state is not None
    row.set_aside = None
    length = len(state.tokens)
    for layer, device in enumerate(state.devices):
        for stored, states in ((cache.keys, state.keys[layer]), (cache.values, state.values[layer])):
            if layer == len(stored):  # nothing was forwarded with this cache
                shape = (cache.rows, len(states), cache.columns, states.shape[-1])
                stored.append(states.new_zeros(shape, device=device))
            stored[layer][slot, :, :length] = states.to(device)
    cache.tokens[slot, :length] = state.tokens
    cache.positions[slot, :length] = state.positions
    slots.columns[slot] = length
    slots.positions[slot] = state.next_position
    slots.tokens[slot] = state.last_token
    slots.generated[slot] = state.num_generated
    slots.ban(slot, state.banned)
    slots.ground(slot, state.grounded)
    slots.stale = True
    for task in state.tasks:
        getattr(decoder, task).append(row)
