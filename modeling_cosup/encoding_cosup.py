"""Passage and query embeddings, from Emb_seq, the query encoder or Gen's hidden states."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.nn.functional as F
from torch import nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from .configuration_cosup import CoSupConfig
from .packing_cosup import Packing, pad_rows
from .tokenization_cosup import encode_prompt, encode_queries_for_emb_seq, query_length

if TYPE_CHECKING:
    Base = PreTrainedModel
else:
    Base = object  # CoSupForCausalLM itself inherits from PreTrainedModel

logger = logging.get_logger(__name__)


class EncodingMixin(Base):
    """`encode_passages()` and `encode_queries()` of [`CoSupForCausalLM`]."""

    config: CoSupConfig
    emb_seq: PreTrainedModel | None
    emb_head: nn.Linear | None
    query_encoder: PreTrainedModel | None
    tokenizer: PreTrainedTokenizerBase
    emb_seq_tokenizer: PreTrainedTokenizerBase
    _forget_fingerprint: Callable[..., None]
    _causal_encoders: list[str]  # attribute names, see find_causal_encoders
    _warned_of_long_queries: bool

    def encode_passages(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, packing: Packing | None = None
    ) -> torch.Tensor:
        """
        Return passage embeddings: Emb_seq's hidden state at EOS (section 3.2), or its mean or first state.

        A passage's embedding depends on nothing but the passage: not on the padding, its side, or the other rows.

        Args:
            input_ids (`torch.LongTensor` of shape `(M, L)`): BOS + passage + EOS; M may be 0.
            attention_mask (`torch.LongTensor` of shape `(M, L)`, *optional*): defaults to no padding.
            packing ([`~packing_cosup.Packing`], *optional*): the passages are packed in one row `(1, L)`. Needs a
                causal Emb_seq, and an attention implementation that keeps them apart.

        Returns:
            `torch.FloatTensor` of shape `(M, h)`, of unit length when the similarity is the cosine.

        Raises:
            `TypeError`: for texts.
            `ValueError`: when Emb_seq is not loaded.
        """
        if not isinstance(input_ids, torch.Tensor):
            raise TypeError(
                f"encode_passages got a {type(input_ids).__name__}, expected a tensor of token ids. To embed passages"
                " as they are, call build_index()."
            )
        if self.emb_seq is None:
            raise ValueError(
                "Emb_seq is not in memory (load_emb_seq=False): this model generates from an index that is already"
                " built, but it cannot encode passages."
            )
        self._forget_trained_emb_seq()
        return self._encode(self.emb_seq, input_ids, attention_mask, packing)

    def _forget_trained_emb_seq(self) -> None:
        """Drop the stored hash of Emb_seq if it may be in training: the hash no longer describes it."""
        if self.emb_seq is None or not torch.is_grad_enabled():
            return
        if any(parameter.requires_grad for parameter in self.emb_seq.parameters()):
            self._forget_fingerprint("emb_seq")

    def encode_queries(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """
        Return query embeddings from Emb_seq or the query encoder (section 5, "Baseline"; appendix C.1).

        The encoder reads what [`~tokenization_cosup.encode_queries_for_emb_seq`] makes of the rows: a query that is
        too long keeps its end. A warning, once for this model, counts such queries.

        Args:
            input_ids (`torch.LongTensor` of shape `(N, T)`): in Gen's token ids; each row is everything up to `[NSP]`.
            attention_mask (`torch.LongTensor` of shape `(N, T)`): 0 for padding and after `[NSP]`.

        Returns:
            `torch.FloatTensor` of shape `(N, h)`.

        Raises:
            `ValueError`: when the encoder is not loaded.
        """
        encoder = self._query_encoder()
        if len(input_ids):
            rows = [ids[mask.bool()].tolist() for ids, mask in zip(input_ids, attention_mask, strict=True)]
            rows, num_cut = encode_queries_for_emb_seq(self.tokenizer, self.emb_seq_tokenizer, rows, self.config)
            if num_cut and not self._warned_of_long_queries:
                self._warned_of_long_queries = True
                limit = query_length(self.emb_seq_tokenizer, self.config)
                logger.warning(
                    f"{num_cut} of {len(rows)} queries are longer than the {limit} tokens that their encoder reads:"
                    " the beginning is left out, here and in later calls."
                )
            input_ids, attention_mask = pad_rows(rows, device=input_ids.device)
        return self._encode(encoder, input_ids, attention_mask)

    @torch.no_grad()
    def embed_questions(
        self, questions: Sequence[str], instruction: str = "", batch_size: int = 32, show_progress_bar: bool = False
    ) -> torch.Tensor:
        """
        Return what each question is searched with: the query embedding at an `[NSP]` right after its prompt.

        `index.search(model.embed_questions(["who ...?"]), k=5)` finds what `generate()` retrieves with
        `force_nsp_first`.

        Args:
            questions (`list[str]`): rendered as prompts, see [`~tokenization_cosup.encode_prompt`].
            instruction (`str`): of all questions.
            batch_size (`int`): questions per forward.
            show_progress_bar (`bool`): whether to show a tqdm bar.

        Returns:
            `torch.FloatTensor` of shape `(N, h)`, on the CPU.

        Raises:
            `TypeError`: for a single text.
        """
        if isinstance(questions, str):
            raise TypeError("embed_questions got a single text, expected a list of them.")
        nsp_token_id = cast(int, self.config.nsp_token_id)
        prompts = [[*encode_prompt(self.tokenizer, text, instruction), nsp_token_id] for text in questions]
        return self.embed_prompts(prompts, batch_size, show_progress_bar)

    @torch.no_grad()
    def embed_prompts(
        self, prompts: Sequence[Sequence[int]], batch_size: int = 32, show_progress_bar: bool = False
    ) -> torch.Tensor:
        """
        Return the query embeddings of rows that end in `[NSP]`. Rows of similar length share a batch.

        Args:
            prompts (`list[list[int]]`): Gen's token ids.
            batch_size (`int`), show_progress_bar (`bool`): as in [`~CoSupForCausalLM.embed_questions`].

        Returns:
            `torch.FloatTensor` of shape `(N, h)`, on the CPU.
        """
        order = sorted(range(len(prompts)), key=lambda row: -len(prompts[row]))
        embeds = torch.empty(len(prompts), self.config.embedding_size)
        bar = tqdm(total=len(prompts), desc="Embedding questions", unit="question", disable=not show_progress_bar)
        with bar, evaluating(self):
            for start in range(0, len(order), batch_size):
                rows = order[start : start + batch_size]
                ids, mask = pad_rows([prompts[row] for row in rows], device=self._input_device())  # (B, T) each
                if self.config.query_from == "gen":
                    ends = mask.sum(1) - 1 + torch.arange(len(ids), device=ids.device) * ids.shape[1]  # in (B · T)
                    output = self(ids, mask, nsp_positions=ends, return_logits=False, use_cache=False)
                    batch_embeds = output.query_embeds
                else:
                    batch_embeds = self.encode_queries(ids, mask)  # an encoder reads the query; Gen need not run
                embeds[rows] = batch_embeds.float().cpu()
                bar.update(len(rows))
        return embeds

    def _input_device(self) -> torch.device:
        """Device for inputs: the CPU if the first weights are offloaded, because accelerate moves inputs to them."""
        return torch.device("cpu") if self.device.type == "meta" else self.device

    @torch.no_grad()
    def find_causal_encoders(self) -> bool:
        """
        Find out which of Emb_seq and the query encoder are causal; these then read padded batches without a mask.

        Returns:
            `bool`: whether all that are loaded are causal.
        """
        names = [name for name in ("emb_seq", "query_encoder") if getattr(self, name) is not None]
        with evaluating(self):
            self._causal_encoders = [name for name in names if _is_causal(getattr(self, name))]
        return self._causal_encoders == names

    def _query_encoder(self) -> PreTrainedModel:
        """Return the encoder that `query_from` names: the query encoder, or Emb_seq."""
        encoder = self.query_encoder if self.config.query_from == "query_encoder" else self.emb_seq
        if encoder is None:
            raise ValueError(
                "Queries come from Emb_seq (query_from='emb_seq'), which is not in memory: load the model without"
                " load_emb_seq=False."
            )
        return encoder

    def _query_embeds_at_nsp(
        self,
        hidden: torch.Tensor,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None,
        nsp_positions: torch.Tensor | None,
        nsp_token_id: int,
    ) -> torch.Tensor:
        """Return the query embeddings `(N, h)` at the `[NSP]` of `input_ids` `(B, T)`, from Gen or another encoder."""
        if nsp_positions is None:
            nsp_positions = (input_ids == nsp_token_id).flatten().nonzero()[:, 0]  # (N,)
        if self.config.query_from == "gen":
            embeds = hidden.flatten(0, 1)[nsp_positions.to(hidden.device)]
            if self.config.tie_emb_seq and self.emb_head is not None:
                embeds = self.emb_head(embeds)
            return self._normalize(embeds)
        length = input_ids.shape[1]
        rows, columns = nsp_positions // length, nsp_positions % length
        ids = input_ids[rows]  # (N, T)
        mask = torch.ones_like(ids) if attention_mask is None else attention_mask[rows, -length:]
        up_to_nsp = torch.arange(length, device=ids.device) <= columns[:, None]  # [NSP] included
        return self.encode_queries(ids, mask * up_to_nsp)

    def _encode(
        self,
        encoder: PreTrainedModel,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None,
        packing: Packing | None = None,
    ) -> torch.Tensor:
        """Return the embeddings `(M, h)` of ids `(M, L)`, or of M packed rows `(1, L)`, in the space of the index."""
        if input_ids.shape[0] == 0:
            # encode and drop one dummy row: a rank without passages takes part in every collective and gradient
            dummy = input_ids.new_zeros(1, 1)
            return self._encode(encoder, dummy, torch.ones_like(dummy))[:0]
        if packing is None:
            embeds = self._pooled_states(encoder, input_ids, attention_mask)
        elif self.config.emb_seq_pooling in ("eos", "lasttoken"):
            options = _without_cache(encoder)
            hidden = encoder(input_ids=input_ids, position_ids=packing.position_ids, **options).last_hidden_state
            embeds = hidden[0, packing.ends.to(hidden.device)]  # (1, L, h_emb) -> (M, h_emb)
        else:
            raise ValueError(
                f"Packed passages are read at their end, but emb_seq_pooling is {self.config.emb_seq_pooling!r}."
            )
        if self.emb_head is not None:
            embeds = self.emb_head(embeds)
        return self._normalize(embeds)

    def _pooled_states(
        self, encoder: PreTrainedModel, input_ids: torch.Tensor, attention_mask: torch.Tensor | None
    ) -> torch.Tensor:
        """Return one state of `encoder` for each row, `(M, h_emb)`, pooled as `emb_seq_pooling` says."""
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        # move the padding to the right: the default positions are then correct in every architecture
        order = attention_mask.argsort(dim=1, descending=True, stable=True)
        input_ids, attention_mask = input_ids.gather(1, order), attention_mask.gather(1, order)
        options = _without_cache(encoder)
        causal = any(getattr(self, name) is encoder for name in self._causal_encoders)
        if not causal:  # a causal encoder never sees the padding: without a mask the attention kernels are faster
            options["attention_mask"] = attention_mask
        hidden = encoder(input_ids=input_ids, **options).last_hidden_state  # (M, L, h_emb)
        attention_mask = attention_mask.to(hidden.device)
        if self.config.emb_seq_pooling == "mean":
            weights = attention_mask[:, :, None].float()
            return ((hidden.float() * weights).sum(1) / weights.sum(1).clamp(min=1)).to(hidden.dtype)
        columns = attention_mask.sum(1) - 1  # (M,), of the last token
        if self.config.emb_seq_pooling == "cls":
            columns = torch.zeros_like(columns)
        return hidden[torch.arange(len(hidden), device=hidden.device), columns]

    def _normalize(self, embeds: torch.Tensor) -> torch.Tensor:
        """Return embeddings in float32, cut to `truncate_dim`, of unit length when the similarity is the cosine."""
        embeds = embeds[..., : self.config.truncate_dim]
        if self.config.similarity == "cosine":
            return F.normalize(embeds.float(), dim=-1)
        return embeds.float()


def _without_cache(encoder: PreTrainedModel) -> dict[str, Any]:
    """Return the options of a forward that builds no KV cache; not every encoder takes `use_cache`."""
    if "use_cache" in encoder.config.to_dict():
        return {"use_cache": False}
    return {}


def _is_causal(encoder: PreTrainedModel) -> bool:
    """Return whether states do not depend on later tokens; call this in evaluation mode."""
    alone, followed = states_alone_and_followed(encoder)
    return torch.allclose(alone, followed, atol=1e-3, rtol=1e-2)


def states_alone_and_followed(encoder: PreTrainedModel) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the states `(1, 3, h)` of three tokens, in float32: read alone, and with five more after them."""
    vocab_size = cast(nn.Embedding, encoder.get_input_embeddings()).weight.shape[0]
    # the tokens differ from each other: equal ones would hardly change the states
    long = torch.arange(1, 9, device=encoder.device)[None] * (vocab_size // 9)  # (1, 8)
    options = _without_cache(encoder)
    attention = encoder.config._attn_implementation
    encoder.config._attn_implementation = "eager"  # flash kernels need half precision and a GPU
    try:
        alone = encoder(input_ids=long[:, :3], **options).last_hidden_state
        followed = encoder(input_ids=long, **options).last_hidden_state[:, :3]
    finally:
        encoder.config._attn_implementation = attention
    return alone.float(), followed.float()


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put a model in evaluation mode for the block, then restore its mode."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)
