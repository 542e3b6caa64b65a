"""
The decoding loop of generate(), generate_many() and servers. Rows generate, retrieve and end independently, in one
batch. Each row has settings (`RowSettings`); all rows of one call have the same.

A row (`Row`) is one sequence that is being generated. A slot (`Slots`) is a place in the batch: a row of the KV cache
and of all other state. A row takes a free slot and leaves it when it ends; then the last row moves into the gap,
unless the cache is static. Rows may be submitted and cancelled between passes. Each pass of the loop (`Decoder.step`)
decides one token for every row:

1. Admit. Waiting rows take free slots in their order (`Admission`). Rows without room wait again (`room_cosup`).
2. Decode step. Every row whose last token was not forwarded yet forwards it: one token per row
   (`Forwards.decode_step`). Most of the time goes here; with a static cache the step keeps its shapes and can be
   compiled.
3. Prefill. New rows forward their prompts, and rows that recompute forward their grounded text again, without its
   passage: one ragged chunk, padded on the right (`Forwards.prefill`). These rows take no part in the decode step.
4. Retrieve. Rows whose last token is `[NSP]` have just forwarded it, and the hidden state there is their query. They
   search together, add to their traces, and forward passage and `[Cs]` as a second chunk (`_retrieve`). A row for
   which nothing is found takes its `[NSP]` back. It decides again from the logits before that `[NSP]`
   (`Row.logits_before_nsp`), this once without `[NSP]`.
5. Decide. Every row now has the logits at its last token, from the decode step or from a chunk; a memory, if there is
   one, is mixed into them. Bans, logits processors and warpers turn them into scores; argmax or sampling gives the
   next token (`_decide`). The next pass forwards it.
6. Follow up. Only if a token is special (an end, `[NSP]`, `[CE]`) or a budget is used up, the loop visits the rows
   one by one: they retrieve in the next pass, forget a passage, or end (`_follow_up`). In other passes it visits only
   rows that have a listener.

Inserting a passage repacks nothing: each row fills its columns of the cache without gaps, a chunk is written where its
row ends, and the attention mask is computed from the positions that are stored with the keys (`RowCache`). So no token
is forwarded twice unless a row recomputes, a row sees exactly what it would see alone, and rows may be at different
columns in one forward. Logits processors and stopping criteria see each row as if it were alone (`RowScores`).

Host and device synchronize in two places. Host to device: after a chunk, or when rows have moved, columns and
positions are copied (`Slots` says when). Device to host: once per pass, `_decide` asks whether any token is special. A
pass in which nothing happens waits for this one bit, unless rows have listeners, log-probabilities or processors.
"""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch

from .admission_cosup import Admission
from .cache_cosup import EMPTY, cache_for
from .forwards_cosup import Forwards, Outputs
from .lookup_cosup import Lookup, ScoredPassages
from .memory_cosup import Memory, TokenNeighbors
from .packing_cosup import pad_rows
from .retriever_cosup import Retriever
from .room_cosup import has_room, put_back, set_latest_aside
from .scores_cosup import RowScores
from .settings_cosup import DecodingSettings
from .slots_cosup import Slots
from .trace_cosup import RetrievalError, Row

_FAILED = 2  # state of a rank whose search failed; 1 if it needs a forward, 0 if not


class Decoder:
    """
    The decoding loop of one call of generate() or generate_many(), or of a server.

    Args:
        model ([`CoSupForCausalLM`]), settings ([`DecodingSettings`]): the model, and what is the same for all rows.
        retriever ([`Retriever`], *optional*): searches the index.
        memory ([`Memory`], *optional*): mixed into the logits of every decision.
        synced_gpus (`bool`): as in generate().
    """

    def __init__(
        self,
        model: Any,
        settings: DecodingSettings,
        retriever: Retriever | None = None,
        memory: Memory | None = None,
        synced_gpus: bool = False,
    ) -> None:
        self.model = model
        self.config = model.config
        self.settings = settings
        self.synced_gpus = synced_gpus
        self.cache = cache_for(model, settings)
        self.slots = Slots(
            settings.num_slots,
            settings.device,
            settings.pad,
            keeps_slots=settings.static,
            keeps_order=not settings.refill,
        )
        self.admission = Admission(self.config, settings, self.slots)
        self.forwards = Forwards(model, settings, self.slots, self.cache, memory)
        self.scores = RowScores(settings, self.slots, self.cache, self.config.nsp_token_id)
        self.lookup = Lookup(model, retriever)
        self.stops = {self.config.ce_token_id, self.config.nsp_token_id, *settings.ends}  # they end grounded text
        # rows that the next pass must treat in a special way
        self.retrieving: list[Row] = []  # their last token is [NSP]
        self.recomputing: list[Row] = []  # they forward their grounded text again, without its passage
        self.masking: list[Row] = []  # their passage leaves the cache once [CE] is forwarded
        self.banned_once: list[Row] = []  # nothing was found for them: they decide again, without [NSP]
        self.full: list[Row] = []  # a passage took the last of their context: they end
        self.failed: list[Row] = []  # their search failed: they end
        self.listening: list[Row] = []  # they have a listener
        self.num_submitted = 0
        self.ended: list[Row] = []  # in this pass
        self.finished: list[Row] = []  # of `run`

    # ------------------------------------------------------------------ rows come and go

    def run(self, rows: Iterable[Row], on_finish: Callable[[Row], None] | None = None) -> list[Row]:
        """
        Generate all rows.

        Args:
            rows (iterable of [`Row`]): in the order in which they start.
            on_finish (`Callable`, *optional*): gets each row when it ends.

        Returns:
            `list[Row]`: in the order in which they ended.

        Raises:
            [`RetrievalError`]: when the search fails; it keeps the finished rows.
        """
        for row in rows:
            self.submit(row)
        while self._has_unfinished_rows():
            for row in self.step():
                self.finished.append(row)
                if on_finish is not None:
                    on_finish(row)
        return self.finished

    def submit(self, row: Row) -> None:
        """Let a row wait for a slot."""
        row.arrival = self.num_submitted
        self.num_submitted += 1
        self.admission.waiting.append(row)

    def cancel(self, row: Row) -> None:
        """Take out a row that waits or runs; its slot is free at once. Nothing happens to a row that has ended."""
        if row in self.admission.waiting:
            self.admission.waiting.remove(row)
        elif row in self.slots.rows:
            for rows in (self.retrieving, self.recomputing, self.masking, self.banned_once, self.full):
                if row in rows:
                    rows.remove(row)
            self._free_slot(row)

    @property
    def has_rows(self) -> bool:
        """Whether rows wait or run."""
        return bool(self.admission.waiting) or bool(self.slots.occupied.any())

    def _has_unfinished_rows(self) -> bool:
        """Return whether this rank has rows that are not finished; with `synced_gpus`, whether any rank has."""
        return self.model._has_unfinished_sequences(not self.has_rows, self.synced_gpus, self.slots.device)

    # ------------------------------------------------------------------ one pass

    @torch.no_grad()
    def step(self) -> list[Row]:
        """
        Decide one token for every row, after all forwards that must come before it.

        Returns:
            `list[Row]`: the rows that have ended, finished or with an `error`.

        Raises:
            [`RetrievalError`]: when the search fails, unless `settings.serves`.
        """
        self.ended = []
        while not has_room(self.config, self.settings, self.slots, self.retrieving, self.recomputing):
            set_latest_aside(self)
        new = self._admit()
        chunks = {row: row.prompt for row in new}
        for row in self.recomputing:
            chunks[row] = row.recompute_ids
        stepping = self.slots.occupied[: len(self.slots)].copy()
        stepping[[row.slot for row in chunks]] = False
        retrieving = self.retrieving
        self.retrieving = []
        self.recomputing = []
        outputs = Outputs()
        if self._sync_ranks(bool(stepping.any())):
            outputs = self.forwards.decode_step(stepping, with_queries=bool(retrieving))
        if self._sync_ranks(bool(chunks)):
            self.forwards.prefill(chunks, outputs)
        self._drop_masked_passages()
        retrieving += [row for row in new if row.prompt[-1] == self.config.nsp_token_id and row.may_retrieve]
        passage_chunks: dict[Row, list[int]] = {}
        error = None
        try:
            if retrieving:
                passage_chunks = self._retrieve(retrieving, outputs)
        except RetrievalError as failure:
            error = failure
        if self._sync_ranks(bool(passage_chunks), error):
            self.forwards.prefill(passage_chunks, outputs)
        if self.slots.occupied.any():
            must_retrieve = []
            for row in new:
                if row.settings.retrieval.force_nsp_first and not row.retrievals:
                    must_retrieve.append(row)
            self._decide(outputs, must_retrieve)
        self._end_failed_rows()
        if self.ended and self.settings.serves and not self.admission.waiting:
            self.cache.shrink(len(self.slots), int(self.slots.columns[: len(self.slots)].max(initial=0)))
        return self.ended

    def _sync_ranks(self, needs_forward: bool, error: RetrievalError | None = None) -> bool:
        """
        Return `needs_forward`, which says whether this rank has something to forward, once all ranks are in step.

        With `synced_gpus` all ranks call this together. If any of them needs a forward, the others run a dummy
        forward. If any of them has an error, all raise.
        """
        state = _FAILED if error is not None else int(needs_forward)
        if self.synced_gpus:
            state_of_all = torch.tensor(state, device=self.slots.device)
            torch.distributed.all_reduce(state_of_all, op=torch.distributed.ReduceOp.MAX)
            state = int(state_of_all)
        if state == _FAILED:
            raise error or RetrievalError("The search of another rank failed.", self.finished)
        if state and not needs_forward:
            self.forwards.dummy_forward()
        return needs_forward

    def _admit(self) -> list[Row]:
        """Give free slots to waiting rows. Return the new ones, not those that were set aside and now go on."""
        admitted = self.admission.admit()
        new = [row for row in admitted if row.set_aside is None]
        if admitted:
            lengths = [len(row.set_aside.tokens) for row in admitted if row.set_aside is not None]
            filled = int(self.slots.columns[: len(self.slots)].max())  # of rows that run
            self.cache.grow(len(self.slots), max([filled, *lengths]))
        for row in admitted:
            self.cache.positions[row.slot] = EMPTY  # hides the keys of the row that was here before
            if row.listener is not None:
                self.listening.append(row)
            if row.set_aside is not None:
                put_back(row, self)
        for row in new:
            self.slots.ban(row.slot, not row.may_decide_nsp)
            self.slots.ground(row.slot, row.begins_grounded(self.config.cs_token_id, self.stops))
        return new

    # ------------------------------------------------------------------ decisions

    def _decide(self, outputs: Outputs, must_retrieve: list[Row]) -> None:
        """
        Decide the next token of each row.

        Args:
            outputs ([`Outputs`]): at the last token of each row, by slot.
            must_retrieve (`list[Row]`): rows whose next token is `[NSP]`, unless it is banned for them.
        """
        slots, n = self.slots, len(self.slots)
        logits = outputs.logits[:n].to(slots.device)
        tokens = self.scores.choose(self.scores.decision_scores(logits))
        forced_slots = [row.slot for row in must_retrieve if not slots.banned[row.slot]]
        if forced_slots:
            tokens[forced_slots] = self.config.nsp_token_id
        for row in self.banned_once:  # the ban was for this decision only
            slots.ban(row.slot, not row.may_decide_nsp)
        self.banned_once = []
        slots.set_tokens(tokens)
        self._keep_neighbors(outputs.neighbors)
        for row, logprobs in self.scores.logprobs(logits, tokens).items():
            row.logprobs.append(logprobs)
        out_of_budget = slots.generated[:n] >= slots.budgets[:n]
        out_of_context = slots.positions[:n] + 1 >= self.settings.context_length
        exhausted = slots.occupied[:n] & (out_of_budget | out_of_context)
        stopped = self.scores.stopped(tokens)
        special = stopped | torch.isin(tokens, self.settings.special)
        any_special = (special & slots.occupied_on_device[:n]).any()
        # item() waits for the device
        if any_special.item() or exhausted.any():
            self._follow_up(tokens.tolist(), stopped.tolist(), exhausted.tolist(), logits)
        elif self.listening:
            decided = tokens.tolist()
            for row in self.listening:
                _tell(row, decided[row.slot])

    def _follow_up(self, tokens: list[int], stopped: list[bool], exhausted: list[bool], logits: torch.Tensor) -> None:
        """Act on the decisions: mark rows that retrieve next, forget passages, and finish rows that end."""
        ended: list[tuple[Row, list[int]]] = []
        for row, token, stops, is_last in zip(list(self.slots.rows), tokens, stopped, exhausted, strict=True):
            if row is None or row.error is not None:
                continue
            row.finish_reason = "length"
            if row in self.full:
                self.slots.generated[row.slot] -= 1  # there is no room for this token
                ended.append((row, []))
                continue
            retrieves = row.settings.retrieves and token == self.config.nsp_token_id
            if stops or token in self.settings.ends:
                row.finish_reason = "stop"
            ends = is_last or row.finish_reason == "stop"
            if ends or not retrieves:  # an [NSP] is told after the search, in which the row may take it back
                _tell(row, token)
            if ends:
                ended.append((row, [token]))
            elif retrieves:
                row.logits_before_nsp = logits[row.slot].clone()
                self.retrieving.append(row)
            elif token in self.stops:
                self.slots.ground(row.slot, False)
                if token == self.config.ce_token_id and row.passage_columns is not None:
                    self._forget_passage(row)
        self.full = []
        for row, last_ids in ended:
            self._finish_row(row, last_ids)

    def _keep_neighbors(self, neighbors: dict[int, TokenNeighbors]) -> None:
        """Add to each row the memory's entries nearest to the state of its last decision, if the call wants them."""
        for slot, entry in neighbors.items():
            row = self.slots.rows[slot] if slot < len(self.slots) else None
            if row is not None:
                entry.position = int(self.slots.columns[slot]) + row.num_forgotten
                row.neighbors.append(entry)

    # ------------------------------------------------------------------ retrieval

    def _retrieve(self, rows: list[Row], outputs: Outputs) -> dict[Row, list[int]]:
        """Look up passages for `rows`; return the token ids that each row forwards next: passages and `[Cs]`."""
        query_embeds_of = partial(self._query_embeds_of, outputs.query_embeds)
        try:
            found = self.lookup.find(rows, query_embeds_of, isolates_failures=self.settings.serves)
        except Exception as error:  # an encoder or a retriever may raise anything: finished rows must not be lost
            message = f"The search failed after {len(self.finished)} finished rows: {error}"
            raise RetrievalError(message, self.finished) from error
        self.failed = [row for row in rows if row.error is not None]
        chunks = {}
        for row, (passages, query_embed) in found.items():
            room = self.settings.context_length - int(self.slots.positions[row.slot]) - 1  # 1 for [Cs]
            if not passages:
                self._take_nsp_back(row, outputs)
            elif room < 1:  # not even for one token of a passage
                self.full.append(row)
                if row.logits_before_nsp is not None:  # otherwise [NSP] is the prompt's
                    _tell(row, self.config.nsp_token_id)
            else:
                chunks[row] = self._add_retrieval(row, passages, room, query_embed)
            row.logits_before_nsp = None
        return chunks

    def _query_embeds_of(self, query_embeds: torch.Tensor | None, rows: list[Row]) -> torch.Tensor:
        """
        Return the query embeddings `(R, h)` of `rows`, in float32.

        They are taken from Gen's `query_embeds` `(n, h)`, by slot; or an encoder makes them from the rows' token ids.
        """
        if self.config.query_from == "gen":
            assert query_embeds is not None  # prefill returns them, and so does a decode step if rows retrieve
            slots = torch.tensor([row.slot for row in rows], device=query_embeds.device)
            return query_embeds[slots].float()
        ids = [self._cached_ids(row) for row in rows]
        return self.model.encode_queries(*pad_rows(ids, self.settings.pad, device=self.slots.device)).float()

    def _take_nsp_back(self, row: Row, outputs: Outputs) -> None:
        """Take back a row's `[NSP]`, for which nothing was found; a prompt's `[NSP]` stays."""
        self.slots.ban(row.slot, True)
        self.banned_once.append(row)
        if row.logits_before_nsp is not None:
            self.slots.take_token_back(row.slot)
            outputs.logits[row.slot] = row.logits_before_nsp
            if row.neighbors:
                outputs.neighbors[row.slot] = row.neighbors.pop()
            if row.logprobs:
                row.logprobs.pop()

    def _add_retrieval(
        self, row: Row, passages: ScoredPassages, room: int, query_embed: list[float] | None
    ) -> list[int]:
        """Add to the trace and return what the row forwards: the first `room` tokens of its passages, and `[Cs]`."""
        chunk = self.lookup.add_retrieval(row, passages, int(self.slots.columns[row.slot]), room, query_embed)
        self.slots.ground(row.slot, True)
        if row.listener is not None:
            nsp_ids: list[int] = []
            if row.logits_before_nsp is not None:  # otherwise [NSP] is the prompt's
                nsp_ids.append(self.config.nsp_token_id)
            row.listener.on_retrieval(row.retrievals[-1], nsp_ids, chunk)
        self.slots.ban(row.slot, not row.may_decide_nsp)
        if int(self.slots.positions[row.slot]) + len(chunk) >= self.settings.context_length:
            self.full.append(row)
        return chunk

    # ------------------------------------------------------------------ forgetting

    def _forget_passage(self, row: Row) -> None:
        """Forget the passage of a row that has decided `[CE]`, by recomputing or masking."""
        forget = row.settings.retrieval.forget_passages
        if forget == "mask":
            self.masking.append(row)  # [CE] is forwarded with the passage in view
        elif forget == "recompute":
            cached_ids = self._cached_ids(row)
            length = len(cached_ids)
            start, end = row.forget(cached_ids)
            grounded_ids = cached_ids[end:]  # [Cs] and the text
            self.cache.cut(row.slot, start, length, length)
            self.slots.shorten(row.slot, columns=length - start, positions=length - start)
            row.recompute_ids = [*grounded_ids, self.config.ce_token_id]
            self.recomputing.append(row)

    def _drop_masked_passages(self) -> None:
        """Remove from the cache the passages whose `[CE]` was just forwarded; later tokens keep their positions."""
        for row in self.masking:
            cached_ids = self._cached_ids(row)
            start, end = row.forget(cached_ids)
            self.cache.cut(row.slot, start, end, len(cached_ids))
            self.slots.shorten(row.slot, columns=end - start, positions=0)
        self.masking = []

    def _cached_ids(self, row: Row) -> list[int]:
        """Return the token ids of a row that are in the cache."""
        return self.cache.tokens[row.slot, : self.slots.columns[row.slot]].tolist()

    # ------------------------------------------------------------------ ending

    def _finish_row(self, row: Row, last_ids: list[int]) -> None:
        """Complete the ids and the trace of a row and free its slot; `last_ids` were decided but not forwarded."""
        row.num_generated_tokens = int(self.slots.generated[row.slot])
        row.finish(self._cached_ids(row) + last_ids, self.stops)
        self.ended.append(row)
        self._free_slot(row)

    def _end_failed_rows(self) -> None:
        for row in self.failed:
            self.ended.append(row)
            self._free_slot(row)
        self.failed = []

    def _free_slot(self, row: Row) -> None:
        row.logits_before_nsp = None
        self.vacate(row)

    def vacate(self, row: Row) -> None:
        """Free the slot of a row."""
        if row.listener is not None:
            self.listening.remove(row)
        freed = row.slot
        source = self.slots.vacate(row)
        if source is not None:
            self.cache.move(source, freed, int(self.slots.columns[freed]))


def _tell(row: Row, token: int) -> None:
    """Give a row's listener, if it has one, a decided token."""
    if row.listener is not None and row.error is None:
        logprobs = row.logprobs[-1] if row.logprobs else None
        row.listener.on_token(token, logprobs)
