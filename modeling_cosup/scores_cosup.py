"""Logits processors and stopping criteria for rows that differ in length and settings, and have changed places."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
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
    RepetitionPenaltyLogitsProcessor,
    SuppressTokensAtBeginLogitsProcessor,
    SuppressTokensLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

from .cache_cosup import RowCache
from .settings_cosup import DecisionSettings, DecodingSettings
from .slots_cosup import Slots
from .trace_cosup import Logprobs, Row

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


@dataclass(frozen=True)
class _Group:
    """
    Rows that are decided together.

    Args:
        decision ([`DecisionSettings`]): of these rows.
        slots (`numpy.ndarray` of int64, *optional*): their slots; `None` for all slots, with or without a row.
        slots_on_device (`torch.LongTensor`, *optional*): the same.
    """

    decision: DecisionSettings
    slots: NDArray[np.int64] | None = None
    slots_on_device: torch.Tensor | None = None

    def of(self, states: torch.Tensor) -> torch.Tensor:
        """Return the states of these rows, from states by slot `(n, ...)`."""
        return states if self.slots_on_device is None else states[self.slots_on_device]

    def on_host(self, states: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the states of these rows, from states by slot `(n,)`."""
        return states if self.slots is None else states[self.slots]


class RowScores:
    """
    Logits processors, choice of tokens, and stopping criteria, run on slots.

    Scores are by slot, `(n, V)`. If all rows have the same [`DecisionSettings`], processors and criteria get them in
    the order of the batch; otherwise group by group.

    Args:
        settings ([`DecodingSettings`]), slots ([`Slots`]), cache ([`RowCache`]): of the decoding loop.
        nsp_token_id (`int`, *optional*): the id of `[NSP]`, which is banned for some rows.
    """

    def __init__(self, settings: DecodingSettings, slots: Slots, cache: RowCache, nsp_token_id: int | None) -> None:
        self.settings = settings
        self.slots = slots
        self.cache = cache
        self.nsp_token_id = nsp_token_id
        # these hold for one version of the slots
        self._version = -1
        self._groups: list[_Group] = []
        self._drawn_alone: list[tuple[int, torch.Generator]] = []  # slots of rows with a generator, and the generators
        self._with_logprobs: list[Row] = []  # rows that keep log-probabilities
        self._prompt_lengths_on_device: torch.Tensor | None = None  # by slot, once a processor needs them

    def decision_scores(self, logits: torch.Tensor) -> torch.Tensor:
        """
        Return the scores from which the next tokens of the first n slots are decided.

        Args:
            logits (`torch.Tensor` of shape `(n, V)`): at the last token of each row.

        Returns:
            `torch.FloatTensor` of shape `(n, V)`; all equal in a slot without a row.
        """
        self._see_rows()
        occupied = self.slots.occupied[: len(logits)]
        # before the processors, since what top_p keeps must be allowed; after them, since they may change any score
        scores = self._without_banned(logits.to(torch.float32, copy=True))
        for group in self._groups:
            processed = self._process(group, group.of(scores))
            if group.slots_on_device is None:
                scores = processed
            else:
                scores[group.slots_on_device] = processed
        scores = self._without_banned(scores)
        if not occupied.all():
            scores = scores.masked_fill(~self.slots.occupied_on_device[: len(logits), None], 0.0)  # any token will do
        return scores

    def choose(self, scores: torch.Tensor) -> torch.Tensor:
        """Return the next tokens `(n,)` by their `scores` `(n, V)`: the best ones, or drawn ones."""
        tokens = None
        for group in self._groups:
            if not group.decision.do_sample:
                continue
            drawn = torch.multinomial(group.of(scores).softmax(-1), 1)[:, 0]
            if group.slots_on_device is None:
                tokens = drawn
            else:
                if tokens is None:
                    tokens = scores.argmax(-1)
                tokens[group.slots_on_device] = drawn
        if tokens is None:
            tokens = scores.argmax(-1)
        for slot, generator in self._drawn_alone:
            probs = scores[slot : slot + 1].softmax(-1)  # (1, V)
            tokens[slot] = torch.multinomial(probs, 1, generator=generator)[0, 0]
        return tokens

    def logprobs(self, logits: torch.Tensor, tokens: torch.Tensor) -> dict[Row, Logprobs]:
        """
        Return the log-probabilities of the decisions of rows that keep them.

        Args:
            logits (`torch.Tensor` of shape `(n, V)`): at the last token of each row, before bans and processors.
            tokens (`torch.LongTensor` of shape `(n,)`): the decisions.
        """
        rows = self._with_logprobs
        if not rows:
            return {}
        slots = [row.slot for row in rows]
        counts = [row.settings.num_logprobs or 0 for row in rows]
        log_probs = logits[slots].float().log_softmax(-1)  # (R, V)
        decided = log_probs.gather(1, tokens[slots, None])[:, 0].tolist()
        values, ids = log_probs.topk(min(max(counts), log_probs.shape[1]))  # (R, k) each
        tops = [list(zip(*top, strict=True)) for top in zip(ids.tolist(), values.tolist(), strict=True)]
        return {row: (decided[i], tops[i][: counts[i]]) for i, row in enumerate(rows)}

    def stopped(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return for which of the decided `tokens` `(n,)` a stopping criterion ends the row: `(n,)` of bool."""
        stopped = torch.zeros_like(tokens, dtype=torch.bool)
        for group in self._groups:
            if not group.decision.criteria:
                continue
            history = self._history(group, tokens)
            verdict = torch.zeros(len(history), dtype=torch.bool, device=history.device)
            for criterion in group.decision.criteria:
                verdict = verdict | criterion(history, None)  # a tensor, or one bool for all
            verdict = self._to_slots(verdict)
            if group.slots_on_device is None:
                stopped = verdict
            else:
                stopped[group.slots_on_device] = verdict
        return stopped

    # ------------------------------------------------------------------ groups

    def _see_rows(self) -> None:
        """Group the rows, if any has come or gone."""
        if self._version == self.slots.version:
            return
        self._version = self.slots.version
        self._drawn_alone = []
        self._with_logprobs = []
        self._prompt_lengths_on_device = None
        slots_of: dict[DecisionSettings, list[int]] = {}
        for slot, row in enumerate(self.slots.rows):
            if row is None:
                continue
            slots_of.setdefault(row.settings.decision, []).append(slot)
            if row.generator is not None and row.settings.decision.do_sample:
                self._drawn_alone.append((slot, row.generator))
            if row.settings.num_logprobs is not None:
                self._with_logprobs.append(row)
        self._groups = []
        for decision, members in slots_of.items():
            if len(slots_of) == 1:
                self._groups.append(_Group(decision))
            else:
                slots = np.array(members)
                self._groups.append(_Group(decision, slots, torch.from_numpy(slots).to(self.slots.device)))

    # ------------------------------------------------------------------ bans and processors

    def _without_banned(self, scores: torch.Tensor) -> torch.Tensor:
        """Ban `[Cs]` for all rows, and `[NSP]` for rows that may not decide it; in place, `scores` `(n, V)`."""
        scores.index_fill_(1, self.settings.never, float("-inf"))
        if self.slots.banned[: len(scores)].any():
            scores[:, self.nsp_token_id].masked_fill_(self.slots.banned_on_device[: len(scores)], float("-inf"))
        return scores

    def _process(self, group: _Group, scores: torch.Tensor) -> torch.Tensor:
        """Return `scores` `(R, V)` of a group after its logits processors, which see every row as if it were alone."""
        history = None
        for processor in group.decision.processors:
            if type(processor) in _COUNTING:
                self._process_by_count(processor, group, scores)
                continue
            if type(processor) in _SCORES_ONLY:
                scores = processor(group.of(self.slots.tokens[: len(self.slots), None]), scores)
                continue
            if history is None:
                history = self._history(group)
            with self._leaving_out_padding(processor, group, history):
                scores = self._to_slots(processor(history, self._to_batch(scores)))
        return scores

    @contextlib.contextmanager
    def _leaving_out_padding(self, processor: Any, group: _Group, history: torch.Tensor) -> Iterator[None]:
        """
        Let a repetition penalty leave out the padding before each row.

        A number of columns that it shall leave out counts from the first column of the prompts, as the caller sees
        them: padded on the left to `prompt_length`. Here the padding of a row changes.
        """
        if not isinstance(processor, RepetitionPenaltyLogitsProcessor):
            yield
            return
        ignored = processor.prompt_ignore_length
        padding = history.shape[1] - self._to_batch(group.of(self.slots.lengths()))  # (B,)
        if ignored is not None:
            prompt_padding = group.decision.prompt_length - self._to_batch(group.of(self._prompt_lengths()))
            ignored_tokens = torch.as_tensor(ignored, device=padding.device) - prompt_padding
            padding = padding + ignored_tokens.clamp(min=0)
        processor.prompt_ignore_length = padding
        try:
            yield
        finally:
            processor.prompt_ignore_length = ignored

    def _prompt_lengths(self) -> torch.Tensor:
        """Return the number of prompt tokens in each slot `(n,)`; 0 in a slot without a row."""
        if self._prompt_lengths_on_device is None:
            lengths = [0 if row is None else len(row.prompt) for row in self.slots.rows[: len(self.slots)]]
            self._prompt_lengths_on_device = torch.tensor(lengths, device=self.slots.device)
        return self._prompt_lengths_on_device

    def _process_by_count(self, processor: LogitsProcessor, group: _Group, scores: torch.Tensor) -> None:
        """Run a processor that depends only on the length of a row on `scores` `(R, V)`, in place."""
        generated = group.on_host(self.slots.generated[: len(self.slots)])
        prompt_length = group.decision.prompt_length
        if isinstance(processor, _MINIMUM) and prompt_length + generated.min() >= _minimum(processor):
            return
        for count in np.unique(generated):
            members = torch.from_numpy(np.flatnonzero(generated == count)).to(scores.device)
            any_ids = scores.new_zeros((1, 1), dtype=torch.long).expand(len(members), prompt_length + int(count))
            scores[members] = processor(any_ids, scores[members])

    def _history(self, group: _Group, tokens: torch.Tensor | None = None) -> torch.Tensor:
        """Return the group's token ids and `tokens` `(n,)` in the order of the batch, padded on the left: `(R, T)`."""
        n = len(self.slots)
        lengths = group.of(self.slots.lengths())[:, None]  # (R, 1)
        width = int(group.on_host(self.slots.columns[:n]).max())
        columns = torch.arange(width, device=lengths.device) - (width - lengths)  # (R, width), negative for padding
        history = group.of(self.cache.tokens[:n]).gather(1, columns.clamp(min=0))
        history = history.masked_fill_(columns < 0, self.settings.pad)
        if tokens is not None:
            history = torch.cat([history, group.of(tokens)[:, None]], 1)
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


def depends_on_scores_only(decision: DecisionSettings) -> bool:
    """Return whether decisions depend on nothing but the scores, so that rows of any prompts can share them."""
    return not decision.criteria and all(type(processor) in _SCORES_ONLY for processor in decision.processors)


def _minimum(processor: MinLengthLogitsProcessor | MinNewTokensLengthLogitsProcessor) -> int:
    """Return the length from which a minimum-length processor changes nothing."""
    if isinstance(processor, MinLengthLogitsProcessor):
        return processor.min_length
    return processor.prompt_length_to_skip + processor.min_new_tokens
