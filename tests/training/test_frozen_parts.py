"""What the arguments of one training freeze, the next training of the same model may train."""

import pytest
import torch

from support.models import make_model
from support.training import NAMES, arguments, world
from trainer import CoSupTrainer


def make_trainer(model, tmp_path, **options):
    peft_config = options.pop("peft_config", None)
    args = arguments(tmp_path, max_steps=1, warmup_steps=0, **options)
    return CoSupTrainer(model, args, train_dataset=world(NAMES[:8]), peft_config=peft_config)


def trained_parts(trainer):
    """Train, and return the parts whose weights have changed."""
    before = {name: parameter.detach().clone() for name, parameter in trainer.model.named_parameters()}
    trainer.train()
    changed = {name for name, parameter in trainer.model.named_parameters() if not parameter.equal(before[name])}
    return {name.split(".")[0] for name in changed}


@pytest.mark.parametrize(
    ("query_from", "first", "second", "parts"),
    [
        ("gen", {"supervision": "ntp"}, {}, {"gen", "emb_seq", "emb_head"}),
        ("gen", {"freeze_gen": True}, {"freeze_emb_seq": True}, {"gen"}),
        ("emb_seq", {"supervision": "nsp"}, {"supervision": "separate"}, {"gen", "emb_seq", "emb_head"}),
    ],
)
@pytest.mark.parametrize("made_first", [False, True])
def test_the_next_training_trains_what_it_names(tmp_path, query_from, first, second, parts, made_first):
    """Each training trains the same parts, whether or not both trainers are made before either trains."""
    model = make_model(query_from=query_from, emb_head_size=32)
    alone = trained_parts(make_trainer(make_model(query_from=query_from, emb_head_size=32), tmp_path, **first))
    trainer = make_trainer(model, tmp_path, **first)
    next_trainer = make_trainer(model, tmp_path, **second) if made_first else None
    assert trained_parts(trainer) == alone != parts
    assert trained_parts(next_trainer or make_trainer(model, tmp_path, **second)) == parts


def test_what_the_user_froze_stays_frozen(tmp_path):
    model = make_model()
    model.emb_seq.requires_grad_(False)
    make_trainer(model, tmp_path, supervision="ntp").train()
    assert trained_parts(make_trainer(model, tmp_path)) == {"gen"}


def test_frozen_embeddings_with_new_control_tokens_are_refused(tmp_path):
    model = make_model()
    model.get_input_embeddings().requires_grad_(False)
    with pytest.raises(ValueError, match=r"\[Cs\] and \[CE\] in Gen's embeddings are as new"):
        make_trainer(model, tmp_path)
    model.gen.requires_grad_(False)  # as with freeze_gen
    assert trained_parts(make_trainer(model, tmp_path)) == {"emb_seq"}


def test_a_model_whose_weights_are_all_frozen_is_evaluated_and_not_trained(tmp_path):
    trainer = make_trainer(make_model().requires_grad_(False), tmp_path)
    assert trainer.evaluate(world(NAMES[:4]))["eval_loss"] > 0
    with pytest.raises(ValueError, match="All weights of the model are frozen"):
        trainer.train()


def test_adapters_leave_the_weights_of_an_earlier_training_frozen(tmp_path):
    peft = pytest.importorskip("peft")
    model = make_model()
    make_trainer(model, tmp_path, supervision="ntp").train()
    before = model.emb_seq.layers[0].self_attn.q_proj.weight.detach().clone()
    lora = peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    make_trainer(peft.get_peft_model(model, lora), tmp_path).train()
    assert torch.equal(model.emb_seq.layers[0].self_attn.q_proj.base_layer.weight, before)
