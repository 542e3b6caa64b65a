"""Benchmarks, small: they run, and their arms give the same results, such as tokens that depend on the passages."""

import importlib.util
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from support.models import make_gen, make_tokenizer
from support.recipes import write_inputs

RECIPES = Path(__file__).parents[2] / "recipes"
SMALL = (
    "--shape tiny --device cpu --new_tokens 16 --batch_sizes 1 3 --repeats 1 --num_passages 60 --captured false"
    " --num_candidates 20 --index_size 90 --num_prompts 10 --rows_at_once 3"
).split()


@pytest.fixture
def benchmark(monkeypatch):
    """Import `recipes/benchmarks/generate.py` under another name, because `recipes/` has a generate.py too."""
    monkeypatch.setattr(sys, "path", [str(RECIPES / "benchmarks"), *sys.path])
    spec = importlib.util.spec_from_file_location("benchmark_of_generate", RECIPES / "benchmarks" / "generate.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    return module


def run(benchmark, monkeypatch, *argv):
    """Run the benchmark with these command-line arguments."""
    monkeypatch.setattr(sys, "argv", ["generate.py", *map(str, argv)])
    benchmark.main()


def columns(results, *names):
    """Return the values of these names in each result."""
    return [tuple(result[name] for name in names) for result in results]


def test_all_arms_write_the_same_tokens(benchmark, monkeypatch, tmp_path, capsys):
    run(benchmark, monkeypatch, *SMALL, "--output_file", tmp_path / "out.json")
    results = json.loads((tmp_path / "out.json").read_text())
    assert columns(results["part_1"], "batch", "rows_equal", "rows_compared") == [(1, 1, 1), (3, 2, 2)]
    arms = ["plain", "plain again", "CoSup, never retrieves", "CoSup, retrieves"]
    expected = [(size, arm, size) for size in (1, 3) for arm in arms]
    assert columns(results["part_2"], "batch", "arm", "rows_equal") == expected
    for result in results["part_2"]:
        if result["arm"] == "CoSup, retrieves":
            assert 0 < sum(result["parts"].values()) < result["seconds"]["max"]
    assert columns(results["part_3"], "batch", "index_size") == [(1, 90), (3, 90)]
    assert all(0 < result["share_of_search"]["min"] < 1 for result in results["part_3"])
    assert columns(results["part_4"], "arm", "rows_equal") == [("fixed batches", 10), ("generate_many", 10)]
    printed = capsys.readouterr().out
    headings = [
        "Against the original's algorithm",
        "Against plain gen.generate",
        "Exact search among 90 x 64",
        "A queue against fixed batches of 3",
    ]
    assert printed.count("random weights, shape tiny, float32, seed 0, ") == 4
    assert all(heading in printed for heading in headings)


def test_a_given_gen(benchmark, monkeypatch, tmp_path):
    make_gen("qwen3").save_pretrained(tmp_path / "gen")
    make_tokenizer().save_pretrained(tmp_path / "gen")
    options = ["--gen", tmp_path / "gen", "--parts", 1, 4, "--batch_sizes", 2, "--output_file", tmp_path / "out.json"]
    run(benchmark, monkeypatch, *SMALL, *options)
    results = json.loads((tmp_path / "out.json").read_text())
    assert columns(results["part_1"], "rows_equal") == [(2,)]
    assert columns(results["part_4"], "rows_equal") == [(10,), (10,)]


@pytest.mark.parametrize("package", ["faiss", "no faiss"])
def test_other_passages_give_other_tokens(benchmark, monkeypatch, package):
    import decoding_arms

    if package == "no faiss":
        monkeypatch.setattr(decoding_arms, "faiss", None)
    script = benchmark.BenchmarkArguments(shape="tiny", new_tokens=16, num_passages=60)
    world = benchmark.World(script, torch.device("cpu"))
    index, (prompt,), plan = world.index(60), world.prompts(1), world.plan(1).tolist()[0]
    last_tokens = []
    for id in ("p1", "p2"):
        pool = index.get_passages(index.rows_of([id]))
        original = decoding_arms.original_generate(world, prompt, plan, pool, world.embed(pool))
        assert world.retrieve(world.model, [prompt], index, [[id]]) == [original]
        positions = [position for position, token in enumerate(original) if token == world.config.nsp_token_id]
        assert len(positions) == script.retrievals
        passage_ids = pool[0]["input_ids"]
        start = positions[0] + 1
        assert original[start : start + len(passage_ids)] == passage_ids
        last_tokens.append(original[-4:])
    assert last_tokens[0] != last_tokens[1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--shape", "1b"], "--shape is '1b', expected one of tiny, 135m, 7b"),
        (
            ["--shape", "tiny", "--new_tokens", "7"],
            "--new_tokens is 7, expected 4 or more for each of the 2 retrievals",
        ),
        (
            ["--shape", "tiny", "--num_candidates", "9", "--num_passages", "8"],
            "--num_candidates is 9, expected at most the 8 passages",
        ),
        (
            ["--shape", "tiny", "--parts", "4", "--num_prompts", "9999", "--num_passages", "60"],
            "9999 prompts that begin differently need as many tokens",
        ),
        (["--dtype", "int8"], "--dtype is 'int8', expected float32, bfloat16 or float16"),
        (["--output_file", "nowhere/out.json"], "--output_file nowhere/out.json: its folder does not exist"),
        (["--shape", "tiny", "--parts", "5"], "--parts holds 5, expected 1, 2, 3 or 4"),
    ],
)
def test_bad_options_are_reported(benchmark, monkeypatch, options, message):
    with pytest.raises(SystemExit, match=message):
        run(benchmark, monkeypatch, "--device", "cpu", *options)


def test_the_peak_is_the_fastest_product(monkeypatch):
    """With a clock that says how long each product takes, the peak is known."""
    monkeypatch.setattr(sys, "path", [str(RECIPES / "benchmarks"), *sys.path])
    import measuring

    ticks = iter([0, 4, 10, 12, 20, 28, 30, 33])  # products of 8 x 8 take 4 s and 2 s, of 16 x 16 8 s and 3 s
    monkeypatch.setattr(measuring.Clock, "now", lambda self: next(ticks))
    peak = measuring.matmul_peak(torch.device("cpu"), torch.float32, sizes=(8, 16), repeats=2)
    assert peak == 2 * 16**3 / 3


def test_the_costs_of_towers_belong_to_the_arm(monkeypatch, tmp_path):
    """The parts run here in this process, with a Gen of 2 layers: what is counted in bytes is known."""
    monkeypatch.setattr(sys, "path", [str(RECIPES / "benchmarks"), *sys.path])
    import towers

    inputs = write_inputs(tmp_path)
    script = towers.TowersArguments(
        gen=str(inputs / "gen"),
        train_file=str(inputs / "train.jsonl"),
        corpus_file=str(inputs / "corpus.jsonl"),
        eval_file=str(inputs / "eval.jsonl"),
        steps=2,
        batch_size=4,
        micro_batch_size=2,
        num_questions=2,
        max_new_tokens=4,
        num_threads=1,
    )
    costs = {}
    for name in towers.ARMS:
        costs[name] = {}
        for part in (towers.train, towers.embed, towers.answer_questions):
            costs[name] |= part(name, script, str(tmp_path / name))
    two, tied, separate = costs.values()
    assert two["parameters"] == separate["parameters"] == 2 * tied["parameters"]
    assert two["checkpoint_bytes"] > 1.8 * tied["checkpoint_bytes"]  # headers are not halved
    assert two["index_bytes"] == tied["index_bytes"] >= 32 * 4
    assert all(values["answers_per_second"] > 0 and values["seconds_per_step"] > 0 for values in costs.values())


def test_the_arms_of_distillation_agree(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(sys, "path", [str(RECIPES / "benchmarks"), *sys.path])
    monkeypatch.setattr(
        sys, "argv", ["distillation.py", "--quick", "true", "--output_file", str(tmp_path / "out.json")]
    )
    import distillation

    distillation.main()
    results = json.loads((tmp_path / "out.json").read_text())
    assert [(row["tokens"], row["answer_rows"]) for row in results["recording"]] == [
        (34, 2),
        (37, 5),
        (47, 2),
        (50, 5),
    ]
    assert all(row["error"] < 1e-6 for row in results["recording"])
    assert all(row["error"] < 1e-5 for row in results["perplexity"])
    (crowded,) = results["candidates"]
    assert crowded["rows"] == {"every mention": 12, "distinct passages": 4}  # all of the pool
    assert results["refresh"]["error"] < 1e-5
    assert results["refresh"]["arms"]["embedding"]["times_baseline"]["median"] == 1.0
    assert "passages / s" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--sections", "speed"], "--sections holds 'speed', expected some of recording, perplexity"),
        (["--device", "tpu"], "--device is 'tpu', expected cpu or cuda"),
        (["--num_candidates", "5"], "--num_candidates has fewer than two numbers"),
    ],
)
def test_bad_options_of_distillation_are_reported(monkeypatch, options, message):
    monkeypatch.setattr(sys, "path", [str(RECIPES / "benchmarks"), *sys.path])
    monkeypatch.setattr(sys, "argv", ["distillation.py", *options])
    import distillation

    with pytest.raises(SystemExit, match=message):
        distillation.main()


HEAD = b"HTTP/1.1 200 OK\r\n"
CHUNKED = HEAD + b"transfer-encoding: chunked\r\n\r\n"
MESSAGE = {"content": "He did.", "retrievals": [{"passages": [{"id": "p1"}]}]}
ANSWER = json.dumps({"choices": [{"message": MESSAGE}], "usage": {"completion_tokens": 4}}).encode()


def chunk(text):
    """Return a chunk of HTTP."""
    return f"{len(text):x}\r\n{text}\r\n".encode()


EVENT_1 = chunk('data: {"choices":[{"delta":{"content":"He "}}]}\n\n')
EVENT_2 = chunk(
    'data: {"choices":[{"delta":{"content":"did.","retrievals":[{"passages":[{"id":"p1"}]}]}}]}\n\n'
    'data: {"choices":[],"usage":{"completion_tokens":4}}\n\ndata: [DONE]\n\n'
)


def test_a_loaded_server_answers_like_generate_many(monkeypatch, tmp_path, capsys):
    pytest.importorskip("uvicorn", reason="serves")
    monkeypatch.setattr(sys, "path", [str(RECIPES / "benchmarks"), *sys.path])
    argv = ["server_load.py", "--quick", "true", "--output_file", str(tmp_path / "out.json")]
    monkeypatch.setattr(sys, "argv", argv)
    import server_load

    server_load.main()
    results = json.loads((tmp_path / "out.json").read_text())
    assert [results[section]["faults"] for section in server_load.SECTIONS] == [[], [], []]
    assert columns(results["throughput"]["arms"], "arm") == [("generate_many",), ("served",), ("served, streamed",)]
    assert columns(results["latency"]["loads"], "clients", "answers") == [(1, 2), (6, 12)]
    sent, finished = results["soak"]["sent"], results["soak"]["finished"]
    assert sum(sent.values()) >= 6
    assert all(sent[kind] == finished[kind] for kind in ("plain", "streamed") if kind in sent)
    assert results["soak"]["resident_bytes"]
    assert "x generate_many" in capsys.readouterr().out


def test_an_answer_that_is_lost_or_mixed_up_is_a_fault(monkeypatch):
    pytest.importorskip("uvicorn", reason="serves")
    monkeypatch.setattr(sys, "path", [str(RECIPES / "benchmarks"), *sys.path])
    import server_load

    from server_clients import Outcome

    service = object.__new__(server_load.Service)
    service.questions = ["who?"]
    service.answers = [SimpleNamespace(text="He did.", num_generated_tokens=4, retrievals=[])]
    right = {"question": 0, "kind": "plain", "finished": True, "text": "He  did.", "tokens": 4}
    outcomes = [
        Outcome(**right),
        Outcome(question=0, kind="disconnected"),
        Outcome(**right | {"text": "She did."}),
        Outcome(**right | {"tokens": 5}),
        Outcome(**right | {"passages": [["p1"]]}),
        Outcome(question=0, kind="streamed"),
        Outcome(question=0, kind="cancelled", error="status 500"),
    ]
    assert len(service.faults(outcomes)) == 5
    assert service.faults(outcomes[:2]) == []


@pytest.mark.parametrize(
    ("parts", "kind", "text", "error"),
    [
        ([HEAD + f"Content-Length: {len(ANSWER)}\r\n\r\n".encode(), ANSWER[:20], ANSWER[20:]], "plain", "He did.", ""),
        ([CHUNKED, EVENT_1, EVENT_2, b"0\r\n\r\n"], "streamed", "He did.", ""),
        ([CHUNKED, EVENT_1, b"0\r\n\r\n"], "streamed", "He ", "the stream ended without [DONE]"),
        ([b"HTTP/1.1 429 X\r\ncontent-length: 4\r\n\r\nfull"], "plain", "", "status 429: full"),
        # a head, and the last chunk, in two reads
        ([CHUNKED[:20], CHUNKED[20:], EVENT_1, EVENT_2, b"0\r\n", b"\r\n"], "streamed", "He did.", ""),
        ([b"HTTP/1.1 429 X\r\ncont", b"ent-length: 10\r\n\r\n", b"full queue"], "plain", "", "status 429: full"),
    ],
)
def test_clients_read_answers_after_the_load(monkeypatch, parts, kind, text, error):
    monkeypatch.setattr(sys, "path", [str(RECIPES / "benchmarks"), *sys.path])
    from server_clients import Exchange, Outcome, is_complete, read

    received = [(float(seconds), part) for seconds, part in enumerate(parts, 11)]
    assert [is_complete(received[: i + 1]) for i in range(len(parts))] == [False] * (len(parts) - 1) + [True]
    exchange = Exchange(Outcome(0, kind), start=10, received=received, is_complete=True)
    read(exchange)
    outcome = exchange.outcome
    assert (outcome.text, outcome.finished) == (text, not error)
    assert error in outcome.error
    assert outcome.first_token == (parts.index(EVENT_1) + 1 if kind == "streamed" and not error else None)
    if not error:
        assert (outcome.passages, outcome.tokens) == ([["p1"]], 4)


@pytest.mark.parametrize(
    "response", [CHUNKED + EVENT_1 + b"0\r\n\r\n", HEAD + b"content-length: 10\r\n\r\nfull queue"]
)
def test_a_response_ends_with_its_last_byte_however_it_is_read(monkeypatch, response):
    monkeypatch.setattr(sys, "path", [str(RECIPES / "benchmarks"), *sys.path])
    from server_clients import is_complete

    bytewise = [(0.0, response[i : i + 1]) for i in range(len(response))]
    assert [is_complete(bytewise[: i + 1]) for i in range(len(response))] == [False] * (len(response) - 1) + [True]
    for split in range(1, len(response)):
        parts = [(0.0, response[:split]), (0.0, response[split:])]
        assert (is_complete(parts[:1]), is_complete(parts)) == (False, True)


def test_an_answer_without_text_has_no_time_to_its_first_text(monkeypatch):
    pytest.importorskip("uvicorn", reason="serves")
    monkeypatch.setattr(sys, "path", [str(RECIPES / "benchmarks"), *sys.path])
    import server_load

    from server_clients import Exchange, Outcome, read

    role = chunk('data: {"choices":[{"delta":{"role":"assistant","content":""}}]}\n\ndata: [DONE]\n\n')
    exchange = Exchange(Outcome(0, "streamed", total=5), 10, [(15.0, CHUNKED + role + b"0\r\n\r\n")], is_complete=True)
    read(exchange)
    empty = exchange.outcome
    assert (empty.finished, empty.first_token) == (True, None)
    with_text = Outcome(1, "streamed", finished=True, first_token=2.0, total=3.0)
    result = server_load.latencies([empty, with_text])
    assert (result["answers"], result["with_text"]) == (2, 1)
    assert result["first_token"] == {"p50": 2.0, "p95": 2.0}
    assert result["total"] == pytest.approx({"p50": 4.0, "p95": 4.9})
    assert server_load.latency_cells(server_load.latencies([empty])) == ["—", "—", "5000", "5000"]


def test_folders_of_documents_have_their_size(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", [str(RECIPES / "benchmarks"), *sys.path])
    import documents

    num_files = documents.write_documents(tmp_path, 400_000, seed=0)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) == num_files
    assert sum(path.stat().st_size for path in files) == pytest.approx(400_000, rel=0.5)
    assert {path.suffix for path in files} == {".txt", ".md", ".html"}
