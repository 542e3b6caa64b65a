"""The token datastore: a kNN memory of every token of a corpus, by the state of Gen that predicted it."""

import os
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from .datastore_files_cosup import MEMORY_FORMAT, MEMORY_TYPE, content_digest, map_shard, write_shard
from .datastore_search_cosup import KeyShard, half_norms_of, stored_keys
from .datastore_searchable_cosup import SearchableKeys
from .folder_store_cosup import find_folder, load_unchanged
from .folders_cosup import DTYPES, Config, FileFacts, dtype_name, put_in_place, read_config, sweep, write_config
from .hub_cosup import make_repo
from .memory_cosup import MemoryConfig
from .plain_card_cosup import package_memory_cards, plain_card
from .shard_build_cosup import build_digest, build_of, collect, finish, unfinished_folder, write_shards
from .token_keys_cosup import document_ids, token_states, tokenizer_of, window_size

if TYPE_CHECKING:
    from huggingface_hub import CommitInfo

SHARD_SIZE = 2**18  # keys, about: half a gigabyte at 1,024 dimensions in float16


@dataclass
class Entry:
    """
    An entry of a memory, next to a state of Gen.

    Args:
        row (`int`): its number in the memory.
        document (`int`), position (`int`): number of its text, and place of its token in the token ids of the text.
        value (`int`): its token.
        distance (`float`): squared L2, to Gen's state.
        weight (`float`): its share of p_mem.
        text (`str`, *optional*): the text before its token.
        token (`str`, *optional*): the text of its token.
    """

    row: int
    document: int
    position: int
    value: int
    distance: float
    weight: float
    text: str | None = None
    token: str | None = None


class KNNMemory(SearchableKeys):
    """
    A token memory of entries: keys, which are states of Gen, and values, the tokens that came next.

    p_mem(v) is proportional to the sum of exp(-d²/T) over the entries with value v among the k nearest. d is the L2
    distance from the state to the key, and T the temperature (arXiv 2311.09615, section 2).

    Made by [`KNNMemory.build`], [`KNNMemory.from_tensors`] or [`KNNMemory.from_pretrained`]. An entry's row is its
    place in the texts.
    """

    # ------------------------------------------------------------------ building

    @classmethod
    def from_tensors(
        cls,
        keys: torch.Tensor,
        values: torch.Tensor,
        *,
        fingerprint: dict[str, str],
        vocab_size: int,
        document_starts: torch.Tensor | None = None,
        dtype: str | torch.dtype = "float16",
        memory_config: MemoryConfig | None = None,
    ) -> "KNNMemory":
        """
        Make a memory from tensors. It is in RAM, not in a folder.

        Args:
            keys (`torch.Tensor` of shape `(N, d)`): any float dtype and device; copied to the CPU.
            values (`torch.Tensor` of shape `(N,)`): token ids.
            fingerprint (`dict`): of the model that made the keys, see [`~fingerprints_cosup.memory_fingerprint`].
            vocab_size (`int`): V, the width of Gen's logits.
            document_starts (`torch.LongTensor` of shape `(D,)`, *optional*): row of the first entry of each document;
                defaults to a single document.
            dtype (`str` or `torch.dtype`, *optional*, defaults to `"float16"`): of the stored keys:
                `"float32"`, `"float16"` or `"bfloat16"`.
            memory_config ([`MemoryConfig`], *optional*): how the memory is used unless a call says otherwise.

        Raises:
            `ValueError`: for no entries, keys that are not finite or not in `dtype`, values outside the vocabulary,
                or document_starts that are not ascending rows.
        """
        if keys.ndim != 2 or values.shape != keys.shape[:1]:
            raise ValueError(
                f"keys are {tuple(keys.shape)} and values {tuple(values.shape)}, expected (N, d) and (N,)."
            )
        keys, values = keys.detach().cpu(), values.detach().cpu()
        check_values(values, vocab_size)
        starts = torch.zeros(1, dtype=torch.long)
        if document_starts is not None:
            starts = torch.as_tensor(document_starts).long().cpu()
        ascending = bool((starts.diff() >= 0).all())
        if not len(starts) or starts[0] != 0 or not ascending or starts[-1] > len(keys):
            raise ValueError(
                f"document_starts begin {starts[:5].tolist()}, expected ascending rows from 0 to {len(keys)}."
            )
        stored = stored_keys(keys, DTYPES[dtype_name(dtype)])
        shards = [KeyShard(stored, half_norms_of(stored), values.int(), starts)]
        settings = {"fingerprint": fingerprint, "vocab_size": vocab_size, "dtype": dtype_name(dtype)}
        return cls(shards, new_config(settings, shards, memory_config))

    @classmethod
    def build(
        cls,
        model: Any,
        texts: Any,
        save_directory: str | os.PathLike[str] | None = None,
        *,
        tokenizer: PreTrainedTokenizerBase | None = None,
        dtype: str | torch.dtype = "float16",
        max_length: int | None = None,
        stride: int | None = None,
        batch_size: int = 8,
        shard_size: int = SHARD_SIZE,
        memory_config: MemoryConfig | None = None,
        num_processes: int = 1,
        process_index: int = 0,
        show_progress_bar: bool = True,
    ) -> "KNNMemory | Any":  # None with several processes; Any, so that other callers need no check
        """
        Store every token of each text but the first, which nothing predicts. Only Gen's body runs, not its LM head.

        With `save_directory` the memory is built there shard by shard, in the memory of one shard. After a crash the
        same call resumes at the first incomplete shard. The folder gets its name when it is complete; an earlier
        memory of that name stays until then.

        Args:
            model ([`CoSupForCausalLM`] or `PreTrainedModel`): Gen, used on its device and in its dtype.
            texts: the path of a file with a `text` in each row, JSON Lines (`.gz`) or Parquet; or an iterable of
                strings or of such rows, e.g. a `datasets` dataset, streamed or not. Never all in memory.
            save_directory (`str` or `Path`, *optional*): folder of the memory; without it the memory is in RAM.
            tokenizer (`PreTrainedTokenizerBase`, *optional*): of a plain language model; a CoSup model gives its own.
            dtype (`str` or `torch.dtype`, *optional*, defaults to `"float16"`): of the stored keys:
                `"float32"`, `"float16"` or `"bfloat16"`, which cannot overflow.
            max_length (`int`, *optional*): tokens of a window; defaults to what Gen can read, at most 1,024.
            stride (`int`, *optional*): tokens from one window to the next, see [`~token_keys_cosup.windows`]; defaults
                to half of `max_length`.
            batch_size (`int`, *optional*, defaults to 8): windows in a forward.
            shard_size (`int`, *optional*, defaults to 262144): keys per shard, roughly: a shard ends after the text
                that brings it to four characters per key.
            memory_config ([`MemoryConfig`], *optional*): how the memory is used unless a call says otherwise.
            num_processes (`int`, *optional*, defaults to 1): number of processes that build this memory together, in a
                `save_directory` that all can access. When all are done, one of them calls [`KNNMemory.merge`].
            process_index (`int`, *optional*, defaults to 0): number of this process.
            show_progress_bar (`bool`, *optional*, defaults to `True`): count texts in process 0.

        Returns:
            [`KNNMemory`], or `None` with several processes.

        Raises:
            `ValueError`: for a value that is not a text (names its place), for texts without a token to predict, for
                keys that are not finite or overflow `dtype`, or if the unfinished build was begun by another model or
                with other settings (names the differences).
            `OSError`: if the folder cannot be written, or the disk is full.
            `ImportError`: in a process that has only a checkpoint's code.
        """
        building = _package_building()
        if save_directory is None and num_processes > 1:
            raise ValueError("Several processes can only build a memory in files: give save_directory.")
        if not 0 <= process_index < num_processes:
            raise ValueError(f"process_index is {process_index}, expected one of 0 to {num_processes - 1}.")
        tokenizer = tokenizer_of(model, tokenizer)
        builder = building.KeyBuilder(model, tokenizer, dtype, batch_size, max_length, stride)
        shards = building.split_texts(texts, shard_size)
        settings = builder.settings(shard_size)
        bar = tqdm(desc="Storing texts", unit=" texts", disable=not show_progress_bar or process_index > 0)
        if save_directory is None:
            with bar:
                in_memory = [builder.make(shard, bar) for shard in shards]
            return cls(in_memory, new_config(settings, in_memory, memory_config))
        save_directory = cls.check_save_directory(save_directory)
        with build_of(save_directory, settings, num_processes, process_index) as folder:
            with bar:
                num_shards = write_shards(folder, shards, builder, bar, num_processes, process_index)
            finish(folder, num_shards, settings, num_processes)
            return cls.merge(save_directory, memory_config) if num_processes == 1 else None

    @classmethod
    def merge(cls, save_directory: str | os.PathLike[str], memory_config: MemoryConfig | None = None) -> "KNNMemory":
        """
        Combine the shards that all processes of a build have finished into a memory, and give it its name.

        Raises:
            `FileNotFoundError`: if a process has not finished.
            `ValueError`: if the processes read different texts, there is no entry, or a file is damaged.
        """
        save_directory = cls.check_save_directory(save_directory)
        folder = unfinished_folder(save_directory)
        settings, markers, files = collect(folder)
        shards = [map_shard(folder, number) for number in range(len(markers))]
        config = {**new_config(settings, shards, memory_config, files), "content": content_digest(shards)}
        config["build"] = build_digest(settings, [marker["digest"] for marker in markers])
        write_config(folder, config, cls.form)
        put_in_place(folder, save_directory)
        sweep(save_directory, config, cls.form)
        return cls.from_pretrained(save_directory, verify=False)

    # ------------------------------------------------------------------ what a prediction leans on

    def neighbors(
        self,
        keys: torch.Tensor | str,
        n: int = 8,
        *,
        model: Any = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        config: MemoryConfig | None = None,
        num_tokens: int = 24,
    ) -> list[list[Entry]]:
        """
        Return which stored text a prediction leans on.

        Args:
            keys (`torch.Tensor` of shape `(R, d)` or `str`): states of Gen, or a text whose next token is predicted.
            n (`int`, *optional*, defaults to 8): entries for each state, the nearest first; at most `k` of the config.
            model ([`CoSupForCausalLM`] or `PreTrainedModel`, *optional*): computes the state after a text.
            tokenizer (`PreTrainedTokenizerBase`, *optional*): decodes the stored text; a CoSup model gives its own.
            config ([`MemoryConfig`], *optional*): defaults to the memory's; weights are shares among its `k` entries.
            num_tokens (`int`, *optional*, defaults to 24): tokens before an entry that are decoded.

        Returns:
            `list[list[Entry]]`: the entries for each of the R states; with their texts if there is a tokenizer.

        Raises:
            `ValueError`: for a text without a model, or another model than the memory's.
        """
        if model is not None:
            self.check_model(model)
        if tokenizer is None and hasattr(model, "tokenizer"):
            tokenizer = model.tokenizer
        if isinstance(keys, str):
            if model is None or tokenizer is None:
                raise ValueError("A text needs the model that reads it and its tokenizer: pass model= and tokenizer=.")
            keys = state_after(keys, model, tokenizer)
        entries = []
        for found in self.nearest({self.states[0]: keys}, n, config or self.memory_config):
            fields = zip(found.rows, found.documents, found.values, found.distances, found.weights, strict=True)
            entries.append([self._entry(*values, tokenizer, num_tokens) for values in fields])
        return entries

    def _entry(
        self,
        row: int,
        document: int,
        value: int,
        distance: float,
        weight: float,
        tokenizer: PreTrainedTokenizerBase | None,
        num_tokens: int,
    ) -> Entry:
        start = int(self.document_starts[document])
        entry = Entry(row, document, row - start + 1, value, distance, weight)
        if tokenizer is not None:
            before = self.get_values(torch.arange(max(start, row - num_tokens), row)).tolist()
            entry.text = str(tokenizer.decode(before))
            entry.token = str(tokenizer.decode([value]))
        return entry

    # ------------------------------------------------------------------ files

    def _write_from_memory(self, folder: Path) -> Config:
        files: dict[str, FileFacts] = {}
        for number, shard in enumerate(self._shards):
            files.update(write_shard(folder, number, shard))
        config = {**self.config, "content": content_digest(self._shards), "files": files}
        return self._write_approximate_from_memory(folder, config)

    def save_memory_config(self) -> None:
        """
        Write `memory_config` into the folder that this memory was loaded from; no other file changes.

        Raises:
            `ValueError`: without a folder, and if another process is changing it, or has changed it.
        """
        if self.folder is None:
            raise ValueError("This memory has no folder: save_pretrained it, and load it from there.")
        with self._changing():
            self._commit(self.folder, self._next_config())

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | os.PathLike[str],
        revision: str | None = None,
        allow_faiss_files: bool = False,
        search: str | None = None,
        verify: bool | None = None,
        **kwargs: Any,
    ) -> "KNNMemory":
        """
        Load a saved memory: files are mapped, which takes no time and hardly any memory. Nothing is unpickled.

        Args:
            name_or_path (`str` or `Path`): a folder, or a dataset repository on the Hub.
            revision (`str`, *optional*): revision of the repository.
            allow_faiss_files (`bool`, *optional*, defaults to `False`): read the file of an approximate index with
                FAISS's own parser. Allow it only for a source that you trust.
            search (`str`, *optional*): `"exact"` ignores an approximate index.
            verify (`bool`, *optional*): compare the SHA-256 of all files (`True`), of none (`False`), or of files
                up to 16 MB (default). Sizes are always compared.
            **kwargs: arguments of `huggingface_hub.snapshot_download`, such as `token` or `cache_dir`.

        Raises:
            `FileNotFoundError`: if the folder is not a complete memory.
            `ValueError`: for a format version that this release cannot read, a truncated or altered file, or a FAISS
                file without `allow_faiss_files`.
        """
        if search not in (None, "exact"):
            raise ValueError(f"search is {search!r}, expected None or 'exact'.")
        folder = find_folder(name_or_path, cls.form, allow_faiss_files and search is None, revision, **kwargs)
        return load_unchanged(folder, cls.form, lambda: cls._open(folder, allow_faiss_files, search, verify))

    @classmethod
    def _open(cls, folder: Path, allow_faiss_files: bool, search: str | None, verify: bool | None) -> "KNNMemory":
        config = read_config(folder, cls.form, verify)
        shards = [map_shard(folder, number) for number in range(len(config["shards"]))]
        for count, shard in zip(config["shards"], shards, strict=True):
            expected = (count, config["key_size"])
            if shard.keys.shape != expected or shard.keys.dtype != DTYPES[config["dtype"]]:
                found = f"{tuple(shard.keys.shape)} in {shard.keys.dtype}"
                raise ValueError(f"{folder}: a shard has keys {found}, expected {expected} in {config['dtype']}.")
            if verify:
                check_values(shard.values, config["vocab_size"])
        memory = cls(shards, config, folder)
        memory._load_approximate(allow_faiss_files, search, verify)
        return memory

    def push_to_hub(
        self,
        repo_id: str,
        commit_message: str | None = "Upload KNNMemory",
        private: bool | None = None,
        token: str | bool | None = None,
        model: str | None = None,
        license: str | None = None,
        **commit_options: Any,
    ) -> "CommitInfo":
        """
        Share the memory as a dataset repository, with a card, in one commit.

        An interrupted push leaves the repository unchanged. Files of an earlier memory are deleted.

        Args:
            repo_id (`str`): `namespace/name`, or a name in your own namespace; created if it does not exist.
            commit_message, private, token: see `PreTrainedModel.push_to_hub`.
            model (`str`, *optional*): repository of the model that it belongs to, for the card.
            license (`str`, *optional*): of the texts; defaults to the one on the repository's card, or `unknown`.
            **commit_options: `commit_description`, `revision`, `create_pr`.

        Raises:
            `ValueError`: if another process changed the folder since this memory was loaded.
            `HfHubHTTPError`: if the Hub refuses.
        """
        repo_id = make_repo(repo_id, private, token, self.form.repo_type)
        card = self._card(repo_id, model, license)
        return self._push(repo_id, card, commit_message=commit_message, token=token, **commit_options)

    def _card(self, repo_id: str, model: str | None, license: str | None) -> str:
        cards = package_memory_cards()
        if cards is None:
            summary = f"A kNN memory of {len(self):,} tokens: `model.load_memory` loads it."
            return plain_card(repo_id, summary, license, ["token-memory"], viewer=False)
        return cards.memory_card({**self.config, "documents": len(self.document_starts)}, repo_id, model, license)


def _package_building() -> ModuleType:
    """Return the module [`datastore_build_cosup`]; `ImportError` in a process that has only a checkpoint's code."""
    try:
        from modeling_cosup import datastore_build_cosup
    except ImportError:
        raise ImportError(
            "To build a memory, install the package: pip install cosup. Loading one needs only the checkpoint."
        ) from None
    return datastore_build_cosup


def new_config(
    settings: dict[str, Any],
    shards: list[KeyShard],
    memory_config: MemoryConfig | None,
    files: dict[str, FileFacts] | None = None,
) -> Config:
    """Return the config of a memory that was just built; `ValueError` if it has no entry."""
    if not any(map(len, shards)):
        raise ValueError("There are no keys: a memory needs at least one entry, the second token of a text.")
    return {
        "memory_type": MEMORY_TYPE,
        "format_version": MEMORY_FORMAT.version,
        "generation": 0,
        "key_size": shards[0].keys.shape[1],
        "vocab_size": settings["vocab_size"],
        "dtype": settings["dtype"],
        "fingerprint": settings["fingerprint"],
        "shards": [len(shard) for shard in shards],
        "content": None,  # see content_digest
        "memory_config": (memory_config or MemoryConfig()).to_dict(),
        "approximate": None,
        "files": files or {},
    }


def state_after(text: str, model: Any, tokenizer: PreTrainedTokenizerBase) -> torch.Tensor:
    """Return the state of Gen `(1, d)` from which the token after a text is predicted."""
    ids = document_ids(text, tokenizer)
    if not ids:
        raise ValueError("The text has no token: nothing predicts the next one.")
    # any token may be the next one: the state does not depend on it
    documents = [[*ids, ids[0]]]
    max_length, stride = window_size(model, None, None)
    *_, last = token_states(model, documents, max_length=max_length, stride=stride, batch_size=1)
    return last.keys[-1:]


def check_values(values: torch.Tensor, vocab_size: int) -> None:
    """Raise `ValueError` for token ids outside 0 to `vocab_size - 1`."""
    if values.is_floating_point():
        raise ValueError(f"values are of {values.dtype}, expected integers: token ids.")
    wrong = values[(values < 0) | (values >= vocab_size)]
    if len(wrong):
        raise ValueError(f"values hold {wrong[:5].tolist()}, which are no token ids: the vocabulary has {vocab_size}.")
