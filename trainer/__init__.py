"""Train a CoSup model, judge it (`trainer.judging`) and report on it (`trainer.reports`)."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .batching import CoSupDataCollator
    from .cosup_trainer import CoSupTrainer
    from .data import load_corpus, load_evaluation_set, load_instances
    from .training_args import CoSupTrainingArguments

_MODULES = {
    "CoSupDataCollator": "batching",
    "CoSupTrainer": "cosup_trainer",
    "CoSupTrainingArguments": "training_args",
    "load_corpus": "data",
    "load_evaluation_set": "data",
    "load_instances": "data",
}

__all__ = [
    "CoSupDataCollator",
    "CoSupTrainer",
    "CoSupTrainingArguments",
    "load_corpus",
    "load_evaluation_set",
    "load_instances",
]


def __dir__() -> list[str]:
    """List the public names, which are imported on first use."""
    return sorted({*globals(), *__all__})


def __getattr__(name: str) -> object:
    """Import on first use: reports and figures need no torch, and importing the package must not load it."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_MODULES[name]}", __name__), name)
