"""What CoSupTrainer does to a dataset before it trains: check instances, tokenize them, drop those too long."""

import datasets
import torch
from transformers.utils import logging

from modeling_cosup.tokenization_cosup import end_of_turn_token_id

from .data import check_instance, tokenize_instance
from .duplicates import NoDuplicatesSampler

logger = logging.get_logger(__name__)

COLUMNS = ["input_ids", "labels", "passage_input_ids"]  # of a tokenized instance
OPTIONAL_COLUMNS = ["id", "passage_ids", "positive_ids", "negative_input_ids", "negative_ids", "query_input_ids"]


def tokenize_dataset(dataset, tokenizers, config, args, name: str):
    """
    Instances to token ids; instances longer than `max_length` are dropped, with their number in a warning.

    Args:
        dataset (`Dataset`, `IterableDataset`, `torch.utils.data.Dataset` or `list[dict]`, *optional*): instances, or
            already tokenized ones, which stay.
        tokenizers (`tuple[PreTrainedTokenizerBase, PreTrainedTokenizerBase]`): of Gen and Emb_seq.
        config (`CoSupConfig`): of the model.
        args ([`CoSupTrainingArguments`]): `max_length`, `train_on_passages` and `dataset_num_proc`.
        name (`str`): of the dataset, in errors and warnings.

    Returns:
        `datasets.Dataset`, or `datasets.IterableDataset` of what is streamed; `None` without a dataset.

    Raises:
        `ValueError`: an empty dataset, an invalid instance, naming its row, or a dataset of which every instance is
            too long.
    """
    if dataset is None:
        return None
    dataset, checked = _as_dataset(dataset, name)
    columns = dataset.column_names or list(next(iter(dataset)))
    if set(COLUMNS) <= set(columns):
        return dataset
    end_of_turn_id = end_of_turn_token_id(tokenizers[0])

    def tokenize(instance, row):
        if not checked:
            instance = check_instance(instance, f"{name}, row {row}")
        tokenized = tokenize_instance(instance, *tokenizers, config, args.train_on_passages, end_of_turn_id)
        return {"dataset": instance["dataset"], **tokenized}  # counted for the model card

    options = {"with_indices": True, "remove_columns": columns}
    if isinstance(dataset, datasets.IterableDataset):
        return dataset.map(tokenize, **options).filter(_ShorterThan(args.max_length, name))
    with args.main_process_first(desc=f"Tokenizing the {name}"):
        tokenized = dataset.map(tokenize, num_proc=args.dataset_num_proc, desc=f"Tokenizing the {name}", **options)
    return _drop_long_instances(tokenized, args.max_length, name)


def no_duplicates_sampler(dataset, args, batch_size: int) -> NoDuplicatesSampler:
    """
    The sampler of `batch_sampler="no_duplicates"`.

    Args:
        dataset (`datasets.Dataset`): tokenized.
        args ([`CoSupTrainingArguments`]): its seeds.
        batch_size (`int`): instances of the batch that all ranks make up.

    Raises:
        `ValueError`: for a streamed dataset.
    """
    if not isinstance(dataset, datasets.Dataset):
        raise ValueError(
            "batch_sampler='no_duplicates' chooses from the whole dataset; a streamed one cannot be chosen from."
        )
    names = ("passage_ids", "negative_ids", "passage_input_ids", "negative_input_ids")
    columns = [name for name in names if name in dataset.column_names]
    passages = []
    for row in dataset.select_columns(columns):
        keys = [key for name in columns for key in row[name]]
        passages.append({hash(key if isinstance(key, str) else tuple(key)) for key in keys})
    seed = args.seed if args.data_seed is None else args.data_seed
    return NoDuplicatesSampler(passages, batch_size, seed)


def _as_dataset(dataset, name):
    """A dataset of the `datasets` library, and whether its instances are checked."""
    if isinstance(dataset, datasets.Dataset | datasets.IterableDataset):
        return dataset, False
    if isinstance(dataset, torch.utils.data.IterableDataset):
        return datasets.IterableDataset.from_generator(dataset.__iter__), False
    if isinstance(dataset, torch.utils.data.Dataset):
        dataset = list(dataset)
    if not dataset:
        raise ValueError(f"The {name} is empty.")
    tokenized = set(COLUMNS) <= set(dataset[0])
    if not tokenized:  # before Arrow sees it: its errors name no row
        dataset = [check_instance(instance, f"{name}, row {row}") for row, instance in enumerate(dataset)]
    return datasets.Dataset.from_list(dataset), not tokenized


def _drop_long_instances(tokenized, max_length, name):
    """The instances of at most `max_length` tokens."""
    short = [row for row, ids in enumerate(tokenized["input_ids"]) if len(ids) <= max_length]
    if not short:
        raise ValueError(
            f"All {len(tokenized)} instances of the {name} are longer than max_length={max_length} tokens."
        )
    if len(short) == len(tokenized):
        return tokenized
    dropped = len(tokenized) - len(short)
    logger.warning(
        f"Dropped {dropped} of {len(tokenized)} instances of the {name}: longer than max_length={max_length}."
    )
    return tokenized.select(short)


class _ShorterThan:
    """Filter of a stream that says how many instances it has dropped, at the first and at every power of two."""

    def __init__(self, max_length, name):
        self.max_length, self.name, self.dropped = max_length, name, 0

    def __call__(self, instance):
        if len(instance["input_ids"]) <= self.max_length:
            return True
        self.dropped += 1
        if self.dropped & (self.dropped - 1) == 0:
            limit = f"longer than max_length={self.max_length}"
            logger.warning(f"Dropped {self.dropped} instance(s) of the {self.name} so far: {limit}.")
        return False
