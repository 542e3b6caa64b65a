"""The pictures of a report, drawn with matplotlib where it is installed."""

import numpy as np

from .scoring import METRICS

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
    _finish(figure, axes, path, METRICS["success@1"][0].replace("1", "k") + ", %")


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
