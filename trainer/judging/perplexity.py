"""Perplexity of text under Gen alone and under Gen with token memories, in one pass over the text."""

import math
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
import torch
import torch.nn.functional as F

from modeling_cosup import KNNMemory, MemoryConfig, MLPMemory
from modeling_cosup.architectures_cosup import lm_logits
from modeling_cosup.memory_cosup import target_log_probs
from modeling_cosup.mlp_memory_cosup import LOGITS_AT_ONCE
from modeling_cosup.token_keys_cosup import TokenStates, gen_of, token_states

from .figures import Measured
from .intervals import Mean

LM = "lm"  # the arm of Gen alone
Memories: TypeAlias = Mapping[str, tuple[KNNMemory | MLPMemory, MemoryConfig]]


@dataclass
class TokenScores:
    """
    What Gen says of n tokens, with the states that memories need.

    Args:
        states ([`TokenStates`]): keys, tokens and numbers of documents.
        lm (`torch.FloatTensor` of shape `(n,)`): log p_LM of the tokens.
        lm_kept (`torch.FloatTensor` of shape `(n,)`): log P_LM of the ids whose probabilities stay Gen's.
    """

    states: TokenStates
    lm: torch.Tensor
    lm_kept: torch.Tensor


@dataclass
class TextScores:
    """
    Log-likelihoods of D documents by arm, and what they cost. Documents without a predicted token are left out.

    Args:
        log_likelihoods (`dict[str, numpy.ndarray]`): arm -> sum over the tokens of each document, `(D,)`.
        tokens (`numpy.ndarray` of shape `(D,)`): predicted tokens of each document: all but its first.
        seconds (`dict[str, float]`): arm -> seconds; those of a memory are what it adds to Gen's.
        left_out (`int`): documents of fewer than two tokens.
    """

    log_likelihoods: dict[str, np.ndarray]
    tokens: np.ndarray
    seconds: dict[str, float] = field(default_factory=dict)
    left_out: int = 0

    def figures(self, arm: str) -> dict[str, Measured]:
        """Return `nll` and `perplexity` of an arm, with 95 % intervals from a bootstrap over documents."""
        nll = Mean(-self.log_likelihoods[arm], self.tokens).to_dict()
        interval = None if nll["interval"] is None else [float(np.exp(bound)) for bound in nll["interval"]]
        perplexity: Measured = {"value": float(np.exp(nll["value"])), "interval": interval, "n": nll["n"]}
        return {"perplexity": perplexity, "nll": nll}

    def difference(self, arm: str, baseline: str = LM) -> Measured:
        """Return `nll` of an arm minus that of another, document by document, with its 95 % interval."""
        return Mean(self.log_likelihoods[baseline] - self.log_likelihoods[arm], self.tokens).to_dict()


@torch.no_grad()
def score_text(
    model: Any,
    documents: Iterable[list[int]],
    memories: Memories,
    *,
    max_length: int,
    stride: int,
    batch_size: int = 8,
) -> TextScores:
    """
    Score documents under Gen alone and under Gen with each memory.

    The probabilities are the ones from which generate() decides, before any logits processor: control tokens and ends
    are in the vocabulary, and no memory changes their probabilities.

    Args:
        model (`PreTrainedModel`): a [`CoSupForCausalLM`] or another causal language model.
        documents (iterable of `list[int]`): token ids, see [`~modeling_cosup.token_keys_cosup.document_ids`].
        memories (`dict`): name -> memory and how it joins Gen.
        max_length (`int`), stride (`int`): of the sliding windows, in tokens.
        batch_size (`int`): windows in a forward.

    Returns:
        [`TextScores`]: of `"lm"` and of each memory.

    Raises:
        `ValueError`: for text without a token to predict, a memory of another model, a memory named `"lm"`, or a token
            of probability 0, whose perplexity is infinite: a [`KNNMemory`] with weight 1 knows few tokens.
    """
    if LM in memories:
        raise ValueError(f"A memory is named {LM!r}, the name of Gen alone.")
    for memory, _ in memories.values():
        memory.check_model(model)
    seconds = dict.fromkeys([LM, *memories], 0.0)
    sums: dict[str, dict[int, float]] = {arm: defaultdict(float) for arm in seconds}
    tokens: dict[int, float] = defaultdict(float)
    counter = _Counter(documents)
    kept_ids = kept_ids_of(model)
    chunks = gen_scores(model, counter, kept_ids, max_length=max_length, stride=stride, batch_size=batch_size)
    while True:
        start = time.perf_counter()
        chunk = next(chunks, None)
        if chunk is None:
            break
        numbers = chunk.states.documents.cpu()
        _add(tokens, numbers, torch.ones(len(numbers)))
        log_probs = chunk.lm.cpu()
        _check_finite(log_probs, "Gen alone")
        _add(sums[LM], numbers, log_probs)
        seconds[LM] += time.perf_counter() - start
        for name, (memory, config) in memories.items():
            start = time.perf_counter()
            log_probs = mixed_scores(chunk, memory, config, kept_ids).cpu()
            _check_finite(log_probs, f"Gen with {name}, of weight {config.weight:g},")
            _add(sums[name], numbers, log_probs)
            seconds[name] += time.perf_counter() - start
    if not tokens:
        raise ValueError(f"None of the {counter.count} documents has a token to predict: each needs two or more.")
    log_likelihoods = {arm: np.array(list(by_document.values())) for arm, by_document in sums.items()}
    return TextScores(log_likelihoods, np.array(list(tokens.values())), seconds, counter.count - len(tokens))


def gen_scores(
    model: Any,
    documents: Iterable[list[int]],
    kept_ids: torch.Tensor,
    *,
    max_length: int,
    stride: int,
    batch_size: int = 8,
) -> Iterator[TokenScores]:
    """Yield what Gen says of the tokens of documents, in the order of the text; see [`score_text`]."""
    gen = gen_of(model)
    options = {"max_length": max_length, "stride": stride, "batch_size": batch_size}
    tokens_at_once = max(1, LOGITS_AT_ONCE // gen.get_output_embeddings().weight.shape[0])
    for states in token_states(model, documents, with_hidden=True, **options):
        assert states.hidden is not None
        lm, lm_kept = [], []
        parts = zip(states.hidden.split(tokens_at_once), states.values.split(tokens_at_once), strict=True)
        for hidden, targets in parts:
            target, kept = target_and_kept(lm_logits(gen, hidden), targets, kept_ids)
            lm.append(target)
            lm_kept.append(kept)
        yield TokenScores(states, torch.cat(lm), torch.cat(lm_kept))


def mixed_scores(
    scores: TokenScores, memory: KNNMemory | MLPMemory, config: MemoryConfig, kept_ids: torch.Tensor
) -> torch.Tensor:
    """Return `(n,)`: log-probabilities of tokens under Gen with a memory; no buffer is as wide as the vocabulary."""
    states = scores.states
    if not config.weight:
        return scores.lm
    memory_scores, memory_kept = memory.target_log_probs(states.keys, states.values, config, kept_ids)
    is_kept = torch.isin(states.values, kept_ids)
    return target_log_probs(scores.lm, memory_scores, config.weight, scores.lm_kept, memory_kept, is_kept)


def kept_ids_of(model: Any) -> torch.Tensor:
    """Return the ids whose probabilities no memory changes: control tokens and the ends of generate()."""
    ends = model.generation_config.eos_token_id
    ids = {ends} if isinstance(ends, int) else set(ends or ())
    if model.config.model_type == "cosup":
        control = (model.config.nsp_token_id, model.config.cs_token_id, model.config.ce_token_id)
        ids |= {id for id in control if id is not None}  # a model may have none
    return torch.tensor(sorted(ids), dtype=torch.long, device=model.device)


class _Counter:
    """Documents, counted while they are read."""

    def __init__(self, documents: Iterable[list[int]]) -> None:
        self.documents = documents
        self.count = 0

    def __iter__(self) -> Iterator[list[int]]:
        for ids in self.documents:
            self.count += 1
            yield ids


def _check_finite(log_probs: torch.Tensor, arm: str) -> None:
    """Raise a `ValueError` if a token has probability 0, or none."""
    count = int((~log_probs.isfinite()).sum())
    if count:
        raise ValueError(
            f"{arm} gives {count:,} of {len(log_probs):,} tokens probability 0 or NaN: the perplexity would be"
            " infinite. Lower the weight of the memory, or check the weights of Gen."
        )


def _add(sums: dict[int, float], numbers: torch.Tensor, values: torch.Tensor) -> None:
    """Add values of tokens to the sums of their documents, whose numbers ascend."""
    documents, counts = numbers.unique_consecutive(return_counts=True)
    for number, part in zip(documents.tolist(), values.double().split(counts.tolist()), strict=True):
        sums[number] += float(part.sum())


def target_and_kept(
    logits: torch.Tensor, targets: torch.Tensor, kept_ids: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the log-probabilities `(n,)` of the targets, and of all kept ids together."""
    logits = logits.float()
    total = logits.logsumexp(1)
    kept = logits[:, kept_ids].logsumexp(1)
    log_kept = kept - total
    # where kept ids have most of the mass, 1 - P(C) would be a difference of almost equal numbers
    likely = (log_kept > math.log(0.5)).nonzero()[:, 0]
    others = logits[likely].index_fill(1, kept_ids, float("-inf")).logsumexp(1)
    log_kept[likely] = -F.softplus(others - kept[likely])
    return logits.gather(1, targets[:, None])[:, 0] - total, log_kept
