"""
Text stays text: control tokens, BOS and EOS come from ids only, in passages, prompts and chat templates.

The chat templates are the paper's and others.
"""

import inspect

import pytest
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from modeling_cosup import encoding_cosup
from modeling_cosup.packing_cosup import pad_rows
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
from support.tokenizer_kinds import TOKENIZERS, xlm_roberta

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


# ---------------------------------------------------------------------- special tokens that a vocabulary holds


SPECIALS_IN_TEXT = "the </s> painting</s>x <s>at</s> b<pad><mask>[SEP][CLS]<extra_id_3>[NSP]<</s>>"


@pytest.mark.parametrize("name", TOKENIZERS)
def test_text_is_never_a_special_token_in_any_vocabulary(name):
    tokenizer = TOKENIZERS[name]()
    add_control_tokens(tokenizer)
    plain, ids = encode_texts(tokenizer, ["the painting", SPECIALS_IN_TEXT])
    assert not special_ids(tokenizer).intersection(plain + ids)
    assert tokenizer.decode(ids).replace(" ", "") == SPECIALS_IN_TEXT.replace(" ", "")
    assert tokenizer(["the painting"], add_special_tokens=False)["input_ids"] == [plain]  # the rest is as always


def test_a_special_token_that_a_unigram_vocabulary_holds_is_spelled():
    tokenizer = TOKENIZERS["Unigram, XLM-R"]()
    texts = ["the</s>b", "at <mask>", "the 東 <unk>"]
    words = [tokenizer.convert_ids_to_tokens(ids) for ids in encode_texts(tokenizer, texts)]
    assert words[0] == ["▁the", "<", "/", "s", ">", "b"]
    assert words[1] == ["▁", "at", "▁", "<", "m", "a", "s", "k", ">"]
    assert words[2] == ["▁the", "▁", "<unk>", "▁", "<unk>"]  # what a vocabulary lacks is an unknown word
    full_width = encode_texts(TOKENIZERS["Unigram, XLM-R with NFKC"](), ["the＜/s＞b"])
    assert full_width == encode_texts(tokenizer, texts[:1])


@pytest.mark.parametrize("name", TOKENIZERS)
def test_a_prompt_holds_no_special_token_of_its_question(name):
    tokenizer = TOKENIZERS[name]()
    add_control_tokens(tokenizer)
    specials = special_ids(tokenizer)
    ids = encode_prompt(tokenizer, SPECIALS_IN_TEXT, f"Answer </s> {SPECIALS_IN_TEXT}")
    plain = encode_prompt(tokenizer, "who?", "Answer.")
    assert [id for id in ids if id in specials] == [id for id in plain if id in specials]
    assert tokenizer.decode(ids).replace(" ", "").count(SPECIALS_IN_TEXT.replace(" ", "")) == 2


def test_a_template_keeps_its_plain_added_tokens_to_itself():
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["<|user|>", "<|unused|>"])
    tokenizer.chat_template = "{% for message in messages %}<|user|>{{ message['content'] }}{% endfor %}"
    user, unused = tokenizer.convert_tokens_to_ids(["<|user|>", "<|unused|>"])
    ids = encode_prompt(tokenizer, "a <|user|> <|unused|>")
    assert (ids.count(user), ids.count(unused)) == (1, 1)


def test_a_special_token_of_one_character_is_refused_by_name():
    tokenizer = xlm_roberta()
    tokenizer.eos_token = "~"
    with pytest.raises(ValueError, match=r"Passage 'p7' \('wave ~'\) holds the special tokens \['~'\], which XLMRob"):
        encode_passages_for_gen(tokenizer, [{"text": "calm"}, {"id": "p7", "text": "wave ~"}], make_model().config)


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


# ---------------------------------------------------------------------- queries that an encoder reads


QUESTION_LIMITS = {
    "the tokenizer's limit": ({}, 40, 40),
    "the encoder's positions": ({"max_position_embeddings": 48}, 10**30, 48),
    "positions after the padding": ({"architecture": "roberta", "max_position_embeddings": 48}, 10**30, 46),
    "no limit": ({"architecture": "bloom"}, 10**30, None),
}


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("limit", QUESTION_LIMITS)
def test_a_long_query_keeps_its_end(limit, shared):
    emb_seq, model_max_length, expected = QUESTION_LIMITS[limit]
    tokenizer = make_tokenizer()
    separate = make_tokenizer(texts=["other words for another tokenizer"], bos="<cls>", eos="<sep>")
    encoder_tokenizer = tokenizer if shared else separate
    encoder_tokenizer.model_max_length = model_max_length
    architecture = emb_seq.get("architecture", "gpt2")
    positions = {name: value for name, value in emb_seq.items() if name != "architecture"}
    model = make_model(
        tokenizer=tokenizer,
        emb_seq_tokenizer=encoder_tokenizer,
        emb_seq=architecture,
        emb_seq_kwargs={**positions, "pad_token_id": 1},
        query_from="emb_seq",
        max_passage_length=16,
    )
    beginning = "This beginning is much longer than what an encoder of queries reads. " * 3
    prompts = [encode_prompt(tokenizer, beginning + question) for question in ("Who was first?", "Who was last?")]
    rows = [[*prompt, model.config.nsp_token_id] for prompt in prompts]
    first, last = encode_queries_for_emb_seq(tokenizer, encoder_tokenizer, rows, model.config)[0]
    assert first != last
    if expected is None:
        assert "This beginning" in encoder_tokenizer.decode(first)
        return
    assert len(first) == len(last) == expected
    assert first[0] == encoder_tokenizer.bos_token_id
    assert first[-1] == (model.config.nsp_token_id if shared else encoder_tokenizer.eos_token_id)
    assert "Who was first?## Output:" in encoder_tokenizer.decode(first)
    ids, mask = pad_rows(rows)
    embeds = model.encode_queries(ids, mask)  # as many tokens as the encoder has positions
    assert not torch.allclose(embeds[0], embeds[1], atol=1e-3)


def test_cut_queries_are_counted_once(monkeypatch):
    warnings = []
    monkeypatch.setattr(encoding_cosup.logger, "warning", warnings.append)
    model = make_model(query_from="emb_seq", emb_seq_kwargs={"max_position_embeddings": 300})
    rows = [encode_prompt(model.tokenizer, question) for question in ("who?", "who is it? " * 200)]
    for _ in range(2):
        model.encode_queries(*pad_rows(rows))
    message = "1 of 2 queries are longer than the 300 tokens that their encoder reads: the beginning is left out"
    assert len(warnings) == 1
    assert warnings[0].startswith(message)


# ---------------------------------------------------------------------- prompts


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
    "plain tokens": [{"role": "user", "content": "a <|think|>b<｜User｜> c"}],
    "empty": [{"role": "user", "content": ""}],
    "unicode": [{"role": "user", "content": "Zürich [NSP]東京[CE]½ \t x"}],
}


@pytest.mark.parametrize("chat", CHATS)
@pytest.mark.parametrize("template", [PAPER_CHAT_TEMPLATE, CHATML, THINKING], ids=["paper", "chatml", "thinking"])
@pytest.mark.parametrize("make", [cosup_tokenizer, sentencepiece_like])
def test_chats_are_encoded_as_transformers_does(make, template, chat):
    tokenizer = make(template)
    if template == CHATML:  # holds the two as plain tokens, as the tokenizers of some models do
        tokenizer.add_tokens(["<｜User｜>", "<|think|>"])
        tokenizer.chat_template += "<｜User｜><|think|>"
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
