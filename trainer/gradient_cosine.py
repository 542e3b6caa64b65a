"""Compare what the two losses ask of Gen: the cosine between their gradients, while training."""

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from .distillation_step import running_figures
from .grad_cache import RandomState
from .model_setup import without_peft
from .running import widest_float
from .training_step import TrainingStepMixin
from .watch import FiniteLosses

COSINE, RATIO = "gradient_cosine", "gradient_ratio"


class GradientCosineMixin(TrainingStepMixin):
    """The part of [`CoSupTrainer`] that measures gradients, with `gradient_cosine_steps`."""

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: torch.Tensor | int | None = None
    ) -> torch.Tensor:
        """Take the step; before it, measure the gradients of both losses if it is their turn."""
        steps = self.args.gradient_cosine_steps
        if steps is not None and self.state.global_step % steps == 0:
            self._running.add_values(self._gradient_figures(model, inputs, num_items_in_batch))
        return super().training_step(model, inputs, num_items_in_batch)

    def _gradient_figures(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: torch.Tensor | int | None
    ) -> dict[str, list[float]]:
        """
        Return the cosine between the gradients of Gen, and the ratio of their norms, each as a list of one value.

        There are no values if a loss has no gradient, such as an NSP loss without a negative, or an infinite one, as
        in the first steps of fp16, which are skipped until the loss has found its scale.
        """
        random_state = RandomState(self.args.device)
        gradients = []
        for is_ntp in (True, False):
            random_state.restore()
            with self._training_alone(is_ntp):
                super().training_step(model, inputs, num_items_in_batch)
            gradients.append(_taken_gradients(without_peft(self.model).gen))
            model.zero_grad()
        random_state.restore()
        of_ntp, of_nsp = gradients
        norms = [_dot(gradient, gradient) ** 0.5 for gradient in gradients]
        if not all(0 < norm < math.inf for norm in norms):
            return {}
        return {COSINE: [_dot(of_ntp, of_nsp) / (norms[0] * norms[1])], RATIO: [norms[1] / norms[0]]}

    @contextlib.contextmanager
    def _training_alone(self, is_ntp: bool) -> Iterator[None]:
        """Give all other losses the weight 0, so that every weight still has a gradient; log nothing."""
        running, finite, weights = self._running, self._finite, self.loss_weights
        self._running, self._finite = running_figures(weights, self.args), FiniteLosses()
        self._measured_weights = {
            name: weight if (name == "ntp_loss") == is_ntp else 0.0 for name, weight in weights.items()
        }
        try:
            yield
        finally:
            self._running, self._finite, self._measured_weights = running, finite, None


def _taken_gradients(gen: nn.Module) -> dict[str, torch.Tensor]:
    """Return the gradients of a model's weights, by name."""
    return {name: weight.grad for name, weight in gen.named_parameters() if weight.grad is not None}


def _dot(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> float:
    """Return the inner product of two gradients, in float64 where the device has it."""
    total = 0.0
    for name in first.keys() & second.keys():
        dtype = widest_float(first[name].device)
        product = (first[name].to(dtype) * second[name].to(dtype)).sum()
        if isinstance(product, DTensor):
            product = product.full_tensor()  # over the shards of all ranks
        total += float(product)
    return total
