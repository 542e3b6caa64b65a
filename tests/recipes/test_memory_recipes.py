"""The recipes that measure, train and fit token memories, in this process, as a user runs them."""

import importlib
import json
import math
import os
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch

from modeling_cosup import CoSupForCausalLM, KNNMemory, MemoryConfig, MLPMemory
from modeling_cosup.files_cosup import write_json
from modeling_cosup.token_keys_cosup import document_ids
from support.models import TEXTS, make_gen, make_model, make_tokenizer
from support.recipes import fails_here, flags, write
from trainer.memory_fit import KS, MemoryFit
from trainer.reports.perplexity import shown_overlap, write_perplexity_report

from shared.token_memories import read_documents

LONG = " ".join(TEXTS)
HELD_OUT = ["Marie Curie was born in Warsaw.", "The city of Amsterdam has a painting by Rembrandt in it.", LONG]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A CoSup checkpoint, a plain Gen, a memory of each kind for both, and files of text."""
    folder = tmp_path_factory.mktemp("memories")
    model, gen, tokenizer = make_model(tie_emb_seq=True), make_gen("gpt2"), make_tokenizer()
    model.save_pretrained(folder / "model")
    gen.save_pretrained(folder / "gen")
    tokenizer.save_pretrained(folder / "gen")
    options = {"max_length": 16, "stride": 8, "show_progress_bar": False}
    KNNMemory.build(model, [*TEXTS, LONG], folder / "knn", **options)
    KNNMemory.build(gen, TEXTS, folder / "gen_knn", tokenizer=tokenizer, **options)
    torch.manual_seed(0)
    MLPMemory.from_gen(model, intermediate_size=8).save_pretrained(folder / "mlp")
    MLPMemory.from_gen(gen, 4096, tokenizer).save_pretrained(folder / "other_mlp")
    write(folder / "text.jsonl", [{"id": str(i), "title": "", "text": text} for i, text in enumerate(HELD_OUT)])
    (folder / "book.txt").write_text(" ".join(HELD_OUT))
    return folder


def runs_here(monkeypatch, recipe, **options):
    """Run a recipe in this process."""
    monkeypatch.setattr(sys, "argv", [f"{recipe}.py", *flags(**options)])
    importlib.import_module(recipe).main()


@pytest.fixture(scope="module")
def results(world, tmp_path_factory):
    """The results of run_perplexity.py on a CoSup checkpoint, and what it printed."""
    output = tmp_path_factory.mktemp("perplexity")
    with pytest.MonkeyPatch.context() as monkeypatch:
        memories = ["--memory", str(world / "knn"), str(world / "mlp")]
        options = flags(
            model=world / "model",
            text_file=world / "text.jsonl",
            output_dir=output,
            memory_weight=0.5,
            memory_k=3,
            max_length=16,
            max_documents=3,
            num_threads=1,
        )
        monkeypatch.setattr(sys, "argv", ["run_perplexity.py", *options, *memories])
        importlib.import_module("run_perplexity").main()
    return output


def test_perplexity_of_text(world, results):
    measured = json.loads((results / "perplexity.json").read_text())
    tokenizer = make_tokenizer()
    num_tokens = sum(len(document_ids(text, tokenizer)) - 1 for text in HELD_OUT)
    assert measured["text"] == {"documents": 3, "left_out": 0, "tokens": num_tokens}
    knn, mlp = str(world / "knn"), str(world / "mlp")
    assert list(measured["arms"]) == ["lm", knn, mlp]
    for name, arm in measured["arms"].items():
        assert arm["perplexity"]["value"] == pytest.approx(math.exp(arm["nll"]["value"]))
        low, high = arm["perplexity"]["interval"]
        assert low <= arm["perplexity"]["value"] <= high
        assert arm["seconds_per_1000_tokens"] == pytest.approx(1000 * arm["seconds"] / num_tokens)
        if name != "lm":
            difference = arm["nll"]["value"] - measured["arms"]["lm"]["nll"]["value"]
            assert arm["difference"]["value"] == pytest.approx(difference)
            assert (arm["memory_config"]["weight"], arm["memory_config"]["k"]) == (0.5, 3)
    assert measured["arms"][knn]["entries"] == len(KNNMemory.from_pretrained(knn))
    stored = len(document_ids(LONG, tokenizer)) - 16  # the third text is in the store
    total = sum(max(1, len(document_ids(text, tokenizer)) - 16) for text in HELD_OUT)  # a short one counts once
    assert measured["arms"][knn]["ngram_overlap"] == pytest.approx(stored / total)
    assert measured["arms"][mlp]["ngram_overlap"] is None
    overlapping, unknown = measured["warnings"]
    assert f"of the text is in {knn}, as 16-grams or as short documents" in overlapping
    assert f"{mlp} does not record what it was trained on" in unknown
    assert 0.05 < measured["peak_memory"] < 64  # GB
    assert (measured["settings"]["max_length"], measured["settings"]["stride"]) == (16, 8)


def test_the_report_of_a_perplexity(results):
    report = (results / "report.md").read_text()
    assert "# Perplexity of" in report
    assert "Gen alone" in report
    assert "Warnings" in report
    assert "run_perplexity.py --model" in report
    assert (results / "report.html").exists()
    assert re.search(r"91 tokens of 3 documents; windows .*; peak memory \d+\.\d\d GB\.", report)


def test_the_report_says_what_was_left_out_and_no_memory_that_was_not_measured(results, tmp_path, capsys):
    measured = json.loads((results / "perplexity.json").read_text())
    measured["text"]["left_out"] = 2
    del measured["peak_memory"]
    write_json(tmp_path / "perplexity.json", measured)
    write_perplexity_report(tmp_path)
    report = (tmp_path / "report.md").read_text()
    text = "91 tokens of 3 documents, and 2 without a token to predict, which are left out"
    assert f"{text}; windows" in report
    assert "peak memory" not in report
    importlib.import_module("run_perplexity").print_figures(measured, tmp_path)
    assert f"{text} (95 % intervals in brackets)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("share", "expected"), [(None, "—"), (0.0, "0.0 %"), (0.00046, "< 0.1 %"), (0.0005, "0.1 %"), (0.12345, "12.3 %")]
)
def test_an_overlap_above_0_is_not_shown_as_0(share, expected):
    assert shown_overlap(share) == expected


def test_train_fit_and_measure_with_a_plain_gen(world, monkeypatch, tmp_path, capsys):
    output = tmp_path / "mlp"
    runs_here(
        monkeypatch,
        "train_memory",
        model=world / "gen",
        memory=world / "gen_knn",
        output_dir=output,
        intermediate_size=8,
        kl_weight=0.5,
        validation_split=0.1,
        num_train_epochs=2,
        learning_rate=1e-2,
        per_device_train_batch_size=16,
        save_strategy="no",
        disable_tqdm="true",
        fit_file=world / "text.jsonl",
        max_fit_tokens=20,
        max_length=16,
    )
    assert "Fitted on 20 held-out tokens" in capsys.readouterr().out
    fit = json.loads((output / "memory_fit.json").read_text())
    assert fit["tokens"] == 20
    assert fit["perplexity"] <= fit["lm_perplexity"]
    trained = MLPMemory.from_pretrained(output)
    assert trained.memory_config.to_dict() == fit["memory_config"]
    assert json.loads((output / "eval_results.json").read_text())["eval_knn_kl"] > 0
    assert json.loads((output / "train_results.json").read_text())["train_loss"] > 0
    perplexity = tmp_path / "perplexity"
    options = {"text_file": world / "book.txt", "output_dir": perplexity, "max_length": 16, "memory": output}
    runs_here(monkeypatch, "run_perplexity", model=world / "gen", **options)
    measured = json.loads((perplexity / "perplexity.json").read_text())
    assert measured["text"]["documents"] == 1
    assert measured["arms"]["lm"]["perplexity"]["interval"] is None
    assert measured["arms"][str(output)]["memory_config"] == fit["memory_config"]
    # which text the MLP was trained on is not known any more
    options = {"model": world / "gen", "memory": output, "fit_file": world / "text.jsonl", "max_length": 16}
    runs_here(monkeypatch, "train_memory", fit_only="true", **options)
    not_checked = f"warning: not checked: {output} does not record whether it was trained on {world / 'text.jsonl'}."
    assert not_checked in capsys.readouterr().out


def test_a_text_may_begin_with_a_byte_order_mark_and_is_named_if_it_is_not_utf_8(tmp_path):
    tokenizer = make_tokenizer()
    (tmp_path / "BOOK.TXT").write_text(LONG, encoding="utf-8-sig")
    assert list(read_documents(tmp_path / "BOOK.TXT", tokenizer)) == [document_ids(LONG, tokenizer)]
    (tmp_path / "latin.txt").write_text("größer", encoding="latin-1")
    with pytest.raises(ValueError, match="latin.txt is not UTF-8: .* position 2"):
        list(read_documents(tmp_path / "latin.txt", tokenizer))


def test_a_datastore_is_fitted_in_its_folder(world, results, monkeypatch, tmp_path, capsys):
    KNNMemory.from_pretrained(world / "knn").save_pretrained(tmp_path / "knn")
    options = {
        "model": world / "model",
        "memory": tmp_path / "knn",
        "fit_file": world / "text.jsonl",
    }
    runs_here(monkeypatch, "train_memory", fit_only="true", max_length=16, **options)
    fit = json.loads((tmp_path / "knn" / "memory_fit.json").read_text())
    measured = json.loads((results / "perplexity.json").read_text())
    assert fit["ngram_overlap"] == measured["arms"][str(world / "knn")]["ngram_overlap"] > 0
    printed = capsys.readouterr().out
    assert "is in the datastore, as 16-grams or as short documents: the weight is too high" in printed
    (tmp_path / "knn" / "memory_fit.json").unlink()  # a copy, or a repository on the Hub, does not hold it
    fitted = KNNMemory.from_pretrained(tmp_path / "knn")
    assert fitted.memory_config.to_dict() == fit["memory_config"]
    assert {trial["k"] for trial in fit["trials"]} == {min(k, len(fitted)) for k in KS}
    # the perplexity that was fitted is the one that run_perplexity.py measures with this config
    runs_here(
        monkeypatch,
        "run_perplexity",
        model=world / "model",
        memory=tmp_path / "knn",
        text_file=world / "text.jsonl",
        output_dir=tmp_path / "out",
        max_length=16,
    )
    arm = json.loads((tmp_path / "out" / "perplexity.json").read_text())["arms"][str(tmp_path / "knn")]
    assert arm["perplexity"]["value"] == pytest.approx(fit["perplexity"], rel=1e-5)
    warnings = json.loads((tmp_path / "out" / "perplexity.json").read_text())["warnings"]
    assert f"Weight and temperature of {tmp_path / 'knn'} were fitted on this text." in warnings
    assert any("as 16-grams or as short documents" in warning for warning in warnings)


@pytest.mark.parametrize(
    ("k", "num_entries", "expected"), [(8, 100, True), (2, 100, False), (8, 8, False), (8, None, False)]
)
def test_a_best_k_at_the_end_of_those_tried_is_named(capsys, k, num_entries, expected):
    trials = [{"k": tried, "temperature": 1.0, "weight": 0.5, "perplexity": 9.0} for tried in (2, 8)]
    fit = MemoryFit(MemoryConfig(k=k), 9.0, 10.0, trials)
    importlib.import_module("train_memory").print_fit(fit, 20, Path("mem"), num_entries)
    assert ("more neighbours may be better" in capsys.readouterr().out) is expected


def test_a_memory_is_built(world, monkeypatch, tmp_path, capsys):
    options = {"text_file": world / "text.jsonl", "max_length": 16, "stride": 8, "batch_size": 2}
    files = {"model": world / "model", "output_dir": tmp_path / "memory", **options}
    files |= {"shard_size": 10, "key_dtype": "bfloat16"}
    # too few keys, which is known only after they are stored
    assert "IVF999" in fails_here(monkeypatch, "build_memory", *flags(**files, index_factory="IVF999,Flat"))
    keys = (tmp_path / "memory" / "keys-00000.safetensors").stat()
    runs_here(monkeypatch, "build_memory", **files, index_factory="IVF4,Flat", nprobe=4)
    assert os.path.samestat((tmp_path / "memory" / "keys-00000.safetensors").stat(), keys)  # not stored again
    printed = capsys.readouterr().out
    assert "holds these texts already" in printed
    memory = KNNMemory.from_pretrained(tmp_path / "memory", allow_faiss_files=True)
    assert f"{len(memory):,} tokens of 3 texts" in printed
    assert "perplexity_approximate" in printed
    assert len(memory.config["shards"]) > 1
    assert memory.config["dtype"] == "bfloat16"
    figures = memory.config["approximate"]
    assert (figures["index_factory"], figures["search_options"]) == ("IVF4,Flat", {"nprobe": 4})
    model = CoSupForCausalLM.from_pretrained(world / "model")
    memory.check_model(model)
    texts = {"max_length": 16, "stride": 8, "batch_size": 2, "dtype": "bfloat16", "show_progress_bar": False}
    same = model.build_memory(HELD_OUT, **texts)
    rows = torch.arange(len(same))
    assert torch.equal(memory.get_values(rows), same.get_values(rows))
    one_rounding = 2**-7  # of bfloat16: some CPUs round a sum differently in another process
    torch.testing.assert_close(memory.get_keys(rows), same.get_keys(rows), rtol=one_rounding, atol=1e-3)

    runs_here(monkeypatch, "build_memory", model=world / "gen", output_dir=tmp_path / "plain", **options)
    KNNMemory.from_pretrained(tmp_path / "plain").check_model(make_gen("gpt2"))


def test_bad_options_are_reported(world, monkeypatch, tmp_path):
    shutil.copytree(world / "gen", tmp_path / "gen")
    make_tokenizer(bos=None).save_pretrained(tmp_path / "gen")
    of_gen = ["--model", tmp_path / "gen", "--memory", world / "gen_knn"]
    common = ["--model", world / "model", "--text_file", world / "text.jsonl", "--output_dir", tmp_path / "out"]
    knn, mlp = str(world / "knn"), str(world / "mlp")
    for options, message in (
        (["--memory", knn, knn], f"--memory names {knn} twice"),
        (["--memory", tmp_path / "none"], "no such file or folder"),
        (["--max_documents", "0"], "--max_documents is 0, expected at least 1"),
        (["--max_length", "9999"], "max_length is 9999, the model reads at most"),
        (["--memory", knn, "--memory_weight", "2"], "weight is 2.0, expected a number from 0 to 1"),
        (["--memory", knn, "--memory_weight", "1", "--memory_k", "1"], "tokens probability 0 or NaN: the perplexity"),
        (["--memory_weight", "0.5"], "--memory_weight 0.5 without --memory: name the memory"),
        (["--memory_k", "5"], "--memory_k 5 without --memory"),
        (["--memory_temperature", "2"], "--memory_temperature 2.0 without --memory"),
        (["--memory_device", "cpu"], "--memory_device cpu without --memory"),
        (["--allow_faiss_files", "true"], "--allow_faiss_files True without --memory"),
        (["--memory", mlp, "--memory_k", "5"], "--memory_k 5 is for a KNNMemory, and no --memory is one"),
        (["--memory", mlp, "--memory_device", "cpu"], "--memory_device cpu is for a KNNMemory"),
        (["--memory", world / "gen_knn"], "This memory was made with another model"),
        (of_gen, "tokenizer: the memory has"),
        (["--text_file", tmp_path / "none.jsonl"], "no such file"),
    ):
        assert message in fails_here(monkeypatch, "run_perplexity", *common, *options)
    assert not (tmp_path / "out").exists()
    for options, message in (
        (["--nprobe", "3"], "--nprobe 3 is for an approximate index: give --index_factory"),
        (["--train_size", "9"], "--train_size 9 is for an approximate index"),
        (["--seed", "1"], "--seed 1 is for an approximate index"),
        (["--index_factory", "PQ5"], "'PQ5' of 32 dimensions .* should be a multiple of the number of subquantizers"),
        (["--key_dtype", "int8"], "dtype is 'int8', expected one of float32, float16, bfloat16"),
    ):
        assert re.search(message, fails_here(monkeypatch, "build_memory", *common, *options))
    assert not (tmp_path / "out").exists()
    common = ["--model", world / "model", "--memory", knn]
    for folder, message in (("model", "model holds a model"), ("knn", "knn holds a memory of another kind")):
        assert message in fails_here(monkeypatch, "train_memory", *common, "--output_dir", world / folder)
    common = ["--model", world / "model", "--output_dir", tmp_path / "out"]
    only_fit = ["--fit_only", "true", "--fit_file", world / "text.jsonl"]
    for options, message in (
        (["--memory", world / "mlp"], "has no keys to train on"),
        (["--memory", knn, "--fit_only", "true"], "--fit_only needs a --fit_file"),
        (["--memory", knn, *only_fit], "--output_dir .*out: --fit_only writes into the folder of --memory"),
        (["--memory", world / "gen_knn"], "This memory was made with another model"),
        (of_gen, "tokenizer: the memory has"),
        (["--memory", knn, "--fit_file", tmp_path / "none.jsonl"], "no such file"),
        (["--memory", knn, "--resume_from_checkpoint", "true"], "holds no complete checkpoint"),
        (["--memory", knn, "--resume_from_checkpoint", world / "other_mlp"], "is of a memory of another Gen: start"),
        (
            ["--memory", knn, "--resume_from_checkpoint", world / "mlp"],
            "intermediate_size is 4096, and .* has 8",
        ),
    ):
        assert re.search(message, fails_here(monkeypatch, "train_memory", *common, *options))
    for option, value in (
        ("intermediate_size", "8"),
        ("learning_rate", "0.1"),
        ("num_train_epochs", "1.0"),
        ("kl_weight", "0.5"),
        ("validation_split", "0.5"),
        ("resume_from_checkpoint", "true"),
    ):
        words = ["--model", world / "model", "--memory", knn, *only_fit, f"--{option}", value]
        message = f"--{option} {value} is for training, and --fit_only trains nothing"
        assert message in fails_here(monkeypatch, "train_memory", *words)
    assert not (tmp_path / "out").exists()
