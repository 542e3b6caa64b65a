"""The process around the app: its socket, its signals, and a shutdown that lets running answers finish."""

import asyncio
import errno
import logging
import socket
from types import FrameType
from typing import Any

import uvicorn
from fastapi import FastAPI

from serving.engine import Engine

logger = logging.getLogger("cosup.serving")
FLUSH_TIMEOUT = 5  # seconds for clients to read the last bytes, once all answers have ended


def open_socket(host: str, port: int) -> socket.socket:
    """
    Return a socket that is bound, so that a port in use is an error before a model is loaded.

    With SO_REUSEADDR two sockets could be bound to one port until one of them listens. So it is set only to get a port
    on which connections of an earlier server are still closing, and is unset until this server listens.

    Raises:
        `OSError`: names host and port.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        bound = socket.socket(family, kind, protocol)
        try:
            _bind(bound, address)
        except OSError:
            bound.close()
            raise
    except OSError as error:
        raise OSError(f"--host {host} --port {port}: {error.strerror or error}.") from error
    return bound


def _bind(bound: socket.socket, address: Any) -> None:
    try:
        bound.bind(address)
    except OSError as error:
        if error.errno != errno.EADDRINUSE:
            raise
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 0)


def leave_port_to_the_next(bound: socket.socket) -> None:
    """Let the next server take the port while connections of this one are closing; call it before it listens."""
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)


def url_of(bound: socket.socket) -> str:
    """Return the URL of a bound socket."""
    host, port = bound.getsockname()[:2]
    if bound.family == socket.AF_INET6:
        host = f"[{host}]"
    return f"http://{host}:{port}"


class EngineServer(uvicorn.Server):
    """
    A uvicorn server that starts an engine, and at its end lets the engine finish.

    On SIGTERM or SIGINT the engine refuses new requests and finishes those that run; after `shutdown_timeout`, or at
    a second signal, it cancels them. Then the server ends, with exit status 0.

    Args:
        app (`FastAPI`): of [`~serving.api.build_app`].
        engine ([`Engine`]): of the app.
        shutdown_timeout (`float`): seconds for running answers.
    """

    def __init__(self, app: FastAPI, engine: Engine, shutdown_timeout: float = 30.0) -> None:
        config = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=FLUSH_TIMEOUT, lifespan="off")
        super().__init__(config)
        self.engine = engine
        self.shutdown_timeout = shutdown_timeout
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stopping: asyncio.Task[None] | None = None

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        """
        Start the engine and serve it on sockets until a signal. [`run`] does so in a new event loop: uvloop's, if
        uvloop is installed.

        Raises:
            An error of the engine's start.
            `ChildProcessError`: if the engine failed for good. A supervisor starts the server again.
        """
        self._loop = asyncio.get_running_loop()
        await self.engine.start()
        try:
            await super().serve(sockets)
        finally:
            await self.engine.stop(drain=False)
        if self.engine.failure:
            raise ChildProcessError(self.engine.failure)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        for bound in sockets or []:
            leave_port_to_the_next(bound)
        await super().startup(sockets)
        for bound in sockets or []:
            print(f"Ready: {url_of(bound)}/v1", flush=True)

    async def on_tick(self, counter: int) -> bool:
        """Return whether the server should end: it does if its engine has failed for good."""
        return await super().on_tick(counter) or bool(self.engine.failure)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Stop. Unlike uvicorn, do not raise the signal again: to be stopped is no failure."""
        self.stop_soon()

    def stop_soon(self) -> None:
        """Let running answers finish and then end; if that has begun, cancel them. May be called from any thread."""
        assert self._loop is not None
        self._loop.call_soon_threadsafe(self._stop)

    def _stop(self) -> None:
        if self._stopping is None:
            self._stopping = asyncio.create_task(self._finish())
        else:
            self.should_exit = True

    async def _finish(self) -> None:
        logger.info(f"Shutting down: running answers have {self.shutdown_timeout:g} seconds to finish.")
        try:
            await asyncio.wait_for(self.engine.stop(drain=True), self.shutdown_timeout)
        except asyncio.TimeoutError:
            logger.warning(f"Answers that were not finished after {self.shutdown_timeout:g} seconds are cancelled.")
            await self.engine.stop(drain=False)
        finally:
            self.should_exit = True
