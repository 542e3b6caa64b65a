"""
The thread in which a server's model computes: passes of one decoding loop for all requests, and embeddings between.

Other threads tell it what to do through a queue. The news of a pass is reported at once.
"""

import logging
import queue
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from modeling_cosup.cache_cosup import maskable_attention
from modeling_cosup.trace_cosup import Logprobs, Retrieval, Row

from serving.base_engine import search_failed
from serving.engine import (
    BackendFailed,
    Embeddings,
    EndEvent,
    EngineError,
    Event,
    GenerationRequest,
    RetrievalEvent,
    TokenEvent,
    TokenLogprobs,
)
from serving.served_model import ServedModel

logger = logging.getLogger("cosup.serving")


@dataclass(eq=False)  # compared by identity
class _Ticket:
    """
    A request in the decoding loop. It is the listener of its row if events are wanted as they happen.

    Args:
        number (`int`): of the request.
        row ([`Row`]): of the request.
        new_events (`list[Event]`): of the pass under way.
    """

    number: int
    row: Row
    new_events: list[Event] = field(default_factory=list)

    def on_token(self, token: int, logprobs: Logprobs | None) -> None:
        self.new_events.append(token_event(token, logprobs))

    def on_retrieval(self, retrieval: Retrieval, nsp_ids: list[int], passage_ids: list[int]) -> None:
        self.new_events.append(RetrievalEvent(retrieval))


@dataclass
class Delivery:
    """
    News for one request, or for texts to embed.

    Args:
        number (`int`): of the request, or of the texts.
        events (`list[Event]`): new ones.
        ended (`bool`): whether this is the last delivery.
        error ([`EngineError`], *optional*): why it is the last, if something failed.
        embeddings ([`Embeddings`], *optional*): of the texts.
    """

    number: int
    events: list[Event] = field(default_factory=list)
    ended: bool = False
    error: EngineError | None = None
    embeddings: Embeddings | None = None


@dataclass
class Report:
    """
    The news of a pass.

    Args:
        deliveries (`list[Delivery]`): for requests and texts.
        num_running (`int`): rows that are decoded now.
        num_crashes (`int`): passes that broke off since the last one that did not.
        end (`str`): why the decoding has ended; empty while it goes on.
    """

    deliveries: list[Delivery] = field(default_factory=list)
    num_running: int = 0
    num_crashes: int = 0
    end: str = ""


class DecodingThread:
    """
    Decodes requests as they come.

    Args:
        served ([`ServedModel`]): the model.
    """

    def __init__(self, served: ServedModel) -> None:
        self.served = served
        self.facts = served.facts
        self._messages: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="decoding", daemon=True)
        # the rest belongs to the thread
        self._tickets: dict[Row, _Ticket] = {}
        self._numbers: dict[int, _Ticket] = {}
        self._jobs: dict[int, Callable[[], None]] = {}  # texts to embed, by their numbers
        self._num_crashes = 0
        self._last_report = Report()
        self._serving = True

    # ------------------------------------------------------------------ other threads

    def start(self, report: Callable[[Report], None]) -> None:
        """
        Start the thread, which calls `report`.

        Raises:
            `ValueError`: for an index or a memory of another model, and for a Gen that cannot retrieve.
        """
        self._decoder = self.served.make_decoder()
        self._deliver = report
        self._thread.start()

    def check(self, request: GenerationRequest) -> None:
        """Raise [`UnsupportedSetting`] unless a request can be submitted."""
        self.served.row(request)

    def submit(self, number: int, request: GenerationRequest) -> None:
        """
        Let a request wait for a slot.

        Raises:
            [`EngineError`]: if it cannot run.
        """
        ticket = _Ticket(number, self.served.row(request))
        if request.incremental:
            ticket.row.listener = ticket
        self._messages.put(partial(self._submit, ticket))

    def cancel(self, number: int) -> None:
        """Take out a request, or texts to embed, before the next pass; nothing more is delivered for it."""
        self._messages.put(partial(self._cancel, number))

    def embed_passages(self, number: int, passages: list[dict[str, Any]]) -> None:
        """Embed passages between two passes."""
        self._messages.put(partial(self._add_job, number, "embed_passages", passages))

    def embed_queries(self, number: int, prompts: list[list[int]]) -> None:
        """Embed prompts that end in `[NSP]` between two passes."""
        self._messages.put(partial(self._add_job, number, "embed_queries", prompts))

    def refuse(self, number: int, error: EngineError) -> None:
        """Deliver the error of a request that could not be submitted."""
        self._messages.put(partial(self._report, [Delivery(number, ended=True, error=error)]))

    def stop(self) -> None:
        """Finish what was submitted before, then end the thread."""
        self._messages.put(self._stop)

    def join(self) -> None:
        """Wait until the thread has ended."""
        self._thread.join()

    def give_up(self) -> None:
        """Wait no longer; the thread ends with this process."""

    # ------------------------------------------------------------------ this thread

    def _run(self) -> None:
        try:
            with maskable_attention(self.served.model.gen):
                while self._serving or self._has_work:
                    self._take_messages()
                    if self._jobs:
                        self._jobs.pop(next(iter(self._jobs)))()  # one at a time: rows wait for it
                    if self._decoder.has_rows:
                        self._step()
        finally:
            self._deliver(Report(end="The server's decoding thread has ended."))

    @property
    def _has_work(self) -> bool:
        return bool(self._jobs) or self._decoder.has_rows

    def _take_messages(self) -> None:
        """Do what other threads ask for; if there is no work, wait until they ask for something."""
        if self._serving and not self._has_work:
            self._messages.get()()
        while not self._messages.empty():
            self._messages.get()()

    def _submit(self, ticket: _Ticket) -> None:
        self._tickets[ticket.row] = ticket
        self._numbers[ticket.number] = ticket
        self._decoder.submit(ticket.row)

    def _add_job(self, number: int, method: str, items: list[Any]) -> None:
        self._jobs[number] = partial(self._embed, number, method, items)

    def _cancel(self, number: int) -> None:
        self._jobs.pop(number, None)
        ticket = self._numbers.get(number)
        if ticket is not None:
            self._forget(ticket.row)
            self._decoder.cancel(ticket.row)
            self._report([])

    def _forget(self, row: Row) -> _Ticket:
        ticket = self._tickets.pop(row)
        del self._numbers[ticket.number]
        return ticket

    def _stop(self) -> None:
        self._serving = False

    def _report(self, deliveries: list[Delivery]) -> None:
        """Report deliveries, and how many rows run; nothing, if there is no news."""
        report = Report(deliveries, int(self._decoder.slots.occupied.sum()), self._num_crashes)
        last = self._last_report
        changed = (report.num_running, report.num_crashes) != (last.num_running, last.num_crashes)
        if deliveries or changed:
            self._last_report = Report(num_running=report.num_running, num_crashes=report.num_crashes)
            self._deliver(report)

    def _step(self) -> None:
        """Run one pass and report its events; a pass that breaks off ends the rows that took part."""
        try:
            ended = self._decoder.step()
        except Exception as error:
            self._start_afresh(error)
            return
        self._num_crashes = 0
        deliveries = [self._last_delivery(row) for row in ended]
        for row in self._decoder.listening:
            ticket = self._tickets[row]
            if ticket.new_events:
                deliveries.append(Delivery(ticket.number, ticket.new_events))
                ticket.new_events = []
        self._report(deliveries)

    def _last_delivery(self, row: Row) -> Delivery:
        ticket = self._forget(row)
        events = ticket.new_events
        if row.error is not None:
            return Delivery(ticket.number, events, ended=True, error=search_failed(row.error))
        if row.listener is None:
            events = events_of(row)
        end = EndEvent(row.finish_reason, row.num_generated_tokens)
        return Delivery(ticket.number, [*events, end], ended=True)

    def _start_afresh(self, error: Exception) -> None:
        """Fail the rows of a batch whose pass broke off; those that wait go on in a new loop."""
        logger.error("A pass of the decoding loop broke off; the requests in it fail.", exc_info=error)
        self._num_crashes += 1
        waiting = list(self._decoder.admission.waiting)
        self._decoder = self.served.make_decoder()  # with a cache of its own: nothing is kept of the one that broke
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        message = f"The model failed while it wrote this answer ({type(error).__name__}); try again."
        deliveries = []
        for row in [row for row in self._tickets if row not in waiting]:
            ticket = self._forget(row)
            deliveries.append(Delivery(ticket.number, ticket.new_events, ended=True, error=BackendFailed(message)))
        for row in waiting:
            self._decoder.submit(row)
        self._report(deliveries)

    def _embed(self, number: int, method: str, items: list[Any]) -> None:
        try:
            embeddings = getattr(self.served, method)(items)
        except Exception as error:
            logger.error("Texts could not be embedded.", exc_info=error)
            failure = BackendFailed(f"The texts could not be embedded ({type(error).__name__}).")
            self._report([Delivery(number, ended=True, error=failure)])
            return
        self._report([Delivery(number, ended=True, embeddings=embeddings)])


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
