"""The bodies of responses: answers of chats and completions, whole and in chunks of a stream."""

import time
import uuid
from collections import Counter
from collections.abc import Sequence
from typing import Any

from serving.answers import AnswerWriter, Citation, Piece
from serving.token_names import TokenNames


def annotations(citations: Sequence[Citation]) -> list[dict[str, Any]]:
    """Return citations as OpenAI's `annotations`: one for each passage on which a text is grounded."""
    result = []
    for citation in citations:
        if citation.start == citation.end:
            continue
        for passage in citation.retrieval.passages:
            entry = {
                "start_index": citation.start,
                "end_index": citation.end,
                "title": passage["title"],
                "url": passage_url(passage),
            }
            result.append({"type": "url_citation", "url_citation": entry})
    return result


def passage_url(passage: dict[str, Any]) -> str:
    """Return where a passage comes from: its URL, its source with the page, or its id."""
    metadata = passage.get("metadata") or {}
    if metadata.get("url"):
        return str(metadata["url"])
    source = metadata.get("source")
    if not source:
        return passage["id"] or ""
    if metadata.get("page") is not None:
        return f"{source}#page={metadata['page']}"
    return str(source)


def retrievals(citations: Sequence[Citation]) -> list[dict[str, Any]]:
    """Return the passages and scores of each retrieval, and the place of the text that is grounded on them."""
    result = []
    for citation in citations:
        entry = {
            "start_index": citation.start,
            "end_index": citation.end,
            "passages": citation.retrieval.passages,
            "scores": citation.retrieval.scores,
        }
        result.append(entry)
    return result


def usage(prompt_tokens: int, writers: Sequence[AnswerWriter]) -> dict[str, Any]:
    """Return the tokens of prompts and answers; passages are counted apart, as `passage_tokens`."""
    completion_tokens = sum(writer.num_generated_tokens for writer in writers)
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
        "passage_tokens": sum(writer.num_passage_tokens for writer in writers),
    }


class ChatShape:
    """
    What the answers of a chat look like.

    Args:
        model (`str`): the name under which it is served.
        names ([`TokenNames`], *optional*): names the tokens, if log-probabilities were asked for.
    """

    def __init__(self, model: str, names: TokenNames | None) -> None:
        self.names = names
        self.head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}
        self.num_streamed: Counter[tuple[int, str]] = Counter()  # annotations and retrievals of each answer

    def response(self, choices: list[dict[str, Any]], usage: dict[str, Any]) -> dict[str, Any]:
        """Return the whole response."""
        return {**self.head, "object": "chat.completion", "choices": choices, "usage": usage}

    def choice(self, index: int, answer: Piece) -> dict[str, Any]:
        """Return one answer of the whole response."""
        message = {"role": "assistant", "content": answer.text, "refusal": None, **_cited(answer)}
        return {"index": index, "message": message, **self._rest(answer)}

    def chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        """Return a chunk of a stream."""
        return {**self.head, "object": "chat.completion.chunk", "choices": choices}

    def begin(self, index: int) -> list[dict[str, Any]]:
        """Return what a streamed answer begins with."""
        delta = {"role": "assistant", "content": ""}
        return [{"index": index, "delta": delta, "logprobs": None, "finish_reason": None}]

    def piece(self, index: int, piece: Piece) -> dict[str, Any]:
        """Return a piece of a streamed answer."""
        delta: dict[str, Any] = {}
        if piece.text:
            delta["content"] = piece.text
        if piece.citations:
            for field, entries in _cited(piece).items():
                first = self.num_streamed[index, field]
                # as streamed tool calls have: without an index, the official client refuses to join lists
                delta[field] = [{"index": number, **entry} for number, entry in enumerate(entries, first)]
                self.num_streamed[index, field] += len(entries)
        return {"index": index, "delta": delta, **self._rest(piece)}

    def _rest(self, piece: Piece) -> dict[str, Any]:
        logprobs = None
        if self.names is not None:
            logprobs = self.names.chat_logprobs(piece.tokens)
        return {"logprobs": logprobs, "finish_reason": piece.finish_reason}


class CompletionShape:
    """What completions look like; arguments and methods as in [`ChatShape`]."""

    def __init__(self, model: str, names: TokenNames | None) -> None:
        self.names = names
        self.head = {
            "id": f"cmpl-{uuid.uuid4().hex}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": model,
        }

    def response(self, choices: list[dict[str, Any]], usage: dict[str, Any]) -> dict[str, Any]:
        """Return the whole response."""
        return {**self.head, "choices": choices, "usage": usage}

    def choice(self, index: int, answer: Piece) -> dict[str, Any]:
        """Return one answer of the whole response, which is also a piece of a streamed one."""
        logprobs = None
        if self.names is not None:
            logprobs = self.names.completion_logprobs(answer.tokens)
        choice = {"index": index, "text": answer.text, "logprobs": logprobs, "finish_reason": answer.finish_reason}
        return {**choice, "retrievals": retrievals(answer.citations)}

    def chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        """Return a chunk of a stream."""
        return {**self.head, "choices": choices}

    def begin(self, index: int) -> list[dict[str, Any]]:
        """Return what a streamed answer begins with: nothing."""
        return []

    piece = choice


def _cited(piece: Piece) -> dict[str, Any]:
    return {"annotations": annotations(piece.citations), "retrievals": retrievals(piece.citations)}
