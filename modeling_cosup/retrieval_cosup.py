"""The passage index: a corpus of any size in Emb_seq's space, built in little memory, searched exactly or by FAISS."""

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from tqdm.auto import tqdm
from transformers.utils import logging

from .encoding_cosup import evaluating
from .folder_store_cosup import find_folder, load_unchanged
from .folders_cosup import Config, check_file, dtype_name, put_in_place, sweep, write_config
from .hub_cosup import make_repo
from .index_approximate_cosup import read_approximate, set_search_options
from .index_build_cosup import Encoder, Passages, ShardBuilder, read_shards, report_cut
from .index_files_cosup import Shard, map_shard
from .index_search_cosup import ApproximateSearch
from .index_searchable_cosup import SearchableStore
from .index_store_cosup import map_id_table, new_config
from .plain_card_cosup import package_cards, plain_card
from .retriever_cosup import CoSupModel, check_fingerprint
from .shard_build_cosup import build_of, collect, finish, unfinished_folder, write_new_shard, write_shards
from .tokenization_cosup import encode_passages_for_gen, special_ids

try:
    import pyarrow as pa
except ImportError:
    pa = None

if TYPE_CHECKING:
    from huggingface_hub import CommitInfo
    from transformers import PreTrainedTokenizerBase

logger = logging.get_logger(__name__)

SHARD_SIZE = 32768  # passages: half a gigabyte at 4,096 dimensions, and minutes of work


class PassageIndex(SearchableStore):
    """
    A corpus in Emb_seq's space, which `generate(retriever=...)` searches.

    Made by [`PassageIndex.build`] or [`PassageIndex.from_pretrained`]. If the index lives in a folder, `add`, `delete`
    and `train_approximate` update its files; an index in memory must be saved. A passage's row is its place in the
    corpus, and never changes.

    Raises:
        `ImportError`: if pyarrow is missing.
    """

    def __init__(self, shards: list[Shard], config: Config, folder: Path | None = None) -> None:
        require_packages()
        super().__init__(shards, config, folder)

    # ------------------------------------------------------------------ building

    @classmethod
    def build(
        cls,
        passages: Any,
        model: CoSupModel,
        tokenizer: "PreTrainedTokenizerBase | None" = None,
        save_directory: str | os.PathLike[str] | None = None,
        batch_size: int = 256,
        max_tokens_per_batch: int | None = None,
        shard_size: int = SHARD_SIZE,
        dtype: str | torch.dtype = "float32",
        num_processes: int = 1,
        process_index: int = 0,
        show_progress_bar: bool = True,
        encoder: Encoder | None = None,
    ) -> "PassageIndex | Any":  # None with several processes; Any, so that other callers need no check
        """
        Embed a corpus.

        With `save_directory` the index is built there shard by shard, which takes the memory of one shard and 8 bytes
        per passage. After a crash the same call resumes at the first incomplete shard. The folder gets its name when
        it is complete; an earlier index of that name stays until then.

        Args:
            passages: dictionaries `{"id", "title", "text"}`. `title` may be empty or missing. A JSON object
                `"metadata"` may say where a passage comes from. They come as a list or another iterable, as a
                `datasets` dataset, streamed or not, or as the path of a file: JSON Lines (`.gz`) or Parquet. A corpus
                that can be read twice is checked before anything is embedded, any other as it streams.
            model ([`CoSupForCausalLM`]): with Emb_seq in memory; used on its device and in its dtype. With an
                `encoder`, only its settings, tokenizers and fingerprint are used.
            tokenizer (`PreTrainedTokenizerBase`, *optional*): becomes the model's tokenizer; defaults to its own.
            save_directory (`str` or `Path`, *optional*): folder of the index; without it the index is in memory.
            batch_size (`int`, *optional*, defaults to 256): maximum number of passages in a forward.
            max_tokens_per_batch (`int`, *optional*): maximum number of tokens in a forward, with padding; defaults to
                4,096 on a CPU, 32,768 elsewhere. The passages of a shard are sorted by length.
            shard_size (`int`, *optional*, defaults to 32768): passages per shard.
            dtype (`str` or `torch.dtype`, *optional*, defaults to `"float32"`): of the stored
                embeddings: `"float32"`, or `"float16"` or `"bfloat16"` in half the space. The search is in float32.
            num_processes (`int`, *optional*, defaults to 1): number of processes that build this index together, in a
                `save_directory` that all can access. When all are done, one of them calls [`PassageIndex.merge`].
            process_index (`int`, *optional*, defaults to 0): number of this process. It builds the shards
                `process_index`, `process_index + num_processes`, …
            show_progress_bar (`bool`, *optional*, defaults to `True`): show tqdm bars in process 0, for its passages.
            encoder (`Callable`, *optional*): runs this model's Emb_seq elsewhere. It gets the token ids of the
                passages of a shard, BOS and EOS included, and yields `(rows, embeddings)`: places in that list, each
                once in all, and a `torch.FloatTensor` of shape `(len(rows), h)`, which gets unit length here if the
                similarity is the cosine.

        Returns:
            [`PassageIndex`], or `None` with several processes.

        Raises:
            `ValueError`: for a passage with a missing field, an empty text or an id that is already in the corpus
                (names its place); for an embedding that is not finite (names its passage); if an `encoder` leaves out
                passages (names them) or gives embeddings of another shape; or if the unfinished build was begun by
                another model or with other settings (names the differences).
            `OSError`: if the folder cannot be written, or the disk is full.
        """
        require_packages()
        if save_directory is None and num_processes > 1:
            raise ValueError("Several processes can only build an index in files: give save_directory.")
        if not 0 <= process_index < num_processes:
            raise ValueError(f"process_index is {process_index}, expected one of 0 to {num_processes - 1}.")
        if tokenizer is not None:
            model.tokenizer = tokenizer
        builder = ShardBuilder(model, dtype, batch_size, max_tokens_per_batch, encoder)
        settings = {
            "fingerprint": model.fingerprint(),
            "embedding_size": model.config.embedding_size,
            "dtype": dtype_name(dtype),
            "shard_size": shard_size,
        }
        show_progress_bar = show_progress_bar and process_index == 0
        check = special_text_check(model)
        if save_directory is None:
            total, shards = read_shards(passages, shard_size, show_progress_bar, check)
            with _embedding_bar(total, show_progress_bar) as bar, evaluating(model):
                in_memory = [builder.make(shard, bar) for shard in shards]
            report_cut(builder.num_cut, model.config.max_passage_length)
            return cls(in_memory, new_config(settings, in_memory))
        save_directory = cls.check_save_directory(save_directory)
        with build_of(save_directory, settings, num_processes, process_index) as folder:
            total, shards = read_shards(passages, shard_size, show_progress_bar, check)
            if total is not None:
                first_rows = range(process_index * shard_size, total, num_processes * shard_size)
                total = sum(min(shard_size, total - first_row) for first_row in first_rows)  # of this process
            with _embedding_bar(total, show_progress_bar) as bar, evaluating(model):
                num_shards = write_shards(folder, shards, builder, bar, num_processes, process_index)
            finish(folder, num_shards, settings, num_processes)
            return cls.merge(save_directory) if num_processes == 1 else None

    @classmethod
    def merge(cls, save_directory: str | os.PathLike[str]) -> "PassageIndex":
        """
        Combine the shards that all processes of a build have finished into an index, and give it its name.

        Returns:
            [`PassageIndex`].

        Raises:
            `FileNotFoundError`: if a process has not finished.
            `ValueError`: if an id occurs in two shards, the processes read different corpora, or a file is damaged.
        """
        save_directory = cls.check_save_directory(save_directory)
        folder = unfinished_folder(save_directory)
        settings, markers, files = collect(folder)
        report_cut(sum(marker["num_cut"] for marker in markers), settings["fingerprint"]["max_passage_length"])
        shards = [map_shard(folder, number) for number in range(len(markers))]
        config = new_config(settings, shards, files)
        index = cls(shards, config, folder)
        index._write_id_table(folder, config, shards)
        index._check_ids(map_id_table(folder, config))
        write_config(folder, config, cls.form)
        put_in_place(folder, save_directory)
        sweep(save_directory, config, cls.form)
        return cls.from_pretrained(save_directory, verify=False)

    def check_model(self, model: CoSupModel) -> None:
        """
        Raise unless `model` makes queries in the embedding space of this index.

        Raises:
            `ValueError`: names every setting that differs, with both values.
        """
        check_fingerprint(self.fingerprint, model)

    # ------------------------------------------------------------------ changing

    def add(
        self,
        passages: Any,
        model: CoSupModel,
        batch_size: int = 256,
        max_tokens_per_batch: int | None = None,
        show_progress_bar: bool = True,
        shard_size: int = SHARD_SIZE,
    ) -> None:
        """
        Add passages after the last row. An approximate index is extended, not trained again; its recall is no longer
        known, see [`~PassageIndex.measure_recall`].

        A folder changes only when all passages are embedded; if the process dies before, the index is unchanged.

        Args: as for [`PassageIndex.build`].

        Raises:
            `ValueError`: as in `build`, for an id that is already in the index, and for another model than the one
                that built it. Then nothing is added.
        """
        self.check_model(model)
        if self.config["approximate"] is not None and self._approximate is None:
            raise ValueError(
                "The approximate index of this folder was not loaded and cannot be extended: load it with"
                " allow_faiss_files=True."
            )
        builder = ShardBuilder(model, self.config["dtype"], batch_size, max_tokens_per_batch)
        check = special_text_check(model)
        total, new_shards = read_shards(passages, shard_size, show_progress_bar, check, self._ids_held)
        shards = list(self._shards)
        with self._changing():
            config = self._next_config()
            with _embedding_bar(total, show_progress_bar) as bar, evaluating(model):
                for new_passages in new_shards:
                    shards.append(self._make_shard(new_passages, len(shards), config, builder, bar))
            config["shards"] = [len(shard) for shard in shards]
            approximate = self._extend_approximate(shards, config)
            if self.folder is not None:
                self._write_id_table(self.folder, config, shards)
                self._commit(self.folder, config)
        self.config, self._approximate = config, approximate
        self._id_table = None if self.folder is None else map_id_table(self.folder, config)
        try:
            self._set_shards(shards)
        except (RuntimeError, ValueError) as error:  # the passages are added: what fails is their copy on the device
            logger.warning(f"The index is searched from its files again, because its copy on a device fails: {error}")
            self.to(None)
        report_cut(builder.num_cut, model.config.max_passage_length)

    def _ids_held(self, ids: list[str]) -> list[str]:
        """Return the ids that are in the index."""
        return [ids[i] for i in np.flatnonzero(self.find(ids) >= 0)]

    def _make_shard(self, passages: Passages, number: int, config: Config, builder: ShardBuilder, bar: tqdm) -> Shard:
        """Embed passages into a new shard, in memory, or in files that are then listed in the config."""
        if self.folder is None:
            return builder.make(passages, bar)
        config["files"].update(write_new_shard(self.folder, number, passages, builder, bar))
        return map_shard(self.folder, number)

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
        Load a saved index: files are mapped, which takes no time and hardly any memory. Nothing is unpickled.

        Args:
            name_or_path (`str` or `Path`): a folder, or a dataset repository on the Hub.
            revision (`str`, *optional*): revision of the repository.
            allow_faiss_files (`bool`, *optional*, defaults to `False`): read the file of an approximate index with
                FAISS's own parser. Allow it only for a source that you trust.
            search (`str`, *optional*): `"exact"` ignores an approximate index.
            verify (`bool`, *optional*): compare the SHA-256 of all files (`True`), of none (`False`), or of files
                up to 16 MB (default). Sizes are always compared.
            **kwargs: arguments of `huggingface_hub.snapshot_download`.

        Raises:
            `FileNotFoundError`: if the folder is not a complete index.
            `ValueError`: for a format version that this release cannot read, a truncated or altered file, or a FAISS
                file without `allow_faiss_files`.
        """
        require_packages()
        if search not in (None, "exact"):
            raise ValueError(f"search is {search!r}, expected None or 'exact'.")
        folder = find_folder(name_or_path, cls.form, allow_faiss_files and search is None, revision, **kwargs)
        options = allow_faiss_files, search, verify, str(name_or_path)
        return load_unchanged(folder, cls.form, lambda: cls._open(folder, *options))

    @classmethod
    def _open(
        cls, folder: Path, allow_faiss_files: bool, search: str | None, verify: bool | None, name: str
    ) -> "PassageIndex":
        """Load the index of a folder, with its approximate index if there is one and it is not ignored."""
        index = cls._load(folder, verify)
        if index.config["approximate"] is None:
            return index
        faiss_file = index.config["approximate"]["file"]
        if search == "exact":
            if not (folder / faiss_file).exists():
                files = {name: facts for name, facts in index.config["files"].items() if name != faiss_file}
                index.config = {**index.config, "approximate": None, "files": files}
            return index
        if not allow_faiss_files:
            raise ValueError(
                f"{name} is searched through a FAISS file: pass allow_faiss_files=True if you trust it, or"
                " search='exact'."
            )
        check_file(folder / faiss_file, index.config["files"][faiss_file], cls.form, verify)
        faiss_index = read_approximate(folder / faiss_file, index.num_rows, index.config["embedding_size"])
        index._approximate = ApproximateSearch(faiss_index)
        index._search_options = dict(index.config["approximate"]["search_options"])
        set_search_options(faiss_index, index._search_options)
        return index

    def push_to_hub(
        self,
        repo_id: str,
        commit_message: str | None = "Upload PassageIndex",
        commit_description: str | None = None,
        private: bool | None = None,
        token: str | bool | None = None,
        revision: str | None = None,
        create_pr: bool | None = False,
        model: str | None = None,
        license: str | None = None,
    ) -> "CommitInfo":
        """
        Share this index as a dataset repository, with a card, in one commit. Load it with `from_pretrained` or
        `model.load_index`.

        An index in a folder is uploaded from there. An interrupted push leaves the repository unchanged; the same call
        then completes it, and sends only files that have not arrived. Files of an earlier index are deleted.

        Args:
            repo_id (`str`): `namespace/name`, or a name in your own namespace; created if it does not exist.
            commit_message, commit_description, private, token, revision, create_pr: see `PreTrainedModel.push_to_hub`.
            model (`str`, *optional*): repository of the model that built the index, for the card.
            license (`str`, *optional*): of the passages; defaults to the one on the repository's card, or `unknown`.

        Returns:
            `huggingface_hub.CommitInfo`.

        Raises:
            `ValueError`: if another process changed the folder since this index was loaded, or the Hub finds the
                card's metadata invalid.
            `HfHubHTTPError`: if the Hub refuses.
        """
        repo_id = make_repo(repo_id, private, token, "dataset")
        return self._push(
            repo_id,
            _card(self.config, len(self), repo_id, model, license),
            commit_message=commit_message,
            commit_description=commit_description,
            token=token,
            revision=revision,
            create_pr=create_pr,
        )


def special_text_check(model: CoSupModel) -> Callable[[dict[str, Any]], None]:
    """
    Return a check that raises a `ValueError` for a passage with a special token that cannot be read as text.

    It encodes only passages that hold a special token, so a corpus can be checked before anything is embedded.
    """
    tokenizers = {id(tokenizer): tokenizer for tokenizer in (model.tokenizer, model.emb_seq_tokenizer)}.values()
    tokens: set[str] = set()
    for tokenizer in tokenizers:
        tokens.update(tokenizer.convert_ids_to_tokens(list(special_ids(tokenizer))))
    pattern = re.compile("|".join(map(re.escape, sorted(tokens))) or "(?!)")

    def check(passage: dict[str, Any]) -> None:
        if pattern.search(passage["title"]) or pattern.search(passage["text"]):
            for tokenizer in tokenizers:
                encode_passages_for_gen(tokenizer, [passage], model.config)

    return check


def _embedding_bar(total: int | None, show_progress_bar: bool) -> tqdm:
    """Return a progress bar that counts embedded passages."""
    options = {"desc": "Embedding passages", "unit": " passages", "smoothing": 0}
    return tqdm(total=total, disable=not show_progress_bar, **options)


def _card(config: Config, num_passages: int, repo_id: str, model: str | None, license: str | None) -> str:
    cards = package_cards()
    if cards is None:
        summary = f"A passage index of a CoSup model: {num_passages:,} passages."
        return plain_card(repo_id, summary, license, ["passage-index"], viewer=False)
    return cards.index_card(config, num_passages, repo_id, model, license)


def require_packages() -> None:
    """Raise an `ImportError` without pyarrow, which a passage index needs; exact search works without FAISS."""
    if pa is None:
        raise ImportError("A passage index needs pyarrow: pip install pyarrow.")
