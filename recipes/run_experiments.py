"""
Run one of the paper's experiments: train what is missing, evaluate what is missing, draw the tables and figures.

    python recipes/run_experiments.py --experiment recipes/experiments/main_table.yaml --output_dir runs/main
    python recipes/run_experiments.py --experiment recipes/experiments/main_table.yaml --output_dir runs/real \\
        --override config=recipes/configs/smollm2_135m.yaml gen=HuggingFaceTB/SmolLM2-135M train_file=DATA/train.jsonl.gz \\
        data=DATA tasks=recipes/experiments/tasks/folder.yaml

Every arm and seed is trained by recipes/train.py and judged by recipes/run_evaluation.py, each in a process of its own whose log is kept. A training is
known by a hash of its options and of the content of its data: it is not done twice, whatever experiment asks for it, and goes on after a crash from its
last checkpoint. An arm that fails does not stop the others; the report says why, and the next call tries it again.

    OUTPUT_DIR/report.html, report.md, plots/, experiment.json     the report and its numbers
    CACHE_DIR/worlds, models/<hash>, evaluations/<hash>, indexes   what several experiments can share (default: OUTPUT_DIR)
"""

import contextlib
import json
import re
import shlex
import shutil
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path

from shared.cli import clear_errors, parse

import yaml

from modeling_cosup.files_cosup import read_json, write_json
from trainer.reports.experiment import write_experiment_report
from trainer.reports.experiment_figures import Results
from trainer.watch import last_complete_checkpoint

from experiments.definition import NOT_OPTIONS, ROOT, WORLD_FILES, evaluation_key, key_of, load_experiment, scoring
from experiments.launching import Failed, hardware, launch, locked_folder, say, training_facts
from experiments.task_files import cut_corpora, cut_to_pools, digest_of_content, expand_tasks
from shared.arguments import TASK_OPTIONS
from shared.quickstart import (
    EncoderArguments,
    TaskArguments,
    WorldArguments,
    prepare_encoders,
    prepare_tasks,
    prepare_world,
)


@dataclass
class RunnerArguments:
    """Which experiment is run, and where."""

    experiment: str = field(metadata={"help": "YAML file; recipes/experiments holds the paper's."})
    output_dir: str = field(metadata={"help": "Folder of the report."})
    cache_dir: str | None = field(
        default=None, metadata={"help": "Worlds, models, indexes and evaluations, for all experiments that name it."}
    )
    override: list[str] = field(
        default_factory=list,
        metadata={
            "help": "key=value ...: fields of the file, or options of train.py for all arms.",
            "action": "extend",
        },
    )
    seeds: str | None = field(default=None, metadata={"help": "In place of the file's, e.g. 0,1."})
    only: list[str] | None = field(
        default=None, metadata={"help": "Run these arms alone; the report holds whatever is there."}
    )
    dry_run: bool = field(default=False, metadata={"help": "Say what would be run, and do nothing."})
    accelerate_config: str = field(
        default=str(ROOT / "recipes/accelerate_configs/single.yaml"), metadata={"help": "How train.py is launched."}
    )


@dataclass
class Run:
    """One arm with one seed: what is trained, and what came of it."""

    arm: str
    seed: int
    options: dict
    folder: Path | None = None
    evaluation: Path | None = None
    entries: list = field(default_factory=list)
    meaning: dict = field(default_factory=dict)
    commands: list = field(default_factory=list)
    failure: str | None = None

    @property
    def name(self):
        return f"{self.arm}, seed {self.seed}"


def main():
    """Plan, run, report. Ends with 1 when an arm failed."""
    (args,) = parse([RunnerArguments], __doc__)
    with clear_errors():
        experiment = load_experiment(args.experiment, args.override)
        if args.seeds:
            experiment.seeds = [int(seed) for seed in args.seeds.split(",")]
        if unknown := sorted(set(args.only or []) - set(experiment.arms)):
            raise ValueError(f"--only {unknown[0]}: the experiment has the arms {', '.join(experiment.arms)}.")
        cache = Path(args.cache_dir or args.output_dir)
        if args.dry_run:
            return show_plan(experiment, cache)
        Path(args.output_dir).mkdir(parents=True, exist_ok=True)
        notes, runs = [], []
        for seed in experiment.seeds:
            runs += plan_seed(experiment, seed, cache, notes)
    for run in runs:
        if args.only and run.arm not in args.only:
            continue
        try:
            train(run, args)
            evaluate(run, experiment, cache, args)
        except Failed as failure:
            run.failure = str(failure)
            say(run, f"FAILED: {failure}")
    with clear_errors():
        report(experiment, runs, notes, args)
    sys.exit(1 if any(run.failure for run in runs) else 0)


# ---------------------------------------------------------------------- planning


def plan_seed(experiment, seed, cache, notes):
    """The runs of a seed, with the world that they need made: `list[Run]`. What is left out is appended to `notes`."""
    places, world, tasks = {"data": experiment.data or "{data}"}, {}, experiment.tasks
    options = {arm: experiment.options(arm) for arm in experiment.arms}
    if experiment.world:
        world, tasks = make_world(experiment, seed, cache, places, needs_models="{models}" in json.dumps(options))
    entries, meaning = expand_tasks(experiment, fill(tasks, places))
    if experiment.corpus_sizes:
        entries, left_out = cut_corpora(
            entries, meaning, cache / "corpora", experiment.evaluation.get("max_eval_samples")
        )
        notes += [note for note in left_out if note not in notes]
    if experiment.pools_only:
        entries = cut_to_pools(
            entries,
            cache / "corpora",
            {name: experiment.evaluation[name] for name in TASK_OPTIONS if name in experiment.evaluation},
        )
    runs = []
    for arm, own in options.items():
        run = Run(arm, seed, complete(fill(own, places), seed, world), entries=entries, meaning=meaning)
        run.folder = cache / "models" / key_of(run.options)
        run.evaluation = cache / "evaluations" / evaluation_key(run.folder.name, entries, experiment.evaluation)
        runs.append(run)
    return runs


def make_world(experiment, seed, cache, places, needs_models):
    """The world of a seed: files for options that are not given, and tasks unless there are others. `places` gets its folders."""
    folder = cache / "worlds" / f"seed-{seed}"
    with locked_folder(folder):
        places["world"] = str(folder / "world")
        paths = prepare_world(WorldArguments(places["world"], seed=seed, **experiment.world_options))
        tasks = experiment.tasks
        if tasks is None:
            task_args = TaskArguments(places["world"], str(folder / "tasks"), seed=seed, **experiment.task_options)
            tasks = [{"name": name, **task} for name, task in prepare_tasks(task_args).items()]
        if needs_models:
            places["models"] = str(folder / "models")
            prepare_encoders(
                EncoderArguments(places["world"], places["models"], seed=seed, **experiment.model_options)
            )
    return {name: paths[name.removesuffix("_file")] for name in WORLD_FILES}, tasks


def complete(options, seed, world):
    """Options of an arm with seed, and with the files of the world where none are given."""
    options = {name: value for name, value in options.items() if name not in NOT_OPTIONS}
    own_data, own_gen = options.get("train_file") is not None, options.get("gen") or options.get("model_name_or_path")
    for name, path in world.items():
        if options.get(name) is None and not (own_gen if name in ("gen", "emb_seq") else own_data):
            options[name] = path
    if not options.get("train_file") or not (options.get("gen") or options.get("model_name_or_path")):
        raise ValueError("Nothing to train: give train_file and gen, or world: quickstart.")
    if options.get("validation_file") is None:
        options.pop("validation_file", None)
        options["eval_strategy"] = "no"  # a config may ask for it, but there is nothing to evaluate on
    unquoted = {
        name: "no" for name, value in options.items() if name.endswith("_strategy") and value is False
    }  # YAML reads `no` so
    return {**options, **unquoted, "seed": seed}


def fill(value, places):
    """A value with `{data}`, `{world}` and `{models}` replaced in all its texts."""
    if isinstance(value, dict):
        return {key: fill(part, places) for key, part in value.items()}
    if isinstance(value, list):
        return [fill(part, places) for part in value]
    if isinstance(value, str):
        for name in re.findall(r"\{(data|world|models)\}", value):
            if places.get(name, "{data}") == "{data}":
                raise ValueError(
                    f"{value!r} stands for a folder that is not given: {'data=FOLDER' if name == 'data' else 'it needs world: quickstart'}."
                )
            value = value.replace("{" + name + "}", places[name])
    return value


def show_plan(experiment, cache):
    """Print arms, options and tasks, and which trainings are done."""
    print(f"{experiment.title}: {len(experiment.arms)} arms x {len(experiment.seeds)} seeds, in {cache}")
    arms = [experiment.options(arm) for arm in experiment.arms]
    shared = {
        name: value
        for name, value in arms[0].items()
        if name not in NOT_OPTIONS and all(own.get(name) == value for own in arms)
    }
    print(
        yaml.safe_dump(
            {"all arms": shared, "arms": experiment.arms, "seeds": experiment.seeds},
            sort_keys=False,
            allow_unicode=True,
        ),
        end="",
    )
    if experiment.tasks is None:
        print("tasks: those of the quickstart world")
    else:
        print(
            yaml.safe_dump(
                {"tasks": expand_tasks(experiment, experiment.tasks)[0]}, sort_keys=False, allow_unicode=True
            ),
            end="",
        )
    print(
        yaml.safe_dump(
            {"pools": experiment.pools, "corpus_sizes": experiment.corpus_sizes, "evaluation": experiment.evaluation},
            sort_keys=False,
        ),
        end="",
    )
    print("trainings:")
    for seed in experiment.seeds:
        for arm in experiment.arms:
            folder = cache / "models" / key_of(planned_options(experiment, arm, seed, cache))
            state = "done" if (folder / "trained.json").exists() else "begun" if folder.exists() else "to do"
            print(f"  {arm}, seed {seed}: {state}" + ("" if state == "to do" else f", {folder}"))


def planned_options(experiment, arm, seed, cache):
    """What `plan_seed` would train an arm with, without making the world; of a world that is not there yet no training is done."""
    folder = cache / "worlds" / f"seed-{seed}"
    places = {"data": experiment.data or "{data}", "world": str(folder / "world"), "models": str(folder / "models")}
    world = {name: str(folder / "world" / file) for name, file in WORLD_FILES.items()} if experiment.world else {}
    return complete(fill(experiment.options(arm), places), seed, world)


# ---------------------------------------------------------------------- running


def train(run, args):
    """Train, unless it is done: `run.folder` gets `options.yaml`, `train.log`, `model/` and, last of all, `trained.json`."""
    done = run.folder / "trained.json"
    run.folder.mkdir(parents=True, exist_ok=True)
    with locked_folder(run.folder) as lock:
        if done.exists():
            say(run, f"trained already: {run.folder}")
            return
        model, arguments = (
            run.folder / "model",
            ["--config", str(run.folder / "options.yaml"), "--output_dir", str(run.folder / "model")],
        )
        (run.folder / "options.yaml").write_text(yaml.safe_dump(run.options, sort_keys=False))
        with contextlib.suppress(ValueError):
            last_complete_checkpoint(model)  # without one it begins again
            arguments += ["--resume_from_checkpoint", "true"]
        command, seconds = launch("train.py", arguments, run, run.folder / "train.log", args, lock)
        resumed = "--resume_from_checkpoint" in arguments
        for folder in model.glob("checkpoint-*"):
            shutil.rmtree(folder)
        write_json(
            done,
            {
                "command": command,
                "seconds": seconds,
                "resumed": resumed,
                "hardware": hardware(run.options),
                **training_facts(model),
            },
        )


def evaluate(run, experiment, cache, args):
    """Judge the model, unless it is done: `run.evaluation` gets `tasks.yaml`, `evaluation.log` and `results/`, whose `metrics.json` comes last of all."""
    results = run.evaluation / "results"
    run.evaluation.mkdir(parents=True, exist_ok=True)
    with locked_folder(run.evaluation) as lock:
        done, judged_by = run.evaluation / "evaluated.json", scoring(experiment.evaluation, run.entries)
        if done.exists() and read_json(done).get("scoring", {}) == judged_by:
            say(run, f"evaluated already: {run.evaluation}")
            return
        config = {**experiment.evaluation, "modes": experiment.modes, "tasks": run.entries}
        (run.evaluation / "tasks.yaml").write_text(yaml.safe_dump(config, sort_keys=False, allow_unicode=True))
        merged = run.folder / "model" / "merged"
        arguments = [
            "--config",
            str(run.evaluation / "tasks.yaml"),
            "--model",
            str(merged if merged.exists() else run.folder / "model"),
        ]
        arguments += ["--output_dir", str(results), "--index_cache", str(cache / "indexes")]
        before = read_json(done)["seconds"] if done.exists() else 0  # for the answers, which are there
        done.unlink(missing_ok=True)  # from now on there may be scores of two judges
        command, seconds = launch("run_evaluation.py", arguments, run, run.evaluation / "evaluation.log", args, lock)
        write_json(done, {"command": command, "seconds": seconds + before, "scoring": judged_by})


# ---------------------------------------------------------------------- reporting


def report(experiment, runs, notes, args):
    """Write experiment.json and the report of all runs that are there."""
    rows = []
    for run in runs:
        row = {
            "arm": run.arm,
            "seed": run.seed,
            "options": run.options,
            "folder": str(run.folder),
            "evaluation": str(run.evaluation),
            "failure": run.failure,
        }
        row["questions"] = {entry["name"]: digest_of_content(entry["eval_file"]) for entry in run.entries}
        for name, path in (("trained", run.folder / "trained.json"), ("evaluated", run.evaluation / "evaluated.json")):
            row[name] = read_json(path) if path.exists() else None
        if row["evaluated"] and row["evaluated"].get("scoring", {}) != scoring(experiment.evaluation, run.entries):
            row["evaluated"] = None
            notes.append(f"{run.name}: its answers were judged in another way, and not yet in this one")
        rows.append(row)
    command = shlex.join(["python", "recipes/run_experiments.py", *sys.argv[1:]])
    told = {**asdict(experiment), "evaluation": {**experiment.evaluation, "modes": experiment.modes}}
    results = Results(told, rows, runs[0].meaning, notes, command)
    write_experiment_report(results, args.output_dir)
    print(f"\nReport: {Path(args.output_dir) / 'report.html'}   Numbers: {Path(args.output_dir) / 'experiment.json'}")


if __name__ == "__main__":
    main()
