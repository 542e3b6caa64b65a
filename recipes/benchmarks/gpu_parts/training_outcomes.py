"""The outcome of each question, one character a question: small enough for a results file, enough for a comparison."""

from collections.abc import Mapping
from typing import Any

from trainer.judging.retrieval import Scores

SEARCH_DEPTH = 5  # nearest passages among which the gold passage is looked for
UNKNOWN = "-"  # of a question to which the figure does not apply
FIGURES = {  # name -> label
    "query_recall@1": "R@1",
    "query_recall@5": "R@5",
    "ret": "Ret (own retrieval)",
    "cor": "Cor (own retrieval)",
}


def digits(values: Scores) -> str:
    """
    Return values of 0 and 1 as a string; a value that is missing is "-".

    Raises:
        `ValueError`: for any other value.
    """
    text = ""
    for value in values:
        if value is not None and value not in (0.0, 1.0):
            raise ValueError(f"An outcome is {value}, expected 0 or 1.")
        text += UNKNOWN if value is None else str(int(value))
    return text


def scores_of(outcomes: Mapping[str, Any]) -> dict[str, Scores]:
    """Return the scores of each question by figure, from the strings `gold_places`, `ret` and `cor`."""
    scores: dict[str, Scores] = {}
    for k in (1, SEARCH_DEPTH):
        scores[f"query_recall@{k}"] = [found_within(place, k) for place in outcomes["gold_places"]]
    for name in ("ret", "cor"):
        scores[name] = [None if digit == UNKNOWN else float(digit) for digit in outcomes[name]]
    return scores


def found_within(place: str, k: int) -> float | None:
    """Return 1.0 if a gold passage is among the first `k`, 0.0 if not, `None` if the question has none."""
    if place == UNKNOWN:
        return None
    return float(0 < int(place) <= k)
