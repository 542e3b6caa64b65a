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
    The part of a [`Decoder`] between logits and decisions. Scores are in slot order, `(n, V)`; processors and criteria know the rows in the order of the batch.

    Attributes:
        processors (`LogitsProcessorList`): of the call.
        prompt_length (`int`): columns from which decoded tokens are counted.
        rows (`list`), columns, generated (`numpy.ndarray`), tokens (`torch.LongTensor`): by slot; see [`Decoder`].
        order (`torch.LongTensor` of shape `(n,)`, *optional*): the row of the batch in each slot, once a row has left; `None` while both orders are the same.
        never (`torch.LongTensor`): ids that no row may decide. banned (`numpy.ndarray` of bool): slots whose next decision may not be `[NSP]`.
    """

    def _without_banned(self, scores):
        """Scores `(n, V)` without `[Cs]`, and without `[NSP]` where a row may not retrieve."""
        scores.index_fill_(1, self.never, float("-inf"))
        if self.banned[: len(scores)].any():
            scores[:, self.config.nsp_token_id].masked_fill_(self.banned_on_device[: len(scores)], float("-inf"))
        return scores

    def _process(self, scores):
        """Scores `(n, V)` after the logits processors, each of which sees the rows as if they had been alone: their own tokens, padded on the left."""
        history, generated = None, self.generated[: len(self.rows)]
        for processor in self.processors:
            if type(processor) in _COUNTING:
                if type(processor) in _MINIMUM and self.prompt_length + generated.min() >= _minimum(processor):
                    continue
                for count in np.unique(generated):
                    slots = torch.from_numpy(np.flatnonzero(generated == count)).to(self.device)
                    counted = scores.new_zeros((1, 1), dtype=torch.long).expand(len(slots), self.prompt_length + int(count))
                    scores[slots] = processor(counted, scores[slots])
                continue
            if type(processor) in _SCORES_ONLY:
                scores = processor(self.tokens[: len(scores), None], scores)
                continue
            if history is None:
                history = self._history()
            if isinstance(getattr(processor, "prompt_ignore_length", None), torch.Tensor):  # how much padding stands before each row
                lengths = self._places(torch.from_numpy(self.columns[: len(self.rows)].copy()).to(self.device))
                processor.prompt_ignore_length = history.shape[1] - lengths
            scores = self._places(processor(history, self._places(scores)), back=True)
        return scores

    def _history(self, tokens=None):
        """What each row holds, in the order of the batch, padded on the left: `(B, T)`; with `tokens` they are the last column."""
        n = len(self.rows)
        lengths = torch.from_numpy(self.columns[:n].copy()).to(self.device)[:, None]
        width = int(self.columns[:n].max())
        columns = torch.arange(width, device=self.device) - (width - lengths)
        history = self.cache.tokens[:n].gather(1, columns.clamp(min=0)).masked_fill_(columns < 0, self.pad)
        if tokens is not None:
            history = torch.cat([history, tokens[:, None]], 1)
        return self._places(history, fill=self.pad)

    def _places(self, values, back=False, fill=0):
        """Slot order to the order of the whole batch, as processors and criteria know it (rows that have left are `fill`), or back."""
        if self.order is None:
            return values
        return values[self.order] if back else values.new_full((self.slots, *values.shape[1:]), fill).index_copy(0, self.order, values)


def _minimum(processor):
    """The length from which on a minimum-length processor has nothing to say."""
    if isinstance(processor, MinLengthLogitsProcessor):
        return processor.min_length
    return processor.prompt_length_to_skip + processor.min_new_tokens
