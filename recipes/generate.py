"""
Answer questions and print each answer with its passages.

    python recipes/generate.py --model out --index out/index "who painted the night watch?" "when?"
    python recipes/generate.py --model out --index out/index --file questions.txt
    cat questions.txt | python recipes/generate.py --model out --index out/index
"""

import argparse
import sys
from pathlib import Path

from cli import clear_errors


def main():
    """Read questions from the command line, a file or stdin, one a line, and answer them in batches."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("questions", nargs="*", help="questions; without any, and without --file, they are read from stdin")
    parser.add_argument("--model", required=True, help="name or path of a CoSup checkpoint")
    parser.add_argument("--index", help="name or path of its index; without it nothing is retrieved")
    parser.add_argument("--file", help="a text file, one question a line")
    parser.add_argument("--instruction", default="", help="the task's instruction, as in training")
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--max_new_tokens", type=int, default=128)
    parser.add_argument("--max_retrievals", type=int, default=None, help="per question")
    parser.add_argument("--do_sample", action="store_true", help="sample instead of greedy decoding")
    parser.add_argument("--dtype", default="auto")
    args = parser.parse_args()
    with clear_errors():
        answer(args)


def answer(args):
    """Load, generate, print."""
    lines = args.questions or (Path(args.file).read_text(encoding="utf-8") if args.file else sys.stdin.read()).splitlines()
    questions = [line.strip() for line in lines if line.strip()]
    if not questions:
        raise ValueError("no question given: write them behind the options, into --file, or to stdin.")

    import torch

    from modeling_cosup import CoSupConfig, CoSupForCausalLM
    from modeling_cosup.tokenization_cosup import encode_prompt

    device = "cuda" if torch.cuda.is_available() else "cpu"
    own_queries = CoSupConfig.from_pretrained(args.model).query_from == "gen"  # then generation needs Gen alone
    model = CoSupForCausalLM.from_pretrained(args.model, dtype=args.dtype, load_emb_seq=not own_queries).to(device)
    tokenizer = model.tokenizer
    index = model.load_index(args.index) if args.index else None
    tokenizer.padding_side = "left"
    options = {"max_new_tokens": args.max_new_tokens, "do_sample": args.do_sample}
    for start in range(0, len(questions), args.batch_size):
        batch = questions[start : start + args.batch_size]
        prompts = {"input_ids": [list(encode_prompt(tokenizer, question, args.instruction)) for question in batch]}
        inputs = tokenizer.pad(prompts, return_tensors="pt").to(device)
        if index is None:
            outputs = model.generate(**inputs, **options)
            texts = tokenizer.batch_decode(outputs[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        else:
            outputs = model.generate(**inputs, **options, retriever=index, max_retrievals=args.max_retrievals, return_dict_in_generate=True)
            texts = model.decode_with_citations(outputs, tokenizer)
        for question, text in zip(batch, texts, strict=True):
            print(f"Q  {question}\nA  {text}\n", flush=True)


if __name__ == "__main__":
    main()
