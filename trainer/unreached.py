"""Freeze parameters that text never reaches, such as the vision tower of a model that also reads images."""

import contextlib
import re
from collections.abc import Iterable, Iterator
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import logging

from modeling_cosup import CoSupForCausalLM

from .training_args import CoSupTrainingArguments

logger = logging.get_logger(__name__)


def freeze_unreached(model: CoSupForCausalLM, args: CoSupTrainingArguments) -> None:
    """
    Turn off the gradients of parameters on which no loss of a text depends, and warn with their names.

    DDP would wait for their gradients, and they would count as trained. To find them, a short text runs through the
    model, without a backward pass.

    Args:
        model ([`CoSupForCausalLM`]): its other frozen parts are frozen already.
        args ([`CoSupTrainingArguments`]): `supervision`, which decides what is run.
    """
    trainable = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    reached = _leaves(_outputs_of_a_text(model, args))
    unreached = [name for name, parameter in trainable.items() if parameter not in reached]
    idle = _idle_experts(model, unreached)
    unreached = [name for name in unreached if not name.startswith(idle)]
    if not unreached:
        return
    for name in unreached:
        trainable[name].requires_grad_(False)
    if args.process_index == 0:
        count = sum(trainable[name].numel() for name in unreached)
        modules = ", ".join(_modules(unreached, trainable.keys() - set(unreached)))
        logger.warning_once(f"{count:,} parameters are frozen, because text never reaches them: {modules}.")


def _outputs_of_a_text(model: CoSupForCausalLM, args: CoSupTrainingArguments) -> list[torch.Tensor]:
    """Return what the losses of a short text are computed from."""
    config = model.config
    inputs: dict[str, Any] = {}
    encoder = model.query_encoder if config.query_from == "query_encoder" else model.emb_seq
    if args.trains_ntp or (args.trains_embeddings and config.query_from == "gen"):
        nsp = torch.tensor([[config.nsp_token_id]], device=model.device)
        inputs["input_ids"] = torch.cat([_tokens(model.gen), nsp], dim=1)  # (1, 9)
        if args.trains_ntp:
            inputs["labels"] = inputs["input_ids"]
    if args.trains_embeddings:
        inputs["passage_input_ids"] = _tokens(model.emb_seq)  # (1, 8)
        if config.query_from != "gen":
            inputs["query_input_ids"] = _tokens(encoder)  # (1, 8)
    was_training = model.training
    model.eval()
    try:
        with _eager_attention(model), torch.enable_grad():
            outputs = model(
                **inputs,
                use_cache=False,
                compute_nsp_loss=False,
                return_logits=False,
                output_query_embeds=args.trains_embeddings and config.query_from == "gen",
            )
    finally:
        model.train(was_training)
    tensors = (outputs.ntp_loss, outputs.query_embeds, outputs.passage_embeds)
    return [tensor for tensor in tensors if tensor is not None]


def _tokens(part: PreTrainedModel | None) -> torch.Tensor:
    """Return different token ids `(1, 8)` from the vocabulary of a part."""
    assert part is not None  # CoSupTrainer needs Emb_seq, and query_from="query_encoder" brings the query encoder
    vocab_size = cast(nn.Embedding, part.get_input_embeddings()).weight.shape[0]
    return torch.arange(1, 9, device=part.device)[None] * (vocab_size // 9)


@contextlib.contextmanager
def _eager_attention(model: nn.Module) -> Iterator[None]:
    """For the moment, replace attention that may need a GPU and half precision."""
    configs: dict[int, tuple[Any, str]] = {}  # in order, parents first: they pass the setting on
    for module in model.modules():
        config: Any = getattr(module, "config", None)
        if (getattr(config, "_attn_implementation", None) or "eager") not in ("eager", "sdpa"):
            configs[id(config)] = config, config._attn_implementation
    for config, _ in configs.values():
        config._attn_implementation = "eager"
    try:
        yield
    finally:
        for config, implementation in configs.values():
            config._attn_implementation = implementation


def _leaves(outputs: Iterable[torch.Tensor]) -> set[torch.Tensor]:
    """Return the tensors that get a gradient if one flows back from `outputs`."""
    leaves = set()
    seen = set()
    waiting = [output.grad_fn for output in outputs]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        variable = getattr(node, "variable", None)  # of the nodes that accumulate a gradient
        if variable is not None:
            leaves.add(variable)
        waiting += [next_node for next_node, _ in node.next_functions]
    return leaves


def _idle_experts(model: nn.Module, unreached: list[str]) -> tuple[str, ...]:
    """Return the prefixes of unreached modules that another text may reach: their list has one like them in use."""
    prefixes = []
    for list_name, modules in model.named_modules():
        if not isinstance(modules, nn.ModuleList):
            continue
        kinds_reached = set()
        kind_of_idle = {}
        for i, module in enumerate(modules):
            prefix = f"{list_name}.{i}."
            names = [prefix + name for name, parameter in module.named_parameters() if parameter.requires_grad]
            if names and set(names) <= set(unreached):
                kind_of_idle[prefix] = type(module)
            elif names:
                kinds_reached.add(type(module))
        prefixes += [prefix for prefix, kind in kind_of_idle.items() if kind in kinds_reached]
    return tuple(prefixes)


def _modules(names: Iterable[str], other_names: Iterable[str]) -> list[str]:
    """Return the largest modules that hold `names` and none of `other_names`; numbers of layers become `*`."""
    shared = set()
    for name in other_names:
        parts = name.split(".")
        shared |= {".".join(parts[:length]) for length in range(1, len(parts) + 1)}
    modules: dict[str, None] = {}  # in order, each once
    for name in names:
        parts = name.split(".")
        length = 1
        while ".".join(parts[:length]) in shared:
            length += 1
        modules[re.sub(r"\.\d+(?=\.|$)", ".*", ".".join(parts[:length]))] = None
    return list(modules)
