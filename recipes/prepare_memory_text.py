"""
Split a corpus into the text of a token memory and held-out text, by topic and by passage.

    python recipes/prepare_memory_text.py --corpus_file corpus.jsonl.gz --output_dir text --num_topics 20 --seed 0

All passages with one title are a topic. Written under `output_dir`:
    store.jsonl      text for build_memory.py: most passages of `num_topics` topics
    fit.jsonl        other passages of these topics, to fit weight, temperature and k
    same.jsonl       other passages of these topics, to measure: the memory holds text on the same topic
    other.jsonl      as many passages of all other topics, to measure: the memory holds nothing on the topic

No text is in two files: of passages with the same text the first is kept. Passages without a title are left out.
"""

import contextlib
import random
from dataclasses import dataclass, field
from pathlib import Path

from shared.cli import clear_errors, parse, table_of_counts

from modeling_cosup.corpus_cosup import read_files
from modeling_cosup.lines_cosup import writing_lines
from modeling_cosup.passages_cosup import check_id, check_title_and_text


@dataclass
class MemoryTextArguments:
    """The corpus to read, and how it is split."""

    corpus_file: str = field(metadata={"help": "passages {id, title, text}: JSON Lines (.gz or plain) or Parquet"})
    output_dir: str = field(metadata={"help": "folder of the four files"})
    num_topics: int = field(default=20, metadata={"help": "topics in the store, those with most passages first"})
    held_out_share: float = field(
        default=0.1, metadata={"help": "share of a topic's passages in fit.jsonl, and again in same.jsonl"}
    )
    seed: int = field(default=0, metadata={"help": "which passages are held out"})


def main() -> None:
    """Read the options, split the corpus, and print the number of passages in each file."""
    (args,) = parse([MemoryTextArguments], __doc__)
    with clear_errors():
        print(table_of_counts(prepare(args)))


def prepare(args: MemoryTextArguments) -> dict[str, int]:
    """
    Write the four files, all or none.

    Returns:
        `dict`: the number of passages in each file, and of those left out because their text repeats another's.

    Raises:
        `ValueError`: for a share or a number of topics that leaves one of the files empty, or a passage id that occurs
            twice.
    """
    if not 0 < args.held_out_share < 0.5:
        raise ValueError(f"held_out_share is {args.held_out_share}, expected more than 0 and less than 0.5.")
    topics, num_repeated = read_topics(args.corpus_file)
    if not 1 <= args.num_topics < len(topics):
        raise ValueError(f"num_topics is {args.num_topics}, expected 1 to {len(topics) - 1}: one must be left.")
    generator = random.Random(args.seed)
    titles = sorted(topics, key=lambda title: (-len(topics[title]), title))
    files: dict[str, list[dict]] = {"store": [], "fit": [], "same": [], "other": []}
    for title in titles[: args.num_topics]:
        passages = topics[title]
        generator.shuffle(passages)
        held_out = round(len(passages) * args.held_out_share)
        files["fit"] += passages[:held_out]
        files["same"] += passages[held_out : 2 * held_out]
        files["store"] += passages[2 * held_out :]
    others = [passage for title in titles[args.num_topics :] for passage in topics[title]]
    files["other"] = generator.sample(others, min(len(others), len(files["same"])))
    if not files["same"]:
        raise ValueError(
            f"No topic has passages enough for held_out_share {args.held_out_share}: the largest has "
            f"{len(topics[titles[0]])}. Raise the share or take a corpus with more passages of a title."
        )
    with contextlib.ExitStack() as stack:
        for name, passages in files.items():
            write = stack.enter_context(writing_lines(Path(args.output_dir) / f"{name}.jsonl"))
            for passage in passages:
                write(passage)
    counts = {f"{name}.jsonl": len(passages) for name, passages in files.items()}
    return counts | {"left out: the text of another passage": num_repeated}


def read_topics(path: str) -> tuple[dict[str, list[dict]], int]:
    """
    Read the passages that have a title.

    A memory reads texts alone. A held-out text that the store holds too, under another id or title, would be judged as
    if the memory had not seen it.

    Returns:
        `(dict, int)`: the passages of each title, each text once, and the number of those with the text of another.

    Raises:
        `ValueError`: for a malformed passage, or an id that occurs twice; names file and line.
    """
    topics: dict[str, list[dict]] = {}
    ids: set[str] = set()
    texts: set[str] = set()
    num_repeated = 0
    for where, passage in read_files([path]):
        content = check_title_and_text(passage, where)
        if passage.get("id") is not None:
            id = check_id(passage["id"], where)
            if id in ids:
                raise ValueError(f"{where}: the id {id!r} is already in the corpus; ids must be unique.")
            ids.add(id)
        if not content["title"]:
            continue
        if content["text"] in texts:
            num_repeated += 1
            continue
        texts.add(content["text"])
        topics.setdefault(content["title"], []).append(passage)
    return topics, num_repeated


if __name__ == "__main__":
    main()
