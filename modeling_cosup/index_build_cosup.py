"""
Embedding a corpus, shard by shard: peak memory is one shard, and 8 bytes a passage for the check that no id occurs
twice.

A build lives in a folder of its own next to the index, `.<name>.unfinished`: `build.json` says what is being built, and a shard counts once its marker
`shard-00000.json` was renamed into place. A build that was killed goes on after the shards that count.
"""

import contextlib
import errno
import itertools

import numpy as np
import torch
from tqdm.auto import tqdm
from transformers.utils import logging

from .configuration_cosup import EARLIER_EMBEDDING_SETTINGS
from .files_cosup import digest, digest_all, digest_file, read_json, write_json
from .index_files_cosup import DTYPES, Shard, create_tensors, map_shard, seal, shard_files, write_passages
from .passages_cosup import can_be_read_twice, checked_passages, find_duplicate, hash_ids, read_corpus
from .tokenization_cosup import add_bos_and_eos, encode_passages_for_emb_seq, encode_passages_for_gen, pad_rows

try:
    import pyarrow as pa
except ImportError:
    pa = None

logger = logging.get_logger(__name__)

BUILD_FILE = "build.json"
TOKENIZED_AT_ONCE = 2048  # passages: enough for the threads of a tokenizer
SHORTEST = (
    0.75  # of the longest passage of a batch: few passages, of very different lengths, would else be mostly padding
)
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class ShardBuilder:
    """
    Makes shards out of passages.

    Args:
        model ([`CoSupForCausalLM`]): with Emb_seq in memory; it runs where it is, in its dtype.
        dtype (`str`): of the stored embeddings: `"float32"`, `"float16"` or `"bfloat16"`.
        batch_size (`int`): most passages of a forward.
        max_tokens_per_batch (`int`, *optional*): most tokens of a forward, padding included; a passage that is longer goes alone. Defaults to 4,096 on a CPU,
            where larger batches leave its caches, and 32,768 elsewhere.
    """

    def __init__(self, model, dtype="float32", batch_size=256, max_tokens_per_batch=None):
        if dtype not in DTYPES:
            raise ValueError(f"dtype is {dtype!r}, expected one of {', '.join(DTYPES)}.")
        self.model, self.dtype = model, DTYPES[dtype]
        self.batch_size = batch_size
        self.max_tokens_per_batch = max_tokens_per_batch or (4096 if model.device.type == "cpu" else 32768)

    def make(self, passages, bar, paths=None):
        """
        A shard of passages.

        Args:
            passages (`list[dict]`): checked.
            bar (`tqdm`): moves with each batch.
            paths (`tuple[Path, Path]`, *optional*): of the files to write embeddings and passages to, as they come; else the shard is in memory.

        Raises:
            `ValueError`: names the passages whose embedding is not finite.
        """
        gen_ids, emb_seq_ids = self._tokenize(passages)
        shape = (len(passages), self.model.config.embedding_size)
        if paths is None:
            embeddings = torch.empty(shape, dtype=self.dtype)
        else:
            embeddings = create_tensors(paths[0], {"embeddings": (shape, self.dtype)})["embeddings"]
        self._embed(passages, emb_seq_ids, embeddings, bar)
        batch = record_batch(passages, gen_ids)
        if paths is not None:
            write_passages(paths[1], batch)
        return Shard(batch, embeddings)

    def _tokenize(self, passages):
        """Token ids as Gen and as Emb_seq read them: two lists of int32 arrays, a seventh of the memory of lists of `int`."""
        model, rows = self.model, ([], [])
        for start in range(0, len(passages), TOKENIZED_AT_ONCE):
            chunk = passages[start : start + TOKENIZED_AT_ONCE]
            gen_ids = encode_passages_for_gen(model.tokenizer, chunk, model.config)
            if model.emb_seq_tokenizer is model.tokenizer and not model.config.passage_prompt:  # read once
                emb_seq_ids = add_bos_and_eos(model.tokenizer, gen_ids, model.config)
            else:
                emb_seq_ids = encode_passages_for_emb_seq(model.emb_seq_tokenizer, chunk, model.config)
            for kept, ids in zip(rows, (gen_ids, emb_seq_ids), strict=True):
                kept.extend(np.array(row, np.int32) for row in ids)
        return rows

    @torch.no_grad()
    def _embed(self, passages, token_ids, embeddings, bar):
        """Fill `embeddings` `(n, h)`. A batch is fetched only when the next one was sent off, so that a GPU need not wait for this thread."""
        waiting = None
        for rows in self._batches(token_ids):
            ids, mask = pad_rows([token_ids[row] for row in rows], device=self.model.device)
            embeds = self.model.encode_passages(ids, mask)
            if waiting is not None:
                self._store(passages, *waiting, embeddings, bar)
            waiting = rows, embeds
        self._store(passages, *waiting, embeddings, bar)

    def _batches(self, token_ids):
        """Rows of similar length, longest first: what does not fit into memory fails at once."""
        lengths = np.array([len(ids) for ids in token_ids])
        order = np.argsort(-lengths, kind="stable")
        lengths, start = lengths[order], 0
        while start < len(order):
            longest = max(1, lengths[start])
            size = max(1, min(self.batch_size, self.max_tokens_per_batch // longest))
            similar = np.searchsorted(-lengths, -SHORTEST * longest, side="right")
            end = max(start + 1, min(start + size, similar))
            yield order[start:end]
            start = end

    def _store(self, passages, rows, embeds, embeddings, bar):
        stored = embeds.to(self.dtype).cpu()
        finite = stored.isfinite().all(1)
        if not finite.all():
            bad = [passages[row]["id"] for row in rows[~finite.numpy()]]
            raise ValueError(
                f"The embeddings of {len(bad)} passages are not finite in {self.dtype}: {bad[:5]}. Emb_seq's weights or its dtype are at fault."
            )
        embeddings[torch.from_numpy(rows)] = stored
        bar.update(len(rows))


def record_batch(passages, gen_ids):
    """The `pyarrow.RecordBatch` of a shard: texts, ids, hashes of ids, and what Gen reads."""
    ids = [passage["id"] for passage in passages]
    offsets = np.cumsum([0, *map(len, gen_ids)])
    columns = {
        name: pa.array([passage[name] for passage in passages], pa.large_string()) for name in ("id", "title", "text")
    }
    columns["input_ids"] = pa.LargeListArray.from_arrays(
        pa.array(offsets, pa.int64()), pa.array(np.concatenate(gen_ids), pa.int32())
    )
    return pa.record_batch({**columns, "id_hash": pa.array(hash_ids(ids))})


@contextlib.contextmanager
def evaluating(model):
    """Evaluation mode; the mode before comes back."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


# ---------------------------------------------------------------------- reading the corpus


def read_shards(source, shard_size, show_progress_bar, known=lambda ids: []):
    """
    A corpus in shards, checked: before the first one where it can be read twice, else as it streams.

    Args:
        source: see [`read_corpus`].
        shard_size (`int`): passages of each but the last.
        known (callable): of a list of ids those that the index already holds.

    Returns:
        `(int or None, iterator of list[dict])`: the number of passages, where it is known, and the shards.

    Raises:
        `ValueError`: names the place of a passage with a missing or empty field, or of an id that was there before.
    """
    if shard_size < 1:
        raise ValueError(f"shard_size is {shard_size}, expected at least 1.")
    if not can_be_read_twice(source):
        return None, _check_as_it_streams(_cut(checked_passages(read_corpus(source)), shard_size), known)

    def read():
        return checked_passages(read_corpus(source))

    bar = tqdm(read(), desc="Checking passages", unit=" passages", disable=not show_progress_bar)
    hashes = [_hash_of_new(chunk, known) for chunk in _cut(bar, TOKENIZED_AT_ONCE)]
    if not hashes:
        raise ValueError("The corpus holds no passage.")
    hashes = np.concatenate(hashes)
    find_duplicate(hashes, read)
    return len(hashes), ([passage for _, passage in chunk] for chunk in _cut(read(), shard_size))


def _cut(iterable, size):
    iterator = iter(iterable)
    while chunk := list(itertools.islice(iterator, size)):
        yield chunk


def _hash_of_new(pairs, known):
    """Hashes of the ids of `(where, passage)` pairs, none of which the index may hold already."""
    if held := set(known([passage["id"] for _, passage in pairs])):
        where, id = next((where, passage["id"]) for where, passage in pairs if passage["id"] in held)
        raise ValueError(f"{where}: id {id!r} is already in the index ({len(held)} such ids).")
    return hash_ids(passage["id"] for _, passage in pairs)


def _check_as_it_streams(shards, known):
    """Shards of a corpus that can be read only once; ids of the same hash in two shards are taken for the same (one in 10^19 pairs is not)."""
    seen = np.empty(0, np.int64)
    for pairs in shards:
        hashes = _hash_of_new(pairs, known)
        find_duplicate(hashes.copy(), lambda pairs=pairs: pairs)
        if (
            len(seen)
            and (again := np.flatnonzero(seen[np.minimum(seen.searchsorted(hashes), len(seen) - 1)] == hashes)).size
        ):
            where, passage = pairs[again[0]]
            raise ValueError(f"{where}: id {passage['id']!r} already stands in an earlier row; ids must be unique.")
        seen = np.concatenate([seen, hashes])
        seen.sort(kind="stable")  # merges the two runs
        yield [passage for _, passage in pairs]
    if not len(seen):
        raise ValueError("The corpus holds no passage.")


# ---------------------------------------------------------------------- building in a folder


def unfinished_folder(save_directory):
    """Where the build of an index lives until it is complete: next to it, under a name that a second call finds."""
    return save_directory.with_name(f".{save_directory.name}.unfinished")


def begin(folder, settings):
    """
    Begin a build, or go on with one.

    Raises:
        `ValueError`: when shards are there that another model or other settings made; names what differs.
    """
    folder.mkdir(exist_ok=True)
    path = folder / BUILD_FILE
    if path.exists() and any(folder.glob("shard-*.json")):
        build = read_json(path)
        before, now = ({**EARLIER_EMBEDDING_SETTINGS, **facts, **facts["fingerprint"]} for facts in (build, settings))
        different = [name for name in now if name != "fingerprint" and before.get(name) != now[name]]
        if different:
            lines = [f"  {name}: then {before.get(name)!r}, now {now[name]!r}" for name in different]
            raise ValueError(
                f"{folder} holds an unfinished build with other settings; finish it with those, or delete the folder.\n"
                + "\n".join(lines)
            )
    write_json(path, settings)


def is_complete(folder, number, content):
    """Whether a shard was written to its end, of the same passages, and its files are still what they were: reading them is cheap compared with embedding."""
    marker = folder / f"shard-{number:05d}.json"
    if not marker.exists():
        return False
    facts = read_json(marker)
    whole = all(
        _is_whole(folder / name, file) and digest_file(folder / name) == file["sha256"]
        for name, file in facts["files"].items()
    )
    if facts["digest"] != content:
        logger.warning(f"The passages of shard {number} are not those that it was built of: it is built again.")
    return whole and facts["digest"] == content


def _is_whole(path, facts):
    """Whether a file is as long as it was."""
    return path.exists() and path.stat().st_size == facts["size"]


def write_shards(folder, shards, builder, bar, shard_size, num_processes=1, process_index=0):
    """
    Write the shards of this process that are not yet complete, each with its marker. Returns how many shards the corpus has.

    At its end the process notes in `done-00000.json` which corpus it read, and which of its shards it saw whole.

    Raises:
        `OSError`: when the disk is full; says what to free.
    """
    number, done, contents, digests = -1, 0, [], {}
    done_file = folder / f"done-{process_index:05d}.json"
    done_file.unlink(missing_ok=True)
    for number, passages in enumerate(shards):
        content = digest_all(passages)
        contents.append(content)
        if number % num_processes != process_index:
            continue
        digests[f"shard-{number:05d}.json"] = content
        if not is_complete(folder, number, content):
            try:
                files = write_new_shard(folder, number, passages, builder, bar)
            except OSError as error:
                if error.errno in NO_ROOM:
                    raise OSError(
                        error.errno, _no_room(folder, builder, max(len(passages), (bar.total or 0) - done))
                    ) from error
                raise
            marker = {
                "first_row": number * shard_size,
                "num_passages": len(passages),
                "digest": content,
                "files": files,
            }
            write_json(folder / f"shard-{number:05d}.json", marker)
        else:
            if not bar.disable:
                bar.initial += len(passages)  # counts as done, not as fast
            bar.update(len(passages))
        done += len(passages)
    write_json(done_file, {"num_processes": num_processes, "corpus": digest(contents), "digests": digests})
    return number + 1


def write_new_shard(folder, number, passages, builder, bar):
    """Embed passages into the files of a shard; `dict` of their sizes and checksums. Where that fails, neither file stays."""
    paths = [folder / name for name in shard_files(number)]
    (folder / f"shard-{number:05d}.json").unlink(missing_ok=True)
    try:
        builder.make(passages, bar, paths)
        return {path.name: seal(path) for path in paths}
    except BaseException:
        for path in paths:
            path.unlink(missing_ok=True)
        raise


def _no_room(folder, builder, left):
    size = left * builder.model.config.embedding_size * builder.dtype.itemsize
    return (
        f"no room for the next shard in {folder.parent}: free at least {size / 1e6:,.1f} MB for the embeddings of {left:,} passages that are left, "
        "and room for their texts. Complete shards stay: the same call then goes on behind them"
    )


def finish(folder, num_shards, settings, num_processes=1):
    """Note how many shards the corpus has, and how many processes make them: those of a longer corpus before it do not count."""
    write_json(folder / BUILD_FILE, {**settings, "num_shards": num_shards, "num_processes": num_processes})


def collect(folder):
    """
    The shards of a build that all processes have finished.

    Returns:
        `(settings, list[Shard], files)`: what `build.json` holds, the shards, mapped, and the sizes and checksums of their files.

    Raises:
        `FileNotFoundError`: when there is no build, or a shard is missing.
        `ValueError`: when the processes read different corpora, or a shard is not what its process left.
    """
    if not (folder / BUILD_FILE).exists():
        raise FileNotFoundError(f"{folder} holds no build: call build first.")
    settings = read_json(folder / BUILD_FILE)
    markers = [folder / f"shard-{number:05d}.json" for number in range(settings.get("num_shards", 0))]
    missing = [path.name for path in markers if not path.exists()]
    if missing or not markers:
        raise FileNotFoundError(
            f"{folder} is not complete ({', '.join(missing[:5]) or 'no process is done'}): let every process end its build first."
        )
    facts = {path.name: read_json(path) for path in markers}
    _check_done(folder, facts, settings["num_processes"])
    files = {name: file for marker in facts.values() for name, file in marker["files"].items()}
    if damaged := [name for name, file in files.items() if not _is_whole(folder / name, file)]:
        raise ValueError(
            f"{folder}: {', '.join(damaged[:5])} missing or damaged: let every process build again, which makes only these anew."
        )
    return settings, [map_shard(folder, number) for number in range(len(markers))], files


def _check_done(folder, markers, num_processes):
    """Raise unless all processes came to their end, with the same corpus, and the shards are those that they left."""
    paths = [folder / f"done-{rank:05d}.json" for rank in range(num_processes)]
    if missing := [path.name for path in paths if not path.exists()]:
        raise FileNotFoundError(
            f"{folder} is not complete ({', '.join(missing[:5])}): let every process end its build first."
        )
    done = [read_json(path) for path in paths]
    digests = {name: digest for process in done for name, digest in process["digests"].items()}
    same = len({process["corpus"] for process in done}) == 1 and all(
        process["num_processes"] == num_processes for process in done
    )
    if not same or digests != {name: marker["digest"] for name, marker in markers.items()}:
        raise ValueError(
            f"{folder}: the processes read different corpora, or were of different number: let every one of the {num_processes} build again."
        )
