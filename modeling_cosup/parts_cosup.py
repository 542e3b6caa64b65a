"""
Each half of a CoSup model as a separate checkpoint.

Gen becomes a plain causal language model, Emb_seq a sentence-transformers folder. Both load without this code. The
folder holds the JSON and safetensors files that sentence-transformers reads; writing it does not need the library.
"""

import copy
import inspect
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from safetensors.torch import save_file
from tokenizers import Regex, Tokenizer, pre_tokenizers, processors
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from .configuration_cosup import CoSupConfig
from .files_cosup import write_json
from .fingerprints_cosup import adapter_weight
from .hub_cosup import (
    ADAPTER_FILES,
    CARD_FILE,
    CARD_MARKER,
    TOKENIZER_FILES,
    WEIGHT_FILES,
    make_repo,
    matching_files,
    push_files,
    weight_files,
)
from .plain_card_cosup import package_cards, plain_card
from .tokenization_cosup import added_tokens, special_ids
from .tokenizer_files_cosup import GENERIC_CLASS, class_to_save, write_tokenizer

if TYPE_CHECKING:
    Base = PreTrainedModel
else:
    Base = object  # CoSupForCausalLM itself inherits from PreTrainedModel

# our poolings, by their names in sentence-transformers
POOLING_MODES = {"eos": "lasttoken", "lasttoken": "lasttoken", "mean": "mean_tokens", "cls": "cls_token"}
SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")

_OTHER_WAYS = "Save the whole model with save_pretrained, or build it from an architecture of another type."
_MODULE_FILES = (
    "modules.json",
    "sentence_bert_config.json",
    "config_sentence_transformers.json",
    "[0-9]_*/config.json",
    "[0-9]_*/model.safetensors",
)
PART_FILES = (*WEIGHT_FILES, "config.json", "generation_config.json", CARD_FILE, *TOKENIZER_FILES, *_MODULE_FILES)
_COMMIT_OPTIONS = ("commit_message", "commit_description", "revision", "create_pr")


class PartsMixin(Base):
    """`save_gen()` and `save_emb_seq()` of [`CoSupForCausalLM`]."""

    config: CoSupConfig
    gen: PreTrainedModel
    emb_seq: PreTrainedModel | None
    emb_head: nn.Linear | None
    tokenizer: PreTrainedTokenizerBase
    emb_seq_tokenizer: PreTrainedTokenizerBase
    _emb_seq_prefix: Callable[[], str]
    _has_tokenizer: Callable[[], bool]

    def save_gen(
        self,
        save_directory: str | os.PathLike[str],
        is_main_process: bool = True,
        state_dict: dict[str, torch.Tensor] | None = None,
        push_to_hub: bool = False,
        repo_id: str | None = None,
        token: str | None = None,
        private: bool | None = None,
        **kwargs: Any,
    ) -> None:
        """
        Save Gen as a plain checkpoint of its architecture, e.g. `LlamaForCausalLM`.

        Tokenizer, chat template and generation config are saved with it. Any server of such models can serve it,
        without retrieval and without `trust_remote_code`. This model does not change.

        Args:
            save_directory (`str` or `Path`): created if it does not exist.
            is_main_process (`bool`), **kwargs: as in `PreTrainedModel.save_pretrained`, e.g. `max_shard_size`.
            state_dict (`dict`, *optional*): of the whole model, if the parameters in memory are shards.
            push_to_hub (`bool`): upload the folder, in one commit.
            repo_id (`str`, *optional*): the repository, created if it does not exist; defaults to the folder's name.
            token (`str`, *optional*), private (`bool`, *optional*): as in `huggingface_hub`. So are the options of the
                commit among `**kwargs`: `commit_message`, `commit_description`, `revision` and `create_pr`.

        Raises:
            `TypeError`: for an option that neither has.
            `ValueError`: for weights that are quantised or hold adapters that are not merged, and for a tokenizer that
                `AutoTokenizer` would replace by one that reads text differently.
        """
        commit_options = _take_commit_options(kwargs)
        gen = _copy_of_part(self, self.gen)
        gen.generation_config = copy.deepcopy(self.generation_config)
        has_tokenizer = is_main_process and self._has_tokenizer()
        if has_tokenizer:
            tokenizer_class = class_to_save(self.tokenizer, gen.config, (None, GENERIC_CLASS), _OTHER_WAYS)
        weights = _weights_of_part(state_dict, "gen.")
        gen.save_pretrained(save_directory, is_main_process=is_main_process, state_dict=weights, **kwargs)
        if not is_main_process:
            return
        nsp_token = "[NSP]"
        if has_tokenizer:
            write_tokenizer(self.tokenizer, save_directory, tokenizer_class)
            if self.config.nsp_token_id is not None:
                nsp_token = cast(str, self.tokenizer.convert_ids_to_tokens(self.config.nsp_token_id))
        name = _folder_name(save_directory)
        if push_to_hub:
            name = make_repo(repo_id or name, private, token)
        cards = package_cards()
        if cards is None:
            metadata = {"library_name": "transformers", "pipeline_tag": "text-generation"}
            card = plain_card(name, "Gen of a CoSup model, a plain causal language model.", **metadata)
        else:
            card = cards.gen_card(type(gen).__name__, nsp_token, name)
        _write_card(save_directory, card)
        if push_to_hub:
            _push(save_directory, name, kwargs.get("variant"), token=token, **commit_options)

    def save_emb_seq(
        self,
        save_directory: str | os.PathLike[str],
        is_main_process: bool = True,
        state_dict: dict[str, torch.Tensor] | None = None,
        push_to_hub: bool = False,
        repo_id: str | None = None,
        token: str | None = None,
        private: bool | None = None,
        **kwargs: Any,
    ) -> None:
        """
        Save Emb_seq as a sentence-transformers folder.

        `SentenceTransformer(save_directory).encode(rendered passages)` then equals `encode_passages`. Its modules are
        the transformer, pooling, a dense layer for `emb_head`, and normalisation for the cosine. The tokenizer adds
        BOS and EOS as Emb_seq reads them, after truncation, and reads special tokens in a text as text.
        `passage_prompt` is the default prompt. The template is in `config_sentence_transformers.json`; the folder's
        `README.md` has code that renders passages with it.

        Args: the same as for [`~CoSupForCausalLM.save_gen`].

        Raises:
            `TypeError`: for an unknown option.
            `ValueError`: when Emb_seq is not loaded, when its tokenizer does not come from the tokenizers library or
                `AutoTokenizer` would replace it by one that reads text differently, or when weights are quantised or
                hold adapters that are not merged.
        """
        if self.emb_seq is None:
            raise ValueError(
                "Emb_seq is not in memory (load_emb_seq=False), so there is nothing to save: load the model with it."
            )
        commit_options = _take_commit_options(kwargs)
        emb_seq = _copy_of_part(self, self.emb_seq)
        tokenizer = passage_tokenizer(self.emb_seq_tokenizer, self.config)
        if is_main_process:
            class_to_save(tokenizer, emb_seq.config, (GENERIC_CLASS,), _OTHER_WAYS)
        weights = _weights_of_part(state_dict, self._emb_seq_prefix())
        emb_seq.save_pretrained(save_directory, is_main_process=is_main_process, state_dict=weights, **kwargs)
        if not is_main_process:
            return
        folder = Path(save_directory)
        write_tokenizer(tokenizer, folder, GENERIC_CLASS)
        head = None
        if self.emb_head is not None:
            head = (state_dict or self.state_dict())["emb_head.weight"]
        elif self.config.truncate_dim is not None:
            head = torch.eye(self.config.full_embedding_size, dtype=emb_seq.dtype)  # its rows are cut
        if head is not None:
            head = head[: self.config.truncate_dim]
        write_modules(folder, self.config, tokenizer.model_max_length, head)
        name = _folder_name(save_directory)
        if push_to_hub:
            name = make_repo(repo_id or name, private, token)
        cards = package_cards()
        if cards is None:
            metadata = {"library_name": "sentence-transformers", "pipeline_tag": "sentence-similarity"}
            card = plain_card(name, "Emb_seq of a CoSup model, its passage encoder.", **metadata)
        else:
            card = cards.emb_seq_card(self.config, name)
        _write_card(save_directory, card)
        if push_to_hub:
            _push(save_directory, name, kwargs.get("variant"), token=token, **commit_options)


def passage_tokenizer(tokenizer: PreTrainedTokenizerBase, config: CoSupConfig) -> PreTrainedTokenizerFast:
    """
    Return a tokenizer that turns a rendered passage into what Emb_seq reads: BOS, the truncated passage as text, EOS.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): Emb_seq's; it does not change.
        config (`CoSupConfig`): length, and whether BOS and EOS are added.

    Raises:
        `ValueError`: when it is not backed by the tokenizers library, whose files hold the added BOS and EOS.
    """
    if not tokenizer.is_fast:
        raise ValueError(
            f"Emb_seq's tokenizer, {type(tokenizer).__name__}, is not backed by the tokenizers library;"
            " sentence-transformers needs one that is."
        )
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.no_truncation()
    backend.no_padding()
    _split_special_tokens(backend, special_ids(tokenizer))
    bos, eos = added_tokens(tokenizer, config)
    tokens = {id: tokenizer.convert_ids_to_tokens(id) for id in bos + eos}
    template = [*(tokens[id] for id in bos), "$A", *(tokens[id] for id in eos)]
    special_tokens = [(token, id) for id, token in tokens.items()]
    backend.post_processor = processors.TemplateProcessing(single=template, special_tokens=special_tokens)
    names = [name for name in SPECIAL_TOKENS if getattr(tokenizer, name) is not None]
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        model_max_length=len(bos) + config.max_passage_length + len(eos),
        model_input_names=["input_ids", "attention_mask"],  # no token types: Emb_seq reads none
        padding_side="right",
        truncation_side="right",
        split_special_tokens=True,
        **{name: getattr(tokenizer, name) for name in names},
    )


def _split_special_tokens(backend: Tokenizer, ids: frozenset[int]) -> None:
    """Split special tokens that the vocabulary reads as words, in the way of `tokenization_cosup.encode_texts`."""
    words: list[str] = []
    for id in sorted(ids):
        token = cast(str, backend.id_to_token(id))
        in_vocabulary = backend.model.token_to_id(token) is not None
        if in_vocabulary and len(backend.model.tokenize(token)) == 1:  # BPE may hold a token that no merge reaches
            words.append(token)
    if not words:
        return
    words.sort(key=len, reverse=True)  # one may begin with another
    whole = Regex("|".join(map(re.escape, words)))
    after_first = Regex("|".join(f"(?<=^{re.escape(word[0])})(?={re.escape(word[1:])}$)" for word in words))
    steps = [pre_tokenizers.Split(whole, "isolated"), pre_tokenizers.Split(after_first, "isolated")]
    if backend.pre_tokenizer is not None:
        steps.insert(0, backend.pre_tokenizer)
    backend.pre_tokenizer = pre_tokenizers.Sequence(steps)


def write_modules(folder: Path, config: CoSupConfig, max_seq_length: int, head: torch.Tensor | None = None) -> None:
    """
    Turn the folder of a transformer into a sentence-transformers folder: write the list of modules and their settings.

    Args:
        folder (`Path`): with model and tokenizer.
        config (`CoSupConfig`): pooling, similarity, prompts and template.
        max_seq_length (`int`): tokens, with BOS and EOS.
        head (`torch.Tensor` of shape `(h, h_emb)`, *optional*): weight of `emb_head`, cut to `truncate_dim`.
    """
    width = config.emb_seq_config.get_text_config().hidden_size
    pooling: dict[str, Any] = {"word_embedding_dimension": width}
    for mode in ("cls_token", "mean_tokens", "lasttoken"):
        pooling[f"pooling_mode_{mode}"] = mode == POOLING_MODES[config.emb_seq_pooling]
    pooling["include_prompt"] = True
    modules: list[tuple[str, str, dict[str, Any]]] = [("", "Transformer", {}), ("1_Pooling", "Pooling", pooling)]
    if head is not None:
        dense: dict[str, Any] = {"in_features": width, "out_features": config.embedding_size, "bias": False}
        dense["activation_function"] = "torch.nn.modules.linear.Identity"
        modules.append(("2_Dense", "Dense", dense))
    if config.similarity == "cosine":
        modules.append((f"{len(modules)}_Normalize", "Normalize", {}))
    for path, _, options in modules[1:]:
        (folder / path).mkdir(exist_ok=True)
        write_json(folder / path / "config.json", options)
    if head is not None:
        weights = {"linear.weight": head.detach().cpu().contiguous()}
        save_file(weights, folder / "2_Dense" / "model.safetensors", metadata={"format": "pt"})
    module_list = []
    for i, (path, kind, _) in enumerate(modules):
        module_list.append({"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"})
    write_json(folder / "modules.json", module_list)
    write_json(folder / "sentence_bert_config.json", {"max_seq_length": max_seq_length, "do_lower_case": False})
    settings = {
        "model_type": "SentenceTransformer",
        "prompts": {"query": config.query_prompt, "document": config.passage_prompt},
        "default_prompt_name": "document" if config.passage_prompt else None,
        "similarity_fn_name": config.similarity,
        "cosup": {"passage_template": config.passage_template, "query_from": config.query_from},
    }
    write_json(folder / "config_sentence_transformers.json", settings)


def _copy_of_part(model: PreTrainedModel, part: PreTrainedModel) -> PreTrainedModel:
    """Return a shallow copy of a sub-model and a deep one of its config, into which saving writes class and dtype."""
    if getattr(model, "hf_quantizer", None) is not None or getattr(part, "hf_quantizer", None) is not None:
        raise ValueError(
            "The weights are quantised; save a part before they are quantised, or after calling dequantize()."
        )
    check_adapters_are_merged(part)
    part = copy.copy(part)
    part.config = copy.deepcopy(part.config)
    if type(part).__module__.startswith("transformers."):
        # the model came from a repository with code, but transformers has the class
        vars(part.config).pop("auto_map", None)
    return part


def check_adapters_are_merged(model: nn.Module) -> None:
    """Raise a `ValueError` if a model holds adapters: loaded again, the layers that they adapt would be random."""
    name = adapter_weight(model)
    if name is not None:
        raise ValueError(
            f"{name} belongs to an adapter that is not merged: call merge_and_unload(), then save the model that it"
            " returns."
        )


def _weights_of_part(state_dict: dict[str, torch.Tensor] | None, prefix: str) -> dict[str, torch.Tensor] | None:
    if state_dict is None:
        return None
    return {name.removeprefix(prefix): value for name, value in state_dict.items() if name.startswith(prefix)}


def _write_card(folder: str | os.PathLike[str], card: str) -> None:
    """Write a card, unless its owner has edited the one that is there."""
    path = Path(folder) / CARD_FILE
    if not path.exists() or CARD_MARKER in path.read_text(encoding="utf-8"):
        path.write_text(card, encoding="utf-8")


def _folder_name(folder: str | os.PathLike[str]) -> str:
    return Path(folder).absolute().name


def _take_commit_options(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Remove the options of a commit from the options of a save and return them; `TypeError` for an unknown one."""
    commit_options = {name: kwargs.pop(name) for name in _COMMIT_OPTIONS if name in kwargs}
    known = {*inspect.signature(PreTrainedModel.save_pretrained).parameters, "safe_serialization"}
    unknown = sorted(set(kwargs) - known)
    if unknown:
        raise TypeError(f"Saving or pushing a part has no option {unknown[0]!r}.")
    return commit_options


def _push(folder: str | os.PathLike[str], repo_id: str, variant: str | None, **commit_options: Any) -> None:
    replaced = (*weight_files(variant), *ADAPTER_FILES)
    push_files(
        matching_files(folder, PART_FILES),
        repo_id,
        replaced,
        **{"commit_message": "Upload a part of a CoSup model", **commit_options},
    )
