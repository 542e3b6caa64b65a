"""Compare the arms of the training part with separate supervision, question by question."""

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from trainer.judging.figures import SPLITS
from trainer.judging.hierarchical import SeedComparison, compare_over_seeds, holm
from trainer.judging.intervals import Comparison, compare_differences

from gpu_parts.records import read_record
from gpu_parts.runner import Skip
from gpu_parts.training_outcomes import FIGURES, scores_of

BASELINE = "separate"
RESAMPLES = 2000
ENDED = ("done", "failed")

Compare: TypeAlias = Callable[[list[np.ndarray]], Comparison | SeedComparison]


def compare_arms(folder: Path, checks: dict[str, list[str]]) -> dict[str, Any]:
    """
    Compare each arm with separate supervision, over the seeds that both have.

    Each task weighs the same in an average. One seed is compared over its questions, several over questions and seeds
    (`trainer.judging.hierarchical`). The p-values of the averages over all tasks are corrected by Holm's method;
    intervals, and the p-values of single tasks, are not.

    Args:
        folder (`Path`): of the records of the part.
        checks (`dict[str, list[str]]`): arm -> its checks, one for each seed.

    Returns:
        `dict`: `comparisons`, arm -> figure -> task or average -> difference to separate supervision.

    Raises:
        [`Skip`]: while a check is missing, or if no arm can be compared.
        `ValueError`: if two results are of different questions or began with different weights.
    """
    results: dict[str, list[dict[str, Any] | None]] = {}  # arm -> the result of each seed, None if it failed
    for arm, names in checks.items():
        results[arm] = [result_of(folder, name) for name in names]
    comparisons: dict[str, dict[str, Any]] = {}
    lines, rows = [], []
    for arm in checks:
        if arm == BASELINE:
            continue
        pairs = []
        for old, new in zip(results[BASELINE], results[arm], strict=True):
            if old is not None and new is not None:
                check_pair(old, new)
                pairs.append((old, new))
        if not pairs:
            continue
        compare = over_seeds if len(checks[arm]) > 1 else over_questions
        comparison = compare_pairs(pairs, compare)
        comparisons[arm] = {"seeds": len(pairs), "weights": pairs[0][0]["weights"], **comparison}
    if not comparisons:
        raise Skip(f"no arm can be compared: {BASELINE} and another one must have succeeded with the same seed")
    correct(comparisons)
    for arm, comparison in comparisons.items():
        rows += rows_of(arm, comparison)
        recall, cor = (text_of(comparison[name].get("all")) for name in ("query_recall@1", "cor"))
        lines.append(f"{arm} − {BASELINE}: R@1 {recall}, Cor {cor}")
    header = ["arm − separate", "task", *FIGURES.values()]
    title = "points, with 95 % intervals; for all tasks together also p, by Holm's method"
    table = {"title": title, "header": header, "rows": rows}
    return {"summary": "; ".join(lines), "comparisons": comparisons, "tables": [table]}


def result_of(folder: Path, check: str) -> dict[str, Any] | None:
    """Return the result of a check, `None` if it failed; [`Skip`] if it has not ended."""
    record = read_record(folder.parent, folder.name, check)
    if record is None or record["status"] not in ENDED:
        raise Skip(f"{check} is not done")
    return record["result"] if record["status"] == "done" else None


def check_pair(old: dict[str, Any], new: dict[str, Any]) -> None:
    """Raise a `ValueError` if two arms began with other weights, or were judged on other questions."""
    if old["weights"] != new["weights"]:
        raise ValueError(f"One arm began with the weights {old['weights']!r}, another with {new['weights']!r}.")
    for task in set(old["tasks"]) & set(new["tasks"]):
        if old["tasks"][task]["questions"] != new["tasks"][task]["questions"]:
            raise ValueError(f"The arms were judged on different questions of {task}: they cannot be compared.")


def compare_pairs(pairs: list[tuple[dict[str, Any], dict[str, Any]]], compare: Compare) -> dict[str, dict[str, Any]]:
    """
    Return figure -> task or average -> difference of the second results to the first.

    Args:
        pairs (`list[tuple[dict, dict]]`): the results of both arms, seed by seed.
        compare (`Callable`): takes the differences `(S, Q)` of each task, NaN where there is none.
    """
    splits = {name: task["split"] for name, task in pairs[0][0]["tasks"].items()}
    for result in itertools.chain(*pairs):
        splits = {name: split for name, split in splits.items() if name in result["tasks"]}
    groups = {task: [task] for task in splits}
    for split in SPLITS:
        groups[split] = [task for task in splits if splits[task] == split]
    groups["all"] = list(splits)
    comparison: dict[str, dict[str, Any]] = {}
    for figure in FIGURES:
        columns = {}
        for task in splits:
            columns[task] = np.array(
                [differences(old["tasks"][task], new["tasks"][task], figure) for old, new in pairs]
            )
        comparison[figure] = {}
        for group, tasks in groups.items():
            values = [columns[task] for task in tasks if np.isfinite(columns[task]).any(1).all()]
            if values:
                comparison[figure][group] = rounded(compare(values).to_dict())
    return comparison


def over_questions(columns: list[np.ndarray]) -> Comparison:
    """Compare the arms of one seed: the bootstrap says what other questions would show, and nothing about seeds."""
    return compare_differences([column[np.isfinite(column)] for column in columns], RESAMPLES)


def over_seeds(columns: list[np.ndarray]) -> SeedComparison:
    """Compare the arms over questions and seeds."""
    return compare_over_seeds(columns, RESAMPLES)


def differences(old: dict[str, Any], new: dict[str, Any], figure: str) -> list[float]:
    """Return the difference of each question, second minus first; NaN where the figure does not apply."""
    values = []
    for before, after in zip(scores_of(old)[figure], scores_of(new)[figure], strict=True):
        values.append(float("nan") if before is None or after is None else after - before)
    return values


def correct(comparisons: dict[str, dict[str, Any]]) -> None:
    """Add `holm_p` to the averages over all tasks: their p-values, corrected for the number of arms and figures."""
    averages = [comparison[figure]["all"] for comparison in comparisons.values() for figure in FIGURES]
    for average, p_value in zip(averages, holm([average["p_value"] for average in averages]), strict=True):
        average["holm_p"] = p_value


def rounded(compared: dict[str, Any]) -> dict[str, Any]:
    """Return a comparison with numbers of five decimals, which keep a results file small."""
    return json.loads(json.dumps(compared), parse_float=lambda text: round(float(text), 5))


def rows_of(arm: str, comparison: dict[str, dict[str, Any]]) -> list[list[str]]:
    """Return the lines of an arm in the table of the report."""
    groups = comparison["query_recall@1"]
    return [[arm, group, *(text_of(comparison[figure].get(group)) for figure in FIGURES)] for group in groups]


def text_of(compared: dict[str, Any] | None) -> str:
    """Return a difference in points with its interval and corrected p-value; a dash if there is none."""
    if compared is None:
        return "—"
    text = f"{100 * compared['difference']:+.1f}"
    if compared["interval"] is not None:
        text += " [{:+.1f}, {:+.1f}]".format(*(100 * end for end in compared["interval"]))
    if compared.get("holm_p") is not None:
        text += f", p {compared['holm_p']:.3f}"
    return text
