"""Small real memories for the tests, and the mixture of Gen's distribution with a memory's in float64."""

from typing import Any

import torch

from modeling_cosup import CoSupForCausalLM, KNNMemory, MemoryConfig, MLPMemory
from modeling_cosup.token_keys_cosup import document_ids, token_states
from support.models import TEXTS

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


def knn_memory(model: CoSupForCausalLM, **config: Any) -> KNNMemory:
    """Return a datastore of `TEXTS`, in float32: 4 documents."""
    documents = [document_ids(text, model.tokenizer) for text in TEXTS]
    (states,) = token_states(model, documents, max_length=64, stride=32, batch_size=4)
    return KNNMemory.from_tensors(
        states.keys,
        states.values,
        fingerprint=model.memory_fingerprint(),
        vocab_size=model.get_output_embeddings().weight.shape[0],
        document_starts=torch.tensor([int((states.documents < number).sum()) for number in range(len(TEXTS))]),
        dtype="float32",
        memory_config=MemoryConfig(**{"weight": 0.7, "k": 8, "temperature": 20.0, **config}),
    )


def mlp_memory(model: CoSupForCausalLM) -> MLPMemory:
    """Return a memory with random weights."""
    torch.manual_seed(0)
    memory = MLPMemory.from_gen(model, intermediate_size=16, memory_config=MemoryConfig(weight=0.7))
    with torch.no_grad():
        memory.lm_head.weight.normal_(std=0.7)
    return memory


def kept_ids(model: CoSupForCausalLM) -> list[int]:
    """Return the ids of control tokens and ends, whose probabilities no memory changes."""
    config = model.config
    return [config.nsp_token_id, config.cs_token_id, config.ce_token_id, *model.generation_config.eos_token_id]


def mixture(lm: torch.Tensor, memory: torch.Tensor, weight: float, kept: list[int]) -> torch.Tensor:
    """Return the mixture of two distributions `(V,)`, in float64 and by the formula."""
    lm, memory = lm.double(), memory.double()
    outside = [id for id in range(len(lm)) if id not in kept]
    mass = memory[outside].sum()
    if mass == 0:  # the memory has nothing to say
        return lm
    result = lm.clone()
    result[outside] = (1 - weight) * lm[outside] + weight * lm[outside].sum() * memory[outside] / mass
    return result
