"""Perplexity with token memories: against dense arithmetic in float64, intervals over documents, text seen before."""

import copy
import math

import numpy as np
import pytest
import torch

from modeling_cosup import KNNMemory, MemoryConfig, MLPMemory
from modeling_cosup.memory_cosup import target_log_probs
from support.models import make_gen, make_model
from trainer.judging import overlap
from trainer.judging.intervals import resampled_means
from trainer.judging.overlap import NgramHashes
from trainer.judging.perplexity import TextScores, kept_ids_of, score_text, target_and_kept

NAME = "model.layers.1.mlp"
WINDOW, STRIDE = 16, 6
LENGTHS = (40, 1, 16, 2, 17, 9)  # shorter and longer than the window; the second has nothing to predict


@pytest.fixture(scope="module")
def model():
    return make_model(tie_emb_seq=True)


@pytest.fixture(scope="module")
def documents(model):
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(0, 380, (length,), generator=generator).tolist() for length in LENGTHS]


def windows_by_hand(length):
    """Return (start, end, first target) of each window, as a loop over targets finds them."""
    spans = {}
    for target in range(1, length):
        start = 0
        while target >= start + WINDOW:
            start += STRIDE
        spans.setdefault(start, []).append(target)
    return [(start, targets[-1] + 1, targets[0]) for start, targets in spans.items()]


@torch.no_grad()
def states_by_hand(gen, ids):
    """Return keys (n, d) and log p_LM (n, V) of the tokens of a document, in float64, one window at a time."""
    keys, log_probs = [], []
    for start, end, first in windows_by_hand(len(ids)):
        seen = []
        hook = gen.get_submodule(NAME).register_forward_pre_hook(lambda module, args, seen=seen: seen.append(args[0]))
        logits = gen(torch.tensor([ids[start:end]])).logits[0]
        hook.remove()
        rows = slice(first - start - 1, end - start - 1)
        keys.append(seen[0][0, rows])
        log_probs.append(logits[rows].log_softmax(-1))
    return torch.cat(keys), torch.cat(log_probs)


def mixed_by_hand(p_lm, p_memory, weight, kept):
    """Return the mixture (n, V) of two distributions, the kept ids being the LM's."""
    is_kept = torch.zeros(p_lm.shape[1], dtype=torch.bool)
    is_kept[kept] = True
    rest = p_memory.masked_fill(is_kept, 0.0)
    mass = rest.sum(1, keepdim=True)
    share = torch.where(mass > 0, weight, 0.0)
    rest = torch.where(mass > 0, rest / mass, rest)
    outside = (1 - share) * p_lm + share * (1 - p_lm[:, kept].sum(1, keepdim=True)) * rest
    return torch.where(is_kept, p_lm, outside)


def knn_by_hand(memory, keys, config, size):
    """Return p_kNN (n, V) by distances to all keys, in float64; ties go to the lower row."""
    stored = memory.get_keys(torch.arange(len(memory))).double()
    values = memory.get_values(torch.arange(len(memory)))
    distances = (keys[:, None] - stored).square().sum(-1)
    order = distances.argsort(dim=1, stable=True)[:, : config.k]
    weights = (-distances.gather(1, order) / config.temperature).softmax(1)
    return torch.zeros(len(keys), size, dtype=torch.float64).scatter_add(1, values[order], weights)


def make_knn(model, values, seed=3):
    """Return a datastore whose keys are near those of the text, with three copies of one key."""
    generator = torch.Generator().manual_seed(seed)
    keys = torch.randn(len(values), 32, generator=generator)
    keys[1:3] = keys[0]
    return KNNMemory.from_tensors(
        keys,
        torch.tensor(values),
        fingerprint=model.memory_fingerprint(),
        vocab_size=model.config.get_text_config().vocab_size,
        dtype="float32",
    )


@pytest.fixture(scope="module")
def arms(model):
    """Memories of both kinds; one datastore holds control tokens, another nothing else."""
    torch.manual_seed(1)
    nsp = model.config.nsp_token_id
    many = make_knn(model, [*range(50), nsp, nsp] * 3)
    return {
        "near": (many, MemoryConfig(weight=0.3, k=7, temperature=20.0)),
        "all": (many, MemoryConfig(weight=0.9, k=5000, temperature=100.0)),
        "control": (make_knn(model, [nsp] * 4), MemoryConfig(weight=0.5, k=2)),
        "mlp": (MLPMemory.from_gen(model, intermediate_size=16), MemoryConfig(weight=0.4, temperature=2.0)),
        "off": (many, MemoryConfig(weight=0.0)),
    }


@pytest.mark.parametrize("batch_size", [1, 8])
def test_log_likelihoods_equal_dense_arithmetic_in_float64(model, documents, arms, batch_size):
    gen = copy.deepcopy(model.gen).double()
    kept = [model.config.nsp_token_id, model.config.cs_token_id, model.config.ce_token_id]
    kept += np.atleast_1d(model.generation_config.eos_token_id).tolist()
    scores = score_text(model, documents, arms, max_length=WINDOW, stride=STRIDE, batch_size=batch_size)
    assert scores.tokens.tolist() == [39, 15, 1, 16, 8]
    assert scores.left_out == 1
    assert list(scores.seconds) == list(scores.log_likelihoods) == ["lm", *arms]
    expected = {arm: [] for arm in scores.log_likelihoods}
    for ids in documents:
        if len(ids) < 2:
            continue
        keys, log_probs = states_by_hand(gen, ids)
        targets = torch.tensor(ids[1:])[:, None]
        expected["lm"].append(float(log_probs.gather(1, targets).sum()))
        for name, (memory, config) in arms.items():
            if isinstance(memory, MLPMemory):
                logits = copy.deepcopy(memory).double()(keys)
                p_memory = (logits / config.temperature).softmax(-1)
            else:
                p_memory = knn_by_hand(memory, keys, config, log_probs.shape[1])
            mixture = mixed_by_hand(log_probs.exp(), p_memory.detach(), config.weight, sorted(set(kept)))
            torch.testing.assert_close(mixture.sum(1), torch.ones(len(mixture)).double(), atol=1e-6, rtol=0)
            expected[name].append(float(mixture.gather(1, targets).log().sum()))
    for name, values in expected.items():
        per_token = np.array(values) / scores.tokens
        assert scores.log_likelihoods[name] / scores.tokens == pytest.approx(per_token, abs=1e-5), name
    assert scores.log_likelihoods["control"] == pytest.approx(scores.log_likelihoods["lm"], abs=1e-6)
    assert (scores.log_likelihoods["off"] == scores.log_likelihoods["lm"]).all()
    assert not np.allclose(scores.log_likelihoods["near"], scores.log_likelihoods["lm"], atol=0.1)


@pytest.mark.parametrize("surplus", [-5.0, 1.0, 10.0, 30.0])
def test_the_mixture_where_a_kept_id_is_all_but_certain(surplus):
    torch.manual_seed(0)
    logits = torch.randn(6, 40)
    logits[:, 3] += surplus
    targets = torch.tensor([5, 6, 7, 8, 9, 3])
    memory = torch.randn(6, 40).double().log_softmax(1)
    memory[:, [3, 4]] = -torch.inf
    memory = memory.log_softmax(1)
    lm, lm_kept = target_and_kept(logits, targets, torch.tensor([3, 4]))
    chosen, nothing = memory.gather(1, targets[:, None])[:, 0], torch.full((6,), -torch.inf)
    mixed = target_log_probs(lm, chosen, 0.5, lm_kept, nothing, targets == 3)
    p_lm = logits.double().softmax(1)
    others = p_lm.clone()
    others[:, [3, 4]] = 0
    expected = 0.5 * p_lm + 0.5 * others.sum(1, keepdim=True) * memory.exp()
    expected = torch.where(targets == 3, p_lm[:, 3], expected.gather(1, targets[:, None])[:, 0])
    torch.testing.assert_close(mixed.double(), expected.log(), atol=1e-5, rtol=0)


def test_a_model_without_control_tokens_keeps_its_ends(model):
    plain = copy.copy(model)
    plain.config = copy.deepcopy(model.config)
    plain.config.nsp_token_id = plain.config.cs_token_id = plain.config.ce_token_id = None
    ends = model.generation_config.eos_token_id
    assert kept_ids_of(plain).tolist() == sorted(np.atleast_1d(ends).tolist())


def test_a_plain_gen_has_only_its_ends(documents):
    gen = make_gen("gemma2", final_logit_softcapping=3.0)
    gen.generation_config.eos_token_id = [5, 9]
    assert kept_ids_of(gen).tolist() == [5, 9]
    scores = score_text(gen, documents[2:3], {}, max_length=16, stride=8)
    with torch.no_grad():
        log_probs = gen(torch.tensor(documents[2:3])).logits[0, :-1].log_softmax(-1)
    expected = log_probs.gather(1, torch.tensor(documents[2][1:])[:, None]).sum()
    assert scores.log_likelihoods["lm"] == pytest.approx([float(expected)], abs=1e-4)


def test_text_without_a_token_to_predict_raises(model, arms):
    with pytest.raises(ValueError, match="None of the 2 documents has a token to predict"):
        score_text(model, [[1], []], {}, max_length=16, stride=8)
    with pytest.raises(ValueError, match="named 'lm'"):
        score_text(model, [[1, 2]], {"lm": arms["near"]}, max_length=16, stride=8)


def test_a_memory_of_another_gen_raises(documents, arms):
    with pytest.raises(ValueError):
        score_text(make_model(gen_kwargs={"seed": 7}, tie_emb_seq=True), documents, arms, max_length=16, stride=8)


# ---------------------------------------------------------------------- intervals


def test_intervals_resample_documents():
    generator = np.random.default_rng(0)
    tokens = generator.integers(5, 50, size=40).astype(float)
    lm = -tokens * generator.normal(3.0, 1.0, size=40).clip(0.1)
    scores = TextScores({"lm": lm, "mem": lm + 0.1 * tokens}, tokens)
    figures = scores.figures("mem")
    nll = figures["nll"]
    assert nll["value"] == pytest.approx(-(lm.sum() + 0.1 * tokens.sum()) / tokens.sum())
    resampled = np.percentile(resampled_means(-lm - 0.1 * tokens, tokens), [2.5, 97.5])
    assert nll["interval"] == pytest.approx(resampled)
    assert figures["perplexity"]["value"] == pytest.approx(math.exp(nll["value"]))
    assert figures["perplexity"]["interval"] == pytest.approx(np.exp(resampled))
    difference = scores.difference("mem")
    assert (difference["value"], difference["n"]) == (pytest.approx(-0.1), 40)
    assert difference["interval"] == pytest.approx([-0.1, -0.1])  # paired: documents differ, their differences do not


def test_one_document_has_no_interval():
    figures = TextScores({"lm": np.array([-6.0])}, np.array([3.0])).figures("lm")
    assert figures["perplexity"] == {"value": pytest.approx(math.exp(2.0)), "interval": None, "n": 1}


# ---------------------------------------------------------------------- text that the memory has seen


def test_overlap_is_the_share_of_stored_ngrams_and_short_documents(model, monkeypatch):
    generator = np.random.default_rng(0)
    stored = [generator.integers(0, 300, size=size).tolist() for size in (50, 7, 40, 30)]
    values = sum(stored, [])
    starts = torch.tensor([0, 50, 57, 97])
    memory = KNNMemory.from_tensors(
        torch.randn(len(values), 32),
        torch.tensor(values),
        fingerprint=model.memory_fingerprint(),
        vocab_size=model.config.get_text_config().vocab_size,
        document_starts=starts,
    )
    new = generator.integers(0, 300, size=100).tolist()
    across = stored[0][-8:] + stored[1] + stored[2][:3]  # stands in the store, but in no document
    documents = [[1, *stored[2][10:35]], [1, *new], [1, *across], [1, *stored[0], *stored[0]]]
    counts = [(10, 10), (85, 0), (3, 0), (85, 70)]
    # too short for an n-gram: only a whole stored document counts, not its beginning, nor that of a longer one
    documents += [[1, *stored[1]], [1, *stored[1][:6]], [1, *stored[0][:7]], [1, *new[:15]], [1]]
    counts += [(1, 1), (1, 0), (1, 0), (1, 0), (0, 0)]
    expected = sum(found for _, found in counts) / sum(total for total, _ in counts)
    for block in (overlap.BLOCK, 1, 13, 40):
        monkeypatch.setattr(overlap, "BLOCK", block)
        hashes = NgramHashes(documents)
        assert list(hashes) == documents
        assert hashes.overlap(memory) == pytest.approx(expected)
    only_short = NgramHashes([[1, *stored[1]], [1, *new[:7]]])
    assert list(only_short)
    assert only_short.overlap(memory) == 0.5
    nothing = NgramHashes([[1]])
    assert list(nothing)
    assert nothing.overlap(memory) is None
