"""
The decoding loop of generate() and generate_many(): rows that write, retrieve, end and make room for others, each at
its own pace.

A slot is a place in the batch, with a row of the KV cache and a row of everything else that is known (`Slots`). A row
of the call (`Row`) takes a free slot and keeps it until it ends; then the last row moves into the gap. Each pass
(`Decoder._pass`) makes one decision for every row:

1. Admit. Waiting rows take the slots that are free: at first all that fit, later a few at a time, since a prompt that
   is read costs every row a forward (`_admit`).
2. Step. Every row with a decision that was not forwarded yet forwards it: one token per row, one column
   (`Forwards.step`). This is most of the work; with a static cache it keeps its shapes and can be compiled.
3. Read. New rows forward their prompts, rows that forget a passage forward their text again: one ragged chunk, padded
   on the right (`Forwards.read`). These rows do not count in the step.
4. Retrieve. Rows that decided `[NSP]` have just forwarded it, and their hidden state there is their query. They search
   together, write their trace, and read passage and `[Cs]` as a second chunk (`_retrieve`). A row for
   which nothing is found takes its `[NSP]` back: it decides again from the logits before it
   (`Row.logits_before_nsp`), and `[NSP]` is banned once.
5. Decide. Every row now has the logits of its last token, from the step or from a chunk, adjusted once if there is a
   memory. Bans, logits processors and warpers give scores, and argmax or a sample the next token (`_decide`). It is
   forwarded in the next pass.
6. Follow up. Only if a token is special (an end, `[NSP]`, `[CE]`), a budget is used up, or a streamer is attached, the
   loop looks at rows one by one: they ask, forget, or end and free their slot (`_follow_up`).

Growing a row by a passage repacks nothing: each row fills its columns without gaps, a chunk is written where its row
ends, and the attention mask is made of the positions that are stored with the keys (`RowCache`).
So no token is forwarded twice, a row reads exactly what it would read alone, and rows may be at different columns in
the same forward. Processors and criteria are shown rows as if each had been alone (`RowScores`).

Host and device meet in two places. Going out: a chunk, or rows that moved, send their columns and positions (`Slots`
says when). Coming back: `_decide` asks once a pass whether anything special was decided. A pass in which nothing
happens waits for this one bit, copies nothing else, and does no work row by row.
"""

from collections import deque
from collections.abc import Callable
from typing import Any

import torch

from .cache_cosup import EMPTY, cache_for
from .forwards_cosup import Forwards, Outputs
from .lookup_cosup import Lookup, ScoredPassages
from .memory_cosup import Memory
from .retriever_cosup import Retriever
from .scores_cosup import RowScores
from .settings_cosup import DecodingSettings
from .slots_cosup import Slots
from .tokenization_cosup import pad_rows
from .trace_cosup import Retrieval, RetrievalError, Row


class Decoder:
    """
    One call of generate() or generate_many().

    Args:
        model ([`CoSupForCausalLM`]), settings ([`DecodingSettings`]): what writes, and what is fixed for the call.
        retriever ([`Retriever`], *optional*), memory ([`Memory`], *optional*): what is searched, what adjusts logits.
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
            keeps_places=settings.static,
            keeps_order=not settings.refill,
        )
        self.forwards = Forwards(model, settings, self.slots, self.cache, memory)
        self.scores = RowScores(settings, self.slots, self.cache, self.config.nsp_token_id)
        self.lookup = Lookup(model, retriever, self.retrieval)
        # rows to which something happens in the next pass
        self.asking: list[Row] = []  # their last decision was [NSP]
        self.banned_once: list[Row] = []  # nothing was found for them: they decide again
        self.rereading: list[Row] = []  # read their text again, without its passage
        self.forgetting: list[Row] = []  # their passage leaves the cache once [CE] was read
        self.full: list[Row] = []  # the context ended with their passage
        self.finished: list[Row] = []
        self.on_finish: Callable[[Row], None] | None = None

    # ------------------------------------------------------------------ the loop

    @torch.no_grad()
    def run(self, rows: list[Row], on_finish: Callable[[Row], None] | None = None) -> list[Row]:
        """
        Write all rows.

        Args:
            rows (`list[Row]`): in the order in which they are to begin.
            on_finish (`Callable`, *optional*): gets each row when it is done.

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
        """Decide one token for every row, after forwarding all that must come before."""
        new = self._admit(waiting)
        reading = {row: row.prompt for row in new}
        for row in self.rereading:
            reading[row] = row.reread_ids
        stepping = self.slots.occupied[: len(self.slots)].copy()
        stepping[[row.slot for row in reading]] = False
        asking = self.asking
        self.asking = []
        self.rereading = []
        outputs = Outputs()
        if self._keep_step(bool(stepping.any())):
            outputs = self.forwards.step(stepping, with_queries=bool(asking))
        if self._keep_step(bool(reading)):
            self.forwards.read(reading, outputs)
        self._drop_masked_passages()
        asking += [row for row in new if row.prompt[-1] == self.config.nsp_token_id and self._may_retrieve(row)]
        passages: dict[Row, list[int]] = {}
        error = None
        try:
            if asking:
                passages = self._retrieve(asking, outputs)
        except RetrievalError as failure:
            error = failure
        if self._keep_step(bool(passages), error):
            self.forwards.read(passages, outputs)
        if self.slots.occupied.any():
            forced = [row for row in new if self.retrieval.force_nsp_first and not row.retrievals]
            self._decide(outputs.logits, forced)

    def _keep_step(self, needed: bool, error: RetrievalError | None = None) -> bool:
        """
        Return whether this rank has something to forward.

        With `synced_gpus` all ranks call this together. A rank that has nothing while another has keeps up with the
        collectives of a forward, and an error of one rank ends them all.
        """
        state = 2 if error is not None else int(needed)
        if self.synced_gpus:
            flag = torch.tensor(state, device=self.slots.device)
            torch.distributed.all_reduce(flag, op=torch.distributed.ReduceOp.MAX)
            state = int(flag)
        if state == 2:
            raise error or RetrievalError("The search of another rank failed.", self.finished)
        if state and not needed:
            self.forwards.keep_up()
        return needed

    def _admit(self, waiting: deque[Row]) -> list[Row]:
        """Give free slots to waiting rows; not one at a time, since reading a prompt costs everyone a forward."""
        if not waiting:
            return []
        free, count = self.slots.free, self.slots.count
        enough = min(max(1, count // 8), len(waiting))
        if free < enough and free < count:
            return []
        new: list[Row] = []
        while waiting and len(new) < free:
            row = waiting.popleft()
            self.slots.occupy(row)
            self.slots.ban(row.slot, self.settings.retrieves and not self._may_retrieve(row))
            self.cache.positions[row.slot] = EMPTY
            new.append(row)
        return new

    def _may_retrieve(self, row: Row) -> bool:
        return row.may_retrieve(self.settings.max_retrievals)

    # ------------------------------------------------------------------ decisions

    def _decide(self, logits: torch.Tensor, forced: list[Row]) -> None:
        """Decide one token for each row, from `logits` `(n, V)` of the first slots; rows of `forced` take `[NSP]`."""
        slots, n = self.slots, len(self.slots)
        logits = logits[:n].to(slots.device)
        scores = self.scores.decision_scores(logits)
        if self.settings.do_sample:
            tokens = torch.multinomial(scores.softmax(-1), 1)[:, 0]
        else:
            tokens = scores.argmax(-1)
        forced_slots = [row.slot for row in forced if not slots.banned[row.slot]]
        if forced_slots:
            tokens[forced_slots] = self.config.nsp_token_id
        for row in self.banned_once:
            slots.ban(row.slot, not self._may_retrieve(row))
        self.banned_once = []
        slots.note_decisions(tokens)
        out_of_budget = slots.generated[:n] >= self.settings.budget
        out_of_context = slots.positions[:n] + 1 >= self.settings.context_length
        exhausted = slots.occupied[:n] & (out_of_budget | out_of_context)
        stopped = self.scores.stopped(tokens)
        special = stopped | torch.isin(tokens, self.settings.special)
        any_special = (special & slots.occupied_on_device[:n]).any()
        if any_special.item() or self.streamer is not None or exhausted.any():  # item() waits for the device
            self._follow_up(tokens.tolist(), stopped.tolist(), exhausted.tolist(), logits)

    def _follow_up(self, tokens: list[int], stopped: list[bool], exhausted: list[bool], logits: torch.Tensor) -> None:
        """Do what follows from the decisions: rows end, ask for passages, or forget one."""
        done: list[tuple[Row, list[int]]] = []
        for row, token, stops, is_last in zip(list(self.slots.rows), tokens, stopped, exhausted, strict=True):
            if row is None:
                continue
            if row in self.full:
                self.slots.generated[row.slot] -= 1  # no room for what was decided
                done.append((row, []))
                continue
            asks = self.settings.retrieves and token == self.config.nsp_token_id
            ends = stops or is_last or token in self.settings.ends
            if ends or not asks:  # the [NSP] of a row that asks waits for the search
                self._stream_ids([token])
            if ends:
                done.append((row, [token]))
            elif asks:
                row.logits_before_nsp = logits[row.slot].clone()
                self.asking.append(row)
            elif token == self.config.ce_token_id and row.passage_columns is not None:
                self._forget_passage(row)
        self.full = []
        for row, last_ids in done:
            self._finish_row(row, last_ids)

    def _stream_ids(self, ids: list[int]) -> None:
        if self.streamer is not None and ids:
            self.streamer.put(torch.tensor(ids))

    # ------------------------------------------------------------------ retrieval

    def _retrieve(self, asking: list[Row], outputs: Outputs) -> dict[Row, list[int]]:
        """Look up passages for all rows that ask; return the ids that they read next: of the passages, and `[Cs]`."""
        query_embeds = None
        if self.retrieval.output_query_embeds or any(row.given_passages is None for row in asking):
            query_embeds = self._query_embeds_of(asking, outputs.query_embeds)  # (R, h)
        try:
            results = self.lookup.passages_for(asking, query_embeds)
        except Exception as error:  # whatever a retriever raises: the finished rows must not be lost with it
            message = f"The search failed after {len(self.finished)} finished rows: {error}"
            raise RetrievalError(message, self.finished) from error
        trace_embeds: list[list[float] | None] = [None] * len(asking)
        if self.retrieval.output_query_embeds and query_embeds is not None:
            trace_embeds = query_embeds.tolist()
        chunks = {}
        for row, passages, query_embed in zip(asking, results, trace_embeds, strict=True):
            room = self.settings.context_length - int(self.slots.positions[row.slot]) - 1
            if not passages:
                self._take_nsp_back(row, outputs.logits)
            elif room < 1:  # not even one token of a passage can be read
                self.full.append(row)
                if row.logits_before_nsp is not None:  # the [NSP] was not the prompt's: it waited for the search
                    self._stream_ids([self.config.nsp_token_id])
            else:
                chunks[row] = self._add_retrieval(row, passages, room, query_embed)
            row.logits_before_nsp = None
        return chunks

    def _query_embeds_of(self, asking: list[Row], query_embeds: torch.Tensor | None) -> torch.Tensor:
        """
        Return the query embeddings `(R, h)` of the rows that ask, in float32.

        They are Gen's `query_embeds` `(n, h)` by slot, or encoded from what the rows have written so far.
        """
        if self.config.query_from == "gen":
            assert query_embeds is not None  # a step before which rows asked, and every chunk, give them
            places = torch.tensor([row.slot for row in asking], device=query_embeds.device)
            return query_embeds[places].float()
        ids = [self._cached_ids(row) for row in asking]
        return self.model.encode_queries(*pad_rows(ids, self.settings.pad, device=self.slots.device)).float()

    def _take_nsp_back(self, row: Row, logits: torch.Tensor) -> None:
        """Take back the `[NSP]` of a row for which nothing was found, unless it is the last token of the prompt."""
        self.slots.ban(row.slot, True)
        self.banned_once.append(row)
        if row.logits_before_nsp is not None:
            self.slots.take_back(row.slot)
            logits[row.slot] = row.logits_before_nsp

    def _add_retrieval(
        self, row: Row, passages: ScoredPassages, room: int, query_embed: list[float] | None
    ) -> list[int]:
        """Write the trace and return what the row reads: as much of its passages as `room` holds, and `[Cs]`."""
        ids, starts = self.lookup.join([passage for passage, _ in passages])
        ids = ids[:room]
        num_read = len([start for start in starts if start < room])
        passages = passages[:num_read]  # no token of the others is read
        column = int(self.slots.columns[row.slot])
        position = column - 1 + row.num_forgotten  # of [NSP]
        span_start = position + len(ids) + 2  # after [NSP], passages and [Cs]
        retrieval = Retrieval(
            row=row.number,
            position=position,
            passages=[{name: passage[name] for name in ("id", "title", "text")} for passage, _ in passages],
            scores=[score for _, score in passages],
            grounded_span=(span_start, span_start),
            query_embed=query_embed,
        )
        row.retrievals.append(retrieval)
        row.passage_columns = (column, column + len(ids))
        chunk = [*ids, self.config.cs_token_id]
        self._stream_retrieval(row, retrieval, chunk)
        self.slots.ban(row.slot, not self._may_retrieve(row))
        if int(self.slots.positions[row.slot]) + len(chunk) >= self.settings.context_length:
            self.full.append(row)
        return chunk

    def _stream_retrieval(self, row: Row, retrieval: Retrieval, chunk: list[int]) -> None:
        """Show a streamer the retrieval, or its tokens: `[NSP]`, unless it is the prompt's, and what was retrieved."""
        on_retrieval = getattr(self.streamer, "on_retrieval", None)
        if on_retrieval is not None:
            on_retrieval(retrieval)
            return
        ids: list[int] = []
        if row.logits_before_nsp is not None:
            ids.append(self.config.nsp_token_id)
        if self.retrieval.stream_passages:
            ids += chunk
        self._stream_ids(ids)

    # ------------------------------------------------------------------ forgetting

    def _forget_passage(self, row: Row) -> None:
        """Take the passage out of the cache, since `[CE]` was decided; with `"mask"` only once `[CE]` is read."""
        if self.retrieval.forget_passages == "mask":
            self.forgetting.append(row)
        elif self.retrieval.forget_passages == "recompute":
            cached_ids = self._cached_ids(row)
            length = len(cached_ids)
            start, end = row.forget(cached_ids)
            grounded_ids = cached_ids[end:]  # [Cs] and the text
            self.cache.cut(row.slot, start, length, length)
            self.slots.shorten(row.slot, columns=length - start, positions=length - start)
            row.reread_ids = [*grounded_ids, self.config.ce_token_id]
            self.rereading.append(row)

    def _drop_masked_passages(self) -> None:
        """Take the passages of rows that just read `[CE]` out of the cache; their text keeps its positions."""
        for row in self.forgetting:
            cached_ids = self._cached_ids(row)
            start, end = row.forget(cached_ids)
            self.cache.cut(row.slot, start, end, len(cached_ids))
            self.slots.shorten(row.slot, columns=end - start, positions=0)
        self.forgetting = []

    def _cached_ids(self, row: Row) -> list[int]:
        """Return the token ids that the row has in the cache."""
        return self.cache.tokens[row.slot, : self.slots.columns[row.slot]].tolist()

    # ------------------------------------------------------------------ ending

    def _finish_row(self, row: Row, last_ids: list[int]) -> None:
        """Make the ids and the trace of a row final, with `last_ids` that were not forwarded, and free its slot."""
        row.num_generated_tokens = int(self.slots.generated[row.slot])
        stops = {self.config.ce_token_id, self.config.nsp_token_id, *self.settings.ends}
        row.finish(self._cached_ids(row) + last_ids, stops)
        self.finished.append(row)
        freed = row.slot
        source = self.slots.vacate(row)
        if source is not None:
            self.cache.move(source, freed, int(self.slots.columns[freed]))
        if self.on_finish is not None:
            self.on_finish(row)
