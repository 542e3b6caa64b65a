"""What a question needs: gold passages or, where they are unknown, answers that a passage can be searched for."""

import re
import string
from collections.abc import Iterable, Sequence

VERDICTS = ("yes", "no", "true", "false", "supports", "refutes")  # answers that no passage can be searched for
LONG_ANSWER_DATASETS = ("wow", "eli5", "alce_eli5")  # answered by whole sentences, which no passage repeats
WITHOUT_PUNCTUATION = str.maketrans("", "", string.punctuation)

# ---------------------------------------------------------------------- gold passages


def evidence_sets(provenance: Sequence[Sequence[str]] | None) -> list[set[str]]:
    """
    Return the distinct, non-empty evidence sets of a `provenance`.

    Raises:
        `ValueError`: if there is no such set.
    """
    sets: list[set[str]] = []
    for evidence in map(set, provenance or []):
        if evidence and evidence not in sets:
            sets.append(evidence)
    if not sets:
        raise ValueError("The provenance is empty: retrieval cannot be judged.")
    return sets


def gold_ids(instance: dict) -> set[str]:
    """Return the ids of all gold passages: the union of the evidence sets in `provenance`."""
    return {id for evidence in instance["provenance"] for id in evidence}


def provenance_unknown(instance: dict) -> bool:
    """Return whether it is unknown which passages a question needs, if any: `"meta": {"provenance_unknown": true}`."""
    return bool((instance.get("meta") or {}).get("provenance_unknown"))


# ---------------------------------------------------------------------- answers in passages


def normalize_answer(text: str) -> str:
    """Normalise a text as SQuAD and KILT do: lower case, no punctuation, no articles, single spaces."""
    without_punctuation = text.lower().translate(WITHOUT_PUNCTUATION)
    without_articles = re.sub(r"\b(a|an|the)\b", " ", without_punctuation)
    return " ".join(without_articles.split())


def has_answer(passage: dict, answers: Iterable[str]) -> bool:
    """
    Return whether a passage holds one of the answers, as DPR and Atlas judge retrieval without gold passages.

    The words of the normalised answer must stand next to each other in the normalised title or the normalised text;
    "art" is not in "party". [`normalize_answer`] makes one word of a hyphenated one. An answer that normalises to
    nothing, such as "The", is in no passage.

    Args:
        passage (`dict`): with `"text"` and, unless it has none, `"title"`.
        answers (iterable of `str`): see [`answers_to_find`] for those that mean something here.
    """
    words = [normalize_answer(answer) for answer in answers]
    texts = [f" {normalize_answer(passage.get(name) or '')} " for name in ("title", "text")]
    return any(f" {answer} " in text for answer in words if answer for text in texts)


def answers_to_find(question: dict) -> list[str]:
    """
    Return the answers of a question that a passage can be searched for; none if `hit_rate@k` means nothing there.

    They are its `answers` or, if it has ALCE's readings, their short answers. Answers that normalise to nothing and
    verdicts (yes, no, true, false, supports, refutes) are left out: a passage that holds the word "no" answers
    nothing. Questions answered by whole sentences have none: questions of Wizard of Wikipedia and ELI5, questions with
    ALCE's claims, and questions with `"meta": {"long_answers": true}`.

    Args:
        question (`dict`): an instance with `answers`; `dataset` and `meta` are read if it has them.
    """
    meta = question.get("meta") or {}
    if meta.get("long_answers") or meta.get("claims"):
        return []
    if question.get("dataset") in LONG_ANSWER_DATASETS:
        return []
    answers = question.get("answers") or []
    if meta.get("qa_pairs"):
        answers = [answer for pair in meta["qa_pairs"] for answer in pair["short_answers"]]
    return [answer for answer in answers if normalize_answer(answer) not in ("", *VERDICTS)]


def ranking_can_be_judged(question: dict) -> bool:
    """
    Return whether a ranking of passages is right or wrong for a question: it has gold passages or, if it is unknown
    which passages it needs, answers that they can be searched for.
    """
    if question["provenance"]:
        return True
    return provenance_unknown(question) and bool(answers_to_find(question))
