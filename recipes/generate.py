"""
Answer questions and print each answer with its passages.

    python recipes/generate.py --model out --index out/index "who painted the night watch?" "when?"
    python recipes/generate.py --model out --index out/index --file questions.txt
    cat questions.txt | python recipes/generate.py --model out --index out/index
    python recipes/generate.py --model out --index wiki --index_uri http://host:19530 "when?"     # a collection in Milvus
"""

import argparse
import sys
from pathlib import Path

from shared.cli import clear_errors

from shared.indexes import INDEX_HELP, add_index_options, check_index_options, open_index


def main():
    """Read questions from the command line, a file or stdin, one a line, and answer them in batches."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("questions", nargs="*", help="questions; without any, and without --file, they are read from stdin")
    parser.add_argument("--model", required=True, help="name or path of a CoSup checkpoint")
    add_index_options(parser, f"{INDEX_HELP}; without it nothing is retrieved")
    parser.add_argument("--file", help="a text file, one question a line")
    parser.add_argument("--instruction", default="", help="the task's instruction, as in training")
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--max_new_tokens", type=int, default=128)
    parser.add_argument("--do_sample", action="store_true", help="sample instead of greedy decoding")
    parser.add_argument("--stream", action="store_true", help="print each answer while it is written, passages included")
    parser.add_argument("--output_file", help="JSON Lines: answers with their traces; a second call goes on where the first was interrupted")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--max_retrievals", type=int, default=None, help="per question")
    parser.add_argument("--passages_per_nsp", type=int, default=1, help="passages for each retrieval")
    parser.add_argument("--min_score", type=float, default=None, help="a passage below it is not retrieved")
    parser.add_argument("--force_nsp_first", action="store_true", help="every answer begins with a retrieval")
    parser.add_argument("--forbid_nsp", action="store_true", help="never retrieve")
    parser.add_argument("--no_repeat_passages", action="store_true", help="no passage twice in an answer")
    parser.add_argument("--forget_passages", choices=["recompute", "mask"], default=None, help="what becomes of a passage at its [CE]")
    args = parser.parse_args()
    with clear_errors():
        answer(args)


def answer(args):
    """Load, generate, print."""
    lines = args.questions or (Path(args.file).read_text(encoding="utf-8") if args.file else sys.stdin.read()).splitlines()
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
        options["retrieval_config"] = RetrievalConfig(top_k=args.passages_per_nsp, **{name: getattr(args, name) for name in names})
    prompts = [list(encode_prompt(tokenizer, question, args.instruction)) for question in questions]
    if args.stream:
        for question, prompt in zip(questions, prompts, strict=True):
            print(f"Q  {question}\nA  ", end="", flush=True)
            model.generate(torch.tensor([prompt], device=device), streamer=TextStreamer(tokenizer, skip_prompt=True), **options)
        return
    options |= {"batch_size": args.batch_size, "output_file": args.output_file, "show_progress_bar": len(questions) > args.batch_size}
    for question, done in zip(questions, model.generate_many(prompts, **options), strict=True):
        print(f"Q  {question}\nA  {done.cited_text}\n")


if __name__ == "__main__":
    main()
