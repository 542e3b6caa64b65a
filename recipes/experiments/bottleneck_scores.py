"""The softmax bottleneck and the MLP hurdle (arXiv 2311.09615) on the Gens of a Macondo experiment."""

import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from modeling_cosup import MemoryConfig
from modeling_cosup.architectures_cosup import lm_logits
from modeling_cosup.lines_cosup import read_lines, write_lines
from modeling_cosup.memory_cosup import mix
from modeling_cosup.packing_cosup import pad_rows
from modeling_cosup.states_cosup import recording, states_at
from modeling_cosup.token_keys_cosup import ffn_name

from experiments.macondo_scores import BATCH_SIZE, Children, prompt_ids
from experiments.memory_stages import Prepared
from experiments.memory_training import new_gen, train_gen
from experiments.projection import LastBlock, Projection, project

# ---------------------------------------------------------------------- Eq. 2


def score_projections(
    prepared: Prepared, children: Children, configs: dict[str, MemoryConfig], options: dict[str, Any], seed: int
) -> dict[str, Any]:
    """
    Solve Eq. 2 through the LM head and through the last block, at the children of some sentences.

    Args:
        prepared ([`Prepared`]): Gen and its kNN memory.
        children ([`Children`]): of the test sentences.
        configs (`dict[str, MemoryConfig]`): name of a target distribution -> how the kNN memory makes it.
        options (`dict`): `max_positions`, and `variants`: name -> options of [`project`].
        seed (`int`): seed of the choice of `max_positions` sentences.

    Returns:
        `dict`: `n`, `note` (why there is no f∘g, or empty), and for each target `lm` and `target` (mean log-likelihood
            of the children), `kl` (mean KL[LM || target]) and `projections` (name -> `kl_before`, `kl_after`,
            `log_likelihood`, `steps`, all means).
    """
    gen = prepared.gen
    count = min(options.get("max_positions", 256), len(children.targets))
    chosen = torch.tensor(random.Random(seed).sample(range(len(children.targets)), count))
    keys, hidden, targets = (tensor[chosen] for tensor in (children.keys, children.hidden, children.targets))

    def head(state: torch.Tensor) -> torch.Tensor:
        return lm_logits(gen, state)

    functions: dict[str, tuple[Callable[[torch.Tensor], torch.Tensor], torch.Tensor]] = {"f": (head, hidden)}
    note = ""
    try:
        block = LastBlock(gen)
        lines = [children.lines[place] for place in chosen.tolist()]
        residuals = states_before_norm(gen, prompt_ids(lines, prepared.tokenizer), block.norm_name)
        block.check(residuals, hidden)
        functions["f∘g"] = (lambda state: head(block(state)), residuals)
    except ValueError as error:
        note = str(error)
    with torch.no_grad():
        lm = head(hidden).float().log_softmax(-1)
    no_ids = torch.empty(0, dtype=torch.long, device=lm.device)
    results: dict[str, Any] = {"n": count, "note": note, "targets": {}}
    for name, config in configs.items():
        memory_log_probs = prepared.knn.log_probs({prepared.knn.states[0]: keys}, config).to(lm.device)
        goal = mix(lm, memory_log_probs, config.weight, no_ids)  # (n, V)
        projections = {}
        for label, (function, start) in functions.items():
            for variant, settings in options["variants"].items():
                result = project(function, start, goal, **settings)
                projections[f"{label}, {variant}"] = summary(result, targets)
        results["targets"][name] = {
            "lm": mean_of_targets(lm, targets),
            "target": mean_of_targets(goal, targets),
            "kl": float((lm.exp() * (lm - goal)).sum(-1).mean()),
            "projections": projections,
        }
    return results


def summary(result: Projection, targets: torch.Tensor) -> dict[str, float]:
    """Return the means of a projection as JSON values."""
    return {
        "kl_before": float(result.kl_before.mean()),
        "kl_after": float(result.kl_after.mean()),
        "log_likelihood": mean_of_targets(result.log_probs, targets),
        "steps": float(result.steps.float().mean()),
    }


def mean_of_targets(log_probs: torch.Tensor, targets: torch.Tensor) -> float:
    """Return the mean of `log_probs` `(n, V)` at `targets` `(n,)`."""
    return float(log_probs.gather(1, targets[:, None]).mean())


@torch.no_grad()
def states_before_norm(gen: PreTrainedModel, documents: Sequence[list[int]], name: str) -> torch.Tensor:
    """Return what enters a submodule at the last token but one of each document, `(n, h)`."""
    states = []
    for start in range(0, len(documents), BATCH_SIZE):
        rows = documents[start : start + BATCH_SIZE]
        ids, _ = pad_rows(rows, device=gen.device)  # padding on the right: no token of a causal model sees it
        with recording(gen, (name,)) as recorded:
            hidden = gen.base_model(input_ids=ids, use_cache=False).last_hidden_state  # (B, T, h)
        places = torch.tensor([row * ids.shape[1] + len(ids_of_row) - 2 for row, ids_of_row in enumerate(rows)])
        states.append(states_at(recorded, (name,), hidden, places)[name])
    return torch.cat(states)


# ---------------------------------------------------------------------- the MLP hurdle


class NoFFN(nn.Module):
    """In place of an FFN: it adds nothing to the residual stream."""

    def forward(self, hidden: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return torch.zeros_like(hidden)


def remove_last_ffn(gen: PreTrainedModel) -> None:
    """
    Replace the FFN of Gen's last layer by one that gives zeros.

    Raises:
        `ValueError`: for an architecture whose FFN adds the residual itself, or is not one module.
    """
    if gen.config.model_type in ("bloom", "opt"):
        raise ValueError(f"The last FFN of {type(gen).__name__} cannot be left out by itself: leave out hurdle.")
    layer, _, ffn = ffn_name(gen).rpartition(".")
    setattr(gen.get_submodule(layer), ffn, NoFFN())


class ChildrenInTraining(TrainerCallback):
    """Records the mean log-likelihood of the children during a training: `curve` holds `[step, value]`."""

    def __init__(self, gen: PreTrainedModel, documents: list[list[int]], every: int) -> None:
        self.gen = gen
        self.documents = documents
        self.every = every
        self.curve: list[list[float]] = []

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.global_step % self.every == 0:
            self.curve.append([state.global_step, self.measure()])

    @torch.no_grad()
    def measure(self) -> float:
        self.gen.eval()
        total = 0.0
        for start in range(0, len(self.documents), BATCH_SIZE):
            rows = self.documents[start : start + BATCH_SIZE]
            ids, mask = pad_rows(rows, device=self.gen.device)
            last = mask.sum(1) - 1  # (B,): place of the child
            logits = self.gen(input_ids=ids, attention_mask=mask).logits
            log_probs = logits[torch.arange(len(rows)), last - 1].float().log_softmax(-1)
            total += float(log_probs.gather(1, ids.gather(1, last[:, None])).sum())
        self.gen.train()
        return total / len(self.documents)


def run_hurdle(
    gen_source: str | dict[str, Any],
    data: Path,
    tokenizer: PreTrainedTokenizerBase,
    options: dict[str, Any],
    seed: int,
    folder: Path,
) -> dict[str, Any]:
    """
    Memorise test sentences from scratch, with and without the last FFN.

    Args:
        gen_source (`str` or `dict`): checkpoint whose architecture is used, or the config of a model.
        data (`Path`): folder of recipes/prepare_macondo.py.
        tokenizer (`PreTrainedTokenizerBase`): of Gen.
        options (`dict`): `gen` (overrides of the config), `max_sentences`, `every` (steps between two measurements),
            and `training` (options of `TrainingArguments`).
        seed (`int`): seed of weights, sentences and their order.
        folder (`Path`): an existing folder for files in between.

    Returns:
        `dict`: `"with"` and `"without"` -> list of `[step, mean log-likelihood of the children]`.
    """
    lines = read_lines(data / "test.jsonl")
    chosen = random.Random(seed).sample(lines, min(options.get("max_sentences", len(lines)), len(lines)))
    write_lines(folder / "sentences.jsonl", chosen)
    config = gen_source
    if isinstance(gen_source, str):
        config = AutoConfig.from_pretrained(gen_source).to_dict()
    curves = {}
    for name in ("with", "without"):
        gen = new_gen({**config, **options.get("gen", {})}, tokenizer, seed)
        if name == "without":
            remove_last_ffn(gen)
        callback = ChildrenInTraining(gen, prompt_ids(chosen, tokenizer), options["every"])
        train_gen(gen, tokenizer, folder / "sentences.jsonl", options["training"], folder, seed, [callback])
        curves[name] = callback.curve
    return curves
