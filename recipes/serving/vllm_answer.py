"""The decoding loop of generate(), over a server that generates and one that embeds: one request, piece by piece."""

from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any
from uuid import uuid4

from modeling_cosup.lookup_cosup import Found, Lookup
from modeling_cosup.trace_cosup import Row

from serving.engine import EndEvent, Event, GenerationRequest, RetrievalEvent, TokenEvent
from serving.vllm_client import VllmClient

# given a row, what Gen sees of it, up to and including [NSP], and the session
Find = Callable[[Row, list[int], str], Awaitable[Found]]


@dataclass(frozen=True)
class AnswerSettings:
    """
    What is the same for all answers.

    Args:
        nsp_token_id, cs_token_id, ce_token_id (`int`): of `[NSP]`, `[Cs]` and `[CE]`.
        ends (`frozenset[int]`): ids that end an answer.
        context_length (`int`): the most tokens that Gen reads.
        token_of (`dict[int, str]`): `[NSP]` and `[Cs]` by their ids; vLLM takes banned tokens by name.
        sampling (`dict`): settings of every completion.
    """

    nsp_token_id: int
    cs_token_id: int
    ce_token_id: int
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
        lookup ([`Lookup`]): encodes passages.
        row ([`Row`]): its trace, with candidates and given passages.
        find (`Callable`): embeds the query and searches.
        view (`list[int]`): all token ids that Gen sees: without passages that were forgotten.
        num_generated (`int`), finish_reason (`str`, *optional*): number of decided tokens, and why it ended.
        searching ([`TokenEvent`], *optional*): the last token, if it is an `[NSP]` that retrieves.
        nsp_taken_back (`bool`): nothing was found, so the next decision may not be `[NSP]`.
    """

    settings: AnswerSettings
    request: GenerationRequest
    gen: VllmClient
    lookup: Lookup
    row: Row
    find: Find
    view: list[int] = field(default_factory=list)
    num_generated: int = 0
    finish_reason: str | None = None
    searching: TokenEvent | None = None
    nsp_taken_back: bool = False

    def __post_init__(self) -> None:
        self.view = list(self.row.prompt)
        self.session = uuid4().hex
        settings = self.settings
        self.stops = {settings.nsp_token_id, settings.ce_token_id, *settings.ends}  # they end grounded text

    async def events(self) -> AsyncGenerator[list[Event], None]:
        """
        Yield the events of the answer; the last one is an [`EndEvent`].

        Raises:
            [`BackendFailed`], [`SearchFailed`]: what failed.
        """
        nsp = TokenEvent(self.settings.nsp_token_id)
        if self.view[-1] == nsp.token_id and self.row.may_retrieve:
            self.searching = nsp
            yield await self._retrieve()
        must_retrieve = self.request.retrieval.force_nsp_first and not self.row.retrievals
        is_open = self.finish_reason is None and not self.nsp_taken_back
        if must_retrieve and is_open and self.row.may_retrieve:
            if self.request.num_logprobs is None:
                yield self._decide(nsp)
            else:
                async for decisions in self.gen.complete({**self._piece(), **self._only(nsp)}, False, self.session):
                    yield self._decide(decisions[0])
        while self.finish_reason is None:
            if self.searching is not None:
                yield await self._retrieve()
                continue
            async with aclosing(self.gen.complete(self._piece(), self.request.incremental, self.session)) as piece:
                async for decisions in piece:
                    yield [event for decision in decisions for event in self._decide(decision)]
        self.row.finish(self.view, self.stops)
        yield [EndEvent(self.finish_reason, self.num_generated)]

    # ------------------------------------------------------------------ decisions

    def _piece(self) -> dict[str, Any]:
        """Return the body of the completion that decides the next tokens."""
        settings, request = self.settings, self.request
        stops = set(self.settings.ends)
        banned = [settings.cs_token_id]
        if self.row.may_retrieve:
            stops.add(settings.nsp_token_id)
        if self.nsp_taken_back or not self.row.may_decide_nsp:
            banned.append(settings.nsp_token_id)
        if self.row.passage_columns is not None and request.retrieval.forget_passages == "recompute":
            stops.add(settings.ce_token_id)
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
            # another seed for each piece, which would otherwise draw the same numbers again
            body["seed"] = (request.seed + self.num_generated) % 2**63
        if request.num_logprobs is not None:
            body["logprobs"] = request.num_logprobs
        return body

    def _only(self, token: TokenEvent) -> dict[str, Any]:
        """Return what makes a completion decide one token, for its log-probabilities."""
        return {"allowed_token_ids": [token.token_id], "max_tokens": 1}

    def _decide(self, decision: TokenEvent) -> list[Event]:
        """Take a decision, and return the event that it is, if it is one."""
        settings = self.settings
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
        elif token == settings.nsp_token_id and self.row.settings.retrieves:
            self.searching = decision
            return []
        elif token == settings.ce_token_id and self.row.passage_columns is not None:
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
        nsp, self.searching = self.searching, None
        passages, query_embed = await self.find(self.row, self.view, self.session)
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
            return [] if nsp is None or is_of_prompt else [nsp]
        self.view += self.lookup.add_retrieval(self.row, passages, len(self.view), room, query_embed)
        if len(self.view) >= self.settings.context_length:
            self.finish_reason = "length"
        return [RetrievalEvent(self.row.retrievals[-1])]
