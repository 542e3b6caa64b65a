"""The goals of the speed part: what was hoped for on a large GPU, and whether a run reached it."""

from typing import Any

from gpu_parts.runner import Context


def goal(
    context: Context, name: str, value: float | None, at_least: float | None = None, at_most: float | None = None
) -> dict[str, Any]:
    """
    Return a goal next to what was measured.

    A goal is for a large GPU and full shapes; elsewhere `met` is `None`. A missed goal is a result, and no failure.

    Args:
        context (`Context`): of the check.
        name (`str`): what is measured, with its unit.
        value (`float` or `None`): what was measured; `None` if it could not be, which misses the goal.
        at_least, at_most (`float`, *optional*): one of them is the goal.
    """
    met = None
    if context.device.type == "cuda" and not context.tiny:
        met = value is not None and (value >= at_least if at_least is not None else value <= at_most)
    return {"goal": name, "at_least": at_least, "at_most": at_most, "measured": value, "met": met}


def goal_text(goals: list[dict[str, Any]]) -> str:
    """Return what became of some goals, for the summary of a check."""
    texts = []
    for entry in goals:
        bound = f"at least {entry['at_least']:g}" if entry["at_least"] is not None else f"at most {entry['at_most']:g}"
        verdict = {None: "not judged here", True: "reached", False: "MISSED"}[entry["met"]]
        measured = "not measured" if entry["measured"] is None else f"{entry['measured']:.3g}"
        texts.append(f"goal {entry['goal']} {bound}: {verdict} ({measured})")
    return "; ".join(texts)
