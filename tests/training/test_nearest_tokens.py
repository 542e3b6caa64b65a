"""Which passage tokens are nearest to an answer, by hand and against numpy, and the attention that they get."""

import numpy as np
import pytest
import torch

from support.models import make_model, make_tokenizer
from support.training import NAMES, arguments, questions
from trainer import CoSupTrainer
from trainer.nearest_tokens import indicator_1, is_nearest, passage_tokens, target_token_ids, token_similarity
from trainer.reading import ReaderRow

EMBEDDINGS = torch.tensor([[1.0, 0.0], [3.0, 0.0], [1.0, 1.0], [0.0, 2.0], [-1.0, 0.0]])  # of the tokens 0 to 4
HALF = pytest.approx(0.5**0.5, abs=1e-5)


def embed(ids):
    return EMBEDDINGS[ids]


def row_of(tokens, spans):
    return ReaderRow(tokens, [-100] * len(tokens), spans, (len(tokens) - 1, len(tokens)), 0)


def test_similarity_is_the_mean_cosine_or_that_to_the_nearest_target():
    ids = torch.tensor([2, 0, 1, 3, 4, 2])
    assert token_similarity(embed, ids, [0]).tolist() == [HALF, 1, 1, 0, -1, HALF]
    assert token_similarity(embed, ids, [0, 3]).tolist() == [HALF, 0.5, 0.5, 0.5, -0.5, HALF]
    assert token_similarity(embed, ids, [0, 3], "max").tolist() == [HALF, 1, 1, 1, 0, HALF]


def test_tokens_of_several_targets_tie():
    """Rounding in the last digit must not rank one target above another."""
    torch.manual_seed(0)
    weights = torch.randn(200, 64)
    assert set(token_similarity(lambda ids: weights[ids], torch.arange(200), range(200), "max").tolist()) == {1.0}


def test_similarity_is_the_same_under_autocast():
    """Embeddings that nearly point one way, as those of language models do, tie in bfloat16."""
    generator = torch.Generator().manual_seed(0)
    weights = 10 + torch.randn(200, 64, generator=generator)
    similarity = token_similarity(lambda ids: weights[ids], torch.arange(200), [3, 5, 8])
    with torch.autocast("cpu", torch.bfloat16):
        in_training = token_similarity(lambda ids: weights[ids], torch.arange(200), [3, 5, 8])
    assert torch.equal(in_training, similarity)
    assert is_nearest(in_training, 95).sum() == 10


@pytest.mark.parametrize("size", [1, 2, 11, 20, 21, 100, 101, 173])
@pytest.mark.parametrize("percentile", [0, 90, 95, 100])
def test_nearest_tokens_against_numpy(size, percentile):
    generator = np.random.default_rng(size)
    for values in (generator.permutation(size), generator.integers(0, 3, size), np.ones(size)):
        expected = values >= np.quantile(values, percentile / 100) - 1e-9  # numpy interpolates in floating point
        assert is_nearest(torch.tensor(values, dtype=torch.float32), percentile).tolist() == expected.tolist()


def test_attention_is_that_of_all_passages():
    """Prompt, line breaks, [Cs] and answer are not counted."""
    row = row_of([9, 9, 0, 1, 8, 2, 7, 5], [(2, 4), (5, 6)])
    ids, attention = passage_tokens(row, torch.tensor([50.0, 7.0, 1.0, 2.0, 30.0, 1.0, 9.0]))
    assert ids.tolist() == [0, 1, 2]
    assert attention.tolist() == [0.25, 0.5, 0.25]


def test_indicator_1_by_hand():
    """Half of the attention is on the only token of the answer; a reader that attends to all alike gives 1 / n."""
    row = row_of([9, 0, 4, 2, 3, 7, 5], [(1, 3), (3, 5)])
    looking = torch.tensor([9.0, 1.0, 2.0, 1.0, 4.0, 9.0])
    alike = torch.full((6,), 0.3)
    values = indicator_1(embed, [row, row], [looking, alike], [[3], [3]])
    assert values == pytest.approx([0.5, 0.25])
    assert indicator_1(embed, [row], [looking], [[3]], percentile=50) == pytest.approx([(0.5 + 0.125) / 2])
    both = indicator_1(embed, [row], [looking], [[3, 0]], pooling="max")  # both have cosine 1
    assert both == pytest.approx([(0.5 + 0.125) / 2])
    assert indicator_1(embed, [], [], []) == []


def test_targets_are_spelled_as_passages_spell_them():
    tokenizer = make_tokenizer()
    ids = target_token_ids(tokenizer, ["Rembrandt", "Rembrandt"])
    alone, in_a_text = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in ("Rembrandt", " Rembrandt"))
    assert alone != in_a_text
    assert set(ids) == {id for id in (*alone, *in_a_text) if tokenizer.decode([id]).strip()}
    assert len(ids) == len(set(ids))
    with pytest.raises(ValueError, match=r"The texts \[' '\] have no tokens"):
        target_token_ids(tokenizer, [" "])


def test_a_training_measures_the_answer_that_is_read(tmp_path):
    """Further answers count for hit_rate, not for the indicator."""
    asked, corpus = questions(NAMES[:10])
    values = []
    for further in ([], [asked[1]["answers"][0]], ["lives in"]):
        instances = [{**question, "answers": [*question["answers"], *further]} for question in asked]
        args = arguments(
            tmp_path, supervision="ntp", candidates_from="index", num_candidates=3, log_indicators=True, max_steps=1
        )
        trainer = CoSupTrainer(make_model(), args, train_dataset=instances, corpus=corpus)
        trainer.train()
        values.append(trainer.state.log_history[0]["indicator_1"])
    assert values[0] == values[1] == values[2] > 0
