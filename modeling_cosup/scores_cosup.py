"""Logits processors and stopping criteria for rows that differ in length and have changed places."""

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
    LogitsProcessor,
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

from .cache_cosup import RowCache
from .settings_cosup import DecodingSettings
from .slots_cosup import Slots

# these depend only on the length of a row, in which passages must not count
_COUNTING = (
    MinLengthLogitsProcessor,
    MinNewTokensLengthLogitsProcessor,
    ForcedBOSTokenLogitsProcessor,
    ForcedEOSTokenLogitsProcessor,
    ExponentialDecayLengthPenalty,
    SuppressTokensAtBeginLogitsProcessor,
)
_MINIMUM = (MinLengthLogitsProcessor, MinNewTokensLengthLogitsProcessor)
# these depend only on the scores: they need no history
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
    Logits processors and stopping criteria, run on slots.

    Scores are by slot, `(n, V)`; processors and criteria get rows in the order of the batch.

    Args:
        settings ([`DecodingSettings`]), slots ([`Slots`]), cache ([`RowCache`]): of the decoding loop.
        nsp_token_id (`int`, *optional*): the id of `[NSP]`, which is banned for some rows.
    """

    def __init__(self, settings: DecodingSettings, slots: Slots, cache: RowCache, nsp_token_id: int | None) -> None:
        self.settings = settings
        self.slots = slots
        self.cache = cache
        self.nsp_token_id = nsp_token_id

    def decision_scores(self, logits: torch.Tensor) -> torch.Tensor:
        """
        Return the scores from which the next tokens of the first n slots are decided.

        Args:
            logits (`torch.Tensor` of shape `(n, V)`): at the last token of each row.

        Returns:
            `torch.FloatTensor` of shape `(n, V)`; all equal in a slot without a row.
        """
        occupied = self.slots.occupied[: len(logits)]
        # before the processors, since what top_p keeps must be allowed; after them, since they may change any score
        scores = self._without_banned(logits.to(torch.float32, copy=True))
        scores = self._without_banned(self._process(scores))
        if not occupied.all():
            scores = scores.masked_fill(~self.slots.occupied_on_device[: len(logits), None], 0.0)  # any token will do
        return scores

    def stopped(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return for which of the decided `tokens` `(n,)` a stopping criterion ends the row: `(n,)` of bool."""
        if not self.settings.criteria:
            return torch.zeros_like(tokens, dtype=torch.bool)
        history = self._history(tokens)
        verdicts = [criterion(history, None) for criterion in self.settings.criteria]
        return self._to_slots(torch.stack(verdicts).any(0))

    def _without_banned(self, scores: torch.Tensor) -> torch.Tensor:
        """Ban `[Cs]` for all rows, and `[NSP]` for rows that may not retrieve; in place, `scores` `(n, V)`."""
        scores.index_fill_(1, self.settings.never, float("-inf"))
        if self.slots.banned[: len(scores)].any():
            scores[:, self.nsp_token_id].masked_fill_(self.slots.banned_on_device[: len(scores)], float("-inf"))
        return scores

    def _process(self, scores: torch.Tensor) -> torch.Tensor:
        """Return `scores` `(n, V)` after all logits processors, which see every row as if it were alone."""
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
            prompt_ignore_length = getattr(processor, "prompt_ignore_length", None)
            if isinstance(prompt_ignore_length, torch.Tensor):  # the padding before each row
                processor.prompt_ignore_length = history.shape[1] - self._to_batch(self.slots.lengths())
            scores = self._to_slots(processor(history, self._to_batch(scores)))
        return scores

    def _process_by_count(self, processor: LogitsProcessor, scores: torch.Tensor) -> None:
        """Run a processor that depends only on the length of a row on `scores` `(n, V)`, in place."""
        generated = self.slots.generated[: len(scores)]
        if isinstance(processor, _MINIMUM) and self.settings.prompt_length + generated.min() >= _minimum(processor):
            return
        for count in np.unique(generated):
            slots = torch.from_numpy(np.flatnonzero(generated == count)).to(scores.device)
            length = self.settings.prompt_length + int(count)
            any_ids = scores.new_zeros((1, 1), dtype=torch.long).expand(len(slots), length)
            scores[slots] = processor(any_ids, scores[slots])

    def _history(self, tokens: torch.Tensor | None = None) -> torch.Tensor:
        """Return the rows' token ids and `tokens` in the order of the batch, padded on the left: `(B, T)`."""
        n = len(self.slots)
        lengths = self.slots.lengths()[:, None]  # (n, 1)
        width = int(self.slots.columns[:n].max())
        columns = torch.arange(width, device=lengths.device) - (width - lengths)  # (n, width), negative for padding
        history = self.cache.tokens[:n].gather(1, columns.clamp(min=0)).masked_fill_(columns < 0, self.settings.pad)
        if tokens is not None:
            history = torch.cat([history, tokens[:, None]], 1)
        return self._to_batch(history, fill=self.settings.pad)

    def _to_batch(self, values: torch.Tensor, fill: int = 0) -> torch.Tensor:
        """Return values by slot, `(n, ...)`, in the order of the batch, `(B, ...)`; rows that have left get `fill`."""
        order = self.slots.order
        if order is None:
            return values
        return values.new_full((self.slots.count, *values.shape[1:]), fill).index_copy(0, order, values)

    def _to_slots(self, values: torch.Tensor) -> torch.Tensor:
        """Return values in the order of the batch, `(B, ...)`, by slot, `(n, ...)`."""
        order = self.slots.order
        if order is None:
            return values
        return values[order]


def _minimum(processor: MinLengthLogitsProcessor | MinNewTokensLengthLogitsProcessor) -> int:
    """Return the length from which a minimum-length processor changes nothing."""
    if isinstance(processor, MinLengthLogitsProcessor):
        return processor.min_length
    return processor.prompt_length_to_skip + processor.min_new_tokens
