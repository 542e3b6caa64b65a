"""Arms of generate.py: the original's algorithm, retrieval with timed searches, and captured decoding."""

import contextlib
import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch._dynamo.utils import counters
from transformers import DynamicCache

from modeling_cosup import CoSupForCausalLM, PassageIndex

from measuring import Clock, TimedIndex
from random_world import World

try:
    import faiss
except ImportError:
    faiss = None

# a question's own index: what a result says about it
CANDIDATE_SEARCH = "faiss.IndexFlatIP" if faiss else "a product in torch on the CPU, because faiss is not installed"


def candidate_search(embeds: np.ndarray) -> Callable[[np.ndarray], int]:
    """
    Make an index for a question, as the original does, and return its search.

    Args:
        embeds (`np.ndarray` of shape `(C, h)`): the embeddings of the candidates, float32.

    Returns:
        `Callable`: takes a query `(1, h)` in float32, returns the number of the nearest candidate by inner product.
    """
    if faiss is None:
        candidates = torch.from_numpy(embeds)
        return lambda query: int((candidates @ torch.from_numpy(query)[0]).argmax())
    index = faiss.IndexFlatIP(embeds.shape[1])
    index.add(embeds)
    return lambda query: int(index.search(query, 1)[1][0, 0])


@torch.no_grad()
def original_generate(
    world: World, prompt: list[int], plan: list[int], pool: list[dict[str, Any]], embeds: np.ndarray
) -> list[int]:
    """
    Write one row by the original's algorithm.

    It has an ordinary KV cache, which it discards at every passage and every `[CE]`, and an index of its own for this
    row.

    Args:
        world (`World`): the model and its settings.
        prompt (`list[int]`): token ids of the prompt.
        plan (`list[int]`): the token id to force at each step; -1 forces nothing.
        pool (`list[dict]`): the candidates of the row.
        embeds (`np.ndarray` of shape `(C, h)`): the embeddings of the candidates, computed in advance.

    Returns:
        `list[int]`: the written token ids.
    """
    gen = world.model.gen
    config = world.config
    search = candidate_search(embeds)

    def read(tokens: list[int], cache: DynamicCache) -> torch.Tensor:
        input_ids = torch.tensor([tokens], device=world.device)
        output = gen.base_model(input_ids, past_key_values=cache, use_cache=True)
        return output.last_hidden_state[:, -1]  # (1, h)

    ids = list(prompt)
    unread = list(prompt)
    cache = DynamicCache()
    for token in plan:
        hidden = read(unread, cache)
        if ids[-1] == config.nsp_token_id:
            # The query embedding is not normalized: its length does not change the order of inner products.
            passage = pool[search(hidden.float().cpu().numpy())]
            ids += [*passage["input_ids"], config.cs_token_id]
            cache = DynamicCache()
            hidden = read(ids, cache)
        if token < 0:
            logits = gen.get_output_embeddings()(hidden)
            logits[:, world.options["suppress_tokens"]] = float("-inf")
            token = int(logits.argmax())
        ids.append(token)
        unread = [token]
        if token == config.ce_token_id:
            unread = list(ids)
            cache = DynamicCache()
    return ids[len(prompt) :]


def timed_retrieve(
    world: World,
    model: CoSupForCausalLM,
    prompts: list[list[int]],
    index: PassageIndex,
    time_reading: bool = False,
    **kwargs: Any,
) -> tuple[list[list[int]], dict[str, float]]:
    """
    Return the tokens of each row, and the seconds of searching and, with `time_reading`, of reading the passages.

    Reading cannot be timed in a captured arm, because the hooks of the clock would be captured too.
    """
    clock = Clock(world.device)
    reading = clock.time_reading(world.model.gen) if time_reading else contextlib.nullcontext()
    with reading:
        rows = world.retrieve(model, prompts, TimedIndex(index, clock), **kwargs)
    return rows, clock.seconds


def captured_view(model: CoSupForCausalLM) -> CoSupForCausalLM:
    """Return a view of the model: the same weights, and a captured cache that no other arm has made larger."""
    torch._dynamo.reset()  # otherwise shapes that differ from the last batch size would become dynamic
    counters.clear()
    return copy.copy(model)


def print_captures() -> dict[str, int]:
    """Print and return what torch.compile captured in all arms of one batch size, to reveal steps that stay eager."""
    captures = {
        "graphs": counters["stats"]["unique_graphs"],
        "graph_breaks": sum(counters["graph_break"].values()),
        "cuda_graphs_skipped": counters["inductor"]["cudagraph_skips"],
    }
    print(f"  captured: {captures}", flush=True)
    return captures
