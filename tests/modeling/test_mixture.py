"""The mixture of Gen's distribution and a memory's against float64, and the config that says how they are mixed."""

import json

import pytest
import torch

from modeling_cosup import KNNMemory, MemoryConfig
from modeling_cosup.memory_cosup import mix, mixed_logits, target_log_probs
from support.memories import mixture

V = 40
KEPT = [3, 7, 39]
KEY = {"key": "any"}


def random_logits(seed, rows=6, scale=4.0):
    return scale * torch.randn(rows, V, generator=torch.Generator().manual_seed(seed))


def memory_of(kind):
    """Return log p_mem `(6, V)`."""
    if kind == "dense":
        return random_logits(1).log_softmax(-1)
    keys = torch.tensor([[0.0, 0.0], [0.0, 0.0], [1.0, 0.0], [0.0, 1.0], [9.0, 9.0]])
    values = {
        "one key": [11],
        "duplicates": [11, 11, 12, 12, 13],  # equal keys, and ties in distance
        "some kept": [3, 11, 7, 12, 39],
        "all kept": [3, 3, 7, 39, 39],
    }[kind]
    options = {"fingerprint": KEY, "vocab_size": V, "dtype": "float32"}
    memory = KNNMemory.from_tensors(keys[: len(values)], torch.tensor(values), **options)
    return memory.log_probs({"any": torch.tensor([[0.5, 0.5]]).expand(6, 2)}, MemoryConfig(k=99))


@pytest.mark.parametrize("kept", [KEPT, []])
@pytest.mark.parametrize("kind", ["dense", "one key", "duplicates", "some kept", "all kept"])
def test_the_mixture_equals_float64(kind, kept):
    lm, memory = random_logits(0).log_softmax(-1), memory_of(kind)
    kept_ids = torch.tensor(kept, dtype=torch.long)
    for weight in (0, 0.25, 1.0):
        result = mix(lm, memory, weight, kept_ids)
        assert result.dtype == torch.float32
        assert (result.exp().sum(1) - 1).abs().max() < 1e-6
        assert torch.equal(result[:, kept], lm[:, kept])
        for row in range(len(lm)):
            expected = mixture(lm[row].exp(), memory[row].exp(), weight, kept)
            assert (result[row].exp() - expected).abs().max() < 1e-5
        assert torch.equal(mixed_logits(lm + 7, memory, 0.0, kept_ids), lm + 7)
    if kind == "all kept" and kept:
        assert torch.equal(mix(lm, memory, 0.5, kept_ids), lm)


def test_each_row_has_its_weight():
    lm, memory, kept = random_logits(0).log_softmax(-1), memory_of("dense"), torch.tensor(KEPT)
    weights = torch.tensor([0.0, 0.1, 0.25, 0.5, 0.9, 1.0])[:, None]
    result = mix(lm, memory, weights, kept)
    for row, weight in enumerate(weights[:, 0].tolist()):
        assert torch.equal(result[row], mix(lm[row : row + 1], memory[row : row + 1], weight, kept)[0])
    logits = random_logits(0)
    mixed = mixed_logits(logits, memory, weights, kept)
    assert torch.equal(mixed[0], logits[0])
    assert (mixed.softmax(-1) - result.exp()).abs().max() < 1e-6
    assert (mixed - logits)[:, KEPT].abs().max() < 1e-5  # on the scale of Gen's logits


def test_what_is_left_when_a_kept_id_is_certain():
    """A row that takes its [NSP] back decides among the rest, however little mass Gen left it."""
    logits, memory, kept = random_logits(0), memory_of("dense"), torch.tensor(KEPT)
    logits[:, 3] = 60.0
    mixed = mixed_logits(logits, memory, 0.5, kept)
    mixed[:, KEPT] = float("-inf")
    logits[:, KEPT] = float("-inf")
    memory = memory.index_fill(1, kept, float("-inf"))
    expected = (logits.double().softmax(-1) + memory.double().softmax(-1)) / 2
    assert (mixed.double().softmax(-1) - expected).abs().max() < 1e-5


@pytest.mark.parametrize("kind", ["dense", "some kept", "all kept"])
def test_one_target_equals_the_whole_mixture(kind):
    lm, memory, kept = random_logits(0).log_softmax(-1), memory_of(kind), torch.tensor(KEPT)
    lm_kept, memory_kept = lm[:, KEPT].logsumexp(1), memory[:, KEPT].logsumexp(1)
    weights = torch.tensor([0.0, 0.1, 0.25, 0.5, 0.9, 1.0])
    whole, plain = mix(lm, memory, weights[:, None], kept), mix(lm, memory, weights[:, None], kept[:0])
    for target in range(V):
        is_kept = torch.full((6,), target in KEPT)
        result = target_log_probs(lm[:, target], memory[:, target], weights, lm_kept, memory_kept, is_kept)
        torch.testing.assert_close(result, whole[:, target], atol=1e-5, rtol=1e-5)
        result = target_log_probs(lm[:, target], memory[:, target], weights)
        torch.testing.assert_close(result, plain[:, target], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"weight": 1.1}, "MemoryConfig.weight is 1.1, expected a number from 0 to 1"),
        ({"weight": -0.1}, "MemoryConfig.weight is -0.1"),
        ({"weight": "0.25"}, "MemoryConfig.weight is '0.25'"),
        ({"grounded_weight": 2}, "MemoryConfig.grounded_weight is 2"),
        ({"weight": float("nan")}, "MemoryConfig.weight is nan"),
        ({"temperature": 0}, "MemoryConfig.temperature is 0, expected a number above 0"),
        ({"temperature": float("inf")}, "MemoryConfig.temperature is inf"),
        ({"k": 0}, "MemoryConfig.k is 0, expected an integer, 1 or more"),
        ({"k": 2.0}, "MemoryConfig.k is 2.0"),
        ({"output_neighbors": -1}, "MemoryConfig.output_neighbors is -1, expected an integer, 0 or more"),
    ],
)
def test_a_config_checks_itself(values, message):
    with pytest.raises(ValueError, match=message):
        MemoryConfig(**values)
    with pytest.raises(ValueError, match=message):
        MemoryConfig.from_dict(values)


def test_a_config_goes_through_json():
    config = MemoryConfig(weight=0.5, k=7, temperature=2.5, grounded_weight=0.0, output_neighbors=3)
    assert MemoryConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert MemoryConfig().weights == (0.25, 0.25)
    assert config.weights == (0.5, 0.0)
    with pytest.raises(ValueError, match="MemoryConfig has no lambda"):
        MemoryConfig.from_dict({"weight": 0.5, "lambda": 0.1})
