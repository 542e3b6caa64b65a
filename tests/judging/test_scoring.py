"""The scores of each question by hand, and the intervals of their means."""

import pytest

from support.evaluation_world import FREE, QUESTIONS, UNKNOWN
from trainer.judging.figures import FIGURES, figure, needing
from trainer.judging.scoring import cor_names, measure, score, score_rankings


def prediction(x, output, retrieved=(), grounded=""):
    retrievals = []
    for id in retrieved:
        passages = [{"id": id, "title": "", "text": f"text of {id}"}]
        retrievals.append({"passages": passages, "scores": [1.0], "grounded_text": grounded})
    return {"id": x["id"], "output": output, "output_with_citations": output, "retrievals": retrievals}


def test_scores_by_hand():
    questions = [
        {**QUESTIONS[0], "answers": ["Night Watch"]},
        {**QUESTIONS[2], "dataset": "fever", "answers": ["SUPPORTS"], "input": "a claim"},
        {**FREE, "answers": ["hello"]},
        {**UNKNOWN, "answers": ["x"]},
    ]
    made = [
        prediction(questions[0], "the Night Watch", ["p1", "p0", "p1"], "text of all"),
        prediction(questions[1], "this supports it", ["p3"], "text of p3"),
    ]
    made += [prediction(questions[2], "hello", ["p0"]), prediction(questions[3], "a Night")]
    found = score(made[::-1], questions)
    assert (
        found["ret"] == [1.0, 0.0, None, None]
        and found["ret_precision"] == [0.5, 0.0, None, None]
        and found["r_precision"] == [0.0, 0.0, None, None]
    )
    assert found["cor"] == [1.0, 1.0, None, 1.0] and found["cor_not_needed"] == [None, None, 1.0, None]
    assert found["em_not_needed"] == [None, None, 1.0, None]
    assert found["cor_minus"] == [1.0, 0.0, None, None]
    assert found["kilt_em"] == [0.0, 0.0, None, None] and found["em"] == [1.0, 0.0, None, 0.0]
    assert found["nsp_needed"] == [1.0, 1.0, None, None] and found["nsp_not_needed"] == [None, None, 1.0, None]
    assert found["fever_label"] == [None, 1.0, None, None] and found["str_em"] == [None, None, None, 1.0]
    assert found["k_precision"][1] == 1.0 and found["k_precision"][3] is None
    judged = score(made, questions, entail=lambda pairs: [hypothesis == "text of p3" for _, hypothesis in pairs])
    assert (
        judged["gr"] == [0.0, 1.0, None, None]
        and judged["gr_success"] == [0.0, None, None, None]
        and judged["gr_failure"] == [None, 1.0, None, None]
    )
    assert judged["fever_nli"] == [None, 0.0, None, None] and judged["cor"][1] == 0.0  # Cor is by NLI now
    with pytest.raises(ValueError, match="answered 0 of 1 pairs"):
        score(made, questions, entail=lambda pairs: [])
    with pytest.raises(
        ValueError, match="3 predictions and 4 questions do not match by id: 1 questions have no prediction"
    ):
        score(made[1:], questions)
    assert score([prediction(questions[0], "x")], questions[:1], metric="em")["cor"] == [0.0]


def test_cor_of_questions_with_claims_is_claim_recall():
    """ALCE's ELI5 has the name of KILT's, which is judged by ROUGE-L."""
    with_claims = {**QUESTIONS[0], "dataset": "eli5", "meta": {"claims": ["one", "two"]}}
    questions = [with_claims, {**QUESTIONS[2], "dataset": "eli5", "answers": ["all of it"]}]
    made = [prediction(questions[0], "text of all"), prediction(questions[1], "all of it")]
    found = score(made, questions, entail=lambda pairs: [hypothesis == "one" for _, hypothesis in pairs])
    assert found["cor"] == pytest.approx([0.5, 1.0]) and found["claim_recall"] == [0.5, None]
    assert score(made, questions)["cor"] == [None, pytest.approx(1.0)]
    assert cor_names(questions) == ["claim_recall", "rouge_l"] and cor_names(questions, nli=False) == ["", "rouge_l"]


def test_a_share_of_questions_has_the_interval_of_wilson():
    """It has a width even when all questions score the same; other means have bootstrap intervals."""
    found = measure({"cor": [1.0, 1.0, None], "ret_precision": [0.5, 1.0], "gr": [None, None]}, cor=["short_answer"])
    assert list(found) == ["ret_precision", "cor"]  # in the order of the vocabulary; gr applies nowhere
    assert (
        found["cor"]["value"] == 1.0
        and found["cor"]["n"] == 2
        and found["cor"]["interval"] == pytest.approx([0.342, 1.0], abs=1e-3)
    )
    assert found["ret_precision"] == {"value": 0.75, "interval": [0.5, 1.0], "n": 2}


def test_the_interval_is_chosen_by_the_figure_not_by_its_values():
    """Where all values are 1 by chance, a share within each question has the bootstrap's interval, and so has a count."""
    ones = [1.0, 1.0]
    names = ["ret", "ret_precision", "num_retrievals", "gr", "str_em", "str_hit", "query_recall@5", "kilt_recall@5"]
    found = measure(dict.fromkeys(names, ones))
    with_a_width = {name for name, measured in found.items() if measured["interval"] != [1.0, 1.0]}
    assert with_a_width == {"ret", "str_hit", "query_recall@5"}


@pytest.mark.parametrize(
    ("cor", "has_a_width"),
    [(["em", "fever_nli"], True), (["em", "f1"], False), ([""], False), ([], False), (["rouge_l"], False)],
)
def test_the_interval_of_cor_is_that_of_its_metric(cor, has_a_width):
    found = measure({"cor": [1.0, 1.0], "cor_minus": [0.0, 0.0], "cor_not_needed": [1.0]}, cor)
    assert {measured["interval"][0] < measured["interval"][1] for measured in found.values()} == {has_a_width}


ASKED = [
    {**QUESTIONS[0], "answers": ["Night Watch"]},
    {**QUESTIONS[2], "dataset": "fever", "answers": ["SUPPORTS"], "input": "a claim"},
    {**QUESTIONS[3], "meta": {"claims": ["one"]}},
]
WITHOUT_PASSAGE = {**FREE, "answers": ["hello"]}


@pytest.mark.parametrize(
    ("missing", "questions", "has_judge"),
    [
        ("judge", [*ASKED, WITHOUT_PASSAGE], False),
        ("gold", [{**UNKNOWN, "answers": ["x"]}, WITHOUT_PASSAGE], True),
        ("no_passage", [*ASKED, {**UNKNOWN, "answers": ["x"]}], True),
    ],
)
def test_a_figure_whose_need_is_missing_is_absent(missing, questions, has_judge):
    """Neither 0 nor 1; with everything there, all that answers are scored by is measured."""
    entail = (lambda pairs: [True] * len(pairs)) if has_judge else None
    made = [prediction(question, "Night hello", ["p0"], "text of p0") for question in questions]
    assert not set(measure(score(made, questions, entail=entail))) & set(needing(missing))
    everything = [*ASKED, WITHOUT_PASSAGE]
    made = [prediction(question, "Night hello", ["p0"], "text of p0") for question in everything]
    complete = set(measure(score(made, everything, entail=lambda pairs: [True] * len(pairs))))
    elsewhere = {"cor_success", "cor_failure", "mrr", "query_recall@k", "ndcg@k", "kilt_recall@k"}  # modules, rankings
    assert set(needing(missing)) - elsewhere <= complete | {"kilt_rouge_l"}
    assert {"kilt_recall@1", "kilt_recall@5"} <= complete


def test_names_of_scores_are_in_the_vocabulary():
    made = [prediction(question, "Night hello", ["p0"], "text of p0") for question in (*ASKED, UNKNOWN, FREE)]
    names = set(score(made, [*ASKED, UNKNOWN, FREE], entail=lambda pairs: [True] * len(pairs)))
    names |= set(score_rankings([["p0"]], ASKED[:1], ks=(1, 20)))
    assert {figure(name).name for name in names} == names
    assert len(FIGURES) == len({entry.label for entry in FIGURES.values()})  # readers tell them apart
