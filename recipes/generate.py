"""
Answer questions and print each answer with its passages.

    python recipes/generate.py --model out --index out/index "who painted the night watch?" "when?"
    python recipes/generate.py --model out --index out/index --file questions.txt
    cat questions.txt | python recipes/generate.py --model out --index out/index
    python recipes/generate.py --model out --index wiki --index_uri http://host:19530 "when?"    # collection in Milvus
    python recipes/generate.py --model out --index out/index --memory out/memory --memory_weight 0.25 "when?"
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from shared.cli import clear_errors, parse

from shared.indexes import (
    FAISS_HELP,
    INDEX_HELP,
    INDEX_URI_HELP,
    check_faiss_option,
    check_index_options,
    faiss_options,
    open_index,
)
from shared.memory_options import MemoryOptions, open_memory


@dataclass(kw_only=True)
class GenerateArguments:
    """Questions, and settings of their answers."""

    questions: list[str] = field(
        default_factory=list,
        metadata={
            "help": "questions; without them and without --file, questions are read from stdin",
            "positional": True,
            "may_be_empty": True,
        },
    )
    model: str = field(metadata={"local_or_hub": True, "help": "name or path of a CoSup checkpoint"})
    index: str | None = field(default=None, metadata={"help": f"{INDEX_HELP}; without it nothing is retrieved"})
    index_uri: str | None = field(default=None, metadata={"help": INDEX_URI_HELP})
    allow_faiss_files: bool = field(default=False, metadata={"help": FAISS_HELP, "flag": True})
    file: str | None = field(default=None, metadata={"help": "text file with one question per line"})
    instruction: str = field(default="", metadata={"help": "the task's instruction, as in training"})
    batch_size: int = field(default=8, metadata={"help": "questions per batch"})
    max_new_tokens: int = field(default=128, metadata={"help": "decoded tokens per answer"})
    do_sample: bool = field(default=False, metadata={"help": "sample instead of greedy decoding", "flag": True})
    stream: bool = field(
        default=False, metadata={"help": "print each answer with its passages while it is written", "flag": True}
    )
    output_file: str | None = field(
        default=None,
        metadata={"help": "JSON Lines file for answers and their traces; calling again continues an interrupted call"},
    )
    dtype: str = field(default="auto", metadata={"help": "dtype of the weights, e.g. bfloat16 on a GPU"})
    max_retrievals: int | None = field(default=None, metadata={"help": "maximum number of retrievals per question"})
    top_k: int = field(
        default=1, metadata={"help": "passages per retrieval; the top_k of sampling is in generation_config.json"}
    )
    min_score: float | None = field(default=None, metadata={"help": "a passage with a lower score is not retrieved"})
    force_nsp_first: bool = field(
        default=False, metadata={"help": "every answer begins with a retrieval", "flag": True}
    )
    forbid_nsp: bool = field(default=False, metadata={"help": "never retrieve", "flag": True})
    no_repeat_passages: bool = field(
        default=False, metadata={"help": "retrieve no passage twice in an answer", "flag": True}
    )
    forget_passages: Literal["recompute", "mask"] | None = field(
        default=None, metadata={"help": "how Gen forgets a passage at its [CE]; by default it keeps it"}
    )


RETRIEVAL_OPTIONS = (
    *("max_retrievals", "top_k", "min_score", "force_nsp_first", "forbid_nsp", "no_repeat_passages"),
    "forget_passages",
)


def main() -> None:
    """Read the options and answer the questions."""
    args, memory_options = parse([GenerateArguments, MemoryOptions], __doc__)
    with clear_errors():
        answer(args, memory_options)


def answer(args: GenerateArguments, memory_options: MemoryOptions) -> None:
    """Answer questions from the command line, a file or stdin, and print the answers."""
    check_options(args)
    questions = read_questions(args)
    check_index_options(args.index, args.index_uri)
    check_faiss_option(args, memory_options.memory)
    if not questions:
        raise ValueError("no question given: write them after the options, into --file, or to stdin.")

    import torch
    from transformers import TextStreamer

    from modeling_cosup import CoSupConfig, CoSupForCausalLM, RetrievalConfig
    from modeling_cosup.tokenization_cosup import encode_prompt

    device = "cuda" if torch.cuda.is_available() else "cpu"
    load_emb_seq = CoSupConfig.from_pretrained(args.model).query_from != "gen"  # otherwise generation needs only Gen
    model = CoSupForCausalLM.from_pretrained(args.model, dtype=args.dtype, load_emb_seq=load_emb_seq).to(device)
    index_options = {} if args.index_uri else faiss_options(args)
    index = open_index(model, args.index, args.index_uri, **index_options)
    options = {"max_new_tokens": args.max_new_tokens, "do_sample": args.do_sample}
    options |= open_memory(model, memory_options, **faiss_options(args))
    if index is not None:
        options["retriever"] = index
        options["retrieval_config"] = RetrievalConfig(
            top_k=args.top_k,
            max_retrievals=args.max_retrievals,
            min_score=args.min_score,
            force_nsp_first=args.force_nsp_first,
            forbid_nsp=args.forbid_nsp,
            no_repeat_passages=args.no_repeat_passages,
            forget_passages=args.forget_passages,
        )
    prompts = [list(encode_prompt(model.tokenizer, question, args.instruction)) for question in questions]
    if args.stream:
        for question, prompt in zip(questions, prompts, strict=True):
            print(f"Q  {question}\nA  ", end="", flush=True)
            streamer = TextStreamer(model.tokenizer, skip_prompt=True)
            model.generate(torch.tensor([prompt], device=device), streamer=streamer, **options)
        return
    answers = model.generate_many(
        prompts,
        batch_size=args.batch_size,
        output_file=args.output_file,
        show_progress_bar=len(questions) > args.batch_size,
        **options,
    )
    for question, result in zip(questions, answers, strict=True):
        print(f"Q  {question}\nA  {result.cited_text}\n")


def check_options(args: GenerateArguments) -> None:
    """
    Check that every option that was given has an effect.

    Raises:
        `ValueError`: names two options of which one would be ignored.
    """
    if args.stream and args.output_file:
        raise ValueError("--stream prints answers while they are written, and --output_file keeps them: give one.")
    if args.stream and args.batch_size not in (1, GenerateArguments.batch_size):
        raise ValueError("--stream answers one question after the other: leave out --batch_size.")
    if args.questions and args.file:
        raise ValueError("Questions on the command line and --file: give one.")
    if args.index is not None:
        return
    for name in RETRIEVAL_OPTIONS:
        if getattr(args, name) != GenerateArguments.__dataclass_fields__[name].default:
            raise ValueError(f"--{name} without --index: nothing is retrieved.")


def read_questions(args: GenerateArguments) -> list[str]:
    """Return the questions of the command line, otherwise the lines of the file or of stdin."""
    lines = args.questions
    if not lines and args.file:
        lines = Path(args.file).read_text(encoding="utf-8-sig").split("\n")
    elif not lines:
        if not sys.stdin.isatty():
            sys.stdin.reconfigure(encoding="utf-8-sig")  # piped from a file, which is read as `--file` is
        lines = sys.stdin.read().split("\n")  # not splitlines(), which splits at U+2028 and others within a question
    return [line.strip() for line in lines if line.strip()]


if __name__ == "__main__":
    main()
