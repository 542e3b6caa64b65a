"""The model of a server, with its index and memory: what computes the answers, in the decoding thread."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from modeling_cosup import CoSupConfig, CoSupForCausalLM, Memory, MemoryConfig, Retriever
from modeling_cosup.cache_cosup import context_length
from modeling_cosup.call_cosup import token_ids
from modeling_cosup.decoding_cosup import Decoder
from modeling_cosup.packing_cosup import pad_rows
from modeling_cosup.scores_cosup import depends_on_scores_only
from modeling_cosup.settings_cosup import DecisionSettings, DecodingSettings, RowSettings
from modeling_cosup.tokenization_cosup import encode_passages_for_emb_seq, encode_queries_for_emb_seq
from modeling_cosup.trace_cosup import Row

from serving.base_engine import check_least
from serving.checks import check_request
from serving.engine import Embeddings, GenerationRequest
from serving.prepared_lookup import PreparedLookup

_MOST_DECISIONS = 256  # kept for later requests


@dataclass(frozen=True)
class ModelFacts:
    """What the event loop needs to know of a model that may be in another process."""

    config: CoSupConfig
    tokenizer: PreTrainedTokenizerBase
    context_length: int
    has_index: bool
    embeds_passages: bool  # Emb_seq is in memory
    max_running: int


class ServedModel:
    """
    Turns requests into rows of a decoding loop, and texts into embeddings.

    Args:
        model ([`CoSupForCausalLM`]): on its device. Nothing else may use it while it serves.
        index ([`Retriever`], *optional*): without it `[NSP]` is a token like any other.
        memory ([`Memory`], *optional*), memory_config ([`MemoryConfig`], *optional*): mixed in for all requests.
        max_running (`int`): the most requests that are decoded at a time.
        max_batch_tokens (`int`, *optional*): limit the requests that are decoded at a time so that their KV caches
            have no more columns than this together. A request starts with room for its prompt, `max_new_tokens`, and
            `max_retrievals` (one, if there is no limit) passages of full length; all take as much as the longest. If
            requests retrieve more often, the latest ones wait, and go on unchanged. If it is less than Gen's context,
            it is the context of this engine.
    """

    def __init__(
        self,
        model: CoSupForCausalLM,
        index: Retriever | None = None,
        memory: Memory | None = None,
        memory_config: MemoryConfig | None = None,
        max_running: int = 32,
        max_batch_tokens: int | None = None,
    ) -> None:
        check_least("max_running", max_running, 1)
        check_least("max_batch_tokens", max_batch_tokens, 1)
        self.model = model.eval()
        self.index = index
        self.memory = memory
        self.memory_config = memory_config
        self.max_running = max_running
        self.max_batch_tokens = max_batch_tokens
        self.config = model.config
        # a copy: a tokenizer serves one thread at a time, and the decoding thread uses the model's
        self.tokenizer = copy.deepcopy(model.tokenizer)
        self.has_index = index is not None
        self.context_length = context_length(model.config.get_text_config())
        if max_batch_tokens is not None:
            self.context_length = min(self.context_length, max_batch_tokens)  # an answer alone has room
        self.lookup = PreparedLookup(self, index)
        self._decisions: dict[tuple[float, float], DecisionSettings] = {}

    @property
    def facts(self) -> ModelFacts:
        """What others need to know."""
        return ModelFacts(
            config=self.config,
            tokenizer=self.tokenizer,
            context_length=self.context_length,
            has_index=self.has_index,
            embeds_passages=self.model.emb_seq is not None,
            max_running=self.max_running,
        )

    def make_decoder(self) -> Decoder:
        """
        Return a decoding loop with fresh state.

        Raises:
            `ValueError`: for an index or a memory of another model, and for a Gen that cannot retrieve.
        """
        return Decoder(self.model, self._decoding_settings(), self.index, self.memory)

    def _decoding_settings(self) -> DecodingSettings:
        """Return the settings of the loop: those of generate(), for rows of any settings that come and go."""
        parts = {"retriever": self.index, "memory": self.memory, "memory_config": self.memory_config}
        # rows come and go, whatever cache the checkpoint's generation config names
        parts["cache_implementation"] = None
        settings, _ = self.model.prepare_decoding(1, do_sample=False, max_new_tokens=1, **parts)
        nsp, ce = self.config.nsp_token_id, self.config.ce_token_id
        return replace(
            settings,
            retrieves=nsp is not None,
            num_slots=self.max_running,
            num_columns=1,
            special=token_ids({nsp, ce, *settings.ends}, settings.device),
            refill=True,
            serves=True,
            max_batch_tokens=self.max_batch_tokens,
            context_length=self.context_length,
        )

    # ------------------------------------------------------------------ rows

    def row(self, request: GenerationRequest) -> Row:
        """Check a request, and return it as a row of the decoding loop."""
        check_request(request, self.config, self.context_length, self.has_index)
        retrieval = request.retrieval
        has_passages = self.has_index or retrieval.passages is not None
        settings = RowSettings(
            decision=self._decision(request),
            budget=request.max_new_tokens,
            retrieval=retrieval,
            retrieves=has_passages and not retrieval.forbid_nsp,
            num_logprobs=request.num_logprobs,
        )
        row = Row(0, list(request.prompt_ids), settings)
        self.lookup.prepare_row(row)
        if request.seed is not None and request.temperature > 0:
            row.generator = torch.Generator(self.model._input_device())
            row.generator.manual_seed(request.seed)
        return row

    def _decision(self, request: GenerationRequest) -> DecisionSettings:
        """Return how tokens are decided, as generate() would; requests that are decided alike share the object."""
        key = (request.temperature, request.top_p)
        if key in self._decisions:
            return self._decisions[key]
        sampling: dict[str, Any] = {"do_sample": False}
        if request.temperature > 0:
            # top_k and what else no request can set are those of the checkpoint, as in generate()
            sampling = {"do_sample": True, "temperature": request.temperature, "top_p": request.top_p}
        length = len(request.prompt_ids)
        _, settings = self.model.prepare_decoding(length, max_new_tokens=request.max_new_tokens, **sampling)
        decision = settings.decision
        if depends_on_scores_only(decision):
            if len(self._decisions) >= _MOST_DECISIONS:
                self._decisions.pop(next(iter(self._decisions)))
            self._decisions[key] = decision
        return decision

    # ------------------------------------------------------------------ embeddings

    @torch.no_grad()
    def embed_passages(self, passages: Sequence[dict[str, Any]]) -> Embeddings:
        """Return the embeddings of passages, as in the index."""
        rows = encode_passages_for_emb_seq(self.model.emb_seq_tokenizer, passages, self.config)
        return _embeddings(self.model.encode_passages(*pad_rows(rows, device=self.model._input_device())), rows)

    def embed_queries(self, prompts: Sequence[list[int]]) -> Embeddings:
        """Return the query embeddings of token ids that end in `[NSP]`."""
        rows = prompts
        if self.config.query_from != "gen":
            tokenizers = (self.model.tokenizer, self.model.emb_seq_tokenizer)
            rows, _ = encode_queries_for_emb_seq(*tokenizers, prompts, self.config)  # what its encoder will read
        return _embeddings(self.model.embed_prompts(prompts), rows)


def _embeddings(embeds: torch.Tensor, rows: Sequence[list[int]]) -> Embeddings:
    """Return embeddings `(N, h)` and the number of tokens of the rows that were read."""
    return Embeddings(embeds.float().cpu().numpy(), sum(map(len, rows)))
