"""Servers for tests: an engine that runs generate() for one request at a time, and a real server in a thread."""

import asyncio
import threading
import time
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from transformers.generation import BaseStreamer

from modeling_cosup import Retrieval
from modeling_cosup.cache_cosup import context_length
from modeling_cosup.packing_cosup import pad_rows
from modeling_cosup.tokenization_cosup import encode_passages_for_emb_seq, encode_prompt

from serving.api import ApiSettings, build_app
from serving.engine import (
    EndEvent,
    EngineLoad,
    Event,
    GenerationRequest,
    RetrievalEvent,
    TokenEvent,
    UnsupportedSetting,
)
from serving.running import EngineServer, open_socket, url_of


class EventStreamer(BaseStreamer):
    """Collects the events of one row of generate()."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.prompt_is_next = True

    def put(self, value: torch.Tensor) -> None:
        if not self.prompt_is_next:
            self.events += [TokenEvent(id) for id in value.reshape(-1).tolist()]
        self.prompt_is_next = False

    def on_retrieval(self, retrieval: Retrieval) -> None:
        self.events.append(RetrievalEvent(retrieval))

    def end(self) -> None:
        pass


class ReferenceEngine:
    """Continues one prompt at a time with generate(), greedily; the events come at the end, one by one."""

    def __init__(self, model: Any, index: Any = None) -> None:
        self.model = model
        self.index = index
        self.config = model.config
        self.tokenizer = model.tokenizer
        self.has_index = index is not None
        self.context_length = context_length(model.config.get_text_config())
        self.running = 0

    async def start(self) -> None:
        self.lock = asyncio.Lock()

    async def stop(self, drain: bool = True) -> None:
        pass

    def check(self, request: GenerationRequest) -> None:
        if request.retrieval.force_nsp_first and not self.has_index:
            raise UnsupportedSetting("force_nsp_first: this server has no index.")

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[Sequence[Event], None]:
        self.running += 1
        try:
            async with self.lock:
                events = await asyncio.to_thread(self._events, request)
            for event in events:
                yield [event]
        finally:
            self.running -= 1

    def _events(self, request: GenerationRequest) -> list[Event]:
        streamer = EventStreamer()
        output = self.model.generate(
            torch.tensor([request.prompt_ids]),
            retriever=self.index,
            retrieval_config=request.retrieval,
            max_new_tokens=request.max_new_tokens,
            return_dict_in_generate=True,
            streamer=streamer,
        )
        last = int(output.sequences[0, -1])
        reason = "stop" if last in self.model.generation_config.eos_token_id else "length"
        return [*streamer.events, EndEvent(reason, int(output.num_generated_tokens[0]))]

    async def embed_passages(self, passages: Sequence[dict[str, Any]]) -> np.ndarray:
        rows = encode_passages_for_emb_seq(self.model.emb_seq_tokenizer, passages, self.config)
        return self.model.encode_passages(*pad_rows(rows)).detach().numpy()

    async def embed_queries(self, texts: Sequence[str]) -> np.ndarray:
        embeds = []
        for text in texts:
            ids = [*encode_prompt(self.tokenizer, text), self.config.nsp_token_id]
            embeds.append(self.model(torch.tensor([ids])).query_embeds[0].detach().numpy())
        return np.stack(embeds)

    def load(self) -> EngineLoad:
        return EngineLoad(running=self.running, waiting=0, max_running=1, max_waiting=10**6)

    async def is_healthy(self) -> bool:
        return True


@contextmanager
def running_server(engine: Any, settings: ApiSettings) -> Iterator[str]:
    """Serve an engine on a free port of loopback, in a thread; yield the URL."""
    bound = open_socket("127.0.0.1", 0)
    url = url_of(bound)
    server = EngineServer(build_app(engine, settings), engine)
    thread = threading.Thread(target=asyncio.run, args=[server.serve_engine(bound)], daemon=True)
    thread.start()
    while not server.started:
        if not thread.is_alive():
            raise RuntimeError("The server did not start.")
        time.sleep(0.005)
    try:
        yield url
    finally:
        server.should_exit = True
        thread.join(timeout=30)
