"""
A stand-in for a vLLM server, for tests where no vLLM is installed.

It speaks what the engine uses of vLLM's two endpoints, over real HTTP, but a tiny model in transformers computes, one
request at a time, greedily. What vLLM itself does is tested by `tests/serving/test_real_vllm.py`.
"""

import asyncio
import base64
import json
import math
import socket
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from itertools import count
from typing import Any

import torch
import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from transformers import DynamicCache

from serving.running import leave_port_to_the_next, open_socket, url_of


class StandIn:
    """
    Serves Gen, or Emb_seq for embeddings.

    Args:
        model ([`CoSupForCausalLM`]): whose part is served.
        part (`str`): `"gen"` or `"emb_seq"`.

    Attributes:
        faults (`deque[str]`): what the next requests meet, one each: a status code, `"garbage"`, `"cut"` (the
            connection breaks after the first token), `"slow"`, `"nan"`, `"error"` (an error within a stream),
            `"no logprobs"` or `"too many logprobs"`.
        max_model_len (`int`): how many tokens it reads; by default as many as its part can.
        bodies (`list[dict]`), sessions (`list[str]`): of all requests.
        seconds_per_token (`float`): that a decision takes.
    """

    def __init__(self, model: Any, part: str = "gen") -> None:
        self.model = model
        self.part = part
        encoder = model.gen if part == "gen" or model.config.tie_emb_seq else model.emb_seq
        self.max_model_len = encoder.config.get_text_config().max_position_embeddings
        self.faults: deque[str] = deque()
        self.bodies: list[dict[str, Any]] = []
        self.sessions: list[str] = []
        self.seconds_per_token = 0.0
        self.lock = threading.Lock()
        self.num_running = 0
        self.most_running = 0

    def app(self) -> FastAPI:
        app = FastAPI()
        app.get("/health")(lambda: PlainTextResponse("ok"))
        app.get("/v1/models")(lambda: {"data": [{"id": "stand-in", "max_model_len": self.max_model_len}]})
        app.post("/v1/completions")(self.completions)
        app.post("/v1/embeddings")(self.embeddings)
        return app

    async def completions(self, request: Request) -> Response:
        body = await request.json()
        self.bodies.append(body)
        self.sessions.append(request.headers.get("X-Session-Id", ""))
        fault = self.faults.popleft() if self.faults else ""
        failure = self.failure(fault)
        if failure is not None:
            return failure
        assert body["model"] == "stand-in"
        if len(body["prompt"]) + body["max_tokens"] > self.max_model_len:
            return JSONResponse({"error": {"message": "the prompt is too long"}}, 400)
        if body["stream"]:
            return StreamingResponse(self.stream(body, fault), media_type="text/event-stream")
        parts = [part async for part in self.stream(body, fault)]
        return Response(joined(parts), media_type="application/json")

    def failure(self, fault: str) -> Response | None:
        if fault.isdigit():
            return JSONResponse({"error": {"message": "as the test wants"}}, int(fault))
        if fault == "garbage":
            return PlainTextResponse("data: {no json\n\n")
        return None

    async def stream(self, body: dict[str, Any], fault: str) -> AsyncIterator[str]:
        self.num_running += 1
        self.most_running = max(self.most_running, self.num_running)
        try:
            decisions = self.decisions(body, fault)
            for number in count():
                choice = await asyncio.to_thread(next, decisions, None)
                if choice is None:
                    break
                if fault == "slow":
                    await asyncio.sleep(0.5)
                if fault == "cut" and number == 1:
                    raise ConnectionError("cut off, as the test wants")
                part = {"error": {"message": "the engine is dead"}} if fault == "error" else {"choices": [choice]}
                yield f"data: {json.dumps(part)}\n\n"
            yield "data: [DONE]\n\n"
        finally:
            self.num_running -= 1

    @torch.no_grad()
    def decisions(self, body: dict[str, Any], fault: str = "") -> Iterator[dict[str, Any]]:
        """Yield vLLM's `choices[0]` of each token."""
        tokenizer, cache, ids = self.model.tokenizer, DynamicCache(), body["prompt"]
        banned = [tokenizer.convert_tokens_to_ids(word) for word in body.get("bad_words", [])]
        for number in range(body["max_tokens"]):
            with self.lock:
                logits = self.model.gen(torch.tensor([ids]), past_key_values=cache).logits[0, -1].float()
            time.sleep(self.seconds_per_token)
            logprobs = logits.log_softmax(-1)
            logits[banned] = float("-inf")
            if "allowed_token_ids" in body:
                logits = torch.full_like(logits, float("-inf")).index_copy(
                    0, torch.tensor(body["allowed_token_ids"]), logits[body["allowed_token_ids"]]
                )
            token = int(logits.argmax())
            ids = [token]
            choice: dict[str, Any] = {"text": "", "token_ids": ids, "finish_reason": None}
            if token in body.get("stop_token_ids", []):
                choice["finish_reason"] = "stop"
            elif number + 1 == body["max_tokens"]:
                choice["finish_reason"] = "length"
            if body.get("logprobs") is not None:
                best = [token, *logprobs.topk(body["logprobs"]).indices.tolist()]  # vLLM puts the decided one first
                top = {f"token_id:{id}": float(logprobs[id]) for id in best}
                choice["logprobs"] = {"token_logprobs": [float(logprobs[token])], "top_logprobs": [top]}
            if fault == "no logprobs":
                choice["logprobs"] = None
            elif fault == "too many logprobs":
                choice["logprobs"] = {name: entries * 2 for name, entries in choice["logprobs"].items()}
            elif fault == "nan":
                choice["logprobs"]["top_logprobs"] = [dict.fromkeys(top, math.nan)]
            yield choice
            if choice["finish_reason"]:
                return

    @torch.no_grad()
    def embeddings(self, body: dict[str, Any], request: Request) -> Response:
        self.bodies.append(body)
        self.sessions.append(request.headers.get("X-Session-Id", ""))
        fault = self.faults.popleft() if self.faults else ""
        failure = self.failure(fault)
        if failure is not None:
            return failure
        assert body["encoding_format"] == "base64" and body["use_activation"] is False
        if max(map(len, body["input"])) > self.max_model_len:
            return JSONResponse({"error": {"message": "the prompt is too long"}}, 400)
        data = []
        for index, ids in enumerate(body["input"]):
            encoder = self.model.gen.base_model if self.part == "gen" else self.model.emb_seq
            with self.lock:
                state = encoder(torch.tensor([ids])).last_hidden_state[0, -1]
            if self.part == "emb_seq":  # save_emb_seq writes emb_head, cut to truncate_dim, as a layer
                if self.model.emb_head is not None:
                    state = self.model.emb_head(state)
                state = state[: self.model.config.truncate_dim]
            if fault == "nan":
                state = state * float("nan")
            data.append({"index": index, "embedding": base64.b64encode(state.numpy().tobytes()).decode()})
        return JSONResponse({"data": data})


def joined(parts: list[str]) -> str:
    """Return the parts of a stream as one answer."""
    choices = [json.loads(part.removeprefix("data: "))["choices"][0] for part in parts if "[DONE]" not in part]
    answer = {"token_ids": [], "finish_reason": choices[-1]["finish_reason"]}
    for choice in choices:
        answer["token_ids"] += choice["token_ids"]
        if choice.get("logprobs") is not None:
            lists = answer.setdefault("logprobs", {"token_logprobs": [], "top_logprobs": []})
            for name in lists:
                lists[name] += choice["logprobs"][name]
    return json.dumps({"choices": [answer]})


class ServerThread:
    """A real HTTP server of a stand-in, on the same port whenever it is started."""

    def __init__(self, stand_in: StandIn) -> None:
        self.stand_in = stand_in
        bound = open_socket("127.0.0.1", 0)
        self.url = f"{url_of(bound)}/v1"
        self.port = bound.getsockname()[1]
        bound.close()

    def start(self) -> None:
        bound = open_socket("127.0.0.1", self.port)
        leave_port_to_the_next(bound)
        self.server = uvicorn.Server(uvicorn.Config(self.stand_in.app(), log_level="critical", lifespan="off"))
        self.thread = threading.Thread(target=asyncio.run, args=[self._serve(bound)], daemon=True)
        self.thread.start()
        while not self.server.started:
            time.sleep(0.005)

    async def _serve(self, bound: socket.socket) -> None:
        self.loop = asyncio.get_running_loop()
        await self.server.serve(sockets=[bound])

    def kill(self) -> None:
        """End the server, and break off all connections."""
        self.server.should_exit = self.server.force_exit = True
        for connection in list(self.server.server_state.connections):
            self.loop.call_soon_threadsafe(connection.transport.abort)
        self.thread.join(timeout=10)


@contextmanager
def running(stand_in: StandIn) -> Iterator[ServerThread]:
    """Serve a stand-in on a free port of loopback, in a thread."""
    server = ServerThread(stand_in)
    server.start()
    try:
        yield server
    finally:
        server.kill()
