"""
The keys of a token memory: for each token of a text, what entered the FFN of Gen's last layer one position before.

arXiv 2311.09615, section 2: the key is the input of the last FFN, after its norm, and the value is the next token.
"""

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .architectures_cosup import num_positions
from .encoding_cosup import evaluating
from .packing_cosup import pad_rows
from .states_cosup import recording, states_at
from .tokenization_cosup import encode_texts, same_tokenizer

# Model type -> name of the FFN of layer {}. In gptj, gpt_neox, falcon, phi and cohere, attention and FFN are parallel:
# the key does not hold the attention of the last layer. In olmo2 no norm comes before the FFN.
_LLAMA_LIKE = (
    *("cohere", "gemma", "gemma2", "gemma3_text", "gpt_oss", "granite", "llama", "mistral", "mixtral", "olmo"),
    *("olmo2", "olmoe", "phi", "phi3", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "smollm3", "stablelm"),
    "starcoder2",
)
FFN_NAMES = {
    **dict.fromkeys(_LLAMA_LIKE, "model.layers.{}.mlp"),
    **dict.fromkeys(("bloom", "codegen", "falcon", "gpt2", "gpt_neo", "gptj"), "transformer.h.{}.mlp"),
    "gemma3": "model.language_model.layers.{}.mlp",
    "gpt_neox": "gpt_neox.layers.{}.mlp",
    "opt": "model.decoder.layers.{}.fc1",
}
LONGEST_WINDOW = 1024  # tokens, unless a call says otherwise
SORTED_BATCHES = 4  # windows of so many batches are sorted by length, so that a batch has little padding

Window: TypeAlias = tuple[int, list[int], int]  # number of the document, token ids, place of the first target in them


@dataclass
class TokenStates:
    """
    Consecutive tokens of documents, each with the states of Gen that predict it; all on Gen's device.

    Args:
        keys (`torch.Tensor` of shape `(n, d)`): what entered the last FFN one position before each token, in Gen's
            dtype.
        values (`torch.LongTensor` of shape `(n,)`): ids of the tokens.
        documents (`torch.LongTensor` of shape `(n,)`): which document each token is from, ascending.
        hidden (`torch.Tensor` of shape `(n, h)`, *optional*): what the LM head reads, at the positions of the keys.
    """

    keys: torch.Tensor
    values: torch.Tensor
    documents: torch.Tensor
    hidden: torch.Tensor | None = None


def gen_of(model: Any) -> PreTrainedModel:
    """Return the Gen of a [`CoSupForCausalLM`]; a plain causal language model is returned as it is."""
    return model.gen if model.config.model_type == "cosup" else model


def tokenizer_of(model: Any, tokenizer: PreTrainedTokenizerBase | None) -> PreTrainedTokenizerBase:
    """
    Return the tokenizer of a CoSup model, or the given one of a plain language model.

    Raises:
        `ValueError`: if a plain language model has none given, or a CoSup model another one.
    """
    if gen_of(model) is model:
        if tokenizer is None:
            raise ValueError("A plain language model knows no tokenizer: pass its own as tokenizer=.")
        return tokenizer
    if tokenizer is not None and not same_tokenizer(tokenizer, model.tokenizer):
        raise ValueError("tokenizer reads text differently than the model's own, which this memory is for.")
    return model.tokenizer


def ffn_name(gen: Any) -> str:
    """
    Return the full name of the FFN of Gen's last layer, such as `"model.layers.31.mlp"`; what enters it is the key.

    Raises:
        `ValueError`: for an architecture whose FFN is not known.
    """
    gen = gen_of(gen)
    kind = gen.config.model_type
    if kind not in FFN_NAMES:
        raise ValueError(f"The key of a {kind} model is not known; known are {', '.join(sorted(FFN_NAMES))}.")
    return FFN_NAMES[kind].format(gen.config.get_text_config().num_hidden_layers - 1)


def encode_documents(texts: list[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """
    Return the token ids of documents: BOS, if the tokenizer has one, and the text; no EOS.

    A control token in a text is read as text.

    Raises:
        `ValueError`: when the tokenizer has no ordinary tokens for the characters of a special token in a text.
    """
    bos = [tokenizer.bos_token_id] if tokenizer.bos_token_id is not None else []
    return [bos + ids for ids in encode_texts(tokenizer, texts)]


def document_ids(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the token ids of one document, see [`encode_documents`]."""
    return encode_documents([text], tokenizer)[0]


def windows(length: int, max_length: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """
    Yield the sliding windows of a document, in which every token but the first is predicted exactly once.

    Args:
        length (`int`): tokens of the document.
        max_length (`int`): tokens of a window, at least 2.
        stride (`int`): tokens from one window to the next, less than `max_length`: all targets but the first
            `max_length - 1` of a document are predicted from at least `max_length - stride` tokens.

    Yields:
        `(start, end, first_target)`: the window reads tokens `start` to `end - 1`, and its targets are `first_target`
            to `end - 1`.

    Raises:
        `ValueError`: for a max_length below 2, or a stride outside 1 to `max_length - 1`.
    """
    check_window(max_length, stride)
    first_target = 1
    for start in itertools.count(0, stride):
        end = min(start + max_length, length)
        if first_target < end:
            yield start, end, first_target
        if end == length:
            return
        first_target = end


def window_size(model: Any, max_length: int | None, stride: int | None) -> tuple[int, int]:
    """
    Return the length and the stride of a model's windows, with defaults for what is not given.

    Args:
        model (`PreTrainedModel`): a [`CoSupForCausalLM`] or another causal language model.
        max_length (`int`, *optional*): defaults to what Gen can read, at most 1,024 tokens.
        stride (`int`, *optional*): defaults to half of `max_length`.

    Raises:
        `ValueError`: for windows that are longer than Gen can read, and as in [`windows`].
    """
    positions = num_positions(gen_of(model).config)
    if max_length is None:
        max_length = min(LONGEST_WINDOW, positions or LONGEST_WINDOW)
    elif positions is not None and max_length > positions:
        raise ValueError(f"max_length is {max_length}, the model reads at most {positions} tokens.")
    stride = max_length // 2 if stride is None else stride
    check_window(max_length, stride)
    return max_length, stride


def check_window(max_length: int, stride: int) -> None:
    """Raise `ValueError` unless windows of this length and stride predict every token."""
    if max_length < 2:
        raise ValueError(f"max_length is {max_length}, expected at least 2.")
    if not 1 <= stride < max_length:
        raise ValueError(f"stride is {stride}, expected 1 to {max_length - 1}, less than max_length.")


def token_states(
    gen: Any,
    documents: Iterable[list[int]],
    *,
    max_length: int,
    stride: int,
    batch_size: int,
    with_hidden: bool = False,
) -> Iterator[TokenStates]:
    """
    Compute the keys of documents; only Gen's body runs, without its LM head.

    The keys depend on the documents and the windows alone, not on `batch_size` or padding.

    Args:
        gen (`PreTrainedModel`): a causal language model, or a [`CoSupForCausalLM`], used on its device, in its dtype.
        documents (iterable of `list[int]`): token ids, see [`document_ids`]; read as they are needed. One of fewer
            than two tokens has no key.
        max_length (`int`), stride (`int`): see [`windows`].
        batch_size (`int`): windows in a forward.
        with_hidden (`bool`): also return what the LM head reads.

    Returns:
        iterator of [`TokenStates`]: in the order of the text.

    Raises:
        `ValueError`: for an architecture whose key is not known, and as in [`windows`].
    """
    gen, name = gen_of(gen), ffn_name(gen)
    check_window(max_length, stride)
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}, expected at least 1.")
    return _token_states(gen, name, _windows_of(documents, max_length, stride), batch_size, with_hidden)


def _windows_of(documents: Iterable[list[int]], max_length: int, stride: int) -> Iterator[Window]:
    for number, ids in enumerate(documents):
        for start, end, first_target in windows(len(ids), max_length, stride):
            yield number, ids[start:end], first_target - start


def _token_states(
    gen: PreTrainedModel, name: str, source: Iterator[Window], batch_size: int, with_hidden: bool
) -> Iterator[TokenStates]:
    while chunk := list(itertools.islice(source, SORTED_BATCHES * batch_size)):
        by_length = sorted(range(len(chunk)), key=lambda place: -len(chunk[place][1]))
        states: list[tuple[torch.Tensor, ...]] = [()] * len(chunk)
        for start in range(0, len(chunk), batch_size):
            places = by_length[start : start + batch_size]
            batch = _states_of([chunk[place] for place in places], gen, name, with_hidden)
            for place, window_states in zip(places, batch, strict=True):
                states[place] = window_states
        keys, *hidden = map(torch.cat, zip(*states, strict=True))
        values, numbers = [], []
        for number, ids, first in chunk:
            values += ids[first:]
            numbers += [number] * (len(ids) - first)
        tensors = torch.tensor([values, numbers], dtype=torch.long, device=keys.device)
        yield TokenStates(keys, tensors[0], tensors[1], *hidden)


@torch.no_grad()
def _states_of(
    batch: list[Window], gen: PreTrainedModel, name: str, with_hidden: bool
) -> Iterator[tuple[torch.Tensor, ...]]:
    """Return for each window the keys `(n, d)` of its targets, and with `with_hidden` their hidden states `(n, h)`."""
    # padding on the right needs no mask: no token of a causal model sees it
    ids, _ = pad_rows([ids for _, ids, _ in batch], device=gen.device)
    with evaluating(gen), recording(gen, (name,)) as recorded:
        hidden = gen.base_model(input_ids=ids, use_cache=False).last_hidden_state  # (B, T, h)
    width = ids.shape[1]
    positions: list[int] = []
    counts = []
    for row, (_, window_ids, first) in enumerate(batch):
        positions += range(row * width + first - 1, row * width + len(window_ids) - 1)
        counts.append(len(window_ids) - first)
    flat = torch.tensor(positions, device=hidden.device)
    states = [states_at(recorded, (name,), hidden, flat)[name]]
    if with_hidden:
        states.append(hidden.flatten(0, 1)[flat])
    return zip(*(tensor.split(counts) for tensor in states), strict=True)
