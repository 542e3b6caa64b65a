"""Gen's forwards in the decoding loop: decode steps of one token per row, and chunks of many tokens for some rows."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import CompileConfig

from .cache_cosup import EMPTY, RowCache, attention_mask
from .memory_cosup import Memory, TokenNeighbors, mixed_logits
from .packing_cosup import pad_rows
from .settings_cosup import DecodingSettings
from .slots_cosup import Slots
from .trace_cosup import Row


@dataclass
class Outputs:
    """
    The results of one pass so far, by slot. Slots that were not forwarded hold nothing of use.

    Args:
        logits (`torch.Tensor` of shape `(n, V)`): at the last token of each row, mixed with the memory; `None` before
            the first forward of a pass.
        query_embeds (`torch.FloatTensor` of shape `(n, h)`, *optional*): Gen's query embeddings at the same tokens.
        neighbors (`dict[int, TokenNeighbors]`): by slot, the memory's entries nearest to the states there, if the call
            asks for them.
    """

    logits: torch.Tensor = None  # type: ignore[assignment]  # every pass forwards before it decides
    query_embeds: torch.Tensor | None = None
    neighbors: dict[int, TokenNeighbors] = field(default_factory=dict)

    def place(self, slots: torch.Tensor, logits: torch.Tensor, query_embeds: torch.Tensor | None, n: int) -> None:
        """
        Store the results of the rows of a chunk.

        Args:
            slots (`torch.LongTensor` of shape `(R,)`): the slots of these rows.
            logits (`torch.Tensor` of shape `(R, V)`), query_embeds (`torch.FloatTensor` of shape `(R, h)`,
                *optional*): their results.
            n (`int`): number of slots, to allocate the results if there are none yet.
        """
        self.logits = _placed(self.logits, slots, logits, n)
        if query_embeds is not None:
            self.query_embeds = _placed(self.query_embeds, slots, query_embeds, len(self.logits))


def _placed(states: torch.Tensor | None, slots: torch.Tensor, new: torch.Tensor, n: int) -> torch.Tensor:
    """Return `states` `(n, ...)` with `new` `(R, ...)` at `slots` `(R,)`; missing `states` are zeros."""
    if states is None:
        states = new.new_zeros(n, new.shape[-1])
    return states.index_copy(0, slots.to(states.device), new.to(states.device))


class Forwards:
    """
    Gen's forwards in one decoding loop.

    Args:
        model ([`CoSupForCausalLM`]), settings ([`DecodingSettings`]), slots ([`Slots`]), cache ([`RowCache`]): of the
            loop.
        memory ([`Memory`], *optional*): mixed into the logits of every decision, as `settings.memory_config` says.

    Attributes:
        num_tokens (`int`): tokens that were forwarded so far.
    """

    def __init__(
        self, model: Any, settings: DecodingSettings, slots: Slots, cache: RowCache, memory: Memory | None = None
    ) -> None:
        self.model = model
        self.settings = settings
        self.slots = slots
        self.cache = cache
        self.memory = memory
        self.num_tokens = 0
        self.text_config = model.config.get_text_config()
        self.gives_queries = settings.retrieves and model.config.query_from == "gen"
        self.output_states: tuple[str, ...] | None = None
        if memory is not None and memory.states:
            self.output_states = memory.states
        self.slot_numbers = torch.arange(slots.count, device=slots.device)
        self.call_step = model.__call__
        generation_config = settings.generation_config
        if settings.static and model._valid_auto_compile_criteria({"past_key_values": cache}, generation_config):
            # shapes are fixed on purpose: a graph for symbolic ones would be slower
            compile_config = generation_config.compile_config or CompileConfig(dynamic=False)
            self.call_step = model.get_compiled_call(compile_config)

    def decode_step(self, stepping: NDArray[np.bool_], with_queries: bool) -> Outputs:
        """
        Forward the last token of every slot: one column.

        A slot that does not step is forwarded too. It writes to its next column, where its next chunk overwrites it.

        Args:
            stepping (`numpy.ndarray` of bool and shape `(n,)`): the slots whose results count.
            with_queries (`bool`): return query embeddings.
        """
        slots, static = self.slots, self.settings.static
        n = slots.count if static else len(slots)
        filled = int(slots.columns[: len(slots)].max()) + 1
        self.cache.grow(len(slots), filled)
        width = self.cache.columns if static else filled
        columns, positions = slots.columns_and_positions(n)  # (n, 1) each
        tokens = slots.tokens[:n, None]  # (n, 1)
        self.cache.begin(n, columns, tokens, positions, width)
        # all rows at the same column, which is their position: no mask is needed
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
        slots.count_step(stepping)
        self.num_tokens += int(stepping.sum())
        weight = self._memory_weight(np.arange(n), self.slot_numbers[:n])
        results = Outputs(self._mixed(outputs.logits[:, -1], outputs.states, weight), outputs.query_embeds)
        self._add_neighbors(results, outputs.states, np.arange(n))
        return results

    def prefill(self, chunks: dict[Row, list[int]], outputs: Outputs) -> None:
        """
        Forward one ragged chunk, and put the results at the last token of each of its rows into `outputs`.

        Args:
            chunks (`dict[Row, list[int]]`): token ids to append to each row.
            outputs ([`Outputs`]): of this pass.
        """
        if not chunks:
            return
        slots, device = self.slots, self.slots.device
        row_slots = np.array([row.slot for row in chunks])  # (R,)
        lengths = np.array([len(ids) for ids in chunks.values()])  # (R,)
        first_columns, first_positions = slots.columns[row_slots], slots.positions[row_slots]  # (R,) each
        ids, mask = pad_rows(list(chunks.values()), self.settings.pad, device=device)  # (R, W)
        num_rows, longest = ids.shape
        # the padding of a chunk is written to the one column after it
        width = int((first_columns + np.minimum(lengths + 1, longest)).max())
        self.cache.grow(len(slots), width)
        # one copy to the device for all four
        on_device = torch.from_numpy(np.stack([row_slots, lengths, first_columns, first_positions])).to(device)
        row_slots_on_device, counts, start_columns, start_positions = on_device.unbind()  # (R,) each
        offsets = torch.arange(longest, device=device)  # (W,)
        columns = start_columns[:, None] + torch.minimum(offsets, counts[:, None])  # (R, W)
        # padding repeats the last position
        positions = start_positions[:, None] + torch.minimum(offsets, counts[:, None] - 1)  # (R, W)
        are_first_slots = (row_slots == np.arange(num_rows)).all()
        cache_slots = num_rows if are_first_slots else row_slots_on_device
        self.cache.begin(cache_slots, columns, ids, torch.where(mask.bool(), positions, EMPTY), width)
        last_tokens = torch.arange(num_rows, device=device) * longest + counts - 1  # (R,), of (R · W)
        # all chunks of one length and at the same column, which is their position: no mask is needed
        even = (lengths == longest).all() and (first_columns == width - longest).all()
        even = even and (first_positions == first_columns).all()
        results = self.model(
            input_ids=ids,
            attention_mask=None if even else self._mask(positions),
            position_ids=positions,
            past_key_values=self.cache,
            use_cache=True,
            logit_positions=last_tokens,
            output_query_embeds=self.gives_queries,
            nsp_positions=last_tokens,
            output_states=self.output_states,
        )
        slots.count_chunks(row_slots, lengths)
        self.num_tokens += int(lengths.sum())
        weight = self._memory_weight(row_slots, row_slots_on_device)
        logits = self._mixed(results.logits, results.states, weight)
        outputs.place(row_slots_on_device, logits, results.query_embeds, len(slots))
        self._add_neighbors(outputs, results.states, row_slots)

    def dummy_forward(self) -> None:
        """Forward one token and discard the result, to take part in the collectives of the other ranks' forward."""
        token = torch.zeros(1, 1, dtype=torch.long, device=self.slots.device)
        self.model(input_ids=token, use_cache=False, output_query_embeds=False)

    def _memory_weight(self, row_slots: NDArray[np.int64], row_slots_on_device: torch.Tensor) -> float | torch.Tensor:
        """Return the memory's weight for the rows in these slots `(R,)`: one number for all of them, or `(R, 1)`."""
        config = self.settings.memory_config
        if self.memory is None or config is None:
            return 0.0
        weight, grounded_weight = config.weights
        grounded = self.slots.grounded[row_slots]
        if weight == grounded_weight or not grounded.any():
            return weight
        if grounded.all():
            return grounded_weight
        grounded_on_device = self.slots.grounded_on_device[row_slots_on_device, None]  # (R, 1)
        return torch.where(grounded_on_device, grounded_weight, weight)

    def _mixed(
        self, logits: torch.Tensor, states: dict[str, torch.Tensor] | None, weight: float | torch.Tensor
    ) -> torch.Tensor:
        """
        Return the logits mixed with the memory; called once per forward, so that nothing is mixed twice.

        Args:
            logits (`torch.Tensor` of shape `(R, V)`): Gen's, at one token of each row.
            states (`dict[str, torch.Tensor]`, *optional*): what entered Gen's submodules there.
            weight (`float` or `torch.FloatTensor` of shape `(R, 1)`): of the memory, which is not asked if this is 0.
        """
        if self.memory is None:
            return logits
        logits = logits.float()  # also at weight 0: other rows of this pass may be mixed, in float32
        if isinstance(weight, float | int) and weight == 0:
            return logits
        log_probs = self.memory.log_probs(states or {}, self.settings.memory_config)
        return mixed_logits(logits, log_probs, weight, self.settings.kept_ids)

    def _add_neighbors(
        self, outputs: Outputs, states: dict[str, torch.Tensor] | None, row_slots: NDArray[np.int64]
    ) -> None:
        """Ask the memory for its entries nearest to `states`, if the call wants them, and put them into `outputs`."""
        config = self.settings.memory_config
        if self.memory is None or config is None or not config.output_neighbors:
            return
        neighbors = self.memory.nearest(states or {}, config.output_neighbors, config)  # type: ignore[attr-defined]
        outputs.neighbors.update(zip(row_slots.tolist(), neighbors, strict=True))

    def _mask(self, positions: torch.Tensor) -> torch.Tensor | dict[str, torch.Tensor]:
        implementation = self.text_config._attn_implementation
        return attention_mask(self.cache, self.text_config, positions, implementation, self.model.gen.dtype)
