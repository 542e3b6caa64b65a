"""
The clients of benchmarks/server_load.py, which runs [`main`] in a process of their own.

They share a machine with the server: while they load it they only send prepared bytes and keep what comes back. They
read it afterwards. This module imports neither torch nor this project: it starts at once and takes little memory.
"""

import asyncio
import http.client
import io
import json
import random
import re
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any
from urllib.parse import urlsplit

PLAIN, STREAMED, CANCELLED, DISCONNECTED = "plain", "streamed", "cancelled", "disconnected"
LAST_CHUNK = b"0\r\n\r\n"


@dataclass
class Job:
    """
    What the clients do.

    Args:
        base_url (`str`): of the API, with `/v1`.
        questions (`list[str]`): the user messages.
        body (`dict`): what else each request holds, e.g. `max_tokens`.
        num_clients (`int`): each waits for its answer before it sends the next request.
        shares (`dict[str, float]`): share of each kind of request. `"cancelled"` closes a stream after a few chunks,
            `"disconnected"` closes the connection while the server works.
        seconds (`float`, *optional*): send random questions for so long; by default each question is sent once.
        seed (`int`): of questions and kinds.
    """

    base_url: str
    questions: list[str]
    body: dict[str, Any] = field(default_factory=dict)
    num_clients: int = 8
    shares: dict[str, float] = field(default_factory=lambda: {PLAIN: 1.0})
    seconds: float | None = None
    seed: int = 0

    def requests(self) -> Iterator[tuple[int, str]]:
        """Yield the number of a question and the kind of its request, until all are done or the time is over."""
        rng = random.Random(self.seed)
        kinds = list(self.shares)
        weights = list(self.shares.values())
        if self.seconds is None:
            for question in range(len(self.questions)):
                yield question, rng.choices(kinds, weights)[0]
            return
        end = time.monotonic() + self.seconds
        while time.monotonic() < end:
            yield rng.randrange(len(self.questions)), rng.choices(kinds, weights)[0]


@dataclass
class Outcome:
    """
    What became of a request.

    Args:
        question (`int`): number of the question.
        kind (`str`): `"plain"`, `"streamed"`, `"cancelled"` or `"disconnected"`.
        finished (`bool`): the answer is complete; an answer may come before its client wanted to break off.
        error (`str`): what went wrong; empty where nothing did.
        text (`str`), passages (`list[list[str]]`), tokens (`int`): the answer, the ids of the passages of each
            retrieval, and the number of decoded tokens.
        first_token (`float`, *optional*): seconds to the first text of a stream that has one.
        total (`float`): seconds to the end.
    """

    question: int
    kind: str
    finished: bool = False
    error: str = ""
    text: str = ""
    passages: list[list[str]] = field(default_factory=list)
    tokens: int = 0
    first_token: float | None = None
    total: float = 0.0


@dataclass
class Exchange:
    """
    A request, and what came back.

    Args:
        outcome ([`Outcome`]): of the request.
        start (`float`): when it was sent, on the clock of `time.perf_counter`.
        received (`list[tuple[float, bytes]]`): what came, with its time.
        is_complete (`bool`): the response has ended.
    """

    outcome: Outcome
    start: float = field(default_factory=time.perf_counter)
    received: list[tuple[float, bytes]] = field(default_factory=list)
    is_complete: bool = False


class Client:
    """
    Sends requests, one after the other, over a connection that is kept.

    Args:
        job ([`Job`]): of all clients.
        number (`int`): of this one.
    """

    def __init__(self, job: Job, number: int) -> None:
        self.job = job
        self.rng = random.Random(f"{job.seed} {number}")
        self.url = urlsplit(job.base_url)
        self.reader: asyncio.StreamReader | None = None
        self.writer: asyncio.StreamWriter | None = None

    async def run(self, requests: Iterator[tuple[int, str]], exchanges: list[Exchange]) -> None:
        """Send requests until there are no more."""
        for question, kind in requests:
            exchange = Exchange(Outcome(question, kind))
            exchanges.append(exchange)
            try:
                if kind == DISCONNECTED:
                    await self._send_and_leave(exchange)
                else:
                    await self._send(exchange)
            except OSError as error:
                exchange.outcome.error = repr(error)
                self._close()
            exchange.outcome.total = time.perf_counter() - exchange.start
        self._close()

    def _request(self, outcome: Outcome) -> bytes:
        messages = [{"role": "user", "content": self.job.questions[outcome.question]}]
        body = {"messages": messages, "temperature": 0, **self.job.body}
        if outcome.kind in (STREAMED, CANCELLED):
            body |= {"stream": True, "stream_options": {"include_usage": True}}
        content = json.dumps(body).encode()
        head = f"POST {self.url.path}/chat/completions HTTP/1.1\r\nHost: {self.url.netloc}\r\n"
        head += f"Content-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n"
        return head.encode() + content

    async def _send(self, exchange: Exchange) -> None:
        """Send a request and wait for its response; of a `"cancelled"` stream for a few parts, then leave."""
        parts_left = self.rng.randint(1, 8) if exchange.outcome.kind == CANCELLED else -1
        if self.writer is None:
            self.reader, self.writer = await asyncio.open_connection(self.url.hostname, self.url.port)
        assert self.reader is not None
        self.writer.write(self._request(exchange.outcome))
        while not exchange.is_complete:
            data = await self.reader.read(2**16)
            if not data:
                raise ConnectionResetError("the server closed the connection")
            exchange.received.append((time.perf_counter(), data))
            exchange.is_complete = is_complete(exchange.received)
            parts_left -= 1
            if parts_left == 0:
                self._close()
                return

    async def _send_and_leave(self, exchange: Exchange) -> None:
        """Send a request, and leave within a second."""
        try:
            await asyncio.wait_for(self._send(exchange), self.rng.random())
        except asyncio.TimeoutError:  # in Python 3.10 not the builtin one
            self._close()

    def _close(self) -> None:
        if self.writer is not None:
            self.writer.close()
        self.writer = None


def is_complete(received: list[tuple[float, bytes]]) -> bool:
    """Return whether a response has ended, wherever its reads were split; a stream ends with an empty chunk."""
    start = b""
    num_read = 0
    while b"\r\n\r\n" not in start:
        if num_read == len(received):
            return False  # the head is not complete
        start += received[num_read][1]
        num_read += 1
    head, _, body = start.partition(b"\r\n\r\n")
    length = re.search(rb"\ncontent-length: *(\d+)", head, re.IGNORECASE)
    if length is not None:
        return len(body) + sum(len(data) for _, data in received[num_read:]) >= int(length[1])
    last = received[max(num_read, len(received) - len(LAST_CHUNK)) :]  # a read has at least one byte
    return (body + b"".join(data for _, data in last)).endswith(LAST_CHUNK)


# ---------------------------------------------------------------------- after the load


class _Bytes:
    """A socket that has received these bytes, for `http.client`."""

    def __init__(self, received: bytes) -> None:
        self.received = received

    def makefile(self, mode: str) -> io.BytesIO:
        return io.BytesIO(self.received)


def read(exchange: Exchange) -> None:
    """Read what came into the outcome of its request."""
    outcome = exchange.outcome
    if outcome.error or not exchange.is_complete:
        return
    try:
        response = http.client.HTTPResponse(_Bytes(b"".join(data for _, data in exchange.received)))  # type: ignore
        response.begin()
        content = response.read()
        if response.status != 200:
            raise ValueError(f"status {response.status}: {content.decode()}")
        if outcome.kind in (STREAMED, CANCELLED):
            read_stream(outcome, content)
            outcome.first_token = first_text(exchange)
        else:
            read_answer(outcome, json.loads(content))
    except (http.client.HTTPException, ValueError, KeyError) as error:
        outcome.error = repr(error)


def read_answer(outcome: Outcome, answer: dict[str, Any]) -> None:
    """Read a whole answer."""
    message = answer["choices"][0]["message"]
    outcome.text = message["content"]
    take_retrievals(outcome, message)
    outcome.tokens = answer["usage"]["completion_tokens"]
    outcome.finished = True


def read_stream(outcome: Outcome, content: bytes) -> None:
    """Read the events of a stream."""
    for line in content.decode().splitlines():
        if line == "data: [DONE]":
            outcome.finished = True
        if not line.startswith("data: {"):
            continue
        chunk = json.loads(line.removeprefix("data: "))
        if "error" in chunk:
            raise ValueError(f"in mid-stream: {chunk['error']}")
        for choice in chunk["choices"]:
            outcome.text += choice["delta"].get("content") or ""
            take_retrievals(outcome, choice["delta"])
        if chunk.get("usage"):
            outcome.tokens = chunk["usage"]["completion_tokens"]
    if not outcome.finished:
        raise ValueError("the stream ended without [DONE]")


def first_text(exchange: Exchange) -> float | None:
    """Return the seconds to the first text of a stream; `None` if it has no text."""
    received = b""
    for seconds, data in exchange.received:
        received += data
        if re.search(rb'"content":"[^"]', received):
            return seconds - exchange.start
    return None


def take_retrievals(outcome: Outcome, message: dict[str, Any]) -> None:
    """Keep the ids of the passages of each retrieval."""
    for retrieval in message.get("retrievals") or []:
        outcome.passages.append([passage["id"] for passage in retrieval["passages"]])


async def load(job: Job) -> tuple[float, list[Exchange]]:
    """Return the seconds that all requests took, and what came of each, in the order in which they were sent."""
    exchanges: list[Exchange] = []
    requests = job.requests()
    clients = [Client(job, number) for number in range(job.num_clients)]
    start = time.perf_counter()
    await asyncio.gather(*[client.run(requests, exchanges) for client in clients])
    return time.perf_counter() - start, exchanges


def main() -> None:
    """Run jobs: a line of stdin is one, and gets a line of stdout with what came of it."""
    for line in sys.stdin:
        job = Job(**json.loads(line))
        cpu_before = time.process_time()
        seconds, exchanges = asyncio.run(load(job))
        cpu_seconds = time.process_time() - cpu_before
        for exchange in exchanges:
            read(exchange)
        outcomes = [asdict(exchange.outcome) for exchange in exchanges]
        print(json.dumps({"seconds": seconds, "cpu_seconds": cpu_seconds, "outcomes": outcomes}), flush=True)
