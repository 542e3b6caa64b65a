"""A client of vLLM's OpenAI server that speaks token ids: prompts in, decisions or embeddings out."""

import asyncio
import base64
import json
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import httpx
import numpy as np
from numpy.typing import NDArray

from serving.engine import BackendFailed, TokenEvent, TokenLogprobs

TEMPORARY = {408, 425, 429, 500, 502, 503, 504}  # status codes after which the same request may succeed
SESSION_HEADER = "X-Session-Id"
FIRST_WAIT, LONGEST_WAIT = 0.1, 5.0  # seconds before a retry; doubled after each


class TemporaryFailure(BackendFailed):
    """The same request may succeed if it is sent again."""


class VllmClient:
    """
    One server, or several equal ones with one address.

    A request is sent again after a failed connection, a timeout and a status in `TEMPORARY`, but never once a part of
    its answer has been given to the caller.

    Args:
        url (`str`): of the API, such as `http://host:8000/v1`.
        option (`str`): name of the option that holds the URL, for errors.
        api_key (`str`, *optional*): of the server.
        timeout (`float`): seconds without an answer, or between two parts of one, after which the server counts as
            gone.
        num_retries (`int`): how often a request is sent again.
        max_connections (`int`): requests at a time; further ones wait.

    Raises:
        `ValueError`: if `url` is not the URL of an API.
    """

    def __init__(
        self,
        url: str,
        option: str,
        api_key: str | None = None,
        timeout: float = 300.0,
        num_retries: int = 3,
        max_connections: int = 256,
    ) -> None:
        self.url = url.rstrip("/")
        self.name = f"--{option}"  # without the URL, which is not the business of clients
        if not self.url.startswith(("http://", "https://")) or not self.url.endswith("/v1"):
            raise ValueError(
                f"{option} is {url!r}, expected the URL of a vLLM server, such as http://127.0.0.1:8000/v1."
            )
        if num_retries < 0:
            raise ValueError(f"num_retries is {num_retries}, expected 0 or more.")
        self.num_retries = num_retries
        self.model = ""  # the name that the server gives to its model, once it was asked
        headers = {}
        if api_key is not None:
            headers["Authorization"] = f"Bearer {api_key}"
        self._http = httpx.AsyncClient(
            headers=headers,
            timeout=httpx.Timeout(timeout, connect=min(timeout, 5.0), pool=None),
            limits=httpx.Limits(max_connections=max_connections, max_keepalive_connections=max_connections),
        )

    async def close(self) -> None:
        """Close all connections; requests that run break off."""
        await self._http.aclose()

    # ------------------------------------------------------------------ what the server is

    async def max_model_len(self) -> int:
        """
        Return how many tokens the server reads, and remember the name of its model.

        Raises:
            [`BackendFailed`]: if it does not answer, or not as vLLM does.
        """
        body = await self._request("GET", "/models")
        try:
            model = body["data"][0]
            self.model = model["id"]
            return int(model["max_model_len"])
        except (KeyError, IndexError, TypeError, ValueError):
            raise BackendFailed(f"{self.name} answers, but not as vLLM: {str(body)[:200]}") from None

    async def is_healthy(self) -> bool:
        """Return whether the server can answer now."""
        try:
            response = await self._http.get(f"{self.url.removesuffix('/v1')}/health", timeout=5.0)
        except httpx.HTTPError:
            return False
        return response.status_code == 200

    # ------------------------------------------------------------------ generating

    async def complete(
        self, body: dict[str, Any], stream: bool, session: str = ""
    ) -> AsyncGenerator[list[TokenEvent], None]:
        """
        Yield the decisions that continue a prompt, a stop token last, in groups as they arrive.

        Args:
            body (`dict`): of `/v1/completions`: `prompt`, a list of token ids, and settings.
            stream (`bool`): ask for decisions as they happen; otherwise there is one group.
            session (`str`): the same for requests that share a prefix, for a balancer of replicas.

        Raises:
            [`BackendFailed`]: if the server cannot be reached, refuses, breaks off, or sends anything but an answer.
        """
        body = {
            "model": self.model,
            "return_token_ids": True,
            "return_tokens_as_token_ids": True,
            "skip_special_tokens": False,
            "stream": stream,
            **body,
        }
        num_logprobs = body.get("logprobs")
        if not stream:
            answer = await self._request("POST", "/completions", body, session)
            decisions, finished = self._decisions(answer, num_logprobs)
            if not decisions or not finished:
                raise BackendFailed(f"{self.name} sent what is no answer of vLLM: {str(answer)[:200]}")
            yield decisions
            return
        for attempt in range(self.num_retries + 1):
            begun = finished = False
            try:
                async with self._open("POST", "/completions", body, session) as response:
                    async for line in response.aiter_lines():
                        if not line.startswith("data:") or line == "data: [DONE]":
                            continue
                        decisions, finished = self._decisions(self._json(line.removeprefix("data:")), num_logprobs)
                        if decisions:
                            begun = True
                            yield decisions
                if finished and begun:
                    return
                raise TemporaryFailure(f"{self.name} broke off an answer.")
            except TemporaryFailure as error:
                if begun:
                    raise BackendFailed(f"In the middle of an answer: {error}") from error
                await self._wait_or_raise(attempt, error)

    def _decisions(self, part: Any, num_logprobs: int | None) -> tuple[list[TokenEvent], bool]:
        """Return the decisions in a part of an answer, and whether it is the last one."""
        if isinstance(part, dict) and "error" in part:
            raise BackendFailed(f"{self.name}: {_message(part)}")
        try:
            choice = part["choices"][0]
            token_ids = [int(token_id) for token_id in choice["token_ids"]]
            logprobs = _token_logprobs(choice.get("logprobs"), len(token_ids), num_logprobs)
            events = [TokenEvent(token_id, entry) for token_id, entry in zip(token_ids, logprobs, strict=True)]
            finish_reason = choice.get("finish_reason")
        except (KeyError, IndexError, TypeError, ValueError, AttributeError):
            raise BackendFailed(f"{self.name} sent what is no answer of vLLM: {str(part)[:200]}") from None
        if finish_reason not in (None, "stop", "length"):
            raise BackendFailed(f"{self.name} gave up an answer ({finish_reason}).")
        return events, finish_reason is not None

    # ------------------------------------------------------------------ embedding

    async def embed(self, prompts: Sequence[Sequence[int]], session: str = "") -> NDArray[np.float32]:
        """
        Return the pooled states `(N, h)` of token ids, not normalised; `session` as in [`~VllmClient.complete`].

        Raises:
            [`BackendFailed`]: if the server cannot be reached, refuses, or sends anything but N finite vectors of one
                width.
        """
        body = {
            "model": self.model,
            "input": [[int(token_id) for token_id in prompt] for prompt in prompts],
            "encoding_format": "base64",  # float32, exactly
            "use_activation": False,
        }
        answer = await self._request("POST", "/embeddings", body, session)
        try:
            entries = sorted(answer["data"], key=lambda entry: entry["index"])
            embeds = [np.frombuffer(base64.b64decode(entry["embedding"]), "<f4") for entry in entries]
            states = np.stack(embeds)  # (N, h)
        except (KeyError, TypeError, ValueError):
            raise BackendFailed(f"{self.name} sent what are no embeddings: {str(answer)[:200]}") from None
        if len(states) != len(prompts):
            raise BackendFailed(f"{self.name} sent {len(states)} embeddings for {len(prompts)} texts.")
        if not np.isfinite(states).all():
            raise BackendFailed(f"{self.name} sent embeddings that are not finite: check the dtype of the server.")
        return states

    # ------------------------------------------------------------------ requests

    async def _request(self, method: str, path: str, body: dict[str, Any] | None = None, session: str = "") -> Any:
        """Return the JSON value of a whole response; try again if it may help."""
        for attempt in range(self.num_retries + 1):
            try:
                async with self._open(method, path, body, session) as response:
                    return self._json((await response.aread()).decode(errors="replace"))
            except TemporaryFailure as error:
                await self._wait_or_raise(attempt, error)

    @asynccontextmanager
    async def _open(
        self, method: str, path: str, body: dict[str, Any] | None, session: str
    ) -> AsyncIterator[httpx.Response]:
        """Open a response of status 200; every failure of the connection, in the block too, becomes one of ours."""
        try:
            headers = {SESSION_HEADER: session} if session else {}
            async with self._http.stream(method, self.url + path, json=body, headers=headers) as response:
                if response.status_code != 200:
                    await response.aread()
                    kind = TemporaryFailure if response.status_code in TEMPORARY else BackendFailed
                    reason = _text(response)
                    if response.status_code == 401:
                        reason += " (its key is read from the variable VLLM_API_KEY)"
                    raise kind(f"{self.name} refused ({response.status_code}): {reason}")
                yield response
        except httpx.HTTPError as error:
            reason = str(error) or type(error).__name__  # timeouts have no message
            raise TemporaryFailure(f"{self.name} does not answer: {reason}") from error

    async def _wait_or_raise(self, attempt: int, error: TemporaryFailure) -> None:
        """Wait before the next attempt; after the last one raise the error."""
        if attempt == self.num_retries:
            raise BackendFailed(str(error)) from error
        await asyncio.sleep(min(FIRST_WAIT * 2**attempt, LONGEST_WAIT))

    def _json(self, text: str) -> Any:
        try:
            return json.loads(text)
        except ValueError:
            raise BackendFailed(f"{self.name} sent malformed JSON: {text[:200]!r}") from None


def _token_logprobs(
    logprobs: dict[str, Any] | None, num_tokens: int, num_logprobs: int | None
) -> list[TokenLogprobs | None]:
    """
    Return the log-probabilities of each decision from vLLM's lists, in which tokens are written `token_id:7`.

    Raises:
        `ValueError`, `KeyError`, `TypeError`, `AttributeError`: if they were asked for, and these are none.
    """
    if num_logprobs is None or not num_tokens:
        return [None] * num_tokens
    if logprobs is None:
        raise ValueError("no log-probabilities")
    entries: list[TokenLogprobs | None] = []
    for logprob, top in zip(logprobs["token_logprobs"], logprobs["top_logprobs"], strict=True):
        pairs = [(int(token.removeprefix("token_id:")), float(value)) for token, value in top.items()]
        pairs.sort(key=lambda pair: -pair[1])
        entries.append(
            TokenLogprobs(float(logprob), pairs[:num_logprobs])
        )  # without the decided one, if it is not of them
    return entries


def _text(response: httpx.Response) -> str:
    try:
        return _message(response.json())
    except ValueError:
        return response.text[:200]


def _message(body: Any) -> str:
    """Return the message of an error body."""
    error = body.get("error", body) if isinstance(body, dict) else body
    if isinstance(error, dict):
        error = error.get("message", error)
    return str(error)[:500]
