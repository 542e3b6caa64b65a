"""
Add hard negatives to training instances: passages that a retriever finds near a query, but that are wrong for it.

    python recipes/mine_hard_negatives.py --train_file train.jsonl --model sentence-transformers/all-MiniLM-L6-v2 \\
        --output_file train_negatives.jsonl

The search is sentence-transformers' `mine_hard_negatives`. A query is the question and the text written before its
`[NSP]`. Candidates are the right passages of all instances, and the passages of `--corpus_file`. Passages that may be
right after all are left out: passages of the same instance, its `positives` and its `provenance`; passages that are
nearer than the right one, or almost as near (`--relative_margin`); and passages that hold the text to be written or
one of the instance's `answers`, as for DPR. Any sentence-transformers model will do, even the Emb_seq of a CoSup
checkpoint (`model.save_emb_seq`). The new negatives are appended to `negatives`; all other fields of a row are copied
as they are.
"""

import importlib.util
import json
import re
from dataclasses import dataclass
from typing import Any

from shared.cli import check_options, clear_errors, parse, table_of_counts

from shared.mining_arguments import MiningArguments

if __name__ == "__main__":  # --help and a wrong option do not wait for the imports below
    check_options([MiningArguments], __doc__)

from modeling_cosup.lines_cosup import writing_lines
from modeling_cosup.tokenization_cosup import render_passage
from trainer.data import content_id, load_corpus, load_instances, read_rows
from trainer.passage_contents import PassageContents
from trainer.questions import gold_ids

from shared.held_answers import holds_answer

CANDIDATES_PER_NEGATIVE = 4  # more than one, because some may be right and are left out


def main() -> None:
    """Read the options and mine."""
    (args,) = parse([MiningArguments], __doc__)
    with clear_errors():
        print(table_of_counts(mine(args)))


@dataclass
class Query:
    """
    A query for hard negatives.

    Args:
        text (`str`): the question and everything written before the segment.
        segment (`dict`): the segment that gets the negatives.
        passage_text (`str`): the passage of the segment, as the retriever reads it.
        known_ids, known_contents (`set[str]`): ids and content hashes of passages that may be right or are negatives
            already: all passages of the instance, its `provenance`, and `positives` and `negatives` of the segment.
        answers (`list[str]`): texts that no negative may hold: that of the segment, and the answers of the instance.
    """

    text: str
    segment: dict[str, Any]
    passage_text: str
    known_ids: set[str]
    known_contents: set[str]
    answers: list[str]

    def knows(self, passage: dict[str, Any]) -> bool:
        """Return whether a passage is known, by its id or its content."""
        return passage["id"] in self.known_ids or content_id(passage["title"], passage["text"]) in self.known_contents


def mine(args: MiningArguments) -> dict[str, int]:
    """
    Write the instances with `negatives`.

    Returns:
        `dict`: how many queries were read, and how many got all the requested negatives, fewer, or none.

    Raises:
        `ValueError`: if an option is out of range, an instance or passage is malformed, JSON lacks what a field holds,
            an id has two contents in the training file and the corpus, or there is no query.
        `OSError`: for a model that cannot be loaded.
    """
    if args.num_negatives < 1 or not 0 <= args.range_min < args.range_max:
        raise ValueError(
            f"--num_negatives is {args.num_negatives}, --range_min {args.range_min} and --range_max {args.range_max}, "
            "expected at least 1, and 0 or more and less than range_max."
        )
    instances = load_instances(args.train_file)
    check_fields(args.train_file)
    queries = list_queries(instances, args.passage_template)
    if not queries:
        raise ValueError(f"{args.train_file}: none of {len(instances)} instances has a passage, so there is no query.")
    passages = {query.passage_text: query.segment["passage"] for query in queries}
    if args.corpus_file:
        contents = PassageContents()
        for instance in instances:
            contents.add_instance(instance, instance.where)
        for passage in load_corpus(args.corpus_file, contents=contents):
            passages.setdefault(render_passage(passage, args.passage_template), passage)
    candidate_texts = search(queries, list(passages), args)

    counts = {"queries": len(queries), "with all negatives": 0, "with fewer": 0, "with none": 0}
    for query in queries:
        candidates = [passages[text] for text in candidate_texts.get((query.text, query.passage_text), [])]
        negatives = choose_negatives(query, candidates)[: args.num_negatives]
        query.segment["negatives"] = query.segment["negatives"] + negatives
        if len(negatives) == args.num_negatives:
            counts["with all negatives"] += 1
        elif negatives:
            counts["with fewer"] += 1
        else:
            counts["with none"] += 1
    with writing_lines(args.output_file) as write:
        for (_, row), instance in zip(read_rows(args.train_file), instances, strict=True):
            write(with_negatives(row, instance))
    return counts


def check_fields(train_file: str) -> None:
    """Raise a `ValueError` for a field that JSON lacks, such as a date or an image, before anything is searched."""
    for where, row in read_rows(train_file):
        for name, value in row.items():
            try:
                json.dumps(value)
            except TypeError as error:
                raise ValueError(f"{where}: {name} cannot be written as JSON ({error}): remove this column.") from None


def with_negatives(row: dict[str, Any], instance: dict[str, Any]) -> dict[str, Any]:
    """Return a row of the training file with the new negatives of its instance after those that it has."""
    if not instance["segments"]:
        return row
    segments = []
    for segment, mined_segment in zip(row["segments"], instance["segments"], strict=True):
        given = segment.get("negatives") or []
        new = mined_segment["negatives"][len(given) :]
        segments.append({**segment, "negatives": [*given, *new]} if new else segment)
    return {**row, "segments": segments}


def list_queries(instances: list[dict[str, Any]], template: str) -> list[Query]:
    """Return a query for every segment with a passage."""
    queries = []
    for instance in instances:
        written = [re.sub(r"\s*\[SEP\]\s*", " ", instance["input"])]
        for segment in instance["segments"]:
            if segment["passage"] is not None:
                queries.append(make_query(" ".join(written), instance, segment, template))
            written.append(segment["text"])
    return queries


def make_query(text: str, instance: dict[str, Any], segment: dict[str, Any], template: str) -> Query:
    """Return the query of one segment of an instance."""
    known = [other["passage"] for other in instance["segments"] if other["passage"] is not None]
    known += segment["negatives"]
    known_ids = {passage["id"] for passage in known} | set(segment["positives"])
    if "provenance" in instance:
        known_ids |= gold_ids(instance)
    known_contents = {content_id(passage["title"], passage["text"]) for passage in known}
    passage_text = render_passage(segment["passage"], template)
    answers = [segment["text"], *instance.get("answers", [])]
    return Query(text, segment, passage_text, known_ids, known_contents, answers)


def search(queries: list[Query], texts: list[str], args: MiningArguments) -> dict[tuple[str, str], list[str]]:
    """
    Search all passages for each query.

    Returns:
        `dict`: `(query, right passage)` -> texts of the candidates, nearest first.
    """
    try:
        from datasets import Dataset
        from sentence_transformers import SentenceTransformer
        from sentence_transformers.util import mine_hard_negatives
    except ImportError:
        raise ValueError("mining needs pip install sentence-transformers.") from None
    options = {} if args.dtype == "auto" else {"model_kwargs": {"dtype": args.dtype}}
    model = SentenceTransformer(args.model, device=args.device, **options)
    columns = {"query": [query.text for query in queries], "passage": [query.passage_text for query in queries]}
    last_rank = min(args.range_max, len(texts) - 1)
    if last_rank <= args.range_min:
        raise ValueError(f"There are {len(texts)} passages: too few for negatives after rank {args.range_min}.")
    mined = mine_hard_negatives(
        Dataset.from_dict(columns),
        model,
        corpus=texts,
        range_min=args.range_min,
        range_max=last_rank,
        relative_margin=args.relative_margin,
        num_negatives=min(CANDIDATES_PER_NEGATIVE * args.num_negatives, last_rank - args.range_min),
        batch_size=args.batch_size,
        use_faiss=importlib.util.find_spec("faiss") is not None,
        verbose=False,
    )
    candidates: dict[tuple[str, str], list[str]] = {}
    for row in mined:
        candidates.setdefault((row["query"], row["passage"]), []).append(row["negative"])
    return candidates


def choose_negatives(query: Query, candidates: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the candidates that are not known and do not hold an answer of the query, in the same order."""
    negatives = []
    for passage in candidates:
        text = f"{passage['title']} {passage['text']}"
        may_be_right = query.knows(passage) or holds_answer(text, query.answers)
        if not may_be_right:
            negatives.append(passage)
    return negatives


if __name__ == "__main__":
    main()
