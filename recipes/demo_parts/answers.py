"""An answer as HTML: its text with marked, cited parts, and the passages next to it. Every text is escaped."""

import html
import re
from dataclasses import dataclass
from typing import Any

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
# the same rule as in recipes/serving/answers.py, which a Space does not have: a test compares them
OPENING = "([{«“‘¿¡"  # no space comes after these
CLOSING = ")]}»”’'.,;:!?%…、。，．！？；："  # nor before these
# nor between two of these scripts, which have no spaces: Thai, Lao, Burmese, Khmer, Chinese and Japanese, wide signs
WITHOUT_SPACES = re.compile(
    "[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u2e80-\u30ff\u31f0-\u9fff\uf900-\ufaff\uff00-\uff60\U00020000-\U0003ffff]"
)


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
        """Add text; where a free and a grounded one would run together, add a space."""
        if not text:
            return
        if self._between_spans and run_together(self.text, text):
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


def run_together(before: str, after: str) -> bool:
    """Return whether two texts need a space between."""
    if not before or before[-1].isspace() or after[0].isspace():
        return False
    if WITHOUT_SPACES.match(before[-1]) and WITHOUT_SPACES.match(after[0]):
        return False
    return before[-1] not in OPENING and after[0] not in CLOSING


def _hue(number):
    return (205 + 137 * (number - 1)) % 360  # consecutive numbers get very different colours
