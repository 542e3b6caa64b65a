"""States of Gen that forward returns on request, and what generate() takes and refuses as a token memory."""

import json
import threading

import pytest
import torch
from transformers import DynamicCache, pipeline
from transformers.pipelines import base as pipelines_base

from modeling_cosup import MemoryConfig, RetrievalConfig
from modeling_cosup.states_cosup import recording, watch
from support.generation import Collect
from support.memories import LAST_MLP, StateMemory
from support.models import PASSAGES, make_model

NAMES = {**LAST_MLP, "qwen3": "model.layers.0.self_attn"}  # called with keywords


def inputs_of(module, run):
    """Return what enters a module during `run()`, as a hook of this test sees it."""
    seen = []

    def record(module, args, kwargs):
        seen.append([*args, *kwargs.values()][0])

    hook = module.register_forward_pre_hook(record, with_kwargs=True)
    run()
    hook.remove()
    return seen[-1]


@pytest.fixture
def ids():
    return torch.arange(1, 13).reshape(2, 6) * 17


@pytest.mark.parametrize("gen", NAMES)
@torch.no_grad()
def test_states_at_the_decided_positions(gen, ids):
    model, name = make_model(gen), NAMES[gen]
    expected = inputs_of(model.gen.get_submodule(name), lambda: model.gen(ids))  # (B, T, h)
    last = model(ids, output_states=(name,))
    assert list(last.states) == [name]
    assert torch.equal(last.states[name], expected[:, -1])
    positions = torch.tensor([7, 0, 4])
    chosen = model(ids, output_states=(name,), logit_positions=positions)
    assert torch.equal(chosen.states[name], expected.flatten(0, 1)[positions])
    assert chosen.logits.shape[0] == 3
    step = model(ids, output_states=(name,), past_key_values=DynamicCache(), use_cache=True)
    assert torch.equal(step.states[name], expected[:, -1])


def test_several_states_and_their_gradients(ids):
    model = make_model()
    names = ("model.layers.0.mlp", "model.layers.1.mlp")
    states = model(ids, output_states=names).states
    assert tuple(states) == names
    assert not torch.equal(*states.values())
    states[names[1]].sum().backward()
    assert model.gen.get_input_embeddings().weight.grad.abs().sum() > 0


def test_without_output_states_nothing_is_recorded(ids):
    model = make_model()
    module = model.gen.get_submodule("model.layers.1.mlp")
    assert model(ids).states is None
    assert not module._forward_pre_hooks
    for _ in range(3):
        model(ids, output_states=("model.layers.1.mlp",))
    assert len(module._forward_pre_hooks) == 1
    assert model(ids).states is None


def test_a_forward_of_another_thread_writes_nothing(ids):
    model, name = make_model(), "model.layers.1.mlp"
    with recording(model.gen, (name,)) as states:
        thread = threading.Thread(target=model, args=(ids,))
        thread.start()
        thread.join()
        assert states == {}
        model(ids[:1])
        assert len(states[name]) == 1


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("model.layers.9.mlp",), r"LlamaForCausalLM has no submodule 'model.layers.9.mlp'. Did you mean 'model"),
        (("",), "has no submodule ''"),
        (("lm_head",), "Nothing entered 'lm_head' while Gen's base model ran"),
        (("model.norm", "model"), r"What enters 'model' is \(2, 6\), not one state for each of 2 x 6 positions"),
        ("model.norm", "expected as a tuple"),
    ],
)
def test_a_name_without_a_state_raises(ids, names, message):
    model = make_model()
    with pytest.raises(ValueError, match=message):
        model(ids, output_states=names)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@torch.no_grad()
def test_compiled_states_are_the_same(ids, backend):
    model, names = make_model(), ("model.layers.1.mlp", "model.layers.0.mlp")
    expected = model(ids, output_states=names)
    torch._dynamo.reset()
    forward = torch.compile(model.__call__, backend=backend, fullgraph=True, dynamic=False)
    options = {"output_query_embeds": False, "use_cache": False}
    assert forward(ids, **options).states is None
    output = forward(ids, output_states=names, **options)
    torch.testing.assert_close(output.states, expected.states)
    torch.testing.assert_close(output.logits, expected.logits)
    assert forward(ids, **options).states is None


@torch.no_grad()
def test_compiling_before_watch_raises(ids):
    model, names = make_model(), ("model.layers.1.mlp",)
    torch._dynamo.reset()
    options = {"output_states": names, "output_query_embeds": False, "use_cache": False}
    with pytest.raises(Exception, match=r"compiled before watch\(\) was called"):
        torch.compile(model.__call__, backend="eager", fullgraph=True)(ids, **options)
    torch._dynamo.reset()
    watch(model.gen, names)
    output = torch.compile(model.__call__, backend="eager", fullgraph=True)(ids, **options)
    torch.testing.assert_close(output.states, model(ids, output_states=names).states)


# ------------------------------------------------------------------ what generate() takes as a memory


def changed(memory, **values):
    for name, value in values.items():
        setattr(memory, name, value)
    return memory


def first_five(states, config):
    return torch.zeros(2, 5)


@pytest.mark.parametrize(
    ("values", "error", "message"),
    [
        ({"states": ["model.norm"]}, TypeError, "memory.states is"),
        ({"fingerprint": 3}, TypeError, "memory.fingerprint is 3"),
        ({"states": ("model.layers.7.mlp",)}, ValueError, "has no submodule 'model.layers.7.mlp'"),
        ({"memory_config": {"weight": 1}}, TypeError, "memory.memory_config is .*, expected a MemoryConfig"),
        ({"log_probs": first_five}, ValueError, r"log_probs returned \(2, 5\) in torch.float32, expected \(2, \d+\)"),
        ({"log_probs": lambda *_: torch.zeros(2, 400).double()}, ValueError, "in torch.float64"),
    ],
)
def test_a_memory_with_a_wrong_member_raises(ids, values, error, message):
    model = make_model()
    memory = changed(StateMemory(model, "model.layers.1.mlp"), **values)
    with pytest.raises(error, match=message):
        model.generate(ids, memory=memory, max_new_tokens=2)
    with pytest.raises(error, match=message):
        model.generate_many(ids.tolist(), memory=memory, max_new_tokens=2, show_progress_bar=False)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"memory": "mem"}, TypeError, r"memory is the name 'mem', .* load it with model.load_memory\('mem'\)"),
        ({"memory": StateMemory}, TypeError, "memory is the class StateMemory, expected a memory"),
        ({"memory_config": {"weight": 0.5}}, TypeError, "memory_config is a dict, expected a MemoryConfig"),
        ({"memory_config": RetrievalConfig()}, TypeError, "memory_config is a RetrievalConfig"),
        ({"memory_config": MemoryConfig()}, ValueError, "memory_config needs a memory"),
    ],
)
def test_a_wrong_memory_or_config_raises(ids, options, error, message):
    model = make_model()
    with pytest.raises(error, match=message):
        model.generate(ids, max_new_tokens=2, **options)
    with pytest.raises(error, match=message):
        model.generate_many(ids.tolist(), max_new_tokens=2, **options)


def test_an_object_that_is_no_memory_raises(ids):
    model = make_model()
    with pytest.raises(TypeError, match="memory is a dict, which has no states, no fingerprint, no memory_config, no"):
        model.generate(ids, memory={}, max_new_tokens=2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_beams": 2}, "Retrieval and memories work in greedy decoding and sampling, not in beam_search"),
        ({"use_cache": False}, "KV cache"),
        ({"output_scores": True}, "output_scores=True is not available with a retriever or a memory"),
        ({"nsp_token_id": None}, "plain Gen, which has no memory"),
        ({"output_states": ("model.norm",)}, "output_states: not available"),
    ],
)
def test_what_cannot_be_combined_with_a_memory_raises(ids, options, message):
    model = make_model()
    with pytest.raises(ValueError, match=message):
        model.generate(ids, memory=StateMemory(model, "model.layers.1.mlp"), max_new_tokens=2, **options)


def test_an_output_file_belongs_to_one_memory_and_its_config(tmp_path, ids):
    model, path = make_model(), tmp_path / "answers.jsonl"
    options = {"max_new_tokens": 3, "show_progress_bar": False, "output_file": path}
    first, other = (StateMemory(model, "model.layers.1.mlp", seed=seed) for seed in (0, 1))
    answers = model.generate_many(ids.tolist(), memory=first, **options)
    path.write_text(path.read_text().splitlines(keepends=True)[0])  # the process died after the first
    calls = len(first.calls)
    assert model.generate_many(ids.tolist(), memory=first, memory_config=first.memory_config, **options) == answers
    assert first.calls[calls:] == [1, 1, 1]
    lighter = {"memory": first, "memory_config": MemoryConfig(weight=0.6)}
    for memories in ({"memory": other}, {"memory": None}, lighter):
        with pytest.raises(ValueError, match="with other settings"):
            model.generate_many(ids.tolist(), **memories, **options)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    for line in lines:  # as earlier releases wrote them
        del line["neighbors"]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    calls = len(first.calls)
    assert model.generate_many(ids.tolist(), memory=first, **options) == answers
    assert len(first.calls) == calls


def test_a_stream_is_the_row(ids):
    model, streamer = make_model(), Collect()
    options = {"memory": StateMemory(model, "model.layers.1.mlp"), "max_new_tokens": 6}
    row = model.generate(ids[:1], streamer=streamer, **options)
    assert streamer.tokens == row[0].tolist()
    assert streamer.ended


def test_the_pipeline_takes_a_memory(monkeypatch):
    errors = []
    monkeypatch.setattr(pipelines_base.logger, "error", errors.append)
    model = make_model()
    options = {"memory": StateMemory(model, "model.layers.1.mlp"), "memory_config": MemoryConfig(weight=1.0)}
    options |= {"max_new_tokens": 6, "do_sample": False}
    pipe = pipeline("text-generation", model=model, tokenizer=model.tokenizer)
    assert errors == []  # the class is known to be a language model
    (answer,) = pipe("who?", return_tensors=True, **options)
    row = model.generate(**model.tokenizer("who?", return_tensors="pt"), **options)
    assert answer["generated_token_ids"] == row[0].tolist()


def test_half_precision(ids):
    model = make_model().bfloat16()
    memory = StateMemory(model, "model.layers.1.mlp")
    output = model.generate(ids, memory=memory, max_new_tokens=4)
    assert memory.calls
    assert output.shape == (2, 10)
    # a pass whose decode step is mixed and whose passages are not
    index = model.build_index(PASSAGES, show_progress_bar=False)
    options = {"retriever": index, "retrieval_config": RetrievalConfig(force_nsp_first=True, max_retrievals=1)}
    config = MemoryConfig(weight=0.7, grounded_weight=0.0)
    options |= {"max_new_tokens": 4, "return_dict_in_generate": True}
    output = model.generate(ids, memory=memory, memory_config=config, **options)
    assert [len(trace) for trace in output.retrievals] == [1, 1]
