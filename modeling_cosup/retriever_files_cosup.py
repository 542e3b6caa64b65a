"""
Settings of a retriever, from its files: how sentence-transformers reads, pools, prompts and compares.

Only authors need this; a checkpoint holds the settings in its config.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import PreTrainedConfig, PreTrainedTokenizerBase
from transformers.utils import logging

from .architectures_cosup import num_positions
from .checks_cosup import check_config
from .source_files_cosup import SourceFiles
from .tokenization_cosup import bos_and_eos

logger = logging.get_logger(__name__)

# Pooling modes by the names of old and new releases of sentence-transformers -> CoSup's names.
POOLINGS = {"cls": "cls", "cls_token": "cls", "mean": "mean", "mean_tokens": "mean", "lasttoken": "lasttoken"}
MODULE_KINDS = ("Transformer", "Pooling", "Dense", "Normalize")
SUPPORTED = (
    "Supported are Transformer, Pooling (mean, cls or lasttoken), Dense (no bias, no activation) and Normalize, "
    "in this order"
)
# Settings of the Transformer module, by their names in old and new releases.
TRANSFORMER_FILES = ("sentence_bert_config.json", "sentence_roberta_config.json", "sentence_xlm-roberta_config.json")
LOADING_OPTIONS = (
    "model_args",
    "model_kwargs",
    "tokenizer_args",
    "processor_kwargs",
    "processing_kwargs",
    "config_args",
    "config_kwargs",
)
HARMLESS_OPTIONS = {"attn_implementation", "dtype", "torch_dtype", "trust_remote_code", "use_safetensors"}
# Settings that change an embedding, with the only value that Emb_seq can follow.
TRANSFORMER_DEFAULTS = {
    "transformer_task": "feature-extraction",
    "module_output_name": "token_embeddings",
    "query_length": None,
    "document_length": None,
    "query_expansion": None,
}
# Settings of Emb_seq that its files decide: another choice would make other embeddings.
DECIDED_BY_FILES = ("emb_seq_pooling", "similarity", "emb_seq_add_bos_token", "emb_seq_add_eos_token")


@dataclass
class RetrieverFacts:
    """
    Facts from the files of sentence-transformers; the defaults are for a plain encoder, which has no such files.

    Args:
        settings (`dict`): fields of `CoSupConfig`.
        subfolder (`str`): folder of the transformer.
        head (`torch.Tensor` of shape `(h, h_emb)`, *optional*): weight of the dense layer.
        max_seq_length (`int`, *optional*): maximum number of tokens of a text, special tokens included.
        do_lower_case (`bool`): whether texts are lower-cased before they are tokenized.
    """

    settings: dict[str, Any] = field(default_factory=dict)
    subfolder: str = ""
    head: torch.Tensor | None = None
    max_seq_length: int | None = None
    do_lower_case: bool = False


def emb_seq_settings(
    name: str,
    facts: RetrieverFacts,
    tokenizer: PreTrainedTokenizerBase,
    config: PreTrainedConfig,
    chosen: Mapping[str, Any],
) -> dict[str, Any]:
    """
    Return the settings with which Emb_seq reads, pools and compares as a retriever does.

    Args:
        name (`str`): repository or folder of the retriever.
        facts ([`RetrieverFacts`]): from its files.
        tokenizer (`PreTrainedTokenizerBase`): its tokenizer. BOS and EOS become the tokens that it puts around a text,
            and `model_max_length` the limit of the retriever.
        config (`PreTrainedConfig`): of its transformer.
        chosen (`dict`): fields of `CoSupConfig` that the caller chooses; `None` is no choice. They replace prompts,
            template and length of the files.

    Returns:
        `dict`: fields of `CoSupConfig`.

    Raises:
        `ValueError`: names what Emb_seq cannot do, or the setting that contradicts the files.
    """
    check_config(config, name)
    if facts.do_lower_case and tokenizer("A")["input_ids"] != tokenizer("a")["input_ids"]:
        raise ValueError(
            f"{name}: sentence_bert_config.json says do_lower_case, but the tokenizer keeps upper case; not supported."
        )
    if tokenizer.truncation_side != "right":
        raise ValueError(f"{name}: the tokenizer cuts long texts on the left (truncation_side); not supported.")
    before, after = set_added_tokens(tokenizer, name)
    max_length = facts.max_seq_length or min(tokenizer.model_max_length, num_positions(config) or 512)
    tokenizer.model_max_length = max_length

    settings = {
        **facts.settings,
        "emb_seq_add_bos_token": bool(before),
        "emb_seq_add_eos_token": bool(after),
        "max_passage_length": max_length - len(before) - len(after),
    }
    for setting, value in chosen.items():
        if value is None:
            continue
        stated = settings.get(setting, value)
        if setting in DECIDED_BY_FILES and value != stated:
            raise ValueError(
                f"{setting} is {value}, the files of {name} say {stated}. Leave it out; for another choice, pass the"
                " loaded model in place of its name."
            )
        settings[setting] = value
    if chosen.get("query_from") in (None, "gen") and chosen.get("query_prompt") is None:
        settings.pop("query_prompt", None)  # Gen makes the queries, so nothing reads this prompt
    return settings


def set_added_tokens(tokenizer: PreTrainedTokenizerBase, name: str) -> tuple[list[int], list[int]]:
    """
    Make the tokens that a tokenizer puts around a text its BOS and EOS, unless they already are.

    Returns:
        `(list[int], list[int])`: the ids before and after a text, at most one each.

    Raises:
        `ValueError`: if the tokenizer puts more than one token on a side.
    """
    text = tokenizer("retrieval", add_special_tokens=False)["input_ids"]
    whole = tokenizer("retrieval")["input_ids"]
    starts = [i for i in range(len(whole)) if whole[i : i + len(text)] == text]
    if starts:
        before, after = whole[: starts[0]], whole[starts[0] + len(text) :]
    else:
        before, after = whole, []
    if max(len(before), len(after)) > 1:
        raise ValueError(
            f"The tokenizer of {name} makes {tokenizer.convert_ids_to_tokens(whole)} of 'retrieval'; "
            "expected at most one token on either side."
        )
    bos, eos = bos_and_eos(tokenizer)
    if before and before != bos:
        tokenizer.bos_token = tokenizer.convert_ids_to_tokens(before[0])
    if after and after != eos:
        tokenizer.eos_token = tokenizer.convert_ids_to_tokens(after[0])
    return before, after


# ---------------------------------------------------------------------- sentence-transformers


def read_retriever(
    name: str, allow_pytorch_bin: bool = False, hub_options: Mapping[str, Any] | None = None
) -> RetrieverFacts | None:
    """
    Read what the modules of a sentence-transformers retriever do; return `None` for any other model.

    Args:
        name (`str`): repository or folder.
        allow_pytorch_bin (`bool`): also read a dense layer from `pytorch_model.bin`, with torch's weights_only reader.
        hub_options (`dict`, *optional*): `revision`, `token` and other options of a download.

    Raises:
        `ValueError`: names a module or setting that makes Emb_seq do something it cannot do.
    """
    files = SourceFiles(name, hub_options or {})
    modules = files.read("modules.json")
    if modules is None:
        if not files.known_to_lack("modules.json"):
            logger.warning(
                f"Without the Hub it is unknown whether {name} is a sentence-transformers model: it is read as a plain"
                " encoder, with the pooling and prompts that the options give."
            )
        return None
    kinds = [module_kind(module["type"]) for module in modules]
    expected = ["Transformer", "Pooling", *(kind for kind in ("Dense", "Normalize") if kind in kinds[2:])]
    if kinds != expected:
        unknown = [kind for kind in kinds if kind not in MODULE_KINDS]
        wrong = unknown[0] if unknown else " → ".join(kinds)
        raise ValueError(f"{name}: modules.json lists {wrong}. {SUPPORTED}.")
    for module in modules:
        if module.get("kwargs"):
            raise ValueError(
                f"{name}: modules.json gives {module['type']} the options {module['kwargs']}. {SUPPORTED}."
            )
    paths = {kind: safe_path(name, module["path"]) for kind, module in zip(kinds, modules, strict=True)}

    options = files.read("config_sentence_transformers.json") or {}
    if options.get("model_type", "SentenceTransformer") != "SentenceTransformer":
        raise ValueError(
            f"{name} is a {options['model_type']}; supported are retrievers that make one vector of a text."
        )
    similarity = options.get("similarity_fn_name") or "cosine"
    if "Normalize" in kinds:
        similarity = "cosine"  # every similarity ranks vectors of unit length as the cosine does
    if similarity not in ("cosine", "dot"):
        raise ValueError(
            f"{name}: config_sentence_transformers.json compares by {similarity!r}, expected 'cosine' or 'dot'."
        )
    transformer = read_transformer(files, paths["Transformer"])
    pooling = read_pooling(files, f"{paths['Pooling']}config.json")
    head = read_dense(files, paths["Dense"], allow_pytorch_bin) if "Dense" in paths else None
    return RetrieverFacts(
        settings={"emb_seq_pooling": pooling, "similarity": similarity, **read_prompts(options)},
        subfolder=paths["Transformer"].rstrip("/"),
        head=head,
        max_seq_length=transformer.get("max_seq_length"),
        do_lower_case=transformer.get("do_lower_case", False),
    )


def module_kind(type_name: str) -> str:
    """Return the class name of a module of sentence-transformers itself, or the full name of any other module."""
    if type_name.startswith("sentence_transformers."):
        return type_name.rpartition(".")[2]
    return type_name


def safe_path(name: str, path: str) -> str:
    """Return the `path` of a module as a prefix of file names: empty, or with a slash at its end."""
    if PurePosixPath(path).is_absolute() or ".." in PurePosixPath(path).parts:
        raise ValueError(f"{name}: modules.json leads out of the folder, to {path!r}.")
    return f"{path}/" if path else ""


def read_transformer(files: SourceFiles, path: str) -> dict[str, Any]:
    """
    Return the settings of a Transformer module.

    Raises:
        `ValueError`: for a setting that changes an embedding and that Emb_seq cannot follow.
    """
    settings: dict[str, Any] = {}
    file = TRANSFORMER_FILES[0]
    for file in TRANSFORMER_FILES:
        settings = files.read(f"{path}{file}") or {}
        if settings:
            break
    for setting, expected in TRANSFORMER_DEFAULTS.items():
        value = settings.get(setting, expected)
        if value != expected:
            raise ValueError(
                f"{files.name}: {path}{file} sets {setting} to {value!r}, expected {expected!r}: not supported."
            )
    for setting in LOADING_OPTIONS:
        unknown = sorted(set(settings.get(setting) or {}) - HARMLESS_OPTIONS)
        if unknown:
            raise ValueError(f"{files.name}: {path}{file} sets {unknown[0]} in {setting}: not supported.")
    return settings


def read_pooling(files: SourceFiles, file: str) -> str:
    """Return the only pooling mode of a Pooling module, by its name in CoSup."""
    config = files.read(file) or {}
    modes: Any = []
    if "pooling_mode" in config:
        modes = config["pooling_mode"] or []
    else:  # older releases have a flag for each mode
        for key, is_on in config.items():
            if key.startswith("pooling_mode_") and is_on:
                modes.append(key.removeprefix("pooling_mode_"))
    if isinstance(modes, str):
        modes = [modes]
    if len(modes) != 1 or modes[0] not in POOLINGS:
        raise ValueError(f"{files.name}: {file} pools by {' and '.join(modes) or 'nothing'}. {SUPPORTED}.")
    if config.get("include_prompt", True) is False:
        raise ValueError(f"{files.name}: {file} leaves the prompt out of the pooling (include_prompt); not supported.")
    return POOLINGS[modes[0]]


def read_dense(files: SourceFiles, path: str, allow_pytorch_bin: bool) -> torch.Tensor:
    """Return the weight `(h, h_emb)` of a Dense module, which must be a linear map and nothing else."""
    config = files.read(f"{path}config.json") or {}
    bias = config.get("bias", True)
    activation = config.get("activation_function", "Tanh").rpartition(".")[2]
    if bias or activation != "Identity" or config.get("use_residual"):
        raise ValueError(
            f"{files.name}: the Dense module in {path} has bias {bias} and activation {activation}. {SUPPORTED}."
        )
    if config.get("module_input_name", "sentence_embedding") != "sentence_embedding":
        raise ValueError(
            f"{files.name}: the Dense module in {path} maps {config['module_input_name']},"
            " expected sentence_embedding."
        )
    safetensors_file = files.find(f"{path}model.safetensors")
    if safetensors_file is not None:
        return load_file(safetensors_file)["linear.weight"]
    bin_file = files.find(f"{path}pytorch_model.bin") if allow_pytorch_bin else None
    if bin_file is None:
        raise ValueError(
            f"{files.name}: {path} holds no model.safetensors; recipes/import_checkpoints.py --allow_pytorch_bin also"
            " reads pytorch_model.bin, with torch's weights_only reader."
        )
    return torch.load(bin_file, map_location="cpu", weights_only=True)["linear.weight"]


def read_prompts(options: dict[str, Any]) -> dict[str, str]:
    """Return the prompts of passages and queries, and the passage template of a folder that CoSup wrote."""
    prompts = options.get("prompts") or {}
    default = prompts.get(options.get("default_prompt_name")) or ""
    query_prompt = prompts.get("query")
    settings = {"passage_prompt": default, "query_prompt": default if query_prompt is None else query_prompt}
    for key in ("document", "passage", "corpus"):
        if prompts.get(key) is not None:
            settings["passage_prompt"] = prompts[key]
            break
    template = (options.get("cosup") or {}).get("passage_template")
    if template is not None:
        settings["passage_template"] = template
    return settings
