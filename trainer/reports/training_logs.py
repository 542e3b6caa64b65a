"""What the log of a training says: held-out figures over steps and seconds, the time of a step, and peak memory."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from modeling_cosup.files_cosup import read_json

from ..judging.figures import figure


@dataclass
class Point:
    """
    A measurement while training.

    Args:
        step (`int`): optimiser steps taken.
        seconds (`float`, *optional*): seconds spent training until then, without evaluations; `None` if not known.
        figures (`dict[str, float]`): name as logged, such as `"eval_ntp_loss"` -> value.
    """

    step: int
    seconds: float | None
    figures: dict[str, float] = field(default_factory=dict)


@dataclass
class TrainingLog:
    """
    The log of a training.

    Args:
        steps (`int`): optimiser steps taken.
        seconds (`float`, *optional*): seconds spent training, without evaluations; `None` if not known.
        is_estimate (`bool`): whether all seconds are estimates, see [`read_training_log`].
        peak_memory (`float`, *optional*): largest memory of a process, in GB; `None` if not known.
        points (`list[Point]`): the measurements on held-out instances, in the order of their steps.
    """

    steps: int
    seconds: float | None
    is_estimate: bool
    peak_memory: float | None
    points: list[Point]

    @property
    def seconds_per_step(self) -> float | None:
        """Seconds of a step, as a mean over the training; `None` if not known."""
        return self.seconds / self.steps if self.seconds is not None and self.steps else None


def read_training_log(run: dict[str, Any]) -> TrainingLog | None:
    """
    Read the log of a run.

    A log of an older version has no `training_seconds`. They are then estimated: the runtime of the training, without
    its evaluations, is divided equally among its steps. If such a training was resumed, they are unknown.

    Args:
        run (`dict`): see [`~trainer.reports.experiment_figures.Results`].

    Returns:
        [`TrainingLog`], or `None` if the run is not trained, or its folder is gone.
    """
    path = Path(run.get("folder", ""), "model", "trainer_state.json")
    if not run["trained"] or not path.is_file():
        return None
    state = read_json(path)
    history: list[dict[str, Any]] = state["log_history"]
    steps = state["global_step"]
    logged = [entry["training_seconds"] for entry in history if "training_seconds" in entry]
    seconds = logged[-1] if logged else None
    is_estimate = not logged
    if not logged and not run["trained"]["resumed"]:
        seconds = _estimated_seconds(history)
    points: dict[int, Point] = {}
    for entry in history:
        figures = {name: value for name, value in entry.items() if _is_held_out(name)}
        if not figures:
            continue
        at = entry.get("training_seconds")
        if is_estimate and seconds is not None and steps:
            at = seconds * entry["step"] / steps
        point = points.setdefault(entry["step"], Point(entry["step"], at))
        point.figures = {**figures, **point.figures}  # the first evaluation at a step counts
        point.seconds = at if point.seconds is None else point.seconds
    peaks = [entry["peak_memory"] for entry in history if "peak_memory" in entry]
    in_order = [points[step] for step in sorted(points)]
    return TrainingLog(steps, seconds, is_estimate, peaks[-1] if peaks else None, in_order)


def _estimated_seconds(history: list[dict[str, Any]]) -> float | None:
    evaluations = 0.0
    for entry in history:
        evaluations += entry.get("eval_runtime", 0.0)
        if "train_runtime" in entry:  # later evaluations are no part of it
            return max(0.0, entry["train_runtime"] - evaluations)
    return None


def _is_held_out(name: str) -> bool:
    """Return whether a name in the log is a held-out figure of the vocabulary that is not a count."""
    if not name.startswith("eval_"):
        return False
    try:
        return figure(name).scale != "count"
    except KeyError:  # eval_runtime, or a figure of one of several evaluation sets
        return False
