"""From predictions to figures: the scores of each question, their means with intervals, and averages over tasks."""

import importlib.util
from collections.abc import Collection, Sequence

from .correctness import (
    ANSWER_METRICS,
    FEVER_LABELS,
    TEXT_METRICS,
    answer_scores,
    cor_metric,
    correctness,
    exact_match,
    gated_by_retrieval,
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
from .matching import match_by_id, provenance_unknown, retrieved_ids
from .retrieval import Scores, by_retrieval, cor_minus, emission, only_where, ranking_scores, retrieval_scores

META = {  # what of ALCE's fields is judged, by which figure, and what it must be
    "qa_pairs": ("str_em", 'a list of {"short_answers": [texts]}'),
    "claims": ("claim_recall", "a list of texts"),
}


def has_rouge() -> bool:
    """Whether ROUGE-L can be computed."""
    return importlib.util.find_spec("rouge") is not None


def score(
    predictions: list[dict],
    questions: list[dict],
    mode: str = "retrieval",
    metric: str | None = None,
    entail: Judge | None = None,
    gr_hypothesis: str = HYPOTHESIS,
) -> dict[str, Scores]:
    """
    The scores of each question.

    Args:
        predictions (`list[dict]`), questions (`list[dict]`): matched by id, which must be the same ones.
        mode (`str`): what is retrieved counts only where the model searches: in `"retrieval"` and `"forced"`.
        metric (`str`, *optional*): what Cor is; defaults to the metric of each question's dataset.
        entail (`Callable`, *optional*): an NLI judge, `list[(premise, hypothesis)]` -> `list[bool]`. Without it there
            is no `gr`, `fever_nli`, `claim_recall` and `citation_…`, and Cor of FEVER goes by the label.
        gr_hypothesis (`str`): how the judge reads a sentence for Gr; see [`~trainer.judging.grounding.grounding`].

    Returns:
        `dict[str, list[float | None]]`: by name of a figure, in the order of the questions; `None` where it does not
        apply.

    Raises:
        `ValueError`: with counts, when ids do not match or the judge leaves pairs without an answer.
    """
    predictions = [prediction for prediction, _ in match_by_id(predictions, questions)]
    needed = [bool(question["provenance"]) for question in questions]
    not_needed = [not (question["provenance"] or provenance_unknown(question)) for question in questions]
    cor = _cor(predictions, questions, metric, entail)
    scores: dict[str, Scores] = {"k_precision": [k_precision(prediction) for prediction in predictions]}
    hits: Scores = [None] * len(questions)
    if mode in SEARCHING:
        scores |= _columns([_retrieval_scores(*pair) for pair in zip(predictions, questions, strict=True)])
        hits = scores.get("ret", hits)
        scores["cor_minus"] = cor_minus(cor, hits)
        scores |= emission(predictions, needed, not_needed)
        scores["num_retrievals"] = [float(len(prediction["retrievals"])) for prediction in predictions]
    r_precisions = scores.get("r_precision", hits)
    text_scores: list[dict[str, float]] = []
    for prediction, question, r_precision, free in zip(predictions, questions, r_precisions, not_needed, strict=True):
        if free:
            text_scores.append(_text_scores_without_passage(prediction, question))
        else:
            text_scores.append(_text_scores(prediction, question, r_precision))
    scores |= _columns(text_scores)
    if entail is not None:
        scores |= _nli_scores(predictions, questions, hits, entail, gr_hypothesis)
    scores["cor"] = only_where(cor, [not free for free in not_needed])
    scores["cor_not_needed"] = only_where(cor, not_needed)
    return scores


def _retrieval_scores(prediction: dict, question: dict) -> dict[str, float]:
    if not question["provenance"]:
        return {}
    return retrieval_scores(retrieved_ids(prediction), question["provenance"])


def score_rankings(rankings: list[list[str]], questions: list[dict], ks: Sequence[int]) -> dict[str, Scores]:
    """
    The scores of the rankings by the query embedding.

    Args:
        rankings (`list[list[str]]`): of each question the passage ids, best first.
        questions (`list[dict]`): in the same order; each needs a passage.
        ks (`tuple[int]`): of `query_recall@k`.

    Returns:
        `dict[str, list[float | None]]`, as [`score`].
    """
    pairs = zip(rankings, questions, strict=True)
    return _columns([ranking_scores(ranking, question["provenance"], ks) for ranking, question in pairs])


# ---------------------------------------------------------------------- what Cor is


def check_questions(questions: list[dict], where: str, metric: str | None = None) -> None:
    """
    Raise unless Cor can be computed: before hours of answering, not after them.

    Args:
        questions (`list[dict]`).
        where (`str`): name of their task, for the error.
        metric (`str`, *optional*): what Cor is.

    Raises:
        `ValueError`: with counts, for questions without what their metric compares with, or a package that it needs.
    """
    for key, (name, expected) in META.items():
        malformed = []
        for question in questions:
            if question.get("meta", {}).get(key) and not _has_what_it_needs(question, name):
                malformed.append(question["id"])
        if malformed:
            raise ValueError(
                f"Task {where}: {len(malformed)} of {len(questions)} questions have other meta.{key} than {expected}, "
                f"e.g. {malformed[0]!r}."
            )
    lacking: dict[str, int] = {}
    names = set()
    for question in questions:
        name = _metric_of(question, metric) or NO_JUDGE
        names.add(name)
        if not _has_what_it_needs(question, name):
            lacking[name] = lacking.get(name, 0) + 1
    for name, count in lacking.items():
        verdicts = "verdicts" if name.startswith("fever") else "answers"
        what = {"str_em": "meta.qa_pairs", "claim_recall": "meta.claims"}.get(name, verdicts)
        raise ValueError(
            f"Task {where}: {count} of {len(questions)} questions have no {what}, "
            f"which {name}, their Cor, compares with."
        )
    if "rouge_l" in names and not has_rouge():
        raise ValueError(f"Task {where}: Cor is ROUGE-L, which needs the package that KILT uses: pip install rouge.")


def cor_names(questions: list[dict], metric: str | None = None, nli: bool = True) -> list[str]:
    """Names of what Cor is on these questions; [`~trainer.judging.figures.NO_JUDGE`] where an NLI model is missing."""
    return sorted({_metric_of(question, metric, nli) or NO_JUDGE for question in questions})


def _metric_of(question: dict, metric: str | None = None, nli: bool = True) -> str | None:
    """What Cor is on a question, by its dataset and by what there is to compare with."""
    return metric or cor_metric(question["dataset"], nli, claims=bool(question.get("meta", {}).get("claims")))


def _has_what_it_needs(question: dict, name: str) -> bool:
    meta = question.get("meta", {})
    if name == "str_em":
        pairs = meta.get("qa_pairs")
        if not pairs or not isinstance(pairs, list):
            return False
        return all(isinstance(pair, dict) and _are_texts(pair.get("short_answers")) for pair in pairs)
    if name == "claim_recall":
        return _are_texts(meta.get("claims"))
    if name.startswith("fever"):
        return len({answer.strip().lower() for answer in question["answers"]} & set(FEVER_LABELS)) == 1
    return bool(question["answers"])


def _are_texts(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(text, str) for text in value)


def is_fever(question: dict) -> bool:
    """Whether a question is a claim with a verdict."""
    if question["dataset"] != "fever" or not question["answers"]:
        return False
    return all(answer.strip().lower() in FEVER_LABELS for answer in question["answers"])


def has_claims(question: dict) -> bool:
    """Whether a question has ALCE's reference claims."""
    return bool(question.get("meta", {}).get("claims"))


def _cor(predictions: list[dict], questions: list[dict], metric: str | None, entail: Judge | None) -> Scores:
    values: Scores = [None] * len(questions)
    names = [_metric_of(question, metric, entail is not None) for question in questions]
    for name in sorted({name for name in names if name is not None}):
        rows = [row for row, its_name in enumerate(names) if its_name == name]
        for row, value in zip(rows, _by_metric(name, predictions, questions, rows, entail), strict=True):
            values[row] = value
    return values


def _by_metric(
    name: str, predictions: list[dict], questions: list[dict], rows: list[int], entail: Judge | None
) -> Sequence[float | None]:
    """The value of each of `rows`; `None` where the metric needs an NLI model that is not there."""
    pairs = [(predictions[row], questions[row]) for row in rows]
    if name in TEXT_METRICS:
        return [correctness(prediction["output"], question["answers"], name) for prediction, question in pairs]
    if name == "str_em":
        return [
            str_em(p["output_with_citations"], question.get("meta", {}).get("qa_pairs"))[0] for p, question in pairs
        ]
    if entail is None:
        return [None] * len(pairs)
    outputs = [prediction["output"] for prediction, _ in pairs]
    if name == "fever_nli":
        claims = [question["input"] for _, question in pairs]
        return fever_nli(outputs, claims, [question["answers"] for _, question in pairs], entail)
    return claim_recall(outputs, [question.get("meta", {}).get("claims") or [] for _, question in pairs], entail)


# ---------------------------------------------------------------------- other figures of answers


def _text_scores(prediction: dict, question: dict, r_precision: float | None) -> dict[str, float]:
    """What needs no model: KILT's scores, FEVER's label, ALCE's str_em."""
    scores: dict[str, float] = {}
    meta = question.get("meta", {})
    if any(answer.strip() for answer in question["answers"]):
        names = [name for name in ANSWER_METRICS if name != "rouge_l" or has_rouge()]
        scores = answer_scores(prediction["output"], question["answers"], names)
        if r_precision is not None:
            scores |= gated_by_retrieval(scores, r_precision)
    if is_fever(question):
        scores["fever_label"] = correctness(prediction["output"], question["answers"], "fever_label")
    if meta.get("qa_pairs"):
        scores["str_em"], scores["str_hit"] = str_em(prediction["output_with_citations"], meta["qa_pairs"])
    return scores


def _text_scores_without_passage(prediction: dict, question: dict) -> dict[str, float]:
    """Exact match of a question that needs no passage; it does not count among those that need one."""
    if not question["answers"]:
        return {}
    return {"em_not_needed": float(exact_match(prediction["output"], question["answers"]))}


def _nli_scores(
    predictions: list[dict], questions: list[dict], hits: Scores, entail: Judge, gr_hypothesis: str
) -> dict[str, Scores]:
    """What the judge says: Gr, also by retrieval success, citations, FEVER, claims."""
    gr = grounding(predictions, entail, hypothesis=gr_hypothesis)
    scores: dict[str, Scores] = {"gr": gr, **by_retrieval("gr", gr, hits)}
    outputs = [prediction["output_with_citations"] for prediction in predictions]
    citations = citation_scores(outputs, [cited_passages(prediction) for prediction in predictions], entail)
    if not any(prediction["retrievals"] for prediction in predictions):
        citations = [None] * len(predictions)  # where nothing can be cited, that nothing is cited says nothing
    for name in ("citation_recall", "citation_precision"):
        scores[name] = [None if output is None else output[name] for output in citations]
    for name, applies in (("fever_nli", is_fever), ("claim_recall", has_claims)):
        rows = [row for row, question in enumerate(questions) if applies(question)]
        scores[name] = [None] * len(questions)
        if rows:
            for row, value in zip(rows, _by_metric(name, predictions, questions, rows, entail), strict=True):
                scores[name][row] = value
    return scores


def _columns(rows: list[dict[str, float]]) -> dict[str, Scores]:
    """`list[dict]` as `dict` of lists; `None` where a row lacks a name."""
    return {name: [row.get(name) for row in rows] for name in dict.fromkeys(name for row in rows for name in row)}


# ---------------------------------------------------------------------- figures


def measure(scores: dict[str, Scores], cor: Collection[str] = ()) -> dict[str, Measured]:
    """
    The figures that apply to any question, in the order of the vocabulary: means with 95 % intervals.

    The interval of a figure that is yes or no of each question is Wilson's: it has a width where all questions are
    alike. Other means have the bootstrap's, whatever their values are.

    Args:
        scores (`dict[str, list[float | None]]`): as from [`score`].
        cor (collection of `str`): what Cor is, see [`cor_names`].
    """
    figures = {}
    for name in in_order(scores):
        values = [value for value in scores[name] if value is not None]
        if values:
            mean = Rate(int(sum(values)), len(values)) if is_binary(name, cor) else Mean.of(values)
            figures[name] = mean.to_dict()
    return figures


def averages(splits: dict[str, str | None], scores: dict[str, dict[str, dict[str, Scores]]]) -> dict[str, dict]:
    """
    Averages in-domain, out-of-domain and over all tasks.

    Args:
        splits (`dict[str, str | None]`): the split of each task.
        scores (`dict[str, dict[str, dict]]`): task -> mode (or scope of a ranking) -> scores, as from [`score`].

    Returns:
        `dict`: `"in-domain"`, `"out-of-domain"`, `"all"`, as far as there are tasks -> mode -> figures, see
        [`average`].
    """
    groups = {name: [task for task, split in splits.items() if split == name] for name in SPLITS}
    averaged: dict[str, dict] = {}
    for group, tasks in {**groups, "all": list(splits)}.items():
        for mode in dict.fromkeys(mode for task in tasks for mode in scores[task]):
            columns = [scores[task].get(mode, {}) for task in tasks]
            figures = averaged.setdefault(group, {}).setdefault(mode, {})
            for name in in_order(name for column in columns for name in column):
                figure = average([column.get(name, []) for column in columns])
                if figure is not None:
                    figures[name] = figure
    return averaged
