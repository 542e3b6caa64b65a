"""What only Milvus has: interrupted uploads, a server that goes away, field limits, one process per file."""

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from modeling_cosup import RetrievalError, milvus_client_cosup, milvus_cosup, milvus_upload_cosup
from modeling_cosup.milvus_client_cosup import MilvusConnection
from modeling_cosup.milvus_cosup import MilvusPassageIndex
from support.generation import left_pad
from support.milvus_server import MilvusServer
from support.models import PASSAGES, make_model

pymilvus = pytest.importorskip("pymilvus", reason="pymilvus is not installed")
pytest.importorskip("milvus_lite", reason="milvus-lite is not installed")

ROOT = Path(__file__).parents[2]
MANY = [{"id": f"id {i}", "title": "", "text": f"{i} in {i * i}"} for i in range(4096 + 1500)]


@pytest.fixture(scope="module")
def the_model():
    return make_model()


@pytest.fixture(scope="module")
def index(the_model):
    """An index of the six `PASSAGES`, for reading only."""
    return the_model.build_index(PASSAGES, show_progress_bar=False)


@pytest.fixture(scope="module")
def large(the_model, tmp_path_factory):
    """An index of more passages than one request holds, and its folder."""
    folder = tmp_path_factory.mktemp("large") / "index"
    return the_model.build_index(MANY, save_directory=folder, shard_size=2500, show_progress_bar=False), folder


def upload(index, server, name, **kwargs):
    return MilvusPassageIndex.from_index(index, server.uri, name, show_progress_bar=False, **kwargs)


def queries(n=5):
    return torch.randn(n, 32, generator=torch.Generator().manual_seed(0))


def check_equal(retriever, index, k=5):
    assert len(retriever) == len(index)
    scores, found_rows = retriever.search(queries(), k)
    expected_scores, _ = index.search(queries(), k)  # rows of equal scores may change places
    np.testing.assert_allclose(scores, expected_scores, rtol=1e-5, atol=1e-5)
    products = (queries()[:, None] @ index.embeddings[found_rows].mT)[:, 0]
    np.testing.assert_allclose(scores, products, rtol=1e-5, atol=1e-5)
    rows = range(0, len(index), max(1, len(index) // 50))
    assert retriever.get_passages(rows) == index.get_passages(rows)


def count_calls(monkeypatch, then=None):
    """Record the methods that are called; `then(method, number of its calls)` runs before each call."""
    calls = []
    call = MilvusConnection.call

    def counted(self, method, *args, **kwargs):
        calls.append(method)
        if then is not None:
            then(method, calls.count(method))
        return call(self, method, *args, **kwargs)

    monkeypatch.setattr(MilvusConnection, "call", counted)
    return calls


# ------------------------------------------------------------------ interrupted uploads


# Where the upload goes, at which of six batches or after which request it is killed, how many batches are then sent
KILLED = [
    ("server", 1, "before", 6),
    ("server", 6, "before", 5),  # 5,000 passages have arrived, of which a request may have brought 4,096
    ("server", 6, "after", 5),
    ("file", 6, "after", 5),
    ("file", 0, "create_collection", 6),
    ("file", 0, "flush", 5),
]


@pytest.fixture(scope="module")
def killed(large, milvus_server, tmp_path_factory):
    """Return `(uri, collection)` of an upload of `large` that was killed, for each case."""
    uris = {"server": milvus_server.uri, "file": str(tmp_path_factory.mktemp("killed") / "passages.db")}
    targets, words = [], []
    for i, (where, batch, moment, _) in enumerate(KILLED):
        targets.append((uris[where], f"killed{i}"))
        words += [*targets[-1], str(batch), moment]
    _, folder = large
    command = [sys.executable, str(ROOT / "tests" / "support" / "upload_and_kill.py"), str(folder), *words]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert process.returncode == 0, process.stderr[-3000:]
    return targets


@pytest.mark.parametrize("case", range(len(KILLED)), ids=["-".join(map(str, case[:3])) for case in KILLED])
def test_an_upload_that_is_killed_is_resumed(large, killed, monkeypatch, case):
    index, _ = large
    uri, name = killed[case]
    *_, num_batches = KILLED[case]
    message = "the upload is not complete; call MilvusPassageIndex.from_index with the same index"
    with pytest.raises(ValueError, match=message):
        MilvusPassageIndex(uri, name)
    calls = count_calls(monkeypatch)
    retriever = MilvusPassageIndex.from_index(index, uri, name, show_progress_bar=False)
    assert "drop_collection" not in calls
    assert calls.count("upsert") == num_batches
    check_equal(retriever, index)
    retriever.close()
    check_equal(MilvusPassageIndex(uri, name), index)


def test_an_upload_of_another_index_is_not_resumed(large, index, the_model, milvus_server):
    upload(index, milvus_server, "other").close()
    connection = MilvusConnection(milvus_server.uri, "other")
    milvus_upload_cosup.set_properties(connection, complete="false")
    changed = the_model.build_index([{**PASSAGES[0], "text": "Changed."}, *PASSAGES[1:]], show_progress_bar=False)
    message = "'other' already exists and is not an unfinished upload of this index"
    for another, options in ((changed, {}), (large[0], {}), (index, {"index_type": "HNSW"})):
        with pytest.raises(FileExistsError, match=message):
            upload(another, milvus_server, "other", **options)
    check_equal(upload(index, milvus_server, "other"), index)


def test_an_upload_is_resumed_after_a_half_written_index_file(index, tmp_path):
    uri = tmp_path / "passages.db"
    retriever = MilvusPassageIndex.from_index(index, uri, "passages", show_progress_bar=False)
    milvus_upload_cosup.set_properties(retriever._milvus, complete="false")
    retriever.close()
    files = [*uri.rglob("*.idx"), *uri.rglob("*.sidx")]
    assert len(files) == 2
    for file in files:
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    check_equal(MilvusPassageIndex.from_index(index, uri, "passages", show_progress_bar=False), index)


def test_an_upload_survives_a_restart_of_the_server(large, tmp_path, monkeypatch):
    server = MilvusServer(tmp_path / "server").start()

    def restart(method, count):
        if (method, count) == ("upsert", 3):
            server.kill()
            threading.Timer(0.7, server.start).start()

    try:
        calls = count_calls(monkeypatch, restart)
        check_equal(upload(large[0], server, "restarted"), large[0])
        assert calls.count("upsert") == 6
    finally:
        server.kill()


def test_an_upload_that_lost_passages_does_not_count_as_complete(index, milvus_server, monkeypatch):
    call = MilvusConnection.call

    def call_and_lose_a_passage(self, method, *args, **kwargs):
        if method == "upsert":
            kwargs["data"] = kwargs["data"][1:]
        return call(self, method, *args, **kwargs)

    monkeypatch.setattr(MilvusConnection, "call", call_and_lose_a_passage)
    with pytest.raises(RuntimeError, match="there are 5 passages after the upload, expected 6"):
        upload(index, milvus_server, "lost")
    monkeypatch.undo()
    with pytest.raises(ValueError, match="the upload is not complete"):
        MilvusPassageIndex(milvus_server.uri, "lost")
    check_equal(upload(index, milvus_server, "lost"), index)


def test_another_collection_is_overwritten_only_on_request(index, the_model, milvus_server):
    smaller = the_model.build_index(PASSAGES[:2], show_progress_bar=False)
    upload(index, milvus_server, "taken")
    for again in (smaller, index):
        with pytest.raises(FileExistsError, match="'taken' already exists"):
            upload(again, milvus_server, "taken")
    check_equal(MilvusPassageIndex(milvus_server.uri, "taken"), index)
    check_equal(upload(smaller, milvus_server, "taken", overwrite=True), smaller, k=2)


def test_deleted_passages_are_not_uploaded_and_rows_keep_their_numbers(the_model, milvus_server):
    index = the_model.build_index(PASSAGES, shard_size=2, show_progress_bar=False)
    index.delete(["p1", "p5"])
    retriever = upload(index, milvus_server, "with_gaps")
    assert len(retriever) == 4
    assert retriever.rows_of(["p0", "p2", "p3", "p4"]).tolist() == [0, 2, 3, 4]
    candidates = [[0, 1, 5], None, None, None, None]
    scores, rows = retriever.search(queries(), 9, candidates)
    expected_scores, expected_rows = index.search(queries(), 9, candidates)
    np.testing.assert_allclose(scores, expected_scores, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(rows, expected_rows)
    retriever.add([PASSAGES[5]], the_model)
    assert retriever.rows_of(["p5"]).tolist() == [6]


# ------------------------------------------------------------------ a server that goes away


@pytest.fixture
def server(tmp_path):
    server = MilvusServer(tmp_path / "server").start()
    yield server
    server.kill()


@pytest.mark.parametrize(("code", "waits"), [(8, [10, 10, 10, 10, 10]), (103, [0.5, 1]), (106, [0.5]), (503, [0.5])])
def test_a_server_that_refuses_for_now_is_asked_again(monkeypatch, code, waits):
    """Code 8 is a rate limit: Milvus allows one flush of a collection in ten seconds."""
    refusals = [pymilvus.MilvusException(code, "not now")] * len(waits)

    class Client:
        def flush(self, collection, retry_times):
            if refusals:
                raise refusals.pop()
            return "done"

    waited = []
    monkeypatch.setattr(milvus_client_cosup.time, "sleep", waited.append)
    connection = MilvusConnection("http://127.0.0.1:9", "passages")
    connection._client = Client()
    assert connection.call("flush", "storing") == "done"
    assert waited == waits
    refusals.append(pymilvus.MilvusException(1100, "wrong"))
    with pytest.raises(OSError, match="failed while storing"):
        connection.call("flush", "storing")


def test_searches_go_on_when_the_server_comes_back(index, server):
    retriever = upload(index, server, "passages")
    for i in range(6):
        if i == 3:
            server.kill()
            timer = threading.Timer(0.7, server.start)
            timer.start()
        check_equal(retriever, index)
    timer.join()


def test_a_server_that_stays_away_is_a_clear_error(index, the_model, server):
    retriever = upload(index, server, "passages", max_retries=1)
    inputs = left_pad([[5, 6, the_model.config.nsp_token_id]], the_model.tokenizer.pad_token_id)
    assert the_model.generate(**inputs, retriever=retriever, max_new_tokens=2).shape[1] > 5
    server.kill()
    no_answer = f"Milvus at {server.uri}, collection 'passages': no answer to 2 attempts while "
    expected = f"{no_answer}(.|\n)*Check that the server runs"
    requests = [
        lambda: retriever.search(queries()),
        lambda: retriever.search(queries(1), candidates=[[0]]),
        lambda: retriever.get_passages([0]),
        lambda: retriever.rows_of(["p0"]),
        lambda: retriever.delete(["p0"]),
        lambda: MilvusPassageIndex(server.uri, "passages", max_retries=1),
    ]
    for request in requests:
        with pytest.raises(ConnectionError, match=expected):
            request()
    with pytest.raises(RetrievalError, match=expected):
        the_model.generate(**inputs, retriever=retriever, max_new_tokens=2)
    server.start()
    check_equal(retriever, index)


def test_a_server_that_goes_away_during_generation(index, the_model, server, tmp_path):
    """Finished answers are kept; when the server is back, the same call resumes."""
    retriever = upload(index, server, "passages", max_retries=1)
    prompts = [[5 + i, 6, 7 + i % 3, the_model.config.nsp_token_id] for i in range(9)]
    options = {"retriever": retriever, "max_new_tokens": 4, "batch_size": 2, "show_progress_bar": False}
    expected = the_model.generate_many(prompts, **options)
    search = retriever.search
    searches = []

    def search_until_the_fourth(*args, **kwargs):
        searches.append(1)
        if len(searches) == 4:
            server.kill()
        return search(*args, **kwargs)

    retriever.search = search_until_the_fourth
    with pytest.raises(RetrievalError, match="after [1-8] finished rows: Milvus at") as error:
        the_model.generate_many(prompts, output_file=tmp_path / "answers.jsonl", **options)
    finished = (tmp_path / "answers.jsonl").read_text().splitlines()
    assert len(finished) == len(error.value.finished) > 0
    assert isinstance(error.value.__cause__, ConnectionError)
    server.start()
    answers = the_model.generate_many(prompts, output_file=tmp_path / "answers.jsonl", **options)
    assert [answer.token_ids for answer in answers] == [answer.token_ids for answer in expected]
    assert (tmp_path / "answers.jsonl").read_text().splitlines()[: len(finished)] == finished


def test_load_index_opens_a_collection(index, the_model, server):
    upload(index, server, "passages")
    check_equal(the_model.load_index("passages", uri=server.uri), index)
    with pytest.raises(ValueError, match="  emb_seq: "):
        make_model(emb_seq_kwargs={"seed": 9}).load_index("passages", uri=server.uri)


def test_a_server_that_hangs_is_not_waited_for(index, server):
    patient = upload(index, server, "passages")
    # a busy machine uploads slowly, so only the search has a short timeout
    retriever = MilvusPassageIndex(server.uri, "passages", max_retries=0, timeout=5.0)
    server.process.send_signal(signal.SIGSTOP)
    # a busy machine delivers the signal late, and until then the server would answer
    os.waitpid(server.process.pid, os.WUNTRACED)
    with pytest.raises(ConnectionError, match="no answer to 1 attempts while searching"):
        retriever.search(queries())
    server.process.send_signal(signal.SIGCONT)
    check_equal(patient, index)


def test_an_interrupted_add_leaves_nothing(index, the_model, server, monkeypatch, caplog):
    new = [{"id": f"new{i}", "title": "", "text": f"radium {i}"} for i in range(3)]
    retriever = upload(index, server, "passages", max_retries=0)
    monkeypatch.setattr(milvus_upload_cosup, "MAX_REQUEST_ROWS", 1)

    def kill_at_the_second_batch(method, count):
        if (method, count) == ("upsert", 2):
            server.kill()

    count_calls(monkeypatch, kill_at_the_second_batch)
    with pytest.raises(ConnectionError, match="while writing passages"):
        retriever.add(new, the_model)
    monkeypatch.undo()
    server.start()

    retriever = MilvusPassageIndex(server.uri, "passages")
    assert len(retriever) == len(PASSAGES) + 1
    assert retriever.rows_of(["new0"]).tolist() == [6]
    retriever.add(new, the_model)  # removes new0 of the first attempt, so that no id occurs twice
    assert len(retriever) == len(PASSAGES) + 3
    assert retriever.rows_of(["new0", "new2"]).tolist() == [9, 11]
    with pytest.raises(IndexError, match="6"):
        retriever.get_passages([6])


# ------------------------------------------------------------------ opening


def test_a_collection_that_is_not_there(index, milvus_server):
    upload(index, milvus_server, "there")
    with pytest.raises(ValueError, match="collection 'missing': there is no such collection, only .*'there'"):
        MilvusPassageIndex(milvus_server.uri, "missing")


def test_a_collection_that_is_no_index(milvus_server):
    pymilvus.MilvusClient(milvus_server.uri).create_collection("foreign", dimension=4)
    message = "'foreign' is not a passage index: its properties have no cosup.format_version"
    with pytest.raises(ValueError, match=message):
        MilvusPassageIndex(milvus_server.uri, "foreign")


def test_another_format_version(index, milvus_server):
    upload(index, milvus_server, "future")
    milvus_upload_cosup.set_properties(MilvusConnection(milvus_server.uri, "future"), format_version="7")
    with pytest.raises(ValueError, match="has format_version 7, this release reads 1"):
        MilvusPassageIndex(milvus_server.uri, "future")


def test_an_alias_opens_like_a_name(index, milvus_server):
    upload(index, milvus_server, "version1")
    pymilvus.MilvusClient(milvus_server.uri).create_alias("version1", "current")
    check_equal(MilvusPassageIndex(milvus_server.uri, "current"), index)


@pytest.mark.parametrize("uri", ["passages", "passages.sqlite", ""])
def test_neither_server_nor_file(index, uri):
    with pytest.raises(ValueError, match="expected a server .* or a local file that ends in .db"):
        MilvusPassageIndex(uri, "passages")
    with pytest.raises(ValueError, match="expected a server"):
        MilvusPassageIndex.from_index(index, uri, "passages")


def test_a_file_that_is_not_there_is_not_made_by_opening_it(tmp_path):
    with pytest.raises(FileNotFoundError, match="missing.db"):
        MilvusPassageIndex(tmp_path / "missing.db", "passages")
    assert list(tmp_path.iterdir()) == []


OPEN_EACH_LINE = """
import sys
from modeling_cosup.milvus_cosup import MilvusPassageIndex

for uri in map(str.strip, sys.stdin):
    try:
        index = MilvusPassageIndex(uri, "passages")
        print(len(index), flush=True)
        index.close()
    except OSError as error:
        print(error, flush=True)
"""


def test_a_file_serves_one_process_at_a_time(index, tmp_path):
    uri = tmp_path / "deep" / "passages.db"
    first = MilvusPassageIndex.from_index(index, uri, "passages", show_progress_bar=False)
    second = MilvusPassageIndex(uri, "passages")
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "text": True}
    with subprocess.Popen([sys.executable, "-c", OPEN_EACH_LINE], env=environment, **pipes) as other:

        def open_elsewhere():
            print(uri, file=other.stdin, flush=True)
            return other.stdout.readline()

        first.close()
        check_equal(second, index)  # closing one leaves the other open
        answer = open_elsewhere()
        assert "Milvus cannot open" in answer
        assert "A local file serves one process at a time" in answer
        second.close()
        assert open_elsewhere() == "6\n"
        other.stdin.close()


def test_what_another_process_adds_is_found(index, the_model, milvus_server):
    writer = upload(index, milvus_server, "shared")
    reader = MilvusPassageIndex(milvus_server.uri, "shared")
    writer.add([{"id": "new", "title": "", "text": "radium"}], the_model)
    assert reader.rows_of(["new"]).tolist() == [6]
    assert reader[6]["text"] == "radium"
    assert reader.search(queries(1), candidates=[[6]])[1].tolist() == [[6]]
    with pytest.raises(ValueError, match=r"candidates\[0\] holds \[7\], which are not rows of this index \(0 to 6\)"):
        reader.search(queries(1), candidates=[[6, 7]])
    assert sorted(reader.search(queries(1), k=9)[1][0]) == list(range(7))
    assert len(reader) == 7


def test_an_index_that_was_empty_when_it_was_opened_is_searched(index, the_model, milvus_server):
    writer = upload(index, milvus_server, "emptied")
    writer.delete([passage["id"] for passage in PASSAGES])
    reader = MilvusPassageIndex(milvus_server.uri, "emptied")
    assert reader.search(queries(1))[1].shape == (1, 0)
    writer.add(PASSAGES[:1], the_model)
    assert reader.search(queries(1))[1].tolist() == [[6]]


def test_a_change_knows_the_ids_that_any_process_has_written(index, the_model, milvus_server, monkeypatch):
    retriever = upload(index, milvus_server, "levels")
    levels = []
    query = MilvusConnection.query

    def recorded(self, expression, fields, consistency_level="Session"):
        levels.append(consistency_level)
        return query(self, expression, fields, consistency_level)

    monkeypatch.setattr(MilvusConnection, "query", recorded)
    retriever.add([{"id": "new", "title": "", "text": "radium"}], the_model)
    retriever.delete(["new"])
    retriever.find(["p0"])
    assert levels == ["Strong", "Strong", "Session"]


# ------------------------------------------------------------------ limits


def test_long_texts_are_kept_whole_or_refused(the_model, milvus_server):
    longest = "é" * 32_767 + "x"  # 65,535 bytes
    whole = the_model.build_index([{"id": "long", "title": longest, "text": longest}], show_progress_bar=False)
    assert upload(whole, milvus_server, "long")[0] == whole[0]
    for field in ("title", "text", "id"):
        passage = {"id": "too long", "title": "", "text": "x", **{field: longest + "x"}}
        index = the_model.build_index([*PASSAGES, passage], show_progress_bar=False)
        with pytest.raises(ValueError, match=f"'{field}' has 65536 bytes, Milvus holds at most 65535"):
            upload(index, milvus_server, "too_long")
    assert not MilvusConnection(milvus_server.uri, "too_long").call("has_collection", "looking")


def test_too_many_token_ids_are_refused(milvus_server):
    model = make_model(max_passage_length=5000, emb_seq_kwargs={"max_position_embeddings": 6000})
    long = {"id": "long", "title": "", "text": "x " * 2048 + "x"}
    index = model.build_index([*PASSAGES, long], show_progress_bar=False)
    with pytest.raises(ValueError, match="Passage 'long' has 4097 token ids, Milvus holds at most 4096"):
        upload(index, milvus_server, "too_many")


def test_more_results_than_a_server_returns(large, milvus_server, monkeypatch):
    retriever = upload(large[0], milvus_server, "results")
    monkeypatch.setattr(milvus_cosup, "MAX_RESULTS", 1000)
    check_equal(retriever, large[0], k=1000)
    with pytest.raises(ValueError, match="k is 1001, but a Milvus server returns at most 1000 passages a query"):
        retriever.search(queries(), k=1001)
    _, rows = retriever.search(queries(1), k=2000, candidates=[np.arange(1500)])
    assert (rows[0, 1498:1501] == -1).tolist() == [False, False, True]


def test_a_large_pool_is_one_request_if_that_is_exact(large, milvus_server, monkeypatch):
    index, _ = large
    retriever = upload(index, milvus_server, "pools")
    hnsw = {"index_type": "HNSW", "index_params": {"M": 4, "efConstruction": 8}, "search_params": {"ef": 8}}
    approximate = upload(index, milvus_server, "approximate_pools", **hnsw)
    calls = count_calls(monkeypatch)
    for size, exact_request in ((512, "query"), (513, "search")):
        pool = np.arange(0, 5 * size, 5)
        products = (queries(1) @ index.embeddings[pool].T)[0].sort(descending=True).values[:7]
        for searched, request in ((retriever, exact_request), (approximate, "query")):
            scores, _ = searched.search(queries(1), 7, [pool])
            np.testing.assert_allclose(scores[0], products, rtol=1e-5, atol=1e-5)
            assert calls == [request]
            calls.clear()


def test_large_requests_are_sent_in_parts(large, milvus_server, monkeypatch):
    index = large[0]
    query_embeds = torch.randn(20, 32, generator=torch.Generator().manual_seed(1))
    pools = [None if i % 4 == 0 else np.arange(i, 300, i) for i in range(20)]
    expected = index.search(query_embeds, 3, candidates=pools)
    retriever = upload(index, milvus_server, "parts")
    for module in (milvus_client_cosup, milvus_cosup):
        monkeypatch.setattr(module, "MAX_REQUEST_BYTES", 4 * 32 * 2)
    calls = count_calls(monkeypatch)
    for part, expected_part in zip(retriever.search(query_embeds, 3, candidates=pools), expected, strict=True):
        np.testing.assert_allclose(part, expected_part, rtol=1e-5, atol=1e-5)
    assert calls.count("search") == 3  # five queries without a pool, two per request
    assert calls.count("query") > 100
    ids = [f"id {i}" for i in range(100)]
    assert retriever.rows_of(ids).tolist() == list(range(100))
    assert calls.count("query") > 105


def test_all_passages_of_a_batch_come_in_one_request(index, milvus_server, monkeypatch):
    retriever = upload(index, milvus_server, "one_request")
    calls = count_calls(monkeypatch)
    retriever.get_passages([0, 3, 5, 3])
    assert calls == ["query"]
    retriever.search(queries(4), candidates=[[0, 1], [1, 2], [5], [3]])
    assert calls == ["query", "query"]


# ------------------------------------------------------------------ packages


OPEN_WITHOUT_PYMILVUS = """
import sys
from modeling_cosup.milvus_cosup import MilvusPassageIndex

print("pymilvus" in sys.modules, "grpc" in sys.modules)
sys.modules["pymilvus"] = None
try:
    MilvusPassageIndex("http://localhost:19530", "x")
except ImportError as error:
    print(error)
try:
    MilvusPassageIndex.from_index(None, "x.db", "x")
except ImportError as error:
    print(error)
"""


def test_pymilvus_is_imported_when_it_is_needed_and_its_absence_says_what_to_install():
    command = [sys.executable, "-c", OPEN_WITHOUT_PYMILVUS]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    message = 'An index in Milvus needs pymilvus: pip install "cosup[milvus]".'
    assert result.stdout.splitlines() == ["False False", message, message], result.stderr[-2000:]
