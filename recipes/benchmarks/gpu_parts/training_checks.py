"""Checks of a training step: packed rows, GradCache, compiled layers, isolated queries, wrappers of one rank, LoRA."""

import contextlib
import os
import socket
from collections.abc import Iterator
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers.utils import is_flash_attn_2_available

from trainer.isolation import isolated_forward
from trainer.model_setup import speed_up, wrap_in_peft

from gpu_parts.comparing import Comparisons, largest_difference, relative_error
from gpu_parts.runner import Context, Skip
from gpu_parts.small_world import SmallWorld
from gpu_parts.training_step import (
    EXACT,
    cached_step,
    make_batch,
    plain_step,
    references,
)

PACKED = {"padding_free": True, "padding_free_passages": True}
FLASH = "flash_attention_2"


def packed_rows(context: Context, implementation: str) -> dict[str, Any]:
    """Rows without padding give the loss and the gradients of padded rows, with an attention implementation."""
    world = SmallWorld(context)
    expected = references(world)  # with SDPA
    comparisons = Comparisons()
    for part in (world.model.gen, world.model.emb_seq):
        part.set_attn_implementation(implementation)
    batch = make_batch(world, **PACKED)
    # flash kernels have no float32
    for dtype in context.dtypes[1:] if implementation == FLASH else context.dtypes:
        step = plain_step(world.model, batch, dtype)
        expected.compare(comparisons, f"packed rows with {implementation}, padded with sdpa", dtype, step)
    return comparisons.result()


def packed_flash(context: Context) -> dict[str, Any]:
    """[`packed_rows`] with flash attention, of flash-attn or of a kernel from the Hub that is in the cache."""
    if not is_flash_attn_2_available():
        try:
            SmallWorld(context).model.gen.set_attn_implementation(FLASH)
        except (ImportError, OSError, ValueError) as error:
            raise Skip(f"flash_attn is not installed, and no kernel was found: {str(error).splitlines()[0]}") from None
    return packed_rows(context, FLASH)


def grad_cache(context: Context) -> dict[str, Any]:
    """The two passes of GradCache over many micro-batches give the loss and the gradients of one big step."""
    world = SmallWorld(context)
    expected = references(world)
    comparisons = Comparisons()
    for layout, options in (("padded", {}), ("packed", PACKED)):
        batch = make_batch(world, max_instances=2, shorten_first_pass=True, **options)
        for dtype in context.dtypes:
            step = cached_step(world.model, batch, dtype)
            what = f"{len(batch.micro_batches)} {layout} micro-batches, one step"
            expected.compare(comparisons, what, dtype, step)
    return comparisons.result()


def compiled_step(context: Context) -> dict[str, Any]:
    """Compiled layers (`torch_compile`) give the loss and the gradients of eager ones."""
    world = SmallWorld(context)
    expected = references(world)
    comparisons = Comparisons()
    backend = "inductor" if context.device.type == "cuda" else "eager"  # a CPU may have no compiler
    options = {"use_liger_kernel": False, "torch_compile": True}
    args: Any = SimpleNamespace(**options, torch_compile_backend=backend, torch_compile_mode=None)
    speed_up(world.model, args)
    batch = make_batch(world)
    for dtype in context.dtypes[:1] if context.tiny else context.dtypes:
        expected.compare(comparisons, "compiled layers, eager", dtype, plain_step(world.model, batch, dtype))
    return comparisons.result(backend=backend)


def isolated_queries(context: Context) -> dict[str, Any]:
    """With `isolate_queries` the loss stays, and no gradient of the NTP loss reaches the states at `[NSP]`."""
    world = SmallWorld(context)  # untied: the row of [NSP] gets its gradient through the state there alone
    model = world.model
    model.config.nsp_loss_weight = 0.0
    embedding = "gen.model.embed_tokens.weight"
    row = world.config.nsp_token_id
    batch = make_batch(world)
    gradient_bound = references(world).gradient_bound
    forward = partial(isolated, model)
    comparisons = Comparisons()
    reference = None
    for dtype in context.dtypes:
        for implementation in ("sdpa", "eager"):
            model.gen.set_attn_implementation(implementation)
            plain = plain_step(model, batch, dtype)
            step = plain_step(model, batch, dtype, forward)
            what = f"isolate_queries with {implementation}"
            bound = EXACT if dtype == torch.float32 else 5e-3
            comparisons.add(f"{what}: loss, without", dtype, abs(step.loss - plain.loss) / plain.loss, bound)
            kept = float(step.gradients[embedding][row].norm() / plain.gradients[embedding][row].norm())
            comparisons.add(f"{what}: gradient at [NSP], share of that without", dtype, kept, 0.0)
            if reference is None:
                reference = step.gradients
                continue
            error = relative_error(step.gradients, reference)
            bound = gradient_bound if dtype == torch.float32 else None
            comparisons.add(f"{what}: gradients, sdpa in float32", dtype, error, bound)
    return comparisons.result()


def isolated(model: Any, **arguments: Any) -> Any:
    """Run a forward in which no gradient of another token reaches the states at `[NSP]`."""
    return isolated_forward(model, model, arguments)


# ---------------------------------------------------------------------- one rank


@contextlib.contextmanager
def one_rank(device: torch.device) -> Iterator[None]:
    """Make this process a process group of one rank: NCCL on a GPU, Gloo on a CPU."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


def ddp_one_rank(context: Context) -> dict[str, Any]:
    """A model in DDP on one rank has the loss and the gradients of the model alone."""
    world = SmallWorld(context)
    expected = references(world)
    comparisons = Comparisons()
    batch = make_batch(world)
    with one_rank(context.device):
        options: dict[str, Any] = {"find_unused_parameters": False, "broadcast_buffers": False}
        if context.device.type == "cuda":
            options["device_ids"] = [torch.cuda.current_device()]
        wrapped = DistributedDataParallel(world.model, **options)
        for dtype in context.dtypes:
            step = plain_step(world.model, batch, dtype, wrapped)
            expected.compare(comparisons, "DDP of one rank, no DDP", dtype, step)
        del wrapped
    return comparisons.result()


def fsdp2_one_rank(context: Context) -> dict[str, Any]:
    """A model in FSDP2 on one rank, layers and root sharded, has the loss and the gradients of the model alone."""
    world = SmallWorld(context)
    expected = references(world)
    comparisons = Comparisons()
    batch = make_batch(world)
    with one_rank(context.device):
        mesh = init_device_mesh(context.device.type, (1,))
        for part in (world.model.gen.model, world.model.emb_seq):
            for layer in part.layers:
                fully_shard(layer, mesh=mesh)
        fully_shard(world.model, mesh=mesh)
        for dtype in context.dtypes:
            step = plain_step(world.model, batch, dtype)
            expected.compare(comparisons, "FSDP2 of one rank, no FSDP2", dtype, step)
    return comparisons.result()


# ---------------------------------------------------------------------- adapters


def lora_step(context: Context) -> dict[str, Any]:
    """One step of LoRA lowers the loss, changes no frozen weight, and merges into the same logits."""
    from peft import LoraConfig

    world = SmallWorld(context)
    batch = make_batch(world)
    comparisons = Comparisons()
    dtype = torch.float32
    before = plain_step(world.model, batch, dtype).loss
    frozen = world.model.gen.model.layers[0].self_attn.q_proj.weight.detach().clone()
    config = LoraConfig(r=8, task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"])
    wrapped: nn.Module = wrap_in_peft(world.model, config)
    base: Any = world.model
    start = plain_step(base, batch, dtype, wrapped)
    comparisons.add("fresh adapters: loss, without", dtype, abs(start.loss - before) / before, EXACT)
    trained = [parameter for parameter in wrapped.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3)
    named = dict(base.named_parameters())
    for name, gradient in start.gradients.items():
        named[name].grad = gradient.to(named[name].dtype)
    optimizer.step()
    after = plain_step(base, batch, dtype, wrapped)
    comparisons.add_equal("one step lowers the loss", dtype, after.loss < start.loss)
    layer = base.gen.model.layers[0].self_attn.q_proj
    comparisons.add_equal("frozen weights stay", dtype, torch.equal(layer.base_layer.weight, frozen))
    wrapped.eval()
    ids = torch.tensor(world.prompts(1), device=world.device)
    with torch.no_grad():
        adapted = wrapped(input_ids=ids).logits
        merged = wrapped.merge_and_unload()(input_ids=ids).logits
    error = largest_difference(merged, adapted) / float(adapted.abs().max())
    comparisons.add("merged adapters: logits, relative to the largest", dtype, error, EXACT)
    return comparisons.result(notes=[f"loss {start.loss:.4f} to {after.loss:.4f}"])
