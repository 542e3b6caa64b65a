"""
Answer questions and print each answer with its passages.

    python recipes/generate.py --model out --index out/index "who painted the night watch?" "when?"
    python recipes/generate.py --model out --index out/index --file questions.txt
    cat questions.txt | python recipes/generate.py --model out --index out/index
    python recipes/generate.py --model out --index wiki --index_uri http://host:19530 "when?"     # a collection in Milvus
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from shared.cli import clear_errors, parse

from shared.indexes import INDEX_HELP, INDEX_URI_HELP, check_index_options, open_index


@dataclass(kw_only=True)
class GenerateArguments:
    """What is asked, and how it is answered."""

    questions: list[str] = field(
        default_factory=list,
        metadata={
            "help": "questions; without any, and without --file, they are read from stdin",
            "positional": True,
            "may_be_empty": True,
        },
    )
    model: str = field(metadata={"help": "name or path of a CoSup checkpoint"})
    index: str | None = field(default=None, metadata={"help": f"{INDEX_HELP}; without it nothing is retrieved"})
    index_uri: str | None = field(default=None, metadata={"help": INDEX_URI_HELP})
    file: str | None = field(default=None, metadata={"help": "a text file, one question a line"})
    instruction: str = field(default="", metadata={"help": "the task's instruction, as in training"})
    batch_size: int = field(default=8, metadata={"help": "questions at once"})
    max_new_tokens: int = field(default=128, metadata={"help": "decoded tokens per answer"})
    do_sample: bool = field(default=False, metadata={"help": "sample instead of greedy decoding", "flag": True})
    stream: bool = field(
        default=False, metadata={"help": "print each answer while it is written, passages included", "flag": True}
    )
    output_file: str | None = field(
        default=None,
        metadata={
            "help": "JSON Lines: answers with their traces; a second call goes on where the first was interrupted"
        },
    )
    dtype: str = field(default="auto", metadata={"help": "of the weights, e.g. bfloat16 on a GPU"})
    max_retrievals: int | None = field(default=None, metadata={"help": "per question"})
    passages_per_nsp: int = field(default=1, metadata={"help": "passages for each retrieval"})
    min_score: float | None = field(default=None, metadata={"help": "a passage below it is not retrieved"})
    force_nsp_first: bool = field(
        default=False, metadata={"help": "every answer begins with a retrieval", "flag": True}
    )
    forbid_nsp: bool = field(default=False, metadata={"help": "never retrieve", "flag": True})
    no_repeat_passages: bool = field(default=False, metadata={"help": "no passage twice in an answer", "flag": True})
    forget_passages: Literal["recompute", "mask"] | None = field(
        default=None, metadata={"help": "what becomes of a passage at its [CE]"}
    )


def main():
    """Read questions from the command line, a file or stdin, one a line, and answer them in batches."""
    (args,) = parse([GenerateArguments], __doc__)
    with clear_errors():
        answer(args)


def answer(args):
    """Load, generate, print."""
    lines = (
        args.questions or (Path(args.file).read_text(encoding="utf-8") if args.file else sys.stdin.read()).splitlines()
    )
    questions = [line.strip() for line in lines if line.strip()]
    check_index_options(args.index, args.index_uri)
    if not questions:
        raise ValueError("no question given: write them behind the options, into --file, or to stdin.")

    import torch
    from transformers import TextStreamer

    from modeling_cosup import CoSupConfig, CoSupForCausalLM, RetrievalConfig
    from modeling_cosup.tokenization_cosup import encode_prompt

    device = "cuda" if torch.cuda.is_available() else "cpu"
    own_queries = CoSupConfig.from_pretrained(args.model).query_from == "gen"  # then generation needs Gen alone
    model = CoSupForCausalLM.from_pretrained(args.model, dtype=args.dtype, load_emb_seq=not own_queries).to(device)
    tokenizer = model.tokenizer
    index = open_index(model, args.index, args.index_uri)
    names = ("max_retrievals", "min_score", "force_nsp_first", "forbid_nsp", "no_repeat_passages", "forget_passages")
    options = {"max_new_tokens": args.max_new_tokens, "do_sample": args.do_sample}
    if index is not None:
        options["retriever"] = index
        options["retrieval_config"] = RetrievalConfig(
            top_k=args.passages_per_nsp, **{name: getattr(args, name) for name in names}
        )
    prompts = [list(encode_prompt(tokenizer, question, args.instruction)) for question in questions]
    if args.stream:
        for question, prompt in zip(questions, prompts, strict=True):
            print(f"Q  {question}\nA  ", end="", flush=True)
            model.generate(
                torch.tensor([prompt], device=device), streamer=TextStreamer(tokenizer, skip_prompt=True), **options
            )
        return
    options |= {
        "batch_size": args.batch_size,
        "output_file": args.output_file,
        "show_progress_bar": len(questions) > args.batch_size,
    }
    for question, done in zip(questions, model.generate_many(prompts, **options), strict=True):
        print(f"Q  {question}\nA  {done.cited_text}\n")


if __name__ == "__main__":
    main()
