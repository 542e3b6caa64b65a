"""Fit how a memory joins Gen: weight, temperature and number of neighbours, on held-out tokens."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from modeling_cosup import KNNMemory, MemoryConfig, MLPMemory
from modeling_cosup.files_cosup import digest_file
from modeling_cosup.memory_cosup import target_log_probs

KS = (8, 32, 128, 512, 1024, 2048)  # neighbours that are tried
LARGEST_WEIGHT = 0.9999  # of a memory that gives some held-out token probability 0: at 1 the mixture would too


@dataclass(frozen=True)
class MemoryFit:
    """
    What [`fit_memory_config`] found.

    Args:
        memory_config ([`MemoryConfig`]): the best of `trials`.
        perplexity (`float`), lm_perplexity (`float`): of the held-out tokens, with the memory and without.
        trials (`list[dict]`): all that was tried: `k`, `temperature`, `weight` (the best for these two) and
            `perplexity`.
    """

    memory_config: MemoryConfig
    perplexity: float
    lm_perplexity: float
    trials: list[dict[str, float]]


@torch.no_grad()
def fit_memory_config(
    memory: KNNMemory | MLPMemory,
    keys: torch.Tensor,
    targets: torch.Tensor,
    lm_log_probs: torch.Tensor,
    lm_kept: torch.Tensor | None = None,
    kept_ids: torch.Tensor | None = None,
    *,
    ks: Sequence[int] = KS,
    batch_size: int = 256,
) -> MemoryFit:
    """
    Fit weight, temperature and k on held-out tokens: the values with the lowest perplexity.

    For each k and temperature the weight is exact: the log-likelihood is concave in it. Temperatures are tried on a
    grid that becomes finer around the best. A datastore is searched once, with the largest k.

    Args:
        memory ([`KNNMemory`] or [`MLPMemory`]): its `memory_config` gives the fields that are not fitted.
        keys (`torch.Tensor` of shape `(n, d)`): of tokens that neither Gen nor the memory has seen.
        targets (`torch.LongTensor` of shape `(n,)`): the tokens after them.
        lm_log_probs (`torch.FloatTensor` of shape `(n,)`): log p_LM of the targets.
        lm_kept (`torch.FloatTensor` of shape `(n,)`, *optional*): log P_LM of the ids whose probabilities stay Gen's.
        kept_ids (`torch.LongTensor` of shape `(C,)`, *optional*): these ids; pass both, as generate() has them, or
            neither.
        ks (`Sequence[int]`): numbers of neighbours to try; an [`MLPMemory`] has none.
        batch_size (`int`): keys per search.

    Returns:
        [`MemoryFit`].

    Raises:
        `ValueError`: without held-out tokens, for shapes that do not fit, and for one of `lm_kept` and `kept_ids`
            without the other.
    """
    _check_held_out(keys, targets, lm_log_probs, lm_kept, kept_ids, ks)
    kept = torch.empty(0, dtype=torch.long) if kept_ids is None else kept_ids
    candidates: _NeighborCandidates | _MLPCandidates
    if isinstance(memory, KNNMemory):
        candidates = _NeighborCandidates(memory, keys, targets, kept, ks, batch_size)
    else:
        candidates = _MLPCandidates(memory, keys, targets, kept, batch_size)
    lm = lm_log_probs.double().cpu()
    lm_mass = None if lm_kept is None else lm_kept.cpu()
    is_kept = torch.isin(targets, kept.to(targets.device)).cpu()
    trials: list[dict[str, float]] = []
    temperatures = candidates.temperatures()
    spacing = 2.0
    for _ in range(3):
        for k, temperature, scores, kept_scores in candidates.scores(temperatures):
            memory_mass = None if lm_mass is None else kept_scores
            alone = target_log_probs(lm, scores, 1.0, lm_mass, memory_mass, is_kept)  # (n,): the memory without Gen
            weight, log_likelihood = best_weight(lm, alone)
            perplexity = math.exp(-log_likelihood)
            trials.append({"k": k, "temperature": temperature, "weight": weight, "perplexity": perplexity})
        best = min(trials, key=lambda trial: (trial["perplexity"], trial["k"]))
        finer = spacing**0.25
        temperatures = [best["temperature"] * finer**step for step in (-3, -2, -1, 1, 2, 3)]
        spacing = finer
    temperature, weight = best["temperature"], best["weight"]
    config = replace(memory.memory_config, k=int(best["k"]), temperature=temperature, weight=weight)
    return MemoryFit(config, best["perplexity"], math.exp(-float(lm.mean())), trials)


def fit_record(text_file: str | Path, num_tokens: int, ngram_overlap: float | None) -> dict[str, Any]:
    """
    Return what a memory stores about its fit, as `fit`: a perplexity of the same text is no held-out one.

    Args:
        text_file (`str` or `Path`): that it was fitted on.
        num_tokens (`int`): that it was fitted on.
        ngram_overlap (`float`, *optional*): share of the text that the datastore holds, if it is known.

    Returns:
        `dict`: `sha256` of the file, `tokens` and `ngram_overlap`.
    """
    return {"sha256": digest_file(text_file), "tokens": num_tokens, "ngram_overlap": ngram_overlap}


def write_memory_config(
    memory: KNNMemory | MLPMemory, folder: str | Path, config: MemoryConfig, fit: dict[str, Any] | None = None
) -> None:
    """
    Give a memory a new config, and write it into its folder; the keys of a datastore are not touched.

    After a crash the folder holds the old config and record of its fit, or the new ones.

    Args:
        memory ([`KNNMemory`] or [`MLPMemory`]): a datastore must have been loaded from `folder`.
        folder (`str` or `Path`): of the memory.
        config ([`MemoryConfig`]): such as [`fit_memory_config`] found.
        fit (`dict`, *optional*): what it was fitted on, see [`fit_record`].
    """
    memory.memory_config, memory.fit = config, fit
    if isinstance(memory, KNNMemory):
        memory.save_memory_config()
    else:
        memory.save_pretrained(folder)


def _check_held_out(
    keys: torch.Tensor,
    targets: torch.Tensor,
    lm_log_probs: torch.Tensor,
    lm_kept: torch.Tensor | None,
    kept_ids: torch.Tensor | None,
    ks: Sequence[int],
) -> None:
    """Raise a `ValueError` unless the held-out tokens can be fitted on."""
    if not len(targets):
        raise ValueError("There is no held-out token to fit on.")
    if (lm_kept is None) != (kept_ids is None):
        raise ValueError("lm_kept and kept_ids go together: pass both or neither.")
    for name, values in (("keys", keys), ("lm_log_probs", lm_log_probs), ("lm_kept", lm_kept)):
        if values is not None and len(values) != len(targets):
            raise ValueError(f"{name} holds {len(values):,} rows, expected one for each of {len(targets):,} targets.")
    if not ks or min(ks) < 1:
        raise ValueError(f"ks is {list(ks)}, expected numbers of neighbours, 1 or more.")


def best_weight(lm: torch.Tensor, memory: torch.Tensor) -> tuple[float, float]:
    """
    Return the weight w that maximises the mean of log((1 - w) p_LM + w p_mem), and this mean.

    Args:
        lm, memory (`torch.Tensor` of shape `(n,)`): log-probabilities of the targets; `lm` is finite.
    """
    lm, memory = lm.double(), memory.double()
    larger = torch.maximum(lm, memory)
    p_lm, p_memory = (lm - larger).exp(), (memory - larger).exp()  # one of them is 1
    low, high = 0.0, 1.0
    for _ in range(40):
        weight = (low + high) / 2
        slope = (p_memory - p_lm) / ((1 - weight) * p_lm + weight * p_memory)
        if float(slope.sum()) > 0:
            low = weight
        else:
            high = weight
    weight = round((low + high) / 2, 4)
    if bool((p_memory == 0).any()):
        weight = min(weight, LARGEST_WEIGHT)
    log_likelihood = (larger + ((1 - weight) * p_lm + weight * p_memory).log()).mean()
    return weight, float(log_likelihood)


class _NeighborCandidates:
    """Scores of a datastore's neighbours for many k and temperatures, from one search."""

    def __init__(
        self,
        memory: KNNMemory,
        keys: torch.Tensor,
        targets: torch.Tensor,
        kept_ids: torch.Tensor,
        ks: Sequence[int],
        batch_size: int,
    ) -> None:
        self.ks = sorted({min(k, len(memory)) for k in ks})
        distances, are_targets, are_kept = [], [], []
        for chunk, chunk_targets in zip(keys.split(batch_size), targets.split(batch_size), strict=True):
            neighbors = memory.search(chunk, self.ks[-1])
            distances.append(neighbors.distances.cpu())
            values = neighbors.values.cpu()
            are_targets.append(values == chunk_targets.cpu()[:, None])
            are_kept.append(torch.isin(values, kept_ids.cpu()))
        self.distances = torch.cat(distances)  # (n, K)
        self.are_targets = torch.cat(are_targets)  # (n, K)
        self.are_kept = torch.cat(are_kept)  # (n, K)
        self.temperature = memory.memory_config.temperature

    def temperatures(self) -> list[float]:
        """Return temperatures from where only the nearest neighbour counts to where all count alike."""
        found = self.distances.masked_fill(self.distances.isinf(), float("nan"))
        gaps = found.nanmean(1) - self.distances[:, 0]  # (n,)
        scale = float(gaps.nanmedian())
        tried = [scale * 2.0**power for power in range(-8, 5)] if scale > 0 else []
        return [*tried, self.temperature]

    def scores(self, temperatures: Sequence[float]) -> Iterator[tuple[int, float, torch.Tensor, torch.Tensor]]:
        """Yield k, temperature, and log p_mem of the targets and of the kept ids, `(n,)` each."""
        last = torch.tensor(self.ks) - 1
        for temperature in temperatures:
            targets, kept = [], []
            parts = (self.distances.split(1024), self.are_targets.split(1024), self.are_kept.split(1024))
            for distances, are_targets, are_kept in zip(*parts, strict=True):
                distances = distances.double()
                weights = ((distances[:, :1] - distances) / temperature).exp()  # (n, K); the nearest weighs 1
                weights = weights.masked_fill(distances.isinf(), 0.0)
                totals = weights.cumsum(1)[:, last].clamp(min=1e-300)  # (n, number of ks); 0 where nothing was found
                targets.append((weights * are_targets).cumsum(1)[:, last] / totals)
                kept.append((weights * are_kept).cumsum(1)[:, last] / totals)
            log_targets, log_kept = torch.cat(targets).log(), torch.cat(kept).log()
            for column, k in enumerate(self.ks):
                yield k, temperature, log_targets[:, column], log_kept[:, column]


class _MLPCandidates:
    """Scores of an MLP memory for many temperatures; one pass over the keys for each list of them."""

    def __init__(
        self, memory: MLPMemory, keys: torch.Tensor, targets: torch.Tensor, kept_ids: torch.Tensor, batch_size: int
    ) -> None:
        self.memory = memory
        self.chunks = list(zip(keys.split(batch_size), targets.split(batch_size), strict=True))
        self.kept_ids = kept_ids

    def temperatures(self) -> list[float]:
        """Return temperatures around 1, which training aims at."""
        return [0.5, 1.0, 2.0]

    def scores(self, temperatures: Sequence[float]) -> Iterator[tuple[int, float, torch.Tensor, torch.Tensor]]:
        """Yield k, which has no meaning here, temperature, and log p_mem of targets and kept ids, `(n,)` each."""
        targets: dict[float, list[torch.Tensor]] = {temperature: [] for temperature in temperatures}
        kept: dict[float, list[torch.Tensor]] = {temperature: [] for temperature in temperatures}
        for keys, chunk_targets in self.chunks:
            logits = self.memory(keys).float()  # (c, V)
            for temperature in temperatures:
                log_probs = (logits / temperature).log_softmax(-1)
                targets[temperature].append(log_probs.gather(1, chunk_targets[:, None])[:, 0])
                kept[temperature].append(log_probs[:, self.kept_ids].logsumexp(1))
        for temperature in temperatures:
            log_targets, log_kept = torch.cat(targets[temperature]).cpu(), torch.cat(kept[temperature]).cpu()
            yield self.memory.memory_config.k, temperature, log_targets, log_kept
