"""Match predictions with evaluation instances, select fields of both, and collect what was retrieved."""

from collections import Counter
from collections.abc import Mapping
from typing import Any

from modeling_cosup.passages_cosup import shown


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


def check_rows(**rows_of: list[dict]) -> None:
    """Raise a `TypeError` unless the named rows are dictionaries: most metrics of `evaluate` take texts."""
    for name, rows in rows_of.items():
        for row in rows:
            if not isinstance(row, Mapping):
                raise TypeError(
                    f"{name} holds {shown(row)}, expected dictionaries: lines of predictions.jsonl, and of an"
                    " evaluation set."
                )


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


def retrieved_ids(prediction: dict) -> list[str]:
    """Return the passage ids of all `retrievals` in order, the best of each retrieval first. Repeats are kept."""
    return [passage["id"] for retrieval in prediction["retrievals"] for passage in retrieval["passages"]]


# ---------------------------------------------------------------------- helpers


def _read_ids(rows: list[dict], name: str) -> list[str]:
    missing = sum("id" not in row for row in rows)
    if missing:
        raise ValueError(f"{missing} of {len(rows)} rows of the {name} have no id.")
    return [str(row["id"]).strip() for row in rows]


def _examples(ids: list[str]) -> str:
    shown = ", ".join(ids[:3])
    return shown if len(ids) <= 3 else f"{shown}, …"
