"""
Measure the perplexity of text under a language model alone and with token memories, in one pass over the text.

    python recipes/run_perplexity.py --model out --memory mem mlp --text_file heldout.jsonl --output_dir results
    python recipes/run_perplexity.py --model gpt2 --memory mem --memory_weight 0.1 --text_file book.txt --output_dir r

The text is JSON Lines or Parquet with a `text` column, a document a line, or a plain text file, which is one document.
Documents are read in sliding windows; every token but the first of a document is predicted once. `--output_dir` gets
`perplexity.json`, `report.md` and `report.html`. A memory that holds the text already is reported with a warning.
"""

import time
from pathlib import Path
from typing import Any

from shared.cli import check_options, check_place, clear_errors, parse, refuse_given, table

from shared.memory_arguments import PerplexityArguments

if __name__ == "__main__":  # --help and a wrong option do not wait for the imports below
    check_options([PerplexityArguments], __doc__)

from modeling_cosup import KNNMemory, MLPMemory
from modeling_cosup.files_cosup import digest_file, write_json
from modeling_cosup.opening_cosup import load_memory
from modeling_cosup.token_keys_cosup import window_size
from trainer.judging.figures import figure, figure_line
from trainer.judging.judge import command_line, environment
from trainer.judging.overlap import NgramHashes
from trainer.judging.perplexity import LM, Memories, TextScores, score_text
from trainer.judging.results import FORMAT
from trainer.reports.perplexity import shown_overlap, text_read, write_perplexity_report
from trainer.running import peak_memory

from shared.indexes import faiss_options
from shared.memory_options import call_config
from shared.processes import processes, set_cpu_threads
from shared.token_memories import load_gen, read_documents


def main() -> None:
    """Score the text, write the results and the report, and print the figures."""
    (args,) = parse([PerplexityArguments], __doc__)
    with clear_errors():
        set_cpu_threads(args.num_threads)
        start = time.perf_counter()
        check(args)
        state = processes()
        if state.num_processes > 1:
            raise ValueError(f"{state.num_processes} processes were launched: perplexity is measured in one.")
        model, tokenizer = load_gen(args.model, args.dtype)
        model.to(state.device)
        max_length, stride = window_size(model, args.max_length, args.stride)
        memories: dict[str, Any] = {}
        for path in args.memory:
            memory = load_memory(path, **faiss_options(args))
            memory.check_model(model, tokenizer)
            if isinstance(memory, MLPMemory):
                memory.to(model.device)
            elif args.memory_device:
                memory.to(args.memory_device)
            memories[path] = (memory, call_config(memory, args))
        if not any(isinstance(memory, KNNMemory) for memory, _ in memories.values()):
            refuse_given(args, ("memory_k", "memory_device"), "is for a KNNMemory, and no --memory is one")
        documents = NgramHashes(read_documents(args.text_file, tokenizer, args.max_documents))
        scores = score_text(
            model, documents, memories, max_length=max_length, stride=stride, batch_size=args.batch_size
        )
        overlaps = {}
        for path, (memory, _) in memories.items():
            overlaps[path] = documents.overlap(memory) if isinstance(memory, KNNMemory) else None
        settings = {
            "command": command_line(),
            "text_file": args.text_file,
            "max_length": max_length,
            "stride": stride,
            "batch_size": args.batch_size,
            **environment(model),
        }
        results = results_of(scores, memories, overlaps)
        results["warnings"] += warnings_of(memories, args.text_file)
        peak = peak_memory(model.device)
        if peak is not None:
            results["peak_memory"] = peak
        seconds = round(time.perf_counter() - start, 1)
        results = {"format": FORMAT, "settings": settings, **results, "seconds": seconds}
        Path(args.output_dir).mkdir(parents=True, exist_ok=True)
        write_json(Path(args.output_dir) / "perplexity.json", results)
        write_perplexity_report(args.output_dir)
    print_figures(results, args.output_dir)


def check(args: PerplexityArguments) -> None:
    """
    Check the options before anything is loaded.

    Raises:
        `ValueError`, `FileNotFoundError`: names the option.
    """
    for name in ("batch_size", "max_documents", "max_length", "stride"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name} is {value}, expected at least 1.")
    if not Path(args.text_file).is_file():
        raise FileNotFoundError(f"--text_file {args.text_file}: no such file.")
    for path in args.memory:
        check_place(f"--memory {path}", path)
    if not args.memory:
        options = ("memory_weight", "memory_k", "memory_temperature", "memory_device", "allow_faiss_files")
        refuse_given(args, options, "without --memory: name the memory")
    repeated = [path for path in args.memory if args.memory.count(path) > 1]
    if repeated:
        raise ValueError(f"--memory names {repeated[0]} twice.")


def results_of(scores: TextScores, memories: Memories, overlaps: dict[str, float | None]) -> dict[str, Any]:
    """Return the figures of each arm as the results file holds them."""
    num_tokens = int(scores.tokens.sum())
    arms, warnings = {}, []
    for arm, seconds in scores.seconds.items():
        memory, config = memories.get(arm, (None, None))
        overlap = overlaps.get(arm)
        arms[arm] = {
            "memory_config": None if config is None else config.to_dict(),
            "entries": len(memory) if isinstance(memory, KNNMemory) else None,
            **scores.figures(arm),
            "difference": None if arm == LM else scores.difference(arm),
            "ngram_overlap": overlap,
            "seconds": seconds,
            "seconds_per_1000_tokens": 1000 * seconds / num_tokens,
        }
        if overlap:
            share = f"{shown_overlap(overlap)} of the text is in {arm}"
            warnings.append(f"{share}, as 16-grams or as short documents: it has seen what it is judged on.")
    text = {"documents": len(scores.tokens), "left_out": scores.left_out, "tokens": num_tokens}
    return {"text": text, "arms": arms, "warnings": warnings}


def warnings_of(memories: Memories, text_file: str) -> list[str]:
    """Return warnings of memories that were fitted on the text, or that do not record what they were trained on."""
    warnings = []
    for name, (memory, _) in memories.items():
        if memory.fit is not None and memory.fit.get("sha256") == digest_file(text_file):
            warnings.append(f"Weight and temperature of {name} were fitted on this text.")
        if isinstance(memory, MLPMemory):
            warnings.append(f"{name} does not record what it was trained on: make sure that it was not this text.")
    return warnings


def print_figures(results: dict[str, Any], output_dir: str) -> None:
    """Print perplexity and cost of each arm, and warnings."""
    print(f"{text_read(results['text'])} (95 % intervals in brackets)\n")
    for name, arm in results["arms"].items():
        rows = [(figure(metric).label, figure_line(arm[metric], metric)) for metric in ("perplexity", "nll")]
        if arm["difference"] is not None:
            rows.append(("NLL to Gen alone", figure_line(arm["difference"], "nll")))
        rows.append(("s per 1,000 tokens", f"{arm['seconds_per_1000_tokens']:.3f}"))
        print(f"{'Gen alone' if name == LM else name}\n{table(rows)}\n")
    for warning in results["warnings"]:
        print(f"warning: {warning}")
    print(f"Report: {Path(output_dir) / 'report.html'}   {results['seconds']:,.1f} s")


if __name__ == "__main__":
    main()
