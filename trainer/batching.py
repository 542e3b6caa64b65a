"""Instances to a batch: micro-batches that waste little padding, one row for each distinct passage, and the facts of a batch that all ranks need."""

import hashlib
from dataclasses import dataclass, field

import numpy as np
import torch

from modeling_cosup.tokenization_cosup import pad_rows

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

    instance_ids: list = field(default_factory=list)
    query_instance_ids: list = field(default_factory=list)
    passage_keys: list = field(default_factory=list)
    positive_keys: list = field(default_factory=list)
    query_keys: list = field(default_factory=list)
    passage_labels: list = field(default_factory=list)
    num_labels: int = 0
    num_gen_tokens: int = 0
    num_tokens: int = 0
    num_padded_tokens: int = 0


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
        `dict`: `micro_batches`, a list of `dict` of tensors as `CoSupForCausalLM.forward` takes them; `passage_labels` `(N,)`, for each query, in
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
        instances = [self._instance(feature) for feature in features]
        passages, keys, rows = self._passages(instances)
        if self.supervision == "nsp":
            instances = [instance for instance in instances if instance["queries"]]
        queries = [query for instance in instances for query in instance["queries"]]
        query_rows = [query["input_ids"] for query in queries] if self.encoder_queries else []
        gen_lengths = [] if self._no_gen else [len(instance["input_ids"]) for instance in instances]
        lengths = {"gen": gen_lengths, "passages": list(map(len, passages)), "queries": list(map(len, query_rows))}
        groups = self._cut(lengths)

        passage_order = [row for group in groups["passages"] for row in group]
        position = {row: i for i, row in enumerate(passage_order)}
        starts = np.cumsum([0] + [len(instance["queries"]) for instance in instances]).tolist()
        query_order = [i for group in groups["gen"] for instance in group for i in range(starts[instance], starts[instance + 1])]
        if self.encoder_queries:
            query_order = [i for group in groups["queries"] for i in group]
        ordered = [queries[i] for i in query_order]
        facts = BatchFacts(
            query_instance_ids=[query["instance_id"] for query in ordered],
            passage_keys=[tuple(sorted(keys[row])) for row in passage_order],
            positive_keys=[query["positive_keys"] for query in ordered],
            query_keys=[query["key"] for query in ordered],
            passage_labels=[position[rows[query["passage"]]] for query in ordered],
            num_labels=sum(label != -100 for instance in instances for label in instance["labels"][1:]),
            num_gen_tokens=sum(lengths["gen"]),
            num_tokens=sum(map(sum, lengths.values())),
        )
        micro_batches = []
        for i in range(max(1, *map(len, groups.values()))):
            gen, passage, query = (groups[name][i] if i < len(groups[name]) else [] for name in ("gen", "passages", "queries"))
            micro_batch = self._gen([instances[j] for j in gen]) if gen else {}
            micro_batch |= self._emb_seq("passage", [passages[row] for row in passage]) if passage else {}
            micro_batch |= self._emb_seq("query", [query_rows[j] for j in query]) if query else {}
            facts.instance_ids.append([queries[j]["instance_id"] for j in query] if self._no_gen else [instances[j]["id"] for j in gen])
            facts.num_padded_tokens += sum(tensor.numel() for name, tensor in micro_batch.items() if name.endswith("input_ids"))
            micro_batches.append(micro_batch)
        self.complete(micro_batches[-1])  # every part takes part in every step: a step without passages is one with zero gradients
        return {"micro_batches": micro_batches, "passage_labels": torch.tensor(facts.passage_labels, dtype=torch.long), "facts": facts}

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

    def _cut(self, lengths):
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
        return {name: part[:: 1 if name == "gen" else -1] for name, part in groups.items()}

    # ------------------------------------------------------------------ tensors

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
