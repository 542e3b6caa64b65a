"""What trains and judges a CoSup model."""

from .batching import CoSupDataCollator
from .cosup_trainer import CoSupTrainer
from .data import load_corpus, load_evaluation_set, load_instances
from .training_args import CoSupTrainingArguments

__all__ = ["CoSupDataCollator", "CoSupTrainer", "CoSupTrainingArguments", "load_corpus", "load_evaluation_set", "load_instances"]
