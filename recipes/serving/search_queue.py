"""Searches of many requests: those that wait at the same moment share one, in a thread, so the event loop is free."""

import asyncio

import torch

from modeling_cosup.lookup_cosup import Found, Lookup
from modeling_cosup.trace_cosup import Row

from serving.base_engine import search_failed


class SearchQueue:
    """
    Makes one search at a time; while it runs, the next ones gather.

    Args:
        lookup ([`Lookup`]): searches.
    """

    def __init__(self, lookup: Lookup) -> None:
        self.lookup = lookup
        self._waiting: dict[Row, tuple[torch.Tensor | None, asyncio.Future[Found]]] = {}
        self._worker: asyncio.Task | None = None

    async def find(self, row: Row, query_embed: torch.Tensor | None) -> Found:
        """
        Return the passages for a row, and its query embedding if the trace keeps it.

        Args:
            row ([`Row`]): its last token is `[NSP]`.
            query_embed (`torch.FloatTensor` of shape `(h,)`, *optional*): not needed for a row with given passages.

        Raises:
            [`SearchFailed`]: if the search of this row failed.
        """
        result: asyncio.Future[Found] = asyncio.get_running_loop().create_future()
        self._waiting[row] = (query_embed, result)
        if self._worker is None:
            self._worker = asyncio.create_task(self._work())
        return await result

    async def _work(self) -> None:
        while self._waiting:
            searches = self._waiting
            self._waiting = {}
            await self._search({row: search for row, search in searches.items() if not search[1].done()})
        self._worker = None

    async def _search(self, searches: dict[Row, tuple[torch.Tensor | None, asyncio.Future[Found]]]) -> None:
        def query_embeds_of(rows: list[Row]) -> torch.Tensor:
            width = self.lookup.model.config.embedding_size
            embeds = []
            for row in rows:
                query_embed = searches[row][0]
                embeds.append(torch.zeros(width) if query_embed is None else query_embed)  # given: no one reads it
            return torch.stack(embeds)  # (R, h)

        found: dict[Row, Found] = {}
        failure: Exception | None = None
        try:
            found = await asyncio.to_thread(self.lookup.find, list(searches), query_embeds_of, isolates_failures=True)
        except Exception as error:  # nobody may wait for ever
            failure = error
        for row, (_, result) in searches.items():
            if result.done():  # the request was cancelled
                continue
            if row in found:
                result.set_result(found[row])
            else:
                result.set_exception(search_failed(row.error or failure))
