"""Gen, its token memories and the text that they read, for the recipes that train and judge memories."""

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from modeling_cosup import CoSupForCausalLM
from modeling_cosup.datastore_build_cosup import read_texts
from modeling_cosup.token_keys_cosup import document_ids


def load_gen(name: str, dtype: str) -> tuple[Any, PreTrainedTokenizerBase]:
    """Load a CoSup checkpoint without Emb_seq, or another causal language model, and its tokenizer."""
    if AutoConfig.from_pretrained(name).model_type == "cosup":
        model = CoSupForCausalLM.from_pretrained(name, dtype=dtype, load_emb_seq=False)
    else:
        model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype, use_safetensors=True)
    return model.eval(), AutoTokenizer.from_pretrained(name)


def read_documents(
    path: str, tokenizer: PreTrainedTokenizerBase, max_documents: int | None = None
) -> Iterator[list[int]]:
    """
    Yield the token ids of documents, one at a time.

    Args:
        path (`str`): JSON Lines (.gz) or Parquet with a `text` for each document, or one text in UTF-8 (.txt).
        tokenizer (`PreTrainedTokenizerBase`): of Gen.
        max_documents (`int`, *optional*): read only the first.

    Raises:
        `FileNotFoundError`, `ValueError`: names file and line of what cannot be read.
    """
    if Path(path).suffix.lower() == ".txt":
        try:
            text = Path(path).read_text(encoding="utf-8-sig")
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} is not UTF-8: {error}") from None
        yield document_ids(text, tokenizer)
        return
    for text in itertools.islice(read_texts(path), max_documents):
        yield document_ids(text, tokenizer)
