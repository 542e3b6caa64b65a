"""
Write evaluation instances and a corpus from KILT: the paper's eight tasks, over KILT's Wikipedia or another corpus.

    python recipes/prepare_kilt.py --task nq --input_file nq-dev-kilt.jsonl \\
        --knowledge_file kilt_knowledgesource.json \\
        --output_file kilt/nq.jsonl.gz --output_corpus kilt/corpus.jsonl.gz
    python recipes/prepare_kilt.py --task fever --input_file fever-dev-kilt.jsonl \\
        --corpus_file kilt/corpus.jsonl.gz --output_file kilt/fever.jsonl.gz
    python recipes/prepare_kilt.py --task nq --input_file facebook/kilt_tasks --config_name nq --split validation \\
        --corpus_file psgs_w100.tsv.gz --output_file dpr/nq.jsonl.gz --output_corpus dpr/corpus.jsonl.gz

Pages are cut as for DPR: into passages of 100 consecutive words, but never across a section. Title and headings are
not part of the text. A passage keeps the numbers of its first and last paragraph, so one corpus serves all tasks.
The corpus is streamed: only passages of pages that the questions name are held in memory.

Provenance. A KILT provenance names a page and usually a range of paragraphs. Each output has a list of them, an
evidence set, which is needed as a whole. Any one passage that overlaps the range counts as that provenance, so a set
of two ranges with two passages each becomes four sets of passage ids. If the range or the paragraphs of the passages
are unknown, or no passage overlaps the range, any passage of the page counts. Passages that do not name their page
(DPR's and BEIR's) belong to the page with the same title or, with `--match id`, with the same id.

Questions without an answer, or without provenance in the corpus, are left out and counted: with empty provenance, a
question would count as one that needs no passage. FEVER's labels are lower-cased, as its instruction has them.
TriviaQA's KILT files hold no questions: pass TriviaQA's own file (`qa/wikipedia-dev.json` of `triviaqa-rc.tar.gz`) as
`--triviaqa_file`.
"""

import itertools
import math
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from shared.cli import clear_errors, parse, table_of_counts

from tqdm import tqdm

from modeling_cosup.files_cosup import read_json
from modeling_cosup.lines_cosup import lines_with_places, writing_lines
from modeling_cosup.passages_cosup import check_id, check_text

from shared.data_files import (
    distinct,
    instruction_of,
    read_dataset_or_file,
    read_passages,
    refuse_for_file,
    refuse_same_file,
)

HEADING = "Section::::"
BULLET = re.compile(r"^BULLET::::(- )?")
MAX_SETS = 1000  # maximum number of sets of passage ids that one evidence set may become

Reference = tuple[str, str, int | None, int | None]  # page id, title, first paragraph, last paragraph
Evidence = tuple[Reference, ...]  # all of them are needed


@dataclass
class KILTArguments:
    """The files to read and to write."""

    task: Literal["nq", "triviaqa", "hotpotqa", "eli5", "fever", "trex", "zsre", "wow"] = field(
        metadata={"help": "zsre is KILT's structured_zeroshot"}
    )
    input_file: str = field(
        metadata={"local_or_hub": True, "help": "questions: KILT's JSON Lines (.gz or plain) or a dataset name"}
    )
    output_file: str = field(
        metadata={"help": "evaluation instances, JSON Lines (compressed if the name ends in .gz)"}
    )
    knowledge_file: str | None = field(
        default=None,
        metadata={"help": "KILT's knowledge source: JSON Lines (.gz or plain), one page a line, cut into passages"},
    )
    corpus_file: str | None = field(
        default=None,
        metadata={"help": "instead, passages: our format, BEIR's corpus.jsonl or DPR's psgs_w100.tsv (.gz or plain)"},
    )
    output_corpus: str | None = field(
        default=None, metadata={"help": "the passages in our format; needed with --knowledge_file"}
    )
    config_name: str | None = field(
        default=None, metadata={"help": "configuration of a dataset name, e.g. nq of facebook/kilt_tasks"}
    )
    split: str | None = field(default=None, metadata={"help": "split of a dataset name; defaults to validation"})
    match: Literal["title", "id"] = field(
        default="title", metadata={"help": "how to find the page of a passage that does not name it"}
    )
    words: int = field(default=100, metadata={"help": "words per passage that is cut from a page"})
    max_other_pages: int | None = field(
        default=None, metadata={"help": "for a small corpus: keep all gold pages and at most this many others"}
    )
    triviaqa_file: str | None = field(default=None, metadata={"help": "TriviaQA's own JSON, for its questions"})
    instruction: str | None = field(default=None, metadata={"help": "defaults to the paper's; may be empty"})


def main() -> None:
    """Read the options and prepare the task."""
    (args,) = parse([KILTArguments], __doc__)
    with clear_errors():
        print(table_of_counts(prepare(args)))


def prepare(args: KILTArguments) -> Counter[str]:
    """
    Write evaluation instances and the corpus.

    Returns:
        `Counter`: what was read, left out and written, in the order of the printed table.

    Raises:
        `ValueError`: names the file and line, what was found and what was expected; or says why nothing is left.
    """
    check_arguments(args)
    instruction = instruction_of(args.task, args.instruction)
    counts = Counter({"questions read": 0})
    questions = list(read_questions(args, counts))
    pages = Pages(questions, args.match)
    with writing_lines(args.output_file) as write, writing_lines(args.output_corpus) as write_passage:
        for passage in tqdm(read_corpus_of(args, pages, counts), desc="Reading passages", unit=" passages"):
            pages.add(passage)
            write_passage(passage)
            counts["passages in the corpus"] += 1

        gold: set[str] = set()
        matches: Counter[str] = Counter()
        for question in questions:
            provenance = pages.provenance(question["evidence"], matches)
            if not provenance:
                counts["questions left out: the corpus lacks their pages"] += 1
                continue
            for passage_ids in provenance:
                gold.update(passage_ids)
            instance = {
                "id": question["id"],
                "dataset": args.task,
                "instruction": instruction,
                "input": question["input"],
                "answers": question["answers"],
                "provenance": provenance,
                "candidates": [],
            }
            write(instance)
            counts["questions written"] += 1

        counts.update(matches)
        counts["gold passages"] = len(gold)
        if not counts["questions written"]:
            raise ValueError("No question is left.\n" + table_of_counts(counts))
    return counts


def check_arguments(args: KILTArguments) -> None:
    """Refuse options that contradict each other or are out of range, before anything is read."""
    refuse_same_file(args.output_file, args.output_corpus)
    if (args.knowledge_file is None) == (args.corpus_file is None):
        raise ValueError("give either --knowledge_file or --corpus_file.")
    if args.knowledge_file and not args.output_corpus:
        raise ValueError("--knowledge_file is cut into passages: say where they go with --output_corpus.")
    if args.corpus_file and (args.words != 100 or args.max_other_pages is not None):
        raise ValueError(
            "--words and --max_other_pages cut pages; --corpus_file holds passages, which stay as they are."
        )
    if args.words < 1:
        raise ValueError(f"--words is {args.words}, expected at least 1.")
    if args.max_other_pages is not None and args.max_other_pages < 0:
        raise ValueError(f"--max_other_pages is {args.max_other_pages}, expected at least 0.")


# ---------------------------------------------------------------------- questions


def read_questions(args: KILTArguments, counts: Counter[str]) -> Iterator[dict[str, Any]]:
    """
    Read questions with their answers and evidence sets.

    Yields:
        `dict`: `id`, `input`, `answers`, and `evidence`, a list of evidence sets; each is a tuple of
        `(page id, title, first paragraph, last paragraph)`. The paragraphs may be None.
    """
    texts = triviaqa_questions(args.triviaqa_file) if args.triviaqa_file else {}
    for where, row in read_tasks(args):
        counts["questions read"] += 1
        id = check_id(row.get("id"), where)
        text = row.get("input") or texts.get(id)
        if not text and args.task == "triviaqa":
            if texts:
                reason = f"{args.triviaqa_file} lacks {id}"
            else:
                reason = "TriviaQA's files hold none, name its own as --triviaqa_file"
            raise ValueError(f"{where}: no question ({reason}).")

        answers, evidence = read_outputs(row.get("output"), where)
        if not answers:
            counts["questions left out: no answer"] += 1
            continue
        if not evidence:
            counts["questions left out: no provenance"] += 1
            continue
        if args.task == "fever":
            answers = [answer.lower() for answer in answers]
        text = check_text(text, "input", where)
        yield {"id": id, "input": text, "answers": distinct(answers), "evidence": evidence}


def read_tasks(args: KILTArguments) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield `(where, row)` for each question of a file or a dataset."""
    if args.config_name is None:
        yield from read_dataset_or_file(args.input_file, args.split, "validation")
        return
    if Path(args.input_file).is_file():
        refuse_for_file(args.input_file, config_name=args.config_name)
    from datasets import load_dataset

    split = args.split or "validation"
    rows = load_dataset(args.input_file, args.config_name, split=split)
    for number, row in enumerate(rows):
        yield f"{args.input_file} ({args.config_name}, {split}), row {number}", row


def read_outputs(outputs: Any, where: str) -> tuple[list[str], list[Evidence]]:
    """Return all answers of a question's outputs, repeated ones too, and their distinct evidence sets."""
    if outputs is not None and not isinstance(outputs, list):
        raise ValueError(
            f"{where}: output is {outputs!r}, expected a list of objects with answer, provenance or both."
        )
    answers, evidence = [], []
    for i, output in enumerate(outputs or []):
        place = f"{where}: output[{i}]"
        if not isinstance(output, dict):
            raise ValueError(f"{place} is {output!r}, expected an object with answer, provenance or both.")
        answer = output.get("answer")
        if answer is not None and not isinstance(answer, str):
            raise ValueError(f"{place}.answer is {answer!r}, expected a string.")
        if answer and answer.strip():
            answers.append(answer.strip())

        references = output.get("provenance") or []
        if not isinstance(references, list) or not all(map(names_a_page, references)):
            raise ValueError(f"{place}.provenance is {references!r}, expected a list of objects with wikipedia_id.")
        if references:
            evidence.append(tuple(distinct(map(read_reference, references))))
    return answers, distinct(evidence)


def names_a_page(reference: Any) -> bool:
    """Return whether an item of `provenance` is an object with a `wikipedia_id`."""
    return isinstance(reference, dict) and bool(str(reference.get("wikipedia_id") or "").strip())


def read_reference(reference: dict[str, Any]) -> Reference:
    """Return the page id, title, first and last paragraph of a provenance; an unknown paragraph is None."""
    page = str(reference["wikipedia_id"]).strip()
    title = plain_title(reference.get("title") or "")
    first = paragraph_number(reference.get("start_paragraph_id"))
    last = paragraph_number(reference.get("end_paragraph_id"))
    if last is None:
        last = first
    return page, title, first, last


def paragraph_number(value: Any) -> int | None:
    """Return a paragraph's number, or None if it is unknown; datasets write -1 for that."""
    if isinstance(value, int) and value >= 0:
        return value
    return None


def triviaqa_questions(path: str) -> dict[str, str]:
    """Return the questions of TriviaQA's own JSON, by id."""
    data = read_json(path)
    rows = data.get("Data") if isinstance(data, dict) else None
    if not isinstance(rows, list) or not all(map(is_triviaqa_row, rows)):
        raise ValueError(f"{path}: expected TriviaQA's JSON, {{'Data': [{{'QuestionId', 'Question', ...}}, ...]}}.")
    return {row["QuestionId"]: row["Question"] for row in rows}


def is_triviaqa_row(row: Any) -> bool:
    """Return whether a row of TriviaQA's JSON has an id and a question."""
    return isinstance(row, dict) and "QuestionId" in row and "Question" in row


# ---------------------------------------------------------------------- pages and passages


class Pages:
    """
    The passages of the pages that questions name, to be found by page and paragraph.

    Args:
        questions (`list[dict]`): from [`read_questions`].
        match (`str`): `"title"` or `"id"`: how to find the page of a passage that does not name it.
    """

    def __init__(self, questions: list[dict[str, Any]], match: str) -> None:
        self.match = match
        self.ids: set[str] = set()
        self.titles: set[str] = set()
        for question in questions:
            for references in question["evidence"]:
                self.ids.update(page for page, _, _, _ in references)
                self.titles.update(title for _, title, _, _ in references if title)
        # (passage id, first paragraph, last paragraph) of each passage, by page id and by page title
        self.by_id: dict[str, list] = defaultdict(list)
        self.by_title: dict[str, list] = defaultdict(list)

    def add(self, passage: dict[str, Any]) -> None:
        """Keep a passage if a question names its page."""
        page = passage.get("wikipedia_id")
        if page is None and self.match == "id":
            page = passage["id"]
        entry = (passage["id"], passage.get("start_paragraph_id"), passage.get("end_paragraph_id"))
        if page is None:
            title = plain_title(passage["title"])
            if title in self.titles:
                self.by_title[title].append(entry)
        elif str(page) in self.ids:
            self.by_id[str(page)].append(entry)

    def find(self, reference: Reference, matches: Counter[str]) -> list[str]:
        """Return the ids of the passages that each count as a provenance; `matches` counts how they were found."""
        page, title, first, last = reference
        if page in self.by_id:
            passages, key = self.by_id[page], "page"
        else:
            passages, key = self.by_title.get(title, []), "title"
        if not passages:
            matches["provenance: page not in the corpus"] += 1
            return []

        if first is None or any(start is None for _, start, _ in passages):
            matches[f"provenance: found by {key} alone"] += 1
        else:
            overlapping = [id for id, start, end in passages if start <= last and end >= first]
            if overlapping:
                matches["provenance: found by page and paragraph"] += 1
                return overlapping
            matches["provenance: no passage of its paragraphs, found by page alone"] += 1
        return [id for id, _, _ in passages]

    def provenance(self, evidence: list[Evidence], matches: Counter[str]) -> list[list[str]]:
        """Return the sets of passage ids of a question's evidence sets; a set that names a missing page has none."""
        sets = []
        for references in evidence:
            choices = [self.find(reference, matches) for reference in references]
            for passage_ids in combine(choices, matches):
                sets.append(tuple(distinct(passage_ids)))
        return [list(passage_ids) for passage_ids in distinct(sets)]


def combine(choices: list[list[str]], matches: Counter[str]) -> list[tuple[str, ...]]:
    """
    Choose one passage of each page, in all combinations.

    If there are more than `MAX_SETS` combinations, return only as many as it takes to use every passage.

    Args:
        choices (`list[list[str]]`): the passages of each page of an evidence set.
        matches (`Counter`): counts the evidence sets whose combinations were cut.
    """
    if math.prod(map(len, choices)) <= MAX_SETS:
        return list(itertools.product(*choices))
    matches[f"evidence sets of more than {MAX_SETS:,} combinations, of which each passage is in one"] += 1
    longest = max(map(len, choices))
    repeated = [itertools.islice(itertools.cycle(passage_ids), longest) for passage_ids in choices]
    return list(zip(*repeated, strict=True))


def read_corpus_of(args: KILTArguments, pages: Pages, counts: Counter[str]) -> Iterator[dict[str, Any]]:
    """Yield the passages of `--corpus_file` unchanged, or cut the pages of `--knowledge_file` into passages."""
    if args.corpus_file:
        for _, passage in read_passages(args.corpus_file):
            yield passage
        return
    other_pages = 0
    for where, page in lines_with_places(args.knowledge_file):
        id = str(page.get("wikipedia_id") or page.get("_id") or "").strip()
        if id not in pages.ids:
            other_pages += 1
            if args.max_other_pages is not None and other_pages > args.max_other_pages:
                continue
        counts["pages"] += 1
        id = check_text(id, "wikipedia_id", where)
        title = check_text(page.get("wikipedia_title"), "wikipedia_title", where)
        yield from cut_page(id, title, paragraphs_of(page, where), args.words)


def paragraphs_of(page: dict[str, Any], where: str) -> list[str]:
    """Return the paragraphs of a page; datasets wrap them in an object."""
    paragraphs = page.get("text")
    if isinstance(paragraphs, dict):
        paragraphs = paragraphs.get("paragraph")
    if not isinstance(paragraphs, list) or not all(isinstance(paragraph, str) for paragraph in paragraphs):
        raise ValueError(f"{where}: text is {paragraphs!r}, expected a list of paragraphs.")
    return paragraphs


def cut_page(id: str, title: str, paragraphs: list[str], words: int) -> Iterator[dict[str, Any]]:
    """
    Cut a page into passages of `words` consecutive words, never across a heading.

    Yields:
        `dict`: `id` (the page's id and the passage's number in it), `title`, `text`, `wikipedia_id`,
        `start_paragraph_id`, `end_paragraph_id`.
    """
    sections: list[list[tuple[str, int]]] = [[]]  # of (word, number of its paragraph)
    for number, paragraph in enumerate(paragraphs):
        if number == 0 and paragraph.strip() == title.strip():
            continue
        if paragraph.startswith(HEADING):
            sections.append([])
            continue
        text = BULLET.sub("- ", paragraph)
        sections[-1] += [(word, number) for word in text.split()]

    passages = []
    for section in sections:
        for start in range(0, len(section), words):
            passages.append(section[start : start + words])
    for number, passage in enumerate(passages):
        yield {
            "id": f"{id}-{number}",
            "title": title,
            "text": " ".join(word for word, _ in passage),
            "wikipedia_id": id,
            "start_paragraph_id": passage[0][1],
            "end_paragraph_id": passage[-1][1],
        }


def plain_title(title: str) -> str:
    """Return a title in the form in which titles are compared: composed characters, spaces for underscores."""
    return " ".join(unicodedata.normalize("NFC", title).replace("_", " ").split())


if __name__ == "__main__":
    main()
