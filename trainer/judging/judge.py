"""
Judge a model on tasks: it answers every question in every mode, the answers are scored, a folder holds what was found.

    OUT/metrics.json                    all figures, with n and intervals, and what they were measured with
    OUT/<task>/query/ranking.jsonl      the passages nearest to each query embedding, over the corpus and over the pool
    OUT/<task>/<mode>/predictions.jsonl one question a line, with its trace
    OUT/<task>/<mode>/scores.jsonl      the scores of each question, what `recipes/compare.py` reads
    OUT/<task>/<mode>/metrics.json      their means
    OUT/<task>/<mode>/run.json          what decides the predictions: a run with other settings does not go on
"""

import platform
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from datetime import datetime, timedelta, timezone
from pathlib import Path

import torch
import transformers

from modeling_cosup import CoSupForCausalLM
from modeling_cosup.files_cosup import read_json, write_json
from modeling_cosup.lines_cosup import write_lines

from ..distributed import barrier, gather_objects, host_group, rank, world_size
from .figures import MODES, QUERY, figure, in_order, needing
from .grounding import HYPOTHESIS, Judge, check_hypothesis
from .matching import gold_ids, provenance_unknown
from .nli import SharedJudge
from .results import FORMAT
from .retrieval import Scores
from .runs import TaskRun
from .scoring import averages, cor_names, has_rouge, measure, score, score_rankings
from .tasks import Task

KS = (1, 5, 20, 100)  # of query_recall@k
FREE_OF_GOLD = ("num_retrievals", "gr", "k_precision", "citation_recall", "citation_precision")  # of any question


def evaluate_tasks(
    model: CoSupForCausalLM,
    tasks: list[Task],
    output_dir: str | Path,
    modes: Sequence[str] = ("retrieval", "gold", "off"),
    entail: Judge | None = None,
    index_cache: str | Path | None = None,
    batch_size: int = 32,
    seed: int = 0,
    facts: dict | None = None,
    gr_hypothesis: str = HYPOTHESIS,
) -> dict:
    """
    Judge a model. All processes of a group call this together and share the questions. What `output_dir` holds
    already, of the same settings, is kept.

    Args:
        model ([`CoSupForCausalLM`]): with Emb_seq in memory where a corpus must be embedded.
        tasks (`list[Task]`): what it is judged on.
        output_dir (`str` or `Path`): the results folder, seen by all processes.
        modes (sequence of `str`): of [`~trainer.judging.answers.retrieval_settings`]. The query embeddings are ranked
            in any case; `"query"` generates nothing: alone, it judges retrieval fast.
        entail (`Callable`, *optional*): an NLI judge, `list[(premise, hypothesis)]` -> `list[bool]`. Where every
            process gives one they share the pairs, else the first process' is asked. It may be given later: the same
            call then scores the answers that are there.
        index_cache (`str` or `Path`, *optional*): where embedded corpora are kept, for all runs that name it; defaults
            to `output_dir/indexes`.
        batch_size (`int`): rows at once.
        seed (`int`): of the passages of mode `"wrong"`.
        facts (`dict`, *optional*): more to record in `settings`: command, names, ...
        gr_hypothesis (`str`): how the judge reads a sentence for Gr; see [`~trainer.judging.grounding.grounding`].

    Returns:
        `dict`: what `metrics.json` holds, on every process: `format`; `settings`; `tasks`: name -> its fields, `modes`
        (mode -> `metrics`, ...), `query` (scope -> figures) and `left_out`; `averages`: split -> mode -> figures,
        with the rankings' averages under `"query"` by scope; `seconds`.

    Raises:
        `ValueError`: with counts, for whatever is wrong with questions, passages or ids, before anything is generated;
            for a folder that holds answers of other settings.
    """
    output_dir, start = Path(output_dir), time.perf_counter()
    if unknown := [mode for mode in modes if mode not in MODES]:
        raise ValueError(f"mode is {unknown[0]!r}, expected one of {', '.join(MODES)}.")
    if not modes:
        raise ValueError("There is no mode: nothing would be judged.")
    check_hypothesis(gr_hypothesis)
    modes = [mode for mode in modes if mode != QUERY]
    runs = [TaskRun(model, task, output_dir / task.name, modes, batch_size, seed) for task in tasks]
    for run in runs:
        run.open_index(index_cache or output_dir / "indexes")
    shared = _shared(entail)
    task_figures, scores, rankings = {}, {}, {}
    for run in runs:
        name = run.task.name
        run.rank_passages()
        for mode in run.modes:
            run.answer(mode)
        if rank() == 0:
            try:
                task_figures[name], scores[name], rankings[name] = score_run(run, shared, gr_hypothesis)
            finally:
                if isinstance(shared, SharedJudge):
                    shared.stop()
        elif isinstance(shared, SharedJudge):
            shared.serve()
    if rank() == 0:
        settings = {**(facts or {}), "modes": modes, "nli": entail is not None, "gr_hypothesis": gr_hypothesis}
        settings |= {"seed": seed, **environment(model), "batch_size": batch_size}
        splits = {task.name: task.split for task in tasks}
        averaged = averages(splits, scores)
        for group, scopes in averages(splits, rankings).items():
            averaged.setdefault(group, {})[QUERY] = scopes
        seconds = round(time.perf_counter() - start, 1)
        results = {
            "format": FORMAT,
            "settings": settings,
            "tasks": task_figures,
            "averages": averaged,
            "seconds": seconds,
        }
        write_json(output_dir / "metrics.json", results)
    barrier()
    return read_json(output_dir / "metrics.json")


def _shared(entail: Judge | None) -> Judge | SharedJudge | None:
    """A judge that all processes answer, where each has one; else the judge of the first process."""
    if world_size() == 1 or not all(gather_objects(entail is not None)):
        return entail
    return SharedJudge(entail, host_group(timedelta(days=7)))


def environment(model: CoSupForCausalLM) -> dict:
    """Where figures come from: model, fingerprint, versions and hardware."""
    if model.device.type == "cuda":
        hardware = torch.cuda.get_device_name()
    else:
        hardware = f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
    versions = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    return {
        "model": model.config._name_or_path,
        "fingerprint": model.fingerprint(),
        "dtype": str(model.gen.dtype).removeprefix("torch."),
        "versions": versions,
        "hardware": hardware,
        "processes": world_size(),
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def command_line() -> str:
    """The command that runs, to be recorded."""
    return " ".join([Path(sys.argv[0]).name, *sys.argv[1:]])


# ---------------------------------------------------------------------- scoring what a run holds


def score_run(
    run: TaskRun, entail: Judge | None, gr_hypothesis: str = HYPOTHESIS
) -> tuple[dict, dict[str, dict[str, Scores]], dict[str, dict[str, Scores]]]:
    """
    Score the answers and rankings of a task, and write `scores.jsonl` and `metrics.json` of each mode.

    Returns:
        `(dict, dict, dict)`: the task as `metrics.json` holds it; mode -> scores; scope -> scores of its rankings.
    """
    rankings = _score_rankings(run)
    cor = cor_names(run.questions, run.task.metric, entail is not None)
    scores, modes = {}, {}
    left_out = [*_notes(run, entail), *run.left_out]
    for mode in run.modes:
        predictions, questions = run.predictions(mode), run.asked(mode)
        scores[mode] = score(predictions, questions, mode, run.task.metric, entail, gr_hypothesis)
        write_lines(run.folder / mode / "scores.jsonl", _rows(questions, scores[mode]))
        seconds = [prediction["seconds"] for prediction in predictions if prediction["seconds"] is not None]
        modes[mode] = {
            "metrics": measure(scores[mode], cor),
            "n": len(predictions),
            "seconds": round(sum(seconds), 1),
            "timed": len(seconds),
        }
        write_json(run.folder / mode / "metrics.json", {"format": FORMAT, **modes[mode]})
        left_out += _notes_on_answers(mode, predictions, run.task.max_new_tokens)
    fields = {name: value for name, value in asdict(run.task).items() if name != "name"}
    facts = {
        **fields,
        "n": len(run.questions),
        "index": run.index_name,
        "passages": run.num_passages,
        "cor": cor,
        "modes": modes,
        "query": {scope: measure(own) for scope, own in rankings.items()},
        "left_out": left_out,
    }
    return facts, scores, rankings


def _score_rankings(run: TaskRun) -> dict[str, dict[str, Scores]]:
    """Scores of the rankings by scope; `query/scores.jsonl` has a row for each scope and question."""
    scores, rows = {}, []
    for scope, rankings in run.rankings().items():
        size = run.num_passages if scope == "corpus" else run.task.pool
        scores[scope] = score_rankings(rankings, run.needing, [k for k in KS if k <= int(size or 0)])
        rows += [{"id": row.pop("id"), "scope": scope, **row} for row in _rows(run.needing, scores[scope])]
    if rows:
        write_lines(run.folder / QUERY / "scores.jsonl", rows)
    return scores


def _rows(questions: list[dict], scores: dict[str, Scores]) -> list[dict]:
    """Scores by question."""
    names = in_order(scores)
    return [
        {"id": question["id"], **{name: scores[name][i] for name in names}} for i, question in enumerate(questions)
    ]


def _notes(run: TaskRun, entail: Judge | None) -> list[str]:
    """Notes on what was left out, with counts."""
    total, notes = len(run.questions), []
    unknown = sum(provenance_unknown(question) and not question["provenance"] for question in run.questions)
    free = total - len(run.needing) - unknown
    if free:
        counting = [*needing("no_passage"), *FREE_OF_GOLD]
        if entail is None:
            counting = [name for name in counting if "judge" not in figure(name).needs]
        notes.append(f"{free} of {total} questions need no passage: they count in {_labels(counting)} alone")
    if unknown:
        notes.append(
            f"{unknown} of {total} questions do not say which passages they need: "
            "they do not count in Ret and what follows from it"
        )
    if run.task.pool != "full":
        pools = [(set(question["candidates"]), gold_ids(question)) for question in run.needing]
        if without := sum(gold.isdisjoint(pool) for pool, gold in pools):
            notes.append(f"{without} of {len(pools)} pools hold no gold passage")
        if easy := sum(pool <= gold for pool, gold in pools):
            notes.append(
                f"{easy} of {len(pools)} pools hold gold passages alone: whatever is retrieved there is right"
            )
    if entail is None:
        note = f"no NLI model was given: there is no {_labels(needing('judge'))}"
        if "fever_label" in cor_names(run.questions, run.task.metric, nli=False):
            note += "; FEVER is judged by its label"
        notes.append(note)
    if not has_rouge():
        notes.append("ROUGE-L is left out: pip install rouge")
    return notes


def _labels(names: Sequence[str]) -> str:
    return ", ".join(f"'{figure(name).label}'" for name in names)


def _notes_on_answers(mode: str, predictions: list[dict], max_new_tokens: int) -> list[str]:
    """Notes on answers that are cut off or empty, with counts."""
    notes, total = [], len(predictions)
    if cut_off := sum(prediction["num_generated_tokens"] >= max_new_tokens for prediction in predictions):
        notes.append(f"mode {mode}: {cut_off} of {total} answers end at max_new_tokens ({max_new_tokens})")
    if empty := sum(not prediction["output"].strip() for prediction in predictions):
        notes.append(f"mode {mode}: {empty} of {total} answers are empty")
    return notes
