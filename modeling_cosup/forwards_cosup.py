"""
What the decoding loop forwards through Gen: the last token of every row, or whole chunks of some rows; and what comes
out, slot by slot.
"""

from dataclasses import dataclass

import numpy as np
import torch
from transformers import CompileConfig

from .cache_cosup import EMPTY, attention_mask
from .memory_cosup import adjusted
from .tokenization_cosup import pad_rows


@dataclass
class Outputs:
    """
    What one pass has computed so far, by slot; only the slots that were forwarded count.

    Args:
        logits (`torch.Tensor` of shape `(n, V)`, *optional*): at the last token of each row, as a memory adjusted
            them.
        query_embeds (`torch.FloatTensor` of shape `(n, h)`, *optional*): Gen's query embeddings there.
    """

    logits: torch.Tensor | None = None
    query_embeds: torch.Tensor | None = None

    def place(self, slots, logits, query_embeds, n):
        """
        Put the outputs of rows `(R, ...)` that read a chunk into their `slots` `(R,)`; makes room for n slots if
        nothing was computed yet.
        """
        self.logits = _placed(self.logits, slots, logits, n)
        if query_embeds is not None:
            self.query_embeds = _placed(self.query_embeds, slots, query_embeds, len(self.logits))


def _placed(states, slots, new, n):
    if states is None:
        states = new.new_zeros(n, new.shape[-1])
    return states.index_copy(0, slots.to(states.device), new.to(states.device))


class Forwards:
    """
    Gen's forwards for one call of generate() or generate_many().

    Args:
        model ([`CoSupForCausalLM`]), settings ([`DecodingSettings`]), slots ([`Slots`]), cache ([`RowCache`]): of the
            loop.
        generation_config (`GenerationConfig`): says whether and how the one-token step is compiled.
        memory ([`Memory`], *optional*): adjusts the logits of every decision.
    """

    def __init__(self, model, settings, slots, cache, generation_config, memory=None):
        self.model, self.settings, self.slots, self.cache, self.memory = model, settings, slots, cache, memory
        self.text_config = model.config.get_text_config()
        self.gives_queries = settings.retrieves and model.config.query_from == "gen"
        self.output_states = None
        if memory is not None and memory.states:
            self.output_states = memory.states
        self.slot_numbers = torch.arange(slots.count, device=slots.device)
        self.call_step = model.__call__
        if settings.static and model._valid_auto_compile_criteria({"past_key_values": cache}, generation_config):
            # shapes are fixed on purpose: a graph for symbolic ones would be slower
            self.call_step = model.get_compiled_call(generation_config.compile_config or CompileConfig(dynamic=False))
        self.num_tokens = 0

    def step(self, stepping, with_queries):
        """
        Forward the decided token of every slot, one column. Slots that do not step write next to their tokens, where
        their next one will be written.

        Args:
            stepping (`numpy.ndarray` of bool and shape `(n,)`): the slots that count.
            with_queries (`bool`): query embeddings are needed.

        Returns:
            [`Outputs`].
        """
        slots, static = self.slots, self.settings.static
        n = slots.count if static else len(slots)
        filled = int(slots.columns[: len(slots)].max()) + 1
        self.cache.grow(filled)
        width = self.cache.columns if static else filled
        columns, positions = slots.places(n)
        tokens = slots.tokens[:n, None]
        self.cache.begin(n, columns, tokens, positions, width)
        even = not static and (slots.columns[:n] == width - 1).all() and (slots.positions[:n] == width - 1).all()
        outputs = self.call_step(
            input_ids=tokens,
            attention_mask=None if even else self._mask(positions),
            position_ids=positions,
            past_key_values=self.cache,
            use_cache=True,
            output_query_embeds=self.gives_queries and (static or with_queries),
            nsp_positions=self.slot_numbers[:n],
            output_states=self.output_states,
        )
        slots.step(stepping)
        self.num_tokens += int(stepping.sum())
        return Outputs(self._adjusted(outputs.logits[:, -1], outputs.states), outputs.query_embeds)

    def read(self, chunks, outputs):
        """
        Forward one ragged chunk, and put what comes out at the last token of each of its rows into `outputs`.

        Args:
            chunks (`dict[Row, list[int]]`): token ids that each row reads.
            outputs ([`Outputs`]): of this pass.
        """
        if not chunks:
            return
        slots, device = self.slots, self.slots.device
        places = np.array([row.slot for row in chunks])
        lengths = np.array([len(ids) for ids in chunks.values()])
        ids, mask = pad_rows(list(chunks.values()), self.settings.pad, device=device)
        rows, longest = ids.shape
        starts = np.stack([slots.columns[places], slots.positions[places], lengths, places])
        first_columns, first_positions, counts, on_device = torch.from_numpy(starts).to(device)[:, :, None]
        offsets = torch.arange(longest, device=device)
        positions = first_positions + torch.minimum(offsets, counts - 1)
        width = int(slots.columns[places].max()) + longest
        self.cache.grow(width)
        on_device = on_device[:, 0]
        which = rows if (places == np.arange(rows)).all() else on_device
        self.cache.begin(which, first_columns + offsets, ids, torch.where(mask.bool(), positions, EMPTY), width)
        last = torch.arange(rows, device=device) * longest + counts[:, 0] - 1
        even = (lengths == longest).all() and (slots.columns[places] == width - longest).all()
        even = even and (slots.positions[places] == slots.columns[places]).all()
        read = self.model(
            input_ids=ids,
            attention_mask=None if even else self._mask(positions),
            position_ids=positions,
            past_key_values=self.cache,
            use_cache=True,
            logit_positions=last,
            output_query_embeds=self.gives_queries,
            nsp_positions=last,
            output_states=self.output_states,
        )
        slots.advance(places, lengths)
        self.num_tokens += int(lengths.sum())
        outputs.place(on_device, self._adjusted(read.logits, read.states), read.query_embeds, len(slots))

    def keep_up(self):
        """Take part in the collectives of a forward in which this rank has nothing to forward."""
        token = torch.zeros(1, 1, dtype=torch.long, device=self.slots.device)
        self.model(input_ids=token, use_cache=False, output_query_embeds=False)

    def _adjusted(self, logits, states):
        """
        What a decision is made from. Every forward passes here once, so that logits which a row holds on to are
        adjusted already.
        """
        return logits if self.memory is None else adjusted(self.memory, logits, states)

    def _mask(self, positions):
        implementation = self.text_config._attn_implementation
        return attention_mask(self.cache, self.text_config, positions, implementation, self.model.gen.dtype)
