"""
The engine over vLLM servers, against a stand-in for them: its own logic, and what it does when a server fails.

The stand-in speaks vLLM's two endpoints over real HTTP, but is not vLLM; `test_real_vllm.py` needs a real one.
"""

import asyncio
import threading
import time
from contextlib import ExitStack, aclosing

import httpx
import numpy as np
import pytest
import torch
from safetensors import safe_open

from modeling_cosup import RetrievalConfig
from modeling_cosup.tokenization_cosup import encode_passages_for_emb_seq, encode_prompt, encode_texts, query_length
from support.models import PASSAGES, make_model, make_tokenizer
from support.served_answers import alone, check_answer, check_logprobs, make_parts, requests_of
from support.serving import running_server
from support.vllm_server import StandIn, running

from serving import vllm_checks, vllm_client
from serving.api import ApiSettings
from serving.arguments import ServeArguments
from serving.engine import (
    BackendFailed,
    DeadlineExceeded,
    GenerationRequest,
    QueueFull,
    RetrievalEvent,
    SearchFailed,
    ShuttingDown,
    TokenEvent,
    UnsupportedSetting,
)
from serving.served_model import ServedModel
from serving.vllm_engine import VllmEngine, model_without_weights


class World:
    """A model, its folder and index, and servers of its parts."""

    def __init__(self, folder, model, index, stack):
        self.model = model
        self.index = index
        model.save_pretrained(folder)
        self.bare_model = model_without_weights(folder)
        self.servers = {}
        for name, part in (("gen", "gen"), ("query", "gen"), ("encoder", "emb_seq")):
            self.servers[name] = stack.enter_context(running(StandIn(model, part)))

    def stand_in(self, name):
        return self.servers[name].stand_in

    def engine(self, index=None, **options):
        urls = {f"{name}_url": server.url for name, server in self.servers.items()}
        return VllmEngine(self.bare_model, index or self.index, **{**urls, **options})

    def run(self, test, start=True, **options):
        """Run `test(engine)` with an engine of these servers."""

        async def serve():
            engine = self.engine(**options)
            try:
                if start:
                    await engine.start()
                return await asyncio.wait_for(test(engine), 60)
            finally:
                await engine.stop(drain=False)
                assert (engine.load().running, engine.load().waiting) == (0, 0)

        for server in self.servers.values():
            server.stand_in.bodies.clear()
            server.stand_in.sessions.clear()
            server.stand_in.faults.clear()
        return asyncio.run(serve())

    def request(self, budget=4, text="who?", **settings):
        names = RetrievalConfig.__annotations__
        retrieval = RetrievalConfig(**{name: settings.pop(name) for name in list(settings) if name in names})
        return GenerationRequest(encode_prompt(self.model.tokenizer, text), budget, retrieval, **settings)

    def ends(self):
        return self.model.generation_config.eos_token_id


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    with ExitStack() as stack:
        yield World(tmp_path_factory.mktemp("model"), *make_parts("llama"), stack)


@pytest.fixture
def slow_world(world):
    """A world whose Gen takes 5 ms for a token."""
    world.stand_in("gen").seconds_per_token = 0.005
    yield world
    world.stand_in("gen").seconds_per_token = 0.0


@pytest.fixture(autouse=True)
def quick_retries(monkeypatch):
    monkeypatch.setattr(vllm_client, "FIRST_WAIT", 0.001)


async def events_of(engine, request):
    events = []
    async with aclosing(engine.generate(request)) as groups:
        async for group in groups:
            events += group
    return events


async def nothing(engine):
    pass


# ---------------------------------------------------------------------- answers


@torch.no_grad()
def test_prompts_at_once_equal_generate(world):
    requests = requests_of(world.model, 13, can_mask=False)

    async def test(engine):
        return await asyncio.gather(*[events_of(engine, request) for request in requests])

    answers = world.run(test, max_running=16)
    assert world.stand_in("gen").most_running > 3
    outputs = [alone(world.model, world.index, request) for request in requests]
    for request, events, output in zip(requests, answers, outputs, strict=True):
        check_answer(events, request, output, world.ends())
        if request.num_logprobs is not None and request.retrieval.forget_passages is None:
            check_logprobs(world.model, events, request, output)
    assert sum(len(output.retrievals[0]) for output in outputs) > 5
    assert {body["stream"] for body in world.stand_in("gen").bodies} == {True, False}


def test_streamed_equals_not_streamed(world):
    requests = [world.request(12, force_nsp_first=True, incremental=incremental) for incremental in (True, False)]

    async def test(engine):
        return [await events_of(engine, request) for request in requests]

    streamed, whole = world.run(test)
    assert streamed == whole
    assert len([event for event in streamed if isinstance(event, TokenEvent)]) > 3


@pytest.mark.parametrize(("top_k", "expected"), [(None, 50), (0, 0), (7, 7)])
def test_sampling_settings_reach_the_server_and_each_piece_has_its_seed(world, monkeypatch, top_k, expected):
    monkeypatch.setattr(world.bare_model.generation_config, "top_k", top_k)
    request = world.request(6, force_nsp_first=True, temperature=0.7, top_p=0.9, seed=5, max_retrievals=1)
    world.run(lambda engine: events_of(engine, request))
    body = world.stand_in("gen").bodies[1]  # after the check of the start
    assert (body["temperature"], body["top_p"], body["seed"]) == (0.7, 0.9, 6)  # [NSP] was decided before
    assert body["bad_words"] == ["[Cs]", "[NSP]"]
    assert body["ignore_eos"] and body["top_k"] == expected


def test_all_requests_of_an_answer_have_one_session(world):
    request = world.request(30, "Curie", force_nsp_first=True)

    async def test(engine):
        await events_of(engine, request)
        await events_of(engine, request)

    world.run(test)
    sessions = {}
    for name in ("gen", "query"):
        sessions[name] = [header for header in world.stand_in(name).sessions if header]
    assert len(set(sessions["gen"])) == 2
    assert set(sessions["query"]) == set(sessions["gen"])
    assert len(sessions["gen"]) > 2


@torch.no_grad()
def test_embeddings_are_those_of_the_model(world):
    async def test(engine):
        return await engine.embed_queries(["who?", "Curie"]), await engine.embed_passages(PASSAGES)

    (queries, num_query_tokens), (passages, num_passage_tokens) = world.run(test)
    rows = encode_passages_for_emb_seq(world.model.emb_seq_tokenizer, PASSAGES, world.model.config)
    assert num_passage_tokens == sum(map(len, rows))
    prompts = [encode_prompt(world.model.tokenizer, text) for text in ("who?", "Curie")]
    assert num_query_tokens == sum(map(len, prompts)) + 2  # the [NSP]s
    assert np.abs(passages - world.index.embeddings.numpy()).max() < 1e-5
    for text, embed in zip(["who?", "Curie"], queries, strict=True):
        ids = [*encode_prompt(world.model.tokenizer, text), world.model.config.nsp_token_id]
        assert np.abs(embed - world.model(torch.tensor([ids])).query_embeds[0].numpy()).max() < 1e-5


@pytest.mark.parametrize(
    "settings",
    [
        {"tie_emb_seq": True, "emb_head_size": 24, "similarity": "dot"},
        {"query_from": "emb_seq", "emb_seq_kwargs": {"hidden_size": 48}, "truncate_dim": 16},
        {
            "query_from": "emb_seq",
            "emb_seq_tokenizer": make_tokenizer(vocab_size=300, texts=["who?"]),  # knows no id of [NSP]
            "emb_seq_kwargs": {"vocab_size": 310, "max_position_embeddings": 48},  # less than Gen reads
            "max_passage_length": 40,
        },
    ],
    ids=["tied", "emb_seq", "emb_seq with its own tokenizer"],
)
@torch.no_grad()
def test_queries_of_other_kinds_of_models(tmp_path, settings):
    with ExitStack() as stack:
        world = World(tmp_path, *make_parts("llama", **settings), stack)
        if world.model.config.query_from == "emb_seq":
            world.servers["query"] = world.servers["encoder"]
        request = world.request(12, "who? " * 20, force_nsp_first=True, output_query_embeds=True)

        async def test(engine):
            assert engine.context_length == 512
            return await events_of(engine, request), await engine.embed_queries(["who? " * 20])

        events, queries = world.run(test)
    prompt = [*request.prompt_ids, world.model.config.nsp_token_id]
    embedded = ServedModel(world.model).embed_queries([prompt])
    assert queries.embeds == pytest.approx(embedded.embeds, abs=1e-4)
    num_tokens = len(prompt)
    if "max_passage_length" in settings:
        num_tokens = query_length(world.model.emb_seq_tokenizer, world.model.config)  # cut
        assert num_tokens < len(prompt)
    assert queries.num_tokens == embedded.num_tokens == num_tokens
    output = alone(world.model, world.index, request)
    check_answer(events, request, output, world.ends())
    query_embed = next(event.retrieval.query_embed for event in events if isinstance(event, RetrievalEvent))
    assert query_embed == pytest.approx(output.retrievals[0][0].query_embed, abs=1e-4)


@torch.no_grad()
def test_the_api_over_this_engine(world):
    """Answers and failures go through the API as they do with the embedded engine."""
    settings = ApiSettings("tiny", world.model.generation_config)
    body = {"model": "tiny", "prompt": "who?", "max_tokens": 12, "temperature": 0}
    body |= {"retrieval": {"force_nsp_first": True, "max_retrievals": 1}}
    with running_server(world.engine(), settings) as url, httpx.Client(base_url=f"{url}/v1") as client:
        answer = client.post("/completions", json=body).json()
        world.stand_in("query").faults.append("400")
        failure = client.post("/completions", json=body)
        refusal = client.post("/completions", json={**body, "retrieval": {"forget_passages": "mask"}})
    retrieval = RetrievalConfig(force_nsp_first=True, max_retrievals=1)
    prompt = encode_texts(world.model.tokenizer, ["who?"])[0]
    output = alone(world.model, world.index, GenerationRequest(prompt, 12, retrieval))
    assert answer["usage"]["completion_tokens"] == int(output.num_generated_tokens)
    assert answer["choices"][0]["retrievals"][0]["passages"] == output.retrievals[0][0].passages
    assert (failure.status_code, failure.json()["error"]["code"]) == (502, "backend_failed")
    assert refusal.status_code == 400
    assert "forget_passages is 'mask'" in refusal.json()["error"]["message"]


# ---------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"forget_passages": "mask"}, "forget_passages is 'mask', which needs the embedded engine"),
        ({"num_logprobs": 21}, "num_logprobs is 21, expected at most 20"),
        ({"temperature": -1.0}, "temperature is -1.0"),
        ({"candidates": [["p99"]]}, "^candidates: .*p99"),
        ({"passages": [[{"text": " "}]]}, "^passages: .*text is only white space"),
    ],
)
def test_bad_settings_are_refused_by_name(world, settings, message):
    with pytest.raises(UnsupportedSetting, match=message):
        world.run(lambda engine: events_of(engine, world.request(**settings)), start=False)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gen_url": "127.0.0.1:8000"}, "gen_url is '127.0.0.1:8000', expected the URL of a vLLM server"),
        ({"query_url": "http://127.0.0.1:8000"}, "query_url is 'http://127.0.0.1:8000'"),
        ({"max_running": 0}, "max_running is 0, expected at least 1"),
        ({"num_retries": -1}, "num_retries is -1"),
    ],
)
def test_bad_options_are_refused(world, options, message):
    with pytest.raises(ValueError, match=message):
        world.engine(**options)


def test_given_passages_are_prepared_in_one_thread_even_after_a_request_is_cancelled(world):
    """A tokenizer has state: another thread than the event loop's uses a copy of it, one request after the other."""
    request = world.request(passages=[["p0", {"text": "given"}]])

    async def test(engine):
        assert engine.lookup.model.tokenizer._tokenizer is not engine.tokenizer._tokenizer
        prepare, release, threads, running, most = engine.lookup.prepare_row, threading.Event(), set(), set(), []

        def prepare_row(row):
            threads.add(threading.get_ident())
            running.add(id(row))
            most.append(len(running))
            release.wait(20)
            prepare(row)
            running.remove(id(row))

        engine.lookup.prepare_row = prepare_row
        first = asyncio.create_task(events_of(engine, request))
        while not most:
            await asyncio.sleep(0.001)  # the event loop goes on
        first.cancel()
        await asyncio.wait({first})
        second = asyncio.create_task(events_of(engine, request))
        await asyncio.sleep(0.1)
        release.set()
        assert await second
        assert most == [1, 1]
        assert len(threads) == 1 and threading.get_ident() not in threads

    world.run(test)


def test_urls_belong_to_this_engine():
    with pytest.raises(ValueError, match="--encoder_url is of --engine vllm"):
        ServeArguments(model="out", encoder_url="http://127.0.0.1:8003/v1")
    with pytest.raises(ValueError, match="--engine vllm needs --query_url"):
        ServeArguments(model="out", engine="vllm", gen_url="http://127.0.0.1:8001/v1")


@pytest.mark.parametrize(
    ("part", "name", "value", "message"),
    [
        ("generation_config", "no_repeat_ngram_size", 3, "no_repeat_ngram_size=3 is not available with vLLM"),
        ("generation_config", "typical_p", 0.9, "typical_p=0.9 is not available with vLLM"),
        ("generation_config", "encoder_repetition_penalty", 1.2, "encoder_repetition_penalty=1.2 is not available"),
        ("generation_config", "suppress_tokens", [7], r"suppress_tokens=\[7\] is not available with vLLM"),
        ("generation_config", "suppress_tokens", ["[NSP]"], r"suppress_tokens=\[\d+\] is not available with vLLM"),
        ("config", "query_from", "query_encoder", "query_from='query_encoder' is not available with vLLM"),
        ("config", "nsp_token_id", None, "The model has no control tokens"),
        ("config", "max_passage_length", 7, "This index was built by another model"),
    ],
)
def test_settings_of_the_checkpoint_that_do_not_fit(world, monkeypatch, part, name, value, message):
    if value == ["[NSP]"]:
        value = [world.model.config.nsp_token_id]
    monkeypatch.setattr(getattr(world.bare_model, part), name, value)
    with pytest.raises(ValueError, match=message):
        world.engine()


def test_servers_of_other_models_are_recognised(world):
    other = make_model(gen_kwargs={"seed": 5, "tie_word_embeddings": False}, emb_seq_kwargs={"seed": 6})
    wide = make_model(gen_kwargs={"hidden_size": 48}, emb_seq_kwargs={"hidden_size": 48})

    def error_with(name, model, part="gen"):
        with running(StandIn(model, part)) as server, pytest.raises((ValueError, OSError)) as caught:
            world.run(nothing, **{f"{name}_url": server.url})
        return str(caught.value)

    assert "do not serve the Gen of this checkpoint" in error_with("gen", other)
    assert "do not serve the Gen of this checkpoint" in error_with("query", other)
    assert "embeddings of width 48, expected 32" in error_with("query", wide)
    assert "does not serve the Emb_seq that made the index" in error_with("encoder", other, "emb_seq")


def test_a_query_server_of_another_emb_seq_is_recognised(tmp_path):
    """It has the same width, and the index shows the difference; one that reads too little is refused too."""
    emb_seq = {"hidden_size": 48, "max_position_embeddings": 128}
    settings = {"query_from": "emb_seq", "max_passage_length": 60}
    other = make_model(emb_seq_kwargs={**emb_seq, "seed": 6}, **settings)
    with ExitStack() as stack:
        world = World(tmp_path, *make_parts("llama", emb_seq_kwargs=emb_seq, **settings), stack)
        server = stack.enter_context(running(StandIn(other, "emb_seq")))
        with pytest.raises(ValueError, match="--query_url does not serve the Emb_seq that made the index"):
            world.run(nothing, query_url=server.url)
        server = world.servers["encoder"]
        world.run(nothing, query_url=server.url)
        for gen_length, longest in ((512, 128), (100, 100)):  # as much as Emb_seq can read, or as Gen reads
            world.stand_in("gen").max_model_len = gen_length
            server.stand_in.max_model_len = longest
            world.run(nothing, query_url=server.url)
            server.stand_in.max_model_len = longest - 1
            message = f"--query_url reads {longest - 1} tokens, but a query may have {longest}"
            with pytest.raises(ValueError, match=message):
                world.run(nothing, query_url=server.url)


def test_an_encoder_that_is_too_short_for_a_passage_is_refused(world, monkeypatch):
    longest = world.model.config.max_passage_length + 2
    monkeypatch.setattr(world.stand_in("encoder"), "max_model_len", longest)
    world.run(nothing)
    monkeypatch.setattr(world.stand_in("encoder"), "max_model_len", longest - 1)
    with pytest.raises(ValueError, match=f"--encoder_url reads {longest - 1} tokens, but a passage may .* {longest}"):
        world.run(nothing)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("no logprobs", "--gen_url sent what is no answer of vLLM"),
        ("too many logprobs", "--gen_url sent what is no answer of vLLM"),
        ("nan", "log-probabilities of the next token differ by nan"),
        ("401", r"refused \(401\): .*VLLM_API_KEY"),
    ],
)
def test_a_server_that_answers_otherwise_is_refused_at_the_start(world, fault, message):
    async def test(engine):
        world.stand_in("gen").faults.append(fault)
        await engine.start()

    with pytest.raises((ValueError, ConnectionError), match=message):
        world.run(test, start=False)


def test_of_the_lm_head_only_the_rows_of_the_probe_are_read(world, monkeypatch):
    class Opened:
        def __init__(self, *args, **kwargs):
            self.weights = safe_open(*args, **kwargs)

        def __enter__(self):
            return self

        def __exit__(self, *error):
            pass

        def keys(self):
            return self.weights.keys()

        def get_slice(self, name):
            return self.weights.get_slice(name)

    monkeypatch.setattr(vllm_checks, "safe_open", Opened)  # it reads no whole weight
    world.run(nothing)


def test_servers_that_do_not_answer_are_named(world):
    with pytest.raises(OSError, match="--query_url does not answer: .*http://127.0.0.1:1/v1"):
        world.run(nothing, query_url="http://127.0.0.1:1/v1")


# ---------------------------------------------------------------------- what fails


@pytest.mark.parametrize(("name", "fault"), [("gen", "500"), ("gen", "429"), ("query", "503")])
def test_temporary_failures_are_tried_again(world, name, fault):
    request = world.request(8, force_nsp_first=True)

    async def test(engine):
        expected = await events_of(engine, request)
        world.stand_in(name).faults += [fault] * 3
        assert await events_of(engine, request) == expected
        world.stand_in(name).faults += [fault] * 4
        with pytest.raises(BackendFailed, match=rf"{name}_url refused \({fault}\)"):
            await events_of(engine, request)

    world.run(test)


@pytest.mark.parametrize(
    ("name", "fault", "message"),
    [
        ("gen", "400", r"--gen_url refused \(400\): as the test wants"),
        ("gen", "garbage", "--gen_url sent malformed JSON"),
        ("gen", "error", "--gen_url: the engine is dead"),
        ("gen", "cut", "In the middle of an answer: --gen_url does not answer"),
        ("query", "400", r"--query_url refused \(400\)"),
        ("query", "garbage", "--query_url sent malformed JSON"),
        ("query", "nan", "--query_url sent embeddings that are not finite"),
    ],
)
def test_other_failures_end_the_answer_and_no_other(world, name, fault, message):
    request = world.request(8, force_nsp_first=True)

    async def test(engine):
        expected = await events_of(engine, request)
        num_bodies = len(world.stand_in(name).bodies)
        world.stand_in(name).faults.append(fault)
        events = []
        with pytest.raises(BackendFailed, match=message):
            async for group in engine.generate(request):
                events += group
        assert len(world.stand_in(name).bodies) == num_bodies + 1  # not sent again
        assert [type(event) for event in events] == [type(event) for event in expected[: len(events)]]
        assert await events_of(engine, request) == expected

    world.run(test)


def test_a_slow_server_counts_as_gone(world):
    async def test(engine):
        world.stand_in("gen").faults.append("slow")
        with pytest.raises(BackendFailed, match="--gen_url does not answer: ReadTimeout"):
            await events_of(engine, world.request(forbid_nsp=True, incremental=False))

    world.run(test, timeout=0.3, num_retries=0)


def test_a_killed_server_fails_its_answers_and_serves_again_once_it_is_back(slow_world):
    server = slow_world.servers["gen"]
    request = slow_world.request(200, forbid_nsp=True)

    async def test(engine):
        events = []
        with pytest.raises(BackendFailed, match="In the middle of an answer: --gen_url"):
            async for group in engine.generate(request):
                events += group
                if len(events) == 3:
                    await asyncio.to_thread(server.kill)
        try:
            assert not await engine.is_healthy()
            with pytest.raises(BackendFailed, match="--gen_url does not answer"):
                await events_of(engine, request)
        finally:
            server.start()
        assert await engine.is_healthy()
        assert (await events_of(engine, slow_world.request(4, forbid_nsp=True)))[:3] == events[:3]

    slow_world.run(test)


@torch.no_grad()
def test_a_failing_search_fails_its_own_request(world):
    class Breaking:
        """Breaks off if row 2 is among the candidates."""

        def __getattr__(self, name):
            return getattr(world.index, name)

        def search(self, query_embeds, k=1, candidates=None):
            if any(2 in rows for rows in candidates):
                raise OSError("the index refused")
            return world.index.search(query_embeds, k=k, candidates=candidates)

    ids = ["p1", "p2", "p3", "p2", "p1"]
    requests = [world.request(6, force_nsp_first=True, candidates=[[id]]) for id in ids]

    async def test(engine):
        answers = [events_of(engine, request) for request in requests]
        return await asyncio.gather(*answers, return_exceptions=True)

    answers = world.run(test, index=Breaking(), encoder_url=None)
    for id, request, answer in zip(ids, requests, answers, strict=True):
        if id == "p2":
            assert isinstance(answer, SearchFailed)
            assert str(answer) == "The index cannot be searched (OSError)."  # clients learn no more
        else:
            check_answer(answer, request, alone(world.model, world.index, request), world.ends())


def test_searches_that_wait_at_the_same_moment_share_one(world, monkeypatch):
    sizes = []
    search = world.index.search

    def counted(query_embeds, **options):
        sizes.append(len(query_embeds))
        time.sleep(0.03)
        return search(query_embeds, **options)

    monkeypatch.setattr(world.index, "search", counted)
    requests = [world.request(2, force_nsp_first=True, max_retrievals=1)] * 12

    async def test(engine):
        await asyncio.gather(*[events_of(engine, request) for request in requests])

    world.run(test, encoder_url=None)
    assert sum(sizes) == 12
    assert len(sizes) < 8


# ---------------------------------------------------------------------- many requests


def test_the_queue_is_bounded_and_a_closed_request_frees_its_slot(slow_world):
    async def test(engine):
        long = slow_world.request(200, forbid_nsp=True)
        running = engine.generate(long)
        await anext(running)
        waiting = asyncio.create_task(events_of(engine, slow_world.request(2, forbid_nsp=True)))
        await asyncio.sleep(0.01)
        assert (engine.load().running, engine.load().waiting) == (1, 1)
        with pytest.raises(QueueFull):
            await events_of(engine, long)
        await running.aclose()
        assert len(await waiting) == 3
        deadline = time.monotonic() + 5
        while slow_world.stand_in("gen").num_running:  # until the server sees that the connection was closed
            assert time.monotonic() < deadline
            await asyncio.sleep(0.01)

    slow_world.run(test, max_running=1, max_waiting=1)


def test_embeddings_wait_in_the_same_queue(world):
    async def test(engine):
        embeddings = [asyncio.create_task(engine.embed_queries(["who?"])) for _ in range(2)]
        await asyncio.sleep(0)
        assert (engine.load().running, engine.load().waiting) == (0, 2)
        message = "0 answers and 2 embeddings run or wait, of at most 2"
        with pytest.raises(QueueFull, match=message):
            await engine.embed_queries(["who?"])
        with pytest.raises(QueueFull, match=message):
            await events_of(engine, world.request(2, forbid_nsp=True))
        assert [result.embeds.shape for result in await asyncio.gather(*embeddings)] == [(1, 32)] * 2

    world.run(test, max_running=1, max_waiting=1)


@pytest.mark.parametrize("incremental", [True, False])
def test_deadlines(slow_world, incremental):
    async def test(engine):
        deadline = time.monotonic() + 0.1
        request = slow_world.request(200, forbid_nsp=True, incremental=incremental, deadline=deadline)
        with pytest.raises(DeadlineExceeded):
            await events_of(engine, request)

    slow_world.run(test)


def test_stopping_ends_an_answer_whose_client_is_slow(slow_world):
    async def test(engine):
        async with aclosing(engine.generate(slow_world.request(20, forbid_nsp=True))) as running:
            await anext(running)
            stopping = asyncio.create_task(engine.stop(drain=False))
            await asyncio.sleep(0)
            with pytest.raises(ShuttingDown):  # though nothing ran for it at that moment
                await anext(running)
        await stopping

    slow_world.run(test)


@pytest.mark.parametrize("drain", [True, False])
def test_stopping_finishes_or_ends_what_runs(slow_world, drain):
    request = slow_world.request(20, forbid_nsp=True)

    async def test(engine):
        running = asyncio.create_task(events_of(engine, request))
        await asyncio.sleep(0.03)
        await engine.stop(drain=drain)
        with pytest.raises(ShuttingDown):
            await events_of(engine, request)
        assert not await engine.is_healthy()
        if drain:
            assert len(await running) == 21
        else:
            with pytest.raises(ShuttingDown):
                await running

    slow_world.run(test)


@pytest.mark.parametrize("drain", [True, False])
def test_stopping_finishes_or_ends_embeddings(world, drain):
    async def test(engine):
        embedding = asyncio.create_task(engine.embed_passages(PASSAGES))
        while len(world.stand_in("encoder").bodies) < 2:  # one was of the start
            await asyncio.sleep(0)
        await engine.stop(drain=drain)
        with pytest.raises(ShuttingDown):
            await engine.embed_passages(PASSAGES)
        if drain:
            assert np.abs((await embedding).embeds - world.index.embeddings.numpy()).max() < 1e-5
        else:
            with pytest.raises(ShuttingDown):
                await embedding

    world.run(test)


def test_a_client_that_leaves_as_its_slot_is_free_takes_none_along(world):
    async def test(engine):
        async def wait_for_a_slot():
            async with engine._slot(None):
                pass

        for num_turns in range(8):  # of the event loop, between the free slot and the end of the request
            async with engine._slot(None):
                waiting = asyncio.create_task(wait_for_a_slot())
                while not engine.load().waiting:
                    await asyncio.sleep(0)
            for _ in range(num_turns):
                await asyncio.sleep(0)
            waiting.cancel()
            await asyncio.gather(waiting, return_exceptions=True)
            assert not engine._slots.locked(), num_turns

    world.run(test, start=False, max_running=1)
