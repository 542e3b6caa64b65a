"""The streamer of texts and retrievals: an iterator in one thread, fed by generate() in another."""

import contextlib
import queue
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase
from transformers.generation.streamers import BaseStreamer

from .trace_cosup import Logprobs, Retrieval, text_decoder

INCOMPLETE = "\ufffd"  # how a tokenizer shows the first bytes of a character


@dataclass
class StreamEvent:
    """
    One event of a stream.

    Args:
        type (`str`): `"text"`: more text. `"retrieval"`: passages were retrieved, and the text after this event is
            grounded on them. `"grounded_end"`: the grounded text has ended.
        text (`str`): of a `"text"` event, with the white space before it; empty otherwise.
        retrieval ([`Retrieval`], *optional*): the retrieval that began or ended, or on which the text is grounded;
            `None` for free text. It is the object in the trace; its `position` and `grounded_span` are final when the
            stream ends.
    """

    type: str
    text: str = ""
    retrieval: Retrieval | None = None


class GrowingText:
    """
    The text of token ids that come one at a time: each call returns what the text gained.

    An id is decoded together with the ids before it, which decide whether there is a space between. Only the last of
    them count, so that the work for a token does not grow with the text.

    Args:
        decode (`Callable`): returns the text of token ids, without special tokens.
        context (`Sequence[int]`): the last ids of a text that this one continues.
    """

    def __init__(self, decode: Callable[[list[int]], str], context: Sequence[int] = ()) -> None:
        self._decode = decode
        self._pending: list[int] = []  # ids whose text was not returned yet
        self._context = list(context)  # the last ids whose text was returned

    def add(self, id: int) -> str:
        """Return the text gained by an id; nothing while the text ends within a character."""
        self._pending.append(id)
        return self._gain(allow_incomplete=False)

    def flush(self) -> str:
        """Return the text of an incomplete character, which no later id completes."""
        return self._gain(allow_incomplete=True)

    def _gain(self, allow_incomplete: bool) -> str:
        if not self._pending:
            return ""
        before = self._decode(self._context)
        after = self._decode(self._context + self._pending)
        incomplete = after.endswith(INCOMPLETE)
        if incomplete and not allow_incomplete:
            return ""
        if after.startswith(before):
            text = after[len(before) :]
        else:
            text = self._decode(self._pending)
        if text:
            # half a character must not become a whole one with bytes from after the span
            self._context = [] if incomplete else self._pending
        self._pending = []
        return text


class RetrievalStreamer(BaseStreamer):
    """
    An iterable streamer: `generate(..., streamer=streamer)` runs in one thread, `for event in streamer` in another.

    Texts and passages are separate events: nothing needs to be parsed, and `RetrievalConfig(stream_passages=...)`
    makes no difference. The iteration raises errors of generate().
    [`~RetrievalGenerationMixin.make_streamer`] makes a streamer; each one serves one call.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): Gen's.
        stops (iterable of `int`): ids that end a grounded text: `[CE]`, `[NSP]`, EOS.
        timeout (`float`, *optional*): seconds to wait for an event; by default no limit.

    Raises:
        `TimeoutError`: by the iteration, if there is no event within `timeout`.
        `RuntimeError`: by a second call of generate() with the same streamer.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, stops: Iterable[int] = (), timeout: float | None = None
    ) -> None:
        self.tokenizer = tokenizer
        self.stops = frozenset(stops)
        self.timeout = timeout
        # events, and at the end the error of generate(), or `None`
        self._events: queue.Queue[StreamEvent | BaseException | None] = queue.Queue()
        self._retrieval: Retrieval | None = None  # the current text is grounded on it
        self._prompt_is_next = True
        self._ended = False  # for the thread that generates
        self._exhausted = False  # for the thread that reads
        self._text = GrowingText(text_decoder(tokenizer))

    # ------------------------------------------------------------------ the thread that generates

    def put(self, value: torch.Tensor) -> None:
        """Take token ids from generate(), `(n,)` or `(1, n)`; the first call brings the prompt, which is skipped."""
        if self._ended:
            raise RuntimeError("This streamer has served a call of generate(): make another one.")
        if value.ndim > 1 and value.shape[0] > 1:
            raise ValueError(f"A streamer takes one row, found {value.shape[0]}: their texts would be mixed.")
        if self._prompt_is_next:
            self._prompt_is_next = False
            return
        for id in value.reshape(-1).tolist():
            if id in self.stops and self._retrieval is not None:
                self._emit_grounded_end()
            self._emit_text(self._text.add(id))

    def on_retrieval(self, retrieval: Retrieval) -> None:
        """Take a [`Retrieval`] from the decoding loop, in place of the tokens of `[NSP]`, passages and `[Cs]`."""
        self._emit_grounded_end()
        self._retrieval = retrieval
        self._events.put(StreamEvent("retrieval", retrieval=retrieval))

    def on_error(self, error: BaseException) -> None:
        """End the stream with an error of generate(): the iteration gives the text before it, then raises it."""
        self._close(error)

    def end(self) -> None:
        """End the stream: generate() is done."""
        self._close(None)

    def _close(self, error: BaseException | None) -> None:
        if not self._ended:
            self._emit_grounded_end()
            self._ended = True
            self._events.put(error)

    def _emit_grounded_end(self) -> None:
        """Emit all pending text and, after grounded text, its end."""
        self._emit_text(self._text.flush())
        if self._retrieval is not None:
            self._events.put(StreamEvent("grounded_end", retrieval=self._retrieval))
            self._retrieval = None

    def _emit_text(self, text: str) -> None:
        if text:
            self._events.put(StreamEvent("text", text, self._retrieval))

    # ------------------------------------------------------------------ the thread that reads

    def __iter__(self) -> Iterator[StreamEvent]:
        return self

    def __next__(self) -> StreamEvent:
        if self._exhausted:
            raise StopIteration
        try:
            event = self._events.get(timeout=self.timeout)
        except queue.Empty:
            raise TimeoutError(f"Nothing came from generate() within {self.timeout} seconds.") from None
        if isinstance(event, StreamEvent):
            return event
        self._exhausted = True
        if event is None:
            raise StopIteration
        raise event


class StreamerListener:
    """
    Gives a streamer of transformers what happens to a row: tokens, and retrievals if it has a method `on_retrieval`.

    Args:
        streamer (`BaseStreamer`): of one row; it has the prompt already.
        stream_passages (`bool`): give passages and `[Cs]` to a streamer that only takes tokens.
    """

    def __init__(self, streamer: Any, stream_passages: bool) -> None:
        self.streamer = streamer
        self.stream_passages = stream_passages

    def on_token(self, token: int, logprobs: Logprobs | None) -> None:
        self.streamer.put(torch.tensor([token]))

    def on_retrieval(self, retrieval: Retrieval, nsp_ids: list[int], passage_ids: list[int]) -> None:
        on_retrieval = getattr(self.streamer, "on_retrieval", None)
        if on_retrieval is not None:
            on_retrieval(retrieval)
            return
        ids = nsp_ids
        if self.stream_passages:
            ids = nsp_ids + passage_ids
        if ids:
            self.streamer.put(torch.tensor(ids))


@contextlib.contextmanager
def ending(streamer: Any) -> Iterator[None]:
    """
    End the streamer if the call within this context fails: a thread that reads from it must not wait forever.

    A streamer with a method `on_error` gets the error.
    """
    try:
        yield
    except BaseException as error:
        on_error = getattr(streamer, "on_error", None)
        if on_error is not None:
            on_error(error)
        elif streamer is not None:
            streamer.end()
        raise
