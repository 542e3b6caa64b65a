"""How tokens stand in the log-probabilities of an answer."""

import re
from functools import lru_cache
from typing import Any, cast

from transformers import PreTrainedTokenizerBase

from modeling_cosup.tokenization_cosup import special_ids

from serving.answers import AnswerToken

# how byte-level vocabularies write bytes: printable ones as they are, the others from U+0100 on
_PRINTABLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
_OTHERS = [byte for byte in range(256) if byte not in _PRINTABLE]
BYTES = {chr(byte): byte for byte in _PRINTABLE} | {chr(256 + i): byte for i, byte in enumerate(_OTHERS)}

LOWEST_LOGPROB = -9999.0  # OpenAI's, for a probability of 0; JSON has no infinity


class TokenNames:
    """
    Texts and bytes of single tokens.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): Gen's.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self._special_ids = special_ids(tokenizer)
        # SentencePiece takes the space from the first token of a text: a token is decoded after another one
        self._first: list[int] = tokenizer("a", add_special_tokens=False)["input_ids"][-1:]
        self._first_text = self._decode(self._first)
        self.name = lru_cache(maxsize=65536)(self._name)

    def _decode(self, ids: list[int]) -> str:
        return cast(str, self.tokenizer.decode(ids))

    def _text(self, id: int) -> str:
        """Return the text of a token, with its space."""
        text = self._decode([*self._first, id])
        if id in self._special_ids or not text.startswith(self._first_text):
            return self._decode([id])
        return text.removeprefix(self._first_text)

    def _name(self, id: int) -> tuple[str, list[int] | None]:
        """Return the text of a token, and its bytes; `None` for part of a character whose bytes are not known."""
        text = self._text(id)
        if "\ufffd" not in text:
            return text, list(text.encode())
        token = cast(str, self.tokenizer.convert_ids_to_tokens(id))
        if re.fullmatch("<0x[0-9A-F]{2}>", token):  # of SentencePiece
            token_bytes = bytes([int(token[3:5], 16)])
        elif all(character in BYTES for character in token):  # of a byte-level vocabulary
            token_bytes = bytes(BYTES[character] for character in token)
        else:
            return f"token:{id}", None
        escaped = "".join(f"\\x{byte:02x}" for byte in token_bytes)
        return f"bytes:{escaped}", list(token_bytes)

    def chat_logprobs(self, tokens: list[AnswerToken]) -> dict[str, Any]:
        """Return the `logprobs` of a chat's choice: an entry for each token of the text."""
        return {"content": [self._chat_entry(token) for token in tokens], "refusal": None}

    def _chat_entry(self, token: AnswerToken) -> dict[str, Any]:
        logprobs = token.event.logprobs
        assert logprobs is not None  # they were asked for
        entry = self._token_entry(token.event.token_id, logprobs.logprob)
        entry["top_logprobs"] = [self._token_entry(id, logprob) for id, logprob in logprobs.top]
        return entry

    def _token_entry(self, id: int, logprob: float) -> dict[str, Any]:
        text, token_bytes = self.name(id)
        return {"token": text, "bytes": token_bytes, "logprob": max(logprob, LOWEST_LOGPROB)}

    def completion_logprobs(self, tokens: list[AnswerToken]) -> dict[str, Any]:
        """Return the `logprobs` of a completion's choice: a list of each kind, with an entry for each token."""
        result: dict[str, Any] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        for token in tokens:
            logprobs = token.event.logprobs
            assert logprobs is not None  # they were asked for
            text, _ = self.name(token.event.token_id)
            logprob = max(logprobs.logprob, LOWEST_LOGPROB)
            top = {self.name(id)[0]: max(value, LOWEST_LOGPROB) for id, value in logprobs.top}
            result["tokens"].append(text)
            result["token_logprobs"].append(logprob)
            result["top_logprobs"].append({**top, text: logprob})
            result["text_offset"].append(token.offset)
        return result
