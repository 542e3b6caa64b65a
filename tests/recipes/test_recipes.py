"""The recipes as a user runs them: real processes, real files, real exit codes."""

import importlib
import json
import os
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from transformers import AutoModel

from modeling_cosup import CoSupForCausalLM, PassageIndex
from support.forks import run_forked
from support.models import PASSAGES, make_model
from support.recipes import ROOT, fails_here, flags, options, run, train_here, write
from trainer import CoSupTrainer, CoSupTrainingArguments

PYTHON = sys.executable


def launch_training(config, *argv):
    """Run `accelerate launch --config_file recipes/accelerate_configs/<config>.yaml recipes/train.py`."""
    launcher = [PYTHON, "-m", "accelerate.commands.accelerate_cli", "launch"]
    config_file = flags(config_file=f"recipes/accelerate_configs/{config}.yaml")
    return run(*launcher, *config_file, "recipes/train.py", *argv)


@pytest.fixture(scope="module")
def checkpoint(inputs, tmp_path_factory):
    """The output folder of a training in one process."""
    output = tmp_path_factory.mktemp("trained") / "out"
    result = launch_training("single", *options(inputs, output, "--eval_before_training", "true"))
    assert result.returncode == 0, result.stderr[-3000:]
    assert "query embedding: R@1" in result.stdout
    assert "query embedding: HR@5" in result.stdout
    assert "warning" not in (result.stdout + result.stderr).lower()
    return output


def test_train_writes_checkpoint_index_and_numbers(checkpoint):
    results = json.loads((checkpoint / "results.json").read_text())
    assert results["format"] == 2
    assert results["evaluation"]["query"]["corpus"]["query_recall@5"]["n"] == 6
    metrics = {mode: answers["metrics"] for mode, answers in results["evaluation"]["modes"].items()}
    assert metrics["retrieval"]["nsp_not_needed"]["n"] == 1
    assert metrics["retrieval"]["em_not_needed"]["n"] == 1
    for mode in ("retrieval", "gold", "off"):
        assert metrics[mode]["em"]["n"] == 6
    retrieval = {"query_recall@1", "query_recall@5", "hit_rate@1", "hit_rate@5"}
    assert {"ntp_loss", *retrieval} == set(results["before"]) == set(results["after"])
    assert results["after"]["query_recall@1"] == results["evaluation"]["query"]["corpus"]["query_recall@1"]
    assert (checkpoint / "modeling_cosup.py").exists()
    assert (checkpoint / "index" / "embeddings-00000.safetensors").exists()


def test_generate_answers_from_arguments_file_and_stdin(checkpoint, tmp_path):
    settings = flags(model=checkpoint, index=checkpoint / "index", max_new_tokens=6)
    command = ["recipes/generate.py", *settings]
    first = run_forked(*command, "who is it?", "where?")
    assert first.returncode == 0, first.stderr[-2000:]
    assert first.stdout.startswith("Q  who is it?\nA  ")
    (tmp_path / "questions.txt").write_text("who is it?\n\nwhere?\n")
    assert run_forked(*command, "--file", tmp_path / "questions.txt").stdout == first.stdout
    assert run_forked(*command, stdin="who is it?\nwhere?\n").stdout == first.stdout
    nothing = run_forked(*command, stdin="\n")
    assert nothing.returncode == 1
    message = "error: no question given: write them after the options, into --file, or to stdin."
    assert nothing.stderr.strip().endswith(message)


def test_build_index_equals_the_one_of_train(checkpoint, inputs, tmp_path):
    settings = flags(model=checkpoint, corpus_file=inputs / "corpus.jsonl", output_dir=tmp_path / "index")
    result = run_forked("recipes/build_index.py", *settings)
    assert result.returncode == 0, result.stderr[-2000:]
    built = PassageIndex.from_pretrained(tmp_path / "index")
    of_training = PassageIndex.from_pretrained(checkpoint / "index")
    assert built.fingerprint == of_training.fingerprint
    assert list(built) == list(of_training)
    # not bit by bit: the batches differ
    torch.testing.assert_close(built.embeddings, of_training.embeddings, rtol=0, atol=1e-5)


def test_index_of_another_model_is_refused(checkpoint, tmp_path):
    make_model().save_pretrained(tmp_path / "other")
    settings = flags(model=tmp_path / "other", index=checkpoint / "index")
    result = run_forked("recipes/generate.py", *settings, "who?")
    assert result.returncode == 1
    assert "error: This index was built by another model" in result.stderr
    assert "emb_seq" in result.stderr


BAD_LINES = [
    ("train_file", '{"input": "q"', "train_file.jsonl, line 1: malformed JSON"),
    ("train_file", '{"input": "q", "segments": []}', "train_file.jsonl, line 1: segments is []"),
    ("corpus_file", '{"id": "p0", "title": "t", "text": ""}', "corpus_file.jsonl, line 1: text is empty"),
    (
        "eval_file",
        '{"input": "q", "answers": ["a"], "provenance": [], "candidates": ["x"]}',
        "eval_file.jsonl, line 1: candidates holds 'x'",
    ),
]


@pytest.mark.parametrize(("option", "line", "message"), BAD_LINES)
def test_bad_input_is_named_with_its_place_before_training(inputs, tmp_path, monkeypatch, option, line, message):
    path = tmp_path / f"{option}.jsonl"
    path.write_text(line + "\n")
    error = train_here(monkeypatch, *options(inputs, tmp_path / "out", *flags(**{option: path})))
    assert error.startswith("error: ")
    assert message in error
    assert not (tmp_path / "out" / "config.json").exists()


@pytest.mark.parametrize(
    ("question", "message"),
    [
        ({"meta": {"provenance_unknown": True}}, None),  # HR@k judges the retrieval
        ({"provenance": None}, None),
        ({"meta": {"provenance_unknown": True}, "answers": ["yes"]}, "an answer to look for in passages, or a list"),
        ({}, "none of the 1 questions"),  # it needs no passage
    ],
)
def test_questions_without_gold_passages_are_judged_by_their_answers(tmp_path, question, message):
    row = {"id": "q", "input": "who?", "answers": ["Rembrandt"], "provenance": [], **question}
    eval_file = write(tmp_path / "eval.jsonl", [row])
    recipe = importlib.import_module("train")
    script = recipe.ScriptArguments(eval_file=str(eval_file), corpus_file="corpus.jsonl")
    this_run = recipe.Run(script, CoSupTrainingArguments(str(tmp_path), report_to="none"), corpus=PASSAGES)
    if message is None:
        this_run.questions = recipe.read_questions(this_run)
        assert [found["id"] for found in this_run.questions] == ["q"]
        model = make_model(query_from="emb_seq")
        figures = recipe.held_out(model, model.build_index(PASSAGES, show_progress_bar=False), this_run)
        assert figures.keys() == {"hit_rate@1", "hit_rate@5"}  # a reference without its passages is none
    else:
        with pytest.raises(ValueError, match=message):
            recipe.read_questions(this_run)


def test_lists_of_unknown_provenance_are_judged_by_their_f1(tmp_path, capsys):
    """No ranking can be right or wrong for them: there is nothing to measure before training."""
    meta = {"provenance_unknown": True, "answers": [["Rembrandt"], ["Vermeer"]]}
    row = {"id": "q", "input": "who?", "answers": ["Rembrandt", "Vermeer"], "provenance": [], "meta": meta}
    recipe = importlib.import_module("train")
    eval_file = str(write(tmp_path / "eval.jsonl", [row]))
    script = recipe.ScriptArguments(eval_file=eval_file, corpus_file="corpus.jsonl", max_new_tokens=3)
    this_run = recipe.Run(script, CoSupTrainingArguments(str(tmp_path), report_to="none"), corpus=PASSAGES)
    this_run.questions = recipe.read_questions(this_run)
    model = make_model()
    index = model.build_index(PASSAGES, show_progress_bar=False)
    index.save_pretrained(tmp_path / "index")
    this_run.results["before"] = recipe.held_out(model, index, this_run)
    assert this_run.results["before"] == {}
    recipe.evaluate(model, this_run)
    printed = capsys.readouterr().out
    for mode in ("own retrieval", "retrieval off"):
        assert re.search(rf"{mode}: list F1 +0\.0", printed)
    assert "before and after training" not in printed


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("learning_rat: 1.0e-4\n", "unknown option 'learning_rat'"),
        ("max_steps: abc\n", "max_steps is 'abc', expected an integer"),
        ("a: [\n", "malformed YAML"),
    ],
)
def test_a_bad_config_is_refused(inputs, tmp_path, monkeypatch, text, message):
    config = tmp_path / "config.yaml"
    config.write_text(text)
    assert message in train_here(monkeypatch, *options(inputs, tmp_path / "out", "--config", config))


def test_an_output_folder_that_cannot_be_used_is_refused(inputs, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("not a folder")
    assert "cannot be written" in train_here(monkeypatch, *options(inputs, tmp_path / "file" / "out"))
    (tmp_path / "taken" / "index").mkdir(parents=True)
    (tmp_path / "taken" / "index" / "file").touch()
    assert "is not a passage index" in train_here(monkeypatch, *options(inputs, tmp_path / "taken"))


def test_a_training_without_data_is_refused(tmp_path, monkeypatch):
    assert train_here(monkeypatch, *flags(output_dir=tmp_path / "out")).startswith("error: Nothing to train")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"max_train_samples": -1}, "--max_train_samples is -1, expected an integer of 1 or more"),
        ({"max_eval_samples": 0}, "--max_eval_samples is 0, expected an integer of 1 or more"),
        ({"num_threads": 0}, "--num_threads is 0, expected an integer of 1 or more"),
        ({"prepare": "quickstart", "prepare_options": "[1]"}, "--prepare_options is [1], expected a JSON object"),
        ({"prepare_options": '{"seed": 3}'}, "is not read without --prepare: give both"),
        ({"lora_r": 4}, "--lora_r 4 is not read without --use_peft"),
        ({"corpus_license": "mit"}, "--corpus_license mit is not read without --push_index"),
        (
            {"push_index": "true", "push_to_hub": "true", "hub_model_id": "me/a"},
            "--push_index pushes the index of a corpus: give --corpus_file",
        ),
    ],
)
def test_an_option_that_nothing_would_read_is_refused(inputs, tmp_path, monkeypatch, given, message):
    data = {"gen": inputs / "gen", "train_file": inputs / "train.jsonl", "output_dir": tmp_path / "out"}
    assert message in train_here(monkeypatch, *flags(**data, **given))


def test_every_config_parses_and_the_command_line_wins():
    from shared.cli import parse

    from shared.arguments import ScriptArguments

    for path in sorted((ROOT / "recipes" / "configs").glob("*.yaml")):
        script, args = parse([ScriptArguments, CoSupTrainingArguments], "", ["--config", str(path), "--seed", "7"])
        values = yaml.safe_load(path.read_text())
        assert args.seed == 7
        assert args.learning_rate == float(values["learning_rate"])
        assert script.similarity == values.get("similarity")


WAYS = {
    "separate, one encoder": ["--supervision", "separate"],
    "separate, two encoders": ["--supervision", "separate", "--query_from", "query_encoder"],
    "ntp": ["--supervision", "ntp"],
    "nsp": ["--supervision", "nsp"],
    "GradCache": ["--nsp_batch_size", "6", "--max_tokens_per_micro_batch", "200", "--batch_sampler", "no_duplicates"],
    "frozen Emb_seq": ["--freeze_emb_seq", "true"],
    "tied": flags(tie_emb_seq="true", emb_head_size=48, truncate_dim=24),
}


@pytest.mark.parametrize("way", WAYS)
def test_every_way_to_train_makes_a_checkpoint_that_answers(inputs, tmp_path, monkeypatch, way):
    from train import main

    monkeypatch.setattr(sys, "argv", ["train.py", *options(inputs, tmp_path / "out", *WAYS[way])])
    torch.backends.cuda.enable_cudnn_sdp(True)
    main()
    assert not torch.backends.cuda.cudnn_sdp_enabled()
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["evaluation"]["query"]["corpus"]["query_recall@5"]["n"] == 6
    model = CoSupForCausalLM.from_pretrained(tmp_path / "out")
    encoders = {"separate, one encoder": "emb_seq", "separate, two encoders": "query_encoder"}
    assert model.config.query_from == encoders.get(way, "gen")
    index = model.load_index(tmp_path / "out" / "index")
    prompt = torch.tensor([[5, model.config.nsp_token_id]])
    out = model.generate(prompt, retriever=index, max_new_tokens=3, return_dict_in_generate=True)
    assert out.retrievals[0][0].passage_id in {passage["id"] for passage in PASSAGES}
    if way == "tied":
        assert index.embeddings.shape[1] == 24


def test_train_builds_a_tied_model_unless_an_option_asks_for_two_towers(inputs, tmp_path):
    from shared.arguments import ScriptArguments
    from shared.model_options import load_model

    for training, script, tied in (
        ({}, {}, True),
        ({"supervision": "ntp"}, {"query_from": "gen"}, True),
        ({}, {"tie_emb_seq": False}, False),
        ({"freeze_gen": True}, {}, False),
        ({"freeze_emb_seq": True}, {}, False),
        ({"supervision": "ntp"}, {"index": "an index"}, False),
        ({"supervision": "separate"}, {}, False),
        ({}, {"emb_seq": str(inputs / "emb_seq")}, False),
    ):
        args = CoSupTrainingArguments(str(tmp_path), report_to="none", **training)
        assert load_model(ScriptArguments(gen=str(inputs / "gen"), **script), args).config.tie_emb_seq == tied


def test_options_that_a_tied_model_refuses(inputs, tmp_path, monkeypatch):
    """Before the training data, which are malformed here, would be read."""
    (tmp_path / "bad.jsonl").write_text("{\n")
    (tmp_path / "index").mkdir()
    data = flags(gen=inputs / "gen", train_file=tmp_path / "bad.jsonl", output_dir=tmp_path / "out")
    for option, message in (
        ({"emb_seq": inputs / "emb_seq"}, "--emb_seq with --tie_emb_seq: Gen's body reads the passages"),
        ({"query_encoder": inputs / "emb_seq"}, "--query_encoder with --tie_emb_seq: Gen makes the queries"),
        ({"query_from": "emb_seq"}, "--query_from with --tie_emb_seq: Gen makes the queries"),
        ({"supervision": "separate"}, "supervision='separate' trains an Emb_seq that makes the queries too"),
        ({"freeze_emb_seq": "true"}, "freeze_emb_seq: Gen and Emb_seq of this model are one"),
        ({"index": tmp_path / "index"}, "--index with --tie_emb_seq: training changes the whole model"),
    ):
        assert message in train_here(monkeypatch, *data, *flags(tie_emb_seq="true", **option))
    make_model().save_pretrained(tmp_path / "towers")
    data = flags(train_file=inputs / "train.jsonl", output_dir=tmp_path / "out", tie_emb_seq="true")
    assert "two towers" in train_here(monkeypatch, *data, *flags(model_name_or_path=tmp_path / "towers"))


def test_a_tied_checkpoint_is_trained_asked_and_judged_by_every_recipe(inputs, tmp_path, monkeypatch, capsys):
    import build_index
    import generate
    import run_evaluation
    import train

    from experiments import launching
    from shared.retrievers import CoSupRetriever

    def run_here(recipe, *words, **settings):
        monkeypatch.setattr(sys, "argv", [f"{recipe.__name__}.py", *flags(**settings), *words])
        recipe.main()

    out, corpus = tmp_path / "out", inputs / "corpus.jsonl"
    files = {"train_file": inputs / "train.jsonl", "corpus_file": corpus}
    steps = {"max_steps": 1, "report_to": "none", "truncate_dim": 16}
    run_here(train, gen=inputs / "gen", tie_emb_seq="true", output_dir=out, **files, **steps)
    model = CoSupForCausalLM.from_pretrained(out)
    assert model.config.tie_emb_seq and model.config.embedding_size == 16
    assert launching.parameters(out) == {"gen": model.gen.num_parameters(), "emb_seq": 0}
    run_here(build_index, model=out, corpus_file=corpus, output_dir=tmp_path / "index")
    model.load_index(tmp_path / "index")
    task = {"eval_file": inputs / "eval.jsonl", "modes": "forced", "max_new_tokens": 4}
    run_here(run_evaluation, model=out, index=tmp_path / "index", output_dir=tmp_path / "judged", **task)
    assert "[NSP] forced first: 7 questions" in capsys.readouterr().out
    options = {"batch_size": 4, "device": "cpu", "dtype": "auto", "index_dir": None, "index_uri": None}
    retriever = CoSupRetriever(SimpleNamespace(model=out, index=tmp_path / "index", corpus_file=None, **options))
    assert len(retriever.index) == len(PASSAGES)
    run_here(generate, "who?", model=out, index=tmp_path / "index", max_new_tokens=3)
    assert "Q  who?" in capsys.readouterr().out


def test_the_steps_of_a_distillation_follow_each_other(inputs, tmp_path, monkeypatch, capsys):
    """Their configs, and then a training whose candidates come from the index of another."""
    from train import main

    from shared import training_run

    questions = [json.loads(line) for line in (inputs / "eval.jsonl").read_text().splitlines()]
    asked = [{"input": question["input"], "answers": question["answers"]} for question in questions[:6]]
    settings = {"train_file": write(tmp_path / "asked.jsonl", asked), "num_candidates": 3, "max_steps": 1}
    settings |= {"max_length": 512, "max_new_tokens": 4, "save_strategy": "no", "report_to": "none", "bf16": "false"}
    settings |= {"learning_rate": 1e-3, "warmup_steps": 0}
    judged = []

    def evaluate_tasks(model, tasks, *rest, **options):
        judged.extend(tasks)
        return evaluate(model, tasks, *rest, **options)

    evaluate = training_run.evaluate_tasks
    monkeypatch.setattr(training_run, "evaluate_tasks", evaluate_tasks)

    def step(name, config=None, **extra):
        words = flags(output_dir=tmp_path / name, eval_before_training="false", **settings, **extra)
        if config is not None:
            words = ["--config", f"{ROOT}/recipes/configs/{config}.yaml", *words]
        monkeypatch.setattr(sys, "argv", ["train.py", *words])
        main()
        assert not (tmp_path / name / "candidates").exists()
        return CoSupForCausalLM.from_pretrained(tmp_path / name)

    def same(part, other):
        return all(torch.equal(value, other.state_dict()[name]) for name, value in part.state_dict().items())

    corpus = {"corpus_file": inputs / "corpus.jsonl"}
    first = step("one", "distillation_step_1", gen=inputs / "gen", emb_seq=inputs / "emb_seq", **corpus)
    assert same(first.emb_seq.h, AutoModel.from_pretrained(inputs / "emb_seq").h)
    eval_file = {"eval_file": settings["train_file"]}  # pairs of questions and answers are enough
    second = step("two", "distillation_step_2", model_name_or_path=tmp_path / "one", **corpus, **eval_file)
    assert same(second.gen, first.gen) and not same(second.emb_seq, first.emb_seq)
    assert [task.top_k for task in judged] == [3]
    printed = capsys.readouterr().out
    assert "--top_k 3" in printed
    assert "query embedding: HR@5" in printed and "gold passages given" not in printed
    assert asked[0]["input"] in (tmp_path / "two" / "README.md").read_text()
    monkeypatch.setattr(PassageIndex, "build", None)  # the given index is searched
    index = {"model_name_or_path": tmp_path / "one", "index": tmp_path / "one" / "index"}
    third = step("three", supervision="ntp", candidates_from="index", **index)
    third.load_index(tmp_path / "one" / "index")
    assert not same(third.gen, first.gen)


def test_options_of_candidates_that_are_refused(inputs, tmp_path, monkeypatch):
    data = flags(gen=inputs / "gen", train_file=inputs / "train.jsonl", output_dir=tmp_path / "out", max_length=512)
    candidates = flags(supervision="attention_distillation")
    assert "give --corpus_file, or an --index of a frozen Emb_seq" in train_here(monkeypatch, *data, *candidates)
    make_model(query_from="emb_seq").save_pretrained(tmp_path / "model")
    make_model(query_from="emb_seq").build_index(PASSAGES).save_pretrained(tmp_path / "index")
    trained = flags(model_name_or_path=tmp_path / "model", index=tmp_path / "index")
    error = train_here(monkeypatch, *data, *candidates, *trained)
    assert "training changes Emb_seq, and no index of it stays valid; add --freeze_emb_seq true" in error


def test_lora_writes_adapters_and_a_merged_checkpoint(inputs, tmp_path, monkeypatch):
    pytest.importorskip("peft")
    from train import main

    argv = options(inputs, tmp_path / "out", *flags(use_peft="true", lora_r=4))
    monkeypatch.setattr(sys, "argv", ["train.py", *argv])
    main()
    assert (tmp_path / "out" / "adapter_config.json").exists()
    model = CoSupForCausalLM.from_pretrained(tmp_path / "out" / "merged")
    model.load_index(tmp_path / "out" / "index")  # built by the merged model


def test_two_processes_train_with_the_config_for_cpus(inputs, tmp_path):
    batch_sizes = flags(nsp_batch_size=4, per_device_train_batch_size=1)
    result = launch_training("multi_cpu", *options(inputs, tmp_path / "out", *batch_sizes))
    assert result.returncode == 0, result.stderr[-3000:]
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["evaluation"]["query"]["corpus"]["query_recall@5"]["n"] == 6
    assert result.stdout.count("query embedding: R@1") == 1  # one process evaluates
    facts = json.loads((tmp_path / "out" / "training_facts.json").read_text())["training"]["arguments"]
    assert (facts["NSP batch"], facts["instances a step"]) == ("4 instances, GradCache", "4")
    assert facts["hardware"].startswith("2 × ")  # ranks


def test_the_benchmark_of_a_step_runs(inputs, tmp_path):
    command = ["recipes/benchmarks/train.py"]
    command += flags(gen=inputs / "gen", train_file=inputs / "train.jsonl")
    settings = flags(
        num_threads=1,
        sections="step,nsp_batch,duplicates",
        batch_size=3,
        repeats=1,
        nsp_batch_sizes="3,6",
        output_file=tmp_path / "out.json",
    )
    result = run_forked(*command, *settings)
    assert result.returncode == 0, result.stderr[-3000:]
    numbers = json.loads((tmp_path / "out.json").read_text())
    for arm in numbers["step"]["arms"].values():
        loss_error, gradient_error = arm["float32_loss_and_gradient_error"] or (0, 0)
        assert loss_error < 1e-5
        assert gradient_error < 1e-4
    assert [row["nsp_batch_size"] for row in numbers["nsp_batch"]] == [3, 6]
    too_large = run_forked(*command, *flags(batch_size=99))
    assert "a batch of 99 instances needs as many" in too_large.stderr


def test_build_index_trains_an_approximate_index_and_prints_its_recall(checkpoint, inputs, tmp_path):
    paths = flags(model=checkpoint, corpus_file=inputs / "corpus.jsonl", output_dir=tmp_path / "index")
    settings = flags(embedding_dtype="float16", shard_size=4, max_tokens_per_batch=64)
    result = run_forked("recipes/build_index.py", *paths, *settings, *flags(index_factory="IVF7,Flat"))
    assert result.returncode == 1
    assert "7 lists need at least as many training embeddings" in result.stderr  # known only after embedding
    embeddings = (tmp_path / "index" / "embeddings-00000.safetensors").stat()
    result = run_forked("recipes/build_index.py", *paths, *settings, *flags(index_factory="HNSW8", ef_search=32))
    # nothing was embedded again
    assert os.path.samestat((tmp_path / "index" / "embeddings-00000.safetensors").stat(), embeddings)
    assert result.returncode == 0, result.stderr[-2000:]
    assert "6 passages in" in result.stdout
    assert "ANN recall@1  100.0 %" in result.stdout
    config = PassageIndex.from_pretrained(tmp_path / "index", allow_faiss_files=True).config
    assert config["shards"] == [4, 2]
    assert config["dtype"] == "float16"
    assert config["approximate"]["search_options"] == {"efSearch": 32}

    options = flags(model=checkpoint, index=tmp_path / "index")
    evaluation = flags(eval_file=inputs / "eval.jsonl", modes="retrieval", max_new_tokens=8)
    evaluation += flags(output_dir=tmp_path / "results")
    for recipe, more in (("generate", ["who?"]), ("run_evaluation", evaluation)):
        refused = run_forked(f"recipes/{recipe}.py", *options, *more)
        assert "is searched through a FAISS file: pass allow_faiss_files=True" in refused.stderr
        answered = run_forked(f"recipes/{recipe}.py", *options, *more, "--allow_faiss_files")
        assert answered.returncode == 0, answered.stderr[-2000:]


@pytest.mark.parametrize("recipe", ["generate", "serve"])
def test_files_of_faiss_are_allowed_where_there_are_any(checkpoint, tmp_path, recipe):
    options = flags(model=checkpoint)
    questions = ["who?"] if recipe == "generate" else []
    result = run_forked(f"recipes/{recipe}.py", *options, "--allow_faiss_files", *questions)
    assert result.returncode != 0
    assert "--allow_faiss_files is for an index in a folder and for a memory" in result.stderr


def test_the_benchmark_of_the_index_runs(tmp_path):
    pytest.importorskip("sentence_transformers")
    settings = flags(quick="true", num_threads=1, output_file=tmp_path / "out.json")
    result = run_forked("recipes/benchmarks/index.py", *settings)
    assert result.returncode == 0, result.stderr[-3000:]
    numbers = json.loads((tmp_path / "out.json").read_text())
    assert numbers["encode"]["largest_difference"] < 1e-4
    assert all(row["same_rows"] == 1 for row in numbers["search"])
    assert [row["passages"] for row in numbers["memory"]] == [300, 900]
    assert max(row["ann_recall@10"] for row in numbers["approximate"]) > 0.9


def test_accelerate_reads_every_config():
    from accelerate.commands.config.config_args import load_config_from_file

    paths = sorted((ROOT / "recipes" / "accelerate_configs").glob("*.yaml"))
    configs = {path.stem: load_config_from_file(str(path)) for path in paths}
    assert {name: str(config.distributed_type).rpartition(".")[2] for name, config in configs.items()} == {
        "single": "NO",
        "multi_cpu": "MULTI_GPU",
        "multi_gpu": "MULTI_GPU",
        "fsdp2": "FSDP",
        "deepspeed_zero2": "DEEPSPEED",
        "deepspeed_zero3": "DEEPSPEED",
    }
    assert configs["fsdp2"].fsdp_config["fsdp_version"] == 2
    assert configs["deepspeed_zero2"].deepspeed_config["zero_stage"] == 2
    assert configs["deepspeed_zero3"].deepspeed_config["zero_stage"] == 3


@pytest.mark.parametrize("folder", [".", "recipes", "tests", "trainer", "modeling_cosup"])
def test_import_evaluate_and_trainer_find_the_right_module(folder):
    """No file of this project shadows either name, in whatever folder Python starts."""
    pytest.importorskip("evaluate")
    code = "import importlib.util as u; print(u.find_spec('evaluate').origin); print(u.find_spec('trainer').origin)"
    result = run(PYTHON, "-c", code, cwd=ROOT / folder)
    assert result.returncode == 0, result.stderr[-2000:]
    evaluate, trainer = map(Path, result.stdout.splitlines())
    assert evaluate.parts[-3:] == ("site-packages", "evaluate", "__init__.py")
    assert trainer == ROOT / "trainer" / "__init__.py"


def test_a_foreign_trainer_package_is_named(tmp_path):
    (tmp_path / "trainer").mkdir()
    (tmp_path / "trainer" / "__init__.py").write_text("")
    code = f"import sys; sys.path[:0] = [{str(tmp_path)!r}, {str(ROOT / 'recipes')!r}]; import shared.cli"
    result = run(PYTHON, "-c", code)
    assert result.returncode == 1
    assert "another package" in result.stderr


PLACES_OF_A_CHECKPOINT = {
    "generate": {"model": "gen"},
    "build_index": {"model": "gen", "corpus_file": "corpus.jsonl"},
    "run_evaluation": {"model": "gen", "eval_file": "eval.jsonl", "index": "gen"},
    "train": {"model_name_or_path": "gen", "train_file": "train.jsonl"},
}


@pytest.mark.parametrize("recipe", PLACES_OF_A_CHECKPOINT)
def test_a_plain_language_model_is_refused_where_a_checkpoint_is_expected(inputs, tmp_path, monkeypatch, recipe):
    arguments = {name: inputs / value for name, value in PLACES_OF_A_CHECKPOINT[recipe].items()}
    if recipe != "generate":
        arguments["output_dir"] = tmp_path / "out"
    questions = ["who?"] if recipe == "generate" else []
    error = fails_here(monkeypatch, recipe, *questions, *flags(**arguments))
    assert f"{inputs}/gen is a plain llama model, not a CoSup checkpoint" in error
    assert "from_gen_and_emb_seq" in error and "--gen" in error and "\n" not in error


def test_the_trainer_refuses_the_name_of_a_plain_language_model(inputs, tmp_path):
    with pytest.raises(ValueError, match="is a plain llama model, not a CoSup checkpoint"):
        CoSupTrainer(str(inputs / "gen"), CoSupTrainingArguments(str(tmp_path), report_to="none"))
