"""Requests of many kinds to an engine, and checks of their answers against generate()."""

import pytest
import torch

from modeling_cosup import RetrievalConfig
from modeling_cosup.tokenization_cosup import encode_prompt
from support.models import PASSAGES, make_model

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


def make_parts(gen, gen_kwargs=None, **kwargs):
    """Return a random model that writes `[NSP]`, `[CE]` and ends by itself, and its index."""
    model = make_model(gen, gen_kwargs={"tie_word_embeddings": False, **(gen_kwargs or {})}, **kwargs)
    rows = model.get_output_embeddings().weight
    generator = torch.Generator().manual_seed(1)
    (end,) = model.generation_config.eos_token_id
    with torch.no_grad():
        for id, scale in ((model.config.nsp_token_id, 0.6), (model.config.ce_token_id, 0.6), (end, 0.36)):
            rows[id] = scale * torch.randn(rows.shape[1], generator=generator)
    return model, model.build_index(PASSAGES, show_progress_bar=False)


def requests_of(model, count, can_mask=True):
    """Return requests of which hardly two have the same settings; some prompts end in `[NSP]`."""
    requests = []
    for i in range(count):
        prompt = encode_prompt(model.tokenizer, f"question {37 * i} " + "about Curie " * (i % 4))
        if i % 9 == 8:
            prompt.append(model.config.nsp_token_id)
        retrieval = RetrievalConfig(top_k=TOP_KS[i % 4], **RETRIEVALS[i % 11])
        if retrieval.forget_passages == "mask" and not can_mask:
            retrieval.forget_passages = "recompute"
        budget, num_logprobs = BUDGETS[i % 5], LOGPROBS[i % 3]
        requests.append(
            GenerationRequest(prompt, budget, retrieval, num_logprobs=num_logprobs, incremental=i % 7 != 6)
        )
    return requests


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
