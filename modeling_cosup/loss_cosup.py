"""The two losses as pure functions: next token prediction in chunks, next sequence prediction over a global batch."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint


def similarity_scores(
    query_embeds: torch.Tensor, passage_embeds: torch.Tensor, temperature: float = 1.0
) -> torch.Tensor:
    """
    Return the scores of every query with every passage, in float32 even under autocast.

    Args:
        query_embeds (`torch.Tensor` of shape `(N, h)`): already of unit length if the similarity is the cosine.
        passage_embeds (`torch.Tensor` of shape `(M, h)`): likewise.
        temperature (`float`): divides the scores.

    Returns:
        `torch.FloatTensor` of shape `(N, M)`.
    """
    # under autocast even .float() @ .float() is computed in bf16, which rounds a score of 1,150 to a multiple of 8
    with torch.autocast(query_embeds.device.type, enabled=False):
        return query_embeds.float() @ passage_embeds.float().T / temperature


def info_nce(
    query_embeds: torch.Tensor,
    passage_embeds: torch.Tensor,
    passage_labels: torch.Tensor,
    same_passage: torch.Tensor | None = None,
    temperature: float = 1.0,
    return_scores: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """
    Return the next sequence prediction loss (Eq. 4): each query's cross-entropy over all passages of the global batch.

    Args:
        query_embeds (`torch.Tensor` of shape `(N, h)`): Gen's last hidden states at `[NSP]`.
        passage_embeds (`torch.Tensor` of shape `(M, h)`): Emb_seq's embeddings, of this rank and of all others.
        passage_labels (`torch.LongTensor` of shape `(N,)`): row of `passage_embeds` that is the positive of each
            query; -100 for none.
        same_passage (`torch.BoolTensor` of shape `(N, M)`, *optional*): passages that are not negatives of a query:
            further positives, and repetitions. The positive itself may be marked too.
        temperature (`float`): divides the scores; 1.0 is the paper's.
        return_scores (`bool`): also return the scores that enter the softmax.

    Returns:
        `torch.FloatTensor` of shape `(N,)`: one loss per query, not reduced, since the caller knows the global count;
            0 if the label is -100. With `return_scores` also the scores `(N, M)`, `-inf` for passages left out.
    """
    scores = similarity_scores(query_embeds, passage_embeds, temperature)  # (N, M)
    if same_passage is not None:
        left_out = same_passage & (torch.arange(scores.shape[1], device=scores.device) != passage_labels[:, None])
        scores = scores.masked_fill(left_out, float("-inf"))  # a duplicate of the positive must not be pushed away
    losses = F.cross_entropy(scores, passage_labels, reduction="none", ignore_index=-100)
    if return_scores:
        return losses, scores
    return losses


def chunked_cross_entropy(
    hidden_states: torch.Tensor,
    labels: torch.Tensor,
    lm_head: Callable[[torch.Tensor], torch.Tensor],
    chunk_size: int = 2048,
    label_positions: torch.Tensor | None = None,
    label_smoothing: float = 0.0,
) -> torch.Tensor:
    """
    Return the next token prediction loss (Eq. 2), with logits only at labels, `chunk_size` positions at a time.

    The full logits `(B, T, V)` are the largest tensor of a training step; here at most `(chunk_size, V)` is alive.
    With more than one chunk, the logits are computed again in the backward pass.

    Args:
        hidden_states (`torch.Tensor` of shape `(B, T, h)`): Gen's last hidden states.
        labels (`torch.LongTensor` of shape `(B, T)`): token ids, -100 where nothing is trained; shifted here, not by
            the caller.
        lm_head (`Callable`): maps `(K, h)` to logits `(K, V)`.
        chunk_size (`int`): positions per chunk.
        label_positions (`torch.LongTensor` of shape `(K,)`, *optional*): positions in the flattened `(B · T)` whose
            next token is trained. A caller that knows them saves the host from waiting for the GPU.
        label_smoothing (`float`): share of the target that is spread evenly over the vocabulary.

    Returns:
        `torch.FloatTensor` scalar: the sum over all labels, not the mean, since the caller knows the global count;
            without labels a 0 that still has a gradient.
    """
    if label_positions is None:
        label_positions = F.pad(labels[:, 1:] != -100, (0, 1)).flatten().nonzero()[:, 0]
    hidden = hidden_states.flatten(0, 1)[label_positions.to(hidden_states.device)]  # (K, h)
    targets = labels.flatten()[label_positions + 1]  # (K,)

    def chunk_loss(chunk: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(lm_head(chunk).float(), target, reduction="sum", label_smoothing=label_smoothing)

    if hidden.shape[0] <= chunk_size:
        return chunk_loss(hidden, targets)
    losses = []
    for chunk, target in zip(hidden.split(chunk_size), targets.split(chunk_size), strict=True):
        losses.append(checkpoint(chunk_loss, chunk, target, use_reentrant=False))
    return torch.stack(losses).sum()
