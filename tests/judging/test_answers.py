"""The figures of an evaluation, by hand and on a model whose answers are known."""

import numpy as np
import pytest
import torch

from modeling_cosup import Completion, CoSupConfig, Retrieval
from modeling_cosup.tokenization_cosup import encode_prompt
from support.evaluation_world import CORPUS, FREE
from support.evaluation_world import QUESTIONS as WORLD_QUESTIONS
from support.models import PASSAGES, make_model, plain_batch
from trainer.batching import BatchFacts
from trainer.data import tokenize_instance
from trainer.held_out import retrieval_metrics
from trainer.judging.answers import (
    answer,
    as_prediction,
    cite,
    embed_queries,
    ntp_loss,
    rank_passages,
    reference_instances,
    wrong_passages,
)
from trainer.judging.figures import figure
from trainer.judging.matching import retrieved_ids
from trainer.losses import embedding_losses

QUESTIONS = [
    {"id": f"q{i}", "dataset": "d", "instruction": "", "input": f"question {i}?", "answers": [p["title"] or "none"]}
    | {"provenance": [[p["id"]]]}
    for i, p in enumerate(PASSAGES)
]


def test_ntp_loss_of_references_equals_the_model(model):
    instances = reference_instances(QUESTIONS[:2], PASSAGES)
    batch = plain_batch([tokenize_instance(x, model.tokenizer, model.tokenizer, model.config) for x in instances])
    with torch.no_grad():
        assert ntp_loss(model, instances).value == pytest.approx(float(model(**batch).ntp_loss), rel=1e-5)


def test_rankings_against_the_model_itself(model):
    index = model.build_index(PASSAGES, show_progress_bar=False)
    rankings = rank_passages(model, index, QUESTIONS, batch_size=4)
    assert [ranking["id"] for ranking in rankings] == [question["id"] for question in QUESTIONS]
    assert all(sorted(ranking["corpus"]) == sorted(passage["id"] for passage in PASSAGES) for ranking in rankings)
    for question, ranking in zip(QUESTIONS, rankings, strict=True):
        assert rank_passages(model, index, [question]) == [ranking]
    pools = [{**question, "candidates": ["p4", "p1"]} for question in QUESTIONS]
    for ranking in rank_passages(model, index, pools, pools=True):
        assert ranking["pool"] == [id for id in ranking["corpus"] if id in ("p1", "p4")]
    assert rank_passages(model, index, []) == []


def test_queries_of_an_encoder_are_embedded_without_gen():
    model = make_model(query_from="emb_seq").eval()
    prompts = [[*encode_prompt(model.tokenizer, x["input"]), model.config.nsp_token_id] for x in QUESTIONS]
    with torch.no_grad():
        expected = torch.cat([model(torch.tensor([prompt])).query_embeds for prompt in prompts])
    model.gen.base_model.register_forward_pre_hook(lambda module, args: pytest.fail("Gen is run"))
    torch.testing.assert_close(embed_queries(model, QUESTIONS, batch_size=4), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("batch_size", [1, 4])
def test_modes_of_answering(batch_size):
    """An untrained model never retrieves with mode 'off', reads gold passages with 'gold', others with 'wrong', and what it wrote excludes passages."""
    model = make_model()
    index = model.build_index(PASSAGES, show_progress_bar=False)
    off = answer(model, QUESTIONS, None, "off", batch_size=batch_size, max_new_tokens=6)
    gold = answer(model, QUESTIONS, index, "gold", batch_size=batch_size, max_new_tokens=6)
    wrong, again = (
        answer(model, QUESTIONS, index, "wrong", batch_size=batch_size, max_new_tokens=6) for _ in range(2)
    )
    assert all(retrieved_ids(prediction) == [] for prediction in off)
    assert [retrieved_ids(prediction) for prediction in gold] == [x["provenance"][0] for x in QUESTIONS]
    for prediction, question in zip(wrong, QUESTIONS, strict=True):
        assert len(retrieved_ids(prediction)) == 1 and retrieved_ids(prediction) != question["provenance"][0]
    assert wrong == again
    assert len({tuple(prediction["output"] for prediction in answers) for answers in (off, gold, wrong)}) == 3
    assert [(p["id"], p["answers"], p["mode"]) for p in gold] == [(x["id"], x["answers"], "gold") for x in QUESTIONS]
    assert model.training is False


def losses_of(batch):
    """`embedding_losses` of a model with temperature 1."""
    return embedding_losses(batch, CoSupConfig(temperature=1.0), None)


def test_retrieval_metrics_by_hand():
    """Two batches: a passage that stands in both, one that is right for a query too, and a query without a number."""
    facts = [
        BatchFacts(passage_keys=[(1,), (2,)], positive_keys=[(), (1,)], query_keys=[10, 11], passage_labels=[0, 1]),
        BatchFacts(passage_keys=[(2,), (3,)], positive_keys=[(), ()], query_keys=[12, 13], passage_labels=[0, 1]),
    ]
    passages = np.eye(3, dtype=np.float32)[[0, 1, 1, 2]]
    queries = np.array([[1, 0, 0], [5, 1, 0], [2, 1, 0], [np.nan, 0, 1]], dtype=np.float32)
    metrics, rows, labels = retrieval_metrics(queries, passages, facts, losses_of, ks=(1, 2))
    assert rows.tolist() == [0, 1, 3] and labels.tolist() == [0, 1, 1, 2]
    assert (metrics["num_passages"], metrics["num_queries"]) == (3, 4)
    assert {figure(name).name for name in metrics} == set(metrics)  # in the vocabulary
    assert metrics["query_recall@1"] == 0.5  # the first, and the second, for which passage 1 is right too
    assert metrics["query_recall@2"] == 0.75
    finite, _, _ = retrieval_metrics(np.nan_to_num(queries), passages, facts, losses_of)
    scores = torch.from_numpy(np.nan_to_num(queries)) @ torch.eye(3)
    scores[1, 0] = float("-inf")
    assert finite["nsp_loss"] == pytest.approx(
        float(torch.nn.functional.cross_entropy(scores, torch.tensor([0, 1, 1, 2])))
    )
    nothing, _, _ = retrieval_metrics(
        queries[:0], passages, [BatchFacts(passage_keys=[(i,) for i in range(4)])], losses_of
    )
    assert nothing["nsp_loss"] == 0.0


# ---------------------------------------------------------------------- citations, wrong passages


def test_citations_stand_before_the_end_of_each_sentence(model):
    """Two retrievals of one passage, then another, with free text around: numbers count distinct passages."""
    tokenizer, config = model.tokenizer, model.config

    def ids(text):
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    tokens, trace = [*ids("Well.")], []
    for id, text in (("p0", "It was Rembrandt. He painted"), ("p1", 'who said "radium!"'), ("p0", "")):
        passages = [{"id": id, "title": id, "text": f"text of {id}"}]
        position = 3 + len(tokens)
        tokens += [config.nsp_token_id, *ids("a passage"), config.cs_token_id, *ids(text), config.ce_token_id]
        trace.append(
            Retrieval(0, position, passages, [0.5], (3 + len(tokens) - 1 - len(ids(text)), 3 + len(tokens) - 1))
        )
    tokens += ids("end.")
    found = as_prediction(FREE, Completion(0, tokens, "its text", "cited", 9, trace), 3, tokenizer)
    assert found["output_with_citations"] == 'Well. It was Rembrandt [1]. He painted [1] who said "radium [2]!" end.'
    assert [r["grounded_text"] for r in found["retrievals"]] == [
        "It was Rembrandt. He painted",
        'who said "radium!"',
        "",
    ]
    assert retrieved_ids(found) == ["p0", "p1", "p0"] and found["retrievals"][1]["scores"] == [0.5]
    assert found["retrievals"][1]["passages"] == [{"id": "p1", "title": "p1", "text": "text of p1"}]
    assert (found["id"], found["output"], found["cited_text"], found["num_generated_tokens"]) == (
        "q90",
        "its text",
        "cited",
        9,
    )
    assert cite("Yes", "[1][2]") == "Yes [1][2]" and cite("(Really?)", "[1]") == "(Really [1]?)"


def test_wrong_passages_depend_on_seed_and_question_alone(model):
    index = model.build_index(CORPUS, show_progress_bar=False)
    first = wrong_passages(WORLD_QUESTIONS, index, 0)
    assert [len(ids) for ids in first] == [len(x["provenance"][0]) for x in WORLD_QUESTIONS]
    assert wrong_passages(WORLD_QUESTIONS[3:], index, 0) == first[3:]
    assert wrong_passages(WORLD_QUESTIONS, index, 1) != first
    without_pools = [{**x, "candidates": []} for x in WORLD_QUESTIONS]
    assert all(
        set(ids).isdisjoint(sum(x["provenance"], []))
        for ids, x in zip(wrong_passages(without_pools, index), WORLD_QUESTIONS, strict=True)
    )
    with pytest.raises(ValueError, match="1 of 2 questions have no passage but gold ones"):
        wrong_passages([WORLD_QUESTIONS[0], {**WORLD_QUESTIONS[1], "candidates": ["p0", "p1", "p3"]}], index)
