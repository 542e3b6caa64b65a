"""The planned comparisons of an experiment: over seeds and questions, with one correction for all of them."""

from collections.abc import Iterator
from typing import Any

import numpy as np

from ..judging.figures import MISSING, MODES, figure, shown, shown_interval
from ..judging.hierarchical import LEVEL, RESAMPLES, compare_over_seeds, holm
from .cells import direction, shown_p
from .document import Block, Cell, Heading, Table, Text
from .experiment_figures import ALL, GROUP_TITLES, Results
from .experiment_scores import ScoresById, plain_mean, scores_of

MEASURES = (  # what a comparison that could be made holds next to its plan
    "difference",
    "interval",
    "bootstrap_p",
    "t_interval",
    "t_p",
    "p_value",
    "seed_means",
    "n",
)


def planned_comparisons(results: Results) -> list[dict[str, Any]]:
    """
    Make the comparisons that the file of an experiment plans.

    Args:
        results ([`~trainer.reports.experiment_figures.Results`]): the results.

    Returns:
        `list[dict]`: for each, the fields of its plan, `missing` (what it lacks, as text), and, if it lacks nothing,
        the `values` of both arms, what [`~trainer.judging.hierarchical.SeedComparison`] holds, `seeds` (the numbers of
        seeds above, equal and below), `left_out` (number of scores that only one of the arms has), `adjusted_p`,
        `adjusted_bootstrap_p` (of the bootstrap alone, which does not decide) and `verdict`. A comparison that lacks a
        run or a figure has no value at all, and counts in the correction.
    """
    comparisons = [_compare(results, plan) for plan in results.experiment.get("comparisons") or []]
    adjusted = holm([comparison["p_value"] for comparison in comparisons])
    adjusted_bootstrap = holm([comparison["bootstrap_p"] for comparison in comparisons])
    for number, comparison in enumerate(comparisons):
        comparison["adjusted_p"] = adjusted[number]
        comparison["adjusted_bootstrap_p"] = adjusted_bootstrap[number]
        comparison["verdict"] = _verdict(comparison)
    return comparisons


def _compare(results: Results, plan: dict[str, Any]) -> dict[str, Any]:
    missing = list(_missing_runs(results, plan))
    comparison = {**plan, "missing": missing, "values": None, "seeds": None, "left_out": 0, **dict.fromkeys(MEASURES)}
    if missing:
        return comparison
    differences = []
    values: tuple[list[float], list[float]] = ([], [])  # of arm and against, one for each task and seed
    for task in _tasks(results, plan):
        rows = []
        for seed in results.experiment["seeds"]:
            new, old = (_scores(results, plan, side, seed, task) for side in ("arm", "against"))
            shared = [question for question in old if question in new]
            comparison["left_out"] += len(old.keys() ^ new.keys())
            rows.append({question: new[question] - old[question] for question in shared})
            if not shared:
                label = figure(plan["figure"]).label
                missing.append(f"{task}, seed {seed}: no question has a value of {label} in both arms")
                continue
            for scores, means in zip((new, old), values, strict=True):
                means.append(plain_mean(scores[question] for question in shared))
        differences.append(_as_array(rows))
    if missing:
        comparison["left_out"] = 0
        return comparison
    compared = compare_over_seeds(differences, RESAMPLES)
    above, equal, below = compared.signs
    return {
        **comparison,
        **compared.to_dict(),
        "values": [plain_mean(means) for means in values],
        "seeds": [above, equal, below],
    }


def _missing_runs(results: Results, plan: dict[str, Any]) -> Iterator[str]:
    """Yield what the plan needs but lacks: each arm and seed that was not evaluated."""
    evaluated = {(run["arm"], run["seed"]) for run in results.evaluated}
    failed = {(run["arm"], run["seed"]) for run in results.runs if run["failure"]}
    for arm in (plan["arm"], plan["against"]):
        for seed in results.experiment["seeds"]:
            if (arm, seed) not in evaluated:
                state = "failed" if (arm, seed) in failed else "not run"
                yield f"{arm}, seed {seed}: {state}"


def _tasks(results: Results, plan: dict[str, Any]) -> list[str]:
    """Return the names, in the results, of the tasks of a plan's group."""
    names = []
    for name, about in results.meaning.items():
        if about["setting"] == plan["setting"] and plan["group"] in (ALL, about["split"], about["task"]):
            names.append(name)
    return names


def _scores(results: Results, plan: dict[str, Any], side: str, seed: int, task: str) -> ScoresById:
    line = results.line(plan[side], plan["mode"])
    return scores_of(results.scores[line][seed], task, plan["figure"])


def _as_array(rows: list[ScoresById]) -> np.ndarray:
    """Return the differences of each seed, of shape `(S, Q)`; NaN for a question that a seed does not have."""
    questions = {question: column for column, question in enumerate(sorted(set().union(*rows)))}
    array = np.full((len(rows), len(questions)), np.nan)
    for row, differences in enumerate(rows):
        for question, difference in differences.items():
            array[row, questions[question]] = difference
    return array


def _verdict(comparison: dict[str, Any]) -> str:
    if comparison["missing"]:
        return "not measured"
    if len(comparison["seed_means"]) < 2:
        return "none: one seed"
    if comparison["p_value"] is None:
        return "none: one question"
    if comparison["adjusted_p"] > LEVEL:
        return "not shown"
    return direction(comparison["figure"], comparison["difference"])


# ---------------------------------------------------------------------- the section of the report


def planned_blocks(results: Results, comparisons: list[dict[str, Any]]) -> list[Block]:
    """Return the section of the planned comparisons, or nothing if there are none."""
    if not comparisons:
        return []
    header = ["", "arm", "against", "difference", "p", "p, Holm", "n", "seeds", "verdict"]
    table = Table(header, [], text_columns=frozenset([len(header) - 1]))
    other_seeds = _other_seeds_than_planned(results)
    for number, comparison in enumerate(comparisons):
        if comparison["verdict"] in ("ahead", "behind", "more", "fewer"):
            table.strong.add(number)
        table.rows.append(_row(results, comparison, other_seeds))
    count = f"{len(comparisons)} comparisons" if len(comparisons) > 1 else "one comparison"
    note = (
        f"Planned before the first run: {count}, and Holm's correction for all of them, so that the chance of any "
        "false verdict is 5 %. Differences are arm minus against, paired by seed and question, a mean over questions, "
        "then tasks, then seeds. Below each: the 95 % interval of a bootstrap over seeds and questions, then the 95 % "
        "t-interval over the seeds alone. p is the larger of the p-values of both: with few seeds the bootstrap finds "
        "too much, and the t-test takes the questions as given. Seeds: above / equal / below. Not shown does not mean "
        "equal. All other comparisons of this report were not planned, and are not corrected."
    )
    if other_seeds:
        note += (
            f" The seeds are not those of the plan: {other_seeds}. Whoever chooses seeds after seeing results raises "
            "the chance of a false verdict."
        )
    return [Heading("Planned comparisons"), table, Text(note, note=True)]


def _other_seeds_than_planned(results: Results) -> str:
    """Return which planned seeds were left out and which seeds were added, or `""` if the seeds are as planned."""
    seeds = results.experiment["seeds"]
    planned = results.experiment.get("planned_seeds", seeds)
    left_out = ", ".join(str(seed) for seed in planned if seed not in seeds)
    added = ", ".join(str(seed) for seed in seeds if seed not in planned)
    parts = []
    if left_out:
        parts.append(f"without the planned seeds {left_out}")
    if added:
        parts.append(f"with the unplanned seeds {added}")
    return " and ".join(parts)


def _row(results: Results, comparison: dict[str, Any], other_seeds: str) -> list[Cell]:
    name = comparison["figure"]
    group = GROUP_TITLES.get(comparison["group"], comparison["group"])
    where = f"{MODES[comparison['mode']]}, {group}"
    if len(results.settings) > 1:
        where += f", {comparison['setting']}"
    about = f"{figure(name).label}, {where}"
    arms = f"{comparison['arm']} against {comparison['against']}"
    title: Cell = (comparison["name"], about if comparison["name"] == arms else f"{arms}: {about}")
    if comparison["missing"]:
        return [title, *[MISSING] * 7, (comparison["verdict"], "; ".join(comparison["missing"]))]
    intervals = [shown_interval(comparison[key], name, signed=True) for key in ("interval", "t_interval")]
    p_values = [shown_p(comparison[key]) for key in ("bootstrap_p", "t_p")]
    left_out = f"({comparison['left_out']:,} left out)" if comparison["left_out"] else ""
    return [
        title,
        *(shown(value, name) for value in comparison["values"]),
        (shown(comparison["difference"], name, signed=True), f"bootstrap {intervals[0]}, t {intervals[1]}"),
        (shown_p(comparison["p_value"]), f"bootstrap {p_values[0]}, t {p_values[1]}"),
        (shown_p(comparison["adjusted_p"]), f"bootstrap {shown_p(comparison['adjusted_bootstrap_p'])}"),
        (f"{comparison['n']:,}", left_out),
        " / ".join(map(str, comparison["seeds"])),
        (comparison["verdict"], other_seeds),
    ]
