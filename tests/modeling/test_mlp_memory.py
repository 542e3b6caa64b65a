"""The MLP memory: its formula, its files, and the Gen that it belongs to."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from modeling_cosup import MemoryConfig, MLPMemory
from support.models import make_gen, make_model

NAME = "model.layers.1.mlp"


@pytest.fixture(scope="module")
def model():
    return make_model()


@pytest.fixture
def memory(model):
    torch.manual_seed(0)
    return MLPMemory.from_gen(model, intermediate_size=24, memory_config=MemoryConfig(weight=0.5))


@pytest.fixture
def saved(memory, tmp_path):
    memory.save_pretrained(tmp_path / "memory")
    return tmp_path / "memory"


@pytest.fixture(scope="module")
def keys():
    return torch.randn(5, 32, generator=torch.Generator().manual_seed(3))


def test_the_formula(memory, keys):
    weights = {name: weight.double() for name, weight in memory.state_dict().items()}
    hidden = F.gelu(keys.double() @ weights["up_proj.weight"].T + weights["up_proj.bias"])
    hidden = hidden @ weights["down_proj.weight"].T + weights["down_proj.bias"]
    centred = hidden - hidden.mean(1, keepdim=True)
    normed = centred / (centred.square().mean(1, keepdim=True) + 1e-5).sqrt()
    logits = (keys.double() + normed) @ weights["lm_head.weight"].T  # LN begins with weight 1 and bias 0
    for temperature in (1.0, 3.0):
        config = MemoryConfig(temperature=temperature)
        expected = (logits / temperature).log_softmax(-1)
        log_probs = memory.log_probs({NAME: keys}, config)
        assert (log_probs - expected).abs().max() < 1e-5
        targets, kept = torch.arange(5), torch.tensor([1, 390])
        assert torch.equal(memory.target_log_probs(keys, targets, config), log_probs[targets, targets])
        target, mass = memory.target_log_probs(keys, targets, config, kept_ids=kept)
        assert torch.equal(target, log_probs[targets, targets])
        torch.testing.assert_close(mass, log_probs[:, kept].logsumexp(1))
    assert memory(keys).requires_grad


@pytest.mark.parametrize("gen", ["llama", "gptj"])  # tied to the embeddings; with a bias
def test_it_begins_with_a_copy_of_the_lm_head(gen):
    model = make_gen(gen)
    memory, head = MLPMemory.from_gen(model, intermediate_size=8), model.get_output_embeddings()
    assert torch.equal(memory.lm_head.weight, head.weight)
    assert memory.lm_head.weight.data_ptr() != head.weight.data_ptr()
    assert (memory.lm_head.bias is None) == (head.bias is None)
    if head.bias is not None:
        assert torch.equal(memory.lm_head.bias, head.bias)


def test_a_saved_memory_is_the_same(memory, saved, keys, model):
    assert sorted(path.name for path in saved.iterdir()) == ["memory_config.json", "model.safetensors"]
    loaded = MLPMemory.from_pretrained(saved)
    assert loaded.memory_config == memory.memory_config
    assert loaded.states == memory.states == (NAME,)
    assert loaded.fingerprint == memory.fingerprint
    assert torch.equal(loaded(keys), memory(keys))
    loaded.check_model(model)
    with torch.no_grad():
        loaded.up_proj.weight.mul_(1.1)
    assert loaded.fingerprint != memory.fingerprint
    loaded.save_pretrained(saved)  # replaces it
    assert MLPMemory.from_pretrained(saved).fingerprint == loaded.fingerprint


def test_half_precision(memory, saved, keys):
    half = MLPMemory.from_pretrained(saved, dtype=torch.bfloat16)
    assert half.fingerprint == memory.fingerprint  # a cast to bfloat16 does not make it another
    log_probs = half.log_probs({NAME: keys.half()}, MemoryConfig())
    assert log_probs.dtype == torch.float32
    assert (log_probs - memory.log_probs({NAME: keys}, MemoryConfig())).abs().max() < 0.2
    half.save_pretrained(saved)
    assert MLPMemory.from_pretrained(saved).up_proj.weight.dtype == torch.bfloat16


def edit(path, **changes):
    values = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({name: value for name, value in values.items() if value is not None}))


def test_damaged_and_foreign_files_are_named(saved, memory):
    config, weights = saved / "memory_config.json", saved / "model.safetensors"
    original = config.read_text()
    for changes, message in (
        ({"memory_type": "knn"}, "memory_config.json is not of an MLP memory but of a memory of the type 'knn'"),
        ({"hidden_size": 0}, "memory_config.json is damaged: hidden_size is 0"),
        ({"vocab_size": None}, "memory_config.json is damaged: .*vocab_size"),
        ({"memory_config": {"weight": 7}}, "memory_config.json is damaged: MemoryConfig.weight is 7"),
        ({"intermediate_size": 25}, "model.safetensors is damaged, or of another memory: .*size mismatch"),
    ):
        edit(config, **changes)
        with pytest.raises(ValueError, match=f"(?s){message}"):
            MLPMemory.from_pretrained(saved)
        if changes == {"memory_type": "knn"}:
            with pytest.raises(FileExistsError, match="holds a memory of another kind"):
                memory.save_pretrained(saved)
        config.write_text(original)
    content = load_file(weights)
    save_file({name: weight.double() for name, weight in content.items()}, weights)
    with pytest.raises(ValueError, match="holds weights in torch.float64"):
        MLPMemory.from_pretrained(saved)
    weights.write_bytes(weights.read_bytes()[:-5])
    with pytest.raises(ValueError, match="model.safetensors is damaged"):
        MLPMemory.from_pretrained(saved)
    weights.unlink()
    with pytest.raises(FileNotFoundError, match="is not an MLP memory: model.safetensors is missing"):
        MLPMemory.from_pretrained(saved)
    with pytest.raises(FileNotFoundError, match="is not a folder, and no repository of this name"):
        MLPMemory.from_pretrained(saved / "nowhere")


def test_a_memory_of_another_gen_is_refused(memory, model):
    memory.check_model(model.gen)  # a plain language model of the same weights
    others = make_model(gen_kwargs={"seed": 5}), make_model("gpt2")
    for other, message in zip(
        others, ("weights of Gen's body", "key: the memory has model.layers.1.mlp"), strict=True
    ):
        with pytest.raises(ValueError, match=message):
            other.generate(torch.tensor([[5, 6]]), memory=memory, max_new_tokens=1)
    resized = make_model()
    resized.resize_token_embeddings(500)
    memory.gen_fingerprint |= {"gen": MLPMemory.from_gen(resized, 8).gen_fingerprint["gen"]}
    with pytest.raises(ValueError, match="This memory predicts 4.. tokens, the model 500"):
        memory.check_model(resized)
    with pytest.raises(ValueError, match="does not say whose keys it reads"):
        model.generate(torch.tensor([[5, 6]]), memory=MLPMemory(32, 400, 8), max_new_tokens=1)


def test_bad_sizes_and_heads():
    with pytest.raises(ValueError, match="intermediate_size is 0, expected at least 1"):
        MLPMemory(32, 400, 0)
    gen = make_gen("gpt2")
    gen.lm_head.weight.data = torch.zeros(400, 16)
    with pytest.raises(ValueError, match=r"LM head has weights \(400, 16\) .* expected \(vocab_size, 32\)"):
        MLPMemory.from_gen(gen)
    with pytest.raises(ValueError, match="The key of a mamba model is not known"):
        MLPMemory.from_gen(make_gen("mamba"))


def test_a_memory_without_entries_has_no_neighbors(memory, model):
    config = MemoryConfig(output_neighbors=2)
    with pytest.raises(ValueError, match="output_neighbors is 2, but a MLPMemory has no entries"):
        model.generate(torch.tensor([[5, 6]]), memory=memory, memory_config=config, max_new_tokens=1)


@pytest.mark.parametrize("held", ["model.safetensors", "config.json"])
def test_a_model_is_not_overwritten(memory, tmp_path, held):
    (tmp_path / held).write_text("precious")
    with pytest.raises(FileExistsError, match="holds a model; choose another folder"):
        memory.save_pretrained(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [held]
    assert (tmp_path / held).read_text() == "precious"


def test_an_interrupted_save_can_be_repeated(memory, saved):
    """It leaves weights without a config, which are recognised as those of a memory."""
    (saved / "memory_config.json").unlink()
    memory.save_pretrained(saved)
    assert MLPMemory.from_pretrained(saved).fingerprint == memory.fingerprint


def test_weights_under_the_config_of_another_gen_are_refused(memory, saved):
    """A crash between the two files leaves the new weights and the old config."""
    memory.save_pretrained(saved)  # a memory is replaced
    old_config = (saved / "memory_config.json").read_text()
    memory.gen_fingerprint = {**memory.gen_fingerprint, "gen": "another"}
    memory.save_pretrained(saved)
    (saved / "memory_config.json").write_text(old_config)
    with pytest.raises(ValueError, match="is of another memory than memory_config.json: a save was interrupted"):
        MLPMemory.from_pretrained(saved)
