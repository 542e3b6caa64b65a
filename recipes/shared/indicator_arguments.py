"""Options of recipes/run_indicators.py."""

from dataclasses import dataclass, field
from typing import Literal

from shared.indexes import INDEX_HELP, INDEX_URI_HELP, THREADS_HELP


@dataclass
class IndicatorArguments:
    """Readers, questions and passages."""

    model: list[str] = field(
        metadata={"help": "Names or paths of CoSup checkpoints. The first one retrieves for all of them."}
    )
    index: str = field(metadata={"help": f"Index of the first model: {INDEX_HELP}."})
    eval_file: str = field(
        metadata={"local_or_hub": True, "help": "Questions with answers: JSON Lines (.gz) or a dataset name."}
    )
    output_dir: str = field(metadata={"help": "Folder of the results and the report."})
    index_uri: str | None = field(default=None, metadata={"help": INDEX_URI_HELP})
    num_candidates: int = field(default=5, metadata={"help": "Passages that are read with a question."})
    candidates: Literal["retrieved", "gold_included"] = field(
        default="retrieved",
        metadata={
            "help": "gold_included: where no gold passage was retrieved, one replaces the last passage, at a place "
            "that is drawn. Questions without provenance are left out then."
        },
    )
    shuffle: bool = field(
        default=False,
        metadata={"help": "Read the passages of a question in a random order; else the nearest is first."},
    )
    likelihoods: bool = field(
        default=False, metadata={"help": "Also read each passage alone: what perplexity distillation would teach."}
    )
    pooling: Literal["mean", "max"] = field(
        default="mean",
        metadata={"help": "Similarity to several target tokens: the mean, or that to the nearest (then many tie)."},
    )
    max_eval_samples: int | None = field(default=None, metadata={"help": "Read only the first questions."})
    batch_size: int = field(default=32, metadata={"help": "Questions per batch when queries are embedded."})
    max_tokens: int = field(default=8192, metadata={"help": "Tokens in a forward of a reader, padding included."})
    dtype: str = field(default="auto", metadata={"help": "Dtype of the weights, e.g. bfloat16 on a GPU."})
    num_threads: int | None = field(default=None, metadata={"help": THREADS_HELP})
    seed: int = field(default=0, metadata={"help": "Seed of the places of gold passages, and of their order."})
