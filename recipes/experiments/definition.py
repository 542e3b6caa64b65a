"""
The definition of an experiment: what its file holds.

    title, about        title of the report, and what the experiment is about
    world               quickstart: use the data and models of recipes/prepare_quickstart*.py, with another world for
                        each seed. Not needed if base sets gen and train_file, and there are tasks. world_options,
                        task_options and model_options hold options of those recipes
    base                options of recipes/train.py that all arms share. `config` names a file of recipes/configs to
                        start from
    arms                name -> options in which the arm differs from base. With model_name_or_path: "{arm:NAME}" it
                        starts from the model of another arm with the same seed. With max_steps: 0 it trains nothing
    baseline            the arm (or, with one arm, the mode) to compare the others with; defaults to the first one
    seeds               seeds of the data order, the weights and the world
    tasks               as in a config of recipes/run_evaluation.py, or the name of a file with such a list; defaults
                        to the tasks of the world. A task may name an `index` (and an `index_uri`: a collection in
                        Milvus) if all arms share its Emb_seq
    pools               full, 20, 100, ...: each task is evaluated with each pool, unless it sets its own `pool` or
                        `pools`
    corpus_sizes        in place of pools: search the full corpus, cut to this many passages. The gold passages are
                        always among them. `full` is the whole corpus
    pools_only          embed only the passages in the pools of the questions, not whole corpora: for large corpora on
                        a slow machine. No task may search the full corpus then
    evaluation          other options of recipes/run_evaluation.py
    comparisons         the comparisons that count, planned before the first run: a list of arm, against and figure,
                        and optionally name, mode, group and setting, see `PlannedComparison`
    axis                the option of train.py on the x axis of the plots; an arm without it is drawn as a level line
    data                a folder, for which `{data}` stands in paths. `{world}` and `{models}` stand for the folders of
                        the seed's world

Arms that retrieve candidates while they train search `corpus_file`, by default the corpus of the world.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml

from trainer import CoSupTrainingArguments
from trainer.distillation_args import DISTILLATIONS

from experiments.comparisons import complete_comparisons
from experiments.task_files import expand_tasks
from shared.arguments import EvaluationArguments, ScriptArguments
from shared.model_options import MODEL_OPTIONS

ROOT = Path(__file__).resolve().parents[2]
NOT_OPTIONS = {  # options of train.py that the runner sets: data, folders and seeds
    "prepare",
    "prepare_options",
    "output_dir",
    "seed",
    "eval_file",
    "corpus_file",
    "index",
    "index_uri",
}
TRAIN_FIELDS = (*fields(ScriptArguments), *fields(CoSupTrainingArguments))
TRAIN_OPTIONS = {option.name for option in TRAIN_FIELDS} - NOT_OPTIONS
TRAIN_DEFAULTS = {option.name: option.default for option in TRAIN_FIELDS}
NOT_EVALUATION_OPTIONS = {  # options of run_evaluation.py that the runner or a task sets
    "model",
    "output_dir",
    "tasks",
    "eval_file",
    "index_cache",
    "corpus_file",
    "index",
    "index_uri",
    "split",
    "pool",
}
EVALUATION_OPTIONS = {option.name for option in fields(EvaluationArguments)} - NOT_EVALUATION_OPTIONS
WORLD_FILES = {  # option of train.py -> file or folder of the world
    "gen": "gen",
    "emb_seq": "emb_seq",
    "train_file": "train.jsonl",
    "validation_file": "validation.jsonl",
    "corpus_file": "corpus.jsonl",
}


@dataclass
class Experiment:
    """The fields of an experiment file, as described at the top of this module."""

    title: str
    arms: dict[str, dict[str, Any]]
    about: str = ""
    world: str | None = None
    world_options: dict[str, Any] = field(default_factory=dict)
    task_options: dict[str, Any] = field(default_factory=dict)
    model_options: dict[str, Any] = field(default_factory=dict)
    base: dict[str, Any] = field(default_factory=dict)
    baseline: str | None = None
    seeds: list[int] = field(default_factory=lambda: [0])
    tasks: list[dict[str, Any]] | None = None  # `load_experiment` replaces the name of a file with its tasks
    pools: list[int | str] = field(default_factory=lambda: ["full"])
    corpus_sizes: list[int | str] | None = None
    pools_only: bool = False
    evaluation: dict[str, Any] = field(default_factory=dict)
    comparisons: list[dict[str, Any]] = field(default_factory=list)  # `load_experiment` sets every field of each
    axis: str | None = None
    data: str | None = None

    def options(self, arm: str) -> dict[str, Any]:
        """Return the options of recipes/train.py for an arm, before the files of the world are filled in."""
        options = {**self.base, **self.arms[arm]}
        config = options.pop("config", None)
        if not config:
            return options
        return {**read_yaml(find(config)), **options}

    def starting_arm(self, arm: str) -> str | None:
        """Return the arm whose model an arm starts from, if any: `model_name_or_path: "{arm:NAME}"`."""
        match = re.fullmatch(r"\{arm:(.+)\}", str(self.options(arm).get("model_name_or_path")))
        return match[1] if match else None

    def training_order(self) -> list[str]:
        """
        Return the arms, each after the one that it starts from.

        Raises:
            `ValueError`: if an arm starts from an unknown one, or from itself.
        """
        order: list[str] = []
        for arm in self.arms:
            path: list[str] = []
            current: str | None = arm
            while current is not None and current not in order:
                if current in path:
                    circle = " -> ".join([*path[path.index(current) :], current])
                    raise ValueError(f"arm {current} starts from its own model: {circle}.")
                path.append(current)
                start = self.starting_arm(current)
                if start is not None and start not in self.arms:
                    arms = ", ".join(self.arms)
                    raise ValueError(f"arm {current} starts from arm {start}, expected one of {arms}.")
                current = start
            order += reversed(path)
        return order

    @property
    def modes(self) -> list[str]:
        """The modes in which questions are answered, see `trainer.judging.answers.retrieval_settings`."""
        modes = self.evaluation.get("modes") or ["retrieval"]
        return ["off" if mode is False else mode for mode in modes]  # YAML reads a plain `off` as False


def load_experiment(path: str | Path, overrides: Sequence[str] = ()) -> Experiment:
    """
    Load an experiment file, apply overrides, and check the result.

    Args:
        path (`str` or `Path`): the YAML file.
        overrides (`Sequence[str]`): `key=value`, with the value as YAML. A key is a field of the file, `base.…`,
            `evaluation.…` or `arms.<name>.…`. Any other key is an option of `base`.

    Returns:
        [`Experiment`].

    Raises:
        `ValueError`: if something is unknown, missing or of the wrong kind. The message names the file and the key.
    """
    values = read_yaml(find(path))
    for override in overrides:
        _apply_override(values, override)
    where = str(path)
    if unknown := sorted(set(values) - _field_names()):
        raise ValueError(f"{where}: unknown field {unknown[0]!r}.")
    for name in ("title", "arms"):
        if not values.get(name):
            raise ValueError(f"{where}: {name} is missing.")
    experiment = Experiment(**{name: value for name, value in values.items() if value is not None})
    _check_kinds(experiment, where)
    _check_options(experiment, where)
    _check_tasks_and_axis(experiment, where)
    _check_baseline(experiment, where)
    if experiment.comparisons:
        experiment.comparisons = complete_comparisons(experiment, where)
    return experiment


def _field_names() -> set[str]:
    return {entry.name for entry in fields(Experiment)}


def _apply_override(values: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals:
        raise ValueError(f"--override {override}: expected key=value.")
    path = key.split(".")
    if path[0] not in _field_names():
        path = ["base", *path]
    options = values
    for name in path[:-1]:
        options = options.setdefault(name, {})
        if not isinstance(options, dict):
            raise ValueError(f"--override {override}: {name} holds no options.")
    options[path[-1]] = _parse_value(text, override)


def _parse_value(text: str, override: str) -> Any:
    """Parse the value of an override as YAML, except `{data}` or `{arm:co}`, which YAML would read as a mapping."""
    if re.match(r"\{(\w+|arm:[^{}]+)\}", text):
        return text
    try:
        return yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ValueError(f"--override {override}: malformed YAML: {error}") from None


def _check_kinds(experiment: Experiment, where: str) -> None:
    for name in ("base", "arms", "evaluation", "world_options", "task_options", "model_options"):
        value = getattr(experiment, name)
        if not isinstance(value, dict):
            raise ValueError(f"{where}: {name} is {value!r}, expected names and values.")
    check_seeds(experiment.seeds, f"{where}: seeds")
    for name in ("pools", "corpus_sizes"):
        value = getattr(experiment, name)
        if name == "corpus_sizes" and value is None:
            continue
        if not isinstance(value, list) or not value or not all(map(_is_size, value)):
            raise ValueError(f"{where}: {name} is {value!r}, expected a list of positive integers or full.")


def check_seeds(seeds: Any, where: str) -> None:
    """Raise a `ValueError` that begins with `where` unless `seeds` is a list of distinct integers."""
    if not isinstance(seeds, list) or not seeds or not all(type(seed) is int for seed in seeds):
        raise ValueError(f"{where} is {seeds!r}, expected a list of integers.")
    if len(set(seeds)) < len(seeds):
        raise ValueError(f"{where} is {seeds!r}, which holds a seed twice: it would count as one.")


def parse_seeds(text: str) -> list[int]:
    """Return the seeds of `--seeds`, such as `0,1`."""
    try:
        seeds = [int(seed) for seed in text.split(",")]
    except ValueError:
        raise ValueError(f"--seeds {text}: expected integers with commas between them, e.g. 0,1.") from None
    check_seeds(seeds, "--seeds")
    return seeds


def _is_size(value: Any) -> bool:
    return value == "full" or (type(value) is int and value > 0)


def _check_options(experiment: Experiment, where: str) -> None:
    _check_runner_options("base", experiment.base, where)
    for arm, options in experiment.arms.items():
        if options is None:
            options = experiment.arms[arm] = {}
        if not isinstance(options, dict):
            raise ValueError(f"{where}: arm {arm} is {options!r}, expected options.")
        _check_runner_options(f"arm {arm}", options, where)
        if experiment.options(arm).get("hub_token"):
            raise ValueError(f"{where}: arm {arm}: the report would publish hub_token: log in, or set HF_TOKEN.")
        # A config of train.py may hold options that the runner sets itself.
        if unknown := sorted(set(experiment.options(arm)) - TRAIN_OPTIONS - NOT_OPTIONS):
            raise ValueError(f"{where}: arm {arm}: train.py has no option {unknown[0]!r}.")
        for name, value in experiment.options(arm).items():
            if "{arm:" in str(value) and (name != "model_name_or_path" or not experiment.starting_arm(arm)):
                raise ValueError(
                    f'{where}: arm {arm}: {name} is {value!r}, but only model_name_or_path can be "{{arm:NAME}}".'
                )
        if experiment.starting_arm(arm) and (built := sorted(set(options) & set(MODEL_OPTIONS))):
            raise ValueError(f"{where}: arm {arm}: {built[0]} is that of the arm whose model it starts from.")
    try:
        experiment.training_order()
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    if unknown := sorted(set(experiment.evaluation) - EVALUATION_OPTIONS):
        raise ValueError(
            f"{where}: evaluation: run_evaluation.py has no option {unknown[0]!r} that an experiment can set."
        )
    if experiment.axis is not None and experiment.axis not in TRAIN_OPTIONS:
        raise ValueError(f"{where}: axis is {experiment.axis!r}, expected an option of train.py.")


def _check_runner_options(place: str, options: dict[str, Any], where: str) -> None:
    """Check that an option which the runner sets itself is not set in vain. Only a `config` may hold one."""
    for name in sorted(NOT_OPTIONS - {"corpus_file"}):
        if options.get(name) is not None:
            raise ValueError(f"{where}: {place}: {name} has no effect, the runner sets it.")


def _check_tasks_and_axis(experiment: Experiment, where: str) -> None:
    if experiment.pools_only and (experiment.corpus_sizes is not None or "full" in experiment.pools):
        raise ValueError(f"{where}: pools_only leaves out passages that a search of the full corpus needs.")
    if isinstance(experiment.tasks, str):
        experiment.tasks = read_yaml(find(experiment.tasks)).get("tasks")
    if experiment.tasks is None and experiment.world is None:
        raise ValueError(f"{where}: there are no tasks: list them, or set world: quickstart.")
    if experiment.axis:
        _check_axis_values(experiment.axis, experiment.arms, where)
    if experiment.world not in (None, "quickstart"):
        raise ValueError(f"{where}: world is {experiment.world!r}, expected quickstart.")
    if experiment.tasks is not None:
        expand_tasks(experiment, experiment.tasks)


def _check_axis_values(axis: str, arms: dict[str, dict[str, Any]], where: str) -> None:
    values = [options[axis] for options in arms.values() if options.get(axis) is not None]
    numbers = {float(value) for value in values if _is_number(value)}
    if len(numbers) < len(values):
        raise ValueError(
            f"{where}: axis is {axis}, whose values in the arms are {values}, expected numbers, each in one arm."
        )


def _is_number(value: Any) -> bool:
    try:
        float(value)  # YAML reads 1e-4 as a string
    except (TypeError, ValueError):
        return False
    return True


def _check_baseline(experiment: Experiment, where: str) -> None:
    """Check the baseline. By default it is the first arm or, if there is only one arm, the first mode."""
    lines = list(experiment.arms) if len(experiment.arms) > 1 else experiment.modes
    if experiment.baseline is None:
        experiment.baseline = lines[0]
    if experiment.baseline not in lines:
        raise ValueError(f"{where}: baseline is {experiment.baseline!r}, expected one of {', '.join(lines)}.")


# ---------------------------------------------------------------------- files


def find(name: str | Path) -> Path:
    """Return a path, made relative to the root of the repository if it exists only there."""
    if not Path(name).exists() and (ROOT / name).exists():
        return ROOT / name
    return Path(name)


def read_yaml(path: Path) -> dict[str, Any]:
    """
    Return the mapping in a YAML file.

    Raises:
        `ValueError`: if there is no such file, or it does not hold a mapping.
    """
    if not path.is_file():
        raise ValueError(f"{path}: no such file.")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # also not UTF-8, too many digits, nested too deeply
        raise ValueError(f"{path}: malformed YAML: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path}: found {type(values).__name__}, expected names and values.")
    return values


def fill(value: Any, folders: dict[str, str]) -> Any:
    """
    Replace `{data}`, `{world}` and `{models}` in all strings of a value with the paths of these folders.

    Raises:
        `ValueError`: if `folders` lacks one of them.
    """
    if isinstance(value, dict):
        return {key: fill(item, folders) for key, item in value.items()}
    if isinstance(value, list):
        return [fill(item, folders) for item in value]
    if isinstance(value, str):
        for name in re.findall(r"\{(data|world|models)\}", value):
            if name not in folders:
                missing = "data=FOLDER is missing" if name == "data" else "it needs world: quickstart"
                raise ValueError(f"{value!r} names a folder that is not set: {missing}.")
            value = value.replace("{" + name + "}", folders[name])
    return value


def retrieves_candidates(options: dict[str, Any]) -> bool:
    """Return whether a training with these options retrieves candidates, so that it needs a corpus."""
    return options.get("candidates_from") is not None or options.get("supervision") in DISTILLATIONS
