"""
Evaluate a checkpoint on one evaluation set, or on all that a config lists, and write a results folder with a report.

    accelerate launch recipes/run_evaluation.py --model out --output_dir results \\
        --corpus_file corpus.jsonl --eval_file eval.jsonl
    accelerate launch recipes/run_evaluation.py --model out --output_dir results \\
        --config tasks.yaml --modes retrieval gold off wrong
    accelerate launch recipes/run_evaluation.py --model out --output_dir results \\
        --index wiki --index_uri http://host:19530 --eval_file eval.jsonl
    accelerate launch recipes/run_evaluation.py --model out --output_dir results --index out/index \\
        --eval_file eval.jsonl --memory out/memory --memory_weight 0.25

A config may hold any option, and `tasks`, a list of entries as below. An option that is also a field of an entry
applies to all entries that leave the field out. An entry with a `corpus_file` gets no `index`, or the other way round.

    tasks:
      - {name: nq-20, eval_file: nq.jsonl, corpus_file: nq_corpus.jsonl, split: in-domain, pool: 20}

Several processes share the questions. After a crash, the same command with the same number of processes resumes the
run. A corpus is embedded once and kept in `--index_cache`.
"""

from pathlib import Path

from shared.cli import check_options, check_place, clear_errors, parse, table

from shared.arguments import TASK_OPTIONS, EvaluationArguments
from shared.memory_options import MemoryOptions, open_memory

if __name__ == "__main__":  # --help and a wrong option do not wait for the imports below
    check_options([EvaluationArguments, MemoryOptions], __doc__)

from accelerate import PartialState

from modeling_cosup import CoSupConfig, CoSupForCausalLM
from trainer.card import add_results, evaluation_groups
from trainer.judging.figures import MODES, QUERY, SCOPES, figure, figure_line
from trainer.judging.grounding import Judge
from trainer.judging.judge import command_line, evaluate_tasks
from trainer.judging.tasks import Task, read_tasks, task_name
from trainer.reports.evaluation import write_report

from shared.indexes import check_index_options, faiss_options
from shared.processes import end_processes, processes, set_cpu_threads
from shared.progress_bars import progress_bars


def main() -> None:
    """Evaluate the model, write the report and print the figures."""
    args, memory_options = parse([EvaluationArguments, MemoryOptions], __doc__)
    with clear_errors(), progress_bars(hidden=args.disable_tqdm):
        set_cpu_threads(args.num_threads)
        tasks = list_tasks(args)
        if args.update_card and not Path(args.model, "config.json").is_file():
            raise ValueError(f"--update_card writes into the folder of a checkpoint, and {args.model} is not one.")
        state = processes()
        Path(args.output_dir).mkdir(parents=True, exist_ok=True)
        model = load_model(args, tasks).to(state.device)
        entail = load_judge(args, state) if args.nli_model else None
        facts = {"command": command_line(), "nli_model": args.nli_model, "memory": memory_options.memory}
        modes = ["off" if mode is False else mode for mode in args.modes]  # YAML reads `off` as False
        results = evaluate_tasks(
            model,
            tasks,
            args.output_dir,
            modes,
            entail=entail,
            index_cache=args.index_cache,
            batch_size=args.batch_size,
            seed=args.seed,
            facts=facts,
            gr_hypothesis=args.gr_hypothesis,
            **open_memory(model, memory_options, **faiss_options(args)),
        )
        if state.is_main_process:
            write_report(args.output_dir, args.num_examples)
            if args.update_card:
                update_card(args.model, results)
            print_figures(results, args.output_dir)
    end_processes()


def list_tasks(args: EvaluationArguments) -> list[Task]:
    """Return the tasks of the config, or the single task of the command line."""
    if (args.tasks is None) == (args.eval_file is None):
        raise ValueError("give either --eval_file, for one task, or a config that lists tasks.")
    check_index_options(args.index, args.index_uri)
    entries = args.tasks
    if entries is None:
        entries = [{"name": task_name(args.eval_file), "eval_file": args.eval_file}]
    tasks = read_tasks(entries, **{name: getattr(args, name) for name in TASK_OPTIONS})
    for task in tasks:
        check_index_options(task.index, task.index_uri)
        for name in ("eval_file", "corpus_file"):
            if getattr(task, name):
                check_place(f"task {task.name}: {name} {getattr(task, name)}", getattr(task, name))
    return tasks


def load_model(args: EvaluationArguments, tasks: list[Task]) -> CoSupForCausalLM:
    """Load the checkpoint, without Emb_seq if neither passages nor queries need it."""
    embeds_passages = any(task.index is None and task.corpus_file for task in tasks)
    embeds = embeds_passages or CoSupConfig.from_pretrained(args.model).query_from != "gen"
    return CoSupForCausalLM.from_pretrained(args.model, dtype=args.dtype, load_emb_seq=embeds)


def load_judge(args: EvaluationArguments, state: PartialState) -> Judge:
    """Load the NLI judge of this process. It keeps its answers in the results folder."""
    from trainer.judging.nli import NLIJudge

    options = {
        "batch_size": args.nli_batch_size,
        "cache_file": Path(args.output_dir) / "nli.jsonl",
        "show_progress_bar": state.is_main_process,
    }
    return NLIJudge.from_pretrained(args.nli_model, state.device, **options)


def update_card(model: str, results: dict) -> None:
    """Add the figures to the checkpoint's card, or say why they are not added."""
    if not add_results(model, evaluation_groups(results)):
        print(
            f"{model}/README.md is not a card that this package wrote and remains unchanged; push_to_hub makes one "
            "with the figures."
        )


def print_figures(results: dict, output_dir: str) -> None:
    """Print the figures of each task, and where the report and all figures are."""
    for name, task in results["tasks"].items():
        sections = {MODES[mode]: answers["metrics"] for mode, answers in task["modes"].items()}
        if not sections:
            sections = {f"{MODES[QUERY]} {SCOPES[scope]}": figures for scope, figures in task["query"].items()}
        for title, figures in sections.items():
            num_questions = max((measured["n"] for measured in figures.values()), default=0)
            print(f"\n{name}, {title}: {num_questions} questions (95 % intervals in brackets)\n")
            rows = [(figure(metric).label, figure_line(measured, metric)) for metric, measured in figures.items()]
            print(table(rows) if rows else "  no figure applies; the report says why")
    report = Path(output_dir) / "report.html"
    metrics = Path(output_dir) / "metrics.json"
    print(f"\nReport: {report}   Figures: {metrics}   {results['seconds']:,.0f} s")


if __name__ == "__main__":
    main()
