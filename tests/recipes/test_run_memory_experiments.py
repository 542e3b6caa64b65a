"""Experiments with token memories from file to report, at a tiny size; their files, and what they refuse."""

import json
import math
from pathlib import Path

import pytest
import run_memory_experiments
import torch
import yaml
from transformers import AutoTokenizer

from modeling_cosup.lines_cosup import read_lines
from modeling_cosup.packing_cosup import pad_rows

from experiments.bottleneck_scores import NoFFN, remove_last_ffn
from experiments.macondo_scores import prompt_ids, read_children
from experiments.memory_definition import load_memory_experiment
from experiments.memory_stages import make_data, prepare
from experiments.memory_training import new_gen

SHIPPED = Path(__file__).parents[2] / "recipes" / "experiments"
TINY = {
    "title": "A tiny Macondo",
    "data": {"num_villagers": 3, "max_children": 2, "validation_share": 0.34, "num_other_relations": 16},
    "arms": {
        "gpt2-like": {
            "gen": {"model_type": "gpt2", "n_positions": 64, "n_embd": 16, "n_layer": 2, "n_head": 2},
        },
    },
    "pretraining": {"max_steps": 2, "per_device_train_batch_size": 8, "use_cpu": True},
    "training": {"max_steps": 4, "per_device_train_batch_size": 9, "learning_rate": 1e-2, "use_cpu": True},
    "knn": {"dtype": "float32"},
    "mlp": {"intermediate_size": 16, "num_train_epochs": 1, "batch_size": 32, "learning_rate": 1e-3},
    "fit": {"ks": [4, 16]},
    "projection": {
        "max_positions": 3,
        "variants": {"paper": {"learning_rate": 0.1, "tolerance": 0.01, "max_steps": 9}},
    },
    "hurdle": {
        "max_sentences": 4,
        "every": 2,
        "training": {"max_steps": 4, "per_device_train_batch_size": 4, "use_cpu": True},
    },
}
MEMORY_EXPERIMENTS = ("macondo", "macondo_paper", "softmax_bottleneck")
LINES = ["LM", "LM + kNN", "LM + kNN, fitted", "LM + MLP", "LM + MLP, fitted", "optimum"]


def write_experiment(folder, name="experiment.yaml", **fields):
    path = folder / name
    path.write_text(yaml.safe_dump(TINY | fields))
    return str(path)


def made_in(folder):
    """Return what stages made in a folder of the cache, without their locks."""
    return sorted(folder.glob("[!.]*"))


def run(monkeypatch, experiment, output, *more):
    """Run the recipe, and return its exit code and results."""
    argv = ["run_memory_experiments.py", "--experiment", experiment, "--output_dir", str(output), *map(str, more)]
    monkeypatch.setattr("sys.argv", argv)
    with pytest.raises(SystemExit) as ending:
        run_memory_experiments.main()
    return ending.value.code, json.loads((output / "results.json").read_text())


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The results of both kinds of experiments on the same cache: by name, exit code, results and report."""
    folder = tmp_path_factory.mktemp("experiments")
    files = {
        "children": write_experiment(folder, "children.yaml", projection={}, hurdle={}),
        "bottleneck": write_experiment(folder, "bottleneck.yaml"),
    }
    outputs = {}
    with pytest.MonkeyPatch.context() as patch:
        for name, file in files.items():
            options = ("--cache_dir", folder / "cache", "--seeds", "0,1" if name == "children" else "0")
            outputs[name] = (*run(patch, file, folder / name, *options), (folder / name / "report.md").read_text())
    return folder, outputs


def test_the_report_has_every_line_by_number_of_children(finished):
    folder, outputs = finished
    code, results, report = outputs["children"]
    assert code == 0
    figures = results["figures"]["children"]["gpt2-like"]
    assert list(figures) == LINES
    for line, by_count in figures.items():
        assert list(by_count) == ["1", "2", "all"]
        assert len(by_count["all"]["seeds"]) == 2
        assert all(figure["value"] <= 0 for figure in by_count.values())
        assert f"| {line} |" in report
    assert figures["optimum"]["2"]["value"] == pytest.approx(-math.log(2))
    assert figures["LM + kNN"]["all"]["difference"]["n"] == 8  # 2 test villagers of each kind, 2 seeds
    difference = figures["LM + kNN"]["all"]["value"] - figures["LM"]["all"]["value"]
    assert figures["LM + kNN"]["all"]["difference"]["value"] == pytest.approx(difference, abs=1e-6)
    assert (folder / "children" / "plots" / "children.png").exists()
    assert "results.json" not in report and "run_memory_experiments.py --experiment" in report


def test_weights_are_fitted_on_the_validation_sentences(finished):
    _, outputs = finished
    for run_of_seed in outputs["children"][1]["runs"]:
        children = run_of_seed["children"]
        assert children["configs"]["LM + kNN"] == children["configs"]["LM + MLP"]
        assert children["configs"]["LM + kNN"]["weight"] == 0.25
        for line in ("LM + kNN, fitted", "LM + MLP, fitted"):
            best = min(children["fits"][line], key=lambda trial: trial["perplexity"])
            assert children["configs"][line]["weight"] == best["weight"]
            assert children["configs"][line]["temperature"] == best["temperature"]


def test_projections_and_hurdle_are_reported_from_the_same_checkpoints(finished):
    folder, outputs = finished
    code, results, report = outputs["bottleneck"]
    assert code == 0
    assert len(made_in(folder / "cache" / "gens")) == 2  # of two seeds; none was trained for this report
    targets = results["figures"]["projections"]["gpt2-like"]
    assert list(targets) == ["LM + kNN", "LM + kNN, fitted"]
    for lines in targets.values():
        assert list(lines) == ["LM", "target", "f, paper", "f∘g, paper"]
        for name in ("f, paper", "f∘g, paper"):
            assert lines[name]["kl_before"]["value"] == pytest.approx(lines["LM"]["kl_after"]["value"], abs=1e-4)
    hurdle = results["figures"]["hurdle"]["gpt2-like"]
    assert list(hurdle["with"]) == list(hurdle["without"]) == ["2", "4"]
    assert hurdle["with"]["4"]["value"] != hurdle["without"]["4"]["value"]
    assert "The softmax bottleneck" in report and "The MLP hurdle" in report
    assert "children" not in results["figures"]


def test_a_stage_that_is_done_is_not_run_again(finished, monkeypatch, capsys):
    folder, outputs = finished
    argv = ("--cache_dir", folder / "cache", "--seeds", "0,1")
    code, results = run(monkeypatch, str(folder / "children.yaml"), folder / "again", *argv)
    assert code == 0
    assert results["figures"] == outputs["children"][1]["figures"]
    assert "[gpt2-like" not in capsys.readouterr().out


def test_a_child_is_scored_as_a_forward_of_its_prompt_scores_it(finished):
    folder, _ = finished
    prepared = prepare(load_memory_experiment(folder / "children.yaml"), "gpt2-like", 0, folder / "cache")
    path = prepared.data / "test.jsonl"
    children = read_children(path, prepared.gen, prepared.tokenizer)
    for line, log_prob, target in zip(children.lines, children.lm_log_probs, children.targets, strict=True):
        ids = prepared.tokenizer(f"{line['villager']}, is the parent of", return_tensors="pt")["input_ids"]
        assert ids[0, 0] == prepared.tokenizer.bos_token_id
        expected = prepared.gen(input_ids=ids).logits[0, -1].log_softmax(0)
        assert prepared.tokenizer.decode([target]) == line["child"]
        assert log_prob.item() == pytest.approx(expected[target].item(), abs=1e-5)


def test_a_checkpoint_takes_the_place_of_a_model_from_scratch(finished, tmp_path, monkeypatch):
    """Children are single tokens of its tokenizer, and LoRA is merged into its weights."""
    folder, _ = finished
    checkpoint = made_in(folder / "cache" / "gens")[0]
    vocabulary = AutoTokenizer.from_pretrained(checkpoint).get_vocab()
    names = [word for word in sorted(vocabulary) if word[0].isupper()]
    (tmp_path / "children.txt").write_text("\n".join(names))
    arm = {"gen": str(checkpoint), "lora": {"r": 2, "target_modules": ["c_attn"]}, "pretraining": {}}
    sizes = {"num_villagers": 3, "max_children": 2, "validation_share": 0.34}
    data = {**sizes, "child_names": str(tmp_path / "children.txt")}
    fields = {"arms": {"checkpoint": arm}, "pretraining": {}, "data": data, "projection": {}, "hurdle": {}}
    file = write_experiment(tmp_path, **fields)
    code, results = run(monkeypatch, file, tmp_path / "out", "--num_threads", 1)
    assert (code, results["runs"][0]["failure"]) == (0, None)
    assert "pretraining_loss" not in results["runs"][0]["facts"]["gen"]
    (trained,) = made_in(tmp_path / "out" / "gens")
    assert not list(trained.glob("adapter*")) and (trained / "model.safetensors").exists()


def test_an_arm_that_fails_is_reported_and_the_others_run(finished, tmp_path, monkeypatch):
    folder, _ = finished
    broken = {"gen": {"model_type": "mamba", "hidden_size": 16, "num_hidden_layers": 1}}
    file = write_experiment(tmp_path, arms={"broken": broken, **TINY["arms"]}, projection={}, hurdle={})
    code, results = run(monkeypatch, file, tmp_path / "out", "--cache_dir", folder / "cache")
    assert code == 1
    assert [bool(entry["failure"]) for entry in results["runs"]] == [True, False]
    # before it is trained
    assert "The key of a mamba model is not known" in (tmp_path / "out" / "report.md").read_text()
    assert list(results["figures"]["children"]) == ["gpt2-like"]


def test_without_the_last_ffn_the_last_layer_adds_only_its_attention(finished):
    folder, _ = finished
    experiment = load_memory_experiment(folder / "children.yaml")
    data, tokenizer = make_data(experiment, "gpt2-like", 0, folder / "cache")
    gen = new_gen(experiment.arms["gpt2-like"]["gen"], tokenizer, 0).eval()
    ids, _ = pad_rows(prompt_ids(read_lines(data / "test.jsonl")[:2], tokenizer))
    last = gen.transformer.h[-1].mlp.c_proj
    with torch.no_grad():
        last.weight.zero_()
        last.bias.zero_()
        expected = gen(input_ids=ids).logits
        remove_last_ffn(gen)
        assert isinstance(gen.transformer.h[-1].mlp, NoFFN)
        assert torch.equal(gen(input_ids=ids).logits, expected)


# ---------------------------------------------------------------------- files


@pytest.mark.parametrize("name", MEMORY_EXPERIMENTS)
def test_shipped_experiments_are_valid(name):
    experiment = load_memory_experiment(SHIPPED / f"{name}.yaml")
    assert experiment.data["num_villagers"] == 100 and experiment.data["max_children"] == 5
    assert bool(experiment.projection) == bool(experiment.hurdle) == (name == "softmax_bottleneck")


def test_the_bottleneck_uses_the_checkpoints_of_macondo():
    macondo, bottleneck = (load_memory_experiment(SHIPPED / f"{n}.yaml") for n in ("macondo", "softmax_bottleneck"))
    for field in ("data", "arms", "pretraining", "training", "knn", "mlp", "fit", "seeds"):
        assert getattr(macondo, field) == getattr(bottleneck, field)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"arm": {}}, "unknown field 'arm', expected one of title, arms"),
        ({"training": None}, "training is missing"),
        ({"data": {"villagers": 3}}, "data: unknown option 'villagers', expected one of num_villagers"),
        ({"data": {"num_villagers": 0}}, "--num_villagers is 0"),
        ({"data": {"num_villagers": 3, "validation_share": 0.1}}, "some to fit on and some to test on"),
        ({"data": {"num_villagers": 3, "validation_share": 0.34}}, "pretraining needs data.num_other_relations"),
        ({"training": {"learning_rat": 1}}, "training: unknown option 'learning_rat', expected one of learning_rate"),
        ({"mlp": {"hidden_size": 3}}, "mlp: unknown option 'hidden_size', expected one of"),
        (
            {"arms": {"a": {"gen": "G", "knn": {"dtyp": 3}}}},
            "arm a: knn: unknown option 'dtyp', expected one of dtype",
        ),
        ({"hurdle": {"training": {}}}, "hurdle: every is None, expected a number of steps"),
        ({"projection": {"max_positions": 3}}, "projection: variants is missing"),
        ({"data": {"seed": 3}}, "data: unknown option 'seed'"),
        ({"arms": {"a": {"gen": {"n_embd": 8}}}}, "arm a: gen has no model_type"),
        ({"arms": {"a": {"gem": "gpt2"}}}, "arm a: unknown option 'gem'"),
        ({"arms": {"a": {"gen": None}}}, "arm a: gen is None, expected a name, a path"),
        ({"mlp": 3}, "mlp is 3, expected names and values"),
        ({"seeds": [0, 0]}, "holds a seed twice"),
        ({"projection": {"steps": 3}}, "projection: unknown option 'steps'"),
        (
            {"projection": {"variants": {"v": {"learning_rate": 0.1, "tolerance": -1, "max_steps": 9}}}},
            "v: tolerance is -1, expected a number that is not negative",
        ),
    ],
)
def test_a_file_that_makes_no_experiment_is_refused(tmp_path, fields, message):
    with pytest.raises(ValueError, match=message):
        load_memory_experiment(write_experiment(tmp_path, **fields))
