"""Turn predictions into figures: the scores of each question, their means with intervals, and averages over tasks."""

import importlib.util
from collections.abc import Collection, Sequence

from ..questions import answer_lists, provenance_unknown
from .correctness import (
    ANSWER_METRICS,
    KILT_METRICS,
    TEXT_METRICS,
    answer_scores,
    cor_metric,
    correctness,
    exact_match,
    gated_by_retrieval,
    list_f1,
    str_em,
)
from .figures import NO_JUDGE, SEARCHING, SPLITS, Measured, in_order, is_binary
from .grounding import (
    HYPOTHESIS,
    Judge,
    citation_scores,
    cited_passages,
    claim_recall,
    fever_nli,
    grounding,
    k_precision,
)
from .intervals import Mean, Rate, average
from .matching import match_by_id, retrieved_ids
from .references import META, has_claims, has_reference, is_fever, reference_of, without_empty_answers
from .retrieval import (
    Ranking,
    Scores,
    by_retrieval,
    cor_minus,
    emission,
    hit_rate_at_k,
    only_where,
    ranking_scores,
    retrieval_scores,
)


def has_rouge() -> bool:
    """Return whether ROUGE-L can be computed."""
    return importlib.util.find_spec("rouge") is not None


def score(
    predictions: list[dict],
    questions: list[dict],
    mode: str = "retrieval",
    metric: str | None = None,
    entail: Judge | None = None,
    gr_hypothesis: str = HYPOTHESIS,
    count_empty_answers: bool = False,
) -> dict[str, Scores]:
    """
    Score the answer to each question.

    Args:
        predictions (`list[dict]`): answers, see [`~trainer.judging.answers.as_prediction`], matched with the questions
            by id.
        questions (`list[dict]`): evaluation instances.
        mode (`str`): how the questions were answered. Retrieval is scored only in `"retrieval"` and `"forced"`: the
            model does not search in the other modes.
        metric (`str`, *optional*): the metric that is Cor; defaults to the metric of each question's dataset.
        entail (`Callable`, *optional*): an NLI judge, `list[(premise, hypothesis)]` -> `list[bool]`. Without one there
            is no `gr`, `fever_nli`, `claim_recall` or `citation_…`, and Cor of FEVER compares labels.
        gr_hypothesis (`str`): the template of the hypotheses of Gr; see [`~trainer.judging.grounding.grounding`].
        count_empty_answers (`bool`): whether to judge by reference answers that normalise to nothing, such as "A" or
            "The", as the official code does: every output contains them. By default they are dropped, and a question
            without any other has no Cor, EM, F1, ..., see [`~trainer.judging.references.without_empty_answers`].

    Returns:
        `dict[str, list[float | None]]`: name of each figure -> its value for each question, in the order of the
        questions; `None` if it does not apply.

    Raises:
        `ValueError`: if the ids do not match or the judge leaves pairs without an answer, with counts.
    """
    predictions = [prediction for prediction, _ in match_by_id(predictions, questions)]
    if not count_empty_answers:
        questions = [without_empty_answers(question) for question in questions]
    needed = [bool(question["provenance"]) for question in questions]
    not_needed = [not (question["provenance"] or provenance_unknown(question)) for question in questions]
    cor = _cor(predictions, questions, metric, entail)
    scores: dict[str, Scores] = {"k_precision": [k_precision(prediction) for prediction in predictions]}

    hits: Scores = [None] * len(questions)
    if mode in SEARCHING:
        scores |= _retrieval_scores(predictions, questions)
        hits = scores.get("ret", hits)
        scores["cor_minus"] = cor_minus(cor, hits)
        scores |= emission(predictions, needed, not_needed)
        scores["num_retrievals"] = [float(len(prediction["retrievals"])) for prediction in predictions]

    r_precisions = scores.get("r_precision", hits)
    scores |= _text_scores(predictions, questions, r_precisions, not_needed)
    if entail is not None:
        are_lists = [_metric_of(question, metric) == "list_f1" for question in questions]
        scores |= _nli_scores(predictions, questions, hits, not_needed, entail, gr_hypothesis, are_lists)
    scores["cor"] = only_where(cor, [not free for free in not_needed])
    scores["cor_not_needed"] = only_where(cor, not_needed)
    return scores


def _retrieval_scores(predictions: list[dict], questions: list[dict]) -> dict[str, Scores]:
    rows: list[dict[str, float]] = []
    for prediction, question in zip(predictions, questions, strict=True):
        if question["provenance"]:
            rows.append(retrieval_scores(retrieved_ids(prediction), question["provenance"]))
        else:
            rows.append({})
    return _columns(rows)


def score_rankings(rankings: list[Ranking], questions: list[dict], ks: Sequence[int]) -> dict[str, Scores]:
    """
    Score the rankings by the query embedding: by gold passages where a question has any, and by answer strings where
    the ranking was searched for them.

    Args:
        rankings (`list[Ranking]`): one for each question.
        questions (`list[dict]`): evaluation instances in the same order.
        ks (`tuple[int]`): the k of `query_recall@k` and `hit_rate@k`.

    Returns:
        `dict[str, list[float | None]]`: as [`score`].
    """
    rows: list[dict[str, float]] = []
    for ranking, question in zip(rankings, questions, strict=True):
        row: dict[str, float] = {}
        if question["provenance"]:
            row |= ranking_scores(ranking.ids, question["provenance"], ks)
        if ranking.answer_place is not None:
            row |= {f"hit_rate@{k}": hit_rate_at_k(ranking.answer_place, k) for k in ks}
        rows.append(row)
    return _columns(rows)


# ---------------------------------------------------------------------- Cor and its metric


NLI_METRICS = ("fever_nli", "claim_recall")  # metrics of Cor that need a judge


def check_questions(questions: list[dict], where: str, metric: str | None = None) -> None:
    """
    Raise unless Cor can be computed, before hours are spent on answers.

    Args:
        questions (`list[dict]`): evaluation instances.
        where (`str`): name of their task, for the error.
        metric (`str`, *optional*): the metric that is Cor; defaults to the metric of each question's dataset.

    Raises:
        `ValueError`: if questions lack what their metric compares with, with counts, or if it needs a package that is
            not installed.
    """
    for field, (name, expected) in META.items():
        malformed = []
        for question in questions:
            if question.get("meta", {}).get(field) and not has_reference(question, name):
                malformed.append(question["id"])
        if malformed:
            raise ValueError(
                f"Task {where}: {len(malformed)} of {len(questions)} questions have other meta.{field} than "
                f"{expected}, e.g. {malformed[0]!r}."
            )
    names = set()
    num_lacking: dict[str, int] = {}  # metric -> questions that lack what it needs
    for question in questions:
        name = _metric_of(question, metric) or NO_JUDGE
        names.add(name)
        if not has_reference(question, name):
            num_lacking[name] = num_lacking.get(name, 0) + 1
    if num_lacking:
        name, count = next(iter(num_lacking.items()))
        raise ValueError(
            f"Task {where}: {count} of {len(questions)} questions have no {reference_of(name)}, "
            f"which {name}, their Cor, compares with."
        )
    if "rouge_l" in names and not has_rouge():
        raise ValueError(f"Task {where}: Cor is ROUGE-L, which needs the package that KILT uses: pip install rouge.")


def cor_names(questions: list[dict], metric: str | None = None, nli: bool = True) -> list[str]:
    """
    Return the names of the metrics by which Cor is measured on these questions.
    [`~trainer.judging.figures.NO_JUDGE`] replaces a metric that needs a missing NLI model.
    """
    return sorted({_metric_of(question, metric, nli) or NO_JUDGE for question in questions})


def _metric_of(question: dict, metric: str | None = None, nli: bool = True) -> str | None:
    """
    Return the metric that is Cor on a question: `metric`, or the one that its dataset and references imply; `None` if
    it needs a missing NLI model.
    """
    if metric in NLI_METRICS and not nli:
        return None
    lists = bool(answer_lists(question))
    return metric or cor_metric(question["dataset"], nli, claims=has_claims(question), lists=lists)


def _cor(predictions: list[dict], questions: list[dict], metric: str | None, entail: Judge | None) -> Scores:
    """Return Cor of each question, `None` if its metric needs a missing NLI model or a reference that it lacks."""
    metrics = [_metric_of(question, metric, nli=entail is not None) for question in questions]
    cor: Scores = [None] * len(questions)
    for name in sorted({name for name in metrics if name is not None}):
        rows = []
        for row, question in enumerate(questions):
            if metrics[row] == name and has_reference(question, name):
                rows.append(row)
        values = _score_rows(name, rows, predictions, questions, entail)
        for row in rows:
            cor[row] = values[row]
    return cor


def _score_rows(
    metric: str, rows: list[int], predictions: list[dict], questions: list[dict], entail: Judge | None
) -> Scores:
    """Return the value of a metric for the questions at `rows`, and `None` for all others."""
    values = _score_by_metric(metric, [predictions[row] for row in rows], [questions[row] for row in rows], entail)
    scores: Scores = [None] * len(questions)
    for row, value in zip(rows, values, strict=True):
        scores[row] = value
    return scores


def _score_by_metric(
    metric: str, predictions: list[dict], questions: list[dict], entail: Judge | None
) -> Sequence[float | None]:
    """Return the value of a metric for each question, `None` if the metric needs a missing NLI model."""
    if metric in TEXT_METRICS:
        pairs = zip(predictions, questions, strict=True)
        return [correctness(prediction["output"], question["answers"], metric) for prediction, question in pairs]
    if metric == "str_em":
        shares = []
        for prediction, question in zip(predictions, questions, strict=True):
            share, _ = str_em(prediction["output_with_citations"], question.get("meta", {}).get("qa_pairs"))
            shares.append(share)
        return shares
    if metric == "list_f1":
        pairs = zip(predictions, questions, strict=True)
        return [list_f1(prediction["output_with_citations"], answer_lists(question)) for prediction, question in pairs]
    if entail is None:
        return [None] * len(questions)
    outputs = [prediction["output"] for prediction in predictions]
    if metric == "fever_nli":
        claims = [question["input"] for question in questions]
        answers = [question["answers"] for question in questions]
        return fever_nli(outputs, claims, answers, entail)
    recalls = claim_recall(outputs, [question["meta"]["claims"] for question in questions], entail)
    # ALCE asks the NLI model about an empty output too, and it may say yes.
    return [recall if output.strip() else 0.0 for recall, output in zip(recalls, outputs, strict=True)]


# ---------------------------------------------------------------------- other figures of answers


def _text_scores(
    predictions: list[dict], questions: list[dict], r_precisions: Scores, not_needed: list[bool]
) -> dict[str, Scores]:
    """
    Return the scores that need no model. A question that needs no passage only has exact match, under another name, so
    that it does not count with the questions that need one.
    """
    rows: list[dict[str, float]] = []
    for prediction, question, r_precision, free in zip(predictions, questions, r_precisions, not_needed, strict=True):
        if not free:
            rows.append(_text_scores_of(prediction, question, r_precision))
        elif question["answers"] and not answer_lists(question):
            rows.append({"em_not_needed": float(exact_match(prediction["output"], question["answers"]))})
        else:
            rows.append({})
    return _columns(rows)


def _text_scores_of(prediction: dict, question: dict, r_precision: float | None) -> dict[str, float]:
    """Return KILT's scores, FEVER's label, ALCE's str_em and list F1, each only if it applies to the question."""
    scores: dict[str, float] = {}
    meta = question.get("meta", {})
    if any(answer.strip() for answer in question["answers"]):
        names = [name for name in ANSWER_METRICS if name != "rouge_l" or has_rouge()]
        if answer_lists(question):  # by EM, F1 and the like, one item would count as the whole list
            names = [name for name in names if name not in KILT_METRICS]
        scores = answer_scores(prediction["output"], question["answers"], names)
        if r_precision is not None:
            scores |= gated_by_retrieval(scores, r_precision)
    if is_fever(question):
        scores["fever_label"] = correctness(prediction["output"], question["answers"], "fever_label")
    if meta.get("qa_pairs"):
        scores["str_em"], scores["str_hit"] = str_em(prediction["output_with_citations"], meta["qa_pairs"])
    if answer_lists(question):
        scores["list_f1"] = list_f1(prediction["output_with_citations"], answer_lists(question))
    return scores


def _nli_scores(
    predictions: list[dict],
    questions: list[dict],
    hits: Scores,
    not_needed: list[bool],
    entail: Judge,
    gr_hypothesis: str,
    are_lists: list[bool],
) -> dict[str, Scores]:
    """
    Return the scores that need the judge: Gr (also split by retrieval), citations, FEVER and claims. FEVER and claims
    leave out questions that need no passage, as the other figures of answers do. Citations of outputs that
    `are_lists`, because Cor reads them as such, are judged item by item.
    """
    gr = grounding(predictions, entail, hypothesis=gr_hypothesis)
    scores: dict[str, Scores] = {"gr": gr, **by_retrieval("gr", gr, hits)}
    outputs = [prediction["output_with_citations"] for prediction in predictions]
    passages = [cited_passages(prediction) for prediction in predictions]
    list_questions = [
        question["input"] if is_list else None for question, is_list in zip(questions, are_lists, strict=True)
    ]
    citations = citation_scores(outputs, passages, entail, list_questions=list_questions)
    if not any(prediction["retrievals"] for prediction in predictions):
        citations = [None] * len(predictions)  # without anything to cite, missing citations mean nothing
    for name in ("citation_recall", "citation_precision"):
        scores[name] = [None if output_scores is None else output_scores[name] for output_scores in citations]
    for name, applies in (("fever_nli", is_fever), ("claim_recall", has_claims)):
        rows = [row for row, question in enumerate(questions) if applies(question) and not not_needed[row]]
        scores[name] = _score_rows(name, rows, predictions, questions, entail)
    return scores


def _columns(rows: list[dict[str, float]]) -> dict[str, Scores]:
    """Turn a list of dictionaries into a dictionary of lists, with `None` where a dictionary lacks the name."""
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: [row.get(name) for row in rows] for name in names}


# ---------------------------------------------------------------------- figures


def measure(scores: dict[str, Scores], cor: Collection[str] = ()) -> dict[str, Measured]:
    """
    Return the figures that apply to at least one question: means with 95 % intervals, in the order of the vocabulary.

    A figure that is always 0 or 1 for a question has Wilson's interval, which has a width even if all questions score
    the same. Any other figure has the bootstrap's interval, even if all its values happen to be 0 or 1.

    Args:
        scores (`dict[str, list[float | None]]`): as from [`score`].
        cor (collection of `str`): names of the metrics by which Cor is measured, see [`cor_names`].
    """
    figures: dict[str, Measured] = {}
    for name in in_order(scores):
        values = [value for value in scores[name] if value is not None]
        if not values:
            continue
        if is_binary(name, cor):
            figures[name] = Rate(int(sum(values)), len(values)).to_dict()
        else:
            figures[name] = Mean.of(values).to_dict()
    return figures


def averages(splits: dict[str, str | None], scores: dict[str, dict[str, dict[str, Scores]]]) -> dict[str, dict]:
    """
    Average figures over the in-domain tasks, over the out-of-domain tasks, and over all tasks.

    Args:
        splits (`dict[str, str | None]`): the split of each task.
        scores (`dict[str, dict[str, dict]]`): task -> mode (or scope of a ranking) -> scores, as from [`score`].

    Returns:
        `dict`: split (`"in-domain"`, `"out-of-domain"` or `"all"`, if it has tasks) -> mode -> figures, see
        [`~trainer.judging.intervals.average`].
    """
    groups = {name: [task for task, split in splits.items() if split == name] for name in SPLITS}
    groups["all"] = list(splits)
    averaged: dict[str, dict] = {}
    for group, tasks in groups.items():
        modes = dict.fromkeys(mode for task in tasks for mode in scores[task])
        if modes:
            averaged[group] = {mode: _average_scores([scores[task].get(mode, {}) for task in tasks]) for mode in modes}
    return averaged


def _average_scores(task_scores: list[dict[str, Scores]]) -> dict[str, dict]:
    """Average each figure over tasks, given the scores of each task."""
    figures = {}
    for name in in_order(name for scores in task_scores for name in scores):
        figure = average([scores.get(name, []) for scores in task_scores])
        if figure is not None:
            figures[name] = figure
    return figures
