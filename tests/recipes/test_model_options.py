"""The options of recipes/train.py that describe its model."""

import pytest

from support.models import make_model
from trainer import CoSupTrainingArguments

from shared import model_options
from shared.arguments import ScriptArguments
from shared.model_options import load_model


def test_a_checkpoint_keeps_what_it_was_built_with(tmp_path):
    """A config file that was written for a new model also trains its checkpoint further."""
    make_model(tie_emb_seq=True, max_passage_length=64).save_pretrained(tmp_path / "built")
    args = CoSupTrainingArguments(str(tmp_path / "out"))
    checkpoint = str(tmp_path / "built")
    same = ScriptArguments(gen="not/read", model_name_or_path=checkpoint, similarity="cosine", max_passage_length=64)
    assert load_model(same, args).config.max_passage_length == 64
    for name, value, built_with in (("max_passage_length", 32, "64"), ("nsp_token", "[R]", r"\[NSP\]")):
        changed = ScriptArguments(model_name_or_path=checkpoint, similarity="cosine", **{name: value})
        with pytest.raises(ValueError, match=f"--{name} .* cannot be changed: .*built was built with {built_with}"):
            load_model(changed, args)


def test_a_checkpoint_keeps_its_control_tokens(tmp_path):
    make_model(nsp_token="[R]").save_pretrained(tmp_path / "built")
    args = CoSupTrainingArguments(str(tmp_path / "out"))
    options = {"model_name_or_path": str(tmp_path / "built"), "nsp_token": "[R]"}
    model = load_model(ScriptArguments(**options), args)
    assert model.tokenizer.convert_ids_to_tokens(model.config.nsp_token_id) == "[R]"
    with pytest.raises(ValueError, match=r"--ce_token \[End\] cannot be changed: .*built was built with \[CE\]"):
        load_model(ScriptArguments(**options, ce_token="[End]"), args)


def test_parts_next_to_a_checkpoint_are_not_read_and_named(tmp_path, monkeypatch):
    messages = []
    monkeypatch.setattr(model_options.logger, "warning", messages.append)
    make_model(tie_emb_seq=True).save_pretrained(tmp_path / "built")
    args = CoSupTrainingArguments(str(tmp_path / "out"))
    script = ScriptArguments(model_name_or_path=str(tmp_path / "built"), gen="not/read", emb_seq="not/read")
    script.nsp_init = "eos"
    load_model(script, args)
    assert messages == [f"Not read, as {tmp_path / 'built'} has parts of its own: --gen, --emb_seq, --nsp_init."]
