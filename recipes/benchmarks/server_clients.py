"""
The clients of benchmarks/server_load.py, which runs [`main`] in a process of their own.

It imports neither torch nor this project, so that it starts at once and takes little memory.
"""

import asyncio
import contextlib
import json
import random
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import httpx

PLAIN, STREAMED, CANCELLED, DISCONNECTED = "plain", "streamed", "cancelled", "disconnected"


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
        first_token (`float`), total (`float`): seconds to the first text of a stream, and to the end.
    """

    question: int
    kind: str
    finished: bool = False
    error: str = ""
    text: str = ""
    passages: list[list[str]] = field(default_factory=list)
    tokens: int = 0
    first_token: float = 0.0
    total: float = 0.0


async def run_client(
    http: httpx.AsyncClient, job: Job, rng: random.Random, requests: Iterator[tuple[int, str]], outcomes: list[Outcome]
) -> None:
    """Send requests, one after the other, until there are no more."""
    for question, kind in requests:
        outcome = Outcome(question, kind)
        outcomes.append(outcome)
        start = time.perf_counter()
        try:
            if kind in (STREAMED, CANCELLED):
                await stream(http, job, outcome, rng, start)
            else:
                await ask(http, job, outcome, rng)
        except (httpx.HTTPError, ValueError, KeyError) as error:
            outcome.error = repr(error)
        outcome.total = time.perf_counter() - start


def body_of(job: Job, outcome: Outcome) -> dict[str, Any]:
    """Return the body of a request."""
    messages = [{"role": "user", "content": job.questions[outcome.question]}]
    return {"messages": messages, "temperature": 0, **job.body}


async def ask(http: httpx.AsyncClient, job: Job, outcome: Outcome, rng: random.Random) -> None:
    """Wait for a whole answer; a `"disconnected"` request waits less than a second."""
    request = http.post("/chat/completions", json=body_of(job, outcome))
    if outcome.kind == DISCONNECTED:
        try:
            response = await asyncio.wait_for(request, rng.random())
        except asyncio.TimeoutError:  # in Python 3.10 not the builtin one
            return
    else:
        response = await request
    if response.status_code != 200:
        raise ValueError(f"status {response.status_code}: {response.text}")
    answer = response.json()
    message = answer["choices"][0]["message"]
    outcome.text = message["content"]
    take_retrievals(outcome, message)
    outcome.tokens = answer["usage"]["completion_tokens"]
    outcome.finished = True


async def stream(http: httpx.AsyncClient, job: Job, outcome: Outcome, rng: random.Random, start: float) -> None:
    """Read an answer as it comes; a `"cancelled"` one only for a few chunks."""
    chunks_left = rng.randint(1, 8) if outcome.kind == CANCELLED else -1
    body = body_of(job, outcome) | {"stream": True, "stream_options": {"include_usage": True}}
    async with http.stream("POST", "/chat/completions", json=body) as response:
        if response.status_code != 200:
            raise ValueError(f"status {response.status_code}: {(await response.aread()).decode()}")
        async for line in response.aiter_lines():
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
            if outcome.text and not outcome.first_token:
                outcome.first_token = time.perf_counter() - start
            if chunk.get("usage"):
                outcome.tokens = chunk["usage"]["completion_tokens"]
            chunks_left -= 1
            if chunks_left == 0:
                return
    if not outcome.finished:
        raise ValueError("the stream ended without [DONE]")


def take_retrievals(outcome: Outcome, message: dict[str, Any]) -> None:
    """Keep the ids of the passages of each retrieval."""
    for retrieval in message.get("retrievals") or []:
        outcome.passages.append([passage["id"] for passage in retrieval["passages"]])


async def run_clients(job: Job) -> tuple[float, list[Outcome]]:
    """Return the seconds that all requests took, and the outcome of each, in the order in which they were sent."""
    outcomes: list[Outcome] = []
    requests = job.requests()
    async with contextlib.AsyncExitStack() as stack:
        clients = []
        for number in range(job.num_clients):
            http = httpx.AsyncClient(base_url=job.base_url, timeout=600, verify=False, trust_env=False)
            await stack.enter_async_context(http)
            rng = random.Random(f"{job.seed} {number}")
            clients.append(run_client(http, job, rng, requests, outcomes))
        start = time.perf_counter()
        await asyncio.gather(*clients)
        return time.perf_counter() - start, outcomes


def main() -> None:
    """Run jobs: a line of stdin is one, and gets a line of stdout with what came of it."""
    for line in sys.stdin:
        seconds, outcomes = asyncio.run(run_clients(Job(**json.loads(line))))
        result = {"seconds": seconds, "outcomes": [asdict(outcome) for outcome in outcomes]}
        print(json.dumps(result), flush=True)
