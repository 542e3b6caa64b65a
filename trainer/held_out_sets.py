"""The sets that are evaluated: tokenized, checked, and read in order by all ranks."""

from typing import Any, cast
from weakref import WeakKeyDictionary

import datasets
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase

from .batching import needs_candidates
from .dataset_setup import AnyDataset, LongInstances, tokenize_dataset
from .distributed import world_size
from .positions import check_positions
from .training_step import TrainingStepMixin


class HeldOutSetsMixin(TrainingStepMixin):
    """The part of [`CoSupTrainer`] that prepares and reads evaluation sets."""

    tokenizers: tuple[PreTrainedTokenizerBase, PreTrainedTokenizerBase]
    eval_dataset: Any
    _long_instances: WeakKeyDictionary[Any, LongInstances]  # of each set that was tokenized here
    _num_dropped: int = 0  # from the set whose loader was made last

    def _prepared_evaluation_set(self, dataset: AnyDataset | None, name: str = "evaluation set") -> Any:
        """Return a set, tokenized and checked, and remember how many instances it drops."""
        long_instances = self._long_instances_of(dataset)
        tokenized = self._tokenized(dataset, name, long_instances)
        if tokenized is not None:
            self._long_instances[tokenized] = long_instances
        return tokenized

    def _prepared_test_set(self, dataset: AnyDataset) -> Any:
        """Return a set for `predict()`, tokenized and checked; an instance that would have no rows is an error."""
        tokenized = self._tokenized(dataset, "test set", LongInstances(are_refused=True))
        return tokenized if self.args.candidates_from is None else _check_passages(tokenized)

    def _tokenized(self, dataset: AnyDataset | None, name: str, long_instances: LongInstances) -> Any:
        """Return a set, tokenized and checked."""
        tokenized = tokenize_dataset(dataset, self.tokenizers, self.cosup_config, self.args, name, long_instances)
        return check_positions(tokenized, self.cosup_config, self.args, name)

    def _long_instances_of(self, dataset: Any) -> LongInstances:
        """Return the long instances of a set that was tokenized here; of any other set, none are known yet."""
        if isinstance(dataset, datasets.Dataset | datasets.IterableDataset):
            return self._long_instances.get(dataset, LongInstances())
        return LongInstances()

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        """
        Return the loader of an evaluation set.

        Unlike `Trainer`'s, it gives each instance to exactly one rank, in order, and drops none. Batches go to the
        ranks in turn. A rank that runs out of instances gets empty batches. A stream is read to its end first: how the
        instances are divided depends on their number.
        """
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        if isinstance(dataset, str):
            dataset = self.eval_dataset[dataset]
        long_instances = self._long_instances_of(dataset)
        if isinstance(dataset, datasets.IterableDataset):
            long_instances.num_dropped = 0  # an earlier evaluation has counted them too
            dataset = list(dataset)
        self._num_dropped = long_instances.num_dropped
        if not isinstance(dataset, datasets.Dataset | list):
            return super().get_eval_dataloader(eval_dataset)
        count, rank, args = len(dataset), self.args.process_index, self.args
        size = max(1, min(args.eval_batch_size, -(-count // world_size())))
        rounds = -(-count // (size * world_size()))  # batches of each rank
        batches = []
        for number in range(rounds):
            start = (number * world_size() + rank) * size
            batches.append(list(range(start, min(start + size, count))))
        return DataLoader(
            cast(Any, dataset),
            batch_sampler=batches,
            collate_fn=self.data_collator,
            num_workers=args.dataloader_num_workers,
            prefetch_factor=args.dataloader_prefetch_factor,
            multiprocessing_context=args.dataloader_multiprocessing_context,
            pin_memory=args.dataloader_pin_memory and not args.use_cpu,
        )

    def get_test_dataloader(self, test_dataset: Any) -> DataLoader:
        """Return the loader of an evaluation set."""
        return self.get_eval_dataloader(test_dataset)

    def _get_eval_sampler(self, eval_dataset: Any) -> None:
        """Return no sampler: an evaluation reads instances in order, however training groups them."""


def _check_passages(dataset: Any) -> Any:
    """Raise if an instance needs candidates; a stream checks each instance that it yields."""
    if not isinstance(dataset, datasets.Dataset):
        return dataset.filter(_is_no_question)
    if "needs_candidates" in dataset.column_names:
        for feature in dataset.select_columns(["id", "needs_candidates"]):
            _is_no_question(feature)
    return dataset


def _is_no_question(feature: dict[str, Any]) -> bool:
    """Return `True`; raise for an instance without a passage."""
    if needs_candidates(feature):
        raise ValueError(
            f"Instance {feature['id']!r} of the test set has no passage, and predict() returns each query's: leave it"
            " out, or call evaluate(), which retrieves candidates."
        )
    return True
