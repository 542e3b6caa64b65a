"""Two results folders beside each other: is the second better, and how sure is that."""

from pathlib import Path

import numpy as np

from modeling_cosup.index_files_cosup import write_json

from ..judging import figures as vocabulary
from ..judging.intervals import paired_bootstrap, resampled_means
from ..judging.results import read_lines, read_results
from .document import Bullets, Heading, Table, Text, write_document
from .evaluation import MODE_NAMES

RESAMPLES = 10_000
JUDGED = ("nli", "nli_model", "gr_hypothesis")  # settings that say how answers were judged
COMPARED = ("pool", "gold_in_pool", "top_k", "max_retrievals", "max_new_tokens", "cor", "passages", "eval_file", "corpus_file")


def compare_results(first, second, resamples=RESAMPLES, seed=0):
    """
    The paired bootstrap of two results folders, `second - first`, question by question.

    Args:
        first, second (`str` or `Path`): what `evaluate_tasks` wrote.
        resamples (`int`), seed (`int`): the same seed gives the same answer.

    Returns:
        `dict`: `"tasks"`: task -> mode -> metric -> `{"first", "second", "difference", "interval", "p_value", "n", "left_out"}`; `"averages"`: split -> mode ->
        metric -> the same over tasks, with `"rate"`, by how many percent of the first the second is better; `"notes"`: what is not compared, and settings that
        differ. Metrics of the query embedding stand under mode `"query"`.

    Raises:
        `FileNotFoundError`: for a folder that is not complete.
        `ValueError`: when the folders share no task and mode, or, with counts, when a task's questions are not the same.
    """
    folders, runs = (Path(first), Path(second)), (read_results(first), read_results(second))
    tasks, samples, notes = {}, {}, _only_in_one(runs)
    judged = [{key: run["settings"].get(key) for key in JUDGED} for run in runs]
    different = [f"{key}: {judged[0][key]!r} and {judged[1][key]!r}" for key in JUDGED if judged[0][key] != judged[1][key]]
    notes += [f"the answers were judged in different ways, so Gr and other figures of an NLI model do not compare: {'; '.join(different)}"] * bool(different)
    for name in [name for name in runs[0]["tasks"] if name in runs[1]["tasks"]]:
        own = [run["tasks"][name] for run in runs]
        different = [f"{key}: {own[0].get(key)!r} and {own[1].get(key)!r}" for key in COMPARED if own[0].get(key) != own[1].get(key)]
        notes += [f"{name}: the settings differ in {'; '.join(different)}"] * bool(different)
        modes = [mode for mode in own[0]["modes"] if mode in own[1]["modes"]] + [vocabulary.QUERY] * all(each["query"] for each in own)
        tasks[name], samples[name] = {}, {}
        for mode in modes:
            scores = [_scores(folder, name, mode) for folder in folders]
            _check_same_questions(scores, name, mode, folders)
            tasks[name][mode], samples[name][mode] = _compare(*scores, resamples, seed)
    if not any(tasks.values()):
        raise ValueError(f"{first} and {second} share no task and mode: there is nothing to compare.")
    splits = {name: runs[0]["tasks"][name]["split"] for name in tasks}
    names = [run["settings"]["model"] for run in runs]
    return {"first": names[0], "second": names[1], "tasks": tasks, "averages": _averages(splits, tasks, samples, resamples, seed), "notes": notes}


def _only_in_one(runs):
    notes = []
    for run, other, which in ((runs[0], runs[1], "first"), (runs[1], runs[0], "second")):
        if alone := [name for name in run["tasks"] if name not in other["tasks"]]:
            notes.append(f"{len(alone)} tasks are only in the {which} folder: {', '.join(alone)}")
    return notes


def _scores(folder, task, mode):
    """`{id: {metric: value}}` of a mode."""
    scores = {}
    for row in read_lines(folder / task / mode / "scores.jsonl"):
        scope = f"{row.pop('scope')} " if mode == vocabulary.QUERY else ""
        scores.setdefault(row.pop("id"), {}).update({f"{scope}{name}": value for name, value in row.items()})
    return scores


def _check_same_questions(scores, task, mode, folders):
    first, second = map(set, scores)
    if first != second:
        counts = f"{len(first - second)} are only in {folders[0]}, {len(second - first)} only in {folders[1]}, {len(first & second)} in both"
        raise ValueError(f"Task {task}, mode {mode}: the folders do not hold the same questions: of {len(first | second)} ids {counts}.")


def _compare(first, second, resamples, seed):
    """Comparisons by metric, and the values of both runs of the questions that have one in both, for the averages."""
    found, samples = {}, {}
    names = [name for name in next(iter(first.values()), {}) if name in next(iter(second.values()), {})]
    for name in names:
        values = [{id: row[name] for id, row in run.items()} for run in (first, second)]
        both = [id for id in values[0] if values[0][id] is not None and values[1][id] is not None]
        if not both:
            continue
        samples[name] = np.array([[run[id] for id in both] for run in values], float)  # (2, n)
        means = samples[name].mean(1)
        compared = paired_bootstrap(*values, resamples=resamples, seed=seed).to_dict()
        compared["left_out"] -= sum(values[0][id] is None and values[1][id] is None for id in values[0])  # it applies in neither
        found[name] = {"first": float(means[0]), "second": float(means[1]), **compared}
    return found, samples


def _averages(splits, tasks, samples, resamples, seed):
    """Comparisons of the plain means over tasks; questions are resampled within each task, in pairs."""
    groups = {split: [name for name, own in splits.items() if own == split] for split in ("in-domain", "out-of-domain")} | {"all": list(splits)}
    averages = {}
    for group, names in groups.items():
        for mode in dict.fromkeys(mode for name in names for mode in tasks[name]):
            holding = [name for name in names if mode in tasks[name]]
            for metric in dict.fromkeys(metric for name in holding for metric in samples[name][mode]):
                columns = [samples[name][mode][metric] for name in holding if metric in samples[name][mode]]
                averages.setdefault(group, {}).setdefault(mode, {})[metric] = _average(columns, resamples, seed)
    return averages


def _average(columns, resamples, seed):
    means = np.mean([column.mean(1) for column in columns], 0)
    differences = [column[1] - column[0] for column in columns]
    resampled = np.mean([resampled_means(values, None, resamples, seed + number) for number, values in enumerate(differences)], 0)
    measured = float(means[1] - means[0])
    as_far = int((np.abs(resampled - measured) >= abs(measured) - 1e-12).sum())
    low, high = np.percentile(resampled, [2.5, 97.5])
    return {
        "first": float(means[0]),
        "second": float(means[1]),
        "difference": measured,
        "interval": [float(low), float(high)],
        "p_value": (1 + as_far) / (1 + len(resampled)),
        "n": int(sum(map(len, differences))),
        "tasks": len(columns),
        "rate": 100 * measured / float(means[0]) if means[0] else None,
    }


# ---------------------------------------------------------------------- showing it


def show_row(metric, found):
    """Cells of a comparison: metric, both means, the difference with its interval, p and n."""
    scale, digits = (1, 2) if vocabulary.figure(metric).scale == "count" else (100, 1)
    low, high = (f"{scale * bound:+.{digits}f}" for bound in found["interval"])
    values = [f"{scale * found[which]:.{digits}f}" for which in ("first", "second")]
    p = "< 0.001" if found["p_value"] < 0.001 else f"{found['p_value']:.3f}"
    return [label(metric), *values, (f"{scale * found['difference']:+.{digits}f}", f"[{low}, {high}]"), p, str(found["n"])]


def label(metric):
    """How a table says a metric; that of a ranking has "corpus" or "pool" before its name."""
    scope, _, name = metric.rpartition(" ")
    return f"{vocabulary.figure(name).label}, {scope}" if scope in ("corpus", "pool") else vocabulary.figure(metric).label


def write_comparison(comparison, output_dir, names=("A", "B")):
    """Write `comparison.json`, `comparison.md` and `comparison.html` of what [`compare_results`] found; `names` are the folders'."""
    output_dir = Path(output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    write_json(output_dir / "comparison.json", comparison)
    write_document(comparison_blocks(comparison, names), output_dir, "comparison", "Comparison of two evaluations")


def comparison_blocks(comparison, names):
    """The comparison as blocks of a document."""
    text = f"A is {names[0]} ({comparison['first']}), B is {names[1]} ({comparison['second']}). Differences are B − A, question by question, in "
    text += "percentage points, with 95 % intervals and two-sided p-values of the paired bootstrap; of fewer than some 30 questions it is too sure. Nothing "
    text += "is corrected for the number of comparisons."
    blocks = [Heading("Comparison of two evaluations", 1), Text(text)]
    header = ["", "A", "B", "B − A", "p", "n"]
    if len(comparison["tasks"]) > 1:
        rows, strong = [], []
        for split, modes in comparison["averages"].items():
            for mode, found in modes.items():
                chosen = [metric for metric in vocabulary.MAIN if metric in found]
                rows += [[f"{split}, {MODE_NAMES.get(mode, mode)}"]] * bool(chosen)
                for metric in chosen:
                    rate = found[metric]["rate"]
                    strong += [len(rows)] * _is_sure(found[metric])
                    rows.append([*show_row(metric, found[metric]), "—" if rate is None else f"{rate:+.1f} %", str(found[metric]["tasks"])])
        blocks += [Heading("Averages"), Table([*header, "improvement", "tasks"], rows, strong=frozenset(strong))]
    for name, modes in comparison["tasks"].items():
        rows, strong = [], []
        for mode, found in modes.items():
            rows.append([MODE_NAMES.get(mode, "query embedding")])
            for metric, own in found.items():
                strong += [len(rows)] * _is_sure(own)
                rows.append(show_row(metric, own))
        blocks += [Heading(name), Table(header, rows, strong=frozenset(strong))]
    blocks.append(Text("Bold: the interval of the difference does not hold 0.", note=True))
    return blocks + ([Heading("What to know"), Bullets(comparison["notes"])] if comparison["notes"] else [])


def verdict(metric, found):
    """Of the second run: `"better"` or `"worse"` where the interval of the difference leaves out 0 (of a count: `"more"`, `"fewer"`), else `"within noise"`."""
    more, fewer = ("more", "fewer") if vocabulary.figure(metric).scale == "count" else ("better", "worse")
    return (more if found["difference"] > 0 else fewer) if _is_sure(found) else "within noise"


def _is_sure(found):
    low, high = found["interval"]
    return low > 0 or high < 0
