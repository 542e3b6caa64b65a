"""The rows that a reader reads: a prompt, the passages that were retrieved for it, and the answer."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from modeling_cosup import CoSupConfig


@dataclass
class ReaderRow:
    """
    Prompt, `[NSP]`, passages, `[Cs]`, answer, `[CE]` and end of turn in Gen's token ids.

    Args:
        input_ids (`list[int]` of length T): as `generate()` with `RetrievalConfig(top_k=K)` writes them.
        labels (`list[int]` of length T): -100 where nothing is trained.
        passage_spans (`list[tuple[int, int]]`): start and end of each passage in `input_ids`, in the order in which
            they are read; without the line breaks between them.
        answer_span (`tuple[int, int]`): start and end of the answer; `[Cs]` stands before it, `[CE]` after it.
        nsp_column (`int`): where `[NSP]` stands.
    """

    input_ids: list[int]
    labels: list[int]
    passage_spans: list[tuple[int, int]]
    answer_span: tuple[int, int]
    nsp_column: int


def reader_row(
    prompt_ids: Sequence[int],
    passages: Sequence[Sequence[int]],
    answer_ids: Sequence[int],
    config: CoSupConfig,
    separator: Sequence[int],
    end_of_turn_id: int,
    train_on_passages: bool = False,
) -> ReaderRow:
    """
    Return the row in which Gen reads all passages of an instance before it answers.

    `[NSP]`, answer, `[CE]` and the end of turn are trained. Prompt, passages and `[Cs]` have label -100.

    Args:
        prompt_ids (`list[int]`): everything before `[NSP]`.
        passages (`list[list[int]]`): as [`~modeling_cosup.tokenization_cosup.encode_passages_for_gen`] returns them.
        answer_ids (`list[int]`): the grounded text.
        config (`CoSupConfig`): ids of the control tokens.
        separator (`list[int]`): token ids of a line break, which stands between passages.
        end_of_turn_id (`int`): the token that ends the response.
        train_on_passages (`bool`, *optional*, defaults to `False`): also train passages and line breaks.

    Raises:
        `ValueError`: without passages, or for an answer without tokens.
    """
    if not passages:
        raise ValueError("A reader needs at least one passage; nothing was retrieved.")
    if not answer_ids:
        raise ValueError("The answer has no tokens: no position of the reader would predict it.")
    nsp, cs, ce = config.nsp_token_id, config.cs_token_id, config.ce_token_id
    assert nsp is not None and cs is not None and ce is not None  # set when Gen and Emb_seq were put together
    input_ids = [*prompt_ids, nsp]
    spans: list[tuple[int, int]] = []
    for passage in passages:
        if spans:
            input_ids += separator
        spans.append((len(input_ids), len(input_ids) + len(passage)))
        input_ids += passage
    read = input_ids[len(prompt_ids) + 1 :]
    labels = [-100] * len(prompt_ids) + [nsp]
    labels += read if train_on_passages else [-100] * len(read)
    answer_start = len(input_ids) + 1
    trained = [*answer_ids, ce, end_of_turn_id]
    return ReaderRow(
        input_ids=[*input_ids, cs, *trained],
        labels=[*labels, -100, *trained],
        passage_spans=spans,
        answer_span=(answer_start, answer_start + len(answer_ids)),
        nsp_column=len(prompt_ids),
    )


def batches_by_length(lengths: Sequence[int], max_tokens: int) -> Iterator[list[int]]:
    """
    Sort rows by length, and yield the numbers of the rows of each padded batch.

    Args:
        lengths (`list[int]`): tokens of each row.
        max_tokens (`int`): of a batch, padding included; a longer row is a batch of its own.

    Raises:
        `ValueError`: for a `max_tokens` below 1.
    """
    if max_tokens < 1:
        raise ValueError(f"max_tokens is {max_tokens}, expected at least 1.")
    batch: list[int] = []
    for number in sorted(range(len(lengths)), key=lambda number: -lengths[number]):
        if batch and (len(batch) + 1) * lengths[batch[0]] > max_tokens:  # the first row is the longest
            yield batch
            batch = []
        batch.append(number)
    if batch:
        yield batch
