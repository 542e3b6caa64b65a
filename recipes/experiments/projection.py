"""
The softmax bottleneck (arXiv 2311.09615, Eq. 2): can Gen's last layers express the distribution of a kNN-LM at all?

    z* = argmin over z of KL[f(z) || p],    p = (1 - w) p_LM + w p_kNN

f is the LM head, or f∘g with the last block g(z) = final_norm(z + FFN(norm(z))). If KL comes close to 0, it is not the
head's rank that keeps Gen from p.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from modeling_cosup.states_cosup import watch
from modeling_cosup.token_keys_cosup import ffn_name

# The norms around the FFN of a layer: before it, and on its output (`None` for none). An architecture fits the first
# pair whose modules it has; whether its last block is then g is checked on states of a real forward.
NORMS = (
    ("pre_feedforward_layernorm", "post_feedforward_layernorm"),
    ("post_attention_layernorm", None),
    ("ln_2", None),
    ("final_layer_norm", None),
)
FINAL_NORMS = ("norm", "ln_f", "final_layer_norm", "final_layernorm")
TOLERANCE = 1e-4  # relative difference between g(z) and Gen's last hidden state


class LastBlock:
    """
    The last block g(z) = final_norm(z + FFN(norm(z))) of a causal language model, for states z before the last FFN.

    Args:
        gen (`PreTrainedModel`): a causal language model; its weights are used where they are.

    Attributes:
        norm_name (`str`): full name of the norm before the last FFN; z is what enters it.

    Raises:
        `ValueError`: for an architecture that has no such norms, naming it.
    """

    def __init__(self, gen: Any) -> None:
        self.kind = gen.config.model_type
        name = ffn_name(gen)
        layer_name, _, _ = name.rpartition(".")
        layer = gen.get_submodule(layer_name)
        self.ffn = gen.get_submodule(name)
        before, after = self._norms_of(layer)
        self.norm_name = f"{layer_name}.{before}"
        self.norm = getattr(layer, before)
        self.norm_after = getattr(layer, after) if after else None
        body = gen.get_submodule(layer_name.rpartition(".")[0].rpartition(".")[0])
        self.final_norm = self._final_norm_of(body)
        watch(gen, (self.norm_name,))

    def __call__(self, z: torch.Tensor) -> torch.Tensor:
        """Return g(z), what the LM head reads, for z `(n, h)`."""
        update = self.ffn(self.norm(z))
        if isinstance(update, tuple):  # of a mixture of experts, with the router's logits
            update = update[0]
        if self.norm_after is not None:
            update = self.norm_after(update)
        return self.final_norm(z + update)

    def check(self, z: torch.Tensor, hidden: torch.Tensor) -> None:
        """
        Check g on states of a real forward.

        Args:
            z (`torch.Tensor` of shape `(n, h)`): what entered the norm before the last FFN.
            hidden (`torch.Tensor` of shape `(n, h)`): Gen's last hidden states at the same positions.

        Raises:
            `ValueError`: if g(z) is not the last hidden state, naming the architecture.
        """
        try:
            with torch.no_grad():
                difference = (self(z) - hidden).abs().max() / hidden.abs().max()
        except (TypeError, RuntimeError) as error:  # its FFN takes or returns something else
            raise self._error(f"its last FFN cannot be computed by itself ({error})") from error
        if not difference <= TOLERANCE:
            raise self._error(f"g(z) differs from its last hidden state by {float(difference):.1%}")

    def _norms_of(self, layer: nn.Module) -> tuple[str, str | None]:
        for before, after in NORMS:
            if hasattr(layer, before) and (after is None or hasattr(layer, after)):
                return before, after
        raise self._error("its last layer has no norm between attention and FFN")

    def _final_norm_of(self, body: nn.Module) -> nn.Module:
        for name in FINAL_NORMS:
            if isinstance(getattr(body, name, None), nn.Module):
                return getattr(body, name)
        raise self._error("it has no norm after its last layer")

    def _error(self, reason: str) -> ValueError:
        return ValueError(
            f"The last block of a {self.kind} model is not g(z) = final_norm(z + FFN(norm(z))): {reason}."
            " Eq. 2 can be solved through its LM head alone."
        )


@dataclass
class Projection:
    """
    The nearest distributions that a function can express, one for each target.

    Args:
        log_probs (`torch.FloatTensor` of shape `(n, V)`): log f(z*).
        kl_before, kl_after (`torch.FloatTensor` of shape `(n,)`): KL[f(z) || p] in nats, for the first z and for z*.
        steps (`torch.LongTensor` of shape `(n,)`): steps that each z took.
    """

    log_probs: torch.Tensor
    kl_before: torch.Tensor
    kl_after: torch.Tensor
    steps: torch.Tensor


def project(
    function: Callable[[torch.Tensor], torch.Tensor],
    start: torch.Tensor,
    targets: torch.Tensor,
    learning_rate: float = 0.1,
    tolerance: float = 1e-3,
    max_steps: int = 1000,
) -> Projection:
    """
    Solve Eq. 2 by Adam, for each row by itself: what a row becomes does not depend on the others.

    Args:
        function (`Callable`): maps states `(n, h)` to logits `(n, V)`, row by row.
        start (`torch.Tensor` of shape `(n, h)`): the first z.
        targets (`torch.FloatTensor` of shape `(n, V)`): log p; finite.
        learning_rate (`float`): of Adam; 0.1 is the paper's.
        tolerance (`float`): a row ends when its KL changes by less in a step (nats); 0.001 is the paper's. With 0
            every row takes all steps.
        max_steps (`int`): no row takes more steps.

    Raises:
        `ValueError`: if a target is not finite: where p is 0, KL is infinite for every z.
    """
    if not torch.isfinite(targets).all():
        raise ValueError("The targets of a projection hold a probability of 0, expected finite log-probabilities.")
    state = start.detach().float().clone().requires_grad_(True)
    optimizer = torch.optim.Adam([state], lr=learning_rate)
    steps = torch.zeros(len(start), dtype=torch.long, device=start.device)
    active = torch.ones(len(start), dtype=torch.bool, device=start.device)
    divergence, log_probs = _divergence(function, state, targets)
    kl_before = last = divergence.detach()
    for _ in range(max_steps):
        optimizer.zero_grad()
        divergence.sum().backward()
        before = state.detach().clone()
        optimizer.step()
        with torch.no_grad():
            state.copy_(torch.where(active[:, None], state, before))  # a row that has ended stays where it is
        steps += active
        divergence, log_probs = _divergence(function, state, targets)
        change = (divergence.detach() - last).abs()
        last = divergence.detach()
        active = active & (change >= tolerance)
        if not active.any():
            break
    return Projection(log_probs.detach(), kl_before, last, steps)


def _divergence(
    function: Callable[[torch.Tensor], torch.Tensor], state: torch.Tensor, targets: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return KL[f(z) || p] of each row, `(n,)`, and log f(z), `(n, V)`."""
    log_probs = function(state).float().log_softmax(-1)
    return (log_probs.exp() * (log_probs - targets)).sum(-1), log_probs
