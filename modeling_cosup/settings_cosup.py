"""What is fixed for one call of generate() or generate_many() before its first token is decided."""

from dataclasses import dataclass
from typing import Any

import torch
from transformers.generation import EosTokenCriteria, MaxLengthCriteria

from .cache_cosup import (context_length)


@dataclass(frozen=True, eq=False)
class DecodingSettings:
    """
    What the decoding loop is given and never changes.

    Args:
        retrieval ([`RetrievalConfig`]): how to retrieve.
        retrieves (`bool`): whether `[NSP]` asks for passages; in a call that does not retrieve it is a token like any other, unless forbidden.
        prompt_length (`int`): columns of the prompts, padding included; processors and criteria count from there.
        budget (`int`): tokens that a row may decide.
        context_length (`int`): positions that Gen can read.
        pad (`int`), ends (`frozenset[int]`): the id of padding, and the ids that end a row.
        never (`torch.LongTensor`): ids that no row may decide.
        special (`torch.LongTensor`): ids after which a pass must look at the rows one by one.
        processors (`LogitsProcessorList`): of logits, warpers included.
        criteria (`list[StoppingCriteria]`): those that the loop does not know itself.
        do_sample (`bool`): sample, or take the best token.
        static (`bool`): the one-token step keeps its shapes, and is captured where `compile_config` and the device say so.
        refill (`bool`): finished rows make room for waiting ones, so that processors see slots, not rows of the batch.
    """

    retrieval: Any
    retrieves: bool
    prompt_length: int
    budget: int
    context_length: int
    pad: int
    ends: frozenset[int]
    never: torch.Tensor
    special: torch.Tensor
    processors: Any
    criteria: list
    do_sample: bool
    static: bool
    refill: bool

    @property
    def max_retrievals(self) -> int | None:
        """Retrievals of each row; `None` for any number."""
        return self.retrieval.max_retrievals if self.retrieves else 0


def decoding_settings(
    config, generation_config, processors, criteria, retrieval, prompt_length, device, has_retriever=False, static=False, refill=False
) -> DecodingSettings:
    """
    Read the settings of a call from what transformers has prepared for `_sample`.

    Args:
        config ([`CoSupConfig`]), generation_config (`GenerationConfig`): of the model, and of the call.
        processors (`LogitsProcessorList`), criteria (`StoppingCriteriaList`): as `_sample` gets them.
        retrieval ([`RetrievalConfig`]), has_retriever (`bool`): how to retrieve, and whether there is something to search.
        prompt_length, static, refill: see [`DecodingSettings`].
        device (`torch.device`): of the model's inputs.
    """
    max_length, ends, own_criteria = generation_config.max_length, set(), []
    for criterion in criteria:
        if isinstance(criterion, MaxLengthCriteria):
            max_length = min(max_length, criterion.max_length)
        elif isinstance(criterion, EosTokenCriteria):
            ends |= set(criterion.eos_token_id.reshape(-1).tolist())
        else:
            own_criteria.append(criterion)
    retrieves = (has_retriever or retrieval.passages is not None) and not retrieval.forbid_nsp
    never, special = [config.cs_token_id], set(ends)
    if retrieval.forbid_nsp:
        never.append(config.nsp_token_id)
    if retrieves:
        special.add(config.nsp_token_id)
    if retrieval.forget_passages:
        special.add(config.ce_token_id)
    pad = generation_config._pad_token_tensor
    return DecodingSettings(
        retrieval=retrieval,
        retrieves=retrieves,
        prompt_length=prompt_length,
        budget=max_length - prompt_length,
        context_length=context_length(config.get_text_config()),
        pad=0 if pad is None else int(pad),
        ends=frozenset(ends),
        never=_ids(never, device),
        special=_ids(special, device),
        processors=processors,
        criteria=own_criteria,
        do_sample=generation_config.do_sample,
        static=static,
        refill=refill,
    )


def _ids(ids, device):
    """A tensor of token ids; the model may lack some control tokens."""
    return torch.tensor(sorted(id for id in ids if id is not None), dtype=torch.long, device=device)
