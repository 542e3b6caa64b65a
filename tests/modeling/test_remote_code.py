"""A saved folder holds everything that a checkpoint needs, code included, and nothing else."""

import ast
import json
import os
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoTokenizer
from transformers.dynamic_module_utils import get_imports

from modeling_cosup import CoSupForCausalLM
from modeling_cosup.hub_cosup import EMB_SEQ_TOKENIZER_FOLDER
from support.models import PASSAGES, make_emb_seq, make_model, make_tokenizer
from support.travelling import FOLDER, STAYS, names_of_travelling_files, travelling_files

SOURCES = travelling_files()
# Packages that the travelling code must import under a guard, and those that it may require
OPTIONAL = {"faiss", "pyarrow", "datasets", "accelerate", "peft", "modeling_cosup", "trainer"}
REQUIRED = {"torch", "transformers", "numpy", "safetensors", "tqdm", "jinja2", "huggingface_hub", "tokenizers", "yaml"}


def files(folder):
    return sorted(str(path.relative_to(folder)) for path in Path(folder).rglob("*") if path.is_file())


def test_a_saved_folder_holds_only_what_can_be_read_without_trust(tmp_path):
    make_model(emb_seq_tokenizer=make_tokenizer(texts=["another corpus"])).save_pretrained(tmp_path)
    names = set(files(tmp_path))
    assert {Path(name).suffix for name in names} == {".safetensors", ".json", ".py", ".jinja"}
    # the code is flat and unchanged
    assert {name for name in names if name.endswith(".py")} == names_of_travelling_files()
    for path in SOURCES:
        assert (tmp_path / path.name).read_bytes() == path.read_bytes()
    assert {"config.json", "generation_config.json", "model.safetensors"} <= names
    assert {"tokenizer.json", "chat_template.jinja", f"{EMB_SEQ_TOKENIZER_FOLDER}/tokenizer.json"} <= names


def test_what_stays_in_the_package_is_listed():
    """transformers finds a module by how its import is written: every file either is found or is listed as staying."""
    assert {path.name for path in SOURCES} == names_of_travelling_files()
    assert set(STAYS) <= {path.name for path in FOLDER.glob("*.py")}


def guarded_imports(tree):
    """Yield the files of this package that are imported by full name, in a function, under `except ImportError`."""
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    for function in functions:
        for node in ast.walk(function):
            if not isinstance(node, ast.Try):
                continue
            if [ast.unparse(handler.type) for handler in node.handlers] == ["ImportError"]:
                yield from absolute_imports(node.body)


def absolute_imports(nodes):
    """Yield the files that `from modeling_cosup import x` and `from modeling_cosup.x import y` import."""
    for node in nodes:
        if not isinstance(node, ast.ImportFrom):
            continue
        module = node.module or ""
        if module == "modeling_cosup":
            yield from (f"{alias.name}.py" for alias in node.names)
        elif module.startswith("modeling_cosup.") and not node.level:
            yield f"{module.removeprefix('modeling_cosup.')}.py"


def test_what_stays_is_imported_under_a_guard():
    all_guarded = set()
    for path in SOURCES:
        tree = ast.parse(path.read_text())
        guarded = sorted(guarded_imports(tree))
        assert sorted(absolute_imports(ast.walk(tree))) == guarded, f"{path.name} imports the package without a guard"
        all_guarded.update(guarded)
    assert {"card_cosup.py", "corpus_cosup.py"} <= all_guarded <= set(STAYS)


def unguarded_packages(tree):
    """Yield the top-level packages that a module imports at its top level."""
    for node in tree.body:
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield node.module.split(".")[0]


def test_source_files_travel():
    """Relative imports name a module that travels, and optional packages are imported under a guard."""
    names = {path.stem for path in SOURCES}
    for path in SOURCES:
        tree = ast.parse(path.read_text())
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.level:
                assert node.level == 1 and node.module in names, f"{path.name}:{node.lineno}"
        assert not set(unguarded_packages(tree)) & OPTIONAL, path.name
        # transformers requires these packages before it runs the code, also for imports inside functions
        required = set(get_imports(path)) - sys.stdlib_module_names
        assert required <= REQUIRED, path.name


def test_weights_are_saved_once_under_both_parts(tmp_path):
    model = make_model(emb_seq_kwargs={"hidden_size": 48})
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as weights:
        names = set(weights.keys())
    assert names == {name for name, _ in model.named_parameters()}  # Gen is tied: its head is not written twice
    assert {name.split(".")[0] for name in names} == {"gen", "emb_seq", "emb_head"}


def test_config_and_generation_config_say_what_is_needed(tmp_path):
    model = CoSupForCausalLM.from_gen_and_emb_seq(make_model("gpt2").gen, tokenizer=make_tokenizer())
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["model_type"] == "cosup"
    assert config["architectures"] == ["CoSupForCausalLM"]
    assert "load_emb_seq" not in config
    assert set(config["auto_map"]) == {"AutoConfig", "AutoModel", "AutoModelForCausalLM"}
    fingerprint = model.fingerprint()
    hashes = {name: fingerprint[name] for name in ("emb_seq", "tokenizer", "emb_seq_tokenizer")}
    hashes["gen"] = model.memory_fingerprint()["gen"]  # of an index only if Gen is Emb_seq
    assert config["fingerprint"] == hashes
    control_ids = [config["nsp_token_id"], config["cs_token_id"], config["ce_token_id"]]
    assert control_ids == model.tokenizer.convert_tokens_to_ids(["[NSP]", "[Cs]", "[CE]"])
    generation = json.loads((tmp_path / "generation_config.json").read_text())
    assert generation["do_sample"] is False
    assert generation["suppress_tokens"] == [config["cs_token_id"]]
    assert generation["eos_token_id"] == [model.tokenizer.eos_token_id]
    assert "temperature" not in generation


def test_the_chat_template_travels(tmp_path):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{% for message in messages %}<s>{{ message['content'] }}</s>{% endfor %}"
    make_model(tokenizer=tokenizer).save_pretrained(tmp_path)
    assert AutoTokenizer.from_pretrained(tmp_path).chat_template == tokenizer.chat_template
    assert CoSupForCausalLM.from_pretrained(tmp_path).tokenizer.chat_template == tokenizer.chat_template


def test_two_tokenizers_are_saved_and_found_again(tmp_path):
    emb_seq_tokenizer = make_tokenizer(vocab_size=300, bos="<cls>", eos="<sep>", texts=["another corpus"])
    model = make_model(emb_seq_tokenizer=emb_seq_tokenizer)
    model.save_pretrained(tmp_path / "two")
    loaded = CoSupForCausalLM.from_pretrained(tmp_path / "two")
    assert model.tokenizer.get_vocab() != emb_seq_tokenizer.get_vocab()
    assert loaded.tokenizer.get_vocab() == model.tokenizer.get_vocab()
    assert loaded.emb_seq_tokenizer.get_vocab() == emb_seq_tokenizer.get_vocab()
    assert (loaded.emb_seq_tokenizer.bos_token, loaded.emb_seq_tokenizer.eos_token) == ("<cls>", "<sep>")
    index = loaded.build_index(PASSAGES, show_progress_bar=False)
    assert torch.equal(index.embeddings, model.build_index(PASSAGES, show_progress_bar=False).embeddings)

    make_model().save_pretrained(tmp_path / "one")
    loaded = CoSupForCausalLM.from_pretrained(tmp_path / "one")
    assert loaded.emb_seq_tokenizer is loaded.tokenizer
    assert EMB_SEQ_TOKENIZER_FOLDER not in os.listdir(tmp_path / "one")


def test_a_loaded_model_knows_its_tokenizers_also_after_training(tmp_path):
    emb_seq_tokenizer = make_tokenizer(vocab_size=300, texts=["another corpus"])
    make_model(emb_seq_tokenizer=emb_seq_tokenizer).save_pretrained(tmp_path)
    model = CoSupForCausalLM.from_pretrained(tmp_path).train()
    model(torch.tensor([[5, 6]]), passage_input_ids=torch.tensor([[5, 6]]))
    assert model.emb_seq_tokenizer.get_vocab() == emb_seq_tokenizer.get_vocab()
    assert model.emb_seq_tokenizer.get_vocab() != model.tokenizer.get_vocab()


def test_a_query_encoder_is_saved_and_found_again(tmp_path):
    model = make_model(query_from="query_encoder", query_encoder=make_emb_seq("gpt2", seed=7))
    model.save_pretrained(tmp_path)
    loaded = CoSupForCausalLM.from_pretrained(tmp_path)
    input_ids = torch.tensor([[5, 6, model.config.nsp_token_id]])
    assert loaded.config.query_encoder_config.model_type == "gpt2"
    assert torch.equal(loaded(input_ids).query_embeds, model(input_ids).query_embeds)


def test_saving_without_a_tokenizer_works_and_says_so_when_one_is_needed(tmp_path):
    model = CoSupForCausalLM(make_model().config)
    model.save_pretrained(tmp_path)
    loaded = CoSupForCausalLM.from_pretrained(tmp_path)
    not_code = [name for name in files(tmp_path) if not name.endswith(".py")]
    assert not any("tokenizer" in name for name in not_code)
    assert torch.equal(loaded(torch.tensor([[5, 6]])).logits, model(torch.tensor([[5, 6]])).logits)
    with pytest.raises(ValueError, match="knows no tokenizer"):
        model.build_index(PASSAGES, show_progress_bar=False)


def test_sharded_checkpoints_load(tmp_path):
    model = make_model()
    model.save_pretrained(tmp_path, max_shard_size="40KB")
    assert len([name for name in files(tmp_path) if name.endswith(".safetensors")]) > 1
    loaded = CoSupForCausalLM.from_pretrained(tmp_path)
    gen_alone = CoSupForCausalLM.from_pretrained(tmp_path, load_emb_seq=False)
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value)
        if not name.startswith("emb_"):
            assert torch.equal(gen_alone.state_dict()[name], value)
