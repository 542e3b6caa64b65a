"""A step of generate() with an MLP memory and with datastores of random keys, next to one without a memory."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from modeling_cosup import KNNMemory, MemoryConfig, MLPMemory

from measuring import Arm, spread
from random_world import World


def random_datastore(count: int, key_size: int, vocab_size: int, fingerprint: Any = "random") -> KNNMemory:
    """Return a datastore of random keys around 1,000 centres, in half precision."""
    centres = torch.randn(1000, key_size)
    keys = torch.empty(count, key_size, dtype=torch.float16)
    for part in keys.split(65536):
        part.copy_(centres[torch.randint(0, 1000, (len(part),))] + torch.randn(len(part), key_size))
    values = torch.randint(0, vocab_size, (count,))
    return KNNMemory.from_tensors(keys, values, fingerprint=fingerprint, vocab_size=vocab_size)


def decoding_with_memories(world: World, rows: int, sizes: Sequence[int], k: int) -> dict[str, Callable[[], Any]]:
    """
    Return functions that generate the same number of tokens, by the name of the arm: "no memory" is the first.

    Args:
        world (`World`): on a GPU, the memories are copied there too.
        rows (`int`): rows of the batch.
        sizes (`Sequence[int]`): keys of the datastores; the keys are as wide as Gen's states, in float16.
        k (`int`): neighbours of a state.
    """
    model = world.model
    width, vocab_size = model.gen.config.hidden_size, model.get_output_embeddings().weight.shape[0]
    memories: dict[str, Any] = {"no memory": None, "MLPMemory": MLPMemory.from_gen(model)}
    for size in sizes:
        datastore = random_datastore(size, width, vocab_size, model.memory_fingerprint())
        if world.device.type != "cpu":
            datastore.to(world.device)
        memories[f"KNNMemory of {size:,}"] = datastore
    prompts = world.prompts(rows)
    config = MemoryConfig(k=k)
    calls: dict[str, Callable[[], Any]] = {}
    for name, token_memory in memories.items():
        options = {} if token_memory is None else {"memory": token_memory, "memory_config": config}
        calls[name] = partial(world.generate, model, prompts, **options)
    return calls


def step_costs(arms: dict[str, Arm], new_tokens: int) -> list[dict[str, Any]]:
    """Return seconds per decided token, the ratio to the arm "no memory", and the peak memory in bytes of each arm."""
    results = []
    for name, arm in arms.items():
        steps = spread([seconds / new_tokens for seconds in arm.seconds])
        costs = spread([1 / ratio for ratio in arm.ratios(arms["no memory"])])
        results.append({"arm": name, "seconds_per_step": steps, "cost": costs, "peak": arm.peak})
    return results
