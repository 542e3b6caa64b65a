"""Prepare a dataset for CoSupTrainer: check instances, tokenize them, and drop those that are too long."""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from typing import Any, TypeAlias

import datasets
import torch
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

from modeling_cosup import CoSupConfig
from modeling_cosup.passages_cosup import dataset_rows
from modeling_cosup.tokenization_cosup import end_of_turn_token_id

from .data import CheckedInstance, candidate_ids, check_instance
from .duplicates import NoDuplicatesSampler
from .passage_contents import MOST_STREAMED_IDS, PassageContents
from .tokenizing import tokenize_instance
from .training_args import CoSupTrainingArguments

logger = logging.get_logger(__name__)

AnyDataset: TypeAlias = datasets.Dataset | datasets.IterableDataset | torch.utils.data.Dataset | Sequence[dict]

LONG_QUERIES = "are longer than their encoder reads, and lose their beginning"

COLUMNS = ["input_ids", "labels", "passage_input_ids"]  # of a tokenized instance
CANDIDATE_COLUMNS = ["needs_candidates", "answers", "provenance", "candidate_pool"]  # with candidates_from
OPTIONAL_COLUMNS = ["id", "passage_ids", "positive_ids", "negative_input_ids", "negative_ids", "query_input_ids"]
OPTIONAL_COLUMNS += CANDIDATE_COLUMNS
PATIENCE = 1024  # instances of a stream, none of them with a passage, after which there is an error or a warning


@dataclass
class LongInstances:
    """
    The instances of a set that are longer than `max_length`.

    Args:
        are_refused (`bool`): they are an error, in place of being dropped.
        num_dropped (`int`): how many were dropped; from a stream, while it was read.
    """

    are_refused: bool = False
    num_dropped: int = 0


def tokenize_dataset(
    dataset: AnyDataset | None,
    tokenizers: tuple[PreTrainedTokenizerBase, PreTrainedTokenizerBase],
    config: CoSupConfig,
    args: CoSupTrainingArguments,
    name: str,
    long_instances: LongInstances | None = None,
) -> datasets.Dataset | datasets.IterableDataset | None:
    """
    Tokenize instances and drop those longer than `max_length`.

    Warnings count the dropped instances, the passages that were cut, and the queries that are too long for their
    encoder and lose their beginning.

    Args:
        dataset (`Dataset`, `IterableDataset`, `torch.utils.data.Dataset` or `list[dict]`, *optional*): instances, or
            already tokenized ones, which are returned unchanged.
        tokenizers (`tuple[PreTrainedTokenizerBase, PreTrainedTokenizerBase]`): of Gen and Emb_seq.
        config (`CoSupConfig`): of the model.
        args ([`CoSupTrainingArguments`]): `max_length`, `train_on_passages`, `supervision` and `dataset_num_proc`.
        name (`str`): of the dataset, for errors and warnings.
        long_instances ([`LongInstances`], *optional*): counts those that are dropped, or refuses them.

    Returns:
        `datasets.Dataset`, or `datasets.IterableDataset` if the dataset is streamed; `None` without a dataset.

    Raises:
        `TypeError`: for the name of a file, and for a dictionary of splits.
        `ValueError`: for an empty dataset, an invalid instance or a passage id with two contents, naming their rows,
            or a dataset in which every instance is too long. Also for one without any passage, if `supervision` needs
            `[NSP]`; otherwise this is a warning. A stream is checked as it is read.
    """
    if dataset is None:
        return None
    if long_instances is None:
        long_instances = LongInstances()
    dataset, places = _as_dataset(dataset, name)
    columns = dataset.column_names or list(next(iter(dataset), {}))
    if not columns or (isinstance(dataset, datasets.Dataset) and not len(dataset)):
        raise ValueError(f"The {name} is empty.")
    if set(COLUMNS) <= set(columns):
        if isinstance(dataset, datasets.Dataset):
            _check_contents(dataset, places, name)
            _check_queries(dataset, args, name)
        return dataset
    tokenizer, emb_seq_tokenizer = tokenizers
    end_of_turn_id = end_of_turn_token_id(tokenizer)
    checked = places is not None
    features = _features(config, args)

    def tokenize(instance: dict, row: int) -> dict[str, Any]:
        if not checked:
            instance = check_instance(instance, f"{name}, row {row}")
        tokenized = tokenize_instance(
            instance,
            tokenizer,
            emb_seq_tokenizer,
            config,
            args.train_on_passages,
            end_of_turn_id,
            args.candidates_from,
        )
        return {"dataset": instance["dataset"], **tokenized}  # the model card counts instances by dataset

    if isinstance(dataset, datasets.IterableDataset):
        tokenized_stream = dataset.map(tokenize, with_indices=True, remove_columns=columns, features=features)
        stream_filter = _StreamFilter(args, config.max_passage_length, name, long_instances)
        return tokenized_stream.filter(stream_filter, with_indices=True)
    description = f"Tokenizing the {name}"
    with args.main_process_first(desc=description):
        tokenized = dataset.map(
            tokenize,
            with_indices=True,
            remove_columns=columns,
            num_proc=args.dataset_num_proc,
            features=features,
            desc=description,
        )
    _check_contents(tokenized, places, name)
    tokenized = _drop_long_instances(tokenized, args.max_length, name, long_instances)
    _check_queries(tokenized, args, name)
    return _report_cuts(tokenized, config.max_passage_length, name)


def _features(config: CoSupConfig, args: CoSupTrainingArguments) -> datasets.Features:
    """Return the types of a tokenized instance's columns: one that the first instances leave empty shows no type."""
    text, tokens = datasets.Value("string"), datasets.List(datasets.Value("int64"))
    count = datasets.Value("int64")
    features = {
        **{"dataset": text, "id": text, "input_ids": tokens, "labels": tokens},
        **{"passage_input_ids": datasets.List(tokens), "passage_ids": datasets.List(text)},
        "positive_ids": datasets.List(datasets.List(text)),
        **{"negative_input_ids": datasets.List(tokens), "negative_ids": datasets.List(text)},
        "num_cut_passages": count,
    }
    if config.query_from != "gen":
        features |= {"query_input_ids": datasets.List(tokens), "num_cut_queries": count}
    if args.candidates_from is not None:
        features |= {
            "needs_candidates": datasets.Value("bool"),
            "answers": datasets.List(text),
            "provenance": datasets.List(datasets.List(text)),
            "candidate_pool": datasets.List(text),
        }
    return datasets.Features(features)


def _report_cuts(tokenized: datasets.Dataset, max_passage_length: int, name: str) -> datasets.Dataset:
    """Warn how many passages and queries were cut, and drop the columns that count them."""
    num_cut = sum(tokenized["num_cut_passages"])
    if num_cut:
        num_passages = sum(map(len, tokenized["passage_ids"])) + sum(map(len, tokenized["negative_ids"]))
        logger.warning(
            f"Cut {num_cut} of {num_passages} passages of the {name} to max_passage_length={max_passage_length}"
            " tokens."
        )
    tokenized = tokenized.remove_columns("num_cut_passages")
    if "num_cut_queries" not in tokenized.column_names:
        return tokenized
    num_cut = sum(tokenized["num_cut_queries"])
    if num_cut:
        num_queries = sum(map(len, tokenized["query_input_ids"]))
        logger.warning(f"{num_cut} of {num_queries} queries of the {name} {LONG_QUERIES}.")
    return tokenized.remove_columns("num_cut_queries")


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
        values = itertools.chain.from_iterable(row[name] or () for name in columns)
        passages.append({_passage_key(value) for value in values if value is not None})
    seed = args.seed if args.data_seed is None else args.data_seed
    return NoDuplicatesSampler(passages, batch_size, seed)


def _passage_key(id_or_tokens: str | list[int]) -> int:
    return hash(tuple(id_or_tokens)) if isinstance(id_or_tokens, list) else hash(str(id_or_tokens))


def _as_dataset(
    dataset: AnyDataset, name: str
) -> tuple[datasets.Dataset | datasets.IterableDataset, list[str] | None]:
    """Return a dataset of the `datasets` library and, if its instances have been checked, their places."""
    if isinstance(dataset, str | PathLike):
        path = str(dataset)
        raise TypeError(
            f"The {name} is the name {path!r}, expected instances: read them with load_instances({path!r})."
        )
    if isinstance(dataset, Mapping):  # such as a DatasetDict
        splits = ", ".join(map(repr, dataset))
        raise TypeError(f"The {name} is a dictionary of the splits {splits}, expected one of them: dataset['train'].")
    if isinstance(dataset, datasets.Dataset | datasets.IterableDataset):
        return dataset.with_format(None), None  # lists and numbers: with_format("torch") would give tensors
    if isinstance(dataset, torch.utils.data.IterableDataset):
        return datasets.IterableDataset.from_generator(dataset.__iter__), None
    instances: list[dict] = list(dataset_rows(dataset))
    if not instances:
        raise ValueError(f"The {name} is empty.")
    if isinstance(instances[0], dict) and set(COLUMNS) <= set(instances[0]):
        return datasets.Dataset.from_list(instances), None
    # checked before Arrow converts them, because Arrow's errors do not name the row
    checked: list[CheckedInstance] = []
    for row, instance in enumerate(instances):
        checked.append(check_instance(instance, f"{name}, row {row}"))
    fields: dict[str, None] = {}  # in order; `datasets` would take the fields of the first row alone
    for instance in checked:
        fields |= dict.fromkeys(instance)
    columns: dict[str, list] = {field: [instance.get(field) for instance in checked] for field in fields}
    if "candidates" in columns:  # Arrow has no column of both passages and ids
        columns["candidates"] = [candidate_ids(instance) for instance in checked]
    return datasets.Dataset.from_dict(columns), [instance.where for instance in checked]


# ---------------------------------------------------------------------- checks of a whole set


def _check_contents(tokenized: datasets.Dataset, places: list[str] | None, name: str) -> None:
    """Raise for a passage id with two contents, naming both places."""
    contents = PassageContents()
    columns = _passage_columns(tokenized.column_names)
    if not columns:
        return
    rows = tokenized.with_format(None).select_columns([column for pair in columns for column in pair])
    for row, instance in enumerate(rows):
        where = f"{name}, row {row}" if places is None else places[row]
        _add_passages(contents, instance, columns, where)


def gold_contents(tokenized: Mapping[str, Any]) -> PassageContents:
    """
    Return what Emb_seq reads of each passage of tokenized sets, by passage id.

    Args:
        tokenized (`dict`): sets by name, for errors. A stream is left out: its passages are not known in advance.

    Raises:
        `ValueError`: for a passage id with two contents.
    """
    contents = PassageContents()
    for name, dataset in tokenized.items():
        if not isinstance(dataset, datasets.Dataset):
            continue
        columns = _passage_columns(dataset.column_names)
        if not columns:
            continue
        rows = dataset.with_format(None).select_columns([column for pair in columns for column in pair])
        for row, instance in enumerate(rows):
            _add_passages(contents, instance, columns, f"{name}, row {row}")
    return contents


def _passage_columns(names: Sequence[str]) -> list[tuple[str, str]]:
    """Return the pairs of columns that hold ids and token ids of passages and of hard negatives."""
    pairs = [("passage_ids", "passage_input_ids"), ("negative_ids", "negative_input_ids")]
    return [pair for pair in pairs if set(pair) <= set(names)]


def _add_passages(
    contents: PassageContents, instance: dict[str, Any], columns: list[tuple[str, str]], where: str
) -> None:
    """Add the passages of a tokenized instance."""
    for id_column, tokens_column in columns:
        # the collator refuses an instance with too few of either
        for id, tokens in zip(instance[id_column] or [], instance[tokens_column] or [], strict=False):
            if id is not None:
                contents.add(str(id), tuple(tokens), where)


def _check_queries(tokenized: datasets.Dataset, args: CoSupTrainingArguments, name: str) -> None:
    """Raise or warn if no instance has a query that is trained."""
    needs_candidates = "needs_candidates" in tokenized.column_names and any(tokenized["needs_candidates"])
    check_retrieves(needs_candidates, args, name)
    if needs_candidates:
        return
    if args.candidates_from is not None:
        logger.warning(
            f"None of the {len(tokenized)} instances of the {name} lacks a passage, so there is nothing to retrieve"
            f" candidates for, which supervision={args.supervision!r} with candidates_from would train."
        )
    if not any(tokenized["passage_input_ids"]):
        report_no_query(len(tokenized), args.supervision, f"instances of the {name}")


def check_retrieves(needs_candidates: bool, args: CoSupTrainingArguments, name: str) -> None:
    """Raise if instances were tokenized for candidates, and none are retrieved."""
    if needs_candidates and args.candidates_from is None:
        raise ValueError(
            f"The {name} was tokenized for candidates_from, which is not set: its rows have no passage between [NSP]"
            " and [Cs]. Set it, or tokenize the instances without it."
        )


def report_no_query(num_instances: int, supervision: str, of_what: str) -> None:
    """Say that no instance has a passage: an error if nothing else is trained, a warning with `"co"`."""
    message = f"None of the {num_instances} {of_what} has a passage, so there is no [NSP]"
    if supervision in ("nsp", "separate"):
        raise ValueError(f"{message}, which supervision={supervision!r} needs.")
    if supervision == "co":
        logger.warning(f"{message}: retrieval is neither trained nor measured.")


def _drop_long_instances(
    tokenized: datasets.Dataset, max_length: int, name: str, long_instances: LongInstances
) -> datasets.Dataset:
    """Return the instances of at most `max_length` tokens, and count the others; raise if they are refused."""
    short_rows = [row for row, ids in enumerate(tokenized["input_ids"]) if len(ids) <= max_length]
    if not short_rows:
        raise ValueError(
            f"All {len(tokenized)} instances of the {name} are longer than max_length={max_length} tokens."
        )
    if len(short_rows) == len(tokenized):
        return tokenized
    num_long = len(tokenized) - len(short_rows)
    if long_instances.are_refused:
        raise ValueError(
            f"{num_long} of {len(tokenized)} instances of the {name} are longer than max_length={max_length}:"
            " leave them out, or raise max_length."
        )
    long_instances.num_dropped = num_long
    logger.warning(
        f"Dropped {num_long} of {len(tokenized)} instances of the {name}: longer than max_length={max_length}."
    )
    return tokenized.select(short_rows)


class _StreamFilter:
    """
    A filter for streams that drops or refuses long instances, and checks what [`tokenize_dataset`] checks in a set.

    It warns how many instances it has dropped and how many passages were cut, each time a number doubles.
    """

    def __init__(
        self, args: CoSupTrainingArguments, max_passage_length: int, name: str, long_instances: LongInstances
    ) -> None:
        self.max_length = args.max_length
        self.supervision = args.supervision
        self.max_passage_length = max_passage_length
        self.name = name
        self.long_instances = long_instances
        self.contents = PassageContents(MOST_STREAMED_IDS)
        self.num_kept = 0
        self.num_with_queries = 0
        self.num_dropped = 0  # in all readings of the stream, for warnings
        self.num_cut = 0

    def __call__(self, instance: dict, row: int) -> bool:
        _add_passages(self.contents, instance, _passage_columns(list(instance)), f"{self.name}, row {row}")
        if len(instance["input_ids"]) > self.max_length:
            if self.long_instances.are_refused:
                raise ValueError(
                    f"{self.name}, row {row} is longer than max_length={self.max_length}: leave it out, or raise"
                    " max_length."
                )
            self.long_instances.num_dropped += 1
            self.num_dropped += 1
            if has_doubled(self.num_dropped, 1):
                logger.warning(
                    f"Dropped {self.num_dropped} instance(s) of the {self.name} so far: longer than"
                    f" max_length={self.max_length}."
                )
            return False
        self.num_kept += 1
        needs_candidates = bool(instance.get("needs_candidates"))
        self.num_with_queries += bool(instance["passage_input_ids"]) or needs_candidates
        if self.num_kept == PATIENCE and not self.num_with_queries:
            report_no_query(PATIENCE, self.supervision, f"first instances of the {self.name}")
        if instance.get("num_cut_queries"):
            logger.warning_once(f"Some queries of the {self.name} {LONG_QUERIES}.")
        self.num_cut += instance["num_cut_passages"]
        if has_doubled(self.num_cut, instance["num_cut_passages"]):
            logger.warning(
                f"Cut {self.num_cut} passage(s) of the {self.name} so far to"
                f" max_passage_length={self.max_passage_length} tokens."
            )
        return True


def has_doubled(count: int, added: int) -> bool:
    """Return whether `count` has reached a power of two with the last `added`."""
    return count.bit_length() > (count - added).bit_length()
