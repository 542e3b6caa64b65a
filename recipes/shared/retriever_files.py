"""Settings of a retriever, from its files: how sentence-transformers or a plain encoder reads, pools and compares."""

import importlib.util
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase

from modeling_cosup import CoSupForCausalLM
from modeling_cosup.architectures_cosup import num_positions
from modeling_cosup.checks_cosup import check_config
from modeling_cosup.files_cosup import read_json
from modeling_cosup.tokenization_cosup import bos_and_eos, encode_passages_for_emb_seq, pad_rows, render_passage

# Pooling modes by the names of old and new releases of sentence-transformers -> CoSup's names.
POOLINGS = {
    "cls": "cls",
    "cls_token": "cls",
    "mean": "mean",
    "mean_tokens": "mean",
    "lasttoken": "lasttoken",
}
MODULE_KINDS = ("Transformer", "Pooling", "Dense", "Normalize")
SUPPORTED = (
    "Supported are Transformer, Pooling (mean, cls or lasttoken), Dense (no bias, no activation) and Normalize, "
    "in this order"
)
SAMPLES = [
    {"title": "The Night Watch", "text": "The Night Watch is a 1642 painting by Rembrandt."},
    {"title": "", "text": "Radium is a chemical element; it was discovered by Marie and Pierre Curie in 1898."},
    {
        "title": "A long one",
        "text": "Amsterdam is the capital of the Netherlands, a city of canals, bridges and bicycles. " * 60,
    },
]


@dataclass
class ImportedRetriever:
    """
    A retriever, ready to become Emb_seq.

    Args:
        settings (`dict`): fields of `CoSupConfig`.
        config (`PreTrainedConfig`): of the transformer.
        tokenizer (`PreTrainedTokenizerBase`): a tokenizer whose BOS and EOS are the tokens that it puts around a text.
        subfolder (`str`): folder of the transformer.
        head (`torch.Tensor` of shape `(h, h_emb)`, *optional*): weight of the dense layer.
        is_sentence_transformers (`bool`): whether the settings come from files of sentence-transformers.
    """

    settings: dict[str, Any]
    config: PreTrainedConfig
    tokenizer: PreTrainedTokenizerBase
    subfolder: str = ""
    head: torch.Tensor | None = None
    is_sentence_transformers: bool = False


@dataclass
class ModuleFacts:
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


def read_retriever(name: str, args: Any) -> ImportedRetriever:
    """
    Read the settings of a retriever from its files, or from the options if the files do not say.

    Args:
        name (`str`): repository or folder.
        args: options of `import_checkpoints.py`.

    Raises:
        `ValueError`: names the module or file that does something Emb_seq cannot do, or the option that is missing or
            contradicts the files.
    """
    modules = read_settings(name, "modules.json")
    facts = ModuleFacts() if modules is None else read_modules(name, modules, args.allow_pytorch_bin)
    settings = facts.settings
    for option in ("emb_seq_pooling", "similarity"):
        chosen = getattr(args, option)
        stated = settings.get(option)
        if chosen is None and stated is None:
            raise ValueError(f"{name} is not a sentence-transformers model: give --{option}.")
        if chosen is not None and stated is not None and chosen != stated:
            raise ValueError(f"--{option} is {chosen}, the files of {name} say {stated}.")
        settings[option] = chosen or stated

    config = AutoConfig.from_pretrained(name, subfolder=facts.subfolder)
    check_config(config, name)
    tokenizer = AutoTokenizer.from_pretrained(name, subfolder=facts.subfolder)
    if facts.do_lower_case and tokenizer("A")["input_ids"] != tokenizer("a")["input_ids"]:
        raise ValueError(
            f"{name}: sentence_bert_config.json says do_lower_case, but the tokenizer keeps upper case; not supported."
        )
    before, after = set_added_tokens(tokenizer, name)
    max_length = facts.max_seq_length or min(tokenizer.model_max_length, num_positions(config) or 512)
    tokenizer.model_max_length = max_length

    settings["emb_seq_add_bos_token"] = bool(before)
    settings["emb_seq_add_eos_token"] = bool(after)
    settings["max_passage_length"] = args.max_passage_length or max_length - len(before) - len(after)
    for option in ("passage_template", "passage_prompt", "query_prompt"):
        if getattr(args, option) is not None:
            settings[option] = getattr(args, option)
    if args.query_from in (None, "gen") and args.query_prompt is None:
        settings.pop("query_prompt", None)  # Gen makes the queries, so nothing reads this prompt
    return ImportedRetriever(
        settings, config, tokenizer, facts.subfolder, facts.head, is_sentence_transformers=modules is not None
    )


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


def read_modules(name: str, modules: list[dict[str, Any]], allow_pytorch_bin: bool) -> ModuleFacts:
    """
    Read what the modules of a sentence-transformers retriever do.

    Raises:
        `ValueError`: names a module that does something Emb_seq cannot do.
    """
    kinds = [module_kind(module["type"]) for module in modules]
    expected = ["Transformer", "Pooling", *(kind for kind in ("Dense", "Normalize") if kind in kinds[2:])]
    if kinds != expected:
        unknown = [kind for kind in kinds if kind not in MODULE_KINDS]
        wrong = unknown[0] if unknown else " → ".join(kinds)
        raise ValueError(f"{name}: modules.json lists {wrong}. {SUPPORTED}.")
    paths = {kind: safe_path(name, module["path"]) for kind, module in zip(kinds, modules, strict=True)}

    options = read_settings(name, "config_sentence_transformers.json") or {}
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
    transformer = read_settings(name, f"{paths['Transformer']}sentence_bert_config.json") or {}
    pooling = read_pooling(name, f"{paths['Pooling']}config.json")
    head = read_dense(name, paths["Dense"], allow_pytorch_bin) if "Dense" in paths else None
    return ModuleFacts(
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


def read_pooling(name: str, file: str) -> str:
    """Return the only pooling mode of a Pooling module, by its name in CoSup."""
    config = read_settings(name, file) or {}
    modes = []
    if "pooling_mode" in config:
        modes = config["pooling_mode"]
    else:  # older releases have a flag for each mode
        for key, is_on in config.items():
            if key.startswith("pooling_mode_") and is_on:
                modes.append(key.removeprefix("pooling_mode_"))
    if isinstance(modes, str):
        modes = [modes]
    if len(modes) != 1 or modes[0] not in POOLINGS:
        raise ValueError(f"{name}: {file} pools by {' and '.join(modes) or 'nothing'}. {SUPPORTED}.")
    if config.get("include_prompt", True) is False:
        raise ValueError(f"{name}: {file} leaves the prompt out of the pooling (include_prompt); not supported.")
    return POOLINGS[modes[0]]


def read_dense(name: str, path: str, allow_pytorch_bin: bool) -> torch.Tensor:
    """Return the weight `(h, h_emb)` of a Dense module, which must be a linear map and nothing else."""
    config = read_settings(name, f"{path}config.json") or {}
    bias = config.get("bias", True)
    activation = config.get("activation_function", "Tanh").rpartition(".")[2]
    if bias or activation != "Identity" or config.get("use_residual"):
        raise ValueError(
            f"{name}: the Dense module in {path} has bias {bias} and activation {activation}. {SUPPORTED}."
        )
    if config.get("module_input_name", "sentence_embedding") != "sentence_embedding":
        raise ValueError(
            f"{name}: the Dense module in {path} maps {config['module_input_name']}, expected sentence_embedding."
        )
    safetensors_file = find_file(name, f"{path}model.safetensors")
    if safetensors_file is not None:
        return load_file(safetensors_file)["linear.weight"]
    bin_file = find_file(name, f"{path}pytorch_model.bin") if allow_pytorch_bin else None
    if bin_file is None:
        raise ValueError(
            f"{name}: {path} holds no model.safetensors; "
            "--allow_pytorch_bin also reads pytorch_model.bin, with torch's weights_only reader."
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


def find_file(name: str, file: str) -> Path | None:
    """Return the local path of a file of a folder or repository, or `None` if there is no such file."""
    if Path(name).is_dir():
        path = Path(name) / file
        return path if path.is_file() else None
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    try:
        return Path(hf_hub_download(name, file))
    except EntryNotFoundError:
        return None


def read_settings(name: str, file: str) -> Any:
    """Return the content of a JSON file of a folder or repository, or `None` if there is no such file."""
    path = find_file(name, file)
    if path is None:
        return None
    try:
        return read_json(path)
    except ValueError as error:
        raise ValueError(f"{name}: {file} is not valid JSON: {error}") from error


# ---------------------------------------------------------------------- comparison


@torch.no_grad()
def compare(model: CoSupForCausalLM, name: str, own_head: bool) -> None:
    """
    Compare the embeddings of a few passages with those that sentence-transformers computes, if it is installed.

    Args:
        model ([`CoSupForCausalLM`]): the imported model.
        name (`str`): repository or folder of the retriever.
        own_head (`bool`): whether `emb_head` comes from the retriever; a new head is left out of the comparison.

    Raises:
        `ValueError`: if they differ by more than 1e-4 of their length (2e-2 if weights are not float32).
    """
    if importlib.util.find_spec("sentence_transformers") is None:
        print("sentence-transformers is not installed: embeddings were not compared with its own.", flush=True)
        return
    from sentence_transformers import SentenceTransformer

    ids, mask = pad_rows(encode_passages_for_emb_seq(model.emb_seq_tokenizer, SAMPLES, model.config))
    head = model.emb_head
    if not own_head:
        model.emb_head = None
    embeddings = model.encode_passages(ids, mask)  # (n, h)
    model.emb_head = head

    reference = SentenceTransformer(str(name), device="cpu", model_kwargs={"dtype": model.emb_seq.dtype})
    reference.max_seq_length = max(map(len, ids))  # --max_passage_length may have shortened passages
    texts = [render_passage(passage, model.config.passage_template) for passage in SAMPLES]
    vectors = reference.encode(texts, prompt=model.config.passage_prompt, show_progress_bar=False)
    expected = torch.tensor(vectors).float()  # (n, h)
    if model.config.similarity == "cosine":
        expected = F.normalize(expected, dim=-1)

    differences = (embeddings - expected).norm(dim=1) / expected.norm(dim=1)  # (n,)
    difference = float(differences.max())
    tolerance = 1e-4 if model.emb_seq.dtype == torch.float32 else 2e-2
    if not difference <= tolerance:  # NaN included
        raise ValueError(
            f"The embeddings differ from sentence-transformers' own by {difference:.1e} of their length: "
            f"{name} does something that its files do not say."
        )
    print(
        f"The embeddings equal sentence-transformers' own: they differ by at most {difference:.1e} of their length.",
        flush=True,
    )
