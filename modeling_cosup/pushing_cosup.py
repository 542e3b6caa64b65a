"""Push a folder in which a model was saved: a card, the recorded facts, and what the commit replaces."""

import json
import os
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo

from .facts_cosup import facts_to_push, lasting_facts, published_facts
from .hub_cosup import (
    CARD_FILE,
    FACTS_FILE,
    check_adapter_base,
    checkpoint_files,
    is_repo_id,
    make_repo,
    push_files,
    replaced_files,
)
from .plain_card_cosup import package_cards, plain_card

SUMMARY = (
    "A CoSup model: it retrieves passages while it writes. "
    "Load it with `AutoModelForCausalLM.from_pretrained(..., trust_remote_code=True)`."
)


def saves_adapters(model: Any) -> bool:
    """Return whether transformers has put adapters into a model (`add_adapter`): they alone are then saved."""
    return bool(getattr(model, "_hf_peft_config_loaded", False))


def push_folder(
    model: Any,
    folder: str | os.PathLike[str],
    repo_id: str,
    tags: str | list[str] | None = None,
    index: str | None = None,
    license: str | None = None,
    private: bool | None = None,
    token: str | None = None,
    variant: str | None = None,
    revision: str | None = None,
    **commit_options: Any,
) -> CommitInfo:
    """
    Push a folder in which a model, or adapters in it, were saved. See `CoSupForCausalLM.push_to_hub` for the options.

    The card shows what is recorded in the folder, what is given here, and what an earlier push has recorded.
    """
    if index is not None and not is_repo_id(index):
        raise ValueError(f"index is {index!r}, expected a dataset repository: others cannot load a local folder.")
    adapters = saves_adapters(model)
    base = None
    if adapters:
        base = model.peft_config[model.active_adapters()[0]].base_model_name_or_path
        check_adapter_base(base, repo_id)
    repo_id = make_repo(repo_id, private, token)
    weights = None if adapters else model.hash_all_weights()
    earlier = published_facts(repo_id, token, revision)
    if variant is not None:  # stands next to the weights that were measured
        weights = earlier.get("weights")
    keeps_measured = variant is not None or (weights is not None and earlier.get("weights") == weights)
    if not keeps_measured:
        earlier = lasting_facts(earlier)
    facts = facts_to_push(Path(folder), earlier, weights, tags, index=index, license=license)
    cards = package_cards()
    if cards is not None:
        card = cards.model_card(model, repo_id, facts, base)
    else:
        metadata: dict[str, Any] = {"library_name": "transformers", "pipeline_tag": "text-generation"}
        if adapters:
            metadata.update(library_name="peft", base_model=base, base_model_relation="adapter")
        card_tags = ["custom_code", *facts.get("tags", [])]
        card = plain_card(repo_id, SUMMARY, facts.get("license"), card_tags, **metadata)
    files: dict[str, Path | str | bytes] = {**checkpoint_files(folder, adapters), CARD_FILE: card.encode()}
    if facts:
        files[FACTS_FILE] = (json.dumps(facts, indent=2, ensure_ascii=False) + "\n").encode()
    replaced = replaced_files(adapters, variant, keeps_measured)
    return push_files(files, repo_id, replaced, token=token, revision=revision, **commit_options)
