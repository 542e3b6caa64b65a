"""Models, tokenizers and chat templates that recipes/import_checkpoints.py reads."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateError

if TYPE_CHECKING:  # a recipe that only prints its options does not wait for torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

ONLY_SAFETENSORS = (
    "Only safetensors are read; --allow_pytorch_bin also reads pytorch_model.bin, with torch's weights_only reader."
)


def load(auto_class: Any, name: str, args: Any, subfolder: str = "") -> PreTrainedModel:
    """
    Load a model; only from safetensors, unless `--allow_pytorch_bin` is given.

    Args:
        auto_class: `AutoModelForCausalLM`, or `AutoModel` and its kind.
        name (`str`): repository or folder.
        args: the options `dtype` and `allow_pytorch_bin`.
        subfolder (`str`): folder of the transformer.

    Raises:
        `OSError`: for a model that is missing or damaged, or would have to be unpickled.
        `ValueError`: for missing weights, which transformers would initialise at random.
    """
    from safetensors import SafetensorError

    from modeling_cosup.sources_cosup import load_model

    options = {"dtype": args.dtype, "use_safetensors": None if args.allow_pytorch_bin else True}
    try:
        return load_model(auto_class, name, options, subfolder).eval()
    except SafetensorError as error:
        raise OSError(f"{name}: its weights cannot be read: {error}") from error
    except OSError as error:
        hint = "" if args.allow_pytorch_bin else f"\n{ONLY_SAFETENSORS}"
        raise OSError(f"{name}: {error}{hint}") from error


def load_gen_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a repository or folder; if there is none, the error names the option to give."""
    from modeling_cosup.sources_cosup import load_tokenizer

    try:
        return load_tokenizer(name)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{name} holds no tokenizer that can be read: {error}\n"
            "Give Gen's tokenizer, e.g. of its base model, as --tokenizer."
        ) from error


def set_chat_template(tokenizer: PreTrainedTokenizerBase, path: str) -> None:
    """
    Give a tokenizer the chat template of a Jinja file.

    Raises:
        `ValueError`: if the template cannot be read or rendered, or leaves out the user's message.
    """
    try:
        tokenizer.chat_template = Path(path).read_text(encoding="utf-8-sig")
        question = [{"role": "user", "content": "who was first?"}]
        rendered = tokenizer.apply_chat_template(question, add_generation_prompt=True, tokenize=False)
    except (OSError, UnicodeError, TemplateError) as error:
        raise ValueError(f"--chat_template_path {path} cannot be read as a Jinja chat template: {error}") from error
    if "who was first?" not in rendered:
        raise ValueError(f"--chat_template_path {path} writes {rendered!r} for a question, without the question.")
