"""From a query embedding to passages: what the rows of the decoding loop get for their `[NSP]`."""

from .retriever_cosup import Retriever
from .settings_cosup import RetrievalConfig
from .tokenization_cosup import encode_passages_for_gen, encode_texts
from .trace_cosup import Row


class Lookup:
    """
    Answers `[NSP]`: by a search, one for all rows that ask, or from the passages that a row was given beforehand.

    Args:
        model ([`CoSupForCausalLM`]): whose tokenizer joins passages.
        retriever ([`Retriever`], *optional*): what is searched.
        retrieval ([`RetrievalConfig`]): how.
    """

    def __init__(self, model, retriever: Retriever | None, retrieval: RetrievalConfig):
        self.model, self.retriever, self.retrieval = model, retriever, retrieval
        self._separator: list[int] = []  # a line break, tokenized when it is first needed

    def passages_for(self, asking: list[Row], query_embeds) -> list[list[tuple[dict, float | None]]]:
        """
        Find the passages that each row gets, best first, with their scores (`None` for those given beforehand); none
        where nothing is found.

        Args:
            asking (`list[Row]`): the rows that ask.
            query_embeds (`torch.FloatTensor` of shape `(R, h)`, *optional*): theirs; needed for those that search.
        """
        passages: list[list[tuple[dict, float | None]]] = []
        searching = []  # places in `asking`
        for place, row in enumerate(asking):
            if row.given is None:
                searching.append(place)
                passages.append([])
            else:
                passages.append([(passage, None) for passage in row.given[: self.retrieval.top_k]])
                row.given = row.given[self.retrieval.top_k :]
        if searching:
            results = self._search([asking[place] for place in searching], query_embeds[searching])
            for place, result in zip(searching, results, strict=True):
                passages[place] = result
        return passages

    def _search(self, rows, query_embeds):
        """Search for all rows at once, and fetch all passages at once."""
        most = self.retrieval.top_k
        if self.retrieval.no_repeat_passages:
            most += max(len(row.used) for row in rows)
        options = {}
        if any(row.candidates is not None for row in rows):
            options["candidates"] = [row.candidates for row in rows]
        scores, numbers = self.retriever.search(query_embeds, k=most, **options)
        picks = [self._pick(*result) for result in zip(rows, numbers.tolist(), scores.tolist(), strict=True)]
        passages = iter(self.retriever.get_passages([number for pick in picks for number, _ in pick]))
        results = []
        for row, pick in zip(rows, picks, strict=True):
            row.used.update(number for number, _ in pick)
            results.append([(next(passages), score) for _, score in pick])
        return results

    def _pick(self, row, numbers, scores):
        """What a row may use of its search results, at most `top_k`: `[(row of the index, score)]`."""
        lowest = self.retrieval.min_score
        pick = []
        for number, score in zip(numbers, scores, strict=True):
            missing = number < 0  # the index holds fewer
            too_low = lowest is not None and score < lowest
            repeated = self.retrieval.no_repeat_passages and number in row.used
            if not (missing or too_low or repeated):
                pick.append((number, score))
        return pick[: self.retrieval.top_k]

    def join(self, passages: list[dict]) -> tuple[list[int], list[int]]:
        """Token ids of several passages, one after another with a line break between; and where each begins."""
        if len(passages) > 1 and not self._separator:
            self._separator = encode_texts(self.model.tokenizer, ["\n"])[0]
        ids: list[int] = []
        starts: list[int] = []
        for passage in passages:
            if starts:
                ids += self._separator
            starts.append(len(ids))
            ids += passage["input_ids"]
        return ids, starts

    def given_passages(self, passages: list) -> list[dict]:
        """
        Passages of an oracle, as the index would give them.

        Args:
            passages (`list[str | dict]`): ids of the index, or `{"title", "text"}`.

        Raises:
            `ValueError`: for an id without a retriever.
        """
        ids = [passage for passage in passages if isinstance(passage, str)]
        found: list[dict] = []
        if ids:
            if self.retriever is None:
                instead = "or give it as a dict with 'title' and 'text'"
                raise ValueError(f"Passage {ids[0]!r} is given by its id, which needs a retriever; {instead}.")
            found = self.retriever.get_passages(self.retriever.rows_of(ids))
        by_id = iter(found)
        dicts = [passage for passage in passages if not isinstance(passage, str)]
        encoded = iter(encode_passages_for_gen(self.model.tokenizer, dicts, self.model.config) if dicts else [])
        ready = []
        for passage in passages:
            if isinstance(passage, str):
                ready.append(next(by_id))
            else:
                ready.append({"id": None, "title": "", **passage, "input_ids": next(encoded)})
        return ready
