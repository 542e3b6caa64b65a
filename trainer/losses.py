"""
The losses that are trained, by name.

There are two kinds of losses, because GradCache computes them at different times (see `grad_cache`):

- Token losses depend on Gen's output for one micro-batch. Each is a sum over trained tokens, such as `ntp_loss`
  (Eq. 2).
- Embedding losses depend on the embeddings of the whole batch, over all ranks. Each has one value per query, such as
  `nsp_loss` (Eq. 4) and, with `matryoshka_dims`, `matryoshka_loss`. `distillation_loss` has one for each query that
  has candidates in place of a passage.

Neither kind is averaged here: the caller knows the token and query counts of all ranks.

To add a loss, add it to `token_losses` or to `embedding_losses`, its weight to `loss_weights`, and what it needs from
the model to `forward_options`. Its name must end in `_loss`: logs, evaluation, model cards and plots find it by that.
Its label goes into `judging/figures.py`. To add one without editing this package, override `loss_weights`,
`token_losses` or `embedding_losses` in a subclass of [`CoSupTrainer`]; see docs/extending.md.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import torch
import torch.nn.functional as F

from modeling_cosup import CoSupConfig, CoSupOutput, info_nce
from modeling_cosup.loss_cosup import similarity_scores

from .candidate_watch import FLATNESS
from .distillation import attention_target, distillation_loss, perplexity_target
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
        reverse ([`ReverseBatch`], *optional*): for `reverse_nsp_loss`.
    """

    query_embeds: torch.Tensor
    passage_embeds: torch.Tensor
    passage_labels: torch.Tensor
    same_passage: torch.Tensor | None = None
    reverse: "ReverseBatch | None" = None


@dataclass
class ReverseBatch:
    """
    The queries among which each positive of an [`EmbeddingBatch`] looks for its own query.

    Args:
        query_embeds (`torch.FloatTensor` of shape `(Q, h)`): of all ranks.
        query_labels (`torch.LongTensor` of shape `(N,)`): the row of `query_embeds` that holds each query.
        same_query (`torch.BoolTensor` of shape `(N, Q)`): which queries are not negatives of a query's positive,
            because the positive is right for them too.
    """

    query_embeds: torch.Tensor
    query_labels: torch.Tensor
    same_query: torch.Tensor


@dataclass
class DistilledBatch:
    """
    The distilled queries of one rank. Their candidates are among the passages of the same rank.

    Args:
        query_embeds (`torch.FloatTensor` of shape `(N, h)`), passage_embeds (`torch.FloatTensor` of shape `(M_r, h)`):
            of this rank.
        candidate_rows (`torch.LongTensor` of shape `(N, K)`): rows of `passage_embeds`, -1 for none.
        candidate_scores (`torch.FloatTensor` of shape `(N, K)`): the reader's scores: shares of its attention, or
            log-likelihoods of the answer.
    """

    query_embeds: torch.Tensor
    passage_embeds: torch.Tensor
    candidate_rows: torch.Tensor
    candidate_scores: torch.Tensor


@dataclass
class Distributions:
    """
    The two distributions that a distillation compares, over the candidates of each distilled query.

    Both are `torch.FloatTensor` of shape `(N, K)`, without a graph.

    Args:
        target: the reader's; 0 where there is no candidate.
        student_log_probs: the retriever's; 0 where there is no candidate.
        mask (`torch.BoolTensor`): where there is a candidate.
    """

    target: torch.Tensor
    student_log_probs: torch.Tensor
    mask: torch.Tensor

    def figures(self) -> dict[str, torch.Tensor]:
        """Return figures of each query, `(N,)`, by name; entropies are in nats."""
        target_entropy = -torch.xlogy(self.target, self.target).sum(1)
        student_entropy = -(self.student_log_probs.exp() * self.student_log_probs).sum(1)
        return {
            "target_entropy": target_entropy,
            "student_entropy": student_entropy,
            "target_max": self.target.amax(1),
            FLATNESS: target_entropy / self.mask.sum(1).log(),
        }


# ---------------------------------------------------------------------- what is trained


def loss_weights(config: CoSupConfig, args: CoSupTrainingArguments) -> dict[str, float]:
    """Return the weight of each loss in the total that is minimised, L = L_NTP + λ·L_NSP (Eq. 5)."""
    assert config.nsp_loss_weight is not None  # the config has replaced None by the default of its similarity
    weights = {"ntp_loss": 1.0, "nsp_loss": config.nsp_loss_weight}
    if args.symmetric_nsp:
        weights["nsp_loss"] = weights["reverse_nsp_loss"] = config.nsp_loss_weight / 2
    if args.matryoshka_dims:
        weights["matryoshka_loss"] = config.nsp_loss_weight
    if args.distills:
        weights["distillation_loss"] = config.nsp_loss_weight
    return weights


def forward_options(micro_batch: dict[str, Any], args: CoSupTrainingArguments, training: bool) -> dict[str, Any]:
    """
    Return the options of a micro-batch's forward, so that it computes only what the losses need.

    The forward returns no logits, which would be its largest tensor. Labels are smoothed only in training, so that the
    NTP losses of evaluations can be compared.
    """
    return {
        "label_smoothing": args.label_smoothing_factor if training else 0.0,
        "output_query_embeds": "nsp_positions" in micro_batch,
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
    if batch.reverse is not None:
        losses["reverse_nsp_loss"] = reverse_nsp_loss(batch, batch.reverse, config)
    if args.matryoshka_dims:
        losses["matryoshka_loss"] = matryoshka_loss(batch, config, args.matryoshka_dims)
    return losses, scores


def reverse_nsp_loss(batch: EmbeddingBatch, reverse: ReverseBatch, config: CoSupConfig) -> torch.Tensor:
    """
    Return the cross-entropy of each query's positive over all queries: the other direction of [`info_nce`].

    Returns:
        `torch.FloatTensor` of shape `(N,)`: one value per query.
    """
    loss = info_nce(
        batch.passage_embeds[batch.passage_labels],
        reverse.query_embeds,
        reverse.query_labels,
        same_passage=reverse.same_query,
        temperature=cast(float, config.temperature),
    )
    return cast(torch.Tensor, loss)


def matryoshka_loss(batch: EmbeddingBatch, config: CoSupConfig, dims: Sequence[int]) -> torch.Tensor:
    """
    Return the NSP loss of embeddings that are cut to their first dimensions, the mean over `dims`.

    With it, `CoSupConfig.truncate_dim` costs little: the first dimensions learn to do without the others (Matryoshka
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


def distillation_losses(
    batch: DistilledBatch, config: CoSupConfig, args: CoSupTrainingArguments
) -> tuple[torch.Tensor, Distributions]:
    """
    Return KL(target ‖ student) of each distilled query; its target has no graph.

    The student is the softmax, over the candidates, of the scores that [`info_nce`] would take.

    Returns:
        `(torch.FloatTensor, Distributions)`: the losses `(N,)`, not averaged, and what they compare.
    """
    mask = batch.candidate_rows >= 0  # (N, K)
    return losses_of_scores(student_scores(batch, config), batch.candidate_scores, mask, args)


def student_scores(batch: DistilledBatch, config: CoSupConfig) -> torch.Tensor:
    """Return the retriever's scores of the candidates of each distilled query, `(N, K)`."""
    temperature = cast(float, config.temperature)  # the config has replaced None by the default of its similarity
    all_scores = similarity_scores(batch.query_embeds, batch.passage_embeds, temperature)  # (N, M_r)
    return all_scores.gather(1, batch.candidate_rows.clamp(min=0))


def losses_of_scores(
    scores: torch.Tensor, candidate_scores: torch.Tensor, mask: torch.Tensor, args: CoSupTrainingArguments
) -> tuple[torch.Tensor, Distributions]:
    """
    Return what [`distillation_losses`] returns, given the retriever's scores.

    Args:
        scores (`torch.FloatTensor` of shape `(N, K)`): the retriever's, see [`student_scores`].
        candidate_scores (`torch.FloatTensor` of shape `(N, K)`): the reader's.
        mask (`torch.BoolTensor` of shape `(N, K)`): `True` for candidates.
        args ([`CoSupTrainingArguments`]): say which target.
    """
    log_probs = scores.detach().masked_fill(~mask, -torch.inf).log_softmax(-1).masked_fill(~mask, 0.0)
    name, target_temperature = args.target
    if args.supervision == "attention_distillation":
        target = attention_target(candidate_scores, mask, target_temperature)
    else:
        target = perplexity_target(candidate_scores, mask, target_temperature, name, log_probs)
    return distillation_loss(scores, target, mask), Distributions(target, log_probs, mask)


def total_loss(losses: Mapping[str, Loss], weights: Mapping[str, float]) -> Loss:
    """Return the weighted sum of losses; a loss without a weight is a `KeyError`."""
    return sum(weights[name] * loss for name, loss in losses.items())  # type: ignore[return-value]  # int if empty


# ---------------------------------------------------------------------- the embeddings of a batch


def embedding_batch(
    query_embeds: torch.Tensor,
    passage_embeds: torch.Tensor,
    passage_labels: torch.Tensor,
    batch: GlobalBatch,
    args: CoSupTrainingArguments,
) -> EmbeddingBatch:
    """
    Gather the passages of all ranks for the queries of this rank.

    Args:
        query_embeds (`torch.FloatTensor` of shape `(N, h)`): of this rank.
        passage_embeds (`torch.FloatTensor` of shape `(M_r, h)`): of this rank.
        passage_labels (`torch.LongTensor` of shape `(N,)`): rows of this rank's `passage_embeds`.
        batch ([`GlobalBatch`]): which passages are the same.
        args ([`CoSupTrainingArguments`]): `gather`, `nsp_gradient`, and `symmetric_nsp`, which gathers queries too.
    """
    query_embeds, passage_embeds = _taught_by_nsp(query_embeds, passage_embeds, args.nsp_gradient)
    passage_embeds = gather_rows(passage_embeds, batch.passage_counts, args.gather)  # (M, h)
    labels = passage_labels + batch.first_row  # (N,)
    same_passage = None
    if batch.repeated.any() or batch.further_positives.size:
        same_passage = _same_passage(labels, batch, query_embeds.device)
    reverse = None
    if args.symmetric_nsp:
        all_query_embeds = gather_rows(query_embeds, batch.query_counts, args.gather)  # (Q, h)
        reverse = reverse_batch(all_query_embeds, batch, len(query_embeds))
    return EmbeddingBatch(query_embeds, passage_embeds, labels, same_passage, reverse)


def _taught_by_nsp(
    query_embeds: torch.Tensor, passage_embeds: torch.Tensor, nsp_gradient: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Return the embeddings, with constants in place of those that `nsp_gradient` keeps the gradient from.

    A constant keeps a graph, with gradient 0: DDP and FSDP expect a gradient of every weight.
    """
    if nsp_gradient == "gen":
        passage_embeds = passage_embeds.detach() + 0 * passage_embeds
    elif nsp_gradient == "emb_seq":
        query_embeds = query_embeds.detach() + 0 * query_embeds
    return query_embeds, passage_embeds


def reverse_batch(query_embeds: torch.Tensor, batch: GlobalBatch, num_queries: int) -> ReverseBatch:
    """
    Return the queries `(Q, h)` of all ranks as the positives of this rank's `num_queries` queries see them.

    Args:
        query_embeds (`torch.FloatTensor` of shape `(Q, h)`): of all ranks.
        batch ([`GlobalBatch`]): which passages are right for which queries.
        num_queries (`int`): N, of this rank.
    """
    labels = batch.first_query + torch.arange(num_queries, device=query_embeds.device)  # (N,)
    same_query = torch.zeros(num_queries, len(query_embeds), dtype=torch.bool)
    same_query[tuple(torch.from_numpy(batch.queries_of_positives))] = True
    return ReverseBatch(query_embeds, labels, same_query.to(query_embeds.device))


def distilled_batch(
    inputs: Mapping[str, Any], query_embeds: torch.Tensor, passage_embeds: torch.Tensor
) -> DistilledBatch:
    """
    Return the distilled queries of this rank's batch.

    Args:
        inputs (`dict`): the batch, as [`CoSupDataCollator`] returns it.
        query_embeds (`torch.FloatTensor` of shape `(Q, h)`), passage_embeds (`torch.FloatTensor` of shape `(M_r, h)`):
            of all its micro-batches.
    """
    distilled = query_embeds[inputs["distilled_query_rows"]]
    return DistilledBatch(distilled, passage_embeds, inputs["candidate_rows"], inputs["candidate_scores"])


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
