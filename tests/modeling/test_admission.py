"""Which waiting rows are admitted: in their order, several at a time, and only as many as have room."""

from types import SimpleNamespace

import pytest
import torch

from modeling_cosup import RetrievalConfig
from modeling_cosup.admission_cosup import Admission
from modeling_cosup.settings_cosup import DecisionSettings, DecodingSettings, RowSettings
from modeling_cosup.slots_cosup import Slots
from modeling_cosup.trace_cosup import Row

DECISION = DecisionSettings([], [], False, 1)
NOTHING = torch.zeros(0, dtype=torch.long)


def make(count, max_batch_tokens=None):
    settings = DecodingSettings(
        generation_config=None,
        retrieves=True,
        memory_config=None,
        num_slots=count,
        num_columns=1,
        device=torch.device("cpu"),
        context_length=4096,
        pad=0,
        ends=frozenset(),
        kept_ids=NOTHING,
        never=NOTHING,
        special=NOTHING,
        static=False,
        refill=True,
        max_batch_tokens=max_batch_tokens,
    )
    return Admission(SimpleNamespace(max_passage_length=99), settings, Slots(count, settings.device))


def row(number, budget=50, **retrieval):
    settings = RowSettings(DECISION, budget, RetrievalConfig(**retrieval), retrieves=bool(retrieval))
    return Row(number, [1] * 10, settings)


def admitted(admission):
    return [row.number for row in admission.admit()]


def test_rows_are_admitted_in_their_order_several_at_a_time():
    admission = make(16)
    rows = [row(number) for number in range(40)]
    admission.waiting.extend(rows)
    assert admitted(admission) == list(range(16))
    admission.slots.vacate(rows[3])
    assert admitted(admission) == []  # the others would wait for one prompt
    for number in (5, 6, 7):
        admission.slots.vacate(rows[number])
    assert admitted(admission) == [16, 17, 18, 19]


def test_a_few_rows_are_admitted_at_once():
    admission = make(16)
    for number in range(3):
        admission.waiting.append(row(number))
        assert admitted(admission) == [number]


def test_a_slot_is_not_free_for_long():
    admission = make(16)
    rows = [row(number) for number in range(40)]
    admission.waiting.extend(rows)
    admission.admit()
    for passes in range(2):
        admission.slots.vacate(rows[passes])
        assert [admitted(admission) for _ in range(8)] == [[]] * 7 + [[16 + passes]]


@pytest.mark.parametrize("max_batch_tokens, expected", [(1, 1), (128, 2), (191, 2), (192, 3), (None, 5)])
def test_rows_need_room(max_batch_tokens, expected):
    admission = make(5, max_batch_tokens)  # a row needs a block of 64 columns
    admission.waiting.extend(row(number) for number in range(6))
    assert len(admitted(admission)) == expected


def test_passages_need_room():
    for retrieval, expected in (({"top_k": 1}, 4), ({"top_k": 2}, 3), ({"top_k": 1, "max_retrievals": 3}, 2)):
        admission = make(8, max_batch_tokens=800)
        admission.waiting.extend(row(number, 20, **retrieval) for number in range(8))
        assert len(admitted(admission)) == expected


def test_no_row_overtakes_one_that_has_no_room():
    admission = make(8, max_batch_tokens=512)
    first, long = row(0, 100), row(1, 400)
    admission.waiting.extend([first, long, row(2), row(3)])
    assert admitted(admission) == [0]
    assert [admitted(admission) for _ in range(20)] == [[]] * 20  # there is room for 2, but 1 is first
    admission.slots.vacate(first)
    assert admitted(admission) == [1]
    admission.slots.vacate(long)
    assert admitted(admission) == [2, 3]
