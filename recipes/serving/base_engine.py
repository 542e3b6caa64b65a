"""What the engines have in common: their parts and bounds, failed searches, and how embeddings are taken and ended."""

import asyncio
import logging
from collections.abc import Coroutine, Sequence
from typing import Any, TypeVar

from transformers import PreTrainedTokenizerBase

from modeling_cosup import CoSupConfig
from modeling_cosup.tokenization_cosup import encode_prompt

from serving.checks import check_passages
from serving.engine import Embeddings, QueueFull, SearchFailed, ShuttingDown, UnsupportedSetting

logger = logging.getLogger("cosup.serving")
T = TypeVar("T")


class BaseEngine:
    """
    The beginning of an engine. It takes embeddings; the engine makes them, in `_embed_passages` and `_embed_queries`.

    Args:
        config ([`CoSupConfig`]): of the model that is served.
        tokenizer (`PreTrainedTokenizerBase`): encodes queries, in the thread of the event loop.
        has_index (`bool`): there is an index to search.
        context_length (`int`): the most positions that Gen reads.
        max_running (`int`): requests that are answered at a time.
        max_waiting (`int`): requests that may wait, embeddings included; more are refused with [`QueueFull`].

    Raises:
        `ValueError`: for bounds that are too small.
    """

    def __init__(
        self,
        config: CoSupConfig,
        tokenizer: PreTrainedTokenizerBase,
        has_index: bool,
        context_length: int,
        max_running: int,
        max_waiting: int,
    ) -> None:
        check_least("max_running", max_running, 1)
        check_least("max_waiting", max_waiting, 0)
        self.config = config
        self.tokenizer = tokenizer
        self.has_index = has_index
        self.context_length = context_length
        self.max_running = max_running
        self.max_waiting = max_waiting
        self.failure = ""
        self._stopping = False  # new requests are refused
        self._cancels = False  # those that run end too
        self._embedding_tasks: set[asyncio.Task] = set()  # that run

    # ------------------------------------------------------------------ embeddings

    async def embed_passages(self, passages: Sequence[dict[str, Any]]) -> Embeddings:
        """Return the embeddings of passages `{"title", "text"}`, as in the index."""
        self._check_open()
        self._check_encoder()
        check_passages(passages)
        self._check_room()
        return await self._run(self._embed_passages(passages))

    async def embed_queries(self, texts: Sequence[str]) -> Embeddings:
        """Return the query embeddings of texts, as Gen makes them at the first `[NSP]` of an answer."""
        self._check_open()
        self._check_room()
        return await self._run(self._embed_texts(texts))

    async def _embed_texts(self, texts: Sequence[str]) -> Embeddings:
        nsp = self.config.nsp_token_id
        if nsp is None:
            raise UnsupportedSetting("queries: this model has no [NSP] token.")
        prompts = []
        for number, text in enumerate(texts):
            prompt = [*encode_prompt(self.tokenizer, text), nsp]
            if len(prompt) > self.context_length:
                raise UnsupportedSetting(
                    f"queries[{number}] has {len(prompt):,} tokens, but Gen reads {self.context_length:,}."
                )
            prompts.append(prompt)
            await asyncio.sleep(0)  # other requests go on
        return await self._embed_queries(prompts)

    def _check_open(self) -> None:
        """Raise [`ShuttingDown`] once new requests are refused."""
        if self._stopping:
            raise ShuttingDown("The server is shutting down.")

    @property
    def _num_answers(self) -> int:
        """How many answers run or wait."""
        raise NotImplementedError

    @property
    def _retry_after(self) -> int:
        """Seconds after which a refused request may be sent again."""
        return 1

    @property
    def _is_full(self) -> bool:
        return self._num_answers + len(self._embedding_tasks) >= self.max_running + self.max_waiting

    def _check_room(self) -> None:
        """Raise [`QueueFull`] if as many answers and embeddings are in flight as may run and wait."""
        if self._is_full:
            raise QueueFull(
                f"{self._num_answers} answers and {len(self._embedding_tasks)} embeddings run or wait, of at most"
                f" {self.max_running + self.max_waiting}: try again later.",
                retry_after=self._retry_after,
            )

    def _check_encoder(self) -> None:
        """Raise [`UnsupportedSetting`] if no passages can be embedded."""
        raise NotImplementedError

    async def _embed_passages(self, passages: Sequence[dict[str, Any]]) -> Embeddings:
        """Return the embeddings of passages that were checked."""
        raise NotImplementedError

    async def _embed_queries(self, prompts: list[list[int]]) -> Embeddings:
        """Return the query embeddings of token ids that end in `[NSP]`."""
        raise NotImplementedError

    async def _run(self, work: Coroutine[Any, Any, T]) -> T:
        """Return the result of `work`. A shutdown waits for it as it does for answers, or ends it."""
        task = asyncio.create_task(work)
        self._embedding_tasks.add(task)
        task.add_done_callback(self._embedding_tasks.discard)
        try:
            return await task
        except asyncio.CancelledError:
            if self._cancels:
                raise ShuttingDown("The server is shutting down.") from None
            raise  # the client left

    async def _end_embeddings(self, drain: bool) -> None:
        """Wait until no embeddings run, or cancel them."""
        tasks = set(self._embedding_tasks)
        if not drain:
            self._cancels = True
            for task in tasks:
                task.cancel()
        if tasks:
            await asyncio.wait(tasks)


def check_least(name: str, limit: int | None, least: int) -> None:
    """Raise `ValueError` for a bound that is less than `least`."""
    if limit is not None and limit < least:
        raise ValueError(f"{name} is {limit}, expected at least {least}.")


def search_failed(error: Exception | None) -> SearchFailed:
    """Return what a client gets for a failed search; log the error, whose text may name hosts and files."""
    logger.error("The search failed for one request.", exc_info=error)
    failure = SearchFailed(f"The index cannot be searched ({type(error).__name__}).")
    failure.__cause__ = error
    return failure
