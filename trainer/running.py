"""The figures of the log, summed over steps and ranks."""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import torch

from modeling_cosup.files_cosup import read_json

from .batching import BatchFacts

CLOCK_FILE = "training_clock.json"  # of a checkpoint: how long it was trained


class RunningFigures:
    """
    The figures of the next log, as sums over the steps since the last log.

    The sums stay on the device until [`~RunningFigures.averages`] is called.

    A figure for which nothing was there to be measured (no label, no query, no negative) is left out, never 0.

    Args:
        loss_names (`Iterable[str]`): names of the losses that are trained.
        mean_names (`Iterable[str]`, *optional*): names of figures that are means over queries or instances.
        count_names (`Iterable[str]`, *optional*): names of figures that are counts.

    Attributes:
        counts (`dict[str, float]`): how many queries or instances each mean of the last averages was over.
        steps (`int`): optimiser steps since the last log.
        has_losses (`bool`): whether any loss was measured, since the last log or before.
        seconds_before (`float`): seconds of training before this object was made, by the clock of the checkpoint
            from which a run resumes, or by its log.
    """

    def __init__(
        self, loss_names: Iterable[str], mean_names: Iterable[str] = (), count_names: Iterable[str] = ()
    ) -> None:
        self._loss_names = list(loss_names)
        self._mean_names = list(mean_names)
        self._count_names = list(count_names)
        self.counts: dict[str, float] = {}
        self.has_losses = False
        self.seconds_before = 0.0
        self._trained_since = time.time()
        self.restart()

    def restart(self) -> None:
        """Set all sums to zero and restart the clock."""
        self.steps = 0
        self._losses: dict[str, torch.Tensor | float] = dict.fromkeys(self._loss_names, 0.0)
        self._steps_of_loss: dict[str, set[int]] = {name: set() for name in self._loss_names}
        self._queries = 0
        self._compared: torch.Tensor | float = 0.0  # queries that have a negative
        self._tokens = 0
        self._padded_tokens = 0
        self._correct: torch.Tensor | float = 0.0
        self._negatives: torch.Tensor | float = 0.0
        self._sums: dict[str, torch.Tensor | float] = dict.fromkeys(self._mean_names, 0.0)
        self._sizes: dict[str, int] = dict.fromkeys(self._mean_names, 0)
        self._totals: dict[str, int] = dict.fromkeys(self._count_names, 0)
        self._began = time.time()

    def add_step(self) -> None:
        """Count an optimiser step."""
        self.steps += 1

    def add_batch(self, facts: BatchFacts) -> None:
        """Add the token counts of a batch."""
        self._tokens += facts.num_tokens
        self._padded_tokens += facts.num_padded_tokens

    def add_losses(self, losses: dict[str, torch.Tensor]) -> None:
        """
        Add this rank's share of the losses of a batch or a micro-batch, by name.

        All ranks must add the same losses in a step: those that any rank can measure.
        """
        for name, loss in losses.items():
            # a trial of a search may train a loss that was not trained before
            self._losses[name] = self._losses.get(name, 0.0) + loss.detach().float()
            self._steps_of_loss.setdefault(name, set()).add(self.steps)
            self.has_losses = True

    def add_scores(self, scores: torch.Tensor, labels: torch.Tensor) -> None:
        """
        Add how queries retrieve within their batch.

        Args:
            scores (`torch.FloatTensor` of shape `(N, M)`): of queries with passages, `-inf` for other passages that
                are not negatives.
            labels (`torch.LongTensor` of shape `(N,)`): the row of each query's positive.
        """
        self._queries += len(labels)
        if not scores.numel():
            return
        scores = scores.detach()
        positives = scores.gather(1, labels[:, None])  # (N, 1)
        negatives = scores.scatter(1, labels[:, None], float("-inf"))  # (N, M)
        are_negatives = negatives > float("-inf")  # (N, M)
        compared = are_negatives.any(1)  # (N,); without a negative there is nothing to be right about
        self._correct += (compared & (positives[:, 0] > negatives.amax(1))).sum()  # a tie is a miss
        self._compared += compared.sum()
        self._negatives += are_negatives.sum()

    def add_values(self, values: Mapping[str, torch.Tensor | Sequence[float]]) -> None:
        """Add values of queries or instances, by the name of the figure that is their mean."""
        for name, numbers in values.items():
            self._sums[name] += numbers.sum() if isinstance(numbers, torch.Tensor) else sum(numbers)
            self._sizes[name] += len(numbers)

    def add_count(self, name: str, count: int) -> None:
        """Add to a count."""
        self._totals[name] += count

    def leave_out(self, seconds: float) -> None:
        """Do not count these seconds as training time."""
        self._began += seconds
        self._trained_since += seconds

    @property
    def training_seconds(self) -> float:
        """Seconds spent training so far, without those that were left out."""
        return self.seconds_before + time.time() - self._trained_since

    def averages(
        self, device: torch.device, sum_over_ranks: Callable[[torch.Tensor], torch.Tensor]
    ) -> dict[str, float]:
        """
        Return the figures of all ranks since [`~RunningFigures.restart`], by name.

        A loss is the mean over the steps in which it was measured. `nsp_accuracy` is over the queries that have a
        negative, `num_negatives` over all queries.

        Args:
            device (`torch.device`): on which the sums of ranks are added.
            sum_over_ranks (`Callable`): takes and returns a tensor of shape `(K,)`.
        """
        sums = {
            **self._losses,
            "tokens": self._tokens,
            "padded_tokens": self._padded_tokens,
            "queries": self._queries,
            "compared": self._compared,
            "correct": self._correct,
            "negatives": self._negatives,
            **self._totals,
        }
        for name in self._mean_names:
            sums[f"sum of {name}"], sums[f"size of {name}"] = self._sums[name], self._sizes[name]
        dtype = widest_float(device)
        local = torch.stack([torch.as_tensor(value, dtype=dtype, device=device) for value in sums.values()])
        totals = dict(zip(sums, sum_over_ranks(local).tolist(), strict=True))
        figures = {}
        for name, steps in self._steps_of_loss.items():
            if steps:
                figures[name] = totals[name] / len(steps)
        if totals["compared"]:
            figures["nsp_accuracy"] = totals["correct"] / totals["compared"]
        if totals["queries"]:
            figures["num_negatives"] = totals["negatives"] / totals["queries"]
        figures["tokens_per_second"] = totals["tokens"] / max(1e-9, time.time() - self._began)
        if totals["padded_tokens"]:
            figures["padding"] = 1 - totals["tokens"] / totals["padded_tokens"]
        for name in self._mean_names:
            self.counts[name] = totals[f"size of {name}"]
            if self.counts[name]:
                figures[name] = totals[f"sum of {name}"] / self.counts[name]
        for name in self._count_names:
            figures[name] = totals[name]
        return figures


def seconds_of_checkpoint(folder: str | None, log_history: Sequence[Mapping[str, float]]) -> float:
    """Return the seconds of training up to a checkpoint, or what the log says last; 0 without either."""
    if folder is not None and Path(folder, CLOCK_FILE).exists():
        return float(read_json(Path(folder, CLOCK_FILE))["training_seconds"])
    seconds = [entry["training_seconds"] for entry in log_history if "training_seconds" in entry]
    return seconds[-1] if seconds else 0.0


def widest_float(device: torch.device) -> torch.dtype:
    """Return the widest dtype of a device: float64, or float32 on the GPU of a Mac."""
    return torch.float32 if device.type == "mps" else torch.float64


def peak_memory(device: torch.device) -> float | None:
    """
    Return the largest memory of this process so far, in GB: allocated on the device, or resident if it is a CPU.

    `None` if the system does not say.
    """
    if device.type != "cpu":
        measure = getattr(torch.get_device_module(device), "max_memory_allocated", None)
        return None if measure is None else measure() / 1e9
    status = Path("/proc/self/status")  # getrusage would count the program that launched this one
    if not status.exists():
        return None
    for line in status.read_text(encoding="utf-8").splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024 / 1e9
    return None
