"""The process that decodes for a server: its answers are those of generate(), and it does not outlive the server."""

import asyncio
import json
import multiprocessing
import os
import signal
import threading
from dataclasses import replace
from multiprocessing import Pipe
from pickle import PicklingError
from types import SimpleNamespace

import numpy as np
import pytest

from modeling_cosup import CoSupForCausalLM, RetrievalConfig
from modeling_cosup.metadata_cosup import MAX_METADATA_DEPTH
from modeling_cosup.tokenization_cosup import encode_passages_for_emb_seq
from support.served_answers import alone, check_answer, make_parts, requests_of

from serving import embedded_engine
from serving.api import ApiSettings, build_app
from serving.decoding_process import DecodingProcess, _decode, _obey
from serving.embedded_engine import EmbeddedEngine
from serving.engine import BackendFailed, GenerationRequest, RetrievalEvent, ShuttingDown, UnsupportedSetting
from serving.errors import from_engine
from serving.running import EngineServer, open_socket
from serving.served_model import ServedModel

DEEPEST = "[" * MAX_METADATA_DEPTH + "]" * MAX_METADATA_DEPTH


def load(folder):
    """Load what the process serves."""
    model = CoSupForCausalLM.from_pretrained(folder / "model")
    return ServedModel(model, model.load_index(folder / "index"), max_running=4)


async def events_of(engine, request):
    events = []
    async for group in engine.generate(request):
        events += group
    return events


def take_final_ends(events, trace):
    """Give grounded spans their ends, which are not known yet when an event is sent."""
    retrievals = [event.retrieval for event in events if isinstance(event, RetrievalEvent)]
    for retrieval, final in zip(retrievals, trace, strict=True):
        retrieval.grounded_span = (retrieval.grounded_span[0], final.grounded_span[1])


def test_answers_and_a_killed_process(tmp_path):
    """One process: its answers, embeddings and refusals, then its death in mid-answer, which ends the server."""
    model, index = make_parts("gpt2")
    model.save_pretrained(tmp_path / "model")
    index.save_pretrained(tmp_path / "index")
    engine = EmbeddedEngine(DecodingProcess(load, tmp_path))
    server = EngineServer(build_app(engine, ApiSettings("tiny")), engine)

    async def test():
        serving = asyncio.create_task(server.serve([open_socket("127.0.0.1", 0)]))
        while not server.started:
            await asyncio.sleep(0.01)
        requests = requests_of(model, 12)
        answers = await asyncio.gather(*[events_of(engine, request) for request in requests])
        for request, events in zip(requests, answers, strict=True):
            output = alone(model, index, request)
            if request.incremental:
                take_final_ends(events, output.retrievals[0])
            check_answer(events, request, output, model.generation_config.eos_token_id)
        embeds, num_tokens = await engine.embed_passages([index[0]])
        (row,) = encode_passages_for_emb_seq(model.emb_seq_tokenizer, [index[0]], model.config)
        assert num_tokens == len(row)
        np.testing.assert_allclose(embeds, index.embeddings[:1], atol=1e-5)
        passages = ["p1", {"id": "mine", "text": "given", "metadata": {"page": 3, "deep": json.loads(DEEPEST)}}]
        given = RetrievalConfig(passages=[passages], force_nsp_first=True, top_k=2, max_retrievals=1)
        request = replace(requests[0], retrieval=given, incremental=False)
        events = await events_of(engine, request)
        check_answer(events, request, alone(model, index, request), model.generation_config.eos_token_id)
        (retrieval,) = [event.retrieval for event in events if isinstance(event, RetrievalEvent)]
        assert (retrieval.passages[0]["id"], retrieval.passages[1]) == ("p1", {"title": "", **passages[1]})
        unknown = replace(requests[0], retrieval=RetrievalConfig(candidates=[["nowhere"]]))
        with pytest.raises(UnsupportedSetting, match=r"^candidates: .*nowhere") as refused:
            await events_of(engine, unknown)
        assert from_engine(refused.value).param == "retrieval.candidates"
        with pytest.raises((AttributeError, PicklingError)):  # of one caller, whose request cannot be pickled
            await events_of(engine, replace(requests[0], seed=lambda: None))
        assert await events_of(engine, replace(requests[0], max_new_tokens=1))

        endless = GenerationRequest(requests[0].prompt_ids, 400, RetrievalConfig(forbid_nsp=True))
        given_up = asyncio.create_task(events_of(engine, endless))
        while engine.load().running != 1:
            await asyncio.sleep(0.002)
        given_up.cancel()
        while engine.load().running:
            await asyncio.sleep(0.002)
        running = [asyncio.create_task(events_of(engine, endless)) for _ in range(6)]
        while engine.load().running != 4:
            await asyncio.sleep(0.002)
        os.kill(engine.decoding.pid, signal.SIGTERM)  # as a terminal or systemd may: the server alone decides
        os.kill(engine.decoding.pid, signal.SIGINT)
        assert await engine.is_healthy()
        os.kill(engine.decoding.pid, signal.SIGSTOP)  # a process that hangs ends all the same
        engine.decoding.give_up()
        for outcome in await asyncio.gather(*running, return_exceptions=True):
            assert isinstance(outcome, BackendFailed)
        assert not await engine.is_healthy()
        with pytest.raises(BackendFailed, match="exit code -9"):
            await events_of(engine, endless)
        await serving

    with pytest.raises(ChildProcessError, match="The decoding process ended with exit code -9"):
        asyncio.run(asyncio.wait_for(test(), 60))
    with pytest.raises(ProcessLookupError):  # no zombie is left
        os.kill(engine.decoding.pid, 0)


def test_a_process_that_hangs_holds_the_event_loop_up_in_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(embedded_engine, "_LAST_SECONDS", 0.2)
    model, index = make_parts("gpt2")
    model.save_pretrained(tmp_path / "model")
    index.save_pretrained(tmp_path / "index")
    engine = EmbeddedEngine(DecodingProcess(load, tmp_path))

    async def test():
        await engine.start()
        os.kill(engine.decoding.pid, signal.SIGSTOP)
        # many times what a pipe holds
        requests = [GenerationRequest([7] * 2000, 1) for _ in range(100)]
        answers = [asyncio.create_task(events_of(engine, request)) for request in requests]
        while engine.load().waiting < len(requests):
            await asyncio.sleep(0.002)
        assert await engine.is_healthy()
        for answer in answers[:50]:
            answer.cancel()
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(engine.stop(), 0.1)
        await engine.stop(drain=False)
        for outcome in await asyncio.gather(*answers[50:], return_exceptions=True):
            assert isinstance(outcome, ShuttingDown)

    # if the event loop stood still, so would its own timeout
    killer = threading.Timer(60, engine.decoding._process.kill)
    killer.start()
    try:
        asyncio.run(test())
        assert engine.decoding._process.exitcode == -signal.SIGKILL and killer.is_alive()
    finally:
        killer.cancel()
    engine.decoding._sending.join(10)
    assert not engine.decoding._sending.is_alive()


def test_a_process_whose_server_ends_does_not_load_its_model(monkeypatch):
    ended = threading.Event()
    monkeypatch.setattr(signal, "signal", lambda *args: None)
    monkeypatch.setattr(multiprocessing, "parent_process", lambda: SimpleNamespace(join=lambda: None))  # has ended
    monkeypatch.setattr(os, "_exit", lambda status: ended.set())

    def load():
        assert ended.wait(10)
        raise ValueError("too late")

    ours, theirs = Pipe()
    _decode(theirs, load)
    assert isinstance(ours.recv(), ValueError)


class Unpicklable(Exception):
    def __init__(self, first, second):
        super().__init__(first)


def test_an_error_of_the_start_reaches_the_server(monkeypatch):
    def fail(error):
        raise error

    ours, theirs = Pipe()
    monkeypatch.setattr(signal, "signal", lambda *args: None)
    for error, expected in ((ValueError("no model"), "no model"), (Unpicklable("a", "b"), "Unpicklable: a")):
        _decode(theirs, fail, error)
        received = ours.recv()
        assert isinstance(received, Exception) and str(received) == expected


def test_a_request_that_cannot_be_prepared_fails_alone():
    class Thread:
        refused = []

        def submit(self, number, request):
            raise RuntimeError("a bug")

        def refuse(self, number, error):
            self.refused.append((number, type(error), str(error)))

        def stop(self):
            raise SystemExit

    ours, theirs = Pipe()
    for call in (("submit", (7, None)), ("stop", ())):
        ours.send(call)
    with pytest.raises(SystemExit):
        _obey(theirs, Thread())
    assert Thread.refused == [(7, BackendFailed, "The request could not be prepared (RuntimeError).")]


def test_a_process_without_its_server_ends(monkeypatch):
    ours, theirs = Pipe()
    ours.close()

    def end(status):
        raise SystemExit(status)

    monkeypatch.setattr(os, "_exit", end)
    with pytest.raises(SystemExit):
        _obey(theirs, None)
