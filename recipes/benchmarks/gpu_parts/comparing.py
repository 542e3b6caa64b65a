"""Errors next to their bounds: what a correctness check returns."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

HEADER = ["what", "dtype", "error", "bound"]


@dataclass
class Comparison:
    """
    One comparison.

    Args:
        what (`str`): what was compared with what.
        dtype (`str`): the dtype of the computation.
        error (`float`): what was measured.
        bound (`float`, *optional*): the most that is allowed; `None` where the error is only reported.
    """

    what: str
    dtype: str
    error: float
    bound: float | None

    @property
    def holds(self) -> bool:
        """Whether the error is within its bound; NaN never is."""
        return math.isfinite(self.error) and (self.bound is None or self.error <= self.bound)


@dataclass
class Comparisons:
    """The comparisons of a check."""

    rows: list[Comparison] = field(default_factory=list)

    def add(self, what: str, dtype: torch.dtype, error: float, bound: float | None) -> None:
        """Add a comparison; see [`Comparison`]."""
        self.rows.append(Comparison(what, name_of(dtype), float(error), bound))

    def add_equal(self, what: str, dtype: torch.dtype, equal: bool) -> None:
        """Add a comparison of things that must be equal: the error is 0 or 1."""
        self.add(what, dtype, 0.0 if equal else 1.0, 0.0)

    def add_half(self, what: str, error: float, own_error: float, floor: float) -> None:
        """
        Add a comparison in bfloat16 with float32.

        Args:
            what (`str`): see [`Comparison`].
            error (`float`): distance of the result in bfloat16 to the reference in float32.
            own_error (`float`): distance of the plain computation in bfloat16 to the same reference: what the dtype
                costs by itself. The bound is twice this.
            floor (`float`): the least bound, since `own_error` may happen to be tiny.
        """
        self.add(what, torch.bfloat16, error, max(2 * own_error, floor))

    def result(self, **more: Any) -> dict[str, Any]:
        """Return the result of a check: summary, missed bounds, and the table of all comparisons."""
        missed = [f"{row.what} ({row.dtype}): {row.error:.2e} > {row.bound}" for row in self.rows if not row.holds]
        bounded = [row for row in self.rows if row.bound is not None]
        held = f"{sum(row.holds for row in bounded)} of {len(bounded)} bounds hold"
        table = [[row.what, row.dtype, f"{row.error:.1e}", _bound(row.bound)] for row in self.rows]
        return {
            "summary": "; ".join([held, *more.pop("notes", [])]),
            "missed": missed,
            "comparisons": [asdict(row) for row in self.rows],
            "tables": [{"title": "errors and bounds", "header": HEADER, "rows": table}],
            **more,
        }


def _bound(bound: float | None) -> str:
    return "—" if bound is None else f"{bound:.1e}"


def name_of(dtype: torch.dtype) -> str:
    """Return the name of a dtype, without `torch.`."""
    return str(dtype).removeprefix("torch.")


def largest_difference(first: torch.Tensor, second: torch.Tensor) -> float:
    """Return the largest absolute difference of two tensors of the same shape."""
    return float((first.double().cpu() - second.double().cpu()).abs().max())


def relative_error(actual: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> float:
    """Return ‖actual − expected‖ / ‖expected‖ over all tensors of two dictionaries with the same names."""
    if actual.keys() != expected.keys():
        raise ValueError(f"Only one of the two has {sorted(actual.keys() ^ expected.keys())[:5]}.")
    squared_error = 0.0
    squared_norm = 0.0
    for name, tensor in expected.items():
        squared_error += float((actual[name].double().cpu() - tensor.double().cpu()).square().sum())
        squared_norm += float(tensor.double().square().sum())
    return (squared_error / squared_norm) ** 0.5


def share_of_other_tokens(rows: Sequence[Sequence[int]], expected: Sequence[Sequence[int]]) -> float:
    """Return the share of tokens that differ, position by position; what one row lacks counts as different."""
    num_different = 0
    num_tokens = 0
    for row, expected_row in zip(rows, expected, strict=True):
        length = max(len(row), len(expected_row))
        num_equal = sum(token == other for token, other in zip(row, expected_row, strict=False))
        num_different += length - num_equal
        num_tokens += length
    return num_different / max(1, num_tokens)
