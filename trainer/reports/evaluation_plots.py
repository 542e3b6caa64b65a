"""The plots of an evaluation."""

from collections.abc import Iterable, Mapping
from pathlib import Path

from modeling_cosup.lines_cosup import read_lines

from ..judging.figures import MODES, SCOPES, SEARCHING, Measured, figure
from ..questions import gold_ids
from .document import Block, Heading, Plot, Text
from .plots import can_draw, draw_bars, draw_curves, draw_histograms

NO_MATPLOTLIB = "There are no plots: pip install matplotlib, and run the same command again."


def evaluation_plots(results: dict, output_dir: Path) -> list[Block]:
    """Draw the plots into `output_dir/plots` and return the blocks that show them."""
    if not can_draw():
        return [Text(NO_MATPLOTLIB, note=True)]
    folder = output_dir / "plots"
    captions = {
        "main.png": _draw_main(results, folder / "main.png"),
        "modes.png": _draw_modes(results, folder / "modes.png"),
        "recall.png": _draw_recall(results, folder / "recall.png"),
        "emission.png": _draw_emission(results, folder / "emission.png"),
        "scores.png": _draw_scores(results, output_dir, folder / "scores.png"),
    }
    plots = [Plot(f"plots/{name}", caption) for name, caption in captions.items() if caption is not None]
    return [Heading("Plots"), *plots] if plots else []


# Each of these functions draws one plot and returns its caption, or None if there is nothing to draw.


def _draw_main(results: dict, path: Path) -> str | None:
    """Draw retrieval, correctness and grounding of each task. K-precision replaces Gr if no task has it."""
    mode = next((mode for mode in SEARCHING if mode in results["settings"]["modes"]), None)
    if mode is None:
        return None
    groups = _figures_by_task(results, mode)
    names = _present(("ret", "cor", "gr"), groups)
    if "gr" not in names:
        names += _present(("k_precision",), groups)
    if not names:
        return None
    draw_bars(groups, _labels(names), path)
    return f"Retrieval, correctness and grounding ({MODES[mode]}), with 95 % intervals"


def _draw_modes(results: dict, path: Path) -> str | None:
    """Draw Cor of each task in each mode."""
    groups: dict[str, dict[str, Measured]] = {}
    for name, task in results["tasks"].items():
        groups[name] = {}
        for mode, answers in task["modes"].items():
            if "cor" in answers["metrics"]:
                groups[name][mode] = answers["metrics"]["cor"]
    modes = _present(results["settings"]["modes"], groups)
    if len(modes) < 2:
        return None
    draw_bars(groups, {mode: MODES[mode] for mode in modes}, path)
    return "Cor by what is retrieved, with 95 % intervals"


def _draw_recall(results: dict, path: Path) -> str | None:
    """Draw R@k of the query embedding over k, one curve per ranking."""
    curves: dict[str, dict[float, Measured]] = {}
    for task_name, task in results["tasks"].items():
        for scope, figures in task["query"].items():
            curve = _recall_by_k(figures)
            if curve:
                curves[f"{task_name}, {SCOPES[scope]}"] = curve
    if not curves:
        return None
    draw_curves({figure("query_recall@k").label: curves}, path, xlabel="k")
    return "R@k of the query embedding, with 95 % intervals"


def _recall_by_k(figures: Mapping[str, Measured]) -> dict[float, Measured]:
    """Return the figures `query_recall@k` by k."""
    curve: dict[float, Measured] = {}
    for name, measured in figures.items():
        stem, _, k = name.partition("@")
        if stem == "query_recall":
            curve[int(k)] = measured
    return curve


def _draw_emission(results: dict, path: Path) -> str | None:
    """Draw how often [NSP] is emitted for questions that need a passage, and for questions that need none."""
    groups = _figures_by_task(results, "retrieval")
    names = _present(("nsp_needed", "nsp_not_needed"), groups)
    if not names:
        return None
    draw_bars(groups, _labels(names), path)
    return "How often [NSP] is emitted, with 95 % intervals"


def _draw_scores(results: dict, output_dir: Path, path: Path) -> str | None:
    """Draw the scores of the best passage of each retrieval, gold or not."""
    scores: dict[str, tuple[list[float], list[float]]] = {}
    for name, task in results["tasks"].items():
        if "retrieval" not in task["modes"]:
            continue
        gold, others = _best_scores(read_lines(output_dir / name / "retrieval" / "predictions.jsonl"))
        if gold or others:
            scores[name] = (gold, others)
    if not scores:
        return None
    draw_histograms(scores, path)
    return "Scores of the best passage of each retrieval, gold or not"


def _best_scores(predictions: list[dict]) -> tuple[list[float], list[float]]:
    """
    Return the score of each retrieval's best passage, for questions that need a passage: scores of gold passages, and
    scores of other passages.
    """
    gold: list[float] = []
    others: list[float] = []
    for prediction in predictions:
        if not prediction["provenance"]:
            continue
        ids = gold_ids(prediction)
        for retrieval in prediction["retrievals"]:
            score = retrieval["scores"][0]
            if retrieval["passages"][0]["id"] in ids:
                gold.append(score)
            else:
                others.append(score)
    return gold, others


def _figures_by_task(results: dict, mode: str) -> dict[str, dict[str, Measured]]:
    figures = {}
    for name, task in results["tasks"].items():
        if mode in task["modes"]:
            figures[name] = task["modes"][mode]["metrics"]
    return figures


def _present(keys: Iterable[str], groups: Mapping[str, Mapping]) -> list[str]:
    """Return the keys that at least one group holds."""
    return [key for key in keys if any(key in group for group in groups.values())]


def _labels(names: Iterable[str]) -> dict[str, str]:
    return {name: figure(name).label for name in names}
