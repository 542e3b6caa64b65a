"""
What a reader teaches a retriever (arXiv 2402.11794; Atlas, arXiv 2208.03299).

1. The reader reads K passages of an instance; `reader_scores` measures how useful each one was for the answer.
2. [`attention_target`] and [`perplexity_target`] turn these scores into a distribution over the passages.
3. [`distillation_loss`] pulls the retriever's distribution towards this target. The target has no gradient.
"""

from collections.abc import Sequence

import torch

PERPLEXITY_KINDS = ("perplexity", "leave_one_out", "emdr")


def attention_target(shares: torch.Tensor, mask: torch.Tensor, temperature: float | None) -> torch.Tensor:
    """
    Return the distribution over passages that the reader's attention teaches.

    Shares are nearly flat, and teach a retriever that all passages are alike: a low temperature sharpens them.

    Args:
        shares (`torch.FloatTensor` of shape `(B, K)`): as [`attention_shares`] returns them.
        mask (`torch.BoolTensor` of shape `(B, K)`): `True` for passages.
        temperature (`float`, *optional*): the target is `softmax(shares / temperature)`; `None` leaves the shares as
            they are (Eq. 1 of arXiv 2402.11794).

    Returns:
        `torch.FloatTensor` of shape `(B, K)`: each row sums to 1, 0 outside of the mask; no gradient.

    Raises:
        `FloatingPointError`: if a share is not finite.
        `ValueError`: for a row without passages, or a temperature that is not positive.
    """
    if temperature is not None:
        return _softmax(shares, mask, temperature, "attention shares")
    _check_scores(shares, mask, "attention shares")
    kept = shares.detach().float() * mask
    return kept / kept.sum(1, keepdim=True)


def perplexity_target(
    log_likelihoods: torch.Tensor,
    mask: torch.Tensor,
    temperature: float | None,
    kind: str = "perplexity",
    student_log_probs: torch.Tensor | None = None,
) -> torch.Tensor:
    """
    Return the distribution over passages that the likelihood of the answer teaches (Atlas, section 2.2).

    Args:
        log_likelihoods (`torch.FloatTensor` of shape `(B, K)`): as [`answer_log_likelihoods`] returns them.
        mask (`torch.BoolTensor` of shape `(B, K)`): `True` for passages.
        temperature (`float`, *optional*): divides the log-likelihoods; `None` leaves them as they are.
        kind (`str`, *optional*, defaults to `"perplexity"`):

            - `"perplexity"`: the likelier a passage alone makes the answer, the better it is.
            - `"leave_one_out"`: the less likely the answer is without a passage, the better the passage is. Needs
              log-likelihoods with `leave_one_out=True`.
            - `"emdr"`: the posterior p(passage | answer), with the retriever's distribution as prior. With sums as
              log-likelihoods and no temperature, the gradient of [`distillation_loss`] is that of EMDR's loss
              -log Σ p(passage)·p(answer | passage) (arXiv 2106.05346).
        student_log_probs (`torch.FloatTensor` of shape `(B, K)`, *optional*): the retriever's, for `"emdr"`.

    Returns:
        `torch.FloatTensor` of shape `(B, K)`: each row sums to 1, 0 outside of the mask; no gradient.

    Raises:
        `FloatingPointError`: if a score is not finite.
        `ValueError`: for an unknown kind, `"emdr"` without the retriever's distribution, a row without passages, or a
            temperature that is not positive.
    """
    if kind not in PERPLEXITY_KINDS:
        raise ValueError(f"kind is {kind!r}, expected one of {', '.join(PERPLEXITY_KINDS)}.")
    scores = log_likelihoods.detach().float()
    if temperature is None:
        temperature = 1.0
    if kind == "leave_one_out":
        scores = -scores
    if kind == "emdr":
        if student_log_probs is None:
            raise ValueError("kind='emdr' needs student_log_probs, the retriever's distribution.")
        # times the temperature, by which all scores are divided below: the prior stays as it is
        scores = scores + temperature * student_log_probs.detach().float().masked_fill(~mask, 0.0)
    return _softmax(scores, mask, temperature, "log-likelihoods of the answer")


def distillation_loss(student_scores: torch.Tensor, target: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """
    Return KL(target ‖ student) of each query over its candidates.

    Args:
        student_scores (`torch.Tensor` of shape `(N, K)`): of a query with its candidates, divided by the temperature
            of the retriever; the student's distribution is their softmax.
        target (`torch.Tensor` of shape `(N, K)`): each row sums to 1; it gets no gradient.
        mask (`torch.BoolTensor` of shape `(N, K)`): `True` for candidates.

    Returns:
        `torch.FloatTensor` of shape `(N,)`: in nats, not averaged, since the caller knows the global count.
    """
    target = target.detach().float()
    log_probs = student_scores.float().masked_fill(~mask, -torch.inf).log_softmax(-1)
    log_probs = log_probs.masked_fill(~mask, 0.0)  # 0 · -inf is NaN
    return (torch.xlogy(target, target) - target * log_probs).sum(-1)


def _softmax(scores: torch.Tensor, mask: torch.Tensor, temperature: float, what: str) -> torch.Tensor:
    """Return the softmax of `scores / temperature` over the passages of each row."""
    if not temperature > 0:
        raise ValueError(f"temperature is {temperature}, expected a positive number.")
    _check_scores(scores, mask, what)
    return (scores.detach().float() / temperature).masked_fill(~mask, -torch.inf).softmax(-1)


def _check_scores(scores: torch.Tensor, mask: torch.Tensor, what: str) -> None:
    """Raise for a row without passages, or with a score that is not finite."""
    empty = (~mask.any(-1)).nonzero()[:, 0].tolist()
    if empty:
        raise ValueError(f"Row {empty[0]} has no passages, so there is no distribution over them.")
    check_finite(scores.masked_fill(~mask, 0.0), what)


def check_finite(scores: torch.Tensor, what: str, names: Sequence[str] | None = None) -> None:
    """Raise `FloatingPointError` if one of the scores `(B, K)` is NaN or infinite, naming its row."""
    rows = (~scores.isfinite()).any(-1).nonzero()[:, 0].tolist()
    if rows:
        name = f"row {rows[0]}" if names is None else names[rows[0]]
        raise FloatingPointError(
            f"The {what} of {name} are NaN or infinite ({len(rows)} of {len(scores)} rows): the reader's weights or"
            " states are not finite, or no position of the answer sees a passage."
        )
