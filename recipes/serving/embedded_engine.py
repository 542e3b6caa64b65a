"""The engine in the server's own process: all requests share the passes of one decoding loop, in a thread."""

import asyncio
import copy
import math
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from modeling_cosup import CoSupForCausalLM, Memory, MemoryConfig, Retriever
from modeling_cosup.call_cosup import token_ids
from modeling_cosup.decoding_cosup import Decoder
from modeling_cosup.packing_cosup import pad_rows
from modeling_cosup.scores_cosup import depends_on_scores_only
from modeling_cosup.settings_cosup import DecisionSettings, DecodingSettings, RowSettings
from modeling_cosup.tokenization_cosup import encode_passages_for_emb_seq
from modeling_cosup.trace_cosup import Row

from serving.base_engine import BaseEngine, check_least, search_failed
from serving.checks import check_request
from serving.decoding_thread import DecodingThread, Delivery, Ticket
from serving.engine import (
    BackendFailed,
    DeadlineExceeded,
    EngineError,
    EngineLoad,
    Event,
    GenerationRequest,
    QueueFull,
    ShuttingDown,
    UnsupportedSetting,
)
from serving.prepared_lookup import PreparedLookup

T = TypeVar("T")

_EMBEDDING_BATCH = 32  # texts that are embedded between two passes
_MOST_DECISIONS = 256  # kept for later requests
_MOST_CRASHES = 3  # passes that break off in a row: then the engine counts as ill
_LONGEST_RETRY = 60  # seconds


@dataclass(eq=False)  # compared by identity
class _Stream:
    """
    A request on the side of the event loop.

    Args:
        ticket ([`Ticket`]): the request in the decoding thread.
        events (`list[Event]`): events that the client has not taken yet.
        ended (`bool`), error ([`EngineError`], *optional*): no more come; because of this error.
        news (`asyncio.Event`): is set when one of these changes.
        started (`float`): `time.monotonic()` of the request.
    """

    ticket: Ticket
    events: list[Event] = field(default_factory=list)
    ended: bool = False
    error: EngineError | None = None
    news: asyncio.Event = field(default_factory=asyncio.Event)
    started: float = field(default_factory=time.monotonic)


class EmbeddedEngine(BaseEngine):
    """
    Answers requests with a model in this process.

    Args:
        model ([`CoSupForCausalLM`]): on its device. Nothing else may use it while the engine runs.
        index ([`Retriever`], *optional*): without it `[NSP]` is a token like any other.
        memory ([`Memory`], *optional*), memory_config ([`MemoryConfig`], *optional*): mixed in for all requests.
        max_running (`int`): the most requests that are decoded at a time.
        max_waiting (`int`): the most requests that wait; more are refused with [`QueueFull`].
        max_batch_tokens (`int`, *optional*): limit the requests that are decoded at a time so that their KV caches
            have no more columns than this together. A request may need its prompt, `max_new_tokens`, and
            `max_retrievals` (one, if there is no limit, and then it may take more) passages of full length; all take
            as much as the longest. If it is less than Gen's context, it is the context of this engine.
    """

    def __init__(
        self,
        model: CoSupForCausalLM,
        index: Retriever | None = None,
        memory: Memory | None = None,
        memory_config: MemoryConfig | None = None,
        max_running: int = 32,
        max_waiting: int = 256,
        max_batch_tokens: int | None = None,
    ) -> None:
        # a copy: a tokenizer serves one thread at a time, and the decoding thread uses the model's
        super().__init__(model, index, copy.deepcopy(model.tokenizer), max_running, max_waiting)
        check_least("max_batch_tokens", max_batch_tokens, 1)
        self.memory = memory
        self.memory_config = memory_config
        self.max_batch_tokens = max_batch_tokens
        if max_batch_tokens is not None:
            self.context_length = min(self.context_length, max_batch_tokens)  # an answer alone has room
        self.lookup = PreparedLookup(self, index)
        self._decisions: dict[tuple[float, float], DecisionSettings] = {}
        self._thread: DecodingThread | None = None
        self._streams: dict[Ticket, _Stream] = {}  # requests that have not ended
        self._mean_seconds = 1.0  # that a request takes; the last ones count most

    # ------------------------------------------------------------------ life

    async def start(self) -> None:
        """
        Check the parts against each other, and start to serve.

        Raises:
            `ValueError`: for an index or a memory of another model, and for a Gen that cannot retrieve.
            `RuntimeError`: for an engine that was started before.
        """
        if self._thread is not None:
            raise RuntimeError("This engine was started before: make another one.")
        self.model.eval()
        settings = self._decoding_settings()
        loop = asyncio.get_running_loop()

        def deliver(deliveries: list[Delivery]) -> None:
            if not loop.is_closed():
                loop.call_soon_threadsafe(self._take, deliveries)

        make_decoder = partial(Decoder, self.model, settings, self.index, self.memory)
        self._thread = DecodingThread(self.model.gen, make_decoder, deliver)
        self._thread.start()

    def _decoding_settings(self) -> DecodingSettings:
        """Return the settings of the loop: those of generate(), for rows of any settings that come and go."""
        parts = {"retriever": self.index, "memory": self.memory, "memory_config": self.memory_config}
        settings, _ = self.model.prepare_decoding(1, do_sample=False, max_new_tokens=1, **parts)
        nsp, ce = self.config.nsp_token_id, self.config.ce_token_id
        return replace(
            settings,
            retrieves=nsp is not None,
            num_slots=self.max_running,
            num_columns=1,
            special=token_ids({nsp, ce, *settings.ends}, settings.device),
            refill=True,
            serves=True,
            max_batch_tokens=self.max_batch_tokens,
            context_length=self.context_length,
        )

    async def stop(self, drain: bool = True) -> None:
        """Refuse new requests with [`ShuttingDown`]; finish those that were accepted (`drain`), or cancel them."""
        self._stopping = True
        if self._thread is None:
            return
        if not drain:
            for stream in list(self._streams.values()):
                self._cancel(stream, ShuttingDown("The server is shutting down."))
        await self._end_embeddings(drain)  # while the thread still takes their batches
        await asyncio.to_thread(self._thread.stop)

    async def is_healthy(self) -> bool:
        """Return whether requests can be answered now: the thread runs, and its passes do not break off."""
        if self._thread is None or self._stopping:
            return False
        return self._thread.is_alive and self._thread.num_crashes < _MOST_CRASHES

    def load(self) -> EngineLoad:
        """Return how busy the engine is."""
        running = 0 if self._thread is None else self._thread.num_running
        waiting = max(0, len(self._streams) - running)
        return EngineLoad(running, waiting, self.max_running, self.max_waiting)

    # ------------------------------------------------------------------ requests

    def check(self, request: GenerationRequest) -> None:
        """Raise [`UnsupportedSetting`], which names the setting first, unless `generate(request)` can run."""
        self._row(request)

    async def generate(self, request: GenerationRequest) -> AsyncIterator[Sequence[Event]]:
        """Yield the events of a request in groups, as they happen; see [`~serving.engine.Engine`]."""
        thread = self._open_thread()
        row = self._row(request)
        if len(self._streams) >= self.max_running + self.max_waiting:
            seconds = math.ceil(self._mean_seconds * max(1, self.max_waiting) / self.max_running)
            raise QueueFull(
                f"{self.max_running} requests are being answered and {self.max_waiting} wait: try again later.",
                retry_after=min(max(1, seconds), _LONGEST_RETRY),
            )
        ticket = Ticket(row)
        if request.incremental:
            row.listener = ticket
        stream = _Stream(ticket)
        self._streams[ticket] = stream
        thread.submit(ticket)
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

    def _take(self, deliveries: list[Delivery]) -> None:
        """Hand the events of a pass to their requests; the decoding thread calls it in the event loop."""
        for delivery in deliveries:
            stream = self._streams.get(delivery.ticket)
            if stream is None:  # cancelled
                continue
            stream.events += delivery.events
            if delivery.ended:
                self._end(stream, delivery.error)
            stream.news.set()

    def _end(self, stream: _Stream, error: EngineError | None) -> None:
        stream.ended = True
        stream.error = error
        del self._streams[stream.ticket]
        self._mean_seconds += 0.1 * (time.monotonic() - stream.started - self._mean_seconds)

    def _cancel(self, stream: _Stream, error: EngineError | None) -> None:
        """End a request that has not ended; its slot is free at the next step."""
        if self._thread is not None and not stream.ended:
            self._end(stream, error)
            self._thread.cancel(stream.ticket)
            stream.news.set()

    def _open_thread(self) -> DecodingThread:
        """Return the decoding thread, if it takes requests."""
        super()._check_open()
        return self._living_thread()

    def _living_thread(self) -> DecodingThread:
        if self._thread is None:
            raise ShuttingDown("The engine was not started.")
        if not self._thread.is_alive:
            raise BackendFailed("The server's decoding thread has ended.")
        return self._thread

    # ------------------------------------------------------------------ settings of a request

    def _row(self, request: GenerationRequest) -> Row:
        """Check a request, and return it as a row of the decoding loop."""
        check_request(request, self.config, self.context_length, self.has_index)
        retrieval = request.retrieval
        has_passages = self.has_index or retrieval.passages is not None
        settings = RowSettings(
            decision=self._decision(request),
            budget=request.max_new_tokens,
            retrieval=retrieval,
            retrieves=has_passages and not retrieval.forbid_nsp,
            num_logprobs=request.num_logprobs,
        )
        row = Row(0, list(request.prompt_ids), settings)
        try:
            self.lookup.prepare([row], retrieval)
        except ValueError as error:
            name = "candidates" if retrieval.candidates is not None else "passages"
            raise UnsupportedSetting(f"{name}: {error}") from error
        except Exception as error:
            raise search_failed(error) from error
        if request.seed is not None and request.temperature > 0:
            row.generator = torch.Generator(self.model._input_device())
            row.generator.manual_seed(request.seed)
        return row

    def _decision(self, request: GenerationRequest) -> DecisionSettings:
        """Return how tokens are decided, as generate() would; requests that are decided alike share the object."""
        key = (request.temperature, request.top_p)
        if key in self._decisions:
            return self._decisions[key]
        sampling: dict[str, Any] = {"do_sample": False}
        if request.temperature > 0:
            sampling = {"do_sample": True, "temperature": request.temperature, "top_p": request.top_p, "top_k": 0}
        length = len(request.prompt_ids)
        _, settings = self.model.prepare_decoding(length, max_new_tokens=request.max_new_tokens, **sampling)
        decision = settings.decision
        if depends_on_scores_only(decision):
            if len(self._decisions) >= _MOST_DECISIONS:
                self._decisions.pop(next(iter(self._decisions)))
            self._decisions[key] = decision
        return decision

    # ------------------------------------------------------------------ embeddings

    def _check_open(self) -> None:
        self._open_thread()

    def _check_encoder(self) -> None:
        if self.model.emb_seq is None:
            raise UnsupportedSetting(
                "passages: Emb_seq, which embeds them, is not in memory; load the model with load_emb_seq=True."
            )

    async def _embed_passages(self, passages: Sequence[dict[str, Any]]) -> NDArray[np.float32]:
        return await self._embed(passages, self._passage_embeds)

    async def _embed_queries(self, prompts: list[list[int]]) -> NDArray[np.float32]:
        return await self._embed(prompts, self._query_embeds)

    async def _embed(self, items: Sequence[T], embed: Callable[[Sequence[T]], torch.Tensor]) -> NDArray[np.float32]:
        """Embed items in the decoding thread, some of them after each pass."""
        batches = [np.zeros((0, self.config.embedding_size), np.float32)]
        for start in range(0, len(items), _EMBEDDING_BATCH):
            future: asyncio.Future[NDArray[np.float32]] = asyncio.get_running_loop().create_future()
            job = partial(_run_job, embed, items[start : start + _EMBEDDING_BATCH], future)
            self._living_thread().call(job)
            batches.append(await future)
        return np.concatenate(batches)

    def _passage_embeds(self, passages: Sequence[dict[str, Any]]) -> torch.Tensor:
        rows = encode_passages_for_emb_seq(self.model.emb_seq_tokenizer, list(passages), self.config)
        return self.model.encode_passages(*pad_rows(rows, device=self.model._input_device()))

    def _query_embeds(self, prompts: Sequence[list[int]]) -> torch.Tensor:
        ids, mask = pad_rows(list(prompts), device=self.model._input_device())  # (N, T) each
        if self.config.query_from != "gen":
            return self.model.encode_queries(ids, mask)
        ends = mask.sum(1) - 1 + torch.arange(len(ids), device=ids.device) * ids.shape[1]  # (N,), in (N · T)
        output = self.model(ids, mask, nsp_positions=ends, return_logits=False, use_cache=False)
        return output.query_embeds


@torch.no_grad()
def _run_job(
    embed: Callable[[Sequence[T]], torch.Tensor], items: Sequence[T], future: "asyncio.Future[NDArray[np.float32]]"
) -> None:
    """Embed `items` in the decoding thread, and resolve `future` in its event loop."""
    loop = future.get_loop()
    try:
        embeds = embed(items).float().cpu().numpy()
    except Exception as error:
        failure = BackendFailed(f"The texts could not be embedded ({type(error).__name__}).")
        failure.__cause__ = error
        loop.call_soon_threadsafe(_resolve, future, None, failure)
        return
    loop.call_soon_threadsafe(_resolve, future, embeds, None)


def _resolve(future: "asyncio.Future[T]", result: T, error: EngineError | None) -> None:
    if future.done():  # the client has gone
        return
    if error is not None:
        future.set_exception(error)
    else:
        future.set_result(result)
