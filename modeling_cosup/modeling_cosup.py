"""Gen and Emb_seq in one model: two losses in one forward, two spaces in one generation loop."""

import os
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import ModelOutput

from .building_cosup import BuildingMixin
from .configuration_cosup import CoSupConfig
from .generation_cosup import RetrievalGenerationMixin
from .loss_cosup import chunked_cross_entropy, info_nce
from .opening_cosup import open_by_uri
from .parts_cosup import PartsMixin
from .retrieval_cosup import PassageIndex
from .retriever_cosup import Retriever
from .settings_cosup import RetrievalConfig
from .sharing_cosup import SharingMixin
from .states_cosup import decided_states, recording
from .tokenization_cosup import encode_queries_for_emb_seq, pad_rows


@dataclass
class CoSupOutput(ModelOutput):
    """
    Output of [`CoSupForCausalLM`]. A field that was not asked for is `None`.

    Args:
        loss (`torch.FloatTensor` of shape `()`): `ntp_loss + nsp_loss_weight * nsp_loss`.
        ntp_loss (`torch.FloatTensor` of shape `()`): next token prediction.
        nsp_loss (`torch.FloatTensor` of shape `()`): next sequence prediction over the passages of this call.
        logits (`torch.Tensor` of shape `(B, T, V)`): not computed with `labels` unless `return_logits=True`.
        query_embeds (`torch.FloatTensor` of shape `(N, h)`): one per `[NSP]` of `input_ids`, row by row, left to right.
        passage_embeds (`torch.FloatTensor` of shape `(M, h)`): one per row of `passage_input_ids`.
        past_key_values (`Cache`), hidden_states, attentions: Gen's.
        states (`dict[str, torch.Tensor]`): what entered the submodules of `output_states`, each `(R, h)`.
    """

    loss: torch.FloatTensor | None = None
    ntp_loss: torch.FloatTensor | None = None
    nsp_loss: torch.FloatTensor | None = None
    logits: torch.FloatTensor | None = None
    query_embeds: torch.FloatTensor | None = None
    passage_embeds: torch.FloatTensor | None = None
    past_key_values: object | None = None
    hidden_states: tuple | None = None
    attentions: tuple | None = None
    states: dict[str, torch.Tensor] | None = None


class CoSupForCausalLM(  # type: ignore[misc]  # its generate() takes more
    BuildingMixin, RetrievalGenerationMixin, SharingMixin, PartsMixin, PreTrainedModel, GenerationMixin
):
    """
    Semiparametric language model: Gen's LM head predicts the next token, its hidden state at `[NSP]` the next passage.

    Build one from two pretrained models with [`~CoSupForCausalLM.from_gen_and_emb_seq`], load one with `from_pretrained`.

    Args:
        config (`CoSupConfig`): the two sub-configurations and how they meet.
        gen, emb_seq, query_encoder (`PreTrainedModel`, *optional*): ready models to take instead of new ones.
    """

    config_class = CoSupConfig
    retrieval_config_class = RetrievalConfig  # for those who loaded this code with a checkpoint
    base_model_prefix = "gen"
    accepts_loss_kwargs = True  # num_items_in_batch
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    def __init__(self, config, gen=None, emb_seq=None, query_encoder=None):
        temperature, config.temperature = (
            config.temperature,
            None,
        )  # the NSP loss's: transformers would read it as a sampling temperature
        super().__init__(config)
        config.temperature = temperature
        self.gen = gen if gen is not None else AutoModelForCausalLM.from_config(config.gen_config)
        self.emb_seq = self.emb_head = self.query_encoder = None
        self._keys_to_ignore_on_load_unexpected = []
        if config.load_emb_seq:
            self.emb_seq = emb_seq if emb_seq is not None else AutoModel.from_config(config.emb_seq_config)
        else:
            self._keys_to_ignore_on_load_unexpected += [r"^emb_seq\."]
        if config.needs_emb_head and (
            config.load_emb_seq or config.query_from == "query_encoder"
        ):  # queries pass through it too
            self.emb_head = nn.Linear(
                config.emb_seq_config.get_text_config().hidden_size, config.embedding_size, bias=False
            )
        else:
            self._keys_to_ignore_on_load_unexpected += [r"^emb_head\."]
        if config.query_from == "query_encoder":
            self.query_encoder = (
                query_encoder if query_encoder is not None else AutoModel.from_config(config.query_encoder_config)
            )
        for encoder in (self.emb_seq, self.query_encoder):
            if getattr(encoder, "pooler", None) is not None:
                encoder.pooler = None  # BERT's is no part of an embedding: without a gradient it would stop DDP
        # peft ties and trains token rows only where the outermost model says what is tied
        self._tied_weights_keys = {
            f"gen.{target}": f"gen.{source}" for target, source in (self.gen._tied_weights_keys or {}).items()
        }
        self._tokenizer = self._emb_seq_tokenizer = None
        self._causal_encoders = []  # names, as find_causal_encoders found them
        self.post_init()

    # ------------------------------------------------------------------ forward

    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        past_key_values=None,
        inputs_embeds=None,
        labels=None,
        use_cache=None,
        logits_to_keep=0,
        passage_input_ids=None,
        passage_attention_mask=None,
        passage_labels=None,
        num_items_in_batch=None,
        compute_nsp_loss=True,
        return_logits=None,
        output_query_embeds=True,
        nsp_positions=None,
        label_positions=None,
        logit_positions=None,
        output_states=None,
        passage_packing=None,
        query_input_ids=None,
        query_attention_mask=None,
        query_packing=None,
        **kwargs,
    ):
        """
        One pass over Gen and, with passages, over Emb_seq: L = L_NTP + λ·L_NSP (Eq. 5).

        Args:
            input_ids (`torch.LongTensor` of shape `(B, T)`, *optional*): without it only passages and given queries are encoded.
            attention_mask (`torch.LongTensor` of shape `(B, T)`, *optional*), position_ids, past_key_values, inputs_embeds, use_cache: as in Gen.
            labels (`torch.LongTensor` of shape `(B, T)`, *optional*): -100 where nothing is trained; shifted inside.
            logits_to_keep (`int` or `torch.LongTensor`): the last n columns, or these columns; 0 for all.
            passage_input_ids (`torch.LongTensor` of shape `(M, L)`, *optional*): BOS + passage + EOS; M may be 0.
            passage_attention_mask (`torch.LongTensor` of shape `(M, L)`, *optional*): padding on either side.
            passage_labels (`torch.LongTensor` of shape `(N,)`, *optional*): for the i-th `[NSP]` of the batch (row by row, left to right) the
                row of `passage_input_ids` that is its positive; -100 for none.
            num_items_in_batch (`int` or `torch.Tensor`, *optional*): global number of trained tokens; the NTP loss is the sum divided by it,
                else the mean over this call's tokens.
            compute_nsp_loss (`bool`): `False` returns the embeddings and leaves the NSP loss, and the sum of both, to the caller.
            return_logits (`bool`, *optional*): defaults to `True` without labels, `False` with.
            output_query_embeds (`bool`): `False` skips the search for `[NSP]`, which decoding does not need.
            nsp_positions (`torch.LongTensor` of shape `(N,)`, *optional*): the positions of `(B · T)` that hold `[NSP]`, and
            label_positions (`torch.LongTensor` of shape `(K,)`, *optional*): those whose next token is trained, where the caller knows them: to find
                them here, a GPU must be waited for.
            logit_positions (`torch.LongTensor` of shape `(R,)`, *optional*): the positions of `(B · T)` that get logits, then `(R, V)`; in place of
                `logits_to_keep`.
            output_states (`tuple[str, ...]`, *optional*): names of submodules of Gen, such as `"model.layers.1.mlp"`, whose
                inputs are returned at `logit_positions`, or without them at the last column of each row. Before it is
                compiled, [`states_cosup.watch`] must be called.
            passage_packing ([`~tokenization_cosup.Packing`], *optional*): the passages are packed, see [`~CoSupForCausalLM.encode_passages`].
            query_input_ids (`torch.LongTensor` of shape `(N, T)`, *optional*), query_attention_mask, query_packing: what Emb_seq or the query encoder
                reads for each `[NSP]`, where `query_from` names it; made of `input_ids` if not given.
            nsp_token_id (`int` or `None`, *optional*): overrides the config's; `None` makes this call plain Gen.

        Returns:
            [`CoSupOutput`].

        Raises:
            `ValueError`: when `passage_labels` does not count as many entries as the batch has `[NSP]`, Emb_seq is needed and
                not loaded, or Gen has no submodule of a name in `output_states`.
        """
        nsp_token_id = kwargs.pop("nsp_token_id", self.config.nsp_token_id)
        return_dict = kwargs.pop("return_dict", None)
        passage_embeds = query_embeds = None
        if passage_input_ids is not None:
            passage_embeds = self.encode_passages(passage_input_ids, passage_attention_mask, passage_packing)
        if query_input_ids is not None:
            query_embeds = self._encode(self._query_encoder(), query_input_ids, query_attention_mask, query_packing)
        if input_ids is None and inputs_embeds is None:
            return CoSupOutput(query_embeds=query_embeds, passage_embeds=passage_embeds)

        optional = {"position_ids": position_ids, "past_key_values": past_key_values, "inputs_embeds": inputs_embeds}
        optional["use_cache"] = False if use_cache is None and labels is not None else use_cache
        optional = {name: value for name, value in optional.items() if value is not None}
        with recording(self.gen, output_states) if output_states else nullcontext({}) as entered:
            outputs = self.gen.base_model(input_ids=input_ids, attention_mask=attention_mask, **optional, **kwargs)
        hidden = outputs.last_hidden_state  # (B, T, h), after the final norm

        if nsp_token_id is not None and output_query_embeds and query_embeds is None and input_ids is not None:
            query_embeds = self._query_embeds(hidden, input_ids, attention_mask, nsp_positions)  # (N, h)

        logits = None
        if return_logits or (return_logits is None and labels is None):
            columns = (
                slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) and logits_to_keep else logits_to_keep
            )
            kept = hidden if isinstance(columns, int) else hidden[:, columns]
            logits = self._lm_head(
                kept if logit_positions is None else hidden.flatten(0, 1)[logit_positions.to(hidden.device)]
            )
        ntp_loss = nsp_loss = loss = None
        if labels is not None:
            count = (
                num_items_in_batch if num_items_in_batch is not None else (labels[:, 1:] != -100).sum().clamp(min=1)
            )
            loss = ntp_loss = (
                chunked_cross_entropy(hidden, labels, self._lm_head, label_positions=label_positions) / count
            )
        if passage_labels is not None and query_embeds is not None and len(passage_labels) != len(query_embeds):
            raise ValueError(
                f"passage_labels has {len(passage_labels)} entries, expected one for each of the {len(query_embeds)} [NSP] in input_ids."
            )
        if compute_nsp_loss and passage_labels is not None and passage_embeds is not None and query_embeds is not None:
            losses = info_nce(query_embeds, passage_embeds, passage_labels, temperature=self.config.temperature)
            nsp_loss = losses.sum() / (passage_labels != -100).sum().clamp(min=1)
            loss = (
                self.config.nsp_loss_weight * nsp_loss
                if loss is None
                else loss + self.config.nsp_loss_weight * nsp_loss
            )
        output = CoSupOutput(
            loss=loss,
            ntp_loss=ntp_loss,
            nsp_loss=nsp_loss,
            logits=logits,
            query_embeds=query_embeds,
            passage_embeds=passage_embeds,
            past_key_values=outputs.get("past_key_values"),
            hidden_states=outputs.get("hidden_states"),
            attentions=outputs.get("attentions"),
            states=decided_states(entered, output_states, hidden, logit_positions) if output_states else None,
        )
        return output if return_dict is not False else output.to_tuple()

    def encode_passages(self, input_ids, attention_mask=None, packing=None):
        """
        Embeddings of passages: Emb_seq's hidden state at the end-of-sequence token (section 3.2), or its mean or first one.

        A passage's embedding depends on nothing but the passage: not on the padding, its side, or the other rows.

        Args:
            input_ids (`torch.LongTensor` of shape `(M, L)`): BOS + passage + EOS; M may be 0.
            attention_mask (`torch.LongTensor` of shape `(M, L)`, *optional*): defaults to no padding.
            packing ([`~tokenization_cosup.Packing`], *optional*): the passages are packed in one row `(1, L)`. Needs a
                causal Emb_seq, and an attention implementation that keeps them apart.

        Returns:
            `torch.FloatTensor` of shape `(M, h)`, of unit length when the similarity is the cosine.

        Raises:
            `ValueError`: when Emb_seq is not loaded.
        """
        if self.emb_seq is None:
            raise ValueError(
                "Emb_seq is not in memory (load_emb_seq=False): this model generates from a ready index but encodes no passages."
            )
        if torch.is_grad_enabled() and any(parameter.requires_grad for parameter in self.emb_seq.parameters()):
            self._forget_fingerprint(
                "emb_seq"
            )  # Emb_seq may be being trained: what its checkpoint stored no longer describes it
        return self._encode(self.emb_seq, input_ids, attention_mask, packing)

    def _encode(self, encoder, input_ids, attention_mask, packing=None):
        """`(M, L)` ids, or those of one packed row, to `(M, h)` embeddings with `encoder`, pooled and, for the cosine, normalised."""
        if (
            input_ids.shape[0] == 0
        ):  # one dummy row, dropped: a rank without passages takes part in every collective and every gradient
            dummy = input_ids.new_zeros(1, 1)
            return self._encode(encoder, dummy, torch.ones_like(dummy))[:0]
        options = {"use_cache": False} if "use_cache" in encoder.config.to_dict() else {}
        if packing is not None:
            if self.config.emb_seq_pooling not in ("eos", "lasttoken"):
                raise ValueError(
                    f"Packed passages are read at their end; emb_seq_pooling is {self.config.emb_seq_pooling!r}."
                )
            hidden = encoder(
                input_ids=input_ids, position_ids=packing.position_ids, **options
            ).last_hidden_state  # (1, L, h_emb)
            embeds = hidden[0, packing.ends.to(hidden.device)]
            return self._normalize(embeds if self.emb_head is None else self.emb_head(embeds))
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        # padding to the right: then default positions are the real ones in every architecture
        order = attention_mask.argsort(dim=1, descending=True, stable=True)
        input_ids, attention_mask = input_ids.gather(1, order), attention_mask.gather(1, order)
        # a causal encoder never sees the padding on its right: without a mask the attention kernels are faster
        mask = (
            {}
            if any(getattr(self, name) is encoder for name in self._causal_encoders)
            else {"attention_mask": attention_mask}
        )
        hidden = encoder(input_ids=input_ids, **mask, **options).last_hidden_state  # (M, L, h_emb)
        if self.config.emb_seq_pooling == "mean":
            weights = attention_mask.to(hidden.device)[:, :, None].float()
            embeds = ((hidden.float() * weights).sum(1) / weights.sum(1).clamp(min=1)).to(hidden.dtype)
        else:
            attention_mask = attention_mask.to(hidden.device)
            column = (
                torch.zeros_like(attention_mask[:, 0])
                if self.config.emb_seq_pooling == "cls"
                else attention_mask.sum(1) - 1
            )
            embeds = hidden[torch.arange(len(hidden), device=hidden.device), column]
        if self.emb_head is not None:
            embeds = self.emb_head(embeds)
        return self._normalize(embeds)

    def _query_embeds(self, hidden, input_ids, attention_mask, nsp_positions=None):
        """Query embeddings `(N, h)` at the `[NSP]` of `input_ids` `(B, T)`, from Gen's hidden states or from the encoder that `query_from` names."""
        if nsp_positions is None:
            nsp_positions = (input_ids == self.config.nsp_token_id).flatten().nonzero()[:, 0]
        if self.config.query_from == "gen":
            return self._normalize(hidden.flatten(0, 1)[nsp_positions.to(hidden.device)])
        rows, columns = nsp_positions // input_ids.shape[1], nsp_positions % input_ids.shape[1]
        ids = input_ids[rows]
        mask = torch.ones_like(ids) if attention_mask is None else attention_mask[rows, -ids.shape[1] :]
        mask = mask * (
            torch.arange(ids.shape[1], device=ids.device) <= columns[:, None]
        )  # everything up to and including [NSP]
        return self.encode_queries(ids, mask)

    def encode_queries(self, input_ids, attention_mask):
        """
        Query embeddings from Emb_seq or the query encoder (section 5, "Baseline"; appendix C.1): each row is everything up to `[NSP]`.

        Where Emb_seq has a tokenizer of its own, or the config a query prompt, the rows are decoded and encoded again.

        Args:
            input_ids (`torch.LongTensor` of shape `(N, T)`): in Gen's token ids.
            attention_mask (`torch.LongTensor` of shape `(N, T)`): 0 for padding and for all that follows `[NSP]`.

        Returns:
            `torch.FloatTensor` of shape `(N, h)`.

        Raises:
            `ValueError`: when the encoder is not loaded.
        """
        encoder = self._query_encoder()
        if len(input_ids) and (self.emb_seq_tokenizer is not self.tokenizer or self.config.query_prompt):
            rows = [ids[mask.bool()].tolist() for ids, mask in zip(input_ids, attention_mask, strict=True)]
            rows = encode_queries_for_emb_seq(self.tokenizer, self.emb_seq_tokenizer, rows, self.config)
            input_ids, attention_mask = pad_rows(rows, device=input_ids.device)
        return self._encode(encoder, input_ids, attention_mask)

    def _query_encoder(self):
        """What reads queries where Gen's own hidden state does not: Emb_seq or the query encoder."""
        encoder = self.query_encoder if self.config.query_from == "query_encoder" else self.emb_seq
        if encoder is None:
            raise ValueError(
                "Queries come from Emb_seq (query_from='emb_seq'), which is not in memory: load without load_emb_seq=False."
            )
        return encoder

    @torch.no_grad()
    def find_causal_encoders(self):
        """
        Find out, with two small passes each, whether Emb_seq and the query encoder are causal: whether a token on the right leaves the states before it
        as they were. From then on causal ones read padded batches without an attention mask.

        Returns:
            `bool`: whether all of them are.
        """
        names = [name for name in ("emb_seq", "query_encoder") if getattr(self, name) is not None]
        training, _ = self.training, self.eval()
        self._causal_encoders = []
        for name in names:
            encoder = getattr(self, name)
            size = encoder.get_input_embeddings().weight.shape[0]
            long = torch.arange(1, 9, device=encoder.device)[None] * (
                size // 9
            )  # other tokens on the right: the same ones would hardly be noticed
            options = {"use_cache": False} if "use_cache" in encoder.config.to_dict() else {}
            attention, encoder.config._attn_implementation = (
                encoder.config._attn_implementation,
                "eager",
            )  # flash kernels take no float32, no CPU
            try:
                states = [
                    encoder(input_ids=ids, **options).last_hidden_state[:, :3].float() for ids in (long[:, :3], long)
                ]
            finally:
                encoder.config._attn_implementation = attention
            if torch.allclose(*states, atol=1e-3, rtol=1e-2):
                self._causal_encoders.append(name)
        self.train(training)
        return self._causal_encoders == names

    def _normalize(self, embeds):
        return F.normalize(embeds.float(), dim=-1) if self.config.similarity == "cosine" else embeds.float()

    def _lm_head(self, hidden):
        """Logits `(..., V)` of hidden states `(..., h)`, with the scaling that some architectures apply after the head."""
        logits = self.gen.get_output_embeddings()(hidden)
        config = self.config.get_text_config()
        if scale := getattr(config, "logit_scale", None):  # Cohere
            logits = logits * scale
        if divisor := getattr(config, "logits_scaling", None):  # Granite
            logits = logits / divisor
        if cap := getattr(config, "final_logit_softcapping", None):  # Gemma 2
            logits = torch.tanh(logits / cap) * cap
        return logits

    # ------------------------------------------------------------------ index

    def build_index(self, passages, tokenizer=None, **kwargs):
        """A [`PassageIndex`] of `passages` in this model's space; see [`PassageIndex.build`] for the arguments."""
        return PassageIndex.build(passages, model=self, tokenizer=tokenizer, **kwargs)

    def load_index(self, name_or_path: str | os.PathLike[str], uri: str | None = None, **kwargs: Any) -> Retriever:
        """
        Load a saved [`PassageIndex`], or open one that Milvus holds, and check that it is of this model.

        Args:
            name_or_path (`str`): a folder, or a dataset repository on the Hub; with `uri` a collection.
            uri (`str`, *optional*): of a Milvus server, or the path of a `.db` file: see [`MilvusPassageIndex`].
            **kwargs: for [`PassageIndex.from_pretrained`], e.g. `revision`, or for [`MilvusPassageIndex`], e.g. `search_params`.

        Raises:
            `ValueError`: when the index was built by another model, with what differs; for an option that an index in Milvus does not have.
            `ImportError`: for an index in Milvus where the package `cosup` is not installed: its code does not come with a checkpoint.
        """
        index: Retriever
        if uri is None:
            index = PassageIndex.from_pretrained(name_or_path, **kwargs)
        else:
            index = open_by_uri(uri, str(name_or_path), kwargs)
        index.check_model(self)
        return index

    # ------------------------------------------------------------------ what transformers asks of a causal LM

    def get_input_embeddings(self):
        return self.gen.get_input_embeddings()

    def set_input_embeddings(self, value):
        self.gen.set_input_embeddings(value)

    def get_output_embeddings(self):
        return self.gen.get_output_embeddings()

    def set_output_embeddings(self, value):
        self.gen.set_output_embeddings(value)

    def resize_token_embeddings(self, *args, **kwargs):
        """Resize Gen's embeddings; Emb_seq's stay."""
        embeddings = self.gen.resize_token_embeddings(*args, **kwargs)
        self.config.get_text_config().vocab_size = embeddings.weight.shape[0]
        return embeddings


CoSupForCausalLM.register_for_auto_class("AutoModelForCausalLM")
