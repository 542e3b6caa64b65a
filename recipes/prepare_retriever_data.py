"""
Training instances for a retriever alone (`supervision: nsp` with `query_from: emb_seq`): questions with one passage, and keyword queries.

    python recipes/prepare_retriever_data.py --train_file train.jsonl --output_file retriever.jsonl --num_questions 5120

An instance with several passages is left out: its later queries hold all that was written before them, the first passage too, and an encoder that reads them
learns to find passages like the one it has. A keyword query is the title of a passage and one to four words in a row of its text, after which that passage must
be found: it keeps a retriever from forgetting, in favour of questions, that a query may be a name and a few words. Only passages with titles give one.
"""

import random
import re
from dataclasses import dataclass, field

from shared.cli import clear_errors, parse, table_of_counts

from modeling_cosup.lines_cosup import writing_lines
from trainer.data import load_instances


@dataclass
class RetrieverDataArguments:
    """What is read, what is drawn, and what is written."""

    train_file: str = field(metadata={"help": "training instances: JSON Lines (.gz or plain) or a dataset name"})
    output_file: str = field(metadata={"help": "JSON Lines (.gz by the name)"})
    num_questions: int | None = field(
        default=None, metadata={"help": "how many of the questions, drawn at random; by default all"}
    )
    keyword_share: float = field(
        default=0.25,
        metadata={"help": "of keyword queries among all instances, as far as there are passages with titles"},
    )
    seed: int = field(default=0, metadata={"help": "of what is drawn"})


def main():
    """Read the options and prepare the data set."""
    (args,) = parse([RetrieverDataArguments], __doc__)
    with clear_errors():
        print(table_of_counts(prepare(args)))


def prepare(args):
    """
    Write the instances, questions and keyword queries mixed.

    Returns:
        `dict`: how many instances were read, left out and written.

    Raises:
        `ValueError`: when an option is out of its range, an instance is malformed, or no instance has one passage.
    """
    if not 0 <= args.keyword_share < 1:
        raise ValueError(f"--keyword_share is {args.keyword_share}, expected 0 or more and less than 1.")
    if args.num_questions is not None and args.num_questions < 1:
        raise ValueError(f"--num_questions is {args.num_questions}, expected at least 1.")
    instances, generator = load_instances(args.train_file), random.Random(args.seed)
    single = [
        instance
        for instance in instances
        if sum(segment["passage"] is not None for segment in instance["segments"]) == 1
    ]
    if not single:
        raise ValueError(f"{args.train_file}: none of {len(instances)} instances has exactly one passage.")
    generator.shuffle(single)
    questions = single[: args.num_questions]
    keywords = keyword_queries(single, generator)[
        : int(len(questions) * args.keyword_share / (1 - args.keyword_share))
    ]
    mixed = questions + keywords
    generator.shuffle(mixed)
    with writing_lines(args.output_file) as write:
        for instance in mixed:
            write(instance)
    left_out = {
        "left out: no passage, or several": len(instances) - len(single),
        "questions left out": len(single) - len(questions),
    }
    return {
        "instances read": len(instances),
        **left_out,
        "questions written": len(questions),
        "keyword queries written": len(keywords),
    }


def keyword_queries(instances, generator):
    """Instances that ask for a passage by its title and some words of its text, one for each passage with a title, in random order."""
    made, seen = [], set()
    for instance in instances:
        passage = next(segment["passage"] for segment in instance["segments"] if segment["passage"] is not None)
        if not passage["title"] or (passage["title"], passage["text"]) in seen:
            continue
        seen.add((passage["title"], passage["text"]))
        words = passage["text"].split()
        length = generator.randint(1, 4)
        start = generator.randrange(max(1, len(words) - length))
        crop = re.sub(r"[^\w\s'-]", "", " ".join(words[start : start + length]))
        query = {
            "id": f"keywords-{instance['id']}",
            "dataset": "keywords",
            "instruction": "",
            "input": f"{passage['title']} {crop}".strip(),
        }
        made.append(query | {"segments": [{"text": passage["title"], "passage": passage}]})
    generator.shuffle(made)
    return made


if __name__ == "__main__":
    main()
