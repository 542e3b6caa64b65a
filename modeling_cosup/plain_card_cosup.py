"""Which card a push writes: the package's own, or a plain one when only the checkpoint is available."""

from huggingface_hub import CardData

from .hub_cosup import CARD_MARKER


def package_cards():
    """The module [`card_cosup`]; `None` in a process that has only a checkpoint, which writes [`plain_card`] instead."""
    try:
        from modeling_cosup import card_cosup
    except ImportError:
        return None
    return card_cosup


def plain_card(name, summary, license=None, tags=(), **metadata):
    """
    A card for its owner to complete.

    Args:
        name (`str`): of what it describes, and
        summary (`str`): in a sentence.
        license (`str`, *optional*), tags (sequence of `str`), **metadata: as the Hub specifies them.

    Returns:
        `str`: of the file `README.md`.
    """
    data = CardData(license=license or "unknown", tags=list(dict.fromkeys(["cosup", *tags])), **metadata)
    return f"---\n{data.to_yaml()}\n---\n{CARD_MARKER}\n\n# {name}\n\n{summary}\n"
