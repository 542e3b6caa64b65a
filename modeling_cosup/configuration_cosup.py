"""Configuration of a CoSup model: its sub-models, and how passages and queries are embedded and compared."""

import os
import re
from shlex import quote
from typing import Any

from transformers import AutoConfig, PreTrainedConfig
from transformers.utils import logging

from .numbers_cosup import COUNT, NOT_NEGATIVE, POSITIVE, check_numbers

logger = logging.get_logger(__name__)

# Similarity, temperature and λ belong together: the dot product of two final-norm states starts near |h|² ≈ 1,200
SIMILARITY_DEFAULTS = {
    "cosine": {"temperature": 0.05, "nsp_loss_weight": 1.0},
    "dot": {"temperature": 1.0, "nsp_loss_weight": 0.01},  # the paper's
}
QUERY_SOURCES = ("gen", "emb_seq", "query_encoder")
POOLINGS = ("eos", "lasttoken", "mean", "cls")
NUMBERS = {
    "temperature": POSITIVE,
    "nsp_loss_weight": NOT_NEGATIVE,
    "max_passage_length": COUNT,
    "emb_head_size": COUNT,
    "truncate_dim": COUNT,
}
# Embedding settings that indexes of earlier releases do not record, with the values that applied then.
EARLIER_EMBEDDING_SETTINGS = {
    "emb_seq_add_bos_token": True,
    "emb_seq_add_eos_token": True,
    "passage_prompt": "",
    "truncate_dim": None,
}


class CoSupConfig(PreTrainedConfig):
    r"""
    Configuration of [`CoSupForCausalLM`].

    Args:
        gen_config (`PreTrainedConfig` or `dict`): configuration of Gen, any `AutoModelForCausalLM` architecture.
        emb_seq_config (`PreTrainedConfig` or `dict`): configuration of Emb_seq, any `AutoModel` architecture. Gen's
            with `tie_emb_seq`.
        tie_emb_seq (`bool`): one tied model: Gen's body is also Emb_seq. `False` is two towers (the paper).
        query_encoder_config (`PreTrainedConfig` or `dict`, *optional*): only with `query_from="query_encoder"`.
        nsp_token_id, cs_token_id, ce_token_id (`int`, *optional*): ids of `[NSP]`, `[Cs]` and `[CE]` in Gen's
            tokenizer. Without `nsp_token_id` the model is plain Gen.
        similarity (`str`): `"cosine"` or `"dot"` (the paper).
        temperature (`float`, *optional*): divides the scores of the NSP loss; by default 0.05 (cosine) or 1.0 (dot).
        nsp_loss_weight (`float`, *optional*): λ of Eq. 5, L = L_NTP + λ·L_NSP; by default 1.0 (cosine) or 0.01
            (dot).
        query_from (`str`): where a query embedding comes from. `"gen"`: Gen's last hidden state at `[NSP]` (the
            method). `"emb_seq"`: Emb_seq reads everything up to and including `[NSP]` (the paper's baseline,
            section 5). `"query_encoder"`: a third encoder reads it (appendix C.1).
        emb_seq_pooling (`str`): `"eos"` (the paper), `"lasttoken"` (whichever token is last), `"mean"` or `"cls"`.
        emb_seq_add_bos_token, emb_seq_add_eos_token (`bool`): whether Emb_seq reads BOS (or CLS) before a passage,
            and EOS (or SEP) after it.
        emb_head_size (`int`, *optional*): output width of `emb_head`. If set, there is an `emb_head` even if Emb_seq
            already has this width. By default there is one only if Gen makes the queries and Emb_seq has another
            width. In two towers, `emb_head` maps passages to the width of Gen's queries, so it must be that width. In
            a tied model it maps queries and passages, to any width.
        truncate_dim (`int`, *optional*): keep only the first dimensions of query and passage embeddings, before they
            get unit length: a smaller index, at some loss. It may be set when a checkpoint is loaded. An index works
            only with the value that it was built with. See `matryoshka_dims` of `CoSupTrainingArguments`.
        passage_template (`str`): how a passage is rendered for Gen and Emb_seq. One without a title is its text alone.
        passage_prompt (`str`): text that Emb_seq, but not Gen, reads before every passage; some retrievers need one.
        query_prompt (`str`): text before every query, if Emb_seq or a query encoder reads queries.
        max_passage_length (`int`): the most tokens of a passage; longer ones are truncated. For Emb_seq the tokens of
            `passage_prompt` count, but BOS and EOS do not.
        load_emb_seq (`bool`): `False` leaves out Emb_seq, which generation from an index does not need. The choice is
            never saved.
        gen_name_or_path, emb_seq_name_or_path, query_encoder_name_or_path (`str`, *optional*): repositories on the Hub
            that the parts were made from, for the model card.
        fingerprint (`dict`, *optional*): written by `save_pretrained`; see `CoSupForCausalLM.fingerprint`.

    Raises:
        `ValueError`: on an unknown similarity, query source or pooling, a number that is out of range, a template
            without `{text}` or with another placeholder, a query encoder that is missing or has another width than
            Emb_seq, a tied model with an Emb_seq or queries of its own, or settings that contradict each other.
    """

    model_type = "cosup"
    sub_configs = {"gen_config": AutoConfig, "emb_seq_config": AutoConfig, "query_encoder_config": AutoConfig}

    gen_config: Any = None  # dict or PreTrainedConfig; after __post_init__ a PreTrainedConfig
    emb_seq_config: Any = None
    query_encoder_config: Any = None
    tie_emb_seq: bool = False
    nsp_token_id: int | None = None
    cs_token_id: int | None = None
    ce_token_id: int | None = None
    similarity: str = "cosine"
    temperature: float | None = None
    nsp_loss_weight: float | None = None
    query_from: str = "gen"
    emb_seq_pooling: str = "eos"
    emb_seq_add_bos_token: bool = True
    emb_seq_add_eos_token: bool = True
    emb_head_size: int | None = None
    truncate_dim: int | None = None
    passage_template: str = "{title} :: {text}"
    passage_prompt: str = ""
    query_prompt: str = ""
    max_passage_length: int = 256
    load_emb_seq: bool = True
    gen_name_or_path: str | None = None
    emb_seq_name_or_path: str | None = None
    query_encoder_name_or_path: str | None = None
    fingerprint: dict | None = None
    tie_word_embeddings: bool = False

    @classmethod
    def get_config_dict(
        cls, pretrained_model_name_or_path: str | os.PathLike[str], **kwargs: Any
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """
        Return the content of a checkpoint's `config.json`, and the unused `kwargs`.

        Raises:
            `ValueError`: for a folder or repository without a CoSup model, whose parts would be made up; and for a
                `tie_emb_seq` that differs from the checkpoint's, which holds the weights of one model or of two.
        """
        name = pretrained_model_name_or_path
        config, unused_kwargs = super().get_config_dict(name, **kwargs)
        model_type = config.get("model_type")
        if model_type is None:
            raise ValueError(
                f"{name} holds no config.json of a CoSup model; for adapters, give the checkpoint that"
                " merge_and_unload() and save_pretrained() make."
            )
        if model_type != cls.model_type:
            raise ValueError(
                f"{name} is a plain {model_type} model, not a CoSup checkpoint: build one from it with"
                f" CoSupForCausalLM.from_gen_and_emb_seq({str(name)!r}), or with recipes/train.py --gen"
                f" {quote(str(name))}."
            )
        is_tied = config.get("tie_emb_seq", False)
        if unused_kwargs.get("tie_emb_seq") is None:
            unused_kwargs.pop("tie_emb_seq", None)
        elif unused_kwargs["tie_emb_seq"] != is_tied:
            kind = "one tied model" if is_tied else "two towers, whose weights differ"
            raise ValueError(
                f"tie_emb_seq={not is_tied}: the checkpoint {name} holds {kind}. Build a new model with"
                f" from_gen_and_emb_seq(gen, tie_emb_seq={not is_tied})."
            )
        similarity = unused_kwargs.get("similarity", config.get("similarity"))
        is_complete = all(unused_kwargs.get(setting) is not None for setting in ("temperature", "nsp_loss_weight"))
        if similarity != config.get("similarity") and not is_complete:
            logger.warning(
                f"similarity={similarity!r} keeps the temperature and λ of the checkpoint {name}, which suit"
                f" {config.get('similarity')!r}: give temperature and nsp_loss_weight too."
            )
        return config, unused_kwargs

    def __post_init__(self, **kwargs: Any) -> None:
        self._check_choices()
        defaults = SIMILARITY_DEFAULTS[self.similarity]
        if self.temperature is None:
            self.temperature = defaults["temperature"]
        if self.nsp_loss_weight is None:
            self.nsp_loss_weight = defaults["nsp_loss_weight"]
        self._check_tied()
        self._make_sub_configs()
        self.check()
        # peft and transformers look for weight tying on the outermost config
        self.tie_word_embeddings = bool(self.gen_config.get_text_config().tie_word_embeddings)
        # AutoModel loads the same class as AutoModelForCausalLM: its forward returns embeddings too
        self.auto_map = {
            "AutoConfig": "configuration_cosup.CoSupConfig",
            "AutoModel": "modeling_cosup.CoSupForCausalLM",
            "AutoModelForCausalLM": "modeling_cosup.CoSupForCausalLM",
        }
        kwargs.pop("auto_map", None)
        super().__post_init__(**kwargs)

    def check(self) -> None:
        """
        Check all settings. A model calls this too, because settings can be changed after its config is made.

        Raises:
            `ValueError`: names the setting.
        """
        self._check_choices()
        self._check_settings()
        self._check_tied()
        self._check_widths()

    def _check_choices(self) -> None:
        choices = {"similarity": tuple(SIMILARITY_DEFAULTS), "query_from": QUERY_SOURCES, "emb_seq_pooling": POOLINGS}
        for name, known in choices.items():
            value = getattr(self, name)
            if value not in known:
                raise ValueError(f"CoSupConfig.{name} is {value!r}, expected one of {', '.join(map(repr, known))}.")

    def _check_settings(self) -> None:
        """Check numbers, the passage template, the query prompt, and that pooling can read an EOS if it needs one."""
        check_numbers(self, NUMBERS, optional=("emb_head_size", "truncate_dim"), prefix="CoSupConfig.")
        placeholders = set(re.findall(r"\{\w+\}", self.passage_template))
        if "{text}" not in placeholders or not placeholders <= {"{title}", "{text}"}:
            raise ValueError(
                f"CoSupConfig.passage_template is {self.passage_template!r}, expected a template that holds {{text}},"
                " and {title} if you want it, but no other placeholder."
            )
        if self.emb_seq_pooling == "eos" and not self.emb_seq_add_eos_token:
            raise ValueError(
                "emb_seq_pooling='eos' reads the EOS that emb_seq_add_eos_token=False leaves out; use 'lasttoken'"
                " for a passage's last token."
            )
        if self.query_prompt and self.query_from == "gen":
            raise ValueError(
                f"query_prompt is {self.query_prompt!r}, but Gen makes the queries (query_from='gen'): no encoder"
                " would read it."
            )

    def _check_tied(self) -> None:
        """Check that in a tied model nothing but Gen's body makes the embeddings."""
        if not self.tie_emb_seq:
            return
        check_tied_settings(self.query_from, self.emb_seq_pooling)
        if self.emb_seq_config is not None and self.emb_seq_config is not self.gen_config:
            raise ValueError("tie_emb_seq=True with an emb_seq_config: a tied model has no Emb_seq of its own.")

    def _make_sub_configs(self) -> None:
        """Turn the dictionaries of sub-models into configurations; Gen and Emb_seq default to Llama."""
        for name in self.sub_configs:
            if name == "emb_seq_config" and self.tie_emb_seq:
                self.emb_seq_config = self.gen_config
                continue
            sub_config = getattr(self, name)
            if sub_config is None and name != "query_encoder_config":
                sub_config = {"model_type": "llama"}
            if isinstance(sub_config, dict):
                options = dict(sub_config)
                setattr(self, name, AutoConfig.for_model(options.pop("model_type"), **options))

    def _check_widths(self) -> None:
        """Check the widths of the query encoder and of `emb_head`, and `truncate_dim`."""
        if self.query_from == "query_encoder":
            width = None
            if self.query_encoder_config is not None:
                width = self.query_encoder_config.get_text_config().hidden_size
            expected = self.emb_seq_config.get_text_config().hidden_size
            if width != expected:
                raise ValueError(
                    f"query_from='query_encoder' needs a query encoder of Emb_seq's width, {expected}, found {width}."
                )
        if self.query_from == "gen" and self.emb_head_size not in (None, self.full_embedding_size):
            raise ValueError(
                f"emb_head_size is {self.emb_head_size}, but Gen makes the queries: expected its width,"
                f" {self.full_embedding_size}. Only in a tied model (tie_emb_seq=True) may it differ."
            )
        if self.truncate_dim is not None and not 0 < self.truncate_dim <= self.full_embedding_size:
            raise ValueError(
                f"truncate_dim is {self.truncate_dim}, expected at least 1 and at most {self.full_embedding_size}, the"
                " width of the embeddings."
            )

    def get_text_config(self, *args: Any, **kwargs: Any) -> PreTrainedConfig:
        """Return Gen's text config: generation reads vocabulary, width and depth from it."""
        return self.gen_config.get_text_config(*args, **kwargs)

    @property
    def embedding_size(self) -> int:
        """Width of query and passage embeddings."""
        return self.truncate_dim or self.full_embedding_size

    @property
    def full_embedding_size(self) -> int:
        """Width before `truncate_dim`: Gen's if it makes the queries of two towers, else `emb_head`'s or Emb_seq's."""
        if self.query_from == "gen" and not self.tie_emb_seq:
            return self.gen_config.get_text_config().hidden_size
        return self.emb_head_size or self.emb_seq_config.get_text_config().hidden_size

    @property
    def needs_emb_head(self) -> bool:
        """Whether a linear map, `emb_head`, follows Emb_seq: to reach Gen's width, or if `emb_head_size` is set."""
        if self.emb_head_size is not None:
            return True
        return self.emb_seq_config.get_text_config().hidden_size != self.full_embedding_size

    @property
    def embedding_settings(self) -> dict[str, str | int | None]:
        """Settings that passage embeddings depend on; an index compares them (see `PassageIndex.check_model`)."""
        names = ["similarity", "emb_seq_pooling", "passage_template", "max_passage_length"]
        names += EARLIER_EMBEDDING_SETTINGS.keys()
        return {name: getattr(self, name) for name in names}

    def to_dict(self) -> dict[str, Any]:
        output = super().to_dict()
        output.pop("load_emb_seq", None)  # a choice of the process that loads, not of the checkpoint
        if self.tie_emb_seq:
            output.pop("emb_seq_config", None)  # it is Gen's
        for name in self.sub_configs:
            if isinstance(output.get(name), dict):
                # the local folder of a part is private; `gen_name_or_path` has what may be published
                output[name].pop("_name_or_path", None)
        return output


def check_tied_settings(query_from: str | None, emb_seq_pooling: str | None) -> None:
    """Raise a `ValueError` for settings that no tied model can have; `None` stands for a setting's default."""
    if query_from not in (None, "gen"):
        raise ValueError(
            f"tie_emb_seq=True with query_from={query_from!r}: Gen makes the queries of a tied model, at [NSP]. Leave"
            " out one of the two."
        )
    if emb_seq_pooling == "cls":
        raise ValueError(
            "tie_emb_seq=True with emb_seq_pooling='cls': Gen reads from left to right, so the first state of every"
            " passage is the same. Use 'eos'."
        )


CoSupConfig.register_for_auto_class()
