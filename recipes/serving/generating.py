"""The answers of one HTTP request: run by the engine, merged, whole or as a stream of server-sent events."""

import asyncio
import json
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, TypeVar

from fastapi.responses import StreamingResponse
from starlette.requests import ClientDisconnect
from starlette.types import Message, Receive, Scope, Send

from serving.answers import AnswerWriter, Piece
from serving.engine import Engine, EngineError, GenerationRequest
from serving.errors import from_engine, internal_error
from serving.metrics import AnswerTimes, Metrics
from serving.responses import ChatShape, CompletionShape, usage

logger = logging.getLogger("cosup.serving")
T = TypeVar("T")

SEND_TIMEOUT = 60  # seconds that a client may take to read what was sent


@dataclass
class Job:
    """
    One answer to write.

    Args:
        request ([`GenerationRequest`]): for the engine.
        writer ([`AnswerWriter`]): for its events.
        is_first (`bool`): the first answer to its prompt.
    """

    request: GenerationRequest
    writer: AnswerWriter
    is_first: bool = True


class Answers:
    """
    The answers of one HTTP request, in the order in which the client gets them.

    Args:
        engine ([`Engine`]): generates.
        jobs (`list[Job]`): one for each answer.
        shape ([`ChatShape`] or [`CompletionShape`]): what the response looks like.
        prompt_tokens (`int`): of all prompts, for the usage.
        metrics ([`Metrics`]): of the app.
        are_logged (`bool`): write the answers to the log, with their numbers; also those that were begun only.
    """

    def __init__(
        self,
        engine: Engine,
        jobs: list[Job],
        shape: ChatShape | CompletionShape,
        prompt_tokens: int,
        metrics: Metrics,
        are_logged: bool,
    ) -> None:
        self.engine = engine
        self.jobs = jobs
        self.shape = shape
        self.prompt_tokens = prompt_tokens
        self.metrics = metrics
        self.are_logged = are_logged

    async def pieces(self) -> AsyncGenerator[tuple[int, Piece], None]:
        """Yield the pieces of all answers as they come, each with the number of its answer."""
        streams = [self._pieces_of(index, job) for index, job in enumerate(self.jobs)]
        if len(streams) == 1:  # the usual case, without another task and its queue
            async with aclosing(streams[0]) as pieces:
                async for piece in pieces:
                    yield 0, piece
            return
        async with aclosing(merged(streams)) as merged_pieces:
            async for index, piece in merged_pieces:
                yield index, piece

    async def _pieces_of(self, index: int, job: Job) -> AsyncGenerator[Piece, None]:
        """Yield the pieces of an answer; once it has ended, or is not wanted any more, its slot is freed."""
        num_prompt_tokens = len(job.request.prompt_ids) if job.is_first else 0
        times = AnswerTimes(self.metrics, job.request.incremental, num_prompt_tokens)
        try:
            async with aclosing(self.engine.generate(job.request)) as groups:
                async for events in groups:
                    times.event()
                    yield job.writer.write(events)
                    if job.writer.finish_reason is not None:  # at a stop string, before the engine's end
                        break
        finally:
            times.end(job.writer)
            if self.are_logged and times.first is not None:  # an answer that was refused is not an empty one
                logger.info("%s[%d]: %r", self.shape.head["id"], index, job.writer.text)

    def _usage(self) -> dict[str, Any]:
        return usage(self.prompt_tokens, [job.writer for job in self.jobs])

    async def whole(self) -> dict[str, Any]:
        """Return the whole response."""
        answers = [Piece() for _ in self.jobs]
        async with aclosing(self.pieces()) as pieces:
            async for index, piece in pieces:
                answers[index].add(piece)
        choices = [self.shape.choice(index, answer) for index, answer in enumerate(answers)]
        return self.shape.response(choices, self._usage())

    async def stream(self, include_usage: bool) -> "EventStream":
        """
        Return the stream, once its first event is there.

        Until then an error is a response of its own; later it is the last event of the stream.
        """
        chunks = self._chunks(include_usage)
        first = await anext(chunks)
        return EventStream(first, chunks)

    async def _chunks(self, include_usage: bool) -> AsyncGenerator[bytes, None]:
        """Yield server-sent events."""
        no_usage = {"usage": None} if include_usage else {}
        has_begun: set[int] = set()
        async with aclosing(self.pieces()) as pieces:
            async for index, piece in pieces:
                choices = []
                if index not in has_begun:
                    has_begun.add(index)
                    choices += self.shape.begin(index)
                if piece:
                    choices.append(self.shape.piece(index, piece))
                yield b"".join(server_sent({**self.shape.chunk([choice]), **no_usage}) for choice in choices)
        if include_usage:
            yield server_sent({**self.shape.chunk([]), "usage": self._usage()})
        yield b"data: [DONE]\n\n"


def server_sent(data: dict[str, Any]) -> bytes:
    """Return a server-sent event."""
    return f"data: {json.dumps(data, ensure_ascii=False, separators=(',', ':'))}\n\n".encode()


class EventStream(StreamingResponse):
    """
    A stream of server-sent events that ends when its client leaves or does not read.

    Args:
        first (`bytes`): the first events.
        chunks (`AsyncGenerator[bytes, None]`): further events; closed at the end, whatever ends the stream.
    """

    media_type = "text/event-stream"

    def __init__(self, first: bytes, chunks: AsyncGenerator[bytes, None]) -> None:
        super().__init__(self._with_errors(first, chunks), headers={"Cache-Control": "no-cache"})
        self._chunks = chunks

    async def _with_errors(self, first: bytes, chunks: AsyncGenerator[bytes, None]) -> AsyncIterator[bytes]:
        """Yield the events; an error becomes the last one."""
        try:
            yield first
            async for chunk in chunks:
                if chunk:
                    yield chunk
        except EngineError as error:
            yield server_sent(from_engine(error).body())
        except Exception:
            yield server_sent(internal_error().body())

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the stream. If its client leaves or does not read, give it up: the response ends without its end."""

        loop = asyncio.get_running_loop()
        is_stuck = False
        sending_since: float | None = None

        def check() -> None:
            """Give up a client that reads nothing. One timer serves the whole stream: one per token costs too much."""
            nonlocal is_stuck, timer
            seconds_left: float = SEND_TIMEOUT
            if sending_since is not None:
                seconds_left = sending_since + SEND_TIMEOUT - loop.time()
            if seconds_left <= 0:
                is_stuck = True
                sending.cancel()
            else:
                timer = loop.call_later(seconds_left, check)

        async def send_and_note(message: Message) -> None:
            nonlocal sending_since
            sending_since = loop.time()
            await send(message)
            sending_since = None

        sending = asyncio.create_task(self.stream_response(send_and_note))
        timer = loop.call_later(SEND_TIMEOUT, check)
        async with aclosing(self._chunks):
            try:
                await unless_disconnected(receive, sending)
            except ClientDisconnect:
                pass
            except asyncio.CancelledError:
                if not is_stuck:
                    raise
                logger.warning(f"A client read nothing for {SEND_TIMEOUT} seconds: its answer was given up.")
            finally:
                timer.cancel()


async def merged(streams: Sequence[AsyncGenerator[T, None]]) -> AsyncGenerator[tuple[int, T], None]:
    """
    Yield the items of several streams as they come, each with the number of its stream.

    A consumer that waits makes the streams wait. The first error of a stream ends all of them.
    """
    queue: asyncio.Queue[tuple[int, T | None, BaseException | None]] = asyncio.Queue(maxsize=len(streams))

    async def forward(index: int, stream: AsyncGenerator[T, None]) -> None:
        error = None
        try:
            async with aclosing(stream):
                async for item in stream:
                    await queue.put((index, item, None))
        except Exception as failure:
            error = failure
        await queue.put((index, None, error))

    tasks = [asyncio.create_task(forward(index, stream)) for index, stream in enumerate(streams)]
    try:
        num_running = len(tasks)
        while num_running:
            index, item, error = await queue.get()
            if error is not None:
                raise error
            if item is None:
                num_running -= 1
            else:
                yield index, item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def unless_disconnected(receive: Receive, work: Awaitable[T]) -> T:
    """
    Return the result of `work`, which is cancelled if the client leaves meanwhile.

    Starlette's own watch over streams depends on the version of ASGI that the HTTP server declares.

    Args:
        receive (`Receive`): of the request, whose body has been read.
        work (`Awaitable`): the response.

    Raises:
        `ClientDisconnect`: if it left.
    """

    async def disconnection() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    working = asyncio.ensure_future(work)
    leaving = asyncio.create_task(disconnection())
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientDisconnect
        return working.result()
    finally:
        for task in (working, leaving):
            task.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)
