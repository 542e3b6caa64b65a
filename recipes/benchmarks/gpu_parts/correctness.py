"""Part 1: what must always hold, on a GPU, in float32 and bfloat16; each error stands next to its bound."""

from gpu_parts.runner import Check

CHECKS: list[Check] = []
