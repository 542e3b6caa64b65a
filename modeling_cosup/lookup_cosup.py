"""The passages that rows of the decoding loop get for their `[NSP]`: found by query embedding, or given beforehand."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch

from .metadata_cosup import check_metadata, traced_passage
from .passages_cosup import check_id, check_title_and_text
from .retriever_cosup import Retriever
from .settings_cosup import RetrievalConfig
from .tokenization_cosup import encode_passages_for_gen, encode_texts
from .trace_cosup import Retrieval, Row

ScoredPassages = list[tuple[dict[str, Any], float | None]]  # best first; the score of a given passage is `None`
Found = tuple[ScoredPassages, list[float] | None]  # passages, and the query embedding for the trace, if wanted


class Lookup:
    """
    Passages for rows that retrieve: found by searching for them together, or given to a row beforehand.

    Args:
        model ([`CoSupForCausalLM`], or another object with its `tokenizer` and `config`): they encode passages.
        retriever ([`Retriever`], *optional*): searches the index.
    """

    def __init__(self, model: Any, retriever: Retriever | None) -> None:
        self.model = model
        self.retriever = retriever
        self._separator: list[int] = []  # token ids of a line break, encoded at first use

    # ------------------------------------------------------------------ before the first token

    def prepare(self, rows: list[Row], retrieval: RetrievalConfig, copies: int = 1) -> None:
        """
        Give each row the candidates and passages of its prompt.

        Args:
            rows (`list[Row]`): in the order of the prompts.
            retrieval ([`RetrievalConfig`]): of these rows.
            copies (`int`): consecutive rows of each prompt (`num_return_sequences`).

        Raises:
            `ValueError`: for a list without exactly one entry per prompt, for unknown passage ids, and for a prompt
                that must search without a retriever.
        """
        candidates, passages = retrieval.candidates, retrieval.passages
        num_prompts = len(rows) // copies
        if candidates is not None:
            if self.retriever is None:
                raise ValueError("RetrievalConfig.candidates need a retriever to search them.")
            _check_length("candidates", len(candidates), num_prompts)
            for prompt, ids in enumerate(candidates):
                index_rows = None if ids is None else self.retriever.rows_of(ids)
                for row in rows[prompt * copies : (prompt + 1) * copies]:
                    row.candidates = index_rows
        if passages is not None:
            _check_length("passages", len(passages), num_prompts)
            for prompt, oracle in enumerate(passages):
                if oracle is None and self.retriever is None and not retrieval.forbid_nsp:
                    raise ValueError(
                        f"RetrievalConfig.passages is None for prompt {prompt}, which must search: pass a retriever."
                    )
                given_passages = None if oracle is None else self._oracle_passages(oracle)
                for row in rows[prompt * copies : (prompt + 1) * copies]:
                    row.given_passages = given_passages

    def _oracle_passages(self, passages: Sequence[str | dict[str, Any]]) -> list[dict[str, Any]]:
        """
        Return an oracle's passages in the form of the index: `{"id", "title", "text", "input_ids"}`.

        Args:
            passages (`list[str | dict]`): each an id of the index, or a `dict` with `text` and perhaps `title`.

        Raises:
            `ValueError`: for an id without a retriever, and for what is neither an id nor a passage with a text.
        """
        for number, passage in enumerate(passages):
            if isinstance(passage, Mapping):
                where = f"RetrievalConfig.passages, passage {number} of a prompt"
                check_title_and_text(passage, where)
                if not isinstance(passage.get("id"), str | None):
                    check_id(passage["id"], where)  # an integer, as in a corpus
                check_metadata(passage.get("metadata"), where)
            elif not isinstance(passage, str):
                raise ValueError(f"RetrievalConfig.passages holds {passage!r}, expected a passage or its id.")
        ids = [passage for passage in passages if isinstance(passage, str)]
        dicts = [passage for passage in passages if not isinstance(passage, str)]
        if ids and self.retriever is None:
            instead = "or give it as a dict with 'title' and 'text'"
            raise ValueError(f"Passage {ids[0]!r} is given by its id, which needs a retriever; {instead}.")
        from_index: Iterator[dict[str, Any]] = iter(())
        if ids and self.retriever is not None:
            from_index = iter(self.retriever.get_passages(self.retriever.rows_of(ids)))
        encoded: Iterator[list[int]] = iter(())
        if dicts:
            encoded = iter(encode_passages_for_gen(self.model.tokenizer, dicts, self.model.config))
        complete = []
        for passage in passages:
            if isinstance(passage, str):
                complete.append(next(from_index))
            else:
                id = passage.get("id")
                if id is not None:
                    id = str(id)
                complete.append({"title": "", **passage, "id": id, "input_ids": next(encoded)})
        return complete

    # ------------------------------------------------------------------ in the loop

    def find(
        self, rows: list[Row], query_embeds_of: Callable[[list[Row]], torch.Tensor], isolates_failures: bool
    ) -> dict[Row, Found]:
        """
        Search for all rows together.

        Args:
            rows (`list[Row]`): the rows that retrieve.
            query_embeds_of (`Callable`): returns the query embeddings `(R, h)` of some of them.
            isolates_failures (`bool`): if the search fails, search for each row alone. A row for which that fails too
                gets the `error`, and is left out of the result. After a `ConnectionError` no row searches again: each
                would wait as long for a server that is gone. `False` raises all errors.
        """
        is_gone = None
        try:
            return self._find(rows, query_embeds_of)
        except ConnectionError as error:
            is_gone = error
            if not isolates_failures:
                raise
        except Exception:
            if not isolates_failures:
                raise
        found = {}
        for row in rows:
            if is_gone is not None and row.given_passages is None:
                row.error = is_gone
                continue
            try:
                found.update(self._find([row], query_embeds_of))
            except Exception as error:
                row.error = error
        return found

    def _find(self, rows: list[Row], query_embeds_of: Callable[[list[Row]], torch.Tensor]) -> dict[Row, Found]:
        query_embeds = None
        with_queries = [row.settings.retrieval.output_query_embeds for row in rows]
        if any(with_queries) or any(row.given_passages is None for row in rows):
            query_embeds = query_embeds_of(rows)  # (R, h)
        results = self._passages_for(rows, query_embeds)
        found: dict[Row, Found] = {}
        for i, row in enumerate(rows):
            query_embed = None
            if with_queries[i] and query_embeds is not None:
                query_embed = query_embeds[i].tolist()
            found[row] = (results[i], query_embed)
        return found

    def _passages_for(self, rows: list[Row], query_embeds: torch.Tensor | None) -> list[ScoredPassages]:
        """Return the passages and scores for each row, best first; an empty list if nothing is found."""
        results: list[ScoredPassages] = []
        searching = []  # indices of the rows that need a search
        for i, row in enumerate(rows):
            if row.given_passages is None:
                searching.append(i)
                results.append([])
            else:
                results.append([(passage, None) for passage in row.given_passages[: row.settings.retrieval.top_k]])
        if searching:
            assert query_embeds is not None
            search_results = self._search([rows[i] for i in searching], query_embeds[searching])
            for i, passages in zip(searching, search_results, strict=True):
                results[i] = passages
        for row in rows:  # last: a row whose search failed can search again
            if row.given_passages is not None:
                row.given_passages = row.given_passages[row.settings.retrieval.top_k :]
        return results

    def _search(self, rows: list[Row], query_embeds: torch.Tensor) -> list[ScoredPassages]:
        """Return the passages and scores for each row: from one search for each k, and one fetch of all passages."""
        assert self.retriever is not None  # checked by `prepare`
        # an approximate index may rank differently for another k, so no row is searched with the k of other rows
        rows_by_k: dict[int, list[int]] = {}
        for i, row in enumerate(rows):
            k = row.settings.retrieval.top_k
            if row.settings.retrieval.no_repeat_passages:
                k += len(row.retrieved)
            rows_by_k.setdefault(k, []).append(i)
        picks: list[list[tuple[int, float]]] = [[] for _ in rows]
        for k, members in rows_by_k.items():
            options = {}
            if any(rows[i].candidates is not None for i in members):
                options["candidates"] = [rows[i].candidates for i in members]
            scores, index_rows = self.retriever.search(query_embeds[members], k=k, **options)  # (R, k) each
            for i, row_results, row_scores in zip(members, index_rows.tolist(), scores.tolist(), strict=True):
                picks[i] = _pick(rows[i], row_results, row_scores)
        passages = iter(self.retriever.get_passages([index_row for pick in picks for index_row, _ in pick]))
        results: list[ScoredPassages] = []
        for row, pick in zip(rows, picks, strict=True):
            row.retrieved.update(index_row for index_row, _ in pick)
            results.append([(next(passages), score) for _, score in pick])
        return results

    def add_retrieval(
        self, row: Row, passages: ScoredPassages, column: int, room: int, query_embed: list[float] | None = None
    ) -> list[int]:
        """
        Add a retrieval to the trace of a row, and return what the row reads next: passages and `[Cs]`.

        Args:
            row ([`Row`]): its last token is `[NSP]`.
            passages (`list[tuple[dict, float | None]]`): with their scores, best first; at least one.
            column (`int`): the first column after `[NSP]`.
            room (`int`): how many tokens of the passages there is room for, at least 1.
            query_embed (`list[float]`, *optional*): for the trace.
        """
        ids, starts = self._join([passage for passage, _ in passages])
        ids = ids[:room]
        num_begun = len([start for start in starts if start < room])
        passages = passages[:num_begun]  # the others have no token in `ids`
        position = column - 1 + row.num_forgotten  # of [NSP]
        span_start = position + len(ids) + 2  # after [NSP], passages and [Cs]
        retrieval = Retrieval(
            row=row.number,
            position=position,
            passages=[traced_passage(passage) for passage, _ in passages],
            scores=[score for _, score in passages],
            grounded_span=(span_start, span_start),
            query_embed=query_embed,
        )
        row.retrievals.append(retrieval)
        row.passage_columns = (column, column + len(ids))
        return [*ids, self.model.config.cs_token_id]

    def _join(self, passages: list[dict[str, Any]]) -> tuple[list[int], list[int]]:
        """Return the token ids of all passages, with a line break between, and the index where each passage begins."""
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


def _pick(row: Row, index_rows: list[int], scores: list[float]) -> list[tuple[int, float]]:
    """Return the search results that a row may use, at most `top_k`: `[(row of the index, score)]`."""
    retrieval = row.settings.retrieval
    pick = []
    for index_row, score in zip(index_rows, scores, strict=True):
        missing = index_row < 0  # the index holds fewer passages
        too_low = retrieval.min_score is not None and score < retrieval.min_score
        repeated = retrieval.no_repeat_passages and index_row in row.retrieved
        if not (missing or too_low or repeated):
            pick.append((index_row, score))
    return pick[: retrieval.top_k]


def _check_length(name: str, entries: int, prompts: int) -> None:
    if entries != prompts:
        raise ValueError(
            f"RetrievalConfig.{name} has {entries} entries, expected one for each of the {prompts} prompts."
        )
