"""The output of generate() with a retriever or a memory."""

from dataclasses import dataclass

import torch
from transformers.modeling_outputs import ModelOutput

from .decoding_cosup import Decoder
from .memory_cosup import TokenNeighbors
from .trace_cosup import Retrieval, Row


@dataclass
class CoSupGenerateOutput(ModelOutput):
    """
    Output of `generate(..., return_dict_in_generate=True)` with a retriever, a memory, or both.

    Args:
        sequences (`torch.LongTensor` of shape `(B, T)`): the prompt, padded on the left, then the continuation of each
            row, passages and `[Cs]` included, padded on the right.
        retrievals (`list[list[Retrieval]]`): the retrieval trace of each row, in order.
        prompt_length (`int`): number of columns of the prompt.
        num_generated_tokens (`torch.LongTensor` of shape `(B,)`): number of decoded tokens, without passages and
            `[Cs]`.
        num_forwarded_tokens (`int`): number of tokens that Gen forwarded in the call, prompts and passages included.
        neighbors (`list[list[TokenNeighbors]]`, *optional*): for each decoded token of each row the nearest entries of
            the memory, with `MemoryConfig(output_neighbors=n)`.
    """

    # generate() sets all of them; ModelOutput demands these defaults
    sequences: torch.Tensor = None  # type: ignore[assignment]
    retrievals: list[list[Retrieval]] = None  # type: ignore[assignment]
    prompt_length: int = None  # type: ignore[assignment]
    num_generated_tokens: torch.Tensor = None  # type: ignore[assignment]
    num_forwarded_tokens: int = None  # type: ignore[assignment]
    neighbors: list[list[TokenNeighbors]] | None = None


def call_output(
    decoder: Decoder,
    rows: list[Row],
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None,
    device: torch.device,
) -> torch.Tensor | CoSupGenerateOutput:
    """
    Return the prompts, padded on the left, and the continuations, padded on the right.

    Args:
        decoder ([`Decoder`]), rows (`list[Row]`): of the call, finished.
        input_ids (`torch.LongTensor` of shape `(B, T)`), attention_mask (`torch.LongTensor` of shape `(B, T)`,
            *optional*): the prompts, padded on either side.
        device (`torch.device`): of the output.
    """
    width, pad = input_ids.shape[1], decoder.settings.pad
    prompts = input_ids.to(device)
    if attention_mask is not None and (attention_mask[:, -1] == 0).any():
        # the prompts are padded on the right, where the continuations belong
        padded_prompts = [[pad] * (width - len(row.prompt)) + row.prompt for row in rows]
        prompts = torch.tensor(padded_prompts, device=device)
    continuations = [torch.tensor(row.ids[len(row.prompt) :], dtype=torch.long, device=device) for row in rows]
    padded = torch.nn.utils.rnn.pad_sequence(continuations, batch_first=True, padding_value=pad)
    sequences = torch.cat([prompts, padded], dim=1)
    for row in rows:
        padding = width - len(row.prompt)
        for entries in row.neighbors:
            entries.position += padding
        for retrieval in row.retrievals:
            start, end = retrieval.grounded_span
            retrieval.position += padding
            retrieval.grounded_span = (start + padding, end + padding)
    if not decoder.settings.generation_config.return_dict_in_generate:
        return sequences
    config = decoder.settings.memory_config
    neighbors = None
    if config is not None and config.output_neighbors:
        neighbors = [row.neighbors for row in rows]
    return CoSupGenerateOutput(
        sequences=sequences,
        retrievals=[row.retrievals for row in rows],
        prompt_length=width,
        num_generated_tokens=torch.tensor([row.num_generated_tokens for row in rows], device=device),
        num_forwarded_tokens=decoder.forwards.num_tokens,
        neighbors=neighbors,
    )
