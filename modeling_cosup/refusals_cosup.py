"""The checks of generate() and generate_many(), before anything is computed."""

import inspect
from collections.abc import Callable, Iterable, Mapping
from operator import index
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel
from transformers.generation import BaseStreamer, MaxTimeCriteria
from transformers.generation.configuration_utils import GenerationMode

from .cache_cosup import EMPTY, RowCache, context_length, layer_kinds
from .configuration_cosup import CoSupConfig
from .encoding_cosup import evaluating
from .settings_cosup import RetrievalConfig

# arguments of forward() that the loop uses, or that another check refuses
_HANDLED = {"input_ids", "attention_mask", "past_key_values", "use_cache", "inputs_embeds", "kwargs"}


class RefusalsMixin:
    """The checks of [`RetrievalGenerationMixin`]; each raises a `ValueError`."""

    # attributes of the model
    config: CoSupConfig
    gen: PreTrainedModel
    device: torch.device
    training: bool
    forward: Callable[..., Any]
    generation_config: GenerationConfig
    _prepare_generation_config: Callable[..., tuple[GenerationConfig, dict[str, Any]]]
    # Gen uses the masks and positions that it is given; set once this was checked
    _follows_masks: bool

    def _check_retrieval_arguments(
        self, generation_config: GenerationConfig | None, kwargs: dict[str, Any]
    ) -> GenerationConfig:
        """Return the call's `GenerationConfig` after checking it, the kwargs and Gen."""
        prepared, _ = self._prepare_generation_config(generation_config, **kwargs)
        self._check_mode(prepared, kwargs)
        self._check_inputs(prepared, kwargs)
        self._check_gen()
        return prepared

    def _check_queue_arguments(
        self, prepared: GenerationConfig, generation_config: GenerationConfig | None, kwargs: dict[str, Any]
    ) -> None:
        """Refuse what generate() takes but generate_many() does not: `prepared` is the config of the call."""
        for name in ("streamer", "prefix_allowed_tokens_fn"):
            if kwargs.get(name) is not None:
                raise ValueError(f"{name} needs rows that keep their places: use generate().")
        for name in ("input_ids", "attention_mask"):
            if kwargs.get(name) is not None:
                raise ValueError(f"generate_many takes no {name}: its prompts are lists without padding.")
        configs = [config for config in (generation_config, self.generation_config) if config is not None]
        for refused, name in (("max_length", "max_new_tokens"), ("min_length", "min_new_tokens")):
            given = [kwargs.get(refused), *(getattr(config, refused) for config in configs)]
            if any(given) and getattr(prepared, name) is None:
                raise ValueError(
                    f"generate_many takes no {refused}, which would count the longest prompt for all: give {name}."
                )
        criteria = kwargs.get("stopping_criteria") or ()
        if prepared.max_time is not None or any(isinstance(criterion, MaxTimeCriteria) for criterion in criteria):
            raise ValueError(
                "generate_many takes no max_time, which would cut off prompts that still wait: give max_new_tokens."
            )
        for processor in kwargs.get("logits_processor") or ():
            if getattr(processor, "prompt_ignore_length", None) is not None:
                raise ValueError(
                    "generate_many takes no prompt_ignore_length, which would count the same tokens for all prompts."
                )
        if prepared.num_return_sequences not in (None, 1):
            raise ValueError("generate_many answers each prompt once: for num_return_sequences, repeat the prompts.")

    def _check_mode(self, prepared: GenerationConfig, kwargs: dict[str, Any]) -> None:
        mode = prepared.get_generation_mode(kwargs.get("assistant_model"))
        custom_loop = kwargs.get("custom_generate") is not None
        if custom_loop or mode not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE):
            known = "Retrieval and memories work in greedy decoding and sampling"
            raise ValueError(f"{known}, not in {mode.value}; set num_beams=1 and no assistant_model.")
        given_cache = kwargs.get("past_key_values") is not None
        known_cache = prepared.cache_implementation in (None, "dynamic", "static")
        if given_cache or not prepared.use_cache or not known_cache:
            raise ValueError(
                "Retrieval keeps its own KV cache, and so does a memory: leave out use_cache=False and "
                "past_key_values; cache_implementation may be 'static'."
            )
        if prepared.prefill_chunk_size is not None or prepared.cache_config is not None:
            raise ValueError(
                "prefill_chunk_size and cache_config are not available with a retriever or a memory: prompts are read "
                "whole, into the loop's own cache."
            )
        for name, neutral in (("encoder_repetition_penalty", 1.0), ("encoder_no_repeat_ngram_size", 0)):
            if getattr(prepared, name) not in (None, neutral):
                raise ValueError(f"{name} is for encoder-decoder models: Gen has no encoder input.")
        for name in ("output_scores", "output_logits", "output_attentions", "output_hidden_states"):
            if getattr(prepared, name):
                reason = "passages are not forwarded step by step"
                raise ValueError(f"{name}=True is not available with a retriever or a memory: {reason}.")

    def _check_inputs(self, prepared: GenerationConfig, kwargs: dict[str, Any]) -> None:
        if kwargs.get("inputs_embeds") is not None or prepared.guidance_scale not in (None, 1):
            raise ValueError(
                "inputs_embeds and guidance_scale are not available with a retriever or a memory: prompt and passages "
                "are read once, as token ids."
            )
        ids, mask = kwargs.get("input_ids"), kwargs.get("attention_mask")
        if ids is not None and mask is not None and getattr(mask, "shape", None) != ids.shape:
            found = tuple(mask.shape) if isinstance(mask, torch.Tensor) else f"a {type(mask).__name__}"
            raise ValueError(
                f"attention_mask is {found}, expected a tensor of the prompts' shape, {tuple(ids.shape)}."
            )
        given = {name for name, value in kwargs.items() if value is not None}
        forward_parameters = set(inspect.signature(self.forward).parameters)
        ignored = sorted((given & forward_parameters) - _HANDLED)
        if ignored:
            raise ValueError(
                f"{', '.join(ignored)}: not available with a retriever or a memory, since the decoding loop makes "
                "Gen's inputs."
            )

    def _check_gen(self) -> None:
        name = type(self.gen).__name__
        if self.training and any(getattr(module, "gradient_checkpointing", False) for module in self.gen.modules()):
            raise ValueError(
                "In training mode with gradient checkpointing there is no KV cache to generate with: "
                "call model.eval() first."
            )
        kinds = layer_kinds(self.config.get_text_config())
        if self.gen._is_stateful or not set(kinds) <= {"full_attention", "sliding_attention"}:
            raise ValueError(
                f"{name} has layers of the types {', '.join(kinds)}; a recurrent state or a chunked window cannot be "
                "kept through retrievals: use a model of full and sliding-window attention."
            )
        if not self.gen._supports_attention_backend and not getattr(self, "_follows_masks", False):
            try:
                with evaluating(self.gen):  # dropout would make any two forwards differ
                    self._follows_masks = self._forwards_ragged_rows()
            except (TypeError, ValueError, RuntimeError, IndexError, AttributeError) as error:
                problem = f"cannot read rows of different lengths from one cache ({error})"
                raise ValueError(f"{name} {problem}; use another architecture.") from error
            if not self._follows_masks:
                problem = "makes its own attention masks, which retrieval would need to change"
                raise ValueError(f"{name} {problem}; use another architecture.")

    @torch.no_grad()
    def _forwards_ragged_rows(self) -> bool:
        """
        Return whether Gen uses the mask and the positions that it is given: older architectures make their own masks.

        The test forwards two rows of 2 and 3 tokens with one cache, then one more token of each row. The hidden states
        of these tokens must be as if each row had been forwarded alone.
        """
        device = self.device
        base_model = self.gen.base_model
        vocab_step = self.config.get_text_config().vocab_size // 9
        ids = torch.arange(1, 9, device=device).reshape(2, 4) * vocab_step  # (2, 4)
        lengths = torch.tensor([[2], [3]], device=device)
        cache = RowCache(2, 5, device)
        for start, count in ((torch.zeros_like(lengths), lengths), (lengths, torch.ones_like(lengths))):
            offsets = torch.arange(int(count.max()), device=device)
            columns = start + offsets
            positions = start + torch.minimum(offsets, count - 1)
            tokens = ids.gather(1, positions)
            stored_positions = torch.where(offsets < count, positions, EMPTY)
            cache.begin(2, columns, tokens, stored_positions, int(columns.max()) + 1)
            visible = cache.visible(positions)
            mask = torch.zeros(visible.shape, dtype=self.gen.dtype, device=device)
            mask = mask.masked_fill(~visible, torch.finfo(mask.dtype).min)
            options = {"past_key_values": cache, "use_cache": True}
            hidden = base_model(tokens, attention_mask=mask, position_ids=positions, **options).last_hidden_state
        alone = []
        for row, length in zip(ids, lengths[:, 0].tolist(), strict=True):
            alone.append(base_model(row[None, : length + 1], use_cache=False).last_hidden_state[0, -1])
        return torch.allclose(hidden[:, 0].float(), torch.stack(alone).float(), atol=1e-2, rtol=1e-2)

    # ------------------------------------------------------------------ prompts

    def _check_synced(self, synced_gpus: bool) -> None:
        if synced_gpus and self.config.query_from != "gen":
            raise ValueError(
                f"query_from={self.config.query_from!r} is not available with synced_gpus: only Gen's forwards are "
                "kept in step."
            )

    def _check_prompts(self, prompts: list[list[int]], streamer: BaseStreamer | None = None) -> None:
        if streamer is not None and len(prompts) > 1:
            raise ValueError(
                f"A streamer takes one row, found {len(prompts)}: their texts would be mixed. Stream one prompt, or "
                "use generate_many."
            )
        text_config = self.config.get_text_config()
        limit = context_length(text_config)
        for number, prompt in enumerate(prompts):
            if not 0 <= min(prompt) <= max(prompt) < text_config.vocab_size:
                raise ValueError(
                    f"Prompt {number} holds the token ids {min(prompt)} to {max(prompt)}, but Gen knows 0 to"
                    f" {text_config.vocab_size - 1}: was it encoded with another tokenizer?"
                )
            if len(prompt) >= limit:
                raise ValueError(
                    f"Prompt {number} has {len(prompt):,} tokens, but Gen reads {limit:,}: there is no room to write."
                )


def check_configs(
    generation_config: object, retrieval_config: object, memory_config: object, arguments: Iterable[str] = ()
) -> None:
    """
    Check the configs of a call.

    Raises:
        `TypeError`: for a config of the wrong kind, and for a field of [`RetrievalConfig`] among the names of the
            other arguments. Kinds are compared by name: a model that runs its checkpoint's code also takes the
            installed package's configs.
    """
    given = {"GenerationConfig": generation_config, "RetrievalConfig": retrieval_config, "MemoryConfig": memory_config}
    for name, config in given.items():
        if config is not None and name not in [base.__name__ for base in type(config).__mro__]:
            argument = name.replace("Config", "_config").lower()
            raise TypeError(f"{argument} is a {type(config).__name__}, expected a {name}.")
    for name in arguments:
        if name in RetrievalConfig.__dataclass_fields__ and name != "top_k":  # which is a setting of sampling, too
            raise TypeError(
                f"{name} is a field of RetrievalConfig: pass retrieval_config=RetrievalConfig({name}=...)."
            )


def check_token_ids(ids: object) -> None:
    """
    Check the type of the prompts of generate().

    Raises:
        `TypeError`: unless they are integers in a tensor.
        `ValueError`: unless the tensor has two dimensions.
    """
    expected = "expected token ids in a torch.LongTensor of shape (B, T), e.g. tokenizer(texts, return_tensors='pt')"
    if not isinstance(ids, torch.Tensor):
        raise TypeError(f"The prompts are a {type(ids).__name__}, {expected}.")
    if ids.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"The prompts are {ids.dtype}, {expected}.")
    if ids.ndim != 2:
        raise ValueError(f"The prompts have the shape {tuple(ids.shape)}, {expected}.")


def listed_prompts(prompts: Any) -> list[list[int]]:
    """
    Return the prompts of generate_many() as lists of token ids.

    Args:
        prompts (iterable of `list[int]`, or mapping): the token ids of each prompt, as a list, a tensor or an array;
            or what a tokenizer returns for a list of texts, whose padding is left out.

    Raises:
        `TypeError`: for texts, and for everything else that is not token ids.
        `ValueError`: for an empty prompt.
    """
    mask = None
    if isinstance(prompts, Mapping):
        mask = prompts.get("attention_mask")
        prompts = prompts["input_ids"]
    if isinstance(prompts, str) or not isinstance(prompts, Iterable):
        prompts = [prompts]
    lists = []
    for number, prompt in enumerate(prompts):
        if isinstance(prompt, str):
            raise TypeError(
                f"Prompt {number} is the text {prompt[:40]!r}, expected token ids:"
                " encode_prompt(model.tokenizer, text) of tokenization_cosup makes them."
            )
        try:
            ids = [index(id) for id in prompt]
        except TypeError:
            raise TypeError(f"Prompt {number} is {str(prompt)[:40]}, expected a list of token ids.") from None
        if mask is not None:
            ids = [id for id, is_token in zip(ids, mask[number], strict=True) if is_token]
        if not ids:
            raise ValueError(f"Prompt {number} is empty, expected at least one token id.")
        lists.append(ids)
    return lists


def unpadded(input_ids: torch.Tensor, attention_mask: torch.Tensor | None) -> list[list[int]]:
    """
    Return the token ids of each row without padding.

    Args:
        input_ids (`torch.LongTensor` of shape `(B, T)`), attention_mask (`torch.LongTensor` of shape `(B, T)`,
            *optional*): the prompts, padded on either side.

    Raises:
        `ValueError`: for a row without tokens, or with padding between them, and if there is no row.
    """
    if not input_ids.numel():
        raise ValueError(f"The prompts have the shape {tuple(input_ids.shape)}: there is no token to start from.")
    if attention_mask is None:
        return input_ids.tolist()
    mask = attention_mask.bool()
    empty = ~mask.any(1)
    if empty.any():
        raise ValueError(f"Row {int(empty.int().argmax())} of input_ids holds no token.")
    starts = (mask[:, 1:] & ~mask[:, :-1]).sum(1) + mask[:, 0].int()  # of runs of tokens; (B,)
    holes = starts > 1
    if holes.any():
        row = int(holes.int().argmax())
        raise ValueError(f"Row {row} of input_ids has padding between its tokens; expected it on one side.")
    return [ids[kept].tolist() for ids, kept in zip(input_ids, mask, strict=True)]


def raise_together(error: Exception | None, synced_gpus: bool, device: torch.device) -> None:
    """Raise `error`, if any; with `synced_gpus` raise on all ranks, or the others would wait for this one forever."""
    failed = torch.tensor(int(error is not None), device=device)
    if synced_gpus:
        torch.distributed.all_reduce(failed, op=torch.distributed.ReduceOp.MAX)
    if error is not None:
        raise error
    if synced_gpus and failed.item():
        raise ValueError("generate() did not begin, because another rank failed; the error there says why.")
