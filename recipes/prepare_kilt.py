"""
Evaluation instances and a corpus from KILT: the eight tasks of the paper, over KILT's Wikipedia or a corpus that exists.

    python recipes/prepare_kilt.py --task nq --input_file nq-dev-kilt.jsonl --knowledge_file kilt_knowledgesource.json \\
        --output_file kilt/nq.jsonl.gz --output_corpus kilt/corpus.jsonl.gz
    python recipes/prepare_kilt.py --task fever --input_file fever-dev-kilt.jsonl --corpus_file kilt/corpus.jsonl.gz --output_file kilt/fever.jsonl.gz
    python recipes/prepare_kilt.py --task nq --input_file facebook/kilt_tasks --config_name nq --split validation --corpus_file psgs_w100.tsv.gz \\
        --output_file dpr/nq.jsonl.gz --output_corpus dpr/corpus.jsonl.gz

Pages are cut as DPR cut them: passages of 100 words in a row, here never across a section; the title and headings are no text. A passage keeps the numbers
of its first and last paragraph, so one corpus serves all tasks. It is streamed; only passages of pages that the questions name are held in memory.

Provenance. A KILT provenance names a page and, mostly, a range of paragraphs; each output's list of them is an evidence set, all of which is needed. Any
one passage that touches the range counts as that provenance, so a set of two ranges, with two passages each, becomes four sets of passage ids. Where the
range or the passages' paragraphs are not known, or no passage touches the range, any passage of the page counts. Passages that do not name their page
(DPR's and BEIR's) belong to the page of that title; with `--match id` a passage's id is the page's.

Questions without an answer, or without provenance that the corpus holds, are left out and counted: one with empty provenance would count as one that
needs no passage. FEVER's labels become lower case, as its instruction says them. TriviaQA's files hold no questions: name TriviaQA's own file
(`qa/wikipedia-dev.json` of `triviaqa-rc.tar.gz`) as `--triviaqa_file`.
"""

import itertools
import math
import re
import unicodedata
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from typing import Literal

from shared.cli import clear_errors, parse, table_of_counts

from tqdm import tqdm

from modeling_cosup.files_cosup import read_json
from modeling_cosup.lines_cosup import lines_with_places, writing_lines
from modeling_cosup.passages_cosup import check_text
from trainer.data import read_rows

from shared.data_files import distinct, instruction_of, read_passages

HEADING, BULLET = "Section::::", re.compile(r"^BULLET::::(- )?")
MAX_SETS = 1000  # of passage ids that one evidence set may become


@dataclass
class KILTArguments:
    """What is read, and what is written."""

    task: Literal["nq", "triviaqa", "hotpotqa", "eli5", "fever", "trex", "zsre", "wow"] = field(
        metadata={"help": "zsre is KILT's structured_zeroshot"}
    )
    input_file: str = field(metadata={"help": "questions: KILT's JSON Lines (.gz or plain) or a dataset name"})
    output_file: str = field(metadata={"help": "evaluation instances, JSON Lines (.gz by the name)"})
    knowledge_file: str | None = field(
        default=None,
        metadata={
            "help": "KILT's knowledge source: JSON Lines (.gz or plain), a page a line; it is cut into passages"
        },
    )
    corpus_file: str | None = field(
        default=None,
        metadata={"help": "in its place, passages: ours, BEIR's corpus.jsonl or DPR's psgs_w100.tsv (.gz or plain)"},
    )
    output_corpus: str | None = field(
        default=None, metadata={"help": "the passages in our format; needed with --knowledge_file"}
    )
    config_name: str | None = field(
        default=None, metadata={"help": "of a dataset name, e.g. nq of facebook/kilt_tasks"}
    )
    split: str = field(default="validation", metadata={"help": "of a dataset name"})
    match: Literal["title", "id"] = field(
        default="title", metadata={"help": "how a passage that does not name its page belongs to one"}
    )
    words: int = field(default=100, metadata={"help": "of a passage that is cut from a page"})
    max_other_pages: int | None = field(
        default=None, metadata={"help": "keep all pages that are gold and so many of the others: a small corpus"}
    )
    triviaqa_file: str | None = field(default=None, metadata={"help": "TriviaQA's own JSON, for the questions"})
    instruction: str | None = field(default=None, metadata={"help": "by default the paper's; may be empty"})


def main():
    """Read the options and prepare the task."""
    (args,) = parse([KILTArguments], __doc__)
    with clear_errors():
        print(table_of_counts(prepare(args)))


def prepare(args):
    """
    Write evaluation instances and corpus.

    Returns:
        `Counter`: what was read, left out and written, in the order in which it is worth reading.

    Raises:
        `ValueError`: names file and line, what was found and what was expected; or says why nothing is left.
    """
    if (args.knowledge_file is None) == (args.corpus_file is None):
        raise ValueError("give either --knowledge_file or --corpus_file.")
    if args.knowledge_file and not args.output_corpus:
        raise ValueError("--knowledge_file is cut into passages: say where they go, --output_corpus.")
    if args.words < 1 or (args.max_other_pages or 0) < 0:
        raise ValueError(
            f"--words is {args.words} and --max_other_pages {args.max_other_pages}, expected at least 1 and 0."
        )
    instruction = instruction_of(args.task, args.instruction)
    counts = Counter({"questions read": 0})
    questions = list(read_questions(args, counts))
    pages = Pages(questions, args.match)
    with writing_lines(args.output_file) as write, writing_lines(args.output_corpus) as write_passage:
        for passage in tqdm(read_corpus_of(args, pages, counts), desc="Reading passages", unit=" passages"):
            pages.add(passage)
            write_passage(passage)
            counts["passages in the corpus"] += 1
        gold, places = set(), Counter()
        for question in questions:
            provenance = pages.provenance(question["evidence"], places)
            if not provenance:
                counts["questions left out: the corpus lacks their pages"] += 1
                continue
            gold.update(id for ids in provenance for id in ids)
            facts = {
                "dataset": args.task,
                "instruction": instruction,
                "input": question["input"],
                "answers": question["answers"],
            }
            write({"id": question["id"], **facts, "provenance": provenance, "candidates": []})
            counts["questions written"] += 1
        counts.update({**places, "gold passages": len(gold)})
        if not counts["questions written"]:
            raise ValueError("No question is left.\n" + table_of_counts(counts))
    return counts


# ---------------------------------------------------------------------- questions


def read_questions(args, counts):
    """
    Questions with their answers and evidence sets.

    Yields:
        `dict`: `id`, `input`, `answers` and `evidence`, a list of sets, each a list of `(page id, title, first paragraph, last paragraph)`; the latter two
        may be None.
    """
    texts = triviaqa_questions(args.triviaqa_file) if args.triviaqa_file else {}
    for where, value in read_tasks(args):
        counts["questions read"] += 1
        id, outputs = str(value.get("id")), value.get("output")
        text = value.get("input") or texts.get(id)
        if not text and args.task == "triviaqa":
            found = (
                f"{args.triviaqa_file} lacks {id}"
                if texts
                else "TriviaQA's files hold none, name its own as --triviaqa_file"
            )
            raise ValueError(f"{where}: no question ({found}).")
        if outputs is not None and not isinstance(outputs, list):
            raise ValueError(
                f"{where}: output is {outputs!r}, expected a list of objects with answer, provenance or both."
            )
        answers, evidence = read_outputs(outputs or [], where)
        for left_out, kind in ((not answers, "no answer"), (answers and not evidence, "no provenance")):
            if left_out:
                counts[f"questions left out: {kind}"] += 1
        if answers and evidence:
            answers = [answer.lower() for answer in answers] if args.task == "fever" else answers
            yield {
                "id": id,
                "input": check_text(text, "input", where),
                "answers": distinct(answers),
                "evidence": evidence,
            }


def read_tasks(args):
    """`(where, dict)` of the questions, of a file or a data set."""
    if args.config_name is None:
        return read_rows(args.input_file, args.split)
    from datasets import load_dataset

    rows = load_dataset(args.input_file, args.config_name, split=args.split)
    return (
        (f"{args.input_file} ({args.config_name}, {args.split}), row {row}", value) for row, value in enumerate(rows)
    )


def read_outputs(outputs, where):
    """Answers and evidence sets of a question's outputs, each as often as it stands there and once."""
    answers, evidence = [], []
    for i, output in enumerate(outputs):
        if not isinstance(output, dict):
            raise ValueError(
                f"{where}: output[{i}] is {output!r}, expected an object with answer, provenance or both."
            )
        answer, references = output.get("answer"), output.get("provenance") or []
        if answer is not None and not isinstance(answer, str):
            raise ValueError(f"{where}: output[{i}].answer is {answer!r}, expected a string.")
        if answer and answer.strip():
            answers.append(answer.strip())
        if not isinstance(references, list) or not all(
            isinstance(item, dict) and str(item.get("wikipedia_id") or "").strip() for item in references
        ):
            raise ValueError(
                f"{where}: output[{i}].provenance is {references!r}, expected a list of objects with wikipedia_id."
            )
        if references:
            evidence.append(tuple(distinct(read_reference(reference) for reference in references)))
    return answers, distinct(evidence)


def read_reference(reference):
    """`(page id, title, first paragraph, last paragraph)` of a provenance; a data set says -1 where a paragraph is not known."""
    first, last = (
        value if isinstance(value := reference.get(f"{end}_paragraph_id"), int) and value >= 0 else None
        for end in ("start", "end")
    )
    return (
        str(reference["wikipedia_id"]).strip(),
        plain_title(reference.get("title") or ""),
        first,
        first if last is None else last,
    )


def triviaqa_questions(path):
    """`dict` of question id to question, of TriviaQA's own JSON."""
    data = read_json(path)
    rows = data.get("Data") if isinstance(data, dict) else None
    if not isinstance(rows, list) or not all(
        isinstance(row, dict) and "QuestionId" in row and "Question" in row for row in rows
    ):
        raise ValueError(f"{path}: expected TriviaQA's JSON, {{'Data': [{{'QuestionId', 'Question', ...}}, ...]}}.")
    return {row["QuestionId"]: row["Question"] for row in rows}


# ---------------------------------------------------------------------- pages and passages


class Pages:
    """
    The passages of the pages that questions name, found by page and paragraph.

    Args:
        questions (`list[dict]`): of [`read_questions`].
        match (`str`): `"title"` or `"id"`: how a passage that does not name its page belongs to one.
    """

    def __init__(self, questions, match):
        references = {
            reference for question in questions for evidence in question["evidence"] for reference in evidence
        }
        self.match = match
        self.ids, self.titles = (
            {reference[0] for reference in references},
            {reference[1] for reference in references} - {""},
        )
        self.by_id, self.by_title = (
            defaultdict(list),
            defaultdict(list),
        )  # to (passage id, first paragraph, last paragraph)

    def add(self, passage):
        """Keep a passage if it is of a page that a question names."""
        page = passage.get("wikipedia_id", passage["id"] if self.match == "id" else None)
        place = (passage["id"], passage.get("start_paragraph_id"), passage.get("end_paragraph_id"))
        if page is not None and str(page) in self.ids:
            self.by_id[str(page)].append(place)
        if page is None and plain_title(passage["title"]) in self.titles:
            self.by_title[plain_title(passage["title"])].append(place)

    def find(self, reference, places):
        """Ids of the passages any of which counts as a provenance; how it was found is counted in `places`."""
        page, title, first, last = reference
        passages, by = (self.by_id[page], "page") if page in self.by_id else (self.by_title.get(title, []), "title")
        if not passages:
            places["provenance: page not in the corpus"] += 1
            return []
        if first is not None and all(start is not None for _, start, _ in passages):
            if touching := [id for id, start, end in passages if start <= last and end >= first]:
                places["provenance: found by page and paragraph"] += 1
                return touching
            places["provenance: no passage of its paragraphs, found by page alone"] += 1
        else:
            places[f"provenance: found by {by} alone"] += 1
        return [id for id, _, _ in passages]

    def provenance(self, evidence, places):
        """Sets of passage ids that stand for evidence sets; of a set with a page that is not there, none."""
        sets = []
        for references in evidence:
            choices = [self.find(reference, places) for reference in references]
            sets += [tuple(distinct(ids)) for ids in combine(choices, places)]
        return [list(ids) for ids in distinct(sets)]


def combine(choices, places):
    """
    One passage of each page: all combinations, or, where these are more than `MAX_SETS`, so few that every passage of every page is in one of them.

    Args:
        choices (`list[list[str]]`): for each page of an evidence set its passages.
        places (`Counter`): counts evidence sets that were cut.

    Returns:
        `list[tuple[str]]`.
    """
    if math.prod(map(len, choices)) <= MAX_SETS:
        return list(itertools.product(*choices))
    places[f"evidence sets of more than {MAX_SETS:,} combinations, of which each passage is in one"] += 1
    return list(zip(*(itertools.islice(itertools.cycle(ids), max(map(len, choices))) for ids in choices), strict=True))


def read_corpus_of(args, pages, counts):
    """Passages of `--corpus_file` as they stand there, or of the pages of `--knowledge_file`."""
    if args.corpus_file:
        for _, passage in read_passages(args.corpus_file):
            yield passage
        return
    others = 0
    for where, page in lines_with_places(args.knowledge_file):
        id, title = str(page.get("wikipedia_id") or page.get("_id") or "").strip(), page.get("wikipedia_title")
        if id not in pages.ids:
            others += 1
            if args.max_other_pages is not None and others > args.max_other_pages:
                continue
        counts["pages"] += 1
        yield from cut_page(
            check_text(id, "wikipedia_id", where),
            check_text(title, "wikipedia_title", where),
            paragraphs_of(page, where),
            args.words,
        )


def paragraphs_of(page, where):
    """The paragraphs of a page, `list[str]`; data sets wrap them in an object."""
    paragraphs = page["text"].get("paragraph") if isinstance(page.get("text"), dict) else page.get("text")
    if not isinstance(paragraphs, list) or not all(isinstance(paragraph, str) for paragraph in paragraphs):
        raise ValueError(f"{where}: text is {paragraphs!r}, expected a list of paragraphs.")
    return paragraphs


def cut_page(id, title, paragraphs, words):
    """
    Passages of a page: `words` words in a row, never across a heading.

    Yields:
        `dict`: `id` (of the page, and the passage's number in it), `title`, `text`, `wikipedia_id`, `start_paragraph_id`, `end_paragraph_id`.
    """
    sections = [[]]
    for number, paragraph in enumerate(paragraphs):
        if number == 0 and paragraph.strip() == title.strip():
            continue
        if paragraph.startswith(HEADING):
            sections.append([])
        else:
            sections[-1] += [(word, number) for word in BULLET.sub("- ", paragraph).split()]
    passages = (section[start : start + words] for section in sections for start in range(0, len(section), words))
    for number, passage in enumerate(passages):
        text = " ".join(word for word, _ in passage)
        place = {"wikipedia_id": id, "start_paragraph_id": passage[0][1], "end_paragraph_id": passage[-1][1]}
        yield {"id": f"{id}-{number}", "title": title, "text": text, **place}


def plain_title(title):
    """A title as it is compared: composed characters, spaces for underscores."""
    return " ".join(unicodedata.normalize("NFC", title).replace("_", " ").split())


if __name__ == "__main__":
    main()
