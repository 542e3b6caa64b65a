"""
Run one of the paper's experiments: train and evaluate what is missing, then write the report with tables and plots.

    python recipes/run_experiments.py --experiment recipes/experiments/main_table.yaml --output_dir runs/main
    python recipes/run_experiments.py --experiment recipes/experiments/main_table.yaml --output_dir runs/real \\
        --override world=null config=recipes/configs/smollm2_135m.yaml gen=HuggingFaceTB/SmolLM2-135M \\
        train_file=DATA/train.jsonl.gz data=DATA tasks=recipes/experiments/tasks/folder.yaml

recipes/train.py trains every arm with every seed, and recipes/run_evaluation.py evaluates the model, each in a process
with a log. A training is identified by a hash of its options and of the content of its data. No training runs twice,
even if several experiments need it. After a crash, it resumes from its last checkpoint. If an arm fails, the others
still run, the report says why it failed, and the next call tries it again.

    OUTPUT_DIR/report.html, report.md, plots/, experiment.json     the report and its numbers
    CACHE_DIR/worlds, models/<hash>, evaluations/<hash>, indexes   shared by experiments (default: OUTPUT_DIR)
"""

import json
import shlex
import shutil
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from shared.cli import check_options, clear_errors, parse

from shared.arguments import TASK_OPTIONS, RunnerArguments

if __name__ == "__main__":  # --help and a wrong option do not wait for the imports below
    check_options([RunnerArguments], __doc__)

import yaml

from modeling_cosup.files_cosup import digest, read_json, write_json
from trainer.judging.results import write_results
from trainer.reports.experiment import write_experiment_report
from trainer.reports.experiment_figures import Results
from trainer.watch import last_complete_checkpoint

from experiments.definition import (
    NOT_OPTIONS,
    WORLD_FILES,
    Experiment,
    fill,
    load_experiment,
    parse_seeds,
    retrieves_candidates,
)
from experiments.keys import code_digest, evaluation_key, launch_settings, scoring, training_key
from experiments.launching import Failed, Run, hardware, launch, locked_folder, say, training_facts
from experiments.task_files import Entry, cut_corpora, cut_to_pools, digest_of_content, expand_tasks
from shared.model_options import MODEL_OPTIONS
from shared.progress_bars import progress_bars
from shared.quickstart import (
    EncoderArguments,
    TaskArguments,
    WorldArguments,
    prepare_encoders,
    prepare_tasks,
    prepare_world,
)


def main() -> None:
    """Plan, run and report. Exit with code 1 if an arm failed."""
    (args,) = parse([RunnerArguments], __doc__)
    with clear_errors():
        experiment = load_experiment(args.experiment, args.override)
        planned_seeds = seeds_of_file(args.experiment, args.override)
        if args.seeds:
            experiment.seeds = parse_seeds(args.seeds)
        if unknown := sorted(set(args.only or []) - set(experiment.arms)):
            raise ValueError(f"--only {unknown[0]}: the experiment has the arms {', '.join(experiment.arms)}.")
        cache = Path(args.cache_dir or args.output_dir)
        if args.dry_run:
            show_plan(experiment, cache, launch_settings(args.accelerate_config))
            return
        Path(args.output_dir).mkdir(parents=True, exist_ok=True)
        notes: list[str] = []
        runs: list[Run] = []
        with progress_bars(hidden=bool(experiment.base.get("disable_tqdm"))):
            for seed in experiment.seeds:
                runs += plan_seed(experiment, seed, cache, notes, launch_settings(args.accelerate_config))
    for run in runs:
        if args.only and run.arm not in args.only:
            continue
        if run.failure:  # as the start of another arm
            continue
        try:
            train(run, args.accelerate_config)
            evaluate(run, experiment, cache, args.accelerate_config)
        except Failed as failure:
            fail(run, failure)
    with clear_errors():
        report(experiment, runs, notes, args.output_dir, planned_seeds)
    sys.exit(1 if any(run.failure for run in runs) else 0)


# ---------------------------------------------------------------------- planning


def seeds_of_file(path: str, overrides: list[str]) -> list[int]:
    """Return the seeds that an experiment file plans; other overrides may be needed to load it."""
    return load_experiment(path, [override for override in overrides if not override.startswith("seeds=")]).seeds


def plan_seed(
    experiment: Experiment, seed: int, cache: Path, notes: list[str], launched: dict[str, Any] | None = None
) -> list[Run]:
    """
    Make the world of a seed, if the experiment has one, and return the runs of the seed.

    Args:
        experiment (`Experiment`): the experiment.
        seed (`int`): the seed.
        cache (`Path`): the folder that experiments share.
        notes (`list[str]`): receives notes on what is left out.
        launched (`dict`, *optional*): from [`launch_settings`].
    """
    options = {arm: experiment.options(arm) for arm in experiment.arms}
    folders = {"data": experiment.data} if experiment.data else {}
    world: dict[str, str] = {}
    tasks = experiment.tasks
    if experiment.world:
        needs_models = "{models}" in json.dumps(options)
        world_folders, world, tasks = make_world(experiment, seed, cache, needs_models)
        folders |= world_folders
    entries, meaning = expand_tasks(experiment, fill(tasks, folders))
    if experiment.corpus_sizes:
        max_questions = experiment.evaluation.get("max_eval_samples")
        entries, left_out = cut_corpora(entries, meaning, cache / "corpora", max_questions)
        notes += [note for note in left_out if note not in notes]
    if experiment.pools_only:
        defaults = {name: experiment.evaluation[name] for name in TASK_OPTIONS if name in experiment.evaluation}
        entries = cut_to_pools(entries, cache / "corpora", defaults)
    runs: dict[str, Run] = {}
    for arm in experiment.training_order():
        arm_options = complete(fill(options[arm], folders), seed, world)
        start = runs.get(experiment.starting_arm(arm) or "")
        folder = cache / "models" / training_key(arm_options, start and start.folder.name, launched)
        evaluation = cache / "evaluations" / evaluation_key(folder.name, entries, experiment.evaluation)
        runs[arm] = Run(arm, seed, arm_options, folder, evaluation, entries, meaning, start)
    return [runs[arm] for arm in experiment.arms]


def world_folder(experiment: Experiment, seed: int, cache: Path) -> Path:
    """Return the folder of the world of a seed: worlds with other options have other folders."""
    options = [experiment.world_options, experiment.task_options, experiment.model_options]
    name = f"seed-{seed}-{digest(options)[:8]}" if any(options) else f"seed-{seed}"
    return cache / "worlds" / name


def make_world(
    experiment: Experiment, seed: int, cache: Path, needs_models: bool
) -> tuple[dict[str, str], dict[str, str], list[Entry]]:
    """
    Make the world of a seed, or reuse it.

    Args:
        experiment (`Experiment`): the experiment.
        seed (`int`): the seed.
        cache (`Path`): the folder that experiments share.
        needs_models (`bool`): whether to make the models of the folder `{models}` as well.

    Returns:
        `tuple[dict, dict, list]`: placeholder (`world`, `models`) -> folder, option of train.py -> file or folder, and
        the tasks of the experiment, or those of the world if the experiment lists none.
    """
    parent = world_folder(experiment, seed, cache)
    folders = {"world": str(parent / "world")}
    with locked_folder(parent):
        paths = prepare_world(WorldArguments(folders["world"], seed=seed, **experiment.world_options))
        tasks = experiment.tasks
        if tasks is None:
            task_args = TaskArguments(folders["world"], str(parent / "tasks"), seed=seed, **experiment.task_options)
            tasks = [{"name": name, **task} for name, task in prepare_tasks(task_args).items()]
        if needs_models:
            folders["models"] = str(parent / "models")
            encoder_args = EncoderArguments(folders["world"], folders["models"], seed=seed, **experiment.model_options)
            prepare_encoders(encoder_args)
    files = {name: paths[name.removesuffix("_file")] for name in WORLD_FILES}
    return folders, files, tasks


def complete(options: dict[str, Any], seed: int, world: dict[str, str]) -> dict[str, Any]:
    """
    Return the options of an arm with its seed, and with the files of the world that the arm does not replace.

    Raises:
        `ValueError`: if there are no training data or no Gen.
    """
    corpus_file = options.get("corpus_file")
    left_out = set(NOT_OPTIONS)
    if "{arm:" in str(options.get("model_name_or_path")):
        left_out.update(MODEL_OPTIONS)  # of base: the other arm has built the model
    options = {name: value for name, value in options.items() if name not in left_out}
    from_world: set[str] = set()
    if not _has_gen(options):
        from_world.add("gen")
        if not options.get("tie_emb_seq"):
            from_world.add("emb_seq")
    if options.get("train_file") is None:
        from_world |= {"train_file", "validation_file"}
    if retrieves_candidates(options):
        options["corpus_file"] = corpus_file
        from_world.add("corpus_file")
    for name, path in world.items():
        if name in from_world and options.get(name) is None:
            options[name] = path
    if not options.get("train_file") or not _has_gen(options):
        raise ValueError("Nothing to train: set train_file and gen, or world: quickstart.")
    if options.get("corpus_file", "") is None:
        raise ValueError("Nothing to retrieve candidates from: set corpus_file, or world: quickstart.")
    if options.get("max_steps") == 0:  # which transformers takes for unset
        options |= {"max_steps": -1, "num_train_epochs": 0}
    if options.get("validation_file") is None:
        options.pop("validation_file", None)
        options["eval_strategy"] = "no"  # a config may set another one, but there is nothing to evaluate on
    for name, value in options.items():
        if name.endswith("_strategy") and value is False:  # YAML reads a plain `no` as False
            options[name] = "no"
    return {**options, "seed": seed}


def _has_gen(options: dict[str, Any]) -> bool:
    return bool(options.get("gen") or options.get("model_name_or_path"))


def show_plan(experiment: Experiment, cache: Path, launched: dict[str, Any] | None = None) -> None:
    """Print arms, options and tasks, and the state of each training."""
    print(f"{experiment.title}: {len(experiment.arms)} arms x {len(experiment.seeds)} seeds, in {cache}")
    arms = {"all arms": shared_options(experiment), "arms": experiment.arms, "seeds": experiment.seeds}
    print(yaml.safe_dump(arms, sort_keys=False, allow_unicode=True), end="")
    if experiment.tasks is None:
        print("tasks: those of the quickstart world")
    else:
        entries, _ = expand_tasks(experiment, experiment.tasks)
        print(yaml.safe_dump({"tasks": entries}, sort_keys=False, allow_unicode=True), end="")
    settings = {name: getattr(experiment, name) for name in ("pools", "corpus_sizes", "evaluation", "comparisons")}
    print(yaml.safe_dump(settings, sort_keys=False, allow_unicode=True), end="")
    print("trainings:")
    for seed in experiment.seeds:
        keys: dict[str, str] = {}
        for arm in experiment.training_order():
            start_key = keys.get(experiment.starting_arm(arm) or "")
            keys[arm] = training_key(planned_options(experiment, arm, seed, cache), start_key, launched)
        for arm in experiment.arms:
            folder = cache / "models" / keys[arm]
            print(f"  {arm}, seed {seed}: {training_state(folder)}")


def shared_options(experiment: Experiment) -> dict[str, Any]:
    """Return the options that all arms share."""
    arms = [experiment.options(arm) for arm in experiment.arms]
    shared = {}
    for name, value in arms[0].items():
        if name not in NOT_OPTIONS and all(options.get(name) == value for options in arms):
            shared[name] = value
    return shared


def training_state(folder: Path) -> str:
    """Return `"done"` or `"begun"` with the folder of the training, or `"to do"`."""
    if (folder / "trained.json").exists():
        return f"done, {folder}"
    if folder.exists():
        return f"begun, {folder}"
    return "to do"


def planned_options(experiment: Experiment, arm: str, seed: int, cache: Path) -> dict[str, Any]:
    """Return the options with which `plan_seed` would train an arm, without making the world."""
    parent = world_folder(experiment, seed, cache)
    folders = {"world": str(parent / "world"), "models": str(parent / "models")}
    if experiment.data:
        folders["data"] = experiment.data
    world = {}
    if experiment.world:
        world = {name: str(parent / "world" / file) for name, file in WORLD_FILES.items()}
    return complete(fill(experiment.options(arm), folders), seed, world)


# ---------------------------------------------------------------------- running


def train(run: Run, accelerate_config: str) -> None:
    """
    Train the model of a run, unless it is trained already; before it, the model that it starts from.

    Writes `options.yaml`, `train.log`, `model/` and, last of all, `trained.json` into `run.folder`.
    """
    done = run.folder / "trained.json"
    config = run.folder / "options.yaml"
    model = run.folder / "model"
    options = run.options
    if run.start is not None and not done.exists():
        train_start(run.start, run.arm, accelerate_config)
        options = {**options, "model_name_or_path": str(run.start.model)}
    run.folder.mkdir(parents=True, exist_ok=True)
    with locked_folder(run.folder) as lock:
        if done.exists():
            say(run, f"trained already: {run.folder}")
            return
        launched = launch_settings(accelerate_config)
        check_key(run.folder, training_key(run.options, run.start and run.start.folder.name, launched))
        config.write_text(yaml.safe_dump(options, sort_keys=False, allow_unicode=True), encoding="utf-8")
        arguments = ["--config", str(config), "--output_dir", str(model)]
        resumed = has_complete_checkpoint(model)
        if resumed:
            arguments += ["--resume_from_checkpoint", "true"]
        command, seconds = launch("train.py", arguments, run, run.folder / "train.log", accelerate_config, lock)
        for checkpoint in model.glob("checkpoint-*"):
            shutil.rmtree(checkpoint)
        check_key(run.folder, training_key(run.options, run.start and run.start.folder.name, launched))
        facts = {
            "command": command,
            "seconds": seconds,
            "resumed": resumed,
            "hardware": hardware(run.options),
            "processes": launched.get("num_processes", 1),
            "code": code_digest(),
        }
        write_results(done, {**facts, **training_facts(model)})  # a loss may be NaN


def check_key(folder: Path, key: str) -> None:
    """
    Check that what a folder is named after has not changed since the experiment was planned.

    Raises:
        `Failed`: a file or model was changed meanwhile.
    """
    if folder.name != key:
        raise Failed(f"the data or a model of {folder} changed while the experiment ran: start it again")


def train_start(start: Run, arm: str, accelerate_config: str) -> None:
    """
    Train the model that another arm starts from, unless it is trained already.

    Raises:
        `Failed`: if this training fails, or has failed before.
    """
    if (start.folder / "trained.json").exists():
        return
    if not start.failure:
        try:
            train(start, accelerate_config)
        except Failed as failure:
            fail(start, failure)
    if start.failure:
        raise Failed(f"{arm} starts from {start.arm}, which failed: {start.failure}")


def fail(run: Run, failure: Failed) -> None:
    """Note why a run failed, and say it."""
    run.failure = str(failure)
    say(run, f"FAILED: {failure}")


def has_complete_checkpoint(model: Path) -> bool:
    """Return whether there is a checkpoint from which a training can resume."""
    try:
        last_complete_checkpoint(model)
    except ValueError:
        return False
    return True


def evaluate(run: Run, experiment: Experiment, cache: Path, accelerate_config: str) -> None:
    """
    Evaluate the model of a run, unless it is evaluated already.

    Writes `tasks.yaml`, `evaluation.log`, `results/` and, last of all, `evaluated.json` into `run.evaluation`.
    """
    done = run.evaluation / "evaluated.json"
    config = run.evaluation / "tasks.yaml"
    run.evaluation.mkdir(parents=True, exist_ok=True)
    with locked_folder(run.evaluation) as lock:
        judged_by = scoring(experiment.evaluation, run.entries)
        if done.exists() and read_json(done).get("scoring", {}) == judged_by:
            say(run, f"evaluated already: {run.evaluation}")
            return
        check_key(run.evaluation, evaluation_key(run.folder.name, run.entries, experiment.evaluation))
        options = {"disable_tqdm": run.options.get("disable_tqdm", False), **experiment.evaluation}
        options |= {"modes": experiment.modes, "tasks": run.entries}
        config.write_text(yaml.safe_dump(options, sort_keys=False, allow_unicode=True), encoding="utf-8")
        arguments = ["--config", str(config), "--model", str(run.model)]
        arguments += ["--output_dir", str(run.evaluation / "results"), "--index_cache", str(cache / "indexes")]
        # The answers of an earlier evaluation are reused, so its time counts too.
        seconds_before = read_json(done)["seconds"] if done.exists() else 0
        done.unlink(missing_ok=True)  # until the evaluation ends, the scores may come from two judges
        log = run.evaluation / "evaluation.log"
        command, seconds = launch("run_evaluation.py", arguments, run, log, accelerate_config, lock)
        check_key(run.evaluation, evaluation_key(run.folder.name, run.entries, experiment.evaluation))
        facts = {"command": command, "seconds": seconds + seconds_before, "scoring": judged_by}
        facts["questions"] = {entry["name"]: digest_of_content(entry["eval_file"]) for entry in run.entries}
        write_json(done, {**facts, "code": code_digest()})


# ---------------------------------------------------------------------- reporting


def report(
    experiment: Experiment, runs: list[Run], notes: list[str], output_dir: str, planned_seeds: list[int]
) -> None:
    """Write experiment.json and the report. The report covers all runs that are done, of the seeds of `--seeds`."""
    rows = []
    for run in runs:
        row = run_facts(run)
        evaluated = row["evaluated"]
        if evaluated and evaluated.get("scoring", {}) != scoring(experiment.evaluation, run.entries):
            row["evaluated"] = None
            notes.append(f"{run.name}: its answers were judged in another way, and not yet in this one")
        rows.append(row)
    for stage in ("trained", "evaluated"):
        versions = {row[stage].get("code") for row in rows if row[stage]}
        if len(versions) > 1:
            notes.append(f"not all models were {stage} by the same version of this package")
    command = shlex.join(["python", "recipes/run_experiments.py", *sys.argv[1:]])
    fields = {**asdict(experiment), "evaluation": {**experiment.evaluation, "modes": experiment.modes}}
    fields["planned_seeds"] = planned_seeds
    results = Results(fields, rows, runs[0].meaning, notes, command)
    write_experiment_report(results, output_dir)
    print(f"\nReport: {Path(output_dir) / 'report.html'}   Numbers: {Path(output_dir) / 'experiment.json'}")


def run_facts(run: Run) -> dict[str, Any]:
    """Return the facts of a run, in the form in which [`~trainer.reports.experiment_figures.Results`] reads them."""
    trained = run.folder / "trained.json"
    evaluated = run.evaluation / "evaluated.json"
    questions = {entry["name"]: digest_of_content(entry["eval_file"]) for entry in run.entries}
    if evaluated.exists():
        questions = read_json(evaluated).get("questions", questions)  # those that were asked
    return {
        "arm": run.arm,
        "seed": run.seed,
        "options": run.options,
        "folder": str(run.folder),
        "evaluation": str(run.evaluation),
        "failure": run.failure,
        "questions": questions,
        "trained": read_json(trained) if trained.exists() else None,
        "evaluated": read_json(evaluated) if evaluated.exists() else None,
    }


if __name__ == "__main__":
    main()
