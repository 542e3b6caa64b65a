"""The state of the decoding loop: host and device agree, and nothing is copied while all rows step."""

import random

import numpy as np
import pytest
import torch

from modeling_cosup import RetrievalConfig
from modeling_cosup.settings_cosup import DecisionSettings, RowSettings
from modeling_cosup.slots_cosup import Slots
from modeling_cosup.trace_cosup import Row

SETTINGS = RowSettings(DecisionSettings([], [], False, 1), budget=9, retrieval=RetrievalConfig(), retrieves=True)


def check_contents(slots, contents):
    """Check host and device against `contents`: `{row: [columns, positions, generated, banned, grounded]}`."""
    n = len(slots)
    columns, positions = slots.columns_and_positions(n)[:, :, 0].numpy()
    for row, (column, position, generated, banned, grounded) in contents.items():
        slot = row.slot
        assert slots.rows[slot] is row and slots.occupied[slot]
        assert (slots.columns[slot], slots.positions[slot]) == (column, position)
        assert (columns[slot], positions[slot]) == (column, position)
        assert (slots.generated[slot], slots.banned[slot], slots.grounded[slot]) == (generated, banned, grounded)
    assert slots.occupied.sum() == len(contents)
    assert slots.free == slots.count - len(contents)
    assert np.array_equal(slots.occupied, slots.occupied_on_device.numpy())
    assert np.array_equal(slots.banned, slots.banned_on_device.numpy())
    assert np.array_equal(slots.grounded, slots.grounded_on_device.numpy())


@pytest.mark.parametrize("keeps_slots", [False, True])
@pytest.mark.parametrize("seed", range(5))
def test_host_and_device_agree_after_every_event(keeps_slots, seed):
    rng = random.Random(seed)
    contents = {}
    number = 0
    slots = Slots(6, torch.device("cpu"), pad=3, keeps_slots=keeps_slots)
    for _ in range(200):
        action = rng.choice(["occupy", "vacate", "ban", "ground", "step", "step", "chunk", "take_back"])
        row = rng.choice(list(contents)) if contents else None
        if action == "occupy" and slots.free:
            row = Row(number, [1], SETTINGS)
            number += 1
            slots.occupy(row)
            slots.ban(row.slot, False)
            slots.ground(row.slot, False)
            contents[row] = [0, 0, 0, False, False]
        elif row is None:
            continue
        elif action == "vacate":
            slots.vacate(row)
            del contents[row]
        elif action == "ban":
            contents[row][3] = not contents[row][3]
            slots.ban(row.slot, contents[row][3])
        elif action == "ground":
            contents[row][4] = not contents[row][4]
            slots.ground(row.slot, contents[row][4])
        elif action == "chunk":
            slots.count_chunks(np.array([row.slot]), np.array([5]))
            contents[row][0] += 5
            contents[row][1] += 5
        elif action == "take_back":
            slots.take_token_back(row.slot)
            for i in range(3):
                contents[row][i] -= 1
        else:
            stepping = slots.occupied[: len(slots)].copy()
            resting = row if rng.random() < 0.3 else None
            if resting is not None:
                stepping[resting.slot] = False
            slots.columns_and_positions(len(slots))
            slots.count_step(stepping)
            slots.set_tokens(torch.full((len(slots),), 7))
            for other, values in contents.items():
                values[2] += 1
                if other is not resting:
                    values[0] += 1
                    values[1] += 1
        check_contents(slots, contents)
    assert number > 10


def test_nothing_is_copied_while_all_rows_step():
    slots = Slots(4, torch.device("cpu"))
    for number in range(3):
        slots.occupy(Row(number, [1], SETTINGS))
    slots.count_chunks(np.arange(3), np.array([4, 2, 7]))
    columns, _ = slots.columns_and_positions(3)
    for _ in range(5):
        slots.count_step(slots.occupied[:3].copy())
        assert not slots.stale
    assert columns[:, 0].tolist() == [9, 7, 12]  # the same memory: a captured step reads it
    slots.count_step(np.array([True, False, True]))
    assert slots.stale
    assert slots.columns_and_positions(3)[0, :, 0].tolist() == [10, 7, 13]


def test_the_last_row_moves_into_the_gap():
    slots = Slots(4, torch.device("cpu"))
    rows = [Row(number, [1], SETTINGS) for number in range(3)]
    for row in rows:
        slots.occupy(row)
    slots.set_tokens(torch.tensor([11, 12, 13]))
    assert slots.order is None
    assert slots.vacate(rows[0]) == 2  # slot 2 moved to slot 0
    assert slots.rows == [rows[2], rows[1]]
    assert slots.tokens[:2].tolist() == [13, 12]
    assert slots.order.tolist() == [2, 1]
    assert slots.vacate(rows[1]) is None  # it was the last one
    assert slots.rows == [rows[2]]
    assert len(slots) == 1
