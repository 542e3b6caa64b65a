"""The figures of an evaluation on cases small enough to count by hand, and against independent implementations."""

import math
import random

import pytest
import torch

from trainer.judging.correctness import (
    DATASET_METRICS,
    cor_metric,
    correctness,
    exact_match,
    kilt_scores,
    list_f1,
    rouge_l,
    short_answer,
    str_em,
    unigram_f1,
)
from trainer.judging.matching import match_by_id, retrieved_ids, with_provenance
from trainer.judging.retrieval import (
    by_retrieval,
    cor_minus,
    emission,
    kilt_recall_at_k,
    ndcg,
    query_recall_at_k,
    r_precision,
    ranking_scores,
    reciprocal_rank,
    ret,
    ret_precision,
    retrieval_scores,
)
from trainer.questions import normalize_answer

# ---------------------------------------------------------------------- answers


def test_exact_match():
    assert exact_match("the Night Watch.", ["x", "night watch"])
    assert not exact_match("night", ["night watch"])
    assert exact_match("...", [""])


def test_unigram_f1_takes_the_best_answer():
    precision, recall = 2 / 5, 2 / 4
    f1 = unigram_f1("painted by Rembrandt in 1642", ["Rembrandt", "by Rembrandt van Rijn"])
    assert f1 == pytest.approx(2 * precision * recall / (precision + recall))
    assert unigram_f1("Rembrandt Rembrandt", ["Rembrandt"]) == pytest.approx(2 / 3)  # a repeated word counts once
    assert unigram_f1("Vermeer", ["Rembrandt"]) == 0.0


def test_empty_answers():
    """As in KILT, no overlap is 0. The empty text is part of every text, so an answer of articles is always found."""
    assert unigram_f1("", ["the"]) == 0.0
    assert unigram_f1("the", ["a"]) == 0.0
    assert short_answer("", ["The"])
    assert not short_answer("", ["Rembrandt"])
    assert set(kilt_scores("  ", ["Rembrandt"], 1.0).values()) == {0.0}
    with pytest.raises(ValueError, match="no answers"):
        correctness("x", [], "f1")
    for prediction in ("", "x"):  # a missing answer is no reason to call an empty prediction wrong either
        with pytest.raises(ValueError, match="no answers, or only empty ones"):
            kilt_scores(prediction, ["", "  "], 1.0)
    with pytest.raises(ValueError, match="metric is 'bleu'"):
        correctness("x", ["x"], "bleu")


def test_squad_against_torchmetrics():
    """Against an independent SQuAD, except for pairs of empty texts, which it treats by another rule."""
    squad = pytest.importorskip("torchmetrics.functional.text", reason="torchmetrics has an independent SQuAD").squad
    generator = random.Random(0)
    words = "the a an Night watch, Rembrandt 1642! in-law it's AN.".split()
    texts = [" ".join(generator.choices(words, k=generator.randint(1, 5))) for _ in range(300)]
    values = set()
    for prediction, answer in zip(texts, reversed(texts), strict=True):
        if not normalize_answer(prediction) and not normalize_answer(answer):
            continue
        theirs = squad(
            [{"id": "1", "prediction_text": prediction}],
            [{"id": "1", "answers": {"text": [answer], "answer_start": [0]}}],
        )
        f1 = unigram_f1(prediction, [answer])
        assert 100 * exact_match(prediction, [answer]) == float(theirs["exact_match"])
        assert 100 * f1 == pytest.approx(float(theirs["f1"]), abs=1e-4)
        values.add(f1)
    assert len(values) > 5  # some pairs are more alike than others


def test_rankings_against_torchmetrics():
    reason = "torchmetrics has independent ranking figures"
    torchmetrics = pytest.importorskip("torchmetrics.functional.retrieval", reason=reason)
    generator = random.Random(0)
    for _ in range(100):
        ranking = generator.sample("abcdefghijklmnop", k=16)
        gold = set(generator.sample(ranking, k=generator.randint(1, 5)))
        scores = torch.arange(16.0, 0.0, -1.0)
        target = torch.tensor([id in gold for id in ranking])
        for k in (1, 3, 10):
            their_ndcg = float(torchmetrics.retrieval_normalized_dcg(scores, target, top_k=k))
            assert ndcg(ranking, [gold], k) == pytest.approx(their_ndcg, abs=1e-6)
            their_hit_rate = float(torchmetrics.retrieval_hit_rate(scores, target, top_k=k))
            assert query_recall_at_k(ranking, [gold], k) == their_hit_rate
        their_reciprocal_rank = float(torchmetrics.retrieval_reciprocal_rank(scores, target))
        assert reciprocal_rank(ranking, [gold]) == pytest.approx(their_reciprocal_rank)
        their_r_precision = float(torchmetrics.retrieval_r_precision(scores, target))
        assert r_precision(ranking, [gold]) == pytest.approx(their_r_precision)


def test_short_answer_is_contained():
    assert short_answer("It was painted by Rembrandt van Rijn, in 1642.", ["Vermeer", "rembrandt van rijn"])
    assert short_answer("the cartoon", ["art"])  # substrings, as published
    assert not short_answer("by van Rijn", ["Rembrandt van Rijn"])


def test_accuracy_of_kilt_is_literal():
    assert correctness(" Rembrandt ", ["Rembrandt"], "accuracy") == 1.0
    assert correctness("rembrandt", ["Rembrandt"], "accuracy") == 0.0


def test_rouge_l():
    """The longest common subsequence by hand. A text without a word scores 0, and a long sentence is not an error."""
    pytest.importorskip("rouge", reason="ROUGE-L is PyPI's rouge (extra eval)")
    three_of_five_words = rouge_l("one police killed the gunman", ["police kill the gunman now"])
    assert three_of_five_words == pytest.approx(0.6, abs=1e-6)
    assert rouge_l("x", ["police", "x"]) == pytest.approx(1.0, abs=1e-6)
    assert rouge_l("", ["police"]) == 0.0
    assert rouge_l("...", ["police"]) == 0.0
    long = " ".join(f"w{i}" for i in range(1500))
    assert rouge_l(long, [long]) == pytest.approx(1.0, abs=1e-6)


def test_kilt_scores_count_only_with_all_of_the_evidence():
    pytest.importorskip("rouge", reason="ROUGE-L is PyPI's rouge (extra eval)")
    right = kilt_scores("the Rembrandt", ["Rembrandt", " "], 1.0)
    assert {name: right[name] for name in ("accuracy", "em", "f1")} == {"accuracy": 0.0, "em": 1.0, "f1": 1.0}
    assert right["kilt_em"] == 1.0
    assert right["rouge_l"] == pytest.approx(2 / 3, abs=1e-6)
    assert right["kilt_rouge_l"] == right["rouge_l"]
    half_of_the_evidence = kilt_scores("Rembrandt", ["Rembrandt"], 0.5)
    for name in ("em", "accuracy", "f1"):
        assert half_of_the_evidence[name] == 1.0
        assert half_of_the_evidence[f"kilt_{name}"] == 0.0


def test_fever_by_its_label():
    assert correctness("The claim is true.", ["SUPPORTS"], "fever_label") == 1.0
    assert correctness("It was painted in 1642. refutes", ["refutes"], "fever_label") == 1.0
    assert correctness("supports", ["REFUTES"], "fever_label") == 0.0
    with pytest.raises(ValueError, match="NOT ENOUGH INFO"):
        correctness("true", ["NOT ENOUGH INFO"], "fever_label")


def test_which_metric_is_cor():
    assert cor_metric("nq") == "short_answer"
    assert cor_metric("wow") == "f1"
    assert cor_metric("fever") == "fever_nli"
    assert cor_metric("my own set") == "short_answer"
    assert cor_metric("fever", nli=False) == "fever_label"
    assert cor_metric("alce_eli5", nli=False) is None
    assert cor_metric("eli5", nli=False) == "rouge_l"
    assert cor_metric("eli5", claims=True) == "claim_recall"
    assert cor_metric("eli5", nli=False, claims=True) is None
    assert cor_metric("my own set", nli=False, lists=True) == "list_f1"
    for metric in set(DATASET_METRICS.values()) & {"short_answer", "f1"}:
        assert correctness("supports", ["supports"], metric) == 1.0


def test_str_em_is_the_share_of_readings():
    pairs = [{"short_answers": ["1642", "sixteen"]}, {"short_answers": ["Amsterdam"]}]
    assert str_em("Painted in 1642 [1].", pairs) == (0.5, 0.0)
    assert str_em("  Painted in 1642 [1] in Amsterdam [2].\nNot read.", pairs) == (1.0, 1.0)
    assert str_em("Painted in 1642.\nAmsterdam", pairs) == (0.5, 0.0)  # the second line does not count
    assert str_em("", pairs) == (0.0, 0.0)
    with pytest.raises(ValueError, match="no qa_pairs"):
        str_em("x", [])


RIVERS = [["Rhine", "the Rhine River"], ["Elbe"], ["Oder"]]


@pytest.mark.parametrize(
    ("output", "answer_lists", "expected"),
    [
        ("Rhine", RIVERS, 1 / 2),  # precision 1, recall 1/3
        ("The Rhine [1], elbe [2], Oder.", RIVERS, 1.0),
        ("Rhine, the Rhine river, Elbe", RIVERS, 4 / 5),  # an alias is right, but finds no further answer
        ("Rhine, Po, , Nile\nElbe", RIVERS, 1 / 3),  # precision 1/3, recall 1/3; the second line does not count
        ("Rhine and Elbe", RIVERS, 0.0),  # the answers of a list stand between commas
        ("", RIVERS, 0.0),
        ("a1, a2, a3, a4, a5", [[f"a{i}"] for i in range(12)], 1.0),
        ("a1, a2, a3, a4", [[f"a{i}"] for i in range(12)], 8 / 9),  # recall 4/5
    ],
)
def test_list_f1_is_that_of_alce(output, answer_lists, expected):
    assert list_f1(output, answer_lists) == pytest.approx(expected)


def test_list_f1_without_lists():
    assert cor_metric("qampari") == "list_f1"
    with pytest.raises(ValueError, match="no lists of answers"):
        list_f1("x", [])


# ---------------------------------------------------------------------- retrieval


@pytest.mark.parametrize(
    ("retrieved", "provenance", "expected"),
    [
        (["a"], [["a"]], 1.0),
        (["b", "a"], [["a"]], 0.0),  # R is 1: only the first counts
        (["b", "a"], [["a", "b"]], 1.0),
        (["a", "a", "b"], [["a", "b"]], 1.0),  # a repeat takes no place
        (["a", "c"], [["a", "b"]], 0.5),
        (["c", "d"], [["a", "b"], ["c"]], 1.0),  # the best set
        (["a", "b"], [["a", "a", "b"]], 1.0),  # an id twice in a set is one
        ([], [["a"]], 0.0),
    ],
)
def test_r_precision(retrieved, provenance, expected):
    assert r_precision(retrieved, provenance) == expected


def test_kilt_recall_at_k_places_a_set_where_its_last_passage_is_found():
    """The places of x, a, y, b with the set {a, b} are x, y, {a, b}: the set leaves its place when b is found."""

    def recalls(retrieved, provenance, ks):
        return [kilt_recall_at_k(retrieved, provenance, k) for k in ks]

    assert recalls(["x", "a", "y", "b"], [["a", "b"]], ks=(1, 2, 3)) == [0.0, 0.0, 1.0]
    assert recalls(["a", "b"], [["a", "b"]], ks=(1, 2)) == [1.0, 1.0]  # one place
    assert recalls(["a", "x"], [["a", "b"]], ks=(2,)) == [0.0]  # half a set does not count
    assert recalls(["a", "a", "c"], [["a"], ["c"], ["a"]], ks=(1, 2)) == [0.5, 1.0]  # repeats and equal sets are one
    assert recalls(["a"], [["a"], ["a", "b"]], ks=(1, 2)) == [0.5, 0.5]
    assert recalls(["x", "a"], [["a", "b"], ["a"]], ks=(2, 3)) == [0.0, 0.5]  # a takes a place for each of its sets
    assert recalls([], [["a"]], ks=(5,)) == [0.0]


def test_ret_and_ret_precision_are_of_sets():
    assert ret(["x", "b"], [["a", "b"]]) == 1.0  # one passage of the set is enough
    assert ret(["x"], [["a"], ["b"]]) == 0.0
    assert ret([], [["a"]]) == 0.0
    assert ret_precision(["a", "a", "a", "x"], [["a"]]) == 0.5  # two distinct
    assert ret_precision(["a", "b", "x"], [["a"], ["b"]]) == pytest.approx(2 / 3)
    assert ret_precision([], [["a"]]) == 0.0
    scores = retrieval_scores(["a", "x", "b"], [["a", "b"]], ks=(1, 2))
    assert scores == {
        "ret": 1.0,
        "ret_precision": pytest.approx(2 / 3),
        "r_precision": 0.5,
        "kilt_recall@1": 0.0,
        "kilt_recall@2": 1.0,
    }


def test_ranking_by_the_query_embedding():
    ranking = ["x", "a", "y", "b", "z"]
    assert reciprocal_rank(ranking, [["b"], ["a"]]) == 0.5
    assert reciprocal_rank(ranking, [["q"]]) == 0.0
    assert [query_recall_at_k(ranking, [["b"]], k) for k in (1, 3, 4)] == [0.0, 0.0, 1.0]
    gain = 1 / math.log2(3) + 1 / math.log2(5)
    assert ndcg(ranking, [["a", "b"]]) == pytest.approx(gain / (1 + 1 / math.log2(3)))
    assert ndcg(ranking, [["a"], ["b"]], k=2) == pytest.approx((1 / math.log2(3)) / (1 + 1 / math.log2(3)))
    assert ndcg(["a", "b"], [["b"], ["a"], ["c"]], k=2) == 1.0  # k places hold no more than k
    scores = ranking_scores(ranking, [["a"]], ks=(1, 2))
    assert scores == {
        "mrr": 0.5,
        "ndcg@10": pytest.approx(1 / math.log2(3)),
        "query_recall@1": 0.0,
        "query_recall@2": 1.0,
    }


def kilt_recall_at_1(retrieved, provenance):
    return kilt_recall_at_k(retrieved, provenance, 1)


@pytest.mark.parametrize("metric", [ret, ret_precision, r_precision, reciprocal_rank, ndcg, kilt_recall_at_1])
@pytest.mark.parametrize("provenance", [[], [[]], None])
@pytest.mark.parametrize("retrieved", [["a"], []])
def test_no_retrieval_metric_without_provenance(metric, provenance, retrieved):
    with pytest.raises(ValueError, match="provenance is empty"):
        metric(retrieved, provenance)


@pytest.mark.parametrize("metric", [query_recall_at_k, kilt_recall_at_k, ndcg])
@pytest.mark.parametrize("k", [0, -1])
def test_no_retrieval_metric_without_a_place(metric, k):
    with pytest.raises(ValueError, match=f"k is {k}, expected 1 or more"):
        metric(["a", "b"], [["a"]], k)


def test_retrieved_ids_keep_repeats():
    first, second = {"passages": [{"id": "a"}, {"id": "b"}]}, {"passages": [{"id": "a"}]}
    assert retrieved_ids({"retrievals": [first, second]}) == ["a", "b", "a"]


# ---------------------------------------------------------------------- many questions


def test_match_by_id():
    instances = [{"id": 1, "input": "one"}, {"id": "2", "input": "two"}]
    predictions = [{"id": "2", "output": "b"}, {"id": "1", "output": "a"}]
    outputs_and_inputs = []
    for prediction, instance in match_by_id(predictions, instances):
        outputs_and_inputs.append((prediction["output"], instance["input"]))
    assert outputs_and_inputs == [("a", "one"), ("b", "two")]


@pytest.mark.parametrize(
    ("prediction_ids", "instance_ids", "message"),
    [
        ("abc", "abcde", r"3 predictions and 5 questions .* 2 questions have no prediction \(d, e\)"),
        ("abcx", "abc", r"1 predictions have no question \(x\)"),
        ("aab", "ab", r"1 ids occur twice in the predictions \(a\)"),
        ("ab", "abb", r"1 ids occur twice in the evaluation set \(b\)"),
        ("abcdef", "x", r"6 predictions have no question \(a, b, c, …\)"),
        ("a", "", "holds no question: there is nothing to judge"),
    ],
)
def test_ids_that_do_not_match(prediction_ids, instance_ids, message):
    with pytest.raises(ValueError, match=message):
        match_by_id([{"id": id} for id in prediction_ids], [{"id": id} for id in instance_ids])


def test_a_missing_id_is_an_error():
    with pytest.raises(ValueError, match="1 of 2 rows of the predictions have no id"):
        match_by_id([{"id": "a"}, {}], [{"id": "a"}])


def test_missing_provenance_is_an_error():
    needing = {"id": "a", "provenance": [["p"]]}
    assert with_provenance([needing, {"id": "b", "provenance": []}]) == [needing]
    with pytest.raises(ValueError, match=r"1 of 2 instances have no provenance \(b\)"):
        with_provenance([needing, {"id": "b"}])
    with pytest.raises(ValueError, match="The provenance of all 2 instances is empty"):
        with_provenance([{"id": "a", "provenance": []}, {"id": "b", "provenance": [[]]}])


def test_emission_by_need():
    once, never = {"retrievals": [{}]}, {"retrievals": []}
    needed, not_needed = [True, True, False, False], [False, False, True, False]
    emitted = emission([once, never, once, never], needed, not_needed)
    assert emitted == {"nsp_needed": [1.0, 0.0, None, None], "nsp_not_needed": [None, None, 1.0, None]}


def test_cor_minus_and_the_split_by_retrieval():
    correct = [1.0, 1.0, 0.5, 0.0, 1.0, None]
    hits = [1.0, 0.0, 1.0, 1.0, None, 1.0]
    assert cor_minus(correct, hits) == [1.0, 0.0, 0.5, 0.0, None, None]
    assert by_retrieval("cor", correct, hits) == {
        "cor_success": [1.0, None, 0.5, 0.0, None, None],
        "cor_failure": [None, 1.0, None, None, None, None],
    }
