"""
Run an experiment with token memories: Macondo, or the softmax bottleneck (arXiv 2311.09615).

    python recipes/run_memory_experiments.py --experiment recipes/experiments/macondo.yaml --output_dir runs/macondo
    python recipes/run_memory_experiments.py --experiment recipes/experiments/softmax_bottleneck.yaml \\
        --output_dir runs/softmax_bottleneck --cache_dir runs/macondo

For each arm and seed: make the data, train a Gen on its sentences, build a kNN memory and train an MLP memory on the
same sentences, fit both on validation sentences, and score the test sentences. recipes/experiments/macondo.yaml needs
minutes on a CPU. recipes/experiments/macondo_paper.yaml has the sizes of the paper, for a GPU. To use another
checkpoint, give its name or path as `gen` of an arm.

Every stage is a folder of the cache, named by a hash of its options. No stage runs twice, even if several experiments
need it. If an arm fails, the others still run, the report says why it failed, and the next call tries it again.

    OUTPUT_DIR/report.html, report.md, plots/, results.json    the report and its numbers
    CACHE_DIR/data, gens, memories, analyses                   shared by experiments (default: OUTPUT_DIR)
"""

import os
import shlex
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from shared.cli import check_options, clear_errors, parse

from shared.memory_arguments import MemoryRunnerArguments

if __name__ == "__main__":  # --help and a wrong option do not wait for the imports below
    check_options([MemoryRunnerArguments], __doc__)

from modeling_cosup import MemoryConfig
from modeling_cosup.files_cosup import digest
from trainer.reports.memories import write_memory_report

from experiments.bottleneck_scores import run_hurdle, score_projections
from experiments.definition import parse_seeds
from experiments.launching import hardware
from experiments.macondo_scores import read_children, score
from experiments.memory_definition import MemoryExperiment, load_memory_experiment
from experiments.memory_stages import prepare, stage
from shared.processes import set_cpu_threads


def main() -> None:
    """Run all arms with all seeds and write the report. Exit with code 1 if one failed."""
    (args,) = parse([MemoryRunnerArguments], __doc__)
    with clear_errors():
        experiment = load_memory_experiment(args.experiment)
        if args.seeds:
            experiment.seeds = parse_seeds(args.seeds)
        if unknown := sorted(set(args.only or []) - set(experiment.arms)):
            raise ValueError(f"--only {unknown[0]}: the experiment has the arms {', '.join(experiment.arms)}.")
        set_cpu_threads(args.num_threads)
    cache = Path(args.cache_dir or args.output_dir)
    runs: list[dict[str, Any]] = []
    command = shlex.join(["python", os.path.relpath(sys.argv[0]), *sys.argv[1:]])
    for arm in args.only or experiment.arms:
        for seed in experiment.seeds:
            runs.append(run_arm(experiment, arm, seed, cache))
            # after each arm, so that what is done can be read while the next one runs
            machine = hardware({"num_threads": args.num_threads})
            write_memory_report(asdict(experiment), runs, command, machine, args.output_dir)
    sys.exit(1 if any(run["failure"] for run in runs) else 0)


def run_arm(experiment: MemoryExperiment, arm: str, seed: int, cache: Path) -> dict[str, Any]:
    """
    Run an arm with a seed.

    Returns:
        `dict`: what [`~trainer.reports.memories.write_memory_report`] takes.
    """
    run: dict[str, Any] = {"arm": arm, "seed": seed, "failure": None}
    name = f"{arm}, seed {seed}"
    try:
        prepared = prepare(experiment, arm, seed, cache)
        run["facts"] = prepared.facts
        fit = experiment.section(arm, "fit")

        def score_children(folder: Path) -> dict[str, Any]:
            return score(prepared, fit)

        children = stage(cache / "analyses" / digest([prepared.key, fit])[:12], score_children, f"{name}: children")
        if not experiment.projection and not experiment.hurdle:
            run["children"] = children
        if experiment.projection:
            configs = {}
            for line, config in children["configs"].items():
                if "kNN" in line:
                    configs[line] = MemoryConfig.from_dict(config)

            def solve(folder: Path) -> dict[str, Any]:
                test = read_children(prepared.data / "test.jsonl", prepared.gen, prepared.tokenizer)
                return score_projections(prepared, test, configs, experiment.projection, seed)

            key = digest([prepared.key, fit, experiment.projection])[:12]
            run["projections"] = stage(cache / "analyses" / key, solve, f"{name}: projections")
        if experiment.hurdle:

            def memorise(folder: Path) -> dict[str, Any]:
                gen = experiment.arms[arm]["gen"]
                return run_hurdle(gen, prepared.data, prepared.tokenizer, experiment.hurdle, seed, folder)

            key = digest([prepared.key, experiment.hurdle])[:12]
            run["hurdle"] = stage(cache / "analyses" / key, memorise, f"{name}: hurdle")
    except (ValueError, RuntimeError, OSError) as error:
        run["failure"] = f"{type(error).__name__}: {error}"
        print(f"[{name}] FAILED: {run['failure']}", flush=True)
    return run


if __name__ == "__main__":
    main()
