"""The state of the decoding loop for each row, on the host and on the device, and how the two stay in sync."""

from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray

from .trace_cosup import Row


@dataclass(eq=False)
class Slots:
    """
    The slots of a batch, and the state of the rows in them.

    A row takes the first free slot. Decisions are made for the first `len(slots)` slots, up to the last one in use.

    Host and device. The loop branches on the state of rows, so that state is in NumPy on the host, where reading it
    waits for nothing. Forwards and decisions compute with state on the device, since a copy from the host in every
    pass would make the device wait. Tokens are only on the device. Rows, `generated` and `budgets` are only on the
    host. Five arrays are on both:

    - `occupied`, `banned` and `grounded` seldom change, and only for one slot at a time: host and device are written
      together.
    - `columns` and `positions` change in every pass. If every row takes a decode step, both sides add 1 and nothing is
      copied. Any other event (a chunk was forwarded, a passage dropped, a row came or went, a row sat out the step)
      changes the host only and sets `stale`; the next step copies the arrays to the device. So the host is always
      right, and the device unless `stale`.

    Args:
        count (`int`): number of slots, the most rows at a time.
        device (`torch.device`): of the model's inputs.
        pad (`int`): the token of an empty slot.
        keeps_slots (`bool`): a row stays in its slot until it ends, for a captured step. Otherwise the last row moves
            into a slot that becomes free.
        keeps_order (`bool`): keep `order`, for processors that know the rows by their place in the batch.

    Attributes:
        rows (`list[Row | None]`): the row in each slot, up to the last one in use.
        columns, positions, generated, budgets (`numpy.ndarray` of int64 and shape `(count,)`): column and position of
            the next token to forward, number of decided tokens, and the most that may be decided.
        occupied, banned, grounded (`numpy.ndarray` of bool and shape `(count,)`): slots with a row, slots that may not
            decide `[NSP]` next, and slots whose next token is grounded text.
        tokens (`torch.LongTensor` of shape `(count,)`): the last decision, which is not forwarded yet.
        occupied_on_device, banned_on_device, grounded_on_device (`torch.BoolTensor` of shape `(count,)`): copies.
        columns_and_positions_on_device (`torch.LongTensor` of shape `(2, count)`): `columns` and `positions`.
        order (`torch.LongTensor` of shape `(n,)`, *optional*): the row of the batch in each slot, once a row has left;
            until then `None`.
        stale (`bool`): `columns_and_positions_on_device` no longer equals `columns` and `positions`.
        version (`int`): changes whenever a row takes a slot or leaves one.
    """

    count: int
    device: torch.device
    pad: int = 0
    keeps_slots: bool = False
    keeps_order: bool = True
    rows: list[Row | None] = field(init=False, default_factory=list)
    columns: NDArray[np.int64] = field(init=False)
    positions: NDArray[np.int64] = field(init=False)
    generated: NDArray[np.int64] = field(init=False)
    budgets: NDArray[np.int64] = field(init=False)
    occupied: NDArray[np.bool_] = field(init=False)
    banned: NDArray[np.bool_] = field(init=False)
    grounded: NDArray[np.bool_] = field(init=False)
    tokens: torch.Tensor = field(init=False)
    occupied_on_device: torch.Tensor = field(init=False)
    banned_on_device: torch.Tensor = field(init=False)
    grounded_on_device: torch.Tensor = field(init=False)
    columns_and_positions_on_device: torch.Tensor = field(init=False)
    order: torch.Tensor | None = field(init=False, default=None)
    stale: bool = field(init=False, default=True)
    version: int = field(init=False, default=0)

    def __post_init__(self) -> None:
        self.columns = np.zeros(self.count, dtype=np.int64)
        self.positions = np.zeros(self.count, dtype=np.int64)
        self.generated = np.zeros(self.count, dtype=np.int64)
        self.budgets = np.zeros(self.count, dtype=np.int64)
        self.occupied = np.zeros(self.count, dtype=bool)
        self.banned = np.zeros(self.count, dtype=bool)
        self.grounded = np.zeros(self.count, dtype=bool)
        self.tokens = torch.full((self.count,), self.pad, dtype=torch.long, device=self.device)
        self.occupied_on_device = torch.zeros(self.count, dtype=torch.bool, device=self.device)
        self.banned_on_device = torch.zeros_like(self.occupied_on_device)
        self.grounded_on_device = torch.zeros_like(self.occupied_on_device)
        self.columns_and_positions_on_device = torch.zeros(2, self.count, dtype=torch.long, device=self.device)

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def free(self) -> int:
        """Number of slots without a row."""
        return self.count - int(self.occupied.sum())

    # ------------------------------------------------------------------ rows come and go

    def occupy(self, row: Row) -> None:
        """Put a row that has nothing in the cache into the first free slot."""
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
        self.budgets[slot] = row.settings.budget
        self._set_occupied(slot, True)

    def vacate(self, row: Row) -> int | None:
        """
        Take a row out and, unless `keeps_slots`, move the last row into the gap.

        Returns:
            `int`, *optional*: the slot from which a row moved to `row.slot`; the KV cache must make the same move.
        """
        slot = row.slot
        self.rows[slot] = None
        self._set_occupied(slot, False)
        self.ban(slot, False)
        self.ground(slot, False)
        if self.keeps_slots:
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
        """Move a row and its state to another slot."""
        for state in (self.columns, self.positions, self.generated, self.budgets, self.tokens):
            state[slot] = state[row.slot]
        self.ban(slot, self.banned[row.slot])
        self.ground(slot, self.grounded[row.slot])
        self._set_occupied(row.slot, False)
        self._set_occupied(slot, True)
        self.rows[slot] = row
        row.slot = slot

    def _set_occupied(self, slot: int, occupied: bool) -> None:
        self.occupied[slot] = occupied
        self.occupied_on_device[slot] = occupied
        self.stale = True
        self.version += 1

    def ban(self, slot: int, banned: bool | np.bool_) -> None:
        """Set whether the next decision of a slot may not be `[NSP]`."""
        if self.banned[slot] != banned:
            self.banned[slot] = banned
            self.banned_on_device[slot] = bool(banned)

    def ground(self, slot: int, grounded: bool | np.bool_) -> None:
        """Set whether the next token of a slot is grounded text."""
        if self.grounded[slot] != grounded:
            self.grounded[slot] = grounded
            self.grounded_on_device[slot] = bool(grounded)

    # ------------------------------------------------------------------ rows grow and shrink

    def columns_and_positions(self, n: int) -> torch.Tensor:
        """Return `columns` and `positions` of the first n slots, on the device: `(2, n, 1)`, until the next step."""
        if self.stale:
            self.columns_and_positions_on_device.copy_(torch.from_numpy(np.stack([self.columns, self.positions])))
            self.stale = False
        return self.columns_and_positions_on_device[:, :n, None]

    def count_step(self, stepping: NDArray[np.bool_]) -> None:
        """Count one forwarded token in each slot of `stepping`, `(n,)`."""
        self.columns[: len(stepping)] += stepping
        self.positions[: len(stepping)] += stepping
        if not self.stale and np.array_equal(stepping, self.occupied[: len(stepping)]):
            self.columns_and_positions_on_device += self.occupied_on_device
        else:
            self.stale = True

    def count_chunks(self, slots: NDArray[np.int64], lengths: NDArray[np.int64]) -> None:
        """Count forwarded chunks of these lengths in `slots`; both of shape `(R,)`."""
        self.columns[slots] += lengths
        self.positions[slots] += lengths
        self.stale = True

    def shorten(self, slot: int, columns: int, positions: int) -> None:
        """Take columns away from a slot, and move its next position back."""
        self.columns[slot] -= columns
        self.positions[slot] -= positions
        self.stale = True

    def take_token_back(self, slot: int) -> None:
        """Take back the last token of a slot, which was decided and forwarded."""
        self.shorten(slot, columns=1, positions=1)
        self.generated[slot] -= 1

    def set_tokens(self, tokens: torch.Tensor) -> None:
        """Set the decided `tokens` `(n,)` of the first n slots, and count them."""
        n = len(tokens)
        self.tokens[:n] = tokens
        self.generated[:n] += self.occupied[:n]

    def lengths(self) -> torch.Tensor:
        """Return the number of filled columns of the first `len(self)` slots, on the device: `(n,)`."""
        return torch.from_numpy(self.columns[: len(self)].copy()).to(self.device)
