"""Checks of numbers that a caller gives: their type, NaN and infinity, and their limits."""

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any


@dataclass(frozen=True)
class Range:
    """
    The numbers that a setting may be.

    Args:
        expected (`str`): says them in an error.
        kind (`type`): `Integral` or `Real`.
        holds (`Callable`): whether a finite number of this kind is one of them.
    """

    expected: str
    kind: type
    holds: Callable[[Any], bool]


COUNT = Range("an integer of 1 or more", Integral, lambda value: value >= 1)
POSITIVE = Range("a finite number above 0", Real, lambda value: value > 0)
NOT_NEGATIVE = Range("a finite number of 0 or more", Real, lambda value: value >= 0)


def check_number(name: str, value: Any, allowed: Range) -> None:
    """Raise a `ValueError`, which names the setting, unless its value is a number in the range."""
    is_number = isinstance(value, allowed.kind) and not isinstance(value, bool)
    if not is_number or not math.isfinite(value) or not allowed.holds(value):
        raise ValueError(f"{name} is {value!r}, expected {allowed.expected}.")


def check_numbers(
    owner: object, ranges: Mapping[str, Range], optional: Collection[str] = (), prefix: str = ""
) -> None:
    """
    Check the attributes of an object.

    Args:
        owner: has the attributes.
        ranges (`dict`): the name of each attribute, and its range.
        optional (collection of `str`): the names of those that may be `None`.
        prefix (`str`): put before the name in an error, such as `"CoSupConfig."`.

    Raises:
        `ValueError`: names the attribute.
    """
    for name, allowed in ranges.items():
        value = getattr(owner, name)
        if value is not None or name not in optional:
            check_number(prefix + name, value, allowed)
