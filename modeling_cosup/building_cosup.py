"""Building a CoSup model from two pretrained models: tokenizers, new embedding rows, generation config."""

import copy
import os
from collections.abc import Callable
from types import ModuleType
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar, cast

import torch
from torch import nn
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from .architectures_cosup import num_positions
from .configuration_cosup import CoSupConfig, check_tied_settings
from .hub_cosup import is_repo_id
from .tokenization_cosup import CONTROL_TOKENS, add_control_tokens, added_tokens, bos_and_eos, end_of_turn_token_id

if TYPE_CHECKING:
    Base = PreTrainedModel
else:
    Base = object  # CoSupForCausalLM itself inherits from PreTrainedModel

Model = TypeVar("Model", bound="BuildingMixin")
NameOrModel: TypeAlias = str | os.PathLike[str] | PreTrainedModel
NameOrTokenizer: TypeAlias = str | os.PathLike[str] | PreTrainedTokenizerBase
NSP_INITS = ("mean", "eos")
LOADING_OPTIONS = (
    *("dtype", "device_map", "max_memory", "attn_implementation", "quantization_config"),
    *("token", "cache_dir", "local_files_only", "force_download", "trust_remote_code"),
)


class BuildingMixin(Base):
    """`from_gen_and_emb_seq()` of [`CoSupForCausalLM`]."""

    config: CoSupConfig
    gen: PreTrainedModel
    emb_head: nn.Linear | None
    tokenizer: PreTrainedTokenizerBase
    emb_seq_tokenizer: PreTrainedTokenizerBase
    _has_tokenizer: Callable[[], bool]
    _lm_head: Callable[[torch.Tensor], torch.Tensor]
    _tokenizer: PreTrainedTokenizerBase | None
    _emb_seq_tokenizer: PreTrainedTokenizerBase | None

    @classmethod
    def from_gen_and_emb_seq(
        cls: type[Model],
        gen: NameOrModel,
        emb_seq: NameOrModel | None = None,
        tokenizer: NameOrTokenizer | None = None,
        emb_seq_tokenizer: NameOrTokenizer | None = None,
        query_encoder: NameOrModel | None = None,
        emb_head: torch.Tensor | None = None,
        model_kwargs: dict[str, Any] | None = None,
        nsp_init: str = "mean",
        tie_emb_seq: bool | None = None,
        **config: Any,
    ) -> Model:
        """
        Build a CoSup model: from one pretrained model, which also reads the passages, or from two.

        Control tokens are added to the tokenizers (in place) and both embeddings grow; new rows start at the mean of
        the old ones (but see `nsp_init`), and rows that exist already are kept. The checkpoint's generation config
        becomes greedy, ends at every end-of-turn id and can never sample `[Cs]`. Gen's chat template changes if it
        prints today's date or cannot read messages that are strings, see [`~templates_cosup.settle_chat_template`].

        Args:
            gen (`str` or `PreTrainedModel`): name, path or model, any `AutoModelForCausalLM` architecture. Adapters of
                PEFT (a name, a path, or a `PeftModel`) are merged into their base model, here and below.
            emb_seq (`str` or `PreTrainedModel`, *optional*): any `AutoModel` architecture, or the encoder of T5, mT5
                or UMT5; by default Gen's body, see `tie_emb_seq`. The name or path of a
                sentence-transformers model brings its pooling, similarity, dense layer, prompts, tokens around a text,
                and length. Pass the loaded model instead to set these yourself.
            tokenizer (`PreTrainedTokenizerBase` or `str`, *optional*): Gen's. Defaults to the tokenizer of `gen` if
                that is a name or path; needed if it is a model.
            emb_seq_tokenizer (`PreTrainedTokenizerBase` or `str`, *optional*): defaults to the tokenizer of `emb_seq`
                if that is a name or path, otherwise to `tokenizer`. If the two read text differently, both are kept
                and saved.
            query_encoder (`str` or `PreTrainedModel`, *optional*): with `query_from="query_encoder"`; must read text,
                pool and compare as Emb_seq does.
            emb_head (`torch.Tensor` of shape `(h, h_emb)`, *optional*): weight of `emb_head`, if the config needs one;
                defaults to the dense layer of a sentence-transformers model that has the right width.
            model_kwargs (`dict`, *optional*): for `from_pretrained` of names and paths, e.g. `{"dtype": "bfloat16"}`.
                Parts of different dtypes are brought to one in which none loses precision.
                The usual ones may also be given by themselves: `dtype`, `device_map`, `attn_implementation`,
                `quantization_config`, `token` and others of `LOADING_OPTIONS`.
            nsp_init (`str`, *optional*, defaults to `"mean"`): where a new row of `[NSP]` starts. `"mean"`: at the
                mean, like all new rows. `"eos"`: in the input embeddings, as a copy of the row of the token that ends
                a passage (EOS, or else SEP). If Emb_seq is a causal Gen or a copy of it, a query at `[NSP]` and a
                passage at EOS are then the same function before training. A separate LM head keeps the mean; one that
                is tied to the embeddings has the same row, so `[NSP]` starts as likely as EOS.
            tie_emb_seq (`bool`, *optional*): `True`: one tied model, whose Gen is Emb_seq. `False`: two towers (the
                paper); without `emb_seq`, Emb_seq starts as a copy of Gen's weights, the paper's best setting. By
                default the model is tied unless an argument asks for a second one: `emb_seq`, `emb_seq_tokenizer`, a
                `query_from` other than `"gen"`, or the pooling `"cls"`.
            **config: other fields of [`CoSupConfig`], and the strings of the control tokens: `nsp_token`, `cs_token`,
                `ce_token`.

        Returns:
            `CoSupForCausalLM`, in the mode (train or eval) of Gen.

        Raises:
            `ImportError`: in a process that has only a checkpoint's code, not this package.
            `TypeError`: for a keyword that is not a field of the config, and for a part that is no model.
            `ValueError`: without a tokenizer, for a chat template that loses the question, for an architecture that
                does something unknown after its LM head, when `max_passage_length` exceeds Emb_seq's positions, for
                settings that contradict the files of a sentence-transformers model, for weights that are missing, for
                adapters that cannot be merged, for a part of the wrong kind, such as an encoder-decoder as Gen,
                that cannot embed a text, or that could not be loaded again, for an unknown `nsp_init`, for
                `nsp_init="eos"` with a tokenizer that has neither EOS nor SEP, for an `emb_head` that the model has no
                place for, and for a tied model with an argument that asks for a second one, or a Gen that is not
                causal.
            `OSError`: for a name that cannot be loaded.
        """
        control_tokens = {name: config.pop(name) for name in CONTROL_TOKENS if name in config}
        model_kwargs = {
            **{name: config.pop(name) for name in LOADING_OPTIONS if name in config},
            **(model_kwargs or {}),
        }
        sources_given = (gen, emb_seq, query_encoder, tokenizer, emb_seq_tokenizer)
        if model_kwargs and not any(isinstance(source, str | os.PathLike) for source in sources_given):
            raise ValueError(
                f"from_gen_and_emb_seq got {', '.join(model_kwargs)}, for parts that it loads by their names, and all"
                " parts are models already."
            )
        unknown = sorted(set(config) - set(CoSupConfig.__annotations__))
        if unknown:
            raise TypeError(
                f"from_gen_and_emb_seq got {', '.join(unknown)}, which are not fields of CoSupConfig. Options of"
                " from_pretrained go into model_kwargs."
            )
        if nsp_init not in NSP_INITS:
            raise ValueError(f"nsp_init is {nsp_init!r}, expected one of {', '.join(map(repr, NSP_INITS))}.")
        query_from = config.get("query_from") or CoSupConfig.query_from
        pooling = config.get("emb_seq_pooling")
        of_emb_seq = {"emb_seq": emb_seq, "emb_seq_tokenizer": emb_seq_tokenizer}
        given = [name for name, value in of_emb_seq.items() if value is not None]
        if tie_emb_seq is None:
            tie_emb_seq = not given and query_from == "gen" and pooling != "cls"
        if tie_emb_seq:
            check_tied_settings(query_from, pooling)
            if given:
                raise ValueError(
                    f"tie_emb_seq=True with {given[0]}: Gen's body reads the passages of a tied model. Leave out one"
                    " of the two."
                )
        config["tie_emb_seq"] = tie_emb_seq
        if query_encoder is not None and query_from != "query_encoder":
            raise ValueError(f"query_encoder was given, but query_from is {query_from!r}: nothing would use it.")
        gen, emb_seq, query_encoder = _path_as_string(gen), _path_as_string(emb_seq), _path_as_string(query_encoder)
        sources, checks, templates = _package_modules()
        parts = sources.read_parts(
            gen, emb_seq, query_encoder, tokenizer, emb_seq_tokenizer, emb_head, model_kwargs, config
        )
        gen, emb_seq = cast(PreTrainedModel, parts.gen), cast(PreTrainedModel, parts.emb_seq)
        query_encoder = cast(PreTrainedModel | None, parts.query_encoder)
        tokenizer = cast(PreTrainedTokenizerBase, parts.tokenizer)
        emb_seq_tokenizer = cast(PreTrainedTokenizerBase, parts.emb_seq_tokenizer)
        config, emb_head = parts.settings, parts.emb_head
        if emb_seq is gen.base_model and not tie_emb_seq:
            emb_seq = copy.deepcopy(emb_seq)

        if nsp_init == "eos":
            _check_end_token(tokenizer, emb_seq_tokenizer)
        old_size, old_emb_seq_size = len(tokenizer), len(emb_seq_tokenizer)
        nsp_token_id, cs_token_id, ce_token_id = add_control_tokens(tokenizer, control_tokens)
        templates.settle_chat_template(tokenizer)
        emb_seq_nsp_token_id = nsp_token_id
        if emb_seq_tokenizer is not tokenizer:
            emb_seq_nsp_token_id = add_control_tokens(emb_seq_tokenizer, control_tokens)[0]
        _grow_embeddings(gen, old_size, tokenizer, nsp_token_id, nsp_init)
        if not tie_emb_seq:
            _grow_embeddings(emb_seq, old_emb_seq_size, emb_seq_tokenizer, emb_seq_nsp_token_id, nsp_init)
        if query_encoder is not None:
            _grow_embeddings(query_encoder, old_emb_seq_size, emb_seq_tokenizer, emb_seq_nsp_token_id, nsp_init)

        if emb_head is not None and tie_emb_seq:
            config.setdefault("emb_head_size", len(emb_head))
        # deep copies, because a composite config resets the attention implementation of its parts
        cosup_config = CoSupConfig(
            gen_config=copy.deepcopy(gen.config),
            emb_seq_config=None if tie_emb_seq else copy.deepcopy(emb_seq.config),
            query_encoder_config=None if query_encoder is None else copy.deepcopy(query_encoder.config),
            gen_name_or_path=_repository_of(gen),
            emb_seq_name_or_path=None if tie_emb_seq else _repository_of(emb_seq),
            query_encoder_name_or_path=None if query_encoder is None else _repository_of(query_encoder),
            nsp_token_id=nsp_token_id,
            cs_token_id=cs_token_id,
            ce_token_id=ce_token_id,
            dtype=gen.dtype,
            **config,
        )
        check_passage_length(cosup_config, emb_seq_tokenizer)
        model = cls(cosup_config, gen, None if tie_emb_seq else emb_seq, query_encoder).train(gen.training)
        if model.emb_head is not None:
            model.emb_head.to(device=emb_seq.device, dtype=emb_seq.dtype)
            if emb_head is not None:
                model.emb_head.load_state_dict({"weight": emb_head})
        elif emb_head is not None:
            raise ValueError(
                f"emb_head of shape {tuple(emb_head.shape)} was given, and this model has no emb_head: set"
                f" emb_head_size={len(emb_head)}."
            )
        model._tokenizer, model._emb_seq_tokenizer = tokenizer, emb_seq_tokenizer
        model._set_generation_defaults(tokenizer)
        model._check_lm_head()
        checks.check_built(model)
        return model

    def resize_token_embeddings(
        self, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None, mean_resizing: bool = True
    ) -> nn.Embedding:
        """
        Resize Gen's embeddings. Emb_seq and a query encoder get rows for new tokens only if they read Gen's tokenizer.

        It takes the arguments of `PreTrainedModel.resize_token_embeddings`.
        """
        embeddings = self.gen.resize_token_embeddings(new_num_tokens, pad_to_multiple_of, mean_resizing)
        self.config.get_text_config().vocab_size = embeddings.weight.shape[0]
        if self.config.tie_emb_seq or not self._has_tokenizer() or self.emb_seq_tokenizer is not self.tokenizer:
            return embeddings
        size = len(self.tokenizer)
        for role in ("emb_seq", "query_encoder"):
            encoder = cast(PreTrainedModel | None, getattr(self, role))
            if encoder is not None and cast(nn.Embedding, encoder.get_input_embeddings()).weight.shape[0] < size:
                encoder.resize_token_embeddings(size, mean_resizing=mean_resizing)
                getattr(self.config, f"{role}_config").get_text_config().vocab_size = size
        return embeddings

    def _set_generation_defaults(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Make the generation config greedy, let it end at every end-of-turn id, and never sample `[Cs]`."""
        ends = {end_of_turn_token_id(tokenizer), tokenizer.eos_token_id}
        if self.gen.generation_config is not None:
            gen_ends = self.gen.generation_config.eos_token_id
            ends.update(gen_ends if isinstance(gen_ends, list) else [gen_ends])
        self.generation_config = GenerationConfig(
            do_sample=False,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=sorted(id for id in ends if id is not None),
            pad_token_id=tokenizer.pad_token_id,
            suppress_tokens=[self.config.cs_token_id],
        )
        for config in (self.config, self.config.get_text_config()):  # or Trainer would align them, with a warning
            for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
                setattr(config, name, getattr(tokenizer, name))

    @torch.no_grad()
    def _check_lm_head(self) -> None:
        """Check that Gen's logits are `_lm_head` of its last hidden state: losses and generation rely on it."""
        if self.gen.config._attn_implementation not in ("eager", "sdpa"):
            return  # flash kernels may not run on the device on which the model is built
        input_ids = torch.tensor([[0, self.config.nsp_token_id]], device=self.device)
        was_training = self.training
        self.eval()
        expected = self.gen(input_ids=input_ids, use_cache=False).logits
        hidden = self.gen.base_model(input_ids=input_ids, use_cache=False).last_hidden_state
        logits = self._lm_head(hidden)
        self.train(was_training)
        if not torch.allclose(expected, logits, atol=1e-4, rtol=1e-3):
            raise ValueError(
                f"{type(self.gen).__name__} does more after its LM head than CoSup knows of, so its losses would be"
                " wrong."
            )


# ---------------------------------------------------------------------- sources


def _package_modules() -> tuple[ModuleType, ModuleType, ModuleType]:
    """
    Return the modules [`sources_cosup`], [`checks_cosup`] and [`templates_cosup`].

    transformers copies relatively imported files to a checkpoint, so the import below is absolute: nobody should have
    to review the readers of other formats before trusting a checkpoint.

    Raises:
        `ImportError`: in a process that has only a checkpoint's code.
    """
    try:
        from modeling_cosup import checks_cosup, sources_cosup, templates_cosup
    except ImportError as error:
        raise ImportError(
            "Building a model from two others needs the package cosup, which does not come with a checkpoint."
        ) from error
    return sources_cosup, checks_cosup, templates_cosup


def _path_as_string(part: Any) -> Any:
    """Return a path as a string; return a name, a model or `None` unchanged."""
    if isinstance(part, os.PathLike):
        return os.fspath(part)
    return part


def _repository_of(model: PreTrainedModel) -> str | None:
    """Return the repository that a model was loaded from, `None` for a local folder."""
    name = model.config._name_or_path
    return name if is_repo_id(name) else None


# ---------------------------------------------------------------------- embeddings and lengths


def _check_end_token(*tokenizers: PreTrainedTokenizerBase) -> None:
    """Check that each tokenizer has the token whose row `nsp_init="eos"` copies, before any of them is changed."""
    for tokenizer in tokenizers:
        if not bos_and_eos(tokenizer)[1]:
            raise ValueError(
                f"nsp_init='eos' copies the row of the token that ends a passage, and {type(tokenizer).__name__} has"
                " neither an EOS nor a SEP token: use 'mean', or set tokenizer.eos_token."
            )


@torch.no_grad()
def _grow_embeddings(
    model: PreTrainedModel, old_size: int, tokenizer: PreTrainedTokenizerBase, nsp_token_id: int, nsp_init: str
) -> None:
    """
    Make room for the tokens of a tokenizer, in the LM head too.

    Rows from `old_size` on, and rows that the model lacked, become the mean of the rows before. With `nsp_init="eos"`
    the input row of `[NSP]`, if it is one of them, becomes that of EOS.
    """
    new_size = len(tokenizer)
    size = cast(nn.Embedding, model.get_input_embeddings()).weight.shape[0]
    old_size = min(old_size, size)
    if size < new_size:
        model.resize_token_embeddings(new_size, mean_resizing=False)
    embedding = cast(nn.Embedding, model.get_input_embeddings())
    weights = {}  # by id, so that tied weights count once
    for layer in (embedding, model.get_output_embeddings()):
        if layer is not None:
            weights[id(layer.weight)] = cast(torch.Tensor, layer.weight)
    for weight in weights.values():
        weight[old_size:new_size] = weight[:old_size].float().mean(0).to(weight.dtype)
    if nsp_init == "eos" and nsp_token_id >= old_size:
        (eos_token_id,) = bos_and_eos(tokenizer)[1]
        embedding.weight[nsp_token_id] = embedding.weight[eos_token_id]


def check_passage_length(config: CoSupConfig, emb_seq_tokenizer: PreTrainedTokenizerBase | None = None) -> None:
    """Check that the longest passage fits into Emb_seq's positions, with BOS and EOS if a tokenizer names them."""
    longest = limit = num_positions(config.emb_seq_config)
    if longest is None:
        return
    if emb_seq_tokenizer is not None:
        bos, eos = added_tokens(emb_seq_tokenizer, config)
        longest -= len(bos) + len(eos)
    if config.max_passage_length > longest:
        raise ValueError(
            f"max_passage_length={config.max_passage_length}, BOS and EOS do not fit into Emb_seq's {limit} positions:"
            f" it may be {longest} at most."
        )
