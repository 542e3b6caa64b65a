"""
Evaluation instances and a corpus from a BEIR data set: corpus.jsonl, queries.jsonl and qrels.

    python recipes/prepare_beir.py --dataset nq --input_dir beir/nq --qrels_file beir/nq/qrels/test.tsv --output_file beir/nq.jsonl.gz \\
        --output_corpus beir/nq_corpus.jsonl.gz

Each passage whose relevance is above 0 is an evidence set of its own. Queries that the qrels do not name belong to another split and are left out. BEIR
judges retrieval: most of its queries have no answer, and only those whose `metadata` has `answer` or `answers` get any. Where the list is empty,
`build_candidates.py` works, and a recipe that judges answers refuses the file.
"""

from collections import Counter, defaultdict
from dataclasses import dataclass, field
from pathlib import Path

from shared.cli import clear_errors, parse, table_of_counts

from tqdm import tqdm

from modeling_cosup.lines_cosup import lines_with_places, writing_lines
from modeling_cosup.passages_cosup import check_text

from shared.data_files import distinct, instruction_of, read_passages, read_tsv

FILE_ENDINGS = ("", ".gz")


@dataclass
class BEIRArguments:
    """What is read, and what is written."""

    input_dir: str = field(metadata={"help": "folder with corpus.jsonl and queries.jsonl (or .gz)"})
    qrels_file: str = field(metadata={"help": "tab-separated query-id, corpus-id, score, of one split"})
    dataset: str = field(metadata={"help": "name, e.g. nq; also says which instruction of the paper is taken"})
    output_file: str = field(metadata={"help": "evaluation instances, JSON Lines (.gz by the name)"})
    output_corpus: str = field(metadata={"help": "the passages in our format"})
    instruction: str | None = field(default=None, metadata={"help": "by default the paper's; may be empty"})


def main():
    """Read the options and prepare the data set."""
    (args,) = parse([BEIRArguments], __doc__)
    with clear_errors():
        print(table_of_counts(prepare(args)))


def prepare(args):
    """
    Write evaluation instances and corpus.

    Returns:
        `Counter`: what was read, left out and written.

    Raises:
        `ValueError`: names file and line, what was found and what was expected; or says why nothing is left.
    """
    instruction, counts = instruction_of(args.dataset, args.instruction), Counter()
    relevant = read_qrels(args.qrels_file)
    wanted, found = {id for ids in relevant.values() for id in ids}, set()
    with writing_lines(args.output_file) as write, writing_lines(args.output_corpus) as write_passage:
        for where, passage in tqdm(
            read_passages_with_text(find(args.input_dir, "corpus.jsonl"), counts),
            desc="Reading passages",
            unit=" passages",
        ):
            if passage["id"] in wanted:
                if passage["id"] in found:
                    raise ValueError(f"{where}: id {passage['id']!r} stands there twice; ids must be unique.")
                found.add(passage["id"])
            write_passage(passage)
            counts["passages in the corpus"] += 1
        for where, value in lines_with_places(find(args.input_dir, "queries.jsonl")):
            id = check_text(value.get("_id"), "_id", where)
            provenance = [[passage] for passage in relevant.get(id, []) if passage in found]
            if not provenance:
                counts[
                    f"queries left out: {'the corpus lacks their passages' if id in relevant else 'of another split'}"
                ] += 1
                continue
            answers = answers_of(value.get("metadata") or {}, where)
            counts["queries written, with answers" if answers else "queries written, without answers"] += 1
            facts = {
                "dataset": args.dataset,
                "instruction": instruction,
                "input": check_text(value.get("text"), "text", where),
                "answers": answers,
            }
            write({"id": id, **facts, "provenance": provenance, "candidates": []})
        counts.update({"gold passages": len(found), "gold passages that the corpus lacks": len(wanted - found)})
        if not counts["queries written, with answers"] + counts["queries written, without answers"]:
            raise ValueError("No query is left.\n" + table_of_counts(counts))
    return counts


def find(folder, name):
    """The file of a folder, plain or `.gz`."""
    for ending in FILE_ENDINGS:
        if (path := Path(folder, name + ending)).is_file():
            return path
    raise FileNotFoundError(f"{folder} holds no {name}, nor {name}.gz.")


def read_qrels(path):
    """Relevant passages, `dict[str, list[str]]`, of the queries of a split."""
    relevant = defaultdict(list)
    for where, row in read_tsv(path, ["query-id", "corpus-id", "score"]):
        try:
            score = int(row["score"])
        except ValueError:
            raise ValueError(f"{where}: score is {row['score']!r}, expected an integer.") from None
        if score > 0:
            relevant[row["query-id"]].append(row["corpus-id"])
    return {query: distinct(ids) for query, ids in relevant.items()}


def read_passages_with_text(path, counts):
    """`(where, passage)` pairs; BEIR has passages of empty text, which no embedding stands for: they are counted and left out."""
    for where, value in lines_with_places(path):
        if value.get("text") == "":
            counts["passages left out: no text"] += 1
            continue
        yield from read_passages([(where, value)])


def answers_of(metadata, where):
    """Answers that a query's metadata holds, `list[str]`."""
    answers = metadata.get("answers", metadata.get("answer")) if isinstance(metadata, dict) else None
    answers = [] if answers is None else [answers] if isinstance(answers, str) else answers
    if not isinstance(answers, list) or not all(isinstance(answer, str) for answer in answers):
        raise ValueError(f"{where}: metadata has answers {answers!r}, expected a string or a list of strings.")
    return distinct(answer for answer in answers if answer.strip())


if __name__ == "__main__":
    main()
