"""Gen and Emb_seq in one model: two losses in one forward, two spaces in one generation loop."""

import os
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn
from transformers import AutoModelForCausalLM, Cache, GenerationMixin, PreTrainedModel, PreTrainedTokenizerBase
from transformers.modeling_outputs import ModelOutput

from .architectures_cosup import encoder_from_config, lm_logits
from .building_cosup import BuildingMixin, check_passage_length
from .configuration_cosup import CoSupConfig
from .datastore_cosup import KNNMemory
from .encoding_cosup import EncodingMixin
from .generation_cosup import RetrievalGenerationMixin
from .hub_cosup import HUB_OPTIONS, KEPT_HUB_OPTIONS
from .loss_cosup import chunked_cross_entropy, info_nce
from .memory_cosup import MemoryConfig
from .mlp_memory_cosup import MLPMemory
from .opening_cosup import load_memory, open_by_uri
from .packing_cosup import Packing
from .parts_cosup import PartsMixin
from .retrieval_cosup import PassageIndex
from .retriever_cosup import Retriever
from .settings_cosup import RetrievalConfig
from .sharing_cosup import SharingMixin
from .states_cosup import recording, states_at


@dataclass
class CoSupOutput(ModelOutput):
    """
    Output of [`CoSupForCausalLM`]. A field that was not requested is `None`.

    Args:
        loss (`torch.FloatTensor` of shape `()`): `ntp_loss + nsp_loss_weight * nsp_loss`.
        ntp_loss (`torch.FloatTensor` of shape `()`): next token prediction.
        nsp_loss (`torch.FloatTensor` of shape `()`): next sequence prediction over the passages of this call. `None`
            without `passage_labels`, without an `[NSP]`, and with fewer than two passages: nothing is a negative then.
        logits (`torch.Tensor` of shape `(B, T, V)`): not computed with `labels` unless `return_logits=True`.
        query_embeds (`torch.FloatTensor` of shape `(N, h)`): one per `[NSP]` of `input_ids`, row by row.
        passage_embeds (`torch.FloatTensor` of shape `(M, h)`): one per row of `passage_input_ids`.
        past_key_values (`Cache`), hidden_states, attentions: Gen's.
        states (`dict[str, torch.Tensor]`): what entered the submodules of `output_states`, each `(R, h)`.
    """

    loss: torch.Tensor | None = None
    ntp_loss: torch.Tensor | None = None
    nsp_loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    query_embeds: torch.Tensor | None = None
    passage_embeds: torch.Tensor | None = None
    past_key_values: object | None = None
    hidden_states: tuple | None = None
    attentions: tuple | None = None
    states: dict[str, torch.Tensor] | None = None


class CoSupForCausalLM(  # type: ignore[misc]  # its generate() takes more arguments
    BuildingMixin, EncodingMixin, RetrievalGenerationMixin, SharingMixin, PartsMixin, PreTrainedModel, GenerationMixin
):
    """
    Semiparametric language model: Gen's LM head predicts the next token, its hidden state at `[NSP]` the next passage.

    Build one from two pretrained models with [`~CoSupForCausalLM.from_gen_and_emb_seq`]; load one with
    `from_pretrained`.

    Args:
        config (`CoSupConfig`): configuration of the model and of its parts.
        gen, emb_seq, query_encoder (`PreTrainedModel`, *optional*): models to use instead of new ones.
    """

    config_class = CoSupConfig
    retrieval_config_class = RetrievalConfig  # for users who load this code with a checkpoint
    memory_config_class = MemoryConfig
    base_model_prefix = "gen"
    accepts_loss_kwargs = True  # num_items_in_batch
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    config: CoSupConfig
    gen: PreTrainedModel
    emb_head: nn.Linear | None
    query_encoder: PreTrainedModel | None

    def __init__(
        self,
        config: CoSupConfig,
        gen: PreTrainedModel | None = None,
        emb_seq: PreTrainedModel | None = None,
        query_encoder: PreTrainedModel | None = None,
    ) -> None:
        if config.model_type != CoSupConfig.model_type:
            raise ValueError(
                f"config is of a {config.model_type} model, expected a CoSupConfig; from_gen_and_emb_seq builds a"
                " CoSup model of plain ones."
            )
        # hidden from transformers, which would take the temperature of the NSP loss for a sampling temperature
        config.check()  # `from_pretrained` may have changed settings
        check_passage_length(config)
        temperature = config.temperature
        config.temperature = None
        super().__init__(config)
        config.temperature = temperature
        self.gen = gen if gen is not None else AutoModelForCausalLM.from_config(config.gen_config)
        self.emb_head = self.query_encoder = None
        self._keys_to_ignore_on_load_unexpected = []
        if config.tie_emb_seq:
            if emb_seq is not None:
                raise ValueError("tie_emb_seq=True with an emb_seq: a tied model has no Emb_seq of its own.")
        elif config.load_emb_seq:
            self.emb_seq = emb_seq if emb_seq is not None else encoder_from_config(config.emb_seq_config)
        else:
            self._keys_to_ignore_on_load_unexpected.append(r"^emb_seq\.")
        # the embeddings of a query encoder pass through emb_head too
        has_encoder = config.load_emb_seq or config.tie_emb_seq or config.query_from == "query_encoder"
        if config.needs_emb_head and has_encoder:
            width = config.emb_seq_config.get_text_config().hidden_size
            self.emb_head = nn.Linear(width, config.full_embedding_size, bias=False)
        else:
            self._keys_to_ignore_on_load_unexpected.append(r"^emb_head\.")
        if config.query_from == "query_encoder":
            if query_encoder is None:
                query_encoder = encoder_from_config(config.query_encoder_config)
            self.query_encoder = query_encoder
        encoders: tuple[Any, ...] = (self.emb_seq, self.query_encoder)
        for encoder in encoders:
            if encoder is not None and getattr(encoder, "pooler", None) is not None:
                encoder.pooler = None  # BERT's pooler is not used: without a gradient it would stop DDP
        # peft ties and trains token rows only if the outermost model says what is tied
        tied = self.gen._tied_weights_keys or {}
        self._tied_weights_keys = {f"gen.{target}": f"gen.{source}" for target, source in tied.items()}
        self._tokenizer = self._emb_seq_tokenizer = None
        self.hub_options: dict[str, Any] = {}
        self._seen_states = {}
        self._causal_encoders = []
        self._warned_of_long_queries = False
        self.post_init()

    @property
    def emb_seq(self) -> PreTrainedModel | None:
        """Emb_seq: Gen's body in a tied model, else a tower of its own; `None` if that is not loaded."""
        if self.config.tie_emb_seq:
            return cast(PreTrainedModel, self.gen.base_model)
        return cast(PreTrainedModel | None, self._modules.get("emb_seq"))

    @emb_seq.setter
    def emb_seq(self, emb_seq: PreTrainedModel | None) -> None:
        if self.config.tie_emb_seq:
            raise ValueError("This model is tied (tie_emb_seq): its Emb_seq is Gen's body and cannot be replaced.")
        self._modules["emb_seq"] = emb_seq

    def _emb_seq_prefix(self) -> str:
        """Return the prefix of the names of Emb_seq's weights."""
        return f"gen.{self.gen.base_model_prefix}." if self.config.tie_emb_seq else "emb_seq."

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "emb_seq":
            object.__setattr__(self, name, value)  # nn.Module would register a module without asking the property
        else:
            super().__setattr__(name, value)

    @classmethod
    def from_pretrained(  # type: ignore[override]  # the arguments of PreTrainedModel's
        cls, name_or_path: Any, *args: Any, output_loading_info: bool = False, **kwargs: Any
    ) -> "CoSupForCausalLM":
        """
        Load a checkpoint; the arguments are the same as for `PreTrainedModel.from_pretrained`.

        Only safetensors are read, unless you pass `use_safetensors=None`.

        Raises:
            `ValueError`: for a plain language model or encoder, before anything is allocated; and for a checkpoint
                that lacks weights, which would then be random.
        """
        config = kwargs.get("config")
        if config is not None and name_or_path is not None:
            options = {name: kwargs[name] for name in (*HUB_OPTIONS, "subfolder") if name in kwargs}
            options["tie_emb_seq"] = getattr(config, "tie_emb_seq", False)
            CoSupConfig.get_config_dict(name_or_path, **options)  # raises if the weights are of another model
        kwargs.setdefault("use_safetensors", True)
        loaded: Any = super().from_pretrained(name_or_path, *args, output_loading_info=True, **kwargs)
        model, info = loaded
        missing = sorted(info["missing_keys"])
        if missing and not model._hf_peft_config_loaded:  # transformers reports tied weights of adapters as missing
            raise ValueError(f"{name_or_path} lacks {len(missing)} weights of its model, e.g. {missing[0]}.")
        model.hub_options = {name: kwargs[name] for name in KEPT_HUB_OPTIONS if name in kwargs}
        for name in ("emb_seq", "gen"):
            model._remember_state(name)
        return loaded if output_loading_info else model

    # ------------------------------------------------------------------ forward

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        passage_input_ids: torch.Tensor | None = None,
        passage_attention_mask: torch.Tensor | None = None,
        passage_labels: torch.Tensor | None = None,
        num_items_in_batch: int | torch.Tensor | None = None,
        label_smoothing: float = 0.0,
        compute_nsp_loss: bool = True,
        return_logits: bool | None = None,
        output_query_embeds: bool = True,
        nsp_positions: torch.Tensor | None = None,
        label_positions: torch.Tensor | None = None,
        logit_positions: torch.Tensor | None = None,
        output_states: tuple[str, ...] | None = None,
        passage_packing: Packing | None = None,
        query_input_ids: torch.Tensor | None = None,
        query_attention_mask: torch.Tensor | None = None,
        query_packing: Packing | None = None,
        **kwargs: Any,
    ) -> CoSupOutput | tuple:
        """
        Run Gen and, if there are passages, Emb_seq; compute the loss L = L_NTP + λ·L_NSP (Eq. 5).

        Args:
            input_ids (`torch.LongTensor` of shape `(B, T)`, *optional*): without it only passages and queries are
                encoded.
            attention_mask, position_ids, past_key_values, inputs_embeds, use_cache: as in Gen.
            labels (`torch.LongTensor` of shape `(B, T)`, *optional*): -100 where nothing is trained; shifted inside.
            logits_to_keep (`int` or `torch.LongTensor`): which columns get logits: the last n (0 for all), or these.
            passage_input_ids (`torch.LongTensor` of shape `(M, L)`, *optional*): BOS + passage + EOS; M may be 0.
            passage_attention_mask (`torch.LongTensor` of shape `(M, L)`, *optional*): padding on either side.
            passage_labels (`torch.LongTensor` of shape `(N,)`, *optional*): for the i-th `[NSP]` of the batch (row by
                row, from the left) the row of `passage_input_ids` that is its positive; -100 for none.
            num_items_in_batch (`int` or `torch.Tensor`, *optional*): global number of trained tokens. The NTP loss is
                the sum divided by it; by default the mean over the trained tokens of this call.
            label_smoothing (`float`): for the NTP loss only, see [`~loss_cosup.chunked_cross_entropy`].
            compute_nsp_loss (`bool`): `False` returns the embeddings; the caller then computes the NSP loss and adds
                it to the NTP loss.
            return_logits (`bool`, *optional*): defaults to `True` without labels, `False` with.
            output_query_embeds (`bool`): `False` skips the search for `[NSP]`, which decoding does not need.
            nsp_positions (`torch.LongTensor` of shape `(N,)`, *optional*): positions of `[NSP]` in the flattened
                `(B · T)`. A caller that knows them saves the host from waiting for the GPU.
            label_positions (`torch.LongTensor` of shape `(K,)`, *optional*): likewise, positions whose next token is
                trained.
            logit_positions (`torch.LongTensor` of shape `(R,)`, *optional*): positions in the flattened `(B · T)`
                that get logits, which are then `(R, V)`; replaces `logits_to_keep`.
            output_states (`tuple[str, ...]`, *optional*): names of submodules of Gen, such as `"model.layers.1.mlp"`.
                Their inputs are returned at `logit_positions`, by default at the last column of each row. Call
                [`states_cosup.watch`] before you compile this forward.
            passage_packing ([`~packing_cosup.Packing`], *optional*): how the passages are packed in one row, see
                [`~CoSupForCausalLM.encode_passages`].
            query_input_ids (`torch.LongTensor` of shape `(N, T)`, *optional*), query_attention_mask, query_packing:
                what Emb_seq or the query encoder reads for each `[NSP]`, if `query_from` names one of them; by default
                taken from `input_ids`.
            nsp_token_id (`int` or `None`, *optional*): overrides the config's; `None` makes this call plain Gen.

        Returns:
            [`CoSupOutput`].

        Raises:
            `ValueError`: when `passage_labels` does not have one entry for each `[NSP]` of the batch, when Emb_seq is
                needed and not loaded, or when Gen has no submodule of a name in `output_states`.
        """
        nsp_token_id = kwargs.pop("nsp_token_id", self.config.nsp_token_id)
        return_dict = kwargs.pop("return_dict", None)
        passage_embeds = query_embeds = None
        if self.training:  # in evaluation mode nothing is trained, even with gradients enabled
            self._forget_trained_gen()
            if self.config.tie_emb_seq:
                self._forget_trained_emb_seq()
        if passage_input_ids is not None:
            passage_embeds = self.encode_passages(passage_input_ids, passage_attention_mask, passage_packing)  # (M, h)
        if query_input_ids is not None:
            encoder = self._query_encoder()
            query_embeds = self._encode(encoder, query_input_ids, query_attention_mask, query_packing)  # (N, h)
        if input_ids is None and inputs_embeds is None:
            return CoSupOutput(query_embeds=query_embeds, passage_embeds=passage_embeds)

        if use_cache is None and labels is not None:
            use_cache = False
        optional = {
            "position_ids": position_ids,
            "past_key_values": past_key_values,
            "inputs_embeds": inputs_embeds,
            "use_cache": use_cache,
        }
        given = {name: value for name, value in optional.items() if value is not None}
        recorder: AbstractContextManager[dict[str, torch.Tensor]] = nullcontext({})
        if output_states:
            recorder = recording(self.gen, output_states)
        with recorder as recorded:
            gen_output = self.gen.base_model(input_ids=input_ids, attention_mask=attention_mask, **given, **kwargs)
        hidden = gen_output.last_hidden_state  # (B, T, h), after the final norm
        states = None
        if output_states:
            states = states_at(recorded, output_states, hidden, logit_positions)

        if nsp_token_id is not None and output_query_embeds and query_embeds is None and input_ids is not None:
            query_embeds = self._query_embeds_at_nsp(
                hidden, input_ids, attention_mask, nsp_positions, nsp_token_id
            )  # (N, h)

        logits = None
        if return_logits is None:
            return_logits = labels is None
        if return_logits:
            logits = self._lm_head(_chosen_states(hidden, logits_to_keep, logit_positions))

        loss = ntp_loss = nsp_loss = None
        if labels is not None:
            if num_items_in_batch is None:
                num_items_in_batch = (labels[:, 1:] != -100).sum().clamp(min=1)
            loss_sum = chunked_cross_entropy(
                hidden, labels, self._lm_head, label_positions=label_positions, label_smoothing=label_smoothing
            )
            ntp_loss = loss_sum / num_items_in_batch
            loss = ntp_loss
        if passage_labels is not None and query_embeds is not None:
            if len(passage_labels) != len(query_embeds):
                raise ValueError(
                    f"passage_labels has {len(passage_labels)} entries, expected one for each of the"
                    f" {len(query_embeds)} [NSP] in input_ids."
                )
            if compute_nsp_loss and passage_embeds is not None:
                nsp_loss = self._nsp_loss(query_embeds, passage_embeds, passage_labels)
                weighted_nsp_loss = cast(float, self.config.nsp_loss_weight) * nsp_loss
                loss = weighted_nsp_loss if ntp_loss is None else ntp_loss + weighted_nsp_loss
                if not len(query_embeds) or len(passage_embeds) < 2:
                    nsp_loss = None  # nothing was compared; `loss` keeps its graph, which DDP needs
        output = CoSupOutput(
            loss=loss,
            ntp_loss=ntp_loss,
            nsp_loss=nsp_loss,
            logits=logits,
            query_embeds=query_embeds,
            passage_embeds=passage_embeds,
            past_key_values=gen_output.get("past_key_values"),
            hidden_states=gen_output.get("hidden_states"),
            attentions=gen_output.get("attentions"),
            states=states,
        )
        if return_dict is False:
            return output.to_tuple()
        return output

    def _nsp_loss(
        self, query_embeds: torch.Tensor, passage_embeds: torch.Tensor, passage_labels: torch.Tensor
    ) -> torch.Tensor:
        """Return the mean loss of the queries that have a positive (Eq. 4)."""
        temperature = cast(float, self.config.temperature)
        losses = info_nce(query_embeds, passage_embeds, passage_labels, temperature=temperature)
        return cast(torch.Tensor, losses).sum() / (passage_labels != -100).sum().clamp(min=1)

    def _lm_head(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return the logits `(..., V)` of hidden states `(..., h)`."""
        return lm_logits(self.gen, hidden)

    # ------------------------------------------------------------------ index

    def build_index(
        self, passages: Any, tokenizer: PreTrainedTokenizerBase | None = None, **kwargs: Any
    ) -> PassageIndex:
        """Build a [`PassageIndex`] of `passages` in this model's space; see [`PassageIndex.build`] for the options."""
        return PassageIndex.build(passages, model=self, tokenizer=tokenizer, **kwargs)

    def load_index(self, name_or_path: str | os.PathLike[str], uri: str | None = None, **kwargs: Any) -> Retriever:
        """
        Load a saved [`PassageIndex`], or open one that Milvus holds, and check that this model built it.

        Args:
            name_or_path (`str`): a folder, or a dataset repository on the Hub; with `uri` a collection.
            uri (`str`, *optional*): of a Milvus server, or the path of a `.db` file: see [`MilvusPassageIndex`].
            **kwargs: for [`PassageIndex.from_pretrained`], e.g. `revision`, or for [`MilvusPassageIndex`], e.g.
                `search_params`.

        Raises:
            `ValueError`: when another model built the index (names what differs), and for an option that an index in
                Milvus does not have.
            `ImportError`: for an index in Milvus when the package `cosup` is not installed: the code for it does not
                come with a checkpoint.
        """
        index: Retriever
        if uri is None:
            index = PassageIndex.from_pretrained(name_or_path, **kwargs)
        else:
            index = open_by_uri(uri, str(name_or_path), kwargs)
        index.check_model(self)
        return index

    # ------------------------------------------------------------------ token memories

    def build_memory(self, texts: Any, save_directory: Any = None, **kwargs: Any) -> KNNMemory:
        """Build a [`KNNMemory`] of `texts` with this model's Gen; see [`KNNMemory.build`] for the options."""
        return KNNMemory.build(self, texts, save_directory, **kwargs)

    def load_memory(self, name_or_path: str | os.PathLike[str], **kwargs: Any) -> KNNMemory | MLPMemory:
        """
        Load a saved token memory of either kind, and check that it was made for this model.

        An [`MLPMemory`] goes to the model's device; the keys of a [`KNNMemory`] stay mapped until you move it.

        Args:
            name_or_path (`str` or `Path`): a folder, or a repository on the Hub.
            **kwargs: for `from_pretrained` of [`KNNMemory`] or [`MLPMemory`], e.g. `revision`.

        Raises:
            `FileNotFoundError`: when the folder or repository holds no memory.
            `ValueError`: for damaged files, and for a memory of another model (names what differs).
        """
        memory = load_memory(name_or_path, **kwargs)
        memory.check_model(self)
        if isinstance(memory, MLPMemory) and "device" not in kwargs:
            memory.to(self.device)
        return memory

    # ------------------------------------------------------------------ what transformers expects of a causal LM

    def get_input_embeddings(self) -> nn.Module:
        return self.gen.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.gen.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        return self.gen.get_output_embeddings()

    def set_output_embeddings(self, value: nn.Module) -> None:
        self.gen.set_output_embeddings(value)


def _chosen_states(
    hidden: torch.Tensor, logits_to_keep: int | torch.Tensor, logit_positions: torch.Tensor | None
) -> torch.Tensor:
    """Return the states of `hidden` `(B, T, h)` that get logits: some columns, or `(R, h)` at `logit_positions`."""
    if logit_positions is not None:
        return hidden.flatten(0, 1)[logit_positions.to(hidden.device)]
    if isinstance(logits_to_keep, int):
        return hidden[:, -logits_to_keep:]  # all for 0
    return hidden[:, logits_to_keep]


CoSupForCausalLM.register_for_auto_class("AutoModelForCausalLM")
