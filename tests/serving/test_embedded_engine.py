"""The embedded engine: refusals, cancellation, deadlines, a full queue, failures of a part, and its end."""

import asyncio
import gc
import math
import pickle
import threading
import time
import weakref
from contextlib import aclosing
from unittest.mock import Mock

import numpy as np
import pytest
import torch

from modeling_cosup import RetrievalConfig, lookup_cosup
from modeling_cosup.packing_cosup import pad_rows
from modeling_cosup.tokenization_cosup import encode_passages_for_emb_seq, encode_prompt
from support.models import PASSAGES, make_model

from serving import embedded_engine
from serving.embedded_engine import EmbeddedEngine, _Stream
from serving.engine import (
    BackendFailed,
    DeadlineExceeded,
    EndEvent,
    GenerationRequest,
    QueueFull,
    RetrievalEvent,
    SearchFailed,
    ShuttingDown,
    TokenEvent,
    UnsupportedSetting,
)


@pytest.fixture(scope="module")
def model():
    return make_model("llama")


@pytest.fixture(scope="module")
def index(model):
    return model.build_index(PASSAGES, show_progress_bar=False)


def request(model, budget=4, text="who?", **settings):
    retrieval = {name: settings.pop(name) for name in list(settings) if name in RetrievalConfig.__annotations__}
    prompt = encode_prompt(model.tokenizer, text)
    return GenerationRequest(prompt, budget, RetrievalConfig(**retrieval), **settings)


def long_request(model, **settings):
    """Return a request that is answered until it is cancelled, for the time of a test."""
    return request(model, 400, forbid_nsp=True, **settings)


async def events_of(engine, request):
    events = []
    async for group in engine.generate(request):
        events += group
    return events


async def until_load(engine, running, waiting):
    """Wait until so many requests run and wait."""
    async with asyncio.timeout(60):
        while (engine.load().running, engine.load().waiting) != (running, waiting):
            await asyncio.sleep(0.002)


def run(test, *parts, **options):
    """Run `test(engine)` while an engine of these parts serves."""

    async def serve():
        engine = EmbeddedEngine.in_thread(*parts, **options)
        await engine.start()
        try:
            await asyncio.wait_for(test(engine), 60)
        finally:
            await engine.stop(drain=False)
        assert not engine._streams
        assert not await engine.is_healthy()

    asyncio.run(serve())


# ---------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"budget": 0}, "max_new_tokens is 0, expected an integer, 1 or more"),
        ({"budget": 1.5}, "max_new_tokens is 1.5"),
        ({"temperature": -1}, "temperature is -1, expected a number, 0 or more"),
        ({"temperature": math.nan}, "temperature is nan"),
        ({"top_p": 0.0}, "top_p is 0"),
        ({"top_p": 1.1}, "top_p is 1.1, expected a number from 0 to 1"),
        ({"seed": 2**64}, "seed is 18446744073709551616"),
        ({"num_logprobs": -1}, "num_logprobs is -1"),
        ({"candidates": [["p1", "nowhere"]]}, "candidates: .*nowhere"),
        ({"candidates": [["p1"], ["p2"]]}, "candidates has 2 entries, expected one"),
        ({"passages": [["nowhere"]]}, "passages: .*nowhere"),
        ({"passages": [[{"title": "no text"}]]}, "passages: .*text"),
    ],
)
def test_bad_settings_are_refused_by_name(model, index, settings, message):
    with pytest.raises(UnsupportedSetting, match=f"^{message}"):
        EmbeddedEngine.in_thread(model, index).check(request(model, **settings))


def test_prompts_that_cannot_be_continued_are_refused(model, index):
    engine = EmbeddedEngine.in_thread(model, index)
    engine.check(GenerationRequest([5] * 511, 4))
    for ids, message in (([], "is empty"), ([5] * 512, "has 512 tokens, but Gen reads 512"), ([400], "400 to 400")):
        with pytest.raises(UnsupportedSetting, match=f"^prompt_ids .*{message}"):
            engine.check(GenerationRequest(ids, 4))


def test_what_needs_an_index_is_refused_without_one(model):
    engine = EmbeddedEngine.in_thread(model)
    by_id = {"passages": [[PASSAGES[0], "p1"]]}
    for settings in ({"force_nsp_first": True}, {"candidates": [["p1"]]}, by_id, {**by_id, "forbid_nsp": True}):
        with pytest.raises(UnsupportedSetting, match=f"^{next(iter(settings))}: this server has no index"):
            engine.check(request(model, **settings))
    engine.check(request(model, force_nsp_first=True, passages=[[PASSAGES[0]]]))


def test_the_event_loop_and_the_decoding_thread_do_not_share_a_tokenizer(model, index):
    engine = EmbeddedEngine.in_thread(model, index)
    assert engine.tokenizer._tokenizer is not model.tokenizer._tokenizer
    assert engine.decoding.served.lookup.model.tokenizer is engine.tokenizer
    assert encode_prompt(engine.tokenizer, "who? [NSP]") == encode_prompt(model.tokenizer, "who? [NSP]")


def test_candidates_and_passages_are_prepared_once_for_all_answers_of_a_body(model, index, monkeypatch):
    encode = Mock(wraps=lookup_cosup.encode_passages_for_gen)
    monkeypatch.setattr(lookup_cosup, "encode_passages_for_gen", encode)
    engine = EmbeddedEngine.in_thread(model, index)
    body = request(model, passages=[[PASSAGES[0]]])
    rows = [engine.decoding.served.row(body) for _ in range(3)]
    assert encode.call_count == 1
    assert [row.given_passages[0]["id"] for row in rows] == [PASSAGES[0]["id"]] * 3
    engine.decoding.served.row(pickle.loads(pickle.dumps(body)))  # as from another process
    assert encode.call_count == 1
    other = engine.decoding.served.row(request(model, candidates=[["p2"]]))
    assert other.given_passages is None and other.candidates.tolist() == index.rows_of(["p2"]).tolist()
    assert engine.decoding.served.row(body).candidates is None and encode.call_count == 2
    assert engine.decoding.served.row(request(model)).given_passages is None


def test_limits_and_parts_are_checked(model, index):
    for name, value in (("max_running", 0), ("max_waiting", -1), ("max_batch_tokens", 0)):
        with pytest.raises(ValueError, match=f"{name} is {value}"):
            EmbeddedEngine.in_thread(model, index, **{name: value})
    other = make_model("llama", emb_seq_kwargs={"seed": 5})
    with pytest.raises(ValueError, match="built by another model"):
        asyncio.run(EmbeddedEngine.in_thread(other, index).start())


# ---------------------------------------------------------------------- requests come and go


def test_a_closed_request_frees_its_slot_at_the_next_step(model, index):
    async def test(engine):
        steps = 0
        step = engine.decoding._decoder.step

        def counted_step():
            nonlocal steps
            steps += 1
            return step()

        engine.decoding._decoder.step = counted_step
        second = None
        async with aclosing(engine.generate(long_request(model))) as groups:
            async for _ in groups:
                second = asyncio.create_task(events_of(engine, request(model, 3, forbid_nsp=True)))
                await until_load(engine, 1, 1)
                break
        closed_at = steps
        assert len(await second) == 4
        assert steps <= closed_at + 1 + 3  # the pass under way, and those of the second request
        assert (engine.load().running, engine.load().waiting) == (0, 0)

    run(test, model, index, max_running=1)


def test_a_waiting_request_can_be_cancelled(model, index):
    async def test(engine):
        first = asyncio.create_task(events_of(engine, long_request(model)))
        second = asyncio.create_task(events_of(engine, request(model)))
        third = asyncio.create_task(events_of(engine, request(model)))
        await until_load(engine, 1, 2)
        second.cancel()
        await until_load(engine, 1, 1)
        first.cancel()
        assert isinstance((await third)[-1], EndEvent)

    run(test, model, index, max_running=1)


def test_a_full_queue_refuses_and_says_when_to_try_again(model, index):
    async def test(engine):
        tasks = [asyncio.create_task(events_of(engine, long_request(model))) for _ in range(3)]
        await until_load(engine, 1, 2)
        with pytest.raises(QueueFull, match="3 answers and 0 embeddings run or wait, of at most 3") as refusal:
            await events_of(engine, request(model))
        assert 1 <= refusal.value.retry_after <= 60
        tasks[2].cancel()
        await asyncio.sleep(0)
        engine.check(request(model))
        last = asyncio.create_task(events_of(engine, request(model)))
        for task in tasks:
            task.cancel()
        assert isinstance((await last)[-1], EndEvent)

    run(test, model, index, max_running=1, max_waiting=2)


def test_deadlines_of_running_and_waiting_requests(model, index):
    async def test(engine):
        begin = time.monotonic()
        requests = [long_request(model, deadline=begin + after, incremental=False) for after in (0.2, 0.1, -1.0)]
        outcomes = await asyncio.gather(*[events_of(engine, request) for request in requests], return_exceptions=True)
        assert [type(outcome) for outcome in outcomes] == [DeadlineExceeded] * 3
        assert time.monotonic() - begin < 5
        assert isinstance((await events_of(engine, request(model, deadline=time.monotonic() + 60)))[-1], EndEvent)

    run(test, model, index, max_running=1)


def test_a_client_that_reads_slowly_gets_everything_and_holds_nobody_up(model, index):
    async def test(engine):
        groups = []
        async for group in engine.generate(request(model, 30, forbid_nsp=True)):
            groups.append(group)
            if len(groups) == 1:
                await events_of(engine, request(model, 60, forbid_nsp=True))
        assert len(groups) <= 4  # what came meanwhile comes together
        assert [type(event) for group in groups for event in group] == [TokenEvent] * 30 + [EndEvent]

    run(test, model, index)


def test_the_next_row_has_room_before_later_ones(model, index):
    """A long request is not overtaken by short ones for which there would be room."""

    async def test(engine):
        ended = []

        async def answer(name, request):
            await events_of(engine, request)
            ended.append(name)

        async with asyncio.TaskGroup() as group:
            group.create_task(answer("first", request(model, 60, forbid_nsp=True)))
            group.create_task(answer("long", request(model, 180, forbid_nsp=True)))
            for number in range(4):
                group.create_task(answer(f"short {number}", request(model, 1, forbid_nsp=True)))
        assert ended[:2] == ["first", "long"]  # there was room for short ones next to the first
        assert engine.decoding._decoder.cache.rows * engine.decoding._decoder.cache.columns <= 256

    run(test, model, index, max_batch_tokens=256)


def test_a_client_that_leaves_as_news_come_is_not_missed(model, index):
    async def test(engine):
        stream = _Stream(0)
        for num_turns in range(4):  # of the event loop, between the news and the end of the request
            waiting = asyncio.create_task(engine._wait_for_news(stream, time.monotonic() + 60))
            await asyncio.sleep(0.01)
            stream.news.set()
            for _ in range(num_turns):
                await asyncio.sleep(0)
            was_waiting = waiting.cancel()
            await asyncio.gather(waiting, return_exceptions=True)
            assert waiting.cancelled() == was_waiting, num_turns

    run(test, model, index)


def test_an_answer_has_no_more_context_than_there_is_room_for(model, index):
    async def test(engine):
        assert engine.context_length == 40
        long = long_request(model)
        engine.check(long)
        end = (await events_of(engine, long))[-1]
        assert end == EndEvent("length", 40 - len(long.prompt_ids))
        with pytest.raises(UnsupportedSetting, match="has 40 tokens, but Gen reads 40"):
            engine.check(GenerationRequest([5] * 40, 1))

    run(test, model, index, max_batch_tokens=40)
    assert EmbeddedEngine.in_thread(model, index, max_batch_tokens=10**6).context_length == 512


def test_nothing_of_finished_requests_is_kept(model, index):
    async def test(engine):
        decoder = engine.decoding._decoder
        rows = []
        submit = decoder.submit

        def watched_submit(row):
            rows.append(weakref.ref(row))
            submit(row)

        decoder.submit = watched_submit
        sizes = []  # of the cache, in columns of all rows
        shrink = decoder.cache.shrink

        def watched_shrink(rows, columns):
            sizes.append(decoder.cache.rows * decoder.cache.columns)
            shrink(rows, columns)

        decoder.cache.shrink = watched_shrink
        await asyncio.gather(*[events_of(engine, request(model, 200, forbid_nsp=True)) for _ in range(2)])
        assert sizes[0] >= 2 * 212
        for _ in range(3):
            requests = [request(model, 2, force_nsp_first=True, seed=1, temperature=1.0) for _ in range(8)]
            await asyncio.gather(*[events_of(engine, request) for request in requests])
        await events_of(engine, request(model, 1, forbid_nsp=True))
        gc.collect()
        assert len(rows) == 27
        assert not [row for row in rows[:-1] if row() is not None]
        assert max(sizes) <= 8 * 256
        assert not engine.decoding._tickets and not decoder.finished
        assert decoder.cache.rows * decoder.cache.columns <= 4 * 64
        assert decoder.cache.keys[0].shape[:1] + decoder.cache.keys[0].shape[2:3] == decoder.cache.positions.shape

    run(test, model, index, max_running=8)


# ---------------------------------------------------------------------- what fails


class FailingIndex:
    """An index that cannot be searched among the passages of `p3`."""

    def __init__(self, index):
        self.index = index
        self.searches = 0

    def __getattr__(self, name):
        return getattr(self.index, name)

    def search(self, query_embeds, k=1, candidates=None):
        self.searches += 1
        if any(rows is not None and 3 in rows for rows in candidates or []):
            raise OSError("https://key@host refused")
        return self.index.search(query_embeds, k, candidates)


def test_a_failing_search_fails_its_own_request(model, index):
    failing_index = FailingIndex(index)

    async def test(engine):
        good = request(model, 6, force_nsp_first=True, max_retrievals=1)
        expected = await events_of(engine, good)
        bad = request(model, 6, force_nsp_first=True, candidates=[["p3"]])
        requests = [good, bad, good, bad, request(model, 6, forbid_nsp=True)]
        outcomes = await asyncio.gather(*[events_of(engine, request) for request in requests], return_exceptions=True)
        for outcome in (outcomes[1], outcomes[3]):
            assert isinstance(outcome, SearchFailed)
            assert str(outcome) == "The index cannot be searched (OSError)."  # no address, no key
        for outcome in (outcomes[0], outcomes[2]):
            assert isinstance(outcome[0], RetrievalEvent)
            assert outcome[1:] == expected[1:]
        assert len(outcomes[4]) == 7
        assert failing_index.searches > 2
        assert (engine.load().running, engine.load().waiting) == (0, 0)
        assert isinstance((await events_of(engine, good))[-1], EndEvent)

    run(test, model, failing_index)


def test_a_pass_that_breaks_off_fails_its_requests_and_the_engine_goes_on(model, index, monkeypatch):
    async def test(engine):
        expected = await events_of(engine, request(model, 5))
        forward = model.gen.base_model.forward

        def no_memory(*args, **kwargs):
            raise torch.OutOfMemoryError("no memory left")

        running = [asyncio.create_task(events_of(engine, long_request(model))) for _ in range(2)]
        waiting = asyncio.create_task(events_of(engine, request(model, 5)))
        await until_load(engine, 2, 1)
        monkeypatch.setattr(model.gen.base_model, "forward", no_memory)
        for task in running:
            with pytest.raises(BackendFailed, match="OutOfMemoryError"):
                await task
            monkeypatch.setattr(model.gen.base_model, "forward", forward)
        # the waiting request may have been admitted before the model worked again
        outcome = (await asyncio.gather(waiting, return_exceptions=True))[0]
        assert isinstance(outcome, BackendFailed) or outcome == expected
        assert await events_of(engine, request(model, 5)) == expected
        assert await engine.is_healthy()

    run(test, model, index, max_running=2)


def test_an_engine_whose_passes_all_break_off_is_ill_for_a_while(model, index, monkeypatch):
    async def test(engine):
        def broken(*args, **kwargs):
            raise RuntimeError("device-side assert")

        async def fails():
            with pytest.raises(BackendFailed, match="RuntimeError"):
                await events_of(engine, request(model))

        forward = model.gen.base_model.forward
        monkeypatch.setattr(model.gen.base_model, "forward", broken)
        for healthy in (True, True, False):
            await fails()
            assert await engine.is_healthy() == healthy
        monkeypatch.setattr(embedded_engine, "_RECOVERY", 0.2)
        while not await engine.is_healthy():  # without a request
            await asyncio.sleep(0.01)
        monkeypatch.setattr(embedded_engine, "_RECOVERY", 30)
        assert time.monotonic() - engine._last_crash >= 0.2
        await fails()
        assert not await engine.is_healthy()  # one more is enough
        monkeypatch.setattr(model.gen.base_model, "forward", forward)
        await events_of(engine, request(model))
        assert await engine.is_healthy()

    run(test, model, index)


# ---------------------------------------------------------------------- the end


@pytest.mark.parametrize("drain", [True, False])
def test_stopping_finishes_or_cancels_what_was_accepted(model, index, drain):
    async def serve():
        engine = EmbeddedEngine.in_thread(model, index, max_running=1)
        with pytest.raises(ShuttingDown, match="not started"):
            await events_of(engine, request(model))
        await engine.start()
        with pytest.raises(RuntimeError, match="started before"):
            await engine.start()
        tasks = [asyncio.create_task(events_of(engine, request(model, 40, forbid_nsp=True))) for _ in range(2)]
        await until_load(engine, 1, 1)
        passages = [PASSAGES[i % 6] for i in range(70)]  # three batches
        embedding = asyncio.create_task(engine.embed_passages(passages))
        while not engine._embedding_tasks:
            await asyncio.sleep(0)
        stopped = asyncio.create_task(engine.stop(drain=drain))
        await asyncio.sleep(0)
        with pytest.raises(ShuttingDown, match="shutting down"):
            await events_of(engine, request(model))
        with pytest.raises(ShuttingDown):
            await engine.embed_queries(["who?"])
        assert not await engine.is_healthy()
        await asyncio.wait_for(stopped, 60)
        outcomes = await asyncio.gather(*tasks, return_exceptions=True)
        if drain:
            assert [len(outcome) for outcome in outcomes] == [41, 41]
            np.testing.assert_allclose((await embedding).embeds, np.tile(index.embeddings, (12, 1))[:70], atol=1e-5)
        else:
            assert [type(outcome) for outcome in outcomes] == [ShuttingDown] * 2
            with pytest.raises(ShuttingDown):
                await embedding

    asyncio.run(serve())


def test_stopping_does_not_wait_for_a_pass_that_hangs(model, index, monkeypatch, caplog):
    hangs, goes_on = threading.Event(), threading.Event()
    forward = model.gen.base_model.forward

    def hanging(*args, **kwargs):
        hangs.set()
        goes_on.wait(60)
        return forward(*args, **kwargs)

    monkeypatch.setattr(model.gen.base_model, "forward", hanging)
    monkeypatch.setattr(embedded_engine, "_LAST_SECONDS", 0.05)

    async def serve():
        engine = EmbeddedEngine.in_thread(model, index)
        await engine.start()
        answer = asyncio.create_task(events_of(engine, request(model)))
        await asyncio.to_thread(hangs.wait, 60)
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(engine.stop(), 0.05)
        await asyncio.wait_for(engine.stop(drain=False), 10)
        with pytest.raises(ShuttingDown):
            await answer
        return engine

    engine = asyncio.run(serve())
    assert "The decoding did not end in 0.05 seconds" in caplog.text
    goes_on.set()
    engine.decoding.join()


# ---------------------------------------------------------------------- embeddings


def test_embeddings_between_passes_are_those_of_index_and_generate(model, index):
    async def test(engine):
        running = asyncio.create_task(events_of(engine, long_request(model)))
        await until_load(engine, 1, 0)
        passages = [PASSAGES[i % 6] for i in range(40)]
        embeds, num_tokens = await engine.embed_passages(passages)
        rows = encode_passages_for_emb_seq(model.emb_seq_tokenizer, passages, model.config)
        assert num_tokens == sum(map(len, rows))
        assert embeds.dtype == np.float32
        np.testing.assert_allclose(embeds, np.tile(index.embeddings, (7, 1))[:40], atol=1e-5)
        ids, mask = pad_rows(encode_passages_for_emb_seq(model.emb_seq_tokenizer, PASSAGES[:1], model.config))
        np.testing.assert_allclose(embeds[:1], model.encode_passages(ids, mask).detach(), atol=1e-5)
        texts = ["who?", "who painted the Night Watch?"]
        queries, num_tokens = await engine.embed_queries(texts)
        assert num_tokens == sum(len(encode_prompt(model.tokenizer, text)) + 1 for text in texts)  # and [NSP]
        for text, query in zip(texts, queries, strict=True):
            events = await events_of(engine, request(model, 2, text, force_nsp_first=True, output_query_embeds=True))
            np.testing.assert_allclose(query, events[0].retrieval.query_embed, atol=1e-5)
        nothing = await engine.embed_queries([])
        assert (nothing.embeds.shape, nothing.num_tokens) == ((0, 32), 0)
        assert not running.done()
        running.cancel()

    run(test, model, index)


def test_embeddings_wait_in_the_same_queue_and_leave_it_with_their_client(model, index, monkeypatch):
    goes_on = threading.Event()
    embed = model.embed_prompts
    num_prompts = []  # of each batch

    def slow(prompts):
        num_prompts.append(len(prompts))
        goes_on.wait(60)
        return embed(prompts)

    monkeypatch.setattr(model, "embed_prompts", slow)

    async def test(engine):
        tasks = [asyncio.create_task(engine.embed_queries(["who?"] * count)) for count in (1, 2, 3)]
        await until_load(engine, 0, 3)
        refused = (engine.embed_queries(["who?"]), engine.embed_passages(PASSAGES), events_of(engine, request(model)))
        for work in refused:
            with pytest.raises(QueueFull, match="0 answers and 3 embeddings run or wait, of at most 3") as refusal:
                await work
            assert 1 <= refusal.value.retry_after <= 60
        tasks[1].cancel()
        await until_load(engine, 0, 2)
        answer = asyncio.create_task(events_of(engine, request(model)))
        await until_load(engine, 0, 3)
        goes_on.set()
        assert [len((await tasks[number]).embeds) for number in (0, 2)] == [1, 3]
        assert isinstance((await answer)[-1], EndEvent)
        assert num_prompts == [1, 3]
        assert (engine.load().running, engine.load().waiting) == (0, 0)
        assert not engine._batches and not engine.decoding._jobs

    run(test, model, index, max_running=1, max_waiting=2)


def test_embeddings_that_cannot_be_made_are_refused(model, index, monkeypatch):
    async def test(engine):
        with pytest.raises(UnsupportedSetting, match=r"^passages: .*passages\[1\]"):
            await engine.embed_passages([PASSAGES[0], {"title": "a"}])
        with pytest.raises(UnsupportedSetting, match=r"^queries\[0\] has .* tokens, but Gen reads 512"):
            await engine.embed_queries(["a b c " * 300])
        monkeypatch.setattr(model, "encode_passages", None)
        with pytest.raises(BackendFailed, match="TypeError"):
            await engine.embed_passages(PASSAGES)
        assert (await engine.embed_queries(["who?"])).embeds.shape == (1, 32)

    run(test, model, index)


def test_passages_need_emb_seq_in_memory(model, monkeypatch):
    async def test(engine):
        with pytest.raises(UnsupportedSetting, match="load_emb_seq"):
            await engine.embed_passages(PASSAGES)
        assert (await engine.embed_queries(["who?"])).embeds.shape == (1, 32)

    monkeypatch.setattr(model, "emb_seq", None)
    run(test, model)
