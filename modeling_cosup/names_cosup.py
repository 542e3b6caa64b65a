"""Misspelt names of fields, and the right names that are nearest to them."""

import difflib
import functools
from collections.abc import Mapping
from typing import Any


@functools.lru_cache(1024)
def nearest_name(name: str, names: tuple[str, ...]) -> str | None:
    """Return the one of `names`, all lower-case, that `name` nearly is, if there is one."""
    close = difflib.get_close_matches(name.lower(), names, n=1, cutoff=0.8)
    return close[0] if close else None


def refuse_misspelt(value: Mapping[str, Any], names: tuple[str, ...], where: str, field: str = "") -> None:
    """
    Raise `ValueError` if one of `names` is missing and another key is nearly the same, such as "titel" for "title".

    Other keys are allowed, since datasets have further columns. A key with `None` counts as missing, since Arrow fills
    in `None`.
    """
    if None not in map(value.get, names):
        return
    missing = tuple(name for name in names if value.get(name) is None)
    for key in value:
        nearest = nearest_name(str(key), missing)
        if nearest is not None and value[key] is not None:
            raise ValueError(f"{where}: unknown key {field}{key}; did you mean {nearest!r}?")
