"""
The decoding loop of generate() and generate_many(). Rows generate, retrieve and end independently, in one batch.

A row (`Row`) is one sequence that is being generated. A slot (`Slots`) is a place in the batch: a row of the KV cache
and of all other state. A row takes a free slot and leaves it when it ends; then the last row moves into the gap,
unless the cache is static. Each pass of the loop (`Decoder._pass`) decides one token for every row:

1. Admit. Waiting rows take free slots: at first as many as fit, later several at a time, because all rows wait while
   a prompt is prefilled (`_admit`).
2. Decode step. Every row whose last token was not forwarded yet forwards it: one token per row
   (`Forwards.decode_step`). Most of the time goes here; with a static cache the step keeps its shapes and can be
   compiled.
3. Prefill. New rows forward their prompts, and rows that recompute forward their grounded text again, without its
   passage: one ragged chunk, padded on the right (`Forwards.prefill`). These rows take no part in the decode step.
4. Retrieve. Rows whose last token is `[NSP]` have just forwarded it, and the hidden state there is their query. They
   search together, add to their traces, and forward passage and `[Cs]` as a second chunk (`_retrieve`). If nothing is
   found for a row, it takes its `[NSP]` back: it decides again from the logits before it (`Row.logits_before_nsp`),
   with `[NSP]` banned once.
5. Decide. Every row now has the logits at its last token, from the decode step or from a chunk; a memory, if there is
   one, is mixed into them. Bans, logits processors and warpers turn them into scores; argmax or sampling gives the
   next token (`_decide`). The next pass forwards it.
6. Follow up. Only if a token is special (an end, `[NSP]`, `[CE]`), a budget is used up, or there is a streamer, the
   loop visits the rows one by one: they retrieve in the next pass, forget a passage, or end (`_follow_up`).

Inserting a passage repacks nothing: each row fills its columns of the cache without gaps, a chunk is written where its
row ends, and the attention mask is computed from the positions that are stored with the keys (`RowCache`). So no token
is forwarded twice unless a row recomputes, a row sees exactly what it would see alone, and rows may be at different
columns in one forward. Logits processors and stopping criteria see each row as if it were alone (`RowScores`).

Host and device synchronize in two places. Host to device: after a chunk, or when rows have moved, columns and
positions are copied (`Slots` says when). Device to host: once per pass, `_decide` asks whether any token is special. A
pass in which nothing happens waits for this one bit, copies nothing else, and does no work row by row.
"""

from collections import deque
from collections.abc import Callable
from typing import Any

import torch

from .cache_cosup import EMPTY, cache_for
from .forwards_cosup import Forwards, Outputs
from .lookup_cosup import Lookup, ScoredPassages
from .memory_cosup import Memory, TokenNeighbors
from .metadata_cosup import traced_passage
from .packing_cosup import pad_rows
from .retriever_cosup import Retriever
from .scores_cosup import RowScores
from .settings_cosup import DecodingSettings
from .slots_cosup import Slots
from .trace_cosup import Retrieval, RetrievalError, Row

_FAILED = 2  # state of a rank whose search failed; 1 if it needs a forward, 0 if not


class Decoder:
    """
    The decoding loop of one call of generate() or generate_many().

    Args:
        model ([`CoSupForCausalLM`]), settings ([`DecodingSettings`]): the model, and what is fixed for the call.
        retriever ([`Retriever`], *optional*): searches the index.
        memory ([`Memory`], *optional*): mixed into the logits of every decision.
        streamer (`BaseStreamer`, *optional*), synced_gpus (`bool`): as in generate().
    """

    def __init__(
        self,
        model: Any,
        settings: DecodingSettings,
        retriever: Retriever | None = None,
        memory: Memory | None = None,
        streamer: Any = None,
        synced_gpus: bool = False,
    ) -> None:
        self.model = model
        self.config = model.config
        self.settings = settings
        self.retrieval = settings.retrieval
        self.streamer = streamer
        self.synced_gpus = synced_gpus
        self.cache = cache_for(model, settings.num_slots, settings.num_columns, settings.device, settings.static)
        self.slots = Slots(
            settings.num_slots,
            settings.device,
            settings.pad,
            keeps_slots=settings.static,
            keeps_order=not settings.refill,
        )
        self.forwards = Forwards(model, settings, self.slots, self.cache, memory)
        self.scores = RowScores(settings, self.slots, self.cache, self.config.nsp_token_id)
        self.lookup = Lookup(model, retriever, self.retrieval)
        self.stops = {self.config.ce_token_id, self.config.nsp_token_id, *settings.ends}  # they end grounded text
        # rows that the next pass must treat in a special way
        self.retrieving: list[Row] = []  # their last token is [NSP]
        self.recomputing: list[Row] = []  # they forward their grounded text again, without its passage
        self.masking: list[Row] = []  # their passage leaves the cache once [CE] is forwarded
        self.banned_once: list[Row] = []  # nothing was found for them: they decide again, without [NSP]
        self.full: list[Row] = []  # a passage took the last of their context: they end
        self.finished: list[Row] = []
        self.on_finish: Callable[[Row], None] | None = None

    # ------------------------------------------------------------------ the loop

    @torch.no_grad()
    def run(self, rows: list[Row], on_finish: Callable[[Row], None] | None = None) -> list[Row]:
        """
        Generate all rows.

        Args:
            rows (`list[Row]`): in the order in which they start.
            on_finish (`Callable`, *optional*): gets each row when it ends.

        Returns:
            `list[Row]`: in the order in which they ended.

        Raises:
            [`RetrievalError`]: when the search fails; it keeps the finished rows.
        """
        waiting = deque(rows)
        self.on_finish = on_finish
        while self._has_unfinished_rows(waiting):
            self._pass(waiting)
        return self.finished

    def _has_unfinished_rows(self, waiting: deque[Row]) -> bool:
        """Return whether this rank, or with `synced_gpus` any, has rows that are not finished."""
        done = not (waiting or self.slots.occupied.any())
        return self.model._has_unfinished_sequences(done, self.synced_gpus, self.slots.device)

    def _pass(self, waiting: deque[Row]) -> None:
        """Decide one token for every row, after all forwards that must come before it."""
        new = self._admit(waiting)
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
        retrieving += [row for row in new if row.prompt[-1] == self.config.nsp_token_id and self._may_retrieve(row)]
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
            must_retrieve = [row for row in new if self.retrieval.force_nsp_first and not row.retrievals]
            self._decide(outputs, must_retrieve)

    def _sync_ranks(self, needs_forward: bool, error: RetrievalError | None = None) -> bool:
        """
        Return `needs_forward`: whether this rank has something to forward.

        With `synced_gpus` all ranks call this together. If one of them needs a forward, those that do not run a dummy
        forward. If one of them has an error, all raise.
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

    def _admit(self, waiting: deque[Row]) -> list[Row]:
        """Give free slots to waiting rows; once rows run, several at a time, since all of them wait for a prefill."""
        if not waiting:
            return []
        free = self.slots.free
        enough = min(max(1, self.slots.count // 8), len(waiting))
        if free < enough:
            return []
        new: list[Row] = []
        while waiting and len(new) < free:
            row = waiting.popleft()
            self.slots.occupy(row)
            self.slots.ban(row.slot, self.settings.retrieves and not self._may_retrieve(row))
            self.slots.ground(row.slot, row.begins_grounded(self.config.cs_token_id, self.stops))
            self.cache.positions[row.slot] = EMPTY  # hides the keys of the row that was here before
            new.append(row)
        return new

    def _may_retrieve(self, row: Row) -> bool:
        return row.may_retrieve(self.settings.max_retrievals)

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
        scores = self.scores.decision_scores(logits)
        if self.settings.do_sample:
            tokens = torch.multinomial(scores.softmax(-1), 1)[:, 0]
        else:
            tokens = scores.argmax(-1)
        forced_slots = [row.slot for row in must_retrieve if not slots.banned[row.slot]]
        if forced_slots:
            tokens[forced_slots] = self.config.nsp_token_id
        for row in self.banned_once:  # the ban was for this decision only
            slots.ban(row.slot, not self._may_retrieve(row))
        self.banned_once = []
        slots.set_tokens(tokens)
        self._keep_neighbors(outputs.neighbors)
        out_of_budget = slots.generated[:n] >= self.settings.budget
        out_of_context = slots.positions[:n] + 1 >= self.settings.context_length
        exhausted = slots.occupied[:n] & (out_of_budget | out_of_context)
        stopped = self.scores.stopped(tokens)
        special = stopped | torch.isin(tokens, self.settings.special)
        any_special = (special & slots.occupied_on_device[:n]).any()
        # item() waits for the device
        if any_special.item() or self.streamer is not None or exhausted.any():
            self._follow_up(tokens.tolist(), stopped.tolist(), exhausted.tolist(), logits)

    def _follow_up(self, tokens: list[int], stopped: list[bool], exhausted: list[bool], logits: torch.Tensor) -> None:
        """Act on the decisions: mark rows that retrieve next, forget passages, and finish rows that end."""
        ended: list[tuple[Row, list[int]]] = []
        for row, token, stops, is_last in zip(list(self.slots.rows), tokens, stopped, exhausted, strict=True):
            if row is None:
                continue
            if row in self.full:
                self.slots.generated[row.slot] -= 1  # there is no room for this token
                ended.append((row, []))
                continue
            retrieves = self.settings.retrieves and token == self.config.nsp_token_id
            ends = stops or is_last or token in self.settings.ends
            if ends or not retrieves:  # an [NSP] is streamed after the search, in which the row may take it back
                self._stream_ids([token])
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
        """Add to each row the memory's entries next to the token that it just decided, if the call wants them."""
        for slot, entry in neighbors.items():
            row = self.slots.rows[slot] if slot < len(self.slots) else None
            if row is not None:
                entry.position = int(self.slots.columns[slot]) + row.num_forgotten
                row.neighbors.append(entry)

    def _stream_ids(self, ids: list[int]) -> None:
        if self.streamer is not None and ids:
            self.streamer.put(torch.tensor(ids))

    # ------------------------------------------------------------------ retrieval

    def _retrieve(self, rows: list[Row], outputs: Outputs) -> dict[Row, list[int]]:
        """Look up passages for `rows`; return the token ids that each row forwards next: passages and `[Cs]`."""
        query_embeds = None
        try:
            if self.retrieval.output_query_embeds or any(row.given_passages is None for row in rows):
                query_embeds = self._query_embeds_of(rows, outputs.query_embeds)  # (R, h)
            results = self.lookup.passages_for(rows, query_embeds)
        except Exception as error:  # an encoder or a retriever may raise anything: finished rows must not be lost
            message = f"The search failed after {len(self.finished)} finished rows: {error}"
            raise RetrievalError(message, self.finished) from error
        trace_embeds: list[list[float] | None] = [None] * len(rows)
        if self.retrieval.output_query_embeds and query_embeds is not None:
            trace_embeds = query_embeds.tolist()
        chunks = {}
        for row, passages, query_embed in zip(rows, results, trace_embeds, strict=True):
            room = self.settings.context_length - int(self.slots.positions[row.slot]) - 1  # 1 for [Cs]
            if not passages:
                self._take_nsp_back(row, outputs)
            elif room < 1:  # not even for one token of a passage
                self.full.append(row)
                if row.logits_before_nsp is not None:  # otherwise [NSP] is the prompt's
                    self._stream_ids([self.config.nsp_token_id])
            else:
                chunks[row] = self._add_retrieval(row, passages, room, query_embed)
            row.logits_before_nsp = None
        return chunks

    def _query_embeds_of(self, rows: list[Row], query_embeds: torch.Tensor | None) -> torch.Tensor:
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

    def _add_retrieval(
        self, row: Row, passages: ScoredPassages, room: int, query_embed: list[float] | None
    ) -> list[int]:
        """Add to the trace and return what the row forwards: the first `room` tokens of its passages, and `[Cs]`."""
        ids, starts = self.lookup.join([passage for passage, _ in passages])
        ids = ids[:room]
        num_begun = len([start for start in starts if start < room])
        passages = passages[:num_begun]  # the others have no token in `ids`
        column = int(self.slots.columns[row.slot])
        position = column - 1 + row.num_forgotten  # of [NSP]
        span_start = position + len(ids) + 2  # after [NSP], passages and [Cs]
        retrieval = Retrieval(
            row=row.number,
            position=position,
            passages=[traced_passage(passage) for passage, _ in passages],
            scores=[score for _, score in passages],
            grounded_span=(span_start, span_start),
            query_embed=query_embed,
        )
        row.retrievals.append(retrieval)
        row.passage_columns = (column, column + len(ids))
        self.slots.ground(row.slot, True)
        chunk = [*ids, self.config.cs_token_id]
        self._stream_retrieval(row, retrieval, chunk)
        self.slots.ban(row.slot, not self._may_retrieve(row))
        if int(self.slots.positions[row.slot]) + len(chunk) >= self.settings.context_length:
            self.full.append(row)
        return chunk

    def _stream_retrieval(self, row: Row, retrieval: Retrieval, chunk: list[int]) -> None:
        """Give a streamer the retrieval; or its tokens, `[NSP]` and `chunk`, if it has no method for retrievals."""
        on_retrieval = getattr(self.streamer, "on_retrieval", None)
        if on_retrieval is not None:
            on_retrieval(retrieval)
            return
        ids: list[int] = []
        if row.logits_before_nsp is not None:  # otherwise [NSP] is the prompt's
            ids.append(self.config.nsp_token_id)
        if self.retrieval.stream_passages:
            ids += chunk
        self._stream_ids(ids)

    # ------------------------------------------------------------------ forgetting

    def _forget_passage(self, row: Row) -> None:
        """Forget the passage of a row that has decided `[CE]`, by recomputing or masking."""
        if self.retrieval.forget_passages == "mask":
            self.masking.append(row)  # [CE] is forwarded with the passage in view
        elif self.retrieval.forget_passages == "recompute":
            cached_ids = self._cached_ids(row)
            length = len(cached_ids)
            start, end = row.forget(cached_ids)
            grounded_ids = cached_ids[end:]  # [Cs] and the text
            self.cache.cut(row.slot, start, length, length)
            self.slots.shorten(row.slot, columns=length - start, positions=length - start)
            row.recompute_ids = [*grounded_ids, self.config.ce_token_id]
            self.recomputing.append(row)

    def _drop_masked_passages(self) -> None:
        """Remove passages whose `[CE]` was just forwarded from the cache; later tokens keep their positions."""
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
        """Complete the ids and the trace of a row, with `last_ids` that were not forwarded, and free its slot."""
        row.num_generated_tokens = int(self.slots.generated[row.slot])
        row.finish(self._cached_ids(row) + last_ids, self.stops)
        self.finished.append(row)
        freed = row.slot
        source = self.slots.vacate(row)
        if source is not None:
            self.cache.move(source, freed, int(self.slots.columns[freed]))
        if self.on_finish is not None:
            self.on_finish(row)
