"""Indicators 1 and 2: readers whose attention is known, correlations by hand, nouns, and what is left out."""

import numpy as np
import pytest
import torch

from modeling_cosup.tokenization_cosup import encode_passages_for_gen
from support.evaluation_world import CORPUS, QUESTIONS
from support.models import PASSAGES, make_model
from trainer.judging.answers import rank_passages
from trainer.judging.indicators import Spread, candidate_passages, indicators, spearman
from trainer.judging.nouns import nouns_by_rule
from trainer.judging.teaching import best_is_gold, relative_to_place, shares_by_place


def make_reader(**gen_options):
    """
    Return a model of one layer whose keys are 0: it attends to all tokens before it alike, so that the attention to a
    token is the norm of its values.
    """
    model = make_model(tie_emb_seq=True, gen_kwargs={"layers": 1, **gen_options})
    with torch.no_grad():
        model.gen.model.layers[0].self_attn.k_proj.weight.zero_()
    return model


@pytest.fixture(scope="module")
def reader():
    return make_reader()


@pytest.fixture(scope="module")
def alike():
    """A reader that gives all tokens the same attention: with one head, the norm of its values is always the same."""
    model = make_reader(num_attention_heads=1, num_key_value_heads=1)
    layer = model.gen.model.layers[0]
    layer.input_layernorm.variance_epsilon = 0.0
    with torch.no_grad():
        layer.self_attn.v_proj.weight.copy_(torch.eye(32))
    return model


@pytest.fixture(scope="module")
def index(reader):
    return reader.build_index(CORPUS, show_progress_bar=False)


def instance(number, **fields):
    return {**QUESTIONS[number], "input": "Who painted the Night Watch?", "answers": ["Rembrandt"], **fields}


INSTANCES = [instance(0), instance(2, answers=["Marie Curie", "radium"]), instance(3, nouns=["Warsaw"])]
READ = [PASSAGES[:3], PASSAGES[1:5], PASSAGES[:1]]


def plain_attention(model, passages):
    """Return ids and attention of passage tokens, from the weights of the one layer."""
    layer = model.gen.model.layers[0]
    ids = [id for row in encode_passages_for_gen(model.tokenizer, passages, model.config) for id in row]
    with torch.no_grad():
        values = layer.self_attn.v_proj(layer.input_layernorm(model.gen.model.embed_tokens(torch.tensor(ids))))
    norms = values.view(len(ids), 2, 8).norm(dim=-1).mean(1).double().numpy()
    return np.array(ids), norms / norms.sum()


def plain_indicator(model, passages, words, percentile, pool=np.mean):
    """Return mean attention to the nearest tokens, and the sorted pairs of similarity and attention."""
    ids, attention = plain_attention(model, passages)
    weights = model.gen.model.embed_tokens.weight.detach().double().numpy()
    weights = weights / np.linalg.norm(weights, axis=1, keepdims=True)
    spellings = [spelling for word in words for spelling in (word, f" {word}")]
    targets = sorted({id for row in model.tokenizer(spellings, add_special_tokens=False)["input_ids"] for id in row})
    targets = [id for id in targets if model.tokenizer.decode([id]).strip()]
    similarity = pool(weights[ids] @ weights[targets].T, axis=1).round(5)
    nearest = similarity >= np.quantile(similarity, percentile / 100) - 1e-9
    return attention[nearest].mean(), spearman(attention[nearest], similarity[nearest])


@pytest.mark.parametrize("pooling", ["max", "mean"])
def test_a_reader_whose_attention_is_known(reader, pooling):
    results = indicators(reader, INSTANCES, READ, (50, 90, 95), pooling=pooling)
    words = {
        "answer": [["Rembrandt"], ["Marie Curie"], ["Rembrandt"]],
        "nouns": [["Night", "Watch"]] * 2 + [["Warsaw"]],
    }
    for target, words_of_instances in words.items():
        for percentile in (50, 90, 95):
            attention, correlations = [], []
            for passages, instance_words in zip(READ, words_of_instances, strict=True):
                pool = {"max": np.max, "mean": np.mean}[pooling]
                mean, correlation = plain_indicator(reader, passages, instance_words, percentile, pool)
                attention.append(mean)
                correlations.append(correlation)
            defined = [value for value in correlations if value is not None]
            indicator = results.indicators[target][percentile]
            assert indicator.attention.mean == pytest.approx(np.mean(attention), rel=1e-5)
            assert indicator.attention.deviation == pytest.approx(np.std(attention, ddof=1), rel=1e-4)
            assert indicator.attention.n == 3
            assert (indicator.rho.n, indicator.num_undefined) == (len(defined), 3 - len(defined))
            assert indicator.rho.mean == pytest.approx(np.mean(defined) if defined else None, abs=1e-5)
    assert results.indicators["answer"][50].rho.n == 3
    numbers = [len(plain_attention(reader, passages)[0]) for passages in READ]
    assert results.uniform.mean == pytest.approx(np.mean([1 / number for number in numbers]))


def test_a_reader_that_attends_to_all_tokens_alike(alike):
    """No correlation is defined then; undefined ones are counted, and are no zeros."""
    results = indicators(alike, INSTANCES, READ)
    for target in ("answer", "nouns"):
        for indicator in results.indicators[target].values():
            assert indicator.attention.mean == pytest.approx(results.uniform.mean, rel=1e-5)
            assert indicator.rho == Spread(None, None, 0)
            assert indicator.num_undefined == 3


def test_what_a_reader_would_teach():
    shares = [[0.2, 0.8], [0.3, 0.7], [0.4, 0.6], [1.0]]
    assert shares_by_place(shares) == pytest.approx([0.3, 0.7])
    assert shares_by_place([]) == []
    relative = relative_to_place(shares)
    assert relative[3] is None  # nothing to compare its only place with
    assert relative[0] == pytest.approx([7 / 19, 12 / 19])  # 0.2 / 0.9 against 0.8 / 2.1
    gold = [{1}, set(), {0}, {0}]
    assert best_is_gold(shares, gold) == [1.0, 0.0, 1.0]  # the second has no gold passage
    assert best_is_gold(relative, gold) == [1.0, 1.0]


def test_what_is_taught_is_of_the_passages_that_are_read(reader):
    known = [instance(0, provenance=[[PASSAGES[1]["id"]]]), instance(2, provenance=[[PASSAGES[4]["id"]]])]
    results = indicators(reader, known, [PASSAGES[:3], PASSAGES[:3]], likelihoods=True)
    shares = []
    for _ in known:
        _, attention = plain_attention(reader, PASSAGES[:3])
        lengths = [len(row) for row in encode_passages_for_gen(reader.tokenizer, PASSAGES[:3], reader.config)]
        shares.append([part.sum() for part in np.split(attention, np.cumsum(lengths)[:-1])])
    assert results.places == pytest.approx(np.mean(shares, axis=0), abs=1e-5)
    assert results.best_is_gold["attention_shares"] == Spread(float(np.argmax(shares[0]) == 1), None, 1)
    assert {name: spread.n for name, spread in results.best_is_gold.items()} == {
        "attention_shares": 1,
        "attention": 1,
        "perplexity": 1,
    }


def test_other_embeddings_decide_what_is_near(reader):
    """With one embedding for all tokens, all are nearest: each gets the mean attention."""
    results = indicators(reader, INSTANCES, READ, embed=lambda ids: torch.ones(len(ids), 3))
    assert results.indicators["answer"][95].attention.mean == pytest.approx(results.uniform.mean, rel=1e-5)
    assert results.indicators["answer"][95].num_undefined == 3


def test_what_is_left_out_is_counted(reader, monkeypatch):
    instances = [
        *INSTANCES,
        instance(0, answers=["The"]),
        instance(0, answers=[]),
        instance(0),
        instance(0, input="who was it?"),
        instance(0, nouns=[]),
    ]
    passages = [*READ, READ[0], READ[0], [], READ[0], READ[0]]
    results = indicators(reader, instances, passages)
    assert results.left_out == {"no_passage": 1, "no_answer": 2, "too_long": 0, "no_noun": 2}
    assert results.num_instances == 8
    assert results.indicators["answer"][95].attention.n == 5
    assert results.indicators["nouns"][95].attention.n == 3
    monkeypatch.setattr(reader.gen.config, "max_position_embeddings", 100)
    too_long = indicators(reader, INSTANCES, READ)
    assert too_long.left_out["too_long"] == 1  # the one with four passages
    assert too_long.indicators["answer"][95].attention.n == 2


def test_nouns_of_the_data_come_before_those_of_a_callable(reader):
    asked = []

    def find_nouns(question):
        asked.append(question)
        return ["Amsterdam"]

    instances = [instance(0), instance(0, meta={"nouns": ["Amsterdam"]}), instance(0, nouns=["Amsterdam"])]
    results = indicators(reader, instances, [PASSAGES] * 3, find_nouns=find_nouns)
    assert asked == [instance(0)["input"]]
    expected, _ = plain_indicator(reader, PASSAGES, ["Amsterdam"], 95)
    assert results.indicators["nouns"][95].attention.mean == pytest.approx(expected, rel=1e-5)
    assert results.indicators["nouns"][95].attention.deviation == pytest.approx(0, abs=1e-8)


@pytest.mark.parametrize(
    ("question", "expected"),
    [
        ("Where was Rembrandt born?", ["Rembrandt"]),
        ("who wrote the declaration of independence", ["declaration", "independence"]),
        ("What is the capital of France's north?", ["capital", "France", "north"]),
        ("In what year did The Who play Tommy?", ["year", "The", "Who", "Tommy"]),  # names within the question
        ("Who was he?", []),
    ],
)
def test_nouns_by_rule(question, expected):
    assert nouns_by_rule(question) == expected


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        ([1, 2, 2, 3], [1, 3, 2, 4], 4.5 / 22.5**0.5),  # ties share the mean rank
        ([1, 5, 9], [30, 20, 10], -1.0),
        ([1, 2], [1, 2], None),  # fewer than three
        ([1, 2, 3], [7, 7, 7], None),
        ([1, 2, 3], [0.1, 0.1 + 1e-9, 0.1], None),  # constant but for rounding
        ([], [], None),
    ],
)
def test_spearman_by_hand(first, second, expected):
    assert spearman(np.array(first, float), np.array(second, float)) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("instances", "passages", "options", "message"),
    [
        (INSTANCES, READ[:2], {}, "2 lists of passages, expected one for each of 3 instances"),
        (INSTANCES, READ, {"pooling": "min"}, "pooling is 'min', expected 'mean' or 'max'"),
        (INSTANCES, READ, {"percentiles": (90, 101)}, "percentiles holds 101"),
        (INSTANCES[:1], [[]], {}, r"None of 1 instances can be read \(no_passage: 1\)"),
        ([], [], {}, r"None of 0 instances can be read \(there is none\)"),
        ([instance(0, nouns="Warsaw")], READ[:1], {}, "Instance 'q0': nouns is 'Warsaw', expected a list of texts"),
    ],
)
def test_bad_input(reader, instances, passages, options, message):
    with pytest.raises(ValueError, match=message):
        indicators(reader, instances, passages, **options)


def test_a_reader_whose_weights_are_not_finite_is_named():
    broken = make_reader()
    with torch.no_grad():
        broken.gen.model.layers[0].self_attn.v_proj.weight[0, 0] = float("nan")
    with pytest.raises(FloatingPointError, match="The attention shares of instance 'q0' are NaN"):
        indicators(broken, INSTANCES, READ)


# ---------------------------------------------------------------------- candidates


def test_candidates_are_the_nearest_passages(reader, index):
    rankings = rank_passages(reader, index, QUESTIONS)
    for passages, ranking in zip(candidate_passages(reader, index, QUESTIONS, 3), rankings, strict=True):
        assert [passage["id"] for passage in passages] == ranking["corpus"][:3]


def test_a_gold_passage_replaces_the_last_one(reader, index):
    retrieved = candidate_passages(reader, index, QUESTIONS, 3)
    with_gold = candidate_passages(reader, index, QUESTIONS, 3, gold_included=True)
    places = set()
    for question, before, after in zip(QUESTIONS, retrieved, with_gold, strict=True):
        ids = [passage["id"] for passage in before]
        found = {id for evidence in question["provenance"] for id in evidence} & set(ids)
        after_ids = [passage["id"] for passage in after]
        if found:
            assert after_ids == ids
            continue
        gold = question["provenance"][0][0]
        places.add(after_ids.index(gold))
        assert [id for id in after_ids if id != gold] == ids[:2]
    assert len(places) > 1  # drawn
    assert candidate_passages(reader, index, QUESTIONS, 3, gold_included=True, batch_size=2) == with_gold


def test_candidates_that_cannot_be_had(reader, index):
    with pytest.raises(ValueError, match="num_candidates is 8, and the index holds 7 passages"):
        candidate_passages(reader, index, QUESTIONS, 8)
    with pytest.raises(ValueError, match="1 of 2 questions have no provenance"):
        candidate_passages(reader, index, [QUESTIONS[0], instance(1, provenance=[])], 2, gold_included=True)
