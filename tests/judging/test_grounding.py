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
    """
    Judges a hypothesis by its first word. `Judge(night=["A", "BC"])` says that a hypothesis about the night follows
    from any premise with passage A, or with passages B and C. `asked` holds the pairs of each call.
    """

    def __init__(self, **entailing):
        self.entailing = entailing
        self.asked = []

    def __call__(self, pairs):
        self.asked.append(list(pairs))
        return [self._entails(premise, hypothesis) for premise, hypothesis in pairs]

    def _entails(self, premise, hypothesis):
        first_word = hypothesis.split()[0].lower()
        groups = self.entailing.get(first_word, [])
        return any(all(f"text {letter}" in premise for letter in group) for group in groups)


def scores(output, judge, passages=(A, B, C, D)):
    return citation_scores([output], [list(passages)], judge)[0]


def recall_and_precision(output_scores):
    return output_scores["citation_recall"], output_scores["citation_precision"]


def retrieval(text, *passages):
    return {"grounded_text": text, "passages": [{"id": passage["title"], **passage} for passage in passages]}


@pytest.mark.parametrize(
    ("text", "sentences"),
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
    wrong_passage = [retrieval("Night fell. Radium glows.", A), retrieval("Radium glows.", B)]
    several_passages = [retrieval("Night fell.", B, A)]
    retrievals = [wrong_passage, [], [retrieval("", A)], several_passages]
    predictions = [{"retrievals": prediction_retrievals} for prediction_retrievals in retrievals]
    assert grounding(predictions, judge) == [pytest.approx(2 / 3), None, None, 1.0]
    assert judge.asked == [
        [
            ("Title: A\ntext A", "Night fell."),
            ("Title: A\ntext A", "Radium glows."),
            ("Title: B\ntext B", "Radium glows."),
            ("Title: B\ntext B\nTitle: A\ntext A", "Night fell."),
        ]
    ]


def test_a_passage_without_a_title_keeps_the_form_of_a_premise():
    judge = Judge()
    grounding([{"retrievals": [retrieval("Night", {"title": "", "text": "bare"})]}], judge)
    assert judge.asked == [[("Title: \nbare", "Night")]]


def test_a_short_answer_is_judged_with_its_question():
    judge = Judge(what=["A"])
    predictions = [
        {"input": "what {fell}?", "retrievals": [retrieval("Night", A)]},
        {"input": "and {0}?", "retrievals": [retrieval("Day {x}.", A)]},
    ]
    assert grounding(predictions, judge, hypothesis="{question} {sentence}") == [1.0, 0.0]
    assert judge.asked[-1] == [("Title: A\ntext A", "what {fell}? Night"), ("Title: A\ntext A", "and {0}? Day {x}.")]


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{question}", "expected a template with {sentence}"),
        ("{sentence} {}", "expected a template"),
        ("{sentence", "expected '}'"),
    ],
)
def test_a_bad_template_is_an_error(template, reason):
    with pytest.raises(ValueError, match=reason):
        grounding([{"input": "what?", "retrievals": [retrieval("Night", A)]}], Judge(), hypothesis=template)


def test_a_judge_that_does_not_answer_is_an_error():
    predictions = [{"retrievals": [retrieval("One. Two.", A)]}]
    with pytest.raises(ValueError, match="answered 1 of 2 pairs"):
        grounding(predictions, lambda pairs: [True, None])
    with pytest.raises(ValueError, match="answered 1 of 2 pairs"):
        grounding(predictions, lambda pairs: [True])


def test_k_precision_counts_words_in_their_own_passages():
    passage = {"title": "Night Watch", "text": "It was painted by Rembrandt."}
    four_of_five = {"retrievals": [retrieval("The Night Watch, painted by Vermeer", passage)]}
    assert k_precision(four_of_five) == pytest.approx(4 / 5)
    repeated = {"retrievals": [retrieval("Rembrandt Rembrandt", passage)]}
    assert k_precision(repeated) == 0.5  # a word counts as often as the passage holds it
    once_in_its_passage = {"retrievals": [retrieval("painted", passage), retrieval("painted", A)]}
    assert k_precision(once_in_its_passage) == 0.5
    assert k_precision({"retrievals": []}) is None
    assert k_precision({"retrievals": [retrieval("the", passage)]}) is None


def test_citations_by_hand():
    right = scores("Night fell [1].", Judge(night=["A"]))
    assert right == {
        "citation_recall": 1.0,
        "citation_precision": 1.0,
        "sentences": 1,
        "several": 0,
        "supported": 0,
        "unneeded": 0,
    }
    wrong = scores("Night fell [2].", Judge(night=["A"]))
    assert recall_and_precision(wrong) == (0.0, 0.0)
    without_citation = scores("Night fell [1]. Radium glows.", Judge(night=["A"], radium=["A"]))
    assert recall_and_precision(without_citation) == (0.5, 1.0)
    assert without_citation["sentences"] == 2
    assert scores("Radium glows.", Judge(radium=["A"]))["citation_precision"] == 0.0
    assert scores(" \n Night fell [1].", Judge(night=["A"]))["citation_recall"] == 1.0
    assert scores("", Judge()) is None


def test_numbers_of_citations_count_distinct_passages():
    passages = cited_passages({"retrievals": [retrieval("", A, B), retrieval("", C, A)]})
    assert [passage["id"] for passage in passages] == ["A", "B", "C"]
    assert passages[2] == {"id": "C", **C}
    assert cited_passages({"retrievals": []}) == []


def test_an_unneeded_citation_costs_precision():
    """[2] alone does not entail, and [1] does without it. Of two that are needed together, each counts."""
    unneeded = scores("Night fell [1][2].", Judge(night=["A"]))
    assert recall_and_precision(unneeded) == (1.0, 0.5)
    assert (unneeded["unneeded"], unneeded["supported"]) == (1, 1)
    both_needed = scores("Night fell [1][2].", Judge(night=["AB"]))
    assert (both_needed["citation_precision"], both_needed["unneeded"]) == (1.0, 0)
    each_enough = scores("Night fell [1][2].", Judge(night=["A", "B"]))
    assert each_enough["citation_precision"] == 1.0
    none_right = scores("Night fell [3][4].", Judge(night=["A"]))
    assert recall_and_precision(none_right) == (0.0, 0.0)
    assert (none_right["several"], none_right["supported"]) == (1, 0)


def test_three_citations_count_and_the_rest_is_ignored():
    judge = Judge(night=["D"])
    assert recall_and_precision(scores("Night fell [1][2][3][4].", judge)) == (0.0, 0.0)
    assert judge.asked[0] == [("Title: A\ntext A\nTitle: B\ntext B\nTitle: C\ntext C", "Night fell.")]
    all_four = citation_scores(["Night fell [1][2][3][4]."], [[A, B, C, D]], judge, at_most_citations=4)
    assert all_four[0]["citation_recall"] == 1.0


@pytest.mark.parametrize("marker", ["[5]", "[0]", "[1][7]"])
def test_a_citation_out_of_range_voids_the_sentence(marker):
    """The other sentence's citation is the only one that counts."""
    output_scores = scores(f"Night fell {marker}. Night fell [1].", Judge(night=["A"]))
    assert recall_and_precision(output_scores) == (0.5, 1.0)


def test_citations_of_all_outputs_are_judged_together():
    judge = Judge(night=["A"], radium=["B"])
    first, empty, third = citation_scores(["Night fell [1][2].", "", "Radium glows [2]."], [[A, B]] * 3, judge)
    assert [len(pairs) for pairs in judge.asked] == [2, 2, 1]
    assert first["citation_precision"] == 0.5
    assert empty is None
    assert third["citation_precision"] == 1.0


def test_each_item_of_a_list_is_judged_after_its_question():
    """As ALCE judges QAMPARI, whose items its code makes into `question + " " + item.strip()`."""
    judge = Judge(which=["A", "B"])
    outputs = ["Rhine [1], Elbe [2], Oder [3], Po.", "", "Night fell [1]."]
    passages = [[A, B, C, D]] * 3
    first, empty, text = citation_scores(outputs, passages, judge, list_questions=["Which rivers?"] * 2 + [None])
    assert judge.asked[0] == [
        ("Title: A\ntext A", "Which rivers? Rhine"),
        ("Title: B\ntext B", "Which rivers? Elbe"),
        ("Title: C\ntext C", "Which rivers? Oder"),
        ("Title: A\ntext A", "Night fell."),
    ]
    assert recall_and_precision(first) == (2 / 4, 2 / 3)
    assert recall_and_precision(empty) == (0.0, 0.0)  # one item without a citation
    assert text["sentences"] == 1


def test_claim_recall():
    judge = Judge(night=["A"], radium=["B"])
    outputs = ["text A [1].\ntext B", "text A and text B"]  # of the first output only the first line counts
    assert claim_recall(outputs, [["night", "radium"], ["radium"]], judge) == [0.5, 1.0]
    assert judge.asked[0][0] == ("text A.", "night")
    with pytest.raises(ValueError, match="1 of 2 questions have no claims"):
        claim_recall(["a", "b"], [["x"], []], judge)


def test_fever_by_nli():
    judge = Judge(claim=["A"])
    outputs = ["text A", "text B", "text A", "text B", ""]
    answers = [["SUPPORTS"], ["supports"], ["REFUTES"], ["refutes"], ["refutes"]]
    assert fever_nli(outputs, ["Claim it is."] * 5, answers, judge) == [1.0, 0.0, 0.0, 1.0, 0.0]
    assert len(judge.asked[0]) == 4  # an empty output is wrong, without asking
    with pytest.raises(ValueError, match="expected one verdict"):
        fever_nli(["x"], ["c"], [["supports", "refutes"]], judge)


def test_what_is_no_sentence_is_not_judged_and_what_has_no_passage_does_not_follow():
    """Punctuation alone would often be entailed, and so would much by an empty premise."""

    def says_yes(pairs):
        assert pairs == [("Title: A\ntext A", "Night fell.")]
        return [True]

    judged = [retrieval("Night fell. ...", A), retrieval("Radium glows.")]
    predictions = [{"retrievals": judged}, {"retrievals": [retrieval("!?", A)]}]
    assert grounding(predictions, says_yes) == [0.5, None]
