"""Retrieval-aware generate() and generate_many(): what they take and what they return."""

import contextlib
import copy
from dataclasses import dataclass, field, replace

import torch
from transformers import DynamicCache
from transformers.modeling_outputs import ModelOutput

from .cache_cosup import EMPTY, RowCache, context_length
from .decoding_cosup import Decoder
from .files_cosup import digest
from .memory_cosup import Memory, check_memory
from .queue_cosup import Queue, read_completions
from .refusals_cosup import RefusalsMixin
from .retriever_cosup import Retriever
from .settings_cosup import RetrievalConfig, decoding_settings
from .states_cosup import watch
from .streaming_cosup import RetrievalStreamer, ending
from .tokenization_cosup import pad_rows
from .trace_cosup import Row, cited_text


@dataclass
class CoSupGenerateOutput(ModelOutput):
    """
    Output of `generate(..., return_dict_in_generate=True)` with a retriever, a memory, or both.

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


class RetrievalGenerationMixin(RefusalsMixin):
    """`generate()` with a `retriever`, and `generate_many()`; goes before `GenerationMixin` in the bases."""

    device: torch.device  # a property of the model

    def generate(
        self,
        inputs=None,
        generation_config=None,
        *,
        retriever: Retriever | None = None,
        retrieval_config: RetrievalConfig | None = None,
        max_retrievals: int | None = None,
        memory: Memory | None = None,
        **kwargs,
    ):
        """
        Generate; whenever a row emits `[NSP]`, its hidden state there searches `retriever`, the passage and `[Cs]` are appended, and the
        row writes on. Greedy decoding and sampling; every other argument is as in `GenerationMixin.generate`.

        A passage for which the context has no room is shortened; a row whose context is full ends.

        Args:
            inputs (`torch.LongTensor` of shape `(B, T)`, *optional*): prompts, padded on the left. One that ends in `[NSP]` retrieves at once.
            generation_config (`GenerationConfig`, *optional*): as always. Budgets such as `max_new_tokens` count decoded tokens, row by row. With
                `cache_implementation="static"` the one-token step keeps its shapes; where transformers compiles a static cache (on a GPU, or with
                `compile_config`), it is captured.
            retriever ([`Retriever`], *optional*): e.g. a [`PassageIndex`]; without it this is ordinary generation.
            retrieval_config ([`RetrievalConfig`], *optional*): how to retrieve.
            max_retrievals (`int`, *optional*): per row; that of `retrieval_config`.
            memory ([`Memory`], *optional*): adjusts the logits of every decision, with a retriever or without one.
            nsp_token_id (`None`, *optional*): `None` makes the call plain Gen: nothing is suppressed, nothing retrieved.

        Returns:
            `torch.LongTensor`, or [`CoSupGenerateOutput`] with `return_dict_in_generate=True` and a retriever or memory.

        Raises:
            `TypeError`: for a memory that is none.
            `ValueError`: for an index of another model, a memory that names no submodule of Gen, a prompt that fills the
                context, and what cannot be combined with a retriever or a memory: beam search, assisted decoding, a given
                cache, `use_cache=False`, per-step scores, states or attentions, state-space layers, a streamer for several
                rows, training mode with gradient checkpointing.
            [`RetrievalError`]: when a search fails; it keeps the rows that were finished.
        """
        with ending(kwargs.get("streamer")):
            if "nsp_token_id" in kwargs:
                if kwargs.pop("nsp_token_id") is not None:
                    raise ValueError(
                        "generate() takes nsp_token_id=None (plain Gen) or none at all; which token retrieves is the config's business."
                    )
                if memory is not None:
                    raise ValueError(
                        "nsp_token_id=None makes the call plain Gen, which has no memory: drop one of them."
                    )
                return super().generate(inputs, generation_config, **{"suppress_tokens": None, **kwargs})  # type: ignore[misc]
            call = self._retrieval_call(retriever, retrieval_config, max_retrievals, memory)
            if call is None:
                return super().generate(inputs, generation_config, **kwargs)  # type: ignore[misc]
            return self._generate_with_retrieval(inputs, generation_config, kwargs, call)

    def generate_many(
        self,
        prompts,
        generation_config=None,
        *,
        retriever: Retriever | None = None,
        retrieval_config: RetrievalConfig | None = None,
        max_retrievals: int | None = None,
        memory: Memory | None = None,
        batch_size=32,
        max_batch_tokens=None,
        output_file=None,
        on_completion=None,
        show_progress_bar=True,
        description="Generating",
        **kwargs,
    ):
        """
        Continue any number of prompts: a row that is finished makes room for the next prompt at once, so that the batch stays full.

        Args:
            prompts (`list[list[int]]`): token ids of each.
            generation_config, retriever, retrieval_config, max_retrievals, memory, **kwargs: as in [`generate`]; without
                retriever plain generation, in which `[NSP]` is a token like any other. `candidates` and `passages` are lists
                over all prompts. Logits processors and stopping criteria see the rows that are being written, whose places
                change: they must not remember which row is which.
            batch_size (`int`): rows at once.
            max_batch_tokens (`int`, *optional*): fewer rows where this many columns of KV cache would not hold them: a row may need its prompt,
                `max_new_tokens`, and `max_retrievals` (one, where there is no limit) passages of full length.
            output_file (`str` or `Path`, *optional*): JSON Lines; each answer is appended as soon as it is finished, and answers that stand there already are
                not written again.
            on_completion (callable, *optional*): gets each [`Completion`] as soon as it is finished, not those of `output_file`; what it returns, a `dict` or
                `None`, is shown after the progress bar.
            show_progress_bar (`bool`), description (`str`): a tqdm bar over prompts, and the text before it.

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
        call = self._retrieval_call(retriever, retrieval_config, max_retrievals, memory) or _Call()
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
            budget = (
                prepared.max_new_tokens or (prepared.max_length or longest + 20) - longest
            )  # 20: transformers' default
            call.columns = self._check_lengths(prompts) or self._columns_needed(longest, budget, call)
            batch_size = max(1, min(batch_size, max_batch_tokens // call.columns))
        bar = {
            "total": len(prompts),
            "initial": len(results),
            "desc": description,
            "unit": "prompt",
            "disable": not show_progress_bar,
        }
        call.queue = Queue(prompts, results, batch_size, output_file, key, bar, on_completion)
        first = torch.zeros(
            (1, longest), dtype=torch.long, device=self.device
        )  # transformers prepares processors and budgets from its shape
        self._generate_with_retrieval(
            first, generation_config, {"attention_mask": torch.ones_like(first), **kwargs}, call
        )
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
        stops = {self.config.nsp_token_id, self.config.ce_token_id, *(ends if isinstance(ends, list) else [ends])} - {
            None
        }
        return RetrievalStreamer(self.tokenizer if tokenizer is None else tokenizer, stops, timeout)

    def release_static_cache(self):
        """Free the memory that `cache_implementation="static"` keeps for the next call."""
        self._static_row_cache = None

    def _retrieval_call(self, retriever, retrieval_config, max_retrievals, memory):
        """What this call retrieves and which memory it has, checked; `None` for ordinary generation."""
        if memory is not None:
            check_memory(memory)
            # before the step is compiled; and a wrong name raises before anything is computed
            watch(self.gen, memory.states)
        settings = retrieval_config if retrieval_config is not None else RetrievalConfig()
        settings = settings if max_retrievals is None else replace(settings, max_retrievals=max_retrievals)
        has_passages = retriever is not None or settings.passages is not None
        if self.config.nsp_token_id is None or not (has_passages or settings.forbid_nsp):
            if retrieval_config is not None:
                raise ValueError(
                    "retrieval_config needs a retriever, passages of its own or forbid_nsp=True, and a model with an [NSP] token."
                )
            return None if memory is None else _Call(memory=memory)
        if retriever is not None:
            retriever.check_model(self)
        return _Call(retriever, settings, memory)

    def _generate_with_retrieval(self, inputs, generation_config, kwargs, call):
        call.static = self._check_retrieval_arguments(generation_config, kwargs).cache_implementation == "static"
        kwargs = {name: value for name, value in kwargs.items() if name != "cache_implementation"}
        if (
            call.static and (generation_config or self.generation_config).cache_implementation is not None
        ):  # ours, not transformers' own static cache
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
        settings = {
            name: value for name, value in vars(call.settings).items() if name not in ("candidates", "passages")
        }
        index = None if call.retriever is None else call.retriever.fingerprint
        memory = None if call.memory is None else call.memory.fingerprint
        return digest([generation_config.to_diff_dict(), settings, index, memory, self.config._name_or_path])

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
        call, queue, mask, width = (
            retrieval_call,
            retrieval_call.queue,
            kwargs.get("attention_mask"),
            input_ids.shape[1],
        )
        try:
            prompts, error = self._prompts(input_ids, mask, call, streamer, synced_gpus), None
            slots = (
                queue.batch_size
                if queue is not None and call.static
                else min(queue.batch_size if queue is not None else len(prompts), len(prompts))
            )
            columns = call.columns or self._columns_to_start_with(prompts, generation_config.max_length - width, call)
            settings = decoding_settings(
                self.config,
                generation_config,
                logits_processor,
                stopping_criteria,
                call.settings,
                prompt_length=width,
                device=input_ids.device,
                has_retriever=call.retriever is not None,
                static=call.static,
                refill=queue is not None,
            )
            decoder = Decoder(
                self,
                settings,
                generation_config,
                max(slots, 1),
                columns,
                input_ids.device,
                call.retriever,
                call.memory,
                streamer,
                synced_gpus,
            )
            rows = [Row(number, prompt) for number, prompt in enumerate(prompts)]
            self._give_passages(
                decoder, rows, call, 1 if queue is not None else generation_config.num_return_sequences or 1
            )
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
            raise ValueError(
                f"query_from={self.config.query_from!r} is not available with synced_gpus: only Gen's forwards are kept in step."
            )
        prompts = call.queue.prompts if call.queue is not None else _unpadded(input_ids, mask)
        if streamer is not None and len(prompts) > 1:
            raise ValueError(
                f"A streamer takes one row, found {len(prompts)}: their texts would be mixed. Stream one prompt, or use generate_many."
            )
        self._check_lengths(prompts)
        return prompts

    def _check_lengths(self, prompts):
        limit = context_length(self.config.get_text_config())
        for number, prompt in enumerate(prompts):
            if len(prompt) >= limit:
                raise ValueError(
                    f"Prompt {number} has {len(prompt):,} tokens, but Gen reads {limit:,}: nothing could be written behind it."
                )

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
        fits = (
            kept is not None
            and len(kept.positions) == rows
            and kept.positions.device == device
            and kept.dtype == self.gen.dtype
        )
        if (
            not fits or not columns <= kept.columns <= 4 * columns + 64
        ):  # attention reads all of it: a far too large one is slower for good
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
                raise ValueError(
                    f"RetrievalConfig.{name} has {len(given)} entries, expected one for each of the {len(rows) // copies} prompts."
                )
            for i, entry in enumerate(given):
                value = None
                if entry is not None:
                    value_of = call.retriever.rows_of if name == "candidates" else decoder.lookup.given_passages
                    value = value_of(entry)
                for row in rows[i * copies : (i + 1) * copies]:
                    setattr(row, "given" if name == "passages" else "candidates", value)

    def _output(self, decoder, rows, input_ids, mask, generation_config):
        """Prompts as they were given, then each row's continuation, padded on the right."""
        width, pad = input_ids.shape[1], decoder.settings.pad
        prompts = input_ids
        if mask is not None and (mask[:, -1] == 0).any():  # padded on the right, where the answers go
            shifted = [[pad] * (width - len(row.prompt)) + row.prompt for row in rows]
            prompts = pad_rows(shifted, device=input_ids.device)[0]
        continuations = [
            torch.tensor(row.ids[len(row.prompt) :], dtype=torch.long, device=input_ids.device) for row in rows
        ]
        continuations = torch.nn.utils.rnn.pad_sequence(continuations, batch_first=True, padding_value=pad)
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
            num_forwarded_tokens=decoder.forwards.num_tokens,
        )

    def decode_with_citations(self, outputs, tokenizer=None):
        """
        Readable answers: the generated text with a numbered citation after each grounded span, and the passages below.

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

    retriever: Retriever | None = None
    settings: RetrievalConfig = field(default_factory=RetrievalConfig)
    memory: Memory | None = None
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
    for wrong, message in (
        (~mask.any(1), "holds no token"),
        (holes, "has padding between its tokens; expected it on one side"),
    ):
        if wrong.any():
            raise ValueError(f"Row {int(wrong.int().argmax())} of input_ids {message}.")
    return [ids[keep].tolist() for ids, keep in zip(input_ids, mask, strict=True)]


@contextlib.contextmanager
def _maskable_attention(gen):
    """Rows of different lengths need a mask, which flash kernels do not take: for this call Gen then attends through SDPA."""
    config = gen.config.get_text_config()
    kept = config._attn_implementation
    if kept not in ("sdpa", "eager"):
        config._attn_implementation = (
            "sdpa" if gen._supports_sdpa and not getattr(config, "attn_logit_softcapping", None) else "eager"
        )
    try:
        yield
    finally:
        config._attn_implementation = kept
