"""The planned comparisons of an experiment: the field `comparisons` of its file, checked before any training."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, Protocol

from trainer.judging.figures import (
    GIVEN,
    MODES,
    QUERY,
    QUERY_FIGURES,
    QUESTION_FIGURES,
    RETRIEVAL_WHILE_GENERATING,
    SEARCHING,
    SPLITS,
    figure,
)
from trainer.judging.judge import KS
from trainer.judging.retrieval import KILT_KS, NDCG_K

from experiments.task_files import Entry, Meaning, expand_tasks
from shared import quickstart_tasks

ALL = "all"
ONLY_IN_METRICS = ("cor_success", "cor_failure", "short_answer")
GATED_BY_RETRIEVAL = (
    *("cor_minus", "gr_success", "gr_failure"),
    *("kilt_accuracy", "kilt_em", "kilt_f1", "kilt_rouge_l"),
)
WITHOUT_PASSAGE = ("cor_not_needed", "em_not_needed")  # of questions that need no passage
OF_RETRIEVED_TEXT = ("gr", "k_precision", "citation_recall", "citation_precision")
MEASURED_KS = {  # the k that an evaluation measures
    "query_recall": KS,
    "hit_rate": KS,
    "ndcg": (NDCG_K,),
    "kilt_recall": KILT_KS,
    "ann_recall": (),
}


@dataclass
class PlannedComparison:
    """
    A comparison that is fixed before the first run.

    Args:
        arm (`str`): the arm that may be ahead.
        against (`str`): the arm that it is compared with.
        figure (`str`): a figure of `trainer.judging.figures` that has a value for each question.
        name (`str`, *optional*): its name in the report; by default `"<arm> against <against>"`.
        mode (`str`, *optional*): one of the modes of the evaluation; by default the first.
        group (`str`): `"all"`, `"in-domain"`, `"out-of-domain"`, or the name of a task. A group is the mean over its
            tasks.
        setting (`str`, *optional*): what the tasks search, as in the report, such as `"Top-20"`; needed only if the
            experiment has several.
    """

    arm: str
    against: str
    figure: str
    name: str | None = None
    mode: str | None = None
    group: str = ALL
    setting: str | None = None


class Planned(Protocol):
    """The fields of an experiment that its comparisons depend on."""

    arms: dict[str, dict[str, Any]]
    tasks: list[dict[str, Any]] | None
    task_options: dict[str, Any]
    pools: list[int | str]
    corpus_sizes: list[int | str] | None
    pools_only: bool
    comparisons: list[dict[str, Any]]
    evaluation: dict[str, Any]

    @property
    def modes(self) -> list[str]:
        """The modes in which questions are answered."""


def complete_comparisons(experiment: Planned, where: str) -> list[dict[str, Any]]:
    """
    Return the comparisons of an experiment with every field set.

    Raises:
        `ValueError`: if a field, an arm, a figure, a mode, a group or a setting is unknown, or if a comparison cannot
            have a value or stands there twice. The message begins with `where` and the number of the comparison.
    """
    if not isinstance(experiment.comparisons, list):
        raise ValueError(f"{where}: comparisons is {experiment.comparisons!r}, expected a list.")
    tasks = experiment.tasks
    if tasks is None:  # those of the quickstart's world, which is not made yet
        tasks = [{"name": name, "eval_file": name, "split": split} for name, split in quickstart_tasks.SPLITS.items()]
    entries, meaning = expand_tasks(experiment, tasks)
    comparisons: list[dict[str, Any]] = []
    for number, values in enumerate(experiment.comparisons, start=1):
        place = f"{where}: comparison {number}"
        comparison = _comparison(values, place)
        mode = comparison.mode
        comparison.mode = "off" if mode is False else mode or experiment.modes[0]  # YAML reads a plain `off` as False
        comparison.name = str(comparison.name or f"{comparison.arm} against {comparison.against}")
        _check_arms(comparison, list(experiment.arms), place)
        _check_one_of("mode", comparison.mode, experiment.modes, place)
        _check_figure(comparison, experiment.evaluation.get("nli_model"), place)
        _set_setting(comparison, list(dict.fromkeys(about["setting"] for about in meaning.values())), place)
        _check_num_passages(comparison, entries, meaning, place)
        _check_group(comparison, list(meaning.values()), place)
        fields_that_count = {**vars(comparison), "name": None}
        for earlier, other in enumerate(comparisons, start=1):
            if {**other, "name": None} == fields_that_count:
                raise ValueError(f"{place} is comparison {earlier}: counting it twice makes all others look worse.")
        comparisons.append(vars(comparison))
    return comparisons


def _comparison(values: Any, place: str) -> PlannedComparison:
    if not isinstance(values, dict):
        raise ValueError(f"{place} is {values!r}, expected arm, against and figure.")
    known = [entry.name for entry in fields(PlannedComparison)]
    unknown = [name for name in values if name not in known]
    if unknown:
        raise ValueError(f"{place}: unknown field {unknown[0]!r}, expected one of {', '.join(known)}.")
    missing = [name for name in ("arm", "against", "figure") if values.get(name) is None]
    if missing:
        raise ValueError(f"{place}: {missing[0]} is missing.")
    return PlannedComparison(**{name: value for name, value in values.items() if value is not None})


def _check_arms(comparison: PlannedComparison, arms: Sequence[str], place: str) -> None:
    _check_one_of("arm", comparison.arm, arms, place)
    _check_one_of("against", comparison.against, arms, place)
    if comparison.arm == comparison.against:
        raise ValueError(f"{place}: arm and against are both {comparison.arm}.")


def _check_one_of(field: str, value: Any, expected: Sequence[str], place: str) -> None:
    if value not in expected:
        raise ValueError(f"{place}: {field} is {value!r}, expected one of {', '.join(expected)}.")


def _check_figure(comparison: PlannedComparison, nli_model: str | None, place: str) -> None:
    name, mode = comparison.figure, str(comparison.mode)
    question_figures = [entry.name for entry in QUESTION_FIGURES]
    try:
        entry = figure(str(name))
    except KeyError:
        raise ValueError(f"{place}: figure is {name!r}, expected one of {', '.join(question_figures)}.") from None
    stem, at, k = entry.name.partition("@")
    if at and not k.isdigit():
        raise ValueError(f"{place}: figure is {name!r}, expected one with a number in place of k.")
    measured = [f"{stem}@{measured_k}" for measured_k in MEASURED_KS.get(stem, ())]
    if at and name not in measured:
        expected = f"expected one of {', '.join(measured)}" if measured else "which no evaluation measures"
        raise ValueError(f"{place}: figure is {name!r}, {expected}.")
    table_name = f"{stem}@k" if at else stem
    if entry.name != name or table_name not in question_figures:
        raise ValueError(
            f"{place}: figure is {name!r}, which has no value for each question, expected one of "
            f"{', '.join(question_figures)}."
        )
    if name in ONLY_IN_METRICS:
        raise ValueError(f"{place}: {name} is a figure of the evaluate module correctness, not of an evaluation.")
    if "judge" in entry.needs and not nli_model:
        raise ValueError(f"{place}: {name} needs an NLI model: set evaluation.nli_model.")
    modes = [known for known in MODES if known != QUERY]
    if table_name in [query_figure.name for query_figure in QUERY_FIGURES]:
        modes = ["retrieval", QUERY]
    elif table_name in [searched.name for searched in RETRIEVAL_WHILE_GENERATING] or name in GATED_BY_RETRIEVAL:
        modes = list(SEARCHING)
    elif name in WITHOUT_PASSAGE:
        modes = [known for known in modes if known not in GIVEN]
    elif name in OF_RETRIEVED_TEXT:
        modes.remove("off")
    if mode not in modes:
        raise ValueError(f"{place}: {name} is not measured in mode {mode}, expected mode {' or '.join(modes)}.")


def _set_setting(comparison: PlannedComparison, settings: Sequence[str], place: str) -> None:
    if comparison.setting is None and len(settings) != 1:
        raise ValueError(f"{place}: setting is missing, expected one of {', '.join(settings)}.")
    comparison.setting = comparison.setting or settings[0]
    _check_one_of("setting", comparison.setting, settings, place)


def _check_num_passages(comparison: PlannedComparison, entries: Sequence[Entry], meaning: Meaning, place: str) -> None:
    """Check that a ranking has more than k passages: among fewer nothing is missed, so that nothing is measured."""
    stem, _, k = comparison.figure.partition("@")
    if stem not in ("query_recall", "hit_rate"):
        return
    for entry in entries:
        about = meaning[entry["name"]]
        searched = str(about["size"] or entry["pool"])
        if about["setting"] == comparison.setting and searched != "full" and int(k) >= int(searched):
            raise ValueError(
                f"{place}: {comparison.figure} is not measured in setting {comparison.setting}, which searches "
                f"{searched} passages, expected more than {k}."
            )


def _check_group(comparison: PlannedComparison, tasks: Sequence[dict[str, Any]], place: str) -> None:
    in_setting = [task for task in tasks if task["setting"] == comparison.setting]
    groups = [split for split in SPLITS if any(task["split"] == split for task in in_setting)]
    _check_one_of("group", comparison.group, [ALL, *groups, *(task["task"] for task in in_setting)], place)
