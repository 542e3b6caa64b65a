"""What from_gen_and_emb_seq checks: kinds of parts, their weights, padding, positions, and that a checkpoint loads."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    BertModel,
    DPRContextEncoder,
    DPRQuestionEncoder,
    T5EncoderModel,
)

from modeling_cosup import CoSupForCausalLM
from modeling_cosup.architectures_cosup import num_positions
from modeling_cosup.checks_cosup import check_weights
from modeling_cosup.packing_cosup import pad_rows
from modeling_cosup.tokenization_cosup import encode_passages_for_emb_seq
from support.models import PASSAGES, make_emb_seq, make_gen, make_model, make_tokenizer

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
SHAPES = {
    "t5": {"d_model": 32, "d_ff": 64, "d_kv": 8, "num_layers": 2, "num_decoder_layers": 2, "num_heads": 4},
    "bart": {
        **{"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64},
        **{"encoder_attention_heads": 4, "decoder_attention_heads": 4, "max_position_embeddings": 64},
    },
    "gpt2": {"n_embd": 32, "n_layer": 1, "n_head": 4, "n_positions": 64},
    "bloom": {"hidden_size": 32, "n_layer": 1, "n_head": 4},
    "llama4_text": {**SMALL, "intermediate_size_mlp": 64, "num_key_value_heads": 2, "head_dim": 8},
    "longformer": {**SMALL, "attention_window": 8},
    "canine": {**SMALL, "num_hash_buckets": 80},
    "fnet": {"hidden_size": 32, "num_hidden_layers": 1, "intermediate_size": 64},
}
SHAPES["mt5"] = SHAPES["umt5"] = SHAPES["t5"]


def tiny(kind, **options):
    """Return a small config; `max_position_embeddings` is 64, the padding has id 1."""
    shape = SHAPES.get(kind, SMALL)
    if shape is SMALL or SMALL.items() <= shape.items():
        shape = {"max_position_embeddings": 64, **shape}
    return AutoConfig.for_model(kind, vocab_size=400, pad_token_id=1, initializer_range=0.2, **{**shape, **options})


def new(auto_class, kind, **options):
    torch.manual_seed(0)
    return auto_class.from_config(tiny(kind, **options)).eval()


def dpr(model_class):
    return model_class(tiny("dpr")).eval()


def with_chosen_states(model, passages):
    """Return the mean of Emb_seq's states for each passage alone, normalised: what pooling 'mean' must give."""
    embeds = []
    for ids in encode_passages_for_emb_seq(model.emb_seq_tokenizer, passages, model.config):
        embeds.append(model.emb_seq(torch.tensor([ids])).last_hidden_state[0].mean(0))
    return F.normalize(torch.stack(embeds), dim=-1)


@torch.no_grad()
def embeddings(model, passages=PASSAGES):
    ids, mask = pad_rows(encode_passages_for_emb_seq(model.emb_seq_tokenizer, passages, model.config))
    return model.encode_passages(ids, mask)


# ---------------------------------------------------------------------- encoders of encoder-decoders


@pytest.mark.parametrize("kind", ["t5", "mt5", "umt5"])
def test_the_encoder_of_t5_and_its_kind_embeds_and_loads_again(tmp_path, kind):
    whole = new(AutoModelForSeq2SeqLM, kind)
    whole.save_pretrained(tmp_path / "t5")
    make_tokenizer().save_pretrained(tmp_path / "t5")
    options = {"tokenizer": make_tokenizer(), "emb_seq_pooling": "mean", "max_passage_length": 40}
    model = CoSupForCausalLM.from_gen_and_emb_seq(make_gen(), str(tmp_path / "t5"), **options)
    assert type(model.emb_seq).__name__ == f"{kind.upper()}EncoderModel"
    assert not [name for name, _ in model.emb_seq.named_parameters() if "decoder" in name]
    expected = whole.get_encoder()(torch.tensor([[5, 6, 7]])).last_hidden_state
    torch.testing.assert_close(model.emb_seq(torch.tensor([[5, 6, 7]])).last_hidden_state, expected)
    expected = embeddings(model)
    torch.testing.assert_close(expected, with_chosen_states(model, PASSAGES), rtol=1e-4, atol=1e-5)
    assert (expected @ expected.T).triu(1).max() < 0.999  # the passages have embeddings of their own

    model.save_pretrained(tmp_path / "model")
    loaded = CoSupForCausalLM.from_pretrained(tmp_path / "model")
    assert type(loaded.emb_seq) is type(model.emb_seq)
    assert torch.equal(embeddings(loaded), expected)


def test_t5_as_the_query_encoder(tmp_path):
    query_encoder = T5EncoderModel(tiny("t5")).eval()
    model = make_model(emb_seq="t5", query_from="query_encoder", query_encoder=query_encoder, emb_seq_pooling="mean")
    ids = torch.tensor([[5, 6, 7, model.config.nsp_token_id]])
    expected = F.normalize(query_encoder(ids).last_hidden_state.mean(1), dim=-1)
    torch.testing.assert_close(model.encode_queries(ids, torch.ones_like(ids)), expected)
    model.save_pretrained(tmp_path)
    loaded = CoSupForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(
        loaded.encode_queries(ids, torch.ones_like(ids)), model.encode_queries(ids, torch.ones_like(ids))
    )
    assert torch.equal(embeddings(loaded), embeddings(model))


# ---------------------------------------------------------------------- parts of the wrong kind

WRONG_GENS = {
    "t5": (lambda: new(AutoModelForSeq2SeqLM, "t5"), "gen is an encoder-decoder (t5), expected a causal language"),
    "bart": (lambda: new(AutoModelForSeq2SeqLM, "bart"), "gen is an encoder-decoder (bart), expected a causal"),
    "bart's decoder": (lambda: new(AutoModelForCausalLM, "bart"), "gen is an encoder-decoder (bart)"),
    "no head": (make_emb_seq, "gen is a LlamaModel; loaded again from a checkpoint it would be a LlamaForCausalLM"),
    "another head": (
        lambda: new(AutoModelForSequenceClassification, "gpt2"),
        "gen is a GPT2ForSequenceClassification; loaded again from a checkpoint it would be a GPT2LMHeadModel",
    ),
    "cosup": (make_model, "gen is a CoSup model, with a Gen and an Emb_seq of its own: pass one of them (model.gen"),
    "llama 4": (
        lambda: new(AutoModelForCausalLM, "llama4_text"),
        "gen (Llama4ForCausalLM) has no base model that transformers finds by its name",
    ),
    "no language model": (
        lambda: new(AutoModel, "fnet"),
        "gen is of the type fnet, of which transformers has no causal",
    ),
}
WRONG_ENCODERS = {
    "t5 with its decoder": (
        lambda: new(AutoModelForSeq2SeqLM, "t5"),
        "is a T5ForConditionalGeneration; loaded again from a checkpoint it would be a T5EncoderModel. Pass a",
    ),
    "bart": (
        lambda: new(AutoModel, "bart"),
        "is an encoder-decoder (bart) of which transformers has no class for the",
    ),
    "bart's encoder": (lambda: new(AutoModel, "bart").encoder, "is an encoder-decoder (bart) of which"),
    "dpr, passages": (lambda: dpr(DPRContextEncoder), "is a DPR model, which returns no states of tokens"),
    "dpr, questions": (lambda: dpr(DPRQuestionEncoder), "is a DPR model, which returns no states of tokens"),
    "cosup": (make_model, "is a CoSup model, with a Gen and an Emb_seq of its own"),
    "canine": (lambda: new(AutoModel, "canine"), "(CanineModel) has no table of token embeddings"),
    "fnet": (lambda: new(AutoModel, "fnet"), "(FNetModel) does not leave out padding: the embedding of a passage"),
    "squeezebert": (
        lambda: new(AutoModel, "squeezebert", embedding_size=32),
        "(SqueezeBertModel) cannot embed a short text: TypeError",
    ),
}


@pytest.mark.parametrize("case", WRONG_GENS)
def test_what_cannot_be_gen_is_refused(case):
    make, message = WRONG_GENS[case]
    tokenizer = make_tokenizer()
    size = len(tokenizer)
    with pytest.raises(ValueError) as error:
        CoSupForCausalLM.from_gen_and_emb_seq(make(), make_emb_seq(), tokenizer=tokenizer)
    assert message in str(error.value)
    assert len(tokenizer) == size  # nothing was changed before


@pytest.mark.parametrize("role", ["emb_seq", "query_encoder"])
@pytest.mark.parametrize("case", WRONG_ENCODERS)
def test_what_cannot_encode_is_refused(case, role):
    make, message = WRONG_ENCODERS[case]
    parts = {"emb_seq": make_emb_seq(), "tokenizer": make_tokenizer(), role: make()}
    query_from = "gen" if role == "emb_seq" else role
    with pytest.raises(ValueError) as error:
        CoSupForCausalLM.from_gen_and_emb_seq(make_gen(), query_from=query_from, max_passage_length=40, **parts)
    assert str(error.value).startswith(role)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("auto_class", "kind", "message"),
    [
        (AutoModelForSeq2SeqLM, "bart", "gen is an encoder-decoder (bart)"),
        (AutoModelForSeq2SeqLM, "t5", "gen is an encoder-decoder (t5)"),
        (AutoModel, "fnet", "gen is of the type fnet"),
    ],
)
def test_a_folder_that_cannot_be_gen_is_refused_before_its_weights_are_read(tmp_path, auto_class, kind, message):
    tiny(kind).save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ValueError) as error:  # there are no weights: reading them would raise an OSError
        CoSupForCausalLM.from_gen_and_emb_seq(str(tmp_path))
    assert message in str(error.value)


# ---------------------------------------------------------------------- weights and padding


def test_a_checkpoint_that_lacks_weights_is_refused(tmp_path):
    make_emb_seq(tie_word_embeddings=False).save_pretrained(tmp_path)  # no LM head
    make_tokenizer().save_pretrained(tmp_path)
    message = f"{tmp_path} lacks 1 weights of a LlamaForCausalLM, e.g. lm_head.weight"
    with pytest.raises(ValueError) as error:
        CoSupForCausalLM.from_gen_and_emb_seq(str(tmp_path))
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("saved", "read", "example"),
    [
        ({"layers": 3}, {"num_hidden_layers": 2}, "layers.2."),
        ({"attention_bias": True}, {"attention_bias": False}, "layers.0.self_attn.k_proj.bias"),
    ],
)
def test_a_config_that_is_not_of_the_weights_is_refused(tmp_path, saved, read, example):
    model = make_emb_seq(**saved)
    model.save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    for name, value in read.items():
        setattr(model.config, name, value)
    model.config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="weights that a LlamaModel of its config leaves out") as error:
        CoSupForCausalLM.from_gen_and_emb_seq(make_gen(), str(tmp_path), tokenizer=make_tokenizer())
    assert example in str(error.value)


def test_heads_poolers_and_decoders_may_be_left_out(tmp_path):
    make_gen(tie_word_embeddings=False).save_pretrained(tmp_path / "llama")
    new(AutoModelForSequenceClassification, "bert").save_pretrained(tmp_path / "bert")
    BertModel(tiny("bert"), add_pooling_layer=False).save_pretrained(tmp_path / "without pooler")
    for name in ("llama", "bert", "without pooler"):
        model, info = AutoModel.from_pretrained(tmp_path / name, output_loading_info=True)
        assert info["missing_keys"] or info["unexpected_keys"]
        check_weights(model, info, name)


def test_what_a_checkpoint_would_not_hold_is_found():
    """A part that was changed after its config was read."""
    gen = make_gen()
    gen.model.layers[0].self_attn.scale = nn.Parameter(torch.ones(2))
    with pytest.raises(ValueError, match=r"gen \(LlamaForCausalLM\) has the weight model.layers.0.self_attn.scale"):
        CoSupForCausalLM.from_gen_and_emb_seq(gen, make_emb_seq(), tokenizer=make_tokenizer())
    emb_seq = make_emb_seq("bert")
    emb_seq.encoder.layer = emb_seq.encoder.layer[:1]
    with pytest.raises(ValueError, match=r"emb_seq \(BertModel\) has the weight encoder.layer.1.* of shape None"):
        CoSupForCausalLM.from_gen_and_emb_seq(make_gen(), emb_seq, tokenizer=make_tokenizer())


# ---------------------------------------------------------------------- positions


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        *[(kind, 62) for kind in ("roberta", "xlm-roberta", "camembert", "mpnet", "longformer")],
        *[("bert", 64), ("gpt2", 64), ("t5", None), ("bloom", None)],
    ],
)
def test_the_number_of_positions_is_what_a_model_can_read(kind, expected):
    config = tiny(kind)
    assert num_positions(config) == expected
    encoder = T5EncoderModel(config) if kind == "t5" else AutoModel.from_config(config)
    longest = torch.full((1, expected or 200), 5)
    assert encoder.eval()(input_ids=longest).last_hidden_state.shape[1] == longest.shape[1]
    if expected is not None:
        with pytest.raises((IndexError, RuntimeError)):
            encoder(input_ids=torch.full((1, expected + 1), 5))


def test_passages_must_fit_the_positions_that_count_from_the_padding():
    options = {"tokenizer": make_tokenizer(), "emb_seq_pooling": "mean"}
    with pytest.raises(ValueError) as error:
        CoSupForCausalLM.from_gen_and_emb_seq(make_gen(), new(AutoModel, "roberta"), max_passage_length=61, **options)
    assert str(error.value) == (
        "max_passage_length=61, BOS and EOS do not fit into Emb_seq's 62 positions: it may be 60 at most."
    )
    model = CoSupForCausalLM.from_gen_and_emb_seq(
        make_gen(), new(AutoModel, "roberta"), max_passage_length=60, **options
    )
    long = {"id": "long", "title": "", "text": "The Night Watch was painted by Rembrandt in 1642. " * 20}
    assert len(encode_passages_for_emb_seq(model.emb_seq_tokenizer, [long], model.config)[0]) == 62
    assert torch.isfinite(embeddings(model, [long, PASSAGES[0]])).all()
