"""The pictures of a report, drawn with matplotlib where it is installed."""

import numpy as np

from ..judging import figures as vocabulary

try:
    from matplotlib.figure import Figure
except ImportError:
    Figure = None  # type: ignore[assignment, misc]

COLORS = ("#2f6db3", "#e08a2e", "#4d9a5b", "#b5475b", "#7b62a8", "#6b7680")


def can_draw():
    """Whether matplotlib is installed."""
    return Figure is not None


def draw_bars(groups, names, labels, path, scale=100, ylabel="%"):
    """
    Bars with 95 % intervals.

    Args:
        groups (`dict[str, dict[str, dict]]`): by place on the axis: figures by name; one that lacks a name has no bar there.
        names (`list[str]`): of the figures, one colour each.
        labels (`list[str]`): what the legend says of each.
        path (`Path`): of the PNG.
        scale (`float`), ylabel (`str`): of the axis.
    """
    figure, axes = _new(max(6.0, 1.1 * len(groups) * max(1, len(names) / 3)))
    width = 0.8 / len(names)
    for number, (name, label) in enumerate(zip(names, labels, strict=True)):
        places = [i for i, own in enumerate(groups.values()) if name in own]
        found = [own[name] for own in groups.values() if name in own]
        values = scale * np.array([each["value"] for each in found])
        errors = np.abs(scale * np.array([each["interval"] for each in found]).reshape(-1, 2).T - values)
        offset = (number - (len(names) - 1) / 2) * width
        bars = {"color": COLORS[number % len(COLORS)], "ecolor": "#30363d", "capsize": 3, "error_kw": {"elinewidth": 1}}
        axes.bar(np.array(places, float) + offset, values, 0.92 * width, yerr=errors, label=label, **bars)
    if scale == 100:
        axes.set_ylim(0, 104)
    axes.set_xticks(range(len(groups)), list(groups), rotation=0 if len(groups) < 7 else 30, ha="center" if len(groups) < 7 else "right")
    _finish(figure, axes, path, ylabel)


def draw_curves(curves, path):
    """Recall@k of rankings: `curves` is `{label: {k: figure}}`."""
    figure, axes = _new(6.5)
    for number, (label, points) in enumerate(curves.items()):
        ks, color = sorted(points), COLORS[number % len(COLORS)]
        low, high = np.array([points[k]["interval"] for k in ks]).T * 100
        style = "-" if number < len(COLORS) else "--"
        axes.plot(ks, [100 * points[k]["value"] for k in ks], marker="o", markersize=4, label=label, color=color, linestyle=style)
        axes.fill_between(ks, low, high, alpha=0.13, color=color, linewidth=0)
    axes.set_xscale("log")
    ticks = sorted({k for points in curves.values() for k in points})
    axes.set_xticks(ticks, [str(k) for k in ticks])
    axes.minorticks_off()
    axes.set_xlabel("k")
    axes.set_ylim(0, 103)
    _finish(figure, axes, path, vocabulary.figure("query_recall@1").label.replace("1", "k") + ", %")


def draw_scores(scores, path):
    """Histograms of retrieval scores, of right and of wrong passages: `scores` is `{task: (right, wrong)}`, each a list of numbers."""
    columns = min(3, len(scores))
    rows = -(-len(scores) // columns)
    figure = Figure(figsize=(3.6 * columns + 0.6, 2.7 * rows), layout="constrained")
    for axes, (task, (right, wrong)) in zip(figure.subplots(rows, columns, squeeze=False).flat, scores.items(), strict=False):
        bins = np.histogram_bin_edges([*right, *wrong], bins=24)
        axes.hist([right, wrong], bins=bins, stacked=True, color=[COLORS[2], COLORS[3]], label=[f"gold ({len(right)})", f"not gold ({len(wrong)})"])
        axes.set_title(_safe(task), fontsize=10)
        axes.set_xlabel("score", fontsize=9)
        axes.legend(frameon=False, fontsize=8)
        _trim(axes)
    for axes in figure.axes[len(scores) :]:
        axes.set_axis_off()
    _save(figure, path)


def draw_lines(panels, levels, path, xlabel):
    """
    Curves over a number, on a logarithmic axis, with 95 % intervals; one panel for each metric.

    Args:
        panels (`dict[str, dict[str, dict[float, dict]]]`): metric -> label of the curve -> number -> figure.
        levels (`dict[str, dict[str, dict]]`): metric -> label -> figure that no number belongs to: a level line.
        path (`Path`): of the PNG.
        xlabel (`str`): what the number is.
    """
    figure = Figure(figsize=(3.6 * len(panels) + 2.2, 3.4), layout="constrained")
    for axes, (metric, curves) in zip(figure.subplots(1, len(panels), squeeze=False).flat, panels.items(), strict=True):
        for number, (label, points) in enumerate(curves.items()):
            xs, color = sorted(points), COLORS[number % len(COLORS)]
            low, high = 100 * np.array([points[x]["interval"] for x in xs]).reshape(-1, 2).T
            axes.plot(xs, [100 * points[x]["value"] for x in xs], marker="o", markersize=4, label=_safe(label), color=color)
            axes.fill_between(xs, low, high, alpha=0.13, color=color, linewidth=0)
        for number, (label, level) in enumerate(levels.get(metric, {}).items()):
            axes.axhline(100 * level["value"], linestyle="--", linewidth=1.2, color=COLORS[number % len(COLORS)], label=_safe(label))
        ticks = sorted({x for points in curves.values() for x in points})
        axes.set_xscale("log")
        axes.set_xticks(ticks, [f"{x:,g}" for x in ticks], rotation=30)
        axes.minorticks_off()
        axes.set_ylim(0, 103)
        axes.set_title(_safe(f"{metric}, %"), fontsize=10)
        axes.set_xlabel(_safe(xlabel), fontsize=9)
        _trim(axes)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, frameon=False, loc="outside right upper", fontsize=9)
    _save(figure, path)


def _new(width):
    figure = Figure(figsize=(min(width, 14), 3.4), layout="constrained")
    return figure, figure.subplots()


def _trim(axes):
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", alpha=0.25)
    axes.set_axisbelow(True)


def _finish(figure, axes, path, ylabel):
    axes.set_ylabel(ylabel)
    _trim(axes)
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, [_safe(label) for label in labels], frameon=False, loc="outside right upper", fontsize=9)
    for text in axes.get_xticklabels():
        text.set_text(_safe(text.get_text()))
    _save(figure, path)


def _save(figure, path):
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}")
    figure.savefig(unfinished, format="png", dpi=130)
    unfinished.replace(path)


def _safe(text):
    """Dollar signs would start a formula."""
    return text.replace("$", r"\$")
