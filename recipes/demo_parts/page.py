"""The page and its actions."""

import argparse
import html
import logging
import math
import os
import threading
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # gradio reads both variables when it is imported
os.environ.setdefault("GRADIO_RUN_HISTORY", "False")  # questions and corpora of users are not stored
try:
    import gradio as gr
except ImportError as error:
    raise ImportError(f"{error}. The demo needs: pip install gradio") from error

from demo_parts.answers import Answer
from demo_parts.local_model import LocalModel
from demo_parts.questions import AUTOMATIC, FORCED, MAX_QUESTION, OFF, Question
from demo_parts.served_model import ServedModel
from demo_parts.uploads import FORMATS, MAX_BYTES, MAX_PASSAGES, read_upload, shorten

INDEX_STEP = 64  # passages that are indexed between two updates of the status
MAX_CORPORA = 64  # that are kept in memory; one more, and the oldest is deleted
CORPUS_SECONDS = 24 * 60 * 60  # after which an uploaded corpus is deleted
PRIVATE = {"api_visibility": "private", "show_progress": "hidden"}


@dataclass(eq=False)
class Corpus:
    """The index of an uploaded corpus; `None` once it was deleted."""

    index: Any


class Demo:
    """
    The page and its actions.

    Args:
        args (`argparse.Namespace`): options of [`parse`].

    Raises:
        `ValueError`, `OSError`, `ImportError`: for a model, an index or a server that cannot be used.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        self.backend: LocalModel | ServedModel = ServedModel(args) if args.base_url else LocalModel(args)
        self.examples = [[question] for question in args.examples]
        self.takes_corpora = args.upload
        self.limit = {"concurrency_id": "model", "concurrency_limit": self.backend.at_once}
        self.corpora: list[weakref.ref[Corpus]] = []  # of all visitors, the oldest first
        self.running: dict[str, threading.Event] = {}  # session -> the event that stops its answer

    def ask(
        self,
        question: str | None,
        retrieval: str,
        top_k: float,
        max_new_tokens: float,
        min_score: str | None,
        corpus: Corpus | None,
        has_corpus: bool,
        request: gr.Request,
    ) -> Iterator[tuple]:
        """
        Answer a question: after each event, yield the HTML of the answer and the state of the stop button.

        `corpus` may have been deleted although the page says that it is searched (`has_corpus`): then nothing else is.
        """
        index = corpus.index if has_corpus and corpus is not None else None
        note = "searched: your corpus" if has_corpus else self.backend.note
        if retrieval == OFF:
            note = "retrieval is switched off"
        answer = Answer(question or "", self.backend.score_name, note)  # an unused text box holds None
        stop = threading.Event()
        try:
            if has_corpus and index is None and retrieval != OFF:
                raise ValueError(
                    "Your corpus was deleted (it was a day old, you were away, or others uploaded many): upload it "
                    "again, or go back to the demo's index."
                )
            settings = Question(answer.question, retrieval, int(top_k), int(max_new_tokens), _min_score(min_score))
            steps = self.backend.write(answer, settings, index, stop)
        except ValueError as error:
            raise _user_error(error) from None
        self.running[request.session_hash] = stop
        try:
            yield answer.to_html(), gr.Button(interactive=True)
            for _ in steps:
                yield answer.to_html(), gr.skip()
            yield answer.to_html(writing=False), gr.Button(interactive=False)
        except Exception as error:
            yield answer.to_html(writing=False), gr.Button(interactive=False)
            raise _user_error(error) from None
        finally:
            steps.close()
            self.running.pop(request.session_hash, None)

    def stop(self, request: gr.Request) -> None:
        """End the answer of this session, if one is being written."""
        event = self.running.get(request.session_hash)
        if event is not None:
            event.set()

    def take_corpus(self, path: str | None) -> Iterator[tuple]:
        """Index an uploaded file: yield the status, the corpus, whether there is one, and the button that drops it."""
        if path is None:
            raise gr.Error("Choose a file first.", print_exception=False)
        try:
            passages = read_upload(path)
            index = None
            for start in range(0, len(passages), INDEX_STEP):
                yield _status(f"Indexing passage {start + 1:,} of {len(passages):,} …"), *[gr.skip()] * 3
                index = self.backend.add_to_index(index, passages[start : start + INDEX_STEP])
        except Exception as error:
            user_error = _user_error(error)
            yield _status(f"Not indexed. {user_error.reason}"), *[gr.skip()] * 3
            raise user_error from None
        status = _status(f"Your corpus of {len(passages):,} passages is now searched, for you alone.")
        yield status, self._kept(index), True, gr.Button(interactive=True)

    def _kept(self, index: Any) -> Corpus:
        """Return a corpus with this index; if there are too many now, delete the oldest."""
        corpus = Corpus(index)
        corpora = [ref for ref in self.corpora if ref() is not None] + [weakref.ref(corpus)]
        for ref in corpora[:-MAX_CORPORA]:
            oldest = ref()
            if oldest is not None:
                oldest.index = None
        self.corpora = corpora[-MAX_CORPORA:]
        return corpus

    def drop_corpus(self) -> tuple:
        """Go back to the index of the demo."""
        return self.default_status(), None, False, gr.Button(interactive=False)

    def default_status(self) -> str:
        """Return the status for users without a corpus of their own, as HTML."""
        return _status(self.backend.status)

    def page(self) -> gr.Blocks:
        """Build the page."""
        with gr.Blocks(title=f"CoSup: {self.backend.name}", analytics_enabled=False, delete_cache=(600, 600)) as page:
            corpus = gr.State(time_to_live=CORPUS_SECONDS)
            has_corpus = gr.Checkbox(False, visible=False)  # in the page, so that it outlives the corpus
            gr.HTML(
                f"<h2>{html.escape(self.backend.name)}</h2><p>A language model that retrieves while it writes. "
                "Text in colour is grounded on the passage [n].</p>"
            )
            with gr.Row():
                with gr.Column(scale=7):
                    box = {"label": "Question", "lines": 1, "max_lines": 6, "max_length": MAX_QUESTION}
                    question = gr.Textbox(elem_id="question", autofocus=True, **box)
                    with gr.Row():
                        ask = gr.Button("Ask", variant="primary", elem_id="ask", min_width=120)
                        stop = gr.Button("Stop", interactive=False, elem_id="stop", min_width=120)
                    if self.examples:
                        gr.Examples(self.examples, question, label="Examples", api_visibility="private")
                    answer = gr.HTML(elem_id="answer")
                with gr.Column(scale=3, min_width=300):
                    settings = self._settings()
                    self._corpus(corpus, has_corpus)
            inputs = [question, *settings, corpus, has_corpus]
            asked = gr.on([ask.click, question.submit], self.ask, inputs, [answer, stop], **self.limit, **PRIVATE)
            asked.then(lambda: gr.Button(interactive=False), None, stop, queue=False, **PRIVATE)  # also after an error
            stop.click(self.stop, None, None, queue=False, **PRIVATE)
            page.unload(self.stop)
        return page.queue(max_size=20, api_open=False)

    def _settings(self):
        retrieval = gr.Radio([AUTOMATIC, FORCED, OFF], value=AUTOMATIC, label="Retrieval", elem_id="retrieval")
        with gr.Accordion("More settings", open=False):
            top_k = gr.Slider(1, 5, 1, step=1, label="Passages for each [NSP]")
            max_new_tokens = gr.Slider(8, 512, 128, step=8, label="Maximum number of tokens")
            min_score = gr.Textbox(
                label="Minimum score of a passage",
                info="Passages with a lower score are not retrieved. Empty: no minimum.",
                elem_id="min-score",
            )
        return retrieval, top_k, max_new_tokens, min_score

    def _corpus(self, corpus, has_corpus):
        status = gr.HTML(self.default_status(), elem_id="status", padding=False)
        with gr.Accordion("Your own corpus", open=False):
            if not self.takes_corpora:
                gr.HTML(f"<p>{self.backend.no_corpora}</p>")
                return
            gr.HTML(
                "<p>JSON Lines (text, optionally title and id), CSV (the same as columns) or text (one passage per "
                f"paragraph). Up to {MAX_PASSAGES:,} passages in {MAX_BYTES // 2**20} MB, searched for you alone, "
                "and deleted a day after the upload, or once you leave, if it is older than an hour.</p>"
            )
            file = gr.File(file_types=FORMATS, label="Corpus", elem_id="corpus", height=140)
            with gr.Row():
                index = gr.Button("Index it", elem_id="index")
                back = gr.Button("Back to the demo's index", interactive=False, elem_id="back")
        outputs = [status, corpus, has_corpus, back]
        index.click(self.take_corpus, file, outputs, **self.limit, **PRIVATE)
        back.click(self.drop_corpus, None, outputs, queue=False, **PRIVATE)


def _status(text):
    return f'<p class="cosup-status">{html.escape(text)}</p>'


def _min_score(text):
    if not text or not text.strip():  # None if never used
        return None
    try:
        score = float(text)
    except ValueError:
        score = math.nan
    if not math.isfinite(score):
        raise ValueError(f"The minimum score is {shorten(text)}, expected a number, or nothing.")
    return score


def _user_error(error):
    """
    Return the `gr.Error` that a user sees.

    Our checks of what a user sent raise `ValueError`, whose text is for the user. Libraries raise it too: the log has
    it at INFO. Anything else is unexpected, and its text may name hosts and files: only the log has it.
    """
    if isinstance(error, gr.Error):
        return error
    level = logging.ERROR
    name = type(error).__name__
    if type(error) is ValueError:  # its subclasses come from libraries
        level = logging.INFO
        reason = str(error)
    elif name == "RetrievalError":  # the class itself is in the code that travels with the checkpoint
        reason = "The search failed."
    else:
        reason = f"The demo failed ({name})."
    logging.getLogger(__name__).log(level, "%s", reason, exc_info=error)
    user_error = gr.Error(html.escape(reason), print_exception=False)
    user_error.reason = reason
    return user_error
