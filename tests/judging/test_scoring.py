"""The scores of each question by hand, and the intervals of their means."""

import pytest

from support.evaluation_world import FREE, QUESTIONS, UNKNOWN
from trainer.judging.figures import FIGURES, NO_JUDGE, figure, figures_needing
from trainer.judging.missing_figures import missing_if
from trainer.judging.retrieval import Ranking
from trainer.judging.scoring import check_questions, cor_names, measure, score, score_rankings


def says_yes(pairs):
    return [True] * len(pairs)


def prediction(question, output, retrieved=(), grounded=""):
    retrievals = []
    for id in retrieved:
        passages = [{"id": id, "title": "", "text": f"text of {id}"}]
        retrievals.append({"passages": passages, "scores": [1.0], "grounded_text": grounded})
    return {"id": question["id"], "output": output, "output_with_citations": output, "retrievals": retrievals}


@pytest.fixture
def questions():
    """A short answer, a claim, a question that needs no passage, and one whose provenance is unknown."""
    return [
        {**QUESTIONS[0], "answers": ["Night Watch"]},
        {**QUESTIONS[2], "dataset": "fever", "answers": ["SUPPORTS"], "input": "a claim"},
        {**FREE, "answers": ["hello"]},
        {**UNKNOWN, "answers": ["x"]},
    ]


@pytest.fixture
def predictions(questions):
    return [
        prediction(questions[0], "the Night Watch", ["p1", "p0", "p1"], "text of all"),
        prediction(questions[1], "this supports it", ["p3"], "text of p3"),
        prediction(questions[2], "hello", ["p0"]),
        prediction(questions[3], "a Night"),
    ]


def test_figures_of_a_judge_leave_out_questions_that_need_no_passage(questions, predictions):
    claim = {**FREE, "id": "free claim", "dataset": "fever", "answers": ["SUPPORTS"]}
    text = {**FREE, "id": "free text", "meta": {"claims": ["a claim"]}}
    answers = [prediction(question, "it supports this") for question in (claim, text)]
    scores = score([*predictions, *answers], [*questions, claim, text], entail=says_yes)
    assert scores["fever_nli"] == [None, 1.0, None, None, None, None]
    assert scores["claim_recall"] == [None] * 6
    assert scores["cor_not_needed"][4:] == [1.0, 1.0]


@pytest.mark.parametrize("answers", [["SUPPORTS", "NOT ENOUGH INFO"], ["SUPPORTS", "REFUTES"], ["maybe"]])
def test_a_claim_needs_one_verdict_and_nothing_else(questions, answers):
    claim = {**questions[1], "answers": answers}
    with pytest.raises(ValueError, match="Task t: 1 of 2 questions have no verdicts, which fever_nli, their Cor"):
        check_questions([questions[0], claim], "t")


def test_a_metric_that_needs_a_judge_is_named_as_missing(questions):
    assert cor_names(questions[1:2], "fever_nli", nli=False) == [NO_JUDGE]
    assert cor_names(questions[1:2], "fever_nli") == ["fever_nli"]


def test_scores_by_hand(questions, predictions):
    in_another_order = predictions[::-1]
    scores = score(in_another_order, questions)
    assert scores["ret"] == [1.0, 0.0, None, None]
    assert scores["ret_precision"] == [0.5, 0.0, None, None]
    assert scores["r_precision"] == [0.0, 0.0, None, None]
    assert scores["cor"] == [1.0, 1.0, None, 1.0]
    assert scores["cor_not_needed"] == [None, None, 1.0, None]
    assert scores["cor_minus"] == [1.0, 0.0, None, None]
    assert scores["em"] == [1.0, 0.0, None, 0.0]
    assert scores["em_not_needed"] == [None, None, 1.0, None]
    assert scores["kilt_em"] == [0.0, 0.0, None, None]
    assert scores["nsp_needed"] == [1.0, 1.0, None, None]
    assert scores["nsp_not_needed"] == [None, None, 1.0, None]
    assert scores["fever_label"] == [None, 1.0, None, None]
    assert scores["str_em"] == [None, None, None, 1.0]
    assert scores["k_precision"][1] == 1.0
    assert scores["k_precision"][3] is None


def test_scores_by_a_judge(questions, predictions):
    scores = score(predictions, questions, entail=lambda pairs: [claim == "text of p3" for _, claim in pairs])
    assert scores["gr"] == [0.0, 1.0, None, None]
    assert scores["gr_success"] == [0.0, None, None, None]
    assert scores["gr_failure"] == [None, 1.0, None, None]
    assert scores["fever_nli"] == [None, 0.0, None, None]
    assert scores["cor"][1] == 0.0  # Cor of FEVER is by NLI now


def test_a_given_metric_is_cor(questions):
    assert score([prediction(questions[0], "x")], questions[:1], metric="em")["cor"] == [0.0]


def test_one_answer_of_a_list_is_not_all_of_it():
    answers = {"answers": ["Rhine", "Elbe", "Oder"], "dataset": "qampari"}
    questions = [
        {**QUESTIONS[0], **answers, "meta": {"answers": [["Rhine", "The"], ["Elbe"], ["Oder"], ["The"]]}},
        {**QUESTIONS[0], **answers, "id": "without", "meta": {}},
    ]
    scores = score([prediction(question, "Rhine") for question in questions], questions)
    assert scores["cor"] == scores["list_f1"] == [0.5, None]
    assert [scores[name][0] for name in ("em", "f1", "accuracy", "kilt_em")] == [None] * 4
    free = score([prediction(questions[0], "Rhine")], [{**questions[0], "provenance": []}])
    assert "em_not_needed" not in free
    assert cor_names(questions) == ["list_f1"]
    cited = prediction(questions[0], "Rhine [1], Elbe [1], Oder [1], Po [1].", retrieved=["p0"])
    scores = score([cited], questions[:1], entail=lambda pairs: ["Po" not in claim for _, claim in pairs])
    assert scores["citation_recall"] == scores["citation_precision"] == [3 / 4]  # of four items, not of one sentence
    prose = score([cited], questions[:1], metric="short_answer", entail=says_yes)  # the task does not ask for a list
    assert prose["citation_recall"] == [1.0]
    assert "list_f1" not in score([prediction(questions[1], "Rhine")], questions[1:])
    own = {**questions[0], "dataset": "own"}  # the references say that it is a list, not the name of the set
    assert score([prediction(own, "Rhine")], [own])["cor"] == [0.5]
    assert cor_names([own]) == ["list_f1"]
    assert score([cited], [own], entail=says_yes)["citation_recall"] == [1.0]
    assert score([prediction(own, "Rhine")], [own], metric="em")["cor"] == [1.0]
    with pytest.raises(ValueError, match="1 of 2 questions have no meta.answers, which list_f1, their Cor, compares"):
        check_questions(questions, "rivers")


def test_missing_answers_are_an_error(questions, predictions):
    with pytest.raises(ValueError, match="answered 0 of 1 pairs"):
        score(predictions, questions, entail=lambda pairs: [])
    message = "3 predictions and 4 questions do not match by id: 1 questions have no prediction"
    with pytest.raises(ValueError, match=message):
        score(predictions[1:], questions)


def of_nothing(**fields):
    """Return questions whose answers normalise to nothing: all of them, some of them, and of readings."""
    pairs = [{"short_answers": ["The"]}, {"short_answers": ["...", "Night"]}]
    return [
        {**QUESTIONS[0], "id": "only", "answers": ["The", "..."]},
        {**QUESTIONS[0], "id": "partly", "answers": ["A", "Rembrandt"]},
        {**QUESTIONS[0], "id": "readings", "dataset": "asqa", "answers": ["x"], "meta": {"qa_pairs": pairs}},
        {**QUESTIONS[0], "id": "no reading", "dataset": "asqa", "answers": ["x"], "meta": {"qa_pairs": pairs[:1]}},
        {**FREE, "id": "free", "answers": ["An"]},
    ]


@pytest.mark.parametrize("output", ["", "I do not know"])
def test_answers_that_normalise_to_nothing_are_not_compared_with(output):
    """Every output contains them and an empty one equals them, so they would make every answer right."""
    questions = of_nothing()
    scores = score([prediction(question, output) for question in questions], questions)
    assert scores["cor"] == [None, 0.0, 0.0, None, None]
    assert scores["cor_minus"] == [None, 0.0, 0.0, None, None]
    for name in ("em", "f1", "accuracy", "kilt_em"):
        assert scores[name][:2] == [None, 0.0]
    assert scores["str_em"] == [None, None, 0.0, None, None]
    assert "em_not_needed" not in scores
    assert measure(scores)["cor"]["n"] == 2


def test_the_official_code_counts_answers_that_normalise_to_nothing():
    questions = of_nothing()
    predictions = [prediction(question, "I do not know") for question in questions]
    scores = score(predictions, questions, count_empty_answers=True)
    assert scores["cor"] == [1.0, 1.0, 1.0, 1.0, None]
    assert scores["cor_not_needed"][-1] == 1.0
    nothing_said = score([prediction(question, "") for question in questions], questions, count_empty_answers=True)
    assert nothing_said["cor"][0] == 1.0
    assert nothing_said["em_not_needed"][-1] == 1.0


def test_an_empty_output_supports_no_claim():
    """The NLI model is not trusted with an empty premise: it may say yes."""
    questions = [{**QUESTIONS[0], "meta": {"claims": ["one"]}}, {**QUESTIONS[2], "meta": {"claims": ["one"]}}]
    outputs = [prediction(questions[0], " "), prediction(questions[1], "one")]
    assert score(outputs, questions, entail=says_yes)["claim_recall"] == [0.0, 1.0]


def test_cor_of_questions_with_claims_is_claim_recall():
    """ALCE's ELI5 has the same name as KILT's, which is judged by ROUGE-L."""
    with_claims = {**QUESTIONS[0], "dataset": "eli5", "meta": {"claims": ["one", "two"]}}
    questions = [with_claims, {**QUESTIONS[2], "dataset": "eli5", "answers": ["all of it"]}]
    predictions = [prediction(questions[0], "text of all"), prediction(questions[1], "all of it")]
    scores = score(predictions, questions, entail=lambda pairs: [claim == "one" for _, claim in pairs])
    assert scores["cor"] == pytest.approx([0.5, 1.0])
    assert scores["claim_recall"] == [0.5, None]
    assert score(predictions, questions)["cor"] == [None, pytest.approx(1.0)]
    assert cor_names(questions) == ["claim_recall", "rouge_l"]
    assert cor_names(questions, nli=False) == ["", "rouge_l"]


def test_a_share_of_questions_has_the_interval_of_wilson():
    """It has a width even if all questions score the same. Other means have bootstrap intervals."""
    scores = {"cor": [1.0, 1.0, None], "ret_precision": [0.5, 1.0], "gr": [None, None]}
    figures = measure(scores, cor=["short_answer"])
    assert list(figures) == ["ret_precision", "cor"]  # in the order of the vocabulary; gr applies nowhere
    assert (figures["cor"]["value"], figures["cor"]["n"]) == (1.0, 2)
    assert figures["cor"]["interval"] == pytest.approx([0.342, 1.0], abs=1e-3)
    assert figures["ret_precision"] == {"value": 0.75, "interval": [0.5, 1.0], "n": 2}


def test_the_interval_is_chosen_by_the_figure_not_by_its_values():
    """A share within each question, or a count, has the bootstrap's interval even if all values happen to be 1."""
    names = ["ret", "ret_precision", "num_retrievals", "gr", "str_em", "str_hit", "query_recall@5", "kilt_recall@5"]
    figures = measure({name: [1.0, 1.0] for name in names})
    with_a_width = {name for name, measured in figures.items() if measured["interval"] != [1.0, 1.0]}
    assert with_a_width == {"ret", "str_hit", "query_recall@5"}


@pytest.mark.parametrize(
    ("cor", "has_a_width"),
    [(["em", "fever_nli"], True), (["em", "f1"], False), ([""], False), ([], False), (["rouge_l"], False)],
)
def test_the_interval_of_cor_is_that_of_its_metric(cor, has_a_width):
    figures = measure({"cor": [1.0, 1.0], "cor_minus": [0.0, 0.0], "cor_not_needed": [1.0, 1.0]}, cor)
    for measured in figures.values():
        low, high = measured["interval"]
        assert (low < high) == has_a_width


ASKED = [
    {**QUESTIONS[0], "answers": ["Night Watch"]},
    {**QUESTIONS[2], "dataset": "fever", "answers": ["SUPPORTS"], "input": "a claim"},
    {**QUESTIONS[3], "meta": {"claims": ["one"]}},
]
PLAIN = [ASKED[0], {**ASKED[2], "meta": {}}]  # neither a claim of FEVER nor one with claims of ALCE
WITHOUT_PASSAGE = {**FREE, "answers": ["hello"]}
OF_UNKNOWN_PROVENANCE = {**UNKNOWN, "answers": ["x"]}
LISTS = [{**question, "meta": {**question.get("meta", {}), "answers": [["Night"]]}} for question in ASKED]
FREE_LIST = {**WITHOUT_PASSAGE, "meta": {"answers": [["hello"]]}}


def measured_names(questions, entail):
    predictions = [prediction(question, "Night hello", ["p0"], "text of p0") for question in questions]
    return set(measure(score(predictions, questions, entail=entail)))


@pytest.mark.parametrize(
    ("missing", "questions", "entail"),
    [
        ("judge", [*ASKED, WITHOUT_PASSAGE], None),
        ("gold", [OF_UNKNOWN_PROVENANCE, WITHOUT_PASSAGE], says_yes),
        ("no_passage", [*ASKED, OF_UNKNOWN_PROVENANCE], says_yes),
    ],
)
def test_a_figure_whose_need_is_missing_is_absent(missing, questions, entail):
    """It is neither 0 nor 1. With everything there, every figure of answers is measured."""
    dependent = set(figures_needing(missing))
    assert not measured_names(questions, entail) & dependent
    complete = measured_names([*ASKED, WITHOUT_PASSAGE], says_yes)
    elsewhere = {"cor_success", "cor_failure", "mrr", "query_recall@k", "ndcg@k", "kilt_recall@k"}  # modules, rankings
    assert dependent - elsewhere <= complete | {"kilt_rouge_l"}
    assert {"kilt_recall@1", "kilt_recall@5"} <= complete


def missing_under(*conditions):
    """The figures that are missing under one of these conditions, with the k of a score."""
    names = [name for name, entry in FIGURES.items() if set(conditions) & set(missing_if(entry))]
    return {name.replace("@k", f"@{k}") for name in names for k in (1, 5)}


@pytest.mark.parametrize(
    ("conditions", "mode", "retrieved", "asked"),
    [
        (["the model does not search"], "gold", ["p0"], [*ASKED, WITHOUT_PASSAGE]),
        (["no answer holds grounded text", "nothing was retrieved"], "retrieval", [], [*ASKED, WITHOUT_PASSAGE]),
        (["no question has meta.claims", "no question is of FEVER"], "retrieval", ["p0"], [*PLAIN, WITHOUT_PASSAGE]),
        (["all answers are lists"], "retrieval", ["p0"], [*LISTS, FREE_LIST]),
    ],
)
def test_figures_are_missing_when_the_vocabulary_says_so(conditions, mode, retrieved, asked):
    """The conditions of `missing_if` hold for each figure that names them, and for no other one."""
    complete = measured_names([*ASKED, WITHOUT_PASSAGE], says_yes)
    predictions = [prediction(question, "Night hello", retrieved, "text of p0") for question in asked]
    measured = set(measure(score(predictions, asked, mode, entail=says_yes)))
    assert complete - measured == complete & missing_under(*conditions)
    assert complete & missing_under(*conditions)


def test_names_of_scores_are_in_the_vocabulary():
    questions = [*ASKED, UNKNOWN, FREE]
    predictions = [prediction(question, "Night hello", ["p0"], "text of p0") for question in questions]
    names = set(score(predictions, questions, entail=says_yes))
    names |= set(score_rankings([Ranking(["p0"], 1)], ASKED[:1], ks=(1, 20)))
    assert {figure(name).name for name in names} == names
    assert len(FIGURES) == len({entry.label for entry in FIGURES.values()})  # labels are distinct for readers
