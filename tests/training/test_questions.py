"""What a question needs: gold passages, or answers in passages."""

import unicodedata

import pytest

from trainer.judging.correctness import DATASET_METRICS
from trainer.questions import (
    LONG_ANSWER_DATASETS,
    answer_place,
    answers_to_find,
    evidence_sets,
    gold_ids,
    has_answer,
    normalize_answer,
)


def test_normalize_answer():
    assert normalize_answer("  The Night-Watch, by a  man! ") == "nightwatch by man"


def test_evidence_sets_and_gold_ids():
    assert evidence_sets([["a", "b"], [], ["b", "a"], ["a"]]) == [{"a", "b"}, {"a"}]
    assert gold_ids({"provenance": [["a", "b"], ["c"]]}) == {"a", "b", "c"}


@pytest.mark.parametrize(
    ("answers", "expected"),
    [
        (["Rembrandt van Rijn"], True),
        (["rembrandt VAN  rijn"], True),
        (["Rembrandt van Rijn!", "1642"], True),  # any one is enough
        (["Rembrandt van Rijn!"], False),  # punctuation is a token
        (["the Night Watch"], False),  # and so is an article
        (["Night Watch"], True),  # of the title
        (["art"], False),  # whole words only: the text has "party"
        (["Rembrandt Rijn"], False),  # words next to each other
        (["Watch A party"], False),  # within the title or within the text
        (["The", "...", ""], False),  # nothing is left of them
        ([], False),
    ],
)
def test_has_answer(answers, expected):
    passage = {"id": "p", "title": "Night Watch", "text": "A party, painted by Rembrandt van Rijn in 1642."}
    assert has_answer(passage, answers) is expected


@pytest.mark.parametrize(
    ("text", "answer", "expected"),
    [
        ("He fought 1939–1945.", "1939", True),
        ("He fought 1939–1945.", "1939–1945", True),
        ("He fought 1939-1945.", "1939–1945", False),  # another dash
        ("He left Paris—for good.", "paris", True),
        ("the “Night Watch”, 1642", "Night Watch", True),
        ("Rembrandt’s wife", "Rembrandt", True),
        ("Rembrandt's wife", "rembrandts", False),
        ("the U.S.A. in 1776", "U.S.A.", True),
        ("the U.S.A. in 1776", "USA", False),
        ("snake_case", "case", True),
        ("£5", "5", True),
        ("5 million", "5\u00a0million", True),  # a space that does not break
        ("zero\u200bwidth", "zero", True),
        ("Müller", "mu\u0308ller", True),  # both forms of Unicode
        ("Müller", "Muller", False),
        ("हिन्दी", "हिन्दी", True),
        ("हिन्दी", "हिन", False),  # vowel signs are marks, which are part of the word
        ("x²", "x", False),
        ("what is C++?", "C++", True),
        ("what is C#?", "C", True),
    ],
)
def test_has_answer_splits_texts_as_the_tokenizer_of_dpr_does(text, answer, expected):
    """Compared with its two regular expressions, which need a module that knows Unicode's categories."""
    assert has_answer({"text": text}, [answer]) is expected
    regex = pytest.importorskip("regex")
    texts = [unicodedata.normalize("NFD", part) for part in (text, answer)]
    found, sought = (
        [token.lower() for token in regex.findall(r"[\p{L}\p{N}\p{M}]+|[^\p{Z}\p{C}]", part)] for part in texts
    )
    places = range(len(found) - len(sought) + 1)
    assert any(found[place : place + len(sought)] == sought for place in places) is expected


@pytest.mark.parametrize(
    ("text", "answer", "expected"),
    [
        ("北京市是中华人民共和国的首都。", "北京", True),
        ("北京市是中华人民共和国的首都。", "京北", False),
        ("李白（701—762），唐朝诗人", "701", True),
        ("彼は1939年に東京で生まれた。", "東京", True),
        ("彼は1939年に東京で生まれた。", "1939", True),
        ("ソニーのPlayStationです", "PlayStation", True),
        ("ソニーのPlayStationです", "Play", False),  # a border is needed between two letters of a script with spaces
        ("きがいる", "きか", False),  # が is か with a mark
        ("เขาเกิดที่กรุงเทพมหานคร", "กรุงเทพ", True),
        ("กิ่ง", "กิ", False),  # the mark is part of the character
        ("ភ្នំពេញជារាជធានី", "ភ្នំពេញ", True),
        ("ရန်ကုန်မြို့", "ရန်ကုန်", True),
        ("서울은 대한민국의 수도이다.", "서울", True),
        ("서울은 대한민국의 수도이다.", "민국", False),  # not where a word begins
        ("각은", "가", False),  # 각 is 가 with a final consonant
        ("1945년에 KBS는", "KBS", True),
    ],
)
def test_has_answer_in_text_without_spaces(text, answer, expected):
    assert has_answer({"text": text}, ["nothing", answer]) is expected


def test_answer_place():
    passages = [{"text": "nothing"}, {"title": "1642", "text": ""}, {"text": "in 1642"}]
    assert answer_place(passages, iter(["x", "1642"])) == 2  # the answers are prepared once for all passages
    assert answer_place(passages[:1], ["1642"]) == 0
    assert answer_place(passages, ["The"]) == 0
    assert answer_place([], ["1642"]) == 0


def test_has_answer_without_a_title():
    assert has_answer({"text": "in 1642"}, ["1642"])
    assert has_answer({"title": None, "text": "in 1642"}, ["1642"])


@pytest.mark.parametrize(
    ("question", "expected"),
    [
        ({"answers": ["1642", "The", "year 1642"]}, ["1642", "year 1642"]),
        ({"dataset": "hotpotqa", "answers": ["Yes."]}, []),
        ({"dataset": "fever", "answers": ["SUPPORTS"]}, []),
        ({"dataset": "eli5", "answers": ["Because light scatters."]}, []),
        ({"dataset": "own", "answers": ["a long text"], "meta": {"claims": ["a claim"]}}, []),
        ({"dataset": "asqa", "answers": ["long"], "meta": {"qa_pairs": [{"short_answers": ["Night"]}]}}, ["Night"]),
        ({"dataset": "qampari", "answers": ["a", "Ems"], "meta": {"answers": [["a"], ["Ems"]]}}, []),  # one is not all
        ({"segments": []}, []),
    ],
)
def test_answers_to_find(question, expected):
    assert answers_to_find(question) == expected


def test_the_datasets_with_long_answers_are_those_whose_metric_compares_texts():
    compared = [name for name, metric in DATASET_METRICS.items() if metric in ("f1", "rouge_l", "claim_recall")]
    assert sorted(LONG_ANSWER_DATASETS) == sorted(compared)
