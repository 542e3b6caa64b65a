"""
Experiments with token memories, as YAML: `recipes/run_memory_experiments.py` reads them.

    title, about            of the report
    like                    another file of this kind: fields that this file does not set are taken from it
    data                    options of recipes/prepare_macondo.py, without output_dir, seed and tokenizer
    arms                    name -> Gen, and sections that replace options of those below:
        gen                 name or path of a checkpoint, or the config of a model from scratch, with its `model_type`
        lora                options of peft.LoraConfig; the trained weights are merged
        pretraining, training, knn, mlp, fit
    pretraining             options of TrainingArguments for data/other_relations.jsonl, in place of the text that a
                            pretrained model has read; by default there is no pretraining
    training                options of TrainingArguments for data/train.jsonl
    knn                     options of KNNMemory.build
    mlp                     intermediate_size, and options of trainer.memory.train_mlp_memory
    fit                     options of trainer.memory.fit_memory_config, on data/validation.jsonl
    projection              Eq. 2: max_positions, and variants: name -> learning_rate, tolerance, max_steps
    hurdle                  training with and without the last FFN: max_sentences, every (steps between measurements),
                            gen (overrides of the config of a model), and training (options of TrainingArguments)
    seeds                   a list of integers
"""

import difflib
import inspect
from collections.abc import Callable, Collection
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from transformers import TrainingArguments

from trainer.memory import train_mlp_memory
from trainer.memory_fit import fit_memory_config

from experiments.definition import check_seeds, find, read_yaml
from shared.macondo import check_sizes
from shared.memory_arguments import MacondoArguments


def options_of(function: Callable, *others: str) -> set[str]:
    """Return the names of the arguments of a function that an experiment may set, all but `others`."""
    return set(inspect.signature(function).parameters) - set(others)


DATA_OPTIONS = {option.name for option in fields(MacondoArguments)} - {"output_dir", "seed", "tokenizer"}
TRAINING_OPTIONS = {option.name for option in fields(TrainingArguments)} - {"output_dir", "seed"}
MLP_ARGUMENTS = options_of(train_mlp_memory, "memory", "datastore", "seed", "training_arguments")
SECTIONS: dict[str, Collection[str]] = {  # section -> its options
    "pretraining": TRAINING_OPTIONS,
    "training": TRAINING_OPTIONS,
    "knn": {"dtype", "max_length", "stride", "batch_size", "shard_size", "show_progress_bar"},
    "mlp": {"intermediate_size", *MLP_ARGUMENTS, *TRAINING_OPTIONS},
    "fit": options_of(fit_memory_config, "memory", "keys", "targets", "lm_log_probs", "lm_kept", "kept_ids"),
}
ARM_FIELDS = ("gen", "lora", *SECTIONS)
VARIANT_FIELDS = ("learning_rate", "tolerance", "max_steps")
HURDLE_FIELDS = ("gen", "max_sentences", "every", "training")


@dataclass
class MemoryExperiment:
    """The fields of an experiment file, as described at the top of this module."""

    title: str
    arms: dict[str, dict[str, Any]]
    about: str = ""
    data: dict[str, Any] = field(default_factory=dict)
    pretraining: dict[str, Any] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)
    knn: dict[str, Any] = field(default_factory=dict)
    mlp: dict[str, Any] = field(default_factory=dict)
    fit: dict[str, Any] = field(default_factory=dict)
    projection: dict[str, Any] = field(default_factory=dict)
    hurdle: dict[str, Any] = field(default_factory=dict)
    seeds: list[int] = field(default_factory=lambda: [0])

    def section(self, arm: str, name: str) -> dict[str, Any]:
        """Return the options of a section for an arm."""
        return {**getattr(self, name), **self.arms[arm].get(name, {})}


def load_memory_experiment(path: str | Path) -> MemoryExperiment:
    """
    Load an experiment file and check it.

    Raises:
        `ValueError`: if something is unknown, missing or of the wrong kind. The message names the file and the key.
    """
    where = str(path)
    values = read_yaml(find(path))
    if like := values.pop("like", None):
        values = {**read_yaml(find(like)), **values}
    known = [entry.name for entry in fields(MemoryExperiment)]
    for name in values:
        if name not in known:
            raise ValueError(f"{where}: unknown field {name!r}, expected one of {', '.join(known)}.")
    for name in ("title", "arms", "training"):
        if not values.get(name):
            raise ValueError(f"{where}: {name} is missing.")
    experiment = MemoryExperiment(**values)
    check_seeds(experiment.seeds, f"{where}: seeds")
    for name in ("arms", "data", "projection", "hurdle", *SECTIONS):
        check_options(getattr(experiment, name), f"{where}: {name}")
    for name, known in SECTIONS.items():
        check_names(getattr(experiment, name), known, f"{where}: {name}")
    for arm, options in experiment.arms.items():
        _check_arm(options, f"{where}: arm {arm}")
    _check_data(experiment, where)
    _check_projection(experiment.projection, f"{where}: projection")
    _check_hurdle(experiment.hurdle, f"{where}: hurdle")
    return experiment


def _check_data(experiment: MemoryExperiment, where: str) -> None:
    """Check the data, and that there are sentences to fit on, to test on and, if asked for, to pretrain on."""
    check_names(experiment.data, DATA_OPTIONS, f"{where}: data")
    data = MacondoArguments("", **experiment.data)
    check_sizes(data)
    num_validation = round(data.validation_share * data.num_villagers)
    if not 0 < num_validation < data.num_villagers:
        raise ValueError(
            f"{where}: data: validation_share is {data.validation_share}, expected a share of {data.num_villagers}"
            " villagers that leaves some to fit on and some to test on."
        )
    for arm in experiment.arms:
        if experiment.section(arm, "pretraining") and not data.num_other_relations:
            raise ValueError(f"{where}: arm {arm}: pretraining needs data.num_other_relations, expected at least 1.")


def check_options(value: Any, where: str) -> None:
    """Raise a `ValueError` unless a value holds options."""
    if not isinstance(value, dict):
        raise ValueError(f"{where} is {value!r}, expected names and values.")


def check_names(options: dict[str, Any], known: Collection[str], where: str) -> None:
    """Raise a `ValueError` for an option that is not known."""
    for name in options:
        if name in known:
            continue
        close = difflib.get_close_matches(name, known, n=3, cutoff=0.5) or sorted(known)
        raise ValueError(f"{where}: unknown option {name!r}, expected one of {', '.join(close)}.")


def _check_arm(options: Any, where: str) -> None:
    check_options(options, where)
    check_names(options, ARM_FIELDS, where)
    gen = options.get("gen")
    if not isinstance(gen, str | dict) or not gen:
        raise ValueError(f"{where}: gen is {gen!r}, expected a name, a path, or the config of a model.")
    if isinstance(gen, dict) and "model_type" not in gen:
        raise ValueError(f"{where}: gen has no model_type, e.g. gpt2.")
    check_options(options.get("lora", {}), f"{where}: lora")
    for name, known in SECTIONS.items():
        check_options(options.get(name, {}), f"{where}: {name}")
        check_names(options.get(name, {}), known, f"{where}: {name}")


def _check_hurdle(hurdle: dict[str, Any], where: str) -> None:
    check_names(hurdle, HURDLE_FIELDS, where)
    if not hurdle:
        return
    every = hurdle.get("every")
    if type(every) is not int or every < 1:
        raise ValueError(f"{where}: every is {every!r}, expected a number of steps, at least 1.")
    check_options(hurdle.get("training"), f"{where}: training")
    check_names(hurdle["training"], TRAINING_OPTIONS, f"{where}: training")


def _check_projection(projection: dict[str, Any], where: str) -> None:
    check_names(projection, ("max_positions", "variants"), where)
    if projection and not projection.get("variants"):
        raise ValueError(f"{where}: variants is missing.")
    for name, variant in projection.get("variants", {}).items():
        check_options(variant, f"{where}: {name}")
        check_names(variant, VARIANT_FIELDS, f"{where}: {name}")
        for option in VARIANT_FIELDS:
            value = variant.get(option)
            if isinstance(value, bool) or not isinstance(value, int | float) or value < 0:
                raise ValueError(f"{where}: {name}: {option} is {value!r}, expected a number that is not negative.")
