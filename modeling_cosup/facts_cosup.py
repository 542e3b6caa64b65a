"""
The recorded facts about a checkpoint: `training_facts.json` and the plot of its losses, next to the weights.

They hold a hash of the weights that they are about, so that a model that is loaded and saved again keeps them only if
its weights are still the same. `trainer/card.py` records facts, `card_cosup` shows them in a card.
"""

import contextlib
import os
from pathlib import Path
from typing import Any, Protocol, TypedDict, cast

from huggingface_hub import metadata_load
from transformers import PreTrainedConfig
from transformers.utils import cached_file, logging
from yaml import YAMLError

from .files_cosup import read_json, write_json
from .hub_cosup import CARD_FILE, CARD_MARKER, CURVES_FILE, FACTS_FILE, RESULTS_FILE

logger = logging.get_logger(__name__)

FACTS_OF_ALL_WEIGHTS = ("license", "language", "datasets", "tags")  # facts that stay true when the weights change
FACTS_OF_OWNER = ("license", "language")  # facts that the owner of a repository may change in its card


class Metric(TypedDict, total=False):
    """One measured figure; percentages have the unit `"%"`."""

    type: str
    name: str
    value: float
    interval: list[float]  # 95 %, `[low, high]`, or empty if it is not known
    unit: str
    n: int


class ResultGroup(TypedDict, total=False):
    """The results of one evaluation set."""

    dataset: dict[str, str]  # `name` and `type`
    index_size: int | None
    metrics: list[Metric]


class TrainingRecord(TypedDict, total=False):
    """What training did."""

    instances: dict[str, int]  # counts by dataset
    passages: int | None  # distinct ones, if known
    arguments: dict[str, str]
    log: list[dict[str, Any]]
    curves: bool  # whether the losses were plotted
    top_k: int  # number of passages of a retrieval that Gen was trained with, if it is not 1


class Facts(TypedDict, total=False):
    """The content of `training_facts.json`; every field is optional."""

    weights: str | None  # hash of the weights that the other facts are about
    name: str
    base_model: str
    license: str
    language: str | list[str]
    datasets: list[str]
    tags: list[str]
    training: TrainingRecord
    results: list[ResultGroup]
    index: str
    question: str


class HashedModel(Protocol):
    """The part of [`CoSupForCausalLM`] that this module uses."""

    hub_options: dict[str, Any]

    @property
    def config(self) -> PreTrainedConfig: ...

    def hash_all_weights(self) -> str | None: ...


def load_facts(name_or_path: str | Path, **hub_options: Any) -> Facts:
    """
    Return the facts next to a checkpoint, whatever its weights are now; empty if there are none.

    Args:
        name_or_path (`str` or `Path`): folder or repository of the checkpoint.
        **hub_options: of the repository, such as `revision` and `token`, as in `from_pretrained`.
    """
    path = _checkpoint_file(name_or_path, FACTS_FILE, hub_options)
    if path is None:
        return {}
    try:
        facts = read_json(path)
    except ValueError:
        facts = None
    if not isinstance(facts, dict):  # a warning, because damaged facts are no reason to refuse to save a model
        logger.warning(f"{path} is damaged and is left out of the card.")
        return {}
    return cast(Facts, facts)


def published_facts(repo_id: str, token: str | bool | None = None, revision: str | None = None) -> Facts:
    """
    Return the facts in a repository, with the licence and the language that its card states now.

    If the branch does not exist yet, those of main: the push creates it as a copy.
    """
    for branch in (revision, None):
        options = {"token": token, "revision": branch}
        card = _checkpoint_file(repo_id, CARD_FILE, options)
        facts = load_facts(repo_id, **options)
        if card or facts:
            break
    stated: dict[str, Any] = {}
    with contextlib.suppress(ValueError, YAMLError):  # of a malformed card: the push itself raises them
        stated = (metadata_load(card) if card else None) or {}
    of_owner = {name: stated[name] for name in FACTS_OF_OWNER if stated.get(name, "unknown") != "unknown"}
    return cast(Facts, {**facts, **of_owner})


def with_published(facts: Facts, published: Facts) -> Facts:
    """Return a folder's facts and those of the repository that it is pushed to, where its owner's facts win."""
    of_owner = {name: published.get(name) for name in FACTS_OF_OWNER if name in published}
    return cast(Facts, {**published, **facts, **of_owner})


def facts_of(model: HashedModel, weights: str | None = None) -> Facts:
    """
    Return the facts of the checkpoint that a model was loaded from, as far as they still hold for its weights.

    Args:
        model ([`CoSupForCausalLM`]): its weights may have changed since.
        weights (`str`, *optional*): hash of its weights, needed if the parameters in memory are shards.
    """
    facts = load_facts(model.config._name_or_path, **_hub_options(model))
    if not facts.get("weights"):
        return facts
    weights = weights or model.hash_all_weights()
    if weights is None or weights == facts["weights"]:  # offloaded or sharded weights (None) were not trained here
        return facts
    logger.warning_once(
        "The weights changed since they were trained and evaluated; the recorded training and results are left out."
    )
    return lasting_facts(facts)


def lasting_facts(facts: Facts) -> Facts:
    """Return the facts that stay true when the weights change."""
    return cast(Facts, {name: facts.get(name) for name in FACTS_OF_ALL_WEIGHTS if name in facts})


def facts_to_push(
    folder: Path, earlier: Facts, weights: str | None, tags: str | list[str] | None = None, **given: str | None
) -> Facts:
    """
    Return the facts to record with a push: what is given here, what is in the folder, and what still holds of earlier.

    Args:
        folder (`Path`): of the checkpoint.
        earlier (`Facts`): in the repository, as far as they hold; see [`with_published`].
        weights (`str`, *optional*): hash of the weights that the facts are about.
        tags (*optional*): given with the push, appended to the recorded ones.
        **given: `index` and `license`, if they are given with the push.
    """
    stated = {name: value for name, value in given.items() if value is not None}
    facts = cast(Facts, {**with_published(load_facts(folder), earlier), **stated})
    if tags is not None:
        new_tags = [tags] if isinstance(tags, str) else tags
        facts["tags"] = list(dict.fromkeys([*facts.get("tags", []), *new_tags]))
    if facts and weights is not None:
        facts["weights"] = weights
    return facts


def carry_facts(model: HashedModel, folder: Path, weights: str | None = None) -> None:
    """
    Write the facts of a model, and the plot of its losses, to a folder in which it is saved.

    Facts that the folder holds about the same weights are left in place. Facts about other weights are removed, and so
    is a generated card that shows their results. Their `results.json` is kept under another name, which is not pushed.

    Args:
        model ([`CoSupForCausalLM`]), weights (`str`, *optional*): as in [`facts_of`].
        folder (`Path`): created if it does not exist.
    """
    folder.mkdir(parents=True, exist_ok=True)
    held = load_facts(folder).get("weights")
    if held is not None and weights is not None and held != weights:
        results = folder / RESULTS_FILE
        if results.exists():
            os.replace(results, folder / f"earlier_{RESULTS_FILE}")
    if weights is None or held != weights:
        _copy_facts(model, folder, weights)
    card = folder / CARD_FILE
    if not load_facts(folder).get("results") and card.exists() and CARD_MARKER in card.read_text(encoding="utf-8"):
        card.unlink()


def _copy_facts(model: HashedModel, folder: Path, weights: str | None) -> None:
    """Replace the facts and the plot in a folder with the ones that a model came with."""
    facts = facts_of(model, weights)
    target = folder / CURVES_FILE
    plot = None
    if facts.get("training", {}).get("curves"):
        plot = _checkpoint_file(model.config._name_or_path, CURVES_FILE, _hub_options(model))
    if plot is None:
        target.unlink(missing_ok=True)
    elif Path(plot).resolve() != target.resolve():
        target.write_bytes(Path(plot).read_bytes())
    if "training" in facts:
        facts["training"]["curves"] = plot is not None
    if facts:
        write_json(folder / FACTS_FILE, facts)
    else:
        (folder / FACTS_FILE).unlink(missing_ok=True)


def _checkpoint_file(name_or_path: str | Path, name: str, hub_options: dict[str, Any]) -> str | None:
    """Return the local path of a checkpoint's file, downloaded if necessary; `None` if there is none."""
    if not name_or_path:
        return None
    try:
        return cached_file(
            name_or_path,
            name,
            **hub_options,
            _raise_exceptions_for_gated_repo=False,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )
    except OSError:  # the repository is private, or no longer exists
        return None


def _hub_options(model: HashedModel) -> dict[str, Any]:
    """Return the options of the repository that a model was loaded from, the commit included."""
    return {**model.hub_options, "revision": getattr(model.config, "_commit_hash", None)}
