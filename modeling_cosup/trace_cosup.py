"""The rows of a call and their retrieval traces: token ids, passages, and how both become text."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any, Protocol, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from .memory_cosup import TokenNeighbors
from .metadata_cosup import source_text
from .settings_cosup import RowSettings

# the log-probability of the decided token, and `(token id, log-probability)` of the most likely ones, best first
Logprobs: TypeAlias = tuple[float, list[tuple[int, float]]]


@dataclass
class Retrieval:
    """
    One retrieval of one row.

    Args:
        row (`int`): number of the row in the batch, or of the prompt of `generate_many`.
        position (`int`): index of `[NSP]` in the row's token ids; in `sequences` its column.
        passages (`list[dict]`): best first, each `{"id", "title", "text"}`, with `"metadata"` if the passage has some.
        scores (`list[float | None]`): inner product of query and passage embedding (the cosine, if that is the
            similarity); `None` for passages that were given, not searched for.
        grounded_span (`tuple[int, int]`): positions `[start, end)` of the text between `[Cs]` and `[CE]`. Without
            `[CE]` it ends where the row stops or retrieves again.
        query_embed (`list[float]`, *optional*): the query embedding, with `RetrievalConfig(output_query_embeds=True)`.
    """

    row: int
    position: int
    passages: list[dict[str, Any]]
    scores: list[float | None]
    grounded_span: tuple[int, int] = (0, 0)
    query_embed: list[float] | None = None

    @property
    def passage_ids(self) -> list[str | None]:
        """Ids of all passages, best first."""
        return [passage["id"] for passage in self.passages]

    @property
    def passage_id(self) -> str | None:
        """Id of the best passage."""
        return self.passages[0]["id"]

    @property
    def title(self) -> str:
        """Title of the best passage."""
        return self.passages[0]["title"]

    @property
    def text(self) -> str:
        """Text of the best passage."""
        return self.passages[0]["text"]

    @property
    def score(self) -> float | None:
        """Score of the best passage."""
        return self.scores[0]

    def to_dict(self) -> dict[str, Any]:
        """Return all fields as JSON values."""
        return asdict(self)


class Listener(Protocol):
    """What the decoding loop tells about one row, as it happens. A row without a listener costs nothing."""

    def on_token(self, token: int, logprobs: Logprobs | None) -> None:
        """Take a decided token. An `[NSP]` comes only if it gets no passage, because the row ends there."""
        ...

    def on_retrieval(self, retrieval: Retrieval, nsp_ids: list[int], passage_ids: list[int]) -> None:
        """
        Take a retrieval, and the token ids that the row got with it.

        Args:
            retrieval ([`Retrieval`]): the object in the trace; its `grounded_span` is final when the row ends.
            nsp_ids (`list[int]`): the `[NSP]` that was decided; empty for the `[NSP]` of a prompt.
            passage_ids (`list[int]`): of the passages and `[Cs]`.
        """
        ...


@dataclass(frozen=True, eq=False)
class SetAside:
    """
    The state of a row that was taken out of the decoding loop, and goes on later as if nothing had happened.

    Args:
        keys, values (`list[torch.Tensor]` of shape `(heads, columns, head_dim)`): one entry per layer, on the CPU.
        devices (`list[torch.device]`): of the layers.
        tokens, positions (`torch.LongTensor` of shape `(columns,)`): token id and position in each column.
        next_position (`int`): position of the next token to forward.
        last_token (`int`): the last decision, which is not forwarded yet.
        num_generated (`int`): decided tokens.
        banned, grounded (`bool`): the next decision may not be `[NSP]`; the next token is grounded text.
        tasks (`list[str]`): the lists of the loop in which the row was.
    """

    keys: list[torch.Tensor]
    values: list[torch.Tensor]
    devices: list[torch.device]
    tokens: torch.Tensor
    positions: torch.Tensor
    next_position: int
    last_token: int
    num_generated: int
    banned: bool
    grounded: bool
    tasks: list[str]


@dataclass(eq=False)  # rows are compared by identity
class Row:
    """
    One sequence that is being generated.

    Args:
        number (`int`): of the row in the batch, or of the prompt of `generate_many`.
        prompt (`list[int]`): token ids.
        settings ([`RowSettings`]): how it is decided and how it retrieves.
        listener ([`Listener`], *optional*): is told what happens to the row.
        generator (`torch.Generator`, *optional*): draws its tokens; by default those of all rows are drawn together.
        candidates (`numpy.ndarray` of int64, *optional*): rows of the index that may be retrieved.
        given_passages (`list[dict]`, *optional*): passages for the next `[NSP]`s, in order, in place of a search.
        slot (`int`): of the batch and the cache.
        arrival (`int`): how many rows were submitted before.
        set_aside ([`SetAside`], *optional*): while the row waits to go on.
        retrievals (`list[Retrieval]`): the trace so far; positions count from the row's first token.
        retrieved (`set[int]`): rows of the index that were retrieved.
        forgotten (`list[tuple[int, list[int]]]`): passages that left the cache: the index of their first token in the
            row's ids, and their ids.
        neighbors (`list[TokenNeighbors]`): of each decided token, if the call asks for them; positions as above.
        logprobs (`list`): of each decided token, if `settings.num_logprobs` asks for them.
        logits_before_nsp (`torch.Tensor` of shape `(V,)`): logits, mixed with the memory, from which the last `[NSP]`
            was decided; needed again if nothing is found.
        recompute_ids (`list[int]`): with `forget_passages="recompute"`, token ids to forward again in the next pass,
            the last decision included.
        passage_columns (`tuple[int, int]`, *optional*): columns `[start, end)` of the last passage, without `[Cs]`,
            while it is in the cache.
        ids (`list[int]`): all token ids, prompt and passages included, once the row is finished.
        num_generated_tokens (`int`): number of decided tokens, once the row is finished.
        finish_reason (`str`): then `"stop"` for an end token or a stopping criterion, `"length"` for a used budget or
            a full context.
        error (`Exception`, *optional*): why the row ended without being finished.
    """

    number: int
    prompt: list[int]
    settings: RowSettings
    listener: Listener | None = None
    generator: torch.Generator | None = None
    candidates: NDArray[np.int64] | None = None
    given_passages: list[dict[str, Any]] | None = None
    slot: int = -1
    arrival: int = 0
    set_aside: SetAside | None = None
    retrievals: list[Retrieval] = field(default_factory=list)
    retrieved: set[int] = field(default_factory=set)
    forgotten: list[tuple[int, list[int]]] = field(default_factory=list)
    neighbors: list[TokenNeighbors] = field(default_factory=list)
    logprobs: list[Logprobs] = field(default_factory=list)
    logits_before_nsp: torch.Tensor | None = None
    recompute_ids: list[int] = field(default_factory=list)
    passage_columns: tuple[int, int] | None = None
    ids: list[int] = field(default_factory=list)
    num_generated_tokens: int = 0
    finish_reason: str = ""
    error: Exception | None = None

    @property
    def may_retrieve(self) -> bool:
        """Whether an `[NSP]` retrieves: the row is below its limit, and has given passages left, if any."""
        limit = self.settings.retrieval.max_retrievals
        if not self.settings.retrieves or (limit is not None and len(self.retrievals) >= limit):
            return False
        return self.given_passages is None or len(self.given_passages) > 0

    @property
    def may_decide_nsp(self) -> bool:
        """Whether the next decision may be `[NSP]`; to a row that never retrieves it is a token like any other."""
        if self.settings.retrieval.forbid_nsp:
            return False
        return self.may_retrieve or not self.settings.retrieves

    def begins_grounded(self, cs_token_id: int | None, stops: set[int]) -> bool:
        """Return whether the prompt ends within grounded text: after a `[Cs]` that none of `stops` follows."""
        for id in reversed(self.prompt):
            if id in stops:
                return False
            if id == cs_token_id:
                return True
        return False

    @property
    def num_forgotten(self) -> int:
        """Number of tokens that are no longer in the cache."""
        return sum(len(ids) for _, ids in self.forgotten)

    def forget(self, cached_ids: list[int]) -> tuple[int, int]:
        """
        Keep the ids of the last passage, which leaves the cache but still belongs to the row.

        Args:
            cached_ids (`list[int]`): token ids of the row in the cache, the passage included.

        Returns:
            `tuple[int, int]`: the columns `[start, end)` of the passage.
        """
        assert self.passage_columns is not None
        start, end = self.passage_columns
        self.forgotten.append((start + self.num_forgotten, cached_ids[start:end]))
        self.passage_columns = None
        return start, end

    def finish(self, cached_ids: list[int], stops: set[int]) -> None:
        """
        Set the final ids, with forgotten passages in their places, and the final grounded spans.

        Args:
            cached_ids (`list[int]`): token ids of the row in the cache, and the last decision.
            stops (`set[int]`): ids that end a grounded text.
        """
        ids = list(cached_ids)
        for start, passage_ids in self.forgotten:
            ids[start:start] = passage_ids
        self.ids = ids
        self.logits_before_nsp = None
        self.passage_columns = None
        for entries in (self.neighbors, self.logprobs):
            del entries[self.num_generated_tokens :]  # the last token had no room
        for retrieval in self.retrievals:
            start = end = retrieval.grounded_span[0]
            while end < len(ids) and ids[end] not in stops:
                end += 1
            retrieval.grounded_span = (start, end)


class RetrievalError(RuntimeError):
    """
    The search failed during generation.

    Attributes:
        finished (`list[Row]`): the rows that had ended; `number`, `ids` and `retrievals` of each are final.
    """

    def __init__(self, message: str, finished: list[Row]) -> None:
        super().__init__(message)
        self.finished = finished


def text_decoder(tokenizer: PreTrainedTokenizerBase) -> Callable[[list[int]], str]:
    """Return a function that decodes token ids and skips special tokens."""
    return partial(tokenizer.decode, skip_special_tokens=True)  # type: ignore[return-value]  # one list, one text


def cited_text(ids: list[int], trace: Sequence[Retrieval], start: int, tokenizer: PreTrainedTokenizerBase) -> str:
    """
    Return the text of a row with a numbered citation after each grounded span, and the passages below.

    Args:
        ids (`list[int]`): of the row.
        trace (`Sequence[Retrieval]`): its retrievals; their positions count from the first of `ids`.
        start (`int`): index of the first token after the prompt.
        tokenizer (`PreTrainedTokenizerBase`): Gen's.
    """
    decode = text_decoder(tokenizer)
    # by id, title and text: given passages may share an id
    numbers: dict[tuple, int] = {}
    passages: dict[tuple, dict[str, Any]] = {}
    pieces = []
    position = start
    for retrieval in trace:
        citations = ""
        for passage in retrieval.passages:
            key = (passage["id"], passage["title"], passage["text"])
            passages.setdefault(key, passage)
            number = numbers.setdefault(key, len(numbers) + 1)
            citations += f"[{number}]"
        span_start, span_end = retrieval.grounded_span
        grounded_text = decode(ids[span_start:span_end]).strip()
        pieces.append(decode(ids[position : retrieval.position]))  # empty for the [NSP] of a prompt
        pieces.append(f"{grounded_text} {citations}")
        position = span_end
    pieces.append(decode(ids[position:]))
    lines = [" ".join(piece.strip() for piece in pieces if piece.strip())]
    for key, number in numbers.items():
        lines.append(f"[{number}] {_heading(passages[key])}{passages[key]['text']}")
    return "\n".join(lines)


def _heading(passage: dict[str, Any]) -> str:
    """Return the title and the source of a passage, such as `Guide (guide.pdf, page 3): `; empty without both."""
    title, source = passage["title"], source_text(passage)
    if title and source:
        return f"{title} ({source}): "
    if title or source:
        return f"{title or source}: "
    return ""


def written_text(ids: list[int], trace: Sequence[Retrieval], start: int, tokenizer: PreTrainedTokenizerBase) -> str:
    """Return what the model wrote itself: the text without the passages; arguments as in [`cited_text`]."""
    spans = []
    position = start
    for retrieval in trace:
        spans.append(ids[position : retrieval.position])  # empty for the [NSP] of a prompt
        position = retrieval.grounded_span[0]
    spans.append(ids[position:])
    decode = text_decoder(tokenizer)
    texts = [decode(span).strip() for span in spans]
    return " ".join(text for text in texts if text)
