"""
How much of a reader's attention goes to the passage tokens that are nearest to some words (arXiv 2402.11794, section
4). Near to the answer, this is Indicator 1: a reader that answers from its passages looks there.

1. The attention to a token is divided by the attention to all passage tokens of the instance.
2. The similarity of a token is the cosine of its embedding to the embeddings of the target tokens.
3. The nearest tokens are those at and above a percentile of similarity.
"""

from collections.abc import Callable, Sequence
from typing import Literal, TypeAlias

import torch
import torch.nn.functional as F
from transformers import PreTrainedTokenizerBase

from modeling_cosup.tokenization_cosup import encode_texts

from .reading import ReaderRow

Embed: TypeAlias = Callable[[torch.Tensor], torch.Tensor]  # token ids (n,) -> their embeddings (n, h)
Pooling = Literal["mean", "max"]
DECIMALS = 5  # similarities that agree this far differ by rounding alone


def target_token_ids(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[int]:
    """
    Return the distinct tokens of texts, both at the beginning of a line and after a space.

    Many tokenizers have two tokens for a word, and passages hold the one after a space. Tokens of white space alone
    are left out.

    Raises:
        `ValueError`: if no token is left, because the texts are empty.
    """
    spellings = [spelling for text in texts for spelling in (text, f" {text}")]
    ids = dict.fromkeys(id for row in encode_texts(tokenizer, spellings) for id in row)
    kept = [id for id in ids if str(tokenizer.decode([id])).strip()]
    if not kept:
        raise ValueError(f"The texts {list(texts)!r} have no tokens: nothing can be near to them.")
    return kept


def passage_tokens(row: ReaderRow, attention: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Return the tokens of all passages of a row, and the attention to each of them.

    Args:
        row ([`ReaderRow`]): an instance with its passages.
        attention (`torch.FloatTensor` of shape `(T,)`): of each token, as
            [`~trainer.reader_scores.token_attention`] returns it for the row.

    Returns:
        `tuple[torch.LongTensor, torch.FloatTensor]`, both of shape `(n,)`: ids, and attention that sums to 1.
    """
    columns = [column for span in row.passage_spans for column in range(*span)]
    places = torch.tensor(columns, device=attention.device)
    ids = torch.tensor([row.input_ids[column] for column in columns], device=attention.device)
    of_passages = attention[places]
    return ids, of_passages / of_passages.sum()


def token_similarity(
    embed: Embed, token_ids: torch.Tensor, target_ids: Sequence[int], pooling: Pooling = "mean"
) -> torch.Tensor:
    """
    Return the similarity of tokens to target tokens: the cosine of their embeddings.

    Args:
        embed (`Callable`): maps token ids `(m,)` to embeddings `(m, h)`, e.g. `gen.get_input_embeddings()`.
        token_ids (`torch.LongTensor` of shape `(n,)`).
        target_ids (`list[int]`): at least one.
        pooling (`str`, *optional*, defaults to `"mean"`): over the target tokens, or `"max"`, the nearest of them.
            With `"max"` all tokens of the target tie at 1; where no others are nearest, no correlation is defined.

    Returns:
        `torch.FloatTensor` of shape `(n,)`: equal tokens have equal similarity, rounded to five decimals.
    """
    distinct, places = torch.unique(token_ids, return_inverse=True)  # (m,), (n,)
    with torch.no_grad():
        tokens = F.normalize(embed(distinct).float(), dim=-1)  # (m, h)
        targets = F.normalize(embed(torch.tensor(target_ids, device=token_ids.device)).float(), dim=-1)
    with torch.autocast(tokens.device.type, enabled=False):  # in half precision other tokens would be the nearest
        cosines = tokens @ targets.T  # (m, number of targets)
    pooled = cosines.amax(1) if pooling == "max" else cosines.mean(1)
    return pooled.round(decimals=DECIMALS)[places]


def is_nearest(similarity: torch.Tensor, percentile: int) -> torch.Tensor:
    """
    Return which tokens are at and above a percentile of similarity.

    All tokens that tie at the percentile are among them; if all tokens are alike, these are all tokens.

    Args:
        similarity (`torch.FloatTensor` of shape `(n,)`): at least one token.
        percentile (`int`): from 0 to 100; between two tokens, it is above the lower one, as if interpolated.

    Returns:
        `torch.BoolTensor` of shape `(n,)`.
    """
    place = -(-percentile * (len(similarity) - 1) // 100)  # rounded up, in whole numbers
    return similarity >= similarity.sort().values[place]


def indicator_1(
    embed: Embed,
    rows: Sequence[ReaderRow],
    attention: Sequence[torch.Tensor],
    answer_ids: Sequence[Sequence[int]],
    percentile: int = 95,
    pooling: Pooling = "mean",
) -> list[float]:
    """
    Return Indicator 1 of each row: the mean attention to the passage tokens that are nearest to its answer.

    Args:
        embed, pooling: as in [`token_similarity`].
        rows, attention: lists of what [`passage_tokens`] takes.
        answer_ids (`list[list[int]]`): for each row the tokens of its answer, as [`target_token_ids`] returns them.
        percentile (`int`, *optional*, defaults to 95): as in [`is_nearest`].

    Returns:
        `list[float]`: `1 / n` for a reader that attends to all n passage tokens alike.
    """
    means = []
    for row, row_attention, targets in zip(rows, attention, answer_ids, strict=True):
        ids, of_passages = passage_tokens(row, row_attention)
        nearest = is_nearest(token_similarity(embed, ids, targets, pooling), percentile)
        means.append(of_passages[nearest].mean())
    return torch.stack(means).tolist() if means else []
