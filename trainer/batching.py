"""
Instances to a batch: micro-batches that waste little padding, one row for each distinct passage, and the facts of a
batch that all ranks need.
"""

from dataclasses import dataclass, field

import numpy as np
import torch

from modeling_cosup.tokenization_cosup import Packing, pad_rows

from .batch_rows import read_batch
from .cutting import cut_by_number, cut_by_padding, cut_by_tokens

# ---------------------------------------------------------------------- what a batch is


@dataclass
class BatchFacts:
    """
    What is known of a batch on the host, so that nobody waits for a GPU to learn it.

    Args:
        instance_ids (`list[list[str]]`): of each micro-batch.
        query_instance_ids (`list[str]`): of the instance of each query.
        passage_keys (`list[tuple[int, ...]]`): for each passage row hashes of its content and of its ids; two that
            share one are the same passage.
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


def forward_arguments(micro_batch: dict) -> dict:
    """
    What `CoSupForCausalLM.forward` takes of a micro-batch.

    A micro-batch is a flat `dict` of tensors, which every library pins, moves and copies; what belongs together
    becomes one argument here.

    Args:
        micro_batch (`dict[str, torch.Tensor]`): as [`CoSupDataCollator`] cuts it.

    Returns:
        `dict`: the same tensors, without `first_pass`; where passages or queries are packed, with `passage_packing` or
            `query_packing`.
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
        pad_token_id, emb_seq_pad_token_id (`int`): may equal EOS; padding is on the right, where causal attention
            never looks.
        nsp_token_id (`int`): id of `[NSP]`.
        mask_duplicates (`bool`): identical passages become one row.
        supervision (`str`): `"co"`, `"ntp"` (no passages), `"nsp"` (nothing after the last `[NSP]`, no labels) or
            `"separate"` (queries are rows).
        encoder_queries (`bool`): queries are rows of their own, read by an encoder; always so with `"separate"`. With
            `"nsp"` nothing is left for Gen.
        max_instances (`int`, *optional*): of a micro-batch.
        max_tokens (`int`, *optional*): of a micro-batch, padding, passages and queries included; takes the place of
            `max_instances`.
        call_overhead (`int`, *optional*): without a limit, a batch is cut where that saves padding; each further
            micro-batch counts as this many tokens. `None`: not cut.
        padding_free (`bool`): rows of Gen are concatenated into one row, with positions of their own.
        padding_free_passages (`bool`): rows of Emb_seq too.
        shorten_first_pass (`bool`): add to each micro-batch, as `first_pass`, its rows up to their last `[NSP]`: all
            that the first pass of GradCache must read; nothing where Gen makes no queries.

    Returns:
        `dict`: `micro_batches`, a list of `dict` of tensors, see [`forward_arguments`]; `passage_labels` `(N,)`, for
        each query, in the order of the micro-batches, the row of its passage among the passages of all micro-batches;
        `facts`, a [`BatchFacts`].

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
        rows = read_batch(features, self.nsp_token_id, self.supervision, self.encoder_queries, self.mask_duplicates)
        cuts = self._cut(rows)
        micro_batches = [self._micro_batch(rows, cut) for cut in cuts]
        facts = self._facts(rows, cuts, micro_batches)
        # every part takes part in every step: a step without passages is one with zero gradients
        self.complete(micro_batches[-1])
        passage_labels = torch.tensor(facts.passage_labels, dtype=torch.long)
        return {"micro_batches": micro_batches, "passage_labels": passage_labels, "facts": facts}

    def complete(self, micro_batch, device=None):
        """
        Give `micro_batch`, in place, an empty share of each part of the model that it does not touch: ranks must make
        the same calls.
        """
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
            micro_batch["first_pass"] = {}
            if not self.encoder_queries:
                micro_batch["first_pass"] |= {"input_ids": zero, "nsp_positions": zero[0, :0]}
            if not self.encoder_queries and self.padding_free:
                micro_batch["first_pass"]["position_ids"] = zero
        return micro_batch

    @property
    def _no_gen(self):
        """Whether Gen has no part in the loss: next passages alone, of an encoder's queries."""
        return self.supervision == "nsp" and self.encoder_queries

    # ------------------------------------------------------------------ cutting

    def _lengths(self, rows):
        """The length of each row, by part."""
        gen = [] if self._no_gen else [len(instance["input_ids"]) for instance in rows.instances]
        queries = [len(query["input_ids"]) for query in rows.queries] if self.encoder_queries else []
        return {"gen": gen, "passages": [len(passage) for passage in rows.passages], "queries": queries}

    def _cut(self, rows):
        """The row numbers of each micro-batch, by part: `list[dict[str, list[int]]]`, at least one micro-batch."""
        groups = self._groups(self._lengths(rows))
        count = max(1, *map(len, groups.values()))
        padded = {name: part + [[]] * (count - len(part)) for name, part in groups.items()}
        return [{name: part[i] for name, part in padded.items()} for i in range(count)]

    def _groups(self, lengths):
        """Row numbers in groups, by part. With a limit, long instances share a micro-batch with short passages."""
        packed = {part: self.padding_free if part == "gen" else self.padding_free_passages for part in lengths}
        groups = {}
        if self.max_tokens is None and self.max_instances is None:
            for part, part_lengths in lengths.items():
                groups[part] = cut_by_padding(part_lengths, None if packed[part] else self.call_overhead)
            return groups
        total = max(1, sum(map(sum, lengths.values())))
        num_instances = len(lengths["queries" if self._no_gen else "gen"])
        for part, part_lengths in lengths.items():
            if self.max_tokens is not None:
                share = self.max_tokens * sum(part_lengths) / total
                groups[part] = cut_by_tokens(part_lengths, share, packed[part])
            else:
                groups[part] = cut_by_number(part_lengths, max(1, -(-num_instances // self.max_instances)))
            if part != "gen":
                groups[part].reverse()
        return groups

    def _facts(self, rows, cuts, micro_batches):
        """What the host knows of a batch; queries and passages in the order of its micro-batches."""
        lengths = self._lengths(rows)
        passage_order = [row for cut in cuts for row in cut["passages"]]
        position = {row: i for i, row in enumerate(passage_order)}
        queries, instance_ids = [], []
        for cut in cuts:
            queries_of_cut = self._queries(rows, cut)
            queries += queries_of_cut
            if self._no_gen:
                instance_ids.append([query["instance_id"] for query in queries_of_cut])
            else:
                instance_ids.append([rows.instances[i]["id"] for i in cut["gen"]])
        num_padded_tokens = 0
        for micro_batch in micro_batches:
            num_padded_tokens += sum(ids.numel() for name, ids in micro_batch.items() if name.endswith("input_ids"))
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
            num_padded_tokens=num_padded_tokens,
        )

    def _queries(self, rows, cut):
        """The queries of a micro-batch, in the order in which it makes them."""
        if self.encoder_queries:
            all_queries = rows.queries
            return [all_queries[i] for i in cut["queries"]]
        return [query for i in cut["gen"] for query in rows.instances[i]["queries"]]

    # ------------------------------------------------------------------ tensors

    def _micro_batch(self, rows, cut):
        """The tensors of a micro-batch, by argument of forward; see [`forward_arguments`]."""
        micro_batch = {}
        if cut["gen"]:
            micro_batch |= self._gen([rows.instances[i] for i in cut["gen"]])
        if cut["passages"]:
            micro_batch |= self._emb_seq("passage", [rows.passages[row] for row in cut["passages"]])
        if cut["queries"]:
            micro_batch |= self._emb_seq("query", [query["input_ids"] for query in self._queries(rows, cut)])
        return micro_batch

    def _gen(self, instances):
        """What Gen reads, with the positions of `[NSP]` and of labels in the flattened tensor."""
        rows = [instance["input_ids"] for instance in instances]
        columns = [instance["columns"] for instance in instances]
        gen_queries = not self.encoder_queries and self.supervision != "ntp"
        micro_batch, offsets = _lay_out(rows, self.pad_token_id, self.padding_free)
        if gen_queries:
            micro_batch["nsp_positions"] = _positions(offsets, columns)
        if self.supervision != "nsp":
            # packed, the first label would be the next token of the row before
            labels = [[-100, *instance["labels"][1:]] for instance in instances]
            trained = [[i for i, label in enumerate(row[1:]) if label != -100] for row in labels]
            micro_batch["labels"] = _lay_out(labels, -100, self.padding_free)[0]["input_ids"]
            micro_batch["label_positions"] = _positions(offsets, trained)
        if self.shorten_first_pass:
            micro_batch["first_pass"] = self._first_pass(instances) if gen_queries else {}
        return micro_batch

    def _first_pass(self, instances):
        """What Gen reads in the first pass of GradCache: rows up to their last `[NSP]`."""
        retrieving = [instance for instance in instances if instance["columns"]]
        if not retrieving:
            return {}
        rows = [instance["input_ids"][: instance["columns"][-1] + 1] for instance in retrieving]
        first_pass, offsets = _lay_out(rows, self.pad_token_id, self.padding_free)
        first_pass["nsp_positions"] = _positions(offsets, [instance["columns"] for instance in retrieving])
        return first_pass

    def _emb_seq(self, name, rows):
        laid_out, offsets = _lay_out(rows, self.emb_seq_pad_token_id, self.padding_free_passages)
        if self.padding_free_passages:
            laid_out["ends"] = _positions(offsets, [[len(row) - 1] for row in rows])
        else:
            lengths = torch.tensor([len(row) for row in rows])
            laid_out["attention_mask"] = (torch.arange(laid_out["input_ids"].shape[1]) < lengths[:, None]).long()
        return {f"{name}_{key}": value for key, value in laid_out.items()}


def _lay_out(rows, pad_token_id, packed):
    """Rows as one padded tensor, or concatenated into one row; and where each begins in the flattened tensor."""
    if not packed:
        input_ids, _ = pad_rows([list(row) for row in rows], pad_token_id)
        return {"input_ids": input_ids}, [i * input_ids.shape[1] for i in range(len(rows))]
    input_ids = torch.tensor([[token for row in rows for token in row]], dtype=torch.long)
    position_ids = torch.cat([torch.arange(len(row)) for row in rows])[None]
    return {"input_ids": input_ids, "position_ids": position_ids}, np.cumsum(
        [0] + [len(row) for row in rows[:-1]]
    ).tolist()


def _positions(offsets, columns):
    return torch.tensor(
        [offset + column for offset, row in zip(offsets, columns, strict=True) for column in row], dtype=torch.long
    )
