"""The corpus that candidates are retrieved from, read and checked before training starts."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import datasets
import numpy as np
import torch

from modeling_cosup import CoSupForCausalLM, PassageIndex, Retriever
from modeling_cosup.passages_cosup import (
    can_be_read_twice,
    checked_passages,
    dataset_rows,
    find_duplicate,
    hash_id,
    read_corpus,
)
from modeling_cosup.retrieval_cosup import special_text_check
from modeling_cosup.retriever_cosup import content_digest
from modeling_cosup.tokenization_cosup import encode_passages_for_emb_seq

from .data import checked_candidates
from .passage_contents import PassageContents


@dataclass(frozen=True)
class CandidateCorpus:
    """
    The passages that candidates are retrieved from.

    Args:
        source: passages, which can be read again and again, or an index of them.
        num_passages (`int`): their number.
        digest (`str`): tells the corpus from others.
    """

    source: Any
    num_passages: int
    digest: str

    def __len__(self) -> int:
        return self.num_passages

    @property
    def index(self) -> Retriever | None:
        """The index that was given in place of passages."""
        return self.source if isinstance(self.source, Retriever) else None


def read_candidates_corpus(
    source: Any, model: CoSupForCausalLM, gold: PassageContents, named: Mapping[str, str]
) -> CandidateCorpus:
    """
    Read and check a corpus.

    Args:
        source: passages as [`PassageIndex.build`] takes them, or a [`Retriever`] of this model.
        model ([`CoSupForCausalLM`]): its tokenizers say whether two passages of one id are the same.
        gold ([`PassageContents`]): what Emb_seq reads of the passages of the instances.
        named (`dict`): ids that instances name as their candidates, and where.

    Raises:
        `ValueError`: for a corpus that can be read only once, holds no passage, holds a passage with a missing or
            empty field or an id twice, or lacks an id that an instance names; or for an id that an instance has with
            another title or text.
    """
    if isinstance(source, Retriever):
        source.rows_of(named)
        _check_gold_of_index(source, model, gold)
        return CandidateCorpus(source, len(source), content_digest(source))
    if not can_be_read_twice(source):
        raise ValueError(
            f"corpus is a {type(source).__name__}, which can be read only once: give a list, a dataset or a file."
        )
    total = hashlib.sha256()
    hashes = []
    missing = dict(named)
    check = special_text_check(model)
    for where, passage in checked_passages(read_corpus(source), check):
        total.update("\0".join((passage["id"], passage["title"], passage["text"], "")).encode())
        hashes.append(hash_id(passage["id"]))
        missing.pop(passage["id"], None)
        if passage["id"] in gold:
            _check_gold(passage, where, model, gold)
    if not hashes:
        raise ValueError("corpus holds no passage.")
    for id, where in missing.items():
        raise ValueError(f"{where}: candidates holds {id!r}, which the corpus lacks ({len(missing)} such ids).")
    num_passages = len(hashes)
    find_duplicate(np.array(hashes), lambda: checked_passages(read_corpus(source)))
    return CandidateCorpus(source, num_passages, total.hexdigest())


def _check_gold(passage: Mapping[str, Any], where: str, model: CoSupForCausalLM, gold: PassageContents) -> None:
    (ids,) = encode_passages_for_emb_seq(model.emb_seq_tokenizer, [passage], model.config)
    gold.add(passage["id"], tuple(ids), where)


def _check_gold_of_index(index: Retriever, model: CoSupForCausalLM, gold: PassageContents) -> None:
    if not isinstance(index, PassageIndex):  # other indexes do not say which ids they hold
        return
    rows = index.find(gold.ids())
    rows = rows[rows >= 0]
    for row, passage in zip(rows.tolist(), index.get_passages(rows), strict=True):
        _check_gold(passage, f"Row {row} of the index", model, gold)


def candidates_of_instances(sets: Mapping[str, Any]) -> tuple[list[dict[str, str]], dict[str, str]]:
    """
    Return what instances bring as `candidates`: the distinct passages, and ids with the place that names them.

    Args:
        sets (`dict`): instances, tokenized or not, by the name of their set, for errors. The candidates of a stream
            are not known in advance.

    Raises:
        `ValueError`: for an invalid passage, and for an id with two contents.
    """
    contents = PassageContents()
    passages: dict[str, dict[str, str]] = {}
    named: dict[str, str] = {}
    for name, dataset in sets.items():
        if isinstance(dataset, datasets.IterableDataset | torch.utils.data.IterableDataset):
            continue
        for row, instance in enumerate(dataset_rows(dataset)):
            where = f"{name}, row {row}"
            candidates = instance.get("candidates") or instance.get("candidate_pool") or []
            for candidate in checked_candidates(candidates, where):
                if isinstance(candidate, str):
                    named.setdefault(candidate, where)
                    continue
                contents.add(candidate["id"], (candidate["title"], candidate["text"]), where)
                passages[candidate["id"]] = candidate
    for id in passages.keys() & named.keys():
        del named[id]
    return list(passages.values()), named
