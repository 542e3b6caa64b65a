"""
Evaluation instances and a corpus from ALCE: ASQA, QAMPARI and ELI5 with the passages that ALCE retrieved.

    python recipes/prepare_alce.py --dataset asqa --input_file asqa_eval_gtr_top100.json --output_file alce/asqa.jsonl.gz \\
        --output_corpus alce/asqa_corpus.jsonl.gz

An item's docs become its candidates, the first `--num_candidates` of them in their order; the docs of all items become the corpus. Answers are the long answers
(of all annotators; for QAMPARI every alias of every answer). What ALCE's metrics need besides stands under `meta`, as ALCE has it: `qa_pairs` for str_em,
`claims` for claim recall, `answers` of QAMPARI, and every other field.

ALCE does not say which passages are right. `--provenance short_answers` takes each candidate that holds a short answer, both normalised as ALCE does it;
`--provenance none`, the default, takes none. Where provenance is empty `meta` says so, `"provenance_unknown": true`: such a question must not count as one
that needs no passage.
"""

from collections import Counter
from dataclasses import dataclass, field
from typing import Literal

from shared.cli import clear_errors, parse, table_of_counts

from modeling_cosup.files_cosup import read_json
from modeling_cosup.lines_cosup import writing_lines
from modeling_cosup.passages_cosup import check_text
from trainer.data import content_id, read_rows
from trainer.judging.correctness import normalize_answer

from shared.data_files import distinct, instruction_of, read_passages

NOT_META = ("sample_id", "id", "question", "docs", "answer")


@dataclass
class ALCEArguments:
    """What is read, and what is written."""

    dataset: Literal["asqa", "qampari", "eli5"] = field(metadata={"help": "which of ALCE's data sets it is"})
    input_file: str = field(
        metadata={
            "help": "ALCE's JSON, a list of items with question and docs (.gz or plain), JSON Lines, or a dataset name"
        }
    )
    output_file: str = field(metadata={"help": "evaluation instances, JSON Lines (.gz by the name)"})
    output_corpus: str = field(metadata={"help": "the passages in our format"})
    split: str = field(default="validation", metadata={"help": "of a dataset name"})
    num_candidates: int = field(default=100, metadata={"help": "of an item; the paper's are 5 and 100"})
    provenance: Literal["none", "short_answers"] = field(
        default="none", metadata={"help": "which candidates are right: not known, or each that holds a short answer"}
    )
    instruction: str | None = field(default=None, metadata={"help": "by default the paper's; may be empty"})


def main():
    """Read the options and prepare the data set."""
    (args,) = parse([ALCEArguments], __doc__)
    with clear_errors():
        print(table_of_counts(prepare(args)))


def prepare(args):
    """
    Write evaluation instances and corpus.

    Returns:
        `Counter`: what was read, left out and written.

    Raises:
        `ValueError`: names file and item, what was found and what was expected; or says why nothing is left.
    """
    if args.num_candidates < 1:
        raise ValueError(f"--num_candidates is {args.num_candidates}, expected at least 1.")
    instruction, passages = instruction_of(args.dataset, args.instruction), {}
    counts = Counter({"items read": 0, "items written": 0})
    with writing_lines(args.output_file) as write, writing_lines(args.output_corpus) as write_passage:
        for where, item in read_items(args.input_file, args.split):
            counts["items read"] += 1
            pool = read_docs(item, where, args.num_candidates, passages, counts)
            answers = answers_of(item, args.dataset, where)
            if not answers:
                counts["items left out: no answer"] += 1
                continue
            counts[f"items with fewer than {args.num_candidates} candidates"] += len(pool) < args.num_candidates
            meta = {name: value for name, value in item.items() if name not in NOT_META}
            short = short_answers(item, where)
            provenance = (
                [[id] for id in holding_answers(short, pool, passages)] if args.provenance == "short_answers" else []
            )
            counts["items without provenance"] += not provenance
            meta |= {} if provenance else {"provenance_unknown": True}
            id, question = (
                str(item.get("sample_id", item.get("id", counts["items read"] - 1))),
                check_text(item.get("question"), "question", where),
            )
            facts = {"dataset": args.dataset, "instruction": instruction, "input": question, "answers": answers}
            write({"id": id, **facts, "provenance": provenance, "candidates": pool, "meta": meta})
            counts["items written"] += 1
        for passage in passages.values():
            write_passage(passage)
        counts["passages in the corpus"] = len(passages)
        if not counts["items written"] or not passages:
            raise ValueError("No item or no passage is left.\n" + table_of_counts(counts))
    return counts


def read_items(path, split):
    """`(where, dict)` pairs of the items of a file: a list, or an object with the list under `data`, as ALCE writes its results; or of a dataset name."""
    if not str(path).endswith((".json", ".json.gz")):
        for where, row in read_rows(path, split):
            yield (
                where,
                {name: value for name, value in row.items() if value is not None},
            )  # data sets fill what a row lacks
        return
    data = read_json(path)
    items = data.get("data") if isinstance(data, dict) else data
    if not isinstance(items, list) or not all(isinstance(item, dict) for item in items):
        raise ValueError(
            f"{path}: found {type(data).__name__}, expected ALCE's list of items, each an object with question and docs."
        )
    for number, item in enumerate(items):
        yield f"{path}, item {number}", item


def read_docs(item, where, num_candidates, passages, counts):
    """
    Ids of an item's candidates; their passages are added to `passages` (`dict` of id to passage).

    A doc without id gets the id of its content, and so does one whose id belongs to another text. Docs of empty text are left out.
    """
    docs = item.get("docs")
    if not isinstance(docs, list) or not all(isinstance(doc, dict) for doc in docs):
        raise ValueError(f"{where}: docs is {docs!r}, expected a list of objects with title and text.")
    pool = []
    for number, doc in enumerate(docs[:num_candidates]):
        place = f"{where}, docs[{number}]"
        if doc.get("text") == "":
            counts["docs left out: no text"] += 1
            continue
        title, text = doc.get("title") or "", check_text(doc.get("text"), "text", place)
        ((_, passage),) = read_passages(
            [(place, {"id": doc.get("id") or content_id(title, text), "title": title, "text": text})]
        )
        if passages.get(passage["id"], passage) != passage:
            counts["docs whose id stands for another text: theirs is that of the content"] += 1
            passage["id"] = content_id(title, text)
        passages[passage["id"]] = passage
        pool.append(passage["id"])
    return distinct(pool)


def answers_of(item, dataset, where):
    """Long answers, or QAMPARI's aliases: `list[str]`, each once."""
    if dataset == "qampari":
        found = item.get("answers") or []
        if not isinstance(found, list) or not all(isinstance(aliases, list) for aliases in found):
            raise ValueError(f"{where}: answers is {found!r}, expected a list of lists of aliases.")
        answers = [alias for aliases in found for alias in aliases]
    else:
        answers = [annotation.get("long_answer") for annotation in item.get("annotations") or []] or [
            item.get("answer")
        ]
    answers = [answer for answer in answers if answer]
    return distinct(check_text(answer, "answer", where) for answer in answers)


def short_answers(item, where):
    """Short answers of ASQA's `qa_pairs`, else QAMPARI's aliases; ELI5 has none: `list[str]`."""
    pairs = item.get("qa_pairs") or []
    if not isinstance(pairs, list) or not all(
        isinstance(pair, dict) and isinstance(pair.get("short_answers"), list) for pair in pairs
    ):
        raise ValueError(f"{where}: qa_pairs is {pairs!r}, expected a list of objects with short_answers, a list.")
    lists = [pair["short_answers"] for pair in pairs] or item.get("answers") or []
    return [check_text(answer, "short answer", where) for answers in lists for answer in answers]


def holding_answers(answers, pool, passages):
    """The candidates whose normalised text holds a normalised short answer."""
    answers = {normalize_answer(answer) for answer in answers} - {""}
    return [id for id in pool if any(answer in normalize_answer(passages[id]["text"]) for answer in answers)]


if __name__ == "__main__":
    main()
