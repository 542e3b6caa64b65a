"""Building an index: from any source, in flat memory, killed and resumed, in several processes, on a full disk."""

import gzip
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import torch
from safetensors.torch import load_file

from modeling_cosup import PassageIndex, index_build_cosup, passages_cosup
from modeling_cosup.tokenization_cosup import encode_passages_for_emb_seq
from support.forks import run_forked
from support.models import PASSAGES, make_model
from support.tokenizer_kinds import xlm_roberta
from support.training import Endless

SCRIPT = Path(__file__).parents[1] / "distributed" / "run_and_kill_build.py"
MANY = [
    {"id": f"m{i}", "title": f"Title {i}" if i % 3 else "", "text": f"{i} {'radium ' * (i % 7)}in {i * 7}"}
    for i in range(23)
]


def build(model, passages=MANY, **kwargs):
    return PassageIndex.build(passages, model, show_progress_bar=False, **kwargs)


def content(folder):
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def assert_same_index(folder, expected):
    """The same files. Embeddings, and so checksums, may differ: another process may add in another order."""
    files, expected_files = content(folder), content(expected)
    assert files.keys() == expected_files.keys()
    for name in sorted(files):
        if name.startswith("embeddings-"):
            embeddings, expected_embeddings = load_file(folder / name), load_file(expected / name)
            torch.testing.assert_close(embeddings, expected_embeddings, rtol=1e-5, atol=1e-6)
        elif name == "index_config.json":
            assert without_checksums(files[name]) == without_checksums(expected_files[name])
        else:
            assert files[name] == expected_files[name], name


def without_checksums(data):
    return re.sub(rb"[0-9a-f]{64}", b"", data)


# ------------------------------------------------------------------ special tokens in a corpus


def test_special_tokens_of_a_unigram_vocabulary_stay_text():
    """The emb_seq tokenizer holds "</s>" as a word, Gen's does not."""
    tokenizer = xlm_roberta()
    model = make_model(emb_seq_tokenizer=tokenizer)
    passages = [{"id": "p0", "title": "", "text": "an <s>old</s> price"}]
    index = build(model, passages)
    ids = tokenizer.convert_tokens_to_ids(["<s>", "▁", *"an", "▁", *"<s>old</s>", "▁", *"price", "</s>"])
    expected = model.encode_passages(torch.tensor([ids])).detach()
    torch.testing.assert_close(torch.as_tensor(index.embeddings[0]), expected[0], rtol=1e-5, atol=1e-6)
    assert model.tokenizer.decode(index[0]["input_ids"]) == "an <s>old</s> price"


@pytest.mark.parametrize("streamed", [False, True])
def test_a_special_token_that_cannot_be_text_is_named_before_anything_is_embedded(tmp_path, streamed):
    tokenizer = xlm_roberta()
    tokenizer.eos_token = "~"
    model = make_model(emb_seq_tokenizer=tokenizer)
    model.emb_seq.register_forward_pre_hook(lambda *args: pytest.fail("a passage is embedded"))
    passages = [*MANY, {"id": "wave", "title": "Sea", "text": "a ~ wave"}]
    path = tmp_path / "corpus.jsonl"
    path.write_text("".join(json.dumps(passage) + "\n" for passage in passages))
    place = re.escape(f"Corpus row {len(MANY)}" if streamed else f"{path}, line {len(passages)}")
    message = rf"{place}: Passage 'wave' \('Sea :: a ~ wave'\) holds the special tokens \['~'\], which XLMRoberta"
    with pytest.raises(ValueError, match=message):
        build(model, iter(passages) if streamed else path)


# ------------------------------------------------------------------ sources


def sources(folder):
    """Return the same passages in every form that `build` reads."""
    (folder / "corpus.jsonl").write_text("\n".join(json.dumps(passage) for passage in MANY) + "\n\n")
    with gzip.open(folder / "corpus.jsonl.gz", "wt") as file:
        file.writelines(json.dumps(passage) + "\n" for passage in MANY)
    table = pa.Table.from_pylist([{**passage, "more": 1.5} for passage in MANY])
    pyarrow.parquet.write_table(table, folder / "corpus.parquet", row_group_size=5)
    dataset = datasets.Dataset.from_list(MANY)
    return {
        "jsonl": folder / "corpus.jsonl",
        "jsonl.gz": str(folder / "corpus.jsonl.gz"),
        "parquet": folder / "corpus.parquet",
        "dataset": dataset,
        "streamed dataset": dataset.to_iterable_dataset(),
        "generator": (passage for passage in MANY),
        "list": MANY,
        "map-style dataset": Endless(MANY),
    }


def test_every_source_makes_the_same_index(model, tmp_path):
    expected = build(model)
    for name, source in sources(tmp_path).items():
        index = build(model, source, save_directory=tmp_path / "index", shard_size=7)
        assert len(index) == len(MANY), name
        assert list(index) == list(expected), name
        torch.testing.assert_close(index.embeddings, expected.embeddings, rtol=0, atol=1e-5)
        assert list(build(model, [*MANY])) == list(expected)
    assert [len(shard) for shard in index._shards] == [7, 7, 7, 2]
    files = sorted(path.name for path in tmp_path.iterdir())
    assert files == ["corpus.jsonl", "corpus.jsonl.gz", "corpus.parquet", "index"]


BAD = [
    ({"id": "m0", "title": "", "text": "again"}, "id 'm0' is already"),
    ({"id": "m22", "title": "", "text": "again"}, "id 'm22' is already"),
    ({"id": "x", "text": ""}, "text is empty"),
    ({"id": "x", "text": "\ud800"}, "text holds '\\ud800', which is not a character"),
    ({"id": 5.0, "text": "x"}, "id is 5.0, expected a string"),
    ({"_id": "x", "text": "x"}, "unknown key _id; did you mean 'id'?"),
    ("x", "expected a passage"),
]


@pytest.mark.parametrize(("row", "message"), BAD)
@pytest.mark.parametrize("form", ["list", "generator"])
@pytest.mark.parametrize("folder", [False, True])
def test_a_bad_row_is_named_and_leaves_no_index(model, tmp_path, monkeypatch, form, folder, row, message):
    embedded = []

    def store(self, passages, rows, *args):
        embedded.extend(rows)

    monkeypatch.setattr(index_build_cosup.ShardBuilder, "_store", store)
    passages = [*MANY, row]
    if form == "generator":
        passages = iter(passages)
    save_directory = tmp_path / "index" if folder else None
    with pytest.raises(ValueError) as error:
        build(model, passages, save_directory=save_directory, shard_size=7)
    assert str(error.value).startswith("Corpus row 23")
    assert message in str(error.value)
    assert not (tmp_path / "index").exists()
    # a corpus that can be read twice is checked before the first shard
    assert len(embedded) == {"list": 0, "generator": 21}[form]


@pytest.mark.parametrize("form", [list, iter])
def test_an_empty_corpus_raises(model, tmp_path, form):
    with pytest.raises(ValueError, match="holds no passage"):
        build(model, form([]), save_directory=tmp_path / "index")
    assert not (tmp_path / "index").exists()


def test_bad_files(model, tmp_path):
    (tmp_path / "a.jsonl").write_text('{"id": "a", "text": "b"}\n{"id": "b"\n')
    with pytest.raises(ValueError, match=r"a.jsonl, line 2: malformed JSON"):
        build(model, tmp_path / "a.jsonl")
    (tmp_path / "a.parquet").write_bytes(b"PAR0" * 9)
    with pytest.raises(ValueError, match="a.parquet is not a Parquet file"):
        build(model, tmp_path / "a.parquet")
    for text in ("A text.", 99 * "A long text. "):
        with pytest.raises(FileNotFoundError, match="^A.* is not a file. A passage is an object with id, title and"):
            PassageIndex.build([text], model)
    with pytest.raises(FileNotFoundError, match="nothing.jsonl"):
        build(model, tmp_path / "nothing.jsonl")
    pyarrow.parquet.write_table(pa.table({"id": ["a", None], "text": ["b", "c"]}), tmp_path / "b.parquet")
    with pytest.raises(ValueError, match="b.parquet, row 1: id is None"):
        build(model, tmp_path / "b.parquet")
    pyarrow.parquet.write_table(pa.table({"id": ["a"], "titel": ["t"], "text": ["b"]}), tmp_path / "c.parquet")
    with pytest.raises(ValueError, match="c.parquet: unknown key titel; did you mean 'title'?"):
        build(model, tmp_path / "c.parquet")


@pytest.mark.parametrize("prompt", ["", "passage: "])
def test_passages_that_were_cut_are_counted(tmp_path, monkeypatch, prompt):
    """A passage counts once, whether Gen, Emb_seq, which reads a prompt too, or both do not read its end."""
    warnings = []
    monkeypatch.setattr(index_build_cosup.logger, "warning", warnings.append)
    model = make_model(max_passage_length=10, passage_prompt=prompt)
    passages = [{"id": str(n), "text": "radium " * n} for n in range(1, 15)]
    num_tokens = [len(model.tokenizer(prompt + passage["text"])["input_ids"]) for passage in passages]
    num_whole = sum(length <= 10 for length in num_tokens)
    assert 0 < num_whole < 14
    message = f"Cut {14 - num_whole} passages of the corpus to max_passage_length=10 tokens."
    build(model, passages)
    build(model, passages, save_directory=tmp_path / "index", shard_size=3)
    assert warnings == [message, message]
    index = build(model, passages[:num_whole])
    assert len(warnings) == 2
    index.add(passages[num_whole:], model, show_progress_bar=False)
    assert warnings[2:] == [message]


def test_ids_with_the_same_hash_are_told_apart(model, tmp_path, monkeypatch):
    """If all hashes collide, the ids themselves decide."""
    monkeypatch.setattr(passages_cosup, "hash_id", lambda id: 7)
    index = build(model, save_directory=tmp_path / "index", shard_size=7)
    assert index.rows_of(["m22", "m0", "m9"]).tolist() == [22, 0, 9]
    with pytest.raises(ValueError, match=r"does not hold 1 of 2 ids: \['x'\]"):
        index.rows_of(["m3", "x"])
    with pytest.raises(ValueError, match="id 'm3' is already in"):
        build(model, [*MANY, MANY[3]])


def test_the_id_table_is_the_same_for_any_partitions(model, monkeypatch):
    from modeling_cosup import index_files_cosup

    index = build(model, shard_size=7)
    expected = index_files_cosup.make_id_table(index._shards)
    monkeypatch.setattr(index_files_cosup, "PARTITION", 2)
    hashes, rows = index_files_cosup.make_id_table(index._shards)
    assert (np.diff(hashes) >= 0).all()
    np.testing.assert_array_equal(hashes, expected[0])
    np.testing.assert_array_equal(rows, expected[1])
    assert sorted(rows) == list(range(len(MANY)))


# ------------------------------------------------------------------ embedding


def test_batches_respect_both_bounds_and_change_nothing(model, monkeypatch):
    expected = build(model).embeddings
    encode = model.encode_passages
    shapes = []

    def note(ids, mask):
        shapes.append(tuple(ids.shape))
        return encode(ids, mask)

    monkeypatch.setattr(model, "encode_passages", note)
    index = build(model, max_tokens_per_batch=60, batch_size=3)
    sizes = [size for size, _ in shapes]
    widths = [width for _, width in shapes]
    assert max(sizes) == 3
    assert len(shapes) > 8
    assert sum(sizes) == len(MANY)
    assert all(size * width <= 60 or size == 1 for size, width in shapes)
    assert widths == sorted(widths, reverse=True)

    token_ids = encode_passages_for_emb_seq(model.tokenizer, MANY, model.config)
    lengths = sorted(map(len, token_ids), reverse=True)
    for end, width in zip(np.cumsum(sizes), widths, strict=True):
        assert lengths[end - 1] >= 0.75 * width  # little padding

    torch.testing.assert_close(index.embeddings, expected, rtol=0, atol=1e-5)
    alone = torch.stack([encode(torch.tensor([ids]))[0] for ids in token_ids])
    torch.testing.assert_close(index.embeddings, alone, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "value"),
    [("batch_size", 0), ("batch_size", -1), ("max_tokens_per_batch", 0), ("shard_size", 0), ("shard_size", 2.5)],
)
def test_a_bound_below_1_is_refused(model, name, value):
    with pytest.raises(ValueError, match=f"{name} is {value}, expected an integer of 1 or more"):
        build(model, **{name: value})


def test_a_passage_without_tokens(tmp_path):
    from tokenizers import normalizers

    model = make_model(emb_seq="bert", emb_seq_pooling="mean")
    model.tokenizer.bos_token = model.tokenizer.eos_token = None
    backend = model.tokenizer.backend_tokenizer
    assert backend.normalizer is None
    backend.normalizer = normalizers.Replace("zzz", "")
    index = build(model, [{"id": "a", "text": "zzz"}, {"id": "b", "text": "word"}], save_directory=tmp_path / "index")
    assert index[0]["input_ids"] == []
    assert index[1]["input_ids"]
    assert index.embeddings.isfinite().all()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_storage(model, tmp_path, dtype):
    exact = build(model, shard_size=9)
    half = build(model, save_directory=tmp_path / "half", dtype=dtype, shard_size=9)
    stored = half._shards[0].embeddings
    assert str(stored.dtype) == f"torch.{dtype}"
    assert (tmp_path / "half" / "embeddings-00000.safetensors").stat().st_size < 9 * 32 * 2 + 200
    assert torch.equal(half.embeddings, exact.embeddings.to(stored.dtype).float())
    queries = torch.randn(4, 32, generator=torch.Generator().manual_seed(0))
    expected = (queries @ half.embeddings.T).topk(5)
    scores, rows = half.search(queries, 5)
    assert rows.tolist() == expected.indices.tolist()
    torch.testing.assert_close(torch.from_numpy(scores), expected.values)
    assert build(model, dtype=stored.dtype).config["dtype"] == dtype
    with pytest.raises(ValueError, match="dtype is 'int8', expected one of float32, float16, bfloat16"):
        build(model, dtype="int8")


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        ([], r"gave 23 of 23 passages no embedding, or more than one: \['m0', 'm1'"),
        ([(range(22), (22, 32))], r"gave 1 of 23 passages no embedding, or more than one: \['m22'\]"),
        ([(range(23), (23, 32)), ([4], (1, 32))], r"gave 1 of 23 passages no embedding, or more than one: \['m4'\]"),
        ([(range(23), (1, 32))], r"embeddings of shape \(1, 32\), expected \(23, 32\)"),
        ([(range(23), (23, 16))], r"embeddings of shape \(23, 16\), expected \(23, 32\)"),
        ([([22, 23], (2, 32))], r"gave the rows \[23\], expected 0 to 22"),
    ],
)
def test_an_encoder_that_does_not_embed_every_passage_once_is_an_error(model, tmp_path, batches, message):
    def encode(token_ids):
        for rows, shape in batches:
            yield np.array(rows), torch.ones(shape)

    for folder in (None, tmp_path / "index"):
        with pytest.raises(ValueError, match=message):
            build(model, encoder=encode, save_directory=folder)
    assert not (tmp_path / "index").exists()


def test_an_embedding_that_is_not_finite_names_its_passage(model, tmp_path, monkeypatch):
    encode = model.encode_passages
    (bad_ids,) = encode_passages_for_emb_seq(model.tokenizer, MANY[11:12], model.config)

    def poisoned(ids, mask):
        embeds = encode(ids, mask)
        for row in range(len(ids)):
            if ids[row][mask[row].bool()].tolist() == bad_ids:
                embeds[row] = float("nan")
        return embeds

    monkeypatch.setattr(model, "encode_passages", poisoned)
    for folder in (None, tmp_path / "index"):
        with pytest.raises(ValueError, match=r"1 passages are not finite in torch.float32: \['m11'\]"):
            build(model, save_directory=folder)
    assert not (tmp_path / "index").exists()
    monkeypatch.undo()
    assert len(build(model, save_directory=tmp_path / "index")) == len(MANY)


# ------------------------------------------------------------------ resuming


def count_encoded(monkeypatch, model):
    """Return a list that grows by the number of passages of each forward."""
    counts = []
    encode = model.encode_passages

    def counted(ids, mask):
        counts.append(len(ids))
        return encode(ids, mask)

    monkeypatch.setattr(model, "encode_passages", counted)
    return counts


def stop_after(monkeypatch, num_shards):
    """Interrupt a build after a number of shards."""
    make = index_build_cosup.ShardBuilder.make
    calls = []

    def make_or_stop(self, *args):
        calls.append(1)
        if len(calls) > num_shards:
            raise KeyboardInterrupt
        return make(self, *args)

    monkeypatch.setattr(index_build_cosup.ShardBuilder, "make", make_or_stop)


def test_a_build_goes_on_after_its_complete_shards(model, tmp_path, monkeypatch):
    build(model, save_directory=tmp_path / "whole", shard_size=5)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stop_after(patch, 3)
        build(model, save_directory=tmp_path / "index", shard_size=5)
    assert not (tmp_path / "index").exists()
    counts = count_encoded(monkeypatch, model)
    build(model, save_directory=tmp_path / "index", shard_size=5)
    assert sum(counts) == 8  # of 23
    assert content(tmp_path / "index") == content(tmp_path / "whole")
    assert sorted(os.listdir(tmp_path)) == ["index", "whole"]


@pytest.mark.parametrize(
    "damage", ["truncated file", "missing file", "other passages", "fewer passages", "half a marker"]
)
def test_a_shard_that_is_not_complete_is_made_again(model, tmp_path, monkeypatch, damage):
    passages = [*MANY]
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stop_after(patch, 4)
        build(model, save_directory=tmp_path / "index", shard_size=5)
    work = tmp_path / ".index.unfinished"
    expected = 5 + 3  # passages: the damaged shard's, and the last shard's, which was never made
    if damage == "truncated file":
        (work / "passages-00001.arrow").write_bytes((work / "passages-00001.arrow").read_bytes()[:-1])
    elif damage == "missing file":
        (work / "embeddings-00002.safetensors").unlink()
    elif damage == "other passages":
        passages[7] = {"id": "m7", "title": "", "text": "new"}
    elif damage == "fewer passages":
        passages = passages[:10]
        expected = 0
    else:
        # as after a kill between writing and renaming
        (work / ".shard-00004.json.0a1b2c3d.unfinished").write_text('{"dig')
        expected = 3
    counts = count_encoded(monkeypatch, model)
    index = build(model, passages, save_directory=tmp_path / "index", shard_size=5)
    assert sum(counts) == expected
    monkeypatch.undo()
    build(model, passages, save_directory=tmp_path / "whole", shard_size=5)
    assert content(tmp_path / "index") == content(tmp_path / "whole")
    assert len(index) == len(passages)


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"dtype": "float16"}, "dtype: then 'float32', now 'float16'"),
        ({"shard_size": 6}, "shard_size: then 5, now 6"),
        ({}, "emb_seq: then"),
    ],
)
def test_a_build_with_another_model_or_setting_is_not_continued(model, tmp_path, monkeypatch, change, name):
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stop_after(patch, 3)
        build(model, save_directory=tmp_path / "index", shard_size=5)
    build_file = tmp_path / ".index.unfinished" / "build.json"
    settings = json.loads(build_file.read_text())
    del settings["fingerprint"]["passage_prompt"]  # as begun by an earlier release: no difference
    build_file.write_text(json.dumps(settings))
    other = model if change else make_model(emb_seq_kwargs={"seed": 9})
    before = content(tmp_path / ".index.unfinished")
    with pytest.raises(ValueError, match=f"unfinished build with other settings(.|\n)*  {name}"):
        build(other, save_directory=tmp_path / "index", **{"shard_size": 5, **change})
    assert content(tmp_path / ".index.unfinished") == before
    for path in (tmp_path / ".index.unfinished").glob("shard-*"):
        path.unlink()
    # without shards nothing is lost by beginning anew
    index = build(other, save_directory=tmp_path / "index", **{"shard_size": 5, **change})
    assert len(index) == len(MANY)


def test_an_index_stays_until_the_new_one_is_complete(model, tmp_path, monkeypatch):
    build(model, PASSAGES, save_directory=tmp_path / "index")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stop_after(patch, 1)
        build(model, save_directory=tmp_path / "index", shard_size=5)
    assert len(PassageIndex.from_pretrained(tmp_path / "index")) == len(PASSAGES)
    assert len(build(model, save_directory=tmp_path / "index", shard_size=5)) == len(MANY)
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter1.tex").write_text("precious")
    with pytest.raises(FileExistsError, match="is not a passage index"):
        build(model, save_directory=tmp_path / "thesis")
    assert os.listdir(tmp_path / "thesis") == ["chapter1.tex"]


def test_the_bar_counts_resumed_passages_as_done_but_not_as_fast(model, tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stop_after(patch, 4)
        build(model, save_directory=tmp_path / "index", shard_size=5)
    bars = []

    def make_bar(**kwargs):
        bars.append(index_build_cosup.tqdm(**kwargs))
        return bars[-1]

    monkeypatch.setattr("modeling_cosup.retrieval_cosup.tqdm", make_bar)
    PassageIndex.build(MANY, model, save_directory=tmp_path / "index", shard_size=5)
    assert (bars[0].total, bars[0].n, bars[0].initial) == (23, 23, 20)
    assert "passages/s" in capsys.readouterr().err


# ------------------------------------------------------------------ several processes


def test_shards_of_several_processes_make_the_same_index(model, tmp_path):
    build(model, save_directory=tmp_path / "one", shard_size=4)
    options = {"save_directory": tmp_path / "three", "shard_size": 4, "num_processes": 3}
    for rank in (2, 0):
        assert build(model, process_index=rank, **options) is None
    with pytest.raises(FileNotFoundError, match=r"not complete \(shard-00001.json, shard-00004.json\)"):
        PassageIndex.merge(tmp_path / "three")
    build(model, iter(MANY), process_index=1, **options)
    merged = PassageIndex.merge(tmp_path / "three")
    assert content(tmp_path / "three") == content(tmp_path / "one")
    assert list(merged) == list(PassageIndex.from_pretrained(tmp_path / "one"))
    with pytest.raises(FileNotFoundError, match="holds no build"):
        PassageIndex.merge(tmp_path / "three")
    with pytest.raises(ValueError, match="give save_directory"):
        build(model, num_processes=2)
    with pytest.raises(ValueError, match="process_index is 2, expected one of 0 to 1"):
        build(model, save_directory=tmp_path / "x", num_processes=2, process_index=2)


def test_merge_refuses_processes_that_read_different_corpora(model, tmp_path):
    """An id moves from one process's shard to the other's between their reads, so neither process sees it twice."""
    before = MANY[:5]
    after = [{**MANY[0], "id": "x"}, *MANY[1:4], {**MANY[4], "id": "m0"}]
    for rank, passages in enumerate((before, after)):
        build(model, passages, save_directory=tmp_path / "index", shard_size=4, num_processes=2, process_index=rank)
    with pytest.raises(ValueError, match="the processes read different corpora"):
        PassageIndex.merge(tmp_path / "index")
    assert not (tmp_path / "index").exists()


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    make_model(emb_seq_kwargs={"seed": 1}).save_pretrained(folder / "model")
    (folder / "corpus.jsonl").write_text("".join(json.dumps(passage) + "\n" for passage in MANY))
    return folder


def launch(inputs, output, world_size=1, die_at=-1, die_on=0):
    """Run `recipes/build_index.py` in real processes; rank `die_on` is killed when it has made `die_at` shards."""
    command = [SCRIPT, die_at, die_on, "--model", inputs / "model", "--corpus_file", inputs / "corpus.jsonl"]
    command += ["--output_dir", output, "--shard_size", 4]
    return run_forked(*command, world_size=world_size, env={"ACCELERATE_USE_CPU": "true"})


def test_killed_and_resumed(inputs, tmp_path, monkeypatch):
    killed = launch(inputs, tmp_path / "index", die_at=2)
    assert killed.returncode == -signal.SIGKILL
    assert not (tmp_path / "index").exists()
    model = make_model(emb_seq_kwargs={"seed": 1})
    counts = count_encoded(monkeypatch, model)
    build(model, inputs / "corpus.jsonl", save_directory=tmp_path / "index", shard_size=4)
    assert sum(counts) == 15  # of 23: two shards of 4 were complete
    build(model, save_directory=tmp_path / "whole", shard_size=4)
    assert_same_index(tmp_path / "index", tmp_path / "whole")


def test_two_processes_one_killed_then_resumed(inputs, tmp_path):
    killed = launch(inputs, tmp_path / "index", world_size=2, die_at=1, die_on=1)
    assert killed.returncode != 0
    assert not (tmp_path / "index").exists()
    resumed = launch(inputs, tmp_path / "index", world_size=2)
    assert resumed.returncode == 0, resumed.stderr[-3000:]
    assert resumed.stdout.count("23 passages") == 1
    # two processes may print on the same line
    num_made = [int(number) for number in re.findall(r"made (\d) shards, world size 2", resumed.stdout)]
    # rank 1 had made one of its three; how many rank 0 had made before it was ended varies
    assert len(num_made) == 2 and 2 in num_made and sum(num_made) < 6, num_made
    build(make_model(emb_seq_kwargs={"seed": 1}), save_directory=tmp_path / "here", shard_size=4)
    assert_same_index(tmp_path / "index", tmp_path / "here")


# ------------------------------------------------------------------ a full disk


def mount_small_disk(folder):
    """Mount a file system of 700 kB; skip the test if that is not permitted."""
    command = ["mount", "-t", "tmpfs", "-o", "size=700k", "tmpfs", folder]
    if subprocess.run(command, capture_output=True).returncode != 0:
        pytest.skip("mounting a file system is not permitted")


@pytest.mark.parametrize("limit", ["file size", "file system"])
def test_a_full_disk_says_what_to_free_and_keeps_complete_shards(inputs, tmp_path, limit):
    """The third shard, with its long texts, exceeds a limit on file sizes, or a real file system of 700 kB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    passages = [*MANY[:10], *({"id": f"long{i}", "text": "radium " * 60_000} for i in range(4))]
    (tmp_path / "corpus.jsonl").write_text("".join(json.dumps(passage) + "\n" for passage in passages))
    set_limit = "resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, 500_000))" if limit == "file size" else ""
    code = (
        "import resource, sys; from modeling_cosup import CoSupForCausalLM\n"
        f"{set_limit}\n"
        "model = CoSupForCausalLM.from_pretrained(sys.argv[1])\n"
        "model.build_index(sys.argv[2], save_directory=sys.argv[3], shard_size=4, show_progress_bar=False)"
    )
    if limit == "file system":
        mount_small_disk(folder)
    try:
        result = run_forked("-c", code, inputs / "model", tmp_path / "corpus.jsonl", folder / "index")
        assert result.returncode == 1, result.stderr[-3000:]
        assert "no room for the next shard" in result.stderr, result.stderr[-3000:]
        assert "MB for the embeddings of the 6 remaining passages" in result.stderr
        assert "the same call then resumes" in result.stderr
        work = folder / ".index.unfinished"
        assert sorted(path.name for path in work.glob("shard-*")) == ["shard-00000.json", "shard-00001.json"]
        assert not (folder / "index").exists()
        assert not (work / "embeddings-00002.safetensors").exists()
        assert not list(work.glob("passages-00002*"))
    finally:
        if limit == "file system":
            subprocess.run(["umount", folder], check=True)
    if limit == "file size":  # room again
        files = json.loads((work / "shard-00001.json").read_text())["files"]
        model = make_model(emb_seq_kwargs={"seed": 1})
        resumed = build(model, passages, save_directory=folder / "index", shard_size=4)
        assert len(resumed) == 14
        name = "passages-00001.arrow"
        assert resumed.config["files"][name]["sha256"] == files[name]["sha256"]


# ------------------------------------------------------------------ memory

BUILD_AND_NOTE_MEMORY = """
import sys
from modeling_cosup import CoSupForCausalLM, shard_build_cosup

def note(*args, make=shard_build_cosup.write_new_shard):
    files = make(*args)
    print(next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("RssAnon")))
    return files

shard_build_cosup.write_new_shard = note
model = CoSupForCausalLM.from_pretrained(sys.argv[1])
passages = ({"id": f"{i:0200}", "text": "radium " * 1500} for i in range(2000))
model.build_index(passages, save_directory=sys.argv[2], shard_size=50, show_progress_bar=False)
"""


def test_memory_does_not_grow_with_the_corpus(tmp_path):
    """Compare anonymous memory after the tenth and the last of 40 shards; a generator holds no corpus in memory."""
    model = make_model(gen_kwargs={"layers": 1}, emb_seq_kwargs={"layers": 1}, max_passage_length=104)
    model.save_pretrained(tmp_path / "model")
    command = [sys.executable, "-c", BUILD_AND_NOTE_MEMORY, tmp_path / "model", tmp_path / "index"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment)
    assert result.returncode == 0, result.stderr[-3000:]
    held = [int(line) for line in result.stdout.split()]
    stored = sum(path.stat().st_size for path in (tmp_path / "index").iterdir()) / 1024
    assert len(held) == 40
    assert stored > 20_000  # kB of texts, tokens and embeddings
    # Three quarters of it were written after the tenth shard. The allocator alone moves by up to a third.
    assert held[-1] - held[9] < stored / 2, held
