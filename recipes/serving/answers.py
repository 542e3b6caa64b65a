"""The text of an answer and its citations, made from the events of an engine: the same streamed and at once."""

import re
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache

from transformers import PreTrainedTokenizerBase

from modeling_cosup import Retrieval
from modeling_cosup.streaming_cosup import GrowingText
from modeling_cosup.tokenization_cosup import special_ids
from modeling_cosup.trace_cosup import text_decoder

from serving.engine import EndEvent, Event, RetrievalEvent, TokenEvent

OPENING = "([{«“‘¿¡"  # no space comes after these
CLOSING = ")]}»”’'.,;:!?%…、。，．！？；："  # nor before these
# nor between two of these scripts, which have no spaces: Thai, Lao, Burmese, Khmer, Chinese and Japanese, wide signs
WITHOUT_SPACES = re.compile(
    "[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u2e80-\u30ff\u31f0-\u9fff\uf900-\ufaff\uff00-\uff60\U00020000-\U0003ffff]"
)
_REMEMBERED = 2**16  # texts of a few token ids


class TokenTexts:
    """
    Texts of token ids. They are remembered, because the same few ids follow each other again and again, and decoding
    two of them takes as long as sending them.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): Gen's.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.special_ids = special_ids(tokenizer)
        decode = text_decoder(tokenizer)
        self._text_of = lru_cache(_REMEMBERED)(lambda ids: decode(list(ids)))

    def decode(self, ids: list[int]) -> str:
        """Return the text of a few ids, without special tokens."""
        return self._text_of(tuple(ids))


@dataclass(frozen=True)
class AnswerToken:
    """
    A token of the text.

    Args:
        event ([`TokenEvent`]): its decision.
        offset (`int`): where its text begins in the answer, in Unicode code points. Tokens that share a character
            have the same offset.
    """

    event: TokenEvent
    offset: int


@dataclass(frozen=True)
class Citation:
    """A grounded text: `text[start:end]` of the answer, in Unicode code points, without white space around it."""

    start: int
    end: int
    retrieval: Retrieval


@dataclass
class Piece:
    """
    What some events add to an answer.

    Args:
        text (`str`), tokens (`list[AnswerToken]`): the text, and its tokens.
        citations (`list[Citation]`): of grounded texts that have ended.
        finish_reason (`str`, *optional*): `"stop"` or `"length"` if the answer has ended.
    """

    text: str = ""
    tokens: list[AnswerToken] = field(default_factory=list)
    citations: list[Citation] = field(default_factory=list)
    finish_reason: str | None = None

    def __bool__(self) -> bool:
        return bool(self.text or self.tokens or self.citations or self.finish_reason)

    def add(self, other: "Piece") -> None:
        """Append the next piece of the answer."""
        self.text += other.text
        self.tokens += other.tokens
        self.citations += other.citations
        self.finish_reason = other.finish_reason


class AnswerWriter:
    """
    Turns the events of one request into text and citations.

    Where the texts of two spans would run together, a space is inserted. Control tokens and ends have no text. With
    `stop`, text that may begin a stop string waits until the next tokens decide.

    Args:
        texts ([`TokenTexts`]): of Gen's tokenizer.
        closing_ids (`frozenset[int]`): ids that end a grounded text: `[CE]` and `[NSP]`.
        prompt_length (`int`): tokens of the prompt; an `[NSP]` among them was not generated.
        stop (`Sequence[str]`): the answer ends before the first of these, wherever its tokens begin.
        context (`Sequence[int]`): the last ids of a prompt that the text continues; they decide whether it begins with
            a space.

    Attributes:
        text (`str`): the text so far.
        finish_reason (`str`, *optional*): `"stop"` or `"length"` once the answer has ended.
        num_generated_tokens (`int`): decided tokens so far, as `generate()` counts them.
        num_passage_tokens (`int`): tokens of passages that Gen has read so far.
        num_retrievals (`int`): retrievals so far.
    """

    def __init__(
        self,
        texts: TokenTexts,
        closing_ids: frozenset[int],
        prompt_length: int,
        stop: Sequence[str] = (),
        context: Sequence[int] = (),
    ) -> None:
        self.closing_ids = closing_ids
        self.prompt_length = prompt_length
        self.stop = stop
        self.text = ""
        self.finish_reason: str | None = None
        self.num_generated_tokens = 0
        self.num_passage_tokens = 0
        self.num_retrievals = 0
        self._growing_text = GrowingText(texts.decode, context)
        self._special_ids = texts.special_ids
        self._released = 0  # characters of the text that were returned
        self._begins_span = False  # the next text is the first of a span
        self._retrieval: Retrieval | None = None  # the current text is grounded on it
        self._grounded_start = 0  # where it begins, with white space
        self._tokens_without_text: list[TokenEvent] = []  # the text ends within their character
        # what waits for the text up to a length
        self._waiting_tokens: deque[tuple[int, AnswerToken]] = deque()
        self._waiting_citations: deque[Citation] = deque()

    def write(self, events: Sequence[Event]) -> Piece:
        """Take the next events and return what they add; events after the end of the answer add nothing."""
        piece = Piece()
        for event in events:
            if self.finish_reason is not None:
                break
            if isinstance(event, TokenEvent):
                self._write_token(event)
            elif isinstance(event, RetrievalEvent):
                self._begin_grounded_span(event.retrieval)
            else:
                self._end(event)
            self._cut_at_stop_string()
            self._release(piece)
        piece.finish_reason = self.finish_reason
        return piece

    # ------------------------------------------------------------------ events

    def _write_token(self, event: TokenEvent) -> None:
        self.num_generated_tokens += 1
        if event.token_id in self.closing_ids:
            self._close_span()
        elif event.token_id not in self._special_ids:
            self._tokens_without_text.append(event)
            self._append(self._growing_text.add(event.token_id))

    def _begin_grounded_span(self, retrieval: Retrieval) -> None:
        self._close_span()
        if retrieval.position >= self.prompt_length:
            self.num_generated_tokens += 1  # its [NSP]
        self.num_passage_tokens += retrieval.grounded_span[0] - retrieval.position - 2  # without [NSP] and [Cs]
        self.num_retrievals += 1
        self._retrieval = retrieval
        self._grounded_start = len(self.text)

    def _end(self, event: EndEvent) -> None:
        self._close_span()
        self.finish_reason = event.finish_reason
        self.num_generated_tokens = event.num_generated_tokens

    def _close_span(self) -> None:
        """End the current free or grounded text."""
        self._append(self._growing_text.flush())
        self._place_tokens(len(self.text))
        self._begins_span = True
        if self._retrieval is not None:
            self._waiting_citations.append(self._citation(self._grounded_start, len(self.text), self._retrieval))
            self._retrieval = None

    def _append(self, text: str) -> None:
        if not text:
            return
        if self._begins_span and _run_together(self.text, text):
            self.text += " "
        self._begins_span = False
        offset = len(self.text)
        self.text += text
        self._place_tokens(offset)

    def _place_tokens(self, offset: int) -> None:
        """Give the tokens whose text has come their offset."""
        for event in self._tokens_without_text:
            self._waiting_tokens.append((len(self.text), AnswerToken(event, offset)))
        self._tokens_without_text = []

    def _citation(self, start: int, end: int, retrieval: Retrieval) -> Citation:
        """Return the citation of `text[start:end]`, without white space around it; an empty text begins at its end."""
        grounded_text = self.text[start:end].strip()
        start = self.text.find(grounded_text, start) if grounded_text else end
        return Citation(start, start + len(grounded_text), retrieval)

    # ------------------------------------------------------------------ stop strings

    def _cut_at_stop_string(self) -> None:
        """End the answer before the first stop string in the text that was not returned yet."""
        places = []
        for stop in self.stop:
            place = self.text.find(stop, self._released)
            if place >= 0:
                places.append(place)
        if not places:
            return
        end = min(places)
        if self.finish_reason is None:
            self._close_span()
        self.finish_reason = "stop"
        self.text = self.text[:end]
        self._waiting_tokens = deque(entry for entry in self._waiting_tokens if entry[1].offset < end)
        citations: deque[Citation] = deque()
        for entry in self._waiting_citations:
            citations.append(self._citation(min(entry.start, end), min(entry.end, end), entry.retrieval))
        self._waiting_citations = citations

    def _release(self, piece: Piece) -> None:
        """Add to `piece` the text that begins no stop string, its tokens, and the citations that end within it."""
        end = len(self.text)
        if self.finish_reason is None:
            end -= max((_overlap(self.text, stop, self._released) for stop in self.stop), default=0)
        piece.text += self.text[self._released : end]
        self._released = end
        has_ended = self.finish_reason is not None
        while self._waiting_tokens and (has_ended or self._waiting_tokens[0][0] <= end):
            piece.tokens.append(self._waiting_tokens.popleft()[1])
        while self._waiting_citations and self._waiting_citations[0].end <= end:
            piece.citations.append(self._waiting_citations.popleft())


def _run_together(before: str, after: str) -> bool:
    """Return whether two texts need a space between."""
    if not before or before[-1].isspace() or after[0].isspace():
        return False
    if WITHOUT_SPACES.match(before[-1]) and WITHOUT_SPACES.match(after[0]):
        return False
    return before[-1] not in OPENING and after[0] not in CLOSING


def _overlap(text: str, stop: str, start: int) -> int:
    """Return how many characters at the end of `text[start:]` may begin the stop string."""
    longest = min(len(stop) - 1, len(text) - start)
    for length in range(longest, 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
