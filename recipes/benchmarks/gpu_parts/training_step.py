"""
One training step of a small model without a Trainer, which needs packages that a bare machine lacks.

The loss is L_NTP + λ·L_NSP (Eq. 5), with the collator, the forward and the GradCache passes that `CoSupTrainer` uses.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from modeling_cosup import CoSupForCausalLM, CoSupOutput, info_nce
from trainer.batching import CoSupDataCollator
from trainer.grad_cache import concatenated, first_pass, like_pieces, second_pass
from trainer.micro_batches import forward_arguments
from trainer.tokenizing import tokenize_instance

from gpu_parts.comparing import Comparisons, relative_error
from gpu_parts.small_world import SmallWorld

EXACT = 1e-5  # of loss and gradients, relative, in float32, unless rounding alone is larger
LOSS_FLOOR = 5e-3  # least bounds in bfloat16
GRADIENT_FLOOR = 2e-2

Forward = Callable[..., CoSupOutput]


@dataclass
class Step:
    """The loss and the gradients of a step, in float32 and by parameter name."""

    loss: float
    gradients: dict[str, torch.Tensor]


@dataclass
class Batch:
    """A collated batch on the device: micro-batches, the row of each query's passage, and the number of labels."""

    micro_batches: list[dict[str, Any]]
    passage_labels: torch.Tensor
    num_labels: int


def make_batch(world: SmallWorld, **options: Any) -> Batch:
    """
    Return a batch of all instances of a small world.

    Args:
        world ([`SmallWorld`]): model and instances.
        **options: of [`~trainer.batching.CoSupDataCollator`]; by default all instances are one padded micro-batch.
    """
    model = world.model
    rows = []
    for instance in world.instances(6 if world.tiny else 32):
        rows.append(tokenize_instance(instance, model.tokenizer, model.emb_seq_tokenizer, model.config))
    collator = CoSupDataCollator(world.pad_id, world.pad_id, world.config.nsp_token_id, **options)
    batch = collator(rows)
    assert isinstance(batch, dict)
    micro_batches = [on_device(micro_batch, world.device) for micro_batch in batch["micro_batches"]]
    return Batch(micro_batches, batch["passage_labels"].to(world.device), batch["facts"].num_labels)


def on_device(micro_batch: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """Return a micro-batch, whose `first_pass` is a dictionary too, on a device."""
    moved = {}
    for name, value in micro_batch.items():
        moved[name] = on_device(value, device) if isinstance(value, dict) else value.to(device)
    return moved


def plain_step(model: CoSupForCausalLM, batch: Batch, dtype: torch.dtype, forward: Forward | None = None) -> Step:
    """
    Run forward and backward of a batch at once.

    Args:
        model ([`CoSupForCausalLM`]): with float32 weights.
        batch ([`Batch`]): what it reads.
        dtype (`torch.dtype`): bfloat16 computes under autocast.
        forward (`Callable`, *optional*): takes the place of the model's own, e.g. that of a wrapper.
    """
    model.zero_grad()
    model.train()
    with autocast(model, dtype):
        outputs = []
        for micro_batch in batch.micro_batches:
            outputs.append(forward_of(forward or model, micro_batch))
        token_loss = torch.stack([output.ntp_loss for output in outputs]).sum() / batch.num_labels
        queries = concatenated([output.query_embeds for output in outputs])
        passages = concatenated([output.passage_embeds for output in outputs])
        loss = token_loss + nsp_loss(model, queries, passages, batch)
    loss.backward()
    return finished(model, float(loss.detach()))


def cached_step(model: CoSupForCausalLM, batch: Batch, dtype: torch.dtype) -> Step:
    """Run the two passes of GradCache over the micro-batches of a batch; the arguments are those of [`plain_step`]."""
    model.zero_grad()
    model.train()
    with autocast(model, dtype):
        query_pieces, passage_pieces, states = first_pass(model, batch.micro_batches)
        queries, passages = concatenated(query_pieces), concatenated(passage_pieces)
        assert queries is not None and passages is not None
        embeds = [queries.requires_grad_(), passages.requires_grad_()]
        loss = nsp_loss(model, *embeds, batch)
        gradients = torch.autograd.grad(loss, embeds)
    pieces = [like_pieces(gradients[0], query_pieces), like_pieces(gradients[1], passage_pieces)]
    total = float(loss.detach())
    forward = partial(forward_of, model)
    passes = second_pass(forward, batch.micro_batches, *pieces, states, queries.device)
    for _ in batch.micro_batches:
        with autocast(model, dtype):
            output, inner_product = next(passes)  # runs the forward
            token_loss = output.ntp_loss / batch.num_labels
        (token_loss + inner_product).backward()
        total += float(token_loss.detach())
    return finished(model, total)


def autocast(model: CoSupForCausalLM, dtype: torch.dtype) -> torch.autocast:
    """Return the context of a forward in a dtype, over float32 weights."""
    return torch.autocast(model.device.type, torch.bfloat16, enabled=dtype == torch.bfloat16)


def forward_of(forward: Forward, micro_batch: dict[str, Any]) -> CoSupOutput:
    """Run a micro-batch; its NTP loss is a sum over tokens, and the NSP loss is left to the caller."""
    options = {"num_items_in_batch": 1, "compute_nsp_loss": False, "use_cache": False, "return_logits": False}
    return forward(**forward_arguments(micro_batch), **options)


def nsp_loss(model: CoSupForCausalLM, queries: Any, passages: Any, batch: Batch) -> torch.Tensor:
    """Return λ·L_NSP, the mean over the queries of a batch."""
    losses = info_nce(queries, passages, batch.passage_labels, temperature=model.config.temperature)
    assert isinstance(losses, torch.Tensor)
    return model.config.nsp_loss_weight * losses.mean()


def finished(model: torch.nn.Module, loss: float) -> Step:
    """Return a step with copies of the gradients, and free the model's own. Sharded gradients are gathered."""
    gradients = {}
    for name, parameter in model.named_parameters():
        if parameter.grad is None:
            continue
        gradient = parameter.grad
        if hasattr(gradient, "full_tensor"):
            gradient = gradient.full_tensor()
        gradients[name] = gradient.detach().float().clone()
    model.zero_grad()
    return Step(loss, gradients)


@dataclass
class References:
    """
    The plain padded step, with which other ways to take the same step are compared.

    Args:
        exact ([`Step`]): in float32.
        half ([`Step`]): in bfloat16.
        rounding (`float`): relative distance of the gradients in float32 to those in float64. Another order of the
            same sums, as of another kernel, may be as far away without a fault.
    """

    exact: Step
    half: Step
    rounding: float

    @property
    def gradient_bound(self) -> float:
        """The largest relative error of gradients in float32."""
        return max(EXACT, 2 * self.rounding)

    def compare(self, comparisons: Comparisons, what: str, dtype: torch.dtype, step: Step) -> None:
        """Add the errors of loss and gradients of a step to the comparisons of a check."""
        loss_error = abs(step.loss - self.exact.loss) / abs(self.exact.loss)
        gradient_error = relative_error(step.gradients, self.exact.gradients)
        if dtype == torch.float32:
            comparisons.add(f"{what}: loss", dtype, loss_error, EXACT)
            comparisons.add(f"{what}: gradients", dtype, gradient_error, self.gradient_bound)
            return
        own_loss_error = abs(self.half.loss - self.exact.loss) / abs(self.exact.loss)
        own_gradient_error = relative_error(self.half.gradients, self.exact.gradients)
        comparisons.add_half(f"{what}: loss", loss_error, own_loss_error, LOSS_FLOOR)
        comparisons.add_half(f"{what}: gradients", gradient_error, own_gradient_error, GRADIENT_FLOOR)


def references(world: SmallWorld) -> References:
    """Return the plain padded step of a world in both dtypes, and how far float32 is from float64."""
    batch = make_batch(world)
    exact, half = (plain_step(world.model, batch, dtype) for dtype in (torch.float32, torch.bfloat16))
    double = plain_step(copy.deepcopy(world.model).double(), batch, torch.float64)
    return References(exact, half, relative_error(exact.gradients, double.gradients))
