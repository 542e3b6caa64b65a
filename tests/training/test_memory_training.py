"""An MLP memory learns the keys of a datastore, and weight, temperature and k are fitted on held-out tokens."""

import math

import numpy as np
import pytest
import torch

from modeling_cosup import KNNMemory, MemoryConfig, MLPMemory
from modeling_cosup.opening_cosup import load_memory
from trainer import memory as trainer_memory
from trainer.memory import TRAINING_FILE, MemoryTrainer, knn_kl, train_mlp_memory
from trainer.memory_args import MemoryTrainingArguments
from trainer.memory_fit import best_weight, fit_memory_config, write_memory_config
from trainer.memory_keys import ShuffledBlocks, StoredKeys, held_out_rows

WIDTH, VOCAB = 32, 400
FINGERPRINT = {"gen": "of a test", "key": "model.layers.1.mlp"}


def make_datastore(count=96, document_size=8, seed=0, **options):
    """Return a datastore in which the token after a key is decided by the direction of the key."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randint(0, 6, (count,), generator=generator)
    centres = torch.randn(6, WIDTH, generator=torch.Generator().manual_seed(9))
    keys = 2 * centres[values] + 0.3 * torch.randn(count, WIDTH, generator=generator)
    options = {"document_starts": torch.arange(0, count, document_size), "dtype": "float32"} | options
    return KNNMemory.from_tensors(keys, values, fingerprint=FINGERPRINT, vocab_size=VOCAB, **options)


def make_memory(seed=0, **options):
    torch.manual_seed(seed)
    return MLPMemory(WIDTH, VOCAB, intermediate_size=16, fingerprint=FINGERPRINT, **options)


@pytest.fixture(scope="module")
def datastore():
    return make_datastore()


def arguments(folder, **options):
    settings = {"num_train_epochs": 2, "learning_rate": 1e-2, "per_device_train_batch_size": 16, "report_to": "none"}
    return MemoryTrainingArguments(output_dir=str(folder), disable_tqdm=True, **(settings | options))


def mean_loss(memory, datastore):
    rows = torch.arange(len(datastore))
    with torch.no_grad():
        return float(
            torch.nn.functional.cross_entropy(memory(datastore.get_keys(rows).float()), datastore.get_values(rows))
        )


def test_training_lowers_the_loss_and_depends_on_the_seed(datastore):
    weights = []
    for seed in (1, 1, 2):
        memory = make_memory()
        before = mean_loss(memory, datastore)
        options = {"batch_size": 16, "num_train_epochs": 2, "learning_rate": 3e-2, "seed": seed}
        metrics = train_mlp_memory(memory, datastore, **options)
        assert list(metrics) == ["train_loss"]
        assert mean_loss(memory, datastore) < 0.3 < 3.0 < before
        weights.append(next(memory.parameters()).detach().clone())
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_whole_documents_are_held_out(datastore):
    metrics = train_mlp_memory(
        make_memory(), datastore, batch_size=16, learning_rate=1e-2, kl_weight=0.25, validation_split=0.2
    )
    assert set(metrics) == {"train_loss", "eval_loss", "eval_ntp_loss", "eval_knn_kl"}
    assert metrics["eval_loss"] == pytest.approx(0.75 * metrics["eval_ntp_loss"] + 0.25 * metrics["eval_knn_kl"])
    held_out = held_out_rows(datastore, 0.2, seed=0)
    documents = np.unique(held_out // 8)
    assert len(documents) == 3  # 24 of 96 rows: the fewest whole documents that are at least 0.2 of them
    assert held_out.tolist() == [row for document in documents for row in range(8 * document, 8 * document + 8)]
    assert held_out_rows(datastore, 0.2, seed=1).tolist() != held_out.tolist()
    seen = list(ShuffledBlocks(96, held_out, seed=0, block_size=10, blocks_at_once=2))
    assert sorted([*seen, *held_out.tolist()]) == list(range(96))


def test_rows_are_shuffled_within_groups_of_blocks():
    sampler = ShuffledBlocks(100, np.empty(0, np.int64), seed=0, block_size=10, blocks_at_once=3)
    epochs = []
    for epoch in (0, 1, 0):
        sampler.set_epoch(epoch)
        epochs.append(list(sampler))
    assert epochs[0] == epochs[2] != epochs[1]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(100))
    for start in (0, 30, 60):  # a group of three blocks reads three parts of the files
        group = epochs[0][start : start + 30]
        assert len({row // 10 for row in group}) == 3
        assert group != sorted(group)


def test_the_target_of_a_key_leaves_out_its_own_entry():
    """KL(p_kNN ‖ p_mem) of the trainer equals dense arithmetic in float64 without the key itself."""
    datastore = make_datastore(count=20, document_size=20)
    memory = make_memory()
    config = MemoryConfig(k=9, temperature=5.0)
    trainer = MemoryTrainer(memory, arguments("unused", kl_weight=1.0), datastore, config)
    rows = torch.tensor([3, 0, 19])
    batch = StoredKeys(datastore).__getitems__(rows.tolist())
    loss = trainer.compute_loss(memory, batch)
    keys, values = datastore.get_keys(torch.arange(20)).double(), datastore.get_values(torch.arange(20))
    expected = []
    for row in rows.tolist():
        distances = (keys[row] - keys).square().sum(1)
        distances[row] = math.inf
        nearest = distances.argsort()[:9]
        weights = (-distances[nearest] / 5.0).softmax(0)
        p_knn = torch.zeros(VOCAB, dtype=torch.float64).scatter_add(0, values[nearest], weights)
        log_p = memory(keys[row : row + 1].float()).double().log_softmax(-1)[0]
        is_possible = p_knn > 0
        expected.append((p_knn[is_possible] * (p_knn[is_possible].log() - log_p[is_possible])).sum().item())
    assert loss.item() == pytest.approx(np.mean(expected), abs=1e-5)
    loss.backward()
    assert next(memory.parameters()).grad.abs().sum() > 0


def test_kl_of_far_neighbours_is_finite():
    log_probs = torch.randn(1, 5).log_softmax(-1).requires_grad_()
    kl = knn_kl(log_probs, torch.tensor([[2, 3, 2]]), torch.tensor([[0.0, 1e6, math.inf]]))
    assert kl.item() == pytest.approx(-log_probs[0, 2].item())
    (gradient,) = torch.autograd.grad(kl.sum(), log_probs)
    assert gradient.tolist() == [[0.0, 0.0, -1.0, 0.0, 0.0]]


def test_a_key_without_neighbours_has_no_target():
    log_probs = torch.full((2, 5), 0.2).log().requires_grad_()
    kl = knn_kl(log_probs, torch.tensor([[2, 3], [0, 0]]), torch.tensor([[0.0, 1e6], [math.inf, math.inf]]))
    assert kl[1].item() == 0.0
    (gradient,) = torch.autograd.grad(kl.sum(), log_probs)
    assert gradient[1].tolist() == [0.0] * 5
    assert gradient.isfinite().all()


def test_a_fit_survives_a_search_that_finds_nothing(datastore, monkeypatch):
    rows = torch.arange(20)
    keys, targets = datastore.get_keys(rows), datastore.get_values(rows)
    search = KNNMemory.search

    def finds_nothing_for_the_first(memory, chunk, k, **options):
        neighbors = search(memory, chunk, k, **options)
        neighbors.distances[0] = math.inf
        return neighbors

    lm = torch.full((20,), -3.0)
    whole = fit_memory_config(datastore, keys, targets, lm, ks=(4,))
    monkeypatch.setattr(KNNMemory, "search", finds_nothing_for_the_first)
    fitted = fit_memory_config(datastore, keys, targets, lm, ks=(4,))
    assert 0.5 < fitted.memory_config.weight < 1
    assert whole.perplexity < fitted.perplexity < fitted.lm_perplexity


def test_a_run_resumes(datastore, tmp_path):
    """A checkpoint is a memory; a resumed run ends where an uninterrupted one does."""
    options = {"save_strategy": "steps", "save_steps": 5, "validation_split": 0.2}
    whole = make_memory()
    MemoryTrainer(whole, arguments(tmp_path / "whole", **options), datastore).train()
    checkpoint = tmp_path / "whole" / "checkpoint-5"
    assert MLPMemory.from_pretrained(checkpoint).vocab_size == VOCAB
    resumed = make_memory(seed=1)
    trainer = MemoryTrainer(resumed, arguments(tmp_path / "resumed", **options), datastore)
    trainer.train(resume_from_checkpoint=str(checkpoint))
    for name, weight in whole.state_dict().items():
        torch.testing.assert_close(resumed.state_dict()[name], weight)


def test_a_run_is_not_resumed_on_other_data(datastore, tmp_path, monkeypatch):
    options = {"save_strategy": "steps", "save_steps": 5, "validation_split": 0.2}
    MemoryTrainer(make_memory(), arguments(tmp_path, **options), datastore).train()
    checkpoint = tmp_path / "checkpoint-5"
    for store, changes, different in (
        (make_datastore(seed=1), {}, "datastore"),
        (make_datastore(count=48), {"seed": 7}, "datastore, seed"),
        (datastore, {"validation_split": 0.3}, "validation_split"),
        (datastore, {"kl_weight": 0.5}, "kl_weight"),
    ):
        trainer = MemoryTrainer(make_memory(), arguments(tmp_path / "new", **options | changes), store)
        with pytest.raises(ValueError, match=f"checkpoint-5 is of a run with another {different}: resume it"):
            trainer.train(resume_from_checkpoint=str(checkpoint))
    (checkpoint / TRAINING_FILE).unlink()  # of an earlier version
    warnings = []
    monkeypatch.setattr(trainer_memory.logger, "warning", warnings.append)
    trainer.train(resume_from_checkpoint=str(checkpoint))
    assert len(warnings) == 1 and "checkpoint-5 does not say which datastore" in warnings[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kl_weight": 1.5}, "kl_weight is 1.5"),
        ({"validation_split": 1.0}, "validation_split is 1.0"),
        ({"validation_split": 0.99}, "validation_split is 0.99, but the datastore has only 12 documents"),
    ],
)
def test_bad_arguments_raise(datastore, options, message):
    with pytest.raises(ValueError, match=message):
        train_mlp_memory(make_memory(), datastore, **options)


def test_a_datastore_that_does_not_fit_raises(datastore):
    with pytest.raises(ValueError, match="The memory reads keys of width 16, the datastore's have width 32"):
        train_mlp_memory(MLPMemory(16, VOCAB, intermediate_size=4), datastore)
    with pytest.raises(ValueError, match="predicts 300 tokens, the datastore's vocabulary has 400"):
        train_mlp_memory(MLPMemory(WIDTH, 300, intermediate_size=4), datastore)
    other = MLPMemory(WIDTH, VOCAB, 4, fingerprint={**FINGERPRINT, "gen": "of another"})
    with pytest.raises(ValueError, match="of another Gen than the datastore: gen differ"):
        train_mlp_memory(other, datastore)
    with pytest.raises(ValueError, match="kl_weight needs a datastore of at least 2 keys"):
        train_mlp_memory(make_memory(), make_datastore(1), kl_weight=0.5)


# ---------------------------------------------------------------------- fitting


def test_the_weight_is_the_best_of_a_fine_grid():
    generator = torch.Generator().manual_seed(0)
    lm, memory = torch.rand(2, 500, generator=generator).log()
    memory[:50] = -math.inf
    weight, log_likelihood = best_weight(lm, memory)
    grid = torch.linspace(0, 1, 2001)[:-1, None]
    means = ((1 - grid) * lm.exp() + grid * memory.exp()).log().mean(1)
    assert weight == pytest.approx(float(grid[means.argmax()]), abs=1e-3)
    assert log_likelihood == pytest.approx(float(means.max()), abs=1e-6)


def test_weights_at_the_ends():
    lm = torch.full((10,), -2.0)
    assert best_weight(lm, lm - 1.0) == (0.0, pytest.approx(-2.0))
    assert best_weight(lm, lm + 1.0) == (1.0, pytest.approx(-1.0))
    nearly_always = torch.zeros(100_000)
    nearly_always[0] = -math.inf
    assert best_weight(torch.full((100_000,), -20.0), nearly_always)[0] == 0.9999


def test_a_known_optimum_is_found():
    """Targets are drawn from a mixture of a uniform LM and the kNN distribution of known k, temperature and weight."""
    generator = torch.Generator().manual_seed(0)
    keys = torch.randn(200, 4, generator=generator)
    values = torch.randint(0, 50, (200,), generator=generator)
    memory = KNNMemory.from_tensors(
        keys,
        values,
        fingerprint=FINGERPRINT,
        vocab_size=50,
        dtype="float32",
        memory_config=MemoryConfig(grounded_weight=0.1),
    )
    queries = torch.randn(1500, 4, generator=generator)
    config = MemoryConfig(k=32, temperature=0.5, weight=0.6)
    p_knn = memory.log_probs({memory.states[0]: queries}, config).exp()
    targets = torch.multinomial(0.4 / 50 + 0.6 * p_knn, 1, generator=generator)[:, 0]
    lm = torch.full((1500,), math.log(1 / 50))
    found = fit_memory_config(memory, queries, targets, lm, ks=(2, 8, 32, 128, 9999))
    assert found.memory_config.k == 32
    assert found.memory_config.temperature == pytest.approx(0.5, rel=0.25)
    assert found.memory_config.weight == pytest.approx(0.6, abs=0.05)
    assert found.memory_config.grounded_weight == 0.1
    assert found.lm_perplexity == pytest.approx(50)
    true_loss = -(0.4 / 50 + 0.6 * p_knn.gather(1, targets[:, None])).log().mean()
    assert found.perplexity <= math.exp(float(true_loss)) + 1e-4
    assert {trial["k"] for trial in found.trials} == {2, 8, 32, 128, 200}


def test_an_mlp_memory_is_fitted_with_the_ids_that_stay_gens():
    memory = make_memory()
    with torch.no_grad():
        memory(torch.randn(1, WIDTH))
    generator = torch.Generator().manual_seed(0)
    keys = torch.randn(1500, WIDTH, generator=generator)
    kept = torch.tensor([3, 7])
    with torch.no_grad():
        p_memory = (memory(keys) / 1.5).softmax(-1)
    p_memory[:, kept] = 0.0
    p_memory = p_memory / p_memory.sum(1, keepdim=True)
    p_lm = torch.full((VOCAB,), 1 / VOCAB)
    mixture = 0.7 * p_lm + 0.3 * (1 - 2 / VOCAB) * p_memory
    mixture[:, kept] = 1 / VOCAB
    targets = torch.multinomial(mixture, 1, generator=generator)[:, 0]
    lm, lm_kept = torch.full((1500,), -math.log(VOCAB)), torch.full((1500,), math.log(2 / VOCAB))
    found = fit_memory_config(memory, keys, targets, lm, lm_kept, kept)
    true_loss = -mixture.gather(1, targets[:, None]).log().mean()
    assert found.perplexity <= math.exp(float(true_loss)) + 1e-3
    chosen = found.memory_config
    p_chosen = (memory(keys) / chosen.temperature).softmax(-1).detach()
    p_chosen[:, kept] = 0.0
    p_chosen = p_chosen / p_chosen.sum(1, keepdim=True)
    probabilities = (1 - chosen.weight) * p_lm + chosen.weight * (1 - 2 / VOCAB) * p_chosen
    probabilities[:, kept] = 1 / VOCAB
    expected = -probabilities.gather(1, targets[:, None]).log().mean()
    assert found.perplexity == pytest.approx(math.exp(float(expected)), rel=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"targets": torch.empty(0, dtype=torch.long)}, "no held-out token"),
        ({"lm_log_probs": torch.zeros(3)}, "lm_log_probs holds 3 rows, expected one for each of 5 targets"),
        ({"lm_kept": torch.zeros(5)}, "lm_kept and kept_ids go together"),
        ({"ks": (0, 4)}, "ks is"),
    ],
)
def test_bad_held_out_tokens_raise(datastore, change, message):
    options = {
        "keys": torch.zeros(5, WIDTH),
        "targets": torch.zeros(5, dtype=torch.long),
        "lm_log_probs": torch.zeros(5),
    }
    with pytest.raises(ValueError, match=message):
        fit_memory_config(datastore, **(options | change))


def test_the_speed_of_a_training_counts_the_keys_that_are_trained(datastore, tmp_path):
    options = {"per_device_train_batch_size": 4, "num_train_epochs": 1, "save_strategy": "no", "report_to": "none"}
    args = MemoryTrainingArguments(str(tmp_path), validation_split=0.5, disable_tqdm=True, **options)
    trainer = MemoryTrainer(make_memory(), args, datastore)
    metrics = trainer.train().metrics
    num_trained = metrics["train_samples_per_second"] * metrics["train_runtime"]
    assert num_trained == pytest.approx(len(datastore) - len(trainer.held_out), rel=0.05)
    assert len(trainer.held_out) >= 48


def test_a_fitted_config_is_written_into_the_folder_and_what_it_was_fitted_on_stays_with_it(datastore, tmp_path):
    config = MemoryConfig(weight=0.4, k=3, temperature=2.5)
    record = {"sha256": "of a text", "tokens": 7, "ngram_overlap": None}
    for memory in (datastore, make_memory()):
        folder = tmp_path / type(memory).__name__
        memory.save_pretrained(folder)
        times = {path.name: path.stat().st_mtime_ns for path in folder.glob("*keys*")}
        loaded = type(memory).from_pretrained(folder)
        assert loaded.fit is None
        write_memory_config(loaded, folder, config, record)
        fitted = type(memory).from_pretrained(folder)
        assert fitted.memory_config == config
        copy = tmp_path / f"copy of {type(memory).__name__}"
        fitted.save_pretrained(copy)
        if isinstance(fitted, KNNMemory):  # changes that keep the weight
            fitted.save_memory_config()
            fitted.train_approximate("HNSW8")
        for place in (folder, copy):
            assert load_memory(place, allow_faiss_files=True).fit == record
        assert {path.name: path.stat().st_mtime_ns for path in folder.glob("*keys*")} == times
