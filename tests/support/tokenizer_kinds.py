"""Tiny tokenizers of every kind whose vocabulary may read a special token in a text as one."""

import string

from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import (
    BertTokenizer,
    ByT5Tokenizer,
    LlamaTokenizer,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    T5Tokenizer,
    XLMRobertaTokenizer,
)

from support.models import make_tokenizer

CHARACTERS = string.ascii_letters + string.digits + string.punctuation
WORDS = ("▁", "▁the", "▁painting", "er", "at")


def scored(*tokens: str) -> list[tuple[str, float]]:
    """Return a Unigram vocabulary: special tokens have the score 0, as in converted SentencePiece models."""
    words = [(word, -4.0) for word in WORDS]
    return [(token, 0.0) for token in tokens] + words + [(character, -6.0) for character in CHARACTERS]


def numbered(*tokens: str) -> dict[str, int]:
    """Return a vocabulary of tokens and characters."""
    return {token: id for id, token in enumerate([*tokens, *CHARACTERS])}


def xlm_roberta() -> PreTrainedTokenizerBase:
    """XLM-R, multilingual-E5, bge-m3."""
    return XLMRobertaTokenizer(vocab=[*scored("<s>", "<pad>", "</s>", "<unk>"), ("<mask>", 0.0)])


def xlm_roberta_nfkc() -> PreTrainedTokenizerBase:
    """As converted, with its normaliser: a full-width ＜/s＞ becomes </s>."""
    tokenizer = xlm_roberta()
    tokenizer.backend_tokenizer.normalizer = normalizers.NFKC()
    return tokenizer


def t5() -> PreTrainedTokenizerBase:
    """T5, mT5, GTR, sentence-T5: no BOS, and 100 sentinels."""
    sentinels = [(f"<extra_id_{i}>", 0.0) for i in reversed(range(100))]
    return T5Tokenizer(vocab=scored("<pad>", "</s>", "<unk>") + sentinels)


def llama_2() -> PreTrainedTokenizerBase:
    """SentencePiece BPE whose merges reach a special token."""
    vocab = numbered("<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "</", "</s")
    return LlamaTokenizer(vocab=vocab, merges=[("<", "/"), ("</", "s"), ("</s", ">")])


def whole_words() -> PreTrainedTokenizerBase:
    """BPE that takes whole words of its vocabulary before any merge, as Llama 3 does."""
    backend = Tokenizer(models.BPE(vocab=numbered("<s>", "</s>", "<pad>", "Ġ"), merges=[], ignore_merges=True))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.ByteLevel(False)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<pad>")


def bert() -> PreTrainedTokenizerBase:
    vocab = numbered("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"##{letter}" for letter in CHARACTERS))
    return BertTokenizer(vocab=vocab, do_lower_case=False)


def word_level() -> PreTrainedTokenizerBase:
    backend = Tokenizer(models.WordLevel(numbered("[UNK]", "[NSP]", "</s>", "is", "here"), unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", unk_token="[UNK]")


TOKENIZERS = {
    "byte-level BPE": make_tokenizer,
    "BPE of whole words": whole_words,
    "SentencePiece BPE": llama_2,
    "Unigram, XLM-R": xlm_roberta,
    "Unigram, XLM-R with NFKC": xlm_roberta_nfkc,
    "Unigram, T5": t5,
    "WordPiece": bert,
    "bytes, in Python": ByT5Tokenizer,
}
