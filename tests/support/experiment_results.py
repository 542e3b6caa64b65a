"""Results of an experiment, written as recipes/run_evaluation.py writes them, for the tests of its report."""

import json

from trainer.judging.results import FORMAT
from trainer.reports.experiment import write_experiment_report
from trainer.reports.experiment_figures import Results

MEANING = {
    "a": {"task": "a", "setting": "full corpus", "size": None, "split": "in-domain"},
    "b": {"task": "b", "setting": "full corpus", "size": None, "split": "out-of-domain"},
}


def make(tmp_path, scores, modes=("retrieval",), same_questions=True, cor=None, **experiment):
    """Return results of `{arm: {seed: {task: {id: ret}}}}`, written as recipes/run_evaluation.py writes them."""
    runs = []
    for arm, seeds in scores.items():
        for seed, tasks in seeds.items():
            folder = tmp_path / f"{arm}-{seed}"
            trained = evaluated = None
            if tasks is not None:
                write_evaluation(folder / "results", tasks, modes, cor or {})
                evaluated = {"command": "c", "seconds": 1.0}
                sizes = {"steps": 1, "parameters": {"gen": 10**6}, "losses": {"loss": 1.0}}
                trained = {**evaluated, "resumed": False, "hardware": "h", **sizes}
            runs.append(
                {
                    "arm": arm,
                    "seed": seed,
                    "options": {},
                    "failure": None,
                    "trained": trained,
                    "evaluated": evaluated,
                    "evaluation": str(folder),
                    "questions": {task: task if same_questions else f"{task} of {seed}" for task in MEANING},
                }
            )
    fields = {
        "title": "T",
        "about": "",
        "arms": {arm: {} for arm in scores},
        "baseline": list(scores)[0],
        "seeds": [0, 1],
        "evaluation": {"modes": list(modes)},
        "axis": None,
        "corpus_sizes": None,
        "world": None,
        "tasks": None,
    }
    return Results({**fields, **experiment}, runs, MEANING)


def write_evaluation(folder, tasks, modes, cor):
    for task, values in tasks.items():
        for mode in modes:
            rows = [{"id": id, "ret": value, "cor": None} for id, value in values.items()]
            write_scores(folder / task / mode, rows)
    folder.mkdir(parents=True, exist_ok=True)
    task_results = {task: {"cor": cor.get(task, [])} for task in tasks}
    (folder / "metrics.json").write_text(json.dumps({"format": FORMAT, "tasks": task_results}))


def write_scores(folder, rows):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "scores.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_report(results, folder):
    """Write the report and return its Markdown."""
    write_experiment_report(results, folder)
    return (folder / "report.md").read_text()
