"""What a question needs: gold passages, or answers in passages."""

import pytest

from trainer.judging.correctness import DATASET_METRICS
from trainer.questions import (
    LONG_ANSWER_DATASETS,
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
        (["a rembrandt Van-Rijn", "RIJN!"], True),  # normalised, and any one is enough
        (["the Night Watch"], True),  # of the title
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
        ({"segments": []}, []),
    ],
)
def test_answers_to_find(question, expected):
    assert answers_to_find(question) == expected


def test_the_datasets_with_long_answers_are_those_whose_metric_compares_texts():
    compared = [name for name, metric in DATASET_METRICS.items() if metric in ("f1", "rouge_l", "claim_recall")]
    assert sorted(LONG_ANSWER_DATASETS) == sorted(compared)
