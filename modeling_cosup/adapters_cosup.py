"""
Adapters of PEFT, such as LoRA, merged into the model that they adapt.

Gen and Emb_seq are plain models: a checkpoint with unmerged adapters would not load as such.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import is_peft_available

from .checks_cosup import check_weights
from .hub_cosup import is_repo_id
from .source_files_cosup import SourceFiles

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
ADAPTER_NAME = "to_be_merged"
MODEL_FILES = ("model.safetensors", "model.safetensors.index.json")


@dataclass
class Adapter:
    """
    An adapter in a folder or repository.

    Args:
        name (`str`): folder or repository.
        folder (`Path`): local folder of its files.
        base (`str`): name or path of the model that it adapts.
        revision (`str`, *optional*): of that model.
    """

    name: str
    folder: Path
    base: str
    revision: str | None

    def base_options(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """Return options of `from_pretrained` for the base model, which has a revision of its own."""
        return {**options, "revision": self.revision}


def find_adapter(name: str, subfolder: str = "", hub_options: Mapping[str, Any] | None = None) -> Adapter | None:
    """
    Return the adapter that a folder or repository holds; `None` if it holds none.

    Raises:
        `ImportError`: if PEFT is not installed.
        `ValueError`: if there is a whole model next to the adapter, if no base model is named, for weights that are
            not in safetensors, and for a kind of adapter that cannot be merged.
    """
    files = SourceFiles(name, hub_options or {})
    prefix = f"{subfolder}/" if subfolder else ""
    config_file = files.find(f"{prefix}{CONFIG_FILE}")
    if config_file is None:
        return None
    if any(files.find(f"{prefix}{file}") for file in MODEL_FILES):
        raise ValueError(
            f"{name} holds a whole model and an adapter ({CONFIG_FILE}) that could be part of it already: keep each in"
            " a folder of its own."
        )
    if not is_peft_available():
        raise ImportError(f'{name} is an adapter, which PEFT reads: pip install "cosup[peft]".')
    from peft import PeftConfig

    config = PeftConfig.from_pretrained(str(config_file.parent))
    kind = getattr(config.peft_type, "value", config.peft_type)
    if config.is_prompt_learning or config.is_adaption_prompt:
        raise ValueError(f"{name} is an adapter of kind {kind}, which cannot be merged into the weights of a model.")
    if not config.base_model_name_or_path:
        raise ValueError(f"{name} is an adapter, and its {CONFIG_FILE} names no base model. {_by_hand(name)}")
    weights_file = files.find(f"{prefix}{WEIGHTS_FILE}")
    if weights_file is None:
        raise ValueError(f"{name} is an adapter without {WEIGHTS_FILE}; only safetensors are read.")
    return Adapter(name, weights_file.parent, config.base_model_name_or_path, config.revision)


def _by_hand(name: str) -> str:
    return (
        f"Load the base model, then pass PeftModel.from_pretrained(base_model, {name!r}).merge_and_unload() with its"
        " tokenizer."
    )


def base_error(adapter: Adapter, error: OSError) -> OSError:
    """Return the error to raise if the base model of an adapter cannot be loaded."""
    return OSError(
        f"{adapter.name} is an adapter of {adapter.base}, which cannot be loaded: {error}\n{_by_hand(adapter.name)}"
    )


def load_merged(adapter: Adapter, auto_class: Any, model_kwargs: Mapping[str, Any]) -> PreTrainedModel:
    """
    Load the base model of an adapter and merge the adapter into it.

    Args:
        adapter ([`Adapter`]): made of a model with or without its LM head.
        auto_class: `AutoModel` or `AutoModelForCausalLM`.
        model_kwargs (`dict`): for its `from_pretrained`.

    Raises:
        `OSError`: if the base model cannot be loaded.
        `ValueError`: if the base model is quantised or lacks weights, or the adapter is not for it.
    """
    try:
        model, info = auto_class.from_pretrained(
            adapter.base, output_loading_info=True, **adapter.base_options(model_kwargs)
        )
    except OSError as error:
        raise base_error(adapter, error) from error
    check_weights(model, info, adapter.base)
    if getattr(model, "hf_quantizer", None) is not None:
        raise ValueError(
            f"{adapter.name} is an adapter of {adapter.base}, whose weights are quantised: merged into them, it would"
            f" lose precision. {_by_hand(adapter.name)} Take a base model that is not quantised."
        )
    weights = _weights_by_layer(adapter, model)
    _grow_embeddings(model, weights)
    _put_on(model, adapter, weights)
    model = merge_adapters(model, adapter.name)
    if is_repo_id(adapter.name):
        model.config._name_or_path = adapter.name
    return model


def _weights_by_layer(adapter: Adapter, model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """
    Return the weights of an adapter, by the names that the layers have in a model with or without an LM head.

    Weights for an LM head are left out if the model has none.
    """
    prefix = f"{model.base_model_prefix}."
    children = {name for name, _ in model.named_children()}
    has_head = model.base_model_prefix in children
    weights = {}
    for key, value in load_file(adapter.folder / WEIGHTS_FILE).items():
        name = key.removeprefix("base_model.model.")
        if not has_head:
            name = name.removeprefix(prefix)
        elif name.split(".")[0] not in children:
            name = prefix + name
        if name.split(".")[0] in children:
            weights[name] = value
    return weights


def _grow_embeddings(model: Any, weights: Mapping[str, torch.Tensor]) -> None:
    """Make room for the embeddings that were saved with an adapter, if they are of more tokens than the model's."""
    embeddings = model.get_input_embeddings()
    layer_name = next(name for name, module in model.named_modules() if module is embeddings)
    for suffix in ("weight", "base_layer.weight"):
        saved = weights.get(f"{layer_name}.{suffix}")
        if saved is not None and len(saved) > len(embeddings.weight):
            model.resize_token_embeddings(len(saved), mean_resizing=False)


def _put_on(model: PreTrainedModel, adapter: Adapter, weights: dict[str, torch.Tensor]) -> None:
    """
    Put an adapter on a model, in place.

    Raises:
        `ValueError`: if weights of the adapter are missing, or belong to a layer that the model lacks.
    """
    from peft import PeftConfig, inject_adapter_in_model, set_peft_model_state_dict

    config = PeftConfig.from_pretrained(str(adapter.folder))
    try:
        inject_adapter_in_model(config, model, ADAPTER_NAME)
    except ValueError as error:  # none of its layers is in the model
        raise ValueError(f"{adapter.name} does not fit {adapter.base}: {error}") from error
    result: Any = set_peft_model_state_dict(model, weights, ADAPTER_NAME)
    parameters = dict(model.named_parameters())  # a tied parameter is listed under its first name only
    missing = [key for key in result.missing_keys if f".{ADAPTER_NAME}" in key and key in parameters]
    if missing:
        raise ValueError(
            f"{adapter.name} does not fit {adapter.base}: it lacks {len(missing)} weights, e.g. {missing[0]}."
        )
    unknown = result.unexpected_keys
    if unknown:
        raise ValueError(
            f"{adapter.name} does not fit {adapter.base}, which lacks {len(unknown)} of the weights that it adapts,"
            f" e.g. {unknown[0]}."
        )


def merge_adapters(model: Any, role: str) -> Any:
    """
    Return a model whose adapters are merged into its weights, in place; any other object as it is.

    Args:
        model (`PeftModel` or `PreTrainedModel`): a model that PEFT has wrapped, or into which transformers or PEFT
            have loaded adapters. All weights of the merged model can be trained.
        role (`str`): names the model in an error.

    Raises:
        `ValueError`: for weights that are quantised, and for a kind of adapter that cannot be merged.
    """
    if not is_peft_available():
        return model
    from peft import PeftModel
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    if isinstance(model, PeftModel):
        kind = model.active_peft_config.peft_type.value
        if not hasattr(model, "merge_and_unload"):
            raise ValueError(
                f"{role} has an adapter of kind {kind}, which cannot be merged into the weights of a model."
            )
        model = model.get_base_model()
    if not isinstance(model, PreTrainedModel):
        return model
    adapted: list[tuple[str, Any]] = []
    for name, module in model.named_modules():
        if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper):
            adapted.append((name, module))
    if not adapted:
        return model
    if getattr(model, "hf_quantizer", None) is not None:
        raise ValueError(
            f"{role} has adapters of quantised weights, which cannot be merged without a loss: load its base model"
            " unquantised, put the adapter on it and call merge_and_unload()."
        )
    is_tied = _untie(model)
    merged: list[str] = []
    for name, module in adapted:
        if any(name.startswith(f"{outer}.") for outer in merged):
            continue  # part of a layer that is merged as a whole
        if isinstance(module, AuxiliaryTrainingWrapper):
            layer = module.unload_and_optionally_merge_module(merge=True, safe_merge=True, adapter_names=None)
        else:
            module.merge(safe_merge=True)
            layer = module.get_base_layer()
        vars(layer)["_is_hf_initialized"] = True  # otherwise a model that contains this one would initialise it again
        if isinstance(layer, nn.Linear):  # PEFT swaps the two for an LM head that it ties
            layer.out_features, layer.in_features = layer.weight.shape
        model.set_submodule(name, layer)
        merged.append(name)
    if is_tied:
        _tie_again(model)
    model._hf_peft_config_loaded = False
    return model.requires_grad_(True)


@torch.no_grad()
def _untie(model: Any) -> bool:
    """
    Give the LM head weights of its own, equal to the embeddings that it shares. Return whether it shared them.

    An adapter of the embeddings alone must not change the LM head.
    """
    head = model.get_output_embeddings()
    if head is None:
        return False
    shared = {id(parameter) for parameter in model.get_input_embeddings().parameters()}
    is_tied = False
    for module in head.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if id(parameter) in shared:
                setattr(module, name, nn.Parameter(parameter.detach().clone()))
                is_tied = True
    return is_tied


def _tie_again(model: Any) -> None:
    """Tie the LM head to the embeddings again, unless adapters have made them different."""
    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    if torch.equal(embeddings.weight, head.weight):
        head.weight = embeddings.weight
    else:
        for config in (model.config, model.config.get_text_config()):
            config.tie_word_embeddings = False
        model.all_tied_weights_keys = model.get_expanded_tied_weights_keys(all_submodels=False)
