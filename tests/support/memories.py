"""Small real memories for the tests: what they add to the logits hangs on a state of Gen, and on nothing else."""

import torch

LAST_MLP = {
    "llama": "model.layers.1.mlp",
    "gpt2": "transformer.h.1.mlp",
    "mistral": "model.layers.1.mlp",
    "gemma2": "model.layers.1.mlp",
}


class AddedStates:
    """
    Adds W·state to the logits, W random: a row that decides from another state, or is adjusted twice, decides other
    tokens.
    """

    def __init__(self, model, name, scale=4.0, seed=0):
        self.states, self.fingerprint, self.calls = (name,), f"W of seed {seed} times {scale}", []
        size, width = model.get_output_embeddings().weight.shape
        self.weight = scale * torch.randn(size, width, generator=torch.Generator().manual_seed(seed)) / width**0.5

    def adjust(self, logits, states):
        (state,) = states.values()
        self.calls.append(len(logits))
        return logits + state.float() @ self.weight.T


class RetrievesByState(AddedStates):
    """Makes `[NSP]` certain where a direction of the state says so, and adds W·state elsewhere."""

    def __init__(self, model, name, seed=1):
        super().__init__(model, name, seed=seed)
        self.nsp, self.fingerprint = model.config.nsp_token_id, f"[NSP] by the state, seed {seed}"

    def adjust(self, logits, states):
        (state,) = states.values()
        logits = super().adjust(logits, states)
        asks = (state.float() @ self.weight[0]) > 4.0
        logits[:, self.nsp] += 1000.0 * asks
        return logits
