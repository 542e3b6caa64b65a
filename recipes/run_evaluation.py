"""
Judge a checkpoint on one evaluation set, or on all that a config lists, and write a results folder with a report.

    accelerate launch recipes/run_evaluation.py --model out --corpus_file corpus.jsonl --eval_file eval.jsonl --output_dir results
    accelerate launch recipes/run_evaluation.py --config tasks.yaml --model out --output_dir results --modes retrieval gold off wrong
    accelerate launch recipes/run_evaluation.py --model out --index wiki --index_uri http://host:19530 --eval_file eval.jsonl --output_dir results

A config may hold any option, and `tasks`, a list of such entries (options of the same names serve all entries that leave them out):

    tasks:
      - {name: nq-20, eval_file: nq.jsonl, corpus_file: nq_corpus.jsonl, split: in-domain, pool: 20}

Several processes share the questions. After a crash the same command (with as many processes) goes on; a corpus is embedded once, and kept in `--index_cache`.
"""

from pathlib import Path

from shared.cli import clear_errors, parse, table

import torch

from modeling_cosup import CoSupConfig, CoSupForCausalLM
from trainer.card import add_results, evaluation_groups
from trainer.judging.figures import MODES, QUERY, SCOPES, figure, line
from trainer.judging.judge import command_line, evaluate_tasks
from trainer.judging.tasks import read_tasks, task_name
from trainer.reports.evaluation import write_report

from shared.arguments import TASK_OPTIONS, EvaluationArguments
from shared.indexes import check_index_options
from shared.processes import end_processes, processes


def main():
    """Load, judge, write the report, print the figures."""
    (args,) = parse([EvaluationArguments], __doc__)
    if args.num_threads:
        torch.set_num_threads(args.num_threads)
    with clear_errors():
        tasks = list_tasks(args)
        if args.update_card and not Path(args.model, "config.json").is_file():
            raise ValueError(f"--update_card writes into the folder of a whole checkpoint, and {args.model} is none.")
        state = processes()
        Path(args.output_dir).mkdir(parents=True, exist_ok=True)
        model = load_model(args, tasks).to(state.device)
        entail = load_judge(args, state) if args.nli_model else None
        facts = {"command": command_line(), "nli_model": args.nli_model}
        modes = ["off" if mode is False else mode for mode in args.modes]  # YAML reads `off` so
        results = evaluate_tasks(
            model,
            tasks,
            args.output_dir,
            modes,
            entail,
            args.index_cache,
            args.batch_size,
            args.seed,
            facts,
            args.gr_hypothesis,
        )
        if state.is_main_process:
            write_report(args.output_dir, args.num_examples)
            if args.update_card and not add_results(args.model, evaluation_groups(results)):
                print(
                    f"{args.model}/README.md is not a card of this package's making and stays as it is; push_to_hub makes one with the figures."
                )
            print_figures(results, args.output_dir)
    end_processes()


def list_tasks(args):
    """The tasks of the config, or the one of the command line: `list[Task]`."""
    if (args.tasks is None) == (args.eval_file is None):
        raise ValueError("give either --eval_file, for one task, or a config that lists tasks.")
    check_index_options(args.index, args.index_uri)
    entries = (
        args.tasks if args.tasks is not None else [{"name": task_name(args.eval_file), "eval_file": args.eval_file}]
    )
    return read_tasks(entries, **{name: getattr(args, name) for name in TASK_OPTIONS})


def load_model(args, tasks):
    """The checkpoint; without Emb_seq where nothing is to be embedded."""
    embeds = (
        any(task.index is None and task.corpus_file for task in tasks)
        or CoSupConfig.from_pretrained(args.model).query_from != "gen"
    )
    return CoSupForCausalLM.from_pretrained(args.model, dtype=args.dtype, load_emb_seq=embeds)


def load_judge(args, state):
    """The NLI judge of this process; what it has answered stays in the results folder."""
    from trainer.judging.nli import NLIJudge

    options = {
        "batch_size": args.nli_batch_size,
        "cache_file": Path(args.output_dir) / "nli.jsonl",
        "show_progress_bar": state.is_main_process,
    }
    return NLIJudge.from_pretrained(args.nli_model, state.device, **options)


def print_figures(results, output_dir):
    """The figures of each task, and where everything is."""
    for name, task in results["tasks"].items():
        sections = {MODES[mode]: answers["metrics"] for mode, answers in task["modes"].items()}
        if not sections:
            sections = {f"{MODES[QUERY]} {SCOPES[scope]}": figures for scope, figures in task["query"].items()}
        for title, figures in sections.items():
            asked = max((measured["n"] for measured in figures.values()), default=0)
            print(f"\n{name}, {title}: {asked} questions (95 % intervals in brackets)\n")
            print(table([(figure(metric).label, line(measured, metric)) for metric, measured in figures.items()]))
    report, metrics = Path(output_dir) / "report.html", Path(output_dir) / "metrics.json"
    print(f"\nReport: {report}   Figures: {metrics}   {results['seconds']:,.0f} s")


if __name__ == "__main__":
    main()
