"""Turn tokenized instances into rows for Gen and the encoders: queries, and each distinct passage once."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from .passage_contents import PassageContents


class PassageMention(NamedTuple):
    """A passage at one place in one instance."""

    instance_id: str
    place: int | str  # the number of its [NSP], or "negative" or "candidate" and a number
    content: tuple[int, ...]  # token ids
    passage_id: str | None


@dataclass
class Query:
    """
    The query of one `[NSP]`, which has a positive or, if it is distilled, candidates.

    Args:
        instance_id (`str`): of the instance that has this `[NSP]`.
        key (`int`): hash of everything up to this `[NSP]`.
        passage ([`PassageMention`], *optional*): its positive.
        positive_keys (`tuple[int, ...]`): hashes of the ids of further passages that would have been right.
        input_ids (`Sequence[int]`): what an encoder reads; empty if Gen makes the queries.
        number (`int`): of this query in its batch, counted instance by instance.
        is_first (`bool`): it is the first query of its instance.
        candidates (`list[PassageMention]`): the passages that the reader scored for it.
        candidate_scores (`list[float]`): the reader's scores.
    """

    instance_id: str
    key: int
    passage: PassageMention | None
    positive_keys: tuple[int, ...] = ()
    input_ids: Sequence[int] = ()
    number: int = 0
    is_first: bool = True
    candidates: list[PassageMention] = field(default_factory=list)
    candidate_scores: list[float] = field(default_factory=list)


@dataclass
class InstanceRow:
    """
    The row of one instance for Gen, with its queries and hard negatives.

    Args:
        id (`str`): of the instance.
        input_ids, labels (`list[int]`): equally long; no labels with `supervision="nsp"`.
        columns (`list[int]`): of each `[NSP]`.
        queries (`list[Query]`): one for each `[NSP]`; none with `supervision="ntp"`.
        negatives (`list[PassageMention]`): hard negatives.
    """

    id: str
    input_ids: list[int]
    labels: list[int]
    columns: list[int] = field(default_factory=list)
    queries: list[Query] = field(default_factory=list)
    negatives: list[PassageMention] = field(default_factory=list)

    @property
    def trained_columns(self) -> list[int]:
        """Columns whose next token is trained."""
        return [column for column, label in enumerate(self.labels[1:]) if label != -100]


@dataclass
class BatchRows:
    """
    All rows of a batch, before it is cut into micro-batches.

    Args:
        instances (`list[InstanceRow]`): what Gen reads.
        passages (`list[tuple[int, ...]]`): token ids of each passage row.
        passage_keys (`list[list[int]]`): for each passage row, a hash of its content, then hashes of its ids.
        row_of_passage (`dict[PassageMention, int]`): for each mention of a passage, its passage row.
        query_rows (`list[list[Query]]`): the queries that share one row of an encoder: the last is the row, the others
            are prefixes of it.
    """

    instances: list[InstanceRow]
    passages: list[tuple[int, ...]]
    passage_keys: list[list[int]]
    row_of_passage: dict[PassageMention, int]
    query_rows: list[list[Query]] = field(default_factory=list)

    @property
    def queries(self) -> list[Query]:
        """The queries of all instances, in order."""
        queries = []
        for instance in self.instances:
            queries += instance.queries
        return queries


def read_batch(
    features: Sequence[Mapping[str, Any]],
    nsp_token_id: int | None,
    supervision: str,
    encoder_queries: bool,
    mask_duplicates: bool,
    share_query_rows: bool = False,
) -> BatchRows:
    """
    Return the rows of tokenized instances.

    Args:
        features (`list[dict]`): as [`~trainer.tokenizing.tokenize_instance`] returns them; those that need candidates
            have them, see [`~trainer.distillation_step.DistillationStepMixin`].
        nsp_token_id (`int`, *optional*): id of `[NSP]`.
        supervision (`str`), encoder_queries (`bool`), mask_duplicates (`bool`): see [`CoSupDataCollator`].
        share_query_rows (`bool`): a query that begins a later one of its instance has no row of its own. A causal
            encoder reads it on the way.

    Raises:
        `ValueError`: for a malformed instance, naming its id, or a passage id with two contents.
    """
    instances = [_read_instance(feature, nsp_token_id, supervision, encoder_queries) for feature in features]
    mentions = []
    for instance in instances:
        mentions += [query.passage for query in instance.queries if query.passage is not None]
    for instance in instances:
        mentions += instance.negatives
        for query in instance.queries:
            mentions += query.candidates
    passages, passage_keys, row_of_passage = _distinct_passages(mentions, mask_duplicates)
    if supervision == "nsp":
        instances = [instance for instance in instances if instance.queries]
    rows = BatchRows(instances, passages, passage_keys, row_of_passage)
    for number, query in enumerate(rows.queries):
        query.number = number
    for instance in instances:
        for query in instance.queries[1:]:
            query.is_first = False
    if encoder_queries:
        for instance in instances:
            rows.query_rows += _query_rows(instance.queries, share_query_rows)
    return rows


def _query_rows(queries: Sequence[Query], share: bool) -> list[list[Query]]:
    """Return the queries of an instance in rows; if they share rows, each query of a row begins the next one."""
    rows: list[list[Query]] = []
    for query in queries:
        last_ids = rows[-1][-1].input_ids if rows else []
        if share and rows and query.input_ids[: len(last_ids)] == last_ids:
            rows[-1].append(query)
        else:
            rows.append([query])
    return rows


def _read_instance(
    feature: Mapping[str, Any], nsp_token_id: int | None, supervision: str, encoder_queries: bool
) -> InstanceRow:
    """Return the row of a tokenized instance, with a query for each `[NSP]`."""
    id = str(feature.get("id", "without id"))
    input_ids, labels, passages = feature["input_ids"], feature["labels"], feature["passage_input_ids"]
    columns = [column for column, token in enumerate(input_ids) if token == nsp_token_id]
    is_resolved = bool(feature.get("candidate_input_ids"))
    num_passages = 1 if is_resolved else len(passages)  # one [NSP] stands before all candidates of a resolved row
    if not input_ids or len(columns) != num_passages or len(labels) != len(input_ids):
        counts = f"{len(input_ids)} tokens, {len(labels)} labels, {len(columns)} [NSP] and {len(passages)} passages"
        raise ValueError(
            f"Instance {id!r} has {counts}; expected as many labels as tokens and as many passages as [NSP]."
        )
    if supervision == "ntp":
        return InstanceRow(id, input_ids, labels)
    if encoder_queries and feature.get("query_input_ids") is None:
        raise ValueError(
            f"Instance {id!r} has no query_input_ids, which supervision={supervision!r} needs:"
            " tokenize it with this model's config."
        )
    instance = InstanceRow(id, input_ids, labels, columns)
    if is_resolved:
        instance.queries = _distilled_queries(feature, id, columns)
        instance.columns = columns[: len(instance.queries)]
    else:
        instance.queries = _queries(feature, id, columns)
    if encoder_queries:
        for query, query_input_ids in zip(instance.queries, feature["query_input_ids"], strict=False):
            query.input_ids = query_input_ids
    negatives = feature.get("negative_input_ids") or []
    negative_ids = feature.get("negative_ids") or [None] * len(negatives)
    for i, (ids, negative_id) in enumerate(zip(negatives, negative_ids, strict=True)):
        instance.negatives.append(PassageMention(id, f"negative {i}", tuple(ids), negative_id))
    if supervision == "nsp":  # nothing after the last [NSP] contributes to the loss
        instance.input_ids = input_ids[: columns[-1] + 1] if instance.queries else []
        instance.labels = []
    return instance


def _queries(feature: Mapping[str, Any], id: str, columns: Sequence[int]) -> list[Query]:
    """Return the query of each `[NSP]`, with its positive."""
    passages = feature["passage_input_ids"]
    passage_ids = feature.get("passage_ids") or [None] * len(columns)
    positive_ids = feature.get("positive_ids") or [None] * len(columns)
    queries = []
    for i, column in enumerate(columns):
        passage = PassageMention(id, i, tuple(passages[i]), passage_ids[i])
        positive_keys = tuple(_hash("id", str(positive)) for positive in positive_ids[i] or ())
        queries.append(Query(id, _query_key(feature, column), passage, positive_keys))
    return queries


def _distilled_queries(feature: Mapping[str, Any], id: str, columns: Sequence[int]) -> list[Query]:
    """Return the query whose candidates the reader scored; none if there is nothing to compare them with."""
    candidates = feature["candidate_input_ids"]
    if len(candidates) < 2 or feature.get("candidate_scores") is None:
        return []
    query = Query(id, _query_key(feature, columns[0]), passage=None, candidate_scores=feature["candidate_scores"])
    for i, (ids, candidate_id) in enumerate(zip(candidates, feature["candidate_ids"], strict=True)):
        query.candidates.append(PassageMention(id, f"candidate {i}", tuple(ids), candidate_id))
    return [query]


def _query_key(feature: Mapping[str, Any], column: int) -> int:
    return _hash("query", *feature["input_ids"][: column + 1])


def _distinct_passages(
    mentions: Sequence[PassageMention], mask_duplicates: bool
) -> tuple[list[tuple[int, ...]], list[list[int]], dict[PassageMention, int]]:
    """Return passage rows, the keys of each row, and the row of each mention; refuse an id with two contents."""
    contents = PassageContents()
    passages: list[tuple[int, ...]] = []
    keys: list[list[int]] = []
    row_of_passage: dict[PassageMention, int] = {}
    row_of_content: dict[tuple[int, ...], int] = {}
    for mention in mentions:
        row = len(passages)
        if mask_duplicates:
            row = row_of_content.setdefault(mention.content, row)
        if row == len(passages):
            passages.append(mention.content)
            keys.append([_hash("content", *mention.content)])
        if mention.passage_id is not None:
            contents.add(mention.passage_id, mention.content, f"Instance {mention.instance_id!r}")
            id_key = _hash("id", str(mention.passage_id))
            if id_key not in keys[row]:
                keys[row].append(id_key)
        row_of_passage[mention] = row
    return passages, keys, row_of_passage


def _hash(*values: object) -> int:
    """Return a 63-bit hash that is the same in every process."""
    return int.from_bytes(hashlib.blake2b(repr(values).encode(), digest_size=8).digest(), "big") >> 1
