"""Servers for tests: an engine that runs generate() for one request at a time, and a real server in a thread."""

import asyncio
import threading
import time
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from contextlib import aclosing, contextmanager
from typing import Any

from serving.api import ApiSettings, build_app
from serving.engine import (
    BackendFailed,
    Embeddings,
    EngineLoad,
    Event,
    GenerationRequest,
    ShuttingDown,
    UnsupportedSetting,
)
from serving.running import EngineServer, open_socket, url_of


@contextmanager
def started_server(engine: Any, settings: ApiSettings, shutdown_timeout: float = 10) -> Iterator[EngineServer]:
    """Serve an engine on a free port of loopback, in a thread; yield the server, with its `url` and `thread`."""
    bound = open_socket("127.0.0.1", 0)
    server = EngineServer(build_app(engine, settings), engine, shutdown_timeout)
    server.url = url_of(bound)
    server.thread = threading.Thread(target=server.run, args=[[bound]], daemon=True)
    server.thread.start()
    while not server.started:
        if not server.thread.is_alive():
            raise RuntimeError("The server did not start.")
        time.sleep(0.005)
    try:
        yield server
    finally:
        server.should_exit = True
        server.thread.join(timeout=30)


@contextmanager
def running_server(engine: Any, settings: ApiSettings) -> Iterator[str]:
    """Serve an engine as [`started_server`] does; yield the URL."""
    with started_server(engine, settings) as server:
        yield server.url


class ScriptedEngine:
    """
    An engine that says what a test tells it to.

    Args:
        model ([`CoSupForCausalLM`]): its config and tokenizer.
        script (`Callable`): returns the async generator of event groups of a request; it may raise an `EngineError`.
    """

    def __init__(
        self, model: Any, script: Callable[[GenerationRequest], AsyncGenerator[Sequence[Event], None]]
    ) -> None:
        self.config = model.config
        self.tokenizer = model.tokenizer
        self.has_index = True
        self.context_length = 512
        self.failure = ""
        self.script = script
        self.requests: list[GenerationRequest] = []
        self.closed = 0
        self.running = 0
        self.is_stopping = False
        self.idle = threading.Event()

    async def start(self) -> None:
        pass

    async def stop(self, drain: bool = True) -> None:
        self.is_stopping = True
        while drain and self.running:
            await asyncio.sleep(0.002)

    def check(self, request: GenerationRequest) -> None:
        self.requests.append(request)

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[Sequence[Event], None]:
        if self.is_stopping:
            raise ShuttingDown("The server is shutting down.")
        self.running += 1
        self.idle.clear()
        try:
            async with aclosing(self.script(request)) as groups:
                async for group in groups:
                    yield group
        finally:
            self.running -= 1
            if not self.running:
                self.idle.set()

    async def embed_passages(self, passages: Sequence[dict[str, Any]]) -> Embeddings:
        raise UnsupportedSetting("input_type: Emb_seq is not loaded.")

    async def embed_queries(self, texts: Sequence[str]) -> Embeddings:
        raise BackendFailed("no answer")

    def load(self) -> EngineLoad:
        return EngineLoad(running=self.running, waiting=0, max_running=1, max_waiting=10**6)

    async def is_healthy(self) -> bool:
        return not self.is_stopping
