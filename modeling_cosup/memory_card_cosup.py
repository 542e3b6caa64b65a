"""
Write the card of a token memory.

Does not travel with a checkpoint, like the other cards; see [`card_cosup`].
"""

from typing import Any

from huggingface_hub import DatasetCardData, ModelCardData

from .card_cosup import table_cell
from .hub_cosup import CARD_MARKER

MEMORY_CARD = """---
{metadata}
---
{marker}

# {name}

A token memory of the Gen of {model}: {content}.

```python
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("{model_id}", trust_remote_code=True, load_emb_seq=False)
memory = model.load_memory("{repo_id}")  # revision="..." pins a commit
model.generate(..., memory=memory)
```

Only the Gen that it was made for can use it: loading compares hashes of its body and of the tokenizer.

| | |
|---|---|
{settings}

The files are safetensors and JSON; nothing in them is executed. A memory keeps the licence of its texts.
"""


def memory_card(config: dict[str, Any], repo_id: str, model: str | None = None, license: str | None = None) -> str:
    """Return the `README.md` of a memory; its config also has the number of `documents` of a [`KNNMemory`]."""
    options: dict[str, Any] = {"license": license or "unknown", "tags": ["cosup", "token-memory"]}
    metadata: ModelCardData | DatasetCardData = ModelCardData(**options)
    names, content = ["hidden_size", "intermediate_size"], "an MLP"
    if config["memory_type"] == "knn":
        metadata, names = DatasetCardData(viewer=False, **options), ["key_size", "dtype"]
        count = sum(config["shards"])
        size = count * (config["key_size"] * (4 if config["dtype"] == "float32" else 2) + 8)
        content = f"the states before {count:,} tokens of {config['documents']:,} texts, {size / 1e6:,.1f} MB"
    values = {name: config[name] for name in (*names, "vocab_size")}
    values["key"] = config["fingerprint"].get("key")
    for name in ("weight", "k", "temperature", "grounded_weight"):
        values[name] = config["memory_config"][name]
    values["index_factory"] = (config.get("approximate") or {}).get("index_factory")
    return MEMORY_CARD.format(
        metadata=metadata.to_yaml(),
        marker=CARD_MARKER,
        name=repo_id.rsplit("/", 1)[-1],
        repo_id=repo_id,
        model=f"[{model}](https://huggingface.co/{model})" if model else "a CoSup model",
        model_id=model or "namespace/model",
        content=content,
        settings="\n".join(f"| `{name}` | `{table_cell(repr(value))}` |" for name, value in values.items()),
    )
