"""
Write training instances from the training data of Self-RAG, on which the paper trains (appendix B.2).

    python recipes/prepare_selfrag.py --input_file selfrag/selfrag_train_data \\
        --output_file selfrag/train.jsonl.gz --output_corpus selfrag/corpus.jsonl.gz

Self-RAG marks its outputs with tokens. They become segments:

    [Retrieval]<paragraph>title, new line, text</paragraph>[Relevant]sentence[Fully supported]
                                            a segment with a passage
    [Continue to Use Evidence]sentence      continues the previous segment if it has a passage; otherwise free text
    [No Retrieval]sentence, or no token     free text
    [Utility:5] and the other ratings       decide what is left out, and are then dropped

Three filters leave an instance out. To switch one off, name the others in `--filters`:

    without_passage     no segment has a passage: the paper's own code trains on none of these by default
    irrelevant          a passage is rated [Irrelevant]
    unsupported         the text after a relevant passage has no rating or one below `--min_support`, or a text that
                        continues it is rated below; by default, only [No support / Contradictory] is below

The paper says that three filters leave 42,932 instances. Their wording was not available when this was written, so
these filters are one reading of it. The printed table shows each filter's count, and the paper's result next to ours.
Instances with damaged marks are counted, and the first ones are shown.

In the paper's examples "Question: …" is repeated before `[Cs]`. Here nothing can be between a passage and `[Cs]`,
because generation puts `[Cs]` right after the retrieved passage. With `--question_template "Question: {input}"`, Gen
writes the question before each `[NSP]`, so it still comes before `[Cs]`.

If a row has no input, the part of its instruction after "## Input:" becomes the input, and the part before it the
instruction. Without "## Input:", all of the instruction becomes the input.
"""

import re
from collections import Counter
from dataclasses import dataclass, field
from typing import Any, Literal

from shared.cli import clear_errors, parse, table

from tqdm import tqdm

from modeling_cosup.lines_cosup import writing_lines
from modeling_cosup.passages_cosup import check_id, check_text
from trainer.data import check_instance, content_id

from shared.data_files import read_dataset_or_file, refuse_same_file

PAPER_COUNT = 42_932
FILTERS = ("without_passage", "irrelevant", "unsupported")
SUPPORT = {"[No support / Contradictory]": 0, "[Partially supported]": 1, "[Fully supported]": 2}
MIN_SUPPORT = {"none": 0, "partial": 1, "full": 2}
PASSAGE = r"\[Retrieval\]\s*<paragraph>(?P<passage>.*?)</paragraph>"
MARKS = (
    r"\[(?:No Retrieval|Continue to Use Evidence|Relevant|Irrelevant"
    r"|Fully supported|Partially supported|No support / Contradictory|Utility:[1-5])\]"
)
STRAY = r"\[Retrieval\]|</?paragraph>"  # without its counterpart
MARK = re.compile(rf"{PASSAGE}|(?P<mark>{MARKS})|(?P<stray>{STRAY})", re.DOTALL)
INPUT = "## Input:\n\n"
DAMAGED_SHOWN = 5


@dataclass
class Piece:
    """
    A part of an output.

    Args:
        kind (`str`): `"passage"`, `"continued"` or `"free"`.
        text (`str`): the text without marks.
        passage (`str`, *optional*): the passage as the output has it.
        relevant (`bool`, *optional*): whether the passage is rated as relevant.
        support (`str`, *optional*): the mark that rates how well the passage supports the text.
    """

    kind: str
    text: str = ""
    passage: str | None = None
    relevant: bool | None = None
    support: str | None = None


@dataclass
class SelfRAGArguments:
    """The files to read and to write, and the filters."""

    input_file: str = field(
        metadata={
            "local_or_hub": True,
            "help": "JSON Lines with instruction, input and output (.gz or plain), or a dataset name",
        }
    )
    output_file: str = field(metadata={"help": "training instances, JSON Lines (compressed if the name ends in .gz)"})
    output_corpus: str | None = field(default=None, metadata={"help": "also write their passages, each once"})
    split: str | None = field(default=None, metadata={"help": "split of a dataset name; defaults to train"})
    filters: list[str] = field(
        default_factory=lambda: list(FILTERS),
        metadata={
            "help": "filters to apply; --filters without a name applies none",
            "choices": FILTERS,
            "may_be_empty": True,
        },
    )
    min_support: Literal["none", "partial", "full"] = field(
        default="partial", metadata={"help": "lowest rating that passes the filter `unsupported`"}
    )
    question_template: str = field(
        default="", metadata={"help": 'e.g. "Question: {input}": written before each [NSP]'}
    )


def main() -> None:
    """Read the options and prepare the instances."""
    (args,) = parse([SelfRAGArguments], __doc__)
    with clear_errors():
        counts, damaged = prepare(args)
        print(report(counts))
        if damaged:
            print("".join(f"\n{line}" for line in damaged))


def prepare(args: SelfRAGArguments) -> tuple[Counter[str], list[str]]:
    """
    Write training instances, and their passages.

    Returns:
        `(Counter, list[str])`: what was read, left out and written, and the first damaged instances.

    Raises:
        `ValueError`: names the file and line, the field, what was found and what was expected; or says why nothing is
            left.
    """
    if args.question_template and "{input}" not in args.question_template:
        raise ValueError(f"--question_template is {args.question_template!r}, expected a text with {{input}}.")
    refuse_same_file(args.output_file, args.output_corpus)
    counts = Counter({"read": 0, "damaged": 0, **dict.fromkeys(FILTERS, 0), "written": 0})
    damaged: list[str] = []
    passage_ids: set[str] = set()
    with writing_lines(args.output_file) as write, writing_lines(args.output_corpus) as write_passage:
        rows = read_dataset_or_file(args.input_file, args.split, "train")
        for where, row in tqdm(rows, desc="Reading instances", unit=" instances"):
            counts["read"] += 1
            question = read_question(row, where)
            output = check_text(row.get("output"), "output", where, may_be_empty=True)
            try:
                pieces = read_pieces(output)
            except ValueError as error:
                counts["damaged"] += 1
                if len(damaged) < DAMAGED_SHOWN:
                    damaged.append(f"{where}: {error}")
                continue
            reason = left_out(pieces, args.filters, MIN_SUPPORT[args.min_support])
            if reason is not None:
                counts[reason] += 1
                continue

            prefix = args.question_template.replace("{input}", question["input"])
            instance = check_instance({**question, "segments": segments_of(pieces, prefix, counts)}, where)
            # leaves out `negatives` and `positives`, which Self-RAG does not have
            segments = [{"text": segment["text"], "passage": segment["passage"]} for segment in instance["segments"]]
            write({**instance, "segments": segments})
            passages = [segment["passage"] for segment in segments if segment["passage"] is not None]
            count_instance(len(passages), counts)
            for passage in passages:
                if passage["id"] not in passage_ids:
                    passage_ids.add(passage["id"])
                    write_passage(passage)

        counts["passages"] = len(passage_ids)
        if not counts["written"]:
            raise ValueError("No instance is left.\n" + report(counts) + "".join(f"\n{line}" for line in damaged))
    return counts, damaged


def count_instance(num_passages: int, counts: Counter[str]) -> None:
    """Count a written instance by its number of passages."""
    counts["written"] += 1
    if num_passages == 1:
        counts["  with 1 passage"] += 1
    elif num_passages < 4:
        counts[f"  with {num_passages} passages"] += 1
    else:
        counts["  with more passages"] += 1


def report(counts: Counter[str]) -> str:
    """Return the table of what was left out and written, with the paper's count next to ours."""
    labels = {"read": "instances read", "damaged": "left out: damaged marks"}
    labels |= {name: f"left out: {name}" for name in FILTERS}
    labels["written"] = "instances written"
    labels |= {name: name for name in sorted(counts) if name.startswith("  with ")}
    labels["passages"] = "distinct passages"
    labels |= {name: name for name in counts if name not in labels}
    rows = []
    for name, label in labels.items():
        value = f"{counts[name]:>10,}"
        if name == "written":
            value += f"   the paper's: {PAPER_COUNT:,}"
        rows.append((label, value))
    return table(rows)


def read_question(row: dict[str, Any], where: str) -> dict[str, str]:
    """Return `id`, `dataset`, `instruction` and `input` of a row."""
    instruction = check_text(row.get("instruction"), "instruction", where)
    text = "" if row.get("input") is None else row["input"]
    text = check_text(text, "input", where, may_be_empty=True)
    if not text.strip():
        before, mark, after = instruction.partition(INPUT)
        instruction, text = (before, after) if mark else ("", instruction)
    return {
        "id": where if row.get("id") is None else check_id(row["id"], where),
        "dataset": str(row.get("dataset_name") or "selfrag"),
        "instruction": instruction,
        "input": check_text(text, "input", where),
    }


# ---------------------------------------------------------------------- outputs


def read_pieces(output: str) -> list[Piece]:
    """
    Split an output at its marks.

    Returns:
        `list[Piece]`: the pieces that have a text.

    Raises:
        `ValueError`: says what is wrong with the marks.
    """
    pieces = [Piece("free")]
    position = 0
    for match in MARK.finditer(output):
        pieces[-1].text += output[position : match.start()]
        position = match.end()
        mark = match["mark"]
        if match["stray"]:
            raise ValueError(
                f"{match['stray']} at character {match.start()} is not in a [Retrieval]<paragraph>…</paragraph>."
            )
        if match["passage"] is not None:
            pieces.append(Piece("passage", passage=match["passage"]))
        elif mark == "[Continue to Use Evidence]":
            pieces.append(Piece("continued"))
        elif mark in ("[Relevant]", "[Irrelevant]"):
            rated = pieces[-1]
            if rated.kind != "passage" or rated.relevant is not None or rated.text.strip():
                raise ValueError(f"{mark} at character {match.start()} rates no passage.")
            rated.relevant = mark == "[Relevant]"
        elif mark in SUPPORT:
            if pieces[-1].kind == "free":
                raise ValueError(f"{mark} at character {match.start()} rates no text on a passage.")
            pieces[-1].support = mark
            pieces.append(Piece("free"))
        else:  # [No Retrieval] or [Utility:n]
            pieces.append(Piece("free"))
    pieces[-1].text += output[position:]

    for piece in pieces:
        if piece.kind == "passage" and not is_complete(piece):
            raise ValueError(f"the passage {piece.passage[:40]!r}… has no rating, no text after it, or is empty.")
    pieces = [piece for piece in pieces if piece.text.strip()]
    if not pieces:
        raise ValueError("the output holds no text.")
    return pieces


def is_complete(piece: Piece) -> bool:
    """Return whether a passage is rated, not empty, and followed by text."""
    return piece.relevant is not None and piece.text.strip() != "" and piece.passage.strip() != ""


def split_passage(passage: str) -> tuple[str, str]:
    """Return the title, which is the first line, and the text of a passage; a passage of one line has no title."""
    title, _, text = passage.strip().partition("\n")
    if not text.strip():
        return "", title.strip()
    return title.strip(), text.strip()


def left_out(pieces: list[Piece], filters: list[str], min_support: int) -> str | None:
    """Return the name of the first filter that leaves an output out, or None."""
    passages = [piece for piece in pieces if piece.kind == "passage"]
    relevant = [piece for piece in passages if piece.relevant]
    applies = {
        "without_passage": not passages,
        "irrelevant": len(relevant) < len(passages),
        "unsupported": lowest_support(pieces) < min_support,
    }
    for name in FILTERS:
        if name in filters and applies[name]:
            return name
    return None


def lowest_support(pieces: list[Piece]) -> int:
    """Return the lowest rating of the texts on relevant passages; a continuation without a rating is ignored."""
    lowest = max(SUPPORT.values())
    is_grounded = False
    for piece in pieces:
        if piece.kind == "passage":
            is_grounded = bool(piece.relevant)
        elif piece.kind == "free":
            is_grounded = False
        is_rated = piece.kind == "passage" or piece.support is not None
        if is_grounded and is_rated:
            lowest = min(lowest, SUPPORT.get(piece.support or "", 0))
    return lowest


def segments_of(pieces: list[Piece], prefix: str, counts: Counter[str]) -> list[dict[str, Any]]:
    """
    Return the segments of an output.

    Consecutive free texts are joined by a space, and so are the text of a segment and a text that continues it.

    Args:
        pieces (`list[Piece]`): from [`read_pieces`].
        prefix (`str`): free text before each passage; may be empty.
        counts (`Counter`): counts the continued pieces that follow no passage.

    Returns:
        `list[dict]`: `text` and `passage`.
    """
    segments: list[dict[str, Any]] = []

    def add_free_text(text: str) -> None:
        if segments and segments[-1]["passage"] is None:
            segments[-1]["text"] += " " + text
        else:
            segments.append({"text": text, "passage": None})

    for piece in pieces:
        text = piece.text.strip()
        if piece.kind == "passage":
            if prefix:
                add_free_text(prefix)
            title, passage_text = split_passage(piece.passage)
            passage = {"id": content_id(title, passage_text), "title": title, "text": passage_text}
            segments.append({"text": text, "passage": passage})
        elif piece.kind == "free":
            add_free_text(text)
        elif segments and segments[-1]["passage"] is not None:
            segments[-1]["text"] += " " + text
        else:
            counts["continued texts without a passage, now free text"] += 1
            add_free_text(text)
    return segments


if __name__ == "__main__":
    main()
