"""
Write evaluation instances and a corpus from ALCE: ASQA, QAMPARI and ELI5 with the passages that ALCE retrieved.

    python recipes/prepare_alce.py --dataset asqa --input_file asqa_eval_gtr_top100.json \\
        --output_file alce/asqa.jsonl.gz --output_corpus alce/asqa_corpus.jsonl.gz

The first `--num_candidates` docs of an item become its candidates, in the same order. These candidates of all items
become the corpus. Answers are the long answers of all annotators or, for QAMPARI, every alias of every answer. All
other fields are kept unchanged under `meta`, for ALCE's metrics: among them `qa_pairs` for str_em, `claims` for claim
recall, and `answers` of QAMPARI, a list of aliases for each answer, for list F1.

ALCE does not say which passages are right. `--provenance short_answers` takes each candidate that holds a short
answer, both normalised as in ALCE. `--provenance none`, the default, takes none. If provenance is empty, `meta` has
`"provenance_unknown": true`, so that the question does not count as one that needs no passage.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

from shared.cli import clear_errors, parse, table_of_counts

from modeling_cosup.files_cosup import read_json
from modeling_cosup.lines_cosup import writing_lines
from modeling_cosup.passages_cosup import check_id, check_text
from trainer.data import content_id
from trainer.questions import normalize_answer

from shared.data_files import (
    distinct,
    instruction_of,
    read_dataset_or_file,
    read_passages,
    refuse_for_file,
    refuse_same_file,
)

NOT_META = ("sample_id", "id", "question", "docs", "answer")


@dataclass
class ALCEArguments:
    """The files to read and to write."""

    dataset: Literal["asqa", "qampari", "eli5"] = field(metadata={"help": "which of ALCE's datasets to prepare"})
    input_file: str = field(
        metadata={
            "local_or_hub": True,
            "help": "ALCE's JSON (.gz), a list of items with question and docs; JSON Lines; or a dataset name",
        }
    )
    output_file: str = field(
        metadata={"help": "evaluation instances, JSON Lines (compressed if the name ends in .gz)"}
    )
    output_corpus: str = field(metadata={"help": "the passages in our format"})
    split: str | None = field(default=None, metadata={"help": "split of a dataset name; defaults to validation"})
    num_candidates: int = field(default=100, metadata={"help": "candidates per item; the paper uses 5 and 100"})
    provenance: Literal["none", "short_answers"] = field(
        default="none", metadata={"help": "which candidates are right: unknown, or those that hold a short answer"}
    )
    instruction: str | None = field(default=None, metadata={"help": "defaults to the paper's; may be empty"})


def main() -> None:
    """Read the options and prepare the dataset."""
    (args,) = parse([ALCEArguments], __doc__)
    with clear_errors():
        print(table_of_counts(prepare(args)))


def prepare(args: ALCEArguments) -> Counter[str]:
    """
    Write evaluation instances and the corpus.

    Returns:
        `Counter`: what was read, left out and written.

    Raises:
        `ValueError`: names the file and item, what was found and what was expected; or says why nothing is left.
    """
    if args.num_candidates < 1:
        raise ValueError(f"--num_candidates is {args.num_candidates}, expected at least 1.")
    refuse_same_file(args.output_file, args.output_corpus)
    instruction = instruction_of(args.dataset, args.instruction)
    passages: dict[str, dict] = {}
    counts = Counter({"items read": 0, "items written": 0})
    with writing_lines(args.output_file) as write, writing_lines(args.output_corpus) as write_passage:
        for where, item in read_items(args.input_file, args.split):
            number = counts["items read"]
            counts["items read"] += 1
            candidates = read_docs(item, where, args.num_candidates, passages, counts)
            answers = answers_of(item, args.dataset, where)
            if not answers:
                counts["items left out: no answer"] += 1
                continue
            has_fewer = len(candidates) < args.num_candidates
            # adding 0 gives these counts a row in the table
            counts[f"items with fewer than {args.num_candidates} candidates"] += int(has_fewer)

            short = short_answers(item, where)
            provenance = []
            if args.provenance == "short_answers":
                provenance = [[id] for id in holding_answers(short, candidates, passages)]
            counts["items without provenance"] += int(not provenance)

            meta = {name: value for name, value in item.items() if name not in NOT_META}
            if not provenance:
                meta["provenance_unknown"] = True
            instance = {
                "id": check_id(item.get("sample_id", item.get("id", number)), where),
                "dataset": args.dataset,
                "instruction": instruction,
                "input": check_text(item.get("question"), "question", where),
                "answers": answers,
                "provenance": provenance,
                "candidates": candidates,
                "meta": meta,
            }
            write(instance)
            counts["items written"] += 1

        for passage in passages.values():
            write_passage(passage)
        counts["passages in the corpus"] = len(passages)
        if not counts["items written"] or not passages:
            raise ValueError("No item or no passage is left.\n" + table_of_counts(counts))
    return counts


def read_items(path: str, split: str | None) -> Iterator[tuple[str, dict[str, Any]]]:
    """
    Yield `(where, item)` for each item of a file or a dataset.

    A JSON file holds a list, or an object with the list under `data`, as ALCE writes its results.
    """
    if not str(path).endswith((".json", ".json.gz")):
        for where, row in read_dataset_or_file(path, split, "validation"):
            # a dataset fills the fields that a row lacks with None
            yield where, {name: value for name, value in row.items() if value is not None}
        return
    refuse_for_file(path, split=split)
    data = read_json(path)
    items = data.get("data") if isinstance(data, dict) else data
    if not isinstance(items, list) or not all(isinstance(item, dict) for item in items):
        raise ValueError(
            f"{path}: found {type(data).__name__}, "
            "expected ALCE's list of items, each an object with question and docs."
        )
    for number, item in enumerate(items):
        yield f"{path}, item {number}", item


def read_docs(
    item: dict[str, Any], where: str, num_candidates: int, passages: dict[str, dict], counts: Counter[str]
) -> list[str]:
    """
    Return the ids of an item's candidates, and add the passages to `passages`, by id.

    The id of a doc is the hash of its content if it has none, or if another text already has the same id. Docs with an
    empty text are left out.
    """
    docs = item.get("docs")
    if not isinstance(docs, list) or not all(isinstance(doc, dict) for doc in docs):
        raise ValueError(f"{where}: docs is {docs!r}, expected a list of objects with title and text.")
    candidates = []
    for number, doc in enumerate(docs[:num_candidates]):
        place = f"{where}, docs[{number}]"
        if doc.get("text") == "":
            counts["docs left out: no text"] += 1
            continue
        title = doc.get("title") or ""
        text = check_text(doc.get("text"), "text", place)
        id = content_id(title, text) if doc.get("id") in (None, "") else doc["id"]
        row = {"id": id, "title": title, "text": text}
        _, passage = next(read_passages([(place, row)]))
        if passages.get(passage["id"], passage) != passage:
            counts["docs with the id of another text: their content's hash became the id"] += 1
            passage["id"] = content_id(title, text)
        passages[passage["id"]] = passage
        candidates.append(passage["id"])
    return distinct(candidates)


def answers_of(item: dict[str, Any], dataset: str, where: str) -> list[str]:
    """Return the distinct long answers of an item, or QAMPARI's aliases."""
    if dataset == "qampari":
        alias_lists = item.get("answers") or []
        if not isinstance(alias_lists, list) or not all(isinstance(aliases, list) for aliases in alias_lists):
            raise ValueError(f"{where}: answers is {alias_lists!r}, expected a list of lists of aliases.")
        answers = [alias for aliases in alias_lists for alias in aliases]
    elif item.get("annotations"):
        answers = [annotation.get("long_answer") for annotation in item["annotations"]]
    else:
        answers = [item.get("answer")]
    return distinct(check_text(answer, "answer", where) for answer in answers if answer)


def short_answers(item: dict[str, Any], where: str) -> list[str]:
    """Return the short answers of ASQA's `qa_pairs`, or QAMPARI's aliases; ELI5 has none."""
    pairs = item.get("qa_pairs") or []
    if not isinstance(pairs, list) or not all(map(has_short_answers, pairs)):
        raise ValueError(f"{where}: qa_pairs is {pairs!r}, expected a list of objects with short_answers, a list.")
    answer_lists = [pair["short_answers"] for pair in pairs]
    if not answer_lists:
        answer_lists = item.get("answers") or []
    return [check_text(answer, "short answer", where) for answers in answer_lists for answer in answers]


def has_short_answers(pair: Any) -> bool:
    """Return whether an item of `qa_pairs` is an object with a list of short answers."""
    return isinstance(pair, dict) and isinstance(pair.get("short_answers"), list)


def holding_answers(answers: list[str], candidates: list[str], passages: dict[str, dict]) -> list[str]:
    """Return the candidates whose normalised text holds a normalised short answer."""
    normalized_answers = {normalize_answer(answer) for answer in answers} - {""}
    holding = []
    for id in candidates:
        text = normalize_answer(passages[id]["text"])
        if any(answer in text for answer in normalized_answers):
            holding.append(id)
    return holding


if __name__ == "__main__":
    main()
