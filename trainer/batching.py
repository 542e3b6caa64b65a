"""Instances to a batch: micro-batches that waste little padding, one row for each distinct passage, and the facts of a batch that all ranks need."""

import hashlib
from dataclasses import dataclass, field

import numpy as np
import torch

from modeling_cosup.tokenization_cosup import Packing, pad_rows

# ---------------------------------------------------------------------- what a batch is


@dataclass
class BatchFacts:
    """
    What is known of a batch on the host, so that nobody waits for a GPU to learn it.

    Args:
        instance_ids (`list[list[str]]`): of each micro-batch.
        query_instance_ids (`list[str]`): of the instance of each query.
        passage_keys (`list[tuple[int, ...]]`): for each passage row hashes of its content and of its ids; two that share one are the same passage.
        positive_keys (`list[tuple[int, ...]]`): for each query the hashes of ids that would have been right too.
        query_keys (`list[int]`): for each query a hash of everything up to its `[NSP]`.
        passage_labels (`list[int]`): for each query its passage's row.
        num_labels (`int`): trained tokens.
        num_gen_tokens, num_tokens (`int`): tokens that Gen, and Gen and Emb_seq, read, without padding.
        num_padded_tokens (`int`): the same with padding.
    """

    instance_ids: list[list[str]] = field(default_factory=list)
    query_instance_ids: list[str] = field(default_factory=list)
    passage_keys: list[tuple[int, ...]] = field(default_factory=list)
    positive_keys: list[tuple[int, ...]] = field(default_factory=list)
    query_keys: list[int] = field(default_factory=list)
    passage_labels: list[int] = field(default_factory=list)
    num_labels: int = 0
    num_gen_tokens: int = 0
    num_tokens: int = 0
    num_padded_tokens: int = 0


@dataclass
class _Rows:
    """
    What the instances of a batch hold, before it is cut.

    Args:
        instances (`list[dict]`): see `CoSupDataCollator._instance`.
        queries (`list[dict]`): of all of them, in order.
        passages (`list[tuple[int, ...]]`): token ids of each passage row.
        passage_keys (`list[set[int]]`): of each passage row, see [`BatchFacts`].
        row_of_passage (`dict[tuple, int]`): of each passage that an instance names.
    """

    instances: list[dict]
    queries: list[dict]
    passages: list[tuple[int, ...]]
    passage_keys: list[set[int]]
    row_of_passage: dict[tuple, int]


def forward_arguments(micro_batch: dict) -> dict:
    """
    What `CoSupForCausalLM.forward` takes of a micro-batch.

    A micro-batch is a flat `dict` of tensors, which every library pins, moves and copies; what belongs together becomes one argument here.

    Args:
        micro_batch (`dict[str, torch.Tensor]`): as [`CoSupDataCollator`] cuts it.

    Returns:
        `dict`: the same tensors, without `first_pass`; where passages or queries are packed, with `passage_packing` or `query_packing`.
    """
    arguments = {name: tensor for name, tensor in micro_batch.items() if name != "first_pass"}
    for part in ("passage", "query"):
        if f"{part}_ends" in arguments:
            position_ids, ends = arguments.pop(f"{part}_position_ids"), arguments.pop(f"{part}_ends")
            arguments[f"{part}_packing"] = Packing(position_ids, ends)
    return arguments


@dataclass
class CoSupDataCollator:
    """
    Sorts instances by length, cuts them into micro-batches, and points each `[NSP]` at its passage.

    How a batch is cut changes neither loss nor gradients: all micro-batches of a batch share their passages.

    Args:
        pad_token_id, emb_seq_pad_token_id (`int`): may equal EOS; padding stands on the right, where causal attention never looks.
        nsp_token_id (`int`): id of `[NSP]`.
        mask_duplicates (`bool`): identical passages become one row.
        supervision (`str`): `"co"`, `"ntp"` (no passages), `"nsp"` (nothing behind the last `[NSP]`, no labels) or `"separate"` (queries are rows).
        encoder_queries (`bool`): queries are rows of their own, read by an encoder; always so with `"separate"`. With `"nsp"` nothing is left for Gen.
        max_instances (`int`, *optional*): of a micro-batch.
        max_tokens (`int`, *optional*): of a micro-batch, padding, passages and queries included; takes the place of `max_instances`.
        call_overhead (`int`, *optional*): without a limit, a batch is cut where that saves padding, counting for every further micro-batch this many
            tokens. `None`: not cut.
        padding_free (`bool`): rows of Gen stand one behind the other in one row, with positions of their own.
        padding_free_passages (`bool`): those of Emb_seq too.
        shorten_first_pass (`bool`): add to each micro-batch, as `first_pass`, its rows up to their last `[NSP]`: all that the first pass of GradCache
            must read; nothing where Gen makes no queries.

    Returns:
        `dict`: `micro_batches`, a list of `dict` of tensors, see [`forward_arguments`]; `passage_labels` `(N,)`, for each query, in
        the order of the micro-batches, the row of its passage, in theirs; `facts`, a [`BatchFacts`].

    Raises:
        `ValueError`: a malformed instance, naming its id.
    """

    pad_token_id: int
    emb_seq_pad_token_id: int
    nsp_token_id: int
    mask_duplicates: bool = True
    supervision: str = "co"
    encoder_queries: bool = False
    max_instances: int | None = None
    max_tokens: int | None = None
    call_overhead: int | None = None
    padding_free: bool = False
    padding_free_passages: bool = False
    shorten_first_pass: bool = False

    def __post_init__(self):
        self.encoder_queries |= self.supervision == "separate"

    def __call__(self, features):
        rows = self._read(features)
        cuts = self._cut(rows)
        micro_batches = [self._micro_batch(rows, cut) for cut in cuts]
        facts = self._facts(rows, cuts, micro_batches)
        self.complete(micro_batches[-1])  # every part takes part in every step: a step without passages is one with zero gradients
        passage_labels = torch.tensor(facts.passage_labels, dtype=torch.long)
        return {"micro_batches": micro_batches, "passage_labels": passage_labels, "facts": facts}

    def complete(self, micro_batch, device=None):
        """Give `micro_batch`, in place, an empty share of each part of the model that it does not touch: ranks must make the same calls."""
        zero = torch.zeros(1, 1, dtype=torch.long, device=device)
        if "input_ids" not in micro_batch:
            micro_batch["input_ids"] = zero
            if self.padding_free:
                micro_batch["position_ids"] = zero
            if self.supervision != "nsp":
                micro_batch |= {"labels": zero - 100, "label_positions": zero[0, :0]}
            if not self.encoder_queries and self.supervision != "ntp":
                micro_batch["nsp_positions"] = zero[0, :0]
        if self.supervision != "ntp" and "passage_input_ids" not in micro_batch:
            micro_batch["passage_input_ids"] = zero[:0]
        if self.encoder_queries and "query_input_ids" not in micro_batch:
            micro_batch["query_input_ids"] = zero[:0]
        if self.shorten_first_pass and not micro_batch.get("first_pass"):
            rows = {"input_ids": zero, "nsp_positions": zero[0, :0]} | ({"position_ids": zero} if self.padding_free else {})
            micro_batch["first_pass"] = {} if self.encoder_queries else rows
        return micro_batch

    @property
    def _no_gen(self):
        """Whether Gen has no part in the loss: next passages alone, of an encoder's queries."""
        return self.supervision == "nsp" and self.encoder_queries

    # ------------------------------------------------------------------ reading instances

    def _read(self, features):
        """The rows that Gen and the encoders read for these instances, before any is cut or padded."""
        instances = [self._instance(feature) for feature in features]
        passages, passage_keys, row_of_passage = self._passages(instances)
        if self.supervision == "nsp":
            instances = [instance for instance in instances if instance["queries"]]
        queries = [query for instance in instances for query in instance["queries"]]
        return _Rows(instances, queries, passages, passage_keys, row_of_passage)

    def _instance(self, feature):
        """An instance with one entry of `queries` for each `[NSP]`."""
        id = str(feature.get("id", "without id"))
        input_ids, labels, passages = feature["input_ids"], feature["labels"], feature["passage_input_ids"]
        columns = [i for i, token in enumerate(input_ids) if token == self.nsp_token_id]
        if not input_ids or len(columns) != len(passages) or len(labels) != len(input_ids):
            found = f"{len(input_ids)} tokens, {len(labels)} labels, {len(columns)} [NSP] and {len(passages)} passages"
            raise ValueError(f"Instance {id!r} has {found}; expected as many labels as tokens and as many passages as [NSP].")
        instance = {"id": id, "input_ids": input_ids, "labels": labels, "columns": columns, "queries": [], "negatives": []}
        if self.supervision == "ntp":
            return instance | {"columns": []}
        passage_ids, query_input_ids = feature.get("passage_ids") or [None] * len(columns), feature.get("query_input_ids")
        if self.encoder_queries and query_input_ids is None:
            raise ValueError(f"Instance {id!r} has no query_input_ids, which supervision={self.supervision!r} needs: tokenize it with this model's config.")
        for i, column in enumerate(columns):
            positive_ids = (feature.get("positive_ids") or {i: ()})[i] or ()
            query = {"instance_id": id, "key": _hash("query", *input_ids[: column + 1]), "passage": (id, i, tuple(passages[i]), passage_ids[i])}
            query |= {"positive_keys": tuple(_hash("id", positive) for positive in positive_ids)}
            query |= {"input_ids": query_input_ids[i]} if self.encoder_queries else {}
            instance["queries"].append(query)
        negatives = feature.get("negative_input_ids") or []
        negative_ids = feature.get("negative_ids") or [None] * len(negatives)
        instance["negatives"] = [(id, f"negative {i}", tuple(ids), negative_ids[i]) for i, ids in enumerate(negatives)]
        if self.supervision == "nsp":  # nothing behind the last [NSP] has a part in the loss
            instance |= {"input_ids": input_ids[: columns[-1] + 1] if columns else [], "labels": []}
        return instance

    def _passages(self, instances):
        """Passage rows `list[tuple[int]]`, their keys `list[set[int]]`, and the row of each passage that an instance names."""
        passages, keys, rows, seen = [], [], {}, {}
        for passage in [query["passage"] for x in instances for query in x["queries"]] + [negative for x in instances for negative in x["negatives"]]:
            *_, ids, passage_id = passage
            row = seen.setdefault(ids, len(passages)) if self.mask_duplicates else len(passages)
            if row == len(passages):
                passages.append(ids)
                keys.append({_hash("content", *ids)})
            if passage_id is not None:
                keys[row].add(_hash("id", passage_id))
            rows[passage] = row
        return passages, keys, rows

    # ------------------------------------------------------------------ cutting

    def _lengths(self, rows):
        """The length of each row, by part."""
        gen = [] if self._no_gen else [len(instance["input_ids"]) for instance in rows.instances]
        queries = [len(query["input_ids"]) for query in rows.queries] if self.encoder_queries else []
        return {"gen": gen, "passages": [len(passage) for passage in rows.passages], "queries": queries}

    def _cut(self, rows):
        """The numbers of the rows of each micro-batch, by part: `list[dict[str, list[int]]]`, of at least one micro-batch."""
        groups = self._groups(self._lengths(rows))
        count = max(1, *map(len, groups.values()))
        padded = {name: part + [[]] * (count - len(part)) for name, part in groups.items()}
        return [{name: part[i] for name, part in padded.items()} for i in range(count)]

    def _groups(self, lengths):
        """Row numbers of each micro-batch, by part. With a limit, long instances share a micro-batch with short passages."""
        packed = {"gen": self.padding_free, "passages": self.padding_free_passages, "queries": self.padding_free_passages}
        if self.max_tokens is None and self.max_instances is None:
            return {name: cut_by_padding(part, None if packed[name] else self.call_overhead) for name, part in lengths.items()}
        if self.max_tokens is not None:
            total = max(1, sum(map(sum, lengths.values())))
            groups = {name: cut_by_tokens(part, self.max_tokens * sum(part) / total, packed[name]) for name, part in lengths.items()}
        else:
            count = max(1, -(-len(lengths["queries" if self._no_gen else "gen"]) // self.max_instances))
            groups = {name: cut_by_number(part, count) for name, part in lengths.items()}
        return {name: part if name == "gen" else part[::-1] for name, part in groups.items()}

    def _facts(self, rows, cuts, micro_batches):
        """What the host knows of a batch; queries and passages in the order of its micro-batches."""
        lengths = self._lengths(rows)
        passage_order = [row for cut in cuts for row in cut["passages"]]
        position = {row: i for i, row in enumerate(passage_order)}
        queries = [query for cut in cuts for query in self._queries(rows, cut)]
        if self._no_gen:
            instance_ids = [[query["instance_id"] for query in self._queries(rows, cut)] for cut in cuts]
        else:
            instance_ids = [[rows.instances[i]["id"] for i in cut["gen"]] for cut in cuts]
        padded = [tensor.numel() for batch in micro_batches for name, tensor in batch.items() if name.endswith("input_ids")]
        return BatchFacts(
            instance_ids=instance_ids,
            query_instance_ids=[query["instance_id"] for query in queries],
            passage_keys=[tuple(sorted(rows.passage_keys[row])) for row in passage_order],
            positive_keys=[query["positive_keys"] for query in queries],
            query_keys=[query["key"] for query in queries],
            passage_labels=[position[rows.row_of_passage[query["passage"]]] for query in queries],
            num_labels=sum(label != -100 for instance in rows.instances for label in instance["labels"][1:]),
            num_gen_tokens=sum(lengths["gen"]),
            num_tokens=sum(map(sum, lengths.values())),
            num_padded_tokens=sum(padded),
        )

    def _queries(self, rows, cut):
        """The queries of a micro-batch, in the order in which it makes them."""
        if self.encoder_queries:
            return [rows.queries[i] for i in cut["queries"]]
        return [query for i in cut["gen"] for query in rows.instances[i]["queries"]]

    # ------------------------------------------------------------------ tensors

    def _micro_batch(self, rows, cut):
        """The tensors of a micro-batch, with the arguments of forward that they are; see [`forward_arguments`]."""
        micro_batch = {}
        if cut["gen"]:
            micro_batch |= self._gen([rows.instances[i] for i in cut["gen"]])
        if cut["passages"]:
            micro_batch |= self._emb_seq("passage", [rows.passages[row] for row in cut["passages"]])
        if cut["queries"]:
            micro_batch |= self._emb_seq("query", [rows.queries[i]["input_ids"] for i in cut["queries"]])
        return micro_batch

    def _gen(self, instances):
        rows = [instance["input_ids"] for instance in instances]
        micro_batch, offsets = _lay_out(rows, self.pad_token_id, self.padding_free)
        if not self.encoder_queries and self.supervision != "ntp":
            micro_batch["nsp_positions"] = _positions(offsets, [instance["columns"] for instance in instances])
        if self.supervision != "nsp":
            labels = [[-100, *instance["labels"][1:]] for instance in instances]  # packed, the first would be its neighbour's next token
            micro_batch["labels"] = _lay_out(labels, -100, self.padding_free)[0]["input_ids"]
            micro_batch["label_positions"] = _positions(offsets, [[i for i, label in enumerate(row[1:]) if label != -100] for row in labels])
        retrieving = [instance for instance in instances if instance["columns"]]
        if self.shorten_first_pass:
            micro_batch["first_pass"] = {}
        if self.shorten_first_pass and not self.encoder_queries and self.supervision != "ntp" and retrieving:
            short = [instance["input_ids"][: instance["columns"][-1] + 1] for instance in retrieving]
            first, offsets = _lay_out(short, self.pad_token_id, self.padding_free)
            micro_batch["first_pass"] = first | {"nsp_positions": _positions(offsets, [instance["columns"] for instance in retrieving])}
        return micro_batch

    def _emb_seq(self, name, rows):
        laid_out, offsets = _lay_out(rows, self.emb_seq_pad_token_id, self.padding_free_passages)
        if self.padding_free_passages:
            laid_out["ends"] = _positions(offsets, [[len(row) - 1] for row in rows])
        else:
            lengths = torch.tensor([len(row) for row in rows])
            laid_out["attention_mask"] = (torch.arange(laid_out["input_ids"].shape[1]) < lengths[:, None]).long()
        return {f"{name}_{key}": value for key, value in laid_out.items()}


def _lay_out(rows, pad_token_id, packed):
    """Rows as one padded tensor, or one behind the other; and where each begins in the flattened tensor."""
    if not packed:
        input_ids, _ = pad_rows([list(row) for row in rows], pad_token_id)
        return {"input_ids": input_ids}, [i * input_ids.shape[1] for i in range(len(rows))]
    input_ids = torch.tensor([[token for row in rows for token in row]], dtype=torch.long)
    position_ids = torch.cat([torch.arange(len(row)) for row in rows])[None]
    return {"input_ids": input_ids, "position_ids": position_ids}, np.cumsum([0] + [len(row) for row in rows[:-1]]).tolist()


def _positions(offsets, columns):
    return torch.tensor([offset + column for offset, row in zip(offsets, columns, strict=True) for column in row], dtype=torch.long)


def _hash(*values):
    """A 63-bit hash that is the same in every process."""
    return int.from_bytes(hashlib.blake2b(repr(values).encode(), digest_size=8).digest(), "big") >> 1


# ---------------------------------------------------------------------- cutting rows by length


def _longest_first(lengths):
    return sorted(range(len(lengths)), key=lambda i: -lengths[i])


def cut_by_tokens(lengths, max_tokens, packed=False):
    """Rows, longest first, in groups of at most `max_tokens` tokens, padding to the longest included unless `packed`; a longer row stands alone."""
    groups, tokens = [], 0.0
    for i in _longest_first(lengths):
        tokens += lengths[i] if packed or not groups else lengths[groups[-1][0]]
        if not groups or tokens > max_tokens:
            groups.append([])
            tokens = lengths[i]
        groups[-1].append(i)
    return groups


def cut_by_number(lengths, count):
    """Rows, longest first, in at most `count` groups of equal size."""
    order, size = _longest_first(lengths), max(1, -(-len(lengths) // count))
    return [order[start : start + size] for start in range(0, len(order), size)]


def cut_by_padding(lengths, call_overhead):
    """
    Rows, longest first, in the groups for which padded tokens plus `call_overhead` a group are fewest; one group if it is `None`.

    Exact, by dynamic programming: the cheapest cut of the first i rows ends in some group j..i, and row j is the longest of it.
    """
    order = _longest_first(lengths)
    if call_overhead is None or len(order) < 2:
        return [order] if order else []
    longest = np.array([lengths[i] for i in order], dtype=np.float64)
    best, previous = np.zeros(len(order) + 1), np.zeros(len(order) + 1, dtype=np.int64)
    for i in range(1, len(order) + 1):
        costs = best[:i] + (i - np.arange(i)) * longest[:i] + call_overhead
        previous[i] = costs.argmin()
        best[i] = costs[previous[i]]
    groups, end = [], len(order)
    while end > 0:
        groups.insert(0, order[previous[end] : end])
        end = int(previous[end])
    return groups
