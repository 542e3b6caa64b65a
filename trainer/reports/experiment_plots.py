"""The plots of an experiment: bars for the averages in each setting, or curves over an option or the corpus size."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeAlias

from ..judging.figures import Measured, figure
from .document import Block, Heading, Plot, Text
from .experiment_figures import ALL, Place, Results
from .plots import Curve, can_draw, draw_bars, draw_curves

Curves: TypeAlias = Mapping[str, Curve]


def experiment_plots(results: Results, output_dir: Path) -> list[Block]:
    """Draw the plots into `output_dir/plots` and return the blocks that show them."""
    if not can_draw():
        return [Text("Without matplotlib there are no plots: pip install matplotlib", note=True)]
    grounding = "gr" if "gr" in results.names else "k_precision"
    names = [name for name in ("ret", "cor", grounding, "query_recall@1") if name in results.names]
    levels: dict[str, dict[str, Measured]] = {}
    if results.experiment["corpus_sizes"]:
        xlabel = "passages in the corpus"
        panels = {figure(name).label: _over_corpus_sizes(results, name) for name in names}
    elif results.experiment["axis"]:
        xlabel = results.experiment["axis"]
        panels = {figure(name).label: _over_option(results, name) for name in names}
        levels = {figure(name).label: _without_option(results, name) for name in names}
    else:
        return [Heading("Plots"), *_bars(results, names, output_dir)]
    draw_curves(panels, output_dir / "plots" / "curves.png", xlabel, levels)
    return [Heading("Plots"), Plot("plots/curves.png", f"Averages by {xlabel}, with 95 % intervals over questions")]


def _bars(results: Results, names: list[str], output_dir: Path) -> list[Block]:
    blocks: list[Block] = []
    for number, setting in enumerate(results.settings):
        groups: dict[str, dict[str, Measured]] = {}
        for place in _shown_groups(results, setting):
            for name in names:
                groups[f"{figure(name).label}\n{place.name}"] = _by_line(results, place, name)
        labels = {line: results.label(line) for line in results.lines}
        path = f"plots/averages-{number}.png"
        draw_bars(groups, labels, output_dir / path)
        blocks.append(Plot(path, f"{setting}: averages over tasks, with 95 % intervals over questions"))
    return blocks


def _over_corpus_sizes(results: Results, name: str) -> Curves:
    """Return a curve over the sizes of the corpora for each line and group."""
    curves: dict[str, dict[float, Measured]] = {}
    for setting in results.settings:
        size = next(about["size"] for about in results.meaning.values() if about["setting"] == setting)
        for place in _shown_groups(results, setting):
            for line, measured in _by_line(results, place, name).items():
                curves.setdefault(f"{results.label(line)}, {place.name}", {})[size] = measured
    return curves


def _over_option(results: Results, name: str) -> Curves:
    """Return a curve over the option that the arms set for each setting, group and mode."""
    curves: dict[str, dict[float, Measured]] = {}
    for setting in results.settings:
        for place in _shown_groups(results, setting):
            for line, measured in _by_line(results, place, name).items():
                option = _option(results, line)
                if option is None:
                    continue
                label = f"{setting}, {place.name}"
                if len(results.modes) > 1:
                    label += f", {results.mode_label(line)}"
                curves.setdefault(label, {})[float(option)] = measured
    return curves


def _without_option(results: Results, name: str) -> dict[str, Measured]:
    """Return the figures of the lines whose arm does not set the option."""
    levels: dict[str, Measured] = {}
    for setting in results.settings:
        for place in _shown_groups(results, setting):
            for line, measured in _by_line(results, place, name).items():
                if _option(results, line) is None:
                    levels[f"{results.label(line)}, {setting}, {place.name}"] = measured
    return levels


def _shown_groups(results: Results, setting: str) -> list[Place]:
    """Return both splits of a setting, which cover all tasks with a split, or all tasks if it lacks one of them."""
    groups = results.group_places(setting)
    if len(groups) == 1:
        return groups
    return [place for place in groups if place.name != ALL]


def _by_line(results: Results, place: Place, name: str) -> dict[str, Measured]:
    by_line: dict[str, Measured] = {}
    for line in results.lines:
        measured = results.figure(line, place.tasks, name)
        if measured is not None:
            by_line[line] = measured
    return by_line


def _option(results: Results, line: str) -> Any:
    """Return the value of the option on the axis, or `None` if the line's arm does not set it."""
    return results.experiment["arms"][results.arm(line)].get(results.experiment["axis"])
