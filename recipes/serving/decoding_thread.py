"""
The thread in which a server's model computes: passes of one decoding loop for all requests, and jobs between them.

Other threads tell it what to do through a queue. The events of a pass are delivered together.
"""

import logging
import queue
import threading
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from transformers import PreTrainedModel

from modeling_cosup.cache_cosup import maskable_attention
from modeling_cosup.decoding_cosup import Decoder
from modeling_cosup.trace_cosup import Logprobs, Retrieval, Row

from serving.base_engine import search_failed
from serving.engine import (
    BackendFailed,
    EndEvent,
    EngineError,
    Event,
    RetrievalEvent,
    TokenEvent,
    TokenLogprobs,
)

logger = logging.getLogger(__name__)


@dataclass(eq=False)  # compared by identity
class Ticket:
    """
    A request in the decoding loop. It is the listener of its row if events are wanted as they happen.

    Args:
        row ([`Row`]): of the request.
        new_events (`list[Event]`): of the pass under way.
    """

    row: Row
    new_events: list[Event] = field(default_factory=list)

    def on_token(self, token: int, logprobs: Logprobs | None) -> None:
        self.new_events.append(token_event(token, logprobs))

    def on_retrieval(self, retrieval: Retrieval, nsp_ids: list[int], passage_ids: list[int]) -> None:
        self.new_events.append(RetrievalEvent(retrieval))


@dataclass(frozen=True)
class Delivery:
    """New events of one request; after the last ones it has `ended`, with an `error` if it failed."""

    ticket: Ticket
    events: list[Event]
    ended: bool = False
    error: EngineError | None = None


class DecodingThread:
    """
    Decodes rows as they come.

    Args:
        gen (`PreTrainedModel`): the model's Gen.
        make_decoder (`Callable`): returns a [`Decoder`] with fresh state.
        deliver (`Callable`): gets the deliveries of a pass, in this thread.

    Attributes:
        num_running (`int`): rows that are decoded now.
        num_crashes (`int`): passes that broke off since the last one that did not.
    """

    def __init__(
        self, gen: PreTrainedModel, make_decoder: Callable[[], Decoder], deliver: Callable[[list[Delivery]], None]
    ) -> None:
        self.gen = gen
        self.make_decoder = make_decoder
        self.deliver = deliver
        self.num_running = 0
        self.num_crashes = 0
        self._messages: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="decoding", daemon=True)
        # the rest belongs to the thread
        self._decoder = make_decoder()
        self._tickets: dict[Row, Ticket] = {}
        self._jobs: list[Callable[[], None]] = []
        self._serving = True

    # ------------------------------------------------------------------ other threads

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    @property
    def is_alive(self) -> bool:
        """Whether the thread runs."""
        return self._thread.is_alive()

    def submit(self, ticket: Ticket) -> None:
        """Let the row of a ticket wait for a slot."""
        self._messages.put(lambda: self._submit(ticket))

    def cancel(self, ticket: Ticket) -> None:
        """Take out a row before the next pass; nothing more is delivered for it."""
        self._messages.put(lambda: self._cancel(ticket))

    def call(self, job: Callable[[], None]) -> None:
        """Run a job between two passes; it must not raise."""
        self._messages.put(lambda: self._jobs.append(job))

    def stop(self) -> None:
        """Finish what was submitted before, then end the thread; wait for that."""
        self._messages.put(self._stop)
        self._thread.join()

    # ------------------------------------------------------------------ this thread

    def _run(self) -> None:
        try:
            with maskable_attention(self.gen):
                while self._serving or self._has_work:
                    self._take_messages()
                    if self._jobs:
                        self._jobs.pop(0)()  # one at a time: rows wait for it
                    if self._decoder.has_rows:
                        self._step()
        finally:
            self._fail(list(self._tickets), "The server's decoding thread has ended.")

    @property
    def _has_work(self) -> bool:
        return bool(self._jobs) or self._decoder.has_rows

    def _take_messages(self) -> None:
        """Do what other threads want; without work wait for it."""
        if self._serving and not self._has_work:
            self._messages.get()()
        while not self._messages.empty():
            self._messages.get()()

    def _submit(self, ticket: Ticket) -> None:
        self._tickets[ticket.row] = ticket
        self._decoder.submit(ticket.row)

    def _cancel(self, ticket: Ticket) -> None:
        if self._tickets.pop(ticket.row, None) is not None:
            self._decoder.cancel(ticket.row)
            self._count_running()

    def _stop(self) -> None:
        self._serving = False

    def _count_running(self) -> None:
        self.num_running = int(self._decoder.slots.occupied.sum())

    def _step(self) -> None:
        """Run one pass and deliver its events; a pass that breaks off ends the rows that took part."""
        try:
            ended = self._decoder.step()
        except Exception as error:
            self._start_afresh(error)
            return
        self.num_crashes = 0
        self._count_running()
        deliveries = [self._last_delivery(row) for row in ended]
        for row in self._decoder.listening:
            ticket = self._tickets[row]
            if ticket.new_events:
                deliveries.append(Delivery(ticket, ticket.new_events))
                ticket.new_events = []
        if deliveries:
            self.deliver(deliveries)

    def _last_delivery(self, row: Row) -> Delivery:
        ticket = self._tickets.pop(row)
        events = ticket.new_events
        if row.error is not None:
            return Delivery(ticket, events, ended=True, error=search_failed(row.error))
        if row.listener is None:
            events = events_of(row)
        end = EndEvent(row.finish_reason, row.num_generated_tokens)
        return Delivery(ticket, [*events, end], ended=True)

    def _start_afresh(self, error: Exception) -> None:
        """Fail the rows of a batch whose pass broke off; those that wait go on in a new loop."""
        logger.error("A pass of the decoding loop broke off; the requests in it fail.", exc_info=error)
        self.num_crashes += 1
        waiting = list(self._decoder.admission.waiting)
        self._decoder = self.make_decoder()  # with a cache of its own: nothing is kept of the one that broke
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        running = [row for row in self._tickets if row not in waiting]
        self._fail(running, f"The model failed while it wrote this answer ({type(error).__name__}); try again.")
        for row in waiting:
            self._decoder.submit(row)
        self._count_running()

    def _fail(self, rows: list[Row], message: str) -> None:
        deliveries = []
        for row in rows:
            ticket = self._tickets.pop(row)
            deliveries.append(Delivery(ticket, ticket.new_events, ended=True, error=BackendFailed(message)))
        if deliveries:
            self.deliver(deliveries)


# ---------------------------------------------------------------------- events


def token_event(token: int, logprobs: Logprobs | None) -> TokenEvent:
    """Return the event of a decided token."""
    if logprobs is None:
        return TokenEvent(token)
    return TokenEvent(token, TokenLogprobs(*logprobs))


def events_of(row: Row) -> list[Event]:
    """Return the events of a finished row, without its end."""
    events: list[Event] = []
    decided = 0  # tokens so far, each `[NSP]` that retrieved included
    position = len(row.prompt)
    for retrieval in [*row.retrievals, None]:
        end = len(row.ids) if retrieval is None else retrieval.position
        for token in row.ids[position:end]:  # none for the [NSP] of a prompt
            logprobs = row.logprobs[decided] if row.logprobs else None
            events.append(token_event(token, logprobs))
            decided += 1
        if retrieval is not None:
            events.append(RetrievalEvent(retrieval))
            if retrieval.position >= len(row.prompt):
                decided += 1
            position = retrieval.grounded_span[0]
    return events
