"""
Score answers with pure functions of strings: exact match, F1, ROUGE-L and containment, as SQuAD, KILT, ALCE and the
paper define them. No model is needed.
"""

import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from typing import Any

from ..questions import normalize_answer
from .figures import Figure, add_figure

# The metric that is Cor on each dataset, as in the paper's published scoring: an answer that contains the short one is
# right. For KILT's own figures see `kilt_scores`.
DATASET_METRICS = {
    "nq": "short_answer",
    "triviaqa": "short_answer",
    "hotpotqa": "short_answer",
    "squad": "short_answer",
    "zsre": "short_answer",
    "structured_zeroshot": "short_answer",  # KILT's name for zsRE
    "slot_zsre": "short_answer",
    "trex": "short_answer",
    "slot_trex": "short_answer",
    "strategyqa": "short_answer",
    "fever": "fever_nli",
    "wow": "f1",
    "eli5": "rouge_l",
    "asqa": "str_em",
    "qampari": "list_f1",
    "alce_eli5": "claim_recall",
}
FEVER_LABELS = {"supports": ("supports", "true"), "refutes": ("refutes", "false")}


def worded(answers: Iterable[str]) -> list[str]:
    """
    Return the answers of which normalisation leaves something. The others, such as "A", "The" and "...", cannot be
    judged by normalised words: every prediction contains them, and an empty prediction equals them.
    """
    return [answer for answer in answers if normalize_answer(answer)]


def num_with_empty_answers(answers_of_questions: Iterable[Sequence[str]]) -> int:
    """Return the number of questions that have an answer that normalises to nothing, see [`worded`]."""
    return sum(len(worded(answers)) < len(answers) for answers in answers_of_questions)


def exact_match(prediction: str, answers: list[str]) -> bool:
    """Return whether the normalised prediction equals one of the normalised answers."""
    return normalize_answer(prediction) in {normalize_answer(answer) for answer in answers}


def accuracy(prediction: str, answers: list[str]) -> bool:
    """Return KILT's accuracy: whether the prediction is one of the answers, both stripped but not normalised."""
    return prediction.strip() in {answer.strip() for answer in answers}


def unigram_f1(prediction: str, answers: list[str]) -> float:
    """
    Return the F1 of the normalised words for the best answer. (KILT uses it, and the paper for Wizard of Wikipedia.)
    As in KILT, it is 0 if normalisation leaves no word of the prediction or the answer.
    """
    words = normalize_answer(prediction).split()
    return max(_f1(words, normalize_answer(answer).split()) for answer in _not_empty(answers))


def _f1(prediction: list[str], answer: list[str]) -> float:
    common = sum((Counter(prediction) & Counter(answer)).values())
    if not common:
        return 0.0
    precision = common / len(prediction)
    recall = common / len(answer)
    return 2 * precision * recall / (precision + recall)


def short_answer(prediction: str, answers: list[str]) -> bool:
    """
    Return whether one of the normalised answers is a substring of the normalised prediction. (The paper calls this
    accuracy, ALCE presence.) Word boundaries do not matter.
    """
    prediction = normalize_answer(prediction)
    return any(normalize_answer(answer) in prediction for answer in answers)


def rouge_l(prediction: str, answers: list[str]) -> float:
    """
    Return KILT's ROUGE-L for the best answer: the F-score of PyPI's `rouge` (not `rouge_score`) on the texts without
    normalisation. It is 0 for a text without a word.

    Raises:
        `ImportError`: if `rouge` is not installed.
    """
    return max(_rouge_l(prediction, answer) for answer in _not_empty(answers))


def _rouge_l(prediction: str, answer: str) -> float:
    limit = sys.getrecursionlimit()
    # `rouge` recurses once for each word of a sentence.
    sys.setrecursionlimit(limit + len(prediction.split()) + len(answer.split()))
    try:
        return _rouge().get_scores(prediction, answer)[0]["rouge-l"]["f"]
    except ValueError:  # one of the texts has no word
        return 0.0
    finally:
        sys.setrecursionlimit(limit)


@lru_cache(maxsize=1)
def _rouge() -> Any:  # the package has no types
    try:
        from rouge import Rouge
    except ImportError as error:
        raise ImportError(
            "ROUGE-L needs the package that KILT uses: pip install rouge (or the extra: pip install 'cosup[eval]')."
        ) from error
    return Rouge(metrics=["rouge-l"])


def fever_label(prediction: str, answers: list[str]) -> bool:
    """
    Return whether the prediction contains the right verdict: "supports" or "true", "refutes" or "false". As in the
    paper's script, a prediction that contains both verdicts is right.
    """
    labels: list[str] = []
    for answer in answers:
        labels.extend(FEVER_LABELS[fever_verdict(answer)])
    return short_answer(prediction, labels)


def fever_verdict(answer: str) -> str:
    """
    Return the verdict of a FEVER answer, `"supports"` or `"refutes"`.

    Raises:
        `ValueError`: for any other label. (KILT leaves out the claims labelled "NOT ENOUGH INFO".)
    """
    verdict = answer.strip().lower()
    if verdict not in FEVER_LABELS:
        raise ValueError(f"A FEVER answer is {answer!r}, expected one of {sorted(FEVER_LABELS)}.")
    return verdict


TextMetric = Callable[[str, list[str]], float]  # (prediction, answers) -> score

# These are computed for every question with answers.
ANSWER_METRICS: dict[str, TextMetric] = {
    "accuracy": accuracy,
    "em": exact_match,
    "f1": unigram_f1,
    "rouge_l": rouge_l,
}
# The metrics that need no NLI model, under the names of DATASET_METRICS.
TEXT_METRICS: dict[str, TextMetric] = {
    **ANSWER_METRICS,
    "short_answer": short_answer,
    "fever_label": fever_label,
}
KILT_METRICS = ("accuracy", "em", "f1", "rouge_l")  # KILT also reports these gated by retrieval


def add_metric(figure: Figure, function: TextMetric) -> None:
    """
    Let all evaluations of this process score answers by a further metric, which is not part of this package.

    It is computed for each question with answers that needs a passage, and may be the `metric` of a task. Results
    files hold the figure, so that reports and comparisons know it too.

    Args:
        figure ([`Figure`]): name, label and meaning.
        function (`Callable`): `(prediction, answers)` -> score from 0 to 1, of an output and its reference answers.

    Raises:
        `ValueError`: if another figure has this name.
    """
    add_figure(figure)
    ANSWER_METRICS[figure.name] = TEXT_METRICS[figure.name] = function


def cor_metric(dataset: str, nli: bool = True, claims: bool = False, lists: bool = False) -> str | None:
    """
    Return the name of the metric that is Cor on a dataset.

    Args:
        dataset (`str`): name of the dataset. The metric of datasets that are not in `DATASET_METRICS` is
            `"short_answer"`.
        nli (`bool`): whether there is an NLI model. Without one, FEVER is judged by its label, and a report must say
            so.
        claims (`bool`): whether the question has ALCE's reference claims. If so, it is judged by them. (The name of
            the dataset does not tell, because ALCE's ELI5 and KILT's have the same one.)
        lists (`bool`): whether the answer is a list, see [`~trainer.questions.answer_lists`]. If so, it is judged as
            one: by the metrics of short answers, one item would count as the whole list.

    Returns:
        `str`, or `None` if the metric needs an NLI model and there is none.
    """
    if claims:
        metric = "claim_recall"
    elif lists:
        metric = "list_f1"
    else:
        metric = DATASET_METRICS.get(dataset, "short_answer")
    if nli:
        return metric
    without_nli: dict[str, str | None] = {"fever_nli": "fever_label", "claim_recall": None}
    return without_nli.get(metric, metric)


def correctness(prediction: str, answers: list[str], metric: str) -> float:
    """
    Score one answer by a metric of texts.

    Args:
        prediction (`str`): what the model wrote, without passages and citations.
        answers (`list[str]`): reference answers, each of which is right.
        metric (`str`): a key of `TEXT_METRICS`.

    Returns:
        `float` between 0 and 1.
    """
    if metric not in TEXT_METRICS:
        raise ValueError(f"metric is {metric!r}, expected one of {sorted(TEXT_METRICS)}.")
    return float(TEXT_METRICS[metric](prediction, _not_empty(answers)))


def kilt_scores(
    prediction: str, answers: list[str], r_precision: float | None, rouge: bool = True
) -> dict[str, float]:
    """
    Return KILT's scores of one answer, plain and gated by retrieval.

    Args:
        prediction (`str`): what the model wrote; an empty prediction is wrong by every metric.
        answers (`list[str]`): reference answers; empty ones are dropped.
        r_precision (`float`): R-precision of the retrieval; unless it is 1, all `kilt_…` scores are 0.
        rouge (`bool`): whether to compute ROUGE-L.

    Returns:
        `dict[str, float]`: `accuracy`, `em`, `f1`, `rouge_l`, and `kilt_accuracy`, `kilt_em`, `kilt_f1`,
        `kilt_rouge_l`.

    Raises:
        `ValueError`: if there is no answer, or empty ones only.
    """
    names = list(KILT_METRICS)
    if not rouge:
        names.remove("rouge_l")
    scores = answer_scores(prediction, answers, names)
    return scores | gated_by_retrieval(scores, r_precision)


def answer_scores(prediction: str, answers: list[str], names: Iterable[str]) -> dict[str, float]:
    """
    Score one answer by several `TEXT_METRICS`. An empty prediction scores 0 by each. Empty answers are dropped.

    Raises:
        `ValueError`: if there is no answer, or empty ones only.
    """
    prediction = prediction.strip()
    answers = _not_empty([answer.strip() for answer in answers if answer.strip()])
    if not prediction:
        return dict.fromkeys(names, 0.0)
    return {name: correctness(prediction, answers, name) for name in names}


def gated_by_retrieval(scores: dict[str, float], r_precision: float | None) -> dict[str, float]:
    """Return the `kilt_…` scores: the scores of `KILT_METRICS` if R-precision is 1, 0 otherwise."""
    gated: dict[str, float] = {}
    for name in KILT_METRICS:
        if name in scores:
            gated[f"kilt_{name}"] = scores[name] if r_precision == 1 else 0.0
    return gated


# ---------------------------------------------------------------------- ALCE


def alce_output(text: str) -> str:
    """Return the part of an output that ALCE scores: its first line."""
    return text.strip().split("\n")[0].replace("<|im_end|>", "")


def remove_citations(text: str) -> str:
    """Remove citations `[n]` from a text. As in ALCE, all closing brackets go, not only those of citations."""
    return re.sub(r" ?\[\d+", "", text).replace(" |", "").replace("]", "")


def str_em(output: str, qa_pairs: list[dict]) -> tuple[float, float]:
    """
    Return ALCE's correctness on ASQA: the share of a question's readings that have a short answer in the output.

    Args:
        output (`str`): what the model wrote, with or without citations; only the first line counts.
        qa_pairs (`list[dict]`): `{"short_answers": [...]}` for each reading.

    Returns:
        `tuple[float, float]`: `str_em`, the share, and `str_hit`, 1.0 if the share is 1 and 0.0 otherwise.

    Raises:
        `ValueError`: if there are no `qa_pairs`.
    """
    if not qa_pairs:
        raise ValueError("An instance has no qa_pairs: str_em is for ASQA.")
    output = remove_citations(alce_output(output))
    num_answered = sum(short_answer(output, pair["short_answers"]) for pair in qa_pairs)
    share = num_answered / len(qa_pairs)
    return share, float(share == 1)


def listed_items(output: str) -> list[str]:
    """Return what is between the commas of an output, as ALCE splits the lists of QAMPARI; `""` has one empty item."""
    return output.rstrip().rstrip(".").rstrip(",").split(",")


def list_f1(output: str, answer_lists: list[list[str]]) -> float:
    """
    Return ALCE's correctness on QAMPARI, whose questions have many answers: the F1 of precision and recall-5.

    Args:
        output (`str`): answers between commas, with or without citations; only the first line counts.
        answer_lists (`list[list[str]]`): the aliases of each answer.

    Returns:
        `float` between 0 and 1. Precision is the share of what is listed that is an alias. Recall-5 is the number of
        answers of which an alias is listed, over their number; five are enough of more.

    Raises:
        `ValueError`: if there are no answers.
    """
    if not answer_lists:
        raise ValueError("An instance has no lists of answers: list_f1 is for QAMPARI.")
    listed = [normalize_answer(item) for item in listed_items(remove_citations(alce_output(output)))]
    listed = [item for item in listed if item]
    aliases_of_answers = [{normalize_answer(alias) for alias in aliases} for aliases in answer_lists]
    all_aliases = set().union(*aliases_of_answers)
    num_right = sum(item in all_aliases for item in listed)
    num_found = sum(not aliases.isdisjoint(listed) for aliases in aliases_of_answers)
    if not num_right:
        return 0.0
    precision = num_right / len(listed)
    recall = min(5, num_found) / min(5, len(answer_lists))
    return 2 * precision * recall / (precision + recall)


def check_answers(answers_of_questions: Sequence[list[str]]) -> None:
    """Raise a `ValueError`, with counts, if questions have no answers or only empty ones."""
    num_missing = sum(not _has_text(answers) for answers in answers_of_questions)
    if num_missing:
        raise ValueError(
            f"{num_missing} of {len(answers_of_questions)} questions have no answers, or only empty ones: correctness "
            "cannot be judged."
        )


def _not_empty(answers: list[str]) -> list[str]:
    """Return `answers`, or raise if there are none or only empty ones."""
    if not _has_text(answers):
        raise ValueError("An instance has no answers, or only empty ones: correctness cannot be judged.")
    return answers


def _has_text(answers: Iterable[str]) -> bool:
    return any(answer.strip() for answer in answers)
