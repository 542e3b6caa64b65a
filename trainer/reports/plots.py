"""Plots of a report, drawn if matplotlib is installed. [`draw_bars`] and [`draw_curves`] draw shares, in percent."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import numpy as np

from modeling_cosup.files_cosup import replacing_file

from ..judging.figures import Measured

try:
    from matplotlib.figure import Figure
except ImportError:
    Figure = None  # type: ignore[assignment, misc]

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Curve: TypeAlias = Mapping[float, Measured]
Line: TypeAlias = Sequence[tuple[float, float, float, float]]  # x, value, and the bounds of a band around it

COLORS = ("#2f6db3", "#e08a2e", "#4d9a5b", "#b5475b", "#7b62a8", "#6b7680")
LINE_STYLES = ("-", "--", ":")
MAX_WIDTH = 14.0  # inches
MANY_GROUPS = 7  # from this number of groups on, their names are rotated


def can_draw() -> bool:
    """Return whether matplotlib is installed."""
    return Figure is not None


def draw_bars(groups: Mapping[str, Mapping[str, Measured]], labels: Mapping[str, str], path: Path) -> None:
    """
    Draw bars with 95 % intervals.

    Args:
        groups (`Mapping`): name of a group of bars -> key of a bar -> figure. A missing key leaves a gap.
        labels (`Mapping`): key of a bar -> its name in the legend. Bars and colours follow this order.
        path (`Path`): the PNG file to write.
    """
    width = max(6.0, 1.1 * len(groups) * max(1.0, len(labels) / 3))
    picture = Figure(figsize=(min(width, MAX_WIDTH), 3.4), layout="constrained")
    axes = picture.subplots()
    bar_width = 0.8 / len(labels)
    for number, (key, label) in enumerate(labels.items()):
        places: list[int] = []
        figures: list[Measured] = []
        for place, bars in enumerate(groups.values()):
            if key in bars:
                places.append(place)
                figures.append(bars[key])
        values, low, high = _percents(figures)
        offset = (number - (len(labels) - 1) / 2) * bar_width
        axes.bar(
            np.array(places, float) + offset,
            values,
            0.92 * bar_width,
            yerr=[values - low, high - values],
            label=_safe(label),
            color=COLORS[number % len(COLORS)],
            ecolor="#30363d",
            capsize=3,
            error_kw={"elinewidth": 1},
        )
    axes.set_ylim(0, 104)
    axes.set_ylabel("%")
    names = [_safe(name) for name in groups]
    if len(groups) < MANY_GROUPS:
        axes.set_xticks(range(len(groups)), names)
    else:
        axes.set_xticks(range(len(groups)), names, rotation=30, ha="right")
    _trim(axes)
    _add_legend(picture, axes)
    _save(picture, path)


def draw_curves(
    panels: Mapping[str, Mapping[str, Curve]],
    path: Path,
    xlabel: str,
    levels: Mapping[str, Mapping[str, Measured]] | None = None,
) -> None:
    """
    Draw figures as curves over a number, on a logarithmic axis, with 95 % intervals.

    Args:
        panels (`Mapping`): title of a panel -> label of a curve -> number -> figure.
        path (`Path`): the PNG file to write.
        xlabel (`str`): what the number is.
        levels (`Mapping`, *optional*): title of a panel -> label -> figure without a number, drawn as a level line.
    """
    levels = levels or {}
    rotation = 0 if len(panels) == 1 else 30
    width = 6.5 if len(panels) == 1 else 3.6 * len(panels) + 2.2
    picture = Figure(figsize=(width, 3.4), layout="constrained")
    panel_axes = picture.subplots(1, len(panels), squeeze=False)[0]
    for axes, (title, curves) in zip(panel_axes, panels.items(), strict=True):
        for number, (label, curve) in enumerate(curves.items()):
            _draw_curve(axes, label, curve, number)
        for number, (label, level) in enumerate(levels.get(title, {}).items()):
            color = COLORS[number % len(COLORS)]
            axes.axhline(100 * level["value"], linestyle="--", linewidth=1.2, color=color, label=_safe(label))
        ticks = sorted(set().union(*curves.values()))
        axes.set_xscale("log")
        axes.set_xticks(ticks, [f"{tick:,g}" for tick in ticks], rotation=rotation)
        axes.minorticks_off()
        axes.set_ylim(0, 103)
        axes.set_title(_safe(f"{title}, %"), fontsize=10)
        axes.set_xlabel(_safe(xlabel), fontsize=9)
        _trim(axes)
    _add_legend(picture, panel_axes[0])
    _save(picture, path)


def _draw_curve(axes: "Axes", label: str, curve: Curve, number: int) -> None:
    xs = sorted(curve)
    values, low, high = _percents([curve[x] for x in xs])
    color = COLORS[number % len(COLORS)]
    style = LINE_STYLES[number // len(COLORS) % len(LINE_STYLES)]
    axes.plot(xs, values, marker="o", markersize=4, label=_safe(label), color=color, linestyle=style)
    axes.fill_between(xs, low, high, alpha=0.13, color=color, linewidth=0)


def draw_lines(
    panels: Mapping[str, Mapping[str, Mapping[float, tuple[float, float]]]], path: Path, xlabel: str, ylabel: str
) -> None:
    """
    Draw values that are not shares, such as log-likelihoods, as lines over a number, one panel next to another.

    Args:
        panels (`Mapping`): title of a panel -> label of a line -> number -> `(value, deviation)`. The deviation is
            drawn as an error bar; NaN or 0 draws none.
        path (`Path`): the PNG file to write.
        xlabel (`str`), ylabel (`str`): what the numbers and the values are.
    """
    picture = Figure(figsize=(4.2 * len(panels) + 2.2, 3.6), layout="constrained")
    panel_axes = picture.subplots(1, len(panels), squeeze=False, sharey=True)[0]
    for axes, (title, lines) in zip(panel_axes, panels.items(), strict=True):
        for number, (label, points) in enumerate(lines.items()):
            numbers = sorted(points)
            values, deviations = np.array([points[at] for at in numbers], float).T
            axes.errorbar(
                numbers,
                values,
                yerr=np.nan_to_num(deviations),
                label=_safe(label),
                color=COLORS[number % len(COLORS)],
                linestyle=LINE_STYLES[number // len(COLORS) % len(LINE_STYLES)],
                marker="o",
                markersize=4,
                capsize=3,
            )
        ticks = sorted(set().union(*lines.values()))
        axes.set_xticks(ticks, [f"{tick:,g}" for tick in ticks])
        axes.set_title(_safe(title), fontsize=10)
        axes.set_xlabel(_safe(xlabel), fontsize=9)
        _trim(axes)
    panel_axes[0].set_ylabel(_safe(ylabel), fontsize=9)
    _add_legend(picture, panel_axes[0])
    _save(picture, path)


def draw_line_grid(rows: Mapping[str, Sequence[Mapping[str, Line]]], xlabels: Sequence[str], path: Path) -> None:
    """
    Draw lines with bands: a row of panels for each quantity, a column for each x axis. A row shares its y axis.

    Args:
        rows (`Mapping`): name of a quantity -> for each column, label of a line -> its points. A label has the same
            colour in all panels; a line without points is left out of its panel.
        xlabels (`Sequence[str]`): what the numbers of each column are.
        path (`Path`): the PNG file to write.
    """
    size = (4.2 * len(xlabels) + 2.2, 2.9 * len(rows) + 0.4)
    picture = Figure(figsize=size, layout="constrained")
    grid = picture.subplots(len(rows), len(xlabels), squeeze=False, sharey="row", sharex="col")
    for row_axes, (title, panels) in zip(grid, rows.items(), strict=True):
        for axes, lines in zip(row_axes, panels, strict=True):
            for number, (label, points) in enumerate(lines.items()):
                _draw_line(axes, label, points, number)
            axes.locator_params(axis="x", integer=True)
            _trim(axes)
        row_axes[0].set_ylabel(_safe(title), fontsize=9)
    for axes, xlabel in zip(grid[-1], xlabels, strict=True):
        axes.set_xlabel(_safe(xlabel), fontsize=9)
    _add_legend(picture, grid[0][0])
    _save(picture, path)


def _draw_line(axes: "Axes", label: str, points: Line, number: int) -> None:
    xs, values, low, high = np.array(points, float).reshape(-1, 4).T
    color = COLORS[number % len(COLORS)]
    style = LINE_STYLES[number // len(COLORS) % len(LINE_STYLES)]
    axes.plot(xs, values, marker="o", markersize=3, label=_safe(label), color=color, linestyle=style)
    axes.fill_between(xs, low, high, alpha=0.13, color=color, linewidth=0)


def draw_histograms(scores: Mapping[str, tuple[Sequence[float], Sequence[float]]], path: Path) -> None:
    """
    Draw histograms of retrieval scores, one panel per task.

    Args:
        scores (`Mapping`): task -> scores of the gold passages, scores of the others.
        path (`Path`): the PNG file to write.
    """
    columns = min(3, len(scores))
    rows = math.ceil(len(scores) / columns)
    picture = Figure(figsize=(3.6 * columns + 0.6, 2.7 * rows), layout="constrained")
    panels = list(picture.subplots(rows, columns, squeeze=False).flat)
    for axes, (task, (gold, others)) in zip(panels, scores.items(), strict=False):
        labels = [f"gold ({len(gold)})", f"not gold ({len(others)})"]
        bins = np.histogram_bin_edges([*gold, *others], bins=24)
        axes.hist([gold, others], bins=bins, stacked=True, color=[COLORS[2], COLORS[3]], label=labels)
        axes.set_title(_safe(task), fontsize=10)
        axes.set_xlabel("score", fontsize=9)
        axes.legend(frameon=False, fontsize=8)
        _trim(axes)
    for axes in panels[len(scores) :]:
        axes.set_axis_off()
    _save(picture, path)


def _percents(figures: Sequence[Measured]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return values, lower and upper bounds in percent, each of shape `(number of figures,)`."""
    values = np.array([figure["value"] for figure in figures], float)
    # A value whose interval is not known has no error bar.
    bounds = np.array([figure["interval"] or [figure["value"]] * 2 for figure in figures], float).reshape(-1, 2)
    low = np.minimum(bounds[:, 0], values)  # rounding can put a bound on the wrong side of the value
    high = np.maximum(bounds[:, 1], values)
    return 100 * values, 100 * low, 100 * high


def _trim(axes: "Axes") -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", alpha=0.25)
    axes.set_axisbelow(True)


def _add_legend(picture: Figure, axes: "Axes") -> None:
    handles, labels = axes.get_legend_handles_labels()
    picture.legend(handles, labels, frameon=False, loc="outside right upper", fontsize=9)


def _save(picture: Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing_file(path) as unfinished:
        picture.savefig(unfinished, format="png", dpi=130)


def _safe(text: str) -> str:
    """Escape dollar signs, which would start a formula."""
    return text.replace("$", r"\$")
