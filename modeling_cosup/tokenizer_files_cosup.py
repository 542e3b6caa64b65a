"""Saving a tokenizer so that `AutoTokenizer`, which chooses a class by its own rules, loads one that reads alike."""

import copy
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase

from .files_cosup import read_json, write_json
from .tokenization_cosup import same_tokenizer

# reads tokenizer.json as it is; every release of transformers knows the name
GENERIC_CLASS = "PreTrainedTokenizerFast"


def class_to_save(
    tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig, classes: Sequence[str | None], advice: str
) -> str | None:
    """
    Return the first of `classes` with which `AutoTokenizer` reads text from the saved files as `tokenizer` does.

    Many classes build their own normaliser and pre-tokenizer, whatever the files say, and for some model types
    `AutoTokenizer` insists on such a class. So the tokenizer is saved to a temporary folder and loaded again.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): the tokenizer to save.
        config (`PreTrainedConfig`): of the model that is saved in the same folder.
        classes (`Sequence[str | None]`): names to save, `None` for the tokenizer's own class.
        advice (`str`): what to do about it, at the end of the error message.

    Raises:
        `ValueError`: if none of them does.
    """
    config = copy.copy(config)
    loaded_class = "no tokenizer"
    for tokenizer_class in classes:
        with tempfile.TemporaryDirectory() as folder:
            config._name_or_path = folder  # some names on the Hub have rules of their own
            write_tokenizer(tokenizer, folder, tokenizer_class)
            try:
                loaded = AutoTokenizer.from_pretrained(folder, config=config)
            except (OSError, ValueError):
                continue
        if _read_alike(tokenizer, loaded):
            return tokenizer_class
        loaded_class = type(loaded).__name__
    raise ValueError(
        f"Nothing was written: from the files of this {type(tokenizer).__name__}, AutoTokenizer would make a"
        f" {loaded_class} for a model of type {config.model_type}, which turns text into other tokens. {advice}"
    )


def write_tokenizer(
    tokenizer: PreTrainedTokenizerBase, folder: str | os.PathLike[str], tokenizer_class: str | None
) -> None:
    """Save a tokenizer with the name of a class, see [`class_to_save`]."""
    tokenizer.save_pretrained(folder)
    if tokenizer_class is not None:
        path = Path(folder) / "tokenizer_config.json"
        write_json(path, {**read_json(path), "tokenizer_class": tokenizer_class})


def _read_alike(first: PreTrainedTokenizerBase, second: PreTrainedTokenizerBase) -> bool:
    """Return whether two tokenizers read text, special tokens and conversations alike."""
    special_tokens = " ".join(map(str, first.all_special_tokens))
    return (
        same_tokenizer(first, second)
        and first(special_tokens)["input_ids"] == second(special_tokens)["input_ids"]
        and first.chat_template == second.chat_template
    )
