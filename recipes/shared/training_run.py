"""A run of recipes/train.py: its options, and how its model is judged on the questions of `--eval_file`."""

import shlex
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from shared.cli import table

from modeling_cosup import CoSupForCausalLM, Retriever
from modeling_cosup.lines_cosup import read_lines
from trainer import CoSupTrainingArguments
from trainer.card import evaluation_groups
from trainer.judging.answers import ntp_loss, rank_passages, reference_instances
from trainer.judging.figures import MODES, QUERY, Measured, figure, figure_line
from trainer.judging.judge import evaluate_tasks
from trainer.judging.retrieval import Ranking
from trainer.judging.scoring import check_questions, measure, score_rankings
from trainer.judging.tasks import Task, task_name
from trainer.questions import answer_lists, provenance_unknown, ranking_can_be_judged

from shared.arguments import ScriptArguments

PRINTED = (  # mode and figure, printed if it was measured
    (QUERY, "query_recall@1"),
    (QUERY, "query_recall@5"),
    (QUERY, "hit_rate@5"),
    ("retrieval", "ret"),
    ("retrieval", "em"),
    ("gold", "em"),
    ("off", "em"),
    ("retrieval", "list_f1"),
    ("gold", "list_f1"),
    ("off", "list_f1"),
    ("retrieval", "nsp_not_needed"),
    ("retrieval", "em_not_needed"),
)


@dataclass
class Run:
    """
    One run of this recipe.

    Args:
        script (`ScriptArguments`), args (`CoSupTrainingArguments`): its options.
        corpus (`list[dict]`, *optional*): the passages of `--corpus_file`, or the gold passages of `--index`.
        questions (`list[dict]`, *optional*): of `--eval_file`.
        index ([`Retriever`], *optional*): that of `--index`, while candidates are retrieved from it.
        results (`dict`): what was measured so far, for `results.json`.
    """

    script: ScriptArguments
    args: CoSupTrainingArguments
    corpus: list[dict] | None = None
    questions: list[dict] | None = None
    index: Retriever | None = None
    results: dict[str, Any] = field(default_factory=dict)

    @property
    def output_dir(self) -> Path:
        return Path(self.args.output_dir)


def evaluation_task(run: Run) -> Task:
    """Return the evaluation set as a task, as recipes/run_evaluation.py judges it, over the index of this run."""
    script, args = run.script, run.args
    return Task(
        task_name(script.eval_file),
        script.eval_file,
        index=script.index or str(run.output_dir / "index"),
        index_uri=script.index_uri,
        max_eval_samples=script.max_eval_samples,
        max_new_tokens=script.max_new_tokens,
        top_k=num_passages(args),
    )


def num_passages(args: CoSupTrainingArguments) -> int:
    """Return how many passages an answer is grounded in: as many as were trained."""
    return 1 if args.candidates_from is None else args.num_candidates


def read_questions(run: Run) -> list[dict]:
    """
    Read the questions of the evaluation set, and check that they can be judged before and after training.

    Raises:
        `ValueError`: without a corpus or index, without a question that needs a passage for all that is known, or
            for questions that cannot be judged.
    """
    eval_file = run.script.eval_file
    if run.corpus is None and run.script.index is None:
        raise ValueError("--eval_file needs --corpus_file (or --index): its questions are answered from that corpus.")
    questions = evaluation_task(run).read_questions(run.corpus, answers_required=True)
    if not any(ranking_can_be_judged(question) or answer_lists(question) for question in questions):
        raise ValueError(
            f"{eval_file}: no question has provenance, an answer to look for in passages, or a list of answers, so "
            "there is nothing to retrieve."
        )
    check_questions(questions, eval_file)
    return questions


def held_out(model: CoSupForCausalLM, index: Retriever, run: Run) -> dict[str, Measured]:
    """
    Return the NTP loss of the reference answers, and the recall and hit rate of the query embeddings over the corpus;
    nothing of what cannot be judged on these questions.
    """
    questions = [question for question in run.questions if ranking_can_be_judged(question)]
    if not questions:
        return reference_loss(model, run)
    rankings = rank_passages(model, index, questions, run.args.per_device_eval_batch_size)
    ks = [k for k in (1, 5) if k < len(index)]  # among as many places as passages, nothing is missed
    figures = measure(score_rankings([Ranking.of(ranking) for ranking in rankings], questions, ks))
    names = [f"{stem}@{k}" for stem in ("query_recall", "hit_rate") for k in ks]
    retrieval = {name: figures[name] for name in names if name in figures}
    return {**reference_loss(model, run), **retrieval}


def reference_loss(model: CoSupForCausalLM, run: Run) -> dict[str, Measured]:
    """Return the NTP loss of the reference answers, by name; nothing if no question says which passages it needs."""
    known = []
    for question in run.questions or []:
        if question["provenance"] or not provenance_unknown(question):
            known.append(question)
    if not known:
        return {}
    return {"ntp_loss": ntp_loss(model, reference_instances(known, run.corpus)).to_dict()}


def evaluate(model: CoSupForCausalLM, run: Run) -> list:
    """
    Judge the model on the evaluation set, and print figures and a few answers.

    Adds all figures to the run's results. Returns the groups of figures for the card.
    """
    results = run.results
    task = evaluation_task(run)
    with tempfile.TemporaryDirectory() as folder:
        judged = evaluate_tasks(model, [task], folder, batch_size=run.args.per_device_eval_batch_size)
        predictions = read_lines(Path(folder, task.name, "retrieval", "predictions.jsonl"))
    evaluation = judged["tasks"][task.name]
    # no paths: results.json is pushed with the checkpoint
    public_names = ("n", "passages", "cor", "modes", "query", "left_out")
    results["evaluation"] = {name: evaluation[name] for name in public_names}
    figures_of_mode = {mode: answers["metrics"] for mode, answers in evaluation["modes"].items()}
    figures_of_mode[QUERY] = evaluation["query"].get("corpus", {})
    print(
        f"\n{len(run.questions)} questions over an index of {evaluation['passages']:,} passages"
        " (95 % intervals in brackets)\n"
    )
    rows = []
    for mode, name in PRINTED:
        if name in figures_of_mode.get(mode, {}):  # no gold passages are known of some sets
            rows.append((f"{MODES[mode]}: {figure(name).label}", figure_line(figures_of_mode[mode][name], name)))
    print(table(rows))
    if results.get("before"):
        after = reference_loss(model, run)
        for name, value in figures_of_mode[QUERY].items():
            if name in results["before"]:
                after[name] = value
        results["after"] = after
        print_before_and_after(results["before"], after)
    print_examples(predictions, run)
    return evaluation_groups(judged)


def print_before_and_after(before: dict[str, Measured], after: dict[str, Measured]) -> None:
    """Print the held-out figures of before and after training, one below the other."""
    rows = []
    for name in after:
        for when, figures in (("before", before), ("after", after)):
            rows.append((f"{figure(name).label} {when}", figure_line(figures[name], name)))
    print("\nHeld-out reference answers and questions, before and after training\n\n" + table(rows))


def print_examples(predictions: list[dict], run: Run) -> None:
    """Print a few answers, one of them to a question that needs no passage, and the paths of all results."""
    script, output_dir, questions = run.script, run.output_dir, run.questions
    needing_passage = []
    needing_none = []
    for i, question in enumerate(questions):
        if question["provenance"] or provenance_unknown(question):
            needing_passage.append(i)
        else:
            needing_none.append(i)
    needing_none = needing_none[:1]
    num_needing_passage = max(0, script.num_examples - len(needing_none))
    for i in needing_passage[:num_needing_passage] + needing_none[: script.num_examples]:
        print(f"\nQ  {questions[i]['input']}\nA  {predictions[i]['cited_text']}")
    checkpoint = output_dir / "merged" if script.use_peft else output_dir
    index = [str(script.index or output_dir / "index")]
    if script.index_uri is not None:
        index += ["--index_uri", script.index_uri]
    print(f"\nCheckpoint: {checkpoint}   Index: {' '.join(index)}   Numbers: {output_dir / 'results.json'}")
    command = ["python", "recipes/generate.py", "--model", str(checkpoint), "--index", *index]
    if num_passages(run.args) > 1:
        command += ["--top_k", str(num_passages(run.args))]
    print(f"Ask it:     {shlex.join([*command, questions[needing_passage[0]]['input']])}")
