"""Building a CoSup model from two pretrained models: tokenizers, new embedding rows, the checkpoint's generation config."""

import copy
import os

import torch
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedModel

from .configuration_cosup import CoSupConfig
from .hub_cosup import is_repo_id
from .tokenization_cosup import add_control_tokens, added_tokens, end_of_turn_token_id, same_tokenizer


class BuildingMixin:
    """`from_gen_and_emb_seq()` of [`CoSupForCausalLM`]."""

    @classmethod
    def from_gen_and_emb_seq(
        cls,
        gen,
        emb_seq=None,
        tokenizer=None,
        emb_seq_tokenizer=None,
        query_encoder=None,
        emb_head=None,
        model_kwargs=None,
        **config,
    ):
        """
        A CoSup model from two pretrained models.

        Control tokens are added to the tokenizers (in place) and both embeddings grow; new rows start at the mean of the old ones. The
        checkpoint's generation config becomes greedy, ends at every end-of-turn id and can never sample `[Cs]`.

        Args:
            gen (`str` or `PreTrainedModel`): name, path or model, any `AutoModelForCausalLM` architecture.
            emb_seq (`str` or `PreTrainedModel`, *optional*): any `AutoModel` architecture; defaults to a copy of Gen's weights, the paper's
                best setting.
            tokenizer (`PreTrainedTokenizerBase` or `str`, *optional*): Gen's; needed when `gen` is a model, else defaults to `gen`'s.
            emb_seq_tokenizer (`PreTrainedTokenizerBase` or `str`, *optional*): defaults to the tokenizer of `emb_seq` when it is a name or path, else to
                `tokenizer`. When it reads text differently from `tokenizer`, both are kept and saved.
            query_encoder (`str` or `PreTrainedModel`, *optional*): with `query_from="query_encoder"`.
            emb_head (`torch.Tensor` of shape `(h, h_emb)`, *optional*): weight of `emb_head`, where the config asks for one.
            model_kwargs (`dict`, *optional*): for `from_pretrained` of names and paths, e.g. `{"dtype": "bfloat16"}`.
            **config: fields of [`CoSupConfig`], and `nsp_token`, `cs_token`, `ce_token`: strings of the control tokens.

        Returns:
            `CoSupForCausalLM`, in the mode (train or eval) of Gen.

        Raises:
            `TypeError`: for a keyword that is no field of the config.
            `ValueError`: without a tokenizer, for an architecture whose logits are more than its LM head's output, or when `max_passage_length`
                exceeds Emb_seq's positions.
        """
        names = {key: config.pop(key) for key in ("nsp_token", "cs_token", "ce_token") if key in config}
        if unknown := set(config) - set(CoSupConfig.__dataclass_fields__):
            raise TypeError(
                f"from_gen_and_emb_seq got {', '.join(sorted(unknown))}, which are no fields of CoSupConfig."
            )
        model_kwargs = model_kwargs or {}
        gen, emb_seq, query_encoder = (
            os.fspath(part) if isinstance(part, os.PathLike) else part for part in (gen, emb_seq, query_encoder)
        )
        tokenizer = tokenizer if tokenizer is not None else gen
        if isinstance(tokenizer, PreTrainedModel):
            raise ValueError("Gen was given as a model; pass its tokenizer as `tokenizer=`.")
        if emb_seq_tokenizer is None and isinstance(emb_seq, str) and emb_seq != gen:
            emb_seq_tokenizer = emb_seq
        tokenizer = _load_tokenizer(tokenizer)
        emb_seq_tokenizer = tokenizer if emb_seq_tokenizer is None else _load_tokenizer(emb_seq_tokenizer)
        if same_tokenizer(tokenizer, emb_seq_tokenizer):
            emb_seq_tokenizer = tokenizer
        gen = AutoModelForCausalLM.from_pretrained(gen, **model_kwargs) if isinstance(gen, str) else gen
        emb_seq = gen.base_model if emb_seq is None else _load_encoder(emb_seq, model_kwargs)
        emb_seq = copy.deepcopy(emb_seq) if emb_seq is gen.base_model else emb_seq
        query_encoder = None if query_encoder is None else _load_encoder(query_encoder, model_kwargs)

        old_sizes = len(tokenizer), len(emb_seq_tokenizer)
        nsp_token_id, cs_token_id, ce_token_id = add_control_tokens(tokenizer, names)
        if emb_seq_tokenizer is not tokenizer:
            add_control_tokens(emb_seq_tokenizer, names)
        _grow_embeddings(gen, old_sizes[0], len(tokenizer))
        for encoder in (emb_seq, query_encoder):
            if encoder is not None:
                _grow_embeddings(encoder, old_sizes[1], len(emb_seq_tokenizer))

        config = CoSupConfig(  # copies: a composite config resets the attention implementation of its parts
            gen_config=copy.deepcopy(gen.config),
            emb_seq_config=copy.deepcopy(emb_seq.config),
            query_encoder_config=None if query_encoder is None else copy.deepcopy(query_encoder.config),
            gen_name_or_path=_repository_of(gen),
            emb_seq_name_or_path=_repository_of(emb_seq),
            nsp_token_id=nsp_token_id,
            cs_token_id=cs_token_id,
            ce_token_id=ce_token_id,
            dtype=gen.dtype,
            **config,
        )
        limit = getattr(emb_seq.config.get_text_config(), "max_position_embeddings", None)
        if (
            limit is not None
            and config.max_passage_length + sum(map(len, added_tokens(emb_seq_tokenizer, config))) > limit
        ):
            raise ValueError(
                f"max_passage_length={config.max_passage_length}, BOS and EOS do not fit into Emb_seq's {limit} positions."
            )
        model = cls(config, gen, emb_seq, query_encoder).train(gen.training)
        if model.emb_head is not None:
            model.emb_head.to(device=emb_seq.device, dtype=emb_seq.dtype)
            if emb_head is not None:
                model.emb_head.load_state_dict({"weight": emb_head})
        model._tokenizer, model._emb_seq_tokenizer = tokenizer, emb_seq_tokenizer
        model._set_generation_defaults(tokenizer)
        model._check_lm_head()
        return model

    def _set_generation_defaults(self, tokenizer):
        """Greedy, ending at every end-of-turn id, `[Cs]` never sampled: saved as the checkpoint's generation config."""
        ends = self.gen.generation_config.eos_token_id if self.gen.generation_config is not None else None
        ends = [*(ends if isinstance(ends, list) else [ends]), end_of_turn_token_id(tokenizer), tokenizer.eos_token_id]
        self.generation_config = GenerationConfig(
            do_sample=False,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=sorted({id for id in ends if id is not None}),
            pad_token_id=tokenizer.pad_token_id,
            suppress_tokens=[self.config.cs_token_id],
        )
        for config in (self.config, self.config.get_text_config()):  # or Trainer would align them, with a warning
            for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
                setattr(config, name, getattr(tokenizer, name))

    @torch.no_grad()
    def _check_lm_head(self):
        """Gen's logits must be `_lm_head` of its last hidden state: losses and generation rely on it."""
        if self.gen.config._attn_implementation not in ("eager", "sdpa"):
            return  # flash kernels do not run on the device where models are put together
        input_ids = torch.tensor([[0, self.config.nsp_token_id]], device=self.device)
        training, _ = self.training, self.eval()
        expected = self.gen(input_ids=input_ids, use_cache=False).logits
        found = self._lm_head(self.gen.base_model(input_ids=input_ids, use_cache=False).last_hidden_state)
        self.train(training)
        if not torch.allclose(expected, found, atol=1e-4, rtol=1e-3):
            raise ValueError(
                f"{type(self.gen).__name__} does more after its LM head than CoSup knows of, so its losses would be wrong."
            )


def _load_tokenizer(tokenizer):
    return AutoTokenizer.from_pretrained(tokenizer) if isinstance(tokenizer, str | os.PathLike) else tokenizer


def _load_encoder(encoder, model_kwargs):
    """A model without LM head from a name, a path, or a model with or without one."""
    if isinstance(encoder, str):
        return AutoModel.from_pretrained(encoder, **model_kwargs)
    return encoder.base_model


def _repository_of(model):
    """The repository that a model was loaded from; `None` for a local folder."""
    name = model.config._name_or_path
    return name if is_repo_id(name) else None


@torch.no_grad()
def _grow_embeddings(model, old_size, new_size):
    """Room for `new_size` tokens; rows from `old_size` on, and those the model lacked, become the mean of the rows before; in the head too."""
    old_size = min(old_size, model.get_input_embeddings().weight.shape[0])
    if model.get_input_embeddings().weight.shape[0] < new_size:
        model.resize_token_embeddings(new_size, mean_resizing=False)
    embeddings = [model.get_input_embeddings(), model.get_output_embeddings()]
    for weight in {
        id(layer.weight): layer.weight for layer in embeddings if layer is not None
    }.values():  # tied weights once
        weight[old_size:new_size] = weight[:old_size].float().mean(0).to(weight.dtype)
