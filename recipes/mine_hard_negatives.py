"""
Hard negatives for training instances: passages that a retriever finds near a query and that are not right for it.

    python recipes/mine_hard_negatives.py --train_file train.jsonl --model sentence-transformers/all-MiniLM-L6-v2 --output_file train_negatives.jsonl

The search is sentence-transformers' `mine_hard_negatives`. A query is the question and what was written before its `[NSP]`; candidates are all passages of
the training file, and of `--corpus_file`. Left out, since they may be right after all: passages of the same instance and its `positives`; what is nearly as
near as the right passage, or nearer (`--relative_margin`); and passages that hold the text that is to be written, as for DPR. Any sentence-transformers model
will do, also the Emb_seq of a CoSup checkpoint (`model.save_emb_seq`). What is found is added to `negatives`, after negatives that were there.
"""

import importlib.util
import re
from dataclasses import dataclass, field

from shared.cli import clear_errors, parse, table_of_counts

import torch

from modeling_cosup.lines_cosup import writing_lines
from modeling_cosup.tokenization_cosup import render_passage
from trainer.data import content_id, load_corpus, load_instances
from trainer.judging.correctness import normalize_answer

CANDIDATES = 4  # mined for one that is wanted: some hold the answer


@dataclass
class MiningArguments:
    """What is read, what counts as a hard negative, and what is written."""

    train_file: str = field(metadata={"help": "training instances: JSON Lines (.gz or plain) or a dataset name"})
    model: str = field(metadata={"help": "name or path of a sentence-transformers model"})
    output_file: str = field(metadata={"help": "the instances with their negatives, JSON Lines (.gz by the name)"})
    corpus_file: str | None = field(default=None, metadata={"help": "further passages that may be negatives"})
    num_negatives: int = field(default=1, metadata={"help": "of a query, at most"})
    range_min: int = field(default=0, metadata={"help": "so many of the nearest are skipped"})
    range_max: int = field(default=50, metadata={"help": "no passage after this rank is a hard negative"})
    relative_margin: float = field(
        default=0.05,
        metadata={"help": "a negative's similarity is at most the right passage's less this share"},
    )
    passage_template: str = field(default="{title}. {text}", metadata={"help": "how the model reads a passage"})
    batch_size: int = field(default=64, metadata={"help": "texts at once"})
    device: str = field(
        default="cuda" if torch.cuda.is_available() else "cpu", metadata={"help": "where the model runs"}
    )
    dtype: str = field(default="auto", metadata={"help": "of the weights, e.g. bfloat16 on a GPU"})


def main():
    """Read the options and mine."""
    (args,) = parse([MiningArguments], __doc__)
    with clear_errors():
        print(table_of_counts(mine(args)))


def mine(args):
    """
    Write the instances with `negatives`.

    Returns:
        `dict`: how many queries were read, and how many have all the negatives that were asked for, fewer, or none.

    Raises:
        `ValueError`: when an option is out of its range, an instance or passage is malformed, or nothing is retrieved.
        `OSError`: for a model that cannot be loaded.
    """
    if args.num_negatives < 1 or not 0 <= args.range_min < args.range_max:
        raise ValueError(
            f"--num_negatives is {args.num_negatives}, --range_min {args.range_min} and --range_max {args.range_max}, "
            "expected at least 1, and 0 or more and less than range_max."
        )
    instances = load_instances(args.train_file)
    queries = list_queries(instances, args.passage_template)
    if not queries:
        raise ValueError(f"{args.train_file}: none of {len(instances)} instances has a passage, so there is no query.")
    passages = {
        render_passage(segment["passage"], args.passage_template): segment["passage"] for _, segment, _ in queries
    }
    for passage in load_corpus(args.corpus_file) if args.corpus_file else []:
        passages.setdefault(render_passage(passage, args.passage_template), passage)
    near = search(queries, list(passages), args)
    counts = {"queries": len(queries), "with all negatives": 0, "with fewer": 0, "with none": 0}
    for query, segment, right in queries:
        answer = normalize_answer(segment["text"])
        found = [passages[text] for text in near.get((query, right.own), ())]
        found = [p for p in found if not right.holds(p) and not holds(p, answer)][: args.num_negatives]
        segment["negatives"] = segment["negatives"] + found
        counts[
            "with all negatives" if len(found) == args.num_negatives else "with fewer" if found else "with none"
        ] += 1
    with writing_lines(args.output_file) as write:
        for instance in instances:
            write(instance)
    return counts


class Right:
    """
    What is no negative of a query.

    Args:
        own (`str`): its passage, as the retriever reads it.
        ids, contents (`set`): ids, and ids by content, of the passages of its instance, of `positives`, and of the negatives that it has.
    """

    def __init__(self, own, instance, segment):
        known = [other["passage"] for other in instance["segments"] if other["passage"] is not None] + segment[
            "negatives"
        ]
        self.own, self.ids, self.contents = (
            own,
            {p["id"] for p in known} | set(segment["positives"]),
            {content_id(p["title"], p["text"]) for p in known},
        )

    def holds(self, passage):
        """Whether a passage is one of these, by id or content."""
        return passage["id"] in self.ids or content_id(passage["title"], passage["text"]) in self.contents


def list_queries(instances, template):
    """`(query, segment, Right)` of every segment with a passage; the query is the question and all that was written before."""
    queries = []
    for instance in instances:
        written = [re.sub(r"\s*\[SEP\]\s*", " ", instance["input"])]
        for segment in instance["segments"]:
            if segment["passage"] is not None:
                queries.append(
                    (
                        " ".join(written),
                        segment,
                        Right(render_passage(segment["passage"], template), instance, segment),
                    )
                )
            written.append(segment["text"])
    return queries


def search(queries, texts, args):
    """`{(query, right passage): [text]}`: candidates of each query, nearest first."""
    try:
        from datasets import Dataset
        from sentence_transformers import SentenceTransformer
        from sentence_transformers.util import mine_hard_negatives
    except ImportError:
        raise ValueError("mining needs pip install sentence-transformers.") from None
    options = {} if args.dtype == "auto" else {"model_kwargs": {"dtype": args.dtype}}
    model = SentenceTransformer(args.model, device=args.device, **options)
    rows = Dataset.from_dict(
        {"query": [query for query, _, _ in queries], "passage": [right.own for _, _, right in queries]}
    )
    window = min(args.range_max, len(texts) - 1)
    if window <= args.range_min:
        raise ValueError(f"There are {len(texts)} passages: too few for negatives behind rank {args.range_min}.")
    mined = mine_hard_negatives(
        rows, model, corpus=texts, range_min=args.range_min, range_max=window, relative_margin=args.relative_margin,
        num_negatives=min(CANDIDATES * args.num_negatives, window - args.range_min), batch_size=args.batch_size,
        use_faiss=importlib.util.find_spec("faiss") is not None, verbose=False,
    )  # fmt: skip
    near = {}
    for row in mined:
        near.setdefault((row["query"], row["passage"]), []).append(row["negative"])
    return near


def holds(passage, answer):
    """Whether title or text hold an answer, given and compared as normalised words."""
    return (
        bool(answer) and f" {answer} " in f" {normalize_answer(passage['title'])} {normalize_answer(passage['text'])} "
    )


if __name__ == "__main__":
    main()
