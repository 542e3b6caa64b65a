"""The rows that wait for a place in the decoding loop, and which of them are admitted next."""

from collections import deque

from .cache_cosup import rounded
from .configuration_cosup import CoSupConfig
from .settings_cosup import DecodingSettings
from .slots_cosup import Slots
from .trace_cosup import Row

_PATIENCE = 8  # passes after which waiting rows no longer wait for more slots to become free


class Admission:
    """
    Waiting rows, first come, first served: none overtakes another, so none waits for ever.

    Each prefill makes all running rows wait, so waiting rows are admitted several at a time: once a quarter of the
    slots are free, or enough for all that wait, or after `_PATIENCE` passes with a free slot.

    Args:
        config ([`CoSupConfig`]), settings ([`DecodingSettings`]), slots ([`Slots`]): of the decoding loop.
    """

    def __init__(self, config: CoSupConfig, settings: DecodingSettings, slots: Slots) -> None:
        self.config = config
        self.settings = settings
        self.slots = slots
        self.waiting: deque[Row] = deque()
        self._passes = 0  # for which there were waiting rows and a free slot

    def admit(self) -> list[Row]:
        """Put waiting rows into free slots, as many as have room, and return them."""
        free = self.slots.free
        if not self.waiting or not free:
            return []
        enough = min(max(1, self.slots.count // 4), len(self.waiting))
        self._passes += 1
        if free < enough and self._passes < _PATIENCE:
            return []
        self._passes = 0
        admitted: list[Row] = []
        most_columns = 0
        if self.settings.max_batch_tokens is not None:
            most_columns = max((self._columns(row) for row in self.slots.rows if row is not None), default=0)
        while self.waiting and len(admitted) < free:
            row = self.waiting[0]
            if self.settings.max_batch_tokens is not None:
                most_columns = max(most_columns, self._columns(row))
                rows = self.slots.count - self.slots.free
                if rows and (rows + 1) * most_columns > self.settings.max_batch_tokens:
                    break
            self.slots.occupy(self.waiting.popleft())
            admitted.append(row)
        return admitted

    def _columns(self, row: Row) -> int:
        """
        Return the columns of the cache that a row may need, one after its last token included.

        Without `max_retrievals` that is room for one more retrieval: see `room_cosup` for rows that retrieve again.
        """
        length = len(row.prompt)
        if row.settings.retrieves and row.settings.retrieval.max_retrievals is None:
            length = max(length, self._filled(row))
        limit = self.settings.context_length
        return rounded(row.settings.columns_needed(length, self.config.max_passage_length, limit) + 1)

    def _filled(self, row: Row) -> int:
        """Return the columns of a row that runs or was set aside, without those of the tokens that it decided."""
        if row.set_aside is not None:
            return len(row.set_aside.tokens) + 1 - row.set_aside.num_generated
        slot = row.slot
        if slot < 0 or slot >= len(self.slots) or self.slots.rows[slot] is not row:
            return 0
        return int(self.slots.columns[slot]) + 1 - int(self.slots.generated[slot])
