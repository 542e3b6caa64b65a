"""The token datastore: search against float64, files that are complete or absent, and the Gen that it belongs to."""

import json
import math
import os
import signal
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from modeling_cosup import CoSupForCausalLM, KNNMemory, MemoryConfig, datastore_searchable_cosup, shard_build_cosup
from modeling_cosup.datastore_build_cosup import KeyBuilder, read_texts
from modeling_cosup.datastore_files_cosup import keys_file
from modeling_cosup.fingerprints_cosup import memory_fingerprint
from modeling_cosup.folders_cosup import digest_of_config
from modeling_cosup.token_keys_cosup import document_ids, ffn_name
from support.forks import run_forked
from support.models import TEXTS, make_gen, make_model, make_tokenizer
from support.travelling import FOLDER, travelling_files

FINGERPRINT = {"gen": "g", "tokenizer": "t", "key": "model.layers.1.mlp"}
MANY = [f"{number} {'radium ' * (number % 7)}in {number * 7}" for number in range(23)] + ["", TEXTS[1] * 8, ""]
OPTIONS = {"max_length": 32, "stride": 20, "batch_size": 4, "shard_size": 40, "show_progress_bar": False}


@pytest.fixture(scope="module")
def model():
    return make_model()


@pytest.fixture(scope="module")
def saved(model, tmp_path_factory):
    """The folder of a memory of four shards or more."""
    folder = tmp_path_factory.mktemp("memory") / "memory"
    model.build_memory(MANY, folder, **OPTIONS)
    return folder


def random_memory(count=3000, size=24, dtype="float32", shards=3, seed=0, keys=None, **options):
    """Return a memory of random entries in several shards."""
    generator = torch.Generator().manual_seed(seed)
    if keys is None:
        keys = torch.randn(count, size, generator=generator)
    values = torch.randint(0, 50, (len(keys),), generator=generator)
    starts = torch.tensor([0, 5, 5]).clamp(max=len(keys))
    memory = KNNMemory.from_tensors(
        keys, values, fingerprint=FINGERPRINT, vocab_size=50, dtype=dtype, document_starts=starts, **options
    )
    (whole,) = memory._shards
    step = -(-len(keys) // shards)
    parts = []
    for start in range(0, len(keys), step):
        part = slice(start, start + step)
        starts = whole.document_starts if start == 0 else torch.zeros(1, dtype=torch.long)
        parts.append(type(whole)(whole.keys[part], whole.half_norms[part], whole.values[part], starts))
    return KNNMemory(parts, {**memory.config, "shards": [len(part) for part in parts]})


def nearest(memory, queries, k, excluded=None):
    """Return distances and rows by brute force in float64, with ties by row."""
    keys = memory.get_keys(torch.arange(len(memory))).double()
    distances = (queries.double()[:, None] - keys).square().sum(2)
    if excluded is not None:
        distances[torch.arange(len(queries)), excluded] = torch.inf
    distances, rows = distances.sort(dim=1, stable=True)
    k = min(k, len(memory) - (excluded is not None))
    return distances[:, :k], rows[:, :k]


# ------------------------------------------------------------------ search and probabilities


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("k", [1, 70, 5000])
def test_search_and_probabilities_equal_float64(dtype, k):
    memory = random_memory(dtype=dtype)
    queries = torch.cat(
        [torch.randn(9, 24, generator=torch.Generator().manual_seed(1)), memory.get_keys(torch.arange(3))]
    )
    neighbors = memory.search(queries, k)
    distances, rows = nearest(memory, queries, k)
    assert neighbors.distances.shape == neighbors.rows.shape == (12, min(k, 3000))
    torch.testing.assert_close(neighbors.distances.double(), distances, rtol=1e-6, atol=1e-5)
    found = (queries.double()[:, None] - memory.get_keys(neighbors.rows.flatten()).double().view(12, -1, 24)).square()
    torch.testing.assert_close(found.sum(2), distances, rtol=1e-6, atol=1e-5)  # so the rows are the nearest
    assert torch.equal(neighbors.values, memory.get_values(neighbors.rows))
    assert neighbors.distances[9:, 0].tolist() == [0, 0, 0]  # exactly: no digits were lost
    config = MemoryConfig(k=k, temperature=7.0)
    weights = (-distances / 7).softmax(1)
    p_mem = torch.zeros(12, 50, dtype=torch.double).scatter_add(1, memory.get_values(rows), weights)
    log_probs = memory.log_probs({memory.states[0]: queries}, config)
    assert log_probs.dtype == torch.float32
    torch.testing.assert_close(log_probs.double().exp(), p_mem, rtol=1e-5, atol=1e-7)
    targets, kept = torch.arange(12), torch.tensor([3, 49])
    target_scores, kept_scores = memory.target_log_probs(queries, targets, config, kept)
    torch.testing.assert_close(target_scores.double().exp(), p_mem[targets, targets], rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(kept_scores.double().exp(), p_mem[:, kept].sum(1), rtol=1e-5, atol=1e-7)
    assert torch.equal(memory.target_log_probs(queries, targets, config), target_scores)


@pytest.mark.parametrize("k", [1, 40, 90, 10_000])
@pytest.mark.parametrize("exclude", [False, True])
def test_ties_are_in_the_order_of_rows_in_every_block(k, exclude, monkeypatch):
    """Whole numbers: float32 is exact, and most distances tie. A block is small, so that ties cross blocks."""
    monkeypatch.setattr("modeling_cosup.datastore_search_cosup.BLOCK_ROWS", 64)
    keys = torch.randint(0, 2, (700, 3), generator=torch.Generator().manual_seed(2)).float()
    memory = random_memory(keys=keys, dtype="float16")
    queries = keys[:50]
    excluded = torch.arange(50) if exclude else None
    neighbors = memory.search(queries, k, excluded)
    distances, rows = nearest(memory, queries, k, excluded)
    assert torch.equal(neighbors.rows, rows)
    assert torch.equal(neighbors.distances.double(), distances)


def test_some_queries_tie_for_the_last_place():
    generator = torch.Generator().manual_seed(3)
    keys, queries = torch.randn(700, 24, generator=generator), torch.randn(60, 24, generator=generator)
    memory = random_memory(keys=keys)
    rows = memory.search(queries, 9).rows
    tied = [3, 11, 40]
    for i, query in enumerate(tied):
        copies = torch.arange(400 + i, 700, 30)
        keys[copies] = keys[rows[query, 8]].clone()
    memory = random_memory(keys=keys)
    neighbors = memory.search(queries, 9)
    _, rows = nearest(memory, queries, 9)
    assert torch.equal(neighbors.rows, rows)
    last_distances = memory.search(queries, 10).distances[:, -2:]
    ties = (last_distances.diff() == 0).nonzero()[:, 0].tolist()
    assert set(tied) <= set(ties)
    assert len(ties) < len(queries)


def test_one_key_and_no_query():
    memory = random_memory(count=1, shards=1)
    assert memory.search(torch.zeros(2, 24), 5).rows.tolist() == [[0], [0]]
    nothing = memory.search(torch.zeros(2, 24), 5, exclude_rows=torch.zeros(2, dtype=torch.long))
    assert nothing.rows.shape == (2, 0)
    assert memory.search(torch.zeros(0, 24), 5).rows.shape == (0, 1)
    log_probs = memory.log_probs({memory.states[0]: torch.ones(1, 24)}, MemoryConfig())
    assert log_probs.exp().sum() == 1  # however far away


def test_a_copy_on_a_device_finds_the_same():
    memory = random_memory(dtype="float16")
    queries = torch.randn(5, 24)
    expected = memory.search(queries, 20)
    copied = memory.to("cpu", "float32").search(queries, 20)
    assert torch.equal(copied.rows, expected.rows)
    assert memory._searched[0].keys.dtype == torch.float32
    assert memory.to(None)._searched is memory._shards
    copy = memory.to("cpu")._searched[0]
    assert copy.keys.data_ptr() != memory._shards[0].keys.data_ptr()
    large = random_memory(keys=torch.full((3, 4), 1e5), dtype=torch.bfloat16, shards=1)
    assert large.config["dtype"] == "bfloat16"
    with pytest.raises(ValueError, match="Keys overflow torch.float16"):
        large.to("cpu", "float16")
    with pytest.raises(ValueError, match="dtype is 'half', expected one of float32, float16, bfloat16"):
        large.to("cpu", "half")
    assert large._searched is large._shards


# ------------------------------------------------------------------ approximate search


@pytest.mark.parametrize("scale", [1, 1e4])
def test_an_infinite_perplexity_undoes_no_training(tmp_path, scale):
    memory = random_memory(memory_config=MemoryConfig(k=2, temperature=1.0, weight=1.0))
    memory.save_pretrained(tmp_path / "memory")
    memory = KNNMemory.from_pretrained(tmp_path / "memory")
    queries = scale * torch.randn(5, 24)
    neighbors = memory.search(queries, 2).values
    targets = neighbors[:, 1].clone()  # a farther neighbour, which may have a tiny probability
    if scale == 1:
        targets[0] = next(token for token in range(memory.vocab_size) if token not in neighbors[0])
    figures = memory.train_approximate("Flat", keys=queries, targets=targets)
    assert math.isinf(figures["perplexity_exact"])
    saved = KNNMemory.from_pretrained(tmp_path / "memory", allow_faiss_files=True).config["approximate"]
    assert saved["ann_recall@1"] == 1
    assert "perplexity_exact" not in saved


def test_approximate_search_says_what_it_costs_and_is_saved(tmp_path):
    memory = random_memory(memory_config=MemoryConfig(k=50, temperature=5.0, weight=0.5))
    memory.save_pretrained(tmp_path / "memory")
    memory = KNNMemory.from_pretrained(tmp_path / "memory")
    queries, before = torch.randn(40, 24), memory.fingerprint
    exact = memory.search(queries, 50)
    targets = exact.values[:, 0]
    raw = memory.train_approximate("PQ4x4", keys=queries, targets=targets, recompute_distances=False)
    figures = memory.train_approximate("PQ4x4", keys=queries, targets=targets)
    assert set(figures) == {"ann_recall@1", "ann_recall@50", "perplexity_exact", "perplexity_approximate"}
    memory_scores = exact.target_log_probs(targets, 5.0).double().exp()
    expected = (0.5 / 50 + 0.5 * memory_scores).log().mean().neg().exp()
    assert figures["perplexity_exact"] == pytest.approx(float(expected), rel=1e-5)
    # PQ's own distances are wrong, and p_mem with them
    assert abs(raw["perplexity_approximate"] / raw["perplexity_exact"] - 1) > 0.01
    found = memory.search(queries, 50)
    hits = [np.isin(*rows).mean() for rows in zip(found.rows.numpy(), exact.rows.numpy(), strict=True)]
    assert figures["ann_recall@50"] == pytest.approx(np.mean(hits))
    true_distances = (queries[:, None] - memory.get_keys(found.rows.flatten()).view(40, 50, 24)).square().sum(2)
    torch.testing.assert_close(found.distances, true_distances)
    assert (found.distances.diff(dim=1) >= 0).all()
    own = memory.search(memory.get_keys(torch.arange(9)), 5, exclude_rows=torch.arange(9))
    assert not (own.rows == torch.arange(9)[:, None]).any()
    assert memory.fingerprint != before
    loaded = KNNMemory.from_pretrained(tmp_path / "memory", allow_faiss_files=True)
    assert torch.equal(loaded.search(queries, 50).rows, found.rows)
    assert loaded.fingerprint == memory.fingerprint
    assert KNNMemory.from_pretrained(tmp_path / "memory", search="exact").fingerprint == before
    with pytest.raises(ValueError, match="pass allow_faiss_files=True if you trust it, or search='exact'"):
        KNNMemory.from_pretrained(tmp_path / "memory")
    # one list of four is searched: it has fewer entries than k
    memory.train_approximate("IVF4,Flat", nprobe=1)
    states, config = {memory.states[0]: queries}, MemoryConfig(k=3000)
    missing = (memory.search(queries, 3000).rows < 0).sum(1)
    assert (missing > 0).all()
    for entries, count in zip(memory.nearest(states, 3000, config), missing.tolist(), strict=True):
        assert len(entries.rows) == len(entries.documents) == len(entries.weights) == 3000 - count
        assert min(entries.rows) >= 0
        assert np.isfinite(entries.distances).all()
    exact_again = KNNMemory.from_pretrained(tmp_path / "memory", search="exact")
    assert torch.equal(exact_again.search(queries, 50).rows, exact.rows)


@pytest.mark.parametrize(
    ("factory", "options", "message"),
    [
        ("PQ7", {}, r"'PQ7' of 24 dimensions .* should be a multiple of the number of subquantizers"),
        ("IVF200,Flat", {"train_size": 100}, "200 lists need at least as many training embeddings"),
        ("PQ4", {"train_size": 100}, r"Number of training points \(100\) should be at least as large"),
        ("nonsense", {}, "could not parse index string nonsense"),
        ("Flat", {"nprobe": 3}, "has no search option 'nprobe'"),
        ("Flat", {"keys": torch.zeros(1, 24)}, "keys and targets go together"),
        ("Flat", {"lm_log_probs": torch.zeros(1)}, "lm_log_probs belong to keys and targets"),
        ("Flat", {"keys": torch.zeros(0, 24), "targets": torch.zeros(0).long()}, "keys are empty"),
        ("Flat", {"keys": torch.zeros(1, 9), "targets": torch.zeros(1).long()}, r"the memory has keys of 24"),
        ("Flat", {"keys": torch.zeros(2, 24), "targets": torch.zeros(1).long()}, r"targets are \(1,\)"),
    ],
)
def test_a_factory_or_comparison_that_does_not_fit_changes_nothing(factory, options, message, monkeypatch):
    memory = random_memory(count=300)
    if "keys" in options:  # refused before anything is trained
        monkeypatch.setattr(datastore_searchable_cosup, "make_approximate", None)
    with pytest.raises(ValueError, match=message):
        memory.train_approximate(factory, **options)
    assert memory._approximate is None
    assert memory.config["approximate"] is None


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_an_approximate_search_of_a_shard_without_entries(dtype):
    memory = random_memory(count=60, shards=1, dtype=dtype)
    (whole,) = memory._shards
    empty = type(whole)(whole.keys[:0], whole.half_norms[:0], whole.values[:0], torch.zeros(1, dtype=torch.long))
    memory = KNNMemory([whole, empty], {**memory.config, "shards": [60, 0]})
    expected = memory.search(torch.ones(2, 24), 5)
    assert memory.train_approximate("Flat")["ann_recall@1"] == 1
    assert torch.equal(memory.search(torch.ones(2, 24), 5).rows, expected.rows)


def test_searches_are_compared_only_where_there_is_something_to_find():
    memory = random_memory(count=1, shards=1)
    with pytest.raises(ValueError, match="This memory is searched exactly"):
        memory.compare_approximate()
    with pytest.raises(ValueError, match="This memory has one entry"):
        memory.train_approximate("Flat")
    figures = memory.train_approximate("Flat", keys=torch.zeros(1, 24), targets=memory.get_values(torch.tensor([0])))
    assert figures["ann_recall@1"] == 1


# ------------------------------------------------------------------ building and files


def test_a_build_stores_every_token_but_the_first(model, saved):
    memory = model.load_memory(saved)
    documents = [document_ids(text, model.tokenizer) for text in MANY]
    values = [id for ids in documents for id in ids[1:]]
    assert memory.get_values(torch.arange(len(memory))).tolist() == values
    starts = np.cumsum([0] + [len(ids) - 1 for ids in documents])[:-1]
    assert memory.document_starts.tolist() == starts.tolist()
    assert len(memory.config["shards"]) > 3
    assert (memory.vocab_size, memory.key_size, memory.states) == (400, 32, (ffn_name(model),))
    row = len(memory) // 2
    document = int(memory.documents_of(torch.tensor([row])))
    assert starts[document] <= row < [*starts, len(memory)][document + 1]
    # N·(2d + 8) bytes, 8 for each document, and the headers
    size = sum(facts["size"] for facts in memory.config["files"].values())
    least = len(memory) * (2 * 32 + 8) + 8 * len(MANY)
    assert least <= size < least + 400 * len(memory.config["shards"])


def test_only_the_body_of_gen_runs(model):
    handle = model.get_output_embeddings().register_forward_hook(lambda *args: pytest.fail("the LM head ran"))
    encoder = model.emb_seq.register_forward_hook(lambda *args: pytest.fail("Emb_seq ran"))
    memory = model.build_memory(iter(MANY[:3]), **OPTIONS)
    handle.remove()
    encoder.remove()
    assert len(memory) == sum(len(document_ids(text, model.tokenizer)) - 1 for text in MANY[:3])


def test_texts_come_from_files_datasets_and_plain_models(model, tmp_path):
    import datasets

    rows = [{"id": f"p{number}", "title": "T", "text": text} for number, text in enumerate(TEXTS)]
    (tmp_path / "text.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    dataset = datasets.Dataset.from_list([{"text": text} for text in TEXTS])
    dataset.to_parquet(tmp_path / "text.parquet")
    expected = model.build_memory(TEXTS, **OPTIONS)
    sources = (tmp_path / "text.jsonl", str(tmp_path / "text.parquet"), dataset, dataset.to_iterable_dataset())
    for source in sources:
        assert model.build_memory(source, **OPTIONS).fingerprint == expected.fingerprint
    plain = KNNMemory.build(model.gen, TEXTS, tokenizer=model.tokenizer, **OPTIONS)
    assert plain.fingerprint == expected.fingerprint
    plain.check_model(model)
    expected.check_model(model.gen)
    with pytest.raises(ValueError, match="pass its own as tokenizer="):
        KNNMemory.build(model.gen, TEXTS)


def test_a_failed_build_resumes_to_the_same_checksum(model, saved, tmp_path, monkeypatch):
    make, made = KeyBuilder.make, []

    def make_or_fail(self, texts, *args):
        if len(made) == 2:
            raise OSError(28, "No space left on device")
        made.append(texts)
        return make(self, texts, *args)

    monkeypatch.setattr(KeyBuilder, "make", make_or_fail)
    with pytest.raises(OSError, match="no room for the next shard .* 72 bytes for each token"):
        model.build_memory(MANY, tmp_path / "memory", **OPTIONS)
    assert not (tmp_path / "memory").exists()
    other = {**OPTIONS, "max_length": 16, "stride": 8}
    with pytest.raises(ValueError, match="max_length: then 32, now 16"):
        model.build_memory(MANY, tmp_path / "memory", **other)
    made.clear()
    made.extend([None] * 3)  # it fails no more
    resumed = model.build_memory(MANY, tmp_path / "memory", **OPTIONS)
    assert len(made) == 3 + len(resumed.config["shards"]) - 2
    assert resumed.config == KNNMemory.from_pretrained(saved).config  # all checksums among them
    assert os.listdir(tmp_path) == ["memory"]


KILLED_BUILD = """
import os, signal, sys
sys.path.insert(0, sys.argv[2])
from index.test_datastore import MANY, OPTIONS
from modeling_cosup.datastore_build_cosup import KeyBuilder
from support.models import make_model

store = KeyBuilder.make
def make(self, texts, bar, paths):
    shard = store(self, texts, bar, paths)
    if "00002" in paths[0].name:
        os.kill(os.getpid(), signal.SIGKILL)
    return shard
KeyBuilder.make = make
make_model().build_memory(MANY, sys.argv[1], **OPTIONS)
"""


def test_a_killed_build_resumes_to_the_same_checksum(model, saved, tmp_path):
    result = run_forked("-c", KILLED_BUILD, tmp_path / "memory", Path(__file__).parents[1])
    assert result.returncode == -signal.SIGKILL, result.stderr[-2000:]
    unfinished = shard_build_cosup.unfinished_folder(tmp_path / "memory")
    times = {path: path.stat().st_mtime_ns for path in unfinished.glob("shard-*.json")}
    assert len(times) == 2
    resumed = model.build_memory(MANY, tmp_path / "memory", **OPTIONS)
    assert resumed.config == KNNMemory.from_pretrained(saved).config


def test_processes_build_the_same_memory_together(model, saved, tmp_path):
    for rank in (1, 0):
        built = model.build_memory(MANY, tmp_path / "memory", num_processes=2, process_index=rank, **OPTIONS)
        assert built is None
        if rank == 1:
            with pytest.raises(FileNotFoundError, match="is not complete"):
                KNNMemory.merge(tmp_path / "memory")
    merged = KNNMemory.merge(tmp_path / "memory")
    assert merged.config == KNNMemory.from_pretrained(saved).config


def test_save_load_and_fit(model, saved, tmp_path):
    memory = model.build_memory(MANY, **OPTIONS)
    memory.memory_config = MemoryConfig(weight=0.4, k=3, temperature=2.0)
    memory.save_pretrained(tmp_path / "memory")
    loaded = model.load_memory(tmp_path / "memory", verify=True)
    assert loaded.memory_config == memory.memory_config
    assert loaded.fingerprint == memory.fingerprint == model.load_memory(saved).fingerprint
    queries = torch.randn(3, 32)
    assert torch.equal(loaded.search(queries, 5).distances, memory.search(queries, 5).distances)
    config = json.loads((tmp_path / "memory" / "memory_config.json").read_text())
    edited = {**config, "memory_config": MemoryConfig(weight=0.1).to_dict()}
    (tmp_path / "memory" / "memory_config.json").write_text(json.dumps(edited))
    assert model.load_memory(tmp_path / "memory").memory_config.weight == 0.1
    loaded = model.load_memory(tmp_path / "memory")
    loaded.save_pretrained(tmp_path / "copy")
    assert KNNMemory.from_pretrained(tmp_path / "copy", verify=True).fingerprint == memory.fingerprint


@pytest.mark.parametrize("damage", ["truncated", "altered", "missing", "values", "config"])
def test_a_damaged_file_is_named(model, saved, tmp_path, damage):
    folder = tmp_path / "memory"
    KNNMemory.from_pretrained(saved).save_pretrained(folder)
    path = folder / keys_file(1)
    data = path.read_bytes()
    if damage == "truncated":
        path.write_bytes(data[:-8])
    elif damage == "altered":
        path.write_bytes(data[:-8] + b"12345678")
    elif damage == "missing":
        path.unlink()
    elif damage == "values":
        config = json.loads((folder / "memory_config.json").read_text())
        config["vocab_size"] = 3
        config["sha256"] = digest_of_config(config)
        (folder / "memory_config.json").write_text(json.dumps(config))
    else:
        path = folder / "memory_config.json"
        path.write_text(path.read_text().replace('"key_size": 32', '"key_size": 33'))
    message = "values hold" if damage == "values" else path.name
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        KNNMemory.from_pretrained(folder, verify=True)


def test_loading_maps_whatever_the_size(tmp_path):
    """A sparse gigabyte: nothing but its config and header is read."""
    random_memory(shards=1, dtype="float16").save_pretrained(tmp_path / "memory")
    count, size = 2**22, 120
    header, end = {}, 0
    shapes = {"document_starts": ([1], "I64", 8), "half_norms": ([count], "F32", 4), "values": ([count], "I32", 4)}
    for name, (shape, dtype, width) in {**shapes, "keys": ([count, size], "F16", 2)}.items():
        start, end = end, end + int(np.prod(shape)) * width
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path = tmp_path / "memory" / keys_file(0)
    path.write_bytes(len(text).to_bytes(8, "little") + text)
    os.truncate(path, 8 + len(text) + end)
    config_file = tmp_path / "memory" / "memory_config.json"
    config = json.loads(config_file.read_text())
    config.update(shards=[count], key_size=size)
    config["files"][path.name]["size"] = path.stat().st_size
    config["sha256"] = digest_of_config(config)
    config_file.write_text(json.dumps(config))
    before = resident()
    memory = KNNMemory.from_pretrained(tmp_path / "memory")
    assert len(memory) == count
    assert memory.fingerprint
    assert resident() - before < 50e6


def resident():
    """Return the resident memory of this process in bytes."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_bad_input_is_refused(model, tmp_path):
    keys, values = torch.randn(4, 8), torch.tensor([1, 2, 3, 4])

    def tensors(keys=keys, values=values, vocab_size=9, **options):
        return KNNMemory.from_tensors(keys, values, fingerprint=FINGERPRINT, vocab_size=vocab_size, **options)

    for options, message in (
        ({"vocab_size": 4}, r"values hold \[4\], which are no token ids: the vocabulary has 4"),
        ({"values": values.float()}, "values are of torch.float32"),
        ({"values": values[:3]}, r"expected \(N, d\) and \(N,\)"),
        ({"keys": keys[:0], "values": values[:0]}, "a memory needs at least one entry"),
        ({"keys": keys * 1e6}, "Keys overflow torch.float16: .* Store them as dtype='bfloat16'"),
        ({"keys": keys / 0}, "Keys are NaN or infinite"),
        ({"dtype": "int8"}, "dtype is 'int8', expected one of float32, float16, bfloat16"),
        ({"document_starts": torch.tensor([1])}, "expected ascending rows from 0 to 4"),
    ):
        with pytest.raises(ValueError, match=message):
            tensors(**options)
    assert len(tensors(keys=keys * 1e6, dtype="bfloat16")) == 4
    for options, message in (
        ({"keys": torch.zeros(2, 7), "k": 1}, r"keys are \(2, 7\), the memory has keys of 8"),
        ({"keys": torch.full((2, 8), torch.nan), "k": 1}, r"The keys of rows \[0, 1\] are not finite"),
        ({"keys": torch.zeros(2, 8), "k": 0}, "k is 0, expected at least 1"),
    ):
        with pytest.raises(ValueError, match=message):
            tensors().search(**options)
    for texts, options, message in (
        ([3], {}, "Text 0: found 3, expected a text"),
        ([{"txt": "x"}], {}, "Text 0: unknown key txt; did you mean 'text'"),
        (["", ""], {}, "a memory needs at least one entry"),
        (["x"], {"max_length": 1000}, "max_length is 1000, the model reads at most 512 tokens"),
        (["x"], {"dtype": "half"}, "dtype is 'half'"),
        (["x"], {"shard_size": 0}, "shard_size is 0"),
        (["x"], {"num_processes": 2}, "give save_directory"),
    ):
        with pytest.raises(ValueError, match=message):
            model.build_memory(texts, show_progress_bar=False, **options)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").touch()
    with pytest.raises(FileExistsError, match="is not empty and is not a kNN memory"):
        model.build_memory(["some text"], tmp_path / "other", **OPTIONS)


# ------------------------------------------------------------------ the model that it belongs to


def test_another_gen_tokenizer_or_key_is_refused(model, saved):
    memory = model.load_memory(saved)
    fingerprint = model.memory_fingerprint()
    assert memory_fingerprint(model.gen, model.tokenizer) == fingerprint
    with torch.no_grad():
        head = make_model(gen_kwargs={"tie_word_embeddings": False})
        before = head.memory_fingerprint()
        head.get_output_embeddings().weight.add_(1)
        assert head.memory_fingerprint() == before  # the LM head does not matter
        head.gen.model.layers[0].mlp.down_proj.weight.add_(1)
    assert head.memory_fingerprint()["gen"] != before["gen"]
    with pytest.raises(ValueError, match="another model; make it again with this one.\n  weights of Gen's body"):
        memory.check_model(make_model(gen_kwargs={"seed": 5}))
    memory.config["fingerprint"] = {**fingerprint, "tokenizer": "x" * 64, "key": "model.layers.0.mlp"}
    with pytest.raises(ValueError, match=r"tokenizer: .*\n  key: the memory has model.layers.0.mlp, the model"):
        memory.check_model(model)
    assert make_model(emb_seq_kwargs={"seed": 9}).memory_fingerprint() == fingerprint  # nor does Emb_seq


def test_a_cast_or_a_quantised_load_keeps_the_fingerprint_of_the_last_save(tmp_path):
    model = make_model()
    fingerprint = model.memory_fingerprint()
    model.save_pretrained(tmp_path)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        loaded = CoSupForCausalLM.from_pretrained(tmp_path, dtype=dtype, load_emb_seq=False)
        assert loaded.memory_fingerprint() == fingerprint
        loaded.fingerprint()  # an index's hashes stay apart
        assert "gen" not in loaded.fingerprint()
    loaded.train()
    loaded(input_ids=torch.ones(1, 3, dtype=torch.long), labels=torch.ones(1, 3, dtype=torch.long))
    assert loaded.config.fingerprint["gen"] is None  # it may be in training


# ------------------------------------------------------------------ what a prediction leans on


def test_neighbors_name_the_stored_text(model, saved):
    memory = model.load_memory(saved)
    memory.memory_config = MemoryConfig(k=4, temperature=20.0)
    text = TEXTS[1] * 2
    ((first, *rest),) = memory.neighbors(text, 3, model=model)
    ids = document_ids(text, model.tokenizer)
    stored = document_ids(TEXTS[1] * 8, model.tokenizer)
    assert (first.document, first.value) == (MANY.index(TEXTS[1] * 8), stored[first.position])
    assert stored[: first.position] == ids
    assert first.distance < 1e-4
    assert first.row == int(memory.document_starts[first.document]) + first.position - 1
    assert text.endswith(first.text)
    assert first.token == model.tokenizer.decode([first.value])
    assert len(rest) == 2
    assert first.weight > rest[0].weight >= rest[1].weight
    without_text = memory.neighbors(memory.get_keys(torch.tensor([first.row])), 1)
    assert without_text[0][0].row == first.row
    assert without_text[0][0].text is None
    with pytest.raises(ValueError, match="pass model= and tokenizer="):
        memory.neighbors(text)


def test_the_datastore_travels_with_a_checkpoint():
    names = {path.name for path in travelling_files()}
    assert {path.name for path in FOLDER.glob("datastore*.py")} - names == {"datastore_build_cosup.py"}


def test_another_architecture_is_refused(model):
    with pytest.raises(ValueError, match="The key of a mamba model is not known"):
        KNNMemory.build(make_gen("mamba"), ["x"], tokenizer=model.tokenizer)


@pytest.mark.parametrize("extra", ["idx", "ids", "titles"])
def test_texts_in_parquet_may_have_other_columns(model, tmp_path, extra):
    rows = [{extra: 1, "text": text} for text in TEXTS[:2]]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "texts.parquet")
    assert list(read_texts(tmp_path / "texts.parquet")) == TEXTS[:2]


def test_a_tokenizer_that_reads_text_differently_is_refused(model):
    with pytest.raises(ValueError, match="tokenizer reads text differently than the model's own"):
        KNNMemory.build(model, TEXTS, tokenizer=make_tokenizer(vocab_size=300), show_progress_bar=False)


def test_a_build_is_not_resumed_in_another_dtype(tmp_path, monkeypatch):
    model = make_model()
    options = {"max_length": 16, "stride": 8, "shard_size": 2, "show_progress_bar": False}
    monkeypatch.setattr(KNNMemory, "merge", lambda *args: None)  # the build stays unfinished
    KNNMemory.build(model, TEXTS, tmp_path / "memory", **options)
    with pytest.raises(ValueError, match="gen_dtype: then 'torch.float32', now 'torch.bfloat16'"):
        KNNMemory.build(model.bfloat16(), TEXTS, tmp_path / "memory", **options)
