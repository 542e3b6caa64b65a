"""
The losses that are trained, by name, and what the log shows of them.

There are two kinds, because GradCache computes them at different times (see `grad_cache`):

- token losses, of Gen's output for one micro-batch: a sum over its trained tokens. `ntp_loss` (Eq. 2) is one.
- embedding losses, of the embeddings of the whole batch, over all ranks: one value for each query. `nsp_loss` (Eq. 4)
  is one.

Neither kind is averaged here: the caller knows the token and query counts of all ranks.

To add a loss, add it to `token_losses` or to `embedding_losses`, its weight to `loss_weights`, and what it needs of
the model to `forward_options`. Its name ends in `_loss`: logs, evaluation, model cards and plots find it by that. Its
label goes into `judging/figures.py`.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from modeling_cosup import CoSupConfig, CoSupOutput, info_nce

from .batching import BatchFacts
from .distributed import gather_rows
from .duplicates import GlobalBatch
from .training_args import CoSupTrainingArguments


@dataclass
class EmbeddingBatch:
    """
    The embeddings of the batch that all ranks make up, as one rank's losses see them.

    Args:
        query_embeds (`torch.FloatTensor` of shape `(N, h)`): of this rank.
        passage_embeds (`torch.FloatTensor` of shape `(M, h)`): of all ranks.
        passage_labels (`torch.LongTensor` of shape `(N,)`): the row of `passage_embeds` that is the positive of each
            query.
        same_passage (`torch.BoolTensor` of shape `(N, M)`, *optional*): which passages are no negatives of a query.
    """

    query_embeds: torch.Tensor
    passage_embeds: torch.Tensor
    passage_labels: torch.Tensor
    same_passage: torch.Tensor | None = None


# ---------------------------------------------------------------------- what is trained


def loss_weights(config: CoSupConfig, args: CoSupTrainingArguments) -> dict[str, float]:
    """The weight of each loss in the one that is minimised, L = L_NTP + λ·L_NSP (Eq. 5)."""
    assert config.nsp_loss_weight is not None  # the config fills in what its similarity calls for
    return {"ntp_loss": 1.0, "nsp_loss": config.nsp_loss_weight}


def forward_options(micro_batch: dict[str, torch.Tensor], args: CoSupTrainingArguments) -> dict:
    """What the losses ask of the forward of a micro-batch; nothing else is computed. Logits are its largest tensor."""
    return {
        "output_query_embeds": args.supervision in ("co", "nsp"),
        "compute_nsp_loss": False,
        "return_logits": False,
    }


def token_losses(output: CoSupOutput, config: CoSupConfig, args: CoSupTrainingArguments) -> dict[str, torch.Tensor]:
    """
    The losses over the trained tokens of a micro-batch.

    Args:
        output (`CoSupOutput`): of Gen, with `ntp_loss`, a sum, where the supervision has labels.

    Returns:
        `dict[str, torch.FloatTensor]`: scalars, with a graph: sums over tokens.
    """
    return {} if output.ntp_loss is None else {"ntp_loss": output.ntp_loss}


def embedding_losses(
    batch: EmbeddingBatch, config: CoSupConfig, args: CoSupTrainingArguments
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """
    The losses over the embeddings of a batch.

    Returns:
        `(dict[str, torch.FloatTensor], torch.FloatTensor)`: of each loss `(N,)`, one value for each query, not
        reduced: the caller knows the global count; and the scores `(N, M)` of every query with every passage, `-inf`
        for what is no negative.
    """
    nsp_loss, scores = info_nce(
        batch.query_embeds,
        batch.passage_embeds,
        batch.passage_labels,
        batch.same_passage,
        config.temperature,
        return_scores=True,
    )
    return {"nsp_loss": nsp_loss}, scores


def total_loss(losses: Mapping[str, torch.Tensor | float], weights: Mapping[str, float]) -> torch.Tensor | float:
    """The weighted sum of losses; a loss without a weight is a `KeyError`."""
    return sum(weights[name] * loss for name, loss in losses.items())


# ---------------------------------------------------------------------- what embedding losses see


def embedding_batch(
    query_embeds: torch.Tensor,
    passage_embeds: torch.Tensor,
    passage_labels: torch.Tensor,
    batch: GlobalBatch,
    gather: str = "global",
) -> EmbeddingBatch:
    """
    This rank's queries, and the passages of all ranks.

    Args:
        query_embeds (`torch.FloatTensor` of shape `(N, h)`), passage_embeds (`torch.FloatTensor` of shape `(M_r, h)`):
            of this rank.
        passage_labels (`torch.LongTensor` of shape `(N,)`): rows of this rank's `passage_embeds`.
        batch ([`GlobalBatch`]): which passages are the same.
        gather (`str`): see [`~trainer.distributed.gather_rows`].
    """
    device = query_embeds.device
    passage_embeds = gather_rows(passage_embeds, batch.passage_counts, gather)  # (M, h)
    labels = passage_labels + batch.first_row  # (N,)
    same_passage = None
    if batch.repeated.any() or batch.no_negatives.size:
        arrays = [torch.from_numpy(array) for array in (batch.passage_groups, batch.repeated, batch.no_negatives)]
        if device.type != "cpu":
            arrays = [array.pin_memory() for array in arrays]
        groups, repeated, pairs = (array.to(device, non_blocking=True) for array in arrays)
        same_passage = (
            groups[labels][:, None] == groups
        ) | repeated  # (N, M): of identical passages one is a negative
        same_passage[pairs[0], pairs[1]] = True
    return EmbeddingBatch(query_embeds, passage_embeds, labels, same_passage)


def finite_queries(losses: torch.Tensor, batch: EmbeddingBatch) -> torch.Tensor:
    """
    Which queries are not at fault for a loss that is NaN or infinite: one NaN embedding is in every loss, so name the
    queries that it comes from.

    Args:
        losses (`torch.FloatTensor` of shape `(N,)`): of each query.

    Returns:
        `torch.BoolTensor` of shape `(N,)`.
    """
    queries = batch.query_embeds.detach().isfinite().all(1)
    positives = batch.passage_embeds.detach()[batch.passage_labels].isfinite().all(1)
    embeds = torch.stack([queries, positives]).all(0)
    return torch.where(embeds.all(), losses.detach().isfinite(), embeds)


# ---------------------------------------------------------------------- what the log shows


class RunningFigures:
    """
    What the next log shows: sums over the steps since the last one. They stay on the device until
    [`~RunningFigures.averages`] is asked for.

    Args:
        loss_names: of the losses that are trained.
    """

    def __init__(self, loss_names) -> None:
        self._loss_names = list(loss_names)
        self.restart()

    def restart(self) -> None:
        """Forget everything; the clock starts anew."""
        self._losses: dict[str, torch.Tensor | float] = dict.fromkeys(self._loss_names, 0.0)
        self.steps = self._queries = self._tokens = self._padded_tokens = 0
        self._correct: torch.Tensor | float = 0.0
        self._negatives: torch.Tensor | float = 0.0
        self._began = time.time()

    def add_step(self) -> None:
        """An optimiser step begins."""
        self.steps += 1

    def add_batch(self, facts: BatchFacts) -> None:
        """The tokens of a batch."""
        self._tokens += facts.num_tokens
        self._padded_tokens += facts.num_padded_tokens

    def add_losses(self, losses: dict[str, torch.Tensor]) -> None:
        """This rank's share of the losses of a batch or a micro-batch, by name."""
        for name, loss in losses.items():
            self._losses[name] += loss.detach().float()

    def add_scores(self, scores: torch.Tensor, labels: torch.Tensor) -> None:
        """
        The scores `(N, M)` of queries with passages, `-inf` for what is no negative, and the row `(N,)` of each
        query's positive.
        """
        self._queries += len(labels)
        if not scores.numel():
            return
        scores = scores.detach()
        negatives = scores.scatter(1, labels[:, None], float("-inf"))
        self._correct += (scores.gather(1, labels[:, None])[:, 0] > negatives.amax(1)).sum()  # a tie is a miss
        self._negatives += (negatives > float("-inf")).sum()

    def leave_out(self, seconds: float) -> None:
        """Time that was no training."""
        self._began += seconds

    def averages(self, device: torch.device, sum_over_ranks: Callable) -> dict[str, float]:
        """
        The figures of all ranks since [`~RunningFigures.restart`], by name.

        Args:
            device (`torch.device`): on which ranks add up.
            sum_over_ranks (`Callable`): of a tensor of shape `(K,)`.
        """
        sums = {**self._losses, "tokens": self._tokens, "padded_tokens": self._padded_tokens}
        sums |= {"queries": self._queries, "correct": self._correct, "negatives": self._negatives}
        local = torch.stack([torch.as_tensor(value, dtype=torch.float64, device=device) for value in sums.values()])
        totals = dict(zip(sums, sum_over_ranks(local).tolist(), strict=True))
        figures = {name: totals[name] / max(1, self.steps) for name in self._losses}
        queries = max(1, totals["queries"])
        figures["nsp_accuracy"] = totals["correct"] / queries
        figures["num_negatives"] = totals["negatives"] / queries
        figures["tokens_per_second"] = totals["tokens"] / max(1e-9, time.time() - self._began)
        figures["padding"] = 1 - totals["tokens"] / max(1, totals["padded_tokens"])
        return figures
