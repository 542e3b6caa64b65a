"""
Options of the recipes whose own imports take seconds: `--help` and a misspelt option need only this file.

recipes/run_experiments.py also fills in the options of recipes/train.py and recipes/run_evaluation.py.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from modeling_cosup.numbers_cosup import COUNT, check_numbers
from trainer.judging.grounding import HYPOTHESIS

from shared.indexes import FAISS_HELP, INDEX_HELP, INDEX_URI_HELP, THREADS_HELP

RECIPES = Path(__file__).resolve().parents[1]
TRAINING_ARGUMENTS = "trainer.training_args.CoSupTrainingArguments"  # a name, because the class needs torch
TASK_OPTIONS = (
    "corpus_file",
    "index",
    "index_uri",
    "allow_faiss_files",
    "split",
    "pool",
    "gold_in_pool",
    "metric",
    "count_empty_answers",
    "max_eval_samples",
    "max_new_tokens",
    "top_k",
    "max_retrievals",
)
SAMPLES = {"max_train_samples": COUNT, "max_eval_samples": COUNT}


@dataclass
class ScriptArguments:
    """Models, data and measurements of a training; `CoSupTrainingArguments` holds everything else."""

    gen: str | None = field(
        default=None, metadata={"local_or_hub": True, "help": "Gen: name or path of a causal language model."}
    )
    emb_seq: str | None = field(
        default=None,
        metadata={
            "local_or_hub": True,
            "help": "Emb_seq: name or path of a text encoder. Default: Gen reads the passages too.",
        },
    )
    model_name_or_path: str | None = field(
        default=None, metadata={"local_or_hub": True, "help": "A CoSup checkpoint to train further, in place of gen."}
    )
    dtype: str = field(
        default="float32", metadata={"help": "Dtype in which weights are loaded. Trained weights become float32."}
    )
    attn_implementation: str | None = field(
        default=None,
        metadata={"help": "eager, sdpa, flash_attention_2, flex_attention, ... Default: transformers chooses."},
    )
    similarity: str | None = field(
        default=None,
        metadata={"help": "cosine or dot (the paper). Default: what a sentence-transformers emb_seq says, or cosine."},
    )
    temperature: float | None = field(
        default=None, metadata={"help": "Temperature of the NSP loss. Default: 0.05 for cosine, 1.0 for dot."}
    )
    nsp_loss_weight: float | None = field(
        default=None, metadata={"help": "λ, the weight of the NSP loss. Default: 1.0 for cosine, 0.01 for dot."}
    )
    query_from: str | None = field(
        default=None,
        metadata={
            "help": "What embeds queries: gen (the method), emb_seq or query_encoder. Default: gen, or emb_seq "
            "with supervision separate."
        },
    )
    tie_emb_seq: bool | None = field(
        default=None,
        metadata={
            "help": "true: one tied model. false: two towers (the paper). Default: tied, unless an option needs "
            "two, such as emb_seq."
        },
    )
    emb_head_size: int | None = field(
        default=None,
        metadata={
            "help": "Width of a linear map after the embeddings. Default: none, or Gen's width if Emb_seq has another."
        },
    )
    truncate_dim: int | None = field(
        default=None,
        metadata={"help": "Keep only the first dimensions of the embeddings: a smaller index, see matryoshka_dims."},
    )
    query_encoder: str | None = field(
        default=None,
        metadata={
            "local_or_hub": True,
            "help": "With query_from query_encoder: its name or path. Default: a copy of Emb_seq.",
        },
    )
    emb_seq_pooling: str | None = field(
        default=None,
        metadata={
            "help": "eos (the paper), lasttoken, mean or cls. Default: what a sentence-transformers emb_seq "
            "says, or eos."
        },
    )
    passage_template: str | None = field(
        default=None, metadata={"help": "How Gen and Emb_seq read a passage. Default: '{title} :: {text}'."}
    )
    passage_prompt: str | None = field(
        default=None,
        metadata={
            "help": "Text that Emb_seq reads before each passage, such as 'passage: ' for E5. Default: that of "
            "a sentence-transformers emb_seq."
        },
    )
    query_prompt: str | None = field(
        default=None,
        metadata={
            "help": "Text that an encoder reads before each query. Default: that of a sentence-transformers emb_seq."
        },
    )
    max_passage_length: int | None = field(
        default=None,
        metadata={
            "help": "Longest passage in tokens. The rest is cut. Default: the limit of a sentence-transformers "
            "emb_seq, or 256."
        },
    )
    nsp_token: str = field(default="[NSP]", metadata={"help": "The token that retrieves."})
    cs_token: str = field(default="[Cs]", metadata={"help": "The token that opens grounded text."})
    ce_token: str = field(default="[CE]", metadata={"help": "The token that closes grounded text."})
    nsp_init: str = field(
        default="mean",
        metadata={"help": "Where the embedding of [NSP] starts: the mean of all rows, or the row of eos."},
    )
    use_peft: bool = field(
        default=False,
        metadata={"help": "Train only LoRA adapters of all parts, the rows of the control tokens, and emb_head."},
    )
    lora_r: int = field(default=16, metadata={"help": "Rank of the adapters."})
    lora_alpha: int = field(default=32, metadata={"help": "Scale of the adapters."})
    lora_dropout: float = field(default=0.05, metadata={"help": "Dropout of the adapters."})
    lora_target_modules: list[str] | None = field(
        default=None, metadata={"help": "Modules that get adapters. Default: every linear layer."}
    )
    train_file: str | None = field(
        default=None,
        metadata={
            "local_or_hub": True,
            "help": "Training instances: JSON Lines (.gz) or a dataset name.",
        },
    )
    validation_file: str | None = field(
        default=None,
        metadata={
            "local_or_hub": True,
            "help": "Held-out instances in the same format, for the eval_ figures of the log.",
        },
    )
    corpus_file: str | None = field(
        default=None,
        metadata={
            "local_or_hub": True,
            "help": "Passages to index, and to take candidates from: JSON Lines (.gz), Parquet or a dataset name.",
        },
    )
    index: str | None = field(
        default=None,
        metadata={"help": "With a frozen Emb_seq, in place of corpus_file: " + INDEX_HELP + "."},
    )
    index_uri: str | None = field(default=None, metadata={"help": INDEX_URI_HELP + "."})
    eval_file: str | None = field(
        default=None,
        metadata={
            "local_or_hub": True,
            "help": "Questions to answer after training: JSON Lines (.gz) or a dataset name.",
        },
    )
    eval_before_training: bool = field(
        default=False, metadata={"help": "Measure the NTP loss and the recall of the questions before training too."}
    )
    max_train_samples: int | None = field(default=None, metadata={"help": "Use only the first training instances."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Use only the first questions."})
    max_new_tokens: int = field(default=64, metadata={"help": "Decoded tokens per answer."})
    num_examples: int = field(default=4, metadata={"help": "Answers to print with their passages."})
    license: str | None = field(
        default=None,
        metadata={"help": "Licence of the checkpoint, for its card. Default: the repository's, or unknown."},
    )
    corpus_license: str | None = field(
        default=None,
        metadata={
            "help": "Licence of the passages, for the card of the index. Default: its repository's, or unknown."
        },
    )
    push_index: bool = field(
        default=False,
        metadata={
            "help": "With push_to_hub: push the index and its passages to the dataset repository hub_model_id + "
            "'-index'."
        },
    )
    num_threads: int | None = field(default=None, metadata={"help": THREADS_HELP})
    prepare: Literal["quickstart"] | None = field(
        default=None, metadata={"help": "Make data and models first, as recipes/prepare_quickstart.py does."}
    )
    prepare_options: dict[str, Any] | str | None = field(
        default="{}", metadata={"help": "Options of prepare, as a JSON object."}
    )

    def __post_init__(self) -> None:
        check_numbers(self, SAMPLES, optional=SAMPLES, prefix="--")


@dataclass
class EvaluationArguments:
    """Model, tasks and measurements of an evaluation."""

    model: str = field(metadata={"local_or_hub": True, "help": "Name or path of a CoSup checkpoint."})
    output_dir: str = field(metadata={"help": "Results folder."})
    tasks: list[dict] | str | None = field(
        default=None, metadata={"help": "In a config: a list of tasks; see recipes/run_evaluation.py."}
    )
    eval_file: str | None = field(
        default=None,
        metadata={"local_or_hub": True, "help": "Questions of a single task: JSON Lines (.gz) or a dataset name."},
    )
    corpus_file: str | None = field(
        default=None,
        metadata={"local_or_hub": True, "help": "Passages to embed: JSON Lines (.gz), Parquet or a dataset name."},
    )
    index: str | None = field(
        default=None, metadata={"help": f"Index of the model, in place of a corpus: {INDEX_HELP}."}
    )
    index_uri: str | None = field(default=None, metadata={"help": INDEX_URI_HELP})
    allow_faiss_files: bool = field(default=False, metadata={"help": FAISS_HELP})
    split: str | None = field(default=None, metadata={"help": "in-domain or out-of-domain, for the averages."})
    pool: str | None = field(
        default=None,
        metadata={
            "help": "full (default): search the whole index; a number: search that many candidates of each question."
        },
    )
    gold_in_pool: bool | None = field(
        default=None,
        metadata={
            "help": "Gold candidates are always in the pool (default); false: take the first candidates, gold or not."
        },
    )
    metric: str | None = field(
        default=None, metadata={"help": "Metric of Cor; defaults to the metric of the questions' dataset."}
    )
    count_empty_answers: bool | None = field(
        default=None,
        metadata={
            "help": "Compare also with answers that normalise to nothing ('The'), as the official code does: any "
            "output contains them. By default they are left out."
        },
    )
    max_eval_samples: int | None = field(default=None, metadata={"help": "Ask only the first questions of each task."})
    max_new_tokens: int | None = field(default=None, metadata={"help": "Decoded tokens per answer; defaults to 64."})
    top_k: int | None = field(default=None, metadata={"help": "Passages per retrieval; defaults to 1."})
    max_retrievals: int | None = field(
        default=None, metadata={"help": "Maximum number of retrievals per answer; defaults to no limit."}
    )
    modes: list[str] = field(
        default_factory=lambda: ["retrieval", "gold", "off"],
        metadata={"help": "Any of retrieval, gold, off, forced and wrong; or query, which generates nothing."},
    )
    index_cache: str | None = field(
        default=None,
        metadata={
            "help": "Folder of embedded corpora, shared by all runs that name it; defaults to OUTPUT_DIR/indexes."
        },
    )
    nli_model: str | None = field(
        default=None,
        metadata={
            "local_or_hub": True,
            "help": "NLI model for Gr, citations and FEVER, e.g. google/t5_xxl_true_nli_mixture.",
        },
    )
    gr_hypothesis: str = field(
        default=HYPOTHESIS,
        metadata={
            "help": "How the NLI model reads a sentence for Gr; '{question} {sentence}' for answers of a few words."
        },
    )
    update_card: bool = field(
        default=False,
        metadata={"help": "Also write the main figures to the card of the checkpoint, which must be a folder."},
    )
    nli_batch_size: int = field(default=32, metadata={"help": "Pairs per batch of the NLI model."})
    batch_size: int = field(default=32, metadata={"help": "Questions per batch."})
    dtype: str = field(default="auto", metadata={"help": "Dtype of the model's weights, e.g. bfloat16 on a GPU."})
    num_examples: int = field(default=3, metadata={"help": "Answers per task that the report shows."})
    num_threads: int | None = field(default=None, metadata={"help": THREADS_HELP})
    disable_tqdm: bool = field(default=False, metadata={"help": "Show no progress bars."})
    seed: int = field(default=0, metadata={"help": "Seed of the passages in mode wrong."})


@dataclass
class IndexArguments:
    """Which model embeds which corpus, and how."""

    model: str = field(metadata={"local_or_hub": True, "help": "Name or path of a CoSup checkpoint."})
    corpus_file: str = field(
        metadata={
            "local_or_hub": True,
            "help": "Passages {id, title, text}: JSON Lines (.gz), Parquet or a dataset name (its split `train`).",
        }
    )
    output_dir: str = field(metadata={"help": "Folder of the index."})
    encoder_url: str | None = field(
        default=None,
        metadata={
            "help": "vLLM pooling server of what save_emb_seq wrote, e.g. http://host:8000/v1; the model here then "
            "only checks its first embeddings."
        },
    )
    batch_size: int = field(
        default=256, metadata={"help": "Maximum number of passages in a forward, or in a request to --encoder_url."}
    )
    max_tokens_per_batch: int | None = field(
        default=None, metadata={"help": "Maximum number of tokens in a forward; 4,096 on a CPU, 32,768 elsewhere."}
    )
    shard_size: int = field(
        default=32768,
        metadata={"help": "Passages per shard: what a process holds in memory, and loses if it dies."},
    )
    dtype: str = field(default="auto", metadata={"help": "Dtype of the model's weights, e.g. bfloat16 on a GPU."})
    num_threads: int | None = field(default=None, metadata={"help": THREADS_HELP})
    embedding_dtype: str = field(
        default="float32",
        metadata={"help": "Dtype of the stored embeddings: float32, or float16 or bfloat16 in half the space."},
    )
    streaming: bool = field(
        default=False,
        metadata={"help": "Stream a dataset from the Hub instead of downloading it first; it is read twice."},
    )
    index_factory: str | None = field(
        default=None,
        metadata={"help": "Also train an approximate index: HNSW32, IVF1024,Flat, OPQ16_64,IVF1024,PQ16, ..."},
    )
    train_size: int = field(default=65536, metadata={"help": "Embeddings that the approximate index is trained on."})
    nprobe: int | None = field(default=None, metadata={"help": "Lists that an IVF index searches."})
    ef_search: int | None = field(default=None, metadata={"help": "Candidates that an HNSW index keeps."})
    seed: int = field(default=0, metadata={"help": "Seed of the training sample."})
    index: str | None = field(
        default=None, metadata={"help": "With --index_uri: name of the Milvus collection to upload to."}
    )
    index_uri: str | None = field(default=None, metadata={"help": f"{INDEX_URI_HELP}; the index is uploaded there"})
    milvus_index_type: str = field(
        default="FLAT",
        metadata={"help": "Index type of the collection: FLAT (exact), or an approximate one, e.g. HNSW."},
    )
    milvus_index_params: dict[str, Any] | str | None = field(
        default="{}",
        metadata={"help": 'Parameters of the index type, a JSON object, e.g. {"M": 32, "efConstruction": 200}.'},
    )


@dataclass
class NLIArguments:
    """The model, and the data to train and to measure it on."""

    train_file: str = field(
        metadata={"local_or_hub": True, "help": "Training instances: JSON Lines (.gz) or a dataset name."}
    )
    model_name_or_path: str = field(
        metadata={"local_or_hub": True, "help": "An encoder, or an NLI model to train further."}
    )
    validation_file: str | None = field(
        default=None,
        metadata={"local_or_hub": True, "help": "Held-out instances in the same format, for the accuracy."},
    )
    hypothesis: str = field(
        default="{question} {sentence}",
        metadata={"help": "Template of hypotheses: the --gr_hypothesis of the evaluation."},
    )
    max_length: int = field(
        default=320,
        metadata={"help": "Maximum number of tokens of a pair; a longer pair loses the end of its premise."},
    )
    max_train_samples: int | None = field(
        default=None, metadata={"help": "Use only this many segments, drawn at random."}
    )
    max_eval_samples: int | None = field(default=None, metadata={"help": "Use only this many held-out segments."})
    num_threads: int | None = field(default=None, metadata={"help": THREADS_HELP})

    def __post_init__(self) -> None:
        check_numbers(self, SAMPLES, optional=SAMPLES, prefix="--")


@dataclass
class RunnerArguments:
    """Which experiment to run, and where."""

    experiment: str = field(metadata={"help": "YAML file; recipes/experiments holds the paper's experiments."})
    output_dir: str = field(metadata={"help": "Folder of the report."})
    cache_dir: str | None = field(
        default=None, metadata={"help": "Folder of worlds, models, indexes and evaluations that experiments share."}
    )
    override: list[str] = field(
        default_factory=list,
        metadata={
            "help": "key=value ...: fields of the file, or options of train.py for all arms.",
            "action": "extend",
        },
    )
    seeds: str | None = field(default=None, metadata={"help": "Seeds in place of those in the file, e.g. 0,1."})
    only: list[str] | None = field(
        default=None, metadata={"help": "Run only these arms; the report holds all arms that are done."}
    )
    dry_run: bool = field(default=False, metadata={"help": "Print the plan, and do nothing."})
    accelerate_config: str = field(
        default=str(RECIPES / "accelerate_configs/single.yaml"),
        metadata={"help": "Config file with which accelerate launches the recipes."},
    )
