"""
Ask a CoSup checkpoint in a browser: the answer streams, with each retrieved passage next to the text that it grounds.

    python recipes/demo.py --model cosup-quickstart --index cosup-quickstart/index \\
        --examples "What is the job of Bokre Thosaba?" "Count from 2 to 8."
    python recipes/demo.py --base_url http://127.0.0.1:8000/v1    # the model runs in a server, recipes/serve.py

This file needs no other file of the project, because a checkpoint carries its own code. Unchanged, it is also the
`app.py` of a Space; `recipes/space` has the two other files of a Space and says how to make one. In a Space, options
come from environment variables: COSUP_MODEL, COSUP_INDEX, COSUP_INDEX_URI, COSUP_MEMORY, COSUP_REVISION,
COSUP_INDEX_REVISION, COSUP_INSTRUCTION, COSUP_EXAMPLES (questions, separated by `|`), COSUP_UPLOAD (0: users cannot
upload corpora, and Emb_seq is not loaded), COSUP_BASE_URL and OPENAI_API_KEY. An index in Milvus (COSUP_INDEX_URI)
also needs the package cosup[milvus]. Gradio itself reads GRADIO_SERVER_NAME and GRADIO_SERVER_PORT. The page loads
nothing from other servers. The demo runs the code of the checkpoint, so name one that you trust; with --base_url it
runs none, and needs only gradio and openai.
"""

import argparse
import asyncio
import contextlib
import csv
import difflib
import gzip
import html
import importlib
import io
import json
import logging
import os
import queue
import re
import sys
import threading
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # gradio reads both variables when it is imported
os.environ.setdefault("GRADIO_RUN_HISTORY", "False")  # questions and corpora of users are not stored


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Return the options of the command line; their defaults come from environment variables."""
    variable = os.environ.get
    examples = [question.strip() for question in variable("COSUP_EXAMPLES", "").split("|") if question.strip()]
    upload = variable("COSUP_UPLOAD", "1") != "0"
    index_help = (
        "name or path of its index, or with --index_uri name of a Milvus collection; "
        "without it nothing is retrieved before an upload"
    )
    uri_help = (
        "Milvus server or local file (.db) that holds the index; "
        "needs the package cosup[milvus]; MILVUS_TOKEN may hold a token"
    )
    model_help = "name or path of a CoSup checkpoint; with --base_url name of a model there, by default its first"
    base_url_help = "API of a server that runs the model, such as http://127.0.0.1:8000/v1"
    instruction_help = "the task's instruction, as in training"
    upload_help = "let users upload corpora; --no-upload does not load Emb_seq"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", default=variable("COSUP_MODEL"), help=model_help)
    add("--base_url", default=variable("COSUP_BASE_URL"), help=base_url_help)
    add("--api_key", default=variable("OPENAI_API_KEY"), help="key of that server, if it wants one")
    add("--index", default=variable("COSUP_INDEX"), help=index_help)
    add("--index_uri", default=variable("COSUP_INDEX_URI"), help=uri_help)
    add("--memory", default=variable("COSUP_MEMORY"), help="name or path of a token memory of the model")
    add("--revision", default=variable("COSUP_REVISION"), help="branch, tag or commit of the checkpoint")
    add("--index_revision", default=variable("COSUP_INDEX_REVISION"), help="branch, tag or commit of the index")
    add("--instruction", default=variable("COSUP_INSTRUCTION", ""), help=instruction_help)
    add("--examples", nargs="*", default=examples, help="questions to choose from")
    add("--upload", action=argparse.BooleanOptionalAction, default=upload, help=upload_help)
    args = parser.parse_args(argv)
    if args.base_url:
        _check_base_url(args, parser)
    elif not args.model:
        parser.error("no model: give --model or --base_url, or set COSUP_MODEL or COSUP_BASE_URL.")
    if args.index_uri and not args.index:
        parser.error(
            "a server without an index: give --index, or set COSUP_INDEX, to the name of the Milvus collection."
        )
    return args


def _check_base_url(args, parser):
    if not args.base_url.startswith(("http://", "https://")):
        parser.error(f"--base_url is {args.base_url!r}, expected a URL such as http://127.0.0.1:8000/v1.")
    for name in ("index", "index_uri", "memory", "revision", "index_revision"):
        if getattr(args, name):
            parser.error(f"--{name} cannot be used with --base_url: the server opens the model with all its parts.")
    args.upload = False  # a server takes no corpora


if __name__ == "__main__":
    parse()  # --help and a wrong option do not wait for the imports below

try:
    import gradio as gr
except ImportError as error:
    raise ImportError(f"{error}. The demo needs: pip install gradio") from error

MAX_BYTES = 5 * 2**20  # of an uploaded corpus, unpacked
MAX_PASSAGES = 2000
MAX_TEXT = 10_000  # characters of a passage
MAX_QUESTION = 2000  # characters
MAX_RETRIEVALS = 16  # per answer: a model that never stops retrieving must not keep other users waiting
INDEX_STEP = 64  # passages that are indexed between two updates of the status
AUTOMATIC, FORCED, OFF = "Automatic", "Forced", "Off"
FORMATS = [".jsonl", ".gz", ".txt", ".csv"]
PRIVATE = {"api_visibility": "private", "show_progress": "hidden"}


# ---------------------------------------------------------------------- corpora of users


def read_upload(path: str) -> list[dict[str, str]]:
    """
    Read the passages of an uploaded corpus.

    Args:
        path (`str`): a `.jsonl` file (one object per line, with `text` and optionally `id` and `title`), a `.csv` file
            (with the same names as columns) or a `.txt` file (one passage per paragraph); or one of them as `.gz`.

    Returns:
        `list[dict]`: `{"id", "title", "text"}`; a passage without an id gets its line number.

    Raises:
        `ValueError`: names the line, what was found and what was expected; never the path.
    """
    suffixes = [suffix.lower() for suffix in Path(path).suffixes]
    ending = "".join(suffixes[-2:])
    is_packed = suffixes[-1:] == [".gz"]
    if is_packed:
        suffixes.pop()
    readers = {".jsonl": _read_jsonl, ".csv": _read_csv, ".txt": _read_paragraphs}
    if not suffixes or suffixes[-1] not in readers:
        raise ValueError(f"The file's name ends in {ending or 'nothing'!r}, expected .jsonl, .jsonl.gz, .txt or .csv.")
    read = readers[suffixes[-1]]
    passages = []
    lines = {}  # passage id -> line
    for line, value in read(_decode(path, is_packed)):
        if len(passages) == MAX_PASSAGES:
            raise ValueError(
                f"Line {line}: the corpus holds more than {MAX_PASSAGES:,} passages, the most for this demo."
            )
        _check_keys(value, line)
        id = value.get("id")
        if id is None or id == "":
            id = f"line {line}"
        elif type(id) is int:  # a bool is no id
            id = str(id)
        passage = {"id": id, "title": value.get("title") or "", "text": value.get("text")}
        _check_passage(passage, line)
        if isinstance(value.get("metadata"), dict):  # the index checks it
            passage["metadata"] = value["metadata"]
        if id in lines:
            raise ValueError(f"Line {line}: id {_shorten(id)} is already in line {lines[id]}; ids must be unique.")
        lines[id] = line
        passages.append(passage)
    if not passages:
        raise ValueError("The file holds no passage.")
    return passages


def _check_keys(value, line):
    """Refuse a key that is nearly the name of a missing field, such as "titel"; further keys are ignored."""
    missing = [name for name in ("id", "title", "text") if value.get(name) is None]
    for key in value:
        nearest = difflib.get_close_matches(key.lower(), missing, n=1, cutoff=0.8)
        if nearest and value[key] is not None:
            raise ValueError(f"Line {line}: unknown key {_shorten(key)}; did you mean {nearest[0]!r}?")


def _check_passage(passage, line):
    for name, value in passage.items():
        if not isinstance(value, str):
            expected = "a string that is not empty" if name == "text" else "a string"
            raise ValueError(f"Line {line}: {name} is {_shorten(value)}, expected {expected}.")
        if name == "text" and not value.strip():
            raise ValueError(f"Line {line}: text is {'only white space' if value else 'empty'}, expected a text.")
        if len(value) > MAX_TEXT:
            raise ValueError(f"Line {line}: {name} has {len(value):,} characters, expected {MAX_TEXT:,} at most.")
        if any("\ud800" <= character <= "\udfff" for character in value):
            raise ValueError(f"Line {line}: {name} holds half a surrogate pair, which is not a character.")


def _decode(path, is_packed):
    open_file = gzip.open if is_packed else open
    try:
        with open_file(path, "rb") as file:
            data = file.read(MAX_BYTES + 1)
    except (EOFError, gzip.BadGzipFile, zlib.error):
        raise ValueError("The file is not a complete .gz file.") from None
    if len(data) > MAX_BYTES:
        unpacked = " when it is unpacked" if is_packed else ""
        raise ValueError(f"The file holds more than {MAX_BYTES // 2**20} MB{unpacked}, the most for this demo.")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        byte = data[error.start]
        raise ValueError(f"Line {line}: the byte 0x{byte:02x} is not UTF-8; save the file in this encoding.") from None


def _read_jsonl(text):
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"Line {number}: malformed JSON ({error.msg}, column {error.colno}).") from None
        except (ValueError, RecursionError):  # a number with too many digits, too many brackets
            raise ValueError(f"Line {number}: this JSON cannot be read.") from None
        if not isinstance(value, dict):
            raise ValueError(f"Line {number}: found {_shorten(value)}, expected a JSON object with a text.")
        yield number, value


def _read_csv(text):
    rows = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    try:
        columns = rows.fieldnames or []
        if "text" not in columns:
            raise ValueError(f"Line 1: found the columns {_shorten(', '.join(columns))}, expected one named text.")
        for row in rows:
            if None in row or None in row.values():
                amount = "more" if None in row else "fewer"
                raise ValueError(f"Line {rows.line_num}: found {amount} cells than the {len(columns)} columns.")
            yield rows.line_num, row
    except csv.Error as error:
        raise ValueError(f"Line {rows.line_num}: malformed CSV ({error}).") from None


def _read_paragraphs(text):
    paragraph, start = [], 1
    for number, line in enumerate([*text.split("\n"), ""], 1):  # the empty line ends the last paragraph
        if line.strip():
            if not paragraph:
                start = number
            paragraph.append(line.strip())
        elif paragraph:
            yield start, {"text": "\n".join(paragraph)}
            paragraph = []


def _shorten(value):
    shown = repr(value)
    return shown if len(shown) <= 60 else f"{shown[:60]}…"


# ---------------------------------------------------------------------- the answer as HTML


@dataclass
class Span:
    """
    A grounded part of an answer.

    Args:
        start, end (`int`): characters of the answer's text; `end` is `None` while the part is being written.
        numbers (`list[int]`): of the passages that ground it.
    """

    start: int
    end: int | None
    numbers: list[int]

    def to_html(self, text: str) -> str:
        """Return its text, escaped and marked, with links to its passages."""
        words = text.strip()
        start = len(text) - len(text.lstrip())
        before, after = text[:start], text[start + len(words) :]
        links = "".join(f'<a href="#cosup-passage-{number}">[{number}]</a>' for number in self.numbers)
        return (
            f'{html.escape(before)}<mark class="cosup-grounded" style="--hue: {_hue(self.numbers[0])}">'
            f"{html.escape(words)}<sup>{links}</sup></mark>{html.escape(after)}"
        )


@dataclass
class Card:
    """A retrieved passage, with its number and the scores of all its retrievals."""

    number: int
    passage: dict[str, Any]
    scores: list[float | None]

    def to_html(self, similarity: str) -> str:
        """Return the passage as an article with number, title, source and scores, all of it escaped."""
        scores = ", ".join(f"{score:.3f}" for score in self.scores if score is not None)
        title = self.passage["title"]
        title_html = f"<strong>{html.escape(title)}</strong>" if title else ""
        return (
            f'<article class="cosup-passage" id="cosup-passage-{self.number}" style="--hue: {_hue(self.number)}">'
            f'<header><span class="cosup-number">[{self.number}]</span>{title_html}'
            f"{_source_html(self.passage.get('metadata') or {})}"
            f'<span class="cosup-score">{html.escape(similarity)} {scores}</span></header>'
            f"<p>{html.escape(self.passage['text'])}</p></article>"
        )


def _source_html(metadata):
    """Return where a passage comes from, escaped: a link if that is a web page, otherwise a text."""
    source, page = metadata.get("source"), metadata.get("page")
    url = metadata.get("url") or source
    if not isinstance(url, str):
        return ""
    label = source if isinstance(source, str) and source else url
    if isinstance(page, int):
        label, url = f"{label}, page {page}", f"{url.partition('#')[0]}#page={page}"
    label = html.escape(label)
    if url.lower().startswith(("http://", "https://")):
        label = f'<a href="{html.escape(url)}" target="_blank" rel="noopener noreferrer">{label}</a>'
    return f'<span class="cosup-source">{label}</span>'


class Answer:
    """An answer that grows, as HTML in which every text is escaped."""

    def __init__(self, question: str, similarity: str, note: str) -> None:
        self.question = question
        self.similarity = similarity
        self.note = note
        self.text = ""
        self.spans: list[Span] = []
        self.cards: dict[tuple, Card] = {}  # id, title and text of a passage -> its card
        self._between_spans = False  # nothing was written since a grounded text began or ended

    def write(self, text: str) -> None:
        """Add text; between a free and a grounded one, add the space that neither of them may contain."""
        if self._between_spans and self.text[-1:].strip() and text[:1].isalnum():
            text = f" {text}"
        self._between_spans = False
        self.text += text

    def begin_grounded(self, passages: list[dict[str, Any]], scores: list[float | None]) -> None:
        """Ground the text that follows, up to [`end_grounded`], on passages."""
        self.ground(len(self.text), None, passages, scores)
        self._between_spans = True

    def end_grounded(self) -> None:
        """End the text that [`begin_grounded`] began."""
        self.spans[-1].end = len(self.text)
        self._between_spans = True

    def ground(self, start: int, end: int | None, passages: list[dict[str, Any]], scores: list[float | None]) -> None:
        """Ground the characters `[start, end)` on passages; one that was retrieved before keeps its number."""
        numbers = []
        for passage, score in zip(passages, scores, strict=True):
            key = (passage["id"], passage["title"], passage["text"])
            card = self.cards.setdefault(key, Card(len(self.cards) + 1, passage, []))
            card.scores.append(score)
            numbers.append(card.number)
        self.spans.append(Span(start, end, numbers))

    def to_html(self, writing: bool = True) -> str:
        """Return the question, the answer with its citations, and the passages next to it."""
        cards = "".join(card.to_html(self.similarity) for card in self.cards.values())
        if not cards:
            cards = "<p></p>" if writing else "<p>Nothing was retrieved.</p>"
        caret = '<span class="cosup-caret"></span>' if writing else ""
        return (
            f'<div class="cosup"><div class="cosup-question">{html.escape(self.question)}</div>'
            '<div class="cosup-columns">'
            f'<div><h4>Answer</h4><div class="cosup-answer">{self._text_html()}{caret}</div></div>'
            f'<div><h4>Passages</h4><div class="cosup-passages">{cards}</div></div></div>'
            f'<p class="cosup-note">{html.escape(self.note)}</p></div>'
        )

    def _text_html(self):
        parts, position = [], 0
        for span in self.spans:
            end = len(self.text) if span.end is None else span.end
            parts.append(html.escape(self.text[position : span.start]))
            parts.append(span.to_html(self.text[span.start : end]))
            position = end
        return "".join([*parts, html.escape(self.text[position:])])


def _hue(number):
    return (205 + 137 * (number - 1)) % 360  # consecutive numbers get very different colours


CSS = """
.cosup { line-height: 1.55; overflow-wrap: anywhere; }
.cosup-question { font-size: 1.2em; font-weight: 600; margin-bottom: .8em; white-space: pre-wrap; }
.cosup-columns { display: grid; grid-template-columns: minmax(0, 1fr) minmax(0, 1fr); gap: 1.5em; }
.cosup h4 { margin: 0 0 .4em; font-size: .8em; letter-spacing: .06em; text-transform: uppercase; opacity: .7; }
.cosup-answer { font-size: 1.1em; white-space: pre-wrap; }
.cosup-grounded { background: hsl(var(--hue) 85% 55% / .22); color: inherit; border-radius: 4px; }
.cosup-grounded { padding: .1em .2em; box-decoration-break: clone; }
.cosup-grounded sup a { color: inherit; font-weight: 600; text-decoration: none; padding-left: .15em; }
.cosup-passage { border: 1px solid var(--border-color-primary); border-left: 4px solid hsl(var(--hue) 70% 50%); }
.cosup-passage { border-radius: 6px; margin-bottom: .7em; padding: .6em .8em; }
.cosup-passage { background: var(--background-fill-secondary); }
.cosup-passage:target { background: hsl(var(--hue) 85% 55% / .12); }
.cosup-passage header { display: flex; gap: .5em; align-items: baseline; flex-wrap: wrap; }
.cosup-passage p { margin: .3em 0 0; max-height: 14em; overflow-y: auto; white-space: pre-wrap; }
.cosup-number { font-weight: 600; }
.cosup-source { font-size: .8em; opacity: .7; color: inherit; }
.cosup-score { margin-left: auto; font-size: .8em; opacity: .7; white-space: nowrap; }
.cosup-status { margin: 0; }
.cosup-note, .cosup-status, .cosup-passages > p { font-size: .85em; opacity: .7; }
.cosup-caret { display: inline-block; width: .5em; height: 1em; vertical-align: text-bottom; }
.cosup-caret { background: currentColor; opacity: .5; }
@media (max-width: 640px) { .cosup-columns { grid-template-columns: minmax(0, 1fr); } }
"""


# ---------------------------------------------------------------------- who answers


@dataclass
class Question:
    """
    A question and its settings.

    Raises:
        `ValueError`: for a user to read.
    """

    text: str
    retrieval: str  # AUTOMATIC, FORCED or OFF
    top_k: int
    max_new_tokens: int
    min_score: float | None

    def __post_init__(self) -> None:
        if not self.text.strip():
            raise ValueError("Write a question first.")
        if len(self.text) > MAX_QUESTION:
            raise ValueError(f"The question has {len(self.text):,} characters, expected {MAX_QUESTION:,} at most.")


class Stop:
    """A stopping criterion that ends generation at the next token after `event` is set."""

    def __init__(self, event: threading.Event) -> None:
        self.event = event

    def __call__(self, input_ids, scores, **kwargs):
        return input_ids.new_full((input_ids.shape[0],), self.event.is_set()).bool()


class LocalModel:
    """
    A checkpoint in this process, with its index. Only one call at a time uses the model.

    Args:
        args (`argparse.Namespace`): options of [`parse`].

    Raises:
        `ValueError`, `OSError`, `ImportError`: for a checkpoint or an index that cannot be loaded.
    """

    at_once = 1  # answers
    no_corpora = "This demo takes no corpora: it was started without Emb_seq, which embeds them."

    def __init__(self, args: argparse.Namespace) -> None:
        try:
            import torch
            from transformers import AutoConfig, AutoModelForCausalLM
        except ImportError as error:
            raise ImportError(f"{error}. A model in the demo needs: pip install torch transformers") from error
        config = AutoConfig.from_pretrained(args.model, revision=args.revision, trust_remote_code=True)
        if config.model_type != "cosup":
            raise ValueError(
                f"{args.model} is a plain {config.model_type} model, not a CoSup checkpoint: build one from it with"
                " CoSupForCausalLM.from_gen_and_emb_seq, or with recipes/train.py --gen."
            )
        load_emb_seq = args.upload or config.query_from != "gen"  # otherwise generation needs only Gen
        model = AutoModelForCausalLM.from_pretrained(
            args.model, revision=args.revision, trust_remote_code=True, load_emb_seq=load_emb_seq
        )
        self.model = model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
        is_folder = Path(args.model).exists()
        self.name = Path(os.path.abspath(args.model)).name if is_folder else args.model
        self.score_name = self.model.config.similarity
        self.instruction = args.instruction
        self.index = None
        if args.index:
            options = {} if args.index_revision is None else {"revision": args.index_revision}
            self.index = self.model.load_index(args.index, args.index_uri, **options)
        self.status, self.note = "There is no index: answers come from Gen alone.", "there is no index"
        if self.index is not None:
            self.status = f"An index of {len(self.index):,} passages is searched."
            self.note = "searched: the index of this demo"
        self.memory = self.model.load_memory(args.memory) if args.memory else None
        # from the code of the checkpoint: it renders a question so that a typed [NSP] stays text
        package = type(self.model).__module__.rpartition(".")[0]
        self.encode_prompt = importlib.import_module(".tokenization_cosup", package).encode_prompt
        self.lock = threading.Lock()

    def write(self, answer: Answer, question: Question, corpus: Any, stop: threading.Event) -> Iterator[None]:
        """
        Check a question; return an iterator that writes the answer, until `stop` is set or it is closed.

        Raises:
            `ValueError`: at once, if the question cannot be answered with its settings.
        """
        index = self.index if corpus is None else corpus
        if question.retrieval == FORCED and index is None:
            raise ValueError("There is no index to retrieve from: upload a corpus, or start the demo with one.")
        retrieval_config = self.model.retrieval_config_class(
            top_k=question.top_k,
            min_score=question.min_score,
            force_nsp_first=question.retrieval == FORCED,
            forbid_nsp=question.retrieval == OFF or index is None,
        )
        options = {
            "input_ids": self.encode_prompt(self.model.tokenizer, question.text, self.instruction),
            "max_new_tokens": question.max_new_tokens,
            "retriever": index,
            "retrieval_config": retrieval_config,
            "max_retrievals": MAX_RETRIEVALS,
            "memory": self.memory,
        }
        return self._write(answer, stop, **options)

    def _write(self, answer, stop, **options):
        with contextlib.closing(self.stream(stop, **options)) as events:
            for event in events:
                if event.type == "retrieval":
                    answer.begin_grounded(event.retrieval.passages, event.retrieval.scores)
                elif event.type == "grounded_end":
                    answer.end_grounded()
                else:
                    answer.write(event.text)
                yield

    def stream(self, stop: threading.Event, input_ids: list[int], **options: Any) -> Iterator[Any]:
        """Yield the events of one generate() call, which ends when `stop` is set or the caller stops iterating."""
        import torch

        streamer = self.model.make_streamer(timeout=600)
        prompt = torch.tensor([input_ids], device=self.model.device)  # (1, T)

        def work():
            try:
                with self.lock:
                    self.model.generate(prompt, streamer=streamer, stopping_criteria=[Stop(stop)], **options)
            except Exception as error:
                streamer.on_error(error)  # for errors outside generate(), which reports its own errors

        thread = threading.Thread(target=work, daemon=True)
        thread.start()
        try:
            yield from streamer
        finally:
            stop.set()
            thread.join()

    def add_to_index(self, index: Any, passages: list[dict[str, str]]) -> Any:
        """Return an index with these passages in addition; `None` is an empty one."""
        with self.lock:
            if index is None:
                return self.model.build_index(passages, show_progress_bar=False)
            index.add(passages, self.model, show_progress_bar=False)
            return index


class ServedModel:
    """
    A model in a server that speaks OpenAI's API, such as `recipes/serve.py`.

    Args:
        args (`argparse.Namespace`): options of [`parse`].

    Raises:
        `ValueError`: if the server does not answer, or has no such model.
        `ImportError`: without the package openai.
    """

    at_once = 20  # answers; the server batches them
    no_corpora = "This demo takes no corpora: its model runs in a server, which searches an index there."
    score_name = "score"
    note = "searched: the index of the server"

    def __init__(self, args: argparse.Namespace) -> None:
        try:
            import openai
        except ImportError as error:
            raise ImportError(f"{error}. --base_url needs: pip install openai") from error
        self.openai = openai
        self.instruction = args.instruction
        # A coroutine can be cancelled while it waits for the server; that closes its connection, and frees its slot.
        self.loop = asyncio.new_event_loop()
        threading.Thread(target=self.loop.run_forever, daemon=True).start()
        self.client = openai.AsyncOpenAI(base_url=args.base_url, api_key=args.api_key or "none", max_retries=0)
        try:
            names = asyncio.run_coroutine_threadsafe(self._model_names(), self.loop).result()
        except openai.OpenAIError as error:
            raise ValueError(f"--base_url {args.base_url}: {self._explain(error)}") from error
        self.name = args.model or "".join(names[:1])
        if self.name not in names:
            raise ValueError(f"--model is {self.name!r}, expected a model of {args.base_url}: {', '.join(names)}.")
        self.status = "Answers come from a server."

    async def _model_names(self):
        return [model.id async for model in self.client.models.list()]

    def write(self, answer: Answer, question: Question, corpus: None, stop: threading.Event) -> Iterator[None]:
        """Return an iterator that writes the answer, until `stop` is set or it is closed."""
        messages = [{"role": "user", "content": question.text}]
        if self.instruction:
            messages.insert(0, {"role": "system", "content": self.instruction})
        retrieval: dict[str, Any] = {"top_k": question.top_k, "max_retrievals": MAX_RETRIEVALS}
        if question.min_score is not None:
            retrieval["min_score"] = question.min_score
        if question.retrieval == FORCED:
            retrieval["force_nsp_first"] = True
        if question.retrieval == OFF:
            retrieval["forbid_nsp"] = True
        request = {
            "model": self.name,
            "messages": messages,
            "max_tokens": question.max_new_tokens,
            "temperature": 0,
            "extra_body": {"retrieval": retrieval},
        }
        with contextlib.closing(self._deltas(stop, request)) as deltas:
            for delta in deltas:
                answer.write(delta.content or "")
                for span in getattr(delta, "retrievals", None) or []:
                    answer.ground(span["start_index"], span["end_index"], span["passages"], span["scores"])
                yield

    def _deltas(self, stop, request):
        """Yield the pieces of an answer; close its connection when `stop` is set or the caller stops iterating."""
        deltas: queue.Queue = queue.Queue()

        async def read():
            async with await self.client.chat.completions.create(stream=True, **request) as stream:
                async for chunk in stream:
                    for choice in chunk.choices:
                        deltas.put(choice.delta)

        reading = asyncio.run_coroutine_threadsafe(read(), self.loop)
        reading.add_done_callback(lambda _: deltas.put(None))
        try:
            while not stop.is_set():
                try:
                    delta = deltas.get(timeout=0.1)
                except queue.Empty:
                    continue
                if delta is None:
                    return reading.result()
                yield delta
        except self.openai.OpenAIError as error:
            raise ValueError(self._explain(error)) from error
        finally:
            reading.cancel()

    def _explain(self, error):
        """Return an error of the client in plain words, without the server's address."""
        body = getattr(error, "body", None)
        if isinstance(body, dict) and body.get("message"):
            return f"The server answers: {body['message']}"
        if isinstance(error, self.openai.APIConnectionError):
            return "The server does not answer, or broke off."
        return f"The server fails: {error}"


# ---------------------------------------------------------------------- the page


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
        self.running: dict[str, threading.Event] = {}  # session -> the event that stops its answer

    def ask(
        self,
        question: str | None,
        retrieval: str,
        top_k: float,
        max_new_tokens: float,
        min_score: str | None,
        corpus: Any,
        request: gr.Request,
    ) -> Iterator[tuple]:
        """Answer a question: after each event, yield the HTML of the answer and the state of the stop button."""
        note = self.backend.note if corpus is None else "searched: your corpus"
        if retrieval == OFF:
            note = "retrieval is switched off"
        answer = Answer(question or "", self.backend.score_name, note)  # an unused text box holds None
        stop = threading.Event()
        try:
            settings = Question(answer.question, retrieval, int(top_k), int(max_new_tokens), _min_score(min_score))
            steps = self.backend.write(answer, settings, corpus, stop)
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
        """Index an uploaded file: yield the status, the index of this session, and the button that drops it."""
        if path is None:
            raise gr.Error("Choose a file first.", print_exception=False)
        try:
            passages = read_upload(path)
            index = None
            for start in range(0, len(passages), INDEX_STEP):
                yield _status(f"Indexing passage {start + 1:,} of {len(passages):,} …"), gr.skip(), gr.skip()
                index = self.backend.add_to_index(index, passages[start : start + INDEX_STEP])
        except Exception as error:
            user_error = _user_error(error)
            yield _status(f"Not indexed. {user_error.reason}"), gr.skip(), gr.skip()
            raise user_error from None
        status = _status(f"Your corpus of {len(passages):,} passages is now searched, for you alone.")
        yield status, index, gr.Button(interactive=True)

    def drop_corpus(self) -> tuple:
        """Go back to the index of the demo."""
        return self.default_status(), None, gr.Button(interactive=False)

    def default_status(self) -> str:
        """Return the status for users without a corpus of their own, as HTML."""
        return _status(self.backend.status)

    def page(self) -> gr.Blocks:
        """Build the page."""
        with gr.Blocks(title=f"CoSup: {self.backend.name}", analytics_enabled=False, delete_cache=(600, 600)) as page:
            corpus = gr.State()
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
                    self._corpus(corpus)
            inputs = [question, *settings, corpus]
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

    def _corpus(self, corpus):
        status = gr.HTML(self.default_status(), elem_id="status", padding=False)
        with gr.Accordion("Your own corpus", open=False):
            if not self.takes_corpora:
                gr.HTML(f"<p>{self.backend.no_corpora}</p>")
                return
            gr.HTML(
                "<p>JSON Lines (text, optionally title and id), CSV (the same as columns) or text (one passage per "
                f"paragraph). Up to {MAX_PASSAGES:,} passages in {MAX_BYTES // 2**20} MB, searched for you alone, "
                "and deleted an hour after you leave.</p>"
            )
            file = gr.File(file_types=FORMATS, label="Corpus", elem_id="corpus", height=140)
            with gr.Row():
                index = gr.Button("Index it", elem_id="index")
                back = gr.Button("Back to the demo's index", interactive=False, elem_id="back")
        outputs = [status, corpus, back]
        index.click(self.take_corpus, file, outputs, **self.limit, **PRIVATE)
        back.click(self.drop_corpus, None, outputs, queue=False, **PRIVATE)


def _status(text):
    return f'<p class="cosup-status">{html.escape(text)}</p>'


def _min_score(text):
    try:
        return float(text) if text and text.strip() else None  # None also if never used
    except ValueError:
        raise ValueError(f"The minimum score is {_shorten(text)}, expected a number, or nothing.") from None


def _user_error(error):
    """
    Return the `gr.Error` that a user sees: the reason, without paths and traceback.

    Errors other than `ValueError` are unexpected, so they are also logged, with their traceback.
    """
    if isinstance(error, gr.Error):
        return error
    if isinstance(error, (ValueError, RuntimeError)):
        reason = re.sub(r"(?<![\w/])/[\w.@+-]+(/[\w.@+-]+)+", "…", str(error))
    else:
        reason = f"The demo failed ({type(error).__name__})."
    if not isinstance(error, ValueError):
        logging.getLogger(__name__).error("%s", reason, exc_info=error)
    user_error = gr.Error(html.escape(reason), print_exception=False)
    user_error.reason = reason
    return user_error


# ---------------------------------------------------------------------- the program


def main() -> None:
    """Start the demo."""
    args = parse()
    if not args.base_url and not Path(args.model).exists():
        print(f"{args.model}: no such folder; looking for it on the Hugging Face Hub.", file=sys.stderr, flush=True)
    try:
        page = Demo(args).page()
    except (ValueError, OSError, ImportError) as error:
        sys.exit(f"error: {error}")
    fonts = {"font": ["system-ui", "sans-serif"], "font_mono": ["ui-monospace", "monospace"]}  # nothing to download
    page.launch(
        max_file_size=MAX_BYTES,
        css=CSS,
        theme=gr.themes.Default(**fonts),
        footer_links=[],
        ssr_mode=False,
        state_session_capacity=64,
    )


if __name__ == "__main__":
    main()
