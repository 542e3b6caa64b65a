"""The options of recipes/train.py that describe its model."""

import pytest

from support.models import make_model
from trainer import CoSupTrainingArguments

from shared.arguments import ScriptArguments
from shared.model_options import load_model


def test_a_checkpoint_keeps_what_it_was_built_with(tmp_path):
    """A config file that was written for a new model also trains its checkpoint further."""
    make_model(tie_emb_seq=True, max_passage_length=64).save_pretrained(tmp_path / "built")
    args = CoSupTrainingArguments(str(tmp_path / "out"))
    checkpoint = str(tmp_path / "built")
    same = ScriptArguments(gen="not/read", model_name_or_path=checkpoint, similarity="cosine", max_passage_length=64)
    assert load_model(same, args).config.max_passage_length == 64
    for name, value, built_with in (("max_passage_length", 32, "64"), ("nsp_token", "[R]", "its own")):
        changed = ScriptArguments(model_name_or_path=checkpoint, similarity="cosine", **{name: value})
        with pytest.raises(ValueError, match=f"--{name} .* cannot be changed: .*built was built with {built_with}"):
            load_model(changed, args)
