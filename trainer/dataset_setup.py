"""Prepare a dataset for CoSupTrainer: check instances, tokenize them, and drop those that are too long."""

from collections.abc import Sequence
from typing import Any, TypeAlias

import datasets
import torch
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

from modeling_cosup import CoSupConfig
from modeling_cosup.tokenization_cosup import end_of_turn_token_id

from .data import check_instance, tokenize_instance
from .duplicates import NoDuplicatesSampler
from .training_args import CoSupTrainingArguments

logger = logging.get_logger(__name__)

AnyDataset: TypeAlias = datasets.Dataset | datasets.IterableDataset | torch.utils.data.Dataset | Sequence[dict]

LONG_QUERIES = "are longer than their encoder reads, and lose their beginning"

COLUMNS = ["input_ids", "labels", "passage_input_ids"]  # of a tokenized instance
OPTIONAL_COLUMNS = ["id", "passage_ids", "positive_ids", "negative_input_ids", "negative_ids", "query_input_ids"]


def tokenize_dataset(
    dataset: AnyDataset | None,
    tokenizers: tuple[PreTrainedTokenizerBase, PreTrainedTokenizerBase],
    config: CoSupConfig,
    args: CoSupTrainingArguments,
    name: str,
) -> datasets.Dataset | datasets.IterableDataset | None:
    """
    Tokenize instances and drop those longer than `max_length`; a warning counts them.

    Another counts queries that are too long for the encoder that reads them; they lose their beginning.

    Args:
        dataset (`Dataset`, `IterableDataset`, `torch.utils.data.Dataset` or `list[dict]`, *optional*): instances, or
            already tokenized ones, which are returned unchanged.
        tokenizers (`tuple[PreTrainedTokenizerBase, PreTrainedTokenizerBase]`): of Gen and Emb_seq.
        config (`CoSupConfig`): of the model.
        args ([`CoSupTrainingArguments`]): `max_length`, `train_on_passages` and `dataset_num_proc`.
        name (`str`): of the dataset, for errors and warnings.

    Returns:
        `datasets.Dataset`, or `datasets.IterableDataset` if the dataset is streamed; `None` without a dataset.

    Raises:
        `ValueError`: for an empty dataset, an invalid instance, naming its row, or a dataset in which every instance
            is too long.
    """
    if dataset is None:
        return None
    dataset, checked = _as_dataset(dataset, name)
    columns = dataset.column_names or list(next(iter(dataset)))
    if set(COLUMNS) <= set(columns):
        return dataset
    tokenizer, emb_seq_tokenizer = tokenizers
    end_of_turn_id = end_of_turn_token_id(tokenizer)

    def tokenize(instance: dict, row: int) -> dict[str, Any]:
        if not checked:
            instance = check_instance(instance, f"{name}, row {row}")
        tokenized = tokenize_instance(
            instance, tokenizer, emb_seq_tokenizer, config, args.train_on_passages, end_of_turn_id
        )
        return {"dataset": instance["dataset"], **tokenized}  # the model card counts instances by dataset

    if isinstance(dataset, datasets.IterableDataset):
        tokenized_stream = dataset.map(tokenize, with_indices=True, remove_columns=columns)
        return tokenized_stream.filter(_LengthFilter(args.max_length, name))
    description = f"Tokenizing the {name}"
    with args.main_process_first(desc=description):
        tokenized = dataset.map(
            tokenize, with_indices=True, remove_columns=columns, num_proc=args.dataset_num_proc, desc=description
        )
    tokenized = _drop_long_instances(tokenized, args.max_length, name)
    if "num_cut_queries" in tokenized.column_names:
        num_queries = sum(map(len, tokenized["query_input_ids"]))
        num_cut = sum(tokenized["num_cut_queries"])
        if num_cut:
            logger.warning(f"{num_cut} of {num_queries} queries of the {name} {LONG_QUERIES}.")
        tokenized = tokenized.remove_columns("num_cut_queries")
    return tokenized


def no_duplicates_sampler(
    dataset: datasets.Dataset, args: CoSupTrainingArguments, batch_size: int
) -> NoDuplicatesSampler:
    """
    Return the sampler of `batch_sampler="no_duplicates"`.

    Args:
        dataset (`datasets.Dataset`): tokenized.
        args ([`CoSupTrainingArguments`]): `seed` and `data_seed`.
        batch_size (`int`): instances of a batch, over all ranks.

    Raises:
        `ValueError`: for a streamed dataset.
    """
    if not isinstance(dataset, datasets.Dataset):
        raise ValueError(
            "batch_sampler='no_duplicates' chooses from the whole dataset, so the dataset cannot be streamed."
        )
    names = ("passage_ids", "negative_ids", "passage_input_ids", "negative_input_ids")
    columns = [name for name in names if name in dataset.column_names]
    passages = []
    for row in dataset.select_columns(columns):
        passages.append({_passage_key(value) for name in columns for value in row[name]})
    seed = args.seed if args.data_seed is None else args.data_seed
    return NoDuplicatesSampler(passages, batch_size, seed)


def _passage_key(id_or_tokens: str | list[int]) -> int:
    return hash(id_or_tokens) if isinstance(id_or_tokens, str) else hash(tuple(id_or_tokens))


def _as_dataset(dataset: AnyDataset, name: str) -> tuple[datasets.Dataset | datasets.IterableDataset, bool]:
    """Return a dataset of the `datasets` library, and whether its instances have been checked."""
    if isinstance(dataset, datasets.Dataset | datasets.IterableDataset):
        return dataset, False
    if isinstance(dataset, torch.utils.data.IterableDataset):
        return datasets.IterableDataset.from_generator(dataset.__iter__), False
    instances: list[dict] = list(dataset)  # type: ignore[arg-type]  # a torch Dataset has __getitem__, no __iter__
    if not instances:
        raise ValueError(f"The {name} is empty.")
    tokenized = set(COLUMNS) <= set(instances[0])
    if not tokenized:  # checked before Arrow converts them, because Arrow's errors do not name the row
        instances = [check_instance(instance, f"{name}, row {row}") for row, instance in enumerate(instances)]
    return datasets.Dataset.from_list(instances), not tokenized


def _drop_long_instances(tokenized: datasets.Dataset, max_length: int, name: str) -> datasets.Dataset:
    """Return the instances of at most `max_length` tokens."""
    short_rows = [row for row, ids in enumerate(tokenized["input_ids"]) if len(ids) <= max_length]
    if not short_rows:
        raise ValueError(
            f"All {len(tokenized)} instances of the {name} are longer than max_length={max_length} tokens."
        )
    if len(short_rows) == len(tokenized):
        return tokenized
    dropped = len(tokenized) - len(short_rows)
    logger.warning(
        f"Dropped {dropped} of {len(tokenized)} instances of the {name}: longer than max_length={max_length}."
    )
    return tokenized.select(short_rows)


class _LengthFilter:
    """
    A filter for streams that warns how many instances it has dropped, each time the number is a power of two.

    It also warns, once, if a query of an instance is too long for its encoder.
    """

    def __init__(self, max_length: int, name: str) -> None:
        self.max_length = max_length
        self.name = name
        self.dropped = 0

    def __call__(self, instance: dict) -> bool:
        if len(instance["input_ids"]) <= self.max_length:
            if instance.get("num_cut_queries"):
                logger.warning_once(f"Some queries of the {self.name} {LONG_QUERIES}.")
            return True
        self.dropped += 1
        if self.dropped & (self.dropped - 1) == 0:  # a power of two
            logger.warning(
                f"Dropped {self.dropped} instance(s) of the {self.name} so far: longer than"
                f" max_length={self.max_length}."
            )
        return False
