"""What a CoSup model is built from: adapters are merged, and what is no model of its kind is refused."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer

from modeling_cosup import CoSupConfig, CoSupForCausalLM, sharing_cosup, source_files_cosup, sources_cosup
from modeling_cosup.adapters_cosup import merge_adapters
from modeling_cosup.facts_cosup import facts_of
from modeling_cosup.hub_cosup import FACTS_FILE
from modeling_cosup.sources_cosup import load_tokenizer
from support.models import make_config, make_emb_seq, make_gen, make_model, make_tokenizer

COMMIT = "0" * 40
IDS = torch.tensor([[5, 6, 7]])
build = CoSupForCausalLM.from_gen_and_emb_seq


@pytest.fixture(scope="module")
def peft():
    return pytest.importorskip("peft", reason="needs peft")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """The folder of a plain language model whose embeddings and LM head are tied, with its tokenizer."""
    folder = tmp_path_factory.mktemp("base")
    tokenizer = make_tokenizer()
    make_gen(vocab_size=len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def adapted(peft, base, auto_class=AutoModelForCausalLM, task_type="CAUSAL_LM", vocab_size=None, **options):
    """Return a `PeftModel` of the base model, whose adapters change every output."""
    model = auto_class.from_pretrained(base)
    if vocab_size is not None:
        model.resize_token_embeddings(vocab_size)
    options = {"r": 4, "target_modules": ["q_proj", "v_proj"], "init_lora_weights": False, **options}
    torch.manual_seed(0)
    model = peft.get_peft_model(model, peft.LoraConfig(task_type=task_type, **options)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model


@torch.no_grad()
def states(model):
    """Return the last hidden states of a model with or without LM head, and with or without adapters."""
    return model(IDS, output_hidden_states=True).hidden_states[-1]


@torch.no_grad()
def logits(model, size=374):
    """Return the logits of the tokens that there were before the control tokens."""
    return model(IDS).logits[..., :size]


ADAPTERS = {
    "lora": {},
    "without a task": {"task_type": None},
    "dora": {"use_dora": True},
    "embeddings": {"target_modules": ["q_proj", "embed_tokens"]},
    "head": {"target_modules": ["q_proj", "lm_head"]},
    "modules to save": {"modules_to_save": ["embed_tokens"]},
    "tied modules to save": {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    "tokens": {"trainable_token_indices": [5, 6]},
    "more tokens": {"vocab_size": 410},
}

OBJECTS = [("lora", "model"), ("embeddings", "PeftModel"), ("tied modules to save", "PeftModel")]


@pytest.mark.filterwarnings("ignore::UserWarning")  # peft's, about tied weights
@pytest.mark.parametrize("kind, given", [*((kind, "folder") for kind in ADAPTERS), *OBJECTS])
def test_an_adapter_is_merged_into_gen(tmp_path, peft, base, kind, given):
    model = adapted(peft, base, **ADAPTERS[kind])
    expected = logits(model)
    if given == "folder":
        model.save_pretrained(tmp_path / "adapter")
        gen, tokenizer = tmp_path / "adapter", None
    else:
        gen, tokenizer = model, make_tokenizer()
    if given == "model":  # PEFT changes the model that it wraps
        gen = model.get_base_model()
    built = build(gen, emb_seq=make_emb_seq("bert", hidden_size=16), tokenizer=tokenizer)
    assert built.tokenizer.get_vocab().keys() >= make_tokenizer().get_vocab().keys()
    torch.testing.assert_close(logits(built.gen), expected, rtol=1e-4, atol=1e-4)
    assert all(parameter.requires_grad for parameter in built.gen.parameters())
    built.save_pretrained(tmp_path / "saved")
    loaded = CoSupForCausalLM.from_pretrained(tmp_path / "saved")
    torch.testing.assert_close(logits(loaded.gen), expected, rtol=1e-4, atol=1e-4)
    assert not any("lora" in name or "base_layer" in name for name in loaded.state_dict())


@pytest.mark.parametrize("auto_class, task_type", [(AutoModel, "FEATURE_EXTRACTION"), (AutoModelForCausalLM, None)])
@pytest.mark.parametrize("given", ["folder", "PeftModel"])
def test_an_adapter_is_merged_into_emb_seq_and_the_query_encoder(tmp_path, peft, base, given, auto_class, task_type):
    """Whether it was trained with an LM head or without."""
    model = adapted(peft, base, auto_class, task_type)
    expected = states(model)
    if given == "folder":
        model.save_pretrained(tmp_path / "adapter")
        emb_seq = query_encoder = str(tmp_path / "adapter")
    else:
        emb_seq, query_encoder = model, adapted(peft, base, auto_class, task_type)
    built = build(str(base), emb_seq, query_from="query_encoder", query_encoder=query_encoder)
    built.save_pretrained(tmp_path / "saved")
    for cosup in (built, CoSupForCausalLM.from_pretrained(tmp_path / "saved")):
        for part in (cosup.emb_seq, cosup.query_encoder):
            torch.testing.assert_close(states(part), expected, rtol=1e-4, atol=1e-4)
            assert not torch.allclose(states(part), states(cosup.gen.base_model), atol=0.1)


def test_the_tokenizer_of_an_adapter_is_its_own_or_that_of_its_base(tmp_path, peft, base):
    adapted(peft, base).save_pretrained(tmp_path / "adapter")
    assert build(str(tmp_path / "adapter")).tokenizer.get_vocab().keys() >= make_tokenizer().get_vocab().keys()
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["<think>"], special_tokens=True)
    tokenizer.save_pretrained(tmp_path / "adapter")
    assert "<think>" in build(str(tmp_path / "adapter")).tokenizer.get_vocab()


def test_the_tokenizer_of_an_adapter_on_the_hub_is_asked_for(tmp_path, monkeypatch, peft, base):
    """The local folder of a repository has only the files that were asked for before."""
    adapter, local = tmp_path / "adapter", tmp_path / "local"
    adapted(peft, base).save_pretrained(adapter)
    make_tokenizer().save_pretrained(adapter)
    local.mkdir()

    def download(name, file, **options):
        return shutil.copy(adapter / file, local / file) if (adapter / file).exists() else None

    monkeypatch.setattr(source_files_cosup, "cached_file", download)
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", lambda name, **options: f"tokenizer of {name}")
    assert load_tokenizer("me/adapter") == "tokenizer of me/adapter"


def test_a_base_that_lacks_weights_is_refused(tmp_path, peft, base):
    model = make_gen(vocab_size=len(make_tokenizer()), tie_word_embeddings=False)
    model.save_pretrained(tmp_path / "base")
    adapted(peft, tmp_path / "base").save_pretrained(tmp_path / "adapter")
    model.base_model.save_pretrained(tmp_path / "base")  # without its LM head
    with pytest.raises(ValueError, match="base lacks 1 weights of a LlamaForCausalLM, e.g. lm_head.weight"):
        build(str(tmp_path / "adapter"), tokenizer=make_tokenizer())


def test_a_model_with_code_of_its_own_is_refused_before_its_weights_are_read(tmp_path):
    code = (
        "from transformers import PreTrainedConfig\n\n\nclass Strange(PreTrainedConfig):\n    model_type = 'strange'\n"
    )
    (tmp_path / "strange.py").write_text(code)
    config = {"model_type": "strange", "auto_map": {"AutoConfig": "strange.Strange"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"gen \(strange\) comes with code of its own"):
        build(str(tmp_path), tokenizer=make_tokenizer(), model_kwargs={"trust_remote_code": True})


def in_hub_cache(cache, name, folder):
    """Copy a folder to a cache of the Hub, as `huggingface_hub` lays it out."""
    repository = cache / f"models--{name.replace('/', '--')}"
    shutil.copytree(folder, repository / "snapshots" / COMMIT)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)


def test_an_adapter_and_its_base_by_their_names_on_the_hub(tmp_path, peft, base):
    model = adapted(peft, base)
    expected = logits(model)
    model.peft_config["default"].base_model_name_or_path = "someone/base"
    model.save_pretrained(tmp_path / "adapter")
    cache = tmp_path / "cache"
    in_hub_cache(cache, "someone/base", base)
    in_hub_cache(cache, "me/adapter", tmp_path / "adapter")
    from_cache = {"cache_dir": cache, "local_files_only": True}
    built = build("me/adapter", "me/adapter", model_kwargs=from_cache)
    torch.testing.assert_close(logits(built.gen), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(states(built.emb_seq), states(built.gen), rtol=1e-4, atol=1e-4)
    assert built.config.gen_name_or_path == "me/adapter"
    shutil.rmtree(cache / "models--someone--base")
    with pytest.raises(OSError, match="me/adapter is an adapter of someone/base, which cannot be loaded"):
        build("me/adapter", tokenizer=make_tokenizer(), model_kwargs=from_cache)


def test_a_merged_model_equals_pefts_own(peft, base):
    model = adapted(peft, base, target_modules="all-linear")
    expected = model.merge_and_unload().state_dict()
    merged = merge_adapters(adapted(peft, base, target_modules="all-linear"), "gen").state_dict()
    assert merged.keys() == expected.keys()
    assert all(torch.equal(merged[name], value) for name, value in expected.items())


def broken_adapter(folder, peft, base, kind):
    """Write an adapter that cannot be merged, and return the words of its error."""
    if kind == "prompt":
        config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
        peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base), config).save_pretrained(folder)
        return "an adapter of kind PROMPT_TUNING, which cannot be merged"
    layers = 3 if kind == "layers" else 2
    make_gen(layers=layers).save_pretrained(folder / "base")
    adapted(peft, folder / "base").save_pretrained(folder)
    if kind == "base":
        shutil.rmtree(folder / "base")
        return rf"is an adapter of {folder}/base, which cannot be loaded(.|\n)*PeftModel.from_pretrained\(base_model"
    if kind == "layers":
        make_gen().save_pretrained(folder / "base")
        return "which lacks 4 of the weights that it adapts, e.g. (model.)?layers.2.self_attn"
    if kind == "whole":
        make_gen().save_pretrained(folder)
        return "holds a whole model and an adapter"
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    return "without adapter_model.safetensors; only safetensors are read"


@pytest.mark.parametrize("kind", ["prompt", "base", "layers", "whole", "bin"])
def test_an_adapter_that_cannot_be_merged_is_refused(tmp_path, peft, base, kind):
    words = broken_adapter(tmp_path, peft, base, kind)
    with pytest.raises((ValueError, OSError), match=words):
        build(str(tmp_path), tokenizer=make_tokenizer())
    with pytest.raises((ValueError, OSError), match=words):
        build(str(base), str(tmp_path), emb_seq_tokenizer=make_tokenizer())


def test_an_object_that_is_no_model_is_refused(peft, base):
    prompts = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    model = peft.get_peft_model(make_gen(), prompts)
    with pytest.raises(ValueError, match="gen has an adapter of kind PROMPT_TUNING, which cannot be merged"):
        build(model, tokenizer=make_tokenizer())
    with pytest.raises(TypeError, match="emb_seq is a Linear, expected a name, a path or a model of transformers"):
        build(make_gen(), torch.nn.Linear(2, 2), tokenizer=make_tokenizer())


def test_a_checkpoint_with_adapters_that_are_not_merged_is_not_saved(tmp_path, peft):
    model = make_model()
    wrapped = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
    with pytest.raises(ValueError, match=r"q_proj\S* belongs to an adapter that is not merged"):
        model.save_pretrained(tmp_path / "out")
    assert not (tmp_path / "out").exists()
    wrapped.merge_and_unload().save_pretrained(tmp_path / "out")


# ------------------------------------------------------------------ other models where a CoSup checkpoint is expected


def large_plain_model(folder):
    """Write the folder of a small Llama; a made-up CoSup model next to it would have 13 billion parameters."""
    make_gen().save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("load", [CoSupConfig.from_pretrained, CoSupForCausalLM.from_pretrained])
def test_a_plain_model_is_no_checkpoint(tmp_path, load):
    with pytest.raises(ValueError, match="is a plain llama model, not a CoSup .*from_gen_and_emb_seq.*--gen") as error:
        load(large_plain_model(tmp_path / "my gen"))
    assert "\n" not in str(error.value)
    assert str(error.value).endswith(f"--gen '{tmp_path}/my gen'.")


@pytest.mark.parametrize("load", [CoSupForCausalLM.from_pretrained, AutoModelForCausalLM.from_pretrained])
def test_plain_weights_with_the_config_of_a_checkpoint_are_refused(tmp_path, load):
    config = make_model().config
    with pytest.raises(ValueError, match="is a plain llama model"):
        load(large_plain_model(tmp_path), config=config)


def test_the_config_of_a_plain_model_is_refused():
    with pytest.raises(ValueError, match="config is of a llama model, expected a CoSupConfig"):
        CoSupForCausalLM(make_config())


def test_a_folder_without_a_config_is_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("")
    for load in (CoSupConfig.from_pretrained, CoSupForCausalLM.from_pretrained):
        with pytest.raises((OSError, ValueError), match="config.json"):
            load(tmp_path)


def test_a_checkpoint_that_lacks_weights_is_refused(tmp_path):
    make_model().save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["emb_seq.layers.1.mlp.up_proj.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="lacks 1 weights of its model, e.g. emb_seq.layers.1.mlp.up_proj.weight"):
        CoSupForCausalLM.from_pretrained(tmp_path)
    without_emb_seq, info = CoSupForCausalLM.from_pretrained(tmp_path, load_emb_seq=False, output_loading_info=True)
    assert without_emb_seq.emb_seq is None and not info["missing_keys"]


def test_adapters_of_a_checkpoint_load_with_it(tmp_path, peft):
    """transformers finds the base of adapters; tied weights that it takes for missing are not."""
    make_model().save_pretrained(tmp_path / "base")
    options = {"target_modules": ["q_proj"], "trainable_token_indices": {"gen.model.embed_tokens": [374]}}
    model = CoSupForCausalLM.from_pretrained(tmp_path / "base")
    config = peft.LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False, **options)
    model = peft.get_peft_model(model, config).eval()
    model.save_pretrained(tmp_path / "adapters")
    loaded = CoSupForCausalLM.from_pretrained(tmp_path / "adapters")
    torch.testing.assert_close(logits(loaded), logits(model))
    with pytest.raises(ValueError, match="holds no config.json of a CoSup model; for adapters, give"):
        CoSupConfig.from_pretrained(tmp_path / "adapters")


def test_gen_without_control_tokens_is_saved_as_it_is(tmp_path):
    model = make_model()
    model.config.nsp_token_id = None
    model.save_gen(tmp_path)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), logits(model.gen))
    assert AutoTokenizer.from_pretrained(tmp_path).get_vocab() == model.tokenizer.get_vocab()


def test_options_of_loading_may_be_given_by_themselves(tmp_path):
    make_gen().save_pretrained(tmp_path)
    options = {"tokenizer": make_tokenizer(), "dtype": "bfloat16", "attn_implementation": "eager"}
    model = build(str(tmp_path), **options)
    assert model.dtype == model.gen.dtype == torch.bfloat16
    assert model.gen.config._attn_implementation == "eager"
    with pytest.raises(TypeError, match="got revision, .* Options of from_pretrained go into model_kwargs"):
        build(str(tmp_path), **options, revision="main")
    with pytest.raises(ValueError, match="got dtype, for parts that it loads by their names"):
        build(make_gen(), tokenizer=make_tokenizer(), dtype="bfloat16")


@pytest.mark.parametrize("gen_dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("emb_seq_dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_parts_of_two_dtypes_get_one_without_a_loss(tmp_path, monkeypatch, gen_dtype, emb_seq_dtype):
    messages = []
    monkeypatch.setattr(sources_cosup.logger, "warning", messages.append)
    emb_seq = make_emb_seq().to(emb_seq_dtype)
    weights = {name: weight.float() for name, weight in emb_seq.named_parameters()}
    model = build(make_gen().to(gen_dtype), emb_seq, tokenizer=make_tokenizer())
    expected = gen_dtype if gen_dtype == emb_seq_dtype else torch.float32
    assert {weight.dtype for weight in model.parameters()} == {expected}
    assert ["Gen is in" in message for message in messages] == [True] * (gen_dtype != emb_seq_dtype)
    model.save_pretrained(tmp_path)
    loaded = CoSupForCausalLM.from_pretrained(tmp_path, dtype="auto")
    assert loaded.dtype == expected
    size = len(model.tokenizer) - 3  # the rows of control tokens are new
    for name, weight in loaded.emb_seq.named_parameters():
        assert torch.equal(weight[:size].float(), weights[name][:size])


def test_the_revision_of_code_goes_where_code_is_loaded(tmp_path, monkeypatch, base):
    calls = []

    def record(function, name):
        def call(*args, **options):
            calls.append((name, options.pop("code_revision", None)))
            return function(*args, **options)

        return call

    for auto_class in (AutoConfig, AutoTokenizer, AutoModelForCausalLM):
        call = record(auto_class.from_pretrained, auto_class.__name__)
        monkeypatch.setattr(getattr(sources_cosup, auto_class.__name__), "from_pretrained", call)
    monkeypatch.setattr(source_files_cosup, "cached_file", record(source_files_cosup.cached_file, "file"))
    build(str(base), model_kwargs={"code_revision": COMMIT})
    expected = {"AutoConfig", "AutoTokenizer", "AutoModelForCausalLM"}
    assert {name for name, revision in calls if revision == COMMIT} == expected
    assert ("file", None) in calls


def test_a_checkpoint_in_a_subfolder_has_its_tokenizers_and_facts(tmp_path):
    passage = "who painted the night watch?"
    options = {"tokenizer": make_tokenizer(), "emb_seq_tokenizer": make_tokenizer(vocab_size=320)}
    whole = build(make_gen(), make_emb_seq("bert"), **options)
    whole.save_pretrained(tmp_path / "all" / "mine")
    facts = {"name": "mine", "weights": whole.hash_all_weights()}
    (tmp_path / "all" / "mine" / FACTS_FILE).write_text(json.dumps(facts))
    model = CoSupForCausalLM.from_pretrained(tmp_path / "all", subfolder="mine")
    assert model.tokenizer(passage)["input_ids"] == whole.tokenizer(passage)["input_ids"]
    assert model.emb_seq_tokenizer(passage)["input_ids"] == whole.emb_seq_tokenizer(passage)["input_ids"]
    assert facts_of(model) == facts
    model.save_pretrained(tmp_path / "copy")
    assert (tmp_path / "copy" / "tokenizer.json").exists()
    assert json.loads((tmp_path / "copy" / FACTS_FILE).read_text())["name"] == "mine"


def test_a_checkpoint_without_a_tokenizer_says_so_when_it_is_saved(tmp_path, monkeypatch):
    messages = []
    monkeypatch.setattr(sharing_cosup.logger, "warning", messages.append)
    make_model().save_pretrained(tmp_path / "a")
    (tmp_path / "a" / "tokenizer.json").unlink()
    (tmp_path / "a" / "tokenizer_config.json").unlink()
    CoSupForCausalLM.from_pretrained(tmp_path / "a").save_pretrained(tmp_path / "b")
    assert messages == [f"No tokenizer was found in {tmp_path / 'a'}, so none is saved with the model."]
