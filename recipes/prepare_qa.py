"""
Write training instances, an evaluation set and a corpus from questions with answers, passages or both.

    python recipes/prepare_qa.py --input_file train-v1.1.json --output_dir squad --validation_fraction 0.05
    python recipes/prepare_qa.py --input_file biencoder-nq-train.json.gz --output_dir nq --num_negatives 1
    python recipes/prepare_qa.py --input_file faq.csv --output_dir faq --question_column Question \\
        --answer_column Reply --passage_column Article --title_column Headline
    python recipes/prepare_qa.py --input_file sentence-transformers/natural-questions --output_dir pairs \\
        --passage_column answer

The input is JSON (a list, or SQuAD's articles), JSON Lines, CSV, TSV (`.gz` or plain), Parquet, or a dataset name,
which is streamed. It may have the form of DPR, SQuAD (v1, v2, or flat as on the Hub), pairs and triplets of
sentence-transformers, or any columns; those that are not named are recognised by usual names and printed.

Writes `train.jsonl`, `eval.jsonl` and `corpus.jsonl` to the output folder. A row becomes

- with a passage and an answer: an instance of one segment. Its text is the first answer or, with
  `--answer_style sentence`, the sentence of the passage that holds it. All answers are kept if they say more;
- with an answer alone: an instance with `answers`, whose passage is found while training (docs/distillation.md);
- with a passage alone (pairs, triplets): an instance for a retriever. Train it with `supervision: nsp`; its text is
  the passage's first sentence. recipes/prepare_retriever_data.py adds keyword queries.

Of several right passages the first is trained and the others count as right too, as do those of other rows with the
same question. Wrong passages (triplets, `hard_negative_ctxs` and `negative_ctxs` of DPR, in this order) become the
first `--num_negatives` negatives of the segment. In `eval.jsonl` the candidates of a question are all passages of its
rows if some are wrong or of unknown use (`ctxs`). Those of `ctxs` keep their order. After them come wrong passages,
and last of all right ones that `ctxs` lack: with `gold_in_pool: false`, a pool of all candidates holds them too.
Without `ctxs` nothing was ranked: right passages come first, and `gold_in_pool` has no effect.
All passages are in `corpus.jsonl`, each once, with its content id.

Rows with the same question, answers and right passages become one instance with the wrong passages of all of them. In
`eval.jsonl`, rows with the same question and answers become one question with the right passages of all of them.

`--validation_fraction` splits by a hash of the questions. Questions that share a passage, and passages that share a
question, stay on one side, so no passage of `eval.jsonl` is gold in `train.jsonl`, and the same data give the same
split whatever their order. The input is read twice. Only hashes are held in memory, about 100 bytes for each passage
and question, and rows that wait for others of their instance.

A row without a question or answer, or with values of another form, is refused: counted by reason and listed with its
place in `refused.jsonl`. `--on_error fail` ends at the first.
"""

import contextlib
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from shared.cli import clear_errors, parse, table_of_counts

from tqdm import tqdm

from modeling_cosup.lines_cosup import writing_lines
from modeling_cosup.passages_cosup import hash_id
from trainer.data import content_id
from trainer.judging.grounding import split_sentences

from shared.data_files import distinct
from shared.held_answers import holds_answer
from shared.qa_records import Columns, Record, Refused, check_given, find_columns, read_record
from shared.qa_rows import read_qa_rows
from shared.qa_split import Survey, instance_key, question_hash, survey

TRAIN, EVAL, CORPUS, REFUSED = "train.jsonl", "eval.jsonl", "corpus.jsonl", "refused.jsonl"
UNSPACED_END = re.compile(r"(?<=[。！？])(?![。！？」』）”’]|$)\s*")  # of a sentence
ROLES = ("question", "answer", "passage", "title", "negative", "id")  # of the columns that options name


@dataclass
class QAArguments:
    """The files to read and to write, and the columns."""

    input_file: str = field(
        metadata={"local_or_hub": True, "help": "JSON, JSON Lines, CSV, TSV, Parquet, or a dataset name"}
    )
    output_dir: str = field(metadata={"help": "folder of train.jsonl, eval.jsonl and corpus.jsonl"})
    config_name: str | None = field(default=None, metadata={"help": "configuration of a dataset name"})
    split: str | None = field(default=None, metadata={"help": "split of a dataset name; defaults to train"})
    question_column: str | None = field(default=None, metadata={"help": "defaults to question, query, anchor, ..."})
    answer_column: str | None = field(default=None, metadata={"help": "defaults to answers, answer, ..."})
    passage_column: str | None = field(
        default=None, metadata={"help": "right passages; defaults to positive_ctxs, positive, passage, context, ..."}
    )
    title_column: str | None = field(
        default=None, metadata={"help": "title of a passage that is a text; defaults to title"}
    )
    negative_column: str | None = field(
        default=None, metadata={"help": "wrong passages; defaults to hard_negative_ctxs, negative, negative_1, ..."}
    )
    id_column: str | None = field(default=None, metadata={"help": "defaults to id, or else ids are hashes"})
    column_names: list[str] | None = field(
        default=None, metadata={"help": "names of the columns of a CSV or TSV file without a header"}
    )
    validation_fraction: float = field(
        default=0.0, metadata={"help": "share of the questions that go to eval.jsonl; 1 makes an evaluation set alone"}
    )
    answer_style: Literal["short", "sentence"] = field(
        default="short", metadata={"help": "what is written: the answer, or the sentence of the passage that holds it"}
    )
    num_negatives: int = field(default=1, metadata={"help": "wrong passages that a training instance keeps; 0: none"})
    dataset: str | None = field(default=None, metadata={"help": "name of the set; defaults to that of the input"})
    instruction: str = field(default="", metadata={"help": "instruction of all instances"})
    on_error: Literal["skip", "fail"] = field(
        default="skip", metadata={"help": "whether rows that give no instance are left out, or end the program"}
    )


def main() -> None:
    """Read the options and prepare the dataset."""
    (args,) = parse([QAArguments], __doc__)
    with clear_errors():
        print(table_of_counts(prepare(args)))


def prepare(args: QAArguments) -> Counter[str]:
    """
    Write the files.

    Returns:
        `Counter`: what was read, refused and written.

    Raises:
        `ValueError`: if an option is out of range, the input is damaged or has no column of questions, a row is
            refused and `on_error` is `"fail"`, or one of the files would be empty. Nothing is written then.
    """
    check_arguments(args)
    survey_of_rows = survey((record for _, record in read_records(args)), args.validation_fraction)
    with Output(args, survey_of_rows) as output:
        for where, record in read_records(args, output.refuse):
            output.add(where, record)
        output.check()
    return output.counts


def check_arguments(args: QAArguments) -> None:
    """Refuse options that are out of range, and a folder with a file of an earlier run that would stay."""
    if not 0 <= args.validation_fraction <= 1:
        raise ValueError(f"--validation_fraction is {args.validation_fraction}, expected 0 to 1.")
    if args.num_negatives < 0:
        raise ValueError(f"--num_negatives is {args.num_negatives}, expected at least 0.")
    not_written = {0.0: EVAL, 1.0: TRAIN}.get(args.validation_fraction)
    if not_written and Path(args.output_dir, not_written).exists():
        raise ValueError(
            f"--output_dir {args.output_dir} holds the {not_written} of another run, and --validation_fraction"
            f" {args.validation_fraction:g} makes none: delete it, or name another folder."
        )


def read_records(args: QAArguments, refuse: Callable[[str, str], None] | None = None) -> Iterator[tuple[str, Record]]:
    """
    Read the input.

    Args:
        args ([`QAArguments`]): the input and its columns.
        refuse (`Callable`, *optional*): is told the place and the reason of each row that gives no instance. Without
            it nothing is reported or printed.

    Yields:
        `(str, Record)`: place and content of each other row.
    """
    given = {role: getattr(args, f"{role}_column") for role in ROLES}
    columns_of: dict[tuple[str, ...], Columns | None] = {}  # names of all columns -> what they are, if that is known
    rows = read_qa_rows(args.input_file, args.config_name, args.split, args.column_names)
    for where, row in tqdm(rows, desc="Reading questions", unit=" rows"):
        names = tuple(row)
        if not columns_of:
            check_given(names, given, where)
            columns_of[names] = find_columns(names, given, where)
            if refuse is not None:
                tqdm.write(f"{where}: {columns_of[names]}")
        elif names not in columns_of:
            try:
                columns_of[names] = find_columns(names, given, where)
            except ValueError:
                columns_of[names] = None
        try:
            yield where, read_record(row, columns_of[names])
        except Refused as reason:
            if refuse is not None:
                refuse(where, str(reason))


class Output(contextlib.ExitStack):
    """
    The files of the output folder. A file appears, with all others, when the block ends without an error.

    Args:
        args ([`QAArguments`]): the folder, and what instances look like.
        survey ([`Survey`]): what is known of all rows.
    """

    def __init__(self, args: QAArguments, survey: Survey) -> None:
        super().__init__()
        self.args = args
        self.survey = survey
        self.dataset = args.dataset or Path(args.input_file).name.partition(".")[0]
        self.counts = Counter({"rows read": 0})
        self.writers: dict[str, Callable[[Any], object]] = {}
        self.passages: set[int] = set()  # hashes of the ids of those in the corpus
        self.waiting: dict[int, Record] = {}  # instance -> what is known of it, until its last row is read
        self.rows_left = dict(survey.num_rows)
        self.evaluation_ids: set[int] = set()

    def write(self, name: str, value: dict[str, Any]) -> None:
        """Write a line to a file of the folder, which is opened for its first line."""
        if name not in self.writers:
            self.writers[name] = self.enter_context(writing_lines(Path(self.args.output_dir, name)))
        self.writers[name](value)

    def refuse(self, where: str, reason: str) -> None:
        """Count a row that gives no instance, and write its place to `refused.jsonl`."""
        if self.args.on_error == "fail":
            raise ValueError(f"{where}: {reason}.")
        self.counts["rows read"] += 1
        self.counts[f"rows refused: {reason}"] += 1
        self.write(REFUSED, {"where": where, "reason": reason})

    def add(self, where: str, record: Record) -> None:
        """Write the passages of a row and, if it is the last row of its instance, the instance."""
        is_evaluated = question_hash(record.question) in self.survey.evaluated
        key = instance_key(record, is_evaluated)
        passages = [*record.passages, *record.negatives, *record.candidates]
        record = self.without_texts(record) if is_evaluated else self.with_chosen_negatives(record)
        id = record.id or f"{self.dataset}-{content_key(record)}"
        if key in self.waiting:
            self.counts["rows read"] += 1
            self.counts["rows merged into an earlier one: the same question"] += 1
            self.waiting[key].merge(record)
            if not is_evaluated:
                self.waiting[key] = self.with_chosen_negatives(self.waiting[key])
        elif is_evaluated and hash_id(id) in self.evaluation_ids:
            self.refuse(where, "an id that another question of eval.jsonl has")
        else:
            self.counts["rows read"] += 1
            self.waiting[key] = replace(record, id=id)
            if is_evaluated:
                self.evaluation_ids.add(hash_id(id))

        rows_left = self.rows_left.pop(key, 1) - 1
        if rows_left:
            self.rows_left[key] = rows_left
        elif key in self.waiting:
            self.write_instance(self.waiting.pop(key), is_evaluated)
        for passage in passages:
            self.add_passage(passage)

    @staticmethod
    def without_texts(record: Record) -> Record:
        """Return what an evaluation instance holds of other passages: their ids. A record may wait for long."""
        negatives = [{"id": passage["id"]} for passage in record.negatives]
        return replace(
            record, negatives=negatives, candidates=[{"id": passage["id"]} for passage in record.candidates]
        )

    def with_chosen_negatives(self, record: Record) -> Record:
        """Return what a training instance holds of wrong passages. Without right ones, they are its candidates."""
        if not record.passages:
            return self.without_texts(record)
        right_ids = self.survey.right_passages.get(question_hash(record.question), [])
        negatives = [wrong for wrong in record.negatives if wrong["id"] not in right_ids]
        return replace(record, negatives=negatives[: self.args.num_negatives], candidates=[])

    def write_instance(self, record: Record, is_evaluated: bool) -> None:
        """Write the instance of all rows that were merged into one."""
        name = EVAL if is_evaluated else TRAIN
        question = {"id": record.id, "dataset": self.dataset, "instruction": self.args.instruction}
        question["input"] = record.question
        own = [passage["id"] for passage in record.passages]
        right_ids = distinct([*own, *self.survey.right_passages.get(question_hash(record.question), [])])
        fields = evaluation_fields(record, right_ids) if is_evaluated else self.training_fields(record, right_ids)
        self.write(name, {**question, **fields})
        self.counts[f"{name}: {kind_of(record)}"] += 1

    def add_passage(self, passage: dict[str, str]) -> None:
        """Write a passage to the corpus, unless it is there."""
        key = hash_id(passage["id"])
        if key not in self.passages:
            self.passages.add(key)
            self.write(CORPUS, passage)
            self.counts[f"{CORPUS}: passages"] += 1

    def training_fields(self, record: Record, right_ids: list[str]) -> dict[str, Any]:
        """Return the fields of a training instance; `right_ids` are the right passages of the question in all rows."""
        if not record.passages:
            fields: dict[str, Any] = {"answers": record.answers}
            if found := [*record.candidates, *record.negatives]:
                fields["candidates"] = distinct(passage["id"] for passage in found)
            return fields
        passage = record.passages[0]
        segment: dict[str, Any] = {"text": self.text_to_write(record), "passage": passage}
        if record.negatives:
            segment["negatives"] = record.negatives
        if len(right_ids) > 1:
            segment["positives"] = [id for id in right_ids if id != passage["id"]]
        if record.answers in ([], [segment["text"]]):
            return {"segments": [segment]}
        return {"segments": [segment], "answers": record.answers}  # mine_hard_negatives.py looks for all of them

    def text_to_write(self, record: Record) -> str:
        """Return the text of a segment: see `--answer_style`."""
        sentences = sentences_of(record.passages[0]["text"])
        if not record.answers:
            return sentences[0]
        answer = record.answers[0]
        if self.args.answer_style == "short":
            return answer
        for sentence in sentences:
            if holds_answer(sentence, [answer]):
                return sentence
        self.counts["answers left short: no sentence of the passage holds them"] += 1
        return answer

    def check(self) -> None:
        """
        Check that there is what the options ask for, and delete the list of refused rows of an earlier run.

        Raises:
            `ValueError`: if a file would be empty, with all counts; if the corpus of an earlier run would stay.
        """
        expected = [TRAIN, EVAL]
        if self.args.validation_fraction in (0, 1):
            expected = [EVAL if self.args.validation_fraction else TRAIN]
        for name in expected:
            if name not in self.writers:
                raise ValueError(
                    f"{self.args.input_file}: no question is left for {name}. Questions that share passages stay"
                    f" together, see --validation_fraction.\n{table_of_counts(self.counts)}"
                )
        if CORPUS not in self.writers and Path(self.args.output_dir, CORPUS).exists():
            raise ValueError(
                f"--output_dir {self.args.output_dir} holds the {CORPUS} of another run, and these questions have no"
                " passages: delete it, or name another folder."
            )
        if REFUSED not in self.writers:
            Path(self.args.output_dir, REFUSED).unlink(missing_ok=True)


def sentences_of(text: str) -> list[str]:
    """Return the sentences of a passage; the full stops of Chinese and Japanese need no space after them."""
    return [part for sentence in split_sentences(text) for part in UNSPACED_END.split(sentence)]


def content_key(record: Record) -> str:
    """Return a hash of the question, the answers and the right passages of a row."""
    content = [record.question, *record.answers, *(passage["id"] for passage in record.passages)]
    return content_id("\n".join(content), "")


def evaluation_fields(record: Record, right_ids: list[str]) -> dict[str, Any]:
    """Return the fields of an evaluation instance; `right_ids` are the right passages of the question in all rows."""
    fields: dict[str, Any] = {"answers": record.answers}
    if right_ids:
        fields["provenance"] = [[id] for id in right_ids]
    found = [passage["id"] for passage in record.candidates]
    wrong = [passage["id"] for passage in record.negatives]
    if found:
        fields["candidates"] = distinct([*found, *wrong, *right_ids])
    else:
        fields["candidates"] = distinct([*right_ids, *wrong]) if wrong else []
    return fields


def kind_of(record: Record) -> str:
    """Return what a question comes with."""
    if not record.passages:
        return "questions with answers alone"
    if not record.answers:
        return "questions with a passage alone"
    return "questions with a passage and an answer"


if __name__ == "__main__":
    main()
