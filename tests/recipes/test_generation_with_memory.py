"""The recipes that generate with a token memory, in this process, as a user runs them."""

import importlib
import json
import sys

import pytest

from modeling_cosup import CoSupForCausalLM, MemoryConfig
from modeling_cosup.lines_cosup import read_lines
from modeling_cosup.tokenization_cosup import encode_prompt
from support.evaluation_world import CORPUS, question, without_times, write_world
from support.memories import mlp_memory
from support.models import make_model
from support.recipes import fails_here, flags
from trainer.judging.judge import evaluate_tasks
from trainer.judging.tasks import read_tasks


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A checkpoint, two memories of it, and an evaluation set."""
    folder = tmp_path_factory.mktemp("world")
    model = make_model()
    model.save_pretrained(folder / "model")
    memory = mlp_memory(model)
    memory.save_pretrained(folder / "memory")
    memory.lm_head.weight.data.mul_(-1)
    memory.save_pretrained(folder / "other_memory")
    write_world(folder, [question(i, CORPUS[i]) for i in range(2)])
    return folder


def runs_here(monkeypatch, capsys, recipe, *words):
    """Run a recipe in this process, and return what it printed."""
    monkeypatch.setattr(sys, "argv", [f"{recipe}.py", *map(str, words)])
    importlib.import_module(recipe).main()
    return capsys.readouterr().out


def test_generate(world, monkeypatch, capsys):
    options = flags(model=world / "model", memory=world / "memory", max_new_tokens=6)
    options += flags(memory_weight=0.9, grounded_memory_weight=0.1, memory_temperature=2.0)
    printed = runs_here(monkeypatch, capsys, "generate", "who?", *options)
    model = CoSupForCausalLM.from_pretrained(world / "model")
    config = MemoryConfig(weight=0.9, grounded_weight=0.1, temperature=2.0)
    memories = {"memory": model.load_memory(world / "memory"), "memory_config": config}
    prompt = list(encode_prompt(model.tokenizer, "who?"))
    (answer,) = model.generate_many([prompt], max_new_tokens=6, show_progress_bar=False, **memories)
    assert printed == f"Q  who?\nA  {answer.cited_text}\n\n"
    (without,) = model.generate_many([prompt], max_new_tokens=6, show_progress_bar=False)
    assert without.token_ids != answer.token_ids


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"memory_k": 3}, "--memory_k without --memory: name the memory"),
        ({"memory": "memory", "memory_k": 3}, "memory is an MLPMemory, which has no neighbours"),
        ({"memory": "memory", "memory_weight": 1.5}, "MemoryConfig.weight is 1.5, expected a number from 0 to 1"),
        ({"memory": "model"}, "is not a token memory: memory_config.json is missing"),
    ],
)
def test_bad_options_are_named(world, monkeypatch, options, message):
    if "memory" in options:
        options = {**options, "memory": world / options["memory"]}
    words = ["who?", *flags(model=world / "model", **options)]
    assert message in fails_here(monkeypatch, "generate", *words)


def test_answers_belong_to_one_memory(world, monkeypatch, capsys, tmp_path):
    options = flags(model=world / "model", eval_file=world / "eval.jsonl", max_new_tokens=5, batch_size=2)
    options += ["--modes", "off", *flags(output_dir=tmp_path / "out")]
    runs_here(monkeypatch, capsys, "run_evaluation", *options, *flags(memory=world / "memory", memory_weight=0.9))
    results = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert results["settings"]["memory"] == str(world / "memory")
    assert results["settings"]["memory_config"]["weight"] == 0.9
    assert f"token memory {world}/memory with weight 0.9" in (tmp_path / "out" / "report.md").read_text()
    answers = read_lines(tmp_path / "out" / "eval" / "off" / "predictions.jsonl")
    for memory in ("other_memory", None):
        words = [*options, *([] if memory is None else flags(memory=world / memory, memory_weight=0.9))]
        assert "holds answers of other settings" in fails_here(monkeypatch, "run_evaluation", *words)

    model = CoSupForCausalLM.from_pretrained(world / "model")
    tasks = read_tasks([{"name": "eval", "eval_file": str(world / "eval.jsonl")}], max_new_tokens=5)
    evaluate_tasks(model, tasks, tmp_path / "without", ["off"])
    without = read_lines(tmp_path / "without" / "eval" / "off" / "predictions.jsonl")
    assert without_times(without) != without_times(answers)
