"""
What an experiment file says, and which trainings and evaluations follow from it.

    title, about        what the report is called, and what it is about
    world               quickstart: data and models that recipes/prepare_quickstart*.py make, another world for each seed. Not needed where base names
                        gen and train_file, and tasks are given. world_options, task_options, model_options: of those recipes
    base                options of recipes/train.py that all arms share; `config` names a file of recipes/configs to start from
    arms                name -> options in which the arm differs from base
    baseline            the arm (or, with one arm, the mode) that the others are compared with; the first one by default
    seeds               of data order, weights and world
    tasks               as in a config of recipes/run_evaluation.py, or the name of a file with such a list; the world's by default. A task may name
                        an `index` (and `index_uri`: a collection in Milvus) where all arms share its Emb_seq
    pools               full, 20, 100, ...: each task is judged with each, unless it says `pool`, or `pools` of its own
    corpus_sizes        in place of pools: the full corpus is searched, cut to so many passages, gold ones always among them; `full` is all of it
    pools_only          embed only the passages that the pools of the asked questions hold, not whole corpora: for large ones on a slow machine
    evaluation          other options of recipes/run_evaluation.py
    axis                an option of train.py whose values are the x axis of a plot; an arm without it is drawn as a level line
    data                a folder; `{data}` stands for it in paths, as `{world}` and `{models}` do for the folders of the seed's world
"""

import re
from dataclasses import dataclass, field, fields
from pathlib import Path

import yaml

from modeling_cosup.configuration_cosup import SIMILARITY_DEFAULTS
from modeling_cosup.files_cosup import digest
from trainer import CoSupTrainingArguments
from trainer.judging.results import FORMAT

from experiments.task_files import digest_of_content, expand_tasks
from shared.arguments import EvaluationArguments, ScriptArguments

ROOT = Path(__file__).resolve().parents[2]
NOT_OPTIONS = {  # data, folders and seeds are the runner's business
    "prepare", "prepare_options", "output_dir", "seed", "eval_file", "corpus_file", "index", "index_uri",
}  # fmt: skip
TRAIN_OPTIONS = {option.name for option in (*fields(ScriptArguments), *fields(CoSupTrainingArguments))} - NOT_OPTIONS
TRAIN_DEFAULTS = {
    option.name: option.default for option in (*fields(ScriptArguments), *fields(CoSupTrainingArguments))
}
NOT_EVALUATION_OPTIONS = {  # for the runner or a task to set
    *("model", "output_dir", "tasks", "eval_file", "index_cache"),
    *("corpus_file", "index", "index_uri", "split", "pool"),
}
EVALUATION_OPTIONS = {option.name for option in fields(EvaluationArguments)} - NOT_EVALUATION_OPTIONS
NO_PART_OF_A_RESULT = {  # changing these trains nothing anew
    "num_threads", "logging_steps", "logging_strategy", "logging_first_step", "report_to", "save_strategy", "save_steps", "save_total_limit", "disable_tqdm",
    "dataloader_num_workers", "dataset_num_proc", "num_examples", "per_device_eval_batch_size", "run_name", "license",
}  # fmt: skip
SCORING = (
    "nli_model",
    "gr_hypothesis",
    "metric",
    "split",
)  # options of an evaluation or a task that say how answers are judged, not what they are
WORLD_FILES = {"gen": "gen", "emb_seq": "emb_seq", "train_file": "train.jsonl", "validation_file": "validation.jsonl"}


@dataclass
class Experiment:
    """The fields of an experiment file, see above."""

    title: str
    arms: dict
    about: str = ""
    world: str | None = None
    world_options: dict = field(default_factory=dict)
    task_options: dict = field(default_factory=dict)
    model_options: dict = field(default_factory=dict)
    base: dict = field(default_factory=dict)
    baseline: str | None = None
    seeds: list = field(default_factory=lambda: [0])
    tasks: list | str | None = None
    pools: list = field(default_factory=lambda: ["full"])
    corpus_sizes: list | None = None
    pools_only: bool = False
    evaluation: dict = field(default_factory=dict)
    axis: str | None = None
    data: str | None = None

    def options(self, arm):
        """Options of recipes/train.py of an arm, still without those of the world."""
        merged = {**self.base, **self.arms[arm]}
        config = merged.pop("config", None)
        return {**(read_yaml(find(config)) if config else {}), **merged}

    @property
    def modes(self):
        """What the answers of a model may retrieve, see `trainer.judging.answers.retrieval_settings`."""
        return [
            "off" if mode is False else mode for mode in self.evaluation.get("modes") or ["retrieval"]
        ]  # YAML reads `off` so


def load_experiment(path, overrides=()):
    """
    An experiment file with overrides, checked.

    Args:
        path (`str`): of the YAML file.
        overrides (`list[str]`): `key=value`, the value as YAML. A key is a field of the file, `base.…`, `evaluation.…` or `arms.<name>.…`; an option of
            train.py alone is that of `base`.

    Returns:
        [`Experiment`].

    Raises:
        `ValueError`: names the file and the key of what is unknown, missing or of another kind than expected.
    """
    values = read_yaml(find(path))
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals:
            raise ValueError(f"--override {override}: expected key=value.")
        known = {entry.name for entry in fields(Experiment)}
        keys = key.split(".") if key.split(".")[0] in known else ["base", *key.split(".")]
        inner = values
        for part in keys[:-1]:
            inner = inner.setdefault(part, {})
            if not isinstance(inner, dict):
                raise ValueError(f"--override {override}: {part} holds no options.")
        inner[keys[-1]] = _value(value, override)
    where = str(path)
    if unknown := sorted(set(values) - {entry.name for entry in fields(Experiment)}):
        raise ValueError(f"{where}: unknown field {unknown[0]!r}.")
    if missing := [name for name in ("title", "arms") if not values.get(name)]:
        raise ValueError(f"{where}: {missing[0]} is missing.")
    experiment = Experiment(**{name: value for name, value in values.items() if value is not None})
    _check(experiment, where)
    return experiment


def _value(text, override):
    """The value of an override; YAML would take the brace of `{data}` or `{sentence}` for a mapping."""
    if re.match(r"\{\w+\}", text):
        return text
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"--override {override}: malformed YAML: {error}") from None


def _check(experiment, where):
    for name in ("base", "arms", "evaluation", "world_options", "task_options", "model_options"):
        if not isinstance(getattr(experiment, name), dict):
            raise ValueError(f"{where}: {name} is {getattr(experiment, name)!r}, expected names and values.")
    for name in ("seeds", "pools"):
        if not isinstance(getattr(experiment, name), list) or not getattr(experiment, name):
            raise ValueError(f"{where}: {name} is {getattr(experiment, name)!r}, expected a list.")
    for arm, options in experiment.arms.items():
        experiment.arms[arm] = options = {} if options is None else options
        if not isinstance(options, dict):
            raise ValueError(f"{where}: arm {arm} is {options!r}, expected options.")
        if unknown := sorted(set(experiment.options(arm)) - TRAIN_OPTIONS - NOT_OPTIONS):  # a config may hold these
            raise ValueError(f"{where}: arm {arm}: train.py has no option {unknown[0]!r}.")
    if unknown := sorted(set(experiment.evaluation) - EVALUATION_OPTIONS):
        raise ValueError(f"{where}: evaluation: run_evaluation.py has no option {unknown[0]!r} that could stand here.")
    if experiment.axis is not None and experiment.axis not in TRAIN_OPTIONS:
        raise ValueError(f"{where}: axis is {experiment.axis!r}, expected an option of train.py.")
    if experiment.pools_only and (experiment.corpus_sizes is not None or "full" in experiment.pools):
        raise ValueError(f"{where}: pools_only leaves out what a search of the full corpus needs.")
    if isinstance(experiment.tasks, str):
        experiment.tasks = read_yaml(find(experiment.tasks)).get("tasks")
    if experiment.tasks is None and experiment.world is None:
        raise ValueError(f"{where}: there are no tasks: list them, or give world: quickstart.")
    if experiment.axis:
        values = [
            options[experiment.axis]
            for options in experiment.arms.values()
            if options.get(experiment.axis) is not None
        ]
        if len({float(value) for value in values if _is_number(value)}) < len(values):
            raise ValueError(
                f"{where}: axis is {experiment.axis}, whose values in the arms are {values}, expected numbers, each in one arm."
            )
    if experiment.world not in (None, "quickstart"):
        raise ValueError(f"{where}: world is {experiment.world!r}, expected quickstart.")
    if experiment.tasks is not None:
        expand_tasks(experiment, experiment.tasks)
    lines = list(experiment.arms) if len(experiment.arms) > 1 else experiment.modes
    experiment.baseline = lines[0] if experiment.baseline is None else experiment.baseline
    if experiment.baseline not in lines:
        raise ValueError(f"{where}: baseline is {experiment.baseline!r}, expected one of {', '.join(lines)}.")


def _is_number(value):
    try:
        return float(value) is not None  # YAML reads 1e-4 as a string
    except (TypeError, ValueError):
        return False


# ---------------------------------------------------------------------- files, and what names a result


def find(name):
    """A path as it is, or below the project's folder."""
    if name is not None and not Path(name).exists() and (ROOT / name).exists():
        return ROOT / name
    return Path(name)


def read_yaml(path):
    """`dict` of a YAML file."""
    if not path.is_file():
        raise ValueError(f"{path}: no such file.")
    try:
        values = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: malformed YAML: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path}: found {type(values).__name__}, expected names and values.")
    return values


def key_of(options):
    """
    What names a training: a hash of all options that decide its result and of the content of the files and models that they name.

    An option set to train.py's default does not change the hash.
    """
    files = ("gen", "emb_seq", "query_encoder", "model_name_or_path", "train_file", "validation_file")
    told = {
        **SIMILARITY_DEFAULTS.get(options.get("similarity", TRAIN_DEFAULTS["similarity"]), {}),
        **{k: v for k, v in options.items() if v is not None},
    }
    told = {
        name: value
        for name, value in told.items()
        if name not in NO_PART_OF_A_RESULT and value != TRAIN_DEFAULTS.get(name)
    }
    return digest({name: digest_of_content(value) if name in files else str(value) for name, value in told.items()})[
        :12
    ]


def scoring(evaluation, entries):
    """What decides the scores of answers that are there: `SCORING` of the options of an evaluation (an NLI model by its content) and of each task."""
    told = {name: evaluation[name] for name in SCORING if evaluation.get(name) is not None}
    own = {entry["name"]: {name: entry[name] for name in SCORING if entry.get(name) is not None} for entry in entries}
    return {**told, "tasks": own} | (
        {"nli_model": digest_of_content(told["nli_model"])} if "nli_model" in told else {}
    )


def evaluation_key(model_key, entries, evaluation):
    """
    Hash that names a model's answers; how they are judged (`SCORING`) does not enter. Results of another format get
    another key.
    """
    tasks = []
    for entry in entries:
        asked = {name: value for name, value in entry.items() if name not in SCORING}
        files = {name: digest_of_content(asked[name]) for name in ("eval_file", "corpus_file") if name in asked}
        tasks.append({**asked, **files})
    ignored = ("num_threads", "batch_size", "nli_batch_size", "num_examples", *SCORING)
    return digest(
        [FORMAT, model_key, tasks, {name: value for name, value in evaluation.items() if name not in ignored}]
    )[:12]
