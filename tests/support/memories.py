"""Small real memories for the tests, and the mixture of Gen's distribution with a memory's in float64."""

from typing import Any

import torch

from modeling_cosup import CoSupForCausalLM, MemoryConfig

LAST_MLP = {
    "llama": "model.layers.1.mlp",
    "gpt2": "transformer.h.1.mlp",
    "mistral": "model.layers.1.mlp",
    "gemma2": "model.layers.1.mlp",
}


class StateMemory:
    """
    A memory whose logits are W·state, for a random W.

    What it says depends on one state of Gen and nothing else: a row that decides from another state, or is mixed
    twice, decides other tokens.
    """

    def __init__(
        self, model: CoSupForCausalLM, name: str, scale: float = 4.0, seed: int = 0, weight: float = 0.7
    ) -> None:
        self.states = (name,)
        self.fingerprint = f"W of seed {seed} times {scale}"
        self.memory_config = MemoryConfig(weight=weight)
        self.calls: list[int] = []  # the number of rows of each call
        size, width = model.get_output_embeddings().weight.shape
        generator = torch.Generator().manual_seed(seed)
        self.weight = scale * torch.randn(size, width, generator=generator) / width**0.5

    def log_probs(self, states: dict[str, torch.Tensor], config: MemoryConfig) -> torch.Tensor:
        (state,) = states.values()
        self.calls.append(len(state))
        logits = state.float() @ self.weight.T / config.temperature
        return logits.log_softmax(-1)

    def check_model(self, model: Any) -> None:
        pass


def kept_ids(model: CoSupForCausalLM) -> list[int]:
    """Return the ids of control tokens and ends, whose probabilities no memory changes."""
    config = model.config
    return [config.nsp_token_id, config.cs_token_id, config.ce_token_id, *model.generation_config.eos_token_id]


def mixture(lm: torch.Tensor, memory: torch.Tensor, weight: float, kept: list[int]) -> torch.Tensor:
    """Return the mixture of two distributions `(V,)`, in float64 and by the formula."""
    lm, memory = lm.double(), memory.double()
    outside = [id for id in range(len(lm)) if id not in kept]
    mass = memory[outside].sum()
    if mass == 0:
        return lm
    result = lm.clone()
    result[outside] = (1 - weight) * lm[outside] + weight * lm[outside].sum() * memory[outside] / mass
    return result
