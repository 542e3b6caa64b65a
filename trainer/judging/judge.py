"""
Judge a model on tasks: let it answer every question in every mode, score the answers, and write a results folder.

    OUT/metrics.json                    all figures, with n and intervals, and the settings they were measured with
    OUT/<task>/query/ranking.jsonl      the passages nearest to each query embedding, over the corpus and over the pool
    OUT/<task>/<mode>/predictions.jsonl one answer per line, with its retrieval trace
    OUT/<task>/<mode>/scores.jsonl      the scores of each question, read by `recipes/compare.py`
    OUT/<task>/<mode>/metrics.json      the means of these scores
    OUT/<task>/<mode>/run.json          the settings that decide the answers; a run with other settings is refused
"""

import platform
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path

import torch
import transformers
from transformers import PreTrainedModel

from modeling_cosup import CoSupForCausalLM, Memory, MemoryConfig
from modeling_cosup.files_cosup import read_json, write_json
from modeling_cosup.lines_cosup import write_lines
from modeling_cosup.token_keys_cosup import gen_of

from ..distributed import LONGEST_WAIT, barrier, gather_objects, host_group, rank, world_size
from ..questions import answer_lists, answers_to_find, gold_ids, provenance_unknown
from .correctness import worded
from .figures import MODES, QUERY, added_figures, figure, figures_needing, in_order
from .grounding import HYPOTHESIS, Judge, check_hypothesis
from .nli import SharedJudge
from .references import readings, without_empty_answers
from .results import FORMAT
from .retrieval import Scores
from .runs import TaskRun, memory_settings
from .scoring import averages, cor_names, has_rouge, measure, score, score_rankings
from .tasks import Task

KS = (1, 5, 20, 100)  # the k of query_recall@k and hit_rate@k
# Figures that apply whether or not a question needs a passage.
FOR_ANY_QUESTION = ("num_retrievals", "gr", "k_precision", "citation_recall", "citation_precision")


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
    memory: Memory | None = None,
    memory_config: MemoryConfig | None = None,
) -> dict:
    """
    Judge a model on tasks and write the results folder.

    All processes of a group call this together and share the questions. Answers that are already in `output_dir` are
    kept if they were made with the same settings.

    Args:
        model ([`CoSupForCausalLM`]): the model, with Emb_seq in memory if a corpus must be embedded.
        tasks (`list[Task]`): the tasks.
        output_dir (`str` or `Path`): the results folder, which all processes must see.
        modes (sequence of `str`): how the questions are answered, see
            [`~trainer.judging.answers.retrieval_settings`]. Passages are ranked by the query embeddings in any case;
            `"query"` adds nothing to that, and alone it judges retrieval quickly.
        entail (`Callable`, *optional*): an NLI judge, `list[(premise, hypothesis)]` -> `list[bool]`. If every process
            has one, they share the pairs; otherwise the first process judges all of them. A later call can add the
            judge: it scores the answers that exist already.
        index_cache (`str` or `Path`, *optional*): folder of the embedded corpora, which runs can share; defaults to
            `output_dir/indexes`.
        batch_size (`int`): number of questions per batch.
        seed (`int`): seed for drawing the passages of mode `"wrong"`.
        facts (`dict`, *optional*): further entries of `settings`, such as the command.
        gr_hypothesis (`str`): the template of the hypotheses of Gr; see [`~trainer.judging.grounding.grounding`].
        memory ([`Memory`], *optional*), memory_config ([`MemoryConfig`], *optional*): as in `generate`, in all modes.

    Returns:
        `dict`: the content of `metrics.json`, on every process:

        - `format`: the number of the format.
        - `settings`: what the figures were measured with.
        - `tasks`: name of each task -> its fields, `modes` (mode -> `metrics` and more), `query` (scope -> figures)
          and `left_out` (notes).
        - `averages`: split -> mode -> figures; under `"query"`, scope -> figures of the rankings.
        - `figures`: what the figures mean that are not part of this package, see
          [`~trainer.judging.correctness.add_metric`].
        - `seconds`: duration of the call.

    Raises:
        `ValueError`: if questions, passages or ids are not valid, with counts, before anything is generated; or if
            the folder holds answers that other settings produced.
    """
    start = time.perf_counter()
    output_dir = Path(output_dir)
    for mode in modes:
        if mode not in MODES:
            raise ValueError(f"mode is {mode!r}, expected one of {', '.join(MODES)}.")
    if not modes:
        raise ValueError("There is no mode: nothing would be judged.")
    if not tasks:
        raise ValueError("There is no task: nothing would be judged.")
    check_hypothesis(gr_hypothesis)
    modes = [mode for mode in modes if mode != QUERY]
    options = (modes, batch_size, seed, memory, memory_config)
    runs = [TaskRun(model, task, output_dir / task.name, *options) for task in tasks]
    for run in runs:
        run.open_index(index_cache or output_dir / "indexes")
    if rank() == 0:
        (output_dir / "metrics.json").unlink(missing_ok=True)  # until the end, scores may be of two judges
    judge = _share_judge(entail)
    task_results, scores, ranking_scores = {}, {}, {}
    for run in runs:
        run.rank_passages()
        for mode in run.modes:
            run.answer(mode)
        if rank() == 0:
            name = run.task.name
            try:
                task_results[name], scores[name], ranking_scores[name] = score_run(run, judge, gr_hypothesis)
            finally:
                if isinstance(judge, SharedJudge):
                    judge.stop()
        elif isinstance(judge, SharedJudge):
            judge.serve()
    if rank() == 0:
        settings = {
            **(facts or {}),
            "modes": modes,
            "nli": entail is not None,
            "gr_hypothesis": gr_hypothesis,
            "seed": seed,
            "memory_config": memory_settings(memory, memory_config),
            **environment(model),
            "batch_size": batch_size,
        }
        splits = {task.name: task.split for task in tasks}
        averaged = averages(splits, scores)
        for group, scopes in averages(splits, ranking_scores).items():
            averaged.setdefault(group, {})[QUERY] = scopes
        seconds = round(time.perf_counter() - start, 1)
        results = {
            "format": FORMAT,
            "settings": settings,
            "tasks": task_results,
            "averages": averaged,
            "figures": added_figures(),
            "seconds": seconds,
        }
        write_json(output_dir / "metrics.json", results)
    barrier()
    return read_json(output_dir / "metrics.json")


def _share_judge(entail: Judge | None) -> Judge | SharedJudge | None:
    """Return a judge that all processes share if each has one, otherwise the judge of this process."""
    if world_size() == 1:
        return entail
    all_have_one = all(gather_objects(entail is not None))
    if entail is None or not all_have_one:
        return entail
    return SharedJudge(entail, host_group(LONGEST_WAIT))  # the others wait while one still answers


def environment(model: PreTrainedModel) -> dict:
    """Return the origin of the figures: model, fingerprint of a CoSup model, versions, hardware and time."""
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
        "fingerprint": model.fingerprint() if isinstance(model, CoSupForCausalLM) else None,
        "dtype": str(gen_of(model).dtype).removeprefix("torch."),
        "versions": versions,
        "hardware": hardware,
        "processes": world_size(),
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def command_line() -> str:
    """Return the command line of this process."""
    return shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])


# ---------------------------------------------------------------------- scores and notes of one task


def score_run(
    run: TaskRun, entail: Judge | None, gr_hypothesis: str = HYPOTHESIS
) -> tuple[dict, dict[str, dict[str, Scores]], dict[str, dict[str, Scores]]]:
    """
    Score the answers and rankings of a task, and write `scores.jsonl` and `metrics.json` of each mode.

    Returns:
        `tuple[dict, dict, dict]`: the entry of the task in `metrics.json`; mode -> scores of its answers; scope ->
        scores of its rankings.
    """
    ranking_scores = _score_rankings(run)
    cor = cor_names(run.questions, run.task.metric, entail is not None)
    scores, modes = {}, {}
    left_out = [*_notes(run, entail), *run.left_out]
    for mode in run.modes:
        predictions = run.predictions(mode)
        questions = run.asked(mode)
        options = (run.task.metric, entail, gr_hypothesis, run.task.count_empty_answers)
        scores[mode] = score(predictions, questions, mode, *options)
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
    results = asdict(run.task)
    del results["name"]
    results |= {
        "n": len(run.questions),
        "index": run.index_name,
        "passages": run.num_passages,
        "cor": cor,
        "modes": modes,
        "query": {scope: measure(scope_scores) for scope, scope_scores in ranking_scores.items()},
        "left_out": left_out,
    }
    return results, scores, ranking_scores


def _score_rankings(run: TaskRun) -> dict[str, dict[str, Scores]]:
    """Score the rankings of each scope, and write `query/scores.jsonl` with one row per scope and question."""
    scores, rows = {}, []
    for scope, rankings in run.rankings().items():
        size = run.num_passages if scope == "corpus" else run.task.pool
        ks = [k for k in KS if k < int(size or 0)]  # among as many places as passages, nothing is missed
        scores[scope] = score_rankings(rankings, run.ranked, ks)
        for row in _rows(run.ranked, scores[scope]):
            rows.append({"id": row.pop("id"), "scope": scope, **row})
    if rows:
        write_lines(run.folder / QUERY / "scores.jsonl", rows)
    else:
        (run.folder / QUERY / "scores.jsonl").unlink(missing_ok=True)  # of an earlier version
    return scores


def _rows(questions: list[dict], scores: dict[str, Scores]) -> list[dict]:
    """Return the scores as one row per question, with its id."""
    rows = []
    for i, question in enumerate(questions):
        rows.append({"id": question["id"], **{name: scores[name][i] for name in in_order(scores)}})
    return rows


def _notes(run: TaskRun, entail: Judge | None) -> list[str]:
    """Return notes on the questions and figures that are left out, with counts."""
    notes = []
    total = len(run.questions)
    num_unknown = sum(provenance_unknown(question) and not question["provenance"] for question in run.questions)
    num_free = total - len(run.needing) - num_unknown
    if num_free:
        applicable = [*figures_needing("no_passage"), *FOR_ANY_QUESTION]
        if entail is None:
            applicable = [name for name in applicable if "judge" not in figure(name).needs]
        notes.append(f"{num_free} of {total} questions need no passage: they count in {_labels(applicable)} alone")
    if num_unknown:
        notes.append(
            f"{num_unknown} of {total} questions do not say which passages they need: "
            "they do not count in Ret and what follows from it"
        )
    if run.index is not None and run.ranked:
        num_without_answers = sum(not answers_to_find(question) for question in run.ranked)
        if num_without_answers:
            notes.append(
                f"{num_without_answers} of {len(run.ranked)} questions have no answer to look for in passages (only "
                f"verdicts, whole sentences or lists): they do not count in {_labels(['hit_rate@k'])}"
            )
    notes += _notes_on_empty_answers(run.questions, run.task.count_empty_answers)
    if run.task.pool != "full":
        notes += _notes_on_pools(run.needing)
    elif run.num_passages is not None:
        num_gold_alone = sum(len(gold_ids(question)) >= run.num_passages for question in run.needing)
        if num_gold_alone:
            notes.append(
                f"the index holds the gold passages of {num_gold_alone} of {len(run.needing)} questions alone: "
                "whatever is retrieved for them is right"
            )
    if entail is None:
        note = f"no NLI model was given: there is no {_labels(figures_needing('judge'))}"
        if "fever_label" in cor_names(run.questions, run.task.metric, nli=False):
            note += "; FEVER is judged by its label"
        notes.append(note)
    if not has_rouge():
        notes.append("ROUGE-L is left out: pip install rouge")
    return notes


def _notes_on_empty_answers(questions: list[dict], counted: bool) -> list[str]:
    """Return notes on questions with answers that normalise to nothing, with counts."""
    left_out: list[str] = []  # the first answer of each question that has no other kind
    affected: list[str] = []  # an answer that normalises to nothing of each other question that has one
    for question in questions:
        kept = without_empty_answers(question)
        if kept == question:
            continue
        answers = list(question["answers"])
        for pair in readings(question):
            answers += pair["short_answers"]
        for aliases in answer_lists(question):
            answers += aliases
        example = next(answer for answer in answers if not worded([answer]))
        nothing_left = bool(question["answers"]) and not kept["answers"]
        no_reading_left = bool(readings(question)) and not readings(kept)
        no_list_left = bool(answer_lists(question)) and not answer_lists(kept)
        if (nothing_left or no_reading_left or no_list_left) and not counted:
            left_out.append(example)
        else:
            affected.append(example)
    notes = []
    if left_out:
        notes.append(
            f"{len(left_out)} of {len(questions)} questions have only answers that normalise to nothing, e.g. "
            f"{left_out[0]!r}: they do not count in Cor, EM and other figures of answers (unless count_empty_answers "
            "is set)"
        )
    if affected:
        effect = "every output contains them" if counted else "these are not compared with"
        notes.append(
            f"{len(affected)} of {len(questions)} questions have answers that normalise to nothing, e.g. "
            f"{affected[0]!r}: {effect}"
        )
    return notes


def _notes_on_pools(questions: list[dict]) -> list[str]:
    """Return notes on pools in which no search can succeed or none can fail, with counts."""
    notes = []
    without_gold = gold_alone = 0
    for question in questions:
        pool, gold = set(question["candidates"]), gold_ids(question)
        if gold.isdisjoint(pool):
            without_gold += 1
        if pool <= gold:
            gold_alone += 1
    if without_gold:
        notes.append(f"{without_gold} of {len(questions)} pools hold no gold passage")
    if gold_alone:
        notes.append(
            f"{gold_alone} of {len(questions)} pools hold gold passages alone: whatever is retrieved there is right"
        )
    return notes


def _labels(names: Sequence[str]) -> str:
    return ", ".join(f"'{figure(name).label}'" for name in names)


def _notes_on_answers(mode: str, predictions: list[dict], max_new_tokens: int) -> list[str]:
    """Return notes on answers that are cut off or empty, with counts."""
    notes = []
    total = len(predictions)
    num_cut_off = sum(prediction["num_generated_tokens"] >= max_new_tokens for prediction in predictions)
    if num_cut_off:
        notes.append(f"mode {mode}: {num_cut_off} of {total} answers end at max_new_tokens ({max_new_tokens})")
    num_empty = sum(not prediction["output"].strip() for prediction in predictions)
    if num_empty:
        notes.append(f"mode {mode}: {num_empty} of {total} answers are empty")
    return notes
