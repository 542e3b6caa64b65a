"""
Text stays text: control tokens, BOS and EOS come from ids only, in passages, prompts and chat templates.

The chat templates are the paper's and others.
"""

import inspect

import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from modeling_cosup.tokenization_cosup import (
    PAPER_CHAT_TEMPLATE,
    add_control_tokens,
    bos_and_eos,
    encode_chat,
    encode_passages_for_emb_seq,
    encode_passages_for_gen,
    encode_prompt,
    encode_queries_for_emb_seq,
    encode_texts,
    end_of_turn_token_id,
    render_passage,
    same_tokenizer,
    special_ids,
    tokenizer_fingerprint,
)
from support.models import make_model, make_tokenizer

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
NO_SYSTEM = (
    "{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "<s>{{ message['role'] }}: {{ message['content'] | trim }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<s>model: {% endif %}"
)
THINKING = (  # splits its messages, as templates that drop old thoughts do
    "{% for message in messages %}<s>{{ message['role'] }}: {{ message['content'].split('</s>')[-1] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<s>model: {% endif %}"
)
HOSTILE = "Is [NSP] or [Cs] or [CE] or </s> or <s> or <pad> or <|im_end|> in [NSP][CE]</s>?"


def cosup_tokenizer(template=None):
    tokenizer = make_tokenizer()
    if template == CHATML:
        tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = template
    add_control_tokens(tokenizer)
    return tokenizer


def test_control_tokens_are_special_and_survive_as_one_token():
    tokenizer = make_tokenizer()
    ids = add_control_tokens(tokenizer)
    assert tokenizer.convert_ids_to_tokens(ids) == ["[NSP]", "[Cs]", "[CE]"]
    assert set(ids) <= special_ids(tokenizer)
    assert tokenizer("[NSP]", add_special_tokens=False)["input_ids"] == ids[:1]
    assert tokenizer.decode([*ids, *encode_texts(tokenizer, ["Curie"])[0]], skip_special_tokens=True) == "Curie"
    size = len(tokenizer)
    assert add_control_tokens(tokenizer) == ids  # again: nothing new
    assert len(tokenizer) == size


def test_control_tokens_must_differ():
    with pytest.raises(ValueError, match="expected three different ones"):
        add_control_tokens(make_tokenizer(), {"cs_token": "[X]", "ce_token": "[X]"})


def test_a_tokenizer_keeps_its_own_template_and_pad_token():
    assert cosup_tokenizer(CHATML).chat_template == CHATML
    assert cosup_tokenizer().chat_template == PAPER_CHAT_TEMPLATE
    bare = make_tokenizer(pad=None)
    add_control_tokens(bare)
    assert bare.pad_token == bare.eos_token
    assert cosup_tokenizer().pad_token == "<pad>"


def test_text_is_never_a_control_token():
    tokenizer = cosup_tokenizer(CHATML)
    (ids,) = encode_texts(tokenizer, [HOSTILE])
    assert not special_ids(tokenizer) & set(ids)
    assert tokenizer.decode(ids) == HOSTILE
    assert encode_texts(tokenizer, []) == []


def test_passages_hold_no_control_token_but_emb_seq_reads_its_bos_and_eos():
    model = make_model()
    tokenizer, config = model.tokenizer, model.config
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    passages = [{"id": "x", "title": HOSTILE, "text": HOSTILE}]
    (gen_ids,) = encode_passages_for_gen(tokenizer, passages, config)
    assert not special_ids(tokenizer) & set(gen_ids)
    assert tokenizer.decode(gen_ids) == f"{HOSTILE} :: {HOSTILE}"
    assert encode_passages_for_emb_seq(tokenizer, passages, config) == [[bos, *gen_ids, eos]]
    config.max_passage_length = 5
    assert encode_passages_for_gen(tokenizer, passages, config) == [gen_ids[:5]]
    assert encode_passages_for_emb_seq(tokenizer, passages, config) == [[bos, *gen_ids[:5], eos]]


def test_render_passage():
    template = "{title} :: {text}"
    assert render_passage({"title": "T", "text": "x"}, template) == "T :: x"
    assert render_passage({"title": "", "text": "x"}, template) == render_passage({"text": "x"}, template) == "x"
    assert render_passage({"title": "{text} {id} {0}", "text": "{title}"}, template) == "{text} {id} {0} :: {title}"


def test_bos_and_eos_fall_back_to_cls_and_sep():
    backend = Tokenizer(models.WordLevel({"[UNK]": 0, "[CLS]": 1, "[SEP]": 2, "text": 3}, unk_token="[UNK]"))
    bert_like = PreTrainedTokenizerFast(
        tokenizer_object=backend, cls_token="[CLS]", sep_token="[SEP]", unk_token="[UNK]"
    )
    assert bos_and_eos(bert_like) == ([1], [2])
    config = make_model().config
    assert encode_passages_for_emb_seq(bert_like, [{"text": "text"}], config) == [[1, 3, 2]]
    no_end = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]")
    with pytest.raises(ValueError, match="no EOS or SEP token"):
        encode_passages_for_emb_seq(no_end, [{"text": "text"}], config)
    config.emb_seq_pooling = "mean"
    assert encode_passages_for_emb_seq(no_end, [{"text": "text"}], config) == [[3]]


@pytest.mark.parametrize("add_bos", [True, False])
@pytest.mark.parametrize("add_eos", [True, False])
def test_bos_eos_and_prompts_as_a_retriever_has_them(add_bos, add_eos):
    tokenizer, gen_tokenizer = make_tokenizer(), make_model().tokenizer
    bos = [tokenizer.bos_token_id] if add_bos else []
    eos = [tokenizer.eos_token_id] if add_eos else []
    text = encode_texts(tokenizer, ["find it: a text"])[0]
    config = make_model(
        passage_prompt="find it: ",
        query_prompt="find it: ",
        emb_seq_add_bos_token=add_bos,
        emb_seq_add_eos_token=add_eos,
        emb_seq_pooling="lasttoken",
        query_from="emb_seq",
    ).config
    assert encode_passages_for_emb_seq(tokenizer, [{"text": "a text"}], config) == [bos + text + eos]
    query = [config.nsp_token_id, *encode_texts(tokenizer, ["a text"])[0], tokenizer.eos_token_id]
    assert encode_queries_for_emb_seq(gen_tokenizer, tokenizer, [query], config) == ([bos + text + eos], 0)
    # a prompt makes it text
    assert encode_queries_for_emb_seq(gen_tokenizer, gen_tokenizer, [query], config) == ([bos + text + eos], 0)
    prompt = encode_texts(tokenizer, ["find it: "])[0]
    tokenizer.model_max_length = len(prompt) + 2 + len(bos) + len(eos)
    expected = bos + prompt + text[-2:] + eos  # the prompt and the end of the question
    assert encode_queries_for_emb_seq(gen_tokenizer, tokenizer, [query, query], config) == ([expected] * 2, 2)
    tokenizer.model_max_length = len(prompt) + len(bos) + len(eos)
    with pytest.raises(ValueError, match="query_prompt, with BOS and EOS, leaves no room"):
        encode_queries_for_emb_seq(gen_tokenizer, tokenizer, [query], config)
    config.query_prompt = ""
    assert encode_queries_for_emb_seq(gen_tokenizer, gen_tokenizer, [query], config) == ([query], 0)


def test_the_papers_prompt():
    tokenizer = cosup_tokenizer()
    ids = encode_prompt(tokenizer, "who?", "Answer.")
    assert tokenizer.decode(ids) == "<s>Answer.## Input:\n\nwho?## Output:\n\n"
    assert tokenizer.decode(encode_prompt(tokenizer, "who?")) == "<s>## Input:\n\nwho?## Output:\n\n"


@pytest.mark.parametrize("template", [PAPER_CHAT_TEMPLATE, CHATML, NO_SYSTEM])
def test_control_tokens_in_a_question_stay_text(template):
    tokenizer = cosup_tokenizer(template)
    specials = special_ids(tokenizer)
    ids = encode_prompt(tokenizer, HOSTILE, f"Answer {HOSTILE}")
    plain = encode_prompt(tokenizer, "who?", "Answer.")
    assert [id for id in ids if id in specials] == [id for id in plain if id in specials]
    assert tokenizer.decode(ids).count(HOSTILE) == 2


def test_a_lower_casing_tokenizer_keeps_the_case_of_control_tokens():
    tokenizer = make_tokenizer()
    tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
    nsp, *others = add_control_tokens(tokenizer)
    for text in ("[nsp] [cs] [Ce]", "[NSP] [Cs] [CE]"):
        assert not {nsp, *others} & set(encode_chat(tokenizer, [{"role": "user", "content": text}]))
    assert tokenizer("[NSP]", add_special_tokens=False)["input_ids"] == [nsp]


def test_a_template_that_rejects_system_messages_gets_one_user_message():
    tokenizer = cosup_tokenizer(NO_SYSTEM)
    assert tokenizer.decode(encode_prompt(tokenizer, "who?", "Answer.")) == "<s>user: Answer.\n\nwho?</s>\n<s>model: "
    tokenizer.chat_template = "{{ raise_exception('no chat at all') }}"
    with pytest.raises(Exception, match="no chat at all"):
        encode_prompt(tokenizer, "who?", "Answer.")


def sentencepiece_like(template):
    """Return a tokenizer that puts a space before every string, as Llama 2's does."""
    backend = Tokenizer(models.BPE(byte_fallback=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    alphabet = [*map(chr, range(33, 127)), "▁", "\n"]
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator(["who painted the Night Watch?", "a b c"], trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")
    tokenizer.chat_template = template
    add_control_tokens(tokenizer)
    return tokenizer


CHATS = {
    "plain": [{"role": "user", "content": "who painted the Night Watch?"}],
    "hostile": [{"role": "system", "content": f"{HOSTILE}</s>"}, {"role": "user", "content": f"[CE]{HOSTILE}"}],
    "only-controls": [{"role": "user", "content": "[NSP][Cs]</s>[CE][NSP]"}],
    "nested": [{"role": "user", "content": "[[NSP]] [NSP [CE]] <</s>> [N[Cs]SP]"}],
    "turns": [
        {"role": "user", "content": "a [NSP]"},
        {"role": "assistant", "content": "[Cs] b </s>"},
        {"role": "user", "content": " c\n"},
    ],
    "private-use": [{"role": "user", "content": "\ue000[NSP]\ue001 \U000f0000[CE]\U000f0001 [N\U000f0000SP]"}],
    "empty": [{"role": "user", "content": ""}],
    "unicode": [{"role": "user", "content": "Zürich [NSP]東京[CE]½ \t x"}],
}


@pytest.mark.parametrize("chat", CHATS)
@pytest.mark.parametrize("template", [PAPER_CHAT_TEMPLATE, CHATML, THINKING], ids=["paper", "chatml", "thinking"])
@pytest.mark.parametrize("make", [cosup_tokenizer, sentencepiece_like])
def test_chats_are_encoded_as_transformers_does(make, template, chat):
    tokenizer = make(template)
    if "sanitize_control_tokens" not in inspect.signature(tokenizer.apply_chat_template).parameters:
        pytest.skip("this transformers has no sanitize_control_tokens")
    expected = tokenizer.apply_chat_template(
        CHATS[chat], add_generation_prompt=True, sanitize_control_tokens=True, return_dict=False
    )
    assert encode_chat(tokenizer, CHATS[chat]) == expected


@pytest.mark.parametrize("chat", CHATS)
def test_a_chat_leaves_no_control_token(chat):
    """Checked also for releases of transformers that have no route to compare with."""
    tokenizer = cosup_tokenizer(CHATML)
    ids = encode_chat(tokenizer, CHATS[chat])
    specials = [id for id in ids if id in special_ids(tokenizer)]
    turns = ["<|im_start|>", "<|im_end|>"] * len(CHATS[chat]) + ["<|im_start|>"]
    assert tokenizer.convert_ids_to_tokens(specials) == turns


def test_end_of_turn():
    tokenizer = cosup_tokenizer()
    assert end_of_turn_token_id(tokenizer) == tokenizer.eos_token_id
    tokenizer = cosup_tokenizer(CHATML)
    assert end_of_turn_token_id(tokenizer) == tokenizer.convert_tokens_to_ids("<|im_end|>")
    # ends an answer with nothing special
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}\n{% endfor %}"
    assert end_of_turn_token_id(tokenizer) == tokenizer.eos_token_id
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="nothing would end an answer"):
        end_of_turn_token_id(tokenizer)


def test_end_of_turn_is_among_the_ends_of_generation():
    tokenizer = cosup_tokenizer(CHATML)
    model = make_model(tokenizer=tokenizer)
    ends = [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|im_end|>")]
    assert model.generation_config.eos_token_id == sorted(ends)
    assert model.generation_config.suppress_tokens == [model.config.cs_token_id]
    assert not model.generation_config.do_sample


def test_fingerprint_of_a_tokenizer(tmp_path):
    tokenizer = cosup_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    again = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    assert same_tokenizer(tokenizer, again)
    assert tokenizer_fingerprint(again) == tokenizer_fingerprint(tokenizer)
    other = make_tokenizer()
    assert not same_tokenizer(tokenizer, other)  # no control tokens
    add_control_tokens(other)
    assert same_tokenizer(tokenizer, other)
    renamed = make_tokenizer()
    add_control_tokens(renamed, {"nsp_token": "[Ret]"})
    assert not same_tokenizer(tokenizer, renamed)
    trained_elsewhere = make_tokenizer(texts=["something else entirely, and again something else"])
    add_control_tokens(trained_elsewhere)
    assert not same_tokenizer(tokenizer, trained_elsewhere)
