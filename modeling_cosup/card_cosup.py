"""
The cards of a model, of its parts and of an index: metadata and text, made of configs and recorded facts.

Does not travel with a checkpoint: a process that has no more writes [`~plain_card_cosup.plain_card`].
"""

import json
import re
from importlib import metadata
from pathlib import Path

from huggingface_hub import DatasetCardData, EvalResult, ModelCardData
from jinja2 import Environment, StrictUndefined

from .hub_cosup import CARD_MARKER, is_repo_id

TEMPLATE_FILE = "hub_card.md"
TAGS = ["retrieval-augmented-generation", "cosup", "custom_code"]
PAPER_TAG = "arxiv:2403.09024"
SHOWN_STEPS = 10


def model_card(model, repo_id, facts, base=None):
    """
    The card of a checkpoint, from the template `hub_card.md`.

    Args:
        model ([`CoSupForCausalLM`]): with its tokenizer.
        repo_id (`str`): where the checkpoint will be loaded from: a repository, or a folder.
        facts (`dict`): see [`~facts_cosup.load_facts`].
        base (`str`, *optional*): of adapters: the model that they change.

    Returns:
        `str`: of the file `README.md`.

    Raises:
        `FileNotFoundError`: when the template is not installed.
    """
    environment = Environment(undefined=StrictUndefined, keep_trailing_newline=True, autoescape=False)  # Markdown
    data = _metadata(model, repo_id, facts, base)
    return environment.from_string(_template()).render(
        metadata=data.to_yaml(), **_context(model, repo_id, facts, base)
    )


def _template():
    """Text of the template: next to this package in a checkout, else among the installed files."""
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


def _metadata(model, repo_id, facts, base):
    """`ModelCardData` as the Hub specifies it."""
    config = model.config
    parts = [name for name in (config.gen_name_or_path, config.emb_seq_name_or_path) if name]
    given = base or facts.get("base_model")
    base_models = [given] if given else list(dict.fromkeys(parts))
    relation = (
        {"base_model_relation": "adapter" if base else "finetune"} if base_models else {}
    )  # else the Hub takes two for a merge
    return ModelCardData(
        license=facts.get("license") or "unknown",
        language=facts.get("language"),
        base_model=(base_models[0] if len(base_models) == 1 else base_models) or None,
        datasets=facts.get("datasets") or None,
        library_name="peft" if base else "transformers",
        pipeline_tag="text-generation",
        tags=list(dict.fromkeys([*TAGS, PAPER_TAG, *facts.get("tags", [])])),
        model_name=_name(repo_id, facts),
        eval_results=[result for group in facts.get("results", []) for result in _eval_results(group)] or None,
        **relation,
    )


def _name(repo_id, facts):
    return _cell(facts.get("name") or Path(repo_id).absolute().name)


def _cell(value):
    """A value as one cell of a Markdown table, or one line."""
    return " ".join(str(value).split()).replace("|", "\\|")


def _eval_results(group):
    """The `model-index` entries of one evaluation set."""
    dataset = group["dataset"]
    for metric in group["metrics"]:
        yield EvalResult(
            task_type="text-generation",
            dataset_type=dataset["type"],
            dataset_name=dataset["name"],
            metric_type=re.sub(r"\W+", "_", metric["type"].replace("@", "_at_")),
            metric_name=f"{metric['name']} ({metric['unit']})" if metric.get("unit") else metric["name"],
            metric_value=metric["value"],
            metric_args={"n": metric["n"], **({"interval_95": metric["interval"]} if metric.get("interval") else {})},
        )


def _context(model, repo_id, facts, base):
    """What the template fills in."""
    config = model.config
    tokens = model.tokenizer.convert_ids_to_tokens([config.nsp_token_id, config.cs_token_id, config.ce_token_id])
    return {
        "marker": CARD_MARKER,
        "name": _name(repo_id, facts),
        "repo_id": json.dumps(repo_id, ensure_ascii=False),
        "adapter": base is not None,
        "base": base,
        "index": json.dumps(facts["index"], ensure_ascii=False) if facts.get("index") else None,
        "question": json.dumps(facts.get("question") or "who painted the night watch?", ensure_ascii=False),
        "nsp_token": tokens[0],
        "cs_token": tokens[1],
        "ce_token": tokens[2],
        "gen": _part(model.gen, config.gen_config, config.gen_name_or_path),
        "emb_seq": _part(model.emb_seq, config.emb_seq_config, config.emb_seq_name_or_path),
        "training": _training(facts.get("training")),
        "results": [_result(group) for group in facts.get("results", [])],
        "settings": _settings(config),
    }


def _part(part, config, name):
    return {
        "architecture": type(part).__name__ if part is not None else config.model_type,
        "parameters": "not loaded" if part is None else f"{part.num_parameters():,}",
        "name": f"[{name}](https://huggingface.co/{name})" if is_repo_id(name) else "not recorded",
    }


def _settings(config):
    """Rows of the table of what the model, and any index of it, was built with."""
    names = ("similarity", "temperature", "nsp_loss_weight", "query_from", *config.embedding_settings)
    return [(f"`{name}`", f"`{_cell(repr(getattr(config, name)))}`") for name in dict.fromkeys(names)]


def _training(training):
    """Counts, the table of arguments, and at most `SHOWN_STEPS` lines of the log."""
    if not training:
        return None
    counts = training.get("instances", {})
    by_name = ", ".join(f"{count:,} of {_cell(name)}" for name, count in counts.items() if name)
    log = [entry for entry in training.get("log", []) if "loss" in entry]
    names = dict.fromkeys(name for entry in log for name in entry if name.endswith("loss") or name == "nsp_accuracy")
    picked = [
        log[round(i * (len(log) - 1) / max(1, min(SHOWN_STEPS, len(log)) - 1))]
        for i in range(min(SHOWN_STEPS, len(log)))
    ]
    passages = training.get("passages")
    return {
        "instances": f"Trained on {sum(counts.values()):,} instances" + (f" ({by_name})" if by_name else ""),
        "passages": f"which hold {passages:,} distinct passages" if passages else None,
        "table": [(_cell(name), _cell(value)) for name, value in training.get("arguments", {}).items()],
        "loss_names": list(names),
        "losses": [
            [entry.get("step", ""), *(f"{entry[name]:.4g}" if name in entry else "" for name in names)]
            for entry in picked
        ],
        "curves": training.get("curves", False),
    }


def _result(group):
    rows = []
    for metric in group["metrics"]:
        unit = f" {metric['unit']}" if metric.get("unit") else ""
        interval = "[{:.4g}, {:.4g}]".format(*metric["interval"]) if metric.get("interval") else ""
        rows.append(
            {
                "name": _cell(metric["name"]),
                "value": f"{metric['value']:.4g}{unit}",
                "interval": interval,
                "n": f"{metric['n']:,}",
            }
        )
    size = group.get("index_size")
    return {"dataset": _cell(group["dataset"]["name"]), "index": f"{size:,}" if size else None, "rows": rows}


# ---------------------------------------------------------------------- the card of an index

INDEX_CARD = """---
{metadata}
---
{marker}

# {name}

A passage index: {passages:,} passages with the embeddings that the Emb_seq of {model} gave them ({size:,} dimensions, {dtype}, {bytes}). A CoSup model
searches it while it writes.

```python
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("{model_id}", trust_remote_code=True, load_emb_seq=False){comment}
index = model.load_index("{repo_id}")  # needs faiss-cpu and pyarrow; revision="..." pins a commit
print(len(index), index[0])
```

Only the model that made it can search it: loading compares hashes of Emb_seq and of the tokenizers, and these settings:

| | |
|---|---|
{settings}

The files are safetensors, Arrow and JSON, listed with their sizes and SHA-256 in `index_config.json`. Nothing in them is executed.{approximate}
The passages keep the licence of the corpus that they come from.
"""
_SIZES = ("n<1K", "1K<n<10K", "10K<n<100K", "100K<n<1M", "1M<n<10M", "10M<n<100M", "100M<n<1B", "1B<n<10B")


def index_card(config, num_passages, repo_id, model=None, license=None):
    """
    The card of an index, `str`, with metadata as the Hub specifies it for datasets.

    Args:
        config (`dict`): of the index.
        num_passages (`int`): that can be found.
        repo_id (`str`): of the index.
        model (`str`, *optional*): repository of the model that made it.
        license (`str`, *optional*): of the passages; else `unknown`.
    """
    metadata = DatasetCardData(
        license=license or "unknown",
        task_categories=["text-retrieval"],
        size_categories=[_SIZES[min(max(0, len(str(num_passages)) - 3), len(_SIZES) - 1)]],
        tags=["cosup", "passage-index"],
        pretty_name=repo_id.rsplit("/", 1)[-1],
        viewer=False,
    )
    settings = [f"| `{name}` | `{_cell(repr(value))}` |" for name, value in config["fingerprint"].items()]
    approximate = (
        "\nThe file of its approximate index is parsed by FAISS and read only with `allow_faiss_files=True`."
        if config["approximate"]
        else ""
    )
    return INDEX_CARD.format(
        metadata=metadata.to_yaml(),
        marker=CARD_MARKER,
        name=repo_id.rsplit("/", 1)[-1],
        repo_id=repo_id,
        passages=num_passages,
        model=f"[{model}](https://huggingface.co/{model})" if model else "a CoSup model",
        model_id=model or "namespace/model",
        comment="" if model else "  # the one that made it",
        size=config["embedding_size"],
        dtype=config["dtype"],
        bytes=f"{sum(facts['size'] for facts in config['files'].values()) / 1e6:,.1f} MB",
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

The language model of a semiparametric one ([arXiv 2403.09024](https://arxiv.org/abs/2403.09024)), as a plain {architecture}: it loads without
`trust_remote_code`, and nothing is retrieved. Where it writes `{nsp_token}`, the whole model would.

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
texts = [template.replace("{{title}}", p["title"]).replace("{{text}}", p["text"]) if p["title"] else p["text"] for p in passages]
embeddings = model.encode(texts)
```

A passage is rendered by the template above; one without a title is its text alone. Then `encode` gives what `encode_passages` of the whole model gives:
{width} numbers, compared by the {similarity}. Passages are cut to {length} tokens; special tokens that stand in a text are read as text.

{queries}
"""
QUERIES = {
    "gen": "Queries are no texts: they are the hidden states of the other half, the language model Gen, where it writes `[NSP]`.",
    "emb_seq": "This model also reads the queries: all that the other half, the language model Gen, has read and written up to `[NSP]`.",
    "query_encoder": "Another encoder, of the whole model, reads the queries: all that the language model Gen has read and written up to `[NSP]`.",
}


def gen_card(architecture, nsp_token, name):
    """The card of a Gen of a class `architecture` that is loaded from `name`, a repository or a folder."""
    return GEN_CARD.format(marker=CARD_MARKER, architecture=architecture, nsp_token=nsp_token, name=name)


def emb_seq_card(config, name):
    """The card of an Emb_seq that is loaded from `name`, a repository or a folder."""
    similarity = {"cosine": "cosine", "dot": "dot product"}[config.similarity]
    facts = {
        "template": config.passage_template,
        "width": config.embedding_size,
        "similarity": similarity,
        "length": config.max_passage_length,
    }
    return EMB_SEQ_CARD.format(marker=CARD_MARKER, name=name, queries=QUERIES[config.query_from], **facts)
