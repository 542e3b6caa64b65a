"""
The decoding loop of generate() and generate_many(): rows that write, retrieve, end and make room for others, each at
its own pace.

A slot is a place in the batch, with a row of the KV cache and a row of everything else that is known (`Slots`). A row
of the call (`Row`) takes a free slot, keeps it until it ends, and the last row then moves into the gap. Each pass
(`Decoder._pass`) makes one decision for every row:

1. Admit. Waiting rows take the slots that are free: at first all that fit, later a few at a time, since a prompt that
   is read costs every row a forward (`_admit`).
2. Step. Every row whose last decision was not forwarded yet forwards it: one token per row, one column
   (`Forwards.step`). This is most of the work; with a static cache it keeps its shapes and can be compiled.
3. Read. New rows forward their prompts, rows that forget a passage forward their text again: one ragged chunk, padded
   on the right (`Forwards.read`). These rows do not count in the step.
4. Retrieve. Rows whose last decision was `[NSP]` have just forwarded it, and their hidden state there is their query.
   They search together, write their trace, and read passage and `[Cs]` as a second chunk (`_retrieve`). A row for
   which nothing is found takes its `[NSP]` back: it gets the logits again from which it had decided (`Row.held`), and
   `[NSP]` is banned once.
5. Decide. Every row has the logits of its last token now, from the step or from a chunk, adjusted once where there is
   a memory. Bans, logits processors and warpers give scores, and argmax or a sample the next token (`_decide`). It is
   forwarded in the next pass.
6. After. Only where a token is special (an end, `[NSP]`, `[CE]`), a budget is used up, or a streamer is attached, rows
   are looked at one by one: they ask, forget, or end and free their slot (`_after`).

Growing a row by a passage repacks nothing: each row fills its own columns without gaps, a chunk is written where its
row ends, and the attention mask is made of the positions that stand next to the keys (`RowCache`).
So no token is forwarded twice, a row reads exactly what it would read alone, and rows may be at different columns in
the same forward. Processors and criteria are shown rows as if each had been alone (`RowScores`).

Host and device meet in two places. Going out: a chunk, or rows that moved, send their columns and positions (`Slots`
says when). Coming back: `_decide` asks once a pass whether anything special was decided. A pass in which nothing
happens waits for this one bit, copies nothing else, and does no work row by row.
"""

from collections import deque

import torch

from .cache_cosup import EMPTY
from .forwards_cosup import Forwards, Outputs
from .lookup_cosup import Lookup
from .memory_cosup import Memory
from .retriever_cosup import Retriever
from .scores_cosup import RowScores
from .slots_cosup import Slots
from .tokenization_cosup import pad_rows
from .trace_cosup import Retrieval, RetrievalError, Row


class Decoder:
    """
    One call of generate() or generate_many().

    Args:
        model ([`CoSupForCausalLM`]), settings ([`DecodingSettings`]): what writes, and what is fixed for the call.
        generation_config (`GenerationConfig`): says how a static step is compiled.
        slots (`int`), columns (`int`): rows at once, and columns of the cache to start with.
        device (`torch.device`): of the prompts.
        retriever ([`Retriever`], *optional*), memory ([`Memory`], *optional*): what is searched, and what adjusts logits.
        streamer (`BaseStreamer`, *optional*), synced_gpus (`bool`): as in generate().
    """

    def __init__(
        self,
        model,
        settings,
        generation_config,
        slots,
        columns,
        device,
        retriever: Retriever | None = None,
        memory: Memory | None = None,
        streamer=None,
        synced_gpus=False,
    ):
        self.model, self.config, self.settings, self.retrieval = model, model.config, settings, settings.retrieval
        self.streamer, self.synced_gpus = streamer, synced_gpus
        self.cache = model._row_cache(slots, columns, device, settings.static)
        self.slots = Slots(slots, device, settings.pad, keeps_places=settings.static, keeps_order=not settings.refill)
        self.forwards = Forwards(model, settings, self.slots, self.cache, generation_config, memory)
        self.scores = RowScores(settings, self.slots, self.cache, self.config.nsp_token_id)
        self.lookup = Lookup(model, retriever, self.retrieval)
        # rows to which something happens in the next pass
        self.asking: list[Row] = []  # their last decision was [NSP]
        self.banned_once: list[Row] = []  # nothing was found for them: they decide again
        self.rewriting: list[Row] = []  # read their text again, without its passage
        self.leaving: list[Row] = []  # their passage leaves the cache once [CE] was read
        self.full: list[Row] = []  # the context ended with their passage
        self.finished: list[Row] = []
        self.on_finish = None

    # ------------------------------------------------------------------ the loop

    @torch.no_grad()
    def run(self, waiting, on_finish=None):
        """
        Write all rows.

        Args:
            waiting (iterable of [`Row`]): in the order in which they are to begin.
            on_finish (callable, *optional*): gets each row when it is done.

        Returns:
            `list[Row]`: in the order in which they ended.

        Raises:
            [`RetrievalError`]: when the search fails; it keeps the finished rows.
        """
        waiting, self.on_finish = deque(waiting), on_finish
        while self._goes_on(waiting):
            self._pass(waiting)
        return self.finished

    def _goes_on(self, waiting):
        """Whether this rank, or with `synced_gpus` any, has rows that are not finished."""
        over = not (waiting or self.slots.occupied.any())
        return self.model._has_unfinished_sequences(over, self.synced_gpus, self.slots.device)

    def _pass(self, waiting):
        """One decision for every row, and all that must be forwarded before it."""
        new = self._admit(waiting)
        reading = {row: row.prompt for row in new} | {row: row.rewrite for row in self.rewriting}
        stepping = self.slots.occupied[: len(self.slots)].copy()
        stepping[[row.slot for row in reading]] = False
        asking, self.asking, self.rewriting = self.asking, [], []
        outputs = Outputs()
        if self._joint(bool(stepping.any())):
            outputs = self.forwards.step(stepping, with_queries=bool(asking))
        if self._joint(bool(reading)):
            self.forwards.read(reading, outputs)
        self._let_passages_leave()
        asking += [row for row in new if row.prompt[-1] == self.config.nsp_token_id and self._may_retrieve(row)]
        passages, error = {}, None
        try:
            passages = self._retrieve(asking, outputs) if asking else {}
        except RetrievalError as failure:
            error = failure
        if self._joint(bool(passages), error):
            self.forwards.read(passages, outputs)
        if self.slots.occupied.any():
            forced = [row for row in new if self.retrieval.force_nsp_first and not row.retrievals]
            self._decide(outputs.logits, forced)

    def _joint(self, needed, error=None):
        """
        Whether this rank has something to forward. With `synced_gpus`, one that has nothing while another has keeps up
        with the collectives of a forward, and an error of one rank ends them all.
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

    def _admit(self, waiting):
        """Give free slots to waiting rows; not one at a time, since reading a prompt costs everyone a forward."""
        if not waiting:
            return []
        free, count = self.slots.free, self.slots.count
        enough = min(max(1, count // 8), len(waiting))
        if free < enough and free < count:
            return []
        new = []
        while waiting and len(new) < free:
            row = waiting.popleft()
            self.slots.occupy(row)
            self.slots.ban(row.slot, self.settings.retrieves and not self._may_retrieve(row))
            self.cache.positions[row.slot] = EMPTY
            new.append(row)
        return new

    def _may_retrieve(self, row):
        return row.may_retrieve(self.settings.max_retrievals)

    # ------------------------------------------------------------------ decisions

    def _decide(self, logits, forced):
        """Decide one token for each row, from `logits` `(n, V)` of the first slots; rows of `forced` take `[NSP]`."""
        slots, n = self.slots, len(self.slots)
        logits = logits[:n].to(slots.device)
        scores = self.scores.of(logits)
        tokens = torch.multinomial(scores.softmax(-1), 1)[:, 0] if self.settings.do_sample else scores.argmax(-1)
        forced_slots = [row.slot for row in forced if not slots.banned[row.slot]]
        if forced_slots:
            tokens[forced_slots] = self.config.nsp_token_id
        for row in self.banned_once:
            slots.ban(row.slot, not self._may_retrieve(row))
        self.banned_once = []
        slots.decide(tokens)
        out_of_budget = slots.generated[:n] >= self.settings.budget
        out_of_context = slots.positions[:n] + 1 >= self.settings.context_length
        ended = slots.occupied[:n] & (out_of_budget | out_of_context)
        stopped = self.scores.stopped(tokens)
        event = ((stopped | torch.isin(tokens, self.settings.special)) & slots.occupied_on_device[:n]).any()
        if event.item() or self.streamer is not None or ended.any():  # waits for the device
            self._after(tokens.tolist(), stopped.tolist(), ended.tolist(), logits)

    def _after(self, tokens, stopped, ended, logits):
        """Do what follows from the decisions: rows end, ask for passages, or leave the text that a passage was for."""
        done = []
        for row, token, stop, end in zip(list(self.slots.rows), tokens, stopped, ended, strict=True):
            if row is None:
                continue
            if row in self.full:
                self.slots.generated[row.slot] -= 1  # no room for what was decided
                done.append((row, []))
                continue
            asks = self.settings.retrieves and token == self.config.nsp_token_id
            over = stop or end or token in self.settings.ends
            if over or not asks:
                self._stream([token])
            if over:
                done.append((row, [token]))
            elif asks:
                row.held = logits[row.slot].clone()
                self.asking.append(row)
            elif token == self.config.ce_token_id and row.grounded is not None:
                self._end_grounded_text(row)
        self.full = []
        for row, last in done:
            self._finish(row, last)

    def _stream(self, ids):
        if self.streamer is not None and ids:
            self.streamer.put(torch.tensor(ids))

    # ------------------------------------------------------------------ retrieval

    def _retrieve(self, asking, outputs):
        """Look up passages for all rows that ask, and return what they read next: `{row: passage ids and [Cs]}`."""
        embeds = None
        if self.retrieval.output_query_embeds or any(row.given is None for row in asking):
            embeds = self._query_embeds(asking, outputs.query_embeds)
        try:
            found = self.lookup.passages_for(asking, embeds)
        except Exception as error:  # whatever a retriever raises: the finished rows must not be lost with it
            message = f"The search failed after {len(self.finished)} finished rows: {error}"
            raise RetrievalError(message, self.finished) from error
        chunks = {}
        for i, (row, passages) in enumerate(zip(asking, found, strict=True)):
            room = self.settings.context_length - int(self.slots.positions[row.slot]) - 1
            if not passages:
                self._refuse(row, outputs.logits)
            elif room < 1:  # not even one token of a passage can be read
                self.full.append(row)
                if row.held is not None:
                    self._stream([self.config.nsp_token_id])  # it was kept back until the search
            else:
                query = embeds[i].tolist() if self.retrieval.output_query_embeds else None
                chunks[row] = self._give(row, passages, room, query)
            row.held = None
        return chunks

    def _query_embeds(self, asking, query_embeds):
        """Query embeddings `(R, h)` of the rows that ask, in float32: Gen's, or of what they have written so far."""
        if self.config.query_from == "gen":
            places = torch.tensor([row.slot for row in asking], device=query_embeds.device)
            return query_embeds[places].float()
        ids = [self._written(row) for row in asking]
        return self.model.encode_queries(*pad_rows(ids, self.settings.pad, device=self.slots.device)).float()

    def _refuse(self, row, logits):
        """Nothing was found: the row takes its `[NSP]` back, unless it is the last token of a prompt."""
        self.slots.ban(row.slot, True)
        self.banned_once.append(row)
        if row.held is not None:
            self.slots.take_back(row.slot)
            logits[row.slot] = row.held

    def _give(self, row, passages, room, query):
        """Write the trace and return what the row reads: its passages, as far as there is room, and `[Cs]`."""
        ids, starts = self.lookup.join([passage for passage, _ in passages])
        ids = ids[:room]
        num_read = sum(start < room for start in starts)
        passages = passages[:num_read]  # of the others no token is read
        column = int(self.slots.columns[row.slot])
        position = column - 1 + row.num_forgotten
        start = position + len(ids) + 2
        shown = [{name: passage[name] for name in ("id", "title", "text")} for passage, _ in passages]
        scores = [score for _, score in passages]
        row.retrievals.append(Retrieval(row.number, position, shown, scores, (start, start), query))
        row.grounded = (column, column + len(ids))
        chunk = [*ids, self.config.cs_token_id]
        self._stream_retrieval(row, chunk)
        self.slots.ban(row.slot, not self._may_retrieve(row))
        if int(self.slots.positions[row.slot]) + len(chunk) >= self.settings.context_length:
            self.full.append(row)
        return chunk

    def _stream_retrieval(self, row, chunk):
        """Show a streamer the retrieval, or its tokens: `[NSP]`, unless it is the prompt's, and what was retrieved."""
        on_retrieval = getattr(self.streamer, "on_retrieval", None)
        if on_retrieval is not None:
            on_retrieval(row.retrievals[-1])
            return
        ids = [] if row.held is None else [self.config.nsp_token_id]
        if self.retrieval.stream_passages:
            ids += chunk
        self._stream(ids)

    # ------------------------------------------------------------------ forgetting

    def _end_grounded_text(self, row):
        """`[CE]` was decided: the passage leaves the cache, now or once `[CE]` was read."""
        if self.retrieval.forget_passages == "mask":
            self.leaving.append(row)
        elif self.retrieval.forget_passages == "recompute":
            start, end = row.grounded
            written = self._written(row)
            length = len(written)
            row.forget(written)
            text = written[end:]  # [Cs] and what was grounded
            self.cache.cut(row.slot, start, length, length)
            self.slots.shorten(row.slot, columns=length - start, positions=length - start)
            row.rewrite = [*text, self.config.ce_token_id]
            self.rewriting.append(row)

    def _let_passages_leave(self):
        """With `"mask"`: take out the columns of passages whose `[CE]` was just read; others keep their positions."""
        for row in self.leaving:
            start, end = row.grounded
            written = self._written(row)
            row.forget(written)
            self.cache.cut(row.slot, start, end, len(written))
            self.slots.shorten(row.slot, columns=end - start, positions=0)
        self.leaving = []

    def _written(self, row):
        """Token ids that the row has in the cache."""
        return self.cache.tokens[row.slot, : self.slots.columns[row.slot]].tolist()

    # ------------------------------------------------------------------ ending

    def _finish(self, row, last):
        """The row is done: its ids and the spans of its trace are final, its slot is free."""
        row.num_generated_tokens = int(self.slots.generated[row.slot])
        stops = {self.config.ce_token_id, self.config.nsp_token_id, *self.settings.ends}
        row.finish(self._written(row) + last, stops)
        self.finished.append(row)
        freed = row.slot
        source = self.slots.vacate(row)
        if source is not None:
            self.cache.move(source, freed, int(self.slots.columns[freed]))
        if self.on_finish is not None:
            self.on_finish(row)
