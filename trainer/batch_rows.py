"""Tokenized instances to the rows that Gen and the encoders read: queries, and each distinct passage once."""

import hashlib
from dataclasses import dataclass


@dataclass
class BatchRows:
    """
    What the instances of a batch hold, before it is cut.

    Args:
        instances (`list[dict]`): `id`, `input_ids`, `labels`, `columns` (of each `[NSP]`), `queries` and `negatives`.
        passages (`list[tuple[int, ...]]`): token ids of each passage row.
        passage_keys (`list[set[int]]`): of each passage row, hashes of its content and of its ids.
        row_of_passage (`dict[tuple, int]`): of each passage that an instance names.
    """

    instances: list[dict]
    passages: list[tuple[int, ...]]
    passage_keys: list[set[int]]
    row_of_passage: dict[tuple, int]

    @property
    def queries(self) -> list[dict]:
        """The queries of all instances, in order: `instance_id`, `key`, `passage`, `positive_keys`, `input_ids`."""
        return [query for instance in self.instances for query in instance["queries"]]


def read_batch(
    features: list[dict], nsp_token_id: int, supervision: str, encoder_queries: bool, mask_duplicates: bool
) -> BatchRows:
    """
    The rows of tokenized instances.

    Args:
        features (`list[dict]`): as [`~trainer.data.tokenize_instance`] returns them.
        nsp_token_id (`int`): id of `[NSP]`.
        supervision (`str`), encoder_queries (`bool`), mask_duplicates (`bool`): see [`CoSupDataCollator`].

    Raises:
        `ValueError`: a malformed instance, naming its id.
    """
    instances = [_read_instance(feature, nsp_token_id, supervision, encoder_queries) for feature in features]
    named = [query["passage"] for instance in instances for query in instance["queries"]]
    named += [negative for instance in instances for negative in instance["negatives"]]
    passages, passage_keys, row_of_passage = _distinct_passages(named, mask_duplicates)
    if supervision == "nsp":
        instances = [instance for instance in instances if instance["queries"]]
    return BatchRows(instances, passages, passage_keys, row_of_passage)


def _read_instance(feature, nsp_token_id, supervision, encoder_queries):
    """An instance with a query for each `[NSP]`. A passage is named by its instance, place, content and id."""
    id = str(feature.get("id", "without id"))
    input_ids, labels, passages = feature["input_ids"], feature["labels"], feature["passage_input_ids"]
    columns = [i for i, token in enumerate(input_ids) if token == nsp_token_id]
    if not input_ids or len(columns) != len(passages) or len(labels) != len(input_ids):
        counts = f"{len(input_ids)} tokens, {len(labels)} labels, {len(columns)} [NSP] and {len(passages)} passages"
        raise ValueError(
            f"Instance {id!r} has {counts}; expected as many labels as tokens and as many passages as [NSP]."
        )
    instance = {"id": id, "input_ids": input_ids, "labels": labels, "columns": [], "queries": [], "negatives": []}
    if supervision == "ntp":
        return instance
    if encoder_queries and feature.get("query_input_ids") is None:
        raise ValueError(
            f"Instance {id!r} has no query_input_ids, which supervision={supervision!r} needs:"
            " tokenize it with this model's config."
        )
    instance["columns"] = columns
    passage_ids = feature.get("passage_ids") or [None] * len(columns)
    positive_ids = feature.get("positive_ids") or [None] * len(columns)
    for i, column in enumerate(columns):
        query = {
            "instance_id": id,
            "key": _hash("query", *input_ids[: column + 1]),
            "passage": (id, i, tuple(passages[i]), passage_ids[i]),
            "positive_keys": tuple(_hash("id", positive) for positive in positive_ids[i] or ()),
        }
        if encoder_queries:
            query["input_ids"] = feature["query_input_ids"][i]
        instance["queries"].append(query)
    negatives = feature.get("negative_input_ids") or []
    negative_ids = feature.get("negative_ids") or [None] * len(negatives)
    for i, (ids, negative_id) in enumerate(zip(negatives, negative_ids, strict=True)):
        instance["negatives"].append((id, f"negative {i}", tuple(ids), negative_id))
    if supervision == "nsp":  # nothing after the last [NSP] has a part in the loss
        instance["input_ids"] = input_ids[: columns[-1] + 1] if columns else []
        instance["labels"] = []
    return instance


def _distinct_passages(named, mask_duplicates):
    """Passage rows, the keys of each, and the row of each passage that is named."""
    passages, keys, row_of_passage, row_of_content = [], [], {}, {}
    for passage in named:
        *_, content, passage_id = passage
        row = len(passages)
        if mask_duplicates:
            row = row_of_content.setdefault(content, row)
        if row == len(passages):
            passages.append(content)
            keys.append({_hash("content", *content)})
        if passage_id is not None:
            keys[row].add(_hash("id", passage_id))
        row_of_passage[passage] = row
    return passages, keys, row_of_passage


def _hash(*values):
    """A 63-bit hash that is the same in every process."""
    return int.from_bytes(hashlib.blake2b(repr(values).encode(), digest_size=8).digest(), "big") >> 1
