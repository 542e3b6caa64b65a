"""
Write the cards of a model, of its parts and of an index, from configs and recorded facts.

Does not travel with a checkpoint: a process that has only a checkpoint's code writes
[`~plain_card_cosup.plain_card`] instead. `facts_cosup` loads the facts, `hub_cosup` uploads the card.
"""

import json
import re
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from huggingface_hub import DatasetCardData, EvalResult, ModelCardData
from jinja2 import Environment, StrictUndefined
from transformers import PreTrainedConfig, PreTrainedModel

from .configuration_cosup import CoSupConfig
from .facts_cosup import Facts, ResultGroup, TrainingRecord
from .hub_cosup import CARD_MARKER, is_repo_id

if TYPE_CHECKING:
    from modeling_cosup import CoSupForCausalLM

TEMPLATE_FILE = "hub_card.md"
TAGS = ["retrieval-augmented-generation", "cosup", "custom_code"]
PAPER_TAG = "arxiv:2403.09024"
SHOWN_STEPS = 10


def model_card(model: "CoSupForCausalLM", repo_id: str, facts: Facts, base: str | None = None) -> str:
    """
    Return the `README.md` of a checkpoint, from the template `hub_card.md`.

    Args:
        model ([`CoSupForCausalLM`]): with its tokenizer.
        repo_id (`str`): where the checkpoint will be loaded from, a repository or a folder.
        facts (`dict`): see [`~facts_cosup.Facts`].
        base (`str`, *optional*): for adapters, the model that they change.

    Raises:
        `FileNotFoundError`: when the template is not installed.
    """
    environment = Environment(undefined=StrictUndefined, keep_trailing_newline=True, autoescape=False)  # Markdown
    card_data = _metadata(model, repo_id, facts, base)
    context = _context(model, repo_id, facts, base)
    return environment.from_string(_template()).render(metadata=card_data.to_yaml(), **context)


def _template() -> str:
    """Return the template, from next to this package in a checkout, otherwise from the installed files."""
    path = Path(__file__).parent.parent / TEMPLATE_FILE
    if path.exists():
        return path.read_text(encoding="utf-8")
    try:
        installed = metadata.files("cosup") or []
    except metadata.PackageNotFoundError:
        installed = []
    for file in installed:
        if file.name == TEMPLATE_FILE:
            return Path(file.locate()).read_text(encoding="utf-8")
    raise FileNotFoundError(f"{TEMPLATE_FILE}, the template of model cards, is not installed: install cosup again.")


def _metadata(model: "CoSupForCausalLM", repo_id: str, facts: Facts, base: str | None) -> ModelCardData:
    """Return the metadata of a model card as the Hub specifies it."""
    config = model.config
    base_model = base or facts.get("base_model")
    if base_model:
        base_models = [base_model]
    else:
        sources = (config.gen_name_or_path, config.emb_seq_name_or_path, config.query_encoder_name_or_path)
        base_models = list(dict.fromkeys(name for name in sources if name))
    relation = None
    if base_models:  # without a relation, the Hub takes a model with two bases for a merge
        relation = "adapter" if base else "finetune"
    eval_results: list[EvalResult] = []
    for group in facts.get("results", []):
        eval_results.extend(_eval_results(group))
    return ModelCardData(
        license=facts.get("license") or "unknown",
        language=facts.get("language"),
        base_model=base_models[0] if len(base_models) == 1 else base_models or None,
        datasets=facts.get("datasets") or None,
        library_name="peft" if base else "transformers",
        pipeline_tag="text-generation",
        tags=list(dict.fromkeys([*TAGS, PAPER_TAG, *facts.get("tags", [])])),
        model_name=_name(repo_id, facts),
        eval_results=eval_results or None,
        base_model_relation=relation,
    )


def _name(repo_id: str, facts: Facts) -> str:
    return table_cell(facts.get("name") or Path(repo_id).absolute().name)


def table_cell(value: object) -> str:
    """Return a value as one line that can be a cell of a Markdown table."""
    return " ".join(str(value).split()).replace("|", "\\|")


def _eval_results(group: ResultGroup) -> Iterator[EvalResult]:
    """Yield the `model-index` entries of one evaluation set."""
    dataset = group["dataset"]
    for metric in group["metrics"]:
        metric_args: dict[str, Any] = {"n": metric["n"]}
        if metric.get("interval"):
            metric_args["interval_95"] = metric["interval"]
        yield EvalResult(
            task_type="text-generation",
            dataset_type=dataset["type"],
            dataset_name=dataset["name"],
            metric_type=re.sub(r"\W+", "_", metric["type"].replace("@", "_at_")),
            metric_name=f"{metric['name']} ({metric['unit']})" if metric.get("unit") else metric["name"],
            metric_value=metric["value"],
            metric_args=metric_args,
        )


def _context(model: "CoSupForCausalLM", repo_id: str, facts: Facts, base: str | None) -> dict[str, Any]:
    """Return the variables of the template."""
    config = model.config
    # never None here: only a plain Gen lacks control tokens
    control_ids = cast(list[int], [config.nsp_token_id, config.cs_token_id, config.ce_token_id])
    control_tokens = model.tokenizer.convert_ids_to_tokens(control_ids)
    return {
        "marker": CARD_MARKER,
        "name": _name(repo_id, facts),
        "repo_id": _quoted(repo_id),
        "adapter": base is not None,
        "base": base,
        "index": _quoted(facts["index"]) if facts.get("index") else None,
        "question": _quoted(facts.get("question") or "who painted the night watch?"),
        "nsp_token": control_tokens[0],
        "cs_token": control_tokens[1],
        "ce_token": control_tokens[2],
        "tied": config.tie_emb_seq,
        "query_from": config.query_from,
        "co_supervised": facts.get("training", {}).get("arguments", {}).get("supervision") == "co",
        "gen": _part(model.gen, config.gen_config, config.gen_name_or_path),
        "emb_seq": _emb_seq(model),
        "query_encoder": _query_encoder(model),
        "top_k": facts.get("training", {}).get("top_k"),
        "training": _training(facts.get("training")),
        "results": [_result(group) for group in facts.get("results", [])],
        "settings": _settings(config),
    }


def _quoted(text: str) -> str:
    """Return a text as a string literal of Python code."""
    return json.dumps(text, ensure_ascii=False)


def _part(part: PreTrainedModel | None, config: PreTrainedConfig, name: str | None) -> dict[str, str]:
    """Return the column of Gen or Emb_seq in the table of the two parts."""
    return {
        "architecture": config.model_type if part is None else type(part).__name__,
        "parameters": "not loaded" if part is None else f"{part.num_parameters():,}",
        "name": f"[{name}](https://huggingface.co/{name})" if is_repo_id(name) else "not recorded",
    }


def _emb_seq(model: "CoSupForCausalLM") -> dict[str, str]:
    """Return the column of Emb_seq; in a tied model it has no parameters of its own, but for `emb_head`."""
    config = model.config
    if not config.tie_emb_seq:
        return _part(model.emb_seq, config.emb_seq_config, config.emb_seq_name_or_path)
    column = _part(model.emb_seq, config.gen_config, config.gen_name_or_path)
    column["architecture"] += ", Gen's body"
    column["parameters"] = "Gen's"
    if model.emb_head is not None:
        column["parameters"] += f", and {model.emb_head.weight.numel():,} of emb_head"
    return column


def _query_encoder(model: "CoSupForCausalLM") -> dict[str, str] | None:
    """Return the column of the query encoder, `None` without one."""
    if model.query_encoder is None:
        return None
    return _part(model.query_encoder, model.query_encoder.config, model.config.query_encoder_name_or_path)


def _settings(config: CoSupConfig) -> list[tuple[str, str]]:
    """Return the rows of the table of settings: the model's, then the ones that an index of it must share."""
    names = ("similarity", "temperature", "nsp_loss_weight", "query_from", "tie_emb_seq", *config.embedding_settings)
    return [(f"`{name}`", f"`{table_cell(repr(getattr(config, name)))}`") for name in dict.fromkeys(names)]


def _training(training: TrainingRecord | None) -> dict[str, Any] | None:
    """Return counts, the table of arguments, and at most `SHOWN_STEPS` lines of the log, evenly spread."""
    if not training:
        return None
    counts = training.get("instances", {})
    instances = f"Trained on {sum(counts.values()):,} instances"
    by_dataset = ", ".join(f"{count:,} of {table_cell(name)}" for name, count in counts.items() if name)
    if by_dataset:
        instances += f" ({by_dataset})"
    passages = training.get("passages")

    log = [entry for entry in training.get("log", []) if "loss" in entry]
    names: dict[str, None] = {}
    for entry in log:
        names.update(dict.fromkeys(name for name in entry if name.endswith("loss") or name == "nsp_accuracy"))
    num_rows = min(SHOWN_STEPS, len(log))
    rows = []
    for i in range(num_rows):
        entry = log[round(i * (len(log) - 1) / max(1, num_rows - 1))]
        losses = [f"{entry[name]:.4g}" if name in entry else "—" for name in names]
        rows.append([entry.get("step", ""), *losses])
    return {
        "instances": instances,
        "passages": f"which hold {passages:,} distinct passages" if passages else None,
        "table": [(table_cell(name), table_cell(value)) for name, value in training.get("arguments", {}).items()],
        "loss_names": list(names),
        "losses": rows,
        "curves": training.get("curves", False),
    }


def _result(group: ResultGroup) -> dict[str, Any]:
    """Return the table of results of one evaluation set."""
    rows = []
    for metric in group["metrics"]:
        unit = f" {metric['unit']}" if metric.get("unit") else ""
        interval = "[{:.4g}, {:.4g}]".format(*metric["interval"]) if metric.get("interval") else ""
        row = {"name": table_cell(metric["name"]), "value": f"{metric['value']:.4g}{unit}"}
        rows.append({**row, "interval": interval, "n": f"{metric['n']:,}"})
    size = group.get("index_size")
    return {"dataset": table_cell(group["dataset"]["name"]), "index": f"{size:,}" if size else None, "rows": rows}


# ---------------------------------------------------------------------- the card of an index

INDEX_CARD = """---
{metadata}
---
{marker}

# {name}

A passage index: {passages:,} passages, embedded by the Emb_seq of {model}
({size:,} dimensions, {dtype}, {bytes}). A CoSup model searches it while it writes.

```python
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("{model_id}", trust_remote_code=True, load_emb_seq=False){comment}
index = model.load_index("{repo_id}")  # needs pyarrow; revision="..." pins a commit
print(len(index), index[0])
```

Only the model that made it can search it: loading compares hashes of Emb_seq and of the tokenizers, and these
settings:

| | |
|---|---|
{settings}

The files are safetensors, Arrow and JSON, listed with their sizes and SHA-256 in `index_config.json`.
Nothing in them is executed.{approximate}
The passages keep the licence of the corpus that they come from.
"""
_SIZES = ("n<1K", "1K<n<10K", "10K<n<100K", "100K<n<1M", "1M<n<10M", "10M<n<100M", "100M<n<1B", "1B<n<10B")


def index_card(
    config: dict[str, Any], num_passages: int, repo_id: str, model: str | None = None, license: str | None = None
) -> str:
    """
    Return the `README.md` of an index, with metadata as the Hub specifies it for datasets.

    Args:
        config (`dict`): the config of the index.
        num_passages (`int`): passages that can be found; deleted ones do not count.
        repo_id (`str`): repository of the index.
        model (`str`, *optional*): repository of the model that made it.
        license (`str`, *optional*): licence of the passages; defaults to `unknown`.
    """
    name = repo_id.rsplit("/", 1)[-1]
    size_class = max(0, len(str(num_passages)) - 3)
    card_data = DatasetCardData(
        license=license or "unknown",
        task_categories=["text-retrieval"],
        size_categories=[_SIZES[min(size_class, len(_SIZES) - 1)]],
        tags=["cosup", "passage-index"],
        pretty_name=name,
        viewer=False,
    )
    settings = [f"| `{setting}` | `{table_cell(repr(value))}` |" for setting, value in config["fingerprint"].items()]
    approximate = ""
    if config["approximate"]:
        approximate = "\nThe file of its approximate index is parsed by FAISS, and only if `allow_faiss_files=True`."
    num_bytes = sum(file["size"] for file in config["files"].values())
    return INDEX_CARD.format(
        metadata=card_data.to_yaml(),
        marker=CARD_MARKER,
        name=name,
        repo_id=repo_id,
        passages=num_passages,
        model=f"[{model}](https://huggingface.co/{model})" if model else "a CoSup model",
        model_id=model or "namespace/model",
        comment="" if model else "  # the one that made it",
        size=config["embedding_size"],
        dtype=config["dtype"],
        bytes=f"{num_bytes / 1e6:,.1f} MB",
        settings="\n".join(settings),
        approximate=approximate,
    )


# ---------------------------------------------------------------------- the cards of parts

GEN_CARD = """---
library_name: transformers
pipeline_tag: text-generation
tags:
- cosup
---
{marker}

# Gen of a CoSup model

The language model Gen of a semiparametric language model ([arXiv 2403.09024](https://arxiv.org/abs/2403.09024)), as a
plain {architecture}. It loads without `trust_remote_code` and retrieves nothing; the whole model retrieves where this
one writes `{nsp_token}`.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{name}")
tokenizer = AutoTokenizer.from_pretrained("{name}")
```
"""
EMB_SEQ_CARD = """---
library_name: sentence-transformers
pipeline_tag: sentence-similarity
tags:
- sentence-transformers
- feature-extraction
- sentence-similarity
- cosup
---
{marker}

# Emb_seq of a CoSup model

The passage encoder of a semiparametric language model ([arXiv 2403.09024](https://arxiv.org/abs/2403.09024)), as a
[sentence-transformers](https://www.sbert.net) model: no code of the checkpoint is run.

```python
from sentence_transformers import SentenceTransformer

model = SentenceTransformer("{name}")
template = {template!r}
passages = [{{"title": "The Night Watch", "text": "The Night Watch is a 1642 painting by Rembrandt."}}]
texts = []
for passage in passages:
    rendered = template.replace("{{title}}", passage["title"]).replace("{{text}}", passage["text"])
    texts.append(rendered if passage["title"] else passage["text"])
embeddings = model.encode(texts)
```

A passage is rendered with the template above; one without a title is its text alone. `encode` then returns the same
embeddings as `encode_passages` of the whole model: {width} numbers, compared by the {similarity}. Passages are
truncated to {length} tokens. Special tokens in a text are read as text.

{queries}
"""
QUERIES = {
    "tied": (
        "Queries are not texts: they are hidden states of the whole model at `[NSP]`. It is one tied model: these"
        " weights and an LM head."
    ),
    "gen": (
        "Queries are not texts: they are hidden states of the other half of the model, the language model Gen,"
        " at `[NSP]`."
    ),
    "emb_seq": (
        "This model also encodes the queries: everything that the other half of the model, the language model Gen,"
        " has read and written up to `[NSP]`."
    ),
    "query_encoder": (
        "Another encoder of the whole model encodes the queries: everything that the language model Gen has read and"
        " written up to `[NSP]`."
    ),
}
SIMILARITIES = {"cosine": "cosine", "dot": "dot product"}


def gen_card(architecture: str, nsp_token: str, name: str) -> str:
    """Return the card of a Gen of class `architecture` that is loaded from `name`, a repository or a folder."""
    return GEN_CARD.format(marker=CARD_MARKER, architecture=architecture, nsp_token=nsp_token, name=name)


def emb_seq_card(config: CoSupConfig, name: str) -> str:
    """Return the card of an Emb_seq that is loaded from `name`, a repository or a folder."""
    return EMB_SEQ_CARD.format(
        marker=CARD_MARKER,
        name=name,
        template=config.passage_template,
        width=config.embedding_size,
        similarity=SIMILARITIES[config.similarity],
        length=config.max_passage_length,
        queries=QUERIES["tied" if config.tie_emb_seq else config.query_from],
    )
