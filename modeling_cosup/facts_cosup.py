"""
What was recorded of a checkpoint: `training_facts.json` and the picture of its losses, files next to the weights.

The facts name a hash of the weights that they are about. A model that is loaded and saved again takes them along only
if its weights are still the same.
`trainer/card.py` records them, `card_cosup.py` shows them.
"""

from pathlib import Path

from transformers.utils import cached_file, logging

from .files_cosup import read_json, write_json

logger = logging.get_logger(__name__)

FACTS_FILE = "training_facts.json"
CURVES_FILE = "loss_curves.png"
FACTS_OF_ALL_WEIGHTS = ("license", "language", "datasets", "tags")  # what stays true when the weights change


def load_facts(name_or_path, revision=None):
    """
    The facts next to a checkpoint, whatever its weights are now.

    Args:
        name_or_path (`str`): folder or repository of the checkpoint.
        revision (`str`, *optional*): of the repository.

    Returns:
        `dict`: `weights` (hash of the weights that the rest is about), `name`, `base_model`, `license`, `language`,
            `datasets`, `tags`, `training`, `results`, `index` and `question`, each optional. Empty where there are none.
            `CoSupTrainer.create_model_card` records them.
    """
    path = beside_checkpoint(name_or_path, FACTS_FILE, revision)
    try:
        facts = {} if path is None else read_json(path)
    except ValueError:
        facts = None
    if not isinstance(facts, dict):  # no reason not to save a model
        logger.warning(f"{path} is damaged and is left out of the card.")
        return {}
    return facts


def beside_checkpoint(name_or_path, name, revision=None):
    """Path of a file of a checkpoint, downloaded if need be; `None` where it has none, or the Hub cannot be asked."""
    if not name_or_path:
        return None
    quiet = ("gated_repo", "missing_entries", "connection_errors")
    try:
        return cached_file(
            name_or_path, name, revision=revision, **{f"_raise_exceptions_for_{kind}": False for kind in quiet}
        )
    except OSError:  # the repository is private, or is no longer there
        return None


def facts_of(model, weights=None):
    """
    Facts of the checkpoint that a model was loaded from: the ones that still hold for its weights, `dict`.

    Args:
        model ([`CoSupForCausalLM`]): its weights may have changed since.
        weights (`str`, *optional*): their hash, where the parameters in memory are shards.
    """
    facts = load_facts(*_source(model))
    if not facts.get("weights"):
        return facts
    weights = weights or model.hash_all_weights()
    if weights in (None, facts["weights"]):  # what is offloaded or sharded here was not trained here
        return facts
    logger.warning_once(
        "The weights changed since they were trained and evaluated; the recorded training and results are left out."
    )
    return {name: facts[name] for name in FACTS_OF_ALL_WEIGHTS if name in facts}


def carry_facts(model, folder, weights=None):
    """
    Write the facts of a model, and the picture of its losses, to a folder where it is saved.

    What the folder holds of these weights stays; what it says of others goes, and so does a card that shows it.

    Args:
        model ([`CoSupForCausalLM`]), weights (`str`, *optional*): as of [`facts_of`].
        folder (`Path`): created if need be.
    """
    folder.mkdir(parents=True, exist_ok=True)
    facts = load_facts(folder)
    if weights is not None and facts.get("weights") == weights:
        return
    facts = facts_of(model, weights)
    source, revision = _source(model)
    picture = beside_checkpoint(source, CURVES_FILE, revision) if facts.get("training", {}).get("curves") else None
    if picture is None:
        (folder / CURVES_FILE).unlink(missing_ok=True)
    elif Path(picture).resolve() != (folder / CURVES_FILE).resolve():
        (folder / CURVES_FILE).write_bytes(Path(picture).read_bytes())
    if "training" in facts:
        facts = {**facts, "training": {**facts["training"], "curves": picture is not None}}
    if facts:
        write_json(folder / FACTS_FILE, facts)
    else:
        (folder / FACTS_FILE).unlink(missing_ok=True)


def _source(model):
    """Folder or repository that a model was loaded from, and the commit."""
    return model.config._name_or_path, getattr(model.config, "_commit_hash", None)
