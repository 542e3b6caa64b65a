"""What differs between the architectures of transformers: the class that reads text alone, and the positions."""

from typing import Any

import torch
from transformers import AutoModel, AutoModelForTextEncoding, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

# pipeline("text-generation") looks for the class here, and not among registered ones: it would log an error and work
MODEL_FOR_CAUSAL_LM_MAPPING_NAMES["cosup"] = "CoSupForCausalLM"

# Model types whose first position is `pad_token_id + 1`: nothing reads the rows before it in their table of positions.
COUNTING_FROM_PADDING = (
    *("altclip_text_model", "bridgetower_text_model", "camembert", "clap_text_model", "data2vec-text", "esm"),
    *("ibert", "layoutlmv3", "lilt", "longformer", "luke", "markuplm", "mpnet", "roberta", "roberta-prelayernorm"),
    *("xlm-roberta", "xlm-roberta-xl", "xmod"),
)
# how architectures name the number of their positions
_NAMES_OF_POSITIONS = ("max_position_embeddings", "max_encoder_position_embeddings", "max_seq_len")


def encoder_auto_class(config: PreTrainedConfig) -> Any:
    """
    Return the Auto class that makes an encoder of `config`, a model without LM head that reads text alone.

    For T5 and its kind, `AutoModel` would make an encoder and a decoder, `AutoModelForTextEncoding` makes the encoder.
    """
    # the class says it: config.is_encoder_decoder is False for one half of an encoder-decoder
    return AutoModelForTextEncoding if type(config).is_encoder_decoder else AutoModel


def encoder_from_config(config: PreTrainedConfig) -> PreTrainedModel:
    """Return a new encoder with random weights."""
    return encoder_auto_class(config).from_config(config)


def num_positions(config: PreTrainedConfig) -> int | None:
    """Return how many tokens a model of this config can read, special tokens included; `None` without a limit."""
    config = config.get_text_config()
    for name in _NAMES_OF_POSITIONS:
        positions = getattr(config, name, None)
        if positions is not None and positions > 0:  # XLNet: -1
            break
    else:
        return None
    if config.model_type in COUNTING_FROM_PADDING:
        positions -= config.pad_token_id + 1
    return positions


def lm_logits(gen: PreTrainedModel, hidden: torch.Tensor) -> torch.Tensor:
    """Return a causal model's logits `(..., V)` of last hidden states `(..., h)`, scaled if it scales its own."""
    logits = gen.get_output_embeddings()(hidden)
    config = gen.config.get_text_config()
    if scale := getattr(config, "logit_scale", None):  # Cohere
        logits = logits * scale
    if divisor := getattr(config, "logits_scaling", None):  # Granite
        logits = logits / divisor
    # Gemma 2, RecurrentGemma
    if cap := getattr(config, "final_logit_softcapping", None) or getattr(config, "logits_soft_cap", None):
        logits = torch.tanh(logits / cap) * cap
    return logits
