"""Warnings of a training with candidates that teaches little, or the wrong thing."""

import math
from collections.abc import Mapping

from transformers.utils import logging

from .dataset_setup import has_doubled
from .training_args import CoSupTrainingArguments

logger = logging.get_logger(__name__)

FLATNESS = "target_entropy / log K"  # of a target: 1 for one that teaches nothing; not logged
LEFT_OUT = "num_left_out"
UNTAUGHT = "instances without a target"  # not logged
FLATTEST = 0.95  # a target above it is hardly one
STANDARD_ERRORS = 2  # by which hit_rate must have fallen: logs are noisy


class CandidateWatch:
    """
    What the logs of one training have said about its candidates so far.

    Args:
        args ([`CoSupTrainingArguments`]): of the training.
        trains_retriever (`bool`, *optional*, defaults to `True`): whether it changes queries or passage embeddings;
            otherwise a hit rate changes with the questions alone.
    """

    def __init__(self, args: CoSupTrainingArguments, trains_retriever: bool = True) -> None:
        self.args = args
        self.trains_retriever = trains_retriever
        self._num_left_out = self._num_untaught = 0
        self._first_hit_rate: tuple[float, float] | None = None  # and its number of questions
        self._warned_of_flatness = self._warned_of_fall = False

    def check(self, figures: Mapping[str, float], counts: Mapping[str, float]) -> None:
        """
        Warn of instances that were left out, or have no target, each time their number doubles; and once each of a
        flat target, and of a hit rate that has fallen below the first one.

        Args:
            figures (`dict[str, float]`): of a log, over all ranks, by name; with [`FLATNESS`] and [`UNTAUGHT`].
            counts (`dict[str, float]`): how many queries or instances each was measured on.
        """
        self._check_lengths(int(figures.get(LEFT_OUT, 0)))
        self._check_targets(int(figures.get(UNTAUGHT, 0)))
        flatness = figures.get(FLATNESS)
        if flatness is not None and flatness > FLATTEST and not self._warned_of_flatness:
            self._warned_of_flatness = True
            self._warn_of_flatness(figures["target_entropy"], flatness)
        name = f"hit_rate@{self.args.num_candidates}"
        if name in figures and self.trains_retriever and not self._warned_of_fall:
            self._check_hit_rate(name, figures[name], counts[name])

    def _check_lengths(self, num_left_out: int) -> None:
        self._num_left_out += num_left_out
        if has_doubled(self._num_left_out, num_left_out):
            logger.warning(
                f"Left {self._num_left_out} instance(s) out of their step so far: with"
                f" num_candidates={self.args.num_candidates} passages they are longer than"
                f" max_length={self.args.max_length} tokens. Raise max_length, or lower num_candidates."
            )

    def _check_targets(self, num_untaught: int) -> None:
        self._num_untaught += num_untaught
        if not has_doubled(self._num_untaught, num_untaught):
            return
        reason, remedy = "they have a single candidate", "give them more candidates"
        if self.args.target[0] == "attention":
            reason += ", or no other instance of their step has as many"
            remedy += ", or raise per_device_train_batch_size or gradient_accumulation_steps"
        logger.warning(
            f"{self._num_untaught} instance(s) have taught the retriever nothing so far: {reason}, so there is nothing"
            f" to compare their candidates with. Remedy: {remedy}."
        )

    def _warn_of_flatness(self, entropy: float, flatness: float) -> None:
        target, temperature = self.args.target
        remedy = "choose a distillation_target that has a temperature"
        if temperature is not None:
            remedy = f"lower target_temperature={temperature:g}"
        logger.warning(
            f"The target of the distillation is nearly flat: its entropy is {entropy:.3f} nats, {100 * flatness:.1f} %"
            " of the largest possible one. It teaches that all candidates are alike, which can collapse a retriever."
            f" With distillation_target={target!r}, {remedy}; or train the reader first: supervision='ntp' with"
            " candidates_from."
        )

    def _check_hit_rate(self, name: str, hit_rate: float, count: float) -> None:
        if self._first_hit_rate is None:
            self._first_hit_rate = hit_rate, count
            return
        first, first_count = self._first_hit_rate
        pooled = (first * first_count + hit_rate * count) / (first_count + count)
        standard_error = math.sqrt(pooled * (1 - pooled) * (1 / first_count + 1 / count))
        if first - hit_rate <= STANDARD_ERRORS * standard_error:
            return
        self._warned_of_fall = True
        remedy = (
            "A flat or wrong target does that: train the reader first (supervision='ntp' with candidates_from), or"
            " lower target_temperature or learning_rate."
        )
        if not self.args.distills:
            remedy = (
                f"Gen makes the queries, and supervision={self.args.supervision!r} does not teach it to: choose a"
                " supervision that distils, or build the model with query_from='emb_seq' or 'query_encoder'."
            )
        logger.warning(
            f"{name} has fallen from {100 * first:.1f} % in the first log to {100 * hit_rate:.1f} %: training makes"
            f" the retriever worse. {remedy}"
        )
