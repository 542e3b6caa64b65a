"""Checks of generation: a batch equals its rows, with a captured step, behind an engine and with a token memory."""

import asyncio
import copy
from dataclasses import replace
from typing import Any

import torch
from transformers import CompileConfig, LogitsProcessorList

from modeling_cosup import KNNMemory, MemoryConfig, MLPMemory, PassageIndex, RetrievalConfig
from modeling_cosup.memory_cosup import Memory, mix
from modeling_cosup.token_keys_cosup import document_ids, token_states

from gpu_parts.comparing import Comparisons, share_of_other_tokens
from gpu_parts.runner import Context
from gpu_parts.small_world import SmallWorld
from random_world import Forced

ROUNDED = 1e-6  # what float32 may lose in a sum of probabilities


def generate_rows(context: Context) -> dict[str, Any]:
    """A batch that retrieves equals each row alone, and a recompute of the whole prefix without a cache."""
    comparisons = Comparisons()
    for dtype in context.dtypes:
        world = SmallWorld(context, dtype)
        index = world.index(world.num_passages)
        prompts = world.prompts(world.num_rows)
        batch = world.retrieve(world.model, prompts, index)
        alone = []
        recomputed = []
        for row, prompt in enumerate(prompts):
            alone.append(generate_alone(world, index, prompt, row, len(prompts)))
            recomputed.append(recompute(world, index, prompt, world.plan(len(prompts))[row].tolist()))
        bound = 0.0 if dtype == torch.float32 else None  # a rounding may change a token in half precision
        what = "share of other tokens: a batch and"
        comparisons.add(f"{what} each row alone", dtype, share_of_other_tokens(batch, alone), bound)
        comparisons.add(f"{what} a recompute without cache", dtype, share_of_other_tokens(batch, recomputed), bound)
    return comparisons.result(rows=len(prompts), new_tokens=world.script.new_tokens)


def generate_alone(world: SmallWorld, index: PassageIndex, prompt: list[int], row: int, rows: int) -> list[int]:
    """Return what one row of a batch writes when it is the only one."""
    processors = LogitsProcessorList([Forced(world.plan(rows)[row : row + 1])])
    settings = RetrievalConfig(max_retrievals=world.script.retrievals)
    options = {"retriever": index, "retrieval_config": settings, "logits_processor": processors}
    return world.generate(world.model, [prompt], **options)[0]


@torch.no_grad()
def recompute(world: SmallWorld, index: PassageIndex, prompt: list[int], plan: list[int]) -> list[int]:
    """
    Write one row the slow way: Gen forwards the whole prefix for every token.

    Args:
        world ([`SmallWorld`]), index ([`PassageIndex`]): model and passages.
        prompt (`list[int]`): token ids.
        plan (`list[int]`): the token id to force at each step; -1 forces nothing.

    Returns:
        `list[int]`: the written token ids, passages included.
    """
    gen = world.model.gen
    embeddings = index.embeddings.to(world.device, world.dtype).float()  # as the searched copy
    ids = list(prompt)
    for token in plan:
        hidden = gen.base_model(torch.tensor([ids], device=world.device), use_cache=False).last_hidden_state[0, -1]
        if ids[-1] == world.config.nsp_token_id:
            query = hidden.float() / hidden.float().norm()
            passage = index[int((embeddings @ query.to(world.dtype).float()).argmax())]
            ids += [*passage["input_ids"], world.config.cs_token_id]
            prefix = torch.tensor([ids], device=world.device)
            hidden = gen.base_model(prefix, use_cache=False).last_hidden_state[0, -1]
        if token < 0:
            logits = gen.get_output_embeddings()(hidden).float()
            logits[world.options["suppress_tokens"]] = float("-inf")
            token = int(logits.argmax())
        ids.append(token)
    return ids[len(prompt) :]


# ---------------------------------------------------------------------- a captured step


def captured_step(context: Context) -> dict[str, Any]:
    """A static cache and a captured step give the tokens of eager decoding, in one graph without a break."""
    from torch._dynamo.utils import counters

    comparisons = Comparisons()
    notes = []
    for dtype in context.dtypes[:1] if context.tiny else context.dtypes:
        world = SmallWorld(context, dtype)
        index = world.index(world.num_passages)
        prompts = world.prompts(world.num_rows)
        eager = world.retrieve(world.model, prompts, index)
        torch._dynamo.reset()
        counters.clear()
        view = copy.copy(world.model)  # a captured cache of its own
        options = {"cache_implementation": "static", **compile_options(context)}
        for turn in ("first", "second"):  # the second call uses the graphs of the first
            rows = world.retrieve(view, prompts, index, **options)
            share = share_of_other_tokens(rows, eager)
            bound = 0.0 if dtype == torch.float32 else None
            comparisons.add(f"share of other tokens: captured and eager, {turn} call", dtype, share, bound)
        graphs = counters["stats"]["unique_graphs"]
        comparisons.add_equal("one graph, a second one if the cache grew", dtype, graphs in (1, 2))
        comparisons.add("graph breaks", dtype, sum(counters["graph_break"].values()), 0)
        comparisons.add("CUDA graphs skipped", dtype, counters["inductor"]["cudagraph_skips"], 0)
        notes.append(f"{graphs} graphs")
        view.release_static_cache()
    return comparisons.result(notes=notes)


def compile_options(context: Context) -> dict[str, Any]:
    """Return options of generate() that make a CPU capture too, without a compiler; a GPU captures by default."""
    if context.device.type == "cuda":
        return {}
    compile_config = CompileConfig(backend="eager", mode=None)
    compile_config._compile_all_devices = True
    return {"compile_config": compile_config}


# ---------------------------------------------------------------------- an engine


def served_rows(context: Context) -> dict[str, Any]:
    """An answer of the embedded engine equals generate() of its prompt alone, whoever else is served."""
    from serving.engine import GenerationRequest

    comparisons = Comparisons()
    for dtype in context.dtypes:
        world = SmallWorld(context, dtype)
        index = world.index(world.num_passages)
        config = RetrievalConfig(force_nsp_first=True, max_retrievals=2)
        requests = []
        for number, prompt in enumerate(world.prompts(world.num_rows + 2)):
            requests.append(GenerationRequest(prompt, 4 + 3 * number, config))
        answers = asyncio.run(serve(world, index, requests))
        expected = []
        for request in requests:
            output = world.model.generate(
                torch.tensor([request.prompt_ids], device=world.device),
                retriever=index,
                retrieval_config=config,
                max_new_tokens=request.max_new_tokens,
                return_dict_in_generate=True,
            )
            expected.append(decided(output))
        bound = 0.0 if dtype == torch.float32 else None
        what = "share of other tokens and passages: served and generate() alone"
        comparisons.add(what, dtype, share_of_other_tokens(answers, expected), bound)
    return comparisons.result(requests=len(requests))


async def serve(world: SmallWorld, index: PassageIndex, requests: list[Any]) -> list[list[Any]]:
    """Return for each request its tokens, with the ids of passages in their places; all are served at once."""
    from serving.embedded_engine import EmbeddedEngine
    from serving.engine import RetrievalEvent, TokenEvent

    engine = EmbeddedEngine.in_thread(world.model, index, max_running=max(2, len(requests) // 2))

    async def answer(request: Any) -> list[Any]:
        items: list[Any] = []
        async for group in engine.generate(request):
            for event in group:
                if isinstance(event, TokenEvent):
                    items.append(event.token_id)
                elif isinstance(event, RetrievalEvent):
                    items.append(event.retrieval.passages[0]["id"])
        return items

    await engine.start()
    try:
        return await asyncio.gather(*[answer(request) for request in requests])
    finally:
        await engine.stop()


def decided(output: Any) -> list[Any]:
    """Return the tokens that the one row of an output decided, with the ids of passages in their places."""
    ids = output.sequences[0].tolist()
    items: list[Any] = []
    position = output.prompt_length
    for retrieval in output.retrievals[0]:
        items += [*ids[position : retrieval.position], retrieval.passages[0]["id"]]
        position = retrieval.grounded_span[0]
    return items + ids[position:]


# ---------------------------------------------------------------------- token memories


def memories(context: Context) -> dict[str, Any]:
    """A mixture sums to 1 and keeps control tokens; a weight of 0 is no memory; a batch equals its rows."""
    comparisons = Comparisons()
    for dtype in context.dtypes:
        world = SmallWorld(context, dtype)
        prompts = world.prompts(world.num_rows)
        plain = world.generate(world.model, prompts)
        for memory in (knn_memory(world), mlp_memory(world)):
            kind = type(memory).__name__
            error, kept_error = mixture_errors(world, memory, prompts)
            comparisons.add(f"{kind}: sum of the mixture, to 1", dtype, error, ROUNDED)
            comparisons.add(f"{kind}: probabilities of control tokens, to Gen's", dtype, kept_error, ROUNDED)
            without = {"memory": memory, "memory_config": replace(memory.memory_config, weight=0.0)}
            share = share_of_other_tokens(world.generate(world.model, prompts, **without), plain)
            bound = 0.0 if dtype == torch.float32 else None
            comparisons.add(f"{kind}: share of other tokens with weight 0", dtype, share, bound)
            batch = world.generate(world.model, prompts, memory=memory)
            alone = [world.generate(world.model, [prompt], memory=memory)[0] for prompt in prompts]
            what = f"{kind}: share of other tokens: a batch and each row alone"
            comparisons.add(what, dtype, share_of_other_tokens(batch, alone), bound)
            comparisons.add_equal(f"{kind} changes some token", dtype, share_of_other_tokens(batch, plain) > 0)
    return comparisons.result()


@torch.no_grad()
def mixture_errors(world: SmallWorld, memory: Memory, prompts: list[list[int]]) -> tuple[float, float]:
    """Return how far mixtures are from a sum of 1, and their kept probabilities from Gen's, at most."""
    config = world.config
    kept = [config.nsp_token_id, config.cs_token_id, config.ce_token_id, world.end_id]
    kept_ids = torch.tensor(sorted(kept), device=world.device)
    sum_error, kept_error = 0.0, 0.0
    for prompt in prompts:
        ids = torch.tensor([prompt], device=world.device)
        output = world.model(ids, output_states=memory.states, use_cache=False)
        lm = output.logits[:, -1].float().log_softmax(-1)  # (1, V)
        spoken = memory.log_probs(output.states or {}, memory.memory_config)
        mixture = mix(lm, spoken.to(lm.device), memory.memory_config.weight, kept_ids).double().exp()
        sum_error = max(sum_error, float((mixture.sum() - 1).abs()))
        kept_error = max(kept_error, float((mixture - lm.double().exp())[:, kept_ids].abs().max()))
    return sum_error, kept_error


def knn_memory(world: SmallWorld) -> KNNMemory:
    """Return a datastore of some passages, on the world's device."""
    model = world.model
    documents = [document_ids(passage["text"], model.tokenizer) for passage in world.passages(4)]
    (states,) = token_states(model, documents, max_length=64, stride=32, batch_size=4)
    memory = KNNMemory.from_tensors(
        states.keys,
        states.values,
        fingerprint=model.memory_fingerprint(),
        vocab_size=model.get_output_embeddings().weight.shape[0],
        dtype="float32",
        memory_config=MemoryConfig(weight=0.7, k=8, temperature=20.0),
    )
    return memory.to(world.device)


def mlp_memory(world: SmallWorld) -> MLPMemory:
    """Return a memory with random weights, on the world's device."""
    memory = MLPMemory.from_gen(world.model, intermediate_size=64, memory_config=MemoryConfig(weight=0.7))
    with torch.no_grad():
        memory.lm_head.weight.normal_(std=0.7)
    return memory.to(world.device)
