"""Where a passage comes from: checked with the corpus, kept by the index, shown in the trace and the citation."""

import gzip
import json
import pickle

import pyarrow as pa
import pyarrow.parquet
import pytest
import torch

from modeling_cosup import PassageIndex, RetrievalConfig, milvus_upload_cosup
from modeling_cosup.index_files_cosup import passage_schema
from modeling_cosup.metadata_cosup import MAX_METADATA_BYTES, MAX_METADATA_DEPTH, check_metadata, source_text
from modeling_cosup.milvus_client_cosup import MilvusConnection
from modeling_cosup.passages_cosup import checked_passages, read_corpus
from support.generation import Prefer
from support.models import PASSAGES, make_model

PAGE = {"source": "guides/ä.pdf", "page": 3, "start": 0, "end": 12, "url": "https://x.org/ä.pdf"}
WITH = {"id": "with", "title": "With", "text": "radium in Warsaw", "metadata": PAGE}
WITHOUT = {"id": "without", "title": "", "text": "the city"}


@pytest.fixture(scope="module")
def the_model():
    return make_model()


def corpus_passages(source):
    return [passage for _, passage in checked_passages(read_corpus(source))]


# ------------------------------------------------------------------ corpora


def nested(depth):
    value = 1
    for _ in range(depth):
        value = [value]
    return value


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ("a.pdf", "metadata is of type str, expected a JSON object"),
        (["a.pdf"], "metadata is of type list, expected a JSON object"),
        ({3: "x"}, "metadata has the key 3, expected a string"),
        ({"a": 1, "b": float("nan")}, r"metadata\['b'\] holds a number that is not finite"),
        ({"a": [{"b": float("-inf")}]}, r"metadata\['a'\] holds a number that is not finite"),
        ({"a": 2**63}, r"metadata\['a'\] holds an integer of more than 64 bits"),
        ({"a": {"b": [-(2**63) - 1]}}, r"metadata\['a'\] holds an integer of more than 64 bits"),
        ({"a": "\ud800"}, r"metadata\['a'\] holds half a surrogate pair"),
        ({"\ud800": "a"}, "metadata.* holds half a surrogate pair"),
        ({"a": {1, 2}}, r"metadata\['a'\] is of type set, or holds a value that is not JSON"),
        ({"a": nested(100_000)}, r"metadata\['a'\] is nested too deeply"),
        ({"a": "é" * (MAX_METADATA_BYTES // 2)}, "metadata takes 16,393 bytes as JSON, expected at most 16,384"),
    ],
)
def test_bad_metadata_is_named(metadata, message):
    with pytest.raises(ValueError, match=f"Corpus row 1: {message}"):
        corpus_passages([WITH, {**WITHOUT, "metadata": metadata}])


def test_nested_metadata_is_read_up_to_a_depth_wherever_it_is_checked():
    def check_far_down(metadata, num_calls):
        """Check it with less of the stack left."""
        return check_far_down(metadata, num_calls - 1) if num_calls else check_metadata(metadata, "here")

    for kept in ({"a": nested(MAX_METADATA_DEPTH)}, {"a": {"b": nested(MAX_METADATA_DEPTH - 1)}}):
        assert check_metadata(kept, "here") == check_far_down(kept, 400) == kept
        assert pickle.loads(pickle.dumps(kept)) == kept
    holds_itself = []
    holds_itself.append(holds_itself)
    for value in (nested(MAX_METADATA_DEPTH + 1), {"b": nested(MAX_METADATA_DEPTH)}, nested(600), holds_itself):
        with pytest.raises(ValueError, match=r"metadata\['a'\] is nested too deeply, expected at most 64 levels"):
            check_metadata({"a": value}, "here")


def test_metadata_is_copied_and_nothing_is_none():
    metadata = {"a": (1, 2), "missing": None, "deep": {"kept": None}}
    checked = check_metadata(metadata, "here")
    assert checked == {"a": [1, 2], "deep": {"kept": None}}
    for nothing in (None, {}, {"missing": None}):
        assert check_metadata(nothing, "here") is None
        assert corpus_passages([{**WITHOUT, "metadata": nothing}]) == [WITHOUT]


def test_corpus_files(tmp_path):
    lines = "".join(json.dumps(passage) + "\n" for passage in (WITH, WITHOUT))
    (tmp_path / "c.jsonl").write_text(lines)
    (tmp_path / "c.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    texts = {name: [passage[name] for passage in (WITH, WITHOUT)] for name in ("id", "title", "text")}
    columns = {
        "struct": pa.array([PAGE, None]),
        "partly": pa.array([PAGE, {"page": None}]),  # as Arrow fills in the keys of other rows
        "json": pa.array([json.dumps(PAGE), ""]),
    }
    for name, column in columns.items():
        pyarrow.parquet.write_table(pa.table({**texts, "metadata": column}), tmp_path / f"{name}.parquet")
    for path in tmp_path.iterdir():
        assert corpus_passages(path) == [WITH, WITHOUT], path
    shared = pa.array([[("source", "a")], None], pa.map_(pa.string(), pa.string()))
    pyarrow.parquet.write_table(pa.table({**texts, "metadata": shared}), tmp_path / "map.parquet")
    assert corpus_passages(tmp_path / "map.parquet")[0]["metadata"] == {"source": "a"}
    pyarrow.parquet.write_table(pa.table({**texts, "metadata": ["{", "3"]}), tmp_path / "bad.parquet")
    with pytest.raises(ValueError, match="bad.parquet, row 0: malformed JSON"):
        corpus_passages(tmp_path / "bad.parquet")


# ------------------------------------------------------------------ indexes


def build(model, passages, folder=None, **options):
    return PassageIndex.build(passages, model, save_directory=folder, show_progress_bar=False, **options)


def test_only_shards_with_metadata_have_its_column(the_model, tmp_path):
    index = build(the_model, [WITHOUT, *PASSAGES[:2], WITH], tmp_path / "index", shard_size=2)
    schemas = [shard.passages.schema for shard in index._shards]
    assert schemas[0].equals(passage_schema())
    assert schemas[1].names == [*passage_schema().names, "metadata"]
    assert "metadata" not in index[0] and "metadata" not in index[2]
    assert index[3]["metadata"] == PAGE
    assert index.get_passages([3, 0, 3])[2]["metadata"] == PAGE
    build(the_model, [WITHOUT, *PASSAGES[:2]], tmp_path / "plain", shard_size=2)
    name = "passages-00000.arrow"
    assert (tmp_path / "plain" / name).read_bytes() == (tmp_path / "index" / name).read_bytes()
    index.save_pretrained(tmp_path / "again")
    assert PassageIndex.from_pretrained(tmp_path / "again", verify=True)[3]["metadata"] == PAGE


def test_several_processes_and_a_resumed_build_keep_it(the_model, tmp_path):
    passages = [{**WITH, "id": f"p{i}", "metadata": {"page": i}} for i in range(5)]
    for rank in range(2):
        build(the_model, passages, tmp_path / "index", shard_size=2, num_processes=2, process_index=rank)
    changed = [*passages[:2], {**passages[2], "metadata": {"page": 22}}, *passages[3:]]
    for rank in range(2):  # the shard is built again, because its metadata changed
        build(the_model, changed, tmp_path / "index", shard_size=2, num_processes=2, process_index=rank)
    merged = PassageIndex.merge(tmp_path / "index")
    assert [passage["metadata"]["page"] for passage in merged] == [0, 1, 22, 3, 4]


def test_a_damaged_text_is_named(the_model):
    index = build(the_model, [WITH])
    columns = {name: index._shards[0].passages[name] for name in passage_schema().names}
    for text, message in (("[1]", "is of type list"), ("{", "malformed JSON")):
        index._shards[0].passages = pa.record_batch({**columns, "metadata": pa.array([text], pa.large_string())})
        with pytest.raises(ValueError, match=f"Passage 'with' of the index: .*{message}"):
            index.get_passages([0])


def test_a_collection_from_before_there_was_metadata(the_model, milvus_server, monkeypatch):
    milvus_cosup = pytest.importorskip("modeling_cosup.milvus_cosup")
    call = MilvusConnection.call

    def without_metadata(self, method, *args, **kwargs):
        if method == "create_collection":
            kwargs["schema"]._fields = [field for field in kwargs["schema"].fields if field.name != "metadata"]
        return call(self, method, *args, **kwargs)

    plain = build(the_model, [WITHOUT])
    monkeypatch.setattr(MilvusConnection, "call", without_metadata)
    options = {"show_progress_bar": False}
    old = milvus_cosup.MilvusPassageIndex.from_index(plain, milvus_server.uri, "before_metadata", **options)
    monkeypatch.undo()
    assert old._fields == [*milvus_upload_cosup.TEXT_FIELDS, "input_ids"]
    assert old[0] == plain[0]
    with pytest.raises(ValueError, match="Passage 'with' has metadata, and this collection was made without"):
        old.add([WITH], the_model, **options)
    old.add([PASSAGES[0]], the_model, **options)
    assert len(old) == 2


# ------------------------------------------------------------------ traces


def test_the_trace_and_the_citation_say_where_a_passage_comes_from(the_model, tmp_path):
    index = build(the_model, [WITH, WITHOUT])
    letter = the_model.tokenizer("a")["input_ids"]
    prompt = [*the_model.tokenizer("who?")["input_ids"], the_model.config.nsp_token_id]
    settings = RetrievalConfig(top_k=2, max_retrievals=1, passages=[["with", WITHOUT]])
    options = {"retriever": index, "max_new_tokens": 2, "output_file": tmp_path / "traces.jsonl"}
    options |= {"logits_processor": [Prefer(letter)], "show_progress_bar": False}
    completions = the_model.generate_many([prompt], retrieval_config=settings, **options)
    (retrieval,) = completions[0].retrievals
    assert retrieval.passages == [WITH, WITHOUT]
    assert json.loads(json.dumps(retrieval.to_dict()))["passages"][0]["metadata"] == PAGE
    again = the_model.generate_many([prompt], retrieval_config=settings, **options)  # read from the file
    assert again[0].retrievals == completions[0].retrievals
    _, first, second = completions[0].cited_text.split("\n")
    assert first == "[1] With (guides/ä.pdf, page 3): radium in Warsaw"
    assert second == "[2] the city"
    bad = RetrievalConfig(passages=[[{**WITHOUT, "metadata": {"a": float("inf")}}]])
    with pytest.raises(ValueError, match="RetrievalConfig.passages, passage 0 of a prompt: metadata.*not finite"):
        the_model.generate(torch.tensor([prompt]), retriever=index, retrieval_config=bad)


@pytest.mark.parametrize(
    ("metadata", "expected"),
    [
        (None, ""),
        ({}, ""),
        ({"page": 3}, ""),
        ({"source": 3, "page": 3}, ""),
        ({"source": "a.md"}, "a.md"),
        ({"url": "https://x.org"}, "https://x.org"),
        ({"source": "a.md", "url": "https://x.org"}, "a.md"),
        ({"source": "a.pdf", "page": "3"}, "a.pdf"),
        ({"source": "a.pdf", "page": 3}, "a.pdf, page 3"),
    ],
)
def test_the_source_in_words(metadata, expected):
    assert source_text({"id": "a", "metadata": metadata}) == expected
