"""
Write training instances for a retriever alone: questions with one passage, and keyword queries.

    python recipes/prepare_retriever_data.py --train_file train.jsonl --output_file retriever.jsonl \\
        --num_questions 5120

Train with `supervision: nsp` and `query_from: emb_seq`.

Instances with several passages are left out. Their later queries contain everything written so far, including the
first passage, and an encoder that reads such queries learns to find passages like the one it already has.

A keyword query is a passage's title and one to four consecutive words of its text; the passage is to be found. Keyword
queries keep a retriever that is trained on questions from forgetting that a query may be a name and a few words. Only
passages with a title give one.
"""

import random
from dataclasses import dataclass, field
from typing import Any

from shared.cli import clear_errors, parse, table_of_counts

from modeling_cosup.lines_cosup import writing_lines
from trainer.data import load_instances

from shared.cloze import some_words


@dataclass
class RetrieverDataArguments:
    """The files to read and to write, and the sample to draw."""

    train_file: str = field(
        metadata={"local_or_hub": True, "help": "training instances: JSON Lines (.gz or plain) or a dataset name"}
    )
    output_file: str = field(metadata={"help": "JSON Lines (compressed if the name ends in .gz)"})
    num_questions: int | None = field(
        default=None, metadata={"help": "number of questions, drawn at random; defaults to all"}
    )
    keyword_share: float = field(
        default=0.25,
        metadata={"help": "share of keyword queries among all instances, if there are enough passages with titles"},
    )
    seed: int = field(default=0, metadata={"help": "seed of the sample"})


def main() -> None:
    """Read the options and prepare the dataset."""
    (args,) = parse([RetrieverDataArguments], __doc__)
    with clear_errors():
        print(table_of_counts(prepare(args)))


def prepare(args: RetrieverDataArguments) -> dict[str, int]:
    """
    Write the instances: questions and keyword queries, mixed.

    Returns:
        `dict`: how many instances were read, left out and written.

    Raises:
        `ValueError`: if an option is out of range, an instance is malformed, or no instance has exactly one passage.
    """
    if not 0 <= args.keyword_share < 1:
        raise ValueError(f"--keyword_share is {args.keyword_share}, expected 0 or more and less than 1.")
    if args.num_questions is not None and args.num_questions < 1:
        raise ValueError(f"--num_questions is {args.num_questions}, expected at least 1.")
    instances = load_instances(args.train_file)
    generator = random.Random(args.seed)
    single = [instance for instance in instances if len(passages_of(instance)) == 1]
    if not single:
        raise ValueError(f"{args.train_file}: none of {len(instances)} instances has exactly one passage.")
    generator.shuffle(single)
    questions = single[: args.num_questions]
    num_keywords = int(len(questions) * args.keyword_share / (1 - args.keyword_share))
    keywords = keyword_queries(single, generator)[:num_keywords]
    mixed = questions + keywords
    generator.shuffle(mixed)
    with writing_lines(args.output_file) as write:
        for instance in mixed:
            write(instance)
    return {
        "instances read": len(instances),
        "left out: no passage, or several": len(instances) - len(single),
        "questions left out": len(single) - len(questions),
        "questions written": len(questions),
        "keyword queries written": len(keywords),
    }


def passages_of(instance: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the passages of an instance's segments."""
    return [segment["passage"] for segment in instance["segments"] if segment["passage"] is not None]


def keyword_queries(instances: list[dict[str, Any]], generator: random.Random) -> list[dict[str, Any]]:
    """
    Return instances that ask for a passage by its title and some words of its text.

    There is one for each distinct passage with a title, in random order.
    """
    queries = []
    seen = set()
    for instance in instances:
        passage = passages_of(instance)[0]
        title, text = passage["title"], passage["text"]
        if not title or (title, text) in seen:
            continue
        seen.add((title, text))
        keywords = some_words(text, generator.randint(1, 4), generator)
        query = {
            "id": f"keywords-{instance['id']}",
            "dataset": "keywords",
            "instruction": "",
            "input": f"{title} {keywords}".strip(),
            "segments": [{"text": title, "passage": passage}],
        }
        queries.append(query)
    generator.shuffle(queries)
    return queries


if __name__ == "__main__":
    main()
