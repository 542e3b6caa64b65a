"""
Write training instances without any question: each passage of a corpus is asked for by a part of itself.

    python recipes/prepare_cloze.py --corpus_file corpus.jsonl --output_file cloze.jsonl
    python recipes/prepare_cloze.py --corpus_file corpus.jsonl --output_file cloze.jsonl --queries title sentence \\
        --num_instances 5000

The passage is gold, and the text to write after it is one of its own sentences. It gets one query of each kind of
`--queries`:

- `title`: its title with its headings. If other passages have the same title, four words of the text follow.
  The first sentence is written.
- `sentence`: one of its sentences (inverse cloze task, arXiv 1906.00300). Nine times of ten the sentence is taken out
  of the passage, so that words alone do not find it. The next sentence is written.
- `span`: one of its sentences, with a name, a number or up to four other words replaced by `___`. The whole sentence
  is written.

A sentence that stands in several passages, such as a notice or an overlap, is no query. Of passages with the same
title and text only the first counts. A passage of one sentence gets a title query alone, because any other would be
the whole passage. Sentences end as in English.

A seed gives a passage the same queries whatever else is in the corpus. The corpus is read twice and never held in
memory; 16 bytes are kept for each sentence. `recipes/experiments/cloze.yaml` measures what the kinds are worth.
"""

import random
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from shared.cli import clear_errors, parse, table_of_counts

import numpy as np
from tqdm import tqdm

from modeling_cosup.lines_cosup import writing_lines
from modeling_cosup.passages_cosup import checked_passages, find_duplicate, hash_id, read_corpus
from trainer.data import content_id

from shared.cloze import KINDS, Source, instances_of, sentence_hashes


@dataclass
class ClozeArguments:
    """The files to read and to write, and the queries to make."""

    corpus_file: str = field(
        metadata={"local_or_hub": True, "help": "passages {id, title, text}: JSON Lines (.gz or plain) or Parquet"}
    )
    output_file: str = field(metadata={"help": "training instances, JSON Lines (compressed if the name ends in .gz)"})
    queries: list[str] = field(
        default_factory=lambda: list(KINDS), metadata={"help": f"kinds of queries: {', '.join(KINDS)}"}
    )
    num_instances: int | None = field(
        default=None, metadata={"help": "number of instances, drawn at random; defaults to all"}
    )
    instruction: str = field(default="", metadata={"help": "instruction of all instances"})
    seed: int = field(default=0, metadata={"help": "seed of the queries and of the sample"})


def main() -> None:
    """Read the options and prepare the dataset."""
    (args,) = parse([ClozeArguments], __doc__)
    with clear_errors():
        print(table_of_counts(prepare(args)))


def prepare(args: ClozeArguments) -> Counter[str]:
    """
    Write the instances.

    Returns:
        `Counter`: how many passages were read, how many instances of each kind were made, and why there are no more.

    Raises:
        `ValueError`: if an option is out of range, a passage is malformed, an id stands twice in the corpus, or no
            passage gives an instance.
    """
    if not args.queries or not set(args.queries) <= set(KINDS):
        raise ValueError(f"--queries is {' '.join(args.queries)!r}, expected some of {', '.join(KINDS)}.")
    if args.num_instances is not None and args.num_instances < 1:
        raise ValueError(f"--num_instances is {args.num_instances}, expected at least 1.")
    counts = Counter({"passages read": 0})
    with writing_lines(args.output_file) as write:
        instances = all_instances(args, find_repetitions(args.corpus_file), counts)
        if args.num_instances is not None:
            instances = iter(sample(instances, args.num_instances, random.Random(args.seed)))
        num_written = 0
        for instance in instances:
            write(instance)
            num_written += 1
        counts["instances written"] = num_written
        if not num_written:
            raise ValueError(f"{args.corpus_file}: no passage gives an instance.\n{table_of_counts(counts)}")
    return counts


@dataclass
class Repetitions:
    """Hashes of what several passages of a corpus have in common."""

    contents: set[int]
    titles: set[int]
    sentences: set[int]


def find_repetitions(corpus_file: str) -> Repetitions:
    """
    Read the corpus once, and return what stands in several of its passages.

    Raises:
        `ValueError`: for a malformed passage or an id that stands twice, naming file and line.
    """
    ids, contents, titles, sentences, sentence_contents = (array("q") for _ in range(5))
    for _, passage in tqdm(passages_of(corpus_file), desc="Looking for repetitions", unit=" passages"):
        ids.append(hash_id(passage["id"]))
        contents.append(hash_of(passage))
        titles.append(hash_id(passage["title"]))
        hashes = sentence_hashes(passage)
        sentences.extend(hashes)
        sentence_contents.extend([hash_of(passage)] * len(hashes))
    find_duplicate(np.array(ids, np.int64), lambda: passages_of(corpus_file))
    return Repetitions(
        contents=in_several(contents, range(len(contents))),
        titles=in_several(titles, contents),
        sentences=in_several(sentences, sentence_contents),
    )


def hash_of(passage: dict[str, str]) -> int:
    """Return a hash of title and text."""
    return hash_id(content_id(passage["title"], passage["text"]))


def passages_of(corpus_file: str) -> Iterator[tuple[str, dict[str, str]]]:
    """Read the passages of the corpus, one at a time."""
    return checked_passages(read_corpus(corpus_file))


def in_several(hashes: Sequence[int], owners: Sequence[int]) -> set[int]:
    """Return the hashes that have more than one owner; a passage that is repeated as a whole is one owner."""
    values, owner_ids = np.array(hashes, np.int64), np.array(owners, np.int64)
    order = np.lexsort((owner_ids, values))
    values, owner_ids = values[order], owner_ids[order]
    is_shared = (values[1:] == values[:-1]) & (owner_ids[1:] != owner_ids[:-1])
    return set(values[1:][is_shared].tolist())


def all_instances(args: ClozeArguments, repetitions: Repetitions, counts: Counter[str]) -> Iterator[dict[str, Any]]:
    """Read the corpus, and yield the instances of each passage."""
    written_contents: set[int] = set()  # of those that stand in the corpus several times
    for _, passage in tqdm(passages_of(args.corpus_file), desc="Making queries", unit=" passages"):
        counts["passages read"] += 1
        content = hash_of(passage)
        if content in written_contents:
            counts["passages left out: repeated"] += 1
            continue
        if content in repetitions.contents:
            written_contents.add(content)
        shared_title = hash_id(passage["title"]) in repetitions.titles
        source = Source(passage, shared_title, repetitions.sentences, args.seed)
        for kind, instance in instances_of(source, args.queries, args.instruction):
            if isinstance(instance, str):
                counts[f"no {kind} query: {instance}"] += 1
            else:
                counts[f"{kind} queries"] += 1
                yield instance


def sample(instances: Iterable[dict[str, Any]], size: int, generator: random.Random) -> list[dict[str, Any]]:
    """Return `size` instances in random order, each drawn with the same probability; all if there are fewer."""
    chosen: list[dict[str, Any]] = []
    for number, instance in enumerate(instances):
        if number < size:
            chosen.append(instance)
        elif (place := generator.randrange(number + 1)) < size:
            chosen[place] = instance
    generator.shuffle(chosen)
    return chosen


if __name__ == "__main__":
    main()
