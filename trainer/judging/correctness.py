"""Is the answer right: exact match, F1, ROUGE-L and containment, as SQuAD, KILT, ALCE and the paper count them. Functions of strings, no models."""

import re
import string
import sys
from collections import Counter
from collections.abc import Callable, Iterable
from functools import lru_cache

# Cor, by dataset. What the paper's published scoring counts; a long answer that holds the short one is right. KILT's own figures are `kilt_scores`.
DATASET_METRICS = {
    "nq": "short_answer",
    "triviaqa": "short_answer",
    "hotpotqa": "short_answer",
    "squad": "short_answer",
    "zsre": "short_answer",
    "structured_zeroshot": "short_answer",  # KILT's name of zsRE
    "slot_zsre": "short_answer",
    "trex": "short_answer",
    "slot_trex": "short_answer",
    "strategyqa": "short_answer",
    "fever": "fever_nli",
    "wow": "f1",
    "eli5": "rouge_l",
    "asqa": "str_em",
    "alce_eli5": "claim_recall",
}
FEVER_LABELS = {"supports": ("supports", "true"), "refutes": ("refutes", "false")}


def normalize_answer(text: str) -> str:
    """SQuAD's and KILT's: lower case, without punctuation and articles, single spaces."""
    text = "".join(character for character in text.lower() if character not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def exact_match(prediction: str, answers: list[str]) -> bool:
    """Whether the normalised prediction equals one of the normalised answers."""
    return normalize_answer(prediction) in {normalize_answer(answer) for answer in answers}


def accuracy(prediction: str, answers: list[str]) -> bool:
    """KILT's accuracy: whether the prediction, stripped and otherwise as it is, is one of the answers."""
    return prediction.strip() in {answer.strip() for answer in answers}


def unigram_f1(prediction: str, answers: list[str]) -> float:
    """
    F1 of the normalised words, the best over all answers (KILT; Wizard of Wikipedia in the paper). 0 where prediction or
    answer has no word left, as KILT has it.
    """
    words = normalize_answer(prediction).split()
    return max(_f1(words, normalize_answer(answer).split()) for answer in _some(answers))


def _f1(prediction: list[str], answer: list[str]) -> float:
    common = sum((Counter(prediction) & Counter(answer)).values())
    if not common:
        return 0.0
    precision, recall = common / len(prediction), common / len(answer)
    return 2 * precision * recall / (precision + recall)


def short_answer(prediction: str, answers: list[str]) -> bool:
    """
    Whether one of the normalised answers is part of the normalised prediction (the paper's accuracy, ALCE's presence):
    substrings, not words.
    """
    prediction = normalize_answer(prediction)
    return any(normalize_answer(answer) in prediction for answer in answers)


def rouge_l(prediction: str, answers: list[str]) -> float:
    """
    KILT's ROUGE-L: the F figure of PyPI's `rouge` (not `rouge_score`) on the texts as they are, the best over all answers; 0 for a text without a word.

    Raises:
        `ImportError`: when `rouge` is not installed.
    """
    return max(_rouge_l(prediction, answer) for answer in _some(answers))


def _rouge_l(prediction, answer):
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(
        limit + len(prediction.split()) + len(answer.split())
    )  # `rouge` recurses once for each word of a sentence
    try:
        return _rouge().get_scores(prediction, answer)[0]["rouge-l"]["f"]
    except ValueError:  # no word in one of them
        return 0.0
    finally:
        sys.setrecursionlimit(limit)


@lru_cache(maxsize=1)
def _rouge():
    try:
        from rouge import Rouge
    except ImportError as error:
        raise ImportError(
            "ROUGE-L needs the package that KILT uses: pip install rouge (or the extra: pip install 'cosup[eval]')."
        ) from error
    return Rouge(metrics=["rouge-l"])


def fever_label(prediction: str, answers: list[str]) -> bool:
    """Whether the prediction holds the right verdict: "supports" or "true", "refutes" or "false". Holding both, as in the paper's script, is not wrong."""
    return short_answer(prediction, [word for answer in answers for word in FEVER_LABELS[fever_verdict(answer)]])


def fever_verdict(answer: str) -> str:
    """
    `"supports"` or `"refutes"`.

    Raises:
        `ValueError`: for another label (claims without enough information are not in KILT).
    """
    verdict = answer.strip().lower()
    if verdict not in FEVER_LABELS:
        raise ValueError(f"A FEVER answer is {answer!r}, expected one of {sorted(FEVER_LABELS)}.")
    return verdict


TextMetric = Callable[[str, list[str]], float]  # (prediction, answers) -> number

ANSWER_METRICS: dict[str, TextMetric] = {  # scores of every question with answers; a new one needs its line here
    "accuracy": accuracy,
    "em": exact_match,
    "f1": unigram_f1,
    "rouge_l": rouge_l,
}
TEXT_METRICS: dict[str, TextMetric] = {  # what Cor can be without a judge, with the names of DATASET_METRICS
    **ANSWER_METRICS,
    "short_answer": short_answer,
    "fever_label": fever_label,
}
KILT_METRICS = ("accuracy", "em", "f1", "rouge_l")  # that KILT also counts only with all of the evidence


def cor_metric(dataset: str, nli: bool = True, claims: bool = False) -> str | None:
    """
    Name of the metric that is Cor on a dataset.

    Args:
        dataset (`str`): a dataset that is not in `DATASET_METRICS` gets `"short_answer"`.
        nli (`bool`): whether there is an NLI model. Without one FEVER is judged by its label; a report must say which of the two it shows.
        claims (`bool`): whether the question has ALCE's reference claims: then it is judged by them (ALCE's ELI5 is called as KILT's).

    Returns:
        `str`, or `None` where the metric needs an NLI model that is not there.
    """
    metric = "claim_recall" if claims else DATASET_METRICS.get(dataset, "short_answer")
    if nli or metric not in ("fever_nli", "claim_recall"):
        return metric
    return "fever_label" if metric == "fever_nli" else None


def correctness(prediction: str, answers: list[str], metric: str) -> float:
    """
    One answer by one of the metrics that read nothing but texts.

    Args:
        prediction (`str`): what the model wrote, without passages and citations.
        answers (`list[str]`): any of them is right.
        metric (`str`): a key of `TEXT_METRICS`.

    Returns:
        `float` between 0 and 1.
    """
    if metric not in TEXT_METRICS:
        raise ValueError(f"metric is {metric!r}, expected one of {sorted(TEXT_METRICS)}.")
    return float(TEXT_METRICS[metric](prediction, _some(answers)))


def kilt_scores(
    prediction: str, answers: list[str], r_precision: float | None, rouge: bool = True
) -> dict[str, float]:
    """
    KILT's scores of one answer, and the same gated by retrieval.

    Args:
        prediction (`str`): an empty one is wrong by every metric.
        answers (`list[str]`): empty ones are dropped.
        r_precision (`float`): of the retrieval; a `kilt_…` score counts only where it is 1.
        rouge (`bool`): whether to compute ROUGE-L.

    Returns:
        `dict[str, float]`: `accuracy`, `em`, `f1`, `rouge_l`, and `kilt_accuracy`, `kilt_em`, `kilt_f1`, `kilt_rouge_l`.
    """
    scores = answer_scores(prediction, answers, [name for name in KILT_METRICS if rouge or name != "rouge_l"])
    return scores | gated_by_retrieval(scores, r_precision)


def answer_scores(prediction: str, answers: list[str], names: Iterable[str]) -> dict[str, float]:
    """One answer by several of `TEXT_METRICS`. An empty prediction is wrong by every one; empty answers are dropped."""
    answers, prediction = [answer.strip() for answer in answers if answer.strip()], prediction.strip()
    return {name: correctness(prediction, answers, name) if prediction else 0.0 for name in names}


def gated_by_retrieval(scores: dict[str, float], r_precision: float | None) -> dict[str, float]:
    """The `kilt_…` scores: the scores of `KILT_METRICS` where R-precision is 1, else 0."""
    gated = {}
    for name in KILT_METRICS:
        if name in scores:
            gated[f"kilt_{name}"] = scores[name] if r_precision == 1 else 0.0
    return gated


# ---------------------------------------------------------------------- ALCE


def alce_output(text: str) -> str:
    """What ALCE scores of an output: its first line."""
    return text.strip().split("\n")[0].replace("<|im_end|>", "")


def remove_citations(text: str) -> str:
    """A text without `[n]`. As in ALCE, every closing bracket goes, not only a citation's."""
    return re.sub(r" ?\[\d+", "", text).replace(" |", "").replace("]", "")


def str_em(output: str, qa_pairs: list[dict]) -> tuple[float, float]:
    """
    ALCE's correctness on ASQA: the share of a question's readings of which a short answer is contained in the output.

    Args:
        output (`str`): may hold citations; only its first line counts.
        qa_pairs (`list[dict]`): `{"short_answers": [...]}` for each reading.

    Returns:
        `(str_em, str_hit)`: the share, and 1.0 where it is 1.
    """
    if not qa_pairs:
        raise ValueError("An instance has no qa_pairs: str_em is for ASQA.")
    output = remove_citations(alce_output(output))
    share = sum(short_answer(output, pair["short_answers"]) for pair in qa_pairs) / len(qa_pairs)
    return share, float(share == 1)


def _some(answers: list[str]) -> list[str]:
    if not answers:
        raise ValueError("An instance has no answers: correctness cannot be judged.")
    return answers
