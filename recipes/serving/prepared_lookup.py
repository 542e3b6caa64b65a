"""The lookup of an engine: the candidates and given passages of a body are prepared once for all its answers."""

from typing import Any

from modeling_cosup.lookup_cosup import Lookup
from modeling_cosup.retriever_cosup import Retriever
from modeling_cosup.settings_cosup import RetrievalConfig
from modeling_cosup.tokenization_cosup import encode_texts
from modeling_cosup.trace_cosup import Row

from serving.base_engine import search_failed
from serving.engine import UnsupportedSetting


class PreparedLookup(Lookup):
    """
    Prepares a row at a time, and remembers the last result: the answers of a body share their [`RetrievalConfig`].

    A body may ask for a thousand answers, and each of them is checked before it is generated. While passages are
    encoded, no other request's passages are prepared.
    """

    def __init__(self, model: Any, retriever: Retriever | None) -> None:
        super().__init__(model, retriever)
        # encoded here, because later another thread may be using the tokenizer
        self._separator = encode_texts(model.tokenizer, ["\n"])[0]
        self._last: tuple[RetrievalConfig, Row] | None = None

    def prepare_row(self, row: Row) -> None:
        """
        Give the row of a request its candidates and passages.

        Raises:
            [`UnsupportedSetting`]: names the field of the request, and what was expected.
            [`SearchFailed`]: if the index cannot be read.
        """
        retrieval = row.settings.retrieval
        try:
            self.prepare([row], retrieval)
        except ValueError as error:
            name = "candidates" if retrieval.candidates is not None else "passages"
            raise UnsupportedSetting(f"{name}: {error}") from error
        except Exception as error:  # a retriever may raise anything
            raise search_failed(error) from error

    def prepare(self, rows: list[Row], retrieval: RetrievalConfig, copies: int = 1) -> None:
        """Give a row its candidates and passages; see [`Lookup.prepare`]."""
        if retrieval.candidates is None and retrieval.passages is None:
            return
        (row,) = rows
        last = self._last
        if last is None or last[0] != retrieval:
            prepared = Row(row.number, [], row.settings)
            super().prepare([prepared], retrieval)
            last = (retrieval, prepared)
            self._last = last
        row.candidates = last[1].candidates
        row.given_passages = last[1].given_passages
