"""What logits processors and stopping criteria see of rows that differ in length and have changed places."""

import numpy as np
import torch
from transformers.generation import (
    EpsilonLogitsWarper,
    EtaLogitsWarper,
    ExponentialDecayLengthPenalty,
    ForcedBOSTokenLogitsProcessor,
    ForcedEOSTokenLogitsProcessor,
    InfNanRemoveLogitsProcessor,
    LogitNormalization,
    MinLengthLogitsProcessor,
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    SuppressTokensAtBeginLogitsProcessor,
    SuppressTokensLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

# these read nothing but how long a row is, and a passage is not to count
_COUNTING = (
    MinLengthLogitsProcessor,
    MinNewTokensLengthLogitsProcessor,
    ForcedBOSTokenLogitsProcessor,
    ForcedEOSTokenLogitsProcessor,
    ExponentialDecayLengthPenalty,
    SuppressTokensAtBeginLogitsProcessor,
)
_MINIMUM = (MinLengthLogitsProcessor, MinNewTokensLengthLogitsProcessor)
# these read nothing but the scores, so no history need be put together for them
_SCORES_ONLY = (
    EpsilonLogitsWarper,
    EtaLogitsWarper,
    InfNanRemoveLogitsProcessor,
    LogitNormalization,
    MinPLogitsWarper,
    SuppressTokensLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)


class RowScores:
    """
    What a decision is made from: the scores of each row's next token, and whether a stopping criterion ends it.

    Scores are by slot, `(n, V)`; processors and criteria know the rows in the order of the batch.

    Args:
        settings ([`DecodingSettings`]), slots ([`Slots`]), cache ([`RowCache`]): of the loop.
        nsp_token_id (`int`, *optional*): of `[NSP]`, which some rows may not decide.
    """

    def __init__(self, settings, slots, cache, nsp_token_id):
        self.settings, self.slots, self.cache, self.nsp_token_id = settings, slots, cache, nsp_token_id

    def of(self, logits):
        """Scores `(n, V)` in float32 of the logits `(n, V)` of the first n slots; where no row is, all are equal."""
        occupied = self.slots.occupied[: len(logits)]
        # before the warpers, since what top_p keeps must be allowed; after them, since they may put anything there
        scores = self._without_banned(logits.to(torch.float32, copy=True))
        scores = self._without_banned(self._process(scores))
        if not occupied.all():
            scores = scores.masked_fill(~self.slots.occupied_on_device[: len(logits), None], 0.0)  # any token will do
        return scores

    def stopped(self, tokens):
        """Which of the decided `tokens` `(n,)` end their row by a stopping criterion: `(n,)` of bool."""
        if not self.settings.criteria:
            return torch.zeros_like(tokens, dtype=torch.bool)
        history = self._history(tokens)
        verdicts = [criterion(history, None) for criterion in self.settings.criteria]
        return self._in_order(torch.stack(verdicts).any(0), back=True)

    def _without_banned(self, scores):
        """Scores `(n, V)` without `[Cs]`, and without `[NSP]` where a row may not retrieve."""
        scores.index_fill_(1, self.settings.never, float("-inf"))
        if self.slots.banned[: len(scores)].any():
            scores[:, self.nsp_token_id].masked_fill_(self.slots.banned_on_device[: len(scores)], float("-inf"))
        return scores

    def _process(self, scores):
        """Scores `(n, V)` after the logits processors, each of which sees every row as if it had been alone."""
        history = None
        for processor in self.settings.processors:
            if type(processor) in _COUNTING:
                self._process_by_count(processor, scores)
                continue
            if type(processor) in _SCORES_ONLY:
                scores = processor(self.slots.tokens[: len(scores), None], scores)
                continue
            if history is None:
                history = self._history()
            ignored = getattr(processor, "prompt_ignore_length", None)
            if isinstance(ignored, torch.Tensor):  # of each row: the padding before it
                processor.prompt_ignore_length = history.shape[1] - self._in_order(self.slots.lengths())
            scores = self._in_order(processor(history, self._in_order(scores)), back=True)
        return scores

    def _process_by_count(self, processor, scores):
        """Scores `(n, V)`, in place, after a processor that looks at nothing but how many tokens a row has."""
        generated = self.slots.generated[: len(scores)]
        if type(processor) in _MINIMUM and self.settings.prompt_length + generated.min() >= _minimum(processor):
            return
        for count in np.unique(generated):
            same = torch.from_numpy(np.flatnonzero(generated == count)).to(scores.device)
            length = self.settings.prompt_length + int(count)
            counted = scores.new_zeros((1, 1), dtype=torch.long).expand(len(same), length)
            scores[same] = processor(counted, scores[same])

    def _history(self, tokens=None):
        """Tokens of the rows, in the order of the batch, padded on the left: `(B, T)`; `tokens` are a last column."""
        n = len(self.slots)
        lengths = self.slots.lengths()[:, None]
        width = int(self.slots.columns[:n].max())
        columns = torch.arange(width, device=lengths.device) - (width - lengths)
        history = self.cache.tokens[:n].gather(1, columns.clamp(min=0)).masked_fill_(columns < 0, self.settings.pad)
        if tokens is not None:
            history = torch.cat([history, tokens[:, None]], 1)
        return self._in_order(history, fill=self.settings.pad)

    def _in_order(self, values, back=False, fill=0):
        """Values by slot, put in the order of the batch, where rows that have left are `fill`; or back."""
        order = self.slots.order
        if order is None:
            return values
        if back:
            return values[order]
        return values.new_full((self.slots.count, *values.shape[1:]), fill).index_copy(0, order, values)


def _minimum(processor):
    """The length from which on a minimum-length processor has nothing to say."""
    if isinstance(processor, MinLengthLogitsProcessor):
        return processor.min_length
    return processor.prompt_length_to_skip + processor.min_new_tokens
