"""Each half as a separate checkpoint: Gen as a plain causal LM, Emb_seq for sentence-transformers."""

import copy
import json
import subprocess
import sys

import pytest
import torch
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    BertTokenizer,
    GenerationConfig,
    PreTrainedTokenizerFast,
)

from modeling_cosup import CoSupForCausalLM
from modeling_cosup.packing_cosup import pad_rows
from modeling_cosup.parts_cosup import passage_tokenizer
from modeling_cosup.tokenization_cosup import (
    add_control_tokens,
    encode_passages_for_emb_seq,
    encode_prompt,
    render_passage,
)
from support.models import PASSAGES, TEXTS, make_model, make_tokenizer
from support.tokenizer_kinds import TOKENIZERS

LONG = {
    "id": "long",
    "title": "A long one",
    "text": " ".join(["The Night Watch was painted by Rembrandt in 1642."] * 20),
}


def snapshot(model):
    """Return all that saving a part must not change."""
    configs = [
        model.config,
        model.gen.config,
        model.emb_seq.config,
        model.gen.generation_config,
        model.generation_config,
    ]
    return {
        "identities": [id(config) for config in configs],
        "configs": [config.to_dict() for config in configs],
        "attention": [part.config._attn_implementation for part in (model, model.gen, model.emb_seq)],
        "fingerprint": copy.deepcopy(model.config.fingerprint),
        "weights": {name: value.clone() for name, value in model.state_dict().items()},
    }


def assert_unchanged(model, before):
    after = snapshot(model)
    for name in ("identities", "configs", "attention", "fingerprint"):
        assert after[name] == before[name], name
    assert after["weights"].keys() == before["weights"].keys()
    for name, value in after["weights"].items():
        assert torch.equal(value, before["weights"][name]), name


# ---------------------------------------------------------------------- Gen


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    ("architecture", "name"), [("llama", "Llama"), ("gpt2", "GPT2LMHead"), ("mistral", "Mistral"), ("qwen3", "Qwen3")]
)
def test_gen_loads_as_a_plain_model(tmp_path, architecture, name, tied):
    model = make_model(architecture, gen_kwargs={"tie_word_embeddings": tied})
    before = snapshot(model)
    model.save_gen(tmp_path / "gen")
    assert_unchanged(model, before)
    config = json.loads((tmp_path / "gen" / "config.json").read_text())
    assert "auto_map" not in config
    assert config["architectures"] == [type(model.gen).__name__]
    assert not list((tmp_path / "gen").glob("*.py"))
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "gen")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "gen")
    assert type(plain).__name__ in (f"{name}ForCausalLM", f"{name}Model")
    assert plain.config.tie_word_embeddings == tied
    ids = torch.tensor([encode_prompt(tokenizer, "who painted the Night Watch?", "Answer.")])
    assert ids.tolist() == [encode_prompt(model.tokenizer, "who painted the Night Watch?", "Answer.")]
    with torch.no_grad():
        assert torch.equal(plain(ids).logits, model(ids).logits)
    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 8}
    assert plain.generate(ids, **options).tolist() == model.generate(ids, **options).tolist()
    assert GenerationConfig.from_pretrained(tmp_path / "gen").suppress_tokens == [model.config.cs_token_id]


def test_gen_loads_in_a_process_without_this_package(tmp_path, model):
    model.save_gen(tmp_path)
    code = f"""
import json, torch
from transformers import AutoModelForCausalLM, pipeline
model = AutoModelForCausalLM.from_pretrained({str(tmp_path)!r})
print(json.dumps([type(model).__name__, model(torch.tensor([[5, 6, 7]])).logits.tolist()]))
"""
    environment = {"PATH": "/usr/bin", "HF_HUB_OFFLINE": "1"}
    streams = {"capture_output": True, "text": True}
    done = subprocess.run([sys.executable, "-c", code], cwd="/", env=environment, timeout=600, **streams)
    assert done.returncode == 0, done.stderr
    name, logits = json.loads(done.stdout)
    assert name == "LlamaForCausalLM"
    assert torch.allclose(torch.tensor(logits), model(torch.tensor([[5, 6, 7]])).logits, atol=1e-5)


def test_gen_in_shards_and_from_a_full_state_dict(tmp_path, model):
    ids = torch.tensor([[5, 6, 7]])
    model.save_gen(tmp_path / "sharded", max_shard_size="50KB")
    assert len(list((tmp_path / "sharded").glob("model-*.safetensors"))) > 1
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path / "sharded")(ids).logits, model(ids).logits)
    state_dict = {name: value * 2 for name, value in model.state_dict().items()}
    model.save_gen(tmp_path / "doubled", state_dict=state_dict)
    doubled = AutoModelForCausalLM.from_pretrained(tmp_path / "doubled")
    for name, value in doubled.state_dict().items():
        assert torch.equal(value, 2 * model.gen.state_dict()[name]), name
    model.save_gen(tmp_path / "other_rank", is_main_process=False)
    assert not list((tmp_path / "other_rank").iterdir())


def test_gen_of_a_checkpoint_that_was_loaded_without_emb_seq(tmp_path, model):
    model.save_pretrained(tmp_path / "whole")
    half = CoSupForCausalLM.from_pretrained(tmp_path / "whole", load_emb_seq=False)
    half.save_gen(tmp_path / "gen")
    ids = torch.tensor([[5, 6, 7]])
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path / "gen")(ids).logits, model(ids).logits)
    with pytest.raises(ValueError, match="Emb_seq is not in memory"):
        half.save_emb_seq(tmp_path / "emb_seq")
    assert not (tmp_path / "emb_seq").exists()


def test_parts_with_an_adapter_are_refused_and_merged_ones_are_not(tmp_path):
    peft = pytest.importorskip("peft", reason="needs peft")
    lora = peft.LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
    adapted = peft.get_peft_model(make_model(), lora)
    for save in (adapted.save_gen, adapted.save_emb_seq):
        with pytest.raises(ValueError, match="merge_and_unload"):
            save(tmp_path / "part")
    merged = adapted.merge_and_unload()
    merged.save_gen(tmp_path / "part")
    ids = torch.tensor([[5, 6, 7]])
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path / "part")(ids).logits, merged(ids).logits)


# ---------------------------------------------------------------------- Emb_seq


def bert_tokenizer(tmp_path):
    """Return a lower-casing WordPiece tokenizer with CLS and SEP, without BOS and EOS."""
    texts = [*TEXTS, *(f"{passage['title']} {passage['text']}" for passage in PASSAGES)]
    words = sorted(set(" ".join(texts).lower().split()))
    letters = [chr(code) for code in range(33, 127) if not chr(code).isupper()]
    continued = [f"##{letter}" for letter in letters]
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *continued, *words]
    (tmp_path / "vocab.txt").write_text("\n".join(dict.fromkeys(vocabulary)))
    return BertTokenizer.from_pretrained(tmp_path)


@torch.no_grad()
def embeddings(model, passages):
    ids, mask = pad_rows(encode_passages_for_emb_seq(model.emb_seq_tokenizer, passages, model.config))
    return model.encode_passages(ids, mask)


NO_EOS = {"emb_seq_pooling": "lasttoken", "emb_seq_add_eos_token": False}
NARROW = {"emb_seq_kwargs": {"hidden_size": 16}}
CASES = {
    "llama": ("llama", {}),
    "llama, wider, head": ("llama", {"emb_seq_kwargs": {"hidden_size": 48}}),
    "llama, dot": ("llama", {"similarity": "dot"}),
    "llama, last token, no EOS": ("llama", {**NO_EOS, "similarity": "dot"}),
    "gpt2": ("gpt2", {}),
    "gpt2, mean, head, no BOS": ("gpt2", {**NARROW, "emb_seq_pooling": "mean", "emb_seq_add_bos_token": False}),
    "gpt2, prompt": ("gpt2", {"passage_prompt": "passage: ", "passage_template": "Title: {title}\nText: {text}"}),
    "bert, mean, head": ("bert", {**NARROW, "emb_seq_pooling": "mean"}),
    "bert, cls, dot": ("bert", {"emb_seq_pooling": "cls", "similarity": "dot"}),
    "t5, mean": ("t5", {"emb_seq_pooling": "mean"}),
    "llama, head, cut": ("llama", {"emb_seq_kwargs": {"hidden_size": 48}, "truncate_dim": 8}),
    "llama, dot, cut": ("llama", {"similarity": "dot", "truncate_dim": 8}),
    "tied": ("llama", {"tie_emb_seq": True}),
    "tied, dot, narrow head": ("llama", {"tie_emb_seq": True, "similarity": "dot", "emb_head_size": 8}),
    "tied, mean, cut": ("llama", {"tie_emb_seq": True, "emb_seq_pooling": "mean", "truncate_dim": 8}),
    "tied, head, cut": ("llama", {"tie_emb_seq": True, "emb_head_size": 16, "truncate_dim": 8}),
    "bert, its own tokenizer": ("bert", {"emb_seq_pooling": "cls", "own_tokenizer": True}),
}


@pytest.mark.parametrize("case", CASES)
def test_sentence_transformers_embeds_as_the_whole_model_does(tmp_path, case, monkeypatch):
    architecture, config = CASES[case]
    config = dict(config)
    if config.pop("own_tokenizer", False):
        config["emb_seq_tokenizer"] = bert_tokenizer(tmp_path)
    model = make_model(emb_seq=architecture, max_passage_length=40, **config)
    before = snapshot(model)
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "sentence_transformers", None)  # the folder is written without it
        model.save_emb_seq(tmp_path / "emb_seq")
    assert_unchanged(model, before)
    library = pytest.importorskip("sentence_transformers", reason="needs sentence-transformers")
    passages = [*PASSAGES, LONG, {"title": "[SEP] <pad>", "text": "[CLS] </s>"}]
    loaded = library.SentenceTransformer(str(tmp_path / "emb_seq"))
    modules = ["Transformer", "Pooling"]
    if model.emb_head is not None or model.config.truncate_dim is not None:
        modules.append("Dense")
    if model.config.similarity == "cosine":
        modules.append("Normalize")
    assert [type(module).__name__ for module in loaded] == modules
    assert loaded.similarity_fn_name == model.config.similarity
    texts = [render_passage(passage, model.config.passage_template) for passage in passages]
    expected = embeddings(model, passages)
    scale = expected.abs().max()
    for batch_size in (1, 3, 32):
        for encode in (loaded.encode, loaded.encode_document):
            embeds = torch.tensor(encode(texts, batch_size=batch_size))
            assert (embeds - expected).abs().max() <= 1e-5 * max(1, scale)
    assert not torch.allclose(expected[0], expected[1], atol=1e-2)
    lengths = [len(ids) for ids in encode_passages_for_emb_seq(model.emb_seq_tokenizer, passages, model.config)]
    assert max(lengths) == loaded.max_seq_length  # one of them was truncated, and keeps its EOS


def test_the_parts_of_a_tied_model_are_both_of_its_gen(tmp_path):
    model = make_model("gpt2", tie_emb_seq=True).to(torch.bfloat16)
    state_dict = {name: value * 2 for name, value in model.state_dict().items()}
    model.save_gen(tmp_path / "gen", state_dict=dict(state_dict))
    model.save_emb_seq(tmp_path / "emb_seq", state_dict=dict(state_dict), max_shard_size="50KB")
    gen = AutoModelForCausalLM.from_pretrained(tmp_path / "gen")
    emb_seq = AutoModel.from_pretrained(tmp_path / "emb_seq")
    for name, value in emb_seq.state_dict().items():
        assert torch.equal(value, gen.base_model.state_dict()[name])
        assert torch.equal(value, 2 * model.gen.base_model.state_dict()[name])
    card = (tmp_path / "emb_seq" / "README.md").read_text()
    assert "It is one tied model: these weights and an LM head." in card
    assert "other half" not in card


def test_an_imported_tokenizer_is_read_again_as_it_was_saved(tmp_path, model):
    model.save_emb_seq(tmp_path)
    passages = [*PASSAGES, LONG]
    texts = [render_passage(passage, model.config.passage_template) for passage in passages]
    ids = AutoTokenizer.from_pretrained(tmp_path)(texts, truncation=True)["input_ids"]
    assert ids == encode_passages_for_emb_seq(model.emb_seq_tokenizer, passages, model.config)


@pytest.mark.parametrize("name", [name for name in TOKENIZERS if "Python" not in name])
def test_special_tokens_in_a_passage_are_read_as_the_whole_model_does(tmp_path, name):
    tokenizer = TOKENIZERS[name]()
    add_control_tokens(tokenizer)
    config = make_model(emb_seq_pooling="lasttoken").config
    passage_tokenizer(tokenizer, config).save_pretrained(tmp_path)
    text = "the </s> painting</s>x <s>at</s> b<pad><mask>[SEP][CLS]<extra_id_3>[NSP] ＜/s＞ <</s>>"
    ids = PreTrainedTokenizerFast.from_pretrained(tmp_path)(text)["input_ids"]
    assert [ids] == encode_passages_for_emb_seq(tokenizer, [{"text": text}], config)


def test_the_folder_says_how_passages_read_and_its_card_runs(tmp_path, model):
    pytest.importorskip("sentence_transformers", reason="needs sentence-transformers")
    model.save_emb_seq(tmp_path / "emb_seq")
    settings = json.loads((tmp_path / "emb_seq" / "config_sentence_transformers.json").read_text())
    assert settings["cosup"] == {"passage_template": "{title} :: {text}", "query_from": "gen"}
    card = (tmp_path / "emb_seq" / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: sentence-transformers\npipeline_tag: sentence-similarity\n")
    code = card.split("```python\n")[1].split("```")[0].replace('"emb_seq"', repr(str(tmp_path / "emb_seq")))
    names = {}
    exec(code, names)
    assert (torch.tensor(names["embeddings"]) - embeddings(model, names["passages"])).abs().max() <= 1e-5


def test_emb_seq_in_shards_and_a_card_that_was_written_by_hand(tmp_path, model):
    library = pytest.importorskip("sentence_transformers", reason="needs sentence-transformers")
    (tmp_path / "README.md").write_text("my own")
    model.save_emb_seq(tmp_path, max_shard_size="50KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    assert (tmp_path / "README.md").read_text() == "my own"
    texts = [render_passage(passage, model.config.passage_template) for passage in PASSAGES]
    embeds = torch.tensor(library.SentenceTransformer(str(tmp_path)).encode(texts))
    assert (embeds - embeddings(model, PASSAGES)).abs().max() <= 1e-5


def test_a_tokenizer_that_is_not_of_the_tokenizers_library_is_refused(tmp_path, model, monkeypatch):
    tokenizer = make_tokenizer()
    monkeypatch.setattr(type(tokenizer), "is_fast", False)
    with pytest.raises(ValueError, match="not backed by the tokenizers library"):
        model.save_emb_seq(tmp_path / "emb_seq")
    assert not (tmp_path / "emb_seq").exists()
