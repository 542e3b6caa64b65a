"""A served answer equals generate() of its prompt alone, token by token, whoever else is being served."""

import asyncio
from contextlib import aclosing
from dataclasses import replace

import pytest
import torch

from modeling_cosup import MemoryConfig, RetrievalConfig, decoding_cosup, room_cosup
from modeling_cosup.cache_cosup import RowCache
from modeling_cosup.decoding_cosup import Decoder
from modeling_cosup.tokenization_cosup import encode_prompt
from modeling_cosup.trace_cosup import Row
from support.memories import LAST_MLP, StateMemory
from support.served_answers import alone, check_answer, check_logprobs, make_parts, requests_of

from serving.embedded_engine import EmbeddedEngine
from serving.engine import BackendFailed, GenerationRequest


@pytest.fixture(scope="module")
def llama():
    return make_parts("llama")


async def events_of(engine, request):
    return [event async for group in engine.generate(request) for event in group]


async def serve(engine, requests, cancelled=()):
    """Serve requests that arrive one after another; those of `cancelled` are left after some of their events."""
    answers = {}
    most_running = 0

    async def answer(i, request):
        nonlocal most_running
        await asyncio.sleep(0.004 * i)
        events = []
        async with aclosing(engine.generate(request)) as groups:
            async for group in groups:
                events += group
                most_running = max(most_running, engine.load().running)
                if i in cancelled and len(events) >= 3:
                    return
        answers[i] = events

    await engine.start()
    await asyncio.gather(*[answer(i, request) for i, request in enumerate(requests)])
    load = engine.load()
    assert (load.running, load.waiting) == (0, 0)
    await engine.stop()
    assert most_running >= 3
    return answers


@torch.no_grad()
def test_64_prompts_at_once_with_different_settings(llama):
    model, index = llama
    requests = requests_of(model, 64)
    cancelled = set(range(5, 64, 10))
    answers = asyncio.run(serve(EmbeddedEngine.in_thread(model, index, max_running=12), requests, cancelled))
    ends = model.generation_config.eos_token_id
    num_retrievals, num_stopped, num_with_logprobs = 0, 0, 0
    assert len(answers) >= 64 - len(cancelled)
    for i, events in answers.items():
        output = alone(model, index, requests[i])
        check_answer(events, requests[i], output, ends)
        num_retrievals += len(output.retrievals[0])
        num_stopped += events[-1].finish_reason == "stop"
        if requests[i].num_logprobs is not None and requests[i].retrieval.forget_passages is None:
            check_logprobs(model, events, requests[i], output)
            num_with_logprobs += len(events) > 2
    assert num_retrievals > 30 and num_stopped >= 2 and num_with_logprobs >= 5


@pytest.mark.parametrize("limit", [None, 1800])
def test_a_sliding_window_and_a_memory(limit):
    model, index = make_parts("mistral")
    memory = StateMemory(model, LAST_MLP["mistral"])
    config = MemoryConfig(weight=0.6, grounded_weight=0.2)
    requests = requests_of(model, 15)
    engine = EmbeddedEngine.in_thread(model, index, memory, config, max_running=6, max_batch_tokens=limit)
    answers = asyncio.run(serve(engine, requests))
    for i, events in answers.items():
        output = alone(model, index, requests[i], memory=memory, memory_config=config)
        check_answer(events, requests[i], output, model.generation_config.eos_token_id)
    without_memory = alone(model, index, requests[0]).sequences.tolist()
    assert alone(model, index, requests[0], memory=memory, memory_config=config).sequences.tolist() != without_memory


def test_a_running_row_keeps_its_keys_when_a_limit_makes_the_cache_narrow(llama):
    model, _ = llama
    options = {"suppress_tokens": model.generation_config.eos_token_id}
    settings, long = model.prepare_decoding(10, max_new_tokens=40, **options)
    settings = replace(settings, num_slots=4, num_columns=64, refill=True, serves=True, max_batch_tokens=300)
    short = replace(long, budget=20)
    rows = [Row(0, [5] * 100, long), Row(1, [6] * 70, short), Row(2, [7] * 70, short)]
    decoder = Decoder(model, settings)
    decoder.submit(rows[0])
    decoder.submit(rows[1])
    while decoder.slots.rows != [rows[1]]:
        decoder.step()
    assert (decoder.cache.rows, decoder.cache.columns) == (1, 256)  # two such rows are beyond the limit
    decoder.submit(rows[2])
    while decoder.has_rows:
        decoder.step()
    for row in rows[1:]:
        expected = model.generate(torch.tensor([row.prompt]), max_new_tokens=row.settings.budget, **options)
        assert row.ids == expected[0].tolist()


@torch.no_grad()
def test_rows_that_outgrow_the_cache_wait_and_go_on(monkeypatch):
    """Of streamed and whole answers, with a pass that breaks off while rows wait: these go on in a new loop."""
    model, index = make_parts("llama", max_passage_length=40)
    config = RetrievalConfig(force_nsp_first=True)  # without a limit, so there is room for one retrieval
    prompts = [encode_prompt(model.tokenizer, f"question {37 * i}") for i in range(24)]
    requests = [GenerationRequest(prompt, 60, config, incremental=i % 3 > 0) for i, prompt in enumerate(prompts)]
    engine = EmbeddedEngine.in_thread(model, index, max_running=6, max_batch_tokens=768)
    num_set_aside = 0

    def set_latest_aside(decoder):
        nonlocal num_set_aside
        room_cosup.set_latest_aside(decoder)
        num_set_aside += 1
        if num_set_aside == 2:
            raise RuntimeError("CUDA error")

    monkeypatch.setattr(decoding_cosup, "set_latest_aside", set_latest_aside)
    cache_sizes = []
    grow = RowCache.grow

    def noting_grow(cache, *sizes):
        grow(cache, *sizes)
        cache_sizes.append(cache.rows * cache.columns)

    monkeypatch.setattr(RowCache, "grow", noting_grow)

    async def serve_all():
        await engine.start()
        answers = [events_of(engine, request) for request in requests]
        outcomes = await asyncio.gather(*answers, return_exceptions=True)
        await engine.stop()
        return outcomes

    outcomes = asyncio.run(serve_all())
    assert max(cache_sizes) <= 768
    assert num_set_aside >= 2  # the pass broke off while rows waited
    failed = [outcome for outcome in outcomes if isinstance(outcome, BackendFailed)]
    assert 1 <= len(failed) <= 6  # that ran when the pass broke off
    monkeypatch.undo()
    for request, outcome in zip(requests, outcomes, strict=True):
        if outcome not in failed:
            check_answer(outcome, request, alone(model, index, request), model.generation_config.eos_token_id)


def test_without_an_index_nsp_is_a_token_like_any_other(llama):
    model, _ = llama
    requests = [GenerationRequest(encode_prompt(model.tokenizer, f"q {i}"), 20) for i in range(6)]
    answers = asyncio.run(serve(EmbeddedEngine.in_thread(model), requests))
    written = []
    for i, request in enumerate(requests):
        expected = model.generate(torch.tensor([request.prompt_ids]), max_new_tokens=20)[0, len(request.prompt_ids) :]
        written += expected.tolist()
        assert [event.token_id for event in answers[i][:-1]] == expected.tolist()
    assert model.config.nsp_token_id in written


@pytest.mark.parametrize("top_k", [None, 0, 3])
def test_a_seed_gives_the_same_answer_whoever_else_is_served(llama, monkeypatch, top_k):
    model, index = llama
    monkeypatch.setattr(model.generation_config, "top_k", top_k)
    prompt = encode_prompt(model.tokenizer, "who?")
    settings = [{"temperature": 1.5, "seed": 3}, {"temperature": 0.7, "top_p": 0.8, "seed": 4}]
    seeded = [GenerationRequest(prompt, 16, **options) for options in settings]
    others = [GenerationRequest(prompt, 9 + i, temperature=0.5 + 0.5 * (i % 2)) for i in range(5)]
    answers = asyncio.run(serve(EmbeddedEngine.in_thread(model, index), [*others, *seeded, seeded[0]]))
    for i, request in ((5, seeded[0]), (6, seeded[1]), (7, seeded[0])):
        torch.manual_seed(request.seed)
        sampling = {"do_sample": True, "temperature": request.temperature, "top_p": request.top_p}
        output = alone(model, index, request, **sampling)
        check_answer(answers[i], request, output, model.generation_config.eos_token_id)
    assert len({str(answers[i]) for i in (0, 2, 4)}) == 3  # without a seed they differ
