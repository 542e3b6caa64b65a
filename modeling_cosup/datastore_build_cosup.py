"""
Building a token datastore: texts become shards of keys, half norms and values. Only Gen's body runs.

Does not travel with a checkpoint: building a memory needs the package; using one does not.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from .datastore_files_cosup import create_shard, keys_file
from .datastore_search_cosup import KeyShard, half_norms_of, stored_keys
from .fingerprints_cosup import memory_fingerprint
from .folders_cosup import DTYPES, dtype_name
from .names_cosup import refuse_misspelt
from .passages_cosup import check_text, dataset_rows, read_corpus, shown
from .shard_build_cosup import Settings
from .token_keys_cosup import encode_documents, ffn_name, gen_of, token_states, window_size

CHARACTERS_PER_KEY = 4  # roughly; shards are measured in characters, so that no process tokenizes another's


class KeyBuilder:
    """
    Builds shards from texts.

    Args:
        model ([`CoSupForCausalLM`] or `PreTrainedModel`): Gen, or the model that has it; used on its device and in its
            dtype.
        tokenizer (`PreTrainedTokenizerBase`): Gen's.
        dtype (`str`): of the stored keys.
        batch_size (`int`): windows in a forward.
        max_length, stride (`int`, *optional*): see [`KNNMemory.build`].
    """

    num_cut = 0  # a long text is read in several windows

    def __init__(
        self,
        model: Any,
        tokenizer: PreTrainedTokenizerBase,
        dtype: str | torch.dtype = "float16",
        batch_size: int = 8,
        max_length: int | None = None,
        stride: int | None = None,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}, expected at least 1.")
        self.model, self.gen, self.tokenizer = model, gen_of(model), tokenizer
        self.dtype, self.batch_size = DTYPES[dtype_name(dtype)], batch_size
        ffn_name(self.gen)  # an unknown architecture fails now
        self.key_size: int = self.gen.config.get_text_config().hidden_size
        self.max_length, self.stride = window_size(self.gen, max_length, stride)

    def settings(self, shard_size: int) -> Settings:
        """Return what decides the keys of given texts, and their shards; a build resumes only with the same."""
        return {
            "fingerprint": memory_fingerprint(self.model, self.tokenizer),
            "vocab_size": self.model.get_output_embeddings().weight.shape[0],
            "dtype": dtype_name(self.dtype),
            "gen_dtype": str(self.gen.dtype),
            "shard_size": shard_size,
            "max_length": self.max_length,
            "stride": self.stride,
        }

    def files_of(self, number: int) -> tuple[str, ...]:
        """Return the name of the file of a shard."""
        return (keys_file(number),)

    def room_for(self, num_items: int) -> str:
        """Say how much room the shards of `num_items` texts take."""
        return f"{self.key_size * self.dtype.itemsize + 8:,} bytes for each token of the {num_items:,} remaining texts"

    def make(self, texts: list[str], bar: tqdm, paths: tuple[Path, ...] | None = None) -> KeyShard:
        """
        Compute the keys of texts.

        Args:
            texts (`list[str]`): checked.
            bar (`tqdm`): advances by text.
            paths (`tuple[Path]`, *optional*): file of the shard; without it the shard is in memory.

        Raises:
            `ValueError`: for keys that are not finite, or overflow the dtype.
        """
        documents = encode_documents(texts, self.tokenizer)
        counts = np.array([max(0, len(ids) - 1) for ids in documents])
        path = None if paths is None else paths[0]
        shard = create_shard(path, len(texts), int(counts.sum()), self.key_size, self.dtype)
        shard.document_starts[:] = torch.from_numpy(counts.cumsum() - counts)
        start = num_done = 0
        state_batches = token_states(
            self.gen, documents, max_length=self.max_length, stride=self.stride, batch_size=self.batch_size
        )
        for states in state_batches:
            end = start + len(states.keys)
            stored = stored_keys(states.keys, self.dtype)
            shard.keys[start:end] = stored.cpu()
            shard.half_norms[start:end] = half_norms_of(stored).cpu()
            shard.values[start:end] = states.values.cpu()
            start = end
            bar.update(int(states.documents[-1]) - num_done)
            num_done = int(states.documents[-1])
        bar.update(len(texts) - num_done)
        return shard


def split_texts(source: Any, shard_size: int) -> Iterator[list[str]]:
    """
    Split texts into shards of about `shard_size` keys, see [`read_texts`]; at least one text each.

    Raises:
        `ValueError`: names the place of a value that is not a text.
    """
    if shard_size < 1:
        raise ValueError(f"shard_size is {shard_size}, expected at least 1.")
    texts: list[str] = []
    num_characters = 0
    for text in read_texts(source):
        texts.append(text)
        num_characters += len(text)
        if num_characters >= CHARACTERS_PER_KEY * shard_size:
            yield texts
            texts, num_characters = [], 0
    if texts:
        yield texts


def read_texts(source: Any) -> Iterator[str]:
    """
    Yield texts one at a time.

    Args:
        source: the path of a file with a `text` in each row, JSON Lines (`.gz`) or Parquet; or an iterable of strings
            or of such rows, e.g. a `datasets` dataset, streamed or not.

    Raises:
        `ValueError`: names the place of a value that is not a text.
    """
    if isinstance(source, str | Path):
        pairs = read_corpus(source, columns=("text",), optional=())
    else:
        pairs = ((f"Text {number}", value) for number, value in enumerate(dataset_rows(source)))
    for where, value in pairs:
        if isinstance(value, Mapping):
            refuse_misspelt(value, ("text",), where)
            value = value.get("text")
        if not isinstance(value, str):
            raise ValueError(f"{where}: found {shown(value)}, expected a text, or a row with a field text.")
        yield check_text(value, "text", where, may_be_empty=True)
