"""Flex attention under autocast: it gets one dtype, and computes what SDPA does."""

import pytest
import torch

from support.models import make_model
from trainer import packed_attention


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_flex_attention_gets_one_dtype_and_is_that_of_sdpa(monkeypatch, dtype):
    given = []
    forward = packed_attention.flex_attention_forward

    def spied_forward(module, query, key, value, *args, **kwargs):
        given.append((query.dtype, key.dtype, value.dtype))
        return forward(module, query, key, value, *args, **kwargs)

    monkeypatch.setattr(packed_attention, "flex_attention_forward", spied_forward)
    body = make_model("llama", "llama").gen.base_model.eval()
    ids = torch.arange(3, 23)[None]
    positions = torch.cat([torch.arange(12), torch.arange(8)])[None]  # two packed rows
    states = {}
    for implementation in ("sdpa", "flex_attention"):
        body.set_attn_implementation(implementation)
        eager = torch.compiler.set_stance("force_eager")  # compiled, flex attention takes a minute on a CPU
        autocast = torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16)
        with eager, torch.no_grad(), autocast:
            states[implementation] = body(input_ids=ids, position_ids=positions, use_cache=False).last_hidden_state
    assert given == [(dtype, dtype, dtype)] * body.config.num_hidden_layers
    bound = 0.05 if dtype == torch.bfloat16 else 1e-5
    assert (states["sdpa"] - states["flex_attention"]).abs().max() < bound * states["sdpa"].abs().max()
    body.set_attn_implementation("sdpa")
    with torch.no_grad():
        joined = body(input_ids=ids, use_cache=False).last_hidden_state
    assert (states["sdpa"] - joined)[0, 12:].abs().max() > 1e-3  # the second row does not see the first
