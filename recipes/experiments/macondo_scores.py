"""Score the children of a Macondo data set under Gen, and under Gen with memories."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from modeling_cosup import KNNMemory, MemoryConfig, MLPMemory
from modeling_cosup.architectures_cosup import lm_logits
from modeling_cosup.lines_cosup import read_lines
from modeling_cosup.memory_cosup import target_log_probs
from modeling_cosup.token_keys_cosup import document_ids, token_states
from trainer.memory_fit import fit_memory_config

from experiments.memory_stages import Prepared
from shared.macondo import child_tokens, optimum

BATCH_SIZE = 64


@dataclass
class Children:
    """
    The places of held-out sentences at which the child comes next.

    Args:
        lines (`list[dict]`): the sentences.
        keys (`torch.Tensor` of shape `(n, d)`): what entered the last FFN there.
        hidden (`torch.Tensor` of shape `(n, h)`): what the LM head reads there.
        targets (`torch.LongTensor` of shape `(n,)`): token ids of the children.
        lm_log_probs (`torch.FloatTensor` of shape `(n,)`): log-probabilities of the children under Gen.
    """

    lines: list[dict[str, Any]]
    keys: torch.Tensor
    hidden: torch.Tensor
    targets: torch.Tensor
    lm_log_probs: torch.Tensor


def prompt_ids(lines: Sequence[dict[str, Any]], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Return the token ids of each prompt, followed by the child."""
    children = child_tokens(tokenizer, [line["child"] for line in lines])
    return [document_ids(line["prompt"], tokenizer) + [child] for line, child in zip(lines, children, strict=True)]


@torch.no_grad()
def read_children(path: Path, gen: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Children:
    """Run Gen on the prompts of a file."""
    lines = read_lines(path)
    documents = prompt_ids(lines, tokenizer)
    longest = max(map(len, documents))
    keys, hidden, targets = [], [], []
    states = token_states(
        gen, documents, max_length=longest, stride=longest - 1, batch_size=BATCH_SIZE, with_hidden=True
    )
    seen = 0
    lengths = torch.tensor([len(ids) - 1 for ids in documents])  # keys of each document
    last_keys = lengths.cumsum(0) - 1  # place of the key that predicts the child
    for part in states:
        places = last_keys[(last_keys >= seen) & (last_keys < seen + len(part.keys))] - seen
        seen += len(part.keys)
        places = places.to(part.keys.device)
        keys.append(part.keys[places])
        hidden.append(part.hidden[places])
        targets.append(part.values[places])
    all_hidden, all_targets = torch.cat(hidden), torch.cat(targets)
    lm = [
        lm_logits(gen, chunk).float().log_softmax(-1).gather(1, ids[:, None])[:, 0]
        for chunk, ids in zip(all_hidden.split(256), all_targets.split(256), strict=True)
    ]
    return Children(lines, torch.cat(keys), all_hidden, all_targets, torch.cat(lm))


def score(prepared: Prepared, fit_options: dict[str, Any]) -> dict[str, Any]:
    """
    Score the children of the test sentences.

    The memories are used with the paper's settings (weight 0.25 on the memory, k 1,024, temperature 1), and with those
    that fit the validation sentences best. Only then the test sentences are read.

    Returns:
        `dict`: `configs` (line -> MemoryConfig as a dict), `fits` (line -> all that was tried), `log_probs` (line ->
            log-probabilities of the children), `num_children`, `villagers` and `descriptions` of the same sentences,
            `lm_train` (mean log-probability of the children in the training sentences).
    """
    gen, tokenizer = prepared.gen, prepared.tokenizer
    configs: dict[str, tuple[KNNMemory | MLPMemory, MemoryConfig]] = {}
    fits = {}
    held_out = read_children(prepared.data / "validation.jsonl", gen, tokenizer)
    for name, memory in (("kNN", prepared.knn), ("MLP", prepared.mlp)):
        fit = fit_memory_config(memory, held_out.keys, held_out.targets, held_out.lm_log_probs, **fit_options)
        configs[f"LM + {name}"] = (memory, MemoryConfig())
        configs[f"LM + {name}, fitted"] = (memory, fit.memory_config)
        fits[f"LM + {name}, fitted"] = fit.trials
    test = read_children(prepared.data / "test.jsonl", gen, tokenizer)
    log_probs = {"LM": test.lm_log_probs.tolist()}
    for line, (memory, config) in configs.items():
        alone = memory.target_log_probs(test.keys, test.targets, config)
        log_probs[line] = target_log_probs(test.lm_log_probs, alone, config.weight).tolist()
    train = read_children(prepared.data / "train.jsonl", gen, tokenizer)
    num_children = [line["num_children"] for line in test.lines]
    return {
        "configs": {line: config.to_dict() for line, (_, config) in configs.items()},
        "fits": fits,
        "log_probs": log_probs,
        "num_children": num_children,
        "villagers": [line["villager"] for line in test.lines],
        "lm_train": float(train.lm_log_probs.mean()),
        "optimum": optimum(num_children),
    }
