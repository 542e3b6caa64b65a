"""Grounding and citations, counted by hand with a judge whose answers are written down."""

import pytest

from trainer.judging.grounding import (
    citation_scores,
    cited_passages,
    claim_recall,
    fever_nli,
    grounding,
    k_precision,
    split_sentences,
)

A, B, C, D = ({"title": title, "text": f"text {title}"} for title in "ABCD")


class Judge:
    """Entails a hypothesis that stands in `entailed`, on any premise that holds one of its passages (`A`) or a group of them (`AB`)."""

    def __init__(self, **entailed):
        self.entailed, self.asked = entailed, []

    def __call__(self, pairs):
        self.asked.append(list(pairs))
        groups = [self.entailed.get(claim.split()[0].lower(), []) for _, claim in pairs]
        return [
            any(all(f"text {letter}" in premise for letter in group) for group in each)
            for (premise, _), each in zip(pairs, groups, strict=True)
        ]


def scores(output, judge, passages=(A, B, C, D)):
    return citation_scores([output], [list(passages)], judge)[0]


def retrieval(text, *passages):
    return {"grounded_text": text, "passages": [{"id": passage["title"], **passage} for passage in passages]}


@pytest.mark.parametrize(
    "text, sentences",
    [
        ("One. Two! Three? four", ["One.", "Two!", "Three?", "four"]),
        (
            "Dr. J. R. Smith of the U.S. Senate came at 5 p.m. today. He left.",
            ["Dr. J. R. Smith of the U.S. Senate came at 5 p.m. today.", "He left."],
        ),
        (
            "It costs 3.5 million. No. 5 is it, he said no. Then...  came",
            ["It costs 3.5 million.", "No. 5 is it, he said no.", "Then...  came"],
        ),
        ('He said "Go." Then (at last.) he went.', ['He said "Go."', "Then (at last.)", "he went."]),
        ("A fact [1]. another [2][3].  Third [4]", ["A fact [1].", "another [2][3].", "Third [4]"]),
        ("  \n ", []),
        ("One.\nTwo.", ["One.", "Two."]),
    ],
)
def test_split_sentences(text, sentences):
    assert split_sentences(text) == sentences


def test_grounding_judges_each_sentence_by_its_own_passage():
    judge = Judge(night=["A"], radium=["B"])
    predictions = [
        {
            "retrievals": [retrieval("Night fell. Radium glows.", A), retrieval("Radium glows.", B)]
        },  # the second sentence stands under the wrong passage
        {"retrievals": []},
        {"retrievals": [retrieval("", A)]},
        {"retrievals": [retrieval("Night fell.", B, A)]},  # several passages of one retrieval stand together
    ]
    assert grounding(predictions, judge) == [pytest.approx(2 / 3), None, None, 1.0]
    assert judge.asked == [
        [
            ("Title: A\ntext A", "Night fell."),
            ("Title: A\ntext A", "Radium glows."),
            ("Title: B\ntext B", "Radium glows."),
            ("Title: B\ntext B\nTitle: A\ntext A", "Night fell."),
        ]
    ]
    grounding([{"retrievals": [retrieval("Night", {"title": "", "text": "bare"})]}], judge)
    assert judge.asked[-1] == [("Title: \nbare", "Night")]


def test_a_short_answer_is_judged_with_its_question():
    judge = Judge(what=["A"])
    predictions = [
        {"input": "what {fell}?", "retrievals": [retrieval("Night", A)]},
        {"input": "and {0}?", "retrievals": [retrieval("Day {x}.", A)]},
    ]
    assert grounding(predictions, judge, hypothesis="{question} {sentence}") == [1.0, 0.0]
    assert judge.asked[-1] == [("Title: A\ntext A", "what {fell}? Night"), ("Title: A\ntext A", "and {0}? Day {x}.")]
    for wrong, reason in (
        ("{question}", "expected a template with {sentence}"),
        ("{sentence} {}", "expected a template"),
        ("{sentence", "expected '}'"),
    ):
        with pytest.raises(ValueError, match=reason):
            grounding(predictions, judge, hypothesis=wrong)


def test_a_judge_that_does_not_answer_is_an_error():
    predictions = [{"retrievals": [retrieval("One. Two.", A)]}]
    with pytest.raises(ValueError, match="answered 1 of 2 pairs"):
        grounding(predictions, lambda pairs: [True, None])
    with pytest.raises(ValueError, match="answered 1 of 2 pairs"):
        grounding(predictions, lambda pairs: [True])


def test_k_precision_counts_words_in_their_own_passages():
    passage = {"title": "Night Watch", "text": "It was painted by Rembrandt."}
    assert k_precision({"retrievals": [retrieval("The Night Watch, painted by Vermeer", passage)]}) == pytest.approx(
        4 / 5
    )
    assert (
        k_precision({"retrievals": [retrieval("Rembrandt Rembrandt", passage)]}) == 0.5
    )  # as often as the passage holds it
    assert k_precision({"retrievals": [retrieval("painted", passage), retrieval("painted", A)]}) == 0.5
    assert k_precision({"retrievals": []}) is None is k_precision({"retrievals": [retrieval("the", passage)]})


def test_citations_by_hand():
    assert scores("Night fell [1].", Judge(night=["A"])) | {"sentences": 0} == {
        "citation_recall": 1.0,
        "citation_precision": 1.0,
        "sentences": 0,
        "several": 0,
        "supported": 0,
        "unneeded": 0,
    }
    wrong = scores("Night fell [2].", Judge(night=["A"]))
    assert (wrong["citation_recall"], wrong["citation_precision"]) == (0.0, 0.0)
    bare = scores("Night fell [1]. Radium glows.", Judge(night=["A"], radium=["A"]))  # no citation, no credit
    assert (bare["citation_recall"], bare["citation_precision"], bare["sentences"]) == (0.5, 1.0, 2)
    assert scores("Radium glows.", Judge(radium=["A"]))["citation_precision"] == 0.0
    assert scores(" \n Night fell [1].", Judge(night=["A"]))["citation_recall"] == 1.0
    assert scores("", Judge()) is None


def test_numbers_of_citations_count_distinct_passages():
    prediction = {"retrievals": [retrieval("", A, B), retrieval("", C, A)]}
    assert [passage["id"] for passage in cited_passages(prediction)] == ["A", "B", "C"]
    assert cited_passages(prediction)[2] == {"id": "C", **C} and cited_passages({"retrievals": []}) == []


def test_an_unneeded_citation_costs_precision():
    """[2] alone does not entail, and [1] does without it; of two that are needed together each counts."""
    over = scores("Night fell [1][2].", Judge(night=["A"]))
    assert (over["citation_recall"], over["citation_precision"], over["unneeded"], over["supported"]) == (
        1.0,
        0.5,
        1,
        1,
    )
    both = scores("Night fell [1][2].", Judge(night=["AB"]))
    assert (both["citation_precision"], both["unneeded"]) == (1.0, 0)
    either = scores("Night fell [1][2].", Judge(night=["A", "B"]))
    assert either["citation_precision"] == 1.0
    neither = scores("Night fell [3][4].", Judge(night=["A"]))
    assert (neither["citation_recall"], neither["citation_precision"], neither["several"], neither["supported"]) == (
        0.0,
        0.0,
        1,
        0,
    )


def test_three_citations_count_and_the_rest_is_ignored():
    judge = Judge(night=["D"])
    fourth = scores("Night fell [1][2][3][4].", judge)
    assert (fourth["citation_recall"], fourth["citation_precision"]) == (0.0, 0.0)
    assert judge.asked[0] == [("Title: A\ntext A\nTitle: B\ntext B\nTitle: C\ntext C", "Night fell.")]
    assert (
        citation_scores(["Night fell [1][2][3][4]."], [[A, B, C, D]], judge, at_most_citations=4)[0]["citation_recall"]
        == 1.0
    )


@pytest.mark.parametrize("marker", ["[5]", "[0]", "[1][7]"])
def test_a_citation_out_of_range_voids_the_sentence(marker):
    """The other sentence's citation is the only one that counts."""
    found = scores(f"Night fell {marker}. Night fell [1].", Judge(night=["A"]))
    assert (found["citation_recall"], found["citation_precision"]) == (0.5, 1.0)


def test_citations_of_all_outputs_are_judged_together():
    judge = Judge(night=["A"], radium=["B"])
    found = citation_scores(["Night fell [1][2].", "", "Radium glows [2]."], [[A, B]] * 3, judge)
    assert len(judge.asked) == 3 and [len(pairs) for pairs in judge.asked] == [2, 2, 1]
    assert [each and each["citation_precision"] for each in found] == [0.5, None, 1.0]


def test_claim_recall():
    judge = Judge(night=["A"], radium=["B"])
    assert claim_recall(["text A [1].\ntext B", "text A and text B"], [["night", "radium"], ["radium"]], judge) == [
        0.5,
        1.0,
    ]  # the first line
    assert judge.asked[0][0] == ("text A.", "night")
    with pytest.raises(ValueError, match="1 of 2 questions have no claims"):
        claim_recall(["a", "b"], [["x"], []], judge)


def test_fever_by_nli():
    judge = Judge(claim=["A"])
    outputs = ["text A", "text B", "text A", "text B", ""]
    answers = [["SUPPORTS"], ["supports"], ["REFUTES"], ["refutes"], ["refutes"]]
    assert fever_nli(outputs, ["Claim it is."] * 5, answers, judge) == [
        1.0,
        0.0,
        0.0,
        1.0,
        0.0,
    ]  # nothing written is wrong
    assert len(judge.asked[0]) == 4
    with pytest.raises(ValueError, match="expected one verdict"):
        fever_nli(["x"], ["c"], [["supports", "refutes"]], judge)
