"""Parts that text never reaches are frozen and named: vision towers, and projections that are never asked."""

import pytest
import torch
from torch import nn

from support.models import make_model
from support.training import NAMES, arguments, world
from trainer import CoSupTrainer, unreached

VISION = ["gen.model.vision_tower", "gen.model.multi_modal_projector"]
GLOBAL = [f"emb_seq.encoder.layer.*.attention.self.{name}_global" for name in ("query", "key", "value")]


@pytest.fixture
def warnings(monkeypatch):
    messages = []
    monkeypatch.setattr(unreached.logger, "warning_once", messages.append)
    return messages


@pytest.mark.parametrize(
    ("gen", "emb_seq", "config", "supervision", "modules"),
    [
        ("gemma3", "longformer", {}, "co", VISION + GLOBAL),
        ("gemma3", "longformer", {}, "ntp", VISION),
        ("llama", "longformer", {"query_from": "emb_seq"}, "nsp", GLOBAL),
        ("llama", "llama", {}, "co", []),
        ("gemma3", "llama", {"tie_emb_seq": True}, "co", VISION),
        ("llama", "bert", {"query_from": "emb_seq"}, "separate", []),
    ],
)
def test_they_are_frozen_and_named(tmp_path, warnings, gen, emb_seq, config, supervision, modules):
    model = make_model(gen=gen, emb_seq=emb_seq, **config)
    args = arguments(tmp_path, supervision=supervision, max_steps=1)
    trainer = CoSupTrainer(model, args, train_dataset=world(NAMES[:8]))
    missing = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(lambda _, name=name: missing.discard(name))
    trainer.train()
    assert not missing  # every parameter that counts as trained gets a gradient
    if not modules:
        assert not warnings
        return
    (warning,) = warnings
    assert warning.endswith(f"parameters are frozen, because text never reaches them: {', '.join(modules)}.")
    count = 0
    for name, parameter in model.named_parameters():
        if "vision_tower" in name or "projector" in name or ("_global." in name and supervision != "ntp"):
            assert not parameter.requires_grad, name
            count += parameter.numel()
    assert warning.startswith(f"{count:,} parameters")


def test_adapters_of_such_parts_are_frozen(tmp_path, warnings):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    args = arguments(tmp_path, max_steps=1)
    trainer = CoSupTrainer(make_model(gen="gemma3"), args, train_dataset=world(NAMES[:8]), peft_config=config)
    adapters = {name: p.requires_grad for name, p in trainer.model.named_parameters() if "lora_" in name}
    assert any("vision_tower" in name for name in adapters)
    for name, is_trained in adapters.items():
        assert is_trained != ("vision_tower" in name), name
    assert warnings[0].endswith("text never reaches them: gen.model.vision_tower.")


class Experts(nn.Module):
    """A layer of a list of experts, of which the first reads every token."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer
        self.experts = nn.ModuleList(nn.Linear(32, 32) for _ in range(3))

    def forward(self, hidden):
        return self.layer(hidden) + self.experts[0](hidden)


def test_experts_that_a_text_does_not_need_are_not_frozen(tmp_path, warnings):
    model = make_model()
    layer = model.gen.model.layers[0]
    layer.mlp = Experts(layer.mlp)
    CoSupTrainer(model, arguments(tmp_path), train_dataset=world(NAMES[:8]))
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert not warnings


def test_the_card_counts_what_is_trained(tmp_path):
    model = make_model(gen="gemma3")
    trainer = CoSupTrainer(model, arguments(tmp_path), train_dataset=world(NAMES[:8]))
    vision = [*model.gen.model.vision_tower.parameters(), *model.gen.model.multi_modal_projector.parameters()]
    expected = sum(parameter.numel() for parameter in model.parameters()) - sum(map(torch.numel, vision))
    trainer.save_model()
    trainer.create_model_card()
    assert f"| trained parameters | {expected:,} |" in (tmp_path / "README.md").read_text()
