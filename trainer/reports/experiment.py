"""The report of an experiment, in Markdown and HTML: what is ahead of what, the tables and figures, what it took, and how to make it again."""

import json
from pathlib import Path

from modeling_cosup.index_files_cosup import write_json

from ..judging import figures as vocabulary
from ..judging.grounding import HYPOTHESIS
from .document import Bullets, Code, Heading, Plot, Table, Text, write_document
from .experiment_figures import COLUMNS
from .plots import can_draw, draw_bars, draw_lines

MODE_NAMES = {
    "retrieval": "own decision",
    "forced": "forced [NSP]",
    "gold": "oracle passage",
    "wrong": "always wrong passage",
    "off": "parametric space only",
    "query": "query embedding",
}
FURTHER = (
    *("accuracy", "em", "f1", "rouge_l", "fever_label", "fever_nli", "kilt_accuracy", "kilt_em", "kilt_f1", "kilt_rouge_l"),
    *("str_em", "str_hit", "claim_recall", "citation_recall", "citation_precision", "gr_success", "gr_failure", "r_precision"),
    *("kilt_recall@5", "mrr", "ndcg@10"),
)
EMISSION = ("nsp_needed", "nsp_not_needed", "cor_not_needed", "num_retrievals")
GROUP_NAMES = {"in-domain": "in-domain average", "out-of-domain": "out-of-domain average", "all": "average of all tasks"}
SMALL = 1_000_000_000  # parameters of Gen below which a result says nothing about models of the paper's size


def write_experiment_report(results, output_dir):
    """
    Write `experiment.json`, `report.md`, `report.html` and `plots/`.

    Args:
        results ([`~trainer.tables.Results`]): what there is; arms that failed or were not run are listed as such.
        output_dir (`str` or `Path`): made if it is not there.
    """
    output_dir = Path(output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    write_json(output_dir / "experiment.json", results.to_dict())
    experiment = results.experiment
    blocks = [Heading(experiment["title"], 1), Text(experiment["about"])] if experiment["about"] else [Heading(experiment["title"], 1)]
    blocks += [*_failures(results), *_caution(results)]
    if results.lines:
        blocks += [*_verdicts(results), *_figures(results, output_dir), *_tables(results), *_comparisons(results)]
    blocks += [*_trainings(results), *_how(results)]
    write_document(blocks, output_dir, "report", experiment["title"])


def name_of(results, line):
    """A line as readers know it: modes by what they mean."""
    return MODE_NAMES.get(line, line) if len(results.modes) > 1 else line


# ---------------------------------------------------------------------- what it says


def _failures(results):
    bad = [f"{run['arm']}, seed {run['seed']}: FAILED. {run['failure']}" for run in results.runs if run["failure"]]
    bad += [f"{run['arm']}, seed {run['seed']}: not run" for run in results.runs if not run["failure"] and run["evaluated"] is None]
    return [Heading("Not there"), Bullets(bad)] if bad else []


def _caution(results):
    sizes = [run["trained"]["parameters"].get("gen", 0) for run in results.runs if run["trained"]]
    texts = []
    if sizes and max(sizes) < SMALL:
        world = ", and a fictional world whose language is a few dozen templates" if results.experiment["world"] and not results.experiment["tasks"] else ""
        texts.append(
            f"The paper's models have 7,000 million parameters each; Gen has {max(sizes) / 1e6:,.1f} million here{world}. What follows shows "
            "the mechanism at this scale. It is no evidence for or against the paper's claim."
        )
    if len(results.experiment["seeds"]) == 1:
        texts.append("There is one seed: how much another one would change is not known, and no interval below holds it.")
    return [Text(text) for text in texts]


def _verdicts(results):
    """What is ahead, behind or within noise of the baseline, in sentences that the numbers write."""
    if results.baseline is None or len(results.lines) < 2:
        return []
    rows, count = [], 0
    for setting in results.settings:
        for group in results.groups(setting):
            for line in results.lines:
                if line == results.baseline:
                    continue
                said = {"ahead": [], "behind": [], "within noise": []}
                for metric in COLUMNS:
                    found = results.compare(line, results.tasks(setting, group), metric)
                    if found is not None:
                        said[found["verdict"]].append(f"{vocabulary.figure(metric).label} ({_signed(found['difference'], metric)})")
                        count += 1
                where = GROUP_NAMES[group] if len(results.groups(setting)) > 1 else "all tasks"
                rows.append([f"{name_of(results, line)}: {setting}, {where}", *(", ".join(own) or "—" for own in said.values())])
    note = (
        "Differences in percentage points. Ahead or behind: the 95 % interval of the paired difference leaves out 0, and every seed is on that side. "
        f"Of {count} comparisons some {max(1, round(count / 20))} would be so by chance."
    )
    title = f"Against {name_of(results, results.baseline)}"
    return [Heading(title), Table(["", "ahead in", "behind in", "within noise"], rows, text_columns=frozenset([1, 2, 3])), Text(note, note=True)]


def _tables(results):
    """For each setting: tasks and averages x lines, the main metrics; then, folded, when [NSP] is emitted and further metrics."""
    blocks = []
    metrics = [metric for metric in COLUMNS if metric in results.metrics or metric == "gr"]
    for number, setting in enumerate(results.settings):
        rows, strong = _rows(results, setting, metrics)
        blocks += [Heading("Results")] * (number == 0) + [Heading(setting, 3), Table(["", *(vocabulary.figure(m).label for m in metrics)], rows, strong)]
    note = "Percent; mean ± standard deviation over seeds, 95 % bootstrap interval over questions, n = questions. R@1: the nearest passage to the query "
    note += "embedding at an [NSP] right behind the question is gold. Averages are plain means over tasks. "
    note += "An interval without width says that all questions scored alike, not that all others would."
    if results.cor:
        note += f" Cor is {'; '.join(f'{task}: {name}' for task, name in results.cor.items())}."
    evaluation = results.experiment["evaluation"]
    if not evaluation.get("nli_model"):
        note += " Gr needs an NLI model (evaluation.nli_model) and is not shown without."
    elif "gr" in results.metrics:
        note += f" Gr is by {evaluation['nli_model']}, which read each sentence as {evaluation.get('gr_hypothesis', HYPOTHESIS)}."
    else:
        note += " Gr is not shown: no arm wrote between [Cs] and [CE] on a passage."
    blocks.append(Text(note, note=True))
    for title, names in (("When [NSP] is emitted", EMISSION), ("Further metrics", FURTHER)):
        metrics = [metric for metric in names if metric in results.metrics]
        for setting in results.settings if metrics else []:
            rows, strong = _rows(results, setting, metrics)
            blocks.append(Table(["", *(vocabulary.figure(m).label for m in metrics)], rows, strong, folded=f"{title}: {setting}"))
    return blocks


def _rows(results, setting, metrics):
    """Rows of a table: a head for each task and average, a row for each line."""
    rows, strong = [], set()
    places = [(results.meaning[name]["task"], results.meaning[name]["split"], [name]) for name in results.tasks(setting)]
    places += [(GROUP_NAMES[group], None, results.tasks(setting, group)) for group in results.groups(setting) if len(results.tasks(setting)) > 1]
    for title, split, names in places:
        own = [[name_of(results, line), *(_cell(results.figure(line, names, metric), metric) for metric in metrics)] for line in results.lines]
        if all(cell == "—" for row in own for cell in row[1:]):
            continue
        rows.append([f"{title} ({split})" if split else title])
        strong |= set(range(len(rows), len(rows) + len(own))) if split is None else set()
        rows += own
    return rows, frozenset(strong)


def _comparisons(results):
    """Differences with the baseline, with intervals and the paper's improvement rates."""
    if results.baseline is None or len(results.lines) < 2:
        return []
    metrics = [metric for metric in COLUMNS if metric in results.metrics]
    blocks = [Heading(f"Differences with {name_of(results, results.baseline)}")]
    for setting in results.settings:
        rows = []
        places = {GROUP_NAMES[group]: results.tasks(setting, group) for group in results.groups(setting)}
        places |= {results.meaning[name]["task"]: [name] for name in results.tasks(setting)}
        for title, names in places.items():
            own = [(line, [results.compare(line, names, metric) for metric in metrics]) for line in results.lines if line != results.baseline]
            rows += [[title]] + [[name_of(results, line), *map(_difference, cells, metrics)] for line, cells in own]
        blocks += [Heading(setting, 3), Table(["", *(vocabulary.figure(metric).label for metric in metrics)], rows)]
    note = "Percentage points, in brackets percent of the baseline (the paper's improvement rate); below, the 95 % interval of the paired bootstrap over "
    return [*blocks, Text(note + "questions, n, and how many seeds are above, equal to and below the baseline.", note=True)]


# ---------------------------------------------------------------------- cells


def _cell(figure, metric):
    if figure is None:
        return "—"
    scale = 1 if vocabulary.figure(metric).scale == "count" else 100
    spread = "" if figure["deviation"] is None else f" ± {scale * figure['deviation']:.1f}"
    low, high = (scale * bound for bound in figure["interval"])
    return f"{scale * figure['value']:.1f}{spread}", f"[{low:.1f}, {high:.1f}] n = {figure['n']:,}{_where(figure)}"


def _difference(found, metric):
    if found is None:
        return "—"
    scale = 1 if vocabulary.figure(metric).scale == "count" else 100
    rate = "" if found["rate"] is None else f" ({found['rate']:+.1f} %)"
    low, high = (scale * bound for bound in found["interval"])
    signs = [sum(sign * each > 0 for each in found["seeds"].values()) for sign in (1, -1)]
    seeds = f"{signs[0]} / {len(found['seeds']) - sum(signs)} / {signs[1]}"
    return f"{_signed(found['difference'], metric)}{rate}", f"[{low:+.1f}, {high:+.1f}] n = {found['n']:,}{_where(found)}, {seeds}, {found['verdict']}"


def _where(found):
    """In how many tasks an average exists, where it does not in all of them."""
    return "" if found["tasks"] == found["of_tasks"] else f", {found['tasks']} of {found['of_tasks']} tasks"


def _scale(metric):
    return 1 if vocabulary.figure(metric).scale == "count" else 100


def _signed(difference, metric):
    return f"{_scale(metric) * difference:+.1f}"


# ---------------------------------------------------------------------- plots


def _figures(results, output_dir):
    """Bars of the averages in each setting; curves over corpora or over the option that is the axis."""
    if not can_draw():
        return [Text("Without matplotlib there are no figures: pip install matplotlib", note=True)]
    metrics = [metric for metric in ("ret", "cor", "gr" if "gr" in results.metrics else "k_precision", "query_recall@1") if metric in results.metrics]
    curves = _over_corpora(results, metrics) if results.experiment["corpus_sizes"] else _over_option(results, metrics) if results.experiment["axis"] else None
    if curves is not None:
        label, panels, levels = curves
        draw_lines(panels, levels, output_dir / "plots" / "curves.png", label)
        return [Heading("Figures"), Plot("plots/curves.png", f"Averages by {label}, with 95 % intervals over questions")]
    blocks = [Heading("Figures")]
    for number, setting in enumerate(results.settings):
        bars = {}
        groups = results.groups(setting)
        for group in groups[: max(1, len(groups) - 1)]:  # in-domain and out-of-domain say what all would
            for metric in metrics:
                own = {line: results.figure(line, results.tasks(setting, group), metric) for line in results.lines}
                bars[f"{vocabulary.figure(metric).label}\n{group}"] = {line: figure for line, figure in own.items() if figure is not None}
        draw_bars(bars, results.lines, [name_of(results, line) for line in results.lines], output_dir / "plots" / f"averages-{number}.png")
        blocks.append(Plot(f"plots/averages-{number}.png", f"{setting}: averages over tasks, with 95 % intervals over questions"))
    return blocks


def _over_corpora(results, metrics):
    sizes = {setting: next(own["size"] for own in results.meaning.values() if own["setting"] == setting) for setting in results.settings}
    panels = {vocabulary.figure(metric).label: {} for metric in metrics}
    for metric in metrics:
        for line in results.lines:
            for group in results.groups(results.settings[0]):
                points = {sizes[s]: figure for s in results.settings if (figure := results.figure(line, results.tasks(s, group), metric)) is not None}
                if group != "all" or len(results.groups(results.settings[0])) == 1:
                    panels[vocabulary.figure(metric).label][f"{name_of(results, line)}, {group}"] = points
    return "passages in the corpus", panels, {}


def _over_option(results, metrics):
    axis = results.experiment["axis"]
    panels, levels = ({vocabulary.figure(metric).label: {} for metric in metrics} for _ in range(2))
    options = {line: results.experiment["arms"][results.arm(line)].get(axis) for line in results.lines}
    for metric in metrics:
        for setting in results.settings:
            for group in results.groups(setting):
                if group == "all" and len(results.groups(setting)) > 1:
                    continue
                own = {line: results.figure(line, results.tasks(setting, group), metric) for line in results.lines}
                where = f"{setting}, {group}"
                for mode in results.modes:
                    points = {options[line]: own[line] for arm in results.experiment["arms"] if (line := results.line(arm, mode)) in own}
                    label = where if len(results.modes) == 1 else f"{where}, {MODE_NAMES.get(mode, mode)}"
                    panels[vocabulary.figure(metric).label][label] = {float(at): f for at, f in points.items() if f is not None and at is not None}
                levels[vocabulary.figure(metric).label] |= {f"{line}, {where}": f for line, f in own.items() if f is not None and options[line] is None}
    return axis, panels, levels


# ---------------------------------------------------------------------- what it took


def _trainings(results):
    rows = []
    for run in results.runs:
        trained, evaluated = run["trained"] or {}, run["evaluated"] or {}
        if not trained:
            rows.append([f"{run['arm']}, seed {run['seed']}", "failed" if run["failure"] else "not run", *["—"] * 5])
            continue
        losses = ", ".join(f"{name.removesuffix('_loss')} {value:.3f}" for name, value in trained["losses"].items() if name != "loss")
        sizes = " + ".join(f"{count / 1e6:,.1f}M" for count in trained["parameters"].values())
        took = f"{trained['seconds']:,.0f} s" + (", its last part" if trained["resumed"] else "")
        cells = [f"{trained['steps']:,}", took, f"{evaluated['seconds']:,.0f} s" if evaluated else "—", sizes, losses, trained["hardware"]]
        rows.append([f"{run['arm']}, seed {run['seed']}", *cells])
    header = ["", "steps", "training", "evaluation", "parameters", "last losses", "hardware"]
    return [Heading("What it took"), Table(header, rows), Text("Times are those of the whole command, imports included.", note=True)]


def _how(results):
    experiment = results.experiment
    arms = [[arm, json.dumps(options, ensure_ascii=False)] for arm, options in experiment["arms"].items()]
    blocks = [Heading("How this was made"), Code(results.command), Table(["arm", "differs in"], arms, text_columns=frozenset([1]))]
    if results.notes:
        blocks += [Heading("Left out", 3), Bullets(results.notes)]
    commands = [(run, name, run[name]["command"]) for run in results.runs for name in ("trained", "evaluated") if run[name]]
    rows = [[f"{run['arm']}, seed {run['seed']}", command] for run, _, command in commands]
    blocks.append(Table(["", "command"], rows, folded="every command", text_columns=frozenset([1])))
    shared = {name: value for name, value in results.runs[0]["options"].items() if all(run["options"].get(name) == value for run in results.runs)}
    rows = [[name, json.dumps(value, ensure_ascii=False)] for name, value in sorted(shared.items())]
    return [*blocks, Table(["option", "value"], rows, folded="options of train.py that all arms share", text_columns=frozenset([1]))]
