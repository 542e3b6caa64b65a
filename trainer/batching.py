"""
Collate instances into a batch: micro-batches that waste little padding, one row for each distinct passage, and the
facts of a batch that all ranks need.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

from modeling_cosup.packing_cosup import pad_rows

from .batch_rows import BatchRows, InstanceRow, Query, read_batch
from .cutting import cut_by_number, cut_by_padding, cut_by_tokens
from .micro_batches import flat_positions, lay_out

# ---------------------------------------------------------------------- what a batch is


@dataclass
class BatchFacts:
    """
    What the host knows about a batch, so that no step waits for a GPU to learn it.

    A query has either a passage, or candidates, and then it is distilled. Below, a query is one that has a passage.

    Args:
        instance_ids (`list[list[str]]`): ids of the instances of each micro-batch.
        query_instance_ids (`list[str]`): for each query, the id of its instance.
        query_numbers (`list[int]`): for each query, its number in the batch, counted instance by instance.
        are_first (`list[bool]`): for each query, whether it is the first of its instance.
        passage_keys (`list[tuple[int, ...]]`): for each passage row, a hash of its content, then hashes of its ids.
        positive_keys (`list[tuple[int, ...]]`): for each query, hashes of the ids of further passages that would have
            been right.
        query_keys (`list[int]`): for each query, a hash of everything up to its `[NSP]`.
        passage_labels (`list[int]`): for each query, the row of its passage.
        distilled_instance_ids (`list[str]`): for each distilled query, the id of its instance.
        num_labels (`int`): trained tokens.
        num_gen_tokens (`int`): tokens that Gen reads, without padding.
        num_tokens (`int`): tokens that Gen and the encoders read, without padding.
        num_padded_tokens (`int`): the same with padding.
    """

    instance_ids: list[list[str]] = field(default_factory=list)
    query_instance_ids: list[str] = field(default_factory=list)
    query_numbers: list[int] = field(default_factory=list)
    are_first: list[bool] = field(default_factory=list)
    passage_keys: list[tuple[int, ...]] = field(default_factory=list)
    positive_keys: list[tuple[int, ...]] = field(default_factory=list)
    query_keys: list[int] = field(default_factory=list)
    passage_labels: list[int] = field(default_factory=list)
    distilled_instance_ids: list[str] = field(default_factory=list)
    num_labels: int = 0
    num_gen_tokens: int = 0
    num_tokens: int = 0
    num_padded_tokens: int = 0


@dataclass
class UnresolvedBatch:
    """
    Instances, some of which have no passage yet. Which passages they get depends on the current weights of the model.

    Args:
        features (`list[dict]`): tokenized instances.
    """

    features: list[Mapping[str, Any]]


def needs_candidates(feature: Mapping[str, Any]) -> bool:
    """Return whether a tokenized instance must get candidates before it can be collated."""
    return bool(feature.get("needs_candidates")) and not feature.get("candidate_input_ids")


@dataclass
class Cut:
    """
    The rows of one micro-batch.

    Args:
        instances, passages, queries (`list[int]`): row numbers in [`BatchRows`]; `queries` are those of `query_rows`,
            none if Gen makes the queries.
    """

    instances: list[int]
    passages: list[int]
    queries: list[int]


@dataclass
class CoSupDataCollator:
    """
    A collator that sorts instances by length, cuts them into micro-batches, and points each `[NSP]` at its passage.

    How a batch is cut changes neither loss nor gradients: all micro-batches of a batch share their passages.

    Args:
        pad_token_id, emb_seq_pad_token_id (`int`): may equal EOS. Padding is on the right, where causal attention
            never looks.
        nsp_token_id (`int`, *optional*): id of `[NSP]`.
        mask_duplicates (`bool`): identical passages become one row.
        supervision (`str`): `"co"`, `"ntp"` (no passages), `"nsp"` (nothing after the last `[NSP]`, no labels) or
            `"separate"` (queries are rows).
        encoder_queries (`bool`): queries are separate rows, which an encoder reads; always true with `"separate"`.
            With `"nsp"` Gen then has nothing to read.
        max_instances (`int`, *optional*): the most instances of a micro-batch.
        max_tokens (`int`, *optional*): the most tokens of a micro-batch, padding, passages and queries included. If it
            is given, `max_instances` does not count.
        call_overhead (`int`, *optional*): without either limit, a batch is cut if that saves padding; each further
            micro-batch counts as this many tokens. `None`: the batch is not cut.
        padding_free (`bool`): rows of Gen are concatenated into one row; position ids restart at 0 in each.
        padding_free_passages (`bool`): the same for rows of the encoders, which are causal. The queries of an instance
            then share a row where each begins the next, as the text up to one `[NSP]` begins the text up to the next.
        shorten_first_pass (`bool`): add `first_pass` to each micro-batch: its rows up to their last `[NSP]`, which is
            all that the first pass of GradCache must read. It is empty if Gen makes no queries.

    Returns:
        `dict`:

        - `micro_batches`, a list of `dict` of tensors, see [`forward_arguments`]
        - `passage_labels` `(N,)`: for each query that has a passage, in the order of the micro-batches, the row of its
          passage among the passages of all micro-batches
        - `nsp_query_rows` `(N,)`: the rows of these queries among the query embeddings of all micro-batches
        - `distilled_query_rows` `(N_d,)`: the same for the queries that are distilled
        - `candidate_rows` and `candidate_scores`, both `(N_d, K)`: passage rows of their candidates, -1 for none, and
          the reader's scores, float32
        - `facts`, a [`BatchFacts`]

        An [`UnresolvedBatch`], if an instance still needs candidates.

    Raises:
        `ValueError`: for a malformed instance, naming its id.
    """

    pad_token_id: int
    emb_seq_pad_token_id: int
    nsp_token_id: int | None
    mask_duplicates: bool = True
    supervision: str = "co"
    encoder_queries: bool = False
    max_instances: int | None = None
    max_tokens: int | None = None
    call_overhead: int | None = None
    padding_free: bool = False
    padding_free_passages: bool = False
    shorten_first_pass: bool = False

    def __post_init__(self) -> None:
        if self.supervision == "separate":
            self.encoder_queries = True

    def __call__(self, features: Sequence[Mapping[str, Any]]) -> dict[str, Any] | UnresolvedBatch:
        if any(needs_candidates(feature) for feature in features):
            return UnresolvedBatch(list(features))
        return self.collate(features)

    def collate(self, features: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Return the batch of instances that have their passages or candidates."""
        rows = read_batch(
            features,
            self.nsp_token_id,
            self.supervision,
            self.encoder_queries,
            self.mask_duplicates,
            share_query_rows=self.padding_free_passages,
        )
        cuts = self._cut(rows)
        micro_batches = [self._micro_batch(rows, cut) for cut in cuts]
        facts = self._facts(rows, cuts, micro_batches)
        # every part of the model takes part in every step: without input its gradients are zero, not missing
        self.complete(micro_batches[-1])
        queries = [query for cut in cuts for query in self._queries(rows, cut)]
        return {"micro_batches": micro_batches, "facts": facts, **_query_tensors(queries, rows, _passage_order(cuts))}

    def complete(self, micro_batch: dict[str, Any], device: torch.device | None = None) -> dict[str, Any]:
        """
        Add to `micro_batch`, in place, an empty input for each part of the model that it does not reach.

        With that, all ranks make the same calls.
        """
        dummy = torch.zeros(1, 1, dtype=torch.long, device=device)  # one token, which has no label
        no_rows = dummy[:0]  # (0, 1)
        no_positions = dummy[0, :0]  # (0,)
        if "input_ids" not in micro_batch:
            micro_batch["input_ids"] = dummy
            if self.padding_free:
                micro_batch["position_ids"] = dummy
            if self.supervision != "nsp":
                micro_batch["labels"] = torch.full_like(dummy, -100)
                micro_batch["label_positions"] = no_positions
            if self._gen_queries:
                micro_batch["nsp_positions"] = no_positions
        if self.supervision != "ntp" and "passage_input_ids" not in micro_batch:
            micro_batch["passage_input_ids"] = no_rows
        if self.encoder_queries and "query_input_ids" not in micro_batch:
            micro_batch["query_input_ids"] = no_rows
        if self.shorten_first_pass and not micro_batch.get("first_pass"):
            micro_batch["first_pass"] = {}
            if not self.encoder_queries:
                micro_batch["first_pass"] = {"input_ids": dummy, "nsp_positions": no_positions}
                if self.padding_free:
                    micro_batch["first_pass"]["position_ids"] = dummy
        return micro_batch

    @property
    def _gen_queries(self) -> bool:
        """Whether Gen makes the queries."""
        return not self.encoder_queries and self.supervision != "ntp"

    @property
    def _without_gen(self) -> bool:
        """Whether Gen has no part in the loss: NSP alone, with queries that an encoder makes."""
        return self.supervision == "nsp" and self.encoder_queries

    # ------------------------------------------------------------------ cutting

    def _lengths(self, rows: BatchRows) -> dict[str, list[int]]:
        """Return the length of each row, by kind of row: `"gen"`, `"passages"` or `"queries"`."""
        lengths: dict[str, list[int]] = {"gen": [], "passages": [], "queries": []}
        if not self._without_gen:
            lengths["gen"] = [len(instance.input_ids) for instance in rows.instances]
        lengths["passages"] = [len(passage) for passage in rows.passages]
        lengths["queries"] = [len(queries[-1].input_ids) for queries in rows.query_rows]
        return lengths

    def _cut(self, rows: BatchRows) -> list[Cut]:
        """Return the rows of each micro-batch; there is at least one micro-batch."""
        groups = self._groups(self._lengths(rows))
        count = max(map(len, groups.values()))
        no_rows: list[list[int]] = [[]]
        # aligned at the end: the last micro-batch must reach every part of the model, see `complete`
        aligned = [no_rows * (count - len(groups[kind])) + groups[kind] for kind in ("gen", "passages", "queries")]
        cuts = [Cut(*cut) for cut in zip(*aligned, strict=True)]
        return cuts or [Cut([], [], [])]

    def _groups(self, lengths: dict[str, list[int]]) -> dict[str, list[list[int]]]:
        """Return row numbers in groups, one group for each micro-batch, by kind of row."""
        groups = {}
        total = max(1, sum(sum(kind_lengths) for kind_lengths in lengths.values()))
        num_instances = len(lengths["queries"]) if self._without_gen else len(lengths["gen"])
        for kind, kind_lengths in lengths.items():
            packed = self.padding_free if kind == "gen" else self.padding_free_passages
            if self.max_tokens is not None:
                share = self.max_tokens * sum(kind_lengths) / total
                groups[kind] = cut_by_tokens(kind_lengths, share, packed)
            elif self.max_instances is not None:
                count = -(-num_instances // self.max_instances)
                groups[kind] = cut_by_number(kind_lengths, max(1, count))
            elif packed:
                groups[kind] = cut_by_padding(kind_lengths, None)
            else:
                groups[kind] = cut_by_padding(kind_lengths, self.call_overhead)
        if self.max_tokens is not None or self.max_instances is not None:
            # groups begin with the longest rows; reversed, long instances share a micro-batch with short passages
            groups["passages"].reverse()
            groups["queries"].reverse()
        return groups

    def _facts(self, rows: BatchRows, cuts: list[Cut], micro_batches: list[dict[str, Any]]) -> BatchFacts:
        """Return what the host knows about a batch; queries and passages are in the order of its micro-batches."""
        lengths = self._lengths(rows)
        facts = BatchFacts(num_gen_tokens=sum(lengths["gen"]))
        facts.num_tokens = sum(sum(kind_lengths) for kind_lengths in lengths.values())
        for instance in rows.instances:
            facts.num_labels += len(instance.trained_columns)
        for micro_batch in micro_batches:
            for name, tensor in micro_batch.items():
                if name.endswith("input_ids"):
                    facts.num_padded_tokens += tensor.numel()

        new_row = _passage_order(cuts)
        facts.passage_keys = [tuple(rows.passage_keys[row]) for row in new_row]
        for cut in cuts:
            queries = self._queries(rows, cut)
            if self._without_gen:
                facts.instance_ids.append([query.instance_id for query in queries])
            else:
                facts.instance_ids.append([rows.instances[i].id for i in cut.instances])
            for query in queries:
                if query.passage is None:
                    facts.distilled_instance_ids.append(query.instance_id)
                    continue
                facts.query_instance_ids.append(query.instance_id)
                facts.query_numbers.append(query.number)
                facts.are_first.append(query.is_first)
                facts.query_keys.append(query.key)
                facts.positive_keys.append(query.positive_keys)
                facts.passage_labels.append(new_row[rows.row_of_passage[query.passage]])
        return facts

    def _queries(self, rows: BatchRows, cut: Cut) -> list[Query]:
        """Return the queries of a micro-batch, in the order in which the model computes them."""
        queries: list[Query] = []
        if self.encoder_queries:
            for row in cut.queries:
                queries += rows.query_rows[row]
            return queries
        for i in cut.instances:
            queries += rows.instances[i].queries
        return queries

    # ------------------------------------------------------------------ tensors

    def _micro_batch(self, rows: BatchRows, cut: Cut) -> dict[str, Any]:
        """Return the tensors of a micro-batch, by name; see [`forward_arguments`]."""
        micro_batch: dict[str, Any] = {}
        if cut.instances:
            micro_batch |= self._gen_tensors([rows.instances[i] for i in cut.instances])
        if cut.passages:
            passages = [rows.passages[row] for row in cut.passages]
            last_columns = [[len(passage) - 1] for passage in passages]
            micro_batch |= self._encoder_tensors("passage", passages, last_columns)
        if cut.queries:
            query_rows = [rows.query_rows[row] for row in cut.queries]
            last_columns = [[len(query.input_ids) - 1 for query in queries] for queries in query_rows]
            micro_batch |= self._encoder_tensors("query", [row[-1].input_ids for row in query_rows], last_columns)
        return micro_batch

    def _gen_tensors(self, instances: list[InstanceRow]) -> dict[str, Any]:
        """Return what Gen reads, with the positions of `[NSP]` and of labels in the flattened tensor."""
        rows = [instance.input_ids for instance in instances]
        columns = [instance.columns for instance in instances]
        tensors, offsets = lay_out(rows, self.pad_token_id, self.padding_free)
        micro_batch: dict[str, Any] = {**tensors}
        if self._gen_queries:
            micro_batch["nsp_positions"] = flat_positions(offsets, columns)
        if self.supervision != "nsp":
            # a first token has no label: packed, the last token of the row before would be trained to predict it
            labels = [[-100, *instance.labels[1:]] for instance in instances]
            trained_columns = [instance.trained_columns for instance in instances]
            label_tensors, _ = lay_out(labels, -100, self.padding_free)
            micro_batch["labels"] = label_tensors["input_ids"]
            micro_batch["label_positions"] = flat_positions(offsets, trained_columns)
        if self.shorten_first_pass:
            micro_batch["first_pass"] = self._first_pass_tensors(instances) if self._gen_queries else {}
        return micro_batch

    def _first_pass_tensors(self, instances: list[InstanceRow]) -> dict[str, torch.Tensor]:
        """Return what Gen reads in the first pass of GradCache: rows up to their last `[NSP]`."""
        retrieving = [instance for instance in instances if instance.columns]
        if not retrieving:
            return {}
        rows = [instance.input_ids[: instance.columns[-1] + 1] for instance in retrieving]
        tensors, offsets = lay_out(rows, self.pad_token_id, self.padding_free)
        tensors["nsp_positions"] = flat_positions(offsets, [instance.columns for instance in retrieving])
        return tensors

    def _encoder_tensors(
        self, prefix: str, rows: Sequence[Sequence[int]], last_columns: Sequence[Sequence[int]]
    ) -> dict[str, torch.Tensor]:
        """
        Return what an encoder reads, under names that begin with `prefix`, `"passage"` or `"query"`.

        `last_columns` are the columns of each row whose states become embeddings; only packed rows have several.
        """
        tensors, offsets = lay_out(rows, self.emb_seq_pad_token_id, self.padding_free_passages)
        if self.padding_free_passages:
            tensors["ends"] = flat_positions(offsets, last_columns)
        else:
            lengths = torch.tensor([len(row) for row in rows])
            width = tensors["input_ids"].shape[1]
            tensors["attention_mask"] = (torch.arange(width) < lengths[:, None]).long()
        return {f"{prefix}_{name}": tensor for name, tensor in tensors.items()}


def _passage_order(cuts: Sequence[Cut]) -> dict[int, int]:
    """Return for each passage row, in the order of the micro-batches, its place in that order."""
    new_row: dict[int, int] = {}
    for cut in cuts:
        for row in cut.passages:
            new_row[row] = len(new_row)
    return new_row


def _query_tensors(queries: Sequence[Query], rows: BatchRows, new_row: Mapping[int, int]) -> dict[str, torch.Tensor]:
    """Return where queries are among the query embeddings, and which passage rows belong to them, by name."""
    nsp_rows, labels, distilled_rows, candidate_rows = [], [], [], []
    scores: list[torch.Tensor] = []
    for row, query in enumerate(queries):
        if query.passage is None:
            distilled_rows.append(row)
            candidate_rows.append([new_row[rows.row_of_passage[passage]] for passage in query.candidates])
            scores.append(torch.tensor(query.candidate_scores, dtype=torch.float))
        else:
            nsp_rows.append(row)
            labels.append(new_row[rows.row_of_passage[query.passage]])
    return {
        "passage_labels": torch.tensor(labels, dtype=torch.long),
        "nsp_query_rows": torch.tensor(nsp_rows, dtype=torch.long),
        "distilled_query_rows": torch.tensor(distilled_rows, dtype=torch.long),
        "candidate_rows": pad_rows(candidate_rows, -1)[0],
        "candidate_scores": pad_sequence(scores, batch_first=True) if scores else torch.zeros(0, 1),
    }
