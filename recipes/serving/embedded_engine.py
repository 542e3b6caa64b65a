"""The engine of the server's own machine: all requests share the passes of one decoding loop."""

import asyncio
import itertools
import logging
import math
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np

from serving.base_engine import BaseEngine
from serving.decoding_process import DecodingProcess
from serving.decoding_thread import DecodingThread, Delivery, Report
from serving.engine import (
    BackendFailed,
    DeadlineExceeded,
    Embeddings,
    EngineError,
    EngineLoad,
    Event,
    GenerationRequest,
    ShuttingDown,
    UnsupportedSetting,
)
from serving.served_model import ServedModel

logger = logging.getLogger("cosup.serving")
T = TypeVar("T")

_EMBEDDING_BATCH = 32  # texts that are embedded between two passes
_MOST_CRASHES = 3  # passes that break off in a row: then the engine counts as ill
_RECOVERY = 30  # seconds after the last of them: then it counts as healthy until another pass breaks off
_LONGEST_RETRY = 60  # seconds
_LAST_SECONDS = 10  # in which the decoding must end once nothing is left to decode


@dataclass
class _Stream:
    """
    A request on the side of the event loop.

    Args:
        number (`int`): of the request.
        events (`list[Event]`): events that the client has not taken yet.
        ended (`bool`): whether no more events come.
        error ([`EngineError`], *optional*): why no more come, if something failed.
        news (`asyncio.Event`): is set when one of these changes.
        started (`float`): `time.monotonic()` of the request.
    """

    number: int
    events: list[Event] = field(default_factory=list)
    ended: bool = False
    error: EngineError | None = None
    news: asyncio.Event = field(default_factory=asyncio.Event)
    started: float = field(default_factory=time.monotonic)


class EmbeddedEngine(BaseEngine):
    """
    Answers requests with a model that decodes in a thread of this process, or in a process of its own.

    Args:
        decoding ([`DecodingThread`] or [`DecodingProcess`]): of the model. In a process of its own it does not share
            Python's lock with HTTP.
        max_waiting (`int`): the most requests that wait, embeddings included; more are refused with [`QueueFull`].
    """

    def __init__(self, decoding: DecodingThread | DecodingProcess, max_waiting: int = 256) -> None:
        facts = decoding.facts
        bounds = (facts.max_running, max_waiting)
        super().__init__(facts.config, facts.tokenizer, facts.has_index, facts.context_length, *bounds)
        self.decoding = decoding
        self._numbers = itertools.count()
        self._streams: dict[int, _Stream] = {}  # requests that have not ended
        self._batches: dict[int, asyncio.Future[Embeddings]] = {}  # texts that are embedded
        self._report = Report()  # the last one, without its deliveries
        self._last_crash = -math.inf  # `time.monotonic()` of it
        self._mean_seconds = 1.0  # that a request takes; the last ones count most
        self._started = False
        self._ended = asyncio.Event()  # the decoding has ended

    @classmethod
    def in_thread(cls, *parts: Any, max_waiting: int = 256, **options: Any) -> "EmbeddedEngine":
        """Return an engine that decodes in a thread; `parts` and `options` are those of [`ServedModel`]."""
        return cls(DecodingThread(ServedModel(*parts, **options)), max_waiting)

    # ------------------------------------------------------------------ life

    async def start(self) -> None:
        """
        Check the parts against each other, and start to serve.

        Raises:
            `ValueError`: for an index or a memory of another model, and for a Gen that cannot retrieve.
            `RuntimeError`: for an engine that was started before.
        """
        if self._started:
            raise RuntimeError("This engine was started before: make another one.")
        loop = asyncio.get_running_loop()

        def deliver(report: Report) -> None:
            if not loop.is_closed():
                loop.call_soon_threadsafe(self._take, report)

        self.decoding.start(deliver)
        self._started = True

    async def stop(self, drain: bool = True) -> None:
        """Refuse new requests with [`ShuttingDown`]; finish those that were accepted (`drain`), or cancel them."""
        self._stopping = True
        if not self._started:
            return
        if not drain:
            for stream in list(self._streams.values()):
                self._cancel(stream, ShuttingDown("The server is shutting down."))
        await self._end_embeddings(drain)  # while their batches are still taken
        self.decoding.stop()
        await self._wait_for_end(None if drain else _LAST_SECONDS)

    async def _wait_for_end(self, seconds: float | None) -> None:
        """Wait until the decoding has ended; after so many seconds, in a pass or a search that hangs, give it up."""
        try:
            await asyncio.wait_for(self._ended.wait(), seconds)
        except asyncio.TimeoutError:
            logger.warning(f"The decoding did not end in {seconds:g} seconds: it is given up.")
            self.decoding.give_up()
        else:
            self.decoding.join()

    async def is_healthy(self) -> bool:
        """
        Return whether requests can be answered now: the decoding goes on, and its passes do not break off.

        Only a request shows whether they still do, and a balancer sends none to a server that is ill. So the engine
        counts as healthy again some time after the last one broke off.
        """
        if not self._started or self._stopping or self.failure:
            return False
        has_rested = time.monotonic() - self._last_crash >= _RECOVERY
        return has_rested or self._report.num_crashes < _MOST_CRASHES

    def load(self) -> EngineLoad:
        """Return how busy the engine is; embeddings count as waiting: they take no slot."""
        running = self._report.num_running
        waiting = max(0, len(self._streams) - running) + len(self._embedding_tasks)
        return EngineLoad(running, waiting, self.max_running, self.max_waiting)

    # ------------------------------------------------------------------ requests

    def check(self, request: GenerationRequest) -> None:
        """
        Raise [`UnsupportedSetting`], which names the setting first, unless `generate(request)` can run.

        If the model is in another process, `generate` does what needs it: it checks candidates and given passages.
        """
        self.decoding.check(request)

    async def generate(self, request: GenerationRequest) -> AsyncIterator[Sequence[Event]]:
        """Yield the events of a request in groups, as they happen; see [`~serving.engine.Engine`]."""
        self._check_open()
        if self._is_full:
            self.check(request)  # what can never be answered is refused as such
            self._check_room()
        stream = _Stream(next(self._numbers))
        self.decoding.submit(stream.number, request)
        self._streams[stream.number] = stream
        try:
            while True:
                await self._wait_for_news(stream, request.deadline)
                events, stream.events = stream.events, []
                if events:
                    yield events
                elif stream.error is not None:
                    raise stream.error
                elif stream.ended:
                    return
        finally:
            self._cancel(stream, None)

    @property
    def _num_answers(self) -> int:
        return len(self._streams)

    @property
    def _retry_after(self) -> int:
        seconds = math.ceil(self._mean_seconds * max(1, self.max_waiting) / self.max_running)
        return min(max(1, seconds), _LONGEST_RETRY)

    async def _wait_for_news(self, stream: _Stream, deadline: float | None) -> None:
        if stream.events or stream.ended:
            return
        stream.news.clear()
        if deadline is None:
            await stream.news.wait()
            return
        # until Python 3.12 wait_for() misses a cancellation that comes together with the news
        timer = asyncio.get_running_loop().call_later(deadline - time.monotonic(), stream.news.set)
        try:
            await stream.news.wait()
        finally:
            timer.cancel()
        if not stream.events and not stream.ended:
            raise DeadlineExceeded("The answer was not finished in time.")

    def _take(self, report: Report) -> None:
        """Hand the news of a pass to their requests."""
        for delivery in report.deliveries:
            if delivery.number in self._batches:
                self._resolve(delivery)
            elif delivery.number in self._streams:  # not cancelled
                stream = self._streams[delivery.number]
                stream.events += delivery.events
                if delivery.ended:
                    self._end(stream, delivery.error)
                stream.news.set()
        if report.num_crashes > self._report.num_crashes:
            self._last_crash = time.monotonic()
        self._report = Report([], report.num_running, report.num_crashes)
        if report.end:
            self._ended.set()
            self._fail(report.end)

    def _fail(self, message: str) -> None:
        """End everything: the decoding has ended."""
        if not self._stopping:
            self.failure = message
        for stream in list(self._streams.values()):
            self._end(stream, BackendFailed(message))
            stream.news.set()
        for number in list(self._batches):
            self._resolve(Delivery(number, error=BackendFailed(message)))

    def _end(self, stream: _Stream, error: EngineError | None) -> None:
        stream.ended = True
        stream.error = error
        del self._streams[stream.number]
        self._mean_seconds += 0.1 * (time.monotonic() - stream.started - self._mean_seconds)

    def _cancel(self, stream: _Stream, error: EngineError | None) -> None:
        """End a request that has not ended; its slot is free at the next step."""
        if not stream.ended:
            self._end(stream, error)
            self.decoding.cancel(stream.number)
            stream.news.set()

    def _check_open(self) -> None:
        """Raise an error unless the engine takes requests."""
        super()._check_open()
        self._check_decoding()

    def _check_decoding(self) -> None:
        if not self._started:
            raise ShuttingDown("The engine was not started.")
        if self.failure:
            raise BackendFailed(self.failure)

    # ------------------------------------------------------------------ embeddings

    def _check_encoder(self) -> None:
        if not self.decoding.facts.embeds_passages:
            raise UnsupportedSetting(
                "passages: Emb_seq, which embeds them, is not in memory; load the model with load_emb_seq=True."
            )

    async def _embed_passages(self, passages: Sequence[dict[str, Any]]) -> Embeddings:
        return await self._embed(list(passages), self.decoding.embed_passages)

    async def _embed_queries(self, prompts: list[list[int]]) -> Embeddings:
        return await self._embed(prompts, self.decoding.embed_queries)

    async def _embed(self, items: list[T], embed: Callable[[int, list[T]], None]) -> Embeddings:
        """Embed items, some of them after each pass; if the client leaves, no more of them."""
        batches = [Embeddings(np.zeros((0, self.config.embedding_size), np.float32), 0)]
        for start in range(0, len(items), _EMBEDDING_BATCH):
            self._check_decoding()
            number = next(self._numbers)
            embed(number, items[start : start + _EMBEDDING_BATCH])
            self._batches[number] = asyncio.get_running_loop().create_future()
            try:
                batches.append(await self._batches[number])
            finally:
                if self._batches.pop(number, None) is not None:
                    self.decoding.cancel(number)
        embeds = np.concatenate([batch.embeds for batch in batches])
        return Embeddings(embeds, sum(batch.num_tokens for batch in batches))

    def _resolve(self, delivery: Delivery) -> None:
        future = self._batches.pop(delivery.number)
        if future.done():  # the client has gone
            return
        if delivery.error is not None:
            future.set_exception(delivery.error)
        else:
            assert delivery.embeddings is not None
            future.set_result(delivery.embeddings)
