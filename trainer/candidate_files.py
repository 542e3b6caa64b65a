"""
Indexes in the output folder of a training, which all ranks build together.

An index has a folder of its own, which gets its name when it is complete: a process that dies leaves the earlier one.
The passages stay the same, so only the embeddings of a later index are new. Its other files are links to the files of
the first index. The token ids that Emb_seq reads of each passage are kept in files next to the indexes.

A training removes the indexes of its steps; an evaluation outside of a training removes its own. Neither touches
anything else in the folder.
"""

import contextlib
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from tqdm.auto import tqdm

from modeling_cosup import CoSupForCausalLM, PassageIndex
from modeling_cosup.encoding_cosup import evaluating
from modeling_cosup.files_cosup import replacing_file
from modeling_cosup.folders_cosup import (
    FileFacts,
    create_tensors,
    read_tensors,
    seal,
    write_config,
    write_tensors,
)
from modeling_cosup.index_build_cosup import ShardBuilder
from modeling_cosup.index_files_cosup import INDEX_FORMAT, Shard, map_shard, shard_files
from modeling_cosup.retrieval_cosup import SHARD_SIZE
from modeling_cosup.tokenization_cosup import add_bos_and_eos, encode_passages_for_emb_seq

from .distributed import failing_together, gather_objects, rank, world_size
from .files import link_or_copy

FOLDER = "candidates"  # in the output folder, and in a checkpoint
TOKENS = "tokens"  # folder of what Emb_seq reads
EVALUATION = "evaluation"  # name of the index of an evaluation outside of a training
NUM_SHARDS = 32  # of a small corpus: ranks have nearly equal shares of it
SMALLEST_SHARD = 256  # passages: as many as a forward takes


class IndexFolders:
    """
    The indexes of a training, in `<output_dir>/candidates`. All ranks call the same methods.

    Args:
        output_dir (`Path`): of the training, on a file system that all ranks share.
        group (`ProcessGroup`, *optional*): for messages between the hosts of all ranks.
        show_progress_bar (`bool`): whether rank 0 shows how many passages are embedded.
    """

    def __init__(
        self, output_dir: Path, group: dist.ProcessGroup | None = None, show_progress_bar: bool = False
    ) -> None:
        self.root = output_dir / FOLDER
        self.group = group
        self.show_progress_bar = show_progress_bar and rank() == 0

    def build(
        self, passages: Any, num_passages: int, model: CoSupForCausalLM, name: str, index_factory: str | None
    ) -> PassageIndex:
        """
        Build an index.

        Args:
            passages: what [`PassageIndex.build`] takes; the same on all ranks.
            num_passages (`int`): their number.
            model ([`CoSupForCausalLM`]): with the weights of the index.
            name (`str`): of its folder.
            index_factory (`str`, *optional*): see [`PassageIndex.train_approximate`].
        """
        folder = self.root / name
        with failing_together(self.group):
            if rank() == 0:
                self.root.mkdir(parents=True, exist_ok=True)
                self._remove(f".{name}.unfinished")
                if name != EVALUATION:  # which may disturb no training
                    self._remove_tokens()
        with failing_together(self.group):
            PassageIndex.build(
                passages,
                model,
                save_directory=folder,
                shard_size=min(SHARD_SIZE, max(SMALLEST_SHARD, -(-num_passages // NUM_SHARDS))),
                num_processes=world_size(),
                process_index=rank(),
                show_progress_bar=self.show_progress_bar,
            )
        with failing_together(self.group):
            if rank() == 0 and world_size() > 1:
                PassageIndex.merge(folder)
        return self._finish(folder, index_factory)

    def build_again(
        self, index: PassageIndex, model: CoSupForCausalLM, name: str, index_factory: str | None
    ) -> PassageIndex:
        """Build a new index of the passages of `index`, which this class has built, with the model's weights now."""
        folder = self.root / name
        unfinished = folder.with_name(f".{name}.unfinished")
        source = index.folder
        assert source is not None
        with failing_together(self.group):
            if rank() == 0:
                PassageIndex.check_save_directory(folder)
                self._remove(unfinished.name)
                unfinished.mkdir(parents=True)
                (self.root / TOKENS).mkdir(exist_ok=True)
        with failing_together(self.group):
            facts = self._embed_shards(index.config["shards"], source, model, unfinished)
        facts_of_ranks = gather_objects(facts, self.group)
        with failing_together(self.group):
            if rank() == 0:
                files = {}
                for file, file_facts in index.config["files"].items():
                    if file.startswith(("passages-", "ids-")):
                        link_or_copy(source / file, unfinished / file)
                        files[file] = file_facts
                for file_facts in facts_of_ranks:
                    files |= file_facts
                changes = {"fingerprint": model.fingerprint(), "approximate": None, "files": files}
                write_config(unfinished, {**index.config, **changes}, INDEX_FORMAT)
                self._remove(name)
                os.replace(unfinished, folder)
        return self._finish(folder, index_factory)

    def _embed_shards(
        self, counts: Sequence[int], source: Path, model: CoSupForCausalLM, unfinished: Path
    ) -> dict[str, FileFacts]:
        """Write the embeddings of this rank's shards; return the sizes and checksums of the files."""
        builder = ShardBuilder(model)
        numbers = range(rank(), len(counts), world_size())
        total = sum(counts[number] for number in numbers)
        files = {}
        with (
            evaluating(model),
            tqdm(total=total, desc="Embedding passages", unit=" passages", disable=not self.show_progress_bar) as bar,
        ):
            for number in numbers:
                shard = map_shard(source, number)
                path = unfinished / shard_files(number)[0]
                shape = (len(shard), model.config.embedding_size)
                embeddings = create_tensors(path, {"embeddings": (shape, torch.float32)})["embeddings"]
                token_ids = self._token_ids(number, shard, model)
                builder.embed(shard.passages["id"].to_pylist(), token_ids, embeddings, bar)
                files[path.name] = seal(path)
        return files

    def _token_ids(self, number: int, shard: Shard, model: CoSupForCausalLM) -> list[NDArray[np.int32]]:
        """Return what Emb_seq reads of the passages of a shard; it is tokenized once."""
        path = self.root / TOKENS / f"tokens-{number:05d}.safetensors"
        if not path.exists():
            rows = emb_seq_ids(model, shard.passages.select(["title", "text", "input_ids"]).to_pylist())
            lengths = torch.tensor([len(row) for row in rows])
            flat = torch.from_numpy(np.concatenate([np.array(row, np.int32) for row in rows]))
            with replacing_file(path) as unfinished:
                write_tensors(unfinished, {"lengths": lengths, "ids": flat})
        tokens = read_tensors(path)
        ends = tokens["lengths"].numpy().cumsum()
        return np.split(tokens["ids"].numpy(), ends[:-1])

    def _finish(self, folder: Path, index_factory: str | None, verify: bool | None = False) -> PassageIndex:
        """
        Make an index approximate, if asked for, and open it on all ranks.

        A FAISS file is read only if it was made here; without `index_factory` search is exact.
        """
        search = "exact" if index_factory is None else None
        with failing_together(self.group):
            if rank() == 0 and index_factory is not None:
                index = PassageIndex.from_pretrained(folder, search="exact", verify=verify)
                index.train_approximate(index_factory)
        with failing_together(self.group):
            if not folder.is_dir():
                raise FileNotFoundError(
                    f"Rank {rank()} does not see {folder}: output_dir must be on a file system that all ranks share."
                )
            index = PassageIndex.from_pretrained(
                folder, search=search, verify=verify, allow_faiss_files=index_factory is not None
            )
        return index

    def adopt(self, source: Path, name: str, index_factory: str | None) -> PassageIndex:
        """
        Open an index of a checkpoint, as a folder of its own: the checkpoint may be removed while it is used.

        The checkpoint may be a download, so its files are checked, and an approximate index is trained anew.
        """
        folder = self.root / name
        unfinished = folder.with_name(f".{name}.unfinished")
        with failing_together(self.group):
            if rank() == 0:
                PassageIndex.check_save_directory(folder)
                self._remove(unfinished.name)
                self.link(source, unfinished)
                self._remove(name)
                os.replace(unfinished, folder)
        return self._finish(folder, index_factory, verify=None)

    # ------------------------------------------------------------------ folders

    def link(self, source: Path, target: Path) -> None:
        """Make another folder of the files of an index, on one rank."""
        target.mkdir(parents=True)
        for path in source.iterdir():
            link_or_copy(path, target / path.name)

    def keep(self, names: Sequence[str]) -> None:
        """Remove the indexes of all steps but these; no rank may search the others any more."""
        if rank() > 0:
            return
        for path in [*self.root.glob("step-[0-9]*"), *self.root.glob(".step-[0-9]*.unfinished")]:
            if path.name not in names:
                self._remove(path.name)
        if not names:
            self._remove_tokens()
            self._remove_if_empty(self.root)

    def remove(self, name: str) -> None:
        """Remove an index, finished or not."""
        if rank() == 0:
            self._remove(name)
            self._remove(f".{name}.unfinished")
            self._remove_if_empty(self.root)

    def _remove(self, name: str) -> None:
        """Remove a folder if it is an index, or an unfinished one."""
        folder = self.root / name
        if name.endswith(".unfinished") or (folder / INDEX_FORMAT.config_file).exists():
            shutil.rmtree(folder, ignore_errors=True)

    def _remove_tokens(self) -> None:
        folder = self.root / TOKENS
        for path in [*folder.glob("tokens-*.safetensors"), *folder.glob(".tokens-*.unfinished")]:
            path.unlink(missing_ok=True)
        self._remove_if_empty(folder)

    def _remove_if_empty(self, folder: Path) -> None:
        with contextlib.suppress(OSError):  # it does not exist, or holds other files
            folder.rmdir()


def emb_seq_ids(model: CoSupForCausalLM, passages: Sequence[dict[str, Any]]) -> list[list[int]]:
    """
    Return the token ids that Emb_seq reads of passages of an index.

    Args:
        model ([`CoSupForCausalLM`]): its tokenizers and config.
        passages (`list[dict]`): `title`, `text`, and `input_ids`, as Gen reads them.
    """
    if model.emb_seq_tokenizer is model.tokenizer and not model.config.passage_prompt:
        return add_bos_and_eos(model.tokenizer, [passage["input_ids"] for passage in passages], model.config)
    return encode_passages_for_emb_seq(model.emb_seq_tokenizer, passages, model.config)
