"""What a question compares its answers with: reference answers, verdicts, and ALCE's readings, claims and lists."""

from ..questions import answer_lists, are_texts
from .correctness import FEVER_LABELS, worded

# Each field of ALCE in `meta` -> the metric that reads it, and what it must be.
META = {
    "qa_pairs": ("str_em", 'a list of {"short_answers": [texts]}'),
    "claims": ("claim_recall", "a list of texts"),
}


def without_empty_answers(question: dict) -> dict:
    """
    Return a question without the answers that normalise to nothing. This includes ALCE's `short_answers` and QAMPARI's
    aliases; a reading or an answer that has no other is dropped too.
    """
    kept = {**question, "answers": worded(question["answers"])}
    if readings(question):
        pairs = [{**pair, "short_answers": worded(pair["short_answers"])} for pair in readings(question)]
        kept["meta"] = {**question["meta"], "qa_pairs": [pair for pair in pairs if pair["short_answers"]]}
    if answer_lists(question):
        lists = [worded(aliases) for aliases in answer_lists(question)]
        kept["meta"] = {**kept["meta"], "answers": [aliases for aliases in lists if aliases]}
    return kept


def readings(question: dict) -> list[dict]:
    """Return ALCE's readings of a question, `{"short_answers": [...]}`, or an empty list."""
    return (question.get("meta") or {}).get("qa_pairs") or []


def reference_of(metric: str) -> str:
    """Return what a metric compares answers with."""
    if metric == "str_em":
        return "meta.qa_pairs"
    if metric == "list_f1":
        return "meta.answers"
    if metric == "claim_recall":
        return "meta.claims"
    if metric.startswith("fever"):
        return "verdicts"
    return "answers"


def has_reference(question: dict, metric: str) -> bool:
    """Return whether a question holds what a metric compares answers with."""
    meta = question.get("meta", {})
    if metric == "str_em":
        pairs = meta.get("qa_pairs")
        if not pairs or not isinstance(pairs, list):
            return False
        return all(isinstance(pair, dict) and are_texts(pair.get("short_answers")) for pair in pairs)
    if metric == "list_f1":
        return bool(answer_lists(question))
    if metric == "claim_recall":
        return are_texts(meta.get("claims")) and all(claim.strip() for claim in meta["claims"])
    if metric.startswith("fever"):
        verdicts = {answer.strip().lower() for answer in question["answers"]}
        return len(verdicts) == 1 and verdicts <= set(FEVER_LABELS)
    return any(answer.strip() for answer in question["answers"])


def is_fever(question: dict) -> bool:
    """Return whether a question is a claim with a verdict."""
    if question["dataset"] != "fever" or not question["answers"]:
        return False
    return all(answer.strip().lower() in FEVER_LABELS for answer in question["answers"])


def has_claims(question: dict) -> bool:
    """Return whether a question has ALCE's reference claims."""
    return bool(question.get("meta", {}).get("claims"))
