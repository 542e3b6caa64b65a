"""Token ids of prompts, from messages, texts or ids; text that looks like a control token stays text."""

from collections.abc import Sequence

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from modeling_cosup.tokenization_cosup import bos_and_eos, encode_chat, encode_texts

from serving.errors import ApiError
from serving.protocol import Message


def chat_ids(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> list[int]:
    """
    Return the token ids of a chat, through the chat template, ready for the answer.

    A template that refuses a system message gets it at the beginning of the first user message.

    Raises:
        [`ApiError`]: for messages that the template refuses, e.g. two user messages in a row, or that cannot be text.
    """
    chat = []
    for message in messages:
        role = "system" if message.role == "developer" else message.role
        chat.append({"role": role, "content": message.content})
    try:
        try:
            return encode_chat(tokenizer, chat)
        except TemplateError:
            if chat[0]["role"] != "system" or len(chat) == 1 or chat[1]["role"] != "user":
                raise
            joined = f"{chat[0]['content']}\n\n{chat[1]['content']}"
            return encode_chat(tokenizer, [{"role": "user", "content": joined}, *chat[2:]])
    except TemplateError as error:
        raise ApiError(400, f"messages: the chat template refuses them: {error}.", "messages") from error
    except ValueError as error:
        raise ApiError(400, f"messages: {error}", "messages") from error


def text_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """
    Return the token ids of a text to continue, after BOS if the tokenizer puts one before every text.

    Raises:
        [`ApiError`]: for a text that holds a special token which this tokenizer cannot read as text.
    """
    try:
        ids = encode_texts(tokenizer, [text], ["prompt"])[0]
    except ValueError as error:
        raise ApiError(400, f"prompt: {error}", "prompt") from error
    bos, _ = bos_and_eos(tokenizer)
    if bos and tokenizer("a")["input_ids"][:1] == bos:
        return bos + ids
    return ids


def checked_ids(ids: list[int], vocab_size: int) -> list[int]:
    """Return token ids of a client; [`ApiError`] if one is not in the vocabulary."""
    largest = max(ids, default=0)
    if largest >= vocab_size:
        raise ApiError(400, f"prompt: {largest} is no token id, expected at most {vocab_size - 1}.", "prompt")
    return ids
