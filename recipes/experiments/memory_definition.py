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
    hurdle                  training with and without the last FFN: options of TrainingArguments, and num_evaluations
    seeds                   a list of integers
"""

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from experiments.definition import check_seeds, find, read_yaml
from shared.arguments import MacondoArguments

SECTIONS = ("pretraining", "training", "knn", "mlp", "fit")
ARM_FIELDS = ("gen", "lora", *SECTIONS)
DATA_OPTIONS = {option.name for option in fields(MacondoArguments)} - {"output_dir", "seed", "tokenizer"}
VARIANT_FIELDS = ("learning_rate", "tolerance", "max_steps")


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
    check_names(experiment.data, DATA_OPTIONS, f"{where}: data")
    for arm, options in experiment.arms.items():
        _check_arm(options, f"{where}: arm {arm}")
    _check_projection(experiment.projection, f"{where}: projection")
    return experiment


def check_options(value: Any, where: str) -> None:
    """Raise a `ValueError` unless a value holds options."""
    if not isinstance(value, dict):
        raise ValueError(f"{where} is {value!r}, expected names and values.")


def check_names(options: dict[str, Any], known: Any, where: str) -> None:
    """Raise a `ValueError` for an option that is not known."""
    for name in options:
        if name not in known:
            raise ValueError(f"{where}: unknown option {name!r}, expected one of {', '.join(sorted(known))}.")


def _check_arm(options: Any, where: str) -> None:
    check_options(options, where)
    check_names(options, ARM_FIELDS, where)
    gen = options.get("gen")
    if not isinstance(gen, str | dict) or not gen:
        raise ValueError(f"{where}: gen is {gen!r}, expected a name, a path, or the config of a model.")
    if isinstance(gen, dict) and "model_type" not in gen:
        raise ValueError(f"{where}: gen has no model_type, e.g. gpt2.")
    for name in ("lora", *SECTIONS):
        check_options(options.get(name, {}), f"{where}: {name}")


def _check_projection(projection: dict[str, Any], where: str) -> None:
    check_names(projection, ("max_positions", "variants"), where)
    for name, variant in projection.get("variants", {}).items():
        check_options(variant, f"{where}: {name}")
        check_names(variant, VARIANT_FIELDS, f"{where}: {name}")
        for option in VARIANT_FIELDS:
            value = variant.get(option)
            if isinstance(value, bool) or not isinstance(value, int | float) or value < 0:
                raise ValueError(f"{where}: {name}: {option} is {value!r}, expected a number that is not negative.")
