"""
Judge a model on the tasks of a folder: recall of its query embeddings over each corpus, and its own answers.

The outcome of each question is kept as one character, so that two models can be compared question by question.
"""

import time
from pathlib import Path
from typing import Any

import torch
import yaml

from modeling_cosup import CoSupForCausalLM, PassageIndex
from modeling_cosup.files_cosup import digest, read_json, write_json
from trainer import load_corpus
from trainer.judging.answers import answer, embed_queries
from trainer.judging.intervals import average
from trainer.judging.scoring import cor_names, measure, score
from trainer.judging.tasks import Task, read_tasks
from trainer.questions import gold_ids

from gpu_parts.runner import Context, Later, Skip
from gpu_parts.training_outcomes import FIGURES, SEARCH_DEPTH, UNKNOWN, digits, scores_of
from gpu_parts.training_world import NUM_TINY_QUESTIONS

TASKS_FILE = Path(__file__).parents[2] / "experiments" / "tasks" / "folder.yaml"
NUM_ANSWERS = 300  # questions of a task that are answered; recall is over all of them
MAX_RETRIEVALS = 4  # of an answer; no training instance has more than three passages
# A captured decode step would be compiled longer than the few hundred steps of all tasks take.
ANSWER_OPTIONS = {"max_new_tokens": 64, "max_retrievals": MAX_RETRIEVALS, "show_progress_bar": False}
SECONDS_FACTOR = 1.5  # a task may take so much longer than the longest one before


def given_tasks(data: str, tiny: bool) -> tuple[list[Task], list[str]]:
    """
    Return the tasks whose files are in a folder, and the names of the others.

    Raises:
        [`Skip`]: if there is none.
    """
    entries = yaml.safe_load(TASKS_FILE.read_text(encoding="utf-8"))["tasks"]
    tasks, missing = [], []
    for entry in entries:
        filled = {name: value.replace("{data}", data) for name, value in entry.items()}
        if Path(filled["eval_file"]).exists() and Path(filled["corpus_file"]).exists():
            tasks.append(filled)
        else:
            missing.append(filled["name"])
    if not tasks:
        raise Skip(f"--data {data} has no eval/TASK.jsonl.gz with corpus/TASK.jsonl.gz of {', '.join(missing)}")
    return read_tasks(tasks, max_eval_samples=NUM_TINY_QUESTIONS if tiny else None), missing


def is_judged(task: Task, folder: Path) -> bool:
    """Return whether a task has a result in the folder."""
    return (folder / f"{task.name}.json").exists()


def judge_tasks(
    context: Context, model_folder: Path, tasks: list[Task], folder: Path, seconds_needed: float
) -> dict[str, dict[str, Any]]:
    """
    Judge a checkpoint on tasks, and keep the result of each in a file; tasks that have a file are not judged again.

    Args:
        context ([`Context`]): device and time.
        model_folder (`Path`): the checkpoint.
        tasks (`list[Task]`): the tasks.
        folder (`Path`): receives `TASK.json`.
        seconds_needed (`float`): what must be left before the first task begins; for the next ones, what the longest
            one took counts.

    Returns:
        `dict[str, dict]`: name of each task -> its result, see [`judge_task`].

    Raises:
        [`Later`]: if the time does not suffice for the next task.
    """
    judged: dict[str, dict[str, Any]] = {}
    model = None
    for task in tasks:
        file = folder / f"{task.name}.json"
        if not is_judged(task, folder):
            if context.seconds_left() < seconds_needed:
                raise Later(f"trained; for the next call: {len(tasks) - len(judged)} of {len(tasks)} tasks to judge")
            start = time.perf_counter()
            if model is None:
                model = CoSupForCausalLM.from_pretrained(model_folder, dtype="bfloat16").to(context.device).eval()
            folder.mkdir(parents=True, exist_ok=True)
            write_json(file, judge_task(model, task, context.tiny))
            seconds_needed = max(seconds_needed, SECONDS_FACTOR * (time.perf_counter() - start))
        judged[task.name] = read_json(file)
    return judged


def judge_task(model: CoSupForCausalLM, task: Task, tiny: bool) -> dict[str, Any]:
    """
    Judge a model on a task.

    Returns:
        `dict`: `split`, `passages`, `questions` (a hash of their ids), `cor_metric`, `figures` with 95 % intervals,
        `seconds` by name, and a string with one character for each question: `gold_places`, the place of the first
        gold passage among the nearest five, 0 for none; and of the questions that are answered `ret` and `cor`, 0 or
        1.
    """
    seconds: dict[str, float] = {}
    start = time.perf_counter()
    corpus = load_corpus(task.corpus_file or "")
    questions = task.read_questions(corpus, answers_required=True)
    index = model.build_index(corpus, batch_size=16 if tiny else 1024, show_progress_bar=False)
    if model.device.type == "cuda":
        index.to(model.device)
    seconds["index"] = time.perf_counter() - start

    start = time.perf_counter()
    outcomes = {"gold_places": gold_places(model, index, questions, batch_size=8 if tiny else 256)}
    seconds["ranking"] = time.perf_counter() - start

    start = time.perf_counter()
    asked = evenly(questions, NUM_ANSWERS)
    options: dict[str, Any] = ANSWER_OPTIONS | ({"max_new_tokens": 8} if tiny else {})
    predictions = answer(model, asked, index, "retrieval", batch_size=len(asked), **options)
    seconds["answers"] = time.perf_counter() - start
    scores = score(predictions, asked, "retrieval", task.metric)
    outcomes |= {name: digits(scores[name]) for name in ("ret", "cor")}
    cor_metrics = cor_names(asked, task.metric, nli=False)
    return {
        "split": task.split,
        "passages": len(index),
        "questions": digest([question["id"] for question in questions])[:16],
        "cor_metric": ", ".join(cor_metrics),
        "figures": measure(scores_of(outcomes), cor_metrics),
        **outcomes,
        "new_tokens": sum(prediction["num_generated_tokens"] for prediction in predictions),
        "seconds": {name: round(value, 2) for name, value in seconds.items()},
    }


def evenly(questions: list[dict], count: int) -> list[dict]:
    """Return `count` evenly spaced questions: a file may be sorted, and its first questions all of one kind."""
    if len(questions) <= count:
        return questions
    return [questions[number * len(questions) // count] for number in range(count)]


@torch.no_grad()
def gold_places(model: CoSupForCausalLM, index: PassageIndex, questions: list[dict], batch_size: int) -> str:
    """Return the place of the first gold passage in each question's ranking: 1 to 5, or 0; "-" without gold."""
    queries = embed_queries(model, questions, batch_size)  # (N, h)
    _, rows = index.search(queries, k=SEARCH_DEPTH)  # (N, 5)
    places = []
    for question, question_rows in zip(questions, rows, strict=True):
        if not question["provenance"]:
            places.append(UNKNOWN)
            continue
        gold = gold_ids(question)
        ids = [passage["id"] for passage in index.get_passages(question_rows)]
        found = [place for place, id in enumerate(ids, 1) if id in gold]
        places.append(str(found[0] if found else 0))
    return "".join(places)


def result_of_tasks(judged: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Return the results of all tasks, with averages over them and a table for the report."""
    averages = {}
    for group in ("in-domain", "out-of-domain", "all"):
        members = [scores_of(task) for task in judged.values() if group in ("all", task["split"])]
        if members:
            averages[group] = {name: average([scores.get(name, []) for scores in members]) for name in FIGURES}
    rows = [row(name, task["figures"]) for name, task in judged.items()]
    rows += [row(f"mean, {group}", figures) for group, figures in averages.items()]
    table = {"title": "percent, with 95 % intervals", "header": ["task", *FIGURES.values()], "rows": rows}
    return {"tasks": judged, "averages": averages, "tables": [table]}


def row(name: str, figures: dict[str, Any]) -> list[str]:
    """Return the line of a task in the table of the report."""
    return [name, *(cell(figures.get(figure)) for figure in FIGURES)]


def cell(measured: dict[str, Any] | None) -> str:
    """Return a figure in percent with its interval and number of questions; a dash if it was not measured."""
    if measured is None:
        return "—"
    text = f"{100 * measured['value']:.1f}"
    if measured["interval"] is not None:
        text += " [{:.1f}, {:.1f}]".format(*(100 * end for end in measured["interval"]))
    return f"{text} (n={measured['n']})"
