"""
Write evaluation instances and a corpus from a BEIR dataset: corpus.jsonl, queries.jsonl and qrels.

    python recipes/prepare_beir.py --dataset nq --input_dir beir/nq --qrels_file beir/nq/qrels/test.tsv \\
        --output_file beir/nq.jsonl.gz --output_corpus beir/nq_corpus.jsonl.gz

Each passage with a relevance above 0 is an evidence set by itself. Queries that are not in the qrels belong to another
split and are left out, and so are queries whose passages all have relevance 0. BEIR judges retrieval, so most of its
queries have no answers: only queries with `answer` or `answers` in their `metadata` get any. `build_candidates.py`
works with an empty list of answers; recipes that judge answers refuse the file.

BEIR embeds a passage's title and text as one, so the title of a passage without text becomes its text. BEIR also
ignores a hit that has the id of the query, as in ArguAna and Quora, where a query is itself a passage. An evaluation
here counts it as a wrong hit: the table says how many queries that concerns.
"""

from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from shared.cli import clear_errors, parse, table_of_counts

from tqdm import tqdm

from modeling_cosup.lines_cosup import lines_with_places, writing_lines
from modeling_cosup.passages_cosup import check_id, check_text

from shared.data_files import distinct, instruction_of, read_passages, read_tsv, refuse_same_file

FILE_ENDINGS = ("", ".gz")


@dataclass
class BEIRArguments:
    """The files to read and to write."""

    input_dir: str = field(metadata={"help": "folder with corpus.jsonl and queries.jsonl (or .gz)"})
    qrels_file: str = field(metadata={"help": "tab-separated query-id, corpus-id, score, of one split"})
    dataset: str = field(metadata={"help": "name of the dataset, e.g. nq; also selects the paper's instruction"})
    output_file: str = field(
        metadata={"help": "evaluation instances, JSON Lines (compressed if the name ends in .gz)"}
    )
    output_corpus: str = field(metadata={"help": "the passages in our format"})
    instruction: str | None = field(default=None, metadata={"help": "defaults to the paper's; may be empty"})


def main() -> None:
    """Read the options and prepare the dataset."""
    (args,) = parse([BEIRArguments], __doc__)
    with clear_errors():
        print(table_of_counts(prepare(args)))


def prepare(args: BEIRArguments) -> Counter[str]:
    """
    Write evaluation instances and the corpus.

    Returns:
        `Counter`: what was read, left out and written.

    Raises:
        `ValueError`: names the file and line, what was found and what was expected; or says why nothing is left.
    """
    refuse_same_file(args.output_file, args.output_corpus)
    instruction = instruction_of(args.dataset, args.instruction)
    counts: Counter[str] = Counter()
    relevant = read_qrels(args.qrels_file)
    with writing_lines(args.output_file) as write, writing_lines(args.output_corpus) as write_passage:
        gold_ids = {id for ids in relevant.values() for id in ids}
        present_ids = set()
        asked_ids = set()
        corpus = read_passages_with_text(find(args.input_dir, "corpus.jsonl"), counts)
        for where, passage in tqdm(corpus, desc="Reading passages", unit=" passages"):
            if passage["id"] in present_ids:
                raise ValueError(f"{where}: the id {passage['id']!r} is already in the corpus; ids must be unique.")
            if passage["id"] in gold_ids:
                present_ids.add(passage["id"])
            if passage["id"] in relevant:
                counts["queries with the id of a passage, which BEIR ignores"] += 1
            write_passage(passage)
            counts["passages in the corpus"] += 1

        for where, query in lines_with_places(find(args.input_dir, "queries.jsonl")):
            id = check_id(query.get("_id"), where, "_id")
            if id not in relevant:
                counts["queries left out: of another split"] += 1
                continue
            asked_ids.add(id)
            if not relevant[id]:
                counts["queries left out: no passage is relevant"] += 1
                continue
            provenance = [[passage_id] for passage_id in relevant[id] if passage_id in present_ids]
            if not provenance:
                counts["queries left out: the corpus lacks their passages"] += 1
                continue
            answers = answers_of(query.get("metadata") or {}, where)
            if answers:
                counts["queries written, with answers"] += 1
            else:
                counts["queries written, without answers"] += 1
            instance = {
                "id": id,
                "dataset": args.dataset,
                "instruction": instruction,
                "input": check_text(query.get("text"), "text", where),
                "answers": answers,
                "provenance": provenance,
                "candidates": [],
            }
            write(instance)

        counts["queries of the qrels that queries.jsonl lacks"] = len(relevant.keys() - asked_ids)
        counts["gold passages"] = len(present_ids)
        counts["gold passages that the corpus lacks"] = len(gold_ids - present_ids)
        if not counts["queries written, with answers"] and not counts["queries written, without answers"]:
            raise ValueError("No query is left.\n" + table_of_counts(counts))
    return counts


def find(folder: str, name: str) -> Path:
    """Return the path of a file in a folder, plain or `.gz`."""
    for ending in FILE_ENDINGS:
        path = Path(folder, name + ending)
        if path.is_file():
            return path
    raise FileNotFoundError(f"{folder} holds no {name}, nor {name}.gz.")


def read_qrels(path: str) -> dict[str, list[str]]:
    """Return the ids of the relevant passages of each query of a split; none if all were judged irrelevant."""
    relevant: dict[str, list[str]] = defaultdict(list)
    for where, row in read_tsv(path, ["query-id", "corpus-id", "score"]):
        try:
            score = int(row["score"])
        except ValueError:
            raise ValueError(f"{where}: score is {row['score']!r}, expected an integer.") from None
        passage_ids = relevant[row["query-id"]]
        if score > 0:
            passage_ids.append(row["corpus-id"])
    return {query: distinct(ids) for query, ids in relevant.items()}


def read_passages_with_text(path: Path, counts: Counter[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield `(where, passage)`. A title becomes the text if there is none; passages without either are left out."""
    for where, row in lines_with_places(path):
        text, title = row.get("text"), row.get("title") or ""
        if isinstance(text, str) and isinstance(title, str) and not text.strip():
            if not title.strip():
                counts["passages left out: no text"] += 1
                continue
            counts["passages whose title became their text"] += 1
            row = {**row, "title": "", "text": title}
        yield from read_passages([(where, row)])


def answers_of(metadata: Any, where: str) -> list[str]:
    """Return the answers in a query's metadata."""
    answers = None
    if isinstance(metadata, dict):
        answers = metadata.get("answers", metadata.get("answer"))
    if answers is None:
        return []
    if isinstance(answers, str):
        answers = [answers]
    if not isinstance(answers, list) or not all(isinstance(answer, str) for answer in answers):
        raise ValueError(f"{where}: metadata has answers {answers!r}, expected a string or a list of strings.")
    return distinct(answer for answer in answers if answer.strip())


if __name__ == "__main__":
    main()
