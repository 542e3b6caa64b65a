"""
Checks of a model while it is built: are its parts of the right kind, do they embed, and can a checkpoint be loaded?

Only authors build models, so this file does not travel with a checkpoint.
"""

from collections.abc import Collection, Iterator, Mapping
from typing import Any, cast

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from .architectures_cosup import encoder_auto_class, encoder_from_config
from .encoding_cosup import evaluating, states_alone_and_followed

# what the code of an architecture raises when it gets a config or an input that it was not written for
_FAILURES = (ArithmeticError, AttributeError, LookupError, NotImplementedError, RuntimeError, TypeError, ValueError)
# how far a state may be from the same state next to padding or before more tokens, as a share of its length
_FLOAT32_TOLERANCE = 1e-3
_HALF_TOLERANCE = 0.1


# ---------------------------------------------------------------------- before parts are put together


def check_config(config: PreTrainedConfig, role: str) -> None:
    """
    Check that a config is of an architecture that can be a part. Its weights need not be loaded.

    Args:
        config (`PreTrainedConfig`): of the model that is to be a part.
        role (`str`): `"gen"`, `"emb_seq"` or `"query_encoder"`.

    Raises:
        `ValueError`: says why not.
    """
    if config.model_type == "cosup":
        raise ValueError(
            f"{role} is a CoSup model, with a Gen and an Emb_seq of its own: pass one of them (model.gen,"
            " model.emb_seq), or load the whole with CoSupForCausalLM.from_pretrained."
        )
    if config.model_type == "dpr":
        raise ValueError(
            f"{role} is a DPR model, which returns no states of tokens. Its weights are also published as BERT models,"
            " such as sentence-transformers/facebook-dpr-ctx_encoder-single-nq-base."
        )
    is_encoder_decoder = type(config).is_encoder_decoder
    if role == "gen" and is_encoder_decoder:
        raise ValueError(
            f"gen is an encoder-decoder ({config.model_type}), expected a causal language model such as Llama."
        )
    if type(config) in _auto_class(config, role)._model_mapping:
        return
    if is_encoder_decoder:
        raise ValueError(
            f"{role} is an encoder-decoder ({config.model_type}) of which transformers has no class for the encoder"
            " alone; T5, mT5 and UMT5 have one."
        )
    if not type(config).__module__.startswith("transformers."):
        raise ValueError(
            f"{role} ({config.model_type}) comes with code of its own, which a CoSup checkpoint would not carry: use"
            " an architecture of transformers, without trust_remote_code."
        )
    kind = "causal language model" if role == "gen" else "encoder"
    raise ValueError(f"{role} is of the type {config.model_type}, of which transformers has no {kind}.")


def check_weights(model: PreTrainedModel, info: Mapping[str, Collection[str]], name: str) -> None:
    """
    Check that a loaded checkpoint holds all weights of its model, and no further ones for the model's layers.

    Args:
        model (`PreTrainedModel`): just loaded.
        info (`dict`): what `from_pretrained(..., output_loading_info=True)` returned next to it.
        name (`str`): name or path of the checkpoint.

    Raises:
        `ValueError`: for weights that are missing, which are random now, and for weights that were left out though
            they belong to a layer of the model. Weights of heads and decoders may be left out.
    """
    missing = sorted(key for key in info["missing_keys"] if not key.startswith("pooler."))  # the pooler is not used
    if missing:
        raise ValueError(
            f"{name} lacks {len(missing)} weights of a {type(model).__name__}, e.g. {missing[0]}: is it the right half"
            " of the pair?"
        )
    modules = dict(model.named_modules())
    unused = sorted(key for key in info["unexpected_keys"] if _is_of_a_layer(key, modules))
    if unused:
        raise ValueError(
            f"{name} has {len(unused)} weights that a {type(model).__name__} of its config leaves out, e.g."
            f" {unused[0]}: this config is not the one that the weights were saved with."
        )


def _is_of_a_layer(weight: str, modules: Mapping[str, nn.Module]) -> bool:
    """Return whether a weight would belong to a list of layers, or to a module that has other weights."""
    owner = weight.rpartition(".")[0]
    while owner and owner not in modules:
        owner = owner.rpartition(".")[0]
    if not owner:
        return False
    return isinstance(modules[owner], nn.ModuleList) or bool(list(modules[owner].parameters(recurse=False)))


def check_part(part: PreTrainedModel, role: str) -> None:
    """
    Check that a model can be a part: loaded again from the config in a checkpoint, it would have the same class.

    Args:
        part (`PreTrainedModel`): Gen with its LM head, an encoder without one.
        role (`str`): `"gen"`, `"emb_seq"` or `"query_encoder"`.

    Raises:
        `ValueError`: says what the part is and what was expected.
    """
    check_config(part.config, role)
    name = type(part).__name__
    classes = _auto_class(part.config, role)._model_mapping[type(part.config)]
    if not isinstance(classes, tuple):
        classes = (classes,)
    if type(part) not in classes:
        raise ValueError(
            f"{role} is a {name}; loaded again from a checkpoint it would be a {classes[0].__name__}. Pass a model of"
            " that class."
        )
    try:
        embeddings = part.get_input_embeddings()
    except NotImplementedError:
        embeddings = None
    if not hasattr(embeddings, "weight"):
        raise ValueError(f"{role} ({name}) has no table of token embeddings, which control tokens need.")
    if role == "gen" and part.base_model is part:
        raise ValueError(
            f"gen ({name}) has no base model that transformers finds by its name, so its hidden states cannot be read:"
            " use another architecture."
        )


@torch.no_grad()
def check_causal(gen: PreTrainedModel) -> None:
    """
    Check that the Gen of a tied model reads from left to right, which not all of `AutoModelForCausalLM` do.

    Raises:
        `ValueError`: for an encoder, such as a `BertLMHeadModel` without `is_decoder`.
    """
    with evaluating(gen):
        alone, followed = states_alone_and_followed(cast(PreTrainedModel, gen.base_model))
    if (followed - alone).norm() > _tolerance(gen) * alone.norm():
        raise ValueError(
            f"gen ({type(gen).__name__}) cannot be a tied model (tie_emb_seq, the default without emb_seq): it is an"
            " encoder, whose states depend on later tokens."
        )


def _tolerance(model: PreTrainedModel) -> float:
    return _FLOAT32_TOLERANCE if model.dtype == torch.float32 else _HALF_TOLERANCE


def _auto_class(config: PreTrainedConfig, role: str) -> Any:
    return AutoModelForCausalLM if role == "gen" else encoder_auto_class(config)


# ---------------------------------------------------------------------- after parts were put together


def check_built(model: Any) -> None:
    """
    Check a model that was just built: one small pass through each encoder, and whether its checkpoint can be loaded.

    Args:
        model ([`CoSupForCausalLM`]): with new embedding rows and all settings.

    Raises:
        `ValueError`: names the part and what it does.
    """
    _check_reload(model.gen, model.config.gen_config, "gen")
    for role, encoder in _encoders(model):
        _check_embeddings(model, encoder, role)
        if role == "emb_seq" and model.config.tie_emb_seq:
            continue  # a checkpoint holds Gen, checked above
        _check_reload(encoder, getattr(model.config, f"{role}_config"), role)


def _encoders(model: Any) -> Iterator[tuple[str, PreTrainedModel]]:
    for role in ("emb_seq", "query_encoder"):
        encoder = getattr(model, role)
        if encoder is not None:
            yield role, encoder


@torch.no_grad()
def _check_embeddings(model: Any, encoder: PreTrainedModel, role: str) -> None:
    """Check that an encoder embeds text, and a short text in a batch with a longer one as if it were alone."""
    if encoder.config._attn_implementation not in ("eager", "sdpa"):
        return  # flash kernels may not run on the device on which the model is built
    name = f"{role} ({type(encoder).__name__})"
    vocab_size = cast(nn.Embedding, encoder.get_input_embeddings()).weight.shape[0]
    long = torch.arange(1, 6, device=encoder.device) * (vocab_size // 6)
    ids = torch.stack([long, long.flip(0)])  # (2, 5)
    mask = torch.ones_like(ids)
    mask[1, 3:] = 0  # the second text has 3 tokens
    try:
        with evaluating(model):
            together = model._encode(encoder, ids, mask)[1]  # (h,)
            alone = model._encode(encoder, ids[1:, :3], mask[1:, :3])[0]
    except _FAILURES as error:
        raise ValueError(f"{name} cannot embed a short text: {type(error).__name__}: {error}") from error
    if (together - alone).norm() > _tolerance(encoder) * alone.norm():
        raise ValueError(
            f"{name} does not leave out padding: the embedding of a passage would depend on the other passages in its"
            " batch. Use another architecture."
        )


def _check_reload(part: PreTrainedModel, config: PreTrainedConfig, role: str) -> None:
    """Check that a model made from the saved config has the class of this part, and weights of the same shapes."""
    if getattr(part, "hf_quantizer", None) is not None:
        return  # quantised weights differ in shape from new ones
    name = f"{role} ({type(part).__name__})"
    saved = type(config).from_dict(config.to_dict())
    try:
        with torch.device("meta"), no_init_weights():  # takes neither memory nor time
            loaded = AutoModelForCausalLM.from_config(saved) if role == "gen" else encoder_from_config(saved)
    except _FAILURES as error:
        problem = f"{type(error).__name__}: {error}"
        raise ValueError(f"{name} could not be loaded again from a checkpoint: {problem}") from error
    if type(loaded) is not type(part):
        raise ValueError(f"{name} would be loaded from a checkpoint as a {type(loaded).__name__}.")
    shapes, expected = _shapes(part), _shapes(loaded)
    for weight in sorted(shapes.keys() | expected.keys()):
        if shapes.get(weight) != expected.get(weight):
            raise ValueError(
                f"{name} has the weight {weight} of shape {shapes.get(weight)}, its config says"
                f" {expected.get(weight)}: it could not be loaded again from a checkpoint."
            )


def _shapes(model: PreTrainedModel) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the weights by name. A pooler, which CoSup does not use, is left out."""
    shapes = {}
    for name, weight in model.state_dict().items():
        if not name.startswith("pooler."):
            shapes[name] = tuple(weight.shape)
    return shapes
