"""
GradCache (Gao et al., arXiv 2101.06983) for two supervisions: an NSP batch of any size in the memory of one
micro-batch, with the same gradients.

1. First pass: run every micro-batch without a graph, for its embeddings alone.
2. Compute the embedding losses (NSP) over all of them, and the gradient of each embedding.
3. Second pass: run every micro-batch again, with a graph. The sum of its token losses (NTP) and the inner product of
   its embeddings with their gradients has the gradient of the whole loss.

Gen is causal, so the first pass reads its rows only up to their last `[NSP]`. If dropout is active, both passes read
whole rows, and the second pass draws the same random numbers as the first.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from modeling_cosup import CoSupOutput

from .micro_batches import forward_arguments

OptionalTensors = list[torch.Tensor | None]  # one for each micro-batch; None if it has no such rows


class RandomState:
    """The current state of the random number generators of the CPU and of `device`."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.cpu = torch.get_rng_state()
        self.accelerator = None if device.type == "cpu" else torch.get_device_module(device).get_rng_state(device)

    def restore(self) -> None:
        torch.set_rng_state(self.cpu)
        if self.accelerator is not None:
            torch.get_device_module(self.device).set_rng_state(self.accelerator, self.device)


def has_dropout(model: nn.Module) -> bool:
    """Return whether a forward in training mode draws random numbers."""
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd) and module.p > 0:
            return True
        to_dict = getattr(getattr(module, "config", None), "to_dict", None)
        if to_dict is not None and _sets_dropout(to_dict()):  # attention_dropout is a setting, not a module
            return True
    return False


def _sets_dropout(config: Mapping[str, Any]) -> bool:
    """Return whether a model's config turns dropout or router jitter on."""
    for name, value in config.items():
        if ("drop" in name or "jitter" in name) and isinstance(value, float) and value > 0:
            return True
    return False


def first_pass(
    model: Callable[..., CoSupOutput], micro_batches: Sequence[dict[str, Any]]
) -> tuple[OptionalTensors, OptionalTensors, list[RandomState]]:
    """
    Compute the embeddings of all micro-batches without a graph.

    Args:
        model (`Callable`): the (wrapped) model.
        micro_batches (`list[dict]`): as [`CoSupDataCollator`] cuts them. If one has `first_pass`, Gen reads that
            instead of its rows; if `first_pass` is empty, Gen reads nothing.

    Returns:
        `(list, list, list)`: query embeddings `(N_i, h)` and passage embeddings `(M_i, h)` of each micro-batch, `None`
        if it has none; and the [`RandomState`] before each micro-batch and after the last one.
    """
    query_embeds: OptionalTensors = []
    passage_embeds: OptionalTensors = []
    states = []
    device = next(tensor.device for tensor in micro_batches[0].values() if isinstance(tensor, torch.Tensor))
    with torch.no_grad():
        for micro_batch in micro_batches:
            states.append(RandomState(device))
            inputs = {name: tensor for name, tensor in micro_batch.items() if name.startswith(("passage_", "query_"))}
            gen_inputs = micro_batch.get("first_pass", micro_batch)
            for name in ("input_ids", "position_ids", "nsp_positions"):
                if name in gen_inputs:
                    inputs[name] = gen_inputs[name]
            options = {
                "compute_nsp_loss": False,
                "return_logits": False,
                "output_query_embeds": "nsp_positions" in inputs,
            }
            outputs = model(**forward_arguments(inputs), use_cache=False, **options)
            query_embeds.append(outputs.query_embeds)
            passage_embeds.append(outputs.passage_embeds)
    states.append(RandomState(device))
    return query_embeds, passage_embeds, states


def second_pass(
    forward: Callable[[dict[str, Any]], CoSupOutput],
    micro_batches: Sequence[dict[str, Any]],
    query_gradients: OptionalTensors,
    passage_gradients: OptionalTensors,
    states: Sequence[RandomState] | None,
    device: torch.device,
) -> Iterator[tuple[CoSupOutput, torch.Tensor]]:
    """
    Run every micro-batch again, with a graph.

    Args:
        forward (`Callable`): takes a micro-batch, returns a `CoSupOutput`.
        micro_batches (`list[dict]`): as in the first pass.
        query_gradients, passage_gradients (`list[torch.Tensor | None]`): gradients of the embedding losses with
            respect to the embeddings that [`first_pass`] returned.
        states (`list[RandomState]`, *optional*): what [`first_pass`] returned; `None` without a first pass.
        device (`torch.device`): of the inner products.

    Yields:
        `(CoSupOutput, torch.FloatTensor)`: the output of a micro-batch, and the inner product of its embeddings with
        their gradients. This scalar has the same gradient as the embedding losses. Call backward on both before
        taking the next pair.
    """
    for i, micro_batch in enumerate(micro_batches):
        if states is not None:
            states[i].restore()
        outputs = forward(micro_batch)
        inner_product = torch.zeros((), device=device)
        for embeds, gradient in (
            (outputs.query_embeds, query_gradients[i]),
            (outputs.passage_embeds, passage_gradients[i]),
        ):
            if embeds is not None and gradient is not None:
                inner_product = inner_product + (embeds * gradient).sum()
        yield outputs, inner_product
    if states is not None:
        states[-1].restore()


def concatenated(pieces: Sequence[torch.Tensor | None]) -> torch.Tensor | None:
    """Return the tensors among `pieces`, concatenated; `None` if there are none."""
    tensors = [piece for piece in pieces if piece is not None]
    return torch.cat(tensors) if tensors else None


def like_pieces(tensor: torch.Tensor, pieces: Sequence[torch.Tensor | None]) -> OptionalTensors:
    """Return `tensor` cut into the pieces that [`concatenated`] joined, with `None` in the same places."""
    sizes = [0 if piece is None else len(piece) for piece in pieces]
    cut_tensors = tensor.split(sizes)
    return [None if piece is None else cut for piece, cut in zip(pieces, cut_tensors, strict=True)]
