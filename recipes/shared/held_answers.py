"""Find answers in texts, whatever the punctuation around them."""

import sys
import unicodedata
from collections.abc import Iterable
from functools import cache

from trainer.questions import normalize_answer, spaced_words


def holds_answer(text: str, answers: Iterable[str]) -> bool:
    """
    Return whether a text holds the words of an answer, see [`~trainer.questions.spaced_words`].

    Both are normalised as for exact match, which makes one word of "1939-1945", and with all punctuation as spaces. It
    is enough if one of the two finds the answer. [`~trainer.questions.has_answer`] is stricter: there, punctuation and
    articles count.
    """
    answers = list(answers)
    for normalize in (normalize_answer, words_between_punctuation):
        words = spaced_words(normalize(text))
        for answer in map(normalize, answers):
            if answer and spaced_words(answer) in words:
                return True
    return False


def words_between_punctuation(text: str) -> str:
    """Normalise a text with a space for each character of punctuation, such as "–" and "“", and each symbol."""
    return normalize_answer(text.translate(spaces_for_punctuation()))


@cache
def spaces_for_punctuation() -> dict[int, str]:
    """Return a table for `str.translate` with all punctuation (P) and symbols (S) of Unicode."""
    return {code: " " for code in range(sys.maxunicode + 1) if unicodedata.category(chr(code))[0] in "PS"}
