"""Splitting of documents into passages of at most a number of tokens, as Emb_seq and Gen read them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from shared.document_cache import ID_BYTES
from shared.document_sections import WORD, Document

if TYPE_CHECKING:  # a recipe that only prints its options does not wait for torch
    from transformers import PreTrainedTokenizerBase

    from modeling_cosup import CoSupConfig

TITLE_SEPARATOR = " › "
MIN_LENGTH = 16  # tokens of a passage
TITLE_SHARE = 1 / 3  # of a passage's tokens, at most
SAMPLE_CHARACTERS = 1000  # of a document, to learn how long its tokens are
FILL = 0.95  # of the room for text that a passage aims at, as tokens differ in length


class PassageSplitter:
    """
    Splits documents at headings, then by `semantic_text_splitter` at paragraphs, sentences and words.

    Its splitters count tokens only about a hundred times slower than characters, so texts are split by characters, and
    the tokens of each passage are counted once: a passage that is too long is split again.

    Args:
        config ([`CoSupConfig`]): `passage_template`, `passage_prompt`.
        tokenizers (`list[PreTrainedTokenizerBase]`): Emb_seq's, and Gen's if it differs: a passage must fit for both.
        passage_length (`int`): most tokens of a passage with its title, without BOS and EOS.
        overlap (`int`): about how many tokens two neighbouring passages of a section share.
        titles (`str`): `"both"` for `document title › heading`, or `"document"` or `"heading"` for one of them alone.

    Raises:
        `ValueError`: for a length that the model would cut, or an overlap of more than half of it.
    """

    def __init__(
        self,
        config: CoSupConfig,
        tokenizers: list[PreTrainedTokenizerBase],
        passage_length: int,
        overlap: int = 0,
        titles: str = "both",
    ) -> None:
        if not MIN_LENGTH <= passage_length <= config.max_passage_length:
            raise ValueError(
                f"passage_length is {passage_length}, expected {MIN_LENGTH} to {config.max_passage_length}, the"
                " model's max_passage_length."
            )
        if not 0 <= overlap <= passage_length // 2:
            raise ValueError(f"overlap is {overlap}, expected 0 to {passage_length // 2}, half of passage_length.")
        self.template, self.prompt = config.passage_template, config.passage_prompt
        self.tokenizers = tokenizers
        self.passage_length, self.overlap, self.titles = passage_length, overlap, titles

    @classmethod
    def from_pretrained(
        cls, model: str, passage_length: int | None = None, overlap: int = 0, titles: str = "both"
    ) -> PassageSplitter:
        """Load the config and tokenizers of a CoSup checkpoint, but no weights."""
        from transformers import AutoTokenizer

        from modeling_cosup import CoSupConfig
        from modeling_cosup.hub_cosup import EMB_SEQ_TOKENIZER_FOLDER

        config = CoSupConfig.from_pretrained(model)
        tokenizers = [AutoTokenizer.from_pretrained(model, config=config)]
        stored = config.fingerprint or {}
        if stored.get("emb_seq_tokenizer") != stored.get("tokenizer"):
            options = {"subfolder": EMB_SEQ_TOKENIZER_FOLDER, "config": config}
            tokenizers.insert(0, AutoTokenizer.from_pretrained(model, **options))
        if passage_length is None:
            passage_length = config.max_passage_length
        return cls(config, tokenizers, passage_length, overlap, titles)

    def settings(self) -> dict[str, Any]:
        """Return what the passages of a document depend on, as JSON values."""
        from modeling_cosup.tokenization_cosup import tokenizer_fingerprint

        return {
            "passage_length": self.passage_length,
            "overlap": self.overlap,
            "titles": self.titles,
            "passage_template": self.template,
            "passage_prompt": self.prompt,
            "tokenizers": [tokenizer_fingerprint(tokenizer) for tokenizer in self.tokenizers],
        }

    # ------------------------------------------------------------------ passages

    def passages(self, document: Document) -> Iterator[tuple[dict[str, Any], int]]:
        """
        Yield the passages of a document, `{"id", "title", "text", "metadata"}`, and their numbers of tokens.

        `metadata` has the document's, `start` and `end` of the text in the converted document, and `page` of a PDF. A
        text without any letter or digit, such as a line of dashes, is no passage.

        Raises:
            `ValueError`: if a text cannot be encoded.
        """
        title_of = lru_cache(maxsize=64)(lambda headings: self._title(document.title, headings))
        token_size = 0.0  # characters of a token
        covered = 0  # end of the last passage
        for section in document.sections:
            if not WORD.search(section.text):
                continue
            if not token_size:
                sample = section.text.strip()[:SAMPLE_CHARACTERS]
                token_size = len(sample) / max(1, self.lengths("", [sample])[0])
            title, title_length = title_of(section.headings)
            room = (self.passage_length - title_length) * token_size * FILL
            overlap = int(self.overlap * token_size)
            for start, text, length in self._split(section.text, title, int(room), overlap, document.is_markdown):
                start += section.start
                end = start + len(text)
                if end <= covered:  # the overlap of a passage that was too long, and was split again
                    continue
                covered = end
                place: dict[str, Any] = {"start": start, "end": end}
                if section.page is not None:
                    place = {"page": section.page, **place}
                id = hashlib.blake2b(f"{document.id}\0{start}\0{end}".encode(), digest_size=ID_BYTES).hexdigest()
                yield {"id": id, "title": title, "text": text, "metadata": {**document.metadata, **place}}, length

    def lengths(self, title: str, texts: list[str]) -> list[int]:
        """Return how many tokens passages have, without BOS and EOS: for Emb_seq or for Gen, which has more."""
        from modeling_cosup.tokenization_cosup import encode_texts, render_passage

        rendered = [render_passage({"title": title, "text": text}, self.template) for text in texts]
        lengths = map(len, encode_texts(self.tokenizers[0], [self.prompt + text for text in rendered]))
        if len(self.tokenizers) == 1:
            return list(lengths)
        lengths_for_gen = map(len, encode_texts(self.tokenizers[1], rendered))
        return list(map(max, lengths, lengths_for_gen))

    def _title(self, document_title: str, headings: tuple[str, ...]) -> tuple[str, int]:
        """Return the title below these headings, shortened if it is too long, and its number of tokens."""
        candidates = [document_title, *headings]
        if self.titles != "both":
            candidates = candidates[:1] if self.titles == "document" else candidates[-1:]
        parts: list[str] = []
        for part in candidates:
            part = " ".join(part.split())[:300]
            if part and part not in parts:
                parts.append(part)
        while parts:
            title = TITLE_SEPARATOR.join(parts)
            length = self.lengths(title, ["x"])[0] - 1
            if length <= self.passage_length * TITLE_SHARE:
                return title, length
            if len(parts) > 1:
                del parts[1 if len(parts) > 2 else 0]
            else:
                parts[0] = parts[0][: len(parts[0]) // 2].rpartition(" ")[0]
                parts = [part for part in parts if part]
        return "", self.lengths("", ["x"])[0] - 1

    def _split(
        self, text: str, title: str, capacity: int, overlap: int, is_markdown: bool
    ) -> Iterator[tuple[int, str, int]]:
        """Yield `(start, text, number of tokens)` of chunks that fit, from chunks of at most `capacity` characters."""
        capacity = max(1, capacity)
        chunks = [(start, chunk) for start, chunk in split_text(text, capacity, overlap, is_markdown) if chunk.strip()]
        lengths = self.lengths(title, [chunk for _, chunk in chunks])
        for (start, chunk), length in zip(chunks, lengths, strict=True):
            if not WORD.search(chunk):
                continue
            if length <= self.passage_length or capacity == 1:
                yield start, chunk, length
                continue
            smaller = min(capacity - 1, int(len(chunk) * FILL * self.passage_length / length))
            for inner_start, inner, inner_length in self._split(chunk, title, smaller, overlap, is_markdown):
                yield start + inner_start, inner, inner_length


def split_text(text: str, capacity: int, overlap: int, is_markdown: bool) -> list[tuple[int, str]]:
    """Return `(start, chunk)` of chunks of at most `capacity` characters, without white space at their ends."""
    from semantic_text_splitter import MarkdownSplitter, TextSplitter

    overlap = min(overlap, capacity // 2)
    if is_markdown:
        chunks = MarkdownSplitter(capacity, overlap).chunk_indices(text)
        if not any(_cuts_a_word(text, start, chunk) for start, chunk in chunks):
            return chunks
    return TextSplitter(capacity, overlap).chunk_indices(text)  # Markdown's emphasis may begin within a word


def _cuts_a_word(text: str, start: int, chunk: str) -> bool:
    return start > 0 and text[start - 1].isalnum() and chunk[:1].isalnum()
