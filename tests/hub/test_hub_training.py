"""From training to the Hub: `--push_to_hub`, `CoSupTrainer.push_to_hub`, adapters, and what must never be uploaded."""

import json
import re
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from modeling_cosup import CoSupForCausalLM
from modeling_cosup.facts_cosup import facts_of
from support.hub_server import TOKEN, hub_server
from support.models import PASSAGES, make_model
from support.recipes import ROOT, options
from trainer import CoSupTrainer, CoSupTrainingArguments
from trainer.card import result_group
from trainer.judging.intervals import Mean, Rate

pytest.importorskip("jsonschema", reason="jsonschema, which the test Hub checks cards with, is not installed")

TRAIN = f"""
import json, sys
sys.path.insert(0, {str(ROOT / "recipes")!r})
from train import main
main()
print()
print(json.dumps(1))
"""
ANSWER = """
import json, sys
import torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
index = model.load_index(sys.argv[2])
out = model.generate(torch.tensor([[5, model.config.nsp_token_id]]), retriever=index, max_new_tokens=5, return_dict_in_generate=True)
print(json.dumps([out.sequences.tolist(), out.retrievals[0][0].passage_id]))
"""
ADAPTERS = """
import json, sys
import torch
from peft import AutoPeftModelForCausalLM
from transformers import AutoModelForCausalLM
model = AutoPeftModelForCausalLM.from_pretrained("tester/adapters", trust_remote_code=True)
ids = torch.tensor([[5, 6, 7]])
def answer(model):
    return [model.generate(input_ids=ids, max_new_tokens=5).tolist(), float(model(input_ids=ids).logits.double().sum())]
results = [answer(model)]
merged = model.merge_and_unload()
results.append(answer(merged))
merged.save_pretrained(sys.argv[1])
results.append(answer(AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)))
index = merged.load_index("tester/adapters-index")
print(json.dumps([results, len(index), type(merged).__module__.split(".")[0]]))
"""
FETCH = """
import json, sys
from pathlib import Path
from huggingface_hub import snapshot_download
folder = Path(snapshot_download(sys.argv[1], repo_type=sys.argv[2]))
print(json.dumps([sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()), (folder / "README.md").read_text(), str(folder)]))
"""


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    with hub_server(tmp_path_factory.mktemp("hub") / "server") as running:
        yield running


@pytest.fixture(scope="module")
def trained(hub, inputs, tmp_path_factory):
    """What `recipes/train.py --push_to_hub true` leaves here, all that it said, and the files of the repository."""
    output = tmp_path_factory.mktemp("trained") / "out"
    extra = [
        "--push_to_hub",
        "true",
        "--hub_model_id",
        "tester/trained",
        "--hub_token",
        TOKEN,
        "--license",
        "apache-2.0",
    ]
    extra += [
        "--max_steps",
        4,
        "--logging_steps",
        1,
        "--validation_file",
        inputs / "train.jsonl",
        "--save_strategy",
        "steps",
        "--save_steps",
        2,
    ]
    extra += ["--corpus_license", "cc-by-sa-4.0", "--push_index", "true"]
    process = hub.popen(TRAIN, *options(inputs, output, *extra), token=None)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    return output, out + err, *hub.run(FETCH, "tester/trained", "model")


def test_a_trained_checkpoint_and_its_index_answer_the_same_elsewhere(hub, trained):
    output = trained[0]
    model = CoSupForCausalLM.from_pretrained(output)
    index = model.load_index(output / "index")
    out = model.generate(
        torch.tensor([[5, model.config.nsp_token_id]]), retriever=index, max_new_tokens=5, return_dict_in_generate=True
    )
    expected = [out.sequences.tolist(), out.retrievals[0][0].passage_id]
    assert hub.run(ANSWER, "tester/trained", "tester/trained-index", package=False) == expected


def test_the_card_says_what_was_trained_and_measured(trained):
    output, _, names, card, _ = trained
    metadata = card.split("---")[1]
    assert (
        "license: apache-2.0" in metadata
        and "model-index:" in metadata
        and "type: query_recall_at_1" in metadata
        and "interval_95" in metadata
    )
    results = json.loads((output / "results.json").read_text())
    recall = results["evaluation"]["query"]["corpus"]["query_recall@1"]
    assert re.search(rf"\| R@1 \| {100 * recall['value']:.4g} % \[.*\] \| n = 6 \|", card)
    assert (
        "held-out instances, over an index of 6 passages" in card
        and "Trained on 7 instances, which hold 6 distinct passages." in card
    )
    assert "| supervision | co |" in card and "| step | loss | ntp_loss | nsp_loss | nsp_accuracy |" in card
    assert 'model.load_index("tester/trained-index")' in card and '"content": "question 0?"' in card
    facts = json.loads((output / "training_facts.json").read_text())
    assert [entry["step"] for entry in facts["training"]["log"]] == [1, 2, 3, 4]
    if find_spec("matplotlib") is None:
        assert "loss_curves.png" not in card
    else:
        assert (
            "![Loss curves](loss_curves.png)" in card
            and (output / "loss_curves.png").read_bytes().startswith(b"\x89PNG")
            and "loss_curves.png" in names
        )


def test_resume_states_data_and_secrets_stay_here(hub, trained):
    output, said, names, _, folder = trained
    assert {
        "model.safetensors",
        "config.json",
        "tokenizer.json",
        "chat_template.jinja",
        "modeling_cosup.py",
        "README.md",
        "results.json",
    } <= set(names)
    assert "trainer_state.json" not in names and "trainer_state.json" in {path.name for path in output.iterdir()}
    assert not [
        name
        for name in names
        if name.endswith((".bin", ".pt", ".pth", ".jsonl")) or name.startswith(("index/", "checkpoint-", "world/"))
    ]
    assert (output / "training_args.bin").exists() and (
        output / "checkpoint-2"
    ).exists()  # there was something to leave behind
    assert TOKEN not in said
    places = [*output.rglob("*"), *Path(folder).rglob("*")]
    assert not [path for path in places if path.is_file() and TOKEN.encode() in path.read_bytes()]
    ours = [
        str(output).encode(),
        str(output.parent.parent).encode(),
    ]  # paths of this machine, those of the parts included
    assert not [
        path
        for path in Path(folder).rglob("*")
        if path.is_file() and any(place in path.read_bytes() for place in ours)
    ]


def test_a_card_without_a_hub_describes_the_folder(inputs, tmp_path, monkeypatch):

    monkeypatch.setattr("sys.argv", ["train.py", *options(inputs, tmp_path / "out", "--logging_steps", "1")])
    from train import main

    main()
    card = (tmp_path / "out" / "README.md").read_text()
    assert (
        f'from_pretrained("{tmp_path}/out"' in card
        and f'load_index("{tmp_path}/out/index")' in card
        and "| Cor (short answer) |" in card
    )
    assert '"content": "question 0?"' in card
    facts = (tmp_path / "out" / "training_facts.json").read_text()
    assert str(tmp_path) not in facts and "question 0?" not in facts  # what a later push would take along
    model = CoSupForCausalLM.from_pretrained(tmp_path / "out")
    assert facts_of(model)["results"][0]["metrics"]
    model.save_pretrained(tmp_path / "copy")
    assert (tmp_path / "copy" / "training_facts.json").exists()
    with torch.no_grad():
        next(model.parameters()).add_(1)
    for folder in (
        "other",
        "copy",
    ):  # other weights: nothing is known of them, also where the former ones were saved before
        model.save_pretrained(tmp_path / folder)
        assert (
            not (tmp_path / folder / "training_facts.json").exists()
            and not (tmp_path / folder / "loss_curves.png").exists()
        )


def test_adapters_load_onto_the_base_and_merge_into_a_checkpoint_with_code(hub, inputs, tmp_path):
    pytest.importorskip("peft")
    make_model().save_pretrained(tmp_path / "base")
    base = "import sys\nfrom modeling_cosup import CoSupForCausalLM\nCoSupForCausalLM.from_pretrained(sys.argv[1]).push_to_hub('tester/base')\nprint(1)"
    hub.run(base, tmp_path / "base")
    extra = [
        "--model_name_or_path",
        "tester/base",
        "--use_peft",
        "true",
        "--push_to_hub",
        "true",
        "--hub_model_id",
        "tester/adapters",
        "--push_index",
        "true",
    ]
    arguments = options(inputs, tmp_path / "out", *extra, "--learning_rate", "0.01")
    hub.run(TRAIN, *arguments[4:])  # without --gen and --emb_seq
    names, card, _ = hub.run(FETCH, "tester/adapters", "model")
    assert {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json"} <= set(
        names
    ) and "model.safetensors" not in names
    assert (
        "library_name: peft" in card
        and "base_model: tester/base" in card
        and "base_model_relation: adapter" in card
        and "LORA, r = 16" in card
    )
    (adapted, merged, saved), size, module = hub.run(ADAPTERS, tmp_path / "full", package=False)
    assert (
        adapted[0] == merged[0] == saved[0]
        and merged[1] == pytest.approx(adapted[1], rel=1e-4)
        and saved[1] == pytest.approx(merged[1], rel=1e-6)
    )
    assert size == len(PASSAGES) and module == "transformers_modules"
    assert (tmp_path / "full" / "modeling_cosup.py").exists() and (tmp_path / "full" / "tokenizer.json").exists()
    local = CoSupForCausalLM.from_pretrained(tmp_path / "out" / "merged")
    assert local.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=5).tolist() == merged[0]
    code = re.search(r"```python\n(.*?)```", card, re.DOTALL)[1]
    code = code.replace(
        "retriever=index,", "retriever=index, retrieval_config=model.retrieval_config_class(force_nsp_first=True),"
    )
    process = hub.popen(code, package=False)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0 and "[1] " in out, err


def test_what_cannot_be_shared_is_refused_before_training(tmp_path):
    peft = pytest.importorskip("peft")
    rows = [{"input": "q", "segments": [{"text": "t", "passage": PASSAGES[0]}]}]
    lora = peft.LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")
    args = CoSupTrainingArguments(str(tmp_path), push_to_hub=True, report_to="none")
    with pytest.raises(ValueError, match="adapters of a model in memory, which nobody else has"):
        CoSupTrainer(make_model(), args, train_dataset=rows, peft_config=lora)
    for strategy in ("checkpoint", "all_checkpoints"):
        args = CoSupTrainingArguments(str(tmp_path), push_to_hub=True, hub_strategy=strategy, report_to="none")
        with pytest.raises(ValueError, match=f"hub_strategy='{strategy}' would upload resume states"):
            CoSupTrainer(make_model(), args, train_dataset=rows)


def record(trainer, **kwargs):
    trainer.create_model_card(**kwargs)
    folder = Path(trainer.args.output_dir)
    return json.loads((folder / "training_facts.json").read_text()), (folder / "README.md").read_text()


def make_trainer(folder, model=None, rows=None, **kwargs):
    rows = rows or [
        {"input": f"q{i}", "segments": [{"text": "t", "passage": passage}]} for i, passage in enumerate(PASSAGES)
    ]
    args = CoSupTrainingArguments(
        str(folder), max_steps=2, logging_steps=1, save_strategy="no", report_to="none", seed=3
    )
    return CoSupTrainer(model or make_model(), args, train_dataset=rows, **kwargs)


def test_a_card_describes_the_weights_that_were_saved(tmp_path):
    trainer = make_trainer(tmp_path / "a")
    with pytest.raises(ValueError, match=r"call save_model\(\) first"):
        trainer.create_model_card()
    trainer.save_model()
    trainer.train()
    with pytest.raises(ValueError, match="not those that were last saved"):  # those on disk are untrained
        trainer.create_model_card()
    trainer.save_model()
    facts, card = record(
        trainer,
        license="mit",
        tags="mine",
        tasks=["qa"],
        dataset=["me/data", "local.jsonl"],
        model_name="a | b\n# c",
        language="en",
    )
    assert (
        facts["training"]["log"][-1]["step"] == 2
        and facts["datasets"] == ["me/data"]
        and facts["tags"] == ["mine", "qa"]
    )
    assert "# a \\| b # c\n" in card and "- language" not in card and "language: en" in card
    trained = CoSupForCausalLM.from_pretrained(tmp_path / "a")
    assert facts_of(trained) == facts

    again = make_trainer(tmp_path / "b", trained)  # the former run's facts and picture are not this one's
    again.train()
    again.save_model()
    kept = {"license": "mit", "language": "en", "datasets": ["me/data"], "tags": ["mine", "qa"]}
    assert json.loads((tmp_path / "b" / "training_facts.json").read_text()) == kept
    assert not (tmp_path / "b" / "loss_curves.png").exists()


def test_cards_of_tokenized_data_streams_and_other_adapters(tmp_path):
    trainer = make_trainer(tmp_path / "a")
    rows = trainer.train_dataset.remove_columns("dataset").to_list()
    tokenized = make_trainer(tmp_path / "b", rows=rows)
    tokenized.save_model()
    assert "Trained on 6 instances, which hold 6 distinct passages." in record(tokenized)[1]
    tokenized.train_dataset = trainer.train_dataset.to_iterable_dataset()
    assert "Trained on 0 instances" in record(tokenized)[1]  # a stream is not read again to be counted
    peft = pytest.importorskip("peft")
    config = peft.IA3Config(target_modules=["q_proj"], feedforward_modules=[], task_type="CAUSAL_LM")
    adapted = make_trainer(tmp_path / "c", peft_config=config)
    adapted.save_model()
    assert "| adapters | IA3 |" in record(adapted)[1]
    with pytest.raises(ValueError, match="adapters of a model in memory"):
        adapted.push_to_hub()


def test_shares_are_percentages_and_losses_are_not():
    means = {
        "query_recall@1": Rate(1, 4),
        "k_precision": Mean.of([0.5, None, 1.0]),
        "ntp_loss": Mean.of([1.5, 2.5]),
        "em": Rate(0, 0),
    }
    group = result_group(
        {name: mean.to_dict() for name, mean in means.items()}, "nq", 10, {"ntp_loss": "loss of the text"}
    )
    found = [(row["type"], row["value"], row["unit"], row["n"]) for row in group["metrics"]]
    assert found == [
        ("query_recall@1", 25.0, "%", 4),
        ("k_precision", 75.0, "%", 2),
        ("ntp_loss", 2.0, "", 2),
    ]  # nothing of no question
    assert [row["name"] for row in group["metrics"]] == ["R@1", "K-precision", "loss of the text"]
    assert group["dataset"] == {"name": "nq", "type": "custom"}


def test_a_folder_without_weights_is_not_pushed(tmp_path):
    from trainer.hub import push_checkpoint

    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(
        ValueError,
        match="holds no safetensors, so nothing was pushed: with FSDP, save with the state dict type FULL_STATE_DICT",
    ):
        push_checkpoint(tmp_path, "me/model", "message")


def test_only_named_files_are_uploaded(tmp_path):
    from modeling_cosup.hub_cosup import checkpoint_files, matches

    make_model().save_pretrained(tmp_path)
    foreign = ["client_secret.json", "train.json", "trainer_state.json", "optimizer.pt", ".env"]
    for name in [*foreign, "emb_seq_tokenizer/x.pkl", "index/embeddings-00000.safetensors"]:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    assert "model.safetensors" in checkpoint_files(tmp_path)
    assert not set(foreign) & set(checkpoint_files(tmp_path))
    assert not [name for name in checkpoint_files(tmp_path) if "/" in name]
    assert matches("model.safetensors", ["*.safetensors"]) and not matches("onnx/model.safetensors", ["*.safetensors"])


def test_every_save_of_the_trainer_is_pushed_without_resume_states(hub, tmp_path):
    code = """
import json, sys
from support.models import PASSAGES, make_model
from huggingface_hub import HfApi, hf_hub_download
from trainer import CoSupTrainer, CoSupTrainingArguments
rows = [{"input": f"q{i}", "segments": [{"text": "t", "passage": p}]} for i, p in enumerate(PASSAGES)]
args = CoSupTrainingArguments(sys.argv[1], push_to_hub=True, hub_model_id="steps", save_strategy="steps", save_steps=1, save_total_limit=1, max_steps=3,
                              hub_always_push=True, report_to="none")
trainer = CoSupTrainer(make_model(), args, train_dataset=rows)
trainer.train()
trainer.push_to_hub(tags="mine", license="mit", blocking=False).result()
api = HfApi()
during = api.list_repo_commits("tester/steps")[1].commit_id
cards = [open(hf_hub_download("tester/steps", "README.md", revision=revision)).read() for revision in (during, "main")]
print(json.dumps([[commit.title for commit in api.list_repo_commits("tester/steps")], api.list_repo_files("tester/steps"), trainer.hub_model_id, cards]))
"""
    titles, names, repo, (during, last) = hub.run(code, tmp_path / "out")
    assert repo == "tester/steps" and titles == [
        "End of training",
        *(f"Training in progress, step {step}" for step in (3, 2, 1)),
        "initial commit",
    ]
    assert not list((tmp_path / "out").glob("_push-*"))
    assert (
        "## Training" not in during and "## Training" in last and "- mine" in last
    )  # a card in between claims nothing
    assert not [name for name in names if name.endswith((".bin", ".pt", ".pth"))] and {
        "model.safetensors",
        "README.md",
        "tokenizer.json",
    } <= set(names)
