"""How to retrieve, and the settings of the decoding loop: of each row, and of the loop as a whole."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

import torch
from transformers import GenerationConfig, LogitsProcessorList
from transformers.generation import StoppingCriteria

from .memory_cosup import MemoryConfig


@dataclass
class RetrievalConfig:
    """
    How `generate()` retrieves.

    Args:
        top_k (`int`): passages for each `[NSP]`, best first, with a line break between. (`generate(top_k=...)` is a
            setting of sampling.)
        max_retrievals (`int`, *optional*): per row; after them `[NSP]` cannot be emitted. Defaults to no limit.
        force_nsp_first (`bool`): every row begins with `[NSP]`.
        forbid_nsp (`bool`): `[NSP]` is never emitted: parametric space only.
        candidates (`list[list[str] | None]`, *optional*): for each prompt, the ids of the passages that it may
            retrieve; `None` for all passages.
        passages (`list[list[str | dict] | None]`, *optional*): an oracle: for each prompt, the passages of its
            `[NSP]`s, in order, in place of a search; `None` to search. Each is an id of the index, or a `dict` with
            `text` and perhaps `title` and `id`. When they are used up, `[NSP]` cannot be emitted. `min_score` and
            `no_repeat_passages` do not apply to them.
        min_score (`float`, *optional*): the lowest score of a passage that is retrieved. A row for which nothing is
            found takes its `[NSP]` back and decides again without it; the `[NSP]` at the end of a prompt stays.
        no_repeat_passages (`bool`): a search never gives a row the same passage twice.
        forget_passages (`str`, *optional*): what happens to a passage after its `[CE]`. `None`: it stays in view.
            `"recompute"`: `[Cs]`…`[CE]` is forwarded again without it, and the row continues as if the passage had
            never been there. `"mask"`: its keys and values are dropped and nothing else changes: tokens that were
            forwarded with the passage in view keep their keys, values and positions.
        output_query_embeds (`bool`): add the query embeddings to the trace.
        stream_passages (`bool`): give passages and `[Cs]` to a streamer too. A streamer with a method `on_retrieval`
            gets each [`Retrieval`] in their place.

    Raises:
        `ValueError`: for values that are invalid, alone or together, or of another type.
    """

    top_k: int = 1
    max_retrievals: int | None = None
    force_nsp_first: bool = False
    forbid_nsp: bool = False
    candidates: Sequence[Sequence[str] | None] | None = None
    passages: Sequence[Sequence[str | dict[str, Any]] | None] | None = None
    min_score: float | None = None
    no_repeat_passages: bool = False
    forget_passages: str | None = None
    output_query_embeds: bool = False
    stream_passages: bool = True

    def __post_init__(self) -> None:
        if not isinstance(self.top_k, Integral) or self.top_k < 1:
            raise ValueError(f"RetrievalConfig.top_k is {self.top_k!r}, expected an integer, 1 or more.")
        limit = self.max_retrievals
        if limit is not None and (not isinstance(limit, Integral) or limit < 0):
            raise ValueError(f"RetrievalConfig.max_retrievals is {limit!r}, expected an integer, 0 or more.")
        if self.min_score is not None and not _is_number(self.min_score):
            raise ValueError(f"RetrievalConfig.min_score is {self.min_score!r}, expected a number.")
        for name in ("candidates", "passages"):
            entries = getattr(self, name)
            if isinstance(entries, str) or any(isinstance(entry, str | Mapping) for entry in entries or ()):
                raise ValueError(f"RetrievalConfig.{name} is {entries!r}, expected a list for each prompt, or None.")
        if self.force_nsp_first and self.forbid_nsp:
            raise ValueError("RetrievalConfig: force_nsp_first and forbid_nsp exclude each other.")
        if self.force_nsp_first and limit == 0:
            raise ValueError("RetrievalConfig: force_nsp_first and max_retrievals=0 exclude each other.")
        if self.candidates is not None and self.passages is not None:
            raise ValueError(
                "RetrievalConfig: candidates are searched, passages are given without a search; set one of them."
            )
        if self.forget_passages not in (None, "recompute", "mask"):
            raise ValueError(
                f"RetrievalConfig.forget_passages is {self.forget_passages!r}, expected None, 'recompute' or 'mask'."
            )


def _is_number(value: object) -> bool:
    return isinstance(value, Real) and not math.isnan(value)


@dataclass(frozen=True, eq=False)
class DecisionSettings:
    """
    How the next token of a row is decided. Rows with the same object are decided together.

    Args:
        processors (`LogitsProcessorList`): logits processors, warpers included.
        criteria (`list[StoppingCriteria]`): the stopping criteria that the loop does not implement itself.
        do_sample (`bool`): sample, or take the best token.
        prompt_length (`int`): columns of the prompts, padding included; processors and criteria count from there.
    """

    processors: LogitsProcessorList
    criteria: list[StoppingCriteria]
    do_sample: bool
    prompt_length: int


@dataclass(frozen=True, eq=False)
class RowSettings:
    """
    The settings of a row. All rows of one call share one object.

    Args:
        decision ([`DecisionSettings`]): how its tokens are decided.
        budget (`int`): the most tokens that it may decide.
        retrieval ([`RetrievalConfig`]): how it retrieves.
        retrieves (`bool`): `[NSP]` retrieves passages. Otherwise it is a token like any other, unless forbidden.
        num_logprobs (`int`, *optional*): how many of the most likely tokens to keep of each decision, next to the
            decided one; `None` keeps nothing.
    """

    decision: DecisionSettings
    budget: int
    retrieval: RetrievalConfig
    retrieves: bool
    num_logprobs: int | None = None

    def columns_needed(self, prompt_length: int, max_passage_length: int, context_length: int) -> int:
        """
        Return the number of columns that a row may fill: prompt, decoded tokens, and the longest passages.

        Without `max_retrievals` one retrieval counts.

        Args:
            prompt_length (`int`): of the row, in tokens.
            max_passage_length (`int`): of the model's config.
            context_length (`int`): the most positions that Gen can read.
        """
        retrievals = 0
        if self.retrieves:
            limit = self.retrieval.max_retrievals
            retrievals = 1 if limit is None else limit
        tokens_per_retrieval = self.retrieval.top_k * (max_passage_length + 1)
        columns = prompt_length + self.budget + retrievals * tokens_per_retrieval
        return min(columns, context_length)


@dataclass(frozen=True, eq=False)
class DecodingSettings:
    """
    The settings of the decoding loop, the same for all of its rows.

    Args:
        generation_config (`GenerationConfig`): as transformers prepared it; says how a static step is compiled.
        retrieves (`bool`): rows may retrieve.
        memory_config ([`MemoryConfig`], *optional*): how the memory is mixed in, if there is one.
        num_slots (`int`), num_columns (`int`): the most rows at a time, and columns of the cache to start with.
        device (`torch.device`): of Gen's inputs.
        context_length (`int`): the most positions that Gen can read.
        pad (`int`), ends (`frozenset[int]`): the id of padding, and the ids that end a row.
        kept_ids (`torch.LongTensor`): control tokens and ends, whose probabilities no memory changes.
        never (`torch.LongTensor`): ids that no row may decide.
        special (`torch.LongTensor`): ids after which the loop visits the rows one by one.
        static (`bool`): the decode step keeps its shapes, and is captured if `compile_config` and the device say so.
        refill (`bool`): finished rows make room for waiting ones, so processors see slots, not rows of the batch.
        serves (`bool`): rows are submitted while others run. A failing search ends only the rows for which it fails,
            each with its `error`, and the cache gives memory back.
        max_batch_tokens (`int`, *optional*): limit the rows so that the cache has no more columns than this, all rows
            together; one row always runs.
    """

    generation_config: GenerationConfig
    retrieves: bool
    memory_config: MemoryConfig | None
    num_slots: int
    num_columns: int
    device: torch.device
    context_length: int
    pad: int
    ends: frozenset[int]
    kept_ids: torch.Tensor
    never: torch.Tensor
    special: torch.Tensor
    static: bool
    refill: bool
    serves: bool = False
    max_batch_tokens: int | None = None
