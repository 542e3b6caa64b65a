"""generate() with retrieval, and generate_many(): their arguments and outputs, and the way to the decoding loop."""

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import (
    DynamicCache,
    GenerationConfig,
    LogitsProcessorList,
    PreTrainedTokenizerBase,
    StoppingCriteriaList,
)

from .cache_cosup import RowCache, maskable_attention
from .call_cosup import RetrievalCall, call_settings
from .decoding_cosup import Decoder
from .files_cosup import digest
from .memory_cosup import Memory, MemoryConfig, checked_memory_config
from .outputs_cosup import CoSupGenerateOutput, call_output
from .queue_cosup import Completion, Queue, prompt_keys, read_completions
from .refusals_cosup import RefusalsMixin, check_configs, check_token_ids, listed_prompts, raise_together, unpadded
from .retriever_cosup import Retriever, check_retriever, content_digest
from .settings_cosup import DecodingSettings, RetrievalConfig, RowSettings
from .states_cosup import watch
from .streaming_cosup import RetrievalStreamer, StreamerListener, ending
from .trace_cosup import Row, cited_text


class RetrievalGenerationMixin(RefusalsMixin):
    """`generate()` with a `retriever`, and `generate_many()`; must come before `GenerationMixin` in the bases."""

    # attributes of the model
    generation_config: GenerationConfig
    tokenizer: PreTrainedTokenizerBase
    _query_encoder: Callable[[], Any]
    _input_device: Callable[[], torch.device]
    # kept between calls
    _static_row_cache: RowCache | None

    def generate(
        self,
        inputs: torch.Tensor | Mapping[str, torch.Tensor] | None = None,
        generation_config: GenerationConfig | None = None,
        *,
        retriever: Retriever | None = None,
        retrieval_config: RetrievalConfig | None = None,
        max_retrievals: int | None = None,
        memory: Memory | None = None,
        memory_config: MemoryConfig | None = None,
        **kwargs: Any,
    ) -> Any:
        """
        Generate, with retrieval whenever a row emits `[NSP]`.

        The hidden state at `[NSP]` is the query that searches `retriever`. The passage and `[Cs]` are appended to the
        row, which then continues. A passage is shortened to the room that is left in the context; a row ends when its
        context is full. Decoding is greedy or samples; all other arguments are as in `GenerationMixin.generate`.

        Args:
            inputs (`torch.LongTensor` of shape `(B, T)`, *optional*): prompts, padded on the left. For a prompt that
                ends in `[NSP]`, a passage is retrieved first. The output of a tokenizer (`input_ids` and
                `attention_mask`) may be passed as it is. They may be on another device than the model; the output is
                on theirs.
            generation_config (`GenerationConfig`, *optional*): as always. Budgets such as `max_new_tokens` count the
                decoded tokens of each row. With `cache_implementation="static"` the decode step keeps its shapes; if
                transformers compiles for a static cache (on a GPU, or with `compile_config`), the step is captured.
            retriever ([`Retriever`], *optional*): e.g. a [`PassageIndex`]; without it this is ordinary generation.
            retrieval_config ([`RetrievalConfig`], *optional*): how to retrieve.
            max_retrievals (`int`, *optional*): per row; replaces `retrieval_config.max_retrievals`.
            memory ([`Memory`], *optional*): e.g. a [`KNNMemory`] or an [`MLPMemory`]: mixed into Gen's distribution at
                every decision, with a retriever or without. Control tokens and end tokens keep their probabilities.
            memory_config ([`MemoryConfig`], *optional*): weight and temperature of the memory; defaults to
                `memory.memory_config`.
            nsp_token_id (`None`, *optional*): `None` makes the call plain Gen: nothing is suppressed or retrieved.

        Returns:
            `torch.LongTensor`; with `return_dict_in_generate=True` and a retriever or a memory, a
            [`CoSupGenerateOutput`].

        Raises:
            `TypeError`: for prompts that are not token ids, and for a retriever, memory or config of the wrong kind.
            `ValueError`: for an index or a memory of another model, a `memory_config` without a memory, a prompt that
                is empty, fills the context or holds unknown token ids, and for everything that cannot be combined with
                a retriever or a memory: beam search, assisted decoding, a given cache, `use_cache=False`, per-step
                scores, states or attentions, state-space layers, a streamer for several rows, training mode with
                gradient checkpointing.
            [`RetrievalError`]: when a search fails; it keeps the finished rows.
        """
        with ending(kwargs.get("streamer")):
            if isinstance(inputs, Mapping):
                kwargs = {**inputs, **kwargs}
                inputs = None
            elif inputs is not None and kwargs.get("input_ids") is None:
                kwargs = {**kwargs, "input_ids": inputs}
                inputs = None
            if kwargs.get("input_ids") is not None:
                check_token_ids(kwargs["input_ids"])
            check_configs(generation_config, retrieval_config, memory_config, kwargs)
            if "nsp_token_id" in kwargs:
                if kwargs.pop("nsp_token_id") is not None:
                    raise ValueError(
                        "generate() takes no nsp_token_id but None, which means plain Gen: the config says which "
                        "token retrieves."
                    )
                if memory is not None:
                    raise ValueError(
                        "nsp_token_id=None makes the call plain Gen, which has no memory: leave out one of them."
                    )
                kwargs = {"suppress_tokens": None, **kwargs}
                return super().generate(inputs, generation_config, **kwargs)  # type: ignore[misc]  # GenerationMixin's
            call = self._retrieval_call(retriever, retrieval_config, max_retrievals, memory, memory_config)
            if call is None:
                return super().generate(inputs, generation_config, **kwargs)  # type: ignore[misc]  # GenerationMixin's
            return self._generate_with_retrieval(inputs, generation_config, kwargs, call)

    def generate_many(
        self,
        prompts: Iterable[Sequence[int]],
        generation_config: GenerationConfig | None = None,
        *,
        retriever: Retriever | None = None,
        retrieval_config: RetrievalConfig | None = None,
        max_retrievals: int | None = None,
        memory: Memory | None = None,
        memory_config: MemoryConfig | None = None,
        batch_size: int = 32,
        max_batch_tokens: int | None = None,
        output_file: str | Path | None = None,
        on_completion: Callable[[Completion], dict[str, Any] | None] | None = None,
        show_progress_bar: bool = True,
        description: str = "Generating",
        **kwargs: Any,
    ) -> list[Completion]:
        """
        Continue any number of prompts. When rows finish, waiting prompts take their places, so the batch stays full.

        Args:
            prompts (`list[list[int]]`): token ids; or what a tokenizer returns for a list of texts.
            generation_config, retriever, retrieval_config, max_retrievals, memory, memory_config, **kwargs: as in
                [`generate`]. Without a retriever `[NSP]` is a token like any other. `candidates` and `passages` have
                one entry per prompt. Logits processors and stopping criteria see the current rows of the batch, which
                change places: they must not remember which row is which.
            batch_size (`int`): the most rows at a time.
            max_batch_tokens (`int`, *optional*): the most columns that the KV caches of all rows may have together;
                one row always runs. A row starts with room for its prompt, `max_new_tokens`, and `max_retrievals`
                (one, if there is no limit) passages of full length. If rows retrieve more often, the latest rows wait,
                and go on unchanged later. In a static cache no row waits like this, so without `max_retrievals` each
                counts as a full context.
            output_file (`str` or `Path`, *optional*): JSON Lines. Each answer is appended as soon as it is finished;
                prompts whose answers the file already holds are skipped.
            on_completion (`Callable`, *optional*): gets each [`Completion`] as soon as it is finished, except answers
                that `output_file` already held. It returns a `dict` to show after the progress bar, or `None`.
            show_progress_bar (`bool`), description (`str`): whether to show a tqdm bar, and the text before it.

        Returns:
            `list[Completion]`: in the order of the prompts.

        Raises:
            `TypeError`: for prompts that are not token ids, e.g. texts.
            `ValueError`: for prompts that are empty or fill the context (before anything is generated), an
                `output_file` that holds answers to other prompts, `max_length`, `min_length` and `max_time`, and
                everything that generate() refuses.
            [`RetrievalError`]: when a search fails; finished answers are in `output_file`.
        """
        for name, limit in (("batch_size", batch_size), ("max_batch_tokens", max_batch_tokens)):
            if limit is not None and limit < 1:
                raise ValueError(f"{name} is {limit}, expected at least 1.")
        check_configs(generation_config, retrieval_config, memory_config, kwargs)
        prompt_ids = listed_prompts(prompts)
        call = self._retrieval_call(retriever, retrieval_config, max_retrievals, memory, memory_config)
        if call is None:
            call = RetrievalCall()
        prepared = self._check_retrieval_arguments(generation_config, kwargs)
        self._check_queue_arguments(prepared, generation_config, kwargs)
        if not prompt_ids and not kwargs.get("synced_gpus"):
            return []
        settings_hash, keys = "", []
        results: dict[int, Completion] = {}
        if output_file is not None:
            settings_hash = self._settings_hash(prepared, call)
            keys = prompt_keys(prompt_ids, call.retrieval)
            results = read_completions(output_file, keys, settings_hash)
        call.max_batch_tokens = max_batch_tokens
        bar_options = {
            "total": len(prompt_ids),
            "initial": len(results),
            "desc": description,
            "unit": "prompt",
            "disable": not show_progress_bar,
        }
        queue = Queue(prompt_ids, keys, results, batch_size, output_file, settings_hash, bar_options, on_completion)
        call.queue = queue
        # transformers prepares processors and budgets from the shape of this row
        longest = max(map(len, prompt_ids), default=1)
        placeholder = torch.zeros((1, longest), dtype=torch.long, device=self._input_device())
        kwargs = {"attention_mask": torch.ones_like(placeholder), **kwargs}
        self._generate_with_retrieval(placeholder, generation_config, kwargs, call)
        return [queue.results[number] for number in range(len(prompt_ids))]

    def prepare_decoding(
        self,
        prompt_length: int,
        generation_config: GenerationConfig | None = None,
        *,
        retriever: Retriever | None = None,
        memory: Memory | None = None,
        memory_config: MemoryConfig | None = None,
        **kwargs: Any,
    ) -> tuple[DecodingSettings, RowSettings]:
        """
        Return the settings that [`generate`] would use for one prompt, for a [`Decoder`] that serves prompts as they
        come.

        Args:
            prompt_length (`int`): of the prompt, in tokens.
            generation_config, retriever, memory, memory_config, **kwargs: as in [`generate`], e.g. `max_new_tokens`.

        Raises:
            `ValueError`: as in [`generate`], except for what depends on the tokens of the prompt.
        """
        call = self._retrieval_call(retriever, None, None, memory, memory_config) or RetrievalCall()
        call.only_settings = True
        placeholder = torch.zeros((1, prompt_length), dtype=torch.long, device=self._input_device())
        kwargs["attention_mask"] = torch.ones_like(placeholder)
        return self._generate_with_retrieval(placeholder, generation_config, kwargs, call)

    def make_streamer(
        self, tokenizer: PreTrainedTokenizerBase | None = None, timeout: float | None = None
    ) -> RetrievalStreamer:
        """
        Return a streamer for one call of generate() in another thread: `for event in streamer` gives texts and
        retrievals as they happen.

        Args:
            tokenizer (`PreTrainedTokenizerBase`, *optional*): Gen's; defaults to the model's.
            timeout (`float`, *optional*): seconds to wait for an event; by default no limit.

        Returns:
            [`RetrievalStreamer`]: an iterator of [`StreamEvent`]s.
        """
        stops = {self.config.nsp_token_id, self.config.ce_token_id}
        ends = self.generation_config.eos_token_id
        if isinstance(ends, list):
            stops.update(ends)
        else:
            stops.add(ends)
        if tokenizer is None:
            tokenizer = self.tokenizer
        return RetrievalStreamer(tokenizer, [id for id in stops if id is not None], timeout)

    def release_static_cache(self) -> None:
        """Free the memory that `cache_implementation="static"` keeps for the next call."""
        self._static_row_cache = None

    def decode_with_citations(
        self, outputs: CoSupGenerateOutput, tokenizer: PreTrainedTokenizerBase | None = None
    ) -> list[str]:
        """
        Return readable answers: the generated text with a numbered citation after each grounded span, and the passages
        below.

        Args:
            outputs ([`CoSupGenerateOutput`]): of `generate(..., return_dict_in_generate=True)` with a retriever.
            tokenizer (`PreTrainedTokenizerBase`, *optional*): Gen's; defaults to the model's.

        Returns:
            `list[str]`: one text per row. A passage that a row used twice keeps its number.

        Raises:
            `TypeError`: for token ids alone, which do not say where the passages are.
        """
        if not hasattr(outputs, "retrievals"):
            raise TypeError(
                f"decode_with_citations got a {type(outputs).__name__}, expected what generate(..., retriever=index,"
                " return_dict_in_generate=True) returns."
            )
        if tokenizer is None:
            tokenizer = self.tokenizer
        texts = []
        for ids, trace in zip(outputs.sequences.tolist(), outputs.retrievals, strict=True):
            texts.append(cited_text(ids, trace, outputs.prompt_length, tokenizer))
        return texts

    # ------------------------------------------------------------------ through transformers' generate() to the loop

    def _retrieval_call(
        self,
        retriever: Retriever | None,
        retrieval_config: RetrievalConfig | None,
        max_retrievals: int | None,
        memory: Memory | None,
        memory_config: MemoryConfig | None,
    ) -> RetrievalCall | None:
        """Check the arguments and return them together; `None` for ordinary generation."""
        if retriever is not None:
            check_retriever(retriever)
        if memory is not None:
            memory_config = checked_memory_config(memory, memory_config)
            memory.check_model(self)
            # the hooks must be there before the step is compiled; a wrong name raises before anything is computed
            watch(self.gen, memory.states)
        elif memory_config is not None:
            raise ValueError("memory_config needs a memory: generate(..., memory=memory, memory_config=...).")
        retrieval = RetrievalConfig() if retrieval_config is None else retrieval_config
        if max_retrievals is not None:
            retrieval = replace(retrieval, max_retrievals=max_retrievals)
        call = RetrievalCall(retriever, retrieval, memory, memory_config)
        if self.config.nsp_token_id is None or not (call.has_passages or retrieval.forbid_nsp):
            if retrieval_config is not None:
                if self.config.nsp_token_id is None:
                    raise ValueError("retrieval_config needs a model with an [NSP] token, and this one has none.")
                raise ValueError(
                    "retrieval_config needs a retriever: generate(..., retriever=index). Without one, it may only"
                    " give the passages or set forbid_nsp=True."
                )
            if max_retrievals is not None:
                raise ValueError("max_retrievals needs a retriever: generate(..., retriever=index).")
            if memory is None:
                return None
            return RetrievalCall(memory=memory, memory_config=memory_config)
        if retriever is not None:
            retriever.check_model(self)
        if call.needs_queries and self.config.query_from != "gen":
            self._query_encoder()  # raises before anything is generated
        return call

    def _generate_with_retrieval(
        self,
        inputs: torch.Tensor | None,
        generation_config: GenerationConfig | None,
        kwargs: dict[str, Any],
        call: RetrievalCall,
    ) -> Any:
        """Check the arguments and run transformers' generate(), which prepares inputs and calls `_sample`."""
        prepared = self._check_retrieval_arguments(generation_config, kwargs)
        call.static = prepared.cache_implementation == "static"
        # the loop has its own cache: transformers gets a placeholder, and must not allocate another
        kwargs = {name: value for name, value in kwargs.items() if name != "cache_implementation"}
        kwargs["past_key_values"] = DynamicCache()
        if kwargs.get("input_ids") is not None:
            call.output_device = kwargs["input_ids"].device
        for name in ("input_ids", "attention_mask"):  # transformers prepares processors for the device of the prompts
            if isinstance(kwargs.get(name), torch.Tensor):
                kwargs[name] = kwargs[name].to(self._input_device())
        if generation_config is None:
            if self.generation_config.cache_implementation is not None:
                kwargs["cache_implementation"] = None
        elif prepared.cache_implementation is not None:
            generation_config = copy.deepcopy(generation_config)
            # transformers fills in None from the model's own config, and takes this for None
            generation_config.cache_implementation = "hybrid"
        with maskable_attention(self.gen):
            # GenerationMixin's
            output = super().generate(inputs, generation_config, retrieval_call=call, **kwargs)  # type: ignore[misc]
        if kwargs.get("streamer") is not None:
            kwargs["streamer"].end()
        return output

    def _settings_hash(self, generation_config: GenerationConfig, call: RetrievalCall) -> str:
        """Return a hash of configs, index, memory and model name; Gen's weights and processors are not included."""
        retrieval = vars(call.retrieval).copy()
        del retrieval["candidates"], retrieval["passages"]
        index = None if call.retriever is None else content_digest(call.retriever)
        memory = None
        if call.memory is not None and call.memory_config is not None:
            memory = [call.memory.fingerprint, call.memory_config.to_dict()]
        return digest([generation_config.to_diff_dict(), retrieval, index, memory, self.config._name_or_path])

    def prepare_inputs_for_generation(
        self, input_ids: Any, inputs_embeds: Any = None, retrieval_call: RetrievalCall | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        """Turn off query embeddings. generate() accepts `inputs_embeds` and `retrieval_call` since they are named."""
        return super().prepare_inputs_for_generation(  # type: ignore[misc]  # GenerationMixin's
            input_ids, inputs_embeds=inputs_embeds, output_query_embeds=False, **kwargs
        )

    def _sample(
        self,
        input_ids: torch.Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        synced_gpus: bool = False,
        streamer: Any = None,
        retrieval_call: RetrievalCall | None = None,
        **kwargs: Any,
    ) -> Any:
        """Run the decoding loop in place of transformers' loop."""
        if retrieval_call is None:
            return super()._sample(  # type: ignore[misc]  # GenerationMixin's
                input_ids,
                logits_processor=logits_processor,
                stopping_criteria=stopping_criteria,
                generation_config=generation_config,
                synced_gpus=synced_gpus,
                streamer=streamer,
                **kwargs,
            )
        call, queue = retrieval_call, retrieval_call.queue
        width, device = input_ids.shape[1], input_ids.device
        attention_mask = kwargs.get("attention_mask")
        error: Exception | None = None
        decoder: Decoder | None = None
        try:
            self._check_synced(synced_gpus)
            prompts = unpadded(input_ids, attention_mask) if queue is None else queue.prompts
            self._check_prompts(prompts, streamer)
            settings, row_settings = call_settings(
                self.config, call, generation_config, logits_processor, stopping_criteria, prompts, width, device
            )
            if call.only_settings:
                return settings, row_settings
            decoder = Decoder(self, settings, call.retriever, call.memory, synced_gpus)
            rows = [Row(number, prompt, row_settings) for number, prompt in enumerate(prompts)]
            decoder.lookup.prepare(rows, call.retrieval, copies=generation_config.num_return_sequences or 1)
            if streamer is not None:
                rows[0].listener = StreamerListener(streamer, call.retrieval.stream_passages)
        except Exception as failure:  # a retriever may raise anything
            error = failure
        try:
            raise_together(error, synced_gpus, device)
            assert decoder is not None
            if queue is not None:
                return queue.answer(self, rows, decoder.run)
            decoder.run(rows)
        finally:
            if call.static and decoder is not None:
                self._static_row_cache = decoder.cache
        return call_output(decoder, rows, input_ids, attention_mask, call.output_device or device)
