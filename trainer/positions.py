"""Check, before training, that Gen has a position for every token of an instance."""

from typing import Any

import datasets

from modeling_cosup import CoSupConfig
from modeling_cosup.cache_cosup import EMPTY, context_length

from .training_args import CoSupTrainingArguments


def check_positions(
    dataset: datasets.Dataset | datasets.IterableDataset | None,
    config: CoSupConfig,
    args: CoSupTrainingArguments,
    name: str,
) -> datasets.Dataset | datasets.IterableDataset | None:
    """
    Raise if a tokenized instance is longer than Gen can read.

    Learned positions would be indexed out of range. Rotary ones would be trained where `generate()` never goes.

    Args:
        dataset (`Dataset` or `IterableDataset`, *optional*): as [`~trainer.dataset_setup.tokenize_dataset`] returns
            it.
        config (`CoSupConfig`): of the model.
        args ([`CoSupTrainingArguments`]): `max_length`, which drops longer instances, and `supervision`.
        name (`str`): of the dataset, for errors.

    Returns:
        The dataset. A stream checks each instance that it yields.

    Raises:
        `ValueError`: naming the `max_length` that works. With a stream or with candidates, lengths are not known in
            advance: then a `max_length` above what Gen reads is the error.
    """
    limit = context_length(config.get_text_config())
    gen_reads_nothing = args.supervision == "nsp" and config.query_from != "gen"
    if dataset is None or limit == EMPTY or gen_reads_nothing:
        return dataset
    if args.candidates_from is not None and args.max_length > limit:
        raise ValueError(
            f"Gen reads at most {limit} tokens, and how long an instance of the {name} becomes depends on its"
            f" candidates. Set max_length={limit}, which leaves longer ones out; it is {args.max_length}."
        )
    remedy = f"Set max_length={limit}, which drops longer instances; it is {args.max_length}"
    if args.max_length <= limit:
        remedy = "They were tokenized before, so max_length did not drop them: leave them out"
    if isinstance(dataset, datasets.IterableDataset):
        if args.max_length > limit:
            raise ValueError(f"Gen reads at most {limit} tokens, and the {name} is a stream. {remedy}.")
        return dataset.filter(_PositionCheck(limit, name))
    lengths = [len(ids) for ids in dataset["input_ids"]]
    num_long = sum(length > limit for length in lengths)
    if num_long:
        raise ValueError(
            f"{num_long} of {len(lengths)} instances of the {name} are longer than the {limit} tokens that Gen reads;"
            f" the longest has {max(lengths)}. {remedy}."
        )
    return dataset


class _PositionCheck:
    """A filter that keeps every instance, and raises at the first that is too long."""

    def __init__(self, limit: int, name: str) -> None:
        self.limit = limit
        self.name = name

    def __call__(self, instance: dict[str, Any]) -> bool:
        if len(instance["input_ids"]) > self.limit:
            raise ValueError(
                f"Instance {instance.get('id')!r} of the {self.name} has {len(instance['input_ids'])} tokens, but Gen"
                f" reads at most {self.limit}: leave it out, or tokenize with max_length={self.limit}."
            )
        return True
