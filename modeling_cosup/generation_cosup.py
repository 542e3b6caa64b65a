"""The retrieval-aware generate(): one decoding loop over tokens and passages, KV cache kept across retrievals, any batch."""

from dataclasses import asdict, dataclass

import torch
from transformers import DynamicCache
from transformers.generation import MaxLengthCriteria, MinLengthLogitsProcessor, MinNewTokensLengthLogitsProcessor, StoppingCriteriaList
from transformers.generation.configuration_utils import GenerationMode
from transformers.modeling_outputs import ModelOutput

from .tokenization_cosup import (pad_rows)


@dataclass
class Retrieval:
    """
    One retrieval of one row.

    Args:
        position (`int`): column of `[NSP]` in the row of `sequences`.
        passage_id, title, text (`str`): the passage.
        score (`float`): inner product of query and passage embedding (the cosine, where that is the similarity).
        grounded_span (`tuple[int, int]`): columns `[start, end)` of the text between `[Cs]` and `[CE]`; `end` is where the row stops or
            retrieves again if there is no `[CE]`.
    """

    position: int
    passage_id: str
    title: str
    text: str
    score: float
    grounded_span: tuple = (0, 0)

    def to_dict(self):
        return asdict(self)


@dataclass
class CoSupGenerateOutput(ModelOutput):
    """
    Output of `generate(retriever=..., return_dict_in_generate=True)`.

    Args:
        sequences (`torch.LongTensor` of shape `(B, T)`): the prompt, padded on the left, then what each row generated, passages and `[Cs]`
            included, padded on the right.
        retrievals (`list[list[Retrieval]]`): the retrieval trace of each row, in order.
        prompt_length (`int`): columns of the prompt.
        num_generated_tokens (`torch.LongTensor` of shape `(B,)`): tokens that were decoded; passages and `[Cs]` do not count.
        num_forwarded_tokens (`int`): tokens that went through Gen in the whole call, prompts and passages included.
    """

    sequences: torch.LongTensor | None = None
    retrievals: list | None = None
    prompt_length: int | None = None
    num_generated_tokens: torch.LongTensor | None = None
    num_forwarded_tokens: int | None = None


class RetrievalGenerationMixin:
    """`generate()` with a `retriever`; goes before `GenerationMixin` in the bases."""

    def generate(self, inputs=None, generation_config=None, retriever=None, max_retrievals=None, **kwargs):
        """
        Generate; whenever a row emits `[NSP]`, its hidden state there searches `retriever`, the passage and `[Cs]` are appended, and the
        row writes on. Greedy decoding and sampling; every other argument is that of `GenerationMixin.generate`.

        Args:
            inputs (`torch.LongTensor` of shape `(B, T)`, *optional*): prompts, padded on the left. One that ends in `[NSP]` retrieves at once.
            generation_config (`GenerationConfig`, *optional*): as always. Budgets such as `max_new_tokens` count decoded tokens, row by row.
            retriever ([`PassageIndex`], *optional*): without it this is ordinary generation.
            max_retrievals (`int`, *optional*): per row; after them `[NSP]` cannot be emitted. Defaults to no limit.
            nsp_token_id (`None`, *optional*): `None` makes the call plain Gen: nothing is suppressed, nothing retrieved.

        Returns:
            `torch.LongTensor`, or [`CoSupGenerateOutput`] with `return_dict_in_generate=True` and a retriever.

        Raises:
            `ValueError`: for an index of another model, and for what cannot be combined with retrieval: beam search, assisted decoding, a
            given or static cache, `use_cache=False`, per-step scores, states or attentions, state-space layers, training mode with
            gradient checkpointing.
        """
        if "nsp_token_id" in kwargs:
            if kwargs.pop("nsp_token_id") is not None:
                raise ValueError("generate() takes nsp_token_id=None (plain Gen) or none at all; which token retrieves is the config's business.")
            return super().generate(inputs, generation_config, **{"suppress_tokens": None, **kwargs})
        if retriever is None or self.config.nsp_token_id is None:
            return super().generate(inputs, generation_config, **kwargs)
        retriever.check_model(self)
        self._check_retrieval_arguments(generation_config, kwargs)
        kwargs.pop("past_key_values", None)
        # a cache without config never evicts: sliding-window layers too must keep every column for re-packing
        return super().generate(inputs, generation_config, past_key_values=DynamicCache(), retriever=retriever, max_retrievals=max_retrievals, **kwargs)

    def _check_retrieval_arguments(self, generation_config, kwargs):
        prepared, _ = self._prepare_generation_config(generation_config, **kwargs)
        mode = prepared.get_generation_mode(kwargs.get("assistant_model"))
        if mode not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE) or kwargs.get("custom_generate") is not None:
            raise ValueError(f"Retrieval works in greedy decoding and sampling, not in {mode.value}; set num_beams=1 and no assistant_model.")
        if not prepared.use_cache or prepared.cache_implementation is not None or kwargs.get("past_key_values") is not None:
            raise ValueError("Retrieval keeps its own dynamic KV cache: leave out use_cache=False, cache_implementation and past_key_values.")
        if kwargs.get("inputs_embeds") is not None or prepared.guidance_scale not in (None, 1):
            raise ValueError("inputs_embeds and guidance_scale are not available with a retriever: prompt and passages are read once, as token ids.")
        for name in ("output_scores", "output_logits", "output_attentions", "output_hidden_states"):
            if getattr(prepared, name):
                raise ValueError(f"{name}=True is not available with a retriever: rows that retrieve take no decoding step.")
        if self.training and any(getattr(module, "gradient_checkpointing", False) for module in self.gen.modules()):
            raise ValueError("In training mode with gradient checkpointing there is no KV cache to generate with: call model.eval() first.")
        layer_types = getattr(self.config.get_text_config(), "layer_types", None) or []
        if self.gen._is_stateful or any("attention" not in layer or "linear" in layer for layer in layer_types):
            raise ValueError(f"{type(self.gen).__name__} keeps a recurrent state, which cannot be re-packed after a retrieval; use an attention model.")

    def prepare_inputs_for_generation(self, input_ids, retriever=None, max_retrievals=None, **kwargs):
        """Names `retriever` and `max_retrievals` as arguments of generate(); `_sample` takes them."""
        return super().prepare_inputs_for_generation(input_ids, output_query_embeds=False, **kwargs)

    def _sample(
        self, input_ids, logits_processor, stopping_criteria, generation_config, synced_gpus=False, streamer=None, retriever=None, max_retrievals=None, **kwargs
    ):
        """
        The decoding loop. Each pass forwards one chunk a row: the prompt, one token, or a passage and `[Cs]`; columns on the right that a
        shorter chunk leaves empty are squeezed out of cache and history before the next pass. No token is forwarded twice.
        """
        if retriever is None:
            return super()._sample(
                input_ids,
                logits_processor=logits_processor,
                stopping_criteria=stopping_criteria,
                generation_config=generation_config,
                synced_gpus=synced_gpus,
                streamer=streamer,
                **kwargs,
            )
        nsp_token_id, cs_token_id = self.config.nsp_token_id, self.config.cs_token_id
        batch, prompt_length, device = len(input_ids), input_ids.shape[1], input_ids.device
        rows = torch.arange(batch, device=device)
        pad = 0 if generation_config._pad_token_tensor is None else int(generation_config._pad_token_tensor)
        budget = generation_config.max_length - prompt_length
        min_new_tokens, logits_processor = _split_off_minimum_length(logits_processor, prompt_length)
        stopping_criteria = StoppingCriteriaList(c for c in stopping_criteria if not isinstance(c, MaxLengthCriteria))  # it counts columns
        eos_token_ids = generation_config._eos_token_tensor
        context_length = getattr(self.config.get_text_config(), "max_position_embeddings", None) or float("inf")

        mask = kwargs.get("attention_mask")
        mask = torch.ones_like(input_ids) if mask is None else mask.long()
        if bool((mask[:, -1] == 0).any()):
            input_ids, mask = _left_padded(input_ids, mask)
        cache = kwargs["past_key_values"]
        history, chunk, chunk_mask = input_ids, input_ids, mask  # history and mask: (B, all columns); chunk: (B, W), real tokens on the left
        position_ids = (mask.cumsum(1) - 1).clamp(min=0)
        prompt_lengths = mask.sum(1)
        lengths = prompt_lengths.clone()  # real tokens per row
        generated = torch.zeros(batch, dtype=torch.long, device=device)
        unfinished = torch.ones(batch, dtype=torch.bool, device=device)
        retrievals = [[] for _ in range(batch)]
        forwarded = 0
        retrieving = (chunk[:, -1] == nsp_token_id) & (max_retrievals != 0)
        any_retrieving, finished = bool(retrieving.any()), False

        while self._has_unfinished_sequences(finished, synced_gpus, device):
            if chunk.shape[1] == 1:
                last, columns = torch.zeros_like(lengths), 1
            else:
                last = (chunk_mask * torch.arange(1, chunk.shape[1] + 1, device=device)).argmax(1)  # last real column of each row
                columns = torch.unique(last)
            outputs = self(
                input_ids=chunk,
                attention_mask=mask,
                position_ids=position_ids,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=columns,
                output_query_embeds=any_retrieving and self.config.query_from == "gen",
            )
            if finished:  # other ranks still generate: this rank only keeps up with their collectives
                cache.crop(-chunk.shape[1])
                continue
            forwarded += chunk_mask.sum()
            logits = outputs.logits[rows, 0 if chunk.shape[1] == 1 else torch.searchsorted(columns, last)].float()  # (B, V)

            if chunk.shape[1] > 1 and chunk is not input_ids:
                history, mask = _repack(cache, history, mask)

            scores = self._process_scores(logits, history, mask, logits_processor)
            scores[:, cs_token_id] = float("-inf")  # [Cs] follows a passage, never a decision of Gen
            if max_retrievals is not None:
                exhausted = torch.tensor([len(trace) >= max_retrievals for trace in retrievals], device=device)
                scores[exhausted, nsp_token_id] = float("-inf")
            if min_new_tokens and eos_token_ids is not None:
                too_short = generated < min_new_tokens
                scores[:, eos_token_ids] = scores[:, eos_token_ids].masked_fill(too_short[:, None], float("-inf"))
            tokens = torch.multinomial(scores.softmax(-1), 1)[:, 0] if generation_config.do_sample else scores.argmax(-1)

            decoding = unfinished & ~retrieving
            generated += decoding
            if any_retrieving:
                embeds = self._retrieval_query_embeds(outputs, chunk, last, retrieving, history, mask)
                room = (context_length - lengths - 1).clamp(min=0) if context_length != float("inf") else None
                passages = self._retrieve(retriever, embeds, retrieving, lengths, prompt_length - prompt_lengths, room, retrievals)
                chunk, chunk_mask = _ragged_chunk(tokens, decoding, passages, cs_token_id, pad)
            else:
                chunk, chunk_mask = torch.where(decoding, tokens, pad)[:, None], decoding.long()[:, None]
            if streamer is not None:
                streamer.put((chunk[0] if batch == 1 else chunk[:, 0]).cpu())

            position_ids = (lengths[:, None] + chunk_mask.cumsum(1) - 1).clamp(min=0)
            lengths = lengths + chunk_mask.sum(1)
            history, mask = torch.cat([history, chunk], 1), torch.cat([mask, chunk_mask], 1)
            stopped = decoding & stopping_criteria(_left_padded(history, mask)[0] if any_retrieving else history, None)
            stopped |= decoding & (generated >= budget)
            stopped |= unfinished & (lengths >= context_length)
            unfinished = unfinished & ~stopped
            retrieving = unfinished & decoding & (tokens == nsp_token_id)
            finished, any_retrieving = torch.stack([~unfinished.any(), retrieving.any()]).tolist()  # waits for the device

        if streamer is not None:
            streamer.end()
        sequences = _assemble(input_ids, history, mask, prompt_lengths, pad)
        if not generation_config.return_dict_in_generate:
            return sequences
        _locate_grounded_spans(sequences, retrievals, lengths - prompt_lengths + prompt_length, self.config, eos_token_ids)
        return CoSupGenerateOutput(
            sequences=sequences, retrievals=retrievals, prompt_length=prompt_length, num_generated_tokens=generated, num_forwarded_tokens=int(forwarded)
        )

    def _process_scores(self, logits, history, mask, logits_processor):
        for processor in logits_processor:
            if isinstance(getattr(processor, "prompt_ignore_length", None), torch.Tensor):  # padding per row, which re-packing changed
                processor.prompt_ignore_length = (mask.cumsum(1) == 0).sum(1)
        return logits_processor(history, logits)

    def _retrieval_query_embeds(self, outputs, chunk, last, retrieving, history, mask):
        """Query embeddings `(R, h)` of the rows that retrieve, in row order."""
        if self.config.query_from != "gen":
            return self.encode_queries(history[retrieving], mask[retrieving])  # these rows end in [NSP]
        is_nsp = chunk == self.config.nsp_token_id  # Gen returned one query for each of them; earlier ones of a prompt are not asked for
        wanted = is_nsp & retrieving[:, None] & (torch.arange(chunk.shape[1], device=chunk.device) == last[:, None])
        return outputs.query_embeds[wanted[is_nsp]]

    def _retrieve(self, retriever, query_embeds, retrieving, lengths, offsets, room, retrievals):
        """One search for all rows that retrieve; writes the trace and returns `{row: passage token ids}`, shortened where the context ends."""
        scores, indices = retriever.search(query_embeds, k=1)
        passages = {}
        for i, row in enumerate(retrieving.nonzero()[:, 0].tolist()):
            passage = retriever[int(indices[i][0])]
            limit = None if room is None else int(room[row])
            passages[row] = list(passage["input_ids"])[:limit]
            position = int(lengths[row]) - 1 + int(offsets[row])
            retrievals[row].append(Retrieval(position, passage["id"], passage["title"], passage["text"], float(scores[i][0])))
            retrievals[row][-1].grounded_span = (position + len(passages[row]) + 2,) * 2
        return passages

    def decode_with_citations(self, outputs, tokenizer):
        """
        Readable answers: the generated text with a numbered citation behind each grounded span, and the passages below.

        Args:
            outputs ([`CoSupGenerateOutput`]): of `generate(..., return_dict_in_generate=True)` with a retriever.
            tokenizer (`PreTrainedTokenizerBase`): Gen's.

        Returns:
            `list[str]`: one text a row. A passage that a row used twice keeps its number.
        """
        texts = []
        for sequence, trace in zip(outputs.sequences, outputs.retrievals, strict=True):
            numbers, pieces, position = {}, [], outputs.prompt_length
            for retrieval in trace:
                start, end = retrieval.grounded_span
                number = numbers.setdefault(retrieval.passage_id, len(numbers) + 1)
                pieces.append(tokenizer.decode(sequence[position : max(position, retrieval.position)], skip_special_tokens=True))
                pieces.append(f"{tokenizer.decode(sequence[start:end], skip_special_tokens=True).strip()} [{number}]")
                position = end
            pieces.append(tokenizer.decode(sequence[position:], skip_special_tokens=True))
            lines = [" ".join(piece.strip() for piece in pieces if piece.strip())]
            used = {retrieval.passage_id: retrieval for retrieval in trace}
            lines += [f"[{n}] {used[id].title + ': ' if used[id].title else ''}{used[id].text}" for id, n in numbers.items()]
            texts.append("\n".join(lines))
        return texts


def _split_off_minimum_length(logits_processor, prompt_length):
    """Processors that count columns would count passages: take them out and return the number of decoded tokens they ask for."""
    minimum, rest = 0, type(logits_processor)()
    for processor in logits_processor:
        if isinstance(processor, MinNewTokensLengthLogitsProcessor):
            minimum = max(minimum, processor.min_new_tokens)
        elif isinstance(processor, MinLengthLogitsProcessor):
            minimum = max(minimum, processor.min_length - prompt_length)
        else:
            rest.append(processor)
    return minimum, rest


def _left_padded(history, mask):
    """Token ids and mask with every row's real tokens moved to the right end, in order."""
    order = torch.argsort(mask, dim=1, stable=True)
    return history.gather(1, order), mask.gather(1, order)


def _repack(cache, history, mask):
    """
    Squeeze empty columns out from between the tokens of each row: keys, values and history move so that padding is on the left.

    Keys hold their rotation already, so a move is exact; with sliding windows, gaps would push tokens out of the window.
    """
    order = torch.argsort(mask, dim=1, stable=True)[:, int((mask == 0).sum(1).min()) :]  # zeros first, order kept, common padding dropped
    for layer in cache.layers:
        for name in ("keys", "values"):
            states = getattr(layer, name)  # (B, heads, columns, head_dim)
            index = order.to(states.device)[:, None, :, None].expand(-1, states.shape[1], -1, states.shape[3])
            setattr(layer, name, states.gather(2, index))
    return history.gather(1, order), mask.gather(1, order)


def _ragged_chunk(tokens, decoding, passages, cs_token_id, pad):
    """The next chunk `(B, W)` and its mask: a passage and `[Cs]`, one decoded token, or nothing, a row; padded on the right."""
    decoded = tokens.tolist()
    rows = [passages[row] + [cs_token_id] if row in passages else [decoded[row]] * decodes for row, decodes in enumerate(decoding.tolist())]
    return pad_rows(rows, pad, device=tokens.device)


def _assemble(input_ids, history, mask, prompt_lengths, pad):
    """Prompts as they were given, then each row's continuation, padded on the right: `(B, T)`."""
    history, mask = _left_padded(history, mask)
    starts = (mask == 0).sum(1) + prompt_lengths  # first column of each continuation
    continuations = [row[start:] for row, start in zip(history, starts.tolist(), strict=True)]
    return torch.cat([input_ids, torch.nn.utils.rnn.pad_sequence(continuations, batch_first=True, padding_value=pad)], dim=1)


def _locate_grounded_spans(sequences, retrievals, ends, config, eos_token_ids):
    """Fill in the end of each grounded span: the first `[CE]`, `[NSP]` or end-of-turn token after its start, or the row's end."""
    stops = {config.ce_token_id, config.nsp_token_id, *(eos_token_ids.tolist() if eos_token_ids is not None else [])}
    for row, trace in enumerate(retrievals):
        ids, row_end = sequences[row].tolist(), int(ends[row])
        for retrieval in trace:
            start = end = retrieval.grounded_span[0]
            while end < row_end and ids[end] not in stops:
                end += 1
            retrieval.grounded_span = (start, end)
