"""A saved tokenizer reads text as the one in memory does, whichever class AutoTokenizer takes, or it is not saved."""

import json

import pytest
import torch
from tokenizers import normalizers
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast, Qwen2Tokenizer

from modeling_cosup import CoSupForCausalLM
from modeling_cosup.tokenization_cosup import encode_passages_for_emb_seq, encode_texts
from support.models import PASSAGES, TEXTS, make_model, make_tokenizer

# numbers are split by digit in Qwen's pre-tokenizer, and contractions have rules
TEXTS_THAT_DIFFER = [*TEXTS, "12345 of 67.5%", "don't, DON'T \n\n x", "</s> [NSP] <|endoftext|>"]
SAVE = {"gen": CoSupForCausalLM.save_gen, "emb_seq": CoSupForCausalLM.save_emb_seq}


def qwen_tokenizer(lower_case=False):
    """Return a tokenizer of Qwen2's class; with `lower_case` its rules are not those that the class builds."""
    model = json.loads(make_tokenizer().backend_tokenizer.to_str())["model"]
    tokenizer = Qwen2Tokenizer(vocab=model["vocab"], merges=[tuple(merge) for merge in model["merges"]])
    if lower_case:
        tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
    return tokenizer


def saved_class(folder):
    return json.loads((folder / "tokenizer_config.json").read_text())["tokenizer_class"]


@torch.no_grad()
def assert_parts_read_alike(model, folder):
    """Load both parts without this package: ids, logits and states are equal to the model's."""
    tokenizer = AutoTokenizer.from_pretrained(folder / "gen")
    rows = encode_texts(model.tokenizer, TEXTS_THAT_DIFFER)
    assert encode_texts(tokenizer, TEXTS_THAT_DIFFER) == rows
    assert tokenizer.chat_template == model.tokenizer.chat_template
    gen = AutoModelForCausalLM.from_pretrained(folder / "gen")
    assert torch.equal(gen(torch.tensor([rows[0]])).logits, model(torch.tensor([rows[0]])).logits)

    passages = [*PASSAGES, *({"id": text, "title": "", "text": text} for text in TEXTS_THAT_DIFFER)]
    texts = [f"{passage['title']} :: {passage['text']}".removeprefix(" :: ") for passage in passages]
    rows = encode_passages_for_emb_seq(model.emb_seq_tokenizer, passages, model.config)
    assert AutoTokenizer.from_pretrained(folder / "emb_seq")(texts, truncation=True)["input_ids"] == rows
    emb_seq = AutoModel.from_pretrained(folder / "emb_seq")
    ids = torch.tensor([rows[0]])
    embedding = torch.nn.functional.normalize(emb_seq(ids).last_hidden_state[:, -1], dim=-1)
    torch.testing.assert_close(embedding, model.encode_passages(ids))


@pytest.mark.parametrize(
    ("architecture", "tokenizer", "classes"),
    [
        ("qwen2", qwen_tokenizer, ("Qwen2Tokenizer", "PreTrainedTokenizerFast")),
        ("llama", qwen_tokenizer, ("Qwen2Tokenizer", "PreTrainedTokenizerFast")),
        # loaded with its own class, this one would keep upper case
        ("llama", lambda: qwen_tokenizer(lower_case=True), ("PreTrainedTokenizerFast", "PreTrainedTokenizerFast")),
    ],
)
def test_parts_are_saved_with_a_class_that_reads_text_alike(tmp_path, architecture, tokenizer, classes):
    model = make_model(architecture, architecture, tokenizer=tokenizer())
    for name, save in SAVE.items():
        save(model, tmp_path / name)
    assert (saved_class(tmp_path / "gen"), saved_class(tmp_path / "emb_seq")) == classes
    assert_parts_read_alike(model, tmp_path)


@pytest.mark.parametrize("part", SAVE)
def test_a_model_type_that_insists_on_another_class_is_refused(tmp_path, part):
    """AutoTokenizer reads the type qwen2 with Qwen2Tokenizer, whatever the files say."""
    model = make_model("qwen2", "qwen2")
    with pytest.raises(ValueError) as error:
        SAVE[part](model, tmp_path / part)
    assert "AutoTokenizer would make a Qwen2Tokenizer for a model of type qwen2" in str(error.value)
    assert "Save the whole model with save_pretrained" in str(error.value)
    assert not (tmp_path / part).exists()


def test_the_whole_model_keeps_the_tokenizer_that_its_parts_could_not(tmp_path):
    model = make_model("qwen2", "qwen2")
    model.save_pretrained(tmp_path)
    loaded = CoSupForCausalLM.from_pretrained(tmp_path)
    assert encode_texts(loaded.tokenizer, TEXTS_THAT_DIFFER) == encode_texts(model.tokenizer, TEXTS_THAT_DIFFER)
    assert loaded.fingerprint() == model.fingerprint()


@pytest.mark.parametrize("is_emb_seq", [False, True])
def test_a_tokenizer_that_would_be_loaded_with_other_rules_is_refused(tmp_path, is_emb_seq):
    model = make_model(tokenizer=make_tokenizer() if is_emb_seq else qwen_tokenizer(lower_case=True))
    if is_emb_seq:
        model.emb_seq_tokenizer = qwen_tokenizer(lower_case=True)
    with pytest.raises(
        ValueError, match="AutoTokenizer would make a Qwen2Tokenizer for a model of type cosup"
    ) as error:
        model.save_pretrained(tmp_path / "model")
    assert "PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer" in str(error.value)
    assert not (tmp_path / "model").exists()

    # what the error advises
    name = "emb_seq_tokenizer" if is_emb_seq else "tokenizer"
    tokenizer = getattr(model, name)
    options = {"eos_token": tokenizer.eos_token, "chat_template": tokenizer.chat_template}
    setattr(model, name, PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, **options))
    model.save_pretrained(tmp_path / "model")
    loaded = CoSupForCausalLM.from_pretrained(tmp_path / "model")
    assert encode_texts(getattr(loaded, name), TEXTS_THAT_DIFFER) == encode_texts(tokenizer, TEXTS_THAT_DIFFER)
