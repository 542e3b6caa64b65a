"""The settings of one call of generate() or generate_many(): what the user passes, and what the decoding loop gets."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Integral, Real
from typing import Any

import torch
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList
from transformers.generation import EosTokenCriteria, MaxLengthCriteria, StoppingCriteria

from .cache_cosup import context_length
from .configuration_cosup import CoSupConfig
from .memory_cosup import Memory, MemoryConfig
from .queue_cosup import Queue
from .retriever_cosup import Retriever


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
        passages (`list[list[str | dict]]`, *optional*): an oracle: for each prompt, the passages of its `[NSP]`s, in
            order, in place of a search; ids of the index or `{"id", "title", "text"}`. When they are used up, `[NSP]`
            cannot be emitted.
        min_score (`float`, *optional*): the lowest score of a passage that is retrieved. A row for which nothing is
            found takes its `[NSP]` back and decides again without it; the `[NSP]` at the end of a prompt stays.
        no_repeat_passages (`bool`): a row never gets the same passage twice.
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
        if self.min_score is not None and not isinstance(self.min_score, Real):
            raise ValueError(f"RetrievalConfig.min_score is {self.min_score!r}, expected a number.")
        for name in ("candidates", "passages"):
            entries = getattr(self, name)
            if isinstance(entries, str) or any(isinstance(entry, str | Mapping) for entry in entries or ()):
                raise ValueError(f"RetrievalConfig.{name} is {entries!r}, expected a list for each prompt, or None.")
        if self.force_nsp_first and self.forbid_nsp:
            raise ValueError("RetrievalConfig: force_nsp_first and forbid_nsp exclude each other.")
        if self.candidates is not None and self.passages is not None:
            raise ValueError(
                "RetrievalConfig: candidates are searched, passages are given without a search; set one of them."
            )
        if self.forget_passages not in (None, "recompute", "mask"):
            raise ValueError(
                f"RetrievalConfig.forget_passages is {self.forget_passages!r}, expected None, 'recompute' or 'mask'."
            )


@dataclass
class RetrievalCall:
    """
    The arguments of one call for the decoding loop, which transformers' generate() passes on to `_sample`.

    Args:
        retriever ([`Retriever`], *optional*), retrieval ([`RetrievalConfig`]): searches the index; how to retrieve.
        memory ([`Memory`], *optional*), memory_config ([`MemoryConfig`], *optional*): mixed into the logits of every
            decision; how. Both or neither.
        static (`bool`): the decode step keeps its shapes.
        queue ([`Queue`], *optional*): the prompts of generate_many().
        columns (`int`, *optional*): number of columns of the cache to start with, if the caller has computed it.
    """

    retriever: Retriever | None = None
    retrieval: RetrievalConfig = field(default_factory=RetrievalConfig)
    memory: Memory | None = None
    memory_config: MemoryConfig | None = None
    static: bool = False
    queue: Queue | None = None
    columns: int | None = None

    @property
    def has_passages(self) -> bool:
        """Whether there are passages to retrieve, from an index or from an oracle."""
        return self.retriever is not None or self.retrieval.passages is not None

    @property
    def retrieves(self) -> bool:
        """Whether `[NSP]` retrieves passages."""
        return self.has_passages and not self.retrieval.forbid_nsp

    def columns_needed(self, config: CoSupConfig, longest: int, budget: int) -> int:
        """
        Return the number of columns that the longest row may fill: prompt, decoded tokens, and the longest passages.

        Args:
            config ([`CoSupConfig`]): of the model.
            longest (`int`), budget (`int`): length of the longest prompt, and the most tokens that a row may decide.
        """
        retrievals = 0
        if self.retrieves:
            limit = self.retrieval.max_retrievals
            retrievals = 1 if limit is None else limit
        tokens_per_retrieval = self.retrieval.top_k * (config.max_passage_length + 1)
        columns = longest + budget + retrievals * tokens_per_retrieval
        return min(columns, context_length(config.get_text_config()))


@dataclass(frozen=True, eq=False)
class DecodingSettings:
    """
    The settings of the decoding loop, fixed for one call.

    Args:
        generation_config (`GenerationConfig`): as transformers prepared it; says how a static step is compiled.
        retrieval ([`RetrievalConfig`]): how to retrieve.
        retrieves (`bool`): `[NSP]` retrieves passages. Otherwise it is a token like any other, unless forbidden.
        memory_config ([`MemoryConfig`], *optional*): how the memory is mixed in, if there is one.
        num_slots (`int`), num_columns (`int`): the most rows at a time, and columns of the cache to start with.
        device (`torch.device`): of the prompts.
        prompt_length (`int`): columns of the prompts, padding included; processors and criteria count from there.
        budget (`int`): the most tokens that a row may decide.
        context_length (`int`): the most positions that Gen can read.
        pad (`int`), ends (`frozenset[int]`): the id of padding, and the ids that end a row.
        kept_ids (`torch.LongTensor`): control tokens and ends, whose probabilities no memory changes.
        never (`torch.LongTensor`): ids that no row may decide.
        special (`torch.LongTensor`): ids after which the loop visits the rows one by one.
        processors (`LogitsProcessorList`): logits processors, warpers included.
        criteria (`list[StoppingCriteria]`): the stopping criteria that the loop does not implement itself.
        do_sample (`bool`): sample, or take the best token.
        static (`bool`): the decode step keeps its shapes, and is captured if `compile_config` and the device say so.
        refill (`bool`): finished rows make room for waiting ones, so processors see slots, not rows of the batch.
    """

    generation_config: GenerationConfig
    retrieval: RetrievalConfig
    retrieves: bool
    memory_config: MemoryConfig | None
    num_slots: int
    num_columns: int
    device: torch.device
    prompt_length: int
    budget: int
    context_length: int
    pad: int
    ends: frozenset[int]
    kept_ids: torch.Tensor
    never: torch.Tensor
    special: torch.Tensor
    processors: LogitsProcessorList
    criteria: list[StoppingCriteria]
    do_sample: bool
    static: bool
    refill: bool

    @property
    def max_retrievals(self) -> int | None:
        """Retrievals of each row; `None` for any number."""
        return self.retrieval.max_retrievals if self.retrieves else 0


def decoding_settings(
    config: CoSupConfig,
    call: RetrievalCall,
    generation_config: GenerationConfig,
    processors: LogitsProcessorList,
    criteria: StoppingCriteriaList,
    prompts: list[list[int]],
    prompt_length: int,
    device: torch.device,
) -> DecodingSettings:
    """
    Return the settings of a call, from what transformers has prepared for `_sample`.

    Args:
        config ([`CoSupConfig`]), call ([`RetrievalCall`]): of the model, and of the call.
        generation_config (`GenerationConfig`), processors (`LogitsProcessorList`), criteria (`StoppingCriteriaList`):
            as `_sample` gets them.
        prompts (`list[list[int]]`): token ids without padding.
        prompt_length (`int`): columns of the prompts, padding included.
        device (`torch.device`): of the model's inputs.
    """
    max_length = generation_config.max_length
    ends: set[int] = set()
    other_criteria = []
    for criterion in criteria:
        if isinstance(criterion, MaxLengthCriteria):
            max_length = min(max_length, criterion.max_length)
        elif isinstance(criterion, EosTokenCriteria):
            ends.update(criterion.eos_token_id.reshape(-1).tolist())
        else:
            other_criteria.append(criterion)
    never = [config.cs_token_id]
    special: set[int | None] = set(ends)
    if call.retrieval.forbid_nsp:
        never.append(config.nsp_token_id)
    if call.retrieves:
        special.add(config.nsp_token_id)
    if call.retrieval.forget_passages:
        special.add(config.ce_token_id)
    if call.memory_config is not None and call.memory_config.grounded_weight is not None:
        special.update((config.nsp_token_id, config.ce_token_id))  # they end grounded text
    pad = generation_config._pad_token_tensor
    return DecodingSettings(
        generation_config=generation_config,
        retrieval=call.retrieval,
        retrieves=call.retrieves,
        memory_config=call.memory_config,
        num_slots=_num_slots(call, len(prompts)),
        num_columns=_num_columns(config, call, prompts, generation_config.max_length - prompt_length),
        device=device,
        prompt_length=prompt_length,
        budget=max_length - prompt_length,
        context_length=context_length(config.get_text_config()),
        pad=0 if pad is None else int(pad),
        ends=frozenset(ends),
        kept_ids=_ids({config.nsp_token_id, config.cs_token_id, config.ce_token_id, *ends}, device),
        never=_ids(never, device),
        special=_ids(special, device),
        processors=processors,
        criteria=other_criteria,
        do_sample=generation_config.do_sample,
        static=call.static,
        refill=call.queue is not None,
    )


def _num_slots(call: RetrievalCall, num_prompts: int) -> int:
    """Return the most rows at a time; at least one, for a rank without prompts."""
    if call.queue is None:
        return max(num_prompts, 1)
    if call.static:
        return max(call.queue.batch_size, 1)
    return max(min(call.queue.batch_size, num_prompts), 1)


def _num_columns(config: CoSupConfig, call: RetrievalCall, prompts: list[list[int]], budget: int) -> int:
    """Return the columns to start with; a static cache starts large, since growth changes a captured step's shapes."""
    if call.columns:
        return call.columns
    longest = max(map(len, prompts), default=1)
    if call.static:
        return call.columns_needed(config, longest, budget)
    return longest + min(budget, 256)


def token_budget(generation_config: GenerationConfig, prompt_length: int) -> int:
    """Return the most tokens that a row may decide, before transformers has prepared `max_length`."""
    if generation_config.max_new_tokens:
        return generation_config.max_new_tokens
    max_length = generation_config.max_length or prompt_length + 20  # transformers' default
    return max_length - prompt_length


def _ids(ids: Iterable[int | None], device: torch.device) -> torch.Tensor:
    """Return `ids` as a tensor, without `None` for control tokens that the model does not have."""
    return torch.tensor(sorted(id for id in ids if id is not None), dtype=torch.long, device=device)
