"""
The options of the recipes that build, train and judge token memories.

As in `arguments.py`, `--help` and a misspelt option need only this file.
"""

from dataclasses import dataclass, field

from shared.indexes import FAISS_HELP, THREADS_HELP

WINDOW_HELP = "Tokens of a sliding window; defaults to what the model can read, at most 1,024."
STRIDE_HELP = "Tokens from one window to the next; defaults to half a window."
MEMORY_TRAINING_ARGUMENTS = "trainer.memory_args.MemoryTrainingArguments"  # a name, because the class needs torch


@dataclass
class BuildMemoryArguments:
    """Which model stores the tokens of which texts, and how."""

    model: str = field(metadata={"local_or_hub": True, "help": "Name or path of a CoSup checkpoint or another Gen."})
    text_file: str = field(
        metadata={
            "local_or_hub": True,
            "help": "Rows with a `text`: JSON Lines (.gz), Parquet or a dataset name (its split `train`).",
        }
    )
    output_dir: str = field(metadata={"help": "Folder of the memory."})
    batch_size: int = field(default=8, metadata={"help": "Windows in a forward."})
    max_length: int | None = field(default=None, metadata={"help": WINDOW_HELP})
    stride: int | None = field(default=None, metadata={"help": STRIDE_HELP})
    shard_size: int = field(
        default=2**18, metadata={"help": "Keys per shard, about: what a process loses if it dies."}
    )
    dtype: str = field(default="auto", metadata={"help": "Dtype of the model's weights, e.g. bfloat16 on a GPU."})
    num_threads: int | None = field(default=None, metadata={"help": THREADS_HELP})
    key_dtype: str = field(
        default="float16", metadata={"help": "Dtype of the stored keys: float16, bfloat16 or float32."}
    )
    streaming: bool = field(
        default=False, metadata={"help": "Stream a dataset from the Hub instead of downloading it first."}
    )
    index_factory: str | None = field(
        default=None, metadata={"help": "Also train an approximate index: HNSW32, IVF1024,Flat, IVF1024,PQ64, ..."}
    )
    train_size: int = field(default=65536, metadata={"help": "Keys that the approximate index is trained on."})
    nprobe: int | None = field(default=None, metadata={"help": "Lists that an IVF index searches."})
    ef_search: int | None = field(default=None, metadata={"help": "Candidates that an HNSW index keeps."})
    seed: int = field(default=0, metadata={"help": "Seed of the training sample."})


@dataclass
class MemoryTrainingScriptArguments:
    """Which memory to train or to fit; `MemoryTrainingArguments` holds everything else."""

    model: str = field(
        metadata={"local_or_hub": True, "help": "Name or path of the CoSup checkpoint or Gen that made the keys."}
    )
    memory: str = field(metadata={"local_or_hub": True, "help": "Name or path of a KNNMemory."})
    allow_faiss_files: bool = field(default=False, metadata={"help": FAISS_HELP})
    intermediate_size: int = field(default=4096, metadata={"help": "Width of the hidden layer of the MLP."})
    fit_file: str | None = field(
        default=None,
        metadata={
            "help": "Held-out text, as for run_perplexity.py, on which weight, temperature and k are fitted.",
        },
    )
    fit_only: bool = field(
        default=False, metadata={"help": "Train nothing: fit --memory, which may also be an MLPMemory, in its folder."}
    )
    max_fit_tokens: int = field(default=16384, metadata={"help": "Fit on the first tokens of the held-out text."})
    max_length: int | None = field(default=None, metadata={"help": WINDOW_HELP})
    stride: int | None = field(default=None, metadata={"help": STRIDE_HELP})
    dtype: str = field(default="auto", metadata={"help": "Dtype of the model's weights, e.g. bfloat16 on a GPU."})
    num_threads: int | None = field(default=None, metadata={"help": THREADS_HELP})


@dataclass
class PerplexityArguments:
    """Model, memories and text of a perplexity."""

    model: str = field(
        metadata={"local_or_hub": True, "help": "Name or path of a CoSup checkpoint, or of any causal language model."}
    )
    text_file: str = field(
        metadata={"help": "Documents with a `text`: JSON Lines (.gz) or Parquet; or plain text (.txt), one document."}
    )
    output_dir: str = field(metadata={"help": "Folder of the results and the report."})
    memory: list[str] = field(
        default_factory=list, metadata={"help": "Names or paths of memories of this model, of either kind."}
    )
    allow_faiss_files: bool = field(default=False, metadata={"help": FAISS_HELP})
    memory_weight: float | None = field(
        default=None, metadata={"help": "Weight of every memory; defaults to its own."}
    )
    memory_k: int | None = field(
        default=None, metadata={"help": "Neighbours of every KNNMemory; defaults to its own."}
    )
    memory_temperature: float | None = field(
        default=None, metadata={"help": "Temperature of every memory; defaults to its own."}
    )
    max_length: int | None = field(default=None, metadata={"help": WINDOW_HELP})
    stride: int | None = field(default=None, metadata={"help": STRIDE_HELP})
    max_documents: int | None = field(default=None, metadata={"help": "Read only the first documents."})
    memory_device: str | None = field(
        default=None, metadata={"help": "Copy every KNNMemory to this device; by default its files are searched."}
    )
    batch_size: int = field(default=8, metadata={"help": "Windows in a forward."})
    dtype: str = field(default="auto", metadata={"help": "Dtype of the model's weights, e.g. bfloat16 on a GPU."})
    num_threads: int | None = field(default=None, metadata={"help": THREADS_HELP})


@dataclass
class MacondoArguments:
    """Folder, size and names of a Macondo data set."""

    output_dir: str = field(
        metadata={"help": "Folder; another data set in it is replaced, a folder that holds anything else is refused."}
    )
    seed: int = field(default=0, metadata={"help": "Seed of everything that is drawn."})
    num_villagers: int = field(default=100, metadata={"help": "Villagers with n children, for each n."})
    max_children: int = field(default=5, metadata={"help": "n is 1, 2, ... up to this."})
    style: str = field(
        default="sentences", metadata={"help": "sentences (the paper), or conversation: a question and its answer."}
    )
    validation_share: float = field(
        default=0.2, metadata={"help": "Share of the villagers in validation.jsonl; the others are in test.jsonl."}
    )
    num_other_relations: int = field(
        default=0, metadata={"help": "Lines of other_relations.jsonl; 0 writes no such file."}
    )
    tokenizer: str | None = field(
        default=None,
        metadata={"local_or_hub": True, "help": "Tokenizer of the model; by default one is made of all words."},
    )
    first_names: str | None = field(default=None, metadata={"help": "File of first names of villagers, one a line."})
    last_names: str | None = field(default=None, metadata={"help": "File of last names, one a line."})
    child_names: str | None = field(default=None, metadata={"help": "File of names of children, one a line."})


@dataclass
class MemoryRunnerArguments:
    """Which experiment with token memories to run, and where."""

    experiment: str = field(metadata={"help": "YAML file; see recipes/experiments/memory_definition.py."})
    output_dir: str = field(metadata={"help": "Folder of the report."})
    cache_dir: str | None = field(
        default=None, metadata={"help": "Folder of data, models, memories and analyses that experiments share."}
    )
    seeds: str | None = field(default=None, metadata={"help": "Seeds in place of those in the file, e.g. 0,1."})
    only: list[str] | None = field(default=None, metadata={"help": "Run and report only these arms."})
    num_threads: int | None = field(default=None, metadata={"help": THREADS_HELP})
