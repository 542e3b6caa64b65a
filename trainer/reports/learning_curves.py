"""Arms while they train: held-out figures at equal steps and at equal seconds, and what a step costs."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..judging.figures import MISSING, figure, shown
from .document import Block, Cell, Heading, Plot, Table, Text
from .experiment_figures import Results
from .plots import Line, can_draw, draw_line_grid
from .training_logs import TrainingLog, read_training_log

DRAWN = ("ntp_loss", "query_recall@1", "hit_rate@1", "distillation_loss")  # in the figure and in the table
PLOT = "plots/learning_curves.png"


def learning_curves(results: Results) -> dict[str, dict[str, Any]]:
    """
    Return what the logs of the trainings say of each arm.

    Returns:
        `dict`: arm -> `{"seeds", "steps", "seconds", "seconds_per_step", "peak_memory", "seconds_are_estimates",
        "curves"}`. `seconds_per_step` is a mean over seeds and `peak_memory` the largest, in GB. `curves` is name as
        logged -> list of `{"step", "seconds", "value", "low", "high"}`: means over the seeds, and their range, at the
        steps at which every trained seed of the arm was measured. What is not known is `None`. Arms without a log are
        left out.
    """
    arms: dict[str, dict[str, Any]] = {}
    for arm in results.experiment["arms"]:
        all_logs = [read_training_log(run) for run in results.runs if run["arm"] == arm and run["trained"]]
        logs = [log for log in all_logs if log is not None]
        if not logs or len(logs) < len(all_logs):
            continue
        arms[arm] = {
            "seeds": len(logs),
            "steps": max(log.steps for log in logs),
            "seconds": _mean([log.seconds for log in logs]),
            "seconds_per_step": _mean([log.seconds_per_step for log in logs]),
            "peak_memory": _largest([log.peak_memory for log in logs]),
            "seconds_are_estimates": any(log.is_estimate and log.seconds is not None for log in logs),
            "curves": _curves(logs),
        }
    return arms


def _mean(values: Sequence[float | None]) -> float | None:
    """Return the mean, or `None` if a value is not known."""
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if len(known) == len(values) else None


def _largest(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return max(known) if len(known) == len(values) else None


def _curves(logs: Sequence[TrainingLog]) -> dict[str, list[dict[str, Any]]]:
    """Return name as logged -> points, where every log has one."""
    names = dict.fromkeys(name for log in logs for point in log.points for name in point.figures)
    by_step = [{point.step: point for point in log.points} for log in logs]
    curves: dict[str, list[dict[str, Any]]] = {}
    for name in names:
        for step in sorted(by_step[0]):
            points = [points[step] for points in by_step if step in points and name in points[step].figures]
            if len(points) < len(logs):
                continue
            values = [point.figures[name] for point in points]
            at = {"step": step, "seconds": _mean([point.seconds for point in points])}
            summary = {"value": float(np.mean(values)), "low": min(values), "high": max(values)}
            curves.setdefault(name, []).append({**at, **summary})
    return curves


# ---------------------------------------------------------------------- the section of the report


def learning_blocks(arms: dict[str, dict[str, Any]], output_dir: Path) -> list[Block]:
    """Return the section of the held-out figures while training, or nothing if there are none; draw its figure."""
    logged = [name for about in arms.values() for name in about["curves"]]
    names = [f"eval_{name}" for name in DRAWN if f"eval_{name}" in logged]
    if not names:
        return []
    blocks: list[Block] = [Heading("While training")]
    if can_draw():
        draw_line_grid(
            {_title(name): (_lines(arms, name, "step"), _lines(arms, name, "seconds")) for name in names},
            ("steps", "seconds of training"),
            output_dir / PLOT,
        )
        caption = "Held-out instances, by steps (left) and by seconds of training (right); mean and range over seeds"
        blocks.append(Plot(PLOT, caption))
    blocks.append(_table(arms, names))
    note = (
        "On held-out instances, a mean over seeds. At equal steps: the last step at which all arms were measured. At "
        "equal seconds: the last measurement of each arm within the time that the fastest arm took for its last one. "
        "Seconds are without evaluations. An arm that starts from the model of another counts its own."
    )
    estimated = [arm for arm, about in arms.items() if about["seconds_are_estimates"]]
    if estimated:
        note += f" Seconds of {', '.join(estimated)} are estimates, as if every step took the same time."
    return [*blocks, Text(note, note=True)]


def cost_table(arms: dict[str, dict[str, Any]]) -> list[Block]:
    """Return a table of what a step of each arm costs in time and memory, or nothing without logs."""
    if not arms:
        return []
    rows: list[list[Cell]] = []
    for arm, about in arms.items():
        sign = "≈ " if about["seconds_are_estimates"] else ""
        seconds = _number(about["seconds"], sign + "{:,.0f} s")
        per_step = _number(about["seconds_per_step"], sign + "{:,.2f} s")
        memory = _number(about["peak_memory"], "{:,.2f} GB")
        rows.append([arm, str(about["seeds"]), f"{about['steps']:,}", seconds, per_step, memory])
    note = (
        "Seconds are without evaluations, a mean over seeds (≈: an estimate, as if every step took the same time). "
        "Memory is the largest of a process: allocated on its device or, on a CPU, resident."
    )
    header = ["arm", "seeds", "steps", "training", "a step", "peak memory"]
    return [Table(header, rows), Text(note, note=True)]


def _number(value: float | None, form: str) -> str:
    return MISSING if value is None else form.format(value)


def _title(name: str) -> str:
    entry = figure(name)
    return f"{entry.label}, {'%' if entry.scale == 'share' else entry.scale}"


def _lines(arms: dict[str, dict[str, Any]], name: str, axis: str) -> dict[str, Line]:
    """Return arm -> `(x, value, low, high)` of each point; shares are in percent."""
    factor = 100 if figure(name).scale == "share" else 1
    lines: dict[str, Line] = {}
    for arm, about in arms.items():
        points = about["curves"].get(name, [])
        known = [point for point in points if point[axis] is not None]
        lines[arm] = [(point[axis], *(factor * point[key] for key in ("value", "low", "high"))) for point in known]
    return lines


def _table(arms: dict[str, dict[str, Any]], names: Sequence[str]) -> Table:
    """Return the figures of each arm at the last step, and within the seconds, that all arms have."""
    header = [""]
    rows: list[list[Cell]] = [[arm] for arm in arms]
    for name in names:
        curves = [about["curves"].get(name, []) for about in arms.values()]
        measured = [curve for curve in curves if curve]
        steps = set.intersection(*({point["step"] for point in curve} for curve in measured))
        last_seconds = [curve[-1]["seconds"] for curve in measured]
        if steps:
            header.append(f"{figure(name).label} at step {max(steps):,}")
            for row, curve in zip(rows, curves, strict=True):
                row.append(_last_cell(curve, "step", max(steps), name))
        if None not in last_seconds:
            header.append(f"{figure(name).label} within {min(last_seconds):,.0f} s")
            for row, curve in zip(rows, curves, strict=True):
                row.append(_last_cell(curve, "seconds", min(last_seconds), name))
    return Table(header, rows)


def _last_cell(curve: list[dict[str, Any]], axis: str, limit: float, name: str) -> Cell:
    """Return the last point of a curve within a limit, with the range over seeds and its step."""
    points = [point for point in curve if point[axis] is not None and point[axis] <= limit]
    if not points:
        return MISSING
    point = points[-1]
    bounds = f"[{shown(point['low'], name)}, {shown(point['high'], name)}]"
    return shown(point["value"], name), f"{bounds} step {point['step']:,}"
