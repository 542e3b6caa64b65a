"""The targets of a distillation, and checks of the arguments that retrieve candidates; imports no torch."""

import math
from typing import Any

# the targets of each distillation, the default first, with their default temperatures; None: scores as they are
DISTILLATIONS: dict[str, dict[str, float | None]] = {
    "attention_distillation": {"attention": 0.02, "attention_shares": None},
    "perplexity_distillation": {"perplexity": 0.1, "leave_one_out": 0.1, "emdr": None},
}
SOURCES = (None, "index", "instance")  # of candidates


def check_candidates(args: Any) -> None:
    """
    Check the arguments of candidates and of distillation, before a model is loaded.

    Args:
        args ([`CoSupTrainingArguments`]): their module imports this one, so it cannot be imported here.

    Raises:
        `ValueError`: naming the argument.
    """
    _check_distillation(args)
    if args.candidates_from is None:
        _refuse(args, ("rerank_candidates", "index_factory", "shuffle_candidates", "log_indicators"))
        return
    if not args.distills and args.supervision != "ntp":
        raise ValueError(
            f"candidates_from retrieves passages for instances without one, which supervision={args.supervision!r}"
            " cannot train: choose 'ntp', 'attention_distillation' or 'perplexity_distillation'."
        )
    for name in ("num_candidates", "refresh_index_steps"):
        if getattr(args, name) < 1:
            raise ValueError(f"{name} is {getattr(args, name)}, expected 1 or more.")
    if args.distills and args.num_candidates == 1:
        raise ValueError(
            "num_candidates=1 with a distillation: there is nothing to compare a single passage with. Expected 2 or"
            " more."
        )
    if args.rerank_candidates is not None and args.rerank_candidates <= args.num_candidates:
        raise ValueError(
            f"rerank_candidates is {args.rerank_candidates}, expected more than num_candidates, {args.num_candidates}."
        )
    if args.index_factory is not None and args.candidates_from == "instance":
        raise ValueError(
            "index_factory makes the search of an index approximate, and candidates_from='instance' searches each"
            " instance's own candidates exactly: leave it out."
        )


def _check_distillation(args: Any) -> None:
    """Check the target of a distillation."""
    if not args.distills:
        for name in ("distillation_target", "target_temperature"):
            if getattr(args, name) is not None:
                raise ValueError(f"{name} is of a distillation, and supervision={args.supervision!r} is none.")
        return
    targets = DISTILLATIONS[args.supervision]
    if args.distillation_target not in (None, *targets):
        raise ValueError(
            f"distillation_target is {args.distillation_target!r}, but supervision={args.supervision!r} has"
            f" {', '.join(map(repr, targets))}."
        )
    if args.target_temperature is not None and not 0 < args.target_temperature < math.inf:
        raise ValueError(f"target_temperature is {args.target_temperature}, expected a number above 0.")


def _refuse(args: Any, names: tuple[str, ...]) -> None:
    """Raise for arguments that are set and mean nothing without candidates."""
    for name in names:
        if getattr(args, name):
            raise ValueError(f"{name} has no meaning without candidates: give candidates_from, or leave it out.")
