"""What generate() writes as it is written, with its passages: an iterator for who shows an answer while another thread makes it."""

import contextlib
import queue
from dataclasses import dataclass

from transformers.generation.streamers import BaseStreamer

from .trace_cosup import Retrieval

INCOMPLETE = "\ufffd"  # how a tokenizer shows the first bytes of a character


@dataclass
class StreamEvent:
    """
    One step of an answer.

    Args:
        type (`str`): `"text"`: more text. `"retrieval"`: passages were retrieved, and what follows is grounded on them. `"grounded_end"`: it is no longer.
        text (`str`): of a `"text"` event, with the white space before it; empty otherwise.
        retrieval ([`Retrieval`], *optional*): the one that began or ended, or on which the text is grounded; `None` for free text. It is the object of the
            trace: its `position` and `grounded_span` are final when the stream ends.
    """

    type: str
    text: str = ""
    retrieval: Retrieval | None = None


class RetrievalStreamer(BaseStreamer):
    """
    A streamer that is iterated: `generate(..., streamer=streamer)` runs in one thread, `for event in streamer` in another.

    Texts and passages come apart, so nothing needs to be parsed, and `RetrievalConfig(stream_passages=...)` makes no difference. An error of generate() is
    raised from the loop. [`~RetrievalGenerationMixin.make_streamer`] makes one; each serves one call.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): Gen's.
        stops (iterable of `int`): ids that end a grounded text: `[CE]`, `[NSP]`, EOS.
        timeout (`float`, *optional*): seconds to wait for an event; by default, without end.

    Raises:
        `TimeoutError`: from the loop, when nothing came within `timeout`.
        `RuntimeError`: from a second call of generate() with the same streamer.
    """

    def __init__(self, tokenizer, stops=(), timeout=None):
        self.tokenizer, self.stops, self.timeout = tokenizer, frozenset(stops), timeout
        self._events = queue.Queue()
        self._retrieval = None  # on which the text is grounded
        self._prompt_is_next, self._ended, self._exhausted = True, False, False
        self._context, self._pending = [], []  # ids whose text was given, the last few of them; ids whose text was not

    # ------------------------------------------------------------------ the thread that generates

    def put(self, value):
        """Token ids from generate(): `torch.LongTensor` of shape `(n,)` or `(1, n)`; the first are the prompt, which is skipped."""
        if self._ended:
            raise RuntimeError("This streamer has served a call of generate(): make another one.")
        if value.ndim > 1 and value.shape[0] > 1:
            raise ValueError(f"A streamer takes one row, found {value.shape[0]}: their texts would be mixed.")
        if self._prompt_is_next:
            self._prompt_is_next = False
            return
        for id in value.reshape(-1).tolist():
            if id in self.stops and self._retrieval is not None:
                self._end_grounded_text()
            self._pending.append(id)
            self._give_text()

    def on_retrieval(self, retrieval):
        """A [`Retrieval`], from the decoding loop, in place of the tokens of `[NSP]`, passages and `[Cs]`."""
        self._end_grounded_text()
        self._retrieval = retrieval
        self._events.put(StreamEvent("retrieval", retrieval=retrieval))

    def on_error(self, error):
        """generate() failed: the loop gives what was written before, then raises `error`."""
        self._finish(error)

    def end(self):
        """generate() is done."""
        self._finish(None)

    def _finish(self, error):
        if not self._ended:
            self._end_grounded_text()
            self._ended = True
            self._events.put(error)

    def _end_grounded_text(self):
        self._give_text(complete=False)
        if self._retrieval is not None:
            self._events.put(StreamEvent("grounded_end", retrieval=self._retrieval))
            self._retrieval = None

    def _give_text(self, complete=True):
        """
        Give what the pending ids add to the text, unless `complete` and they end within a character.

        They are decoded after the ids before them, which decide on a space, and only those: the work for a token does not grow with the text.
        """
        if not self._pending:
            return
        before, after = (
            self.tokenizer.decode(ids, skip_special_tokens=True)
            for ids in (self._context, self._context + self._pending)
        )
        cut = after.endswith(INCOMPLETE)
        if cut and complete:
            return
        text = (
            after[len(before) :]
            if after.startswith(before)
            else self.tokenizer.decode(self._pending, skip_special_tokens=True)
        )
        if text:
            self._events.put(StreamEvent("text", text, self._retrieval))
            self._context = (
                [] if cut else self._pending
            )  # half a character must not become a whole one with bytes from after the span
        self._pending = []

    # ------------------------------------------------------------------ the thread that reads

    def __iter__(self):
        return self

    def __next__(self):
        if self._exhausted:
            raise StopIteration
        try:
            event = self._events.get(timeout=self.timeout)
        except queue.Empty:
            raise TimeoutError(f"Nothing came from generate() within {self.timeout} seconds.") from None
        if isinstance(event, StreamEvent):
            return event
        self._exhausted = True
        raise StopIteration if event is None else event


@contextlib.contextmanager
def ending(streamer):
    """A streamer ends with a call that fails, and learns why where it has `on_error`: who reads from it must not wait for ever."""
    try:
        yield
    except BaseException as error:
        on_error = getattr(streamer, "on_error", None)
        if on_error is not None:
            on_error(error)
        elif streamer is not None:
            streamer.end()
        raise
