"""Building an index: any source, flat memory, killed and resumed, in several processes, on a disk that fills up."""

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

from modeling_cosup import PassageIndex, index_build_cosup, passages_cosup
from modeling_cosup.tokenization_cosup import encode_passages_for_emb_seq
from support.models import PASSAGES, make_model

SCRIPT = Path(__file__).parents[1] / "distributed" / "run_and_kill_build.py"
MANY = [
    {"id": f"m{i}", "title": f"Title {i}" if i % 3 else "", "text": f"{i} {'radium ' * (i % 7)}in {i * 7}"}
    for i in range(23)
]


def build(model, passages=MANY, **kwargs):
    return PassageIndex.build(passages, model, show_progress_bar=False, **kwargs)


def content(folder):
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


# ------------------------------------------------------------------ sources


def sources(folder):
    """The same passages in every form that build reads."""
    (folder / "corpus.jsonl").write_text("\n".join(json.dumps(passage) for passage in MANY) + "\n\n")
    with gzip.open(folder / "corpus.jsonl.gz", "wt") as file:
        file.writelines(json.dumps(passage) + "\n" for passage in MANY)
    pyarrow.parquet.write_table(
        pa.Table.from_pylist([{**passage, "more": 1.5} for passage in MANY]),
        folder / "corpus.parquet",
        row_group_size=5,
    )
    dataset = datasets.Dataset.from_list(MANY)
    return {
        "jsonl": folder / "corpus.jsonl",
        "jsonl.gz": str(folder / "corpus.jsonl.gz"),
        "parquet": folder / "corpus.parquet",
        "dataset": dataset,
        "streamed dataset": dataset.to_iterable_dataset(),
        "generator": (passage for passage in MANY),
        "list": MANY,
    }


def test_every_source_makes_the_same_index(model, tmp_path):
    expected = build(model)
    for name, source in sources(tmp_path).items():
        index = build(model, source, save_directory=tmp_path / "index", shard_size=7)
        assert list(index) == list(expected) and len(index) == len(MANY), name
        torch.testing.assert_close(index.embeddings, expected.embeddings, rtol=0, atol=1e-5)
        assert list(build(model, [*MANY])) == list(expected)
    assert [len(shard) for shard in index._shards] == [7, 7, 7, 2]
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "corpus.jsonl",
        "corpus.jsonl.gz",
        "corpus.parquet",
        "index",
    ]


BAD = [
    ({"id": "m0", "title": "", "text": "again"}, "id 'm0' already stands"),
    ({"id": "m22", "title": "", "text": "again"}, "id 'm22' already stands"),
    ({"id": "x", "text": ""}, "text is ''"),
    ({"id": "x", "text": "\ud800"}, "text holds '\\ud800', which is no character"),
    ({"id": 5, "text": "x"}, "id is 5, expected a string"),
    ("x", "expected a passage"),
]


@pytest.mark.parametrize(("row", "message"), BAD)
@pytest.mark.parametrize("form", ["list", "generator"])
@pytest.mark.parametrize("folder", [False, True])
def test_a_bad_row_is_named_and_leaves_no_index(model, tmp_path, monkeypatch, form, folder, row, message):
    embedded = []
    monkeypatch.setattr(
        index_build_cosup.ShardBuilder, "_store", lambda self, passages, rows, *args: embedded.extend(rows)
    )
    passages = [*MANY, row]
    save_directory = tmp_path / "index" if folder else None
    with pytest.raises(ValueError) as error:
        build(model, passages if form == "list" else iter(passages), save_directory=save_directory, shard_size=7)
    assert str(error.value).startswith("Corpus row 23") and message in str(error.value)
    assert not (tmp_path / "index").exists()
    assert len(embedded) == (0 if form == "list" else 21)  # what can be read twice is checked before the first shard


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
    with pytest.raises(ValueError, match="a.parquet is no Parquet file"):
        build(model, tmp_path / "a.parquet")
    with pytest.raises(FileNotFoundError, match="nothing.jsonl"):
        build(model, tmp_path / "nothing.jsonl")
    pyarrow.parquet.write_table(pa.table({"id": ["a", None], "text": ["b", "c"]}), tmp_path / "b.parquet")
    with pytest.raises(ValueError, match="b.parquet, row 1: id is None"):
        build(model, tmp_path / "b.parquet")


def test_ids_with_the_same_hash_are_told_apart(model, tmp_path, monkeypatch):
    """All hashes collide: the ids themselves decide."""
    monkeypatch.setattr(passages_cosup, "hash_id", lambda id: 7)
    index = build(model, save_directory=tmp_path / "index", shard_size=7)
    assert index.rows_of(["m22", "m0", "m9"]).tolist() == [22, 0, 9]
    with pytest.raises(ValueError, match=r"does not hold 1 of 2 ids: \['x'\]"):
        index.rows_of(["m3", "x"])
    with pytest.raises(ValueError, match="id 'm3' already stands"):
        build(model, [*MANY, MANY[3]])


def test_the_id_table_is_sorted_whatever_its_partitions(model, monkeypatch):
    from modeling_cosup import index_files_cosup

    index = build(model, shard_size=7)
    expected = index_files_cosup.make_id_table(index._shards)
    monkeypatch.setattr(index_files_cosup, "PARTITION", 2)
    hashes, rows = index_files_cosup.make_id_table(index._shards)
    assert (np.diff(hashes) >= 0).all() and (hashes == expected[0]).all() and (rows == expected[1]).all()
    assert sorted(rows) == list(range(len(MANY)))


# ------------------------------------------------------------------ embedding


def test_batches_respect_both_bounds_and_change_nothing(model, monkeypatch):
    expected, encode, shapes = build(model).embeddings, model.encode_passages, []

    def note(ids, mask):
        shapes.append(tuple(ids.shape))
        return encode(ids, mask)

    monkeypatch.setattr(model, "encode_passages", note)
    index = build(model, max_tokens_per_batch=60, batch_size=3)
    assert max(rows for rows, _ in shapes) == 3 and len(shapes) > 8
    assert all(rows * width <= 60 or rows == 1 for rows, width in shapes) and sum(rows for rows, _ in shapes) == len(
        MANY
    )
    lengths = sorted(
        (len(ids) for ids in encode_passages_for_emb_seq(model.tokenizer, MANY, model.config)), reverse=True
    )
    ends = np.cumsum([rows for rows, _ in shapes])
    assert all(
        lengths[end - 1] >= 0.75 * width for end, (_, width) in zip(ends, shapes, strict=True)
    )  # little padding
    assert [width for _, width in shapes] == sorted((width for _, width in shapes), reverse=True)
    torch.testing.assert_close(index.embeddings, expected, rtol=0, atol=1e-5)
    alone = [
        encode(torch.tensor([ids]))[0] for ids in encode_passages_for_emb_seq(model.tokenizer, MANY, model.config)
    ]
    torch.testing.assert_close(index.embeddings, torch.stack(alone), rtol=0, atol=1e-5)


def test_a_passage_without_tokens(tmp_path):
    model = make_model(emb_seq="bert", emb_seq_pooling="mean")
    model.tokenizer.bos_token = model.tokenizer.eos_token = None
    real = model.tokenizer.backend_tokenizer.normalizer
    from tokenizers import normalizers

    model.tokenizer.backend_tokenizer.normalizer = normalizers.Replace("zzz", "")
    index = build(model, [{"id": "a", "text": "zzz"}, {"id": "b", "text": "word"}], save_directory=tmp_path / "index")
    assert real is None and index[0]["input_ids"] == [] and index[1]["input_ids"] and index.embeddings.isfinite().all()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_storage(model, tmp_path, dtype):
    exact, half = build(model, shard_size=9), build(model, save_directory=tmp_path / "half", dtype=dtype, shard_size=9)
    stored = half._shards[0].embeddings
    assert (
        str(stored.dtype) == f"torch.{dtype}"
        and (tmp_path / "half" / "embeddings-00000.safetensors").stat().st_size < 9 * 32 * 2 + 200
    )
    assert torch.equal(half.embeddings, exact.embeddings.to(stored.dtype).float())
    queries = torch.randn(4, 32, generator=torch.Generator().manual_seed(0))
    expected = (queries @ half.embeddings.T).topk(5)
    scores, rows = half.search(queries, 5)
    assert rows.tolist() == expected.indices.tolist()
    torch.testing.assert_close(torch.from_numpy(scores), expected.values)
    with pytest.raises(ValueError, match="dtype is 'int8', expected one of float32, float16, bfloat16"):
        build(model, dtype="int8")


def test_an_embedding_that_is_not_finite_names_its_passage(model, tmp_path, monkeypatch):
    encode = model.encode_passages

    bad = encode_passages_for_emb_seq(model.tokenizer, MANY[11:12], model.config)[0]

    def poisoned(ids, mask):
        embeds = encode(ids, mask)
        embeds[[ids[mask.bool()].tolist() == bad for ids, mask in zip(ids, mask, strict=True)]] = float("nan")
        return embeds

    monkeypatch.setattr(model, "encode_passages", poisoned)
    for folder in (None, tmp_path / "index"):
        with pytest.raises(ValueError, match=r"1 passages are not finite in torch.float32: \['m11'\]"):
            build(model, save_directory=folder)
    assert not (tmp_path / "index").exists()
    monkeypatch.undo()
    assert len(build(model, save_directory=tmp_path / "index")) == len(MANY)


# ------------------------------------------------------------------ resuming


def encoded(monkeypatch, model):
    """A list that grows by the number of passages of each forward."""
    counts, encode = [], model.encode_passages
    monkeypatch.setattr(model, "encode_passages", lambda ids, mask: counts.append(len(ids)) or encode(ids, mask))
    return counts


def stop_at(monkeypatch, shard):
    make = index_build_cosup.ShardBuilder.make
    calls = []

    def counted(self, *args):
        calls.append(1)
        if len(calls) > shard:
            raise KeyboardInterrupt
        return make(self, *args)

    monkeypatch.setattr(index_build_cosup.ShardBuilder, "make", counted)


def test_a_build_goes_on_behind_its_complete_shards(model, tmp_path, monkeypatch):
    build(model, save_directory=tmp_path / "whole", shard_size=5)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stop_at(patch, 3)
        build(model, save_directory=tmp_path / "index", shard_size=5)
    assert not (tmp_path / "index").exists()
    counts = encoded(monkeypatch, model)
    build(model, save_directory=tmp_path / "index", shard_size=5)
    assert sum(counts) == 8  # of 23
    assert content(tmp_path / "index") == content(tmp_path / "whole")
    assert sorted(os.listdir(tmp_path)) == ["index", "whole"]


@pytest.mark.parametrize(
    "damage", ["truncated file", "missing file", "other passages", "fewer passages", "half a marker"]
)
def test_what_is_not_whole_is_made_again(model, tmp_path, monkeypatch, damage):
    passages = [*MANY]
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stop_at(patch, 4)
        build(model, save_directory=tmp_path / "index", shard_size=5)
    work = tmp_path / ".index.unfinished"
    again = {"truncated file": 5, "missing file": 5, "other passages": 5, "fewer passages": 0, "half a marker": 0}[
        damage
    ] + 3
    if damage == "truncated file":
        (work / "passages-00001.arrow").write_bytes((work / "passages-00001.arrow").read_bytes()[:-1])
    elif damage == "missing file":
        (work / "embeddings-00002.safetensors").unlink()
    elif damage == "other passages":
        passages[7] = {"id": "m7", "title": "", "text": "new"}
    elif damage == "fewer passages":
        passages, again = passages[:10], 0
    else:
        (work / ".shard-00004.json.abc").write_text('{"dig')  # what a kill between writing and renaming leaves
    counts = encoded(monkeypatch, model)
    index = build(model, passages, save_directory=tmp_path / "index", shard_size=5)
    assert sum(counts) == again
    monkeypatch.undo()
    build(model, passages, save_directory=tmp_path / "whole", shard_size=5)
    assert content(tmp_path / "index") == content(tmp_path / "whole") and len(index) == len(passages)


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"dtype": "float16"}, "dtype: then 'float32', now 'float16'"),
        ({"shard_size": 6}, "shard_size: then 5, now 6"),
        ({}, "emb_seq: then"),
    ],
)
def test_a_build_of_another_model_or_setting_is_not_gone_on_with(model, tmp_path, monkeypatch, change, name):
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stop_at(patch, 3)
        build(model, save_directory=tmp_path / "index", shard_size=5)
    build_file = tmp_path / ".index.unfinished" / "build.json"
    settings = json.loads(build_file.read_text())
    del settings["fingerprint"]["passage_prompt"]  # begun by an earlier release: nothing that differs
    build_file.write_text(json.dumps(settings))
    other = model if change else make_model(emb_seq_kwargs={"seed": 9})
    before = content(tmp_path / ".index.unfinished")
    with pytest.raises(ValueError, match=f"unfinished build with other settings(.|\n)*  {name}"):
        build(other, save_directory=tmp_path / "index", **{"shard_size": 5, **change})
    assert content(tmp_path / ".index.unfinished") == before
    for path in (tmp_path / ".index.unfinished").glob("shard-*"):
        path.unlink()
    assert len(build(other, save_directory=tmp_path / "index", **{"shard_size": 5, **change})) == len(
        MANY
    )  # nothing is lost by beginning anew


def test_an_index_stands_until_the_new_one_is_whole(model, tmp_path, monkeypatch):
    build(model, PASSAGES, save_directory=tmp_path / "index")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stop_at(patch, 1)
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
        stop_at(patch, 4)
        build(model, save_directory=tmp_path / "index", shard_size=5)
    bars = []
    monkeypatch.setattr(
        "modeling_cosup.retrieval_cosup.tqdm",
        lambda **kwargs: bars.append(index_build_cosup.tqdm(**kwargs)) or bars[-1],
    )
    PassageIndex.build(MANY, model, save_directory=tmp_path / "index", shard_size=5)
    assert (bars[0].total, bars[0].n, bars[0].initial) == (23, 23, 20) and "passages/s" in capsys.readouterr().err


# ------------------------------------------------------------------ several processes


def test_shards_of_several_processes_make_the_same_index(model, tmp_path):
    build(model, save_directory=tmp_path / "one", shard_size=4)
    for rank in (2, 0):
        assert (
            build(model, save_directory=tmp_path / "three", shard_size=4, num_processes=3, process_index=rank) is None
        )
    with pytest.raises(FileNotFoundError, match=r"not complete \(shard-00001.json, shard-00004.json\)"):
        PassageIndex.merge(tmp_path / "three")
    build(model, iter(MANY), save_directory=tmp_path / "three", shard_size=4, num_processes=3, process_index=1)
    merged = PassageIndex.merge(tmp_path / "three")
    assert content(tmp_path / "three") == content(tmp_path / "one") and list(merged) == list(
        PassageIndex.from_pretrained(tmp_path / "one")
    )
    with pytest.raises(FileNotFoundError, match="holds no build"):
        PassageIndex.merge(tmp_path / "three")
    with pytest.raises(ValueError, match="give save_directory"):
        build(model, num_processes=2)
    with pytest.raises(ValueError, match="process_index is 2, expected one of 0 to 1"):
        build(model, save_directory=tmp_path / "x", num_processes=2, process_index=2)


def test_merge_refuses_processes_that_read_different_corpora(model, tmp_path):
    """The corpus changed between the processes' readings, so that neither saw both."""
    for rank in range(2):
        passages = (
            [*MANY[:4], {**MANY[4], "id": "m0" if rank else "m4"}]
            if not rank
            else [{**MANY[0], "id": "x"}, *MANY[1:4], {**MANY[4], "id": "m0"}]
        )
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


def launch(inputs, output, world_size=1, die_at=-1, die_on=0, **environment):
    """`recipes/build_index.py` in real processes; one of them is killed when it has made `die_at` shards."""
    command = (
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(world_size)]
        if world_size > 1
        else [sys.executable]
    )
    command += [
        str(SCRIPT),
        str(die_at),
        str(die_on),
        "--model",
        inputs / "model",
        "--corpus_file",
        inputs / "corpus.jsonl",
        "--output_dir",
        output,
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", **environment}
    return subprocess.run(
        [*map(str, command), "--shard_size", "4"], capture_output=True, text=True, env=environment, timeout=200
    )


def test_killed_and_resumed(inputs, tmp_path, monkeypatch):
    killed = launch(inputs, tmp_path / "index", die_at=2)
    assert killed.returncode == -signal.SIGKILL and not (tmp_path / "index").exists()
    model = make_model(emb_seq_kwargs={"seed": 1})
    counts = encoded(monkeypatch, model)
    build(model, inputs / "corpus.jsonl", save_directory=tmp_path / "index", shard_size=4)
    assert sum(counts) == 15  # of 23: two shards of 4 were there
    build(model, save_directory=tmp_path / "whole", shard_size=4)
    assert content(tmp_path / "index") == content(tmp_path / "whole")


def test_two_processes_one_killed_then_resumed(inputs, tmp_path):
    killed = launch(inputs, tmp_path / "index", world_size=2, die_at=1, die_on=1)
    assert killed.returncode != 0 and not (tmp_path / "index").exists()
    resumed = launch(inputs, tmp_path / "index", world_size=2)
    assert resumed.returncode == 0, resumed.stderr[-3000:]
    assert resumed.stdout.count("23 passages") == 1
    made = sorted(
        map(int, re.findall(r"made (\d) shards, world size 2", resumed.stdout))
    )  # two processes may print into one line
    assert len(made) == 2 and 2 in made and sum(made) < 6, (
        made
    )  # rank 1 had one of its three; how far rank 0 came before it was ended is chance
    build(make_model(emb_seq_kwargs={"seed": 1}), save_directory=tmp_path / "here", shard_size=4)
    assert content(tmp_path / "index") == content(tmp_path / "here")


# ------------------------------------------------------------------ a full disk


@pytest.mark.parametrize("limit", ["file size", "file system"])
def test_a_full_disk_says_what_to_free_and_keeps_complete_shards(inputs, tmp_path, limit):
    """File size: a limit of the process, reached by the third shard, which holds long texts. File system: a real one of 700 kB, if it can be mounted."""
    folder = tmp_path / "disk"
    folder.mkdir()
    passages = [*MANY[:10], *({"id": f"long{i}", "text": "radium " * 60_000} for i in range(4))]
    (tmp_path / "corpus.jsonl").write_text("".join(json.dumps(passage) + "\n" for passage in passages))
    code = (
        "import resource, sys; from modeling_cosup import CoSupForCausalLM\n"
        f"{'resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, 500_000))' if limit == 'file size' else ''}\n"
        "model = CoSupForCausalLM.from_pretrained(sys.argv[1])\n"
        "model.build_index(sys.argv[2], save_directory=sys.argv[3], shard_size=4, show_progress_bar=False)"
    )
    command = [
        sys.executable,
        "-c",
        code,
        str(inputs / "model"),
        str(tmp_path / "corpus.jsonl"),
        str(folder / "index"),
    ]
    mounted = (
        limit == "file system"
        and subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=700k", "tmpfs", folder], capture_output=True
        ).returncode
        == 0
    )
    if limit == "file system" and not mounted:
        pytest.skip("no right to mount a file system")
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=200)
        assert result.returncode == 1 and "no room for the next shard" in result.stderr, result.stderr[-3000:]
        assert (
            "MB for the embeddings of 6 passages that are left" in result.stderr
            and "the same call then goes on" in result.stderr
        )
        work = folder / ".index.unfinished"
        assert sorted(path.name for path in work.glob("shard-*")) == ["shard-00000.json", "shard-00001.json"]
        assert not (folder / "index").exists() and not (work / "embeddings-00002.safetensors").exists()
        assert not list(work.glob("passages-00002*"))
    finally:
        if mounted:
            subprocess.run(["umount", folder], check=True)
    if limit == "file size":  # room again
        (done,) = [json.loads((work / "shard-00001.json").read_text())["files"]["passages-00001.arrow"]["sha256"]]
        resumed = build(
            make_model(emb_seq_kwargs={"seed": 1}), passages, save_directory=folder / "index", shard_size=4
        )
        assert len(resumed) == 14 and resumed.config["files"]["passages-00001.arrow"]["sha256"] == done


# ------------------------------------------------------------------ memory


def test_memory_does_not_grow_with_the_corpus(tmp_path):
    """Anonymous memory after the tenth and after the last of 40 shards, of a generator, so that the corpus itself takes none."""
    make_model(gen_kwargs={"layers": 1}, emb_seq_kwargs={"layers": 1}, max_passage_length=64).save_pretrained(
        tmp_path / "model"
    )
    code = (
        "import sys; from modeling_cosup import CoSupForCausalLM, index_build_cosup\n"
        "def note(*args, make=index_build_cosup.write_new_shard):\n"
        "    files = make(*args)\n"
        "    print(next(int(line.split()[1]) for line in open('/proc/self/status') if line.startswith('RssAnon')))\n"
        "    return files\n"
        "index_build_cosup.write_new_shard = note\n"
        "model = CoSupForCausalLM.from_pretrained(sys.argv[1])\n"
        "passages = ({'id': f'{i:0200}', 'text': 'radium ' * 1000} for i in range(2000))\n"
        "model.build_index(passages, save_directory=sys.argv[2], shard_size=50, show_progress_bar=False)"
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "model", tmp_path / "index"],
        capture_output=True,
        text=True,
        timeout=200,
        env=environment,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    held = [int(line) for line in result.stdout.split()]
    stored = sum(path.stat().st_size for path in (tmp_path / "index").iterdir()) / 1024
    assert len(held) == 40 and stored > 14_000  # kB of texts, tokens and embeddings
    assert held[-1] - held[9] < stored / 4, held
