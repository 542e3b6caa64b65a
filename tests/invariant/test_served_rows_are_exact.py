"""A served answer equals generate() of its prompt alone, token by token, whoever else is being served."""

import asyncio
from contextlib import aclosing

import pytest
import torch

from modeling_cosup import MemoryConfig, RetrievalConfig
from modeling_cosup.tokenization_cosup import encode_prompt
from support.memories import LAST_MLP, StateMemory
from support.models import PASSAGES, make_model

from serving.embedded_engine import EmbeddedEngine
from serving.engine import EndEvent, GenerationRequest, RetrievalEvent, TokenEvent

# each request takes the next of each list; the lengths have no common divisor
RETRIEVALS = [
    {},
    {"force_nsp_first": True},
    {"forbid_nsp": True},
    {"force_nsp_first": True, "forget_passages": "recompute"},
    {"min_score": 0.1},
    {"force_nsp_first": True, "forget_passages": "mask", "max_retrievals": 3},
    {"force_nsp_first": True, "candidates": [["p1", "p4", "p5"]], "no_repeat_passages": True},
    {"max_retrievals": 1, "no_repeat_passages": True},
    {"force_nsp_first": True, "min_score": 9.0},
    {"force_nsp_first": True, "max_retrievals": 2, "candidates": [["p0", "p2"]], "forget_passages": "recompute"},
    {"force_nsp_first": True, "passages": [["p3", {"title": "", "text": "A given one."}]]},
]
TOP_KS = [1, 2, 1, 3]
BUDGETS = [14, 1, 20, 6, 27]
LOGPROBS = [None, 3, None]


def make_parts(gen):
    """Return a random model that writes `[NSP]`, `[CE]` and ends by itself, and its index."""
    model = make_model(gen, gen_kwargs={"tie_word_embeddings": False})
    rows = model.get_output_embeddings().weight
    generator = torch.Generator().manual_seed(1)
    (end,) = model.generation_config.eos_token_id
    with torch.no_grad():
        for id, scale in ((model.config.nsp_token_id, 0.6), (model.config.ce_token_id, 0.6), (end, 0.36)):
            rows[id] = scale * torch.randn(rows.shape[1], generator=generator)
    return model, model.build_index(PASSAGES, show_progress_bar=False)


@pytest.fixture(scope="module")
def llama():
    return make_parts("llama")


def requests_of(model, count):
    """Return requests of which hardly two have the same settings; some prompts end in `[NSP]`."""
    requests = []
    for i in range(count):
        prompt = encode_prompt(model.tokenizer, f"question {37 * i} " + "about Curie " * (i % 4))
        if i % 9 == 8:
            prompt.append(model.config.nsp_token_id)
        retrieval = RetrievalConfig(top_k=TOP_KS[i % 4], **RETRIEVALS[i % 11])
        budget, num_logprobs = BUDGETS[i % 5], LOGPROBS[i % 3]
        requests.append(
            GenerationRequest(prompt, budget, retrieval, num_logprobs=num_logprobs, incremental=i % 7 != 6)
        )
    return requests


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


def alone(model, index, request, **kwargs):
    """Return the output of generate() for the prompt of a request alone."""
    return model.generate(
        torch.tensor([request.prompt_ids]),
        retriever=index,
        retrieval_config=request.retrieval,
        max_new_tokens=request.max_new_tokens,
        return_dict_in_generate=True,
        **kwargs,
    )


def check_answer(events, request, output, ends):
    """Check tokens, trace and end of an answer against the output of generate()."""
    ids, trace = output.sequences[0].tolist(), output.retrievals[0]
    expected = []  # tokens, and passages in their places
    position = output.prompt_length
    for retrieval in trace:
        expected += ids[position : retrieval.position]
        expected.append(retrieval.passages)
        position = retrieval.grounded_span[0]
    expected += ids[position:]
    given = []
    for event in events[:-1]:
        given.append(event.token_id if isinstance(event, TokenEvent) else event.retrieval.passages)
    assert given == expected
    retrievals = [event.retrieval for event in events if isinstance(event, RetrievalEvent)]
    for retrieval, other in zip(retrievals, trace, strict=True):
        assert (retrieval.position, retrieval.grounded_span) == (other.position, other.grounded_span)
        assert retrieval.scores == pytest.approx(other.scores, abs=1e-5)
    reason = "stop" if ids[-1] in ends else "length"
    assert events[-1] == EndEvent(reason, int(output.num_generated_tokens))


def check_logprobs(model, events, request, output):
    """Check the log-probabilities of an answer against a forward of the whole answer; nothing may be forgotten."""
    ids = output.sequences[0]
    log_probs = model.gen(ids[None]).logits[0].log_softmax(-1)
    position = output.prompt_length
    for event in events[:-1]:
        if isinstance(event, RetrievalEvent):
            position = event.retrieval.grounded_span[0]
            continue
        before = log_probs[position - 1]
        assert event.logprobs.logprob == pytest.approx(float(before[event.token_id]), abs=1e-4)
        values, top = before.topk(request.num_logprobs)
        assert [id for id, _ in event.logprobs.top] == top.tolist()
        assert [logprob for _, logprob in event.logprobs.top] == pytest.approx(values.tolist(), abs=1e-4)
        position += 1


@torch.no_grad()
def test_64_prompts_at_once_with_different_settings(llama):
    model, index = llama
    requests = requests_of(model, 64)
    cancelled = set(range(5, 64, 10))
    answers = asyncio.run(serve(EmbeddedEngine(model, index, max_running=12), requests, cancelled))
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
    engine = EmbeddedEngine(model, index, memory, config, max_running=6, max_batch_tokens=limit)
    answers = asyncio.run(serve(engine, requests))
    for i, events in answers.items():
        output = alone(model, index, requests[i], memory=memory, memory_config=config)
        check_answer(events, requests[i], output, model.generation_config.eos_token_id)
    without_memory = alone(model, index, requests[0]).sequences.tolist()
    assert alone(model, index, requests[0], memory=memory, memory_config=config).sequences.tolist() != without_memory


def test_without_an_index_nsp_is_a_token_like_any_other(llama):
    model, _ = llama
    requests = [GenerationRequest(encode_prompt(model.tokenizer, f"q {i}"), 20) for i in range(6)]
    answers = asyncio.run(serve(EmbeddedEngine(model), requests))
    written = []
    for i, request in enumerate(requests):
        expected = model.generate(torch.tensor([request.prompt_ids]), max_new_tokens=20)[0, len(request.prompt_ids) :]
        written += expected.tolist()
        assert [event.token_id for event in answers[i][:-1]] == expected.tolist()
    assert model.config.nsp_token_id in written


def test_a_seed_gives_the_same_answer_whoever_else_is_served(llama):
    model, index = llama
    prompt = encode_prompt(model.tokenizer, "who?")
    settings = [{"temperature": 1.5, "seed": 3}, {"temperature": 0.7, "top_p": 0.8, "seed": 4}]
    seeded = [GenerationRequest(prompt, 16, **options) for options in settings]
    others = [GenerationRequest(prompt, 9 + i, temperature=0.5 + 0.5 * (i % 2)) for i in range(5)]
    answers = asyncio.run(serve(EmbeddedEngine(model, index), [*others, *seeded, seeded[0]]))
    for i, request in ((5, seeded[0]), (6, seeded[1]), (7, seeded[0])):
        torch.manual_seed(request.seed)
        sampling = {"do_sample": True, "temperature": request.temperature, "top_p": request.top_p, "top_k": 0}
        output = alone(model, index, request, **sampling)
        check_answer(answers[i], request, output, model.generation_config.eos_token_id)
    assert len({str(answers[i]) for i in (0, 2, 4)}) == 3  # without a seed they differ
