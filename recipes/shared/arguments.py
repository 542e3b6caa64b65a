"""Options of recipes/train.py and recipes/run_evaluation.py; recipes/run_experiments.py fills them in as well."""

from dataclasses import dataclass, field
from typing import Literal

from trainer.judging.grounding import HYPOTHESIS

from shared.indexes import INDEX_HELP, INDEX_URI_HELP

TASK_OPTIONS = (
    "corpus_file",
    "index",
    "index_uri",
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


@dataclass
class ScriptArguments:
    """Models, data and measurements of a training; `CoSupTrainingArguments` holds everything else."""

    gen: str | None = field(default=None, metadata={"help": "Name or path of Gen (AutoModelForCausalLM)."})
    emb_seq: str | None = field(
        default=None, metadata={"help": "Name or path of Emb_seq (AutoModel); defaults to a copy of Gen."}
    )
    model_name_or_path: str | None = field(
        default=None, metadata={"help": "A CoSup checkpoint to train further, instead of --gen."}
    )
    dtype: str = field(default="float32", metadata={"help": "Dtype of the weights."})
    attn_implementation: str | None = field(default=None, metadata={"help": "eager, sdpa, flash_attention_2, ..."})
    similarity: str = field(default="cosine", metadata={"help": "cosine or dot (the paper)."})
    temperature: float | None = field(
        default=None, metadata={"help": "Temperature of the NSP loss; 0.05 for cosine, 1.0 for dot."}
    )
    nsp_loss_weight: float | None = field(
        default=None, metadata={"help": "λ, the weight of the NSP loss; 1.0 for cosine, 0.01 for dot."}
    )
    query_from: str | None = field(
        default=None,
        metadata={
            "help": "What embeds queries: gen (the method), emb_seq or query_encoder (the paper's baseline); "
            "defaults to emb_seq with --supervision separate."
        },
    )
    query_encoder: str | None = field(
        default=None,
        metadata={"help": "With --query_from query_encoder: its name or path; defaults to the path of Emb_seq."},
    )
    emb_seq_pooling: str = field(default="eos", metadata={"help": "eos (the paper), lasttoken, mean or cls."})
    passage_template: str = field(default="{title} :: {text}", metadata={"help": "How Emb_seq reads a passage."})
    max_passage_length: int = field(default=256, metadata={"help": "Maximum number of tokens of a passage."})
    nsp_token: str = field(default="[NSP]", metadata={"help": "String of the token that retrieves."})
    cs_token: str = field(default="[Cs]", metadata={"help": "String of the token that opens grounded text."})
    ce_token: str = field(default="[CE]", metadata={"help": "String of the token that closes grounded text."})
    use_peft: bool = field(
        default=False,
        metadata={"help": "Train only LoRA adapters of both models, and the embeddings of the control tokens."},
    )
    lora_r: int = field(default=16, metadata={"help": "Rank of the adapters."})
    lora_alpha: int = field(default=32, metadata={"help": "Scale of the adapters."})
    lora_dropout: float = field(default=0.05, metadata={"help": "Dropout of the adapters."})
    lora_target_modules: list[str] | None = field(
        default=None, metadata={"help": "Modules that get adapters; defaults to every linear layer."}
    )
    train_file: str | None = field(
        default=None, metadata={"help": "Training instances: JSON Lines (.gz) or a dataset name."}
    )
    validation_file: str | None = field(
        default=None,
        metadata={"help": "Held-out instances in the same format, for eval_loss and eval_query_recall@k."},
    )
    corpus_file: str | None = field(
        default=None, metadata={"help": "Passages to index: JSON Lines (.gz) or a dataset name."}
    )
    index: str | None = field(
        default=None, metadata={"help": f"With --freeze_emb_seq, in place of --corpus_file: {INDEX_HELP}."}
    )
    index_uri: str | None = field(default=None, metadata={"help": INDEX_URI_HELP})
    eval_file: str | None = field(
        default=None, metadata={"help": "Questions with answers and provenance: JSON Lines (.gz) or a dataset name."}
    )
    eval_before_training: bool = field(
        default=False, metadata={"help": "Also measure held-out NTP loss and recall before training."}
    )
    max_train_samples: int | None = field(default=None, metadata={"help": "Use only the first training instances."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Use only the first evaluation instances."})
    max_new_tokens: int = field(default=64, metadata={"help": "Decoded tokens per answer."})
    num_examples: int = field(default=4, metadata={"help": "Answers to print with their passages."})
    license: str | None = field(
        default=None,
        metadata={"help": "Identifier of the checkpoint's licence, for its card; otherwise the card says unknown."},
    )
    corpus_license: str | None = field(
        default=None, metadata={"help": "Identifier of the corpus licence, for the card of the index."}
    )
    push_index: bool = field(
        default=False,
        metadata={
            "help": "With --push_to_hub, also publish the index with its passages, "
            "as the dataset repository hub_model_id + '-index'."
        },
    )
    num_threads: int | None = field(
        default=None, metadata={"help": "Threads of a single process on a CPU; defaults to all cores."}
    )
    prepare: Literal["quickstart"] | None = field(
        default=None, metadata={"help": "Make data and models first, as recipes/prepare_quickstart.py does."}
    )
    prepare_options: str = field(default="{}", metadata={"help": "JSON object with the options of --prepare."})


@dataclass
class EvaluationArguments:
    """Model, tasks and measurements of an evaluation."""

    model: str = field(metadata={"help": "Name or path of a CoSup checkpoint."})
    output_dir: str = field(metadata={"help": "Results folder."})
    tasks: str | None = field(
        default=None, metadata={"help": "In a config: a list of tasks; see recipes/run_evaluation.py."}
    )
    eval_file: str | None = field(
        default=None, metadata={"help": "Questions of a single task: JSON Lines (.gz) or a dataset name."}
    )
    corpus_file: str | None = field(
        default=None, metadata={"help": "Passages to embed: JSON Lines (.gz), Parquet or a dataset name."}
    )
    index: str | None = field(
        default=None, metadata={"help": f"Index of the model, in place of a corpus: {INDEX_HELP}."}
    )
    index_uri: str | None = field(default=None, metadata={"help": INDEX_URI_HELP})
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
        default=None, metadata={"help": "NLI model for Gr, citations and FEVER, e.g. google/t5_xxl_true_nli_mixture."}
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
    num_threads: int | None = field(default=None, metadata={"help": "Threads of a process on a CPU."})
    seed: int = field(default=0, metadata={"help": "Seed of the passages in mode wrong."})
