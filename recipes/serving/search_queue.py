"""Searches of many requests: those that wait at the same moment share one, in a thread, so the event loop is free."""

import asyncio
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import torch

from modeling_cosup.lookup_cosup import Lookup, ScoredPassages
from modeling_cosup.trace_cosup import Row

from serving.engine import SearchFailed


@dataclass(eq=False)
class Search:
    """
    A row that waits for its passages.

    Args:
        lookup ([`Lookup`]): of the settings of its request.
        row ([`Row`]): which retrieves.
        query_embed (`torch.FloatTensor` of shape `(h,)`): of its `[NSP]`.
        result (`asyncio.Future`): of its [`ScoredPassages`].
    """

    lookup: Lookup
    row: Row
    query_embed: torch.Tensor
    result: asyncio.Future = field(default_factory=lambda: asyncio.get_running_loop().create_future())

    @property
    def kind(self) -> tuple[Any, ...]:
        """What must be equal in searches that are made together."""
        retrieval = self.lookup.retrieval
        return retrieval.top_k, retrieval.no_repeat_passages, retrieval.min_score or float("-inf")


class SearchQueue:
    """Makes one search at a time; while it runs, the next ones gather."""

    def __init__(self) -> None:
        self._waiting: list[Search] = []
        self._worker: asyncio.Task | None = None

    async def passages_for(self, lookup: Lookup, row: Row, query_embed: torch.Tensor) -> ScoredPassages:
        """
        Return the passages for a row; arguments as in [`Search`].

        Raises:
            [`SearchFailed`]: if the search of this row failed.
        """
        search = Search(lookup, row, query_embed)
        self._waiting.append(search)
        if self._worker is None:
            self._worker = asyncio.create_task(self._work())
        return await search.result

    async def _work(self) -> None:
        while self._waiting:
            searches = sorted(self._waiting, key=lambda search: search.kind)
            self._waiting = []
            for _, group in groupby(searches, key=lambda search: search.kind):
                await self._search([search for search in group if not search.result.done()])  # others were cancelled
        self._worker = None

    async def _search(self, searches: list[Search]) -> None:
        """Search for all of these rows together; if that fails, for each alone: one of them may be the reason."""
        if not searches:
            return
        rows = [search.row for search in searches]
        query_embeds = torch.stack([search.query_embed for search in searches])  # (R, h)
        try:
            results = await asyncio.to_thread(searches[0].lookup.passages_for, rows, query_embeds)
        except Exception as error:  # a retriever may raise anything
            if len(searches) > 1:
                for search in searches:
                    await self._search([search])
            elif not searches[0].result.done():
                searches[0].result.set_exception(SearchFailed(f"The search failed: {error}"))
            return
        for search, passages in zip(searches, results, strict=True):
            if not search.result.done():
                search.result.set_result(passages)
