"""Small real memories for the tests: what they add to the logits depends on one state of Gen and nothing else."""

import torch

from modeling_cosup import CoSupForCausalLM

LAST_MLP = {
    "llama": "model.layers.1.mlp",
    "gpt2": "transformer.h.1.mlp",
    "mistral": "model.layers.1.mlp",
    "gemma2": "model.layers.1.mlp",
}


class AddedStates:
    """
    Adds W·state to the logits, for a random W.

    A row that decides from another state, or is adjusted twice, decides other tokens.
    """

    def __init__(self, model: CoSupForCausalLM, name: str, scale: float = 4.0, seed: int = 0) -> None:
        self.states = (name,)
        self.fingerprint = f"W of seed {seed} times {scale}"
        self.calls: list[int] = []  # the number of rows of each call
        size, width = model.get_output_embeddings().weight.shape
        generator = torch.Generator().manual_seed(seed)
        self.weight = scale * torch.randn(size, width, generator=generator) / width**0.5

    def adjust(self, logits: torch.Tensor, states: dict[str, torch.Tensor]) -> torch.Tensor:
        (state,) = states.values()
        self.calls.append(len(logits))
        return logits + state.float() @ self.weight.T


class RetrievesByState(AddedStates):
    """Makes `[NSP]` certain if the state points in one direction, and adds W·state as well."""

    def __init__(self, model: CoSupForCausalLM, name: str, seed: int = 1) -> None:
        super().__init__(model, name, seed=seed)
        self.nsp = model.config.nsp_token_id
        self.fingerprint = f"[NSP] by the state, seed {seed}"

    def adjust(self, logits: torch.Tensor, states: dict[str, torch.Tensor]) -> torch.Tensor:
        (state,) = states.values()
        logits = super().adjust(logits, states)
        retrieves = (state.float() @ self.weight[0]) > 4.0
        logits[:, self.nsp] += 1000.0 * retrieves
        return logits
