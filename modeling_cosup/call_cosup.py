"""One call of generate() or generate_many(): its arguments for the decoding loop, and the settings made of them."""

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList
from transformers.generation import EosTokenCriteria, MaxLengthCriteria

from .cache_cosup import context_length, rounded
from .configuration_cosup import CoSupConfig
from .memory_cosup import Memory, MemoryConfig
from .queue_cosup import Queue
from .retriever_cosup import Retriever
from .settings_cosup import DecisionSettings, DecodingSettings, RetrievalConfig, RowSettings


@dataclass
class RetrievalCall:
    """
    The arguments of one call for the decoding loop, which transformers' generate() passes on to `_sample`.

    Args:
        retriever ([`Retriever`], *optional*), retrieval ([`RetrievalConfig`]): what searches the index, and how to
            retrieve.
        memory ([`Memory`], *optional*), memory_config ([`MemoryConfig`], *optional*): what is mixed into the logits of
            every decision, and how. Both or neither.
        static (`bool`): the decode step keeps its shapes.
        queue ([`Queue`], *optional*): the prompts of generate_many().
        max_batch_tokens (`int`, *optional*): of generate_many().
        only_settings (`bool`): return the settings; generate nothing.
        output_device (`torch.device`, *optional*): of the output; defaults to the device of the loop.
    """

    retriever: Retriever | None = None
    retrieval: RetrievalConfig = field(default_factory=RetrievalConfig)
    memory: Memory | None = None
    memory_config: MemoryConfig | None = None
    static: bool = False
    queue: Queue | None = None
    max_batch_tokens: int | None = None
    only_settings: bool = False
    output_device: torch.device | None = None

    @property
    def has_passages(self) -> bool:
        """Whether there are passages to retrieve, from an index or from an oracle."""
        return self.retriever is not None or self.retrieval.passages is not None

    @property
    def retrieves(self) -> bool:
        """Whether `[NSP]` retrieves passages."""
        return self.has_passages and not self.retrieval.forbid_nsp

    @property
    def needs_queries(self) -> bool:
        """Whether a retrieval needs its query embedding: to search with it, or for the trace."""
        passages = self.retrieval.passages
        searches = passages is None or any(entry is None for entry in passages)
        return self.retrieves and (searches or self.retrieval.output_query_embeds)


def call_settings(
    config: CoSupConfig,
    call: RetrievalCall,
    generation_config: GenerationConfig,
    processors: LogitsProcessorList,
    criteria: StoppingCriteriaList,
    prompts: list[list[int]],
    prompt_length: int,
    device: torch.device,
) -> tuple[DecodingSettings, RowSettings]:
    """
    Return the settings of the loop and of the rows of a call, from what transformers has prepared for `_sample`.

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
    row_settings = RowSettings(
        decision=DecisionSettings(processors, other_criteria, generation_config.do_sample, prompt_length),
        budget=max_length - prompt_length,
        retrieval=call.retrieval,
        retrieves=call.retrieves,
    )
    special: set[int | None] = set(ends)
    if call.retrieves:
        special.add(config.nsp_token_id)
    if call.retrieval.forget_passages:
        special.add(config.ce_token_id)
    if call.memory_config is not None and call.memory_config.grounded_weight is not None:
        special.update((config.nsp_token_id, config.ce_token_id))  # they end grounded text
    longest = max(map(len, prompts), default=1)
    limit = context_length(config.get_text_config())
    columns_needed = row_settings.columns_needed(longest, config.max_passage_length, limit)
    num_columns = min(columns_needed, longest + min(generation_config.max_length - prompt_length, 256))
    if call.static:
        num_columns = columns_needed  # growth would change a captured step's shapes
    most_columns = columns_needed
    if row_settings.retrieves and call.retrieval.max_retrievals is None:
        most_columns = limit  # a static cache keeps its rows, however often they retrieve
    pad = generation_config._pad_token_tensor
    settings = DecodingSettings(
        generation_config=generation_config,
        retrieves=call.retrieves,
        memory_config=call.memory_config,
        num_slots=_num_slots(call, len(prompts), rounded(most_columns + 1)),
        num_columns=num_columns,
        device=device,
        context_length=limit,
        pad=0 if pad is None else int(pad),
        ends=frozenset(ends),
        kept_ids=token_ids({config.nsp_token_id, config.cs_token_id, config.ce_token_id, *ends}, device),
        never=token_ids([config.cs_token_id], device),
        special=token_ids(special, device),
        static=call.static,
        refill=call.queue is not None,
        max_batch_tokens=None if call.static else call.max_batch_tokens,
    )
    return settings, row_settings


def _num_slots(call: RetrievalCall, num_prompts: int, most_columns: int) -> int:
    """Return the most rows at a time, of up to `most_columns` columns; at least one, for a rank without prompts."""
    if call.queue is None:
        return max(num_prompts, 1)
    limit = call.queue.batch_size
    if not call.static:
        return max(min(limit, num_prompts), 1)
    # a captured step keeps its shapes from call to call, so rows are not admitted by their lengths
    if call.max_batch_tokens is not None:
        limit = min(limit, call.max_batch_tokens // most_columns)
    return max(limit, 1)


def token_ids(ids: Iterable[int | None], device: torch.device) -> torch.Tensor:
    """Return `ids` as a tensor, without `None` for control tokens that the model does not have."""
    return torch.tensor(sorted(id for id in ids if id is not None), dtype=torch.long, device=device)
