"""Rankings and answers of a model, and the NTP loss of reference answers, against the model itself and by hand."""

import numpy as np
import pytest
import torch

from modeling_cosup import Completion, CoSupConfig, Retrieval
from modeling_cosup.tokenization_cosup import encode_prompt
from support.evaluation_world import CORPUS, FREE
from support.evaluation_world import QUESTIONS as WORLD_QUESTIONS
from support.models import PASSAGES, make_model, plain_batch
from trainer import CoSupTrainingArguments
from trainer.batching import BatchFacts
from trainer.held_out_figures import retrieval_metrics
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
from trainer.questions import gold_ids
from trainer.tokenizing import tokenize_instance


def question_about(passage, i):
    """Return a question without candidates."""
    return {
        "id": f"q{i}",
        "dataset": "d",
        "instruction": "",
        "input": f"question {i}?",
        "answers": [passage["title"] or "none"],
        "provenance": [[passage["id"]]],
    }


QUESTIONS = [question_about(passage, i) for i, passage in enumerate(PASSAGES)]


def test_ntp_loss_of_references_equals_the_model(model):
    instances = reference_instances(QUESTIONS[:2], PASSAGES)
    rows = [tokenize_instance(instance, model.tokenizer, model.tokenizer, model.config) for instance in instances]
    with torch.no_grad():
        expected = float(model(**plain_batch(rows)).ntp_loss)
    assert ntp_loss(model, instances).value == pytest.approx(expected, rel=1e-5)


def test_rankings_against_the_model_itself(model):
    index = model.build_index(PASSAGES, show_progress_bar=False)
    rankings = rank_passages(model, index, QUESTIONS, batch_size=4)
    assert [ranking["id"] for ranking in rankings] == [question["id"] for question in QUESTIONS]
    all_ids = sorted(passage["id"] for passage in PASSAGES)
    for question, ranking in zip(QUESTIONS, rankings, strict=True):
        assert sorted(ranking["corpus"]) == all_ids
        assert rank_passages(model, index, [question]) == [ranking]
    pools = [{**question, "candidates": ["p4", "p1"]} for question in QUESTIONS]
    for ranking in rank_passages(model, index, pools, pools=True):
        assert ranking["pool"] == [id for id in ranking["corpus"] if id in ("p1", "p4")]
    assert rank_passages(model, index, []) == []


def test_queries_of_an_encoder_are_embedded_without_gen():
    model = make_model(query_from="emb_seq").eval()
    expected = []
    for question in QUESTIONS:
        prompt = [*encode_prompt(model.tokenizer, question["input"]), model.config.nsp_token_id]
        with torch.no_grad():
            expected.append(model(torch.tensor([prompt])).query_embeds)
    model.gen.base_model.register_forward_pre_hook(lambda module, args: pytest.fail("Gen is run"))
    torch.testing.assert_close(
        embed_queries(model, QUESTIONS, batch_size=4), torch.cat(expected), rtol=1e-5, atol=1e-6
    )


def test_long_questions_of_an_encoder_differ_by_their_ends():
    model = make_model("llama", "gpt2", query_from="emb_seq", emb_seq_kwargs={"max_position_embeddings": 300}).eval()
    long_questions = [{**question, "input": "word " * 400 + question["input"]} for question in QUESTIONS[:2]]
    embeds = embed_queries(model, long_questions)
    assert not torch.allclose(embeds[0], embeds[1], atol=1e-3)


@pytest.mark.parametrize("batch_size", [1, 4])
def test_modes_of_answering(batch_size):
    """An untrained model retrieves nothing in mode 'off', gold passages in 'gold', and others in 'wrong'."""
    model = make_model()
    index = model.build_index(PASSAGES, show_progress_bar=False)
    options = {"batch_size": batch_size, "max_new_tokens": 6}
    off = answer(model, QUESTIONS, None, "off", **options)
    gold = answer(model, QUESTIONS, index, "gold", **options)
    wrong = answer(model, QUESTIONS, index, "wrong", **options)
    assert all(retrieved_ids(prediction) == [] for prediction in off)
    for prediction, question in zip(gold, QUESTIONS, strict=True):
        assert retrieved_ids(prediction) == question["provenance"][0]
        assert (prediction["id"], prediction["answers"]) == (question["id"], question["answers"])
        assert prediction["mode"] == "gold"
    for prediction, question in zip(wrong, QUESTIONS, strict=True):
        assert len(retrieved_ids(prediction)) == 1
        assert retrieved_ids(prediction) != question["provenance"][0]
    assert answer(model, QUESTIONS, index, "wrong", **options) == wrong
    outputs = {tuple(prediction["output"] for prediction in predictions) for predictions in (off, gold, wrong)}
    assert len(outputs) == 3
    assert model.training is False


def losses_of(batch):
    """`embedding_losses` of a model with temperature 1."""
    return embedding_losses(batch, CoSupConfig(temperature=1.0), CoSupTrainingArguments())


def test_retrieval_metrics_by_hand():
    """The two batches share a passage, one passage is right for another query too, and one query is NaN."""
    facts = [
        BatchFacts(
            query_instance_ids=["a", "b"],
            query_numbers=[0, 1],
            are_first=[True, True],
            passage_keys=[(1,), (2,)],
            positive_keys=[(), (1,)],
            query_keys=[10, 11],
            passage_labels=[0, 1],
        ),
        BatchFacts(
            query_instance_ids=["c", "d"],
            query_numbers=[0, 1],
            are_first=[True, True],
            passage_keys=[(2,), (3,)],
            positive_keys=[(), ()],
            query_keys=[12, 13],
            passage_labels=[0, 1],
        ),
    ]
    passages = np.eye(3, dtype=np.float32)[[0, 1, 1, 2]]
    queries = np.array([[1, 0, 0], [5, 1, 0], [2, 1, 0], [np.nan, 0, 1]], dtype=np.float32)
    metrics, rows, labels = retrieval_metrics(queries, passages, facts, losses_of, ks=(1, 2))
    assert rows.tolist() == [0, 1, 3]
    assert labels.tolist() == [0, 1, 1, 2]
    assert (metrics["num_passages"], metrics["num_queries"]) == (3, 4)
    assert {figure(name).name for name in metrics} == set(metrics)  # in the vocabulary
    assert metrics["query_recall@1"] == 0.5  # the first query, and the second, for which passage 1 is right too
    assert metrics["query_recall@2"] == 0.75

    broken = np.where(np.eye(3)[[2, 2, 2, 1]], np.nan, passages).astype(np.float32)  # one score of each query
    broken_metrics, _, _ = retrieval_metrics(np.nan_to_num(queries), broken, facts, losses_of, ks=(1, 2))
    assert broken_metrics["query_recall@1"] == 0.0

    finite_queries = np.nan_to_num(queries)
    finite_metrics, _, _ = retrieval_metrics(finite_queries, passages, facts, losses_of)
    scores = torch.from_numpy(finite_queries) @ torch.eye(3)
    scores[1, 0] = float("-inf")
    expected = torch.nn.functional.cross_entropy(scores, torch.tensor([0, 1, 1, 2]))
    assert finite_metrics["nsp_loss"] == pytest.approx(float(expected))

    without_queries = [BatchFacts(passage_keys=[(i,) for i in range(4)])]
    no_metrics, _, _ = retrieval_metrics(queries[:0], passages, without_queries, losses_of)
    assert no_metrics == {"num_passages": 4, "num_queries": 0}


# ---------------------------------------------------------------------- citations, wrong passages


def test_citations_are_before_the_end_of_each_sentence(model):
    """A passage, another one and the first again, with free text around them. Numbers count distinct passages."""
    tokenizer, config = model.tokenizer, model.config
    prompt_length = 3

    def ids_of(text):
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    tokens, trace = ids_of("Well."), []
    for id, text in (("p0", "It was Rembrandt. He painted"), ("p1", 'who said "radium!"'), ("p0", "")):
        passages = [{"id": id, "title": id, "text": f"text of {id}"}]
        position = prompt_length + len(tokens)
        tokens += [config.nsp_token_id, *ids_of("a passage"), config.cs_token_id]
        start = prompt_length + len(tokens)
        tokens += ids_of(text)
        end = prompt_length + len(tokens)
        tokens.append(config.ce_token_id)
        trace.append(Retrieval(0, position, passages, [0.5], (start, end)))
    tokens += ids_of("end.")
    completion = Completion(0, tokens, "its text", "cited", 9, trace)

    prediction = as_prediction(FREE, completion, prompt_length, tokenizer)

    expected = 'Well. It was Rembrandt [1]. He painted [1] who said "radium [2]!" end.'
    assert prediction["output_with_citations"] == expected
    first, second, third = prediction["retrievals"]
    assert first["grounded_text"] == "It was Rembrandt. He painted"
    assert second["grounded_text"] == 'who said "radium!"'
    assert third["grounded_text"] == ""
    assert second["scores"] == [0.5]
    assert second["passages"] == [{"id": "p1", "title": "p1", "text": "text of p1"}]
    assert retrieved_ids(prediction) == ["p0", "p1", "p0"]
    assert prediction["id"] == "q90"
    assert prediction["output"] == "its text"
    assert prediction["cited_text"] == "cited"
    assert prediction["num_generated_tokens"] == 9


def test_marks_are_before_closing_punctuation():
    assert cite("Yes", "[1][2]") == "Yes [1][2]"
    assert cite("(Really?)", "[1]") == "(Really [1]?)"


def test_wrong_passages_depend_on_seed_and_question_alone(model):
    index = model.build_index(CORPUS, show_progress_bar=False)
    wrong = wrong_passages(WORLD_QUESTIONS, index, 0)
    assert [len(ids) for ids in wrong] == [len(question["provenance"][0]) for question in WORLD_QUESTIONS]
    assert wrong_passages(WORLD_QUESTIONS[3:], index, 0) == wrong[3:]
    assert wrong_passages(WORLD_QUESTIONS, index, 1) != wrong


def test_wrong_passages_are_never_gold(model):
    index = model.build_index(CORPUS, show_progress_bar=False)
    without_pools = [{**question, "candidates": []} for question in WORLD_QUESTIONS]
    for ids, question in zip(wrong_passages(without_pools, index), WORLD_QUESTIONS, strict=True):
        assert gold_ids(question).isdisjoint(ids)


def test_wrong_passages_are_as_many_as_gold_ones(model):
    """Of the candidates as far as they suffice, and then of the index."""
    index = model.build_index(CORPUS, show_progress_bar=False)
    gold = ["p0", "p1", "p3"]
    few = {**WORLD_QUESTIONS[1], "candidates": [*gold, "evil", "evil"]}
    (ids,) = wrong_passages([few], index)
    assert ids[0] == "evil"
    assert len(set(ids)) == len(few["provenance"][0]) == 2
    (ids,) = wrong_passages([{**few, "candidates": gold}], index)
    assert len(set(ids) - set(gold)) == 2
    small = model.build_index([passage for passage in CORPUS if passage["id"] in (*gold, "evil")])
    with pytest.raises(ValueError, match="too few wrong passages for 1 of 2 questions: mode 'wrong' gives"):
        wrong_passages([{**WORLD_QUESTIONS[0], "candidates": []}, few], small)
