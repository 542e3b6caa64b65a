"""The `attention` section of the benchmark of training: fused attention and plain products, by length of rows."""

import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from trainer.cpu_attention import plain_products

from measuring import print_table

SHAPES = ((16, 70), (8, 140), (4, 280), (2, 512), (1, 1024))  # rows and their tokens: about 1,100 tokens each
HEADS, WIDTH = 9, 64  # of SmolLM2-135M

Attention = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def fused(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Return causal attention of `(B, H, T, d)` by PyTorch's fused kernel."""
    return F.scaled_dot_product_attention(query, key, value, is_causal=True)


def plain(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Return the same by two products and a softmax, as `CoSupTrainer` computes packed rows."""
    return plain_products(query, key, value).transpose(1, 2)


def cpu_seconds(attention: Attention, inputs: list[torch.Tensor], gradient: torch.Tensor, repeats: int) -> float:
    """Return the least CPU time of a forward and backward; other processes' time does not count."""
    best = float("inf")
    for _ in range(repeats + 1):  # the first warms up
        start = time.process_time()
        torch.autograd.grad(attention(*inputs), inputs, gradient)
        best = min(best, time.process_time() - start)
    return best


def section_attention(script: Any) -> list[dict[str, float]]:
    """Measure forward and backward of both in bfloat16 on the CPU, for rows of each length."""
    generator = torch.Generator().manual_seed(script.seed)
    results = []
    for rows, tokens in SHAPES:
        shape = (rows, tokens, HEADS, WIDTH)
        tensors = [torch.randn(shape, generator=generator).bfloat16().transpose(1, 2) for _ in range(4)]
        inputs = [tensor.requires_grad_() for tensor in tensors[:3]]
        result = {"rows": rows, "tokens": tokens}
        for attention in (fused, plain):
            result[attention.__name__] = cpu_seconds(attention, inputs, tensors[3], script.repeats)
        results.append(result)
    print("\nForward and backward of causal attention on the CPU, bfloat16, 9 heads of 64; least CPU time")
    table = []
    for result in results:
        milliseconds = [f"{1000 * result[name]:.1f}" for name in ("fused", "plain")]
        speed = f"{result['fused'] / result['plain']:.2f}"
        table.append([f"{result['rows']} x {result['tokens']}", *milliseconds, speed])
    print_table(["rows x tokens", "fused (SDPA), ms", "plain products, ms", "x fused"], table)
    return results
