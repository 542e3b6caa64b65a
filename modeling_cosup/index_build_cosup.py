"""Embedding a corpus into shards. It takes the memory of one shard, and 8 bytes per passage to find duplicate ids."""

import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm.auto import tqdm
from transformers.utils import logging

from .folders_cosup import DTYPES, create_tensors, dtype_name
from .index_files_cosup import Shard, shard_files, write_passages
from .index_search_cosup import contains
from .metadata_cosup import metadata_text
from .numbers_cosup import COUNT, check_number
from .packing_cosup import pad_rows
from .passages_cosup import can_be_read_twice, checked_passages, find_duplicate, hash_ids, read_corpus
from .retriever_cosup import CoSupModel, array_of_rows
from .tokenization_cosup import add_bos_and_eos, encode_passages_for_emb_seq, encode_passages_for_gen

try:
    import pyarrow as pa
except ImportError:
    pa = None

logger = logging.get_logger(__name__)

TOKENIZER_BATCH = 2048  # passages per call: enough for the threads of a tokenizer
# Lower limit for the shortest passage of a batch, relative to the longest: otherwise small batches are mostly padding
MIN_LENGTH_RATIO = 0.75

Passages: TypeAlias = list[dict[str, Any]]
PlacedPassages: TypeAlias = list[tuple[str, dict[str, Any]]]  # (place in the corpus, for errors; passage)
FindKnownIds: TypeAlias = Callable[[list[str]], list[str]]  # given ids, returns the ones already in the index
# given the token ids that Emb_seq reads of each passage, yields rows of that list and their embeddings (n, h), of any
# norm, until all rows are done
Encoder: TypeAlias = Callable[[list[NDArray[np.int32]]], Iterator[tuple[NDArray[np.int64], torch.Tensor]]]
T = TypeVar("T")


class ShardBuilder:
    """
    Builds shards from passages.

    Args:
        model ([`CoSupForCausalLM`]): with Emb_seq in memory, unless there is an `encoder`; used on its device and in
            its dtype.
        dtype (`str` or `torch.dtype`): of the stored embeddings: `"float32"`, `"float16"` or `"bfloat16"`.
        batch_size (`int`): maximum number of passages in a forward.
        max_tokens_per_batch (`int`, *optional*): maximum number of tokens in a forward, with padding; a longer passage
            gets its own forward. Defaults to 4,096 on a CPU, since larger batches do not fit in its caches, and to
            32,768 on other devices.
        encoder (`Callable`, *optional*): embeds in place of the model, e.g. on a server.
    """

    def __init__(
        self,
        model: CoSupModel,
        dtype: str | torch.dtype = "float32",
        batch_size: int = 256,
        max_tokens_per_batch: int | None = None,
        encoder: Encoder | None = None,
    ) -> None:
        check_number("batch_size", batch_size, COUNT)
        if max_tokens_per_batch is not None:
            check_number("max_tokens_per_batch", max_tokens_per_batch, COUNT)
        self.model, self.dtype, self.batch_size = model, DTYPES[dtype_name(dtype)], batch_size
        self.max_tokens_per_batch = max_tokens_per_batch or (4096 if model._input_device().type == "cpu" else 32768)
        self.encoder = encoder
        self.num_cut = 0  # passages so far that were longer than `max_passage_length`

    def files_of(self, number: int) -> tuple[str, ...]:
        """Return the names of the files of a shard."""
        return shard_files(number)

    def room_for(self, num_items: int) -> str:
        """Say how much room the shards of `num_items` passages take at least."""
        size = num_items * self.model.config.embedding_size * self.dtype.itemsize
        what = f"{size / 1e6:,.1f} MB for the embeddings of the {num_items:,} remaining passages"
        return f"{what}, and room for their texts"

    def make(self, passages: Passages, bar: tqdm, paths: tuple[Path, ...] | None = None) -> Shard:
        """
        Embed passages into a shard.

        Args:
            passages (`list[dict]`): checked.
            bar (`tqdm`): advances with each batch.
            paths (`tuple[Path, Path]`, *optional*): files for embeddings and passages; without them the shard is in
                memory.

        Raises:
            `ValueError`: names the passages with embeddings that are not finite.
        """
        gen_ids, emb_seq_ids = self._tokenize(passages)
        shape = (len(passages), self.model.config.embedding_size)
        if paths is None:
            embeddings = torch.empty(shape, dtype=self.dtype)
        else:
            embeddings = create_tensors(paths[0], {"embeddings": (shape, self.dtype)})["embeddings"]
        self.embed([passage["id"] for passage in passages], emb_seq_ids, embeddings, bar)
        batch = record_batch(passages, gen_ids)
        if paths is not None:
            write_passages(paths[1], batch)
        return Shard(batch, embeddings)

    def _tokenize(self, passages: Passages) -> tuple[list[NDArray[np.int32]], list[NDArray[np.int32]]]:
        """Return the token ids that Gen and Emb_seq read; int32 arrays take a seventh of the memory of `list[int]`."""
        model = self.model
        same_ids = model.emb_seq_tokenizer is model.tokenizer and not model.config.passage_prompt
        all_gen_ids, all_emb_seq_ids = [], []
        for start in range(0, len(passages), TOKENIZER_BATCH):
            chunk = passages[start : start + TOKENIZER_BATCH]
            cut: set[int] = set()
            gen_ids = encode_passages_for_gen(model.tokenizer, chunk, model.config, cut)
            if same_ids:  # tokenize once
                emb_seq_ids = add_bos_and_eos(model.tokenizer, gen_ids, model.config)
            else:
                emb_seq_ids = encode_passages_for_emb_seq(model.emb_seq_tokenizer, chunk, model.config, cut)
            self.num_cut += len(cut)
            all_gen_ids += [np.array(ids, np.int32) for ids in gen_ids]
            all_emb_seq_ids += [np.array(ids, np.int32) for ids in emb_seq_ids]
        return all_gen_ids, all_emb_seq_ids

    @torch.no_grad()
    def embed(
        self,
        passage_ids: Sequence[str],
        token_ids: list[NDArray[np.int32]],
        embeddings: torch.Tensor,
        bar: tqdm | None = None,
    ) -> None:
        """
        Embed tokenized passages.

        Args:
            passage_ids (`list[str]`): for errors.
            token_ids (`list[numpy.ndarray]` of int32): what Emb_seq reads of each passage.
            embeddings (`torch.Tensor` of shape `(n, h)`): filled in place.
            bar (`tqdm`, *optional*): advances with each batch.

        Raises:
            `ValueError`: names the passages with embeddings that are not finite, and the rows that the encoder left
                out, gave twice or gave embeddings of the wrong shape.
        """
        if self.encoder is None:
            for rows, embeds in self._encode(token_ids):
                self._store(passage_ids, rows, embeds, embeddings, bar)
            return
        counts = np.zeros(len(token_ids), np.int64)  # how often the encoder gave each row
        for rows, embeds in self.encoder(token_ids):
            rows = array_of_rows(rows, "rows of the encoder")
            _check_encoded(rows, embeds, embeddings.shape)
            np.add.at(counts, rows, 1)
            self._store(passage_ids, rows, self.model._normalize(embeds), embeddings, bar)
        wrong = np.flatnonzero(counts != 1)
        if len(wrong):
            ids = [passage_ids[row] for row in wrong[:5]]
            raise ValueError(
                f"The encoder gave {len(wrong)} of {len(counts)} passages no embedding, or more than one: {ids}."
            )

    def _encode(self, token_ids: list[NDArray[np.int32]]) -> Iterator[tuple[NDArray[np.int64], torch.Tensor]]:
        """Yield rows and their embeddings, each batch once the next one is queued, so a GPU never waits for us."""
        queued = None
        for rows in self._batches(token_ids):
            ids, mask = pad_rows([token_ids[row] for row in rows], device=self.model._input_device())
            embeds = self.model.encode_passages(ids, mask)
            if queued is not None:
                yield queued
            queued = rows, embeds
        if queued is not None:
            yield queued

    def _batches(self, token_ids: list[NDArray[np.int32]]) -> Iterator[NDArray[np.int64]]:
        """Yield rows of similar length, longest first, so that a batch that does not fit in memory fails early."""
        lengths = np.array([len(ids) for ids in token_ids])
        order = np.argsort(-lengths, kind="stable")
        lengths = lengths[order]
        start = 0
        while start < len(order):
            longest = max(1, lengths[start])
            size = max(1, min(self.batch_size, self.max_tokens_per_batch // longest))
            end_of_similar = np.searchsorted(-lengths, -MIN_LENGTH_RATIO * longest, side="right")
            end = max(start + 1, min(start + size, end_of_similar))
            yield order[start:end]
            start = end

    def _store(
        self,
        passage_ids: Sequence[str],
        rows: NDArray[np.int64],
        embeds: torch.Tensor,
        embeddings: torch.Tensor,
        bar: tqdm | None,
    ) -> None:
        stored = embeds.to(self.dtype).cpu()
        finite = stored.isfinite().all(1)
        if not finite.all():
            bad_ids = [passage_ids[row] for row in rows[~finite.numpy()]]
            raise ValueError(
                f"The embeddings of {len(bad_ids)} passages are not finite in {self.dtype}: {bad_ids[:5]}. Check"
                " Emb_seq's weights and dtype."
            )
        embeddings[torch.from_numpy(rows)] = stored
        if bar is not None:
            bar.update(len(rows))


def _check_encoded(rows: NDArray[np.int64], embeds: torch.Tensor, shape: torch.Size) -> None:
    """Raise `ValueError` unless an encoder gave rows of a shard `shape` `(n, h)`, and an embedding for each."""
    outside = rows[(rows < 0) | (rows >= shape[0])]
    if len(outside):
        raise ValueError(f"The encoder gave the rows {outside[:5].tolist()}, expected 0 to {shape[0] - 1}.")
    if embeds.shape != (len(rows), shape[1]):
        raise ValueError(
            f"The encoder gave embeddings of shape {tuple(embeds.shape)}, expected {(len(rows), shape[1])}."
        )


def report_cut(num_cut: int, max_passage_length: int) -> None:
    """Warn how many passages of the corpus were cut, if there are any."""
    if num_cut:
        logger.warning(f"Cut {num_cut} passages of the corpus to max_passage_length={max_passage_length} tokens.")


def record_batch(passages: Passages, gen_ids: list[NDArray[np.int32]]) -> "pa.RecordBatch":
    """
    Return the `pyarrow.RecordBatch` of a shard: ids, titles, texts, token ids for Gen, and hashes of the ids; and
    metadata as JSON text if a passage has some.
    """
    columns = {}
    for name in ("id", "title", "text"):
        columns[name] = pa.array([passage[name] for passage in passages], pa.large_string())
    offsets = pa.array(np.cumsum([0, *map(len, gen_ids)]), pa.int64())
    columns["input_ids"] = pa.LargeListArray.from_arrays(offsets, pa.array(np.concatenate(gen_ids), pa.int32()))
    columns["id_hash"] = pa.array(hash_ids(passage["id"] for passage in passages))
    if any(passage.get("metadata") for passage in passages):
        texts = [metadata_text(passage["metadata"]) if passage.get("metadata") else None for passage in passages]
        columns["metadata"] = pa.array(texts, pa.large_string())
    return pa.record_batch(columns)


# ---------------------------------------------------------------------- reading the corpus


def read_shards(
    source: Any,
    shard_size: int,
    show_progress_bar: bool,
    check: Callable[[dict[str, Any]], None],
    find_known: FindKnownIds = lambda ids: [],
) -> tuple[int | None, Iterator[Passages]]:
    """
    Split a corpus into shards, and check it: before the first shard if it can be read twice, else as it streams.

    Args:
        source: see [`read_corpus`].
        shard_size (`int`): passages per shard; the last one may have fewer.
        show_progress_bar (`bool`): show a bar during the check.
        check (`Callable`): raises a `ValueError` for a passage that cannot be embedded.
        find_known (`Callable`): given ids, returns the ones already in the index.

    Returns:
        `(int or None, iterator of list[dict])`: the number of passages, `None` if they stream, and the shards.

    Raises:
        `ValueError`: names the place of a passage with a missing or empty field, or a duplicate or known id.
    """
    check_number("shard_size", shard_size, COUNT)

    def read() -> Iterator[tuple[str, dict[str, Any]]]:
        return checked_passages(read_corpus(source), check)

    if not can_be_read_twice(source):
        return None, _check_as_it_streams(_split(read(), shard_size), find_known)
    bar = tqdm(read(), desc="Checking passages", unit=" passages", disable=not show_progress_bar)
    chunks = [_hash_new_ids(pairs, find_known) for pairs in _split(bar, TOKENIZER_BATCH)]
    if not chunks:
        raise ValueError("The corpus holds no passage.")
    hashes = np.concatenate(chunks)
    find_duplicate(hashes, read)
    return len(hashes), ([passage for _, passage in pairs] for pairs in _split(read(), shard_size))


def _split(iterable: Iterable[T], size: int) -> Iterator[list[T]]:
    iterator = iter(iterable)
    while chunk := list(itertools.islice(iterator, size)):
        yield chunk


def _hash_new_ids(pairs: PlacedPassages, find_known: FindKnownIds) -> NDArray[np.int64]:
    """Return hashes of the ids of `(where, passage)` pairs; `ValueError` for an id that is already in the index."""
    ids = [passage["id"] for _, passage in pairs]
    known = set(find_known(ids))
    if known:
        where, known_id = next((where, passage["id"]) for where, passage in pairs if passage["id"] in known)
        raise ValueError(f"{where}: id {known_id!r} is already in the index ({len(known)} such ids).")
    return hash_ids(ids)


def _check_as_it_streams(shards: Iterable[PlacedPassages], find_known: FindKnownIds) -> Iterator[Passages]:
    """
    Check the shards of a corpus that can be read only once.

    Two ids with the same hash in different shards count as the same id, which is wrong for one in 10^19 pairs.
    """
    seen = np.empty(0, np.int64)
    for pairs in shards:
        hashes = _hash_new_ids(pairs, find_known)
        find_duplicate(hashes.copy(), functools.partial(iter, pairs))
        if len(seen):
            repeated = np.flatnonzero(contains(seen, hashes))
            if len(repeated):
                where, passage = pairs[repeated[0]]
                raise ValueError(f"{where}: id {passage['id']!r} is already in an earlier row; ids must be unique.")
        seen = np.concatenate([seen, hashes])
        seen.sort(kind="stable")  # merges the two runs
        yield [passage for _, passage in pairs]
    if not len(seen):
        raise ValueError("The corpus holds no passage.")
