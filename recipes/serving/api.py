"""
The HTTP API of a server: OpenAI's routes for chats, completions, embeddings and models, and `/health` and `/metrics`.

    GET  /v1/models            the model, under the name by which requests call it
    POST /v1/chat/completions  an answer with its citations; see `protocol.py` for bodies
    POST /v1/completions       the continuation of a text, or of token ids
    POST /v1/embeddings        of passages and of queries
    GET  /health               200 if requests can be answered, else 503
    GET  /metrics              for Prometheus
"""

import copy
import json
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import anyio
from fastapi import FastAPI, Request
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import JSONResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.middleware import Middleware
from transformers import GenerationConfig

from serving.answers import AnswerWriter, TokenTexts
from serving.embeddings import embed
from serving.engine import Engine, GenerationRequest
from serving.errors import ApiError, add_error_handlers
from serving.generating import Answers, Job, unless_disconnected
from serving.guards import BodyGuard, FaultGuard, KeyGuard
from serving.metrics import Metrics, MetricsMiddleware
from serving.prompts import chat_ids, checked_ids, text_ids
from serving.protocol import LARGEST_SEED, ChatBody, CompletionBody, EmbeddingBody, GenerationBody, RetrievalBody
from serving.responses import ChatShape, CompletionShape
from serving.token_names import TokenNames

logger = logging.getLogger("cosup.serving")

GREEDY_BELOW = 1e-5  # a lower temperature takes the best token: logits divided by it could overflow
LONG_TEXT = 20_000  # characters; they are encoded in a thread, since other requests must not wait
COMPLETION_TOKENS = 16  # of a completion without max_tokens, as with OpenAI
ROUTES = ("/v1/models", "/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/health", "/metrics")


@dataclass(frozen=True)
class ApiSettings:
    """
    Settings of the API.

    Args:
        model_name (`str`): the name under which the model is served.
        generation_config (`GenerationConfig`, *optional*): of the checkpoint; gives the defaults of `temperature`,
            `top_p` and, with `max_new_tokens`, of a chat's `max_tokens`. Without `do_sample` the default is greedy.
        api_keys (`Sequence[str]`): requests must bring one of them; empty lets all pass.
        max_new_tokens (`int`, *optional*): the most tokens of an answer, whatever a request says.
        max_prompt_tokens (`int`, *optional*): the most tokens of a prompt; defaults to Gen's context.
        max_body_bytes (`int`): the most bytes of a body.
        request_timeout (`float`, *optional*): seconds after which an answer fails.
        cors_origins (`Sequence[str]`): origins of web pages that may call the API; `*` for all.
        log_prompts (`bool`): write prompts and answers to the log, under the id of their response.
    """

    model_name: str
    generation_config: GenerationConfig | None = None
    api_keys: Sequence[str] = ()
    max_new_tokens: int | None = None
    max_prompt_tokens: int | None = None
    max_body_bytes: int = 4 * 2**20
    request_timeout: float | None = None
    cors_origins: Sequence[str] = ()
    log_prompts: bool = False


def build_app(engine: Engine, settings: ApiSettings) -> FastAPI:
    """
    Return the app of an engine, which is started and stopped by whoever runs the app.

    Args:
        engine ([`Engine`]): generates and embeds.
        settings ([`ApiSettings`]): of the API.
    """
    metrics = Metrics(engine)
    api = _Api(engine, settings, metrics)
    middleware = [Middleware(MetricsMiddleware, metrics=metrics, routes=ROUTES)]
    if settings.cors_origins:
        # before the key: a browser asks without it whether it may send it
        allowed = Middleware(
            CORSMiddleware, allow_origins=settings.cors_origins, allow_methods=["*"], allow_headers=["*"]
        )
        middleware.append(allowed)
    middleware.append(Middleware(KeyGuard, keys=settings.api_keys))
    middleware.append(Middleware(FaultGuard))
    middleware.append(Middleware(BodyGuard, max_bytes=settings.max_body_bytes))
    # the pages of /docs would load scripts from other servers
    app = FastAPI(title="CoSup", docs_url=None, redoc_url=None, middleware=middleware)
    add_error_handlers(app)
    app.get("/v1/models")(api.models)
    app.get("/v1/models/{model:path}")(api.model)
    app.post("/v1/chat/completions", response_model=None)(api.chat)
    app.post("/v1/completions", response_model=None)(api.completions)
    app.post("/v1/embeddings", response_model=None)(api.embeddings)
    app.get("/health", response_model=None)(api.health)
    app.get("/metrics", response_model=None)(api.metrics)
    return app


class _Api:
    """The routes; see [`build_app`]."""

    def __init__(self, engine: Engine, settings: ApiSettings, metrics: Metrics) -> None:
        self.engine = engine
        self.settings = settings
        self._metrics = metrics
        self._names = TokenNames(engine.tokenizer)
        self._texts = TokenTexts(engine.tokenizer)
        # A tokenizer has state, which says whether special tokens are read as text: one for each thread that encodes.
        self._tokenizer = copy.deepcopy(engine.tokenizer)
        self._thread_tokenizer = copy.deepcopy(engine.tokenizer)
        self._thread_limit = anyio.CapacityLimiter(1)
        self._created = int(time.time())
        self._vocab_size: int = engine.config.get_text_config().vocab_size
        closing_ids = (engine.config.nsp_token_id, engine.config.ce_token_id)
        self._closing_ids = frozenset(id for id in closing_ids if id is not None)

    # ------------------------------------------------------------------ routes

    async def models(self) -> dict[str, Any]:
        """List the model."""
        return {"object": "list", "data": [self._model()]}

    async def model(self, model: str) -> dict[str, Any]:
        """Describe the model."""
        self._check_model(model)
        return self._model()

    async def chat(self, body: ChatBody, request: Request) -> Response:
        """Answer the last message of a chat."""
        self._check_model(body.model)
        num_characters = sum(len(message.content) for message in body.messages)
        ids = await self._encoded(chat_ids, body.messages, num_characters)
        limit = body.max_completion_tokens or body.max_tokens
        if limit is None and self.settings.generation_config is not None:
            limit = self.settings.generation_config.max_new_tokens
        jobs = self._jobs(body, [ids], limit, continues_text=False)
        names = self._names if body.logprobs else None
        return await self._answer(body, request, jobs, ChatShape(body.model, names))

    async def completions(self, body: CompletionBody, request: Request) -> Response:
        """Continue prompts."""
        self._check_model(body.model)
        prompts = []
        num_characters = sum(len(prompt) for prompt in body.prompt if isinstance(prompt, str))
        for prompt in body.prompt:
            if isinstance(prompt, str):
                prompts.append(await self._encoded(text_ids, prompt, num_characters))
            else:
                prompts.append(checked_ids(prompt, self._vocab_size))
        jobs = self._jobs(body, prompts, body.max_tokens or COMPLETION_TOKENS, continues_text=True)
        names = self._names if body.logprobs is not None else None
        return await self._answer(body, request, jobs, CompletionShape(body.model, names))

    async def embeddings(self, body: EmbeddingBody, request: Request) -> Response:
        """Embed passages, or queries."""
        self._check_model(body.model)
        content = await unless_disconnected(request.receive, embed(self.engine, body))
        return Response(content, media_type="application/json")

    async def health(self) -> Response:
        """Tell whether requests can be answered."""
        if await self.engine.is_healthy():
            return JSONResponse({"status": "ok"})
        return JSONResponse({"status": "unavailable"}, 503)

    async def metrics(self) -> Response:
        """Show the metrics."""
        return Response(self._metrics.text(), media_type=CONTENT_TYPE_LATEST)

    # ------------------------------------------------------------------ from a body to a response

    def _model(self) -> dict[str, Any]:
        return {
            "id": self.settings.model_name,
            "object": "model",
            "created": self._created,
            "owned_by": "cosup",
            "max_model_len": self.engine.context_length,
        }

    def _check_model(self, name: str) -> None:
        if name != self.settings.model_name:
            message = f"The model {name!r} does not exist; this server has {self.settings.model_name!r}."
            raise ApiError(404, message, "model", "model_not_found")

    async def _encoded(self, encode: Callable[[Any, Any], list[int]], prompt: Any, num_characters: int) -> list[int]:
        """Return the token ids that `encode(tokenizer, prompt)` gives; in a thread for a long prompt."""
        if num_characters < LONG_TEXT:
            return encode(self._tokenizer, prompt)
        return await anyio.to_thread.run_sync(encode, self._thread_tokenizer, prompt, limiter=self._thread_limit)

    def _jobs(
        self, body: GenerationBody, prompts: list[list[int]], limit: int | None, continues_text: bool
    ) -> list[Job]:
        """
        Return a job for each answer: `n` of the first prompt, then `n` of the second.

        Raises:
            [`ApiError`]: for a prompt that is empty or too long, retrieval settings that exclude each other, and more
                answers than the engine takes at a time.
            [`UnsupportedSetting`]: for what the engine refuses.
        """
        load = self.engine.load()
        num_answers = len(prompts) * (body.n or 1)
        if num_answers > load.max_running + load.max_waiting:  # it would find the queue full for ever
            most = f"{load.max_running + load.max_waiting:,}"
            raise ApiError(400, f"n, times the prompts, is {num_answers:,}, expected at most {most}.", "n")
        try:
            retrieval = (body.retrieval or RetrievalBody()).config()
        except ValueError as error:
            raise ApiError(400, f"retrieval: {error}", "retrieval") from error
        deadline = None
        if self.settings.request_timeout is not None:
            deadline = time.monotonic() + self.settings.request_timeout
        temperature, top_p = self._sampling(body)
        jobs = []
        for number, prompt in enumerate(prompts):
            if not prompt:
                field = "prompt" if continues_text else "messages"
                place = f"{field}[{number}]" if len(prompts) > 1 else field
                raise ApiError(400, f"{place} is empty, expected at least one token.", field)
            max_new_tokens = self._max_new_tokens(prompt, limit)
            for answer in range(body.n or 1):
                request = GenerationRequest(
                    prompt_ids=prompt,
                    max_new_tokens=max_new_tokens,
                    retrieval=retrieval,
                    temperature=temperature,
                    top_p=top_p,
                    seed=None if body.seed is None else (body.seed + answer) % (LARGEST_SEED + 1),
                    num_logprobs=body.num_logprobs,
                    incremental=bool(body.stream or body.stop),
                    deadline=deadline,
                )
                self.engine.check(request)
                context = prompt[-8:] if continues_text else []
                writer = AnswerWriter(self._texts, self._closing_ids, len(prompt), body.stop or (), context)
                jobs.append(Job(request, writer, is_first=answer == 0))
        return jobs

    def _max_new_tokens(self, prompt: list[int], limit: int | None) -> int:
        """Return the most tokens of an answer; without a limit they fill the context."""
        context_length = self.engine.context_length
        longest = min(self.settings.max_prompt_tokens or context_length, context_length - 1)
        if len(prompt) > longest:
            message = f"The prompt has {len(prompt)} tokens, expected at most {longest}."
            raise ApiError(400, message, code="context_length_exceeded")
        limits = [context_length - len(prompt), limit, self.settings.max_new_tokens]
        return min(value for value in limits if value is not None)

    def _sampling(self, body: GenerationBody) -> tuple[float, float]:
        """Return temperature and top_p: of the body, or else of the checkpoint."""
        config = self.settings.generation_config
        temperature, top_p = body.temperature, body.top_p
        if temperature is None:
            temperature = 0.0
            if config is not None and config.do_sample:
                temperature = 1.0 if config.temperature is None else config.temperature
        if top_p is None:
            top_p = 1.0
            if config is not None and config.top_p is not None:
                top_p = config.top_p
        if temperature < GREEDY_BELOW:
            temperature = 0.0
        return temperature, top_p

    async def _answer(
        self, body: GenerationBody, request: Request, jobs: list[Job], shape: ChatShape | CompletionShape
    ) -> Response:
        """Return the response to a body; its engine's work ends if the client leaves."""
        num_prompt_tokens = sum(len(job.request.prompt_ids) for job in jobs) // (body.n or 1)
        if self.settings.log_prompts:
            sent = json.dumps(await request.json(), ensure_ascii=False)
            sent = sent.encode("utf-8", "backslashreplace").decode()  # ignored fields may hold half a surrogate pair
            logger.info("%s: %s", shape.head["id"], sent)
        answers = Answers(self.engine, jobs, shape, num_prompt_tokens, self._metrics, self.settings.log_prompts)
        if body.stream:
            return await unless_disconnected(request.receive, answers.stream(body.includes_usage))
        return JSONResponse(await unless_disconnected(request.receive, answers.whole()))
