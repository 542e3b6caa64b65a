"""Warnings of a training with candidates that teaches little, or the wrong thing."""

import math
from collections.abc import Mapping

from transformers.utils import logging

from .dataset_setup import has_doubled
from .training_args import CoSupTrainingArguments

logger = logging.get_logger(__name__)

FLATNESS = "target_entropy / log K"  # of a target: 1 for one that teaches nothing; not logged
LEFT_OUT = "num_left_out"
FLATTEST = 0.95  # a target above it is hardly one
STANDARD_ERRORS = 2  # by which hit_rate must have fallen: logs are noisy


class CandidateWatch:
    """
    What the logs of one training have said about its candidates so far.

    Args:
        args ([`CoSupTrainingArguments`]): of the training.
    """

    def __init__(self, args: CoSupTrainingArguments) -> None:
        self.args = args
        self._num_left_out = 0
        self._first_hit_rate: tuple[float, float] | None = None  # and its number of questions
        self._warned_of_flatness = self._warned_of_fall = False

    def check(self, figures: Mapping[str, float], counts: Mapping[str, float]) -> None:
        """
        Warn of instances that were left out, each time their number doubles; and once each of a flat target, and of a
        hit rate that has fallen below the first one.

        Args:
            figures (`dict[str, float]`): of a log, over all ranks, by name; with [`FLATNESS`].
            counts (`dict[str, float]`): how many queries or instances each was measured on.
        """
        self._check_lengths(int(figures.get(LEFT_OUT, 0)))
        flatness = figures.get(FLATNESS)
        if flatness is not None and flatness > FLATTEST and not self._warned_of_flatness:
            self._warned_of_flatness = True
            self._warn_of_flatness(figures["target_entropy"], flatness)
        name = f"hit_rate@{self.args.num_candidates}"
        if name in figures and not self._warned_of_fall:
            self._check_hit_rate(name, figures[name], counts[name])

    def _check_lengths(self, num_left_out: int) -> None:
        self._num_left_out += num_left_out
        if has_doubled(self._num_left_out, num_left_out):
            logger.warning(
                f"Left {self._num_left_out} instance(s) out of their step so far: with"
                f" num_candidates={self.args.num_candidates} passages they are longer than"
                f" max_length={self.args.max_length} tokens. Raise max_length, or lower num_candidates."
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
        logger.warning(
            f"{name} has fallen from {100 * first:.1f} % in the first log to {100 * hit_rate:.1f} %: training makes"
            " the retriever worse. A flat or wrong target does that: train the reader first (supervision='ntp' with"
            " candidates_from), or lower target_temperature or learning_rate."
        )
