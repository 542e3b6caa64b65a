"""The decoding loop of generate(), over a server that generates and one that embeds: one request, piece by piece."""

from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

from modeling_cosup import CoSupConfig, Retrieval
from modeling_cosup.lookup_cosup import Lookup, ScoredPassages
from modeling_cosup.trace_cosup import Row

from serving.engine import EndEvent, Event, GenerationRequest, RetrievalEvent, TokenEvent
from serving.vllm_client import VllmClient

# given an answer whose last token is [NSP], returns its passages and, if the trace keeps it, its query embedding
Find = Callable[["Answer"], Awaitable[tuple[ScoredPassages, list[float] | None]]]


@dataclass(frozen=True)
class AnswerSettings:
    """
    What is the same for all answers.

    Args:
        config ([`CoSupConfig`]): of the model.
        ends (`frozenset[int]`): ids that end an answer.
        context_length (`int`): the most tokens that Gen reads.
        token_of (`dict[int, str]`): `[NSP]` and `[Cs]` by their ids; vLLM takes banned tokens by name.
        sampling (`dict`): settings of every completion.
    """

    config: CoSupConfig
    ends: frozenset[int]
    context_length: int
    token_of: dict[int, str]
    sampling: dict[str, Any]


@dataclass(eq=False)
class Answer:
    """
    One request while it is answered.

    A piece is what the server decides in one completion: up to `[NSP]`, an end, or a passage that is forgotten. What
    follows depends on its last token, as in [`~decoding_cosup.Decoder`].

    Args:
        settings ([`AnswerSettings`]), request ([`GenerationRequest`]): what to do.
        gen ([`VllmClient`]): generates.
        lookup ([`Lookup`]): of the request's retrieval settings.
        row ([`Row`]): its trace, with candidates and given passages.
        retrieves (`bool`): `[NSP]` retrieves; otherwise it is a token like any other, unless forbidden.
        find (`Callable`): embeds the query and searches.
        view (`list[int]`): all token ids that Gen sees: without passages that were forgotten.
    """

    settings: AnswerSettings
    request: GenerationRequest
    gen: VllmClient
    lookup: Lookup
    row: Row
    retrieves: bool
    find: Find
    view: list[int] = field(default_factory=list)
    num_generated: int = 0
    finish_reason: str | None = None
    searches: bool = False  # the last token is an [NSP] that retrieves
    nsp_taken_back: bool = False  # nothing was found: the next decision may not be [NSP]

    def __post_init__(self) -> None:
        self.view = list(self.row.prompt)
        config = self.settings.config
        self.stops = {config.nsp_token_id, config.ce_token_id, *self.settings.ends}  # they end grounded text

    async def events(self) -> AsyncIterator[Sequence[Event]]:
        """
        Yield the events of the answer; the last one is an [`EndEvent`].

        Raises:
            [`BackendFailed`], [`SearchFailed`]: what failed.
        """
        nsp = self.settings.config.nsp_token_id
        self.searches = self.view[-1] == nsp and self._may_retrieve()
        if self.searches:
            yield await self._retrieve()
        begins_with_nsp = self.request.retrieval.force_nsp_first and not self.row.retrievals
        if begins_with_nsp and self._may_retrieve() and not self.nsp_taken_back:
            yield self._decide(TokenEvent(nsp))
        while self.finish_reason is None:
            if self.searches:
                yield await self._retrieve()
                continue
            async with aclosing(self.gen.complete(self._piece(), self.request.incremental)) as piece:
                async for decisions in piece:
                    yield [event for decision in decisions for event in self._decide(decision)]
        self.row.finish(self.view, self.stops)
        yield [EndEvent(self.finish_reason, self.num_generated)]

    # ------------------------------------------------------------------ decisions

    def _may_retrieve(self) -> bool:
        return self.retrieves and self.row.may_retrieve(self.request.retrieval.max_retrievals)

    def _piece(self) -> dict[str, Any]:
        """Return the body of the completion that decides the next tokens."""
        config, request = self.settings.config, self.request
        stops = set(self.settings.ends)
        banned = [config.cs_token_id]
        if self._may_retrieve():
            stops.add(config.nsp_token_id)
        if request.retrieval.forbid_nsp or self.nsp_taken_back or (self.retrieves and not self._may_retrieve()):
            banned.append(config.nsp_token_id)
        if self.row.passage_columns is not None and request.retrieval.forget_passages == "recompute":
            stops.add(config.ce_token_id)
        max_tokens = min(request.max_new_tokens - self.num_generated, self.settings.context_length - len(self.view))
        if self.nsp_taken_back:
            max_tokens = 1  # the ban is for one decision
        body = {
            **self.settings.sampling,
            "prompt": list(self.view),
            "max_tokens": max_tokens,
            "stop_token_ids": sorted(stops),
            "bad_words": [self.settings.token_of[id] for id in banned if id in self.settings.token_of],
            "temperature": request.temperature,
            "top_p": request.top_p,
        }
        if request.seed is not None:
            body["seed"] = request.seed + self.num_generated  # otherwise each piece would draw the same numbers again
        if request.num_logprobs is not None:
            body["logprobs"] = request.num_logprobs
        return body

    def _decide(self, decision: TokenEvent) -> list[Event]:
        """Take a decision, and return the event that it is, if it is one."""
        config = self.settings.config
        token = decision.token_id
        self.view.append(token)
        self.num_generated += 1
        self.nsp_taken_back = False
        out_of_budget = self.num_generated >= self.request.max_new_tokens
        out_of_context = len(self.view) >= self.settings.context_length
        if token in self.settings.ends:
            self.finish_reason = "stop"
        elif out_of_budget or out_of_context:
            self.finish_reason = "length"
        elif token == config.nsp_token_id and self.retrieves:
            self.searches = True
            return []
        elif token == config.ce_token_id and self.row.passage_columns is not None:
            if self.request.retrieval.forget_passages == "recompute":
                self._forget_passage()
        return [decision]

    def _forget_passage(self) -> None:
        """Forget the passage before the `[CE]` that was just decided: go on as if it had never been there."""
        start, end = self.row.forget(self.view[:-1])
        del self.view[start:end]

    # ------------------------------------------------------------------ retrieval

    async def _retrieve(self) -> list[Event]:
        """Retrieve for the `[NSP]` that is the last token; return what happened."""
        self.searches = False
        passages, query_embed = await self.find(self)
        nsp = self.settings.config.nsp_token_id
        is_of_prompt = self.num_generated == 0
        room = self.settings.context_length - len(self.view) - 1  # 1 for [Cs]
        if not passages:
            self.nsp_taken_back = True
            if not is_of_prompt:
                self.view.pop()
                self.num_generated -= 1
            return []
        if room < 1:  # not even for one token of a passage
            self.finish_reason = "length"
            return [] if is_of_prompt else [TokenEvent(nsp)]
        retrieval = self._add_retrieval(passages, room, query_embed)
        if len(self.view) >= self.settings.context_length:
            self.finish_reason = "length"
        return [RetrievalEvent(retrieval)]

    def _add_retrieval(self, passages: ScoredPassages, room: int, query_embed: list[float] | None) -> Retrieval:
        """Add to the trace, and to what Gen sees the first `room` tokens of the passages, and `[Cs]`."""
        ids, starts = self.lookup.join([passage for passage, _ in passages])
        ids = ids[:room]
        passages = passages[: len([start for start in starts if start < room])]  # the others have no token in `ids`
        position = len(self.view) - 1 + self.row.num_forgotten  # of [NSP]
        span_start = position + len(ids) + 2  # after [NSP], passages and [Cs]
        retrieval = Retrieval(
            row=self.row.number,
            position=position,
            passages=[{name: passage[name] for name in ("id", "title", "text")} for passage, _ in passages],
            scores=[score for _, score in passages],
            grounded_span=(span_start, span_start),
            query_embed=query_embed,
        )
        self.row.retrievals.append(retrieval)
        self.row.passage_columns = (len(self.view), len(self.view) + len(ids))
        self.view += [*ids, self.settings.config.cs_token_id]
        return retrieval
