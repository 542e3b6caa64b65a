"""
With a memory: a batch == each row alone == a slow reference without cache, token by token and with every control.

The reference mixes in float64.
"""

from dataclasses import replace

import pytest
import torch
from test_retrieval_controls_are_exact import MAX_NEW_TOKENS, check, generate, setup
from transformers import CompileConfig, LogitsProcessor

from modeling_cosup import MemoryConfig, RetrievalConfig
from support.generation import left_pad, real_tokens
from support.memories import LAST_MLP, StateMemory, kept_ids, knn_memory, mixture, mlp_memory

MAKERS = {
    "llama": lambda model: StateMemory(model, LAST_MLP["llama"]),
    "gpt2": mlp_memory,
    "mistral": knn_memory,
    "gemma2": knn_memory,
}
GROUNDED = MemoryConfig(weight=0.7, grounded_weight=0.2, k=8, temperature=20.0)


def check_rows_alone(settings, gen, rows, trace, every=7, **memories):
    model, index, prompts, processors = setup(gen, every)
    memory = MAKERS[gen](model)
    for i, prompt in enumerate(prompts):
        _, row, retrievals = generate(model, index, [prompt], processors, settings, memory=memory, **memories)
        assert (row, retrievals) == ([rows[i]], [trace[i]]), f"row {i} alone differs"


@pytest.mark.parametrize("gen", LAST_MLP)
def test_batch_row_and_reference_agree(gen):
    *_, rows, trace = check(RetrievalConfig(), gen, make_memory=MAKERS[gen])
    check_rows_alone(RetrievalConfig(), gen, rows, trace)
    _, rows_without, trace_without = generate(*setup(gen), RetrievalConfig())
    assert sum(map(len, trace)) >= 4
    assert rows != rows_without  # the memory decides tokens
    assert trace != trace_without  # and so when rows retrieve


def dividing_score(output):
    """A minimum score that some retrievals miss, in the widest gap between scores: rounding must not decide which."""
    scores = sorted(retrieval.score for trace in output.retrievals for retrieval in trace)
    middle = range(max(1, len(scores) // 5), max(2, 4 * len(scores) // 5))
    widest = max(middle, key=lambda i: scores[i] - scores[i - 1])
    return (scores[widest] + scores[widest - 1]) / 2


@pytest.mark.parametrize("gen", ["llama", "mistral"])  # a full and a sliding window
def test_a_row_that_takes_its_nsp_back(gen):
    memories = {"memory_config": GROUNDED}
    model, index, prompts, processors = setup(gen, every=5)
    options = {"memory": MAKERS[gen](model), **memories}
    output, _, _ = generate(model, index, prompts, processors, RetrievalConfig(), **options)
    settings = RetrievalConfig(min_score=dividing_score(output))
    *_, trace = check(settings, gen, every=5, make_memory=MAKERS[gen], **memories)
    assert any(trace)
    if gen == "llama":
        settings = RetrievalConfig(min_score=9.0)  # nothing is found
        *_, rows, trace = check(settings, gen, every=5, make_memory=MAKERS[gen], **memories)
        check_rows_alone(settings, gen, rows, trace, every=5, **memories)
        assert not any(trace)


@pytest.mark.parametrize(("gen", "forget"), [("llama", "recompute"), ("gpt2", "mask"), ("mistral", "recompute")])
def test_grounded_text_has_its_weight(gen, forget):
    settings, memories = RetrievalConfig(forget_passages=forget), {"memory_config": GROUNDED}
    model, index, output, rows, trace = check(settings, gen, make_memory=MAKERS[gen], **memories)
    check_rows_alone(settings, gen, rows, trace, **memories)
    assert any(model.config.ce_token_id in row for row in rows)
    model, index, prompts, processors = setup(gen)
    everywhere = {"memory": MAKERS[gen](model), "memory_config": MemoryConfig(weight=0.7, k=8, temperature=20.0)}
    _, remembering_rows, _ = generate(model, index, prompts, processors, RetrievalConfig(), **everywhere)
    _, other_rows, _ = generate(model, index, prompts, processors, settings, **everywhere)
    assert other_rows not in (rows, remembering_rows)  # the weight and forgetting make a difference


def test_every_control_together():
    pools = [["p0", "p1", "p2"], None, ["p3"], None, ["p5", "p0"]]
    settings = RetrievalConfig(2, max_retrievals=2, force_nsp_first=True, candidates=pools, no_repeat_passages=True)
    settings.forget_passages = "recompute"
    *_, trace = check(settings, every=5, make_memory=MAKERS["llama"], memory_config=GROUNDED)
    assert sum(map(len, trace)) >= 6


def test_every_forward_asks_once():
    model, index, prompts, processors = setup(every=5)
    memory = MAKERS["llama"](model)
    forwards = []
    model.gen.base_model.register_forward_pre_hook(lambda *args: forwards.append(1))
    output, _, _ = generate(model, index, prompts[:1], processors, RetrievalConfig(min_score=9.0), memory=memory)
    assert memory.calls == [1] * len(forwards)
    assert len(forwards) > int(output.num_generated_tokens)  # [NSP] was forwarded and taken back


@torch.no_grad()
def slow_rows(model, prompts, processors, memory, config):
    """Every prompt continued without retriever and without cache."""
    kept = kept_ids(model)
    rows = []
    for prompt in prompts:
        ids = list(prompt)
        for _ in range(MAX_NEW_TOKENS):
            output = model(torch.tensor([ids]), output_states=memory.states, use_cache=False)
            marks = [id for id in ids if id in kept]
            is_grounded = marks and marks[-1] == model.config.cs_token_id
            weight = config.grounded_weight if is_grounded else config.weight
            said = memory.log_probs(output.states, config)[0].exp()
            mixed = mixture(output.logits[0, -1].softmax(-1), said, weight, kept).log().float()
            scores = processors(torch.tensor([ids]), mixed[None])[0]
            scores[model.config.cs_token_id] = float("-inf")
            ids.append(int(scores.argmax()))
            if ids[-1] in model.generation_config.eos_token_id:
                break
        rows.append(ids)
    return rows


@pytest.mark.parametrize("gen", ["llama", "mistral"])
def test_without_a_retriever(gen):
    model, _, prompts, processors = setup(gen)
    config = model.config
    prompts[2] += [config.nsp_token_id, 40, 41, config.cs_token_id, 42]  # ends in grounded text
    prompts[3] += [config.nsp_token_id, 40, 41, config.cs_token_id, 42, config.ce_token_id, 43]
    memory = MAKERS[gen](model)
    rows = slow_rows(model, prompts, processors, memory, GROUNDED)
    assert config.nsp_token_id in rows[0]  # a token like any other
    inputs = left_pad(prompts, model.generation_config.pad_token_id)
    options = {"logits_processor": processors, "max_new_tokens": MAX_NEW_TOKENS}
    options |= {"memory": memory, "memory_config": GROUNDED}
    output = model.generate(**inputs, return_dict_in_generate=True, **options)
    assert real_tokens(output, inputs["attention_mask"], model.generation_config.pad_token_id) == rows
    assert output.neighbors is None
    many = model.generate_many(prompts, batch_size=2, show_progress_bar=False, **options)
    assert [[*prompt, *done.token_ids] for prompt, done in zip(prompts, many, strict=True)] == rows
    sampled = model.generate(**inputs, do_sample=True, top_k=1, return_dict_in_generate=True, **options)
    assert torch.equal(sampled.sequences, output.sequences)
    static = model.generate(**inputs, cache_implementation="static", return_dict_in_generate=True, **options)
    assert torch.equal(static.sequences, output.sequences)


@pytest.mark.parametrize("sample", [{}, {"do_sample": True, "temperature": 3.0, "repetition_penalty": 1.3}])
@pytest.mark.parametrize("weights", [{"weight": 0}, {"weight": 0.0, "grounded_weight": 0.0}])
def test_a_weight_of_zero_is_no_memory_and_asks_nothing(sample, weights):
    model, index, prompts, processors = setup()
    memory = MAKERS["llama"](model)
    results = []
    for options in ({}, {"memory": memory, "memory_config": MemoryConfig(**weights)}):
        torch.manual_seed(0)
        results.append(generate(model, index, prompts, processors, RetrievalConfig(), **options, **sample)[1:])
    assert results[0] == results[1]
    assert not memory.calls


class Keep(LogitsProcessor):
    """Keeps the scores of every step."""

    def __init__(self):
        self.scores = []

    def __call__(self, input_ids, scores):
        self.scores.append(scores.clone())
        return scores


@torch.no_grad()
def test_control_tokens_and_ends_keep_their_probabilities():
    model, _, prompts, _ = setup("mistral")
    keep, kept = Keep(), kept_ids(model)
    kept.remove(model.config.cs_token_id)  # banned before processors
    memory = MAKERS["mistral"](model)
    row = model.generate(torch.tensor(prompts[:1]), memory=memory, max_new_tokens=6, logits_processor=[keep])
    assert len(keep.scores) >= 3
    for step, scores in enumerate(keep.scores):
        ids = row[:, : len(prompts[0]) + step]
        lm = model(ids, use_cache=False).logits[0, -1].softmax(-1)
        scores[0, model.config.cs_token_id] = (
            lm[model.config.cs_token_id].log() + scores[0, kept[0]] - lm[kept[0]].log()
        )
        probabilities = scores[0].double().softmax(-1)
        assert (probabilities[kept] - lm[kept]).abs().max() < 1e-6
        assert (probabilities - lm).abs().max() > 0.01


@torch.no_grad()
def test_the_trace_says_which_entries_spoke(tmp_path):
    model, index, prompts, processors = setup("mistral", every=5)
    memory = knn_memory(model)
    options = {"memory": memory, "memory_config": replace(GROUNDED, output_neighbors=3)}
    output, rows, _ = generate(model, index, prompts, processors, RetrievalConfig(), **options)
    settings = RetrievalConfig(min_score=dividing_score(output))
    output, rows, _ = generate(model, index, prompts, processors, settings, **options)
    for row, ids in enumerate(rows):
        decided = set(range(len(prompts[row]), len(ids)))
        padding = output.prompt_length - len(prompts[row])
        for retrieval in output.retrievals[row]:  # passage and [Cs] are not decided
            decided -= set(range(retrieval.position + 1 - padding, retrieval.grounded_span[0] - padding))
        entries = output.neighbors[row]
        assert [entry.position - padding for entry in entries] == sorted(decided)
        assert len(entries) == output.num_generated_tokens[row]
        for entry in entries[row::5]:
            before = torch.tensor([ids[: entry.position - padding]])
            states = model(before, output_states=memory.states, use_cache=False).states
            found = memory.search(states[memory.states[0]], 8)
            assert entry.rows == found.rows[0, :3].tolist()
            assert entry.values == found.values[0, :3].tolist()
            assert entry.distances == pytest.approx(found.distances[0, :3].tolist(), rel=1e-3)
            assert entry.weights == pytest.approx(found.log_weights(20.0).exp()[0, :3].tolist(), rel=1e-3)
            documents = [int((memory.document_starts <= number).sum()) - 1 for number in entry.rows]
            assert entry.documents == documents
    assert sum(map(len, output.retrievals)) >= 2

    options |= {"retriever": index, "retrieval_config": settings, "logits_processor": processors}
    options |= {"max_new_tokens": MAX_NEW_TOKENS, "show_progress_bar": False, "output_file": tmp_path / "answers"}
    for _ in range(2):  # the second call reads the file
        for row, completion in enumerate(model.generate_many(prompts, batch_size=2, **options)):
            padding = output.prompt_length - len(prompts[row])
            assert [entry.rows for entry in completion.neighbors] == [entry.rows for entry in output.neighbors[row]]
            positions = [entry.position + padding for entry in completion.neighbors]
            assert positions == [entry.position for entry in output.neighbors[row]]


@pytest.mark.slow
@pytest.mark.parametrize("gen", ["llama", "gpt2"])
def test_a_captured_step_keeps_the_states(gen):
    model, index, prompts, processors = setup(gen)
    memory = MAKERS[gen](model)
    _, rows, trace = generate(model, index, prompts, processors, RetrievalConfig(), memory=memory)
    _, rows_without, _ = generate(model, index, prompts, processors, RetrievalConfig())
    compiled = CompileConfig(mode="default")
    compiled._compile_all_devices = True  # transformers compiles on accelerators only
    options = {"cache_implementation": "static", "compile_config": compiled}
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    # first without: what is compiled then must not be used when states are needed, nor the other way round
    for turn in (None, memory, memory, None):
        _, turn_rows, turn_trace = generate(
            model, index, prompts, processors, RetrievalConfig(), memory=turn, **options
        )
        if turn is None:
            assert turn_rows == rows_without
        else:
            assert turn_rows == rows
            assert turn_trace == trace
    # with states and without; one more each where the cache had to grow
    assert 2 <= torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 4
    assert not torch._dynamo.utils.counters["graph_break"]
