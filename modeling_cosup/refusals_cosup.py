"""What generate() refuses with a retriever or a memory, before anything is computed."""

import inspect

import torch
from transformers.generation.configuration_utils import GenerationMode

from .cache_cosup import EMPTY, RowCache, layer_kinds

# what forward takes and the loop honours, or refuses with another message
_HEEDED = {"input_ids", "attention_mask", "past_key_values", "use_cache", "inputs_embeds", "kwargs"}


class RefusalsMixin:
    """The checks of [`RetrievalGenerationMixin`]."""

    def _check_retrieval_arguments(self, generation_config, kwargs):
        """Return the call's `GenerationConfig` after checking it, the kwargs and Gen."""
        prepared, _ = self._prepare_generation_config(generation_config, **kwargs)
        self._check_mode(prepared, kwargs)
        self._check_inputs(prepared, kwargs)
        self._check_gen()
        return prepared

    def _check_mode(self, prepared, kwargs):
        mode = prepared.get_generation_mode(kwargs.get("assistant_model"))
        own_loop = kwargs.get("custom_generate") is not None
        if own_loop or mode not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE):
            known = "Retrieval and memories work in greedy decoding and sampling"
            raise ValueError(f"{known}, not in {mode.value}; set num_beams=1 and no assistant_model.")
        own_cache = kwargs.get("past_key_values") is not None
        if own_cache or not prepared.use_cache or prepared.cache_implementation not in (None, "dynamic", "static"):
            raise ValueError(
                "Retrieval keeps its own KV cache, and so does a memory: leave out use_cache=False and "
                "past_key_values; cache_implementation may be 'static'."
            )
        if prepared.prefill_chunk_size is not None or prepared.cache_config is not None:
            raise ValueError(
                "prefill_chunk_size and cache_config are not available with a retriever or a memory: prompts are read "
                "whole, into a cache of its own."
            )
        for name in ("output_scores", "output_logits", "output_attentions", "output_hidden_states"):
            if getattr(prepared, name):
                reason = "rows that read passages have no step for it"
                raise ValueError(f"{name}=True is not available with a retriever or a memory: {reason}.")

    def _check_inputs(self, prepared, kwargs):
        if kwargs.get("inputs_embeds") is not None or prepared.guidance_scale not in (None, 1):
            raise ValueError(
                "inputs_embeds and guidance_scale are not available with a retriever or a memory: prompt and passages "
                "are read once, as token ids."
            )
        given = {name for name, value in kwargs.items() if value is not None}
        unheeded = given & set(inspect.signature(self.forward).parameters) - _HEEDED
        if unheeded:
            names = ", ".join(sorted(unheeded))
            raise ValueError(
                f"{names}: not available with a retriever or a memory, as what Gen reads is made row by row."
            )

    def _check_gen(self):
        name = type(self.gen).__name__
        if self.training and any(getattr(module, "gradient_checkpointing", False) for module in self.gen.modules()):
            raise ValueError(
                "In training mode with gradient checkpointing there is no KV cache to generate with: "
                "call model.eval() first."
            )
        kinds = layer_kinds(self.config.get_text_config())
        if self.gen._is_stateful or not set(kinds) <= {"full_attention", "sliding_attention"}:
            raise ValueError(
                f"{name} has layers of the types {', '.join(kinds)}; a recurrent state or a chunked window cannot be kept "
                "through retrievals: use a model of full and sliding-window attention."
            )
        if not self.gen._supports_attention_backend and not getattr(self, "_follows_masks", False):
            try:
                self._follows_masks = self._reads_ragged_rows()
            except (TypeError, ValueError, RuntimeError, IndexError, AttributeError) as error:
                problem = f"cannot read rows of different lengths from one cache ({error})"
                raise ValueError(f"{name} {problem}; use another architecture.") from error
            if not self._follows_masks:
                problem = "makes attention masks of its own, which retrieval would need to change"
                raise ValueError(f"{name} {problem}; use another architecture.")

    @torch.no_grad()
    def _reads_ragged_rows(self):
        """
        Whether Gen follows the mask and the positions that it is given, seen in a small pass: older architectures make
        their attention masks themselves.
        """
        config, device = self.config.get_text_config(), self.device
        run = self.gen.base_model
        ids = torch.arange(1, 9, device=device).reshape(2, 4) * (config.vocab_size // 9)
        lengths = torch.tensor([[2], [3]], device=device)
        ends = torch.arange(2, device=device)
        cache = RowCache(2, 5, device)
        for start, count in ((torch.zeros_like(lengths), lengths), (lengths, torch.ones_like(lengths))):
            offsets = torch.arange(int(count.max()), device=device)
            columns = start + offsets
            positions = start + torch.minimum(offsets, count - 1)
            tokens = ids.gather(1, positions)
            stored = torch.where(offsets < count, positions, EMPTY)
            cache.begin(2, columns, tokens, stored, int(columns.max()) + 1)
            visible = cache.visible(positions)
            mask = torch.zeros(visible.shape, dtype=self.gen.dtype, device=device)
            mask = mask.masked_fill(~visible, torch.finfo(mask.dtype).min)
            options = {"past_key_values": cache, "use_cache": True}
            hidden = run(tokens, attention_mask=mask, position_ids=positions, **options).last_hidden_state
        alone = []
        for row, length in zip(ids, lengths[:, 0].tolist(), strict=True):
            alone.append(run(row[None, : length + 1], use_cache=False).last_hidden_state[0, -1])
        return torch.allclose(hidden[ends, 0].float(), torch.stack(alone).float(), atol=1e-2, rtol=1e-2)
