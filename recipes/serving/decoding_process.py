"""
The process in which a server's model computes: a [`DecodingThread`] that is called, and reports, through a pipe.

HTTP and decoding then use two cores; in one process they share Python's lock.
"""

import atexit
import logging
import multiprocessing
import os
import queue
import signal
import threading
from collections.abc import Callable
from multiprocessing.connection import Connection
from multiprocessing.reduction import ForkingPickler
from typing import Any

from serving.checks import check_request
from serving.decoding_thread import DecodingThread, Delivery, Report
from serving.engine import BackendFailed, EngineError, Event, GenerationRequest, TokenEvent
from serving.served_model import ModelFacts, ServedModel

logger = logging.getLogger("cosup.serving")


class DecodingProcess:
    """
    Decodes requests in a process of its own, with the methods of [`DecodingThread`].

    Args:
        load (`Callable`): a function of a module, which the process calls with `args`: returns the model.

    Raises:
        The error of `load`; `ChildProcessError` if the process ends before the model is loaded.
    """

    def __init__(self, load: Callable[..., ServedModel], *args: Any) -> None:
        context = multiprocessing.get_context("spawn")  # a fork of threads, or of CUDA, would not work
        self._pipe, others_end = context.Pipe()
        self._process = context.Process(target=_decode, args=(others_end, load, *args), name="decoding")
        self._process.start()
        atexit.register(self._process.kill)  # if the server never starts; Python would wait for it
        others_end.close()  # so that the pipe closes with the process
        self.facts: ModelFacts = self._receive_first()
        self._calls: queue.SimpleQueue[memoryview | None] = queue.SimpleQueue()
        self._sending = threading.Thread(target=self._send, name="calls", daemon=True)
        self._reading = threading.Thread(target=self._read, name="reports", daemon=True)

    @property
    def pid(self) -> int:
        """Id of the process."""
        assert self._process.pid is not None
        return self._process.pid

    def _receive_first(self) -> ModelFacts:
        try:
            first = self._pipe.recv()
        except (EOFError, OSError):
            raise ChildProcessError(self._end()) from None
        if isinstance(first, Exception):
            self._process.join()
            raise first
        return first

    def _end(self) -> str:
        """Return how the process ended; wait for that."""
        self._process.join()
        return f"The decoding process ended with exit code {self._process.exitcode}."

    # ------------------------------------------------------------------ the methods of DecodingThread

    def start(self, report: Callable[[Report], None]) -> None:
        """Let the process serve; `report` is called in a thread."""
        self._deliver = report
        self._sending.start()
        self._reading.start()

    def check(self, request: GenerationRequest) -> None:
        """Raise [`UnsupportedSetting`] for what needs no model and no index to check; the process checks the rest."""
        check_request(request, self.facts.config, self.facts.context_length, self.facts.has_index)

    def submit(self, number: int, request: GenerationRequest) -> None:
        """Let a request wait for a slot; if it cannot run, its error is delivered."""
        self._call("submit", number, request)

    def cancel(self, number: int) -> None:
        """Take out a request, or texts to embed, before the next pass; its slot is free then."""
        self._call("cancel", number)

    def embed_passages(self, number: int, passages: list[dict[str, Any]]) -> None:
        """Embed passages between two passes."""
        self._call("embed_passages", number, passages)

    def embed_queries(self, number: int, prompts: list[list[int]]) -> None:
        """Embed prompts that end in `[NSP]` between two passes."""
        self._call("embed_queries", number, prompts)

    def stop(self) -> None:
        """Finish what was submitted before, then end the process."""
        self._call("stop")

    def join(self) -> None:
        """Wait until the process has ended."""
        self._reading.join()

    def give_up(self) -> None:
        """End the process at once."""
        self._process.kill()
        self.join()

    def _call(self, method: str, *args: Any) -> None:
        """
        Let the process call a method. A pipe to a process that is busy fills up: the event loop must not wait.

        What cannot be pickled raises here, not in the thread that sends the calls of all requests.
        """
        self._calls.put(ForkingPickler.dumps((method, args)))

    def _send(self) -> None:
        """Hand on the calls until the process ends."""
        while (call := self._calls.get()) is not None:
            try:
                self._pipe.send_bytes(call)
            except OSError:  # the process has ended, which is reported
                return

    def _read(self) -> None:
        """Hand on the reports of the process until it ends."""
        try:
            while True:
                report = unpacked(self._pipe.recv())
                if not report.end:
                    self._deliver(report)
        except (EOFError, OSError):
            self._deliver(Report(end=self._end()))
            self._calls.put(None)


def _decode(pipe: Connection, load: Callable[..., ServedModel], *args: Any) -> None:
    """Run a [`DecodingThread`] until it is stopped, or the process of the server has gone."""
    for number in (signal.SIGINT, signal.SIGTERM):  # a terminal, or systemd, sends them to all: the server decides
        signal.signal(number, signal.SIG_IGN)
    server = multiprocessing.parent_process()
    if server is not None:  # otherwise a model would be loaded for minutes for a server that was stopped
        threading.Thread(target=_end_with, args=(server,), daemon=True).start()
    try:
        thread = DecodingThread(load(*args))
        thread.start(lambda report: pipe.send(packed(report)))
    except Exception as error:
        pipe.send(_sendable(error))
        return
    pipe.send(thread.facts)
    threading.Thread(target=_obey, args=(pipe, thread), daemon=True).start()
    thread.join()


def _end_with(server: Any) -> None:
    """End this process once that of the server has ended."""
    server.join()
    os._exit(1)


# A pass of a tiny model takes a few milliseconds, and to pickle an object for each of its tokens would take 4 % of it:
# a token without log-probabilities travels as its id.


def packed(report: Report) -> tuple[Any, ...]:
    """Return a report as it travels."""
    deliveries = []
    for delivery in report.deliveries:
        events: list[Event | int] = []
        for event in delivery.events:
            is_plain = isinstance(event, TokenEvent) and event.logprobs is None
            events.append(event.token_id if is_plain else event)
        deliveries.append((delivery.number, events, delivery.ended, delivery.error, delivery.embeddings))
    return deliveries, report.num_running, report.num_crashes, report.end


def unpacked(content: tuple[Any, ...]) -> Report:
    """Return the report that [`packed`] has packed."""
    packed_deliveries, num_running, num_crashes, end = content
    deliveries = []
    for number, events, *rest in packed_deliveries:
        events = [TokenEvent(event) if isinstance(event, int) else event for event in events]
        deliveries.append(Delivery(number, events, *rest))
    return Report(deliveries, num_running, num_crashes, end)


def _sendable(error: Exception) -> Exception:
    """Return an error of one of Python's own classes, whose message is all that it holds, with the same message."""
    if type(error) in (ValueError, TypeError, RuntimeError, ImportError, OSError, FileNotFoundError):
        return type(error)(str(error))
    return ChildProcessError(f"{type(error).__name__}: {error}")


def _obey(pipe: Connection, thread: DecodingThread) -> None:
    """Call the methods of the thread as the server wants."""
    while True:
        try:
            method, args = pipe.recv()
        except (EOFError, OSError):  # the server has gone: nobody wants the answers
            os._exit(1)
        try:
            getattr(thread, method)(*args)
        except EngineError as error:
            thread.refuse(args[0], error)
        except Exception as error:  # this thread must go on: it is the only one that listens to the server
            logger.exception("A request could not be prepared.")
            thread.refuse(args[0], BackendFailed(f"The request could not be prepared ({type(error).__name__})."))
