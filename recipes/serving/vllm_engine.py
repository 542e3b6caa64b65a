"""
An engine beyond one machine: Gen is served by vLLM, unpatched, twice: once to generate, once to embed.

vLLM never hands out a hidden state while it generates. So an answer is made of pieces: the first server generates up
to `[NSP]`, the second reads everything up to there and returns the query embedding, the index is searched here, and
the next piece continues after the passage and `[Cs]`. With prefix caching, which is on by default, neither server
computes a prefix twice.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing, asynccontextmanager
from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeVar

import numpy as np
import torch
from transformers import GenerationConfig, LogitsProcessorList
from transformers.initialization import no_init_weights
from transformers.utils import logging

from modeling_cosup import CoSupConfig, CoSupForCausalLM, Retriever
from modeling_cosup.cache_cosup import context_length
from modeling_cosup.lookup_cosup import Found
from modeling_cosup.settings_cosup import DecisionSettings, RowSettings
from modeling_cosup.tokenization_cosup import encode_passages_for_emb_seq, encode_queries_for_emb_seq
from modeling_cosup.trace_cosup import Row

from serving.base_engine import BaseEngine
from serving.checks import check_request
from serving.engine import (
    BackendFailed,
    DeadlineExceeded,
    Embeddings,
    EngineLoad,
    Event,
    GenerationRequest,
    ShuttingDown,
    UnsupportedSetting,
)
from serving.prepared_lookup import PreparedLookup
from serving.search_queue import SearchQueue
from serving.vllm_answer import Answer, AnswerSettings
from serving.vllm_checks import (
    MOST_LOGPROBS,
    check_encoder,
    check_generation_config,
    check_servers,
    control_tokens,
    read_weight,
)
from serving.vllm_client import VllmClient

logger = logging.get_logger(__name__)

T = TypeVar("T")


def model_without_weights(name_or_path: str | Path) -> CoSupForCausalLM:
    """
    Load the settings, tokenizers and fingerprint of a checkpoint, but none of its weights.

    Raises:
        `ValueError`: if this is not a CoSup checkpoint, or one that stores no fingerprint of Emb_seq.
    """
    config = CoSupConfig.from_pretrained(name_or_path)
    if not (config.fingerprint or {}).get("emb_seq"):
        raise ValueError(
            f"{name_or_path} stores no fingerprint of Emb_seq, so no index can be checked against it: load it with"
            " CoSupForCausalLM.from_pretrained, and save it again."
        )
    config._name_or_path = str(name_or_path)  # where the tokenizers are
    with torch.device("meta"), no_init_weights():  # takes neither memory nor time
        model = CoSupForCausalLM(config)
    model.generation_config = GenerationConfig.from_pretrained(name_or_path)
    return model.eval()


class VllmEngine(BaseEngine):
    """
    Continues prompts with retrieval through vLLM servers; see [`~serving.engine.Engine`].

    Args:
        model ([`CoSupForCausalLM`]): whose parts are served; its weights are not used: [`model_without_weights`].
        index ([`Retriever`], *optional*): a [`PassageIndex`], or one in Milvus.
        gen_url (`str`): of a server that serves what `save_gen` wrote, such as `http://host:8001/v1`.
        query_url (`str`): of a server that serves the same folder with `--runner pooling --convert embed`; if Emb_seq
            makes the queries (`query_from="emb_seq"`), it serves what `save_emb_seq` wrote.
        encoder_url (`str`, *optional*): of a pooling server that serves what `save_emb_seq` wrote, to embed passages.
        api_key (`str`, *optional*): of these servers.
        max_running (`int`): requests that are answered at a time.
        max_waiting (`int`): requests that may wait, embeddings included; more are refused with [`QueueFull`].
        timeout (`float`): seconds without a sign of a server after which it counts as gone.
        num_retries (`int`): how often a request to a server is sent again.

    Raises:
        `ValueError`: for a model without `[NSP]`, an index of another model, settings that vLLM cannot honour, and
            an address that is not a URL.
    """

    def __init__(
        self,
        model: CoSupForCausalLM,
        index: Retriever | None,
        gen_url: str,
        query_url: str,
        encoder_url: str | None = None,
        api_key: str | None = None,
        max_running: int = 256,
        max_waiting: int = 1024,
        timeout: float = 300.0,
        num_retries: int = 3,
    ) -> None:
        length = context_length(model.config.get_text_config())
        super().__init__(model.config, model.tokenizer, index is not None, length, max_running, max_waiting)
        self.model = model
        self.index = index
        if self.config.query_from == "query_encoder":
            raise ValueError("query_from='query_encoder' is not available with vLLM: use the embedded engine.")
        self.ends, self.sampling = check_generation_config(model)
        self.control_tokens = control_tokens(model)
        if index is not None:
            index.check_model(model)
        options: dict[str, Any] = {
            "api_key": api_key,
            "timeout": timeout,
            "num_retries": num_retries,
            "max_connections": max_running + 16,  # some are left for embeddings and health
        }
        self.gen = VllmClient(gen_url, "gen_url", **options)
        self.query = VllmClient(query_url, "query_url", **options)
        self.encoder: VllmClient | None = None
        if encoder_url is not None:
            self.encoder = VllmClient(encoder_url, "encoder_url", **options)
        self.query_head: torch.Tensor | None = None  # `emb_head`, through which the queries of a tied model go
        if self.config.tie_emb_seq and model.emb_head is not None:
            head = read_weight(model, "emb_head.weight")
            assert head is not None  # the checkpoint would not load without it
            self.query_head = head.float()
        # A tokenizer serves one thread at a time: given passages are encoded by a copy, in a thread that all share. A
        # request that is cancelled does not end what runs there; the next one waits for it.
        self.lookup = PreparedLookup(SimpleNamespace(config=model.config, tokenizer=deepcopy(model.tokenizer)), index)
        self._preparing = ThreadPoolExecutor(1)
        self.searches = SearchQueue(self.lookup)
        self._slots = asyncio.Semaphore(max_running)
        self._running = 0
        self._waiting = 0
        self._steps: set[asyncio.Future] = set()  # what runs for requests, to be cancelled
        self._idle = asyncio.Event()
        self._idle.set()

    # ------------------------------------------------------------------ start and stop

    async def start(self) -> None:
        """
        Check the servers: that they answer, and serve the parts of this model.

        Raises:
            `ConnectionError`: names the server that does not answer.
            `ValueError`: names the server that serves something else.
        """
        try:
            context = await check_servers(self.model, self.gen, self.query, self.index, self.context_length)
            if context < self.context_length:
                logger.warning(f"The servers read {context:,} of the model's {self.context_length:,} tokens.")
            self.context_length = context
            if self.encoder is not None:
                await check_encoder(self.model, self.encoder, self.index)
        except BackendFailed as error:
            urls = ", ".join(client.url for client in self._clients())
            raise ConnectionError(f"{error} (of {urls})") from error

    async def stop(self, drain: bool = True) -> None:
        """Refuse new requests; finish those that were taken, or with `drain=False` end them with `ShuttingDown`."""
        self._stopping = True
        if not drain:
            self._cancels = True
            for step in list(self._steps):
                step.cancel()
        await self._end_embeddings(drain)
        await self._idle.wait()
        self._preparing.shutdown(wait=False)
        for client in self._clients():
            await client.close()

    def _clients(self) -> list[VllmClient]:
        return [client for client in (self.gen, self.query, self.encoder) if client is not None]

    async def is_healthy(self) -> bool:
        """Return whether all servers answer."""
        if self._stopping:
            return False
        return all(await asyncio.gather(*(client.is_healthy() for client in self._clients())))

    def load(self) -> EngineLoad:
        """Return how busy the engine is; embeddings count as waiting: they take no slot."""
        waiting = self._waiting + len(self._embedding_tasks)
        return EngineLoad(self._running, waiting, self.max_running, self.max_waiting)

    @property
    def settings(self) -> AnswerSettings:
        """What is the same for all answers."""
        nsp, cs, ce = self.control_tokens
        return AnswerSettings(nsp, cs, ce, self.ends, self.context_length, self.control_tokens, self.sampling)

    # ------------------------------------------------------------------ generating

    def check(self, request: GenerationRequest) -> None:
        """
        Raise unless `generate(request)` can run.

        Raises:
            [`UnsupportedSetting`]: names the setting, and what was expected.
        """
        check_request(request, self.config, self.context_length, self.has_index)
        if request.num_logprobs is not None and request.num_logprobs > MOST_LOGPROBS:
            raise UnsupportedSetting(f"num_logprobs is {request.num_logprobs}, expected at most {MOST_LOGPROBS}.")
        if request.retrieval.forget_passages == "mask":
            raise UnsupportedSetting(
                "forget_passages is 'mask', which needs the embedded engine: vLLM cannot mask what it has cached;"
                " expected 'recompute' or nothing."
            )

    async def generate(self, request: GenerationRequest) -> AsyncIterator[Sequence[Event]]:
        """
        Yield the events of a request in groups, as they happen. Closing the iterator breaks off on the server too.

        Raises:
            [`EngineError`]: what went wrong.
        """
        self._check_open()
        self.check(request)
        async with self._slot(request.deadline):
            answer = await self._until(request.deadline, self._answer(request))
            async with aclosing(answer.events()) as events:
                while True:
                    if self._cancels:  # between two steps
                        raise ShuttingDown("The server is shutting down.")
                    try:
                        group = await self._until(request.deadline, anext(events))
                    except StopAsyncIteration:
                        return
                    if group:
                        yield group

    @property
    def _num_answers(self) -> int:
        return self._running + self._waiting

    @asynccontextmanager
    async def _slot(self, deadline: float | None) -> AsyncIterator[None]:
        """Wait until fewer than `max_running` requests are answered, and count this one while it is."""
        self._check_room()
        self._idle.clear()
        self._waiting += 1
        try:
            try:
                await self._acquire_slot(deadline)
            finally:
                self._waiting -= 1
            self._running += 1
            try:
                yield
            finally:
                self._running -= 1
                self._slots.release()
        finally:
            if not self._running + self._waiting:
                self._idle.set()

    async def _acquire_slot(self, deadline: float | None) -> None:
        acquiring = asyncio.ensure_future(self._slots.acquire())
        try:
            await self._until(deadline, acquiring)
        except BaseException:
            if not acquiring.cancelled():  # the slot came together with the end of the request
                self._slots.release()
            raise

    async def _until(self, deadline: float | None, step: Awaitable[T]) -> T:
        """
        Return the result of a step of an answer.

        Raises:
            [`DeadlineExceeded`]: if `time.monotonic()` reaches `deadline`.
            [`ShuttingDown`]: if `stop` cancelled it.
        """
        task = asyncio.ensure_future(step)
        self._steps.add(task)
        try:
            timeout = None if deadline is None else max(0.0, deadline - time.monotonic())
            await asyncio.wait({task}, timeout=timeout)
            if not task.done():
                raise DeadlineExceeded("The answer was not finished in time.")
            if task.cancelled():
                raise ShuttingDown("The server is shutting down.")
            return task.result()
        finally:
            self._steps.discard(task)
            if not task.done():
                task.cancel()
                await asyncio.wait({task})  # its connection is closed before the slot is free

    async def _answer(self, request: GenerationRequest) -> Answer:
        """Return the answer of a request, before its first event; looks up candidates and given passages."""
        retrieval = request.retrieval
        retrieves = (self.has_index or retrieval.passages is not None) and not retrieval.forbid_nsp
        greedy = DecisionSettings(LogitsProcessorList(), [], do_sample=False, prompt_length=len(request.prompt_ids))
        row = Row(0, list(request.prompt_ids), RowSettings(greedy, request.max_new_tokens, retrieval, retrieves))
        if retrieval.passages is not None:
            await asyncio.get_running_loop().run_in_executor(self._preparing, self.lookup.prepare_row, row)
        elif retrieval.candidates is not None:
            await asyncio.to_thread(self.lookup.prepare_row, row)
        return Answer(self.settings, request, self.gen, self.lookup, row, self._find)

    async def _find(self, row: Row, view: list[int], session: str) -> Found:
        """Return the passages for a row of which Gen sees `view`, up to and including `[NSP]`."""
        query_embed = None
        if row.given_passages is None or row.settings.retrieval.output_query_embeds:
            query_embed = (await self._query_embeds(self._query_rows([view]), session))[0]  # (h,)
        return await self.searches.find(row, query_embed)

    # ------------------------------------------------------------------ embedding

    def _query_rows(self, prompts: list[list[int]]) -> list[list[int]]:
        """Return each prompt as the query server reads it: Gen's ids, or encoded again for Emb_seq."""
        if self.config.query_from == "gen":
            return prompts
        return encode_queries_for_emb_seq(self.tokenizer, self.model.emb_seq_tokenizer, prompts, self.config)[0]

    async def _query_embeds(self, rows: list[list[int]], session: str = "") -> torch.Tensor:
        """Return the query embeddings `(N, h)` of rows that [`_query_rows`] made."""
        states = torch.from_numpy(await self.query.embed(rows, session))
        if self.query_head is not None:
            states = states @ self.query_head.T
        return self.model._normalize(states)

    async def _embed_queries(self, prompts: list[list[int]]) -> Embeddings:
        if not prompts:
            return Embeddings(np.zeros((0, self.config.embedding_size), np.float32), 0)
        rows = self._query_rows(prompts)
        return Embeddings((await self._query_embeds(rows)).numpy(), sum(map(len, rows)))

    def _check_encoder(self) -> None:
        if self.encoder is None:
            raise UnsupportedSetting("passages: Emb_seq, which embeds them, is not served; start with --encoder_url.")

    async def _embed_passages(self, passages: Sequence[dict[str, Any]]) -> Embeddings:
        assert self.encoder is not None  # checked before
        if not passages:
            return Embeddings(np.zeros((0, self.config.embedding_size), np.float32), 0)
        ids: list[list[int]] = []
        for passage in passages:
            ids += encode_passages_for_emb_seq(self.model.emb_seq_tokenizer, [passage], self.config)
            await asyncio.sleep(0)  # other requests go on
        embeds = self.model._normalize(torch.from_numpy(await self.encoder.embed(ids)))
        return Embeddings(embeds.numpy(), sum(map(len, ids)))
