"""
Training instances from the training data of Self-RAG, the data that the paper trains on (appendix B.2).

    python recipes/prepare_selfrag.py --input_file selfrag/selfrag_train_data --output_file selfrag/train.jsonl.gz --output_corpus selfrag/corpus.jsonl.gz

Self-RAG marks its outputs with tokens. They become segments:

    [Retrieval]<paragraph>title, new line, text</paragraph>[Relevant]sentence[Fully supported]    a segment with a passage
    [Continue to Use Evidence]sentence      goes on with the segment before, where that has a passage; else it is free text
    [No Retrieval]sentence, or no token     free text
    [Utility:5] and the other ratings       decide what is left out, and are then dropped

Three filters leave an instance out. Each can be switched off by naming the others in `--filters`:

    without_passage     no segment has a passage: the paper's own code trains on none of these, unless told otherwise
    irrelevant          a passage is rated [Irrelevant]
    unsupported         a text on a relevant passage is not rated, or below `--min_support`: by default [No support / Contradictory]

The paper says that three filters leave 42,932 instances; their wording was not at hand when this was written, so these are a reading of it, and the table
printed at the end shows each filter's count and, next to the result, the paper's. Instances whose marks are damaged are counted, and the first ones shown.

In the paper's examples "Question: …" is repeated before `[Cs]`. Nothing may stand between a passage and `[Cs]`, because generation puts `[Cs]` right after
what it retrieved; `--question_template "Question: {input}"` has Gen write the question before each `[NSP]`, so that it also stands in front of `[Cs]`.

What comes before "## Input:" in Self-RAG's instruction is the instruction, what comes after it the input; without it, all of it is the input.
"""

import re
from collections import Counter
from dataclasses import dataclass, field
from typing import Literal

from shared.cli import clear_errors, parse, table

from tqdm import tqdm

from modeling_cosup.lines_cosup import writing_lines
from modeling_cosup.passages_cosup import check_text
from trainer.data import check_instance, content_id, read_rows

PAPER_COUNT = 42_932
FILTERS = ("without_passage", "irrelevant", "unsupported")
SUPPORT = {"[No support / Contradictory]": 0, "[Partially supported]": 1, "[Fully supported]": 2}
MIN_SUPPORT = {"none": 0, "partial": 1, "full": 2}
PASSAGE = r"\[Retrieval\]\s*<paragraph>(?P<passage>.*?)</paragraph>"
MARKS = r"\[(?:No Retrieval|Continue to Use Evidence|Relevant|Irrelevant|Fully supported|Partially supported|No support / Contradictory|Utility:[1-5])\]"
MARK = re.compile(rf"{PASSAGE}|(?P<mark>{MARKS})|(?P<stray>\[Retrieval\]|</?paragraph>)", re.DOTALL)
INPUT = "## Input:\n\n"
SHOWN = 5  # damaged instances


@dataclass
class Piece:
    """
    A stretch of an output.

    Args:
        kind (`str`): `"passage"`, `"continued"` or `"free"`.
        text (`str`): without marks.
        passage (`str`, *optional*): as it stands in the output.
        relevant (`bool`, *optional*), support (`str`, *optional*): its ratings.
    """

    kind: str
    text: str = ""
    passage: str | None = None
    relevant: bool | None = None
    support: str | None = None


@dataclass
class SelfRAGArguments:
    """What is read, what is left out, and what is written."""

    input_file: str = field(
        metadata={"help": "JSON Lines with instruction, input and output (.gz or plain), or a dataset name"}
    )
    output_file: str = field(metadata={"help": "training instances, JSON Lines (.gz by the name)"})
    output_corpus: str | None = field(default=None, metadata={"help": "also write their passages, each once"})
    split: str = field(default="train", metadata={"help": "of a dataset name"})
    filters: list[str] = field(
        default_factory=lambda: list(FILTERS),
        metadata={
            "help": "which to apply; none: --filters without a name",
            "choices": FILTERS,
            "may_be_empty": True,
        },
    )
    min_support: Literal["none", "partial", "full"] = field(
        default="partial", metadata={"help": "lowest rating that the filter `unsupported` lets pass"}
    )
    question_template: str = field(
        default="", metadata={"help": 'e.g. "Question: {input}": written before each [NSP]'}
    )


def main():
    """Read the options and prepare the instances."""
    (args,) = parse([SelfRAGArguments], __doc__)
    with clear_errors():
        counts, damaged = prepare(args)
        print(report(counts))
        print("".join(f"\n{line}" for line in damaged), end="\n" if damaged else "")


def prepare(args):
    """
    Write training instances, and their passages.

    Returns:
        `(Counter, list[str])`: what was read, left out and written, and the first damaged instances.

    Raises:
        `ValueError`: names file and line, the field, what was found and what was expected; or says why nothing is left.
    """
    if args.question_template and "{input}" not in args.question_template:
        raise ValueError(f"--question_template is {args.question_template!r}, expected a text with {{input}}.")
    counts, damaged, passages = (
        Counter({"read": 0, "damaged": 0, **dict.fromkeys(FILTERS, 0), "written": 0}),
        [],
        set(),
    )
    with writing_lines(args.output_file) as write, writing_lines(args.output_corpus) as write_passage:
        for where, row in tqdm(read_rows(args.input_file, args.split), desc="Reading instances", unit=" instances"):
            counts["read"] += 1
            question, output = (
                read_question(row, where),
                check_text(row.get("output"), "output", where, may_be_empty=True),
            )
            try:
                pieces = read_pieces(output)
            except ValueError as error:
                counts["damaged"] += 1
                damaged += [f"{where}: {error}"] if len(damaged) < SHOWN else []
                continue
            if reason := left_out(pieces, args.filters, MIN_SUPPORT[args.min_support]):
                counts[reason] += 1
                continue
            prefix = args.question_template.replace("{input}", question["input"])
            instance = check_instance({**question, "segments": segments_of(pieces, prefix, counts)}, where)
            write(
                {
                    **instance,
                    "segments": [
                        {"text": segment["text"], "passage": segment["passage"]} for segment in instance["segments"]
                    ],
                }
            )
            count_instance(instance, counts)
            for segment in instance["segments"]:
                if (passage := segment["passage"]) and passage["id"] not in passages:
                    passages.add(passage["id"])
                    write_passage(passage)
        counts["passages"] = len(passages)
        if not counts["written"]:
            raise ValueError("No instance is left.\n" + report(counts) + "".join(f"\n{line}" for line in damaged))
    return counts, damaged


def report(counts):
    """The table of what was left out and written; the paper's count is next to ours."""
    names = {"read": "instances read", "damaged": "left out: damaged marks"} | {
        name: f"left out: {name}" for name in FILTERS
    }
    names |= {
        "written": "instances written",
        **{name: name for name in sorted(counts) if name.startswith(" ")},
        "passages": "distinct passages",
    }
    names |= {name: name for name in counts if name not in names}
    beside = {"written": f"   the paper's: {PAPER_COUNT:,}"}
    return table([(text, f"{counts[name]:>10,}{beside.get(name, '')}") for name, text in names.items()])


def count_instance(instance, counts):
    """Count a written instance by its number of passages."""
    counts["written"] += 1
    number = sum(segment["passage"] is not None for segment in instance["segments"])
    counts[f"  with {number} passage{'s' * (number != 1)}" if number < 4 else "  with more passages"] += 1


def read_question(row, where):
    """`id`, `dataset`, `instruction` and `input` of a row."""
    instruction = check_text(row.get("instruction"), "instruction", where)
    given = check_text("" if row.get("input") is None else row["input"], "input", where, may_be_empty=True)
    if given.strip():
        instruction, text = instruction, given
    else:
        instruction, mark, behind = instruction.partition(INPUT)
        instruction, text = (instruction, behind) if mark else ("", instruction)
    id = where if row.get("id") is None else str(row["id"])
    return {
        "id": id,
        "dataset": str(row.get("dataset_name") or "selfrag"),
        "instruction": instruction,
        "input": check_text(text, "input", where),
    }


# ---------------------------------------------------------------------- outputs


def read_pieces(output):
    """
    An output in pieces.

    Returns:
        `list[Piece]`: none of empty text.

    Raises:
        `ValueError`: says what is wrong with the marks.
    """
    pieces, position = [Piece("free")], 0
    for match in MARK.finditer(output):
        pieces[-1].text += output[position : match.start()]
        position, mark = match.end(), match["mark"]
        if match["stray"]:
            raise ValueError(
                f"{match['stray']} at character {match.start()} is no [Retrieval]<paragraph>…</paragraph>."
            )
        if match["passage"] is not None:
            pieces.append(Piece("passage", passage=match["passage"]))
        elif mark == "[Continue to Use Evidence]":
            pieces.append(Piece("continued"))
        elif mark in ("[Relevant]", "[Irrelevant]"):
            if pieces[-1].kind != "passage" or pieces[-1].relevant is not None or pieces[-1].text.strip():
                raise ValueError(f"{mark} at character {match.start()} rates no passage.")
            pieces[-1].relevant = mark == "[Relevant]"
        elif mark in SUPPORT:
            if pieces[-1].kind == "free":
                raise ValueError(f"{mark} at character {match.start()} rates no text on a passage.")
            pieces[-1].support = mark
            pieces.append(Piece("free"))
        else:  # [No Retrieval] and [Utility:n]
            pieces.append(Piece("free"))
    pieces[-1].text += output[position:]
    for piece in pieces:
        if piece.kind == "passage" and (
            piece.relevant is None or not piece.text.strip() or not "".join(split_passage(piece.passage)).strip()
        ):
            raise ValueError(f"the passage {piece.passage[:40]!r}… has no rating, no text behind it, or is empty.")
    pieces = [piece for piece in pieces if piece.text.strip()]
    if not pieces:
        raise ValueError("the output holds no text.")
    return pieces


def split_passage(passage):
    """Title, the first line, and text of a passage; a passage of one line has no title."""
    title, _, text = passage.strip().partition("\n")
    return (title.strip(), text.strip()) if text.strip() else ("", title.strip())


def left_out(pieces, filters, min_support):
    """Name of the first filter that leaves an output out, or None."""
    passages = [piece for piece in pieces if piece.kind == "passage"]
    reasons = {
        "without_passage": not passages,
        "irrelevant": any(not piece.relevant for piece in passages),
        "unsupported": any(piece.relevant and SUPPORT.get(piece.support, 0) < min_support for piece in passages),
    }
    return next((name for name in FILTERS if name in filters and reasons[name]), None)


def segments_of(pieces, prefix, counts):
    """
    Segments of an output: free text in one piece, and what is continued, are joined by a space.

    Args:
        pieces (`list[Piece]`), prefix (`str`): free text before each passage, may be empty.
        counts (`Counter`): of continued pieces that found no passage.

    Returns:
        `list[dict]`: `text` and `passage`.
    """
    segments = []

    def add(text, passage=None, grounded=False):
        if passage is None and segments and grounded == (segments[-1]["passage"] is not None):
            segments[-1]["text"] += " " + text
        else:
            segments.append({"text": text, "passage": passage})

    for piece in pieces:
        text = piece.text.strip()
        if piece.kind == "passage":
            if prefix:
                add(prefix)
            title, passage = split_passage(piece.passage)
            add(text, {"id": content_id(title, passage), "title": title, "text": passage})
        else:
            goes_on = piece.kind == "continued" and bool(segments) and segments[-1]["passage"] is not None
            counts["continued texts without a passage, now free text"] += piece.kind == "continued" and not goes_on
            add(text, grounded=goes_on)
    return segments


if __name__ == "__main__":
    main()
