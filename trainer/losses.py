"""
The losses that are trained, by name, and the figures of the log.

There are two kinds of losses, because GradCache computes them at different times (see `grad_cache`):

- Token losses depend on Gen's output for one micro-batch. Each is a sum over trained tokens, such as `ntp_loss`
  (Eq. 2).
- Embedding losses depend on the embeddings of the whole batch, over all ranks. Each has one value per query, such as
  `nsp_loss` (Eq. 4) and, with `matryoshka_dims`, `matryoshka_loss`.

Neither kind is averaged here: the caller knows the token and query counts of all ranks.

To add a loss, add it to `token_losses` or to `embedding_losses`, its weight to `loss_weights`, and what it needs of
the model to `forward_options`. Its name must end in `_loss`: logs, evaluation, model cards and plots find it by that.
Its label goes into `judging/figures.py`.
"""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import torch
import torch.nn.functional as F

from modeling_cosup import CoSupConfig, CoSupOutput, info_nce

from .batching import BatchFacts
from .distributed import gather_rows
from .duplicates import GlobalBatch
from .training_args import CoSupTrainingArguments

Loss = TypeVar("Loss", torch.Tensor, float)


@dataclass
class EmbeddingBatch:
    """
    The embeddings of the global batch, as the losses of one rank see them.

    Args:
        query_embeds (`torch.FloatTensor` of shape `(N, h)`): of this rank.
        passage_embeds (`torch.FloatTensor` of shape `(M, h)`): of all ranks.
        passage_labels (`torch.LongTensor` of shape `(N,)`): for each query, the row of `passage_embeds` that is its
            positive.
        same_passage (`torch.BoolTensor` of shape `(N, M)`, *optional*): which passages are not negatives of a query.
    """

    query_embeds: torch.Tensor
    passage_embeds: torch.Tensor
    passage_labels: torch.Tensor
    same_passage: torch.Tensor | None = None


# ---------------------------------------------------------------------- what is trained


def loss_weights(config: CoSupConfig, args: CoSupTrainingArguments) -> dict[str, float]:
    """Return the weight of each loss in the total that is minimised, L = L_NTP + λ·L_NSP (Eq. 5)."""
    assert config.nsp_loss_weight is not None  # the config has replaced None by the default of its similarity
    weights = {"ntp_loss": 1.0, "nsp_loss": config.nsp_loss_weight}
    if args.matryoshka_dims:
        weights["matryoshka_loss"] = config.nsp_loss_weight
    return weights


def forward_options(micro_batch: dict[str, Any], args: CoSupTrainingArguments, training: bool) -> dict[str, Any]:
    """
    Return the options of a micro-batch's forward, so that it computes only what the losses need.

    It returns no logits, which would be its largest tensor. Labels are smoothed in training alone: the NTP loss of an
    evaluation can be compared with any other.
    """
    return {
        "label_smoothing": args.label_smoothing_factor if training else 0.0,
        "output_query_embeds": args.supervision in ("co", "nsp"),
        "compute_nsp_loss": False,
        "return_logits": False,
    }


def token_losses(output: CoSupOutput, config: CoSupConfig, args: CoSupTrainingArguments) -> dict[str, torch.Tensor]:
    """
    Return the losses over the trained tokens of a micro-batch.

    Args:
        output (`CoSupOutput`): its `ntp_loss` is a sum over tokens, or `None` if the supervision has no labels.

    Returns:
        `dict[str, torch.FloatTensor]`: scalars with a graph, each a sum over tokens.
    """
    if output.ntp_loss is None:
        return {}
    return {"ntp_loss": output.ntp_loss}


def embedding_losses(
    batch: EmbeddingBatch, config: CoSupConfig, args: CoSupTrainingArguments
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """
    Return the losses over the embeddings of a batch.

    Returns:
        `(dict[str, torch.FloatTensor], torch.FloatTensor)`: each loss `(N,)`, one value per query, not averaged; and
        the scores `(N, M)` of every query with every passage, `-inf` for other passages that are not its negatives.
    """
    nsp_loss, scores = info_nce(
        batch.query_embeds,
        batch.passage_embeds,
        batch.passage_labels,
        same_passage=batch.same_passage,
        temperature=cast(float, config.temperature),  # the config has replaced None by the default of its similarity
        return_scores=True,
    )
    losses = {"nsp_loss": nsp_loss}
    if args.matryoshka_dims:
        losses["matryoshka_loss"] = matryoshka_loss(batch, config, args.matryoshka_dims)
    return losses, scores


def matryoshka_loss(batch: EmbeddingBatch, config: CoSupConfig, dims: Sequence[int]) -> torch.Tensor:
    """
    Return the NSP loss of embeddings that are cut to their first dimensions, mean over `dims`.

    It makes `CoSupConfig.truncate_dim` cheap: the first dimensions learn to do without the others (Matryoshka
    Representation Learning, arXiv 2205.13147).

    Returns:
        `torch.FloatTensor` of shape `(N,)`: one value per query.
    """
    losses = []
    for dim in dims:
        query_embeds, passage_embeds = batch.query_embeds[:, :dim], batch.passage_embeds[:, :dim]
        if config.similarity == "cosine":
            query_embeds, passage_embeds = F.normalize(query_embeds, dim=-1), F.normalize(passage_embeds, dim=-1)
        loss = info_nce(
            query_embeds,
            passage_embeds,
            batch.passage_labels,
            same_passage=batch.same_passage,
            temperature=cast(float, config.temperature),
        )
        losses.append(cast(torch.Tensor, loss))
    return torch.stack(losses).mean(0)


def total_loss(losses: Mapping[str, Loss], weights: Mapping[str, float]) -> Loss:
    """Return the weighted sum of losses; a loss without a weight is a `KeyError`."""
    return sum(weights[name] * loss for name, loss in losses.items())  # type: ignore[return-value]  # int if empty


# ---------------------------------------------------------------------- the embeddings of a batch


def embedding_batch(
    query_embeds: torch.Tensor,
    passage_embeds: torch.Tensor,
    passage_labels: torch.Tensor,
    batch: GlobalBatch,
    gather: str = "global",
) -> EmbeddingBatch:
    """
    Gather the passages of all ranks for the queries of this rank.

    Args:
        query_embeds (`torch.FloatTensor` of shape `(N, h)`): of this rank.
        passage_embeds (`torch.FloatTensor` of shape `(M_r, h)`): of this rank.
        passage_labels (`torch.LongTensor` of shape `(N,)`): rows of this rank's `passage_embeds`.
        batch ([`GlobalBatch`]): which passages are the same.
        gather (`str`, *optional*, defaults to `"global"`): see [`~trainer.distributed.gather_rows`].
    """
    passage_embeds = gather_rows(passage_embeds, batch.passage_counts, gather)  # (M, h)
    labels = passage_labels + batch.first_row  # (N,)
    same_passage = None
    if batch.repeated.any() or batch.further_positives.size:
        same_passage = _same_passage(labels, batch, query_embeds.device)
    return EmbeddingBatch(query_embeds, passage_embeds, labels, same_passage)


def _same_passage(labels: torch.Tensor, batch: GlobalBatch, device: torch.device) -> torch.Tensor:
    """Return `(N, M)`: which passages are not negatives of each query, whose positive is in row `labels` `(N,)`."""
    arrays = [torch.from_numpy(array) for array in (batch.passage_groups, batch.repeated, batch.further_positives)]
    if device.type != "cpu":
        arrays = [array.pin_memory() for array in arrays]
    groups, repeated, pairs = (array.to(device, non_blocking=True) for array in arrays)  # (M,), (M,), (2, P)
    same_passage = (groups[labels][:, None] == groups) | repeated  # of identical passages only one is a negative
    same_passage[pairs[0], pairs[1]] = True
    return same_passage


def finite_queries(losses: torch.Tensor, batch: EmbeddingBatch) -> torch.Tensor:
    """
    Return which queries do not cause a loss that is NaN or infinite.

    One NaN embedding makes the loss of every query NaN, so find the queries and positives that it comes from.

    Args:
        losses (`torch.FloatTensor` of shape `(N,)`): of each query.
        batch ([`EmbeddingBatch`]): the embeddings that the losses were computed from.

    Returns:
        `torch.BoolTensor` of shape `(N,)`.
    """
    finite_query = batch.query_embeds.detach().isfinite().all(1)
    finite_positive = batch.passage_embeds.detach()[batch.passage_labels].isfinite().all(1)
    finite_embeds = torch.stack([finite_query, finite_positive]).all(0)
    return torch.where(finite_embeds.all(), losses.detach().isfinite(), finite_embeds)


# ---------------------------------------------------------------------- the log


class RunningFigures:
    """
    The figures of the next log, as sums over the steps since the last log.

    The sums stay on the device until [`~RunningFigures.averages`] is called.

    A figure for which nothing was there to be measured (no label, no query, no negative) is left out, never 0.

    Args:
        loss_names (`Iterable[str]`): names of the losses that are trained.

    Attributes:
        steps (`int`): optimiser steps since the last log.
        has_losses (`bool`): whether any loss was measured, since the last log or before.
    """

    def __init__(self, loss_names: Iterable[str]) -> None:
        self._loss_names = list(loss_names)
        self.has_losses = False
        self.restart()

    def restart(self) -> None:
        """Set all sums to zero and restart the clock."""
        self.steps = 0
        self._losses: dict[str, torch.Tensor | float] = dict.fromkeys(self._loss_names, 0.0)
        self._steps_of_loss: dict[str, set[int]] = {name: set() for name in self._loss_names}
        self._queries = 0
        self._compared: torch.Tensor | float = 0.0  # queries that have a negative
        self._tokens = 0
        self._padded_tokens = 0
        self._correct: torch.Tensor | float = 0.0
        self._negatives: torch.Tensor | float = 0.0
        self._began = time.time()

    def add_step(self) -> None:
        """Count an optimiser step."""
        self.steps += 1

    def add_batch(self, facts: BatchFacts) -> None:
        """Add the token counts of a batch."""
        self._tokens += facts.num_tokens
        self._padded_tokens += facts.num_padded_tokens

    def add_losses(self, losses: dict[str, torch.Tensor]) -> None:
        """
        Add this rank's share of the losses of a batch or a micro-batch, by name.

        All ranks must add the same losses in a step: those that any rank can measure.
        """
        for name, loss in losses.items():
            # a trial of a search may train a loss that was not trained before
            self._losses[name] = self._losses.get(name, 0.0) + loss.detach().float()
            self._steps_of_loss.setdefault(name, set()).add(self.steps)
            self.has_losses = True

    def add_scores(self, scores: torch.Tensor, labels: torch.Tensor) -> None:
        """
        Add how queries retrieve within their batch.

        Args:
            scores (`torch.FloatTensor` of shape `(N, M)`): of queries with passages, `-inf` for other passages that
                are not negatives.
            labels (`torch.LongTensor` of shape `(N,)`): the row of each query's positive.
        """
        self._queries += len(labels)
        if not scores.numel():
            return
        scores = scores.detach()
        positives = scores.gather(1, labels[:, None])  # (N, 1)
        negatives = scores.scatter(1, labels[:, None], float("-inf"))  # (N, M)
        are_negatives = negatives > float("-inf")  # (N, M)
        compared = are_negatives.any(1)  # (N,); without a negative there is nothing to be right about
        self._correct += (compared & (positives[:, 0] > negatives.amax(1))).sum()  # a tie is a miss
        self._compared += compared.sum()
        self._negatives += are_negatives.sum()

    def leave_out(self, seconds: float) -> None:
        """Do not count these seconds as training time."""
        self._began += seconds

    def averages(
        self, device: torch.device, sum_over_ranks: Callable[[torch.Tensor], torch.Tensor]
    ) -> dict[str, float]:
        """
        Return the figures of all ranks since [`~RunningFigures.restart`], by name.

        A loss is the mean over the steps in which it was measured. `nsp_accuracy` is over the queries that have a
        negative, `num_negatives` over all queries.

        Args:
            device (`torch.device`): on which the sums of ranks are added.
            sum_over_ranks (`Callable`): takes and returns a tensor of shape `(K,)`.
        """
        sums = {
            **self._losses,
            "tokens": self._tokens,
            "padded_tokens": self._padded_tokens,
            "queries": self._queries,
            "compared": self._compared,
            "correct": self._correct,
            "negatives": self._negatives,
        }
        local = torch.stack([torch.as_tensor(value, dtype=torch.float64, device=device) for value in sums.values()])
        totals = dict(zip(sums, sum_over_ranks(local).tolist(), strict=True))
        figures = {}
        for name, steps in self._steps_of_loss.items():
            if steps:
                figures[name] = totals[name] / len(steps)
        if totals["compared"]:
            figures["nsp_accuracy"] = totals["correct"] / totals["compared"]
        if totals["queries"]:
            figures["num_negatives"] = totals["negatives"] / totals["queries"]
        figures["tokens_per_second"] = totals["tokens"] / max(1e-9, time.time() - self._began)
        if totals["padded_tokens"]:
            figures["padding"] = 1 - totals["tokens"] / totals["padded_tokens"]
        return figures
