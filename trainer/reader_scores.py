"""
How useful each passage was for a reader's answer: by its attention (arXiv 2402.11794, Eq. 1), or by how likely the
passage makes the answer (Atlas, arXiv 2208.03299, section 2.2).

The scores are data: they are computed in evaluation mode and without a graph, so no gradient reaches the reader.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence
from transformers import Cache, PreTrainedModel

from modeling_cosup.architectures_cosup import lm_logits
from modeling_cosup.encoding_cosup import evaluating
from modeling_cosup.packing_cosup import pad_rows
from modeling_cosup.token_keys_cosup import gen_of

from .distillation import check_finite
from .reading import ReaderRow, batches_by_length
from .recording import recording_attention, without_compilation

MAX_TOKENS = 8192  # of a forward of the reader, padding included
LOGITS_CHUNK = 2048  # positions whose logits are in memory at a time


# ---------------------------------------------------------------------- attention


@torch.no_grad()
def token_attention(
    gen: Any, rows: Sequence[ReaderRow], pad_token_id: int, max_tokens: int = MAX_TOKENS
) -> list[torch.Tensor]:
    """
    Let the reader read rows, and return how much its answer attends to each token.

    Args:
        gen (`PreTrainedModel`): the reader, a causal language model or a [`CoSupForCausalLM`]; it reads in evaluation
            mode.
        rows (`list[ReaderRow]`): instances with their passages.
        pad_token_id (`int`): pads batches on the right, without a mask, since no token of a causal model sees it.
        max_tokens (`int`): of a forward, padding included. The result does not depend on it.

    Returns:
        `list[torch.FloatTensor]`: for each row α_t·‖v_t‖ of the tokens before the last one of the answer, the mean
            over layers, heads and the positions that predict the answer; on Gen's device.

    Raises:
        `ValueError`: as in [`recording_attention`].
    """
    gen = gen_of(gen)
    lengths = [row.answer_span[1] - 1 for row in rows]  # the last token of the answer predicts no other
    attention: list[torch.Tensor] = [torch.empty(0)] * len(rows)
    with evaluating(gen):
        for numbers in batches_by_length(lengths, max_tokens):
            ids, _ = pad_rows([rows[number].input_ids[: lengths[number]] for number in numbers], pad_token_id)
            predicting = [range(rows[number].answer_span[0] - 1, lengths[number]) for number in numbers]
            answer_rows, _ = pad_rows(predicting, -1, device=gen.device)
            with recording_attention(gen, answer_rows) as recorded:
                gen.base_model(input_ids=ids.to(gen.device), use_cache=False)
            for number, values in zip(numbers, recorded.token_attention(), strict=True):
                attention[number] = values[: lengths[number]]
    return attention


def attention_shares(
    gen: Any,
    rows: Sequence[ReaderRow],
    pad_token_id: int,
    max_tokens: int = MAX_TOKENS,
    names: Sequence[str] | None = None,
) -> torch.Tensor:
    """
    Let the reader read rows, and return each passage's share of its answer's attention (Eq. 1, normalised).

    Args:
        gen, rows, pad_token_id, max_tokens: as in [`token_attention`].
        names (`list[str]`, *optional*): what each row is, for the error.

    Returns:
        `torch.FloatTensor` of shape `(B, K_max)`: each row sums to 1; 0 where it has fewer passages.

    Raises:
        `FloatingPointError`: if a share is not finite.
        `ValueError`: as in [`recording_attention`].
    """
    return passage_shares(token_attention(gen, rows, pad_token_id, max_tokens), rows, names)


def passage_shares(
    attention: Sequence[torch.Tensor], rows: Sequence[ReaderRow], names: Sequence[str] | None = None
) -> torch.Tensor:
    """
    Sum the attention of each passage's tokens, and divide by that of all passages of the row.

    Args:
        attention (`list[torch.FloatTensor]`): as [`token_attention`] returns it.
        rows, names: as in [`attention_shares`], which says what is returned and raised.
    """
    if not rows:
        return torch.zeros(0, 0)
    device = attention[0].device
    count = max(len(row.passage_spans) for row in rows)
    numbers = []  # the passage of each token; `count` for none
    for row, values in zip(rows, attention, strict=True):
        row_numbers = [count] * len(values)
        for number, (start, end) in enumerate(row.passage_spans):
            row_numbers[start:end] = [number] * (end - start)
        numbers.append(row_numbers)
    passages, _ = pad_rows(numbers, count, device=device)  # (B, T)
    scores = torch.zeros(len(rows), count + 1, device=device)
    scores.scatter_add_(1, passages, pad_sequence(list(attention), batch_first=True))
    scores = scores[:, :count]
    shares = scores / scores.sum(1, keepdim=True)
    check_finite(shares, "attention shares", names)
    return shares


# ---------------------------------------------------------------------- perplexity


@torch.no_grad()
def answer_log_likelihoods(
    gen: Any,
    rows: Sequence[ReaderRow],
    pad_token_id: int,
    max_tokens: int = MAX_TOKENS,
    leave_one_out: bool = False,
    reduction: str = "mean",
    share_prompts: bool = True,
    names: Sequence[str] | None = None,
) -> torch.Tensor:
    """
    Return how likely the reader finds the answer and `[CE]` after the prompt and each passage alone.

    The prompt is read once; each reading continues a copy of its KV cache. Logits are computed for the answer alone.

    Args:
        gen (`PreTrainedModel`): the reader, a causal language model or a [`CoSupForCausalLM`]; it reads in evaluation
            mode.
        rows (`list[ReaderRow]`): instances with their passages.
        pad_token_id (`int`): pads batches.
        max_tokens (`int`): of a forward, with padding and prompts. The result does not depend on it.
        leave_one_out (`bool`, *optional*, defaults to `False`): instead of each passage alone, read all but that one.
        reduction (`str`, *optional*, defaults to `"mean"`): over the tokens; EMDR needs `"sum"`, log p(answer).
        share_prompts (`bool`, *optional*, defaults to `True`): `False` reads each prompt K times. So does a Gen with a
            recurrent state, or one that makes its attention masks itself.
        names (`list[str]`, *optional*): what each row is, for the error.

    Returns:
        `torch.FloatTensor` of shape `(B, K_max)`: 0 where a row has fewer passages.

    Raises:
        `FloatingPointError`: if a log-likelihood is not finite.
        `ValueError`: for an unknown `reduction`.
    """
    if reduction not in ("mean", "sum"):
        raise ValueError(f"reduction is {reduction!r}, expected 'mean' or 'sum'.")
    gen = gen_of(gen)
    if not gen._supports_attention_backend or gen._is_stateful:
        share_prompts = False
    count = max((len(row.passage_spans) for row in rows), default=0)
    scores = torch.zeros(len(rows), count, device=gen.device)
    with evaluating(gen), without_compilation():
        for numbers in batches_by_length([row.nsp_column + 1 for row in rows], max_tokens):
            prompts = [rows[number].input_ids[: rows[number].nsp_column + 1] for number in numbers]
            readings = []
            for prompt, number in enumerate(numbers):
                for passage in range(len(rows[number].passage_spans)):
                    readings.append(_reading(rows[number], number, passage, prompt, leave_one_out))
            reader = _Reader(gen, prompts, pad_token_id, share_prompts)
            lengths = [reader.width + len(reading.ids) for reading in readings]
            for chosen in batches_by_length(lengths, max_tokens):
                batch = [readings[i] for i in chosen]
                log_likelihoods = reader.log_likelihoods(batch, reduction)
                places = torch.tensor([[reading.row, reading.passage] for reading in batch], device=gen.device)
                scores[places[:, 0], places[:, 1]] = log_likelihoods
    check_finite(scores, "log-likelihoods of the answer", names)
    return scores


@dataclass
class _Reading:
    """
    What the reader reads after a prompt.

    Args:
        row, passage (`int`): where the result belongs.
        prompt (`int`): number of the prompt in its batch.
        ids (`list[int]`): passages, `[Cs]` and answer.
        targets (`list[int]`): answer and `[CE]`, which the last positions of `ids` predict.
    """

    row: int
    passage: int
    prompt: int
    ids: list[int]
    targets: list[int]


def _reading(row: ReaderRow, number: int, passage: int, prompt: int, leave_one_out: bool) -> _Reading:
    """Return what the reader reads of a row: one passage alone, or all but that one."""
    spans = [row.passage_spans[passage]]
    separator: list[int] = []
    if leave_one_out:
        spans = row.passage_spans[:passage] + row.passage_spans[passage + 1 :]
    if len(spans) > 1:
        separator = row.input_ids[row.passage_spans[0][1] : row.passage_spans[1][0]]
    ids: list[int] = []
    for i, (start, end) in enumerate(spans):
        if i:
            ids += separator
        ids += row.input_ids[start:end]
    answer_start, answer_end = row.answer_span
    ids += row.input_ids[answer_start - 1 : answer_end]  # from [Cs] on
    return _Reading(number, passage, prompt, ids, row.input_ids[answer_start : answer_end + 1])


class _Reader:
    """
    A Gen that has read the prompts of a batch, and reads on from any of them.

    Args:
        gen (`PreTrainedModel`): Gen.
        prompts (`list[list[int]]`): up to and including `[NSP]`.
        pad_token_id (`int`): pads batches.
        share_prompts (`bool`): whether readings continue the KV cache of their prompt, or read it again.

    Attributes:
        width (`int`): columns of the prompts.
    """

    def __init__(self, gen: PreTrainedModel, prompts: list[list[int]], pad_token_id: int, share_prompts: bool) -> None:
        self.gen = gen
        self.prompts = prompts
        self.pad_token_id = pad_token_id
        self.cache: Cache | None = None
        # on the left: a reading continues right after its prompt, as sliding windows expect
        ids, self.mask = pad_rows(prompts, pad_token_id, side="left", device=gen.device)
        self.width = ids.shape[1]
        if share_prompts:
            positions = (self.mask.cumsum(1) - 1).clamp(min=0)
            output = gen.base_model(input_ids=ids, attention_mask=self.mask, position_ids=positions, use_cache=True)
            self.cache = output.past_key_values

    def log_likelihoods(self, readings: Sequence[_Reading], reduction: str) -> torch.Tensor:
        """Return the log-likelihoods of the targets, `(N,)`: the mean or the sum over the tokens of each reading."""
        rows = [reading.ids for reading in readings]
        if self.cache is None:
            rows = [self.prompts[reading.prompt] + reading.ids for reading in readings]
        ids, _ = pad_rows(rows, self.pad_token_id, device=self.gen.device)
        options: dict[str, Any] = {"use_cache": False}
        if self.cache is not None:
            options = self._continuation(readings, ids.shape[1])
        hidden = self.gen.base_model(input_ids=ids, **options).last_hidden_state  # (N, T, h)
        positions: list[int] = []
        targets: list[int] = []
        for number, (ids_read, reading) in enumerate(zip(rows, readings, strict=True)):
            end = number * ids.shape[1] + len(ids_read)
            positions += range(end - len(reading.targets), end)
            targets += reading.targets
        predicting = hidden.flatten(0, 1)[torch.tensor(positions, device=hidden.device)]
        log_probs = _log_probs(self.gen, predicting, torch.tensor(targets, device=hidden.device))
        parts = log_probs.split([len(reading.targets) for reading in readings])
        if reduction == "mean":
            return torch.stack([part.mean() for part in parts])
        return torch.stack([part.sum() for part in parts])

    def _continuation(self, readings: Sequence[_Reading], length: int) -> dict[str, Any]:
        """Return the options of a forward that continues prompts by readings, padded to `length` tokens."""
        device = self.mask.device
        chosen = torch.tensor([reading.prompt for reading in readings], device=device)
        ends = torch.tensor([[len(reading.ids) - 1] for reading in readings], device=device)
        mask = self.mask[chosen]
        # no mask on the right: no token sees the padding there. But its positions must be ones that Gen has
        full_mask = F.pad(mask, (0, length), value=1)
        positions = mask.sum(1, keepdim=True) + torch.arange(length, device=device).minimum(ends)
        cache = copy.copy(self.cache)
        assert cache is not None
        cache.layers = [copy.copy(layer) for layer in cache.layers]  # their tensors are replaced, not changed
        cache.batch_select_indices(chosen)
        return {"attention_mask": full_mask, "position_ids": positions, "past_key_values": cache, "use_cache": True}


def _log_probs(gen: PreTrainedModel, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Return the log-probability of each target `(n,)` after its state, one of `hidden` `(n, h)`."""
    log_probs = []
    for chunk, chunk_targets in zip(hidden.split(LOGITS_CHUNK), targets.split(LOGITS_CHUNK), strict=True):
        log_probs.append(-F.cross_entropy(lm_logits(gen, chunk).float(), chunk_targets, reduction="none"))
    return torch.cat(log_probs)
