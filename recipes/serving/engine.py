"""
The interface between the API and an engine: a request goes in, its events come out.

To add an engine, write a class with the members of [`Engine`] and a function that opens it in a new file, here or
anywhere, and name the function: `recipes/serve.py --engine module:function`. See docs/extending.md.
[`~serving.base_engine.BaseEngine`] has what the present ones have in common.
"""

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from modeling_cosup import CoSupConfig, Retrieval, RetrievalConfig

# ---------------------------------------------------------------------- what goes in


@dataclass(frozen=True)
class GenerationRequest:
    """
    One prompt to continue; a request of a client for `n` answers becomes n of these.

    Args:
        prompt_ids (`list[int]`): token ids; not empty.
        max_new_tokens (`int`): the most tokens to decode; passages and `[Cs]` do not count.
        retrieval ([`RetrievalConfig`]): how to retrieve. `candidates` and `passages`, if given, have one entry.
        temperature (`float`): 0 takes the best token.
        top_p (`float`): sample from the smallest set of tokens with this probability; 1 keeps all.
        seed (`int`, *optional*): the same seed gives the same answer, whoever else is being served.
        num_logprobs (`int`, *optional*): how many of the most likely tokens to report for each decision, with the
            decided one in addition; `None` reports none. Log-probabilities are the model's: before temperature, top_p
            and bans.
        incremental (`bool`): events are wanted as they happen. Otherwise an engine may give all of them at the end.
        deadline (`float`, *optional*): `time.monotonic()` after which the request fails with [`DeadlineExceeded`].
    """

    prompt_ids: list[int]
    max_new_tokens: int
    retrieval: RetrievalConfig = field(default_factory=RetrievalConfig)
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    num_logprobs: int | None = None
    incremental: bool = True
    deadline: float | None = None


# ---------------------------------------------------------------------- what comes out


@dataclass(frozen=True)
class TokenLogprobs:
    """
    Log-probabilities of one decision.

    Args:
        logprob (`float`): natural logarithm of the probability of the decided token.
        top (`list[tuple[int, float]]`): `(token id, logprob)` of the most likely tokens, best first.
    """

    logprob: float
    top: list[tuple[int, float]]


class TokenEvent(NamedTuple):  # a tenth of the time of a frozen dataclass to make
    """A decided token: of free or grounded text, `[CE]`, or an end. `[NSP]` becomes a [`RetrievalEvent`] instead."""

    token_id: int
    logprobs: TokenLogprobs | None = None


@dataclass(frozen=True)
class RetrievalEvent:
    """
    Passages were retrieved; the tokens after this event, up to the next stop token, are grounded on them.

    `retrieval.grounded_span` may not be final yet.
    """

    retrieval: Retrieval


@dataclass(frozen=True)
class EndEvent:
    """
    The row has ended; always the last event.

    Args:
        finish_reason (`str`): `"stop"` for an end token, `"length"` for a used budget or a full context.
        num_generated_tokens (`int`): number of decided tokens, as `generate()` counts them.
    """

    finish_reason: str
    num_generated_tokens: int


Event: TypeAlias = TokenEvent | RetrievalEvent | EndEvent


class Embeddings(NamedTuple):
    """
    The embeddings of texts.

    Args:
        embeds (`NDArray[np.float32]`): `(N, h)`, in the order of the texts.
        num_tokens (`int`): tokens that the encoder read for them, prompts and special tokens included.
    """

    embeds: NDArray[np.float32]
    num_tokens: int


# ---------------------------------------------------------------------- what goes wrong


class EngineError(Exception):
    """A request failed, and the engine goes on; the message is meant for the client."""


class UnsupportedSetting(EngineError, ValueError):
    """The request asks for something that this engine cannot do, or for an invalid value."""


class QueueFull(EngineError):
    """Too many requests are waiting; `retry_after` is in seconds."""

    def __init__(self, message: str, retry_after: int = 1) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class ShuttingDown(EngineError):
    """The engine takes no more requests."""


class DeadlineExceeded(EngineError):
    """The answer was not finished in time."""


class SearchFailed(EngineError):
    """The index could not be searched; other requests are not affected."""


class BackendFailed(EngineError):
    """The part of the engine that generates or embeds does not answer, or broke off."""


# ---------------------------------------------------------------------- an engine


@dataclass(frozen=True)
class EngineLoad:
    """How busy an engine is: requests in the batch, requests that wait, and the most of each."""

    running: int
    waiting: int
    max_running: int
    max_waiting: int


class Engine(Protocol):
    """
    Continues prompts with retrieval, many at a time.

    Equality 11: with `temperature=0` in float32, the events of a request are those of `generate()` alone, token by
    token, whatever else is being served.
    """

    config: CoSupConfig
    tokenizer: PreTrainedTokenizerBase
    has_index: bool
    context_length: int  # the most positions that Gen reads
    failure: str  # why it can answer nothing any more, until the server is started again; usually empty

    async def start(self) -> None:
        """Get ready; raise an error that names what is missing or does not fit."""
        ...

    async def stop(self, drain: bool = True) -> None:
        """Refuse new requests with [`ShuttingDown`]; finish those that run (`drain`), or cancel them."""
        ...

    def check(self, request: GenerationRequest) -> None:
        """
        Raise unless `generate(request)` can run.

        Raises:
            [`UnsupportedSetting`]: names the setting, and what was expected.
        """
        ...

    def generate(self, request: GenerationRequest) -> AsyncIterator[Sequence[Event]]:
        """
        Yield the events of a request in groups, as they happen. Closing the iterator frees the slot at the next step.

        Raises:
            [`EngineError`]: of the kinds above, by the iteration.
        """
        ...

    async def embed_passages(self, passages: Sequence[dict[str, Any]]) -> Embeddings:
        """Return the embeddings of passages `{"title", "text"}`, as in the index."""
        ...

    async def embed_queries(self, texts: Sequence[str]) -> Embeddings:
        """Return the query embeddings of texts, as Gen makes them at the first `[NSP]` of an answer."""
        ...

    def load(self) -> EngineLoad:
        """Return how busy the engine is."""
        ...

    async def is_healthy(self) -> bool:
        """Return whether requests can be answered now."""
        ...
