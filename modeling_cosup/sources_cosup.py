"""
What a CoSup model is built from: names, folders and models become two models, two tokenizers and settings.

Only authors need this; a checkpoint holds the parts.
"""

import functools
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForTextEncoding,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging

from .adapters_cosup import base_error, find_adapter, load_merged, merge_adapters
from .architectures_cosup import encoder_auto_class
from .checks_cosup import check_causal, check_config, check_part, check_weights
from .configuration_cosup import CoSupConfig
from .hub_cosup import HUB_OPTIONS
from .retriever_files_cosup import DECIDED_BY_FILES, RetrieverFacts, emb_seq_settings, read_retriever
from .source_files_cosup import SourceFiles
from .tokenization_cosup import same_tokenizer

logger = logging.get_logger(__name__)


@dataclass
class Parts:
    """
    The parts of a CoSup model, before they are put together.

    Args:
        gen, emb_seq, query_encoder (`PreTrainedModel`): without adapters; the last may be `None`.
        tokenizer, emb_seq_tokenizer (`PreTrainedTokenizerBase`): the same object twice if they read every text alike.
        settings (`dict`): fields of `CoSupConfig`.
        emb_head (`torch.Tensor` of shape `(h, h_emb)`, *optional*): weight of `emb_head`.
    """

    gen: PreTrainedModel
    emb_seq: PreTrainedModel
    query_encoder: PreTrainedModel | None
    tokenizer: PreTrainedTokenizerBase
    emb_seq_tokenizer: PreTrainedTokenizerBase
    settings: dict[str, Any]
    emb_head: torch.Tensor | None


def read_parts(
    gen: Any,
    emb_seq: Any,
    query_encoder: Any,
    tokenizer: Any,
    emb_seq_tokenizer: Any,
    emb_head: torch.Tensor | None,
    model_kwargs: Mapping[str, Any],
    settings: Mapping[str, Any],
) -> Parts:
    """
    Read the parts of a CoSup model; see `CoSupForCausalLM.from_gen_and_emb_seq` for the arguments.

    Small files are read and checked before any weights are.

    Raises:
        `TypeError`: for a part that is no model.
        `ValueError`: for settings that contradict the files of a retriever, for weights that are missing, and for an
            adapter that cannot be merged.
        `OSError`: for a name that cannot be loaded.
    """
    for option in ("subfolder", "gguf_file"):
        if option in model_kwargs:
            raise ValueError(
                f"model_kwargs has {option!r}, which would apply to every part: pass the loaded model in place of its"
                " name."
            )
    hub_options = _hub_options(model_kwargs)
    settings = {name: value for name, value in settings.items() if value is not None}
    has_query_prompt = "query_prompt" in settings
    if tokenizer is None and not isinstance(gen, str):
        raise ValueError("Gen was given as a model; pass its tokenizer as `tokenizer=`.")
    tokenizer = load_tokenizer(gen if tokenizer is None else tokenizer, hub_options=hub_options)

    retriever = RetrieverFacts()
    is_retriever = False
    if isinstance(emb_seq, str):
        facts = read_retriever(emb_seq, hub_options=hub_options)
        is_retriever = facts is not None
        retriever = facts or retriever
        if emb_seq_tokenizer is None and (is_retriever or emb_seq != gen):
            emb_seq_tokenizer = load_tokenizer(emb_seq, retriever.subfolder, hub_options)
    if emb_seq_tokenizer is None:
        emb_seq_tokenizer = tokenizer
    emb_seq_tokenizer = load_tokenizer(emb_seq_tokenizer, hub_options=hub_options)
    if is_retriever:
        config = load_config(emb_seq, retriever.subfolder, hub_options)
        settings = emb_seq_settings(emb_seq, retriever, emb_seq_tokenizer, config, settings)

    query_subfolder = retriever.subfolder
    if isinstance(query_encoder, str) and query_encoder != emb_seq:
        query_subfolder, query_prompt = read_query_encoder(
            query_encoder, emb_seq_tokenizer, retriever.head, settings, hub_options
        )
        if query_prompt is not None and not has_query_prompt:
            settings["query_prompt"] = query_prompt
    if same_tokenizer(tokenizer, emb_seq_tokenizer):
        emb_seq_tokenizer = tokenizer

    sources = (("gen", gen, ""), ("emb_seq", emb_seq, retriever.subfolder))
    for role, source, subfolder in (*sources, ("query_encoder", query_encoder, query_subfolder)):
        if isinstance(source, str):
            check_config(load_config(source, subfolder, hub_options), role)
        elif isinstance(source, PreTrainedModel):
            check_config(source.config, role)
    gen = load_gen(gen, model_kwargs)
    if emb_seq is None:
        emb_seq = gen.base_model
    else:
        emb_seq = load_encoder(emb_seq, "emb_seq", model_kwargs, retriever.subfolder)
    if query_encoder is not None:
        query_encoder = load_encoder(query_encoder, "query_encoder", model_kwargs, query_subfolder)
    for role, part in (("gen", gen), ("emb_seq", emb_seq), ("query_encoder", query_encoder)):
        if part is not None:
            check_part(part, role)
    if settings.get("tie_emb_seq"):
        check_causal(gen)
    if emb_head is None and retriever.head is not None:
        emb_head = fitting_head(retriever.head, gen.config, settings.get("query_from"))
        if emb_head is None:
            logger.warning(
                f"The dense layer of {emb_seq.config._name_or_path} is left out: its output is {len(retriever.head)}"
                f" wide, Gen is {gen.config.get_text_config().hidden_size} wide."
            )
        else:
            settings["emb_head_size"] = len(emb_head)
    to_one_dtype({"Gen": gen, "Emb_seq": emb_seq, "the query encoder": query_encoder})
    return Parts(gen, emb_seq, query_encoder, tokenizer, emb_seq_tokenizer, settings, emb_head)


def to_one_dtype(parts: Mapping[str, PreTrainedModel | None]) -> None:
    """
    Bring the parts of a model to one dtype, in which none loses precision; a checkpoint is loaded in one dtype.

    Quantised and offloaded parts stay as they are.

    Args:
        parts (`dict[str, PreTrainedModel]`): by their names in the warning; changed in place.
    """
    plain: dict[str, PreTrainedModel] = {}
    for name, part in parts.items():
        if part is None or getattr(part, "hf_quantizer", None) is not None:
            continue
        if not any(weight.is_meta for weight in part.parameters()):
            plain[name] = part
    dtypes = {name: part.dtype for name, part in plain.items()}
    if len(set(dtypes.values())) < 2:
        return
    widest = functools.reduce(torch.promote_types, dtypes.values())
    given = ", ".join(f"{name} is in {str(dtype).removeprefix('torch.')}" for name, dtype in dtypes.items())
    size = sum(part.num_parameters() for part in plain.values()) * widest.itemsize / 1e9
    logger.warning(
        f"{given}: all become {str(widest).removeprefix('torch.')}, in which none loses precision and which takes"
        f" {size:,.1f} GB. To have another, load them in it, for example with dtype='bfloat16'."
    )
    for part in plain.values():
        cast(torch.nn.Module, part).to(widest)
        part.config.dtype = widest


def fitting_head(head: torch.Tensor, gen_config: PreTrainedConfig, query_from: str | None) -> torch.Tensor | None:
    """Return the dense layer of a retriever; `None` if Gen makes the queries and has another width."""
    if query_from in (None, "gen") and len(head) != gen_config.get_text_config().hidden_size:
        return None
    return head


def read_query_encoder(
    name: str,
    emb_seq_tokenizer: PreTrainedTokenizerBase,
    emb_seq_head: torch.Tensor | None,
    settings: Mapping[str, Any],
    hub_options: Mapping[str, Any],
) -> tuple[str, str | None]:
    """
    Read the files of a query encoder, which must read, pool and compare as Emb_seq does.

    Args:
        name (`str`): repository or folder.
        emb_seq_tokenizer (`PreTrainedTokenizerBase`): Emb_seq's.
        emb_seq_head (`torch.Tensor` of shape `(h, h_emb)`, *optional*): weight of Emb_seq's dense layer.
        settings (`dict`): fields of `CoSupConfig`.
        hub_options (`dict`): `revision`, `token` and other options of a download.

    Returns:
        `(subfolder, query_prompt)`: the folder of its transformer, and the prompt that its files name, if any.

    Raises:
        `ValueError`: names the first difference.
    """
    facts = read_retriever(name, hub_options=hub_options)
    subfolder = "" if facts is None else facts.subfolder
    try:
        tokenizer = load_tokenizer(name, subfolder, hub_options)
    except (OSError, ValueError):  # it has none, and reads the tokens of Emb_seq's tokenizer
        tokenizer = emb_seq_tokenizer
    query_prompt = None
    if facts is not None:
        config = load_config(name, subfolder, hub_options)
        stated = emb_seq_settings(name, facts, tokenizer, config, {"query_from": "query_encoder"})
        query_prompt = stated["query_prompt"]
        for setting in DECIDED_BY_FILES:
            expected = settings.get(setting, getattr(CoSupConfig, setting))
            if stated[setting] != expected:
                raise ValueError(
                    f"The query encoder {name} has {setting} {stated[setting]}, Emb_seq has {expected}:"
                    " the two must pool and compare alike."
                )
        if facts.head is not None and (emb_seq_head is None or not torch.equal(facts.head, emb_seq_head)):
            raise ValueError(f"The query encoder {name} has a dense layer that Emb_seq does not have.")
    if not same_tokenizer(tokenizer, emb_seq_tokenizer):
        raise ValueError(f"The query encoder {name} has another tokenizer than Emb_seq: the two must read text alike.")
    return subfolder, query_prompt


# ---------------------------------------------------------------------- loading


def _hub_options(model_kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of a model that its config, tokenizer and single files need too."""
    names = (*HUB_OPTIONS, "trust_remote_code", "code_revision")
    return {name: model_kwargs[name] for name in names if name in model_kwargs}


def load_tokenizer(source: Any, subfolder: str = "", hub_options: Mapping[str, Any] | None = None) -> Any:
    """Return a given tokenizer, or load one by name or path. An adapter may use the tokenizer of its base."""
    if not isinstance(source, str | os.PathLike):
        return source
    name, options = os.fspath(source), dict(hub_options or {})
    adapter = find_adapter(name, subfolder, options)
    if adapter is not None:
        prefix = f"{subfolder}/" if subfolder else ""
        if SourceFiles(name, options).find(f"{prefix}tokenizer_config.json") is None:
            return load_tokenizer(adapter.base, hub_options=adapter.base_options(options))
    return AutoTokenizer.from_pretrained(name, subfolder=subfolder, **options)


def load_config(name: str, subfolder: str = "", hub_options: Mapping[str, Any] | None = None) -> PreTrainedConfig:
    """Load the config of a model. For an adapter, load the config of its base model."""
    options = dict(hub_options or {})
    adapter = find_adapter(name, subfolder, options)
    if adapter is None:
        return AutoConfig.from_pretrained(name, subfolder=subfolder, **options)
    try:
        return AutoConfig.from_pretrained(adapter.base, **adapter.base_options(options))
    except OSError as error:
        raise base_error(adapter, error) from error


def load_model(auto_class: Any, name: str, model_kwargs: Mapping[str, Any], subfolder: str = "") -> PreTrainedModel:
    """
    Load a model; an adapter is merged into its base.

    Args:
        auto_class: `AutoModelForCausalLM`, or `AutoModel` and its kind.
        name (`str`): repository or folder.
        model_kwargs (`dict`): for its `from_pretrained`. Only safetensors are read, unless it has
            `use_safetensors=None`.
        subfolder (`str`): folder of the model.

    Raises:
        `OSError`: for a model that is missing or damaged, or not in safetensors.
        `ValueError`: for missing weights, which transformers would initialise at random, for weights that belong to
            another config, and for an adapter that cannot be merged.
    """
    model_kwargs = {"use_safetensors": True, **model_kwargs}
    if auto_class is AutoModelForTextEncoding:
        model_kwargs = {**model_kwargs, "is_encoder_decoder": False}  # T5Gemma asks for it
    adapter = find_adapter(name, subfolder, _hub_options(model_kwargs))
    if adapter is not None:
        return load_merged(adapter, auto_class, model_kwargs)
    model, info = auto_class.from_pretrained(name, subfolder=subfolder, output_loading_info=True, **model_kwargs)
    check_weights(model, info, name)
    return model


def load_gen(gen: Any, model_kwargs: Mapping[str, Any]) -> PreTrainedModel:
    """Return a causal language model without adapters, from a name or a model."""
    if isinstance(gen, str):
        return load_model(AutoModelForCausalLM, gen, model_kwargs)
    return without_adapters(gen, "gen")


def load_encoder(encoder: Any, role: str, model_kwargs: Mapping[str, Any], subfolder: str = "") -> PreTrainedModel:
    """Return a model without LM head and adapters, from a name, or a model with or without them."""
    if isinstance(encoder, str):
        auto_class = encoder_auto_class(load_config(encoder, subfolder, _hub_options(model_kwargs)))
        return load_model(auto_class, encoder, model_kwargs, subfolder)
    return cast(PreTrainedModel, without_adapters(encoder, role).base_model)


def without_adapters(model: Any, role: str) -> PreTrainedModel:
    """
    Return a model with its adapters merged.

    Raises:
        `TypeError`: for anything that is no model of transformers.
        `ValueError`: for adapters that cannot be merged.
    """
    merged = merge_adapters(model, role)
    if isinstance(merged, PreTrainedModel):
        return merged
    hint = ""
    if type(model).__module__.startswith("sentence_transformers."):
        hint = " Save it, and pass the folder: its settings are then read too."
    raise TypeError(f"{role} is a {type(model).__name__}, expected a name, a path or a model of transformers.{hint}")
