"""Options of the recipes that look for passages: recipes/build_candidates.py and recipes/mine_hard_negatives.py."""

from dataclasses import dataclass, field

from shared.indexes import INDEX_HELP, INDEX_URI_HELP


@dataclass
class CandidateArguments:
    """The retriever, the passages that it searches, and the questions."""

    model: str = field(
        metadata={"local_or_hub": True, "help": "Name or path of a sentence-transformers model or a CoSup checkpoint."}
    )
    eval_file: str = field(
        metadata={"local_or_hub": True, "help": "Evaluation instances: JSON Lines (.gz or plain) or a dataset name."}
    )
    output_file: str = field(
        metadata={"help": "The evaluation instances with candidates, JSON Lines; compressed if named .gz."}
    )
    corpus_file: str | None = field(
        default=None,
        metadata={"local_or_hub": True, "help": "Passages {id, title, text}: JSON Lines (.gz) or Parquet."},
    )
    index: str | None = field(
        default=None,
        metadata={"help": f"Index of a CoSup checkpoint, in place of a corpus: {INDEX_HELP}, of index type FLAT."},
    )
    index_uri: str | None = field(default=None, metadata={"help": INDEX_URI_HELP})
    split: str = field(default="test", metadata={"help": "Split of a dataset."})
    num_candidates: int = field(default=100, metadata={"help": "Candidates per question; the paper uses 20 and 100."})
    gold_first: bool = field(default=False, metadata={"help": "Put all gold before the other candidates."})
    index_dir: str | None = field(default=None, metadata={"help": "Folder in which encoded corpora are kept."})
    batch_size: int = field(default=64, metadata={"help": "Texts per forward."})
    passage_template: str = field(
        default="{title}. {text}",
        metadata={"help": "For a sentence-transformers model; a CoSup checkpoint has its own."},
    )
    device: str | None = field(
        default=None, metadata={"help": "Device of the model; defaults to a GPU, if there is one"}
    )
    dtype: str = field(default="auto", metadata={"help": "Dtype of the weights, e.g. bfloat16 on a GPU."})


@dataclass
class MiningArguments:
    """The files to read and to write, and what counts as a hard negative."""

    train_file: str = field(
        metadata={"local_or_hub": True, "help": "training instances: JSON Lines (.gz or plain) or a dataset name"}
    )
    model: str = field(metadata={"local_or_hub": True, "help": "name or path of a sentence-transformers model"})
    output_file: str = field(
        metadata={"help": "the instances with their negatives, JSON Lines (compressed if the name ends in .gz)"}
    )
    corpus_file: str | None = field(
        default=None, metadata={"local_or_hub": True, "help": "further passages that may be negatives"}
    )
    num_negatives: int = field(default=1, metadata={"help": "maximum number of new negatives per query"})
    range_min: int = field(default=0, metadata={"help": "number of nearest passages to skip"})
    range_max: int = field(default=50, metadata={"help": "last rank of a hard negative"})
    relative_margin: float = field(
        default=0.05,
        metadata={"help": "a negative must be less similar than the right passage by at least this share"},
    )
    passage_template: str = field(default="{title}. {text}", metadata={"help": "how the model reads a passage"})
    batch_size: int = field(default=64, metadata={"help": "texts per batch"})
    device: str | None = field(
        default=None, metadata={"help": "where the model runs; defaults to a GPU, if there is one"}
    )
    dtype: str = field(default="auto", metadata={"help": "dtype of the weights, e.g. bfloat16 on a GPU"})
