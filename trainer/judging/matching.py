"""Predictions and evaluation instances: which belongs to which, which need a passage, and the passage ids they hold."""

from collections import Counter
from collections.abc import Sequence


def match_by_id(predictions: list[dict], instances: list[dict]) -> list[tuple[dict, dict]]:
    """
    Pairs of a prediction and its evaluation instance.

    Args:
        predictions (`list[dict]`), instances (`list[dict]`): each with an `"id"`, in any order.

    Returns:
        `list[tuple[dict, dict]]`: `(prediction, instance)`, in the order of the instances.

    Raises:
        `ValueError`: with counts and examples, when an id is missing, occurs twice, or has no partner.
    """
    ids = {}
    for name, rows in (("predictions", predictions), ("evaluation set", instances)):
        if without := sum("id" not in row for row in rows):
            raise ValueError(f"{without} of {len(rows)} rows of the {name} have no id.")
        ids[name] = [str(row["id"]).strip() for row in rows]
    found, asked = ids["predictions"], ids["evaluation set"]
    problems = [
        f"{len(twice)} ids stand twice in the {name} ({_some_of(twice)})"
        for name in ids
        if (twice := _twice(ids[name]))
    ]
    if unanswered := sorted(set(asked) - set(found)):
        problems.append(f"{len(unanswered)} questions have no prediction ({_some_of(unanswered)})")
    if unknown := sorted(set(found) - set(asked)):
        problems.append(f"{len(unknown)} predictions have no question ({_some_of(unknown)})")
    if problems:
        raise ValueError(
            f"{len(found)} predictions and {len(asked)} questions do not match by id: {'; '.join(problems)}."
        )
    by_id = dict(zip(found, predictions, strict=True))
    return [(by_id[id], instance) for id, instance in zip(asked, instances, strict=True)]


def with_provenance(instances: list[dict]) -> list[dict]:
    """
    The instances that need a passage: those whose `provenance` holds an id.

    Raises:
        `ValueError`: with counts, when an instance has no field `provenance`, or when none needs a passage, so that retrieval cannot be judged.
    """
    if without := [str(instance.get("id")) for instance in instances if instance.get("provenance") is None]:
        raise ValueError(
            f"{len(without)} of {len(instances)} instances have no provenance ({_some_of(without)}): retrieval cannot be judged."
        )
    needing = [instance for instance in instances if any(instance["provenance"])]
    if not needing:
        raise ValueError(f"The provenance of all {len(instances)} instances is empty: retrieval cannot be judged.")
    return needing


def select_fields(rows: list[dict], schema: dict) -> list[dict]:
    """
    Rows with the fields of a schema and no others, so that whole lines of predictions and evaluation sets can be given to an `evaluate` module.

    Args:
        rows (`list[dict]`).
        schema (`dict`): names of fields, nested in dicts and lists of one item as the rows are; anything else means a text.

    Returns:
        `list[dict]`: numbers become texts; a list of texts that a row lacks is `None`.

    Raises:
        `ValueError`: with counts, when rows lack a text or a list of dicts.
    """
    for name, part in schema.items():
        required = not isinstance(part, list) or isinstance(part[0], dict)
        if required and (without := sum(row.get(name) is None for row in rows)):
            raise ValueError(f"{without} of {len(rows)} rows have no {name!r}; expected the fields {sorted(schema)}.")
    return [_select(row, schema) for row in rows]


def _select(value, schema):
    if isinstance(schema, dict):
        return {name: _select(value.get(name), part) for name, part in schema.items()}
    if isinstance(schema, list):
        return None if value is None else [_select(each, schema[0]) for each in value]
    return str(value) if isinstance(value, int) else value


def evidence_sets(provenance: Sequence[Sequence[str]] | None) -> list[set[str]]:
    """
    The distinct, non-empty evidence sets of a `provenance`: `list[set]`.

    Raises:
        `ValueError`: when there is none.
    """
    sets: list[set[str]] = []
    for evidence in map(set, provenance or []):
        if evidence and evidence not in sets:
            sets.append(evidence)
    if not sets:
        raise ValueError("The provenance is empty: retrieval cannot be judged.")
    return sets


def gold_ids(instance: dict) -> set[str]:
    """Ids of all passages that count as gold, of any set of `provenance`."""
    return {id for evidence in instance["provenance"] for id in evidence}


def provenance_unknown(instance: dict) -> bool:
    """Whether nobody knows which passages a question needs: `"meta": {"provenance_unknown": true}`. It may need one."""
    return bool((instance.get("meta") or {}).get("provenance_unknown"))


def retrieved_ids(prediction: dict) -> list[str]:
    """Ids of the passages of all `retrievals` of a prediction, in order, the best of each retrieval first; repeats stay."""
    return [passage["id"] for retrieval in prediction["retrievals"] for passage in retrieval["passages"]]


def _twice(ids):
    return [id for id, count in Counter(ids).items() if count > 1]


def _some_of(ids):
    return ", ".join(ids[:3]) + ("" if len(ids) <= 3 else ", …")
