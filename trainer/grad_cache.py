"""
GradCache (Gao et al., arXiv 2101.06983) for two supervisions: an NSP batch of any size in the memory of one
micro-batch, with the same gradients.

First pass: every micro-batch without a graph, for its embeddings alone. Then the embedding losses (NSP) over all of
them, and the gradient of each embedding. Second pass: every micro-batch again, with a graph; its own token losses
(NTP) plus the inner product of its embeddings with their gradients has the gradient of the whole loss. Gen is causal,
so the first pass reads its rows only up to their last `[NSP]`; where dropout is active both passes read all of them,
and the second sees the random numbers of the first.
"""

import torch
from torch import nn

from .batching import forward_arguments


class RandomState:
    """The random number generators of the CPU and of `device` as they are now."""

    def __init__(self, device):
        self.device = device
        self.cpu = torch.get_rng_state()
        self.accelerator = None if device.type == "cpu" else torch.get_device_module(device).get_rng_state(device)

    def restore(self):
        torch.set_rng_state(self.cpu)
        if self.accelerator is not None:
            torch.get_device_module(self.device).set_rng_state(self.accelerator, self.device)


def has_dropout(model):
    """Whether a forward in training mode draws random numbers."""
    if any(isinstance(module, nn.modules.dropout._DropoutNd) and module.p > 0 for module in model.modules()):
        return True
    configs = [
        module.config.to_dict()
        for module in model.modules()
        if hasattr(module, "config") and hasattr(module.config, "to_dict")
    ]
    values = [
        value for config in configs for name, value in config.items() if "drop" in name or "jitter" in name
    ]  # attention_dropout is no module
    return any(isinstance(value, float) and value > 0 for value in values)


def first_pass(model, micro_batches):
    """
    The embeddings of all micro-batches, without a graph.

    Args:
        model (`Callable`): the (wrapped) model.
        micro_batches (`list[dict]`): as [`CoSupDataCollator`] cuts them; where one has `first_pass`, Gen reads that in
            place of its rows, or nothing.

    Returns:
        `(list, list, list)`: query embeddings `(N_i, h)` and passage embeddings `(M_i, h)` of each micro-batch, `None`
        where it has no such part, and the [`RandomState`] before each micro-batch and, last, after them all.
    """
    query_embeds, passage_embeds, states = [], [], []
    device = next(tensor.device for tensor in micro_batches[0].values() if isinstance(tensor, torch.Tensor))
    with torch.no_grad():
        for micro_batch in micro_batches:
            states.append(RandomState(device))
            inputs = {name: tensor for name, tensor in micro_batch.items() if name.startswith(("passage_", "query_"))}
            rows = micro_batch.get("first_pass", micro_batch)
            inputs |= {name: rows[name] for name in ("input_ids", "position_ids", "nsp_positions") if name in rows}
            outputs = model(**forward_arguments(inputs), use_cache=False, compute_nsp_loss=False, return_logits=False)
            query_embeds.append(outputs.query_embeds)
            passage_embeds.append(outputs.passage_embeds)
    states.append(RandomState(device))
    return query_embeds, passage_embeds, states


def second_pass(forward, micro_batches, query_gradients, passage_gradients, states, device):
    """
    Every micro-batch again, with a graph.

    Args:
        forward (`Callable`): takes a micro-batch, returns a `CoSupOutput`.
        micro_batches (`list[dict]`): as in the first pass.
        query_gradients, passage_gradients (`list[torch.Tensor]`): of the embedding losses with respect to what
            [`first_pass`] returned; `None` where it did.
        states (`list[RandomState]`, *optional*): likewise; without a first pass none.
        device (`torch.device`): of the inner products.

    Yields:
        `(CoSupOutput, torch.FloatTensor)`: the output of a micro-batch, and the inner product of its embeddings with
        their gradients, a scalar that has the gradient of the embedding losses. Both must be differentiated before the
        next pair is asked for.
    """
    for i, micro_batch in enumerate(micro_batches):
        if states is not None:
            states[i].restore()
        outputs, inner_product = forward(micro_batch), torch.zeros((), device=device)
        for embeds, gradient in (
            (outputs.query_embeds, query_gradients[i]),
            (outputs.passage_embeds, passage_gradients[i]),
        ):
            if embeds is not None and gradient is not None:
                inner_product = inner_product + (embeds * gradient).sum()
        yield outputs, inner_product
    if states is not None:
        states[-1].restore()


def concatenated(pieces):
    """The tensors among `pieces` as one; `None` where there is none."""
    tensors = [piece for piece in pieces if piece is not None]
    return torch.cat(tensors) if tensors else None


def like_pieces(tensor, pieces):
    """`tensor` cut into the pieces that [`concatenated`] joined; `None` where they are."""
    sizes = [0 if piece is None else len(piece) for piece in pieces]
    return [None if piece is None else part for piece, part in zip(pieces, tensor.split(sizes), strict=True)]
