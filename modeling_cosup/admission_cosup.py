"""The rows that wait for a place in the decoding loop, and which of them are admitted next."""

from collections import deque

from .cache_cosup import rounded
from .configuration_cosup import CoSupConfig
from .settings_cosup import DecodingSettings
from .slots_cosup import Slots
from .trace_cosup import Row


class Admission:
    """
    Waiting rows, first come, first served: none overtakes another, so none waits for ever.

    Args:
        config ([`CoSupConfig`]), settings ([`DecodingSettings`]), slots ([`Slots`]): of the decoding loop.
    """

    def __init__(self, config: CoSupConfig, settings: DecodingSettings, slots: Slots) -> None:
        self.config = config
        self.settings = settings
        self.slots = slots
        self.waiting: deque[Row] = deque()

    def admit(self) -> list[Row]:
        """Put waiting rows into free slots, as many as have room, and return them."""
        free = self.slots.free
        if not self.waiting or not free:
            return []
        if not self.settings.serves:
            # once rows run, several at a time, since all of them wait for a prefill
            enough = min(max(1, self.slots.count // 8), len(self.waiting))
            if free < enough:
                return []
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
        """Return the columns of the cache that a row may need, one after its last token included."""
        settings = self.settings
        needed = row.settings.columns_needed(len(row.prompt), self.config.max_passage_length, settings.context_length)
        return rounded(needed + 1)
