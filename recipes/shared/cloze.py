"""
Queries from a passage itself, for training without questions: its title, one of its sentences, a sentence with a gap.

Each kind is a function from a [`Source`] to an instance, or to the reason why the passage gives none.
"""

import random
import re
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from modeling_cosup.passages_cosup import hash_id
from trainer.data import content_id
from trainer.judging.grounding import split_sentences

from shared.passage_splitting import TITLE_SEPARATOR

GAP = "___"
HEADING = re.compile(r"#{1,6}\s+(.+?)[\s#]*")  # a line of Markdown
ITEM = re.compile(r"\s*(?:[-*+•]|\d+[.)])\s+")  # before the text of a list item
WORD = re.compile(r"\w(?:[\w'’-]*\w)?")
MIN_CHARACTERS = 20  # of a sentence that is a query or is written
MAX_CHARACTERS = 500
MIN_WORDS = 5  # of a sentence that gets a gap: words with spaces between them
MAX_GAP = 4  # words in a gap
TITLE_WORDS = 4  # of the text, after a title that other passages have too
KEEP_SHARE = 0.1  # of the sentences that are queries and stay in their passages, as in arXiv 1906.00300


@dataclass
class Source:
    """
    A passage and what is known about it.

    Args:
        passage (`dict`): `{"id", "title", "text"}`.
        shared_title (`bool`): whether another passage has the same title.
        repeated_sentences (collection of `int`): hashes of the sentences that stand in several passages.
        seed (`int`): the same passage and seed give the same queries, whatever else is in the corpus.
    """

    passage: dict[str, str]
    shared_title: bool
    repeated_sentences: Collection[int]
    seed: int
    spans: list[tuple[int, int]] = field(init=False)  # of its sentences

    def __post_init__(self) -> None:
        self.spans = sentence_spans(self.passage["text"])

    def random(self, kind: str) -> random.Random:
        """Return a generator for one kind of query."""
        return random.Random(f"{self.seed} {kind} {self.passage['id']}")

    def sentence(self, number: int) -> str:
        """Return a sentence, with single spaces."""
        start, end = self.spans[number]
        return squeezed(self.passage["text"][start:end])

    def queries(self, min_words: int = 0) -> list[int]:
        """Return the numbers of the sentences that can be queries: those that stand in no other passage."""
        numbers = []
        for number in range(len(self.spans)):
            sentence = self.sentence(number)
            is_repeated = hash_id(sentence) in self.repeated_sentences
            if not is_repeated and len(WORD.findall(sentence)) >= min_words:
                numbers.append(number)
        return numbers


@dataclass
class Cloze:
    """
    A query and what it asks for.

    Args:
        query (`str`): the input.
        text (`str`): a sentence of the passage, to be written after it.
        passage (`dict`): the passage to be found; without an id if it is not the one of the corpus.
    """

    query: str
    text: str
    passage: dict[str, str]


def squeezed(text: str) -> str:
    """Return a text with single spaces in place of all white space."""
    return " ".join(text.split())


def paragraph_spans(text: str) -> Iterator[tuple[int, int]]:
    """Yield start and end of paragraphs and of list items, without headings. A sentence may go over line breaks."""
    begin: int | None = None
    position = 0
    for line in text.splitlines(keepends=True):
        is_gap = not line.strip() or HEADING.fullmatch(line.strip()) is not None
        item = ITEM.match(line)
        if begin is not None and (is_gap or item):
            yield begin, position
            begin = None
        if begin is None and not is_gap:
            begin = position + (item.end() if item else 0)
        position += len(line)
    if begin is not None:
        yield begin, position


def sentence_spans(text: str) -> list[tuple[int, int]]:
    """Return start and end of the sentences that can be queries: not too short or long, and no headings."""
    spans = []
    for start, paragraph_end in paragraph_spans(text):
        for sentence in split_sentences(text[start:paragraph_end]):
            start = text.index(sentence, start)
            end = start + len(sentence)
            if MIN_CHARACTERS <= len(sentence) <= MAX_CHARACTERS:
                spans.append((start, end))
            start = end
    return spans


def sentence_hashes(passage: dict[str, str]) -> list[int]:
    """Return a hash of each distinct sentence of a passage."""
    text = passage["text"]
    return list({hash_id(squeezed(text[start:end])) for start, end in sentence_spans(text)})


def some_words(text: str, length: int, generator: random.Random) -> str:
    """Return consecutive words of a text, without punctuation around them."""
    words = text.split()
    start = generator.randrange(max(1, len(words) - length))
    return re.sub(r"[^\w\s'-]", "", " ".join(words[start : start + length]))


# ---------------------------------------------------------------------- the kinds of queries


def title_query(source: Source) -> Cloze | str:
    """Ask by title and headings; if other passages have the same title, by some words of the text as well."""
    title, text = source.passage["title"], source.passage["text"]
    if not title.strip():
        return "no title"
    if not source.spans:
        return "no sentence to write"
    parts = title.split(TITLE_SEPARATOR)
    headings = [heading[1] for line in text.splitlines() if (heading := HEADING.fullmatch(line.strip()))]
    if headings and headings[0] not in parts:
        parts.append(headings[0])
    if source.shared_title:
        parts.append(some_words(text, TITLE_WORDS, source.random("title")))
    return Cloze(squeezed(" ".join(parts)), source.sentence(0), source.passage)


def sentence_query(source: Source) -> Cloze | str:
    """Ask by a sentence, which mostly is taken out of the passage; the next one is written."""
    if len(source.spans) < 2:
        return "fewer than two sentences"
    numbers = source.queries()
    if not numbers:
        return "all sentences stand in other passages too"
    generator = source.random("sentence")
    number = generator.choice(numbers)
    is_last = number == len(source.spans) - 1
    written = number - 1 if is_last else number + 1
    passage = source.passage
    if generator.random() >= KEEP_SHARE:
        passage = {"title": passage["title"], "text": without(passage["text"], *source.spans[number])}
    return Cloze(source.sentence(number), source.sentence(written), passage)


def without(text: str, start: int, end: int) -> str:
    """Return a text without the characters from `start` to `end`, and with one space or line break in their place."""
    before, after = text[:start].rstrip(), text[end:].lstrip()
    if not before or not after:
        return before or after
    gap = text[len(before) : start] + text[end : len(text) - len(after)]
    return before + ("\n" if "\n" in gap else " ") + after


def span_query(source: Source) -> Cloze | str:
    """Ask by a sentence with a gap; the whole sentence is written."""
    if len(source.spans) < 2:
        return "fewer than two sentences"
    numbers = source.queries(MIN_WORDS)
    if not numbers:
        return "no sentence of its own that is long enough for a gap"
    generator = source.random("span")
    sentence = source.sentence(generator.choice(numbers))
    start, end = choose_span(sentence, generator)
    return Cloze(f"{sentence[:start]}{GAP}{sentence[end:]}", sentence, source.passage)


def choose_span(sentence: str, generator: random.Random) -> tuple[int, int]:
    """Return start and end of the gap in a sentence: a name or a number, or any words if there is neither."""
    words = list(WORD.finditer(sentence))
    runs: list[list[re.Match[str]]] = []
    for before, word in zip(words, words[1:], strict=False):  # the first word has a capital letter anyway
        if not (word[0][0].isupper() or word[0][0].isdigit()):
            continue
        is_next = bool(runs) and runs[-1][-1] is before and sentence[before.end() : word.start()].isspace()
        if is_next and len(runs[-1]) < MAX_GAP:
            runs[-1].append(word)
        else:
            runs.append([word])
    if runs:
        run = generator.choice(runs)
    else:
        length = generator.randint(1, min(MAX_GAP, len(words) - MIN_WORDS + 2))
        first = generator.randrange(len(words) - length + 1)
        run = words[first : first + length]
    return run[0].start(), run[-1].end()


KINDS: dict[str, Callable[[Source], Cloze | str]] = {
    "title": title_query,
    "sentence": sentence_query,
    "span": span_query,
}


# ---------------------------------------------------------------------- instances


def instances_of(source: Source, kinds: Iterable[str], instruction: str) -> Iterator[tuple[str, dict[str, Any] | str]]:
    """
    Return the instances of a passage.

    A passage without one of its sentences has another id than the passage itself. Each is among the `positives` of the
    other's queries, so neither counts as a wrong passage if both are in a batch.

    Yields:
        `(str, dict or str)`: each kind, and its instance or the reason why there is none.
    """
    clozes: dict[str, Cloze | str] = {}
    for kind in kinds:
        cloze = KINDS[kind](source)
        if isinstance(cloze, Cloze) and cloze.query == squeezed(cloze.passage["text"]):
            cloze = "the query would be the whole passage"
        clozes[kind] = cloze
    ids = {source.passage["id"]}
    for cloze in clozes.values():
        if isinstance(cloze, Cloze):
            cloze.passage.setdefault("id", content_id(cloze.passage["title"], cloze.passage["text"]))
            ids.add(cloze.passage["id"])
    for kind, cloze in clozes.items():
        if isinstance(cloze, str):
            yield kind, cloze
            continue
        others = sorted(ids - {cloze.passage["id"]})
        segment: dict[str, Any] = {"text": cloze.text, "passage": cloze.passage}
        if others:
            segment["positives"] = others
        instance = {
            "id": f"{kind}-{source.passage['id']}",
            "dataset": f"cloze_{kind}",
            "instruction": instruction,
            "input": cloze.query,
            "segments": [segment],
        }
        yield kind, instance
