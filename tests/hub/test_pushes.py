"""What a push uploads, what it replaces and what it leaves alone, against a stub of the Hub."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub import CommitOperationDelete, RepoCard

import trainer.hub
from modeling_cosup import CoSupForCausalLM, MLPMemory, facts_cosup, hub_cosup
from modeling_cosup.card_cosup import model_card
from modeling_cosup.files_cosup import write_json
from support.models import PASSAGES, make_emb_seq, make_gen, make_model, make_tokenizer
from trainer import CoSupTrainer, CoSupTrainingArguments
from trainer.card import write_card
from trainer.hub import push_checkpoint

OWN_CARD = "My own words."
MODEL = {"config.json", "model.safetensors", "modeling_cosup.py", "tokenizer.json", "README.md"}
ADAPTER = {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json", "README.md"}


class StubHub:
    """The part of `HfApi` that a push calls, with one repository, whose files are in memory."""

    def __init__(self, folder):
        self.folder, self.files, self.commits = folder, {}, []

    def create_repo(self, repo_id, **options):
        return SimpleNamespace(repo_id=repo_id)

    def create_branch(self, repo_id, **options):
        pass

    def repo_info(self, repo_id, **options):
        return SimpleNamespace(sha="0", siblings=[SimpleNamespace(rfilename=name) for name in self.files])

    def hf_hub_download(self, repo_id, name, **options):
        path = self.folder / name
        path.write_bytes(self.files[name])
        return str(path)

    def create_commit(self, repo_id, operations, **options):
        for operation in operations:
            name, content = operation.path_in_repo, getattr(operation, "path_or_fileobj", None)
            if isinstance(operation, CommitOperationDelete):
                del self.files[name]
            else:
                self.files[name] = content if isinstance(content, bytes) else Path(content).read_bytes()
        self.commits.append(options)

    def read(self, name):
        return self.files[name].decode()


@pytest.fixture
def stub(tmp_path, monkeypatch):
    (tmp_path / "downloaded").mkdir()
    stub = StubHub(tmp_path / "downloaded")
    cached_file = facts_cosup.cached_file

    def find(name_or_path, name, **options):
        if name_or_path != "me/m":
            return cached_file(name_or_path, name, **options)
        return stub.hf_hub_download("me/m", name) if name in stub.files else None

    monkeypatch.setattr(hub_cosup, "HfApi", lambda: stub)
    monkeypatch.setattr(facts_cosup, "cached_file", find)
    return stub


def write_files(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("{}")
    return folder


def adapted_model(base="me/base"):
    peft = pytest.importorskip("peft")
    model = make_model()
    model.name_or_path = base
    model.add_adapter(peft.LoraConfig(target_modules=["q_proj"], r=2))
    return model


# ------------------------------------------------------------------ adapters and whole models


def test_adapters_of_a_model_are_pushed_alone_with_their_own_card(stub):
    adapted_model().push_to_hub("me/m")
    assert set(stub.files) >= ADAPTER
    assert not [name for name in stub.files if name.startswith(("model", "config")) or name.endswith(".py")]
    card = stub.read("README.md")
    assert "library_name: peft" in card
    assert "base_model: me/base" in card


@pytest.mark.parametrize("pushed", ["by the model", "by training", "from a folder with both"])
def test_adapters_delete_nothing_of_a_whole_model(stub, tmp_path, pushed):
    stub.files = before = {name: b"{}" for name in MODEL}
    with pytest.raises(ValueError, match="me/m holds a whole model: push adapters to a repository of their own"):
        if pushed == "by the model":
            adapted_model().push_to_hub("me/m")
        else:
            others = MODEL if pushed == "from a folder with both" else ()
            push_checkpoint(write_files(tmp_path / "out", *ADAPTER, *others), "me/m", "message", adapters=True)
    assert stub.files == before
    assert not stub.commits


@pytest.mark.parametrize("base", ["me/m", "out", None])
def test_a_base_that_others_cannot_load_or_would_lose_is_named(stub, monkeypatch, base):
    message = "holds the model that these adapters change" if base == "me/m" else "which nobody else can load"
    with pytest.raises(ValueError, match=message):
        adapted_model(base).push_to_hub("me/m")
    monkeypatch.setattr(trainer.hub, "adapter_config", lambda model: SimpleNamespace(base_model_name_or_path=base))
    arguments = SimpleNamespace(push_to_hub=True, hub_strategy="end", hub_model_id="me/m")
    with pytest.raises(ValueError, match=message):  # before training
        trainer.hub.HubMixin._check_hub_arguments(SimpleNamespace(), arguments, None)


@pytest.mark.parametrize("part", [None, "save_gen", "save_emb_seq"])
def test_a_whole_model_replaces_adapters_and_what_was_measured(stub, tmp_path, part):
    stub.files = dict.fromkeys(
        ["adapter_config.json", "adapter_model.safetensors", "results.json", "notes.txt"], b"{}"
    )
    model = make_model()
    if part is None:
        model.push_to_hub("me/m")
        assert "results.json" not in stub.files
    else:
        getattr(model, part)(tmp_path / "part", push_to_hub=True, repo_id="me/m")
    assert {"model.safetensors", "config.json", "notes.txt"} <= set(stub.files)
    assert not [name for name in stub.files if name.startswith("adapter")]


@pytest.mark.parametrize("size", ["5GB", "70KB"])
@pytest.mark.parametrize("part", ["save_pretrained", "save_gen"])
def test_a_variant_of_the_weights_stands_next_to_the_others(stub, tmp_path, part, size):
    save = getattr(make_model(), part)
    push = {"push_to_hub": True, "repo_id": "me/m", "max_shard_size": size}
    save(tmp_path / "a", **push)
    main = {name for name in stub.files if name.startswith("model") and not name.endswith(".py")}
    stub.files["results.json"] = b"{}"
    save(tmp_path / "b", **push, variant="fp16")
    assert "results.json" in stub.files  # of the main weights
    variant = {name for name in stub.files if name.startswith("model") and not name.endswith(".py")} - main
    assert main <= set(stub.files)
    assert ("model.safetensors.index.fp16.json" if size == "70KB" else "model.fp16.safetensors") in variant
    save(tmp_path / "c", push_to_hub=True, repo_id="me/m")
    assert "model.safetensors" in stub.files
    assert variant <= set(stub.files)
    assert (main & set(stub.files) == main) == (size == "5GB")  # the shards of the first push are gone


def test_parts_are_pushed_as_asked_and_unknown_options_are_named(stub, tmp_path):
    asked = {"commit_message": "mine", "commit_description": "why", "revision": "dev", "create_pr": True}
    for save in (make_model().save_gen, make_model().save_emb_seq):
        save(tmp_path / save.__name__, push_to_hub=True, repo_id="me/m", **asked)
        assert asked.items() <= stub.commits[-1].items()
        with pytest.raises(TypeError, match="has no option 'commit_mesage'"):
            save(tmp_path / "new", push_to_hub=True, repo_id="me/m", commit_mesage="mine")
    assert not (tmp_path / "new").exists()


# ------------------------------------------------------------------ facts and cards


def test_what_a_push_states_stays_true_for_the_next_one(stub):
    model = make_model()
    model.push_to_hub("me/m", license="mit", tags=["mine"], index="me/m-index")
    stub.files["results.json"] = b"{}"
    model.push_to_hub("me/m", tags="more")
    assert "results.json" in stub.files  # of the same weights
    facts, card = json.loads(stub.read("training_facts.json")), stub.read("README.md")
    assert (facts["license"], facts["tags"], facts["index"]) == ("mit", ["mine", "more"], "me/m-index")
    assert all(text in card for text in ("license: mit", "- mine", "- more", 'load_index("me/m-index")'))
    with torch.no_grad():
        next(model.parameters()).add_(1)
    model.push_to_hub("me/m")
    assert "results.json" not in stub.files
    facts = json.loads(stub.read("training_facts.json"))
    assert facts["license"] == "mit"
    assert "index" not in facts  # it is of the earlier weights


def base_with_licence(folder):
    """Return a model that was loaded from a checkpoint whose facts state a licence."""
    make_model().save_pretrained(folder)
    write_json(folder / "training_facts.json", {"license": "cc-by-4.0", "language": "nl"})
    return CoSupForCausalLM.from_pretrained(folder)


def trainer_of(model, folder):
    rows = [{"input": "q", "segments": [{"text": "t", "passage": PASSAGES[0]}]}]
    run = CoSupTrainer(model, CoSupTrainingArguments(str(folder), report_to="none"), train_dataset=rows)
    run.hub_model_id, run.push_in_progress = "me/m", None
    return run


def push_during_training(run, folder):
    run.save_model(folder / "checkpoint-1", _internal_call=True)
    run._push_from_checkpoint(str(folder / "checkpoint-1"))
    run._finish_current_push()


@pytest.mark.parametrize("given", [None, "apache-2.0"])
@pytest.mark.parametrize("by", ["model", "during training", "at the end"])
def test_a_push_keeps_the_licence_that_the_repository_states_unless_one_is_given(stub, tmp_path, by, given):
    make_model().push_to_hub("me/m", license="gpl-3.0", tags=["mine"])
    write_metadata(stub, license="mit", license_link="LICENSE", language="en")  # by its owner
    model = base_with_licence(tmp_path / "base")
    if by == "model":
        model.push_to_hub("me/m", license=given)
    else:
        run = trainer_of(model, tmp_path / "out")
        if by == "during training":
            run.stated_facts = {"license": given} if given else {}  # as train.py does
            push_during_training(run, tmp_path / "out")
        else:
            run.push_to_hub(license=given)
    assert len(stub.commits) == 2
    expected = given or "mit"
    facts, metadata = json.loads(stub.read("training_facts.json")), metadata_of(stub)
    assert (facts["license"], facts["language"], facts["tags"]) == (expected, "en", ["mine"])
    assert (metadata["license"], metadata["language"]) == (expected, "en")
    assert "mine" in metadata["tags"]
    assert ("license_link" in metadata) == (given is None)  # it describes the earlier licence
    make_model().push_to_hub("me/m")
    assert metadata_of(stub)["license"] == expected


def test_a_trainer_remembers_the_licence_that_it_was_given(stub, tmp_path):
    make_model().push_to_hub("me/m", license="mit")
    run = trainer_of(make_model(), tmp_path / "out")
    run.save_model()
    run.create_model_card(license="apache-2.0")
    push_during_training(run, tmp_path / "out")
    assert metadata_of(stub)["license"] == "apache-2.0"
    write_metadata(stub, license="mit")
    run.push_to_hub()
    assert metadata_of(stub)["license"] == "apache-2.0"


def test_training_adds_tags_and_reads_the_branch_that_it_pushes_to_once(stub, tmp_path, monkeypatch):
    make_model().push_to_hub("me/m", tags=["mine"])
    run = trainer_of(make_model(), tmp_path / "out")
    find, looked_up = facts_cosup.cached_file, set()

    def recording(name_or_path, name, **options):
        if name_or_path == "me/m":
            looked_up.add((name, options["token"], options["revision"]))
        return find(name_or_path, name, **options)

    monkeypatch.setattr(facts_cosup, "cached_file", recording)
    run.push_to_hub(tags=["new"], tasks="qa", token="hf_x", revision="dev")
    assert json.loads(stub.read("training_facts.json"))["tags"] == ["mine", "new", "qa"]
    assert looked_up == {("README.md", "hf_x", "dev"), ("training_facts.json", "hf_x", "dev")}
    looked_up.clear()
    run.create_model_card()
    assert not looked_up


def test_a_card_that_is_not_yaml_states_nothing(stub):
    make_model().push_to_hub("me/m", license="mit")
    stub.files["README.md"] = b"---\nlicense: [\n---\n"
    assert facts_cosup.published_facts("me/m")["license"] == "mit"


GATE = {"extra_gated_prompt": "You agree: not to\nshare it.", "extra_gated_fields": {"Company": "text"}}
LLAMA2 = {"license": "llama2", "license_name": "Llama 2", "license_link": "LICENSE"}


def metadata_of(stub):
    return RepoCard(stub.read("README.md")).data.to_dict()


def write_metadata(stub, **metadata):
    """Set metadata of the repository's card, as the editor on the Hub's page does."""
    text = stub.read("README.md") if "README.md" in stub.files else "---\n{}\n---\n"
    card = RepoCard(text)
    for name, value in metadata.items():
        card.data[name] = value
    stub.files["README.md"] = str(card).encode()


@pytest.mark.parametrize("pushed", ["model", "adapters", "memory"])
def test_the_first_push_keeps_the_licence_and_the_gate_of_a_new_repository(stub, pushed):
    write_metadata(stub, **LLAMA2, **GATE, base_model="me/base", tags=["other"])
    if pushed == "memory":
        MLPMemory.from_gen(make_model(), intermediate_size=8).push_to_hub("me/m")
    else:
        model = make_model() if pushed == "model" else adapted_model()
        model.push_to_hub("me/m")
    metadata = metadata_of(stub)
    assert metadata | LLAMA2 | GATE | {"base_model": "me/base"} == metadata
    assert metadata["tags"][0] != "other"  # our card states tags
    assert hub_cosup.CARD_MARKER in stub.read("README.md")


def test_a_new_card_keeps_metadata_of_the_earlier_one_but_nothing_about_its_weights(stub):
    model = make_model()
    model.push_to_hub("me/m")
    about_weights = {"base_model": "me/base", "model-index": [{"name": "m", "results": []}]}
    write_metadata(stub, **LLAMA2, **GATE, **about_weights)
    model.push_to_hub("me/m")
    metadata = metadata_of(stub)
    assert metadata | LLAMA2 | GATE == metadata
    assert not about_weights.keys() & metadata.keys()
    model.push_to_hub("me/m", license="mit")
    metadata = metadata_of(stub)
    assert metadata["license"] == "mit"
    assert metadata | GATE == metadata
    assert "license_name" not in metadata  # of the other licence
    assert "license_link" not in metadata


def test_the_index_of_a_card_on_the_hub_is_a_repository(stub, tmp_path):
    with pytest.raises(ValueError, match="expected a dataset repository"):
        make_model().push_to_hub("me/m", index=str(tmp_path / "index"))
    assert not stub.commits


def test_results_of_other_weights_get_another_name(tmp_path):
    model = make_model()
    model.save_pretrained(tmp_path)
    write_json(tmp_path / "results.json", {})
    write_card(model, tmp_path, str(tmp_path), {"license": "mit"})
    model.save_pretrained(tmp_path)
    assert (tmp_path / "results.json").exists()
    with torch.no_grad():
        next(model.parameters()).add_(1)
    model.save_pretrained(tmp_path)
    assert not (tmp_path / "results.json").exists()
    assert (tmp_path / "earlier_results.json").exists()


@pytest.mark.parametrize("earlier", [None, OWN_CARD, hub_cosup.CARD_MARKER, "# Model Card for Model ID"])
def test_a_card_of_its_owner_is_not_replaced(tmp_path, earlier):
    if earlier is not None:
        (tmp_path / "README.md").write_text(earlier)
    assert write_card(make_model(), tmp_path, "me/m", {"license": "mit"}) == (earlier != OWN_CARD)
    assert (OWN_CARD in (tmp_path / "README.md").read_text()) == (earlier == OWN_CARD)
    assert json.loads((tmp_path / "training_facts.json").read_text())["license"] == "mit"


@pytest.mark.parametrize(("index", "repo", "shown"), [("/mine", "me/m", False), ("/mine", "/out", True)])
def test_a_card_on_the_hub_shows_neither_a_local_index_nor_its_question(tmp_path, index, repo, shown):
    write_card(make_model(), tmp_path, repo, {}, index, "who am I?")
    card = (tmp_path / "README.md").read_text()
    assert (index in card, "who am I?" in card) == (shown, shown)


QUERIES = {
    "gen": "compares its hidden state at `[NSP]`",
    "emb_seq": "that Emb_seq makes of everything up to `[NSP]`",
    "query_encoder": "that a third one, the query encoder, makes of everything up to `[NSP]`",
}


@pytest.mark.parametrize("query_from", QUERIES)
@pytest.mark.parametrize("supervision", [None, "co", "separate"])
def test_a_card_says_what_makes_the_queries_and_what_was_trained(query_from, supervision):
    encoder = make_emb_seq("bert", hidden_size=32) if query_from == "query_encoder" else None
    options = {"tokenizer": make_tokenizer(), "query_encoder": encoder, "query_from": query_from}
    model = CoSupForCausalLM.from_gen_and_emb_seq(make_gen(), make_emb_seq(), **options)
    model.config.query_encoder_name_or_path = "me/encoder" if encoder else None
    facts = {} if supervision is None else {"training": {"arguments": {"supervision": supervision}}}
    card = " ".join(model_card(model, "me/m", facts).split())
    for source, text in QUERIES.items():
        assert (text in card) == (source == query_from)
    assert ("was trained by semiparametric" in card) == (supervision == "co")
    assert ("loads Gen alone" in card) == (query_from == "gen")
    assert ("| BertModel |" in card) == (query_from == "query_encoder")
    assert ("base_model: me/encoder" in card) == (query_from == "query_encoder")


# ------------------------------------------------------------------ checkpoints that wait for their push


def test_a_checkpoint_is_copied_with_all_its_chat_templates(tmp_path):
    template = "emb_seq_tokenizer/additional_chat_templates/tool_use.jinja"
    checkpoint = write_files(tmp_path / "checkpoint-1", template, "model.safetensors", "adapter_config.json")
    copied = trainer.hub._copy_checkpoint(str(checkpoint), str(tmp_path), adapters=False)
    names = {path.relative_to(copied).as_posix() for path in copied.rglob("*") if path.is_file()}
    assert names == {template, "model.safetensors"}


def test_a_checkpoint_that_cannot_be_copied_leaves_nothing(tmp_path, monkeypatch):
    def full(*paths):
        raise OSError("No space left on device")

    monkeypatch.setattr(trainer.hub, "link_or_copy", full)
    checkpoint = write_files(tmp_path / "checkpoint-1", "model.safetensors")
    with pytest.raises(OSError, match="No space left"):
        trainer.hub._copy_checkpoint(str(checkpoint), str(tmp_path), adapters=False)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-1"]
