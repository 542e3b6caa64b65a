"""LoRA of any layers: the rows of the control tokens are trained, and the merged model answers as the adapted one."""

import pytest
import torch

from modeling_cosup import CoSupForCausalLM
from support.models import make_model
from support.training import arguments, world
from trainer import CoSupTrainer, model_setup
from trainer.model_setup import wrap_in_peft

peft = pytest.importorskip("peft", reason="needs peft")
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # peft's, about tied weights

TARGETS = {
    "embeddings": {"target_modules": ["q_proj", "v_proj", "embed_tokens"]},
    "head": {"target_modules": ["q_proj", "lm_head"]},
    "both": {"target_modules": ["q_proj", "embed_tokens", "lm_head"]},
    "pattern": {"target_modules": r"gen\..*(q_proj|embed_tokens)"},
    "linear": {"target_modules": "all-linear"},
    "saved embeddings": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
    "saved head": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "saved norm": {"target_modules": ["q_proj"], "modules_to_save": ["input_layernorm"]},
    "tokens": {"target_modules": ["q_proj"], "trainable_token_indices": [5, 6]},
    "tokens of a layer": {"target_modules": ["q_proj"], "trainable_token_indices": {"embed_tokens": [5]}},
}


def trained_rows(before, after):
    return set((before != after).any(1).nonzero()[:, 0].tolist())


TIED_KINDS = [kind for kind in TARGETS if kind not in ("embeddings", "head", "both", "pattern")]


CASES = [(kind, False, {}) for kind in TARGETS] + [(kind, True, {}) for kind in TIED_KINDS]
CASES += [(kind, True, {"tie_emb_seq": True, "emb_head_size": 24}) for kind in ("linear", "saved embeddings")]


@pytest.mark.parametrize(("kind", "tied", "settings"), CASES)
def test_control_tokens_are_trained_whatever_is_adapted(tmp_path, kind, tied, settings):
    model = make_model(gen_kwargs={"tie_word_embeddings": tied}, emb_seq_kwargs={"hidden_size": 48}, **settings)
    control_ids = {model.config.nsp_token_id, model.config.cs_token_id, model.config.ce_token_id}
    matrices = {"input": model.get_input_embeddings(), "head": model.get_output_embeddings()}
    before = {name: matrix.weight.detach().clone() for name, matrix in matrices.items()}
    head_before = model.emb_head.weight.detach().clone()
    config = peft.LoraConfig(r=4, task_type="CAUSAL_LM", init_lora_weights=False, **TARGETS[kind])
    wrapped = wrap_in_peft(model, config).eval()
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.01)
        ids = torch.tensor([[5, *control_ids, 6, 7]])
        adapted = wrapped(input_ids=ids, passage_input_ids=ids)
        merged = wrapped.merge_and_unload()
        merged.save_pretrained(tmp_path)
        for whole in (merged, CoSupForCausalLM.from_pretrained(tmp_path)):
            output = whole(ids, passage_input_ids=ids)
            torch.testing.assert_close(output.logits, adapted.logits, rtol=1e-3, atol=1e-3)
            for name in ("query_embeds", "passage_embeds"):
                torch.testing.assert_close(output[name], adapted[name], rtol=1e-3, atol=1e-3)
    matrices = {"input": merged.get_input_embeddings(), "head": merged.get_output_embeddings()}
    rows = {name: trained_rows(before[name], matrix.weight) for name, matrix in matrices.items()}
    assert rows["input"] >= control_ids and rows["head"] >= control_ids
    if "tokens" in kind:
        assert rows["input"] - control_ids == {"tokens": {5, 6}, "tokens of a layer": {5}}[kind]
    assert (merged.get_input_embeddings().weight is merged.get_output_embeddings().weight) == tied
    assert trained_rows(head_before, merged.emb_head.weight)


@pytest.mark.parametrize("kind", [kind for kind in TARGETS if kind not in TIED_KINDS])
def test_an_adapter_of_tied_embeddings_is_refused(kind):
    """PEFT's merge would add the adapter to the shared weights: the logits of the merged model would be others."""
    with pytest.raises(
        ValueError, match=r"target_modules names gen\..* embeddings and LM head share.*modules_to_save"
    ):
        wrap_in_peft(make_model(), peft.LoraConfig(task_type="CAUSAL_LM", **TARGETS[kind]))
    with pytest.raises(ValueError, match="train whole embeddings with modules_to_save.$"):  # there is no emb_seq.…
        wrap_in_peft(make_model(tie_emb_seq=True), peft.LoraConfig(task_type="CAUSAL_LM", **TARGETS[kind]))
    of_emb_seq = peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "emb_seq.embed_tokens"])
    wrapped = wrap_in_peft(make_model(), of_emb_seq)
    assert any("emb_seq.embed_tokens.lora" in name for name, _ in wrapped.named_parameters())


def test_a_layer_that_is_trained_twice_is_refused():
    options = {"target_modules": ["q_proj", "embed_tokens"], "trainable_token_indices": [5]}
    with pytest.raises(ValueError, match="trainable_token_indices names gen.model.embed_tokens, which target_modules"):
        wrap_in_peft(make_model(), peft.LoraConfig(task_type="CAUSAL_LM", **options))


IA3 = {"target_modules": ["q_proj"], "feedforward_modules": [], "task_type": "CAUSAL_LM"}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("wrapped_by", ["the caller", "the trainer", "transformers"])
def test_adapters_that_leave_new_control_tokens_as_they_are_are_refused(tmp_path, tied, wrapped_by):
    model, options = make_model(gen_kwargs={"tie_word_embeddings": tied}), {}
    if wrapped_by == "the caller":
        model = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
    elif wrapped_by == "transformers":
        model.add_adapter(peft.LoraConfig(target_modules=["q_proj"]))
    else:
        options["peft_config"] = peft.IA3Config(**IA3)
    with pytest.raises(ValueError, match=r"\[Cs\] and \[CE\] in Gen's embeddings are as new"):
        CoSupTrainer(model, arguments(tmp_path), train_dataset=world(["Ann", "Bob"]), **options)


def test_the_head_counts_where_its_rows_are_trained(tmp_path):
    rows, config = world(["Ann", "Bob"]), peft.IA3Config(**IA3, modules_to_save=["gen.model.embed_tokens"])
    with pytest.raises(ValueError, match="in Gen's LM head are as new"):
        CoSupTrainer(make_model(), arguments(tmp_path), train_dataset=rows, peft_config=config)
    CoSupTrainer(make_model(), arguments(tmp_path, supervision="nsp"), train_dataset=rows, peft_config=config)


def test_other_adapters_of_trained_control_tokens_are_taken(tmp_path):
    model = make_model()
    with torch.no_grad():
        for matrix in (model.get_input_embeddings(), model.get_output_embeddings()):
            matrix.weight[model.config.ce_token_id] += 0.1
    rows, config = world(["Ann", "Bob"]), peft.IA3Config(**IA3)
    trainer = CoSupTrainer(model, arguments(tmp_path), train_dataset=rows, peft_config=config)
    with pytest.raises(ValueError, match="is a PeftModel already, and peft_config would wrap it again"):
        CoSupTrainer(trainer.model, arguments(tmp_path), train_dataset=rows, peft_config=config)


def test_adapters_of_a_model_in_memory_are_warned_of(tmp_path, monkeypatch):
    messages = []
    monkeypatch.setattr(model_setup.logger, "warning", messages.append)
    make_model().save_pretrained(tmp_path / "base")
    for model in (make_model(), CoSupForCausalLM.from_pretrained(tmp_path / "base")):
        config = peft.LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")
        CoSupTrainer(model, arguments(tmp_path), train_dataset=world(["Ann", "Bob"]), peft_config=config)
    (message,) = messages
    assert message.startswith("The model that gets the adapters was built in memory")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("emb_head_size", "modules_to_save", "name"),
    [(None, None, None), (32, None, "emb_head"), (None, ["embed_tokens", "lm_head"], "embed_tokens")],
)
def test_whole_weights_in_half_precision_are_warned_of(
    tmp_path, monkeypatch, dtype, emb_head_size, modules_to_save, name
):
    """PEFT keeps adapters and rows of tokens in float32; of what it trains as a whole it keeps the dtype."""
    messages = []
    monkeypatch.setattr(model_setup.logger, "warning", messages.append)
    model = make_model(emb_head_size=emb_head_size).to(dtype)
    config = peft.LoraConfig(target_modules=["q_proj"], modules_to_save=modules_to_save, task_type="CAUSAL_LM")
    CoSupTrainer(model, arguments(tmp_path), train_dataset=world(["Ann", "Bob"]), peft_config=config)
    about_dtype = [message for message in messages if "is trained in torch.bfloat16" in message]
    assert len(about_dtype) == (dtype == torch.bfloat16 and name is not None)
    assert all(f"{name}.modules_to_save.default.weight" in message for message in about_dtype)


def test_adapters_of_encoders_alone_are_taken(tmp_path):
    """Gen is not read: its control tokens need not be trained."""
    model = make_model(query_from="emb_seq")
    args = arguments(tmp_path, supervision="nsp")
    trainer = CoSupTrainer(model, args, train_dataset=world(["Ann", "Bob"]), peft_config=peft.IA3Config(**IA3))
    assert any(parameter.requires_grad for parameter in trainer.model.get_base_model().emb_seq.parameters())
