"""
Match predictions with evaluation instances, select fields of both, collect their passage ids, and look for answers in
passages.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from .correctness import DATASET_METRICS, normalize_answer

VERDICTS = ("yes", "no", "true", "false", "supports", "refutes")  # answers that no passage can be searched for
LONG_ANSWER_METRICS = ("f1", "rouge_l", "claim_recall")  # as a dataset's metric, they compare whole texts


def match_by_id(predictions: list[dict], instances: list[dict]) -> list[tuple[dict, dict]]:
    """
    Pair each evaluation instance with its prediction.

    Args:
        predictions (`list[dict]`), instances (`list[dict]`): each with an `"id"`, in any order.

    Returns:
        `list[tuple[dict, dict]]`: `(prediction, instance)`, in the order of the instances.

    Raises:
        `ValueError`: if there are no instances, or if an id is missing, occurs twice or has no partner, with counts
            and examples.
    """
    if not instances:
        raise ValueError("The evaluation set holds no question: there is nothing to judge.")
    prediction_ids = _read_ids(predictions, "predictions")
    instance_ids = _read_ids(instances, "evaluation set")
    problems = []
    for name, ids in (("predictions", prediction_ids), ("evaluation set", instance_ids)):
        repeated = [id for id, count in Counter(ids).items() if count > 1]
        if repeated:
            problems.append(f"{len(repeated)} ids occur twice in the {name} ({_examples(repeated)})")
    unanswered = sorted(set(instance_ids) - set(prediction_ids))
    if unanswered:
        problems.append(f"{len(unanswered)} questions have no prediction ({_examples(unanswered)})")
    unknown = sorted(set(prediction_ids) - set(instance_ids))
    if unknown:
        problems.append(f"{len(unknown)} predictions have no question ({_examples(unknown)})")
    if problems:
        raise ValueError(
            f"{len(prediction_ids)} predictions and {len(instance_ids)} questions do not match by id: "
            f"{'; '.join(problems)}."
        )
    prediction_of = dict(zip(prediction_ids, predictions, strict=True))
    return [(prediction_of[id], instance) for id, instance in zip(instance_ids, instances, strict=True)]


def with_provenance(instances: list[dict]) -> list[dict]:
    """
    Return the instances that need a passage: those with at least one id in their `provenance`.

    Raises:
        `ValueError`: if an instance has no field `provenance`, with counts, or if none of them needs a passage.
            Retrieval cannot be judged then.
    """
    missing = [str(instance.get("id")) for instance in instances if instance.get("provenance") is None]
    if missing:
        raise ValueError(
            f"{len(missing)} of {len(instances)} instances have no provenance ({_examples(missing)}): "
            "retrieval cannot be judged."
        )
    needing = [instance for instance in instances if any(instance["provenance"])]
    if not needing:
        raise ValueError(f"The provenance of all {len(instances)} instances is empty: retrieval cannot be judged.")
    return needing


def select_fields(rows: list[dict], schema: dict) -> list[dict]:
    """
    Reduce rows to the fields of a schema, so that an `evaluate` module accepts whole lines of predictions and
    evaluation sets.

    Args:
        rows (`list[dict]`): predictions or evaluation instances.
        schema (`dict`): the fields, nested in dictionaries and one-item lists as in the rows. Any other value in it
            means a text.

    Returns:
        `list[dict]`: the rows with these fields only. Integers become texts. A list of texts that a row lacks becomes
        `None`.

    Raises:
        `ValueError`: if rows lack a text or a list of dictionaries, with counts.
    """
    for name, field in schema.items():
        is_optional = isinstance(field, list) and not isinstance(field[0], dict)
        if is_optional:
            continue
        missing = sum(row.get(name) is None for row in rows)
        if missing:
            raise ValueError(f"{missing} of {len(rows)} rows have no {name!r}; expected the fields {sorted(schema)}.")
    return [_select(row, schema) for row in rows]


def _select(value: Any, schema: Any) -> Any:
    if isinstance(schema, dict):
        return {name: _select(value.get(name), field) for name, field in schema.items()}
    if isinstance(schema, list):
        return None if value is None else [_select(item, schema[0]) for item in value]
    return str(value) if isinstance(value, int) else value


def evidence_sets(provenance: Sequence[Sequence[str]] | None) -> list[set[str]]:
    """
    Return the distinct, non-empty evidence sets of a `provenance`.

    Raises:
        `ValueError`: if there is no such set.
    """
    sets: list[set[str]] = []
    for evidence in map(set, provenance or []):
        if evidence and evidence not in sets:
            sets.append(evidence)
    if not sets:
        raise ValueError("The provenance is empty: retrieval cannot be judged.")
    return sets


def gold_ids(instance: dict) -> set[str]:
    """Return the ids of all gold passages: the union of the evidence sets in `provenance`."""
    return {id for evidence in instance["provenance"] for id in evidence}


def provenance_unknown(instance: dict) -> bool:
    """Return whether it is unknown which passages a question needs, if any: `"meta": {"provenance_unknown": true}`."""
    return bool((instance.get("meta") or {}).get("provenance_unknown"))


def retrieved_ids(prediction: dict) -> list[str]:
    """Return the passage ids of all `retrievals` in order, the best of each retrieval first. Repeats are kept."""
    return [passage["id"] for retrieval in prediction["retrievals"] for passage in retrieval["passages"]]


# ---------------------------------------------------------------------- answers in passages


def has_answer(passage: dict, answers: Iterable[str]) -> bool:
    """
    Return whether a passage holds one of the answers, as DPR and Atlas judge retrieval without gold passages.

    The words of the normalised answer must stand next to each other in the normalised title or the normalised text;
    "art" is not in "party". [`~trainer.judging.correctness.normalize_answer`] makes one word of a hyphenated one. An
    answer that normalises to nothing, such as "The", is in no passage.

    Args:
        passage (`dict`): with `"text"` and, unless it has none, `"title"`.
        answers (iterable of `str`): see [`answers_to_find`] for those that mean something here.
    """
    words = [normalize_answer(answer) for answer in answers]
    texts = [f" {normalize_answer(passage.get(name) or '')} " for name in ("title", "text")]
    return any(f" {answer} " in text for answer in words if answer for text in texts)


def answers_to_find(question: dict) -> list[str]:
    """
    Return the answers of a question that a passage can be searched for; none if `hit_rate@k` means nothing there.

    They are its `answers` or, if it has ALCE's readings, their short answers. Answers that normalise to nothing and
    verdicts (yes, no, true, false, supports, refutes) are left out: a passage that holds the word "no" answers
    nothing. Questions answered by whole sentences have none: questions of datasets whose metric compares texts (Wizard
    of Wikipedia, ELI5), questions with ALCE's claims, and questions with `"meta": {"long_answers": true}`.

    Args:
        question (`dict`): an instance with `answers`; `dataset` and `meta` are read if it has them.
    """
    meta = question.get("meta") or {}
    if meta.get("long_answers") or meta.get("claims"):
        return []
    if DATASET_METRICS.get(question.get("dataset", "")) in LONG_ANSWER_METRICS:
        return []
    answers = question.get("answers") or []
    if meta.get("qa_pairs"):
        answers = [answer for pair in meta["qa_pairs"] for answer in pair["short_answers"]]
    return [answer for answer in answers if normalize_answer(answer) not in ("", *VERDICTS)]


def ranking_can_be_judged(question: dict) -> bool:
    """
    Return whether a ranking of passages is right or wrong for a question: it has gold passages or, if it is unknown
    which passages it needs, answers that they can be searched for.
    """
    if question["provenance"]:
        return True
    return provenance_unknown(question) and bool(answers_to_find(question))


# ---------------------------------------------------------------------- helpers


def _read_ids(rows: list[dict], name: str) -> list[str]:
    missing = sum("id" not in row for row in rows)
    if missing:
        raise ValueError(f"{missing} of {len(rows)} rows of the {name} have no id.")
    return [str(row["id"]).strip() for row in rows]


def _examples(ids: list[str]) -> str:
    shown = ", ".join(ids[:3])
    return shown if len(ids) <= 3 else f"{shown}, …"
