"""The passage index: a corpus of any size in Emb_seq's space, built in flat memory, searched exactly or through FAISS."""

import functools
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from tqdm.auto import tqdm
from transformers.utils import logging

from .hub_cosup import CARD_FILE, make_repo, push_files
from .index_build_cosup import (
    ShardBuilder,
    begin,
    collect,
    evaluating,
    finish,
    read_shards,
    unfinished_folder,
    write_new_shard,
    write_shards,
)
from .index_files_cosup import (
    CONFIG_FILE,
    FAISS_PATTERN,
    FILE_PATTERNS,
    check_file,
    check_save_directory,
    map_shard,
    put_in_place,
    signed,
    sweep,
    write_config,
)
from .index_search_cosup import ApproximateSearch, read_approximate
from .index_searchable_cosup import SearchableStore
from .index_store_cosup import find_folder, map_id_table, new_config
from .plain_card_cosup import package_cards, plain_card
from .retriever_cosup import check_fingerprint

try:
    import faiss
except ImportError:
    faiss = None  # type: ignore[assignment]
try:
    import pyarrow as pa
except ImportError:
    pa = None

logger = logging.get_logger(__name__)

SHARD_SIZE = 32768  # passages: half a gigabyte at 4,096 dimensions, minutes of work


class PassageIndex(SearchableStore):
    """
    A corpus in Emb_seq's space: what `generate(retriever=...)` searches.

    Made by [`PassageIndex.build`] or [`PassageIndex.from_pretrained`]. An index that lives in a folder keeps there what `add`, `delete` and
    `train_approximate` do; one in memory keeps it until it is saved. A passage's row is its place in the corpus, and stays.

    Raises:
        `ImportError`: when faiss or pyarrow is missing.
    """

    def __init__(self, shards, config, folder=None):
        _require_packages()
        super().__init__(shards, config, folder)

    # ------------------------------------------------------------------ building

    @classmethod
    def build(
        cls,
        passages,
        model,
        tokenizer=None,
        save_directory=None,
        batch_size=256,
        max_tokens_per_batch=None,
        shard_size=SHARD_SIZE,
        dtype="float32",
        num_processes=1,
        process_index=0,
        show_progress_bar=True,
    ):
        """
        Embed a corpus.

        With `save_directory` the index is made there, shard by shard, in the memory of one shard and 8 bytes a passage; after a crash the same call goes
        on at the first shard that is not complete. The folder gets its name when it is whole; an index that stood there stays until then.

        Args:
            passages: `{"id", "title", "text"}` each; `title` may be empty or missing. A list or another iterable, a `datasets` data set, streamed or not, or
                the path of a file: JSON Lines (`.gz`) or Parquet. What can be read twice is checked before anything is embedded, the rest as it streams.
            model ([`CoSupForCausalLM`]): with Emb_seq in memory; it runs where it is, in its dtype.
            tokenizer (`PreTrainedTokenizerBase`, *optional*): Gen's; defaults to the model's own.
            save_directory (`str` or `Path`, *optional*): folder of the index; without it the index is in memory.
            batch_size (`int`): most passages of a forward.
            max_tokens_per_batch (`int`, *optional*): most tokens of a forward, padding included; defaults to 4,096 on a CPU, 32,768 elsewhere. The passages
                of a shard are sorted by length.
            shard_size (`int`): passages of a shard.
            dtype (`str`): of the stored embeddings: `"float32"`, or `"float16"` or `"bfloat16"` in half the space, searched in float32.
            num_processes, process_index (`int`): this process makes the shards `process_index`, `process_index + num_processes`, …, in a `save_directory` that
                all see; then, once all are done, one of them calls [`PassageIndex.merge`].
            show_progress_bar (`bool`): tqdm bars, on process 0: of the passages that it embeds.

        Returns:
            [`PassageIndex`], or `None` with several processes.

        Raises:
            `ValueError`: names the place of a passage with a missing field, an empty text or an id that was there before; a passage whose embedding is not
                finite; or what differs when another model, or other settings, began the unfinished build.
            `OSError`: when the folder cannot be written, or the disk is full.
        """
        _require_packages()
        if save_directory is None and num_processes > 1:
            raise ValueError("Several processes build an index in files: give save_directory.")
        if not 0 <= process_index < num_processes:
            raise ValueError(f"process_index is {process_index}, expected one of 0 to {num_processes - 1}.")
        if tokenizer is not None:
            model.tokenizer = tokenizer
        builder = ShardBuilder(model, dtype, batch_size, max_tokens_per_batch)
        size = model.config.embedding_size
        settings = {
            "fingerprint": model.fingerprint(),
            "embedding_size": size,
            "dtype": dtype,
            "shard_size": shard_size,
        }
        if save_directory is not None:
            save_directory = check_save_directory(save_directory)
            begin(unfinished_folder(save_directory), settings)
        total, shards = read_shards(passages, shard_size, show_progress_bar and process_index == 0)
        own = (
            None
            if total is None
            else sum(
                min(shard_size, total - start)
                for start in range(process_index * shard_size, total, num_processes * shard_size)
            )
        )
        bar = tqdm(
            total=own,
            desc="Embedding passages",
            unit=" passages",
            smoothing=0,
            disable=not show_progress_bar or process_index > 0,
        )
        with bar, evaluating(model):
            if save_directory is None:
                made = [builder.make(shard, bar) for shard in shards]
                return cls(made, new_config(settings, made))
            num_shards = write_shards(
                unfinished_folder(save_directory), shards, builder, bar, shard_size, num_processes, process_index
            )
        finish(unfinished_folder(save_directory), num_shards, settings, num_processes)
        return cls.merge(save_directory) if num_processes == 1 else None

    @classmethod
    def merge(cls, save_directory):
        """
        Make an index of the shards that all processes of a build have finished, and give it its name.

        Returns:
            [`PassageIndex`].

        Raises:
            `FileNotFoundError`: when a process is not done.
            `ValueError`: when an id occurs in two shards, the processes read different corpora, or a file was damaged.
        """
        save_directory = check_save_directory(save_directory)
        folder = unfinished_folder(save_directory)
        settings, shards, files = collect(folder)
        config = new_config(settings, shards, files)
        index = cls(shards, config, folder)
        index._write_id_table(folder, config, shards)
        index._check_ids(map_id_table(folder, config))
        write_config(folder, config)
        put_in_place(folder, save_directory)
        sweep(save_directory, config)
        return cls.from_pretrained(save_directory, verify=False)

    def check_model(self, model: Any) -> None:
        """
        Raise unless `model` searches the space that this index holds.

        Raises:
            `ValueError`: names every setting that differs, with both values.
        """
        check_fingerprint(self.fingerprint, model)

    # ------------------------------------------------------------------ changing

    def add(
        self, passages, model, batch_size=256, max_tokens_per_batch=None, show_progress_bar=True, shard_size=SHARD_SIZE
    ):
        """
        Add passages after the last row; an approximate index is extended, not trained again.

        In a folder this is kept when all are embedded; a process that dies before leaves the index as it was.

        Args: those of [`PassageIndex.build`].

        Raises:
            `ValueError`: as in `build`, for an id that is already in the index, and for a model that did not make it. Then nothing is added.
        """
        self.check_model(model)
        if self.config["approximate"] is not None and self._approximate is None:
            raise ValueError(
                "The approximate index of this folder was not loaded and could not be extended: load it with allow_faiss_files=True."
            )
        builder = ShardBuilder(model, self.config["dtype"], batch_size, max_tokens_per_batch)
        total, cut = read_shards(
            passages, shard_size, show_progress_bar, lambda ids: [ids[i] for i in np.flatnonzero(self.find(ids) >= 0)]
        )
        shards = list(self._shards)
        with self._changing():
            config = self._next_config()
            with (
                tqdm(
                    total=total,
                    desc="Embedding passages",
                    unit=" passages",
                    smoothing=0,
                    disable=not show_progress_bar,
                ) as bar,
                evaluating(model),
            ):
                for new in cut:
                    if self.folder is None:
                        shards.append(builder.make(new, bar))
                    else:
                        config["files"].update(write_new_shard(self.folder, len(shards), new, builder, bar))
                        shards.append(map_shard(self.folder, len(shards)))
            config["shards"] = [len(shard) for shard in shards]
            approximate = self._extend_approximate(shards, config)
            if self.folder is not None:
                self._write_id_table(self.folder, config, shards)
                self._keep(config)
        self.config, self._approximate = config, approximate
        self._id_table = None if self.folder is None else map_id_table(self.folder, config)
        self._set_shards(shards)

    @functools.wraps(SearchableStore.train_approximate)
    def train_approximate(self, *args, **kwargs):
        with self._changing():
            return super().train_approximate(*args, **kwargs)

    # ------------------------------------------------------------------ files

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | os.PathLike[str],
        revision: str | None = None,
        allow_faiss_files: bool = False,
        search: str | None = None,
        verify: bool | None = None,
        **kwargs: Any,
    ) -> "PassageIndex":
        """
        Load a saved index: everything is mapped, so that it takes no time and hardly any memory. Nothing is unpickled.

        Args:
            name_or_path (`str` or `Path`): a folder, or a dataset repository on the Hub.
            revision (`str`, *optional*): of the repository.
            allow_faiss_files (`bool`): read the file of an approximate index, by FAISS's own parser: only of a source that you trust.
            search (`str`, *optional*): `"exact"` leaves an approximate index alone.
            verify (`bool`, *optional*): compare the SHA-256 of all files (`True`), of none (`False`), or of those below 16 MB (default). Sizes always are.
            **kwargs: for `huggingface_hub.snapshot_download`.

        Raises:
            `FileNotFoundError`: when the folder is not a complete index.
            `ValueError`: for a format version that this release does not read, a truncated or altered file, or an approximate index that may not be read.
        """
        _require_packages()
        if search not in (None, "exact"):
            raise ValueError(f"search is {search!r}, expected None or 'exact'.")
        folder = find_folder(name_or_path, allow_faiss_files and search is None, revision, **kwargs)
        index = cls._load(folder, verify)
        approximate = index.config["approximate"]
        if search == "exact" and approximate is not None and not (folder / approximate["file"]).exists():
            index.config = {
                **index.config,
                "approximate": None,
                "files": {k: v for k, v in index.config["files"].items() if k != approximate["file"]},
            }
        if approximate is None or search == "exact":
            return index
        if not allow_faiss_files:
            raise ValueError(
                f"{name_or_path} is searched through a FAISS file: pass allow_faiss_files=True if you trust it, or search='exact'."
            )
        check_file(folder / approximate["file"], index.config["files"][approximate["file"]], verify)
        index._approximate = ApproximateSearch(
            read_approximate(folder / approximate["file"], index.num_rows, index.config["embedding_size"])
        )
        index._search_options = {}
        return index

    def push_to_hub(
        self,
        repo_id,
        commit_message="Upload PassageIndex",
        commit_description=None,
        private=None,
        token=None,
        revision=None,
        create_pr=False,
        model=None,
        license=None,
    ):
        """
        Share this index as a dataset repository, with a card, in one commit; `from_pretrained` and `model.load_index` get it back, by revision if need be.

        What lives in a folder is uploaded from there. A push that is cut off leaves the repository as it was; the same call goes on, and files that had
        arrived are not sent again. Files of an index that was there before are deleted.

        Args:
            repo_id (`str`): `namespace/name`, or a name in your own; created if it does not exist.
            commit_message, commit_description, private, token, revision, create_pr: as in `PreTrainedModel.push_to_hub`.
            model (`str`, *optional*): repository of the model that made it, for the card.
            license (`str`, *optional*): identifier of the passages' licence; the card says `unknown` otherwise.

        Returns:
            `huggingface_hub.CommitInfo`.

        Raises:
            `ValueError`: when another process changed the folder since this index was loaded, or the Hub finds the card's metadata invalid.
            `HfHubHTTPError`: when the Hub refuses.
        """
        hub = {"commit_message": commit_message, "commit_description": commit_description, "token": token}
        hub |= {"revision": revision, "create_pr": create_pr, "repo_type": "dataset"}
        repo_id = make_repo(repo_id, private, token, "dataset")
        with tempfile.TemporaryDirectory() as folder:
            index = self
            if self.folder is None:
                self.save_pretrained(Path(folder) / "index")
                index = self.from_pretrained(Path(folder) / "index", search="exact", verify=False)
            else:
                self._check_unchanged()
            config = index.config
            files = {name: index.folder / name for name in config["files"]}
            files[CONFIG_FILE] = (json.dumps(signed(config), indent=2) + "\n").encode()
            files[CARD_FILE] = _card(config, len(self), repo_id, model, license).encode()
            return push_files(files, repo_id, [*FILE_PATTERNS, FAISS_PATTERN], **hub)


def _card(config, num_passages, repo_id, model, license):
    cards = package_cards()
    if cards is None:
        summary = f"A passage index of a CoSup model: {num_passages:,} passages."
        return plain_card(repo_id, summary, license, ["passage-index"], viewer=False)
    return cards.index_card(config, num_passages, repo_id, model, license)


def _require_packages():
    missing = [pip for module, pip in ((faiss, "faiss-cpu"), (pa, "pyarrow")) if module is None]
    if missing:
        raise ImportError(
            f"A passage index needs {' and '.join(missing)}: pip install {' '.join(missing)} (on a GPU machine faiss-gpu)."
        )
