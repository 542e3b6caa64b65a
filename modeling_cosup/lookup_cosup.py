"""From a query embedding to passages: what the rows of the decoding loop get for their `[NSP]`."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from .retriever_cosup import Retriever
from .settings_cosup import RetrievalConfig
from .tokenization_cosup import encode_passages_for_gen, encode_texts
from .trace_cosup import Row

ScoredPassages = list[tuple[dict[str, Any], float | None]]  # best first; the score of a given passage is `None`


class Lookup:
    """
    Answers `[NSP]`: by one search for all rows that ask, or from the passages that a row was given beforehand.

    Args:
        model ([`CoSupForCausalLM`]): its tokenizer joins passages.
        retriever ([`Retriever`], *optional*): what is searched.
        retrieval ([`RetrievalConfig`]): how to search it.
    """

    def __init__(self, model: Any, retriever: Retriever | None, retrieval: RetrievalConfig) -> None:
        self.model = model
        self.retriever = retriever
        self.retrieval = retrieval
        self._separator: list[int] = []  # a line break, tokenized when it is first needed

    # ------------------------------------------------------------------ before the first token

    def prepare(self, rows: list[Row], copies: int) -> None:
        """
        Give candidates and passages to the rows of the prompts that they belong to.

        Args:
            rows (`list[Row]`): in the order of the prompts.
            copies (`int`): rows of each prompt, one after another (`num_return_sequences`).

        Raises:
            `ValueError`: for a list that does not have an entry for each prompt, and for unknown passage ids.
        """
        candidates, passages = self.retrieval.candidates, self.retrieval.passages
        if candidates is not None:
            if self.retriever is None:
                raise ValueError("RetrievalConfig.candidates need a retriever to search them.")
            _check_length("candidates", len(candidates), len(rows) // copies)
            for prompt, ids in enumerate(candidates):
                index_rows = None if ids is None else self.retriever.rows_of(ids)
                for row in rows[prompt * copies : (prompt + 1) * copies]:
                    row.candidates = index_rows
        if passages is not None:
            _check_length("passages", len(passages), len(rows) // copies)
            for prompt, of_prompt in enumerate(passages):
                given_passages = None if of_prompt is None else self._oracle_passages(of_prompt)
                for row in rows[prompt * copies : (prompt + 1) * copies]:
                    row.given_passages = given_passages

    def _oracle_passages(self, passages: Sequence[str | dict[str, Any]]) -> list[dict[str, Any]]:
        """
        Return the passages of an oracle as the index would give them.

        Args:
            passages (`list[str | dict]`): ids of the index, or `{"title", "text"}`.

        Raises:
            `ValueError`: for an id without a retriever.
        """
        ids = [passage for passage in passages if isinstance(passage, str)]
        dicts = [passage for passage in passages if not isinstance(passage, str)]
        if ids and self.retriever is None:
            instead = "or give it as a dict with 'title' and 'text'"
            raise ValueError(f"Passage {ids[0]!r} is given by its id, which needs a retriever; {instead}.")
        of_index: Iterator[dict[str, Any]] = iter(())
        if ids and self.retriever is not None:
            of_index = iter(self.retriever.get_passages(self.retriever.rows_of(ids)))
        encoded: Iterator[list[int]] = iter(())
        if dicts:
            encoded = iter(encode_passages_for_gen(self.model.tokenizer, dicts, self.model.config))
        complete = []
        for passage in passages:
            if isinstance(passage, str):
                complete.append(next(of_index))
            else:
                complete.append({"id": None, "title": "", **passage, "input_ids": next(encoded)})
        return complete

    # ------------------------------------------------------------------ in the loop

    def passages_for(self, asking: list[Row], query_embeds: torch.Tensor | None) -> list[ScoredPassages]:
        """
        Return the passages that each row gets, best first, with their scores; an empty list if nothing is found.

        Args:
            asking (`list[Row]`): the rows that ask.
            query_embeds (`torch.FloatTensor` of shape `(R, h)`, *optional*): theirs; needed if any of them searches.
        """
        passages: list[ScoredPassages] = []
        searching = []  # places in `asking`
        for place, row in enumerate(asking):
            if row.given_passages is None:
                searching.append(place)
                passages.append([])
            else:
                passages.append([(passage, None) for passage in row.given_passages[: self.retrieval.top_k]])
                row.given_passages = row.given_passages[self.retrieval.top_k :]
        if searching:
            assert query_embeds is not None
            results = self._search([asking[place] for place in searching], query_embeds[searching])
            for place, result in zip(searching, results, strict=True):
                passages[place] = result
        return passages

    def _search(self, rows: list[Row], query_embeds: torch.Tensor) -> list[ScoredPassages]:
        """Search for all rows in one call, and fetch all passages in another."""
        assert self.retriever is not None
        k = self.retrieval.top_k
        if self.retrieval.no_repeat_passages:
            k += max(len(row.retrieved) for row in rows)
        options = {}
        if any(row.candidates is not None for row in rows):
            options["candidates"] = [row.candidates for row in rows]
        scores, numbers = self.retriever.search(query_embeds, k=k, **options)  # (R, k) each
        picks = []
        for row, row_numbers, row_scores in zip(rows, numbers.tolist(), scores.tolist(), strict=True):
            picks.append(self._pick(row, row_numbers, row_scores))
        passages = iter(self.retriever.get_passages([number for pick in picks for number, _ in pick]))
        results: list[ScoredPassages] = []
        for row, pick in zip(rows, picks, strict=True):
            row.retrieved.update(number for number, _ in pick)
            results.append([(next(passages), score) for _, score in pick])
        return results

    def _pick(self, row: Row, numbers: list[int], scores: list[float]) -> list[tuple[int, float]]:
        """Return what a row may use of its search results, at most `top_k`: `[(row of the index, score)]`."""
        min_score = self.retrieval.min_score
        pick = []
        for number, score in zip(numbers, scores, strict=True):
            missing = number < 0  # the index holds fewer
            too_low = min_score is not None and score < min_score
            repeated = self.retrieval.no_repeat_passages and number in row.retrieved
            if not (missing or too_low or repeated):
                pick.append((number, score))
        return pick[: self.retrieval.top_k]

    def join(self, passages: list[dict[str, Any]]) -> tuple[list[int], list[int]]:
        """Return the token ids of several passages, with a line break between, and the place where each one begins."""
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


def _check_length(name: str, entries: int, prompts: int) -> None:
    if entries != prompts:
        raise ValueError(
            f"RetrievalConfig.{name} has {entries} entries, expected one for each of the {prompts} prompts."
        )
