"""Retrieval-aware generate() and generate_many(): what they take, what they return, and what they refuse."""

import contextlib
import copy
import inspect
from dataclasses import dataclass, replace

import torch
from transformers import DynamicCache
from transformers.generation.configuration_utils import GenerationMode
from transformers.modeling_outputs import ModelOutput

from .cache_cosup import (EMPTY, RowCache, context_length, layer_kinds)
from .decoding_cosup import (Decoder)
from .files_cosup import digest
from .queue_cosup import (Queue, read_completions)
from .streaming_cosup import (RetrievalStreamer, ending)
from .tokenization_cosup import (pad_rows)
from .trace_cosup import (Row, cited_text)


@dataclass
class RetrievalConfig:
    """
    How `generate()` retrieves.

    Args:
        top_k (`int`): passages for each `[NSP]`, best first, with a line break between. (`generate(top_k=...)` is that of sampling.)
        max_retrievals (`int`, *optional*): per row; after them `[NSP]` cannot be emitted. Defaults to no limit.
        force_nsp_first (`bool`): every row begins with `[NSP]`.
        forbid_nsp (`bool`): `[NSP]` is never emitted: parametric space only.
        candidates (`list[list[str] | None]`, *optional*): for each prompt the ids of the passages among which it searches; `None` for all.
        passages (`list[list[str | dict]]`, *optional*): an oracle: for each prompt the passages that its `[NSP]` get, in order, in place of a search; ids of
            the index or `{"id", "title", "text"}`. When they are used up, `[NSP]` cannot be emitted.
        min_score (`float`, *optional*): a passage below it is not retrieved. A row for which nothing is found takes its `[NSP]` back and decides again without
            it; a prompt that ends in `[NSP]` keeps it and goes on.
        no_repeat_passages (`bool`): a row never gets the same passage twice.
        forget_passages (`str`, *optional*): what becomes of a passage at its `[CE]`. `None`: it stays in view. `"recompute"`: `[Cs]`…`[CE]` is read again
            without it, and the row goes on as if the passage had never stood there. `"mask"`: its keys and values are dropped and nothing else
            changes: what was read with the passage in view stays as it was, positions too.
        output_query_embeds (`bool`): the trace holds the query embeddings.
        stream_passages (`bool`): a streamer gets passages and `[Cs]` too. One with a method `on_retrieval` gets each [`Retrieval`] in their place.

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
            raise ValueError("RetrievalConfig: candidates are searched, passages are given without a search; set one of them.")
        if self.forget_passages not in (None, "recompute", "mask"):
            raise ValueError(f"RetrievalConfig.forget_passages is {self.forget_passages!r}, expected None, 'recompute' or 'mask'.")


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
    """`generate()` with a `retriever`, and `generate_many()`; goes before `GenerationMixin` in the bases."""

    def generate(self, inputs=None, generation_config=None, *, retriever=None, retrieval_config=None, max_retrievals=None, **kwargs):
        """
        Generate; whenever a row emits `[NSP]`, its hidden state there searches `retriever`, the passage and `[Cs]` are appended, and the
        row writes on. Greedy decoding and sampling; every other argument is that of `GenerationMixin.generate`.

        A passage for which the context has no room is shortened; a row whose context is full ends.

        Args:
            inputs (`torch.LongTensor` of shape `(B, T)`, *optional*): prompts, padded on the left. One that ends in `[NSP]` retrieves at once.
            generation_config (`GenerationConfig`, *optional*): as always. Budgets such as `max_new_tokens` count decoded tokens, row by row. With
                `cache_implementation="static"` the one-token step keeps its shapes; where transformers compiles a static cache (on a GPU, or with
                `compile_config`), it is captured.
            retriever ([`PassageIndex`], *optional*): without it this is ordinary generation.
            retrieval_config ([`RetrievalConfig`], *optional*): how to retrieve.
            max_retrievals (`int`, *optional*): per row; that of `retrieval_config`.
            nsp_token_id (`None`, *optional*): `None` makes the call plain Gen: nothing is suppressed, nothing retrieved.

        Returns:
            `torch.LongTensor`, or [`CoSupGenerateOutput`] with `return_dict_in_generate=True` and a retriever.

        Raises:
            `ValueError`: for an index of another model, a prompt that fills the context, and what cannot be combined with retrieval: beam search, assisted
                decoding, a given cache, `use_cache=False`, per-step scores, states or attentions, state-space layers, a streamer for several rows,
                training mode with gradient checkpointing.
            [`RetrievalError`]: when a search fails; it keeps the rows that were finished.
        """
        with ending(kwargs.get("streamer")):
            if "nsp_token_id" in kwargs:
                if kwargs.pop("nsp_token_id") is not None:
                    raise ValueError("generate() takes nsp_token_id=None (plain Gen) or none at all; which token retrieves is the config's business.")
                return super().generate(inputs, generation_config, **{"suppress_tokens": None, **kwargs})
            call = self._retrieval_call(retriever, retrieval_config, max_retrievals)
            if call is None:
                return super().generate(inputs, generation_config, **kwargs)
            return self._generate_with_retrieval(inputs, generation_config, kwargs, call)

    def generate_many(
        self, prompts, generation_config=None, *, retriever=None, retrieval_config=None, max_retrievals=None, batch_size=32, max_batch_tokens=None,
        output_file=None, on_completion=None, show_progress_bar=True, description="Generating", **kwargs,
    ):  # fmt: skip
        """
        Continue any number of prompts: a row that is finished makes room for the next prompt at once, so that the batch stays full.

        Args:
            prompts (`list[list[int]]`): token ids of each.
            generation_config, retriever, retrieval_config, max_retrievals, **kwargs: as in [`generate`]; without retriever plain generation, in which `[NSP]`
                is a token like any other. `candidates` and `passages` are lists over all prompts. Logits processors and stopping criteria see the rows that
                are being written, whose places change: they must not remember which row is which.
            batch_size (`int`): rows at once.
            max_batch_tokens (`int`, *optional*): fewer rows where this many columns of KV cache would not hold them: a row may need its prompt,
                `max_new_tokens`, and `max_retrievals` (one, where there is no limit) passages of full length.
            output_file (`str` or `Path`, *optional*): JSON Lines; each answer is appended as soon as it is finished, and answers that stand there already are
                not written again.
            on_completion (callable, *optional*): gets each [`Completion`] as soon as it is finished, not those of `output_file`; what it returns, a `dict` or
                `None`, stands behind the progress bar.
            show_progress_bar (`bool`), description (`str`): a tqdm bar over prompts, and what stands before it.

        Returns:
            `list[Completion]`: in the order of the prompts.

        Raises:
            `ValueError`: for prompts that are empty or fill the context (before anything is generated), an `output_file` that holds answers to other prompts,
                and all that generate() refuses.
            [`RetrievalError`]: when a search fails; finished answers are in `output_file`.
        """
        for name in ("streamer", "prefix_allowed_tokens_fn"):
            if kwargs.get(name) is not None:
                raise ValueError(f"{name} needs rows that keep their places: use generate().")
        call = self._retrieval_call(retriever, retrieval_config, max_retrievals) or _Call(None, RetrievalConfig())
        prepared = self._check_retrieval_arguments(generation_config, kwargs)
        if prepared.num_return_sequences not in (None, 1):
            raise ValueError("generate_many answers each prompt once: for num_return_sequences, repeat the prompts.")
        prompts = [list(map(int, prompt)) for prompt in prompts]
        if empty := [number for number, prompt in enumerate(prompts) if not prompt]:
            raise ValueError(f"Prompt {empty[0]} is empty.")
        if not prompts and not kwargs.get("synced_gpus"):
            return []
        longest = max(map(len, prompts), default=1)
        key = self._settings_hash(prepared, call)
        results = read_completions(output_file, prompts, key) if output_file is not None else {}
        if max_batch_tokens is not None:
            budget = prepared.max_new_tokens or (prepared.max_length or longest + 20) - longest  # 20: transformers' default
            call.columns = self._check_lengths(prompts) or self._columns_needed(longest, budget, call)
            batch_size = max(1, min(batch_size, max_batch_tokens // call.columns))
        bar = {"total": len(prompts), "initial": len(results), "desc": description, "unit": "prompt", "disable": not show_progress_bar}
        call.queue = Queue(prompts, results, batch_size, output_file, key, bar, on_completion)
        first = torch.zeros((1, longest), dtype=torch.long, device=self.device)  # transformers prepares processors and budgets from its shape
        self._generate_with_retrieval(first, generation_config, {"attention_mask": torch.ones_like(first), **kwargs}, call)
        return [call.queue.results[number] for number in range(len(prompts))]

    def make_streamer(self, tokenizer=None, timeout=None):
        """
        A streamer for one call of generate(), which runs in another thread: `for event in streamer` gives texts and retrievals as they happen.

        Args:
            tokenizer (`PreTrainedTokenizerBase`, *optional*): Gen's; defaults to the model's own.
            timeout (`float`, *optional*): seconds to wait for an event; by default, without end.

        Returns:
            [`RetrievalStreamer`], whose events are [`StreamEvent`]s.
        """
        ends = self.generation_config.eos_token_id
        stops = {self.config.nsp_token_id, self.config.ce_token_id, *(ends if isinstance(ends, list) else [ends])} - {None}
        return RetrievalStreamer(self.tokenizer if tokenizer is None else tokenizer, stops, timeout)

    def release_static_cache(self):
        """Free the memory that `cache_implementation="static"` keeps for the next call."""
        self._static_row_cache = None

    def _retrieval_call(self, retriever, retrieval_config, max_retrievals):
        """What this call retrieves, checked; `None` for ordinary generation."""
        settings = retrieval_config if retrieval_config is not None else RetrievalConfig()
        settings = settings if max_retrievals is None else replace(settings, max_retrievals=max_retrievals)
        if self.config.nsp_token_id is None or (retriever is None and settings.passages is None and not settings.forbid_nsp):
            if retrieval_config is not None:
                raise ValueError("retrieval_config needs a retriever, passages of its own or forbid_nsp=True, and a model with an [NSP] token.")
            return None
        if retriever is not None:
            retriever.check_model(self)
        return _Call(retriever, settings)

    def _generate_with_retrieval(self, inputs, generation_config, kwargs, call):
        call.static = self._check_retrieval_arguments(generation_config, kwargs).cache_implementation == "static"
        kwargs = {name: value for name, value in kwargs.items() if name != "cache_implementation"}
        if call.static and (generation_config or self.generation_config).cache_implementation is not None:  # ours, not transformers' own static cache
            generation_config = copy.deepcopy(generation_config or self.generation_config)
            generation_config.cache_implementation = None
        kwargs = {**kwargs, "past_key_values": DynamicCache()}  # a placeholder: the loop has a cache of its own
        with _maskable_attention(self.gen):
            output = super().generate(inputs, generation_config, retrieval_call=call, **kwargs)
        if kwargs.get("streamer") is not None:
            kwargs["streamer"].end()
        return output

    def _settings_hash(self, generation_config, call):
        """Of all that decides an answer and can be written down: weights only by name, processors not at all."""
        settings = {name: value for name, value in vars(call.settings).items() if name not in ("candidates", "passages")}
        index = getattr(call.retriever, "fingerprint", None)
        return digest([generation_config.to_diff_dict(), settings, index, self.config._name_or_path])

    def _check_retrieval_arguments(self, generation_config, kwargs):
        prepared, _ = self._prepare_generation_config(generation_config, **kwargs)
        mode = prepared.get_generation_mode(kwargs.get("assistant_model"))
        if mode not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE) or kwargs.get("custom_generate") is not None:
            raise ValueError(f"Retrieval works in greedy decoding and sampling, not in {mode.value}; set num_beams=1 and no assistant_model.")
        own = kwargs.get("past_key_values") is not None or prepared.cache_implementation not in (None, "dynamic", "static")
        if not prepared.use_cache or own:
            raise ValueError("Retrieval keeps its own KV cache: leave out use_cache=False and past_key_values; cache_implementation may be 'static'.")
        if kwargs.get("inputs_embeds") is not None or prepared.guidance_scale not in (None, 1):
            raise ValueError("inputs_embeds and guidance_scale are not available with a retriever: prompt and passages are read once, as token ids.")
        if prepared.prefill_chunk_size is not None or prepared.cache_config is not None:
            raise ValueError("prefill_chunk_size and cache_config are not available with a retriever: prompts are read whole, into a cache of its own.")
        for name in ("output_scores", "output_logits", "output_attentions", "output_hidden_states"):
            if getattr(prepared, name):
                raise ValueError(f"{name}=True is not available with a retriever: rows that read passages have no step for it.")
        own_inputs = {"input_ids", "attention_mask", "past_key_values", "use_cache", "inputs_embeds", "kwargs"}
        if unheeded := sorted((set(inspect.signature(self.forward).parameters) - own_inputs) & {name for name, value in kwargs.items() if value is not None}):
            raise ValueError(f"{', '.join(unheeded)}: not available with a retriever, which makes what Gen reads row by row.")
        if self.training and any(getattr(module, "gradient_checkpointing", False) for module in self.gen.modules()):
            raise ValueError("In training mode with gradient checkpointing there is no KV cache to generate with: call model.eval() first.")
        kinds = layer_kinds(self.config.get_text_config())
        if self.gen._is_stateful or not set(kinds) <= {"full_attention", "sliding_attention"}:
            raise ValueError(
                f"{type(self.gen).__name__} has layers of the types {', '.join(kinds)}; a recurrent state or a chunked window cannot be kept through "
                "retrievals: use a model of full and sliding-window attention."
            )
        if not self.gen._supports_attention_backend:
            self._check_row_cache()
        return prepared

    @torch.no_grad()
    def _check_row_cache(self):
        """Older architectures make their attention masks themselves: see once whether Gen follows the mask and the positions that it is given."""
        if getattr(self, "_follows_masks", False):
            return
        config, device = self.config.get_text_config(), self.device
        ids = torch.arange(1, 9, device=device).reshape(2, 4) * (config.vocab_size // 9)
        lengths = torch.tensor([[2], [3]], device=device)
        cache, read, ends = RowCache(2, 5, device), torch.arange(3, device=device), torch.arange(2, device=device)
        try:
            for start, count in ((torch.zeros_like(lengths), lengths), (lengths, torch.ones_like(lengths))):
                offsets = read[: int(count.max())]
                positions = start + torch.minimum(offsets, count - 1)
                tokens = ids.gather(1, positions)
                cache.begin(2, start + offsets, tokens, torch.where(offsets < count, positions, EMPTY), int((start + offsets).max()) + 1)
                mask = torch.zeros(2, 1, len(offsets), cache._width, dtype=self.gen.dtype, device=device)
                mask = mask.masked_fill(~cache.visible(positions), torch.finfo(mask.dtype).min)
                hidden = self.gen.base_model(tokens, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True).last_hidden_state
            expected = [self.gen.base_model(row[None, : int(n) + 1], use_cache=False).last_hidden_state[0, -1] for row, n in zip(ids, lengths, strict=True)]
            self._follows_masks = torch.allclose(hidden[ends, 0].float(), torch.stack(expected).float(), atol=1e-2, rtol=1e-2)
        except (TypeError, ValueError, RuntimeError, IndexError, AttributeError) as error:
            raise ValueError(f"{type(self.gen).__name__} cannot read rows of different lengths from one cache ({error}); use another architecture.") from error
        if not self._follows_masks:
            raise ValueError(f"{type(self.gen).__name__} makes attention masks of its own, which retrieval would need to change; use another architecture.")

    def prepare_inputs_for_generation(self, input_ids, retrieval_call=None, **kwargs):
        """Names what `_sample` takes, so that generate() lets it through."""
        return super().prepare_inputs_for_generation(input_ids, output_query_embeds=False, **kwargs)

    def _sample(
        self, input_ids, logits_processor, stopping_criteria, generation_config, synced_gpus=False, streamer=None, retrieval_call=None, **kwargs
    ):  # fmt: skip
        """Where transformers has prepared everything and would decode."""
        if retrieval_call is None:
            return super()._sample(
                input_ids,
                logits_processor=logits_processor,
                stopping_criteria=stopping_criteria,
                generation_config=generation_config,
                synced_gpus=synced_gpus,
                streamer=streamer,
                **kwargs,
            )
        call, queue, mask, width = retrieval_call, retrieval_call.queue, kwargs.get("attention_mask"), input_ids.shape[1]
        try:
            prompts, error = self._prompts(input_ids, mask, call, streamer, synced_gpus), None
            slots = queue.batch_size if queue is not None and call.static else min(queue.batch_size if queue is not None else len(prompts), len(prompts))
            columns = call.columns or self._columns_to_start_with(prompts, generation_config.max_length - width, call)
            decoder = Decoder(
                self, generation_config, logits_processor, stopping_criteria, call.retriever, call.settings, max(slots, 1), width, columns,
                input_ids.device, streamer, synced_gpus, call.static, refill=queue is not None,
            )  # fmt: skip
            rows = [Row(number, prompt) for number, prompt in enumerate(prompts)]
            self._give_passages(decoder, rows, call, 1 if queue is not None else generation_config.num_return_sequences or 1)
        except ValueError as failure:
            error = failure
        _raise_together(error, synced_gpus, input_ids.device)
        if queue is not None:
            return queue.run(self, decoder, rows)
        finished = sorted(decoder.run(rows), key=lambda row: row.number)
        return self._output(decoder, finished, input_ids, mask, generation_config)

    def _prompts(self, input_ids, mask, call, streamer, synced_gpus):
        """The prompts of a call, `list[list[int]]`, and everything that can be wrong with them."""
        if synced_gpus and self.config.query_from != "gen":
            raise ValueError(f"query_from={self.config.query_from!r} is not available with synced_gpus: only Gen's forwards are kept in step.")
        prompts = call.queue.prompts if call.queue is not None else _unpadded(input_ids, mask)
        if streamer is not None and len(prompts) > 1:
            raise ValueError(f"A streamer takes one row, found {len(prompts)}: their texts would be mixed. Stream one prompt, or use generate_many.")
        self._check_lengths(prompts)
        return prompts

    def _check_lengths(self, prompts):
        limit = context_length(self.config.get_text_config())
        for number, prompt in enumerate(prompts):
            if len(prompt) >= limit:
                raise ValueError(f"Prompt {number} has {len(prompt):,} tokens, but Gen reads {limit:,}: nothing could be written behind it.")

    def _columns_to_start_with(self, prompts, budget, call):
        """Columns of the cache: a captured step should not change its shape, the others may grow."""
        longest = max(map(len, prompts), default=1)
        return self._columns_needed(longest, budget, call) if call.static else longest + min(budget, 256)

    def _columns_needed(self, longest, budget, call):
        """Columns that the longest row may fill: prompt, decoded tokens, and the passages of `max_retrievals` (of one, where there is no limit)."""
        settings, limit = call.settings, context_length(self.config.get_text_config())
        retrievals = 1 if settings.max_retrievals is None else settings.max_retrievals
        if settings.forbid_nsp or (call.retriever is None and settings.passages is None):
            retrievals = 0
        return min(longest + budget + retrievals * settings.top_k * (self.config.max_passage_length + 1), limit)

    def _row_cache(self, rows, columns, device, static):
        """A cache for one call; that of a captured step is kept, since another one would have to be captured anew."""
        limit = context_length(self.config.get_text_config())
        if not static:
            return RowCache(rows, columns, device, limit)
        kept = getattr(self, "_static_row_cache", None)
        fits = kept is not None and len(kept.positions) == rows and kept.positions.device == device and kept.dtype == self.gen.dtype
        if not fits or not columns <= kept.columns <= 4 * columns + 64:  # attention reads all of it: a far too large one is slower for good
            kept = self._static_row_cache = RowCache(rows, columns, device, limit, static=True, dtype=self.gen.dtype)
        kept.positions.fill_(EMPTY)
        return kept

    def _give_passages(self, decoder, rows, call, copies):
        """Candidates and given passages to the rows they belong to; with `num_return_sequences` all copies of a prompt get its own."""
        for name in ("candidates", "passages"):
            given = getattr(call.settings, name)
            if given is None:
                continue
            if name == "candidates" and call.retriever is None:
                raise ValueError("RetrievalConfig.candidates need a retriever to search them.")
            if len(given) * copies != len(rows):
                raise ValueError(f"RetrievalConfig.{name} has {len(given)} entries, expected one for each of the {len(rows) // copies} prompts.")
            for i, entry in enumerate(given):
                value = None
                if entry is not None:
                    value = call.retriever.rows_of(entry) if name == "candidates" else decoder.given_passages(entry)
                for row in rows[i * copies : (i + 1) * copies]:
                    setattr(row, "given" if name == "passages" else "candidates", value)

    def _output(self, decoder, rows, input_ids, mask, generation_config):
        """Prompts as they were given, then each row's continuation, padded on the right."""
        width = input_ids.shape[1]
        prompts = input_ids
        if mask is not None and (mask[:, -1] == 0).any():  # padded on the right, where the answers go
            prompts = pad_rows([[decoder.pad] * (width - len(row.prompt)) + row.prompt for row in rows], device=input_ids.device)[0]
        continuations = [torch.tensor(row.ids[len(row.prompt) :], dtype=torch.long, device=input_ids.device) for row in rows]
        continuations = torch.nn.utils.rnn.pad_sequence(continuations, batch_first=True, padding_value=decoder.pad)
        sequences = torch.cat([prompts, continuations], dim=1)
        for row in rows:
            padding = width - len(row.prompt)
            for retrieval in row.retrievals:
                retrieval.position += padding
                retrieval.grounded_span = tuple(column + padding for column in retrieval.grounded_span)
        if not generation_config.return_dict_in_generate:
            return sequences
        return CoSupGenerateOutput(
            sequences=sequences,
            retrievals=[row.retrievals for row in rows],
            prompt_length=width,
            num_generated_tokens=torch.tensor([row.num_generated_tokens for row in rows], device=input_ids.device),
            num_forwarded_tokens=decoder.num_forwarded_tokens,
        )

    def decode_with_citations(self, outputs, tokenizer=None):
        """
        Readable answers: the generated text with a numbered citation behind each grounded span, and the passages below.

        Args:
            outputs ([`CoSupGenerateOutput`]): of `generate(..., return_dict_in_generate=True)` with a retriever.
            tokenizer (`PreTrainedTokenizerBase`, *optional*): Gen's; defaults to the model's own.

        Returns:
            `list[str]`: one text a row. A passage that a row used twice keeps its number.
        """
        tokenizer = self.tokenizer if tokenizer is None else tokenizer
        rows = zip(outputs.sequences.tolist(), outputs.retrievals, strict=True)
        return [cited_text(ids, trace, outputs.prompt_length, tokenizer) for ids, trace in rows]


@dataclass
class _Call:
    """What one call of generate() or generate_many() is about, on its way through transformers' generate() to `_sample`."""

    retriever: object
    settings: RetrievalConfig
    static: bool = False
    queue: object = None
    columns: int | None = None


def _raise_together(error, synced_gpus, device):
    """Raise `error`; with `synced_gpus` on every rank if on any, or the others would wait for its forwards."""
    failed = torch.tensor(int(error is not None), device=device)
    if synced_gpus:
        torch.distributed.all_reduce(failed, op=torch.distributed.ReduceOp.MAX)
    if error is not None:
        raise error
    if synced_gpus and failed.item():
        raise ValueError("Another rank was given what generate() refuses; its error says what.")


def _unpadded(input_ids, attention_mask):
    """The token ids of each row, `list[list[int]]`."""
    if attention_mask is None:
        return input_ids.tolist()
    mask = attention_mask.bool()
    holes = (mask[:, 1:] & ~mask[:, :-1]).sum(1) + mask[:, 0].int() > 1
    for wrong, message in ((~mask.any(1), "holds no token"), (holes, "has padding between its tokens; expected it on one side")):
        if wrong.any():
            raise ValueError(f"Row {int(wrong.int().argmax())} of input_ids {message}.")
    return [ids[keep].tolist() for ids, keep in zip(input_ids, mask, strict=True)]


@contextlib.contextmanager
def _maskable_attention(gen):
    """Rows of different lengths need a mask, which flash kernels do not take: for this call Gen then attends through SDPA."""
    config = gen.config.get_text_config()
    kept = config._attn_implementation
    if kept not in ("sdpa", "eager"):
        config._attn_implementation = "sdpa" if gen._supports_sdpa and not getattr(config, "attn_logit_softcapping", None) else "eager"
    try:
        yield
    finally:
        config._attn_implementation = kept
