"""Compare the arms of the training part with separate supervision, question by question."""

from pathlib import Path
from typing import Any

from trainer.judging.figures import SPLITS
from trainer.judging.intervals import compare_differences, mean_and_deviation

from gpu_parts.records import read_record
from gpu_parts.runner import Skip
from gpu_parts.training_outcomes import FIGURES, scores_of

BASELINE = "separate"
RESAMPLES = 2000
ENDED = ("done", "failed")


def compare_arms(folder: Path, checks: dict[str, list[str]]) -> dict[str, Any]:
    """
    Compare each arm with separate supervision, over the seeds that both have.

    The difference of a question is the mean over seeds; questions are resampled within each task. Each task weighs
    the same in an average. Intervals and p-values are not corrected for the number of comparisons.

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
    comparisons, lines, rows = {}, [], []
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
        comparison = compare_pairs(pairs)
        comparisons[arm] = {"seeds": len(pairs), "weights": pairs[0][0]["weights"], **comparison}
        rows += rows_of(arm, comparison)
        recall, cor = (text_of(comparison[name].get("all")) for name in ("query_recall@1", "cor"))
        lines.append(f"{arm} − {BASELINE}: R@1 {recall}, Cor {cor}")
    if not comparisons:
        raise Skip(f"no arm can be compared: {BASELINE} and another one must have succeeded with the same seed")
    header = ["arm − separate", "task", *FIGURES.values()]
    table = {"title": "points, with 95 % intervals; paired bootstrap over questions", "header": header, "rows": rows}
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


def compare_pairs(pairs: list[tuple[dict[str, Any], dict[str, Any]]]) -> dict[str, dict[str, Any]]:
    """
    Return figure -> task or average -> difference of the second results to the first.

    Args:
        pairs (`list[tuple[dict, dict]]`): the results of both arms, seed by seed.
    """
    tasks = [name for name in pairs[0][0]["tasks"] if name in pairs[0][1]["tasks"]]
    splits = {task: pairs[0][0]["tasks"][task]["split"] for task in tasks}
    comparison: dict[str, dict[str, Any]] = {}
    for figure in FIGURES:
        columns = {}
        for task in tasks:
            by_seed = [differences(old["tasks"][task], new["tasks"][task], figure) for old, new in pairs]
            columns[task] = [sum(values) / len(values) for values in zip(*by_seed, strict=True)]
        members = {task: [task] for task in tasks}
        for split in SPLITS:
            members[split] = [task for task in tasks if splits[task] == split]
        members["all"] = tasks
        comparison[figure] = {}
        for group, names in members.items():
            values = [columns[name] for name in names if columns[name]]
            if values:
                comparison[figure][group] = rounded(compare_differences(values, RESAMPLES).to_dict())
        over_seeds = [mean_over_tasks(old, new, figure, tasks) for old, new in pairs]
        comparison[figure]["all"]["deviation_over_seeds"] = None
        if len(over_seeds) > 1:
            comparison[figure]["all"]["deviation_over_seeds"] = mean_and_deviation(over_seeds)[1]
    return comparison


def differences(old: dict[str, Any], new: dict[str, Any], figure: str) -> list[float]:
    """Return the difference of each question to which the figure applies, second minus first."""
    values = []
    for before, after in zip(scores_of(old)[figure], scores_of(new)[figure], strict=True):
        if before is not None and after is not None:
            values.append(after - before)
    return values


def mean_over_tasks(old: dict[str, Any], new: dict[str, Any], figure: str, tasks: list[str]) -> float:
    """Return the mean over tasks of the difference of two results."""
    means = []
    for task in tasks:
        values = differences(old["tasks"][task], new["tasks"][task], figure)
        if values:
            means.append(sum(values) / len(values))
    return sum(means) / len(means)


def rounded(compared: dict[str, Any]) -> dict[str, Any]:
    """Return a comparison with numbers of five decimals."""
    interval = compared["interval"]
    return {
        "difference": round(compared["difference"], 5),
        "interval": None if interval is None else [round(end, 5) for end in interval],
        "p_value": compared["p_value"],
        "n": compared["n"],
    }


def rows_of(arm: str, comparison: dict[str, dict[str, Any]]) -> list[list[str]]:
    """Return the lines of an arm in the table of the report."""
    groups = comparison["query_recall@1"]
    return [[arm, group, *(text_of(comparison[figure].get(group)) for figure in FIGURES)] for group in groups]


def text_of(compared: dict[str, Any] | None) -> str:
    """Return a difference in points with its interval; a dash if there is none."""
    if compared is None:
        return "—"
    text = f"{100 * compared['difference']:+.1f}"
    if compared["interval"] is not None:
        text += " [{:+.1f}, {:+.1f}]".format(*(100 * end for end in compared["interval"]))
    return text
