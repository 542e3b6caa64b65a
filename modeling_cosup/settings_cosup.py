"""What is fixed for one call of generate() or generate_many() before its first token is decided."""

from dataclasses import dataclass
from typing import Any

import torch
from transformers.generation import EosTokenCriteria, MaxLengthCriteria

from .cache_cosup import context_length


@dataclass
class RetrievalConfig:
    """
    How `generate()` retrieves.

    Args:
        top_k (`int`): passages for each `[NSP]`, best first, with a line break between. (`generate(top_k=...)` is that
            of sampling.)
        max_retrievals (`int`, *optional*): per row; after them `[NSP]` cannot be emitted. Defaults to no limit.
        force_nsp_first (`bool`): every row begins with `[NSP]`.
        forbid_nsp (`bool`): `[NSP]` is never emitted: parametric space only.
        candidates (`list[list[str] | None]`, *optional*): for each prompt the ids of the passages among which it
            searches; `None` for all.
        passages (`list[list[str | dict]]`, *optional*): an oracle: for each prompt the passages that its `[NSP]` get,
            in order, in place of a search; ids of the index or `{"id", "title", "text"}`. When they are used up,
            `[NSP]` cannot be emitted.
        min_score (`float`, *optional*): a passage below it is not retrieved. A row for which nothing is found takes
            its `[NSP]` back and decides again without it; a prompt that ends in `[NSP]` keeps it and goes on.
        no_repeat_passages (`bool`): a row never gets the same passage twice.
        forget_passages (`str`, *optional*): what becomes of a passage at its `[CE]`. `None`: it stays in view.
            `"recompute"`: `[Cs]`…`[CE]` is read again without it, and the row goes on as if the passage had never
            stood there. `"mask"`: its keys and values are dropped and nothing else changes: what was read with the
            passage in view stays as it was, positions too.
        output_query_embeds (`bool`): the trace holds the query embeddings.
        stream_passages (`bool`): a streamer gets passages and `[Cs]` too. One with a method `on_retrieval` gets each
            [`Retrieval`] in their place.

    Raises:
        `ValueError`: for values that cannot be, alone or together.
    """

    top_k: int = 1
    max_retrievals: int | None = None
    force_nsp_first: bool = False
    forbid_nsp: bool = False
    candidates: list | None = None
    passages: list | None = None
    min_score: float | None = None
    no_repeat_passages: bool = False
    forget_passages: str | None = None
    output_query_embeds: bool = False
    stream_passages: bool = True

    def __post_init__(self):
        if self.top_k < 1:
            raise ValueError(f"RetrievalConfig.top_k is {self.top_k}, expected 1 or more.")
        if self.max_retrievals is not None and self.max_retrievals < 0:
            raise ValueError(f"RetrievalConfig.max_retrievals is {self.max_retrievals}, expected 0 or more.")
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


@dataclass(frozen=True, eq=False)
class DecodingSettings:
    """
    What the decoding loop is given and never changes.

    Args:
        retrieval ([`RetrievalConfig`]): how to retrieve.
        retrieves (`bool`): whether `[NSP]` asks for passages; in a call that does not retrieve it is a token like any
            other, unless forbidden.
        prompt_length (`int`): columns of the prompts, padding included; processors and criteria count from there.
        budget (`int`): tokens that a row may decide.
        context_length (`int`): positions that Gen can read.
        pad (`int`), ends (`frozenset[int]`): the id of padding, and the ids that end a row.
        never (`torch.LongTensor`): ids that no row may decide.
        special (`torch.LongTensor`): ids after which a pass must look at the rows one by one.
        processors (`LogitsProcessorList`): of logits, warpers included.
        criteria (`list[StoppingCriteria]`): that the loop does not implement itself.
        do_sample (`bool`): sample, or take the best token.
        static (`bool`): the one-token step keeps its shapes, and is captured where `compile_config` and the device say
            so.
        refill (`bool`): finished rows make room for waiting ones, so that processors see slots, not rows of the batch.
    """

    retrieval: RetrievalConfig
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
    config,
    generation_config,
    processors,
    criteria,
    retrieval,
    prompt_length,
    device,
    has_retriever=False,
    static=False,
    refill=False,
) -> DecodingSettings:
    """
    Read the settings of a call from what transformers has prepared for `_sample`.

    Args:
        config ([`CoSupConfig`]), generation_config (`GenerationConfig`): of the model, and of the call.
        processors (`LogitsProcessorList`), criteria (`StoppingCriteriaList`): as `_sample` gets them.
        retrieval ([`RetrievalConfig`]), has_retriever (`bool`): how to retrieve, and whether there is something to
            search.
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
