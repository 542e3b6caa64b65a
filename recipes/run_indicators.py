"""
Measure where readers look: Indicators 1 and 2 of arXiv 2402.11794, for one or several models side by side.

    python recipes/run_indicators.py --model out --index out/index --eval_file eval.jsonl --output_dir indicators
    python recipes/run_indicators.py --model step_1 untrained --index step_1/index --eval_file eval.jsonl \\
        --candidates gold_included --output_dir indicators

The first model retrieves from its index; all models read the same questions with the same passages. A reader that is
worth distilling gives much attention to the passage tokens that are nearest to its answer. Nouns of a question may
stand in its `"meta": {"nouns": [...]}`; otherwise a rule finds them. `--output_dir` gets `indicators.json`,
`report.md` and `report.html`.
"""

import time
from pathlib import Path
from typing import Any

from shared.cli import check_options, check_place, clear_errors, parse, table

from shared.indicator_arguments import IndicatorArguments

if __name__ == "__main__":  # --help and a wrong option do not wait for the imports below
    check_options([IndicatorArguments], __doc__)

import torch

from modeling_cosup import CoSupConfig, CoSupForCausalLM
from modeling_cosup.files_cosup import write_json
from trainer import load_evaluation_set
from trainer.judging.indicators import candidate_passages, indicators
from trainer.judging.judge import command_line, environment
from trainer.judging.results import FORMAT
from trainer.questions import provenance_unknown
from trainer.reports.indicators import (
    column_title,
    columns,
    shown_attention,
    shown_best,
    shown_places,
    shown_rho,
    write_indicator_report,
)

from shared.indexes import open_index
from shared.processes import processes, set_cpu_threads


def main() -> None:
    """Retrieve, let every model read, write the results and the report, and print the figures."""
    (args,) = parse([IndicatorArguments], __doc__)
    with clear_errors():
        set_cpu_threads(args.num_threads)
        start = time.perf_counter()
        check(args)
        state = processes()
        if state.num_processes > 1:
            raise ValueError(f"{state.num_processes} processes were launched: indicators are measured in one.")
        questions = read_questions(args)
        results = measure(args, questions, state.device)
        results["seconds"] = round(time.perf_counter() - start, 1)
        Path(args.output_dir).mkdir(parents=True, exist_ok=True)
        write_json(Path(args.output_dir) / "indicators.json", results)
        write_indicator_report(args.output_dir)
    print_figures(results, args.output_dir)


def check(args: IndicatorArguments) -> None:
    """
    Check the options before anything is loaded.

    Raises:
        `ValueError`, `FileNotFoundError`: names the option.
    """
    for name in ("num_candidates", "max_eval_samples", "batch_size", "max_tokens"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name} is {value}, expected at least 1.")
    for model in args.model:
        check_place(f"--model {model}", model)
    repeated = [model for model in args.model if args.model.count(model) > 1]
    if repeated:
        raise ValueError(f"--model names {repeated[0]} twice.")


def read_questions(args: IndicatorArguments) -> list[dict]:
    """
    Return the questions with gold passages and, with `--candidates retrieved`, those whose gold passages are unknown.

    Raises:
        `ValueError`: if there are none.
    """
    questions = []
    for question in load_evaluation_set(args.eval_file):
        if question["provenance"] or (provenance_unknown(question) and args.candidates == "retrieved"):
            questions.append(question)
    if not questions:
        needed = "provenance" if args.candidates == "gold_included" else "provenance (or an unknown one)"
        raise ValueError(f"--eval_file {args.eval_file}: no question has {needed}, so no passage is needed.")
    return questions[: args.max_eval_samples]


def measure(args: IndicatorArguments, questions: list[dict], device: torch.device) -> dict[str, Any]:
    """Return the content of `indicators.json`, except for the time that it took."""
    retriever = args.model[0]
    embeds = CoSupConfig.from_pretrained(retriever).query_from != "gen"
    model = CoSupForCausalLM.from_pretrained(retriever, dtype=args.dtype, load_emb_seq=embeds).to(device)
    index = open_index(model, args.index, args.index_uri)
    gold_included = args.candidates == "gold_included"
    passages = candidate_passages(
        model, index, questions, args.num_candidates, gold_included, args.batch_size, args.seed, args.shuffle
    )
    settings = {
        **environment(model),
        "command": command_line(),
        "retriever": retriever,
        **{name: getattr(args, name) for name in ("eval_file", "index", "num_candidates", "candidates", "pooling")},
        "shuffle": args.shuffle,
        "seed": args.seed,
    }
    readers = {}
    for name in args.model:
        if name != retriever:
            del model  # one reader in memory at a time
            model = CoSupForCausalLM.from_pretrained(name, dtype=args.dtype, load_emb_seq=False).to(device)
        results = indicators(
            model, questions, passages, pooling=args.pooling, max_tokens=args.max_tokens, likelihoods=args.likelihoods
        )
        readers[name] = {"fingerprint": model.fingerprint(), **results.to_dict()}
    return {"format": FORMAT, "settings": settings, "models": readers}


def print_figures(results: dict[str, Any], output_dir: str) -> None:
    """Print the indicators of each model, attention in percent."""
    for name, reader in results["models"].items():
        rows = [("attention to all alike, %", shown_attention(reader["uniform"]))]
        for target, percentile in columns(results["models"]):
            indicator = reader["indicators"][target][percentile]
            attention, rho = shown_attention(indicator["attention"]), shown_rho(indicator["rho"])
            counts = f"n = {indicator['attention']['n']}, {indicator['num_undefined']} without ρ"
            rows.append((column_title(target, percentile), f"{attention:>14}   ρ {rho:14}  {counts}"))
        rows += [(f"best passage is gold, by {name}", shown) for name, shown in shown_best(reader).items()]
        rows.append(("attention by place, %", shown_places(reader)))
        print(f"{name}\n{table(rows)}\n")
    print(f"Report: {Path(output_dir) / 'report.html'}   {results['seconds']:,.1f} s")


if __name__ == "__main__":
    main()
