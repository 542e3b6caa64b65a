"""Chat templates when Gen takes over a tokenizer: questions come out, a turn ends at an end, the date is fixed."""

import datetime

import pytest
from transformers.utils import chat_template_utils

from modeling_cosup.templates_cosup import settle_chat_template
from modeling_cosup.tokenization_cosup import add_control_tokens, encode_prompt, end_of_turn_token_id
from support.models import make_model, make_tokenizer

TURNS = ["<|im_start|>", "<|im_end|>"]
CONTENT_PARTS = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% for part in message.content %}{% if part.type == 'text' %}{{ part.text }}{% endif %}{% endfor %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CONTENT_PARTS_OR_ERROR = CONTENT_PARTS.replace("{{ part.text }}", "{{ part.text + '' }}").replace(
    "{% if part.type == 'text' %}", "{% if true %}"
)
STRINGS = "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
LLAMA_3 = (
    "{%- if not date_string is defined %}{%- if strftime_now is defined %}"
    "{%- set date_string = strftime_now('%d %b %Y') %}"
    "{%- else %}{%- set date_string = '26 Jul 2024' %}{%- endif %}{%- endif %}\n"
    "{{- 'Today Date: ' + date_string + '\n' }}" + STRINGS
)
OTHERS = (
    "{%- macro today() %}{{ 'On ' + strftime_now('%A, %B %-d, %Y (%Y-%m-%d)') }}{% endmacro %}{{ today() }}" + STRINGS
)


def tokenizer_with(template):
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": TURNS})
    tokenizer.chat_template = template
    add_control_tokens(tokenizer)
    return tokenizer


def prompt(tokenizer):
    return tokenizer.decode(encode_prompt(tokenizer, "who [NSP]?", "Answer."))


@pytest.mark.parametrize("template", [CONTENT_PARTS, CONTENT_PARTS_OR_ERROR], ids=["loses strings", "raises"])
def test_a_template_that_reads_content_parts(template, tmp_path):
    tokenizer = tokenizer_with(template)
    model = make_model(tokenizer=tokenizer)  # takes it over
    turns = "<|im_start|>system\nAnswer.<|im_end|>\n<|im_start|>user\nwho [NSP]?<|im_end|>\n<|im_start|>assistant\n"
    assert prompt(tokenizer) == turns
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert end_of_turn_token_id(tokenizer) == end
    assert end in model.generation_config.eos_token_id
    parts = [{"role": "user", "content": [{"type": "text", "text": "hi"}]}]
    rendered = tokenizer.apply_chat_template(parts, tokenize=False)
    assert rendered == "<|im_start|>user\nhi<|im_end|>\n"  # parts are still read
    settled = tokenizer.chat_template
    tokenizer.save_pretrained(tmp_path)
    again = type(tokenizer).from_pretrained(tmp_path)
    settle_chat_template(again)
    assert again.chat_template == settled
    assert prompt(again) == turns


@pytest.mark.parametrize("template", [STRINGS, "{{ messages[0].content }}", None], ids=["chat", "question", "paper"])
def test_a_template_that_needs_no_change_gets_none(template):
    tokenizer = tokenizer_with(template)
    before = tokenizer.chat_template
    settle_chat_template(tokenizer)
    assert tokenizer.chat_template == before


def test_the_default_of_several_templates_is_settled():
    tokenizer = tokenizer_with({"default": CONTENT_PARTS, "tool_use": CONTENT_PARTS})
    settle_chat_template(tokenizer)
    assert "who [NSP]?" in prompt(tokenizer)
    assert tokenizer.chat_template["tool_use"] == CONTENT_PARTS


@pytest.mark.parametrize("template", ["{{ messages[0].role }}", "{{ raise_exception('never') }}"])
def test_a_template_that_loses_the_question_is_refused(template):
    with pytest.raises(ValueError, match="the user's message does not come out of the chat template"):
        make_model(tokenizer=tokenizer_with(template))


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (LLAMA_3, "Today Date: 26 Jul 2024\n<|im_start|>"),
        (OTHERS, "On Friday, July 26, 2024 (2024-07-26)<|im_start|>"),
    ],
    ids=["Llama 3", "others"],
)
def test_the_date_of_a_prompt_is_fixed(template, expected, monkeypatch):
    class Tomorrow(datetime.datetime):
        @classmethod
        def now(cls, tz=None):
            return datetime.datetime(2031, 1, 1)

    monkeypatch.setattr(chat_template_utils, "datetime", Tomorrow)
    tokenizer = tokenizer_with(template)
    assert "2031" in prompt(tokenizer)
    settle_chat_template(tokenizer)
    assert prompt(tokenizer).startswith(expected)
    if template == LLAMA_3:
        question = [{"role": "user", "content": "who?"}]
        rendered = tokenizer.apply_chat_template(question, tokenize=False, date_string="1 Jan 2031")
        assert rendered.startswith("Today Date: 1 Jan 2031\n")


def test_a_token_that_begins_a_turn_ends_none():
    begins = "{% for message in messages %}<|im_start|>{{ message.content }}{% endfor %}"
    tokenizer = tokenizer_with(begins + "<|im_start|>")  # always asks for the next turn
    assert end_of_turn_token_id(tokenizer) == tokenizer.eos_token_id
    tokenizer.chat_template = begins + "<|im_end|><|im_start|>"
    assert end_of_turn_token_id(tokenizer) == tokenizer.convert_tokens_to_ids("<|im_end|>")
    tokenizer.bos_token = tokenizer.eos_token  # as in GPT-2: one token before and after
    tokenizer.chat_template = (
        "{{ bos_token }}{% for message in messages %}{{ message.content }}{{ eos_token }}{% endfor %}"
    )
    assert end_of_turn_token_id(tokenizer) == tokenizer.eos_token_id
    tokenizer.chat_template = "<|im_start|>{{ messages[0].content }}"  # of questions alone
    assert end_of_turn_token_id(tokenizer) == tokenizer.eos_token_id
