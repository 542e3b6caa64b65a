"""A tied model: Gen's body is Emb_seq, saved once, and found again however a checkpoint is loaded."""

import copy
import json
import pickle
from importlib.util import find_spec

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from modeling_cosup import CoSupConfig, CoSupForCausalLM
from modeling_cosup.card_cosup import model_card
from support.models import PASSAGES, make_config, make_emb_seq, make_gen, make_model, make_tokenizer

WIDE = {"hidden_size": 128, "intermediate_size": 128}  # 4-bit weights come in blocks of 64
QUANTIZED = find_spec("bitsandbytes") is not None
IDS = torch.tensor([[5, 6, 7]])


def build(model):
    return model.build_index(PASSAGES, show_progress_bar=False)


def make_tied(gen="llama", **config):
    return make_model(gen, tie_emb_seq=True, **config)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A wide tied model, its index, and the folder that holds both."""
    folder = tmp_path_factory.mktemp("tied")
    model = make_tied(gen_kwargs=WIDE, emb_head_size=64)
    index = build(model)
    model.save_pretrained(folder / "model", max_shard_size="200KB")
    index.save_pretrained(folder / "index")
    return model, index, folder


# ---------------------------------------------------------------------- saving


def test_weights_are_saved_once(saved):
    model, _, folder = saved
    files = list((folder / "model").glob("*.safetensors"))
    assert len(files) > 1
    names, num_bytes = [], 0
    for path in files:
        with safe_open(path, "pt") as file:
            names += file.keys()
            num_bytes += sum(file.get_tensor(name).nbytes for name in file.keys())
    assert {name.split(".")[0] for name in names} == {"gen", "emb_head"}
    assert num_bytes == 4 * model.num_parameters()
    assert model.num_parameters() == model.gen.num_parameters() + 128 * 64
    config = json.loads((folder / "model" / "config.json").read_text())
    assert "emb_seq_config" not in config and config["tie_emb_seq"]
    loaded = CoSupConfig.from_pretrained(folder / "model")
    assert loaded.emb_seq_config is loaded.gen_config
    assert loaded.gen_config.hidden_size == 128


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize(
    ("options", "tolerance"),
    [
        ({}, 1e-6),  # some CPUs round sums differently for another placement of the same weights
        ({"load_emb_seq": False}, 1e-6),
        ({"dtype": "bfloat16"}, 0.05),
        ({"dtype": "float16"}, 0.01),
        ({"device_map": "auto"}, 1e-6),
        ({"device_map": "cpu"}, 1e-6),
        ({"device_map": {"": "disk"}, "offload_folder": "offloaded"}, 1e-6),
        ({"bits": 8}, 0.1),
        ({"bits": 4}, 0.5),
    ],
)
def test_however_it_is_loaded_it_keeps_its_index(saved, tmp_path, monkeypatch, options, tolerance):
    _, index, folder = saved
    monkeypatch.chdir(tmp_path)
    options = dict(options)
    if "bits" in options:
        if not QUANTIZED:
            pytest.skip("needs bitsandbytes")
        options["quantization_config"] = BitsAndBytesConfig(**{f"load_in_{options.pop('bits')}bit": True})
    model = CoSupForCausalLM.from_pretrained(folder / "model", **options)
    assert model.emb_seq is model.gen.base_model
    model(IDS)  # with gradients, but not in training
    model.load_index(folder / "index")
    difference = (build(model).embeddings - index.embeddings).abs().max()
    assert difference <= tolerance
    assert model.generate_many([[5, 6]], max_new_tokens=2, show_progress_bar=False)


def test_loaded_without_emb_seq_it_is_whole(saved, tmp_path):
    model, index, folder = saved
    light = CoSupForCausalLM.from_pretrained(folder / "model", load_emb_seq=False)
    assert torch.equal(light.emb_head.weight, model.emb_head.weight)
    assert light.config.query_from == "gen"
    light.save_pretrained(tmp_path / "again")
    light.save_emb_seq(tmp_path / "emb_seq")
    again = CoSupForCausalLM.from_pretrained(tmp_path / "again")
    assert again.fingerprint() == model.fingerprint()
    index.check_model(again)


def test_a_checkpoint_of_two_towers_is_not_tied_and_the_other_way_round(saved, tmp_path):
    model, _, folder = saved
    two = make_model(gen_kwargs=WIDE, emb_seq_kwargs=WIDE)
    two.save_pretrained(tmp_path)
    for options in ({"tie_emb_seq": True}, {"config": model.config}):
        with pytest.raises(ValueError, match="tie_emb_seq=True: the checkpoint .* holds two towers, whose weights"):
            CoSupForCausalLM.from_pretrained(tmp_path, **options)
    for options in ({"tie_emb_seq": False}, {"config": two.config}):
        with pytest.raises(ValueError, match="tie_emb_seq=False: the checkpoint .* holds one tied model"):
            CoSupForCausalLM.from_pretrained(folder / "model", **options)
    assert CoSupForCausalLM.from_pretrained(folder / "model", tie_emb_seq=True).config.tie_emb_seq


# ---------------------------------------------------------------------- the card


def test_the_card_counts_parameters_once():
    model = make_tied(emb_head_size=8, truncate_dim=4)
    card = " ".join(model_card(model, "tester/tied", {}).split())
    assert "Emb_seq, which is this model's own body." in card
    assert "| parameters | 31,392 | Gen's, and 256 of emb_head |" in card
    assert model.num_parameters() == 31_392 + 256
    assert "| architecture | LlamaForCausalLM | LlamaModel, Gen's body |" in card
    assert "| `tie_emb_seq` | `True` |" in card and "| `truncate_dim` | `4` |" in card
    assert "An index belongs to these weights: further training" in card
    two_towers = " ".join(model_card(make_model(), "tester/two", {}).split())
    assert "| parameters | 31,392 | 31,392 |" in two_towers
    for words in ("a second model, Emb_seq", "load_emb_seq=False"):
        assert words in two_towers and words not in card


# ---------------------------------------------------------------------- in memory


@pytest.mark.parametrize("make_copy", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_is_tied_to_its_own_gen(saved, make_copy):
    model, _, _ = saved
    twin = make_copy(model)
    assert twin.emb_seq is twin.gen.base_model is not model.emb_seq
    assert twin.config.emb_seq_config is twin.config.gen_config
    assert twin.num_parameters() == model.num_parameters()
    assert torch.equal(twin.encode_passages(IDS), model.encode_passages(IDS))


def test_a_config_alone_makes_a_tied_model():
    model = CoSupForCausalLM(CoSupConfig(gen_config=make_config(), tie_emb_seq=True))
    assert model.emb_seq is model.gen.base_model
    assert not [name for name in model.state_dict() if "emb_seq" in name]
    assert model.encode_passages(IDS).shape == (1, 32)
    with pytest.raises(ValueError, match="no Emb_seq of its own"):
        CoSupForCausalLM(model.config, emb_seq=make_emb_seq())


def test_new_token_rows_are_rows_of_both_roles(tmp_path):
    model = make_tied()
    model.resize_token_embeddings(416, mean_resizing=False)
    assert model.emb_seq.get_input_embeddings().weight.shape[0] == 416
    model.save_pretrained(tmp_path)
    loaded = CoSupForCausalLM.from_pretrained(tmp_path)
    assert loaded.config.emb_seq_config.vocab_size == loaded.gen.config.vocab_size == 416


def test_emb_seq_of_a_tied_model_cannot_be_replaced():
    model = make_tied()
    for other in (make_emb_seq(), None):
        with pytest.raises(ValueError, match="tied .*its Emb_seq is Gen's body"):
            model.emb_seq = other
    assert model.emb_seq is model.gen.base_model
    two = make_model()
    two.emb_seq = make_emb_seq(seed=7)
    assert torch.equal(two.emb_seq.norm.weight, dict(two.named_parameters())["emb_seq.norm.weight"])
    two.emb_seq = None
    assert two.emb_seq is None


# ---------------------------------------------------------------------- what cannot be tied


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"emb_seq": "nowhere"}, "tie_emb_seq=True with emb_seq: Gen's body reads the passages"),
        ({"emb_seq_tokenizer": "nowhere"}, "tie_emb_seq=True with emb_seq_tokenizer: Gen's body"),
        ({"query_encoder": "nowhere"}, "query_encoder was given, but query_from is 'gen'"),
        ({"query_encoder": "nowhere", "query_from": "query_encoder"}, "tie_emb_seq=True with query_from="),
        ({"query_from": "emb_seq"}, "tie_emb_seq=True with query_from='emb_seq': Gen makes the queries"),
        ({"emb_seq_pooling": "cls"}, "tie_emb_seq=True with emb_seq_pooling='cls'"),
    ],
)
def test_a_second_encoder_is_refused_before_anything_is_loaded(given, message):
    with pytest.raises(ValueError, match=message):
        CoSupForCausalLM.from_gen_and_emb_seq("not loaded", tie_emb_seq=True, **given)


def test_a_refused_emb_seq_leaves_the_tokenizer_as_it_was():
    tokenizer = make_tokenizer()
    with pytest.raises(ValueError, match="tie_emb_seq=True with emb_seq"):
        CoSupForCausalLM.from_gen_and_emb_seq(make_gen(), make_emb_seq(), tokenizer=tokenizer, tie_emb_seq=True)
    assert "[NSP]" not in tokenizer.get_vocab()


@pytest.mark.parametrize("changed", [{"query_from": "emb_seq"}, {"emb_seq_pooling": "cls"}])
def test_a_tied_checkpoint_is_not_loaded_with_settings_of_two_towers(saved, changed):
    with pytest.raises(ValueError, match=f"tie_emb_seq=True with {next(iter(changed))}"):
        CoSupForCausalLM.from_pretrained(saved[2] / "model", **changed)
    assert CoSupForCausalLM.from_pretrained(saved[2] / "model", tie_emb_seq=None).config.tie_emb_seq


def test_a_given_emb_head_is_used_or_refused():
    weight = torch.randn(8, 32)
    options = {"tokenizer": make_tokenizer(), "emb_head": weight}
    tied = CoSupForCausalLM.from_gen_and_emb_seq(make_gen(), **options)
    assert tied.config.embedding_size == 8 and torch.equal(tied.emb_head.weight, weight)
    with pytest.raises(ValueError, match=r"emb_head of shape \(8, 32\) was given, .* set emb_head_size=8"):
        CoSupForCausalLM.from_gen_and_emb_seq(make_gen(), query_from="emb_seq", **options)


@pytest.mark.parametrize("architecture", ["bert", "t5", "modernbert"])
def test_a_gen_that_is_an_encoder_is_refused(tmp_path, architecture):
    if architecture == "bert":  # an AutoModelForCausalLM, although it reads in both directions
        gen, tokenizer = make_gen("bert"), make_tokenizer()
        message = r"gen \(BertLMHeadModel\) cannot be a tied model .* it is an encoder, whose states depend"
    else:
        make_emb_seq(architecture, pad_token_id=0).save_pretrained(tmp_path)
        make_tokenizer().save_pretrained(tmp_path)
        gen, tokenizer = tmp_path, None
        message = "gen is an encoder-decoder" if architecture == "t5" else "no causal language model"
    with pytest.raises(ValueError, match=message):
        CoSupForCausalLM.from_gen_and_emb_seq(gen, tokenizer=tokenizer, tie_emb_seq=True)


@pytest.mark.filterwarnings("ignore::FutureWarning")  # peft's
@pytest.mark.parametrize("kind", ["name", "model"])
def test_adapters_become_a_tied_model(tmp_path, kind):
    peft = pytest.importorskip("peft", reason="needs peft")
    tokenizer = make_tokenizer()
    make_gen().save_pretrained(tmp_path / "base")
    base = make_tied()
    gen = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    lora = peft.LoraConfig(target_modules=["q_proj"], r=2, task_type="CAUSAL_LM", init_lora_weights=False)
    adapted = peft.get_peft_model(gen, lora)
    source = adapted
    if kind == "name":
        adapted.save_pretrained(tmp_path / "adapter")
        source = tmp_path / "adapter"
    model = CoSupForCausalLM.from_gen_and_emb_seq(source, tokenizer=tokenizer, tie_emb_seq=True)
    assert model.emb_seq is model.gen.base_model
    assert not [name for name in model.state_dict() if "lora" in name or "emb_seq" in name]
    assert not torch.allclose(model.encode_passages(IDS), base.encode_passages(IDS), atol=1e-3)


@pytest.mark.parametrize(
    ("asked", "tied"),
    [
        ({}, True),
        ({"tie_emb_seq": False}, False),
        ({"emb_seq": make_emb_seq()}, False),
        ({"emb_seq_tokenizer": make_tokenizer(300)}, False),
        ({"query_from": "emb_seq"}, False),
        ({"emb_seq_pooling": "cls"}, False),
        ({"query_from": "gen", "emb_seq_pooling": "mean"}, True),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else None,
)
def test_a_model_is_tied_unless_an_argument_asks_for_two_towers(asked, tied):
    model = CoSupForCausalLM.from_gen_and_emb_seq(make_gen(), tokenizer=make_tokenizer(), **asked)
    assert model.config.tie_emb_seq == tied
    assert (model.emb_seq is model.gen.base_model) == tied
