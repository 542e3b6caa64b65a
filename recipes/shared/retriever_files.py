"""What the files of a retriever say: how it reads, pools and compares texts, for a sentence-transformers retriever and for a plain encoder."""

import importlib.util
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerBase

from modeling_cosup import CoSupForCausalLM
from modeling_cosup.files_cosup import read_json
from modeling_cosup.tokenization_cosup import bos_and_eos, encode_passages_for_emb_seq, pad_rows, render_passage

POOLINGS = {
    "cls": "cls",
    "cls_token": "cls",
    "mean": "mean",
    "mean_tokens": "mean",
    "lasttoken": "lasttoken",
}  # names of old and new releases
SUPPORTED = "Supported are Transformer, Pooling (mean, cls or lasttoken), Dense (no bias, no activation) and Normalize, in this order"
SAMPLES = [
    {"title": "The Night Watch", "text": "The Night Watch is a 1642 painting by Rembrandt."},
    {"title": "", "text": "Radium is a chemical element; it was discovered by Marie and Pierre Curie in 1898."},
    {
        "title": "A long one",
        "text": "Amsterdam is the capital of the Netherlands, a city of canals, bridges and bicycles. " * 60,
    },
]


@dataclass
class Retriever:
    """
    Args:
        settings (`dict`): fields of `CoSupConfig`.
        tokenizer (`PreTrainedTokenizerBase`): its BOS and EOS are what it puts around a text.
        subfolder (`str`): where the transformer lies.
        head (`torch.Tensor` of shape `(h, h_emb)`, *optional*): weight of its dense layer.
        is_sentence_transformers (`bool`): whether files of sentence-transformers said so.
    """

    settings: dict[str, Any]
    tokenizer: PreTrainedTokenizerBase
    subfolder: str = ""
    head: torch.Tensor | None = None
    is_sentence_transformers: bool = False


def read_retriever(name: str, args: Any) -> Retriever:
    """
    Settings of a retriever, from its files and, where they say nothing, from the options.

    Args:
        name (`str`): repository or folder.
        args: options of `import_checkpoints.py`.

    Raises:
        `ValueError`: names the module or file that does what Emb_seq cannot, or the option that is missing or contradicts the files.
    """
    modules = read_settings(name, "modules.json")
    facts = {} if modules is None else read_modules(name, modules, args.allow_pytorch_bin)
    for option in ("emb_seq_pooling", "similarity"):
        given = getattr(args, option)
        if modules is None and given is None:
            raise ValueError(f"{name} is not of sentence-transformers: say --{option}.")
        if modules is not None and given not in (None, facts[option]):
            raise ValueError(f"--{option} is {given}, the files of {name} say {facts[option]}.")
        facts[option] = given or facts[option]
    subfolder, head, longest = (
        facts.pop(key, default) for key, default in (("subfolder", ""), ("head", None), ("max_seq_length", None))
    )
    config = AutoConfig.from_pretrained(name, subfolder=subfolder)
    if config.is_encoder_decoder:
        raise ValueError(f"{name} is an encoder-decoder ({config.model_type}); supported are models of one stack.")
    tokenizer = AutoTokenizer.from_pretrained(name, subfolder=subfolder)
    if facts.pop("do_lower_case", False) and tokenizer("A")["input_ids"] != tokenizer("a")["input_ids"]:
        raise ValueError(
            f"{name}: sentence_bert_config.json says do_lower_case, and the tokenizer itself does not do it; not supported."
        )
    before, after = set_added_tokens(tokenizer, name)
    positions = getattr(config.get_text_config(), "max_position_embeddings", None) or 512
    longest = longest or min(tokenizer.model_max_length, positions)
    tokenizer.model_max_length = longest
    facts |= {"emb_seq_add_bos_token": bool(before), "emb_seq_add_eos_token": bool(after)}
    facts["max_passage_length"] = args.max_passage_length or longest - len(before) - len(after)
    for option in ("passage_template", "passage_prompt", "query_prompt"):
        if getattr(args, option) is not None:
            facts[option] = getattr(args, option)
    if args.query_from in (None, "gen") and args.query_prompt is None:
        facts.pop("query_prompt", None)  # nobody reads it
    return Retriever(facts, tokenizer, subfolder, head, modules is not None)


def set_added_tokens(tokenizer: PreTrainedTokenizerBase, name: str) -> tuple[list[int], list[int]]:
    """
    What the tokenizer puts before and after a text, as two lists of at most one id; they become its BOS and EOS, if they are not.

    Raises:
        `ValueError`: when it puts more there.
    """
    text, whole = tokenizer("retrieval", add_special_tokens=False)["input_ids"], tokenizer("retrieval")["input_ids"]
    start = next((i for i in range(len(whole)) if whole[i : i + len(text)] == text), None)
    before, after = (whole, []) if start is None else (whole[:start], whole[start + len(text) :])
    if max(len(before), len(after)) > 1:
        raise ValueError(
            f"The tokenizer of {name} makes {tokenizer.convert_ids_to_tokens(whole)} of 'retrieval'; expected at most one token on either side."
        )
    for ids, own, token in zip((before, after), bos_and_eos(tokenizer), ("bos_token", "eos_token"), strict=True):
        if ids and ids != own:
            setattr(tokenizer, token, tokenizer.convert_ids_to_tokens(ids[0]))
    return before, after


# ---------------------------------------------------------------------- sentence-transformers


def read_modules(name: str, modules: list[dict[str, Any]], allow_pytorch_bin: bool) -> dict[str, Any]:
    """
    What the modules of a sentence-transformers retriever do, as fields of `CoSupConfig` and of [`Retriever`].

    Raises:
        `ValueError`: names a module that does what Emb_seq cannot.
    """
    kinds = [
        module["type"].rpartition(".")[2] if module["type"].startswith("sentence_transformers.") else module["type"]
        for module in modules
    ]
    expected = ["Transformer", "Pooling", *(kind for kind in ("Dense", "Normalize") if kind in kinds[2:])]
    if kinds != expected:
        wrong = next(
            (kind for kind in kinds if kind not in ("Transformer", "Pooling", "Dense", "Normalize")), " → ".join(kinds)
        )
        raise ValueError(f"{name}: modules.json lists {wrong}. {SUPPORTED}.")
    paths = {kind: safe_path(name, module["path"]) for kind, module in zip(kinds, modules, strict=True)}
    options = read_settings(name, "config_sentence_transformers.json") or {}
    if options.get("model_type", "SentenceTransformer") != "SentenceTransformer":
        raise ValueError(
            f"{name} is a {options['model_type']}; supported are retrievers that make one vector of a text."
        )
    similarity = "cosine" if "Normalize" in kinds else options.get("similarity_fn_name") or "cosine"
    if similarity not in ("cosine", "dot"):
        raise ValueError(
            f"{name}: config_sentence_transformers.json compares by {similarity!r}, expected 'cosine' or 'dot'."
        )
    transformer = read_settings(name, f"{paths['Transformer']}sentence_bert_config.json") or {}
    return {
        "subfolder": paths["Transformer"].rstrip("/"),
        "max_seq_length": transformer.get("max_seq_length"),
        "do_lower_case": transformer.get("do_lower_case", False),
        "emb_seq_pooling": read_pooling(name, f"{paths['Pooling']}config.json"),
        "head": read_dense(name, paths["Dense"], allow_pytorch_bin) if "Dense" in paths else None,
        "similarity": similarity,
        **read_prompts(options),
    }


def safe_path(name: str, path: str) -> str:
    """`path` of a module as a prefix of file names: empty, or with a slash at its end."""
    if PurePosixPath(path).is_absolute() or ".." in PurePosixPath(path).parts:
        raise ValueError(f"{name}: modules.json leads out of the folder, to {path!r}.")
    return f"{path}/" if path else ""


def read_pooling(name: str, file: str) -> str:
    """The one pooling mode of a Pooling module, by CoSup's name."""
    config = read_settings(name, file) or {}
    modes = config.get(
        "pooling_mode",
        [key.removeprefix("pooling_mode_") for key, on in config.items() if key.startswith("pooling_mode_") and on],
    )
    modes = [modes] if isinstance(modes, str) else modes
    if len(modes) != 1 or modes[0] not in POOLINGS:
        raise ValueError(f"{name}: {file} pools by {' and '.join(modes) or 'nothing'}. {SUPPORTED}.")
    if config.get("include_prompt", True) is False:
        raise ValueError(f"{name}: {file} leaves the prompt out of the pooling (include_prompt); not supported.")
    return POOLINGS[modes[0]]


def read_dense(name: str, path: str, allow_pytorch_bin: bool) -> torch.Tensor:
    """The weight `(h, h_emb)` of a Dense module that is a linear map and nothing else."""
    config = read_settings(name, f"{path}config.json") or {}
    activation = config.get("activation_function", "Tanh").rpartition(".")[2]
    if config.get("bias", True) or activation != "Identity" or config.get("use_residual"):
        raise ValueError(
            f"{name}: the Dense module in {path} has bias {config.get('bias', True)} and activation {activation}. {SUPPORTED}."
        )
    if config.get("module_input_name", "sentence_embedding") != "sentence_embedding":
        raise ValueError(
            f"{name}: the Dense module in {path} maps {config['module_input_name']}, expected sentence_embedding."
        )
    if file := find_file(name, f"{path}model.safetensors"):
        return load_file(file)["linear.weight"]
    file = find_file(name, f"{path}pytorch_model.bin") if allow_pytorch_bin else None
    if file is None:
        raise ValueError(
            f"{name}: {path} holds no model.safetensors; --allow_pytorch_bin also reads pytorch_model.bin, by torch's weights_only reader."
        )
    return torch.load(file, map_location="cpu", weights_only=True)["linear.weight"]


def read_prompts(options: dict[str, Any]) -> dict[str, str]:
    """Prompts of passages and queries, and the template of a folder that CoSup wrote."""
    prompts = options.get("prompts") or {}
    default = prompts.get(options.get("default_prompt_name")) or ""
    passage = next(
        (prompts[key] for key in ("document", "passage", "corpus") if prompts.get(key) is not None), default
    )
    found = {"passage_prompt": passage, "query_prompt": default if prompts.get("query") is None else prompts["query"]}
    template = (options.get("cosup") or {}).get("passage_template")
    return found if template is None else {**found, "passage_template": template}


def find_file(name: str, file: str) -> Path | None:
    """Path of a file of a folder or repository, or `None`."""
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
    """A JSON file of a folder or repository, or `None` where there is none."""
    path = find_file(name, file)
    if path is None:
        return None
    try:
        return read_json(path)
    except ValueError as error:
        raise ValueError(f"{name}: {file} is no JSON: {error}") from error


# ---------------------------------------------------------------------- comparing


@torch.no_grad()
def compare(model: CoSupForCausalLM, name: str, own_head: bool) -> None:
    """
    Compare embeddings of a few passages with those of sentence-transformers, where it is installed.

    Args:
        model ([`CoSupForCausalLM`]): the pair.
        name (`str`): repository or folder of the retriever.
        own_head (`bool`): whether `emb_head` is the retriever's; a new one is left out here.

    Raises:
        `ValueError`: when they differ by more than 1e-4 of their length, or 2e-2 where weights are not float32.
    """
    if importlib.util.find_spec("sentence_transformers") is None:
        print("sentence-transformers is not installed: embeddings were not compared with its own.", flush=True)
        return
    from sentence_transformers import SentenceTransformer

    ids, mask = pad_rows(encode_passages_for_emb_seq(model.emb_seq_tokenizer, SAMPLES, model.config))
    head = model.emb_head
    model.emb_head = head if own_head else None
    found = model.encode_passages(ids, mask)
    model.emb_head = head
    theirs = SentenceTransformer(str(name), device="cpu", model_kwargs={"dtype": model.emb_seq.dtype})
    theirs.max_seq_length = max(map(len, ids))  # where --max_passage_length shortens passages
    texts = [render_passage(passage, model.config.passage_template) for passage in SAMPLES]
    expected = torch.tensor(theirs.encode(texts, prompt=model.config.passage_prompt, show_progress_bar=False)).float()
    expected = F.normalize(expected, dim=-1) if model.config.similarity == "cosine" else expected
    difference = float(((found - expected).norm(dim=1) / expected.norm(dim=1)).max())
    if not difference <= (1e-4 if model.emb_seq.dtype == torch.float32 else 2e-2):
        raise ValueError(
            f"Embeddings differ from those of sentence-transformers by {difference:.1e} of their length: {name} does something that was not seen."
        )
    print(
        f"Embeddings equal those of sentence-transformers: they differ by at most {difference:.1e} of their length.",
        flush=True,
    )
