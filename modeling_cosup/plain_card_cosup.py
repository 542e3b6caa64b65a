"""
The plain card that is written if only a checkpoint's code is available; its owner has to complete it.

The full cards of `card_cosup` need the installed package.
"""

from collections.abc import Sequence
from types import ModuleType
from typing import Any

from huggingface_hub import CardData

from .hub_cosup import CARD_MARKER


def package_cards() -> ModuleType | None:
    """Return the module [`card_cosup`], or `None` in a process that has only a checkpoint's code."""
    try:
        from modeling_cosup import card_cosup
    except ImportError:
        return None
    return card_cosup


def package_memory_cards() -> ModuleType | None:
    """Return the module [`memory_card_cosup`], or `None` in a process that has only a checkpoint's code."""
    try:
        from modeling_cosup import memory_card_cosup
    except ImportError:
        return None
    return memory_card_cosup


def plain_card(name: str, summary: str, license: str | None = None, tags: Sequence[str] = (), **metadata: Any) -> str:
    """
    Return the text of a short `README.md` for its owner to complete.

    Args:
        name (`str`): heading of the card.
        summary (`str`): one sentence.
        license (`str`, *optional*), tags (sequence of `str`), **metadata: as the Hub specifies them. The licence
            defaults to `unknown`.
    """
    all_tags = list(dict.fromkeys(["cosup", *tags]))
    data = CardData(license=license or "unknown", tags=all_tags, **metadata)
    return f"---\n{data.to_yaml()}\n---\n{CARD_MARKER}\n\n# {name}\n\n{summary}\n"
