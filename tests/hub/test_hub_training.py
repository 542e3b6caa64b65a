"""From training to the Hub: `--push_to_hub`, `CoSupTrainer.push_to_hub`, adapters, and what must never be uploaded."""

import json
import re
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from modeling_cosup import CoSupForCausalLM
from modeling_cosup.facts_cosup import facts_of
from modeling_cosup.hub_cosup import checkpoint_files, matches, replaced_files
from support.hub_server import TOKEN, hub_server
from support.models import PASSAGES, make_model
from support.recipes import ROOT, options
from trainer import CoSupTrainer, CoSupTrainingArguments
from trainer.card import result_group
from trainer.hub import push_checkpoint
from trainer.judging.intervals import Mean, Rate

pytest.importorskip("jsonschema", reason="jsonschema, which the test Hub checks cards with, is not installed")

RESUME_SUFFIXES = (".bin", ".pt", ".pth")  # of pickled files
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
prompt = torch.tensor([[5, model.config.nsp_token_id]])
out = model.generate(prompt, retriever=index, max_new_tokens=5, return_dict_in_generate=True)
print(json.dumps([out.sequences.tolist(), out.retrievals[0][0].passage_id]))
"""
PUSH_BASE = """
import sys
from modeling_cosup import CoSupForCausalLM
CoSupForCausalLM.from_pretrained(sys.argv[1]).push_to_hub("tester/base")
print(1)
"""
ADAPTERS = """
import json, sys
import torch
from peft import AutoPeftModelForCausalLM
from transformers import AutoModelForCausalLM
model = AutoPeftModelForCausalLM.from_pretrained("tester/adapters", trust_remote_code=True)
ids = torch.tensor([[5, 6, 7]])
def answer(model):
    logits = model(input_ids=ids).logits
    return [model.generate(input_ids=ids, max_new_tokens=5).tolist(), float(logits.double().sum())]
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
names = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
print(json.dumps([names, (folder / "README.md").read_text(), str(folder)]))
"""


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    with hub_server(tmp_path_factory.mktemp("hub") / "server") as running:
        yield running


@pytest.fixture(scope="module")
def trained(hub, inputs, tmp_path_factory):
    """
    Run `recipes/train.py --push_to_hub true`.

    Returns:
        The output folder, all that was printed, then of the repository: the names of its files, its card, and the
        folder to which it was downloaded.
    """
    output = tmp_path_factory.mktemp("trained") / "out"
    push = {"push_to_hub": "true", "hub_model_id": "tester/trained", "hub_token": TOKEN, "license": "apache-2.0"}
    training = {"max_steps": 4, "logging_steps": 1, "save_strategy": "steps", "save_steps": 2}
    index = {"validation_file": inputs / "train.jsonl", "corpus_license": "cc-by-sa-4.0", "push_index": "true"}
    words = as_words(**push, **training, **index)
    ended = hub.call(TRAIN, *options(inputs, output, *words), token=None)
    return output, ended.stdout + ended.stderr, *hub.run(FETCH, "tester/trained", "model")


def as_words(**arguments):
    """Return options of a command line, as the words of the line."""
    words = []
    for name, value in arguments.items():
        words += [f"--{name}", value]
    return words


def files_with(folder, secrets):
    """Return the files below a folder that hold one of some byte strings."""
    hits = []
    for path in Path(folder).rglob("*"):
        if path.is_file() and any(secret in path.read_bytes() for secret in secrets):
            hits.append(path)
    return hits


def test_a_trained_checkpoint_and_its_index_answer_the_same_elsewhere(hub, trained):
    output = trained[0]
    model = CoSupForCausalLM.from_pretrained(output)
    index = model.load_index(output / "index")
    prompt = torch.tensor([[5, model.config.nsp_token_id]])
    out = model.generate(prompt, retriever=index, max_new_tokens=5, return_dict_in_generate=True)
    expected = [out.sequences.tolist(), out.retrievals[0][0].passage_id]
    assert hub.run(ANSWER, "tester/trained", "tester/trained-index", package=False) == expected


def test_the_card_says_what_was_trained_and_measured(trained):
    output, _, names, card, _ = trained
    metadata = card.split("---")[1]
    for text in ("license: apache-2.0", "model-index:", "type: query_recall_at_1", "interval_95"):
        assert text in metadata
    results = json.loads((output / "results.json").read_text())
    recall = results["evaluation"]["query"]["corpus"]["query_recall@1"]
    assert re.search(rf"\| R@1 \| {100 * recall['value']:.4g} % \[.*\] \| n = 6 \|", card)
    assert "held-out instances, over an index of 6 passages" in card
    assert "Trained on 7 instances, which hold 6 distinct passages." in card
    assert "| supervision | co |" in card
    assert "| step | loss | ntp_loss | nsp_loss | nsp_accuracy |" in card
    assert 'model.load_index("tester/trained-index")' in card
    assert '"content": "question 0?"' in card
    facts = json.loads((output / "training_facts.json").read_text())
    assert [entry["step"] for entry in facts["training"]["log"]] == [1, 2, 3, 4]
    if find_spec("matplotlib") is None:
        assert "loss_curves.png" not in card
    else:
        assert "![Loss curves](loss_curves.png)" in card
        assert (output / "loss_curves.png").read_bytes().startswith(b"\x89PNG")
        assert "loss_curves.png" in names


def test_pushes_during_training_state_the_licence(hub, trained):
    code = """
import json
from pathlib import Path
from huggingface_hub import HfApi, hf_hub_download
commits = [commit for commit in HfApi().list_repo_commits("tester/trained") if "in progress" in commit.title]
cards = [hf_hub_download("tester/trained", "README.md", revision=commit.commit_id) for commit in commits]
print(json.dumps([Path(card).read_text() for card in cards]))
"""
    cards = hub.run(code)
    assert cards
    assert all("license: apache-2.0" in card for card in cards)


def test_resume_states_data_and_secrets_stay_here(hub, trained):
    output, printed, names, _, downloaded = trained
    assert {"model.safetensors", "config.json", "modeling_cosup.py", "README.md", "results.json"} <= set(names)
    assert {"tokenizer.json", "chat_template.jinja"} <= set(names)
    assert not [name for name in names if name.endswith((*RESUME_SUFFIXES, ".jsonl"))]
    assert not [name for name in names if name.startswith(("index/", "checkpoint-", "world/"))]
    assert "trainer_state.json" not in names
    for name in ("trainer_state.json", "training_args.bin", "checkpoint-2"):  # there was something to leave behind
        assert (output / name).exists()
    assert TOKEN not in printed
    assert not files_with(output, [TOKEN.encode()])
    # paths of this machine, including the folders that the two parts came from
    local_paths = [str(output).encode(), str(output.parent.parent).encode()]
    assert not files_with(downloaded, [TOKEN.encode(), *local_paths])


def test_a_card_without_a_hub_describes_the_folder(inputs, tmp_path, monkeypatch):
    from train import main

    output = tmp_path / "out"
    monkeypatch.setattr("sys.argv", ["train.py", *options(inputs, output, "--logging_steps", "1")])
    main()
    card = (output / "README.md").read_text()
    assert f'from_pretrained("{output}"' in card
    assert f'load_index("{output}/index")' in card
    assert "| Cor (short answer) |" in card
    assert '"content": "question 0?"' in card
    facts = (output / "training_facts.json").read_text()
    assert str(tmp_path) not in facts  # a later push would upload it
    assert "question 0?" not in facts

    model = CoSupForCausalLM.from_pretrained(output)
    assert facts_of(model)["results"][0]["metrics"]
    model.save_pretrained(tmp_path / "copy")
    assert (tmp_path / "copy" / "training_facts.json").exists()
    with torch.no_grad():
        next(model.parameters()).add_(1)
    for folder in (tmp_path / "other", tmp_path / "copy"):  # nothing is known of the new weights, in either folder
        model.save_pretrained(folder)
        assert not (folder / "training_facts.json").exists()
        assert not (folder / "loss_curves.png").exists()


def test_adapters_load_onto_the_base_and_merge_into_a_checkpoint_with_code(hub, inputs, tmp_path):
    pytest.importorskip("peft")
    make_model().save_pretrained(tmp_path / "base")
    hub.run(PUSH_BASE, tmp_path / "base")
    push = {"push_to_hub": "true", "hub_model_id": "tester/adapters", "push_index": "true"}
    training = {"model_name_or_path": "tester/base", "use_peft": "true", "learning_rate": "0.01"}
    arguments = options(inputs, tmp_path / "out", *as_words(**push, **training))
    hub.run(TRAIN, *arguments[4:])  # without --gen and --emb_seq

    names, card, _ = hub.run(FETCH, "tester/adapters", "model")
    assert {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json"} <= set(names)
    assert "model.safetensors" not in names
    for text in ("library_name: peft", "base_model: tester/base", "base_model_relation: adapter", "LORA, r = 16"):
        assert text in card

    (adapted, merged, saved), size, module = hub.run(ADAPTERS, tmp_path / "full", package=False)
    assert adapted[0] == merged[0] == saved[0]
    assert merged[1] == pytest.approx(adapted[1], rel=1e-4)
    assert saved[1] == pytest.approx(merged[1], rel=1e-6)
    assert size == len(PASSAGES)
    assert module == "transformers_modules"
    assert (tmp_path / "full" / "modeling_cosup.py").exists()
    assert (tmp_path / "full" / "tokenizer.json").exists()
    local = CoSupForCausalLM.from_pretrained(tmp_path / "out" / "merged")
    assert local.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=5).tolist() == merged[0]

    code = re.search(r"```python\n(.*?)```", card, re.DOTALL)[1]
    forced = "retriever=index, retrieval_config=model.retrieval_config_class(force_nsp_first=True),"
    ended = hub.call(code.replace("retriever=index,", forced), package=False)
    assert "[1] " in ended.stdout, ended.stderr


def test_what_cannot_be_shared_is_refused_before_training(tmp_path):
    peft = pytest.importorskip("peft")
    rows = [{"input": "q", "segments": [{"text": "t", "passage": PASSAGES[0]}]}]
    lora = peft.LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")
    args = CoSupTrainingArguments(str(tmp_path), push_to_hub=True, report_to="none")
    with pytest.raises(ValueError, match="adapters of a model in memory, which nobody else can load"):
        CoSupTrainer(make_model(), args, train_dataset=rows, peft_config=lora)
    for strategy in ("checkpoint", "all_checkpoints"):
        args = CoSupTrainingArguments(str(tmp_path), push_to_hub=True, hub_strategy=strategy, report_to="none")
        with pytest.raises(ValueError, match=f"hub_strategy='{strategy}' would upload resume states"):
            CoSupTrainer(make_model(), args, train_dataset=rows)


def record(trainer, **kwargs):
    """Create the model card; return the recorded facts and the card."""
    trainer.create_model_card(**kwargs)
    folder = Path(trainer.args.output_dir)
    return json.loads((folder / "training_facts.json").read_text()), (folder / "README.md").read_text()


def make_trainer(folder, model=None, rows=None, **kwargs):
    if rows is None:
        rows = [{"input": f"q{i}", "segments": [{"text": "t", "passage": p}]} for i, p in enumerate(PASSAGES)]
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
    with pytest.raises(ValueError, match="not those that were last saved"):  # the saved weights are untrained
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
    assert facts["training"]["log"][-1]["step"] == 2
    assert facts["datasets"] == ["me/data"]
    assert facts["tags"] == ["mine", "qa"]
    assert "# a \\| b # c\n" in card
    assert "language: en" in card
    assert "- language" not in card
    trained = CoSupForCausalLM.from_pretrained(tmp_path / "a")
    assert facts_of(trained) == facts

    # a second run does not keep the facts and the plot of the first one
    again = make_trainer(tmp_path / "b", trained)
    again.train()
    again.save_model()
    still_true = {"license": "mit", "language": "en", "datasets": ["me/data"], "tags": ["mine", "qa"]}
    assert json.loads((tmp_path / "b" / "training_facts.json").read_text()) == still_true
    assert not (tmp_path / "b" / "loss_curves.png").exists()


def test_a_card_has_the_recall_of_the_weights_that_it_is_about(tmp_path):
    trainer = make_trainer(tmp_path)
    trainer.eval_dataset = {"nq": trainer.train_dataset, "mine": trainer.train_dataset}

    def evaluated(step, recall, name="nq"):
        figures = {"query_recall@1": recall, "num_queries": 8, "num_passages": 6}
        return {"step": step} | {f"eval_{name}_{figure}": value for figure, value in figures.items()}

    def recalls():
        groups = trainer._held_out_results()
        return {group["dataset"]["name"]: group["metrics"][0]["value"] for group in groups}

    state = trainer.state
    state.log_history = [evaluated(2, 0.25), evaluated(2, 0.5, "mine"), evaluated(4, 0.75)]
    state.global_step = 5
    assert recalls() == {}  # measured with earlier weights
    state.global_step = 4
    assert recalls() == {"held-out instances of nq": 75.0}
    state.log_history.append({"step": 4, "train_runtime": 1.0})
    state.best_global_step, trainer.args.load_best_model_at_end = 2, True
    assert recalls() == {"held-out instances of nq": 75.0}  # the best step was not saved, so the last weights stay
    state.best_model_checkpoint = str(tmp_path / "checkpoint-2")
    assert recalls() == {"held-out instances of nq": 25.0, "held-out instances of mine": 50.0}
    state.log_history.append(evaluated(4, 0.375))  # after training, of the best weights
    assert recalls() == {"held-out instances of nq": 37.5, "held-out instances of mine": 50.0}
    trainer.eval_dataset = trainer.train_dataset
    assert recalls() == {}


def test_cards_of_tokenized_data_streams_and_other_adapters(tmp_path):
    trainer = make_trainer(tmp_path / "a")
    rows = trainer.train_dataset.remove_columns("dataset").to_list()
    tokenized = make_trainer(tmp_path / "b", rows=rows)
    tokenized.save_model()
    assert "Trained on 6 instances, which hold 6 distinct passages." in record(tokenized)[1]
    tokenized.train_dataset = trainer.train_dataset.to_iterable_dataset()
    assert "Trained on 0 instances" in record(tokenized)[1]  # a stream is not read again to be counted
    peft = pytest.importorskip("peft")
    options = {"target_modules": ["q_proj"], "feedforward_modules": [], "task_type": "CAUSAL_LM"}
    config = peft.IA3Config(**options, modules_to_save=["embed_tokens", "lm_head"])
    adapted = make_trainer(tmp_path / "c", peft_config=config)
    adapted.save_model()
    assert "| adapters | IA3 |" in record(adapted)[1]
    with pytest.raises(ValueError, match="adapters of a model in memory"):
        adapted.push_to_hub()


def test_shares_are_percentages_and_losses_are_not():
    figures = {
        "query_recall@1": Rate(1, 4).to_dict(),
        "k_precision": Mean.of([0.5, None, 1.0]).to_dict(),
        "ntp_loss": Mean.of([1.5, 2.5]).to_dict(),
        "em": Rate(0, 0).to_dict(),
    }
    group = result_group(figures, "nq", 10, {"ntp_loss": "loss of the text"})
    rows = [(row["type"], row["value"], row["unit"], row["n"]) for row in group["metrics"]]
    # em, which was measured on no question, is left out
    assert rows == [("query_recall@1", 25.0, "%", 4), ("k_precision", 75.0, "%", 2), ("ntp_loss", 2.0, "", 2)]
    assert [row["name"] for row in group["metrics"]] == ["R@1", "K-precision", "loss of the text"]
    assert group["dataset"] == {"name": "nq", "type": "custom"}


def test_a_folder_without_weights_is_not_pushed(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    message = "holds no safetensors, so nothing was pushed: with FSDP, save with the state dict type FULL_STATE_DICT"
    with pytest.raises(ValueError, match=message):
        push_checkpoint(tmp_path, "me/model", "message")


def test_only_named_files_are_uploaded(tmp_path):
    make_model().save_pretrained(tmp_path)
    foreign = ["client_secret.json", "train.json", "trainer_state.json", "optimizer.pt", ".env"]
    for name in [*foreign, "emb_seq_tokenizer/x.pkl", "index/embeddings-00000.safetensors"]:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    names = set(checkpoint_files(tmp_path))
    assert "model.safetensors" in names
    assert not set(foreign) & names
    assert not [name for name in names if "/" in name]
    assert matches("model.safetensors", ["*.safetensors"])
    assert not matches("onnx/model.safetensors", ["*.safetensors"])


def test_every_save_of_the_trainer_is_pushed_without_resume_states(hub, tmp_path):
    code = """
import json, sys
from pathlib import Path
from support.models import PASSAGES, make_model
from huggingface_hub import HfApi, hf_hub_download
from trainer import CoSupTrainer, CoSupTrainingArguments
rows = [{"input": f"q{i}", "segments": [{"text": "t", "passage": p}]} for i, p in enumerate(PASSAGES)]
args = CoSupTrainingArguments(
    sys.argv[1],
    push_to_hub=True,
    hub_model_id="steps",
    hub_always_push=True,
    save_strategy="steps",
    save_steps=1,
    save_total_limit=1,
    max_steps=3,
    report_to="none",
)
trainer = CoSupTrainer(make_model(), args, train_dataset=rows)
trainer.train()
trainer.push_to_hub(tags="mine", license="mit", blocking=False).result()
commits = HfApi().list_repo_commits("tester/steps")
cards = []
for revision in (commits[1].commit_id, "main"):
    cards.append(Path(hf_hub_download("tester/steps", "README.md", revision=revision)).read_text())
titles, names = [commit.title for commit in commits], HfApi().list_repo_files("tester/steps")
print(json.dumps([titles, names, trainer.hub_model_id, cards]))
"""
    titles, names, repo, (during, last) = hub.run(code, tmp_path / "out")
    assert repo == "tester/steps"
    progress = [f"Training in progress, step {step}" for step in (3, 2, 1)]
    assert titles == ["End of training", *progress, "initial commit"]
    assert not list((tmp_path / "out").glob("_push-*"))
    assert "## Training" not in during  # a card during training claims nothing
    assert "## Training" in last
    assert "- mine" in last
    assert not [name for name in names if name.endswith(RESUME_SUFFIXES)]
    assert {"model.safetensors", "README.md", "tokenizer.json"} <= set(names)


def test_every_chat_template_of_a_tokenizer_is_pushed(tmp_path):
    model = make_model()
    model.tokenizer.chat_template = {"default": model.tokenizer.chat_template, "tool_use": "{{ messages }}"}
    model.save_pretrained(tmp_path)
    assert "additional_chat_templates/tool_use.jinja" in checkpoint_files(tmp_path)
    assert matches("additional_chat_templates/old.jinja", replaced_files())
