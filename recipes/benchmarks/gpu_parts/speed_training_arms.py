"""The arms of the training table: the padded loop, ours eager and compiled, and ours with packed rows."""

import statistics
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch

from modeling_cosup import CoSupForCausalLM

from gpu_parts.runner import Context, is_installed
from train_arms import CompiledOurs, Ours, padded_baseline
from train_step import Step

BASELINE = "padded, eager"
ROWS_OF_BASELINE = 64  # of a forward of the padded loop: with its logits at every position, more do not fit


class WithAttention:
    """
    An arm whose Gen and Emb_seq have another attention implementation during its steps.

    Args:
        model (`CoSupForCausalLM`): shared with other arms.
        implementation (`str`): e.g. `"flash_attention_2"`.
        step (`Callable`): the step of the arm.
    """

    def __init__(self, model: CoSupForCausalLM, implementation: str, step: Step) -> None:
        self.parts = (model.gen, model.emb_seq)
        self.implementation = implementation
        self.arm_step = step

    def step(self, rows: list[dict]) -> float:
        """Run forward and backward of a batch, and return its loss."""
        before = [part.config._attn_implementation for part in self.parts]
        try:
            for part in self.parts:
                part.set_attn_implementation(self.implementation)
            return self.arm_step(rows)
        finally:
            for part, implementation in zip(self.parts, before, strict=True):
                part.set_attn_implementation(implementation)


def packed_attentions(device: torch.device) -> dict[str, str]:
    """Return the attention implementations in which packed rows are tried, by the name that the table gives them."""
    if device.type != "cuda":
        return {"a dense mask": "sdpa"}  # flex attention has no backward on a CPU
    implementations = {"flex": "flex_attention"}
    if is_installed("flash_attn"):
        implementations["flash"] = "flash_attention_2"
    return implementations


def training_arms(
    context: Context, model: CoSupForCausalLM, rows: Any, script: SimpleNamespace, folder: str
) -> dict[str, Step]:
    """Return the step of each arm by its name; the first is the baseline."""
    autocast = partial(torch.autocast, model.device.type, torch.bfloat16)
    backend = "eager" if context.tiny else "inductor"
    compiled = partial(CompiledOurs, model, folder, rows, script, torch_compile_backend=backend)

    def baseline(batch: list[dict]) -> float:
        losses = []
        for start in range(0, len(batch), ROWS_OF_BASELINE):
            losses.append(padded_baseline(model, batch[start : start + ROWS_OF_BASELINE], autocast))
        return statistics.mean(losses)

    arms: dict[str, Step] = {
        BASELINE: baseline,
        "ours, eager": Ours(model, folder, rows, script).step,
        "ours, compiled layers": compiled().step,
    }
    for kind, implementation in packed_attentions(context.device).items():
        packed = compiled(padding_free=True)
        arms[f"ours, packed rows ({kind}), compiled layers"] = WithAttention(model, implementation, packed.step).step
    return arms
