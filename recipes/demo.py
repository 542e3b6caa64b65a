"""
Ask a CoSup checkpoint in a browser: the answer streams, and each retrieved passage is shown next to the text that it grounds.

    python recipes/demo.py --model cosup-quickstart --index cosup-quickstart/index --examples "What is the job of Bokre Thosaba?" "Count from 2 to 8."

This file needs nothing else of the project, since a checkpoint carries its own code: as the `app.py` of a Space it runs as it is. `recipes/space` holds the
two other files of one, and says how to make it. There, options come from variables: COSUP_MODEL, COSUP_INDEX, COSUP_INDEX_URI, COSUP_REVISION,
COSUP_INDEX_REVISION, COSUP_INSTRUCTION, COSUP_EXAMPLES (questions, `|` between them) and COSUP_UPLOAD (0: no corpora of users, and Emb_seq is not
loaded). An index in Milvus (COSUP_INDEX_URI) also needs the package cosup[milvus]. Gradio reads GRADIO_SERVER_NAME and GRADIO_SERVER_PORT.
The page loads nothing from elsewhere. The checkpoint's code is run: name one that you trust.
"""

import argparse
import csv
import gzip
import html
import importlib
import io
import json
import logging
import os
import re
import threading
import zlib
from pathlib import Path

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # read when gradio is imported, as the next
os.environ.setdefault("GRADIO_RUN_HISTORY", "False")  # what users ask and upload is kept nowhere

import gradio as gr
import torch
from transformers import AutoConfig, AutoModelForCausalLM, StoppingCriteria

MAX_BYTES = 5 * 2**20  # of an uploaded corpus, unpacked
MAX_PASSAGES = 2000
MAX_TEXT = 10_000  # characters of a passage
MAX_QUESTION = 2000  # characters
MAX_RETRIEVALS = 16  # for an answer: a model that retrieves for ever must not keep the others waiting
INDEXED_AT_ONCE = 64  # passages, between two steps of the progress
AUTOMATIC, FORCED, OFF = "Automatic", "Forced", "Off"
FORMATS = [".jsonl", ".gz", ".txt", ".csv"]


# ---------------------------------------------------------------------- corpora of users


def read_upload(path):
    """
    The passages of an uploaded corpus.

    Args:
        path (`str`): `.jsonl` (an object with `text`, and perhaps `id` and `title`, a line), `.csv` (the same as columns), `.txt` (a passage a paragraph); each
            may be packed: `.gz`.

    Returns:
        `list[dict]`: `{"id", "title", "text"}`; a passage without an id gets the line it stands at.

    Raises:
        `ValueError`: names the line, what was found and what was expected; never the path.
    """
    suffixes = [suffix.lower() for suffix in Path(path).suffixes]
    packed = suffixes[-1:] == [".gz"]
    reader = {".jsonl": _read_jsonl, ".csv": _read_csv, ".txt": _read_paragraphs}.get(
        "".join(suffixes[:-1][-1:] if packed else suffixes[-1:])
    )
    if reader is None:
        raise ValueError(
            f"The file's name ends in {''.join(suffixes[-2:]) or 'nothing'!r}, expected .jsonl, .jsonl.gz, .txt or .csv."
        )
    text, passages, lines = _decode(path, packed), [], {}
    for line, found in reader(text):
        if len(passages) == MAX_PASSAGES:
            raise ValueError(
                f"Line {line}: the corpus holds more than {MAX_PASSAGES:,} passages, which is the most for this demo."
            )
        passage = {
            "id": found.get("id") or f"line {line}",
            "title": found.get("title") or "",
            "text": found.get("text"),
        }
        for name, value in passage.items():
            if not isinstance(value, str) or (name == "text" and not value.strip()):
                raise ValueError(
                    f"Line {line}: {name} is {_shorten(value)}, expected a string{' that is not empty' if name == 'text' else ''}."
                )
            if len(value) > MAX_TEXT:
                raise ValueError(f"Line {line}: {name} has {len(value):,} characters, expected {MAX_TEXT:,} at most.")
            if any("\ud800" <= character <= "\udfff" for character in value):
                raise ValueError(f"Line {line}: {name} holds half a surrogate pair, which is no character.")
        if passage["id"] in lines:
            raise ValueError(
                f"Line {line}: id {_shorten(passage['id'])} already stands in line {lines[passage['id']]}; ids must be unique."
            )
        lines[passage["id"]] = line
        passages.append(passage)
    if not passages:
        raise ValueError("The file holds no passage.")
    return passages


def _decode(path, packed):
    try:
        with (gzip.open if packed else open)(path, "rb") as file:
            data = file.read(MAX_BYTES + 1)
    except (EOFError, gzip.BadGzipFile, zlib.error):
        raise ValueError("The file is no whole .gz file.") from None
    if len(data) > MAX_BYTES:
        raise ValueError(
            f"The file holds more than {MAX_BYTES // 2**20} MB{' when it is unpacked' if packed else ''}, which is the most for this demo."
        )
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise ValueError(
            f"Line {line}: the byte 0x{data[error.start]:02x} is no UTF-8; save the file in this encoding."
        ) from None


def _read_jsonl(text):
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"Line {number}: malformed JSON ({error.msg}, column {error.colno}).") from None
        except (ValueError, RecursionError):  # a number of too many digits, too many brackets
            raise ValueError(f"Line {number}: this JSON cannot be read.") from None
        if not isinstance(value, dict):
            raise ValueError(f"Line {number}: found {_shorten(value)}, expected a JSON object with a text.")
        yield number, value


def _read_csv(text):
    rows = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    try:
        if "text" not in (rows.fieldnames or []):
            raise ValueError(
                f"Line 1: found the columns {_shorten(', '.join(rows.fieldnames or []))}, expected one named text."
            )
        for row in rows:
            if None in row or None in row.values():
                raise ValueError(
                    f"Line {rows.line_num}: found {'more' if None in row else 'fewer'} cells than the {len(rows.fieldnames)} columns."
                )
            yield rows.line_num, row
    except csv.Error as error:
        raise ValueError(f"Line {rows.line_num}: malformed CSV ({error}).") from None


def _read_paragraphs(text):
    start, lines = 1, []
    for number, line in enumerate([*text.split("\n"), ""], 1):
        if line.strip():
            start = start if lines else number
            lines.append(line.strip())
        elif lines:
            yield start, {"text": "\n".join(lines)}
            lines = []


def _shorten(value):
    shown = repr(value)
    return shown if len(shown) <= 60 else f"{shown[:60]}…"


# ---------------------------------------------------------------------- what the page shows


class Answer:
    """An answer as it grows: what [`StreamEvent`]s bring, as HTML in which every text is escaped."""

    def __init__(self, question, similarity, note):
        self.question, self.similarity, self.note = question, similarity, note
        self.spans = []  # [text, numbers of the passages that it is grounded on]
        self.passages = {}  # what is the same passage -> [number, passage, scores]

    def add(self, event):
        if event.type == "retrieval":
            numbers = []
            for passage, score in zip(event.retrieval.passages, event.retrieval.scores, strict=True):
                known = self.passages.setdefault(
                    (passage["id"], passage["title"], passage["text"]), [len(self.passages) + 1, passage, []]
                )
                known[2].append(score)
                numbers.append(known[0])
            self.spans.append(["", numbers])
        elif event.type == "grounded_end":
            self.spans.append(["", []])
        else:
            self.spans = self.spans or [["", []]]
            self.spans[-1][0] += event.text

    def html(self, writing=True):
        """The question, the answer with its citations, and next to it the passages."""
        cards = "".join(self._card(*known) for known in self.passages.values())
        empty = "Nothing was retrieved." if not writing else ""
        caret = '<span class="cosup-caret"></span>' if writing else ""
        return (
            f'<div class="cosup"><div class="cosup-question">{html.escape(self.question)}</div><div class="cosup-columns">'
            f'<div><h4>Answer</h4><div class="cosup-answer">{self._text()}{caret}</div></div>'
            f'<div><h4>Passages</h4><div class="cosup-passages">{cards or f"<p>{empty}</p>"}</div></div></div>'
            f'<p class="cosup-note">{html.escape(self.note)}</p></div>'
        )

    def _text(self):
        shown, last = [], ""
        for text, numbers in self.spans:
            if (
                last[-1:].strip() and text[:1].isalnum()
            ):  # spans are tokenized apart, and a space between two may be in neither
                shown.append(" ")
            last = text or last
            bare = text.lstrip()
            shown.append(html.escape(text[: len(text) - len(bare)]))
            if not numbers:
                shown.append(html.escape(bare))
                continue
            cites = "".join(f'<a href="#cosup-passage-{number}">[{number}]</a>' for number in numbers)
            shown.append(
                f'<mark class="cosup-grounded" style="--hue: {_hue(numbers[0])}">{html.escape(bare.rstrip())}<sup>{cites}</sup></mark>'
            )
            shown.append(html.escape(bare[len(bare.rstrip()) :]))
        return "".join(shown)

    def _card(self, number, passage, scores):
        scores = ", ".join(f"{score:.3f}" for score in scores if score is not None)
        title = f"<strong>{html.escape(passage['title'])}</strong>" if passage["title"] else ""
        return (
            f'<article class="cosup-passage" id="cosup-passage-{number}" style="--hue: {_hue(number)}">'
            f'<header><span class="cosup-number">[{number}]</span>{title}<span class="cosup-score">{html.escape(self.similarity)} {scores}</span></header>'
            f"<p>{html.escape(passage['text'])}</p></article>"
        )


def _hue(number):
    return (205 + 137 * (number - 1)) % 360  # colours of neighbours lie far apart


CSS = """
.cosup { line-height: 1.55; overflow-wrap: anywhere; }
.cosup-question { font-size: 1.2em; font-weight: 600; margin-bottom: .8em; white-space: pre-wrap; }
.cosup-columns { display: grid; grid-template-columns: minmax(0, 1fr) minmax(0, 1fr); gap: 1.5em; }
.cosup h4 { margin: 0 0 .4em; font-size: .8em; letter-spacing: .06em; text-transform: uppercase; opacity: .7; }
.cosup-answer { font-size: 1.1em; white-space: pre-wrap; }
.cosup-grounded { background: hsl(var(--hue) 85% 55% / .22); color: inherit; border-radius: 4px; padding: .1em .2em; box-decoration-break: clone; }
.cosup-grounded sup a { color: inherit; font-weight: 600; text-decoration: none; padding-left: .15em; }
.cosup-passage { border: 1px solid var(--border-color-primary); border-left: 4px solid hsl(var(--hue) 70% 50%); border-radius: 6px; }
.cosup-passage { margin-bottom: .7em; padding: .6em .8em; background: var(--background-fill-secondary); }
.cosup-passage:target { background: hsl(var(--hue) 85% 55% / .12); }
.cosup-passage header { display: flex; gap: .5em; align-items: baseline; flex-wrap: wrap; }
.cosup-passage p { margin: .3em 0 0; max-height: 14em; overflow-y: auto; white-space: pre-wrap; }
.cosup-number { font-weight: 600; }
.cosup-score { margin-left: auto; font-size: .8em; opacity: .7; white-space: nowrap; }
.cosup-status { margin: 0; }
.cosup-note, .cosup-status, .cosup-passages > p { font-size: .85em; opacity: .7; }
.cosup-caret { display: inline-block; width: .5em; height: 1em; vertical-align: text-bottom; background: currentColor; opacity: .5; }
@media (max-width: 640px) { .cosup-columns { grid-template-columns: minmax(0, 1fr); } }
"""


# ---------------------------------------------------------------------- the model behind it


class Stop(StoppingCriteria):
    """Ends generation at the next token once `event` is set."""

    def __init__(self, event):
        self.event = event

    def __call__(self, input_ids, scores, **kwargs):
        return torch.full((input_ids.shape[0],), self.event.is_set(), dtype=torch.bool, device=input_ids.device)


class Demo:
    """
    A checkpoint, its index, and what the page does with them. One call at a time uses the model.

    Args:
        args (`argparse.Namespace`): of [`parse`].

    Raises:
        `ValueError`, `OSError`, `ImportError`: for a checkpoint or an index that cannot be loaded.
    """

    def __init__(self, args):
        self.instruction, self.examples = args.instruction, [[question] for question in args.examples]
        config = AutoConfig.from_pretrained(args.model, revision=args.revision, trust_remote_code=True)
        load_emb_seq = args.upload or config.query_from != "gen"  # else generation needs Gen alone
        self.model = AutoModelForCausalLM.from_pretrained(
            args.model, revision=args.revision, trust_remote_code=True, load_emb_seq=load_emb_seq
        )
        self.model = self.model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
        self.name = Path(os.path.abspath(args.model)).name if Path(args.model).exists() else args.model
        options = {} if args.index_revision is None else {"revision": args.index_revision}
        self.index = self.model.load_index(args.index, args.index_uri, **options) if args.index else None
        self.no_upload = (
            None if args.upload else "This demo takes no corpora: it was started without Emb_seq, which embeds them."
        )
        # a checkpoint's own way to render a question, in which a typed [NSP] stays text
        self.encode_prompt = importlib.import_module(
            ".tokenization_cosup", type(self.model).__module__.rpartition(".")[0]
        ).encode_prompt
        self.lock, self.running = threading.Lock(), {}  # session -> what stops its answer

    def ask(self, question, retrieval, top_k, max_new_tokens, min_score, corpus, request: gr.Request):
        """Answer a question, event by event: yields the HTML of the answer, and whether it can be stopped."""
        question, index = question or "", self.index if corpus is None else corpus  # an untouched box holds None
        try:
            settings = self._settings(question, retrieval, top_k, min_score, index)
            prompt = torch.tensor(
                [self.encode_prompt(self.model.tokenizer, question, self.instruction)], device=self.model.device
            )
        except ValueError as error:
            raise _shown(error) from None
        searched = (
            "there is no index"
            if index is None
            else f"searched: {'your corpus' if corpus is not None else 'the index of this demo'}"
        )
        answer = Answer(
            question, self.model.config.similarity, searched if retrieval != OFF else "retrieval is switched off"
        )
        options = {
            "max_new_tokens": int(max_new_tokens),
            "retriever": index,
            "retrieval_config": settings,
            "max_retrievals": MAX_RETRIEVALS,
        }
        stop = self.running[request.session_hash] = threading.Event()
        try:
            yield answer.html(), gr.Button(interactive=True)
            for event in self.stream(prompt, stop, **options):
                answer.add(event)
                yield answer.html(), gr.skip()
            yield answer.html(writing=False), gr.Button(interactive=False)
        except Exception as error:
            yield answer.html(writing=False), gr.Button(interactive=False)
            raise _shown(error) from None
        finally:
            stop.set()
            self.running.pop(request.session_hash, None)

    def _settings(self, question, retrieval, top_k, min_score, index):
        if not question.strip():
            raise ValueError("Write a question first.")
        if len(question) > MAX_QUESTION:
            raise ValueError(f"The question has {len(question):,} characters, expected {MAX_QUESTION:,} at most.")
        if retrieval == FORCED and index is None:
            raise ValueError("There is no index to retrieve from: upload a corpus, or start the demo with one.")
        try:
            min_score = float(min_score) if min_score and min_score.strip() else None  # None: never touched
        except ValueError:
            raise ValueError(f"The least score is {_shorten(min_score)}, expected a number, or nothing.") from None
        chosen = {"force_nsp_first": retrieval == FORCED, "forbid_nsp": retrieval == OFF or index is None}
        return self.model.retrieval_config_class(top_k=int(top_k), min_score=min_score, **chosen)

    def stream(self, prompt, stop, **options):
        """The events of one generate() call; it ends with the loop over them, or at `stop` (`threading.Event`)."""
        streamer = self.model.make_streamer(timeout=600)

        def work():
            try:
                with self.lock:
                    self.model.generate(prompt, streamer=streamer, stopping_criteria=[Stop(stop)], **options)
            except Exception as error:
                streamer.on_error(error)  # generate() has said so itself, what stands around it has not

        thread = threading.Thread(target=work, daemon=True)
        thread.start()
        try:
            yield from streamer
        finally:
            stop.set()
            thread.join()

    def stop(self, request: gr.Request):
        """End the answer of this session, if one is being written."""
        event = self.running.get(request.session_hash)
        if event is not None:
            event.set()

    def take_corpus(self, path):
        """Index an uploaded file: yields its status and, in the end, the index of this session."""
        if path is None:
            raise gr.Error("Choose a file first.", print_exception=False)
        try:
            passages, index = read_upload(path), None
            for start in range(0, len(passages), INDEXED_AT_ONCE):
                yield _status(f"Indexing passage {start + 1:,} of {len(passages):,} …"), gr.skip(), gr.skip()
                part = passages[start : start + INDEXED_AT_ONCE]
                with self.lock:
                    if index is None:
                        index = self.model.build_index(part, show_progress_bar=False)
                    else:
                        index.add(part, self.model, show_progress_bar=False)
        except Exception as error:
            error = _shown(error)
            yield _status(f"Not indexed. {error.reason}"), gr.skip(), gr.skip()
            raise error from None
        yield (
            _status(f"Your corpus of {len(passages):,} passages is searched now, by you alone."),
            index,
            gr.Button(interactive=True),
        )

    def default_status(self):
        """What is searched without a corpus of one's own."""
        return _status(
            "There is no index: answers come from Gen alone."
            if self.index is None
            else f"An index of {len(self.index):,} passages is searched."
        )

    def drop_corpus(self):
        """Back to the index of the demo."""
        return self.default_status(), None, gr.Button(interactive=False)

    # ------------------------------------------------------------------ the page

    def page(self):
        """`gr.Blocks`."""
        with gr.Blocks(title=f"CoSup: {self.name}", analytics_enabled=False, delete_cache=(600, 600)) as page:
            corpus = gr.State()
            gr.HTML(
                f"<h2>{html.escape(self.name)}</h2><p>A language model that retrieves while it writes. Text in colour is grounded on the passage [n].</p>"
            )
            with gr.Row():
                with gr.Column(scale=7):
                    question = gr.Textbox(
                        label="Question",
                        lines=1,
                        max_lines=6,
                        max_length=MAX_QUESTION,
                        elem_id="question",
                        autofocus=True,
                    )
                    with gr.Row():
                        ask = gr.Button("Ask", variant="primary", elem_id="ask", min_width=120)
                        stop = gr.Button("Stop", interactive=False, elem_id="stop", min_width=120)
                    if self.examples:
                        gr.Examples(self.examples, question, label="Examples", api_visibility="private")
                    answer = gr.HTML(elem_id="answer")
                with gr.Column(scale=3, min_width=300):
                    choices = self._choices()
                    self._corpus(corpus)
            private = {"api_visibility": "private", "show_progress": "hidden"}
            inputs = [question, *choices, corpus]
            asked = gr.on(
                [ask.click, question.submit],
                self.ask,
                inputs,
                [answer, stop],
                concurrency_id="model",
                concurrency_limit=1,
                **private,
            )
            asked.then(lambda: gr.Button(interactive=False), None, stop, queue=False, **private)  # after an error too
            stop.click(self.stop, None, None, queue=False, **private)
            page.unload(self.stop)
        return page.queue(max_size=20, api_open=False)

    def _choices(self):
        retrieval = gr.Radio([AUTOMATIC, FORCED, OFF], value=AUTOMATIC, label="Retrieval", elem_id="retrieval")
        with gr.Accordion("More settings", open=False):
            top_k = gr.Slider(1, 5, 1, step=1, label="Passages for each [NSP]")
            max_new_tokens = gr.Slider(8, 512, 128, step=8, label="Most tokens to write")
            min_score = gr.Textbox(
                label="Least score of a passage",
                info="Below it, nothing is retrieved. Empty: any score will do.",
                elem_id="min-score",
            )
        return retrieval, top_k, max_new_tokens, min_score

    def _corpus(self, corpus):
        status = gr.HTML(self.default_status(), elem_id="status", padding=False)
        with gr.Accordion("Your own corpus", open=False):
            if self.no_upload:
                gr.HTML(f"<p>{html.escape(self.no_upload)}</p>")
                return
            limits = f"Up to {MAX_PASSAGES:,} passages in {MAX_BYTES // 2**20} MB, searched by you alone, and gone an hour after you left."
            gr.HTML(
                f"<p>JSON Lines (text, perhaps title and id), CSV (the same as columns) or text (a passage a paragraph). {limits}</p>"
            )
            file = gr.File(file_types=FORMATS, label="Corpus", elem_id="corpus", height=140)
            with gr.Row():
                index, back = (
                    gr.Button("Index it", elem_id="index"),
                    gr.Button("Back to the demo's index", interactive=False, elem_id="back"),
                )
        private = {"api_visibility": "private", "show_progress": "hidden"}
        index.click(
            self.take_corpus, file, [status, corpus, back], concurrency_id="model", concurrency_limit=1, **private
        )
        back.click(self.drop_corpus, None, [status, corpus, back], queue=False, **private)


def _status(text):
    return f'<p class="cosup-status">{html.escape(text)}</p>'


def _shown(error):
    """What a user gets to see of an error, `gr.Error`: its reason, no path and no traceback; the log has both where nobody expected it."""
    if isinstance(error, gr.Error):
        return error
    if isinstance(error, (ValueError, RuntimeError)):
        reason = re.sub(r"(?<![\w/])/[\w.@+-]+(/[\w.@+-]+)+", "…", str(error))
    else:
        reason = f"The demo failed ({type(error).__name__})."
    if not isinstance(error, ValueError):
        logging.getLogger(__name__).error("%s", reason, exc_info=error)
    shown = gr.Error(html.escape(reason), print_exception=False)
    shown.reason = reason
    return shown


def parse(argv=None):
    """Options from the command line, else from the environment."""
    variables = os.environ.get
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=variables("COSUP_MODEL"), help="name or path of a CoSup checkpoint")
    index_help = "name or path of its index, or with --index_uri of a Milvus collection; without it nothing is retrieved before an upload"
    parser.add_argument("--index", default=variables("COSUP_INDEX"), help=index_help)
    uri_help = "of the Milvus server or local file (.db) that holds the index; needs the package cosup[milvus]; MILVUS_TOKEN may hold a token"
    parser.add_argument("--index_uri", default=variables("COSUP_INDEX_URI"), help=uri_help)
    parser.add_argument(
        "--revision", default=variables("COSUP_REVISION"), help="of the checkpoint: branch, tag or commit"
    )
    parser.add_argument("--index_revision", default=variables("COSUP_INDEX_REVISION"), help="of the index")
    parser.add_argument(
        "--instruction", default=variables("COSUP_INSTRUCTION", ""), help="the task's instruction, as in training"
    )
    examples = [question.strip() for question in variables("COSUP_EXAMPLES", "").split("|") if question.strip()]
    parser.add_argument("--examples", nargs="*", default=examples, help="questions to choose from")
    upload = variables("COSUP_UPLOAD", "1") != "0"
    parser.add_argument(
        "--upload",
        action=argparse.BooleanOptionalAction,
        default=upload,
        help="corpora of users; --no-upload does without Emb_seq",
    )
    args = parser.parse_args(argv)
    if not args.model:
        parser.error("no model: give --model, or set COSUP_MODEL.")
    if args.index_uri and not args.index:
        parser.error(
            "a server without an index: give --index, or set COSUP_INDEX, to the name of the Milvus collection."
        )
    return args


def main():
    page = Demo(parse()).page()
    fonts = {"font": ["system-ui", "sans-serif"], "font_mono": ["ui-monospace", "monospace"]}  # none to fetch
    options = {
        "css": CSS,
        "theme": gr.themes.Default(**fonts),
        "footer_links": [],
        "ssr_mode": False,
        "state_session_capacity": 64,
    }
    page.launch(max_file_size=MAX_BYTES, **options)


if __name__ == "__main__":
    main()
