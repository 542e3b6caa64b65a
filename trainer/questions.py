"""What a question needs: gold passages or, where they are unknown, answers that a passage can be searched for."""

import re
import string
import unicodedata
from collections.abc import Iterable, Sequence

ANSWERS_IN_PASSAGES = 2  # number of the rule of `answers_to_find` and `answer_place`; raise it when they change
VERDICTS = ("yes", "no", "true", "false", "supports", "refutes")  # answers that no passage can be searched for
LONG_ANSWER_DATASETS = ("wow", "eli5", "alce_eli5")  # answered by whole sentences, which no passage repeats
WITHOUT_PUNCTUATION = str.maketrans("", "", string.punctuation)
# Letters of scripts that put no spaces between words.
UNSPACED = (
    "\u0e01-\u0e3e\u0e40-\u0e4e\u0e81-\u0ecf\u0edc-\u0edf"  # Thai, Lao
    "\u1000-\u103f\u1050-\u108f\u1780-\u17d3\u17d7\u17dc\u17dd"  # Burmese, Khmer
    "\u3005-\u3007\u3041-\u309a\u309d-\u309f\u30a1-\u30fa\u30fc-\u30ff\u31f0-\u31ff\uff66-\uff9f"  # Japanese
    "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"  # Chinese
)

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


class _Spaces(dict[int, str]):
    """A table for `str.translate` that puts spaces around punctuation and symbols, and in place of what is no text."""

    def __missing__(self, code: int) -> str:
        character = chr(code)
        kind = unicodedata.category(character)[0]
        if kind in "LMN":  # letters, their marks, and numbers
            spaced = character
        elif kind in "ZC":  # separators and control characters
            spaced = " "
        else:
            spaced = f" {character} "
        self[code] = spaced
        return spaced


_SPACES = _Spaces()


def _tokens(text: str) -> str:
    """
    Return the tokens of a text, in lower case, with single spaces between them. As in DPR's `SimpleTokenizer`, a token
    is a run of letters, marks and digits, or any other visible character: "1939–1945" has three.
    """
    return " ".join(unicodedata.normalize("NFD", text).translate(_SPACES).lower().split())


_UNSPACED_CHARACTER = re.compile(rf"[{UNSPACED}][^\w\s]*")  # and its marks
_LATER_SYLLABLE = re.compile(r"(?<=\S)[\u1100-\u115f][\u1160-\u11ff]*")  # of a Korean word, as NFD writes it


def spaced_words(text: str) -> str:
    """
    Return the words of a normalised text with a space before and after each: an answer stands in a text if one string
    is in the other.

    Chinese, Japanese, Thai, Lao, Khmer and Burmese have no spaces between words, so each character is a word. A Korean
    word may go on with a particle, so each of its syllables is a word, but an answer begins where a word does.
    """
    if text.isascii():
        return f" {' '.join(text.split())} "
    text = unicodedata.normalize("NFD", text)
    text = _UNSPACED_CHARACTER.sub(r" \g<0> ", text)
    text = _LATER_SYLLABLE.sub(r" +\g<0> ", text)
    return f" {' '.join(text.split())} "


def has_answer(passage: dict, answers: Iterable[str]) -> bool:
    """
    Return whether a passage holds one of the answers, as DPR judges retrieval without gold passages.

    The tokens of the answer must stand next to each other in the title or in the text: "art" is not in "party", "1939"
    is in "1939–1945", and "The Hague" is not in "Hague". Unlike in DPR, an answer is also found within text without
    spaces and before a Korean particle, see [`spaced_words`], and one that normalises to nothing, such as "The", is in
    no passage.

    Args:
        passage (`dict`): with `"text"` and, unless it has none, `"title"`.
        answers (iterable of `str`): see [`answers_to_find`] for those that mean something here.
    """
    return answer_place([passage], answers) > 0


def answer_place(passages: Iterable[dict], answers: Iterable[str]) -> int:
    """
    Return the place of the first passage that holds an answer, counted from 1, or 0 if none does.

    Args:
        passages (iterable of `dict`), answers (iterable of `str`): see [`has_answer`].
    """
    sought = [spaced_words(_tokens(answer)) for answer in answers if normalize_answer(answer)]
    for place, passage in enumerate(passages, 1):
        for name in ("title", "text"):
            text = spaced_words(_tokens(passage.get(name) or ""))
            if any(words in text for words in sought):
                return place
    return 0


def answer_lists(question: dict) -> list[list[str]]:
    """Return QAMPARI's answers, each a list of aliases, or an empty list if `meta.answers` is none of such lists."""
    lists = (question.get("meta") or {}).get("answers")
    if not isinstance(lists, list) or not all(are_texts(aliases) for aliases in lists):
        return []
    return lists


def are_texts(value: object) -> bool:
    """Return whether a value is a list of one or more texts."""
    return isinstance(value, list) and bool(value) and all(isinstance(text, str) for text in value)


def answers_to_find(question: dict) -> list[str]:
    """
    Return the answers of a question that a passage can be searched for; none if `hit_rate@k` means nothing there.

    They are its `answers` or, if it has ALCE's readings, their short answers. Answers that normalise to nothing and
    verdicts (yes, no, true, false, supports, refutes) are left out: a passage that holds the word "no" answers
    nothing. Questions answered by whole sentences have none: questions of Wizard of Wikipedia and ELI5, questions with
    ALCE's claims, and questions with `"meta": {"long_answers": true}`. Nor have questions whose answer is a list, see
    [`answer_lists`]: a passage that holds one of ten answers does not answer the question.

    Args:
        question (`dict`): an instance with `answers`; `dataset` and `meta` are read if it has them.
    """
    meta = question.get("meta") or {}
    if meta.get("long_answers") or meta.get("claims") or answer_lists(question):
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
