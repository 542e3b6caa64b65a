"""What is known of a row: its tokens, its retrievals, and how both read as text."""

from dataclasses import asdict, dataclass, field

import numpy as np
import torch


@dataclass
class Retrieval:
    """
    One retrieval of one row.

    Args:
        row (`int`): of the batch, or of the prompts of `generate_many`.
        position (`int`): of `[NSP]` in the row's token ids: its column of `sequences`.
        passages (`list[dict]`): `{"id", "title", "text"}`, best first.
        scores (`list[float | None]`): inner product of query and passage embedding (the cosine, where that is the similarity); `None` for passages
            that were given, not found.
        grounded_span (`tuple[int, int]`): positions `[start, end)` of the text between `[Cs]` and `[CE]`; `end` is where the row stops or
            retrieves again if there is no `[CE]`.
        query_embed (`list[float]`, *optional*): the query embedding, with `RetrievalConfig(output_query_embeds=True)`.
    """

    row: int
    position: int
    passages: list
    scores: list
    grounded_span: tuple = (0, 0)
    query_embed: list | None = None

    @property
    def passage_ids(self):
        """Ids of all passages, best first."""
        return [passage["id"] for passage in self.passages]

    @property
    def passage_id(self):
        """Id of the best passage."""
        return self.passages[0]["id"]

    @property
    def title(self):
        """Title of the best passage."""
        return self.passages[0]["title"]

    @property
    def text(self):
        """Text of the best passage."""
        return self.passages[0]["text"]

    @property
    def score(self):
        """Score of the best passage."""
        return self.scores[0]

    def to_dict(self):
        """As JSON has it."""
        return asdict(self)


@dataclass(eq=False)  # a row is itself, whatever it holds
class Row:
    """
    One sequence that is being written.

    Args:
        number (`int`): of the prompt.
        prompt (`list[int]`): token ids.
        candidates (`numpy.ndarray` of int64, *optional*): rows of the index that may be retrieved.
        given (`list`, *optional*): passages that `[NSP]` gets, in order, in place of a search.
        slot (`int`): of the cache.
        retrievals (`list[Retrieval]`): so far; positions count from the row's own first token.
        used (`set[int]`): rows of the index that were retrieved.
        forgotten (`list[tuple[int, list[int]]]`): passages that are no longer in the cache: where they stood, and their ids.
        held (`torch.Tensor` of shape `(V,)`): logits of the decision for `[NSP]`, as a memory adjusted them, in case
            nothing is found.
        rewrite (`list[int]`): to be read next in place of the decided token.
        grounded (`tuple[int, int]`, *optional*): columns `[passage, [Cs])` of the last passage while it is in the cache.
        ids (`list[int]`): all that was written, when the row is finished.
        num_generated_tokens (`int`): decided tokens.
    """

    number: int
    prompt: list
    candidates: np.ndarray | None = None
    given: list | None = None
    slot: int = -1
    retrievals: list = field(default_factory=list)
    used: set = field(default_factory=set)
    forgotten: list = field(default_factory=list)
    held: torch.Tensor | None = None
    rewrite: list | None = None
    grounded: tuple | None = None
    ids: list | None = None
    num_generated_tokens: int = 0

    def may_retrieve(self, max_retrievals: int | None) -> bool:
        """Whether a retrieval is left, of `max_retrievals` (`None` for any number) and of the passages that were given."""
        if max_retrievals is not None and len(self.retrievals) >= max_retrievals:
            return False
        return self.given is None or len(self.given) > 0

    @property
    def num_forgotten(self) -> int:
        """Tokens that were written and are no longer in the cache."""
        return sum(len(cut) for _, cut in self.forgotten)

    def forget(self, written: list[int]) -> None:
        """Note that the last passage leaves the cache, which holds `written`: it still belongs to the row's ids."""
        assert self.grounded is not None
        (start, end), self.grounded = self.grounded, None
        self.forgotten.append((start + self.num_forgotten, written[start:end]))

    def finish(self, written: list[int], stops: set[int]) -> None:
        """Make ids and spans final, of what the cache holds and what was forgotten; a grounded text ends at `stops`."""
        for start, cut in self.forgotten:
            written[start:start] = cut
        self.ids = written
        self.held = self.grounded = None
        for retrieval in self.retrievals:
            start = end = retrieval.grounded_span[0]
            while end < len(written) and written[end] not in stops:
                end += 1
            retrieval.grounded_span = (start, end)


class RetrievalError(RuntimeError):
    """
    The search failed while rows were being written.

    Attributes:
        finished (`list[Row]`): the rows that were done; `number`, `ids` and `retrievals` say all about each.
    """

    def __init__(self, message, finished):
        super().__init__(message)
        self.finished = finished


def cited_text(ids, trace, start, tokenizer):
    """One row of [`~RetrievalGenerationMixin.decode_with_citations`]: `ids` from `start` on, with its trace."""
    numbers, pieces, position, known = {}, [], start, {}
    for retrieval in trace:
        first, end = retrieval.grounded_span
        cited = []
        for passage in retrieval.passages:
            key = passage["id"] if passage["id"] is not None else (passage["title"], passage["text"])
            known[key] = passage
            cited.append(numbers.setdefault(key, len(numbers) + 1))
        pieces.append(tokenizer.decode(ids[position : max(position, retrieval.position)], skip_special_tokens=True))
        pieces.append(
            f"{tokenizer.decode(ids[first:end], skip_special_tokens=True).strip()} {''.join(f'[{number}]' for number in cited)}"
        )
        position = end
    pieces.append(tokenizer.decode(ids[position:], skip_special_tokens=True))
    lines = [" ".join(piece.strip() for piece in pieces if piece.strip())]
    lines += [
        f"[{n}] {known[key]['title'] + ': ' if known[key]['title'] else ''}{known[key]['text']}"
        for key, n in numbers.items()
    ]
    return "\n".join(lines)


def written_text(ids, trace, start, tokenizer):
    """What the model wrote itself: `ids` from `start` on, without the passages of the trace."""
    pieces, position = [], start
    for retrieval in trace:
        pieces.append(ids[position : max(position, retrieval.position)])
        position = retrieval.grounded_span[0]
    pieces.append(ids[position:])
    return " ".join(text for piece in pieces if (text := tokenizer.decode(piece, skip_special_tokens=True).strip()))
