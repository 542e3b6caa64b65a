"""
The state of the decoding loop, row by row: what the host knows of each slot, what the device knows, and how the two
stay in sync.
"""

from dataclasses import dataclass, field

import numpy as np
import torch

from .trace_cosup import Row


@dataclass(eq=False)
class Slots:
    """
    The places of a batch, and all that is known of the rows in them.

    Slots fill up from the first one on; `len(slots)` of them, those up to the last that is taken, take part in what is
    computed.

    Host and device. The loop branches on what a row holds: this state is in NumPy on the host, where reading it waits
    for nothing. Forwards and decisions compute with state on the device, since a copy from the host in every pass
    would make the device wait. Tokens are on the device only, rows and `generated` on the host only. Four things have
    a twin on each side:

    - `occupied` and `banned` change seldom, a slot at a time: both twins are written at once.
    - `columns` and `positions` change in every pass. While every row steps, both twins count on by themselves and
      nothing is copied. Whatever else happens (a chunk was read, a passage left, a row came or went, one does not
      step) changes the host only and sets `moved`: the device is behind until the next step copies the host's twin. So
      the host is always right, the device unless `moved`.

    Args:
        count (`int`): slots, the most rows at once.
        device (`torch.device`): of the model's inputs.
        pad (`int`): what an empty slot holds as its token.
        keeps_places (`bool`): a row keeps its slot to the end, for a captured step. Else the last row moves into a
            slot that is free.
        keeps_order (`bool`): `order` is kept, for processors that know the rows by their place in the batch.

    Attributes:
        rows (`list[Row | None]`): by slot, up to the last one that is taken.
        columns, positions, generated (`numpy.ndarray` of int64): columns that are filled, position of the next token,
            decided tokens.
        occupied, banned (`numpy.ndarray` of bool): slots with a row, and those whose next decision may not be `[NSP]`.
        tokens (`torch.LongTensor` of shape `(count,)`): the last decision, which is not forwarded yet.
        occupied_on_device, banned_on_device (`torch.BoolTensor` of shape `(count,)`): their twins.
        places_on_device (`torch.LongTensor` of shape `(2, count)`): the twins of `columns` and `positions`.
        order (`torch.LongTensor` of shape `(n,)`, *optional*): the row of the batch in each slot, once a row has left;
            until then `None`.
    """

    count: int
    device: torch.device
    pad: int = 0
    keeps_places: bool = False
    keeps_order: bool = True
    rows: list[Row | None] = field(init=False, default_factory=list)
    columns: np.ndarray = field(init=False)
    positions: np.ndarray = field(init=False)
    generated: np.ndarray = field(init=False)
    occupied: np.ndarray = field(init=False)
    banned: np.ndarray = field(init=False)
    tokens: torch.Tensor = field(init=False)
    occupied_on_device: torch.Tensor = field(init=False)
    banned_on_device: torch.Tensor = field(init=False)
    places_on_device: torch.Tensor = field(init=False)
    order: torch.Tensor | None = field(init=False, default=None)
    moved: bool = field(init=False, default=True)

    def __post_init__(self):
        self.columns, self.positions, self.generated = (np.zeros(self.count, dtype=np.int64) for _ in range(3))
        self.occupied, self.banned = (np.zeros(self.count, dtype=bool) for _ in range(2))
        self.tokens = torch.full((self.count,), self.pad, dtype=torch.long, device=self.device)
        self.occupied_on_device = torch.zeros(self.count, dtype=torch.bool, device=self.device)
        self.banned_on_device = torch.zeros_like(self.occupied_on_device)
        self.places_on_device = torch.zeros(2, self.count, dtype=torch.long, device=self.device)

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def free(self) -> int:
        """Slots without a row."""
        return self.count - int(self.occupied.sum())

    # ------------------------------------------------------------------ rows come and go

    def occupy(self, row: Row) -> None:
        """Put a row into the first free slot; nothing of it is filled yet."""
        row.slot = self.rows.index(None) if None in self.rows else len(self.rows)
        self.rows[row.slot : row.slot + 1] = [row]
        self.columns[row.slot] = self.positions[row.slot] = self.generated[row.slot] = 0
        self._set_occupied(row.slot, True)

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
            self.columns[slot] = self.positions[slot] = 0
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

    def _move(self, row, slot):
        """Everything that is known of a row goes to another slot."""
        for state in (self.columns, self.positions, self.generated, self.tokens):
            state[slot] = state[row.slot]
        self.ban(slot, self.banned[row.slot])
        self._set_occupied(row.slot, False)
        self._set_occupied(slot, True)
        self.rows[slot], row.slot = row, slot

    def _set_occupied(self, slot, occupied):
        self.occupied[slot] = self.occupied_on_device[slot] = occupied
        self.moved = True

    def ban(self, slot: int, banned: bool) -> None:
        """Note whether the next decision may not be `[NSP]`."""
        if self.banned[slot] != banned:
            self.banned[slot] = self.banned_on_device[slot] = bool(banned)

    # ------------------------------------------------------------------ rows grow and shrink

    def places(self, n: int) -> torch.Tensor:
        """Columns and positions of the first n slots, on the device and right: `(2, n, 1)`, until the next step."""
        if self.moved:
            self.places_on_device.copy_(torch.from_numpy(np.stack([self.columns, self.positions])))
            self.moved = False
        return self.places_on_device[:, :n, None]

    def step(self, stepping: np.ndarray) -> None:
        """The slots of `stepping` (bool, by slot) have forwarded one token."""
        self.columns[: len(stepping)] += stepping
        self.positions[: len(stepping)] += stepping
        if not self.moved and np.array_equal(stepping, self.occupied[: len(stepping)]):
            self.places_on_device += self.occupied_on_device
        else:
            self.moved = True

    def advance(self, slots: np.ndarray, lengths: np.ndarray) -> None:
        """The slots have read chunks of these lengths."""
        self.columns[slots] += lengths
        self.positions[slots] += lengths
        self.moved = True

    def shorten(self, slot: int, columns: int, positions: int) -> None:
        """Remove columns from a slot and move its next position back."""
        self.columns[slot] -= columns
        self.positions[slot] -= positions
        self.moved = True

    def take_back(self, slot: int) -> None:
        """The last decision, which was forwarded already, is taken back."""
        self.shorten(slot, columns=1, positions=1)
        self.generated[slot] -= 1

    def decide(self, tokens: torch.Tensor) -> None:
        """Every row has decided its next token: `tokens` `(n,)` of the first n slots."""
        n = len(tokens)
        self.tokens[:n] = tokens
        self.generated[:n] += self.occupied[:n]

    def lengths(self) -> torch.Tensor:
        """Columns that are filled in the slots up to the last row, on the device: `(n,)`."""
        return torch.from_numpy(self.columns[: len(self)].copy()).to(self.device)
