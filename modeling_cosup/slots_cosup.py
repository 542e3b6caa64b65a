"""
The state of the decoding loop, row by row: what the host knows of each slot, what the device knows, and how the two
stay in sync.
"""

from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray

from .trace_cosup import Row


@dataclass(eq=False)
class Slots:
    """
    The places of a batch, and all that is known of the rows in them.

    Slots fill up from the first one on. The first `len(slots)` of them, up to the last one that is taken, take part in
    what is computed.

    Host and device. The loop branches on what a row holds: this state is in NumPy on the host, where reading it waits
    for nothing. Forwards and decisions compute with state on the device, since a copy from the host in every pass
    would make the device wait. Tokens are on the device only, rows and `generated` on the host only. Four things have
    a twin on each side:

    - `occupied` and `banned` seldom change, and only a slot at a time: both twins are written together.
    - `columns` and `positions` change in every pass. While every row steps, both twins count on and nothing is copied.
      Any other event (a chunk was read, a passage left, a row came or went, one does not step) changes the host only
      and sets `stale`: the next step copies the host's twin to the device. So the host is always right, and the
      device unless `stale`.

    Args:
        count (`int`): slots, the most rows at a time.
        device (`torch.device`): of the model's inputs.
        pad (`int`): what an empty slot holds as its token.
        keeps_places (`bool`): a row keeps its slot to the end, for a captured step. Otherwise the last row moves into
            a slot that becomes free.
        keeps_order (`bool`): keep `order`, for processors that know the rows by their place in the batch.

    Attributes:
        rows (`list[Row | None]`): by slot, up to the last one that is taken.
        columns, positions, generated (`numpy.ndarray` of int64): columns that are filled, position of the next token,
            decided tokens.
        occupied, banned (`numpy.ndarray` of bool): slots with a row, and slots that may not decide `[NSP]` next.
        tokens (`torch.LongTensor` of shape `(count,)`): the last decision, which is not forwarded yet.
        occupied_on_device, banned_on_device (`torch.BoolTensor` of shape `(count,)`): the twins of both.
        places_on_device (`torch.LongTensor` of shape `(2, count)`): the twins of `columns` and `positions`.
        order (`torch.LongTensor` of shape `(n,)`, *optional*): the row of the batch in each slot, once a row has left;
            until then `None`.
        stale (`bool`): `places_on_device` no longer equals `columns` and `positions`.
    """

    count: int
    device: torch.device
    pad: int = 0
    keeps_places: bool = False
    keeps_order: bool = True
    rows: list[Row | None] = field(init=False, default_factory=list)
    columns: NDArray[np.int64] = field(init=False)
    positions: NDArray[np.int64] = field(init=False)
    generated: NDArray[np.int64] = field(init=False)
    occupied: NDArray[np.bool_] = field(init=False)
    banned: NDArray[np.bool_] = field(init=False)
    tokens: torch.Tensor = field(init=False)
    occupied_on_device: torch.Tensor = field(init=False)
    banned_on_device: torch.Tensor = field(init=False)
    places_on_device: torch.Tensor = field(init=False)
    order: torch.Tensor | None = field(init=False, default=None)
    stale: bool = field(init=False, default=True)

    def __post_init__(self) -> None:
        self.columns = np.zeros(self.count, dtype=np.int64)
        self.positions = np.zeros(self.count, dtype=np.int64)
        self.generated = np.zeros(self.count, dtype=np.int64)
        self.occupied = np.zeros(self.count, dtype=bool)
        self.banned = np.zeros(self.count, dtype=bool)
        self.tokens = torch.full((self.count,), self.pad, dtype=torch.long, device=self.device)
        self.occupied_on_device = torch.zeros(self.count, dtype=torch.bool, device=self.device)
        self.banned_on_device = torch.zeros_like(self.occupied_on_device)
        self.places_on_device = torch.zeros(2, self.count, dtype=torch.long, device=self.device)

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def free(self) -> int:
        """Number of slots without a row."""
        return self.count - int(self.occupied.sum())

    # ------------------------------------------------------------------ rows come and go

    def occupy(self, row: Row) -> None:
        """Put a row into the first free slot, with no column filled yet."""
        if None in self.rows:
            slot = self.rows.index(None)
            self.rows[slot] = row
        else:
            slot = len(self.rows)
            self.rows.append(row)
        row.slot = slot
        self.columns[slot] = 0
        self.positions[slot] = 0
        self.generated[slot] = 0
        self._set_occupied(slot, True)

    def vacate(self, row: Row) -> int | None:
        """
        Take a row out, and move the last one into its slot, so that the rows are the first slots again.

        Returns:
            `int`, *optional*: the slot from which a row was moved to `row.slot`; the KV cache must make the same move.
        """
        slot = row.slot
        self.rows[slot] = None
        self._set_occupied(slot, False)
        self.ban(slot, False)
        if self.keeps_places:
            self.columns[slot] = 0
            self.positions[slot] = 0
            return None
        last = self.rows.pop()
        source = None
        if last is not None:
            source = last.slot
            self._move(last, slot)
        if self.keeps_order:
            numbers = [other.number for other in self.rows if other is not None]
            self.order = torch.tensor(numbers, dtype=torch.long, device=self.device)
        return source

    def _move(self, row: Row, slot: int) -> None:
        """Move all that is known of a row to another slot."""
        for state in (self.columns, self.positions, self.generated, self.tokens):
            state[slot] = state[row.slot]
        self.ban(slot, self.banned[row.slot])
        self._set_occupied(row.slot, False)
        self._set_occupied(slot, True)
        self.rows[slot] = row
        row.slot = slot

    def _set_occupied(self, slot: int, occupied: bool) -> None:
        self.occupied[slot] = occupied
        self.occupied_on_device[slot] = occupied
        self.stale = True

    def ban(self, slot: int, banned: bool | np.bool_) -> None:
        """Note whether the next decision of a slot may not be `[NSP]`."""
        if self.banned[slot] != banned:
            self.banned[slot] = banned
            self.banned_on_device[slot] = bool(banned)

    # ------------------------------------------------------------------ rows grow and shrink

    def places(self, n: int) -> torch.Tensor:
        """Return columns and positions of the first n slots, on the device: `(2, n, 1)`, valid until the next step."""
        if self.stale:
            self.places_on_device.copy_(torch.from_numpy(np.stack([self.columns, self.positions])))
            self.stale = False
        return self.places_on_device[:, :n, None]

    def count_step(self, stepping: NDArray[np.bool_]) -> None:
        """Note that the slots of `stepping`, `(n,)`, have forwarded one token."""
        self.columns[: len(stepping)] += stepping
        self.positions[: len(stepping)] += stepping
        if not self.stale and np.array_equal(stepping, self.occupied[: len(stepping)]):
            self.places_on_device += self.occupied_on_device
        else:
            self.stale = True

    def count_chunks(self, slots: NDArray[np.int64], lengths: NDArray[np.int64]) -> None:
        """Note that the slots have read chunks of these lengths."""
        self.columns[slots] += lengths
        self.positions[slots] += lengths
        self.stale = True

    def shorten(self, slot: int, columns: int, positions: int) -> None:
        """Remove columns from a slot and move its next position back."""
        self.columns[slot] -= columns
        self.positions[slot] -= positions
        self.stale = True

    def take_back(self, slot: int) -> None:
        """Take back the last decision of a slot, which was forwarded already."""
        self.shorten(slot, columns=1, positions=1)
        self.generated[slot] -= 1

    def note_decisions(self, tokens: torch.Tensor) -> None:
        """Note the next token of every row: `tokens` `(n,)` of the first n slots."""
        n = len(tokens)
        self.tokens[:n] = tokens
        self.generated[:n] += self.occupied[:n]

    def lengths(self) -> torch.Tensor:
        """Return how many columns are filled in the slots up to the last row, on the device: `(n,)`."""
        return torch.from_numpy(self.columns[: len(self)].copy()).to(self.device)
