"""Chat templates, changed where Gen's tokenizer needs it: plain messages come out of them, and the date is fixed."""

from typing import cast

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

# 26 July 2024, the date that Llama 3 falls back to, by the codes of strftime
_DATE = {
    **{"%Y": "2024", "%y": "24", "%m": "07", "%d": "26", "%-m": "7", "%-d": "26", "%e": "26", "%j": "208"},
    **{"%B": "July", "%b": "Jul", "%A": "Friday", "%a": "Fri", "%H": "00", "%I": "12", "%M": "00", "%S": "00"},
}
_REPLACEMENTS = "".join(f" | replace('{code}', '{value}')" for code, value in _DATE.items())
_FIXED_DATE = "{% macro strftime_now(format) %}{{ format" + _REPLACEMENTS + " }}{% endmacro %}\n"
_CONTENT_PARTS = (
    "{% set in_parts = namespace(messages=[]) %}"
    "{% for message in messages %}"
    "{% if message['content'] is string %}"
    "{% set message = dict(message, content=[{'type': 'text', 'text': message['content']}]) %}"
    "{% endif %}"
    "{% set in_parts.messages = in_parts.messages + [message] %}"
    "{% endfor %}"
    "{% set messages = in_parts.messages %}\n"
)


def settle_chat_template(tokenizer: PreTrainedTokenizerBase) -> None:
    """
    Make a tokenizer's chat template fit for training and generation, in place.

    - A template that prints today's date (`strftime_now`) prints 26 July 2024, so that prompts of training, generation
      and a resumed `generate_many` do not change from day to day. Llama 3 still takes another `date_string`.
    - A template that reads content parts, and so loses a message that is a string, gets each string as one part.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): with a chat template.

    Raises:
        `ValueError`: when the user's message does not come out of the template either way.
    """
    template = tokenizer.get_chat_template()
    settled = template
    if "strftime_now" in template and _FIXED_DATE not in template:
        settled = _FIXED_DATE + template
    candidates = [settled, _CONTENT_PARTS + settled]
    scores = [_what_comes_out(tokenizer, candidate) for candidate in candidates]
    best = max(scores)
    if best[0] == 0:
        raise ValueError(
            f"{type(tokenizer).__name__}: the user's message does not come out of the chat template, neither as a"
            f" string nor as content parts. Give the tokenizer another template; this one begins {template[:200]!r}."
        )
    settled = candidates[scores.index(best)]
    if settled == template:
        return
    if isinstance(tokenizer.chat_template, dict):
        tokenizer.chat_template = {**tokenizer.chat_template, "default": settled}
    else:
        tokenizer.chat_template = settled


def _what_comes_out(tokenizer: PreTrainedTokenizerBase, template: str) -> tuple[int, int]:
    """Return whether a question and an answer come out of the template, as 0 or 1 each."""
    question = {"role": "user", "content": "question-probe"}
    answer = {"role": "assistant", "content": "answer-probe"}
    comes_out = []
    for messages in ([question], [question, answer]):
        try:
            rendered = tokenizer.apply_chat_template(
                messages, chat_template=template, add_generation_prompt=len(messages) == 1, tokenize=False
            )
        except (TemplateError, TypeError):
            rendered = ""
        comes_out.append(int(messages[-1]["content"] in cast(str, rendered)))
    return comes_out[0], comes_out[1]
