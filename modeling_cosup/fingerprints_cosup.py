"""Hashes of weights, and what a token memory must have in common with the model that it is used with."""

import hashlib
from collections.abc import Iterable
from typing import Any, cast

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .token_keys_cosup import ffn_name, gen_of
from .tokenization_cosup import tokenizer_fingerprint

# in the names of weights that PEFT has wrapped
_ADAPTER_MARKS = (".base_layer.", "lora_", ".original_module.", ".modules_to_save.", ".token_adapter.")

try:
    from torch.distributed.tensor import DTensor
except ImportError:  # a torch without distributed
    DTensor = ()  # type: ignore[assignment, misc]  # nothing is an instance of it


def memory_fingerprint(gen: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None = None) -> dict[str, str]:
    """
    Return what a token memory must have in common with the model that it is used with.

    That is a hash of the weights of Gen's body, a hash of the tokenizer, and the name of the submodule whose input is
    the key. The LM head does not matter.

    Args:
        gen (`PreTrainedModel`): a causal language model; a [`CoSupForCausalLM`] gives its own.
        tokenizer (`PreTrainedTokenizerBase`, *optional*): of a plain language model; without it, none is compared.

    Returns:
        `dict[str, str]`: `gen`, `key`, and `tokenizer` if there is one.

    Raises:
        `ValueError`: for an architecture whose key is not known.
    """
    if gen_of(gen) is not gen:
        return cast(Any, gen).memory_fingerprint()
    hashes = {"gen": hash_parameters(gen.base_model.named_parameters()), "key": ffn_name(gen)}
    if tokenizer is not None:
        hashes["tokenizer"] = tokenizer_fingerprint(tokenizer)
    return hashes


def check_memory_fingerprint(
    fingerprint: dict[str, str], model: Any, tokenizer: PreTrainedTokenizerBase | None = None
) -> None:
    """
    Raise unless a memory is of this model: its keys are states of the model's Gen.

    Args:
        fingerprint (`dict`): of the memory, see [`memory_fingerprint`].
        model ([`CoSupForCausalLM`] or `PreTrainedModel`): the model that the memory is used with.
        tokenizer (`PreTrainedTokenizerBase`, *optional*): of a plain language model, see [`memory_fingerprint`].

    Raises:
        `ValueError`: names everything that differs, with both values.
    """
    names = {"gen": "weights of Gen's body", "tokenizer": "tokenizer", "key": "key"}
    lines = []
    for name, model_value in memory_fingerprint(model, tokenizer).items():
        value = fingerprint.get(name, model_value)
        if value != model_value:
            lines.append(f"  {names[name]}: the memory has {value[:24]}, the model {model_value[:24]}")
    if lines:
        raise ValueError("\n".join(["This memory was made with another model; make it again with this one.", *lines]))


@torch.no_grad()
def hash_parameters(parameters: Iterable[tuple[str, torch.Tensor]], cast_to: torch.dtype | None = None) -> str:
    """
    Return the SHA-256 (hex) of each parameter's name, shape and up to 8,192 evenly spread weights, in bfloat16.

    With `cast_to`, it is the hash that the weights would have after a cast to that dtype.
    """
    titles, samples = [], []
    for name, parameter in parameters:
        weights = parameter.detach()
        if isinstance(weights, DTensor):
            weights = weights.full_tensor()
        titles.append(f"{name} {tuple(weights.shape)}".encode())
        weights = weights.reshape(-1)
        stride = max(1, len(weights) // 4096)
        sample = weights[::stride].to(cast_to or weights.dtype)
        samples.append(sample.to(torch.bfloat16, copy=True))  # no view of weights that were gathered
    digest = hashlib.sha256()
    for title, sample in zip(titles, _on_host(samples), strict=True):
        digest.update(title)
        digest.update(sample.view(torch.int16).numpy().tobytes())
    return digest.hexdigest()


def _on_host(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    """Return copies on the CPU of tensors `(n,)`, with one copy, and so one wait, for each device."""
    numbers_of: dict[torch.device, list[int]] = {}
    for number, tensor in enumerate(tensors):
        numbers_of.setdefault(tensor.device, []).append(number)
    copies = list(tensors)
    for numbers in numbers_of.values():
        joined = torch.cat([tensors[number] for number in numbers]).cpu()
        for number, copy in zip(numbers, joined.split([len(tensors[number]) for number in numbers]), strict=True):
            copies[number] = copy
    return copies


def can_be_hashed(module: torch.nn.Module, state_dict: dict[str, torch.Tensor] | None = None) -> bool:
    """
    Return whether weights are complete, here or in a `state_dict`, and in a dtype that keeps their hash.

    A cast between float32 and bfloat16 keeps the hash. Weights in float16, or quantised ones, have another hash.
    """
    weights = list(module.parameters())
    if state_dict is None and any(is_elsewhere(weight) for weight in weights):
        return False
    return all(weight.dtype in (torch.float32, torch.bfloat16) for weight in weights)


def adapter_weight(module: torch.nn.Module) -> str | None:
    """Return the name of a weight that belongs to an adapter which is not merged; `None` if there is none."""
    for name, _ in module.named_parameters():
        if any(mark in name for mark in _ADAPTER_MARKS):
            return name
    return None


def is_elsewhere(weight: torch.Tensor) -> bool:
    """Return whether a parameter is an FSDP2 shard, which only all ranks together can gather, or is offloaded."""
    return isinstance(weight, DTensor) or weight.is_meta
