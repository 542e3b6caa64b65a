"""The report of a results folder, made of its files alone: `report.md`, `report.html` and `plots/`."""

import json
from pathlib import Path

from ..judging import figures as vocabulary
from ..judging.grounding import cited_passages
from ..judging.matching import gold_ids
from ..judging.results import read_lines, read_results
from .document import Bullets, Code, Example, Heading, Plot, Table, Text, write_document
from .plots import can_draw, draw_bars, draw_curves, draw_scores

SPLITS = {"in-domain": "In-domain", "out-of-domain": "Out-of-domain", None: "Other tasks"}
MODE_NAMES = vocabulary.MODES
PASSAGE_SHOWN = 600  # characters of a passage in an example
NO_MATPLOTLIB = "There are no plots: pip install matplotlib, and run the same command again."


def write_report(output_dir, num_examples=3):
    """
    Write the report of a results folder.

    Args:
        output_dir (`str` or `Path`): what `evaluate_tasks` wrote.
        num_examples (`int`): answers shown of each task.

    Raises:
        `FileNotFoundError`: when the folder has no `metrics.json`: it is no complete results folder.
    """
    output_dir = Path(output_dir)
    results = read_results(output_dir)
    title = f"Evaluation of {results['settings']['model'] or 'a model'}"
    blocks = [Heading(title, 1), Text(_summary(results), note=True), *main_table(results), *_modes(results), *_query(results), *_emission(results)]
    blocks += _plots(results, output_dir) if can_draw() else [Text(NO_MATPLOTLIB, note=True)]
    blocks += [*_examples(results, output_dir, num_examples), *_all_figures(results), *_left_out(results), *_settings(results)]
    write_document(blocks, output_dir, "report", title)


def show(figure, metric, interval=True):
    """A figure as a cell of a table: percent, or a count; "—" where there is none."""
    if figure is None:
        return "—"
    scale, digits = (1, 2) if vocabulary.figure(metric).scale == "count" else (100, 1)
    low, high = (f"{scale * bound:.{digits}f}" for bound in figure["interval"])
    value = f"{scale * figure['value']:.{digits}f}"
    return (value, f"[{low}, {high}]") if interval else value


def _summary(results):
    settings = results["settings"]
    versions = ", ".join(f"{name} {version}" for name, version in settings["versions"].items())
    processes = f"{settings['processes']} processes on " if settings["processes"] > 1 else ""
    answering = sum(own["seconds"] for task in results["tasks"].values() for own in task["modes"].values())
    took = f"answering took {answering:,.0f} s{' in all processes together' if processes else ''}, this run {results['seconds']:,.0f} s"
    return f"{settings['time']}; {processes}{settings['hardware']}; {settings['dtype']}; {versions}; {took}."


# ---------------------------------------------------------------------- tables


def main_table(results):
    """The paper's main table: a row for each task, by split, with averages."""
    modes = list(results["settings"]["modes"])
    if not modes:
        return []
    mode = next((mode for mode in vocabulary.SEARCHING if mode in modes), modes[0])
    rows, strong = [], []
    for split, heading in SPLITS.items():
        names = [name for name, task in results["tasks"].items() if task["split"] == split and mode in task["modes"]]
        if names:
            rows.append([heading])
        for name in names:
            task = results["tasks"][name]
            own = task["modes"][mode]
            cor = " / ".join(vocabulary.cor_label(each) for each in task["cor"])
            n = own["metrics"].get("cor", own)["n"]
            rows.append([name, _pool(task), str(n), cor, *(show(own["metrics"].get(metric), metric) for metric in vocabulary.MAIN)])
        if len(names) > 1 and split in results["averages"]:
            strong.append(len(rows))
            rows.append(_average_row(results, split, mode, "average of", len(names)))
    if len(results["tasks"]) > 1 and mode in results["averages"].get("all", {}):
        strong.append(len(rows))
        rows.append(_average_row(results, "all", mode, "average of all", len(results["tasks"])))
    header = ["", "pool", "n", "Cor is", *(vocabulary.figure(metric).label for metric in vocabulary.MAIN)]
    note = f"Percent, with 95 % intervals (Wilson's where a question scores 0 or 1, else bootstrap); {MODE_NAMES[mode]}. "
    note += "; ".join(f"{vocabulary.figure(metric).label}: {vocabulary.figure(metric).meaning}" for metric in vocabulary.MAIN) + "."
    return [Heading("Results"), Table(header, rows, strong=frozenset(strong)), Text(note, note=True)]


def _average_row(results, split, mode, name, count):
    own = results["averages"][split][mode]
    n = str(own["cor"]["n"]) if "cor" in own else ""
    return [f"{name} {count}", "", n, "", *(_show_average(own.get(metric), metric, count) for metric in vocabulary.MAIN)]


def _show_average(found, metric, count):
    """An average as a cell; of a metric that does not apply in all `count` tasks it says in how many it does."""
    cell = show(found, metric)
    return (cell[0], f"{cell[1]}, {found['tasks']} of {count} tasks") if found is not None and found["tasks"] < count else cell


def _pool(task):
    return f"{task['passages']:,}" if task["pool"] == "full" and task["passages"] is not None else str(task["pool"])


def _modes(results):
    """Cor of each task in each mode."""
    modes = [mode for mode in results["settings"]["modes"] if any(mode in task["modes"] for task in results["tasks"].values())]
    if len(modes) < 2:
        return []
    rows = [[name, *(_in_mode(task, mode) for mode in modes)] for name, task in results["tasks"].items()]
    strong = frozenset()
    if len(rows) > 1:
        strong = frozenset([len(rows)])
        own, count = results["averages"]["all"], len(rows)
        rows.append(["average", *(_show_average(own.get(mode, {}).get("cor"), "cor", count) for mode in modes)])
    note = "Cor in percent. Where passages are given, only questions that need one are asked, and [NSP] is forced first."
    return [Heading("What retrieval is worth"), Table(["", *(MODE_NAMES[mode] for mode in modes)], rows, strong=strong), Text(note, note=True)]


def _in_mode(task, mode):
    return show(task["modes"].get(mode, {}).get("metrics", {}).get("cor"), "cor")


def _query(results):
    """What the query embedding finds."""
    names, rows = ("mrr", "ndcg@10", "query_recall@1", "query_recall@5", "query_recall@20", "query_recall@100"), []
    for task_name, task in results["tasks"].items():
        for scope, own in task["query"].items():
            size = f"corpus of {task['passages']:,}" if scope == "corpus" else f"pool of {task['pool']}"
            n = str(own["mrr"]["n"]) if "mrr" in own else "0"
            rows.append([task_name, size, n, *(show(own.get(name), name) for name in names)])
    if not rows:
        return []
    note = "The query embedding at an [NSP] right behind the question, in percent; the corpus is ranked to place 100."
    header = ["", "ranked", "n", *(vocabulary.figure(name).label for name in names)]
    return [Heading("Query embedding"), Table(header, rows), Text(note, note=True)]


def _emission(results):
    names, rows = ("nsp_needed", "nsp_not_needed", "num_retrievals", "cor_not_needed"), []
    for task_name, task in results["tasks"].items():
        own = task["modes"].get("retrieval", {}).get("metrics", {})
        if own:
            rows.append([task_name, *(show(own.get(name), name) for name in names)])
    if not rows:
        return []
    note = "How often the model decides to retrieve: share of the questions in percent, and retrievals for each question."
    return [Heading("When [NSP] is emitted"), Table(["", *(vocabulary.figure(name).label for name in names)], rows), Text(note, note=True)]


def _all_figures(results):
    """Everything that was measured, folded."""
    blocks = [Heading("All figures")]
    for task_name, task in results["tasks"].items():
        sources = {MODE_NAMES[mode]: own["metrics"] for mode, own in task["modes"].items()}
        sources |= {f"query, {scope}": own for scope, own in task["query"].items()}
        names = vocabulary.in_order(name for own in sources.values() for name in own)
        rows = []
        for name in names:
            cells = [("—" if name not in own else (show(own[name], name)[0], f"{show(own[name], name)[1]} n = {own[name]['n']}")) for own in sources.values()]
            rows.append([vocabulary.figure(name).label, *cells])
        blocks.append(Table(["", *sources], rows, folded=task_name))
    rows = [[entry.label, entry.meaning] for entry in vocabulary.FIGURES.values()]
    return [*blocks, Table(["figure", "what it is"], rows, folded="what the figures are", text_columns=frozenset([1]))]


# ---------------------------------------------------------------------- the rest


def _plots(results, output_dir):
    """Draw what there is to draw."""
    tasks, blocks = results["tasks"], [Heading("Plots")]
    mode = next((mode for mode in vocabulary.SEARCHING if mode in results["settings"]["modes"]), None)
    if mode is not None:
        own = {name: task["modes"][mode]["metrics"] for name, task in tasks.items() if mode in task["modes"]}
        names = [name for name in ("ret", "cor", "gr") if any(name in figures for figures in own.values())]
        names += ["k_precision"] * ("gr" not in names and any("k_precision" in figures for figures in own.values()))
        if names:
            draw_bars(own, names, [vocabulary.figure(name).label for name in names], output_dir / "plots" / "main.png")
            blocks.append(Plot("plots/main.png", f"Retrieval, correctness and grounding ({MODE_NAMES[mode]}), with 95 % intervals"))
    by_mode = {name: {m: own["metrics"]["cor"] for m, own in task["modes"].items() if "cor" in own["metrics"]} for name, task in tasks.items()}
    modes = [mode for mode in results["settings"]["modes"] if any(mode in own for own in by_mode.values())]
    if len(modes) > 1:
        draw_bars(by_mode, modes, [MODE_NAMES[mode] for mode in modes], output_dir / "plots" / "modes.png")
        blocks.append(Plot("plots/modes.png", "Cor by what is retrieved, with 95 % intervals"))
    curves = {}
    for name, task in tasks.items():
        for scope, own in task["query"].items():
            points = {int(metric.partition("@")[2]): figure for metric, figure in own.items() if metric.startswith("query_recall@")}
            if points:
                curves[f"{name}, {scope}"] = points
    if curves:
        draw_curves(curves, output_dir / "plots" / "recall.png")
        blocks.append(Plot("plots/recall.png", "Recall@k of the query embedding, with 95 % intervals"))
    rates = {name: task["modes"].get("retrieval", {}).get("metrics", {}) for name, task in tasks.items()}
    names = [name for name in ("nsp_needed", "nsp_not_needed") if any(name in own for own in rates.values())]
    if names:
        draw_bars(rates, names, [vocabulary.figure(name).label for name in names], output_dir / "plots" / "emission.png")
        blocks.append(Plot("plots/emission.png", "How often [NSP] is emitted, with 95 % intervals"))
    scores = _retrieval_scores(results, output_dir)
    if scores:
        draw_scores(scores, output_dir / "plots" / "scores.png")
        blocks.append(Plot("plots/scores.png", "Scores of the best passage of each retrieval, gold or not"))
    return blocks if len(blocks) > 1 else []


def _predictions(results, output_dir, mode):
    """`(task, predictions)` of the tasks that have the mode."""
    for name, task in results["tasks"].items():
        if mode in task["modes"]:
            yield name, read_lines(output_dir / name / mode / "predictions.jsonl")


def _retrieval_scores(results, output_dir):
    """`{task: (scores of gold passages, of others)}`: of the best passage of each retrieval."""
    found = {}
    for name, predictions in _predictions(results, output_dir, "retrieval"):
        right, wrong = [], []
        for prediction in predictions:
            for retrieval in prediction["retrievals"] if prediction["provenance"] else []:
                (right if retrieval["passages"][0]["id"] in gold_ids(prediction) else wrong).append(retrieval["scores"][0])
        if right or wrong:
            found[name] = right, wrong
    return found


def _examples(results, output_dir, num_examples):
    modes = results["settings"]["modes"]
    if not modes:
        return []
    mode = next((mode for mode in vocabulary.SEARCHING if mode in modes), modes[0])
    blocks = [Heading("Examples"), Text(f"The first answers of each task, {MODE_NAMES[mode]}.", note=True)] if num_examples else []
    for name, predictions in _predictions(results, output_dir, mode):
        scores = {row["id"]: row for row in read_lines(output_dir / name / mode / "scores.jsonl")}
        blocks += [Heading(name, 3)] * bool(num_examples) + [_example(each, scores[each["id"]]) for each in predictions[:num_examples]]
    return blocks


def _example(prediction, scores):
    passages = []
    for number, passage in enumerate(cited_passages(prediction), 1):
        text = passage["text"] if len(passage["text"]) <= PASSAGE_SHOWN else passage["text"][:PASSAGE_SHOWN].rstrip() + " …"
        passages.append((number, passage["title"], text))
    values = {"Ret": scores.get("ret"), "Cor": scores["cor"] if scores["cor"] is not None else scores.get("cor_not_needed"), "Gr": scores.get("gr")}
    marks = [f"{name} {value:.3g}" for name, value in values.items() if value is not None]
    expected = " / ".join(prediction["answers"][:4]) + (" / …" if len(prediction["answers"]) > 4 else "")
    return Example(prediction["input"], prediction["output_with_citations"], expected, passages, marks + ["nothing retrieved"] * (not passages))


def _left_out(results):
    blocks = [Heading("What is left out")]
    for name, task in results["tasks"].items():
        blocks += [Heading(name, 3), Bullets(task["left_out"])] if task["left_out"] else []
    return blocks if len(blocks) > 1 else []


def _settings(results):
    settings = results["settings"]
    rows = [[name, json.dumps(value, ensure_ascii=False) if not isinstance(value, str) else value] for name, value in settings.items() if name != "command"]
    blocks = [Heading("How this was made")] + ([Code(settings["command"])] if "command" in settings else [])
    return [*blocks, Table(["setting", "value"], rows, folded="settings", text_columns=frozenset([1]))]
