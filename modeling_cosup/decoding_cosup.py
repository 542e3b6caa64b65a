"""The decoding loop behind generate() and generate_many(): rows that write, retrieve, finish and make room for others, each at its own pace."""

from collections import deque

import numpy as np
import torch
from transformers import CompileConfig
from transformers.generation import EosTokenCriteria, MaxLengthCriteria

from .cache_cosup import (EMPTY, attention_mask, context_length)
from .scores_cosup import (RowScores)
from .tokenization_cosup import (encode_passages_for_gen, encode_texts, pad_rows)
from .trace_cosup import (Retrieval, RetrievalError)

class Decoder(RowScores):
    """
    One call of generate() or generate_many().

    Each pass of the loop makes one decision for every row. Before it, new prompts are read (one ragged chunk), every other row forwards its last token
    (one column, all rows at once), and rows whose last token was `[NSP]` search together and read their passages (one ragged chunk). No token is
    forwarded twice. While nothing retrieves or ends, a pass does no work per row in Python and waits for the device once.

    Args:
        model ([`CoSupForCausalLM`]), generation_config (`GenerationConfig`), logits_processor, stopping_criteria: as `_sample` gets them.
        retriever ([`Retriever`], *optional*), settings ([`RetrievalConfig`]): what to search and how.
        slots (`int`): rows at once.
        prompt_length (`int`): columns of the prompt; what counts tokens counts from here.
        columns (`int`): of the cache to start with.
        streamer (`BaseStreamer`, *optional*), synced_gpus (`bool`): as in generate().
        static (`bool`): the one-token step keeps its shapes and is captured where `compile_config` and the device say so.
        refill (`bool`): finished rows make room for waiting ones, so `logits_processor` sees slots in place of rows.
    """

    def __init__(
        self, model, generation_config, logits_processor, stopping_criteria, retriever, settings, slots, prompt_length, columns, device,
        streamer=None, synced_gpus=False, static=False, refill=False,
    ):  # fmt: skip
        self.model, self.config, self.text_config = model, model.config, model.config.get_text_config()
        self.generation_config, self.processors, self.retriever, self.settings = generation_config, logits_processor, retriever, settings
        self.criteria = [each for each in stopping_criteria if not isinstance(each, MaxLengthCriteria | EosTokenCriteria)]
        self.streamer, self.synced_gpus, self.static, self.refill = streamer, synced_gpus, static, refill
        self.on_retrieval = getattr(streamer, "on_retrieval", None)
        self.slots, self.prompt_length, self.device = slots, prompt_length, device
        lengths = [each.max_length for each in stopping_criteria if isinstance(each, MaxLengthCriteria)]
        self.budget = min([generation_config.max_length, *lengths]) - prompt_length
        self.context_length = context_length(self.text_config)
        self.pad = 0 if generation_config._pad_token_tensor is None else int(generation_config._pad_token_tensor)
        ends = [each.eos_token_id for each in stopping_criteria if isinstance(each, EosTokenCriteria)]
        self.ends = {id for tensor in ends for id in tensor.reshape(-1).tolist()}
        self.retrieves = retriever is not None or settings.passages is not None
        nsp, cs = self.config.nsp_token_id, self.config.cs_token_id
        never = [id for id, forbidden in ((cs, True), (nsp, settings.forbid_nsp)) if id is not None and forbidden]
        self.never = torch.tensor(never, dtype=torch.long, device=device)
        special = {*self.ends, *([nsp] if self.retrieves else []), *([self.config.ce_token_id] if settings.forget_passages else [])}
        self.special = torch.tensor(sorted(special), dtype=torch.long, device=device)
        self.cache = model._row_cache(slots, columns, device, static)
        self.forward = model.__call__
        if static and model._valid_auto_compile_criteria({"past_key_values": self.cache}, generation_config):
            # shapes are fixed on purpose: a graph for symbolic ones would be slower
            self.forward = model.get_compiled_call(generation_config.compile_config or CompileConfig(dynamic=False))
        # slot by slot, on the host: columns that are filled, position of the next token, decided tokens, [NSP] not allowed; and the decided token
        self.columns, self.positions, self.generated = (np.zeros(slots, dtype=np.int64) for _ in range(3))
        self.banned, self.occupied = np.zeros(slots, dtype=bool), np.zeros(slots, dtype=bool)
        self.state = torch.zeros(2, slots, dtype=torch.long, device=device)  # columns and positions on the device, right unless `moved`
        self.occupied_on_device, self.banned_on_device = (torch.zeros(slots, dtype=torch.bool, device=device) for _ in range(2))
        self.range, self.moved, self.order = torch.arange(slots, device=device), True, None
        self.rows = []  # by slot; behind the last one no slot is taken
        self.tokens = torch.full((slots,), self.pad, dtype=torch.long, device=device)
        self.asking = []  # their last decision was [NSP]
        self.banned_once = []  # nothing was found for them: they decide again
        self.rewriting = []  # read their text again, without its passage
        self.leaving = []  # their passage leaves the cache once [CE] was read
        self.full = []  # the context ended with their passage
        self.finished = []
        self.num_forwarded_tokens = 0
        self._separator = self.on_finish = None

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
        while self.model._has_unfinished_sequences(not (waiting or self.occupied.any()), self.synced_gpus, self.device):
            self._pass(waiting)
        return self.finished

    def _pass(self, waiting):
        """One decision for every row, and all that must be forwarded before it."""
        new = self._admit(waiting)
        reading = {row: row.prompt for row in new} | {row: row.rewrite for row in self.rewriting}
        stepping = self.occupied[: len(self.rows)].copy()
        stepping[[row.slot for row in reading]] = False
        asking, self.asking, self.rewriting = self.asking, [], []
        logits = queries = None
        if self._joint(bool(stepping.any())):
            logits, queries = self._step(stepping, with_queries=bool(asking))
        if self._joint(bool(reading)):
            logits, queries = self._merge(logits, queries, reading, self._read(reading))
        self._let_passages_leave()
        asking += [row for row in new if row.prompt[-1] == self.config.nsp_token_id and self._may_retrieve(row)]
        passages, error = {}, None
        try:
            passages = self._retrieve(asking, queries, logits) if asking else {}
        except RetrievalError as failure:
            error = failure
        if self._joint(bool(passages), error):
            logits, _ = self._merge(logits, None, passages, self._read(passages))
        if self.occupied.any():
            self._decide(logits, [row for row in new if self.settings.force_nsp_first and not row.retrievals])

    def _joint(self, needed, error=None):
        """
        Whether this rank has something to forward. With `synced_gpus`, one that has nothing while another has keeps up with the collectives of a forward,
        and an error of one rank ends them all.
        """
        state = 2 if error is not None else int(needed)
        if self.synced_gpus:
            flag = torch.tensor(state, device=self.device)
            torch.distributed.all_reduce(flag, op=torch.distributed.ReduceOp.MAX)
            state = int(flag)
        if state == 2:
            raise error or RetrievalError("The search of another rank failed.", self.finished)
        if state and not needed:
            self.model(input_ids=torch.zeros(1, 1, dtype=torch.long, device=self.device), use_cache=False, output_query_embeds=False)
        return needed

    def _admit(self, waiting):
        """Waiting rows take free slots; not one at a time, since reading a prompt costs everyone a forward."""
        free = self.slots - int(self.occupied.sum())
        if not waiting or (0 < self.slots - free and free < min(max(1, self.slots // 8), len(waiting))):
            return []
        new = []
        while waiting and len(new) < free:
            row = waiting.popleft()
            row.slot = self.rows.index(None) if None in self.rows else len(self.rows)
            self.rows[row.slot : row.slot + 1] = [row]
            self.columns[row.slot] = self.positions[row.slot] = self.generated[row.slot] = 0
            self.cache.positions[row.slot] = EMPTY
            self._ban(row, self.retrieves and not self._may_retrieve(row))
            self._occupy(row.slot, True)
            new.append(row)
        return new

    def _occupy(self, slot, occupied):
        self.occupied[slot] = self.occupied_on_device[slot] = occupied
        self.moved = True

    def _ban(self, row, banned):
        """Whether the row's next decision may not be `[NSP]`."""
        if self.banned[row.slot] != banned:
            self.banned[row.slot] = self.banned_on_device[row.slot] = bool(banned)

    def _may_retrieve(self, row):
        """Whether this row still has a retrieval to make."""
        limit = self.settings.max_retrievals
        return self.retrieves and not self.settings.forbid_nsp and (limit is None or len(row.retrievals) < limit) and (row.given is None or len(row.given) > 0)

    # ------------------------------------------------------------------ forwards

    def _step(self, stepping, with_queries):
        """Forward the decided token of every stepping slot: logits `(n, V)` and query embeddings `(n, h)` of the first n slots, of which only these count."""
        n = self.slots if self.static else len(self.rows)
        width = int(self.columns[: len(self.rows)].max()) + 1
        self.cache.grow(width)
        width = self.cache.columns if self.static else width
        if self.moved:
            self.state.copy_(torch.from_numpy(np.stack([self.columns, self.positions])))
        columns, positions = self.state[:, :n, None]
        self.cache.begin(n, columns, self.tokens[:n, None], positions, width)
        even = not self.static and (self.columns[:n] == width - 1).all() and (self.positions[:n] == width - 1).all()
        own = self.retrieves and self.config.query_from == "gen"
        outputs = self.forward(
            input_ids=self.tokens[:n, None],
            attention_mask=None if even else self._mask(positions),
            position_ids=positions,
            past_key_values=self.cache,
            use_cache=True,
            output_query_embeds=own and (self.static or with_queries),
            nsp_positions=self.range[:n],
        )
        self.moved = not np.array_equal(stepping, self.occupied[: len(stepping)])
        if not self.moved:  # no copy from the host while nothing but steps happens
            self.state += self.occupied_on_device
        # a slot that does not step has written beside its tokens, where its next one will be written
        self.columns[: len(stepping)] += stepping
        self.positions[: len(stepping)] += stepping
        self.num_forwarded_tokens += int(stepping.sum())
        return outputs.logits[:, -1], outputs.query_embeds

    def _read(self, chunks):
        """Forward one ragged chunk, `{row: ids}`: logits `(R, V)` and query embeddings `(R, h)` at the last token of each row."""
        rows = list(chunks)
        slots = np.array([row.slot for row in rows])
        lengths = np.array([len(ids) for ids in chunks.values()])
        ids, mask = pad_rows(list(chunks.values()), self.pad, device=self.device)
        starts = torch.from_numpy(np.stack([self.columns[slots], self.positions[slots], lengths])).to(self.device)[:, :, None]
        offsets = torch.arange(ids.shape[1], device=self.device)
        width = int((self.columns[slots]).max()) + ids.shape[1]
        self.cache.grow(width)
        first = len(rows) if (slots == np.arange(len(rows))).all() else torch.from_numpy(slots).to(self.device)
        positions = starts[1] + torch.minimum(offsets, starts[2] - 1)
        self.cache.begin(first, starts[0] + offsets, ids, torch.where(mask.bool(), positions, EMPTY), width)
        even = (lengths == ids.shape[1]).all() and (self.columns[slots] == width - ids.shape[1]).all()
        even = even and (self.positions[slots] == self.columns[slots]).all()
        last = (torch.arange(len(rows), device=self.device) * ids.shape[1]) + starts[2, :, 0] - 1
        outputs = self.model(
            input_ids=ids,
            attention_mask=None if even else self._mask(positions),
            position_ids=positions,
            past_key_values=self.cache,
            use_cache=True,
            logit_positions=last,
            output_query_embeds=self.config.query_from == "gen" and self.retrieves,
            nsp_positions=last,
        )
        self.columns[slots] += lengths
        self.positions[slots] += lengths
        self.moved = True
        self.num_forwarded_tokens += int(lengths.sum())
        return outputs.logits, outputs.query_embeds

    def _mask(self, positions):
        return attention_mask(self.cache, self.text_config, positions, self.text_config._attn_implementation, self.model.gen.dtype)

    def _merge(self, logits, queries, chunks, read):
        """Logits and query embeddings of all slots: those of a step, and of the rows that read a chunk in this pass."""
        if not chunks:
            return logits, queries
        slots = torch.tensor([row.slot for row in chunks], device=self.device)
        if logits is None:
            logits = read[0].new_zeros(len(self.rows), read[0].shape[-1])
        logits = logits.index_copy(0, slots, read[0].to(logits.device))
        if read[1] is not None:
            queries = read[1].new_zeros(len(logits), read[1].shape[-1]) if queries is None else queries
            queries = queries.index_copy(0, slots, read[1])
        return logits, queries

    # ------------------------------------------------------------------ decisions

    def _decide(self, logits, forced):
        """One token for each row, from the `logits` `(n, V)` of the first n slots; rows of `forced` take `[NSP]`."""
        n = len(self.rows)
        logits = logits[:n].to(self.device)
        scores = self._without_banned(logits.to(torch.float32, copy=True))  # before the warpers: what top_p keeps must be allowed
        scores = self._without_banned(self._process(scores))  # and after: a processor may have put anything there
        if not self.occupied[:n].all():
            scores = scores.masked_fill(~self.occupied_on_device[:n, None], 0.0)  # nobody's: any token will do
        tokens = torch.multinomial(scores.softmax(-1), 1)[:, 0] if self.generation_config.do_sample else scores.argmax(-1)
        if forced := [row.slot for row in forced if not self.banned[row.slot]]:
            tokens[forced] = self.config.nsp_token_id
        for row in self.banned_once:
            self._ban(row, not self._may_retrieve(row))
        self.banned_once = []
        self.tokens[:n] = tokens
        self.generated[:n] += self.occupied[:n]
        ended = self.occupied[:n] & ((self.generated[:n] >= self.budget) | (self.positions[:n] + 1 >= self.context_length))
        stopped = torch.zeros_like(tokens, dtype=torch.bool)
        if self.criteria:
            history = self._history(tokens)
            stopped = self._places(torch.stack([each(history, None) for each in self.criteria]).any(0), back=True)
        event = ((stopped | torch.isin(tokens, self.special)) & self.occupied_on_device[:n]).any()
        if event.item() or self.streamer is not None or ended.any():  # waits for the device
            self._after(tokens.tolist(), stopped.tolist(), ended.tolist(), logits)

    def _after(self, tokens, stopped, ended, logits):
        """What follows from the decisions: rows end, ask for passages, or leave the text that a passage was for."""
        done = []
        for row, token, stop, end in zip(list(self.rows), tokens, stopped, ended, strict=True):
            if row is None:
                continue
            if row in self.full:
                self.generated[row.slot] -= 1  # no room for what was decided
                done.append((row, []))
                continue
            asks = self.retrieves and token == self.config.nsp_token_id
            over = stop or end or token in self.ends
            if self.streamer is not None and (over or not asks):
                self.streamer.put(torch.tensor([token]))
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

    # ------------------------------------------------------------------ retrieval

    def _retrieve(self, asking, queries, logits):
        """One search for all rows that ask. Returns `{row: passage ids and [Cs]}`; a row for which nothing was found decides again, without `[NSP]`."""
        settings, chunks = self.settings, {}
        embeds = self._query_embeds(asking, queries) if settings.output_query_embeds or any(row.given is None for row in asking) else None
        for i, (row, found) in enumerate(zip(asking, self._search(asking, embeds), strict=True)):
            room = self.context_length - int(self.positions[row.slot]) - 1
            if not found:
                self._refuse(row, logits)
            elif room < 1:  # not even one token of a passage can be read
                self.full.append(row)
                if self.streamer is not None and row.held is not None:
                    self.streamer.put(torch.tensor([self.config.nsp_token_id]))  # it was kept back until the search
            else:
                chunks[row] = self._give(row, found, room, embeds[i].tolist() if settings.output_query_embeds else None)
            row.held = None
        return chunks

    def _refuse(self, row, logits):
        """Nothing was found: the row takes its `[NSP]` back. A prompt that ends in one keeps it, there is no earlier decision to go back to."""
        self._ban(row, True)
        self.banned_once.append(row)
        if row.held is not None:
            self.columns[row.slot] -= 1
            self.positions[row.slot] -= 1
            self.generated[row.slot] -= 1
            self.moved = True
            logits[row.slot] = row.held

    def _give(self, row, found, room, query):
        """Write the trace and return what the row reads: its passages, as far as there is room, and `[Cs]`."""
        ids, starts = self._join([passage["input_ids"] for passage, _ in found])
        ids = ids[:room]
        found = [pair for pair, start in zip(found, starts, strict=True) if start < room]  # of the others no token is read
        column = int(self.columns[row.slot])
        position = column - 1 + sum(len(cut) for _, cut in row.forgotten)
        passages = [{name: passage[name] for name in ("id", "title", "text")} for passage, _ in found]
        span = position + len(ids) + 2
        row.retrievals.append(Retrieval(row.number, position, passages, [score for _, score in found], (span, span), query))
        row.grounded = (column, column + len(ids))
        chunk = [*ids, self.config.cs_token_id]
        shown = ([self.config.nsp_token_id] if row.held is not None else []) + (chunk if self.settings.stream_passages else [])
        if self.on_retrieval is not None:
            self.on_retrieval(row.retrievals[-1])
        elif self.streamer is not None and shown:
            self.streamer.put(torch.tensor(shown))
        self._ban(row, not self._may_retrieve(row))
        if int(self.positions[row.slot]) + len(chunk) >= self.context_length:
            self.full.append(row)
        return chunk

    def _search(self, asking, embeds):
        """For each asking row the passages it gets, best first: `list[list[tuple[dict, float | None]]]`."""
        settings, found = self.settings, [[] for _ in asking]
        open_rows = [i for i, row in enumerate(asking) if row.given is None]
        for i, row in enumerate(asking):
            if row.given is not None:
                given, row.given = row.given[: settings.top_k], row.given[settings.top_k :]
                found[i] = [(passage, None) for passage in given]
        if not open_rows:
            return found
        extra = max(len(asking[i].used) for i in open_rows) if settings.no_repeat_passages else 0
        options = {}
        if any(asking[i].candidates is not None for i in open_rows):
            options["candidates"] = [asking[i].candidates for i in open_rows]
        try:
            scores, rows = self.retriever.search(embeds[open_rows], k=settings.top_k + extra, **options)
            picks = [self._pick(asking[i], rows[j], scores[j]) for j, i in enumerate(open_rows)]
            passages = iter(self.retriever.get_passages([row for picked in picks for row, _ in picked]))
        except Exception as error:  # whatever a retriever raises: the finished rows must not be lost with it
            raise RetrievalError(f"The search failed after {len(self.finished)} finished rows: {error}", self.finished) from error
        for i, picked in zip(open_rows, picks, strict=True):
            asking[i].used.update(row for row, _ in picked)
            found[i] = [(next(passages), score) for _, score in picked]
        return found

    def _pick(self, row, rows, scores):
        """`[(row of the index, score)]` of what this row may use of its search results, at most `top_k`."""
        settings, picked = self.settings, []
        for found, score in zip(rows.tolist(), scores.tolist(), strict=True):
            low = settings.min_score is not None and score < settings.min_score
            if found >= 0 and not low and not (settings.no_repeat_passages and found in row.used):
                picked.append((found, score))
        return picked[: settings.top_k]

    def _query_embeds(self, asking, queries):
        """Query embeddings `(R, h)` of the rows that ask, in float32."""
        if self.config.query_from == "gen":
            embeds = queries[torch.tensor([row.slot for row in asking], device=queries.device)]
        else:
            ids = [self.cache.tokens[row.slot, : self.columns[row.slot]].tolist() for row in asking]
            embeds = self.model.encode_queries(*pad_rows(ids, self.pad, device=self.device))
        return embeds.float()

    def _join(self, passages):
        """Token ids of several passages behind each other, a line break between; and where each begins."""
        if len(passages) > 1 and self._separator is None:
            self._separator = encode_texts(self.model.tokenizer, ["\n"])[0]
        joined, starts = list(passages[0]), [0]
        for ids in passages[1:]:
            starts.append(len(joined) + len(self._separator))
            joined += [*self._separator, *ids]
        return joined, starts

    def given_passages(self, passages):
        """Passages of an oracle, ids of the index or `{"title", "text"}`, as the index would give them: `list[dict]`."""
        ids = [passage for passage in passages if isinstance(passage, str)]
        if ids and self.retriever is None:
            raise ValueError(f"Passage {ids[0]!r} is given by its id, which needs a retriever; or give it as a dict with 'title' and 'text'.")
        known = iter(self.retriever.get_passages(self.retriever.rows_of(ids)) if ids else [])
        dicts = [passage for passage in passages if not isinstance(passage, str)]
        encoded = iter(encode_passages_for_gen(self.model.tokenizer, dicts, self.config) if dicts else [])
        return [
            next(known) if isinstance(passage, str) else {"id": None, "title": "", **passage, "input_ids": next(encoded)} for passage in passages
        ]  # fmt: skip

    # ------------------------------------------------------------------ forgetting, ending

    def _end_grounded_text(self, row):
        """`[CE]` was decided: the passage leaves the cache, now or once `[CE]` was read."""
        if self.settings.forget_passages == "mask":
            self.leaving.append(row)
        elif self.settings.forget_passages == "recompute":
            start, end = row.grounded
            text = self.cache.tokens[row.slot, end : self.columns[row.slot]].tolist()  # [Cs] and what was grounded
            self._forget(row)
            self.cache.cut(row.slot, start, int(self.columns[row.slot]), int(self.columns[row.slot]))
            self.positions[row.slot] -= self.columns[row.slot] - start
            self.columns[row.slot] = start
            self.moved = True
            row.rewrite = [*text, self.config.ce_token_id]
            self.rewriting.append(row)

    def _let_passages_leave(self):
        """With `forget_passages="mask"`: columns of passages whose `[CE]` was just read are taken out; all others keep their positions."""
        for row in self.leaving:
            start, end = row.grounded
            self._forget(row)
            self.cache.cut(row.slot, start, end, int(self.columns[row.slot]))
            self.columns[row.slot] -= end - start
            self.moved = True
        self.leaving = []

    def _forget(self, row):
        """Note what leaves the cache: it still belongs to what was written."""
        (start, end), row.grounded = row.grounded, None
        before = sum(len(cut) for _, cut in row.forgotten)
        row.forgotten.append((start + before, self.cache.tokens[row.slot, start:end].tolist()))

    def _finish(self, row, last):
        """The row is done: its ids and the spans of its trace are final, its slot is free."""
        slot = row.slot
        ids = self.cache.tokens[slot, : self.columns[slot]].tolist() + last
        for start, cut in row.forgotten:
            ids[start:start] = cut
        row.ids, row.num_generated_tokens = ids, int(self.generated[slot])
        row.held = row.grounded = None
        stops = {self.config.ce_token_id, self.config.nsp_token_id, *self.ends}
        for retrieval in row.retrievals:
            start = end = retrieval.grounded_span[0]
            while end < len(ids) and ids[end] not in stops:
                end += 1
            retrieval.grounded_span = (start, end)
        self.finished.append(row)
        self._leave(slot)
        if self.on_finish is not None:
            self.on_finish(row)

    def _leave(self, slot):
        """Free a slot; the last row moves into it, so that the rows still are the first ones. A captured step keeps its shape, and its rows their slots."""
        self.rows[slot] = None
        self._occupy(slot, False)
        self.banned[slot] = self.banned_on_device[slot] = False
        if self.static:
            self.columns[slot] = self.positions[slot] = 0
            return
        last = self.rows.pop()
        if last is not None:
            self.cache.move(last.slot, slot, int(self.columns[last.slot]))
            for states in (self.columns, self.positions, self.generated, self.banned, self.banned_on_device, self.tokens):
                states[slot] = states[last.slot]
            self._occupy(last.slot, False)
            self._occupy(slot, True)
            self.rows[slot], last.slot = last, slot
        if not self.refill:
            self.order = torch.tensor([row.number for row in self.rows], device=self.device)
