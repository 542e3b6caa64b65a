"""
How prompts, passages and control tokens become token ids, the same in training, in the index and while generating.

Text can hold anything, "[NSP]" and "</s>" included: it is always encoded as text. Control tokens, BOS and EOS are
appended as ids.
"""

import hashlib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache, partial
from typing import Any, cast

from jinja2 import TemplateError
from transformers import AddedToken, PreTrainedTokenizerBase

from .architectures_cosup import num_positions
from .configuration_cosup import CoSupConfig

CONTROL_TOKENS = {"nsp_token": "[NSP]", "cs_token": "[Cs]", "ce_token": "[CE]"}

# The paper's prompt, `<instruction>## Input:\n\n<input>## Output:\n\n`, for a tokenizer without a chat template:
# the system message is the instruction, the user message the input.
PAPER_CHAT_TEMPLATE = (
    "{% if bos_token %}{{ bos_token }}{% endif %}"
    "{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{ message['content'] }}"
    "{% elif message['role'] == 'user' %}## Input:\n\n{{ message['content'] }}"
    "{% else %}## Output:\n\n{{ message['content'] }}{{ eos_token }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}## Output:\n\n{% endif %}"
)
# private-use characters around a control token in user text; they are removed before encoding
_MARKERS = ("\U000f0000", "\U000f0001")
# tokenizers that differ in their normaliser or pre-tokenizer give different ids for this text
_PROBE = 'The 3 Zürich "élan" :: don\'t\n\tstop, 42.5% [x] </y> 東京 ½'


def add_control_tokens(tokenizer: PreTrainedTokenizerBase, names: Mapping[str, str] | None = None) -> list[int]:
    """
    Add `[NSP]`, `[Cs]` and `[CE]` to a tokenizer, in place; also a chat template and a pad token if it has none.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): changed in place.
        names (`dict`, *optional*): other strings for `nsp_token`, `cs_token`, `ce_token`, e.g.
            `{"nsp_token": "[Ret]"}`.

    Returns:
        `list[int]`: the ids of the three tokens.

    Raises:
        `ValueError`: when two of the three are the same token.
    """
    names = {**CONTROL_TOKENS, **(names or {})}
    tokens = list(names.values())
    # special: never split, and skipped when decoding
    # not normalized: under a lower-casing normaliser "[nsp]" in a text would become [NSP]
    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in tokens], special_tokens=True)
    ids = cast(list[int], tokenizer.convert_tokens_to_ids(tokens))
    if len(set(ids)) != 3 or None in ids:
        raise ValueError(f"The control tokens {tokens} have the ids {ids}, expected three different ones.")
    if tokenizer.chat_template is None:
        tokenizer.chat_template = PAPER_CHAT_TEMPLATE
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.convert_ids_to_tokens(ids[2])
    _special_ids.cache_clear()  # a token of the vocabulary may have become special
    return ids


def encode_texts(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], names: Sequence[str] | None = None
) -> list[list[int]]:
    """
    Encode texts as text: no special tokens are added and none in the text is recognised.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): any tokenizer.
        texts (`list[str]`): may hold anything.
        names (`list[str]`, *optional*): what each text is, for the error.

    Returns:
        `list[list[int]]`: token ids of each text; none is in [`special_ids`].

    Raises:
        `ValueError`: when the tokenizer has no ordinary tokens for the characters of a special token in a text.
    """
    if not texts:
        return []
    encoded = tokenizer(list(texts), add_special_tokens=False, split_special_tokens=True, verbose=False)["input_ids"]
    specials = special_ids(tokenizer)
    for row, ids in enumerate(encoded):
        if not specials.isdisjoint(ids):
            name = "The text" if names is None else names[row]
            encoded[row] = _spelled_out(tokenizer, ids, specials, f"{name} ({texts[row][:80]!r})")
    return encoded


def special_ids(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Return the ids that no text may produce: all special tokens, except one that is only for unknown words."""
    return _special_ids(tokenizer, len(tokenizer), repr(tokenizer.special_tokens_map))


@lru_cache(maxsize=4)  # it takes longer than encoding a short text
def _special_ids(tokenizer: PreTrainedTokenizerBase, size: int, names: str) -> frozenset[int]:
    ids = {id for id, token in tokenizer.added_tokens_decoder.items() if token.special}
    ids.update(tokenizer.all_special_ids)
    bos, eos = bos_and_eos(tokenizer)
    if tokenizer.unk_token_id is not None and tokenizer.unk_token_id not in bos + eos:
        ids.discard(tokenizer.unk_token_id)
    return frozenset(ids)


def _spelled_out(tokenizer: PreTrainedTokenizerBase, ids: list[int], specials: frozenset[int], name: str) -> list[int]:
    """
    Return `ids`, which were read from text, with each special token replaced by the tokens of its characters.

    A Unigram vocabulary reads "</s>" in a text as one word. Here its first character is read alone, then the rest.
    """
    spelled: list[int] = []
    for id in ids:
        if id not in specials or id == tokenizer.unk_token_id:
            spelled.append(id)
            continue
        token = cast(str, tokenizer.convert_ids_to_tokens(id))
        for piece in (token[:1], token[1:]):
            if tokenizer.is_fast:  # by the bare model: the pre-tokenizer might mark the piece as the start of a word
                spelled += [part.id for part in tokenizer.backend_tokenizer.model.tokenize(piece)]
            else:
                spelled += _encode_without_added_tokens(tokenizer, piece)
    left = specials.intersection(spelled)
    if left:
        tokens = tokenizer.convert_ids_to_tokens(sorted(left))
        raise ValueError(
            f"{name} holds the special tokens {tokens}, which {type(tokenizer).__name__} cannot read as text."
        )
    return spelled


def render_passage(passage: Mapping[str, Any], template: str) -> str:
    """Render a passage with a template such as `"{title} :: {text}"`; without a title, return its text alone."""
    if not passage.get("title"):
        return passage["text"]
    # in one pass, so that a title that holds "{text}" stays as it is
    return re.sub(r"\{(title|text)\}", lambda match: passage[match[1]], template)


def encode_passages_for_gen(
    tokenizer: PreTrainedTokenizerBase,
    passages: Iterable[Mapping[str, Any]],
    config: CoSupConfig,
    cut: set[int] | None = None,
) -> list[list[int]]:
    """
    Return token ids of passages as Gen reads them between `[NSP]` and `[Cs]`, each cut to `max_passage_length`.

    `cut`, if given, gets the numbers of the passages that were longer.
    """
    # read once: looking up a config's attribute takes longer than encoding a short passage
    template, length = config.passage_template, config.max_passage_length
    return _cut_rows(_encode_passages(tokenizer, passages, template), length, cut)


def _encode_passages(
    tokenizer: PreTrainedTokenizerBase, passages: Iterable[Mapping[str, Any]], template: str, prompt: str = ""
) -> list[list[int]]:
    texts, names = [], []
    for passage in passages:
        texts.append(prompt + render_passage(passage, template))
        names.append(f"Passage {passage.get('id')!r}")
    return encode_texts(tokenizer, texts, names)


def _cut_rows(rows: Iterable[list[int]], length: int, cut: set[int] | None) -> list[list[int]]:
    """Return the first `length` ids of each row; `cut`, if given, gets the numbers of the rows that were longer."""
    rows = list(rows)
    if cut is not None:
        cut.update(i for i, ids in enumerate(rows) if len(ids) > length)
    return [ids[:length] for ids in rows]


def encode_passages_for_emb_seq(
    tokenizer: PreTrainedTokenizerBase,
    passages: Iterable[Mapping[str, Any]],
    config: CoSupConfig,
    cut: set[int] | None = None,
) -> list[list[int]]:
    """
    Return token ids of passages as Emb_seq reads them: BOS, `config.passage_prompt` and the passage, EOS.

    BOS and EOS fall back to CLS and SEP; `config.emb_seq_add_bos_token` and `config.emb_seq_add_eos_token` leave them
    out. Prompt and passage are first truncated to `config.max_passage_length` tokens, to keep the EOS, which gives the
    embedding. `cut`, if given, gets the numbers of the passages that were longer.

    Raises:
        `ValueError`: when pooling is `"eos"` and the tokenizer has neither an EOS nor a SEP token.
    """
    rows = _encode_passages(tokenizer, passages, config.passage_template, config.passage_prompt)
    return add_bos_and_eos(tokenizer, rows, config, cut)


def add_bos_and_eos(
    tokenizer: PreTrainedTokenizerBase, rows: Iterable[list[int]], config: CoSupConfig, cut: set[int] | None = None
) -> list[list[int]]:
    """Return token ids of passages, truncated, between BOS and EOS; see [`encode_passages_for_emb_seq`]."""
    bos, eos = added_tokens(tokenizer, config)
    length = config.max_passage_length
    if not eos and config.emb_seq_pooling == "eos":
        raise ValueError(
            f"{type(tokenizer).__name__} has no EOS or SEP token, which emb_seq_pooling='eos' reads; use 'lasttoken',"
            " 'mean' or 'cls'."
        )
    return [bos + ids + eos for ids in _cut_rows(rows, length, cut)]


def encode_queries_for_emb_seq(
    tokenizer: PreTrainedTokenizerBase,
    emb_seq_tokenizer: PreTrainedTokenizerBase,
    rows: Iterable[list[int]],
    config: CoSupConfig,
) -> tuple[list[list[int]], int]:
    """
    Return everything up to and including `[NSP]` as Emb_seq or the query encoder reads it (section 5, "Baseline").

    If both tokenizers are the same object and there is no query prompt, rows keep their ids. Otherwise a row is
    decoded without special tokens, and encoded again after the prompt. A query of more than [`query_length`] tokens
    keeps its start (its first token, or BOS and the query prompt) and its end, where the question is.

    Args:
        tokenizer, emb_seq_tokenizer (`PreTrainedTokenizerBase`): Gen's and Emb_seq's.
        rows (`list[list[int]]`): in Gen's token ids.
        config (`CoSupConfig`): `query_prompt`, and whether BOS and EOS are added.

    Returns:
        `(list[list[int]], int)`: the ids, and the number of queries that were too long.

    Raises:
        `ValueError`: when the query prompt leaves no room for a query.
    """
    queries = [list(row) for row in rows]
    # what a query that is too long keeps of its start, and the fewest tokens that it keeps of its end
    starts, num_last = [row[:1] for row in queries], 1
    if emb_seq_tokenizer is not tokenizer or config.query_prompt:
        bos, eos = added_tokens(emb_seq_tokenizer, config)
        texts = [f"{config.query_prompt}{tokenizer.decode(row, skip_special_tokens=True)}" for row in queries]
        queries = [bos + ids + eos for ids in encode_texts(emb_seq_tokenizer, texts)]
        starts = [bos + encode_texts(emb_seq_tokenizer, [config.query_prompt])[0]] * len(queries)
        num_last = len(eos) + 1
    limit = query_length(emb_seq_tokenizer, config)
    too_long = [i for i, ids in enumerate(queries) if len(ids) > limit]
    if too_long and len(starts[0]) + num_last > limit:
        raise ValueError(
            f"query_prompt, with BOS and EOS, leaves no room for a query: the encoder reads {limit} tokens."
        )
    for i in too_long:
        queries[i] = starts[i] + queries[i][len(starts[i]) - limit :]
    return queries, len(too_long)


def query_length(emb_seq_tokenizer: PreTrainedTokenizerBase, config: CoSupConfig) -> int:
    """Return how many tokens the encoder of queries reads, BOS and EOS included, within its tokenizer's limit."""
    encoder_config = config.query_encoder_config if config.query_from == "query_encoder" else config.emb_seq_config
    positions = num_positions(encoder_config)
    if positions is None:
        return emb_seq_tokenizer.model_max_length
    return min(emb_seq_tokenizer.model_max_length, positions)


def added_tokens(tokenizer: PreTrainedTokenizerBase, config: CoSupConfig) -> tuple[list[int], list[int]]:
    """Return the ids that Emb_seq reads before and after a text: BOS and EOS, each only if the config adds it."""
    bos, eos = bos_and_eos(tokenizer)
    if not config.emb_seq_add_bos_token:
        bos = []
    if not config.emb_seq_add_eos_token:
        eos = []
    return bos, eos


def bos_and_eos(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """Return `([BOS or CLS], [EOS or SEP])`, each a list of one id, or empty if the tokenizer has none."""
    bos = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.cls_token_id
    eos = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else tokenizer.sep_token_id
    return [bos] if bos is not None else [], [eos] if eos is not None else []


def encode_prompt(tokenizer: PreTrainedTokenizerBase, input: str, instruction: str = "") -> list[int]:
    """
    Return token ids of a prompt, through the tokenizer's chat template.

    `instruction` is the system message, `input` the user message. A template that refuses a system message gets both
    in the user message.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): with a chat template.
        input (`str`): the question. Control tokens in it stay text.
        instruction (`str`): the task; may be empty.

    Returns:
        `list[int]`: the prompt, ready for the first generated token.
    """
    user = {"role": "user", "content": input}
    if not instruction:
        return encode_chat(tokenizer, [user])
    try:
        return encode_chat(tokenizer, [{"role": "system", "content": instruction}, user])
    except TemplateError:
        return encode_chat(tokenizer, [{"role": "user", "content": f"{instruction}\n\n{input}"}])


def encode_chat(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]]) -> list[int]:
    """
    Return token ids of messages through the chat template, with a generation prompt; control tokens in them stay text.

    Equals `apply_chat_template(messages, add_generation_prompt=True, sanitize_control_tokens=True)`, an option that
    older releases of transformers lack, and that refuses the special tokens of a Unigram vocabulary. Control tokens in
    messages are marked before rendering, then cut out and encoded as text; errors as in [`encode_texts`].
    """
    specials = special_ids(tokenizer)
    pattern = _control_pattern(tokenizer, len(tokenizer), specials, cast(str, tokenizer.get_chat_template()))
    start, end = _MARKERS
    marked = []
    for message in messages:
        content = re.sub(f"[{start}{end}]", "", message["content"])
        marked.append({**message, "content": re.sub(pattern, rf"{start}\g<0>{end}", content)})
    rendered = tokenizer.apply_chat_template(marked, add_generation_prompt=True, tokenize=False)
    # Odd pieces are control tokens from between two markers, to be encoded as text. An odd piece is `None` for a lone
    # marker, left where the template split a text: the pieces on its two sides are still encoded separately.
    pieces = re.split(f"{start}({pattern}){end}|[{start}{end}]", cast(str, rendered))
    ids: list[int] = []
    for i, piece in enumerate(pieces):
        if not piece:
            continue
        if i == 0:
            ids += tokenizer(piece, add_special_tokens=False, split_special_tokens=False)["input_ids"]
        elif i % 2 == 0:
            ids += _encode_continuation(tokenizer, piece, as_text=False)
        else:
            read = _encode_continuation(tokenizer, piece, as_text=True)
            ids += _spelled_out(tokenizer, read, specials, "The prompt")
    return ids


@lru_cache(maxsize=4)
def _control_pattern(tokenizer: PreTrainedTokenizerBase, size: int, specials: frozenset[int], template: str) -> str:
    """Return a regular expression that matches the tokens which a message may not write."""
    controls = set(cast(list[str], tokenizer.convert_ids_to_tokens(list(specials))))
    for token in tokenizer.added_tokens_decoder.values():
        in_template = token.content in template and not token.content.isspace()  # "<|user|>" may be a plain token
        if token.special or in_template:
            controls.add(token.content)
    longest_first = sorted(controls, key=len, reverse=True)  # a token may begin with another
    return "|".join(map(re.escape, longest_first)) or "(?!)"


def _encode_continuation(tokenizer: PreTrainedTokenizerBase, piece: str, as_text: bool) -> list[int]:
    """Return token ids of a piece in mid-string, without the space that SentencePiece puts before a whole string."""
    encode: Callable[[str], list[int]] = partial(_encode_without_added_tokens, tokenizer)
    if not as_text:
        encode = partial(tokenizer.encode, add_special_tokens=False, split_special_tokens=False)
    newline = tokenizer.encode("\n", add_special_tokens=False)
    ids = encode("\n" + piece)
    if ids[: len(newline)] == newline:
        return ids[len(newline) :]
    return encode(piece)


def _encode_without_added_tokens(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Return token ids of a text in which no added token is recognised, special or not."""
    if not tokenizer.is_fast:
        return tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)
    backend = tokenizer.backend_tokenizer
    if backend.normalizer is not None:
        text = backend.normalizer.normalize_str(text)
    words = [text]
    if backend.pre_tokenizer is not None:
        words = [word for word, _ in backend.pre_tokenizer.pre_tokenize_str(text)]
    return [token.id for word in words for token in backend.model.tokenize(word)]


def end_of_turn_token_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """
    Return the id that ends an assistant's turn.

    It is the first special token that the chat template writes after an answer, or EOS if there is none. The last
    special token before a question begins a turn. It is skipped, unless it is EOS.

    Raises:
        `ValueError`: when there is neither.
    """
    question, answer = "question-probe", "end-of-turn-probe"
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    rendered = cast(str, tokenizer.apply_chat_template(messages, tokenize=False))
    before_question = rendered.partition(question)[0]
    after_answer = "".join(rendered.split(answer)[1:])  # empty for a template of questions alone
    specials = special_ids(tokenizer)

    def specials_in(text: str) -> list[int]:
        return [id for id in tokenizer(text, add_special_tokens=False)["input_ids"] if id in specials]

    beginning = specials_in(before_question)[-1:]
    for id in specials_in(after_answer):
        if id == tokenizer.eos_token_id or id not in beginning:
            return id
    if tokenizer.eos_token_id is None:
        raise ValueError(
            "The chat template ends an answer with no special token and the tokenizer has no EOS: nothing would end an"
            " answer."
        )
    return tokenizer.eos_token_id


def same_tokenizer(first: PreTrainedTokenizerBase, second: PreTrainedTokenizerBase) -> bool:
    """Return whether two tokenizers read every text alike."""
    return first is second or tokenizer_fingerprint(first) == tokenizer_fingerprint(second)


def tokenizer_state(tokenizer: PreTrainedTokenizerBase) -> tuple[int, str]:
    """Return what shows, at no cost, that tokens were added to a tokenizer, or that others begin and end a text."""
    return len(tokenizer), repr(tokenizer.special_tokens_map)


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return a hash (hex) of what saving does not change: vocabulary, ids of a probe text, BOS and EOS."""
    digest = hashlib.sha256(repr(sorted(tokenizer.get_vocab().items())).encode())
    digest.update(repr(encode_texts(tokenizer, [_PROBE])).encode())
    digest.update(repr(bos_and_eos(tokenizer)).encode())
    return digest.hexdigest()
